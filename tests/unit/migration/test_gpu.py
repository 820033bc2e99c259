"""The GPU back end over a device whose kernels run on the processor: what it encodes is what any other encodes, and any decoder reads it; a device that fails is refused by name."""

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_migration import cli, codecs, extents, keys, layout
from gpu_migration.errors import DeviceFailed, DeviceFull, HashMismatch
from gpu_migration.kernels import SOURCE
from gpu_migration.layout import EXTENT, PAGE
from gpu_migration.receiver import Receiver, add_base
from gpu_migration.sender import Sender, Sent
from gpu_migration.sources import FileSource
from gpu_migration.transforms import gpu
from gpu_migration.transforms.cpu import CPU
from gpu_migration.transforms.device import Lane
from gpu_migration.transforms.gpu import Gpu, prove
from tools.bench import migration_gpu

from .cuda_on_cpu import ORDERS, CpuDevice, needs_compiler
from .memory import changed, contents, memory

pytestmark = needs_compiler
LZ4 = codecs.BY_NAME["lz4"]


def decoded(encoded: bytes, base: bytes | None) -> bytes:
    out, extent = memoryview(bytearray(EXTENT)), layout.unpack(encoded)
    return bytes(extents.decoded(extent, out, base=base))


@given(data=contents(), seed=st.integers(0, 99), with_base=st.booleans(), order=st.sampled_from(ORDERS), coder=st.sampled_from(codecs.CODERS))
@settings(max_examples=40)
def test_what_it_encodes_is_what_the_processor_encodes_and_decodes(data: bytes, seed: int, with_base: bool, order: int, coder: codecs.Coder) -> None:
    base = changed(data, seed)[: len(data) - seed * 100 if seed % 2 else None] if with_base else None
    back_end = Gpu(CpuDevice(order=order), slots=1, batch=1, with_base=True)
    made = extents.encode(3, data, lambda _: coder, base=base or None, transforms=back_end)
    assert made.data == extents.encode(3, data, lambda _: coder, base=base or None).data
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
    for old, new in (("other == 0", "other != 1"), ("key_a += 2", "key_a += 4"), ("SAMPLE_FIRST 17u", "SAMPLE_FIRST 18u")):
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
            if not ((found.constant() == CPU.constant(pages)).all() and (found.dense(rows) == CPU.scan(pages, None).dense(rows)).all()):
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


class Failing(CpuDevice):
    """Works for so many waits and then never again, as a device that falls off its bus."""

    def __init__(self, waits: int, error: DeviceFailed) -> None:
        super().__init__()
        self.waits, self.error = waits, error

    def wait(self, mark: Any) -> None:
        self.waits -= 1
        if self.waits < 0:
            raise self.error
        super().wait(mark)


def sent(folder: Path, data: bytes, back_end: Gpu | None, base: bytes | None = None) -> Sent:
    """Move it over loopback, without references to other extents, which hang on what has arrived; raises where something else arrives."""
    source, target, key, kept = folder / "source", folder / "target", bytes(32), None
    source.write_bytes(data)
    if base is not None:
        (folder / "base").write_bytes(base)
        add_base(folder / "base", folder / "bases", 1)
        kept = FileSource(folder / "base")
    taking = Receiver(target, key, ("127.0.0.1", 0), bases=folder / "bases", patience=60)
    serving = threading.Thread(target=taking.serve)
    serving.start()
    file = FileSource(source)
    try:
        return Sender(file, key, taking.address, base=kept, threads=2, gpu=back_end, codecs=("lz4",), references=False).run()
    finally:
        serving.join()
        file.close()
        if kept is not None:
            kept.close()
        assert target.read_bytes() == data


@pytest.mark.parametrize("with_base", [False, True])
def test_a_move_by_it_sends_what_a_move_without_it_sends(tmp_path: Path, with_base: bool) -> None:
    data = memory(900, 4) + bytes(EXTENT) + memory(3, 5)[:-100]
    base = changed(data, 6)[: -5 * PAGE - 7] if with_base else None
    results = []
    for name, back_end in (("cpu", None), ("gpu", Gpu(CpuDevice(), slots=2, batch=2, with_base=with_base))):
        (tmp_path / name).mkdir()
        results.append(sent(tmp_path / name, data, back_end, base))
    cpu, by_gpu = results
    assert cpu.pages == by_gpu.pages and cpu.root == by_gpu.root
    assert by_gpu.transforms == "kernels on the processor" and cpu.transforms == "cpu"


@pytest.mark.parametrize("error", [DeviceFailed("GPU: it is gone"), DeviceFull("GPU: out of memory")])
@pytest.mark.parametrize("waits", [0, 2])
def test_a_device_that_fails_meanwhile_is_left_and_the_processors_finish(tmp_path: Path, error: DeviceFailed, waits: int) -> None:
    done = sent(tmp_path, memory(1300, 7), Gpu(Failing(waits, error), slots=2, batch=1))
    assert done.transforms == f"kernels on the processor, then cpu: {error}"


def test_where_a_gpu_is_asked_for_and_there_is_none_it_is_refused_and_auto_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setenv(keys.KEY_VARIABLE, "00" * 32)
    (tmp_path / "source").write_bytes(bytes(PAGE))
    options = ["send", str(tmp_path / "source"), "127.0.0.1:1", "--patience", "0.1", "--transforms"]
    assert cli.main([*options, "gpu"]) == 1
    assert capsys.readouterr().err.startswith("send: no GPU: CuPy is not installed")
    assert cli.main([*options, "auto"]) == 1
    assert "send: by the processors: no GPU" in (said := capsys.readouterr().err) and "out of reach" in said


def test_the_benchmark_measures_what_it_says() -> None:
    """Its kernels and its pipeline, at a size for a processor; and wrong bytes end it."""
    found = migration_gpu.kernels(CpuDevice(), 512, 1)
    assert {"scan_pages", "scan_pages with base", "rank_pages", "scan_counts", "gather_pages", "scatter_pages", "host to device"} <= set(found)
    memory = migration_gpu.made_up(4 * EXTENT)
    run = migration_gpu.pipeline(Gpu(CpuDevice(), slots=2, batch=2), memory, 5 * EXTENT, 2, "lz4-fast")
    assert run["verified"] and run["moved_gb"] == round(8 * EXTENT / 1e9, 1) and run["ratio"] > 1.5
    with pytest.raises(HashMismatch):
        migration_gpu.pipeline(Gpu(CpuDevice(source=SOURCE.read_text().replace("other == 0", "other != 1")), slots=1, batch=2), memory, EXTENT, 1, "lz4-fast")


def test_without_a_gpu_the_benchmark_says_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(sys, "argv", ["migration_gpu", "--json"])
    assert migration_gpu.main() == 2
    assert "not shown: no GPU" in capsys.readouterr().err
