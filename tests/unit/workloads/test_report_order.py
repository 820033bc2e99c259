"""What an edge says of a workload comes in any order, what is live before what waited: what is kept, shown and done in the end is what the order in which it was said makes of it."""

import itertools
import random
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract.workloads import ENDED
from hub.workloads.planner import MAX_FENCES, Planner

from .kept import Desk, few_steps, round_of, said, work  # noqa: F401 few_steps is a fixture
from .test_moved_by_site import EDGES, site
from .test_planner import entries

Words = list[dict[str, Any]]


def ran(image: str = "") -> tuple[Desk, str]:
    """A desk, and the node on which `w` is placed."""
    desk = Desk()
    for name in EDGES:
        desk.node(name, "edge")
    round_of(desk, **EDGES)
    desk.submit(work("w", **({"image": image} if image else {})))
    return desk, desk.row("w").node


def hear(desk: Desk, edge: str, words: list[tuple[int, dict[str, Any]]]) -> None:
    """What was said, each with its number, in the order in which it comes; at one moment, so that only the order differs."""
    for seq, word in words:
        desk.do(lambda planner, now, seq=seq, word=word: planner.said(edge, seq, {"id": "w", "epoch": 1, "reason": "", **word}, now), after_ms=0)


def ends(desk: Desk) -> tuple[Any, ...]:
    """What is kept of it, and what its image's starts took."""
    row, placement = desk.row("w"), desk.kept.placements["w", 1]
    times = {node: sorted(each) for node, each in desk.planner.loads._images.get("sha", {}).items()}
    return row.state, row.node, row.epoch, row.reason, row.avoid, placement, times, {name: entries(desk, name) for name in EDGES}


@st.composite
def lives(draw: st.DrawFn) -> Words:
    """What an edge may say of one placement from its beginning: it starts, changes its form, is checkpointed and restored, and ends or does not."""
    words: Words = [{"state": "accepted"}]
    for _ in range(draw(st.integers(0, 3))):
        words.append({"state": "running", **({"load_ms": draw(st.sampled_from([5.0, 7.0]))} if draw(st.booleans()) else {})})
        words += [{"state": "running", "form": form} for form in draw(st.lists(st.sampled_from(["microvm", "container"]), max_size=2))]
        if draw(st.booleans()):
            words.append({"state": "checkpointed", "reason": "asked for"})
    if draw(st.booleans()):
        words.append({"state": draw(st.sampled_from(sorted(ENDED))), "reason": "why"})
    return words


@settings(max_examples=150, deadline=None)
@given(lives(), st.randoms(use_true_random=False), st.booleans())
def test_any_order_ends_as_the_true_one(words: Words, chance: random.Random, restarts: bool) -> None:
    true = list(enumerate(words, 1))
    one, edge = ran("sha")
    hear(one, edge, true)
    other, same = ran("sha")
    assert same == edge
    mixed = true.copy()
    chance.shuffle(mixed)
    cut = chance.randrange(len(mixed) + 1)
    hear(other, edge, mixed[:cut])
    if restarts:
        assert other.restart() == []
    hear(other, edge, mixed[cut:])
    hear(other, edge, [word for word in mixed if "load_ms" not in word[1]])  # all of it once more, as after a restore
    known, found = ends(one), ends(other)
    if words[-1]["state"] in ENDED:  # of what has ended nothing is noted any more but the end
        assert (found[5].said, found[5].why, found[5].to_ms) == (known[5].said, known[5].why, known[5].to_ms)
        known, found = (*known[:5], *known[6:]), (*found[:5], *found[6:])
    if restarts:  # what was measured before a restart is known by what is open
        known, found = (*known[:-2], known[-1]), (*found[:-2], found[-1])
    assert found == known


class ByArrival(Planner):
    """The planted bug: what comes last counts."""

    count = 0

    def said(self, edge: str, seq: int, body: Any, now_ms: int) -> None:
        """As if it had been said when it comes."""
        self.count += 1
        super().said(edge, self.count, body, now_ms)


def test_a_hub_that_goes_by_arrival_is_found() -> None:
    words: list[tuple[int, dict[str, Any]]] = list(enumerate([{"state": "accepted"}, {"state": "running"}, {"state": "running", "form": "microvm"}, {"state": "checkpointed"}], 1))
    wrong = {}
    for kind in (Planner, ByArrival):
        found = []
        for order in itertools.permutations(words):
            desk, edge = ran()
            desk.planner.__class__ = kind
            hear(desk, edge, list(order))
            placement = desk.kept.placements["w", 1]
            found.append((placement.said, placement.seat.get("form")))
        wrong[kind] = len(found) - found.count(("checkpointed", "microvm"))
    assert wrong == {Planner: 0, ByArrival: 18}, "only what comes last in truth may come last"


