"""Batch with deadlines: what is admitted is kept, what is refused is refused for the reason given, backfill delays nobody. Checked by plain Python that shares no code with it."""

import itertools
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler.batch import Hold, Job
from hub.scheduler.deadline import Timetable
from hub.scheduler.profile import Overcommitted, Profile

RESOURCES = ("cpu", "memory")


def table(*free: tuple[int, int]) -> Timetable:
    return Timetable(RESOURCES, [f"n{node}" for node in range(len(free))], np.array(free, np.int64), 0)


def job(name: str, cpu: int, seconds: int, deadline: int | None = None, *, memory: int = 0, members: int = 1, priority: int = 0, margin: int = 0) -> Job:
    return Job(name, (cpu, memory), seconds * 1000, None if deadline is None else deadline * 1000, priority, members, margin)


def overcommitted(base: Iterable[Iterable[int]], holds: Iterable[Hold], gone: Iterable[int] = ()) -> str:
    """The first node, time and resource of which more is held than there is; by looking at every begin of a hold."""
    holds, gone = list(holds), set(gone)
    for node, capacity in enumerate(base):
        for moment in sorted({hold.start_ms for hold in holds}):
            for row, amount in enumerate(capacity):
                held = sum(hold.job.need[row] * hold.nodes.count(node) for hold in holds if hold.start_ms <= moment < hold.end_ms)
                if held > (0 if node in gone else amount):
                    return f"node {node} at {moment}: {held} of resource {row}"
    return ""


def check(plan: Timetable) -> None:
    assert not overcommitted(plan.base.tolist(), [*plan.running.values(), *plan.reserved.values()], plan._gone)


# what is said


def test_will_miss_by_40_s_with_the_reason_and_what_would_make_it() -> None:
    plan = table((4000, 8), (4000, 8))
    plan.submit(job("a", 4000, 100), 0)
    plan.submit(job("b", 4000, 140), 0)
    plan.turn(0)
    verdict = plan.submit(job("c", 2000, 50, 110), 0)
    assert verdict.text == (
        "will miss by 40 s: 2000 cpu short on n0 until 100000 ms, held by a; it makes it if a ends 40 s earlier, at 60000 ms, or with 1 more node like n0, or with the deadline 40 s later"
    )
    assert verdict.reason is not None and (verdict.reason.resource, verdict.reason.node, verdict.reason.short, verdict.reason.until_ms) == ("cpu", "n0", 2000, 100_000)
    assert "c" not in plan.reserved and plan.submit(job("c", 2000, 50, 150), 0).admitted, "refused leaves nothing behind, and the remedy is true"


def test_every_remedy_makes_it() -> None:
    def fresh() -> Timetable:
        plan = table((4000, 8), (4000, 8))
        plan.submit(job("a", 4000, 100), 0)
        plan.submit(job("b", 4000, 140), 0)
        plan.turn(0)
        return plan

    verdict = fresh().submit(job("c", 2000, 50, 112, margin=100), 0)
    kinds = {remedy.kind: remedy for remedy in verdict.remedies}
    assert set(kinds) == {"earlier end", "nodes", "deadline"}
    plan = fresh()
    plan.ended(kinds["earlier end"].job, 100_000 - kinds["earlier end"].amount)
    assert plan.submit(job("c", 2000, 50, 112, margin=100), 100_000 - kinds["earlier end"].amount).admitted
    plan = fresh()
    for count in range(kinds["nodes"].amount):
        plan.node_added(f"more{count}", [4000, 8], 0)
    assert plan.submit(job("c", 2000, 50, 112, margin=100), 0).admitted
    assert fresh().submit(job("d", 2000, 100, 203, margin=50), 0).remedies[-1].kind == "margin"
    assert fresh().submit(job("d", 2000, 100, 203, margin=0), 0).admitted


def test_a_margin_is_stated_and_held() -> None:
    plan = table((1000, 1))
    verdict = plan.submit(job("a", 1000, 100, 120, margin=200), 0)
    assert verdict.admitted and verdict.forecast is not None and (verdict.forecast.finish_ms, verdict.forecast.by_ms) == (100_000, 120_000)
    assert plan.submit(job("b", 1000, 100, 119, margin=200), 0).text.startswith("will miss by 121 s: it takes 120 s (with a margin of 20 %) and 119 s are left")


@pytest.mark.parametrize(("wrong", "says"), [
    (Job("a", (1,), 1000), "need must hold 2 quantities"), (Job("a", (-1, 0), 1000), "0 or more"), (Job("a", (0, 0), 1000), "not all 0"),
    (Job("a", (1, 1), 0), "duration_ms must be above 0"), (Job("a", (1, 1), 5, members=0), "members 1 or more"),
])
def test_a_malformed_job_is_one_error(wrong: Job, says: str) -> None:
    plan = table((1000, 1))
    with pytest.raises(ValueError, match=says):
        plan.submit(wrong, 0)
    assert not plan.reserved and not plan.waiting


