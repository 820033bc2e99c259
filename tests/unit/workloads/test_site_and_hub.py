"""The hub's planner beside a site that moves a workload while it is cut off: in whatever order edges are heard again, whatever the hub wanted meanwhile, it runs at most once, and in the end as the hub says."""

import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub.scheduler.audit import check_invariants
from hub.workloads.planner import Planner

from .kept import Desk, few_steps, round_of, work  # noqa: F401 few_steps is a fixture

SITE, FAR = ("gw-1", "gw-2", "gw-3"), "far"
ALL = (*SITE, FAR)
THERE: dict[str, Any] = dict.fromkeys(ALL, True)


class Both:
    """The planner, a site of three edges whose bus is always there, and a fourth edge elsewhere. What an edge says waits until it is heard; what the hub wants reaches it then.

    `mixed`: by lot, in another order than it was said, and part of it later: what is live is sent before what waited."""

    def __init__(self, planner: type[Planner] = Planner, mixed: random.Random | None = None) -> None:
        self.mixed, self.settles = mixed, False
        self.desk = Desk(planner)
        for name in ALL:
            self.desk.node(name, "edge", kind="edge", site="far" if name == FAR else "hall-2")
        round_of(self.desk, **THERE)
        self.desk.submit(work("w", when_cut_off="move"))
        self.cloud = True
        self.fence = 1
        self.runs: dict[str, int] = {}
        """Edge to the epoch that runs there."""
        self.source: dict[str, str] = {}
        """Edge to who had it from the hub, where the site gave it; also back to the same."""
        self.own: dict[str, dict[int, str]] = {name: {} for name in ALL}
        """What each edge was told last: epoch to what is wanted."""
        self.stopped: set[tuple[str, int]] = set()
        self.said: dict[str, list[tuple[int, dict[str, Any]]]] = {name: [] for name in ALL}
        """With their numbers."""
        self.twice: list[dict[str, int]] = []
        for name in ALL:
            self.hear(name)

    def say(self, edge: str, epoch: int, state: str) -> None:
        body: dict[str, Any] = {"id": "w", "epoch": epoch, "state": state, "reason": "", "for": "", "fence": 0}
        if edge in self.source and state != "stopped":
            body |= {"for": self.source[edge], "fence": self.fence}
        self.said[edge].append((self.desk.number(edge), body))

    def start(self, edge: str, epoch: int) -> None:
        self.runs[edge] = epoch
        if len(self.runs) > 1:
            self.twice.append(dict(self.runs))
        self.say(edge, epoch, "running")

    def end(self, edge: str) -> None:
        self.runs.pop(edge, None)
        self.source.pop(edge, None)

    # -- steps ---------------------------------------------------------------------------------------------------------------

    def hear(self, edge: str) -> None:
        """The edge is connected: the hub hears all that it said, it hears what the hub wants, and does that."""
        if not self.cloud and edge != FAR:
            return
        said, self.said[edge] = self.said[edge], []
        if self.mixed is not None:
            self.mixed.shuffle(said)
            later = self.mixed.randrange(len(said) + 1) if not self.settles and self.mixed.random() < 0.5 else len(said)
            said, self.said[edge] = said[:later], said[later:]
        for seq, body in said:
            self.desk.do(partial(_said, edge, seq, body))
        self.own[edge] = {epoch: wanted for _, epoch, wanted in ((one["id"], one["epoch"], one["wanted"]) for one in self.desk.planner.wanted(edge))}
        for epoch, wanted in self.own[edge].items():
            if wanted == "stopped":
                for other in list(self.runs):  # on one bus: its word ends what siblings have of it
                    if self.runs[other] == epoch and (other == edge or (edge != FAR and other != FAR)):
                        self.end(other)
                if (edge, epoch) not in self.stopped:
                    self.stopped.add((edge, epoch))
                    self.say(edge, epoch, "stopped")
            else:
                held = next((other for other in SITE if other in self.runs), None)
                if edge != FAR and held is not None and self.runs[held] < epoch:
                    self.end(held)  # the newer placement is the table's
                    held = None
                if edge == FAR or held is None:
                    if self.runs.get(edge) != epoch and (edge, epoch) not in self.stopped:
                        self.end(edge)
                        self.start(edge, epoch)
                elif held == edge:
                    self.source.pop(edge, None)
        if edge in self.runs and self.runs[edge] not in self.own[edge] and self.source.get(edge, edge) == edge:
            self.end(edge)
        for other in SITE:  # what it had, and the hub does not want of it any more, siblings end, unless they have it from the hub
            if other in self.runs and other != edge and self.source.get(other) == edge and self.runs[other] not in self.own[edge]:
                if "running" not in self.own[other].values():
                    self.end(other)

    def move(self, to: str) -> None:
        """The site is cut off, and whoever has it is gone: it goes to a sibling."""
        held = next((edge for edge in SITE if edge in self.runs), None)
        origin = self.source.get(held, held) if held is not None else next((edge for edge in SITE if "running" in self.own[edge].values()), None)
        if self.cloud or held is None or origin is None or to == held:
            return
        epoch = self.runs[held]
        self.end(held)
        self.fence += 1
        self.source[to] = origin
        self.start(to, epoch)

    def finish(self) -> None:
        """It ends by itself."""
        for edge, epoch in list(self.runs.items()):
            self.say(edge, epoch, "done")
            self.stopped.add((edge, epoch))
            self.end(edge)

    def step(self, what: str, edge: str) -> None:
        """One event."""
        if what == "cloud":
            self.cloud = not self.cloud
        elif what == "hear":
            self.hear(edge)
        elif what == "move" and edge != FAR:
            self.move(edge)
        elif what == "finish":
            self.finish()
        elif what == "cancel":
            self.desk.do(lambda planner, now: planner.cancel("w", now))
        elif what == "hub moves":
            row = self.desk.row("w")
            if row.state == "placed" and row.node != edge:
                self.desk.do(lambda planner, now: planner.move("w", now, "moved", edge))
        elif what == "restart":
            assert self.desk.restart() == []
        check_invariants(self.desk.planner.state)

    def settle(self) -> None:
        """Everybody is heard until nothing changes."""
        self.cloud = self.settles = True
        for _ in range(8):
            round_of(self.desk, **THERE)
            for name in ALL:
                self.hear(name)


