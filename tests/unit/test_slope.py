"""The slope of a series of memory sizes: found where there is one, not found in noise and jumps."""

import math
import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.bench.slope import blocks, theil_sen
from tools.bench.soak import BAR_KIB_PER_HOUR, Samples, leaks

MINUTES = 13


def rss(kib_per_hour: float, seed: int, *, jumps: int = 6) -> Samples:
    """A series as an agent's is: level, noise, arenas that come and go, a leak."""
    draw = random.Random(seed)
    samples, level = Samples(), 44_000.0
    bumps = [(draw.uniform(0, MINUTES * 60), draw.uniform(5, 60), draw.choice((64, 128, 256))) for _ in range(jumps)]
    for second in range(MINUTES * 60):
        arenas = sum(size for start, length, size in bumps if start <= second < start + length)
        samples.rss.append((float(second), level + arenas + draw.gauss(0, 12) + kib_per_hour * second / 3600))
    return samples


def test_a_leak_is_found_and_noise_is_not_taken_for_one() -> None:
    assert not any(leaks(rss(0, seed).slope(0)) for seed in range(30))
    assert all(leaks(rss(2 * BAR_KIB_PER_HOUR, seed).slope(0)) for seed in range(30))
    assert not leaks(rss(BAR_KIB_PER_HOUR / 4, 1).slope(0))


def test_the_interval_holds_the_true_slope_nearly_always() -> None:
    held = [slope.low <= 1500 <= slope.high for slope in (rss(1500, seed, jumps=0).slope(0) for seed in range(60))]
    assert fmean(held) > 0.85
    narrow = rss(1500, 1, jumps=0).slope(0)
    assert narrow.high - narrow.low < 400


def test_what_comes_before_the_warm_part_is_left_out() -> None:
    samples = rss(0, 3)
    samples.rss = [(second, kib - 8_000 * (1 - second / 240) if second < 240 else kib) for second, kib in samples.rss]
    assert not leaks(samples.slope(240)) and leaks(samples.slope(0))


def test_what_fills_up_flattens_by_thirds_and_a_leak_does_not() -> None:
    filling, leaking = Samples(), rss(1500, 2, jumps=0)
    filling.rss = filling.anonymous = [(float(second), 44_000 - 2_000 * math.exp(-second / 150)) for second in range(MINUTES * 60)]
    leaking.anonymous = leaking.rss
    first, _, last = (part["anonymous"] for part in filling.thirds(60))
    assert last < first / 10
    assert all(part["rss"] == pytest.approx(1500, rel=0.3) for part in leaking.thirds(60))
    assert Samples(rss=[(float(second), 1.0) for second in range(100)]).thirds(0) == []


def test_open_files_that_stay_are_counted_and_those_that_pass_are_not() -> None:
    samples = Samples(files=[(float(second), 20.0 + (second % 7 == 0)) for second in range(400)])
    assert samples.files_grown(0) == 0
    samples.files = [(second, count + second // 50) for second, count in samples.files]
    assert samples.files_grown(0) >= 5


@given(st.floats(-1e6, 1e6), st.floats(-1e3, 1e3), st.integers(8, 40))
def test_a_straight_line_has_its_slope(start: float, slope: float, count: int) -> None:
    found = theil_sen([(float(x), start + slope * x) for x in range(count)])
    assert found.low - 1e-6 <= found.value <= found.high + 1e-6 and found.value == pytest.approx(slope, abs=1e-6)


def test_too_few_points_are_refused_and_blocks_are_medians() -> None:
    with pytest.raises(ValueError, match="points: 3"):
        theil_sen([(0, 1), (1, 2), (2, 3)])
    assert blocks([(0, 5), (1, 1), (2, 3), (10, 7)], 10) == [(1, 3), (10, 7)]
