"""The partition table (GUID partition table, UEFI 2.10 chapter 5), as bytes. Pure."""

import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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


class Readable(Protocol):
    """What has bytes that a slice gives: a memory map, `bytes`."""

    def __getitem__(self, part: slice, /) -> bytes: ...


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


def read(disk: Readable, disk_bytes: int) -> dict[str, tuple[int, int]]:
    """Partitions by name, start and size in bytes, of a disk of that size, as a kernel that is told `gpt` and a firmware find them: by the table at the front, where that is damaged by the one in the last sectors.

    Args:
        disk: gives the bytes of a slice, as a memory map does.

    Raises:
        ValueError: neither is whole.
    """
    for own in (1, disk_bytes // SECTOR - 1):
        header = bytes(disk[own * SECTOR : (own + 1) * SECTOR])
        if len(header) < SECTOR:
            break
        signature, _, size, check, _, at, _, _, _, _, entries_at, count, entry_bytes, entries_check = struct.unpack_from("<8sIIIIQQQQ16sQIII", header)
        if signature != b"EFI PART" or size != 92 or at != own or zlib.crc32(header[:16] + bytes(4) + header[20:92]) != check or (count, entry_bytes) != (ENTRIES, ENTRY_BYTES):
            continue
        entries = bytes(disk[entries_at * SECTOR : entries_at * SECTOR + ENTRIES * ENTRY_BYTES])
        if zlib.crc32(entries) != entries_check:
            continue
        found = {}
        for entry in (entries[begin : begin + ENTRY_BYTES] for begin in range(0, len(entries), ENTRY_BYTES)):
            first, last = struct.unpack_from("<QQ", entry, 32)
            if any(entry[:16]):
                found[entry[56:].decode("utf-16-le").rstrip("\0")] = (first * SECTOR, (last - first + 1) * SECTOR)
        return found
    raise ValueError("neither partition table is whole")
