"""Moves with state, by the planner alone: one copy at most, whatever is told when, whoever is restarted, wherever it fails; what fails goes on where it was; drains move what can be moved."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler import Invalid
from hub.scheduler.audit import check_invariants
from hub.workloads import moving
from hub.workloads.book import AHEAD, CHECKING, LIVE, RETURNING, ROOM, STARTING, STEPS, TAKING
from hub.workloads.documents import Conflict

from .kept import round_of, said
from .moving_world import W, World
from .test_planner import entries

AWAKE = [step for step in STEPS[:-1] if step != LIVE]
"""Steps of one that stands still for its way."""

RUNS_ON = [CHECKING, ROOM, LIVE, STARTING]
"""Steps of one that goes while it runs."""

WAYS = [*((step, False) for step in AWAKE), *((step, True) for step in RUNS_ON)]


def world(seed: int = 1, nodes: int = 2, ahead: bool = True, live: bool = False) -> World:
    found = World(random.Random(seed), nodes, ahead, live)
    assert found.where() == ["a"] and not found.trouble
    return found


def last(there: World) -> dict[str, object]:
    return list(there.desk.kept.moves.values())[-1]


def sound(there: World) -> None:
    assert there.trouble == []
    check_invariants(there.desk.planner.state)
    shown = {(one.node, one.epoch): one.said for one in there.desk.planner.tables.open.values() if one.workload == W and one.said}
    assert shown == {key: there.heard[key][1] for key in shown}, "what its node said last counts, whatever came last"


def test_it_runs_where_it_was_moved_to_and_nothing_is_left() -> None:
    there = world()
    there.begin()
    there.settle()
    assert there.where() == ["b"] and last(there)["state"] == "done" and there.count > 5
    assert (there.desk.row(W).node, there.desk.row(W).epoch) == ("b", 2) and list(there.desk.planner.tables.open) == [(W, 2)]
    assert entries(there.desk, "a") == [] and moving.operations(there.desk.planner, "a") == moving.operations(there.desk.planner, "b") == []
    there.begin("a")
    there.settle()
    assert there.where() == ["a"] and there.desk.row(W).epoch == 3
    sound(there)


@pytest.mark.parametrize("what", ["check", "room", "out", "carry", "from"])
def test_what_fails_before_the_commit_goes_on_at_its_source(what: str) -> None:
    there = world()
    there.failing = {what}
    there.begin()
    there.settle()
    assert there.where() == ["a"] and (there.desk.row(W).node, there.desk.row(W).epoch, there.desk.row(W).state) == ("a", 1, "placed")
    assert last(there)["state"] == "failed" and last(there)["reason"] and list(there.desk.planner.tables.open) == [(W, 1)]
    there.failing = set()
    round_of(there.desk, after_ms=120_000, a=True, b=True)
    assert there.begin()
    there.settle()
    assert there.where() == ["b"] and there.desk.row(W).epoch == 3, "the epoch of the target that refused is not given again"
    sound(there)


@pytest.mark.parametrize("what", ["ahead", "ahead empty", "carry ahead"])
def test_what_fails_of_its_disk_that_goes_ahead_holds_the_move_up_no_longer(what: str) -> None:
    there = world()
    there.failing = {what}
    there.begin()
    there.settle()
    assert there.where() == ["b"] and there.went == 0 and last(there)["state"] == "done" and not last(there)["ahead"] and last(there)["ahead_problem"]
    sound(there)


def test_a_disk_goes_ahead_where_both_nodes_say_so() -> None:
    there = world()
    there.begin()
    until(there, AHEAD)
    assert [(one["kind"], one["offer"]) for one in moving.operations(there.desk.planner, "a")] == [("move-ahead", {"speed": 125_000_000})] and there.where() == ["a"], "it runs meanwhile"
    until(there, TAKING)
    assert [(one["kind"], one["offer"]) for one in moving.operations(there.desk.planner, "a")] == [("move-out", {"ahead": True})]
    there.settle()
    assert there.where() == ["b"] and there.went == 1 and last(there)["ahead"] and last(there)["ahead_bytes"] == 7
    older = world(ahead=False)
    older.begin()
    older.settle()
    assert older.where() == ["b"] and not last(older)["ahead"] and AHEAD not in last(older)["since_ms"]  # type: ignore[operator]
    for world_ in (there, older):
        sound(world_)


def test_each_transfer_belongs_to_its_steps() -> None:
    there = world()
    name = there.begin()
    move = last(there)
    ahead, live, state = (moving.transfer(move, way) for way in (moving.BEFORE, moving.ALIVE, ""))
    assert moving.carries(ahead["id"]) == (name, ("ahead",)) and moving.carries(live["id"]) == (name, ("live", "starting")) and moving.carries(state["id"]) == (name, ("taking", "sending"))
    assert ahead["source"]["path"] == ahead["destination"]["path"] == f"{name}.ahead" and live["destination"]["path"] == f"{name}.live" and len({ahead["id"], live["id"], state["id"]}) == 3
    assert live["stream"] and "stream" not in ahead and "stream" not in state
    shown = {(step, runs_on): moving.shown_transfer({**move, "step": step, "live": runs_on}) for step, runs_on in ((AHEAD, False), (LIVE, False), (STARTING, True), (STARTING, False))}
    assert shown == {(AHEAD, False): ahead["id"], (LIVE, False): live["id"], (STARTING, True): live["id"], (STARTING, False): state["id"]}


def test_where_it_cannot_even_come_back_the_state_stays_and_is_told() -> None:
    there = world()
    there.failing = {"from", "back"}
    there.begin()
    there.settle()
    assert there.where() == [] and last(there)["state"] == "failed" and "its state is there" in str(last(there)["reason"]) and there.agents["a"].held
    sound(there)


def until(there: World, step: str) -> None:
    for _ in range(40):
        if (move := there.desk.planner.move_of(W)) is None or move["step"] == step:
            break
        for agent in there.agents.values():
            if (move := there.desk.planner.move_of(W)) is not None and move["step"] != step:
                there.hear(agent)
                there.act(agent)
                there.speak(agent)
        if (move := there.desk.planner.move_of(W)) is not None and move["step"] != step:
            there.carry()
    assert there.desk.planner.move_of(W)["step"] == step  # type: ignore[index]


@pytest.mark.parametrize(("step", "live"), WAYS)
def test_a_cancelled_move_leaves_it_where_it_was_but_not_when_only_the_target_can_say(step: str, live: bool) -> None:
    there = world(live=live)
    name = there.begin()
    until(there, step)
    if step == STARTING:
        with pytest.raises(Conflict, match="is starting it"):
            there.desk.do(lambda planner, now: moving.cancel(planner, name, now))
    else:
        there.desk.do(lambda planner, now: moving.cancel(planner, name, now))
    there.settle()
    assert (there.where(), last(there)["state"]) == ((["b"], "done") if step == STARTING else (["a"], "cancelled"))
    sound(there)


@pytest.mark.parametrize(("step", "live"), WAYS)
def test_a_cancelled_workload_ends_on_both_nodes(step: str, live: bool) -> None:
    there = world(live=live)
    there.begin()
    until(there, step)
    there.desk.do(lambda planner, now: planner.cancel(W, now))
    there.settle()
    assert there.where() == [] and there.desk.row(W).state == "cancelled" and not there.desk.planner.tables.open and not there.desk.planner.tables.moving
    sound(there)


@pytest.mark.parametrize(("step", "live"), WAYS)
def test_a_target_that_is_taken_out_gives_it_back(step: str, live: bool) -> None:
    there = world(live=live)
    there.begin()
    until(there, step)
    del there.agents["b"]
    there.desk.do(lambda planner, now: planner.remove_node("b", False, now))
    there.settle()
    assert there.where() == ["a"] and last(there)["state"] == "failed"
    sound(there)


def test_one_that_can_goes_while_it_runs() -> None:
    there = world(live=True)
    there.begin()
    until(there, LIVE)
    assert not moving.live(there.desk.planner)[0]["waits"] and {one["kind"] for one in moving.operations(there.desk.planner, "b")} == {"move-room", "move-come"}
    assert [one["kind"] for one in moving.operations(there.desk.planner, "a")] == ["move-check"], "it is asked when its target waits"
    for agent in (there.agents["b"], there.agents["a"]):
        there.hear(agent)
        there.act(agent)
        while agent.out:
            there.speak(agent)
    assert last(there)["waits"] and [one["kind"] for one in moving.operations(there.desk.planner, "a")] == ["move-check"]
    there.carry()
    assert [(one["kind"], one["epoch"], one["offer"]) for one in moving.operations(there.desk.planner, "a")] == [("move-live", 1, {"speed": 125_000_000})] and there.where() == ["a"]
    until(there, STARTING)
    assert there.where() == ["a"], "it runs until its target does"
    assert there.desk.planner.wanted("b")[0]["from"] == {"move": last(there)["id"], "live": True}
    assert {one["kind"] for one in moving.operations(there.desk.planner, "b")} == {"move-room", "move-come"} and [one["kind"] for one in moving.operations(there.desk.planner, "a")] == ["move-live"]
    there.settle()
    assert there.where() == ["b"] and there.ran_on == 1 and last(there)["state"] == "done" and last(there)["live"] and TAKING not in last(there)["since_ms"]  # type: ignore[operator]
    sound(there)


@pytest.mark.parametrize("what", ["come", "connect", "live"])
def test_where_it_cannot_go_while_it_runs_it_stands_still_for_its_way(what: str) -> None:
    there = world(live=True)
    there.failing = {what}
    there.begin()
    there.settle()
    assert there.where() == ["b"] and there.ran_on == 0 and there.went == 1 and last(there)["state"] == "done" and not last(there)["live"]
    assert "planted" in str(last(there)["live_problem"]) and not there.agents["b"].waiting
    sound(there)


@pytest.mark.parametrize("seed", range(8))
def test_what_was_cut_when_it_was_to_begin_goes_on_at_its_source(seed: int) -> None:
    there = world(seed, live=True)
    there.failing = {"cut"}
    there.begin()
    there.settle()
    assert there.where() == ["a"] and there.desk.row(W).epoch == 1 and last(there)["state"] == "failed" and "b could not go on with it" in str(last(there)["reason"])
    assert not there.agents["a"].left and not there.agents["b"].waiting
    sound(there)


def test_one_that_takes_too_long_while_it_runs_stands_still_for_the_rest() -> None:
    there = world(live=True)
    there.begin()
    until(there, LIVE)
    round_of(there.desk, after_ms=moving.PATIENCE_MS[LIVE] + 1, a=True, b=True)
    assert there.desk.planner.move_of(W)["step"] == AHEAD and "it was live for" in str(last(there)["live_problem"])  # type: ignore[index]
    there.settle()
    assert there.where() == ["b"] and there.ran_on == 0
    sound(there)


def test_a_source_that_is_lost_while_the_target_starts_it_leaves_it_to_the_target() -> None:
    there = world(nodes=3)
    there.begin("b")
    until(there, STARTING)
    del there.agents["a"]
    there.desk.do(lambda planner, now: planner.remove_node("a", False, now))
    assert (there.desk.row(W).node, there.desk.row(W).epoch) == ("b", 2), "it is not placed anew: the target may be running it"
    there.settle()
    assert there.where() == ["b"] and last(there)["state"] == "done"
    sound(there)


def test_a_silent_target_that_was_told_to_start_it_decides_nothing() -> None:
    there = world()
    there.begin()
    until(there, STARTING)
    round_of(there.desk, after_ms=86_400_000, a=True)
    round_of(there.desk, after_ms=86_400_000, a=True)
    assert there.desk.planner.move_of(W)["step"] == STARTING and (W, 2) in there.desk.planner.tables.open  # type: ignore[index]
    there.settle()
    assert there.where() == ["b"]
    sound(there)


@pytest.mark.parametrize("step", ["checking", "room", "ahead", "taking", "sending"])
def test_a_step_that_does_not_end_is_given_up(step: str) -> None:
    there = world()
    there.begin()
    until(there, step)
    round_of(there.desk, after_ms=moving.PATIENCE_MS[step] + 1, a=True, b=True)
    there.settle()
    assert there.where() == ["a"] and f"it was {step} for" in str(last(there)["reason"])
    sound(there)


def test_what_takes_long_at_its_limit_is_given_longer() -> None:
    there = world()
    there.begin()
    until(there, "sending")
    move = there.desk.planner.move_of(W)
    assert move is not None and moving.patience_ms(move) == moving.PATIENCE_MS["sending"]
    slow = {**move, "bytes": 100 << 30, "ahead_bytes": 10, "limit_mbit": 100.0}
    assert moving.patience_ms(slow) == moving.TIMES * (100 << 30) * 8 // 100_000 > moving.PATIENCE_MS["sending"]
    assert moving.patience_ms({**slow, "step": "ahead"}) == moving.PATIENCE_MS["ahead"] and moving.patience_ms({**slow, "step": "ahead", "ahead_bytes": 1 << 40}) > moving.PATIENCE_MS["ahead"]
    assert moving.patience_ms({**slow, "step": "taking"}) == moving.PATIENCE_MS["taking"]


def test_at_each_instant_the_documents_say_who_may_run_it() -> None:
    there = world()
    there.begin()
    roles = {}
    for step in AWAKE:
        until(there, step)
        wanted = {name: [(one["epoch"], one["held"], bool(one["from"])) for one in there.desk.planner.wanted(name) if one["wanted"] == "running"] for name in ("a", "b")}
        roles[step] = wanted
    assert roles["checking"] == roles["room"] == roles["ahead"] == roles["taking"] == {"a": [(1, False, False)], "b": []}
    assert roles["sending"] == {"a": [(1, True, False)], "b": []} and roles["starting"] == {"a": [(1, True, False)], "b": [(2, False, True)]}


@pytest.mark.parametrize(("change", "words"), [
    ({"kind": "function"}, "only containers"), ({"when_cut_off": "move"}, "when_cut_off"), ({"spec": {"isolation": "microvm"}}, "only containers"),
])
def test_what_cannot_move_is_refused_by_name(change: dict[str, object], words: str) -> None:
    there = world()
    labels = {"novacron.isolation/microvm": "true", "novacron.moves/container": "true"}
    there.desk.node("d", "edge", labels=labels)
    round_of(there.desk, a=True, b=True, d=True)
    there.desk.submit({"id": "x", "kind": "container", "requests": {"cpu": 1}, **change})
    said(there.desk, there.desk.row("x").node, "x", 1, "running")
    with pytest.raises(Conflict, match=words):
        there.desk.do(lambda planner, now: moving.begin(planner, "x", "", now, "asked for"))


def test_a_virtual_machine_moves_between_nodes_that_say_so() -> None:
    there = world()
    there.desk.node("d", "edge", labels={"novacron.moves/vm": "true"}, runs=["vm"])
    there.desk.node("e", "edge", labels={"novacron.moves/container": "true"}, runs=["vm"])
    round_of(there.desk, a=True, b=True, d=True, e=True)
    for name, node in (("x", "d"), ("y", "e")):
        there.desk.submit({"id": name, "kind": "vm", "requests": {"cpu": 1}, "when_drained": "move", "node_affinity": {"required": [{"names": [{"op": "In", "values": [node]}]}]}})
        said(there.desk, node, name, 1, "running")
    with pytest.raises(Conflict, match="e cannot give a workload away"):
        there.desk.do(lambda planner, now: moving.begin(planner, "y", "", now, "asked for"))
    with pytest.raises(Conflict, match="novacron.moves/vm"):
        there.desk.do(lambda planner, now: moving.begin(planner, "x", "e", now, "asked for"))
    there.desk.submit({"id": "z", "kind": "vm", "requests": {"cpu": 1}, "node_selector": {"other": "no"}})
    there.desk.node("f", "edge", labels={"novacron.moves/vm": "true", "other": "no"}, runs=["vm"])
    round_of(there.desk, a=True, b=True, d=True, e=True, f=True)
    said(there.desk, "f", "z", 1, "running")
    with pytest.raises(Conflict, match="finds no place on d"):
        there.desk.do(lambda planner, now: moving.begin(planner, "z", "d", now, "asked for"))
    there.desk.node("d", "edge", labels={"novacron.moves/vm": "true", "other": "no"}, runs=["vm"])
    move = there.desk.do(lambda planner, now: moving.begin(planner, "z", "", now, "asked for"))
    assert (move["source"], move["target"], move["step"]) == ("f", "d", "checking")


def test_a_target_must_be_able_to_and_have_room() -> None:
    there = world()
    there.desk.node("plain", "edge")
    round_of(there.desk, a=True, b=True, plain=True)
    for to, words in (("plain", "plain cannot take it in"), ("a", "a cannot take it in"), ("none", "is no node")):
        with pytest.raises(Conflict, match=words):
            there.desk.do(lambda planner, now, to=to: moving.begin(planner, W, to, now, "asked for"))
    there.desk.submit({"id": "full", "kind": "container", "requests": {"cpu": 4}, "node_selector": {"n": "b"}})
    with pytest.raises(Conflict, match="finds no place on b"):
        there.desk.do(lambda planner, now: moving.begin(planner, W, "b", now, "asked for"))
    assert not there.desk.planner.tables.moves
    sound(there)




def drained(there: World) -> None:
    there.desk.do(lambda planner, now: planner.cordon("a", "drain", now))


def test_a_drain_moves_with_its_state_what_can_be_moved_so_many_at_once() -> None:
    there = world()
    more = [f"x{number}" for number in range(3)]
    there.desk.do(lambda planner, now: planner.cordon("b", "cordon", now))
    there.desk.submit(*({"id": name, "kind": "container", "requests": {"cpu": 0.5}} for name in more))
    there.desk.do(lambda planner, now: planner.cordon("b", "", now))
    for name in more:
        said(there.desk, "a", name, 1, "running")
    drained(there)
    assert len(there.desk.planner.tables.moving) == moving.AT_ONCE
    waits = [name for name in (W, *more) if name not in there.desk.planner.tables.moving]
    assert all("waits to be moved with its state: 2 are on their way" in there.desk.row(name).reason and there.desk.row(name).node == "a" for name in waits)
    first = set(there.desk.planner.tables.moving)
    for move in moving.live(there.desk.planner):
        there.desk.do(lambda planner, now, move=move: moving.cancel(planner, move["id"], now))
    round_of(there.desk, a=True, b=True)
    assert all(there.desk.row(name).node == "b" and there.desk.row(name).epoch == 3 for name in first), "what could not be moved with its state begins anew, as its document asks for nothing else"
    assert set(there.desk.planner.tables.moving) == set(waits), "and the next ones are on their way"


@pytest.mark.parametrize(("wish", "fails", "ends"), [
    ("", False, "moved"), ("", True, "restarted"), ("move", False, "moved"), ("move", True, "stays"), ("restart", False, "restarted"), ("stay", False, "stays"),
])
def test_a_drain_does_with_each_what_its_document_says(wish: str, fails: bool, ends: str) -> None:
    there = world()
    there.desk.do(lambda planner, now: planner.cordon("b", "cordon", now))
    there.desk.submit({"id": "x", "kind": "container", "requests": {"cpu": 0.5}, **({"when_drained": wish} if wish else {})})
    there.desk.do(lambda planner, now: planner.cordon("b", "", now))
    said(there.desk, "a", "x", 1, "running")
    drained(there)
    if (move := there.desk.planner.move_of("x")) is not None:
        there.desk.do(lambda planner, now: moving.answered(planner, "a", {"id": f"{move['id']}.check", "state": "failed" if fails else "succeeded", "reason": "spec.network", "detail": {}}, now))
    round_of(there.desk, a=True, b=True)
    row = there.desk.row("x")
    found = "moved" if "x" in there.desk.planner.tables.moving else "stays" if row.node == "a" else "restarted"
    assert found == ends
    if ends == "stays":
        assert "must leave a: " in row.reason and ("spec.network" in row.reason) == fails and ("when_drained: stay" in row.reason) == (wish == "stay")
    sound(there)


def test_what_fits_nowhere_stays_with_the_reason_and_an_uncordon_takes_back_what_was_not_touched() -> None:
    there = world()
    there.desk.submit({"id": "full", "kind": "container", "requests": {"cpu": 4}, "node_selector": {"n": "b"}})
    drained(there)
    assert there.desk.row(W).node == "a" and "must leave a: no other node will do" in there.desk.row(W).reason and not there.desk.planner.tables.moving
    there.desk.do(lambda planner, now: planner.cancel("full", now))
    said(there.desk, "b", "full", 1, "stopped")
    round_of(there.desk, a=True, b=True)
    assert W in there.desk.planner.tables.moving
    there.desk.do(lambda planner, now: planner.cordon("a", "", now))
    assert not there.desk.planner.tables.moving and last(there)["state"] == "cancelled"
    there.settle()
    assert there.where() == ["a"]
    sound(there)


def test_a_budget_holds_moves_with_state_back_too() -> None:
    there = world()
    there.desk.do(lambda planner, now: planner.cordon("b", "cordon", now))
    for name in ("x", "y"):
        there.desk.submit({"id": name, "kind": "container", "requests": {"cpu": 0.5}, "labels": {"app": "x"}})
        said(there.desk, "a", name, 1, "running")
    there.desk.do(lambda planner, now: planner.cordon("b", "", now))
    there.desk.do(lambda planner, _: planner.put_budget("one", {"selector": {"labels": {"app": "x"}}, "allowed": 1}))
    drained(there)
    round_of(there.desk, a=True, b=True)
    assert len({"x", "y"} & set(there.desk.planner.tables.moving)) == 1
    sound(there)


def test_a_node_that_cannot_be_told_of_a_move_loses_that_and_nothing_else() -> None:
    there = world()
    there.begin()
    assert there.desk.do(lambda planner, now: planner.untellable("b", "its document is full", now))
    assert last(there)["state"] == "failed" and "b cannot be told" in str(last(there)["reason"]) and there.desk.row(W).node == "a"
    assert not there.desk.do(lambda planner, now: planner.untellable("b", "its document is full", now))
    there.settle()
    assert there.where() == ["a"]
    sound(there)


@pytest.mark.parametrize("wish", ["often", 1, None])
def test_a_wish_that_is_none_is_refused(wish: object) -> None:
    there = world()
    if wish is None:
        with pytest.raises(Invalid, match="a function cannot be moved"):
            there.desk.submit({"id": "x", "kind": "function", "requests": {"cpu": 1}, "when_drained": "move"})
        return
    with pytest.raises(Invalid, match="when_drained"):
        there.desk.submit({"id": "x", "requests": {"cpu": 1}, "when_drained": wish})


def played(seed: int, failing: set[str], restarts: bool, steps: int, live: bool) -> World:
    """Random events, then all is delivered."""
    chance = random.Random(seed)
    there = World(chance, nodes=3, live=live)
    for _ in range(4):
        there.begin(chance.choice(("", "b", "c", "a")))
        there.failing = {what for what in failing if chance.random() < 0.5}
        for _ in range(chance.randrange(steps)):
            there.any_step()
        if chance.random() < 0.3:
            there.cancel()
        if restarts and chance.random() < 0.5:
            assert there.desk.restart() == []
            there.up()
        if chance.random() < 0.2:
            round_of(there.desk, after_ms=4_000_000, **dict.fromkeys(there.agents, True))
    there.failing = set()
    there.settle(20)
    return there


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sets(st.sampled_from(("check", "room", "come", "connect", "live", "cut", "out", "carry", "from"))), st.booleans(), st.booleans())
def test_in_any_order_one_copy_runs_and_goes_on_where_it_was(seed: int, failing: set[str], restarts: bool, live: bool) -> None:
    there = played(seed, failing, restarts, 60, live)
    sound(there)
    assert len(there.where()) == 1 and there.where() == [there.desk.row(W).node] and there.began == 1
    assert not there.desk.planner.tables.moving and len(there.desk.planner.tables.open) == 1


def test_a_hub_that_takes_back_what_its_target_may_be_running_is_seen() -> None:
    """The negative control: a move is given up where only its target can say what becomes of it."""
    there = world()
    there.begin()
    until(there, STARTING)
    there.hear(there.agents["b"])
    there.act(there.agents["b"])
    there.desk.do(lambda planner, now: moving.give_up(planner, next(iter(moving.live(planner))), "cancelled", now))
    there.hear(there.agents["a"])
    there.act(there.agents["a"])
    there.work()
    assert there.trouble == ["it runs on a, b"]


@pytest.mark.parametrize("words", [("accepted", "refused"), ("accepted", "running", "refused")])
def test_what_a_target_said_before_it_refused_does_not_have_its_source_begin_anew(words: tuple[str, ...]) -> None:
    there = world()
    there.begin()
    until(there, STARTING)
    for seq in range(len(words), 0, -1):
        said(there.desk, "b", W, 2, words[seq - 1], seq=100 + seq)
    assert (there.desk.row(W).node, there.desk.row(W).epoch, last(there)["step"]) == ("a", 1, RETURNING)
    there.settle()
    assert there.where() == ["a"] and there.desk.row(W).epoch == 1 and there.began == 1
    said(there.desk, "b", W, 7, "running")
    assert there.desk.row(W).epoch == 8, "but what this hub never gave is from before it was restored"


def test_what_a_target_said_last_is_what_counts_of_it() -> None:
    for words in itertools.permutations(enumerate(("accepted", "running", "checkpointed"), 101)):
        there = world()
        there.begin()
        until(there, STARTING)
        for seq, word in words:
            said(there.desk, "b", W, 2, word, seq=seq)
        current = there.desk.planner.current(W)
        assert last(there)["state"] == "done" and current is not None and (current.node, current.epoch, current.said) == ("b", 2, "checkpointed"), words
