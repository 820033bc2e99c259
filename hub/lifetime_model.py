"""The lifetime advisor's model from disk: checked by its manifest, run by onnxruntime. What it says is used in `hub/scheduler/lifetime.py`."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from .scheduler.lifetime import BOUNDS_S, CLASSES, FEATURES, Floats

SHIPPED = Path(__file__).parent / "models" / "lifetime"
"""The one that comes with the hub; trained by `tools/train_lifetime_model.py`."""

MAX_BYTES = 32 << 20
"""Largest model that is read: the shipped one has a fiftieth of it."""

SCHEMA = 1


class BadModel(ValueError):
    """A model that is refused: `field`, what is wrong, what to do."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field, self.problem, self.remedy = field, problem, remedy


class LifetimeModel:
    """Hazards of the lifetime classes from the features of arrivals."""

    def __init__(self, folder: Path = SHIPPED) -> None:
        """Raises `BadModel`."""
        self.manifest = _manifest(folder / "onnx.json")
        data = _read(folder / "model.onnx", "data_file")
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.manifest["sha256"]:
            raise BadModel("sha256", f"{folder / 'model.onnx'} has {digest}, the manifest says {self.manifest['sha256']}", "copy the model and its manifest again, both from one training")
        try:
            import onnxruntime
        except ImportError as error:
            raise BadModel("format", f"onnx needs onnxruntime ({error})", "install onnxruntime, or leave the advisor off") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            self._session: Any = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen error classes without a common base but Exception
            raise BadModel("data_file", f"is not an ONNX model that onnxruntime takes ({str(error)[:200]})", "train it again") from None

    @property
    def on_by_default(self) -> bool:
        """Whether it helped on the part of the trace that it was not trained on."""
        return bool(self.manifest["on_by_default"])

    def hazards(self, features: Floats) -> Floats:
        """[n, features] to [n, classes - 1]. Raises `BadModel` for rows of another width."""
        if features.ndim != 2 or features.shape[1] != len(FEATURES):
            raise BadModel("features", f"have the shape {features.shape}", f"give rows of {len(FEATURES)}: {', '.join(FEATURES)}")
        out = np.empty((len(features), CLASSES - 1))
        for reached in range(CLASSES - 1):
            rows = np.column_stack([features, np.full(len(features), reached)]).astype(np.float32)
            out[:, reached] = self._session.run(["probabilities"], {"x": rows})[0][:, 1]
        return out


def _read(path: Path, field: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadModel(field, f"{path} cannot be read ({error.strerror})", "copy the model and its manifest again, or leave the advisor off") from None
    if len(data) > MAX_BYTES:
        raise BadModel(field, f"{path} is larger than {MAX_BYTES} bytes", "train a smaller model")
    return data


def _manifest(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path, "manifest"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadModel("manifest", f"{path} is not JSON ({error})", "copy the model and its manifest again") from None
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA:
        raise BadModel("schema_version", f"{path} is not a manifest of version {SCHEMA}", "train it again with this version")
    for field, wanted in (("features", list(FEATURES)), ("bounds_s", list(BOUNDS_S))):
        if value.get(field) != wanted:
            raise BadModel(field, f"the model was trained with {value.get(field)!r:.200}, this version uses {wanted}", "train it again with this version")
    if not isinstance(value.get("sha256"), str) or not isinstance(value.get("on_by_default"), bool):
        raise BadModel("manifest", f"{path} lacks sha256 or on_by_default", "train it again with this version")
    return value
