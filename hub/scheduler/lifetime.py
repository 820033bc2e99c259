"""How long a workload will live, in classes, and what that says about where to put it. Pure: arrays in, arrays out.

A model gives *hazards*: for each class the probability that a workload which reached it ends in it. Hazards, not classes, because most of what one learns from is
still running: a workload that is censored at age `a` says something about the classes up to `a` and nothing about the rest.

The rule (after NILAS and LAVA, arXiv 2412.09840): put a workload where it does not prolong the time until its node is empty, among those where it packs best. Exits are
predicted again as workloads outlive their predictions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .rank import Given, View

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BOUNDS_S = (900, 1_800, 3_600, 7_200, 21_600, 86_400)
"""Where one class ends and the next begins, in seconds: 15 min, 30 min, 1 h, 2 h, 6 h, a day. Roughly equal parts of what ends within a day in public VM traces; the last class is open."""

CLASSES = len(BOUNDS_S) + 1

TYPICAL_S = (450, 1_273, 2_546, 5_091, 12_471, 43_200, 259_200)
"""The lifetime that stands for a class: the geometric middle; 3 days for the open one."""

STRETCH_S = (0, 1_800, 7_200, 21_600, 86_400)
"""Steps in which prolonging a node counts: a difference below a step is left to packing. Predictions are no finer than a class."""

MEMORY = 0.05
"""Weight of the newest lifetime in the running means of `Recent`: the last twenty or so count."""

FEATURES = ("log_cores", "gib_per_core", "log_batch", "hour_sin", "hour_cos", "recent_shape", "recent_all")

DAY_S = 86_400


def class_of(seconds: "npt.NDArray[np.int64] | Sequence[int]") -> Ints:
    """The class of each lifetime."""
    return np.searchsorted(np.asarray(BOUNDS_S), np.asarray(seconds), side="right").astype(np.int64)


def chances(hazards: Floats) -> Floats:
    """[n, classes - 1] hazards to [n, classes] probabilities of each class."""
    clipped = np.clip(hazards, 0.0, 1.0)
    alive = np.concatenate([np.ones((len(clipped), 1)), np.cumprod(1.0 - clipped, axis=1)], axis=1)
    result: Floats = alive * np.concatenate([clipped, np.ones((len(clipped), 1))], axis=1)
    return result


def expected_left_s(chance: Floats, age_s: Floats) -> Floats:
    """[n] expected seconds still to live, given that each has reached its age; at least a tenth of the typical length of the class it is in."""
    at = class_of(age_s.astype(np.int64))
    typical = np.asarray(TYPICAL_S, np.float64)
    possible = chance * (np.arange(CLASSES)[None, :] >= at[:, None])
    total = possible.sum(1)
    mean = np.where(total > 1e-12, (possible * typical).sum(1) / np.maximum(total, 1e-12), typical[at])
    result: Floats = np.maximum(mean - age_s, typical[at] / 10)
    return result


def stretch(exit_s: float, node_exit_s: Floats) -> Ints:
    """[node] by how many steps a workload that ends at `exit_s` prolongs each node; an empty node has exit -inf and is prolonged by the whole stay."""
    found: Ints = np.searchsorted(np.asarray(STRETCH_S, np.float64), exit_s - node_exit_s, side="left").astype(np.int64)
    return found


class Recent:
    """Running means of the logarithm of the lifetimes that ended lately, over all and by shape. What is known when a workload arrives."""

    def __init__(self) -> None:
        self._all = float(np.log(TYPICAL_S[2]))
        self._shape: dict[tuple[float, float, int], float] = {}

    def ended(self, cores: float, gib: float, batch: int, seconds: float) -> None:
        """Learn from one that ended."""
        seen = float(np.log(max(60.0, seconds)))
        key = _key(cores, gib, batch)
        self._all += MEMORY * (seen - self._all)
        mine = self._shape.get(key, self._all)
        self._shape[key] = mine + MEMORY * (seen - mine)

    def features(self, cores: float, gib: float, batch: int, at_s: int) -> tuple[float, ...]:
        """One row in the order of `FEATURES`."""
        angle = 2 * np.pi * (at_s % DAY_S) / DAY_S
        return (
            float(np.log2(max(cores, 0.1))), gib / max(cores, 0.1), float(np.log2(max(batch, 1))), float(np.sin(angle)), float(np.cos(angle)),
            self._shape.get(_key(cores, gib, batch), self._all), self._all,
        )


def _key(cores: float, gib: float, batch: int) -> tuple[float, float, int]:
    return cores, gib, int(np.log2(max(batch, 1)))


class Exits:
    """When each node is predicted to be empty. `forget` and `predict` keep it right as workloads end early or outlive their prediction."""

    def __init__(self, nodes: int) -> None:
        self.of_node: Floats = np.full(nodes, -np.inf)
        self._on: list[dict[Any, float]] = [{} for _ in range(nodes)]

    def predict(self, node: int, workload: Any, exit_s: float) -> None:
        """A workload came to the node, or is predicted again."""
        here = self._on[node]
        before = here.get(workload)
        here[workload] = exit_s
        if before is not None and before >= self.of_node[node] > exit_s:
            self.of_node[node] = max(here.values())
        else:
            self.of_node[node] = max(self.of_node[node], exit_s)

    def forget(self, node: int, workload: Any) -> None:
        """It left."""
        here = self._on[node]
        gone = here.pop(workload)
        if gone >= self.of_node[node]:
            self.of_node[node] = max(here.values(), default=-np.inf)

    def outlived(self, now_s: float) -> list[tuple[int, Any]]:
        """(node, workload) of all whose predicted exit has passed."""
        return [(node, workload) for node, here in enumerate(self._on) for workload, exit_s in here.items() if exit_s <= now_s]


def policy(exits: Exits, exit_s: Callable[[View], float | None]) -> Given:
    """The rule as a policy of the ranker, by a name and weight of the caller's choice: nodes that a workload prolongs least are best.

    `exits` is by node index; `exit_s` predicts the end (seconds on the clock of `View.now_ms`) of what is being placed, None: no opinion.
    """

    def steps(view: View) -> Ints | None:
        end = exit_s(view)
        return None if end is None else stretch(end, np.maximum(exits.of_node, view.now_ms / 1000))

    return Given(steps)
