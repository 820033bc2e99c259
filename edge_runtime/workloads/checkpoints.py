"""The checkpoints of workloads that a node keeps, and what is done with them: take one, go on from one, remove one.

    <data>/workloads/checkpoints/<workload>/<name>/     one state, as its driver writes it (`drivers.checkpoint_state`)
    <data>/workloads/checkpoints/.output/<workload>/    what it wrote, while it is being restored: it goes on with that

A state has its name when it is whole, so what is there under a name can be gone on from. They count to the disk budget of images. They go with their workload: when this node shall not have it any more.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contract.limits import MAX_CHECKPOINTS
from ..contract.schema import ID_PATTERN
from ..contract.workloads import AHEAD, CHECKPOINT, DELETE_CHECKPOINT, MOVE_AHEAD, MOVE_BACK, MOVE_CHECK, MOVE_LIVE, MOVE_OUT, MOVES, MOVING, RESTORE, SPEED
from .drivers import checkpoint_state
from .drivers.face import Checkpoints, Driver, Failed, GoesAhead, Key, Lives, Observes, Order, Phase, Refused, Status
from .drivers.instance import link_output
from .operations import Operations

if TYPE_CHECKING:
    from .moves import Moves

log = logging.getLogger(__name__)

TAKING, CLEARING, PLACING, LEAVING = "taking", "clearing", "placing", "leaving"
"""Steps that are written down: a state of this name is this operation's; the instance that a restore replaces goes; what is there under its key has been brought back; it is being copied while it runs."""

AUTOMATIC = "auto-"
"""How the ids of operations begin that nobody asks for, and so the names of their checkpoints."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One checkpoint that is whole. `bytes`: on the disk; `root`: the hash over all of it; `layers`: what of its image it stands on."""

    workload: str
    epoch: int
    name: str
    taken_ms: int
    bytes: int
    root: str
    layers: tuple[str, ...]
    kind: str
    """Which driver brings it back."""

    def to_json(self) -> dict[str, Any]:
        """As records and APIs have it."""
        return {"workload": self.workload, "epoch": self.epoch, "name": self.name, "taken_ms": self.taken_ms, "bytes": self.bytes, "root": self.root}


