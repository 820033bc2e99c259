"""Lanes at the edge against the book at the hub, through a channel that loses, doubles and reorders: nothing is lost, nothing counts twice.

The checker is shown to work by planted bugs, each of which it must catch.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.receipts import RECEIPTS
from edge_runtime.contract.records import CHAIN_START, Record, encode_batch, parse_batch
from edge_runtime.contract.streams import STREAMS
from edge_runtime.uplink.backoff import MIN_PAUSE_S, Backoff
from edge_runtime.uplink.lanes import RECEIPT_TIMEOUT_MS, Lanes
from hub.book import GRACE_MS, WANT_AGAIN_MS, BootWatch, RangeSet, StreamBook
from hub.credit import credit


class Edge:
    """An edge's records in memory with the shipped lanes over them."""

    def __init__(self) -> None:
        self.records: dict[str, list[Record]] = {name: [] for name in STREAMS}
        self.chains: dict[str, list[bytes]] = {name: [CHAIN_START] for name in STREAMS}
        self.lanes = Lanes(4)
        self.receipted = dict.fromkeys(STREAMS, 0)
        self.freed_beyond = 0

    def append(self, stream: str, now: int) -> None:
        seq = len(self.records[stream]) + 1
        record = Record(seq, "b1", now, now, "rtc", "decision", jsoncodec.encode({"n": seq}))
        self.records[stream].append(record)
        self.chains[stream].append(record.chain(self.chains[stream][-1]))
        self.lanes.committed(stream, seq, now)

    def link_up(self, now: int) -> None:
        self.lanes.link_up({name: len(found) for name, found in self.records.items()}, dict.fromkeys(STREAMS, 1), now)

    def send(self, now: int) -> list[bytes]:
        out = []
        while (send := self.lanes.next(now)) is not None and len(out) < 20:
            records = self.records[send.stream][send.first - 1 : min(send.last, send.first + 6)]
            last = records[-1].seq
            lane = self.lanes.streams[send.stream]
            history = last + 1 if send.lane == "history" and not send.again else lane.history_next
            out.append(encode_batch(
                edge="e", boot="b1", boot_n=1, stream=send.stream, lane=send.lane, floor=1, floor_chain=CHAIN_START, dropped=0, live=lane.live_from, history=max(1, history),
                next_seq=len(self.records[send.stream]) + 1, records=records, chain=self.chains[send.stream][last],
            ))
            self.lanes.sent(send, last, now)
            self.lanes.acked(send.stream, now, now)
        return out


class Hub:
    """The shipped book over rows in memory."""

    def __init__(self) -> None:
        self.books = {name: StreamBook() for name in STREAMS}
        self.rows: dict[str, dict[int, Record]] = {name: {} for name in STREAMS}
        self.stored_twice = 0

    def take(self, payload: bytes) -> None:
        batch = parse_batch(jsoncodec.decode(payload), "e")
        book = self.books[batch.stream]
        book.told(batch)
        for record in book.fresh(batch):
            self.stored_twice += record.seq in self.rows[batch.stream]
            self.rows[batch.stream][record.seq] = record
        book.check(batch)
        while (ahead := book.reachable()) is not None:
            book.advance([self.rows[batch.stream][seq] for seq in range(ahead[0], ahead[1] + 1)])

    def receipts(self, now: int) -> dict[str, Any]:
        marks = [
            {"stream": name, "upto": book.contiguous, "chain": book.chain.hex(), "top": book.top, "held": book.above.size, "want": book.wants(now)}
            for name, book in self.books.items()
        ]
        return RECEIPTS.parse({"v": 1, "edge": "e", "hub": "h", "boot": "h1", "marks": marks, "credit": 40})


