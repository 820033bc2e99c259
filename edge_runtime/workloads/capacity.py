"""What this node has for workloads, from /proc, /sys and nvidia-smi, less what the agent and the system keep for themselves."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?\Z")
"""What the hub takes as a label's value (kube's rule)."""

CHANGED_SHARE = 0.1
"""Told again when an amount has changed by more than a tenth: free disk space moves all the time."""

MAX_ZONES = 8
"""NUMA zones that the hub takes."""

MAX_GPUS = 16
"""GPU devices that the hub takes."""

NVIDIA_SMI_S = 10.0
"""A driver that does not answer within this is taken as absent."""

GIB = 1 << 30


def describe(
    *, kind: str, region: str, site: str, labels: Mapping[str, str], taints: Sequence[Mapping[str, Any]], runs: Sequence[str], reserve_milli: int, reserve_memory: int, reserve_disk: int,
    most: int, data_dir: Path, images: Sequence[str] = (), root: Path = Path("/"), cores: int | None = None,
) -> dict[str, Any]:
    """The body of a `node.capacity` record.

    Args:
        reserve_milli, reserve_memory, reserve_disk: milli-CPU and bytes that workloads do not get.
        most: workloads at one time.
        images: references of those that are on its disk.
        root: where /proc and /sys are looked up.
        cores: processors; None asks the system.
    """
    found = cores if cores is not None else len(os.sched_getaffinity(0))
    memory = _memory(root / "proc/meminfo")
    zones = _zones(root)
    numa: list[dict[str, Any]] = []
    capacity: dict[str, Any] = {"cpu": f"{max(0, found * 1000 - reserve_milli)}m", "memory": max(0, memory - reserve_memory), "slots": most}
    if len(zones) > 1:
        kept_milli, kept_memory = reserve_milli, reserve_memory
        for cpu, size in zones:  # what is kept comes from the first zones
            milli, bytes_ = max(0, cpu * 1000 - kept_milli), max(0, size - kept_memory)
            kept_milli, kept_memory = max(0, kept_milli - cpu * 1000), max(0, kept_memory - size)
            numa.append({"cpu": f"{milli}m", "memory": bytes_})
        capacity["cpu"] = f"{sum(int(zone['cpu'].removesuffix('m')) for zone in numa)}m"
        capacity["memory"] = sum(int(zone["memory"]) for zone in numa)
    disk = _disk(data_dir)
    if disk is not None:
        capacity["disk"] = max(0, disk - reserve_disk) // GIB * GIB
    told = {key: value for key, value in {**labels, "arch": platform.machine(), "os": platform.system().lower()}.items() if LABEL_VALUE.match(value)}
    body: dict[str, Any] = {
        "kind": kind, "capacity": capacity, "gpus": gpus(root), "numa": numa, "labels": told, "taints": [dict(taint) for taint in taints], "images": list(images), "runs": list(runs),
    }
    for key, value in (("region", region), ("site", site)):
        if value and LABEL_VALUE.match(value):
            body[key] = value
    return body


def changed(before: Any, now: Mapping[str, Any]) -> bool:
    """Whether what is known should be told again."""
    if not isinstance(before, dict) or {**before, "capacity": None} != {**now, "capacity": None}:
        return True
    old, new = before.get("capacity"), now["capacity"]
    if not isinstance(old, dict) or old.keys() != new.keys():
        return True
    return any(_differ(old[name], amount) if name == "disk" else old[name] != amount for name, amount in new.items())


def _differ(old: Any, new: int) -> bool:
    return not isinstance(old, int) or abs(new - old) > CHANGED_SHARE * max(old, 1)


def _memory(path: Path) -> int:
    """Bytes of main memory; 0 where it is not told."""
    try:
        for line in path.read_text().splitlines():
            words = line.replace(":", " ").split()
            if "MemTotal" in words:
                return int(words[words.index("MemTotal") + 1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _zones(root: Path) -> list[tuple[int, int]]:
    """(processors, bytes) of each NUMA zone that has both."""
    found = []
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:]))[:MAX_ZONES]:
        try:
            cpus = _count((folder / "cpulist").read_text().strip())
        except (OSError, ValueError):
            continue
        size = _memory(folder / "meminfo")
        if cpus and size:
            found.append((cpus, size))
    return found


def _count(text: str) -> int:
    """How many are in `0-3,8`."""
    total = 0
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def _disk(folder: Path) -> int | None:
    try:
        told = os.statvfs(folder)
    except OSError:
        return None
    return told.f_bavail * told.f_frsize


def gpus(root: Path = Path("/")) -> list[dict[str, Any]]:
    """`model` and `memory` (bytes) of each device: NVIDIA's by nvidia-smi or /proc, AMD's by /sys."""
    found = _nvidia(root)
    for card in sorted((root / "sys/class/drm").glob("card[0-9]*")):
        if "-" in card.name:  # an output of a card
            continue
        try:
            if (card / "device/vendor").read_text().strip() != "0x1002":
                continue
            memory = int((card / "device/mem_info_vram_total").read_text())
            found.append({"model": f"amd-{(card / 'device/device').read_text().strip().removeprefix('0x')}", "memory": memory})
        except (OSError, ValueError):
            continue
    return found[:MAX_GPUS]


def _nvidia(root: Path) -> list[dict[str, Any]]:
    devices = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    if not devices:
        return []
    if root == Path("/"):
        try:
            said = subprocess.run(
                ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True,
            ).stdout
            return [{"model": _model(name), "memory": int(size) << 20} for name, _, size in (line.rpartition(",") for line in said.splitlines() if line)]
        except (OSError, subprocess.SubprocessError, ValueError):
            pass  # /proc tells the models at least
    found = []
    for path in devices:
        try:
            model = next(line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("Model"))
        except (OSError, StopIteration):
            continue
        found.append({"model": _model(model), "memory": 0})
    return found


def _model(name: str) -> str:
    """`NVIDIA A100-SXM4-40GB` as `nvidia-a100-sxm4-40gb`."""
    return "-".join(name.lower().split())
