"""A backlog on groups of nodes: always feasible, the bound holds for every placement and any prices."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler.packing import Bad, backlog, prices, problem
from hub.scheduler.packing.backlogs import rounded
from hub.scheduler.packing.patterns import CLASSES_MAX, Patterns, bound
from tools.bench.packing_check import check_groups
from tools.bench.scheduler_batch import check, generate


def never() -> bool:
    return False


@st.composite
def problems(draw: st.DrawFn, classes_max: int = 6, nodes_max: int = 4, count_max: int = 9) -> dict[str, Any]:
    classes, groups, kinds = draw(st.integers(1, classes_max)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    array = lambda rows, top: np.array(draw(st.lists(st.lists(st.integers(0, top), min_size=kinds, max_size=kinds), min_size=rows, max_size=rows)), dtype=np.int64)  # noqa: E731
    return {
        "requests": array(classes, 12), "counts": np.array(draw(st.lists(st.integers(0, count_max), min_size=classes, max_size=classes)), dtype=np.int64),
        "values": np.array(draw(st.lists(st.integers(0, 20), min_size=classes, max_size=classes)), dtype=float), "capacity": array(groups, 30),
        "nodes": np.array(draw(st.lists(st.integers(0, nodes_max), min_size=groups, max_size=groups)), dtype=np.int64),
        "allowed": np.array(draw(st.lists(st.lists(st.booleans(), min_size=groups, max_size=groups), min_size=classes, max_size=classes))),
    }


@settings(max_examples=60)
@given(problems())
def test_every_placement_is_feasible_and_within_the_bound(given_: dict[str, Any]) -> None:
    check(given_, backlog(**given_, out_of_time=never, repairs_max=20))


def optimum(of: dict[str, Any]) -> float:
    """The greatest value, by trying every amount of every class on every node."""
    group = [g for g, many in enumerate(of["nodes"].tolist()) for _ in range(many)]
    cells = [(kind, node) for kind in range(len(of["counts"])) for node in range(len(group)) if of["allowed"][kind][group[node]]]
    best = 0.0
    for amounts in product(*(range(int(of["counts"][kind]) + 1) for kind, _ in cells)):
        done, load = np.zeros(len(of["counts"]), dtype=np.int64), np.zeros((len(group), of["requests"].shape[1]), dtype=np.int64)
        for (kind, node), many in zip(cells, amounts, strict=True):
            done[kind] += many
            load[node] += many * of["requests"][kind]
        if (done <= of["counts"]).all() and all((load[node] <= of["capacity"][group[node]]).all() for node in range(len(group))):
            best = max(best, float(done @ of["values"]))
    return best


@settings(max_examples=30)
@given(problems(classes_max=2, nodes_max=1, count_max=2), st.floats(0, 3))
def test_the_bound_is_not_below_the_optimum_for_the_prices_found_and_any_others(of: dict[str, Any], price: float) -> None:
    best, checked = optimum(of), problem(**of)
    assert prices(checked).bound >= best - 1e-9
    assert bound(checked, np.full(of["capacity"].shape, price)) >= best - 1e-9


def test_what_all_fits_is_all_placed() -> None:
    done = backlog([[2, 1], [1, 3]], [10, 10], [1.0, 1.0], [[10, 20]], [6], [[True], [True]], out_of_time=never, repairs_max=50)
    assert done.value == 20 == pytest.approx(done.bound)


def test_the_more_valuable_class_is_preferred() -> None:
    done = backlog([[5], [5]], [9, 9], [1.0, 3.0], [[10]], [3], [[True], [True]], out_of_time=never, repairs_max=50)
    assert done.amount.sum(axis=0).tolist() == [0, 6]


def test_scarce_groups_are_kept_for_those_who_need_them() -> None:
    """The one class may only use group 1; the other both. Greedy by value would fill group 1 with the other."""
    done = backlog([[5], [5]], [4, 4], [1.0, 1.5], [[10], [10]], [2, 2], [[False, True], [True, True]], out_of_time=never, repairs_max=50)
    assert done.value == pytest.approx(4 * 1.5 + 4 * 1.0)


def after(rounds: int) -> Callable[[], bool]:
    """Says that time is over after so many questions."""
    left = iter(range(rounds))
    return lambda: next(left, None) is None


@pytest.mark.parametrize("seed", [1, 2])
def test_a_generated_backlog_comes_near_its_bound(seed: int) -> None:
    made = generate(seed, 400, 60, 1.25)
    value, most = check(made, backlog(**made, out_of_time=never, pattern_time_over=after(6), repairs_max=250, seed=seed))
    assert value >= 0.9 * most


def test_equal_seeds_give_equal_placements() -> None:
    made = generate(3, 150, 24, 1.2)
    first, second = (backlog(**made, out_of_time=never, pattern_time_over=after(3), repairs_max=20, seed=9) for _ in range(2))
    assert (first.amount == second.amount).all()


def test_the_generator_is_what_it_says() -> None:
    made = generate(1, 10_000, 1_000, 1.25)
    assert made["counts"].sum() == 10_000
    assert made["nodes"].sum() == 1_000
    assert (made["requests"] == generate(1, 10_000, 1_000, 1.25)["requests"]).all()
    asked = (made["counts"][:, None] * made["requests"]).sum(axis=0) / (made["nodes"][:, None] * made["capacity"]).sum(axis=0)
    assert max(asked[:2]) == pytest.approx(1.25, rel=0.01)


def test_rounding_never_asks_for_more_than_there_is() -> None:
    of = problem([[1]], [3], [1.0], [[4]], [2], [[True]])
    amount = rounded(of, Patterns(np.array([[2], [3]]), np.array([0, 0]), np.array([1.0, 0.9]), 1), np.array([0, 0]))
    assert amount.tolist() == [[2], [1]]


@pytest.mark.parametrize("empty", [{"nodes": [0, 0]}, {"counts": [0, 0]}, {"allowed": [[False, False]] * 2}, {"capacity": [[0], [0]]}])
def test_nothing_can_be_placed(empty: dict[str, Any]) -> None:
    of = {"requests": [[5], [7]], "counts": [2, 2], "values": [1.0, 2.0], "capacity": [[10], [20]], "nodes": [1, 1], "allowed": [[True, True]] * 2} | empty
    done = backlog(**of, out_of_time=never, repairs_max=10)
    assert done.value == 0
    assert done.bound == pytest.approx(0)


def test_requests_of_nothing_are_all_placed() -> None:
    assert backlog([[0, 0]], [7], [1.0], [[1, 1]], [2], [[True]], out_of_time=never, repairs_max=10).amount.sum() == 7


def test_no_classes_and_no_groups() -> None:
    assert backlog(np.zeros((0, 2), dtype=int), np.zeros(0, dtype=int), [], [[1, 1]], [2], np.zeros((0, 1)), out_of_time=never).value == 0
    assert backlog([[1, 1]], [2], [1.0], np.zeros((0, 2), dtype=int), np.zeros(0, dtype=int), np.zeros((1, 0)), out_of_time=never).value == 0


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"requests": [[5], [-7]]}, r"requests\[1, 0\] is -7; give 0"), ({"counts": [2, 1 << 50]}, r"counts\[1\] is"), ({"values": [1.0, float("nan")]}, r"values\[1\]: give a finite"),
        ({"values": [1.0, -2.0]}, r"values\[1\]"), ({"requests": [[0.5], [7.0]]}, "requests: give whole numbers"), ({"allowed": [[True, True]]}, "allowed: there are 2 classes, 2 groups"),
        ({"capacity": [[10, 1], [20, 1]]}, "capacity: there are"), ({"nodes": [1]}, "capacity: there are"),
    ],
)
def test_bad_input_names_the_field_and_the_remedy(bad: dict[str, Any], said: str) -> None:
    of = {"requests": [[5], [7]], "counts": [2, 2], "values": [1.0, 2.0], "capacity": [[10], [20]], "nodes": [1, 1], "allowed": [[True, True]] * 2} | bad
    with pytest.raises(Bad, match=said):
        backlog(**of, out_of_time=never)


def test_too_many_classes_are_refused() -> None:
    many = CLASSES_MAX + 1
    with pytest.raises(Bad, match="alike ones merged"):
        problem(np.ones((many, 1), dtype=int), np.ones(many, dtype=int), np.ones(many), [[1]], [1], np.ones((many, 1)))


def test_the_groups_checker_knows_the_nodes() -> None:
    assert check_groups([[1]], [3], [[2]], [[True]], [0, 0], [(0, 0, 2), (0, 1, 1)]) == [3]
