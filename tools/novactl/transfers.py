"""novactl's commands on transfers and migration workers."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .client import CommandError, hub_api

Show = Callable[[Any, bool, list[list[Any]] | None, list[str] | None], None]

HEAD = ["transfer", "from", "to", "state", "MiB", "done", "expected s", "why"]


def add_commands(command: Callable[[str, Callable[[Any], int], str], argparse.ArgumentParser], show: Show) -> None:
    """Add `transfer` and `migration-worker` to the parser."""

    def transfer(options: Any) -> int:
        hub = hub_api(options.hub, options.token)
        if options.what == "list":
            found = hub.get("/api/v1/transfers?limit=1000")
            show(found, options.json, [_row(one) for one in found], HEAD)
            return 0
        if not options.id:
            raise CommandError(f"transfer {options.what}: the id is missing; novactl transfer list lists them")
        path = f"/api/v1/transfers/{quote(options.id, safe='')}"
        if options.what == "submit":
            if not (options.source and options.destination):
                raise CommandError("transfer submit: --from or --to is missing; give WORKER:PATH of both")
            document = {
                "id": options.id, "source": _end(options.source), "destination": _end(options.destination), "limit_mbit": options.limit_mbit, "base": options.base, "replace": options.replace,
            }
            answer = hub.call("POST", "/api/v1/transfers", document)
        else:
            answer = hub.call("DELETE", path) if options.what == "cancel" else hub.get(path)
        show(answer, options.json, [_row(answer)], HEAD)
        return 0

    def worker(options: Any) -> int:
        hub = hub_api(options.hub, options.token)
        if options.what == "list":
            found = hub.get("/api/v1/migration-workers")
            show(found, options.json, [[one["worker"], f"{one['silent_ms'] / 1000:.0f} s ago", one.get("cpus", ""), one.get("gpu", "") or "none", one.get("slots", "")] for one in found],
                 ["worker", "seen", "processors", "accelerator", "at once"])
            return 0
        if not (options.name and options.out):
            raise CommandError("migration-worker token: the name or --out is missing; novactl migration-worker token NAME --out FILE")
        token = hub.get(f"/api/v1/migration-workers/{quote(options.name, safe='')}/token")["token"]
        try:
            descriptor = os.open(options.out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                os.fchmod(descriptor, 0o600)
                file.write(token + "\n")
        except OSError as error:
            raise CommandError(f"migration-worker token: {options.out}: {error.strerror or error}") from None
        show({"worker": options.name, "file": str(options.out)}, options.json, [[options.name, str(options.out)]], ["worker", "token in"])
        return 0

    parser = command("transfer", transfer, "moves of files and disks between migration workers: list, submit ID --from WORKER:PATH --to WORKER:PATH, show ID, cancel ID")
    parser.add_argument("what", choices=("list", "submit", "show", "cancel"))
    parser.add_argument("id", nargs="?", default="", help="the transfer's id")
    parser.add_argument("--from", dest="source", default="", metavar="WORKER:PATH", help="what is moved; paths are below the worker's folder")
    parser.add_argument("--to", dest="destination", default="", metavar="WORKER:PATH", help="where to")
    parser.add_argument("--limit-mbit", type=float, default=0, help="bandwidth limit, Mbit/s (none); with one, its time is predicted")
    parser.add_argument("--base", default="", metavar="PATH", help="below the source's folder: a copy of what the destination has as a base")
    parser.add_argument("--replace", action="store_true", help="put it in place of what is there")
    parser = command("migration-worker", worker, "migration workers: list, token NAME --out FILE (what a worker of that name shows to the hub)")
    parser.add_argument("what", choices=("list", "token"))
    parser.add_argument("name", nargs="?", default="", help="token: the worker's name")
    parser.add_argument("--out", type=Path, help="token: the file to write, for its owner alone")


def _end(text: str) -> dict[str, str]:
    worker, colon, path = text.partition(":")
    if not (worker and colon and path):
        raise CommandError(f"transfer submit: {text!r} is not WORKER:PATH")
    return {"worker": worker, "path": path}


def _row(one: dict[str, Any]) -> list[Any]:
    document, progress, said = one["document"], one["progress"], one["prediction"]
    length = progress.get("length", 0)
    ends = [f"{document[end]['worker']}:{document[end]['path']}" for end in ("source", "destination")]
    return [
        one["id"], *ends, one["state"], f"{length / 2**20:.1f}" if length else "", f"{100 * min(1, progress['moved_bytes'] / length):.0f} %" if length else "",
        f"{said['estimated_duration_seconds']:.1f}" if said.get("estimated_duration_seconds") else "", one["waits_for"] or one["reason"],
    ]
