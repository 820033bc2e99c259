"""A list is placed as the policies say; where that leaves some without a place, all together. The bound beside it is one."""

from itertools import product
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler.audit import check_invariants
from hub.workloads import placing
from hub.workloads.documents import read_list
from hub.workloads.placing import Together
from hub.workloads.rounds import Rounds

from .kept import Desk
from .test_planner import round_of, work


def submit(desk: Desk, *documents: dict[str, Any]) -> Together:
    entries = read_list(list(documents))
    found: Together = desk.do(lambda planner, now: planner.submit_all(entries, now))[1]
    return found


def two_nodes() -> Desk:
    desk = Desk()
    for name in ("n-1", "n-2"):
        desk.node(name)
    return desk


LIST = [work("a", 2), work("b", 2), work("c", 4)]
"""One by one a and b go to a node each, and c has none."""


def test_what_has_no_place_one_by_one_gets_it_together() -> None:
    desk = two_nodes()
    found = submit(desk, *LIST)
    assert (found.placed, found.bound, found.how, found.proven) == (3, 3, "together", True)
    assert desk.row("a").node == desk.row("b").node != desk.row("c").node and {desk.row(name).epoch for name in "abc"} == {1}
    check_invariants(desk.planner.state)
    assert desk.restart() == []


def test_the_control_without_placing_together_one_waits(monkeypatch: Any) -> None:
    """The negative control: the same list on a hub whose limit is 0."""
    monkeypatch.setattr(placing, "TOGETHER_MOST", 0)
    desk = two_nodes()
    assert submit(desk, *LIST) == Together(2, 3, "one by one", 0) and desk.row("c").state == "pending"


def test_where_all_find_a_place_the_policies_have_their_way_and_nothing_is_searched(monkeypatch: Any) -> None:
    monkeypatch.setattr(placing, "place_together", None)
    desk = two_nodes()
    assert submit(desk, work("a", 2), work("b", 2)) == Together(2, 2, "one by one", 0) and desk.row("a").node != desk.row("b").node
    assert submit(desk, work("d", 9), work("e", 9)) == Together(0, 0, "one by one", 0)
    entries = read_list([work("f")])
    assert desk.do(lambda planner, now: planner.submit_all(entries, now))[1] is None


def test_what_refuses_or_waits_is_left_alone_and_priority_counts_first() -> None:
    desk = two_nodes()
    found = submit(desk, work("a", 2), work("b", 2), work("c", 4, priority=5), work("d", 4), *(work(f"g{n}", 1, gang={"id": "g", "size": 2}) for n in range(2)))
    assert desk.row("c").state == "placed" and found.bound >= found.placed
    check_invariants(desk.planner.state)


def test_what_waits_when_the_nodes_come_is_placed_together() -> None:
    desk = Desk()
    submit(desk, *LIST)
    assert {desk.row(name).state for name in "abc"} == {"pending"}
    desk.node("gw-1", "edge", kind="edge")
    desk.node("gw-2", "edge", kind="edge")
    desk.restart()
    rounds = Rounds(desk.planner)
    round_of(desk, rounds)
    assert {desk.row(name).state for name in "abc"} == {"pending"}, "nobody has been heard from yet"
    round_of(desk, rounds, **{"gw-1": True, "gw-2": True})
    assert {desk.row(name).state for name in "abc"} == {"placed"}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 8)), min_size=2, max_size=5), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 8)), min_size=1, max_size=2))
def test_the_bound_is_not_below_what_every_way_of_placing_tried_gives(items: list[tuple[int, int]], nodes: list[tuple[int, int]]) -> None:
    desk = Desk()
    for number, (cpu, memory) in enumerate(nodes):
        desk.node(f"n{number}", capacity={"cpu": cpu, "memory": memory})
    found = submit(desk, *({"id": f"w{number}", "requests": {"cpu": cpu, "memory": memory}} for number, (cpu, memory) in enumerate(items)))
    best = 0
    for where in product(range(-1, len(nodes)), repeat=len(items)):
        if all(sum(item[axis] for item, at in zip(items, where, strict=True) if at == node) <= nodes[node][axis] for node in range(len(nodes)) for axis in (0, 1)):
            best = max(best, sum(at >= 0 for at in where))
    assert found.placed <= best <= found.bound
    assert found.placed == sum(row.state == "placed" for row in desk.kept.workloads.values())
