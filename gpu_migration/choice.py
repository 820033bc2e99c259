"""Which coder for which extent: the one with which the slowest stage is done soonest, by rates that were measured in this very transfer. Pure.

A coder that is stronger takes longer on the processors, of both ends, and leaves less for the wire. The stages work side by side, so that an extent costs the most that it
costs any of them, and a little for what does not overlap. Where both ends run on one machine their processors are the same ones, and there is no wire but what it costs of them. What a coder makes of an extent is guessed from a sample of it, coded by the quickest coder: the ratios of two coders on the same bytes go
together, and how is learnt from what really came out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .codecs import BY_NAME, CODERS, LIKE, NO_SNAPPY, ON_GPU, Coder

LEARN = 0.15
"""Weight of the newest measurement: a change of what is in memory is followed within some ten extents."""

TIE = 0.02
"""Of coders whose costs are within so much of the least, which is no more than the measurements can tell apart, the one that sends the fewest bytes is taken. More of it would be speed given away."""

WIRE_WORTH = 2.5e-9
"""Seconds of a processor that a byte less on the wire is worth, also where the wire holds nothing up: others use it too. A host of the 2020s has some fifty cores to 100 Gbit/s, so that a
core's share of the wire takes 4 ns a byte; less than that, for the wire is seldom full."""

OUTLIER = 4.0
"""A measurement counts for at most so many times the mean: a thread that was interrupted says little of the work."""

SERIAL = 0.2
"""Share of the quicker stage that is not done beside the slower one: at the ends, and because both want the same memory and processors. Of two coders that would
be done at the same time, it favours the one that leaves the other end less to do."""

TOLD_FROM = 512 << 10
"""Bytes of a coded section from which the time that it took there says something of the coder: of less, what every extent costs is the most."""

LEARN_FROM = 64 << 10
"""Bytes coded at once from which the time that it took here says something of the coder: less says more about what every extent costs."""

SAMPLE = 16 << 10
"""Bytes that are coded for a guess: four pages' worth, 1.5 % of an extent's cost."""

SPOTS = 8
"""Places in an extent that they are taken from: its pages belong to several programs, and those in its middle say little of the others."""

HOLDS, ALIKE = 4, 0.2
"""So often at the most a choice is not made anew for an extent that is alike within so much: reckoning takes as long as a tenth of the coding."""

EXPLORE_EVERY = 64
"""Every so many choices the second best coder is taken, so that its rates stay known."""

START_RATES = {"store": 8e9, "lz4-faster": 2.0e9, "lz4-fast": 1.4e9, "lz4": 1.2e9, "zstd-fast": 1.0e9, "zstd-1": 0.75e9, "zstd-3": 0.55e9, "zstd-9": 0.12e9, "deflate-1": 0.7e9, "snappy": 1.0e9}
"""Bytes a second and thread until measured (one core of a 2020s server, guest memory); only the first choices hang on them."""

START_FACTORS = {"store": 0.0, "lz4-faster": 0.65, "lz4-fast": 1.0, "lz4": 1.25, "zstd-fast": 1.4, "zstd-1": 1.8, "zstd-3": 1.9, "zstd-9": 2.4, "deflate-1": 1.7, "snappy": 1.1}
"""Ratio less one, as a multiple of the sample's, until measured; same origin."""

START_UNDO = {"store": 4e9, "lz4-faster": 2.2e9, "lz4-fast": 2.1e9, "lz4": 2.0e9, "zstd-fast": 0.9e9, "zstd-1": 0.8e9, "zstd-3": 0.8e9, "zstd-9": 0.8e9, "deflate-1": 0.4e9, "snappy": 1.2e9}
"""Bytes a second and thread of decoding and checking at the other end, until measured; same origin. Writing costs the same whatever the coder."""

START_FEED = 8e9
"""Bytes a second and thread of feeding a coder on a GPU and taking back what it made, until measured: about a copy."""

START_TAKE = 2e9
"""Encoded bytes a second and thread of receiving and opening there, until measured."""

START_SCAN = 2e9
"""Bytes a second and thread of reading, hashing and sorting out pages, until measured."""

START_SHIP = 2e9
"""Bytes a second and thread of sealing and handing to the kernel, until measured: what leaves is not free for the processors either."""

START_WIRE = 1e9
"""Bytes a second of the wire until measured."""

START_GUESS, START_CODER = 2.0, "lz4-fast"
"""A sample's ratio, and what is chosen, until there is one."""

FREE = ("store", "lz4-faster", "lz4-fast", "lz4", "zstd-fast", "zstd-1", "zstd-3", "zstd-9")
"""Coders to choose from unless told otherwise. Deflate and Snappy are for those that ask for them: at Deflate's rate zstd is smaller, and not every destination reads Snappy."""

FREE_ON_GPU = ("nv-lz4", "nv-zstd", "nv-deflate")
"""Those on a GPU that are added to them where they are there: what they make, any destination reads."""