def run(seed: int, *, loss: float = 0.2, plant: Callable[[Edge, Hub], None] = lambda _e, _h: None) -> list[str]:
    """One run with faults, then a healthy end; returns what is wrong."""
    draw = random.Random(seed)
    edge, hub = Edge(), Hub()
    plant(edge, hub)
    now = 1000
    wire: list[bytes] = []
    up = False
    for step in range(400):
        now += draw.randrange(1, 400)
        healthy = step > 250
        if step < 200:
            for _ in range(draw.randrange(4)):
                edge.append(draw.choice(list(STREAMS)), now)
        if not up and (healthy or draw.random() < 0.3):
            edge.link_up(now)
            up = True
            deliver(edge, hub.receipts(now), now)
        elif up and not healthy and draw.random() < 0.08:
            edge.lanes.link_down()
            up = False
            if draw.random() < 0.5:
                wire.clear()
        if up:
            if edge.lanes.silent(now):
                edge.link_up(now)
            edge.lanes.ask_self(now)
            wire += edge.send(now)
        if not healthy:
            draw.shuffle(wire)
        count = len(wire) if healthy else draw.randrange(len(wire) + 1)
        for payload in wire[:count]:
            if healthy or draw.random() > loss:
                hub.take(payload)
                if draw.random() < 0.1:
                    hub.take(payload)
        del wire[:count]
        for book in hub.books.values():
            book.due(now)
        if up and (healthy or draw.random() > loss):
            deliver(edge, hub.receipts(now), now)
    problems = []
    for name in STREAMS:
        book, records = hub.books[name], edge.records[name]
        if book.contiguous != len(records):
            problems.append(f"{name}: the hub has {book.contiguous} of {len(records)}")
        if book.chain != edge.chains[name][book.contiguous]:
            problems.append(f"{name}: the chains differ")
        if book.mismatches:
            problems.append(f"{name}: {book.mismatches} mismatches")
        if sorted(hub.rows[name]) != list(range(1, book.contiguous + 1)):
            problems.append(f"{name}: rows are missing below the mark")
        if edge.receipted[name] > book.contiguous:
            problems.append(f"{name}: freed past the hub's mark")
    if hub.stored_twice:
        problems.append("stored twice")
    return problems


