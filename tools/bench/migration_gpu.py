"""The migration engine on a GPU: each kernel against its floor, and the pipeline over 32 GB from memory to memory, verified. Without a GPU: not shown, and why.

The floor of a kernel is the bytes that it must read and write, each once, divided by the rate at which the device copies its own memory (bytes read and written). The pipeline: threads copy
batches of a guest's memory into the ring, the GPU finds the pages' facts, the processors code what is left with LZ4, and every extent is decoded into another memory, where its BLAKE3 is
checked; afterwards both memories are compared. There is no wire and no cipher in it. `--image FILE` gives a guest's memory (of `migration_guest.py`); without it memory is made up of
zeros, constants, random bytes and this machine's own files, and that is said. No codec runs on the GPU in it; where nvCOMP is there, its codecs are measured beside it, over that memory as it lies on
the device, and the processor decodes what they make. Where it is not, the reason is in `details`.
"""

import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

if not __package__:
    __import__("as_module").again(__file__)

import numpy as np
from numpy.typing import NDArray

from .harness import arguments, machine, note, report, spread

RATE_GB_S = 17.0
"""1 TB in a minute."""
OF_FLOOR = 0.8
"""Share of the floor's rate that each kernel with a page's traffic reaches."""
MOVED = 32 << 30
"""Bytes that the pipeline moves at the least."""
MEMORY = 4 << 30
"""Bytes of memory that are moved again and again: beyond every cache."""
KERNEL_PAGES = 1 << 20
"""Pages that a kernel is measured over: 4 GiB, far beyond the device's cache."""
KERNEL_ROUNDS = 20
CODED_BATCHES = 32
"""Batches that each of nvCOMP's coders codes: 1 GiB."""
ZERO, CONSTANT, RANDOM = 0.5, 0.02, 0.06
"""Shares of made-up memory, as in the Debian guests of `migration_cpu.py`."""


class Timed(Protocol):
    """What a device's kernels are measured by: see CupyDevice."""

    name: str

    def memory(self, size: int) -> Any: ...

    def host(self, size: int) -> NDArray[np.uint8]: ...

    def seconds(self, kernel: str, blocks: int, threads: int, *given: Any, rounds: int) -> list[float]: ...

    def copying(self, source: Any, target: Any, rounds: int) -> list[float]: ...


