"""nvCOMP's batched functions by ctypes: NVIDIA's library of release 6, from its wheel, an optional extra. Loading it needs no GPU, and neither do sizes and alignments.

A batch is arrays on the device: where each chunk lies, how long it is, where what comes of it goes; lengths and statuses come back in arrays there. A chunk in LZ4, Snappy, raw Deflate
or Zstandard is what any other library of that format makes and reads: nothing of nvCOMP's own is around it.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..codecs import DEFLATE, LZ4, SNAPPY, ZSTD
from ..errors import DeviceFailed

RELEASE = 6
"""Of the library: the functions' arguments have changed from release to release."""
INSTALL = "pip install 'novacron[nvcomp]'"
WORDS_OF_OPTIONS = 16
"""Every options structure of the batched functions has 64 bytes, the unused ones zero."""
BY_CUDA = 2
"""Decompress by kernels: the engine of newer GPUs wants memory of a special kind, and does what it likes with damaged input."""
DEFLATE_LEVEL = 1
"""The library's own default: high throughput."""


class Options(ctypes.Structure):
    """By value, as every function takes it."""

    _fields_ = [("words", ctypes.c_int32 * WORDS_OF_OPTIONS)]


class Alignments(ctypes.Structure):
    """In bytes, of each chunk, of where each goes, and of the room for work."""

    _fields_ = [("input", ctypes.c_size_t), ("output", ctypes.c_size_t), ("work", ctypes.c_size_t)]


class Properties(ctypes.Structure):
    """Version times 1000 and so on; that of the CUDA runtime within the library."""

    _fields_ = [("version", ctypes.c_uint32), ("cudart", ctypes.c_uint32)]


@dataclass(frozen=True, slots=True)
class Format:
    """One of the library's formats."""

    name: str
    """In the functions' names."""
    chunk_most: int
    """Bytes of a chunk, at the most, that its compressor takes."""
    option: int = 0
    """First word of the options of compression."""


FORMATS = {LZ4: Format("LZ4", 1 << 24), SNAPPY: Format("Snappy", 1 << 24), DEFLATE: Format("Deflate", 1 << 31, DEFLATE_LEVEL), ZSTD: Format("Zstd", (1 << 31) - 1)}
"""By codec number."""

_SIZE, _POINTER, _OUT = ctypes.c_size_t, ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)
ARGUMENTS: dict[str, list[Any]] = {
    "CompressGetRequiredAlignments": [Options, ctypes.POINTER(Alignments)],
    "CompressGetTempSize": [_SIZE, _SIZE, Options, _OUT, _SIZE, _POINTER],
    "CompressGetMaxOutputChunkSize": [_SIZE, Options, _OUT],
    "CompressAsync": [_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, Options, _POINTER, _POINTER],
    "DecompressGetRequiredAlignments": [Options, ctypes.POINTER(Alignments)],
    "DecompressGetTempSize": [_SIZE, _SIZE, Options, _OUT, _SIZE, _POINTER],
    "DecompressAsync": [_POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, Options, _POINTER, _POINTER],
}
"""Of each function of a format; all give a status."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Addresses on the device, each of an array of `count` 64-bit words; of 32-bit ones the statuses."""

    count: int
    chunks: int
    lengths: int
    targets: int
    """Where what comes of each chunk goes."""
    room: int
    """How much there is for it: for decompression only."""
    made: int
    """How long it became."""
    statuses: int
    work: int
    """Memory of the device that the library works in, and its bytes."""
    work_size: int


