"""The pure core of a site: never two serve one device, numbers never go back, and whoever lives serves everything; each broken rule is found."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.contract.site_messages import Table
from edge_runtime.site.member import LEASE_MS, SILENT_MS, STABLE_MS, Member

from .site_world import DEVICES, World

QUIET_MS = 60_000
"""Long enough after the last disturbance for election, silence, waiting and the return home."""

STEPS = st.lists(
    st.tuples(st.sampled_from(("kill", "boot", "stop", "cut", "broker", "pass")), st.integers(1, 3), st.integers(0, 14_000), st.integers(0, 9_000)),
    max_size=14,
)
Steps = list[tuple[str, int, int, int]]


def play(world: World, steps: Steps) -> None:
    """Disturb, with the given pauses in between."""
    for what, member, pause_ms, length_ms in steps:
        node = world.nodes[f"e{(member - 1) % len(world.nodes) + 1}"]
        if what == "kill":
            world.kill(node)
        elif what == "boot" and node.member is None:
            world.boot(node)
        elif what == "stop":
            world.stop(node, length_ms * 2)
        elif what == "cut":
            world.cut(node, length_ms, pause_ms % 3_000)
        elif what == "broker":
            world.restart_broker(("kept", "lost", "old")[pause_ms % 3], length_ms // 3)
        world.run(world.now + pause_ms)


def random_steps(seed: int, count: int = 16) -> Steps:
    draw = random.Random(seed)
    kinds = ("kill", "boot", "boot", "stop", "cut", "broker", "pass")
    return [(draw.choice(kinds), draw.randint(1, 3), draw.choice((20, 301, 2_000, 7_000, 12_000)), draw.randint(0, 9_000)) for _ in range(count)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), STEPS, st.sampled_from((50, 400, 3_000, 9_000)))
def test_never_two_serve_one_device_and_afterwards_one_does(seed: int, steps: Steps, slowest_ms: int) -> None:
    world = World(seed, slowest_ms=slowest_ms)
    world.run(12_000)
    play(world, steps)
    assert world.problems == []
    world.slowest_ms = 50
    for node in world.nodes.values():
        if node.member is None and node.name == "e3":
            world.boot(node)
    world.run(world.now + QUIET_MS)
    assert world.problems == []
    live = [node.name for node in world.nodes.values() if node.member is not None]
    served = world.served()
    assert all(len(by) == 1 and by[0] in live for by in served.values()), served
    if "e1" in live:
        assert served["boiler-1"] == served["boiler-2"] == ["e1"]


class NoLease(Member):
    """Acts for ever on what it once started."""

    def leased(self, now: int) -> bool:
        return self._lease_ms is not None


class NoWait(Member):
    """Starts with a device as soon as the table gives it."""

    def _stopped_elsewhere(self, table: tuple[int, str]) -> bool:
        return True


class AppliesAtOnce(Member):
    """Says that it goes by a table before it has stopped with what the table gives to others."""

    def tabled(self, table: Table, now: int) -> list[Any]:
        actions = super().tabled(table, now)
        return actions if self._applied == table.identity or self.table is not table else actions + self._apply(table.identity, now)


class ForgetsItsNumber(Member):
    """Begins at zero with every boot."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments[:4])


class EveryClaimWins(Member):
    """Believes the last claim of a number."""

    def _wins(self, number: int) -> bool:
        return number >= self.number


@pytest.mark.parametrize("broken", [NoLease, NoWait, AppliesAtOnce, ForgetsItsNumber, EveryClaimWins])
def test_each_broken_rule_is_found(broken: type[Member]) -> None:
    for seed in range(400):
        world = World(seed, make=broken, slowest_ms=(50, 400, 3_000, 9_000)[seed % 4])
        world.run(12_000)
        play(world, random_steps(seed))
        if world.problems:
            return
    pytest.fail(f"{broken.__name__} was never caught")


def test_many_random_schedules_hold() -> None:
    for seed in range(60):
        world = World(seed, slowest_ms=(50, 400, 3_000, 9_000)[seed % 4])
        world.run(12_000)
        play(world, random_steps(seed))
        assert world.problems == [], (seed, world.problems[:3])


def test_two_killed_one_of_them_the_leader_are_replaced_within_fifteen_seconds() -> None:
    world = World(1, members=5)
    world.run(30_000)
    leader = next(node for node in world.nodes.values() if node.member is not None and node.member.leads)
    other = next(node for node in world.nodes.values() if node is not leader and node.name in ("e1", "e2", "e3"))
    for node in (leader, other):
        world.kill(node)
    world.run(world.now + 15_000)
    served = world.served()
    assert all(len(by) == 1 and by[0] not in (leader.name, other.name) for by in served.values()), served
    assert world.problems == []


def test_a_power_cut_of_the_whole_site_does_not_reset_the_number() -> None:
    world = World(2)
    world.run(30_000)
    before = max(node.kept for node in world.nodes.values())
    for node in world.nodes.values():
        world.kill(node)
    world.restart_broker("lost", 0)
    for node in world.nodes.values():
        world.boot(node)
    world.run(world.now + 20_000)
    fences = {duty.fence for node in world.nodes.values() if node.member and node.member.table for duty in node.member.table.duties.values()}
    assert min(fences) > before and all(len(by) == 1 for by in world.served().values())


def test_a_short_break_of_the_connection_changes_nothing() -> None:
    world = World(3)
    world.run(40_000)
    before = world.served()
    table = world.nodes["e1"].member.table  # type: ignore[union-attr]
    world.cut(world.nodes["e1"], 1_500, 0)
    world.run(world.now + 3_000)
    assert world.served() == before == {**before, "boiler-1": ["e1"]}
    assert world.nodes["e1"].member.table == table  # type: ignore[union-attr]


def test_an_edge_that_comes_back_gets_its_home_devices_when_it_is_stable() -> None:
    world = World(4)
    world.run(40_000)
    world.kill(world.nodes["e1"])
    world.run(world.now + 15_000)
    away = world.served()["boiler-1"]
    assert away in (["e2"], ["e3"])
    world.boot(world.nodes["e1"])
    world.run(world.now + STABLE_MS - 2_000)
    assert world.served()["boiler-1"] == away
    world.run(world.now + 10_000)
    assert world.served()["boiler-1"] == ["e1"]
    origins = {duty.origin for device, duty in world.nodes["e2"].member.table.duties.items() if device.startswith("boiler")}  # type: ignore[union-attr]
    assert origins == {"e1"} and world.problems == []


def test_an_edge_that_crashes_again_and_again_does_not_hold_its_devices_up() -> None:
    world = World(6)
    world.run(40_000)
    assert world.served()["boiler-1"] == ["e1"]
    away: set[str] = set()
    for _ in range(6):
        world.kill(world.nodes["e1"])
        world.run(world.now + 1_000)
        world.boot(world.nodes["e1"])
        world.run(world.now + 4_000)
        away |= set(world.served()["boiler-1"])
    assert away and "e1" not in away and world.problems == []


def test_a_stopped_member_may_not_act_when_it_goes_on() -> None:
    world = World(5)
    world.run(40_000)
    node = world.nodes["e1"]
    assert node.member is not None and node.member.standing("boiler-1", world.now + node.skew_ms) == "ours"
    world.stop(node, SILENT_MS + 8_000)
    world.run(world.now + LEASE_MS)
    assert node.member.may_send("boiler-1", world.now + node.skew_ms) is None
    world.run(world.now + 6_000)
    assert world.served()["boiler-1"] != ["e1"] and world.problems == []
    assert set(world.served()) == set(DEVICES)
