"""Which pages of a guest's shared memory were written since the last look: by write protection, where the kernel has it, else by a hash of every page.

Write protection: the memory is registered, in the process that maps it, with a userfaultfd in asynchronous mode (Linux 6.7): a page's first write after a look costs one fault, that the kernel
settles by itself, and a look (PAGEMAP_SCAN) gives the pages written and protects them again in one step. The userfaultfd is made there by `inject` and then held here: once we are gone, the
kernel takes the protection away. Only writes through that process's page tables are seen, so it is refused where another process maps the memory too.
"""

import ctypes
import fcntl
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from . import inject, layout
from .errors import SourceError
from .layout import HASH, PAGE, PAGE_SHIFT
from .sources import FileSource

Numbers = NDArray[np.int64]
"""Page numbers, ascending."""

_SYS_USERFAULTFD, _SYS_CLOSE, _SYS_PIDFD_GETFD = 323, 3, 438
_USER_MODE_ONLY = 1
"""Of userfaultfd: what an unprivileged process may have; asynchronous protection needs no more."""
_API = struct.Struct("<QQQ")
_UFFD_API, _WP_ASYNC, _WP_SHMEM, _PAGEFAULT_WP = 0xAA, 1 << 15, 1 << 12, 1 << 0
_UFFDIO_API, _UFFDIO_REGISTER, _REGISTER_WP = 0xC018AA3F, 0xC020AA00, 2
_REGISTER = struct.Struct("<QQQQ")
_SCAN = struct.Struct("<12Q")
_PAGEMAP_SCAN, _WP_MATCHING, _CHECK_WPASYNC, _WRITTEN = 0xC0606610, 1, 2, 2
"""uapi/linux/fs.h"""
REGIONS = 1 << 16
"""Runs of pages that one call of a look gives at most: 1.5 MiB."""
_DIGEST = 16
"""Bytes of a page's hash: 128 bits of BLAKE3, so that no two pages that anybody can make are taken for the same."""
Digests = NDArray[np.uint8]
"""One a page, of _DIGEST bytes."""
_NO_PAGES: Numbers = np.zeros(0, np.int64)


class Tracker(Protocol):
    """Finds the pages that differ from what the target has: `arm` before the first is read, `brought` with the hashes of all extents as they were sent, `sent` with each page that is sent after that.

    What is found is to be read after it was found, and sent; a page may be given that has not changed."""

    name: str
    seconds: float
    """Spent on looks."""
    looks: int

    def arm(self) -> None: ...
    def brought(self, hashes: bytes) -> None: ...
    def sent(self, numbers: Numbers, data: memoryview) -> None: ...
    def written(self) -> Numbers: ...
    def close(self) -> None: ...


def _mapped(pid: int, path: Path) -> list[tuple[int, int, int, bool]]:
    """Where a process maps a file: start, end, first page of the file, shared. Raises OSError."""
    found, wanted = [], path.stat()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        major, minor = (int(part, 16) for part in words[3].split(":"))
        if int(words[4]) == wanted.st_ino and os.makedev(major, minor) == wanted.st_dev:
            start, end = (int(part, 16) for part in words[0].split("-"))
            found.append((start, end, int(words[2], 16) >> PAGE_SHIFT, words[1][3] == "s"))
    return sorted(found, key=lambda one: one[2])


def mappings(pid: int, path: Path, length: int) -> list[tuple[int, int, int]]:
    """Where a process maps a file, all of it and once: start, end, first page of the file. Raises SourceError where it does not, or privately."""
    try:
        found = _mapped(pid, path)
    except OSError as error:
        raise SourceError(f"process {pid}: its mappings cannot be read ({error.strerror}); run this as its user or as root") from None
    reached = 0
    for start, end, first, shared in found:
        if not shared:
            raise SourceError(f"memory {path}: process {pid} maps it privately; start QEMU with share=on")
        if first << PAGE_SHIFT != reached:
            break
        reached += end - start
    if reached != length or reached != sum(end - start for start, end, *_ in found):
        raise SourceError(f"memory {path}: process {pid} does not map all its {length} bytes just once; give the file that is its whole memory")
    return [one[:3] for one in found]


