"""The fleet's bookkeeping: who is there, since when, who is a clone, what is wanted of whom, how much may come. All pure: time is an argument."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract.desired import parse_desired
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.limits import MAX_COMMANDS
from edge_runtime.contract.presence import EDGE_PRESENCE
from edge_runtime.contract.receipts import MAX_CREDIT
from edge_runtime.contract.records import CHAIN_START, Batch, Record
from hub import fleet as fleet_module
from hub.book import ALTERNATIONS_MAX, MAX_HELD_RANGES, StreamBook
from hub.credit import PER_EDGE_MAX, PER_EDGE_MIN, QUEUE_HIGH, TOTAL_RECORDS, credit
from hub.fleet import SILENT_AFTER_MS, Change, Fleet, next_desired
from hub.hierarchy import build_tree
from hub.store.base import EdgeRow

NOW = 1_795_500_000_000


def status(edge: str = "gw-1", state: str = "online", *, boot: str = "b1", number: int = 1, **more: Any) -> dict[str, Any]:
    """A presence message as the contract hands it over."""
    return EDGE_PRESENCE.parse({"v": 1, "edge": edge, "boot": boot, "boot_n": number, "state": state, **more})


# -- presence ----------------------------------------------------------------------------------------------------------------


def test_an_edge_comes_goes_and_comes_back() -> None:
    fleet = Fleet()
    came = fleet.presence(status(reason="start", site="plant", generation=3), NOW)
    assert came.came and came.outage_started_ms is None and came.outage_ended is None
    assert (came.row.state, came.row.reason, came.row.since_ms, came.row.last_seen_ms, came.row.generation) == ("online", "start", NOW, NOW, 3)
    assert came.row.presence["site"] == "plant" and "v" not in came.row.presence and (came.row.boot, came.row.boot_n) == ("b1", 1)
    again = fleet.presence(status(reason="heartbeat"), NOW + 30_000)
    assert not again.came and again.row.since_ms == NOW and again.row.last_seen_ms == NOW + 30_000 and again.row.reason == "start"
    gone = fleet.presence(status(state="offline", reason="lost"), NOW + 40_000)
    assert gone.outage_started_ms == NOW + 40_000 and (gone.row.state, gone.row.reason, gone.row.since_ms) == ("offline", "lost", NOW + 40_000)
    assert gone.row.last_seen_ms == NOW + 30_000, "a Last Will is the broker's word, not a sign of life"
    twice = fleet.presence(status(state="offline", reason="shutdown"), NOW + 41_000)
    assert twice.outage_started_ms is None and twice.row.since_ms == NOW + 40_000
    back = fleet.presence(status(reason="reconnect"), NOW + 50_000)
    assert back.came and back.outage_ended == (NOW + 40_000, NOW + 50_000) and fleet.open_outages == {}


def test_an_edge_first_heard_of_by_its_last_will_is_in_an_outage() -> None:
    fleet = Fleet()
    assert fleet.presence(status(state="offline", reason=""), NOW).outage_started_ms == NOW
    assert fleet.rows["gw-1"].reason == "lost"
    assert fleet.presence(status(), NOW + 5).outage_ended == (NOW, NOW + 5)


def test_the_last_will_of_an_older_boot_is_ignored() -> None:
    fleet = Fleet()
    fleet.presence(status(boot="b1", number=1), NOW)
    fleet.presence(status(boot="b2", number=2), NOW + 1)
    late = fleet.presence(status(boot="b1", number=1, state="offline", reason="lost"), NOW + 2)
    assert late.row.state == "online" and late.outage_started_ms is None and fleet.open_outages == {}
    assert fleet.presence(status(boot="b2", number=2, state="offline"), NOW + 3).row.state == "offline"


def test_a_retained_message_is_no_sign_of_life() -> None:
    """The broker repeats what an edge said before the hub was there: it is believed until silence, and watched for no clone."""
    fleet = Fleet(rows={"gw-1": EdgeRow("gw-1", "offline", "the hub was away", NOW - 10**7, NOW - 10**7, "b1", 1)})
    fleet.presence(status(boot="b0", number=1), NOW, retained=True)
    row = fleet.rows["gw-1"]
    assert row.state == "online" and row.last_seen_ms == NOW - 10**7 and not row.quarantine and row.boot == "b1"
    assert [change.row.reason for change in fleet.silent(NOW)] == ["silent"]
    # Of an edge never seen nothing better is known than that it is there now.
    fleet.presence(status("gw-2"), NOW, retained=True)
    assert fleet.rows["gw-2"].last_seen_ms == NOW and fleet.silent(NOW + 1) == []


def test_silence_ends_a_presence_at_its_bound_and_once() -> None:
    fleet = Fleet()
    for edge in ("gw-1", "gw-2"):
        fleet.presence(status(edge), NOW)
    fleet.heard("gw-2", "b1", 1, NOW + SILENT_AFTER_MS)  # a batch is a sign of life as well
    assert fleet.silent(NOW + SILENT_AFTER_MS) == []
    [change] = fleet.silent(NOW + SILENT_AFTER_MS + 1)
    assert change.row.edge == "gw-1" and change.row.state == "offline" and change.outage_started_ms == NOW + SILENT_AFTER_MS + 1
    assert fleet.silent(NOW + SILENT_AFTER_MS + 2) == []
    assert fleet.presence(status("gw-1"), NOW + SILENT_AFTER_MS + 5).outage_ended == (NOW + SILENT_AFTER_MS + 1, NOW + SILENT_AFTER_MS + 5)


def test_edges_past_the_limit_are_refused_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "MAX_EDGES", 2)
    fleet = Fleet()
    fleet.presence(status("gw-1"), NOW)
    fleet.heard("gw-2", "b1", 1, NOW)
    for refused in (lambda: fleet.presence(status("gw-3"), NOW), lambda: fleet.heard("gw-3", "b", 1, NOW)):
        with pytest.raises(ContractError) as caught:
            refused()
        assert caught.value.field == "edge" and caught.value.reason == "limit" and caught.value.remedy
    assert fleet.presence(status("gw-1", "offline"), NOW + 1).outage_started_ms == NOW + 1 and set(fleet.rows) == {"gw-1", "gw-2"}


EVENTS = st.lists(
    st.tuples(st.sampled_from(("online", "offline", "retained", "batch", "silence", "restart")), st.integers(1, 200_000)), max_size=40,
)


class OutageLedger:
    """The checker: what outages a store that obeyed the changes would hold."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}
        self.done: list[tuple[int, int]] = []

    def take(self, change: Change) -> None:
        if change.outage_started_ms is not None:
            assert change.row.edge not in self.open, "an outage began within another"
            self.open[change.row.edge] = change.outage_started_ms
        if change.outage_ended is not None:
            begin, end = change.outage_ended
            assert self.open.pop(change.row.edge, None) == begin and begin <= end, "an outage ended that had not begun"
            self.done.append((begin, end))


