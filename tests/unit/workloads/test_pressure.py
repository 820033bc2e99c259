"""Who ends when a node is short of memory or disk: never more than one for a look, never a second before the figures tell of the first, the least priority first."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.workloads import pressure as pressures
from edge_runtime.workloads.capacity import available
from edge_runtime.workloads.pressure import COOL_S, DISK, MEMORY, Candidate, Pressure, Sample, Thresholds

LIMITS = Thresholds(1000, 1000)
AMOUNT = st.integers(-1, 3000)
CANDIDATES = st.lists(st.builds(Candidate, st.sampled_from("abcdef"), st.integers(1, 2), st.integers(-5, 5), AMOUNT, AMOUNT, AMOUNT, AMOUNT), max_size=6, unique_by=lambda one: one.id)
LOOKS = st.lists(st.tuples(st.builds(Sample, AMOUNT, AMOUNT), CANDIDATES, st.floats(0, 20), st.integers(1, 3)), max_size=40)


def played(looks: Any, state: Pressure) -> None:
    now, last = 0.0, -COOL_S
    for sample, candidates, passed, asks in looks:
        now += passed
        before = state.short
        short = state.look(sample, LIMITS)
        for what, have in ((MEMORY, sample.memory), (DISK, sample.disk)):
            if 0 <= have < 1000:
                assert short
            if short == what:
                assert 0 <= have < (1250 if before == what else 1000)
        ends = [victim for _ in range(asks) if (victim := state.choose(candidates, now)) is not None]
        assert len(ends) <= 1, "one for each look"
        for victim in ends:
            assert short and victim in candidates and now - last >= COOL_S
            assert victim.priority == min(one.priority for one in candidates)
            assert all(victim.used(short) >= one.used(short) for one in candidates if one.priority == victim.priority)
            last = now
        if short and candidates and now - last >= COOL_S:
            raise AssertionError("somebody had to end")


@given(LOOKS)
def test_one_ends_for_a_look_and_it_is_the_right_one(looks: Any) -> None:
    played(looks, Pressure())


class Hasty(Pressure):
    """Ends one with each question."""

    def choose(self, candidates: Any, now_s: float) -> Candidate | None:
        self._quiet_until_s = float("-inf")
        found = super().choose(candidates, now_s)
        self._sample = Sample(0, 0)
        return found


class Unjust(Pressure):
    """Ends the one of the highest priority."""

    def choose(self, candidates: Any, now_s: float) -> Candidate | None:
        found = super().choose(candidates, now_s)
        return found and max(candidates, key=lambda one: one.priority)


@pytest.mark.parametrize("broken", [Hasty, Unjust])
def test_control_a_broken_one_is_caught(broken: type[Pressure]) -> None:
    two = [Candidate("a", 1, 0, 10, 0), Candidate("b", 1, 5, 10, 0)]
    with pytest.raises(AssertionError):
        played([(Sample(10, 10_000), two, 1.0, 2)] * 3, broken())


def test_at_one_priority_the_one_that_is_most_over_its_request_ends_not_the_largest() -> None:
    state = Pressure()
    state.look(Sample(999, 9999), LIMITS)
    large, over = Candidate("large", 1, 0, 5000, 5000), Candidate("over", 1, 0, 300, 100)
    assert state.choose([large, over], 0.0) == over


def test_short_lasts_until_there_is_a_quarter_more_and_what_cannot_be_told_is_never_short() -> None:
    state = Pressure()
    said = [state.look(Sample(memory, -1), LIMITS) for memory in (1000, 999, 1200, 1249, 1250, 1200, -1)]
    assert said == ["", MEMORY, MEMORY, MEMORY, "", "", ""]
    assert Pressure().look(Sample(0, 0), Thresholds(0, 0)) == ""


def test_what_is_available_is_read_of_this_machine(tmp_path: Path) -> None:
    told = available(tmp_path)
    assert told.memory > 0 and told.disk > 0
    assert available(tmp_path / "none", tmp_path) == Sample(-1, -1)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: nonsense\n")
    assert available(tmp_path, tmp_path).memory == -1 and pressures.COOL_S > 2
