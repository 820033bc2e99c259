"""The state of a workload on the disk: how it is written, and how it is looked through before anything of it is used.

    manifest.json       canonical JSON: what it is of (`kind`, `host`, `order`, `image`, `layers`, and what `SHAPES` has for its kind), what is here (`files`), and `root`, the hash over all else in it
    images/NAME         of a container what CRIU wrote, of a virtual machine what `vm_checkpoint` has; compressed
    disk.tar            what a container changed in its root: a layer as OCI has them (PAX tar, `.wh.` marks), compressed; owners as the container sees them
    kept.qcow2          of a virtual machine whose disk went ahead (`ahead` in the manifest), where it was taken: that disk. Beside the state, not in the manifest, and not carried
    ahead.qcow2         the same, where it came to: the copy that went ahead, over which `images/rest.qcow2` lies

Every file stands in the manifest with its length, compressed and not, and the SHA-256 of what is stored. So one hash names the whole state, and a bit that differs anywhere is found.
The hash says that a state is whole, not who wrote it: whoever can write one can make a container of any content, as who writes an image. It holds the memory of all processes, with their secrets.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ...system.disk_pace import Pace
from .face import Capabilities, Refused
from .instance import sync_folder

VERSION = 1
"""Of the format."""

MANIFEST, IMAGES, DISK = "manifest.json", "images", "disk.tar"

CONTAINER, VM = "container", "vm"
"""Kinds of states: the names of the drivers that bring them back."""

MEMORY, MACHINE_DISK, REST = f"{IMAGES}/state", f"{IMAGES}/disk.qcow2", f"{IMAGES}/rest.qcow2"
"""Of a virtual machine: its memory and devices, and what it wrote; or, where a copy of that went ahead, what it wrote since."""

KEPT_DISK, AHEAD_DISK = "kept.qcow2", "ahead.qcow2"
"""What lies beside the state of a machine whose disk went ahead."""

WENT_AHEAD = "ahead"
"""In the manifest of such a one: the name under which it went."""

SHAPES: Mapping[str, Mapping[str, type]] = {
    CONTAINER: {"host": dict, "order": dict, "config": dict, "image": str, "layers": list, "processes": list, "base": int}, VM: {"host": dict, "order": dict, "machine": dict, "image": str, "layers": list},
}
"""What the manifest of each kind has beside its files."""

FILES: Mapping[str, frozenset[str]] = {CONTAINER: frozenset((DISK,)), VM: frozenset((MEMORY, MACHINE_DISK)), WENT_AHEAD: frozenset((MEMORY, REST))}
"""Files that a state of each kind has; the last one is a machine's whose disk went ahead."""

SPARE = 64 << 20
"""Bytes that stay free on a disk beside what is written."""

MAX_MANIFEST = 8 << 20
"""Bytes: 512 processes and some hundred files take 100 KiB."""

MAX_FILES = 65_536
"""CRIU writes about ten files, and four more for each process; a container has at most 32,768. A virtual machine's state has five."""

MAX_LENGTH = 1 << 46
"""Bytes of one file: more than any node's memory or disk."""

CHUNK = 1 << 20
"""Bytes that are read, hashed and compressed at a time."""

WINDOW = 1 << 23
"""Bytes that a decompressor may keep of what it has read: eight times what our level uses."""

LEVEL = 1
"""Of the compression: the container stands still meanwhile."""

_NAME = re.compile(r"(images/[A-Za-z0-9][A-Za-z0-9_.-]{0,127}|disk\.tar)\Z")
_HASH = re.compile(r"[0-9a-f]{64}\Z")


def is_file(name: str) -> bool:
    """Whether a file beside the manifest may have this name."""
    return bool(_NAME.match(name))


def codec() -> str:
    """The compression that can be had: `zstd`, or `zlib` where its package is not installed."""
    try:
        import zstandard  # noqa: F401
    except ImportError:
        return "zlib"
    return "zstd"


class Writer:
    """One compressed file; used as a context. `entry` is its line in the manifest once it is closed; then it is on the disk, unless `sync` is false: that is for a state which only has to outlive its agent."""

    def __init__(self, folder: Path, name: str, how: str, sync: bool = True) -> None:
        self._file = open(folder / name, "xb")  # noqa: SIM115
        os.fchmod(self._file.fileno(), 0o600)
        self._pace = Pace(os.fdatasync, rest=False)  # it stands still
        self._sync, self._name, self._hash, self._size, self._stored = sync, name, hashlib.sha256(), 0, 0
        if how == "zstd":
            import zstandard

            self._compress: Any = zstandard.ZstdCompressor(level=LEVEL).compressobj()
        else:
            self._compress = zlib.compressobj(LEVEL)
        self.entry: dict[str, Any] = {}

    def write(self, data: bytes) -> int:
        """Append."""
        self._size += len(data)
        self._put(self._compress.compress(data))
        return len(data)

    def _put(self, data: bytes) -> None:
        self._hash.update(data)
        self._stored += len(data)
        self._file.write(data)
        if self._sync:
            self._pace.wrote(self._file.fileno(), len(data))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._put(self._compress.flush())
                self._file.flush()
                if self._sync:
                    os.fsync(self._file.fileno())
                self.entry = {"name": self._name, "size": self._size, "stored": self._stored, "sha256": self._hash.hexdigest()}
        finally:
            self._file.close()


