"""What a WebAssembly program sees of the world: WASI preview 1 with stdin, stdout, stderr, arguments, variables, clocks and random bytes. No files, no network: there is no code for them.

It is our own, not the engine's: input and output are buffers that are bounded here, and nothing that could open something of the host is linked at all. Every function of the interface can be
imported; what is not served answers `ENOSYS` or, where it speaks of a descriptor, `EBADF`, as a program expects of a world without files.
Signatures and numbers: https://github.com/WebAssembly/WASI/blob/main/legacy/preview1/docs.md
"""

import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

MODULE = "wasi_snapshot_preview1"

BADF, FAULT, INVAL, NOSYS, SPIPE = 8, 21, 28, 52, 70

MAX_VECTORS = 1024
"""Pieces of one read or write: IOV_MAX of Linux."""

MAX_SUBSCRIPTIONS = 256
"""Events that one poll waits for; a program without files waits for a clock and three streams."""

RANDOM_CHUNK = 65_536
"""Bytes that are drawn from the kernel at a time."""

LONGEST_S = 1e6
"""Of one wait: longer ones do not fit the system's call, and no call lives as long."""

_FD_READ, _FD_WRITE = 1 << 1, 1 << 6
"""Rights of a descriptor."""

SIGNATURES: dict[str, str] = {
    "args_get": "ii", "args_sizes_get": "ii", "environ_get": "ii", "environ_sizes_get": "ii", "clock_res_get": "ii", "clock_time_get": "iIi", "fd_advise": "iIIi", "fd_allocate": "iII", "fd_close": "i",
    "fd_datasync": "i", "fd_fdstat_get": "ii", "fd_fdstat_set_flags": "ii", "fd_fdstat_set_rights": "iII", "fd_filestat_get": "ii", "fd_filestat_set_size": "iI", "fd_filestat_set_times": "iIIi",
    "fd_pread": "iiiIi", "fd_prestat_get": "ii", "fd_prestat_dir_name": "iii", "fd_pwrite": "iiiIi", "fd_read": "iiii", "fd_readdir": "iiiIi", "fd_renumber": "ii", "fd_seek": "iIii", "fd_sync": "i",
    "fd_tell": "ii", "fd_write": "iiii", "path_create_directory": "iii", "path_filestat_get": "iiiii", "path_filestat_set_times": "iiiiIIi", "path_link": "iiiiiii", "path_open": "iiiiiIIii",
    "path_readlink": "iiiiii", "path_remove_directory": "iii", "path_rename": "iiiiii", "path_symlink": "iiiii", "path_unlink_file": "iii", "poll_oneoff": "iiii", "proc_exit": "i", "proc_raise": "i",
    "sched_yield": "", "random_get": "ii", "sock_accept": "iii", "sock_recv": "iiiiii", "sock_send": "iiiii", "sock_shutdown": "ii",
}
"""Parameters of each function: `i` for 32 bits, `I` for 64. All but `proc_exit` return an error number."""


