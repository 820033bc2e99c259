"""How long a container takes from its document to running: laid out on the disk, its keeper started, layers mounted with mapped owners, limits, seccomp and namespaces set, its program begun.

Each start is believed only where the driver says that it runs and its first process is the image's program. The peer is `runc run --detach` alone, on a plain folder without any of that.
"""

import asyncio
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.face import Key, Order, Phase
from edge_runtime.workloads.drivers.probe_program import program
from edge_runtime.workloads.drivers.programs import searched
from edge_runtime.workloads.images import ImageStore, Limits, Platform

from .harness import arguments, machine, memory_of, note, report, spread

STARTS = 20
"""Containers in a round; all of a round run at once."""

LAYERS = 8
"""Of the image: what ordinary ones have."""

BAR_S = 1.0


def image(folder: Path) -> Path:
    """An OCI layout: a program that waits, and layers above it."""
    code = program(os.uname().machine)
    if code is None:
        raise SystemExit(f"no program for {os.uname().machine}")
    return layout_of(folder, {"waiting": code}, [{f"file-{number}": bytes(1000)} for number in range(1, LAYERS)])


def layout_of(folder: Path, programs: Mapping[str, bytes], more: Sequence[Mapping[str, bytes]] = ()) -> Path:
    """An OCI layout of a layer with these programs, of which the first is run, and layers with these files."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media: str) -> dict[str, Any]:
        (blobs / sha256(data).hexdigest()).write_bytes(data)
        return {"mediaType": media, "digest": f"sha256:{sha256(data).hexdigest()}", "size": len(data)}

    layers, here = [], Platform.here()
    for files in (programs, *more):
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o755
                archive.addfile(member, io.BytesIO(data))
        layers.append(put(target.getvalue(), "application/vnd.oci.image.layer.v1.tar"))
    run = {"Cmd": [f"/{next(iter(programs))}"]}
    config = {"os": here.os, "architecture": here.arch, "variant": here.variant, "config": run, "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]}}
    manifest = {"schemaVersion": 2, "config": put(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"), "layers": layers}
    entry = put(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return folder


async def measure(driver: ContainerDriver) -> dict[str, list[float]]:
    """One round: seconds of each start, MB of each keeper."""
    rows: dict[str, list[float]] = {"start_s": [], "keeper_pss_mb": []}
    keys = [Key(f"bench-{number}", 1) for number in range(STARTS)]
    try:
        await start_all(driver, keys, rows)
    finally:
        for key in keys:
            await driver.delete(key)
    return rows


async def start_all(driver: ContainerDriver, keys: list[Key], rows: dict[str, list[float]]) -> None:
    """Start them one after the other."""
    for key in keys:
        began = time.perf_counter()
        await driver.prepare(Order(key, "bench:1", {"cpu": 100, "memory": 32 << 20}))
        status = await driver.start(key)
        while (name := Path(f"/proc/{status.pid}/comm").read_text().strip()) != "waiting":  # the runtime comes back just before its last step
            if status.phase is not Phase.RUNNING or time.perf_counter() - began > 10 * BAR_S:
                raise RuntimeError(f"it does not run: {status}, {name}")
            await asyncio.sleep(0)
        rows["start_s"].append(time.perf_counter() - began)
        rows["keeper_pss_mb"].append(memory_of(int(json.loads((driver.folder(key) / "running.json").read_text())["keeper"])).pss / 1e6)


def alone(folder: Path, runc: str) -> list[float]:
    """The peer."""
    bundle = folder / "peer"
    (bundle / "rootfs").mkdir(parents=True)
    code = program(os.uname().machine)
    assert code is not None
    (bundle / "rootfs/waiting").write_bytes(code)
    (bundle / "rootfs/waiting").chmod(0o755)
    subprocess.run([runc, "spec"], cwd=bundle, check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"] |= {"terminal": False, "args": ["/waiting"]}
    (bundle / "config.json").write_text(json.dumps(config))
    found = []
    for number in range(STARTS):
        command = [runc, "--root", str(folder / "peer-state")]
        began = time.perf_counter()
        subprocess.run([*command, "run", "--detach", "--bundle", str(bundle), f"peer-{os.getpid()}-{number}"], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found.append(time.perf_counter() - began)
        subprocess.run([*command, "delete", "--force", f"peer-{os.getpid()}-{number}"], check=True)
    return found


def main() -> int:
    options = arguments(__doc__).parse_args()
    about = machine()
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        store = ImageStore(folder / "images", limits=Limits(keep_free=0))
        store.add(image(folder / "image"), "bench:1")
        driver = ContainerDriver(folder, store)

        async def rounds() -> tuple[Any, list[dict[str, list[float]]]]:
            told, rows = await driver.probe(), []
            if not told.usable:
                raise SystemExit(f"containers cannot be run here: {told.to_json()['cannot']['start']}")
            for number in range(options.rounds):
                rows.append(await measure(driver))
                note(options, f"round {number + 1}: median {median(rows[-1]['start_s']) * 1000:.0f} ms, worst {max(rows[-1]['start_s']) * 1000:.0f} ms")
            return told, rows

        told, rows = asyncio.run(rounds())
        driver.close()
        peer = alone(folder, str(searched("runc"))) if searched("runc") else []
        store.close()
    worst = [max(row["start_s"]) for row in rows]
    value = round(max(worst), 3)
    details = {
        "median_s": spread([median(row["start_s"]) for row in rows]), "least_s": round(min(min(row["start_s"]) for row in rows), 4),
        "keeper_pss_mb": spread([median(row["keeper_pss_mb"]) for row in rows]), "can": told.to_json()["can"], "runtime": told.runtime,
    }
    return report(
        options, about, "container start, the worst", value, "s", value < BAR_S, spread_=spread(worst), peer={"runc run --detach, median s": round(median(peer), 4), "worst": round(max(peer), 4)} if peer else None,
        inputs={"starts": STARTS * options.rounds, "layers": LAYERS, "bar_s": BAR_S}, details=details,
    )


if __name__ == "__main__":
    sys.exit(main())
