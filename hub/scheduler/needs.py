"""What a workload needs of a node that the going of others can give, as rows that add up: what is free on each node, and what one workload of a class gives back.

Every resource is such a row. So are, per domain: those that must not be there (each counts one too many), a spread (how many too many), the way to a site (kbit/s).
A plan fits where no row is below 0, whoever goes: so sums per priority say which nodes a priority opens, and one pass along the workloads of a node who may stay.
Devices and zones do not add up: they are *parts*, of which some must be free enough each (`Parts`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import kernels
from .arrays import GONE, IntArray
from .classes import Klass
from .feasible import in_domain
from .model import Link, Shape
from .reasons import Bools, Ints
from .state import State
from .units import CPU, MEMORY

UNBOUNDED = 1 << 60
"""Free where a row asks nothing of a node; below 0, where nobody's going helps. No sum of what workloads hold comes near it."""

_NO_DEVICES: Ints = np.zeros((0, 0), np.int64)
_NO_MILLI: IntArray = np.zeros((0, 0), np.int32)
_NO_SERVING: Bools = np.zeros((0, 0), np.bool_)
_NEVER: Bools = np.zeros(1, np.bool_)
_NO_ROWS: Ints = np.zeros(0, np.int64)


@dataclass(slots=True)
class Changes:
    """What one workload of each class changes; kept from search to search and brought up to date by what is new among the classes."""

    made: int = -1
    seen: dict[int, tuple[Shape, tuple[tuple[int, int], ...]]] = field(default_factory=dict)
    rows: dict[int, dict[int, int]] = field(default_factory=dict)
    """Counter row to class to change."""
    linked: dict[int, tuple[Link, ...]] = field(default_factory=dict)
    gpus: Ints = field(default_factory=lambda: np.zeros((3, 0), np.int64))
    """[milli of a device, memory of a device, milli in all; class]."""

    def refresh(self, state: State) -> None:
        """Up to date with the classes of the state. O(classes) where one is new, else nothing."""
        if self.made == state.classes_made:
            return
        self.made = state.classes_made
        if self.gpus.shape[1] != len(state.class_live):
            self.gpus = np.pad(self.gpus, ((0, 0), (0, len(state.class_live) - self.gpus.shape[1])))
        for number, item in enumerate(state.classes):
            old = self.seen.get(number)
            if (item is None and old is None) or (item is not None and old is not None and item.shape is old[0] and item.bumps is old[1]):
                continue
            for row, _ in old[1] if old is not None else ():
                self.rows[row].pop(number, None)
            self.seen.pop(number, None)
            self.linked.pop(number, None)
            self.gpus[:, number] = 0
            if item is not None:
                self._learn(number, item)

    def _learn(self, number: int, item: Klass) -> None:
        self.seen[number] = item.shape, item.bumps
        for row, change in item.bumps:
            self.rows.setdefault(row, {})[number] = change
        gpu, links = item.shape.gpu, tuple(link for link in item.shape.links if link.min_kbps)
        if gpu is not None:
            self.gpus[:, number] = gpu.milli, gpu.memory, gpu.milli * gpu.count
        if links:
            self.linked[number] = links


def changes_of(state: State) -> Changes:
    """Of the state, up to date."""
    found: Changes = state.caches.setdefault("changes", Changes())
    found.refresh(state)
    return found


