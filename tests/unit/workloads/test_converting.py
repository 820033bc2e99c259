"""The runner with conversions, against a driver in memory: whoever is killed when, each operation ends once and tells the truth, what is converted is never begun anew, and the last word on its form is what it is."""

import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract.operations import FINAL_STATES
from edge_runtime.contract.workloads import AS_CONTAINER, AS_MICROVM, FORMS
from edge_runtime.workloads import runner as runners
from edge_runtime.workloads.checkpoints import CheckpointFolder, Checkpointing
from edge_runtime.workloads.drivers.face import Failed, Key, Phase, Status
from edge_runtime.workloads.operations import Operations
from edge_runtime.workloads.runner import Runner

from .test_runner import InMemory, entry, others_first, quiet
from .test_runner_operations import EPOCH, A, Kept, asked, in_one_thread

__all__ = ["in_one_thread"]


class Forms(Kept):
    """A disk on which what runs has a form; what is under way between two is undone, or gone on with, by the next agent's probe, as a real driver's is."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.under_way: dict[Key, tuple[str, bool]] = {}
        self.told: list[str] = []

    def append(self, stream: str, kind: str, body: dict[str, Any]) -> None:
        super().append(stream, kind, body)
        if kind == "workload" and "form" in body:
            assert body["state"] == "running"
            self.told.append(body["form"])

    def settle(self) -> None:
        for key, (to, passed) in self.under_way.items():
            if passed and key in self.instances and self.instances[key].phase is Phase.RUNNING:
                self.instances[key] = replace(self.instances[key], form=to)
        self.under_way.clear()


class WithForms(InMemory):
    _disk: Forms

    async def start(self, key: Key) -> Status:
        before = (await self.status(key)).phase
        found = await super().start(key)
        if before is Phase.PREPARED:
            self._disk.instances[key] = found = replace(found, form=AS_CONTAINER)
        return found

    async def convert(self, key: Key, to: str) -> Status:
        if self._disk.instances[key].form == to:
            return self._disk.instances[key]
        self._disk.under_way[key] = (to, False)
        try:
            await self._step("convert")
        except Failed:
            del self._disk.under_way[key]
            raise
        if self._disk.instances[key].phase is not Phase.RUNNING:
            del self._disk.under_way[key]
            raise Failed("convert", "it ended meanwhile", "see why")
        self._disk.under_way[key] = (to, True)
        for _ in range(3):
            await others_first()
        self._disk.settle()
        return self._disk.instances[key]


class Agent:
    """One life of an agent on a disk."""

    def __init__(self, disk: Forms, driver: type[InMemory] = WithForms) -> None:
        async def bring(kind: str, reference: str, pull: str) -> str:
            return "memory"

        disk.settle()
        self.operations = Operations(disk, self._operate)
        self.runner = Runner({"memory": driver(disk)}, disk, bring, lambda: None, lambda: None, checkpoints=Checkpointing(CheckpointFolder(disk.folder), self.operations, 1 << 30))
        self.operations.resume()

    def _operate(self, one: Mapping[str, Any]) -> None:
        self.runner.operate(one)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from(FORMS)), st.tuples(st.just("ask"), st.sampled_from(FORMS)), st.tuples(st.just("turns"), st.integers(1, 40)), st.tuples(st.just("kill"), st.none()),
        st.tuples(st.just("quiet"), st.none()), st.tuples(st.just("finish"), st.integers(0, 1)), st.tuples(st.just("fail"), st.sampled_from(("convert", "start", "delete"))), st.tuples(st.just("unwant"), st.none()),
    ), max_size=14,
)


async def live(events: list[tuple[str, Any]], restart: str) -> Forms:
    with tempfile.TemporaryDirectory() as folder:
        disk = Forms(Path(folder))
        agent, now, listed = Agent(disk), [entry("a", EPOCH, restart=restart, converts=True)], list[dict[str, Any]]()
        await agent.runner.take(now)
        for what, value in events:
            if what == "ask":
                listed.append(asked(f"o-{len(listed)}", "convert", to=value))
                agent.operations.take(listed)
            elif what == "turns":
                for _ in range(value):
                    await others_first()
            elif what == "quiet":
                await quiet()
            elif what == "finish" and A in disk.instances and disk.instances[A].phase is Phase.RUNNING:
                disk.finish(A, value)
            elif what == "fail":
                disk.failing.append(value)
            elif what == "unwant":
                now = []
                await agent.runner.take(now)
            elif what == "kill":
                disk.killed()
                await agent.runner.close()
                disk.killed()
                agent = Agent(disk)
                await agent.runner.take(now)
                agent.operations.take(listed)
        disk.failing.clear()
        await agent.runner.take(now)
        await quiet()
        for name in (one["id"] for one in listed):
            told = [state for one, state, _ in disk.operations if one == name]
            assert len(told) == 2 and told[0] == "running" and told[1] in FINAL_STATES, (name, told)
        assert disk.trouble == [] and disk.under_way == {}
        if A in disk.instances and disk.instances[A].phase is Phase.RUNNING:
            assert (disk.told or [AS_CONTAINER])[-1] == disk.instances[A].form, "the last word on its form is what it is"
        await agent.runner.close()
        return disk


@given(EVENTS, st.sampled_from(("never", "always")))
@settings(max_examples=150)
def test_whoever_is_killed_when_each_conversion_ends_once_and_its_form_is_told(events: list[tuple[str, Any]], restart: str) -> None:
    asyncio.run(live(events, restart))


async def test_a_conversion_is_told_and_kept_over_agents_and_one_that_was_cut_off_is_undone_or_done(tmp_path: Path) -> None:
    disk = Forms(tmp_path)
    agent, now = Agent(disk), [entry("a", EPOCH, converts=True)]
    await agent.runner.take(now)
    await quiet()
    agent.operations.take([asked("o-1", "convert", to=AS_MICROVM), asked("o-2", "convert", to=AS_MICROVM), asked("o-3", "convert", to="vm")])
    await quiet()
    assert [one[:2] for one in disk.operations[3:]] == [("o-1", "succeeded"), ("o-2", "succeeded"), ("o-3", "failed")] and "none of container, microvm" in disk.operations[-1][2]
    assert disk.told == [AS_MICROVM] and disk.starts[A] == 1, "what it is already is done"
    assert agent.operations.get("o-1")["detail"]["form"] == AS_MICROVM  # type: ignore[index]
    await agent.runner.close()
    agent = Agent(disk)
    await agent.runner.take(now)
    await quiet()
    assert disk.told == [AS_MICROVM], "told once, also over agents"
    for name, passed in (("o-4", False), ("o-5", True)):
        agent.operations.take([asked(name, "convert", to=AS_CONTAINER)])
        while disk.under_way.get(A, ("", None))[1] is not passed:
            await others_first()
        await agent.runner.close()
        agent = Agent(disk)
        await agent.runner.take(now)
        await quiet()
        assert disk.operations[-1][:2] == (name, "succeeded" if passed else "failed") and disk.instances[A].form == (AS_CONTAINER if passed else AS_MICROVM)
        assert passed or "has been undone, and it is a microvm as before; ask again" in disk.operations[-1][2]
    assert disk.told == [AS_MICROVM, AS_CONTAINER] and disk.starts[A] == 1
    await agent.runner.close()


async def test_what_is_started_again_is_a_container_and_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "pause_s", lambda _: 0.0)
    disk = Forms(tmp_path)
    agent = Agent(disk)
    await agent.runner.take([entry("a", EPOCH, converts=True, restart="always")])
    await quiet()
    agent.operations.take([asked("o-1", "convert", to=AS_MICROVM)])
    await quiet()
    disk.finish(A, 1)
    while disk.starts[A] < 2 or len(disk.told) < 2:
        await others_first()
    assert disk.told == [AS_MICROVM, AS_CONTAINER]
    await agent.runner.close()


async def test_a_driver_that_cannot_convert_and_what_does_not_run_are_refused(tmp_path: Path) -> None:
    disk = Forms(tmp_path)
    agent = Agent(disk, InMemory)
    await agent.runner.take([entry("a", EPOCH)])
    await quiet()
    agent.operations.take([asked("o-1", "convert", to=AS_MICROVM)])
    await quiet()
    assert "spec.converts: a was not started as one that can be converted; submit it anew with converts: true in its spec" in disk.operations[-1][2]
    await agent.runner.close()
    agent = Agent(disk)
    disk.instances[A] = replace(disk.instances[A], phase=Phase.PAUSED, form=AS_CONTAINER)
    await agent.runner.take([entry("a", EPOCH)])
    agent.operations.take([asked("o-2", "convert", to=AS_MICROVM)])
    await quiet()
    assert "does not run (paused)" in disk.operations[-1][2] and disk.under_way == {}
    await agent.runner.close()


async def test_what_cannot_be_converted_is_refused_before_its_image_is_fetched(tmp_path: Path) -> None:
    for spec, field in (({"converts": "yes"}, "neither true nor false"), ({"converts": True, "isolation": "microvm"}, "with isolation microvm")):
        disk = Forms(tmp_path)
        agent = Agent(disk)
        await agent.runner.take([entry("a", EPOCH, **spec)])
        await quiet()
        assert disk.records[-1] == ("a", EPOCH, "refused") and A not in disk.instances, field
        await agent.runner.close()


def test_the_test_sees_an_agent_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(Runner, "_say_form", lambda *_: None)
    with pytest.raises(AssertionError, match="the last word"):
        asyncio.run(live([("quiet", None), ("ask", AS_MICROVM), ("quiet", None)], "never"))
