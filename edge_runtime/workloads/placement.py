"""Where a workload fits among the nodes of one site, for a site that is cut off from its hub. Pure, without numpy.

The documents are the hub's (docs/workloads.md), and what fits here is what fits there: the same filters by the same names, checked against the hub's scheduler by a property
test. Of the scores only those are here that matter among a handful of nodes. Ways to other sites (`links`) are not known here: a workload that needs them fits nowhere.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from ..contract.errors import ContractError
from ..contract.workloads import KINDS

MAX_NODES = 256
"""Nodes of one site; a filter looks at every workload of every node."""

GPU_WHOLE = 1000
"""Milli-GPU in one device."""

UNLIMITED_SLOTS = 1 << 31
"""Of a node that does not say how many workloads it holds."""

UNSCHEDULABLE = {"key": "node.kubernetes.io/unschedulable", "value": "", "effect": "NoSchedule"}
"""A workload that tolerates it goes to cordoned nodes too."""

HOST, REGION = "host", "region"
TOPOLOGY = ("region", "zone", "site", "rack")

_SUFFIXES = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50,
}

BALANCE, PREFERENCE, TAINTS = 10, 8, 3
PACKING = {"vm": 6, "container": 3, "function": 2, "batch": 6}
"""Weights of the scores, the hub's."""

Json = Mapping[str, Any]


def quantity(resource: str, value: Any) -> int:
    """An amount in the smallest unit, rounded up as at the hub. Raises ValueError."""
    text = str(value).strip()
    body = text.rstrip("kMGTPim")
    suffix = text[len(body):]
    scale = Decimal(1000 if resource == "cpu" else 1) * (Decimal(1) / 1000 if suffix == "m" else _SUFFIXES.get(suffix, 0))
    try:
        scaled = Decimal(body) * scale
    except InvalidOperation:
        raise ValueError(f"{text[:40]!r} is not a quantity") from None
    if not scaled.is_finite() or scaled < 0 or (suffix != "m" and suffix not in _SUFFIXES):
        raise ValueError(f"{text[:40]!r} is not a quantity")
    whole = int(scaled)
    return whole if whole == scaled else whole + 1


