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


def one_heap() -> None:
    """One malloc arena for all threads (mallopt(3), M_ARENA_MAX): ours hardly compete, and each arena keeps pages of its own."""
    import ctypes

    try:
        ctypes.CDLL(None).mallopt(-8, 1)
    except (OSError, AttributeError):
        return


def return_free_memory() -> None:
    """Give freed heap pages back to the system (malloc_trim(3)); start-up leaves about a megabyte of them."""
    import ctypes

    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
