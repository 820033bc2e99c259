"""Train the lifetime advisor on the first part of a VM trace; the later part is never looked at here.

    python -m tools.train_lifetime_model --data DIR --out hub/models/lifetime

Gradient trees (scikit-learn, fixed seed) on hazards: one row per VM and class that it reached before the split, "did it end in that class". A VM that still ran at the split
is censored there, whatever the file says about its end. Exported to ONNX, with a manifest that holds the SHA-256, what it was trained on and where the split is.
Whether the advisor is on by default is written by `--decide FILE` from the output of `tools/bench/azure_v1.py --json`.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hub.lifetime_model import SCHEMA, SHIPPED
from hub.scheduler.lifetime import BOUNDS_S, CLASSES, FEATURES, Floats, class_of
from tools.bench.azure_trace import Vm, arrivals_with_features, pairs, read

TRAIN_SHARE = 0.5
"""Part of the trace's time that is trained on."""

CANDIDATES = ((120, 31), (60, 15), (30, 7))
"""(trees, leaves) that are tried; the one with the least log loss on the last fifth of the training time is fitted again on all of it. Every one stays under 1 MB."""

LEAST_ROWS = 1_000
"""Rows of a leaf: batches of a tenant live alike, so that fewer rows may be one tenant's single batch."""

MAX_VMS = 5_000_000
"""VMs read at most: the features of one take 60 bytes."""


def rows(vms: list[Vm], features: Floats, until_s: int) -> "tuple[Floats, np.ndarray[Any, Any]]":
    """One row per VM and class reached before `until_s`, and whether it ended in it."""
    taken = [vm.id for vm in vms if vm.at_s < until_s]
    lived = np.array([min(vms[index].seen_s, until_s - vms[index].at_s) for index in taken])
    ended = np.array([vms[index].ended and vms[index].end_s < until_s for index in taken])
    last = class_of(lived)
    parts, labels = [], []
    for reached in range(CLASSES - 1):
        # A class counts for those that ended in it and for those that outlived it; one censored inside it says nothing about it.
        known = (last > reached) | ((last == reached) & ended)
        index = np.flatnonzero(known)
        parts.append(np.column_stack([features[[taken[i] for i in index]], np.full(len(index), reached)]))
        labels.append(last[index] == reached)
    return np.concatenate(parts), np.concatenate(labels).astype(np.int64)


def train(x: Floats, y: "np.ndarray[Any, Any]", seed: int, trees: int, leaves: int) -> Any:
    """The fitted classifier."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(max_iter=trees, max_leaf_nodes=leaves, min_samples_leaf=LEAST_ROWS, learning_rate=0.1, early_stopping=False, random_state=seed)
    return model.fit(x, y)


def choose(vms: list[Vm], features: Floats, split_s: int, seed: int) -> tuple[int, int]:
    """The size of the model, by the last fifth of the training time alone."""
    from sklearn.metrics import log_loss

    cut_s = int(vms[0].at_s + 0.8 * (split_s - vms[0].at_s))
    x, y = rows(vms, features, cut_s)
    later = [replace(vm, id=index) for index, vm in enumerate(vm for vm in vms if vm.at_s >= cut_s)]
    held_x, held_y = rows(later, features[[vm.id for vm in vms if vm.at_s >= cut_s]], split_s)
    return min(CANDIDATES, key=lambda size: float(log_loss(held_y, train(x, y, seed, *size).predict_proba(held_x)[:, 1])))


def export(model: Any, width: int) -> bytes:
    """As ONNX: input `x` [n, width], output `probabilities` [n, 2]."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    made = to_onnx(model, initial_types=[("x", FloatTensorType([None, width]))], options={id(model): {"zipmap": False}}, target_opset={"": 13, "ai.onnx.ml": 3})
    raw: bytes = made.SerializeToString()
    return raw


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the trace")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--decide", type=Path, metavar="FILE", help="only write on_by_default from the result of tools/bench/azure_v1.py on the same trace")
    options = parser.parse_args()
    manifest_path = options.out / "onnx.json"
    if options.decide:
        result = json.loads(options.decide.read_text().splitlines()[-1])
        manifest = json.loads(manifest_path.read_text())
        manifest["on_by_default"] = bool(result["details"]["advisor_helps"])
        manifest["held_out"] = result["details"]["held_out"]
        manifest_path.write_text(json.dumps(manifest, indent=1) + "\n")
        return 0
    flavour_file, duration_file, censored_s = pairs(options.data)[0]
    vms = list(zip(range(MAX_VMS), read(options.data, flavour_file, duration_file, censored_s, options.seed), strict=False))
    trace = [vm for _, vm in vms]
    split_s = int(trace[0].at_s + TRAIN_SHARE * (censored_s - trace[0].at_s))
    features = arrivals_with_features(trace)
    x, y = rows(trace, features, split_s)
    trees, leaves = choose(trace, features, split_s, options.seed)
    model = train(x, y, options.seed, trees, leaves)
    data = export(model, len(FEATURES) + 1)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "model.onnx").write_bytes(data)
    manifest = {
        "schema_version": SCHEMA, "name": "vm-lifetime", "version": "1", "format": "onnx", "data_file": "model.onnx", "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data),
        "features": list(FEATURES), "bounds_s": list(BOUNDS_S), "on_by_default": False,
        "training": {
            "trace_sha256": hashlib.sha256(duration_file.read_bytes()).hexdigest(), "split_s": split_s, "seed": options.seed, "rows": len(x), "trees": trees, "leaves": leaves, "ended_share": round(float(y.mean()), 4),
            "source": "Azure Public Dataset V1 (Cortez et al., SOSP'17), processed; CC BY 4.0",
        },
    }
    manifest_path.write_text(json.dumps(manifest, indent=1) + "\n")
    print(json.dumps(manifest["training"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