@dataclass(slots=True)
class Node:
    """One node as it is now: free amounts, free milli and memory of each GPU device, free (cpu, memory) of each NUMA zone."""

    name: str
    kind: str
    labels: dict[str, str]
    taints: list[Json]
    runs: tuple[str, ...]
    cordoned: bool
    capacity: dict[str, int]
    free: dict[str, int]
    models: list[str]
    gpu_free: list[int]
    gpu_memory: list[int]
    zones: list[list[int]]
    up: bool = True


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a workload is: node, GPU devices, shares (zone, cpu, memory) of its NUMA zones."""

    node: str
    gpus: tuple[int, ...] = ()
    numa: tuple[tuple[int, int, int], ...] = ()


@dataclass(slots=True)
class _Held:
    document: Json
    seat: Seat
    ending: bool = False


@dataclass(slots=True)
class Site:
    """The nodes of a site and what is on them."""

    nodes: dict[str, Node] = field(default_factory=dict)
    held: dict[str, _Held] = field(default_factory=dict)

    def add(self, document: Json) -> None:
        """A node, as its `node.capacity` record tells it, with `name`. Raises `ContractError`."""
        try:
            node = _node(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ContractError("node", f"cannot be read ({error})", "send it as docs/workloads.md says", "node") from None
        if node.name not in self.nodes and len(self.nodes) >= MAX_NODES:
            raise ContractError("node", f"more than {MAX_NODES} nodes", "make the site smaller", "limit")
        self.nodes[node.name] = node

    # -- what fits -----------------------------------------------------------------------------------------------------------

    def verdicts(self, document: Json) -> dict[str, list[str]]:
        """Node to the filters that it fails; empty where the workload fits. Raises `ContractError`."""
        try:
            peers = _Peers(self, document)
            return {node.name: self._fails(node, document, peers) for node in self.nodes.values()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ContractError("workload", f"cannot be read ({error})", "send it as docs/workloads.md says", "workload") from None

    def _fails(self, node: Node, document: Json, peers: "_Peers") -> list[str]:
        asked, gpu = requests(document), document.get("gpu")
        tolerations = document.get("tolerations", ())
        failed = {
            "DOWN": not node.up, "CORDONED": node.cordoned and not any(_tolerates(item, UNSCHEDULABLE) for item in tolerations), "NODE_AFFINITY": not affine(node, document),
            "TAINT": any(taint["effect"] != "PreferNoSchedule" and not any(_tolerates(item, taint) for item in tolerations) for taint in node.taints),
            "KIND": bool(document.get("node_kinds")) and node.kind not in document["node_kinds"], "RESIDENCY": bool(document.get("residency")) and node.labels.get(REGION) not in document["residency"],
            "RESOURCES": any(node.free.get(name, 0) < amount for name, amount in asked.items()), "LINK": bool(document.get("links")),
        }
        if gpu is not None:
            wanted = gpu.get("models") or None
            failed["GPU_MODEL"] = sum(wanted is None or model in wanted for model in node.models) < gpu.get("count", 1)
            failed["GPU"] = not failed["GPU_MODEL"] and len(_devices(node, gpu)) < gpu.get("count", 1)
        if document.get("numa") == "single" and node.zones:
            failed["NUMA"] = not any(zone[0] >= asked.get("cpu", 0) and zone[1] >= asked.get("memory", 0) for zone in node.zones)
        return [name for name, fails in failed.items() if fails] + peers.fails(node)

    # -- placing -------------------------------------------------------------------------------------------------------------

    def place(self, document: Json) -> Seat | None:
        """The best seat, booked; None where it fits nowhere. Raises `ContractError`."""
        verdicts = self.verdicts(document)
        if document["id"] in self.held:
            return self.held[document["id"]].seat
        fits = [self.nodes[name] for name, failed in verdicts.items() if not failed]
        preferred = {node.name: _preference(node, document) for node in fits}
        most = max(preferred.values(), default=0)
        for node in sorted(fits, key=lambda node: (-_score(node, document, preferred[node.name] / most if most else 0.0), node.name)):
            seat = seat_on(node, document)
            if seat is not None:
                self.hold(document, seat)
                return seat
        return None

    def hold(self, document: Json, seat: Seat, *, ending: bool = False) -> None:
        """Book a seat. `ending`: it is on its way out, and counts no more for spread."""
        self.release(document["id"])
        self._move(document, seat, -1)
        self.held[document["id"]] = _Held(document, seat, ending)

    def release(self, workload: str) -> bool:
        """Give back what a workload holds; False where it holds nothing."""
        held = self.held.pop(workload, None)
        if held is not None:
            self._move(held.document, held.seat, 1)
        return held is not None

    def _move(self, document: Json, seat: Seat, sign: int) -> None:
        node, gpu = self.nodes[seat.node], document.get("gpu") or {}
        for name, amount in requests(document).items():
            node.free[name] = node.free.get(name, 0) + sign * amount
        for device in seat.gpus:
            node.gpu_free[device] += sign * gpu.get("milli", GPU_WHOLE)
            node.gpu_memory[device] += sign * quantity("memory", gpu.get("memory", 0))
        for zone, cpu, memory in seat.numa:
            node.zones[zone][0] += sign * cpu
            node.zones[zone][1] += sign * memory


def _node(document: Json) -> Node:
    labels = dict(document.get("labels", {}))
    labels |= {key: document[key] for key in TOPOLOGY if document.get(key) is not None}
    labels[HOST] = document["name"]
    capacity = {"slots": UNLIMITED_SLOTS} | {name: quantity(name, amount) for name, amount in document.get("capacity", {}).items()}
    devices = [gpu for gpu in document.get("gpus", ()) for _ in range(gpu.get("count", 1))]
    return Node(
        document["name"], document.get("kind", "cloud"), labels, list(document.get("taints", ())), tuple(document.get("runs", KINDS)), bool(document.get("unschedulable", False)), capacity, dict(capacity),
        [gpu["model"] for gpu in devices], [GPU_WHOLE] * len(devices), [quantity("memory", gpu.get("memory", 0)) for gpu in devices],
        [[quantity("cpu", zone.get("cpu", 0)), quantity("memory", zone.get("memory", 0))] for zone in document.get("numa", ())],
    )


def requests(document: Json) -> dict[str, int]:
    """What a workload asks for, with the slot that every one takes."""
    return {"slots": 1} | {name: quantity(name, amount) for name, amount in document.get("requests", {}).items()}


def seat_on(node: Node, document: Json) -> Seat | None:
    """Devices and zones on one node; None where they do not come together."""
    gpu, asked = document.get("gpu"), requests(document)
    gpus: tuple[int, ...] = ()
    if gpu is not None:
        fits = _devices(node, gpu)
        if len(fits) < gpu.get("count", 1):
            return None
        whole = gpu.get("milli", GPU_WHOLE) == GPU_WHOLE
        gpus = tuple(fits[: gpu.get("count", 1)]) if whole else (min(fits, key=lambda device: (node.gpu_free[device], device)),)
    cpu, memory = asked.get("cpu", 0), asked.get("memory", 0)
    if not node.zones or not (cpu or memory):
        return Seat(node.name, gpus)
    if document.get("numa") == "single":
        good = [at for at, zone in enumerate(node.zones) if zone[0] >= cpu and zone[1] >= memory]
        return Seat(node.name, gpus, ((min(good, key=lambda at: (*node.zones[at], at)), cpu, memory),)) if good else None
    shares = []
    for at in sorted(range(len(node.zones)), key=lambda at: (-node.zones[at][0], at)):
        share = (at, min(cpu, max(0, node.zones[at][0])), min(memory, max(0, node.zones[at][1])))
        cpu, memory = cpu - share[1], memory - share[2]
        if share[1] or share[2]:
            shares.append(share)
    return None if cpu or memory else Seat(node.name, gpus, tuple(shares))


def _devices(node: Node, gpu: Json) -> list[int]:
    milli, memory, models = gpu.get("milli", GPU_WHOLE), quantity("memory", gpu.get("memory", 0)), gpu.get("models") or None
    return [at for at, model in enumerate(node.models) if node.gpu_free[at] >= milli and node.gpu_memory[at] >= memory and (models is None or model in models)]


def _tolerates(toleration: Json, taint: Json) -> bool:
    effect, key, value = toleration.get("effect"), toleration.get("key", ""), toleration.get("value")
    return bool((effect is None or effect == taint["effect"]) and (not key or key == taint["key"]) and (value is None or value == taint.get("value", "")))


# -- labels ------------------------------------------------------------------------------------------------------------------


def _integer(text: str | None) -> int | None:
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def _holds(requirement: Json, labels: Mapping[str, str], key: str = "") -> bool:
    """Whether one `{key, op, values}` holds on a label set."""
    value, op, values = labels.get(key or requirement["key"]), requirement["op"], requirement.get("values", ())
    if op in ("In", "NotIn"):
        return bool((value in values) == (op == "In"))
    if op in ("Exists", "DoesNotExist"):
        return bool((value is not None) == (op == "Exists"))
    number = _integer(value)
    if number is None:
        return False
    return number > int(values[0]) if op == "Gt" else number < int(values[0])


def _selects(selector: Json | None, labels: Mapping[str, str]) -> bool:
    """`{labels, requirements}`; None selects nothing, an empty one everything."""
    if selector is None:
        return False
    return all(labels.get(key) == text for key, text in selector.get("labels", {}).items()) and all(_holds(one, labels) for one in selector.get("requirements", ()))


def _term(term: Json, labels: Mapping[str, str]) -> bool:
    parts = [_holds(one, labels) for one in term.get("labels", ())] + [_holds(one, labels, HOST) for one in term.get("names", ())]
    return bool(parts) and all(parts)


def affine(node: Node, document: Json) -> bool:
    """Whether selector, required affinity and the node's drivers allow it."""
    required = document.get("node_affinity", {}).get("required")
    return (
        document.get("kind", "container") in node.runs and all(node.labels.get(key) == value for key, value in document.get("node_selector", {}).items())
        and (required is None or any(_term(term, node.labels) for term in required))
    )


