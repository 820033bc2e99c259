"""Disks that go ahead of a state, as a node has them: when there is room for a copy, what lies beside a state, and who may use that, how often."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.checkpoints import CheckpointFolder, Checkpointing
from edge_runtime.workloads.drivers import checkpoint_state
from edge_runtime.workloads.drivers.face import GoesAhead, Key, Migrates, Order, Phase, Refused, Status
from edge_runtime.workloads.moves import Moves, begin_from, pack, unpack

from .test_runner_operations import WithStates

MOVE = "move-1"
COPY = b"the disk as it went ahead"
DOCUMENT = {"kind": "vm", "host": {}, "order": {"id": "w", "epoch": 1, "image": "i", "requests": {}, "spec": {}, "job": False}, "machine": {}, "image": "i", "layers": [], "taken_ms": 1}


def state(folder: Path, names: tuple[str, ...] = (checkpoint_state.MEMORY, checkpoint_state.REST), **more: Any) -> Path:
    """A state of a machine; what is in it is no machine's."""
    (folder / checkpoint_state.IMAGES).mkdir(parents=True)
    files = []
    for name in names:
        with checkpoint_state.Writer(folder, name, "zlib") as target:
            target.write(name.encode())
        files.append(target.entry)
    checkpoint_state.seal(folder, {**DOCUMENT, **more}, files, "zlib")
    return folder


class Ahead(WithStates):
    """A driver whose workloads have a disk."""

    asked: list[tuple[Any, ...]]

    async def migrate_out(self, key: Key) -> Mapping[str, Any]:
        return {"host": {}, "image": "i", "layers": [], "bytes": 1, "ahead": 1000}

    async def migrate_in(self, order: Order, offer: Mapping[str, Any]) -> None:
        """It can."""

    async def ahead(self, key: Key, name: str, target: Path, speed: int = 0) -> Mapping[str, Any]:
        self.asked.append((name, speed))
        target.write_bytes(COPY)
        return {"bytes": len(COPY)}

    async def checkpoint(self, key: Key, folder: Path, *, leave_running: bool, since: str = "") -> Mapping[str, Any]:
        self.asked.append((key, folder.name, leave_running, since))
        state(folder, **({"ahead": since} if since else {"names": (checkpoint_state.MEMORY, checkpoint_state.MACHINE_DISK)}))  # type: ignore[arg-type]
        return {}

    async def come_back(self, key: Key) -> Status:
        self.asked.append(("come back", self._beside.exists()))
        return Status(key, Phase.RUNNING)

    _beside: Path


def driver(**more: Any) -> Ahead:
    made = object.__new__(Ahead)
    made.asked = []
    for name, value in more.items():
        setattr(made, name, value)
    assert isinstance(made, GoesAhead) and isinstance(made, Migrates)
    return made


def free(monkeypatch: pytest.MonkeyPatch, amount: int) -> None:
    monkeypatch.setattr(checkpoint_state, "free", lambda place: amount)


@pytest.mark.parametrize(("amount", "offered"), [(5_001_000 + checkpoint_state.SPARE, 1000), (5_000_999 + checkpoint_state.SPARE, 0)])
async def test_a_copy_is_offered_where_there_is_room_for_it_beside_what_must_stay_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amount: int, offered: int) -> None:
    moves = Moves(tmp_path / "moves", CheckpointFolder(tmp_path / "checkpoints"), checkpoint_state.SPARE + 5_000_000)
    free(monkeypatch, amount)
    assert (await moves.check(driver(), Key("w", 1)))["ahead"] == offered


async def test_a_target_says_that_it_takes_copies_and_keeps_what_must_stay_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = Moves(tmp_path / "moves", CheckpointFolder(tmp_path / "checkpoints"), checkpoint_state.SPARE + 5_000_000)

    async def bring(kind: str, reference: str, pull: str) -> str:
        return "vm"

    asked = {"workload": "w", "offer": {"host": {}, "layers": [], "bytes": 10, "kind": "vm", "image": "i"}}
    free(monkeypatch, 5_000_020 + checkpoint_state.SPARE)
    assert await moves.room(asked, bring, {"vm": driver()}, "") == {"ahead": True, "live": False}
    free(monkeypatch, 5_000_019 + checkpoint_state.SPARE)
    with pytest.raises(Refused, match=f"{checkpoint_state.SPARE + 5_000_000} have to stay so"):
        await moves.room(asked, bring, {"vm": driver()}, "")


