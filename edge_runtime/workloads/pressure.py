"""When a node is short of memory or disk, and which workload ends for it. Pure.

Short is what has less than its threshold; it lasts until there is a quarter more than that again, so that a node at the threshold does not change its mind with every look. While it lasts nothing new is
taken. One workload at a time ends: of the least priority, then the one that is most over what it requested, then the one that uses most. After that is waited: what has ended has to be seen in the figures first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

COOL_S = 15.0
"""Seconds after an end before the next one: what ends has 2 s, its pages and files go within some more."""

RELIEF_DIVISOR = 4
"""Short ends at a quarter above the threshold."""

MEMORY, DISK = "memory", "disk"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Bytes below which a node is short; 0: never."""

    memory: int
    disk: int


@dataclass(frozen=True, slots=True)
class Sample:
    """What is to be had, bytes; -1 where that cannot be told, which is never short."""

    memory: int
    disk: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One workload that runs: bytes that it uses and requested. -1: its use cannot be told."""

    id: str
    epoch: int
    priority: int
    memory: int
    memory_request: int
    disk: int = -1
    disk_request: int = 0

    def used(self, what: str) -> tuple[int, int]:
        """Bytes over its request, and in all; at least 0."""
        use, asked = (self.memory, self.memory_request) if what == MEMORY else (self.disk, self.disk_request)
        return max(0, use - asked), max(0, use)


class Pressure:
    """The state of one node.

    Attributes:
        short: `memory`, `disk`, or empty.
    """

    def __init__(self) -> None:
        self.short = ""
        self._quiet_until_s = float("-inf")
        self._sample: Sample | None = None

    def look(self, sample: Sample, thresholds: Thresholds) -> str:
        """What it is short of now (memory before disk, as it kills faster)."""
        self._sample = sample
        self.short = next((what for what, have, least in ((MEMORY, sample.memory, thresholds.memory), (DISK, sample.disk, thresholds.disk)) if _short(have, least, self.short == what)), "")
        return self.short

    def due(self, now_s: float) -> bool:
        """Whether somebody has to end now."""
        return bool(self.short) and self._sample is not None and now_s >= self._quiet_until_s

    def choose(self, candidates: Sequence[Candidate], now_s: float) -> Candidate | None:
        """Who ends; None where nobody must yet, or nobody is there. A sample serves for one end."""
        if not self.due(now_s) or not candidates:
            return None
        self._sample = None
        self._quiet_until_s = now_s + COOL_S
        return min(candidates, key=lambda one: (one.priority, *(-amount for amount in one.used(self.short)), one.id))


def _short(have: int, least: int, before: bool) -> bool:
    return 0 <= have < (least + least // RELIEF_DIVISOR if before else least)
