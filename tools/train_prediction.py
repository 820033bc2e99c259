"""Train the prediction of moves on moves that it makes.

    python -m tools.train_prediction [--runs 800] [--out gpu_migration/models/prediction.json]

Each run is drawn anew (`tools/bench/migration_runs.py`) and made for real. Three parts in four train the three heads (scikit-learn's gradient boosting on the quantile loss, fixed seed), the
fourth gives the scores that the intervals are calibrated with at first. Once for what is asked before a move, and once for what is asked after its first pass.
The machine should have nothing else to do.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gpu_migration import calibration
from gpu_migration.prediction import FEATURES, FORM, HEADS, Outcome
from gpu_migration.trees import LEAF, Trees
from tools.bench.harness import machine
from tools.bench.migration_runs import Row, runs

QUANTILES = dict(zip(HEADS, (0.05, 0.5, 0.95), strict=True))
TREES, DEPTH, LEAST, RATE = 80, 3, 8, 0.08
"""Trees, their depth, rows of a leaf at least, and the share of each that counts: small, so that it does not learn runs by heart."""
SCORES_PART = 4
"""One run in so many is kept from training, for the calibration."""
SEED = 20261128


def fit(rows: list[Outcome], quantile: float) -> Trees:
    """One head."""
    from sklearn.ensemble import GradientBoostingRegressor

    x = np.array([row.features for row in rows])
    y = np.log([row.seconds / row.foreseen for row in rows])
    model = GradientBoostingRegressor(loss="quantile", alpha=quantile, n_estimators=TREES, max_depth=DEPTH, min_samples_leaf=LEAST, learning_rate=RATE, subsample=0.8, random_state=SEED).fit(x, y)
    trees = []
    for (one,) in model.estimators_:
        tree = one.tree_
        trees.append(tuple(
            (int(f) if left != -1 else LEAF, float(t), int(left), int(right), RATE * float(v)) for f, t, left, right, v in
            zip(tree.feature, tree.threshold, tree.children_left, tree.children_right, tree.value[:, 0, 0], strict=True)
        ))
    return Trees(float(model.init_.constant_[0, 0]), tuple(trees), len(FEATURES))


def part(outcomes: list[Outcome]) -> dict[str, Any]:
    """Heads, ranges and scores."""
    training = [row for n, row in enumerate(outcomes) if n % SCORES_PART]
    kept = outcomes[::SCORES_PART]
    heads = {name: fit(training, quantile) for name, quantile in QUANTILES.items()}
    columns = list(zip(*(row.features for row in training), strict=True))
    scores = []
    for row in kept:
        low, middle, high = (heads[name](row.features) for name in HEADS)
        scores.append(calibration.score(float(np.log(row.seconds / row.foreseen)), min(low, middle), max(high, middle)))
    return {
        "heads": {name: head.to_json() for name, head in heads.items()}, "ranges": [[round(min(column), 6), round(max(column), 6)] for column in columns], "scores": [round(one, 6) for one in scores],
    }


def model(rows: list[Row]) -> dict[str, Any]:
    """The whole file, of those that converged and were reckoned to."""
    before = [row.outcome() for row in rows if row.converged and row.before.foresee().converges]
    after = [row.outcome(passed=True) for row in rows if row.converged and row.after is not None and row.after.foresee().converges]
    return {"form": FORM, "features": list(FEATURES), "trained_on": {"machine": machine(), "runs": len(rows)}, "before": part(before), "after_first": part(after)}


def main() -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=800)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "gpu_migration/models/prediction.json")
    options = parser.parse_args()

    def told(number: int, row: Row) -> None:
        if number % 50 == 0:
            print(f"{number} of {options.runs} runs", file=sys.stderr, flush=True)

    told_of = model(runs(options.runs, options.seed, told))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(told_of) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
