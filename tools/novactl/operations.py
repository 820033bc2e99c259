"""novactl's commands on what a workload has beside its life: checkpoints, snapshots, conversion, output, commands in it."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from .client import Api, CommandError, hub_api

FINAL = ("succeeded", "failed", "expired", "cancelled", "superseded")
"""States of an operation that has ended."""

LOOK_S = 0.5
"""Between two looks at an operation."""

FOLLOW_S = 1.0
"""Between two looks at a log that is followed."""

ENDED = ("ended", "lost", "gone")
"""Phases after which nothing more is written."""

CHECKPOINT_HEAD = ["checkpoint", "epoch", "taken", "MiB", "hash"]

SNAPSHOT_HEAD = ["snapshot", "taken", "MiB", "image", "file on its node"]

WHAT = {
    "checkpoint": "checkpoint", "restore": "restore", "delete-checkpoint": "delete-checkpoint", "checkpoints": "", "convert": "convert",
    "snapshot": "snapshot", "delete-snapshot": "delete-snapshot", "snapshots": "",
}
"""What `workload` is asked to do, to the kind of operation that does it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the operations take, added to the parser of `workload`."""
    parser.add_argument("--checkpoint", default="", metavar="NAME", help="checkpoint: its name (default: the operation's id); restore: which (default: the newest); delete-checkpoint: which")
    parser.add_argument("--snapshot", default="", metavar="NAME", help="snapshot: its name (default: the operation's id); delete-snapshot: which")
    parser.add_argument("--stop", action="store_true", help="checkpoint: the workload does not go on, until it is restored")
    parser.add_argument("--to", default="", choices=("container", "microvm"), help="convert: what it shall be")
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
    if options.what == "snapshots":
        found = hub.get(f"{path}/snapshots")
        return found, [[one["name"], _at(one["taken_ms"]), f"{one['bytes'] / (1 << 20):.1f}", one["image"], one["file"]] for one in found], SNAPSHOT_HEAD, 0
    if options.what == "convert" and not options.to:
        raise CommandError("workload convert: --to is missing; say --to microvm or --to container")
    thing = {"convert": "form", "snapshot": "snapshot", "delete-snapshot": "snapshot"}.get(options.what, "checkpoint")
    for word, said in (("checkpoint", options.checkpoint), ("snapshot", options.snapshot)):
        if said and word != thing:
            raise CommandError(f"workload {options.what}: --{word} is not for it; {f'say --{thing} NAME' if thing != 'form' else 'leave it out'}")
    body: dict[str, Any] = {"kind": WHAT[options.what], "name": options.checkpoint or options.snapshot}
    body |= {"id": options.id} if options.id else {}
    body |= {"stop": True} if options.stop else {}
    body |= {"to": options.to} if options.to else {}
    asked = hub.call("POST", f"{path}/operations", body)
    told = _until_ended(hub, path, asked["operation"], options.wait)
    row = [told["id"], told["kind"], told["state"], asked["node"], told["detail"].get("name", "") or told["detail"].get("form", ""), told["reason"]]
    return told, [row], ["operation", "kind", "state", "node", thing, "reason"], 1 if told["state"] in FINAL and told["state"] != "succeeded" else 0


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


def add_commands(command: Callable[[str, Callable[[Any], int], str], argparse.ArgumentParser], plain: Callable[[str], str]) -> None:
    """Add `logs` and `exec`; `plain` makes text safe for a terminal."""
    parser = command("logs", lambda options: logs(options, plain), "what a workload has written, asked of its edge by way of the hub")
    parser.add_argument("name", help="the workload's id")
    parser.add_argument("--tail", type=int, default=0, metavar="LINES", help="only the last lines of each stream")
    parser.add_argument("--follow", action="store_true", help="go on with what comes, until it has ended")
    parser = command("exec", lambda options: execute(options, plain), "run a command in a workload, where its edge lets the hub do that: novactl exec ID -- COMMAND")
    parser.add_argument("name", help="the workload's id")
    parser.add_argument("args", nargs="+", metavar="COMMAND", help="the command and its arguments, after --")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="it is killed after so long (60 at most)")


def logs(options: Any, plain: Callable[[str], str]) -> int:
    """`logs ID`."""
    if options.tail < 0:
        raise CommandError(f"logs: --tail {options.tail} is no number of lines; give one from 1 on, or leave it out")
    hub, path, since = hub_api(options.hub, options.token), f"{workload_path(options.name)}/logs", ""
    while True:
        try:
            said = hub.get(f"{path}?since={quote(since, safe='')}")
        except CommandError as error:
            if since and error.status in (404, 409):  # it has gone from its node since
                return 0
            raise
        if options.json:
            print(json.dumps(said))
            return 0
        if said["cut"] and since:
            print("(some of it was written and gone between two looks)", file=sys.stderr)
        for stream, target in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            lines = said[stream].splitlines(keepends=True)
            for line in lines[-options.tail:] if options.tail and not since else lines:
                target.write(plain(line.rstrip("\r\n")) + ("\n" if line.endswith("\n") else ""))
            target.flush()
        more = bool(said["stdout"] or said["stderr"]) and bool(since)
        since = said["since"]
        if not options.follow or (said["phase"] in ENDED and not more):
            return 0
        time.sleep(0.0 if more else FOLLOW_S)


def execute(options: Any, plain: Callable[[str], str]) -> int:
    """`exec ID -- COMMAND`; its exit status is the command's."""
    said = hub_api(options.hub, options.token).call("POST", f"{workload_path(options.name)}/exec", {"args": options.args, "timeout_s": options.timeout})
    for stream, target in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        target.write("".join(plain(line.rstrip("\r\n")) + ("\n" if line.endswith("\n") else "") for line in said[stream].splitlines(keepends=True)))
    if said["cut"]:
        print("(it wrote more than is shown)", file=sys.stderr)
    return int(said["code"])