def test_an_impossible_job_says_which_resource() -> None:
    assert table((1000, 1)).submit(job("a", 1500, 1, 100), 0).text == "asks for 1500 cpu; no node that it may use has more than 1000 cpu for batch"
    assert table((1000, 1), (1000, 1)).submit(job("a", 600, 1, 100, members=3), 0).text == "asks for 3 members side by side; the nodes that it may use hold 2 when empty"


def test_a_sum_over_nodes_is_no_place() -> None:
    """Volcano#665: 4 CPUs are free, 2 on each node; a job of 4 does not run now, two members of 2 do."""
    plan = table((4000, 8), (4000, 8))
    for name in ("a", "b"):
        plan.submit(job(name, 2000, 100), 0)
    plan.turn(0)
    assert plan.running["a"].nodes == plan.running["b"].nodes, "best fit keeps a node whole"
    plan.submit(job("c", 2000, 100), 0)
    plan.turn(0)
    assert not plan.submit(job("whole", 4000, 50, 60), 0).admitted
    plan = table((2000, 8), (2000, 8))
    assert not plan.submit(job("whole", 4000, 50, 60), 0).admitted
    assert plan.submit(job("gang", 2000, 50, 60, members=2), 0).admitted


# what is kept


def test_backfill_never_delays_the_head() -> None:
    plan = table((4000, 8))
    plan.submit(job("long", 3000, 100), 0)
    plan.turn(0)
    plan.submit(job("head", 4000, 50), 0)
    plan.turn(0)
    assert plan.reserved["head"].start_ms == 100_000
    plan.submit(job("short", 1000, 100), 0)
    plan.submit(job("too long", 1000, 101), 0)
    started, _ = plan.turn(0)
    assert [hold.job.id for hold in started] == ["short"] and plan.reserved["head"].start_ms == 100_000


def test_an_early_end_moves_reservations_up_and_none_down() -> None:
    plan = table((4000, 8))
    plan.submit(job("a", 4000, 100, 1000), 0)
    plan.submit(job("b", 4000, 100, 1000), 0)
    plan.submit(job("c", 2000, 100, 1000), 0)
    plan.turn(0)
    assert {forecast.job: forecast.start_ms for forecast in plan.ended("a", 40_000)} == {"b": 40_000, "c": 140_000}
    assert plan.ended("a", 40_000) == [], "an end that is told twice"
    assert [hold.job.id for hold in plan.turn(40_000)[0]] == ["b"]


def test_a_lost_node_is_planned_around_and_the_late_are_told() -> None:
    plan = table((4000, 8), (4000, 8))
    plan.submit(job("a", 4000, 100, 250), 0)
    plan.submit(job("b", 4000, 100, 120), 0)
    plan.turn(0)
    late = plan.node_gone(plan.running["b"].nodes[0], 50_000)
    assert [(each.forecast.job, each.forecast.late_ms, each.because) for each in late] == [("b", 80_000, "node n1 vanished")]
    assert [forecast.job for forecast in plan.node_back(1, 60_000)] == ["b"]
    check(plan)


def test_an_overrun_keeps_what_it_has_and_the_others_move() -> None:
    plan = table((4000, 8))
    plan.submit(job("a", 4000, 100, 1000), 0)
    plan.submit(job("b", 4000, 100, 210), 0)
    first = plan.turn(0)[0][0].job.id
    second = "b" if first == "a" else "a"
    started, late = plan.turn(100_000)
    assert not started and plan.running[first].end_ms == 125_000 and plan.reserved[second].start_ms == 125_000
    assert [each.because for each in late] == ([f"job {first} runs longer than its estimate of 100 s and its margin"] if second == "b" else [])
    plan.ended(first, 110_000)
    assert plan.turn(110_000)[0][0].start_ms == 110_000
    check(plan)


def test_a_late_turn_is_the_margins_or_is_planned_anew() -> None:
    plan = table((1000, 1))
    plan.submit(job("a", 1000, 100, 300, margin=100), 0)
    assert plan.turn(5_000)[0][0].end_ms == 110_000
    plan = table((1000, 1))
    plan.submit(job("a", 1000, 100, 101), 0)
    started, late = plan.turn(5_000)
    assert started[0].start_ms == 5_000 and late[0].forecast.late_ms == 4_000


# against brute force

small_jobs = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 5), st.integers(1, 12), st.integers(1, 2)), min_size=1, max_size=4)
small_nodes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=2)


