"""A node's part in moves of what runs on meanwhile, against drivers in memory that have what real keepers agree on between them: whoever is killed when, one copy at most runs, it goes on where it was, and what waits goes when nobody asks for it any more."""

import asyncio
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract.operations import FINAL_STATES
from edge_runtime.contract.workloads import CHECKPOINTED
from edge_runtime.workloads.drivers.face import Failed, Key, Lives, Order, Phase, Refused, Status

from .test_moves import MOVE, OFFER, Moving, Node, Pair, W, coming, part
from .test_runner import entry, others_first, quiet
from .test_runner_operations import in_one_thread  # noqa: F401 - a fixture

SOURCE, TARGET = Key(W, 1), Key(W, 2)


class Between:
    """What keepers on two nodes have between them; it goes with either's agent, whose worker carries it."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.nodes: dict[str, Node] = {}
        self.connected = False
        self.dies = ""
        """How one stands at its target that began there, and was seen by nobody: `lost` or `failed`."""
        self.late = False
        """Where it breaks when the source has said that it left, and the target has not heard it."""


class Running(Moving):
    """Can be moved while it runs."""

    between: Between
    left: set[Key]

    def __init__(self, disk: Any) -> None:
        super().__init__(disk)
        self.left = disk.__dict__.setdefault("left", set())
        self.waiting = disk.__dict__.setdefault("waiting", set())

    async def stop(self, key: Key, grace_s: float) -> Status:
        found = await super().stop(key, grace_s)
        if found.phase is Phase.PAUSED:
            self._disk.finish(key, 137)
        return self._disk.instances[key]

    async def leave(self, key: Key, folder: Path, speed: int) -> None:
        await self._step("leave")
        if not self.between.nodes["b"].disk.__dict__["waiting"]:
            raise Failed("move", "nobody waits", "none")
        self.between.connected = True
        await self._step("near")

    async def stay(self, key: Key) -> None:
        await self._step("stay")
        self.between.connected = False
        if key in self.left:
            self.left.discard(key)
            self._disk.instances[key] = Status(key, Phase.RUNNING, 1)

    async def arrive(self, order: Order, offer: Mapping[str, Any], folder: Path) -> None:
        await self._step("arrive")
        assert order.key not in self._disk.instances or order.key in self.waiting
        self._disk.instances[order.key] = Status(order.key, Phase.PREPARED)
        self.waiting.add(order.key)
        await self._step("arrived")

    def waits(self, key: Key) -> bool:
        return key in self.waiting

    async def go(self, key: Key) -> Status:
        await self._step("go")
        source = self.between.nodes["a"].disk
        if key in self.waiting and self.between.connected and source.instances.get(SOURCE, Status(SOURCE, Phase.LOST)).phase is Phase.RUNNING:
            source.instances[SOURCE] = Status(SOURCE, Phase.PAUSED, 1)
            source.__dict__["left"].add(SOURCE)
            if not self.between.late:
                self._disk.memory[key] = source.memory[SOURCE]
                self._disk.ended[key] = asyncio.Event()
                self._disk.instances[key] = Status(key, Phase.RUNNING, 1, still_ms=7.0)
                self.waiting.discard(key)
        for _ in range(self.between.chance.randrange(4)):
            await others_first()
        if key in self.waiting or key not in self._disk.instances:
            await self.delete(key)
            raise Refused("from", "it did not come", "none")
        if self.between.dies == "failed":
            raise Failed("from", "planted", "none")
        if self.between.dies:
            self._disk.lose(key)
        return self._disk.instances[key]

    async def delete(self, key: Key) -> None:
        await super().delete(key)
        if key in self.waiting:
            self.between.connected = False
            self.waiting.discard(key)


class LiveNode(Node):
    """A node that is told for what it shall wait."""

    def __init__(self, folder: Path, driver: type[Running], between: Between, name: str) -> None:
        self.expected: set[tuple[str, int]] = set()
        self.between = between
        between.nodes[name] = self
        super().__init__(folder, driver)

    def wakes(self) -> None:
        super().wakes()
        self.runner.expect(self.expected)

    def expects(self, *keys: tuple[str, int]) -> None:
        self.expected = set(keys)
        self.runner.expect(self.expected)

    async def again(self) -> None:
        self.between.connected = False  # its worker has gone with it
        await super().again()


class LivePair(Pair):
    """A source on which the witness runs, and a target for it."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        between = self.between = Between(random.Random(seed))

        class Here(Running):
            pass

        Here.between = between
        self.a, self.b = self.live = [LiveNode(folder / name, Here, between, name) for name in ("a", "b")]
        self.count = 0

    async def part(self, node: Node, kind: str, epoch: int, kills: list[int]) -> str:
        """One part; how it ended."""
        one = {**part(kind, epoch), "offer": {**OFFER, "kind": "container", "image": "i", "requests": {}, "document": {}} if kind == "move-come" else {}}
        node.asks(one)
        await self.until(node, lambda: node.how(one["id"])[0] in FINAL_STATES, kills)
        return node.how(one["id"])[0]

    async def goes(self, kills: Callable[[], list[int]]) -> str:
        """As the hub leads it: `came`, `stayed`, or `still` where it has to be moved otherwise."""
        a, b = self.live
        b.expects((W, 2))
        if await self.part(b, "move-come", 2, kills()) != "succeeded" or await self.part(a, "move-live", 1, kills()) != "succeeded":
            b.expects()
            await self.until(b, lambda: TARGET not in b.disk.instances, [])
            return "still"
        await a.told({**entry(W, 1, restart="always"), "held": True})
        await b.told({**entry(W, 2), "from": {"move": MOVE, "live": True}, "held": False})
        await self.until(b, lambda: any(record[:2] == (W, 2) and record[2] in ("running", "refused") for record in b.disk.records), kills())
        if (W, 2, "running") in b.disk.records:
            b.expects()
            await b.told(entry(W, 2))
            await a.told(entry(W, 1, wanted="stopped"))
            await self.until(a, lambda: a.disk.records[-1] == (W, 1, "stopped"), kills())
            return "came"
        b.expects()
        await b.told()
        await a.told(entry(W, 1, restart="always"))
        assert await self.part(a, "move-back", 1, kills()) == "succeeded"
        return "stayed"

    async def close(self) -> None:
        for node in (self.a, self.b):
            await node.runner.close()