class Reader:
    """The plain content of one file, by `read(n)`; used as a context. Raises `Refused` where it is not what the manifest says; `finish` looks at what comes after the last byte that was asked for."""

    def __init__(self, folder: Path, entry: Mapping[str, Any], how: str) -> None:
        self._entry, self._left = entry, int(entry["size"])
        self._file = open(folder / entry["name"], "rb")  # noqa: SIM115
        self._zlib: Any = None
        self._waits = b""
        if how == "zstd":
            import zstandard

            self._stream: Any = zstandard.ZstdDecompressor(max_window_size=WINDOW).stream_reader(self._file, read_size=CHUNK)
        else:
            self._zlib = zlib.decompressobj()

    def read(self, most: int = CHUNK) -> bytes:
        """Up to `most` bytes; empty at the end."""
        try:
            data = self._plain(min(most, self._left + 1))
        except Exception as error:  # zlib.error or ZstdError, of a package that may not be there
            raise self._odd(f"cannot be decompressed ({str(error)[:80]})") from None
        self._left -= len(data)
        if self._left < 0:
            raise self._odd("is longer than the manifest says")
        if not data and self._left:
            raise self._odd("is shorter than the manifest says")
        return data

    def _plain(self, most: int) -> bytes:
        if self._zlib is None:
            return bytes(self._stream.read(most))
        while True:
            self._waits = self._waits or self._file.read(CHUNK)
            ended = not self._waits
            data: bytes = self._zlib.decompress(self._waits, most)
            self._waits = self._zlib.unconsumed_tail
            if data or ended:
                return data

    def _odd(self, problem: str) -> Refused:
        return Refused("checkpoint", f"{self._entry['name']} {problem}", "take the checkpoint, or copy it, again")

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def add(folder: Path, name: str, source: BinaryIO, how: str, sync: bool = True) -> dict[str, Any]:
    """Compress what `source` gives into the file `name`; its line in the manifest. Blocks."""
    with Writer(folder, name, how, sync) as target:
        while data := source.read(CHUNK):
            target.write(data)
    return target.entry


def canonical(value: Any) -> bytes:
    """The one way to write a document: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def seal(folder: Path, document: Mapping[str, Any], files: Sequence[Mapping[str, Any]], how: str, sync: bool = True) -> dict[str, Any]:
    """Write the manifest, when all else is there; returns it. All of the folder is on the disk then, unless `sync` is false."""
    manifest = {**document, "version": VERSION, "codec": how, "files": sorted(files, key=lambda one: str(one["name"]))}
    manifest["root"] = hashlib.sha256(canonical(manifest)).hexdigest()
    with open(folder / MANIFEST, "xb") as handle:
        os.fchmod(handle.fileno(), 0o600)
        handle.write(canonical(manifest))
        handle.flush()
        if sync:
            os.fsync(handle.fileno())
    for each in (folder / IMAGES, folder) if sync else ():
        sync_folder(each)
    return manifest


def whole_at(folder: Path, token: str) -> bool:
    """Whether the state that was to be written there under that token is whole: what decides, where somebody was killed."""
    try:
        return bool(read_manifest(folder).get("token") == token)
    except Refused:
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, where it is one; raises `Refused`. The files are not looked at."""
    try:
        with open(folder / MANIFEST, "rb") as handle:
            data = handle.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise Refused("checkpoint", f"{folder} has no {MANIFEST} that can be read ({error.strerror})", "name the folder of a checkpoint") from None
    if len(data) > MAX_MANIFEST:
        raise _unlike(f"is longer than {MAX_MANIFEST} bytes")
    try:
        value: Any = json.loads(data)
        told = dict(value)
        root = told.pop("root")
        whole = canonical(value) == data and hashlib.sha256(canonical(told)).hexdigest() == root
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _unlike("is not a manifest") from None
    if not whole:
        raise _unlike("has another content than its own hash says")
    if told.get("version") != VERSION:
        raise Refused("checkpoint", f"has version {str(told.get('version'))[:40]} of the format, this agent reads {VERSION}", "restore it with an agent of the version that took it")
    if told.get("codec") not in ("zstd", "zlib"):
        raise _unlike(f"says that its files are compressed by {str(told.get('codec'))[:40]}")
    if told["codec"] == "zstd" and codec() != "zstd":
        raise Refused("checkpoint", "is compressed by zstd, for which the package zstandard is missing here", "pip install zstandard")
    kind = VM if told.get("kind") == VM else CONTAINER  # another one's driver refuses it
    files = told.get("files")
    if not isinstance(told.get(WENT_AHEAD, ""), str) or (WENT_AHEAD in told and kind != VM):
        raise _unlike("says nothing that could be of what went ahead")
    least = FILES[WENT_AHEAD if WENT_AHEAD in told else kind]
    if not isinstance(files, list) or len(files) > MAX_FILES or not all(_file(one) for one in files) or len({one["name"] for one in files}) != len(files) or not least <= {one["name"] for one in files}:
        raise _unlike("has a list of files that is none")
    odd = [name for name, shape in SHAPES[kind].items() if not isinstance(told.get(name), shape)]
    if odd:
        raise _unlike(f"lacks {', '.join(odd)}")
    return {**told, "root": root}


