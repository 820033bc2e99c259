"""What is sent: a file, a raw disk, or a guest's memory in a shared file. Only ever read."""

import errno
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from . import layout
from .errors import SourceError
from .layout import EXTENT, PAGE


class FileSource:
    """A file or block device, by extents. Each read is a copy, so that what is hashed is what is sent while the file goes on changing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(f"source {path}: {error.strerror or error}") from None
        try:
            self.length = os.lseek(self._fd, 0, os.SEEK_END)
            if not 0 < self.length <= layout.OBJECT_MAX:
                raise SourceError(f"source {path}: its length {self.length} is not within 1 to {layout.OBJECT_MAX}; give a file, a disk or a memory file")
        except OSError as error:
            os.close(self._fd)
            raise SourceError(f"source {path}: {error.strerror or error}; give a file, a disk or a memory file") from None
        except SourceError:
            os.close(self._fd)
            raise
        self.extents = layout.extents_of(self.length)

    def hole(self, index: int) -> bool:
        """That extent was never written, as the file system says."""
        start = index * EXTENT
        end = min(start + EXTENT, self.length)
        try:
            return os.lseek(self._fd, start, os.SEEK_DATA) >= end
        except OSError as error:
            # Nothing but a hole to the end, unless the end has moved; with another error it cannot say.
            return error.errno == errno.ENXIO and os.fstat(self._fd).st_size >= end

    def read(self, index: int, into: memoryview) -> memoryview:
        """The bytes of an extent, in `into`. Raises SourceError, where it became shorter too."""
        size = layout.extent_length(self.length, index)
        view, at = into[:size], 0
        try:
            while at < size:
                count = os.preadv(self._fd, [view[at:]], index * EXTENT + at)
                if not count:
                    raise SourceError(f"source {self.path}: it became shorter while it was read; send it again")
                at += count
        except OSError as error:
            raise SourceError(f"source {self.path}: {error.strerror or error} at byte {index * EXTENT + at}") from None
        return view

    def mapped(self) -> NDArray[np.uint8]:
        """All its pages as they change, shape (pages, PAGE), not to be written; for a memory file, which does not become shorter. Raises SourceError."""
        try:
            view = mmap.mmap(self._fd, self.length, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise SourceError(f"source {self.path}: it cannot be mapped ({error})") from None
        return np.frombuffer(view, np.uint8).reshape(-1, PAGE)

    def page(self, number: int) -> bytes:
        """One page, the last one perhaps cut short; empty where it is beyond the end or cannot be read."""
        try:
            return os.pread(self._fd, PAGE, number * PAGE)
        except OSError:
            return b""

    def hashes(self, threads: int) -> bytes:
        """The raw hashes of all extents, one after the other."""

        def digest(index: int) -> bytes:
            size = layout.extent_length(self.length, index)
            if self.hole(index):
                return layout.zero_hash(size)
            return blake3(self.read(index, memoryview(bytearray(size)))).digest()

        with ThreadPoolExecutor(threads) as pool:
            return b"".join(pool.map(digest, range(self.extents)))

    def root(self, threads: int) -> bytes:
        """Its root hash, which is its name as a base."""
        return layout.root_of(self.length, self.hashes(threads))

    def close(self) -> None:
        os.close(self._fd)
