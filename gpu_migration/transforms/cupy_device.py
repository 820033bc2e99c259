"""A GPU by CuPy: kernels compiled by NVRTC for the device that is there, three streams, a memory pool with a limit. Imported only where a GPU is asked for."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import DeviceFailed, DeviceFull
from ..kernels import NAMES, SOURCE
from .device import Host, Lane, T

HIGH_WATER = 0.5
"""Share of the device's free memory that is used at the most: others run there too, and a ring of six slots takes under 1 GiB."""
_TO_DEVICE, _TO_HOST, _BY_ADDRESS = 1, 2, 4
"""Directions of cudaMemcpyAsync."""


class CupyDevice:
    """The first GPU that CUDA shows (CUDA_VISIBLE_DEVICES chooses). Raises DeviceFailed with the reason."""

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise DeviceFailed(f"no GPU: CuPy is not installed ({error}); pip install cupy-cuda12x or cupy-cuda13x, as the driver is") from None
        except Exception as error:  # it loads libraries of the driver, and says so in errors of its own
            raise DeviceFailed(f"no GPU: CuPy does not load: {error}") from None
        self._cupy = cupy
        self._lock = threading.Lock()
        with self._guarded():
            if not cupy.cuda.runtime.getDeviceCount():
                raise DeviceFailed("no GPU: CUDA shows none; see nvidia-smi and CUDA_VISIBLE_DEVICES")
            self._device = cupy.cuda.Device(0)
            properties = cupy.cuda.runtime.getDeviceProperties(0)
            self.name = f"gpu: {properties['name'].decode()}"
            with self._device:
                module = cupy.RawModule(code=SOURCE.read_text(), options=("--std=c++17",))
                self._kernels = {name: module.get_function(name) for name in NAMES}
                self._streams = [cupy.cuda.Stream(non_blocking=True) for _ in Lane]
                self._pool = cupy.cuda.MemoryPool()
                self._pool.set_limit(size=int(cupy.cuda.runtime.memGetInfo()[0] * HIGH_WATER))

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Errors of CUDA and CuPy as ours."""
        cuda = self._cupy.cuda
        try:
            yield
        except (cuda.memory.OutOfMemoryError, MemoryError) as error:
            raise DeviceFull(f"GPU: {error}; use fewer slots, or --transforms cpu") from None
        except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError, cuda.compiler.CompileException) as error:
            kind = DeviceFull if "OutOfMemory" in str(error) or "MemoryAllocation" in str(error) else DeviceFailed
            raise kind(f"GPU: {error}") from None

    @contextmanager
    def _on(self, lane: Lane) -> Iterator[Any]:
        with self._guarded(), self._device, self._streams[lane] as stream:
            yield stream

    def host(self, size: int) -> Host:
        with self._guarded(), self._device:
            return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(size), np.uint8, size)

    def memory(self, size: int) -> Any:
        with self._guarded(), self._device:
            return self._cupy.ndarray((size,), self._cupy.uint8, memptr=self._pool.malloc(size))

    def upload(self, source: Host, target: Any) -> None:
        with self._on(Lane.IN) as stream:
            self._cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.ctypes.data, source.nbytes, _TO_DEVICE, stream.ptr)

    def download(self, source: Any, target: Host) -> None:
        with self._on(Lane.OUT) as stream:
            self._cupy.cuda.runtime.memcpyAsync(target.ctypes.data, source.data.ptr, target.nbytes, _TO_HOST, stream.ptr)

    def run(self, kernel: str, blocks: int, threads: int, *arguments: Any) -> None:
        with self._on(Lane.COMPUTE):
            self._kernels[kernel]((blocks,), (threads,), tuple(np.uint32(one) if isinstance(one, int) else one for one in arguments))

    def address(self, memory: Any) -> int:
        return int(memory.data.ptr)

    def ask(self, work: Callable[[int], T]) -> T:
        with self._on(Lane.COMPUTE) as stream:
            return work(stream.ptr)

    def call(self, work: Callable[[int], None]) -> None:
        self.ask(work)

    def order(self, before: Lane, after: Lane) -> None:
        with self._guarded(), self._device:
            event = self._cupy.cuda.Event(disable_timing=True)
            event.record(self._streams[before])
            self._streams[after].wait_event(event)

    def mark(self, lane: Lane) -> Any:
        with self._guarded(), self._device:
            event = self._cupy.cuda.Event(block=True)  # the thread sleeps: a core is there for coding
            event.record(self._streams[lane])
            return event

    def wait(self, mark: Any) -> None:
        with self._guarded():
            mark.synchronize()

    def between(self, before: Any, after: Any) -> float:
        with self._guarded():
            return float(self._cupy.cuda.get_elapsed_time(before, after)) / 1e3

    def seconds(self, kernel: str, blocks: int, threads: int, *arguments: Any, rounds: int) -> list[float]:
        """How long a kernel takes by the device's clock, each time, after one that does not count; nothing else may be under way."""
        given = tuple(np.uint32(one) if isinstance(one, int) else one for one in arguments)
        return self._timed(lambda stream: self._kernels[kernel]((blocks,), (threads,), given), rounds)

    def copying(self, source: Any, target: Any, rounds: int) -> list[float]:
        """The same of a copy: arrays of the device, or pinned bytes on one side."""

        def pointer(one: Any) -> int:
            return int(one.data.ptr if isinstance(one, self._cupy.ndarray) else one.ctypes.data)

        return self._timed(lambda stream: self._cupy.cuda.runtime.memcpyAsync(pointer(target), pointer(source), source.nbytes, _BY_ADDRESS, stream.ptr), rounds)

    def _timed(self, work: Callable[[Any], object], rounds: int) -> list[float]:
        event, found = self._cupy.cuda.Event, []
        with self._on(Lane.COMPUTE) as stream:
            for n in range(rounds + 1):
                began, ended = event(), event()
                began.record(stream)
                work(stream)
                ended.record(stream)
                ended.synchronize()
                if n:
                    found.append(self._cupy.cuda.get_elapsed_time(began, ended) / 1e3)
        return found

    def used(self) -> int:
        """Bytes of the device that the pool holds."""
        return int(self._pool.total_bytes())

    def close(self) -> None:
        with self._guarded():
            for stream in self._streams:
                stream.synchronize()
            self._pool.free_all_blocks()
