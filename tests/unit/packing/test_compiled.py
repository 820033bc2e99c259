"""Numba's kernels give exactly what the plain ones give."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import numpy as np
from hub.scheduler.packing import backlog, compiled, gpus, online, pack
from tools.bench.scheduler_batch import generate
random = np.random.default_rng(7)
found = [pack(random.integers(1, 60, size=(40, 3)), np.array([100, 90, 80]), lambda: False, steps_max=300).bins.tolist()]
nodes = gpus.nodes([32000] * 6, [256] * 6, [4] * 6, [0, 0, 1, 1, 1, 1])
kinds = gpus.kinds([4000, 2000, 8000, 1000, 6000], [8, 4, 16, 2, 8], [1, 1, 2, 0, 1], [500, 810, 1000, 0, 190], [[True, True], [True, True], [True, True], [True, True], [True, False]])
arrivals = random.integers(0, 5, size=60)
know = online.learn(nodes, kinds, np.bincount(arrivals, minlength=5))
for policy in (online.BEST_FIT, online.FGD, online.OURS):
    run = online.place(nodes, kinds, arrivals, random.permutation(6), know, policy, migrate=policy == online.OURS)
    found += [run.node.tolist(), run.device.tolist(), run.moves.tolist()]
found.append(backlog(**generate(2, 80, 12, 1.3), out_of_time=lambda: False, pattern_time_over=iter([False] * 3 + [True] * 1000).__next__, repairs_max=20).amount.tolist())
print(compiled.COMPILED)
print(found)
"""


def result(switch: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env={**os.environ, "NOVACRON_NUMBA": switch, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-2:]


@pytest.mark.timeout(900)  # the first run on a machine compiles every kernel: half a minute of processor time, much longer on a busy one
@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed: there is nothing to compare (pip install numba)")
def test_compiled_and_plain_kernels_agree_exactly() -> None:
    compiled, plain = result("on"), result("off")
    assert (compiled[0], plain[0]) == ("True", "False")
    assert compiled[1] == plain[1]
