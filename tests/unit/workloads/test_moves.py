"""A node's part in moves, against a driver in memory: whoever is killed when, one copy at most runs and it goes on where it was; what is on its way is nobody's but the hub's; what came is looked through."""

import asyncio
import errno
import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract.operations import FINAL_STATES
from edge_runtime.contract.workloads import CHECKPOINTED
from edge_runtime.workloads import moves
from edge_runtime.workloads.checkpoints import CheckpointFolder, Checkpointing
from edge_runtime.workloads.drivers import checkpoint_state
from edge_runtime.workloads.drivers.face import Key, Order, Phase, Refused, Status
from edge_runtime.workloads.moves import BACK, Moves, pack, unpack
from edge_runtime.workloads.operations import Operations
from edge_runtime.workloads.runner import Runner

from .test_checkpoint_state import DOCUMENT
from .test_runner import entry, others_first, quiet
from .test_runner_operations import BUDGET, Kept, WithStates, asked, in_one_thread  # noqa: F401 - a fixture

MOVE = "move-1"
W = "a"
EVERY_TURN = 60
"""More turns than any step takes."""
OFFER = {"host": {}, "image": "i", "layers": [], "bytes": 1}


class Moving(WithStates):
    """Can be moved."""

    async def migrate_out(self, key: Key) -> Mapping[str, Any]:
        await self._step("migrate_out")
        if (await self.status(key)).phase is not Phase.RUNNING:
            raise Refused("id", "it does not run", "start it")
        return OFFER

    async def migrate_in(self, order: Order, offer: Mapping[str, Any]) -> None:
        await self._step("migrate_in")


class Node:
    """A disk, the agent on it, and what it is told; `move` as the hub would."""

    def __init__(self, folder: Path, driver: type[WithStates] = Moving) -> None:
        folder.mkdir(parents=True)
        self.folder, self.driver = folder, driver
        self.disk = Kept(folder / "checkpoints")
        self.entries: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self.wakes()

    def wakes(self) -> None:
        """A life of an agent begins."""
        async def bring(kind: str, reference: str, pull: str) -> str:
            return "memory"

        folder = CheckpointFolder(self.disk.folder)
        folder.tidy()
        self.moves = Moves(self.folder / "moves", folder)
        self.operations = Operations(self.disk, self._operate)
        self.runner = Runner({"memory": self.driver(self.disk)}, self.disk, bring, lambda: None, lambda: None, checkpoints=Checkpointing(folder, self.operations, BUDGET, moves=self.moves))
        self.operations.resume()

    def _operate(self, one: Mapping[str, Any]) -> None:
        self.runner.operate(one)

    async def again(self) -> None:
        """It is killed, and the next one begins, and is told the same."""
        self.disk.killed()
        await self.runner.close()
        self.disk.killed()
        self.wakes()
        await self.runner.take(self.entries)
        self.operations.take(self.asked)

    async def told(self, *entries: dict[str, Any]) -> None:
        """It shall run these."""
        self.entries = list(entries)
        await self.runner.take(self.entries)

    def asks(self, one: dict[str, Any]) -> None:
        """It shall do this part, and what it was asked before."""
        self.asked.append(one)
        self.operations.take(self.asked)

    def how(self, name: str) -> tuple[str, str]:
        """State and reason of an operation."""
        told = self.operations.get(name) or {}
        return str(told.get("state")), str(told.get("reason"))

    def running(self) -> list[Key]:
        """What runs."""
        return [key for key, status in self.disk.instances.items() if status.phase is Phase.RUNNING]


def part(kind: str, epoch: int = 1, **more: Any) -> dict[str, Any]:
    return asked(f"{MOVE}.{kind.removeprefix('move-')}", kind, epoch=epoch, name=MOVE, stop=kind == "move-out", offer={}, **more)


def coming(root: str) -> dict[str, Any]:
    return {**entry(W, 2), "from": {"move": MOVE, "root": root}, "held": False}


