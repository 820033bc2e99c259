"""The runner with operations, against a driver in memory that has states: whoever is killed when, one copy at most runs, what is checkpointed is never begun anew, and each operation is done and told once.

An instance works: its memory is a number, and a state has that of the moment when it was taken. So a copy that began anew, or went on from too early, is seen.
"""

import asyncio
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract.operations import FINAL_STATES
from edge_runtime.contract.workloads import CHECKPOINTED
from edge_runtime.workloads import runner as runners
from edge_runtime.workloads.checkpoints import CheckpointFolder, Checkpointing
from edge_runtime.workloads.drivers import checkpoint_state
from edge_runtime.workloads.drivers.face import Ability, Capabilities, Exit, Failed, Key, Order, Phase, Refused, Status
from edge_runtime.workloads.operations import KEPT, Operations
from edge_runtime.workloads.runner import REPORTED, Runner

from .test_checkpoint_state import DOCUMENT
from .test_runner import Disk, InMemory, entry, others_first, quiet

EPOCH = 1
A = Key("a", EPOCH)
BUDGET = 1 << 30


COMMIT = 8
"""Turns that a commit takes."""


class Kept(Disk):
    """A disk with states. What is journalled is durable, and heard of, some turns later, all that came meanwhile at once; what is not when its agent is killed has never been."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.memory: dict[Key, int] = {}
        self.operations: list[tuple[str, str, str]] = []
        self.done: set[str] = set()
        """Names of states that became whole."""
        self.stands: set[str] = set()
        """Workloads that a checkpoint has ended, and nothing has brought back: the test's own view of who shall not begin anew."""
        self._waits: list[Callable[[], None]] = []
        self._life, self._commits = 0, False

    def append(self, stream: str, kind: str, body: dict[str, Any]) -> None:
        self._write(lambda: self._appended(stream, kind, body))

    def _appended(self, stream: str, kind: str, body: dict[str, Any]) -> None:
        super().append(stream, kind, body)
        if kind == "operation":
            self.operations.append((body["id"], body["state"], body["reason"]))

    def put_state(self, key: str, value: Any, on_durable: Callable[[], None] | None = None) -> None:
        self._write(lambda: self.documents.update({key: value}))
        if on_durable is not None:
            self._write(on_durable)

    def _write(self, what: Callable[[], None]) -> None:
        self._waits.append(what)
        if not self._commits:
            self._commits = True
            asyncio.get_running_loop().call_soon(self._commit, self._life)

    def _commit(self, life: int) -> None:
        if life == self._life:
            group, self._waits = self._waits, []
            self._end(life, group, COMMIT)

    def _end(self, life: int, group: list[Callable[[], None]], turns: int) -> None:
        if life != self._life:
            return
        if turns:
            asyncio.get_running_loop().call_soon(self._end, life, group, turns - 1)
            return
        for one in group:
            one()
        if self._waits:
            self._commit(life)
        else:
            self._commits = False

    def killed(self) -> None:
        """Its agent was: what is not durable never will be."""
        self._waits, self._commits, self._life = [], False, self._life + 1

    def lose(self, key: Key) -> None:
        """The machine restarted."""
        self.instances[key] = Status(key, Phase.LOST, reason="the machine restarted")
        self.ended[key].set()

    def work(self) -> None:
        for key, status in self.instances.items():
            if status.phase is Phase.RUNNING:
                self.memory[key] += 1


