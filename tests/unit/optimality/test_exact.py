"""The exact solver against brute force, the checker against planted faults, the judge against a planted bad rule."""

from collections.abc import Iterator
from itertools import combinations, product

import pytest

pytest.importorskip("ortools", reason="the exact solver needs ortools (extra bench)")

from tools.bench.optimality_exact import solve
from tools.bench.optimality_instances import Instance, Node, Workload, draw
from tools.bench.optimality_judge import Broken, as_arrived, by_instance, judge, wilson
from tools.bench.optimality_objective import Seat, faults, fits_alone, greedy, value

LIMIT = 20.0


def _seats(instance: Instance, w: Workload) -> Iterator[Seat | None]:
    yield None
    for index, node in enumerate(instance.nodes):
        if not fits_alone(instance, w, node):
            for devices in combinations(range(node.gpus), w.gpu_count):
                for zone in range(node.zones) if w.numa else (-1,):
                    yield Seat(index, devices, zone)


def _best_by_force(instance: Instance) -> tuple[int, ...]:
    best: tuple[int, ...] | None = None
    for seats in product(*(list(_seats(instance, w)) for w in instance.workloads)):
        placement = {w.id: seat for w, seat in zip(instance.workloads, seats, strict=True) if seat is not None}
        if (best is None or value(instance, placement) > best) and not faults(instance, placement):
            best = value(instance, placement)
    assert best is not None
    return best


@pytest.mark.parametrize("seed", range(12))
def test_exact_optimum_is_what_brute_force_finds(seed: int) -> None:
    instance = draw(seed, most_nodes=3, most_workloads=4)
    found = solve(instance, {}, LIMIT)
    assert found is not None
    assert not faults(instance, found.placement)
    assert value(instance, found.placement) == _best_by_force(instance)


def test_instances_are_repeatable_within_their_limits_and_of_all_kinds() -> None:
    seen: dict[str, int] = {}
    for seed in range(30):
        instance = draw(seed)
        assert draw(seed) == instance
        assert len(instance.nodes) <= 12 and len(instance.workloads) <= 40
        for name, count in instance.features.items():
            seen[name] = seen.get(name, 0) + count
    assert min(seen.values()) > 0, seen


def _two(**of: object) -> Instance:
    nodes = [
        Node("n0", "gpu", "s0", "s0-r0", 8000, 8192, gpus=2, model="T4", gpu_memory=16384, zones=2, labels={"disk": "ssd", "arch": "amd64", "gen": "2"}, price=10),
        Node("n1", "cloud", "s2", "s2-r0", 8000, 8192, labels={"disk": "hdd", "arch": "amd64", "gen": "1"}, taints=(("noisy", "x", "NoSchedule"),), price=20),
    ]
    workloads = [Workload(f"w{i}", "container", "a", 3000, 1024, tenant="t0", **of) for i in range(3)]  # type: ignore[arg-type]
    return Instance(0, nodes, workloads, {}, {})


