"""A container's way through a checkpoint and back, as one operation that outlives its agent: exactly one copy runs, or can run, at any moment, whoever is killed.

    <dir>/operations/<name>.json    what is under way, and how far it has come

    taking       its state is being taken; the source is the copy until the state is whole (`container_checkpoint` sees to that)
    bringing     the state is the copy until the target's keeper has written down that it runs; the source has ended for good
    returning    the target did not live: the state is brought back in the source's place
    done         the target runs
    returned     the source's place has it again; `problem` says why
    failed       neither lives; the state is what there is, and stays

Each step can be done again from its beginning, so whoever finds the file goes on with what stands there. The state's folder stays in the end: it is the caller's.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import keeping
from .checkpoint_state import whole_at
from .container import ContainerDriver
from .face import DriverError, Failed, Key, Order, Phase, Refused, Status
from .instance import NOTE, read

STEPS = ("taking", "bringing", "returning", "done", "returned", "failed")
ENDED = STEPS[3:]

MAX_OPERATIONS = 64
"""Under way, or ended and not forgotten."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")


@dataclass(frozen=True, slots=True)
class Move:
    """One operation.

    Attributes:
        source: what ran, as it can be restored in its own place.
        target: what shall run in the end.
        state: folder of the state, absolute.
        problem: why it did not go as it should.
    """

    name: str
    source: Order
    target: Order
    state: str
    step: str = "taking"
    problem: str = ""


class Moves:
    """The operations of one driver.

    Args:
        folder: of the operations; made where it is not there.
        step: is told what has been reached: an operation's step when it is on the disk, and what `container_checkpoint.STEPS` has.
    """

    def __init__(self, driver: ContainerDriver, folder: Path, step: Callable[[str], None] = lambda word: None) -> None:
        self._driver, self._folder, self._step = driver, folder, step
        self._under_way: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def move(self, name: str, source: Key, target: Key, state: Path) -> Status:
        """Take the state of `source`, and go on from it as `target`, the same workload under another key; how the target is then.

        Raises `Refused` where nothing was touched; `Failed` where it did not go: then the source's place has it (again), or the state alone does, as the problem says.
        """
        if not _NAME.match(name):
            raise Refused("name", f"{name[:80]!r} is no name of an operation", "use up to 64 letters, digits, _ . -")
        if len(self.all()) >= MAX_OPERATIONS or self._path(name).exists():
            raise Refused("name", f"there is an operation {name} already, or {MAX_OPERATIONS} others", "forget those that have ended")
        instance = read(self._driver.folder(source) / "instance.json")
        if instance is None:
            raise Refused("source", f"there is no container {source.id} of epoch {source.epoch} here", "see what runs")
        if self._driver.folder(target).exists():
            raise Refused("target", f"there is a container {target.id} of epoch {target.epoch} already", "name another epoch")
        order = Order(source, instance["reference"], instance["requests"], instance["spec"], instance["job"], instance["leased"])
        return await self._go(Move(name, order, replace(order, key=target), str(state.absolute())))

    async def resume(self) -> list[Move]:
        """Go on with all that an agent left; how they ended. To be called once after the driver's probe."""
        for move in self.all():
            if move.step not in ENDED and move.name not in self._under_way:
                try:
                    await self._go(move)
                except DriverError:
                    continue  # it stands in the operation
        return self.all()

    def all(self) -> list[Move]:
        """Those under way, and those that ended and were not forgotten."""
        found = []
        for path in sorted(self._folder.glob("*.json"))[:MAX_OPERATIONS + 1]:
            value = read(path)
            if value is not None:
                found.append(_move(value))
        return found

    def forget(self, name: str) -> None:
        """Of one that has ended."""
        if any(move.name == name and move.step in ENDED for move in self.all()):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    async def _write(self, move: Move) -> Move:
        await asyncio.to_thread(keeping.write, str(self._path(move.name)), asdict(move))
        self._step(move.step)
        return move

    async def _go(self, move: Move) -> Status:
        self._under_way.add(move.name)
        try:
            if move.step == "taking":
                move = await self._take(move)
            if move.step == "bringing":
                move = await self._bring(move)
            if move.step == "returning":
                move = await self._return(move)
        finally:
            self._under_way.discard(move.name)
        if move.step == "done":
            return await self._driver.status(move.target.key)
        place = f"it is in its old place again, from {move.state}" if move.step == "returned" else f"it runs nowhere; its state is {move.state}"
        raise Failed("move", f"{move.problem}; {place}", "see the problem")

    async def _take(self, move: Move) -> Move:
        """Until the state is whole and the source has ended; where that cannot be, the source goes on and there is no operation."""
        await self._write(move)
        source, state = move.source.key, Path(move.state)
        try:
            status = await self._driver.status(source)
            if status.phase is Phase.RUNNING:
                await self._driver.checkpoint(source, state, leave_running=False, step=self._step)
            elif not self._taken(source, state):
                raise Failed("source", f"{source.id} has ended ({status.reason or status.phase.value}), and its state was not taken", "see why it ended")
        except DriverError:
            if not self._taken(source, state):  # the checkpoint has undone itself
                self._path(move.name).unlink()
            raise
        return await self._write(replace(move, step="bringing"))

    async def _bring(self, move: Move) -> Move:
        try:
            await self._place(move.target, Path(move.state))
        except DriverError as error:
            return await self._write(replace(move, step="returning", problem=str(error)))
        await self._driver.delete(move.source.key)
        return await self._write(replace(move, step="done"))

    async def _return(self, move: Move) -> Move:
        await self._driver.delete(move.target.key)
        try:
            if (self._driver.folder(move.source.key) / NOTE).exists():  # what was taken; what was begun to be brought back in its place has no such note
                await self._driver.delete(move.source.key)
            await self._place(move.source, Path(move.state))
        except DriverError as error:
            return await self._write(replace(move, step="failed", problem=f"{move.problem}; and in its old place: {error}"))
        return await self._write(replace(move, step="returned"))

    async def _place(self, order: Order, state: Path) -> None:
        """Until it runs from the state under its key, from wherever an earlier try has come to."""
        phase = await self._phase(order.key)
        if phase is None:
            await self._driver.restore(order, state)
        elif phase in (Phase.ENDED, Phase.LOST, Phase.CHECKPOINTED):
            status = await self._driver.status(order.key)
            if status.exit is None or status.exit.code or status.exit.signal:
                raise Failed("restore", f"it ended before anybody saw that it lives: {status.reason or status.phase.value}", "see why")
        else:
            await self._driver.come_back(order.key)

    def _taken(self, source: Key, state: Path) -> bool:
        """Whether this state is what has ended the source, or will when the driver is probed."""
        note = read(self._driver.folder(source) / NOTE)
        return note is not None and whole_at(state, note["token"])

    async def _phase(self, key: Key) -> Phase | None:
        try:
            return (await self._driver.status(key)).phase
        except Refused:
            return None


def _move(value: Mapping[str, Any]) -> Move:
    def order(told: Mapping[str, Any]) -> Order:
        return Order(**{**told, "key": Key(**told["key"])})

    return Move(**{**value, "source": order(value["source"]), "target": order(value["target"])})
