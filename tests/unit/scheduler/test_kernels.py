"""The compiled kernels decide exactly what numpy decides."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler import Invalid, Placed, Ranker, Scheduler, State, kernels, node, preempt, workload
from hub.scheduler.audit import check_invariants
from hub.scheduler.fragmentation import Fragmentation, Typical
from hub.scheduler.needs import Needs
from hub.scheduler.rank import SoftSpread, View
from tests.unit.scheduler import streams
from tests.unit.scheduler.test_preempt_everywhere import KINDS, cluster
from tools.bench.scheduler_latency import Run, fill


@pytest.fixture
def numpy_again() -> Iterator[None]:
    yield
    kernels.use("off")


def test_after_warming_decisions_find_the_kernels_compiled(numpy_again: None) -> None:
    pytest.importorskip("numba")
    assert kernels.use("on")
    kernels.warm()
    for name in ("add_scores", "base_bits", "best", "gradients", "mark_gpu", "mark_spread", "spread_scores", "add_victims", "least_harm"):
        assert getattr(kernels.active, name).signatures, name
    kernels.use("off")


Outcome = tuple[str, int, tuple[str, ...]] | None
"""Node, score and victims of a reservation; None where it waits."""


def run(nodes: list[streams.Json], events: list[tuple[str, Any]], choice: str) -> tuple[str, list[Outcome]]:
    """All placements of a stream and the digest at the end; the books are looked at after each."""
    kernels.use(choice)
    state = State(seed=11)
    state.add_nodes([node({**entry, "price": 1_000 * len(entry["labels"]) + at, "idle_mw": 10 * at, "busy_mw": 500}) for at, entry in enumerate(nodes)])
    typical = [Typical(1000, 1, 500, (), 400_000), Typical(500, 1, 1000, ("T4",), 300_000), Typical(250, 2, 1000, (), 200_000), Typical(1000, 0, 0, (), 100_000)]
    scheduler = Scheduler(state, Ranker({"fragmentation": Fragmentation(typical)}))
    placed: list[Outcome] = []
    for what, value in events:
        if what == "reserve":
            item = workload(value)
            decision = scheduler.decide(item, 0)
            answer = preempt.reserve(scheduler, item, 0)
            done = answer.placed if isinstance(answer, preempt.Made) else answer
            placed.append((done.node, decision.score, answer.plan.victims if isinstance(answer, preempt.Made) else ()) if isinstance(done, Placed) else None)
        elif what == "release" and state.slot_of:
            scheduler.release(sorted(state.slot_of)[value % len(state.slot_of)])
        check_invariants(state)
    return state.digest(), placed


def test_a_mixed_stream_ends_in_the_same_state(numpy_again: None) -> None:
    pytest.importorskip("numba", reason="numba is not installed: numpy does the work")
    ends = []
    for choice in ("on", "off"):
        kernels.use(choice)
        stream = Run(30, 300, 7)
        fill(stream, 500)
        check_invariants(stream.scheduler.state)
        ends.append((stream.scheduler.state.digest(), dict(stream.outcomes)))
    assert ends[0] == ends[1] and ends[0][1]["preemptions"] > 0


def test_a_kernel_that_forgets_is_seen(numpy_again: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="numba is not installed: numpy does the work")
    nodes = [{"name": "n0", "capacity": {"cpu": 4, "memory": "8Gi"}, "labels": {}}]
    events: list[tuple[str, Any]] = [("reserve", {"id": f"w{at}", "requests": {"cpu": 1, "memory": "1Gi"}}) for at in range(3)] + [("release", 1)]
    assert run(nodes, events, "on") == run(nodes, events, "off")
    kernels.use("on")
    monkeypatch.setattr(kernels.active, "delist", lambda *_: None)
    with pytest.raises(AssertionError, match="order of importance"):
        run(nodes, events, "on")


@settings(max_examples=25)
@given(streams.node_list(), streams.stream())
def test_numba_and_numpy_decide_the_same(nodes: list[streams.Json], events: list[tuple[str, Any]]) -> None:
    pytest.importorskip("numba", reason="numba is not installed: numpy does the work")
    try:
        assert run(nodes, events, "on") == run(nodes, events, "off")
    finally:
        kernels.use("off")


def needed(kind: str, seed: int, choice: str) -> list[Any]:
    """All that a search asks of what a workload needs, of one random cluster."""
    kernels.use("off")
    scheduler, asked = cluster(kind, random.Random(f"{kind} {seed}"))
    kernels.use(choice)
    state = scheduler.state
    needs = Needs(state, state.klass(asked.shape), asked.priority)
    levels = sorted(level for level in state.levels if level < asked.priority)
    return [needs.free[needs.rows], needs.amounts, needs.ending, needs.reach, *((needs.held(level)[needs.rows + 1], needs.most(level)[needs.rows]) for level in levels)]


def differs(kind: str, seed: int) -> bool:
    ours, theirs = needed(kind, seed, "on"), needed(kind, seed, "off")
    return len(ours) != len(theirs) or not all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 1 << 40))
def test_what_a_workload_needs_is_the_same(kind: str, seed: int) -> None:
    pytest.importorskip("numba", reason="numba is not installed: numpy does the work")
    try:
        assert not differs(kind, seed)
    finally:
        kernels.use("off")


@pytest.mark.parametrize("planted", ["who is on the way out counts", "no second least"])
def test_a_kernel_that_adds_up_wrongly_is_seen(planted: str, numpy_again: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="numba is not installed: numpy does the work")
    kernels.use("on")
    shipped, in_domain = kernels.active.add_victims, kernels.active.in_domain
    if planted == "no second least":
        monkeypatch.setattr(kernels.active, "evenness", lambda eligible, domain, size, counts, lead, least, _: lead - in_domain(domain, size, np.where(eligible, counts, 0)))
    else:
        monkeypatch.setattr(kernels.active, "add_victims", lambda *given: shipped(*given[:7], np.zeros(len(given[7]), np.bool_), *given[8:]))
    assert any(differs("spread", seed) for seed in range(20))


def soft_scores(choice: str) -> list[list[int]]:
    """How soft spread scores the nodes of one filled cluster, for each class that asks for it, all nodes and only some being left."""
    kernels.use("off")
    stream = Run(30, 300, 7)
    fill(stream, 100)
    kernels.use(choice)
    state = stream.scheduler.state
    views = [View(state, item, state.facts(state.klass(item.shape)), np.arange(30) % every == 0, 0) for item in state.classes if item is not None and item.shape.spread for every in (1, 3, 40)]
    return [scores.tolist() for view in views if (scores := SoftSpread().score(view)) is not None]


def test_soft_spread_scores_the_same_and_a_kernel_that_takes_all_nodes_for_scored_is_seen(numpy_again: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="numba is not installed: numpy does the work")
    expected = soft_scores("off")
    assert len(expected) > 10 and soft_scores("on") == expected
    shipped = kernels.active.spread_scores
    monkeypatch.setattr(kernels.active, "spread_scores", lambda total, scored, keyed: shipped(total, keyed, keyed))
    assert soft_scores("on") != expected


def test_without_numba_on_is_refused_and_auto_falls_back(monkeypatch: pytest.MonkeyPatch, numpy_again: None) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(kernels, "import_module", missing)
    assert not kernels.use("auto") and kernels.active is None
    with pytest.raises(Invalid, match="not installed"):
        kernels.use("on")
    assert not kernels.use("off")
