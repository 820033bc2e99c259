"""A node's part in a workload's move with its state, which the hub leads (`hub/workloads/moving.py`): look whether it can leave, whether it can come, write its state for the way, take it in, go on here.

    <data>/workloads/moves/<move>.state              a state as one file: at its source from when it was taken, at its target when all of it has come
    <data>/workloads/moves/<move>.ahead              a copy of a virtual machine's disk, which goes before its state while it runs
    <data>/workloads/moves/<move>.live/              sockets by which one goes, or comes, while it runs; then there are none of the others
    <data>/workloads/checkpoints/<workload>/<move>   the same as a checkpoint: at the source what it goes on from if nothing comes of the move, at the target while it is being started
    <data>/workloads/checkpoints/<workload>/back-<move>    of a move of which nothing came: from here on this node may go on with it

A state whose name is a move's is nobody's to go on from but the hub's: another node may be running it. The file is carried by a migration worker (`carrier`).
"""

import asyncio
import os
import shutil
import tarfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contract.workloads import AHEAD, ISOLATION, LIVE, MOVING
from .drivers import checkpoint_state
from .drivers.face import Ability, Failed, GoesAhead, Key, Lives, Migrates, Order, Phase, Refused, Status
from .drivers.instance import sync_folder
from .restarts import KEYS, when_to_pull

if TYPE_CHECKING:
    from .checkpoints import CheckpointFolder
    from .drivers.face import Driver

STATE, BEFORE, ALIVE = ".state", ".ahead", ".live"
"""How the name of a state on its way ends, that of a disk which goes before it, and that of a folder with sockets."""

BACK = "back-"
"""What comes before the name of a state that its source may go on from again."""

TRIED_EPOCH = 0
"""Epoch under which a target lays a workload out to see whether it can: no placement has it, so that what a kill leaves of it goes as anything that is not wanted."""

TWICE = 2
"""A state is on the target's disk as the file that came and as the checkpoint that was made of it."""


