"""The partition table (GUID partition table, UEFI 2.10 chapter 5), as bytes. Pure."""

import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

SECTOR = 512
ALIGN_BYTES = 1 << 20
"""Partitions begin at whole MiB: every flash's erase block and every disk's sector divides it."""

ENTRIES = 128
ENTRY_BYTES = 128
TABLE_SECTORS = 1 + ENTRIES * ENTRY_BYTES // SECTOR
"""A header and the entries, at the front and again at the end."""

NAME_MAX = 36
"""Characters of a partition's name."""

TYPES = {
    "esp": uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"),
    "linux": uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4"),
}


@dataclass(frozen=True, slots=True)
class Partition:
    """`start` and `size` are bytes; `identity` tells this partition from every other one."""

    name: str
    kind: str
    start: int
    size: int
    identity: uuid.UUID


def lay_out(wanted: Sequence[tuple[str, str, int, uuid.UUID]]) -> tuple[list[Partition], int]:
    """Place partitions (name, kind, least bytes, identity) one behind the other; them, and the disk's size in bytes.

    Raises:
        ValueError: a name that is too long or used twice, an unknown kind, no size.
    """
    found: list[Partition] = []
    at = ALIGN_BYTES
    for name, kind, size, identity in wanted:
        if kind not in TYPES or size <= 0 or not 0 < len(name) <= NAME_MAX or any(name == other.name for other in found):
            raise ValueError(f"partition {name!r} of {size} bytes and kind {kind!r} cannot be")
        whole = -(-size // ALIGN_BYTES) * ALIGN_BYTES
        found.append(Partition(name, kind, at, whole, identity))
        at += whole
    if len(found) > ENTRIES:
        raise ValueError(f"{len(found)} partitions are too many")
    return found, at + ALIGN_BYTES


def tables(partitions: Sequence[Partition], disk_bytes: int, identity: uuid.UUID) -> tuple[bytes, bytes]:
    """What stands in the disk's first sectors (protective MBR, header, entries) and in its last ones (entries, header)."""
    sectors = disk_bytes // SECTOR
    entries = b"".join(
        TYPES[part.kind].bytes_le + part.identity.bytes_le
        + struct.pack("<QQQ", part.start // SECTOR, (part.start + part.size) // SECTOR - 1, 0) + part.name.encode("utf-16-le").ljust(2 * NAME_MAX, b"\0")
        for part in partitions
    ).ljust(ENTRIES * ENTRY_BYTES, b"\0")

    def header(own: int, other: int, entries_at: int) -> bytes:
        def packed(check: int) -> bytes:
            return struct.pack(
                "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x00010000, 92, check, 0, own, other, TABLE_SECTORS + 1, sectors - TABLE_SECTORS - 1,
                identity.bytes_le, entries_at, ENTRIES, ENTRY_BYTES, zlib.crc32(entries),
            )

        return packed(zlib.crc32(packed(0))).ljust(SECTOR, b"\0")

    protective = struct.pack("<BBBBBBBBII", 0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF, 1, min(sectors - 1, 0xFFFFFFFF))
    mbr = bytes(446) + protective + bytes(48) + b"\x55\xaa"
    return mbr + header(1, sectors - 1, 2) + entries, entries + header(sectors - 1, 1, sectors - TABLE_SECTORS)
