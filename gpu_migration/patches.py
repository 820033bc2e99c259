"""Pages of a guest that runs, wherever they lie, as one record: their numbers, then their bytes as one extent of the format. Pure.

    count u16 | page numbers u64 each, ascending | an encoded extent of so many pages, index 0, without a base and with references only to itself

or, where coding takes longer than the wire does, as they are:

    count u16 | page numbers u64 each, ascending | the pages
"""

import struct

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from . import extents, layout
from .errors import FormatError
from .layout import PAGE

MOST = layout.PAGES - 1
"""Pages of a record: with their numbers it is then no longer than the longest record of an extent."""
_COUNT = struct.Struct("<H")


def pack(numbers: NDArray[np.int64], data: memoryview, choose: extents.Choose) -> tuple[bytes, extents.Encoded]:
    """One record, of 1 to MOST pages; `data` are their bytes one after the other."""
    if not 0 < len(numbers) <= MOST or len(data) != len(numbers) * PAGE:
        raise ValueError(f"a record has 1 to {MOST} pages and their bytes, not {len(numbers)} and {len(data)} bytes")
    encoded = extents.encode(0, data, choose)
    return b"".join((_COUNT.pack(len(numbers)), numbers.astype("<u8").tobytes(), encoded.data)), encoded


def unpack(payload: memoryview, scratch: memoryview, pages: int) -> tuple[NDArray[np.int64], memoryview]:
    """Numbers and bytes of a record for a memory of `pages` pages; the bytes are in `scratch`, which has room for an extent. Raises FormatError, HashMismatch."""
    numbers, rest = _numbers(payload, pages)
    extent = layout.unpack(rest)
    if extent.index or extent.raw_length != len(numbers) * PAGE:
        raise FormatError(f"patch: its extent has not {len(numbers)} pages")
    extents.decode(extent, scratch)
    return numbers, scratch[: extent.raw_length]


def unpack_plain(payload: memoryview, pages: int) -> tuple[NDArray[np.int64], memoryview]:
    """The same of a record of pages as they are; their bytes are those of the record. Raises FormatError."""
    numbers, rest = _numbers(payload, pages)
    if len(rest) != len(numbers) * PAGE:
        raise FormatError(f"patch: it has not {len(numbers)} pages")
    return numbers, rest


def _numbers(payload: memoryview, pages: int) -> tuple[NDArray[np.int64], memoryview]:
    """The numbers of a record, and what follows them. Raises FormatError."""
    if len(payload) < _COUNT.size:
        raise FormatError("patch: truncated")
    (count,) = _COUNT.unpack_from(payload)
    end = _COUNT.size + 8 * count
    if not 0 < count <= MOST or len(payload) <= end:
        raise FormatError(f"patch: {count} pages are not within 1 to {MOST}, or are truncated")
    numbers = np.frombuffer(payload[_COUNT.size : end], "<u8")
    if (numbers >= pages).any() or (numbers[1:] <= numbers[:-1]).any():
        raise FormatError("patch: its page numbers do not ascend within the memory")
    return numbers.astype(np.int64), payload[end:]


class Plain:
    """Makes records of pages as they are, each in the same place."""

    def __init__(self) -> None:
        self._buffer = bytearray(_COUNT.size + (8 + PAGE) * MOST)

    def pack(self, numbers: NDArray[np.int64], memory: NDArray[np.uint8]) -> tuple[memoryview, memoryview]:
        """One of 1 to MOST pages out of a memory (pages x PAGE bytes), which may change meanwhile: each byte is read once. The record and, in it, the pages; both hold until the next call."""
        count = len(numbers)
        if not 0 < count <= MOST:
            raise ValueError(f"a record has 1 to {MOST} pages, not {count}")
        start = _COUNT.size + 8 * count
        _COUNT.pack_into(self._buffer, 0, count)
        np.frombuffer(self._buffer, "<u8", count, _COUNT.size)[:] = numbers
        np.take(memory, numbers, axis=0, out=np.frombuffer(self._buffer, np.uint8, count * PAGE, start).reshape(count, PAGE), mode="clip")
        whole = memoryview(self._buffer)[: start + count * PAGE]
        return whole, whole[start:]


def chain(before: bytes, payload: bytes | bytearray | memoryview) -> bytes:
    """What two ends that have sent and applied the same, in the same order, have in common."""
    return blake3(before).update(payload).digest()


def follow(before: bytes, payload: bytes | memoryview) -> bytes:
    """The chain after a record of coded pages (`chain` itself is that after one of pages as they are): over its numbers and its extent's header, whose hash covers the rest."""
    (count,) = _COUNT.unpack_from(payload)
    return chain(before, payload[: _COUNT.size + 8 * count + layout.HEADER.size])

