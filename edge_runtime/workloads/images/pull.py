"""Fetching images from registries into the store: one pull for each name at a time, however many wait for it; what was fetched of a blob is kept over cut connections and restarts of the agent.

    <dir>/<hash of the name>/               one pull: an OCI layout that fills
    <dir>/<hash of the name>/blobs/sha256/DIGEST.part   a blob that comes

A pull asks the mirrors of a registry in turn, then itself. Layers that the store has are not fetched. What has come is handed to the store, which verifies it again as it does every source.
"""

import asyncio
import io
import os
import random
import shutil
import ssl
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp

from . import credentials
from . import manifest as documents
from .errors import ImageError
from .layer import opener
from .manifest import INDEXES, MANIFESTS, MODULES, Descriptor
from .reference import Host, Reference, parse
from .registry import Again, Count, Part, Registry, layout, session
from .shared import Shared
from .source import FolderFiles
from .store import Image, ImageStore

AT_ONCE = 2
"""Pulls at one time: more would only share the link, and each may fill a disk."""

BLOBS_AT_ONCE = 3
"""Blobs of one pull at one time (Docker's number)."""

TRIES = 6
"""Tries in a row without a byte, before a registry is given up: some 15 s with the pauses between them. The hub, or the next start, asks again later."""

MAX_TRIES = 1000
"""Tries for one blob in all: a server that cuts after every byte is not asked for ever."""

PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0
"""Bound of the first pause, doubled each time, and its most; what is waited is drawn evenly below it, so that a fleet does not come back at once."""

KEPT_S = 86_400.0
KEPT = 4
"""Pulls that came to nothing leave what they have for a day, and four of them at most."""


class _Fetched(FolderFiles):
    """What has come, and the sizes of layers that need not: the store has them."""

    def __init__(self, root: Path, there: Mapping[str, int]) -> None:
        super().__init__(root)
        self._there = there

    def size(self, name: str) -> int | None:
        return self._there.get(name.rpartition("/")[2]) if name.startswith("blobs/") and name.rpartition("/")[2] in self._there else super().size(name)


