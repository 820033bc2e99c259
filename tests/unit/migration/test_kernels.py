"""The GPU's kernels, run on the processor, against numpy: whatever the pages, their number and the order of the threads. Planted bugs are seen."""

import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpu_migration import extents
from gpu_migration.kernels import NAMES, SOURCE
from gpu_migration.layout import Page
from gpu_migration.transforms import Words, cpu
from gpu_migration.transforms.gpu import FACTS, NO_BASE
from gpu_migration.transforms.hashing import hashes

from . import toolchain
from .cuda_on_cpu import ORDERS, LaunchFailed, launch, needs_compiler
from .memory import KINDS, changed, contents, memory

NOWHERE = 0xFFFFFFFF
orders = st.sampled_from(ORDERS)


def scanned(pages: Words, base: Words, blocks: int = 2, order: int = 0, source: str | None = None) -> NDArray[np.void]:
    facts = np.full(len(pages) * FACTS.itemsize, 0xA5, np.uint8).view(FACTS)
    launch("scan_pages", blocks, 256, (pages, base, len(pages), len(base), facts), order, source)
    return facts


def bits(pages: Words) -> NDArray[np.int64]:
    return np.unpackbits(pages.view(np.uint8), axis=1).sum(axis=1, dtype=np.int64)


def scan_is_right(pages: Words, base: Words, blocks: int = 2, order: int = 0, source: str | None = None) -> bool:
    """Every fact, against numpy."""
    facts, shared = scanned(pages, base, blocks, order, source), len(base)
    flags = facts["flags"]
    constant = (pages == pages[:, :1]).all(axis=1)
    same = np.zeros(len(pages), np.bool_)
    same[:shared] = (pages[:shared] == base).all(axis=1)
    return bool(
        ((flags & 1 != 0) == constant).all() and ((flags & 2 != 0) == same).all() and not (flags & ~np.uint16(3)).any() and (facts["first"] == pages[:, 0]).all()
        and (facts["hash"] == hashes(pages)).all() and (facts["distinct"] == cpu.distinct(cpu.sampled(pages))).all()
        and (facts["population"][:shared] == bits(pages[:shared] ^ base)).all() and (facts["population"][shared:] == NO_BASE).all()
    )


@needs_compiler
@given(data=contents(24), seed=st.integers(0, 99), part=st.integers(0, 24), blocks=st.integers(1, 4), order=orders)
@settings(max_examples=60)
def test_the_scan_says_of_each_page_what_numpy_says(data: bytes, seed: int, part: int, blocks: int, order: int) -> None:
    pages = extents.as_pages(data)
    base = extents.as_pages(changed(pages.tobytes(), seed))[:part]
    assert scan_is_right(pages, base, blocks, order)


