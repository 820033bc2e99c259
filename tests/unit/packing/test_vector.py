"""Bins for vectors: always feasible, never below the bound, the bound never above the optimum."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler.packing import Bad, vector
from hub.scheduler.packing.vector import ITEMS_MAX, SIZE_MAX, bound, construct, most_per_bin, pack
from tools.bench.packing_check import check_bins


def never() -> bool:
    return False


@st.composite
def instances(draw: st.DrawFn, items_max: int = 24, dims_max: int = 4) -> tuple[np.ndarray, np.ndarray]:
    dims = draw(st.integers(1, dims_max))
    capacity = draw(st.lists(st.integers(0, 40), min_size=dims, max_size=dims))
    sizes = draw(st.lists(st.tuples(*(st.integers(0, room) for room in capacity)), max_size=items_max))
    return np.array(sizes, dtype=np.int64).reshape(len(sizes), dims), np.array(capacity, dtype=np.int64)


def optimum(sizes: np.ndarray, capacity: np.ndarray) -> int:
    """By trying every assignment of few items."""
    for bins in range(1, len(sizes) + 1):
        for where in product(range(bins), repeat=len(sizes)):
            load = np.zeros((bins, len(capacity)), dtype=np.int64)
            np.add.at(load, list(where), sizes)
            if (load <= capacity).all():
                return bins
    return 0


@settings(max_examples=60)
@given(instances())
def test_every_packing_is_feasible_and_not_below_its_bound(instance: tuple[np.ndarray, np.ndarray]) -> None:
    sizes, capacity = instance
    done = pack(sizes, capacity, never, steps_max=30)
    check_bins(sizes.tolist(), capacity.tolist(), done.bins.tolist(), done.count)
    assert done.bound <= done.count <= max(done.constructed, 0)
    assert len(set(done.bins.tolist())) == done.count


@settings(max_examples=40)
@given(instances(items_max=6, dims_max=3))
def test_the_bound_is_not_above_the_optimum_and_small_instances_are_solved(instance: tuple[np.ndarray, np.ndarray]) -> None:
    sizes, capacity = instance
    best = optimum(sizes, capacity)
    assert bound(sizes, capacity) <= best
    assert pack(sizes, capacity, never, steps_max=400).count == best


@settings(max_examples=30)
@given(instances(), st.randoms())
def test_the_order_of_the_items_changes_neither_the_bound_nor_feasibility(instance: tuple[np.ndarray, np.ndarray], random: st.DataObject) -> None:
    sizes, capacity = instance
    order = np.array(random.sample(range(len(sizes)), len(sizes)), dtype=np.int64)  # type: ignore[attr-defined]
    there, back = pack(sizes[order], capacity, never, steps_max=30), pack(sizes, capacity, never, steps_max=30)
    assert there.bound == back.bound
    check_bins(sizes[order].tolist(), capacity.tolist(), there.bins.tolist(), there.count)


def triplets(bins: int, dims: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three items fill each bin exactly in every dimension: the optimum is `bins`."""
    random = np.random.default_rng(seed)
    capacity = np.full(dims, 100)
    first, second = random.integers(26, 45, size=(bins, dims)), random.integers(26, 45, size=(bins, dims)) - 5
    items = np.concatenate([first, second, capacity - first - second])
    return items[random.permutation(len(items))], capacity


def test_ejection_finds_what_construction_does_not() -> None:
    sizes, capacity = triplets(8, 3, 1)
    done = pack(sizes, capacity, never, steps_max=3000)
    check_bins(sizes.tolist(), capacity.tolist(), done.bins.tolist(), done.count)
    assert done.constructed > done.count
    assert 8 <= done.count <= 9


def test_the_same_seed_and_steps_give_the_same_packing() -> None:
    sizes, capacity = triplets(8, 2, 3)
    first, second = (pack(sizes, capacity, never, steps_max=200, seed=5) for _ in range(2))
    assert first.bins.tolist() == second.bins.tolist()


def test_no_time_gives_the_constructed_packing() -> None:
    sizes, capacity = triplets(8, 2, 3)
    done = pack(sizes, capacity, lambda: True)
    assert done.steps == 0
    assert done.count == done.constructed == construct(sizes, capacity)[1]


def test_a_clock_that_runs_out_ends_it() -> None:
    sizes, capacity = triplets(8, 2, 3)
    left = iter([False] * 4)
    done = pack(sizes, capacity, lambda: next(left, True))
    assert done.steps <= 4 * vector.CHUNK
    check_bins(sizes.tolist(), capacity.tolist(), done.bins.tolist(), done.count)


def test_nothing_to_pack_needs_no_bin() -> None:
    assert pack([], [10], never).count == 0


def test_items_without_size_share_one_bin() -> None:
    done = pack([[0, 0]] * 5, [0, 7], never, steps_max=50)
    assert (done.count, done.bound) == (1, 1)


def test_items_of_half_a_bin_and_more() -> None:
    sizes = np.array([[6], [6], [5], [5], [5]])
    assert bound(sizes, np.array([10])) == 4
    assert most_per_bin(sizes, np.array([10])) == 2


@pytest.mark.parametrize(
    ("sizes", "capacity", "said"),
    [
        ([[1, 2], [3, 50]], [10, 40], r"sizes\[1\]: 50 in dimension 1 is more than a bin's 40"),
        ([[1, -2]], [10, 40], "sizes: -2 is out of range"),
        ([[1, 2, 3]], [10, 40], "sizes: give 2 numbers per item"),
        ([[0.5, 2.0]], [10, 40], "sizes: give whole numbers"),
        ([[1]], [], "capacity: give one number per dimension"),
        ([[1]], [SIZE_MAX + 1], "capacity: .* is out of range"),
    ],
)
def test_bad_input_names_the_item_and_the_remedy(sizes: list[list[float]], capacity: list[int], said: str) -> None:
    with pytest.raises(Bad, match=said):
        pack(sizes, capacity, never)


def test_too_many_items_are_refused() -> None:
    with pytest.raises(Bad, match="give at most"):
        pack(np.zeros((ITEMS_MAX + 1, 1), dtype=np.int64), [1], never)
