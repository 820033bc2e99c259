"""kube-scheduler's own behaviour cases (filter, score, preempt) put to this scheduler's library, translated from pods and nodes to workloads and nodes.

`--data FILE` holds `cases[]` with `suite, test, name, kind, pod, nodes[], existing_pods[], expect` and `namespaces[]`. A filter case expects a verdict per node, a
score case a score per node. A preempt case has `pdbs[]` too and expects the chosen node and victims: `{"node": N, "victims": [..], "violations": k}`, several
candidates as `{N: [..victims]}` or `{"candidates": [..]}`, nodes to choose among as `{"nodes": [..]}`, or null where nothing helps.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

import json

import numpy as np

from hub.scheduler import Budget, Fail, Invalid, Kind, Node, Scheduler, Seat, State, View, Workload, parse, preempt
from hub.scheduler.feasible import verdicts
from hub.scheduler.model import (
    HOST,
    Effect,
    NodeTerm,
    Op,
    PeerTerm,
    PreferredNode,
    PreferredPeer,
    Requirement,
    Selector,
    Shape,
    Spread,
    Taint,
    Toleration,
)
from hub.scheduler.rank import BEST, Balance, Fullness, NodeAffinity, Peers, Policy, SoftSpread, TaintPreference
from hub.scheduler.reasons import UNRESOLVABLE
from hub.scheduler.units import quantity

from .harness import ROOT, arguments, machine, report

DATA = Path(os.environ.get("NOVACRON_DATA") or ROOT.parent / "shared" / "data") / "k8s_scheduler" / "cases.json"
"""Where the cases are looked for."""

DOCUMENTED: dict[tuple[str, str], str] = {}
"""(test, name) of cases whose outcome differs on purpose, and why. None so far."""

RENAMED = {"ephemeral-storage": "disk", "pods": "slots"}
"""Resources that both sides know under different names."""

NONZERO = {"cpu": "100m", "memory": 200 * 1024 * 1024}
"""What kube's least and most allocated strategies take for a container that requests nothing."""

DEFAULT_HARD_WEIGHT = 1
"""kube's DefaultHardPodAffinitySymmetricWeight."""

CONSTANTS = {"TaintNodeUnschedulable": "node.kubernetes.io/unschedulable"}
"""Names of Go constants that the cases hold instead of their values."""

SYSTEM_SPREAD = (("kubernetes.io/hostname", 3), ("topology.kubernetes.io/zone", 5))
"""kube's spread constraints for pods of a service that bring none."""

FILTERS = {
    "PodTopologySpread": Fail.SPREAD | Fail.SPREAD_KEY, "InterPodAffinity": Fail.AFFINITY | Fail.ANTI_AFFINITY | Fail.EXCLUDED, "NodeAffinity": Fail.NODE_AFFINITY,
    "TaintToleration": Fail.TAINT, "NodeResourcesFit": Fail.RESOURCES, "NodeUnschedulable": Fail.CORDONED,
}
"""What each suite's plugin answers for."""

Json = Mapping[str, Any]


def requirements(value: Json | None) -> tuple[Requirement, ...]:
    """matchLabels and matchExpressions. Raises `Invalid` where kube finds them invalid."""
    found = [Requirement(key, Op.IN, (text,)) for key, text in sorted(((value or {}).get("matchLabels") or {}).items())]
    for item in (value or {}).get("matchExpressions") or ():
        found.append(parse.requirement({"key": item["key"], "op": item["operator"], "values": item.get("values") or []}, "matchExpressions"))
    return tuple(found)


def selector(value: Json | None) -> Selector | None:
    """A label selector; None selects nothing."""
    return None if value is None else Selector(requirements(value))


def node_terms(items: Iterable[Json]) -> tuple[NodeTerm, ...]:
    """Terms of a node affinity; an invalid one matches nothing, which an empty one does too."""
    found = []
    for item in items:
        try:
            names = tuple(Requirement(HOST, Op(field["operator"]), tuple(field.get("values") or ())) for field in item.get("matchFields") or ())
            found.append(NodeTerm(requirements(item), names))
        except Invalid:
            found.append(NodeTerm())
    return tuple(found)


