"""Seeded random instances, small enough to be solved exactly, with every kind of constraint that the scheduler honours. No code of the scheduler is used.

An instance is plain data (integers, strings, lists): milli-CPU, MiB, milli-GPU, microseconds, kbit/s. `as_scheduler_input` writes it as the JSON that
`hub.scheduler.parse` reads. The order of `workloads` is the order of arrival; the members of a gang arrive together.

Drawn so that the optimum does not depend on the order in which workloads are placed: what is selected by a hard spread or by an affinity of a group to
itself carries that same term, and affinity to others never closes a circle.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

MAX_NODES = 12
MAX_WORKLOADS = 40

SITES = ("s0", "s1", "s2", "s3")
REGION_OF = {"s0": "eu", "s1": "eu", "s2": "us", "s3": "us"}
ZONE_OF = {"s0": "eu-a", "s1": "eu-b", "s2": "us-a", "s3": "us-a"}

RTT_US = {("s0", "s1"): 2_000, ("s0", "s2"): 80_000, ("s0", "s3"): 85_000, ("s1", "s2"): 82_000, ("s1", "s3"): 87_000, ("s2", "s3"): 3_000}
"""There and back between two sites; 200 us within one."""
RTT_WITHIN_US = 200

KBPS = {("s0", "s1"): 10_000_000, ("s0", "s2"): 1_000_000, ("s0", "s3"): 500_000, ("s1", "s2"): 800_000, ("s1", "s3"): 400_000, ("s2", "s3"): 5_000_000}
"""What the way between two sites carries; 40 Gbit/s within one."""
KBPS_WITHIN = 40_000_000

PRIORITIES = (0, 10, 100)

ATTEMPTS = 400
"""Draws of workloads before an instance that is still below its load is taken as it is."""


@dataclass
class Node:
    """cpu milli, memory MiB, `gpus` devices of one `model` with `gpu_memory` MiB each; `zones` NUMA zones of equal size; price of the whole node."""

    name: str
    kind: str
    site: str
    rack: str
    cpu: int
    memory: int
    gpus: int = 0
    model: str = ""
    gpu_memory: int = 0
    zones: int = 1
    labels: dict[str, str] = field(default_factory=dict)
    taints: tuple[tuple[str, str, str], ...] = ()
    price: int = 1

    def domain(self, key: str) -> str:
        """The value of a topology key."""
        return {"host": self.name, "rack": self.rack, "site": self.site, "zone": ZONE_OF[self.site], "region": REGION_OF[self.site]}[key]

    @property
    def tags(self) -> dict[str, str]:
        """All labels with the topology."""
        return {**self.labels, **{key: self.domain(key) for key in ("host", "rack", "site", "zone", "region")}}


@dataclass
class Workload:
    """Requests and constraints; a term is (label value of `app` it selects, topology key)."""

    id: str
    kind: str
    app: str
    cpu: int
    memory: int
    priority: int = 0
    tenant: str = ""
    gang: str = ""
    gang_size: int = 0
    gpu_count: int = 0
    gpu_milli: int = 1000
    gpu_memory: int = 0
    gpu_models: tuple[str, ...] = ()
    selector: dict[str, str] = field(default_factory=dict)
    required: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    preferred: tuple[tuple[int, str, tuple[str, ...]], ...] = ()
    tolerates: tuple[str, ...] = ()
    affinity: tuple[tuple[str, str], ...] = ()
    anti_affinity: tuple[tuple[str, str], ...] = ()
    spread: tuple[tuple[int, str, bool], ...] = ()
    numa: bool = False
    residency: tuple[str, ...] = ()
    links: tuple[tuple[str, int, int], ...] = ()


@dataclass
class Instance:
    """`quotas`: tenant to the most milli-CPU and MiB that its placed workloads may ask for together. `features`: how many workloads carry each kind of constraint."""

    seed: int
    nodes: list[Node]
    workloads: list[Workload]
    quotas: dict[str, tuple[int, int]]
    features: dict[str, int]


def rtt_us(one: str, other: str) -> int:
    """Between two sites."""
    return RTT_WITHIN_US if one == other else RTT_US.get((one, other)) or RTT_US[(other, one)]


def kbps(one: str, other: str) -> int:
    """Between two sites."""
    return KBPS_WITHIN if one == other else KBPS.get((one, other)) or KBPS[(other, one)]


def draw(seed: int, most_nodes: int = MAX_NODES, most_workloads: int = MAX_WORKLOADS) -> Instance:
    """The instance of a seed: 4 to `most_nodes` nodes, workloads until a load of 60 to 110 % of the CPU or memory is asked for, or `most_workloads`."""
    rng = Random(seed)
    nodes = [_node(rng, index) for index in range(rng.randint(min(4, most_nodes), most_nodes))]
    cpu, memory = sum(node.cpu for node in nodes), sum(node.memory for node in nodes)
    load = rng.uniform(0.6, 1.1)
    least = rng.randint(most_workloads // 2, most_workloads)
    scale = load * cpu / least / 3000
    groups: list[list[Workload]] = []
    total = 0
    for attempt in range(ATTEMPTS):
        asked = max(sum(w.cpu for g in groups for w in g) / cpu, sum(w.memory for g in groups for w in g) / memory)
        if asked >= load or total >= most_workloads:
            break
        group = _group(rng, attempt, groups, scale)
        if total + len(group) > most_workloads:
            continue
        groups.append(group)
        total += len(group)
    # Replicas of one application arrive apart, as scaling up does; a gang arrives together.
    arrivals = []
    for number, group in enumerate(groups):
        together = rng.random()
        arrivals += [(together if w.gang else rng.random(), number, w) for w in group]
    arrivals.sort(key=lambda item: item[:2])
    workloads = [w for _, _, w in arrivals]
    for number, w in enumerate(workloads):
        w.id = f"w{number:02d}"
    counted = _count(workloads)
    quotas = {}
    if rng.random() < 0.7:
        tenant = rng.choice(("t0", "t1"))
        mine = [w for w in workloads if w.tenant == tenant]
        share = rng.uniform(0.5, 0.9)
        quotas[tenant] = (int(share * sum(w.cpu for w in mine)), int(max(share, 0.8) * sum(w.memory for w in mine)))
        counted["quota"] = len(mine)
    return Instance(seed, nodes, workloads, quotas, counted)


def _node(rng: Random, index: int) -> Node:
    site = rng.choice(SITES)
    gpu = rng.random() < 0.35
    kind = "gpu" if gpu else rng.choice(("cloud", "edge", "hybrid", "storage"))
    cores = rng.choice((8, 16, 32) if kind != "edge" else (4, 8))
    node = Node(
        f"n{index:02d}", kind, site, f"{site}-r{rng.randint(0, 1)}", cores * 1000, cores * 1024 * rng.choice((2, 4, 4, 8)), zones=2 if cores >= 16 and rng.random() < 0.7 else 1,
        labels={"disk": rng.choice(("ssd", "hdd")), "arch": "arm64" if rng.random() < 0.15 else "amd64", "gen": str(rng.randint(1, 4))}, price=cores * rng.choice((10, 20, 30, 50, 80)),
    )
    if gpu:
        node.gpus, (node.model, node.gpu_memory) = rng.choice((1, 2, 4)), rng.choice((("T4", 16_384), ("A100", 81_920)))
    if rng.random() < 0.2:
        node.taints = ((rng.choice(("dedicated", "noisy")), "x", rng.choice(("NoSchedule", "NoSchedule", "NoExecute"))),)
    return node


def _single(rng: Random, app: str, scale: float) -> Workload:
    kind = rng.choice(("vm", "container", "container", "function", "batch"))
    size = rng.choice((0.3, 0.6, 1.0, 1.0, 2.0, 3.0)) * scale
    cpu = max(100, round(3000 * size / 100) * 100)
    w = Workload("", kind, app, cpu, max(64, round(cpu * rng.choice((1, 2, 3, 6)) * 1.024 / 64) * 64), rng.choice(PRIORITIES), rng.choice(("t0", "t1", "t2")))
    draws: tuple[tuple[float, Callable[[], object]], ...] = (
        (0.12, lambda: w.selector.update(rng.choice(({"disk": "ssd"}, {"disk": "hdd"}, {"arch": "amd64"}, {"region": "eu"})))),
        (0.12, lambda: setattr(w, "required", (rng.choice((("zone", "In", ("eu-a", "us-a")), ("arch", "NotIn", ("arm64",)), ("gen", "Gt", ("1",)), ("site", "In", ("s0", "s1", "s2")))),))),
        (0.3, lambda: setattr(w, "preferred", ((rng.choice((20, 50, 100)), "disk", ("ssd",)), (rng.choice((20, 50, 100)), "zone", (rng.choice(("eu-a", "eu-b", "us-a")),))))),
        (0.3, lambda: setattr(w, "tolerates", rng.choice((("dedicated",), ("noisy",), ("dedicated", "noisy"))))),
        (0.12, lambda: setattr(w, "numa", True)),
        (0.1, lambda: setattr(w, "residency", (rng.choice(("eu", "us")),))),
        (0.1, lambda: setattr(w, "links", ((rng.choice(SITES), rng.choice((5_000, 83_000)), 0),))),
        (0.08, lambda: setattr(w, "links", ((rng.choice(SITES), 0, rng.choice((700_000, 4_000_000))),))),
    )
    for chance, mark in draws:
        if rng.random() < chance:
            mark()
    return w


def _group(rng: Random, number: int, groups: list[list[Workload]], scale: float) -> list[Workload]:
    """One workload, some replicas, a gang, or one that must be near another."""
    app = f"a{number}"
    draws: tuple[tuple[float, Callable[[], list[Workload]]], ...] = (
        (0.40, lambda: [_single(rng, app, scale)]),
        (0.17, lambda: [_gpu(rng, _single(rng, app, 0.5 * scale))]),
        (0.20, lambda: _replicas(rng, app, scale)),
        (0.11, lambda: _gang(rng, app, scale)),
        (0.12, lambda: _near(rng, app, groups, scale)),
    )
    at = rng.random()
    for chance, make in draws:
        if at < chance:
            return make()
        at -= chance
    return draws[0][1]()


def _gpu(rng: Random, w: Workload) -> Workload:
    if rng.random() < 0.6:
        w.gpu_count, w.gpu_milli, w.gpu_memory = 1, rng.choice((200, 300, 500, 700)), rng.choice((2_048, 4_096, 8_192))
    else:
        w.gpu_count, w.gpu_milli, w.gpu_memory = rng.choice((1, 1, 2)), 1000, 0
    if rng.random() < 0.4:
        w.gpu_models = (rng.choice(("T4", "A100")),)
    return w


def _replicas(rng: Random, app: str, scale: float) -> list[Workload]:
    first = _single(rng, app, 0.5 * scale)
    first.kind = "container"
    how = rng.random()
    if how < 0.3:
        first.anti_affinity = ((app, rng.choice(("host", "host", "rack"))),)
    elif how < 0.6:
        first.spread = ((rng.choice((1, 1, 2)), rng.choice(("host", "rack", "zone")), True),)
    elif how < 0.8:
        first.spread = ((1, rng.choice(("zone", "rack", "host")), False),)
    else:
        first.affinity = ((app, rng.choice(("rack", "site", "zone"))),)
    return [Workload(**{**vars(first), "selector": dict(first.selector)}) for _ in range(rng.randint(2, 4))]


def _gang(rng: Random, app: str, scale: float) -> list[Workload]:
    first = _single(rng, app, 0.5 * scale)
    first.kind = "batch"
    if rng.random() < 0.5:
        _gpu(rng, first)
    size = rng.randint(2, 4)
    first.gang, first.gang_size = f"g-{app}", size
    return [Workload(**{**vars(first), "selector": dict(first.selector)}) for _ in range(size)]


def _near(rng: Random, app: str, groups: list[list[Workload]], scale: float) -> list[Workload]:
    """A workload that must be near, or must not be near, one of an application that needs nobody itself."""
    w = _single(rng, app, 0.5 * scale)
    free = [group[0].app for group in groups if not group[0].affinity]
    if free:
        other, key = rng.choice(free), rng.choice(("rack", "site", "zone", "host"))
        if rng.random() < 0.6:
            w.affinity = ((other, "site" if key == "host" else key),)
        else:
            w.anti_affinity = ((other, key),)
    return [w]


def _count(workloads: list[Workload]) -> dict[str, int]:
    tests: dict[str, Callable[[Workload], bool]] = {
        "selector": lambda w: bool(w.selector), "node_affinity": lambda w: bool(w.required), "preferred_nodes": lambda w: bool(w.preferred), "taint": lambda w: bool(w.tolerates),
        "affinity": lambda w: any(app != w.app for app, _ in w.affinity), "self_affinity": lambda w: any(app == w.app for app, _ in w.affinity),
        "anti_affinity": lambda w: bool(w.anti_affinity), "spread_hard": lambda w: any(hard for _, _, hard in w.spread), "spread_soft": lambda w: any(not hard for _, _, hard in w.spread),
        "numa": lambda w: w.numa, "gpu_fraction": lambda w: w.gpu_count > 0 and w.gpu_milli < 1000, "gpu_whole": lambda w: w.gpu_count > 0 and w.gpu_milli == 1000,
        "gpu_model": lambda w: bool(w.gpu_models), "residency": lambda w: bool(w.residency), "link_rtt": lambda w: any(link[1] for link in w.links),
        "link_bandwidth": lambda w: any(link[2] for link in w.links), "quota": lambda _w: False, "gang": lambda w: bool(w.gang),
    }
    return {name: sum(test(w) for w in workloads) for name, test in tests.items()}


def as_scheduler_input(instance: Instance) -> dict[str, Any]:
    """Nodes, workloads, quotas and ways between sites in the form that the scheduler's parser reads."""
    return {
        "nodes": [_node_json(node) for node in instance.nodes], "workloads": [_workload_json(w) for w in instance.workloads],
        "quotas": {tenant: {"cpu": f"{cpu}m", "memory": memory << 20} for tenant, (cpu, memory) in instance.quotas.items()},
        "ways": [{"from": one, "to": other, "rtt_us": rtt_us(one, other), "kbps": kbps(one, other)} for one in SITES for other in SITES],
    }


