"""What depends on time: deadlines, backfill, functions and their idle instances, rebalancing under random clusters."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler import Invalid, Placed, Ranker, Scheduler, State, deadline, node, rebalance, workload
from hub.scheduler.audit import check_invariants
from hub.scheduler.functions import Call, FunctionPool, WarmFirst, keep_alive_ms, worth
from hub.scheduler.rebalance import Limits
from tests.unit.scheduler import streams

Json = dict[str, Any]


def cluster(*cpus: int) -> Scheduler:
    state = State(seed=3)
    state.add_nodes([node({"name": f"n{at}", "capacity": {"cpu": cpu, "memory": "8Gi"}, "images": ["f"] if at == 1 else []}) for at, cpu in enumerate(cpus)])
    return Scheduler(state)


def job(name: str, cpu: int, duration_ms: int, deadline_ms: int | None = None, **more: Any) -> Any:
    late: Json = {} if deadline_ms is None else {"deadline_ms": deadline_ms}
    return workload({"id": name, "kind": "batch", "requests": {"cpu": cpu}, "duration_ms": duration_ms, **late, **more})


def test_admission_says_by_how_much_a_deadline_would_be_missed() -> None:
    scheduler = cluster(4)
    assert isinstance(scheduler.reserve(job("runs", 4, 100_000), 0), Placed)
    answer = deadline.admit(scheduler, [], job("late", 4, 60_000, 120_000), 0)
    assert not answer.accepted and answer.message == "late will miss by 40 s" and answer.slot.start_ms == 100_000
    assert deadline.admit(scheduler, [], job("in time", 4, 20_000, 120_000), 0).accepted
    assert deadline.admit(scheduler, [], job("never", 5, 1), 0).message == "never will never fit on a node that may take it"


def test_admission_protects_those_that_wait() -> None:
    scheduler = cluster(4)
    waiting = [job("first", 4, 50_000, 60_000)]
    assert deadline.admit(scheduler, waiting, job("patient", 4, 50_000, 200_000), 0).accepted
    answer = deadline.admit(scheduler, waiting, job("pushy", 4, 20_000, 30_000), 0)
    assert not answer.accepted and answer.message == "1 that wait would miss, first by 10 s"


def test_earliest_deadline_first_and_backfill_that_delays_nobody() -> None:
    scheduler = cluster(4)
    scheduler.reserve(job("runs", 3, 100_000), 0)
    queue = [job("wide", 4, 10_000, 500_000), job("short", 1, 100_000, 900_000), job("long", 1, 100_001, 900_000)]
    assert [placed.workload for placed in deadline.start(scheduler, queue, 0)] == ["short"]
    assert scheduler.state.seat("long") is None, "it would delay the one at the head by 1 ms"


def test_a_batch_workload_must_say_how_long_it_runs() -> None:
    with pytest.raises(Invalid, match="duration_ms"):
        deadline.schedule(cluster(1), [workload({"id": "w"})], 0)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50), st.integers(1, 300)), min_size=1, max_size=12), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_a_schedule_never_takes_more_than_there_is(jobs: list[tuple[int, int, int]], cpus: list[int]) -> None:
    scheduler = cluster(*cpus)
    queue = [job(f"j{at}", cpu, duration, until) for at, (cpu, duration, until) in enumerate(jobs)]
    slots = {slot.workload: slot for slot in deadline.schedule(scheduler, queue, 0)}
    for at, cpu in enumerate(cpus):
        mine = [(slot.start_ms, slot.end_ms, jobs[int(name[1:])][0]) for name, slot in slots.items() if slot.node == f"n{at}"]
        for moment, _, _ in mine:
            assert sum(size for start, end, size in mine if start <= moment < end) <= cpu
    for name, slot in slots.items():
        size, duration, until = jobs[int(name[1:])]
        assert (slot.node is None) == (size > max(cpus))
        if slot.node is not None:
            assert slot.end_ms - slot.start_ms == duration and slot.late_ms == max(0, slot.end_ms - until)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 10_000_000), max_size=20), st.integers(0, 100_000), st.integers(0, 1 << 34))
def test_the_keep_alive_is_the_best_of_all(gaps: list[int], cost: int, memory: int) -> None:
    ordered, best = sorted(gaps), keep_alive_ms(gaps, cost, memory, 1_000.0)
    mine = max(0.0, worth(ordered, best, cost, memory, 1_000.0))
    assert mine >= max([0.0, *(worth(ordered, other, cost, memory, 1_000.0) for other in [*gaps, *(gap + 1 for gap in gaps), 1])]) - 1e-6 * max(1.0, abs(mine))


def test_a_function_is_warm_while_that_is_worth_its_memory() -> None:
    scheduler = cluster(8, 8)
    pool = FunctionPool(scheduler, cold_cost_per_ms=1.0, price_per_gib_hour=1_000.0)
    function = workload({"id": "f", "kind": "function", "requests": {"cpu": "100m", "memory": "1Gi"}, "image": "f"})
    pool.learn_cold_start("f", 2_000)
    clock, cold = 0, []
    for _ in range(10):
        answer = pool.call(function, clock)
        assert isinstance(answer, Call)
        cold.append(answer.cold)
        pool.done("f", answer.instance, clock)
        assert pool.expire([function], clock + 50_000) == [] or len(cold) == 1
        clock += 60_000
    assert cold == [True, True, *[False] * 8] and pool.keep_ms(function) == 60_000
    assert pool.expire([function], clock) == [] and len(pool.expire([function], clock + 120_000)) == 1
    assert not scheduler.state.slot_of
    check_invariants(scheduler.state)


def test_functions_go_where_image_and_instances_are() -> None:
    scheduler = Scheduler(cluster(8, 8, 8).state, Ranker({"warm": WarmFirst()}))
    function = {"kind": "function", "requests": {"cpu": "100m"}, "image": "f"}
    for name in ("a", "b"):
        placed = scheduler.reserve(workload({"id": name, **function}), 0)
        assert isinstance(placed, Placed) and placed.node == "n1"


@settings(max_examples=25)
@given(streams.node_list(), streams.stream(), st.booleans())
def test_a_rebalancing_plan_holds_at_every_step_and_comes_to_rest(nodes: list[Json], events: list[tuple[str, Any]], cheap: bool) -> None:
    state = State(seed=5)
    state.add_nodes([node({**entry, "price": 10 if cheap else 1_000_000}) for entry in nodes])
    scheduler = Scheduler(state)
    for what, value in events:
        if what == "reserve":
            scheduler.reserve(workload(value), 0)
        elif what == "release" and state.slot_of:
            scheduler.release(sorted(state.slot_of)[value % len(state.slot_of)])
    before = state.digest()
    limits = Limits(cooldown_ms=0)
    made = rebalance.plan(scheduler, 10, {}, limits)
    assert state.digest() == before
    for step in made.steps:
        seat = state.seat(step.workload)
        assert seat is not None and state.nodes[seat.node].name == step.source
        state.move(step.workload, step.seat, 10)
        check_invariants(state)
    for name in made.emptied:
        assert state.load[state.node_index[name]] == 0
    assert len({step.workload for step in made.steps}) == len(made.steps)
    rounds = 0
    while (again := rebalance.plan(scheduler, 20, {}, limits)).steps:
        rebalance.carry_out(scheduler, again, 20)
        rounds += 1
        assert rounds <= len(nodes), "it must come to rest"
    assert np.array_equal(state.load, np.bincount(state.w_node[state.w_node >= 0], minlength=state.size))
