"""TFLite without numpy: LiteRT's C library (the successor of tflite-runtime) by ctypes, from the `ai-edge-litert` package.

The package itself is never imported: its Python layer brings numpy (20 MiB), the library alone 7 MiB. Where only `tflite-runtime` is
installed its interpreter is used (it needs numpy).

The C library trusts its input: malformed bytes can end the process. So a model is first opened in a child process; only what survives
there is opened here. The same probe finds a library whose C interface differs from the one written down below (LiteRT 2.x).
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .manifest import ModelEngineMissing, ModelError

PROBE_TIMEOUT_S = 20.0
"""A child that loads the library and runs a small model needs 0.1 s here; a slow card and a cold cache need seconds."""

PROBE_BYTES = 1 << 30
"""Address space of that child: a model whose tensors need a gigabyte has no place on an edge, and must not press others out of memory."""

_CPU = 1  # kLiteRtHwAcceleratorCpu
_FLOAT32 = 1  # kLiteRtElementTypeFloat32
_READ, _WRITE = 0, 1  # LiteRtTensorBufferLockMode
_IDENTIFIER = b"TFL3"
"""Bytes 4 to 7 of a TFLite flatbuffer."""


class _TensorType(ctypes.Structure):
    """LiteRtRankedTensorType of litert_model_types.h: 72 bytes; rank in the low 7 bits of its byte."""

    _fields_ = (
        ("element", ctypes.c_int), ("rank", ctypes.c_uint8), ("unused", ctypes.c_uint8 * 3), ("dimensions", ctypes.c_int32 * 8),
        ("strides", ctypes.c_uint32 * 8),
    )


def find_library() -> Path | None:
    """libLiteRt.so of an installed ai-edge-litert, without importing it."""
    for entry in sys.path:
        candidate = Path(entry or ".") / "ai_edge_litert" / "libLiteRt.so"
        if candidate.is_file():
            return candidate
    return None


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """Nothing on descriptor 2 for a moment: the library tells of every accelerator it does not find, and cannot be asked not to."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class LiteRtEngine:
    """One TFLite model in LiteRT's C library: one float32 input of shape (1, n), one float32 output."""

    name = "litert-c"

    def __init__(self, data: bytes, inputs: int, library: Path) -> None:
        self._lib: Any = ctypes.CDLL(str(library))
        self._keep = ctypes.create_string_buffer(data, len(data))  # the model reads its weights from here
        self._handles: list[tuple[str, ctypes.c_void_p]] = []
        self._inputs = inputs
        with _stderr_closed():
            self._open(data, inputs)

    def _open(self, data: bytes, inputs: int) -> None:
        environment = self._make("Environment", "LiteRtCreateEnvironment", ctypes.c_int(0), None)
        model = self._make("Model", "LiteRtCreateModelFromBuffer", environment, self._keep, ctypes.c_size_t(len(data)))
        options = self._make("Options", "LiteRtCreateOptions")
        self._call("LiteRtSetOptionsHardwareAccelerators", options, ctypes.c_int(_CPU))
        self._compiled = self._make("CompiledModel", "LiteRtCreateCompiledModel", environment, model, options)
        feed, size_in = self._buffer(environment, "Input", inputs)
        if size_in != 4 * inputs:
            raise ModelError("inputs", f"the model takes {size_in // 4} numbers, the manifest names {inputs} features", "correct the manifest")
        fetch, size_out = self._buffer(environment, "Output", 0)
        self._outputs = size_out // 4
        self._feed, self._fetch = feed, fetch
        # All that a run passes is made once: built anew each time it takes longer than the model.
        self._address = ctypes.c_void_p()
        at, one, zero = ctypes.byref(self._address), ctypes.c_size_t(1), ctypes.c_size_t(0)
        self._lock_feed, self._lock_fetch = (feed, at, ctypes.c_int(_WRITE)), (fetch, at, ctypes.c_int(_READ))
        self._run = (self._compiled, zero, one, (ctypes.c_void_p * 1)(feed), one, (ctypes.c_void_p * 1)(fetch))
        self._lock, self._unlock, self._invoke = self._lib.LiteRtLockTensorBuffer, self._lib.LiteRtUnlockTensorBuffer, self._lib.LiteRtRunCompiledModel
        self._feed_view, self._fetch_view = (ctypes.c_float * inputs), (ctypes.c_float * self._outputs)

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._lib, function)(*arguments)
        if status != 0:
            raise ModelError("data", f"{function} answers {status}", "export the model again as TFLite with float32 input and output")

    def _make(self, kind: str, function: str, *arguments: Any) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._call(function, *arguments, ctypes.byref(handle))
        self._handles.append((kind, handle))
        return handle

    def _buffer(self, environment: ctypes.c_void_p, side: str, length: int) -> tuple[ctypes.c_void_p, int]:
        requirements, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._call(f"LiteRtGetCompiledModel{side}BufferRequirements", self._compiled, ctypes.c_size_t(0), ctypes.c_size_t(0), ctypes.byref(requirements))
        self._call("LiteRtGetTensorBufferRequirementsBufferSize", requirements, ctypes.byref(size))
        tensor = _TensorType(_FLOAT32, 2)
        tensor.dimensions[0], tensor.dimensions[1] = 1, size.value // 4
        made = self._make("TensorBuffer", "LiteRtCreateManagedTensorBufferFromRequirements", environment, ctypes.byref(tensor), requirements)
        return made, size.value

    def run(self, vector: Sequence[float]) -> list[float]:
        """See `Engine.run`."""
        if self._lock(*self._lock_feed) != 0:
            raise ModelError("data", "the input cannot be written", "export the model again")
        self._feed_view.from_address(self._address.value or 0)[:] = list(vector)
        self._unlock(self._feed)
        status = self._invoke(*self._run)
        if status != 0 or self._lock(*self._lock_fetch) != 0:
            raise ModelError("data", f"the model cannot be run ({status})", "export the model again")
        made: list[float] = self._fetch_view.from_address(self._address.value or 0)[:]
        self._unlock(self._fetch)
        return made

    def close(self) -> None:
        """Free everything, newest first."""
        while self._handles:
            kind, handle = self._handles.pop()
            getattr(self._lib, f"LiteRtDestroy{kind}")(handle)


