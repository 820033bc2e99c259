"""Theil-Sen: the slope of a noisy series that a few jumps do not bend, and how well it is known."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

Z95 = 1.96
"""Standard normal quantile of a two-sided 95 % interval."""

POINTS_MIN = 8
"""Fewer points than this say nothing about a slope."""


@dataclass(frozen=True, slots=True)
class Slope:
    """The median of the slopes between all pairs, and its 95 % interval, in units of y per unit of x."""

    value: float
    low: float
    high: float


def theil_sen(points: Sequence[tuple[float, float]]) -> Slope:
    """The slope of `points` (x, y), x all different; the interval is Sen's, from the variance of Kendall's S. Raises ValueError for too few points."""
    count = len(points)
    if count < POINTS_MIN:
        raise ValueError(f"points: {count} are too few for a slope; take {POINTS_MIN} or more")
    slopes = sorted((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2))
    half = Z95 * (count * (count - 1) * (2 * count + 5) / 18) ** 0.5 / 2
    low, high = max(0, round(len(slopes) / 2 - half)), min(len(slopes) - 1, round(len(slopes) / 2 + half))
    return Slope(statistics.median(slopes), slopes[low], slopes[high])


def blocks(points: Sequence[tuple[float, float]], length: float) -> list[tuple[float, float]]:
    """One point per stretch of `length` of x: the medians. Samples taken soon after each other are hardly two opinions, and would feign certainty."""
    parts: dict[int, list[tuple[float, float]]] = {}
    for x, y in points:
        parts.setdefault(int(x // length), []).append((x, y))
    return [(statistics.median(x for x, _ in part), statistics.median(y for _, y in part)) for _, part in sorted(parts.items())]
