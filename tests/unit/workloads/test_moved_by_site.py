"""What the hub makes of it when a site that was cut off gave a workload to a sibling by itself: it stands there, or is stopped there; nothing is wanted twice, in whatever order edges are heard."""

import itertools
from typing import Any

import pytest

from hub.scheduler import Invalid
from hub.scheduler.audit import check_invariants
from hub.workloads.documents import Conflict, read_list
from hub.workloads.rounds import LOST_AFTER_MS
from hub.workloads.views import workload_view
from tools.bench import placement_log

from .kept import Desk, few_steps, round_of, said, work  # noqa: F401 few_steps is a fixture
from .test_planner import entries

EDGES = {"gw-1": True, "gw-2": True, "gw-3": True}


def site(kind: str = "edge") -> tuple[Desk, str, list[str]]:
    """A desk, the node of a workload that may move and runs, and the other nodes."""
    desk = Desk()
    for name in EDGES:
        desk.node(name, "edge", kind=kind, site="hall-2")
    round_of(desk, **EDGES)
    desk.submit(work("w", when_cut_off="move"))
    origin = desk.row("w").node
    said(desk, origin, "w", 1, "running")
    return desk, origin, [name for name in EDGES if name != origin]


def moved(desk: Desk, edge: str, origin: str, fence: int, state: str = "running", epoch: int = 1) -> None:
    desk.do(lambda planner, now: planner.said(edge, desk.number(edge), {"id": "w", "epoch": epoch, "state": state, "reason": "", "for": origin, "fence": fence}, now))


def sound(desk: Desk) -> None:
    """What is booked is true, a restart knows the same, and no two nodes are wanted to run it."""
    check_invariants(desk.planner.state)
    wanted = {name: entries(desk, name) for name in EDGES}
    assert sum(one[2] == "running" for those in wanted.values() for one in those) <= 1, wanted
    assert desk.restart() == []
    check_invariants(desk.planner.state)
    assert {name: entries(desk, name) for name in EDGES} == wanted
    assert placement_log.overcommit(desk.kept.log(), desk.now, None) == (0.0, [])


def test_it_stands_where_the_site_put_it_under_the_same_epoch() -> None:
    desk, origin, (other, _) = site()
    moved(desk, other, origin, 7)
    row = desk.row("w")
    assert (row.state, row.node, row.epoch) == ("placed", other, 1) and entries(desk, other) == [("w", 1, "running")] and entries(desk, origin) == []
    sound(desk)
    moved(desk, other, origin, 7)
    for state in ("failed", "stopped", "running"):
        said(desk, origin, "w", 1, state)
    assert (desk.row("w").node, desk.row("w").epoch, desk.row("w").state) == (other, 1, "placed"), "what the origin says of it is from before"
    said(desk, other, "w", 1, "done")
    assert desk.row("w").state == "done" and entries(desk, other) == []
    sound(desk)


def test_of_two_that_had_it_one_after_the_other_the_higher_fence_counts_whoever_is_heard_first() -> None:
    for order in itertools.permutations((0, 1)):
        desk, origin, others = site()
        for at in order:
            moved(desk, others[at], origin, 7 + at)
        assert desk.row("w").node == others[1] and desk.row("w").epoch == 1
        moved(desk, others[0], origin, 7, "failed")
        assert desk.row("w").state == "placed"
        sound(desk)


def test_one_that_was_cancelled_meanwhile_is_stopped_where_it_runs() -> None:
    desk, origin, (other, _) = site()
    desk.do(lambda planner, now: planner.cancel("w", now))
    moved(desk, other, origin, 7)
    assert entries(desk, other) == [("w", 1, "stopped")] and entries(desk, origin) == [] and desk.row("w").state == "ending"
    sound(desk)
    said(desk, other, "w", 1, "stopped")
    assert desk.row("w").state == "cancelled" and entries(desk, other) == []
    sound(desk)


def test_a_move_of_the_hub_waits_until_the_site_has_stopped_it() -> None:
    desk, origin, (other, third) = site()
    assert desk.do(lambda planner, now: planner.move("w", now, "moved", third))
    assert entries(desk, third) == []
    moved(desk, other, origin, 7)
    assert entries(desk, other) == [("w", 1, "stopped")] and entries(desk, third) == []
    sound(desk)
    said(desk, other, "w", 1, "stopped")
    assert entries(desk, third) == [("w", 2, "running")]
    sound(desk)


