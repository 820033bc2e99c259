"""Mount namespace, loop devices and mounts by system call: a thousand of them a minute, and none left over when this process ends.

Needs root. Errors are OSError with the call's name.
"""

import ctypes
import ctypes.util
import fcntl
import os
import shutil
import struct
import time
from pathlib import Path

CLONE_NEWNS = 0x0002_0000
MS_RDONLY, MS_NOATIME, MS_REMOUNT, MS_REC, MS_PRIVATE = 0x1, 0x400, 0x20, 0x4000, 0x4_0000
UMOUNT_DETACH = 2
LOOP_CONFIGURE, LOOP_CLR_FD, LOOP_CTL_GET_FREE = 0x4C0A, 0x4C01, 0x4C82
LO_FLAGS_AUTOCLEAR = 4
LOOP_MAJOR = 7
LOOP_CONFIG_BYTES = 304
"""sizeof(struct loop_config) of linux/loop.h."""
LOOP_FLAGS_OFFSET = 60
"""Where `info.lo_flags` stands in it: behind fd, block_size and 52 bytes of loop_info64."""

ATTACH_TRIES = 50
"""Another process may take the free loop device between the question and the answer."""

BUSY_TRIES, BUSY_PAUSE_S = 200, 0.01
"""A file system may be busy for a moment after the last process on it was killed: at most 2 s."""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    result = int(getattr(_libc, name)(*arguments))
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def own_namespace() -> None:
    """Give this process mounts of its own: they vanish with it and its children."""
    _call("unshare", CLONE_NEWNS)
    _call("mount", b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)


def mount(source: str, target: Path, kind: str, options: str = "", flags: int = MS_NOATIME) -> None:
    """mount(2)."""
    _call("mount", source.encode(), str(target).encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())


def remount(target: Path, *, read_only: bool) -> None:
    """Make a mount read-only or writable again."""
    _call("mount", None, str(target).encode(), None, ctypes.c_ulong(MS_REMOUNT | (MS_RDONLY if read_only else 0)), None)


def unmount(target: Path, *, detach: bool = False) -> None:
    """umount(2); waits a moment while it is busy."""
    for attempt in range(BUSY_TRIES):
        try:
            _call("umount2", str(target).encode(), UMOUNT_DETACH if detach else 0)
            return
        except OSError:
            if attempt == BUSY_TRIES - 1:
                raise
            time.sleep(BUSY_PAUSE_S)


def attach(image: Path) -> tuple[str, int]:
    """A loop device over `image`; its path, and a descriptor that holds it: it is freed when that is closed and nothing is mounted from it."""
    backing = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(ATTACH_TRIES):
            with open("/dev/loop-control", "rb") as control:
                number = fcntl.ioctl(control.fileno(), LOOP_CTL_GET_FREE)
            path = f"/dev/loop{number}"
            if not os.path.exists(path):
                os.mknod(path, 0o600 | 0o060000, os.makedev(LOOP_MAJOR, number))
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            config = bytearray(LOOP_CONFIG_BYTES)
            struct.pack_into("=II", config, 0, backing, 0)
            struct.pack_into("=I", config, LOOP_FLAGS_OFFSET, LO_FLAGS_AUTOCLEAR)
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, config)
                return path, device
            except OSError:
                os.close(device)
        raise OSError(f"no free loop device in {ATTACH_TRIES} tries")
    finally:
        os.close(backing)


def program(name: str) -> str:
    """Where a program of the system is, also one that only root has in its path; the bare name where it is not to be found."""
    return shutil.which(name) or next((f"{folder}/{name}" for folder in ("/usr/sbin", "/sbin") if os.access(f"{folder}/{name}", os.X_OK)), name)


def reason_against() -> str:
    """Why none of this can be done here; empty where it can."""
    if os.getuid() != 0:
        return "mounting needs root"
    for path in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(path):
            return f"{path} is missing"
    for tool in ("mkfs.ext4", "e2fsck"):
        if program(tool) == tool:
            return f"{tool} is missing (Debian package e2fsprogs)"
    pid = os.fork()
    if pid == 0:
        try:
            own_namespace()
            with open("/dev/loop-control", "rb") as control:
                fcntl.ioctl(control.fileno(), LOOP_CTL_GET_FREE)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return "" if os.waitpid(pid, 0)[1] == 0 else "mount namespaces or loop devices are not to be had here"
