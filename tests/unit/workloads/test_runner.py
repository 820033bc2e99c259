"""The runner against a driver in memory, whose disk outlives the runner: whatever is wanted, whatever ends, fails or is restarted when, what runs is what is wanted, once, and is told once."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.workloads import runner as runners
from edge_runtime.workloads.drivers.face import Capabilities, Exit, Failed, Key, Order, Phase, Refused, Status
from edge_runtime.workloads.runner import REPORTED, Runner

TURNS_MAX = 10_000
"""Turns of the loop after which something goes round in circles."""


class Disk:
    """What outlives an agent: instances, and what was journalled."""

    def __init__(self) -> None:
        self.instances: dict[Key, Status] = {}
        self.ended: dict[Key, asyncio.Event] = {}
        self.starts: Counter[Key] = Counter()
        self.records: list[tuple[str, int, str]] = []
        self.documents: dict[str, Any] = {}
        self.failing: list[str] = []
        self.trouble: list[str] = []
        self.news = asyncio.Event()
        """Set with each record of a workload."""

    def append(self, stream: str, kind: str, body: dict[str, Any]) -> None:
        if kind == "workload":
            self.records.append((body["id"], body["epoch"], body["state"]))
            self.news.set()

    def state(self, key: str) -> Any:
        return self.documents.get(key)

    def put_state(self, key: str, value: Any) -> None:
        self.documents[key] = value

    def finish(self, key: Key, code: int) -> None:
        self.instances[key] = Status(key, Phase.ENDED, exit=Exit(code))
        self.ended[key].set()


class InMemory:
    """A driver; every operation lets others go first, and fails once where its name is in `failing`."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    async def _step(self, what: str) -> None:
        for _ in range(3):
            await others_first()
        if what in self._disk.failing:
            self._disk.failing.remove(what)
            raise Failed(what, "planted", "none")

    async def probe(self) -> Capabilities:
        raise AssertionError

    async def prepare(self, order: Order) -> Status:
        await self._step("prepare")
        if order.spec.get("bad"):
            raise Refused("spec.bad", "planted", "none")
        return self._disk.instances.setdefault(order.key, Status(order.key, Phase.PREPARED))

    async def start(self, key: Key) -> Status:
        status = await self.status(key)
        if status.phase is Phase.PREPARED:
            await self._step("start")
            if any(other.id == key.id and other != key and there.phase is Phase.RUNNING for other, there in self._disk.instances.items()):
                self._disk.trouble.append(f"two epochs of {key.id} run")
            self._disk.starts[key] += 1
            self._disk.ended[key] = asyncio.Event()
            self._disk.instances[key] = Status(key, Phase.RUNNING, 1)
        return self._disk.instances[key]

    async def wait(self, key: Key) -> Status:
        await self._disk.ended[key].wait()
        return self._disk.instances[key]

    async def stop(self, key: Key, grace_s: float) -> Status:
        await self._step("stop")
        if self._disk.instances[key].phase is Phase.RUNNING:
            self._disk.finish(key, 143)
        return self._disk.instances[key]

    async def status(self, key: Key) -> Status:
        if key not in self._disk.instances:
            raise Refused("id", "is not here", "prepare it")
        return self._disk.instances[key]

    async def instances(self) -> Sequence[Status]:
        await self._step("instances")
        return list(self._disk.instances.values())

    async def delete(self, key: Key) -> None:
        await self._step("delete")
        if key in self._disk.instances and self._disk.instances[key].phase is Phase.RUNNING:
            self._disk.finish(key, 137)
        self._disk.instances.pop(key, None)


async def others_first() -> None:
    """Until everybody who could go on had a turn."""
    loop = asyncio.get_running_loop()
    turn = loop.create_future()
    loop.call_soon(turn.set_result, None)
    await turn


