"""Sliding windows over one metric of one device. Pure.

A window keeps every sample while they are few; a long or busy window is kept in `MAX_CELLS` time cells with count, sum, squared deviations,
minimum and maximum, so that its memory is bounded (about 5 KiB) at the price of an edge that is up to one cell (span / 63) late.
`p95` needs samples and is answered from at most `MAX_CELLS` of them: the newest.
"""

import math
from collections import deque

MAX_CELLS = 64
"""Cells (or samples) of one window: 1.6 % of the span is the resolution of a long window."""

STATISTICS = ("mean", "min", "max", "sum", "count", "stddev", "rate", "first", "last", "p95")


class Window:
    """Samples of the last `span_ms` milliseconds.

    Args:
        span_ms: length of the window.
    """

    __slots__ = ("_cell_ms", "_cells", "span_ms")

    def __init__(self, span_ms: int) -> None:
        self.span_ms = span_ms
        self._cell_ms = max(1, -(-span_ms // (MAX_CELLS - 1)))  # so that a span lies in MAX_CELLS cells at most, wherever it begins: no sample of it is ever dropped
        # start ms, count, sum, sum of squared deviations from the cell's mean, min, max, first, last, last ms
        self._cells: deque[list[float]] = deque()

    def add(self, value: float, at_ms: int) -> None:
        """Take one sample in; times do not go backwards (monotonic clock)."""
        cells = self._cells
        if cells:
            cell = cells[-1]
            if len(cells) >= MAX_CELLS and at_ms // self._cell_ms == cell[0] // self._cell_ms:
                # Welford's update: sums of squares lose everything where the mean is large against the spread.
                before = value - cell[2] / cell[1]
                cell[1] += 1
                cell[2] += value
                cell[3] += before * (value - cell[2] / cell[1])
                cell[4] = min(cell[4], value)
                cell[5] = max(cell[5], value)
                cell[7] = value
                cell[8] = at_ms
                self._expire(at_ms)
                return
        cells.append([at_ms, 1, value, 0.0, value, value, value, value, at_ms])
        if len(cells) > MAX_CELLS:
            self._expire(at_ms)
            if len(cells) > MAX_CELLS:
                self._compact()

    def _expire(self, now_ms: int) -> None:
        cells = self._cells
        oldest = now_ms - self.span_ms
        while cells and cells[0][8] <= oldest:
            cells.popleft()

    def _compact(self) -> None:
        """Merge what lies in one cell; cells lie on a grid, so that at most `MAX_CELLS` remain. (Merged wherever they fit, neighbours would leave cells half full, and need up to twice as many.)"""
        merged: deque[list[float]] = deque()
        for cell in self._cells:
            if merged and cell[0] // self._cell_ms == merged[-1][0] // self._cell_ms:
                into = merged[-1]
                apart = cell[2] / cell[1] - into[2] / into[1]
                into[3] += cell[3] + apart * apart * into[1] * cell[1] / (into[1] + cell[1])  # Chan's merge
                into[1] += cell[1]
                into[2] += cell[2]
                into[4] = min(into[4], cell[4])
                into[5] = max(into[5], cell[5])
                into[7] = cell[7]
                into[8] = cell[8]
            else:
                merged.append(cell)
        self._cells = merged

    def count(self, now_ms: int) -> int:
        """Samples in the window."""
        self._expire(now_ms)
        return int(sum(cell[1] for cell in self._cells))

    def statistic(self, name: str, now_ms: int) -> tuple[float, int] | None:
        """`(value, samples)` of one of `STATISTICS`; None where the window is empty (or too short for a rate).

        `rate` is the change per second from the first to the last sample.
        """
        self._expire(now_ms)
        cells = self._cells
        if not cells:
            return (0.0, 0) if name == "count" else None
        count = 0.0
        for cell in cells:
            count += cell[1]
        samples = int(count)
        if name == "count":
            return count, samples
        if name == "last":
            return cells[-1][7], samples
        if name == "first":
            return cells[0][6], samples
        if name == "min":
            return min(cell[4] for cell in cells), samples
        if name == "max":
            return max(cell[5] for cell in cells), samples
        if name == "rate":
            elapsed = cells[-1][8] - cells[0][0]
            return ((cells[-1][7] - cells[0][6]) * 1000 / elapsed, samples) if elapsed > 0 else None
        if name == "p95":
            values = sorted(cell[7] for cell in cells)
            return values[max(0, math.ceil(0.95 * len(values)) - 1)], samples
        total = 0.0
        for cell in cells:
            total += cell[2]
        if name == "sum":
            return total, samples
        mean = total / count
        if name == "mean":
            return mean, samples
        deviations = sum(cell[3] + cell[1] * (cell[2] / cell[1] - mean) ** 2 for cell in cells)
        return math.sqrt(max(0.0, deviations / count)), samples

    @property
    def cells(self) -> int:
        """Cells in use, for the memory bound."""
        return len(self._cells)
