"""The checker must catch what it is there for: each rule broken once."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hub.scheduler.packing import backlog
from tools.bench.packing_check import Wrong, check_bins, check_gpus, check_groups
from tools.bench.scheduler_batch import check

NODES = [{"cpu_milli": 8000, "memory_mib": 1000, "gpu": 2, "model": "T4"}, {"cpu_milli": 8000, "memory_mib": 1000, "gpu": 0, "model": "G2"}]


def pod(cpu: int = 1000, memory: int = 10, num: int = 0, milli: int = 0, spec: str = "") -> dict[str, Any]:
    return {"cpu_milli": cpu, "memory_mib": memory, "num_gpu": num, "gpu_milli": milli, "gpu_spec": spec}


@pytest.mark.parametrize(("bins", "count", "said"), [([0, 0, 1], 2, "bin 0 holds 12 of 10"), ([0, 1, 2], 2, "item 2 is in bin 2"), ([0, 1], 2, "3 items, but 2"), ([0, 1, -1], 2, "item 2 is in bin -1")])
def test_bins(bins: list[int], count: int, said: str) -> None:
    check_bins([[6], [6], [4]], [10], [0, 1, 1], 2)
    with pytest.raises(Wrong, match=said):
        check_bins([[6], [6], [4]], [10], bins, count)


@pytest.mark.parametrize(
    ("placed", "said"),
    [([(0, 0, 3)], "node 0 holds 6 of 5"), ([(0, 0, 1), (0, 1, 1), (0, 2, 2)], "placed 4 times, asked for 3"), ([(1, 0, 1)], "class 1 is on node 0, of group 0, where it is not allowed"), ([(0, 0, -1)], "-1 of it")],
)
def test_groups(placed: list[tuple[int, int, int]], said: str) -> None:
    about = ([[2], [1]], [3, 1], [[5], [5]], [[True, True], [False, True]], [0, 1, 1])
    assert check_groups(*about, [(0, 0, 2), (0, 2, 1), (1, 1, 1)]) == [3, 1]
    with pytest.raises(Wrong, match=said):
        check_groups(*about, placed)


@pytest.mark.parametrize(
    ("pods", "nodes", "devices", "said"),
    [
        ([pod(5000), pod(5000)], [0, 0], [0, 0], "2000 milli-CPU"), ([pod(memory=900), pod(memory=200)], [0, 0], [0, 0], "100 MiB"),
        ([pod(num=1, milli=600), pod(num=1, milli=600)], [0, 0], [1, 1], "device 1 is 200 milli-GPU over"), ([pod(num=1, milli=600)], [1], [0], "there is no device 0"),
        ([pod(num=2, milli=1000)], [0], [1], "1 devices instead of 2"), ([pod(num=1, milli=1000), pod(num=1, milli=100)], [0, 0], [2, 1], "device 1 is 100 milli-GPU over"),
        ([pod(num=1, milli=500, spec="V100|P100")], [0], [0], "model T4 is not of"),
    ],
)
def test_gpus(pods: list[dict[str, Any]], nodes: list[int], devices: list[int], said: str) -> None:
    with pytest.raises(Wrong, match=said):
        check_gpus(NODES, pods, nodes, devices)


def test_gpus_counts_what_is_allocated() -> None:
    assert check_gpus(NODES, [pod(num=1, milli=400, spec="T4"), pod(num=1, milli=600), pod(), pod(num=1, milli=1000), pod(9999)], [0, 0, 1, 0, -1], [0, 0, 0, 2, 0]) == 2000


def test_a_backlog_that_says_more_than_it_has_is_caught() -> None:
    of: dict[str, Any] = {"requests": [[5], [7]], "counts": [2, 2], "values": [1.0, 2.0], "capacity": [[10], [20]], "nodes": [1, 1], "allowed": [[True, True]] * 2}
    arrays = {name: np.array(part) for name, part in of.items()}
    done = backlog(**of, out_of_time=lambda: False, repairs_max=5)
    check(arrays, done)
    amount = done.amount.copy()
    amount[0] += 5
    for wrong in (replace(done, amount=amount), replace(done, value=done.value + 1), replace(done, bound=done.bound - 1), replace(done, prices=replace(done.prices, resource=done.prices.resource - 1))):
        with pytest.raises(Wrong):
            check(arrays, wrong)
