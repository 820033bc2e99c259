"""The transforms on a GPU: batches of extents through a ring of slots. One kernel finds all facts of all pages in one reading.

A slot is pinned memory for a batch and its facts, and the same on the device. All of them are made at the start, so that nothing is allocated while work goes on and the ring is the
bound on what is under way: who wants a slot waits for one. Copies in, kernels and copies out are on three lanes, so that the slots' work overlaps.
"""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceFailed, DeviceFull
from ..layout import EXTENT, PAGE, PAGES, WORDS, pages_of
from . import Facts, Flags, Known, Words
from .cpu import CPU
from .device import Device, Host, Lane
from .hashing import hashes

if TYPE_CHECKING:
    from .nvcomp import Nvcomp

SLOTS = 6
"""Batches under way: one each on its way in, in the kernels and on its way out, the others being filled or encoded."""
BATCH = 32
"""Extents of a batch: 32 MiB take 0.6 ms over PCIe 5, well over what starting a copy and a kernel costs (10 us)."""
BLOCKS = 2048
"""Blocks of a kernel with a warp a page: fills the largest GPU there is (132 multiprocessors, three such blocks each) five times, so that the last ones end together."""
THREADS = 256
WARPS = 8
SCAN_THREADS = 1024
NO_BASE = 0xFFFFFFFF
"""Population of a page without a counterpart."""
NOWHERE = 0xFFFFFFFF
"""Place of a page that is not gathered."""
CONSTANT, UNCHANGED = 1, 2
FACTS = np.dtype([("hash", "<u8", (2,)), ("first", "<u8"), ("population", "<u4"), ("distinct", "<u2"), ("flags", "<u2")])
"""As `PageFacts` of the kernels."""


