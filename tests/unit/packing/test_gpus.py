"""Pods on GPUs: fragmentation as defined, one kernel and one vectorised form that agree, the bound above what is placed, every placement checked."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler.packing import Bad, devices, gpus, online
from hub.scheduler.packing.fragmentation import fragmentation, gradient, of_node, stranded
from tools.bench.packing_check import check_gpus

MODELS = 3


@st.composite
def clusters(draw: st.DrawFn) -> tuple[gpus.Nodes, gpus.Kinds, np.ndarray, np.ndarray]:
    """Nodes, kinds, arrivals, order of the nodes."""
    rows = draw(st.lists(st.tuples(st.integers(0, 16), st.integers(0, 16), st.integers(0, 4), st.integers(0, MODELS - 1)), min_size=1, max_size=5))
    nodes = gpus.nodes([1000 * row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], [row[3] for row in rows])
    ask = st.one_of(st.just((0, 0)), st.tuples(st.just(1), st.sampled_from([5, 100, 460, 500, 810, 1000])), st.tuples(st.integers(2, 4), st.just(1000)))
    wanted = draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), ask, st.lists(st.booleans(), min_size=MODELS, max_size=MODELS)), min_size=1, max_size=5))
    kinds = gpus.kinds([1000 * one[0] for one in wanted], [one[1] for one in wanted], [one[2][0] for one in wanted], [one[2][1] for one in wanted], [one[3] if one[2][0] else [True] * MODELS for one in wanted])
    arrivals = np.array(draw(st.lists(st.integers(0, len(wanted) - 1), max_size=30)), dtype=np.int64)
    return nodes, kinds, arrivals, np.array(draw(st.permutations(range(len(rows)))), dtype=np.int64)


def verify(nodes: gpus.Nodes, kinds: gpus.Kinds, arrivals: np.ndarray, run: online.Run) -> int:
    """Through the independent checker."""
    machines = [{"cpu_milli": nodes.cpu[n], "memory_mib": nodes.memory[n], "gpu": nodes.gpus[n], "model": f"m{nodes.model[n]}"} for n in range(len(nodes.cpu))]
    pods: list[dict[str, Any]] = [
        {"cpu_milli": kinds.cpu[c], "memory_mib": kinds.memory[c], "num_gpu": kinds.num[c], "gpu_milli": kinds.milli[c], "gpu_spec": "|".join(f"m{m}" for m in range(kinds.access.shape[1]) if kinds.access[c, m]) or "none"} for c in arrivals
    ]
    return check_gpus(machines, pods, run.node.tolist(), run.device.tolist())


@settings(max_examples=80)
@given(clusters(), st.sampled_from([(online.BEST_FIT, False), (online.FGD, False), (online.OURS, False), (online.OURS, True)]))
def test_every_placement_is_feasible_and_below_the_bound(cluster: tuple[Any, ...], how: tuple[int, bool]) -> None:
    nodes, kinds, arrivals, order = cluster
    counts = np.bincount(arrivals, minlength=len(kinds.cpu))
    run = online.place(nodes, kinds, arrivals, order, online.learn(nodes, kinds, counts), how[0], migrate=how[1])
    allocated = verify(nodes, kinds, arrivals, run)
    assert allocated == (run.allocated[-1] if len(arrivals) else 0)
    assert (np.diff(run.allocated) >= 0).all()
    asks = (kinds.num * kinds.milli).astype(float)
    assert allocated <= devices.plan(nodes, kinds, counts.astype(float), asks).bound + 1e-6


@settings(max_examples=40)
@given(clusters())
def test_a_pod_is_dropped_only_where_it_fits_nowhere(cluster: tuple[Any, ...]) -> None:
    nodes, kinds, arrivals, order = cluster
    know = online.learn(nodes, kinds, np.bincount(arrivals, minlength=len(kinds.cpu)))
    run = online.place(nodes, kinds, arrivals, order, know)
    free_cpu, free_memory = nodes.cpu.copy(), nodes.memory.copy()
    device = (np.arange(8) < nodes.gpus[:, None]) * 1000
    for t, c in enumerate(arrivals):
        n = run.node[t]
        fits = (free_cpu >= kinds.cpu[c]) & (free_memory >= kinds.memory[c]) & kinds.access[c, nodes.model] & (((device >= kinds.milli[c]) & (device > 0)).sum(axis=1) >= kinds.num[c])
        assert (n >= 0) == fits.any()
        if n >= 0:
            free_cpu[n] -= kinds.cpu[c]
            free_memory[n] -= kinds.memory[c]
            for d in [d for d in range(8) if run.device[t] >> d & 1] if kinds.milli[c] == 1000 else [run.device[t]] * int(kinds.num[c]):
                device[n, d] -= kinds.milli[c]


@settings(max_examples=40)
@given(clusters())
def test_the_vectorised_gradient_places_as_the_kernel_does(cluster: tuple[Any, ...]) -> None:
    nodes, kinds, arrivals, order = cluster
    know = online.learn(nodes, kinds, np.bincount(arrivals, minlength=len(kinds.cpu)))
    run = online.place(nodes, kinds, arrivals, order, know, online.FGD)
    cpu, memory = nodes.cpu.copy(), nodes.memory.copy()
    device = (np.arange(max(1, nodes.gpus.max())) < nodes.gpus[:, None]) * 1000
    for t, c in enumerate(arrivals):
        scores, pick = gradient(kinds, int(c), cpu, device, nodes.model, know.mix)
        scores[memory < kinds.memory[c]] = -1
        n = int(order[np.argmax(scores[order])])
        assert run.node[t] == (n if scores[n] >= 0 else -1)
        if scores[n] < 0:
            continue
        cpu[n] -= kinds.cpu[c]
        memory[n] -= kinds.memory[c]
        if kinds.milli[c] == 1000:
            device[n, np.flatnonzero(device[n] == 1000)[: kinds.num[c]]] = 0
        elif kinds.num[c]:
            assert run.device[t] == pick[n]
            device[n, pick[n]] -= kinds.milli[c]


@settings(max_examples=60)
@given(clusters(), st.randoms())
def test_fragmentation_of_one_node_is_that_of_all(cluster: tuple[Any, ...], random: Any) -> None:
    nodes, kinds, _, _ = cluster
    mix = gpus.typical(kinds, np.ones(len(kinds.cpu), dtype=np.int64))
    device = np.array([[random.choice([0, 190, 500, 1000]) if d < nodes.gpus[n] else 0 for d in range(4)] for n in range(len(nodes.cpu))])
    cpu = np.array([random.randint(0, int(most)) for most in nodes.cpu])
    one = [of_node(int(cpu[n]), device[n], int(nodes.gpus[n]), int(nodes.model[n]), mix) for n in range(len(cpu))]
    assert fragmentation(cpu, device, nodes.model, mix) == pytest.approx(one)
    assert (np.array(one) <= device.sum(axis=1) + 1e-9).all()


def test_fragmentation_by_hand() -> None:
    """Half the pods take half a GPU and 2 cores, half take none: the latter call all that is free lost."""
    kinds = gpus.kinds([2000, 1000], [0, 0], [1, 0], [500, 0], [[True], [True]])
    mix = gpus.typical(kinds, np.array([50, 50]))
    assert of_node(4000, np.array([300, 700]), 2, 0, mix) == pytest.approx(0.5 * 300 + 0.5 * 1000)
    assert of_node(1999, np.array([300, 700]), 2, 0, mix) == pytest.approx(1000)
    assert stranded(4000, np.array([300, 700]), 2, 8.0) == pytest.approx(500)


def test_typical_pods_are_the_most_frequent() -> None:
    kinds = gpus.kinds([1, 2, 3, 1], [1, 1, 1, 2], [1, 1, 1, 1], [500, 500, 500, 500], [[True]] * 4)
    mix = gpus.typical(kinds, np.array([50, 44, 6, 1]))
    assert sorted(mix.cpu.tolist()) == [1, 2, 3]  # 51 and 44 are 94 % of 101: the third is needed
    assert mix.weight.sum() == pytest.approx(1)


def test_pods_without_gpu_count_where_cpu_is_scarce() -> None:
    """Two GPUs. The GPU pods ask for 4 milli-CPU per milli-GPU, all together for 8; with 20 on the nodes there is plenty, with 8 there is not."""
    kinds = gpus.kinds([4000, 4000], [1, 1], [1, 0], [1000, 0], [[True], [True]])
    counts = np.array([5, 5])
    assert gpus.cpu_per_gpu(gpus.nodes([40_000], [10], [2], [0]), kinds, counts) == pytest.approx(4)
    assert gpus.cpu_per_gpu(gpus.nodes([16_000], [10], [2], [0]), kinds, counts) == pytest.approx(8)
    assert gpus.cpu_per_gpu(gpus.nodes([0], [10], [2], [0]), kinds, counts) == pytest.approx(8)
    assert gpus.cpu_per_gpu(gpus.nodes([40_000], [10], [2], [0]), kinds, np.array([0, 5])) == 0


def test_migration_makes_room() -> None:
    """Two half pods on two GPUs; a whole one comes. Best fit of the halves would have put them together: so they are kept apart by CPU."""
    nodes = gpus.nodes([4000, 9000], [10, 10], [1, 1], [0, 0])
    kinds = gpus.kinds([4000, 5000, 4000], [1, 1, 1], [1, 1, 1], [500, 500, 1000], [[True]] * 3)
    know = online.learn(nodes, kinds, np.array([1, 1, 1]))
    order = np.array([0, 1])
    plain = online.place(nodes, kinds, np.array([0, 1, 2]), order, know, online.BEST_FIT)
    assert plain.node.tolist() == [0, 1, -1]
    moved = online.place(nodes, kinds, np.array([0, 1, 2]), order, know, online.BEST_FIT, migrate=True)
    assert moved.node.tolist() == [1, 1, 0]
    assert moved.moves.tolist() == [0, 0, 1]
    verify(nodes, kinds, np.array([0, 1, 2]), moved)


def test_reserves_leave_scarce_models_to_those_who_accept_no_other() -> None:
    """Free pods come first; there is room for them on the common model."""
    nodes = gpus.nodes([64_000] * 4, [100] * 4, [4] * 4, [0, 1, 1, 1])
    kinds = gpus.kinds([8000, 8000], [1, 1], [1, 1], [1000, 1000], [[True, True], [True, False]])
    arrivals = np.array([0] * 12 + [1] * 4)
    know = online.learn(nodes, kinds, np.array([12, 4]))
    run = online.place(nodes, kinds, arrivals, np.arange(4), know)
    assert (run.node >= 0).all()
    assert (nodes.model[run.node[:12]] == 1).all()


def test_a_reserve_is_used_where_nothing_else_is_left() -> None:
    nodes = gpus.nodes([64_000] * 2, [100] * 2, [2, 2], [0, 1])
    kinds = gpus.kinds([1000, 1000], [1, 1], [1, 1], [1000, 1000], [[True, True], [True, False]])
    run = online.place(nodes, kinds, np.array([0] * 4), np.arange(2), online.learn(nodes, kinds, np.array([2, 2])))
    assert (run.node >= 0).all()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: gpus.nodes([-1], [1], [1], [0]), r"nodes.cpu\[0\] is negative"), (lambda: gpus.nodes([1, 2], [1], [1, 1], [0, 0]), "nodes.memory: give one number per node"),
        (lambda: gpus.kinds([1], [1], [2], [500], [[True]]), r"kinds.milli\[0\]: give 1..1000 with one GPU"), (lambda: gpus.kinds([1], [1], [0], [500], [[True]]), r"kinds.milli\[0\]"),
        (lambda: gpus.kinds([1], [-1], [0], [0], [[True]]), r"kinds.memory\[0\] is negative"), (lambda: gpus.kinds([1], [1], [1], [2000], [[True]]), r"kinds.milli\[0\]"),
    ],
)
def test_bad_nodes_and_pods_are_named(made: Any, said: str) -> None:
    with pytest.raises(Bad, match=said):
        made()


def test_arrivals_of_no_kind_and_orders_of_other_nodes_are_refused() -> None:
    nodes, kinds = gpus.nodes([1], [1], [1], [0]), gpus.kinds([1], [1], [1], [500], [[True]])
    know = online.learn(nodes, kinds, np.array([1]))
    with pytest.raises(Bad, match="arrivals: kinds are 0..0"):
        online.place(nodes, kinds, np.array([1]), np.array([0]), know)
    with pytest.raises(Bad, match="order: give each of the 1 nodes once"):
        online.place(nodes, kinds, np.array([0]), np.array([0, 0]), know)
