"""Virtual machines: a disk of any system, in a QEMU that is a PC; each is watched over by a keeper of its own (`vm_keeper`), which outlives the agent.

    <dir>/vms/<name>/        one instance: instance.json, keeper.json, disk.qcow2 (what it wrote), seed.img (for cloud-init), and what its keeper writes; checkpoint.json and restore/ (`vm_checkpoint`)
    <dir>/vms/.templates/    what the disks of templates have beyond their images (`vm_templates`)

The image's disk is read by all that started from it, and written by nobody.
"""

import asyncio
import hashlib
import logging
import os
import platform
import re
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..images import Image, ImageError, ImageStore
from . import cgroups, lease, outside, qemu_kernel, vm_files, vm_image, vm_machine, vm_probe, vm_seed
from .face import QCOW2, Ability, Capabilities, DriverError, Failed, Key, Order, Phase, Refused, Status
from .instance import BLOCK, LEFT, LOOK_S, NOTE, UPPER, link_output, read, sync_folder, write
from .microvm_templates import UID as FIRST_UID
from .network import PROGRAM, connection, resolv_conf
from .programs import searched
from .qemu_driver import MAX_INSTANCES, PROGRAMS, QemuDriver, ask_path, name_of, open_to_group, version_of
from .vm_machine import FIRMWARE, KERNEL, UEFI, Layer, Shape
from .vm_spec import BOOT_S, Offer, Vm, hardware_address, machine
from .vm_templates import DISK, Template, VmTemplates

if TYPE_CHECKING:
    from .vm_checkpoint import Checkpoints
    from .vm_live import Live

log = logging.getLogger(__name__)

UID = FIRST_UID + 0x1000
"""User of a template's QEMU; those of instances come after it. Beside those of micro-VMs."""

COPY_S = 600.0
"""A copy of a disk that takes longer hangs: 60 GB at 100 MB/s take as long."""

COPY_LEAST = 20_000_000
"""Bytes in a second that a snapshot writes at least: an SD card does. So long it may take beside that."""

OPTION_ROM = "linuxboot_dma.bin"
"""What QEMU adds to a machine that is given a kernel: a clone, which needs no kernel any more, must have it all the same."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How virtual machines are run.

    Attributes:
        kernel: folder with boot/ and lib/modules/ of the kernel that the probe boots; empty: this machine's.
        qemu: programs to try.
        log_bytes: kept of the serial console.
        network: let machines have the node's network, where slirp4netns is installed.
        publish: addresses of the node on which ports may be published.
        bridges: of the node, to which machines may be connected.
        enabled: else nothing is started; what is there is ended.
    """

    kernel: str = ""
    qemu: tuple[str, ...] = PROGRAMS
    log_bytes: int = 4 << 20
    network: bool = True
    publish: tuple[str, ...] = ("127.0.0.1",)
    bridges: tuple[str, ...] = ()
    enabled: bool = True


