"""The transforms on the processor, by numpy: whole extents at a time, which keeps them in a core's cache and the interpreter out of the way."""

import numpy as np

from . import Flags, Words

_SAMPLED_WORDS = np.array([1, 37, 101, 173, 256, 339, 421, 490])
"""Words of a page that its signature mixes; a page that differs elsewhere only costs one comparison more."""

_MIX = np.array([0x9E3779B97F4A7C15 * (2 * n + 1) & 0xFFFFFFFFFFFFFFFF | 1 for n in range(8)], np.uint64)
"""Odd multipliers, one a sampled word."""

_SAMPLE_STRIDE = 61
"""Bytes between those sampled by `dense`: coprime to every record length that occurs, so that all columns of a table are seen."""

_DENSE_DISTINCT = 52
"""Distinct values among the 64 sampled bytes from which a page counts as dense: random bytes give 56.7 with a deviation of 2.2, machine code below 45."""


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
        if not len(pages):
            return np.zeros(0, np.bool_)
        sample = pages.view(np.uint8)[:, 17 :: _SAMPLE_STRIDE][:, :64]
        keys = sample + (np.arange(len(pages), dtype=np.int32) << 8)[:, None]
        seen = np.zeros(len(pages) << 8, np.bool_)
        seen[keys.ravel()] = True
        return np.asarray(np.add.reduce(seen.reshape(len(pages), 256).view(np.uint8), axis=1, dtype=np.uint16) >= _DENSE_DISTINCT)


CPU = Cpu()
