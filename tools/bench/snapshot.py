"""How long a container stands still for its snapshot, and how long that takes until it is whole: for 16, 128 and 512 MB that it changed, filled with the files of this machine's own programs.

A round is believed only where each file in the snapshot's uppermost layer has the hash that the container itself made of it, and the container has gone on since. The peer is `cp -a` of the same changes in the same
round: what copying them costs at the least.
"""

import asyncio
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from edge_runtime.clock import SystemClock
from edge_runtime.journal import Journal, JournalSettings
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_laying import Settings
from edge_runtime.workloads.drivers.face import Ability, Key, Order
from edge_runtime.workloads.images import ImageStore, Limits
from edge_runtime.workloads.images.manifest import Platform
from edge_runtime.workloads.images.source import opened, plan
from edge_runtime.workloads.operations import Operations
from edge_runtime.workloads.snapshots import SnapshotFolder, Snapshotting

from .checkpoint import MOUNTS, PYTHON, said
from .container_start import layout_of
from .harness import arguments, machine, note, report, spread

SIZES_MB = (16, 128, 512)

BAR = 3.0
"""Times what `cp -a` takes: a copy that is an archive goes through Python, and waits until nothing runs any more."""

PROGRAM = """
import hashlib, os, time
most, have, told = int(os.environ["MOST"]), 0, hashlib.sha256()
os.mkdir("/changed")
for top, folders, files in os.walk("/usr/lib"):
    folders.sort()
    for name in sorted(files):
        path = os.path.join(top, name)
        if have < most and os.path.isfile(path) and not os.path.islink(path):
            with open(path, "rb") as source:
                while data := source.read(min(1 << 20, most - have)):
                    with open(f"/changed/{have >> 20:06}", "ab") as target:
                        target.write(data)
                    told.update(data)
                    have += len(data)
print(have, told.hexdigest(), flush=True)
while True:
    time.sleep(0.01)
    if os.path.exists("/look"):
        os.unlink("/look")
        print("again", have, flush=True)
"""


async def none() -> int:
    return 0


def upper_hash(path: Path, reference: str) -> str:
    """One hash of the files below /changed in a snapshot, in the order of their names."""
    told = hashlib.sha256()
    layer = plan(opened(path), reference, Platform.here(), Limits(), strict=True).layers[-1]
    with layer.open() as source, tarfile.open(fileobj=source, mode="r|gz") as archive:
        for member in archive:  # the writer's order is that of the names
            if member.isfile() and member.name.startswith("changed/"):
                content = archive.extractfile(member)
                assert content is not None
                told.update(content.read())
    return told.hexdigest()


async def measure(driver: ContainerDriver, store: ImageStore, folder: Path, size_mb: int, number: int) -> dict[str, float]:
    """One round of one size."""
    key = Key(f"bench-{size_mb}-{number}", 1)
    spec = {"command": [PYTHON, "-c", PROGRAM], "env": {"MOST": str(size_mb * 1_000_000)}, "mounts": MOUNTS}
    kept = SnapshotFolder(folder / "snapshots")
    journal = Journal(JournalSettings(folder / "journal", ballast_bytes=0, min_free_bytes=0), SystemClock())
    journal.start()
    operations = Operations(journal, lambda asked: None)
    snapshotting = Snapshotting(kept, operations, store, 1 << 40, none)
    asked = {"id": "o-1", "kind": "snapshot", "workload": key.id, "epoch": 1, "name": "a", "stop": False}
    try:
        await driver.prepare(Order(key, "bench:1", {}, spec))
        await driver.start(key)
        digest = await said(driver, key, str(size_mb * 1_000_000))
        began = time.perf_counter()
        await asyncio.to_thread(lambda: subprocess.run(["cp", "-a", driver.folder(key) / "disk/upper", folder / "peer"], check=True))
        peer = time.perf_counter() - began
        operations.take([asked])
        began = time.perf_counter()
        await snapshotting.carry_out(asked, driver, await driver.status(key))
        await asyncio.gather(*snapshotting._writing)
        whole = time.perf_counter() - began
        told = operations.get("o-1") or {}
        if told["state"] != "succeeded":
            raise SystemExit(f"no snapshot was taken: {told['reason']}")
        path = Path(told["detail"]["file"])
        if await asyncio.to_thread(upper_hash, path, told["detail"]["image"]) != digest:
            raise SystemExit(f"{size_mb} MB: what is in the snapshot is not what the container wrote")
        await driver.exec(key, ["/usr/bin/touch", "/look"], 10)
        await said(driver, key, "again")
        return {"stood_still_s": told["detail"]["paused_ms"] / 1000, "whole_s": whole, "cp_s": peer, "stored_mb": path.stat().st_size / 1e6}
    finally:
        await driver.delete(key)
        await journal.close()
        for gone in ("peer", "snapshots", "journal"):
            shutil.rmtree(folder / gone, ignore_errors=True)


def main() -> int:
    options = arguments(__doc__).parse_args()
    about = machine()
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        store = ImageStore(folder / "images", limits=Limits(keep_free=0))
        store.add(layout_of(folder / "image", {"tmp/nothing": b""}), "bench:1")
        driver = ContainerDriver(folder, store, Settings(allowed_mounts=("/usr",), criu=""))

        async def rounds() -> dict[int, list[dict[str, float]]]:
            told = await driver.probe()
            if not told.can(Ability.SNAPSHOT):
                raise SystemExit(f"no snapshots can be taken here: {told.cannot[Ability.SNAPSHOT]}")
            rows: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES_MB}
            for number in range(options.rounds):
                for size in SIZES_MB:
                    rows[size].append(await measure(driver, store, folder, size, number))
                    note(options, f"round {number + 1}, {size} MB: {json.dumps({name: round(value, 3) for name, value in rows[size][-1].items()})}")
            return rows

        rows = asyncio.run(rounds())
        driver.close()
        store.close()
    details: dict[str, Any] = {f"{size} MB": {name: spread([row[name] for row in found]) for name in found[0]} | {"verified": len(found)} for size, found in rows.items()}
    still = [row["stood_still_s"] for row in rows[SIZES_MB[-1]]]
    value, peer = round(median(still), 3), {f"{size} MB": round(median(row["cp_s"] for row in found), 3) for size, found in rows.items()}
    return report(
        options, about, f"a container stands still for the snapshot of {SIZES_MB[-1]} MB", value, "s", value <= BAR * peer[f"{SIZES_MB[-1]} MB"], spread_=spread(still), peer={"cp -a, median s": peer},
        inputs={"sizes_mb": list(SIZES_MB), "bar": f"{BAR} times cp -a", "changes": "the files of /usr/lib, in order, in files of a MiB and more"}, details=details,
    )


if __name__ == "__main__":
    sys.exit(main())