def _said(edge: str, seq: int, body: dict[str, Any], planner: Planner, now_ms: int) -> None:
    planner.said(edge, seq, body, now_ms)


STEPS = st.lists(st.tuples(st.sampled_from(("cloud", "cloud", "hear", "hear", "hear", "move", "move", "finish", "cancel", "hub moves", "restart")), st.sampled_from(ALL)), max_size=14)
Steps = list[tuple[str, str]]


def play(steps: Steps, planner: type[Planner] = Planner, mixed: random.Random | None = None) -> Both:
    both = Both(planner, mixed)
    for what, edge in steps:
        both.step(what, edge)
    both.settle()
    return both


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, st.none() | st.sampled_from(SITE), st.none() | st.integers(0, 2**32 - 1))
def test_it_runs_at_most_once_and_in_the_end_as_the_hub_says(steps: Steps, first: str | None, mixed: int | None) -> None:
    both = play([("cloud", FAR), ("move", first), ("hub moves", FAR), ("cloud", FAR), *steps] if first else steps, mixed=None if mixed is None else random.Random(mixed))
    row = both.desk.row("w")
    assert both.twice == []
    assert both.runs == ({row.node: row.epoch} if row.state == "placed" else {}), (row, both.runs)
    assert row.state in ("placed", "cancelled", "done")


class ForgetsTheSite(Planner):
    """Takes what the site did for old news."""

    def _moved_by_site(self, edge: str, body: Any, now_ms: int) -> None:
        """Nothing."""


