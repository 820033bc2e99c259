"""The format: an object is cut into extents of 1 MiB, each encoded on its own, self-describing and with the hashes of what went in and of what is stored.

An encoded extent, integers little-endian:

    magic 4s "NVXT" | version u8 | codec u8 | page shift u8 | flags u8 | index u64 | raw length u32 | body length u32 | hash of raw 32 | hash of coded 32
    body = page map (one byte a page, or one byte for all: flag UNIFORM) | constants u64 each | references u64 each | raw pages | coded section

The lengths of constants, references, raw pages and of the decoded coded section follow from the page map. The coded section is the pages of class CODED, then
those of DELTA as XOR with the base's page, in page order, in the codec of the header. A last page that is not whole is padded with zeros; the hash of raw
covers the raw length only. The hash of coded covers the header before it and the body; within a sealed record, which says more than it, zeros may stand for it. Both are BLAKE3.

A reference is a page of the object: of this extent (and then not itself a reference) or of one that the destination holds already; with bit 63 set, of the base.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from .errors import FormatError

MAGIC = b"NVXT"
VERSION = 1
EXTENT = 1 << 20
"""Bytes of an extent: large enough for the codec's ratio (+10 % over 64 KiB units), small enough to be resent without pain and to stay in a core's cache."""
PAGE_SHIFT = 12
PAGE = 1 << PAGE_SHIFT
"""Bytes of a page: the guest's."""
WORDS = PAGE // 8
PAGES = EXTENT // PAGE
UNIFORM = 1
"""Flag: the page map is one byte, the class of all pages."""
IN_BASE = 1 << 63
"""Bit of a reference: a page of the base."""
HASH = 32
HEADER = struct.Struct("<4sBBBBQII32s32s")
_BEFORE_CODED_HASH = HEADER.size - HASH
_UNSTATED = bytes(HASH)
"""In place of the hash of coded, within a sealed record."""
ENCODED_MAX = HEADER.size + PAGES * 9 + EXTENT
"""The largest encoded extent, bytes: every page raw, or a map and operands; coding that grows is not used."""
OBJECT_MAX = 1 << 44
"""Largest object, bytes: 16 TiB, a table of 512 MiB of hashes; a length beyond it is a mistake or an attack."""


class Page(IntEnum):
    """Class of a page, as in the page map."""

    ZERO = 0
    CONST = 1
    UNCHANGED = 2
    DUP = 3
    DELTA = 4
    RAW = 5
    CODED = 6


ZERO, CONST, UNCHANGED, DUP, DELTA, RAW, CODED = (int(kind) for kind in Page)
"""The same as plain numbers, for where every extent passes: an enumeration's member takes a microsecond to be looked up."""
CLASSES = len(Page)

Map = NDArray[np.uint8]
Words = NDArray[np.uint64]
"""Pages as 64-bit words: shape (pages, 512)."""


@dataclass(frozen=True, slots=True)
class Extent:
    """An encoded extent, taken apart but not decoded; the views lie in the bytes it was parsed from."""

    index: int
    codec: int
    raw_length: int
    raw_hash: bytes
    classes: Map
    """One a page."""
    constants: Words
    references: Words
    raw: memoryview
    coded: memoryview
    counts: tuple[int, ...]
    """Pages of each class."""

    @property
    def plain_length(self) -> int:
        """Bytes of the coded section once decoded."""
        return (self.counts[CODED] + self.counts[DELTA]) * PAGE


_NO_WORDS: Words = np.zeros(0, np.uint64)
_NO_OTHERS = (0,) * (CLASSES - 1)


def pages_of(length: int) -> int:
    """Pages of so many bytes, the last one perhaps not whole."""
    return (length + PAGE - 1) >> PAGE_SHIFT


def extents_of(length: int) -> int:
    """Extents of an object of so many bytes."""
    return (length + EXTENT - 1) // EXTENT


def extent_length(length: int, index: int) -> int:
    """Raw bytes of one extent of an object."""
    return min(EXTENT, length - index * EXTENT)


def pack(
    index: int, codec: int, raw_length: int, raw_hash: bytes, classes: Map, constants: Words, references: Words, raw: bytes | memoryview, coded: bytes | bytearray | memoryview, *, sealed: bool = False
) -> bytes:
    """One encoded extent. `sealed`: it goes into an authenticated record and nowhere else; zeros stand for the hash of coded then."""
    first = int(classes[0])
    uniform = bool((classes == first).all())
    flags = UNIFORM if uniform else 0
    page_map = bytes((first,)) if uniform else classes.tobytes()
    parts = (page_map, constants.astype("<u8", copy=False).tobytes(), references.astype("<u8", copy=False).tobytes(), raw, coded)
    length = sum(len(part) for part in parts)
    before = HEADER.pack(MAGIC, VERSION, codec, PAGE_SHIFT, flags, index, raw_length, length, raw_hash, b"")[:_BEFORE_CODED_HASH]
    if sealed:
        return b"".join((before, _UNSTATED, *parts))
    digest = blake3(before)
    for part in parts:
        if len(part):
            digest.update(part)
    return b"".join((before, digest.digest(), *parts))


