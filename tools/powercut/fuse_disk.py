"""A disk that writes down what it is told: one file, served to the kernel through /dev/fuse, with a loop device over it.

The kernel's FUSE protocol is spoken directly (linux/fuse.h, 7.31): one file is a dozen requests, and neither libfuse nor a package is needed.
The mount point is itself a file: the root of this file system. The loop driver turns a flush of the block device into fsync, which arrives here.
"""

import errno
import os
import random
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from .block_log import PAGE, BlockLog, Flush, Loss, Player, Write
from .mounts import mount, unmount

GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT, INTERRUPT, DESTROY, FORGET, BATCH_FORGET, FALLOCATE = (
    3, 4, 14, 15, 16, 17, 18, 20, 25, 26, 36, 38, 2, 42, 43
)
"""Opcodes."""

NO_ANSWER = (FORGET, BATCH_FORGET, INTERRUPT)
ROOT_INODE = 1
FOPEN_DIRECT_IO = 1
INIT_BIG_WRITES, INIT_MAX_PAGES, INIT_ASYNC_READ = 1 << 5, 1 << 22, 1 << 0
MAX_WRITE = 1 << 20
"""Bytes of one write request at most: 256 pages, what the kernel allows."""
HEADER = struct.Struct("=IIQQIIIHH")
WRITE_IN_BYTES, READ_IN_BYTES = 40, 40
FOREVER_S = 3600
"""How long the kernel may rely on the file's attributes: they never change."""


class FuseDisk:
    """A block device of `len(log.base)` bytes whose writes and flushes go into `log`.

    Args:
        target: an empty file that the disk appears at.

    Use as a context manager. `power` False: what is written is taken and forgotten, as by a disk without power.
    """

    def __init__(self, log: BlockLog, target: Path) -> None:
        self.log = log
        self.content = bytearray(log.base)
        self.power = True
        self.error: BaseException | None = None
        self._target = target
        self._device = -1
        self._thread: threading.Thread | None = None
        self._handlers: dict[int, Callable[[memoryview], bytes]] = {
            INIT: self._init, GETATTR: self._attributes, SETATTR: self._attributes, OPEN: self._open, READ: self._read, WRITE: self._write, FSYNC: self._fsync,
            STATFS: self._statfs, FLUSH: self._nothing, RELEASE: self._nothing, DESTROY: self._nothing,
        }

    def __enter__(self) -> "FuseDisk":
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        mount("recording", self._target, "fuse", f"fd={self._device},rootmode=100600,user_id=0,group_id=0,allow_other,max_read={MAX_WRITE}", 0)
        self._thread = threading.Thread(target=self._serve, name="fuse disk", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        unmount(self._target)
        if self._thread is not None:
            self._thread.join(10)
        os.close(self._device)
        if self.error is not None:
            raise self.error

    def restore_power(self, draw: random.Random) -> None:
        """After `power` was set False and nothing is mounted from it any more: a part of what had not been flushed by then is lost."""
        player = Player(self.log)
        player.go(self.log.position)
        left = player.lossy(draw)
        patches = [
            Write(offset, left[offset : offset + PAGE]) for offset in range(0, len(left), PAGE) if left[offset : offset + PAGE] != self.content[offset : offset + PAGE]
        ]
        self.content[:] = left
        self.log.entries.append(Loss(tuple(patches)))
        self.power = True

    def _serve(self) -> None:
        buffer = bytearray(MAX_WRITE + 4096)
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
        return struct.pack("=IIIIHHIIHH", 7, 31, readahead, flags & (INIT_BIG_WRITES | INIT_MAX_PAGES | INIT_ASYNC_READ), 16, 12, MAX_WRITE, 1, MAX_WRITE // 4096, 0) + bytes(32)

    def _attributes(self, _data: memoryview) -> bytes:
        size = len(self.content)
        attributes = struct.pack("=6Q10I", ROOT_INODE, size, size // 512, 0, 0, 0, 0, 0, 0, 0o100600, 1, 0, 0, 0, 4096, 0)
        return struct.pack("=QII", FOREVER_S, 0, 0) + attributes

    def _open(self, _data: memoryview) -> bytes:
        return struct.pack("=QII", 0, FOPEN_DIRECT_IO, 0)

    def _read(self, data: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", data)
        return bytes(self.content[offset : offset + size])

    def _write(self, data: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", data)
        written = bytes(data[WRITE_IN_BYTES : WRITE_IN_BYTES + size])
        if len(written) != size or offset + size > len(self.content):
            raise OSError(errno.EIO, f"a write of {size} bytes at {offset} came with {len(written)}")
        if self.power:
            self.content[offset : offset + size] = written
            self.log.entries.append(Write(offset, written))
        return struct.pack("=II", size, 0)

    def _fsync(self, _data: memoryview) -> bytes:
        if self.power:
            self.log.entries.append(Flush())
        return b""

    def _statfs(self, _data: memoryview) -> bytes:
        return struct.pack("=5Q4I24x", len(self.content) // 4096, 0, 0, 1, 0, 4096, 255, 4096, 0)

    def _nothing(self, _data: memoryview) -> bytes:
        return b""
