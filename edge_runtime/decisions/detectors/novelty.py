"""How far a value lies from everything seen in living memory: one-dimensional nearest-neighbour distance over a bounded set of points. Pure.

The conformal idea of k-NN anomaly detection (Burnaev and Ishimtsev, 2016, arXiv:1608.04585) with k = 1 and one dimension, where the neighbour is found
by bisection and the reference set is a cover: a value close to a known point refreshes that point, only a value far from all becomes a new one.
A point unvisited for `MEMORY` readings is forgotten, so that what was normal long ago is strange again, and a new normal is strange once.
"""

import math
from array import array
from bisect import bisect_left
from itertools import pairwise

from .packing import Packer, Unpacker

MEMORY = 6_000
"""Readings that a point lives after its last visit. Between 4,000 and 7,000 little changes; 1,500 forgets the weekend, for ever never re-arms."""

SWEEP = 64
"""Readings between two looks for points to forget and the range: bounds how stale the range is."""

COVER = 1.0 / 1024
"""A new point is made farther than so much of the range from its neighbours; well below the distances that count as strange."""

TAIL = 0.005
"""Share of visits cut off at either end for the inner range."""

FULL_SHARE = 0.4
"""Weight (in the exponent) of the full range against the inner one in the scale: with the full range alone one wild value hides the next, with the inner
alone a heavy tail alarms at every step. Between 0.3 and 0.6 little changes."""

WARM_UP = 64
"""Least readings before a distance is told: of fewer values every second one is new."""


YOUNG = 2_000
YOUNG_SHARE = 0.3
"""Distances count less while fewer readings than `YOUNG` are known, by the share of them to this power (0.7 at a third): much is new to the young."""


class Novelty:
    """Points seen of one quantity.

    Args:
        limit: most points kept; where there are more, the closest neighbours are merged.
        warm_up: readings before a distance is told.
    """

    __slots__ = ("count", "hits", "limit", "points", "scale", "seen", "warm_up", "width")

    def __init__(self, limit: int, warm_up: int = WARM_UP) -> None:
        self.limit = limit
        self.warm_up = warm_up
        # Arrays of doubles take a quarter of what lists of floats take.
        self.points = array("d")
        self.seen = array("d")
        self.hits = array("d")
        self.count = 0
        self.width = 0.0
        self.scale = 0.0

    def distance(self, value: float) -> float:
        """Distance of `value` from the nearest point, in units of the scale (about the range). 0 while warming up."""
        if self.count < self.warm_up or not self.scale > 0:
            return 0.0
        index = bisect_left(self.points, value)
        above = self.points[index] - value if index < len(self.points) else math.inf
        below = value - self.points[index - 1] if index else math.inf
        return min(above, below) / self.scale * (1.0 if self.count >= YOUNG else (self.count / YOUNG) ** YOUNG_SHARE)

    def observe(self, value: float) -> float:
        """`distance`, and learn the value."""
        points = self.points
        self.count = count = self.count + 1
        if not points:
            points.append(value)
            self.seen.append(count)
            self.hits.append(1.0)
            return 0.0
        index = bisect_left(points, value)
        size = len(points)
        above = points[index] - value if index < size else math.inf
        below = value - points[index - 1] if index else math.inf
        nearest, apart = (index, above) if above < below else (index - 1, below)
        if apart <= self.width * COVER:
            self.seen[nearest] = count
            self.hits[nearest] += 1.0
        else:
            points.insert(index, value)
            self.seen.insert(index, count)
            self.hits.insert(index, 1.0)
            if size >= self.limit:
                self._merge()
        scale = self.scale
        if count % SWEEP == 0 or (count < WARM_UP and count & (count - 1) == 0):
            self._sweep()
        if count <= self.warm_up or not scale > 0:
            return 0.0
        return apart / scale if count >= YOUNG else apart / scale * (count / YOUNG) ** YOUNG_SHARE

    def _merge(self) -> None:
        points = self.points
        gaps = [after - before for before, after in pairwise(points)]
        at = gaps.index(min(gaps))
        # The later seen of the two stays, with the visits of both.
        out = at if self.seen[at] < self.seen[at + 1] else at + 1
        stays = at + (out == at)
        self.hits[stays] += self.hits[out]
        del points[out], self.seen[out], self.hits[out]

    def _sweep(self) -> None:
        oldest = self.count - MEMORY
        if min(self.seen) < oldest:
            kept = [index for index, seen in enumerate(self.seen) if seen >= oldest]
            self.points = array("d", [self.points[index] for index in kept])
            self.seen = array("d", [self.seen[index] for index in kept])
            self.hits = array("d", [self.hits[index] for index in kept])
        if self.count % (MEMORY // 2) < SWEEP:
            self.hits = array("d", [hits / 2 for hits in self.hits])
        points = self.points
        self.width = points[-1] - points[0]
        cut = TAIL * sum(self.hits)
        inner = self._quantile(cut, 1) - self._quantile(cut, -1)
        self.scale = self.width**FULL_SHARE * inner ** (1.0 - FULL_SHARE) if inner > 0 else self.width

    def _quantile(self, cut: float, side: int) -> float:
        """The point beyond which (upwards for 1, downwards for -1) `cut` of the visits lie."""
        passed = 0.0
        points, hits = (self.points[::-1], self.hits[::-1]) if side > 0 else (self.points, self.hits)
        for point, count in zip(points, hits, strict=True):
            passed += count
            if passed > cut:
                return point
        return points[-1]

    def pack(self, into: Packer) -> None:
        """Write what was learned."""
        into.put(self.count, self.width, self.scale)
        into.put_list(self.points)
        into.put_list(self.seen)
        into.put_list(self.hits)

    @classmethod
    def unpack(cls, state: Unpacker, limit: int, warm_up: int = WARM_UP) -> "Novelty":
        """The points as they were."""
        made = cls(limit, warm_up)
        made.count, made.width, made.scale = state.take_count(), state.take(), state.take()
        made.points, made.seen, made.hits = (array("d", state.take_list(limit)) for _ in range(3))
        state.expect(len(made.points) == len(made.seen) == len(made.hits) and list(made.points) == sorted(made.points) and (made.count == 0) == (not made.points), "points")
        state.expect(made.width >= 0 and made.scale >= 0 and all(hits >= 0 for hits in made.hits), "range")
        return made
