"""The formats, not their makers: what any implementation of a format makes, each other one reads, and the engine's decoder too. Over all implementations that are here; those on a GPU are in test_nvcomp."""

import random
import zlib
from collections.abc import Callable
from itertools import product

import lz4.block
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from gpu_migration import choice, codecs
from gpu_migration.errors import FormatError

from .memory import contents, memory

cramjam = pytest.importorskip("cramjam", reason="no cramjam: pip install 'novacron[snappy]'")

Maker = Callable[[bytes], bytes]
Reader = Callable[[bytes, int], bytes]


def plain_snappy(coded: bytes, length: int) -> bytes:
    """By the format's description, byte by byte: slow and obviously right."""
    at = stated = shift = 0
    while True:
        stated, shift, more, at = stated | (coded[at] & 0x7F) << shift, shift + 7, coded[at] & 0x80, at + 1
        if not more:
            break
    assert stated == length
    out = bytearray()
    while at < len(coded):
        tag, at = coded[at], at + 1
        kind, size = tag & 3, tag >> 2
        if kind == 0:
            extra = size - 59 if size >= 60 else 0
            size, at = (int.from_bytes(coded[at : at + extra], "little") if extra else size) + 1, at + extra
            out += coded[at : at + size]
            at += size
            continue
        if kind == 1:
            size, offset, at = (tag >> 2 & 7) + 4, (tag >> 5) << 8 | coded[at], at + 1
        else:
            width = 2 if kind == 2 else 4
            size, offset, at = size + 1, int.from_bytes(coded[at : at + width], "little"), at + width
        assert 0 < offset <= len(out)
        for _ in range(size):
            out.append(out[-offset])
    return bytes(out)


def any_snappy(data: bytes, seed: int = 1) -> bytes:
    """A valid block of it that no usual maker makes: literals of every form, copies of every form, in no good order."""
    rng, at, size = random.Random(seed), 0, len(data)
    out = bytearray()
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    while at < len(data):
        back = rng.randint(1, at) if at else 0
        same = 0
        while back and same < 64 and at + same < len(data) and data[at + same] == data[at + same - back]:
            same += 1
        if 4 <= same <= 11 and back < 2048 and rng.random() < 0.5:
            out += bytes((1 | (same - 4) << 2 | back >> 8 << 5, back & 0xFF))
        elif same and back < 1 << 16 and rng.random() < 0.7:
            out += bytes((2 | (same - 1) << 2,)) + back.to_bytes(2, "little")
        elif same:
            out += bytes((3 | (same - 1) << 2,)) + back.to_bytes(4, "little")
        else:
            same = min(rng.choice((1, 7, 60, 61, 300, 70_000)), len(data) - at)
            width = rng.choice([width for width in range(5) if same <= (60 if not width else 256**width)])
            out += bytes(((59 + width if width else same - 1) << 2,)) + ((same - 1).to_bytes(width, "little") if width else b"") + data[at : at + same]
        at += same
    return bytes(out)


