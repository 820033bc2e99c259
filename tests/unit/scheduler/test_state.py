"""The state under random events: nothing overcommitted, everything can be undone, replayed and tried on the side, bit by bit."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler import Invalid, Pending, Placed, Scheduler, Seat, State, arrays, node, workload
from hub.scheduler.arrays import GONE, UP
from hub.scheduler.audit import check_invariants
from tests.unit.scheduler import streams
from tools.bench.placement_check import Checker

EXAMPLES = 25
"""Per property in the default run: about four seconds each."""


def apply(scheduler: Scheduler, event: tuple[str, Any], at: int, checker: Checker | None = None) -> None:
    """One event of a stream; the checker follows."""
    state, (what, value) = scheduler.state, event
    if what == "reserve":
        item = workload(value)
        answer = scheduler.reserve(item, at)
        if checker is not None and isinstance(answer, Placed):
            checker.placed(value, answer.node, answer.seat.gpus, answer.seat.numa[0][0] if len(answer.seat.numa) == 1 else None)
        return
    names = sorted(state.slot_of)
    if what in ("release", "ending"):
        if names:
            name = names[value % len(names)]
            if what == "ending":
                state.set_ending(name)
            else:
                assert scheduler.release(name)
                if checker is not None:
                    checker.released(name)
        return
    target = state.nodes[value % state.size]
    if what == "cordon":
        state.set_cordon(target.name, not state.cordon[value % state.size])
    elif what == "status":
        state.set_status(target.name, UP if state.status[value % state.size] else GONE)
    elif what == "beat":
        state.beat(target.name, at)
    else:
        labels = dict(target.labels)
        labels["disk"] = "hdd" if labels["disk"] == "ssd" else "ssd"
        state.add_nodes([type(target)(**{**{name: getattr(target, name) for name in target.__slots__}, "labels": tuple(sorted(labels.items()))})], at)


def cluster(nodes: list[streams.Json]) -> Scheduler:
    state = State(seed=7)
    state.add_nodes([node(item) for item in nodes])
    return Scheduler(state)


@settings(max_examples=EXAMPLES)
@given(streams.node_list(), streams.stream())
def test_books_hold_and_replay_is_identical(nodes: list[streams.Json], events: list[tuple[str, Any]]) -> None:
    scheduler = cluster(nodes)
    for at, event in enumerate(events):
        apply(scheduler, event, at)
        check_invariants(scheduler.state)
    assert State(seed=7).replay(scheduler.state.log).digest() == scheduler.state.digest()


@settings(max_examples=EXAMPLES)
@given(streams.node_list(), streams.stream())
def test_independent_checker_agrees_with_every_placement(nodes: list[streams.Json], events: list[tuple[str, Any]]) -> None:
    scheduler, checker = cluster(nodes), Checker(nodes)
    for at, event in enumerate(events):
        if event[0] in ("reserve", "release"):
            apply(scheduler, event, at, checker)
    assert not checker.problems


@settings(max_examples=EXAMPLES)
@given(streams.node_list(), streams.stream(), st.integers(0, 40))
def test_undo_gives_back_the_same_bits(nodes: list[streams.Json], events: list[tuple[str, Any]], cut: int) -> None:
    scheduler = cluster(nodes)
    for at, event in enumerate(events[:cut]):
        apply(scheduler, event, at)
    before, log = scheduler.state.digest(), list(scheduler.state.log)
    outer = scheduler.state.begin()
    for at, event in enumerate(events[cut:]):
        apply(scheduler, event, at)
        inner = scheduler.state.begin()
        apply(scheduler, ("release", at), at)
        scheduler.state.undo(inner)
    scheduler.state.undo(outer)
    assert scheduler.state.digest() == before
    assert scheduler.state.log == log
    check_invariants(scheduler.state)
    for at, event in enumerate(events):
        apply(scheduler, event, at)
        check_invariants(scheduler.state)


@settings(max_examples=EXAMPLES)
@given(streams.node_list(), streams.stream(), st.integers(0, 40))
def test_a_snapshot_and_its_origin_do_not_see_each_other(nodes: list[streams.Json], events: list[tuple[str, Any]], cut: int) -> None:
    scheduler = cluster(nodes)
    for at, event in enumerate(events[:cut]):
        apply(scheduler, event, at)
    before = scheduler.state.digest()
    aside = scheduler.on(scheduler.state.snapshot())
    twin = scheduler.on(scheduler.state.snapshot())
    for at, event in enumerate(events[cut:]):
        apply(aside, event, at)
    assert scheduler.state.digest() == before
    after = aside.state.digest()
    for at, event in enumerate(events[cut:]):
        apply(scheduler, event, at)
    assert aside.state.digest() == after == scheduler.state.digest()
    assert twin.state.digest() == before
    for state in (scheduler.state, aside.state, twin.state):
        check_invariants(state)


@settings(max_examples=EXAMPLES)
@given(streams.node_list(), streams.stream())
def test_releasing_all_gives_everything_back(nodes: list[streams.Json], events: list[tuple[str, Any]]) -> None:
    scheduler = cluster(nodes)
    for at, event in enumerate(events):
        apply(scheduler, event, at)
    for name in list(scheduler.state.slot_of):
        scheduler.release(name)
    assert np.array_equal(scheduler.state.free, scheduler.state.cap)
    assert not any(row.any() for row in scheduler.state.counts)
    assert not any(used.any() for used in scheduler.state.used_by.values())
    check_invariants(scheduler.state)


@settings(max_examples=EXAMPLES)
@given(streams.node_list(), streams.stream())
def test_reserve_is_idempotent(nodes: list[streams.Json], events: list[tuple[str, Any]]) -> None:
    scheduler = cluster(nodes)
    for at, event in enumerate(events):
        apply(scheduler, event, at)
    before = scheduler.state.digest()
    for what, value in events:
        if what == "reserve" and value["id"] in scheduler.state.slot_of:
            answer = scheduler.reserve(workload(value), 99)
            assert isinstance(answer, Placed) and answer.again
            with pytest.raises(Invalid, match="another workload"):
                scheduler.reserve(workload({**value, "priority": value["priority"] + 1}), 99)
    assert scheduler.state.digest() == before


@settings(max_examples=EXAMPLES)
@given(streams.node_list(), streams.stream())
def test_books_hold_when_classes_are_swept(nodes: list[streams.Json], events: list[tuple[str, Any]]) -> None:
    """With room for few shapes, unused ones are forgotten all the time; more live shapes than that are one clear error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "MAX_CLASSES", 3)
        scheduler, checker = cluster(nodes), Checker(nodes)
        for at, event in enumerate(events):
            try:
                if event[0] in ("reserve", "release"):
                    apply(scheduler, event, at, checker)
            except Invalid as error:
                assert "different shapes" in error.problem
            check_invariants(scheduler.state)
        assert not checker.problems and len(scheduler.state.class_of) <= 3


