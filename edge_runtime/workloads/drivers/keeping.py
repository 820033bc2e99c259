"""What every keeper has, whatever it keeps: the server that forks it, what it says and writes down, the lease that it goes by. Used by scripts, with nothing of ours imported.

A server is asked by a folder's path, that comes through a socket with descriptors: the folder's lock, where to say the first word, where errors go, and what else a keeper of its kind needs.
It forks a keeper for each, and ends when the socket's other end is closed; the keepers do not.
"""

import ctypes
import errno
import gc
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable

PR_SET_NAME = 15

SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "armv7l": 380}
"""Numbers of the system call; the agent has them as well (`system.process`), but nothing of ours is imported here."""

PATH_MAX = 4096
"""Bytes of a path, at most (Linux)."""

OWN_DESCRIPTORS = 3
"""That come with a folder: its lock, where to say the first word, where errors go."""

DRAIN_S = 2.0
"""What a workload has written is read for as long after its end; all who could write are dead then."""

LOOK_S = 1.0
"""Between two looks at the lease: so late a workload may be ended."""

SAID = 4096
"""Bytes kept of what a program says when it fails."""

OOM_SCORE = 500
"""Where the machine runs out of memory, a workload goes before the agent (0, or less where its unit says so, which all that it starts would have) and the system's."""

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

Live = Callable[[str, list], None]  # type: ignore[type-arg]
"""A keeper's life: its folder, and the descriptors beyond `OWN_DESCRIPTORS`."""


class Trouble(Exception):
    """It could not be started; the text is for people."""


class Taken(Trouble):
    """A port that it publishes cannot be had here; it may be had on another node."""


class Lapsed(Trouble):
    """Its lease was over before it began."""


def lease_s(path: str) -> float:
    """Seconds that are left of a lease; none where it is not there."""
    try:
        with open(path) as handle:
            return (int(handle.read()) - time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000) / 1000
    except (OSError, ValueError):
        return 0.0


def check(result: int, what: str) -> int:
    """Raises `Trouble` where a call of the C library failed."""
    if result < 0:
        raise Trouble(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def write(path: str, value: dict) -> None:  # type: ignore[type-arg]
    """A document, whole or not at all, on the disk when this returns. A disk that is full is told apart from nothing: the agent then sees that the end is not known."""
    temporary = path + ".new"
    with open(temporary, "w") as handle:
        json.dump(value, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_end(folder: str, result: dict) -> None:  # type: ignore[type-arg]
    """How it ended; where the disk is full the older half of what it wrote goes first: how it ended is worth more than what it said before."""
    for _ in range(2):
        try:
            write(os.path.join(folder, "exit.json"), result)
            return
        except OSError as error:
            if error.errno != errno.ENOSPC:
                return
            for stale in ("stdout.log.1", "stderr.log.1"):
                try:
                    os.unlink(os.path.join(folder, stale))
                except OSError:
                    pass


def leave_group(folders: list) -> None:  # type: ignore[type-arg]
    """Out of the agent's control groups: a service manager ends all that is in them, and their limits are the agent's. What cannot be left is not."""
    for folder in folders:
        try:
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, "cgroup.procs"), "w") as handle:
                handle.write(str(os.getpid()))
        except OSError:
            continue


def ordinary_turns() -> None:
    """The priority and the turns at the processor that any process has: the agent's own are better than what it starts may have."""
    os.setpriority(os.PRIO_PROCESS, 0, max(0, os.getpriority(os.PRIO_PROCESS, 0)))
    number = SCHED_SETATTR.get(os.uname().machine)
    if number is not None and os.sched_getscheduler(0) == os.SCHED_OTHER:
        attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, os.getpriority(os.PRIO_PROCESS, 0), 0, 0, 0, 0)  # no length of turns: the kernel's own
        libc.syscall(number, 0, attributes, 0)


def started_ticks(pid: int) -> int:
    """When a process began, in ticks since boot: with the pid and the boot it names a process for good."""
    with open(f"/proc/{pid}/stat", "rb") as handle:
        return int(handle.read().rpartition(b")")[2].split()[19])


class Log:
    """The end of a stream in two files that together stay within `most` bytes. What the disk does not take is dropped: the container must not wait for it."""

    def __init__(self, path: str, most: int) -> None:
        self._path, self._half = path, max(1, most // 2)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size

    def again(self) -> "Log":
        """The log that has its name now."""
        os.close(self._file)
        return Log(self._path, 2 * self._half)

    def take(self, data: bytes) -> None:
        """Append."""
        while data:
            if self._size >= self._half:
                self._turn()
            piece = data[:self._half - self._size] or data[:1]
            try:
                done = os.write(self._file, piece)
            except OSError:
                return
            self._size += done
            data = data[done:]

    def _turn(self) -> None:
        os.rename(self._path, self._path + ".1")
        os.close(self._file)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = 0


def tell(word: str) -> None:
    """One line to the agent; it may be dead."""
    try:
        os.write(1, word.encode() + b"\n")
        null = os.open("/dev/null", os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
    except OSError:
        pass


def memory_kills(told: dict) -> int:  # type: ignore[type-arg]
    """Processes that the kernel has killed in the workload's own control group for want of memory, since that was made; 0 where it is not there. Those that ran there before the workload count as well: who wants its own takes the difference."""
    for path in told.get("oom", ()):
        try:
            with open(path) as handle:
                for line in handle:
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
        except (OSError, ValueError, IndexError):
            continue
    return 0


def for_memory(code: int, kills: int) -> bool:
    """Whether memory is why a workload ended. `code`: of its first process, 128 and the signal where one ended it; `kills`: of its processes, by the kernel, for want of memory.

    Only where it ended by SIGKILL, or as a shell whose last command did: one that went on when a child was killed has ended for a reason of its own.
    """
    return kills > 0 and code == 128 + signal.SIGKILL


def fork(live: Live, folder: str, descriptors: list, line: socket.socket) -> None:  # type: ignore[type-arg]
    """A keeper; returns in the server."""
    if os.fork() != 0:
        return
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        line.close()
        _lock, said, errors, *more = descriptors  # the lock is held by being open
        for source, target in ((said, 1), (errors, 2)):
            os.dup2(source, target)
            os.close(source)
        libc.prctl(PR_SET_NAME, b"novacron-keeper", 0, 0, 0)
        live(folder, more)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def serve(live: Live, descriptor: int, groups: list, more: int = 0) -> int:  # type: ignore[type-arg]
    """The server, on the socket `descriptor`, until its other end is closed; `groups`: folders of control groups to go into; `more`: descriptors that a keeper may get beyond `OWN_DESCRIPTORS`."""
    ordinary_turns()
    leave_group(groups)
    libc.prctl(PR_SET_NAME, b"novacron-keepers", 0, 0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers that end leave nothing behind
    gc.freeze()  # what is here is shared with all that are forked, and a collection would write to it
    line = socket.socket(fileno=descriptor)
    line.set_inheritable(False)
    while True:
        try:
            data, descriptors, _, _ = socket.recv_fds(line, PATH_MAX, OWN_DESCRIPTORS + more, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return 0
        if not data:
            return 0
        if len(descriptors) >= OWN_DESCRIPTORS:
            fork(live, os.fsdecode(data), descriptors, line)
        for one in descriptors:
            os.close(one)
