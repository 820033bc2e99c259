"""The portable evaluator: dense networks and tree ensembles from JSON, in plain Python, for machines that have no other engine.

    {"kind": "mlp", "layers": [{"weights": [[...]], "bias": [...], "activation": "relu"}]}      weights[output][input]
    {"kind": "trees", "aggregate": "sum" | "mean", "base": 0.0,
     "trees": [{"feature": [..], "threshold": [..], "left": [..], "right": [..], "value": [..]}]}  feature -1 marks a leaf
"""

import array
import json
import math
from collections.abc import Sequence
from typing import Any

from .manifest import ModelError

MAX_LAYERS = 16
MAX_WEIGHTS = 1_000_000
"""Multiplications of one evaluation: about 25 ms in plain Python, more has no place on a machine without an engine."""
MAX_TREES = 1024
MAX_NODES = 65_536
ACTIVATIONS = ("linear", "relu", "tanh", "sigmoid", "softmax")


class PortableEngine:
    """Evaluates one portable model."""

    name = "portable"

    def __init__(self, data: bytes, inputs: int) -> None:
        try:
            value: Any = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ModelError("data", f"is not JSON ({error})", "export the model with the training script") from None
        if not isinstance(value, dict) or value.get("kind") not in ("mlp", "trees"):
            raise ModelError("data.kind", "is not mlp or trees", "export the model with the training script")
        self._layers: list[tuple[list[array.array[float]], array.array[float], str]] = []
        self._trees: list[dict[str, list[Any]]] = []
        if value["kind"] == "mlp":
            self._read_layers(value.get("layers"), inputs)
        else:
            self._read_trees(value, inputs)

    def _read_layers(self, layers: object, width: int) -> None:
        if not isinstance(layers, list) or not 1 <= len(layers) <= MAX_LAYERS:
            raise ModelError("data.layers", f"is not a list of 1 to {MAX_LAYERS} layers", "export a smaller model")
        total = 0
        for index, layer in enumerate(layers):
            field = f"data.layers[{index}]"
            weights = layer.get("weights") if isinstance(layer, dict) else None
            bias = layer.get("bias") if isinstance(layer, dict) else None
            if not isinstance(weights, list) or not isinstance(bias, list) or len(weights) != len(bias) or not weights:
                raise ModelError(field, "has no weights and bias of one length", "export the model with the training script")
            if layer.get("activation") not in ACTIVATIONS:
                raise ModelError(f"{field}.activation", f"{str(layer.get('activation'))[:20]!r} is unknown", f"use {', '.join(ACTIVATIONS)}")
            rows = []
            for row in weights:
                if not isinstance(row, list) or len(row) != width:
                    raise ModelError(f"{field}.weights", f"a row has not {width} numbers", "the model's shape must fit the manifest's inputs")
                rows.append(_floats(row, f"{field}.weights"))
            total += len(rows) * width
            if total > MAX_WEIGHTS:
                raise ModelError("data.layers", f"has over {MAX_WEIGHTS} weights", "export a smaller model")
            width = len(rows)
            self._layers.append((rows, _floats(bias, f"{field}.bias"), layer["activation"]))

    def _read_trees(self, value: dict[str, Any], inputs: int) -> None:
        trees = value.get("trees")
        if not isinstance(trees, list) or not 1 <= len(trees) <= MAX_TREES:
            raise ModelError("data.trees", f"is not a list of 1 to {MAX_TREES} trees", "export a smaller model")
        if value.get("aggregate") not in ("sum", "mean"):
            raise ModelError("data.aggregate", "is not sum or mean", "say how the trees are combined")
        self._mean = value["aggregate"] == "mean"
        self._base = float(_floats([value.get("base", 0.0)], "data.base")[0])
        nodes = 0
        for index, tree in enumerate(trees):
            field = f"data.trees[{index}]"
            parts = [tree.get(name) if isinstance(tree, dict) else None for name in ("feature", "threshold", "left", "right", "value")]
            if not all(isinstance(part, list) and part and len(part) == len(parts[0] or ()) for part in parts):
                raise ModelError(field, "has not five lists of one length", "export the model with the training script")
            feature, threshold, left, right, leaf = parts
            nodes += len(feature)  # type: ignore[arg-type]
            if nodes > MAX_NODES:
                raise ModelError("data.trees", f"has over {MAX_NODES} nodes", "export a smaller model")
            for node in range(len(feature)):  # type: ignore[arg-type]
                if type(feature[node]) is not int or not -1 <= feature[node] < inputs:  # type: ignore[index]
                    raise ModelError(f"{field}.feature", f"node {node} names no input", "the model's shape must fit the manifest's inputs")
                # Children stand after their parent, so that every walk ends.
                if feature[node] >= 0 and not all(type(side[node]) is int and node < side[node] < len(feature) for side in (left, right)):  # type: ignore[index,arg-type]
                    raise ModelError(f"{field}.left", f"node {node} has a child before it or none", "order each tree from its root")
            self._trees.append({"feature": feature, "threshold": list(_floats(threshold, field)), "left": left, "right": right, "value": list(_floats(leaf, field))})  # type: ignore[dict-item]

    def run(self, vector: Sequence[float]) -> list[float]:
        """See `Engine.run`."""
        if self._trees:
            total = sum(_walk(tree, vector) for tree in self._trees)
            return [self._base + (total / len(self._trees) if self._mean else total)]
        values: list[float] = list(vector)
        for rows, bias, activation in self._layers:
            made = []
            for row, offset in zip(rows, bias, strict=True):
                total = offset
                for weight, value in zip(row, values, strict=True):
                    total += weight * value
                made.append(total)
            values = _activate(made, activation)
        return values

    def close(self) -> None:
        """Nothing to free."""


def _floats(values: Any, field: str) -> "array.array[float]":
    try:
        made = array.array("f", values)
    except (TypeError, OverflowError):
        raise ModelError(field, "holds something that is not a number", "export the model with the training script") from None
    if not all(math.isfinite(number) for number in made):
        raise ModelError(field, "holds a number that is not finite", "export the model with the training script")
    return made


def _walk(tree: dict[str, list[Any]], vector: Sequence[float]) -> float:
    node = 0
    while tree["feature"][node] >= 0:
        node = tree["left"][node] if vector[tree["feature"][node]] <= tree["threshold"][node] else tree["right"][node]
    return float(tree["value"][node])


def _activate(values: list[float], activation: str) -> list[float]:
    if activation == "relu":
        return [value if value > 0 else 0.0 for value in values]
    if activation == "tanh":
        return [math.tanh(value) for value in values]
    if activation == "sigmoid":
        return [1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value)) for value in values]
    if activation == "softmax":
        top = max(values)
        powers = [math.exp(value - top) for value in values]
        total = sum(powers)
        return [power / total for power in powers]
    return values