@dataclass(slots=True)
class Mean:
    """A mean that forgets."""

    value: float
    known: bool = False

    def learn(self, value: float) -> None:
        value = min(value, OUTLIER * self.value)
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
    processors: int = 1
    """Of this machine."""
    there: int = 1
    """Processors of the other end's machine."""
    shared: bool = False
    """They are the same."""
    take: Mean = field(default_factory=lambda: Mean(1 / START_TAKE))
    undo: dict[str, Mean] = field(default_factory=lambda: {name: Mean(1 / rate) for name, rate in START_UNDO.items()})
    taken: int = 0
    guess: Mean = field(default_factory=lambda: Mean(START_GUESS))
    """Ratio of the samples."""
    on_device: dict[str, Mean] = field(default_factory=dict)
    """Of the coders that run on a GPU, the seconds of it a byte. It is one for all threads, so that it is a stage of its own; their `seconds` are what the processors have to do with it."""
    last: str = START_CODER
    """The coder that was chosen last."""
    _for: tuple[int, float] = (0, 0.0)
    """Bytes to be coded and ratio of the sample, of what it was chosen for."""

    def with_device(self, rates: Mapping[str, float]) -> None:
        """There is a GPU that codes, at so many bytes a second of each coder, as was measured when it was proved. Which of them are chosen from is for `names`. Until measured they are like those of a
        processor in what they leave and in what it takes at the other end."""
        for name, rate in rates.items():
            like = LIKE[name]
            self.on_device[name] = Mean(1 / rate)
            self.seconds[name], self.factors[name], self.undo[name] = Mean(1 / START_FEED), Mean(START_FACTORS[like]), Mean(1 / START_UNDO[like])

    def without_device(self) -> None:
        """It codes no more: where only its coders were asked for, those of their formats take their place."""
        left = tuple(name for name in self.names if name not in self.on_device) or tuple(LIKE[name] for name in self.names)
        self.names = left
        if self.last in self.on_device:
            self.last, self._for = LIKE[self.last] if LIKE[self.last] in left else left[0], (0, 0.0)

    def coded_there(self, coder: str, plain: int, seconds: float) -> None:
        """The GPU took so long for so many bytes."""
        if coder in self.on_device and plain > 0:
            self.on_device[coder].learn(seconds / plain)

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

    def taken_there(self, coder: str, size: int, plain: int, taking: float, undoing: float) -> None:
        """The other end took so much of a processor to receive and open an encoded extent, and to decode it."""
        if plain >= TOLD_FROM:
            self.take.learn(taking / size)
            self.undo[coder].learn(undoing / plain)

    def wire_rate(self) -> float:
        """Bytes a second."""
        return min(self.wire.value, self.limit) if self.limit else self.wire.value

    def cost(self, name: str, size: int, plain: int, guess: float) -> float:
        """Seconds that the slowest stage takes for an extent of `size` bytes of which `plain` are to be coded."""
        out = self.leaves(name, plain, guess)
        here = size * self.scan.value + plain * self.seconds[name].value + out * (self.ship.value + WIRE_WORTH)
        there = out * self.take.value + plain * self.undo[name].value
        if self.shared:
            stages = [(here + there) / self.processors, out / self.limit if self.limit else 0.0]
        else:
            stages = [here / self.threads, there / self.there, out / self.wire_rate()]
        if name in self.on_device:
            stages.append(plain * self.on_device[name].value)
        longest = max(stages)
        return longest + SERIAL * (sum(stages) - longest)

    def wire_binds(self, size: int, plain: int) -> bool:
        """Whether the wire, not the processors, is what holds an extent up, by the coder that was chosen last: only then is it worth their time to look for what need not be sent."""
        name = self.last
        out = self.leaves(name, plain, self.guess.value)
        wire = out / self.limit if self.limit else 0.0
        processors = size * self.scan.value + plain * self.seconds[name].value + out * self.ship.value
        device = plain * self.on_device[name].value if name in self.on_device else 0.0
        if self.shared:
            return wire > max(device, (processors + out * self.take.value + plain * self.undo[name].value) / self.processors)
        return out / self.wire_rate() > max(device, processors / self.threads)

    def leaves(self, name: str, plain: int, guess: float) -> float:
        """Bytes that a coder leaves of so many."""
        return plain / (1 + self.factors[name].value * max(0.0, guess - 1))

    def choose(self, size: int, plain: int, guess: float) -> Coder:
        """The coder for an extent."""
        self.taken += 1
        if self.taken % HOLDS and abs(plain - self._for[0]) <= ALIKE * plain and abs(guess - self._for[1]) <= ALIKE * guess:
            return _coder(self.last)
        self.guess.learn(guess)
        coder = self._choose(size, plain, guess)
        self.last, self._for = coder.name, (plain, guess)
        return coder

    def _choose(self, size: int, plain: int, guess: float) -> Coder:
        costs = {name: self.cost(name, size, plain, guess) for name in self.names}
        ranked = sorted(costs, key=costs.__getitem__)
        if len(ranked) > 1 and self.taken % EXPLORE_EVERY == 0:  # a multiple of HOLDS
            return _coder(ranked[1])
        alike = [name for name in ranked if costs[name] <= (1 + TIE) * costs[ranked[0]]]
        return _coder(min(alike, key=lambda name: self.leaves(name, plain, guess)))


def _coder(name: str) -> Coder:
    return BY_NAME.get(name) or ON_GPU[name]


def guess_of(plain: memoryview) -> float:
    """Ratio of a sample of the bytes, by the quickest coder."""
    size, sample = len(plain), bytes(plain[:SAMPLE])
    if size > SAMPLE:
        step = size // SPOTS
        sample = b"".join([plain[at : at + SAMPLE // SPOTS] for at in range((step - SAMPLE // SPOTS) // 2 & ~63, size - SAMPLE // SPOTS + 1, step)])
    return max(1.0, len(sample) / max(1, len(BY_NAME["lz4-fast"].encode(sample))))


def names_of(text: str) -> tuple[str, ...]:
    """Coder names from `lz4,zstd-1` or `auto`; raises ValueError naming those there are."""
    if text == "auto":
        return FREE
    names = tuple(text.split(","))
    known = {coder.name for coder in CODERS} | ON_GPU.keys()
    wrong = [name for name in names if name not in known]
    if set(wrong) & {"snappy", "nv-snappy"}:
        raise ValueError(f"codecs: {NO_SNAPPY}")
    if wrong:
        raise ValueError(f"codecs: {', '.join(wrong)} unknown; give auto or some of {', '.join(sorted(known))}")
    return names
