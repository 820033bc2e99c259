"""The 128-bit hash of a page, the same on every back end: two sums of 512 products, each of a 32-bit half of a word with the other, keyed by the word's place (NH).

It proposes that two pages are equal and proves nothing: the keys are public, so that an attacker can make collisions, and every match is compared byte by byte.
"""

import numpy as np
from numpy.typing import NDArray

from . import Words

KEYS = (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93)
"""Of the two sums: word i has key (i + 1) times this, odd and without pattern."""
_WORDS = 512
_LOW = np.uint64(0xFFFFFFFF)
_WEYL = [(np.arange(1, _WORDS + 1, dtype=np.uint64) * np.uint64(key)) for key in KEYS]


def _spread(sums: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """MurmurHash3's finalizer: every bit of the sum reaches every bit of the hash."""
    sums = sums ^ (sums >> np.uint64(33))
    sums *= np.uint64(0xFF51AFD7ED558CCD)
    sums ^= sums >> np.uint64(33)
    sums *= np.uint64(0xC4CEB9FE1A85EC53)
    return sums ^ (sums >> np.uint64(33))


def hashes(pages: Words) -> Words:
    """Of pages of shape (n, 512): shape (n, 2)."""
    low, high = pages & _LOW, pages >> np.uint64(32)
    out = np.empty((len(pages), 2), np.uint64)
    for n, keys in enumerate(_WEYL):
        products = (low + (keys & _LOW)) & _LOW
        products *= (high + (keys >> np.uint64(32))) & _LOW
        out[:, n] = products.sum(axis=1, dtype=np.uint64)
    return _spread(out)
