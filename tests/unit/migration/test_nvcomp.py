"""nvCOMP's place in the engine. The library itself runs only on a GPU: what is around it is tested over a double of its functions on the processor; its own functions for the host, and what it refuses
before it touches a GPU, where its wheel is; and its codecs, in every pair with the processor's, where a GPU is. What could not run says why."""

import ctypes
import re
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_migration import choice, cli, codecs, extents, keys, layout, offload
from gpu_migration.errors import DeviceFailed, DeviceFull
from gpu_migration.kernels import SOURCE
from gpu_migration.layout import CODED, EXTENT, PAGE, PAGES
from gpu_migration.offload import names_for
from gpu_migration.receiver import Receiver, add_base
from gpu_migration.sender import Sender, Sent
from gpu_migration.sources import FileSource
from gpu_migration.transforms import gpu, nvcomp
from gpu_migration.transforms.device import Lane
from gpu_migration.transforms.gpu import NOWHERE, Gpu
from gpu_migration.transforms.nvcomp import Head, Nvcomp, attach
from gpu_migration.transforms.nvcomp_library import FORMATS, Batch, Library, load
from tools.bench import migration_gpu

from .cuda_on_cpu import CpuDevice, needs_compiler
from .memory import changed, contents, memory
from .nvcomp_on_cpu import TOO_LARGE, NvcompOnCpu

NAMES = tuple(codecs.ON_GPU)
INVALID, UNALIGNED, TOO_MANY = 10, 17, 21


def sorted_of(n: int, data: bytes, base: bytes | None = None) -> extents.Sorted | None:
    found = extents.sort(n, data, base=base)
    return found if isinstance(found, extents.Sorted) and len(found.plain) else None


def filled(back_end: Gpu, slot: gpu.Slot, several: list[bytes], bases: list[bytes] | None = None) -> dict[int, extents.Sorted]:
    """Put extents into a slot as the sender does, scan them there, and sort them."""
    for n, data in enumerate(several):
        for where, what in ((slot.extent(n), data), *([(slot.extent_of_base(n), bases[n])] if bases else [])):
            where[: len(what)] = what
            where[len(what) : len(what) + -len(what) % PAGE] = bytes(-len(what) % PAGE)
    back_end.scan_batch(slot, [len(data) for data in several], [len(base) for base in bases] if bases else None)
    found = {n: sorted_of(n, data, bases[n] or None if bases else None) for n, data in enumerate(several)}
    return {n: one for n, one in found.items() if one is not None}


def attached(batch: int = 2, with_base: bool = False, device: CpuDevice | None = None, rooms: int = 2, **double: Any) -> tuple[Gpu, Nvcomp, NvcompOnCpu]:
    library = NvcompOnCpu(**double)
    back_end = Gpu(device or CpuDevice(), slots=2, batch=batch, with_base=with_base)
    return back_end, attach(back_end, Library(library), rooms=rooms), library


@lru_cache
def proved(with_base: bool) -> tuple[Gpu, Nvcomp, NvcompOnCpu]:
    """One for all examples: to prove it takes a while."""
    return attached(batch=3, with_base=with_base)


# The library as it is found.


def test_without_the_wheel_the_reason_and_the_remedy_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia", None)
    with pytest.raises(DeviceFailed, match=r"nvCOMP is not installed .*pip install 'novacron\[nvcomp\]'"):
        load()


def test_a_library_that_does_not_load_or_is_another_is_refused() -> None:
    def broken() -> Any:
        raise OSError("libnvcomp.so.6: wrong ELF class")

    for loader, said in (
        (broken, "does not load: libnvcomp.so.6: wrong ELF class"), (lambda: None, "its wheel is there and the library is not"), (lambda: NvcompOnCpu(version=5103), "release 5.1.3 is there and 6"),
        (lambda: NvcompOnCpu(lacks="ZstdCompressAsync"), "lacks a function .*ZstdCompressAsync"), (object, "lacks a function"),
    ):
        with pytest.raises(DeviceFailed, match=said):
            load(loader)
    assert load(lambda: NvcompOnCpu(version=6102)).version == "6.1.2"


def real() -> Library:
    """The library of the wheel, where it is installed; it needs no GPU for what these tests ask it."""
    try:
        return load()
    except DeviceFailed as error:
        pytest.skip(str(error))