class Pair:
    """A source on which the witness has run, and a target."""

    def __init__(self, folder: Path) -> None:
        self.a, self.b = Node(folder / "a"), Node(folder / "b")
        self.count = 0

    async def start(self) -> None:
        await self.a.told(entry(W, 1, restart="always"))
        await self.b.told()
        await quiet()
        self.works()

    def works(self) -> None:
        """What runs does something; one copy at most does."""
        assert len(self.a.running()) + len(self.b.running()) <= 1
        for node in (self.a, self.b):
            for key in node.running():
                assert node.disk.memory[key] == self.count, "it goes on where it was"
            node.disk.work()
            self.count += len(node.running())

    def carry(self) -> None:
        """As the migration workers do."""
        name = f"{MOVE}.state"
        (self.b.folder / "moves" / name).write_bytes((self.a.folder / "moves" / name).read_bytes())

    async def until(self, node: Node, done: Callable[[], bool], kills: list[int]) -> None:
        """All that is under way is over, though the agent is killed after so many turns, and again."""
        for turns in kills:
            for _ in range(turns):
                await others_first()
                self.works()
            await node.again()
        for _ in range(3):  # what failed in passing is tried again
            await quiet()
            self.works()
        assert done()

    async def move(self, kills: Callable[[], list[int]], refuses: str = "") -> bool:
        """The whole of it, as the hub leads it; whether it came to the target."""
        a, b = self.a, self.b
        for node, kind, offer in ((a, "move-check", {}), (b, "move-room", {**OFFER, "kind": "container", "image": "i", "requests": {}, "document": {}}), (a, "move-out", {})):
            one = {**part(kind, 2 if kind == "move-room" else 1), "offer": offer}
            node.asks(one)
            await self.until(node, lambda node=node, one=one: node.how(one["id"])[0] in FINAL_STATES, kills())  # type: ignore[misc]
            assert node.how(one["id"]) == ("succeeded", "")
        assert not a.running() and a.disk.records[-1] == (W, 1, CHECKPOINTED)
        root = (a.operations.get(f"{MOVE}.out") or {})["detail"]["root"]
        self.carry()
        await a.told({**entry(W, 1, restart="always"), "held": True})
        if refuses:
            b.disk.failing.append(refuses)
        await b.told(coming(root))
        await self.until(b, lambda: any(record[:2] == (W, 2) and record[2] in ("running", "refused") for record in b.disk.records), kills())
        if (W, 2, "running") in b.disk.records:
            await b.told(entry(W, 2))
            await a.told(entry(W, 1, wanted="stopped"))
            await self.until(a, lambda: a.disk.records[-1] == (W, 1, "stopped"), kills())
            return True
        await b.told()
        await a.told(entry(W, 1, restart="always"))
        a.asks(part("move-back"))
        await self.until(a, lambda: a.how(f"{MOVE}.back")[0] in FINAL_STATES, kills())
        assert a.how(f"{MOVE}.back") == ("succeeded", "")
        return False


@given(st.lists(st.lists(st.integers(0, 25), max_size=2), min_size=6, max_size=6), st.sampled_from(("", "restore", "come_back")))
@settings(max_examples=50)
def test_whoever_is_killed_when_one_copy_runs_and_goes_on_where_it_was(kills: list[list[int]], refuses: str) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            pair, left = Pair(Path(folder)), list(kills)
            await pair.start()
            came = await pair.move(lambda: left.pop(0) if left else [], refuses)
            await quiet()
            pair.works()
            assert (pair.a.running(), pair.b.running()) == (([], [Key(W, 2)]) if came else ([Key(W, 1)], []))
            assert pair.a.disk.trouble == pair.b.disk.trouble == [] and pair.count > 1
            assert came or refuses, "nothing but a refusal of its target brings it back"
            for node, key in ((pair.a, Key(W, 1)), (pair.b, Key(W, 2))):
                assert node.disk.starts[key] <= 1
                assert [one.name for one in CheckpointFolder(node.disk.folder).all()] == []
                assert [one for one in os.listdir(node.folder / "moves") if node is pair.b] == []
                await node.runner.close()

    asyncio.run(run())


@pytest.mark.parametrize("step", range(5))
async def test_whoever_is_killed_at_each_turn_of_a_step_it_comes_to_its_target(tmp_path: Path, step: int) -> None:
    """Also between what is done and its record's being durable."""
    for turns in range(EVERY_TURN):
        pair, calls = Pair(tmp_path / f"{turns}"), iter(range(5))
        await pair.start()
        assert await pair.move(lambda turns=turns, calls=calls: [turns] if next(calls) == step else [])  # type: ignore[misc]
        assert pair.b.running() == [Key(W, 2)] and pair.b.disk.trouble == []
        for node in (pair.a, pair.b):
            await node.runner.close()


