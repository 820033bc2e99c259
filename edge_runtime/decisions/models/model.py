"""One face for all engines: features in by name, numbers out."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from .manifest import MAX_MODEL_BYTES, ModelError, ModelInputError, ModelManifest


class Engine(Protocol):
    """What runs one loaded model on one vector."""

    name: str

    def run(self, vector: Sequence[float]) -> list[float]:
        """Outputs (float32 precision) for an input vector."""

    def close(self) -> None:
        """Free it."""


class Model:
    """A loaded model. `predict` takes the newest values of a device by metric name."""

    def __init__(self, manifest: ModelManifest, engine: Engine) -> None:
        self.manifest = manifest
        self.engine = engine.name
        self._engine = engine
        self._inputs = tuple((feature.name, feature.transform == "log1p", feature.mean, feature.scale) for feature in manifest.inputs)

    def predict(self, values: Mapping[str, object]) -> list[float]:
        """Outputs of the model.

        Raises:
            ModelInputError: a feature is missing, not a number or not finite.
        """
        vector: list[float] = []
        for name, logarithm, mean, scale in self._inputs:
            value = values.get(name)
            if type(value) is not float and type(value) is not int:
                raise ModelInputError(name, "is missing" if value is None else f"is {type(value).__name__}", "send it as a number")
            if logarithm:
                value = math.log1p(value) if value > 0 else 0.0
            vector.append((value - mean) / scale)
        if not math.isfinite(sum(vector)):
            for (name, *_), scaled in zip(self._inputs, vector, strict=True):  # finite ones can have an infinite sum
                if not math.isfinite(scaled):
                    raise ModelInputError(name, "is not finite", "send a finite number")
        outputs = self._engine.run(vector)
        if self.manifest.output == "reconstruction_mse":
            total = 0.0
            for given, made in zip(vector, outputs, strict=True):
                total += (given - made) ** 2
            outputs = [total / len(vector)]
        for number in outputs:
            if not math.isfinite(number):
                raise ModelInputError("output", "is not finite", "check the model and the range of its inputs")
        return outputs

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()


def load_model(manifest: ModelManifest, path: Path) -> Model:
    """Load a model and try it once.

    Args:
        path: the data file, or the folder where `manifest.data_file` is.

    Raises:
        ModelError: size or hash differ, the bytes are no such model, or its shape is not the manifest's.
        ModelEngineMissing: no engine for its format is installed.
    """
    source = path / manifest.data_file if path.is_dir() else path
    try:
        size = source.stat().st_size
        if size != manifest.size_bytes or size > MAX_MODEL_BYTES:
            raise ModelError("size_bytes", f"the data has {size} bytes, the manifest says {manifest.size_bytes}", "send the manifest that belongs to it")
        data = source.read_bytes()
    except OSError as error:
        raise ModelError("data_file", f"{source} cannot be read: {error.strerror}", "put the data beside the manifest") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != manifest.sha256:
        raise ModelError("sha256", f"the data has {digest}, the manifest says {manifest.sha256}", "send the model again")
    engine = _engine(manifest, data)
    model = Model(manifest, engine)
    try:
        outputs = engine.run([0.0] * len(manifest.inputs))
    except ModelError:
        engine.close()
        raise
    if len(outputs) != manifest.outputs:
        engine.close()
        raise ModelError("output.size", f"the model gives {len(outputs)} numbers, the manifest says {manifest.outputs}", "correct the manifest")
    return model


def _engine(manifest: ModelManifest, data: bytes) -> Engine:
    if manifest.format == "portable":
        from .portable import PortableEngine

        return PortableEngine(data, len(manifest.inputs))
    if manifest.format == "onnx":
        from .onnx_engine import OnnxEngine

        return OnnxEngine(data, len(manifest.inputs))
    from .tflite_engine import open_tflite

    return open_tflite(data, len(manifest.inputs))