def deliver(edge: Edge, message: dict[str, Any], now: int) -> None:
    for mark in message["marks"]:
        edge.lanes.receipt(mark["stream"], mark["upto"], mark["held"], mark["want"], now)
        edge.receipted[mark["stream"]] = max(edge.receipted[mark["stream"]], mark["upto"])
    edge.lanes.credit = message["credit"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
@example(314782)  # these two stood still for ever: the last message that reached the hub was an old one
@example(336)
def test_nothing_is_lost_and_nothing_counts_twice(seed: int) -> None:
    assert run(seed) == []


def _duplicates_stored(_edge: Edge, hub: Hub) -> None:
    class Broken(StreamBook):
        __slots__ = ()

        def fresh(self, batch: Any) -> list[Record]:
            super().fresh(batch)
            return list(batch.records)

    for book in hub.books.values():
        book.__class__ = Broken


def _history_skips_one(edge: Edge, _hub: Hub) -> None:
    original = edge.lanes.receipt

    def receipt(stream: str, upto: int, held: int, want: list[list[int]], now: int) -> None:
        original(stream, upto, held, [], now)
        lane = edge.lanes.streams[stream]
        if lane.history_next == upto + 1 < lane.live_from:
            lane.history_next += 1

    edge.lanes.receipt = receipt  # type: ignore[method-assign]
    edge.lanes.ask_self = lambda _now: False  # type: ignore[method-assign]


def _forgets_what_is_wanted(edge: Edge, _hub: Hub) -> None:
    original = edge.lanes.receipt
    edge.lanes.receipt = lambda stream, upto, held, want, now: original(stream, upto, held, [], now)  # type: ignore[method-assign]
    edge.lanes.ask_self = lambda _now: False  # type: ignore[method-assign]


@pytest.mark.parametrize("plant", [_duplicates_stored, _history_skips_one, _forgets_what_is_wanted])
def test_a_planted_bug_is_caught(plant: Callable[[Edge, Hub], None]) -> None:
    assert any(run(seed, plant=plant) for seed in range(30))


def test_live_goes_before_history_and_credit_bounds_history() -> None:
    edge = Edge()
    for _ in range(300):
        edge.append("telemetry", 0)
    edge.append("decision", 0)
    edge.link_up(10)
    assert edge.lanes.next(10_000) is None  # nothing is live, and the hub has not said where history starts
    deliver(edge, {"marks": [{"stream": name, "upto": 0, "held": 0, "want": []} for name in STREAMS], "credit": 50}, 20)
    edge.append("telemetry", 30)
    order = []
    while (send := edge.lanes.next(10_000)) is not None:
        order.append((send.stream, send.lane, send.first, send.last))
        edge.lanes.sent(send, send.last, 10_000)
        edge.lanes.acked(send.stream, 10_000, 10_000)
    assert order == [("telemetry", "live", 301, 301), ("decision", "history", 1, 1), ("telemetry", "history", 1, 49)]


def test_a_hub_restored_from_an_older_backup_gets_again_what_is_kept() -> None:
    edge = Edge()
    for _ in range(10):
        edge.append("decision", 0)
    edge.lanes.streams["decision"].receipted = 10
    edge.link_up(0)
    edge.lanes.streams["decision"].floor = 4
    deliver(edge, {"marks": [{"stream": "decision", "upto": 2, "held": 0, "want": []}], "credit": 50}, 0)
    send = edge.lanes.next(10_000)
    assert send is not None and (send.lane, send.first, send.last) == ("history", 4, 10)


def test_a_silent_hub_makes_the_lanes_start_afresh() -> None:
    edge = Edge()
    edge.link_up(0)
    edge.append("decision", 0)
    edge.send(5000)
    assert not edge.lanes.silent(RECEIPT_TIMEOUT_MS - 1)
    assert edge.lanes.silent(RECEIPT_TIMEOUT_MS)


def test_quarantine_stops_sending() -> None:
    edge = Edge()
    edge.link_up(0)
    edge.append("decision", 0)
    edge.lanes.quarantine = "clone"
    assert edge.lanes.next(10_000) is None


@given(st.floats(0.01, 10), st.floats(10, 100), st.integers(0, 1000))
def test_back_off_has_full_jitter_within_its_bounds(base: float, cap: float, seed: int) -> None:
    backoff = Backoff(base, cap, 60, random.Random(seed))
    for number in range(12):
        assert MIN_PAUSE_S <= backoff.next_s() <= max(MIN_PAUSE_S, min(cap, base * 2**number))


def test_back_off_is_forgiven_only_by_a_stable_link() -> None:
    backoff = Backoff(1, 60, 30, random.Random(1))
    for _ in range(5):
        backoff.next_s()
    backoff.link_up(100)
    backoff.link_down(129)
    assert backoff.failures == 5
    backoff.link_up(200)
    backoff.link_down(230)
    assert backoff.failures == 0


@given(st.lists(st.integers(1, 60)), st.integers(0, 60))
def test_ranges_against_a_set(values: list[int], drop: int) -> None:
    ranges, oracle = RangeSet(), set()
    for value in values:
        assert ranges.add(value) == (value not in oracle)
        oracle.add(value)
    ranges.drop_upto(drop)
    oracle = {value for value in oracle if value > drop}
    assert {value for value in range(1, 61) if value in ranges} == oracle
    assert ranges.size == len(oracle) and ranges.top == max(oracle, default=0)
    missing = {value for first, last in ranges.gaps(drop) for value in range(first, last + 1)}
    assert missing == {value for value in range(drop + 1, ranges.top + 1) if value not in oracle}
    assert RangeSet.of(ranges.to_json()).to_json() == ranges.to_json()


def _one(seq: int, *, floor: int = 1, floor_chain: bytes = CHAIN_START, history: int = 1, live: int = 1) -> Any:
    record = Record(seq, "b", 1, 1, "rtc", "decision", "{}")
    return parse_batch(jsoncodec.decode(encode_batch(
        edge="e", boot="b", boot_n=1, stream="decision", lane="live", floor=floor, floor_chain=floor_chain, dropped=0, live=live, history=history, next_seq=seq + 1, records=[record], chain=b"",
    )), "e")


def test_a_gap_is_asked_for_once_it_is_old_enough_and_was_sent() -> None:
    book = StreamBook()
    batch = _one(10, live=8)
    book.told(batch)
    book.fresh(batch)
    assert book.wants(0) == []
    assert book.wants(GRACE_MS) == [[8, 9]]  # 1 to 7 is history that the edge has not sent yet
    assert book.wants(GRACE_MS + 1) == []
    assert book.wants(GRACE_MS + WANT_AGAIN_MS) == [[8, 9]]


def test_a_floor_moves_the_mark_and_counts_what_is_gone() -> None:
    book = StreamBook()
    batch = _one(10, floor=10, floor_chain=b"x" * 16)
    book.told(batch)
    book.fresh(batch)
    assert (book.contiguous, book.gone, book.base) == (10, 9, 10)


def test_two_boots_with_one_number_are_a_clone_and_a_restart_is_not() -> None:
    watch = BootWatch()
    assert not watch.heard("a", 1, 0)
    assert not watch.heard("b", 2, 1)
    assert "two machines" in watch.heard("c", 2, 2)
    late = BootWatch("b", 2)
    assert not any(late.heard("a", 1, now) for now in range(8))
    assert any(late.heard("a", 1, now) for now in range(8))


def test_credit_is_shared_and_stops_when_the_queue_fills() -> None:
    assert credit(1, 0.0) >= credit(10, 0.0) >= credit(1000, 0.0) > 0
    assert credit(1, 0.5) == 0
