"""Micro-VMs: the image and `spec` of a container, run by a kernel of its own in a QEMU of the machine type `microvm`; each is watched over by a keeper of its own (`qemu_keeper`), which outlives the agent.

    <dir>/microvms/<name>/     one instance: instance.json, keeper.json, disk.ext4 (what it wrote), and what its keeper writes
    <dir>/microvms/.images/    images as file systems; .blank/ empty ones (`microvm_disks`)
    <dir>/microvms/.new/       what is being laid out or removed; emptied at start

What is on the disk is the truth, as for containers. An instance is a clone of a template (`microvm_templates`) that booted when the driver was probed.
"""

import asyncio
import base64
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..images import ImageError, ImageStore
from . import cgroups, lease, qemu_kernel
from .container import searched
from .container_spec import Host, stop_signal
from .face import Ability, Capabilities, Exit, Failed, Key, Order, Output, Phase, Ran, Refused, Stats, Status
from .instance import alive, ended, held, known, over, present, read, sync_folder, tail, unheld, write
from .keepers import Keepers
from .microvm_disks import Disks
from .microvm_spec import disk_bytes, document, machine
from .microvm_templates import BOOT_S, UID, Templates, kvm_groups
from .qemu_machine import Machine, command
from .users import ids

MAX_INSTANCES = 64
"""Micro-VMs on the disk, the ended ones too; each that runs takes some 50 MB beside its workload."""

QEMU_OWN = 160 << 20
"""Bytes that a QEMU may use beside its guest's memory: its program, its translated code and its buffers take up to 100 MB."""

START_S = 60.0
"""A clone that has not started its program by then hangs; it takes 0.2 s."""

ASK_S = 30.0
"""A keeper that does not answer within this hangs."""

LEFT_S = 10.0
"""A QEMU that was killed, and its keeper, are gone by then."""

ASKS = Path("/run/novacron/microvms")
"""Sockets of keepers: their paths must be short."""

PROGRAMS = ("qemu-system-x86_64",)
MACHINE = Machine(256, 1)
"""The template that the probe boots: what a workload of 128 MiB gets."""

CPU_PERIOD_US = 100_000


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


