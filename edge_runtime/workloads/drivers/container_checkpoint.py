"""Checkpoint and restore of containers: by the runtime and CRIU, into a folder as `checkpoint_state` has it.

A checkpoint freezes the container, has its state written and packed, gives the folder its name, and only then ends the container, or lets it go on. What is under way stands in
`FOLDER/checkpoint.json` of the instance; the rename of the state is what decides: before it the container goes on (`settle` of the next agent thaws it), after it the state is what counts.

A restore looks through all of the state before anything is laid out, lays an instance out as `prepare` does, and has its keeper bring it back (`keeper_restore`). Nothing of it runs before it
is written down that it does. Then it is looked at whether it lives: every process that was brought back has had the processor, and the first one has not died within `WINDOW_S`.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import struct
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from ..images import ImageError, Limits
from ..images.layer import unpack
from . import cgroups, keeper_restore, keeping
from .checkpoint_state import CHUNK, CONTAINER, DISK, IMAGES, SPARE, Reader, Writer, add, check, codec, free, seal, suits, to_be_filled, whole_at
from .container_runtime import COMMAND_S, LEFT_S
from .container_spec import ID_RANGE, own_folders
from .criu import Criu, errors, log_of, offence, write_options
from .face import Capabilities, Failed, Key, Phase, Refused, Status
from .instance import LOOK_S, NOTE, held, read, sync_folder
from .overlay_layer import pack_disk

if TYPE_CHECKING:
    from .container import ContainerDriver

STEPS = ("noted", "frozen", "dumped", "packed", "whole", "let go")
"""What `take` has reached, in order; `whole` decides."""

WINDOW_S = 0.5
"""A program that misses an instruction of its old processor is dead well within this: it goes on in the C library."""

MOVES_S = 20.0
"""A process that was let go and has not had the processor within this does not live; on a node that is that busy nothing else does."""

STRAY_S = 90.0
"""What an agent that was killed left of a runtime and CRIU has ended by then: longer than a command of the runtime may take."""

DEADLY = frozenset((signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGTRAP, signal.SIGFPE, signal.SIGSYS, signal.SIGABRT))
"""What a process dies by that finds another processor or memory than it left."""

SLOW_DISK = 20 << 20
"""Bytes in a second that a slow disk (an SD card) takes: the runtime gets as much more time for a state."""

BINDS = "/run/novacron/mounts"
"""Where a keeper mounts what a restored container has of the node's folders, before CRIU does; each keeper has its own there."""

_COMPARED = ("root", "process", "mounts")
"""Parts of a container's configuration that its processes rely on; they must be as they were. Limits and names of groups may differ."""

Step = Callable[[str], None]


def _ignored(_: str) -> None:
    """Nobody wants to hear of steps."""