@given(st.lists(st.lists(st.integers(0, 25), max_size=2), min_size=6, max_size=6), st.booleans(), st.integers(0, 1000))
@settings(max_examples=60)
def test_whoever_is_killed_when_one_copy_runs_and_goes_on_where_it_was(kills: list[list[int]], late: bool, seed: int) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            pair, left = LivePair(Path(folder), seed), list(kills)
            pair.between.late = late
            await pair.start()
            how = await pair.goes(lambda: left.pop(0) if left else [])
            await quiet()
            pair.works()
            assert (pair.a.running(), pair.b.running()) == (([], [TARGET]) if how == "came" else ([SOURCE], [])), how
            assert pair.a.disk.trouble == pair.b.disk.trouble == [] and not pair.a.disk.__dict__["left"] - set(pair.a.disk.instances) - {SOURCE}
            assert pair.a.disk.starts[SOURCE] == 1 and pair.b.disk.starts[TARGET] == 0, "it begins anew nowhere"
            assert list(pair.b.disk.instances) == ([TARGET] if how == "came" else []), "what waited is gone"
            await pair.close()

    asyncio.run(run())


@pytest.mark.parametrize("step", range(4))
async def test_whoever_is_killed_at_each_turn_of_a_step(tmp_path: Path, step: int) -> None:
    ways = set()
    for turns in range(30):
        pair, calls = LivePair(tmp_path / f"{turns}"), iter(range(4))
        await pair.start()
        how = await pair.goes(lambda turns=turns, calls=calls: [turns] if next(calls) == step else [])  # type: ignore[misc]
        ways.add(how)
        assert (pair.a.running(), pair.b.running()) == (([], [TARGET]) if how == "came" else ([SOURCE], []))
        await pair.close()
    # A target's agent that is killed while it lays it out lays it out again; its source's, when it was told that it may, stays there; what came goes on.
    assert ways >= ({"came"}, {"came", "still"}, {"came", "stayed"}, {"came"})[step], ways


def test_its_driver_has_what_such_a_driver_needs() -> None:
    assert isinstance(object.__new__(Running), Lives)


