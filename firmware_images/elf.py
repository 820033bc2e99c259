"""Which libraries a program of Linux asks for, and by which name a library is asked for: DT_NEEDED and DT_SONAME of an ELF file (64 bits, little endian: all our architectures). Pure."""

import struct
from dataclasses import dataclass

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 1, 5, 14, 15, 29

DYNAMIC_MAX = 4096
"""Entries of a dynamic section that are looked at; real ones have some dozens."""


@dataclass(frozen=True, slots=True)
class Needs:
    """`names` are sonames, and the loader's path where one is named; `folders` are searched first ($ORIGIN stands for the file's own); `soname` is the file's own, empty where it has none."""

    names: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    soname: str = ""


def needed(data: bytes) -> Needs:
    """What a file asks for; nothing for what is no ELF file, is static, or is damaged."""
    if data[:6] != b"\x7fELF\x02\x01":
        return Needs()
    try:
        start, = struct.unpack_from("<Q", data, 32)
        size, count = struct.unpack_from("<HH", data, 54)
        segments = [struct.unpack_from("<IIQQQQ", data, start + size * number) for number in range(count)]
        found: list[str] = []
        names: list[int] = []
        paths: list[int] = []
        own: list[int] = []
        strings = None
        for kind, _, offset, _, _, length in segments:
            if kind == _PT_INTERP:
                found.append(data[offset : offset + length].rstrip(b"\0").decode())
            if kind == _PT_DYNAMIC:
                for number in range(min(length // 16, DYNAMIC_MAX)):
                    tag, value = struct.unpack_from("<qQ", data, offset + 16 * number)
                    if tag == _DT_NEEDED:
                        names.append(value)
                    elif tag == _DT_SONAME:
                        own.append(value)
                    elif tag in (_DT_RPATH, _DT_RUNPATH):
                        paths.append(value)
                    elif tag == _DT_STRTAB:
                        strings = next((offset_ + value - address for kind_, _, offset_, address, _, size_ in segments if kind_ == _PT_LOAD and address <= value < address + size_), None)
                    elif tag == 0:
                        break
        if strings is None:
            return Needs(tuple(found))
        text = [[data[strings + at : data.index(b"\0", strings + at)].decode() for at in places] for places in (names, paths, own[:1])]
    except (struct.error, ValueError, OverflowError):
        return Needs()
    return Needs((*found, *text[0]), tuple(folder for path in text[1] for folder in path.split(":") if folder), "".join(text[2]))
