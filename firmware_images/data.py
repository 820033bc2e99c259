"""Reading a machine's data partition without mounting it: what a person would do with the disk of a device that is gone."""

import os
from pathlib import Path
from typing import Any

from . import tools
from .layout import DATA_NAME
from .recipes import MIB

CLEAN_OR_MENDED = (0, 1)
"""Exit statuses of e2fsck: nothing wrong, or put right (its journal replayed)."""


def take_out(disk: Path, manifest: dict[str, Any], folder: Path) -> Path:
    """Copy the data partition out of a disk that no machine runs on, let its journal be replayed, and copy its files into `folder`; the folder with `edge` and `config`.

    Raises:
        FirmwareError: a tool is missing, or the file system is beyond repair.
    """
    tools.require(["e2fsck", "debugfs"])
    where = manifest["partitions"][DATA_NAME]
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "data.ext4"
    with disk.open("rb") as source, copy.open("wb") as target:
        source.seek(where["start"])
        for _ in range(where["size"] // MIB):
            piece = source.read(MIB)
            if piece.count(0) == len(piece):
                target.seek(len(piece), os.SEEK_CUR)
            else:
                target.write(piece)
        target.truncate(where["size"])
    tools.run(["e2fsck", "-fy", str(copy)], field="data partition", remedy="it is beyond repair", allowed=CLEAN_OR_MENDED)
    files = folder / "files"
    files.mkdir(exist_ok=True)
    tools.run(["debugfs", "-R", f"rdump / {files}", str(copy)], field="data partition", remedy="see debugfs's words")
    return files
