"""How long a decision takes while an image is taken: 200 MB in 15,000 files, on this machine's disk and on one that takes 20 MB/s (as SD cards do), which the kernel makes of it by a limit on a loop device.

Beside it in the same run the same agent writes as it comes, without a pace: what that would be. Null and agent take turns, as in `decision_latency`. The slow disk needs root and control groups of version 1; where it
cannot be had, the figure is that of the disk here, and says so.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from .agent import COMMAND_TOPIC, TELEMETRY_TOPIC, Agent, number_of, payload
from .container_start import layout_of
from .decision_latency import null_number
from .harness import arguments, machine, note, private_mosquitto, report
from .mqtt_load import Latency, Load, null_load

IMAGE_MB, FILE_KB = 200, 14

RATE, TURN_S = 500, 1.0

SLOW = 20 << 20
"""Bytes in a second that the slow disk writes."""

DISK = 3 << 30
"""Bytes of the file that the slow disk is."""

THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")

BAR_MS = 150.0
"""On the slow disk: a piece of the image, what the file system writes of its own, and the decision's own commit, one after the other."""


def image(folder: Path) -> Path:
    """A layout whose layer does not compress: what is written is what is counted."""
    return layout_of(folder, {f"srv/{at // 100}/{at}": os.urandom(FILE_KB << 10) for at in range(IMAGE_MB * 1000 // FILE_KB)})


@contextlib.contextmanager
def slow_disk(top: Path) -> Iterator[Path | None]:
    """A folder on a disk that writes `SLOW` bytes in a second; None where it cannot be made."""
    if os.geteuid() != 0 or not THROTTLE.exists():
        yield None
        return
    file, folder = top / "slow.img", top / "slow"
    folder.mkdir()
    with open(file, "wb") as handle:
        handle.truncate(DISK)
    run("mkfs.ext4", "-q", "-F", str(file))
    device = run("losetup", "--find", "--show", "--direct-io=on", str(file)).strip()
    number = os.stat(device).st_rdev
    try:
        run("mount", device, str(folder))
        THROTTLE.write_text(f"{os.major(number)}:{os.minor(number)} {SLOW}")
        yield folder
    finally:
        THROTTLE.write_text(f"{os.major(number)}:{os.minor(number)} 0")
        subprocess.run(["umount", str(folder)], check=False)
        subprocess.run(["losetup", "--detach", device], check=False)


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def measure(folder: Path, layout: Path, seconds: float, mode: str) -> dict[str, Any]:
    """One agent's life on one disk. `mode`: `idle`, `paced` or `unpaced`."""
    environment = {"BULK_IMAGE": str(layout), "BULK_FOLDER": str(folder), **({"UNPACED": "1"} if mode == "unpaced" else {})}
    program = ("-m", "edge_runtime") if mode == "idle" else ("-m", "tools.bench.decision_bulk_side")
    with contextlib.ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        port = stack.enter_context(private_mosquitto())
        stack.enter_context(Agent(port, data=data / "data", program=program, environment=environment))
        null, load = null_load(port, payload, null_number), Load(port, TELEMETRY_TOPIC, COMMAND_TOPIC, payload, number_of)
        null.warm_up()
        load.warm_up()
        turns = [(null.paced(RATE, TURN_S), load.paced(RATE, TURN_S)) for _ in range(max(1, round(seconds / TURN_S)))]
        pooled = Latency.pooled([one for _, one in turns]).to_json()
        return {**pooled, "null_p99": Latency.pooled([one for one, _ in turns]).to_json()["p99"], "images": len((folder / "taken").read_text().splitlines()) if (folder / "taken").exists() else 0}


def main() -> int:
    options = arguments(__doc__, seconds=20, rounds=1).parse_args()
    about = machine()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name, slow_disk(Path(name)) as slow:
        top = Path(name)
        layout, here = image(top / "image"), top / "here"
        here.mkdir()
        for disk, folder in (("here", here), ("20 MB/s", slow)):
            for mode in ("idle", "paced", "unpaced") if folder is not None else ():
                assert folder is not None
                found[f"{disk}, {mode}"] = measure(folder, layout, options.seconds, mode)
                subprocess.run(["rm", "-rf", str(folder / "store"), str(folder / "taken")], check=True)
                note(options, f"{disk}, {mode}: {json.dumps(found[f'{disk}, {mode}'])}")
    disk = "20 MB/s" if "20 MB/s, paced" in found else "here"
    paced, unpaced = found[f"{disk}, paced"], found[f"{disk}, unpaced"]
    whole = all(row["lost"] == row["twice"] == 0 for row in found.values())
    return report(
        options, about, f"a decision's p99 while an image is taken, {'on a disk of 20 MB/s' if disk != 'here' else 'on the disk here (no slow one could be made)'}", paced["p99"], "ms", whole and paced["p99"] <= BAR_MS,
        peer={"without a pace": {"p50": unpaced["p50"], "p99": unpaced["p99"], "most": unpaced["most"]}}, inputs={"image_mb": IMAGE_MB, "file_kb": FILE_KB, "rate": RATE, "bar_ms": BAR_MS}, details=found,
    )


if __name__ == "__main__":
    sys.exit(main())
