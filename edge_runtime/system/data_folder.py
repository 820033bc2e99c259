"""A data folder has one process at a time: two agents in one journal, or two hubs on one store, give the same numbers to different records. And its databases are nobody else's to read."""

import os
from contextlib import suppress

FILE = "lock"
"""In the folder; it says which process has it."""

MOST = 32
"""Bytes of it that are read."""


BESIDE = ("", "-wal", "-shm")
"""What of a database of SQLite's stands in which files; the other two get the first one's mode when they are made."""


def keep_private(database: str | os.PathLike[str]) -> None:
    """Nobody but its owner (and, where somebody has given it that, its group) reads a database: what shall run on a node stands in it, with the secrets that workloads are given. Called before it is opened, and makes it where it is not there.

    What is there is not opened: closing it would take this process's own locks away from SQLite. Where its mode cannot be changed (somebody else's file, a disk without modes) it stays as it is.
    """
    try:
        os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError:
        for end in BESIDE:
            with suppress(OSError):
                path = f"{os.fspath(database)}{end}"
                os.chmod(path, os.stat(path).st_mode & 0o770)


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
