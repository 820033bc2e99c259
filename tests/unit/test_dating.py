"""Records of a clock that was wrong get the right date once it is known, and what the edge wrote stays as it was."""

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract.records import Record
from hub.dating import MAX_CLOCKS, RANK, BootClock, Clocks, date

TRUE_OFFSET = 1_795_500_000_000
STEPS = st.lists(st.tuples(st.integers(0, 10**7), st.sampled_from(["unsynced", "rtc", "ntp"]), st.integers(-(10**9), 10**9)), min_size=1, max_size=30)


def record(seq: int, mono: int, quality: str, error: int) -> Record:
    """A record whose wall time is right under ntp, off by up to a minute under rtc and anything under unsynced."""
    off = {"ntp": 0, "rtc": error % 60_000, "unsynced": error}[quality]
    return Record(seq, "b", mono, mono + TRUE_OFFSET + off, quality, "reading", "{}")


@given(STEPS, st.randoms())
def test_after_one_good_time_every_record_of_the_boot_is_dated_right(steps: list[tuple[int, str, int]], draw: object) -> None:
    mono, records = 0, []
    for seq, (step, quality, error) in enumerate(steps, 1):
        mono += step
        records.append(record(seq, mono, quality, error))
    clocks = Clocks()
    arrived = list(records)
    draw.shuffle(arrived)  # type: ignore[attr-defined] - live before history: any order
    for one in arrived:
        clocks.observe("e", one)
    best = max(RANK[one.quality] for one in records)
    for one in records:
        when, quality = date(one, clocks.get("e", "b"))
        assert RANK[quality] == max(best, RANK[one.quality]) or best == 0
        if quality == "ntp":
            assert when == one.mono_ms + TRUE_OFFSET
        elif quality == "rtc":
            assert abs(when - one.mono_ms - TRUE_OFFSET) < 60_000
        else:
            assert when == one.wall_ms


def test_a_boot_says_nothing_of_another_and_a_worse_time_nothing_of_a_better() -> None:
    clocks = Clocks()
    assert clocks.observe("e", Record(1, "one", 10, 1_000, "rtc", "reading", "{}")) == BootClock("e", "one", "rtc", 990)
    assert clocks.observe("e", Record(2, "one", 20, 5_000, "rtc", "reading", "{}")) is None
    assert clocks.observe("e", Record(3, "two", 10, 7, "unsynced", "reading", "{}")) is None
    assert clocks.get("e", "two") is None and clocks.get("other", "one") is None
    assert date(Record(4, "one", 30, 9_999, "ntp", "reading", "{}"), clocks.get("e", "one")) == (9_999, "ntp")
    assert date(Record(5, "one", 30, 9_999, "sundial", "reading", "{}"), clocks.get("e", "one")) == (1_020, "rtc")


def test_memory_is_bounded() -> None:
    clocks = Clocks()
    for number in range(MAX_CLOCKS + 10):
        clocks.observe("e", Record(1, f"b{number}", 0, 1, "ntp", "reading", "{}"))
    assert clocks.get("e", "b0") is None and clocks.get("e", f"b{MAX_CLOCKS + 9}") is not None
