"""Coding on the GPU by nvCOMP, of extents whose pages a slot of the ring holds there already: one section an extent, one chunk a section, so that what comes back is what any decoder of the format reads.

The pages that are to be coded are gathered on the device (`gather_pages`), the library codes the batch, and only what came of it is copied back. A room is the memory for that of one batch;
like a slot, all of it is made at the start. Nothing of this is used before `prove` has seen real bytes go through it, both ways and against the processor's codecs.

What arrives from another machine is not decompressed here: the library may do anything with input that is not valid, and a sender with the key must not harm a receiver.
"""

import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import codecs, extents
from ..codecs import LIKE, ON_GPU
from ..errors import DeviceFailed, DeviceFull, FormatError
from ..extents import Sorted
from ..layout import CODED, DELTA, EXTENT, PAGE, PAGES, WORDS
from .device import Host, Lane
from .gpu import NOWHERE, THREADS, Gpu, Slot, blocks_for
from .nvcomp_library import Batch, Library, load

ROOMS = 2
"""Batches that are coded or copied back at once: the kernels of one go on while another's bytes leave."""
ALIGNED = 256
"""Bytes to which all that the library is given is aligned: CUDA's own for memory that it gives, and more than any format asks for."""
UNTOLD = 0xFF
"""Lengths and statuses are filled with it before: what the library did not write is then neither."""
_COLUMNS = 4
"""64-bit words a chunk in a room's head: chunk, length, target, room."""
_TAIL = 12
"""Bytes a chunk in its tail: length and status."""


