"""Snapshots of containers: what one changed in its root, as of one moment, as a layer of OCI's.

It stands still while that is copied (not compressed: that comes later, when it runs again). `SNAPSHOT` in its folder says so, from before it stands still until it goes on: where an agent is killed meanwhile, the
next one's probe lets it go on (`let_go`). One that is paused already, or does not run, is copied as it is.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from ...system.disk_pace import Pace, PacedFile
from .container_disk import counted
from .face import LAYER, Failed, Key, Phase, Refused
from .instance import SNAPSHOT, known, read
from .overlay_layer import pack_disk

if TYPE_CHECKING:
    from .container import ContainerDriver

CHANGED = "changed.tar"
"""What is written."""


async def snapshot(driver: "ContainerDriver", key: Key, folder: Path) -> Mapping[str, Any]:
    """See `face.Snapshots`; for the driver, which has looked whether it can."""
    if any(folder.iterdir()):
        raise Refused("folder", f"{folder} is not empty", "give an empty one")
    at = driver.folder(key)
    told, keeper = known(at, "container"), read(at / "keeper.json") or {}
    if (await driver.status(key)).phase is Phase.CHECKPOINTED:
        raise Refused("workload", "it is checkpointed, and what it had changed is in its checkpoint", "restore it first")
    stands = (await driver.status(key)).phase is Phase.RUNNING
    began = time.monotonic()
    try:
        if stands:
            (at / SNAPSHOT).touch(mode=0o600)
            await driver.freeze(key)
        at_ms = int(time.time() * 1000)
        await asyncio.to_thread(_pack, at / "disk/upper", folder / CHANGED, keeper.get("id_base") or 0)
    except OSError as error:
        raise Failed("disk", f"what it changed could not be copied: {error.strerror}", "look at the disk of the data folder") from None
    finally:
        if stands:
            await let_go(driver, key)
    return {"file": CHANGED, "format": LAYER, "image": told["image"], "at_ms": at_ms, "paused_ms": round(1000 * (time.monotonic() - began)) if stands else 0}


def need(driver: "ContainerDriver", key: Key) -> int:
    """Bytes that it may write. Blocks."""
    known(driver.folder(key), "container")
    return counted(driver.folder(key) / "disk/upper")[0]


async def let_go(driver: "ContainerDriver", key: Key) -> None:
    """Have it go on, where it stands still for its snapshot."""
    note = driver.folder(key) / SNAPSHOT
    if note.exists():
        with contextlib.suppress(Refused):  # it has ended meanwhile, or is gone
            await driver.resume(key)
        with contextlib.suppress(Refused):
            if (await driver.status(key)).phase is not Phase.PAUSED:
                note.unlink(missing_ok=True)


def _pack(upper: Path, target: Path, base: int) -> None:
    with open(target, "xb") as handle:
        os.fchmod(handle.fileno(), 0o600)
        pack_disk(upper, cast(BinaryIO, PacedFile(handle, Pace(os.fdatasync, rest=False))), base)