class Moves:
    """The files of moves, and what is done with them; used by the workload's own task.

    Args:
        folder: of the states on their way.
        checkpoints: of this node.
        spare: bytes that have to stay free on its disk: below that the node makes room by itself, and would take what runs.
    """

    def __init__(self, folder: Path, checkpoints: "CheckpointFolder", spare: int = 0) -> None:
        self._folder, self._checkpoints, self._spare = folder, checkpoints, max(spare, checkpoint_state.SPARE)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _state(self, move: str) -> Path:
        return self._folder / f"{move}{STATE}"

    async def check(self, driver: "Driver | None", key: Key) -> dict[str, Any]:
        """What the target has to know of a workload that can leave; raises `Refused` where it cannot. Touches nothing."""
        offer = dict(await _migrating(driver).migrate_out(key))
        if offer.get(AHEAD) and checkpoint_state.free(self._folder) < offer[AHEAD] + self._spare:
            offer[AHEAD] = 0
        return offer

    async def room(self, asked: Mapping[str, Any], bring: Callable[[str, str, str], Awaitable[str]], drivers: Mapping[str, "Driver"], short: str) -> dict[str, Any]:
        """Look whether a workload that is offered can come, and fetch its image; raises `DriverError`. Nothing of it is left but its image."""
        offer = asked["offer"]
        driver, order = await self._planned(asked, TRIED_EPOCH, bring, drivers, short)
        await _migrating(driver, Ability.MIGRATE_IN).migrate_in(order, offer)
        if (free := checkpoint_state.free(self._folder)) < TWICE * offer["bytes"] + self._spare:
            raise Refused("disk", f"its state may take {offer['bytes']} bytes twice, {free} are free, {self._spare} have to stay so", "free space, or move it to another node")
        return {AHEAD: isinstance(driver, GoesAhead), LIVE: offer.get(LIVE) is True and _lives(driver)}

    async def _planned(self, asked: Mapping[str, Any], epoch: int, bring: Callable[[str, str, str], Awaitable[str]], drivers: Mapping[str, "Driver"], short: str) -> "tuple[Driver, Order]":
        """Who would run what is offered, under an epoch, and its order; its image is here then. Raises `Refused`."""
        offer = asked["offer"]
        spec, kind = (offer.get("document") or {}).get("spec") or {}, str(offer.get("kind"))
        if short:
            raise Refused("node", short, "move it to another node")
        if not isinstance(offer.get("layers"), list) or not isinstance(offer.get("host"), dict) or not isinstance(offer.get("bytes"), int):
            raise Refused("offer", "is none", "move it from a node whose agent is of this version")
        driver = drivers[await bring(kind, str(offer.get("image")), when_to_pull(spec))]
        spec = {name: value for name, value in spec.items() if name not in KEYS and name != ISOLATION}
        requests = {name: amount for name, amount in (offer.get("requests") or {}).items() if isinstance(amount, int)}
        return driver, Order(Key(asked["workload"], epoch), str(offer["image"]), requests, spec, kind == "batch")

    async def come(self, asked: Mapping[str, Any], bring: Callable[[str, str, str], Awaitable[str]], drivers: Mapping[str, "Driver"], short: str) -> None:
        """Have one wait for a workload that comes while it runs; raises `DriverError`: then nothing of it is here."""
        driver, order = await self._planned(asked, int(asked["epoch"]), bring, drivers, short)
        if not isinstance(driver, Lives):
            raise Refused("move", "the driver of that kind takes in nothing that runs", "the hub moves it otherwise")
        await driver.arrive(order, asked["offer"], self._folder / f"{asked['name']}{ALIVE}")

    async def leave(self, driver: "Driver | None", key: Key, move: str, speed: Any = 0) -> None:
        """Copy a workload to where it shall go, while it runs, until nearly all of it is there; from then on it leaves when its target begins it. `speed`: as `ahead`."""
        if not isinstance(driver, Lives):
            raise Refused("move", "the driver that runs it moves nothing while it runs", "the hub moves it otherwise")
        await driver.leave(key, self._folder / f"{move}{ALIVE}", speed if isinstance(speed, int) and speed > 0 else 0)

    async def ahead(self, driver: "Driver | None", key: Key, move: str, speed: Any = 0) -> dict[str, Any]:
        """Copy the disk of a workload that is about to leave, while it runs; `speed`: bytes in a second at most, 0 for no bound."""
        path = self._folder / f"{move}{BEFORE}"
        if not isinstance(driver, GoesAhead):
            raise Refused("move", "the driver that runs it copies no disks", "move it without (the hub does)")
        await asyncio.to_thread(path.unlink, True)
        return dict(await driver.ahead(key, move, path, speed if isinstance(speed, int) and speed > 0 else 0))

    async def pack(self, workload: str, move: str) -> dict[str, Any]:
        """Write a state that was taken as one file; what the hub has to know of it."""
        source = self._checkpoints.path(workload, move)
        manifest = await asyncio.to_thread(checkpoint_state.read_manifest, source)
        return {"root": manifest["root"], "bytes": await asyncio.to_thread(pack, source, self._state(move), manifest), "taken_ms": manifest.get("taken_ms", 0)}

    def came(self, workload: str, move: str, root: str) -> Path:
        """The checkpoint that a state which came is; made of the file where it is not there yet. Blocks. Raises `Refused`."""
        path = self._checkpoints.path(workload, move)
        if not path.exists():
            if not self._state(move).exists():
                raise Refused("from", f"the state {move} is not here", "see whether the move is still under way")
            path.parent.mkdir(exist_ok=True, mode=0o700)
            unpack(self._state(move), path, self._folder / f"{move}{BEFORE}")
        found = checkpoint_state.read_manifest(path)["root"]
        if found != root:
            raise Refused("from", f"the state {move} has the hash {found[:16]}, and {root[:16]} was told", "move it again")
        return path

    def return_of(self, workload: str, move: str) -> str:
        """Let a state that was taken for a move be gone on from here; its name then, empty where there is none. From here on this is nobody's but this node's. Blocks."""
        path, back = self._checkpoints.path(workload, move), self._checkpoints.path(workload, f"{BACK}{move}")
        if path.exists():
            os.rename(path, back)
            sync_folder(back.parent)
        self._forget(move)
        return back.name if back.exists() else ""

    def settled(self, workload: str, move: str) -> None:
        """It runs here, or will not: nothing of its way is needed any more. Blocks."""
        self._checkpoints.remove(workload, move)
        self._forget(move)

    def _forget(self, move: str) -> None:
        """The files that were on their way."""
        for name in (STATE, BEFORE):
            (self._folder / f"{move}{name}").unlink(missing_ok=True)
        shutil.rmtree(self._folder / f"{move}{ALIVE}", ignore_errors=True)

    def sweep(self, wanted: set[str]) -> None:
        """What no move that is under way has use for, what a worker left of it too."""
        for entry in os.scandir(self._folder):
            name = entry.name.lstrip(".")  # what is being made has one before it
            if name.partition(".")[0] not in wanted and name.startswith(MOVING):
                with_parts = Path(entry.path)
                shutil.rmtree(with_parts, ignore_errors=True) if entry.is_dir(follow_symlinks=False) else with_parts.unlink(missing_ok=True)


