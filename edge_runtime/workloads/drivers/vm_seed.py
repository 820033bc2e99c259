"""What a guest's cloud-init reads at its first boot (data source NoCloud): a file system of one mebibyte labelled `CIDATA` with up to three files. Pure.

The format is FAT12, with long names: the smallest that every guest's kernel and cloud-init know, and there are tools that read it without root (mtools), so tests need not believe the writer.
It is always of one size, and has no times in it: the same input gives the same bytes.
"""

import json
import struct
from collections.abc import Mapping

SECTOR = 512
SECTORS = 2048
"""Of the whole: 1 MiB, for which FAT12 needs one sector for each cluster."""

FAT_SECTORS, ROOT_SECTORS = 6, 4
"""One table (twelve bits for each cluster), and the root folder (16 entries in each sector)."""

FATS = 2
"""Tables: what every reader expects."""

FIRST = 1 + FATS * FAT_SECTORS + ROOT_SECTORS
"""The sector of the first cluster, which has number 2."""

LABEL = b"CIDATA     "
"""By which cloud-init finds it."""

ROOM = (SECTORS - FIRST) * SECTOR
"""Bytes for all files together."""

NAMES = ("meta-data", "user-data", "network-config")


def seed(files: Mapping[str, bytes]) -> bytes:
    """The file system. Files go by their names, of up to 26 characters; ValueError where they do not fit."""
    entries = [LABEL + b"\x08" + bytes(20)]
    table = [0xFF8, 0xFFF]
    content = b""
    for number, (name, data) in enumerate(files.items()):
        clusters = -(-len(data) // SECTOR)
        first = len(table) if clusters else 0
        table += [*range(first + 1, first + clusters), 0xFFF][:clusters]
        content += data.ljust(clusters * SECTOR, b"\0")
        short = b"FILE%02d     " % number  # eight and three characters, without a dot
        entries += _long(name, short)
        entries.append(short + b"\x21" + bytes(14) + struct.pack("<HI", first, len(data)))
    if len(content) > ROOM or len(entries) > ROOT_SECTORS * SECTOR // 32:
        raise ValueError(f"{len(content)} bytes in {len(files)} files do not fit into a seed")
    fat = bytearray(FAT_SECTORS * SECTOR)
    for at, value in enumerate(table):
        pair = at * 3 // 2
        if at % 2:
            fat[pair] |= (value & 0xF) << 4
            fat[pair + 1] = value >> 4
        else:
            fat[pair] = value & 0xFF
            fat[pair + 1] |= value >> 8
    root = b"".join(entries).ljust(ROOT_SECTORS * SECTOR, b"\0")
    return (_boot_sector() + bytes(fat) * FATS + root + content).ljust(SECTORS * SECTOR, b"\0")


def _boot_sector() -> bytes:
    """Jump, maker, what is where, and the label once more."""
    layout = struct.pack("<HBHBHHBHHHII", SECTOR, 1, 1, FATS, ROOT_SECTORS * SECTOR // 32, SECTORS, 0xF8, FAT_SECTORS, 32, 2, 0, 0)
    about = struct.pack("<BBBI11s8s", 0x80, 0, 0x29, 0x4E4F5641, LABEL, b"FAT12   ")
    return (b"\xeb\x3c\x90NOVACRON" + layout + about).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def _long(name: str, short: bytes) -> list[bytes]:
    """The entries that hold a name of any characters, the last part first; they are tied to the short name by its sum."""
    total = 0
    for byte in short:
        total = ((total & 1) << 7) + (total >> 1) + byte & 0xFF
    raw = name.encode("utf-16-le")
    if len(raw) // 2 > 26:
        raise ValueError(f"{name!r} is too long a name")
    raw += b"" if len(raw) % 26 == 0 else b"\0\0"
    parts = [raw[at:at + 26].ljust(26, b"\xff") for at in range(0, len(raw), 26)]
    return [
        bytes([number | (0x40 if number == len(parts) else 0)]) + part[:10] + b"\x0f\0" + bytes([total]) + part[10:22] + b"\0\0" + part[22:] for number, part in reversed(list(enumerate(parts, 1)))
    ]


def files(instance: str, hostname: str, told: Mapping[str, str]) -> dict[str, bytes]:
    """The files of a seed. `told`: `user_data` and `network_config`, as `spec.cloud_init` has them. `instance`: cloud-init does its work once for each such name."""
    meta = json.dumps({"instance-id": instance, "local-hostname": hostname})  # JSON is YAML
    found = {"meta-data": meta.encode() + b"\n", "user-data": (told.get("user_data") or "#cloud-config\n{}\n").encode()}
    if network := told.get("network_config"):
        found["network-config"] = network.encode()
    return found
