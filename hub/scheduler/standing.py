"""What one timetable after the other begins with: the profile of what runs and of what is reserved, of which only the nodes where something changed are made anew. Pure.

A timetable is made again whenever anything else was placed. What that changes is a node or two; to book all jobs on all nodes each time costs a hundred times as much. The
outcome is that of a new `Timetable` on which everything is booked (`adopt`, `node_gone`); the tests hold one against the other.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from .batch import Hold, Job, Late
from .deadline import Timetable
from .profile import FAR, Bools, Ints, Overcommitted, Profile

MAX_WITNESSES = 4_096
"""Needs for which a node is remembered: more than there are different ones among all jobs that are planned, mostly."""


class Standing:
    """Reservations are compared by identity: give the same object for what has not changed. Time never goes back."""

    def __init__(self) -> None:
        self._base = np.zeros((0, 0), np.int64)
        self._gone: Bools = np.zeros(0, np.bool_)
        self._held = self._base
        """[N, R]: what running jobs hold, whatever the time."""
        self._running: dict[str, Hold] = {}
        self._soonest = FAR
        """No job ends before; it may be later."""
        self._there: dict[int, dict[str, Hold]] = {}
        """Node to what runs there."""
        self._reserved: dict[str, Hold] = {}
        """What `_full` has reserved."""
        self._witness: dict[tuple[int, ...], int] = {}
        """Shared with each timetable: need to a node that could hold it when empty, a hint that is checked."""
        self._bare = self._full = Profile(self._base, 0)
        """With what runs; and with what is reserved besides."""

    def timetable(self, resources: Sequence[str], names: Sequence[str], room: Ints, gone: Bools, changes: Mapping[str, Hold | None], slots: Mapping[str, int], reserved: Iterable[Hold], loose: Iterable[Job], now_ms: int, *,
                  human: Callable[[str, int], str], when: Callable[[int], str], reorder_most: int, backfill_depth: int) -> tuple[Timetable, list[Late]]:
        """A timetable, and the promises that are broken by what has changed.

        Args:
            room: [N, R], what batch may use of each node besides what it holds there.
            gone: [N], nodes with which nothing is planned.
            changes: jobs that run, each on one node that is not gone, where they hold something else than before; None: no more. One that should have ended is taken to end now.
            slots: by which what runs goes in order; below 0 for what does not run.
            reserved: where and when each was; what no longer fits so is placed anew.
            loose: jobs with a deadline that have no place.
        """
        if room.shape != self._base.shape:
            self._forget(room, now_ms)
        self._bare.advance(now_ms)
        self._full.advance(now_ms)
        dirty = self._run(changes, now_ms)
        base = room + self._held
        dirty.update(np.flatnonzero((base != self._base).any(axis=1) | (gone != self._gone)).tolist())
        self._base, self._gone = base, gone
        for node in dirty:
            self._bare.set_node(node, base[node] * (not gone[node]), now_ms)
            lasting = [(hold.end_ms, hold.need) for hold in self._there.get(node, {}).values() if hold.end_ms > now_ms]
            if lasting and not gone[node]:
                self._bare.hold_until(node, lasting)
        if len(self._witness) > MAX_WITNESSES:
            self._witness = {}
        ordered = sorted(reserved, key=_by_start)
        self._reserve({hold.job.id: hold for hold in ordered if hold.end_ms - now_ms >= hold.job.duration_ms}, dirty, now_ms)
        kept = {name: hold if hold.start_ms >= now_ms else Hold(hold.job, hold.nodes, now_ms, hold.end_ms, hold.need) for name, hold in self._reserved.items()}
        table = Timetable(resources, names, base, now_ms, human, when, reorder_most, backfill_depth, self._full.copy())
        return table, table.stand(np.flatnonzero(gone).tolist(), self._running, slots, self._soonest, self._witness, ordered, kept, loose, now_ms)

    def _forget(self, room: Ints, now_ms: int) -> None:
        """Other nodes or other resources: nothing of what was holds."""
        nodes = len(room)
        self._base, self._held, self._gone = np.full_like(room, -1), np.zeros_like(room), np.zeros(nodes, np.bool_)
        self._running, self._there, self._reserved, self._soonest = {}, {}, {}, FAR
        self._bare, self._full = Profile(np.zeros_like(room), now_ms), Profile(np.zeros_like(room), now_ms)

    def _run(self, changes: Mapping[str, Hold | None], now_ms: int) -> set[int]:
        """What runs now; the nodes where that has changed."""
        dirty = {node for name, hold in changes.items() if (node := self._change(name, hold)) >= 0}
        dirty.update([hold.nodes[0] for hold in changes.values() if hold is not None])
        if self._soonest < now_ms:
            for name in [name for name, hold in self._running.items() if hold.end_ms < now_ms]:
                dirty.add(self._change(name, replace(self._running[name], end_ms=now_ms)))
            self._soonest = min((hold.end_ms for hold in self._running.values()), default=FAR)
        return dirty

    def _change(self, name: str, hold: Hold | None) -> int:
        """A job holds something else from now on, or nothing; the node where it held something, -1 where it did not."""
        before = self._running.pop(name, None)
        if before is not None:
            self._held[before.nodes[0]] -= before.need
            del self._there[before.nodes[0]][name]
        if hold is not None:
            self._running[name] = hold
            self._held[hold.nodes[0]] += hold.need
            self._there.setdefault(hold.nodes[0], {})[name] = hold
            self._soonest = min(self._soonest, hold.end_ms)
        return -1 if before is None else before.nodes[0]

    def _reserve(self, due: Mapping[str, Hold], dirty: set[int], now_ms: int) -> None:
        """Reserve what is due, in its order, where something changed; what does not fit there is left out."""
        before = self._reserved
        for name in before.keys() - due.keys():
            dirty.update(before[name].nodes)
        for name, hold in due.items():
            known = before.get(name)
            if known is not hold:
                dirty.update(hold.nodes, () if known is None else known.nodes)
        while (more := self._try(due, dirty, now_ms)) is not None:
            dirty.update(more)  # a gang that no longer fits on one of its nodes frees the others

    def _try(self, due: Mapping[str, Hold], dirty: set[int], now_ms: int) -> tuple[int, ...] | None:
        """Reserve on the dirty nodes; the nodes that are dirty too, where it has to begin again."""
        for node in dirty:
            self._full.copy_node(self._bare, node)
        missed = set[str]()
        for name, hold in due.items():
            mine = () if dirty.isdisjoint(hold.nodes) else [node for node in hold.nodes if node in dirty]
            taken = 0
            try:
                for node in mine:
                    self._full.take(node, max(hold.start_ms, now_ms), hold.end_ms, hold.need)
                    taken += 1
            except Overcommitted:
                if len(mine) < len(hold.nodes):
                    return hold.nodes
                for node in mine[:taken]:
                    self._full.give(node, max(hold.start_ms, now_ms), hold.end_ms, hold.need)
                missed.add(name)
        self._reserved = {name: hold for name, hold in due.items() if name not in missed}
        return None


def _by_start(hold: Hold) -> tuple[int, str]:
    return hold.start_ms, hold.job.id
