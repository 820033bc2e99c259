"""The transforms on the processor, by numpy: whole extents at a time, which keeps them in a core's cache and the interpreter out of the way."""

import numpy as np
from numpy.typing import NDArray

from . import DENSE_DISTINCT, Facts, Flags, Rows, Words

_SAMPLE_FIRST, _SAMPLE_STRIDE, _SAMPLES = 17, 61, 8
"""Which words of a page are sampled: in so few lines of the cache, yet each at another place of its line, so that all columns of a table of small records are seen."""

_MIX = np.array([0x9E3779B97F4A7C15 * (2 * n + 1) & 0xFFFFFFFFFFFFFFFF | 1 for n in range(8)], np.uint64)
"""Odd multipliers, one for each sampled word."""

_BITS = np.array([bin(n).count("1") for n in range(1 << 16)], np.uint8)
"""Ones of every 16 bits."""


def sampled(pages: Words) -> Words:
    """8 words of each page."""
    end = _SAMPLE_FIRST + _SAMPLE_STRIDE * _SAMPLES
    return pages[:, _SAMPLE_FIRST:end:_SAMPLE_STRIDE].copy()


def distinct(sample: Words) -> NDArray[np.uint16]:
    """Distinct values among every second byte of each page's sample."""
    values = sample.view(np.uint8)[:, ::2].astype(np.uint16)  # of 16 bits, which are sorted by vector instructions
    values.sort(axis=1)
    return np.asarray(np.count_nonzero(values[:, 1:] != values[:, :-1], axis=1) + 1, np.uint16)


def population(pages: Words) -> NDArray[np.int64]:
    """Ones of each page."""
    return np.asarray(_BITS[pages.view(np.uint16)].sum(axis=1, dtype=np.int64))


class Cpu:
    """See `Transforms`."""

    name = "cpu"

    def constant(self, pages: Words) -> Flags:
        # A glance at three words rules out nearly every page that is not constant.
        first = pages[:, 0]
        found: Flags = (first == pages[:, 511]) & (first == pages[:, 129])
        maybe = found.nonzero()[0]
        if len(maybe):
            chosen, fills = (pages, first) if len(maybe) == len(pages) else (pages[maybe], first[maybe])
            same = chosen.max(axis=1) == fills
            others = (same & (fills != 0)).nonzero()[0]  # where the largest word is zero, all are
            if len(others):
                same[others] = chosen[others].min(axis=1) == fills[others]
            found[maybe] = same
        return found

    def equal(self, pages: Words, others: Words) -> Flags:
        found: Flags = (pages[:, 0] == others[:, 0]) & (pages[:, 511] == others[:, 511]) & (pages[:, 200] == others[:, 200])
        maybe = np.flatnonzero(found)
        if len(maybe) == len(pages):
            return np.asarray(~np.bitwise_xor(pages, others).any(axis=1))
        if len(maybe):
            found[maybe] = ~np.bitwise_xor(pages[maybe], others[maybe]).any(axis=1)
        return found

    def xor(self, pages: Words, others: Words) -> Words:
        return np.bitwise_xor(pages, others)

    def signatures(self, sample: Words) -> Words:
        """Of each page's sampled words; a page that differs elsewhere only costs one comparison more."""
        mixed = sample * _MIX
        mixed ^= mixed >> np.uint64(29)
        total: Words = mixed.sum(axis=1, dtype=np.uint64)
        return total

    def scan(self, pages: Words, base: Words | None) -> Facts:
        return _Asked(self, pages, base)


class _Asked:
    """Facts that are found when they are asked for: most pages of most extents need only the first."""

    def __init__(self, cpu: Cpu, pages: Words, base: Words | None) -> None:
        self._cpu, self._pages, self._base = cpu, pages, base
        self._sample: Words | None = None

    def _sampled(self) -> Words:
        if self._sample is None:
            self._sample = sampled(self._pages)
        return self._sample

    def constant(self) -> Flags:
        return self._cpu.constant(self._pages)

    def unchanged(self) -> Flags:
        if self._base is None:
            return np.zeros(0, np.bool_)
        return self._cpu.equal(self._pages[: len(self._base)], self._base)

    def population(self, rows: Rows) -> NDArray[np.int64]:
        assert self._base is not None
        return population(self._cpu.xor(self._pages[rows], self._base[rows]))

    def signatures(self, rows: Rows) -> Words:
        return self._cpu.signatures(self._sampled()[rows])

    def dense(self, rows: Rows) -> Flags:
        return np.asarray(distinct(self._sampled()[rows]) >= DENSE_DISTINCT)


CPU = Cpu()
