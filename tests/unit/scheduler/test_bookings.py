"""The deadline planner on the scheduler's own state."""

import pytest

from hub.scheduler import Invalid, Placed
from hub.scheduler import workload as parse_workload
from hub.scheduler.arrays import GONE, Seat
from hub.scheduler.bookings import job, timetable
from hub.scheduler.moves import begin_move
from tests.unit.scheduler.fleet_builder import GB, Fleet, item, node


def batch(name: str, cpu: int, seconds: int, deadline: int | None = None, **more: object) -> dict[str, object]:
    return {"id": name, "kind": "batch", "requests": {"cpu": cpu, "memory": GB}, "duration_ms": seconds * 1000, **({"deadline_ms": deadline * 1000} if deadline else {}), **more}


def test_a_job_is_planned_around_what_runs() -> None:
    fleet = Fleet(node("n0"), node("n1"))
    fleet.put(item("service", 6, 4), "n1")
    assert isinstance(fleet.scheduler.reserve(parse_workload(batch("first", 6, 100)), 0), Placed)
    plan = timetable(fleet.state, 10_000, margin_permille=0)
    assert [(hold.job.id, hold.nodes, hold.end_ms) for hold in plan.running.values()] == [("first", (0,), 100_000)]
    verdict = plan.submit(job(fleet.state, parse_workload(batch("second", 4, 50, 110)), 0), 10_000)
    assert verdict.text == ("will miss by 40 s: 2000m CPU short on n0 until 100000 ms, held by first; it makes it if first ends 40 s earlier, at 60000 ms, "
                            "or with 1 more node like n0, or with the deadline 40 s later")
    assert plan.submit(job(fleet.state, parse_workload(batch("second", 4, 50, 150)), 0), 10_000).admitted
    assert [forecast.start_ms for forecast in plan.ended("first", 20_000)] == [20_000]


def test_nodes_that_are_down_cordoned_or_forbidden_are_not_planned_with() -> None:
    fleet = Fleet(node("n0"), node("n1"), node("n2", zone="z2"))
    fleet.state.set_status("n0", GONE)
    fleet.state.set_cordon("n1", True)
    plan = timetable(fleet.state, 0)
    forecast = plan.submit(job(fleet.state, parse_workload(batch("a", 1, 10, 100))), 0).forecast
    assert forecast is not None and forecast.nodes == (2,)
    refused = plan.submit(job(fleet.state, parse_workload(batch("b", 1, 10, 100, node_selector={"zone": "z1"}))), 0)
    assert refused.text == "no node that it may use is there"


def test_a_gang_is_one_job_and_a_move_holds_both_ends() -> None:
    fleet = Fleet(node("n0"), node("n1"))
    fleet.put(item("vm", 8, 4), "n0")
    begin_move(fleet.state, "vm", Seat(1), 0)
    plan = timetable(fleet.state, 0)
    gang = job(fleet.state, parse_workload(batch("g1", 2, 10, 100, gang={"id": "g", "size": 4})))
    assert (gang.id, gang.members) == ("g", 4)
    assert plan.submit(gang, 0).late_ms is None
    with pytest.raises(Invalid, match="does not say how long it runs"):
        job(fleet.state, parse_workload({"id": "x", "kind": "batch"}))