def peer_term(value: Json, namespace: str) -> PeerTerm:
    """A pod affinity term."""
    spaces, chosen = value.get("namespaces"), value.get("namespaceSelector")
    return PeerTerm(selector(value.get("labelSelector")), value.get("topologyKey", ""), tuple(sorted(spaces)) if spaces else () if chosen is not None else (namespace,), selector(chosen))


def amounts(items: Mapping[str, Any]) -> Counter[str]:
    """Requests or capacity in our units and names."""
    return Counter({RENAMED.get(name, name): quantity(RENAMED.get(name, name), value, name) for name, value in items.items()})


def requests(spec: Json, *, defaults: bool) -> dict[str, int]:
    """What a pod asks for: the sum of its containers, or its largest init container, and the overhead."""

    def of(container: Json) -> Counter[str]:
        asked = container.get("requests") or container.get("resources", {}).get("requests") or {}
        return amounts({**(NONZERO if defaults else {}), **asked})

    total: Counter[str] = Counter()
    for container in spec.get("containers") or ():
        total.update(of(container))
    for container in spec.get("initContainers") or ():
        for name, amount in of(container).items():
            total[name] = max(total[name], amount)
    total.update(amounts(spec.get("overhead") or {}))
    return dict(total)


def both(first: tuple[NodeTerm, ...] | None, second: tuple[NodeTerm, ...] | None) -> tuple[NodeTerm, ...] | None:
    """Terms that hold where both sets hold; a set without any term holds nowhere."""
    if first is None or second is None:
        return first if second is None else second
    return tuple(NodeTerm(a.labels + b.labels, a.names + b.names) for a in first for b in second if (a.labels or a.names) and (b.labels or b.names))


def shape(pod: Json, case: Json, *, defaults: bool = False, incoming: bool = False) -> Shape:
    """A pod as a shape; what the case adds by arguments belongs to the incoming one."""
    meta, spec = pod.get("metadata") or {}, pod.get("spec") or {}
    namespace, labels = meta.get("namespace", ""), meta.get("labels") or {}
    affinity = spec.get("affinity") or {}
    added = (case.get("args") or {}).get("addedAffinity") or {} if incoming else {}

    def required(node: Json) -> tuple[NodeTerm, ...] | None:
        terms = node.get("requiredDuringSchedulingIgnoredDuringExecution")
        if terms is not None:
            return node_terms(terms.get("nodeSelectorTerms") or ())
        short = node.get("required")
        return None if short is None else node_terms([{"matchExpressions": short}])

    def preferred(node: Json) -> tuple[PreferredNode, ...]:
        return tuple(PreferredNode(item["weight"], node_terms([item["preference"]])[0]) for item in node.get("preferredDuringSchedulingIgnoredDuringExecution") or ())

    def peers(name: str) -> tuple[PeerTerm, ...]:
        return tuple(peer_term(item, namespace) for item in (affinity.get(name) or {}).get("requiredDuringSchedulingIgnoredDuringExecution") or ())

    def likes(name: str, sign: int) -> tuple[PreferredPeer, ...]:
        items = (affinity.get(name) or {}).get("preferredDuringSchedulingIgnoredDuringExecution") or ()
        return tuple(PreferredPeer(sign * item["weight"], peer_term(item["podAffinityTerm"], namespace)) for item in items)

    node = affinity.get("nodeAffinity") or {}
    ignored = {RENAMED.get(name, name) for name in (case.get("args") or {}).get("ignoredResources") or ()}
    groups = tuple(f"{name}/" for name in (case.get("args") or {}).get("ignoredResourceGroups") or ())
    asked = {name: amount for name, amount in requests(spec, defaults=defaults).items() if name not in ignored and not name.startswith(groups or ("\0",))}
    spread = tuple(
        Spread(item["maxSkew"], item["topologyKey"], selector(item.get("labelSelector")), item["whenUnsatisfiable"] == "DoNotSchedule", item.get("minDomains") or 1)
        for item in spec.get("topologySpreadConstraints") or ()
    )
    if not spread and incoming:
        for thing in case.get("objs") or ():
            wanted = (thing.get("spec") or {}).get("selector") or {}
            wanted = wanted.get("matchLabels", wanted)
            if wanted and all(labels.get(key) == value for key, value in wanted.items()):
                spread = tuple(Spread(skew, key, selector({"matchLabels": wanted}), False, needs_key=False) for key, skew in SYSTEM_SPREAD)
    return Shape(
        Kind.CONTAINER, namespace, tuple(sorted(labels.items())), tuple(sorted(asked.items())),
        node_selector=tuple(sorted((spec.get("nodeSelector") or {}).items())), node_terms=both(required(node), required(added)), preferred_nodes=preferred(node) + preferred(added),
        affinity=peers("podAffinity"), anti_affinity=peers("podAntiAffinity"), preferred_peers=likes("podAffinity", 1) + likes("podAntiAffinity", -1),
        tolerations=tuple(toleration(item) for item in spec.get("tolerations") or ()), spread=spread,
    )


