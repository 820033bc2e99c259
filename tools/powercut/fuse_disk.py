"""Disks in this process: one file, served to the kernel through /dev/fuse, with a loop device over it. One writes down what it is told, one is for trials.

The kernel's FUSE protocol is spoken directly (linux/fuse.h, 7.31): one file is a dozen requests, and neither libfuse nor a package is needed.
The mount point is itself a file: the root of this file system. The loop driver turns a flush of the block device into fsync, which arrives here.
"""

import errno
import os
import random
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from enum import IntEnum
from pathlib import Path
from typing import Self

from .block_log import PAGE, BlockLog, Flush, Loss, Player, Write, apply
from .mounts import mount, unmount


class Request(IntEnum):
    """Opcodes; what is not named here is answered with ENOSYS."""

    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


NO_ANSWER = (Request.FORGET, Request.BATCH_FORGET, Request.INTERRUPT)
ROOT_INODE = 1
FOPEN_DIRECT_IO = 1
INIT_BIG_WRITES, INIT_MAX_PAGES, INIT_ASYNC_READ = 1 << 5, 1 << 22, 1 << 0
MAX_WRITE = 1 << 20
"""Bytes of one write request at most: 256 pages, what the kernel allows."""
HEADER = struct.Struct("=IIQQIIIHH")
"""struct fuse_in_header."""
WRITE_IN_BYTES = 40
"""sizeof(struct fuse_write_in); the data follow it."""
MINOR = 31
"""The minor version spoken: later ones only add what one file does not need."""
BUFFER_BYTES = MAX_WRITE + 4096
"""The longest request: data and headers."""
RELEASE_S = 10.0
"""How long a loop device may still hold the disk at the end; then it is taken away from it."""
FOREVER_S = 3600
"""How long the kernel may rely on the file's attributes: they never change."""


