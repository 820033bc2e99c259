"""How strange a reading is: four novelties, each against all that lies in living memory, the greatest of them counts. Pure.

The value itself finds what never was. The other three look at what a usual value can hide: a sustained distance from the daily or other pattern
(a day that did not happen), the roughness of the signal from reading to reading (a new swing or an unnatural calm), and the size of its deviations
(a pattern that comes apart). They are smoothed, count less, and are told later, because a false alarm costs more than a late one.
"""

import math

from .novelty import Novelty
from .packing import Packer, Unpacker
from .season import Season

STRANGE = 0.038
"""Distance from everything seen, in units of the scale (between the inner and the full range), that is strange: 3.8 % of what the metric does. The one
number between alarms and silence, set so that a score of 0.99 is the line that does best over the benchmark's streams and made ones (0.03 to 0.04
do nearly as well on the former, 0.04 to 0.05 on the latter)."""

VALUE_POINTS = 256
FEATURE_POINTS = 64
"""Points of the covers: more score the same on every stream that was tried."""

FEATURE_WARM_UP = 1_000
"""Readings before a smoothed feature counts: a dozen readings share one smoothed value, so its range is learned a dozen times more slowly."""

FEATURE_WEIGHT = 0.5
"""What a feature's distance counts against the value's: a feature's range is smaller than the value's, so the same share of it means less."""

FEATURE_MEMORY = 12
"""Readings that a feature is smoothed over: long enough that one reading alone moves it little, short enough to be told within an hour at five minutes each."""

QUIET = 0.05
"""Part of the usual step (or deviation) that is as good as none: the logarithm must not tell 0 from nearly 0."""

USUAL = 1.0 / 1_000
"""Weight of the newest step and deviation in what is usual."""


class Feature:
    """A smoothed quantity and its novelty."""

    __slots__ = ("mean", "novelty", "usual")

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget all: what is fed means something else from now on."""
        self.novelty = Novelty(FEATURE_POINTS, FEATURE_WARM_UP)
        self.mean = 0.0
        self.usual = 0.0

    def observe(self, value: float) -> float:
        """Take one value in; its strangeness."""
        self.mean += (value - self.mean) / min(FEATURE_MEMORY, self.novelty.count + 1)
        return FEATURE_WEIGHT * self.novelty.observe(self.mean)

    def observe_size(self, size: float) -> float:
        """Take one magnitude in by its logarithm against what is usual, so that calm is as strange as storm."""
        count = self.novelty.count + 1
        self.usual += max(USUAL, 1.0 / count) * (size - self.usual)
        return self.observe(math.log(size / self.usual + QUIET)) if self.usual > 0 else 0.0

    def pack(self, into: Packer) -> None:
        """Write what was learned."""
        into.put(self.mean, self.usual)
        self.novelty.pack(into)

    def unpack(self, state: Unpacker) -> None:
        """Take back what was learned."""
        self.mean, self.usual = state.take(), state.take()
        state.expect(self.usual >= 0, "features")
        self.novelty = Novelty.unpack(state, FEATURE_POINTS, FEATURE_WARM_UP)


class Strangeness:
    """Judges and learns one stream; `season` is the pattern it follows."""

    __slots__ = ("_deviation", "_last", "_roughness", "_size", "_value", "season")

    def __init__(self) -> None:
        self._value = Novelty(VALUE_POINTS)
        self._deviation = Feature()
        self._roughness = Feature()
        self._size = Feature()
        self._last: float | None = None
        self.season = Season()

    def of_value(self, value: float) -> float:
        """Strangeness of a value that is not to be learned; 1 is strange."""
        return self._value.distance(value) / STRANGE

    def observe(self, at_ms: int, value: float, apart_ms: int, interval_ms: float) -> tuple[float, bool]:
        """Judge one value, then learn it.

        Args:
            apart_ms: since the value before; `interval_ms`: as it usually is.

        Returns its strangeness (1 is strange), and whether another pattern is followed from now on.
        """
        season = self.season
        greatest = self._value.observe(value)
        if self._last is not None:
            greatest = max(greatest, self._roughness.observe_size(abs(value - self._last)))
        self._last = value
        pattern = season.expected(at_ms)
        if pattern is not None:
            greatest = max(greatest, self._deviation.observe(value - pattern))
        if season.started:
            greatest = max(greatest, self._size.observe_size(abs(value - (season.level if pattern is None else pattern))))
        changed = season.learn(at_ms, value, apart_ms, interval_ms)
        if changed:
            self._deviation.restart()
            self._size.restart()
        return greatest / STRANGE, changed

    def pack(self, into: Packer) -> None:
        """Write what was learned."""
        into.put(self._last is not None, self._last or 0.0)
        self._value.pack(into)
        for feature in (self._deviation, self._roughness, self._size):
            feature.pack(into)
        self.season.pack(into)

    @classmethod
    def unpack(cls, state: Unpacker) -> "Strangeness":
        """As it was."""
        made = cls()
        known, last = state.take_count(1), state.take()
        made._last = last if known else None
        made._value = Novelty.unpack(state, VALUE_POINTS)
        for feature in (made._deviation, made._roughness, made._size):
            feature.unpack(state)
        made.season = Season.unpack(state)
        return made
