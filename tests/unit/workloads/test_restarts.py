"""What has ended is started again as its document says, no more often, later each time, also where the agent is restarted between two tries; several drivers side by side."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.workloads import restarts
from edge_runtime.workloads import runner as runners
from edge_runtime.workloads.drivers.face import Exit, Key, Order, Phase, Refused, Status
from edge_runtime.workloads.restarts import FIRST_S, LONGEST_S, STABLE_MS, pause_s, policy
from edge_runtime.workloads.runner import TRIES, Runner

from .test_runner import Disk, InMemory, made, quiet

KEY = Key("a", 1)


def entry(kind: str = "container", **spec: Any) -> dict[str, Any]:
    return {"id": "a", "epoch": 1, "wanted": "running", "kind": kind, "image": "i", "document": {"spec": spec}}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pauses are asked for and not waited for; returns after how many tries each was."""
    asked: list[int] = []
    monkeypatch.setattr(runners, "pause_s", lambda tries: asked.append(tries) or 0.0)  # type: ignore[func-returns-value]
    return asked


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_pauses_grow_and_are_bounded(one: int, two: int) -> None:
    low, high = sorted((one, two))
    assert FIRST_S <= pause_s(low) <= pause_s(high) <= LONGEST_S


@pytest.mark.parametrize(("kind", "spec", "says"), [
    ("container", {"restart": "sometimes"}, "spec.restart"), ("batch", {"restart": "always"}, "has no end"), ("batch", {"retries": -1}, "spec.retries"), ("batch", {"retries": True}, "spec.retries"),
    ("container", {"deadline_s": 5}, "spec.deadline_s"), ("batch", {"deadline_s": "5"}, "spec.deadline_s"), ("batch", {"deadline_s": float("nan")}, "spec.deadline_s"),
])
def test_what_cannot_be_is_refused(kind: str, spec: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused, match=says):
        policy(kind, spec)


END, LOSS = Status(KEY, Phase.ENDED, exit=Exit(0)), Status(KEY, Phase.LOST, reason="gone")
FAIL = Status(KEY, Phase.ENDED, exit=Exit(1))


@pytest.mark.parametrize(("kind", "spec", "good", "bad"), [
    ("container", {}, False, False), ("function", {}, True, True), ("batch", {}, False, False), ("batch", {"retries": 1}, False, True), ("container", {"restart": "on-failure"}, False, True),
    ("container", {"restart": "always"}, True, True), ("function", {"restart": "never"}, False, False), ("container", {"restart": "always", "retries": 0}, False, False),
])
def test_who_is_started_again(kind: str, spec: dict[str, Any], good: bool, bad: bool) -> None:
    how = policy(kind, spec)
    assert (how.again(END, 0), how.again(FAIL, 0), how.again(LOSS, 0)) == (good, bad, bad)


async def test_a_job_is_tried_as_often_as_it_says_and_then_told_as_failed(no_pauses: list[int]) -> None:
    disk = Disk()
    runner, now = made(disk), [entry("batch", retries=2)]
    await runner.take(now)
    await quiet()
    for _ in range(3):
        assert disk.instances[KEY].phase is Phase.RUNNING
        disk.finish(KEY, 9)
        await quiet()
    assert disk.records == [("a", 1, "accepted"), ("a", 1, "running"), ("a", 1, "failed")] and disk.starts == {KEY: 3}
    assert no_pauses == [0, 1], "each pause is asked for with the tries before it"
    assert disk.documents[TRIES] == {}
    await runner.close()


async def test_a_job_that_succeeds_at_last_is_done() -> None:
    disk = Disk()
    runner = made(disk)
    await runner.take([entry("batch", retries=5)])
    await quiet()
    for code in (1, 0):
        disk.finish(KEY, code)
        await quiet()
    assert disk.records[-1] == ("a", 1, "done") and disk.starts == {KEY: 2}
    await runner.close()


@pytest.mark.parametrize("ends_meanwhile", [False, True])
async def test_a_restart_of_the_agent_forgets_no_tries(ends_meanwhile: bool) -> None:
    disk = Disk()
    now = [entry("batch", retries=2)]
    runner = made(disk)
    await runner.take(now)
    await quiet()
    for _ in range(3):
        if ends_meanwhile:
            await runner.close()
            disk.finish(KEY, 1)
        else:
            disk.finish(KEY, 1)
            await quiet()
            await runner.close()
        runner = made(disk)
        await runner.take(now)
        await quiet()
    assert disk.records[-1] == ("a", 1, "failed") and disk.starts == {KEY: 3}
    await runner.close()


async def test_control_a_runner_that_forgets_tries_starts_it_more_often() -> None:
    disk = Disk()
    now = [entry("batch", retries=1)]
    runner = made(disk)
    await runner.take(now)
    for _ in range(4):
        await quiet()
        disk.finish(KEY, 1)
        await runner.close()
        disk.documents.pop(TRIES, None)
        runner = made(disk)
        await runner.take(now)
    await quiet()
    assert disk.starts[KEY] > 2
    await runner.close()