def blocks_for(pages: int) -> int:
    """Blocks of a kernel with a warp a page."""
    return max(1, min(BLOCKS, -(-pages // WARPS)))


@dataclass(slots=True)
class Slot:
    """Room for a batch. Filled and used by who holds it."""

    pages: Host
    """Extents, one after the other."""
    base: Host | None
    facts: Host
    on_device: tuple[Any, Any, Any]
    """Pages, base, facts."""

    def extent(self, n: int) -> memoryview:
        """Where the n-th extent of the batch is to be put."""
        return self.pages.data[n * EXTENT : (n + 1) * EXTENT]

    def extent_of_base(self, n: int) -> memoryview:
        """Where its counterpart is to be put."""
        if self.base is None:
            raise ValueError("this ring was made without room for a base")
        return self.base.data[n * EXTENT : (n + 1) * EXTENT]


def facts_of(found: NDArray[np.void], base_pages: int) -> Known:
    """An extent's facts from the kernel's, the counterparts of the first so many pages being there."""
    return Known(
        (found["flags"] & CONSTANT).astype(np.bool_), (found["flags"][:base_pages] & UNCHANGED).astype(np.bool_), found["population"].astype(np.int64),
        np.ascontiguousarray(found["hash"][:, 0]), found["distinct"],
    )


class Gpu:
    """The back end. Slots may be held by several threads, each by one."""

    def __init__(self, device: Device, *, slots: int = SLOTS, batch: int = BATCH, with_base: bool = False) -> None:
        """As many slots as there is memory for; raises DeviceFull where there is not even one."""
        self.name = device.name
        self.batch = batch
        self.device = device
        self.submitting = threading.Lock()
        """Held while work that belongs together is queued."""
        self.coder: Nvcomp | None = None
        """What codes on it, where nvCOMP is there and was proved."""
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self.slots = 0
        for _ in range(slots):
            try:
                self._free.put(self._slot(with_base))
            except DeviceFull:
                if not self.slots:
                    raise
                break
            self.slots += 1

    def _slot(self, with_base: bool) -> Slot:
        size, facts = self.batch * EXTENT, self.batch * PAGES * FACTS.itemsize
        pages, base = self.device.memory(size), self.device.memory(size) if with_base else None
        return Slot(
            self.device.host(size), self.device.host(size) if with_base else None, self.device.host(facts),
            (pages, base if base is not None else pages, self.device.memory(facts)),
        )

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """A free slot, waited for."""
        held = self._free.get()
        try:
            yield held
        finally:
            self._free.put(held)

    def scan_batch(self, slot: Slot, lengths: list[int], base_lengths: list[int] | None = None) -> list[Facts]:
        """The facts of the extents in a slot, and with the base's where the counterparts have those lengths. Raises DeviceFailed; what is in the slot's pages is as it was.

        A last page that is not whole must be padded with zeros in the slot.
        """
        count = (len(lengths) - 1) * PAGES + pages_of(lengths[-1])
        compared = base_lengths if base_lengths is not None and slot.base is not None else None
        pages, base, facts = slot.on_device
        with self.submitting:
            self.device.upload(slot.pages[: count * PAGE], pages)
            if compared is not None and slot.base is not None:
                self.device.upload(slot.base[: count * PAGE], base)
            self.device.order(Lane.IN, Lane.COMPUTE)
            self.device.run("scan_pages", blocks_for(count), THREADS, pages, base, count, count if compared is not None else 0, facts)
            self.device.order(Lane.COMPUTE, Lane.OUT)
            self.device.download(facts, slot.facts[: count * FACTS.itemsize])
            mark = self.device.mark(Lane.OUT)
        self.device.wait(mark)
        found = slot.facts[: count * FACTS.itemsize].view(FACTS)
        out: list[Facts] = []
        for n, length in enumerate(lengths):
            own = pages_of(length)
            # A copy: the slot is another's before the facts are read to the end.
            out.append(facts_of(found[n * PAGES : n * PAGES + own].copy(), min(own, pages_of(compared[n])) if compared is not None else 0))
        return out

    def scan(self, pages: Words, base: Words | None) -> Facts:
        """As a batch of one."""
        with self.slot() as slot:
            size = len(pages) * PAGE
            slot.extent(0)[:size] = np.ascontiguousarray(pages).data.cast("B")
            if base is None:
                return self.scan_batch(slot, [size])[0]
            slot.extent_of_base(0)[: len(base) * PAGE] = np.ascontiguousarray(base).data.cast("B")
            return self.scan_batch(slot, [size], [len(base) * PAGE])[0]

    # For pages that the host holds anyway, the host is nearer.

    def equal(self, pages: Words, others: Words) -> Flags:
        return CPU.equal(pages, others)

    def xor(self, pages: Words, others: Words) -> Words:
        return CPU.xor(pages, others)

    def close(self) -> None:
        """Give everything back; no slot may be held."""
        self.device.close()


def prove(gpu: Gpu) -> None:
    """Run it on pages of every kind and compare with the processor's results; raises DeviceFailed where one differs."""
    rng = np.random.default_rng(20)
    pages = rng.integers(0, 1 << 63, (PAGES, WORDS), np.uint64)
    pages[::5] = 0
    pages[1::5] = pages[1::5, :1]
    pages[2::5, 100:] = 7
    pages[3, :] = 0
    pages[3, WORDS - 1] = 1
    rows, found, due = np.arange(PAGES), gpu.scan(pages, None), CPU.scan(pages, None)
    if not ((found.constant() == due.constant()).all() and (found.dense(rows) == due.dense(rows)).all() and (found.signatures(rows) == hashes(pages)[:, 0]).all()):
        raise DeviceFailed(f"{gpu.name}: its kernels give other results than the processor; do not use it (--transforms cpu)")


def probe(**options: Any) -> Gpu:
    """The GPU of this machine, proved by running it; raises DeviceFailed with the reason where there is none of use."""
    from .cupy_device import CupyDevice

    gpu = Gpu(CupyDevice(), **options)
    prove(gpu)
    return gpu