class Puller:
    """Fetches images into a store.

    Args:
        folder: of the pulls; the puller's alone.
        known: what is configured for registries.
        credentials_file: as `credentials.load` takes it; empty: none.
        budget: bytes that images may take on this disk.
        say: told what was fetched: the body of an `image.pull` record.
        pause_s: bound of the first pause between tries.
    """

    def __init__(self, folder: Path, store: ImageStore, known: Mapping[str, Host], credentials_file: str, budget: int, say: Callable[[dict[str, Any]], None], pause_s: float = PAUSE_S) -> None:
        self._folder, self._store, self._known, self._credentials_file, self._budget, self._say, self._pause_s = folder, store, known, credentials_file, budget, say, pause_s
        self._under_way: Shared[Image] = Shared()
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def pull(self, text: str) -> Image:
        """Bring what a name means into the store. Raises `ImageError`. Whoever is cancelled leaves; the others go on waiting."""
        reference = parse(text, self._known)
        if reference is None:
            raise ImageError("image", f"{text[:100]} names no registry", "write registry/name:tag, or say in workloads.registries which one is meant (short: true)")
        return await self._under_way.get(text, lambda: self._run(text, reference))

    async def close(self) -> None:
        """End all pulls; what has come is kept."""
        await self._under_way.close()

    async def _run(self, text: str, reference: Reference) -> Image:
        async with self._turn:
            return await self._pull(text, reference)

    async def _pull(self, text: str, reference: Reference) -> Image:
        began, folder = time.monotonic(), self._folder / _name(text)
        host = self._known.get(reference.host, Host(reference.host))
        try:
            await asyncio.to_thread(self._sweep, folder, list(self._under_way))
            known = await asyncio.to_thread(credentials.load, self._credentials_file)
        except OSError as error:
            raise _disk(error) from None
        problems: list[str] = []
        async with session() as http:
            for name in (*host.mirrors, host.name):
                asked = self._known.get(name, Host(name))
                count = Count()
                try:
                    await asyncio.to_thread((folder / "blobs/sha256").mkdir, parents=True, exist_ok=True)
                    tls = await asyncio.to_thread(ssl.create_default_context, cafile=asked.ca_file) if asked.ca_file else None
                    image, digest = await self._from(Registry(asked, reference, http, count, known.get(name), tls), text, folder)
                except ImageError as error:
                    last = error
                    problems.append(str(error))
                    continue
                except OSError as error:
                    raise _disk(error) from None
                ms = round((time.monotonic() - began) * 1000)
                self._say({"image": text, "digest": f"sha256:{digest}", "registry": name, "bytes": count.bytes, "blobs": count.blobs, "resumed_bytes": count.resumed, "cuts": count.cuts, "ms": ms})
                await asyncio.to_thread(shutil.rmtree, folder, True)
                return image
        raise last if len(problems) == 1 else ImageError("image", f"none of {', '.join((*host.mirrors, host.name))} gives it: {' | '.join(problems)[:1000]}", "see the reasons")

    async def _from(self, registry: Registry, text: str, folder: Path) -> tuple[Image, str]:
        raw, digest, media = await self._patiently(registry, partial(registry.manifest, registry.reference.wanted))
        for _ in range(documents.MAX_INDEX_DEPTH):
            if media not in INDEXES:
                break
            chosen = documents.choose(documents.entries(documents.loads(raw, "index")), self._store.here)
            raw, digest, media = await self._patiently(registry, partial(registry.manifest, f"sha256:{chosen.digest}", chosen.size))
        if media not in MANIFESTS:
            raise ImageError("manifest", f"{media[:80]!r} is no image", "name an image; other artefacts cannot be run")
        config, layers = documents.manifest(raw, self._store.limits)
        if config.size > documents.MAX_DOCUMENT:
            raise ImageError("manifest.config.size", f"{config.size} bytes are over {documents.MAX_DOCUMENT}", "build the image again")
        for layer in layers:
            if layer.media not in MODULES:
                opener(layer.media, io.BytesIO())  # what cannot be read here is not fetched
        await self._blob(registry, config, folder)
        kept = folder / "blobs/sha256" / config.digest
        diff_ids = (layers[0].digest,) if layers[0].media in MODULES else documents.config(await asyncio.to_thread(kept.read_bytes), self._store.here, len(layers)).diff_ids
        here = await asyncio.to_thread(self._store.has, diff_ids)
        there = {layer.digest: layer.size for layer, diff_id in zip(layers, diff_ids, strict=True) if diff_id in here}
        missing = {layer.digest: layer for layer in layers if layer.digest not in there}
        self._room(sum(layer.size for layer in missing.values()), sum(layer.size for layer in layers), folder)
        await self._blobs(registry, list(missing.values()), folder)
        await asyncio.to_thread(layout, folder, digest, media, raw)
        try:
            return await asyncio.to_thread(self._store.add_files, _Fetched(folder, there), text), digest
        except ImageError:  # what has come is no good, or was damaged on the disk since: the next pull begins anew
            await asyncio.to_thread(shutil.rmtree, folder / "blobs", True)
            raise

    async def _blobs(self, registry: Registry, wanted: list[Descriptor], folder: Path) -> None:
        """All of them, some at a time; the first that cannot be had ends the others."""
        places = asyncio.Semaphore(BLOBS_AT_ONCE)

        async def one(pointer: Descriptor) -> None:
            async with places:
                await self._blob(registry, pointer, folder)

        tasks = [asyncio.create_task(one(pointer)) for pointer in wanted]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _blob(self, registry: Registry, pointer: Descriptor, folder: Path) -> None:
        target = folder / "blobs/sha256" / pointer.digest
        if target.exists():
            return  # it got its name only when it had been verified; the store does so once more
        part = await asyncio.to_thread(Part, target.with_suffix(".part"), pointer.size)
        try:
            while True:
                resumed = part.resumed
                if part.have < pointer.size or not pointer.size:
                    await self._patiently(registry, partial(registry.blob, pointer, part), lambda: part.have)
                if await asyncio.to_thread(part.settle, pointer.digest, target):
                    break
                await asyncio.to_thread(part.restart)
                if not resumed:
                    part.forget()
                    raise ImageError("blob", f"{registry.host.name} sent what is not sha256:{pointer.digest}", "push the image again; if it stays so, do not trust this registry")
                # What an earlier try had left may have been damaged since: once more, from the beginning.
            registry.count.blobs += 1
            registry.count.resumed += resumed
        finally:
            part.close()

    async def _patiently(self, registry: Registry, ask: Callable[[], Any], have: Callable[[], int] = lambda: 0) -> Any:
        """Ask until it is answered: pauses grow as long as not a byte more comes. Raises `ImageError`."""
        failures = 0
        for _ in range(MAX_TRIES):
            before, after_s = have(), 0.0
            try:
                return await ask()
            except Again as error:
                problem, after_s = str(error), error.after_s
            except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                problem = " ".join(str(error).split())[:200] or "nothing came for too long"
            registry.count.cuts += 1
            failures = 0 if have() > before else failures + 1
            if failures >= TRIES:
                break
            await asyncio.sleep(max(after_s, random.random() * min(LONGEST_PAUSE_S, self._pause_s * 2.0**failures)))
        raise ImageError("registry", f"{registry.host.name} did not give {registry.reference.repository}: {problem}", "look whether it can be reached from here; it is tried again when the workload is placed again")

    def _room(self, coming: int, all_of_it: int, folder: Path) -> None:
        if all_of_it > self._budget:
            raise ImageError("image", f"its layers have {all_of_it} bytes packed, workloads.images_bytes is {self._budget}", "raise it, or build a smaller image")
        told, keep = os.statvfs(folder), self._store.limits.keep_free
        free = told.f_bavail * told.f_frsize
        if free < 2 * coming + keep:  # as fetched, and unpacked at least as much
            raise ImageError("image", f"{free} bytes are free, it needs {2 * coming} and {keep} stay free", "free space, or remove images")

    def _sweep(self, mine: Path, asked: list[Hashable]) -> None:
        """Remove what pulls have left that are over: the old, and all but some of the others."""
        (mine / "blobs/sha256").mkdir(parents=True, exist_ok=True, mode=0o700)
        os.utime(mine)
        busy = {_name(str(text)) for text in asked}
        left = []
        for entry in os.scandir(self._folder):
            with suppress(OSError):
                if entry.name not in busy and Path(entry.path) != mine:
                    left.append((entry.stat(follow_symlinks=False).st_mtime, entry.path))
        for at, (changed_s, path) in enumerate(sorted(left, reverse=True)):
            if at >= KEPT or changed_s < time.time() - KEPT_S:
                shutil.rmtree(path, ignore_errors=True)


def _name(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]


def _disk(error: OSError) -> ImageError:
    return ImageError("image", f"could not be kept: {error.strerror or error}", "look at the disk of the data folder")
