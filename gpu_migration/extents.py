"""Encode an extent from its bytes, and decode it again. Pure: no input or output, no clock."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from . import codecs, layout
from .errors import BaseMismatch, FormatError, HashMismatch
from .layout import CLASSES, CODED, CONST, DELTA, DUP, EXTENT, IN_BASE, PAGE, RAW, UNCHANGED, WORDS, ZERO
from .transforms import Facts, Rows, Transforms, Words
from .transforms.cpu import CPU

Choose = Callable[[memoryview], codecs.Coder]
"""From the bytes that are to be coded, the coder."""

PageAt = Callable[[int], bytes | None]
"""A page of the object that this end has already, or of the base; the last is cut short by the end. Empty or None where it has not."""


class Elsewhere(Protocol):
    """Pages that the destination holds in other extents."""

    def find(self, index: int, pages: Words, rows: Rows, marks: Words) -> tuple[Rows, Words]:
        """Of those pages, the ones that are equal to such a page, and its number."""

    def note(self, index: int, rows: Rows, marks: Words) -> None:
        """Those pages go out with their content."""


HOPELESS_BITS = PAGE * 8 * 3 // 8
"""Bits that differ from the base's page from which a delta is not tried: random bytes differ in half of them, text from other text in a quarter."""

_DELTA_CODER = codecs.BY_NAME["zstd-fast"]
"""What decides page by page whether a delta is smaller: quick, and the better the codec, the more alike its verdict."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded extent and what it was made of."""

    data: bytes
    raw_hash: bytes
    counts: tuple[int, ...]
    """Pages by class."""
    plain: int
    """Bytes that went into the codec."""
    coded: int
    """Bytes that came out."""
    coder: str


def as_pages(data: bytes | bytearray | memoryview) -> Words:
    """The bytes as whole pages, padded with zeros where the last one is not; a view where it is."""
    rest = len(data) % PAGE
    if rest:
        data = bytes(data) + bytes(PAGE - rest)
    return np.frombuffer(data, np.uint64).reshape(-1, WORDS)


def raw_hash(data: bytes | bytearray | memoryview) -> bytes:
    """As in the format."""
    return blake3(data).digest()


def zero(index: int, raw_length: int, *, sealed: bool = False) -> Encoded:
    """The encoded extent of a hole."""
    counts = (layout.pages_of(raw_length), *(0 for _ in range(CLASSES - 1)))
    return Encoded(layout.pack_zeros(index, raw_length, sealed=sealed), layout.zero_hash(raw_length), counts, 0, 0, "store")


def _duplicates(pages: Words, left: Rows, marks: Words, transforms: Transforms) -> tuple[Rows, Rows]:
    """Of the pages left, those equal to an earlier one that is left: (page, earlier page)."""
    ordered = np.sort(marks)
    if (ordered[1:] != ordered[:-1]).all():
        return left[:0], left[:0]  # nearly always
    _, first_with, inverse = np.unique(marks, return_index=True, return_inverse=True)
    origin = first_with[inverse]
    maybe = np.flatnonzero(origin != np.arange(len(left)))
    page, original = left[maybe], left[origin[maybe]]
    same = transforms.equal(pages[page], pages[original])
    page, original, unlike = page[same], original[same], page[~same]
    if len(unlike):  # a signature that is a sample mistook them; among themselves some may be equal
        first: dict[bytes, int] = {}
        again = [(row, earlier) for row in unlike.tolist() if (earlier := first.setdefault(pages[row].tobytes(), row)) != row]
        if again:
            page, original = np.concatenate([page, [row for row, _ in again]]), np.concatenate([original, [earlier for _, earlier in again]])
    return page, original


def _deltas(pages: Words, base: Words, left: Rows, facts: Facts, transforms: Transforms) -> Rows:
    """Of the pages left, those whose XOR with the base codes smaller than they do, each measured where there is hope."""
    left = left[facts.population(left) < HOPELESS_BITS]
    mine, changed = np.ascontiguousarray(pages[left]), transforms.xor(pages[left], base[left])
    smaller = [len(_DELTA_CODER.encode(changed[n])) < len(_DELTA_CODER.encode(mine[n])) for n in range(len(left))]
    return left[np.array(smaller, np.bool_)]


@dataclass(slots=True)
class Sorted:
    """An extent whose pages are sorted out, and of which nothing is coded yet. Holds views of what was sorted: to be used before that changes."""

    index: int
    raw_length: int
    raw_hash: bytes
    classes: NDArray[np.uint8]
    counts: tuple[int, ...]
    """Pages by class."""
    constants: Words
    references: NDArray[np.uint64]
    raw: bytes | memoryview
    plain: memoryview
    """What is to be coded: the pages of class coded, then the XORs of class delta. May be empty."""
    sealed: bool