class Slow(Moving):
    """What comes back runs a while before it is seen to live, as a real one does."""

    seen = 0

    async def come_back(self, key: Key) -> Status:
        found = await super().come_back(key)
        for _ in range(30):
            await others_first()
        Slow.seen += 1
        return found


async def test_what_its_source_was_killed_at_while_it_looked_whether_it_lives_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "seen", 0)
    a = Node(tmp_path / "a", Slow)
    await a.told(entry(W, 1, restart="always"))
    await quiet()
    a.asks(part("move-out"))
    await quiet()
    a.asks(part("move-back"))
    while not a.running():
        await others_first()
    await a.again()
    await quiet()
    assert a.how(f"{MOVE}.back") == ("succeeded", "") and a.running() == [Key(W, 1)] and Slow.seen == 1
    await a.runner.close()


async def test_what_is_on_its_way_is_nobodys_but_the_hubs(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    await pair.start()
    pair.a.operations.take([part("move-out")])
    await quiet()
    pair.a.operations.take([asked("o-1", "restore"), asked("o-2", "delete-checkpoint", name=MOVE), asked("o-3", "checkpoint", name="x"), asked("o-4", "checkpoint", name="move-x")])
    await quiet()
    for name in ("o-1", "o-2", "o-3"):
        assert pair.a.how(name)[0] == "failed" and f"on its way to another node ({MOVE})" in pair.a.how(name)[1]
    assert not pair.a.running()
    await pair.a.again()
    await quiet()
    assert not pair.a.running(), "nor does another agent start it"
    pair.a.operations.take([part("move-back")])
    await quiet()
    assert pair.a.running() == [Key(W, 1)] and pair.a.disk.records[-1] == (W, 1, "running")
    pair.a.operations.take([asked("o-5", "checkpoint", name="move-x")])
    await quiet()
    assert "are for checkpoints that nobody asks for" in pair.a.how("o-5")[1]
    pair.works()
    await pair.a.runner.close()


async def test_where_it_cannot_come_back_its_state_stays_under_a_name_that_anybody_may_use(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    await pair.start()
    pair.a.operations.take([part("move-out")])
    await quiet()
    pair.a.disk.failing.append("come_back")
    pair.a.operations.take([part("move-back")])
    await quiet()
    assert pair.a.how(f"{MOVE}.back")[0] == "failed" and not pair.a.running() and [one.name for one in CheckpointFolder(pair.a.disk.folder).all()] == [f"{BACK}{MOVE}"]
    pair.a.operations.take([asked("o-1", "restore")])
    await quiet()
    assert pair.a.running() == [Key(W, 1)] and pair.a.disk.starts[Key(W, 1)] == 1
    pair.works()
    await pair.a.runner.close()


async def test_a_part_that_is_asked_for_in_vain_touches_nothing(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    await pair.start()
    pair.a.disk.failing += ["migrate_out"]
    pair.a.operations.take([part("move-check"), part("move-back")])
    await quiet()
    assert pair.a.how(f"{MOVE}.check")[0] == "failed" and pair.a.how(f"{MOVE}.back") == ("succeeded", ""), "what was not taken need not come back"
    assert pair.a.running() == [Key(W, 1)]
    pair.b.operations.take([part("move-room", 2)])
    await quiet()
    assert pair.b.how(f"{MOVE}.room") == ("failed", "offer: is none; move it from a node whose agent is of this version") and not pair.b.disk.instances
    pair.works()
    await pair.a.runner.close()


@pytest.mark.parametrize("what", ["absent", "another hash"])
async def test_a_state_that_is_not_the_one_is_refused_and_nothing_runs(tmp_path: Path, what: str) -> None:
    pair = Pair(tmp_path)
    await pair.start()
    pair.a.operations.take([part("move-out")])
    await quiet()
    if what == "another hash":
        pair.carry()
    await pair.b.told(coming("0" * 64))
    await quiet()
    assert pair.b.disk.records[-1] == (W, 2, "refused") and not pair.b.disk.instances and not CheckpointFolder(pair.b.disk.folder).all()
    for node in (pair.a, pair.b):
        await node.runner.close()


async def test_a_target_whose_disk_is_full_refuses_and_its_source_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, folder: Path, ahead: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(moves, "unpack", full)
    pair = Pair(tmp_path)
    await pair.start()
    assert not await pair.move(list)
    assert pair.a.running() == [Key(W, 1)] and not pair.b.disk.instances
    for node in (pair.a, pair.b):
        await node.runner.close()


async def test_an_agent_that_starts_what_is_held_is_seen(tmp_path: Path) -> None:
    """The negative control: the source forgets that its state was taken, and the target has it."""
    pair = Pair(tmp_path)
    await pair.start()
    pair.a.disk.stands.discard(W)
    pair.a.operations.take([part("move-out")])
    await quiet()
    root = (pair.a.operations.get(f"{MOVE}.out") or {})["detail"]["root"]
    pair.carry()
    await pair.b.told(coming(root))
    await quiet()
    pair.works()
    pair.a.operations.take([part("move-back")])
    await quiet()
    with pytest.raises(AssertionError):
        pair.works()
    for node in (pair.a, pair.b):
        await node.runner.close()


def state(folder: Path) -> Path:
    """A checkpoint's folder."""
    (folder / checkpoint_state.IMAGES).mkdir(parents=True)
    entries = []
    for name, data in ((checkpoint_state.DISK, b"disk"), ("images/core-1.img", b"core" * 1000)):
        with checkpoint_state.Writer(folder, name, "zlib") as target:
            target.write(data)
        entries.append(target.entry)
    checkpoint_state.seal(folder, DOCUMENT, entries, "zlib")
    return folder


def test_a_state_comes_as_it_left(tmp_path: Path) -> None:
    source = state(tmp_path / "state")
    size = pack(source, tmp_path / "one.state", checkpoint_state.read_manifest(source))
    assert size == (tmp_path / "one.state").stat().st_size and (tmp_path / "one.state").stat().st_mode & 0o777 == 0o600
    unpack(tmp_path / "one.state", tmp_path / "there")
    assert checkpoint_state.check(tmp_path / "there") == checkpoint_state.check(source)
    assert sorted(os.listdir(tmp_path)) == ["one.state", "state", "there"]


def tar(*entries: tuple[str, bytes, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, kind, data in entries:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(data)
            member.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            archive.addfile(member, io.BytesIO(data))
    return target.getvalue()


HOSTILE = [
    tar(("../out", tarfile.REGTYPE, b"x")), tar(("/etc/novacron-x", tarfile.REGTYPE, b"x")), tar(("images/../../out", tarfile.REGTYPE, b"x")), tar(("images", tarfile.SYMTYPE, b"")), tar(("images/a", tarfile.SYMTYPE, b"")),
    tar(("disk.tar", tarfile.LNKTYPE, b"")), tar(("images/a", tarfile.FIFOTYPE, b"")), tar(("images/a", tarfile.CHRTYPE, b"")), tar(("images/sub", tarfile.DIRTYPE, b"")), tar(("other", tarfile.REGTYPE, b"x")),
    tar(("images/a", tarfile.REGTYPE, b"x"), ("images/a", tarfile.REGTYPE, b"y")), b"", b"no tar" * 1000, tar(("images/a", tarfile.REGTYPE, b"x" * 5000))[:3000],
]


@pytest.mark.parametrize("data", HOSTILE)
def test_a_file_that_is_no_state_is_refused_and_leaves_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/one.state").write_bytes(data)
    with pytest.raises(Refused):
        unpack(tmp_path / "in/one.state", tmp_path / "in/there")
        checkpoint_state.read_manifest(tmp_path / "in/there")
    assert os.listdir(tmp_path) == ["in"] and set(os.listdir(tmp_path / "in")) <= {"one.state", "there"}


@given(st.data())
@settings(max_examples=60)
def test_a_state_with_a_wrong_bit_is_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        source = state(folder / "state")
        pack(source, folder / "one.state", checkpoint_state.read_manifest(source))
        raw = bytearray((folder / "one.state").read_bytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        (folder / "one.state").write_bytes(raw)
        try:
            unpack(folder / "one.state", folder / "there")
            found = checkpoint_state.check(folder / "there")
        except Refused:
            return
        assert found == checkpoint_state.check(source), "the bit was one that no file has"
