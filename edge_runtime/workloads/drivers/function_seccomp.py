"""The system calls that are left to a process which runs, or compiles, a module: memory, clocks, chance, and the descriptors that it already has. Everything else is refused by the kernel (EPERM).

A classic BPF program, as seccomp(2) takes it; installed as the last thing that such a process does with its rights.
"""

import ctypes
import os
import platform
import struct

CALLS: dict[str, tuple[int, int]] = {
    "brk": (12, 214), "clock_getres": (229, 114), "clock_gettime": (228, 113), "clock_nanosleep": (230, 115), "close": (3, 57), "dup": (32, 23), "exit": (60, 93), "exit_group": (231, 94), "fallocate": (285, 47),
    "fcntl": (72, 25), "fstat": (5, 80), "ftruncate": (77, 46), "futex": (202, 98), "getegid": (108, 177), "geteuid": (107, 175), "getgid": (104, 176), "getpid": (39, 172), "getppid": (110, 173),
    "getrandom": (318, 278), "gettid": (186, 178), "gettimeofday": (96, 169), "getuid": (102, 174), "lseek": (8, 62), "madvise": (28, 233), "membarrier": (324, 283), "memfd_create": (319, 279), "mmap": (9, 222),
    "mprotect": (10, 226), "mremap": (25, 216), "munmap": (11, 215), "nanosleep": (35, 101), "ppoll": (271, 73), "pread64": (17, 67), "pselect6": (270, 72), "pwrite64": (18, 68), "read": (0, 63), "readv": (19, 65),
    "recvfrom": (45, 207), "restart_syscall": (219, 128), "rseq": (334, 293), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sched_getaffinity": (204, 123), "sched_yield": (24, 124),
    "sendto": (44, 206), "set_robust_list": (273, 99), "sigaltstack": (131, 132), "tgkill": (234, 131), "write": (1, 64), "writev": (20, 66),
}
"""Name to its number on x86_64 and on aarch64. `memfd_create` and `ftruncate`: the engine keeps a module's data in a file in memory. `tgkill`: abort(3). Not among them: anything that opens, executes, forks,
connects, traces, mounts, or gives descriptors away."""

ARCHITECTURES = {"x86_64": (0, 0xC000_003E), "aarch64": (1, 0xC000_00B7)}
"""Column of `CALLS`, and AUDIT_ARCH of <linux/audit.h>."""

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF_0000, 0x8000_0000, 0x0005_0000 | 1
"""SECCOMP_RET_ALLOW, _KILL_PROCESS, and _ERRNO with EPERM."""
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
"""Bytes into struct seccomp_data."""
_X32 = 0x4000_0000
"""Bit of the numbers of x86_64's other interface."""
_PR_SET_SECCOMP, _FILTER = 22, 2


def program(machine: str) -> bytes:
    """The filter, 8 bytes for each instruction; empty where the numbers of this architecture are not known here."""
    if machine not in ARCHITECTURES:
        return b""
    column, architecture = ARCHITECTURES[machine]
    numbers = sorted(pair[column] for pair in CALLS.values())
    end = len(numbers)
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT), (_JUMP_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT), (_JUMP_AT_LEAST, end, 0, _X32),  # to the refusal
        *((_JUMP_EQUAL, end - at, 0, number) for at, number in enumerate(numbers)),  # to the permission, which comes after the refusal
        (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def there(machine: str = platform.machine()) -> bool:
    """Whether there is a filter here."""
    return machine in ARCHITECTURES and os.path.exists("/proc/sys/kernel/seccomp/actions_avail")


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]


def install(machine: str = platform.machine()) -> None:
    """From now on, and for good, nothing but `CALLS`; nothing where there is no filter (`there`). Needs no_new_privs. Raises OSError where the kernel refuses it."""
    if not there(machine):
        return
    steps = program(machine)
    libc = ctypes.CDLL(None, use_errno=True)
    told = _Program(len(steps) // 8, steps)
    if libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(told), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
