"""What repeats: the mean of a metric by its place in a day, a week, or a period found in the data. Pure.

A profile is told only once it is proven: its error, measured one reading ahead as everything here, must beat that of the plain level.
"""

import math
from array import array
from operator import mul

from .packing import Packer, Unpacker

DAY_MS, WEEK_MS = 86_400_000, 604_800_000

DAY_BINS = 96
"""Quarters of an hour."""

WEEK_BINS = 168
"""Hours."""

FOUND_BINS = 64
"""Of a period that was found: 1.6 % of it."""

LEARN = 0.2
"""Weight of the newest cycle in a bin once a few are known: a changed habit is the rule after five cycles."""

TRUSTED = 3
OUTLIER = 8.0
"""Once a bin knows three cycles, an error over eight mean errors counts as eight: a fault on Monday is hardly expected again on Tuesday."""

ERROR_MEMORY = 1.0 / 256
"""Weight of the newest error in the mean errors that decide which profile is proven."""

PROVEN = 0.7
"""A profile is used where its mean error is below so much of the level's."""

CYCLES_LEAST = 2.0
"""Cycles seen before a profile may be used."""

LEVEL = 0.05
"""Weight of the newest value in the plain level that a profile has to beat: twenty readings."""

RING = 256
"""Readings looked at for an unknown period, which is therefore at most half as many readings."""

PERIOD_LEAST = 8
"""Readings of the shortest period: below it a profile would be noise."""

CORRELATION_LEAST = 0.5
"""Autocorrelation at the period found: half of the variance repeats."""

PERIOD_SAME = 0.03
"""A period found anew within 3 % of the one in use is the same, and what was learned of it stays."""


class Profile:
    """Means by phase of one period; `bins` of them. A bin takes in the mean of its readings when the phase leaves it, so that what is
    told for a phase always comes from earlier cycles and never from the reading before."""

    __slots__ = ("bins", "count", "cycles", "error", "index", "means", "open_ms", "period_ms", "seen_ms", "total")

    def __init__(self, period_ms: int, bins: int) -> None:
        self.period_ms = period_ms
        self.bins = bins
        self.means = array("d", bytes(8 * bins))
        self.cycles = array("d", bytes(8 * bins))
        self.error = 0.0
        self.seen_ms = 0.0
        self.index, self.open_ms, self.total, self.count = 0, 0, 0.0, 0

    def predict(self, at_ms: int) -> float | None:
        """The mean at this phase in the cycles before; None where it was never seen."""
        index = at_ms % self.period_ms * self.bins // self.period_ms
        return self.means[index] if self.cycles[index] else None

    def learn(self, at_ms: int, value: float, apart_ms: int) -> None:
        """Take one value in, `apart_ms` after the one before."""
        index = at_ms % self.period_ms * self.bins // self.period_ms
        self.seen_ms += min(apart_ms, self.period_ms / 8)
        if self.cycles[index]:
            error = abs(value - self.means[index])
            self.error += ERROR_MEMORY * (error - self.error) if self.error else error
        if index != self.index or not 0 <= at_ms - self.open_ms <= self.period_ms // 2:
            self._close()
            self.index, self.open_ms, self.total, self.count = index, at_ms, 0.0, 0
        self.total += value
        self.count += 1

    def _close(self) -> None:
        if not self.count:
            return
        index, mean = self.index, self.total / self.count
        cycles = self.cycles[index]
        if not cycles:
            self.means[index], self.cycles[index] = mean, 1.0
            return
        error = mean - self.means[index]
        if cycles >= TRUSTED:
            most = OUTLIER * self.error
            error = most if error > most else -most if error < -most else error
        self.means[index] += max(LEARN, 1.0 / (cycles + 1.0)) * error
        self.cycles[index] = cycles + 1.0

    def pack(self, into: Packer) -> None:
        """Write what was learned."""
        into.put(self.period_ms, self.error, self.seen_ms, self.index, self.open_ms, self.total, self.count)
        into.put_list(self.means)
        into.put_list(self.cycles)

    @classmethod
    def unpack(cls, state: Unpacker, bins: int) -> "Profile":
        """The profile as it was."""
        made = cls(max(1, state.take_count()), bins)
        made.error, made.seen_ms = state.take(), state.take()
        made.index, made.open_ms, made.total, made.count = state.take_count(bins - 1), state.take_time(), state.take(), state.take_count()
        made.means, made.cycles = array("d", state.take_list(bins)), array("d", state.take_list(bins))
        state.expect(len(made.means) == len(made.cycles) == bins and made.error >= 0 and all(cycles >= 0 for cycles in made.cycles), "profile")
        return made


