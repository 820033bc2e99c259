"""The commands of novactl."""

import argparse
import json
import os
import platform
import sqlite3
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .client import Api, CommandError, edge_api, hub_api
from .convert import add_commands as add_convert
from .journal import check as check_journal
from .journal import show as show_journal
from .journal import summary as journal_summary
from .run import add_commands as add_run
from .transfers import add_commands as add_transfers
from .verify import verify_edge
from .workloads import add_commands, explain_workload

WIDEST = 10_000
"""Columns of a table for what is no terminal: it is as wide as what is in it."""


def main(arguments: list[str] | None = None) -> int:
    """The command; exit status 0 ok, 1 something is wrong (said), 2 wrong use."""
    options = _parser().parse_args(arguments)
    if options.ca_file:
        os.environ["NOVACRON_CA_FILE"] = options.ca_file
    try:
        return int(options.run(options))
    except CommandError as error:
        print(f"novactl: {_plain(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    except (OSError, sqlite3.Error) as error:
        print(f"novactl: {_plain(str(error))}; look at the file and its permissions", file=sys.stderr)
        return 1


def _everywhere(parser: argparse.ArgumentParser, absent: Any) -> None:
    """Options that may stand before the command and behind it. `absent`: what they are where they are not given, behind it nothing, so that what stands before it holds."""
    parser.add_argument("--json", action="store_true", default=absent or False, help="print JSON")
    parser.add_argument("--hub", default=absent, help="the hub's address (NOVACRON_HUB_URL, default http://127.0.0.1:8460)")
    parser.add_argument("--token", default=absent, help="the hub's token (NOVACRON_TOKEN, or its token file)")
    parser.add_argument("--ca-file", default=absent, help="authorities by which the hub's https is trusted, PEM (NOVACRON_CA_FILE, else the system's)")
    parser.add_argument("--edge-api", default=absent, help="an edge's local API (NOVACRON_EDGE_URL)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="novactl", description="Look at and steer NovaCron")
    _everywhere(parser, None)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        _everywhere(made, argparse.SUPPRESS)
        made.set_defaults(run=run)
        return made

    command("status", _status, "the hub and its edges at a glance")
    get = command("get", _get, "one thing: hierarchy, edges, edge NAME, desired NAME, decisions, events, outages, devices, config, errors")
    get.add_argument("what")
    get.add_argument("name", nargs="?", default="")
    set_ = command("set", _set, "change desired state: set EDGE rules FILE, set EDGE twin DEVICE KEY=VALUE..., set EDGE command DEVICE NAME [KEY=VALUE...]")
    set_.add_argument("edge")
    set_.add_argument("what", choices=("rules", "twin", "command"))
    set_.add_argument("values", nargs="+")
    set_.add_argument("--expires", type=float, default=300, help="seconds until a command expires")
    explain = command("explain", _explain, "why a decision was made: EDGE/SEQ; why a workload is where it is, or waits: workload ID")
    explain.add_argument("decision", help="EDGE/SEQ, or SEQ with --edge-api; or the word workload")
    explain.add_argument("workload", nargs="?", default="", help="the workload's id")
    add_commands(command, _print, _plain)
    add_transfers(command, _print)
    add_run(command, _print, _plain)
    add_convert(command, _print)
    verify = command("verify", _verify, "prove that the hub holds exactly what the edges journalled")
    verify.add_argument("edges", nargs="*", help="default: all")
    journal = command("journal", _journal, "look into a journal on disk: summary, check, show STREAM")
    journal.add_argument("what", choices=("summary", "check", "show"))
    journal.add_argument("stream", nargs="?", default="decision")
    journal.add_argument("--data", type=Path, required=True, help="the edge's data_dir")
    journal.add_argument("--limit", type=int, default=20)
    command("check", _check, "is everything well? exit status 1 where not")
    diag = command("diag", _diag, "collect what a person needs to look at, as one archive")
    diag.add_argument("--out", type=Path, default=Path("novacron-diag.tar.gz"))
    return parser


def _print(value: Any, as_json: bool, rows: list[list[Any]] | None = None, head: list[str] | None = None) -> None:
    if as_json or rows is None:
        print(json.dumps(value, indent=None if as_json else 1))
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    # A name that is cut cannot be typed again: a narrow terminal has it in two lines, and what is no terminal is as wide as it has to be.
    table = Table(*(Column(name, overflow="fold") for name in head or []), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text("" if cell is None else _plain(str(cell))) for cell in row))
    Console(soft_wrap=True, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDEST).print(table)


def _plain(text: str) -> str:
    """Text of an edge or device for a terminal: it may hold anything, control sequences too."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _hub(options: Any) -> Api:
    return hub_api(options.hub, options.token)


def _age(milliseconds: int) -> str:
    return f"{max(0.0, time.time() - milliseconds / 1000):.0f} s ago" if milliseconds else "never"


def _status(options: Any) -> int:
    if options.edge_api and not options.hub:
        _print(edge_api(options.edge_api).get("/api/v1/status"), options.json)
        return 0
    hub = _hub(options)
    status, edges = hub.get("/api/v1/status"), hub.get("/api/v1/edges")
    if not options.json:
        print(f"hub {status['hub']}: {status['edges_online']} of {status['edges']} edges online, broker {status['broker']['kind']}")
        for text in (*status["problems"], status.get("storage", {}).get("warning", "")):
            if text:
                print(f"! {text}")
    rows = [
        [
            edge["edge"], "quarantine" if edge["quarantine"] else edge["state"], edge["reason"], _age(edge["last_seen_ms"]),
            *(edge["streams"][stream]["contiguous"] for stream in ("decision", "event", "telemetry")),
            sum(stream["behind"] for stream in edge["streams"].values()), edge["presence"].get("health", ""),
        ]
        for edge in edges
    ]
    _print({"hub": status, "edges": edges}, options.json, rows, ["edge", "state", "reason", "seen", "decisions", "events", "telemetry", "behind", "health"])
    return 0


def _get(options: Any) -> int:
    what, name = options.what, options.name
    if what in ("devices", "config") or (options.edge_api and what in ("decisions", "errors", "status", "journal")):
        _print(edge_api(options.edge_api).get(f"/api/v1/{what}"), options.json)
        return 0
    paths = {
        "hierarchy": "/api/v1/hierarchy", "edges": "/api/v1/edges", "edge": f"/api/v1/edges/{quote(name, safe='')}",
        "desired": f"/api/v1/edges/{quote(name, safe='')}/desired",
        "decisions": "/api/v1/decisions", "events": "/api/v1/events", "outages": "/api/v1/outages", "errors": "/api/v1/errors",
    }
    if what not in paths:
        raise CommandError(f"get: {what!r} is unknown; use {', '.join([*paths, 'devices', 'config'])}")
    if what in ("edge", "desired") and not name:
        raise CommandError(f"get {what}: the edge's name is missing; novactl get edges lists them")
    _print(_hub(options).get(paths[what]), options.json)
    return 0


def _pairs(values: list[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for value in values:
        key, separator, text = value.partition("=")
        if not separator or not key:
            raise CommandError(f"{value!r} is not KEY=VALUE")
        try:
            out[key] = json.loads(text)
        except ValueError:
            out[key] = text
    return out


def _set(options: Any) -> int:
    hub, values = _hub(options), options.values
    path = f"/api/v1/edges/{quote(options.edge, safe='')}"
    if options.what == "rules":
        try:
            rules = json.loads(Path(values[0]).read_text() if values[0] != "-" else sys.stdin.read())
        except (OSError, ValueError) as error:
            raise CommandError(f"rules: {values[0]} cannot be read ({error}); give a JSON file with a list of rules") from None
        answer = hub.call("PUT", f"{path}/desired", {"rules": rules})
    elif options.what == "twin":
        try:
            twins = hub.get(f"{path}/desired")["spec"].get("twins", {})
        except CommandError as error:
            if error.status != 404:  # anything else is not "none yet": the other twins would be lost
                raise
            twins = {}
        twins[values[0]] = {**twins.get(values[0], {}), **_pairs(values[1:])}
        answer = hub.call("PUT", f"{path}/desired", {"twins": twins})
    else:
        if len(values) < 2:
            raise CommandError("command: give the device and the command's name")
        answer = hub.call("POST", f"{path}/commands", {"device": values[0], "name": values[1], "args": _pairs(values[2:]), "expires_seconds": options.expires})
    _print(answer, options.json)
    return 0


def _explain(options: Any) -> int:
    if options.decision == "workload":
        return explain_workload(options, options.workload, _print, _plain)
    if options.workload:
        raise CommandError(f"explain: {options.workload!r} is too much; give EDGE/SEQ, or workload ID")
    edge, _, seq = options.decision.rpartition("/")
    if not seq.isdigit():
        raise CommandError(f"explain: {options.decision!r} is not EDGE/SEQ; novactl get decisions lists them")
    if not edge:
        record = edge_api(options.edge_api).get(f"/api/v1/decisions/{seq}")
    else:
        record = _hub(options).get(f"/api/v1/edges/{quote(edge, safe='')}/decisions/{seq}")
    if options.json:
        _print(record, True)
        return 0
    body = record["body"]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.get("dated_ms", record["wall_ms"]) / 1000))
    if record["kind"] != "decision":
        raise CommandError(f"explain: record {seq} is no decision but {record['kind']}: {json.dumps(body)}")
    print(_plain(f"decision {seq}: rule {body.get('rule')} {body.get('outcome')} for device {body.get('device')}"))
    print(f"  at {when} UTC ({record.get('dated_quality', record['time_quality'])}), boot {record['boot']}, {'alone (no hub)' if body.get('offline') else 'linked'}, desired state {body.get('generation')}")
    print("  because")
    inputs = body.get("inputs")
    for name, value in inputs.items() if isinstance(inputs, dict) else ():
        print(_plain(f"    {name} = {json.dumps(value)}"))
    actions = body.get("actions")
    print("  so" if actions else "  nothing was to be done")
    for action in actions if isinstance(actions, list) else ():
        print(f"    {json.dumps(action)}")
    return 0


def _verify(options: Any) -> int:
    from rich.console import Console
    from rich.progress import Progress

    hub = _hub(options)
    names = options.edges or [edge["edge"] for edge in hub.get("/api/v1/edges")]
    local = edge_api(options.edge_api) if options.edge_api else None
    results = []
    with Progress(console=Console(stderr=True), transient=True, disable=options.json or not sys.stderr.isatty()) as progress:
        task = progress.add_task("verify", total=len(names))
        for name in names:
            results.append(verify_edge(hub, name, local, lambda text: progress.update(task, description=text)))
            progress.advance(task)
    exact = all(result["exact"] for result in results)
    rows = [
        [
            result["edge"], stream, f"{entry['base']}..{entry['contiguous']}", entry["counted"], entry["lost"], entry["duplicates"], entry["chain"][:16],
            "exact" if entry["exact"] else "; ".join(entry["verdict"]),
        ]
        for result in results for stream, entry in result["streams"].items()
    ]
    _print({"exact": exact, "edges": results}, options.json, rows, ["edge", "stream", "range", "records", "lost", "duplicates dropped", "hash", "verdict"])
    return 0 if exact else 1


def _journal(options: Any) -> int:
    if options.what == "summary":
        rows = journal_summary(options.data)
        _print(rows, options.json, [list(row.values()) for row in rows], list(rows[0]) if rows else [])
        return 0
    if options.what == "show":
        _print(show_journal(options.data, options.stream, options.limit), options.json)
        return 0
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=options.json or not sys.stderr.isatty()) as progress:
        tasks: dict[str, Any] = {}

        def step(stream: str, done: int, total: int) -> None:
            task = tasks.setdefault(stream, progress.add_task(stream, total=total))
            progress.update(task, completed=done)

        report = check_journal(options.data, step)
    _print(report, options.json)
    return 0 if report["ok"] else 1


def _check(options: Any) -> int:
    results: list[dict[str, Any]] = []

    def look(name: str, run: Callable[[], tuple[bool, str]]) -> None:
        try:
            ok, text = run()
        except CommandError as error:
            ok, text = False, str(error)
        results.append({"check": name, "ok": ok, "text": text})

    hub = _hub(options)

    def health(api: Api) -> tuple[bool, str]:
        said = api.get("/healthz")
        return said["status"] == "ok" and not said["problems"], "; ".join(said["problems"]) or "ok"

    def edges() -> tuple[bool, str]:
        bad = [
            f"{edge['edge']}: {edge['quarantine'] or edge['presence'].get('health') or edge['reason']}" for edge in hub.get("/api/v1/edges")
            if edge["state"] != "online" or edge["quarantine"] or edge["presence"].get("health", "ok") != "ok"
        ]
        return not bad, "; ".join(bad) or "all online and well"

    def proof() -> tuple[bool, str]:
        bad = [name for name in (edge["edge"] for edge in hub.get("/api/v1/edges")) if not verify_edge(hub, name, None)["exact"]]
        return not bad, f"not exact: {', '.join(bad)}" if bad else "exact"

    look("hub", lambda: health(hub))
    look("edges", edges)
    look("records", proof)
    if options.edge_api:
        look("edge", lambda: health(edge_api(options.edge_api)))
    _print(results, options.json, [["ok" if r["ok"] else "BAD", r["check"], r["text"]] for r in results], ["", "check", ""])
    return 0 if all(result["ok"] for result in results) else 1


def _diag(options: Any) -> int:
    hub, local = _hub(options), edge_api(options.edge_api)
    wanted: list[tuple[str, Api, str]] = [
        (f"hub/{name}.json", hub, f"/api/v1/{name}") for name in ("status", "hierarchy", "edges", "decisions", "events", "outages", "errors", "nodes", "scheduler")
    ] + [(f"edge/{name}.json", local, f"/api/v1/{name}") for name in ("status", "journal", "devices", "config", "errors", "decisions")]
    missing = []
    with tarfile.open(options.out, "w:gz") as archive:

        def add(name: str, text: str) -> None:
            data = text.encode()
            info = tarfile.TarInfo(f"novacron-diag/{name}")
            info.size, info.mtime = len(data), int(time.time())
            archive.addfile(info, BytesIO(data))

        for name, api, path in wanted:
            try:
                add(name, json.dumps(api.get(path), indent=1))
            except CommandError as error:
                missing.append(f"{name}: {error}")
        add("machine.txt", f"{platform.platform()}\n{platform.python_version()}\ncores {os.cpu_count()}\nload {os.getloadavg()}\n")
        add("missing.txt", "\n".join(missing) + "\n")
    _print({"archive": str(options.out), "missing": missing}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