def runs_at(grid: list[list[list[int]]], need: tuple[int, int], length: int, members: int, start: int) -> list[int] | None:
    """Nodes of the members where a job runs from `start` on, on a grid [time][node][resource] of what is free; plain first principles."""
    room = []
    for node in range(len(grid[0])):
        fits = min((min((grid[time][node][row] // need[row] for row in (0, 1) if need[row]), default=members) for time in range(start, start + length)), default=0)
        room += [node] * min(fits, members)
    return room if len(room) >= members else None


HORIZON = 60


@settings(max_examples=150)
@given(small_nodes, small_jobs)
def test_the_verdict_agrees_with_a_simulation_of_every_millisecond(nodes: list[tuple[int, int]], jobs: list[tuple[int, int, int, int, int]]) -> None:
    plan = Timetable(RESOURCES, [f"n{node}" for node in range(len(nodes))], np.array(nodes, np.int64), 0)
    admitted: list[Job] = []
    for number, (cpu, memory, length, deadline, members) in enumerate(jobs):
        new = Job(f"j{number}", (cpu, memory), length, deadline, members=members, margin_permille=0)
        verdict = plan.submit(new, 0)
        check(plan)
        possible = any(_all_in_time(nodes, order) for order in itertools.permutations([*admitted, new]))
        if verdict.admitted:
            admitted.append(new)
            assert possible, "admitted, and no order of the jobs makes it"
            for each in admitted:
                forecast = plan.forecast(each.id)
                assert forecast is not None and each.deadline_ms is not None and forecast.by_ms <= each.deadline_ms
        elif verdict.forecast is not None:
            grid = [[list(capacity) for capacity in nodes] for _ in range(HORIZON)]
            for hold in plan.reserved.values():
                for time in range(hold.start_ms, hold.end_ms):
                    for node in hold.nodes:
                        for row in (0, 1):
                            grid[time][node][row] -= hold.job.need[row]
            first = next(start for start in range(HORIZON) if runs_at(grid, (cpu, memory), length, members, start) is not None)
            assert verdict.late_ms == first + length - deadline, "it misses by exactly what the simulation says"
        else:
            assert runs_at([[list(capacity) for capacity in nodes]] * length, (cpu, memory), length, members, 0) is None


def _all_in_time(nodes: list[tuple[int, int]], order: Iterable[Job]) -> bool:
    """Whether jobs in this order, each at its first place on every choice of nodes, all make their deadlines."""
    def place(grid: list[list[list[int]]], rest: list[Job]) -> bool:
        if not rest:
            return True
        each = rest[0]
        assert each.deadline_ms is not None
        for start in range(each.deadline_ms - each.duration_ms + 1):
            room = runs_at(grid, (each.need[0], each.need[1]), each.duration_ms, each.members, start)
            if room is None:
                continue
            for chosen in set(itertools.combinations(room, each.members)):
                trial = [[list(node) for node in time] for time in grid]
                for time in range(start, start + each.duration_ms):
                    for node in chosen:
                        for row in (0, 1):
                            trial[time][node][row] -= each.need[row]
                if place(trial, rest[1:]):
                    return True
            return False
        return False
    return place([[list(capacity) for capacity in nodes] for _ in range(HORIZON)], list(order))


# streams of events

events = st.lists(st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 4), st.integers(1, 30), st.one_of(st.none(), st.integers(1, 120)), st.integers(1, 3), st.integers(0, 1)),
    st.tuples(st.just("pass"), st.integers(1, 40)),
    st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("gone"), st.integers(0, 2)),
    st.tuples(st.just("back"), st.integers(0, 2)),
), max_size=25)


def follow(plan: Timetable, stream: list[tuple[object, ...]], *, calm: bool) -> None:
    """Run a stream; `calm`: nodes stay and jobs end in time, so every promise must hold and no reservation may get later."""
    now, told = 0, set[str]()
    for number, event in enumerate(stream):
        before = dict(plan.reserved)
        match event:
            case ("submit", int(cpu), int(length), deadline, int(members), int(priority)):
                verdict = plan.submit(Job(f"j{number}", (cpu, 1), length, None if not isinstance(deadline, int) else now + deadline, priority, members, 100), now)
                assert verdict.admitted or (verdict.reason is not None and verdict.reason.text)
            case ("pass", int(ms)):
                end = now + ms
                while calm and (moment := plan.next_ms()) is not None and moment <= end:
                    now = max(now, moment)
                    for name in [name for name, hold in plan.running.items() if hold.end_ms <= now]:
                        plan.ended(name, now)
                    _, late = plan.turn(now)
                    assert not late
                    check(plan)
                now = end
            case ("end", int(which)) if plan.running:
                plan.ended(sorted(plan.running)[which % len(plan.running)], now)
            case ("gone", int(node)) if not calm:
                told |= {each.forecast.job for each in plan.node_gone(node, now)}
            case ("back", int(node)):
                plan.node_back(node, now)
        check(plan)
        if event[0] != "submit" and calm:
            for name, hold in plan.reserved.items():
                if name in before and hold.job.deadline_ms is not None:
                    assert hold.start_ms <= before[name].start_ms, "a reservation got later though nothing was lost"
        _, late = plan.turn(now)
        told |= {each.forecast.job for each in late}
        check(plan)
        assert not (calm and late), "a promise is broken though nothing was lost"
        for hold in (*plan.running.values(), *plan.reserved.values()):
            assert hold.job.deadline_ms is None or hold.end_ms <= hold.job.deadline_ms or hold.job.id in told, "a promise is broken and nobody was told"
        assert all(waiting.deadline_ms is None or waiting.id in told for waiting in plan.waiting.values())
        for hold in plan.running.values():
            assert hold.end_ms > now