async def test_a_stable_run_begins_the_count_anew(no_pauses: list[int]) -> None:
    disk = Disk()
    runner = made(disk)
    await runner.take([entry(restart="on-failure", retries=1)])
    await quiet()
    for _ in range(4):
        began = disk.documents[TRIES]["a/1/running"]["began_ms"]
        disk.instances[KEY] = Status(KEY, Phase.ENDED, exit=Exit(1, at_ms=began + STABLE_MS))
        disk.ended[KEY].set()
        await quiet()
    assert disk.starts == {KEY: 5} and set(no_pauses) == {0}
    disk.finish(KEY, 1)  # an end without a time is not of a stable run
    await quiet()
    assert disk.records[-1] == ("a", 1, "failed")
    await runner.close()


async def test_what_is_stopped_during_its_pause_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "pause_s", lambda _tries: 3600.0)
    disk = Disk()
    runner = made(disk)
    await runner.take([entry(restart="always")])
    await quiet()
    disk.finish(KEY, 0)
    await quiet()
    due = dict(runner._due)
    await runner.take([entry(restart="always")])  # said again: the pause is not put off
    await quiet()
    assert runner._due == due and disk.starts == {KEY: 1}
    await runner.take([{**entry(), "wanted": "stopped"}])
    await quiet()
    assert disk.instances == {} and disk.records[-1] == ("a", 1, "stopped") and disk.documents[TRIES] == {} and runner._due == {}
    await runner.close()


async def test_a_job_past_its_deadline_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    runner = made(disk)
    await runner.take([entry("batch", deadline_s=1e-9, retries=5)])
    while not disk.records or disk.records[-1][2] != "failed":
        disk.news.clear()
        await disk.news.wait()
    assert disk.records == [("a", 1, "accepted"), ("a", 1, "running"), ("a", 1, "failed")] and disk.instances[KEY].phase is Phase.ENDED
    await runner.close()


async def test_a_start_that_fails_at_first_is_told_at_once_and_one_that_failed_later_is_a_try() -> None:
    disk = Disk()
    runner = made(disk)
    disk.failing.append("start")
    await runner.take([entry("function")])
    await quiet()
    assert disk.records == [("a", 1, "accepted"), ("a", 1, "failed")]
    await runner.close()
    disk = Disk()
    runner = made(disk)
    await runner.take([entry("function")])
    await quiet()
    disk.failing.append("start")
    disk.finish(KEY, 1)
    await quiet()
    assert disk.instances[KEY].phase is Phase.RUNNING and disk.starts == {KEY: 2} and disk.records[-1][2] != "failed"
    await runner.close()


async def test_several_drivers_each_end_what_is_theirs_and_get_what_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What shall stop does not say its kind, and what is an orphan is in no document."""
    disks = {"container": Disk(), "function": Disk()}
    seen: list[Order] = []

    class Keeps(InMemory):
        async def prepare(self, order: Order) -> Status:
            seen.append(order)
            return await super().prepare(order)

    journal = Disk()

    async def bring(kind: str, reference: str, pull: str) -> str:
        return "function" if kind == "function" or reference == "module" else "container"

    def another() -> Runner:
        return Runner({name: Keeps(disk) for name, disk in disks.items()}, journal, bring, lambda: None, lambda: None)

    def want(name: str, kind: str, image: str = "i", wanted: str = "running") -> dict[str, Any]:
        return {"id": name, "epoch": 1, "wanted": wanted, "kind": kind, "image": image, "document": {"spec": {"retries": 1, "own": name}}}

    runner = another()
    await runner.take([want("c", "container"), want("f", "function"), want("job", "batch", "module"), want("work", "batch")])
    await quiet()
    there = {name: {key.id for key in disk.instances} for name, disk in disks.items()}
    assert there == {"container": {"c", "work"}, "function": {"f", "job"}}
    assert {order.key.id: (order.job, dict(order.spec)) for order in seen} == {
        "c": (False, {"own": "c"}), "f": (False, {"own": "f"}), "job": (True, {"own": "job"}), "work": (True, {"own": "work"}),
    }
    await runner.close()
    runner = another()
    stops = [{"id": name, "epoch": 1, "wanted": "stopped", "kind": "container"} for name in ("f", "c")]
    await runner.take([*stops, want("job", "batch", "module")])  # and `work` is listed no more
    await quiet()
    assert {name: {key.id for key in disk.instances} for name, disk in disks.items()} == {"container": set(), "function": {"job"}}
    assert Counter(journal.records)[("f", 1, "stopped")] == Counter(journal.records)[("c", 1, "stopped")] == 1
    assert sum(disk.starts.total() for disk in disks.values()) == 4, "nothing was started a second time"
    await runner.close()


def test_the_keys_of_restarts_are_no_drivers_keys() -> None:
    from edge_runtime.workloads.drivers import container_spec, function_spec

    assert not set(restarts.KEYS) & {*container_spec.SPEC_KEYS, *function_spec.SPEC_KEYS}