@pytest.mark.parametrize(("of", "placement", "word"), [
    ({}, {"w0": Seat(0), "w1": Seat(0), "w2": Seat(0)}, "milli-CPU"),
    ({}, {"w0": Seat(1)}, "taint"),
    ({"selector": {"disk": "hdd"}}, {"w0": Seat(0)}, "node affinity"),
    ({"required": (("gen", "Gt", ("2",)),)}, {"w0": Seat(0)}, "node affinity"),
    ({"residency": ("us",)}, {"w0": Seat(0)}, "residency"),
    ({"links": (("s2", 5000, 0),)}, {"w0": Seat(0)}, "round trip"),
    ({"links": (("s2", 0, 600_000),)}, {"w0": Seat(0), "w1": Seat(0)}, "way"),
    ({"numa": True}, {"w0": Seat(0, (), 0), "w1": Seat(0, (), 0)}, "zone 0 is overfull"),
    ({"numa": True}, {"w0": Seat(0)}, "no single zone"),
    ({"gpu_count": 1, "gpu_milli": 600}, {"w0": Seat(0, (1,)), "w1": Seat(0, (1,))}, "device 1 is overfull"),
    ({"gpu_count": 2}, {"w0": Seat(0, (1,))}, "devices"),
    ({"gpu_count": 1, "gpu_models": ("A100",)}, {"w0": Seat(0, (0,))}, "gpu"),
    ({"anti_affinity": (("a", "zone"),)}, {"w0": Seat(0), "w1": Seat(0)}, "apart from"),
    ({"affinity": (("b", "zone"),)}, {"w0": Seat(0)}, "wants to be with b"),
    ({"affinity": (("a", "site"),), "tolerates": ("noisy",)}, {"w0": Seat(0), "w1": Seat(1)}, "wants to be with a"),
    ({"spread": ((1, "zone", True),), "tolerates": ("noisy",)}, {"w0": Seat(0), "w1": Seat(0)}, "skew"),
    ({"gang": "g", "gang_size": 3}, {"w0": Seat(0)}, "gang g: 1 of 3"),
])
def test_checker_catches_a_planted_fault(of: dict[str, object], placement: dict[str, Seat], word: str) -> None:
    found = faults(_two(**of), placement)
    assert any(word in fault for fault in found), found


def test_checker_catches_a_quota_that_is_overdrawn() -> None:
    instance = _two()
    instance.quotas["t0"] = (3000, 10_000)
    assert not faults(instance, {"w0": Seat(0)})
    assert any("quota" in fault for fault in faults(instance, {"w0": Seat(0), "w1": Seat(0)}))


def test_the_optimum_is_judged_optimal_and_a_planted_worst_rule_is_not() -> None:
    instance = draw(2)
    best = solve(instance, {}, LIMIT)
    assert best is not None
    own = judge(instance, best.placement, best, LIMIT)
    assert own.whole and all(own.in_order) and all(own.alone)
    worst = judge(instance, greedy(instance, "worst_cost"), best, LIMIT)
    assert not worst.whole
    assert not all(worst.in_order) and not all(worst.alone)


def test_one_planted_bad_decision_is_the_one_that_is_counted() -> None:
    # Two free nodes, one dearer: the second workload on the dear one is bad whatever else happens, the first on the cheap one is not.
    nodes = [Node("n0", "cloud", "s0", "r", 8000, 8192, price=10), Node("n1", "cloud", "s0", "r", 8000, 8192, price=90)]
    instance = Instance(0, nodes, [Workload(f"w{i}", "vm", f"a{i}", 1000, 1024) for i in range(2)], {}, {})
    best = solve(instance, {}, LIMIT)
    assert best is not None
    verdict = judge(instance, {"w0": Seat(0), "w1": Seat(1)}, best, LIMIT)
    assert verdict.in_order == [True, False] and verdict.alone == [True, False] and verdict.in_order_by_value == [True, True]
    left_out = judge(instance, {"w0": Seat(0)}, best, LIMIT)
    assert left_out.in_order == [True, False] and left_out.in_order_by_value == [True, False]
    assert as_arrived(instance, {"w0": Seat(1), "w1": Seat(0)}, LIMIT) == [False, True]


def test_a_placement_that_breaks_a_constraint_gets_no_verdict() -> None:
    instance = _two()
    best = solve(instance, {}, LIMIT)
    assert best is not None
    with pytest.raises(Broken, match="milli-CPU"):
        judge(instance, {f"w{i}": Seat(0) for i in range(3)}, best, LIMIT)


def test_intervals() -> None:
    low, high = wilson(95, 100)
    assert 0.88 < low < 0.95 < high < 0.98
    assert wilson(0, 0) == (0.0, 1.0) and wilson(10, 10)[1] > 0.999
    low, high = by_instance([[True] * 20] * 5 + [[False] * 20])
    assert low < 0.75 and high == 1.0