def made_up(size: int, seed: int = 1) -> NDArray[np.uint8]:
    """Memory like a guest's: pages of zeros, one word, random bytes, and of files of this machine in runs of 16."""
    rng, out = np.random.default_rng(seed), np.zeros(size, np.uint8)
    pages = out.reshape(-1, 4096)
    kinds = np.repeat(rng.choice(4, -(-len(pages) // 16), p=(ZERO, CONSTANT, RANDOM, 1 - ZERO - CONSTANT - RANDOM)), 16)[: len(pages)]
    pages[kinds == 1] = rng.integers(0, 256, (int((kinds == 1).sum()), 1), np.uint8)
    pages[kinds == 2] = rng.integers(0, 256, (int((kinds == 2).sum()), 4096), np.uint8)
    rows = np.flatnonzero(kinds == 3)
    wanted, filled = len(rows) * 4096, 0
    content = np.zeros(wanted, np.uint8)
    for folder, _, names in os.walk(sys.prefix if os.path.isdir(sys.prefix) else "/usr"):
        for name in names:
            if filled < wanted:
                try:
                    data = np.fromfile(os.path.join(folder, name), np.uint8)[: min(8 << 20, wanted - filled)]
                except OSError:
                    continue
                content[filled : filled + len(data)] = data
                filled += len(data)
    if filled < wanted:  # again, with every byte shifted by another amount a round, so that it is not found as duplicates
        for n, at in enumerate(range(filled, wanted, max(1, filled)), 1):
            part = content[at : at + filled]
            np.add(content[: len(part)], np.uint8(n), out=part)
    pages[rows] = content.reshape(-1, 4096)
    return out


def kernels(device: Timed, pages: int, rounds: int) -> dict[str, Any]:
    """Each kernel's rate and its share of the floor's, on the device's own memory filled from made-up memory."""
    from gpu_migration.transforms.gpu import FACTS, SCAN_THREADS, THREADS, blocks_for

    size, extents, tile = pages * 4096, pages // 256, min(pages * 4096, 256 << 20)
    memory, base, dense = device.memory(size), device.memory(size), device.memory(size)
    host = device.host(tile)
    for seed, filled in ((1, memory), (2, base)):
        host[:] = made_up(tile, seed)
        for at in range(0, size, tile):
            device.copying(host, filled[at : at + tile], rounds=1)
    facts, classes = device.memory(pages * FACTS.itemsize), device.memory(pages)
    places, counts, starts, fills = device.memory(4 * pages), device.memory(4 * extents), device.memory(4 * extents + 4), device.memory(8 * pages)
    mixed = np.random.default_rng(3).choice(np.array([0, 1, 2, 4, 5, 6], np.uint8), pages, p=(0.4, 0.02, 0.1, 0.08, 0.06, 0.34))
    host[:pages] = mixed
    device.copying(host[:pages], classes, rounds=1)
    blocks = blocks_for(pages)
    count = {kind: int((mixed == kind).sum()) for kind in range(7)}
    sent, one = count[4] + count[5] + count[6], 4096
    copied = statistics.median(device.copying(memory, dense, rounds=rounds))
    floor = 2 * size / copied
    measured = (
        ("scan_pages", blocks, THREADS, (memory, base, pages, 0, facts), size + pages * FACTS.itemsize),
        ("scan_pages with base", blocks, THREADS, (memory, base, pages, pages, facts), 2 * size + pages * FACTS.itemsize),
        ("rank_pages", extents, THREADS, (classes, pages, places, counts), 5 * pages + 4 * extents),
        ("scan_counts", 1, SCAN_THREADS, (counts, extents, starts), 8 * extents),
        ("gather_pages", blocks, THREADS, (memory, base, classes, places, starts, pages, dense), one * (2 * sent + count[4]) + 5 * pages),
        ("scatter_pages", blocks, THREADS, (dense, base, classes, places, starts, fills, pages, memory), one * (pages + sent + count[4] + count[2]) + 5 * pages),
    )
    out: dict[str, Any] = {"copy_gb_s": round(floor / 1e9, 1)}
    for name, grid, threads, given, needed in measured:
        took = statistics.median(device.seconds(name.split()[0], grid, threads, *given, rounds=rounds))
        out[name] = {"microseconds": round(took * 1e6, 1), "gb_s": round(needed / took / 1e9, 1), "of_floor": round(needed / took / floor, 3)}
    pinned = device.host(min(size, 1 << 30))
    for name, (source, target) in (("host to device", (pinned, memory[: len(pinned)])), ("device to host", (memory[: len(pinned)], pinned))):
        out[name] = {"gb_s": round(len(pinned) / statistics.median(device.copying(source, target, rounds=rounds)) / 1e9, 1)}
    return out


def coders(gpu: Any, coder: Any, memory: NDArray[np.uint8], rounds: int) -> dict[str, Any]:
    """Of each of nvCOMP's coders: bytes a second by the device's clock, and of decompression with its copies by ours; ratio; each section decoded by the processor. Raises MigrationError where that gives other bytes."""
    from gpu_migration import codecs, extents
    from gpu_migration.errors import HashMismatch
    from gpu_migration.layout import EXTENT

    out: dict[str, Any] = {}
    firsts = range(0, len(memory) // EXTENT, gpu.batch)
    for name in coder.rates:
        plain = coded = 0
        compressing = decompressing = 0.0
        for first in list(firsts)[: max(1, rounds)]:
            with gpu.slot() as slot:
                which: dict[int, extents.Sorted] = {}
                batch = range(first, min(first + gpu.batch, len(memory) // EXTENT))
                for n, index in enumerate(batch):
                    slot.extent(n)[:] = memory.data[index * EXTENT : (index + 1) * EXTENT]
                    found = extents.sort(index, slot.extent(n))
                    if isinstance(found, extents.Sorted) and len(found.plain):
                        which[n] = found
                gpu.scan_batch(slot, [EXTENT] * len(batch))
                if not which:
                    continue
                made, seconds = coder.compress(slot, name, which)
                compressing += seconds
                lengths = [len(found.plain) for found in which.values()]
                for found, section in zip(which.values(), made, strict=True):
                    if codecs.decode(codecs.ON_GPU[name].codec, section, len(found.plain)) != found.plain:
                        raise HashMismatch(f"{name}: other bytes came out than went in")
                began = time.monotonic()
                back = coder.decompress(name, made, lengths)
                decompressing += time.monotonic() - began
                if back != [bytes(found.plain) for found in which.values()]:
                    raise HashMismatch(f"{name}: other bytes came back than went in")
                plain, coded = plain + sum(lengths), coded + sum(len(section) for section in made)
        if plain:
            out[name] = {"compress_gb_s": round(plain / compressing / 1e9, 6), "decompress_gb_s": round(plain / decompressing / 1e9, 6), "ratio": round(plain / coded, 3), "bytes": plain}
    out["not used"] = dict(coder.refused)
    return out


def pipeline(gpu: Any, memory: NDArray[np.uint8], total: int, threads: int, coder: str) -> dict[str, Any]:
    """Move memory to memory, over and over until `total` bytes went through; raises MigrationError where other bytes come out."""
    from gpu_migration import codecs, extents, layout
    from gpu_migration.errors import HashMismatch
    from gpu_migration.layout import EXTENT

    target, source, chosen = np.full_like(memory, 0xA5), memory.data, codecs.BY_NAME[coder]
    batches = [range(first, min(first + gpu.batch, len(memory) // EXTENT)) for first in range(0, len(memory) // EXTENT, gpu.batch)]
    rounds = -(-total // len(memory))
    lock, work = threading.Lock(), iter([batch for _ in range(rounds) for batch in batches])
    coded = [0]
    failures: list[Exception] = []

    def move() -> None:
        try:
            while True:
                with lock:
                    batch = next(work, None)
                if batch is None or failures:
                    return
                with gpu.slot() as slot:
                    for n, index in enumerate(batch):
                        slot.extent(n)[:] = source[index * EXTENT : (index + 1) * EXTENT]
                    found = gpu.scan_batch(slot, [EXTENT] * len(batch))
                    for n, index in enumerate(batch):
                        encoded = extents.encode(index, slot.extent(n), lambda _: chosen, facts=found[n])
                        place = target.data[index * EXTENT : (index + 1) * EXTENT]
                        extents.decode(layout.unpack(encoded.data), place)
                        with lock:
                            coded[0] += len(encoded.data)
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=move) for _ in range(threads)]
    began = time.monotonic()
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    seconds = time.monotonic() - began
    if failures:
        raise failures[0]
    if not np.array_equal(memory, target):
        raise HashMismatch("pipeline: other bytes came out than went in")
    moved = rounds * len(memory)
    return {"gb_s": round(moved / seconds / 1e9, 2), "moved_gb": round(moved / 1e9, 1), "seconds": round(seconds, 2), "ratio": round(moved / coded[0], 2), "threads": threads, "coder": coder, "verified": True}


def main() -> int:
    """Exit status 0 where the rate and each kernel's share of the floor are met; 2 where there is no GPU."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--image", type=Path, help="a guest's memory (made up)")
    parser.add_argument("--threads", type=int, default=0, help="of the pipeline; 0: one a processor")
    parser.add_argument("--coder", default="lz4-fast", help="coder of the pipeline")
    options = parser.parse_args()
    about, promise = machine(), f"a GPU sorts out a guest's pages at {OF_FLOOR:.0%} of what its memory allows, and 1 TB a minute goes from memory to memory"
    try:
        from gpu_migration.errors import DeviceFailed, MigrationError
        from gpu_migration.transforms import nvcomp
        from gpu_migration.transforms.cupy_device import CupyDevice
        from gpu_migration.transforms.gpu import Gpu, prove
    except ImportError as error:
        print(f"migration_gpu: not shown: {error}; pip install 'novacron[migration,gpu]'", file=sys.stderr)
        return 2
    threads = options.threads or os.cpu_count() or 1
    try:
        device = CupyDevice()
        about = {**about, "gpu": device.name}
        note(options, f"{device.name}: kernels")
        found = kernels(device, KERNEL_PAGES, KERNEL_ROUNDS)
        device.close()
        gpu = Gpu(CupyDevice(), slots=threads + 2)
        prove(gpu)
        memory = np.fromfile(options.image, np.uint8, MEMORY) if options.image else made_up(MEMORY)
        memory = memory[: len(memory) >> 20 << 20]
        try:
            note(options, "nvCOMP")
            by_nvcomp = coders(gpu, nvcomp.attach(gpu), memory, CODED_BATCHES)
        except DeviceFailed as error:
            by_nvcomp = {"not shown": str(error)}
        runs = []
        for n in range(options.rounds):
            note(options, f"pipeline, round {n + 1}")
            runs.append(pipeline(gpu, memory, MOVED, threads, options.coder))
    except MigrationError as error:
        print(f"migration_gpu: not shown: {error}", file=sys.stderr)
        return 2
    rates = [run["gb_s"] for run in runs]
    value = statistics.median(rates)
    near = all(found[name]["of_floor"] >= OF_FLOOR for name in ("scan_pages", "scan_pages with base", "gather_pages", "scatter_pages"))
    return report(
        options, about, promise, value, "GB/s of guest memory, median", value >= RATE_GB_S and near, spread_=spread(rates),
        peer={"copy on the device": found["copy_gb_s"]}, inputs={"memory": str(options.image or "made up"), "bytes": MOVED, "pages": KERNEL_PAGES}, details={"kernels": found, "nvcomp": by_nvcomp, "pipeline": runs[-1]},
    )


if __name__ == "__main__":
    sys.exit(main())
