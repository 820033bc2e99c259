"""One layer, from a tar stream to a folder that overlayfs can use as a lower one.

What is kept and what is not, for every image:
- Names are taken as below the layer's root, whether or not they begin with a slash; one with `..` is refused. No symbolic link is ever followed: a member whose path goes through one
  is refused. Links' targets are kept as they are, since they are looked at only in the container.
- A hard link must be to a file of the same layer.
- Devices are left out: a container gets its own /dev. (A character device 0/0 is how overlayfs marks what a layer takes away, so an image must not bring one.)
- The bits setuid and setgid of files are dropped: nothing in a container gains privileges by running a program, and on the host they would be a danger. A folder keeps setgid and sticky.
- Extended attributes are dropped, file capabilities among them, by the same rule; those of overlayfs would let an image reach into other layers.
- `.wh.NAME` becomes overlayfs's mark for what is taken away, `.wh..wh..opq` its mark for a folder that hides the ones below. They speak of lower layers only, wherever they stand.
"""

import errno
import hashlib
import os
import shutil
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...system.disk_pace import ENTRY, Pace, syncfs
from .errors import ImageError
from .tar import BLOCK, BLOCK_DEVICE, CHARACTER, FIFO, FILE, FOLDER, HARD_LINK, SYMLINK, Member, TarError, TarReader

CHUNK = 1 << 18
"""Bytes that are read, inflated and written at a time."""

MAX_DEPTH = 128
"""Folders above a file; real images have up to twenty."""

MAX_ZSTD_WINDOW = 32 << 20
"""Bytes that reading zstd may take for its window: the largest of the Go encoder that skopeo and buildx use. `zstd --ultra -22` asks for 128 MiB, which an edge has not to give."""

SPACE_EACH = 64 << 20
"""Bytes after which the free space is looked at again."""

WHITEOUT, OPAQUE = b".wh.", b".wh..wh..opq"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_BITS = ~(stat.S_ISUID | stat.S_ISGID)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one image may have.

    Attributes:
        layer_bytes: of one layer, unpacked. image_bytes: of all its layers together.
        entries: members of one layer; each costs an inode.
        layers: overlayfs takes 500, the others' builders make 127 at most.
        keep_free: bytes of the disk that are never used for images.
    """

    layer_bytes: int = 16 << 30
    image_bytes: int = 64 << 30
    entries: int = 500_000
    layers: int = 127
    keep_free: int = 1 << 30


class Inflate:
    """Gzip, several streams in a row as the format allows, as a stream of plain bytes; `TarError` where it is damaged. What a small piece inflates to comes in pieces."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._inflate = zlib.decompressobj(31)
        self._waits = b""
        self._begun = False

    def read(self, most: int = CHUNK) -> bytes:
        """Up to `most` bytes; empty at the end."""
        while True:
            if not self._waits:
                self._waits = self._stream.read(CHUNK)
                if not self._waits:
                    if self._begun:
                        raise TarError("the gzip stream ends too early", "copy it again: it was cut off")
                    return b""
            try:
                data = self._inflate.decompress(self._waits, most)
            except zlib.error as error:
                raise TarError(f"the gzip stream is damaged ({error})", "copy it again") from None
            self._begun = True
            self._waits = self._inflate.unconsumed_tail
            if self._inflate.eof:
                self._waits = self._inflate.unused_data.lstrip(b"\0")
                self._inflate, self._begun = zlib.decompressobj(31), False
            if data:
                return data


class Unzstd:
    """Zstandard, several frames in a row, as a stream of plain bytes; `TarError` where it is damaged. Needs the package `zstandard`, which is imported only here."""

    def __init__(self, stream: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise ImageError("layer", "it is compressed with zstd, which needs the package zstandard", "on the node: pip install 'novacron[zstd]'; or build the image with gzip layers (skopeo: --dest-compress-format gzip)") from None
        self._error: type[Exception] = zstandard.ZstdError
        self._reader = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).stream_reader(stream, read_size=CHUNK, read_across_frames=True, closefd=False)

    def read(self, most: int = CHUNK) -> bytes:
        """Up to `most` bytes; empty at the end. A frame that is cut off ends here too: what it was to be is told by its hash."""
        try:
            return self._reader.read(most)
        except (self._error, MemoryError) as error:
            raise TarError(f"the zstd stream is damaged, or needs a window of more than {MAX_ZSTD_WINDOW} bytes ({error})", "copy it again; or build it with a smaller window (zstd --long=25, no --ultra)") from None