async def quiet() -> None:
    """Until nobody can go on: each task waits for something that only the test, or a clock, brings."""
    loop = asyncio.get_running_loop()
    settled = loop.create_future()

    def look(turns: int) -> None:
        if not loop._ready:  # type: ignore[attr-defined]  # asyncio tells nobody what stands in its queue
            settled.set_result(None)
        elif turns == 0:
            settled.set_exception(AssertionError(f"still busy after {TURNS_MAX} turns"))
        else:
            loop.call_soon(look, turns - 1)

    loop.call_soon(look, TURNS_MAX)
    await settled


def entry(workload: str, epoch: int, wanted: str = "running", **spec: Any) -> dict[str, Any]:
    return {"id": workload, "epoch": epoch, "wanted": wanted, "kind": "container", "image": "i", "requests": {"cpu": 1}, "document": {"spec": spec}}


def made(disk: Disk, driver: type[InMemory] = InMemory) -> Runner:
    async def bring(kind: str, reference: str, pull: str) -> str:
        """The image is there."""
        return "memory"

    return Runner({"memory": driver(disk)}, disk, bring, lambda: None, lambda: None)


WANTED = st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 3), st.sampled_from(("running", "stopped"))), max_size=4, unique_by=lambda one: one[:2])
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), WANTED), st.tuples(st.just("finish"), st.integers(0, 1)), st.tuples(st.just("restart"), st.none()), st.tuples(st.just("hurry"), WANTED),
        st.tuples(st.just("fail"), st.sampled_from(("start", "stop", "delete", "prepare"))),
    ), max_size=10,
)
ENDS = {"refused", "stopped", "done", "failed"}


async def live(events: list[tuple[str, Any]], driver: type[InMemory] = InMemory) -> Disk:
    disk = Disk()
    runner, now = made(disk, driver), []
    for what, value in events:
        if what in ("take", "hurry"):
            now = [entry(*one) for one in value]
            await runner.take(now)
        elif what == "finish":
            for key, status in list(disk.instances.items()):
                if status.phase is Phase.RUNNING:
                    disk.finish(key, value)
                    break
        elif what == "fail":
            disk.failing.append(value)
        else:
            await runner.close()
            runner = made(disk, driver)
            await runner.take(now)
        if what != "hurry":
            await quiet()
    disk.failing.clear()
    await runner.take(now)
    await quiet()
    await quiet()
    check(disk, now)
    await runner.close()
    return disk


def check(disk: Disk, now: list[dict[str, Any]]) -> None:
    assert disk.trouble == []
    newest = {one["id"]: one["epoch"] for one in sorted(now, key=lambda one: one["epoch"]) if one["wanted"] == "running"}
    told = disk.documents.get(REPORTED) or {}
    for workload, epoch in newest.items():
        ended = told.get(f"{workload}/{epoch}/running") in ENDS
        phase = disk.instances[Key(workload, epoch)].phase if Key(workload, epoch) in disk.instances else None
        assert ended or phase is Phase.RUNNING, (workload, epoch, phase)
    assert {key for key, status in disk.instances.items() if status.phase is Phase.RUNNING} <= {Key(*one) for one in newest.items()}
    for one in now:
        if one["wanted"] == "stopped":
            assert (one["id"], one["epoch"], "stopped") in disk.records
    assert set(told) <= {f"{one['id']}/{one['epoch']}/{one['wanted']}" for one in now}