class LetsGo(Planner):
    """Does not wait for a sibling that runs what was on its way out."""

    def _moved_by_site(self, edge: str, body: Any, now_ms: int) -> None:
        placement = self.tables.open.get((body["id"], body["epoch"]))
        if placement is not None and self.current(body["id"]) is not placement:
            self.close(placement, now_ms, "gone")
        else:
            super()._moved_by_site(edge, body, now_ms)


def test_many_random_lives_are_sound() -> None:
    kinds, moves = ("cloud", "cloud", "hear", "hear", "hear", "move", "move", "finish", "cancel", "hub moves", "restart"), 0
    for seed in range(120):
        draw = random.Random(seed)
        steps = [("cloud", FAR), ("move", draw.choice(SITE)), ("hub moves", FAR), ("cloud", FAR)] if seed % 2 else []
        steps += [(draw.choice(kinds), draw.choice(ALL)) for _ in range(12)]
        both = play(steps, mixed=random.Random(seed) if seed % 3 else None)
        moves += both.fence - 1
        row = both.desk.row("w")
        expected = {row.node: row.epoch} if row.state == "placed" else {}
        assert both.twice == [] and both.runs == expected, seed
    assert moves > 50


def test_a_hub_that_does_not_wait_is_found() -> None:
    origin = Both().desk.row("w").node
    sibling = next(name for name in SITE if name != origin)
    steps = [("cloud", FAR), ("move", sibling), ("hub moves", FAR), ("cloud", FAR), ("hear", sibling), ("hear", FAR)]
    assert play(steps).twice == [] and play(steps, LetsGo).twice


def test_a_hub_that_forgets_what_the_site_did_is_found() -> None:
    steps = [("cloud", FAR), ("move", "gw-2"), ("move", "gw-3"), ("cloud", FAR), ("hear", "gw-3"), ("hear", "gw-1")]
    assert play(steps).runs == {"gw-3": 1}
    broken = play(steps, ForgetsTheSite)
    assert broken.runs != {"gw-3": 1} or broken.desk.row("w").node != "gw-3"


class ForgetsFences(Planner):
    """Remembers a site's fence only as long as the placement is open: what was said before its end opens it again."""

    def _moved_by_site(self, edge: str, body: Any, now_ms: int) -> None:
        if (row := self.tables.rows.get(body["id"])) is not None:
            self.set(replace(row, fences={}))
        super()._moved_by_site(edge, body, now_ms)


def test_a_hub_that_takes_what_was_said_before_an_end_for_news_is_found() -> None:
    steps = [("cloud", FAR), ("move", "gw-2"), ("hub moves", FAR), ("cloud", FAR), ("finish", FAR), ("hear", "gw-1"), ("hear", "gw-3"), ("finish", FAR), ("hub moves", "gw-1"), ("cloud", FAR), ("hear", "gw-3")]

    def found(planner: type[Planner]) -> int:
        lives = (play(steps, planner, random.Random(seed)) for seed in range(60))
        return sum(life.runs != ({row.node: row.epoch} if (row := life.desk.row("w")).state == "placed" else {}) for life in lives)

    assert found(Planner) == 0 and found(ForgetsFences) > 0


@pytest.mark.parametrize("order", [("gw-1", "gw-2"), ("gw-2", "gw-1")])
def test_a_move_to_elsewhere_waits_for_whoever_has_it(order: tuple[str, str]) -> None:
    both = Both()
    origin = both.desk.row("w").node
    sibling = next(name for name in SITE if name != origin)
    names = {"gw-1": origin, "gw-2": sibling}
    both.step("cloud", FAR)
    both.step("move", sibling)
    both.step("hub moves", FAR)
    both.step("hear", FAR)
    assert both.runs == {sibling: 1}
    both.step("cloud", FAR)
    for name in order:
        both.step("hear", names[name])
        both.step("hear", FAR)
    both.settle()
    assert both.twice == [] and both.runs == {FAR: 2}
