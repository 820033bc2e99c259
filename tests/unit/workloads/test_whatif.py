"""What-if says of a deadline what a submit says right after, and leaves no trace: on random agendas, each with its negative control."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub.scheduler import Invalid
from hub.workloads.agenda import Agenda
from hub.workloads.documents import Conflict, Missed, Submitted, read_list
from hub.workloads.planner import Planner
from hub.workloads.rounds import Rounds
from hub.workloads.whatif import what_if

from .kept import NOW, Desk
from .test_agenda import STEP, S, batch, play
from .test_planner import round_of, work

Json = dict[str, Any]


def asked(desk: Desk, *documents: Json, lose: tuple[str, ...] = (), add: Json | None = None) -> Json:
    return what_if(desk.planner.fork(), read_list(list(documents)), lose, add or {}, desk.now + 1)


def trace(planner: Planner) -> tuple[Any, ...]:
    """Everything that a planner knows: the state bit by bit, its log, every table, the timetable."""
    table = planner._table
    agenda = None if table is None else (
        [{name: (hold.nodes, hold.start_ms, hold.end_ms, hold.need.tolist()) for name, hold in holds.items()} for holds in (table.running, table.reserved)], list(table.waiting), dict(table._order),
        table._now, [table.profile.steps(node) for node in range(table.profile.nodes)],
    )
    tables = {name: dict(getattr(planner.tables, name)) for name in type(planner.tables).__dataclass_fields__}
    return planner.state.digest(), list(planner.state.log), planner.state.changes, tables, planner.version, planner.timed_version, dict(planner._members), dict(planner._never), planner._where, agenda


def outcome(rows: dict[str, Any], names: list[str]) -> list[tuple[Any, ...]]:
    return [(name, row.state, row.node, row.plan.get("start_ms"), row.plan.get("end_ms"), row.plan.get("nodes", []), row.reason) for name in names if (row := rows.get(name)) is not None]


def differ(desk: Desk, documents: list[Json]) -> list[str]:
    """In what the verdict of what-if differs from that of the submit right after, and in what what-if changed the planner."""
    entries: list[Submitted] = read_list(documents)
    before, found = trace(desk.planner), list[str]()
    fork, said, refusal = desk.planner.fork(), None, ""
    try:
        said = what_if(fork, entries, (), {}, desk.now + 1)
    except (Invalid, Conflict) as error:
        refusal = str(error)
    if trace(desk.planner) != before:
        found.append("what-if left a trace")
    jobs = {one["workload"]: one for one in said["jobs"]} if said is not None else {}
    try:
        desk.do(lambda planner, now: planner.submit(entries, now))
    except Missed as error:
        mine = jobs.get(error.workload, {})
        found += [f"refused: {error}; what-if: {mine}"] if (mine.get("verdict"), mine.get("reason"), mine.get("remedy")) != ("refused", error.problem, error.remedy) else []
        late = None if error.forecast is None else (error.forecast.start_ms, error.forecast.by_ms, error.forecast.late_ms)
        found += [f"forecast {late}; what-if: {mine}"] if late is not None and late != (mine["planned_ms"], mine["planned_end_ms"], mine["late_ms"]) else []
    except (Invalid, Conflict) as error:
        found += [f"refused: {error}; what-if: {refusal}"] if refusal != str(error) else []
    else:
        names = [entry.item.id for entry in entries]
        found += [f"{real}; what-if: {thought}" for real, thought in zip(outcome(desk.planner.tables.rows, names), outcome(fork.tables.rows, names), strict=True) if real != thought]
        for name, one in jobs.items():
            plan = desk.planner.tables.rows[name].plan
            if (one["planned_ms"], one["planned_end_ms"], one["planned_nodes"]) != (plan.get("start_ms"), plan.get("end_ms"), plan.get("nodes", [])):
                found.append(f"{name}: planned {plan}; what-if: {one}")
    return found


QUESTION = st.lists(st.tuples(st.sampled_from(["dated", "dated", "undated", "gang", "work"]), st.integers(0, 2**16)), min_size=1, max_size=4)


def documents(desk: Desk, question: list[tuple[str, int]]) -> list[Json]:
    made: list[Json] = []
    for number, (what, draw) in enumerate(question):
        name, cpu, seconds, offset = f"q{number}", (1, 2, 4)[draw % 3], (10, 60, 300)[draw // 3 % 3], (desk.now - NOW) / S
        deadline = offset + seconds * (0.5, 1.3, 2, 5)[draw // 9 % 4]
        if what == "work":
            made.append(work(name, cpu, priority=draw // 9 % 2))
        elif what == "gang":
            made += [batch(f"{name}-{end}", cpu, seconds, deadline, gang={"id": name, "size": 2}) for end in "ab"]
        else:
            late = {"when_late": "accept"} if draw % 2 and what == "dated" else {}
            made.append(batch(name, cpu, seconds, deadline if what == "dated" else None, priority=draw // 36 % 2, **late))
    return made


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(STEP, max_size=25), QUESTION)
def test_what_if_says_what_a_submit_says_right_after_and_leaves_no_trace(steps: list[tuple[str, int]], question: list[tuple[str, int]]) -> None:
    desk = play(steps)
    assert differ(desk, documents(desk, question)) == []


def busy() -> Desk:
    """One node, a job that runs on it and one that is reserved behind."""
    desk = Desk()
    desk.node("n-1")
    desk.submit(batch("a", 3, 100))
    desk.submit(batch("b", 3, 100, 300))
    return desk


LATE = batch("c", 3, 100, 300)
TIMELY = batch("d", 3, 100, 500)


def test_the_control_a_fork_that_shares_a_table_leaves_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    assert differ(busy(), [TIMELY]) == []
    real = Agenda.fork

    def shares(self: Agenda, name: str) -> Agenda:
        other = real(self)
        setattr(other.tables, name, getattr(self.tables, name))
        return other

    for name in ("rows", "items", "timed", "waiting"):
        monkeypatch.setattr(Agenda, "fork", lambda self, name=name: shares(self, name))
        assert "what-if left a trace" in differ(busy(), [TIMELY]), name

    def shares_timetable(self: Agenda) -> Agenda:
        other = real(self)
        other._table = self._table
        return other

    monkeypatch.setattr(Agenda, "fork", shares_timetable)
    assert "what-if left a trace" in differ(busy(), [TIMELY])


def test_the_control_a_fork_that_forgets_what_is_reserved_says_another_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    assert differ(busy(), [LATE]) == []
    real = Agenda.fork

    def forgets(self: Agenda) -> Agenda:
        other = real(self)
        for name in [name for name, row in other.tables.rows.items() if row.state == "pending"]:
            other.cancel(name, self._now)  # type: ignore[attr-defined]
        return other

    monkeypatch.setattr(Agenda, "fork", forgets)
    assert any("will miss it by" in found or "planned" in found for found in differ(busy(), [LATE]))


# -- what it says ------------------------------------------------------------------------------------------------------------


def test_a_refused_deadline_is_told_with_by_how_much_and_when_it_would_run() -> None:
    desk = busy()
    said = asked(desk, LATE, work("w", "100m"))
    [job] = said["jobs"]
    assert job["verdict"] == "refused" and job["late_ms"] == job["planned_end_ms"] - LATE["deadline_ms"] > 0 and job["planned_nodes"] == ["n-1"]
    assert job["planned_end_ms"] - job["planned_ms"] == 120 * S and job["expected_end_ms"] - job["planned_ms"] == 100 * S
    assert job["reason"].startswith("'c' will miss it by ") and "CPU short on n-1 until " in job["reason"] and "when_late: accept" in job["remedy"]
    assert {one["workload"]: one["reason"] for one in said["waiting"]} == {"c": job["reason"], "w": f"nothing of the request is taken: {job['reason']}"} and said["placed"] == []


def test_jobs_that_start_are_planned_or_taken_late_say_so() -> None:
    desk = busy()
    said = asked(desk, batch("now", 1, 10, 100), TIMELY, {**LATE, "when_late": "accept"}, batch("huge", 64, 10), batch("gang", 1, 10, gang={"id": "g", "size": 2}))
    assert {one["workload"]: one["verdict"] for one in said["jobs"]} == {"now": "starts", "d": "planned", "c": "late", "huge": "waits", "gang": "waits"}
    late = next(one for one in said["jobs"] if one["workload"] == "c")
    assert late["late_ms"] > 0 and "CPU short" in late["reason"] and late["remedy"] == ""
    assert [one["workload"] for one in said["placed"]] == ["now"]


def test_a_deadline_with_a_node_more_and_with_one_less() -> None:
    desk = busy()
    assert asked(desk, LATE)["jobs"][0]["verdict"] == "refused"
    assert asked(desk, LATE, add={"n-2": {"name": "n-2", "capacity": {"cpu": 4}}})["jobs"][0]["verdict"] == "planned", "the one before it moves up"
    lost = asked(desk, TIMELY, lose=("n-1",))
    assert lost["jobs"][0]["verdict"] == "refused" and "no node" in lost["jobs"][0]["reason"] and [one["workload"] for one in lost["waiting"]] == ["a", "d"]
    with pytest.raises(Invalid, match="is no node"):
        asked(desk, TIMELY, lose=("n-2",))
    with pytest.raises(Invalid, match="is a node already"):
        asked(desk, TIMELY, add={"n-1": {}})


@pytest.mark.parametrize(("document", "field"), [
    ({"duration_ms": -5}, "duration_ms"), ({"duration_ms": 0}, "duration_ms"), ({"duration_ms": 1 << 60}, "duration_ms"), ({"duration_ms": 1.5}, "duration_ms"), ({"duration_ms": "soon"}, "duration_ms"),
    ({"duration_ms": 5, "deadline_ms": -1}, "deadline_ms"), ({"duration_ms": 5, "deadline_ms": 1 << 60}, "deadline_ms"), ({"duration_ms": 5, "deadline_ms": True}, "deadline_ms"),
])
def test_bad_times_name_their_field(document: Json, field: str) -> None:
    with pytest.raises(Invalid) as caught:
        read_list([{"id": "a", "kind": "batch", **document}])
    assert caught.value.field == f"workloads[0].{field}" and caught.value.remedy


@pytest.mark.parametrize(("times", "verdict", "words"), [
    ({"duration_ms": 100 * S, "deadline_ms": 5}, "refused", "0 ms are left"), ({"duration_ms": 100 * S, "deadline_ms": NOW}, "refused", "0 ms are left"),
    ({"duration_ms": 1 << 53, "deadline_ms": 1 << 53}, "refused", "will miss it by"), ({"duration_ms": 1, "deadline_ms": 1 << 53}, "starts", ""), ({"duration_ms": 1 << 53}, "starts", ""),
])
def test_times_in_the_past_and_at_the_far_end_are_judged(times: Json, verdict: str, words: str) -> None:
    desk = busy()
    [job] = asked(desk, {"id": "x", "kind": "batch", "requests": {"cpu": 1}, **times})["jobs"]
    assert job["verdict"] == verdict and words in job["reason"]
    assert differ(busy(), [{"id": "x", "kind": "batch", "requests": {"cpu": 1}, **times}]) == []


def test_what_if_between_rounds_starts_nothing_and_delays_nobody() -> None:
    desk = busy()
    rounds = Rounds(desk.planner)
    round_of(desk, rounds)
    before = trace(desk.planner)
    for document in (LATE, TIMELY, {**LATE, "when_late": "accept"}):
        asked(desk, document)
    assert trace(desk.planner) == before
    round_of(desk, rounds, 120 * S)
    desk.do(lambda planner, now: planner.cancel("a", now))
    round_of(desk, rounds)
    assert desk.row("b").state == "placed" and "c" not in desk.planner.tables.rows
