"""Facts about this process, from /proc; 0 where it cannot be read."""

import os


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


def one_heap() -> None:
    """One malloc arena for all threads (mallopt(3), M_ARENA_MAX): ours hardly compete, and each arena keeps pages of its own."""
    import ctypes

    try:
        ctypes.CDLL(None).mallopt(-8, 1)
    except (OSError, AttributeError):
        return


def return_free_memory() -> None:
    """Give freed heap pages back to the system (malloc_trim(3)); start-up leaves about a megabyte of them, and each minute of messages some."""
    import ctypes

    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
