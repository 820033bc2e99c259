"""What is done to pages before a codec sees them: one face, back ends behind it. Pages are 64-bit words of shape (pages, 512)."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Flags = NDArray[np.bool_]


class Transforms(Protocol):
    """A back end. Every function is exact, so that all back ends make the same bytes; inputs are never changed."""

    name: str

    def constant(self, pages: Words) -> Flags:
        """Pages whose words are all the same; zero pages too."""

    def equal(self, pages: Words, others: Words) -> Flags:
        """Pages that are equal to their counterpart, every byte compared."""

    def xor(self, pages: Words, others: Words) -> Words:
        """Page by page."""

    def signatures(self, pages: Words) -> Words:
        """One 64-bit number a page, the same for equal pages. Unequal pages may share one, and an attacker can make them: never trust it alone."""

    def dense(self, pages: Words) -> Flags:
        """Pages that no codec will shrink, as random, encrypted or compressed data: by a sample, so a guess, which costs bytes at worst."""
