"""What keeps the stages apart and in bounds: a queue bounded by bytes, a bandwidth limit, the measure of the wire and the number of streams."""

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

HIGH_WATER = 16 << 20
"""Bytes of encoded extents that wait for the wire: what 1.6 GB/s send in 10 ms, so that neither side waits for the other's hiccup."""
METER_S = 0.02
"""Seconds of sending after which the wire's rate is taken."""
BURST_S = 0.05
"""Seconds' worth that a bandwidth limit lets through at once."""
GAIN = 1.05
"""One more stream has to bring 5 %; less is noise, and each costs memory and a thread at both ends."""
BLOCKED = 0.5
"""Share of the time in which all streams are sending from which the wire, not the processors, is what holds things up."""
STEP_S = 0.1
"""Seconds between two looks at the number of streams: tens of extents."""


class Bounded(Generic[T]):
    """A queue bounded by bytes: a producer waits while it is at the high-water mark; peak says how full it ever was."""

    def __init__(self, high_water: int = HIGH_WATER) -> None:
        lock = threading.Lock()
        # Two, so that one waiter is woken for one item: each that wakes for nothing takes the interpreter from those that work.
        self._there, self._room = threading.Condition(lock), threading.Condition(lock)
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._high_water = high_water
        self._closed = False
        self.peak = 0

    def put(self, item: T, size: int) -> bool:
        """Waits for room: below the mark one more is taken. False once closed."""
        with self._room:
            while self._items and self._bytes + size > self._high_water and not self._closed:
                self._room.wait()
            if self._closed:
                return False
            self._items.append((item, size))
            self._bytes += size
            self.peak = max(self.peak, self._bytes)
            self._there.notify()
            return True

    def get(self, stop: threading.Event | None = None) -> T | None:
        """The next item; None once closed, or when `stop` is set and `wake` was called."""
        with self._there:
            while not self._items:
                if self._closed or (stop is not None and stop.is_set()):
                    return None
                self._there.wait()
            if self._closed or (stop is not None and stop.is_set()):
                self._there.notify()  # it may have been woken for an item, which is another's then
                return None
            item, size = self._items.popleft()
            self._bytes -= size
            self._room.notify_all()
            return item

    def empty(self) -> bool:
        """Nothing is in it, at this moment."""
        return not self._items

    def wake(self) -> None:
        """Let waiters look at their stop events."""
        with self._there:
            self._there.notify_all()

    def close(self) -> None:
        """Drop everything; every waiter wakes."""
        with self._there:
            self._closed = True
            self._items.clear()
            self._bytes = 0
            self._there.notify_all()
            self._room.notify_all()


class Pace:
    """A bandwidth limit that all streams share; 0: none."""

    def __init__(self, limit: float) -> None:
        self._lock = threading.Lock()
        self._limit = limit
        self._free_at = 0.0

    def open(self, now: float) -> bool:
        """Something may go at once."""
        return not self._limit or self._free_at <= now

    def due(self, size: int, now: float) -> float:
        """Seconds to wait before so many bytes may go, which are booked at once."""
        if not self._limit:
            return 0.0
        with self._lock:
            start = max(self._free_at, now - BURST_S)
            self._free_at = start + size / self._limit
            return max(0.0, start - now)


class Meter:
    """Bytes and seconds of sending, all streams together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active = 0
        self._since = 0.0
        self._bytes = 0
        self._busy = 0.0
        self.bytes = 0
        self.busy = 0.0

    def start(self) -> None:
        with self._lock:
            if not self._active:
                self._since = time.monotonic()
            self._active += 1

    def stop(self, size: int) -> tuple[int, float] | None:
        """Bytes and seconds since the last answer, where that is long enough to say something."""
        with self._lock:
            now = time.monotonic()
            self._active -= 1
            self._bytes += size
            self.bytes += size
            self._busy += now - self._since
            self.busy += now - self._since
            self._since = now
            if self._busy < METER_S:
                return None
            found = self._bytes, self._busy
            self._bytes, self._busy = 0, 0.0
            return found


@dataclass(slots=True)
class Streams:
    """How many streams: one more as long as the wire holds things up and the last one brought something; one less where it did not. Pure."""

    most: int
    count: int
    _rates: dict[int, float] = field(default_factory=dict)
    _settled: bool = False

    def look(self, rate: float, blocked: float) -> int:
        """From the rate and the share of time spent sending since the last look: how many there should be."""
        best = self._rates.get(self.count)
        self._rates[self.count] = rate if best is None else max(rate, 0.7 * best + 0.3 * rate)
        if self._settled or blocked < BLOCKED:
            return self.count
        fewer = self._rates.get(self.count - 1)
        if fewer is not None and rate < GAIN * fewer:
            self.count -= 1
            self._settled = True
        elif self.count < self.most:
            self.count += 1
        else:
            self._settled = True
        return self.count
