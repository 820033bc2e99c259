"""Where an object lands: a partial file beside its place, a journal of what is in it, and one rename when the whole is proven.

The journal says which extents were written with which hash. After a crash it is only believed where the partial file's bytes have that hash, so that it needs
no sync of its own and a torn tail or a lost write costs a resend, never a wrong byte.
"""

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from . import layout
from .errors import DestinationError, HashMismatch
from .layout import EXTENT, HASH, PAGE

_HEAD = struct.Struct("<8s16sQ")
_ENTRY = struct.Struct("<Q32s8s")
"""Extent, its raw hash, and the first bytes of the hash of both, which a torn entry does not have."""
_MAGIC = b"NVXJRNL1"
_COMMIT = (1 << 64) - 1
"""In place of an extent: the hash is the root, and the rename follows."""
_BRIDGE = 8
"""Zero pages between others that are written rather than skipped: a write more costs about as much as 32 KiB of copying."""
_NOTHING = bytes(HASH)


def _entry(index: int, digest: bytes) -> bytes:
    return _ENTRY.pack(index, digest, blake3(struct.pack("<Q", index) + digest).digest()[:8])


def _full(path: Path, error: OSError) -> DestinationError:
    remedy = "; make room and run it again, what has arrived is kept" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return DestinationError(f"destination {path}: {error.strerror or error}{remedy}")


