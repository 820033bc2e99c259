"""The format: whatever any encoder makes, any decoder reads; whatever is no extent of ours is refused, by name, and nothing comes of it."""

import random
from itertools import product

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_migration import choice, codecs, extents, layout
from gpu_migration.errors import BaseMismatch, FormatError, HashMismatch, MigrationError
from gpu_migration.layout import EXTENT, HEADER, IN_BASE, PAGE, Page
from gpu_migration.transforms import Facts, Flags, Known, Words
from gpu_migration.transforms.cpu import CPU

from .memory import changed, contents, memory


class Plain:
    """The transforms by plain loops over bytes: slow and obviously right; the measure of every back end."""

    name = "plain"

    def scan(self, pages: Words, base: Words | None) -> Facts:
        shared = 0 if base is None else len(base)
        return Known(
            np.array([len(set(row.tolist())) == 1 for row in pages], np.bool_),
            self.equal(pages[:shared], pages[:0] if base is None else base),
            np.array([sum((a ^ b).bit_count() for a, b in zip(row.tobytes(), other.tobytes(), strict=True)) for row, other in zip(pages, () if base is None else base, strict=False)], np.int64),
            np.array([int.from_bytes(blake3(row.tobytes()).digest(8), "little") for row in pages], np.uint64),
            np.array([len({row.tobytes()[8 * (17 + 61 * word) + byte] for word in range(8) for byte in range(0, 8, 2)}) for row in pages], np.uint16),
        )

    def equal(self, pages: Words, others: Words) -> Flags:
        return np.array([one.tobytes() == other.tobytes() for one, other in zip(pages, others, strict=True)], np.bool_)

    def xor(self, pages: Words, others: Words) -> Words:
        return np.array([[a ^ b for a, b in zip(one.tolist(), other.tolist(), strict=True)] for one, other in zip(pages, others, strict=True)], np.uint64).reshape(-1, 512)


BACK_ENDS = (CPU, Plain())


def decoded(encoded: bytes, **kwargs: object) -> bytes:
    out = memoryview(bytearray(EXTENT))
    extent = layout.unpack(encoded)
    out[:] = b"\xa5" * len(out)
    elsewhere = bytes(extents.decoded(extent, memoryview(bytearray(EXTENT)), **kwargs))  # type: ignore[arg-type]
    extents.decode(extent, out, **kwargs)  # type: ignore[arg-type]
    assert bytes(out[: extent.raw_length]) == elsewhere
    return elsewhere


