"""Free capacity of every node over time, as one step function per node: the reservation profile that the deadline planner books in. Pure.

Per node and not one sum over the pool: what fits into the sum need not fit on any node.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

FAR = 1 << 62
"""ms. Later than every time there is; the end of what has none."""

MAX_GANG_STARTS = 2_000
"""Start times tried for a job of several members before the last one, when everything has ended: bounds one search to some hundred ms at 1,000 nodes."""

_FIRST_WIDTH = 4
"""Steps per node that a new profile has room for; it doubles as needed."""


class Overcommitted(ValueError):
    """A hold of more than is free: which node, when, and how much is missing of which resource (its row)."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where and when a job can run: a node (its index) per member, from `start_ms` on."""

    start_ms: int
    nodes: tuple[int, ...]


class Profile:
    """Node n has `free[n, s]` (int64, [R]) from `times[n, s]` until `times[n, s + 1]`; its last step lasts for ever."""

    def __init__(self, free: Ints, now_ms: int) -> None:
        """`free`: [N, R], what each node has from `now_ms` on."""
        nodes, resources = free.shape
        self._times = np.full((nodes, _FIRST_WIDTH), FAR, np.int64)
        self._times[:, 0] = now_ms
        self._free = np.zeros((nodes, _FIRST_WIDTH, resources), np.int64)
        self._free[:, 0] = free
        self._steps = np.ones(nodes, np.int64)

    def copy(self) -> "Profile":
        """An independent one, for what-if."""
        other = object.__new__(Profile)
        width = max(_FIRST_WIDTH, int(self._steps.max(initial=0)))
        other._times, other._free, other._steps = self._times[:, :width].copy(), self._free[:, :width].copy(), self._steps.copy()
        return other

    def copy_node(self, other: "Profile", node: int) -> None:
        """The node as it is in another profile of the same nodes."""
        steps = int(other._steps[node])
        while steps > self._times.shape[1]:
            self._widen()
        self._times[node, steps:] = FAR
        self._times[node, :steps], self._free[node, :steps], self._steps[node] = other._times[node, :steps], other._free[node, :steps], steps

    @property
    def nodes(self) -> int:
        """How many."""
        return len(self._steps)

    def add_node(self, free: Sequence[int], now_ms: int) -> int:
        """One more node; its index."""
        width, resources = self._times.shape[1], self._free.shape[2]
        times = np.full((1, width), FAR, np.int64)
        times[0, 0] = now_ms
        row = np.zeros((1, width, resources), np.int64)
        row[0, 0] = free
        self._times, self._free, self._steps = np.concatenate([self._times, times]), np.concatenate([self._free, row]), np.append(self._steps, 1)
        return self.nodes - 1

    def set_node(self, node: int, free: Sequence[int] | Ints, now_ms: int) -> None:
        """From now on the node has exactly `free` (0 where it vanished); only for a node without holds."""
        self._times[node], self._times[node, 0] = FAR, now_ms
        self._free[node, 0] = free
        self._steps[node] = 1

    def at(self, node: int, when_ms: int) -> Ints:
        """[R]: what is free on a node at one time."""
        free: Ints = self._free[node, self._index(node, when_ms)].copy()
        return free

    def first(self, rows: Ints | None = None) -> Ints:
        """[N, R]: what is free on each node (of `rows`) at the profile's start."""
        free: Ints = self._free[:, 0] if rows is None else self._free[rows, 0]
        return free

    def steps(self, node: int) -> list[tuple[int, tuple[int, ...]]]:
        """(from, free) of a node in order of time; for tests and pages."""
        return [(int(self._times[node, step]), tuple(int(value) for value in self._free[node, step])) for step in range(int(self._steps[node]))]

    def least(self, start_ms: int, duration_ms: int, rows: Ints | None = None) -> Ints:
        """[N, R]: the least that is free on each node (of `rows`) at any time within [start, start + duration)."""
        times, free = (self._times, self._free) if rows is None else (self._times[rows], self._free[rows])
        touched = (times < start_ms + duration_ms) & (_ends(times) > start_ms) & (times < FAR)
        least: Ints = np.where(touched[:, :, None], free, FAR).min(axis=1)
        return least

    def members(self, need: Ints, start_ms: int, duration_ms: int, most: int, rows: Ints | None = None) -> Ints:
        """[N]: how many of `need` ([R]) each node (of `rows`) holds throughout, at most `most`."""
        asked = need > 0
        if not asked.any():
            return np.full(self.nodes if rows is None else len(rows), most, np.int64)
        held: Ints = np.clip((self.least(start_ms, duration_ms, rows)[:, asked] // need[asked]).min(axis=1), 0, most)
        return held

    def earliest(self, need: Ints, duration_ms: int, not_before_ms: int, allowed: Bools | None = None, members: int = 1) -> Slot | None:
        """The first time at which `members` of `need` ([R] each) run side by side for the whole duration on allowed nodes; None: never.

        Of nodes that are free equally early it takes the one that is left the fullest.
        """
        rows = np.arange(self.nodes) if allowed is None else np.flatnonzero(allowed)
        starts = self._first_starts(rows, need, duration_ms, not_before_ms)
        first = int(starts.min(initial=FAR))
        if first >= FAR:
            return None
        if members == 1:
            tied = rows[starts == first]
            return Slot(first, (int(tied[_fullest(self.least(first, duration_ms, tied))]) if len(tied) > 1 else int(tied[0]),))
        times = np.unique(self._times[rows])
        times = times[(times > first) & (times < FAR)]
        for start in (first, *(int(time) for time in times[:MAX_GANG_STARTS]), *(int(time) for time in times[MAX_GANG_STARTS:][-1:])):
            room = self.members(need, start, duration_ms, members, rows)
            if int(room.sum()) >= members:
                return Slot(start, tuple(int(rows[row]) for row in _fewest_nodes(room, members)))
        return None

    def take(self, node: int, start_ms: int, end_ms: int, need: Ints) -> None:
        """Hold `need` ([R]; negative gives back) on a node within [start, end). Raises `Overcommitted`, with nothing changed."""
        if end_ms <= start_ms:
            return
        first, last = self._index(node, start_ms), self._index(node, end_ms - 1)
        missing = need - self._free[node, first:last + 1]
        if (need > 0).any() and (missing > 0).any():
            step, row = np.argwhere(missing > 0)[0]
            raise Overcommitted(f"node {node} lacks {int(missing[step, row])} of resource {int(row)} at {max(start_ms, int(self._times[node, first + step]))} ms")
        first, last = self._split(node, start_ms), self._split(node, end_ms)
        self._free[node, first:last] -= need
        self._tidy(node)

    def hold_until(self, node: int, holds: Sequence[tuple[int, Ints]]) -> None:
        """As many `take`s from the profile's start to each end, at once; only for a node without holds. Raises `Overcommitted`, with nothing changed."""
        ordered = sorted(holds, key=lambda hold: hold[0])
        ends = np.unique(np.array([end for end, _ in ordered], np.int64))
        needs = np.zeros((len(ends), self._free.shape[2]), np.int64)
        np.add.at(needs, np.searchsorted(ends, [end for end, _ in ordered]), np.array([need for _, need in ordered]))
        first = self._free[node, 0] - needs.sum(axis=0)
        if (first < 0).any():
            raise Overcommitted(f"node {node} lacks {int(-first.min())} of resource {int(first.argmin())} at {int(self._times[node, 0])} ms")
        while len(ends) + 1 > self._times.shape[1]:
            self._widen()
        self._times[node, 1:len(ends) + 1] = ends
        self._free[node, 0] = first
        self._free[node, 1:len(ends) + 1] = first + np.cumsum(needs, axis=0)
        self._steps[node] = len(ends) + 1
        self._tidy(node)

    def give(self, node: int, start_ms: int, end_ms: int, need: Ints) -> None:
        """The opposite of `take`."""
        self.take(node, start_ms, end_ms, -need)

    def advance(self, now_ms: int) -> None:
        """Forget what lies before now."""
        for node in np.flatnonzero(self._times[:, 1] <= now_ms):
            index, steps = self._index(int(node), now_ms), int(self._steps[node])
            self._times[node, :steps - index] = self._times[node, index:steps]
            self._times[node, steps - index:] = FAR
            self._free[node, :steps - index] = self._free[node, index:steps]
            self._free[node, steps - index:] = 0
            self._steps[node] = steps - index
        self._times[:, 0] = np.maximum(self._times[:, 0], now_ms)

    def _first_starts(self, rows: Ints, need: Ints, duration_ms: int, not_before_ms: int) -> Ints:
        """First start of one member on each node of `rows`; FAR: never."""
        times, free = (self._times, self._free) if len(rows) == self.nodes else (self._times[rows], self._free[rows])
        real = times < FAR
        short: Bools = free[:, :, 0] < need[0]
        for row in range(1, len(need)):  # a reduction over so few would take five times as long
            short |= free[:, :, row] < need[row]
        short &= real
        next_short = np.minimum.accumulate(np.where(short, times, FAR)[:, ::-1], axis=1)[:, ::-1]
        begin = np.maximum(times, not_before_ms)
        good = real & ~short & (_ends(times) > begin) & (next_short - begin >= duration_ms)
        starts: Ints = np.where(good, begin, FAR).min(axis=1)
        return starts

    def _index(self, node: int, when_ms: int) -> int:
        index = int(np.searchsorted(self._times[node], when_ms, side="right")) - 1
        if index < 0:
            raise ValueError(f"{when_ms} ms lies before the profile's start, {int(self._times[node, 0])} ms")
        return min(index, int(self._steps[node]) - 1)

    def _split(self, node: int, at_ms: int) -> int:
        """Make a step begin at a time; its index."""
        steps = int(self._steps[node])
        if at_ms >= FAR:
            return steps
        index = self._index(node, at_ms)
        if self._times[node, index] == at_ms:
            return index
        if steps == self._times.shape[1]:
            self._widen()
        self._times[node, index + 2:steps + 1] = self._times[node, index + 1:steps].copy()
        self._free[node, index + 1:steps + 1] = self._free[node, index:steps].copy()
        self._times[node, index + 1] = at_ms
        self._steps[node] = steps + 1
        return index + 1

    def _widen(self) -> None:
        """Room for twice as many steps."""
        self._times = np.concatenate([self._times, np.full_like(self._times, FAR)], axis=1)
        self._free = np.concatenate([self._free, np.zeros_like(self._free)], axis=1)

    def _tidy(self, node: int) -> None:
        """Merge neighbouring steps of equal free capacity."""
        steps = int(self._steps[node])
        keep = np.ones(steps, bool)
        keep[1:] = (self._free[node, 1:steps] != self._free[node, :steps - 1]).any(axis=1)
        kept = int(keep.sum())
        if kept == steps:
            return
        self._times[node, :kept], self._free[node, :kept] = self._times[node, :steps][keep], self._free[node, :steps][keep]
        self._times[node, kept:], self._free[node, kept:] = FAR, 0
        self._steps[node] = kept


def at_least(free: Ints, need: Ints) -> Bools:
    """[N]: where there is as much as is needed of what is needed. One resource after the other: a reduction over so few takes longer."""
    found: Bools = np.ones(len(free), np.bool_)
    for row in np.flatnonzero(need).tolist():
        found &= free[:, row] >= need[row]
    return found


def _ends(times: Ints) -> Ints:
    """When each step ends."""
    return np.concatenate([times[:, 1:], np.full((len(times), 1), FAR, np.int64)], axis=1)


def _fullest(left: Ints) -> int:
    """Of rows of free capacity, the one with the least, each resource in proportion to its largest."""
    scale = np.maximum(left.max(axis=0), 1)
    return int((left / scale).sum(axis=1).argmin())


def _fewest_nodes(room: Ints, members: int) -> tuple[int, ...]:
    """Members on the nodes that hold the most of them: a gang on few nodes leaves more whole ones."""
    chosen: list[int] = []
    for node in np.argsort(-room, kind="stable"):
        chosen += [int(node)] * min(int(room[node]), members - len(chosen))
        if len(chosen) == members:
            break
    return tuple(chosen)