# -- other workloads ---------------------------------------------------------------------------------------------------------


def _speaks_of(term: Json, owner: Json, other: Json) -> bool:
    """Whether a peer term of `owner` speaks of `other`. Of namespaces no labels are known."""
    mine, theirs = owner.get("namespace", "default"), other.get("namespace", "default")
    chosen, spaces = term.get("namespace_selector"), term.get("namespaces") or ()
    inside = theirs in spaces if spaces else chosen is None and theirs == mine
    if not inside and not (chosen is not None and _selects(chosen, {})):
        return False
    return _selects(term.get("selector"), other.get("labels", {}))


class _Peers:
    """Affinity, anti-affinity and spread of one workload against all that is on the site, worked out once for all nodes."""

    def __init__(self, site: Site, document: Json) -> None:
        self._site, self._document = site, document
        held = list(site.held.values())
        self._near = [term["topology_key"] for term in document.get("affinity", ())]
        with_all = [one for one in held if self._near and all(_speaks_of(term, document, one.document) for term in document["affinity"])]
        self._beside = {key: self._domains(key, with_all) for key in self._near}
        alone = self._near and all(_speaks_of(term, document, document) for term in document["affinity"])
        self._first = bool(alone) and not any(self._beside.values())
        self._apart = [(term["topology_key"], self._domains(term["topology_key"], [one for one in held if _speaks_of(term, document, one.document)])) for term in document.get("anti_affinity", ())]
        self._kept_off = [
            (term["topology_key"], self._domains(term["topology_key"], [one])) for one in held for term in one.document.get("anti_affinity", ()) if _speaks_of(term, one.document, document)
        ]
        self._hard = [spread for spread in document.get("spread", ()) if spread.get("hard", True)]
        self._full = [(spread["topology_key"], self._too_full(spread)) for spread in self._hard]

    def _domains(self, key: str, those: Iterable[_Held]) -> set[str]:
        return {value for one in those if (value := self._site.nodes[one.seat.node].labels.get(key)) is not None}

    def _too_full(self, spread: Json) -> set[str]:
        """The domains in which one more would make the spread too uneven."""
        key = spread["topology_key"]
        eligible = [node for node in self._site.nodes.values() if affine(node, self._document) and all(one["topology_key"] in node.labels for one in self._hard)]
        sums = {node.labels[key]: 0 for node in eligible}
        names = {node.name for node in eligible}
        space = self._document.get("namespace", "default")
        for one in self._site.held.values():
            if one.seat.node in names and not one.ending and one.document.get("namespace", "default") == space and _selects(spread.get("selector"), one.document.get("labels", {})):
                sums[self._site.nodes[one.seat.node].labels[key]] += 1
        own = _selects(spread.get("selector"), self._document.get("labels", {}))
        least = min(sums.values(), default=0) if len(sums) >= spread.get("min_domains", 1) else 0
        return {domain for domain, count in sums.items() if count + own - least > spread.get("max_skew", 1)}

    def fails(self, node: Node) -> list[str]:
        """The filters among these that a node fails."""
        keyed = all(key in node.labels for key in self._near)
        near = keyed and (self._first or all(node.labels[key] in self._beside[key] for key in self._near))
        failed = {
            "AFFINITY": not near, "ANTI_AFFINITY": any(node.labels.get(key) in domains for key, domains in self._apart),
            "EXCLUDED": any(node.labels.get(key) in domains for key, domains in self._kept_off),
            "SPREAD_KEY": any(key not in node.labels for key, _ in self._full), "SPREAD": any(node.labels.get(key) in domains for key, domains in self._full),
        }
        return [name for name, fails in failed.items() if fails]


# -- scores ------------------------------------------------------------------------------------------------------------------


def _preference(node: Node, document: Json) -> int:
    total = 0
    for item in document.get("node_affinity", {}).get("preferred", ()):
        term = item["term"]
        total += item["weight"] if not (term.get("labels") or term.get("names")) or _term(term, node.labels) else 0
    return total


def _score(node: Node, document: Json, preference: float) -> float:
    """Even use of CPU and memory, packing, preferred nodes, fewer disliked taints; 0 to 100 each, by weight."""
    asked = requests(document)
    shares: Sequence[float] = [min(1.0, (node.capacity[name] - node.free[name] + asked.get(name, 0)) / node.capacity[name]) for name in ("cpu", "memory") if node.capacity.get(name)]
    balance = 1 - abs(shares[0] - shares[1]) / 2 if len(shares) == 2 else 1.0
    packing = sum(shares) / len(shares) if shares else 0.0
    disliked = sum(taint["effect"] == "PreferNoSchedule" and not any(_tolerates(item, taint) for item in document.get("tolerations", ())) for taint in node.taints)
    return 100.0 * float(BALANCE * balance + PACKING.get(document.get("kind", "container"), 3) * packing + PREFERENCE * preference + TAINTS / (1 + disliked))