def _file(one: Any) -> bool:
    if not isinstance(one, dict) or set(one) != {"name", "size", "stored", "sha256"} or not isinstance(one["name"], str) or not _NAME.match(one["name"]):
        return False
    return isinstance(one["sha256"], str) and bool(_HASH.match(one["sha256"])) and all(type(one[key]) is int and 0 <= one[key] <= MAX_LENGTH for key in ("size", "stored"))


def to_be_filled(folder: Path) -> None:
    """Raises `Refused` where a state cannot be written to a folder: it must be empty or not there."""
    try:
        if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
            raise Refused("folder", f"{folder} is there, and not an empty folder", "name one that is empty or not there")
        if not folder.parent.is_dir():
            raise Refused("folder", f"{folder.parent} is not there", "make it first")
    except OSError as error:
        raise Refused("folder", f"{folder} cannot be looked at: {error.strerror}", "name another one") from None


def free(place: Path) -> int:
    """Bytes that are free in the file system of a folder."""
    told = os.statvfs(place)
    return told.f_bavail * told.f_frsize


def _unlike(problem: str) -> Refused:
    return Refused("checkpoint", f"{MANIFEST} {problem}", "take the checkpoint, or copy it, again")


def check(folder: Path) -> dict[str, Any]:
    """The manifest, after every file was held against it; raises `Refused`. Blocks as long as reading all of it takes."""
    manifest = read_manifest(folder)
    want = {one["name"]: one for one in manifest["files"]}
    try:
        beside = {MANIFEST, IMAGES, *((KEPT_DISK, AHEAD_DISK) if WENT_AHEAD in manifest else ())}
        have = {entry.name for entry in os.scandir(folder)} - beside | {f"{IMAGES}/{entry.name}" for entry in os.scandir(folder / IMAGES)}
        if odd := sorted(have ^ set(want)):
            raise Refused("checkpoint", f"{odd[0][:140]} is {'not in the manifest' if odd[0] in have else 'missing'}", "take the checkpoint, or copy it, again")
        for name, one in want.items():
            told, size = hashlib.sha256(), 0
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as handle:
                while size <= one["stored"] and (data := handle.read(CHUNK)):
                    told.update(data)
                    size += len(data)
            if size != one["stored"] or told.hexdigest() != one["sha256"]:
                raise Refused("checkpoint", f"{name} is not what the manifest says ({size} bytes of {one['stored']}, or another hash)", "take the checkpoint, or copy it, again")
    except OSError as error:
        raise Refused("checkpoint", f"cannot be read: {error.strerror}", "take the checkpoint, or copy it, again") from None
    return manifest


def suits(manifest: Mapping[str, Any], here: Capabilities, criu: str, *, other_kernel: bool = False) -> None:
    """Whether what was taken on its host can go on on this one; raises `Refused` with what stands against it.

    Args:
        criu: version of CRIU here; one that is older than the state's does not read all of it.
        other_kernel: a kernel of another release is accepted: what processes were told by their kernel may then be wrong, which only a look at the program can rule out.
    """
    there = manifest["host"]
    if there.get("arch") != here.arch:
        raise Refused("host.arch", f"it was taken on {there.get('arch')}, this is {here.arch}", "restore it on a node of the same architecture")
    missing = sorted(set(map(str, there.get("cpu_flags", ()))) - set(here.cpu_flags))
    if missing:
        more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
        raise Refused(
            "host.cpu_flags", f"its processes may use what this processor lacks: {', '.join(missing[:20])}{more}",
            "restore it on a node whose processor has them, or start the workload anew with these masked (of glibc: GLIBC_TUNABLES=glibc.cpu.hwcaps=-NAME,...)",
        )
    if there.get("kernel") != here.kernel and not other_kernel:
        raise Refused("host.kernel", f"it was taken under kernel {there.get('kernel')}, this is {here.kernel}", "restore it on a node with the same kernel, or start the workload anew")
    if there.get("cgroup") != here.cgroup:
        raise Refused("host.cgroup", f"it was taken with control groups of layout {there.get('cgroup')}, here it is {here.cgroup}", "restore it on a node with the same layout")
    if _numbers(str(there.get("criu"))) > _numbers(criu):
        raise Refused("host.criu", f"it was written by CRIU {there.get('criu')}, here is {criu}", "install that version or a later one")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(one) for one in re.findall(r"\d+", version)[:4])
