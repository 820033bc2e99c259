"""The hash tree of dm-verity (Documentation/admin-guide/device-mapper/verity.rst), computed here so that nothing has to be mounted, by the builder and by the device that puts a slot together. Pure."""

import hashlib
from dataclasses import dataclass

BLOCK = 4096
"""Bytes of a block of data and of hashes: a page, what the kernel reads at once."""

_PER_BLOCK = BLOCK // hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class Verity:
    """`blocks` of data, the tree's bytes (they stand right after the data), the root's hash, the salt."""

    blocks: int
    tree: bytes
    root: bytes
    salt: bytes

    def table(self, device: str) -> str:
        """The device-mapper table for a device that holds data and tree, one behind the other."""
        return f"0 {self.blocks * BLOCK // 512} verity 1 {device} {device} {BLOCK} {BLOCK} {self.blocks} {self.blocks} sha256 {self.root.hex()} {self.salt.hex()}"


class Hasher:
    """The tree of data that comes block by block, so that a device need not hold a slot in memory.

    Args:
        salt: goes before each block (format 1).
    """

    def __init__(self, salt: bytes) -> None:
        self._salt, self._salted = salt, hashlib.sha256(salt)
        self._hashes = bytearray()

    def _of(self, block: bytes | memoryview) -> bytes:
        one = self._salted.copy()
        one.update(block)
        return one.digest()

    def add(self, data: bytes | memoryview) -> None:
        """A whole number of blocks; raises ValueError."""
        if len(data) % BLOCK:
            raise ValueError(f"{len(data)} bytes are no whole number of blocks of {BLOCK}")
        view = memoryview(data)
        for at in range(0, len(view), BLOCK):
            self._hashes += self._of(view[at : at + BLOCK])

    def finish(self) -> Verity:
        """The tree, the top level first, as the kernel wants it. Raises ValueError where nothing was added."""
        size = hashlib.sha256().digest_size
        if not self._hashes:
            raise ValueError("no data")
        blocks = len(self._hashes) // size
        levels: list[bytes] = []
        below = bytes(self._hashes)
        while len(below) > size:
            level = b"".join(below[at : at + _PER_BLOCK * size].ljust(BLOCK, b"\0") for at in range(0, len(below), _PER_BLOCK * size))
            levels.append(level)
            below = b"".join(self._of(level[at : at + BLOCK]) for at in range(0, len(level), BLOCK))
        return Verity(blocks, b"".join(reversed(levels)), below, self._salt)


def hash_tree(data: bytes | memoryview, salt: bytes) -> Verity:
    """The tree over `data`, a whole number of blocks. Raises ValueError: no data, or no whole number of blocks."""
    if not len(data) or len(data) % BLOCK:
        raise ValueError(f"{len(data)} bytes are no whole number of blocks of {BLOCK}")
    hasher = Hasher(salt)
    hasher.add(data)
    return hasher.finish()
