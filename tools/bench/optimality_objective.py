"""What a placement of an instance is worth, what is allowed, and how a greedy rule would place: plain Python over plain data, no code of the scheduler.

**Objective**, lexicographic, larger first:

1. for each priority from the highest down: how many workloads of it are placed;
2. the policy cost of what is placed, smaller is better: the points (0 to 100) that each placement misses in the scheduler's policies, by their default weights, where
   the nodes that would do for the workload in an empty cluster set the scale:
   `cost_optimization` 6 x where the price of what it takes (price of the node x its largest share of CPU or memory) lies between the cheapest (0) and the dearest (100),
   `node_affinity` 8 x the part of the best sum of preferred weights that the node lacks,
   `topology_spread` 5 x 100 for each workload of skew beyond what a soft spread allows (the fullest domain against the emptiest).

A gang is placed whole or not at all. A workload counts 1, however large: the priority says what matters more. `resource_balance` and fragmentation are means, not ends:
they keep room for what comes, which shows in 1.
"""

from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import NamedTuple

from .optimality_instances import Instance, Node, Workload, kbps, rtt_us

PRICE, AFFINITY, SPREAD = 6, 8, 5
"""The scheduler's default weights of the three policies."""

SKEW_POINTS = 100
"""Points, before the weight, of one workload too many in a domain."""

GPU_WHOLE = 1000


class Seat(NamedTuple):
    """Where a workload is: index of the node, devices, NUMA zone (-1: none in particular)."""

    node: int
    devices: tuple[int, ...] = ()
    zone: int = -1


Placement = Mapping[str, Seat]


