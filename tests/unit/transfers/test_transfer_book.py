"""The book of transfers: one lease a task, whatever dies, and nothing that an old lease says counts."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.schema import check_fields
from hub.transfers.book import AGAIN_MS, FINAL, LEASE_MS, LIVE_MOST, TRIES_MOST, Book, Contradicts, Transfer
from hub.transfers.document import REPORT, read_transfer

FACTS = {"slots": 2}


def document(name: str = "t", **more: Any) -> dict[str, Any]:
    return read_transfer({"id": name, "source": {"worker": "a", "path": f"{name}.raw"}, "destination": {"worker": "b", "path": f"in/{name}.raw"}, **more})


def stream(name: str = "t") -> dict[str, Any]:
    """As the hub's own moves ask for it; no user can."""
    return {**document(name), "stream": True}


def said(task: str, epoch: int, state: str, **more: Any) -> dict[str, Any]:
    return check_fields(REPORT, {"task": task, "epoch": epoch, "state": state, **more}, "payload")


def book() -> Book:
    made = Book(key=lambda: "5ec4e7")
    for worker in ("a", "b"):
        made.hello(worker, FACTS, 0)
    return made


def listening(made: Book, now: int = 0) -> int:
    """Up to where the receiver listens; its epoch."""
    (task,), _ = made.lease("b", {}, now)
    assert made.report("b", said("t/receive", task["epoch"], "listening", address="b:1"), now)
    return int(task["epoch"])


def test_a_transfer_goes_from_queued_to_done_and_its_key_is_forgotten() -> None:
    made = book()
    transfer = made.submit(document(), 0)
    assert made.lease("a", {}, 0) == ([], []), "nobody listens yet"
    epoch = listening(made)
    (task,), _ = made.lease("a", {}, 0)
    assert task["address"] == "b:1" and task["key"] == transfer.key == "5ec4e7" and task["path"] == "t.raw" and transfer.state == "moving"
    assert made.report("a", said("t/send", task["epoch"], "working", progress={"moved_bytes": 5}), 1) and transfer.progress["moved_bytes"] == 5
    assert made.report("b", said("t/receive", epoch, "done"), 2) and transfer.state == "moving"
    assert made.report("a", said("t/send", task["epoch"], "done", root="ab", result={"seconds": 1}), 3)
    assert (transfer.state, transfer.root, transfer.key) == ("done", "ab", "")
    assert "key" not in made.view(transfer, 3) and "5ec4e7" not in str(made.taken()["t"])


def test_what_is_held_has_its_receiver_ready_and_no_sender_until_it_is_let_go_also_over_a_restart() -> None:
    made = book()
    made.submit(document(), 0, held=True)
    listening(made)
    assert made.lease("a", {}, 0) == ([], []), "there is nothing to send yet"
    (told,) = made.taken().values()
    back = Book([Transfer.from_json(told)])  # type: ignore[arg-type]
    now = 0
    for _ in range(2 * TRIES_MOST):  # a receiver waits in vain as often as it has to
        now += 10 * LEASE_MS
        back.hello("b", FACTS, now)
        (task,), _ = back.lease("b", {}, now)
        assert back.report("b", said("t/receive", task["epoch"], "failed", error="nobody came"), now)
    assert back.transfers["t"].live
    now += 10 * LEASE_MS
    back.hello("b", FACTS, now)
    (task,), _ = back.lease("b", {}, now)
    assert back.report("b", said("t/receive", task["epoch"], "listening", address="b:1"), now)
    back.hello("a", FACTS, now)
    assert back.lease("a", {}, now) == ([], [])
    back.let_go("t", now)
    (task,), _ = back.lease("a", {}, now)
    assert task["what"] == "send"


def test_the_same_again_is_answered_and_another_refused() -> None:
    made = book()
    first = made.submit(document(), 0)
    assert made.submit(document(), 5) is first
    with pytest.raises(Contradicts, match="another transfer"):
        made.submit(document(limit_mbit=5), 5)
    with pytest.raises(Contradicts, match="on its way there"):
        made.submit({**document(), "id": "u"}, 5)
    made.cancel("t", 6)
    assert made.submit({**document(), "id": "u"}, 7).state == "queued"