class CheckpointFolder:
    """The folder of one node's checkpoints. Its calls block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, workload: str, name: str) -> Path:
        """Where one is, there or not. Raises `Refused` for what is no name."""
        for part, word in (("workload", workload), ("name", name)):
            if not ID_PATTERN.match(word):
                raise Refused(part, f"{word[:80]!r} is not a name", "use 1 to 64 letters, digits, _ . : -, a letter or digit first")
        return self._folder / workload / name

    def workloads(self) -> set[str]:
        """Those that have something here."""
        return {entry.name for entry in os.scandir(self._folder) if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")}

    def output(self, workload: str) -> Path:
        """Where what it wrote is kept while it is being restored."""
        return self._folder / ".output" / workload

    def keep_output(self, workload: str, instance: Path) -> None:
        """Keep what an instance wrote that is about to go; where it has gone already, what was kept stays."""
        self.output(workload).mkdir(parents=True, exist_ok=True, mode=0o700)
        if instance.exists():
            link_output(instance, self.output(workload))

    def forget_output(self, workload: str) -> None:
        """It has it, or needs it no more."""
        shutil.rmtree(self.output(workload), ignore_errors=True)

    def all(self, workload: str = "") -> list[Kept]:
        """What is whole, the oldest first; of one workload only where it is named. What cannot be read is passed over: a restore says why."""
        found = []
        for name in [workload] if workload else sorted(self.workloads()):
            try:
                states = sorted(entry.name for entry in os.scandir(self._folder / name) if not entry.name.startswith("."))
            except OSError:
                continue
            for state in states:
                try:
                    told = checkpoint_state.read_manifest(self._folder / name / state)
                    found.append(Kept(
                        name, int(told["order"].get("epoch", 0)), state, int(told.get("taken_ms", 0)), sum(one["stored"] for one in told["files"]), told["root"], tuple(map(str, told["layers"])), str(told.get("kind")),
                    ))
                except (Refused, ValueError, TypeError) as error:
                    log.warning("checkpoint %s of %s cannot be used: %s", state, name, error)
        return sorted(found, key=lambda one: (one.taken_ms, one.name))

    def tidy(self) -> None:
        """What a kill left of states that have not become whole; called when the drivers have settled what was under way."""
        for name in self.workloads():
            for entry in os.scandir(self._folder / name):
                if entry.name.startswith("."):
                    shutil.rmtree(entry.path, ignore_errors=True)

    def remove(self, workload: str, name: str) -> None:
        """One; its name goes first, so that what is left of a removal is nothing that could be gone on from."""
        path = self.path(workload, name)
        gone = path.with_name(f".{name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        try:
            os.rename(path, gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):  # where there are others
            path.parent.rmdir()

    def forget(self, workload: str) -> bool:
        """All of a workload; whether there was anything."""
        self.forget_output(workload)
        if workload not in self.workloads():
            return False
        shutil.rmtree(self._folder / workload, ignore_errors=True)
        return True


class Checkpointing:
    """Carries out operations on checkpoints; only ever called by the workload's own task.

    Args:
        folder: where they are.
        operations: what is under way.
        budget: bytes that images and checkpoints may take together.
        changed: called when there are others than before.
        moves: the states that are on their way to other nodes, or came from them; None: there are none.
    """

    def __init__(self, folder: CheckpointFolder, operations: Operations, budget: int, changed: Callable[[], None] = lambda: None, moves: "Moves | None" = None) -> None:
        self._folder, self._operations, self._budget, self._changed, self.moves = folder, operations, budget, changed, moves

    def output(self, workload: str) -> Path:
        """Where what it wrote is kept while it is being restored."""
        return self._folder.output(workload)

    @property
    def operations(self) -> Operations:
        """What is under way."""
        return self._operations

    async def workloads(self) -> set[str]:
        """Those that have checkpoints here."""
        return await asyncio.to_thread(self._folder.workloads)

    async def forget(self, workload: str) -> None:
        """This node has it no more."""
        if await asyncio.to_thread(self._folder.forget, workload):
            self._changed()

    async def due_s(self, workload: str, every_s: float) -> float:
        """Seconds until its next checkpoint that nobody asks for is due."""
        newest = await self._own(workload)
        return every_s if not newest else min(every_s, max(0.0, every_s - (time.time() - newest[-1].taken_ms / 1000)))

    async def _own(self, workload: str) -> list[Kept]:
        """Those that nobody asked for, the oldest first."""
        return [one for one in await asyncio.to_thread(self._folder.all, workload) if one.name.startswith(AUTOMATIC)]

    def take_one(self, key: Key) -> None:
        """Have a checkpoint taken that nobody asks for; the older ones of its kind go when it is there."""
        self._ask(key, CHECKPOINT, "")

    async def goes_on(self, key: Key) -> bool:
        """Have it brought back from the newest checkpoint that nobody asked for; whether there is one, or an operation is under way already."""
        if self._operations.under_way(key.id):
            return True
        own = [one for one in await self._own(key.id) if one.epoch == key.epoch]
        if own:
            self._ask(key, RESTORE, own[-1].name)
        return bool(own)

    def _ask(self, key: Key, kind: str, name: str) -> None:
        self._operations.take([{"id": f"{AUTOMATIC}{uuid.uuid4().hex[:16]}", "kind": kind, "workload": key.id, "epoch": key.epoch, "name": name, "stop": False, "expires_ms": 0}])

    async def carry_out(self, asked: Mapping[str, Any], drivers: Mapping[str, Driver], driver: Driver | None, status: Status | None, held: bool, clears: Callable[[], None]) -> dict[str, Any]:
        """One operation; what is told of it then. Raises `DriverError`.

        Args:
            asked: an entry of `spec.operations`.
            drivers: of this node, by name.
            driver, status: on whose disk the workload is and how it stands; None where it is on none.
            held: it is checkpointed: of its states at least the newest has to stay.
            clears: called before an instance goes in whose place a state comes.
        """
        try:
            if asked["kind"] in MOVES:
                return await self._move(asked, drivers, driver, status, clears)
            if (held or asked["kind"] == DELETE_CHECKPOINT) and (on_its_way := await self._on_its_way(asked["workload"])):
                raise Refused("workload", f"it is on its way to another node ({on_its_way}), which may be running it", "see the hub's moves; where that one is cancelled it goes on here")
            if asked["kind"] == CHECKPOINT:
                return await self._checkpoint(asked, driver, status)
            if asked["kind"] == RESTORE:
                return await self._restore(asked, drivers, status, clears)
            assert asked["kind"] == DELETE_CHECKPOINT
            return await self._delete(asked, held)
        except OSError as error:
            raise Failed("disk", f"the checkpoint could not be written or read: {error.strerror}", "look at the disk of the data folder") from None
        finally:
            self._changed()

    async def _on_its_way(self, workload: str) -> str:
        """The move with which its state is on its way; empty where it is on none."""
        newest = (await asyncio.to_thread(self._folder.all, workload))[-1:]
        return newest[0].name if newest and newest[0].name.startswith(MOVING) else ""

    async def _move(self, asked: Mapping[str, Any], drivers: Mapping[str, Driver], driver: Driver | None, status: Status | None, clears: Callable[[], None]) -> dict[str, Any]:
        """A part of a move at its source."""
        workload, move = asked["workload"], asked["name"]
        if self.moves is None or not move.startswith(MOVING):
            raise Refused("move", "this node moves no states", "see workloads.moves_hub")
        if asked["kind"] == MOVE_CHECK:
            return await self.moves.check(driver, Key(workload, asked["epoch"]))
        if asked["kind"] == MOVE_LIVE:
            if self._operations.step(asked["id"]) == LEAVING:
                raise Failed("move", "the agent was started anew while it was leaving", "the hub moves it otherwise")  # what connected it has gone with that agent
            await self._operations.reach(asked["id"], LEAVING)
            await self.moves.leave(driver, Key(workload, asked["epoch"]), move, (asked.get("offer") or {}).get(SPEED, 0))
            return {}
        if asked["kind"] == MOVE_AHEAD:
            return await self.moves.ahead(driver, Key(workload, asked["epoch"]), move, (asked.get("offer") or {}).get(SPEED, 0))
        if asked["kind"] == MOVE_OUT:
            await self._checkpoint(asked, driver, status)
            return await self.moves.pack(workload, move)
        assert asked["kind"] == MOVE_BACK
        if isinstance(driver, Lives):
            await driver.stay(Key(workload, asked["epoch"]))
        name = await asyncio.to_thread(self.moves.return_of, workload, move)
        # What an agent was killed at while it brought it back has not been seen to live, and may still stand still.
        if name and (status is None or status.phase not in (Phase.RUNNING, Phase.PAUSED) or self._operations.step(asked["id"]) == PLACING):
            await self._restore({**asked, "name": name}, drivers, status, clears)
        if name:
            await asyncio.to_thread(self._folder.remove, workload, name)
        return {}

    async def _checkpoint(self, asked: Mapping[str, Any], driver: Driver | None, status: Status | None) -> dict[str, Any]:
        name, workload = asked["name"] or asked["id"], asked["workload"]
        path = self._folder.path(workload, name)
        if asked["kind"] == CHECKPOINT and asked["name"].startswith((AUTOMATIC, MOVING)):
            raise Refused("name", f"{AUTOMATIC}... and {MOVING}... are for checkpoints that nobody asks for", "give it another name")
        if driver is None or status is None:
            raise Refused("workload", f"{workload} does not run here yet", "ask again when it runs")
        if not isinstance(driver, Checkpoints):
            raise Refused("checkpoint", "the driver that runs it takes no states", "run it as a container")
        if status.leased and asked["stop"]:
            raise Refused("stop", "it runs only as long as its site says (when_cut_off: move), and a sibling could begin it anew meanwhile", "take the checkpoint without a stop")
        if self._operations.step(asked["id"]) != TAKING:
            if await asyncio.to_thread(os.path.lexists, path):
                raise Refused("name", f"{workload} has a checkpoint {name} already", "give it another name, or delete that one")
            await self._room(driver, status)
            await self._operations.reach(asked["id"], TAKING)
        if not await asyncio.to_thread(path.exists):
            path.parent.mkdir(exist_ok=True, mode=0o700)
            if asked["kind"] == MOVE_OUT and (asked.get("offer") or {}).get(AHEAD) and isinstance(driver, GoesAhead):
                await driver.checkpoint(status.key, path, leave_running=False, since=name)
            else:
                await driver.checkpoint(status.key, path, leave_running=not asked["stop"])
        if asked["id"].startswith(AUTOMATIC):
            for one in await self._own(workload):
                if one.name != name:
                    await asyncio.to_thread(self._folder.remove, workload, one.name)
        return await self._told(workload, name)

    async def _room(self, driver: Driver, status: Status) -> None:
        """Raises `Refused` where one more is too much."""
        there = await asyncio.to_thread(self._folder.all)
        if len(there) >= MAX_CHECKPOINTS:
            raise Refused("checkpoints", f"this node has {len(there)}, the most there may be", "delete some")
        held = sum(one.bytes for one in there)
        need = (await driver.stats(status.key)).memory_bytes if status.phase is Phase.RUNNING and isinstance(driver, Observes) else 0
        if held + need > self._budget:
            raise Refused("disk", f"the checkpoints here have {held} bytes, this one may take {need}, and with the images they may have {self._budget}", "delete some, or raise workloads.images_bytes")

    async def _restore(self, asked: Mapping[str, Any], drivers: Mapping[str, Driver], status: Status | None, clears: Callable[[], None]) -> dict[str, Any]:
        workload, step = asked["workload"], self._operations.step(asked["id"])
        there = await asyncio.to_thread(self._folder.all, workload)
        found = next((one for one in reversed(there) if asked["name"] in ("", one.name)), None)
        if found is None:
            raise Refused("name", f"{workload} has no checkpoint{' ' + asked['name'] if asked['name'] else ''} here that can be read", "list its checkpoints")
        driver = drivers.get(found.kind)
        if not isinstance(driver, Checkpoints):
            raise Refused("restore", "there is no driver here that brings states back", "restore it on a node with CRIU")
        path, key = self._folder.path(workload, found.name), Key(workload, asked["epoch"])
        if step not in (CLEARING, PLACING):
            if status is not None and status.phase in (Phase.RUNNING, Phase.PAUSED, Phase.PREPARED):
                raise Refused("workload", f"{workload} runs", "take a checkpoint with stop first; then it can go on from any")
            if status is not None and status.leased:
                raise Refused("workload", "it runs only as long as its site says (when_cut_off: move)", "let its site run it")
            await driver.examine(path)
            clears()
            await self._operations.reach(asked["id"], CLEARING)
        if step != PLACING:
            await asyncio.to_thread(self._folder.keep_output, workload, driver.folder(key))
            await driver.delete(key)
            await self._operations.reach(asked["id"], PLACING)
            status = None
        if status is None:
            told = (await asyncio.to_thread(checkpoint_state.read_manifest, path))["order"]
            await driver.restore(Order(key, str(told["image"]), told["requests"], told["spec"], bool(told["job"])), path, output=self._folder.output(workload))
        elif status.phase in (Phase.PREPARED, Phase.RUNNING, Phase.PAUSED):
            await driver.come_back(key)
        await asyncio.to_thread(self._folder.forget_output, workload)
        return found.to_json()

    async def _delete(self, asked: Mapping[str, Any], held: bool) -> dict[str, Any]:
        workload = asked["workload"]
        path = self._folder.path(workload, asked["name"])
        there = await asyncio.to_thread(self._folder.all, workload)
        if held and there and there[-1].name == asked["name"]:
            raise Refused("name", f"{workload} is checkpointed, and this is its state", "restore it, or cancel the workload")
        if self._operations.step(asked["id"]) != CLEARING:
            if not await asyncio.to_thread(os.path.lexists, path):
                raise Refused("name", f"{workload} has no checkpoint {asked['name']} here", "list its checkpoints")
            await self._operations.reach(asked["id"], CLEARING)
        await asyncio.to_thread(self._folder.remove, workload, asked["name"])
        return {"workload": workload, "name": asked["name"]}

    async def _told(self, workload: str, name: str) -> dict[str, Any]:
        for one in await asyncio.to_thread(self._folder.all, workload):
            if one.name == name:
                return one.to_json()
        raise Failed("checkpoint", f"{name} was written, and cannot be read", "look at the disk of the data folder")