def pack_zeros(index: int, raw_length: int, *, sealed: bool = False) -> bytes:
    """An extent of zeros, as `pack` makes it: half of a guest's memory, for which that takes longer than all else."""
    before = HEADER.pack(MAGIC, VERSION, 0, PAGE_SHIFT, UNIFORM, index, raw_length, 1, zero_hash(raw_length), b"")[:_BEFORE_CODED_HASH]
    return before + (_UNSTATED if sealed else blake3(before + b"\0").digest()) + b"\0"


def index_of(encoded: bytes | bytearray | memoryview) -> int:
    """Which extent an encoded one says that it is. Raises FormatError; nothing else is looked at."""
    if len(encoded) < HEADER.size:
        raise FormatError(f"extent: truncated, {len(encoded)} bytes are less than its header of {HEADER.size}; send it again")
    return int(HEADER.unpack_from(encoded)[5])


def unpack(encoded: bytes | bytearray | memoryview, *, sealed: bool = False) -> Extent:
    """Take an encoded extent apart; every length and the hash of coded are checked. Raises FormatError.

    `sealed`: the bytes came out of an authenticated record as they were packed, which is more than their hash says; it is not computed then.
    """
    view = memoryview(encoded)
    if len(view) < HEADER.size:
        raise FormatError(f"extent: truncated, {len(view)} bytes are less than its header of {HEADER.size}; send it again")
    magic, version, codec, shift, flags, index, raw_length, length, raw_hash, coded_hash = HEADER.unpack_from(view)
    if magic != MAGIC:
        raise FormatError("extent: wrong magic; these bytes are no encoded extent")
    if version != VERSION:
        raise FormatError(f"extent: version {version} is not {VERSION}; use the same release at both ends")
    if shift != PAGE_SHIFT or flags & ~UNIFORM:
        raise FormatError(f"extent {index}: page shift {shift} or flags {flags:#x} are unknown in version {VERSION}")
    if index >= OBJECT_MAX // EXTENT:
        raise FormatError(f"extent {index}: beyond the largest object")
    if not 0 < raw_length <= EXTENT:
        raise FormatError(f"extent {index}: raw length {raw_length} is not within 1 to {EXTENT}")
    if length != len(view) - HEADER.size:
        raise FormatError(f"extent {index}: truncated or padded, {len(view) - HEADER.size} bytes follow the header and {length} are promised")
    if not sealed and blake3(view[:_BEFORE_CODED_HASH]).update(view[HEADER.size :]).digest() != coded_hash:
        raise FormatError(f"extent {index}: the hash of its coded bytes does not agree; it was damaged")
    body, pages = view[HEADER.size :], pages_of(raw_length)
    if flags & UNIFORM and length == 1 and not body[0]:
        return Extent(index, codec, raw_length, bytes(raw_hash), np.zeros(pages, np.uint8), _NO_WORDS, _NO_WORDS, body[1:], body[1:], (pages, *_NO_OTHERS))
    map_length = 1 if flags & UNIFORM else pages
    if len(body) < map_length:
        raise FormatError(f"extent {index}: its page map is truncated")
    classes = np.frombuffer(body[:map_length], np.uint8)
    if flags & UNIFORM:
        classes = np.full(pages, classes[0], np.uint8)
    counts = np.bincount(classes, minlength=CLASSES).tolist()
    if len(counts) > CLASSES:
        raise FormatError(f"extent {index}: page class {int(classes.max())} is unknown in version {VERSION}")
    constants_end = map_length + 8 * counts[CONST]
    references_end = constants_end + 8 * counts[DUP]
    raw_end = references_end + PAGE * counts[RAW]
    if raw_end > len(body):
        raise FormatError(f"extent {index}: its page map needs {raw_end} bytes and {len(body)} are there")
    if bool(counts[CODED] or counts[DELTA]) != (raw_end < len(body)):
        raise FormatError(f"extent {index}: coded pages without a coded section, or the other way round")
    return Extent(
        index, codec, raw_length, bytes(raw_hash), classes, np.frombuffer(body[map_length:constants_end], "<u8"), np.frombuffer(body[constants_end:references_end], "<u8"),
        body[references_end:raw_end], body[raw_end:], tuple(counts),
    )


def root_of(length: int, hashes: bytes | bytearray | memoryview) -> bytes:
    """The root hash of an object: its length, the extent size and the raw hashes of its extents in order."""
    return blake3(b"novacron object 1\0" + struct.pack("<QI", length, EXTENT)).update(hashes).digest()


ZEROS = bytes(EXTENT)
"""An extent of zeros."""

_ZERO_HASHES: dict[int, bytes] = {}


def zero_hash(length: int) -> bytes:
    """Raw hash of an extent of zeros."""
    found = _ZERO_HASHES.get(length)
    if found is None:
        found = _ZERO_HASHES[length] = blake3(memoryview(ZEROS)[:length]).digest()
        if len(_ZERO_HASHES) > 64:  # odd last extents of many objects
            _ZERO_HASHES.clear()
    return found
