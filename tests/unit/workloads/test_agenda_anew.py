"""The agenda makes only anew what changed; the one that it was made all of it (`reference.py`). Every decision, row and guard must be the same, whatever comes."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub.scheduler import Invalid, standing
from hub.scheduler.audit import check_invariants
from hub.workloads import agenda, guards, timetables
from hub.workloads.documents import Conflict, read_list
from hub.workloads.rounds import Rounds
from hub.workloads.timetables import Timed

from .kept import NOW, Desk, round_of, said, work
from .reference import Reference
from .test_agenda import STEP, S, act, batch

Json = dict[str, Any]
Step = tuple[str, int]

EXTRA = ("fresh", "fresh", "fresh", "end", "end", "quota", "rich", "poor", "gpu", "refuse", "silence", "undone", "apart", "urgent", "list", "midnight", "mixed gang")
MORE = st.tuples(st.sampled_from(EXTRA), st.integers(0, 2**16))


def act_more(desk: Desk, rounds: Rounds, what: str, draw: int) -> Rounds:
    """Steps besides those of `act`: quotas, devices, refusals, silence, what is taken back."""
    live = [row.id for row in desk.kept.workloads.values() if row.state in ("pending", "placed")]
    name, offset, seconds = f"w{draw % 10}", (desk.now - NOW) / S, (10, 60, 300)[draw // 10 % 3]
    deadline = offset + seconds * (0.5, 1.3, 2, 5)[draw // 30 % 4]
    try:
        if what == "fresh":
            late = {"when_late": "accept"} if draw % 3 else {}
            desk.submit(batch(f"f{len(desk.kept.workloads)}", (1, 2, 3)[draw % 3], seconds, deadline if draw % 4 else None, priority=draw // 120 % 2, **(late if draw % 4 else {})))
        elif what == "quota":
            desk.do(lambda planner, _: planner.put_quota("poor", {"nominal": {"cpu": draw % 5}}))
        elif what == "rich":
            desk.do(lambda planner, _: planner.remove_quota("poor"))
        elif what == "poor":
            desk.submit(batch(name, 1, seconds, deadline if draw % 2 else None, tenant="poor"))
        elif what == "gpu":
            desk.submit(batch(name, "100m", seconds, deadline if draw % 2 else None, gpu={"count": 1 + draw // 7 % 2}))
        elif what == "apart":
            desk.submit(batch(name, 1, seconds, deadline, labels={"app": "x"}, anti_affinity=[{"selector": {"labels": {"app": "x"}}, "topology_key": "host"}]))
        elif what == "urgent":
            desk.submit(batch(name, 3, seconds, deadline if draw % 2 else None, priority=9, when_late="accept") if draw % 2 else work(name, 3, priority=9))
        elif what == "mixed gang":
            desk.submit(*(batch(f"{name}-{end}", 1, seconds, deadline, gang={"id": name, "size": 3}) for end in ("ab", "c", "abc")[draw // 120 % 3]))
        elif what == "list":
            desk.submit(*(batch(f"l{draw % 5}-{n}", 1 + n % 3, 10 * (n + 1), offset + 400 if n % 2 else None) for n in range(6)), work(f"l{draw % 5}-w"))
    except (Conflict, Invalid):
        pass
    if what == "end" and live:
        desk.do(lambda planner, now: planner.cancel(live[draw % len(live)], now))
    elif what == "refuse":
        for entry in [key for key, placement in desk.kept.placements.items() if placement.node == "edge" and placement.to_ms is None][:1]:
            said(desk, "edge", entry[0], entry[1], ("refused", "done", "failed")[draw % 3], "drawn by lot")
    elif what == "silence":
        round_of(desk, rounds, (1, 61, 400)[draw % 3] * S, **({"edge": True} if draw % 2 else {}))
    elif what == "midnight":
        round_of(desk, rounds, 86_400_000)
    elif what == "undone":  # a node comes and something is planned on it, and all of it is taken back
        desk.planner.begin()
        desk.now += 1
        desk.planner.put_node(f"x{draw % 2}", {"capacity": {"cpu": 8, "memory": "8Gi"}}, "declared", desk.now, seq=1)
        try:
            desk.planner.submit(read_list([batch(f"u{draw % 3}", 4, 60, offset + 500), batch(f"v{draw % 3}", 4, 60)]), desk.now)
        except (Conflict, Invalid):
            pass
        desk.planner.undo()
    return rounds


def told(desk: Desk) -> tuple[Any, ...]:
    """Everything that was decided: rows with plans and reasons, placements, what is guarded."""
    return desk.kept.workloads, desk.kept.placements, desk.planner.tables.guards, desk.planner.state.digest()


def differ(steps: list[Step], nodes: int = 2) -> str:
    """The first step after which the two say different things; empty where there is none."""
    desks = [Desk(), Desk(Reference)]
    going = []
    for desk in desks:
        for number in range(nodes):
            desk.node(f"n{number}")
        desk.node("devices", gpus=[{"model": "t4", "count": 2}])
        desk.node("edge", "edge", kind="edge")
        going.append(Rounds(desk.planner))
    for number, (what, draw) in enumerate([*steps, ("round", 0), ("long round", 0), ("round", 0)]):
        for each, desk in enumerate(desks):
            going[each] = (act_more if what in EXTRA else act)(desk, going[each], what, draw)
        mine, theirs = map(told, desks)
        if mine != theirs:
            rows = [f"{name}: {row} instead of {other}" for name, row in mine[0].items() if row != (other := theirs[0].get(name))]
            return f"step {number} {what} {draw}: {rows or 'guards or placements'}"
    check_invariants(desks[0].planner.state)
    return ""


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.one_of(STEP, MORE), max_size=40))
def test_every_decision_is_that_of_an_agenda_that_makes_all_of_it_anew(steps: list[Step]) -> None:
    assert differ(steps) == ""


def drawn(seed: int, length: int) -> list[Step]:
    draw = random.Random(seed)
    kinds = [*("dated", "gang", "undated", "work", "cancel", "round", "round", "long round", "remove", "add", "kill"), *EXTRA]
    return [(draw.choice(kinds), draw.randrange(2**16)) for _ in range(length)]


@pytest.mark.parametrize("seed", range(4))
def test_every_decision_is_the_same_in_a_long_run(seed: int) -> None:
    assert differ(drawn(seed, 150), 4) == ""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_every_decision_is_the_same_in_many_long_runs(seed: int) -> None:
    assert differ(drawn(seed, 300), 2 + seed % 4) == ""


# -- the controls: what is not made anew although it changed is found --------------------------------------------------------


def _keeps_rows_of_nodes(patch: pytest.MonkeyPatch) -> None:
    """A node where only the free room has changed is not made anew."""
    real = standing.Standing.timetable

    def timetable(self: standing.Standing, resources: Any, names: Any, room: Any, *rest: Any, **more: Any) -> Any:
        if room.shape == self._base.shape:
            self._base = room + self._held
        return real(self, resources, names, room, *rest, **more)

    patch.setattr(standing.Standing, "timetable", timetable)


def _keeps_reservations(patch: pytest.MonkeyPatch) -> None:
    """A reservation that is given up stays in the profile."""
    real = standing.Standing._reserve

    def reserve(self: standing.Standing, due: Any, dirty: set[int], now_ms: int) -> None:
        self._reserved = {name: hold for name, hold in self._reserved.items() if name in due}
        real(self, due, dirty, now_ms)

    patch.setattr(standing.Standing, "_reserve", reserve)


def _keeps_jobs(patch: pytest.MonkeyPatch) -> None:
    """What was made of a job's older row counts."""
    patch.setattr(timetables, "is_", lambda mine, other: True)


