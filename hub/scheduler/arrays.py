"""The columns of the cluster: struct of arrays with exact integers, equivalence classes and counter rows; what reads them and makes room in them.

Nothing here changes what is placed where: that is `state.py`. An array that a snapshot shares is copied before it is written (`_own`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from . import classes, kernels
from .attributes import Attributes
from .classes import Facts, Klass, RowKey
from .model import Budget, Node, Quota, Shape, Workload
from .reasons import Ints
from .topology import Sites
from .units import BASE_RESOURCES, Invalid

MAX_NODES = 65_536
"""Nodes of one state, those gone included until their names come back; sums of capacities then fit int64."""

MAX_WORKLOADS = 1_000_000
"""Placed at one time."""

MAX_CLASSES = 8_192
"""Different shapes known at one time; those without a workload are swept when it is full."""

MAX_RESOURCES = 32
"""Different resources: rows of the capacity arrays."""

MAX_LEVELS = 64
"""Different priorities among what runs at one time; each is an array of the cluster's size. kube names two, clusters add a dozen."""

MAX_LOG = 1 << 20
"""Events kept for replay; the oldest half goes when it is full, and `log_base` says how many went."""

UNLIMITED_SLOTS = 1 << 31
"""Of a node that does not say how many workloads it holds."""

UP, SILENT, GONE = 0, 1, 2
"""Status of a node: heard from; not heard from in time; taken out of the cluster."""

_CHAIN = ("first", "w_next", "w_prev")

