"""The hash tree of dm-verity (Documentation/admin-guide/device-mapper/verity.rst), computed here so that nothing has to be mounted. Pure."""

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


def hash_tree(data: bytes | memoryview, salt: bytes) -> Verity:
    """The tree over `data`, a whole number of blocks; the top level comes first, as the kernel wants it (format 1: salt before the block).

    Raises:
        ValueError: no data, or no whole number of blocks.
    """
    if not len(data) or len(data) % BLOCK:
        raise ValueError(f"{len(data)} bytes are no whole number of blocks of {BLOCK}")
    salted = hashlib.sha256(salt)

    def of(block: bytes | memoryview) -> bytes:
        one = salted.copy()
        one.update(block)
        return one.digest()

    view = memoryview(data)
    hashes = [of(view[at : at + BLOCK]) for at in range(0, len(view), BLOCK)]
    blocks = len(hashes)
    levels: list[bytes] = []
    while len(hashes) > 1:
        level = b"".join(b"".join(hashes[at : at + _PER_BLOCK]).ljust(BLOCK, b"\0") for at in range(0, len(hashes), _PER_BLOCK))
        levels.append(level)
        hashes = [of(level[at : at + BLOCK]) for at in range(0, len(level), BLOCK)]
    return Verity(blocks, b"".join(reversed(levels)), hashes[0], salt)
