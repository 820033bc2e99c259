"""Containers, by an OCI runtime (runc, or crun where it passes the probe) that is run directly; each is watched over by a keeper of its own (`keeper`), which outlives the agent.

    <dir>/containers/<name>/     one instance: instance.json, config.json, keeper.json, disk/ (what it changed), and what its keeper writes
    <dir>/containers/.new/       what is being laid out or removed; emptied at start
    <dir>/runtime/               the runtime's own state

What is on the disk is the truth: who holds an instance's lock lives, and what is written down has happened. So an agent that comes after a killed one knows as much as that one did.
"""

import asyncio
import logging
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...system.disk_pace import Pace, remove
from ..images import Config, Image, ImageError, ImageStore
from . import cgroups, lease
from .container_disk import NOTE as OVER
from .container_disk import DiskLimits, disk_limit, reason
from .container_laying import Fill, Ground, Settings, Ways, lay_out
from .container_runtime import COMMAND_S, LEFT_S, SAID, beside, command, run
from .face import Ability, Capabilities, Failed, Key, Order, Output, Phase, Ran, Refused, Stats, Status
from .instance import LOOK_S, NOTE, SNAPSHOT, alive, ended, held, known, link_output, over, present, read, tail, unheld
from .keepers import Keepers

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from .container_checkpoint import Checkpoints
    from .container_disk import Over
    from .criu import Criu

T = TypeVar("T")

START_S = 150.0
"""A keeper that has said nothing by then hangs: it gives each of two commands of the runtime a minute."""

FREEZES = 5
"""Tries to make a container stand still: one that starts processes without end gets away from runc's own tries on a busy node (control groups of version 1)."""


