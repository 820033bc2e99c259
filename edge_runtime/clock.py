"""Time on a device that may have none: monotonic time that only grows, wall time with a quality, a floor against 1970.

A board without a battery clock boots in 1970. Wall time then starts at a floor (the newest time the journal has seen, or the
release date) and grows with monotonic time, marked `unsynced`, until the operating system's clock passes the floor.
"""

import functools
import time
from collections import namedtuple
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing import NamedTuple

RELEASE_MS = 1_795_478_400_000
"""2026-11-24 00:00 UTC in milliseconds: no record of this software is older."""

SYNC_CHECK_INTERVAL_MS = 10_000
"""How often the kernel is asked whether its clock is synchronised: one system call, not worth doing per record."""

JUMP_MS = 1_000
"""A change of wall minus monotonic time by more than this is a clock jump; slewing never moves it so far between two records."""

_TIME_ERROR = 5
"""Return value of adjtimex(2) for an unsynchronised clock."""


if TYPE_CHECKING:

    class Stamp(NamedTuple):
        """When something happened: monotonic and wall milliseconds, and what the wall time is worth (`unsynced`, `rtc`, `ntp`)."""

        mono_ms: int
        wall_ms: int
        quality: str
else:
    Stamp = namedtuple("Stamp", ("mono_ms", "wall_ms", "quality"))  # the same; a start does without `typing`


class Clock(Protocol):
    """What the runtime asks time of; the simulator brings its own."""

    def stamp(self) -> Stamp:
        """Now."""

    def mono_ms(self) -> int:
        """Monotonic milliseconds; counts through suspend."""


_TIMEX_BYTES = 256
"""Room for the kernel's answer (208 bytes on every 64-bit Linux, less on 32-bit); all zero it asks to change nothing."""


def kernel_synchronised() -> bool:
    """Whether the kernel says its clock follows a time source (adjtimex(2)); False where it cannot be asked."""
    import ctypes

    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return False
    return bool(0 <= state < _TIME_ERROR)


class SystemClock:
    """The operating system's clocks.

    Args:
        floor_ms: no wall time below this is believed, milliseconds since 1970 UTC.
        wall, mono, synchronised: sources, replaced in tests; seconds as float, seconds as float, bool.
    """

    def __init__(
        self, floor_ms: int = RELEASE_MS, *, wall: Callable[[], float] = time.time,
        mono: Callable[[], float] = functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME), synchronised: Callable[[], bool] = kernel_synchronised,
    ) -> None:
        self._wall = wall
        self._mono = mono
        self._synchronised = synchronised
        self._floor_ms = max(floor_ms, RELEASE_MS)
        self._floor_mono_ms = int(mono() * 1000)
        self._sync_checked_ms = -SYNC_CHECK_INTERVAL_MS
        self._sync = False
        self._offset_ms: int | None = None
        self.jumps = 0

    def raise_floor(self, wall_ms: int) -> None:
        """Believe nothing before `wall_ms` from now on (the newest wall time of the journal)."""
        mono_ms = self.mono_ms()
        if wall_ms > self._floor_ms + mono_ms - self._floor_mono_ms:
            self._floor_ms, self._floor_mono_ms = wall_ms, mono_ms

    def mono_ms(self) -> int:
        """Milliseconds of CLOCK_BOOTTIME."""
        return int(self._mono() * 1000)

    def stamp(self) -> Stamp:
        """Now, with its quality."""
        mono_ms = int(self._mono() * 1000)
        wall_ms = int(self._wall() * 1000)
        offset = wall_ms - mono_ms
        if self._offset_ms is not None and abs(offset - self._offset_ms) > JUMP_MS:
            self.jumps += 1
            self._sync_checked_ms = mono_ms - SYNC_CHECK_INTERVAL_MS
        self._offset_ms = offset
        floor_ms = self._floor_ms + mono_ms - self._floor_mono_ms
        if wall_ms < self._floor_ms:
            return Stamp(mono_ms, floor_ms, "unsynced")
        if mono_ms - self._sync_checked_ms >= SYNC_CHECK_INTERVAL_MS:
            self._sync_checked_ms = mono_ms
            self._sync = self._synchronised()
        return Stamp(mono_ms, wall_ms, "ntp" if self._sync else "rtc")
