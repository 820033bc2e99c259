"""Facts about this process, from /proc; 0 where it cannot be read."""

import os
from collections.abc import Mapping

HEAP_TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
"""What GLIBC_TUNABLES should hold where the agent is started (the systemd unit does). With malloc's caches, an agent under load whose link flaps grows by megabytes an hour with
nothing more in use: chunks of half a page to a page, kept apart, that nothing fits into. Elsewhere than on glibc it means nothing."""


SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "armv7l": 380}
"""Numbers of the system call, which glibc wraps from 2.41 on only."""

TURN_NS = 100_000
"""Nanoseconds of a turn at the processor that we ask for: the least that the kernel grants."""


def resident_bytes() -> int:
    """Resident set size, bytes."""
    try:
        with open("/proc/self/statm", "rb") as handle:
            return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def open_descriptors() -> int:
    """Open file descriptors."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


def prefer(nice: int) -> bool:
    """Give the calling thread this nice value (setpriority(2)) and say whether it has it.

    Only a thread that still has the default, 0: what an operator chose holds. To be called before other threads are there: they inherit it, and must
    have it too, or one that holds the interpreter's lock would be kept from the processor while the thread that decides waits for that lock. Where control groups or sessions share the processor (cgroup `cpu.weight`, autogroup), it counts among the
    threads of ours only.
    """
    try:
        if nice and os.getpriority(os.PRIO_PROCESS, 0) == 0:
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        return os.getpriority(os.PRIO_PROCESS, 0) == nice
    except OSError:  # not root, and no RLIMIT_NICE
        return False


def short_turns() -> bool:
    """Ask for short turns at the processor for every thread of this process and those that they will start; whether the kernel took the wish.

    Linux 6.12 and later keep an entity's slice (sched_setattr(2), `sched_runtime` of a SCHED_OTHER thread): who asks for less at a time is served sooner when it wakes,
    and gets no more in all. A decision is a few hundred microseconds long and waits for others' turns of some milliseconds otherwise. No privilege is needed; older kernels take the call and do nothing.
    """
    import ctypes
    import struct

    number = SCHED_SETATTR.get(os.uname().machine)
    if number is None:
        return False
    try:
        if os.sched_getscheduler(0) != os.SCHED_OTHER:
            return False  # an operator chose another policy
        # struct sched_attr, version 0: size, policy, flags, nice, priority, runtime, deadline, period.
        call = ctypes.CDLL(None).syscall
        taken = True
        for thread in map(int, os.listdir("/proc/self/task")):
            try:
                attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, os.getpriority(os.PRIO_PROCESS, thread), 0, TURN_NS, 0, 0)
            except ProcessLookupError:
                continue  # it has ended
            taken = call(number, thread, attributes, 0) == 0 and taken
        return taken
    except (OSError, AttributeError):
        return False


def one_heap(environment: Mapping[str, str]) -> None:
    """One malloc arena for all threads (mallopt(3), M_ARENA_MAX): ours hardly compete, and each arena keeps pages of its own. And no bins of small chunks that are not
    joined with their neighbours (M_MXFAST): what is freed between messages then serves for what comes next, and the heap does not fray. The other half of that is the
    cache of each thread, which only the environment can switch off, before the start: `HEAP_TUNABLES`. Where that says all of it, there is nothing to do."""
    if environment.get("MALLOC_ARENA_MAX") == "1" and HEAP_TUNABLES in environment.get("GLIBC_TUNABLES", ""):
        return
    import ctypes

    try:
        library = ctypes.CDLL(None)
        library.mallopt(-8, 1)
        library.mallopt(1, 0)
    except (OSError, AttributeError):
        return


def return_free_memory() -> None:
    """Give freed heap pages back to the system (malloc_trim(3)); start-up leaves about a megabyte of them, and each minute of messages some."""
    import ctypes

    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