class VmDriver(QemuDriver):
    """The driver of virtual machines; see `face.Driver`."""

    WHAT, FOLDER, KEEPER = "virtual machine", "vms", "vm_keeper.py"

    def __init__(self, directory: Path, store: ImageStore, settings: Settings = Settings()) -> None:
        super().__init__(directory, store)
        self._settings = settings
        self._templates = VmTemplates(self._folder / ".templates", self._keepers)
        self._qemu, self._version, self._accelerator, self._connector = "", "", "tcg", searched(PROGRAM) if settings.network else None
        self._checkpoints: Checkpoints | None = None
        self._live: Live | None = None
        self.booted_s = 0.0
        """What the probe's boot took."""

    def close(self) -> None:
        """What runs goes on."""
        super().close()
        self._templates.close()

    # -- what can be done ----------------------------------------------------------------------------------------------------

    async def probe(self) -> Capabilities:
        """Boot a guest: that is the proof. First what an earlier agent has left standing still goes on."""
        await self.settle()
        return await super().probe()

    async def settle(self) -> None:
        """Bring to its end what an earlier agent had begun with its machines' states."""
        for name, entry in (await asyncio.to_thread(self._present)).items():
            if (self._folder / name / NOTE).exists():
                key = Key(entry["id"], entry["epoch"])
                try:
                    async with self._one(key):
                        await self.checkpoints().settle(key)
                except Failed as error:
                    log.error("the checkpoint of %s that was under way could not be brought to an end: %s", name, error)

    def demand(self, ability: Ability) -> None:
        """See `face.Checkpoints`."""
        if self._capabilities is None:
            raise Refused("host", "what can be done here has not been looked at yet", "ask again")
        self._capabilities.demand(ability)

    def _find(self) -> Capabilities:
        cannot = dict.fromkeys((Ability.INCREMENTAL, Ability.LAZY), "this driver has no code for it yet") | {
            Ability.ROOTLESS: "the driver makes control groups and network namespaces, which needs root", Ability.USER_NAMESPACE: "a guest has a kernel of its own instead",
            Ability.EXEC: "what runs in a guest is its own affair: log in to it over its network",
        }
        if self._connector is None:
            cannot[Ability.NETWORK] = self._no_network()
        why, version = "", ""
        qemu = next((path for name in self._settings.qemu if (path := searched(name))), None)
        if not self._settings.enabled:
            why = "switched off (workloads.vms in its configuration)"
        elif short := outside.short_of_root():
            why = short
        elif platform.machine() != "x86_64":
            why = f"there is no machine type q35 for {platform.machine()}"
        elif self._groups.lacks:
            why = self._groups.lacks
        elif qemu is None:
            why = "QEMU is not installed (as root: apt install qemu-system-x86)"
        else:
            try:
                self._qemu = qemu
                kernel = qemu_kernel.find(self._settings.kernel)
                self._accelerator, cpu = self._boots(kernel)
                said = version_of(qemu)
                self._version = (re.findall(r"version (\d+\.\d+\.\d+)", said) or [""])[0]
                version = f"{said}, {self._accelerator}, Linux {kernel.release}" + (f" (kvm: {cpu})" if cpu else "")
            except (qemu_kernel.NoKernel, OSError) as error:
                why = str(error)
            except Failed as error:
                why = f"no guest boots: {error.problem}"
        if not why and self._accelerator == "tcg" and (short := vm_probe.too_old(self._version)):
            cannot[Ability.LIVE] = short
        if why:
            cannot |= dict.fromkeys((ability for ability in Ability if ability not in cannot), why)
        return Capabilities("vm", "vm", version[:400], platform.machine(), (), self._groups.layout, platform.release(), cannot)

    def _no_network(self) -> str:
        return f"{PROGRAM} is not installed (as root: apt install {PROGRAM})" if self._settings.network else "switched off (workloads.network in its configuration)"

    def _boots(self, kernel: qemu_kernel.Kernel) -> tuple[str, str]:
        """The accelerator with which Linux boots, and why not with the better one. That /dev/kvm opens proves nothing (see `microvm`)."""
        why = "there is no /dev/kvm"
        if os.path.exists("/dev/kvm"):
            why = "" if open_to_group("/dev/kvm") else "neither its group nor others may open /dev/kvm"
            if not why:
                try:
                    self._try(kernel, "kvm")
                    return "kvm", ""
                except Failed as error:
                    why = error.problem
        self._try(kernel, "tcg")
        return "tcg", why[:200]

    def _try(self, kernel: qemu_kernel.Kernel, accelerator: str) -> None:
        """Boot the probe's guest to its first process, and save it. Raises `Failed`."""
        shape = replace(vm_probe.PROBE, accelerator=accelerator)

        def told(folder: Path) -> dict[str, Any]:
            return self._template(folder, shape, vm_probe.guest(folder, kernel), vm_probe.QUIET)

        self.booted_s = self._templates.get("probe", BOOT_S, told).booted_s
        self._templates.drop("probe")

    # -- prepare -------------------------------------------------------------------------------------------------------------

    async def prepare(self, order: Order) -> Status:
        await self._ready()
        async with self._laying:
            if not self._path(order.key).exists():
                await self._laid(order)
        return self._status(order.key)

    async def _laid(self, order: Order, fill: "Fill | None" = None, arrives: str = "") -> None:
        try:
            await asyncio.to_thread(self._lay_out, order, fill, arrives)
        except ImageError as error:
            raise Refused(error.field, error.problem, error.remedy) from None
        except OSError as error:
            raise Failed("disk", f"the machine could not be laid out: {error.strerror}", "look at the disk of the data folder") from None
        finally:
            await asyncio.to_thread(shutil.rmtree, self._new / name_of(order.key), True)

    def _room(self, order: Order) -> dict[str, dict[str, Any]]:
        """The instances that are here, where there is room for one more. Raises `Refused`."""
        present = self._present()
        if len(present) >= MAX_INSTANCES:
            raise Refused("instances", f"there are {len(present)} virtual machines on this node, the most there may be", "delete those that have ended")
        space = os.statvfs(self._folder)
        if order.requests.get("disk", 0) > space.f_bavail * space.f_frsize:
            raise Refused("requests.disk", f"{order.requests['disk']} bytes are asked for, {space.f_bavail * space.f_frsize} are free", "ask for less, free space, or place it on another node")
        return present

    def _lay_out(self, order: Order, fill: "Fill | None" = None, arrives: str = "") -> None:
        """Check everything, then write the instance's folder, all or nothing; blocks. `fill`: puts a state there, from which it goes on instead of booting. `arrives`: the folder by whose sockets that comes."""
        image, content, vm = self._plan(order)
        present = self._room(order)
        taken = {entry.get("slot") for entry in present.values()}
        slot = next(number for number in range(MAX_INSTANCES + 1) if number not in taken)
        name, folder = name_of(order.key), self._path(order.key)
        laid = self._new / name
        shutil.rmtree(laid, ignore_errors=True)
        laid.mkdir(mode=0o700)
        if fill is not None:
            fill(laid, image, vm)
        else:
            if vm.template:
                os.link(self._template_of(image, vm, content).folder / DISK, laid / DISK)
            vm_files.lay(laid / "disk.qcow2", vm.disk_bytes)
            (laid / "seed.img").write_bytes(vm_seed.seed(vm_seed.files(name, vm.hostname, vm.cloud_init)))
            if vm.shape.boot == UEFI:
                shutil.copyfile(FIRMWARE[1], laid / "variables.fd")
        for file, value in (("keeper.json", self._keeper(order, vm, content, folder, slot, fill is not None, (laid / UPPER).exists(), arrives)), ("instance.json", {
            "id": order.key.id, "epoch": order.key.epoch, "slot": slot, "image": image.digest, "layers": list(image.config.diff_ids), "leased": order.leased, "bytes": vm.disk_bytes,
            "reference": order.image, "requests": dict(order.requests), "spec": dict(order.spec),
        })):
            write(laid / file, value)
        (laid / "lock").touch(mode=0o600)
        os.rename(laid, folder)
        sync_folder(self._folder)

    def _plan(self, order: Order) -> tuple[Image, vm_image.Content, Vm]:
        """All that is asked for, checked."""
        image = self._store.find(order.image)
        if image.config.module:
            raise Refused("image", "is a WebAssembly module", "submit it as a function or a batch job")
        content = vm_image.find(self._store.lower(image))
        offer = Offer(
            content.kernel is not None, content.arguments, content.bytes, all(map(os.path.exists, FIRMWARE)), self._accelerator, os.cpu_count() or 1, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            self._settings.publish if self._connector is not None else None, self._no_network(), [name for name in self._settings.bridges if name in {there for _, there in socket.if_nameindex()}],
        )
        vm = machine(order, offer)
        return image, content, vm

    def _keeper(self, order: Order, vm: Vm, content: vm_image.Content, folder: Path, slot: int, came: bool, upper: bool, arrives: str = "") -> dict[str, Any]:
        """What the keeper of an instance is told. `came`: it goes on from a state, which has its memory. `upper`: over its disk lies one more, which its keeper has written into that before it goes on. `arrives`: see `vm_live`."""
        shape, group = vm.shape, f"{cgroups.PARENT}/{folder.name}"
        files = [["base", str(content.disk), False], *([["under", str(folder / DISK), False]] if vm.template else []), ["disk", str(folder / "disk.qcow2"), True], ["seed", str(folder / "seed.img"), False]]
        formats = [content.format, *(["qcow2"] if vm.template else []), "qcow2"]
        sets = [word for at, (file, _, _) in enumerate(files, 1) for word in ("-add-fd", f"fd={{{file}}},set={at}")]
        disks = [*sets, *vm_machine.chain("disk", [Layer(form, at) for at, form in enumerate(formats, 1)], True), *vm_machine.chain("seed", [Layer("raw", len(files))], False)]
        boot, more = _boot(shape, content, vm.arguments, vm.template)
        if shape.boot == UEFI:
            at = len(files) + 1
            boot = [["firmware", FIRMWARE[0], False], ["variables", str(folder / "variables.fd"), True]]
            more = ["-add-fd", f"fd={{firmware}},set={at}", "-add-fd", f"fd={{variables}},set={at + 1}", *vm_machine.chain("firmware", [Layer("raw", at)], False), *vm_machine.chain("variables", [Layer("raw", at + 1)], True), "-machine", "pflash0=firmware,pflash1=variables"]
        clone = vm.template and not came
        memory = vm_machine.file(shape, "/proc/self/fd/{ram}", False) if clone else vm_machine.anonymous(shape)
        if came and not arrives:
            boot = [*boot, ["came", str(folder / "restore/state"), False]]
        network = connection(self._connector, vm.outside, False) if vm.network is not None and self._connector is not None else None
        line = partial(
            vm_machine.command, self._qemu, shape, memory, forwards=vm.forwards, more=[*more, *(["-incoming", "defer"] if vm.template or came else [])],
            hardware_address=hardware_address(order.key.id) if vm.bridge else "",
        )
        return {
            "folder": str(folder), "name": folder.name, "template": False, "boot_s": vm.boot_s, "machine": described(vm), "came": came, "arrives": arrives, "uid": UID + 1 + slot, "more_groups": kvm_groups(shape), "ports": vm_machine.PORTS, "hostname": vm.hostname,
            "groups": self._limits(group, shape.memory_mb, order), "descriptors": ["ram", "state"] if clone else [], "files": [*files, *boot],
            "command": line(disks), "upper": {"path": str(folder / UPPER), "command": line([*disks, *vm_machine.upper("disk")], drive=vm_machine.UPPER)} if upper else None,
            "tap": {"bridge": vm.bridge, "name": tap_name(folder.name)} if vm.bridge else None,
            "binds": self._resolver() if network is not None else [], "network": network, "log_bytes": self._settings.log_bytes, "oom": self._groups.memory_events(group),
            "lease": str(lease.path_of(self._lease(order.key))) if order.leased else "", "ask": str(ask_path(folder)),
        }

    def _resolver(self) -> list[list[str]]:
        """What QEMU takes for this node's resolv.conf: the resolver of what connects it to the node's network. Nothing where the node has none."""
        target = os.path.realpath("/etc/resolv.conf")
        if not os.path.exists(target):
            return []
        path = self._folder / ".resolv.conf"
        if not path.exists():
            path.write_text(resolv_conf())
            path.chmod(0o644)
        return [[str(path), target]]

    # -- templates -----------------------------------------------------------------------------------------------------------

    def _template_of(self, image: Image, vm: Vm, content: vm_image.Content) -> Template:
        """The template of a machine, made where it is not there."""
        if vm.shape.boot == UEFI:
            raise Refused("spec.template", "cannot be had of a machine that boots by uefi", "boot by bios or kernel")
        return self._templates.get((image.digest, vm.shape, vm.disk_bytes, vm.arguments), vm.boot_s or BOOT_S, lambda folder: self._template(folder, vm.shape, content, vm.arguments, vm.disk_bytes))

    def _template(self, folder: Path, shape: Shape, content: vm_image.Content, arguments: str, size: int = 1 << 20) -> dict[str, Any]:
        """Lay out what a template's guest boots from; what its keeper is told."""
        vm_files.lay(folder / DISK, size)
        (folder / "seed.img").write_bytes(bytes(vm_seed.SECTORS * vm_seed.SECTOR))  # of the size of any; a guest that waits for its orders does not look at it
        files = [["base", str(content.disk), False], ["disk", str(folder / DISK), True], ["seed", str(folder / "seed.img"), False]]
        sets = [word for at, (file, _, _) in enumerate(files, 1) for word in ("-add-fd", f"fd={{{file}}},set={at}")]
        disks = [*sets, *vm_machine.chain("disk", [Layer(content.format, 1), Layer("qcow2", 2)], True), *vm_machine.chain("seed", [Layer("raw", 3)], False)]
        boot, more = _boot(shape, content, arguments, False)
        return {
            "uid": UID, "more_groups": kvm_groups(shape), "ports": vm_machine.PORTS, "memory_mb": shape.memory_mb, "files": [*files, *boot],
            "command": vm_machine.command(self._qemu, shape, vm_machine.file(shape, "/proc/self/fd/{ram}", True), disks, (), more),
        }

    # -- start, end ----------------------------------------------------------------------------------------------------------

    def _launch(self, key: Key) -> str:
        told = read(self._path(key) / "keeper.json") or {}
        descriptors: tuple[int, ...] = ()
        if "state" in told.get("descriptors", ()):
            template = self._linked(key)
            descriptors = (template.ram, template.state)
        return self._keepers.start(self._path(key), float(told.get("boot_s", BOOT_S)) + 30, descriptors)

    def _linked(self, key: Key) -> Template:
        """The template of an instance that was not started yet. One that an earlier agent prepared stands on a template that has gone with it: it gets the disk that belongs to the new one."""
        instance = self._instance(key)
        image, content, vm = self._plan(Order(key, instance["reference"], instance["requests"], instance["spec"]))
        template = self._template_of(image, vm, content)
        link = self._path(key) / DISK
        if not os.path.samefile(link, template.folder / DISK):
            link.unlink()
            os.link(template.folder / DISK, link)
        return template

    async def stop(self, key: Key, grace_s: float) -> Status:
        """By its power button; a guest that does not heed it is killed, and one that has left: it may be running elsewhere."""
        status = self._status(key)
        if status.phase not in (Phase.RUNNING, Phase.PAUSED):
            return status
        if status.phase is Phase.PAUSED and (self._path(key) / LEFT).exists():
            return await self.kill(key)
        with suppress(TimeoutError, Failed):
            async with asyncio.timeout(grace_s):
                if status.phase is Phase.PAUSED:
                    await self.ask(key, {"do": "resume"})
                await self.ask(key, {"do": "powerdown"})
                return await self.wait(key)
        return await self.kill(key)

    def _status(self, key: Key) -> Status:
        """As that of any QEMU; one whose state is whole, and ended it, is checkpointed."""
        status = super()._status(key)
        if status.phase in (Phase.ENDED, Phase.LOST) and (note := read(self._path(key) / NOTE) or {}).get("whole"):
            return replace(status, phase=Phase.CHECKPOINTED, reason=f"its state was taken to {note.get('folder')}")
        if status.phase in (Phase.ENDED, Phase.LOST) and (self._path(key) / LEFT).exists():
            return replace(status, phase=Phase.CHECKPOINTED, reason="it was leaving for another node while it ran, which may have begun it")
        return status

    async def start(self, key: Key) -> Status:
        if self.waits(key):
            raise Refused("id", f"{name_of(key)} waits for what comes from another node", "let it go on when that is here, or delete it")
        return await super().start(key)

    async def delete(self, key: Key) -> None:
        if self._path(key).exists() and self.waits(key):
            await self.live().drop(key)
        await super().delete(key)

    # -- checkpoint, restore -------------------------------------------------------------------------------------------------

    def spec(self, key: Key) -> Mapping[str, Any]:
        """What its document says to this driver. Raises `Refused` where it is not here."""
        found = self._instance(key).get("spec")
        return found if isinstance(found, dict) else {}

    def checkpoints(self) -> "Checkpoints":
        """What takes and brings back states; loaded where it is first needed."""
        if self._checkpoints is None:
            from .vm_checkpoint import Checkpoints

            self._checkpoints = Checkpoints(self, self._groups)
        return self._checkpoints

    async def checkpoint(self, key: Key, folder: Path, *, leave_running: bool, step: Callable[[str], None] = lambda word: None, since: str = "") -> Mapping[str, Any]:
        """See `face.Checkpoints` and `face.GoesAhead`; `step` is told what has been reached."""
        await self._ready(Ability.CHECKPOINT)
        async with self._one(key):
            return await self.checkpoints().take(key, folder, leave_running=leave_running, step=step, since=since)

    async def ahead(self, key: Key, name: str, target: Path, speed: int = 0) -> Mapping[str, Any]:
        """See `face.GoesAhead`."""
        await self._ready(Ability.MIGRATE_OUT)
        self._running(key)
        return await self.checkpoints().ahead(key, name, target, speed)

    async def examine(self, folder: Path) -> Mapping[str, Any]:
        """See `face.Checkpoints`."""
        await self._ready(Ability.RESTORE)
        return await self.checkpoints().look_through(folder, self._host())

    def _host(self) -> dict[str, Any]:
        from .vm_checkpoint import host

        return host(self._version, self._accelerator)

    async def restore(self, order: Order, folder: Path, *, output: Path | None = None) -> Status:
        """See `face.Checkpoints`. Raises `Refused` before anything is touched; after `Failed` nothing of it is here, and the checkpoint is as it was."""
        manifest = await self.examine(folder)

        def fill(laid: Path, image: Image, vm: Vm) -> None:
            _same_layers(image, manifest, order.image)
            self.checkpoints().fill(folder, manifest, laid, described(vm))
            if output is not None:
                link_output(output, laid)

        async with self._laying:
            if self._path(order.key).exists():
                raise Refused("id", f"there is a virtual machine {name_of(order.key)} already", "delete it first, or restore it under another epoch")
            await self._laid(order, fill)
        await asyncio.to_thread(self.checkpoints().used, folder)
        return await self.come_back(order.key)

    async def come_back(self, key: Key) -> Status:
        """See `face.Checkpoints`; removes it where it does not live."""
        try:
            status = await self.start(key)
            while status.phase is Phase.PREPARED:  # an earlier agent's keeper is at it still; it ends by its own bounds
                await asyncio.sleep(LOOK_S)
                status = await self.start(key)
            status = await self.checkpoints().lives(key)
        except DriverError:
            await self.delete(key)
            raise
        await asyncio.to_thread(shutil.rmtree, self._path(key) / "restore", True)
        return status

    async def migrate_out(self, key: Key) -> Mapping[str, Any]:
        """See `face.Migrates`."""
        await self._ready(Ability.MIGRATE_OUT)
        return await self.checkpoints().offer(key)

    async def migrate_in(self, order: Order, offer: Mapping[str, Any]) -> None:
        """See `face.Migrates`: it is planned as it would be."""
        await self._ready(Ability.MIGRATE_IN)
        from .vm_checkpoint import same_machine, suits

        suits(offer["host"], self._host())
        try:
            image, _, vm = await asyncio.to_thread(self._plan, order)
        except ImageError as error:
            raise Refused(error.field, error.problem, error.remedy) from None
        _same_layers(image, offer, order.image)
        if not isinstance(offer.get("machine"), dict):
            raise Refused("offer", "says nothing of its machine", "move it from a node whose agent is of this version")
        same_machine(offer["machine"], described(vm))
        await asyncio.to_thread(self._room, order)

    # -- moves while it runs -------------------------------------------------------------------------------------------------

    def live(self) -> "Live":
        """What moves machines while they run; loaded where it is first needed."""
        if self._live is None:
            from .vm_live import Live

            self._live = Live(self)
        return self._live

    async def leave(self, key: Key, folder: Path, speed: int) -> None:
        """See `face.Lives`."""
        await self._ready(Ability.LIVE)
        self._running(key)
        await self.live().leave(key, folder, speed)

    async def stay(self, key: Key) -> None:
        """See `face.Lives`."""
        await self.live().stay(key)

    async def arrive(self, order: Order, offer: Mapping[str, Any], folder: Path) -> None:
        """See `face.Lives`."""
        await self._ready(Ability.LIVE)
        await self.live().arrive(order, offer, folder)

    async def lay_arriving(self, order: Order, offer: Mapping[str, Any], folder: Path) -> None:
        """Lay out what waits; see `vm_live`."""
        def fill(laid: Path, image: Image, vm: Vm) -> None:
            _same_layers(image, offer, order.image)
            self.live().lay(laid, offer, vm)

        async with self._laying:
            await self._laid(order, fill, str(folder))

    def launch(self, key: Key) -> str:
        """Start the keeper of an instance; its first word. Blocks."""
        return self._launch(key)

    async def go(self, key: Key) -> Status:
        """See `face.Lives`."""
        return await self.live().go(key)

    def waits(self, key: Key) -> bool:
        """See `face.Lives`."""
        own = self._path(key)
        return not (own / "running.json").exists() and bool((read(own / "keeper.json") or {}).get("arrives"))

    # -- snapshot ------------------------------------------------------------------------------------------------------------

    async def snapshot(self, key: Key, folder: Path) -> Mapping[str, Any]:
        """The disk as of one moment, as one qcow2 file without others below it, while the guest goes on. What the guest had not written yet is not in it, as after a loss of power."""
        await self._ready(Ability.SNAPSHOT)
        self._running(key)
        if any(folder.iterdir()):
            raise Refused("folder", f"{folder} is not empty", "give an empty one")
        target, size = folder / "disk.qcow2", int(self._instance(key)["bytes"])
        await asyncio.to_thread(vm_files.lay, target, size)
        try:
            at_ms = int(time.time() * 1000)  # QEMU copies the disk as it is when it is asked
            await self.ask(key, {"do": "copy", "path": str(target)}, COPY_S + await asyncio.to_thread(self.snapshot_bytes, key) / COPY_LEAST)
            await asyncio.to_thread(vm_files.settle, target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        return {"file": target.name, "format": QCOW2, "bytes": size, "image": self._instance(key)["image"], "at_ms": at_ms, "paused_ms": 0}

    def snapshot_bytes(self, key: Key) -> int:
        """See `face.Snapshots`: what it has written, and its image's disk."""
        try:
            below = vm_image.find(self._store.lower(self._store.find(f"sha256:{self._instance(key)['image']}"))).disk
        except ImageError as error:
            raise Refused(error.field, error.problem, error.remedy) from None
        return sum(os.stat(path).st_blocks * BLOCK for path in (below, *self._path(key).glob("*.qcow2")))


Fill = Callable[[Path, Image, Vm], None]
"""Puts a state into an instance's folder that is being laid out."""


def described(vm: Vm) -> dict[str, Any]:
    """What has to be the same where a machine goes on: JSON."""
    return {**asdict(vm.shape), "arguments": vm.arguments, "disk_bytes": vm.disk_bytes, "template": vm.template}


def tap_name(instance: str) -> str:
    """What the port of an instance is called on the node; at most 15 characters may be."""
    return f"nvm{hashlib.blake2b(instance.encode(), digest_size=6).hexdigest()}"


def _same_layers(image: Image, told: Mapping[str, Any], reference: str) -> None:
    """Raises `Refused` where the image is not the one that a state stands on."""
    if list(image.config.diff_ids) != told.get("layers"):
        raise Refused("image", f"its state stands on {str(told.get('image'))[:19]}, and {reference} is {image.digest[:19]} here", f"bring the image that it has to this node ({reference})")


def _boot(shape: Shape, content: vm_image.Content, arguments: str, clone: bool) -> tuple[list[list[Any]], list[str]]:
    """Files to open, and options, by which a machine boots. A clone has booted."""
    if shape.boot == KERNEL:
        if clone:
            return [], ["-option-rom", OPTION_ROM, "-no-reboot"]  # it has no kernel to boot any more
        assert content.kernel is not None
        files = [["kernel", str(content.kernel), False], *([["initrd", str(content.initrd), False]] if content.initrd is not None else [])]
        escaped = arguments.replace("{", "{{").replace("}", "}}")  # whoever starts it puts descriptors into braces
        return files, vm_machine.kernel("/proc/self/fd/{kernel}", "/proc/self/fd/{initrd}" if content.initrd is not None else "", escaped)
    return [], []


def kvm_groups(shape: Shape) -> list[int]:
    """The group of /dev/kvm, where a machine needs it."""
    return [os.stat("/dev/kvm").st_gid] if shape.accelerator == "kvm" else []
