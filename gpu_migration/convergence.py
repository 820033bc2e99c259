"""Whether another pass over a source that changes is worth its time, or the source is to be paused and switched over, or the move given up. Pure.

After two proposals of KubeVirt: VEP 248 (stall detection: the bandwidth smoothed, the remaining bytes held against the
best so far with a margin, a last window at the ceiling, then an end) and VEP 291 (the downtime allowed starts low and rises by steps). A switch-over stops the source for

    implied downtime = overhead + remaining / bandwidth

where the overhead is what a switch-over takes with nothing left to send. Nothing is switched over above the ceiling, and nothing is given up that could be.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum

SMOOTHING = 0.4
"""Weight of the newest bandwidth against those before. Source: VEP 248, ewmaAlpha."""
MARGIN = 0.04
"""Share by which the remaining bytes must fall below the best so far to count as progress. Source: VEP 248, stallMargin."""
STALL_S = 40.0
"""Seconds without progress. Source: KubeVirt, DefaultStallProgressTimeout."""
HOPELESS = 1.5
"""Times the ceiling above which the best of a window without progress needs no second one. Source: VEP 248, precopyPossibleFactor."""
FIRST_S = 0.15
"""Downtime allowed at first, seconds: an idle source gets no more. Source: VEP 291."""
CEILING_S = 0.9
"""Downtime allowed at most, seconds. Source: VEP 248, maxDowntimeMs."""
STEPS = 7
"""Raises from the first to the ceiling. Source: VEP 291."""
COOL_DOWN_S = 10.0
"""Seconds between two raises, so that each has its chance. Source: VEP 291."""
PASSES_BEFORE_RAMP = 3
"""Passes before the first raise: by then a source that converges has shown it. Source: VEP 291, iterationsBeforeStart."""
PASSES_MOST = 2000
"""Passes in all: some 20 ms each over a small source must not go on for ever."""
SECONDS_A_GIB = 150.0
"""Seconds in all for each GiB of the source, and at least so many. Source: KubeVirt, completionTimeoutPerGiB."""
SAMPLE_LEAST = 4 << 20
"""Bytes of a pass that say something of the bandwidth; fewer say more of buffers and delays. The first sample is taken whatever its size."""


class Reason(StrEnum):
    """Why a move was given up."""

    STALLED = "stalled"
    PASSES = "passes"
    SECONDS = "seconds"


class Next(StrEnum):
    """What to do."""

    PASS = "pass"
    SWITCH = "switch"
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass and the look at the source after it."""

    sent: float
    """Bytes brought over in this pass; 0 says nothing of the bandwidth."""
    sending: float
    """Seconds in which they were."""
    seconds: float
    """Seconds of all of it, the look too."""
    remaining: float
    """Bytes found changed afterwards."""
    overhead: float = 0.0
    """Seconds that a switch-over takes with nothing left to send."""

    def __post_init__(self) -> None:
        for name in ("sent", "sending", "seconds", "remaining", "overhead"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"pass: {name} is {value}; give a number of at least 0")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a move may cost. Seconds."""

    first: float = FIRST_S
    ceiling: float = CEILING_S
    steps: int = STEPS
    cool_down: float = COOL_DOWN_S
    stall: float = STALL_S
    passes: int = PASSES_MOST
    seconds: float = SECONDS_A_GIB

    def __post_init__(self) -> None:
        for name in ("first", "ceiling", "cool_down", "stall", "seconds"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"limits: {name} is {value}; give seconds of at least 0")
        if self.first > self.ceiling:
            raise ValueError(f"limits: first is {self.first:g} s and above the ceiling of {self.ceiling:g} s; give no more than that")
        for name in ("steps", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"limits: {name} is {getattr(self, name)}; give at least 1")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What comes next, and what it rests on."""

    next: Next
    implied: float
    """Seconds the source would stand still if it were switched over now; infinite where no bandwidth is known."""
    allowed: float
    """Seconds of downtime allowed at present."""
    reason: Reason | None = None


@dataclass(slots=True)
class Control:
    """Takes one pass after the other; `after` says what is next. Ends after `limits.passes` passes at the latest."""

    limits: Limits = field(default_factory=Limits)
    bandwidth: float = 0.0
    """Bytes a second, smoothed; 0: none known."""
    passes: int = 0
    elapsed: float = 0.0
    allowed: float = field(init=False)
    _best: float = math.inf
    _best_implied: float = math.inf
    _progress_at: float = 0.0
    _raised_at: float = -math.inf
    _last_window: bool = False

    def __post_init__(self) -> None:
        self.allowed = self.limits.first

    def after(self, one: Pass) -> Verdict:
        """What comes next."""
        limits = self.limits
        self.passes += 1
        self.elapsed += one.seconds
        self._learn(one)
        implied = self._implied(one)
        self._best_implied = min(self._best_implied, implied)
        if one.remaining < self._best * (1 - MARGIN):
            self._best, self._progress_at = one.remaining, self.elapsed
        if implied > self.allowed:
            self._ramp()
        if implied <= self.allowed:
            return Verdict(Next.SWITCH, implied, self.allowed)
        reason = self._end()
        if reason is None:
            return Verdict(Next.PASS, implied, self.allowed)
        # Whatever runs out: before it is given up, all that may be allowed is.
        self.allowed = limits.ceiling
        if implied <= limits.ceiling:
            return Verdict(Next.SWITCH, implied, self.allowed)
        if reason is Reason.STALLED and not self._last_window and self._best_implied <= HOPELESS * limits.ceiling:
            # A source that comes in bursts: its next low is waited for, once.
            self._last_window, self._progress_at = True, self.elapsed
            return Verdict(Next.PASS, implied, self.allowed)
        return Verdict(Next.GIVE_UP, implied, self.allowed, reason)

    def _learn(self, one: Pass) -> None:
        if not one.sent or not one.sending or (self.bandwidth and one.sent < SAMPLE_LEAST):
            return
        sample = one.sent / one.sending
        self.bandwidth = SMOOTHING * sample + (1 - SMOOTHING) * self.bandwidth if self.bandwidth else sample

    def _implied(self, one: Pass) -> float:
        if not one.remaining:
            return one.overhead
        return one.overhead + one.remaining / self.bandwidth if self.bandwidth else math.inf

    def _ramp(self) -> None:
        """One step up, where it is time."""
        limits = self.limits
        if self.passes >= PASSES_BEFORE_RAMP and self.allowed < limits.ceiling and self.elapsed - self._raised_at >= limits.cool_down:
            self.allowed = min(limits.ceiling, self.allowed + (limits.ceiling - limits.first) / limits.steps)
            self._raised_at = self.elapsed

    def _end(self) -> Reason | None:
        if self.passes >= self.limits.passes:
            return Reason.PASSES
        if self.elapsed >= self.limits.seconds:
            return Reason.SECONDS
        return Reason.STALLED if self.elapsed - self._progress_at >= self.limits.stall else None
