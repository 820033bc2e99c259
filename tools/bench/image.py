"""A device's image: its size, and in a machine of 192 MiB the time from power-on to the first decision in the journal, the agent's own start, what the booted device takes of memory.

The machine is emulated (QEMU without KVM), offline, its clock at 1970. The first boot, which takes the configuration over, is not counted; each round after it is a start after a power cut.
With `--count`, another machine boots twice whose clock is its count of instructions: what it says of a start does not depend on how quick this computer is at that hour.
MB are 10^6 bytes.
"""

import json
import lzma
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from firmware_images import recipes, tools
from firmware_images.boot import API_PORT, credentials, hand_over
from firmware_images.build import Built, current
from firmware_images.errors import FirmwareError
from firmware_images.machine import Machine, Wiring, command, free_port, prepare
from firmware_images.recipes import MIB, Architecture, Profile

from .harness import ROOT, arguments, machine, note, report, spread

SIZE_MB, START_S, RSS_MB = 80.0, 3.0, 50.0
"""Bars: the device's image for amd64, compressed, kernel included; the agent from its start to its first decision and its readiness, whichever is later; its resident memory."""

BOOT_S = 600

COUNT = ("-icount", "shift=1,sleep=off")
"""QEMU's clock of a guest that goes by its instructions, two nanoseconds each, and stands still for nothing."""

COUNTED_PER_S = 500e6
"""Instructions of a second of that clock."""


def compressed_mb(disk: Path) -> float:
    """The whole disk, packed the quick way."""
    packer = lzma.LZMACompressor(preset=0)
    size = 0
    with disk.open("rb") as file:
        while piece := file.read(MIB):
            size += len(packer.compress(piece))
    return (size + len(packer.flush())) / 1e6


def boots(built: Built, arch: Architecture, chosen: Profile, rounds: int, options: Any, words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One first boot and `rounds` others of the same machine, with these `words` more for QEMU."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=built.image.parent) as top:
        state = Path(top)
        disk, flash = prepare(arch, built.image, state)
        found, token = credentials(state, None, [], True, "bench")
        handed = hand_over(arch, built, disk, found)
        for number in range(rounds + 1):
            port = free_port()
            request, whole = (urllib.request.Request(f"http://127.0.0.1:{port}/api/v1/decisions?limit={limit}", headers={"Authorization": f"Bearer {token}"}) for limit in (1, 1000))
            line = command(arch, disk, flash, Wiring(recipes.memory_mib(arch, chosen), {port: API_PORT}, handed, clock="1970-01-02"))
            with Machine([*line, *words]) as running:
                before = max((row["newest"] for row in rows), default=0)
                while (newest := max((int(record["seq"]) for record in _decisions(request)), default=0)) <= before:
                    if time.monotonic() - running.started_s > BOOT_S:
                        raise SystemExit(f"no decision within {BOOT_S} s:\n{running.tail()}")
                    time.sleep(0.1)
                decided = time.monotonic() - running.started_s
                running.wait_for("=== end of report", BOOT_S)
                told = running.between("=== novacron report", "=== end of report")
                records = _decisions(whole)
            rows.append({"first_decision_s": round(decided, 2), "newest": newest, **read_report(told, records)})
            note(options, f"{'first boot' if not number else f'round {number}'}: {json.dumps({key: value for key, value in rows[-1].items() if key != 'chain'})}")
    return rows


def _decisions(request: urllib.request.Request) -> list[dict[str, Any]]:
    """The newest decisions; none where there is no answer yet."""
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            found: list[dict[str, Any]] = json.load(answer)
    except (OSError, ValueError):
        return []
    return found


def read_report(lines: list[str], records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the device said of itself: seconds, MB, systemd's critical chain. `records`: its newest decisions, with all of this start's among them; each has the machine's own time."""
    text = "\n".join(lines)

    def number(pattern: str) -> float:
        found = re.search(pattern, text)
        if found is None:
            raise SystemExit(f"the report lacks {pattern}:\n{text}")
        return float(found[1])

    boot = max(records, key=lambda record: int(record["seq"]))["boot"]
    began = number(r"ExecMainStartTimestampMonotonic=(\d+)") / 1e6
    ready = number(r"\bActiveEnterTimestampMonotonic=(\d+)") / 1e6 - began
    decided = min(record["mono_ms"] for record in records if record["boot"] == boot) / 1e3 - began
    return {
        "agent_start_s": round(max(ready, decided), 2), "agent_ready_s": round(ready, 2), "agent_decides_s": round(decided, 2),
        "agent_rss_mb": round(number(r"VmRSS:\s+(\d+)") * 1024 / 1e6, 1), "used_mb": round((number(r"MemTotal:\s+(\d+)") - number(r"MemAvailable:\s+(\d+)")) * 1024 / 1e6, 1),
        "chain": [line for line in lines if re.search(r"[@+]\d|Startup finished", line)],
    }


def main() -> int:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--arch", default="amd64")
    parser.add_argument("--profile", default="device")
    parser.add_argument("--count", action="store_true", help="count instructions too, in two more boots")
    parser.add_argument("--home", type=Path, default=ROOT / ".novacron" / "images")
    options = parser.parse_args()
    about = machine()
    try:
        arch, chosen = recipes.architecture(options.arch), recipes.profile(options.profile)
        built = current(options.home, arch, chosen, lambda text: note(options, text))
        size = round(compressed_mb(built.image), 1)
        note(options, f"compressed: {size} MB")
        rows = boots(built, arch, chosen, options.rounds, options)
        counted_rows = boots(built, arch, chosen, 1, options, COUNT) if options.count else []
    except FirmwareError as error:
        raise SystemExit(str(error)) from None
    counted = rows[1:]
    figures = {name: spread([row[name] for row in counted]) for name in ("first_decision_s", "agent_start_s", "agent_ready_s", "agent_decides_s", "agent_rss_mb", "used_mb")}
    barred = (arch.name, chosen.name) == ("amd64", "device")
    ok = (not barred or size <= SIZE_MB) and figures["agent_start_s"]["median"] <= START_S and figures["agent_rss_mb"]["max"] < RSS_MB
    details = {
        "of that, MB": {name: round(value / 1e6, 1) for name, value in built.manifest["bytes"].items()}, **figures, "first boot": {key: value for key, value in rows[0].items() if key != "chain"},
        **({"million instructions until the agent is ready": {name: round(row["agent_ready_s"] * COUNTED_PER_S / 1e6) for name, row in zip(("first boot", "after a power cut"), counted_rows, strict=True)}} if counted_rows else {}),
        "critical chain of the quickest": min(counted, key=lambda row: float(row["first_decision_s"]))["chain"], "sha256": built.manifest["sha256"],
    }
    inputs = {"arch": arch.name, "profile": chosen.name, "memory_mib": recipes.memory_mib(arch, chosen), "emulated": True, "qemu": ".".join(map(str, tools.qemu_version(tools.find(arch.qemu) or arch.qemu))), "bars": {"compressed_mb": SIZE_MB if barred else None, "agent_start_s": START_S, "agent_rss_mb": RSS_MB}}
    return report(options, about, f"image of a {chosen.name} for {arch.name}, compressed, kernel included", size, "MB", ok, inputs=inputs, details=details)


if __name__ == "__main__":
    sys.exit(main())
