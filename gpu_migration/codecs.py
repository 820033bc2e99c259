"""The codecs that every destination can decode, by their number in the format; the libraries release the interpreter's lock while they work."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lz4.block
import zstandard
from isal import isal_zlib

from .errors import FormatError

STORE, LZ4, ZSTD, DEFLATE = 0, 1, 2, 3
"""Codec numbers of the format."""

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
)
"""What an encoder chooses from."""

BY_NAME = {coder.name: coder for coder in CODERS}


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
        else:
            raise FormatError(f"codec {codec} is unknown here; use the same release at both ends")
    except (lz4.block.LZ4BlockError, zstandard.ZstdError, _DEFLATE_ERROR, ValueError) as error:
        raise FormatError(f"codec {codec}: the coded section cannot be decoded: {error}") from None
    if len(out) != length:
        raise FormatError(f"codec {codec}: {len(out)} bytes came out and {length} are due")
    return out
