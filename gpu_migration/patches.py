"""Pages of a guest that runs, wherever they lie, as one record: their numbers, then their bytes as one extent of the format. Pure.

    count u16 | page numbers u64 each, ascending | an encoded extent of so many pages, index 0, without a base and with references only to itself
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
    if len(payload) < _COUNT.size:
        raise FormatError("patch: truncated")
    (count,) = _COUNT.unpack_from(payload)
    end = _COUNT.size + 8 * count
    if not 0 < count <= MOST or len(payload) <= end:
        raise FormatError(f"patch: {count} pages are not within 1 to {MOST}, or are truncated")
    numbers = np.frombuffer(payload[_COUNT.size : end], "<u8")
    if (numbers >= pages).any() or (numbers[1:] <= numbers[:-1]).any():
        raise FormatError("patch: its page numbers do not ascend within the memory")
    extent = layout.unpack(payload[end:])
    if extent.index or extent.raw_length != count * PAGE:
        raise FormatError(f"patch: its extent has not {count} pages")
    extents.decode(extent, scratch)
    return numbers.astype(np.int64), scratch[: extent.raw_length]


def chain(before: bytes, payload: bytes | bytearray | memoryview) -> bytes:
    """What two ends that have sent and applied the same, in the same order, have in common."""
    return blake3(before).update(payload).digest()


def follow(before: bytes, payload: bytes | memoryview) -> bytes:
    """The chain after a record: over its numbers and its extent's header, whose hash covers the rest."""
    (count,) = _COUNT.unpack_from(payload)
    return chain(before, payload[: _COUNT.size + 8 * count + layout.HEADER.size])

