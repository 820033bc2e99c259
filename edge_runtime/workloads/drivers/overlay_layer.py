"""What overlayfs keeps of a root that was changed, or of a layer, as a layer of OCI's: the other direction of `images.layer`. Blocks."""

import os
import stat
import tarfile
from pathlib import Path
from typing import BinaryIO

from ..images.layer import OPAQUE, WHITEOUT
from .face import Refused

CHUNK = 1 << 18
"""Bytes that are read and written at a time: tarfile's own 10 and 16 KiB take twice as long."""

MAX_ENTRIES = 500_000
"""Files and folders of one layer: as many as are taken back (`images.layer.Limits`)."""


def pack_disk(upper: Path, target: BinaryIO, base: int) -> None:
    """Write a folder as a layer, without compression; raises `Refused` for what a layer cannot hold. Unix sockets are left out: who has them open makes them again.

    Args:
        upper: what a container changed in its root, or a layer of the store.
        base: what owners' numbers are higher by than the container sees them.
    """
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape", bufsize=CHUNK) as archive:
        archive.copybufsize = CHUNK  # type: ignore[attr-defined]  # mypy's picture of tarfile lacks it
        inodes: dict[int, str] = {}
        waiting = [("", os.fspath(upper))]
        count = 0
        while waiting:
            name, path = waiting.pop()
            told = os.lstat(path)
            entry = tarfile.TarInfo(name or ".")
            entry.mode, entry.mtime = stat.S_IMODE(told.st_mode), int(told.st_mtime)
            entry.uid, entry.gid = told.st_uid - base, told.st_gid - base
            count += 1
            if count > MAX_ENTRIES:
                raise Refused("resource.disk", f"it changed more than {MAX_ENTRIES} files of its root", "have it write them to a mount")
            if stat.S_ISDIR(told.st_mode):
                _overlay(path, name)
                entry.type = tarfile.DIRTYPE
                archive.addfile(entry)
                if _attribute(path, "trusted.overlay.opaque") == b"y":
                    archive.addfile(_mark(os.path.join(name, OPAQUE.decode())))
                waiting += sorted(((os.path.join(name, one.name), one.path) for one in os.scandir(path)), reverse=True)
                continue
            if os.path.basename(name).startswith(WHITEOUT.decode()):
                raise Refused("resource.disk", f"/{name} has a name that means something else in a layer", "have it use another name")
            if stat.S_ISCHR(told.st_mode) and told.st_rdev == 0:
                archive.addfile(_mark(os.path.join(os.path.dirname(name), f"{WHITEOUT.decode()}{os.path.basename(name)}")))
            elif stat.S_ISSOCK(told.st_mode):
                continue
            elif told.st_nlink > 1 and told.st_ino in inodes:
                entry.type, entry.linkname = tarfile.LNKTYPE, inodes[told.st_ino]
                archive.addfile(entry)
            elif stat.S_ISREG(told.st_mode):
                _overlay(path, name)
                inodes[told.st_ino] = name
                entry.size = told.st_size
                with open(path, "rb") as source:
                    archive.addfile(entry, source)
            elif stat.S_ISLNK(told.st_mode):
                entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(path)
                archive.addfile(entry)
            elif stat.S_ISFIFO(told.st_mode):
                entry.type = tarfile.FIFOTYPE
                archive.addfile(entry)
            else:
                raise Refused("resource.disk", f"/{name} is a device", "have it leave devices in /dev")


def _mark(name: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(name)


def _attribute(path: str, name: str) -> bytes:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return b""


def _overlay(path: str, name: str) -> None:
    """Overlayfs can be set so that what it keeps in a folder cannot be read without it."""
    for kind in ("redirect", "metacopy"):
        if _attribute(path, f"trusted.overlay.{kind}"):
            raise Refused("resource.disk", f"/{name} is kept by overlayfs in a way that cannot be copied ({kind})", f"set the kernel's overlay.{kind if kind == 'metacopy' else 'redirect_dir'} to N, and start the workload anew")
