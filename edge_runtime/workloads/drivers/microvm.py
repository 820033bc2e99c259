"""Micro-VMs: the image and `spec` of a container, run by a kernel of its own in a QEMU of the machine type `microvm`; each is watched over by a keeper of its own (`qemu_keeper`), which outlives the agent.

    <dir>/microvms/<name>/     one instance: instance.json, keeper.json, disk.ext4 (what it wrote), and what its keeper writes
    <dir>/microvms/.images/    images as file systems; .blank/ empty ones (`microvm_disks`)
    <dir>/microvms/.new/       what is being laid out or removed; emptied at start

What is on the disk is the truth, as for containers. An instance is a clone of a template (`microvm_templates`): of its image where there is one, else of its size. Its disk is made when it is started, as it must
continue what the template has of it.
"""

import asyncio
import base64
import logging
import os
import platform
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..images import ImageError, ImageStore
from . import cgroups, lease, outside, qemu_kernel
from .container_spec import Host, stop_signal
from .face import Ability, Capabilities, Exit, Failed, Key, Order, Output, Phase, Ran, Refused, Status
from .instance import read, released, sync_folder, write
from .microvm_disks import Disks, copy_data
from .microvm_spec import disk_bytes, document, machine
from .microvm_templates import BOOT_S, MAX_HELD, UID, Background, Held, Templates, kvm_groups
from .programs import searched
from .qemu_driver import ASK_S, LEFT_S, MAX_INSTANCES, PROGRAMS, START_S, QemuDriver, ask_path, name_of, open_to_group, version_of
from .qemu_machine import DRIVE_FILES, DRIVES, RAM, Machine, command
from .users import ids

log = logging.getLogger(__name__)

MAX_LAUNCHES = 3
"""From its image's template, from that of its size, from one that was booted for it."""

MACHINE = Machine(256, 1)
"""The template that the probe boots: what a workload of 128 MiB gets."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How micro-VMs are run.

    Attributes:
        kernel: folder with boot/ and lib/modules/ of the guests' kernel; empty: this machine's.
        qemu: programs to try.
        log_bytes: kept of each stream.
        boot_s: within which a guest must boot.
        enabled: else nothing is started; what is there is ended.
    """

    kernel: str = ""
    qemu: tuple[str, ...] = PROGRAMS
    log_bytes: int = 4 << 20
    boot_s: float = BOOT_S
    enabled: bool = True


