"""A backlog as an integer programme: every filter, gang, quota and soft spread as linear rows over how many workloads of a group go to which node, device and zone.

Workloads that nothing tells apart are one group, so that no search looks at their permutations. What runs already is part of the right-hand sides. All numbers are whole.
The rows say what holds in the end, whatever the order; where an order could allow more than they do (`Programme.exact` is False), the programme's optimum is a placement
like any other and its bound is none.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd

import numpy as np

from . import quota
from .arrays import GONE, Seat
from .classes import Klass
from .feasible import devices_for, numa_share, verdicts
from .model import HOST, Spread, Workload
from .place import Scheduler
from .reasons import Bools, Fail, Ints
from .units import CPU, GPU_WHOLE, MEMORY, Invalid

MAX_CELLS = 20_000
"""Groups x nodes of one programme: its rows and the time of one relaxation grow with them; larger backlogs are left to destroy and repair."""

OPENS = np.uint32(Fail.AFFINITY | Fail.SPREAD)
"""What others of the backlog can cure; every other failed filter stays failed, as nothing that runs leaves."""

Terms = list[tuple[int, int]]
"""(column, coefficient)."""


@dataclass(frozen=True)
class Wanted:
    """One workload of a backlog. `points` [node]: what a placement there misses. `unit`: those of one number are placed together or not at all."""

    workload: Workload
    klass: Klass
    points: Ints
    unit: int


@dataclass
class Group:
    """Workloads that nothing tells apart, and their columns: how many on a node, a device of a node, a zone of a node."""

    klass: Klass
    priority: int
    tenant: str
    unit: int
    """-1 where each member stands for itself."""
    points: Ints
    members: list[Workload] = field(default_factory=list)
    x: dict[int, int] = field(default_factory=dict)
    device: dict[tuple[int, int], int] = field(default_factory=dict)
    zone: dict[tuple[int, int], int] = field(default_factory=dict)


class Programme:
    """Columns with upper bounds (all from 0, all whole), rows `low <= sum <= high`, levels to be maximised one after the other, then a cost to be made least."""

    def __init__(self, scheduler: Scheduler, wanted: Sequence[Wanted], spread_points: int) -> None:
        """`spread_points`: what one workload of skew beyond a soft spread costs. The state holds nothing of the backlog yet. Raises `Invalid` where it is too large."""
        self.scheduler, self.state = scheduler, scheduler.state
        self.upper: list[int] = []
        self.rows: list[tuple[float, Terms, float]] = []
        self.cost: dict[int, int] = {}
        self.exact = True
        """Whether the rows allow all that some order of placements could come to."""
        self.groups = _groups(wanted)
        cells = len(self.groups) * self.state.size
        if cells > MAX_CELLS:
            raise Invalid("workloads", f"{len(self.groups)} different ones on {self.state.size} nodes", f"give at most {MAX_CELLS} of their product at a time")
        for group in self.groups:
            self._columns(group)
        self.columns_of_nodes: dict[int, list[int]] = {}
        for group in self.groups:
            for node, column in [*group.x.items(), *((node, column) for part in (group.device, group.zone) for (node, _), column in part.items())]:
                self.columns_of_nodes.setdefault(node, []).append(column)
        self.columns_of_groups = [column for mine in self.columns_of_nodes.values() for column in mine]
        self.gangs = {unit: self.column(1) for unit in sorted({group.unit for group in self.groups if group.unit >= 0})}
        for group in self.groups:
            if group.unit >= 0:
                self.row(0, [*self._all(group), (self.gangs[group.unit], -len(group.members))], 0)
            else:
                self.row(-np.inf, self._all(group), len(group.members))
        self._capacity()
        self._quotas()
        self._ways()
        self._apart()
        self._together()
        self._hard_spreads()
        self._soft_spreads(spread_points)
        self.levels: dict[int, tuple[Terms, int]] = {}
        """Priority to what counts its placed workloads, and how many there are; the highest first."""
        for level in sorted({group.priority for group in self.groups}, reverse=True):
            mine = [group for group in self.groups if group.priority == level]
            self.levels[level] = [term for group in mine for term in self._all(group)], sum(len(group.members) for group in mine)

    # columns and rows

    def column(self, upper: int) -> int:
        """A new column of 0 to `upper`."""
        self.upper.append(upper)
        return len(self.upper) - 1

    def row(self, low: float, terms: Iterable[tuple[int, int]], high: float) -> None:
        """`low <= sum <= high`, left out where no values of the columns can break it."""
        merged: dict[int, int] = {}
        for at, factor in terms:
            merged[at] = merged.get(at, 0) + factor
        kept = [(at, factor) for at, factor in merged.items() if factor]
        most = sum(factor * self.upper[at] for at, factor in kept if factor > 0)
        least = sum(factor * self.upper[at] for at, factor in kept if factor < 0)
        if least >= low and most <= high:
            return
        if np.isinf(low) and all(factor > 0 for _, factor in kept):
            # A capacity: in units of what is asked for, so that the numbers stay small and what can never be used is cut off. Where too much is taken already, nothing comes.
            unit = gcd(*(factor for _, factor in kept)) or 1
            kept, high = [(at, factor // unit) for at, factor in kept], max(0, int(high)) // unit
            if not kept:
                return
        self.rows.append((low, kept, high))

    def _columns(self, group: Group) -> None:
        state, klass, shape = self.state, group.klass, group.klass.shape
        count = len(group.members)
        bits = verdicts(state, klass) & ~OPENS
        fits = devices_for(state, klass, shape.gpu) if shape.gpu is not None else None
        places = {int(node): at for at, node in enumerate(state.facts(klass).gpu_nodes)}
        for node in np.flatnonzero(bits == 0).tolist():
            most = min(count, int((state.free[klass.resources, node] // klass.amounts[:, 0]).min(initial=count)))
            if most <= 0:
                continue
            x = group.x[node] = self.column(most)
            if group.points[node]:
                self.cost[x] = int(group.points[node])
            if shape.gpu is not None and fits is not None:
                devices = np.flatnonzero(fits[places[node]]).tolist()
                for device in devices:
                    room = int(state.gpu_free[node, device]) // shape.gpu.milli
                    room = min(room, int(state.gpu_mem[node, device]) // shape.gpu.memory) if shape.gpu.memory else room
                    group.device[node, device] = self.column(min(most, room))
                    if shape.gpu.count > 1:
                        self.row(-np.inf, [(group.device[node, device], 1), (x, -1)], 0)
                self.row(0, [*((group.device[node, device], 1) for device in devices), (x, -shape.gpu.count)], 0)
            if shape.numa_single and state.nodes[node].numa:
                zones = range(len(state.nodes[node].numa))
                for zone in zones:
                    group.zone[node, zone] = self.column(most)
                self.row(0, [*((group.zone[node, zone], 1) for zone in zones), (x, -1)], 0)

    def _all(self, group: Group) -> Terms:
        return [(x, 1) for x in group.x.values()]

    def _inside(self, group: Group, nodes: Iterable[int], factor: int = 1) -> Terms:
        return [(group.x[node], factor) for node in nodes if node in group.x]

    # what nodes, devices, zones, tenants and ways hold

    def _capacity(self) -> None:
        state = self.state
        for node in range(state.size):
            here = [group for group in self.groups if node in group.x]
            for row in range(len(state.free)):
                self.row(-np.inf, [(group.x[node], int(group.klass.request[row])) for group in here], int(state.free[row, node]))
            for device in range(len(state.nodes[node].gpus)):
                asks = [(group.device[node, device], gpu) for group in here if (node, device) in group.device and (gpu := group.klass.shape.gpu) is not None]
                self.row(-np.inf, [(at, gpu.milli) for at, gpu in asks], int(state.gpu_free[node, device]))
                self.row(-np.inf, [(at, gpu.memory) for at, gpu in asks], int(state.gpu_mem[node, device]))
            zones = range(len(state.nodes[node].numa))
            for part, name in enumerate((CPU, MEMORY) if zones else ()):
                each = [(group, group.klass.shape.request_map.get(name, 0)) for group in here]
                for zone in zones:
                    self.row(-np.inf, [(group.zone[node, zone], amount) for group, amount in each if (node, zone) in group.zone], int(state.numa_free[node, zone, part]))
                self.row(-np.inf, [(group.x[node], amount) for group, amount in each], int(np.maximum(state.numa_free[node, list(zones), part], 0).sum()))

    def _quotas(self) -> None:
        state = self.state
        for tenant in sorted({group.tenant for group in self.groups} & state.quotas.keys()):
            limit, held = state.quotas[tenant], quota.used(state, tenant)
            borrow = dict(limit.borrow) if limit.cohort else {}
            self.exact &= not borrow
            for name, nominal in limit.nominal:
                mine = self._asks({tenant}, name)
                lent = min(borrow.get(name, 0), max(0, quota.unused(state, limit.cohort, name))) if borrow else 0
                self.row(-np.inf, mine, max(0, nominal + lent - held.get(name, 0)))
        for cohort in sorted({limit.cohort for limit in state.quotas.values() if limit.cohort}):
            members = {tenant for tenant, limit in state.quotas.items() if limit.cohort == cohort}
            for name in sorted({name for tenant in members for name, _ in state.quotas[tenant].borrow}):
                left = quota.unused(state, cohort, name)
                if left > 0:
                    self.row(-np.inf, self._asks(members, name), left)

    def _asks(self, tenants: set[str], name: str) -> Terms:
        return [(x, amount) for group in self.groups if group.tenant in tenants and (amount := quota.asks(group.members[0]).get(name, 0)) for x in group.x.values()]

    def _ways(self) -> None:
        sites, used = self.state.sites, dict[tuple[int, int], Terms]()
        for group in self.groups:
            for link in group.klass.shape.links:
                to = sites.ids.get(link.site)
                for node, x in group.x.items() if to is not None and link.min_kbps else ():
                    here = int(self.state.site_of[node])
                    if to is not None and here != to:
                        used.setdefault((min(here, to), max(here, to)), []).append((x, link.min_kbps))
        for (one, other), terms in used.items():
            self.row(-np.inf, terms, int(sites.kbps[one, other] - sites.used_kbps[one, other]))

    # what must be apart or together

    def _counted(self, row: int) -> list[Group]:
        """Groups whose placements move a counter row."""
        return [group for group in self.groups if any(at == row for at, _ in group.klass.bumps)]

    def _domains(self, key: str) -> list[list[int]]:
        """Nodes by domain of a topology key; those without one are in none."""
        if key == HOST:
            return [[node] for node in range(self.state.size)]
        domain, size = self.state.attributes.domains(key)
        return [found for at in range(size) if (found := np.flatnonzero(domain == at).tolist())]

    def _apart(self) -> None:
        done: set[tuple[int, int, str]] = set()
        for one, group in enumerate(self.groups):
            for row, key in group.klass.anti:
                counted = self._counted(row)
                for two, other in enumerate(self.groups):
                    pair = min(one, two), max(one, two), key
                    if pair not in done and any(other is found for found in counted):
                        done.add(pair)
                        for nodes in self._domains(key):
                            self._not_both(group, other, nodes)

    def _not_both(self, one: Group, other: Group, nodes: list[int]) -> None:
        mine, theirs = self._inside(one, nodes), self._inside(other, nodes)
        if one is other:
            self.row(-np.inf, mine, 1)
        elif mine and theirs:
            if len(one.members) == len(other.members) == 1:
                self.row(-np.inf, [*mine, *theirs], 1)
                return
            there = self.column(1)
            self._only_where(one, nodes, [(there, 1)], 0)
            self._only_where(other, nodes, [(there, -1)], 1)

    def _only_where(self, group: Group, nodes: list[int], gate: Terms, constant: int) -> None:
        """Members in `nodes` only where `gate + constant` is 1 or more; node by node as well, which is what keeps the relaxation tight."""
        inside = self._inside(group, nodes)
        if not inside:
            return
        for x, _ in inside:
            most = self.upper[x]
            self.row(-np.inf, [(x, 1), *((at, -most * factor) for at, factor in gate)], most * constant)
        if len(inside) > 1:
            many = min(len(group.members), sum(self.upper[x] for x, _ in inside))
            self.row(-np.inf, [*inside, *((at, -many * factor) for at, factor in gate)], many * constant)

    def _together(self) -> None:
        homes: dict[tuple[int, tuple[str, ...]], dict[tuple[str, int], int]] = {}
        for group in self.groups:
            if group.klass.affinity is None:
                continue
            row, keys, itself = group.klass.affinity
            counts, counted = self.state.counts[row], self._counted(row)
            keyed = np.logical_and.reduce([self.state.attributes.domains(key)[0] >= 0 for key in keys])
            for node, x in group.x.items():
                if not keyed[node]:
                    self.upper[x] = 0
            others = [other for other in counted if other.klass.affinity != group.klass.affinity]
            # The first of a group that wants to be with itself may start where it likes: one domain of each key is its home.
            starts = itself and not any((counts[nodes] > 0).any() for key in keys for nodes in self._domains(key))
            self.exact &= not (starts and others and len(keys) > 1)
            if starts and (row, keys) not in homes:
                homes[row, keys] = {(key, at): self.column(1) for key in keys for at in range(len(self._domains(key)))}
                for key in keys:
                    self.row(-np.inf, [(home, 1) for (of, _), home in homes[row, keys].items() if of == key], 1)
            for key in keys:
                for at, nodes in enumerate(self._domains(key)):
                    if (counts[nodes] > 0).any():
                        continue
                    gate = [term for other in others for term in self._inside(other, nodes)]
                    self._only_where(group, nodes, [*gate, (homes[row, keys][key, at], 1)] if starts else gate, 0)

    # spreads

    def _hard_spreads(self) -> None:
        done: set[tuple[object, ...]] = set()
        for group in self.groups:
            klass, eligible = group.klass, self._eligible(group.klass)
            for item, row, own in zip(klass.shape.spread, klass.spread_rows, klass.spread_self, strict=True):
                same = (row, item, eligible.tobytes())
                if not item.hard or same in done:
                    continue
                done.add(same)
                counted = self._counted(row)
                # Where all that are counted carry the same spread over the same nodes, what holds in the end can be filled level by level, and nothing else can.
                self.exact &= bool(own) and all(item in found.klass.shape.spread and np.array_equal(self._eligible(found.klass), eligible) for found in counted)
                self._level(item, row, eligible, [*counted, *([] if own else [group])])

    def _eligible(self, klass: Klass) -> Bools:
        """[node] whether it counts for the hard spreads of a class."""
        found: Bools = self.state.facts(klass).affine & (self.state.status != GONE)
        for item in klass.shape.spread:
            if item.hard:
                found = found & (self.state.attributes.domains(item.topology_key)[0] >= 0)
        return found

    def _level(self, item: Spread, row: int, eligible: Bools, counted: list[Group]) -> None:
        """No domain that takes one of `counted` ends up above the emptiest by more than the skew."""
        domains = [[node for node in nodes if eligible[node]] for nodes in self._domains(item.topology_key)]
        domains = [nodes for nodes in domains if nodes]
        running = [int(self.state.counts[row][nodes].sum()) for nodes in domains]
        if not domains:
            return
        floor = len(domains) >= item.min_domains
        least = self._least(domains, running, counted) if floor else None
        for nodes, there in zip(domains, running, strict=True):
            terms = [term for group in counted for term in self._inside(group, nodes)]
            if least is not None:
                terms.append((least, -1))
            over = there - item.max_skew - (min(running) if floor else 0)
            if over > 0:
                # Too full before anything came: that forbids nothing to those who go elsewhere.
                used = self.column(1)
                for group in counted:
                    self._only_where(group, nodes, [(used, 1)], 0)
                terms.append((used, there))
                self.row(-np.inf, terms, item.max_skew)
            else:
                self.row(-np.inf, terms, item.max_skew - there)

    def _least(self, domains: list[list[int]], running: list[int], counted: list[Group]) -> int:
        """A column that is at most what the emptiest domain holds."""
        least = self.column(max(running) + sum(len(group.members) for group in counted))
        for nodes, there in zip(domains, running, strict=True):
            self.row(-np.inf, [(least, 1), *(term for group in counted for term in self._inside(group, nodes, -1))], there)
        return least

    def _soft_spreads(self, points: int) -> None:
        softs: dict[tuple[int, str, int], Klass] = {}
        for group in self.groups:
            for item, row in zip(group.klass.shape.spread, group.klass.spread_rows, strict=True):
                if not item.hard:
                    klass = softs.setdefault((row, item.topology_key, item.max_skew), group.klass)
                    self.exact &= klass is group.klass or np.array_equal(self.state.facts(klass).affine, self.state.facts(group.klass).affine)
        for (row, key, skew), klass in softs.items():
            affine, counted = self.state.facts(klass).affine, self._counted(row)
            domains = [found for nodes in self._domains(key) if (found := [node for node in nodes if affine[node]])]
            running = [int(self.state.counts[row][nodes].sum()) for nodes in domains]
            if len(domains) < 2:
                continue
            least = self._least(domains, running, counted)
            beyond = self.column(max(running) + sum(len(group.members) for group in counted))
            self.cost[beyond] = points
            for nodes, there in zip(domains, running, strict=True):
                self.row(-np.inf, [*(term for group in counted for term in self._inside(group, nodes)), (least, -1), (beyond, -1)], skew - there)

    # from and to seats

    def holds(self, values: Sequence[int]) -> bool:
        """Whether whole values of all columns keep every row and bound, in exact arithmetic."""
        return all(0 <= value <= most for value, most in zip(values, self.upper, strict=True)) and all(
            low <= sum(factor * values[column] for column, factor in terms) <= high for low, terms, high in self.rows
        )

    def values(self, seats: Mapping[str, Seat]) -> dict[int, int]:
        """Columns of groups and gangs for a placement; what follows from them is left to the solver."""
        found = dict.fromkeys(self.gangs.values(), 0)
        for group in self.groups:
            found |= dict.fromkeys([*group.x.values(), *group.device.values(), *group.zone.values()], 0)
            for member in group.members:
                seat = seats.get(member.id)
                if seat is None:
                    continue
                found[group.x[seat.node]] += 1
                for device in seat.gpus:
                    found[group.device[seat.node, device]] += 1
                if (seat.node, 0) in group.zone and seat.numa:
                    found[group.zone[seat.node, seat.numa[0][0]]] += 1
                if group.unit >= 0:
                    found[self.gangs[group.unit]] = 1
        return found

    def seats(self, values: Sequence[int]) -> dict[str, Seat]:
        """Where the columns' values put each workload. The state holds nothing of the backlog, and is left so. Raises `Invalid` where the state has no such room."""
        chosen = [part for group in self.groups for part in self._dealt(group, values)]
        starters = {member.id for group in self.groups if group.klass.affinity is not None and group.klass.affinity[2] for member in group.members}
        found: dict[str, Seat] = {}
        mark = self.state.begin()
        try:
            # Those bound to one zone first: the others take what is left of all zones.
            for workload, node, devices, zone in sorted(chosen, key=lambda part: part[3] < 0):
                need = workload.shape.request_map
                numa = ((zone, need.get(CPU, 0), need.get(MEMORY, 0)),) if zone >= 0 else numa_share(self.state, node, workload.shape)
                if numa is None:
                    raise Invalid("seat.numa", f"the zones of {self.state.nodes[node].name} have no room for {workload.id}", "decide again")
                found[workload.id] = Seat(node, devices, numa)
                self.state.place(workload, found[workload.id], 0)
        finally:
            self.state.undo(mark)
        # The first of those who want to be with their own kind can start only while nobody else of it is there.
        return dict(sorted(found.items(), key=lambda part: part[0] not in starters))

    def _dealt(self, group: Group, values: Sequence[int]) -> Iterator[tuple[Workload, int, tuple[int, ...], int]]:
        """Node, devices and zone (-1: any) for as many members as the group has places."""
        waiting, gpu = iter(group.members), group.klass.shape.gpu
        for node, x in group.x.items():
            count = values[x]
            devices = [device for (at, device), column in group.device.items() if at == node for _ in range(values[column])]
            zones = [zone for (at, zone), column in group.zone.items() if at == node for _ in range(values[column])]
            for number in range(count):
                mine: tuple[int, ...] = ()
                if gpu is not None:
                    # Whole devices in a row; parts in turn: nobody gets a device twice, as no device has more parts taken than there are workloads.
                    mine = tuple(devices[number::count] if gpu.milli < GPU_WHOLE else devices[number * gpu.count : (number + 1) * gpu.count])
                yield next(waiting), node, mine, zones[number] if zones else -1


def _groups(wanted: Sequence[Wanted]) -> list[Group]:
    found: dict[tuple[int, int, str, int], Group] = {}
    for item in wanted:
        unit = item.unit if item.workload.gang else -1
        key = item.klass.id, item.workload.priority, item.workload.tenant, unit
        found.setdefault(key, Group(item.klass, item.workload.priority, item.workload.tenant, unit, item.points)).members.append(item.workload)
    return list(found.values())
