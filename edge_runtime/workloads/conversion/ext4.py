"""Reads a file system of the kind ext4 from a file, without mounting it: what a guest wrote there is nobody's to vouch for, and a kernel that mounts it trusts it. Blocks.

Read are extents, folders (also hashed ones, whose blocks are read in order), symbolic links, devices and extended attributes, as mke2fs and Linux write them. Refused: a journal that would have to be
replayed, inline data, encryption, blocks beyond the file, names that are no names, loops. Source: Documentation/filesystems/ext4 of the kernel.
"""

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ..drivers.face import Refused

MAGIC, EXTENT_MAGIC, ATTRIBUTE_MAGIC = 0xEF53, 0xF30A, 0xEA02_0000

KNOWN = 0x0002 | 0x0040 | 0x0080 | 0x0200 | 0x2000
"""Incompatible features that can be read: types in folders, extents, 64 bits, flexible groups, a seed for checksums (which are not looked at), as mke2fs of Debian 13 has by default."""

NEEDS_RECOVERY = 0x0004

EXTENTS_FLAG, INLINE_FLAG, ENCRYPTED_FLAG = 0x0008_0000, 0x1000_0000, 0x0800

ROOT = 2
"""The root folder's number."""

MAX_ENTRIES = 500_000
"""Names in all of it, as of a layer."""

MAX_DEPTH = 128
"""Folders within folders."""

MAX_FOLDER = 64 << 20
"""Bytes of one folder."""

MAX_EXTENTS = 1 << 20
"""Of one file."""

CHUNK = 1 << 20
"""Bytes that are read at a time, of a multiple of the block's size."""

