"""novactl's commands on moves of workloads with their state, and on drains that use them."""

import argparse
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from .client import Api, CommandError, hub_api

Show = Callable[[Any, bool, list[list[Any]] | None, list[str] | None], None]

HEAD = ["move", "workload", "from", "to", "state", "step", "MiB", "done", "expected s", "why"]
DRAIN_HEAD = ["workload", "to", "step", "done", "expected s", "why it is still there"]

MIB = 1 << 20

LOOK_S = 1.0
"""Between two looks while a drain is waited for."""


def add_commands(command: Callable[[str, Callable[[Any], int], str], argparse.ArgumentParser], show: Show) -> None:
    """Add `move` to the parser."""

    def move(options: Any) -> int:
        hub = hub_api(options.hub, options.token)
        if options.what == "list":
            found = hub.get("/api/v1/moves?limit=1000")
            show(found, options.json, [_row(one) for one in found], HEAD)
            return 0
        if not options.name:
            raise CommandError(f"move {options.what}: the {'workload' if options.what == 'begin' else 'move'} is missing; novactl move list lists moves")
        if options.what == "begin":
            asked = {"workload": options.name, **({"to": options.to} if options.to else {}), **({"limit_mbit": options.limit_mbit} if options.limit_mbit else {})}
            answer = hub.call("POST", "/api/v1/moves", asked)
        else:
            answer = hub.call("DELETE", f"/api/v1/moves/{quote(options.name, safe='')}")
        show(answer, options.json, [_row(answer)], HEAD)
        return 0

    parser = command("move", move, "running workloads to other nodes, with their state: begin WORKLOAD, list, cancel MOVE")
    parser.add_argument("what", choices=("begin", "list", "cancel"))
    parser.add_argument("name", nargs="?", default="", help="the workload, or the move")
    parser.add_argument("--to", default="", metavar="NODE", help="begin: to this node; without it to the best one")
    parser.add_argument("--limit-mbit", type=float, default=0.0, help="begin: bandwidth limit, Mbit/s")


def drained(hub: Api, node: str, wait_s: float) -> tuple[list[Any], list[list[Any]]]:
    """What is still on a node, as the hub tells it and as rows; where nothing is left, or `wait_s` seconds have passed."""
    end = time.monotonic() + wait_s
    while True:
        left = hub.get(f"/api/v1/nodes/{quote(node, safe='')}/drain")
        if not left or time.monotonic() >= end:
            return left, [_drain_row(one) for one in left]
        time.sleep(min(LOOK_S, max(0.0, end - time.monotonic())))


def _far(one: dict[str, Any]) -> str:
    length = one["progress"].get("length")
    return f"{min(100, 100 * one['progress'].get('moved_bytes', 0) // length)} %" if length else ""


def _expected(one: dict[str, Any]) -> str:
    return f"{one['expected_s']:.1f}" if one["expected_s"] is not None else ""


def _row(one: dict[str, Any]) -> list[Any]:
    return [
        one["id"], one["workload"], one["source"], one["target"], one["state"], one["step"] if one["state"] == "running" else "", f"{(one['bytes'] or one['needs_bytes']) / MIB:.1f}", _far(one), _expected(one),
        one["reason"] or one["problem"] or one.get("why_still", ""),
    ]


def _drain_row(one: dict[str, Any]) -> list[Any]:
    move = one["move"]
    return [one["workload"], *((move["target"], move["step"], _far(move), _expected(move), move["problem"]) if move is not None else ("", "", "", "", one["reason"]))]