async def test_it_comes_and_says_for_how_long_it_stood_still(tmp_path: Path) -> None:
    pair, told = LivePair(tmp_path), list[dict[str, Any]]()
    await pair.start()
    appended = pair.b.disk.append
    pair.b.disk.append = lambda stream, kind, body: (told.append(body), appended(stream, kind, body))[1]  # type: ignore[method-assign,func-returns-value]
    assert await pair.goes(list) == "came"
    assert [one["still_ms"] for one in told if one["id"] == W and one["state"] == "running"] == [7.0]
    await pair.close()


@pytest.mark.parametrize("dies", ["lost", "failed"])
async def test_what_nobody_saw_live_at_its_target_is_its_sources_again(tmp_path: Path, dies: str) -> None:
    """Else the hub would take its word for the end of the workload, whose source is whole."""
    pair = LivePair(tmp_path)
    pair.between.dies = dies
    await pair.start()
    assert await pair.goes(list) == "stayed"
    assert pair.a.running() == [SOURCE] and pair.b.disk.records[-1] == (W, 2, "refused") and pair.a.disk.starts[SOURCE] == 1
    await pair.close()


async def test_a_source_that_ends_while_only_its_target_can_say_is_not_begun_anew_before_that_did(tmp_path: Path) -> None:
    pair = LivePair(tmp_path)
    await pair.start()
    await pair.a.told({**entry(W, 1, restart="always"), "held": True})
    pair.a.disk.lose(SOURCE)
    await quiet()
    assert pair.a.running() == [] and pair.a.disk.instances[SOURCE].phase is Phase.LOST and pair.a.disk.records[-1] == (W, 1, CHECKPOINTED)
    pair.count = 0  # what it had is lost, as with any machine that goes
    await pair.a.told(entry(W, 1, restart="always"))
    assert await pair.part(pair.a, "move-back", 1, []) == "succeeded"
    await quiet()
    assert pair.a.running() == [SOURCE] and pair.a.disk.starts[SOURCE] == 2 and pair.a.disk.records[-1] == (W, 1, "running")
    await pair.close()


async def test_a_workload_that_is_cancelled_where_it_waits_goes_before_that_is_said(tmp_path: Path) -> None:
    pair = LivePair(tmp_path)
    await pair.start()
    pair.b.expects((W, 2))
    assert await pair.part(pair.b, "move-come", 2, []) == "succeeded"
    await pair.b.told(entry(W, 2, wanted="stopped"))
    await quiet()
    assert not pair.b.disk.instances and pair.b.disk.records[-1] == (W, 2, "stopped")
    await pair.close()


async def test_what_waits_is_not_begun_from_a_state_that_comes_under_its_name(tmp_path: Path) -> None:
    """It was to come while it ran, and then came standing still: under the same epoch."""
    pair = LivePair(tmp_path)
    await pair.start()
    pair.live[1].expects((W, 2))
    assert await pair.part(pair.b, "move-come", 2, []) == "succeeded"
    await pair.b.told(coming("no such state"))  # what waits has not been taken away yet
    await quiet()
    assert pair.b.disk.records[-1] == (W, 2, "refused") and not pair.b.disk.instances
    await pair.close()


async def test_what_nobody_waits_for_any_more_is_not_laid_out(tmp_path: Path) -> None:
    pair = LivePair(tmp_path)
    await pair.start()
    assert await pair.part(pair.b, "move-come", 2, []) == "failed" and not pair.b.disk.instances
    assert "nobody waits" in pair.b.how(f"{MOVE}.come")[1]
    await pair.close()


async def test_what_goes_on_from_nothing_is_refused(tmp_path: Path) -> None:
    pair = LivePair(tmp_path)
    await pair.start()
    await pair.b.told({**entry(W, 2), "from": {"move": MOVE, "live": True}, "held": False})
    await quiet()
    assert pair.b.disk.records[-1] == (W, 2, "refused")
    await pair.close()


@pytest.mark.parametrize("late", [False, True])
async def test_a_keeper_that_begins_before_its_source_stands_still_is_seen(tmp_path: Path, late: bool) -> None:
    """The negative control."""
    pair = LivePair(tmp_path)
    await pair.start()
    pair.b.disk.memory[TARGET] = pair.count
    pair.b.disk.instances[TARGET] = Status(TARGET, Phase.RUNNING, 1)
    if late:
        pair.a.disk.instances[SOURCE] = Status(SOURCE, Phase.PAUSED, 1)
        pair.b.disk.memory[TARGET] -= 1
    with pytest.raises(AssertionError, match="it goes on where it was" if late else "<= 1"):
        pair.works()
    await pair.close()
