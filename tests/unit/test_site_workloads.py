"""Workloads of a site: never does one run twice, whoever is killed, stopped or cut off, and whatever the leader decides; each broken rule is found."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.contract.site_messages import Table
from edge_runtime.site.member import LEASE_MS, RUN_LEASE_MS, RUN_SILENT_MS, Member

from .workload_world import KEYS, Placed, Sites

STEPS = st.lists(
    st.tuples(st.sampled_from(("kill", "power", "boot", "boot", "stop", "cut", "broker", "pass")), st.integers(1, 3), st.integers(0, 45_000), st.integers(0, 50_000)), max_size=12,
)
Steps = list[tuple[str, int, int, int]]


def play(world: Sites, steps: Steps) -> None:
    """Disturb, with the given pauses in between."""
    for what, member, pause_ms, length_ms in steps:
        node = world.nodes[f"e{member}"]
        if what in ("kill", "power") and node.member is not None:
            (world.kill if what == "kill" else world.power)(node)
        elif what == "boot" and node.member is None:
            world.boot(node)
        elif what == "stop":
            world.stop(node, length_ms)
        elif what == "cut":
            world.cut(node, length_ms, pause_ms % 3_000)
        elif what == "broker":
            world.restart_broker(("kept", "lost", "old")[pause_ms % 3], length_ms // 4)
        world.run(world.now + pause_ms)


def random_steps(seed: int) -> Steps:
    draw = random.Random(seed)
    kinds = ("kill", "kill", "power", "boot", "boot", "boot", "stop", "cut", "broker", "pass")
    return [(draw.choice(kinds), draw.randint(1, 3), draw.choice((20, 2_000, 12_000, 40_000)), draw.randint(0, 50_000)) for _ in range(14)]


def there_and_back(world: Sites) -> None:
    """e1 is killed, its workloads run at another, and are given back the moment it is there; the broker has forgotten who had them."""
    world.kill(world.nodes["e1"])
    world.run(world.now + 90_000)
    world.restart_broker("lost", 0)
    world.boot(world.nodes["e1"])
    world.given = dict.fromkeys(KEYS, "e1")
    world.run(world.now + 30_000)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), STEPS, st.sampled_from((50, 400, 3_000, 9_000)))
def test_never_does_a_workload_run_twice(seed: int, steps: Steps, slowest_ms: int) -> None:
    world = Sites(seed, slowest_ms=slowest_ms)
    world.run(50_000)
    play(world, steps)
    assert world.problems == []


def test_many_random_schedules_hold_and_things_do_run() -> None:
    runs = 0
    for seed in range(25):
        world = Sites(seed, slowest_ms=(50, 400, 3_000, 9_000)[seed % 4])
        world.run(50_000)
        there_and_back(world)
        play(world, random_steps(seed))
        assert world.problems == [], (seed, world.problems[:3])
        runs += world.runs
    assert runs > 100


class GoodbyeEndsAll(Member):
    """Believes that nothing runs at a member that is silent as long as a device's lease."""

    def _ended_elsewhere(self, table: tuple[int, str]) -> bool:
        return self._stopped_elsewhere(table)


class ForgetsWhatRuns(Member):
    """Says that it goes by a table that gives what runs here to others, since it has not started it in this connection."""

    def tabled(self, table: Table, now: int) -> list[Any]:
        kept = self.occupied
        self.occupied = {}
        try:
            return super().tabled(table, now)
        finally:
            self.occupied = kept | self.occupied


class AlwaysUnbroken(Member):
    """Goes on with what it once had, however long ago."""

    def _unbroken(self, key: str, now: int) -> bool:
        return key in self.occupied


class LastsTooLong(Member):
    """Takes the lease as longer than the others wait."""

    def heard(self, beat: Any, now: int) -> list[Any]:
        actions = super().heard(beat, now)
        for key in self.started:
            if key in self.occupied and beat.edge == self.edge:
                self.occupied[key].until_ms += 3 * LEASE_MS
        return actions


@pytest.mark.parametrize("broken", [GoodbyeEndsAll, ForgetsWhatRuns, AlwaysUnbroken, LastsTooLong])
def test_each_broken_rule_is_found(broken: type[Member]) -> None:
    for seed in range(150):
        world = Sites(seed, make=broken, slowest_ms=(50, 400, 3_000, 9_000)[seed % 4])
        world.run(50_000)
        if seed % 3 == 0:
            there_and_back(world)
        play(world, random_steps(seed))
        if world.problems:
            return
    pytest.fail(f"{broken.__name__} was never caught")