def others(pid: int, path: Path) -> list[int]:
    """Further processes that map a file, as far as can be seen: their writes are in no one else's page tables."""
    inode, found = f" {path.stat().st_ino} ", []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) not in (pid, os.getpid()):
            try:
                if inode in Path(f"/proc/{entry}/maps").read_text() and _mapped(int(entry), path):
                    found.append(int(entry))
            except (OSError, ValueError):
                continue  # it has ended, or is another user's, who cannot map this file
    return found


class WriteProtect:
    """By write protection. Raises SourceError where this kernel, or this process, cannot have it."""

    name = "write protection"

    def __init__(self, pid: int, path: Path, length: int) -> None:
        self.seconds, self.looks = 0.0, 0
        self._uffd = self._pagemap = -1
        strangers = others(pid, path)
        if strangers:
            raise SourceError(f"memory {path}: process {strangers[0]} maps it too, and what it writes would not be seen")
        self._maps = mappings(pid, path, length)
        self._regions = np.zeros((REGIONS, 3), np.uint64)
        try:
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self._uffd = _fetch_userfaultfd(pid)
            fcntl.ioctl(self._uffd, _UFFDIO_API, bytearray(_API.pack(_UFFD_API, _WP_ASYNC | _WP_SHMEM | _PAGEFAULT_WP, 0)))
            for start, end, _ in self._maps:
                fcntl.ioctl(self._uffd, _UFFDIO_REGISTER, bytearray(_REGISTER.pack(start, end - start, _REGISTER_WP, 0)))
        except OSError as error:
            self.close()
            raise SourceError(f"memory {path}: no write protection ({error.strerror or error}): it needs Linux 6.7 and the rights to trace QEMU") from None
        except SourceError as error:
            self.close()
            raise SourceError(f"memory {path}: no write protection ({error}): it needs x86-64 and the rights to trace QEMU") from None

    def arm(self) -> None:
        """Protect all of it."""
        self._look(0)

    def brought(self, hashes: bytes) -> None:
        """Of no account: it sees every write."""

    def sent(self, numbers: Numbers, data: memoryview) -> None:
        """Of no account."""

    def written(self) -> Numbers:
        """Pages written since the last look, protected again."""
        began = time.monotonic()
        found = self._look(_WRITTEN)
        self.seconds += time.monotonic() - began
        self.looks += 1
        return found

    def _look(self, category: int) -> Numbers:
        """Pages of a category, which are protected; 0: all are, and none given."""
        runs: list[NDArray[np.int64]] = []
        for start, end, first in self._maps:
            at = start
            while at < end:
                vector, room = (self._regions.ctypes.data, REGIONS) if category else (0, 0)
                argument = bytearray(_SCAN.pack(_SCAN.size, _WP_MATCHING | _CHECK_WPASYNC, at, end, 0, vector, room, 0, 0, category, 0, category))
                try:
                    count = fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, argument)
                except OSError as error:
                    raise SourceError(f"looking at the guest's memory: {error.strerror or error}") from None
                at = _SCAN.unpack(argument)[4]
                if count:
                    runs.append(((self._regions[:count, :2] - np.uint64(start)) >> np.uint64(PAGE_SHIFT)).astype(np.int64) + first)
        # Where its inner buffer was full on the way, the kernel says that the walk ended there though it went on to the end: what is walked once more may have been written once more.
        return expand(runs[0]) if len(runs) == 1 else merged(*(expand(run) for run in runs)) if runs else _NO_PAGES

    def close(self) -> None:
        """The kernel takes the protection away."""
        for fd in (self._uffd, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._uffd = self._pagemap = -1


def expand(runs: NDArray[np.int64]) -> Numbers:
    """Page numbers of runs (first, after the last), each of at least one page."""
    counts = runs[:, 1] - runs[:, 0]
    ends = np.cumsum(counts)
    numbers: Numbers = np.arange(int(ends[-1]), dtype=np.int64) + np.repeat(runs[:, 0] - (ends - counts), counts)
    return numbers


def merged(*sets: Numbers) -> Numbers:
    """Page numbers that are in any, each once. Not by numpy.unique: that imports 9 ms worth of modules at its first call, which is here while a guest stands still."""
    numbers = np.sort(np.concatenate(sets))
    return numbers[np.append(True, numbers[1:] != numbers[:-1])] if len(numbers) else _NO_PAGES


def _fetch_userfaultfd(pid: int) -> int:
    """A userfaultfd over another process's memory, here."""
    with inject.stopped(pid) as process:
        there = process.call(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY)
        try:
            pidfd = os.pidfd_open(pid)
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                here: int = libc.syscall(_SYS_PIDFD_GETFD, pidfd, there, 0)
                if here < 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            finally:
                os.close(pidfd)
        finally:
            process.call(_SYS_CLOSE, there)
    return here


class PageHashes:
    """By a hash of every page, on `threads` threads: works with every kernel and whoever writes, and reads the whole at each look.

    What is there is held against the hashes of what was sent, not of what was seen at the look before: a page that is written, sent, and written back would else look as if it had never changed.
    """

    name = "page hashes"

    def __init__(self, source: FileSource, threads: int) -> None:
        self.seconds, self.looks = 0.0, 0
        self._source, self._threads = source, threads
        self._sent: Digests = np.zeros((layout.pages_of(source.length), _DIGEST), np.uint8)
        """Of what the target has; zeros, which is the hash of nothing that anybody knows, where that is not known."""
        self._zero = blake3(bytes(PAGE)).digest(_DIGEST)

    def _hash(self, held: bytes | None = None) -> Digests:
        """All pages; with the hashes of extents, zeros for those whose extent has another."""

        def digests(index: int) -> bytes:
            size = layout.extent_length(self._source.length, index)
            wanted = None if held is None else held[index * HASH : (index + 1) * HASH]
            if self._source.hole(index):
                return (self._zero if wanted in (None, layout.zero_hash(size)) else bytes(_DIGEST)) * layout.pages_of(size)
            data = self._source.read(index, memoryview(bytearray(size)))
            if wanted is not None and blake3(data).digest() != wanted:
                return bytes(_DIGEST * layout.pages_of(size))
            return b"".join(blake3(data[at : at + PAGE]).digest(_DIGEST) for at in range(0, size, PAGE))

        with ThreadPoolExecutor(self._threads) as pool:
            return np.frombuffer(b"".join(pool.map(digests, range(self._source.extents))), np.uint8).reshape(-1, _DIGEST)

    def arm(self) -> None:
        """Nothing is known yet."""

    def brought(self, hashes: bytes) -> None:
        """The target has all extents as they were then."""
        self._sent = self._hash(hashes).copy()

    def sent(self, numbers: Numbers, data: memoryview) -> None:
        """The target has those pages so."""
        for place, number in enumerate(numbers.tolist()):
            self._sent[number] = np.frombuffer(blake3(data[place * PAGE : (place + 1) * PAGE]).digest(_DIGEST), np.uint8)

    def written(self) -> Numbers:
        """Pages that are not as they were sent."""
        began = time.monotonic()
        found = np.flatnonzero((self._hash() != self._sent).any(axis=1)).astype(np.int64)
        self.seconds += time.monotonic() - began
        self.looks += 1
        return found

    def close(self) -> None:
        """Nothing is held."""


def tracker(pid: int, source: FileSource, threads: int, kind: str = "auto", unseen: str = "") -> Tracker:
    """Write protection where it can be had (`auto`), or what is asked for: `protect`, `hash`. `unseen`: why protection would not see all writes. Raises SourceError."""
    if kind == "protect" and unseen:
        raise SourceError(f"no write protection: {unseen}; give --track hash")
    if kind == "hash" or unseen:
        return PageHashes(source, threads)
    try:
        return WriteProtect(pid, source.path, source.length)
    except SourceError:
        if kind == "protect":
            raise
        return PageHashes(source, threads)