def _node_json(node: Node) -> dict[str, Any]:
    out: dict[str, Any] = {
        "name": node.name, "kind": node.kind, "capacity": {"cpu": f"{node.cpu}m", "memory": node.memory << 20, "slots": 110}, "labels": node.labels, "region": node.domain("region"),
        "zone": node.domain("zone"), "site": node.site, "rack": node.rack, "price": node.price, "taints": [{"key": k, "value": v, "effect": e} for k, v, e in node.taints],
    }
    if node.gpus:
        out["gpus"] = [{"model": node.model, "memory": node.gpu_memory << 20, "count": node.gpus}]
    if node.zones > 1:
        out["numa"] = [{"cpu": f"{node.cpu // node.zones}m", "memory": (node.memory << 20) // node.zones} for _ in range(node.zones)]
    return out


def _workload_json(w: Workload) -> dict[str, Any]:
    def term(app: str, key: str) -> dict[str, Any]:
        return {"selector": {"labels": {"app": app}}, "topology_key": key}

    out: dict[str, Any] = {
        "id": w.id, "kind": w.kind, "labels": {"app": w.app}, "requests": {"cpu": f"{w.cpu}m", "memory": w.memory << 20}, "priority": w.priority, "tenant": w.tenant,
        "node_selector": w.selector, "tolerations": [{"key": key} for key in w.tolerates], "affinity": [term(*t) for t in w.affinity],
        "anti_affinity": [term(*t) for t in w.anti_affinity],
        "spread": [{"max_skew": skew, "topology_key": key, "selector": {"labels": {"app": w.app}}, "hard": hard} for skew, key, hard in w.spread],
        "numa": "single" if w.numa else "any", "residency": list(w.residency), "links": [{"site": s, "max_rtt_us": r, "min_kbps": k} for s, r, k in w.links],
    }
    if w.required or w.preferred:
        out["node_affinity"] = {
            **({"required": [{"labels": [{"key": k, "op": op, "values": list(v)} for k, op, v in w.required]}]} if w.required else {}),
            "preferred": [{"weight": weight, "term": {"labels": [{"key": k, "op": "In", "values": list(v)}]}} for weight, k, v in w.preferred],
        }
    if w.gpu_count:
        out["gpu"] = {"count": w.gpu_count, "milli": w.gpu_milli, "memory": w.gpu_memory << 20, "models": list(w.gpu_models)}
    if w.gang:
        out["gang"] = {"id": w.gang, "size": w.gang_size}
    return out
