"""The codecs that every destination can decode, by their number in the format; the libraries release the interpreter's lock while they work."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lz4.block
import zstandard
from isal import isal_zlib

try:
    import cramjam as _cramjam
except ImportError:  # an extra: only who asks for Snappy needs it, at both ends
    cramjam: Any = None
else:
    cramjam = _cramjam

from .errors import FormatError

STORE, LZ4, ZSTD, DEFLATE, SNAPPY = 0, 1, 2, 3, 4
"""Codec numbers of the format. They say what the bytes are, not who made them: a GPU's LZ4 block is an LZ4 block."""

NO_SNAPPY = "Snappy needs cramjam here: pip install 'novacron[snappy]'"

_RAW_DEFLATE = -15
"""Window bits of a deflate stream without header or checksum: the extent has both."""

_DEFLATE_ERROR: Any = isal_zlib.error  # its stubs call the class an instance

_local = threading.local()

Buffer = bytes | bytearray | memoryview


def _zstd_encoder(level: int) -> Any:
    """A compressor may not be shared between threads."""
    made: dict[int, Any] | None = getattr(_local, "encoders", None)
    if made is None:
        made = _local.encoders = {}
    if level not in made:
        made[level] = zstandard.ZstdCompressor(level=level, write_content_size=True)
    return made[level]


def _zstd_decoder() -> Any:
    made = getattr(_local, "decoder", None)
    if made is None:
        made = _local.decoder = zstandard.ZstdDecompressor()
    return made


@dataclass(frozen=True, slots=True)
class Coder:
    """One way to encode: a codec and its level. What it makes is described by the codec alone."""

    name: str
    codec: int
    encode: Callable[[Any], Buffer]
    """What comes out may be what went in: to be used before that changes."""


_SNAPPY = (Coder("snappy", SNAPPY, lambda data: bytes(cramjam.snappy.compress_raw(data))),) if cramjam is not None else ()

CODERS = (
    Coder("store", STORE, lambda data: data),
    Coder("lz4", LZ4, lambda data: bytes(lz4.block.compress(data, store_size=False))),
    Coder("lz4-fast", LZ4, lambda data: bytes(lz4.block.compress(data, mode="fast", acceleration=16, store_size=False))),
    Coder("lz4-faster", LZ4, lambda data: bytes(lz4.block.compress(data, mode="fast", acceleration=32, store_size=False))),
    Coder("zstd-fast", ZSTD, lambda data: bytes(_zstd_encoder(-3).compress(data))),
    Coder("zstd-1", ZSTD, lambda data: bytes(_zstd_encoder(1).compress(data))),
    Coder("zstd-3", ZSTD, lambda data: bytes(_zstd_encoder(3).compress(data))),
    Coder("zstd-9", ZSTD, lambda data: bytes(_zstd_encoder(9).compress(data))),
    Coder("deflate-1", DEFLATE, lambda data: bytes(isal_zlib.compress(data, 1, _RAW_DEFLATE))),
    *_SNAPPY,
)
"""What an encoder chooses from."""

BY_NAME = {coder.name: coder for coder in CODERS}


LIKE = {"nv-lz4": "lz4-fast", "nv-zstd": "zstd-fast", "nv-deflate": "deflate-1", **({"nv-snappy": "snappy"} if _SNAPPY else {})}
"""Coders that run on a GPU, where nvCOMP is there and was proved, and the processor's of the same format that take their place where it is not worth the GPU, or fails."""

ON_GPU = {name: Coder(name, BY_NAME[like].codec, BY_NAME[like].encode) for name, like in LIKE.items()}
"""For what is chosen by name; that they are on the GPU is for who encodes."""


def _zstd(data: Buffer, length: int) -> Buffer:
    stated = zstandard.get_frame_parameters(data).content_size
    if stated != length:  # before anything is allocated: the frame's own word is the attacker's
        raise FormatError(f"zstd frame states {stated} bytes and {length} are due")
    return bytes(_zstd_decoder().decompress(data, max_output_size=length, allow_extra_data=False))


def _deflate(data: Buffer, length: int) -> Buffer:
    decoder = isal_zlib.decompressobj(wbits=_RAW_DEFLATE)
    out: bytes = decoder.decompress(data, length + 1)
    if not decoder.eof or decoder.unused_data:
        raise FormatError("deflate stream does not end where it should")
    return out


def _snappy(data: Buffer, length: int) -> Buffer:
    if cramjam is None:
        raise FormatError(NO_SNAPPY)
    stated = shift = 0
    for byte in bytes(data[:5]):  # its first bytes state the length, seven bits each
        stated |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            break
    if stated != length:  # as with zstd's
        raise FormatError(f"Snappy block states {stated} bytes and {length} are due")
    out = bytearray(length)
    try:
        wrote = cramjam.snappy.decompress_raw_into(data, out)
    except cramjam.DecompressionError as error:
        raise FormatError(f"codec {SNAPPY}: the coded section cannot be decoded: {error}") from None
    return out if wrote == length else out[:wrote]


def decode(codec: int, data: Buffer, length: int) -> Buffer:
    """The bytes of a coded section, exactly `length` of them; never allocates more than that. Raises FormatError."""
    try:
        if codec == STORE:
            out = data
        elif codec == LZ4:
            out = lz4.block.decompress(data, uncompressed_size=length)
        elif codec == ZSTD:
            out = _zstd(data, length)
        elif codec == DEFLATE:
            out = _deflate(data, length)
        elif codec == SNAPPY:
            out = _snappy(data, length)
        else:
            raise FormatError(f"codec {codec} is unknown here; use the same release at both ends")
    except (lz4.block.LZ4BlockError, zstandard.ZstdError, _DEFLATE_ERROR, ValueError) as error:
        raise FormatError(f"codec {codec}: the coded section cannot be decoded: {error}") from None
    if len(out) != length:
        raise FormatError(f"codec {codec}: {len(out)} bytes came out and {length} are due")
    return out