Plain = BinaryIO | Inflate | Unzstd
"""What an archive is read from."""


class Counted:
    """A stream that hashes and counts what is read of it, and refuses more than `most` bytes."""

    def __init__(self, stream: Plain, most: int, what: str) -> None:
        self._stream, self._most, self._what = stream, most, what
        self.count = 0
        self.digest = hashlib.sha256()

    def read(self, most: int = CHUNK) -> bytes:
        """Up to `most` bytes; empty at the end."""
        data = self._stream.read(most)
        self.count += len(data)
        if self.count > self._most:
            raise ImageError(self._what, f"more than {self._most} bytes", "build a smaller image, or raise the limit")
        self.digest.update(data)
        return data


@dataclass(slots=True)
class Unpacked:
    """What came of a layer: bytes of files, members, and members that were left out (devices)."""

    bytes: int = 0
    entries: int = 0
    left_out: int = 0


def unpack(stream: Plain, folder: Path, diff_id: str | None, limits: Limits, *, own: bool = True, pace: Pace | None = None) -> Unpacked:
    """Unpack a layer's tar into an empty folder and check that it was `diff_id` (64 hex digits; None: its hash has been looked at otherwise).

    Args:
        own: give files the owners that the layer says, and make whiteouts; needs root.
        pace: at which it is written.
    Errors: `ImageError`; the folder is then left half filled, and is the caller's to remove.
    """
    counted = Counted(stream, limits.layer_bytes, "layer")
    try:
        with _Tree(folder, limits, own, pace or Pace()) as tree:
            reader = TarReader(counted, limits.entries)  # type: ignore[arg-type]
            for member in reader:
                tree.take(member, reader)
            while counted.read(CHUNK):  # the hash is over all of it, also what follows the archive's end
                pass
    except TarError as error:
        raise ImageError("layer", error.problem, error.remedy) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ImageError("layer", "the disk is full", "free space, or give images a smaller budget") from None
        remedy = "run the agent as root of the machine, not in a container: owners, device nodes and trusted attributes are for it alone" if error.errno == errno.EPERM else "look at the disk"
        raise ImageError("layer", f"could not be unpacked: {error.strerror}", remedy) from None
    if diff_id is not None and counted.digest.hexdigest() != diff_id:
        raise ImageError("layer", f"its content has the hash {counted.digest.hexdigest()}, the image's config says {diff_id}", "build or copy the image again")
    return tree.told