Gpus = tuple[int, ...]
IntArray = npt.NDArray[np.int32]
Event = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a workload is: node index, GPU devices, and (zone, cpu, memory) shares of its NUMA zones."""

    node: int
    gpus: Gpus = ()
    numa: tuple[tuple[int, int, int], ...] = ()


class Arrays:
    """The columns and what can be read from them. `seed` orders nodes that score the same; `namespaces` are the labels of each."""

    def __init__(self, seed: int = 0, namespaces: Mapping[str, Mapping[str, str]] | None = None) -> None:
        self.seed = seed
        self.namespaces = {name: dict(labels) for name, labels in (namespaces or {}).items()}
        self.resource_rows = {name: row for row, name in enumerate(BASE_RESOURCES)}
        self.nodes: list[Node] = []
        self.node_index: dict[str, int] = {}
        self.attributes = Attributes()
        self.sites = Sites()
        self.cap = np.zeros((len(BASE_RESOURCES), 0), np.int64)
        self.free = np.zeros((len(BASE_RESOURCES), 0), np.int64)
        self.gpu_free = np.zeros((0, 0), np.int32)
        """[node, device]: free milli-GPU; -1 where there is no device."""
        self.gpu_mem = np.zeros((0, 0), np.int64)
        self.gpu_model = np.zeros((0, 0), np.int16)
        self.numa_free = np.zeros((0, 0, 2), np.int64)
        """[node, zone, (cpu, memory)]."""
        self.status = np.zeros(0, np.int8)
        self.cordon = np.zeros(0, np.bool_)
        self.beat_ms = np.zeros(0, np.int64)
        self.price = np.zeros(0, np.int64)
        self.power = np.zeros((2, 0), np.int64)
        self.tie = np.zeros(0, np.uint64)
        self.site_of = np.zeros(0, np.int64)
        self.load = np.zeros(0, np.int64)
        """Workloads on each node."""
        self.classes: list[Klass | None] = []
        self.classes_made = 0
        """Grows whenever a class number may have got another meaning, for those who keep something per class."""
        self._recent: tuple[Shape | None, int, int] = (None, 0, 0)
        """The shape that was asked for last, `classes_made` then, its class: a decision asks several times, and equal shapes take long to compare."""
        self.class_of: dict[Shape, int] = {}
        self.rows: dict[RowKey, int] = {}
        self.rows_by_label: dict[tuple[str, str], tuple[RowKey, ...]] = {}
        self.rows_anywhere: list[RowKey] = []
        """Rows by a label that a shape must have to be selected, and those that may select any: a new shape looks at few of all rows."""
        self.classes_by_label: dict[tuple[str, str], tuple[int, ...]] = {}
        self.counts: list[Ints] = []
        self._shared_counts: set[int] = set()
        self.slot_of: dict[str, int] = {}
        self.items: list[Workload | None] = []
        self.seats: list[Seat | None] = []
        self.vacant: list[int] = []
        self.slots = 0
        """Slots ever used; `vacant` are those among them that are free again, the last one first."""
        self.w_node = np.full(0, -1, np.int32)
        self.w_priority = np.zeros(0, np.int64)
        self.w_class = np.zeros(0, np.int32)
        self.w_start = np.zeros(0, np.int64)
        self.w_ending = np.zeros(0, np.bool_)
        self.w_fixed = np.zeros(0, np.bool_)
        """Not preemptible."""
        self.w_gpus = np.zeros(0, np.int32)
        """The devices of a slot, a bit each."""
        self.w_next = np.full(1, -1, np.int32)
        self.w_prev = np.full(1, -1, np.int32)
        """The neighbours of a slot in its node's order of importance, -1 where there is none; the one entry past the slots stays -1, so that -1 leads to itself."""
        self.first = np.zeros(0, np.int32)
        """[node]: the most important slot that may be preempted, -1 where there is none. More important: higher priority, then longer running, then the lower slot."""
        self.class_live = np.zeros(0, np.int64)
        self.class_request = np.zeros((len(BASE_RESOURCES), 0), np.int64)
        self.used_by: dict[str, Ints] = {}
        """Tenant to [resource] in use; row `len(resource_rows)` is milli-GPU."""
        self.levels: dict[int, Ints] = {}
        """Priority to [1 + resource, node] held by what may be preempted; row 0 is milli-GPU."""
        self.last: dict[int, IntArray] = {}
        """Priority to [node] the last slot of that priority in the node's order, -1 where there is none; has the keys of `levels`."""
        self.largest: dict[int, Ints] = {}
        """Priority to [resource, node]: no request in the node's order is larger. At least 1; what left may still be in it until a search looks (`loose`)."""
        self._shared_levels: set[int] = set()
        self.budgets: dict[str, Budget] = {}
        self.quotas: dict[str, Quota] = {}
        self.changes = 0
        """Grows with every event and every one taken back: equal means nothing happened in between."""
        self.log: list[Event] = []
        self.log_base = 0
        self._undo: list[Event] = []
        self._trials = 0
        self._shared: set[str] = set()
        self.stamp = np.zeros(0, np.int64)
        """[node]: what `stamps` was when the node's free capacity last changed, for those who keep something per node."""
        self.stamps = 0
        self.caches: dict[Any, Any] = {}
        """What policies keep about this state; never part of it."""

    # reading

    @property
    def size(self) -> int:
        """Columns of the arrays: nodes, gone ones included."""
        return len(self.nodes)

    def seat(self, workload: str) -> Seat | None:
        """Where a workload is."""
        slot = self.slot_of.get(workload)
        return None if slot is None else self.seats[slot]

    def workload(self, workload: str) -> Workload | None:
        """The workload of that id where it is placed."""
        slot = self.slot_of.get(workload)
        return None if slot is None else self.items[slot]

    def on_node(self, node: int) -> list[Workload]:
        """What is on a node, oldest slot first. O(workloads) in one pass."""
        return [item for slot in np.flatnonzero(self.w_node == node) if (item := self.items[slot]) is not None]

    def klass(self, shape: Shape) -> Klass:
        """The class of a shape, made where it is new, with facts that are up to date. Raises `Invalid` for a resource that no node ever had."""
        if self._recent[0] is shape and self._recent[1] == self.classes_made:
            found = self.classes[self._recent[2]]
        else:
            number = self.class_of.get(shape)
            found = self.classes[number] if number is not None else self._new_class(shape)
        assert found is not None
        self._recent = shape, self.classes_made, found.id
        if found.facts is None or found.facts.version != self.attributes.version:
            found = replace(found, facts=classes.facts(self.attributes, found, self.cap, self.gpu_model, self.price, self.power))
            self._own("classes")[found.id] = found
        return found

    def facts(self, klass: Klass) -> Facts:
        """The facts of a class that came from `klass()`."""
        assert klass.facts is not None
        return klass.facts

    # columns that are written

    def _own(self, name: str) -> Any:
        if name in self._shared:
            self._shared.discard(name)
            setattr(self, name, getattr(self, name).copy())
        return getattr(self, name)

    def _own_all(self, names: tuple[str, ...]) -> None:
        if self._shared:
            for name in names:
                self._own(name)

    def _count(self, row: int) -> Ints:
        if row in self._shared_counts:
            self._shared_counts.discard(row)
            self.counts[row] = self.counts[row].copy()
        return self.counts[row]

    def _level(self, priority: int) -> Ints:
        if priority not in self.levels:
            if len(self.levels) >= MAX_LEVELS:
                for empty in [known for known, held in self.levels.items() if not held.any() and (self.last[known] < 0).all()]:
                    del self._own("levels")[empty], self._own("last")[empty], self._own("largest")[empty]
            self._own("levels")[priority] = np.zeros((len(self.cap) + 1, self.size), np.int64)
            self._own("last")[priority] = np.full(self.size, -1, np.int32)
            self._own("largest")[priority] = np.ones((len(self.cap), self.size), np.int64)
            self._shared_levels.discard(priority)
        elif priority in self._shared_levels:
            self._shared_levels.discard(priority)
            self._own("levels")[priority] = self.levels[priority].copy()
            self._own("last")[priority] = self.last[priority].copy()
            self._own("largest")[priority] = self.largest[priority].copy()
        return self.levels[priority]

    def _enlist(self, klass: Klass, slot: int, node: int, priority: int, start_ms: int) -> None:
        """Put a slot into its node's order of importance. O(priorities), and what of its own priority started later."""
        self._own_all(_CHAIN)
        most = self.largest[priority][:, node]
        if kernels.active is not None:
            kernels.active.enlist(self.first, self.w_next, self.w_prev, self.last[priority], most, klass.request, self.w_priority, self.w_start,
                                  slot, node, priority, start_ms)
            return
        np.maximum(most, klass.request, out=most)
        above = min((level for level, last in self.last.items() if level >= priority and last[node] >= 0), default=None)
        before = -1 if above is None else int(self.last[above][node])
        if above == priority:
            while before >= 0 and self.w_priority[before] == priority and (self.w_start[before], before) > (start_ms, slot):
                before = int(self.w_prev[before])
        onward, backward = self.w_next, self.w_prev
        after = int(self.first[node] if before < 0 else onward[before])
        backward[slot], onward[slot] = before, after
        if before < 0:
            self.first[node] = slot
        else:
            onward[before] = slot
        if after >= 0:
            backward[after] = slot
        if after < 0 or self.w_priority[after] != priority:
            self.last[priority][node] = slot

    def _delist(self, slot: int, node: int, priority: int) -> None:
        """Take a slot out of its node's order."""
        self._own_all(_CHAIN)
        if kernels.active is not None:
            kernels.active.delist(self.first, self.w_next, self.w_prev, self.last[priority], self.w_priority, slot, node, priority)
            return
        onward, backward = self.w_next, self.w_prev
        before, after = int(backward[slot]), int(onward[slot])
        if before < 0:
            self.first[node] = after
        else:
            onward[before] = after
        if after >= 0:
            backward[after] = before
        if self.last[priority][node] == slot:
            self.last[priority][node] = before if before >= 0 and self.w_priority[before] == priority else -1

    def loose(self, priority: int) -> Ints:
        """`largest` of a known priority, for a search that looked at chains to write what it saw. No part of the state depends on it."""
        self._level(priority)
        return self.largest[priority]

    def _room_for_level(self, workload: Workload) -> None:
        if workload.preemptible and workload.priority not in self.levels and len(self.levels) >= MAX_LEVELS and all((last >= 0).any() for last in self.last.values()):
            raise Invalid("workload.priority", f"{workload.priority} would be one of more than {MAX_LEVELS} priorities that are in use", "use fewer different priorities")

    def _more_slots(self) -> None:
        old = len(self.items)
        if old >= MAX_WORKLOADS:
            raise Invalid("workload", f"{MAX_WORKLOADS} are placed already", "split the cluster")
        new = min(MAX_WORKLOADS, max(1024, 2 * old))
        self._own("items").extend([None] * (new - old))
        self._own("seats").extend([None] * (new - old))
        for name in ("w_priority", "w_class", "w_start", "w_ending", "w_fixed", "w_gpus"):
            setattr(self, name, np.pad(getattr(self, name), (0, new - old)))
        for name in ("w_node", "w_next", "w_prev"):
            setattr(self, name, np.pad(getattr(self, name), (0, new - old), constant_values=-1))
        self._shared -= {"w_priority", "w_class", "w_start", "w_ending", "w_fixed", "w_gpus", "w_node", "w_next", "w_prev"}

    def digest(self) -> str:
        """Of everything that decisions depend on: equal digests, equal states. Caches, counter rows (the workloads give them) and the order of interning play no part."""
        hasher = blake2b(digest_size=16)
        for array in (self.cap, self.free, self.gpu_free, self.gpu_mem, self.numa_free, self.status, self.cordon, self.beat_ms, self.price, self.load, self.site_of, self.tie,
                      self.sites.rtt_us, self.sites.kbps, self.sites.used_kbps):
            hasher.update(repr(array.shape).encode())
            hasher.update(np.ascontiguousarray(array).tobytes())
        placed = [(item.id, self.seats[slot], slot, int(self.w_start[slot]), bool(self.w_ending[slot]), item) for slot, item in enumerate(self.items) if item is not None]
        used = sorted((tenant, amounts.tobytes()) for tenant, amounts in self.used_by.items() if amounts.any())
        hasher.update(repr((placed, used, self.nodes, sorted(self.budgets.items()), sorted(self.quotas.items()), self.vacant, self.slots)).encode())
        return hasher.hexdigest()

    # classes and rows

    def _new_class(self, shape: Shape) -> Klass:
        for name, amount in shape.requests:
            if amount and name not in self.resource_rows:
                raise Invalid(f"workload.requests.{name}", "no node offers this resource", f"ask for one of {', '.join(self.resource_rows)}"[:400])
        if len(self.class_of) >= MAX_CLASSES:
            self._sweep()
        number = next((i for i, item in enumerate(self.classes) if item is None), len(self.classes)) if len(self.class_of) < len(self.classes) else len(self.classes)
        if number == len(self.classes):
            self._own("classes").append(None)
            if number >= len(self.class_live):
                more = max(64, number)
                self.class_live = np.pad(self.class_live, (0, more))
                self.class_request = np.pad(self.class_request, ((0, 0), (0, more)))
                self._shared -= {"class_live", "class_request"}
        self.classes_made += 1
        klass = classes.new(number, shape, self.resource_rows)
        self._own("class_request")[:, number] = klass.request
        fresh = [key for key in classes.keys_of(shape) if key not in self.rows]
        for key in fresh:
            self._new_row(key)
        for at in sorted({at for key in fresh for at in self._selectable(key)}):
            item = self.classes[at]
            if item is not None:
                self._own("classes")[at] = classes.connect(item, self.rows, fresh, self.namespaces, anew=False)
        klass = classes.connect(klass, self.rows, self._rows_for(shape), self.namespaces, anew=True)
        self._own("classes")[number] = klass
        self._own("class_of")[shape] = number
        for label in shape.labels:
            self._own("classes_by_label")[label] = (*self.classes_by_label.get(label, ()), number)
        return klass

    def _selectable(self, key: RowKey) -> list[int]:
        """Classes that the row may select."""
        labels = classes.hook(key)
        return list(range(len(self.classes))) if labels is None else [number for label in labels for number in self.classes_by_label.get(label, ())]

    def _rows_for(self, shape: Shape) -> list[RowKey]:
        """Rows that may select the shape, and its own."""
        return list(dict.fromkeys([*classes.keys_of(shape), *self.rows_anywhere, *(key for label in shape.labels for key in self.rows_by_label.get(label, ()))]))

    def _file_row(self, key: RowKey) -> None:
        labels = classes.hook(key)
        if labels is None:
            self._own("rows_anywhere").append(key)
        for label in labels or ():
            self._own("rows_by_label")[label] = (*self.rows_by_label.get(label, ()), key)

    def _new_row(self, key: RowKey) -> None:
        live = self.w_node >= 0
        if key.what == "spread":
            live = live & ~self.w_ending
        changes = np.zeros(len(self.class_live), np.int64)
        for number in self._selectable(key):
            klass = self.classes[number]
            if klass is not None and self.class_live[number]:
                changes[number] = classes.delta(key, klass.shape, self.namespaces)
        count = np.zeros(self.size, np.int64)
        if changes.any():
            np.add.at(count, self.w_node[live], changes[self.w_class[live]])
        self._own("rows")[key] = len(self.counts)
        self.counts.append(count)
        self._file_row(key)

    def _sweep(self) -> None:
        """Forget classes that nobody uses, and rows that no class needs."""
        for number, item in enumerate(self._own("classes")):
            if item is not None and not self.class_live[number]:
                self.classes[number] = None
                del self._own("class_of")[item.shape]
        if len(self.class_of) >= MAX_CLASSES:
            raise Invalid("workload", f"{MAX_CLASSES} different shapes are running already", "use fewer different label sets and requests")
        needed = [key for item in self.classes if item is not None for key in classes.keys_of(item.shape)]
        old, kept = self.rows, list[Ints]()
        self.rows = {}
        for key in dict.fromkeys(needed):
            self.rows[key] = len(kept)
            kept.append(self.counts[old[key]].copy())
        self.counts, self._shared_counts = kept, set()
        self.rows_by_label, self.rows_anywhere, self.classes_by_label = {}, [], {}
        self._shared -= {"rows", "rows_by_label", "rows_anywhere", "classes_by_label"}
        for key in self.rows:
            self._file_row(key)
        for number, item in enumerate(self.classes):
            if item is not None:
                self.classes[number] = classes.connect(item, self.rows, self._rows_for(item.shape), self.namespaces, anew=True)
                for label in item.shape.labels:
                    self.classes_by_label[label] = (*self.classes_by_label.get(label, ()), number)