@dataclass(frozen=True, slots=True)
class Parts:
    """Devices or zones of which `count` must each have `need` [unit] free. `units`: those that are asked for (milli-GPU and memory of a device, CPU and memory of a zone)."""

    need: Ints
    units: tuple[int, ...]
    count: int
    gpus: bool

    def at(self, needs: "Needs", nodes: Ints) -> tuple[Ints, Bools, Bools]:
        """[unit, part, node] what is free; [part, node] whether a part may serve; [node] whether the node needs none."""
        state = needs.state
        if self.gpus:
            facts = state.facts(needs.klass)
            free = np.stack([(state.gpu_free, state.gpu_mem)[unit][nodes].T.astype(np.int64) for unit in self.units])
            return free, facts.devices[np.searchsorted(facts.gpu_nodes, nodes)].T, np.zeros(len(nodes), np.bool_)
        zones: Ints = state.numa_free[nodes][:, :, self.units].transpose(2, 1, 0)
        return zones, np.ones(zones.shape[1:], np.bool_), np.array([not state.nodes[node].numa for node in nodes.tolist()], np.bool_)

    def given(self, needs: "Needs", slots: IntArray, there: Bools) -> Ints:
        """[unit, part, *slots.shape] what these slots give back; nothing where not `there`."""
        state = needs.state
        if self.gpus:
            width = np.arange(state.gpu_free.shape[1], dtype=np.int32)
            on = (np.where(there, state.w_gpus[slots], 0) >> width.reshape(-1, *[1] * slots.ndim)) & 1
            result: Ints = on * changes_of(state).gpus[list(self.units)][:, None, state.w_class[slots]]
            return result
        held = np.zeros((len(self.units), state.numa_free.shape[1], slots.size), np.int64)
        flat = np.flatnonzero(there)
        seats = [(at, seat.numa) for at, slot in zip(flat.tolist(), slots.ravel()[flat].tolist(), strict=True) if (seat := state.seats[slot]) is not None and seat.numa]
        shares = np.array([(at, *share) for at, numa in seats for share in numa], np.int64).reshape(-1, 4)
        for index, unit in enumerate(self.units):
            held[index, shares[:, 1], shares[:, 0]] = shares[:, 2 + unit]
        return held.reshape(*held.shape[:2], *slots.shape)

    def enough(self, free: Ints, serves: Bools, none: Bools) -> Bools:
        """[node] whether it will do with [unit, part, node] `free`."""
        good = serves
        for amounts, need in zip(free, self.need.tolist(), strict=True):
            good = good & (amounts >= need)
        found: Bools = none | (np.logical_or.reduce(good) if self.count == 1 else np.add.reduce(good) >= self.count)
        return found


