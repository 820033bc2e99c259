"""When this node is short of memory or disk, and which workload has to go then. Pure: what was seen goes in with its time, what shall be done comes out.

The node says so itself and needs no hub for it: a taint keeps new workloads away, what was asked to run is refused, and one workload at a time is ended until there is enough again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY, DISK = "memory", "disk"

LOOK_S = 2.0
"""Between two looks: a program that takes a gigabyte in a second is the kernel's to end (each container has its limit); what grows slower is seen in time."""

SETTLE_S = 15.0
"""After one workload was ended the next one stays at least so long: it is given 10 s to end, and what it held has to come free before anybody can say that it was not enough."""

RELEASE = 1.25
"""There is enough again when a quarter more than the limit is free, ..."""

CALM_S = 30.0
"""... for so long: else what was refused comes back at once, and brings the shortage with it."""

TAINT = "novacron.pressure"
"""Key of the taint; its value is what is short."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A workload that runs: its priority (least goes first), and bytes of what is short that it uses, and had asked for."""

    id: str
    epoch: int
    priority: int
    used: int
    requested: int


def victim(candidates: Iterable[Candidate]) -> Candidate | None:
    """Who has to go: of the least priority the one that uses most beyond what it asked for, then the one that uses most; None where nobody runs."""
    return min(candidates, key=lambda one: (one.priority, one.requested - one.used, -one.used, one.id, one.epoch), default=None)


class Pressure:
    """What is short. `limits`: bytes that have to be free, by `memory` and `disk`; 0: never short of it."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._limits = {what: limit for what, limit in limits.items() if limit > 0}
        self._short: dict[str, float] = {}
        """What is short, to when it last was below what releases it."""
        self._settled = 0.0

    @property
    def short(self) -> tuple[str, ...]:
        """What there is too little of."""
        return tuple(sorted(self._short))

    def limit(self, what: str) -> int:
        """Bytes that have to be free."""
        return self._limits[what]

    def look(self, free: Mapping[str, int], now_s: float) -> str:
        """Bytes that are free now, by what; what is not told is taken as it was. Gives what a workload has to go for now, or nothing. `now_s` never goes back."""
        lacking = ""
        for what in sorted(self._limits.keys() & free.keys()):
            if free[what] < self._limits[what]:
                self._short[what] = now_s
                lacking = lacking or what
            elif what in self._short and free[what] < self._limits[what] * RELEASE:
                self._short[what] = now_s
            elif what in self._short and now_s - self._short[what] >= CALM_S:
                del self._short[what]
        return lacking if now_s >= self._settled else ""

    def ended(self, now_s: float) -> None:
        """A workload was told to end, or room was made otherwise: nobody else goes before that can have had its effect."""
        self._settled = now_s + SETTLE_S

    def taints(self) -> list[dict[str, str]]:
        """What keeps new workloads away."""
        return [{"key": TAINT, "value": what, "effect": "NoSchedule"} for what in self.short]

    def refusal(self) -> str:
        """Why nothing new is taken; empty where there is enough."""
        return f"is short of {' and '.join(self.short)}" if self._short else ""


def free(meminfo: str, disk_bytes: int | None) -> dict[str, int]:
    """Bytes that are free, from /proc/meminfo and from what the data folder's file system says; what cannot be read is left out."""
    found: dict[str, int] = {}
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if name == "MemAvailable" and words and words[0].isdigit():
            found[MEMORY] = int(words[0]) * 1024
    if disk_bytes is not None:
        found[DISK] = disk_bytes
    return found


def priority(entry: Mapping[str, Any]) -> int:
    """Of an entry of desired state; 0 where it says none."""
    value = (entry.get("document") or {}).get("priority", 0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def requested(entry: Mapping[str, Any], what: str) -> int:
    """Bytes that an entry asked for."""
    value = (entry.get("requests") or {}).get(what, 0)
    return value if isinstance(value, int) else 0


def disk_used(folders: Sequence[Path], most: int = 100_000) -> int:
    """Bytes that files below take on the disk; at most so many files are looked at. Blocks."""
    total, left = 0, most
    waiting = list(folders)
    while waiting and left > 0:
        try:
            entries = list(waiting.pop().iterdir())
        except OSError:
            continue
        for one in entries[:left]:
            left -= 1
            try:
                told = one.lstat()
            except OSError:
                continue
            total += told.st_blocks * 512
            if one.is_dir() and not one.is_symlink():
                waiting.append(one)
    return total