def test_what_runs_goes_on_over_a_restart_of_its_agent_and_of_the_broker() -> None:
    world = Sites(1)
    world.draw.random = lambda: 0.5  # type: ignore[method-assign]
    world.run(50_000)
    assert all(world.running(key) == ["e1"] for key in KEYS) and world.runs == len(KEYS)
    world.kill(world.nodes["e1"])
    world.run(world.now + 12_000)
    world.boot(world.nodes["e1"])
    world.run(world.now + 50_000)
    world.restart_broker("lost", 4_000)
    world.run(world.now + 50_000)
    assert all(world.running(key) == ["e1"] for key in KEYS) and world.runs == len(KEYS) and world.problems == []


def test_who_is_cut_off_ends_what_runs_in_time_and_begins_anew_when_it_is_back() -> None:
    world = Sites(1, members=1)
    world.draw.random = lambda: 0.5  # type: ignore[method-assign]
    world.run(60_000)
    node = world.nodes["e1"]
    assert node.member is not None and all(world.running(key) == ["e1"] for key in KEYS)
    world.cut(node, RUN_LEASE_MS + 20_000, 0)
    world.run(world.now + RUN_LEASE_MS - 3_000)
    assert node.member.overdue(world.now + node.skew_ms) == [] and all(world.running(key) == ["e1"] for key in KEYS)
    world.run(world.now + 4_000)
    assert node.member.overdue(world.now + node.skew_ms) == list(KEYS) and not any(world.running(key) for key in KEYS)
    for key in KEYS:
        node.member.vacated(key, world.now + node.skew_ms)
    assert node.member.overdue(world.now + node.skew_ms) == [] and node.member.occupied == {}
    world.run(world.now + 80_000)
    assert all(world.running(key) == ["e1"] for key in KEYS) and world.runs == 2 * len(KEYS) and world.problems == []


def load(edge: str, entries: int, cpu: int) -> dict[str, Any]:
    """What an edge tells that runs so many workloads of one CPU each."""
    documents = [{"id": f"{edge}-{at}", "requests": {"cpu": 1}, "when_cut_off": "move"} for at in range(entries)]
    return {
        "generation": 1, "capacity": {"kind": "edge", "capacity": {"cpu": cpu, "memory": "8Gi"}, "runs": ["container"]}, "others": [], "ended": {},
        "entries": [{"id": one["id"], "epoch": 1, "gpus": [], "document": one, "for": "", "generation": 1} for one in documents],
    }


LOADS = {"e1": load("e1", 3, 4), "e2": load("e2", 1, 2), "e3": load("e3", 1, 2), "e4": load("e4", 1, 2), "e5": load("e5", 2, 2)}
OF_FIRST = [f"workload/e1-{at}" for at in range(3)]


def test_five_edges_the_cloud_is_gone_one_dies_and_what_it_ran_runs_by_capacity_once() -> None:
    for power in (False, True):
        world = Placed(7, LOADS, hub=True)
        world.run(60_000)
        assert all(world.running(key) == [key.removeprefix("workload/").partition("-")[0]] for key in world.keys)
        before = {key: world.running(key) for key in world.keys}
        world.connect(False)
        world.run(world.now + 30_000)
        (world.power if power else world.kill)(world.nodes["e1"])
        if power:
            world.kill(world.nodes["e1"])
        world.run(world.now + RUN_SILENT_MS + 15_000)
        assert sorted(name for key in OF_FIRST for name in world.running(key)) == ["e2", "e3", "e4"], "each has room for one more, e5 for none"
        assert {key: world.running(key) for key in world.keys if key not in OF_FIRST} == {key: there for key, there in before.items() if key not in OF_FIRST}
        moved, runs = {key: world.running(key) for key in world.keys}, world.runs
        world.boot(world.nodes["e1"])
        world.run(world.now + 120_000)
        assert {key: world.running(key) for key in world.keys} == moved and world.runs == runs, "who comes back does not start what a sibling has"
        assert world.problems == []


def test_while_the_cloud_is_there_or_was_there_long_after_nothing_moves() -> None:
    world = Placed(8, LOADS, hub=True)
    world.run(60_000)
    world.power(world.nodes["e1"])
    world.run(world.now + 130_000)
    assert not any(world.running(key) for key in OF_FIRST)
    world.connect(False)
    world.run(world.now + 120_000)
    assert not any(world.running(key) for key in OF_FIRST), "the hub had time to decide"
    world.boot(world.nodes["e1"])
    world.run(world.now + 60_000)
    assert all(world.running(key) == ["e1"] for key in OF_FIRST) and world.problems == []