def test_the_real_library_answers_of_sizes_and_takes_options_as_they_are_passed() -> None:
    library = real()
    for codec, one in FORMATS.items():
        assert nvcomp.ALIGNED % library.alignment(codec) == 0
        assert EXTENT < library.bound(codec, EXTENT) < 3 * EXTENT
        if one.chunk_most <= 1 << 24:  # the others make a bound of any size
            with pytest.raises(DeviceFailed, match=rf"\({TOO_LARGE}\)"):
                library.bound(codec, one.chunk_most + 1)
    library.work_size(codecs.LZ4, 32, EXTENT, compress=True, stream=0)
    # Options go by value: a level that there is not is seen, so that the structure lies where the library looks.
    wrong = FORMATS[codecs.DEFLATE].__class__("Deflate", 1 << 31, 99)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMATS, codecs.DEFLATE, wrong)
        with pytest.raises(DeviceFailed, match="Deflate CompressGetMaxOutputChunkSize"):
            library.bound(codecs.DEFLATE, EXTENT)


@pytest.mark.parametrize("codec", FORMATS, ids=lambda codec: FORMATS[codec].name)
def test_the_real_library_finds_each_argument_of_a_batch_where_we_put_it(codec: int) -> None:
    """Every call here is refused by its check of the arguments, each by another, before anything is queued; none reaches a GPU, where one is."""
    library, some = real(), 1 << 20
    right = {"count": 1, "chunks": some, "lengths": some, "targets": some, "room": some, "made": some, "statuses": some, "work": some, "work_size": 1 << 40}

    def refused(status: int, call: Any, *after: int, **wrong: int) -> None:
        with pytest.raises(DeviceFailed, match=rf"\({status}\)"):
            call(codec, Batch(**{**right, **wrong}), *after, 0)

    for name in ("chunks", "lengths", "targets", "made"):
        refused(INVALID, library.compress, 1 << 16, **{name: 0})
    refused(TOO_MANY, library.compress, 1 << 16, count=1 << 40)
    for name in ("chunks", "room", "made", "targets", "statuses"):
        refused(INVALID, library.decompress, **{name: 0})
    if codec != codecs.SNAPPY:  # which works without room
        refused(INVALID, library.compress, 1 << 16, work=0)
    if codec in (codecs.LZ4, codecs.DEFLATE):
        refused(UNALIGNED, library.compress, 1 << 16, work=some + 1)
    refused(TOO_LARGE if codec != codecs.SNAPPY else TOO_MANY, library.compress, 1 << 33, count=1 << 40 if codec == codecs.SNAPPY else 1)


@needs_compiler
def test_the_real_library_without_a_gpu_is_refused_by_its_own_words() -> None:
    library = real()
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(DeviceFailed, match=r"no coder is of use: .*nv-zstd: .*CUDA"):
            attach(Gpu(CpuDevice(), slots=1, batch=1), library)
    else:
        pytest.skip("a driver of CUDA is here: memory of the host must not be given to it for a GPU's")


# What a batch is described by.