class FuseDisk(ABC):
    """A file of `size` bytes at `target` (an empty file) whose reads, writes and flushes are answered by a subclass. Use as a context manager."""

    def __init__(self, size: int, target: Path) -> None:
        self.size = size
        self.error: BaseException | None = None
        self._target = target
        self._device = -1
        self._thread: threading.Thread | None = None
        self._handlers: dict[int, Callable[[memoryview], bytes]] = {
            Request.INIT: self._init, Request.GETATTR: self._attributes, Request.SETATTR: self._attributes, Request.OPEN: self._open, Request.READ: self._read,
            Request.WRITE: self._write, Request.FSYNC: self._fsync, Request.STATFS: self._statfs, Request.FLUSH: self._nothing, Request.RELEASE: self._nothing,
            Request.DESTROY: self._nothing,
        }

    def __enter__(self) -> Self:
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        mount("disk", self._target, "fuse", f"fd={self._device},rootmode=100600,user_id=0,group_id=0,allow_other,max_read={MAX_WRITE}", 0)
        self._thread = threading.Thread(target=self._serve, name="fuse disk", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        unmount(self._target, detach=True)
        if self._thread is not None:
            self._thread.join(RELEASE_S)  # until the loop device lets go of it
        os.close(self._device)
        if self.error is not None:
            raise self.error

    @abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the disk."""

    @abstractmethod
    def write(self, offset: int, data: bytes) -> None:
        """Change the disk."""

    @abstractmethod
    def flush(self) -> None:
        """What was written must be durable now."""

    def _serve(self) -> None:
        buffer = bytearray(BUFFER_BYTES)
        view = memoryview(buffer)
        while True:
            try:
                size = os.readv(self._device, [buffer])
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                if error.errno != errno.ENODEV:  # ENODEV: it is unmounted
                    self.error = error
                return
            _, opcode, unique, *_ = HEADER.unpack_from(buffer)
            if opcode in NO_ANSWER:
                continue
            handler = self._handlers.get(opcode)
            status, answer = 0, b""
            if handler is None:
                status = -errno.ENOSYS
            else:
                try:
                    answer = handler(view[HEADER.size : size])
                except Exception as error:  # the kernel waits for an answer in any case
                    self.error, status = error, -errno.EIO
            try:
                os.write(self._device, struct.pack("=IiQ", 16 + len(answer), status, unique) + answer)
            except OSError as error:
                if error.errno != errno.ENOENT:  # ENOENT: the request was interrupted
                    self.error = error
                    return

    # -- requests ------------------------------------------------------------------------------------------------------------

    def _init(self, data: memoryview) -> bytes:
        major, minor, readahead, flags = struct.unpack_from("=IIII", data)
        return struct.pack("=IIIIHHIIHH", 7, MINOR, readahead, flags & (INIT_BIG_WRITES | INIT_MAX_PAGES | INIT_ASYNC_READ), 16, 12, MAX_WRITE, 1, MAX_WRITE // 4096, 0) + bytes(32)

    def _attributes(self, _data: memoryview) -> bytes:
        size = self.size
        attributes = struct.pack("=6Q10I", ROOT_INODE, size, size // 512, 0, 0, 0, 0, 0, 0, 0o100600, 1, 0, 0, 0, 4096, 0)
        return struct.pack("=QII", FOREVER_S, 0, 0) + attributes

    def _open(self, _data: memoryview) -> bytes:
        return struct.pack("=QII", 0, FOPEN_DIRECT_IO, 0)

    def _read(self, data: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", data)
        return self.read(offset, size)

    def _write(self, data: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", data)
        written = bytes(data[WRITE_IN_BYTES : WRITE_IN_BYTES + size])
        if len(written) != size or offset + size > self.size:
            raise OSError(errno.EIO, f"a write of {size} bytes at {offset} came with {len(written)}")
        self.write(offset, written)
        return struct.pack("=II", size, 0)

    def _fsync(self, _data: memoryview) -> bytes:
        self.flush()
        return b""

    def _statfs(self, _data: memoryview) -> bytes:
        return struct.pack("=5Q4I24x", self.size // 4096, 0, 0, 1, 0, 4096, 255, 4096, 0)

    def _nothing(self, _data: memoryview) -> bytes:
        return b""


class RecordingDisk(FuseDisk):
    """A disk whose writes and flushes go into `log`. `power` False: what is written is taken and forgotten, as by a disk without power."""

    def __init__(self, log: BlockLog, target: Path) -> None:
        super().__init__(len(log.base), target)
        self.log = log
        self.content = bytearray(log.base)
        self.power = True

    def read(self, offset: int, size: int) -> bytes:
        """See `FuseDisk`."""
        return bytes(self.content[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """See `FuseDisk`."""
        if self.power:
            self.content[offset : offset + len(data)] = data
            self.log.entries.append(Write(offset, data))

    def flush(self) -> None:
        """See `FuseDisk`."""
        if self.power:
            self.log.entries.append(Flush())

    def restore_power(self, draw: random.Random) -> None:
        """After `power` was set False and nothing is mounted from it any more: a part of what had not been flushed by then is lost."""
        player = Player(self.log)
        player.go(self.log.position)
        left = player.durable
        for write in player.lossy(draw):
            apply(left, write)
        patches = [
            Write(offset, bytes(left[offset : offset + PAGE])) for offset in range(0, len(left), PAGE) if left[offset : offset + PAGE] != self.content[offset : offset + PAGE]
        ]
        self.content[:] = left
        self.log.entries.append(Loss(tuple(patches)))
        self.power = True


class TrialDisk(FuseDisk):
    """A disk that starts as `base` with some writes done to it, and forgets what is written after that at the next `reset`: a boot costs no copy."""

    def __init__(self, size: int, target: Path) -> None:
        super().__init__(size, target)
        self._base: bytes | bytearray = b""
        self._pages: dict[int, bytearray] = {}

    def reset(self, base: bytes | bytearray, writes: Iterable[Write] = ()) -> None:
        """Begin anew; `base` is not changed and must not change while the disk is in use."""
        self._base, self._pages = base, {}
        for write in writes:
            self.write(write.offset, write.data)

    def read(self, offset: int, size: int) -> bytes:
        """See `FuseDisk`."""
        first, last = offset // PAGE, (offset + size - 1) // PAGE
        if not any(number in self._pages for number in range(first, last + 1)):
            return bytes(self._base[offset : offset + size])
        pages = b"".join(self._pages.get(number) or self._base[number * PAGE : number * PAGE + PAGE] for number in range(first, last + 1))
        return pages[offset - first * PAGE :][:size]

    def write(self, offset: int, data: bytes) -> None:
        """See `FuseDisk`."""
        done = 0
        while done < len(data):
            number, start = divmod(offset + done, PAGE)
            part = data[done : done + PAGE - start]
            if len(part) == PAGE:
                self._pages[number] = bytearray(part)
            else:
                page = self._pages.get(number)
                if page is None:
                    page = self._pages[number] = bytearray(self._base[number * PAGE : number * PAGE + PAGE])
                page[start : start + len(part)] = part
            done += len(part)

    def flush(self) -> None:
        """See `FuseDisk`."""