def encode(
    index: int, data: bytes | bytearray | memoryview, choose: Choose, *, base: bytes | memoryview | None = None,
    transforms: Transforms = CPU, facts: Facts | None = None, elsewhere: Elsewhere | None = None, sealed: bool = False, thorough: bool = True,
) -> Encoded:
    """Encode one extent: `sort` it, let `choose` take a coder for what is to be coded, and `pack` it."""
    found = sort(index, data, base=base, transforms=transforms, facts=facts, elsewhere=elsewhere, sealed=sealed, thorough=thorough)
    return found if isinstance(found, Encoded) else code(found, choose(found.plain) if len(found.plain) else codecs.CODERS[0])


def sort(
    index: int, data: bytes | bytearray | memoryview, *, base: bytes | memoryview | None = None,
    transforms: Transforms = CPU, facts: Facts | None = None, elsewhere: Elsewhere | None = None, sealed: bool = False, thorough: bool = True,
) -> Sorted | Encoded:
    """Sort out the pages of one extent; encoded already where all are zeros. `base` are the bytes at the same place of what the destination has, as long as there are such, and need not be as long.

    `sealed`: as in `layout.pack`. `thorough`: look for equal pages and for such as no codec shrinks, which takes as long as a third of the coding and leaves some percent less. `facts`: of these very pages and this base, where they are known already. `elsewhere`: what pages may refer to outside the extent.
    """
    raw_length = len(data)
    if not 0 < raw_length <= EXTENT:
        raise ValueError(f"an extent has 1 to {EXTENT} bytes, not {raw_length}")
    pages = as_pages(data)
    fills = pages[:, 0]
    base_pages = as_pages(base)[: len(pages)] if base else None
    if facts is None:
        facts = transforms.scan(pages, base_pages)
    constant = facts.constant()
    some_constant = bool(constant.any())
    if some_constant and constant.all() and not fills.any():
        return zero(index, raw_length, sealed=sealed)  # most extents of a young guest: its hash is known
    digest = blake3(data).digest()
    classes = np.full(len(pages), CODED, np.uint8)
    if some_constant:
        classes[constant] = np.where(fills[constant] == 0, ZERO, CONST)
    if base_pages is not None:
        shared = len(base_pages)
        same = facts.unchanged()[:shared] & (classes[:shared] != ZERO)
        classes[:shared][same] = UNCHANGED
    left = (classes == CODED).nonzero()[0]
    references = np.zeros(len(pages), np.uint64)
    if thorough and len(left):
        marks = facts.signatures(left)
        if elsewhere is not None:
            repeated, numbers = elsewhere.find(index, pages, left, marks)
            if len(repeated):
                classes[repeated], references[repeated] = DUP, numbers
                still = classes[left] == CODED
                left, marks = left[still], marks[still]
        repeated, original = _duplicates(pages, left, marks, transforms)
        if len(repeated):
            classes[repeated], references[repeated] = DUP, original + index * layout.PAGES
            still = classes[left] == CODED
            left, marks = left[still], marks[still]
        if elsewhere is not None:
            elsewhere.note(index, left, marks)
    if base_pages is not None and len(left):
        classes[_deltas(pages, base_pages, left[left < len(base_pages)], facts, transforms)] = DELTA
        left = (classes == CODED).nonzero()[0]
    whole = len(left) == len(pages)
    if thorough and len(left):
        dense = facts.dense(left)
        if dense.any():
            classes[left[dense]] = RAW
            left, whole = left[~dense], False
    if whole:
        plain = pages.data.cast("B")
    else:
        parts = pages[left]
        if base_pages is not None and len(deltas := (classes == DELTA).nonzero()[0]):
            parts = np.concatenate([parts, transforms.xor(pages[deltas], base_pages[deltas])])
        plain = np.ascontiguousarray(parts).data.cast("B") if len(parts) else memoryview(b"")
    counts = np.bincount(classes, minlength=CLASSES)
    raw = pages[(classes == RAW).nonzero()[0]].data.cast("B") if counts[RAW] else b""
    return Sorted(index, raw_length, digest, classes, tuple(counts.tolist()), fills[classes == CONST], references[classes == DUP], raw, plain, sealed)


def code(found: Sorted, coder: codecs.Coder) -> Encoded:
    """Code it on this processor."""
    return pack(found, coder, coder.encode(found.plain) if len(found.plain) else b"")


def pack(found: Sorted, coder: codecs.Coder, coded: codecs.Buffer) -> Encoded:
    """The encoded extent, of what that coder made; stored where it did not shrink."""
    if len(coded) >= len(found.plain):
        coder, coded = codecs.CODERS[0], found.plain
    packed = layout.pack(found.index, coder.codec, found.raw_length, found.raw_hash, found.classes, found.constants, found.references, found.raw, coded, sealed=found.sealed)
    return Encoded(packed, found.raw_hash, found.counts, len(found.plain), len(coded), coder.name)