def raw_deflate(level: int, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> Maker:
    def make(data: bytes) -> bytes:
        made = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
        return made.compress(data) + made.flush()

    return make


ENGINE: dict[int, list[Maker]] = {}
for coder in (*codecs.CODERS, *codecs.ON_GPU.values()):
    ENGINE.setdefault(coder.codec, []).append(lambda data, made=coder: bytes(made.encode(data)))  # type: ignore[misc]

MAKERS: dict[int, list[Maker]] = {
    codecs.LZ4: [*ENGINE[codecs.LZ4], lambda data: bytes(cramjam.lz4.compress_block(data, store_size=False)), lambda data: lz4.block.compress(data, mode="high_compression", store_size=False)],
    codecs.ZSTD: [*ENGINE[codecs.ZSTD], lambda data: zstandard.ZstdCompressor(level=19, write_checksum=True).compress(data)],
    codecs.DEFLATE: [
        *ENGINE[codecs.DEFLATE], raw_deflate(0), raw_deflate(1), raw_deflate(6, zlib.Z_FIXED), raw_deflate(6, zlib.Z_HUFFMAN_ONLY), raw_deflate(9),
        lambda data: bytes(cramjam.deflate.compress(data)), lambda data: bytes(isal_zlib.compress(data, 3, -15)),
    ],
    codecs.SNAPPY: [*ENGINE[codecs.SNAPPY], any_snappy],
}
READERS: dict[int, list[Reader]] = {
    codecs.LZ4: [lambda coded, length: lz4.block.decompress(coded, uncompressed_size=length), lambda coded, length: bytes(cramjam.lz4.decompress_block(coded, output_len=length))],
    codecs.ZSTD: [lambda coded, length: zstandard.ZstdDecompressor().decompress(coded, max_output_size=length), lambda coded, length: bytes(cramjam.zstd.decompress(coded))],
    codecs.DEFLATE: [lambda coded, length: zlib.decompress(coded, -15), lambda coded, length: bytes(isal_zlib.decompress(coded, -15)), lambda coded, length: bytes(cramjam.deflate.decompress(coded))],
    codecs.SNAPPY: [lambda coded, length: bytes(cramjam.snappy.decompress_raw(coded)), plain_snappy],
}
NAMES = {codecs.LZ4: "lz4", codecs.ZSTD: "zstd", codecs.DEFLATE: "deflate", codecs.SNAPPY: "snappy"}


@pytest.mark.parametrize("codec", NAMES, ids=NAMES.get)
@given(data=contents(8))
@example(data=memory(256, 3))
@example(data=b"\0")
@settings(max_examples=25, deadline=None)
def test_every_maker_of_a_format_is_read_by_every_reader(codec: int, data: bytes) -> None:
    def ours(coded: bytes, length: int) -> bytes:
        return bytes(codecs.decode(codec, coded, length))

    for (n, make), (m, read) in product(enumerate(MAKERS[codec]), enumerate([ours, *READERS[codec]])):
        assert read(make(data), len(data)) == data, f"{NAMES[codec]}: maker {n}, reader {m}"


def test_negative_control_a_maker_of_another_format_is_not_read() -> None:
    """Deflate in zlib's wrapping, LZ4 with a length before it, a Snappy frame and a zstd frame without its size are other formats."""
    data = memory(3, 4, ("text",))
    streamed = zstandard.ZstdCompressor(write_content_size=False).compress(data)
    others = (
        (codecs.DEFLATE, zlib.compress(data)), (codecs.LZ4, lz4.block.compress(data, store_size=True)), (codecs.SNAPPY, bytes(cramjam.snappy.compress(data))), (codecs.ZSTD, streamed),
    )
    for codec, coded in others:
        with pytest.raises(FormatError):
            codecs.decode(codec, coded, len(data))


@given(data=contents(3), seed=st.integers(0, 2**32), count=st.integers(1, 5), cut=st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_a_damaged_snappy_block_raises_or_has_the_right_length(data: bytes, seed: int, count: int, cut: int) -> None:
    rng, coded = random.Random(seed), bytearray(codecs.BY_NAME["snappy"].encode(data))
    for _ in range(count):
        coded[rng.randrange(len(coded))] = rng.randrange(256)
    try:
        assert len(codecs.decode(codecs.SNAPPY, bytes(coded[: len(coded) - cut]), len(data))) == len(data)
    except FormatError:
        pass


def test_a_snappy_block_that_claims_more_than_is_due_allocates_nothing() -> None:
    bomb = codecs.BY_NAME["snappy"].encode(bytes(200 << 20))
    for length in (4096, 0):
        with pytest.raises(FormatError, match="states"):
            codecs.decode(codecs.SNAPPY, bomb, length)


def test_snappy_is_for_those_who_ask_for_it() -> None:
    assert "snappy" not in choice.FREE and not {"nv-snappy", "snappy"} & set(choice.FREE_ON_GPU)
    assert choice.names_of("snappy,nv-snappy,nv-lz4") == ("snappy", "nv-snappy", "nv-lz4")
    assert choice.names_of("auto") == choice.FREE