def placement_cost(instance: Instance, w: Workload, node: Node) -> int:
    """The part of the cost that depends on one workload and its node; the node must fit alone."""
    would_do = [other for other in instance.nodes if not fits_alone(instance, w, other)]
    prices, liked = [_price(w, other) for other in would_do], [_liked(w, other) for other in would_do]
    least, most, best = min(prices), max(prices), max(liked)
    cost = PRICE * (100 * (_price(w, node) - least) // (most - least)) if most > least else 0
    return cost + (AFFINITY * (100 - 100 * _liked(w, node) // best) if best else 0)


def _price(w: Workload, node: Node) -> int:
    """Millionths of the unit of price."""
    return node.price * max(1_000_000 * w.cpu // node.cpu, 1_000_000 * w.memory // node.memory)


def _liked(w: Workload, node: Node) -> int:
    return sum(weight for weight, key, values in w.preferred if node.tags.get(key) in values)


def fits_alone(instance: Instance, w: Workload, node: Node) -> str:
    """What forbids the node to the workload whatever else is placed; empty where nothing does."""
    tags = node.tags
    if any(tags.get(key) != value for key, value in w.selector.items()) or not all(_meets(tags, *term) for term in w.required):
        return "node affinity"
    if any(key not in w.tolerates for key, _, _ in node.taints):
        return "taint"
    if w.residency and node.domain("region") not in w.residency:
        return "residency"
    for site, max_rtt, min_kbps in w.links:
        if max_rtt and rtt_us(node.site, site) > max_rtt:
            return "round trip"
        if min_kbps and kbps(node.site, site) < min_kbps:
            return "bandwidth"
    if w.cpu > node.cpu or w.memory > node.memory or (w.numa and (w.cpu > node.cpu // node.zones or w.memory > node.memory // node.zones)):
        return "resources"
    if w.gpu_count and (node.gpus < w.gpu_count or (w.gpu_models and node.model not in w.gpu_models) or w.gpu_memory > node.gpu_memory):
        return "gpu"
    return ""


def _meets(tags: Mapping[str, str], key: str, op: str, values: tuple[str, ...]) -> bool:
    value = tags.get(key)
    if op == "In":
        return value in values
    if op == "NotIn":
        return value not in values
    return value is not None and int(value) > int(values[0])


def eligible(w: Workload, node: Node) -> bool:
    """Whether the node's domain counts for the workload's spread: selector and required affinity decide, taints do not (kube's defaults)."""
    return all(node.tags.get(key) == value for key, value in w.selector.items()) and all(_meets(node.tags, *term) for term in w.required)


def value(instance: Instance, placement: Placement) -> tuple[int, ...]:
    """The objective; compare tuples, larger is better."""
    levels = sorted({w.priority for w in instance.workloads}, reverse=True)
    placed = [w for w in instance.workloads if w.id in placement]
    cost = sum(placement_cost(instance, w, instance.nodes[placement[w.id].node]) for w in placed)
    done = set()
    for w in placed:
        for skew, key, hard in w.spread:
            if not hard and (w.app, key) not in done:
                done.add((w.app, key))
                counts = _counts(instance, placement, w, key)
                cost += SPREAD * SKEW_POINTS * max(0, max(counts.values()) - min(counts.values()) - skew)
    return (*(sum(w.priority == level for w in placed) for level in levels), -cost)


def _counts(instance: Instance, placement: Placement, like: Workload, key: str) -> dict[str, int]:
    counts = {node.domain(key): 0 for node in instance.nodes if eligible(like, node)}
    for w in instance.workloads:
        if w.app == like.app and w.id in placement:
            domain = instance.nodes[placement[w.id].node].domain(key)
            counts[domain] = counts.get(domain, 0) + 1
    return counts


def faults(instance: Instance, placement: Placement, *, gangs: bool = True) -> list[str]:
    """Everything that a placement breaks, in words; empty where it is allowed."""
    found: list[str] = []
    by_id = {w.id: w for w in instance.workloads}
    placed = [(by_id[name], seat) for name, seat in placement.items() if name in by_id]
    found += [f"{name}: not a workload of the instance" for name in placement if name not in by_id]
    for w, seat in placed:
        reason = fits_alone(instance, w, instance.nodes[seat.node])
        if reason:
            found.append(f"{w.id} on {instance.nodes[seat.node].name}: {reason}")
    for index, node in enumerate(instance.nodes):
        found += _node_faults(node, [(w, seat) for w, seat in placed if seat.node == index])
    found += _together(instance, placed)
    for like in {w.app: w for w, _ in placed}.values():
        for skew, key, hard in like.spread:
            counts = _counts(instance, placement, like, key)
            if hard and max(counts.values()) - min(counts.values()) > skew:
                found.append(f"{like.app}: skew over {key} is {counts}, at most {skew}")
    for tenant, (cpu, memory) in instance.quotas.items():
        used = sum(w.cpu for w, _ in placed if w.tenant == tenant), sum(w.memory for w, _ in placed if w.tenant == tenant)
        if used[0] > cpu or used[1] > memory:
            found.append(f"{tenant}: uses {used}, quota ({cpu}, {memory})")
    ways: dict[tuple[str, str], int] = {}
    for w, seat in placed:
        for site, _, min_kbps in w.links:
            here = instance.nodes[seat.node].site
            if min_kbps and here != site:
                pair = (min(here, site), max(here, site))
                ways[pair] = ways.get(pair, 0) + min_kbps
    found += [f"way {pair}: {used} kbit/s taken" for pair, used in ways.items() if used > kbps(*pair)]
    if gangs:
        sizes: dict[str, int] = {}
        for w, _ in placed:
            if w.gang:
                sizes[w.gang] = sizes.get(w.gang, 0) + 1
        found += [f"gang {w.gang}: {sizes[w.gang]} of {w.gang_size} placed" for w in {w.gang: w for w, _ in placed if w.gang}.values() if sizes[w.gang] != w.gang_size]
    return found


def _node_faults(node: Node, here: Iterable[tuple[Workload, Seat]]) -> list[str]:
    here = list(here)
    found = []
    cpu, memory = sum(w.cpu for w, _ in here), sum(w.memory for w, _ in here)
    if cpu > node.cpu or memory > node.memory:
        found.append(f"{node.name}: {cpu} of {node.cpu} milli-CPU, {memory} of {node.memory} MiB")
    for zone in range(node.zones):
        single = [w for w, seat in here if w.numa and seat.zone == zone]
        if sum(w.cpu for w in single) > node.cpu // node.zones or sum(w.memory for w in single) > node.memory // node.zones:
            found.append(f"{node.name}: zone {zone} is overfull")
    for w, seat in here:
        if w.numa and not 0 <= seat.zone < node.zones:
            found.append(f"{w.id}: in no single zone")
        if len(set(seat.devices)) != w.gpu_count or not all(0 <= device < node.gpus for device in seat.devices):
            found.append(f"{w.id}: devices {seat.devices}, wants {w.gpu_count}")
    for device in range(node.gpus):
        users = [w for w, seat in here if device in seat.devices]
        if sum(w.gpu_milli for w in users) > GPU_WHOLE or sum(w.gpu_memory for w in users) > node.gpu_memory:
            found.append(f"{node.name}: device {device} is overfull")
    return found


def _together(instance: Instance, placed: list[tuple[Workload, Seat]]) -> list[str]:
    """Affinity and anti-affinity, both ways."""
    found = []
    for w, seat in placed:
        for app, key in w.anti_affinity:
            mine = instance.nodes[seat.node].domain(key)
            found += [f"{w.id}: apart from {o.id}, both in {mine}" for o, s in placed if o.id != w.id and o.app == app and instance.nodes[s.node].domain(key) == mine]
        for app, key in w.affinity:
            mine = instance.nodes[seat.node].domain(key)
            others = [instance.nodes[s.node].domain(key) for o, s in placed if o.id != w.id and o.app == app]
            # The first of a group that wants to be with itself may go anywhere; all others then join it.
            if (app == w.app and any(other != mine for other in others)) or (app != w.app and mine not in others):
                found.append(f"{w.id}: wants to be with {app} in {mine}, they are in {others}")
    return found


def seats_of(instance: Instance, placement: Placement, w: Workload, index: int) -> Seat | None:
    """The place on a node, with the fullest devices and zone that still fit; None where it may not go there now (gangs apart)."""
    node = instance.nodes[index]
    if fits_alone(instance, w, node):
        return None
    here = [(other, placement[other.id]) for other in instance.workloads if other.id in placement and placement[other.id].node == index]
    free = [
        (GPU_WHOLE - sum(o.gpu_milli for o, s in here if d in s.devices), node.gpu_memory - sum(o.gpu_memory for o, s in here if d in s.devices), d) for d in range(node.gpus)
    ]
    devices = tuple(d for milli, memory, d in sorted(free) if milli >= w.gpu_milli and memory >= w.gpu_memory)[:w.gpu_count]
    zones = sorted((node.cpu // node.zones - sum(o.cpu for o, s in here if o.numa and s.zone == z), z) for z in range(node.zones)) if w.numa else [(0, -1)]
    for _, zone in zones:
        seat = Seat(index, devices, zone)
        if not faults(instance, {**placement, w.id: seat}, gangs=False):
            return seat
    return None


def greedy(instance: Instance, rule: str, seed: int = 0) -> dict[str, Seat]:
    """Peers: each workload in order of arrival by `random`, `best_fit` (least left over), or `worst_cost` (the dearest place: the planted bad rule). Gangs all or nothing."""
    rng = Random(seed)
    placement: dict[str, Seat] = {}
    waiting = list(instance.workloads)
    while True:
        before = len(placement)
        later: list[Workload] = []
        for group in units(waiting):
            trial = dict(placement)
            for w in group:
                options = [seat for seat in (seats_of(instance, trial, w, index) for index in range(len(instance.nodes))) if seat]
                if not options:
                    later += group
                    break
                trial[w.id] = rng.choice(options) if rule == "random" else min(options, key=_order(instance, trial, w, rule))
            else:
                placement = trial
        waiting = later
        if len(placement) == before:
            return placement


def _order(instance: Instance, trial: Placement, w: Workload, rule: str) -> Callable[[Seat], tuple[float, int]]:
    """The least is chosen."""
    if rule == "best_fit":
        return lambda seat: (_left(instance, trial, w, seat), seat.node)
    return lambda seat: (-placement_cost(instance, w, instance.nodes[seat.node]), seat.node)


def units(workloads: Iterable[Workload]) -> list[list[Workload]]:
    """Gangs together, everything else alone, in order."""
    units: dict[str, list[Workload]] = {}
    for w in workloads:
        units.setdefault(w.gang or w.id, []).append(w)
    return list(units.values())


def _left(instance: Instance, placement: Placement, w: Workload, seat: Seat) -> float:
    node = instance.nodes[seat.node]
    here = [other for other in instance.workloads if other.id in placement and placement[other.id].node == seat.node]
    return (node.cpu - sum(o.cpu for o in here) - w.cpu) / 32_000 + (node.memory - sum(o.memory for o in here) - w.memory) / 262_144 + node.gpus / 4
