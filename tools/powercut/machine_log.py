"""Every write of a machine's disk, from the log that QEMU's blklogwrites driver keeps (the format of the kernel's dm-log-writes), and the disk as a power cut after any of them leaves it."""

import mmap
import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .block_log import SECTOR, Write, survivors

MAGIC = 0x6A736677736872
_SUPER, _ENTRY = struct.Struct("<QQQI"), struct.Struct("<QQQQ")
_FLUSH, _FUA, _DISCARD = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Logged:
    """One entry: `size` bytes at `offset` of the disk, which stand at `at` in the log; `flush`: what came before is durable with it; `fua`: and so is it."""

    offset: int
    size: int
    at: int
    flush: bool
    fua: bool
    end: int


def entries(log: bytes | mmap.mmap) -> Iterator[Logged]:
    """The log's entries in order, as far as it is whole (QEMU may have been killed while it wrote). Raises ValueError where it is no log."""
    magic, version, _, sector = _SUPER.unpack_from(log, 0)
    if magic != MAGIC or version != 1 or sector != SECTOR:
        raise ValueError("it is no log of blklogwrites with sectors of 512 bytes")
    at = sector
    while at + sector <= len(log):
        where, count, flags, _ = _ENTRY.unpack_from(log, at)
        at += sector
        carried = 0 if flags & _DISCARD else count * sector
        if at + carried > len(log) or (not count and not flags):
            return
        yield Logged(where * sector, carried, at, bool(flags & _FLUSH), bool(flags & _FUA), at + carried)
        at += carried


class Replay:
    """A disk that is taken through a log. `content` has all that was written so far, `durable` what a flush has made so; neither is ever written back to the files.

    Args:
        flushes: False: no flush of the log is believed (the control: what an updater that never syncs would leave).
    """

    def __init__(self, disk: Path, log: Path, flushes: bool = True) -> None:
        with log.open("rb") as file:
            self._log = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.entries = list(entries(self._log))
        with disk.open("rb") as file:
            self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self.durable = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._flushes = flushes
        self._pending: list[Write] = []
        self.position = 0

    def step(self) -> Logged:
        """The next entry."""
        entry = self.entries[self.position]
        self.position += 1
        if entry.flush and self._flushes:
            self._settle()
        if entry.size:
            data = self._log[entry.at : entry.at + entry.size]
            self.content[entry.offset : entry.offset + entry.size] = data
            self._pending.append(Write(entry.offset, data))
            if entry.fua and self._flushes:
                self._settle()
        return entry

    def unsure(self, offset: int, size: int) -> bool:
        """Whether a write to this part of the disk is not flushed yet."""
        return any(write.offset < offset + size and write.offset + len(write.data) > offset for write in self._pending)

    def _settle(self) -> None:
        for write in self._pending:
            self.durable[write.offset : write.offset + len(write.data)] = write.data
        self._pending = []

    @contextmanager
    def lossy(self, draw: random.Random) -> Iterator[mmap.mmap]:
        """The disk where the power went away now and part of what was not flushed is lost or torn."""
        undo: list[Write] = []
        for write in survivors(self._pending, draw) if self._pending else ():
            undo.append(Write(write.offset, self.durable[write.offset : write.offset + len(write.data)]))
            self.durable[write.offset : write.offset + len(write.data)] = write.data
        yield self.durable
        for write in reversed(undo):
            self.durable[write.offset : write.offset + len(write.data)] = write.data


def write_sparse(content: mmap.mmap, target: Path, parts: Sequence[tuple[int, int]], size: int) -> None:
    """Parts (offset, bytes) of a disk into a file of its size, holes where it is zero."""
    step = 1 << 20
    with target.open("wb") as file:
        for begin, length in parts:
            for at in range(begin, begin + length, step):
                piece = content[at : min(at + step, begin + length)]
                if piece.count(0) != len(piece):
                    file.seek(at)
                    file.write(piece)
        file.truncate(size)