def toleration(item: Json) -> Toleration:
    """A pod's toleration."""
    exists = item.get("operator", "Equal") == "Exists"
    key: str = item.get("key") or ""
    return Toleration(CONSTANTS.get(key, key), None if exists else item.get("value", ""), Effect(item["effect"]) if item.get("effect") else None)


def node(value: Json) -> Node:
    """A node of a case."""
    meta, spec, status = value.get("metadata") or {}, value.get("spec") or {}, value.get("status") or {}
    name = meta.get("name", "node")
    capacity = amounts(status.get("allocatable") or status.get("capacity") or value.get("capacity") or {})
    return Node(
        name, capacity=tuple(sorted(capacity.items())), labels=tuple(sorted({**(meta.get("labels") or {}), HOST: name}.items())),
        taints=tuple(Taint(item["key"], item.get("value", ""), Effect(item["effect"])) for item in spec.get("taints") or ()), unschedulable=bool(spec.get("unschedulable")),
    )


def start_ms(pod: Json) -> int:
    """When a pod started, 0 where the case does not say. Only the order matters: a text that is no timestamp counts by the numbers in it."""
    given = (pod.get("status") or {}).get("startTime", pod.get("start_time", 0))
    if not isinstance(given, str):
        return int(given or 0)
    try:
        return round(datetime.fromisoformat(given.replace("Z", "+00:00")).timestamp() * 1000)
    except ValueError:
        return int("".join(f"{int(number):04d}" for number in re.findall(r"\d+", given)[:6]) or 0)


def workload(pod: Json, case: Json, name: str, *, defaults: bool = False, incoming: bool = False) -> Workload:
    """A pod as a workload."""
    spec = pod.get("spec") or {}
    return Workload(name, shape(pod, case, defaults=defaults, incoming=incoming), priority=int(spec.get("priority") or 0), preempts=spec.get("preemptionPolicy") != "Never")


def cluster(case: Json, namespaces: Mapping[str, Mapping[str, str]], *, defaults: bool = False) -> State:
    """The state that the case describes."""
    state = State(namespaces=namespaces)
    nodes = [node(item) for item in [*case.get("nodes", ()), *(case.get("failed_nodes") or ())]]
    state.add_nodes(nodes)
    ours = shape(case.get("pod") or {}, case, defaults=defaults, incoming=True)
    missing = {name for name, _ in ours.requests} - state.resource_rows.keys()
    if missing:
        state.add_nodes([replace(nodes[0], capacity=tuple(sorted({**dict.fromkeys(missing, 0), **dict(nodes[0].capacity)}.items())))])
    for at, pod in enumerate(case.get("existing_pods") or ()):
        index = state.node_index.get((pod.get("spec") or {}).get("nodeName", ""))
        if index is None and not (pod.get("spec") or {}).get("nodeName") and len(nodes) == 1:
            index = 0
        if index is not None:
            name = (pod.get("metadata") or {}).get("name") or f"existing-{at}"
            item = workload(pod, case, name if name not in state.slot_of else f"{name}-{at}", defaults=defaults)
            known = tuple((key, amount) for key, amount in item.shape.requests if key in state.resource_rows)
            state.adopt(replace(item, shape=replace(item.shape, requests=known)), Seat(index), start_ms(pod))
            if (pod.get("metadata") or {}).get("deletionTimestamp"):
                state.set_ending(item.id)
    return state


