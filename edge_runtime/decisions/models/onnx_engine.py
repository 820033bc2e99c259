"""ONNX through onnxruntime. Imported only when an ONNX model is configured: it costs about 45 MiB of resident memory."""

from collections.abc import Sequence
from typing import Any

from .manifest import ModelEngineMissing, ModelError


class OnnxEngine:
    """One ONNX model: one float32 input of shape (1, n), one float32 output."""

    name = "onnxruntime"

    def __init__(self, data: bytes, inputs: int) -> None:
        try:
            import numpy
            import onnxruntime
        except ImportError as error:
            raise ModelEngineMissing("format", f"onnx needs onnxruntime ({error})", "install onnxruntime, or send the model as tflite or portable") from None
        options = onnxruntime.SessionOptions()
        # The arena only grows (0.2 to 6 GB in onnxruntime issue 11627); one thread: a model of this size is faster than a hand-over.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session: Any = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen error classes without a common base but Exception
            raise ModelError("data", f"is not an ONNX model that onnxruntime takes ({str(error)[:200]})", "export the model again") from None
        self._numpy = numpy
        feeds, fetches = self._session.get_inputs(), self._session.get_outputs()
        if len(feeds) != 1 or len(fetches) != 1 or feeds[0].type != "tensor(float)":
            raise ModelError("inputs", f"the model has {len(feeds)} inputs and {len(fetches)} outputs", "export one float input and one output")
        if feeds[0].shape[-1] != inputs:
            raise ModelError("inputs", f"the model takes {feeds[0].shape}, the manifest names {inputs} features", "correct the manifest")
        self._feed, self._fetch = feeds[0].name, fetches[0].name

    def run(self, vector: Sequence[float]) -> list[float]:
        """See `Engine.run`."""
        fed = self._numpy.asarray([vector], dtype=self._numpy.float32)
        try:
            out = self._session.run([self._fetch], {self._feed: fed})[0]
        except Exception as error:
            raise ModelError("inputs", f"the model could not be run ({str(error)[:200]})", "export the model again") from None
        made: list[float] = out.ravel().tolist()
        return made

    def close(self) -> None:
        """Free the session."""
        self._session = None
