"""When a node is short of something, and who goes: for whatever is seen, in whatever order."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.workloads.pressure import CALM_S, DISK, MEMORY, RELEASE, SETTLE_S, Candidate, Pressure, disk_used, free, priority, requested, victim

CANDIDATES = st.lists(
    st.builds(Candidate, st.sampled_from("abcdef"), st.integers(1, 3), st.integers(-2, 2), st.integers(0, 100), st.integers(0, 100)), max_size=8, unique_by=lambda one: (one.id, one.epoch))


@given(CANDIDATES, st.randoms())
def test_the_least_priority_goes_and_among_those_who_takes_most_beyond_its_request(candidates: list[Candidate], random: Any) -> None:
    chosen = victim(candidates)
    if not candidates:
        assert chosen is None
        return
    assert chosen is not None
    assert chosen.priority == min(one.priority for one in candidates)
    assert all(one.used - one.requested <= chosen.used - chosen.requested for one in candidates if one.priority == chosen.priority)
    shuffled = list(candidates)
    random.shuffle(shuffled)
    assert victim(shuffled) == chosen


@given(st.lists(st.tuples(st.floats(0.1, 20), st.integers(0, 300)), min_size=1, max_size=60))
def test_nobody_goes_while_there_is_enough_nor_before_the_last_one_could_help(looks: list[tuple[float, int]]) -> None:
    pressure, now, ended, low = Pressure({MEMORY: 100}), 0.0, -1e9, -1e9
    for pause, there in looks:
        now += pause
        if there < 100 * RELEASE:
            low = now if there < 100 or pressure.short else low
        what = pressure.look({MEMORY: there}, now)
        if what:
            assert there < 100 and now - ended >= SETTLE_S
            pressure.ended(now)
            ended = now
        elif there < 100:
            assert now - ended < SETTLE_S
        assert bool(pressure.short) == (now - low < CALM_S) or (not pressure.short and low == -1e9), "short until it was calm for long enough"
        assert [one["value"] for one in pressure.taints()] == list(pressure.short) and bool(pressure.refusal()) == bool(pressure.short)


def test_what_is_not_watched_or_not_told_does_not_count() -> None:
    assert Pressure({MEMORY: 0, DISK: 0}).look({MEMORY: 0, DISK: 0}, 1.0) == ""
    pressure = Pressure({MEMORY: 100, DISK: 100})
    assert pressure.look({DISK: 5}, 1.0) == DISK and pressure.short == (DISK,)
    assert pressure.look({}, 1000.0) == "" and pressure.short == (DISK,), "what cannot be read is as it was"
    assert pressure.look({MEMORY: 1, DISK: 500}, 1001.0) == MEMORY and pressure.short == (MEMORY,)
    assert pressure.refusal() == "is short of memory" and pressure.limit(MEMORY) == 100


@pytest.mark.parametrize(("meminfo", "disk", "found"), [
    ("MemTotal: 10 kB\nMemAvailable:    5 kB\n", 7, {MEMORY: 5120, DISK: 7}), ("", None, {}), ("MemAvailable: lots\nMemAvailable\n:\n", 3, {DISK: 3}), ("MemAvailable:\n", None, {}),
])
def test_what_the_system_says_is_read(meminfo: str, disk: int | None, found: dict[str, int]) -> None:
    assert free(meminfo, disk) == found


@given(st.text(max_size=60))
def test_whatever_stands_there_is_no_error(text: str) -> None:
    free(text, None)
    free("MemAvailable:" + text, None)


def test_oddities_of_an_entry_count_as_nothing() -> None:
    assert [priority(one) for one in ({}, {"document": None}, {"document": {"priority": True}}, {"document": {"priority": "9"}}, {"document": {"priority": -3}})] == [0, 0, 0, 0, -3]
    assert [requested(one, MEMORY) for one in ({}, {"requests": None}, {"requests": {"memory": "1Gi"}}, {"requests": {"memory": 5}})] == [0, 0, 0, 5]


def test_what_files_take_is_counted_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/file").write_bytes(bytes(100_000))
    (tmp_path / "in/way-out").symlink_to("/usr")
    assert 100_000 <= disk_used([tmp_path / "in"]) < 200_000
    assert disk_used([tmp_path / "absent"]) == 0 and disk_used([tmp_path / "in"], most=1) < 100_000