async def begin_from(driver: "Driver", key: Key, status: Status | None, path: Path, output: Path) -> Status:
    """Go on from a state that has come, from wherever an earlier agent has got to. Raises `Refused`: then nothing of it is here that could run."""
    if not isinstance(driver, Migrates):
        raise Refused("from", "the driver of that kind brings no states back", "move it to a node with CRIU")
    try:
        if status is None:
            told = (await asyncio.to_thread(checkpoint_state.read_manifest, path))["order"]
            return await driver.restore(Order(key, str(told["image"]), told["requests"], told["spec"], bool(told["job"])), path, output=output)
        if status.phase in (Phase.PREPARED, Phase.RUNNING, Phase.PAUSED):
            await asyncio.to_thread((path / checkpoint_state.AHEAD_DISK).unlink, True)  # it is the instance's, whoever laid that out
            return await driver.come_back(key)
    except Failed as error:
        raise Refused(error.field, error.problem, error.remedy) from None
    if status.exit is None or status.exit.code or status.exit.signal:
        raise Refused("from", f"it ended before anybody saw that it lives: {status.reason or status.phase.value}", "see why")
    return status


async def let_go(driver: "Driver | None", key: Key) -> "tuple[Driver, Status]":
    """Let one that comes while it runs begin as soon as all of it is here. Raises `Refused`: then nobody has seen it live here, and its source may have it again, as with `begin_from`."""
    if not isinstance(driver, Lives):
        raise Refused("from", "nothing waits here for it", "move it again")
    try:
        status = await driver.go(key)
    except Failed as error:
        raise Refused(error.field, error.problem, error.remedy) from None
    if status.phase not in (Phase.RUNNING, Phase.PAUSED) and (status.exit is None or status.exit.code or status.exit.signal):
        raise Refused("from", f"it ended before anybody saw that it lives: {status.reason or status.phase.value}", "see why")
    return driver, status  # type: ignore[return-value]


def _lives(driver: "Driver") -> bool:
    """Whether it takes in what runs, here."""
    try:
        if isinstance(driver, Lives):
            driver.demand(Ability.LIVE)
            return True
    except Refused:
        pass
    return False


def _migrating(driver: "Driver | None", ability: Ability = Ability.MIGRATE_OUT) -> Migrates:
    if driver is None:
        raise Refused("workload", "it does not run here yet", "ask again when it runs")
    if not isinstance(driver, Migrates):
        raise Refused("move", "the driver that runs it moves no states", "let it begin anew on another node")
    driver.demand(ability)
    return driver


def pack(folder: Path, target: Path, manifest: Mapping[str, Any]) -> int:
    """A checkpoint's folder as one file, at once under its name; its bytes. What is in it is compressed already.

    It need not be on the disk: the checkpoint is, and where a loss of power takes a part of this copy, the target finds that by the hashes, and it goes on here.
    """
    new = target.with_name(f"{target.name}.new")
    with open(new, "wb") as handle:
        os.fchmod(handle.fileno(), 0o600)
        with tarfile.open(fileobj=handle, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name in (checkpoint_state.MANIFEST, *(one["name"] for one in manifest["files"])):
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = (folder / name).stat().st_size, 0o600
                with open(folder / name, "rb") as source:
                    archive.addfile(entry, source)
        size = handle.tell()
    os.rename(new, target)
    return size


def unpack(source: Path, folder: Path, ahead: Path | None = None) -> None:
    """The checkpoint's folder that a file holds, at once under its name. Raises `Refused` for a file that holds anything else; whether its content is right is for the checkpoint's own check,
    which also finds what a loss of power took of it: it need not be on the disk, since its source has it until it was seen to live here.

    Args:
        ahead: what came before it, which becomes part of it, where it stands on that.
    """
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    (new / checkpoint_state.IMAGES).mkdir(parents=True, mode=0o700)
    try:
        with tarfile.open(source, mode="r:") as archive:
            for count, entry in enumerate(archive):
                if count > checkpoint_state.MAX_FILES or not entry.isreg() or entry.sparse is not None or not (entry.name == checkpoint_state.MANIFEST or checkpoint_state.is_file(entry.name)):
                    raise Refused("from", f"{entry.name[:80]!r} is nothing that a state has", "move it again")
                content = archive.extractfile(entry)
                assert content is not None  # it is a file
                descriptor = os.open(new / entry.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                with open(descriptor, "wb") as target:
                    shutil.copyfileobj(content, target, checkpoint_state.CHUNK)
        if checkpoint_state.WENT_AHEAD in checkpoint_state.read_manifest(new):
            if ahead is None or not ahead.exists():
                raise Refused("from", "the copy of its disk that went ahead is not here", "move it again")
            os.link(ahead, new / checkpoint_state.AHEAD_DISK)
    except (tarfile.TarError, FileExistsError, EOFError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise Refused("from", f"the state cannot be read: {str(error)[:200]}", "move it again") from None
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    os.rename(new, folder)

