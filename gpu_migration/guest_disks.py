"""The disks of a guest that move with it: how a source offers them, how a target's command line asks for them. Pure.

An offer: count u8, then for each its name (length u8, ASCII), format u8, size u64, bytes that it takes up u64.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import DestinationError, FormatError

FORMATS = ("encrypted or of another format", "raw", "qcow2")
"""By their number in an offer; of the first kind nothing is moved: what would be made at the target would not be encrypted."""
DISKS_MOST = 16
"""Of one guest: each has a stream of its own, and a receiver takes sixteen."""
NAME_MOST = 31
"""Characters of a node's name in QEMU."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,30}")
_PLACE = re.compile(r"\{disk:([^}]*)\}")
_FORMAT = re.compile(r'(?:^|[,{\s])"?(?:driver|format)"?\s*[=:]\s*"?(raw|qcow2)\b')
_HEAD = struct.Struct("<BB")
_SIZES = struct.Struct("<BQQ")
SECTOR = 512


@dataclass(frozen=True, slots=True)
class Disk:
    """One, by the name of its node in QEMU, which is the same at both ends. Bytes."""

    name: str
    format: str
    size: int
    used: int
    """Of its file; what it will take up at the target, about."""


def pack(disks: Sequence[Disk]) -> bytes:
    """An offer of at most DISKS_MOST."""
    out = bytearray((len(disks),))
    for disk in disks:
        name = disk.name.encode("ascii")
        out += bytes((len(name),)) + name + _SIZES.pack(FORMATS.index(disk.format), disk.size, disk.used)
    return bytes(out)


def unpack(payload: memoryview | bytes) -> list[Disk]:
    """Raises FormatError."""
    data, at = bytes(payload), 1
    found: list[Disk] = []
    if not data or data[0] > DISKS_MOST:
        raise FormatError(f"disks: an offer has at most {DISKS_MOST}")
    for _ in range(data[0]):
        length = data[at] if at < len(data) else 0
        end = at + 1 + length + _SIZES.size
        if end > len(data):
            raise FormatError("disks: the offer is truncated")
        try:
            name = data[at + 1 : at + 1 + length].decode("ascii")
        except UnicodeDecodeError:
            name = ""
        kind, size, used = _SIZES.unpack_from(data, end - _SIZES.size)
        if not named(name) or kind >= len(FORMATS) or any(name == one.name for one in found):
            raise FormatError("disks: a name or a format in the offer is none")
        if not 0 < size < 1 << 63 or size % SECTOR:
            raise FormatError(f"disks: {name} of {size} bytes is none")
        found.append(Disk(name, FORMATS[kind], size, used))
        at = end
    if at != len(data):
        raise FormatError("disks: there is more than the offer")
    return found


def named(name: str) -> bool:
    """Whether a node of that name can be moved: those that QEMU names by itself (#block12) are other ones at the other end."""
    return _NAME.fullmatch(name) is not None


def asked(command: Sequence[str]) -> dict[str, str]:
    """The disks that a QEMU's command line has places for, and the format it says for each. Raises DestinationError."""
    found: dict[str, str] = {}
    for word in command:
        for match in _PLACE.finditer(word):
            name = match[1]
            if not named(name):
                raise DestinationError(f"QEMU's command line: {match[0]} names no disk; give the name of its node, of letters and digits, at most {NAME_MOST}")
            kind = _FORMAT.search(word)
            if kind is None:
                raise DestinationError(
                    f"QEMU's command line: {match[0]} is in no word that says its format; give -blockdev driver=raw,node-name={name},file.driver=file,file.filename={match[0]}, or driver=qcow2"
                )
            if found.setdefault(name, kind[1]) != kind[1]:
                raise DestinationError(f"QEMU's command line: {match[0]} is there twice, with two formats; give it once")
    if len(found) > DISKS_MOST:
        raise DestinationError(f"QEMU's command line: {len(found)} disks to be moved; at most {DISKS_MOST} can")
    return found


def placed(command: Sequence[str], paths: dict[str, str]) -> list[str]:
    """The command line with the disks' files in their places."""
    return [_PLACE.sub(lambda match: paths[match[1]], word) for word in command]


def chosen(wanted: dict[str, str], offered: Sequence[Disk]) -> list[Disk]:
    """Those of an offer that are asked for. Raises DestinationError where one is not there, or is in another format."""
    there = {disk.name: disk for disk in offered}
    for name, kind in wanted.items():
        disk = there.get(name)
        if disk is None:
            raise DestinationError(f"disk {name}: the source has none of that name that is written to (it has: {', '.join(there) or 'none'}); give the source's node-name")
        if disk.format != kind:
            raise DestinationError(f"disk {name}: it is {disk.format} at the source and {kind} in QEMU's command line here; give the same format")
    return [there[name] for name in wanted]


def fits(disks: Sequence[Disk], free: int, where: str) -> None:
    """Raises DestinationError where they have more in them than there is room."""
    needed = sum(disk.used for disk in disks)
    if needed > free:
        raise DestinationError(f"disks {where}: {needed} bytes are needed and {free} are free; make room, or give another folder for them (--disks)")


def same_size(disk: Disk, size: int, where: str) -> None:
    """Raises DestinationError where what is there already is smaller or larger."""
    if size != disk.size:
        raise DestinationError(f"disk {disk.name}: {where} is too {'small' if size < disk.size else 'large'}, {size} bytes; it must have the {disk.size} of the source's")
