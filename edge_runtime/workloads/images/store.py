"""Images on this node's disk: each layer unpacked once, by its content; images are small documents that name layers.

    <dir>/layers/<diff_id>/        a layer, as overlayfs takes it; there only whole
    <dir>/layers/<diff_id>.json    its size; written before the folder gets its name
    <dir>/images/<digest>.json     an image: names, config, layers, when it was last asked for
    <dir>/new/                     what is under way; emptied at open
    <dir>/lock                     held by the one agent that uses the store (flock; ends with the process, however it ends)

Everything gets its name by a rename after it has reached the disk, so a kill or a power cut at any moment leaves whole things and leavings in `new`. Opening repairs: leavings go, layers
without a size are measured again, images whose layers are gone are dropped. Compressed layers are not kept: what is verified and unpacked is not needed twice.
Methods block; they are called from a thread. One adds or removes at a time; what is here is found meanwhile.
"""

import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ...system.disk_pace import Pace, remove
from .errors import ImageError
from .layer import CHUNK, Counted, Limits, Unpacked, inflate, opener, packed, settle, unpack
from .manifest import MODULE_FILE, MODULES, Config, Platform
from .source import Files, Layer, Plan, opened, plan

_HEX = re.compile(r"[0-9a-f]{64}\Z")
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,254}\Z")

MAX_NAMES = 64
"""Names that one image goes by; the oldest are forgotten beyond it."""

MAX_ARCHIVES = 256
"""Sources in a folder that are looked at for one image."""

FRESH_MS = 60_000
"""The image that was asked for last need not be written down as that again within a minute: two waits for the disk less in the start of what runs from it."""

PLAIN = "archive.plain"
"""Name in `new` of what a compressed archive is."""

MAX_LOOKED = 1024
"""Sources known not to have an image, each with the name that was looked for: a compressed one is not unpacked for the same question again."""

MAX_RECORD = 8 << 20
"""Bytes of an image's document: a config of the largest size, and its names."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is here, whole. `bytes`: of all its layers, which others may share."""

    digest: str
    names: tuple[str, ...]
    config: Config
    bytes: int
    used_ms: int


