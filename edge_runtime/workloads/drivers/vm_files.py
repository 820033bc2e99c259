"""Files that are disks of virtual machines: an empty one, and one that is whole. All of it blocks."""

import os
from pathlib import Path

from . import vm_qcow2
from .instance import sync_folder


def lay(path: Path, size: int) -> None:
    """Write an empty disk of `size` bytes, which lies over another one, to a file that is not there yet."""
    head, length = vm_qcow2.empty(size)
    with open(path, "xb") as handle:
        os.fchmod(handle.fileno(), 0o600)
        handle.write(head)
        handle.truncate(length)


def settle(path: Path) -> int:
    """Have a file on the disk, with its name; its bytes."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        size = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    sync_folder(path.parent)
    return size