def play(fleet: Fleet, events: list[tuple[str, int]]) -> None:
    """Play events of one edge; after each, an open outage and the state must agree."""
    ledger, now, number = OutageLedger(), NOW, 1
    for what, wait in events:
        now += wait
        changes: list[Change] = []
        if what == "silence":
            changes = fleet.silent(now)
        elif what == "batch":
            fleet.heard("gw-1", f"b{number}", number, now)
        else:
            number += what == "restart"
            message = status(state="offline" if what == "offline" else "online", boot=f"b{number}", number=number)
            changes = [fleet.presence(message, now, what == "retained")]
        for change in changes:
            ledger.take(change)
        row = fleet.rows.get("gw-1")
        if row is not None and row.since_ms:
            assert (row.state == "offline") == ("gw-1" in ledger.open), f"state {row.state} with open outages {ledger.open}"
            assert row.since_ms <= now and row.last_seen_ms <= now and not row.quarantine
        assert fleet.open_outages == ledger.open


@settings(max_examples=150, deadline=None)
@given(EVENTS)
def test_state_and_outages_agree_whatever_happens(events: list[tuple[str, int]]) -> None:
    play(Fleet(), events)


def test_the_checker_sees_a_fleet_that_forgets_to_end_outages() -> None:
    class Forgetful(Fleet):
        def presence(self, message: dict[str, Any], now_ms: int, retained: bool = False) -> Change:
            change = super().presence(message, now_ms, retained)
            change.outage_ended = None
            return change

    with pytest.raises(AssertionError):
        play(Forgetful(), [("online", 1), ("offline", 1), ("online", 1)])