class MicrovmDriver(QemuDriver):
    """The driver of micro-VMs; see `face.Driver`."""

    WHAT, FOLDER, KEEPER = "micro-VM", "microvms", "qemu_keeper.py"

    def __init__(self, directory: Path, store: ImageStore, settings: Settings = Settings()) -> None:
        super().__init__(directory, store)
        self._settings = settings
        self._templates: Templates | None = None
        self._disks: Disks | None = None
        self._blanks = threading.Lock()
        """Starts make empty disks at the same time."""
        self._holding = Background(MAX_HELD)
        self._qemu, self._accelerator = "", "tcg"

    def close(self) -> None:
        """What runs goes on."""
        if self._templates is not None:
            self._templates.stop()
        self._holding.close()
        super().close()
        if self._templates is not None:
            self._templates.close()
            self._templates = None

    @property
    def template_s(self) -> float:
        """How long the probe's template took to boot and to be saved."""
        assert self._templates is not None
        found = self._templates.get(replace(MACHINE, accelerator=self._accelerator))
        found.close()
        return found.booted_s + found.saved_s

    def templates(self) -> list[dict[str, Any]]:
        """What is kept: of what, bytes of memory, seconds that it took to make."""
        return [] if self._templates is None else self._templates.told()

    # -- what can be done ----------------------------------------------------------------------------------------------------

    def _find(self) -> Capabilities:
        cannot = dict.fromkeys(
            (Ability.CHECKPOINT, Ability.RESTORE, Ability.SNAPSHOT, Ability.MIGRATE_OUT, Ability.MIGRATE_IN, Ability.LIVE, Ability.INCREMENTAL, Ability.LAZY), "this driver has no code for it yet",
        ) | {Ability.ROOTLESS: "the driver makes control groups and mounts layers, which needs root", Ability.USER_NAMESPACE: "a guest has a kernel of its own instead", Ability.NETWORK: "a guest has loopback only"}
        why, version = "", ""
        qemu, mke2fs = next((path for name in self._settings.qemu if (path := searched(name))), None), searched("mke2fs")
        if not self._settings.enabled:
            why = "switched off (workloads.microvms in its configuration)"
        elif short := outside.short_of_root():
            why = short
        elif platform.machine() != "x86_64":
            why = f"there is no machine type microvm for {platform.machine()}"
        elif self._groups.lacks:
            why = self._groups.lacks
        elif qemu is None or mke2fs is None:
            why = "QEMU is not installed (as root: apt install qemu-system-x86)" if qemu is None else "mke2fs is not installed (as root: apt install e2fsprogs)"
        else:
            try:
                self._qemu, self._disks = qemu, Disks(self._folder, mke2fs)
                kernel = qemu_kernel.find(self._settings.kernel)
                self._templates = Templates(qemu, kernel, self._new, self._keepers, self._settings.boot_s)
                self._accelerator, cpu = self._boots()
                version = f"{version_of(qemu)}, {self._accelerator}, Linux {kernel.release}"
                if cpu:
                    version += f" (kvm: {cpu})"
            except (qemu_kernel.NoKernel, OSError) as error:
                why = str(error)
            except Failed as error:
                why = f"no guest boots: {error.problem}"
        if why:
            cannot |= dict.fromkeys((ability for ability in Ability if ability not in cannot), why)
        return Capabilities("microvm", "container", version[:400], platform.machine(), (), self._groups.layout, platform.release(), cannot)

    def _boots(self) -> tuple[str, str]:
        """The accelerator with which a guest boots, and why not with the better one. That /dev/kvm opens proves nothing: there are hosts where it runs no kernel of Debian's."""
        assert self._templates is not None
        templates = self._templates  # it may be closed meanwhile
        why = "there is no /dev/kvm"
        if os.path.exists("/dev/kvm"):
            why = "" if open_to_group("/dev/kvm") else "neither its group nor others may open /dev/kvm"
            if not why:
                try:
                    templates.get(replace(MACHINE, accelerator="kvm")).close()
                    return "kvm", ""
                except Failed as error:
                    why = error.problem
        templates.get(MACHINE).close()
        return "tcg", why[:200]

    # -- prepare -------------------------------------------------------------------------------------------------------------

    async def prepare(self, order: Order) -> Status:
        await self._ready()
        async with self._laying:
            if not self._path(order.key).exists():
                try:
                    await asyncio.to_thread(self._lay_out, order)
                except ImageError as error:
                    raise Refused(error.field, error.problem, error.remedy) from None
                except OSError as error:
                    raise Failed("disk", f"the micro-VM could not be laid out: {error.strerror}", "look at the disk of the data folder") from None
        return self._status(order.key)

    def _lay_out(self, order: Order) -> None:
        """Check everything, then write the instance's folder, all or nothing; blocks."""
        assert self._templates is not None and self._disks is not None
        image = self._store.find(order.image)
        if image.config.module:
            raise Refused("image", "is a WebAssembly module", "submit it as a function or a batch job")
        lower = self._store.lower(image)
        host = Host(platform.machine(), None, False, 1024, (), False, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), (os.cpu_count() or 1) * 1000)
        told = document(order, image.config, host, lambda user: ids(user, lower))
        told["root_mode"] = format(os.stat(lower[0]).st_mode & 0o7777, "o")
        shape, size = machine(order, self._accelerator, os.cpu_count() or 1), disk_bytes(order)
        if shape.memory_mb << 20 > host.memory:
            raise Refused("spec.limits.memory", f"with the guest's own it takes {shape.memory_mb} MiB, more than this node has", "ask for less, or place it on a larger node")
        present = self._present()
        if len(present) >= MAX_INSTANCES:
            raise Refused("instances", f"there are {len(present)} micro-VMs on this node, the most there may be", "delete those that have ended")
        space = os.statvfs(self._folder)
        if space.f_bavail * space.f_frsize < size and order.requests.get("disk", 0):
            raise Refused("requests.disk", f"{size} bytes are asked for, {space.f_bavail * space.f_frsize} are free", "ask for less, free space, or place it on another node")
        self._templates.get(shape).close()
        disk = self._disks.image(image.digest, lower)
        taken = {entry.get("slot") for entry in present.values()}
        slot = next(number for number in range(MAX_INSTANCES + 1) if number not in taken)
        name, folder = name_of(order.key), self._path(order.key)
        laid = self._new / name
        shutil.rmtree(laid, ignore_errors=True)
        laid.mkdir(mode=0o700)
        group = f"{cgroups.PARENT}/{name}"
        keeper = {
            "folder": str(folder), "name": name, "template": False, "boot_s": START_S, "uid": UID + 1 + slot, "more_groups": kvm_groups(shape), "groups": self._limits(group, shape.memory_mb, order, told["cpu_us"]), "descriptors": ["ram", "state", "root"],
            "files": [["root", str(disk), False], ["disk", str(folder / "disk.ext4"), True]], "command": command(self._qemu, shape, RAM, False, DRIVES, *DRIVE_FILES, "-incoming", "defer"),
            "document": told, "log_bytes": self._settings.log_bytes, "oom": self._groups.memory_events(group), "lease": str(lease.path_of(self._lease(order.key))) if order.leased else "", "ask": str(ask_path(folder)),
        }
        instance = {
            "id": order.key.id, "epoch": order.key.epoch, "slot": slot, "image": image.digest, "layers": list(image.config.diff_ids), "signal": stop_signal(order, image.config), "leased": order.leased,
            "machine": [shape.memory_mb, shape.cpus, shape.accelerator], "disk": size,
        }
        for file, value in (("keeper.json", keeper), ("instance.json", instance)):
            write(laid / file, value)
        (laid / "lock").touch(mode=0o600)
        os.rename(laid, folder)
        sync_folder(self._folder)

    # -- start, end ----------------------------------------------------------------------------------------------------------

    async def start(self, key: Key) -> Status:
        """Where its image has no template yet, one is made after it runs."""
        status = await super().start(key)
        if status.phase is Phase.RUNNING and (held := self._held(self._instance(key))) is not None and self._templates is not None and not self._templates.has(held):
            document = (read(self._path(key) / "keeper.json") or {}).get("document") or {}
            self._holding.add(held, lambda: self._hold(held, document))
        return status

    def _held(self, instance: Mapping[str, Any]) -> Held | None:
        """Which template of an image serves an instance; none where an earlier agent laid it out."""
        return Held(Machine(*instance["machine"]), str(instance["image"]), int(instance["disk"])) if "disk" in instance else None

    def _hold(self, held: Held, document: Mapping[str, Any]) -> None:
        """Make an image's template; blocks."""
        assert self._templates is not None and self._disks is not None
        with self._blanks:
            image, empty = self._disks.path(held.image), self._disks.empty(held.disk)
            blank = os.open(empty, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._templates.hold(held, image, blank, document)
        finally:
            os.close(blank)

    async def settled(self) -> None:
        """Until no template is being made."""
        await asyncio.to_thread(self._holding.join)

    def _launch(self, key: Key) -> str:
        """The image's template first; where a clone cannot be made of a template, that is dropped, and the one of its size is taken, at last one that is booted anew."""
        assert self._templates is not None and self._disks is not None
        instance, folder = self._instance(key), self._path(key)
        machine, held = Machine(*instance["machine"]), self._held(instance)
        for _ in range(MAX_LAUNCHES):
            image = self._templates.held(held, self._disks.path(held.image)) if held is not None else None
            template = image or self._templates.get(machine)
            try:
                if held is not None:
                    self._lay_disk(folder / "disk.ext4", template.disk, held.disk)
                word = self._keepers.start(folder, START_S + 30, template.descriptors)
            finally:
                template.close()
            end = read(folder / "exit.json") or {}
            if word != "ended" or not end.get("unusable"):
                break
            log.warning("%s cannot be cloned from the template of %s, which is made anew: %s", key.id, "its image" if image else "its size", end.get("failed"))
            self._templates.drop(held if image and held else machine)
            if not released(folder, LEFT_S):
                break
            for name in ("running.json", "exit.json"):
                (folder / name).unlink(missing_ok=True)
        return word

    def _lay_disk(self, path: Path, template: int, size: int) -> None:
        """An instance's disk: as its template left it, else empty."""
        assert self._disks is not None
        try:
            path.unlink(missing_ok=True)
            if template < 0:
                with self._blanks:
                    self._disks.blank(size, path)
                return
            with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as writing:
                copy_data(template, writing.fileno())
        except OSError as error:
            raise Failed("disk", f"its disk could not be laid out: {error.strerror}", "look at the disk of the data folder") from None

    async def stop(self, key: Key, grace_s: float) -> Status:
        status = self._status(key)
        if status.phase not in (Phase.RUNNING, Phase.PAUSED):
            return status
        with suppress(TimeoutError, Failed):  # one that takes no orders is killed
            async with asyncio.timeout(grace_s):
                if status.phase is Phase.PAUSED:
                    await self.ask(key, {"do": "resume"})
                await self.ask(key, {"do": "signal", "number": int(self._instance(key)["signal"])})
                return await self.wait(key)
        return await self.kill(key)

    async def exec(self, key: Key, args: Sequence[str], timeout_s: float) -> Ran:
        """One at a time for each instance."""
        if not args or any("\0" in one for one in args):
            raise Refused("args", "are empty, or have a zero byte", "give a command")
        if "=" in args[0]:
            raise Refused("args", f"{args[0][:80]!r} has a = in its name, which a micro-VM takes for a variable", "call it by sh -c")
        if self._running(key).phase is Phase.PAUSED:
            raise Refused("id", f"{name_of(key)} is paused", "resume it first")
        answer = await self.ask(key, {"do": "exec", "args": list(args), "timeout_s": timeout_s}, timeout_s + ASK_S)
        if answer["late"]:
            raise Failed("exec", f"{args[0][:80]} took longer than {timeout_s:g} s, and was killed", "give it more time")
        code = int(answer["code"])
        return Ran(Exit(code, code - 128 if 128 < code <= 192 else 0), Output(base64.b64decode(answer["out"]), base64.b64decode(answer["err"]), bool(answer["cut"])))

    async def prune(self, budget: int) -> None:
        """Keep the images' file systems within `budget` bytes."""
        if self._disks is not None:
            disks = self._disks
            async with self._laying:
                await asyncio.to_thread(self._prune, disks, budget)

    def make_room(self) -> bool:
        """Give up the memory of images' templates; whether there were any. What runs goes on, and keeps what it has of them."""
        if self._templates is None or not self._templates.images():
            return False
        self._templates.keep(())
        return True

    def _prune(self, disks: Disks, budget: int) -> None:
        """Templates go with their images; blocks."""
        disks.prune(budget, {str(entry.get("image")) for entry in self._present().values()})
        if self._templates is not None:
            self._templates.keep({image for image in self._templates.images() if disks.path(image).exists()})
