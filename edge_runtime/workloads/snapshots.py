"""The snapshots of workloads that a node keeps, and the operations on them: take one, remove one.

    <data>/workloads/snapshots/<workload>@<name>.tar     an image: what the workload had on its disk, in its image's place (an OCI layout in one file)
    <data>/workloads/snapshots/<workload>@<name>.json    what is told of it
    <data>/workloads/snapshots/.new/                     what is under way; emptied at start

A snapshot is an image like others: a workload is begun from it as `snapshots/WORKLOAD:NAME`, here, and on each node that gets the file into its archives. Of a container it has the layers of its image and,
over them, what it changed; of a virtual machine one disk, and the files with which it boots. It is nothing that goes on: no memory, no processes.
It stays when its workload goes: it is what one keeps of it. Who wants it somewhere else copies the file, and may remove it.
"""

import asyncio
import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from ..contract.limits import MAX_SNAPSHOTS
from ..contract.schema import ID_PATTERN
from ..contract.workloads import DELETE_SNAPSHOT, SNAPSHOT, SNAPSHOT_IMAGES
from ..system.disk_pace import Pace, PacedFile
from .drivers.face import QCOW2, Driver, DriverError, Failed, Refused, Snapshots, Status
from .drivers.instance import sync_folder, write
from .operations import Operations

if TYPE_CHECKING:
    from .images import Image, ImageStore

log = logging.getLogger(__name__)

TAKING = "taking"
"""The step that is written down before anything is done: a snapshot of this name is this operation's."""

SPARE = 256 << 20
"""Bytes that stay free on the disk beside what is written: the journal, and what runs, write meanwhile."""

CHUNK = 1 << 18
"""Bytes that are read of a disk and compressed at a time."""

MAX_TOLD = 4096
"""Bytes of what is told of one."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One snapshot. `bytes`: on the disk; `digest`: of the image that it is; `image`: its name as that."""

    workload: str
    epoch: int
    name: str
    taken_ms: int
    bytes: int
    digest: str
    image: str
    file: str

    def to_json(self) -> dict[str, Any]:
        """As records and APIs have it."""
        return asdict(self)


