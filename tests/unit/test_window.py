"""How many bytes are under way to the broker: over links of every rate, in model time."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.uplink.lanes import RECEIPT_TIMEOUT_MS
from edge_runtime.uplink.window import GOAL_MS, LEAST, START, Window

MOST, BATCH, INFLIGHT = 8 * 131_072, 131_072, 8


@dataclass
class Line:
    """One that carries so many bytes a second, one message after the other, and answers a round trip after each; a sender with more to say than it carries."""

    rate: float
    trip_ms: int
    window: Window = field(default_factory=lambda: Window(MOST))
    now: int = 0
    free: int = 0
    waiting: list[tuple[int, int, int]] = field(default_factory=list)
    took: list[int] = field(default_factory=list)
    carried: int = 0

    def fill(self, batch: int = BATCH) -> None:
        while len(self.waiting) < INFLIGHT and (room := self.window.room()):
            size = min(batch, room)
            self.window.sent(size)
            self.free = max(self.now, self.free) + math.ceil(size * 1000 / self.rate)
            self.waiting.append((size, self.now, self.free + self.trip_ms))

    def answer(self) -> None:
        size, sent, self.now = self.waiting.pop(0)
        self.window.acknowledged(size, sent, self.now)
        self.took.append(self.now - sent)
        self.carried += size

    def run(self, messages: int) -> None:
        for _ in range(messages):
            self.fill()
            self.answer()


@given(st.floats(3.0, 8.5), st.integers(1, 1_000))
def test_a_message_never_waits_for_long_and_the_line_is_used(rate: float, trip_ms: int) -> None:
    """From 8 kbit/s to 2.5 Gbit/s."""
    line = Line(10**rate, trip_ms)
    line.run(20)
    line.took.clear()
    began, line.carried = line.now, 0
    line.run(100)
    assert max(line.took) <= max(2 * GOAL_MS, (2 * LEAST * 1000 / line.rate) + 2 * trip_ms), "a ping behind it is not answered in time"
    fastest = min(line.rate, MOST * 1000 / trip_ms)
    assert line.carried * 1000 / max(1, line.now - began) >= 0.4 * fastest


def test_a_fast_line_is_filled_after_a_few_round_trips() -> None:
    line = Line(1e9, 1)
    line.run(30)
    assert line.window.size == MOST and line.now < 100


def test_a_line_that_becomes_slow_is_given_less_and_one_message_always() -> None:
    line = Line(1e9, 1)
    line.run(30)
    line.rate = 500.0
    line.run(40)
    assert line.window.size <= 2 * LEAST
    for _ in range(20):
        line.window.sent(LEAST)
        line.window.lost()
    assert line.window.room() == line.window.size == LEAST


def test_a_little_that_is_soon_there_says_nothing_of_more() -> None:
    """A day of single readings over a slow line, then all that waited at once."""
    window = Window(MOST)
    for at in range(0, 86_400_000, 1_000):
        window.sent(300)
        window.acknowledged(300, at, at + 500)
    assert window.size == START


def test_what_was_sent_before_a_cut_does_not_cut_again() -> None:
    window = Window(MOST)
    for _ in range(4):
        window.sent(4_000)
    window.acknowledged(4_000, 0, 2 * GOAL_MS)
    cut = window.size
    for late in (3, 4, 5):
        window.acknowledged(4_000, 0, late * GOAL_MS)
    assert cut == window.size == START // 2


@pytest.mark.parametrize("size", [1 << 20])
def test_control_without_it_nothing_is_there_in_time(size: int) -> None:
    """As it was: eight batches at once, whatever the line. At 16 kbit/s the first is acknowledged after a minute."""
    line = Line(2_000.0, 300, Window(size))
    line.window.size = size
    line.fill()
    line.answer()
    assert line.took[0] > 6 * RECEIPT_TIMEOUT_MS
