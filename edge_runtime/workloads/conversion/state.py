"""What goes with a workload when it changes its form: from a container's folder to a guest's disk, and from a guest's disk to a state as a container is restored from. Blocks."""

import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..drivers.checkpoint_state import DISK, IMAGES, Reader, Writer, codec, read_manifest, seal
from ..drivers.container_checkpoint import user_namespace
from ..drivers.face import Failed, Refused
from ..drivers.microvm_disks import MAKE_S
from ..drivers.programs import searched
from ..images.layer import OPAQUE, WHITEOUT
from . import guest
from .ext4 import Ext4

MAX_CHANGED = 1 << 30
"""Bytes that a container may have changed in its root: they are packed while it stands still."""

MAX_IMAGES = 1 << 36
"""Bytes of CRIU's images from a guest; what its disk holds is less."""

MAX_SMALL = 1 << 20
"""Bytes of what is read into memory as a whole."""

_GROUPS = f"{IMAGES}/cgroup.img"

OPAQUE_MARK = "trusted.overlay.opaque"


def changed(upper: Path, lower: Sequence[Path], base: int) -> bytes:
    """What a container changed in its root, as an archive that a guest unpacks into the upper folder of an overlay: deleted names as devices 0:0; a folder that hides another one hides each name in it.

    Args:
        lower: the image's layers, the uppermost first.
        base: what is subtracted from owners.
    """
    target = io.BytesIO()
    total = 0
    with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as archive:
        for where, folders, names in os.walk(upper):
            below = os.path.relpath(where, upper)
            for name in ["", *sorted(names), *sorted(one for one in folders if os.path.islink(os.path.join(where, one)))]:
                path = os.path.join(where, name) if name else where
                told = os.lstat(path)
                if stat.S_ISSOCK(told.st_mode):
                    continue
                entry = archive.gettarinfo(path, os.path.normpath(os.path.join(below, name)))
                entry.uid, entry.gid, entry.uname, entry.gname = told.st_uid - base, told.st_gid - base, "", ""
                if stat.S_ISREG(told.st_mode) and entry.isreg():
                    total += told.st_size
                    if total > MAX_CHANGED:
                        raise Refused("resource.disk", f"it changed more than {MAX_CHANGED} bytes of its root", "have it write less there")
                    with open(path, "rb") as source:
                        archive.addfile(entry, source)
                else:
                    archive.addfile(entry)
                if not name and below != "." and _opaque(path):
                    for hidden in sorted({one for layer in lower for one in _names(layer / below)} - set(folders) - set(names)):
                        mark = tarfile.TarInfo(os.path.join(below, hidden))
                        mark.type = tarfile.CHRTYPE
                        archive.addfile(mark)
    return target.getvalue()


def _opaque(path: str) -> bool:
    try:
        return os.getxattr(path, OPAQUE_MARK) == b"y"
    except OSError:
        return False


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder) if folder.is_dir() and not folder.is_symlink() else []
    except OSError:
        return []


def travel(path: Path, raw: Path, disk: bytes) -> None:
    """Make a guest's disk of what goes with the workload: CRIU's images, in `raw`, with ids as the guest has them, and `disk`, an archive. The guest reads the images where they are."""
    for one in (raw / IMAGES).glob("userns-*"):
        one.write_bytes(user_namespace(one.read_bytes(), 0))  # a container gets its own again when it is laid out
    top = raw / "travel"
    top.mkdir(mode=0o700)
    names = [one.name for one in (raw / IMAGES).iterdir()]
    for name in names:
        os.link(raw / IMAGES / name, top / name)
    (top / guest.CHANGED).write_bytes(disk)
    words = [str(searched("mke2fs")), "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", "-N", str(len(names) + 64), "-d", str(top), str(path)]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=MAKE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed("convert", f"its state could not be put on a disk: {error}", "look at the disk of the data folder") from None
    if done.returncode:
        raise Failed("convert", f"its state could not be put on a disk: {done.stderr.strip()[:500]}", "look at the disk of the data folder")
    shutil.rmtree(top)


