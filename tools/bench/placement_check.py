"""Verifies placements without a line of the scheduler's code: plain dictionaries and loops over the same JSON that the scheduler was given.

`Checker` follows a run event by event: each placement is held against capacity per node, device and NUMA zone and against every constraint as the cluster stood
at that moment. As a command it checks a file: `{"nodes": [..], "events": [{"place": {workload}, "node": N, "gpus": [..]}, {"release": id}, ..], "quotas": {..}}`.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

SUFFIXES: dict[str, Fraction | int] = {"m": Fraction(1, 1000), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
PLACES = ("region", "zone", "site", "rack")
WHOLE_GPU = 1000

Labels = Mapping[str, str]
Group = tuple[str, tuple[tuple[str, str], ...]]


def amount(value: Any) -> Fraction:
    """A quantity as an exact number."""
    text = str(value)
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if text.endswith(suffix):
            return Fraction(text[: -len(suffix)]) * SUFFIXES[suffix]
    return Fraction(text)


def requirement_holds(requirement: Mapping[str, Any], labels: Labels) -> bool:
    """One comparison."""
    value, op = labels.get(requirement["key"]), requirement["op"]
    values = [str(item) for item in requirement.get("values", ())]
    if op == "In":
        return value in values
    if op == "NotIn":
        return value not in values
    if op in ("Exists", "DoesNotExist"):
        return bool((value is not None) == (op == "Exists"))
    try:
        if value is None:
            return False
        number, bound = int(value), int(values[0])
        return number > bound if op == "Gt" else number < bound
    except ValueError:
        return False


def selects(selector: Mapping[str, Any] | None, labels: Labels) -> bool:
    """A selector on a label set; None selects nothing."""
    if selector is None:
        return False
    return all(labels.get(key) == value for key, value in selector.get("labels", {}).items()) and all(requirement_holds(item, labels) for item in selector.get("requirements", ()))


def node_labels(node: Mapping[str, Any]) -> dict[str, str]:
    """Labels with those that its place and name give."""
    return {**node.get("labels", {}), **{key: node[key] for key in PLACES if key in node}, "host": node["name"]}


class Checker:
    """The cluster as plain dictionaries. `problems` collects what is wrong, a sentence each."""

    def __init__(self, nodes: Sequence[Mapping[str, Any]], namespaces: Mapping[str, Labels] | None = None, quotas: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.namespaces = namespaces or {}
        self.quotas = {tenant: {name: amount(value) for name, value in limits.items()} for tenant, limits in (quotas or {}).items()}
        self.nodes: dict[str, Mapping[str, Any]] = {}
        self.labels: dict[str, dict[str, str]] = {}
        self.used: dict[str, dict[str, Fraction]] = {}
        self.devices: dict[str, list[dict[str, Any]]] = {}
        self.zones: dict[str, list[dict[str, Fraction]]] = {}
        self.live: dict[str, tuple[Mapping[str, Any], str, tuple[int, ...], Any]] = {}
        self.groups: dict[Group, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.anti: dict[str, tuple[Mapping[str, Any], str, dict[str, int]]] = {}
        self.tenants: dict[str, dict[str, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
        self.placements = 0
        self.problems: list[str] = []
        for node in nodes:
            self.add_node(node)

    def add_node(self, node: Mapping[str, Any]) -> None:
        """A node, empty."""
        name = node["name"]
        self.nodes[name], self.labels[name], self.used[name] = node, node_labels(node), defaultdict(Fraction)
        self.devices[name] = [{"model": item["model"], "milli": 0, "memory": Fraction(0), "room": amount(item.get("memory", 0))} for item in node.get("gpus", ()) for _ in range(item.get("count", 1))]
        self.zones[name] = [{"cpu": amount(zone.get("cpu", 0)), "memory": amount(zone.get("memory", 0))} for zone in node.get("numa", ())]

    def placed(self, workload: Mapping[str, Any], node: str, gpus: Sequence[int] = (), zone: int | None = None) -> None:
        """Hold a placement against the cluster as it stands, then book it. `zone`: the one NUMA zone of a workload that asks for a single one."""
        self.placements += 1
        name = workload["id"]
        if name in self.live:
            self.problems.append(f"{name} is placed twice")
            return
        if node not in self.nodes:
            self.problems.append(f"{name} is placed on {node}, which does not exist")
            return
        self.problems += [f"{name} on {node}: {problem}" for problem in self._constraints(workload, node)]
        self._book(workload, node, tuple(gpus), zone, 1)
        self.problems += [f"{name} on {node}: {problem}" for problem in self._capacity(workload, node, tuple(gpus), zone)]
        self.live[name] = (workload, node, tuple(gpus), zone)

    def released(self, name: str) -> None:
        """Give back what a workload held."""
        if name not in self.live:
            self.problems.append(f"{name} is released without being placed")
            return
        workload, node, gpus, zone = self.live.pop(name)
        self._book(workload, node, gpus, zone, -1)

    def gang_is_whole(self, members: Sequence[str]) -> None:
        """All or nothing."""
        there = sum(name in self.live for name in members)
        if there not in (0, len(members)):
            self.problems.append(f"{there} of {len(members)} members of a gang are placed: {', '.join(members[:4])}...")

    def _book(self, workload: Mapping[str, Any], node: str, gpus: tuple[int, ...], zone: int | None, sign: int) -> None:
        for name, value in workload.get("requests", {}).items():
            self.used[node][name] += sign * amount(value)
            self.tenants[workload.get("tenant", "")][name] += sign * amount(value)
            if zone is not None and name in ("cpu", "memory"):
                self.zones[node][zone][name] -= sign * amount(value)
        self.used[node]["slots"] += sign
        gpu = workload.get("gpu")
        if gpu:
            for device in gpus:
                if 0 <= device < len(self.devices[node]):
                    self.devices[node][device]["milli"] += sign * gpu.get("milli", WHOLE_GPU)
                    self.devices[node][device]["memory"] += sign * amount(gpu.get("memory", 0))
            self.tenants[workload.get("tenant", "")]["gpu_milli"] += sign * gpu.get("count", 1) * gpu.get("milli", WHOLE_GPU)
        self.groups[self._group(workload)][node] += sign
        for term in workload.get("anti_affinity", ()):
            key = json.dumps([term, workload.get("namespace", "default")], sort_keys=True)
            self.anti.setdefault(key, (term, workload.get("namespace", "default"), defaultdict(int)))[2][node] += sign

    @staticmethod
    def _group(workload: Mapping[str, Any]) -> Group:
        return workload.get("namespace", "default"), tuple(sorted(workload.get("labels", {}).items()))

    def _capacity(self, workload: Mapping[str, Any], node: str, gpus: tuple[int, ...], zone: int | None) -> list[str]:
        found = []
        capacity = {name: amount(value) for name, value in self.nodes[node].get("capacity", {}).items()}
        for name in {*workload.get("requests", {}), "slots"}:
            if self.used[node][name] > capacity.get(name, 2**31 if name == "slots" else 0) and amount(workload.get("requests", {}).get(name, 1)):
                found.append(f"{name}: {float(self.used[node][name])} used of {float(capacity.get(name, 0))}")
        gpu = workload.get("gpu")
        if gpu:
            if len(set(gpus)) != gpu.get("count", 1) or len(gpus) != len(set(gpus)):
                found.append(f"holds devices {gpus}, asked for {gpu.get('count', 1)}")
            for device in gpus:
                if not 0 <= device < len(self.devices[node]):
                    found.append(f"device {device} does not exist")
                    continue
                state = self.devices[node][device]
                if state["milli"] > WHOLE_GPU:
                    found.append(f"device {device} is used {state['milli']} of {WHOLE_GPU}")
                if state["memory"] > state["room"]:
                    found.append(f"device {device}: its memory is overcommitted")
                if gpu.get("models") and state["model"] not in gpu["models"]:
                    found.append(f"device {device} is a {state['model']}, wanted {gpu['models']}")
        elif gpus:
            found.append("holds devices without asking for any")
        if workload.get("numa") == "single" and self.zones[node] and workload.get("requests"):
            if zone is None:
                found.append("is spread over NUMA zones")
            elif min(self.zones[node][zone].values()) < 0:
                found.append(f"zone {zone} is overcommitted")
        limits = self.quotas.get(workload.get("tenant", ""), {})
        for name, limit in limits.items():
            if self.tenants[workload.get("tenant", "")][name] > limit:
                found.append(f"tenant {workload.get('tenant')} is over its quota of {name}")
        return found

    def _speaks_of(self, term: Mapping[str, Any], owner_namespace: str, group: Group) -> bool:
        namespaces, chosen = term.get("namespaces", ()), term.get("namespace_selector")
        if not namespaces and chosen is None:
            namespaces = (owner_namespace,)
        if group[0] not in namespaces and not selects(chosen, self.namespaces.get(group[0], {})):
            return False
        return selects(term.get("selector"), dict(group[1]))

    def _count(self, key: str, value: str | None, matching: Sequence[Group]) -> int:
        return 0 if value is None else sum(count for group in matching for node, count in self.groups[group].items() if count and self.labels[node].get(key) == value)

    def _affine(self, workload: Mapping[str, Any], node: str) -> bool:
        labels = self.labels[node]
        required = workload.get("node_affinity", {}).get("required")
        selected = all(labels.get(key) == value for key, value in workload.get("node_selector", {}).items())
        return selected and (required is None or any(
            (term.get("labels") or term.get("names")) and all(requirement_holds(item, labels) for item in term.get("labels", ()))
            and all(requirement_holds({"key": "host", **item}, labels) for item in term.get("names", ())) for term in required))

    def _constraints(self, workload: Mapping[str, Any], node: str) -> list[str]:
        found, labels, space = [], self.labels[node], workload.get("namespace", "default")
        about = self.nodes[node]
        if not self._affine(workload, node):
            found.append("node selector or affinity does not hold")
        for taint in about.get("taints", ()):
            if taint["effect"] != "PreferNoSchedule" and not any(
                item.get("effect") in (None, taint["effect"]) and item.get("key", "") in ("", taint["key"]) and item.get("value") in (None, taint.get("value", "")) for item in workload.get("tolerations", ())
            ):
                found.append(f"taint {taint['key']} is not tolerated")
        if workload.get("residency") and labels.get("region") not in workload["residency"]:
            found.append("outside its regions")
        if workload.get("node_kinds") and about.get("kind", "cloud") not in workload["node_kinds"]:
            found.append("the wrong kind of node")
        me = self._group(workload)
        live = [group for group, nodes in self.groups.items() if any(nodes.values())]
        terms = workload.get("affinity", ())
        if terms:
            all_match = [group for group in live if all(self._speaks_of(term, space, group) for term in terms)]
            keyed = all(term["topology_key"] in labels for term in terms)
            with_them = all(self._count(term["topology_key"], labels.get(term["topology_key"]), all_match) > 0 for term in terms)
            nowhere = not any(count and any(term["topology_key"] in self.labels[at] for term in terms) for group in all_match for at, count in self.groups[group].items())
            first = nowhere and all(self._speaks_of(term, space, me) for term in terms)
            if not keyed or not (with_them or first):
                found.append("affinity does not hold")
        for term in workload.get("anti_affinity", ()):
            if self._count(term["topology_key"], labels.get(term["topology_key"]), [group for group in live if self._speaks_of(term, space, group)]):
                found.append("anti-affinity does not hold")
        for term, owner, nodes in self.anti.values():
            value = labels.get(term["topology_key"])
            if value is not None and self._speaks_of(term, owner, me) and any(count and self.labels[at].get(term["topology_key"]) == value for at, count in nodes.items()):
                found.append("a workload that is there wants to be apart from it")
        hard = [item for item in workload.get("spread", ()) if item.get("hard", True)]
        eligible = [name for name in self.nodes if self._affine(workload, name) and all(item["topology_key"] in self.labels[name] for item in hard)] if hard else []
        for item in hard:
            key = item["topology_key"]
            if key not in labels:
                found.append(f"no {key} to spread over")
                continue
            sums: dict[str, int] = {self.labels[name][key]: 0 for name in eligible}
            for group in live:
                if group[0] == space and selects(item.get("selector"), dict(group[1])):
                    for at, count in self.groups[group].items():
                        if at in self.nodes and count and key in self.labels[at] and at in eligible:
                            sums[self.labels[at][key]] += count
            least = min(sums.values(), default=0) if len(sums) >= item.get("min_domains", 1) else 0
            if sums.get(labels[key], 0) + int(selects(item.get("selector"), dict(me[1]))) - least > item.get("max_skew", 1):
                found.append(f"spread over {key} is uneven")
        return found


def main() -> int:
    """Check a file; exit status 0 where nothing is wrong."""
    if len(sys.argv) != 2:
        print("usage: placement_check.py FILE", file=sys.stderr)
        return 2
    data = json.loads(Path(sys.argv[1]).read_text())
    checker = Checker(data["nodes"], data.get("namespaces"), data.get("quotas"))
    gangs: dict[str, list[str]] = defaultdict(list)
    for event in data["events"]:
        if "release" in event:
            checker.released(event["release"])
        else:
            checker.placed(event["place"], event["node"], event.get("gpus", ()), event.get("zone"))
            if event["place"].get("gang"):
                gangs[event["place"]["gang"]["id"]].append(event["place"]["id"])
    for members in gangs.values():
        checker.gang_is_whole(members)
    print(json.dumps({"promise": "every placement holds", "value": len(checker.problems), "unit": "problems", "ok": not checker.problems, "placements": checker.placements, "problems": checker.problems[:20]}))
    return 1 if checker.problems else 0


if __name__ == "__main__":
    sys.exit(main())
