"""How long a container's state takes to be written, and to be brought back, and what it takes on the disk: processes of 16, 128 and 512 MB, filled with the files of this machine's own programs.

A round is believed only where the process finds its memory unchanged after it was brought back, by a hash that it made before. The peer is `runc checkpoint` alone, of the same process in the same round:
it writes the memory as it is, and neither compresses, hashes nor syncs it. Our time is from a running container to a state that is on the disk, and the container ended; a restore's has the window in
which it is looked at whether it lives.
"""

import asyncio
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from edge_runtime.workloads.drivers import criu
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_checkpoint import WINDOW_S
from edge_runtime.workloads.drivers.container_laying import Settings
from edge_runtime.workloads.drivers.face import Ability, Key, Order
from edge_runtime.workloads.drivers.programs import searched
from edge_runtime.workloads.images import ImageStore, Limits

from .container_start import layout_of
from .harness import arguments, machine, note, report, spread

SIZES_MB = (16, 128, 512)

PYTHON = "/usr/bin/python3"

BAR_S = 15.0
"""Both ways of the largest: a program of half a gigabyte is away no longer than a service's usual timeout, twice."""

PATIENCE_S = 60.0
"""For the process to have filled its memory, or to have looked through it."""

PROGRAM = """
import hashlib, os, time
most, held = int(os.environ["MOST"]), []
have = 0
for top, folders, files in os.walk("/usr/lib"):
    folders.sort()
    for name in sorted(files):
        path = os.path.join(top, name)
        if have < most and os.path.isfile(path) and not os.path.islink(path):
            with open(path, "rb") as source:
                data = source.read(most - have)
            held.append(data)
            have += len(data)
def digest():
    told = hashlib.sha256()
    for data in held:
        told.update(data)
    return told.hexdigest()
print(have, digest(), flush=True)
while True:
    time.sleep(0.2)
    if os.path.exists("/tmp/look"):
        os.unlink("/tmp/look")
        print("again", digest(), flush=True)
"""

LAID_OUT = Path(__file__).parents[2] / ".novacron/criu/criu"
"""By tools/setup/criu.sh."""

MOUNTS = [{"target": target, "source": source} for target, source in (("/usr", "/usr"), ("/lib", "/usr/lib"), ("/lib64", "/usr/lib64"))]


async def said(driver: ContainerDriver, key: Key, word: str) -> str:
    """What stands behind `word` in its output; waits for it."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        lines = [line.split() for line in (await driver.logs(key, 1 << 16)).stdout.decode().splitlines()]
        found = [line[1] for line in lines if len(line) == 2 and line[0] == word]
        if found:
            return found[0]
        await asyncio.sleep(0.01)
    told = await driver.logs(key, 1 << 12)
    raise SystemExit(f"the process did not say {word}: {told}")


async def measure(driver: ContainerDriver, found: criu.Criu, folder: Path, size_mb: int, number: int) -> dict[str, float]:
    """One round of one size."""
    spec = {"command": [PYTHON, "-c", PROGRAM], "env": {"MOST": str(size_mb * 1_000_000)}, "mounts": MOUNTS, "limits": {"memory": (size_mb + 64) * 2_000_000}}
    key, again = Key(f"bench-{size_mb}-{number}", 1), Key(f"bench-{size_mb}-{number}", 2)
    state, raw = folder / f"state-{size_mb}-{number}", folder / f"raw-{size_mb}-{number}"
    try:
        await driver.prepare(Order(key, "bench:1", {}, spec))
        await driver.start(key)
        digest = await said(driver, key, str(size_mb * 1_000_000))
        raw.mkdir()
        criu.write_options(raw / "criu.conf", stopped=False)
        began = time.perf_counter()
        await driver.runtime(key, "checkpoint", "--leave-running", "--image-path", str(raw / "images"), "--work-path", str(raw), environment=found.environment(raw / "criu.conf"))
        peer = time.perf_counter() - began
        plain = sum(path.stat().st_size for path in (raw / "images").iterdir())
        began = time.perf_counter()
        manifest = await driver.checkpoint(key, state, leave_running=False)
        out = time.perf_counter() - began
        began = time.perf_counter()
        await driver.restore(Order(again, "bench:1", {}, spec), state)
        back = time.perf_counter() - began
        await driver.exec(again, ["/usr/bin/touch", "/tmp/look"], 10)
        if await said(driver, again, "again") != digest:
            raise SystemExit(f"{size_mb} MB: its memory is not what it was")
        stored = sum(one["stored"] for one in manifest["files"])
        return {"checkpoint_s": out, "restore_s": back, "runc_s": peer, "stored_mb": stored / 1e6, "runc_mb": plain / 1e6, "ratio": sum(one["size"] for one in manifest["files"]) / stored}
    finally:
        for one in (key, again):
            await driver.delete(one)
        for path in (state, raw):
            shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    options = arguments(__doc__).parse_args()
    about = machine()
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        store = ImageStore(folder / "images", limits=Limits(keep_free=0))
        store.add(layout_of(folder / "image", {"tmp/nothing": b""}), "bench:1")
        program = str(LAID_OUT) if LAID_OUT.exists() else "criu"
        driver = ContainerDriver(folder, store, Settings(allowed_mounts=("/usr",), criu=program))

        async def rounds() -> dict[int, list[dict[str, float]]]:
            told = await driver.probe()
            found = criu.find(searched(program))
            if not told.can(Ability.CHECKPOINT) or isinstance(found, str):
                raise SystemExit(f"no checkpoints can be taken here: {told.cannot.get(Ability.CHECKPOINT)}")
            rows: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES_MB}
            for number in range(options.rounds):
                for size in SIZES_MB:
                    rows[size].append(await measure(driver, found, folder, size, number))
                    note(options, f"round {number + 1}, {size} MB: {json.dumps({name: round(value, 3) for name, value in rows[size][-1].items()})}")
            return rows

        rows = asyncio.run(rounds())
        driver.close()
        store.close()
    details: dict[str, Any] = {f"{size} MB": {name: spread([row[name] for row in found]) for name in found[0]} | {"verified": len(found)} for size, found in rows.items()}
    both = [row["checkpoint_s"] + row["restore_s"] for row in rows[SIZES_MB[-1]]]
    value = round(median(both), 3)
    return report(
        options, about, f"checkpoint and restore of a container of {SIZES_MB[-1]} MB", value, "s", value < BAR_S, spread_=spread(both),
        peer={"runc checkpoint alone, median s": {f"{size} MB": round(median(row["runc_s"] for row in found), 3) for size, found in rows.items()}},
        inputs={"sizes_mb": list(SIZES_MB), "bar_s": BAR_S, "window_s": WINDOW_S, "memory": "the files of /usr/lib, in order"}, details=details,
    )


if __name__ == "__main__":
    sys.exit(main())
