"""Between an encoder and the streams: what is ready, what a stream that is up consists of, and the small extents that wait for each other."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from . import extents, wire


@dataclass(frozen=True, slots=True)
class Ready:
    """An encoded extent that waits for a stream."""

    index: int
    encoded: extents.Encoded


@dataclass(slots=True, eq=False)
class Line:
    """A stream that is up, and what belongs to it for as long as it is."""

    number: int
    stream: wire.Stream
    stop: threading.Event
    """No more is to be sent on it."""
    cut: threading.Event = field(default_factory=threading.Event)
    """It is of no more use."""
    busy: threading.Lock = field(default_factory=threading.Lock)
    """Held by who sends extents on it."""


class Outlet:
    """An encoder's way out. Small extents wait here for each other, so that a record, its way through threads and its acknowledgement are for many."""

    def __init__(self, out: Callable[[tuple[Ready, ...], int], bool]) -> None:
        """`out`: takes extents and their bytes; False once closed."""
        self._out = out
        self._small: list[Ready] = []

    def put(self, ready: Ready) -> bool:
        """False once all is closed."""
        size = len(ready.encoded.data)
        if size > wire.SMALL:
            return self._out((ready,), size)
        self._small.append(ready)
        return self.flush() if len(self._small) == wire.GROUP_MOST else True

    def flush(self) -> bool:
        """Nothing waits here after this. False once all is closed."""
        together, self._small = tuple(self._small), []
        return self._out(together, sum(len(ready.encoded.data) for ready in together)) if together else True

    def waits(self) -> bool:
        """Something waits here."""
        return bool(self._small)