class Exit(Exception):
    """The program has ended itself with a code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class World:
    """One instance's surroundings.

    Args:
        args, env: what it is started with; `env` as `NAME=VALUE`.

    Attributes:
        stdin: what it may still read.
        read, write: access to its memory, set once there is an instance: `read(start, end)`, `write(data, start)`; they raise IndexError or ValueError outside of it.
    """

    def __init__(self, args: Sequence[str], env: Sequence[str]) -> None:
        self._args = [one.encode() + b"\0" for one in args]
        self._env = [one.encode() + b"\0" for one in env]
        self.read: Callable[[int, int], bytes | bytearray] | None
        self.write: Callable[[bytes, int], Any] | None
        self.begin(lambda _descriptor, _data: None)

    def begin(self, say: Callable[[int, bytes], None]) -> None:
        """For another instance. `say` takes what is written: descriptor (1 or 2) and bytes."""
        self._say, self.stdin = say, memoryview(b"")
        self.read = self.write = None

    def function(self, name: str) -> Callable[..., int | None]:
        """The function of a name of `SIGNATURES`, as the engine calls it: plain integers in, an error number out."""
        served: Callable[..., int] | None = getattr(self, f"_{name}", None)
        if name == "proc_exit":
            def leave(code: int) -> None:
                raise Exit(code & 0xFFFF_FFFF)

            return leave
        absent = BADF if name.startswith(("fd_", "path_", "sock_")) else NOSYS

        def call(*given: int) -> int:
            if served is None:
                return absent
            try:
                return served(*(value & 0xFFFF_FFFF if kind == "i" else value & 0xFFFF_FFFF_FFFF_FFFF for value, kind in zip(given, SIGNATURES[name], strict=True)))
            except (IndexError, ValueError, OverflowError, struct.error):  # a pointer that leads out of its memory
                return FAULT

        return call

    # -- memory --------------------------------------------------------------------------------------------------------------

    def _take(self, at: int, size: int) -> bytes:
        if self.read is None:  # the module's start section runs before there is an instance
            raise ValueError
        data = bytes(self.read(at, at + size))
        if len(data) != size:
            raise IndexError
        return data

    def _put(self, at: int, data: bytes) -> None:
        if self.write is None:
            raise ValueError
        if data:
            self.write(data, at)

    def _vectors(self, at: int, count: int) -> list[tuple[int, int]]:
        if count > MAX_VECTORS:
            raise ValueError
        return list(struct.iter_unpack("<II", self._take(at, 8 * count)))

    # -- what is served ------------------------------------------------------------------------------------------------------

    def _texts(self, texts: Sequence[bytes], pointers: int, at: int) -> int:
        for number, text in enumerate(texts):
            self._put(pointers + 4 * number, struct.pack("<I", at))
            self._put(at, text)
            at += len(text)
        return 0

    def _sizes(self, texts: Sequence[bytes], count: int, size: int) -> int:
        self._put(count, struct.pack("<I", len(texts)))
        self._put(size, struct.pack("<I", sum(map(len, texts))))
        return 0

    def _args_get(self, pointers: int, at: int) -> int:
        return self._texts(self._args, pointers, at)

    def _args_sizes_get(self, count: int, size: int) -> int:
        return self._sizes(self._args, count, size)

    def _environ_get(self, pointers: int, at: int) -> int:
        return self._texts(self._env, pointers, at)

    def _environ_sizes_get(self, count: int, size: int) -> int:
        return self._sizes(self._env, count, size)

    @staticmethod
    def _now(clock: int) -> int | None:
        """Nanoseconds: 0 is the wall's time, 1 monotonic, 2 and 3 the processor's."""
        return (time.time_ns(), time.monotonic_ns(), time.process_time_ns(), time.process_time_ns())[clock] if clock < 4 else None

    def _clock_res_get(self, clock: int, at: int) -> int:
        if clock > 3:
            return INVAL
        self._put(at, struct.pack("<Q", 1))
        return 0

    def _clock_time_get(self, clock: int, _precision: int, at: int) -> int:
        now = self._now(clock)
        if now is None:
            return INVAL
        self._put(at, struct.pack("<Q", now))
        return 0

    def _fd_close(self, descriptor: int) -> int:
        return 0 if descriptor < 3 else BADF

    def _fd_fdstat_get(self, descriptor: int, at: int) -> int:
        if descriptor > 2:
            return BADF
        self._put(at, struct.pack("<BxHxxxxQQ", 0, 0, _FD_WRITE if descriptor else _FD_READ, 0))
        return 0

    def _fd_seek(self, descriptor: int, _offset: int, _whence: int, _at: int) -> int:
        return SPIPE if descriptor < 3 else BADF

    def _fd_tell(self, descriptor: int, _at: int) -> int:
        return SPIPE if descriptor < 3 else BADF

    def _fd_read(self, descriptor: int, vectors: int, count: int, read: int) -> int:
        if descriptor != 0:
            return BADF
        total = 0
        for at, size in self._vectors(vectors, count):
            piece = bytes(self.stdin[:size])
            self._put(at, piece)
            self.stdin = self.stdin[len(piece):]
            total += len(piece)
        self._put(read, struct.pack("<I", total))
        return 0

    def _fd_write(self, descriptor: int, vectors: int, count: int, written: int) -> int:
        if descriptor not in (1, 2):
            return BADF
        total = 0
        for at, size in self._vectors(vectors, count):
            self._say(descriptor, self._take(at, size))
            total += size
        self._put(written, struct.pack("<I", total & 0xFFFF_FFFF))
        return 0

    def _random_get(self, at: int, size: int) -> int:
        for done in range(0, size, RANDOM_CHUNK):
            self._put(at + done, os.urandom(min(RANDOM_CHUNK, size - done)))
        return 0

    def _sched_yield(self) -> int:
        return 0

    def _poll_oneoff(self, asked: int, told: int, count: int, written: int) -> int:
        """Streams are always ready. A wait for a clock is a real one; who waits past the call's deadline is ended with it."""
        if not 0 < count <= MAX_SUBSCRIPTIONS:
            return INVAL
        ready: list[tuple[int, int, int]] = []
        waits: list[tuple[int, int]] = []
        for number in range(count):
            entry = self._take(asked + 48 * number, 48)
            user, kind = struct.unpack_from("<QB", entry)
            if kind in (1, 2):
                descriptor = struct.unpack_from("<I", entry, 16)[0]
                ready.append((user, 0 if descriptor < 3 else BADF, kind))
                continue
            clock, until, _, flags = struct.unpack_from("<I4xQQH", entry, 16)
            now = self._now(clock) if kind == 0 else None
            if now is None:
                ready.append((user, INVAL, kind))
            else:
                waits.append((max(0, until - now) if flags & 1 else until, user))
        if waits and not ready:
            least = min(waits)[0]
            time.sleep(min(least / 1e9, LONGEST_S))
            ready = [(user, 0, 0) for wait, user in waits if wait == least]
        for number, (user, error, kind) in enumerate(ready):
            size = len(self.stdin) if kind == 1 else 0
            self._put(told + 32 * number, struct.pack("<QHB5xQH6x", user, error, kind, size, 0))
        self._put(written, struct.pack("<I", len(ready)))
        return 0