class Library:
    """The library, loaded and of the release that is known here."""

    def __init__(self, handle: Any) -> None:
        """`handle`: as ctypes loads it. Raises DeviceFailed where it is another library or release."""
        self._handle = handle
        try:
            found = Properties()
            handle.nvcompGetProperties(ctypes.byref(found))
            handle.nvcompGetStatusString.restype, handle.nvcompGetStatusString.argtypes = ctypes.c_char_p, [ctypes.c_int]
            if found.version // 1000 != RELEASE:
                raise DeviceFailed(f"nvCOMP: release {_version(found.version)} is there and {RELEASE} is known here; {INSTALL}")
            self._functions: dict[tuple[int, str], Any] = {}
            for codec, one in FORMATS.items():
                for name, arguments in ARGUMENTS.items():
                    function = getattr(handle, f"nvcompBatched{one.name}{name}")
                    function.restype, function.argtypes = ctypes.c_int, arguments
                    self._functions[codec, name] = function
        except AttributeError as error:
            raise DeviceFailed(f"nvCOMP: the library lacks a function ({error}); {INSTALL}") from None
        self.version = _version(found.version)
        self.cuda = f"{found.cudart // 1000}.{found.cudart % 1000 // 10}"
        """Of the runtime that it was built with."""

    def _call(self, codec: int, name: str, *arguments: Any) -> None:
        status = self._functions[codec, name](*arguments)
        if status:
            raise DeviceFailed(f"nvCOMP {FORMATS[codec].name} {name}: {self.text(status)}")

    def text(self, status: int) -> str:
        """A status in words, with its number."""
        said: bytes | None = self._handle.nvcompGetStatusString(status)
        return f"{said.decode(errors='replace') if said else 'unknown status'} ({status})"

    # Asked of the host; of Zstandard's work size only with a device.

    def alignment(self, codec: int) -> int:
        """Bytes that all memory given to a format must be aligned to: the strictest of what its functions ask for."""
        found = Alignments(), Alignments()
        self._call(codec, "CompressGetRequiredAlignments", _compressing(codec), ctypes.byref(found[0]))
        self._call(codec, "DecompressGetRequiredAlignments", _decompressing(), ctypes.byref(found[1]))
        return max(1, *(int(size) for one in found for size in (one.input, one.output, one.work)))

    def bound(self, codec: int, chunk: int) -> int:
        """Bytes that a chunk of so many may become at the most. Raises DeviceFailed for a chunk that is too long."""
        found = ctypes.c_size_t()
        self._call(codec, "CompressGetMaxOutputChunkSize", chunk, _compressing(codec), ctypes.byref(found))
        return int(found.value)

    def work_size(self, codec: int, count: int, chunk: int, *, compress: bool, stream: int) -> int:
        """Bytes of the device that the library works in, for a batch of so many chunks of so many bytes at the most."""
        found = ctypes.c_size_t()
        options = _compressing(codec) if compress else _decompressing()
        self._call(codec, "CompressGetTempSize" if compress else "DecompressGetTempSize", count, chunk, options, ctypes.byref(found), count * chunk, stream)
        return int(found.value)

    # Queued on the stream.

    def compress(self, codec: int, batch: Batch, chunk: int, stream: int) -> None:
        """A batch whose largest chunk has so many bytes."""
        self._call(
            codec, "CompressAsync", batch.chunks, batch.lengths, chunk, batch.count, batch.work, batch.work_size, batch.targets, batch.made, _compressing(codec), batch.statuses, stream,
        )

    def decompress(self, codec: int, batch: Batch, stream: int) -> None:
        """What is no valid input must not come here: what the library does with such is not defined."""
        self._call(
            codec, "DecompressAsync", batch.chunks, batch.lengths, batch.room, batch.made, batch.count, batch.work, batch.work_size, batch.targets, _decompressing(), batch.statuses, stream,
        )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 100}.{number % 100}"


def _compressing(codec: int) -> Options:
    return Options((ctypes.c_int32 * WORDS_OF_OPTIONS)(FORMATS[codec].option))


def _decompressing() -> Options:
    return Options((ctypes.c_int32 * WORDS_OF_OPTIONS)(BY_CUDA))


def _from_wheel() -> Any:
    """The library as its wheel loads it; None where the wheel does not find it."""
    from nvidia import libnvcomp

    return libnvcomp.load_library()


def load(loader: Callable[[], Any] = _from_wheel) -> Library:
    """Raises DeviceFailed with the reason."""
    try:
        handle = loader()
    except ImportError as error:
        raise DeviceFailed(f"nvCOMP is not installed ({error}); {INSTALL}") from None
    except OSError as error:
        raise DeviceFailed(f"nvCOMP does not load: {error}; {INSTALL}") from None
    if handle is None:
        raise DeviceFailed(f"nvCOMP does not load: its wheel is there and the library is not; {INSTALL}")
    return Library(handle)
