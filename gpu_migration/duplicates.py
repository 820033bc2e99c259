"""Pages that the destination holds already elsewhere in the object: a table from signature to page, and a look at the source to make sure.

What it proposes rests on three things, and none is trusted: the signature is a sample, so the page is read again and compared byte by byte; the source may have changed since that page went
out, and the destination may be writing it anew, so the destination checks the hash of the whole extent, and where it does not agree asks for the extent without references.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .layout import PAGE, PAGES
from .transforms import Rows, Words

SLOTS_MOST = 1 << 22
"""Pages that are remembered at the most: those of 16 GiB, 48 MiB of table. A later page takes the place of an earlier one."""
_NONE = 0xFFFFFFFF


class PageIndex:
    """Threads may share it: a reading that another thread is writing proposes a page that is not equal, which the comparison sees."""

    def __init__(self, pages: int, read: Callable[[int], bytes], held: Callable[[int], bool]) -> None:
        """`read`: a page of the source, empty where it cannot be had; `held`: whether the destination holds an extent."""
        slots = 1 << min(pages.bit_length(), SLOTS_MOST.bit_length() - 1)
        self._shift = np.uint64(64 - (slots.bit_length() - 1))
        self._marks = np.zeros(slots, np.uint64)
        self._pages = np.full(slots, _NONE, np.uint32)
        self._read, self._held = read, held

    def _slots(self, marks: Words) -> NDArray[np.uint64]:
        return np.asarray(marks >> self._shift)

    def find(self, index: int, pages: Words, rows: Rows, marks: Words) -> tuple[Rows, Words]:
        """Of those pages of an extent, the ones that are equal to a page of another extent that the destination holds: (page, number of that page in the object)."""
        slots = self._slots(marks)
        numbers = self._pages[slots]
        maybe = np.flatnonzero((self._marks[slots] == marks) & (numbers != _NONE) & (numbers // PAGES != index))
        same: list[int] = []
        unlike: list[int] = []
        for at, row, number in zip(maybe.tolist(), rows[maybe].tolist(), numbers[maybe].tolist(), strict=True):
            if self._held(number // PAGES):
                # A page at a time: equal ones seldom follow each other, and two reads cost less than taking arrays apart.
                (same if self._read(number).ljust(PAGE, b"\0") == pages[row].tobytes() else unlike).append(at)
        if unlike:
            self._pages[slots[unlike]] = _NONE
        return rows[same], numbers[same].astype(np.uint64)

    def note(self, index: int, rows: Rows, marks: Words) -> None:
        """Those pages of an extent go out with their content; whoever is equal to one may refer to it once the destination holds it."""
        slots = self._slots(marks)
        new = (self._marks[slots] != marks) | (self._pages[slots] == _NONE)
        slots = slots[new]
        self._pages[slots] = (rows[new] + index * PAGES).astype(np.uint32)
        self._marks[slots] = marks[new]
