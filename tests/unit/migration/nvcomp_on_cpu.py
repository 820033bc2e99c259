"""nvCOMP's batched C functions on the processor, over memory that the host sees: for what is around the library - descriptors, order, limits, failures. It says nothing of the library itself.

Each function is a real C function pointer of the documented prototype, options by value, so that arguments pass through ctypes as they do to the library.
"""

import ctypes
from collections.abc import Callable
from typing import Any

from gpu_migration import codecs
from gpu_migration.errors import FormatError
from gpu_migration.transforms.nvcomp_library import ARGUMENTS, FORMATS, Alignments, Options, Properties

CANNOT_DECOMPRESS, UNSUPPORTED, TOO_LARGE, CUDA_ERROR = 12, 11, 18, 1000
MAKERS = {codecs.LZ4: "lz4", codecs.ZSTD: "zstd-1", codecs.DEFLATE: "deflate-1", codecs.SNAPPY: "snappy"}
CAN = {codec for codec, name in MAKERS.items() if name in codecs.BY_NAME}
POISON = 0xEE


def words(address: int, count: int, kind: Any = ctypes.c_uint64) -> Any:
    """An array at an address."""
    return (kind * count).from_address(address)


class NvcompOnCpu:
    """What ctypes would load."""

    def __init__(
        self, version: int = 6000, alignment: int = 8, work: int = 64, lacks: str = "",
        spoil: Callable[[int, bytes], bytes] | None = None, status: Callable[[int, int], int] | None = None, queued: Callable[[int], int] | None = None,
    ) -> None:
        """`spoil`: changes what came of a chunk, by codec; `status`: of a chunk, by codec and row; `queued`: what a compression gives back when it is queued, by codec."""
        self._spoil, self._status, self._queued, self._alignment, self._work = spoil, status, queued, alignment, work
        self.mute = False
        """Compression says that all is well and does nothing."""
        self.batches: list[tuple[str, list[int]]] = []
        """Of each batch the format and the chunks' lengths."""

        def properties(where: Any) -> int:
            found = ctypes.cast(where, ctypes.POINTER(Properties))[0]
            found.version, found.cudart = version, 12090
            return 0

        self.nvcompGetProperties = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(properties)
        self._text = ctypes.create_string_buffer(b"status of the test")
        self.nvcompGetStatusString = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int)(lambda status: ctypes.addressof(self._text))
        for codec, one in FORMATS.items():
            for name, arguments in ARGUMENTS.items():
                if f"{one.name}{name}" != lacks:
                    # Pointers to structures come as addresses.
                    taken = [argument if argument in (Options, ctypes.c_size_t) else ctypes.c_void_p for argument in arguments]
                    setattr(self, f"nvcompBatched{one.name}{name}", ctypes.CFUNCTYPE(ctypes.c_int, *taken)(self._function(codec, name)))

    def _function(self, codec: int, name: str) -> Callable[..., int]:
        first = FORMATS[codec].option

        def alignments(options: Options, where: int) -> int:
            found = Alignments.from_address(where)
            found.input, found.output, found.work = self._alignment, 1, 4
            return 0

        def bound(size: int, options: Options, where: int) -> int:
            assert list(options.words) == [first] + [0] * 15
            if size > FORMATS[codec].chunk_most:
                return TOO_LARGE
            ctypes.c_size_t.from_address(where).value = size + size // 8 + 64
            return 0

        def work_size(count: int, chunk: int, options: Options, where: int, total: int, stream: int | None) -> int:
            assert total >= chunk and count > 0
            ctypes.c_size_t.from_address(where).value = self._work * count
            return 0

        def compress(chunks: int, lengths: int, largest: int, count: int, work: int, work_size: int, targets: int, made: int, options: Options, statuses: int, stream: int | None) -> int:
            assert list(options.words) == [first] + [0] * 15 and work_size >= self._work * count and work
            if self._queued is not None and (wrong := self._queued(codec)):
                return wrong
            if self.mute:
                return 0
            ctypes.memset(work, POISON, work_size)  # it is the library's
            sizes = list(words(lengths, count))
            self.batches.append((FORMATS[codec].name, sizes))
            assert max(sizes) == largest <= FORMATS[codec].chunk_most
            for row, (chunk, size, target) in enumerate(zip(words(chunks, count), sizes, words(targets, count), strict=True)):
                assert chunk % self._alignment == 0
                coded = bytes(codecs.BY_NAME[MAKERS[codec]].encode(ctypes.string_at(chunk, size)))
                coded = self._spoil(codec, coded) if self._spoil is not None else coded
                assert len(coded) <= size + size // 8 + 64
                ctypes.memmove(target, coded, len(coded))
                words(made, count)[row] = len(coded)
                words(statuses, count, ctypes.c_int32)[row] = self._status(codec, row) if self._status is not None else 0
            return 0

        def decompress(chunks: int, lengths: int, rooms: int, made: int, count: int, work: int, work_size: int, targets: int, options: Options, statuses: int, stream: int | None) -> int:
            assert list(options.words) == [2] + [0] * 15
            for row, (chunk, size, room, target) in enumerate(zip(words(chunks, count), words(lengths, count), words(rooms, count), words(targets, count), strict=True)):
                try:
                    came, status = bytes(codecs.decode(codec, ctypes.string_at(chunk, size), room)), 0
                except FormatError:
                    came, status = b"", CANNOT_DECOMPRESS
                ctypes.memmove(target, came, len(came))
                words(made, count)[row] = len(came)
                words(statuses, count, ctypes.c_int32)[row] = status
            return 0

        if codec not in CAN:
            return lambda *_: UNSUPPORTED
        return {
            "CompressGetRequiredAlignments": alignments, "DecompressGetRequiredAlignments": alignments, "CompressGetMaxOutputChunkSize": bound,
            "CompressGetTempSize": work_size, "DecompressGetTempSize": work_size, "CompressAsync": compress, "DecompressAsync": decompress,
        }[name]
