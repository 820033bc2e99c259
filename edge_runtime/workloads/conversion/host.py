"""What a node has to have so that workloads can be converted on it, and how a guest is laid out there."""

import asyncio
import os
import platform
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from ...contract.workloads import guest_bytes
from ..drivers import cgroups, keeping, qemu_kernel
from ..drivers.container import ContainerDriver
from ..drivers.face import Ability, Refused
from ..drivers.instance import read
from ..drivers.microvm_disks import Disks
from ..drivers.programs import searched
from ..images import Image, ImageStore
from . import guests
from .guests import Guest

PROBE_BYTES = 64 << 20
"""Memory and disk of the guest that is booted to look at its processor."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How guests are run.

    Attributes:
        kernel: folder with the guests' kernel; empty: this machine's.
        qemu: the program.
        log_bytes: kept of each stream.
        network: let workloads have the node's network.
        publish: addresses of the node on which they may publish ports.
    """

    kernel: str = ""
    qemu: str = "qemu-system-x86_64"
    log_bytes: int = 4 << 20
    network: bool = True
    publish: tuple[str, ...] = ("127.0.0.1", "0.0.0.0")


class Host:
    """One node's.

    Args:
        folder: for what guests boot, and file systems of images.
        driver: of containers, probed, with CRIU.
    """

    def __init__(self, folder: Path, driver: ContainerDriver, store: ImageStore, settings: Settings) -> None:
        self._folder, self._driver, self._store, self._settings = folder, driver, store, settings
        self._groups = cgroups.read()
        self._boot: guests.Boot | None = None
        self._flags: list[str] | None = None

    async def can(self) -> None:
        """Raises `Refused` where something is missing."""
        await self._driver.ways(Ability.CHECKPOINT, Ability.RESTORE)
        if platform.machine() != "x86_64":
            raise Refused("host", f"there is no micro-VM for {platform.machine()}", "convert it on an x86_64 node")
        for program, package in ((self._settings.qemu, "qemu-system-x86"), ("mke2fs", "e2fsprogs"), ("nsenter", "util-linux")):
            if searched(program) is None:
                raise Refused("host", f"{program} is not installed", f"as root: apt install {package}")
        await self.boots()

    async def boots(self) -> guests.Boot:
        """What guests boot; made where it is not there. Raises `Refused`."""
        if self._boot is None:
            try:
                kernel = qemu_kernel.find(self._settings.kernel)
                self._boot = await asyncio.to_thread(guests.made, self._folder, kernel, self._driver.criu)
            except qemu_kernel.NoKernel as error:
                raise Refused("host", str(error), "see the reason") from None
        return self._boot

    async def flags(self) -> list[str]:
        """What a guest's processor can do, as its kernel says; a guest is booted for it once on a node, and CRIU is run in it."""
        if self._flags is None:
            boots = await self.boots()
            note = boots.kernel.parent / "flags.json"
            told = read(note)
            qemu = os.stat(str(searched(self._settings.qemu))).st_mtime_ns
            if told is None or told.get("qemu") != qemu:
                guest = Guest(self._folder / f".probe-{uuid.uuid4().hex[:8]}")
                try:
                    await guest.boot(lambda: self.lay_guest(guest, boots, None, limit=PROBE_BYTES, disk=PROBE_BYTES, cpus=1, slot=guests.MAX_GUESTS, connected=False))
                    told = {"flags": (await guest.ask("state"))["flags"], "qemu": qemu}
                    keeping.write(str(note), told)
                finally:
                    await guest.end()
                    shutil.rmtree(guest.folder, ignore_errors=True)
            self._flags = list(map(str, told["flags"]))
        return self._flags

    def lay_guest(self, guest: Guest, boots: guests.Boot, image: Image | None, *, limit: int, disk: int, cpus: int, slot: int, connected: bool) -> None:
        """Write a guest's folder; blocks. `limit`, `disk`: bytes that the workload may use, and write."""
        mke2fs, qemu = searched("mke2fs"), searched(self._settings.qemu)
        assert mke2fs is not None and qemu is not None
        disks = Disks(self._folder / ".disks", mke2fs)
        if image is None:  # to look at a guest alone
            (self._folder / ".disks/none").mkdir(exist_ok=True)
            path = disks.image("none", [self._folder / ".disks/none"])
        else:
            path = disks.image(image.digest.rpartition(":")[2], self._store.lower(image))
        guest.lay_out(
            qemu, boots, disks, path, memory=guest_bytes(limit), disk=disk, cpus=cpus, accelerator="tcg", slot=slot, connected=connected, log_bytes=self._settings.log_bytes,
            keepers=self._groups.of_keepers(), groups=self._groups,
        )

    async def tidy(self) -> None:
        """End guests that an agent which was killed had booted to look at them."""
        for folder in self._folder.glob(".probe-*"):
            await Guest(folder).end()
            await asyncio.to_thread(shutil.rmtree, folder, True)

    async def prune(self, budget: int, images: set[str]) -> None:
        """Keep the images' file systems within `budget` bytes; never those of `images` (digests)."""
        mke2fs = searched("mke2fs")
        if mke2fs is not None and (self._folder / ".disks").exists():
            disks = Disks(self._folder / ".disks", mke2fs)
            await asyncio.to_thread(disks.prune, budget, {one.rpartition(":")[2] for one in images})