class FileSink:
    """The destination file. Extents may be written from several threads, each extent from one at a time."""

    def __init__(self, path: Path, transfer: bytes, length: int, *, replace: bool = False) -> None:
        """Take up what an earlier attempt of the same transfer left. Raises DestinationError."""
        self.path, self.transfer, self.length = path, transfer, length
        self.partial, self.journal = path.with_name(path.name + ".partial"), path.with_name(path.name + ".journal")
        if not 0 < length <= layout.OBJECT_MAX:
            raise DestinationError(f"destination {path}: a length of {length} is not within 1 to {layout.OBJECT_MAX}")
        self.extents = layout.extents_of(length)
        self.hashes = bytearray(self.extents * HASH)
        self.committed: bytes | None = None
        self._fd = -1
        self._log = -1
        try:
            self._log = os.open(self.journal, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DestinationError(f"destination {path}: another receiver writes it; wait for it or give another path") from None
            entries = self._read_journal()
            if self.committed is not None and not self.partial.exists() and path.exists():
                return  # it was renamed; the sender has perhaps not heard of it
            self.committed = None
            if path.exists() and not replace:
                raise DestinationError(f"destination {path}: it is there already; give another path or --replace")
            fresh = not entries
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if fresh else 0), 0o600)
            os.ftruncate(self._fd, length)
            self._believe(entries)
            self._restart_journal()
        except OSError as error:
            self.close()
            raise _full(path, error) from None
        except DestinationError:
            self.close()
            raise

    def _read_journal(self) -> dict[int, bytes]:
        data = os.pread(self._log, os.fstat(self._log).st_size, 0)
        if len(data) < _HEAD.size or _HEAD.unpack_from(data) != (_MAGIC, self.transfer, self.length):
            return {}
        entries: dict[int, bytes] = {}
        for at in range(_HEAD.size, len(data) - _ENTRY.size + 1, _ENTRY.size):
            index, digest, _ = _ENTRY.unpack_from(data, at)
            if data[at : at + _ENTRY.size] != _entry(index, digest):
                break
            if index == _COMMIT:
                self.committed = digest
            elif index < self.extents:
                entries[index] = digest
        return entries

    def _believe(self, entries: dict[int, bytes]) -> None:
        """Only what the partial file's bytes bear out."""
        for index, digest in entries.items():
            if blake3(self.read(index)).digest() == digest:
                self.hashes[index * HASH : (index + 1) * HASH] = digest
            else:
                os.pwrite(self._fd, bytes(layout.extent_length(self.length, index)), index * EXTENT)
        # What was written and not yet noted may lie anywhere else: holes again, so that zero pages may be skipped.
        for index in range(self.extents):
            if not self.holds(index):
                self._punch(index)

    def _punch(self, index: int) -> None:
        """Make an extent a hole, by cutting where the file system knows holes, else by zeros."""
        start, size = index * EXTENT, layout.extent_length(self.length, index)
        try:
            if os.lseek(self._fd, start, os.SEEK_DATA) >= start + size:
                return
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
        os.pwrite(self._fd, bytes(size), start)

    def _restart_journal(self) -> None:
        held = b"".join(_entry(index, bytes(self.hashes[index * HASH : (index + 1) * HASH])) for index in range(self.extents) if self.holds(index))
        os.ftruncate(self._log, 0)
        os.pwrite(self._log, _HEAD.pack(_MAGIC, self.transfer, self.length) + held, 0)
        os.lseek(self._log, 0, os.SEEK_END)

    def holds(self, index: int) -> bool:
        """That extent was written whole."""
        return self.hashes[index * HASH : (index + 1) * HASH] != _NOTHING

    def read(self, index: int) -> bytes:
        """The bytes of an extent as they lie in the partial file."""
        return os.pread(self._fd, layout.extent_length(self.length, index), index * EXTENT)

    def page(self, number: int) -> bytes:
        """A page of an extent that is here; empty where it is not."""
        index = number // layout.PAGES
        return os.pread(self._fd, PAGE, number * PAGE) if index < self.extents and self.holds(index) else b""

    def write(self, index: int, raw: memoryview, digest: bytes, classes: NDArray[np.uint8]) -> None:
        """Put an extent to its place and into the journal. Raises DestinationError; the extent then counts as not here."""
        start, size = index * EXTENT, len(raw)
        fresh = not self.holds(index)
        self.hashes[index * HASH : (index + 1) * HASH] = _NOTHING
        try:
            for first, last in _runs(classes) if fresh else [(0, size)]:
                at, end = first, min(last, size)
                while at < end:
                    at += os.pwrite(self._fd, raw[at:end], start + at)
            os.write(self._log, _entry(index, digest))
        except OSError as error:
            # Part of it may lie there, and the next attempt may skip zero pages only on a hole.
            with contextlib.suppress(OSError):
                self._punch(index)
            raise _full(self.path, error) from None
        self.hashes[index * HASH : (index + 1) * HASH] = digest

    def commit(self, root: bytes) -> None:
        """Make the object visible, once: raises HashMismatch where it is not the one of that root, DestinationError where it cannot be."""
        if self.committed is not None:
            if self.committed != root:
                raise HashMismatch("commit: another root was committed before")
            return
        missing = sum(not self.holds(index) for index in range(self.extents))
        if missing or layout.root_of(self.length, self.hashes) != root:
            raise HashMismatch(f"commit: the root hash does not agree ({missing} of {self.extents} extents are missing); nothing becomes visible")
        try:
            os.fsync(self._fd)
            os.write(self._log, _entry(_COMMIT, root))
            os.fsync(self._log)
            os.rename(self.partial, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise _full(self.path, error) from None
        self.committed = root

    def forget(self) -> None:
        """The sender has heard of the commit: the journal is of no more use."""
        if self.committed is not None:
            self.journal.unlink(missing_ok=True)

    def close(self) -> None:
        for fd in (self._fd, self._log):
            if fd >= 0:
                os.close(fd)
        self._fd = self._log = -1


def _runs(classes: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Byte ranges of an extent that hold more than zeros."""
    rows = classes.nonzero()[0]  # zero is class 0
    if not len(rows):
        return []
    if len(rows) == len(classes):
        return [(0, len(classes) * PAGE)]
    cuts = np.flatnonzero(np.diff(rows) > _BRIDGE)
    firsts, lasts = rows[np.concatenate([[0], cuts + 1])], rows[np.concatenate([cuts, [len(rows) - 1]])]
    return [(int(first) * PAGE, (int(last) + 1) * PAGE) for first, last in zip(firsts, lasts, strict=True)]
