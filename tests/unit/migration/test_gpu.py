"""The GPU back end over a device whose kernels run on the processor: what it encodes is what any other encodes, and any decoder reads it; a device that fails is refused by name."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_migration import codecs, extents, layout
from gpu_migration.errors import DeviceFailed, DeviceFull
from gpu_migration.kernels import SOURCE
from gpu_migration.layout import EXTENT, PAGE
from gpu_migration.transforms import gpu
from gpu_migration.transforms.cpu import CPU
from gpu_migration.transforms.device import Lane
from gpu_migration.transforms.gpu import Gpu, prove

from .cuda_on_cpu import ORDERS, CpuDevice, needs_compiler
from .memory import changed, contents, memory

pytestmark = needs_compiler
LZ4 = codecs.BY_NAME["lz4"]


def decoded(encoded: bytes, base: bytes | None) -> bytes:
    out, extent = memoryview(bytearray(EXTENT)), layout.unpack(encoded)
    extents.decode(extent, out, base=base)
    return bytes(out[: extent.raw_length])


@given(data=contents(), seed=st.integers(0, 99), with_base=st.booleans(), order=st.sampled_from(ORDERS))
@settings(max_examples=40)
def test_what_it_encodes_is_what_the_processor_encodes(data: bytes, seed: int, with_base: bool, order: int) -> None:
    base = changed(data, seed)[: len(data) - seed * 100 if seed % 2 else None] if with_base else None
    back_end = Gpu(CpuDevice(order=order), slots=1, batch=1, with_base=True)
    made = extents.encode(3, data, lambda _: LZ4, base=base or None, transforms=back_end)
    assert made.data == extents.encode(3, data, lambda _: LZ4, base=base or None).data
    assert decoded(made.data, base) == data


@given(st.lists(st.tuples(contents(), st.integers(0, 99)), min_size=1, max_size=3), st.booleans())
@settings(max_examples=20)
def test_a_batch_is_as_its_extents_one_by_one(several: list[tuple[bytes, int]], with_base: bool) -> None:
    back_end = Gpu(CpuDevice(), slots=1, batch=4, with_base=with_base)
    bases = [changed(data, seed)[: PAGE * (seed % 9) + seed % 2 * 100] for data, seed in several]

    def put(where: memoryview, data: bytes) -> int:
        where[: len(data)] = data
        where[len(data) : len(data) + -len(data) % PAGE] = bytes(-len(data) % PAGE)
        return len(data)

    with back_end.slot() as slot:
        lengths = [put(slot.extent(n), data) for n, (data, _) in enumerate(several)]
        base_lengths = [put(slot.extent_of_base(n), base) for n, base in enumerate(bases)] if with_base else None
        found = back_end.scan_batch(slot, lengths, base_lengths)
    for n, (data, _) in enumerate(several):
        base = bases[n] if with_base and bases[n] else None
        assert extents.encode(n, data, lambda _: LZ4, base=base, facts=found[n]).data == extents.encode(n, data, lambda _: LZ4, base=base).data


def test_the_proof_passes_and_a_kernel_that_errs_does_not_pass_it() -> None:
    prove(Gpu(CpuDevice(), slots=1, batch=1))
    for old, new in (("other == 0", "other != 1"), ("key_a += 2", "key_a += 4"), ("SAMPLE_FIRST 17u", "SAMPLE_FIRST 18u"), ("LANES / 2; step", "LANES / 4; step")):
        wrong = SOURCE.read_text().replace(old, new, 1)
        with pytest.raises(DeviceFailed, match="other results than the processor"):
            prove(Gpu(CpuDevice(source=wrong), slots=1, batch=1))


@pytest.mark.parametrize(("before", "after"), [(Lane.IN, Lane.COMPUTE), (Lane.COMPUTE, Lane.OUT)])
def test_negative_control_work_that_is_not_put_in_order_is_seen(before: Lane, after: Lane) -> None:
    class Hasty(CpuDevice):
        def order(self, one: Lane, other: Lane) -> None:
            if (one, other) != (before, after):
                super().order(one, other)

    with pytest.raises(DeviceFailed, match="other results"):
        prove(Gpu(Hasty(), slots=1, batch=1))


def test_a_small_device_has_a_short_ring_and_one_without_room_is_refused() -> None:
    one = EXTENT + layout.PAGES * gpu.FACTS.itemsize
    assert Gpu(CpuDevice(memory=3 * one + 1), slots=6, batch=1).slots == 3
    with pytest.raises(DeviceFull, match="more than"):
        Gpu(CpuDevice(memory=one - 1), slots=6, batch=1)


def test_a_slot_is_waited_for_and_threads_do_not_mix_theirs() -> None:
    back_end, rows = Gpu(CpuDevice(), slots=2, batch=1), np.arange(12)
    wrong: list[int] = []

    def scan(seed: int) -> None:
        for n in range(5):
            pages = extents.as_pages(memory(12, seed * 100 + n))
            found = back_end.scan(pages, None)
            if not ((found.constant() == CPU.constant(pages)).all() and (found.dense(rows) == CPU.dense(pages)).all()):
                wrong.append(seed)

    threads = [threading.Thread(target=scan, args=(seed,)) for seed in range(5)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong

    got = threading.Event()

    def third() -> None:
        with back_end.slot():
            got.set()

    with back_end.slot(), back_end.slot():
        waiting = threading.Thread(target=third)
        waiting.start()
        assert not got.is_set()
    waiting.join()
    assert got.is_set()


def test_without_a_gpu_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether CuPy is there or not: this is for machines without one, and for those whose CuPy is hidden."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceFailed, match="CuPy is not installed"):
        gpu.probe()


def failing(after: int, what: type[DeviceFailed]) -> Callable[..., CpuDevice]:
    """A device that fails for good after so many waits."""

    class Failing(CpuDevice):
        waits = 0

        def wait(self, mark: Any) -> None:
            Failing.waits += 1
            if Failing.waits > after:
                raise what("GPU: it is gone")
            super().wait(mark)

    return Failing
