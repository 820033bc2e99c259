"""What one value of a sensor is worth before anybody reasons with it: a quality code, learned from the stream itself. Pure.

A lying sensor is told from a strange world by how it lies: it repeats itself longer than it ever did, jumps farther than it ever did and
comes back, reports what it cannot measure, or speaks out of turn. Everything learned here is a handful of numbers per stream.
"""

import math

from .packing import Packer, Unpacker

GOOD, OUT_OF_RANGE, SUSPECT, STUCK, SPIKE, GAP, BACKWARDS, NOT_FINITE = QUALITIES = (
    "good",  # nothing speaks against it
    "out_of_range",  # outside the limits that a rule gives for the sensor
    "suspect",  # farther from everything seen than a sensor of this kind can plausibly be (unit or decimal error, broken line)
    "stuck",  # the same value for longer than chance and history explain
    "spike",  # a jump unlike any before; becomes good where it comes back, or stays (then it was a level shift)
    "gap",  # the first value after a silence much longer than the usual interval
    "backwards",  # its time is before that of the value before it
    "not_finite",  # NaN, infinite, or no number a double can hold
)

WARM_UP = 30
"""Readings before `spike`, `suspect` and `gap` are said: below it the usual step and interval are hardly known."""

SPIKE_FACTOR = 4.0
"""Times the largest step in memory: a heavy-tailed signal doubles its record now and then, hardly ever quadruples it."""

SPIKE_MEAN_FACTOR = 10.0
"""And times the mean step, for signals whose largest step is tiny because they have hardly moved."""

SPIKE_RUN_MAX = 3
"""Values in a row that may be called a spike; the next one is a new level."""

STEPS_LEAST = 10
"""Changes of value seen before a step can be called unusual: a valve that moves for the first time is no spike."""

SUSPECT_FACTOR = 100.0
"""Times the range and magnitude of everything seen."""

SUSPECT_RUN_MAX = 10
"""Values in a row that may be called suspect before they are believed."""

STUCK_CHANCE = 1e-6
"""A run of equal values is stuck where the stream's own share of repeats makes it less likely than this ..."""

STUCK_RUN_FACTOR = 2
"""... and it is so many times the longest run seen (night after night of zeros is no fault) ..."""

STUCK_LEAST = 10
"""... and at least so many values: two readings between a sensor's updates repeat in good health."""

GAP_FACTOR = 3.0
GAP_DEVIATIONS = 10.0
"""A gap is over 3 mean intervals and 10 mean deviations of the interval: 1 in 5,000 where arrivals are random, none where they are regular."""

MEMORY = 1.0 / 64
"""Weight of the newest interval and step in their means."""

FADE = 0.999
"""Per reading, how the largest step fades: half after 700 readings, so that one wild hour does not blind the detector for good."""


class QualityGate:
    """Codes for one stream.

    `observe` gives the code of a value; values are at most 1e100 in magnitude, so that nothing here overflows.
    """

    __slots__ = (
        "anchor", "centre", "changes", "count", "deviation_ms", "interval_ms", "largest_step", "last", "last_ms", "longest_run", "magnitude", "mean_step", "odd_run",
        "repeats", "run",
    )

    def __init__(self) -> None:
        self.count = 0
        self.last_ms = 0
        self.last = 0.0
        self.anchor = 0.0
        self.centre = 0.0
        self.magnitude = 0.0
        self.interval_ms = 0.0
        self.deviation_ms = 0.0
        self.mean_step = 0.0
        self.largest_step = 0.0
        self.changes = 0
        self.repeats = 0
        self.run = 0
        self.longest_run = 0
        self.odd_run = 0

    def observe(self, at_ms: int, value: float) -> str:
        """The quality of one value; a value that is not finite changes nothing that was learned."""
        if not math.isfinite(value):
            return NOT_FINITE
        if not self.count:
            self.count, self.last_ms, self.last, self.anchor, self.centre, self.magnitude = 1, at_ms, value, value, value, abs(value)
            return GOOD
        self.count += 1
        timing = self._timing(at_ms)
        stuck = self._repeats(value)
        odd = self._distance(value)
        self.last = value
        return timing if timing is BACKWARDS else odd or stuck or timing

    def _timing(self, at_ms: int) -> str:
        apart, self.last_ms = at_ms - self.last_ms, at_ms
        if apart < 0:
            return BACKWARDS
        mean, deviation = self.interval_ms, self.deviation_ms
        late = self.count > WARM_UP and apart > max(GAP_FACTOR * mean, mean + GAP_DEVIATIONS * deviation) > 0
        weight = max(MEMORY, 1.0 / (self.count - 1))
        if self.count > WARM_UP:
            apart = min(apart, int(GAP_FACTOR * mean + GAP_DEVIATIONS * deviation) + 1)  # a week of silence does not make a week usual
        self.interval_ms = mean + weight * (apart - mean)
        self.deviation_ms = deviation + weight * (abs(apart - mean) - deviation)
        return GAP if late else GOOD

    def _repeats(self, value: float) -> str:
        if value != self.last:
            if self.run > self.longest_run:
                self.longest_run = self.run
            self.run = 0
            self.changes += 1
            return ""
        self.run += 1
        run = self.run
        if run >= STUCK_LEAST and run >= STUCK_RUN_FACTOR * self.longest_run and self.changes >= STEPS_LEAST:
            # Chance of a run so long, from the repeats before it; one repeat more than seen, so that it is never 0.
            before = self.repeats
            if run * math.log((before + 1) / (before + 1 + self.changes)) < math.log(STUCK_CHANCE):
                return STUCK
        self.repeats += 1
        return ""

    def _distance(self, value: float) -> str:
        step = abs(value - self.anchor)
        far = abs(value - self.centre)
        known = self.count > WARM_UP
        if known and self.magnitude > 0 and far > SUSPECT_FACTOR * self.magnitude and self.odd_run < SUSPECT_RUN_MAX:
            self.odd_run += 1
            return SUSPECT
        if (
            known and self.changes > STEPS_LEAST and self.odd_run < SPIKE_RUN_MAX and self.largest_step > 0
            and step > SPIKE_FACTOR * self.largest_step and step > SPIKE_MEAN_FACTOR * self.mean_step
        ):
            self.odd_run += 1
            return SPIKE
        self.odd_run = 0
        weight = max(MEMORY, 1.0 / self.count)
        self.mean_step += weight * (min(step, SPIKE_MEAN_FACTOR * self.mean_step + self.largest_step if self.largest_step else step) - self.mean_step)
        self.largest_step = max(self.largest_step * FADE, step)
        self.centre += weight * (value - self.centre)
        self.magnitude = max(self.magnitude * FADE, far, abs(value))
        self.anchor = value
        return ""

    def pack(self, into: Packer) -> None:
        """Write what was learned."""
        into.put(
            self.count, self.changes, self.repeats, self.run, self.longest_run, self.odd_run, self.last_ms, self.last, self.anchor, self.centre, self.magnitude,
            self.interval_ms, self.deviation_ms, self.mean_step, self.largest_step,
        )

    @classmethod
    def unpack(cls, state: Unpacker) -> "QualityGate":
        """The gate as it was."""
        made = cls()
        made.count, made.changes, made.repeats, made.run, made.longest_run, made.odd_run = (state.take_count() for _ in range(6))
        made.last_ms = state.take_time()
        made.last, made.anchor, made.centre, made.magnitude, made.interval_ms, made.deviation_ms, made.mean_step, made.largest_step = (state.take() for _ in range(8))
        return made
