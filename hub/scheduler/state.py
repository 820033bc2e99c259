"""The state of the cluster, changed only by events: each is atomic, can be undone, and replayed gives the same bits.

One writer: whoever shares a state between threads serialises the calls. What-if works on `snapshot()`, which copies an array only when one of the two sides writes it.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np

from . import kernels
from .arrays import MAX_LOG, MAX_NODES, MAX_RESOURCES, SILENT, UNLIMITED_SLOTS, UP, Arrays, Event, Seat
from .attributes import Attributes
from .classes import Klass
from .model import SITE, Budget, Node, Quota, Workload
from .topology import Sites
from .units import GPU_WHOLE, MAX_QUANTITY, SLOTS, Invalid

_SLOT = ("slot_of", "items", "seats", "vacant", "w_node", "w_priority", "w_class", "w_start", "w_ending", "w_fixed", "w_gpus")
_BOOKS = ("free", "load", "class_live", "stamp")


class State(Arrays):
    """Nodes and what runs on them. `seed` orders nodes that score the same."""

    # trials, snapshots, replay

    def begin(self) -> int:
        """Start a trial; pass what it gives to `undo` or `keep`. Trials nest."""
        self._trials += 1
        return len(self._undo)

    def undo(self, mark: int) -> None:
        """Take back every event since `begin`, newest first."""
        while len(self._undo) > mark:
            self._apply(self._undo.pop())
            self.log.pop()
            self.changes += 1
        self._trials -= 1

    def keep(self, mark: int) -> None:
        """Let what happened since `begin` stand."""
        self._trials -= 1
        if not self._trials:
            self._undo.clear()

    def snapshot(self) -> "State":
        """A state of its own for what-if; O(classes), arrays are copied when either side writes them. Its log starts empty."""
        other = copy(self)
        names = {name for name, value in vars(self).items() if isinstance(value, np.ndarray | dict | list | Attributes | Sites)} - {"log", "_undo", "counts", "caches"}
        self._shared, other._shared = set(names), set(names)
        self._shared_counts, other._shared_counts = set(range(len(self.counts))), set(range(len(self.counts)))
        self._shared_levels, other._shared_levels = set(self.levels), set(self.levels)
        other.counts = list(self.counts)
        other.log, other._undo, other._trials = [], [], 0
        other.caches = {}
        return other

    def replay(self, events: Iterable[Event]) -> "State":
        """Apply a log to this (normally fresh) state."""
        for event in events:
            self._do(event)
        return self

    # events

    def add_nodes(self, nodes: Sequence[Node], now_ms: int = 0) -> None:
        """New nodes, or new descriptions of known ones (what runs there stays). Raises `Invalid`."""
        names = {node.name for node in nodes}
        if len(names) != len(nodes):
            raise Invalid("nodes", "one name comes twice", "give each node once")
        if len(self.node_index.keys() | names) > MAX_NODES:
            raise Invalid("nodes", f"more than {MAX_NODES}", "split the cluster")
        extended = {name for node in nodes for name, _ in node.capacity} | self.resource_rows.keys()
        if len(extended) > MAX_RESOURCES:
            raise Invalid("node.capacity", f"{len(extended)} different resources in the cluster", f"use at most {MAX_RESOURCES}")
        self.attributes.refuse(nodes)
        for node in nodes:
            known = self.node_index.get(node.name)
            if known is not None and (self.nodes[known].gpus != node.gpus or self.nodes[known].numa != node.numa) and self.load[known]:
                raise Invalid("node.gpus", f"{node.name} changes its devices while {int(self.load[known])} workloads hold them", "drain the node first")
        self._do(("nodes", tuple(nodes), now_ms))

    def set_status(self, node: str, status: int) -> None:
        """`UP`, `SILENT` or `GONE`; what is there stays in the books until it is released or moved."""
        self._do(("status", node, status))

    def set_cordon(self, node: str, cordoned: bool) -> None:
        """Whether the node takes nothing new."""
        self._do(("cordon", node, cordoned))

    def beat(self, node: str, now_ms: int) -> None:
        """The node was heard from."""
        self._do(("beat", node, now_ms))

    def place(self, workload: Workload, seat: Seat, now_ms: int) -> None:
        """Put a workload on its seat. Raises `Invalid` where it is placed already or the seat has no room; changes nothing then."""
        if workload.id in self.slot_of:
            raise Invalid("workload.id", f"{workload.id} is placed already", "release it first")
        self._room_for_level(workload)
        klass = self.klass(workload.shape)
        short = self.free[klass.resources, seat.node] < klass.amounts[:, 0]
        if short.any():
            raise Invalid("workload.requests", f"{self.nodes[seat.node].name} has no room for {workload.id}", "decide again")
        gpu = workload.shape.gpu
        if gpu is not None:
            if len(set(seat.gpus)) != gpu.count:
                raise Invalid("seat.gpus", f"{len(seat.gpus)} devices for a request of {gpu.count}", "decide again")
            for device in seat.gpus:
                if self.gpu_free[seat.node, device] < gpu.milli or self.gpu_mem[seat.node, device] < gpu.memory:
                    raise Invalid("seat.gpus", f"device {device} of {self.nodes[seat.node].name} has no room for {workload.id}", "decide again")
        for zone, cpu, memory in seat.numa:
            if self.numa_free[seat.node, zone, 0] < cpu or self.numa_free[seat.node, zone, 1] < memory:
                raise Invalid("seat.numa", f"zone {zone} of {self.nodes[seat.node].name} has no room for {workload.id}", "decide again")
        self._do(("place", workload, seat, now_ms))

    def adopt(self, workload: Workload, seat: Seat, now_ms: int) -> None:
        """Book what a node reports as running: a fact, also where it is more than the node has."""
        if workload.id in self.slot_of:
            raise Invalid("workload.id", f"{workload.id} is placed already", "release it first")
        self._room_for_level(workload)
        self._do(("place", workload, seat, now_ms))

    def release(self, workload: str) -> bool:
        """Give back what a workload holds; False where it holds nothing."""
        if workload not in self.slot_of:
            return False
        self._do(("release", workload))
        return True

    def move(self, workload: str, seat: Seat, now_ms: int) -> None:
        """Release here and place there, or nothing. Raises `Invalid`."""
        item = self.workload(workload)
        if item is None:
            raise Invalid("workload.id", f"{workload} is not placed", "place it")
        mark = self.begin()
        self.release(workload)
        try:
            self.place(item, seat, now_ms)
        except Invalid:
            self.undo(mark)
            raise
        self.keep(mark)

    def set_ending(self, workload: str) -> None:
        """The workload is on its way out: it holds its place, and counts no more for spread."""
        slot = self.slot_of.get(workload)
        if slot is not None and not self.w_ending[slot]:
            self._do(("ending", workload, True))

    def set_budget(self, budget: Budget) -> None:
        """Know a disruption budget, by its name."""
        self._do(("budget", budget.name, budget))

    def set_quota(self, quota: Quota) -> None:
        """Know what a tenant may use."""
        self._do(("quota", quota.tenant, quota))

    def set_link(self, a: str, b: str, rtt_us: int, kbps: int = MAX_QUANTITY) -> None:
        """What was measured between two sites."""
        self._do(("link", a, b, rtt_us, kbps))

    # how events change the arrays

    def _do(self, event: Event) -> None:
        inverse = self._apply(event)
        self.log.append(event)
        self.changes += 1
        if self._trials:
            self._undo.append(inverse)
        elif len(self.log) >= MAX_LOG:
            del self.log[: MAX_LOG // 2]
            self.log_base += MAX_LOG // 2

    def _apply(self, event: Event) -> Event:
        inverse: Event = getattr(self, f"_{event[0]}")(*event[1:])
        return inverse

    def _index(self, node: str) -> int:
        index = self.node_index.get(node)
        if index is None:
            raise Invalid("node", f"{node[:40]!r} is unknown", "add it first")
        return index

    def _status(self, node: str, status: int) -> Event:
        index = self._index(node)
        before = int(self.status[index])
        self._own("status")[index] = status
        return ("status", node, before)

    def _cordon(self, node: str, cordoned: bool) -> Event:
        index = self._index(node)
        before = bool(self.cordon[index])
        self._own("cordon")[index] = cordoned
        return ("cordon", node, before)

    def _beat(self, node: str, now_ms: int) -> Event:
        index = self._index(node)
        before = int(self.beat_ms[index]), int(self.status[index])
        self._own("beat_ms")[index] = now_ms
        if self.status[index] == SILENT:
            self._own("status")[index] = UP
        return ("unbeat", node, *before)

    def _unbeat(self, node: str, beat_ms: int, status: int) -> Event:
        index = self._index(node)
        self._own("beat_ms")[index] = beat_ms
        self._own("status")[index] = status
        return ()

    def _budget(self, name: str, budget: Budget | None) -> Event:
        before = self.budgets.get(name)
        budgets = self._own("budgets")
        if budget is None:
            budgets.pop(name, None)
        else:
            budgets[name] = budget
        return ("budget", name, before)

    def _quota(self, tenant: str, quota: Quota | None) -> Event:
        before = self.quotas.get(tenant)
        quotas = self._own("quotas")
        if quota is None:
            quotas.pop(tenant, None)
        else:
            quotas[tenant] = quota
        return ("quota", tenant, before)

    def _link(self, a: str, b: str, rtt_us: int, kbps: int) -> Event:
        before = self.sites
        self.sites = before.copy()
        self.sites.set_link(a, b, rtt_us, kbps)
        return ("restore", {"sites": before})

    def _restore(self, fields: dict[str, Any]) -> Event:
        version = self.attributes.version
        for name, value in fields.items():
            setattr(self, name, value)
            self._shared.add(name)
            if name == "attributes":
                self.attributes.version = version + 1
        if "counts" in fields:
            self.classes_made += 1
            self._shared.discard("counts")
            self._shared_counts, self._shared_levels = set(range(len(self.counts))), set(self.levels)
        self.stamps += 1
        self.stamp = np.full(self.size, self.stamps)
        return ()

    def _place(self, workload: Workload, seat: Seat, now_ms: int) -> Event:
        klass = self.klass(workload.shape)
        fresh = not self.vacant
        if fresh and self.slots == len(self.items):
            self._more_slots()
        slot: int = self.slots if fresh else self._own("vacant").pop()
        self.slots += fresh
        self._sit(klass, workload, seat, slot, now_ms)
        return ("retract", workload.id, fresh)

    def _retract(self, workload: str, fresh: bool) -> Event:
        self._release(workload)
        if fresh:
            self.vacant.pop()
            self.slots -= 1
        return ()

    def _back(self, workload: Workload, seat: Seat, slot: int, start_ms: int, ending: bool) -> Event:
        taken = self._own("vacant").pop()
        assert taken == slot, "the free list is a stack: undoing in order finds the slot on top"
        self._sit(self.klass(workload.shape), workload, seat, slot, start_ms)
        if ending:
            self._ending(workload.id, True)
        return ()

    def _sit(self, klass: Klass, workload: Workload, seat: Seat, slot: int, now_ms: int) -> None:
        self._hold(klass, workload, seat, 1)
        self._own_all(_SLOT)
        self.slot_of[workload.id] = slot
        self.items[slot] = workload
        self.seats[slot] = seat
        self.w_node[slot] = seat.node
        self.w_priority[slot] = workload.priority
        self.w_class[slot] = klass.id
        self.w_start[slot] = now_ms
        self.w_ending[slot] = False
        self.w_fixed[slot] = not workload.preemptible
        self.w_gpus[slot] = sum(1 << device for device in seat.gpus)
        if workload.preemptible:
            self._enlist(klass, slot, seat.node, workload.priority, now_ms)

    def _release(self, workload: str) -> Event:
        slot = self.slot_of[workload]
        item, seat, start, ending = self.items[slot], self.seats[slot], int(self.w_start[slot]), bool(self.w_ending[slot])
        assert item is not None and seat is not None
        if ending:
            self._ending(workload, False)
        klass = self.classes[self.w_class[slot]]
        assert klass is not None, "a class of which something runs is not swept"
        self._hold(klass, item, seat, -1)
        if item.preemptible:
            self._delist(slot, seat.node, item.priority)
        self._own_all(_SLOT)
        del self.slot_of[workload]
        self.items[slot] = None
        self.seats[slot] = None
        self.w_node[slot] = -1
        self.vacant.append(slot)
        return ("back", item, seat, slot, start, ending)

    def _ending(self, workload: str, ending: bool) -> Event:
        slot = self.slot_of[workload]
        item, seat = self.items[slot], self.seats[slot]
        assert item is not None and seat is not None
        self._own("w_ending")[slot] = ending
        for row, change in self.klass(item.shape).spread_bumps:
            self._count(row)[seat.node] += -change if ending else change
        return ("ending", workload, not ending)

    def _hold(self, klass: Klass, workload: Workload, seat: Seat, sign: int) -> None:
        """Take (1) or give back (-1) everything that a workload of the class holds on a seat."""
        node, shape = seat.node, klass.shape
        milli = 0 if shape.gpu is None else shape.gpu.milli * shape.gpu.count
        self._own_all(_BOOKS)
        free, load, live = self.free, self.load, self.class_live
        level = self._level(workload.priority) if workload.preemptible else None
        if kernels.active is not None:
            kernels.active.hold(free, load, live, free if level is None else level, level is not None, klass.resources, klass.amounts, node, klass.id, sign, milli)
        else:
            amounts = klass.amounts[:, 0] if sign > 0 else -klass.amounts[:, 0]
            free[klass.resources, node] -= amounts
            load[node] += sign
            live[klass.id] += sign
            if level is not None:
                level[klass.resources + 1, node] += amounts
                level[0, node] += sign * milli
        if shape.gpu is not None:
            devices = list(seat.gpus)
            self._own("gpu_free")[node, devices] -= sign * shape.gpu.milli
            if shape.gpu.memory:
                self._own("gpu_mem")[node, devices] -= sign * shape.gpu.memory
        if seat.numa:
            numa = self._own("numa_free")
            for zone, cpu, memory in seat.numa:
                numa[node, zone, 0] -= sign * cpu
                numa[node, zone, 1] -= sign * memory
        for row, change in klass.bumps:
            self._count(row)[node] += sign * change
        if shape.links and any(link.min_kbps for link in shape.links):
            self._own("sites").use(int(self.site_of[node]), shape.links, sign)
        if workload.tenant:
            used = self.used_by.get(workload.tenant)
            used = np.zeros(MAX_RESOURCES + 1, np.int64) if used is None else used.copy()
            used[klass.resources] += sign * klass.amounts[:, 0]
            used[MAX_RESOURCES] += sign * milli
            self._own("used_by")[workload.tenant] = used
        self.stamps += 1
        self.stamp[node] = self.stamps

    # nodes

    def _nodes(self, nodes: tuple[Node, ...], now_ms: int) -> Event:
        kept = ("attributes", "sites", "resource_rows", "nodes", "node_index", "cap", "free", "gpu_free", "gpu_mem", "gpu_model", "numa_free", "status", "cordon", "beat_ms",
                "price", "power", "tie", "site_of", "load", "class_live", "class_request", "classes", "class_of", "rows", "rows_by_label", "rows_anywhere", "classes_by_label", "counts",
                "levels", "first", "last", "largest")
        before: dict[str, Any] = {name: getattr(self, name) for name in kept}
        for name in kept:
            setattr(self, name, before[name].copy() if name != "counts" else list(before["counts"]))
        self._shared -= set(kept)
        self._shared_counts = set(range(len(self.counts)))
        for name in sorted({name for node in nodes for name, _ in node.capacity} - self.resource_rows.keys()):
            self.resource_rows[name] = len(self.resource_rows)
        fresh = [node for node in nodes if node.name not in self.node_index]
        self._widen(len(fresh), max((len(node.gpus) for node in nodes), default=0), max((len(node.numa) for node in nodes), default=0))
        for node in fresh:
            self.node_index[node.name] = len(self.nodes)
            self.nodes.append(node)
        for node in nodes:
            self._describe(self.node_index[node.name], node, now_ms)
        self.classes = [None if item is None else replace(item, request=self.class_request[:, item.id].copy()) for item in self.classes]
        self.stamps += 1
        self.stamp = np.full(self.size, self.stamps)
        return ("restore", before)

    def _widen(self, more: int, devices: int, zones: int) -> None:
        rows = len(self.resource_rows) - len(self.cap)
        for name in ("cap", "free"):
            setattr(self, name, np.pad(getattr(self, name), ((0, rows), (0, more))))
        self.class_request = np.pad(self.class_request, ((0, rows), (0, 0)))
        wider = max(0, devices - self.gpu_free.shape[1])
        for name, empty in (("gpu_free", -1), ("gpu_mem", -1), ("gpu_model", -1)):
            setattr(self, name, np.pad(getattr(self, name), ((0, more), (0, wider)), constant_values=empty))
        self.numa_free = np.pad(self.numa_free, ((0, more), (0, max(0, zones - self.numa_free.shape[1])), (0, 0)), constant_values=-1)
        for name in ("status", "cordon", "beat_ms", "price", "tie", "load"):
            setattr(self, name, np.pad(getattr(self, name), (0, more)))
        self.site_of = np.pad(self.site_of, (0, more), constant_values=-1)
        self.power = np.pad(self.power, ((0, 0), (0, more)))
        self.counts = [np.pad(row, (0, more)) for row in self.counts] if more else self.counts
        self.levels = {priority: np.pad(held, ((0, rows), (0, more))) for priority, held in self.levels.items()}
        self.last = {priority: np.pad(last, (0, more), constant_values=-1) for priority, last in self.last.items()}
        self.largest = {priority: np.pad(most, ((0, rows), (0, more)), constant_values=1) for priority, most in self.largest.items()}
        self.first = np.pad(self.first, (0, more), constant_values=-1)
        self._shared_levels = set()
        if more:
            self._shared_counts = set()
            self.attributes.grow(more)

    def _describe(self, index: int, node: Node, now_ms: int) -> None:
        new = not self.cap[:, index].any() and not self.load[index]
        old = self.nodes[index]
        self.nodes[index] = node
        used = self.cap[:, index] - self.free[:, index]
        capacity = {SLOTS: UNLIMITED_SLOTS, **dict(node.capacity)}
        self.cap[:, index] = [capacity.get(name, 0) for name in self.resource_rows]
        self.free[:, index] = self.cap[:, index] - used
        self.attributes.set(index, node)
        if new or old.gpus != node.gpus:
            self.gpu_free[index], self.gpu_mem[index], self.gpu_model[index] = -1, -1, -1
            for device, gpu in enumerate(node.gpus):
                self.gpu_free[index, device], self.gpu_mem[index, device], self.gpu_model[index, device] = GPU_WHOLE, gpu.memory, self.attributes.models[gpu.model]
        if new or old.numa != node.numa:
            self.numa_free[index] = -1
            for zone, numa in enumerate(node.numa):
                self.numa_free[index, zone] = numa.cpu, numa.memory
        self.cordon[index], self.status[index], self.beat_ms[index] = node.unschedulable, UP, now_ms
        self.price[index] = node.price
        self.power[:, index] = node.idle_mw, node.busy_mw
        self.tie[index] = int.from_bytes(blake2b(f"{self.seed}/{node.name}".encode(), digest_size=8).digest(), "little")
        site = dict(node.labels).get(SITE)
        if site is not None:
            self.sites.learn_place(site, node)
            self.site_of[index] = self.sites.ids[site]
