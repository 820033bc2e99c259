"""A backlog placed together: allowed, repeatable, never worse than greedy, what runs stays."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler import Scheduler, Seat, State, node, workload
from hub.scheduler.audit import check_invariants
from hub.scheduler.parse import quota
from hub.scheduler.together import place_together

pytest.importorskip("ortools", reason="the judge needs ortools (extra bench)")

from tools.bench.optimality_instances import draw
from tools.bench.optimality_judge import Broken
from tools.bench.optimality_objective import faults, value
from tools.bench.optimality_scheduler import check_log, placement_of, prepared

STEPS = 25


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_placements_are_allowed_repeatable_and_no_worse_than_greedy(seed: int) -> None:
    instance = draw(seed, most_nodes=6, most_workloads=16)
    scheduler, workloads, raw = prepared(instance)
    found = place_together(scheduler, workloads, 0, seed=seed, steps=STEPS)
    check_invariants(scheduler.state)
    check_log(scheduler, raw)
    placement = placement_of(instance, scheduler)
    assert not faults(instance, placement)
    assert value(instance, placement) == found.value >= found.greedy
    assert found.placed.keys() | found.pending.keys() == {item.id for item in workloads} and not found.placed.keys() & found.pending.keys()
    assert all(pending.reason for pending in found.pending.values())
    again, workloads, _ = prepared(instance)
    assert place_together(again, workloads, 0, seed=seed, steps=STEPS).placed == found.placed


def _cluster() -> Scheduler:
    state = State()
    state.add_nodes([node({"name": f"n{i}", "capacity": {"cpu": 4, "memory": "8Gi", "slots": 10}, "price": price}) for i, price in enumerate((10, 20))])
    return Scheduler(state)


def _asks(name: str, cpu: int, **more: object) -> object:
    return workload({"id": name, "requests": {"cpu": cpu, "memory": "1Gi"}, **more})


def test_what_runs_already_is_never_moved() -> None:
    scheduler = _cluster()
    scheduler.reserve(_asks("old", 1), 0)  # type: ignore[arg-type]
    before = scheduler.state.seat("old")
    found = place_together(scheduler, [_asks("a", 4), _asks("b", 3)], 0, steps=50)  # type: ignore[list-item]
    assert scheduler.state.seat("old") == before
    assert found.placed.keys() == {"a", "b"}


def test_an_order_that_greedy_gets_wrong_is_put_right() -> None:
    # Largest first puts 3 with 1 on one node, the 2s on the other; a look at all of them places every one.
    scheduler = _cluster()
    found = place_together(scheduler, [_asks(f"w{i}", cpu) for i, cpu in enumerate((1, 2, 2, 3))], 0)  # type: ignore[misc]
    assert len(found.placed) == 4


def test_a_gang_is_whole_or_waits_and_a_hopeless_member_blocks_only_its_gang() -> None:
    scheduler = _cluster()
    gang = [_asks(f"g{i}", 3, gang={"id": "g", "size": 3}, priority=10) for i in range(3)]
    hopeless = [_asks("h0", 1, gang={"id": "h", "size": 2}), _asks("h1", 99, gang={"id": "h", "size": 2})]
    found = place_together(scheduler, [*gang, *hopeless, _asks("one", 1)], 0, steps=40)  # type: ignore[list-item]
    assert found.placed.keys() == {"one"}
    assert "99" in found.pending["h1"].reason and "gang h" in found.pending["h0"].reason


def test_quota_holds_and_is_the_reason() -> None:
    scheduler = _cluster()
    scheduler.state.set_quota(quota({"tenant": "t", "nominal": {"cpu": 2}}))
    found = place_together(scheduler, [_asks("a", 2, tenant="t"), _asks("b", 2, tenant="t")], 0, steps=40)  # type: ignore[list-item]
    assert len(found.placed) == 1
    assert "tenant t" in next(iter(found.pending.values())).reason


def test_an_empty_backlog_and_an_empty_cluster() -> None:
    assert place_together(_cluster(), [], 0).placed == {}
    found = place_together(Scheduler(State()), [_asks("a", 1)], 0)  # type: ignore[list-item]
    assert found.placed == {} and found.pending["a"].reason


@pytest.mark.parametrize("planted", ["overfull", "gang"])
def test_the_log_checker_catches_planted_placements(planted: str) -> None:
    instance = draw(3)
    scheduler, workloads, raw = prepared(instance)
    if planted == "overfull":
        largest = max(workloads, key=lambda item: item.shape.request_map["cpu"])
        node_index = min(range(scheduler.state.size), key=lambda index: int(scheduler.state.cap[0, index]))
        for count in range(20):
            scheduler.state.adopt(replace(largest, id=f"w{count:02d}"), Seat(node_index), 0)
        with pytest.raises(Broken):
            check_log(scheduler, raw)
    else:
        place_together(scheduler, workloads, 0, steps=0)
        gang = next(item for item in workloads if item.gang and scheduler.state.seat(item.id))
        scheduler.state.release(gang.id)
        assert any("gang" in fault for fault in faults(instance, placement_of(instance, scheduler)))
