"""When will it cross the line: a local linear trend with its uncertainty, at two memories. Pure.

Exponentially discounted least squares in real time (Brown, 1963, "Smoothing, Forecasting and Prediction of Discrete Time Series", general
exponential smoothing), kept as six sums around the newest reading, so that irregular intervals need no care and long runs lose no digits.
"""

import math
from typing import NamedTuple

from .packing import Packer, Unpacker

FAST, SLOW = 24, 128
"""Memories in readings. The slow one is preferred, as its slope is 12 times better known, until the fast one contradicts it."""

LEAST = 8
"""Readings before a trend is told."""

SURE = 2.0
"""Standard errors by which a slope must differ from 0 (or from the slow one), and half the width of the interval told: about 95 %."""

FARTHEST_MS = 10 * 365 * 86_400_000
"""Crossings farther off than ten years are none."""


class Crossing(NamedTuple):
    """Milliseconds from the newest reading until the threshold is crossed: expected, earliest and latest (None: perhaps never) at about 95 %."""

    in_ms: int
    earliest_ms: int
    latest_ms: int | None


class Line(NamedTuple):
    """Level now, slope per millisecond, their standard errors."""

    level: float
    slope: float
    level_error: float
    slope_error: float


class Trend:
    """One discounted regression; `add` takes milliseconds since the last reading and the change of the value since then."""

    __slots__ = ("keep", "sums")

    def __init__(self, memory: int) -> None:
        self.keep = 1.0 - 1.0 / memory
        self.sums = [0.0] * 6  # weight, t, tt, x, tx, xx with the newest reading at t = 0, x = 0

    def add(self, apart: float, change: float) -> None:
        """Take one reading in."""
        w, t, tt, x, tx, xx = self.sums
        keep = self.keep
        # Shift the origin to the new reading, then discount, then count it (it adds only weight, being the origin).
        self.sums = [
            keep * w + 1.0, keep * (t - apart * w), keep * (tt - 2 * apart * t + apart * apart * w),
            keep * (x - change * w), keep * (tx - change * t - apart * x + apart * change * w), keep * (xx - 2 * change * x + change * change * w),
        ]

    def line(self) -> Line | None:
        """The line through the recent readings, relative to the newest value; None where there is none."""
        w, t, tt, x, tx, xx = self.sums
        if w < LEAST * 0.8:
            return None
        spread = tt - t * t / w
        if not spread > 0 or not math.isfinite(spread):
            return None
        slope = (tx - t * x / w) / spread
        level = (x - slope * t) / w
        variance = max(0.0, (xx - x * x / w - slope * slope * spread) / w)
        error = math.sqrt(variance / spread)
        return Line(level, slope, math.sqrt(variance / w + (error * t / w) ** 2), error)


class Forecast:
    """The trend of one stream."""

    __slots__ = ("fast", "last", "last_ms", "slow", "started")

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget: after a gap, or where what is fed changes its meaning."""
        self.fast, self.slow = Trend(FAST), Trend(SLOW)
        self.last, self.last_ms, self.started = 0.0, 0, False

    def add(self, at_ms: int, value: float) -> None:
        """Take one plausible reading in; a time that does not advance counts as the same moment."""
        if self.started:
            apart, change = float(max(0, at_ms - self.last_ms)), value - self.last
        else:
            apart = change = 0.0
            self.started = True
        self.fast.add(apart, change)
        self.slow.add(apart, change)
        self.last, self.last_ms = value, at_ms

    def line(self) -> Line | None:
        """The line to extrapolate, at the newest reading; its slope is 0 where it is not sure to differ from 0."""
        fast, slow = self.fast.line(), self.slow.line()
        if fast is None or slow is None:
            return None
        apart = math.hypot(fast.slope_error, slow.slope_error)
        chosen = fast if abs(fast.slope - slow.slope) > SURE * apart else slow
        level = self.last + chosen.level
        if abs(chosen.slope) <= SURE * chosen.slope_error:
            return Line(level, 0.0, chosen.level_error, 0.0)
        return chosen._replace(level=level)

    def crossing(self, threshold: float, rising: bool) -> Crossing | None:
        """When the line crosses `threshold`; None where it does not. A newest value beyond it already gives 0."""
        sign = 1.0 if rising else -1.0
        if not self.started:
            return None
        if sign * (self.last - threshold) >= 0:
            return Crossing(0, 0, 0)
        line = self.line()
        if line is None or sign * line.slope <= 0:
            return None
        slope, way = sign * line.slope, max(0.0, sign * (threshold - line.level))
        expected = way / slope
        if not expected <= FARTHEST_MS:
            return None
        margin = SURE * line.level_error
        earliest = max(0.0, way - margin) / (slope + SURE * line.slope_error)
        slowest = slope - SURE * line.slope_error
        latest = (way + margin) / slowest if slowest > 0 else math.inf
        return Crossing(int(expected), int(earliest), int(latest) if latest <= FARTHEST_MS else None)

    def pack(self, into: Packer) -> None:
        """Write what was learned."""
        into.put(self.started, self.last_ms, self.last, *self.fast.sums, *self.slow.sums)

    @classmethod
    def unpack(cls, state: Unpacker) -> "Forecast":
        """The trend as it was."""
        made = cls()
        made.started = bool(state.take_count(1))
        made.last_ms, made.last = state.take_time(), state.take()
        made.fast.sums = [state.take() for _ in range(6)]
        made.slow.sums = [state.take() for _ in range(6)]
        return made
