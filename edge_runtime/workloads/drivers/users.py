"""Who `user[:group]` is in an image: by its own /etc/passwd and /etc/group, read without following links."""

import os
from collections.abc import Sequence
from pathlib import Path

from .face import Refused

MAX_BYTES = 1 << 20
"""Of a passwd or group file; a thousand users take a tenth."""

MAX_ID = (1 << 32) - 2


def ids(user: str, lower: Sequence[Path]) -> tuple[int, int]:
    """User and group id of `user`, `user:group`, names or numbers; root for an empty one. `lower`: the image's layers, the uppermost first. Raises `Refused`."""
    name, colon, group = user.partition(":")
    if not name and not colon:
        return 0, 0
    uid, primary = _number(name), 0
    for fields in _lines(lower, b"passwd", 4):
        if fields[0] == name or (uid is not None and fields[2] == str(uid)):
            found, its_group = _number(fields[2]), _number(fields[3])
            if found is not None and its_group is not None:
                uid, primary = found if uid is None else uid, its_group
                break
    if uid is None:
        raise Refused("spec.user", f"{name[:80]!r} is not in the image's /etc/passwd", "use a number, or a user that the image has")
    if not colon:
        return uid, primary
    gid = _number(group)
    if gid is None:
        gid = next((found for fields in _lines(lower, b"group", 3) if fields[0] == group and (found := _number(fields[2])) is not None), None)
    if gid is None:
        raise Refused("spec.user", f"group {group[:80]!r} is not in the image's /etc/group", "use a number, or a group that the image has")
    return uid, gid


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= MAX_ID else None


def _lines(lower: Sequence[Path], name: bytes, least: int) -> list[list[str]]:
    for layer in lower:
        data = _read(layer, name)
        if data is not None:
            return [fields for line in data.decode("utf-8", "replace").splitlines() if len(fields := line.split(":")) >= least]
    return []


def _read(layer: Path, name: bytes) -> bytes | None:
    """/etc/NAME of one layer; None where it has none, or where it is no plain file."""
    here = os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for part, flags in ((b"etc", os.O_DIRECTORY), (name, os.O_NONBLOCK)):
            try:
                below = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=here)
            except OSError:
                return None
            os.close(here)
            here = below
        try:
            return os.read(here, MAX_BYTES)
        except OSError:
            return None
    finally:
        os.close(here)
