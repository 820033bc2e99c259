"""Boosted regression trees, read from JSON and evaluated; nothing of what they were trained with is needed. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ModelError

NODES_MOST = 1 << 16
"""Nodes of a model in all: one that is larger is not ours."""
LEAF = -1
"""In place of a feature's number."""


@dataclass(frozen=True, slots=True)
class Trees:
    """`start` plus the leaves that are reached. Each tree is a list of (feature, threshold, left, right, value): left where the feature is at most the threshold."""

    start: float
    trees: tuple[tuple[tuple[int, float, int, int, float], ...], ...]
    features: int

    def __call__(self, row: Sequence[float]) -> float:
        """The value for a row of `features` numbers."""
        total = self.start
        for tree in self.trees:
            at = 0
            while tree[at][0] != LEAF:
                feature, threshold, left, right, _ = tree[at]
                at = left if row[feature] <= threshold else right
            total += tree[at][4]
        return total

    @classmethod
    def from_json(cls, told: Any, features: int) -> "Trees":
        """Raises ModelError where it is not a forest whose every path ends: a child comes after its parent."""
        try:
            trees = tuple(tuple((int(f), float(t), int(left), int(right), float(v)) for f, t, left, right, v in tree) for tree in told["trees"])
            start = float(told["start"])
        except (KeyError, TypeError, ValueError):
            raise ModelError("prediction: the model is not in the form of this version; train it again (python -m tools.train_prediction)") from None
        if sum(map(len, trees)) > NODES_MOST:
            raise ModelError(f"prediction: the model has more than {NODES_MOST} nodes; train it again with fewer")
        for tree in trees:
            for number, (feature, _, left, right, _) in enumerate(tree):
                if feature != LEAF and not (0 <= feature < features and number < left < len(tree) and number < right < len(tree)):
                    raise ModelError("prediction: a tree of the model leads nowhere; train it again (python -m tools.train_prediction)")
            if not tree:
                raise ModelError("prediction: a tree of the model is empty; train it again (python -m tools.train_prediction)")
        return cls(start, trees, features)

    def to_json(self) -> dict[str, Any]:
        """Numbers to six digits."""
        return {"start": round(self.start, 6), "trees": [[[f, float(f"{t:.6g}"), left, right, float(f"{v:.6g}")] for f, t, left, right, v in tree] for tree in self.trees]}
