"""Hot conversion: a running container goes on as the same process in a micro-VM of its own, and comes back, with its memory, its connections and its address.

    <dir>/conversions/<name>/    one workload: conversion.json (`record`), its network (`network`), `guest/` (`guests`), `state/` (what is between two forms)

`conversion.json` says in which form the workload is, and what is under way; it is replaced as a whole, and every step can be done again from its beginning:

    ""          nothing is under way: it is `form`
    warming     a guest boots; the workload runs on, and knows nothing of it
    taking      it stands still, and its state is taken; the old form is the copy. Killed here, the next agent lets it go on
    passing     its state is whole and on the disk: the old form never runs again. Killed here, the next agent brings it on; where the guest has ended before anything of the workload ran in it, it is
                a container again

What decides is the file's replacement from `taking` to `passing`. On the way in the guest has it all by then, standing still; nothing of it runs in the guest before the keeper has written that down, and the
container's processes are killed before. On the way back the guest stands still, and is ended before anything of the container runs.
"""

import asyncio
import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...contract.workloads import AS_CONTAINER, AS_MICROVM, FORMS, GUEST_OWN
from ..drivers import cgroups, keeper_restore, keeping
from ..drivers.checkpoint_state import IMAGES, check, read_manifest
from ..drivers.container import ContainerDriver
from ..drivers.container_checkpoint import SLOW_DISK, Checkpoints, dump_over, one_tree
from ..drivers.container_runtime import COMMAND_S, LEFT_S
from ..drivers.container_spec import limits
from ..drivers.criu import GHOST_LIMIT, errors, log_of, offence
from ..drivers.face import DriverError, Exit, Failed, Key, Order, Output, Phase, Refused, Stats, Status
from ..drivers.instance import LOOK_S, held, link_output, read, tail, unheld
from ..drivers.lease import name_of
from ..drivers.microvm_spec import disk_bytes
from ..drivers.network import hosts, network, resolv_conf
from ..images import Image, ImageError, ImageStore
from . import checks, guests, record, state
from .environments import ending, environment_of
from .guests import Guest
from .host import Host, Settings
from .network import CONTAINER, GUEST, Segment
from .record import Workload


