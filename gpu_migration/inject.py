"""One system call in another process, by ptrace: what only a process itself may ask of the kernel. x86-64 only.

The thread is stopped wherever it is, its registers are set to a `syscall` instruction that every process has (in the vdso), one step is taken, and the registers are put back, so that a
call that was interrupted goes on as if nothing had been. It stands still for well under a millisecond. Killed by force within that, we would leave it with wrong registers; nothing else can go wrong.
"""

import ctypes
import os
import platform
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import SourceError

_SEIZE, _INTERRUPT, _DETACH, _GETREGS, _SETREGS, _SINGLESTEP = 0x4206, 0x4207, 17, 12, 13, 9
_WALL = 0x40000000
"""waitpid: threads too."""
_REGISTERS = 27
_R9, _R8, _R10, _RAX, _RDX, _RSI, _RDI, _ORIG_RAX, _RIP = 8, 9, 7, 10, 12, 13, 14, 15, 16
"""Places in struct user_regs_struct."""
_ARGUMENTS = (_RDI, _RSI, _RDX, _R10, _R8, _R9)
_SYSCALL = b"\x0f\x05"
_NO_RESTART = (1 << 64) - 1
"""In orig_rax: this is no interrupted call."""


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes, libc.ptrace.restype = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_long
    if libc.ptrace(request, pid, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _instruction(pid: int) -> int:
    """Where a `syscall` instruction lies in a process."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                memory.seek(start)
                found = memory.read(end - start).find(_SYSCALL)
            if found >= 0:
                return start + found
    raise SourceError(f"process {pid}: it has no vdso with a system call in it")


class Stopped:
    """A process whose main thread stands still for us."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._at = _instruction(pid)
        self._saved = self._registers()

    def _registers(self) -> "ctypes.Array[ctypes.c_ulonglong]":
        registers = (ctypes.c_ulonglong * _REGISTERS)()
        _ptrace(_GETREGS, self._pid, ctypes.addressof(registers))
        return registers

    def call(self, number: int, *arguments: int) -> int:
        """A system call there; its result, negative errors raised as OSError."""
        registers = (ctypes.c_ulonglong * _REGISTERS)(*self._saved)
        registers[_RAX], registers[_ORIG_RAX], registers[_RIP] = number, _NO_RESTART, self._at
        for place, value in zip(_ARGUMENTS, arguments, strict=False):
            registers[place] = value
        _ptrace(_SETREGS, self._pid, ctypes.addressof(registers))
        try:
            _ptrace(_SINGLESTEP, self._pid)
            _, status = os.waitpid(self._pid, _WALL)
            if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGTRAP:
                raise SourceError(f"process {self._pid}: it did not make a system call that was asked of it (status {status:#x})")
            result = ctypes.c_longlong(self._registers()[_RAX]).value
        finally:
            _ptrace(_SETREGS, self._pid, ctypes.addressof(self._saved))
        if -4096 < result < 0:
            raise OSError(-result, os.strerror(-result))
        return result


@contextmanager
def stopped(pid: int) -> Iterator[Stopped]:
    """Stop a process's main thread; it goes on at the end. Raises SourceError where that cannot be. All of it on one thread, and with signals that would end us held back."""
    if platform.machine() != "x86_64":
        raise SourceError("system calls in another process are made on x86-64 only")
    held: Sequence[int] = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        _ptrace(_SEIZE, pid)
        try:
            _ptrace(_INTERRUPT, pid)
            os.waitpid(pid, _WALL)
            yield Stopped(pid)
        finally:
            _ptrace(_DETACH, pid)
    except (OSError, ValueError) as error:
        raise SourceError(f"process {pid}: {error}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