# -- clones ------------------------------------------------------------------------------------------------------------------


def test_two_boots_with_one_number_are_quarantined_until_released() -> None:
    fleet = Fleet()
    fleet.presence(status(boot="a", number=4), NOW)
    fleet.presence(status("other", boot="a", number=4), NOW)
    row = fleet.presence(status(boot="b", number=4), NOW + 1).row
    assert "two machines" in row.quarantine and "a" in row.quarantine and "b" in row.quarantine
    first = row.quarantine
    fleet.heard("gw-1", "c", 4, NOW + 2)
    assert fleet.rows["gw-1"].quarantine == first, "the first reason is kept: it names the two that began it"
    assert not fleet.rows["other"].quarantine
    assert fleet.release("gw-1").quarantine == ""
    fleet.heard("gw-1", "b", 4, NOW + 3)
    assert not fleet.rows["gw-1"].quarantine and fleet.rows["gw-1"].boot == "b", "after a release the boot that speaks next is believed"
    assert fleet.heard("gw-1", "a", 4, NOW + 4).quarantine, "and the other one is a clone again"


def test_a_clone_is_seen_after_the_hub_has_restarted() -> None:
    fleet = Fleet(rows={"gw-1": EdgeRow("gw-1", "offline", "lost", NOW, NOW, "a", 4)})
    assert fleet.heard("gw-1", "b", 4, NOW + 1).quarantine


def test_an_old_boot_that_keeps_speaking_is_a_clone_and_late_messages_are_not() -> None:
    fleet = Fleet()
    fleet.heard("gw-1", "old", 1, NOW)
    fleet.heard("gw-1", "new", 2, NOW + 1)
    for late in range(ALTERNATIONS_MAX - 1):
        assert not fleet.heard("gw-1", "old", 1, NOW + 2 + late).quarantine
    assert fleet.rows["gw-1"].boot == "new"
    assert fleet.heard("gw-1", "old", 1, NOW + 50).quarantine


# -- hierarchy ---------------------------------------------------------------------------------------------------------------


def test_the_tree_places_edges_and_counts_who_is_online() -> None:
    def row(edge: str, state: str = "online", **presence: Any) -> EdgeRow:
        return EdgeRow(edge, state, "", NOW - 5000, NOW - 2000, presence=presence)

    rows = [
        row("gw-2", "offline", region="eu", site="plant", node="rack-1"), row("gw-1", region="eu", site="plant", node="rack-1", devices=["boiler-1", "host"], health="ok"),
        row("gw-3", region="eu", site="mine"), row("gw-4"),
    ]
    random.Random(7).shuffle(rows)
    tree = build_tree(rows, NOW)
    assert (tree["level"], tree["edges"], tree["edges_online"]) == ("cloud", 4, 3)
    regions = {child["name"]: child for child in tree["children"]}
    assert set(regions) == {"eu", "unplaced"} and (regions["eu"]["edges"], regions["eu"]["edges_online"]) == (3, 2)
    plant = next(site for site in regions["eu"]["children"] if site["name"] == "plant")
    [rack] = plant["children"]
    assert [edge["name"] for edge in rack["children"]] == ["gw-1", "gw-2"] and rack["level"] == "node" and rack["edges_online"] == 1
    first = rack["children"][0]
    assert [device["name"] for device in first["children"]] == ["boiler-1", "host"] and first["seen_seconds_ago"] == 2.0 and first["health"] == "ok"
    [default] = regions["unplaced"]["children"]
    assert default["name"] == "default" and default["children"][0]["name"] == "gw-4"
    empty = build_tree([], NOW)
    assert (empty["edges"], empty["edges_online"], empty["children"]) == (0, 0, [])
    assert build_tree([EdgeRow("gw-1")], NOW)["children"][0]["children"][0]["children"][0]["children"][0]["seen_seconds_ago"] is None