class ImageStore:
    """Images below `directory`, which belongs to the store alone.

    Args:
        own: unpack with owners and whiteouts, as containers need it. Needs root; without it the store serves tests of unprivileged users only.
        step: called with a word before each step that changes the disk; a test kills the process there.
    Errors: `ImageError`, also where another process has the store.
    """

    def __init__(self, directory: Path, *, limits: Limits = Limits(), here: Platform | None = None, own: bool = True, step: Callable[[str], None] = lambda word: None) -> None:
        self.directory, self.limits, self.here, self._own, self._step = directory, limits, here or Platform.here(), own, step
        self._layers, self._images, self._new = directory / "layers", directory / "images", directory / "new"
        self._adding, self._lock = threading.Lock(), threading.Lock()
        """One adds or prunes at a time, which takes as long as unpacking does; the second is for the documents, and taken after the first. So what is here is found while another image comes."""
        self._pace = Pace()
        self._absent: set[tuple[str, str, int, int, int]] = set()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(directory, 0o700)  # files of others' programs, with owners of their choice: nobody but root reaches them
        self._held = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._held)
            raise ImageError("store", f"{directory} is used by another process", "stop the other agent, or give this one another data folder") from None
        self._repair()

    def close(self) -> None:
        """Let another process have it; a second call does nothing."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    # -- asking --------------------------------------------------------------------------------------------------------------

    def images(self) -> list[Image]:
        """All images, the one that was asked for last first."""
        with self._lock:
            return self._all()

    def find(self, reference: str) -> Image:
        """The image of a name, or of `sha256:<digest>` (also after `@`); raises `ImageError`. It counts as asked for now."""
        with self._lock:
            digest = reference.rpartition("@")[2].removeprefix("sha256:")
            images = self._all()
            for image in images:
                if reference in image.names or f"{reference}:latest" in image.names or digest == image.digest:
                    now = int(time.time() * 1000)
                    if image is images[0] and 0 <= now - image.used_ms < FRESH_MS:
                        return image
                    used = replace(image, used_ms=now)
                    self._write(used)
                    return used
        raise ImageError("image", f"{reference[:100]} is not on this node", "bring it here: an OCI layout, or an archive of one or of docker save")

    def lower(self, image: Image) -> list[Path]:
        """Its layers' folders, the uppermost first, as overlayfs wants them."""
        return [self._layers / diff_id for diff_id in reversed(image.config.diff_ids)]

    def used_bytes(self) -> int:
        """Bytes of all layers."""
        with self._lock:
            return sum(self._size(layer) for layer in self._kept())

    # -- adding --------------------------------------------------------------------------------------------------------------

    def find_or_take(self, reference: str, archives: Path) -> Image:
        """`find`, and where it is not here, the first of the sources in a folder that has an image of this very name."""
        try:
            return self.find(reference)
        except ImageError as error:
            absent, broken = error, []
        for path in sorted(archives.iterdir())[:MAX_ARCHIVES] if archives.is_dir() else ():
            told = path.stat(follow_symlinks=True) if path.is_file() else None
            looked = (reference, path.name, told.st_ino, told.st_size, told.st_mtime_ns) if told else None
            if looked in self._absent:
                continue
            try:
                return self.add(path, reference, strict=True)
            except ImageError as error:
                if error.field != "reference":
                    broken.append(f"{path.name}: {error}")
                elif looked is not None and len(self._absent) < MAX_LOOKED:
                    self._absent.add(looked)
        if broken:
            raise ImageError("image", f"{absent.problem}, and of what is in {archives} some cannot be taken: {'; '.join(broken)[:1000]}", "put a good archive there")
        raise ImageError("image", absent.problem, f"put an OCI layout, or an archive of one or of docker save, into {archives}")

    def add(self, path: Path, reference: str = "", *, strict: bool = False) -> Image:
        """Take an image from an OCI layout (a folder, or a tar of one) or from a `docker save` archive; all or nothing.

        Args:
            reference: which of several, and a name that it goes by from now on; of other images with this name it is taken away.
            strict: only what goes by this name there already; else the only image of a source may get any name.
        """
        _checked(reference)
        with self._adding:
            try:
                return self._planned(opened(self._plain(path)), reference, strict)
            except OSError as error:
                raise ImageError("image", f"could not be read or kept: {error.strerror}", "look at the disk of the data folder, and at the source") from None
            finally:
                (self._new / PLAIN).unlink(missing_ok=True)

    def add_files(self, files: Files, reference: str) -> Image:
        """As `add`, from files in the form of an OCI layout that are there already: what a registry gave."""
        _checked(reference)
        with self._adding:
            try:
                return self._planned(files, reference, False)
            except OSError as error:
                raise ImageError("image", f"could not be read or kept: {error.strerror}", "look at the disk of the data folder") from None

    def has(self, diff_ids: Collection[str]) -> set[str]:
        """Which of these layers are here already."""
        with self._lock:
            return {diff_id for diff_id in diff_ids if (self._layers / diff_id).is_dir()}

    def _planned(self, files: Files, reference: str, strict: bool) -> Image:
        found = plan(files, reference, self.here, self.limits, strict=strict)
        return self._take(found, tuple(dict.fromkeys(name for name in (reference, *found.names) if _REFERENCE.match(name))))

    def _plain(self, path: Path) -> Path:
        """The archive itself, or what it is where it is compressed as a whole: to jump about in it, it has to be plain on the disk."""
        if not path.is_file():
            return path
        with open(path, "rb") as handle:
            if not packed(handle.read(4)):
                return path
        self._step("inflate")
        inflate(path, self._new / PLAIN, self.limits, self._pace)
        return self._new / PLAIN

    def _take(self, found: Plan, names: tuple[str, ...]) -> Image:
        total, first = 0, True
        for at, layer in enumerate(found.layers):
            if not (self._layers / layer.diff_id).is_dir():
                if first:
                    self._room(sum(one.size for one in found.layers))
                    first = False
                try:
                    self._unpack(layer, self.limits.image_bytes - total)
                except ImageError as error:
                    raise ImageError(error.field.replace("layer", f"layers[{at}]", 1), error.problem, error.remedy) from None
            total += self._size(layer.diff_id)
            if total > self.limits.image_bytes:
                raise ImageError("image", f"its layers have more than {self.limits.image_bytes} bytes", "build a smaller image, or raise the limit")
        with self._lock:
            before = next((image for image in self._all() if image.digest == found.digest), None)
            names = tuple(dict.fromkeys((*names, *(before.names if before else ()))))[:MAX_NAMES]
            image = Image(found.digest, names, found.config, total, int(time.time() * 1000))
            self._write(image)  # before the others lose its names: a kill in between leaves a name twice, and the one that was used last is meant
            for other in self._all():
                if other.digest != found.digest and set(other.names) & set(names):
                    self._write(replace(other, names=tuple(name for name in other.names if name not in names)))
        return image

    def _room(self, coming: int) -> None:
        told = os.statvfs(self.directory)
        free = told.f_bavail * told.f_frsize
        if free < coming + self.limits.keep_free:
            raise ImageError("image", f"{free} bytes are free, it needs {coming} and {self.limits.keep_free} stay free", "free space, or remove images")

    def _unpack(self, layer: Layer, most: int) -> None:
        """First the bytes are held against their digest, only then are they read as an archive, from the source once more: a copy would be written to the disk for nothing. Where the source changed in between, the hash of what
        came of it tells."""
        folder = self._new / layer.diff_id
        limits = replace(self.limits, layer_bytes=min(self.limits.layer_bytes, most))
        try:
            self._step("verify")
            self._verify(layer)
            self._step("unpack")
            folder.mkdir(mode=0o755)
            if layer.media in MODULES:
                self._verify(layer, folder / MODULE_FILE)
                told = Unpacked(layer.size, 1)
            else:
                with layer.open() as handle:
                    told = unpack(opener(layer.media, handle), folder, layer.diff_id, limits, own=self._own, pace=self._pace)
            self._step("settle")
            settle(folder)
            self._put(self._layers / f"{layer.diff_id}.json", asdict(told))
            self._step("rename")
            os.rename(folder, self._layers / layer.diff_id)
            _sync_folder(self._layers)
            self._step("kept")
        finally:
            remove(folder, self._pace)

    def _verify(self, layer: Layer, copy: Path = Path(os.devnull)) -> None:
        """Read it, and hold it against its size and digest; it is copied meanwhile."""
        with layer.open() as source, open(copy, "wb") as target:
            counted = Counted(source, layer.size, "layer")
            while data := counted.read(CHUNK):
                target.write(data)
        if counted.count != layer.size:
            raise ImageError("layer", f"has {counted.count} bytes instead of {layer.size}", "copy the image again: it was cut off")
        if layer.digest and counted.digest.hexdigest() != layer.digest:
            raise ImageError("layer", f"is not what its digest sha256:{layer.digest} says", "copy the image again: it was damaged or changed")
        if not layer.digest and layer.media.endswith("tar") and counted.digest.hexdigest() != layer.diff_id:
            raise ImageError("layer", f"is not what the image's config says, sha256:{layer.diff_id}", "copy the image again: it was damaged or changed")

    # -- removing ------------------------------------------------------------------------------------------------------------

    def remove(self, digest: str) -> None:
        """Forget an image; its layers go with the next `prune`, where nobody else has them. What is not there is removed already."""
        with self._lock:
            if _HEX.match(digest):
                (self._images / f"{digest}.json").unlink(missing_ok=True)

    def prune(self, budget: int, in_use: Collection[str]) -> list[str]:
        """Remove what is unused until layers take `budget` bytes at most: layers of no image, then the images that were not asked for longest. Returns the images' digests.

        Args:
            in_use: layers (diff_ids) that instances stand on: they stay, whatever the budget says, and so do the images that have no others.
        """
        gone: list[str] = []
        with self._adding:
            with self._lock:
                images = self._all()
                dropped, _ = self._sweep(images, in_use)
                used = sum(self._size(layer) for layer in self._kept())
                for image in reversed(list(images)):
                    if used <= budget:
                        break
                    if set(in_use).issuperset(image.config.diff_ids):
                        continue
                    self._step("forget")
                    (self._images / f"{image.digest}.json").unlink(missing_ok=True)
                    _sync_folder(self._images)
                    images.remove(image)
                    gone.append(image.digest)
                    more, went = self._sweep(images, in_use)
                    dropped += more
                    used -= went
            for folder in dropped:
                remove(folder, self._pace)
        return gone

    def _sweep(self, images: Sequence[Image], in_use: Collection[str]) -> tuple[list[Path], int]:
        """Drop the layers that no image has and no instance stands on; their folders, which are to be removed, and their bytes."""
        needed = {diff_id for image in images for diff_id in image.config.diff_ids} | set(in_use)
        dropped, went = [], 0
        for layer in self._kept():
            if layer not in needed:
                went += self._size(layer)
                dropped.append(self._drop(layer))
        return dropped, went

    def _drop(self, layer: str) -> Path:
        """By way of `new`: a folder that is half removed never has a layer's name."""
        gone = self._new / f"{layer}.gone"
        self._step("drop")
        os.rename(self._layers / layer, gone)
        (self._layers / f"{layer}.json").unlink(missing_ok=True)
        self._step("dropped")
        return gone

    # -- the disk ------------------------------------------------------------------------------------------------------------

    def _repair(self) -> None:
        for folder in (self._layers, self._images, self._new):
            folder.mkdir(exist_ok=True, mode=0o700)
        for leaving in self._new.iterdir():
            shutil.rmtree(leaving) if leaving.is_dir() and not leaving.is_symlink() else leaving.unlink()
        kept = set(self._kept())
        for file in self._layers.iterdir():
            if file.suffix == ".json" and file.stem not in kept:
                file.unlink()
        for image in self._all():
            if not kept.issuperset(image.config.diff_ids):
                (self._images / f"{image.digest}.json").unlink()

    def _kept(self) -> list[str]:
        return [entry.name for entry in os.scandir(self._layers) if _HEX.match(entry.name) and entry.is_dir(follow_symlinks=False)]

    def _size(self, layer: str) -> int:
        try:
            size = json.loads((self._layers / f"{layer}.json").read_bytes())["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            size = None
        if isinstance(size, int):
            return size
        measured = sum(os.lstat(os.path.join(where, name)).st_size for where, _, names in os.walk(self._layers / layer) for name in names)
        self._put(self._layers / f"{layer}.json", {"bytes": measured})
        return measured

    def _all(self) -> list[Image]:
        found = [image for entry in os.scandir(self._images) if (image := self._read(Path(entry.path))) is not None]
        return sorted(found, key=lambda image: (-image.used_ms, image.digest))

    def _read(self, path: Path) -> Image | None:
        """None, and the document removed, where it is not what was written (its hash is kept with it)."""
        try:
            if path.stat().st_size <= MAX_RECORD and _HEX.match(path.stem) and path.suffix == ".json":
                value: Any = json.loads(path.read_bytes())
                told = value["image"]
                if value["sha256"] == sha256(json.dumps(told, sort_keys=True).encode()).hexdigest():
                    config: dict[str, Any] = {key: tuple(part) if isinstance(part, list) else part for key, part in told["config"].items()}
                    return Image(told["digest"], tuple(told["names"]), Config(**config), told["bytes"], told["used_ms"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        path.unlink(missing_ok=True)
        return None

    def _write(self, image: Image) -> None:
        told = asdict(image)
        self._step("write")
        self._put(self._images / f"{image.digest}.json", {"image": told, "sha256": sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()})

    def _put(self, path: Path, value: Any) -> None:
        temporary = self._new / (path.name + ".put")
        with open(temporary, "wb") as handle:
            handle.write(json.dumps(value).encode())
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)


def _checked(reference: str) -> None:
    if reference and not _REFERENCE.match(reference):
        raise ImageError("reference", f"{reference[:100]!r} is no name of an image", "use 1 to 255 letters, digits and . _ : / @ + -")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