class WithStates(InMemory):
    """Has states. What `take` has given its name ends its instance also where the agent was killed in between, as a real driver's probe sees to."""

    taken = Phase.CHECKPOINTED
    """How an instance stands whose state has ended it."""

    _disk: Kept

    cannot: Mapping[Ability, str] = {}

    def demand(self, ability: Ability) -> None:
        Capabilities("memory", "container", "", "", (), "none", "", self.cannot).demand(ability)

    async def prepare(self, order: Order) -> Status:
        if order.key.id in self._disk.stands:
            self._disk.trouble.append(f"{order.key.id} stands in a checkpoint, and begins anew")
        return await super().prepare(order)

    async def start(self, key: Key) -> Status:
        before = (await self.status(key)).phase
        found = await super().start(key)
        if before is Phase.PREPARED:
            self._disk.memory[key] = 0
        return found

    async def checkpoint(self, key: Key, folder: Path, *, leave_running: bool) -> Mapping[str, Any]:
        status = await self.status(key)
        if status.phase is not Phase.RUNNING:
            raise Refused("id", "it does not run", "start it")
        await self._step("checkpoint")
        if self._disk.instances[key].phase is not Phase.RUNNING:
            raise Failed("checkpoint", "it ended meanwhile", "see why")
        new = folder.with_name(f".{folder.name}.new")
        (new / checkpoint_state.IMAGES).mkdir(parents=True, exist_ok=True)
        with checkpoint_state.Writer(new, checkpoint_state.DISK, "zlib") as target:
            target.write(b"")
        order = {"id": key.id, "epoch": key.epoch, "image": "i", "requests": {}, "spec": {}, "job": False}
        manifest = checkpoint_state.seal(new, {**DOCUMENT, "kind": "memory", "order": order, "taken_ms": len(self._disk.done), "memory": self._disk.memory[key]}, [target.entry], "zlib")
        new.rename(folder)
        self._disk.done.add(folder.name)
        if not leave_running:
            self._disk.instances[key] = Status(key, self.taken, exit=Exit(137, 9), reason="its state was taken")
            self._disk.ended[key].set()
            self._disk.stands.add(key.id)
        for _ in range(3):
            await others_first()
        return manifest

    async def examine(self, folder: Path) -> Mapping[str, Any]:
        await self._step("examine")
        return checkpoint_state.read_manifest(folder)

    def folder(self, key: Key) -> Path:
        return self._disk.folder / ".nowhere"

    async def restore(self, order: Order, folder: Path, *, output: Path | None = None) -> Status:
        if order.key in self._disk.instances:
            raise Refused("id", "there is one already", "delete it")
        await self._step("restore")
        self._disk.instances[order.key] = Status(order.key, Phase.PREPARED)
        self._disk.memory[order.key] = checkpoint_state.read_manifest(folder)["memory"]
        return await self.come_back(order.key)

    async def come_back(self, key: Key) -> Status:
        if (await self.status(key)).phase is Phase.PREPARED:
            for _ in range(3):
                await others_first()
            if "come_back" in self._disk.failing:
                self._disk.failing.remove("come_back")
                del self._disk.instances[key]
                raise Failed("restore", "planted", "none")
            self._disk.ended[key] = asyncio.Event()
            self._disk.instances[key] = Status(key, Phase.RUNNING, 1)
            self._disk.stands.discard(key.id)
        return self._disk.instances[key]


class Agent:
    """One life of an agent on a disk."""

    def __init__(self, disk: Kept, driver: type[WithStates] = WithStates) -> None:
        async def bring(kind: str, reference: str, pull: str) -> str:
            return "memory"

        folder = CheckpointFolder(disk.folder)
        folder.tidy()
        self.operations = Operations(disk, self._operate)
        self.runner = Runner({"memory": driver(disk)}, disk, bring, lambda: None, lambda: None, checkpoints=Checkpointing(folder, self.operations, BUDGET))
        self.operations.resume()

    def take_one(self) -> None:
        """It is time for a checkpoint that nobody asks for."""
        self.runner._taking[f"a/{EPOCH}/running"] = 0.0
        if "a" in self.runner._changed:
            self.runner._changed["a"].set()

    def _operate(self, entry: Mapping[str, Any]) -> None:
        self.runner.operate(entry)


def asked(operation: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"id": operation, "kind": kind, "workload": "a", "epoch": EPOCH, "name": "", "stop": False, "expires_ms": 1, **more}


