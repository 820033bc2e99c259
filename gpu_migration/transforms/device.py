"""A device that runs the kernels: what the GPU back end needs of one, and no more. CuPy is one; the tests have another, on the processor."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Host = NDArray[np.uint8]
"""Bytes of the host that the device may read and write by itself (pinned)."""

T = TypeVar("T")


class Lane(IntEnum):
    """A queue of work: each does its own in order, side by side with the others."""

    IN = 0
    """Copies to the device."""
    COMPUTE = 1
    OUT = 2
    """Copies from the device."""


class Device(Protocol):
    """Every method queues and returns at once, except `wait` and `ask`. All raise DeviceFailed, also for a fault of something queued before; `host` and `memory` raise DeviceFull."""

    name: str

    def host(self, size: int) -> Host:
        """Pinned bytes."""

    def memory(self, size: int) -> Any:
        """Bytes on the device, from a pool that is bounded."""

    def upload(self, source: Host, target: Any) -> None:
        """On lane IN, from the target's start."""

    def download(self, source: Any, target: Host) -> None:
        """On lane OUT, from the source's start."""

    def run(self, kernel: str, blocks: int, threads: int, *arguments: Any) -> None:
        """On lane COMPUTE; arguments are device memory and whole numbers of 32 bits."""

    def address(self, memory: Any) -> int:
        """Where bytes on the device lie, for a library's functions."""

    def ask(self, work: Callable[[int], T]) -> T:
        """What a library's function answers that queues nothing, with the device current; it gets lane COMPUTE's stream."""

    def call(self, work: Callable[[int], None]) -> None:
        """On lane COMPUTE: a library's function, which queues on the stream that it gets. DeviceFailed raised by it may come from here or from a later `wait`."""

    def order(self, before: Lane, after: Lane) -> None:
        """What is queued on `after` from now on waits for what is queued on `before` so far."""

    def mark(self, lane: Lane) -> Any:
        """Stands for what is queued on the lane so far."""

    def wait(self, mark: Any) -> None:
        """Until that is done."""

    def between(self, before: Any, after: Any) -> float:
        """Seconds from one mark to another of the same lane, by the device's clock; both are done."""

    def close(self) -> None:
        """Give everything back."""
