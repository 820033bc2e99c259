"""Where keepers come from: one process, made at the first container, that has loaded what a keeper needs and forks one for each container.

An interpreter's start and imports take half of a container's start, and six megabytes for each; forked, keepers share them. The server ends when its socket does, with the agent; keepers go on.
"""

import fcntl
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .cgroups import Groups
from .instance import line

CLOSES_S = 0.05
"""Seconds for the socket of a server that was killed to be closed, once descriptors that it was sent are."""

_PROGRAM = Path(__file__).with_name("keeper.py")


class Keepers:
    """Starts keepers; used by several threads.

    Args:
        groups: the host's control groups; the server, and so each keeper, goes into those of keepers.
        program: what it runs.
    """

    def __init__(self, groups: Groups, program: Path = _PROGRAM) -> None:
        self._groups, self._program = groups, program
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self, folder: Path, seconds: float, more: Sequence[int] = (), stop: int = -1) -> str:
        """A keeper for `folder`; its first word, empty where there came none within `seconds` or where another holds the folder's lock. Blocks. `more`: descriptors that it gets beside the three. `stop`: one that becomes
        readable where nobody wants to wait any more.

        It takes the lock over from us: between us and it, it is never free. Raises OSError where the server cannot be started.
        """
        word = self._start(folder, seconds, more, stop)
        if not word and self._ended():  # with the request unread: nobody has it, or its keeper has the lock
            word = self._start(folder, seconds, more, stop)
        return word

    def _ended(self) -> bool:
        """Whether the server has ended by itself. It says nothing by its socket, which can be read from when it is closed."""
        with self._lock:
            if self._socket is None or not select.select([self._socket], [], [], CLOSES_S)[0]:
                return False
            self._end()
            return True

    def _start(self, folder: Path, seconds: float, more: Sequence[int], stop: int) -> str:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        opened = [lock]
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            opened.append(os.open(folder / "keeper.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
            said, its_end = os.pipe()
            opened.append(its_end)
        except BlockingIOError:
            for descriptor in opened:
                os.close(descriptor)
            return ""
        try:
            try:
                self._ask(folder, (lock, its_end, opened[1], *more))
            finally:
                for descriptor in opened:
                    os.close(descriptor)
            self._groups.stir()  # what it keeps is put into a group soon, and this thread only waits for it
            return line(said, seconds, stop)
        finally:
            os.close(said)

    def _ask(self, folder: Path, descriptors: Sequence[int]) -> None:
        with self._lock:
            for _ in range(2):
                if self._socket is None:
                    self._begin()
                assert self._socket is not None
                try:
                    socket.send_fds(self._socket, [os.fsencode(folder)], descriptors)
                    return
                except OSError:  # it was killed; what it forked lives
                    self._end()
            raise ConnectionError("the process that keepers come from ends at once")

    def _begin(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._server = subprocess.Popen(
                [sys.executable, "-I", "-S", str(self._program), str(its.fileno()), *self._groups.of_keepers()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                start_new_session=True, pass_fds=(its.fileno(),), env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
            )
        except OSError:
            ours.close()
            raise
        finally:
            its.close()
        self._socket = ours

    def _end(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._server is not None:
            with suppress(OSError):
                self._server.kill()
            self._server.wait()
        self._server = self._socket = None

    def close(self) -> None:
        """End the server; keepers go on."""
        with self._lock:
            self._end()