class MicrovmDriver:
    """The driver of micro-VMs; see `face.Driver`. Needs root.

    Args:
        directory: its own, in the agent's data folder; absolute.
        store: where the images are.
    """

    def __init__(self, directory: Path, store: ImageStore, settings: Settings = Settings()) -> None:
        self._folder, self._store, self._settings = directory / "microvms", store, settings
        self._new = self._folder / ".new"
        self._groups = cgroups.read()
        self._capabilities: Capabilities | None = None
        self._templates: Templates | None = None
        self._disks: Disks | None = None
        self._qemu, self._accelerator = "", "tcg"
        self._keepers = Keepers(self._groups.folders(cgroups.KEEPERS), Path(__file__).with_name("qemu_keeper.py"))
        self._busy: dict[str, asyncio.Lock] = {}
        self._laying = asyncio.Lock()
        for folder in (directory, self._folder, self._new):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leaving in self._new.iterdir():
            shutil.rmtree(leaving, ignore_errors=True) if leaving.is_dir() else leaving.unlink()

    def close(self) -> None:
        """What runs goes on."""
        self._keepers.close()
        if self._templates is not None:
            self._templates.close()
            self._templates = None

    def folder(self, key: Key) -> Path:
        """An instance's folder, there or not."""
        return self._path(key)

    @property
    def template_s(self) -> float:
        """How long the probe's template took to boot and to be saved."""
        assert self._templates is not None
        found = self._templates.get(replace(MACHINE, accelerator=self._accelerator))
        return found.booted_s + found.saved_s

    # -- what can be done ----------------------------------------------------------------------------------------------------

    async def probe(self) -> Capabilities:
        """Boot a guest and save it: that is the first template, and the proof."""
        self._capabilities = await asyncio.to_thread(self._find)
        return self._capabilities

    def _find(self) -> Capabilities:
        cannot = dict.fromkeys(
            (Ability.CHECKPOINT, Ability.RESTORE, Ability.SNAPSHOT, Ability.MIGRATE_OUT, Ability.MIGRATE_IN, Ability.LIVE, Ability.INCREMENTAL, Ability.LAZY), "this driver has no code for it yet",
        ) | {Ability.ROOTLESS: "the driver makes control groups and mounts layers, which needs root", Ability.USER_NAMESPACE: "a guest has a kernel of its own instead", Ability.NETWORK: "a guest has loopback only"}
        why, version = "", ""
        qemu, mke2fs = next((path for name in self._settings.qemu if (path := searched(name))), None), searched("mke2fs")
        if not self._settings.enabled:
            why = "switched off (workloads.microvms in its configuration)"
        elif os.geteuid() != 0:
            why = "the agent does not run as root"
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
                version = f"{_version(qemu)}, {self._accelerator}, Linux {kernel.release}"
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
        why = "there is no /dev/kvm"
        if os.path.exists("/dev/kvm"):
            why = "" if _open_to_group("/dev/kvm") else "neither its group nor others may open /dev/kvm"
            if not why:
                try:
                    self._templates.get(replace(MACHINE, accelerator="kvm"))
                    return "kvm", ""
                except Failed as error:
                    why = error.problem
        self._templates.get(MACHINE)
        return "tcg", why[:200]

    async def _ready(self, ability: Ability = Ability.START) -> None:
        if self._capabilities is None:
            await self.probe()
        assert self._capabilities is not None
        self._capabilities.demand(Ability.START)
        self._capabilities.demand(ability)

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
        self._templates.get(shape)
        disk = self._disks.image(image.digest, lower)
        taken = {entry.get("slot") for entry in present.values()}
        slot = next(number for number in range(MAX_INSTANCES + 1) if number not in taken)
        name, folder = _name(order.key), self._path(order.key)
        laid = self._new / name
        shutil.rmtree(laid, ignore_errors=True)
        laid.mkdir(mode=0o700)
        self._disks.blank(size, laid / "disk.ext4")
        group = f"{cgroups.PARENT}/{name}"
        blocks = [f"driver=raw,node-name=disk{at},read-only={'off' if at else 'on'},file.driver=file,file.locking=off,file.filename=/dev/fdset/{at + 1}" for at in range(2)]
        fds = [word for at, file in enumerate(("root", "disk"), 1) for word in ("-add-fd", f"fd={{{file}}},set={at}")]
        keeper = {
            "folder": str(folder), "name": name, "template": False, "boot_s": START_S, "uid": UID + 1 + slot, "more_groups": kvm_groups(shape), "groups": self._limits(group, shape, order, told["cpu_us"]), "descriptors": ["ram", "state"],
            "files": [["root", str(disk), False], ["disk", str(folder / "disk.ext4"), True]], "command": [*command(self._qemu, shape, "/proc/self/fd/{ram}", False, blocks, *fds), "-incoming", "defer"],
            "document": told, "log_bytes": self._settings.log_bytes, "oom": self._groups.memory_events(group), "lease": str(lease.path_of(self._lease(order.key))) if order.leased else "", "ask": str(_ask_path(folder)),
        }
        instance = {
            "id": order.key.id, "epoch": order.key.epoch, "slot": slot, "image": image.digest, "layers": list(image.config.diff_ids), "signal": stop_signal(order, image.config), "leased": order.leased,
            "machine": [shape.memory_mb, shape.cpus, shape.accelerator],
        }
        for file, value in (("keeper.json", keeper), ("instance.json", instance)):
            write(laid / file, value)
        (laid / "lock").touch(mode=0o600)
        os.rename(laid, folder)
        sync_folder(self._folder)

    def _limits(self, group: str, shape: Machine, order: Order, quota_us: int) -> list[list[Any]]:
        """The control groups of QEMU: files and what to write, None for those that take its process. The guest keeps the workload's own limits; these hold a QEMU that misbehaves."""
        most, weight = (shape.memory_mb << 20) + QEMU_OWN, order.requests.get("cpu", 0) or 100
        quota = quota_us + CPU_PERIOD_US // 10 if quota_us else 0
        if self._groups.layout == "v2":
            top = self._groups.unified
            told: list[list[Any]] = [[f"{top}/cgroup.subtree_control", "+memory +cpu +pids"], [f"{top}{cgroups.PARENT}/cgroup.subtree_control", "+memory +cpu +pids"]]
            told += [[f"{top}{group}/memory.max", most], [f"{top}{group}/cpu.weight", min(10_000, max(1, weight // 10))], [f"{top}{group}/pids.max", 256]]
            return [*told, *([[f"{top}{group}/cpu.max", f"{quota} {CPU_PERIOD_US}"]] if quota else []), [f"{top}{group}/cgroup.procs", None]]
        mounts = self._groups.mounts
        told = [[f"{mounts['memory']}{group}/memory.limit_in_bytes", most], [f"{mounts['cpu']}{group}/cpu.shares", max(2, weight * 1024 // 1000)], [f"{mounts['pids']}{group}/pids.max", 256]]
        told += [[f"{mounts['cpu']}{group}/cpu.cfs_quota_us", quota]] if quota else []
        return told + [[f"{mount}{group}/cgroup.procs", None] for mount in dict.fromkeys(mounts[name] for name in ("memory", "cpu", "cpuacct", "pids") if name in mounts)]

    # -- start, end ----------------------------------------------------------------------------------------------------------

    async def start(self, key: Key) -> Status:
        async with self._one(key):
            status = self._status(key)
            if status.phase is not Phase.PREPARED or held(self._path(key)):
                return status  # what an earlier agent started runs also where this one could start nothing
            await self._ready()
            word = await asyncio.to_thread(self._launch, key)
            status = self._status(key)
            if word != "running" and status.phase not in (Phase.RUNNING, Phase.LOST) and (status.exit is None):
                raise Failed("start", status.reason or self._keeper_said(key) or "its keeper ended without a word", "see the reason; delete it before it is tried again")
            return status

    def _launch(self, key: Key) -> str:
        assert self._templates is not None
        memory_mb, cpus, accelerator = self._instance(key)["machine"]
        template = self._templates.get(Machine(memory_mb, cpus, accelerator))
        return self._keepers.start(self._path(key), START_S + 30, (template.ram, template.state))

    async def wait(self, key: Key) -> Status:
        return await over(self._path(key), lambda: self._status(key), lambda: self._watched(key))

    async def stop(self, key: Key, grace_s: float) -> Status:
        status = self._status(key)
        if status.phase not in (Phase.RUNNING, Phase.PAUSED):
            return status
        with suppress(TimeoutError, Failed):  # one that takes no orders is killed
            async with asyncio.timeout(grace_s):
                if status.phase is Phase.PAUSED:
                    await self._ask(key, {"do": "resume"})
                await self._ask(key, {"do": "signal", "number": int(self._instance(key)["signal"])})
                return await self.wait(key)
        return await self._kill(key)

    async def _kill(self, key: Key) -> Status:
        try:
            await self._ask(key, {"do": "kill"})
        except Failed:  # the keeper hangs, or has just gone
            await self._force(key)
        try:
            return await asyncio.wait_for(self.wait(key), LEFT_S)
        except TimeoutError:
            await self._force(key)
        try:
            return await asyncio.wait_for(self.wait(key), LEFT_S)
        except TimeoutError:
            raise Failed("stop", "it does not end though it was killed", "look at the node: a process that cannot be killed waits for its kernel or disk") from None

    async def _force(self, key: Key) -> None:
        """Kill QEMU itself; a keeper that lives writes down its end."""
        import signal

        running = read(self._path(key) / "running.json")
        if running is not None and alive(running):
            with suppress(OSError):
                os.kill(int(running["pid"]), signal.SIGKILL)

    async def delete(self, key: Key) -> None:
        folder = self._path(key)
        async with self._one(key):
            if not folder.exists():
                return
            if self._status(key).phase in (Phase.RUNNING, Phase.PAUSED):
                await self._kill(key)
            try:
                await asyncio.wait_for(unheld(folder), LEFT_S)
            except TimeoutError:
                raise Failed("delete", "its keeper does not end", "look at the node") from None
            gone = self._new / f"{folder.name}.gone"
            await asyncio.to_thread(shutil.rmtree, gone, True)
            os.rename(folder, gone)
            await asyncio.to_thread(shutil.rmtree, gone, True)
            lease.remove(self._lease(key))
        self._busy.pop(folder.name, None)

    def renew(self, key: Key, until_ms: int) -> None:
        lease.write(self._lease(key), until_ms)

    def lease_ms(self, key: Key) -> int:
        return lease.read(self._lease(key))

    def _lease(self, key: Key) -> Path:
        """What its lease is called after: a site renews the lease of a workload before it knows which driver runs it, so all have the same."""
        return self._folder.parent / "containers" / _name(key)

    # -- pause, stats, logs, exec --------------------------------------------------------------------------------------------

    async def pause(self, key: Key) -> Status:
        async with self._one(key):
            if self._running(key).phase is Phase.RUNNING:
                await self._ask(key, {"do": "pause"})
        return self._status(key)

    async def resume(self, key: Key) -> Status:
        async with self._one(key):
            if self._running(key).phase is Phase.PAUSED:
                await self._ask(key, {"do": "resume"})
        return self._status(key)

    async def stats(self, key: Key) -> Stats:
        """Of QEMU, the guest in it: what the node spends."""
        self._running(key)
        return self._groups.stats(f"{cgroups.PARENT}/{_name(key)}")

    async def logs(self, key: Key, most: int) -> Output:
        self._instance(key)
        (out, cut), (err, also) = await asyncio.to_thread(lambda: [tail(self._path(key) / f"{stream}.log", most) for stream in ("stdout", "stderr")])
        return Output(out, err, cut or also)

    async def exec(self, key: Key, args: Sequence[str], timeout_s: float) -> Ran:
        """One at a time for each instance."""
        if not args or any("\0" in one for one in args):
            raise Refused("args", "are empty, or have a zero byte", "give a command")
        if "=" in args[0]:
            raise Refused("args", f"{args[0][:80]!r} has a = in its name, which a micro-VM takes for a variable", "call it by sh -c")
        if self._running(key).phase is Phase.PAUSED:
            raise Refused("id", f"{_name(key)} is paused", "resume it first")
        answer = await self._ask(key, {"do": "exec", "args": list(args), "timeout_s": timeout_s}, timeout_s + ASK_S)
        if answer["late"]:
            raise Failed("exec", f"{args[0][:80]} took longer than {timeout_s:g} s, and was killed", "give it more time")
        code = int(answer["code"])
        return Ran(Exit(code, code - 128 if 128 < code <= 192 else 0), Output(base64.b64decode(answer["out"]), base64.b64decode(answer["err"]), bool(answer["cut"])))

    async def _ask(self, key: Key, request: Mapping[str, Any], seconds: float = ASK_S) -> dict[str, Any]:
        """A question to its keeper. Raises `Failed`."""
        writer = None
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_unix_connection(str(_ask_path(self._path(key))), limit=4 << 20)
                writer.write(json.dumps(request).encode() + b"\n")
                await writer.drain()
                answer: Any = json.loads(await reader.readline() or b"{}")
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            raise Failed(str(request["do"]), f"its keeper does not answer ({str(error) or 'in time'})", "look at whether it still runs") from None
        finally:
            if writer is not None:
                writer.close()
        if not isinstance(answer, dict) or not answer or "failed" in answer:
            raise Failed(str(request["do"]), str(answer.get("failed") or "it ended meanwhile") if isinstance(answer, dict) else "its keeper answers nonsense", "look at whether it still runs")
        return answer

    # -- what is there -------------------------------------------------------------------------------------------------------

    async def status(self, key: Key) -> Status:
        return self._status(key)

    async def instances(self) -> Sequence[Status]:
        found = []
        for entry in (await asyncio.to_thread(self._present)).values():
            with suppress(Refused):  # it was deleted in between
                found.append(self._status(Key(entry["id"], entry["epoch"])))
        return found

    def layers(self) -> set[str]:
        """Layers of the store that instances stand on."""
        return {layer for entry in self._present().values() for layer in entry.get("layers", ())}

    async def prune(self, budget: int) -> None:
        """Keep the images' file systems within `budget` bytes."""
        if self._disks is not None:
            disks = self._disks
            async with self._laying:
                await asyncio.to_thread(lambda: disks.prune(budget, {str(entry.get("image")) for entry in self._present().values()}))

    def _present(self) -> dict[str, dict[str, Any]]:
        return present(self._folder)

    def _path(self, key: Key) -> Path:
        return self._folder / _name(key)

    def _instance(self, key: Key) -> dict[str, Any]:
        return known(self._path(key), "micro-VM")

    def _status(self, key: Key) -> Status:
        """The lock first: where it is free, nothing changes any more. A QEMU dies with its keeper."""
        leased = bool(self._instance(key).get("leased", False))
        folder = self._path(key)
        kept = held(folder)
        end, running = read(folder / "exit.json"), read(folder / "running.json")
        if end is not None:
            if end.get("lapsed"):
                return Status(key, Phase.LOST, reason="it was ended since nobody could prove that it is still this node's", leased=leased)
            return replace(ended(key, end), leased=leased)
        if running is None:
            return Status(key, Phase.PREPARED, leased=leased)
        if not kept:
            return Status(key, Phase.LOST, reason="it does not run any more, and nobody saw its end: the machine restarted, or its keeper was killed", leased=leased)
        return Status(key, Phase.PAUSED if (folder / "paused").exists() else Phase.RUNNING, int(running["pid"]), leased=leased)

    def _running(self, key: Key) -> Status:
        status = self._status(key)
        if status.phase not in (Phase.RUNNING, Phase.PAUSED):
            raise Refused("id", f"{_name(key)} does not run ({status.phase.value})", "start it first")
        return status

    def _watched(self, key: Key) -> int | None:
        """A descriptor that becomes readable at the end of its keeper; None where it is not there yet, or any more."""
        running = read(self._path(key) / "running.json")
        if running is None:
            return None
        try:
            found = os.pidfd_open(int(running["keeper"]))
        except OSError:
            return None
        if held(self._path(key)):  # asked again: then it is of the process that was meant, not of a later one with its number
            return found
        os.close(found)
        return None

    def _keeper_said(self, key: Key) -> str:
        data, _ = tail(self._path(key) / "keeper.err", 2000)
        return data.decode("utf-8", "replace").strip()

    def _one(self, key: Key) -> asyncio.Lock:
        return self._busy.setdefault(_name(key), asyncio.Lock())


def _name(key: Key) -> str:
    return lease.name_of(key.id, key.epoch)


def _ask_path(folder: Path) -> Path:
    return ASKS / hashlib.blake2b(str(folder).encode(), digest_size=12).hexdigest()


def _open_to_group(path: str) -> bool:
    mode = os.stat(path).st_mode
    return mode & 0o060 == 0o060 or mode & 0o006 == 0o006


def _version(path: str) -> str:
    try:
        said = subprocess.run([path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return os.path.basename(path)
    return (said.splitlines() or [os.path.basename(path)])[0][:200]