@given(EVENTS)
@settings(max_examples=150)
def test_what_runs_is_what_is_wanted(events: list[tuple[str, Any]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "AGAIN_S", 0.0)
        patch.setattr(runners.log, "log", lambda *_, **__: None)
        asyncio.run(live(events))


async def test_each_is_told_once_over_restarts_and_nothing_is_started_again() -> None:
    disk = Disk()
    runner = made(disk)
    now = [entry("a", 1), entry("b", 1), entry("c", 1, bad=True)]
    await runner.take(now)
    await quiet()
    disk.finish(Key("b", 1), 0)
    await quiet()
    for _ in range(3):
        await runner.close()
        runner = made(disk)
        await runner.take(now)
        await quiet()
    assert Counter(disk.records) == Counter([("a", 1, "accepted"), ("a", 1, "running"), ("b", 1, "accepted"), ("b", 1, "running"), ("b", 1, "done"), ("c", 1, "accepted"), ("c", 1, "refused")])
    assert disk.starts == {Key("a", 1): 1, Key("b", 1): 1}
    disk.finish(Key("a", 1), 2)
    await quiet()
    assert disk.records[-1] == ("a", 1, "failed")
    await runner.take([])
    await quiet()
    assert disk.instances == {} and disk.documents[REPORTED] == {}
    await runner.close()


async def ends_before_it_is_refused(disk: Disk) -> None:
    """Until `a` is told as refused; what cannot be stopped runs, and is not."""
    while ("a", 1, "refused") not in disk.records:
        disk.news.clear()
        assert disk.instances[Key("a", 1)].phase is Phase.RUNNING or disk.failing == []
        await asyncio.wait_for(disk.news.wait(), 10)


async def test_what_is_evicted_ends_is_told_as_refused_then_and_is_not_started_again() -> None:
    disk = Disk()
    runner = made(disk)
    now = [entry("a", 1), entry("b", 1)]
    await runner.take(now)
    await quiet()
    running = {one["id"]: one for one, _ in await runner.running()}
    assert set(running) == {"a", "b"}
    runner.evict(running["a"], "evicted: no room")
    assert ("a", 1, "refused") not in disk.records, "not before it has ended"
    assert [one["id"] for one, _ in await runner.running()] == ["b"], "who is being ended is nobody's choice again"
    await quiet()
    assert disk.records[-1] == ("a", 1, "refused") and set(disk.instances) == {Key("b", 1)}
    await runner.close()
    runner = made(disk)
    await runner.take(now)
    await quiet()
    assert set(disk.instances) == {Key("b", 1)} and disk.starts == {Key("a", 1): 1, Key("b", 1): 1}
    await runner.take([entry("a", 2), *now[1:]])
    await quiet()
    assert set(disk.instances) == {Key("a", 2), Key("b", 1)}, "another placement is another matter"
    await runner.close()


async def test_one_that_cannot_be_stopped_is_not_told_as_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "AGAIN_S", 0.0)
    monkeypatch.setattr(runners.log, "log", lambda *_, **__: None)
    disk = Disk()
    runner = made(disk)
    await runner.take([entry("a", 1)])
    await quiet()
    disk.failing += ["stop", "delete"]
    ((one, _),) = await runner.running()
    runner.evict(one, "evicted: no room")
    await ends_before_it_is_refused(disk)
    assert disk.instances == {} and disk.failing == []
    await runner.close()


