"""The compiled kernels decide exactly what numpy decides."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings

from hub.scheduler import Invalid, Placed, Ranker, Scheduler, State, kernels, node, preempt, workload
from hub.scheduler.fragmentation import Fragmentation, Typical
from tests.unit.scheduler import streams


@pytest.fixture
def numpy_again() -> Iterator[None]:
    yield
    kernels.use("off")


def run(nodes: list[streams.Json], events: list[tuple[str, Any]], choice: str) -> tuple[str, list[tuple[str, int] | None]]:
    """All placements of a stream and the digest at the end."""
    kernels.use(choice)
    state = State(seed=11)
    state.add_nodes([node({**entry, "price": 1_000 * len(entry["labels"]) + at, "idle_mw": 10 * at, "busy_mw": 500}) for at, entry in enumerate(nodes)])
    typical = [Typical(1000, 1, 500, (), 400_000), Typical(500, 1, 1000, ("T4",), 300_000), Typical(250, 2, 1000, (), 200_000), Typical(1000, 0, 0, (), 100_000)]
    scheduler = Scheduler(state, Ranker({"fragmentation": Fragmentation(typical)}))
    placed: list[tuple[str, int] | None] = []
    for what, value in events:
        if what == "reserve":
            item = workload(value)
            decision = scheduler.decide(item, 0)
            answer = preempt.reserve(scheduler, item, 0)
            done = answer.placed if isinstance(answer, preempt.Made) else answer
            placed.append((done.node, decision.score) if isinstance(done, Placed) else None)
        elif what == "release" and state.slot_of:
            scheduler.release(sorted(state.slot_of)[value % len(state.slot_of)])
    return state.digest(), placed


@settings(max_examples=20)
@given(streams.node_list(), streams.stream())
def test_numba_and_numpy_decide_the_same(nodes: list[streams.Json], events: list[tuple[str, Any]]) -> None:
    pytest.importorskip("numba", reason="numba is not installed: numpy does the work")
    try:
        assert run(nodes, events, "on") == run(nodes, events, "off")
    finally:
        kernels.use("off")


def test_without_numba_on_is_refused_and_auto_falls_back(monkeypatch: pytest.MonkeyPatch, numpy_again: None) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(kernels, "import_module", missing)
    assert not kernels.use("auto") and kernels.active is None
    with pytest.raises(Invalid, match="not installed"):
        kernels.use("on")
    assert not kernels.use("off")