class Checkpoints:
    """Takes and brings back; one for a driver.

    Args:
        groups: the host's control groups.
        limits: of the disk's layer.
    """

    def __init__(self, driver: "ContainerDriver", groups: cgroups.Groups, limits: Limits) -> None:
        self._driver, self._groups, self._limits = driver, groups, limits

    # -- out -----------------------------------------------------------------------------------------------------------------

    async def take(self, key: Key, folder: Path, criu: Criu, *, leave_running: bool, step: Step | None = None) -> dict[str, Any]:
        """Write the state of a running container to `folder`, which must be empty or not there; returns the manifest. It is ended then, or goes on; where this raises, it goes on."""
        step = step or _ignored
        await self._may_be_taken(key)
        folder, own = Path(os.path.abspath(folder)), self._driver.folder(key)
        to_be_filled(folder)
        used = max(0, self._groups.stats(self._group(key)).memory_bytes)
        for place in (own, folder.parent):
            if free(place) < used + SPARE:
                raise Refused("disk", f"its state may take {used} bytes, {free(place)} are free at {place}", "free space, or name another folder")
        note = {"folder": str(folder), "new": str(folder.with_name(f".{folder.name}.new")), "leave_running": leave_running, "token": uuid.uuid4().hex}
        keeping.write(str(own / NOTE), note)
        try:
            step("noted")
            manifest = await self._written(key, folder, criu, note, used, step)
        except BaseException:
            await self.settle(key)
            raise
        await self._let_go(key, note)
        step("let go")
        return manifest

    async def _may_be_taken(self, key: Key) -> dict[int, Any]:
        """Its processes, where nothing that can be seen from outside stands against taking its state; raises `Refused`. Changes nothing."""
        status, own = await self._driver.status(key), self._driver.folder(key)
        if status.phase is not Phase.RUNNING:
            raise Refused("id", f"it does not run ({status.phase.value})", "start it, or resume it, first")
        if not held(own):
            raise Refused("id", "its keeper was killed: what it writes has no reader that could be given back to it", "stop it, and start it anew")
        if (read(own / "keeper.json") or {}).get("network"):
            raise Refused("spec.network", "connections through the node's network, and ports that are published there, cannot be carried", "leave it out")
        those = self._processes(key)
        for one in those.values():
            if one.pop("stopped"):  # CRIU waits for it without an end
                raise Refused("resource.process", f"process {one['pid']} ({one['name']}) was stopped by a signal", "continue it (kill -CONT), or end it")
        return those

    async def offer(self, key: Key, criu: Criu) -> dict[str, Any]:
        """See `face.Migrates.migrate_out`."""
        those = await self._may_be_taken(key)  # whether they are one tree can only be seen while they stand still
        if (await self._driver.status(key)).leased:
            raise Refused("stop", "it runs only as long as its site says (when_cut_off: move)", "leave that to its site")
        instance = read(self._driver.folder(key) / "instance.json") or {}
        if folders := own_folders(instance.get("spec", {})):
            raise Refused("spec.mounts", f"what it has in {', '.join(folders)[:200]} is this node's, and would stay here", "say of the mount that it is shared, where it is the same folder on every node (a network file system), or let it begin anew")
        return {
            "host": self._host(criu), "image": str(instance.get("image", "")), "layers": instance.get("layers", []), "bytes": max(0, self._groups.stats(self._group(key)).memory_bytes), "processes": len(those),
        }

    def _host(self, criu: Criu) -> dict[str, Any]:
        here = self._here()
        return {"arch": here.arch, "kernel": here.kernel, "cpu_flags": list(here.cpu_flags), "cgroup": here.cgroup, "runtime": here.runtime, "criu": criu.version}

    async def _written(self, key: Key, folder: Path, criu: Criu, note: Mapping[str, Any], used: int, step: Step) -> dict[str, Any]:
        await self._driver.hold(key)
        if not self._groups.frozen(self._group(key)):
            raise Failed("checkpoint", "the runtime says that it paused it, and it runs on", "look at the node's freezer control group")
        step("frozen")
        those = self._processes(key)
        status = await self._driver.status(key)
        one_tree(status.pid, those)
        for one in those.values():
            one.pop("stopped")  # of a frozen one it says nothing
        raw = self._driver.folder(key) / "dump"
        await asyncio.to_thread(_emptied, raw)
        write_options(raw / "criu.conf", stopped=False)
        await self.root(key, writable=True)
        try:
            await self._driver.runtime(
                key, "checkpoint", "--leave-running", "--tcp-established", "--file-locks", "--image-path", str(raw / IMAGES), "--work-path", str(raw), environment=criu.environment(raw / "criu.conf"),
                seconds=COMMAND_S + used / SLOW_DISK,
            )
        except Failed as error:
            log = await asyncio.to_thread(log_of, raw / "dump.log")
            found = offence(log, {pid: f"{one['pid']}, {one['name']}" for pid, one in those.items()})
            raise found or Failed("checkpoint", f"{error.problem}; CRIU says: {' | '.join(errors(log)[:4])[:1000] or 'nothing'}", "see what it says; it goes on as before") from None
        await self.root(key, writable=False)
        step("dumped")
        document = self.described(key, criu, note, those)
        try:
            manifest = await asyncio.to_thread(self.packed, key, Path(note["new"]), raw, document)
        except OSError as error:
            raise Failed("disk", f"the state could not be written: {error.strerror}", "free space, or name another folder") from None
        step("packed")
        os.rename(note["new"], folder)
        sync_folder(folder.parent)
        step("whole")
        return manifest

    def described(self, key: Key, criu: Criu, note: Mapping[str, Any], those: Mapping[int, Any]) -> dict[str, Any]:
        """The manifest of a state that is being taken, without its files: `note` has its `token`, `those` are its processes."""
        own = self._driver.folder(key)
        instance, config, told = (read(own / name) or {} for name in ("instance.json", "config.json", "keeper.json"))
        config.pop("hooks", None)
        sources = {place: source for source, place in told.get("restore", {}).get("binds", ())}
        for mount in config.get("mounts", ()):
            mount["source"] = sources.get(mount["source"], mount["source"])
        return {
            "kind": CONTAINER, "token": note["token"], "taken_ms": int(time.time() * 1000),
            "host": self._host(criu),
            "order": {"id": key.id, "epoch": key.epoch, "image": instance.get("reference", ""), "requests": instance.get("requests", {}), "spec": instance.get("spec", {}), "job": instance.get("job", False)},
            "image": str(instance.get("image", "")), "layers": instance.get("layers", []), "config": config, "base": -1 if told.get("id_base") is None else int(told["id_base"]), "processes": list(those.values()),
        }

    def packed(self, key: Key, new: Path, raw: Path, document: dict[str, Any], sync: bool = True) -> dict[str, Any]:
        """Write the state into the folder `new`, from CRIU's images below `raw`, which go; the manifest. It is on the disk then, unless `sync` is false. Blocks."""
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        (new / IMAGES).mkdir(mode=0o700)
        how = codec()
        files = []
        for image in sorted(raw.joinpath(IMAGES).iterdir()):
            with open(image, "rb") as source:
                files.append(add(new, f"{IMAGES}/{image.name}", source, how, sync))
            image.unlink()  # what is packed needs its room twice no longer
        with Writer(new, DISK, how, sync) as target:
            pack_disk(self._driver.folder(key) / "disk/upper", cast(BinaryIO, target), document["base"] if document["base"] >= 0 else 0)
        return seal(new, document, [*files, target.entry], how, sync)

    async def _let_go(self, key: Key, note: Mapping[str, Any]) -> None:
        """What comes after the state is whole: it ends, or goes on."""
        own = self._driver.folder(key)
        if note["leave_running"]:
            await self.thawed(key)
            (own / NOTE).unlink()
        else:
            keeping.write(str(own / NOTE), {**note, "whole": True})  # from here on it is checkpointed, also when its state has another name, or is gone
            await self._killed(key)
        await asyncio.to_thread(shutil.rmtree, own / "dump", True)

    async def _killed(self, key: Key) -> None:
        """End all of it. Every process has its signal before any of them is let go: what is in the state shall not run here for one more instruction."""
        status = await self._driver.status(key)
        if status.phase not in (Phase.RUNNING, Phase.PAUSED):
            return
        for pid in self._processes(key):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if status.phase is Phase.PAUSED:
            with contextlib.suppress(Failed):  # it is gone already
                await self._driver.runtime(key, "resume")
        try:
            await asyncio.wait_for(self._driver.wait(key), LEFT_S)
        except TimeoutError:
            raise Failed("checkpoint", "its state is whole, and it does not end though it was killed", "look at the node: a process that cannot be killed waits for its kernel or disk") from None

    async def root(self, key: Key, *, writable: bool) -> None:
        """Make a root that shall be read-only writable while all stands still, and read-only again: CRIU has to make a folder in it for a moment when it is brought back."""
        status = await self._driver.status(key)
        if not (read(self._driver.folder(key) / "config.json") or {}).get("root", {}).get("readonly") or not status.pid:
            return
        process = await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", str(Path(keeper_restore.__file__)), "remount", str(status.pid), "rw" if writable else "ro", stderr=asyncio.subprocess.DEVNULL)
        if await process.wait() and (await self._driver.status(key)).phase in (Phase.RUNNING, Phase.PAUSED):
            raise Failed("checkpoint", f"its root could not be made {'writable' if writable else 'read-only again'}", "leave spec.read_only_root out" if writable else "stop it: it could write to its root")

    async def thawed(self, key: Key) -> None:
        """It goes on, with its root as it was."""
        await self.root(key, writable=False)
        if (await self._driver.status(key)).phase is Phase.PAUSED:
            await self._driver.runtime(key, "resume")

    async def settle(self, key: Key) -> None:
        """Bring to an end what was begun of a checkpoint and not ended: forwards where its state is whole, else back."""
        own = self._driver.folder(key)
        note = read(own / NOTE)
        if note is None:
            return
        await dump_over(own / "dump/criu.conf")
        if note.get("whole") or whole_at(Path(note["folder"]), note["token"]):
            await self._let_go(key, note)
            return
        await asyncio.to_thread(shutil.rmtree, note["new"], True)
        await asyncio.to_thread(shutil.rmtree, own / "dump", True)
        await self.thawed(key)
        (own / NOTE).unlink(missing_ok=True)

    # -- in ------------------------------------------------------------------------------------------------------------------

    async def look_through(self, folder: Path, criu: Criu, *, other_kernel: bool = False) -> dict[str, Any]:
        """The manifest, where the state is whole and can go on here; raises `Refused`. Changes nothing."""
        manifest = await asyncio.to_thread(check, folder)
        if manifest["kind"] != CONTAINER:
            raise Refused("checkpoint", f"is of a {str(manifest.get('kind'))[:40]}", "restore it by the driver of that kind")
        suits(manifest, self._here(), criu.version, other_kernel=other_kernel)
        size = sum(one["size"] for one in manifest["files"])
        if free(self._driver.scratch) < size + SPARE:
            raise Refused("disk", f"the state has {size} bytes, {free(self._driver.scratch)} are free", "free space, or restore it on another node")
        return manifest

    def fill(self, folder: Path, manifest: Mapping[str, Any], criu: Criu, final: Path, laid: Path, document: dict[str, Any], told: dict[str, Any]) -> None:
        """Put a state into an instance that is being laid out; blocks.

        Args:
            final, laid: the instance's folder as it will be called, and as it is now.
            document, told: its `config.json` and `keeper.json`, not written yet.
        """
        base = -1 if told["id_base"] is None else int(told["id_base"])
        if (base < 0) != (manifest["base"] < 0):
            raise Refused("host.user-namespace", "it was taken with a user namespace, and here is none, or the other way round", "restore it on a node that is as the one where it was taken")
        _as_before(document, manifest["config"])
        document["hostname"] = manifest["config"].get("hostname", document["hostname"])
        restore = laid / "restore"
        (restore / IMAGES).mkdir(parents=True)
        for one in manifest["files"]:
            with Reader(folder, one, manifest["codec"]) as source:
                if one["name"] == DISK:
                    _unpack_disk(source, laid / "disk/upper", base, self._limits)
                    continue
                with open(restore / one["name"], "xb") as target:
                    while data := source.read(CHUNK):
                        target.write(data)
        if base >= 0:
            for image in restore.joinpath(IMAGES).glob("userns-*.img"):
                image.write_bytes(user_namespace(image.read_bytes(), base))
        group = f"{cgroups.PARENT}/{final.name}"
        write_options(restore / "criu.conf", stopped=True, group=group if self._groups.layout == "v2" else "")
        document["hooks"] = {"createRuntime": [{"path": sys.executable, "args": [sys.executable, "-I", "-S", str(Path(keeper_restore.__file__)), "loopback"]}]}
        binds = []
        for at, mount in enumerate(document["mounts"]):
            if mount["type"] == "bind":
                place = f"{BINDS}/{'folder' if os.path.isdir(mount['source']) else 'file'}-{at}"
                binds.append([mount["source"], place])
                mount["source"] = place
        told["restore"] = {
            "binds": binds,
            "images": str(final / "restore" / IMAGES), "work": str(final / "restore"), "config": str(final / "restore/criu.conf"), "criu": criu.folder, "group": self._groups.processes(group), "processes": manifest["processes"],
            "read_only": bool(document["root"]["readonly"]), "more_s": sum(one["size"] for one in manifest["files"]) / SLOW_DISK,
        }

    async def clear(self, key: Key) -> None:
        """Remove what a keeper that was killed left of a restore of which nothing has run. The runtime makes the control groups before it writes down that there is a container: it would not take them away."""
        options = self._driver.folder(key) / "restore/criu.conf"
        end = time.monotonic() + STRAY_S
        while pids := [*strays(options), *self._processes(key)]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > end:
                raise Failed("restore", "what an earlier try left does not end though it was killed", "look at the node: a process waits for its kernel or disk")
            await asyncio.sleep(LOOK_S)
        while not self._groups.remove(self._group(key)) and time.monotonic() < end:  # one whose last process has just been killed is busy for a moment
            await asyncio.sleep(LOOK_S)

    def let_go(self, key: Key) -> None:
        """Do what a keeper has not done that was killed after it had written down that the container runs: nobody else will."""
        own = self._driver.folder(key)
        if (own / "restore").exists() and (own / "running.json").exists() and not held(own):
            for pid, one in self._processes(key).items():
                if one["stopped"]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)

    async def lives(self, key: Key, window_s: float | None = None) -> Status:
        """How it is after it was let go; raises `Failed` where it does not live."""
        running = read(self._driver.folder(key) / "running.json") or {}
        end = time.monotonic() + MOVES_S
        still = {int(pid): int(count) for pid, count in running.get("switches", {}).items()}
        ending = asyncio.ensure_future(self._driver.wait(key))
        try:
            began = time.monotonic()
            while still and not ending.done():
                self.let_go(key)
                still = {pid: count for pid, count in still.items() if _switches(pid, count) == count}
                if still and time.monotonic() > end:
                    raise Failed("restore", f"{len(still)} of its processes have not had the processor within {MOVES_S:g} s after they were let go", "look at the node")
                if still:
                    await asyncio.sleep(LOOK_S)
            await asyncio.wait([ending], timeout=max(0.0, began + (WINDOW_S if window_s is None else window_s) - time.monotonic()))
            if not ending.done():
                return await self._driver.status(key)
            status = ending.result()
        finally:
            ending.cancel()
        if status.exit is None or status.exit.signal in DEADLY or status.exit.code - 128 in DEADLY or status.exit.out_of_memory:
            raise Failed("restore", f"it died after it was brought back: {status.reason or status.phase.value}", "restore it on a node with the processor, kernel and memory that it had")
        return status

    # -- both ----------------------------------------------------------------------------------------------------------------

    def _here(self) -> Capabilities:
        assert self._driver.capabilities is not None  # nothing comes here before the probe
        return self._driver.capabilities

    def _group(self, key: Key) -> str:
        return f"{cgroups.PARENT}/{self._driver.folder(key).name}"

    def _processes(self, key: Key) -> dict[int, Any]:
        try:
            return keeper_restore.processes(self._groups.processes(self._group(key)))
        except OSError:
            return {}


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / IMAGES).mkdir(parents=True, mode=0o700)