def from_guest(disk: Path, folder: Path, document: Mapping[str, Any], before: Path) -> dict[str, Any]:
    """Make a state, as `drivers.checkpoint_state` has it, though not on the disk at once (a machine that loses power loses the workload in either form; a state that is not whole then is known by its hashes), of what CRIU and the workload left on a guest's disk; returns the manifest. `folder` gets its name when all is on the disk.

    Args:
        before: the state with which the workload went into the guest. Which control groups it has on the node stands there: it had one for all, and CRIU's number for that is the same.
    """
    old = read_manifest(before)
    with Reader(before, next(one for one in old["files"] if one["name"] == _GROUPS), old["codec"]) as reader:
        groups = reader.read(MAX_SMALL)
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    (new / IMAGES).mkdir(parents=True, mode=0o700)
    os.chmod(new, 0o700)
    how = codec()
    files, total = [], 0
    with Ext4(disk) as system:
        where = guest.SHOT.encode()
        for raw, number in system.folder(system.find(where)):
            node, name = system.node(number), raw.decode("ascii", "replace")
            total += node.size
            if not stat.S_ISREG(node.mode) or total > MAX_IMAGES:
                raise Refused("checkpoint", f"{name[:80]} in it is no file, or it is too long", "end the guest")
            if name == "pipes":
                pipes = system.read(node, MAX_SMALL).decode("ascii", "replace").split()
                content = [json.dumps(["/dev/null", *pipes[:2]]).encode()]
                name = "descriptors.json"
            elif f"{IMAGES}/{name}" == _GROUPS:
                content = [groups]
            elif not name.endswith(".img"):
                continue
            else:
                content = list(system.content(node)) if node.size <= MAX_SMALL else system.content(node)  # type: ignore[assignment]
            with Writer(new, f"{IMAGES}/{name}", how, sync=False) as target:
                for piece in content:
                    target.write(piece)
            files.append(target.entry)
        with Writer(new, DISK, how, sync=False) as target:
            _layer(system, cast(BinaryIO, target))
        files.append(target.entry)
    manifest = seal(new, document, files, how, sync=False)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(new, folder)
    return manifest


def _layer(system: Ext4, target: BinaryIO) -> None:
    """The upper folder of a guest's overlay, as a layer of OCI's."""
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape") as archive:
        seen: dict[int, str] = {}
        for raw, node in system.walk(b"upper"):
            name = os.fsdecode(raw)
            entry = tarfile.TarInfo(name or ".")
            entry.mode, entry.mtime, entry.uid, entry.gid = stat.S_IMODE(node.mode), node.mtime, node.uid, node.gid
            if os.path.basename(name).startswith(WHITEOUT.decode()):
                raise Refused("resource.disk", f"/{name[:200]} has a name that means something else in a layer", "have it use another name")
            if stat.S_ISDIR(node.mode):
                entry.type = tarfile.DIRTYPE
                archive.addfile(entry)
                if system.attributes(node).get(OPAQUE_MARK) == b"y":
                    archive.addfile(tarfile.TarInfo(os.path.join(name, OPAQUE.decode())))
            elif stat.S_ISCHR(node.mode) and node.device == (0, 0):
                archive.addfile(tarfile.TarInfo(os.path.join(os.path.dirname(name), f"{WHITEOUT.decode()}{os.path.basename(name)}")))
            elif node.number in seen:
                entry.type, entry.linkname = tarfile.LNKTYPE, seen[node.number]
                archive.addfile(entry)
            elif stat.S_ISREG(node.mode):
                seen[node.number] = name
                entry.size = node.size
                archive.addfile(entry, cast(BinaryIO, _Pieces(system.content(node))))
            elif stat.S_ISLNK(node.mode):
                entry.type, entry.linkname = tarfile.SYMTYPE, os.fsdecode(system.link(node))
                archive.addfile(entry)
            elif stat.S_ISFIFO(node.mode):
                entry.type = tarfile.FIFOTYPE
                archive.addfile(entry)
            elif not stat.S_ISSOCK(node.mode):
                raise Refused("resource.disk", f"/{name[:200]} is a device", "have it leave devices in /dev")


class _Pieces:
    """Reads what comes in pieces."""

    def __init__(self, pieces: Any) -> None:
        self._pieces, self._waits = iter(pieces), b""

    def read(self, most: int) -> bytes:
        while len(self._waits) < most and (piece := next(self._pieces, b"")):
            self._waits += piece
        data, self._waits = self._waits[:most], self._waits[most:]
        return data