class TfliteRuntimeEngine:
    """One TFLite model in tflite-runtime's interpreter."""

    name = "tflite-runtime"

    def __init__(self, data: bytes, inputs: int) -> None:
        import numpy
        from tflite_runtime.interpreter import Interpreter  # type: ignore[import-not-found,unused-ignore]

        self._numpy = numpy
        try:
            self._interpreter: Any = Interpreter(model_content=data, num_threads=1)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError, SystemError) as error:
            raise ModelError("data", f"is not a TFLite model ({str(error)[:200]})", "export the model again") from None
        feed = self._interpreter.get_input_details()[0]
        if int(feed["shape"][-1]) != inputs:
            raise ModelError("inputs", f"the model takes {feed['shape'][-1]} numbers, the manifest names {inputs} features", "correct the manifest")
        self._feed, self._fetch = feed["index"], self._interpreter.get_output_details()[0]["index"]

    def run(self, vector: Sequence[float]) -> list[float]:
        """See `Engine.run`."""
        self._interpreter.set_tensor(self._feed, self._numpy.asarray([vector], dtype=self._numpy.float32))
        self._interpreter.invoke()
        made: list[float] = self._interpreter.get_tensor(self._fetch).ravel().tolist()
        return made

    def close(self) -> None:
        """Free the interpreter."""
        self._interpreter = None


def open_tflite(data: bytes, inputs: int) -> LiteRtEngine | TfliteRuntimeEngine:
    """The engine that this machine has, with the model loaded; raises `ModelError`."""
    if len(data) < 8 or data[4:8] != _IDENTIFIER:
        raise ModelError("data", "is not a TFLite flatbuffer (no TFL3 mark)", "export the model as TFLite")
    library = find_library()
    if library is not None:
        _probe(data, inputs)
        return LiteRtEngine(data, inputs, library)
    try:
        import tflite_runtime  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        raise ModelEngineMissing(
            "format", "tflite needs ai-edge-litert or tflite-runtime", "install ai-edge-litert, or send the model as onnx or portable"
        ) from None
    return TfliteRuntimeEngine(data, inputs)


def _probe(data: bytes, inputs: int) -> None:
    """Open and run the model in a child; what kills the child is refused here."""
    import subprocess

    # In memory, not in a file: the data folder may be full, and tempfile would cost the agent half a megabyte.
    descriptor = os.memfd_create("model")
    try:
        os.write(descriptor, data)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        child = subprocess.run(
            [sys.executable, "-S", "-m", __name__, f"/proc/self/fd/{descriptor}", str(inputs)], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, pass_fds=(descriptor,), timeout=PROBE_TIMEOUT_S, check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModelError("data", f"loading it takes over {PROBE_TIMEOUT_S:.0f} s", "send a smaller model") from None
    finally:
        os.close(descriptor)
    if child.returncode != 0:
        said = child.stdout.decode(errors="replace").strip().splitlines()
        why = said[-1] if said and child.returncode == 2 else f"loading it ends the process (status {child.returncode})"
        raise ModelError("data", why[:300], "export the model again as TFLite with one float32 input and output")


def _child(path: str, inputs: int) -> int:
    import resource

    library = find_library()
    resource.setrlimit(resource.RLIMIT_AS, (PROBE_BYTES, PROBE_BYTES))
    try:
        engine = LiteRtEngine(Path(path).read_bytes(), inputs, library or Path("libLiteRt.so"))
        engine.run([0.0] * inputs)
    except ModelError as error:
        print(f"{error.field}: {error.problem}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], int(sys.argv[2])))
