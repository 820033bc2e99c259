"""Checkpoint and restore of virtual machines, into a folder as `checkpoint_state` has it; so a move with its state too.

    images/state            what QEMU writes of a machine that stands still: its memory and its devices
    images/disk.qcow2       what it has written, over the disk of its image, which must be there where it goes on
    images/template.qcow2   of a copy of a template: the layer between the two
    images/seed.img         its second disk, which is the one that it has mounted; of UEFI, images/variables.fd too
    images/rest.qcow2       in place of the disk, where a copy of that went ahead (`ahead`) and it was told so: what was written since. Where it was taken the disk itself lies beside the state (kept.qcow2, the same
                            file as the instance's), where it came to the copy does (ahead.qcow2)

A checkpoint stops the machine, has QEMU write it into a pipe that is packed meanwhile, packs the disk, gives the folder its name, and only then ends the machine, or lets it go on. What is under way stands in
`FOLDER/checkpoint.json` of the instance, as for containers (`container_checkpoint`), and the rename decides as it does there. What is there of a machine after it stopped is QEMU's alone until then: it goes on by one word.

A restore looks through all of the state, lays an instance out as `prepare` does but with these disks, and has its keeper load the rest. Nothing has run there before `running.json` is written.
Of a disk that went ahead it lays out both layers; the keeper has QEMU, which has no rights, write the upper one into the lower one before the guest goes on (`vm_keeper.fold`). A copy that came is used up by that:
it is the instance's disk then. Where the machine was taken, its disk is copied, and what it was taken to is as it was.
"""

import asyncio
import logging
import os
import platform
import re
import select
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...contract.workloads import AHEAD
from . import cgroups, keeping, vm_files, vm_qcow2
from .checkpoint_state import AHEAD_DISK, CHUNK, IMAGES, KEPT_DISK, MEMORY, REST, SPARE, VM, WENT_AHEAD, Reader, Writer, add, check, codec, free, seal, to_be_filled, whole_at
from .face import Ability, DriverError, Failed, Key, Phase, Refused, Status
from .instance import NOTE, UPPER, read, sync_folder
from .vm_spec import RECONNECT

if TYPE_CHECKING:
    from .vm import VmDriver

Json = dict[str, Any]

STEPS = ("noted", "frozen", "dumped", "packed", "whole", "let go")
"""What `take` has reached, in order; `whole` decides."""

MACHINE = "disk.qcow2"
"""In an instance's folder: what it has written, over the disk of its image."""

DISKS = (MACHINE, "seed.img", "template.qcow2", "variables.fd")
"""Files of an instance that are its disks; the last two only some have."""

SINCE = "since.qcow2"
"""In an instance's folder: what was written to its disk since a copy of it went ahead, while it is being packed."""

AHEAD_LEAST = 64 << 20
"""Bytes of a disk below which no copy goes ahead: packing and carrying them takes a second, going ahead some seconds in which nobody waits."""

PIPE = "saved"
"""In an instance's folder: the pipe by which QEMU's state comes."""

RESTORE = "restore"
"""In an instance's folder: what its keeper loads."""

STATE = "state"
"""In that folder: memory and devices, as QEMU wrote them."""

WINDOW_S = 0.5
"""A QEMU that cannot go on with what it was given has ended well within this."""

SLOW_DISK = 20 << 20
"""Bytes in a second that a slow disk (an SD card) takes: so long QEMU may take to save or load a machine."""

LEAST_S = 60.0
"""For what is not bytes."""

AHEAD_S = 3_600.0
"""A copy of a disk that goes ahead and takes longer hangs; nobody waits for it, so that it may take its time on a slow disk."""

log = logging.getLogger(__name__)

Step = Callable[[str], None]


def _ignored(_: str) -> None:
    """Nobody wants to hear of steps."""