async def test_a_copy_is_made_anew_and_its_state_needs_it(tmp_path: Path) -> None:
    moves, there = Moves(tmp_path / "moves", CheckpointFolder(tmp_path / "checkpoints")), driver()
    (tmp_path / "moves" / f"{MOVE}.ahead").write_bytes(b"of an agent that was killed")
    assert await moves.ahead(there, Key("w", 1), MOVE) == {"bytes": len(COPY)} and (tmp_path / "moves" / f"{MOVE}.ahead").read_bytes() == COPY
    await moves.ahead(there, Key("w", 1), MOVE, 7)
    await moves.ahead(there, Key("w", 1), MOVE, "fast")
    assert there.asked == [(MOVE, 0), (MOVE, 7), (MOVE, 0)]
    with pytest.raises(Refused, match="copies no disks"):
        await moves.ahead(None, Key("w", 1), MOVE)
    source = state(tmp_path / "state", ahead=MOVE)
    (source / checkpoint_state.KEPT_DISK).write_bytes(b"the disk as it is")
    pack(source, tmp_path / "moves" / f"{MOVE}.state", checkpoint_state.read_manifest(source))
    came = moves.came("w", MOVE, checkpoint_state.read_manifest(source)["root"])
    assert (came / checkpoint_state.AHEAD_DISK).read_bytes() == COPY and not (came / checkpoint_state.KEPT_DISK).exists() and checkpoint_state.check(came)["ahead"] == MOVE
    moves.settled("w", MOVE)
    assert os.listdir(tmp_path / "moves") == [] and not came.exists()
    for ahead in (None, tmp_path / "nowhere"):
        pack(source, tmp_path / "alone.state", checkpoint_state.read_manifest(source))
        with pytest.raises(Refused, match="went ahead is not here"):
            unpack(tmp_path / "alone.state", tmp_path / "alone", ahead)
        assert not (tmp_path / "alone").exists() and not (tmp_path / ".alone.new").exists()


def test_what_lies_beside_a_state_is_known_only_where_a_disk_went_ahead(tmp_path: Path) -> None:
    ahead = state(tmp_path / "ahead", ahead=MOVE)
    (ahead / checkpoint_state.KEPT_DISK).write_bytes(b"x")
    assert checkpoint_state.check(ahead)["ahead"] == MOVE
    whole = state(tmp_path / "whole", (checkpoint_state.MEMORY, checkpoint_state.MACHINE_DISK))
    checkpoint_state.check(whole)
    (whole / checkpoint_state.KEPT_DISK).write_bytes(b"x")
    with pytest.raises(Refused, match=r"kept.qcow2 is not in the manifest"):
        checkpoint_state.check(whole)
    for number, (names, more) in enumerate((((checkpoint_state.MEMORY, checkpoint_state.MACHINE_DISK), {"ahead": MOVE}), ((checkpoint_state.MEMORY, checkpoint_state.REST), {}), ((checkpoint_state.MEMORY, checkpoint_state.REST), {"ahead": 7}))):
        with pytest.raises(Refused, match=r"manifest.json (has a list of files that is none|says nothing that could be)"):
            checkpoint_state.check(state(tmp_path / f"odd-{number}", names, **more))


async def test_what_an_agent_laid_out_has_the_copy_alone_before_it_goes_on(tmp_path: Path) -> None:
    """Else a restore could begin once more with a disk that the guest has written to."""
    came = state(tmp_path / "came", ahead=MOVE)
    (came / checkpoint_state.AHEAD_DISK).write_bytes(COPY)
    there = driver(_beside=came / checkpoint_state.AHEAD_DISK)
    await begin_from(there, Key("w", 2), Status(Key("w", 2), Phase.PREPARED), came, tmp_path / "output")
    assert there.asked == [("come back", False)]


@pytest.mark.parametrize(("offer", "since"), [({}, None), ({"ahead": True}, MOVE)])
async def test_a_state_is_taken_since_its_disk_went_ahead_where_the_hub_says_so(tmp_path: Path, offer: dict[str, Any], since: str | None) -> None:
    class Steps:
        """Of one operation."""

        def step(self, name: str) -> str:
            return "taking"

    folder = CheckpointFolder(tmp_path / "checkpoints")
    there, work = driver(), Checkpointing(folder, Steps(), 1 << 40, moves=Moves(tmp_path / "moves", folder))  # type: ignore[arg-type]
    asked = {"id": f"{MOVE}.out", "kind": "move-out", "workload": "w", "epoch": 1, "name": MOVE, "stop": True, "offer": offer}
    await work.carry_out(asked, {"vm": there}, there, Status(Key("w", 1), Phase.RUNNING), False, lambda: None)
    assert there.asked == [(Key("w", 1), MOVE, False, since or "")] and (tmp_path / "moves" / f"{MOVE}.state").exists()