@pytest.fixture(autouse=True)
def in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What blocks is done at once: `quiet` sees the loop, and no thread."""
    async def at_once(what: Callable[..., Any], *args: Any) -> Any:
        await others_first()
        return what(*args)

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    monkeypatch.setattr(runners, "AGAIN_S", 0.0)
    monkeypatch.setattr(runners, "pause_s", lambda _: 0.0)
    monkeypatch.setattr(runners.log, "log", lambda *_, **__: None)


KINDS = st.one_of(
    st.fixed_dictionaries({"kind": st.just("checkpoint"), "stop": st.booleans(), "name": st.sampled_from(("", "x", "y"))}),
    st.fixed_dictionaries({"kind": st.just("restore"), "name": st.sampled_from(("", "x"))}),
    st.fixed_dictionaries({"kind": st.just("delete-checkpoint"), "name": st.sampled_from(("x", "y"))}),
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), KINDS), st.tuples(st.just("ask"), KINDS), st.tuples(st.just("turns"), st.integers(1, 40)), st.tuples(st.just("kill"), st.none()), st.tuples(st.just("quiet"), st.none()),
        st.tuples(st.just("finish"), st.integers(0, 1)), st.tuples(st.just("fail"), st.sampled_from(("checkpoint", "restore", "come_back", "delete", "examine", "start"))), st.tuples(st.just("unwant"), st.none()),
        st.tuples(st.just("lose"), st.none()), st.tuples(st.just("auto"), st.none()),
    ), max_size=14,
)


async def live(events: list[tuple[str, Any]], restart: str, driver: type[WithStates] = WithStates, **spec: Any) -> Kept:
    with tempfile.TemporaryDirectory() as folder:
        disk = Kept(Path(folder))
        agent, now = Agent(disk, driver), [entry("a", EPOCH, restart=restart, **spec)]
        listed: list[dict[str, Any]] = []
        await agent.runner.take(now)
        for what, value in events:
            if what == "ask":
                listed.append(asked(f"o-{len(listed)}", **value))
                agent.operations.take(listed)
            elif what == "turns":
                for _ in range(value):
                    await others_first()
                    disk.work()
            elif what == "quiet":
                await quiet()
                disk.work()
            elif what == "finish" and A in disk.instances and disk.instances[A].phase is Phase.RUNNING:
                disk.finish(A, value)
            elif what == "lose" and A in disk.instances and disk.instances[A].phase is Phase.RUNNING:
                disk.lose(A)
            elif what == "auto":
                agent.take_one()
            elif what == "fail":
                disk.failing.append(value)
            elif what == "unwant":
                now = []
                await agent.runner.take(now)
            elif what == "kill":
                disk.killed()
                await agent.runner.close()
                disk.killed()
                agent = Agent(disk, driver)
                await agent.runner.take(now)
                agent.operations.take(listed)
        disk.failing.clear()
        await agent.runner.take(now)
        await quiet()
        check(disk, now, [one["id"] for one in listed])
        await agent.runner.close()
        return disk


def check(disk: Kept, now: list[dict[str, Any]], names: list[str]) -> None:
    assert disk.trouble == []
    states = {name: [state for one, state, _ in disk.operations if one == name] for name in names}
    for name, told in states.items():
        assert len(told) == 2 and told[0] == "running" and told[1] in FINAL_STATES, (name, told)
    kept = disk.documents.get(KEPT) or {}
    assert all(row["operation"]["state"] in FINAL_STATES for row in kept.values())
    found = CheckpointFolder(disk.folder)
    if not now:
        assert disk.instances == {} and found.all() == []
        return
    told = (disk.documents.get(REPORTED) or {}).get(f"a/{EPOCH}/running")
    phase = disk.instances[A].phase if A in disk.instances else None
    if told not in ("done", "failed", "refused"):
        assert (phase, told) in ((Phase.RUNNING, "running"), (Phase.CHECKPOINTED, CHECKPOINTED), (None, CHECKPOINTED)), (phase, told)
    if told == CHECKPOINTED:
        assert found.all("a"), "its state is there"


@given(EVENTS, st.sampled_from(("never", "on-failure", "always")), st.sampled_from((None, {"every_s": 3600})))
@settings(max_examples=200)
def test_whoever_is_killed_when_one_copy_runs_and_each_operation_is_done_once(events: list[tuple[str, Any]], restart: str, checkpoint: Any) -> None:
    asyncio.run(live(events, restart, checkpoint=checkpoint))


class Forgetful(WithStates):
    """The planted fault: what a checkpoint has ended looks like what has failed."""

    taken = Phase.ENDED


def test_the_test_sees_what_begins_anew_after_its_state_was_taken() -> None:
    events = [("quiet", None), ("ask", {"kind": "checkpoint", "stop": True, "name": "x"}), ("quiet", None)]
    with pytest.raises(AssertionError, match="begins anew"):
        asyncio.run(live(events, "always", Forgetful))
    disk = asyncio.run(live(events, "always"))
    assert disk.instances[A].phase is Phase.CHECKPOINTED and disk.memory[A] > 0


async def test_it_goes_on_from_where_it_was_and_says_so(tmp_path: Path) -> None:
    disk = Kept(tmp_path)
    agent = Agent(disk)
    await agent.runner.take([entry("a", EPOCH, restart="always")])
    await quiet()
    disk.work()
    agent.operations.take([asked("o-1", "checkpoint", name="x", stop=True)])
    await quiet()
    assert disk.records[-1] == ("a", EPOCH, CHECKPOINTED) and disk.instances[A].phase is Phase.CHECKPOINTED
    agent.operations.take([asked("o-2", "delete-checkpoint", name="x"), asked("o-3", "restore")])
    await quiet()
    assert [one[:2] for one in disk.operations] == [("o-1", "running"), ("o-1", "succeeded"), ("o-2", "running"), ("o-3", "running"), ("o-2", "failed"), ("o-3", "succeeded")]
    assert "this is its state" in disk.operations[4][2]
    assert disk.records[-2:] == [("a", EPOCH, CHECKPOINTED), ("a", EPOCH, "running")] and (disk.memory[A], disk.starts[A]) == (1, 1)
    agent.operations.take([asked("o-4", "delete-checkpoint", name="x"), asked("o-5", "restore"), asked("o-6", "checkpoint", epoch=2), asked("o-1", "checkpoint", name="x", stop=True)])
    await quiet()
    assert [one[:2] for one in disk.operations[-6:] if one[1] != "running"] == [("o-4", "succeeded"), ("o-5", "failed"), ("o-6", "failed")], "what was done is not done again"
    await agent.runner.close()


async def test_one_that_came_too_late_is_not_begun_and_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    disk = Kept(tmp_path)
    begun: list[str] = []
    operations = Operations(disk, lambda one: begun.append(one["id"]))
    operations.take([asked("late", "checkpoint")], {"late"})
    await quiet()
    assert begun == [] and disk.operations == [("late", "expired", "expired before it arrived")]
    for at in range(300):
        operations.take([asked(f"o-{at}", "checkpoint")])
        await quiet()
        with suppress(KeyError):
            operations.end(f"o-{at}", "succeeded")
    assert len(begun) == 300 and len(disk.documents[KEPT]) <= 129


async def test_a_checkpoint_over_the_budget_is_refused_before_anything_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Kept(tmp_path)
    agent = Agent(disk)
    await agent.runner.take([entry("a", EPOCH)])
    await quiet()
    agent.operations.take([asked("o-1", "checkpoint")])
    await quiet()
    agent.runner._checkpoints._budget = 0  # type: ignore[union-attr]
    agent.operations.take([asked("o-2", "checkpoint")])
    await quiet()
    assert disk.operations[-1][:2] == ("o-2", "failed") and "raise workloads.images_bytes" in disk.operations[-1][2]
    assert disk.instances[A].phase is Phase.RUNNING and Counter(one.name for one in CheckpointFolder(tmp_path).all()) == {"o-1": 1}
    await agent.runner.close()


@pytest.mark.parametrize("killed", [False, True])
async def test_what_is_lost_with_its_machine_goes_on_from_the_checkpoint_that_nobody_asked_for(tmp_path: Path, killed: bool) -> None:
    disk, now = Kept(tmp_path), [entry("a", EPOCH, checkpoint={"every_s": 3600})]
    agent = Agent(disk)
    await agent.runner.take(now)
    await quiet()
    for _ in range(2):
        disk.work()
        agent.take_one()
        await quiet()
    [kept] = CheckpointFolder(tmp_path).all()
    assert kept.name.startswith("auto-"), "the newest one alone is kept"
    disk.work()
    assert disk.memory[A] == 3
    if killed:
        await agent.runner.close()
    disk.lose(A)
    if killed:
        agent = Agent(disk)
        await agent.runner.take(now)
    await quiet()
    assert disk.instances[A].phase is Phase.RUNNING and (disk.memory[A], disk.starts[A]) == (2, 1)
    assert [state for *_, state in disk.records] == ["accepted", "running", CHECKPOINTED, "running"]
    await agent.runner.close()


async def test_without_one_it_is_lost_as_before(tmp_path: Path) -> None:
    """The negative control: no checkpoint was taken yet; and none is taken where the document asks for none."""
    for spec in ({"checkpoint": {"every_s": 3600}}, {}):
        disk = Kept(tmp_path)
        agent = Agent(disk)
        await agent.runner.take([entry("a", EPOCH, **spec)])
        await quiet()
        if not spec:
            agent.take_one()
            await quiet()
        disk.lose(A)
        await quiet()
        assert disk.records[-1] == ("a", EPOCH, "failed") and CheckpointFolder(tmp_path).all() == []
        await agent.runner.close()


async def test_one_that_cannot_be_brought_back_stays_checkpointed_and_is_tried_once(tmp_path: Path) -> None:
    disk = Kept(tmp_path)
    agent = Agent(disk)
    await agent.runner.take([entry("a", EPOCH, checkpoint={"every_s": 3600}, restart="always")])
    await quiet()
    agent.take_one()
    await quiet()
    disk.failing += ["restore"]
    disk.lose(A)
    await quiet()
    assert A not in disk.instances and disk.records[-1][2] == CHECKPOINTED and disk.operations[-1][1] == "failed" and disk.starts[A] == 1
    agent.operations.take([asked("o-again", "restore")])
    await quiet()
    assert disk.instances[A].phase is Phase.RUNNING and disk.records[-1][2] == "running"
    await agent.runner.close()


@pytest.mark.parametrize(("checkpoint", "cannot"), [(5, {}), ({"every_s": 1}, {}), ({"every_s": True}, {}), ({"every_s": 60, "x": 1}, {}), ({"every_s": 60}, {Ability.CHECKPOINT: "no CRIU"})])
async def test_checkpoints_that_cannot_be_had_are_a_refusal_before_anything_is_laid_out(tmp_path: Path, checkpoint: Any, cannot: dict[Ability, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WithStates, "cannot", cannot)
    disk = Kept(tmp_path)
    agent = Agent(disk)
    await agent.runner.take([entry("a", EPOCH, checkpoint=checkpoint)])
    await quiet()
    assert disk.records[-1] == ("a", EPOCH, "refused") and disk.instances == {}
    await agent.runner.close()
