"""Folders of this machine that something is to be written into: there, ours, and with room, or refused before any work is done."""

import os
import shutil
from pathlib import Path

from .errors import FirmwareError
from .recipes import MIB


def ready(folder: Path, field: str, option: str, need_bytes: int = 0) -> None:
    """Make the folder where it is not there. `field` and `option` are what the user gave it by.

    Raises:
        FirmwareError: it cannot be made or written, or its file system has less than `need_bytes` free (field `space`); nothing was made then.
    """
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise FirmwareError(field, f"{there} is no folder", f"give another one with {option}")
        if not os.access(there, os.W_OK | os.X_OK):
            raise FirmwareError(field, f"{there} cannot be written", f"give another one with {option}")
        free = shutil.disk_usage(there).free
        if free < need_bytes:
            raise FirmwareError("space", f"{folder} has {free // MIB} MiB free, {-(-need_bytes // MIB)} are wanted", f"make room, or give another folder with {option}")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FirmwareError(field, f"{folder} cannot be made or written ({error.strerror})", f"give another one with {option}") from None
