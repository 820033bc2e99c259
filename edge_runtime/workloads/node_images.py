"""The images of a node: from archives that were put there, or from their registries, when a workload needs one."""

import asyncio
import importlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EdgeConfig
from ..contract.workloads import SNAPSHOT_IMAGES
from ..journal import Journal
from ..metrics import Metrics

if TYPE_CHECKING:
    from .images import Image, ImageStore
    from .images.pull import Puller
    from .images.reference import Host
    from .images.shared import Shared
    from .snapshots import SnapshotFolder

MAX_TOLD_IMAGES = 256
"""Images that the hub is told of: those asked for last; what it takes is 1,024."""

MAX_TOLD_NAME = 253
"""Characters of a reference that the hub takes in a node's description."""


class NodeImages:
    """What one node has of images.

    Attributes:
        store: where they are; None before `open`, and where it could not be opened.
        snapshots: those of workloads, which are images too; likewise.
    """

    def __init__(self, config: EdgeConfig, journal: Journal, metrics: Metrics) -> None:
        self._config, self._journal, self._metrics = config, journal, metrics
        self.store: ImageStore | None = None
        self.snapshots: SnapshotFolder | None = None
        self._coming: Shared[Image] | None = None
        self._turn = asyncio.Lock()
        """Archives are taken one at a time, and not by threads that wait for one another: there are few, and what is here already is looked for by them too."""
        self._puller: Puller | None = None

    async def open(self, folder: Path) -> "ImageStore":
        """Raises `ImageError`, OSError."""
        from .images import ImageStore
        from .snapshots import SnapshotFolder

        self.store = await asyncio.to_thread(ImageStore, folder / "images")
        self.snapshots = await asyncio.to_thread(SnapshotFolder, folder / "snapshots")
        return self.store

    async def bring(self, reference: str, pull: str) -> "Image":
        """An image that is here then; several who ask for one at the same time wait for the same. Raises `Refused`."""
        from .drivers.face import Refused
        from .images import ImageError
        from .images.shared import Shared

        if self._coming is None:
            self._coming = Shared()
        try:
            return await self._coming.get((reference, pull), lambda: self.take(reference, pull))
        except ImageError as error:
            raise Refused(error.field, error.problem, error.remedy) from None

    async def take(self, reference: str, pull: str) -> "Image":
        """Take it from the archives that were put into `<data>/workloads/archives`, or from its registry, where the store does not have it yet. Raises `ImageError`."""
        from .images import ImageError
        from .images.reference import hosts, parse

        assert self.store is not None
        known = hosts(self._config.workloads.registries)
        if reference.startswith(SNAPSHOT_IMAGES):
            async with self._turn:
                if (snapshot := await asyncio.to_thread(self._snapshot, reference)) is not None:
                    return snapshot
        if pull != "always":
            with suppress(ImageError):
                return await asyncio.to_thread(self.store.find, reference)
            try:
                async with self._turn:
                    return await asyncio.to_thread(self.store.find_or_take, reference, self.store.directory.parent / "archives")
            except ImageError as error:
                if pull == "never" or not self._config.workloads.fetch or parse(reference, known) is None:
                    raise
                absent = error
        elif not self._config.workloads.fetch:
            raise ImageError("spec.pull", "is always, and this node fetches nothing (workloads.fetch)", "use missing, and put the image into the archives folder")
        try:
            image = await (await self._registries(known)).pull(reference)
        except ImageError as error:
            self._metrics.inc("image_pulls_total", outcome="failed")
            if pull != "always" and "some cannot be taken" in absent.problem:
                raise ImageError(error.field, f"{error.problem}; and {absent.problem}", error.remedy) from None
            raise
        self._metrics.inc("image_pulls_total", outcome="done")
        return image

    def _snapshot(self, reference: str) -> "Image | None":
        """The image that a snapshot here is, by its name; None where there is none of that name. What the store calls so may be an earlier one's. Raises `ImageError`."""
        from .images import ImageError

        assert self.store is not None
        found = self.snapshots.of_image(reference) if self.snapshots is not None else None
        if found is None:
            return None
        try:
            return self.store.find(f"sha256:{found.digest}")
        except ImageError:
            return self.store.add(Path(found.file), reference, strict=True)

    async def _registries(self, known: "Mapping[str, Host]") -> "Puller":
        """What fetches; made, and the client for HTTP imported, when something is fetched for the first time. Raises `ImageError`."""
        if self._puller is None:
            from .images import ImageError

            try:
                fetching = await asyncio.to_thread(importlib.import_module, ".images.pull", __package__)  # a tenth of a second, in which nothing would be decided
            except ImportError as error:
                raise ImageError("image", f"is not on this node, and fetching needs a package that is not there ({error})", "pip install 'novacron[edge]', or put the image into the archives folder") from None
        if self._puller is None:  # another may have made it meanwhile
            assert self.store is not None
            workloads, folder = self._config.workloads, self.store.directory.parent / "pulls"
            folder.mkdir(exist_ok=True, mode=0o700)
            self._puller = fetching.Puller(folder, self.store, known, workloads.registry_credentials, workloads.images_bytes, self._pulled)
        return self._puller

    def _pulled(self, body: dict[str, Any]) -> None:
        self._journal.append("event", "image.pull", body)
        self._metrics.inc("image_pull_bytes_total", body["bytes"])

    def held(self) -> list[str]:
        """References of the images here, the newest asked for; in order, so that what is told changes only where they do."""
        names = [name for image in sorted(self.store.images(), key=lambda image: -image.used_ms) for name in image.names] if self.store is not None else []
        names = list(dict.fromkeys((*(one.image for one in self.snapshots.all()), *names))) if self.snapshots is not None else names
        return sorted(name for name in names[:MAX_TOLD_IMAGES] if len(name) <= MAX_TOLD_NAME)

    async def stop(self) -> None:
        """Fetch nothing more."""
        if self._coming is not None:
            await self._coming.close()
        if self._puller is not None:
            await self._puller.close()

    def close(self) -> None:
        """After the drivers, which use the store."""
        if self.store is not None:
            self.store.close()