PREFIXES = {1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security.", 7: "system."}


@dataclass(frozen=True, slots=True)
class Node:
    """A file: its number, mode with type, owners, length, time (s), names that it has, the device it is, and where its extents stand."""

    number: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    links: int
    flags: int
    body: bytes
    more: bytes
    attributes_block: int

    @property
    def device(self) -> tuple[int, int]:
        """Major and minor."""
        old, new = struct.unpack_from("<II", self.body)
        return (old >> 8 & 0xFF, old & 0xFF) if old else (new >> 8 & 0xFFF, new & 0xFF | new >> 12 & 0xFFF00)


def _odd(problem: str) -> Refused:
    return Refused("disk", f"its file system cannot be read: {problem}", "end the guest in order, or look at the disk by e2fsck")


class Ext4:
    """One file system; used as a context.

    Args:
        path: the file, or the disk.
        offset: where it begins in it, bytes.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._offset = offset
        self._length = self._file.seek(0, os.SEEK_END) - offset
        try:
            self._open()
        except (struct.error, ZeroDivisionError):
            self._file.close()
            raise _odd("its beginning is cut off") from None
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        head = self._at(1024, 1024)
        if struct.unpack_from("<H", head, 56)[0] != MAGIC:
            raise _odd("it is none of the kind ext4")
        incompatible = struct.unpack_from("<I", head, 96)[0]
        if incompatible & NEEDS_RECOVERY:
            raise _odd("its journal has to be replayed")
        if incompatible & ~KNOWN or not incompatible & 0x0002:
            raise _odd(f"it has features that are not known here ({incompatible:#x})")
        self._first, log = struct.unpack_from("<II", head, 20)
        if log > 6:
            raise _odd("its blocks are too large")
        self.block = 1024 << log
        self._per_group, self._inode_size = struct.unpack_from("<I", head, 40)[0], struct.unpack_from("<H", head, 88)[0]
        self._inodes = struct.unpack_from("<I", head, 0)[0]
        wide = bool(incompatible & 0x0080)
        self._descriptor = struct.unpack_from("<H", head, 254)[0] if wide else 32
        if not 128 <= self._inode_size <= self.block or self._per_group < 1 or not 32 <= self._descriptor <= 1024:
            raise _odd("its sizes make no sense")

    def _at(self, offset: int, size: int) -> bytes:
        if offset < 0 or offset + size > self._length:
            raise _odd("it points beyond its end")
        self._file.seek(self._offset + offset)
        data = self._file.read(size)
        if len(data) != size:
            raise _odd("it is cut off")
        return data

    def node(self, number: int) -> Node:
        """A file by its number."""
        if not 1 <= number <= self._inodes:
            raise _odd(f"it names the file {number}, which there cannot be")
        group, at = divmod(number - 1, self._per_group)
        entry = self._at((self._first + 1) * self.block + group * self._descriptor, self._descriptor)
        table = struct.unpack_from("<I", entry, 8)[0] | (struct.unpack_from("<I", entry, 40)[0] << 32 if self._descriptor >= 64 else 0)
        raw = self._at(table * self.block + at * self._inode_size, self._inode_size)
        mode, uid, low = struct.unpack_from("<HHI", raw)
        mtime = struct.unpack_from("<I", raw, 16)[0]
        gid, links = struct.unpack_from("<HH", raw, 24)
        flags = struct.unpack_from("<I", raw, 32)[0]
        uid |= struct.unpack_from("<H", raw, 120)[0] << 16
        gid |= struct.unpack_from("<H", raw, 122)[0] << 16
        size = low | struct.unpack_from("<I", raw, 108)[0] << 32
        block = struct.unpack_from("<I", raw, 104)[0] | struct.unpack_from("<H", raw, 118)[0] << 32
        extra = struct.unpack_from("<H", raw, 128)[0] if self._inode_size > 130 else 0
        if flags & (INLINE_FLAG | ENCRYPTED_FLAG):
            raise _odd("a file's content is inline or encrypted")
        return Node(number, mode, uid, gid, size, mtime, links, flags, raw[40:100], raw[128 + extra:] if self._inode_size > 128 else b"", block)

    def _extents(self, node: Node) -> list[tuple[int, int, int]]:
        """First block in the file, how many, and where: 0 for those that are not written."""
        if not node.flags & EXTENTS_FLAG:
            raise _odd(f"the file {node.number} is kept in a way that is not known here")
        found: list[tuple[int, int, int]] = []

        def walk(data: bytes, left: int) -> None:
            magic, count, most, depth = struct.unpack_from("<HHHH", data)
            if magic != EXTENT_MAGIC or count > most or 12 + 12 * count > len(data) or depth > left:
                raise _odd(f"the extents of the file {node.number} make no sense")
            for at in range(count):
                if depth:
                    _, low, high = struct.unpack_from("<IIH", data, 12 + 12 * at)
                    walk(self._at((low | high << 32) * self.block, self.block), depth - 1)
                    continue
                first, size, high, low = struct.unpack_from("<IHHI", data, 12 + 12 * at)
                found.append((first, size if size <= 32_768 else size - 32_768, 0 if size > 32_768 else low | high << 32))
                if len(found) > MAX_EXTENTS or (len(found) > 1 and found[-2][0] + found[-2][1] > first):
                    raise _odd(f"the extents of the file {node.number} make no sense")

        walk(node.body, 5)
        return found

    def content(self, node: Node) -> Iterator[bytes]:
        """What a regular file or a folder holds, piece by piece; holes as zeros."""
        at = 0
        for first, count, where in [*self._extents(node), (-(-node.size // self.block), 0, 0)]:
            while at < min(first * self.block, node.size):  # a hole
                size = min(CHUNK, first * self.block - at, node.size - at)
                yield bytes(size)
                at += size
            end = min((first + count) * self.block, node.size)
            while at < end:
                size = min(CHUNK, end - at)
                yield self._at(where * self.block + at - first * self.block, size) if where else bytes(size)
                at += size

    def read(self, node: Node, most: int) -> bytes:
        """All of a file that has at most `most` bytes."""
        if node.size > most:
            raise _odd(f"the file {node.number} has {node.size} bytes, more than {most}")
        return b"".join(self.content(node))

    def link(self, node: Node) -> bytes:
        """Where a symbolic link points to."""
        return node.body[:node.size] if node.size < 60 and not node.flags & EXTENTS_FLAG else self.read(node, 4096)

    def folder(self, node: Node) -> list[tuple[bytes, int]]:
        """Names and numbers, without `.` and `..`; sorted."""
        if not stat.S_ISDIR(node.mode):
            raise _odd("it has a folder that is none")
        data, at, found = self.read(node, MAX_FOLDER), 0, []
        while at + 8 <= len(data):
            number, length, size, _ = struct.unpack_from("<IHBB", data, at)
            if length < 8 or length % 4 or at % self.block + length > self.block or size + 8 > length:
                raise _odd("a folder makes no sense")
            name = data[at + 8:at + 8 + size]
            if number and name not in (b".", b".."):
                if not name or b"/" in name or b"\0" in name:
                    raise _odd(f"it has the name {name[:40]!r}")
                found.append((name, number))
            at += length
        if len({name for name, _ in found}) != len(found):
            raise _odd("a folder has one name twice")
        return sorted(found)

    def walk(self, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
        """All below a folder, which comes first (as the empty name), parents before what is in them."""
        count = 0
        waiting = [(b"", self.find(path), 0)]
        folders: set[int] = set()
        while waiting:
            name, node, depth = waiting.pop()
            yield name, node
            if stat.S_ISDIR(node.mode):
                if node.number in folders or depth > MAX_DEPTH:
                    raise _odd("a folder is within itself")
                folders.add(node.number)
                inside = self.folder(node)
                count += len(inside)
                if count > MAX_ENTRIES:
                    raise _odd(f"it has more than {MAX_ENTRIES} files")
                waiting += [(name + b"/" + one if name else one, self.node(number), depth + 1) for one, number in reversed(inside)]

    def find(self, path: bytes) -> Node:
        """A file by its path; links are not followed."""
        node = self.node(ROOT)
        for part in filter(None, path.split(b"/")):
            number = dict(self.folder(node)).get(part)
            if number is None:
                raise Refused("disk", f"there is no {path.decode('utf-8', 'replace')[:200]} on it", "name a disk that has it")
            node = self.node(number)
        return node

    def attributes(self, node: Node) -> dict[str, bytes]:
        """Extended attributes."""
        found: dict[str, bytes] = {}
        if len(node.more) > 8 and struct.unpack_from("<I", node.more)[0] == ATTRIBUTE_MAGIC:
            self._entries(node.more, 4, 4, found)
        if node.attributes_block:
            data = self._at(node.attributes_block * self.block, self.block)
            if struct.unpack_from("<I", data)[0] != ATTRIBUTE_MAGIC:
                raise _odd("extended attributes make no sense")
            self._entries(data, 32, 0, found)
        return found

    def _entries(self, data: bytes, at: int, base: int, found: dict[str, bytes]) -> None:
        while at + 4 <= len(data) and struct.unpack_from("<I", data, at)[0]:
            size, index, offset, _, length = struct.unpack_from("<BBHII", data, at)
            if at + 16 + size > len(data) or base + offset + length > len(data):
                raise _odd("extended attributes make no sense")
            found[PREFIXES.get(index, f"{index}.") + data[at + 16:at + 16 + size].decode("utf-8", "replace")] = data[base + offset:base + offset + length]
            at += 16 + -(-size // 4) * 4

    def __enter__(self) -> "Ext4":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