# -- desired state -----------------------------------------------------------------------------------------------------------

RULE = {"id": "hot", "on": {"device": "*"}, "if": {"value": "temp", "op": ">", "than": 80}, "then": []}
COMMAND = {"id": "c-1", "device": "fan-1", "name": "on", "args": {}, "expires_ms": NOW + 60_000}


def test_a_change_replaces_its_parts_and_keeps_the_others() -> None:
    first = next_desired("gw-1", None, {"rules": [RULE], "twins": {"fan-1": {"speed": 1}}}, NOW, 0)
    assert first["generation"] == 1 and first["issued_ms"] == NOW and first["spec"]["rules"] == [RULE] and first["v"] == 1
    second = next_desired("gw-1", first, {"twins": {"fan-2": {"speed": 2}}}, NOW + 1, 0)
    assert second["generation"] == 2 and second["spec"]["rules"] == [RULE] and second["spec"]["twins"] == {"fan-2": {"speed": 2}}
    back = next_desired("gw-1", second, {"rules": None}, NOW + 2, 0)
    assert "rules" not in back["spec"] and first["spec"]["rules"] == [RULE], "the document before is not touched"
    assert next_desired("gw-1", back, {"expires_ms": NOW + 9}, NOW + 3, 0)["expires_ms"] == NOW + 9
    assert next_desired("gw-1", back, {}, NOW + 3, 0)["expires_ms"] == 0
    assert parse_desired(back, "gw-1").generation == 3


@settings(max_examples=100, deadline=None)
@given(current=st.integers(1, 2**62), seen=st.integers(0, 2**62), change=st.sampled_from(({}, {"rules": None}, {"twins": {"a": {}}}, {"commands": []})))
def test_the_generation_grows_past_what_anyone_has_seen(current: int, seen: int, change: dict[str, Any]) -> None:
    before = {**next_desired("gw-1", None, {}, NOW, 0), "generation": current}
    after = next_desired("gw-1", before, change, NOW, seen)
    assert after["generation"] > max(current, seen)
    assert next_desired("gw-1", None, change, NOW, seen)["generation"] > seen


@pytest.mark.parametrize(("change", "field"), [
    ({"rule": []}, "rule"), ({"rules": [RULE], "zzz": 1}, "zzz"), ({"rules": "all"}, "spec.rules"), ({"rules": [RULE, 5]}, "spec.rules[1]"),
    ({"models": {}}, "spec.models"), ({"models": [1]}, "spec.models[0]"), ({"twins": []}, "spec.twins"), ({"twins": {"a b": {}}}, "spec.twins"),
    ({"twins": {"fan-1": 3}}, "spec.twins.fan-1"), ({"commands": {}}, "spec.commands"), ({"commands": [7]}, "spec.commands[0]"),
    ({"commands": [COMMAND, {**COMMAND, "device": "no/way", "id": "c-2"}]}, "spec.commands[1].device"), ({"commands": [{**COMMAND, "args": 5}]}, "spec.commands[0].args"),
    ({"commands": [{key: value for key, value in COMMAND.items() if key != "name"}]}, "spec.commands[0].name"), ({"commands": [COMMAND, COMMAND]}, "spec.commands[1].id"),
    ({"commands": [{**COMMAND, "expires_ms": "soon"}]}, "spec.commands[0].expires_ms"), ({"commands": [{**COMMAND, "expires_ms": True}]}, "spec.commands[0].expires_ms"),
    ({"commands": [{**COMMAND, "id": f"c-{number}"} for number in range(MAX_COMMANDS + 1)]}, "commands"), ({"rules": [RULE] * 257}, "spec.rules"),
    ({"models": [{}] * 17}, "spec.models"), ({"expires_ms": -1}, "expires_ms"), ({"expires_ms": "never"}, "expires_ms"),
    ({"twins": {"fan-1": {"text": "x" * 300_000}}}, "spec"),
])
def test_a_bad_part_is_named_and_nothing_is_changed(change: dict[str, Any], field: str) -> None:
    current = next_desired("gw-1", None, {"twins": {"fan-9": {"on": True}}}, NOW, 0)
    kept = repr(current)
    with pytest.raises(ContractError) as caught:
        next_desired("gw-1", current, change, NOW, 0)
    assert caught.value.field == field and caught.value.problem and caught.value.remedy
    assert repr(current) == kept