def one_tree(first: int, those: Mapping[int, Any]) -> None:
    """Refuses where a process is in the container and does not descend from its first one: such a one (of `exec`) would not be in the state. One of `those` that has ended since has no parent, and is in nobody's way."""
    for pid, one in those.items():
        if pid != first and (above := keeper_restore.parent(pid)) and above not in those:
            raise Refused("resource.process", f"process {one['pid']} ({one['name']}) was put into the container from outside, by exec", "wait until that command has ended")


def _switches(pid: int, otherwise: int) -> int:
    """Of one that is gone: another number than `otherwise`."""
    try:
        return keeper_restore.switches(pid)
    except (OSError, KeyError):
        return otherwise + 1


def strays(options: Path) -> list[int]:
    """Runtimes and CRIUs that work by this file of options."""
    want, found = b"CRIU_CONFIG_FILE=" + os.fsencode(options) + b"\0", []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/environ", "rb") as handle:
                    if want in handle.read(1 << 18):
                        found.append(int(name))
            except OSError:
                continue
    return found


async def dump_over(options: Path) -> None:
    """Until a dump that lost its agent has ended: CRIU lets the processes go by itself then. It is not killed: it may have code of its own in them."""
    end = time.monotonic() + STRAY_S
    while strays(options):
        if time.monotonic() > end:
            raise Failed("checkpoint", "a dump that an earlier agent began does not end", "look at the node: CRIU waits for its kernel or disk")
        await asyncio.sleep(LOOK_S)