class _Tree:
    """The folder that a layer is unpacked into. All is done relative to open folders, none of them reached through a link."""

    def __init__(self, folder: Path, limits: Limits, own: bool, pace: Pace) -> None:
        self._root = os.open(folder, _FOLDER)
        self._limits, self._own, self._pace = limits, own, pace
        self._at: tuple[bytes, ...] = ()
        self._open = self._root
        self._unlooked = 0
        self.told = Unpacked()

    def __enter__(self) -> "_Tree":
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        os.close(self._root)

    def _leave(self) -> None:
        if self._open != self._root:
            os.close(self._open)
        self._open, self._at = self._root, ()

    def take(self, member: Member, reader: TarReader) -> None:
        """Write one member."""
        self.told.entries += 1
        self._pace.wrote(self._root, ENTRY)
        parts = _parts(member.name)
        if not parts:
            if member.kind == FOLDER:
                self._dress(self._root, member)
            return
        parent, name = self._parent(parts), parts[-1]
        if name.startswith(WHITEOUT):
            self._hide(parent, name)
        elif member.kind in (CHARACTER, BLOCK_DEVICE):
            self.told.left_out += 1
        elif member.kind == FOLDER:
            self._folder(parent, name, member)
        else:
            self._clear(parent, name)
            if member.kind == FILE:
                self._file(parent, name, member, reader)
            elif member.kind == SYMLINK:
                if not member.target:
                    raise ImageError("layer", f"{_said(member.name)} is a link to nothing", "build the image again")
                os.symlink(member.target, name, dir_fd=parent)
                self._owner(parent, name, member)
            elif member.kind == HARD_LINK:
                self._link(parent, name, member)
            elif member.kind == FIFO:
                os.mkfifo(name, member.mode & 0o777, dir_fd=parent)
                self._owner(parent, name, member)

    def _parent(self, parts: tuple[bytes, ...]) -> int:
        """The open folder of a path; those that are missing are made. Kept for the next member, which is mostly beside it."""
        if parts[:-1] == self._at:
            return self._open
        self._leave()
        self._open, self._at = self._walk(parts[:-1], make=True), parts[:-1]
        return self._open

    def _walk(self, parts: tuple[bytes, ...], *, make: bool) -> int:
        here = self._root
        for part in parts:
            try:
                below = _below(here, part, make=make)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise ImageError("layer", f"{_said(b'/'.join(parts))} goes through {_said(part)}, which is no folder", "build the image again: a layer names folders by their own path") from None
                raise
            finally:
                if here != self._root:
                    os.close(here)
            here = below
        return here

    def _folder(self, parent: int, name: bytes, member: Member) -> None:
        was = _kind(parent, name)
        hidden = was is not None and _is_whiteout(parent, name)
        if was is None or not stat.S_ISDIR(was):
            self._clear(parent, name)
            os.mkdir(name, 0o700, dir_fd=parent)
        descriptor = os.open(name, _FOLDER, dir_fd=parent)
        try:
            self._dress(descriptor, member)
            if hidden:  # taken away below, and this put in its place
                self._opaque(descriptor)
        finally:
            os.close(descriptor)

    def _dress(self, descriptor: int, member: Member) -> None:
        if self._own:
            os.chown(descriptor, member.uid, member.gid)
        os.chmod(descriptor, member.mode & ~stat.S_ISUID)

    def _file(self, parent: int, name: bytes, member: Member, reader: TarReader) -> None:
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            while data := reader.read(CHUNK):
                self._space(len(data))
                count = len(data)
                while data:
                    data = data[os.write(descriptor, data):]
                self._pace.wrote(descriptor, count)
            if self._own:
                os.chown(descriptor, member.uid, member.gid)
            os.chmod(descriptor, member.mode & _NO_BITS)
            os.utime(descriptor, (member.mtime, member.mtime))
        finally:
            os.close(descriptor)
        self.told.bytes += member.size

    def _space(self, coming: int) -> None:
        self._unlooked -= coming
        if self._unlooked < 0:
            self._unlooked = SPACE_EACH
            told = os.fstatvfs(self._root)
            if told.f_bavail * told.f_frsize < self._limits.keep_free + SPACE_EACH:
                raise ImageError("layer", f"less than {self._limits.keep_free} bytes would stay free on the disk", "free space, or remove images")

    def _link(self, parent: int, name: bytes, member: Member) -> None:
        parts = _parts(member.target)
        if not parts:
            raise ImageError("layer", f"{_said(member.name)} is a hard link to nothing", "build the image again")
        try:
            source = self._walk(parts[:-1], make=False)
            try:
                kind = _kind(source, parts[-1])
                if kind is None or not (stat.S_ISREG(kind) or stat.S_ISLNK(kind)):
                    raise FileNotFoundError
                os.link(parts[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
            finally:
                if source != self._root:
                    os.close(source)
        except FileNotFoundError:
            raise ImageError("layer", f"{_said(member.name)} is a hard link to {_said(member.target)}, which is no file of this layer", "build the image again") from None

    def _owner(self, parent: int, name: bytes, member: Member) -> None:
        if self._own:
            os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)

    def _hide(self, parent: int, name: bytes) -> None:
        if name == OPAQUE:
            self._opaque(parent)
            return
        hidden = name[len(WHITEOUT):]
        if hidden.startswith(WHITEOUT):  # what aufs kept for itself
            return
        if hidden in (b"", b".", b".."):
            raise ImageError("layer", f"{_said(name)} takes away what has no name", "build the image again")
        kind = _kind(parent, hidden)
        if kind is not None and stat.S_ISDIR(kind):
            descriptor = os.open(hidden, _FOLDER, dir_fd=parent)
            try:
                self._opaque(descriptor)
            finally:
                os.close(descriptor)
        elif kind is None and self._own:
            os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent)

    def _opaque(self, descriptor: int) -> None:
        if self._own:
            _set_opaque(descriptor)

    def _clear(self, parent: int, name: bytes) -> None:
        """Remove what an earlier member of this layer put there: the last one counts."""
        kind = _kind(parent, name)
        if kind is None:
            return
        if stat.S_ISDIR(kind):
            shutil.rmtree(name, dir_fd=parent)  # the folder that is kept open is `parent` itself, so never below the one that goes
        else:
            os.unlink(name, dir_fd=parent)