def test_a_document_that_grows_past_one_message_part_by_part_is_refused() -> None:
    """Each part fits; together they would be a message that every broker refuses, over and over, by closing the hub's connection."""
    first = next_desired("gw-1", None, {"twins": {"fan-1": {"text": "x" * 150_000}}}, NOW, 0)
    with pytest.raises(ContractError, match="262144"):
        next_desired("gw-1", first, {"models": [{"data_b64": "x" * 150_000}]}, NOW, 0)


def test_expired_commands_leave_and_others_stay() -> None:
    hour = 3_600_000
    commands = [{**COMMAND, "id": "waits"}, {**COMMAND, "id": "just", "expires_ms": NOW - hour}, {**COMMAND, "id": "gone", "expires_ms": NOW - hour - 1}]
    current = {**next_desired("gw-1", None, {}, NOW, 0), "spec": {"commands": commands, "twins": {}, "models": []}}
    assert [command["id"] for command in next_desired("gw-1", current, {}, NOW, 0)["spec"]["commands"]] == ["waits", "just"]
    full = [{**COMMAND, "id": f"c-{number}", "expires_ms": NOW - 2 * hour} for number in range(MAX_COMMANDS)] + [COMMAND]
    assert next_desired("gw-1", None, {"commands": full}, NOW, 0)["spec"]["commands"] == [COMMAND]


# -- credit and limits -------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(edges=st.integers(0, 100_000), fill=st.floats(0, 1))
def test_credit_stays_within_its_bounds(edges: int, fill: float) -> None:
    given_ = credit(edges, fill)
    assert given_ == 0 if fill >= QUEUE_HIGH else PER_EDGE_MIN <= given_ <= min(PER_EDGE_MAX, MAX_CREDIT)
    assert credit(edges + 1, fill) <= given_
    assert credit(edges, min(1.0, fill + 0.1)) <= given_
    if fill < QUEUE_HIGH and edges * PER_EDGE_MIN <= TOTAL_RECORDS * (1 - fill / QUEUE_HIGH):
        assert edges * given_ <= TOTAL_RECORDS, "all edges together stay within what the hub commits"


def batch(*seqs: int) -> Batch:
    return Batch("gw-1", "b", 1, "decision", "live", 1, CHAIN_START, 0, 1, 1, max(seqs) + 1, tuple(Record(seq, "b", 0, 0, "rtc", "decision", "{}") for seq in seqs), b"")


def test_one_edge_cannot_make_the_hub_remember_ranges_without_end() -> None:
    """Every second record from the top downwards: each is a range of its own."""
    book = StreamBook()
    book.fresh(batch(10 * MAX_HELD_RANGES))
    for seq in range(9 * MAX_HELD_RANGES, 2, -2):
        book.fresh(batch(seq))
    assert len(book.above) <= MAX_HELD_RANGES
    # It is not stuck: from the lowest gap on everything is taken in, as the hub asks for it.
    assert [record.seq for record in book.fresh(batch(1))] == [1]
    held = book.above.first
    assert held is not None and book.fresh(batch(2)) and len(book.above) <= MAX_HELD_RANGES + 1