class PeriodFinder:
    """Looks for a period in the newest `RING` readings, one lag per reading, so that no reading pays for all."""

    __slots__ = ("best", "best_lag", "falling", "lag", "ring", "snapshot", "variance")

    def __init__(self) -> None:
        self.ring = array("d")
        self.snapshot = array("d")
        self.variance = 0.0
        self.lag = 0
        self.best, self.best_lag = 0.0, 0
        self.falling = False

    def add(self, value: float) -> int:
        """Take one reading in; at the end of a sweep the period in readings, 0 where there is none, -1 while looking."""
        ring = self.ring
        ring.append(value)
        if not self.snapshot:
            if len(ring) < RING:
                return -1
            mean = math.fsum(ring) / RING
            self.snapshot = array("d", [item - mean for item in ring])
            self.variance = sum(map(mul, self.snapshot, self.snapshot))
            del ring[:]
            self.lag, self.best, self.best_lag, self.falling = 2, 0.0, 0, False
            if not self.variance > 0 or not math.isfinite(self.variance):
                self.snapshot = array("d")
                return 0
            return -1
        lag, series = self.lag, self.snapshot
        correlation = sum(map(mul, series, series[lag:])) / self.variance * RING / (RING - lag)
        # Only past the first fall below a third: the slope down from lag 0 is no period.
        if correlation < CORRELATION_LEAST / 1.5:
            self.falling = True
        elif self.falling and lag >= PERIOD_LEAST and correlation > max(CORRELATION_LEAST, self.best * 1.1):
            self.best, self.best_lag = correlation, lag
        self.lag += 1
        if self.lag > RING // 2:
            self.snapshot = array("d")
            return self.best_lag
        return -1


class Season:
    """The profiles of one stream, and which of them is proven best."""

    __slots__ = ("active", "finder", "level", "level_error", "profiles", "started")

    def __init__(self) -> None:
        self.profiles: list[Profile] = [Profile(DAY_MS, DAY_BINS), Profile(WEEK_MS, WEEK_BINS)]
        self.finder = PeriodFinder()
        self.level = 0.0
        self.level_error = 0.0
        self.started = False
        self.active = -1

    def expected(self, at_ms: int) -> float | None:
        """What the proven profile says for a time; None where none is proven or it never saw this phase."""
        return self.profiles[self.active].predict(at_ms) if self.active >= 0 else None

    def learn(self, at_ms: int, value: float, apart_ms: int, interval_ms: float) -> bool:
        """Take one value in, `apart_ms` after the one before; True where another profile is in use from now on."""
        if not self.started:
            self.level, self.started = value, True
        error = abs(value - self.level)
        self.level += LEVEL * (value - self.level)
        self.level_error += ERROR_MEMORY * (error - self.level_error) if self.level_error else error
        best, best_error = -1, PROVEN * self.level_error
        for number, profile in enumerate(self.profiles):
            profile.learn(at_ms, value, apart_ms)
            if profile.error < best_error and profile.seen_ms >= CYCLES_LEAST * profile.period_ms:
                best, best_error = number, profile.error
        found = self.finder.add(value)
        if found > 0:
            self._found(round(found * interval_ms))
        # The one in use stays while it is proven and no other is clearly better.
        active = self.active
        if best != active and (best < 0 or active < 0 or best_error < 0.9 * self.profiles[active].error):
            self.active = best
            return True
        return False

    def _found(self, period_ms: int) -> None:
        """Start a profile of the period found, unless there is one already; a day is the day's."""
        if period_ms < FOUND_BINS or any(abs(period_ms - profile.period_ms) <= PERIOD_SAME * profile.period_ms for profile in self.profiles):
            return
        del self.profiles[2:]
        if self.active >= 2:
            self.active = -1
        self.profiles.append(Profile(period_ms, FOUND_BINS))

    def pack(self, into: Packer) -> None:
        """Write what was learned."""
        into.put(self.started, self.level, self.level_error, self.active + 1, len(self.profiles))
        for profile in self.profiles:
            profile.pack(into)
        finder = self.finder
        into.put(finder.variance, finder.lag, finder.best, finder.best_lag, finder.falling)
        into.put_list(finder.ring)
        into.put_list(finder.snapshot)

    @classmethod
    def unpack(cls, state: Unpacker) -> "Season":
        """The profiles as they were."""
        made = cls()
        made.started = bool(state.take_count(1))
        made.level, made.level_error = state.take(), state.take()
        made.active, count = state.take_count(3) - 1, state.take_count(3)
        state.expect(count >= 2 and made.active < count, "profiles")
        made.profiles = [Profile.unpack(state, bins) for bins in (DAY_BINS, WEEK_BINS, FOUND_BINS)[:count]]
        finder = made.finder
        finder.variance, finder.lag, finder.best = state.take(), state.take_count(RING), state.take()
        finder.best_lag, finder.falling = state.take_count(RING), bool(state.take_count(1))
        finder.ring, finder.snapshot = array("d", state.take_list(RING)), array("d", state.take_list(RING))
        state.expect(not finder.snapshot or (len(finder.snapshot) == RING and finder.variance > 0 and 2 <= finder.lag <= RING // 2), "period")
        return made