def _below(here: int, part: bytes, *, make: bool) -> int:
    try:
        return os.open(part, _FOLDER, dir_fd=here)
    except OSError as error:
        hidden = error.errno == errno.ENOTDIR and _is_whiteout(here, part)
        if not make or not (error.errno == errno.ENOENT or hidden):
            raise
    if hidden:  # taken away below, and then something put in its place
        os.unlink(part, dir_fd=here)
    os.mkdir(part, 0o755, dir_fd=here)
    descriptor = os.open(part, _FOLDER, dir_fd=here)
    if hidden:
        _set_opaque(descriptor)
    return descriptor


def _set_opaque(descriptor: int) -> None:
    """Nothing of the layers below is seen in this folder. In a user namespace of its own, overlayfs reads another attribute (option `userxattr`), and the first one cannot be set."""
    try:
        os.setxattr(descriptor, b"trusted.overlay.opaque", b"y")
    except PermissionError:
        os.setxattr(descriptor, b"user.overlay.opaque", b"y")


def _kind(parent: int, name: bytes) -> int | None:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None


def _is_whiteout(parent: int, name: bytes) -> bool:
    told = os.stat(name, dir_fd=parent, follow_symlinks=False)
    return stat.S_ISCHR(told.st_mode) and told.st_rdev == 0


def _parts(name: bytes) -> tuple[bytes, ...]:
    parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
    if b".." in parts:
        raise ImageError("layer", f"{_said(name)} leads out of the layer", "do not use this image: it was made to write elsewhere, or its builder is broken")
    if len(parts) > MAX_DEPTH:
        raise ImageError("layer", f"{_said(name)} is {len(parts)} folders deep, over {MAX_DEPTH}", "build the image again")
    if any(len(part) > 255 for part in parts):
        raise ImageError("layer", f"{_said(name)} has a part of more than 255 bytes", "build the image again")
    return parts


def _said(name: bytes) -> str:
    return repr(name[:80])[1:]


def opener(media: str, stream: BinaryIO) -> Plain:
    """The plain tar of a layer of this media type; raises `ImageError` where it cannot be read here."""
    if media.endswith(("+zstd", ".zstd")):
        return Unzstd(stream)
    return Inflate(stream) if media.endswith(("gzip", ".gz")) else stream


def packed(head: bytes) -> str:
    """How a file that begins so is compressed: `gzip`, `zstd`, or empty."""
    return "gzip" if head.startswith(b"\x1f\x8b") else "zstd" if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[:1] >= b"\x50" and head[:1] <= b"\x5f") else ""


def inflate(path: Path, target: Path, limits: Limits, pace: Pace) -> None:
    """Write what a compressed file is to another, at most as much as an image may have and the disk has room for, at a pace.

    Errors: `ImageError`; what was written is the caller's to remove.
    """
    try:
        with open(path, "rb") as handle, open(target, "wb") as out:
            how = packed(handle.read(4))
            handle.seek(0)
            counted = Counted(Unzstd(handle) if how == "zstd" else Inflate(handle), limits.image_bytes, "archive")
            looked, last = 0, b"?"
            while data := counted.read(CHUNK):
                if counted.count >= looked:
                    told = os.fstatvfs(out.fileno())
                    if told.f_bavail * told.f_frsize < limits.keep_free + SPACE_EACH:
                        raise ImageError("archive", f"unpacked it would leave less than {limits.keep_free} bytes free on the disk", "free space, or give a smaller one")
                    looked = counted.count + SPACE_EACH
                out.write(data)
                pace.wrote(out.fileno(), len(data))
                last = data[-BLOCK:]
            if any(last):  # every tar that is whole ends with zeros; a zstd stream that is cut between two blocks ends without an error
                raise ImageError("archive", "ends too early", "copy it again: it was cut off, or it is no tar archive")
    except TarError as error:
        raise ImageError("archive", error.problem, error.remedy) from None


def settle(folder: Path) -> None:
    """Bring all of a folder to the disk: syncfs(2), one call instead of an fsync for each file."""
    descriptor = os.open(folder, _FOLDER)
    try:
        syncfs(descriptor)
    finally:
        os.close(descriptor)
