"""Which coder for which extent: the one with which the slowest stage is done soonest, by rates that were measured in this very transfer. Pure.

A coder that is stronger takes longer on the processors and leaves less for the wire. The stages work side by side, so that an extent costs the most that it
costs any of them, and a little for what does not overlap. What a coder makes of an extent is guessed from a sample of it, coded by the quickest coder: the ratios of two coders on the same bytes go
together, and how is learnt from what really came out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .codecs import BY_NAME, CODERS, Coder

LEARN = 0.15
"""Weight of the newest measurement: a change of what is in memory is followed within some ten extents."""

SERIAL = 0.2
"""Share of the quicker stage that is not done beside the slower one: at the ends, and because both want the same memory and processors. Of two coders that would
be done at the same time, it favours the one that leaves the other end less to do."""

SAMPLE = 16 << 10
"""Bytes that are coded for a guess: four pages' worth, 1.5 % of an extent's cost."""

EXPLORE_EVERY = 64
"""Every so many choices the second best coder is taken, so that its rates stay known."""

START_RATES = {"store": 8e9, "lz4-fast": 1.4e9, "lz4": 1.2e9, "zstd-fast": 1.0e9, "zstd-1": 0.75e9, "zstd-3": 0.55e9, "zstd-9": 0.12e9, "deflate-1": 0.7e9}
"""Bytes a second and thread until measured (one core of a 2020s server, guest memory); only the first choices hang on them."""

START_FACTORS = {"store": 0.0, "lz4-fast": 1.0, "lz4": 1.25, "zstd-fast": 1.4, "zstd-1": 1.8, "zstd-3": 1.9, "zstd-9": 2.4, "deflate-1": 1.7}
"""Ratio less one, as a multiple of the sample's, until measured; same origin."""

START_SCAN = 2e9
"""Bytes a second and thread of reading, hashing and sorting out pages, until measured."""

START_SHIP = 2e9
"""Bytes a second and thread of sealing and handing to the kernel, until measured: what leaves is not free for the processors either."""

START_WIRE = 1e9
"""Bytes a second of the wire until measured."""

FREE = ("store", "lz4-fast", "lz4", "zstd-fast", "zstd-1", "zstd-3", "zstd-9")
"""Coders to choose from unless told otherwise. Deflate is for those that ask for it: at its rate zstd is smaller."""


@dataclass(slots=True)
class Mean:
    """A mean that forgets."""

    value: float
    known: bool = False

    def learn(self, value: float) -> None:
        self.value += LEARN * (value - self.value)  # the first one too: it pays for cold caches and fresh memory
        self.known = True


@dataclass(slots=True)
class Model:
    """The measured rates, and the choice by them. Seconds are of processor time, but for the wire. One writer at a time; a stale reading only makes one choice a little worse."""

    threads: int
    names: Sequence[str] = FREE
    wire: Mean = field(default_factory=lambda: Mean(START_WIRE))
    limit: float = 0.0
    """Bandwidth limit, bytes a second; 0: none."""
    scan: Mean = field(default_factory=lambda: Mean(1 / START_SCAN))
    ship: Mean = field(default_factory=lambda: Mean(1 / START_SHIP))
    seconds: dict[str, Mean] = field(default_factory=lambda: {name: Mean(1 / rate) for name, rate in START_RATES.items()})
    factors: dict[str, Mean] = field(default_factory=lambda: {name: Mean(factor) for name, factor in START_FACTORS.items()})
    taken: int = 0

    def scanned(self, size: int, seconds: float) -> None:
        """Reading and sorting out took so long on one thread."""
        self.scan.learn(seconds / size)

    def coded(self, coder: str, plain: int, coded: int, seconds: float, guess: float) -> None:
        """A coder made `coded` of `plain` bytes on one thread, where the sample's ratio was `guess`."""
        self.seconds[coder].learn(seconds / plain)
        if guess > 1.02:  # a sample that does not shrink says nothing about how ratios go together
            self.factors[coder].learn(max(0.0, plain / coded - 1) / (guess - 1))

    def sent(self, size: int, seconds: float) -> None:
        """The wire took so many bytes in so long, all streams together."""
        if seconds > 0 and size > 0:
            self.wire.learn(size / seconds)

    def shipped(self, size: int, seconds: float) -> None:
        """Sealing and handing so many bytes to the kernel took so much of a processor."""
        self.ship.learn(seconds / size)

    def wire_rate(self) -> float:
        """Bytes a second."""
        return min(self.wire.value, self.limit) if self.limit else self.wire.value

    def cost(self, name: str, size: int, plain: int, guess: float) -> float:
        """Seconds that the slowest stage takes for an extent of `size` bytes of which `plain` are to be coded."""
        ratio = 1 + self.factors[name].value * max(0.0, guess - 1)
        out = plain / ratio
        processor = (size * self.scan.value + plain * self.seconds[name].value + out * self.ship.value) / self.threads
        wire = out / self.wire_rate()
        return max(processor, wire) + SERIAL * min(processor, wire)

    def choose(self, size: int, plain: int, guess: float) -> Coder:
        """The coder for an extent."""
        self.taken += 1
        ranked = sorted(self.names, key=lambda name: self.cost(name, size, plain, guess))
        best = ranked[1] if len(ranked) > 1 and self.taken % EXPLORE_EVERY == 0 else ranked[0]
        return BY_NAME[best]


def guess_of(plain: memoryview) -> float:
    """Ratio of a sample of the bytes, by the quickest coder."""
    size = len(plain)
    if size <= SAMPLE:
        sample = plain
    else:
        start = (size - SAMPLE) // 2 & ~4095
        sample = plain[start : start + SAMPLE]
    return max(1.0, len(sample) / max(1, len(BY_NAME["lz4-fast"].encode(sample))))


def names_of(text: str) -> tuple[str, ...]:
    """Coder names from `lz4,zstd-1` or `auto`; raises ValueError naming those there are."""
    if text == "auto":
        return FREE
    names = tuple(text.split(","))
    known = {coder.name for coder in CODERS}
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(f"codecs: {', '.join(wrong)} unknown; give auto or some of {', '.join(sorted(known))}")
    return names