async def test_what_an_earlier_agent_ran_and_no_driver_can_run_now_ends_before_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a probe that failed: the hub places it elsewhere once it hears."""
    monkeypatch.setattr(runners, "AGAIN_S", 0.0)
    monkeypatch.setattr(runners.log, "log", lambda *_, **__: None)
    disk = Disk()
    runner = made(disk)
    await runner.take([entry("a", 1)])
    await quiet()
    await runner.close()
    disk.failing += ["stop", "delete"]
    runner = made(disk)
    await runner.take([{**entry("a", 1), "refusal": "no driver"}, {**entry("b", 1), "refusal": "no driver"}])
    await ends_before_it_is_refused(disk)
    await quiet()
    assert disk.instances == {} and disk.failing == [] and ("b", 1, "refused") in disk.records and disk.starts == {Key("a", 1): 1}
    await runner.close()


async def test_nothing_new_starts_while_the_node_is_short_and_what_runs_stays() -> None:
    disk, short = Disk(), [""]

    async def bring(kind: str, reference: str, pull: str) -> str:
        return "memory"

    runner = Runner({"memory": InMemory(disk)}, disk, bring, lambda: None, lambda: None, short=lambda: short[0])
    await runner.take([entry("a", 1)])
    await quiet()
    short[0] = "is short of memory"
    await runner.take([entry("a", 1), entry("b", 1)])
    await quiet()
    assert disk.records[-1] == ("b", 1, "refused") and set(disk.instances) == {Key("a", 1)}
    await runner.close()


async def test_an_epoch_starts_when_the_one_before_it_has_ended() -> None:
    disk = Disk()
    runner = made(disk)
    await runner.take([entry("a", 1)])
    await quiet()
    await runner.take([entry("a", 2), entry("a", 1, "stopped")])
    await quiet()
    assert disk.records == [("a", 1, "accepted"), ("a", 1, "running"), ("a", 1, "stopped"), ("a", 2, "accepted"), ("a", 2, "running")] and list(disk.instances) == [Key("a", 2)]
    await runner.close()


async def test_what_cannot_be_stopped_is_not_told_as_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    again = asyncio.Event()

    async def wait_for(waiting: Any, seconds: float) -> None:
        waiting.close()
        await again.wait()
        raise TimeoutError

    monkeypatch.setattr(runners.asyncio, "wait_for", wait_for)
    disk = Disk()
    runner = made(disk)
    await runner.take([entry("a", 1)])
    await quiet()
    disk.failing.append("stop")
    await runner.take([entry("a", 1, "stopped"), entry("a", 2)])
    await quiet()
    assert disk.records == [("a", 1, "accepted"), ("a", 1, "running")] and list(disk.instances) == [Key("a", 1)]
    again.set()
    await quiet()
    assert disk.records[2:] == [("a", 1, "stopped"), ("a", 2, "accepted"), ("a", 2, "running")]
    await runner.close()


class Careless(InMemory):
    """The control: says that it stopped what it did not."""

    async def stop(self, key: Key, grace_s: float) -> Status:
        return self._disk.instances[key]

    async def delete(self, key: Key) -> None:
        await self._step("delete")


async def test_control_a_driver_that_stops_nothing_is_caught() -> None:
    with pytest.raises(AssertionError):
        await live([("take", [("a", 1, "running")]), ("take", [("a", 2, "running")])], Careless)


class Underway(InMemory):
    """A start that an earlier agent began is still under way at the first two looks."""

    async def start(self, key: Key) -> Status:
        self._disk.trouble.append("looked")
        return await super().start(key) if len(self._disk.trouble) > 2 else await self.status(key)


async def test_a_start_that_is_under_way_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "LOOK_S", 0.0)
    disk = Disk()
    runner = made(disk, Underway)
    await runner.take([entry("a", 1)])
    await quiet()
    assert disk.records == [("a", 1, "accepted"), ("a", 1, "running")] and disk.starts == {Key("a", 1): 1}
    await runner.close()
    monkeypatch.setattr(runners, "LOOKS", 2)  # and not for ever
    disk = Disk()
    runner = made(disk, Underway)
    await runner.take([entry("a", 1)])
    await quiet()
    assert disk.records == [("a", 1, "accepted"), ("a", 1, "failed")] and disk.instances == {}
    await runner.close()


async def test_what_waits_for_its_image_ends_when_it_is_not_wanted_any_more() -> None:
    disk, asked, cancelled = Disk(), asyncio.Event(), asyncio.Event()

    async def bring(kind: str, reference: str, pull: str) -> str:
        asked.set()
        try:
            await asyncio.get_running_loop().create_future()  # a registry that never answers
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return "memory"

    runner = Runner({"memory": InMemory(disk)}, disk, bring, lambda: None, lambda: None)
    await runner.take([entry("a", 1)])
    await asked.wait()
    await runner.take([entry("a", 1, "stopped")])
    await cancelled.wait()
    await quiet()
    assert disk.records[-1] == ("a", 1, "stopped") and disk.instances == {} and "a" not in runner._tasks
    await runner.close()


async def test_a_wrong_pull_is_refused_by_name() -> None:
    disk = Disk()
    runner = made(disk)
    await runner.take([entry("a", 1, pull="sometimes")])
    await quiet()
    assert disk.records == [("a", 1, "accepted"), ("a", 1, "refused")]
    await runner.close()
