"""novactl's commands on workloads and nodes."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import moves, operations
from .client import Api, CommandError, hub_api

Show = Callable[[Any, bool, list[list[Any]] | None, list[str] | None], None]

GIB = 1 << 30

LAST_DATE_MS = 253_402_300_799_000
"""The last millisecond that a date can be written for, in the year 9999."""


def add_commands(command: Callable[[str, Callable[[Any], int], str], argparse.ArgumentParser], show: Show, plain: Callable[[str], str]) -> None:
    """Add `rebalance`, `workload`, `nodes` and `node` to the parser; `show(value, as_json, rows, head)` prints, `plain` makes text safe for a terminal."""

    def workload(options: Any) -> int:
        hub = hub_api(options.hub, options.token)
        if options.what == "submit":
            return _submit(hub, options, show)
        if options.what in operations.WHAT:
            value, rows, head, code = operations.operate(hub, options)
            show(value, options.json, rows, head)
            return code
        if options.what == "what-if":
            return _what_if(hub, options, show, plain)
        if options.what == "cancel":
            answer = hub.call("DELETE", operations.workload_path(options.name))
            show(answer, options.json, [_row(answer)], HEAD)
            return 0
        asked = "&".join(f"{key}={quote(value, safe='')}" for key, value in (("state", options.state), ("node", options.node), ("limit", str(options.limit))) if value)
        found = hub.get(f"/api/v1/workloads?{asked}")
        show(found, options.json, [_row(one) for one in found], HEAD)
        return 0

    def nodes(options: Any) -> int:
        found = hub_api(options.hub, options.token).get("/api/v1/nodes")
        show(found, options.json, [_node_row(one) for one in found], NODE_HEAD)
        return 0

    def node(options: Any) -> int:
        hub = hub_api(options.hub, options.token)
        answer = hub.call("POST", f"/api/v1/nodes/{quote(options.name, safe='')}/{options.what}")
        if options.what == "drain":
            left, rows = moves.drained(hub, options.name, options.wait)
            answer = {**answer, "left": left}
            if rows and not options.json:
                show(left, False, rows, moves.DRAIN_HEAD)
            if left and options.wait:
                show(answer, options.json, [_node_row(answer)], NODE_HEAD)
                return 1
        show(answer, options.json, [_node_row(answer)], NODE_HEAD)
        return 0

    def rebalance(options: Any) -> int:
        hub = hub_api(options.hub, options.token)
        if options.what == "list":
            found = hub.get("/api/v1/rebalance")
            show(found, options.json, [[one["id"], one["kind"], one["state"], f"{min(one['step'] + 1, len(one['steps']))} of {len(one['steps'])}", one["moves"], one["reason"] or one["text"]] for one in found],
                 ["id", "kind", "state", "step", "moves", "reason"])
            return 0
        if options.what == "cancel":
            if not options.id:
                raise CommandError("rebalance cancel: the id is missing; novactl rebalance list lists them")
            answer = hub.call("DELETE", f"/api/v1/rebalance/{quote(options.id, safe='')}")
        else:
            answer = hub.call("POST", "/api/v1/rebalance", {"drain": options.drain, "go": options.what == "go"})
        rows = [[number + 1, move["workload"], move["source"], move["target"], move["how"], move["state"], move.get("waits_for", "")] for number, step in enumerate(answer["steps"]) for move in step]
        show(answer, options.json, rows, ["step", "workload", "from", "to", "how", "state", "waits for"])
        if not options.json:
            print(plain(f"{answer['id'] or 'a plan only'}: {answer['state']}: {answer['reason'] or answer['text']}"))
            for one in answer["refused"]:
                print(plain(f"  not moved: {one['workload']}: {one['reason']}"))
            for one in answer["stays"]:
                print(plain(f"  stays: {one['workload']} on {one['node']}: {one['reason']}"))
        return 0

    parser = command("rebalance", rebalance, "moves that rebalance the cluster or empty nodes: plan (default), go, list, cancel ID")
    parser.add_argument("what", nargs="?", default="plan", choices=("plan", "go", "list", "cancel"))
    parser.add_argument("id", nargs="?", default="", help="cancel: which")
    parser.add_argument("--drain", action="append", default=[], metavar="NODE", help="empty this node; may be given several times")
    parser = command("workload", workload, "workloads: submit FILE (- for standard input), what-if FILE (what a submit would say; changes nothing), list, cancel ID; checkpoint, restore, checkpoints, delete-checkpoint, snapshot, snapshots, delete-snapshot, convert ID")
    parser.add_argument("what", choices=("submit", "what-if", "list", "cancel", *operations.WHAT))
    parser.add_argument("name", nargs="?", default="", help="the file, or the workload's id")
    parser.add_argument("--state", default="", help="list: in this state only")
    parser.add_argument("--node", default="", help="list: on this node only")
    parser.add_argument("--limit", type=int, default=100, help="list: at most so many")
    parser.add_argument("--lose", action="append", default=[], metavar="NODE", help="what-if: as if this node were gone; may be given several times")
    operations.add_arguments(parser)
    operations.add_commands(command, plain)
    command("nodes", nodes, "every node: what it has and what is in use")
    parser = command("node", node, "one node: drain NAME, cordon NAME, uncordon NAME")
    parser.add_argument("what", choices=("drain", "cordon", "uncordon"))
    parser.add_argument("name")
    parser.add_argument("--wait", type=float, default=0.0, metavar="S", help="drain: seconds to wait until it is empty; what is left then is told, with the reason, and the exit status is 1")
    moves.add_commands(command, show)


NODE_HEAD = ["node", "kind", "origin", "status", "cpu", "memory GiB", "gpu", "workloads", "runs", "problem"]
HEAD = ["workload", "kind", "state", "node", "said", "starts", "reason"]


def _row(one: dict[str, Any]) -> list[Any]:
    return [one["workload"], one["document"].get("kind", "container"), one["state"], one["node"], _said(one), _start(one), one["reason"]]


def _start(one: dict[str, Any]) -> str:
    """When a waiting job is to start, and where."""
    if one["state"] != "pending" or one["planned_ms"] is None:
        return ""
    return f"{_at(one['planned_ms'])} on {', '.join(dict.fromkeys(one['planned_nodes']))}"


def _at(ms: int | None) -> str:
    """A time for people; in ms where no date can be written for it."""
    if ms is None or ms > LAST_DATE_MS:
        return "" if ms is None else f"{ms} ms"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(ms / 1000))


def _node_row(one: dict[str, Any]) -> list[Any]:
    resources = one["resources"]

    def used(name: str, unit: float) -> str:
        held, there = resources.get(name, (0, 0))
        return f"{held / unit:.1f} of {there / unit:.1f}"

    gpus = one["gpus"]
    return [
        one["node"], one["kind"], one["origin"], one["cordon"] or one["status"], used("cpu", 1000), used("memory", GIB), f"{sum(1000 - gpu['free_milli'] for gpu in gpus) / 1000:.1f} of {len(gpus)}" if gpus else "",
        one["workloads"], ",".join(one["runs"]), one["problem"],
    ]


def _documents(options: Any) -> Any:
    """The file that is named, as JSON. Raises `CommandError`."""
    if not options.name:
        raise CommandError(f"workload {options.what}: the file is missing; give a JSON file with a workload or a list of them, or -")
    try:
        return json.loads(Path(options.name).read_text() if options.name != "-" else sys.stdin.read())
    except (OSError, ValueError) as error:
        raise CommandError(f"workload {options.what}: {options.name} cannot be read ({error}); give a JSON file with a workload or a list of them") from None


def _submit(hub: Api, options: Any, show: Show) -> int:
    answer = hub.call("POST", "/api/v1/workloads", _documents(options))
    show(answer, options.json, [_row(one) for one in answer["workloads"]], HEAD)
    together = answer["together"]
    if together is not None and not options.json:
        print(f"{together['placed']} placed {together['how']}, at most {together['bound']} could be")
    return 0


def _what_if(hub: Api, options: Any, show: Show, plain: Callable[[str], str]) -> int:
    """What a submit would say now; fails where a deadline would be refused, as the submit would."""
    documents = _documents(options)
    answer = hub.call("POST", "/api/v1/what-if", {"workloads": documents if isinstance(documents, list) else [documents], "lose": options.lose})
    jobs = {one["workload"]: one for one in answer["jobs"]}
    rows = [[one["workload"], "placed", one["node"], *_times(jobs.get(one["workload"])), ""] for one in answer["placed"]]
    rows += [[one["workload"], jobs.get(one["workload"], {}).get("verdict", "waits"), "", *_times(jobs.get(one["workload"])), one["reason"]] for one in answer["waiting"]]
    rows += [[one["workload"], "moves", one["to"], "", "", f"from {one['from']}, by a {one['how']}"] for one in answer["moved"]]
    show(answer, options.json, rows, ["workload", "verdict", "node", "starts", "ends by", "reason"])
    refused = [one for one in answer["jobs"] if one["verdict"] == "refused"]
    for one in refused if not options.json else ():
        print(plain(f"{one['workload']}: {one['remedy']}"))
    return 1 if refused else 0


def _times(job: dict[str, Any] | None) -> tuple[str, str]:
    return ("", "") if job is None else (_at(job["planned_ms"]), _at(job["planned_end_ms"]))


def _said(one: dict[str, Any]) -> str:
    """The edge's last word, what one that can be converted is now, and whose doing it is where that was not the hub's."""
    return str(one["said"]) + (f" as {one['form']}" if one["form"] else "") + (f" (moved by its site, from {one['moved_from']})" if one["moved_from"] else "")


def explain_workload(options: Any, name: str, show: Show, plain: Callable[[str], str]) -> int:
    """`explain workload ID`: per node why it will do or will not."""
    said = hub_api(options.hub, options.token).get(operations.workload_path(name) + "/explain")
    if options.json:
        show(said, True, None, None)
        return 0
    print(plain(f"workload {said['workload']}: {said['state']}" + (f" on {said['node']}" if said["node"] else "") + (f": {said['reason']}" if said["reason"] else "")))
    print(plain(f"  {said['summary']}"))
    if _start(said):
        print(plain(f"  starts {_start(said)}" + (f", {said['late_ms'] / 1000:g} s after its deadline: {said['late_because']}" if said["late_ms"] else "")))
    for advice in said["advice"]:
        print(plain(f"  {advice}"))
    rows = []
    for node in said["nodes"]:
        parts = ", ".join(f"{policy} {part['score']}*{part['weight']}" for policy, part in node["parts"].items())
        rows.append([node["node"], "yes" if node["fits"] else "no", node["score"], "; ".join(node["why"]) or parts, "; ".join(node["remedy"])])
    show(said, False, rows, ["node", "fits", "score", "why", "what would help"])
    return 0