def encode(data: bytes, coder: str = "lz4", index: int = 0, base: bytes | None = None, **kwargs: object) -> extents.Encoded:
    return extents.encode(index, data, lambda _: codecs.BY_NAME[coder], base=base, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("coder", [coder.name for coder in codecs.CODERS])
@given(data=contents(), seed=st.integers(0, 99), with_base=st.booleans())
@settings(max_examples=25)
def test_every_encoder_is_read_by_the_decoder(coder: str, data: bytes, seed: int, with_base: bool) -> None:
    base = changed(data, seed) if with_base else None
    for back_end in BACK_ENDS:
        encoded = encode(data, coder, 5, base, transforms=back_end)
        assert decoded(encoded.data, base=base) == data
        assert sum(encoded.counts) == layout.pages_of(len(data))
        assert len(encoded.data) <= layout.ENCODED_MAX


@given(data=contents(6), seed=st.integers(0, 99))
def test_back_ends_make_the_same_bytes(data: bytes, seed: int) -> None:
    made = {encode(data, "lz4", 2, changed(data, seed), transforms=back_end).data for back_end in BACK_ENDS}
    assert len(made) == 1


def test_every_class_of_page_occurs() -> None:
    data = memory(40, 3)
    encoded = encode(changed(data, 4) + 2 * memory(1, 5, ("text",)), base=data)
    assert all(encoded.counts[kind] for kind in Page), encoded.counts


def test_a_delta_is_taken_only_where_it_is_smaller() -> None:
    rng = random.Random(1)
    before = rng.randbytes(PAGE)
    little = bytearray(before)
    little[100] ^= 5
    text = (b"the quick brown fox " * 300)[:PAGE]
    encoded = encode(bytes(little) + text, base=before + rng.randbytes(PAGE))
    assert layout.unpack(encoded.data).classes.tolist() == [Page.DELTA, Page.CODED]


@given(data=contents(5), at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_always_seen(data: bytes, at: int, bit: int) -> None:
    encoded = bytearray(encode(data).data)
    encoded[at % len(encoded)] ^= 1 << bit
    with pytest.raises(FormatError):
        layout.unpack(encoded)


@given(data=contents(5), cut=st.integers(0, 10**6))
def test_a_truncated_extent_is_refused(data: bytes, cut: int) -> None:
    encoded = encode(data).data
    with pytest.raises(FormatError):
        layout.unpack(encoded[: cut % len(encoded)])


@given(st.binary(max_size=300))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(FormatError):
        layout.unpack(garbage)


def forged(data: bytes) -> bytes:
    """With its hash of coded made to agree, as one would who can."""
    before, body = data[: HEADER.size - 32], data[HEADER.size :]
    return before + blake3(before + body).digest() + body


@given(data=contents(5), seed=st.integers(0, 2**32), count=st.integers(1, 5))
@settings(max_examples=300)
def test_a_forged_extent_with_the_right_hash_raises_or_gives_the_right_bytes(data: bytes, seed: int, count: int) -> None:
    """The decoders see what only one with the key could send: still typed errors, never a wrong byte, never a crash."""
    rng = random.Random(seed)
    encoded = bytearray(encode(data, rng.choice(("lz4", "zstd-1", "deflate-1", "store"))).data)
    for _ in range(count):
        encoded[rng.choice((rng.randrange(len(encoded)), rng.randrange(min(len(encoded), 200))))] = rng.randrange(256)
    try:
        out = decoded(forged(bytes(encoded)), base=changed(data, 1))
    except MigrationError:
        return
    assert blake3(out).digest() == HEADER.unpack_from(encoded)[8]


def test_a_zstd_frame_that_claims_more_than_is_due_allocates_nothing() -> None:
    bomb = codecs.BY_NAME["zstd-1"].encode(bytes(200 << 20))
    with pytest.raises(FormatError, match="states"):
        codecs.decode(codecs.ZSTD, bomb, PAGE)
    with pytest.raises(FormatError):
        codecs.decode(codecs.DEFLATE, codecs.BY_NAME["deflate-1"].encode(bytes(1 << 20)), PAGE)
    with pytest.raises(FormatError):
        codecs.decode(9, b"x", 1)


def test_a_planted_collision_of_the_signature_changes_nothing() -> None:
    """Two pages that differ where the signature does not look; and a back end whose signatures are all one."""
    one = bytearray(memory(1, 5, ("text",)))
    other = bytearray(one)
    other[3000] ^= 1
    data = bytes(one + other + one)
    assert len(set(CPU.scan(extents.as_pages(data), None).signatures(np.arange(3)).tolist())) == 1
    encoded = encode(data)
    assert encoded.counts[Page.DUP] == 1 and decoded(encoded.data) == data

    class Colliding(type(CPU)):  # type: ignore[misc]
        def signatures(self, sample: Words) -> Words:
            return np.zeros(len(sample), np.uint64)

    many = memory(30, 6, ("text", "random"))
    assert decoded(encode(many, transforms=Colliding()).data) == many


def test_negative_control_a_signature_that_is_trusted_is_caught_by_the_hash() -> None:
    class Trusting(type(CPU)):  # type: ignore[misc]
        def equal(self, pages: Words, others: Words) -> Flags:
            return np.ones(len(pages), np.bool_)

    one = bytearray(memory(1, 5, ("text",)))
    other = bytearray(one)
    other[3000] ^= 1
    with pytest.raises(HashMismatch):
        decoded(encode(bytes(one + other), transforms=Trusting()).data)


def test_a_base_that_is_not_what_it_says() -> None:
    data = memory(12, 7)
    encoded = encode(changed(data, 8), base=data)
    for wrong in (changed(data, 9, 1.0), data[:PAGE], None):
        with pytest.raises(BaseMismatch):
            decoded(encoded.data, base=wrong)


def test_references_to_pages_elsewhere() -> None:
    data, none = memory(1, 11, ("text",)), np.zeros(0, np.uint64)
    classes = np.array([Page.DUP], np.uint8)

    def of(reference: int, index: int = 3) -> bytes:
        return layout.pack(index, 0, PAGE, blake3(data).digest(), classes, none, np.array([reference], np.uint64), b"", b"")

    def seven(number: int) -> bytes:
        return data if number == 7 else b""

    def wrong(_: int) -> bytes:
        return bytes(PAGE)

    assert decoded(of(7), page_at=seven) == data
    assert decoded(of(7 | IN_BASE), base_at=seven) == data
    with pytest.raises(BaseMismatch, match="is not here"):
        decoded(of(8), page_at=seven)
    for source in ({}, {"base_at": wrong}, {"page_at": seven}):
        with pytest.raises(BaseMismatch):
            decoded(of(7 | IN_BASE), **source)
    with pytest.raises(BaseMismatch):
        decoded(of(7), page_at=wrong)
    with pytest.raises(FormatError, match="reference itself"):
        decoded(of(3 * 256))


def test_zero_extents_are_small_and_the_same_either_way() -> None:
    assert encode(bytes(EXTENT)).data == extents.zero(0, EXTENT).data
    assert len(extents.zero(0, EXTENT).data) == HEADER.size + 1
    assert decoded(extents.zero(0, 5000).data) == bytes(5000)


def test_root_depends_on_order_length_and_content() -> None:
    a, b = blake3(b"a").digest(), blake3(b"b").digest()
    assert len({layout.root_of(length, hashes) for length, hashes in product((2 * EXTENT, 2 * EXTENT - 1), (a + b, b + a, a + a))}) == 6


def test_the_choice_follows_the_wire() -> None:
    def chosen(wire: float, guess: float) -> str:
        model = choice.Model(2, there=2)
        for _ in range(50):
            model.sent(int(wire), 1.0)
        return model.choose(EXTENT, EXTENT, guess).name

    assert chosen(50e9, 1.05) == "store"
    assert chosen(50e9, 2.5).startswith("lz4")  # hardly dearer, and it sends half
    assert chosen(0.01e9, 2.5) == "zstd-9"
    assert chosen(0.9e9, 2.5) not in ("store", "zstd-9")
    assert chosen(0.9e9, 1.0) == "store"


def test_the_guess_is_of_the_whole_extent_and_not_of_its_middle() -> None:
    """One sample of it all at one place, as it once was, says that such an extent does not shrink."""
    noise, text = random.Random(4).randbytes(EXTENT // 4), memory(96, 4, ("text",)) * 2
    data = memoryview(text[: 3 * EXTENT // 8] + noise + text[: 3 * EXTENT // 8])
    middle = data[EXTENT // 2 - choice.SAMPLE // 2 : EXTENT // 2 + choice.SAMPLE // 2]
    whole = len(data) / len(codecs.BY_NAME["lz4-fast"].encode(data))
    assert choice.guess_of(middle) < 1.05 < 1.5 < whole and abs(choice.guess_of(data) - whole) < whole / 2
    for size in (1, PAGE, choice.SAMPLE, choice.SAMPLE + 1, 2 * choice.SAMPLE + 77):
        assert choice.guess_of(data[:size]) >= 1.0


def test_where_the_processors_are_the_same_both_ends_are_charged_and_the_wire_is_not() -> None:
    def model(shared: bool) -> choice.Model:
        made = choice.Model(2, processors=2, there=2, shared=shared)
        for _ in range(50):
            made.sent(1, 1.0)  # as slow as can be: on one machine that is what the other end takes
            for name in made.names:
                made.taken_there(name, EXTENT, EXTENT, 0.0005, 0.0001 if name == "store" else 0.1)
        return made

    assert model(shared=True).choose(EXTENT, EXTENT, 2.5).name == "store"
    assert model(shared=False).choose(EXTENT, EXTENT, 2.5).name == "zstd-9"


def test_equal_pages_are_looked_for_where_the_wire_binds() -> None:
    def binds(limit: float, shared: bool, wire: float = 1e9) -> bool:
        model = choice.Model(2, processors=2, there=2, shared=shared, limit=limit)
        for _ in range(50):
            model.sent(int(wire), 1.0)
        return model.wire_binds(EXTENT, EXTENT)

    assert not binds(0.0, shared=True, wire=1) and not binds(10e9, shared=True) and binds(0.01e9, shared=True)
    assert binds(0.0, shared=False, wire=0.01e9) and not binds(0.0, shared=False, wire=50e9) and binds(0.01e9, shared=False, wire=50e9)


def test_a_quick_look_leaves_equal_and_dense_pages_to_the_codec() -> None:
    data = memory(4, 8, ("text",)) * 2 + random.Random(9).randbytes(2 * PAGE) + bytes(PAGE) + b"\7" * PAGE
    thorough, quick = encode(data), encode(data, thorough=False)
    assert thorough.counts[Page.DUP] == 4 and thorough.counts[Page.RAW] == 2
    assert quick.counts[Page.DUP] == quick.counts[Page.RAW] == 0 and quick.counts[Page.CODED] == 10
    assert quick.counts[Page.ZERO] == quick.counts[Page.CONST] == 1
    assert decoded(quick.data) == data == decoded(thorough.data)


@given(data=contents(), seed=st.integers(0, 99), with_base=st.booleans())
@settings(max_examples=25)
def test_a_quick_look_is_read_by_the_same_decoder_and_a_sealed_extent_only_as_such(data: bytes, seed: int, with_base: bool) -> None:
    base = changed(data, seed) if with_base else None
    quick = encode(data, "lz4-fast", 5, base, thorough=False, sealed=True)
    out = memoryview(bytearray(EXTENT))
    assert extents.decoded(layout.unpack(quick.data, sealed=True), out, base=base) == data
    with pytest.raises(FormatError, match="hash of its coded bytes"):
        layout.unpack(quick.data)


def test_zeros_are_packed_as_ever() -> None:
    for length in (1, 5000, EXTENT):
        classes, none = np.zeros(layout.pages_of(length), np.uint8), np.zeros(0, np.uint64)
        for sealed in (False, True):
            assert layout.pack_zeros(7, length, sealed=sealed) == layout.pack(7, 0, length, layout.zero_hash(length), classes, none, none, b"", b"", sealed=sealed)


def test_a_measurement_far_off_counts_for_little() -> None:
    model = choice.Model(2)
    before = model.scan.value
    model.scanned(1, 1e6)
    assert model.scan.value < 2 * before


def test_the_choice_learns_what_a_coder_really_costs() -> None:
    model = choice.Model(2, limit=0.5e9)
    first = model.choose(EXTENT, EXTENT, 2.5).name
    for _ in range(50):
        model.coded(first, EXTENT, EXTENT // 2, 1.0, 2.5)  # a second for a mebibyte
    assert [model.choose(EXTENT, EXTENT, 2.5).name for _ in range(choice.HOLDS)][-1] != first


def test_codec_names() -> None:
    assert choice.names_of("auto") == choice.FREE and choice.names_of("lz4,zstd-1") == ("lz4", "zstd-1")
    with pytest.raises(ValueError, match="brotli unknown"):
        choice.names_of("lz4,brotli")