class SnapshotFolder:
    """The folder of one node's snapshots. Its calls block."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.new = folder, folder / ".new"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, workload: str, name: str) -> Path:
        """Where one is, there or not. Raises `Refused` for what is no name."""
        for part, word in (("workload", workload), ("name", name)):
            if not ID_PATTERN.match(word):
                raise Refused(part, f"{word[:80]!r} is not a name", "use 1 to 64 letters, digits, _ . : -, a letter or digit first")
        return self.folder / f"{workload}@{name}.tar"

    def of_image(self, reference: str) -> Kept | None:
        """The one that is the image of that name; None where none is."""
        return next((one for one in self.all() if one.image == reference), None) if reference.startswith(SNAPSHOT_IMAGES) else None

    def all(self) -> list[Kept]:
        """What is there, the oldest first. Of a file that somebody has removed nothing is told any more."""
        found = []
        for entry in os.scandir(self.folder) if self.folder.is_dir() else ():
            workload, mark, name = entry.name.removesuffix(".tar").partition("@")
            if not mark or not entry.name.endswith(".tar"):
                continue
            with suppress(OSError, ValueError, KeyError, TypeError):
                with open(Path(entry.path).with_suffix(".json"), "rb") as handle:
                    told = json.loads(handle.read(MAX_TOLD))
                found.append(Kept(workload, int(told["epoch"]), name, int(told["taken_ms"]), entry.stat(follow_symlinks=False).st_size, str(told["digest"]), image_name(workload, name), entry.path))
        return sorted(found, key=lambda one: (one.taken_ms, one.workload, one.name))

    def tidy(self) -> None:
        """What a kill left; called before anything is begun."""
        shutil.rmtree(self.new, ignore_errors=True)
        for path in self.folder.glob("*.json"):
            if not path.with_suffix(".tar").exists():
                path.unlink(missing_ok=True)

    def remove(self, workload: str, name: str) -> None:
        """One; what is not there is removed already."""
        path = self.path(workload, name)
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)


class Abandoned(Exception):
    """The agent ends."""


class Snapshotting:
    """Carries out operations on snapshots.

    The workload's own task has its disk copied, so that nothing else is done with it meanwhile; of that copy an image is made beside all else (`_finish`), one at a time: compressing a large disk takes minutes,
    and the workload may have to be ended.

    Args:
        folder: where they are.
        operations: what is under way.
        store: of the node's images.
        budget: bytes that images, checkpoints and snapshots may take together.
        held: bytes that checkpoints and snapshots have.
        changed: called when there are others than before.
    """

    def __init__(self, folder: SnapshotFolder, operations: Operations, store: "ImageStore", budget: int, held: Callable[[], Awaitable[int]], changed: Callable[[], None] = lambda: None) -> None:
        self._folder, self._operations, self._store, self._budget, self._held, self._changed = folder, operations, store, budget, held, changed
        self._writing: dict[asyncio.Task[None], tuple[Path, tuple[str, ...]]] = {}
        """What is being made an image of, to its file and the layers that it needs."""
        self._one, self._closed = asyncio.Lock(), False

    def layers(self) -> set[str]:
        """Layers of the store that are needed still."""
        return {layer for _, layers in self._writing.values() for layer in layers}

    async def close(self) -> None:
        """Leave off what is being written: the next agent takes it again."""
        self._closed = True
        tasks = list(self._writing)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def carry_out(self, asked: Mapping[str, Any], driver: Driver | None, status: Status | None) -> dict[str, Any] | None:
        """One operation; what is told of it then, None where it is not over: it ends by itself. Raises `DriverError`.

        Args:
            asked: an entry of `spec.operations`.
            driver, status: on whose disk the workload is and how it stands; None where it is on none.
        """
        if asked["stop"]:
            raise Refused("stop", "is for checkpoints: a snapshot is taken while it goes on", "leave it out")
        try:
            if asked["kind"] == SNAPSHOT:
                return await self._take(asked, driver, status)
            assert asked["kind"] == DELETE_SNAPSHOT
            return await self._delete(asked["workload"], asked["name"])
        except OSError as error:
            raise _bad_disk(error) from None

    async def _take(self, asked: Mapping[str, Any], driver: Driver | None, status: Status | None) -> dict[str, Any] | None:
        workload, name = asked["workload"], asked["name"] or asked["id"]
        path = self._folder.path(workload, name)
        begun = self._operations.step(asked["id"]) == TAKING
        if begun and path.exists():  # the agent that wrote it was killed before it could say so
            return await self._told(path)
        if driver is None or status is None:
            raise Refused("workload", f"{workload} does not run here yet", "ask again when it runs")
        if not isinstance(driver, Snapshots):
            raise Refused("snapshot", "the driver that runs it takes none", "see docs/workloads.md, Snapshots, for what they can be taken of")
        if path.exists() or any(path == other for other, _ in self._writing.values()):
            raise Refused("name", f"{workload} has a snapshot {name} already, or it is being written", "give it another name, or delete that one")
        await self._room(await asyncio.to_thread(driver.snapshot_bytes, status.key))
        if not begun:
            await self._operations.reach(asked["id"], TAKING)
        new = self._folder.new / path.stem
        await asyncio.to_thread(shutil.rmtree, new, True)
        await asyncio.to_thread(os.makedirs, new, 0o700)
        try:
            told = await driver.snapshot(status.key, new)
            image = await asyncio.to_thread(self._image, str(told["image"]))
            size = (new / told["file"]).stat().st_size
            await self._room(size if told["format"] == QCOW2 else size + image.bytes)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, new, True)
            raise
        task = asyncio.create_task(self._finish(asked["id"], path, new, told, image, status), name=f"snapshot {path.stem}")
        self._writing[task] = path, image.config.diff_ids
        task.add_done_callback(self._writing.pop)
        return None

    async def _finish(self, operation: str, path: Path, new: Path, told: Mapping[str, Any], image: "Image", status: Status) -> None:
        """Make an image of the copy, and end the operation."""
        try:
            async with self._one:
                await asyncio.to_thread(self._archive, path, new, told, image, status)
            self._operations.end(operation, "succeeded", "", {**await self._told(path), "paused_ms": told["paused_ms"]})
        except Abandoned:
            return
        except (DriverError, OSError) as error:
            self._operations.end(operation, "failed", str(error if isinstance(error, DriverError) else _bad_disk(error)))
        except Exception as error:
            log.exception("snapshot %s", path.stem)
            self._operations.end(operation, "failed", f"it could not be done ({type(error).__name__}); see the agent's log")
        finally:
            await asyncio.to_thread(shutil.rmtree, new, True)
            self._changed()

    async def _told(self, path: Path) -> dict[str, Any]:
        for one in await asyncio.to_thread(self._folder.all):
            if one.file == str(path):
                return one.to_json()
        raise Failed("snapshot", f"{path.name} was written, and is not there", "see who removed it")

    def _image(self, digest: str) -> "Image":
        from .images import ImageError

        try:
            image = self._store.find(f"sha256:{digest}")
        except ImageError as error:
            raise Refused(error.field, error.problem, error.remedy) from None
        if len(image.config.diff_ids) >= self._store.limits.layers:
            raise Refused("image", f"has {len(image.config.diff_ids)} layers, and with one more it could not be used", "begin it anew from an image with fewer layers")
        return image

    async def _room(self, need: int) -> None:
        """Raises `Refused` where so many bytes more are too much."""
        there = await asyncio.to_thread(self._folder.all)
        if len(there) >= MAX_SNAPSHOTS:
            raise Refused("snapshots", f"this node has {len(there)}, the most there may be", "delete some")
        held = await self._held()
        if held + need > self._budget:
            raise Refused("disk", f"the snapshots and checkpoints here have {held} bytes, this one may take {need}, and with the images they may have {self._budget}", "delete some, or raise workloads.images_bytes")
        told = os.statvfs(self._folder.folder)
        if (free := told.f_bavail * told.f_frsize) < need + SPARE:
            raise Refused("disk", f"{free} bytes are free, it may take {need}, and {SPARE} stay free", "free space, or delete snapshots")

    def _archive(self, path: Path, new: Path, told: Mapping[str, Any], image: "Image", status: Status) -> None:
        from .images.archive import ArchiveWriter

        def going() -> None:
            if self._closed:
                raise Abandoned

        source, target = new / told["file"], new / "image.tar"
        workload, _, name = path.stem.partition("@")
        with open(target, "xb") as handle:
            os.fchmod(handle.fileno(), 0o600)
            archive = ArchiveWriter(cast(BinaryIO, PacedFile(handle, Pace(os.fdatasync))), going)
            (_machine if told["format"] == QCOW2 else _container)(archive, source, self._store.lower(image))
            digest = archive.finish(image.config, self._store.here, image_name(workload, name))
            handle.flush()
            os.fsync(handle.fileno())
        write(new / "told.json", {"epoch": status.key.epoch, "taken_ms": told["at_ms"], "digest": digest})
        os.rename(new / "told.json", path.with_suffix(".json"))
        os.rename(target, path)
        sync_folder(self._folder.folder)

    async def _delete(self, workload: str, name: str) -> dict[str, Any]:
        if not await asyncio.to_thread(os.path.lexists, self._folder.path(workload, name)):
            raise Refused("name", f"{workload} has no snapshot {name} here", "list its snapshots")
        await asyncio.to_thread(self._folder.remove, workload, name)
        self._changed()
        return {"workload": workload, "name": name}


def _bad_disk(error: OSError) -> Failed:
    return Failed("disk", f"the snapshot could not be written or read: {error.strerror}", "look at the disk of the data folder")


def image_name(workload: str, name: str) -> str:
    """What a snapshot is called as an image."""
    return f"{SNAPSHOT_IMAGES}{workload}:{name}"


def _container(archive: Any, changed: Path, lower: "list[Path]") -> None:
    """Its image's layers, as they are unpacked here, and what it changed over them."""
    from .drivers.overlay_layer import pack_disk

    for folder in reversed(lower):
        with archive.layer() as target:
            pack_disk(folder, cast(BinaryIO, target), 0)
    with archive.layer() as target, open(changed, "rb") as source:
        while data := source.read(CHUNK):
            target.write(data)


def _machine(archive: Any, disk: Path, lower: "list[Path]") -> None:
    """One layer: its disk, under the name that it has in its image, and what it boots with."""
    from .drivers.vm_image import find

    content = find(lower)
    with archive.layer() as target, tarfile.open(fileobj=cast(BinaryIO, target), mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as layer:
        for name, path in ((f"disk/{content.disk.stem}.qcow2", disk), ("boot/vmlinuz", content.kernel), ("boot/initrd", content.initrd)):
            if path is not None:
                with open(path, "rb") as source:
                    _put(layer, name, source, os.fstat(source.fileno()).st_size)
        if content.arguments:
            words = content.arguments.encode()
            _put(layer, "boot/cmdline", io.BytesIO(words), len(words))


def _put(layer: tarfile.TarFile, name: str, source: BinaryIO, size: int) -> None:
    """A file that anybody may read: a machine's QEMU has a user of its own."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    layer.addfile(entry, source)