def _up(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


@dataclass(slots=True)
class Head:
    """What the kernels and the library are told of a batch: views of bytes that go to the device as they are, arrays one after the other."""

    columns: NDArray[np.uint64]
    """Of shape (4, batch): addresses of the chunks, their bytes, addresses of what comes of them, bytes that there are for it."""
    starts: NDArray[np.uint32]
    """First page of each extent among those gathered."""
    places: NDArray[np.uint32]
    """Of each page of the slot its place among its extent's; NOWHERE where it is not gathered."""
    classes: NDArray[np.uint8]

    @staticmethod
    def size(batch: int) -> int:
        """Bytes for so many extents."""
        return batch * (8 * _COLUMNS + 4) + 5 * batch * PAGES

    @classmethod
    def of(cls, memory: Host, batch: int) -> "Head":
        """Views of such bytes."""
        words, starts, places = 8 * _COLUMNS * batch, (8 * _COLUMNS + 4) * batch, (8 * _COLUMNS + 4 + 4 * PAGES) * batch
        return cls(
            memory[:words].view(np.uint64).reshape(_COLUMNS, batch), memory[words:starts].view(np.uint32), memory[starts:places].view(np.uint32), memory[places : places + batch * PAGES],
        )

    def describe(self, which: Mapping[int, Sorted], dense: int, out: int, stride: int) -> int:
        """Write down a batch: of these extents, by their place in the slot, the sections to be coded; gathered at address `dense`, what comes of each at `out`, `stride` bytes apart. Bytes of the largest."""
        if not 0 < len(which) <= len(self.starts):
            raise ValueError(f"a batch has 1 to {len(self.starts)} sections, not {len(which)}")
        self.places[:], self.classes[:] = NOWHERE, 0
        page = 0
        for row, (n, found) in enumerate(which.items()):
            length = len(found.plain)
            order = np.concatenate([(found.classes == CODED).nonzero()[0], (found.classes == DELTA).nonzero()[0]])
            if length != len(order) * PAGE or not 0 < length <= EXTENT or not 0 <= n < len(self.starts):
                raise ValueError(f"extent {found.index}: {length} bytes to be coded are not its {len(order)} pages, or have no place in the slot")
            first = n * PAGES
            self.classes[first : first + len(found.classes)] = found.classes
            self.places[first + order] = np.arange(len(order), dtype=np.uint32)
            self.starts[n] = page
            self.columns[:, row] = dense + page * PAGE, length, out + row * stride, stride
            page += len(order)
        return max(len(found.plain) for found in which.values())


@dataclass(slots=True)
class Room:
    """Memory for coding one batch. Used by who holds it. `told`, `made` and `out` are pinned; the others are on the device."""

    told: Host
    head: Any
    made: Host
    tail: Any
    """Lengths, then statuses."""
    dense: Any
    out: Any
    coded: Host
    work: Any


def results(made: Host, batch: int, count: int) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Lengths and statuses of so many chunks, out of the bytes that came back."""
    return made[: 8 * batch].view(np.uint64)[:count], made[8 * batch : _TAIL * batch].view(np.int32)[:count]


class Nvcomp:
    """Coders on a GPU. Several threads may use it, as many at once as there are rooms."""

    def __init__(self, gpu: Gpu, library: Library, *, rooms: int = ROOMS) -> None:
        """Room for the ring's batches. Raises DeviceFailed, with the reasons, where no format is left that it has memory for."""
        self._gpu, self._device, self._library = gpu, gpu.device, library
        self.batch = gpu.batch
        self.name = f"nvCOMP {library.version}"
        self.refused: dict[str, str] = {}
        """Coders that are not used, and why."""
        self.rates: dict[str, float] = {}
        """Those that were proved, and the bytes a second that the GPU coded then."""
        self._turn = 0
        self._free: queue.SimpleQueue[Room] = queue.SimpleQueue()
        needs = self._needs()
        self._stride = 0
        while not self._stride:
            if not needs:
                raise DeviceFailed(f"{self.name}: no coder is of use: {self.why()}")
            stride, work = max(bound for bound, _ in needs.values()), max(work for _, work in needs.values())
            try:
                self._free.put(self._room(stride, work))
                self._stride, self._work = stride, work
            except DeviceFull as error:
                greediest = max(needs, key=lambda name: needs[name][1] + self.batch * needs[name][0])
                self.refused[greediest] = str(error)
                del needs[greediest]
        for _ in range(rooms - 1):
            try:
                self._free.put(self._room(stride, work))
            except DeviceFull:
                break
        self.names = tuple(needs)

    def _needs(self) -> dict[str, tuple[int, int]]:
        """Of each coder the bytes that a section may become, and those that the library works in."""
        needs: dict[str, tuple[int, int]] = {}
        for name, coder in ON_GPU.items():
            try:
                strictest = self._library.alignment(coder.codec)
                if ALIGNED % strictest:
                    raise DeviceFailed(f"it wants memory aligned to {strictest} bytes, and {ALIGNED} are given here")
                needs[name] = _up(self._library.bound(coder.codec, EXTENT)), _up(self._work_size(coder.codec, self.batch, EXTENT, compress=True))
            except DeviceFailed as error:
                self.refused[name] = str(error)
        return needs

    def _work_size(self, codec: int, count: int, chunk: int, *, compress: bool) -> int:
        return self._device.ask(lambda stream: self._library.work_size(codec, count, chunk, compress=compress, stream=stream))

    def _room(self, stride: int, work: int) -> Room:
        host, memory, batch = self._device.host, self._memory, self.batch
        return Room(
            host(Head.size(batch)), memory(Head.size(batch)), host(_TAIL * batch), memory(_TAIL * batch), memory(batch * EXTENT), memory(batch * stride), host(batch * stride), memory(max(ALIGNED, work)),
        )

    def _memory(self, size: int) -> Any:
        given = self._device.memory(size)
        if self._device.address(given) % ALIGNED:
            raise DeviceFailed(f"{self._device.name}: its memory is not aligned to {ALIGNED} bytes")
        return given

    @contextmanager
    def _held(self) -> Iterator[Room]:
        """A free room, waited for."""
        room = self._free.get()
        try:
            yield room
        finally:
            self._free.put(room)

    def why(self) -> str:
        """The reasons for which coders are not used, in one line."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())

    def compress(self, slot: Slot, name: str, which: Mapping[int, Sorted]) -> tuple[list[bytes], float]:
        """What that coder makes of the sections of these extents, by their place in the slot, whose pages are on the device since the slot was scanned; and the seconds that the GPU took.

        One section of each batch, another every time, is decoded by the processor. Raises DeviceFailed where anything is amiss.
        """
        codec, device, count = ON_GPU[name].codec, self._device, len(which)
        pages, base, _ = slot.on_device
        last = max(which)
        in_slot = last * PAGES + len(which[last].classes)
        with self._held() as room:
            largest = Head.of(room.told, self.batch).describe(which, device.address(room.dense), device.address(room.out), self._stride)
            head = Head.of(room.head, self.batch)
            room.made[:] = UNTOLD
            batch = self._addressed(room, count)
            with self._gpu.submitting:
                device.upload(room.told, room.head)
                device.upload(room.made, room.tail)
                device.order(Lane.IN, Lane.COMPUTE)
                began = device.mark(Lane.COMPUTE)
                device.run("gather_pages", blocks_for(in_slot), THREADS, pages, base, head.classes, head.places, head.starts, in_slot, room.dense)
                device.call(lambda stream: self._library.compress(codec, batch, largest, stream))
                ended = device.mark(Lane.COMPUTE)
                device.order(Lane.COMPUTE, Lane.OUT)
                device.download(room.tail, room.made)
                mark = device.mark(Lane.OUT)
            device.wait(mark)
            seconds = device.between(began, ended)
            sizes = self._sizes(room.made, name, count, self._library.bound(codec, largest))
            starts = [sum(sizes[:row]) for row in range(count)]
            with self._gpu.submitting:
                for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
                    device.download(room.out[row * self._stride : row * self._stride + size], room.coded[start : start + size])
                mark = device.mark(Lane.OUT)
            device.wait(mark)
            made = [room.coded[start : start + size].tobytes() for start, size in zip(starts, sizes, strict=True)]
        self._turn += 1  # threads may take the same one: it is a sample
        row = self._turn % count
        self._check(name, made[row], list(which.values())[row].plain)
        return made, seconds

    def _addressed(self, room: Room, count: int) -> Batch:
        at, tail, column = self._device.address(room.head), self._device.address(room.tail), 8 * self.batch
        return Batch(count, at, at + column, at + 2 * column, at + 3 * column, tail, tail + column, self._device.address(room.work), self._work)

    def _sizes(self, made: Host, name: str, count: int, most: int) -> list[int]:
        """Raises DeviceFailed where a chunk failed, or has an impossible length."""
        lengths, statuses = results(made, self.batch, count)
        if statuses.any():
            raise DeviceFailed(f"{self.name}: {name}: {self._library.text(int(statuses[statuses != 0][0]))}")
        if (lengths == 0).any() or (lengths > most).any():
            raise DeviceFailed(f"{self.name}: {name}: it says that {int(lengths.max())} bytes came of a chunk of which {most} can come at the most")
        return [int(size) for size in lengths]

    def _check(self, name: str, coded: bytes, plain: codecs.Buffer) -> None:
        try:
            came = codecs.decode(ON_GPU[name].codec, coded, len(plain))
        except FormatError as error:
            raise DeviceFailed(f"{self.name}: {name}: the processor cannot read what it made: {error}") from None
        if came != plain:
            raise DeviceFailed(f"{self.name}: {name}: other bytes came out than went in")

    def decompress(self, name: str, sections: Sequence[bytes], lengths: Sequence[int]) -> list[bytes]:
        """What these sections, in that coder's format, were made of: so many bytes each. For sections that this process made: see above. Raises DeviceFailed, also where one is of another length."""
        codec, device, count = ON_GPU[name].codec, self._device, len(sections)
        work_size = self._work_size(codec, count, max(lengths), compress=False)
        ins, outs = [_up(len(section)) for section in sections], [_up(length) for length in lengths]
        given, taken, told, made = device.host(sum(ins)), device.host(sum(outs)), device.host(8 * _COLUMNS * count), device.host(_TAIL * count)
        source, target, head, tail = self._memory(sum(ins)), self._memory(sum(outs)), self._memory(8 * _COLUMNS * count), self._memory(_TAIL * count)
        work = self._memory(max(ALIGNED, work_size))
        columns = told.view(np.uint64).reshape(_COLUMNS, count)
        into, out_of = device.address(source), device.address(target)
        for row, section in enumerate(sections):
            at = sum(ins[:row])
            given[at : at + len(section)] = np.frombuffer(section, np.uint8)
            columns[:, row] = into + at, len(section), out_of + sum(outs[:row]), lengths[row]
        made[:] = UNTOLD
        at = device.address(head)
        batch = Batch(count, at, at + 8 * count, at + 16 * count, at + 24 * count, device.address(tail), device.address(tail) + 8 * count, device.address(work), work_size)
        with self._gpu.submitting:
            for host, there in ((given, source), (told, head), (made, tail)):
                device.upload(host, there)
            device.order(Lane.IN, Lane.COMPUTE)
            device.call(lambda stream: self._library.decompress(codec, batch, stream))
            device.order(Lane.COMPUTE, Lane.OUT)
            device.download(tail, made)
            device.download(target, taken)
            mark = device.mark(Lane.OUT)
        device.wait(mark)
        found, statuses = results(made, count, count)
        if statuses.any() or found.tolist() != list(lengths):
            wrong = int(statuses[statuses != 0][0]) if statuses.any() else 0
            raise DeviceFailed(f"{self.name}: {name}: it does not decompress: {self._library.text(wrong) if wrong else 'other lengths came out'}")
        return [taken[sum(outs[:row]) : sum(outs[:row]) + length].tobytes() for row, length in enumerate(lengths)]

    def prove(self) -> None:
        """Let real bytes through every coder, both ways and between it and the processor; those that fail are `refused`, and of the others the rate is known. Raises DeviceFailed where none is left."""
        with self._gpu.slot() as slot:
            which: dict[int, Sorted] = {}
            for n in range(self.batch):
                pages = _sample(n)
                data = slot.extent(n)
                data[:] = pages.data.cast("B")
                found = extents.sort(n, data, thorough=False)
                assert isinstance(found, Sorted)
                which[n] = found
            self._gpu.scan_batch(slot, [EXTENT] * self.batch)
            plain = [bytes(found.plain) for found in which.values()]
            for name in self.names:
                try:
                    self.rates[name] = self._proved(slot, name, which, plain)
                except DeviceFailed as error:
                    self.refused[name] = str(error)
        self.names = tuple(self.rates)
        if not self.names:
            raise DeviceFailed(f"{self.name}: no coder is of use: {self.why()}")

    def _proved(self, slot: Slot, name: str, which: Mapping[int, Sorted], plain: list[bytes]) -> float:
        """Bytes a second."""
        lengths = [len(one) for one in plain]
        made, _ = self.compress(slot, name, which)
        for coded, one in zip(made, plain, strict=True):
            self._check(name, coded, one)
        theirs = [bytes(codecs.BY_NAME[LIKE[name]].encode(one)) for one in plain]
        for who, sections in (("itself", made), ("the processor", theirs)):
            if self.decompress(name, sections, lengths) != plain:
                raise DeviceFailed(f"{self.name}: {name}: other bytes came out of what {who} made than went in")
        _, seconds = self.compress(slot, name, which)  # the first run paid for what is loaded once
        return sum(lengths) / max(seconds, 1e-9)


def _sample(n: int) -> NDArray[np.uint64]:
    """Pages of the n-th extent of the proof: tables, text, little in them, none of it, no order at all; of some extents only few are to be coded."""
    rng = np.random.default_rng(n)
    pages = rng.integers(0, 1 << 63, (PAGES, WORDS), np.uint64)
    pages[::4] = np.cumsum(pages[::4] & np.uint64(0xFF), axis=1)
    text = np.frombuffer(b"a page of a guest's memory, as far as words go: ", np.uint8)
    pages[1::4] = np.resize(text, (len(pages[1::4]), PAGE)).view(np.uint64)
    pages[2::4, n % 5 + 1 :] = 0
    pages[: n * 37 % PAGES] = 0
    return pages


def attach(gpu: Gpu, library: Library | None = None, *, rooms: int = ROOMS) -> Nvcomp:
    """The coders of a GPU, proved, and given to it. Raises DeviceFailed with the reason where there are none of use: no wheel, another release, no memory, other bytes."""
    coder = Nvcomp(gpu, library or load(), rooms=rooms)
    coder.prove()
    gpu.coder = coder
    return coder

