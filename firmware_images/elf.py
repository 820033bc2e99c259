"""Which libraries a program of Linux asks for: the DT_NEEDED of an ELF file (64 bits, little endian: all our architectures). Pure."""

import struct

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB = 1, 5

DYNAMIC_MAX = 4096
"""Entries of a dynamic section that are looked at; real ones have some dozens."""


def needed(data: bytes) -> list[str]:
    """Sonames, and the loader's path where it names one; empty for what is no ELF file, is static, or is damaged."""
    if data[:6] != b"\x7fELF\x02\x01":
        return []
    try:
        start, = struct.unpack_from("<Q", data, 32)
        size, count = struct.unpack_from("<HH", data, 54)
        segments = [struct.unpack_from("<IIQQQQ", data, start + size * number) for number in range(count)]
        found, names, strings = [], [], None
        for kind, _, offset, _, _, length in segments:
            if kind == _PT_INTERP:
                found.append(data[offset : offset + length].rstrip(b"\0").decode())
            if kind == _PT_DYNAMIC:
                for number in range(min(length // 16, DYNAMIC_MAX)):
                    tag, value = struct.unpack_from("<qQ", data, offset + 16 * number)
                    if tag == _DT_NEEDED:
                        names.append(value)
                    elif tag == _DT_STRTAB:
                        strings = next((offset_ + value - address for kind_, _, offset_, address, _, size_ in segments if kind_ == _PT_LOAD and address <= value < address + size_), None)
                    elif tag == 0:
                        break
        if strings is None:
            return found
        return found + [data[strings + at : data.index(b"\0", strings + at)].decode() for at in names]
    except (struct.error, ValueError):
        return []