def test_a_lease_that_ran_out_is_given_anew_and_the_old_one_counts_no_more() -> None:
    made = book()
    transfer = made.submit(document(), 0)
    epoch = listening(made)
    (old,), _ = made.lease("a", {}, 0)
    late = LEASE_MS + 1
    # The receiver's worker came back without memory of it: where it listened counts no more, nor does the sender that calls there.
    (again,), _ = made.lease("b", {}, late)
    assert again["epoch"] == epoch + 1 and transfer.address == ""
    assert not made.report("b", said("t/receive", epoch, "listening", address="evil:1"), late) and transfer.address == ""
    assert not made.report("a", said("t/send", old["epoch"], "done", root="00"), late) and transfer.state == "moving"
    assert made.lease("a", {"t/send": old["epoch"]}, late) == ([], ["t/send"])
    assert made.report("b", said("t/receive", again["epoch"], "listening", address="b:2"), late)
    (new,), _ = made.lease("a", {}, late)
    assert new["epoch"] == old["epoch"] + 1 and new["address"] == "b:2"


def test_a_worker_that_holds_its_task_keeps_it_through_a_hub_that_was_away() -> None:
    made = book()
    made.submit(document(), 0)
    epoch = listening(made)
    back = Book([Transfer.from_json(one) for one in made.taken().values() if one is not None])
    back.hello("b", FACTS, 10 * LEASE_MS)
    assert back.lease("b", {"t/receive": epoch}, 10 * LEASE_MS) == ([], [])
    assert back.report("b", said("t/receive", epoch, "done"), 10 * LEASE_MS)


def test_what_fails_in_passing_is_tried_again_ever_later_and_not_for_ever() -> None:
    made = book()
    transfer = made.submit(document(), 0)
    now, waits = 0, []
    for _ in range(TRIES_MOST):
        (task,), _ = made.lease("b", {}, now)
        made.report("b", said("t/receive", task["epoch"], "failed", error="lost"), now)
        waits.append(transfer.receive.after_ms - now)
        now = max(now, transfer.receive.after_ms)
    assert transfer.state == "failed" and transfer.reason == "receive: lost" and not transfer.key
    assert waits[:3] == [AGAIN_MS[0], 2 * AGAIN_MS[0], 4 * AGAIN_MS[0]]


def test_what_is_final_fails_at_once_and_stops_the_other_side() -> None:
    made = book()
    transfer = made.submit(document(), 0)
    epoch = listening(made)
    (task,), _ = made.lease("a", {}, 0)
    assert made.report("a", said("t/send", task["epoch"], "failed", error="no such file", final=True), 0)
    assert transfer.state == "failed" and "no such file" in transfer.reason
    assert made.lease("b", {"t/receive": epoch}, 0) == ([], ["t/receive"])


def test_a_receiver_that_is_done_comes_again_where_the_sender_did_not_hear_of_it() -> None:
    made = book()
    transfer = made.submit(document(), 0)
    epoch = listening(made)
    made.lease("a", {}, 0)
    made.report("b", said("t/receive", epoch, "done"), 0)
    assert made.lease("b", {}, LEASE_MS - 1)[0] == [] and transfer.state == "moving"
    assert made.lease("b", {}, LEASE_MS)[0][0]["what"] == "receive"


def test_slots_are_kept_and_times_awaited() -> None:
    made = book()
    for number in range(3):
        made.submit(document(f"t{number}"), 0)
    assert len(made.lease("b", {}, 0)[0]) == 2
    late = Book()
    late.hello("b", FACTS, 0)
    late.submit(document(not_before_ms=100), 0)
    assert late.lease("b", {}, 99)[0] == [] and len(late.lease("b", {}, 100)[0]) == 1


def test_there_are_no_more_than_may_be() -> None:
    made = Book()
    for number in range(LIVE_MOST):
        made.submit(document(f"t{number}"), 0)
    with pytest.raises(Contradicts, match="not over yet"):
        made.submit(document("more"), 0)


@pytest.mark.parametrize(("change", "field"), [
    ({"id": "../x"}, "id"), ({"source": {"worker": "a", "path": "/etc/passwd"}}, "source.path"), ({"source": {"worker": "a", "path": "x/../../y"}}, "source.path"),
    ({"destination": {"worker": "a", "path": "t.raw"}}, "destination"), ({"destination": {"worker": "b"}}, "destination.path"), ({"limit_mbit": -1}, "limit_mbit"), ({"lmit": 1}, "lmit"), ({"base": "../b"}, "base"),
])
def test_a_document_that_is_wrong_is_refused_by_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ContractError) as refused:
        read_transfer({"id": "t", "source": {"worker": "a", "path": "t.raw"}, "destination": {"worker": "b", "path": "t.raw"}, **change})
    assert refused.value.field == field


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "source", "destination", "worker", "path", "base"]), inner)))
def test_any_json_is_a_transfer_or_refused(value: Any) -> None:
    try:
        read_transfer(value)
    except ContractError:
        pass