def test_an_older_running_still_ends_what_is_held_against_a_node_and_an_end_is_counted_once() -> None:
    desk, edge = ran()
    said(desk, edge, "w", 1, "refused", "full")
    until = desk.row("w").avoid[edge][0]
    desk.do(lambda planner, now: planner.attempt("w", now), after_ms=until - desk.now + 1)
    for name in EDGES:
        if name != edge:
            desk.do(lambda planner, now, name=name: planner.cordon(name, "drain", now))
            said(desk, name, "w", 2, "stopped")
    round_of(desk, **EDGES)
    row = desk.row("w")
    assert (row.state, row.node) == ("placed", edge) and edge in row.avoid
    said(desk, edge, "w", row.epoch, "checkpointed", seq=20)
    assert edge in desk.row("w").avoid
    said(desk, edge, "w", row.epoch, "running", seq=19)
    assert edge not in desk.row("w").avoid and desk.kept.placements["w", row.epoch].said == "checkpointed"
    said(desk, edge, "w", row.epoch, "failed", "it broke", seq=22)
    said(desk, edge, "w", row.epoch, "running", seq=21)
    said(desk, edge, "w", row.epoch, "stopped", seq=23)
    assert (desk.row("w").state, desk.row("w").reason) == ("failed", "it broke") and not desk.planner.tables.open


def test_an_older_epochs_end_counts_whatever_was_said_of_the_newer_one() -> None:
    """Each placement has an order of its own: its end lets the next one begin, however late it is heard."""
    desk, edge = ran()
    said(desk, edge, "w", 1, "running", seq=1)
    desk.do(lambda planner, now: planner.cordon(edge, "drain", now))
    target = desk.row("w").node
    assert target != edge and entries(desk, target) == []
    said(desk, target, "w", 2, "accepted", seq=9)
    said(desk, edge, "other", 1, "running", seq=9)
    said(desk, edge, "w", 1, "stopped", seq=5)
    assert entries(desk, target) == [("w", 2, "running")]


def at_site(desk: Desk, edge: str, seq: int, state: str, origin: str, fence: int) -> None:
    desk.do(lambda planner, now: planner.said(edge, seq, {"id": "w", "epoch": 1, "state": state, "reason": "", "for": origin, "fence": fence}, now))


def test_what_a_sibling_said_before_its_end_opens_nothing_again() -> None:
    for state, restarts in itertools.product(("done", "failed", "stopped"), (False, True)):
        desk, origin, (other, _) = site()
        at_site(desk, other, 6, state, origin, 7)
        ended = desk.kept.placements["w", 1]
        assert ended.to_ms is not None and desk.row("w").state == ("pending" if state == "stopped" else state)
        if restarts:
            assert desk.restart() == []
        at_site(desk, other, 5, "running", origin, 7)
        assert not desk.planner.tables.open and desk.kept.placements["w", 1] == ended and desk.row("w").state == ("pending" if state == "stopped" else state)
        at_site(desk, other, 9, "running", origin, 8)
        assert [(one.node, one.said) for one in desk.planner.tables.open.values()] == [(other, "running")], "but what was given later stands"


def test_of_what_waits_since_its_node_was_taken_out_a_siblings_end_counts_in_any_order() -> None:
    found = set()
    for order in ((5, 6), (6, 5)):
        desk, origin, (other, third) = site()
        for name in (other, third):
            desk.do(lambda planner, now, name=name: planner.cordon(name, "cordon", now))
        desk.do(lambda planner, now, origin=origin: planner.remove_node(origin, False, now))
        for seq in order:
            at_site(desk, other, seq, "running" if seq == 5 else "done", origin, 7)
        found.add((desk.row("w").state, len(desk.planner.tables.open)))
    assert found == {("done", 0)}


def test_fences_are_kept_of_the_newest_epochs_only() -> None:
    desk, origin, (other, _) = site()
    for epoch in range(2, 31):
        desk.do(lambda planner, _, epoch=epoch: planner.set(replace(planner.tables.rows["w"], epoch=epoch)))
        desk.do(lambda planner, now, epoch=epoch: planner.said(other, 100 + epoch, {"id": "w", "epoch": epoch, "state": "done", "reason": "", "for": origin, "fence": 7}, now))
    assert list(desk.row("w").fences) == [str(epoch) for epoch in range(31 - MAX_FENCES, 31)]