class ContainerDriver:
    """The driver of containers; see `face.Driver`. Needs root.

    Args:
        directory: its own, in the agent's data folder; absolute.
        store: where the images are.
    """

    parent = cgroups.PARENT
    """The control group above all of its containers."""

    def __init__(self, directory: Path, store: ImageStore, settings: Settings = Settings()) -> None:
        self._folder, self._store, self._settings = directory / "containers", store, settings
        self._new, self._state = self._folder / ".new", directory / "runtime"
        self._groups = cgroups.read()
        self._capabilities: Capabilities | None = None
        self._ways: Ways | None = None
        self._criu: Criu | None = None
        self._checkpoints: Checkpoints | None = None
        self._disks = DiskLimits(self, self._groups)
        self._keepers = Keepers(self._groups)
        self._busy: dict[str, asyncio.Lock] = {}
        self._laying = asyncio.Lock()
        for folder in (directory, self._folder, self._new, self._state):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leaving in self._new.iterdir():
            shutil.rmtree(leaving, ignore_errors=True)

    def close(self) -> None:
        """What runs goes on."""
        self._keepers.close()

    @property
    def capabilities(self) -> Capabilities | None:
        """What the last probe said; set by it as far as it has come."""
        return self._capabilities

    @capabilities.setter
    def capabilities(self, told: Capabilities) -> None:
        self._capabilities = told

    def demand(self, ability: Ability) -> None:
        if self._capabilities is not None:
            self._capabilities.demand(ability)

    @property
    def scratch(self) -> Path:
        """A folder for what is needed for a moment; emptied at start."""
        return self._new

    def folder(self, key: Key) -> Path:
        """An instance's folder, there or not."""
        return self._path(key)

    def group(self, key: Key) -> str:
        """Its control group, in every hierarchy."""
        return f"{self.parent}/{_name(key)}"

    # -- what can be done ----------------------------------------------------------------------------------------------------

    async def probe(self) -> Capabilities:
        """Run a container, with everything that can be had, and say what worked."""
        from .container_probe import find  # needs this module

        self._ways, self._criu, self._capabilities = await find(self, self._settings, self._groups)
        await self._settle()
        return self._capabilities

    async def same_as(self, other: "ContainerDriver") -> None:
        """What another driver of this node has found by its probe holds for this one too."""
        self._ways, self._criu, self._capabilities = other._ways, other._criu, other._capabilities
        await self._settle()

    async def _settle(self) -> None:
        """Bring to an end what an agent was killed at."""
        for name, entry in (await asyncio.to_thread(self._present)).items():
            key = Key(entry["id"], entry["epoch"])
            if (self._folder / name / "restore").exists():  # an agent was killed while it brought this one back, and perhaps its keeper
                self.checkpoints().let_go(key)
            if (self._folder / name / SNAPSHOT).exists():  # an agent was killed while this one stood still
                await self._go_on(key)
            if (self._folder / name / NOTE).exists():  # an agent was killed while it took this one's state
                try:
                    async with self._one(key):
                        await self.checkpoints().settle(key)
                except Failed as error:
                    log.error("the checkpoint of %s that was under way could not be brought to an end: %s", name, error)

    async def _go_on(self, key: Key) -> None:
        """Have one go on that stands still for its snapshot."""
        from .container_snapshot import let_go

        try:
            await let_go(self, key)
        except (Failed, Refused) as error:
            log.error("%s stands still for a snapshot that is over, and cannot be let go on: %s", _name(key), error)

    @property
    def criu(self) -> "Criu":
        """The one that passed the probe. Raises `Refused` where none did."""
        if self._criu is None:
            self.demand(Ability.CHECKPOINT)
            raise Refused("host", "CRIU was not found by the driver of containers", "see its capabilities")
        return self._criu

    async def ways(self, *abilities: Ability) -> Ways:
        """What has been found to work here; raises `Refused` where it can do none of it, or not one of these. For what stands beside this module."""
        for ability in (Ability.START, *abilities):
            await self._ready(ability)
        assert self._ways is not None
        return self._ways

    async def _ready(self, ability: Ability = Ability.START) -> Ways:
        if self._capabilities is None:
            await self.probe()
        assert self._capabilities is not None
        self._capabilities.demand(Ability.START)
        self._capabilities.demand(ability)
        assert self._ways is not None
        return self._ways

    # -- prepare -------------------------------------------------------------------------------------------------------------

    async def prepare(self, order: Order) -> Status:
        ways = await self._ready()
        async with self._laying:
            folder = self._path(order.key)
            if not folder.exists():
                try:
                    image = await asyncio.to_thread(self._store.find, order.image)
                    if image.config.module:
                        raise Refused("image", "is a WebAssembly module", "submit it as a function or a batch job")
                    lower = self._store.lower(image)
                    await asyncio.to_thread(self.lay_out, order, image.config, lower, ways, image)
                except ImageError as error:
                    raise Refused(error.field, error.problem, error.remedy) from None
                except OSError as error:
                    raise Failed("disk", f"the container could not be laid out: {error.strerror}", "look at the disk of the data folder") from None
        return self._status(order.key)

    async def lay(self, order: Order, image: Image, lower: Sequence[Path], ways: Ways, fill: Fill, was: int) -> None:
        """`lay_out`, one at a time. For what stands beside this module."""
        async with self._laying:
            await asyncio.to_thread(self.lay_out, order, image.config, lower, ways, image, fill, was)

    def lay_out(self, order: Order, config: Config, lower: Sequence[Path], ways: Ways, image: Image | None = None, fill: Fill | None = None, was: int = -1) -> None:
        """See `container_laying.lay_out`."""
        ground = Ground(self._folder, self._new, self._state, self._settings, self._groups)
        lay_out(ground, order, config, lower, ways, self.group(order.key), self._leased(order.key), image, fill, was)

    # -- start, end ----------------------------------------------------------------------------------------------------------

    async def start(self, key: Key) -> Status:
        await self._ready()
        async with self._one(key):
            return await self.begin(key)

    async def begin(self, key: Key) -> Status:
        """`start` without asking for capabilities: the probe comes here."""
        status = self._status(key)
        if status.phase is not Phase.PREPARED or held(self._path(key)):
            return status
        await self._forget(key)
        more_s = (read(self._path(key) / "keeper.json") or {}).get("restore", {}).get("more_s", 0.0)
        word = await asyncio.to_thread(self._keepers.start, self._path(key), START_S + more_s)
        status = self._status(key)
        if word != "running" and (read(self._path(key) / "exit.json") or {}).get("taken"):
            raise Refused("spec.network.ports", status.reason, "publish it as another host_port, or place it on another node")
        if word != "running" and status.phase not in (Phase.RUNNING, Phase.LOST):
            raise Failed("start", status.reason or self._keeper_said(key) or "its keeper ended without a word", "see the reason; delete it before it is tried again")
        return status

    async def begin_alone(self, key: Key) -> Status:
        """`begin`, while nothing else is done with it. For what stands beside this module."""
        async with self._one(key):
            return await self.begin(key)

    async def wait(self, key: Key) -> Status:
        return await over(self._path(key), lambda: self._status(key), lambda: self._watched(key))

    async def stop(self, key: Key, grace_s: float) -> Status:
        async with self._one(key):  # not while its state is being taken
            status = self._status(key)
            if status.phase is Phase.PAUSED:
                await self._thaw(key)
            if status.phase in (Phase.RUNNING, Phase.PAUSED):
                await self.kill(key, int(self._instance(key).get("signal", signal.SIGTERM)))
        if status.phase in (Phase.RUNNING, Phase.PAUSED):
            with suppress(TimeoutError):
                return await asyncio.wait_for(self.wait(key), grace_s)
            await self.kill(key, signal.SIGKILL)
            return await self._within(self.wait(key), LEFT_S, "it does not end though it was killed")
        return status

    async def delete(self, key: Key) -> None:
        folder = self._path(key)
        async with self._one(key):
            if not folder.exists():
                return
            status = self._status(key)
            if status.phase in (Phase.RUNNING, Phase.PAUSED):
                await self.kill(key, signal.SIGKILL)
                if status.phase is Phase.PAUSED:
                    with suppress(Failed):
                        await self._thaw(key)
                await self._within(self.wait(key), LEFT_S, "it does not end though it was killed")
            try:
                await asyncio.wait_for(unheld(self._path(key)), LEFT_S / 2)
            except TimeoutError:  # what is written down is not what runs: somebody was in this folder
                await self._forget(key)
                await self._within(unheld(self._path(key)), LEFT_S, "its keeper does not end")
            await self._forget(key)
            gone = self._new / f"{folder.name}.gone"
            await asyncio.to_thread(remove, gone, Pace())
            os.rename(folder, gone)
            await asyncio.to_thread(remove, gone, Pace())
        self._busy.pop(folder.name, None)

    def renew(self, key: Key, until_ms: int) -> None:
        lease.write(self._leased(key), until_ms)

    def lease_ms(self, key: Key) -> int:
        return lease.read(self._leased(key))

    def _leased(self, key: Key) -> Path:
        """By which folder its lease goes: `lease.folder_of`."""
        return self._path(key)

    async def kill(self, key: Key, number: int) -> None:
        """Send its first process a signal; what has just ended needs none."""
        try:
            await self._signal(key, int(number))
        except Failed:
            if self._status(key).phase in (Phase.RUNNING, Phase.PAUSED):  # else it ended in between
                raise

    async def _forget(self, key: Key) -> None:
        """What the runtime still knows of it, and what a restore left that lost its keeper."""
        if (self._path(key) / "restore").exists() and not (self._path(key) / "running.json").exists():
            await self.checkpoints().clear(key)
        state = self._state / _name(key)
        if state.exists():
            try:
                await run(self._command(key), "delete", "--force", _name(key))
            except Failed:
                if state.exists():  # else its keeper did it at the same moment
                    raise

    # -- checkpoint, restore -------------------------------------------------------------------------------------------------

    def checkpoints(self) -> "Checkpoints":
        """What takes and brings back states; loaded where it is first needed."""
        if self._checkpoints is None:
            from .container_checkpoint import Checkpoints  # what it imports is needed nowhere else

            self._checkpoints = Checkpoints(self, self._groups, self._store.limits)
        return self._checkpoints

    async def checkpoint(self, key: Key, folder: Path, *, leave_running: bool, step: Callable[[str], None] | None = None) -> Mapping[str, Any]:
        """See `face.Checkpoints`; `step` is told what has been reached. The container ends where it does not go on, and its status says where its state is."""
        await self._ready(Ability.CHECKPOINT)
        assert self._criu is not None
        async with self._one(key):
            return await self.checkpoints().take(key, folder, self._criu, leave_running=leave_running, step=step)

    async def examine(self, folder: Path) -> Mapping[str, Any]:
        await self._ready(Ability.RESTORE)
        assert self._criu is not None
        return await self.checkpoints().look_through(folder, self._criu)

    async def migrate_out(self, key: Key) -> Mapping[str, Any]:
        """See `face.Migrates`."""
        await self._ready(Ability.MIGRATE_OUT)
        assert self._criu is not None
        return await self.checkpoints().offer(key, self._criu)

    async def migrate_in(self, order: Order, offer: Mapping[str, Any]) -> None:
        """See `face.Migrates`: it is laid out as it would be, and removed."""
        await self._ready(Ability.MIGRATE_IN)
        assert self._criu is not None and self._capabilities is not None
        from .checkpoint_state import suits

        suits(offer, self._capabilities, self._criu.version)
        try:
            image = await asyncio.to_thread(self._store.find, order.image)
        except ImageError as error:
            raise Refused(error.field, error.problem, error.remedy) from None
        if list(image.config.diff_ids) != offer["layers"]:
            raise Refused("image", f"its state stands on {str(offer.get('image'))[:19]}, and {order.image} is {image.digest[:19]} here", f"bring the image that it has to this node ({order.image})")
        try:
            await self.prepare(order)
        finally:
            await self.delete(order.key)

    async def restore(self, order: Order, folder: Path, *, other_kernel: bool = False, output: Path | None = None) -> Status:
        """See `face.Checkpoints`. Raises `Refused` before anything is touched; after `Failed` nothing of it is here, and the checkpoint is as it was."""
        ways = await self._ready(Ability.RESTORE)
        assert self._criu is not None
        manifest = await self.checkpoints().look_through(folder, self._criu, other_kernel=other_kernel)
        try:
            image = await asyncio.to_thread(self._store.find, order.image)
        except ImageError as error:
            raise Refused(error.field, error.problem, error.remedy) from None
        if list(image.config.diff_ids) != manifest["layers"]:
            raise Refused("image", f"the checkpoint stands on {manifest['image'][:19]}, which has other layers than {image.digest[:19]}", f"bring the image that it had to this node ({manifest['order'].get('image')})")
        return await self.again(order, image.config, self._store.lower(image), ways, self._criu, folder, manifest, image, output=output)

    async def again(
        self, order: Order, config: Config, lower: Sequence[Path], ways: Ways, criu: "Criu", folder: Path, manifest: Mapping[str, Any], image: Image | None = None, window_s: float | None = None,
        output: Path | None = None,
    ) -> Status:
        """`restore` of what has been looked through; the probe comes here."""
        def fill(final: Path, laid: Path, document: dict[str, Any], told: dict[str, Any]) -> None:
            self.checkpoints().fill(folder, manifest, criu, final, laid, document, told)
            if output is not None:
                link_output(output, laid)

        async with self._laying:
            if self._path(order.key).exists():
                raise Refused("id", f"there is a container {_name(order.key)} already", "delete it first, or restore it under another epoch")
            try:
                await asyncio.to_thread(self.lay_out, order, config, lower, ways, image, fill, manifest["base"])
            except OSError as error:
                raise Failed("disk", f"the container could not be laid out: {error.strerror}", "look at the disk of the data folder") from None
            finally:
                await asyncio.to_thread(shutil.rmtree, self._new / _name(order.key), True)
        return await self.come_back(order.key, window_s)

    async def come_back(self, key: Key, window_s: float | None = None) -> Status:
        """Start an instance that is laid out from a checkpoint, and look whether it lives; removes it where it does not. `window_s`: instead of `container_checkpoint.WINDOW_S`."""
        try:
            async with self._one(key):
                status = await self.begin(key)
            while status.phase is Phase.PREPARED:  # an earlier agent's keeper is at it still; it ends by its own bounds
                await asyncio.sleep(LOOK_S)
                async with self._one(key):
                    status = await self.begin(key)
            status = await self.checkpoints().lives(key, window_s)
        except Failed:
            await self.delete(key)
            raise
        await asyncio.to_thread(shutil.rmtree, self._path(key) / "restore", True)
        return status

    # -- the disk ------------------------------------------------------------------------------------------------------------

    async def hold_disks(self) -> "list[Over]":
        """End those that run and have more on the disk than they asked for; which those were."""
        limits = {Key(entry["id"], entry["epoch"]): limit for entry in (await asyncio.to_thread(self._present)).values() if (limit := disk_limit(entry)) > 0}
        found = await asyncio.to_thread(self._disks.look, limits, time.monotonic()) if limits else []
        ended = []
        for one in found:
            async with self._one(one.key):  # not while its state is being taken
                if await self._disks.end(one):
                    ended.append(one)
        return ended

    # -- pause, stats, logs, exec --------------------------------------------------------------------------------------------

    async def pause(self, key: Key) -> Status:
        await self._ready(Ability.PAUSE)
        return await self.freeze(key)

    async def freeze(self, key: Key) -> Status:
        """`pause` without asking for capabilities; raises `Failed` where it does not stand still then."""
        async with self._one(key):
            await self.hold(key)
        status = self._status(key)
        if status.phase is Phase.RUNNING:
            raise Failed("pause", "the runtime says that it paused it, and it runs on", "look at the node's freezer control group")
        return status

    async def hold(self, key: Key) -> None:
        """Have it stand still, by whoever has it for himself: tried again where the runtime could not catch all of it."""
        for left in reversed(range(FREEZES)):
            if self._running(key).phase is Phase.PAUSED:
                break
            try:
                await self._freeze(key)
                break
            except Failed as error:
                if not left or "unable to freeze" not in error.problem:
                    raise

    async def resume(self, key: Key) -> Status:
        await self._ready(Ability.PAUSE)
        async with self._one(key):
            if self._running(key).phase is Phase.PAUSED:
                await self._thaw(key)
        return self._status(key)

    async def stats(self, key: Key) -> Stats:
        self._running(key)
        return self._groups.stats(self.group(key))

    async def logs(self, key: Key, most: int) -> Output:
        self._instance(key)
        (out, cut), (err, also) = await asyncio.to_thread(lambda: [tail(self._path(key) / f"{stream}.log", most) for stream in ("stdout", "stderr")])
        return Output(out, err, cut or also)

    async def exec(self, key: Key, args: Sequence[str], timeout_s: float) -> Ran:
        await self._ready(Ability.EXEC)
        if not args or any("\0" in one for one in args):
            raise Refused("args", "are empty, or have a zero byte", "give a command")
        if self._running(key).phase is Phase.PAUSED:
            raise Refused("id", f"{_name(key)} is paused", "resume it first")
        return await beside(self._command(key), _name(key), self._path(key), args, timeout_s)

    # -- snapshot ------------------------------------------------------------------------------------------------------------

    async def snapshot(self, key: Key, folder: Path) -> Mapping[str, Any]:
        """See `face.Snapshots`."""
        from .container_snapshot import snapshot

        await self._ready(Ability.SNAPSHOT)
        return await snapshot(self, key, folder)

    def snapshot_bytes(self, key: Key) -> int:
        """See `face.Snapshots`."""
        from .container_snapshot import need

        return need(self, key)

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

    async def prune(self, budget: int, others: Collection[str] = ()) -> list[str]:
        """Keep images within `budget` bytes; never what an instance stands on, here or (`others`) of another driver."""
        async with self._laying:
            return await asyncio.to_thread(lambda: self._store.prune(budget, self.layers() | set(others)))

    def _present(self) -> dict[str, dict[str, Any]]:
        return present(self._folder)

    def _path(self, key: Key) -> Path:
        return self._folder / _name(key)

    def _instance(self, key: Key) -> dict[str, Any]:
        return known(self._path(key), "container")

    def _status(self, key: Key) -> Status:
        """The lock first: where it is free, nothing changes any more."""
        leased = bool(self._instance(key).get("leased", False))
        return replace(self._seen(key), leased=leased) if leased else self._seen(key)

    def _seen(self, key: Key) -> Status:
        folder = self._path(key)
        kept = held(folder)
        end, running = read(folder / "exit.json"), read(folder / "running.json")
        if end is not None:
            if end.get("lapsed"):
                return Status(key, Phase.LOST, reason="it was ended since nobody could prove that it is still this node's")
            over = read(folder / OVER) if end.get("signal") == signal.SIGKILL else None
            if over is not None:
                return replace(ended(key, end), reason=reason(over))
            taken = read(folder / NOTE) if end.get("signal") == signal.SIGKILL else None
            if taken is None or taken.get("leave_running"):
                return ended(key, end)
            return replace(ended(key, end), phase=Phase.CHECKPOINTED, reason=f"its state was taken to {taken.get('folder')}")
        if running is None:
            return Status(key, Phase.PREPARED)
        lives = kept or alive(running)
        if not lives and (note := read(folder / NOTE) or {}).get("whole"):  # the power went, or its keeper, before its end was written down
            return Status(key, Phase.CHECKPOINTED, reason=f"its state was taken to {note.get('folder')}")
        if not lives:
            return Status(key, Phase.LOST, reason="it does not run any more, and nobody saw its end: the machine restarted, or its keeper was killed")
        frozen = self._groups.frozen(self.group(key))
        return Status(key, Phase.PAUSED if frozen else Phase.RUNNING, int(running["pid"]), reason="" if kept else "its keeper was killed: what it writes and how it ends will not be known")

    def _running(self, key: Key) -> Status:
        status = self._status(key)
        if status.phase not in (Phase.RUNNING, Phase.PAUSED):
            raise Refused("id", f"{_name(key)} does not run ({status.phase.value})", "start it first")
        return status

    def _watched(self, key: Key) -> int | None:
        """A descriptor that becomes readable at the end of its keeper, or of its first process where it has none; None where neither is there yet, or any more."""
        running = read(self._path(key) / "running.json")
        if running is None:
            return None
        kept = held(self._path(key))
        try:
            found = os.pidfd_open(int(running["keeper" if kept else "pid"]))
        except OSError:
            return None
        # Asked again after the descriptor is there: then it is of the process that was meant, not of a later one with its number.
        if kept == held(self._path(key)) and (kept or alive(running)):
            return found
        os.close(found)
        return None

    def _keeper_said(self, key: Key) -> str:
        data, _ = tail(self._path(key) / "keeper.err", SAID)
        return data.decode("utf-8", "replace").strip()

    def _one(self, key: Key) -> asyncio.Lock:
        return self._busy.setdefault(_name(key), asyncio.Lock())

    # -- the runtime ---------------------------------------------------------------------------------------------------------

    def _command(self, key: Key) -> list[str]:
        """The runtime that the instance was made for."""
        return command(self._instance(key)["runtime"], self._state)

    async def _signal(self, key: Key, number: int) -> None:
        await run(self._command(key), "kill", _name(key), str(number))

    async def _freeze(self, key: Key) -> None:
        await run(self._command(key), "pause", _name(key))

    async def _thaw(self, key: Key) -> None:
        await run(self._command(key), "resume", _name(key))

    async def runtime(self, key: Key, word: str, *options: str, environment: Mapping[str, str] | None = None, seconds: float = COMMAND_S) -> None:
        """One command of the runtime about an instance; for what stands beside this module."""
        await run(self._command(key), word, *options, _name(key), environment=environment, seconds=seconds)

    async def _within(self, what: Awaitable[T], seconds: float, problem: str) -> T:
        try:
            return await asyncio.wait_for(what, seconds)
        except TimeoutError:
            raise Failed("stop", problem, "look at the node: a process that cannot be killed waits for its kernel or disk") from None


def _name(key: Key) -> str:
    return lease.name_of(key.id, key.epoch)
