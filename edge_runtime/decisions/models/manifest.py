"""What a model is: its manifest, validated. The manifest travels with the model and is part of what is trusted by hash."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

MAX_MANIFEST_BYTES = 65_536
MAX_MODEL_BYTES = 32 << 20
"""Largest model an edge takes: larger ones do not fit its memory promise."""
MAX_INPUTS = 256
MAX_OUTPUTS = 256
FORMATS = ("onnx", "tflite", "portable")
TRANSFORMS = ("identity", "log1p")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}\Z")
_SHA = re.compile(r"[0-9a-f]{64}\Z")


class ModelError(ValueError):
    """A model that is refused: `field`, `problem`, `remedy`; the last good one stays."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field = field
        self.problem = problem
        self.remedy = remedy


class ModelInputError(ModelError):
    """Values that a model cannot be asked with (a feature is missing or not finite)."""


class ModelEngineMissing(ModelError):
    """The engine for this format is not installed here; the remedy names the package."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One input: x' = (transform(x) - mean) / scale."""

    name: str
    mean: float = 0.0
    scale: float = 1.0
    transform: str = "identity"


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """A validated manifest.

    Attributes:
        sha256, size_bytes: of the model's data.
        inputs: features in the order of the model's input vector.
        output: `vector` (the outputs as they are) or `reconstruction_mse` (mean squared difference between output and input, one number).
        outputs: how many numbers the model itself gives.
        threshold: what the trainer recommends to compare with; rules may use another.
    """

    name: str
    version: str
    format: str
    sha256: str
    size_bytes: int
    inputs: tuple[Feature, ...]
    output: str
    outputs: int
    threshold: float | None
    data_file: str


def read_manifest(raw: bytes) -> ModelManifest:
    """A manifest from its JSON; raises `ModelError` naming the field."""
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ModelError("manifest", f"{len(raw)} bytes are over {MAX_MANIFEST_BYTES}", "send the model's manifest, not its data")
    try:
        value: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError("manifest", f"is not JSON ({error})", "send one JSON object") from None
    if not isinstance(value, dict):
        raise ModelError("manifest", f"is {type(value).__name__}, not an object", "send one JSON object")
    if value.get("schema_version") != 1:
        raise ModelError("schema_version", f"{str(value.get('schema_version'))[:20]!r} is not known", "use 1")
    name, format_ = value.get("name"), value.get("format")
    if not isinstance(name, str) or not _NAME.match(name):
        raise ModelError("name", f"{str(name)[:40]!r} is not a name", "use 1 to 64 letters, digits, _ . : -")
    if format_ not in FORMATS:
        raise ModelError("format", f"{str(format_)[:20]!r} is unknown", f"use {', '.join(FORMATS)}")
    sha, size = value.get("sha256"), value.get("size_bytes")
    if not isinstance(sha, str) or not _SHA.match(sha):
        raise ModelError("sha256", "is not 64 hexadecimal digits", "give the SHA-256 of the model's data")
    if type(size) is not int or not 0 < size <= MAX_MODEL_BYTES:
        raise ModelError("size_bytes", f"{str(size)[:20]} is not between 1 and {MAX_MODEL_BYTES}", "give the size of the model's data")
    inputs = value.get("inputs")
    if not isinstance(inputs, list) or not 1 <= len(inputs) <= MAX_INPUTS:
        raise ModelError("inputs", f"is not a list of 1 to {MAX_INPUTS} features", "name the features in order")
    output = value.get("output")
    kind = output.get("kind") if isinstance(output, dict) else None
    size_of = output.get("size") if isinstance(output, dict) else None
    if kind not in ("vector", "reconstruction_mse"):
        raise ModelError("output.kind", f"{str(kind)[:20]!r} is unknown", "use vector or reconstruction_mse")
    if kind == "reconstruction_mse":
        size_of = len(inputs)
    if type(size_of) is not int or not 1 <= size_of <= MAX_OUTPUTS:
        raise ModelError("output.size", f"{str(size_of)[:20]} is not between 1 and {MAX_OUTPUTS}", "give the number of outputs")
    threshold = value.get("threshold")
    if threshold is not None and not _finite(threshold):
        raise ModelError("threshold", "is not a finite number", "give a number or leave it out")
    data_file = value.get("data_file", "")
    if not isinstance(data_file, str) or "/" in data_file or data_file in (".", ".."):
        raise ModelError("data_file", "is not a plain file name", "name the file beside the manifest")
    features = tuple(_feature(item, f"inputs[{index}]") for index, item in enumerate(inputs))
    if len({feature.name for feature in features}) != len(features):
        raise ModelError("inputs", "name a feature twice", "name each feature once")
    return ModelManifest(
        name, str(value.get("version", "")), format_, sha, size, features, kind, size_of, float(threshold) if threshold is not None else None, data_file
    )


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _feature(item: object, field: str) -> Feature:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"]:
        raise ModelError(f"{field}.name", "is missing", "name the metric")
    mean, scale, transform = item.get("mean", 0.0), item.get("scale", 1.0), item.get("transform", "identity")
    if not _finite(mean):
        raise ModelError(f"{field}.mean", "is not a finite number", "give the mean of the transformed feature")
    if not _finite(scale) or scale == 0:
        raise ModelError(f"{field}.scale", "is not a finite number other than 0", "give the deviation of the transformed feature")
    if transform not in TRANSFORMS:
        raise ModelError(f"{field}.transform", f"{str(transform)[:20]!r} is unknown", f"use {', '.join(TRANSFORMS)}")
    return Feature(item["name"], float(mean), float(scale), transform)
