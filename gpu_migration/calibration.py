"""Intervals that hold as often as they say, whatever the model is worth, from how far it was off before. Pure.

Conformalized quantile regression (Romano, Patterson, Candes 2019): the score of an outcome is how far it lay outside of the model's own interval, negative inside; an interval is the model's,
widened by the quantile of the last scores. Adaptive conformal inference (Gibbs, Candes 2021): that quantile's level moves with each outcome, so that on any sequence,
drifting machines too, the share that was missed comes to `1 - COVERAGE`.
"""

import math
from collections import deque
from collections.abc import Iterable

COVERAGE = 0.9
"""Share of the outcomes that shall lie in the interval."""
WINDOW = 300
"""Scores that count: the newest ones. The quantile at 0.9 of so many is known to two hundredths."""
GAIN = 0.02
"""By how much of an outcome's error the level moves: after 100 outcomes the shares are right to a hundredth. Source: between the 0.005 of Gibbs and Candes (long series) and quick ones."""
LEVELS = (0.5, 0.995)
"""Within which the level moves: however good a run was, no interval is promised narrower than half of the outcomes."""
LEAST = 20
"""Scores without which there is no interval."""


class Calibration:
    """The last scores and the level."""

    def __init__(self, scores: Iterable[float] = ()) -> None:
        self._scores: deque[float] = deque(scores, WINDOW)
        self.level = COVERAGE

    @property
    def known(self) -> bool:
        """There are enough of them."""
        return len(self._scores) >= LEAST

    def margin(self) -> float:
        """By how much the model's interval is to be widened on both sides, or narrowed."""
        ranked = sorted(self._scores)
        return ranked[min(len(ranked), max(1, math.ceil(self.level * (len(ranked) + 1)))) - 1]

    def learn(self, score: float) -> None:
        """An outcome's score, before the next interval is asked for."""
        if self.known:
            missed = score > self.margin()
            self.level = min(LEVELS[1], max(LEVELS[0], self.level + GAIN * (missed - (1 - COVERAGE))))
        self._scores.append(score)



def score(value: float, low: float, high: float) -> float:
    """How far outside."""
    return max(low - value, value - high)