def _keeps_nodes(patch: pytest.MonkeyPatch) -> None:
    """Nodes that are cordoned, silent or gone since are planned with."""
    real = Timed._look_at_nodes
    patch.setattr(Timed, "_look_at_nodes", lambda self, now_ms: None if self._nodes else real(self, now_ms))


def _keeps_what_was_written(patch: pytest.MonkeyPatch) -> None:
    """A row that was written once is not written for another hold."""
    real = agenda.Agenda._plan
    seen: set[Any] = set()

    def plan(self: agenda.Agenda, key: str, hold: Any, because: str, now_ms: int) -> None:
        if (id(self), key) not in seen or type(self) is Reference or self.tables.rows[self._members.get(key, (key,))[0]].state == "placed":
            real(self, key, hold, because, now_ms)
        seen.add((id(self), key))

    patch.setattr(agenda.Agenda, "_plan", plan)


def _keeps_guards(patch: pytest.MonkeyPatch) -> None:
    """What guards held of a node at first is counted for ever."""
    real = guards.Guarding._guarded

    def guarded(self: guards.Guarding) -> Any:
        self._counted = {node: kept if node in self._counted else self._counted.get(node, ()) for node, kept in self.tables.guards.items()}
        return real(self)

    patch.setattr(guards.Guarding, "_guarded", guarded)


@pytest.mark.parametrize("plant", [_keeps_rows_of_nodes, _keeps_reservations, _keeps_jobs, _keeps_nodes, _keeps_what_was_written, _keeps_guards])
def test_what_is_not_made_anew_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    found = ""
    for seed in range(20):
        try:
            found = differ(drawn(seed, 60), 3)
        except (AssertionError, ValueError) as error:  # it may well not get to the end
            found = repr(error)
        if found:
            break
    assert found