class Needs:
    """What a class needs, over all nodes. Victims are below `priority` (None: of any)."""

    def __init__(self, state: State, klass: Klass, priority: int | None) -> None:
        self.state, self.klass = state, klass
        self.parts = _parts(klass.shape)
        self.others = [item for item in _others(state, klass) if (item[0] < 0).any()]
        """(free [node], class to what one of it gives back, whether those on their way out count no more)."""
        self.plain = not self.parts and not self.others
        self.rows, self.amounts, self.free, self.given = klass.resources, klass.amounts, state.free, state.class_request
        self.ending: Ints = _NO_ROWS
        """Rows in which those that are on their way out count no more."""
        self.reach: Bools | None = None
        """[node] whether the workloads that it must be with are still there were all victims of the node gone; None: it needs none."""
        self._sums: dict[int, Ints] = {}
        if not self.plain:
            self._combine(priority)
        if klass.affinity is not None:
            self.reach = _with_peers_after(state, klass, self._on_nodes(changes_of(state).rows.get(klass.affinity[0], {}), priority))

    def held(self, priority: int) -> Ints:
        """[1 + row, node] what the workloads of one priority hold; the first row is of no account here."""
        held = self.state.levels[priority]
        if self.plain:
            return held
        more = self._sums.get(priority)
        return np.concatenate((held[:1], held[self.klass.resources + 1], *([held[:1]] if self.klass.shape.gpu is not None else []), np.zeros((len(self.others), self.state.size), np.int64) if more is None else more))

    def most(self, priority: int) -> Ints:
        """[row, node] no workload of one priority gives back more; at least 1. May be written where plain: what was seen."""
        if self.plain:
            return self.state.loose(priority)
        count = len(self.klass.resources)
        rest = np.maximum(self.given[count:].max(1, initial=1), 1)
        return np.concatenate((self.state.largest[priority][self.klass.resources], np.broadcast_to(rest[:, None], (len(rest), self.state.size))))

    def holdings(self, slots: Any, there: Bools) -> Ints:
        """[row, *slots.shape] what these slots give back."""
        kinds = np.where(there, self.state.w_class[slots], 0)
        held = np.where(there, self.given[self.rows][:, kinds], 0)
        if self.ending.size:
            leaving = there & self.state.w_ending[slots]
            if leaving.any():
                held[self.ending] = np.where(leaving, 0, held[self.ending])
        return held

    @property
    def compilable(self) -> bool:
        """Whether rows and devices say it all, and the class of a workload all that it gives back of the rows."""
        return not self.ending.size and all(part.gpus for part in self.parts)

    def devices(self) -> tuple[int, int, int, IntArray, Ints, Bools, IntArray, Ints]:
        """What the compiled search asks of devices: how many (0: none), milli and memory of each; free milli and memory, [node, device] whether it may serve; what slots and classes hold."""
        state, gpu = self.state, self.klass.shape.gpu
        if gpu is None:
            return 0, 0, 0, _NO_MILLI, _NO_DEVICES, _NO_SERVING, state.w_gpus, _NO_DEVICES
        facts = state.facts(self.klass)
        serves = np.zeros(state.gpu_free.shape, np.bool_)
        serves[facts.gpu_nodes] = facts.devices
        return gpu.count, gpu.milli, gpu.memory, state.gpu_free, state.gpu_mem, serves, state.w_gpus, changes_of(state).gpus

    def _combine(self, priority: int | None) -> None:
        """One set of rows: resources, GPU in all, the others."""
        state, klass, gpu = self.state, self.klass, self.klass.shape.gpu
        table = np.zeros((len(self.others), len(state.class_live)), np.int64)
        for at, (_, each, _) in enumerate(self.others):
            table[at, list(each.keys())] = list(each.values())
        free, given, amounts = [state.free[klass.resources]], [state.class_request[klass.resources]], [klass.amounts[:, 0]]
        if gpu is not None:
            facts, all_free = state.facts(klass), np.zeros((1, state.size), np.int64)
            all_free[0, facts.gpu_nodes] = np.where(facts.devices, np.maximum(state.gpu_free[facts.gpu_nodes], 0), 0).sum(1)
            free.append(all_free)
            given.append(changes_of(state).gpus[2:])
            amounts.append(np.array([gpu.milli * gpu.count], np.int64))
        base = sum(map(len, free))
        self.free, self.given = np.concatenate((*free, *(item[0][None] for item in self.others))), np.concatenate((*given, table))
        self.amounts = np.concatenate((*amounts, np.zeros(len(self.others), np.int64)))[:, None]
        self.rows = np.arange(len(self.free))
        if not self.others:
            return
        ends: Bools = np.array([item[2] for item in self.others])
        if kernels.active is not None:
            levels = np.array([level for level in state.levels if priority is None or level < priority], np.int64)
            sums = np.zeros((len(levels), len(table), state.size), np.int64)
            leaving_too = kernels.active.add_victims(state.w_class, state.w_node, state.w_priority, state.w_fixed, state.w_ending, state.slots, table, ends, levels, sums)
            self._sums = dict(zip(levels.tolist(), sums, strict=True))
            if leaving_too:
                self.ending = base + np.flatnonzero(ends)
            return
        slots = self._victims(np.logical_or.reduce(table), priority)
        amounts_of = table[:, state.w_class[slots]]
        leaving = state.w_ending[slots]
        if leaving.any():
            self.ending = base + np.flatnonzero(ends)
            amounts_of[self.ending[:, None] - base, np.flatnonzero(leaving)] = 0
        levels = state.w_priority[slots]
        for level in np.unique(levels).tolist():
            mine = levels == level
            self._sums[level] = np.zeros((len(self.others), state.size), np.int64)
            for at in range(len(self.others)):
                np.add.at(self._sums[level][at], state.w_node[slots[mine]], amounts_of[at, mine])

    def _victims(self, kinds: Bools, priority: int | None) -> Ints:
        """Slots of some classes whose workloads may have to go. One pass over the classes of all slots."""
        state = self.state
        slots = np.flatnonzero(kinds[state.w_class[: state.slots]])
        slots = slots[(state.w_node[slots] >= 0) & ~state.w_fixed[slots]]
        return slots if priority is None else slots[state.w_priority[slots] < priority]

    def _on_nodes(self, each: dict[int, int], priority: int | None) -> Ints:
        """[node] what the victims of a node give back of one counter row."""
        kinds = np.zeros(len(self.state.class_live), np.int64)
        kinds[list(each.keys())] = list(each.values())
        found = np.zeros(self.state.size, np.int64)
        if kernels.active is not None:
            state = self.state
            levels = np.array([level for level in state.levels if priority is None or level < priority], np.int64)
            sums = np.zeros((len(levels), 1, state.size), np.int64)
            kernels.active.add_victims(state.w_class, state.w_node, state.w_priority, state.w_fixed, state.w_ending, state.slots, kinds[None], _NEVER, levels, sums)
            np.sum(sums, (0, 1), out=found)
            return found
        slots = self._victims(kinds != 0, priority)
        np.add.at(found, self.state.w_node[slots], kinds[self.state.w_class[slots]])
        return found


def _parts(shape: Shape) -> list[Parts]:
    gpu = shape.gpu
    if gpu is None and not shape.numa_single:
        return []
    found, request = [], shape.request_map
    asked = [((gpu.milli, gpu.memory), gpu.count, True)] if gpu is not None else []
    asked += [((request.get(CPU, 0), request.get(MEMORY, 0)), 1, False)] if shape.numa_single else []
    for amounts, count, gpus in asked:
        units = tuple(unit for unit, amount in enumerate(amounts) if amount)
        if units:
            found.append(Parts(np.array([amounts[unit] for unit in units], np.int64), units, count, gpus))
    return found