@given(several=st.lists(st.tuples(contents(), st.integers(0, 99)), min_size=1, max_size=4), batch=st.integers(4, 6))
@settings(max_examples=40, deadline=None)
def test_a_head_says_where_each_section_lies_and_what_it_is_gathered_from(several: list[tuple[bytes, int]], batch: int) -> None:
    which = {n: found for n, (data, seed) in enumerate(several) if (found := sorted_of(n, data, changed(data, seed)))}
    if not which:
        return
    bytes_ = np.full(Head.size(batch), 0xA5, np.uint8)
    head = Head.of(bytes_, batch)
    dense, out, stride = 1 << 40, 1 << 41, 4096
    assert head.describe(which, dense, out, stride) == max(len(found.plain) for found in which.values())
    assert sum(part.nbytes for part in (head.columns, head.starts, head.places, head.classes)) == len(bytes_)
    at = dense
    for row, (n, found) in enumerate(which.items()):
        assert head.columns[:, row].tolist() == [at, len(found.plain), out + row * stride, stride] and at == dense + int(head.starts[n]) * PAGE
        own = head.places[n * PAGES : n * PAGES + len(found.classes)]
        assert sorted(own[own != NOWHERE].tolist()) == list(range(len(found.plain) // PAGE))
        coded = found.classes == CODED
        assert (np.diff(own[coded].astype(np.int64)) == 1).all() and (not coded.any() or own[coded][0] == 0)
        at += len(found.plain)
    assert (head.places != NOWHERE).sum() * PAGE == at - dense  # of no other page of the slot


def test_a_batch_of_none_of_too_many_or_of_what_is_no_section_is_not_described() -> None:
    head = Head.of(np.zeros(Head.size(2), np.uint8), 2)
    one = sorted_of(0, memory(3, 5, ("text",)))
    assert one is not None
    for which, said in (({}, "1 to 2 sections, not 0"), (dict.fromkeys(range(3), one), "not 3"), ({2: one}, "no place in the slot"), ({-1: one}, "no place in the slot")):
        with pytest.raises(ValueError, match=said):
            head.describe(which, 0, 0, 0)
    for plain in (memoryview(b""), one.plain[:-PAGE], memoryview(bytes(EXTENT + PAGE))):
        with pytest.raises(ValueError, match="are not its"):
            head.describe({0: extents.Sorted(0, one.raw_length, one.raw_hash, one.classes, one.counts, one.constants, one.references, one.raw, plain, False)}, 0, 0, 0)


# Around the library, over its double.


@needs_compiler
@given(several=st.lists(st.tuples(contents(), st.integers(0, 99)), min_size=1, max_size=3), name=st.sampled_from(NAMES), with_base=st.booleans())
@settings(max_examples=30, deadline=None)
def test_what_it_codes_of_a_slot_is_what_the_extents_need(several: list[tuple[bytes, int]], name: str, with_base: bool) -> None:
    back_end, coder, library = proved(with_base)
    bases = [changed(data, seed)[: PAGE * (seed % 9) + seed % 2 * 100] for data, seed in several] if with_base else None
    with back_end.slot() as slot:
        which = filled(back_end, slot, [data for data, _ in several], bases)
        if not which:
            return
        made, seconds = coder.compress(slot, name, which)
    assert seconds > 0 and library.batches[-1] == (FORMATS[codecs.ON_GPU[name].codec].name, [len(found.plain) for found in which.values()])
    for (n, found), section in zip(which.items(), made, strict=True):
        encoded = extents.pack(found, codecs.ON_GPU[name], section)
        assert encoded.coder in (name, "store")
        assert bytes(extents.decoded(layout.unpack(encoded.data), memoryview(bytearray(EXTENT)), base=(bases[n] or None) if bases else None)) == several[n][0]
    assert coder.decompress(name, made, [len(found.plain) for found in which.values()]) == [bytes(found.plain) for found in which.values()]


@needs_compiler
def test_it_is_proved_by_every_coder_and_each_has_a_rate() -> None:
    back_end, coder, library = attached()
    assert back_end.coder is coder and tuple(coder.rates) == NAMES == coder.names and not coder.refused
    assert all(rate > 0 for rate in coder.rates.values())
    assert [name for name, _ in library.batches] == [FORMATS[codecs.ON_GPU[name].codec].name for name in NAMES for _ in range(2)]
    assert any(length < EXTENT for _, lengths in library.batches for length in lengths)


def changed_byte(coded: bytes) -> bytes:
    return coded[:-1] + bytes((coded[-1] ^ 1,))


@needs_compiler
@pytest.mark.parametrize(
    ("double", "said"),
    [
        ({"spoil": lambda codec, coded: changed_byte(coded) if codec == codecs.LZ4 else coded}, "cannot read|other bytes"),
        ({"spoil": lambda codec, coded: b"" if codec == codecs.LZ4 else coded}, "says that 0 bytes"),
        ({"status": lambda codec, row: 19 if codec == codecs.LZ4 and row else 0}, r"status of the test \(19\)"),
        ({"queued": lambda codec: 1000 if codec == codecs.LZ4 else 0}, r"CompressAsync: status of the test \(1000\)"),
    ],
)
def test_a_coder_that_errs_in_the_proof_is_left_out_by_name_and_the_others_are_used(double: dict[str, Any], said: str) -> None:
    _, coder, _ = attached(**double)
    assert "nv-lz4" not in coder.rates and set(coder.rates) == set(NAMES) - {"nv-lz4"} == set(coder.names)
    assert list(coder.refused) == ["nv-lz4"] and re.search(said, coder.why())


@needs_compiler
def test_where_no_coder_passes_there_is_none() -> None:
    for double, said in (({"spoil": lambda codec, coded: changed_byte(coded)}, "no coder is of use: nv-lz4: "), ({"alignment": 512}, "aligned to 512 bytes, and 256 are given")):
        with pytest.raises(DeviceFailed, match=said):
            attached(**double)


@needs_compiler
def test_what_a_batch_before_left_behind_is_not_taken_for_what_came_of_this_one() -> None:
    """Of the very same batch, so that the bytes themselves would be right."""
    back_end, coder, library = attached(batch=1, rooms=1)
    with back_end.slot() as slot:
        which = filled(back_end, slot, [memory(20, 5, ("text",))])
        coder.compress(slot, "nv-lz4", which)
        library.mute = True
        with pytest.raises(DeviceFailed, match="status of the test"):
            coder.compress(slot, "nv-lz4", which)


@needs_compiler
@pytest.mark.parametrize(("before", "after"), [(Lane.IN, Lane.COMPUTE), (Lane.COMPUTE, Lane.OUT)])
def test_negative_control_a_batch_that_is_not_put_in_order_is_seen(before: Lane, after: Lane) -> None:
    class Hasty(CpuDevice):
        hasty = False

        def order(self, one: Lane, other: Lane) -> None:
            if not self.hasty or (one, other) != (before, after):
                super().order(one, other)

    device = Hasty()
    back_end, coder, _ = attached(batch=1, device=device, rooms=1)
    text = memory(8, 5, ("text",), repeats=0)
    even, odd = (b"".join(text[n * PAGE : (n + 1) * PAGE] if n % 2 == which else bytes(PAGE) for n in range(8)) for which in (0, 1))
    with back_end.slot() as slot:
        coder.compress(slot, "nv-lz4", filled(back_end, slot, [even]))
        which = filled(back_end, slot, [odd])
        device.hasty = True  # what is told of the batch before lies there still
        with pytest.raises(DeviceFailed, match="other bytes|not done|says that"):
            coder.compress(slot, "nv-lz4", which)


@needs_compiler
@pytest.mark.parametrize(("old", "new"), [("u64)(starts[page / EXTENT_PAGES] + place)", "u64)(starts[page / EXTENT_PAGES] + place / 2)"), ("classes[page] == DELTA", "classes[page] == CODED")])
def test_negative_control_pages_that_are_gathered_wrong_are_seen(old: str, new: str) -> None:
    assert old in SOURCE.read_text()
    with pytest.raises(DeviceFailed, match="no coder is of use: nv-lz4: .*(other bytes|cannot read)"):
        attached(batch=1, device=CpuDevice(source=SOURCE.read_text().replace(old, new, 1)))


@needs_compiler
def test_where_there_is_little_memory_the_greediest_formats_are_left_out_then_rooms() -> None:
    def with_memory(size: int) -> Nvcomp:
        back_end = Gpu(CpuDevice(memory=size), slots=1, batch=1)
        return Nvcomp(back_end, Library(NvcompOnCpu()))

    whole = 1 << 30
    assert with_memory(whole).names == NAMES and not with_memory(whole).refused
    slot = EXTENT + PAGES * gpu.FACTS.itemsize
    room = Head.size(1) + 12 + EXTENT + nvcomp._up(EXTENT + EXTENT // 8 + 64) + nvcomp.ALIGNED
    one = with_memory(slot + room)
    assert one.names == NAMES and one._free.qsize() == 1 and with_memory(slot + 2 * room)._free.qsize() == 2
    with pytest.raises(DeviceFailed, match="no coder is of use: .*more than"):
        with_memory(slot + room - 1)


@needs_compiler
def test_several_threads_use_it_and_do_not_mix_their_batches() -> None:
    back_end, coder, _ = attached(batch=1)
    wrong: list[str] = []

    def work(seed: int) -> None:
        for n in range(4):
            with back_end.slot() as slot:
                which = filled(back_end, slot, [memory(20, seed * 100 + n, ("text", "almost zero"))])
                made, _ = coder.compress(slot, NAMES[(seed + n) % len(NAMES)], which)
                if bytes(codecs.decode(codecs.ON_GPU[NAMES[(seed + n) % len(NAMES)]].codec, made[0], len(which[0].plain))) != which[0].plain:
                    wrong.append(f"{seed} {n}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


# A move.


def moved(folder: Path, data: bytes, back_end: Gpu, names: tuple[str, ...], base: bytes | None = None) -> Sent:
    """Over loopback to a receiver that knows nothing of nvCOMP; raises where something else arrives."""
    (folder / "source").write_bytes(data)
    kept = None
    if base is not None:
        (folder / "base").write_bytes(base)
        add_base(folder / "base", folder / "bases", 1)
        kept = FileSource(folder / "base")
    taking = Receiver(folder / "target", bytes(32), ("127.0.0.1", 0), bases=folder / "bases", patience=60)
    serving = threading.Thread(target=taking.serve)
    serving.start()
    file = FileSource(folder / "source")
    try:
        return Sender(file, bytes(32), taking.address, base=kept, threads=2, gpu=back_end, codecs=names, references=False).run()
    finally:
        serving.join()
        file.close()
        if kept is not None:
            kept.close()
        assert (folder / "target").read_bytes() == data


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_base", [False, True])
def test_a_move_coded_by_it_arrives_at_a_receiver_without_it(tmp_path: Path, name: str, with_base: bool) -> None:
    data = memory(1100, 4) + bytes(EXTENT) + memory(40, 5)[:-100]
    base = changed(data, 6)[: -5 * PAGE - 7] if with_base else None
    back_end, _, library = attached(with_base=with_base)
    proving = len(library.batches)
    done = moved(tmp_path, data, back_end, (name,), base)
    assert done.coders[name] >= 3 and len(library.batches) > proving
    assert set(done.coders) <= {name, codecs.LIKE[name], "store"}  # what is too little for it, and holes
    assert done.transforms == "kernels on the processor; nvCOMP 6.0.0: " + ", ".join(NAMES)
    assert done.rates[f"{name} on the gpu"] > 0


@needs_compiler
def test_where_codecs_are_not_named_the_model_chooses_among_all(tmp_path: Path) -> None:
    back_end, coder, _ = attached()
    coder.rates.update(dict.fromkeys(coder.rates, 1e12))  # a GPU far faster than any processor
    done = moved(tmp_path, memory(2000, 8, ("text", "almost zero")), back_end, choice.FREE)
    assert set(done.coders) & set(choice.FREE_ON_GPU) and "nv-snappy" not in done.coders
    (tmp_path / "slow").mkdir()
    back_end, coder, _ = attached()
    coder.rates.update(dict.fromkeys(coder.rates, 1e3))  # a GPU far slower
    done = moved(tmp_path / "slow", memory(2000, 8, ("text", "almost zero")), back_end, choice.FREE)
    assert not set(done.coders) & set(NAMES)


class Leaving:
    """Errs from the n-th chunk after the proof on."""

    def __init__(self, how: Any, after: int) -> None:
        self.how, self.left, self.proved = how, after, False

    def __call__(self, codec: int, coded: bytes) -> bytes:
        if self.proved:
            self.left -= 1
        made: bytes = self.how(coded) if self.left < 0 else coded
        return made


@needs_compiler
@pytest.mark.parametrize("how", [changed_byte, lambda coded: b""])
@pytest.mark.parametrize("after", [0, 1])
def test_where_the_library_errs_meanwhile_the_processors_code_on_and_the_gpu_sorts_on(tmp_path: Path, how: Any, after: int) -> None:
    leaving = Leaving(how, after)
    back_end, _, _ = attached(batch=1, spoil=leaving)  # of a batch of one, each section is looked at
    leaving.proved = True
    done = moved(tmp_path, memory(1500, 7), back_end, ("nv-zstd",))
    assert "nvCOMP 6.0.0, then cpu: nvCOMP 6.0.0: nv-zstd: " in done.transforms and not done.transforms.startswith("kernels on the processor, then")
    assert done.coders.get("zstd-fast", 0) >= 2 and done.coders.get("nv-zstd", 0) <= after
    assert not done.resent


class Failing(CpuDevice):
    """Once told, works for so many waits more and then never again."""

    def __init__(self, error: DeviceFailed) -> None:
        super().__init__()
        self.left, self.error = 1 << 30, error

    def wait(self, mark: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error
        super().wait(mark)


@needs_compiler
@pytest.mark.parametrize("error", [DeviceFailed("GPU: it is gone"), DeviceFull("GPU: out of memory")])
@pytest.mark.parametrize("waits", range(5))
def test_a_device_that_goes_away_at_any_wait_is_left_and_the_processors_finish(tmp_path: Path, error: DeviceFailed, waits: int) -> None:
    device = Failing(error)
    back_end, _, _ = attached(batch=1, device=device)
    device.left = waits
    done = moved(tmp_path, memory(1300, 7), back_end, ("nv-lz4", "lz4"))
    assert f"then cpu: {error}" in done.transforms
    assert sum(done.coders.values()) >= 6


@needs_compiler
def test_a_choice_that_was_under_way_when_the_gpu_went_is_carried_out_by_the_processors_under_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every choice were: the model never hears of it."""
    monkeypatch.setattr(choice.Model, "without_device", lambda model: None)
    device = Failing(DeviceFailed("GPU: it is gone"))
    back_end, _, _ = attached(batch=1, device=device)
    device.left = 0
    done = moved(tmp_path, memory(1300, 7), back_end, ("nv-lz4",))
    assert done.coders.get("lz4-fast", 0) >= 4 and "nv-lz4" not in done.coders


# The choice.


def test_without_a_coder_on_a_gpu_the_choice_is_what_it_was() -> None:
    """And one that is there and slower than all else is not chosen, but for the second best now and then."""
    rng = np.random.default_rng(1)
    extents_ = [(int(rng.integers(1, 257)) * PAGE, 1 + float(rng.exponential())) for _ in range(400)]
    model, with_slow = choice.Model(4), choice.Model(4)
    with_slow.with_device(dict.fromkeys(NAMES, 1e3))
    chosen = [model.choose(EXTENT, plain, guess).name for plain, guess in extents_]
    assert chosen == [with_slow.choose(EXTENT, plain, guess).name for plain, guess in extents_] and not set(chosen) & set(NAMES)
    assert not model.on_device and set(model.seconds) == set(choice.START_RATES)
    with_slow.names = (*choice.FREE, *choice.FREE_ON_GPU)
    assert not {with_slow.choose(EXTENT, plain, guess).name for plain, guess in extents_} & set(NAMES)


def test_what_a_gpu_codes_is_a_stage_of_its_own_and_is_learnt() -> None:
    model = choice.Model(4, (*choice.FREE, *choice.FREE_ON_GPU), there=64, wire=choice.Mean(4e9))  # what codes here holds it up
    model.with_device(dict.fromkeys(choice.FREE_ON_GPU, 50e9))
    assert model.choose(EXTENT, EXTENT, 2.5).name in choice.FREE_ON_GPU
    before = model.cost("nv-zstd", EXTENT, EXTENT, 2.5)
    for _ in range(200):
        model.coded_there("nv-zstd", EXTENT, EXTENT / 1e7)
        model.coded_there("lz4", EXTENT, 1.0)  # not one of a GPU: of no account
    assert model.cost("nv-zstd", EXTENT, EXTENT, 2.5) > 10 * before and 1 / model.on_device["nv-zstd"].value == pytest.approx(1e7, rel=0.2)
    assert "lz4" not in model.on_device
    model.last = "nv-zstd"
    assert not model.wire_binds(EXTENT, EXTENT)  # the GPU holds the move up, not the wire
    model.without_device()
    assert model.last in model.names == choice.FREE
    alone = choice.Model(4, ("nv-lz4", "nv-deflate"))
    alone.with_device({"nv-lz4": 1e9, "nv-deflate": 1e9})
    alone.last = "nv-deflate"
    alone.without_device()
    assert alone.names == ("lz4-fast", "deflate-1") and alone.last == "deflate-1"


@needs_compiler
def test_a_gpus_coder_that_is_not_there_is_refused_by_name_and_auto_does_without() -> None:
    assert names_for(choice.FREE, None) == choice.FREE and names_for(("lz4",), None) == ("lz4",)
    with pytest.raises(DeviceFailed, match="nv-lz4 run on a GPU by nvCOMP, which is not in use"):
        names_for(("lz4", "nv-lz4"), None)
    _, coder, _ = attached(spoil=lambda codec, coded: changed_byte(coded) if codec == codecs.ZSTD else coded)
    assert names_for(choice.FREE, coder) == (*choice.FREE, "nv-lz4", "nv-deflate") and names_for(("zstd-1",), coder) == ("zstd-1",)
    with pytest.raises(DeviceFailed, match="nv-zstd: .*nv-zstd"):
        names_for(("nv-zstd",), coder)


def test_the_command_refuses_a_gpus_coder_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setenv(keys.KEY_VARIABLE, "00" * 32)
    (tmp_path / "source").write_bytes(bytes(PAGE))
    assert cli.main(["send", str(tmp_path / "source"), "127.0.0.1:1", "--patience", "0.1", "--transforms", "auto", "--codecs", "nv-lz4"]) == 1
    assert "nv-lz4 run on a GPU by nvCOMP, which is not in use" in capsys.readouterr().err


@needs_compiler
def test_the_command_says_why_a_gpu_that_is_there_does_not_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "probe", lambda **options: Gpu(CpuDevice(), slots=1, batch=1, **options))
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.setenv(keys.KEY_VARIABLE, "00" * 32)
    (tmp_path / "source").write_bytes(bytes(PAGE))
    assert cli.main(["send", str(tmp_path / "source"), "127.0.0.1:1", "--patience", "0.1", "--transforms", "gpu"]) == 1
    assert "send: coded by the processors: nvCOMP is not installed" in (said := capsys.readouterr().err) and "out of reach" in said


def test_little_is_not_worth_the_gpu() -> None:
    assert offload.WORTH_FROM >= choice.LEARN_FROM >= 2 * PAGE
    for name, like in codecs.LIKE.items():
        assert offload.by_processor(codecs.ON_GPU[name]) is codecs.BY_NAME[like] and codecs.BY_NAME[like].codec == codecs.ON_GPU[name].codec
    assert offload.by_processor(codecs.BY_NAME["lz4"]) is codecs.BY_NAME["lz4"]


@needs_compiler
def test_the_benchmark_measures_its_coders(monkeypatch: pytest.MonkeyPatch) -> None:
    back_end, coder, _ = attached()
    memory_ = migration_gpu.made_up(4 * EXTENT)
    found = migration_gpu.coders(back_end, coder, memory_, 1)
    assert set(found) == {*NAMES, "not used"} and all(found[name]["compress_gb_s"] > 0 and found[name]["decompress_gb_s"] > 0 and found[name]["ratio"] > 1 for name in NAMES)


# On a GPU.


@pytest.fixture(scope="module")
def on_gpu() -> tuple[Gpu, Nvcomp]:
    try:
        back_end = gpu.probe(slots=2, with_base=True)
        return back_end, attach(back_end)
    except DeviceFailed as error:
        pytest.skip(f"not shown here: {error}")


@pytest.mark.gpu
def test_on_a_gpu_every_format_is_proved(on_gpu: tuple[Gpu, Nvcomp]) -> None:
    assert tuple(on_gpu[1].rates) == NAMES, on_gpu[1].why()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@given(several=st.lists(contents(), min_size=1, max_size=8), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_on_a_gpu_any_maker_is_read_by_any_reader(on_gpu: tuple[Gpu, Nvcomp], name: str, several: list[bytes], seed: int) -> None:
    back_end, coder = on_gpu
    codec = codecs.ON_GPU[name].codec
    with back_end.slot() as slot:
        which = filled(back_end, slot, several, [changed(data, seed) for data in several])
        if not which:
            return
        plain = [bytes(found.plain) for found in which.values()]
        lengths = [len(one) for one in plain]
        made, _ = coder.compress(slot, name, which)
    assert [bytes(codecs.decode(codec, one, length)) for one, length in zip(made, lengths, strict=True)] == plain
    assert coder.decompress(name, made, lengths) == plain
    for other in codecs.CODERS:
        if other.codec == codec:
            assert coder.decompress(name, [bytes(other.encode(one)) for one in plain], lengths) == plain


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_a_move_coded_by_it_arrives(on_gpu: tuple[Gpu, Nvcomp], tmp_path: Path, name: str) -> None:
    data = memory(9000, 4) + bytes(EXTENT) + memory(40, 5)[:-100]
    assert moved(tmp_path, data, on_gpu[0], (name,)).coders[name] > 20
