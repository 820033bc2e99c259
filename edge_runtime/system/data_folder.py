"""A data folder has one process at a time: two agents in one journal, or two hubs on one store, give the same numbers to different records."""

import os

FILE = "lock"
"""In the folder; it says which process has it."""

MOST = 32
"""Bytes of it that are read."""


class InUse(OSError):
    """Another process has the folder. The text is for people."""


def hold(folder: str) -> int:
    """Have the folder, made where it is not there, until this process ends, however it ends. The descriptor is to stay open.

    The lock is of the process (fcntl(2), record locks): what it starts or forks does not have it, so that a keeper or a broker that outlives it holds nobody up. A process that has it may take it again.
    Raises `InUse`; OSError where the disk does not take the file, or knows no locks.
    """
    os.makedirs(folder, exist_ok=True)
    held = os.open(os.path.join(folder, FILE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.lockf(held, os.F_TLOCK, 0)
        os.ftruncate(held, 0)
        os.write(held, b"%d\n" % os.getpid())
    except (BlockingIOError, PermissionError):
        whose = os.read(held, MOST).decode("ascii", "replace").strip()
        os.close(held)
        raise InUse(f"another process{f' ({whose})' if whose.isdigit() else ''} works on it; stop that one, or give this one a data folder of its own") from None
    except OSError:
        os.close(held)
        raise
    return held
