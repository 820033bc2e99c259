"""How large a batch may be, without a broker."""

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.uplink.room import AGAIN_MS, LEAST, LOST_AFTER, Room

MOST = 131_072


def ended(room: Room, *sizes: int, acknowledged: tuple[int, ...] = (), too_large: bool = False, told: int = 0, now: int = 0) -> int:
    """A connection at which these were sent, and its end."""
    room.begin(told)
    for size in sizes:
        room.sent(size)
    for size in acknowledged:
        room.acknowledged(size)
    return room.lost(too_large, now)


def test_what_the_broker_says_holds_for_its_connection() -> None:
    room = Room(MOST)
    room.begin(20_000)
    assert room.most(0) == 20_000
    room.begin(0)
    assert room.most(0) == 0


def test_a_reason_is_enough_and_without_one_it_takes_three_connections() -> None:
    room = Room(MOST)
    assert ended(room, 100_000, too_large=True) == 100_000 and room.most(0) == 50_000
    room = Room(MOST)
    assert [ended(room, 100_000) for _ in range(LOST_AFTER)] == [0] * (LOST_AFTER - 1) + [100_000] and room.most(0) == 50_000


def test_a_line_that_breaks_is_no_limit() -> None:
    """What is as large has gone through, nothing was under way, or it is small."""
    room = Room(MOST)
    for _ in range(10):
        assert ended(room, 100_000, 100_000, acknowledged=(100_000,)) == 0
        assert ended(room, 100_000, acknowledged=(100_000,)) == ended(room) == ended(room, LEAST) == 0
    assert room.most(0) == 0
    for _ in range(LOST_AFTER - 1):
        ended(room, 100_000)
    ended(room, 100_000, acknowledged=(100_000,))
    assert ended(room, 100_000) == 0, "not in a row"


def test_a_limit_that_was_found_is_tried_again_after_an_hour() -> None:
    room = Room(MOST)
    ended(room, 60_000, too_large=True, now=5)
    assert [room.most(now) for now in (5, AGAIN_MS, AGAIN_MS + 5, AGAIN_MS + 6, 2 * AGAIN_MS + 5, 3 * AGAIN_MS + 5)] == [30_000, 30_000, 60_000, 60_000, 120_000, 0]


@given(st.integers(LEAST, MOST), st.booleans())
def test_the_limit_of_any_broker_is_found(limit: int, says: bool) -> None:
    """By a broker that ends the connection at what is larger, with a link that sends as much as it may."""
    room = Room(MOST)
    for _ in range(40):
        size = room.most(0) or MOST
        if size <= limit or size <= LEAST:
            break
        ended(room, 200, size, acknowledged=(200,), too_large=says)
    assert min(limit // 2, LEAST) <= size <= max(limit, LEAST)
