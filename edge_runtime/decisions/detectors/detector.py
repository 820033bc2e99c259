"""One stream of readings in; how strange each is, what it is worth, and when a line will be crossed, out. Pure: no clock, no I/O.

An alarm is the first of an episode: what follows within `COOL_DOWN` readings scores only where it is stranger still, so that one fault is one alarm.

Never raises at a value, never becomes NaN, bounded memory (state of at most 32 KiB).
"""

import math
from collections import deque
from typing import NamedTuple

from .forecast import SURE, Crossing, Forecast
from .packing import DetectorStateError, Packer, Unpacker
from .quality import BACKWARDS, GAP, NOT_FINITE, OUT_OF_RANGE, SPIKE, SUSPECT, QualityGate
from .strangeness import Strangeness

COOL_DOWN = 120
"""Readings after something strange within which only something stranger counts."""

FAINT = 0.2
"""Strangeness (1 is strange) below which a reading is nothing and leaves no trace in the cool-down."""

EPISODE_MAX = 64
"""Entries of the cool-down, whose strangeness only falls from oldest to newest: more are not needed to tell the strangest."""

LARGEST = 1e100
"""Magnitude to which values are cut, so that no difference or square overflows; a quality says so long before."""

STRANGEST = 1e6
"""Most strangeness that is told: keeps the arithmetic finite where a scale is next to nothing."""

USUAL = 0.125
"""Weight of the newest value in what is expected where no pattern is proven."""

WALK_MAX = 200
"""Steps of a forecast along a pattern."""


class Observation(NamedTuple):
    """What a detector says to one reading.

    `score` 0 (usual) to 1; `quality` one of `QUALITIES`; `value` as it was read (None where it is not finite); `expected` before it was seen (None: no idea yet).
    """

    score: float
    quality: str
    value: float | None
    expected: float | None

    def quality_within(self, low: float, high: float) -> str:
        """The quality where the sensor can only measure `low` to `high`."""
        return OUT_OF_RANGE if self.value is not None and not low <= self.value <= high else self.quality


class Detector:
    """Learns one stream from its first reading on.

    `observe` readings in their order; `newest` is the last answer; `time_to` asks for a threshold; `export_state` and `from_state` carry it over a restart.
    """

    __slots__ = ("_count", "_episode", "_forecast", "_gate", "_strangeness", "_usual", "newest")

    def __init__(self) -> None:
        self._gate = QualityGate()
        self._strangeness = Strangeness()
        self._forecast = Forecast()
        self._episode: deque[tuple[int, float]] = deque(maxlen=EPISODE_MAX)
        self._count = 0
        self._usual: float | None = None
        self.newest: Observation | None = None

    def observe(self, at_ms: int, value: float) -> Observation:
        """Judge one reading, then learn from it.

        Args:
            at_ms: when it was measured, milliseconds since 1970; may jump.
            value: any number.
        """
        try:
            value = float(value)
        except OverflowError:  # an integer beyond every double
            value = math.inf
        expected = self._strangeness.season.expected(at_ms)
        if expected is None:
            expected = self._usual
        if not math.isfinite(value):
            self.newest = Observation(0.0, NOT_FINITE, None, expected)
            return self.newest
        read = value
        value = LARGEST if value > LARGEST else -LARGEST if value < -LARGEST else value
        gate = self._gate
        apart_ms = max(0, at_ms - gate.last_ms) if gate.count else 0
        quality = gate.observe(at_ms, value)
        self._count += 1
        if quality is SUSPECT:
            strangeness = self._strangeness.of_value(value)
        else:
            strangeness = self._learn(at_ms, value, apart_ms, quality)
        self.newest = Observation(self._alarm(strangeness), quality, read, expected)
        return self.newest

    def _learn(self, at_ms: int, value: float, apart_ms: int, quality: str) -> float:
        """The strangeness of a value, which is learned."""
        strangeness, changed = self._strangeness.observe(at_ms, value, apart_ms, self._gate.interval_ms)
        if changed:
            self._forecast.restart()
        if quality is GAP or quality is BACKWARDS:
            self._forecast.restart()
        if quality is not SPIKE:
            pattern = self._strangeness.season.expected(at_ms)
            self._forecast.add(at_ms, value if pattern is None else value - pattern)
            self._usual = value if self._usual is None else self._usual + USUAL * (value - self._usual)
        return strangeness

    def _alarm(self, strangeness: float) -> float:
        """The score: 0.99 at a strangeness of 1, 0.9999 at 2; 0 where the episode saw as strange a reading already."""
        if not strangeness > FAINT:
            return 0.0
        strangeness = min(strangeness, STRANGEST)
        episode, now = self._episode, self._count
        while episode and episode[0][0] < now - COOL_DOWN:
            episode.popleft()
        first = not episode or strangeness > episode[0][1]
        while episode and episode[-1][1] <= strangeness:
            episode.pop()
        episode.append((now, strangeness))
        return 1.0 - 0.01**strangeness if first else 0.0

    def time_to(self, threshold: float, *, rising: bool, within_ms: int) -> Crossing | None:
        """When the metric will be beyond `threshold`, looking at most `within_ms` ahead where a pattern is followed; None where it will not, or nobody knows."""
        newest = self.newest
        if newest is None or newest.value is None or not math.isfinite(threshold):
            return None
        sign = 1.0 if rising else -1.0
        if sign * (newest.value - threshold) >= 0:
            return Crossing(0, 0, 0)
        season = self._strangeness.season
        if season.active < 0:
            return self._forecast.crossing(threshold, rising)
        line = self._forecast.line()
        if line is None:
            return None
        now_ms = self._gate.last_ms
        profile = season.profiles[season.active]
        step = max(profile.period_ms // profile.bins, within_ms // WALK_MAX, 1)
        margin = SURE * max(line.level_error, profile.error)
        found: list[int | None] = [None, None, None]
        for ahead_ms in range(step, within_ms + step, step):
            pattern = profile.predict(now_ms + ahead_ms)
            if pattern is None:
                continue
            beyond = sign * (pattern + line.level + line.slope * ahead_ms - threshold)
            for place, reach in enumerate((0.0, margin, -margin)):
                if found[place] is None and beyond + reach >= 0:
                    found[place] = min(ahead_ms, within_ms)
            if found[2] is not None:
                break
        expected, earliest, latest = found
        return Crossing(expected, earliest if earliest is not None else expected, latest) if expected is not None else None

    # -- state ---------------------------------------------------------------------------------------------------------------

    def export_state(self) -> str:
        """What was learned, as text for `from_state`."""
        into = Packer()
        into.put(self._count, self._usual is not None, self._usual or 0.0)
        into.put_list(item for entry in self._episode for item in entry)
        self._gate.pack(into)
        self._strangeness.pack(into)
        self._forecast.pack(into)
        return into.text()

    @classmethod
    def from_state(cls, state: object) -> "Detector":
        """A detector that goes on from what `export_state` gave; raises `DetectorStateError` where it is damaged or of another form."""
        source = Unpacker(state)
        made = cls()
        made._count = source.take_count()
        known, usual = source.take_count(1), source.take()
        made._usual = usual if known else None
        episode = source.take_list(2 * EPISODE_MAX)
        source.expect(len(episode) % 2 == 0, "episode")
        made._episode.extend((int(at), strangeness) for at, strangeness in zip(episode[::2], episode[1::2], strict=True))
        made._gate = QualityGate.unpack(source)
        made._strangeness = Strangeness.unpack(source)
        made._forecast = Forecast.unpack(source)
        source.end()
        return made


__all__ = ["Detector", "DetectorStateError", "Observation"]