def filtered(case: Json, namespaces: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Node to verdict. A pod that the parser refuses fits nowhere."""
    try:
        state = cluster(case, namespaces)
    except Invalid:
        return {node(item).name: "UnschedulableAndUnresolvable" for item in case["nodes"]}
    bits = verdicts(state, state.klass(shape(case.get("pod") or {}, case, incoming=True))) & np.uint32(FILTERS.get(case["suite"], ~Fail(0)))
    return {item.name: "Success" if not failed else "UnschedulableAndUnresolvable" if failed & UNRESOLVABLE else "Unschedulable" for item, failed in zip(state.nodes, bits.tolist(), strict=True)}


def policy_of(case: Json) -> tuple[Policy, int, bool]:
    """The policy that stands for the case's plugin, what it gives where it has no opinion, and whether empty requests count as kube's defaults."""
    suite, test = case["suite"], case["test"]
    given = case.get("resources") or (case.get("args") or {}).get("resources") or ()
    extended = [name for name in requests((case.get("pod") or {}).get("spec") or {}, defaults=False) if "/" in name]
    weights = tuple((RENAMED.get(item["name"], extended[0] if item["name"] == "extendedRes" and extended else item["name"]), item.get("weight") or 1) for item in given)
    if suite == "InterPodAffinity":
        weight = case.get("hard_weight", DEFAULT_HARD_WEIGHT)
        return Peers(DEFAULT_HARD_WEIGHT if isinstance(weight, str) else int(weight)), 0, False
    if suite == "TaintToleration":
        return TaintPreference(), BEST, False
    if suite == "NodeAffinity":
        return NodeAffinity(), 0, False
    if suite == "PodTopologySpread":
        return SoftSpread(), 0, False
    if "Balanced" in test:
        return Balance(weights or None), 0, False
    return Fullness("Most" in test, weights), 0, True


def scored(case: Json, namespaces: Mapping[str, Mapping[str, str]]) -> dict[str, int]:
    """Node to score."""
    policy, empty, defaults = policy_of(case)
    state = cluster(case, namespaces, defaults=defaults)
    klass = state.klass(shape(case.get("pod") or {}, case, defaults=defaults, incoming=True))
    feasible = np.arange(state.size) < len(case["nodes"])
    scores = policy.score(View(state, klass, state.facts(klass), feasible, 0))
    return {item.name: empty if scores is None else int(scores[at]) for at, item in enumerate(state.nodes[: len(case["nodes"])])}


def budgets(case: Json) -> list[Budget]:
    """The disruption budgets of a case."""
    found = []
    for at, item in enumerate(case.get("pdbs") or case.get("budgets") or ()):
        meta, spec, status = item.get("metadata") or {}, item.get("spec") or {}, item.get("status") or {}
        allowed = status.get("disruptionsAllowed", item.get("disruptions_allowed", 0))
        found.append(Budget(f"{meta.get('name', 'pdb')}-{at}", meta.get("namespace", ""), selector(spec.get("selector")) or Selector(), int(allowed or 0), tuple(status.get("disruptedPods") or ())))
    return found


def preempted(case: Json, namespaces: Mapping[str, Mapping[str, str]]) -> tuple[dict[str, tuple[list[str], int]], str | None]:
    """Every node that preemption could open, with victims and violated budgets; and the node of the plan that the scheduler makes."""
    state = cluster(case, namespaces)
    for item in budgets(case):
        state.set_budget(item)
    scheduler = Scheduler(state)
    incoming = workload(case["pod"], case, "\0incoming", incoming=True)
    klass = state.klass(incoming.shape)
    open_nodes = np.flatnonzero((verdicts(state, klass) & np.uint32(UNRESOLVABLE)) == 0).tolist()
    plans = [made for at in open_nodes if incoming.preempts and (made := preempt.on_node(scheduler, incoming, at)) is not None]
    chosen = preempt.plan(scheduler, incoming, 0)
    return {state.nodes[made.node].name: (sorted(made.victims), made.violations) for made in plans}, None if chosen is None else state.nodes[chosen.node].name


def preempt_agrees(expect: Any, plans: dict[str, tuple[list[str], int]], chosen: str | None) -> bool:
    """Whether plans and choice are what a case expects, in any of the layouts above."""
    if expect is None or expect in ({}, [], "", "none"):
        return chosen is None
    if isinstance(expect, str):
        return chosen == expect
    if isinstance(expect, list):
        if all(isinstance(item, str) for item in expect):
            return chosen in expect
        return preempt_agrees({"candidates": expect}, plans, chosen)
    victims = next((expect[key] for key in ("victims", "expected_victims", "pods") if key in expect), None)
    violations = next((value for key, value in expect.items() if "viol" in key.lower() and isinstance(value, int)), None)
    name = next((expect[key] for key in ("node", "name", "nominated_node", "chosen") if key in expect), None)
    good = True
    if "nodes" in expect:
        good &= chosen in expect["nodes"]
    if "candidates" in expect:
        wanted = expect["candidates"]
        wanted = [{"node": at, **(item if isinstance(item, dict) else {"victims": item})} for at, item in wanted.items()] if isinstance(wanted, dict) else wanted
        good &= {item.get("node", item.get("name")) for item in wanted} == plans.keys() and all(preempt_agrees(item, plans, item.get("node", item.get("name"))) for item in wanted)
    if name is not None or "node" in expect:
        good &= chosen == (name or None)
    where = name or chosen
    if victims is not None:
        wanted = sorted(item if isinstance(item, str) else (item.get("metadata") or item)["name"] for item in victims)
        good &= (plans[where][0] if where in plans else []) == wanted
    if violations is not None:
        good &= (plans[where][1] if where in plans else 0) == violations
    if victims is None and violations is None and name is None and not {"nodes", "candidates", "node"} & expect.keys():
        return preempt_agrees({"candidates": expect}, plans, chosen)
    return bool(good)


def judge(case: Json, namespaces: Mapping[str, Mapping[str, str]]) -> tuple[bool, Any]:
    """Whether the library agrees with a case, and what it says."""
    if case["kind"] == "filter":
        said: Any = filtered(case, namespaces)
        return all(said.get(name) == verdict for name, verdict in case["expect"].items()), said
    if case["kind"] == "score":
        said = scored(case, namespaces)
        return all(said.get(name) == value for name, value in case["expect"].items()), said
    if case["kind"] == "preempt":
        plans, chosen = preempted(case, namespaces)
        return preempt_agrees(case["expect"], plans, chosen), {"chosen": chosen, "plans": plans}
    return False, f"unknown kind {case['kind']!r}"


def main() -> int:
    """Exit status 0 where every case agrees or is documented."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="the file of cases")
    options = parser.parse_args()
    if not options.data.is_file():
        parser.error(f"no cases at {options.data}; give their file with --data")
    data = json.loads(options.data.read_text(encoding="utf-8"))
    namespaces = {item["name"]: item.get("labels") or {} for item in data.get("namespaces", ())}
    counts: Counter[str] = Counter()
    failed: list[Any] = []
    documented: list[Any] = []
    for case in data["cases"]:
        try:
            agrees, said = judge(case, namespaces)
        except (Invalid, KeyError, ValueError, TypeError, AttributeError) as error:
            agrees, said = False, f"{type(error).__name__}: {error}"
        reason = DOCUMENTED.get((case["test"], case["name"]))
        counts[f"{case['kind']} {'agrees' if agrees else 'documented' if reason else 'differs'}"] += 1
        if not agrees:
            (documented if reason else failed).append({"test": case["test"], "name": case["name"], "expect": case["expect"], "said": said, **({"reason": reason} if reason else {})})
    total = len(data["cases"])
    agreed = sum(count for name, count in counts.items() if name.endswith("agrees"))
    return report(options, machine(), "kube-scheduler cases", round(agreed / max(total, 1), 4), "share that agrees", not failed and total > 0,
                  inputs={"data": str(options.data), "cases": total}, details={"counts": dict(counts), "differ": failed[:40], "documented": documented})


if __name__ == "__main__":
    sys.exit(main())
