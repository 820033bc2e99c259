"""Disks of micro-VMs: an image's layers as one read-only ext4 file, made once for each image; and an empty one for what an instance writes (folders `upper` and `work`, as overlayfs wants them). Both block; they run in threads.

    <dir>/.images/<digest>.ext4     the images, those used last kept within a budget
    <dir>/.blank/<bytes>.ext4       empty file systems, copied for each instance (their holes are kept)
"""

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from .face import Failed, Refused

MAKE_S = 300.0
"""For making a file system of an image: 16 GiB at 100 MB/s take less."""

BLOCK = 4096
MARGIN = 16 << 20
"""Bytes of an image's file system beyond its files and an eighth of them; what is not used is a hole."""

MAX_BLANKS = 8
"""Sizes of empty disks that are kept."""

_MERGE = 'cd "$1" && mount -t overlay -o ro,nodev,nosuid,lowerdir="$2" merged "$3" && "$4" -q -F -t ext4 -b 4096 -m 0 -N "$5" -O ^has_journal,^resize_inode -E root_owner=0:0 -d "$3" "$6" "$7" && "$8" -w -R "rmdir lost+found" "$6"'


class Disks:
    """The files below `directory`.

    Args:
        mke2fs: the program.
    """

    def __init__(self, directory: Path, mke2fs: str) -> None:
        self._images, self._blanks, self._new, self._mke2fs = directory / ".images", directory / ".blank", directory / ".new", mke2fs
        for folder in (self._images, self._blanks, self._new):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, digest: str) -> Path:
        """Where the file of an image is, or would be."""
        return self._images / f"{digest}.ext4"

    def image(self, digest: str, lower: Sequence[Path]) -> Path:
        """The file of an image, made where it is not there. `lower`: its layers, the uppermost first. Raises `Failed` and `Refused`."""
        path = self.path(digest)
        if path.exists():
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # when it was written stays: a template has parts of it in memory
            return path
        size, inodes = measure(lower)
        told = os.statvfs(self._images)
        if told.f_bavail * told.f_frsize < size:
            raise Refused("image", f"its file system takes {size} bytes, {told.f_bavail * told.f_frsize} are free", "free space, or place it on another node")
        work = self._new / f"{digest}.image"
        shutil.rmtree(work, ignore_errors=True)
        for name in ("links", "root", "links/none/dev", "links/none/proc", "links/none/sys"):
            (work / name).mkdir(parents=True)
        for at, layer in enumerate(lower):
            (work / "links" / str(at)).symlink_to(layer)
        names = ":".join([*(str(at) for at in range(len(lower))), "none"])  # overlayfs wants two at least; and the guest mounts on its folders
        words = ["unshare", "-m", "sh", "-c", _MERGE, "sh", str(work / "links"), names, str(work / "root"), self._mke2fs, str(inodes + 64), str(work / "disk"), f"{-(-size // 1024)}k", str(Path(self._mke2fs).with_name("debugfs"))]
        try:
            self._run(words)
            os.chmod(work / "disk", 0o600)
            os.rename(work / "disk", path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return path

    def blank(self, size: int, target: Path) -> None:
        """An empty disk of `size` bytes at `target`, which must not be there. Raises `Failed`."""
        copy_sparse(self.empty(size), target)

    def empty(self, size: int) -> Path:
        """The empty disk of `size` bytes that is copied, made where it is not there. Raises `Failed`."""
        path = self._blanks / f"{size}.ext4"
        if not path.exists():
            work = self._new / f"{size}.blank"
            work.unlink(missing_ok=True)
            skeleton = self._new / f"{size}.skeleton"
            for name in ("upper", "work"):
                (skeleton / name).mkdir(parents=True, exist_ok=True)
                os.chmod(skeleton / name, 0o755)
            try:
                self._run(
                    [self._mke2fs, "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-m", "0", "-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", "-d", str(skeleton), str(work), f"{size // 1024}k"],
                )
            finally:
                shutil.rmtree(skeleton, ignore_errors=True)
            os.rename(work, path)
            for old in sorted(self._blanks.iterdir(), key=lambda one: one.stat().st_mtime)[:-MAX_BLANKS]:
                old.unlink()
        return path

    def prune(self, budget: int, in_use: Collection[str]) -> None:
        """Keep the images' files within `budget` bytes; never those whose digests are in use."""
        found = sorted(((one.stat().st_atime, one.stat().st_blocks * 512, one) for one in self._images.iterdir()), key=lambda entry: -entry[0])
        total = 0
        for _, size, path in found:
            total += size
            if total > budget and path.stem not in in_use:
                path.unlink()
                total -= size

    def _run(self, words: Sequence[str]) -> None:
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=MAKE_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failed("disk", f"a file system could not be made: {error}", "look at the disk of the data folder") from None
        if done.returncode != 0:
            raise Failed("disk", f"a file system could not be made: {done.stderr.strip()[:1000] or done.returncode}", "look at the disk of the data folder")


def measure(lower: Sequence[Path]) -> tuple[int, int]:
    """Bytes that an image's file system needs at most, and files: the layers' own, also those that one hides from another."""
    blocks = files = 0
    for layer in lower:
        for where, folders, names in os.walk(layer):
            files += len(folders) + len(names)
            blocks += len(folders) + sum(1 + -(-os.lstat(os.path.join(where, name)).st_size // BLOCK) for name in names)
    content = blocks * BLOCK
    return content + content // 8 + files * 256 + MARGIN, files


def copy_sparse(source: Path, target: Path) -> None:
    """A copy of what is not a hole."""
    with open(source, "rb") as reading, open(target, "xb") as writing:
        os.fchmod(writing.fileno(), 0o600)
        copy_data(reading.fileno(), writing.fileno())


def copy_data(reading: int, writing: int) -> None:
    """What is not a hole, from one descriptor into an empty file's."""
    size, at = os.fstat(reading).st_size, 0
    os.truncate(writing, size)
    while at < size:
        try:
            at = os.lseek(reading, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(reading, at, os.SEEK_HOLE)
        os.lseek(writing, at, os.SEEK_SET)
        while at < end:
            at += os.sendfile(writing, reading, at, end - at)