class Conversions:
    """The workloads of one node that can be converted. Needs root; one operation at a time for each workload.

    Args:
        driver: of containers, probed, with CRIU.
        step: is told what has been reached (`record.POINTS`).
    """

    def __init__(self, folder: Path, driver: ContainerDriver, store: ImageStore, settings: Settings = Settings(), step: Callable[[str], None] = lambda word: None) -> None:
        self._folder, self._driver, self._store, self._settings, self._step = folder / "conversions", driver, store, settings, step
        self._groups = cgroups.read()
        self.host = Host(self._folder, driver, store, settings)
        self._busy: dict[str, asyncio.Lock] = {}
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    # -- what there is -------------------------------------------------------------------------------------------------------

    def all(self) -> list[Workload]:
        """Those that were prepared and not deleted."""
        return [now for path in sorted(self._folder.glob(f"*/{record.NAME}")) if not path.parent.name.startswith(".") and (now := record.found(path.parent)) is not None]

    def workload(self, key: Key) -> Workload:
        """One of them. Raises `Refused`."""
        now = record.found(self._path(key))
        if now is None:
            raise Refused("id", f"{key.id} of epoch {key.epoch} is no workload that can be converted", "prepare it by Conversions first")
        return now

    async def status(self, key: Key) -> Status:
        """How it is, in whichever form."""
        now = self.workload(key)
        if now.form == AS_CONTAINER:
            return replace(await self._driver.status(key), form=AS_CONTAINER)
        guest = self.guest(key)
        if guest.lives:
            machine = read(guest.folder / "machine.json") or {}
            return Status(key, Phase.RUNNING, int(machine.get("pid", 0)), form=AS_MICROVM)
        if now.step:
            return Status(key, Phase.LOST, reason=now.problem or "it was on its way back to a container", form=AS_MICROVM)
        end = read(guest.folder / "exit.json")
        if end is None or "code" not in end:
            return Status(key, Phase.LOST, reason=str((end or {}).get("failed") or "its guest's keeper was killed, and the guest with it"), form=AS_MICROVM)
        told = Exit(int(end["code"]), int(end["signal"]), bool(end["out_of_memory"]), int(end["at_ms"]), int(end.get("memory_kills", 0)))
        return Status(key, Phase.ENDED, exit=told, reason=told.reason, form=AS_MICROVM)

    def folder(self, key: Key) -> Path:
        """Where what it writes is, in its present form: with what it wrote in those before."""
        return self._driver.folder(key) if self.workload(key).form == AS_CONTAINER else self.guest(key).folder

    async def logs(self, key: Key, most: int) -> Output:
        """The end of what it wrote, in all its forms."""
        folder = self.folder(key)
        (out, cut), (err, also) = await asyncio.to_thread(lambda: [tail(folder / f"{stream}.log", most) for stream in ("stdout", "stderr")])
        return Output(out, err, cut or also)

    async def stats(self, key: Key) -> Stats:
        """Of its container, or of the QEMU that it is in."""
        if self.workload(key).form == AS_CONTAINER:
            return await self._driver.stats(key)
        guest = self.guest(key)
        return Stats(guest.cpu_ns(), self._groups.stats(guest.group).memory_bytes, 1)

    def layers(self) -> set[str]:
        """Layers of the store that they stand on."""
        return {layer for now in self.all() for layer in now.layers}

    async def prune(self, budget: int) -> None:
        """Keep the images' file systems within `budget` bytes."""
        await self.host.prune(budget, {now.image for now in self.all()})

    # -- as a container ------------------------------------------------------------------------------------------------------

    async def prepare(self, order: Order) -> Status:
        """Lay out a container that can be converted: with variables that keep it from what a guest's processor lacks, and, where `spec.network` is there, a network of its own. Raises `Refused`."""
        known = self._path(order.key).exists()
        if known and (self.workload(order.key).form != AS_CONTAINER or self._driver.folder(order.key).exists()):
            return await self.status(order.key)
        if not known and len(self.all()) >= guests.MAX_GUESTS:
            raise Refused("instances", f"there are {len(self.all())} workloads that can be converted, the most there may be", "delete some")
        await self.host.can()
        checks.mounts(order.spec)
        wanted = network(order.spec.get("network"), self._settings.publish)
        if wanted is not None and not self._settings.network:
            raise Refused("spec.network", "workloads have no network on this node: switched off by the configuration", "leave it out, or place it on a node that has one")
        flags = await self.host.flags()
        capabilities = self._driver.capabilities
        assert capabilities is not None
        image = await asyncio.to_thread(self._image, order.image)
        if image.config.module:
            raise Refused("image", "is a WebAssembly module", "submit it as a function or a batch job")
        given = order.spec.get("env") or {}
        inner = replace(order, spec={**{name: value for name, value in order.spec.items() if name != "network"}, "env": {**given, **checks.masks(capabilities.cpu_flags, flags, given)}})
        if known:  # an agent was killed before it had laid the container out
            await self.delete(order.key)
        new = self._folder / f".{name_of(order.key.id, order.key.epoch)}.new"
        shutil.rmtree(new, ignore_errors=True)
        (new / "network").mkdir(parents=True, mode=0o700)
        kept = replace(inner, spec={**inner.spec, **({"network": order.spec["network"]} if wanted is not None else {})})
        record.keep(new, Workload(kept, image.digest, image.config.diff_ids))
        os.rename(new, self._path(order.key))
        try:
            if wanted is not None:
                await asyncio.to_thread(self.segment(order.key).start, wanted)
            return await self._laid(self.workload(order.key))
        except BaseException:
            await self.delete(order.key)
            raise

    async def start(self, key: Key) -> Status:
        """Start it as a container."""
        return await self._driver.start(key)

    async def stop(self, key: Key, grace_s: float) -> Status:
        """Ask it to end, in whichever form; kill it after `grace_s` seconds."""
        async with self._one(key):
            if self.workload(key).form == AS_CONTAINER:
                return await self._driver.stop(key, grace_s)
            guest = self.guest(key)
            with suppress(TimeoutError, Failed):  # one that takes no orders is killed
                async with asyncio.timeout(grace_s):
                    await guest.ask("signal", number=int(signal.SIGTERM))
                    await unheld(guest.folder)
            await guest.end()
        return await self.status(key)

    async def _laid(self, now: Workload, folder: Path | None = None) -> Status:
        """Lay the container out, from a state where there is one."""
        order = _inner(now.order)
        key, ways, criu = order.key, await self._driver.ways(), self._driver.criu
        image = await asyncio.to_thread(self._image, now.image)
        lower = self._store.lower(image)
        manifest = await asyncio.to_thread(check, folder) if folder is not None else None

        def fill(final: Path, laid: Path, document: dict[str, Any], told: dict[str, Any]) -> None:
            if manifest is not None and folder is not None:
                self._checkpoints.fill(folder, manifest, criu, final, laid, document, told)
                link_output(self.guest(key).folder, laid)
                keeping.write(str(laid / "passage.json"), {"token": now.token})
            elif "network" in now.order.spec:
                _names(laid / "disk/upper", document, told["id_base"] or 0)
            if "network" in now.order.spec and self.segment(key).lives:
                document["hooks"] = {"createRuntime": self.segment(key).hook()}

        await self._driver.lay(order, image, lower, ways, fill, manifest["base"] if manifest is not None else -1)
        return await self._driver.status(key)

    def _image(self, name: str) -> Image:
        """Blocks. Raises `Refused`."""
        try:
            return self._store.find(name)
        except ImageError as error:
            raise Refused(error.field, error.problem, error.remedy) from None

    async def delete(self, key: Key) -> None:
        """End it in whichever form, with all that was of it."""
        async with self._one(key):
            if not self._path(key).exists():
                return
            await self.guest(key).end()
            with suppress(Failed):
                await asyncio.to_thread(self.segment(key).release)
            await self._driver.delete(key)
            await asyncio.to_thread(self.segment(key).end)
            gone = self._folder / f".{name_of(key.id, key.epoch)}.gone"
            await asyncio.to_thread(shutil.rmtree, gone, True)
            os.rename(self._path(key), gone)
            await asyncio.to_thread(shutil.rmtree, gone, True)
        self._busy.pop(name_of(key.id, key.epoch), None)

    # -- what is looked at first ---------------------------------------------------------------------------------------------

    async def check(self, key: Key) -> dict[str, Any]:
        """What stands against a conversion of a running container; raises `Refused`, changes nothing. Returns what is worth knowing: `unmasked` (features of the processor that no variable can hide)."""
        now = self.workload(key)
        await self.host.can()
        checks.mounts(now.order.spec)
        status = await self._driver.status(key)
        if status.phase is not Phase.RUNNING:
            raise Refused("id", f"it does not run as a container ({status.phase.value})", "start it, or resume it, first")
        if not held(self._driver.folder(key)):
            raise Refused("id", "its keeper was killed: what it writes has no reader that could be given back to it", "stop it, and start it anew")
        those = self._processes(key)
        for pid, one in those.items():
            if one["stopped"]:
                raise Refused("resource.process", f"process {one['pid']} ({one['name']}) was stopped by a signal", "continue it (kill -CONT), or end it")
            self._in_its_group(key, pid, one)
        one_tree(status.pid, those)
        if "network" in now.order.spec and not self.segment(key).lives:
            raise Refused("spec.network", "its network has ended", "start the workload anew")
        await asyncio.to_thread(self._image, now.image)
        checks.devices(_text(f"/proc/{status.pid}/mountinfo"))
        capabilities = self._driver.capabilities
        assert capabilities is not None
        environments = {}
        for pid in those:
            if (found := await environment_of(pid)) is not None:
                environments[pid] = found
        left = checks.processor(capabilities.cpu_flags, await self.host.flags(), environments)
        free = next((int(line.split()[1]) << 10 for line in _text("/proc/meminfo").splitlines() if line.startswith("MemAvailable:")), 1 << 50)
        needed = max(0, self._groups.stats(self._group(key)).memory_bytes) * 2 + GUEST_OWN
        if free < needed:
            raise Refused("memory", f"a guest with it takes {needed} bytes, {free} are free", "end something else first")
        return {"unmasked": left, "kernel": (await self.host.boots()).release, "processes": len(those)}

    def _in_its_group(self, key: Key, pid: int, one: Mapping[str, Any]) -> None:
        if (path := checks.elsewhere(_text(f"/proc/{pid}/cgroup"), self._group(key), self._groups.layout == "v2")) and not ending(pid):
            raise Refused("resource.cgroup", f"process {one['pid']} ({one['name']}) is in the control group {path[:100]}, not in the workload's", "have it stay where it was started")

    # -- conversion ----------------------------------------------------------------------------------------------------------

    async def convert(self, key: Key, to: str) -> Status:
        """Change its form, and say how it is then. Raises `Refused` where nothing was touched; after `Failed` it is in its old form, or in the one that its `problem` says."""
        if to not in FORMS:
            raise Refused("to", f"{to[:40]!r} is none of {', '.join(FORMS)}", "name one")
        async with self._one(key):
            now = self.workload(key)
            if now.step:
                raise Refused("id", f"a conversion of it is under way ({now.step})", "resume it first")
            if now.form == to:
                return await self.status(key)
            await (self._to_guest(now) if to == AS_MICROVM else self._to_container(now))
            return await self.status(key)

    async def resume(self) -> list[Workload]:
        """Bring all that an agent left to its end. To be called once, after the driver's probe."""
        await self.host.tidy()
        for now in self.all():
            if now.step:
                async with self._one(now.order.key):
                    with suppress(DriverError):  # it stands in the file
                        await self._settle(now)
        return self.all()

    async def _settle(self, now: Workload) -> Workload:
        """From where somebody was killed: back where nothing has passed, else on."""
        if now.step == "passing":
            return await (self._enter(now) if now.to == AS_MICROVM else self._leave(now))
        if now.step in ("warming", "taking"):
            return await self._back(now, now.problem)
        return now

    async def _to_guest(self, now: Workload) -> None:
        key, guest, net = now.order.key, self.guest(now.order.key), self._net(now)
        await self.check(key)
        now = await self._write(replace(now, step="warming", to=AS_MICROVM, problem=""))
        try:
            boots, limit = await self.host.boots(), limits(now.order)
            image = await asyncio.to_thread(self._image, now.image)
            await guest.end()
            cpus, slot = max(1, -(-limit.cpu // 1000)), self._slot(key)
            await guest.boot(
                lambda: self.host.lay_guest(guest, boots, image, limit=limit.memory, disk=disk_bytes(now.order), cpus=cpus, slot=slot, connected=net is not None), net.tap if net is not None else None,
            )
            self._step("ready")
            await self.check(key)  # it may have changed meanwhile
            now = await self._write(replace(now, step="taking", token=uuid.uuid4().hex))
            if net is not None:
                net.hold()
                self._step("held")
            await self._taken(now, guest)
            self._step("restored")
            now = await self._write(replace(now, step="passing", passed=now.passed + 1))
        except BaseException as error:
            await self._back(now, str(error))
            raise
        await self._enter(now)

    async def _taken(self, now: Workload, guest: Guest) -> None:
        """Freeze the container, and have all of it in the guest, standing still; its state is then in `state` too."""
        key, criu = now.order.key, self._driver.criu
        await self._driver.hold(key)
        if not self._groups.frozen(self._group(key)):
            raise Failed("convert", "the runtime says that it paused it, and it runs on", "look at the node's freezer control group")
        self._step("frozen")
        status, those = await self._driver.status(key), self._processes(key)
        for one in those.values():
            one.pop("stopped")
        raw, folder = self._path(key) / "dump", self._path(key) / "state"
        await asyncio.to_thread(shutil.rmtree, raw, True)
        await asyncio.to_thread(shutil.rmtree, folder, True)
        (raw / IMAGES).mkdir(parents=True, mode=0o700)
        (raw / "criu.conf").write_text(f"network-lock skip\nghost-limit {GHOST_LIMIT}\n")  # its network is held: nothing comes
        await self._checkpoints.root(key, writable=True)
        try:
            await self._driver.runtime(
                key, "checkpoint", "--leave-running", "--tcp-established", "--file-locks", "--empty-ns", "network", "--image-path", str(raw / IMAGES), "--work-path", str(raw),
                environment=criu.environment(raw / "criu.conf"), seconds=COMMAND_S + max(0, self._groups.stats(self._group(key)).memory_bytes) / SLOW_DISK,
            )
        except Failed as error:
            log = await asyncio.to_thread(log_of, raw / "dump.log")
            found = offence(log, {pid: f"{one['pid']}, {one['name']}" for pid, one in those.items()})
            raise found or Failed("convert", f"{error.problem}; CRIU says: {' | '.join(errors(log)[:4])[:1000] or 'nothing'}", "see what it says; it goes on as before") from None
        await self._checkpoints.root(key, writable=False)
        self._step("dumped")
        document = self._checkpoints.described(key, criu, {"token": now.token}, those)
        base = max(0, document["base"])
        lower = self._store.lower(await asyncio.to_thread(self._image, now.image))
        disk = await asyncio.to_thread(state.changed, self._driver.folder(key) / "disk/upper", lower, base)
        await asyncio.to_thread(state.travel, guest.folder / "travel", raw, disk)
        pipes = json.loads((raw / IMAGES / "descriptors.json").read_text())[1:]
        limit = limits(now.order)
        told = {"pipes": pipes, "memory": limit.memory, "pids": limit.pids, "cpu_us": limit.cpu * 100, "now_s": int(time.time())}
        new = self._path(key) / ".state.new"
        packing = asyncio.ensure_future(asyncio.to_thread(self._checkpoints.packed, key, new, raw, document, False))
        try:
            answer = await guest.ask("restore", told=told)
        finally:
            await asyncio.wait([packing])  # what it works in is removed when this fails
        packing.result()
        _same(answer["processes"], those.values())
        os.rename(new, folder)
        keeping.write(str(self._path(key) / "devices.json"), {"devices": checks.devices(_text(f"/proc/{status.pid}/mountinfo"))})  # syncs the folder too

    async def _enter(self, now: Workload) -> Workload:
        """From `passing` to the guest: the container is ended, the guest let go."""
        key, guest, net = now.order.key, self.guest(now.order.key), self._net(now)
        if net is not None:
            await asyncio.to_thread(net.unplug, CONTAINER)  # what its sockets say at their end is nobody's business
        await self._ended(key)
        self._step("ended")
        ran = guest.folder / "running.json"
        try:
            if guest.lives and (await guest.ask("state"))["state"] == "restored":
                link_output(self._driver.folder(key), guest.folder)  # it goes on with the output that it had
                await guest.ask("go")
        except Failed:
            if not ran.exists():
                await guest.end()
        if not guest.lives and not ran.exists():
            return await self._leave(replace(now, to=AS_CONTAINER, problem="the guest ended before anything of the workload ran in it"))
        self._step("went")
        if net is not None:
            try:
                await asyncio.to_thread(net.plug, GUEST)
                net.release()
            except Failed as error:  # it runs all the same
                now = replace(now, problem=str(error)[:1000])
        self._step("plugged")
        now = await self._write(replace(now, form=AS_MICROVM, step="", to=""))
        await self._driver.delete(key)
        await asyncio.to_thread(shutil.rmtree, self._path(key) / "dump", True)
        return now

    async def _to_container(self, now: Workload) -> None:
        key, guest, net = now.order.key, self.guest(now.order.key), self._net(now)
        if not guest.lives:
            raise Refused("id", "it does not run: its guest has ended", "see its status")
        before = await asyncio.to_thread(read_manifest, self._path(key) / "state")
        now = await self._write(replace(now, step="taking", to=AS_CONTAINER, token=uuid.uuid4().hex, problem=""))
        try:
            if net is not None:
                net.hold()
                self._step("held")
            told = read(self._path(key) / "devices.json") or {"devices": []}
            answer = await guest.ask("dump", devices=told["devices"])
            self._step("dumped")
            if net is not None:
                await asyncio.to_thread(net.unplug, GUEST)
            document = {name: value for name, value in before.items() if name not in ("root", "files", "version", "codec")}
            document |= {"token": now.token, "taken_ms": int(time.time() * 1000), "processes": [{"pid": pid, "name": "", "threads": threads, "descriptors": count} for pid, threads, count in answer["processes"]]}
            await asyncio.to_thread(state.from_guest, guest.folder / "work.ext4", self._path(key) / "back", document, self._path(key) / "state")
            now = await self._write(replace(now, step="passing", passed=now.passed + 1))
        except BaseException as error:
            await self._back(now, str(error))
            raise
        await self._leave(now)

    async def _leave(self, now: Workload) -> Workload:
        """From `passing` to the container, from the state that has passed: the guest is ended, the container brought back."""
        key, guest, net = now.order.key, self.guest(now.order.key), self._net(now)
        if now.to != self.workload(key).to:
            now = await self._write(now)
        ending = asyncio.ensure_future(guest.end())  # all in it stands still, or it never went: what is laid out beside waits for its end
        folder = next((path for path in (self._path(key) / "back", self._path(key) / "state") if _token(path) == now.token), None)
        try:
            if folder is None:
                raise Failed("convert", "the state that passed is not there", "look at the disk of the data folder")
            phase = await self._phase(key)
            own = self._driver.folder(key)
            passed = (read(own / "passage.json") or {}).get("token") != now.token
            if phase is not None and (passed or (phase is Phase.ENDED and not (own / "running.json").exists())):
                if passed and now.form == AS_CONTAINER:
                    link_output(own, guest.folder)
                await self._driver.delete(key)  # the container that passed into the guest, or one that could not be brought back and of which nothing ran
                phase = None
            if phase is None:
                await self._laid(now, folder)
            await ending
            self._step("ended")
            if phase is None or phase is Phase.PREPARED:
                await self._driver.begin_alone(key)
                self._step("went")
            if net is not None:
                with suppress(Failed):  # it runs all the same
                    net.release()
            self._step("plugged")
            if phase in (None, Phase.PREPARED, Phase.RUNNING):
                await self._checkpoints.lives(key)
        except DriverError as error:
            await asyncio.wait([ending])
            await self._write(replace(now, problem=f"{error}; it runs nowhere, its state is {folder}"))
            raise Failed("convert", f"{error}; it runs nowhere, its state is {folder}", "see the problem; resume tries it again") from None
        await asyncio.to_thread(shutil.rmtree, own / "restore", True)
        problem = now.problem
        now = await self._write(replace(now, form=AS_CONTAINER, step="", to=""))
        for name in ("dump", "back", "state", "guest"):
            await asyncio.to_thread(shutil.rmtree, self._path(key) / name, True)
        if problem:
            raise Failed("convert", f"{problem}; it is a container again", "see the problem")
        return now

    async def _back(self, now: Workload, problem: str) -> Workload:
        """Undo what has not passed: the old form goes on."""
        key, guest, net = now.order.key, self.guest(now.order.key), self._net(now)
        if now.to == AS_MICROVM:
            await guest.end()
            await dump_over(self._path(key) / "dump/criu.conf")
            if await self._phase(key) is Phase.PAUSED:
                await self._checkpoints.thawed(key)
        elif guest.lives:
            while (told := await guest.ask("state"))["state"] in ("dumping", "draining"):
                await asyncio.sleep(LOOK_S)
            if told["state"] == "dumped":
                if net is not None:
                    with suppress(Failed):  # it goes on all the same
                        await asyncio.to_thread(net.plug, GUEST)
                await guest.ask("resume")
        if net is not None:
            with suppress(Failed):
                net.release()
        for name in ("dump", ".state.new", ".back.new", "back"):
            await asyncio.to_thread(shutil.rmtree, self._path(key) / name, True)
        return await self._write(replace(now, step="", to="", problem=problem[:1000]))

    async def _ended(self, key: Key) -> None:
        """End a container that stands still: every process has its signal before any of them is let go."""
        if await self._phase(key) not in (Phase.RUNNING, Phase.PAUSED):
            return
        for pid in self._processes(key):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(Failed):  # it is gone already
            await self._driver.runtime(key, "resume")
        try:
            await asyncio.wait_for(self._driver.wait(key), LEFT_S)
            await asyncio.wait_for(unheld(self._driver.folder(key)), LEFT_S)
        except TimeoutError:
            raise Failed("convert", "its state has passed, and its container does not end though it was killed", "look at the node: a process that cannot be killed waits for its kernel or disk") from None

    # -- small things --------------------------------------------------------------------------------------------------------

    async def _write(self, now: Workload) -> Workload:
        await asyncio.to_thread(record.keep, self._path(now.order.key), now)
        self._step(now.step)
        return now

    async def _phase(self, key: Key) -> Phase | None:
        try:
            return (await self._driver.status(key)).phase
        except Refused:
            return None

    def _slot(self, key: Key) -> int:
        """A number that no other guest here has: it gives its QEMU a user of its own."""
        others = [read(self.guest(one.order.key).folder / "keeper.json") or {} for one in self.all() if one.order.key != key]
        taken = {told.get("uid", 0) - guests.USERS for told in others}
        return next(number for number in range(guests.MAX_GUESTS) if number not in taken)

    def _processes(self, key: Key) -> dict[int, Any]:
        try:
            return keeper_restore.processes(self._groups.processes(self._group(key)))
        except OSError:
            return {}

    @property
    def _checkpoints(self) -> Checkpoints:
        return self._driver.checkpoints()

    def _group(self, key: Key) -> str:
        return f"{cgroups.PARENT}/{self._driver.folder(key).name}"

    def _path(self, key: Key) -> Path:
        return self._folder / name_of(key.id, key.epoch)

    def guest(self, key: Key) -> Guest:
        """Of a workload, there or not."""
        return Guest(self._path(key) / "guest")

    def segment(self, key: Key) -> Segment:
        """The network of a workload, there or not."""
        return Segment(self._path(key) / "network")

    def _net(self, now: Workload) -> Segment | None:
        return self.segment(now.order.key) if "network" in now.order.spec else None

    def _one(self, key: Key) -> asyncio.Lock:
        return self._busy.setdefault(name_of(key.id, key.epoch), asyncio.Lock())


def _same(found: list[list[int]], those: Any) -> None:
    want = sorted((one["pid"], one["threads"], one["descriptors"]) for one in those)
    have = sorted(tuple(one) for one in found)
    if have != want:
        raise Failed("convert", f"what the guest has is not what was there: of (pid, threads, descriptors) it has {have[:20]} in place of {want[:20]}", "leave it a container")


def _inner(order: Order) -> Order:
    """As the driver of containers is told it: its network is not that driver's."""
    return replace(order, spec={name: value for name, value in order.spec.items() if name != "network"})


def _names(upper: Path, document: Mapping[str, Any], base: int) -> None:
    """Names for a container with a network, in its own root: they go with it."""
    folder = upper / "etc"
    folder.mkdir(mode=0o755)
    os.chown(folder, base, base)
    for name, text in (("resolv.conf", resolv_conf()), ("hosts", hosts(document["hostname"]))):
        (folder / name).write_text(text)
        os.chmod(folder / name, 0o644)
        os.chown(folder / name, base, base)


def _token(folder: Path) -> str:
    try:
        return str(read_manifest(folder).get("token"))
    except Refused:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
