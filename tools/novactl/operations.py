"""novactl's commands on what a workload has beside its life: checkpoints."""

import argparse
import time
from typing import Any
from urllib.parse import quote

from .client import Api, CommandError

FINAL = ("succeeded", "failed", "expired", "cancelled", "superseded")
"""States of an operation that has ended."""

LOOK_S = 0.5
"""Between two looks at an operation."""

CHECKPOINT_HEAD = ["checkpoint", "epoch", "taken", "MiB", "hash"]

WHAT = {"checkpoint": "checkpoint", "restore": "restore", "delete-checkpoint": "delete-checkpoint", "checkpoints": ""}
"""What `workload` is asked to do, to the kind of operation that does it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the operations take, added to the parser of `workload`."""
    parser.add_argument("--checkpoint", default="", metavar="NAME", help="checkpoint: its name (default: the operation's id); restore: which (default: the newest); delete-checkpoint: which")
    parser.add_argument("--stop", action="store_true", help="checkpoint: the workload does not go on, until it is restored")
    parser.add_argument("--id", default="", help="of the operation: asked for again under the same id it is done once")
    parser.add_argument("--wait", type=float, default=120.0, metavar="SECONDS", help="wait so long until the operation has ended; 0: only ask")


def workload_path(name: str) -> str:
    """Its path in the hub's API. Raises `CommandError`."""
    if not name:
        raise CommandError("workload: the id is missing; novactl workload list lists them")
    return f"/api/v1/workloads/{quote(name, safe='')}"


def operate(hub: Api, options: Any) -> tuple[Any, list[list[Any]], list[str], int]:
    """Do what `options.what` says; what is shown (value, rows, head), and the exit status."""
    path = workload_path(options.name)
    if options.what == "checkpoints":
        found = hub.get(f"{path}/checkpoints")
        return found, [[one["name"], one["epoch"], _at(one["taken_ms"]), f"{one['bytes'] / (1 << 20):.1f}", one["root"][:16]] for one in found], CHECKPOINT_HEAD, 0
    body: dict[str, Any] = {"kind": WHAT[options.what], "name": options.checkpoint}
    body |= {"id": options.id} if options.id else {}
    body |= {"stop": True} if options.stop else {}
    asked = hub.call("POST", f"{path}/operations", body)
    told = _until_ended(hub, path, asked["operation"], options.wait)
    row = [told["id"], told["kind"], told["state"], asked["node"], told["detail"].get("name", ""), told["reason"]]
    return told, [row], ["operation", "kind", "state", "node", "checkpoint", "reason"], 1 if told["state"] in FINAL and told["state"] != "succeeded" else 0


def _until_ended(hub: Api, path: str, name: str, seconds: float) -> dict[str, Any]:
    """The operation when it has ended, or when so many seconds have passed."""
    end = time.monotonic() + seconds
    while True:
        found: dict[str, Any] | None = next((one for one in hub.get(f"{path}/operations") if one["id"] == name), None)
        if found is None:
            raise CommandError(f"operation {name} is not known any more: the workload has another node now; novactl workload list tells")
        if found["state"] in FINAL or time.monotonic() >= end:
            return found
        time.sleep(min(LOOK_S, max(0.0, end - time.monotonic())))


def _at(ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(ms / 1000)) if 0 < ms < 253_402_300_799_000 else ""