def streaming(made: Book, now: int = 0) -> tuple[Transfer, int, int]:
    """A stream with both sides at work; their epochs, the receiver's first."""
    transfer = made.submit(stream(), now)
    epoch = listening(made, now)
    (task,), _ = made.lease("a", {}, now)
    assert task["stream"] and task["what"] == "send"
    return transfer, epoch, int(task["epoch"])


def passing(made: Book, worker: str, held: dict[str, int], begin: int, end: int) -> list[dict[str, Any]]:
    """That worker asks again and again, as one that is there does; what it is given."""
    return [task for now in range(begin, end, LEASE_MS // 10) for task in made.lease(worker, held, now)[0]]


def test_a_stream_is_no_users_to_ask_for_and_a_lease_says_what_it_is() -> None:
    with pytest.raises(ContractError):
        read_transfer(stream())
    made = book()
    made.submit(document("u"), 0)
    assert made.lease("b", {}, 0)[0][0]["stream"] is False
    made.submit(stream(), 0)
    assert made.lease("b", {"u/receive": 1}, 0)[0][0]["stream"] is True


def test_a_stream_is_done_when_its_sender_says_so_whoever_is_first() -> None:
    for order in (("a", "b"), ("b", "a")):
        made = book()
        transfer, into, out = streaming(made)
        for number, worker in enumerate(order):
            which, epoch = ("send", out) if worker == "a" else ("receive", into)
            counted = made.report(worker, said(f"t/{which}", epoch, "done", result={"bytes_out": 5}), number)
            assert counted == (order[0] != "a" or number == 0)
        assert transfer.state == "done" and transfer.result == {"bytes_out": 5} and not transfer.key
    made = book()
    transfer, into, out = streaming(made)
    assert made.report("b", said("t/receive", into, "done"), 1) and transfer.live
    assert passing(made, "b", {}, 2, LEASE_MS - 1) == [], "nobody asks it again"
    made.lease("a", {"t/send": out}, LEASE_MS - 1)
    assert passing(made, "b", {}, LEASE_MS, 2 * LEASE_MS - 2) == [] and transfer.live
    assert made.report("a", said("t/send", out, "failed", error="cut", final=True), 2 * LEASE_MS - 2)
    assert (transfer.state, transfer.reason) == ("failed", "send: cut")


@pytest.mark.parametrize("which", ["receive", "send"])
@pytest.mark.parametrize("final", [False, True])
def test_a_stream_fails_with_either_side_at_once(which: str, final: bool) -> None:
    made = book()
    transfer, into, out = streaming(made)
    worker, epoch = ("b", into) if which == "receive" else ("a", out)
    assert made.report(worker, said(f"t/{which}", epoch, "failed", error="the other end was gone", final=final), 1)
    assert (transfer.state, transfer.reason, transfer.key) == ("failed", f"{which}: the other end was gone", "")
    other, task, left = ("a", "t/send", out) if which == "receive" else ("b", "t/receive", into)
    assert made.lease(other, {task: left}, 1) == ([], [task])


def runs_out(which: str) -> None:
    made = book()
    transfer, into, out = streaming(made)
    there, held = ("b", {"t/receive": into}) if which == "send" else ("a", {"t/send": out})
    assert passing(made, there, held, 0, LEASE_MS) == [] and transfer.live
    lost = "a" if which == "send" else "b"
    assert made.lease(lost, {}, LEASE_MS)[0] == [], "not given anew"
    assert (transfer.state, transfer.reason) == ("failed", f"{which}: its worker said nothing for {LEASE_MS // 1000} s")
    assert made.lease(there, held, LEASE_MS)[1] == list(held)
    assert made.taken()["t"]["state"] == "failed"  # type: ignore[index]


@pytest.mark.parametrize("which", ["receive", "send"])
def test_a_stream_whose_lease_ran_out_has_failed_and_is_not_given_anew(which: str) -> None:
    runs_out(which)


@pytest.mark.parametrize("which", ["receive", "send"])
def test_control_a_book_that_gives_a_stream_anew_is_caught(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transfer, "once", False)
    with pytest.raises(AssertionError):
        runs_out(which)


def test_whose_worker_asks_is_enough_to_see_that_anothers_lease_ran_out() -> None:
    made = book()
    transfer, into, _ = streaming(made)
    passing(made, "b", {"t/receive": into}, 0, LEASE_MS + 1)
    assert transfer.state == "failed" and transfer.reason.startswith("send: ")


@pytest.mark.parametrize("restarted", [False, True])
def test_a_hub_that_was_away_gives_streams_time_to_come_back(restarted: bool) -> None:
    made = book()
    _, into, out = streaming(made)
    if restarted:
        made = Book([Transfer.from_json(one) for one in made.taken().values() if one is not None])
    late = 10 * LEASE_MS
    for worker in ("a", "b"):
        made.hello(worker, FACTS, late)
    assert made.lease("b", {"t/receive": into}, late) == ([], []), "the other may come just now"
    assert made.lease("a", {}, late) == ([], []), "one that has lost its task does not get it again"
    assert made.lease("a", {"t/send": out}, late + LEASE_MS // 2) == ([], [])
    passing(made, "b", {"t/receive": into}, late + LEASE_MS // 2, late + LEASE_MS + 2)
    assert made.transfers["t"].live
    passing(made, "b", {"t/receive": into}, late + LEASE_MS + 2, late + 2 * LEASE_MS)
    assert made.transfers["t"].state == "failed", "the sender's worker did not"


def test_a_stream_that_is_held_is_made_ready_as_often_as_it_takes() -> None:
    made = book()
    transfer = made.submit(stream(), 0, held=True)
    now = 0
    for final in (False, True) * TRIES_MOST:  # its worker says final of whatever becomes of a stream
        listening(made, now)
        assert made.lease("a", {}, now) == ([], []), "its sender waits"
        assert made.report("b", said("t/receive", transfer.receive.epoch, "failed", error="nobody came", final=final), now) and transfer.live
        now = transfer.receive.after_ms
    listening(made, now)
    assert passing(made, "a", {}, now, now + LEASE_MS) == []
    now += LEASE_MS
    (again,), _ = made.lease("b", {}, now)
    assert again["epoch"] == transfer.receive.epoch, "its worker was started anew"
    assert made.report("b", said("t/receive", again["epoch"], "listening", address="b:2"), now)
    made.let_go("t", now)
    (task,), _ = made.lease("a", {}, now)
    assert task["address"] == "b:2"
    assert made.report("b", said("t/receive", again["epoch"], "failed", error="late"), now) and transfer.state == "failed"


def test_a_receiver_that_was_lost_while_its_stream_was_held_is_given_anew_once_it_is_let_go() -> None:
    made = book()
    transfer = made.submit(stream(), 0, held=True)
    epoch = listening(made)
    late = LEASE_MS + 1
    made.lease("a", {}, late - 1)
    made.let_go("t", late)
    assert made.lease("a", {}, late) == ([], []) and not transfer.address
    (again,), _ = made.lease("b", {}, late)
    assert again["epoch"] == epoch + 1
    assert not made.report("b", said("t/receive", epoch, "failed", error="old"), late) and transfer.live


class Machine(RuleBasedStateMachine):
    """Workers that die, come back, are late, and a hub that starts again from its store; each process is known by task and epoch."""

    @initialize()
    def begin(self) -> None:
        self.book, self.now, self.kept = Book(key=lambda: "k"), 0, dict[str, dict[str, Any]]()
        self.running: dict[str, dict[str, dict[str, Any]]] = {"a": {}, "b": {}}
        self.ghosts: list[tuple[str, dict[str, Any]]] = []
        self.begun = set[str]()
        self.number = 0

    def keep(self) -> None:
        for name, one in self.book.taken().items():
            if one is not None:
                self.kept[name] = one

    @rule(asked=st.sampled_from([document, stream]), held=st.booleans())
    def submit(self, asked: Callable[[str], dict[str, Any]], held: bool) -> None:
        self.number += 1
        self.book.submit(asked(f"t{self.number}"), self.now, held)
        self.keep()

    @rule()
    def let_go(self) -> None:
        for name in self.book.transfers:
            self.book.let_go(name, self.now)
        self.keep()

    @rule(worker=st.sampled_from("ab"))
    def ask(self, worker: str) -> None:
        self.book.hello(worker, FACTS, self.now)
        tasks, stop = self.book.lease(worker, {name: one["epoch"] for name, one in self.running[worker].items()}, self.now)
        self.keep()
        for name in stop:
            self.running[worker].pop(name)
        for task in tasks:
            assert task["task"] not in self.running[worker], "what a worker holds is not given out"
            assert task["what"] == "receive" or task["address"], "a sender knows where to"
            if task["stream"] and not self.book.transfers[task["transfer"]].held:
                assert not self.begun & {task["task"], *([task["transfer"]] if task["what"] == "receive" else [])}, "no side of a stream is given anew once it may have carried something"
                self.begun |= {task["task"], *([task["transfer"]] if task["what"] == "send" else [])}
            self.running[worker][task["task"]] = task

    @rule(worker=st.sampled_from("ab"))
    def die(self, worker: str) -> None:
        self.ghosts += [(worker, one) for one in self.running[worker].values()][:5]
        self.running[worker].clear()

    @rule(ms=st.sampled_from([10, 2_000, LEASE_MS + 1]))
    def wait(self, ms: int) -> None:
        self.now += ms

    @rule(worker=st.sampled_from("ab"), state=st.sampled_from(["working", "listening", "done", "failed"]), final=st.booleans())
    def report(self, worker: str, state: str, final: bool) -> None:
        for name, task in list(self.running[worker].items())[:1]:
            go_on = self.book.report(worker, said(name, task["epoch"], state, address="x:1", root="r", final=final, error="e"), self.now)
            self.keep()
            if not go_on or state in ("done", "failed"):
                self.running[worker].pop(name)

    @precondition(lambda self: self.ghosts)
    @rule()
    def a_ghost_speaks(self) -> None:
        worker, task = self.ghosts.pop()
        transfer = self.book.transfers[task["transfer"]]
        if transfer.side(task["what"]).epoch != task["epoch"]:
            before = transfer.to_json()
            assert not self.book.report(worker, said(task["task"], task["epoch"], "done", root="ghost"), self.now)
            assert transfer.to_json() == before

    @rule()
    def the_hub_starts_again(self) -> None:
        self.book = Book([Transfer.from_json(one) for one in self.kept.values()], key=lambda: "k")

    @rule()
    def cancel(self) -> None:
        if self.book.transfers:
            self.book.cancel(next(reversed(self.book.transfers)), self.now)
            self.keep()

    @invariant()
    def what_is_over_has_no_key_and_no_lease(self) -> None:
        for one in self.book.transfers.values() if hasattr(self, "book") else ():
            if one.state in FINAL:
                assert not one.key and not one.receive.until_ms and not one.send.until_ms and not one.address
            else:
                assert one.key and (one.address or not one.send.until_ms)

    def teardown(self) -> None:
        """Left alone with workers that do their work, every transfer is over in the end."""
        if not hasattr(self, "book"):
            return
        self.let_go()
        for _ in range(60 * AGAIN_MS[1] // (LEASE_MS // 3)):
            self.now += LEASE_MS // 3
            for worker in "ba":
                self.ask(worker)
                self.report(worker, "listening" if worker == "b" else "done", False)
                self.ask(worker)
            if not any(one.live for one in self.book.transfers.values()):
                return
            self.running["b"].clear()
        raise AssertionError([one.to_json() for one in self.book.transfers.values() if one.live])


def test_a_stream_whose_receiver_has_ended_before_its_sender_began_is_over() -> None:
    """Nobody would ever say more of it."""
    made = book()
    made.submit({**document("t"), "stream": True}, 0)
    [task], _ = made.lease("b", {}, 0)
    assert made.report("b", said(task["task"], task["epoch"], "done"), 1)
    [one] = made.transfers.values()
    assert one.state == "failed" and "before anything was sent" in one.reason


def test_whatever_dies_one_lease_counts_and_all_comes_to_an_end() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=60, stateful_step_count=30))


def test_control_a_book_that_forgets_to_void_the_address_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def keeps_address(transfer: Transfer) -> None:
        transfer.send.until_ms = 0
        transfer.send.epoch -= 1

    monkeypatch.setattr(Book, "_unheard", staticmethod(keeps_address))
    with pytest.raises(AssertionError):
        test_a_lease_that_ran_out_is_given_anew_and_the_old_one_counts_no_more()
