"""Holds containers to what they asked of the disk (`requests.disk`): what one has changed in its root is counted again and again, and one that has more than that is ended.

Counted, not limited at the write: that needs a file system with project quotas, which the one below a data folder mostly is not, or a file system for each container. So a program can be over its limit
for as long as lies between two looks; the node's own limit (`workloads.evict_disk_bytes`) is what holds then. What is counted: blocks of files, also of those that were deleted and are still open.
"""

import contextlib
import os
import signal
import stat
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cgroups
from .face import Failed, Key, Phase, Refused
from .instance import BLOCK, write

if TYPE_CHECKING:
    from .container import ContainerDriver

NOTE = "over-disk.json"
"""In an instance's folder: that it was ended since it has more than it asked for; `used` and `limit` in bytes."""

LOOK_S = 5.0
"""Between two looks: a slow disk (an SD card) takes 100 MB meanwhile."""

SHARE = 20
"""A look that took long is not begun again before so many times as long have passed: counting takes a twentieth of one processor at most."""

MAX_FILES = 200_000
"""Files and folders that are looked at of one container: about a second. One that has more is over its limit: it takes inodes, and time to count."""


@dataclass(frozen=True, slots=True)
class Over:
    """One that was ended: bytes that it had, and might have had; `files`: it had more of them than are counted."""

    key: Key
    used: int
    limit: int
    files: bool


def counted(folder: Path, most: int = MAX_FILES) -> tuple[int, bool]:
    """Bytes that files below take on the disk, each once whatever names it has; whether there are more than `most`. Blocks."""
    total, left = 0, most
    seen: set[int] = set()
    waiting = [os.fspath(folder)]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:
            continue
        for one in entries:
            left -= 1
            if left < 0:
                return total, True
            with contextlib.suppress(OSError):
                told = one.stat(follow_symlinks=False)
                if stat.S_ISDIR(told.st_mode):
                    waiting.append(one.path)
                elif told.st_nlink > 1:
                    if told.st_ino in seen:
                        continue
                    seen.add(told.st_ino)
                total += told.st_blocks * BLOCK
    return total, False


def deleted(pids: Collection[int]) -> int:
    """Bytes of files of their root that processes hold open though they were deleted."""
    found: dict[tuple[int, int], int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            root = os.stat(f"/proc/{pid}/root/").st_dev
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    told = os.stat(f"/proc/{pid}/fd/{name}")
                    if told.st_nlink == 0 and told.st_dev == root and stat.S_ISREG(told.st_mode):
                        found[told.st_dev, told.st_ino] = told.st_blocks * BLOCK
    return sum(found.values())


def disk_limit(instance: Mapping[str, Any]) -> int:
    """Bytes that an instance asked for, by its document; 0: it did not say."""
    limit = (instance.get("requests") or {}).get("disk", 0)
    return limit if isinstance(limit, int) else 0


def reason(note: Mapping[str, Any]) -> str:
    """Of one that was ended, in words."""
    return f"killed: it has {note.get('used')} bytes on the disk, and asked for {note.get('limit')} (requests.disk)" if not note.get("files") else f"killed: it has more than {MAX_FILES} files on the disk, and asked for {note.get('limit')} bytes (requests.disk)"


class DiskLimits:
    """Of one driver."""

    def __init__(self, driver: "ContainerDriver", groups: cgroups.Groups) -> None:
        self._driver, self._groups = driver, groups
        self._again: dict[Key, float] = {}
        """When one is looked at next."""

    def look(self, limits: Mapping[Key, int], now_s: float) -> list[Over]:
        """Those that are over their limits (bytes), and have not ended. Blocks: in a thread."""
        self._again = {key: at for key, at in self._again.items() if key in limits}
        found = []
        for key, limit in limits.items():
            folder = self._driver.folder(key)
            if self._again.get(key, 0.0) > now_s or not (folder / "running.json").exists() or (folder / "exit.json").exists():
                continue
            began = time.monotonic()
            used, files = counted(folder / "disk/upper")
            if used <= limit and not files:
                used += deleted(self._pids(key))
            self._again[key] = now_s + SHARE * (time.monotonic() - began)
            if used > limit or files:
                found.append(Over(key, used, limit, files))
        return found

    def _pids(self, key: Key) -> list[int]:
        try:
            return [int(line) for line in Path(self._groups.processes(self._driver.group(key))).read_text().split()]
        except (OSError, ValueError):
            return []

    async def end(self, one: Over) -> bool:
        """End one; why stands on the disk before. Whether it ran, and nobody had ended it yet: an agent that was killed may have come as far as the reason only."""
        folder = self._driver.folder(one.key)
        try:
            if (await self._driver.status(one.key)).phase is not Phase.RUNNING:
                return False
            again = (folder / NOTE).exists()
            new = folder / f"{NOTE}.new"
            write(new, {"used": one.used, "limit": one.limit, "files": one.files})
            os.replace(new, folder / NOTE)
            await self._driver.kill(one.key, signal.SIGKILL)
        except (Refused, Failed, OSError):
            return False
        return not again
