"""Where the disk of a virtual machine is in an image: an OCI image like a container's, from an archive or a registry, with one file in the folder `disk` (as KubeVirt's container disks are).

    disk/NAME.qcow2, NAME.raw or NAME.img     the disk; its name says its format, its content must agree
    boot/vmlinuz, boot/initrd, boot/cmdline   a kernel that is given to the machine, what it starts with, its arguments; the last two may be missing

A format is never guessed from a disk's content alone: a guest that wrote the header of another format into its raw disk could make QEMU open files of the node.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import vm_qcow2
from .face import Refused

FORMATS = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw"}

MAX_CMDLINE = 4096
"""Bytes that are read of boot/cmdline."""

MIN_DISK = 512
"""Bytes of the smallest disk: one sector."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a machine starts from: the disk's file, format and size (as a guest sees it), and the kernel's files (None where the image has none)."""

    disk: Path
    format: str
    bytes: int
    kernel: Path | None
    initrd: Path | None
    arguments: str


def find(lower: Sequence[Path]) -> Content:
    """What the layers of an image have, the uppermost first. Raises `Refused`."""
    disks = [path for path in _files(lower, "disk") if path.suffix in FORMATS]
    if len(disks) != 1:
        raise Refused("image", f"has {len(disks) or 'no'} disk{'s' * (len(disks) != 1)} in its folder disk", "put one file there whose name ends with .qcow2, .raw or .img; or run it as a container")
    boot = {path.name: path for path in _files(lower, "boot")}
    for name in ("vmlinuz", "initrd"):
        if name in boot and not os.stat(boot[name]).st_mode & stat.S_IROTH:
            raise Refused("image", f"its boot/{name} may be read by its owner only, and a machine's QEMU is somebody else", "give it the mode 644")
    cmdline = boot.get("cmdline")
    arguments = ""
    if cmdline is not None:
        with open(cmdline, "rb") as handle:
            arguments = handle.read(MAX_CMDLINE).decode("utf-8", "replace").strip()
    form, size = FORMATS[disks[0].suffix], disk_bytes(disks[0])
    return Content(disks[0], form, size, boot.get("vmlinuz"), boot.get("initrd"), arguments)


def disk_bytes(path: Path) -> int:
    """Bytes of a disk as a guest sees it, after all checks. Raises `Refused`."""
    with open(path, "rb") as handle:
        head, length = handle.read(vm_qcow2.LOOK), os.fstat(handle.fileno()).st_size
    if FORMATS[path.suffix] == "qcow2":
        try:
            return vm_qcow2.check(head, length).bytes
        except vm_qcow2.BadDisk as error:
            raise Refused("image", f"its disk {path.name} is not taken: {error}", "make it anew by qemu-img convert -O qcow2, without a backing file") from None
    if head.startswith(vm_qcow2.MAGIC):
        raise Refused("image", f"its disk {path.name} is named as a raw one, and begins as a qcow2 disk does", "name it .qcow2 if that is what it is")
    if length < MIN_DISK or length % 512:
        raise Refused("image", f"its disk {path.name} has {length} bytes, which is no whole number of sectors", "copy the disk again: it was cut off")
    return length


def _files(lower: Sequence[Path], name: str) -> list[Path]:
    """Regular files in a folder of an image, each name once: what an upper layer has, or has taken away, hides what is below. Links are not followed."""
    found: dict[str, Path | None] = {}
    for layer in lower:
        folder = layer / name
        if not folder.is_symlink() and folder.is_dir():
            for entry in os.scandir(folder):
                mode = entry.stat(follow_symlinks=False).st_mode
                found.setdefault(entry.name, Path(entry.path) if stat.S_ISREG(mode) else None)
    return sorted(path for path in found.values() if path is not None)
