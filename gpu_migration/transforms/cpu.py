"""The transforms on the processor, by numpy: whole extents at a time, which keeps them in a core's cache and the interpreter out of the way."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import DENSE_DISTINCT, Facts, Flags, Rows, Words

_SAMPLED_WORDS = np.array([1, 37, 101, 173, 256, 339, 421, 490])
"""Words of a page that its signature mixes; a page that differs elsewhere only costs one comparison more."""

_MIX = np.array([0x9E3779B97F4A7C15 * (2 * n + 1) & 0xFFFFFFFFFFFFFFFF | 1 for n in range(8)], np.uint64)
"""Odd multipliers, one a sampled word."""

_SAMPLE_STRIDE = 61
"""Bytes between those sampled by `dense`: coprime to every record length that occurs, so that all columns of a table are seen."""

_BITS = np.array([bin(n).count("1") for n in range(1 << 16)], np.uint8)
"""Ones of every 16 bits."""


def distinct(pages: Words) -> NDArray[np.uint16]:
    """Distinct values among 64 bytes of each page."""
    sample = pages.view(np.uint8)[:, 17 :: _SAMPLE_STRIDE][:, :64]
    keys = sample + (np.arange(len(pages), dtype=np.int32) << 8)[:, None]
    seen = np.zeros(len(pages) << 8, np.bool_)
    seen[keys.ravel()] = True
    return np.asarray(np.add.reduce(seen.reshape(len(pages), 256).view(np.uint8), axis=1, dtype=np.uint16))


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
        maybe = np.flatnonzero(found)
        if len(maybe):
            chosen = pages if len(maybe) == len(pages) else pages[maybe]
            low = chosen.min(axis=1)
            found[maybe] = low == chosen.max(axis=1)
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

    def signatures(self, pages: Words) -> Words:
        sampled = pages[:, _SAMPLED_WORDS] * _MIX
        sampled ^= sampled >> np.uint64(29)
        total: Words = sampled.sum(axis=1, dtype=np.uint64)
        return total

    def dense(self, pages: Words) -> Flags:
        return np.asarray(distinct(pages) >= DENSE_DISTINCT)

    def scan(self, pages: Words, base: Words | None) -> Facts:
        return _Asked(self, pages, base)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Facts that are found when they are asked for: most pages of most extents need only the first."""

    cpu: Cpu
    pages: Words
    base: Words | None

    def constant(self) -> Flags:
        return self.cpu.constant(self.pages)

    def unchanged(self) -> Flags:
        if self.base is None:
            return np.zeros(0, np.bool_)
        return self.cpu.equal(self.pages[: len(self.base)], self.base)

    def population(self, rows: Rows) -> NDArray[np.int64]:
        assert self.base is not None
        return population(self.cpu.xor(self.pages[rows], self.base[rows]))

    def signatures(self, rows: Rows) -> Words:
        return self.cpu.signatures(self.pages)[rows]

    def dense(self, rows: Rows) -> Flags:
        return self.cpu.dense(self.pages if len(rows) == len(self.pages) else self.pages[rows])


CPU = Cpu()
