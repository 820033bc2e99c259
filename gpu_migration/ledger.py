"""Which extents are still to be sent, which are on their way and which the destination holds. Any stream takes whichever is next, and what a cut stream had on
its way goes back. Threads share it; everything that waits here wakes when the pass ends or fails."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Flight:
    """An extent on its way."""

    stream: int
    attempt: int
    raw_hash: bytes
    coder: str = ""
    plain: int = 0
    """Bytes that the coder got."""
    size: int = 0
    """Bytes of the encoded extent."""


class Ledger:
    """One pass over extents."""

    def __init__(self, extents: int, known: dict[int, bytes] | None = None) -> None:
        """`known`: raw hashes of extents that the destination holds."""
        self._lock = threading.Condition()
        self._extents = extents
        self._pending: list[int] = []
        self._open = 0
        self._flights: dict[int, Flight] = {}
        self._attempts: dict[int, int] = {}
        self._failure: Exception | None = None
        self._closed = False
        self._draining = 0
        self.known: dict[int, bytes] = known if known is not None else {}
        self.plain: set[int] = set()
        """Extents that are to be sent without a base."""

    def begin(self, extents: Iterable[int]) -> None:
        """Another pass, over these."""
        with self._lock:
            self._pending = sorted(extents, reverse=True)
            self._open = len(self._pending)
            self._lock.notify_all()

    def take(self, *, wait: bool = True) -> int | None:
        """The next extent to encode; waits for one, or gives None; None once closed."""
        with self._lock:
            while wait and not self._pending and not self._closed:
                self._lock.wait()
            return self._pending.pop() if self._pending and not self._closed else None

    def take_several(self, most: int) -> list[int]:
        """The next extents to encode, as many as there are at once; waits for one; none once closed."""
        with self._lock:
            while not self._pending and not self._closed:
                self._lock.wait()
            return [] if self._closed else [self._pending.pop() for _ in range(min(most, len(self._pending)))]

    def _done(self, index: int) -> None:
        self._open -= 1
        if not self._open:
            self._lock.notify_all()

    def held(self, index: int) -> None:
        """The destination holds the very bytes that were taken."""
        with self._lock:
            self._done(index)

    def sent(self, index: int, stream: int, raw_hash: bytes, coder: str = "", plain: int = 0, size: int = 0) -> int:
        """An extent goes out on a stream, made by that coder of so many bytes and so large; its attempt number."""
        with self._lock:
            attempt = self._attempts[index] = self._attempts.get(index, 0) + 1
            self._flights[index] = Flight(stream, attempt, raw_hash, coder, plain, size)
            self.known.pop(index, None)
            return attempt

    def back(self, index: int) -> None:
        """An extent that was taken could not be sent."""
        with self._lock:
            self._pending.append(index)
            self._lock.notify_all()

    def acked(self, index: int, attempt: int) -> Flight | None:
        """That attempt is written there; an older one is of no account, and gives None."""
        with self._lock:
            flight = self._flights.get(index)
            if flight is not None and flight.attempt == attempt:
                del self._flights[index]
                self.known[index] = flight.raw_hash
                self._done(index)
                if self._draining:
                    self._lock.notify_all()
                return flight
            return None

    def refused(self, index: int, attempt: int) -> None:
        """The base did not do for that attempt: once more, without."""
        with self._lock:
            flight = self._flights.get(index)
            if flight is not None and flight.attempt == attempt:
                del self._flights[index]
                self.plain.add(index)
                self._pending.append(index)
                self._lock.notify_all()

    def lost(self, stream: int) -> int:
        """A stream is gone: what it had on its way goes back; how many."""
        with self._lock:
            gone = [index for index, flight in self._flights.items() if flight.stream == stream]
            for index in gone:
                del self._flights[index]
            self._pending += gone
            self._lock.notify_all()
            return len(gone)

    def drain(self, stream: int, seconds: float) -> None:
        """Until nothing is on its way on a stream, or so long."""
        with self._lock:
            self._draining += 1
            self._lock.wait_for(lambda: self._closed or not any(flight.stream == stream for flight in self._flights.values()), seconds)
            self._draining -= 1

    def remaining(self) -> int:
        """Extents of this pass that the destination does not hold yet."""
        with self._lock:
            return self._open

    def fail(self, error: Exception) -> None:
        """The first failure counts; every waiter wakes."""
        with self._lock:
            self._failure = self._failure or error
            self._closed = True
            self._lock.notify_all()

    def close(self) -> None:
        """No more passes."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()

    def wait(self, seconds: float) -> bool:
        """Whether the pass is done, at the latest after that; raises the failure."""
        with self._lock:
            if self._open and self._failure is None:
                self._lock.wait(seconds)
            if self._failure is not None:
                raise self._failure
            return not self._open