def _as_before(document: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    for part in _COMPARED:
        if document.get(part) != before.get(part):
            field = part
            if isinstance(document.get(part), dict) and isinstance(before.get(part), dict):
                field = next((f"{part}.{name}" for name in sorted(document[part]) if document[part].get(name) != before[part].get(name)), part)
            raise Refused("spec", f"is not the one that the checkpoint was taken of: {field} of the container differs", "restore it with the image and the spec that stand in the checkpoint's manifest (`order`)")


# -- the disk ----------------------------------------------------------------------------------------------------------------


def _unpack_disk(source: Reader, upper: Path, base: int, limits: Limits) -> None:
    class _Hashed:
        """A layer's reader wants its hash; the state's has been looked at already."""

        def read(self, most: int = CHUNK) -> bytes:
            return source.read(most)

    try:
        unpack(cast(BinaryIO, _Hashed()), upper, None, limits)
    except ImageError as error:
        raise Refused("checkpoint", f"{DISK}: {error.problem}", "take the checkpoint, or copy it, again") from None
    if base > 0:
        for top, folders, files in os.walk(upper):
            for name in (*folders, *files):
                path = os.path.join(top, name)
                told = os.lstat(path)
                if told.st_nlink == 1 or stat.S_ISDIR(told.st_mode) or told.st_uid < ID_RANGE:  # the second name of a file finds it done
                    os.lchown(path, told.st_uid + base, told.st_gid + base)
        told = os.lstat(upper)
        os.chown(upper, told.st_uid + base, told.st_gid + base)


# -- CRIU's image of a user namespace ----------------------------------------------------------------------------------------


def user_namespace(image: bytes, base: int) -> bytes:
    """The image `userns-N.img` with another range on the host: ids are in the other images as the container sees them, so that nothing else changes.

    The format: two magic numbers, the length, and a message that has two lists (ids of users, of groups) of three numbers: first inside, first outside, how many.
    """
    extent = b"".join(bytes((number << 3,)) + _varint(value) for number, value in ((1, 0), (2, base), (3, ID_RANGE)))
    message = b"".join(bytes((number << 3 | 2,)) + _varint(len(extent)) + extent for number in (1, 2))
    return image[:8] + struct.pack("<I", len(message)) + message


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))
