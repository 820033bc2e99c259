"""When things really happened: records of an edge whose clock was wrong are dated anew once it knows better. Pure.

A record carries the edge's monotonic time, its wall time and what that was worth (`unsynced`, `rtc`, `ntp`). Within one boot monotonic time runs on
evenly, so one record with a good wall time dates every other of that boot: wall = mono + offset. What the edge wrote is never overwritten: the better
date is told beside it.
"""

from collections import OrderedDict
from dataclasses import dataclass

from edge_runtime.contract.records import Record

RANK = {"unsynced": 0, "rtc": 1, "ntp": 2}
"""What a wall time is worth; an unknown word of a newer edge is worth nothing here."""

MAX_CLOCKS = 20_000
"""Boots whose clocks are remembered at once: two for each edge that a hub takes. Records of older ones show the date they came with."""


@dataclass(frozen=True, slots=True)
class BootClock:
    """What is known of the clock of one boot of one edge: `wall = mono + offset_ms`, as good as `quality` says."""

    edge: str
    boot: str
    quality: str
    offset_ms: int


def date(record: Record, clock: BootClock | None) -> tuple[int, str]:
    """The best date of a record, milliseconds since 1970, and its quality. Its own, where that is as good as what is known of the boot."""
    if clock is None or RANK.get(record.quality, 0) >= RANK.get(clock.quality, 0):
        return record.wall_ms, record.quality
    return record.mono_ms + clock.offset_ms, clock.quality


class Clocks:
    """The clocks of the boots heard of lately; `observe` what comes in, keep what it returns."""

    def __init__(self) -> None:
        self._clocks: OrderedDict[tuple[str, str], BootClock] = OrderedDict()

    def remember(self, clock: BootClock) -> None:
        """One from the store."""
        self._clocks[clock.edge, clock.boot] = clock
        self._clocks.move_to_end((clock.edge, clock.boot))
        if len(self._clocks) > MAX_CLOCKS:
            self._clocks.popitem(last=False)

    def forget(self, clock: BootClock) -> None:
        """The store refused it: the record that told of it comes again."""
        self._clocks.pop((clock.edge, clock.boot), None)

    def get(self, edge: str, boot: str) -> BootClock | None:
        """What is known of a boot's clock."""
        return self._clocks.get((edge, boot))

    def observe(self, edge: str, record: Record) -> BootClock | None:
        """Take a record in; returns the boot's clock where this record is the first of a better quality."""
        known = self._clocks.get((edge, record.boot))
        rank = RANK.get(record.quality, 0)
        if rank == 0 or (known is not None and RANK.get(known.quality, 0) >= rank):
            return None
        # The first of its quality, not the newest: a clock that is slewed or set later is right about later, this one is nearest to what came before.
        clock = BootClock(edge, record.boot, record.quality, record.wall_ms - record.mono_ms)
        self.remember(clock)
        return clock
