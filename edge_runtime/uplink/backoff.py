"""Back-off with full jitter that is reset only by a link that stayed up. Pure.

Full jitter (a uniform draw from zero to the bound) spreads the reconnects of a fleet after a broker's restart best; a reset at the
first connect would hammer a broker that accepts and drops.
"""

import random

MIN_PAUSE_S = 0.05
"""Never less than this between two tries: a refusal on loopback comes back in microseconds."""


class Backoff:
    """Pauses between tries.

    Args:
        base_s: bound of the first pause, seconds.
        cap_s: largest bound, seconds.
        stable_s: how long a link must stay up before the pauses begin anew, seconds.
        draw: uniform random numbers in [0, 1).
    """

    def __init__(self, base_s: float, cap_s: float, stable_s: float, draw: "random.Random | None" = None) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self._stable_s = stable_s
        self._random = draw or random.Random()
        self._failures = 0
        self._up_since_s: float | None = None

    @property
    def failures(self) -> int:
        """Tries since the last stable link."""
        return self._failures

    def link_up(self, now_s: float) -> None:
        """The link came up."""
        self._up_since_s = now_s

    def link_down(self, now_s: float) -> None:
        """The link went down; a stable one forgives what was before it."""
        if self._up_since_s is not None and now_s - self._up_since_s >= self._stable_s:
            self._failures = 0
        self._up_since_s = None

    def next_s(self) -> float:
        """Seconds to wait before the next try; each call counts as one failed try."""
        bound = min(self._cap_s, self._base_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return max(MIN_PAUSE_S, self._random.random() * bound)