def sections(classes: NDArray[np.uint8]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Places and counts as the format asks for: by extent raw pages, coded ones, deltas, each in order."""
    places, counts = np.full(len(classes), NOWHERE, np.uint32), []
    for first in range(0, len(classes), 256):
        part = classes[first : first + 256]
        order = np.concatenate([np.flatnonzero(part == kind) for kind in (Page.RAW, Page.CODED, Page.DELTA)])
        places[first + order] = np.arange(len(order))
        counts.append(len(order))
    return places, np.array(counts, np.uint32)


def rank_is_right(classes: NDArray[np.uint8], order: int = 0, source: str | None = None) -> bool:
    count = -(-len(classes) // 256)
    places, counts = np.full(len(classes) + 1, 77, np.uint32), np.full(count + 1, 77, np.uint32)
    launch("rank_pages", count, 256, (classes, len(classes), places, counts), order, source)
    due_places, due_counts = sections(classes)
    return bool((places[:-1] == due_places).all() and (counts[:-1] == due_counts).all() and places[-1] == 77 and counts[-1] == 77)


@needs_compiler
@given(seed=st.integers(0, 2**32), count=st.integers(1, 700), kinds=st.lists(st.sampled_from(list(Page)), min_size=1), order=orders)
def test_places_are_those_of_the_format(seed: int, count: int, kinds: list[Page], order: int) -> None:
    rng = random.Random(seed)
    assert rank_is_right(np.array([rng.choice(kinds) for _ in range(count)], np.uint8), order)


def sums_are_right(counts: NDArray[np.uint32], order: int = 0, source: str | None = None) -> bool:
    starts = np.full(len(counts) + 2, 77, np.uint32)
    launch("scan_counts", 1, 1024, (counts, len(counts), starts), order, source)
    return bool((starts[1:-1] == np.cumsum(counts)).all() and starts[0] == 0 and starts[-1] == 77)


@needs_compiler
@given(seed=st.integers(0, 2**32), count=st.sampled_from((1, 31, 32, 33, 1023, 1024, 1025, 2048, 3000)), order=orders)
@settings(max_examples=20)
def test_starts_are_the_sums_before(seed: int, count: int, order: int) -> None:
    assert sums_are_right(np.random.default_rng(seed).integers(0, 257, count, np.uint32), order)


def moved(classes: NDArray[np.uint8], pages: Words, base: Words, order: int = 0, source: str | None = None) -> tuple[Words, Words]:
    """Gathered, and from that scattered again."""
    places, counts = sections(classes)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
    dense, back = np.full((int(starts[-1]) + 1, 512), 77, np.uint64), np.full((len(pages) + 1, 512), 77, np.uint64)
    launch("gather_pages", 2, 256, (pages, base, classes, places, starts, len(pages), dense), order, source)
    launch("scatter_pages", 2, 256, (dense, base, classes, places, starts, np.ascontiguousarray(pages[:, 0]), len(pages), back), order, source)
    return dense, back


def gather_is_right(classes: NDArray[np.uint8], pages: Words, base: Words, order: int = 0, source: str | None = None) -> bool:
    """`pages` are such as their classes say."""
    dense, back = moved(classes, pages, base, order, source)
    due = []
    for first in range(0, len(classes), 256):
        part = slice(first, first + 256)
        for kind in (Page.RAW, Page.CODED, Page.DELTA):
            rows = classes[part] == kind
            due.append(pages[part][rows] ^ base[part][rows] if kind is Page.DELTA else pages[part][rows])
    plain = np.concatenate(due)
    left = classes != Page.DUP
    return bool((dense[:-1] == plain).all() and (dense[-1] == 77).all() and (back[:-1][left] == pages[left]).all() and (back[:-1][~left] == 77).all() and (back[-1] == 77).all())


def classified(seed: int, count: int) -> tuple[NDArray[np.uint8], Words, Words]:
    """Pages of every class, and a base."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, len(Page), count).astype(np.uint8)
    pages, base = rng.integers(0, 2**63, (count, 512), np.uint64), rng.integers(0, 2**63, (count, 512), np.uint64)
    pages[classes == Page.ZERO] = 0
    pages[classes == Page.CONST] = pages[classes == Page.CONST][:, :1]
    pages[classes == Page.UNCHANGED] = base[classes == Page.UNCHANGED]
    return classes, pages, base


@needs_compiler
@given(seed=st.integers(0, 2**32), count=st.one_of(st.integers(1, 40), st.integers(250, 530)), order=orders)
@settings(max_examples=30)
def test_gathered_pages_are_the_sections_and_come_back(seed: int, count: int, order: int) -> None:
    assert gather_is_right(*classified(seed, count), order)


@needs_compiler
@given(seed=st.integers(0, 2**32), order=orders)
@settings(max_examples=20)
def test_duplicates_are_copied(seed: int, order: int) -> None:
    rng = np.random.default_rng(seed)
    pages = rng.integers(0, 2**63, (30, 512), np.uint64)
    mixed = rng.permutation(30).astype(np.uint32)
    to = mixed[: int(rng.integers(0, 20))]
    origin = rng.choice(mixed[20:], len(to)).astype(np.uint32)
    due = pages.copy()
    due[to] = pages[origin]
    launch("copy_pages", 2, 256, (pages, to, origin, len(to)), order)
    assert (pages == due).all()


def planted(old: str, new: str, count: int = 1) -> str:
    """The source with a bug."""
    source = SOURCE.read_text()
    assert source.count(old) >= 1, old
    return source.replace(old, new, count)


SCAN_BUGS = {
    "a mask that leaves a lane out": ("value += __shfl_xor_sync(ALL, value, step)", "value += __shfl_xor_sync(0x7fffffffu, value, step)"),
    "half the steps of a sum": ("for (u32 step = LANES / 2; step;", "for (u32 step = LANES / 4; step;"),
    "the tail is read": ("page < count; page += gridDim.x * WARPS) {\n        const uint4* mine", "page <= count; page += gridDim.x * WARPS) {\n        const uint4* mine"),
    "the last page is left out": ("page < count; page += gridDim.x * WARPS) {\n        const uint4* mine", "page + 1 < count; page += gridDim.x * WARPS) {\n        const uint4* mine"),
    "no wait before the sampled bytes": ("if (lane < 8) seen[warp][lane] = 0;\n        __syncwarp();", "if (lane < 8) seen[warp][lane] = 0;"),
    "no wait after them": ("        __syncwarp();\n        u32 distinct", "        u32 distinct"),
    "another key": ("key_b += 2 * LANES * KEY_B", "key_b += LANES * KEY_B"),
    "half of a word is not compared": (" | (v.w ^ first_high)", ""),
    "the base's end is not seen": ("if (page < base_count) {", "if (page + 1 < base_count) {"),
}


@needs_compiler
@pytest.mark.parametrize("bug", SCAN_BUGS)
def test_negative_control_a_bug_in_the_scan_is_seen(bug: str) -> None:
    half = bytearray(4096)
    half[12::16] = b"\x01" * 256  # one half of every second word
    pages = extents.as_pages(memory(37, 3, KINDS) + bytes(half))
    base = extents.as_pages(changed(pages.tobytes(), 5)).copy()
    base[-1] = ~pages[-1]
    source = planted(*SCAN_BUGS[bug])

    def right(order: int) -> bool:
        # Room for a page beyond the end, so that a bug that writes there is seen and does no harm.
        room, facts = np.concatenate([pages, pages[:1]]), np.full((len(pages) + 1) * FACTS.itemsize, 0xA5, np.uint8).view(FACTS)
        launch("scan_pages", 2, 256, (room, base, len(pages), len(base), facts), order, source)
        return facts[-1:].tobytes() == b"\xa5" * FACTS.itemsize and scan_is_right(pages, base, 2, order, source)

    assert scan_is_right(pages, base)
    seen = False
    for order in ORDERS:
        if seen:
            break
        try:
            seen = not right(order)
        except LaunchFailed:
            seen = True
    assert seen


OTHER_BUGS = {
    "no barrier between writing and reading a block's sums": ("    __syncthreads();\n    u32 total = 0;", "    u32 total = 0;"),
    "a page counts itself": ("(1u << lane) - 1)", "(2u << lane) - 1)"),
    "the first tile's sums are overwritten": ("        __syncthreads();  // before the next tile's sums\n", ""),
    "a tile carries its last warp only": ("carried += sums[SCAN_WARPS - 1]", "carried += sum"),
    "a delta is not undone": ("if (kind == DELTA) {", "if (kind == DUP) {"),
    "constants are zero": ("kind == ZERO ? 0 : fills[page]", "0"),
}


@needs_compiler
@pytest.mark.parametrize("bug", OTHER_BUGS)
def test_negative_control_a_bug_in_the_others_is_seen(bug: str) -> None:
    source, seen = planted(*OTHER_BUGS[bug]), False
    classes, pages, base = classified(8, 300)
    counts = np.random.default_rng(8).integers(1, 257, 2500, np.uint32)
    for order in reversed(ORDERS):
        if seen:
            break
        try:
            seen = not (rank_is_right(classes, order, source) and sums_are_right(counts, order, source) and gather_is_right(classes, pages, base, order, source))
        except LaunchFailed:
            seen = True
    assert seen


@needs_compiler
def test_negative_control_a_barrier_that_not_all_reach_ends_the_launch() -> None:
    source = planted("    u32 before = 0;\n    for (u32 s = 1;", "    if (page >= count) return;\n    u32 before = 0;\n    for (u32 s = 1;")
    with pytest.raises(LaunchFailed, match="has ended"):
        rank_is_right(np.full(300, Page.RAW, np.uint8), 0, source)


def test_the_hash_tells_pages_apart() -> None:
    """Pages that differ in one bit, in the order of their words, or by a shift; and a flip changes half of the bits."""
    rng = np.random.default_rng(4)
    page = rng.integers(0, 2**63, 512, np.uint64)
    flips = np.repeat(page[None], 2000, axis=0)
    flips[np.arange(2000), rng.integers(0, 512, 2000)] ^= np.uint64(1) << (np.arange(2000) % 64).astype(np.uint64)
    swaps = np.repeat(page[None], 511, axis=0)
    for n in range(511):
        swaps[n, [n, n + 1]] = swaps[n, [n + 1, n]]
    nearly = np.zeros((1000, 512), np.uint64)
    nearly[np.arange(1000), np.arange(1000) % 512] = 1 + np.arange(1000, dtype=np.uint64)
    every = np.concatenate([page[None], flips, swaps, nearly, np.stack([np.roll(page, n) for n in range(1, 200)])])
    every = np.unique(every, axis=0)
    found = hashes(every)
    for column in (0, 1):
        assert len(np.unique(found[:, column])) == len(every)
    mean = float(bits(found ^ found[::-1]).mean())
    assert 60 < mean < 68, mean


@toolchain.needs_assembler
def test_it_is_assembled_and_no_kernel_spills(tmp_path: Path) -> None:
    found = toolchain.resources(SOURCE, "90", tmp_path)
    assert set(found) == set(NAMES)
    for name, one in found.items():
        assert one.spilled == 0 and one.stack == 0, name
        assert one.registers <= 80, f"{name}: {one.registers} registers leave fewer than 24 warps a multiprocessor, too few reads on their way"


@toolchain.needs_assembler
def test_negative_control_what_is_no_cuda_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.cu"
    broken.write_text(planted("__syncwarp();", "__syncwrap();"))
    with pytest.raises((subprocess.CalledProcessError, ValueError)):
        toolchain.resources(broken, "90", tmp_path)


@toolchain.needs_nvrtc
def test_nvrtc_compiles_it_as_cupy_would() -> None:
    assert all(name.encode() in toolchain.nvrtc(SOURCE.read_text(), "compute_90") for name in NAMES)
    with pytest.raises(ValueError, match="__syncwrap"):
        toolchain.nvrtc(planted("__syncwarp();", "__syncwrap();"), "compute_90")