def _resolve(extent: layout.Extent, out: Words, page_at: PageAt | None, base_at: PageAt | None) -> bool:
    """Fill the pages that are references; whether any was to a page outside the extent."""
    rows = np.flatnonzero(extent.classes == DUP)
    first = extent.index * layout.PAGES
    here = (extent.references >= np.uint64(first)) & (extent.references < np.uint64(first + len(out)))
    if here.any():
        targets = (extent.references[here] - np.uint64(first)).astype(np.intp)
        if (extent.classes[targets] == DUP).any():
            raise FormatError(f"extent {extent.index}: a reference to a page that is a reference itself")
        out[rows[here]] = out[targets]
    for row, reference in zip(rows[~here].tolist(), extent.references[~here].tolist(), strict=True):
        number = reference & ~IN_BASE
        source = base_at if reference & IN_BASE else page_at
        found = source(number) if source is not None else b""
        if not found:
            raise BaseMismatch(f"extent {extent.index}: page {number} of the {'base' if reference & IN_BASE else 'object'} is not here; send the extent without references")
        out[row] = np.frombuffer(found.ljust(PAGE, b"\0"), np.uint64)
    return not here.all()


def decode(extent: layout.Extent, out: memoryview, *, base: bytes | memoryview | None = None, page_at: PageAt | None = None, base_at: PageAt | None = None) -> None:
    """Write the raw bytes of an extent to `out`, which has room for whole pages; they are there only if this returns. Raises as `decoded` does."""
    raw = decoded(extent, out, base=base, page_at=page_at, base_at=base_at)
    if raw.obj is not out.obj:
        out[: len(raw)] = raw


def decoded(extent: layout.Extent, room: memoryview, *, base: bytes | memoryview | None = None, page_at: PageAt | None = None, base_at: PageAt | None = None) -> memoryview:
    """The raw bytes of an extent, to be read only: in `room`, which is for whole pages, or wherever they are already, which spares a copy.

    Raises FormatError, BaseMismatch where the extent leans on a base or pages that are not here or not the right ones, HashMismatch otherwise.
    """
    count = len(extent.classes)
    classes = extent.classes
    kinds = extent.counts
    if kinds[ZERO] == count:
        if extent.raw_hash != layout.zero_hash(extent.raw_length):
            raise HashMismatch(f"extent {extent.index}: it is all zeros and its hash is another")
        return memoryview(layout.ZEROS)[: extent.raw_length]
    leans = bool(kinds[UNCHANGED] or kinds[DELTA])
    base_pages = as_pages(base)[:count] if base and leans else None
    if leans:
        needed = int(np.flatnonzero((classes == UNCHANGED) | (classes == DELTA))[-1]) + 1
        if base_pages is None or len(base_pages) < needed:
            raise BaseMismatch(f"extent {extent.index}: it leans on a base that is not here; send it without a base")
    plain = codecs.decode(extent.codec, extent.coded, extent.plain_length) if extent.plain_length else b""
    if kinds[CODED] == count:
        room = memoryview(plain)
    else:
        pages = np.frombuffer(room, np.uint64)[: count * WORDS].reshape(count, WORDS)
        rows = np.frombuffer(plain, np.uint64).reshape(-1, WORDS)
        if kinds[ZERO]:
            pages[(classes == ZERO).nonzero()[0]] = 0
        if len(extent.constants):
            pages[classes == CONST] = extent.constants[:, None]
        if len(extent.raw):
            pages[(classes == RAW).nonzero()[0]] = np.frombuffer(extent.raw, np.uint64).reshape(-1, WORDS)
        if len(rows):
            split = kinds[CODED]
            pages[(classes == CODED).nonzero()[0]] = rows[:split]
            if base_pages is not None and split < len(rows):
                deltas = np.flatnonzero(classes == DELTA)
                pages[deltas] = rows[split:] ^ base_pages[deltas]
        if base_pages is not None:
            unchanged = np.flatnonzero(classes == UNCHANGED)
            pages[unchanged] = base_pages[unchanged]
        if len(extent.references):
            leans |= _resolve(extent, pages, page_at, base_at)
    raw = room[: extent.raw_length]
    if blake3(raw).digest() != extent.raw_hash:
        if leans:
            raise BaseMismatch(f"extent {extent.index}: with the base or the pages of this end other bytes come out; they are not what the sender takes them for")
        raise HashMismatch(f"extent {extent.index}: other bytes came out than went in")
    return raw
