"""Reading a machine's data partition without mounting it: what a person would do with the disk of a device that is gone."""

import mmap
import os
from pathlib import Path

from . import gpt, tools
from .errors import FirmwareError
from .layout import DATA_NAME
from .recipes import MIB

CLEAN_OR_MENDED = (0, 1)
"""Exit statuses of e2fsck: nothing wrong, or put right (its journal replayed)."""


def take_out(disk: Path, folder: Path) -> Path:
    """Copy the data partition out of a disk that no machine runs on, let its journal be replayed, and copy its files into `folder`; the folder with `edge` and `config`.

    Raises:
        FirmwareError: a tool is missing, there is no such partition, or the file system is beyond repair.
    """
    tools.require(["e2fsck", "debugfs"])
    try:
        with disk.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start, size = gpt.read(content, len(content))[DATA_NAME]
    except (ValueError, KeyError) as error:
        raise FirmwareError("data partition", f"it is not found on {disk}: {error}", "is it a disk of an image?") from None
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "data.ext4"
    with disk.open("rb") as source, copy.open("wb") as target:
        source.seek(start)
        for _ in range(size // MIB):
            piece = source.read(MIB)
            if piece.count(0) == len(piece):
                target.seek(len(piece), os.SEEK_CUR)
            else:
                target.write(piece)
        target.truncate(size)
    tools.run(["e2fsck", "-fy", str(copy)], field="data partition", remedy="it is beyond repair", allowed=CLEAN_OR_MENDED)
    files = folder / "files"
    files.mkdir(exist_ok=True)
    tools.run(["debugfs", "-R", f"rdump / {files}", str(copy)], field="data partition", remedy="see debugfs's words")
    return files