def _others(state: State, klass: Klass) -> Iterable[tuple[Ints, dict[int, int], bool]]:
    """The rows beside resources."""
    if not (klass.anti or klass.excluded_by or klass.shape.spread or klass.shape.links):
        return
    apart = [(row, key) for row, key in dict.fromkeys((*klass.anti, *klass.excluded_by)) if state.counts[row].any()]
    hard = [at for at, item in enumerate(klass.shape.spread) if item.hard]
    if not apart and not hard and not klass.shape.links:
        return
    changes = changes_of(state)
    for row, key in apart:
        yield -in_domain(state, key, state.counts[row]), changes.rows.get(row, {}), False
    if hard:
        eligible: Bools = state.facts(klass).affine & (state.status != GONE)
        for at in hard:
            eligible = eligible & (state.attributes.domains(klass.shape.spread[at].topology_key)[0] >= 0)
        for at in hard:
            yield _evenness(state, klass, at, eligible), changes.rows.get(klass.spread_rows[at], {}), True
    for link in klass.shape.links:
        given = {number: sum(item.min_kbps for item in links if item.site == link.site) for number, links in changes.linked.items()} if link.min_kbps else {}
        yield _way(state, link), {number: kbps for number, kbps in given.items() if kbps}, False


def _evenness(state: State, klass: Klass, at: int, eligible: Bools) -> Ints:
    """[node] how many more its domain may hold under one spread constraint, this workload counted; below 0: how many must go.

    Who goes from a domain lowers its count, and the least count only where the domain itself becomes the least: then it is even enough anyhow. So the other domains decide.
    """
    item, own = klass.shape.spread[at], klass.spread_self[at]
    domain, size = state.attributes.domains(item.topology_key)
    if kernels.active is not None:
        compiled: Ints = kernels.active.evenness(eligible, domain, size, state.counts[klass.spread_rows[at]], item.max_skew - own, item.min_domains, UNBOUNDED)
        return compiled
    nodes = np.flatnonzero(eligible)
    free = np.full(state.size, UNBOUNDED, np.int64)
    if not nodes.size:
        return free
    sums = np.zeros(size, np.int64)
    np.add.at(sums, domain[nodes], state.counts[klass.spread_rows[at]][nodes])
    there = np.unique(domain[nodes])
    if len(there) < item.min_domains:
        least = np.zeros(size, np.int64)
    elif len(there) == 1:
        return free
    else:
        first, second = np.partition(sums[there], 1)[:2]
        least = np.where(sums == first, second, first)
    free[nodes] = (item.max_skew - own + least - sums)[domain[nodes]]
    return free


def _way(state: State, link: Link) -> Ints:
    """[node] kbit/s that are free beyond what the link asks for."""
    sites, to = state.sites, state.sites.ids.get(link.site)
    if to is None:
        return np.full(state.size, -UNBOUNDED, np.int64)
    free = sites.kbps[:, to] - sites.used_kbps[:, to] - link.min_kbps if link.min_kbps else np.full(len(sites.ids), UNBOUNDED, np.int64)
    if link.max_rtt_us:
        free = np.where(sites.rtt_us[:, to] <= link.max_rtt_us, free, -UNBOUNDED)
    free[to] = UNBOUNDED
    result: Ints = np.append(free, -UNBOUNDED)[state.site_of]
    return result


def _with_peers_after(state: State, klass: Klass, gone: Ints) -> Bools:
    """[node] `feasible.with_peers` were `gone` of the node's own workloads that it must be with no longer there."""
    assert klass.affinity is not None
    row, keys, matches_itself = klass.affinity
    counts = state.counts[row]
    found, keyed = np.ones(state.size, np.bool_), np.ones(state.size, np.bool_)
    known = np.zeros(state.size, np.bool_)
    for key in keys:
        has = state.attributes.domains(key)[0] >= 0
        keyed &= has
        known |= has
        found &= np.where(has, in_domain(state, key, counts) - gone, 0) > 0
    if not matches_itself:
        return found & keyed
    holds, left = known & (counts > 0), known & (counts - gone > 0)
    elsewhere = np.count_nonzero(holds) - holds + left > 0
    return np.where(elsewhere, found & keyed, keyed)
