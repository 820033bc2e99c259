"""Epochs after a hub was restored from an older backup: what edges speak of is never given to another placement again."""

import copy
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub.scheduler.audit import check_invariants
from hub.workloads.documents import Conflict
from hub.workloads.planner import MAX_EPOCH_LEAD, Planner
from hub.workloads.rounds import Rounds
from tools.bench import placement_log

from .kept import Desk
from .test_planner import entries, round_of, said, work

BOTH = {"gw-1": True, "gw-2": True, "gw-3": True}


def three_edges() -> Desk:
    desk = Desk()
    for name in BOTH:
        desk.node(name, "edge", kind="edge", labels={"n": name})
    round_of(desk, **BOTH)
    return desk


def restore(desk: Desk, backup: object) -> None:
    desk.kept = copy.deepcopy(backup)  # type: ignore[assignment]
    assert desk.restart() == []
    round_of(desk, **BOTH)


def moved(desk: Desk, name: str, to: str) -> None:
    source, epoch = desk.row(name).node, desk.row(name).epoch
    assert desk.do(lambda planner, now: planner.move(name, now, "moved", to))
    said(desk, source, name, epoch, "stopped")
    said(desk, to, name, epoch + 1, "running")


def test_a_higher_epoch_that_an_edge_speaks_of_is_not_given_again() -> None:
    desk = three_edges()
    desk.submit(work("w"))
    first = desk.row("w").node
    second, third = (name for name in BOTH if name != first)
    said(desk, first, "w", 1, "running")
    backup = copy.deepcopy(desk.kept)
    moved(desk, "w", second)
    moved(desk, "w", third)
    restore(desk, backup)
    assert (desk.row("w").node, desk.row("w").epoch) == (first, 1)
    said(desk, third, "w", 3, "running")
    assert desk.row("w").epoch == 4 and desk.row("w").node == first and entries(desk, first) == [("w", 4, "running")], "what stands goes on above what was heard"
    said(desk, second, "w", 2, "running")
    assert desk.row("w").epoch == 4, "a lower one is old news"
    assert desk.restart() == [] and desk.row("w").epoch == 4
    check_invariants(desk.planner.state)


def test_an_epoch_given_twice_before_the_edge_was_heard_is_raised() -> None:
    desk = three_edges()
    desk.submit(work("w"))
    first = desk.row("w").node
    second, third = (name for name in BOTH if name != first)
    backup = copy.deepcopy(desk.kept)
    moved(desk, "w", second)
    restore(desk, backup)
    desk.do(lambda planner, now: planner.move("w", now, "moved", third))
    said(desk, first, "w", 1, "stopped")
    assert entries(desk, third) == [("w", 2, "running")]
    said(desk, second, "w", 2, "running")
    assert entries(desk, third) == [("w", 3, "running")] and desk.row("w").node == third
    said(desk, third, "w", 2, "running")
    assert desk.row("w").epoch == 3


def test_a_workload_that_the_backup_does_not_know_begins_above_what_was_heard_also_after_a_kill() -> None:
    desk = three_edges()
    backup = copy.deepcopy(desk.kept)
    desk.submit(work("w"))
    moved(desk, "w", next(name for name in BOTH if name != desk.row("w").node))
    restore(desk, backup)
    said(desk, "gw-2", "w", 2, "running")
    assert desk.kept.epochs == {"w": 2} and desk.restart() == []
    round_of(desk, **BOTH)
    desk.submit(work("w"))
    assert desk.row("w").epoch == 3 and desk.kept.epochs == {}, "what was given is not kept twice"


def test_an_epoch_that_no_hub_gave_is_refused() -> None:
    desk = three_edges()
    desk.submit(work("w"))
    for name in ("w", "unknown"):
        with pytest.raises(Conflict) as caught:
            said(desk, "gw-3", name, MAX_EPOCH_LEAD + 2, "running")
        assert caught.value.field == "epoch"
    assert desk.row("w").epoch == 1 and desk.kept.epochs == {}


STEP = st.tuples(st.sampled_from(["submit", "submit", "move", "move", "cancel", "say", "say", "say", "backup", "restore", "resend", "round", "kill"]), st.integers(0, 2**16))


def play(steps: list[tuple[str, int]]) -> None:
    desk = three_edges()
    rounds, backup = Rounds(desk.planner), copy.deepcopy(desk.kept)
    words: list[tuple[str, str, int, str]] = []
    for what, draw in [*steps, ("restore", 0), *(("submit", draw) for draw in range(6)), *(("move", draw) for draw in range(6)), ("resend", 0)]:
        chance = random.Random(draw)
        name = f"w{chance.randrange(3)}"
        if what == "submit":
            desk.submit(work(name))
        elif what == "move" and name in desk.kept.workloads:
            desk.do(lambda planner, now, name=name, to=chance.choice(list(BOTH)): desk.row(name).node != to and planner.move(name, now, "moved", to))
        elif what == "cancel":
            desk.do(lambda planner, now, name=name: planner.cancel(name, now))
        elif what == "say":
            wanted = [(edge, entry) for edge in BOTH for entry in desk.planner.wanted(edge)]
            if wanted:
                edge, entry = chance.choice(wanted)
                words.append((edge, entry["id"], entry["epoch"], "stopped" if entry["wanted"] == "stopped" else "running"))
                said(desk, *words[-1])
        elif what == "backup":
            backup = copy.deepcopy(desk.kept)
        elif what == "restore":
            # Who was told to run something answers it, whatever becomes of the hub.
            words += [(edge, entry["id"], entry["epoch"], "running") for edge in BOTH for entry in desk.planner.wanted(edge) if entry["wanted"] == "running"]
            restore(desk, backup)
            rounds = Rounds(desk.planner)
        elif what == "kill":
            desk.restart()
            rounds = Rounds(desk.planner)
        elif what == "round":
            round_of(desk, rounds, **BOTH)
        if what == "resend":
            for word in words:
                said(desk, *word)
            for edge in BOTH:
                for entry in desk.planner.wanted(edge):
                    others = {other for other, *word in words if word == [entry["id"], entry["epoch"], "running"]} - {edge}
                    assert entry["wanted"] != "running" or not others, f"{entry['id']}/{entry['epoch']} was given to {others} and to {edge}"
        check_invariants(desk.planner.state)
        assert placement_log.doubles(desk.kept.log(), {edge: {"spec": {"workloads": desk.planner.wanted(edge)}} for edge in BOTH}) == []


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(STEP, max_size=40))
def test_once_the_edges_were_heard_no_epoch_that_stands_is_anothers(steps: list[tuple[str, int]]) -> None:
    play(steps)


def test_the_control_a_hub_that_does_not_listen_gives_an_epoch_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(Planner, "_old_news", lambda *_: None)
    chance = random.Random(3)
    names = ["submit", "move", "move", "say", "say", "backup", "restore", "resend", "round"]
    with pytest.raises(AssertionError, match="was given to"):
        for _ in range(40):
            play([(chance.choice(names), chance.randrange(2**16)) for _ in range(40)])
