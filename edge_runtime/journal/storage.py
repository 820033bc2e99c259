"""What the journal asks of a disk: databases and a few small files. The simulator brings a disk that loses power."""

import os
import sqlite3
from pathlib import Path
from typing import Protocol

from ..system.data_folder import keep_private


class Storage(Protocol):
    """A file system as the journal uses it. Errors are OSError and sqlite3.Error."""

    def connect(self, path: Path, timeout_s: float) -> sqlite3.Connection:
        """A connection in autocommit mode, usable from any thread; a statement waits `timeout_s` for another process's lock."""

    def make_directory(self, path: Path) -> None:
        """Make `path` and what is missing above it."""

    def read(self, path: Path) -> bytes:
        """The content of a small file."""

    def write(self, path: Path, data: bytes) -> None:
        """Write a small file and make its content (not its name) durable."""

    def sync_directory(self, directory: Path) -> None:
        """Make the names in `directory` durable."""

    def exists(self, path: Path) -> bool:
        """Whether `path` is there."""

    def size(self, path: Path) -> int:
        """Bytes of `path`; FileNotFoundError where it is not there."""

    def replace(self, source: Path, target: Path) -> None:
        """Rename, over what is there."""

    def remove(self, path: Path) -> None:
        """Delete; nothing where it is not there."""

    def names(self, directory: Path, pattern: str) -> list[str]:
        """Names in `directory` that match the shell pattern, sorted."""

    def allocate(self, path: Path, size: int) -> None:
        """Make a file of `size` allocated (not sparse) bytes."""

    def lengthen(self, path: Path, size: int) -> None:
        """Make a file that is there and shorter `size` bytes long: zeros are written behind what is in it. As it was where that fails."""

    def free_bytes(self, directory: Path) -> int:
        """Free bytes of the file system, for an unprivileged process."""


LENGTHEN_BYTES = 1 << 16
"""Zeros in one write."""


class FileStorage:
    """The operating system's file system. See `Storage`."""

    def connect(self, path: Path, timeout_s: float) -> sqlite3.Connection:
        """See `Storage`."""
        keep_private(path)
        return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=timeout_s)

    def make_directory(self, path: Path) -> None:
        """See `Storage`."""
        path.mkdir(parents=True, exist_ok=True)

    def read(self, path: Path) -> bytes:
        """See `Storage`."""
        return path.read_bytes()

    def write(self, path: Path, data: bytes) -> None:
        """See `Storage`."""
        with open(path, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())

    def sync_directory(self, directory: Path) -> None:
        """See `Storage`."""
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def exists(self, path: Path) -> bool:
        """See `Storage`."""
        return path.exists()

    def size(self, path: Path) -> int:
        """See `Storage`."""
        return os.stat(path).st_size

    def replace(self, source: Path, target: Path) -> None:
        """See `Storage`."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """See `Storage`."""
        path.unlink(missing_ok=True)

    def names(self, directory: Path, pattern: str) -> list[str]:
        """See `Storage`."""
        return sorted(path.name for path in directory.glob(pattern))

    def allocate(self, path: Path, size: int) -> None:
        """See `Storage`."""
        with open(path, "wb") as handle:
            os.posix_fallocate(handle.fileno(), 0, size)

    def lengthen(self, path: Path, size: int) -> None:
        """See `Storage`."""
        zeros = memoryview(bytes(LENGTHEN_BYTES))
        with open(path, "r+b", buffering=0) as handle:
            found = at = handle.seek(0, os.SEEK_END)
            try:
                while at < size:
                    at += handle.write(zeros[: size - at])
            except OSError:
                handle.truncate(found)
                raise

    def free_bytes(self, directory: Path) -> int:
        """See `Storage`."""
        stat = os.statvfs(directory)
        return stat.f_bavail * stat.f_frsize


FILES: Storage = FileStorage()
"""The one real file system."""


def write_durably(storage: Storage, path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a power cut leaves either the old or the new content."""
    temporary = path.with_name(path.name + ".new")
    storage.write(temporary, data)
    storage.replace(temporary, path)
    storage.sync_directory(path.parent)


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk (or its quota) is full."""
    if isinstance(error, OSError):
        return error.errno in (28, 122)  # ENOSPC, EDQUOT
    return isinstance(error, sqlite3.OperationalError) and "full" in str(error)
