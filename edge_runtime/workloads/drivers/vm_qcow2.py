"""The header of a disk in QEMU's format qcow2: read and checked before QEMU opens a disk that nobody vouches for, and written for an empty disk that lies over another. Pure.

The format: docs/interop/qcow2.txt of QEMU. A header can name other files (a backing file, a file for the data): QEMU opens them with its own rights, so a disk that names any is refused. What
QEMU itself would not open (encrypted, marked as damaged, of features that are not known here) is refused too, with the reason.
"""

import struct
from dataclasses import dataclass

MAGIC = b"QFI\xfb"
"""The first bytes of every qcow2 disk."""

HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
"""Of version 2: magic, version, backing file (offset, bytes), cluster bits, size, encryption, L1 table (entries, offset), refcount table (offset, clusters), snapshots (count, offset)."""

MORE = struct.Struct(">QQQII")
"""What version 3 adds: incompatible, compatible and autoclear features, refcount order, bytes of the header."""

LOOK = 65_536
"""Bytes of a disk that are looked at: header and extensions lie in its first cluster; what of them is beyond 64 KiB is taken for damage."""

MAX_BYTES = 1 << 46
"""Size of a disk at most (64 TiB): beyond it no node of ours has room, and QEMU's own tables grow past its limits."""

CLUSTER_BITS = range(9, 22)
"""Clusters of 512 bytes to 2 MiB: what QEMU takes."""

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = 1, 2, 4, 8, 16
"""Incompatible features. Of a dirty or corrupt disk QEMU would have to repair the tables first."""

BACKING_FORMAT, DATA_FILE_NAME, END = 0xE279_2ACA, 0x4441_5441, 0
"""Types of header extensions."""

MAX_EXTENSIONS = 64
"""Extensions of a header; QEMU writes four."""

CLUSTER = 65_536
"""Bytes of a cluster of the disks that we make (QEMU's default)."""


class BadDisk(Exception):
    """A disk that is not taken; the text says why."""


@dataclass(frozen=True, slots=True)
class Header:
    """What is needed of a disk: its version, and the bytes that a guest sees."""

    version: int
    bytes: int


def check(data: bytes, length: int) -> Header:
    """The header of a disk. Raises `BadDisk`.

    Args:
        data: its first bytes, `LOOK` at most.
        length: bytes of the file.
    """
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise BadDisk("it does not begin as a qcow2 disk does")
    _, version, backing_at, backing_bytes, cluster_bits, size, encryption, l1_entries, l1_at, refcounts_at, _, _, snapshots_at = HEADER.unpack_from(data)
    if version not in (2, 3):
        raise BadDisk(f"it is of version {version}, and 2 and 3 are known")
    if backing_at or backing_bytes:
        raise BadDisk("it names a backing file, which would be a file of this node")
    if encryption:
        raise BadDisk("it is encrypted")
    if cluster_bits not in CLUSTER_BITS:
        raise BadDisk(f"its clusters have 2^{cluster_bits} bytes")
    if not 0 < size <= MAX_BYTES or size % 512:
        raise BadDisk(f"a disk of {size} bytes cannot be")
    if l1_entries * 8 > 32 << 20 or l1_at + l1_entries * 8 > length or refcounts_at >= length or snapshots_at > length:
        raise BadDisk("its tables are beyond its end: it was cut off")
    header = HEADER.size
    if version == 3:
        if len(data) < HEADER.size + MORE.size:
            raise BadDisk("its header was cut off")
        incompatible, _, _, order, header = MORE.unpack_from(data, HEADER.size)
        if incompatible & DATA_FILE:
            raise BadDisk("it names a file for its data, which would be a file of this node")
        if incompatible & (DIRTY | CORRUPT):
            raise BadDisk("it is marked as not closed or damaged")
        if incompatible & ~(COMPRESSION | EXTENDED_L2):
            raise BadDisk(f"it has features that are not known here ({incompatible:#x})")
        if order > 6:
            raise BadDisk(f"its reference counts have 2^{order} bits")
        if not HEADER.size + MORE.size <= header <= len(data) or header % 8:
            raise BadDisk(f"its header has {header} bytes")
    _check_extensions(data, header)
    return Header(version, size)


def _check_extensions(data: bytes, at: int) -> None:
    for _ in range(MAX_EXTENSIONS):
        if at + 8 > len(data):
            raise BadDisk("its header has no end")
        kind, size = struct.unpack_from(">II", data, at)
        if kind == END:
            return
        if kind == DATA_FILE_NAME:
            raise BadDisk("it names a file for its data, which would be a file of this node")
        at += 8 + -(-size // 8) * 8
    raise BadDisk(f"its header has more than {MAX_EXTENSIONS} extensions")


def empty(size: int) -> tuple[bytes, int]:
    """An empty disk of `size` bytes (a multiple of 512): its first bytes, and the length to which its file has to be made (what is not given is zero).

    It names no backing file: who opens it says over what it lies.
    """
    entries = -(-size // (CLUSTER * (CLUSTER // 8)))
    table = -(-entries * 8 // CLUSTER)
    header = HEADER.pack(MAGIC, 3, 0, 0, 16, size, 0, entries, 3 * CLUSTER, CLUSTER, 1, 0, 0) + MORE.pack(0, 0, 0, 4, HEADER.size + MORE.size)
    counts = struct.pack(">Q", 2 * CLUSTER)
    used = b"\0\1" * (3 + table)
    return header.ljust(CLUSTER, b"\0") + counts.ljust(CLUSTER, b"\0") + used, (3 + table) * CLUSTER