def test_where_its_node_was_taken_out_and_it_is_placed_anew_the_sites_own_is_stopped_first() -> None:
    desk, origin, others = site()
    desk.do(lambda planner, now: planner.remove_node(origin, False, now))
    new = desk.row("w").node
    (other,) = (name for name in others if name != new)
    said(desk, new, "w", 2, "running")
    moved(desk, other, origin, 7)
    assert entries(desk, other) == [("w", 1, "stopped")] and entries(desk, new) == [] and desk.row("w").epoch == 2
    said(desk, other, "w", 1, "stopped")
    assert entries(desk, new) == [("w", 2, "running")]


def test_a_node_whose_workloads_its_site_may_run_elsewhere_goes_only_where_somebody_says_that_they_are_lost() -> None:
    desk, origin, (other, _) = site()
    with pytest.raises(Conflict, match=r"has w, which its site may be running.*lost=true"):
        desk.do(lambda planner, now: planner.remove_node(origin, False, now, lost=False))
    assert (desk.row("w").node, desk.row("w").epoch) == (origin, 1), "nothing was changed"
    moved(desk, other, origin, 7)
    assert desk.do(lambda planner, now: planner.remove_node(origin, False, now, lost=False)), "its site has told where it is"
    with pytest.raises(Conflict):
        desk.do(lambda planner, now: planner.remove_node(other, False, now, lost=False))
    desk.do(lambda planner, now: planner.cancel("w", now))
    assert desk.do(lambda planner, now: planner.remove_node(other, False, now, lost=False)) and desk.row("w").state == "cancelled"


def test_who_looks_sees_that_the_site_moved_it() -> None:
    desk, origin, (other, _) = site()
    assert workload_view(desk.planner, desk.row("w"))["moved_from"] == ""
    moved(desk, other, origin, 7)
    assert workload_view(desk.planner, desk.row("w"))["moved_from"] == origin and workload_view(desk.planner, desk.row("w"))["node"] == other


def test_what_waits_since_its_node_was_taken_out_is_found_running() -> None:
    desk, origin, (other, third) = site()
    for name in (other, third):
        desk.do(lambda planner, now, name=name: planner.cordon(name, "cordon", now))
    desk.do(lambda planner, now: planner.remove_node(origin, False, now))
    assert desk.row("w").state == "pending"
    moved(desk, other, origin, 7)
    assert (desk.row("w").state, desk.row("w").node, desk.row("w").epoch) == ("placed", other, 1) and entries(desk, other) == [("w", 1, "running")]
    sound(desk)


def test_an_epoch_from_before_a_restore_makes_what_stands_go_on_above_it_and_a_stranger_is_refused() -> None:
    desk, origin, (other, _) = site()
    moved(desk, other, origin, 7, epoch=2)
    assert (desk.row("w").node, desk.row("w").epoch) == (origin, 3) and entries(desk, other) == []
    with pytest.raises(Conflict, match="no node here"):
        moved(desk, "gw-9", origin, 7)
    sound(desk)


def test_the_silence_of_its_node_alone_never_places_it_anew() -> None:
    for kind in ("edge", "cloud"):
        desk, origin, others = site(kind)
        round_of(desk, after_ms=2 * LOST_AFTER_MS, **{origin: desk.now, **dict.fromkeys(others, True)})
        assert desk.row("w").node == origin and desk.row("w").epoch == 1
    desk = Desk()  # control: one that stays moves away from a cloud node
    for name in EDGES:
        desk.node(name, "edge", kind="cloud")
    round_of(desk, **EDGES)
    desk.submit(work("w"))
    before = desk.row("w").node
    round_of(desk, after_ms=2 * LOST_AFTER_MS, **{name: desk.now if name == before else True for name in EDGES})
    assert desk.row("w").node != before


@pytest.mark.parametrize("more", [
    {"when_cut_off": "perhaps"}, {"when_cut_off": "move", "kind": "batch"}, {"when_cut_off": "move", "lost_after_ms": 5}, {"when_cut_off": "move", "gpu": {"count": 1}}, {"when_cut_off": ["move"]},
])
def test_documents_that_cannot_move_are_refused_by_field(more: dict[str, Any]) -> None:
    with pytest.raises(Invalid) as caught:
        read_list([work("w", **more)])
    assert caught.value.field == "workloads[0].when_cut_off"