def small() -> Scheduler:
    return cluster([{"name": "n0", "capacity": {"cpu": 2, "memory": "4Gi"}}, {"name": "n1", "capacity": {"cpu": 2, "memory": "4Gi"}}])


def test_a_node_that_vanishes_between_deciding_and_committing() -> None:
    scheduler = small()
    item = workload({"id": "w", "requests": {"cpu": 1}})
    decision = scheduler.decide(item, 0)
    assert decision.seat is not None
    name = scheduler.state.nodes[decision.seat.node].name
    scheduler.vanish(name, 0)
    before = scheduler.state.digest()
    assert scheduler.commit(decision, 0) is None
    assert scheduler.state.digest() == before
    answer = scheduler.reserve(item, 0)
    assert isinstance(answer, Placed) and answer.node != name


def test_a_decision_overtaken_by_another_is_checked_again() -> None:
    scheduler = cluster([{"name": "n0", "capacity": {"cpu": 2, "memory": "4Gi"}}])
    first, second = (scheduler.decide(workload({"id": name, "requests": {"cpu": "1500m"}}), 0) for name in "ab")
    assert scheduler.commit(first, 0) is not None
    assert scheduler.commit(second, 0) is None
    check_invariants(scheduler.state)


def test_a_decision_made_inside_a_trial_that_was_taken_back_is_checked_again() -> None:
    """As many events later, but not the same ones: the anti-affinity that came instead is honoured."""
    scheduler = cluster([{"name": "n0", "capacity": {"cpu": 4, "memory": "4Gi"}}])
    lonely = {"anti_affinity": [{"topology_key": "host", "selector": {"labels": {"app": "a"}}}]}
    mark = scheduler.state.begin()
    scheduler.reserve(workload({"id": "x"}), 0)
    decision = scheduler.decide(workload({"id": "w", "labels": {"app": "a"}}), 0)
    scheduler.state.undo(mark)
    scheduler.reserve(workload({"id": "y", **lonely}), 0)
    assert scheduler.commit(decision, 0) is None


def test_a_refused_placement_changes_nothing() -> None:
    scheduler = small()
    before = scheduler.state.digest()
    for bad, seat in (({"cpu": 3}, Seat(0)), ({"memory": "5Gi"}, Seat(1))):
        with pytest.raises(Invalid):
            scheduler.state.place(workload({"id": "w", "requests": bad}), seat, 0)
    with pytest.raises(Invalid, match="no node offers"):
        scheduler.reserve(workload({"id": "w", "requests": {"example.com/fpga": 1}}), 0)
    with pytest.raises(Invalid, match="unknown"):
        scheduler.state.set_cordon("nobody", True)
    assert scheduler.state.digest() == before
    assert isinstance(scheduler.reserve(workload({"id": "w", "requests": {"cpu": 3}}), 0), Pending)


def test_the_audit_catches_planted_errors() -> None:
    """Negative control: each book that is falsified is found."""
    scheduler = cluster([{"name": "n0", "capacity": {"cpu": 4, "memory": "4Gi"}, "gpus": [{"model": "T4", "count": 2}], "zone": "z1"}])
    spread = [{"topology_key": "zone", "selector": {"labels": {"app": "a"}}}]
    scheduler.reserve(workload({"id": "w", "requests": {"cpu": 1}, "gpu": {"milli": 500}, "labels": {"app": "a"}, "spread": spread, "tenant": "t"}), 0)
    state = scheduler.state
    check_invariants(state)
    for plant in (lambda s: s.free.__setitem__((0, 0), 1), lambda s: s.gpu_free.__setitem__((0, 1), 900), lambda s: s.counts[0].__setitem__(0, 5),
                  lambda s: s.load.__setitem__(0, 0), lambda s: s.used_by["t"].__setitem__(0, 0), lambda s: s.w_node.__setitem__(s.slot_of["w"], 5)):
        broken = State(seed=7).replay(state.log)
        plant(broken)
        with pytest.raises(AssertionError):
            check_invariants(broken)
