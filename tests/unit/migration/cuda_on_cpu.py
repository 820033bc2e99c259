"""The kernels on the processor: compiled by g++ under `cuda_on_cpu.h`, and a device of them for the GPU back end."""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_migration.errors import DeviceFailed, DeviceFull
from gpu_migration.kernels import NAMES, SOURCE
from gpu_migration.transforms.device import Host, Lane, T

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
COMPILE_S = 120
ORDERS = (0, 1, 2, 3, 12345)
"""Orders of the threads: as numbered, the other way round, the same with each warp running ahead as far as it can, mixed."""
ALIGNED = 256
"""Bytes to which CUDA aligns what it gives."""

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no g++: apt-get install --no-install-recommends g++")


class LaunchFailed(Exception):
    """What a GPU would not have defined: says what."""


@lru_cache(maxsize=1)
def _folder() -> Path:
    import atexit

    made = tempfile.mkdtemp(prefix="kernels-")
    atexit.register(shutil.rmtree, made, True)
    return Path(made)


@lru_cache(maxsize=32)
def compiled(source: str) -> ctypes.CDLL:
    """A library with a `launch_` of each kernel in the source."""
    name = hashlib.sha256(source.encode()).hexdigest()[:16]
    code, library = _folder() / f"{name}.cpp", _folder() / f"{name}.so"
    code.write_text(f'#include "{HEADER}"\n{source}\n' + "".join(f"LAUNCHED({kernel})\n" for kernel in NAMES))
    done = subprocess.run(["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-o", str(library), str(code)], capture_output=True, text=True, timeout=COMPILE_S)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    for kernel in NAMES:
        launch = getattr(loaded, f"launch_{kernel}")
        launch.restype, launch.argtypes = ctypes.c_char_p, [ctypes.c_uint, ctypes.c_uint, ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p)]
    return loaded


def launch(kernel: str, blocks: int, threads: int, arguments: tuple[Any, ...], order: int = 0, source: str | None = None) -> None:
    """Run one; arguments are arrays or whole numbers of 32 bits. Raises LaunchFailed."""
    held: list[Any] = [ctypes.c_void_p(one.ctypes.data) if isinstance(one, np.ndarray) else ctypes.c_uint(int(one)) for one in arguments]
    pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(one) for one in held))
    wrong = getattr(compiled(SOURCE.read_text() if source is None else source), f"launch_{kernel}")(blocks, threads, order, pointers)
    if wrong:
        raise LaunchFailed(f"{kernel}: {wrong.decode()}")


class CpuDevice:
    """A `Device` whose kernels run here. Its lanes do as little as they may as late as they may, the last lane first: what was not put in order comes out wrong."""

    name = "kernels on the processor"

    def __init__(self, memory: int = 1 << 30, order: int = 0, source: str | None = None) -> None:
        """`memory`: bytes of the device, beyond which it is full."""
        self._left, self._order, self._source = memory, order, source
        self._lock = threading.Lock()
        self._queues: dict[Lane, deque[Any]] = {lane: deque() for lane in Lane}
        self._done = dict.fromkeys(Lane, 0)
        self._queued = dict.fromkeys(Lane, 0)
        self.launched: list[str] = []
        self._when: dict[tuple[Lane, int], float] = {}
        self.closed = False

    def host(self, size: int) -> Host:
        return np.full(size, 0xA5, np.uint8)

    def memory(self, size: int) -> Any:
        if size > self._left:
            raise DeviceFull(f"{size} bytes are more than the {self._left} that are left")
        self._left -= size
        room = np.full(size + ALIGNED, 0xA5, np.uint8)
        return room[-room.ctypes.data % ALIGNED :][:size]

    def _queue(self, lane: Lane, work: Any) -> None:
        with self._lock:
            self._queues[lane].append(work)
            self._queued[lane] += 1

    def upload(self, source: Host, target: Any) -> None:
        self._queue(Lane.IN, lambda: target.__setitem__(slice(len(source)), source))

    def download(self, source: Any, target: Host) -> None:
        self._queue(Lane.OUT, lambda: target.__setitem__(slice(None), source[: len(target)]))

    def run(self, kernel: str, blocks: int, threads: int, *arguments: Any) -> None:
        self.launched.append(kernel)
        self._queue(Lane.COMPUTE, lambda: launch(kernel, blocks, threads, arguments, self._order, self._source))

    def address(self, memory: Any) -> int:
        return int(memory.ctypes.data)

    def ask(self, work: Callable[[int], T]) -> T:
        return work(0)

    def call(self, work: Callable[[int], None]) -> None:
        self._queue(Lane.COMPUTE, lambda: work(0))

    def between(self, before: Any, after: Any) -> float:
        if self._done[after[0]] < after[1]:
            raise DeviceFailed("a mark was asked for its time and is not done")
        return max(1e-9, self._when[after] - self._when.get(before, self._when[after]))

    def order(self, before: Lane, after: Lane) -> None:
        self._queue(after, (before, self._queued[before]))

    def mark(self, lane: Lane) -> Any:
        return lane, self._queued[lane]

    def wait(self, mark: Any) -> None:
        with self._lock:
            while self._done[mark[0]] < mark[1]:
                lane = next(lane for lane in reversed(Lane) if self._may(lane))
                work = self._queues[lane].popleft()
                try:
                    if callable(work):
                        work()
                finally:  # what failed is over too: others wait for what comes after it
                    self._done[lane] += 1
                    self._when[lane, self._done[lane]] = time.monotonic()

    def _may(self, lane: Lane) -> bool:
        if not self._queues[lane]:
            return False
        first = self._queues[lane][0]
        return callable(first) or self._done[first[0]] >= first[1]

    def close(self) -> None:
        self.closed = True

    # What a benchmark measures by; here it only shows that the benchmark does what it says.

    def seconds(self, kernel: str, blocks: int, threads: int, *given: Any, rounds: int) -> list[float]:
        began = time.monotonic()
        launch(kernel, blocks, threads, given, self._order, self._source)
        return [time.monotonic() - began] * rounds

    def copying(self, source: Any, target: Any, rounds: int) -> list[float]:
        began = time.monotonic()
        target[: len(source)] = source
        return [time.monotonic() - began + 1e-9] * rounds