@settings(max_examples=150)
@given(events)
def test_calm_streams_keep_every_promise(stream: list[tuple[object, ...]]) -> None:
    follow(table((4, 4), (4, 2), (2, 4)), stream, calm=True)


@settings(max_examples=150)
@given(events)
def test_lost_nodes_and_overruns_never_overcommit(stream: list[tuple[object, ...]]) -> None:
    follow(table((4, 4), (4, 2), (2, 4)), stream, calm=False)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 30)), min_size=2, max_size=12), st.integers(1, 20))
def test_later_jobs_never_delay_the_reserved_head(jobs: list[tuple[int, int]], seconds: int) -> None:
    plan = table((4, 9))
    plan.submit(Job("first", (3, 1), seconds, margin_permille=0), 0)
    plan.submit(Job("head", (4, 1), 5, margin_permille=0), 0)
    plan.turn(0)
    start = plan.reserved["head"].start_ms
    for number, (cpu, length) in enumerate(jobs):
        plan.submit(Job(f"j{number}", (cpu, 1), length, margin_permille=0), 0)
        plan.turn(0)
        assert plan.reserved["head"].start_ms <= start


# negative controls


def test_the_checker_sees_a_backfill_that_looks_only_at_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a job is placed where it fits this moment, whatever is reserved later."""
    real = Profile.earliest
    monkeypatch.setattr(Profile, "earliest", lambda self, need, duration, *rest: real(self, need, 1, *rest))
    plan = table((4000, 8))
    plan.submit(job("long", 3000, 100), 0)
    plan.turn(0)
    plan.submit(job("head", 4000, 50), 0)
    plan.turn(0)
    plan.submit(job("too long", 1000, 101), 0)
    with pytest.raises(Overcommitted, match="node 0 lacks 1000 of resource 0"):
        plan.turn(0)
    holds = [*plan.running.values(), plan.reserved["head"], Hold(job("too long", 1000, 101), (0,), 0, 101_000, np.array([1000, 0]))]
    assert overcommitted(plan.base.tolist(), holds) == "node 0 at 100000: 5000 of resource 0"


def test_the_stream_sees_a_plan_made_anew_at_an_early_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: at an early end every reservation is placed from scratch, the longest first, instead of each moving up from where it is."""
    def anew(self: Timetable, now_ms: int, freed: object) -> list[object]:
        for hold in self._lift(lambda hold: True, now_ms, running=False):
            self.waiting[hold.job.id] = hold.job
        for each in sorted(self.waiting.values(), key=lambda each: -each.duration_ms):
            found = self._find(self.profile, each, now_ms)
            assert found is not None
            self._hold(self.profile, found)
            self.reserved[each.id] = found
            del self.waiting[each.id]
        return []

    stream: list[tuple[object, ...]] = [("submit", 4, 10, 11, 1, 0), ("submit", 4, 10, 25, 1, 0), ("submit", 4, 15, 44, 1, 0), ("pass", 5), ("end", 0), ("pass", 60)]
    follow(table((4, 9)), stream, calm=True)
    monkeypatch.setattr(Timetable, "_move_up", anew)
    with pytest.raises(AssertionError, match="a reservation got later"):
        follow(table((4, 9)), stream, calm=True)


def test_the_simulation_sees_a_verdict_that_is_too_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: where no hole is early enough, the job is admitted into a late one."""
    def kind(self: Timetable, job: Job, now_ms: int) -> tuple[Profile, dict[str, Hold]]:
        profile, found = self.profile.copy(), self._find(self.profile, job, now_ms)
        assert found is not None
        self._hold(profile, found)
        return profile, {**self.reserved, job.id: found}

    check_one = test_the_verdict_agrees_with_a_simulation_of_every_millisecond.hypothesis.inner_test  # type: ignore[attr-defined]
    twice = [(1, 0, 5, 5, 1), (1, 0, 5, 5, 1)]
    check_one([(1, 1)], twice)
    monkeypatch.setattr(Timetable, "_reorder", kind)
    with pytest.raises(AssertionError, match="no order of the jobs makes it"):
        check_one([(1, 1)], twice)