class Checkpoints:
    """Takes and brings back; one for a driver."""

    def __init__(self, driver: "VmDriver", groups: cgroups.Groups) -> None:
        self._driver, self._groups = driver, groups

    # -- out -----------------------------------------------------------------------------------------------------------------

    async def take(self, key: Key, folder: Path, *, leave_running: bool, step: Step = _ignored, since: str = "") -> Json:
        """Write the state of a running machine to `folder`, which must be empty or not there; returns the manifest. It is ended then, or goes on; where this raises, it goes on.

        Args:
            since: the name under which a copy of its disk went ahead: what was written since is enough, where its keeper knows that still, and it ends.
        """
        host = await self._may_be_taken(key)
        folder, own = Path(os.path.abspath(folder)), self._driver.folder(key)
        to_be_filled(folder)
        if free(folder.parent) < (most := self._bytes(key, disk=leave_running or not since)) + SPARE:
            raise Refused("disk", f"its state may take {most} bytes, {free(folder.parent)} are free at {folder.parent}", "free space, or name another folder")
        note = {"folder": str(folder), "new": str(folder.with_name(f".{folder.name}.new")), "leave_running": leave_running, "token": uuid.uuid4().hex}
        keeping.write(str(own / NOTE), note)
        try:
            step("noted")
            manifest = await self._written(key, folder, host, note, step, "" if leave_running else since)
        except BaseException:
            await self.settle(key)
            raise
        await self._let_go(key, note)
        step("let go")
        return manifest

    async def offer(self, key: Key) -> Json:
        """See `face.Migrates.migrate_out`."""
        host = await self._may_be_taken(key)
        if (await self._driver.status(key)).leased:
            raise Refused("stop", "it runs only as long as its site says (when_cut_off: move)", "leave that to its site")
        own = self._driver.folder(key)
        instance, told = read(own / "instance.json") or {}, read(own / "keeper.json") or {}
        return {"host": host, "image": str(instance.get("image", "")), "layers": instance.get("layers", []), "bytes": self._bytes(key), "machine": told["machine"], AHEAD: self._worth(own / MACHINE), **await self._live(own, told)}

    async def _live(self, own: Path, told: Mapping[str, Any]) -> Json:
        """What a target that takes it in while it runs has to know; nothing where it cannot leave so."""
        capabilities = self._driver.capabilities
        if capabilities is None or not capabilities.can(Ability.LIVE):
            return {}
        from .vm_live import offered

        return await asyncio.to_thread(offered, own, told)

    @staticmethod
    def _worth(disk: Path) -> int:
        """Bytes of a disk of which a copy may go ahead; 0 where that is not worth it."""
        size = os.stat(disk).st_blocks * 512
        return size if size >= AHEAD_LEAST else 0

    async def ahead(self, key: Key, name: str, target: Path, speed: int) -> Json:
        """See `face.GoesAhead`."""
        size = int((read(self._driver.folder(key) / "instance.json") or {})["bytes"])
        await asyncio.to_thread(vm_files.lay, target, size)
        try:
            await self._driver.ask(key, {"do": "ahead", "path": str(target), "name": name, "speed": speed}, AHEAD_S + (self._bytes(key) / speed if speed else 0))
            return {"bytes": await asyncio.to_thread(vm_files.settle, target)}
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    async def _since(self, key: Key, name: str, new: Path) -> bool:
        """Have QEMU write what was written to its disk since a copy of it went ahead; whether it could. Then the disk lies beside the state."""
        own = self._driver.folder(key)
        (own / SINCE).unlink(missing_ok=True)
        try:
            await asyncio.to_thread(vm_files.lay, own / SINCE, int((read(own / "instance.json") or {})["bytes"]))
            await self._driver.ask(key, {"do": "since", "path": str(own / SINCE), "name": name}, AHEAD_S)
            os.link(own / MACHINE, new / KEPT_DISK)
        except (Failed, OSError) as error:  # its QEMU is another one than it was, or the folder is on another file system: all of it goes
            log.warning("what %s wrote since a copy of its disk went ahead cannot be had, so all of it is carried: %s", own.name, error)
            (own / SINCE).unlink(missing_ok=True)
            return False
        return True

    async def _may_be_taken(self, key: Key) -> Json:
        """What it runs on, where nothing that can be seen from outside stands against taking its state; raises `Refused`. Changes nothing."""
        status, told = await self._driver.status(key), read(self._driver.folder(key) / "keeper.json") or {}
        if status.phase is not Phase.RUNNING:
            raise Refused("id", f"it does not run ({status.phase.value})", "start it, or resume it, first")
        if told.get("network") and (self._driver.spec(key).get("when_moved") != RECONNECT):
            raise Refused("spec.network", "connections through the node's network cannot be carried", f"say spec.when_moved: {RECONNECT} where it connects anew, or let it begin anew")
        try:
            version = str((await self._driver.ask(key, {"do": "version"}))["version"])
            machine = told["machine"]
        except (Failed, KeyError):
            raise Refused("id", "its keeper is of an agent that took no states of virtual machines, or does not answer", "stop it, and start it anew") from None
        return host(version, machine["accelerator"])

    def _bytes(self, key: Key, *, disk: bool = True) -> int:
        """That its state may take, at most; without `disk` all but its own disk."""
        own = self._driver.folder(key)
        return max(0, self._groups.stats(f"{cgroups.PARENT}/{own.name}").memory_bytes) + sum(os.stat(own / name).st_blocks * 512 for name in DISKS if (disk or name != MACHINE) and (own / name).exists())

    async def _written(self, key: Key, folder: Path, host: Json, note: Mapping[str, Any], step: Step, since: str) -> Json:
        new, described = Path(note["new"]), self._described(key, host, note)
        await self._driver.ask(key, {"do": "pause"})
        step("frozen")
        try:
            shutil.rmtree(new, ignore_errors=True)
            (new / IMAGES).mkdir(parents=True, mode=0o700)
            new.chmod(0o700)
            if since and await self._since(key, since, new):  # before QEMU hands the disks over
                described[WENT_AHEAD] = since
            saved = await self._saved(key, new)
            step("dumped")
            manifest = await asyncio.to_thread(self._packed, key, new, described, saved)
        except OSError as error:
            raise Failed("disk", f"the state could not be written: {error.strerror}", "free space, or name another folder") from None
        step("packed")
        os.rename(note["new"], folder)
        sync_folder(folder.parent)
        step("whole")
        return manifest

    async def _saved(self, key: Key, new: Path) -> Json:
        """Have QEMU write memory and devices; the line of the file in the manifest."""
        pipe = self._driver.folder(key) / PIPE
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe, 0o600)
        stop, end = os.pipe()
        source = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        packing = asyncio.ensure_future(asyncio.to_thread(_pumped, source, stop, new))
        try:
            await self._driver.ask(key, {"do": "save", "path": str(pipe)}, LEAST_S + self._bytes(key) / SLOW_DISK)
            return await packing
        except Failed:
            if packing.done() and (why := packing.exception()) is not None:  # nobody read what QEMU wrote
                raise why from None
            raise
        finally:
            os.close(end)  # where it is not through yet, it ends
            await asyncio.gather(packing, return_exceptions=True)
            os.close(stop)
            pipe.unlink(missing_ok=True)

    def _described(self, key: Key, host: Json, note: Mapping[str, Any]) -> Json:
        own = self._driver.folder(key)
        instance, told = read(own / "instance.json") or {}, read(own / "keeper.json") or {}
        return {
            "kind": VM, "token": note["token"], "taken_ms": int(time.time() * 1000), "host": host, "machine": told["machine"], "image": str(instance.get("image", "")), "layers": instance.get("layers", []),
            "order": {"id": key.id, "epoch": key.epoch, "image": instance.get("reference", ""), "requests": instance.get("requests", {}), "spec": instance.get("spec", {}), "job": False},
        }

    def _packed(self, key: Key, new: Path, document: Json, saved: Json) -> Json:
        """All but memory and devices, and the manifest; it is on the disk then. Blocks."""
        files, how, own = [saved], codec(), self._driver.folder(key)
        places = {f"{IMAGES}/{name}": own / name for name in DISKS}
        if WENT_AHEAD in document:
            del places[f"{IMAGES}/{MACHINE}"]
            places[REST] = own / SINCE
        for name, path in places.items():
            if path.exists():
                with open(path, "rb") as source:
                    files.append(add(new, name, source, how))
        (own / SINCE).unlink(missing_ok=True)
        return seal(new, document, files, how)

    async def _let_go(self, key: Key, note: Mapping[str, Any]) -> None:
        """What comes after the state is whole: it ends, or goes on."""
        own = self._driver.folder(key)
        if note["leave_running"]:
            await self._goes_on(key)
            (own / NOTE).unlink()
        else:
            keeping.write(str(own / NOTE), {**note, "whole": True})  # from here on it is checkpointed, however it ends
            if (await self._driver.status(key)).phase in (Phase.RUNNING, Phase.PAUSED):
                await self._driver.kill(key)

    async def _goes_on(self, key: Key) -> None:
        """Also where it seems to run: its keeper, which does one thing after the other, may have yet to come to the word by which it stands still."""
        if (await self._driver.status(key)).phase in (Phase.RUNNING, Phase.PAUSED):
            await self._driver.ask(key, {"do": "resume"})

    async def settle(self, key: Key) -> None:
        """Bring to an end what was begun of a checkpoint and not ended: forwards where its state is whole, else back."""
        own = self._driver.folder(key)
        note = read(own / NOTE)
        if note is None or note.get("whole"):
            if note is not None and (await self._driver.status(key)).phase in (Phase.RUNNING, Phase.PAUSED):
                await self._driver.kill(key)
            return
        if whole_at(Path(note["folder"]), note["token"]):
            await self._let_go(key, note)
            return
        await asyncio.to_thread(shutil.rmtree, note["new"], True)
        (own / SINCE).unlink(missing_ok=True)
        await self._goes_on(key)
        (own / NOTE).unlink(missing_ok=True)

    # -- in ------------------------------------------------------------------------------------------------------------------

    async def look_through(self, folder: Path, here: Json) -> Json:
        """The manifest, where the state is whole and can go on here; raises `Refused`. Changes nothing."""
        manifest = await asyncio.to_thread(check, folder)
        if manifest["kind"] != VM:
            raise Refused("checkpoint", f"is of a {str(manifest.get('kind'))[:40]}", "restore it by the driver of that kind")
        suits(manifest["host"], here)
        return manifest

    def fill(self, folder: Path, manifest: Mapping[str, Any], laid: Path, machine: Json) -> None:
        """Put a state into the instance's folder that is being laid out; blocks. Raises `Refused` where this machine is not the one that was taken."""
        same_machine(manifest["machine"], machine)
        kept, ahead = folder / KEPT_DISK, folder / AHEAD_DISK
        files = [one for one in manifest["files"] if not (WENT_AHEAD in manifest and kept.exists() and one["name"] == REST)]  # it is in that disk
        size = sum(one["size"] for one in files) + (kept.stat().st_size if WENT_AHEAD in manifest and kept.exists() else 0)
        if free(laid) < size + SPARE:
            raise Refused("disk", f"the state has {size} bytes, {free(laid)} are free", "free space, or restore it on another node")
        (laid / RESTORE).mkdir(mode=0o700)
        places = {MEMORY: laid / RESTORE / STATE, **{f"{IMAGES}/{name}": laid / name for name in DISKS}}
        if WENT_AHEAD in manifest:
            del places[f"{IMAGES}/{MACHINE}"]
            places[REST] = laid / UPPER
            if kept.exists():
                shutil.copyfile(kept, laid / MACHINE)
                (laid / MACHINE).chmod(0o600)
            elif ahead.exists():
                os.link(ahead, laid / MACHINE)
            else:
                raise Refused("checkpoint", f"stands on the copy of its disk that went ahead as {manifest[WENT_AHEAD][:80]}, which is not here (any more)", "restore it where it was taken, or move it again")
        for one in files:
            if one["name"] not in places:
                raise Refused("checkpoint", f"has {one['name'][:80]}, which is nothing of a virtual machine", "take the checkpoint, or copy it, again")
            descriptor = os.open(places[one["name"]], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with Reader(folder, one, manifest["codec"]) as source, open(descriptor, "wb") as target:
                while data := source.read(CHUNK):
                    target.write(data)
        for name in (MACHINE, UPPER, "template.qcow2"):
            if (laid / name).exists():
                _same_size(laid / name, machine["disk_bytes"])

    def used(self, folder: Path) -> None:
        """The copy of a disk that came with a state is an instance's now: from here on it is written to, and no restore may begin with it again. Blocks."""
        (folder / AHEAD_DISK).unlink(missing_ok=True)

    async def lives(self, key: Key) -> Status:
        """How it is a moment after it was let go; raises `Failed` where it does not live."""
        try:
            status = await asyncio.wait_for(self._driver.wait(key), WINDOW_S)
        except TimeoutError:
            return await self._driver.status(key)
        except DriverError as error:
            raise Failed("restore", str(error), "see why") from None
        if status.exit is None or status.exit.code or status.exit.signal:
            raise Failed("restore", f"it ended after it was brought back: {status.reason or status.phase.value}", "restore it on a node with the QEMU, processor and memory that it had")
        return status


# -- what fits ---------------------------------------------------------------------------------------------------------------


def host(version: str, accelerator: str) -> Json:
    """What a machine runs on. Of an emulated processor QEMU's version says what it has; with KVM it is the node's own."""
    model, flags = _processor() if accelerator == "kvm" else ("", [])
    return {"arch": platform.machine(), "qemu": version, "accelerator": accelerator, "cpu_model": model, "cpu_flags": flags}


def suits(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Whether what was taken of a machine on its host can go on on this one; raises `Refused` with what stands against it. Both as `host` has it. Pure.

    A version of QEMU has a machine type (q35 of that version), and keeps to it in its bug-fix releases; the devices of another one are others.
    """
    if there.get("arch") != here["arch"]:
        raise Refused("host.arch", f"it was taken on {str(there.get('arch'))[:40]}, this is {here['arch']}", "restore it on a node of the same architecture")
    if there.get("accelerator") != here["accelerator"]:
        raise Refused("host.accelerator", f"it ran by {str(there.get('accelerator'))[:40]}, this node has {here['accelerator']}", "restore it on a node with the same accelerator")
    if not (was := _numbers(there.get("qemu"))) or was != _numbers(here["qemu"]):
        raise Refused("host.qemu", f"it ran by QEMU {str(there.get('qemu'))[:40]}, this node has {here['qemu']}, whose machine is another one", "restore it on a node with that version of QEMU, or let it begin anew")
    flags = there.get("cpu_flags")
    if there.get("cpu_model") != here["cpu_model"] or not isinstance(flags, list) or sorted(map(str, flags)) != sorted(here["cpu_flags"]):
        raise Refused("host.cpu", f"it ran on a {str(there.get('cpu_model'))[:80]}, this is a {here['cpu_model']}", "restore it on a node with the same processor: KVM gives it to the guest as it is")


def same_machine(was: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Whether a machine is laid out as it was; raises `Refused` with what differs. Pure."""
    if odd := next((name for name in sorted({*was, *here}) if was.get(name) != here.get(name)), None):
        raise Refused("machine", f"its {odd[:40]} was {str(was.get(odd))[:80]}, and is {str(here.get(odd))[:80]} here", "restore it with the image and the spec that stand in the checkpoint's manifest (`order`)")


def _numbers(version: Any) -> tuple[int, ...]:
    found = re.match(r"(\d{1,4})\.(\d{1,4})(\.|\Z)", version) if isinstance(version, str) else None
    return (int(found[1]), int(found[2])) if found else ()


def _processor() -> tuple[str, list[str]]:
    """This node's: its name, and what it can do, as Linux says it of the first one."""
    told: dict[str, str] = {}
    with open("/proc/cpuinfo") as handle:
        for line in handle:
            name, _, value = line.partition(":")
            if not name.strip():
                break
            told[name.strip()] = value.strip()
    return told.get("model name", ""), sorted(told.get("flags", "").split())


def _same_size(path: Path, size: int) -> None:
    """A disk that came names no file of this node, and has the size that it had. Raises `Refused`."""
    with open(path, "rb") as handle:
        head, length = handle.read(vm_qcow2.LOOK), os.fstat(handle.fileno()).st_size
    try:
        found = vm_qcow2.check(head, length).bytes
    except vm_qcow2.BadDisk as error:
        raise Refused("checkpoint", f"{path.name} is not taken: {error}", "take the checkpoint again") from None
    if found != size:
        raise Refused("checkpoint", f"{path.name} has {found} bytes, and the machine's disk {size}", "take the checkpoint again")


def _pumped(source: int, stop: int, new: Path) -> Json:
    """Pack what comes through a pipe until its other end is closed; its line in the manifest. `stop`: a descriptor that becomes readable where nobody wants it any more. Closes `source`. Blocks."""
    with open(source, "rb", buffering=0) as pipe, Writer(new, MEMORY, codec()) as target:
        while True:
            # Where nobody has opened the other end yet, nothing is readable. Linux tells that apart from an end.
            if stop in select.select([source, stop], [], [])[0]:
                raise OSError(0, "QEMU did not write it")
            data = pipe.read(CHUNK)
            if data:
                target.write(data)
            elif data == b"":
                break
    return target.entry
