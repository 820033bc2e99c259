"""novactl against a real hub and a real agent: every command, with --json and without, exit statuses, errors in one line, planted damage."""

import contextlib
import http.server
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.config import EdgeConfig
from edge_runtime.config.schema import ApiConfig, BusConfig, DecisionsConfig, DevicesConfig, HostConfig, JournalConfig, UplinkConfig
from edge_runtime.contract import jsoncodec
from edge_runtime.runtime import EdgeRuntime
from hub.server import Hub
from tools.novactl.cli import _parser, _print, main

from .hub_side import EDGE, Background, served_hub
from .waiting import until

RULE: dict[str, Any] = {"id": "busy", "on": {"device": "host", "metric": "cpu_ratio"}, "trigger": "each", "if": {"value": "cpu_ratio", "op": ">=", "than": 0}, "then": [{"alert": {"severity": "info", "text": "cpu {cpu_ratio}"}}]}


@dataclass
class Pair:
    """A hub and an agent in this process."""

    background: Background
    hub: Hub
    edge: EdgeRuntime
    data: Path

    @property
    def hub_url(self) -> str:
        return f"http://127.0.0.1:{self.hub.port}"

    @property
    def edge_url(self) -> str:
        return f"http://127.0.0.1:{self.edge.api_port}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("novactl")
    with served_hub(folder / "hub") as (background, hub):
        url = f"mqtt://127.0.0.1:{hub.broker.port}"
        config = EdgeConfig(
            edge_id=EDGE, site="plant", region="eu", node=EDGE, data_dir=str(folder / "edge"), uplink=UplinkConfig(url=url, backoff_base_s=0.05, backoff_cap_s=0.3, protocol="3.1.1"),
            bus=BusConfig(url=url, protocol="3.1.1"), journal=JournalConfig(telemetry_commit_interval_s=0.05, min_free_bytes=0, ballast_bytes=0, target_hours=0),
            devices=DevicesConfig(host=HostConfig(interval_s=0.1)), decisions=DecisionsConfig(rules=(RULE,)), api=ApiConfig(port=0),
        )

        async def start() -> EdgeRuntime:
            edge = EdgeRuntime(config)
            await edge.start()
            await until(lambda: edge.uplink is not None and edge.uplink.up and edge.pipeline.decided >= 5, what="decisions")
            await until(lambda: (book := hub.ingest.books.get((EDGE, "decision"))) is not None and book.contiguous >= 5, what="decisions at the hub")
            await until(lambda: not edge.health(), what="a healthy edge")
            await until(lambda: hub.fleet.rows[EDGE].presence["health"] == "ok", what="its health at the hub")
            return edge

        edge = background.run(start())
        try:
            yield Pair(background, hub, edge, folder / "edge")
        finally:
            background.run(edge.stop())


@dataclass
class Result:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Command:
    """Runs novactl in this process; hub, token and edge are given by the environment, as a person would set them once."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Result:
        self._capsys.readouterr()
        try:
            status = main(list(arguments))
        except SystemExit as wrong_use:
            status = int(wrong_use.code or 0)
        said = self._capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        return Result(status, said.out, said.err)


@pytest.fixture
def novactl(pair: Pair, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    for name, value in (("HUB_URL", pair.hub_url), ("TOKEN", pair.hub.token), ("EDGE_URL", pair.edge_url)):
        monkeypatch.setenv(f"NOVACRON_{name}", value)
    monkeypatch.setenv("COLUMNS", "240")
    return Command(capsys)


def one_line(result: Result, *words: str) -> None:
    """Failed, and said so in one line on standard error."""
    assert result.status == 1 and result.out == "" and result.err.startswith("novactl: ") and result.err.count("\n") == 1, result
    for word in words:
        assert word in result.err, result.err


def test_status(pair: Pair, novactl: Command) -> None:
    shown = novactl("status")
    assert shown.status == 0 and "1 of 1 edges online" in shown.out and EDGE in shown.out and "embedded" in shown.out
    data = novactl("status", "--json").json
    assert data["hub"]["edges_online"] == 1 and data["edges"][0]["edge"] == EDGE
    local = novactl("status", "--edge-api", pair.edge_url, "--json").json
    assert local["edge"] == EDGE and local["link"] == "up"


@pytest.mark.parametrize("what", ["hierarchy", "edges", f"edge {EDGE}", "decisions", "events", "outages", "errors", "devices", "config"])
def test_get(novactl: Command, what: str) -> None:
    plain, machine = novactl("get", *what.split()), novactl("get", *what.split(), "--json")
    assert plain.status == machine.status == 0 and machine.out.count("\n") == 1
    assert type(json.loads(plain.out)) is type(machine.json)
    if what in ("edges", "decisions", "events", "devices"):
        assert machine.json and (EDGE in plain.out or "host" in plain.out)


def test_get_says_what_it_does_not_know(pair: Pair, novactl: Command) -> None:
    one_line(novactl("get", "everything"), "everything", "hierarchy", "devices")
    one_line(novactl("get", "edge"), "name is missing", "get edges")
    one_line(novactl("get", "edge", "nobody"), "edge:", "never been seen", "list")
    for odd in ("a b", "a/b", "..", "\u00e9", "a?b#c", "%00"):
        one_line(novactl("get", "edge", odd), "edge")
        one_line(novactl("get", "desired", odd), "edge")
    local = novactl("get", "decisions", "--edge-api", pair.edge_url, "--json")
    assert local.json and "edge" not in local.json[0]


def test_set_rules_twin_and_command(pair: Pair, novactl: Command, tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    file.write_text(json.dumps([RULE, {**RULE, "id": "busy-2"}]))
    answer = novactl("set", EDGE, "rules", str(file), "--json")
    assert answer.status == 0 and [rule["id"] for rule in answer.json["spec"]["rules"]] == ["busy", "busy-2"]
    generation = answer.json["generation"]
    pair.background.run(until(lambda: [rule.id for rule in pair.edge.engine.rules.rules] == ["busy", "busy-2"], what="the rules at the edge"))
    assert novactl("set", EDGE, "twin", "fan-1", "speed=3", "mode=eco", 'limits={"max":5}').status == 0
    held = novactl("set", EDGE, "twin", "fan-2", "on=true", "--json").json
    assert held["spec"]["twins"] == {"fan-1": {"speed": 3, "mode": "eco", "limits": {"max": 5}}, "fan-2": {"on": True}}, "a twin is added to, the others stay"
    assert novactl("set", EDGE, "twin", "fan-1", "speed=4", "--json").json["spec"]["twins"]["fan-1"] == {"speed": 4, "mode": "eco", "limits": {"max": 5}}
    order = novactl("set", EDGE, "command", "fan-1", "turn", "level=2", "--expires", "60", "--json").json
    assert order["command"]["name"] == "turn" and order["command"]["args"] == {"level": 2} and order["generation"] > generation
    pair.background.run(until(lambda: pair.hub.fleet.rows[EDGE].generation == order["generation"], what="the generation applied"))
    assert novactl("get", "desired", EDGE, "--json").json["generation"] == order["generation"]


def test_set_says_what_is_wrong_and_changes_nothing(pair: Pair, novactl: Command, tmp_path: Path) -> None:
    before = pair.hub.desired.get(EDGE)
    broken, lists = tmp_path / "broken.json", tmp_path / "object.json"
    broken.write_text("[{")
    lists.write_text('{"id": "a"}')
    one_line(novactl("set", EDGE, "rules", str(tmp_path / "none.json")), "none.json", "give a JSON file")
    one_line(novactl("set", EDGE, "rules", str(broken)), "broken.json")
    one_line(novactl("set", EDGE, "rules", str(lists)), "spec.rules")
    one_line(novactl("set", EDGE, "twin", "fan-1", "speed"), "KEY=VALUE")
    one_line(novactl("set", EDGE, "twin", "no way", "a=1"), "spec.twins")
    one_line(novactl("set", EDGE, "command", "fan-1"), "command")
    one_line(novactl("set", EDGE, "command", "fan-1", "on", "--expires", "-5"), "expires_seconds")
    one_line(novactl("set", "no way", "twin", "fan-1", "a=1"), "edge")
    assert pair.hub.desired.get(EDGE) == before
    for wrong in (("set", EDGE, "weather", "x"), ("set", EDGE, "rules"), ("fly",), ()):
        assert novactl(*wrong).status == 2


def test_a_twin_is_not_set_where_the_others_could_not_be_read(pair: Pair, novactl: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading fails for another reason than that there is none: writing then would take the other devices' twins away."""
    novactl("set", EDGE, "twin", "fan-9", "keep=true")
    before = pair.hub.desired[EDGE]
    with monkeypatch.context() as patch:
        patch.setattr("tools.novactl.client.Api.get", lambda self, path: self.call("GET", "/api/v1/outages?hours=x"))
        one_line(novactl("set", EDGE, "twin", "fan-1", "a=1"), "hours")
    assert pair.hub.desired[EDGE] == before


def test_explain(pair: Pair, novactl: Command) -> None:
    shown = novactl("explain", f"{EDGE}/2")
    assert shown.status == 0 and "rule busy fired for device host" in shown.out and "cpu_ratio = " in shown.out and "alert" in shown.out
    at_hub = novactl("explain", f"{EDGE}/2", "--json").json
    local = novactl("explain", "2", "--json").json
    assert at_hub["body"] == local["body"] and at_hub["seq"] == local["seq"] == 2
    one_line(novactl("explain", f"{EDGE}/999999"), "seq", "999999")
    one_line(novactl("explain", "999999"), "999999")
    one_line(novactl("explain", f"{EDGE}/x"), "EDGE/SEQ")
    one_line(novactl("explain", "nobody/1"), "nobody")


def test_verify(pair: Pair, novactl: Command) -> None:
    shown = novactl("verify")
    assert shown.status == 0 and shown.out.count("exact") == 3 and EDGE in shown.out
    data = novactl("verify", EDGE, "--json", "--edge-api", pair.edge_url).json
    assert data["exact"] and all("asked from the edge" in entry["proof"] or not entry["contiguous"] for entry in data["edges"][0]["streams"].values())
    one_line(novactl("verify", "nobody"), "nobody")
    one_line(novactl("verify", EDGE, "--edge-api", pair.hub_url))  # that is a hub


def test_verify_and_check_catch_a_row_that_is_gone(pair: Pair, novactl: Command) -> None:
    path = pair.hub.settings.data_dir / "hub.db"
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as file:
        kept = file.execute("SELECT * FROM records WHERE edge=? AND stream='decision' AND seq=3", (EDGE,)).fetchone()
        file.execute("DELETE FROM records WHERE id=?", (kept[0],))
        file.commit()
        try:
            shown = novactl("verify", EDGE)
            assert shown.status == 1 and "1 rows are missing" in shown.out
            data = novactl("verify", "--json").json
            assert not data["exact"] and data["edges"][0]["streams"]["decision"]["lost"] == 1
            checked = novactl("check")
            assert checked.status == 1 and "BAD" in checked.out and f"not exact: {EDGE}" in checked.out
        finally:
            file.execute(f"INSERT INTO records VALUES ({','.join('?' * len(kept))})", kept)
            file.commit()
    again = novactl("verify", "--json")
    assert again.status == 0, again.out


def test_verify_catches_an_edge_whose_chain_is_another(pair: Pair, novactl: Command) -> None:
    """A hub that computed over other content, planted in its book: the edge is asked and disagrees."""
    book = pair.hub.ingest.books[EDGE, "decision"]
    right = book.chain
    pair.background.run(_set_chain(book, bytes(16)))
    try:
        shown = novactl("verify", EDGE, "--edge-api", pair.edge_url)
        assert shown.status == 1 and "at the edge and" in shown.out
    finally:
        pair.background.run(_recompute(pair, right))
    again = novactl("verify", EDGE, "--edge-api", pair.edge_url, "--json")
    assert again.status == 0, again.out


async def _set_chain(book: Any, chain: bytes) -> None:
    book.chain = chain


async def _recompute(pair: Pair, _right: bytes) -> None:
    """The right chain at where the book stands by now."""
    book = pair.hub.ingest.books[EDGE, "decision"]
    while True:
        seq = book.contiguous
        chain = await pair.edge.journal.chain_at("decision", seq)
        if seq == book.contiguous and chain is not None:
            book.chain, book.mismatches = chain, 0
            return


def test_check(pair: Pair, novactl: Command) -> None:
    shown = novactl("check", "--edge-api", pair.edge_url)
    assert shown.status == 0 and "BAD" not in shown.out, shown.out
    assert [entry["check"] for entry in novactl("check", "--json", "--edge-api", pair.edge_url).json] == ["hub", "edges", "records", "edge"]
    away = novactl("check", "--hub", "http://127.0.0.1:1")
    assert away.status == 1 and away.out.count("BAD") == 3 and "cannot be reached" in away.out


def test_hostile_text_of_an_edge_reaches_no_terminal(pair: Pair, novactl: Command) -> None:
    """Markup of the table's library and control sequences of the terminal, in a presence."""
    status = {"v": 1, "edge": "evil", "boot": "b", "boot_n": 1, "state": "online", "reason": "[/red] [bold \x1b[2J\x1b]0;owned\x07", "health": "[link=x]\r\n\x9b31m [/]"}
    pair.background.run(_say(pair, status))
    try:
        for command in (("status",), ("check",), ("verify",), ("get", "edges")):
            shown = novactl(*command)
            assert shown.status in (0, 1) and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown.out.replace("\r\n", "\n")), shown.out
        assert "[/red] [bold" in novactl("status").out and "[link=x]" in novactl("check").out
    finally:
        pair.background.run(_forget(pair, "evil"))


async def _say(pair: Pair, status: dict[str, Any]) -> None:
    pair.hub.ingest.message(status["edge"], "status", jsoncodec.encode(status).encode(), False)
    await until(lambda: status["edge"] in pair.hub.fleet.rows, what="the presence taken in")


async def _forget(pair: Pair, edge: str) -> None:
    del pair.hub.fleet.rows[edge]


def test_diag_collects_what_it_can_and_names_what_is_missing(pair: Pair, novactl: Command, tmp_path: Path) -> None:
    answer = novactl("diag", "--out", str(tmp_path / "diag.tar.gz"), "--json").json
    assert answer["missing"] == []
    with tarfile.open(answer["archive"]) as archive:
        names = archive.getnames()
        assert {"novacron-diag/hub/status.json", "novacron-diag/hub/errors.json", "novacron-diag/edge/config.json", "novacron-diag/machine.txt"} <= set(names)
        whole = b"".join(member.read() for name in names if (member := archive.extractfile(name)) is not None)
    assert pair.hub.token.encode() not in whole, "the archive goes to other people: no secret is in it"
    alone = novactl("diag", "--out", str(tmp_path / "alone.tar.gz"), "--edge-api", "http://127.0.0.1:1")
    assert alone.status == 0 and len(json.loads(alone.out)["missing"]) == 6
    one_line(novactl("diag", "--out", str(tmp_path / "none" / "diag.tar.gz")), "none")


def test_a_hub_that_is_not_there_or_no_hub_or_refuses_is_said_in_one_line(novactl: Command, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.novactl.client.TIMEOUT_S", 1.0)  # the broker keeps quiet when it is spoken to in HTTP
    for command in (("status",), ("get", "edges"), ("verify",), ("explain", "a/1"), ("set", EDGE, "twin", "a", "b=1")):
        one_line(novactl(*command, "--hub", "http://127.0.0.1:1"), "http://127.0.0.1:1", "cannot be reached", "--hub")
        one_line(novactl(*command, "--token", "wrong"), "Authorization", "token")
    for url in ("nonsense", "http://", "ftp://127.0.0.1", "http://127.0.0.1:port", f"http://127.0.0.1:{pair.hub.broker.port}", "http://[::1", "file:///etc/passwd"):
        one_line(novactl("status", "--hub", url))


def test_a_server_that_answers_nonsense_is_said_in_one_line(novactl: Command) -> None:
    class Nonsense(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(500 if "status" in self.path else 200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"<html>\x1b[2J" if "status" in self.path else b"{")  # and fewer bytes than said

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Nonsense) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        for command in (("status",), ("get", "edges")):
            one_line(novactl(*command, "--hub", f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()
        thread.join()


def test_the_program_itself(pair: Pair, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    run = lambda *words: subprocess.run([sys.executable, "-m", "tools.novactl", *words], env=environment, capture_output=True, text=True, timeout=60)  # noqa: E731
    good = run("status", "--hub", pair.hub_url, "--token", pair.hub.token, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["hub"]["hub"] == "hub" and good.stderr == ""
    bad = run("status", "--hub", pair.hub_url)
    assert bad.returncode == 1 and bad.stdout == "" and bad.stderr.count("\n") == 1 and "Authorization" in bad.stderr


# -- the journal on disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(pair: Pair, tmp_path: Path) -> Path:
    """A copy of the running edge's journal, made as a backup would: through SQLite."""
    target = tmp_path / "data" / "journal"
    target.mkdir(parents=True)
    for name in ("journal.db", "telemetry.db"):
        with contextlib.closing(sqlite3.connect(f"file:{pair.data / 'journal' / name}?mode=ro", uri=True)) as source, contextlib.closing(sqlite3.connect(target / name)) as copy:
            source.backup(copy)
    return tmp_path / "data"


def test_journal_of_a_running_edge_and_of_a_copy(pair: Pair, novactl: Command, copied: Path) -> None:
    for data in (pair.data, copied, copied / "journal"):
        shown, machine = novactl("journal", "summary", "--data", str(data)), novactl("journal", "summary", "--data", str(data), "--json").json
        assert shown.status == 0 and "decision" in shown.out and {row["stream"] for row in machine} == {"decision", "event", "telemetry"}
        assert all(row["next"] > 1 and row["kept"] >= row["next"] - row["floor"] - 1 for row in machine)
        listed = novactl("journal", "show", "decision", "--data", str(data), "--limit", "3", "--json").json
        assert len(listed) == 3 and listed[0]["seq"] == listed[1]["seq"] + 1 and listed[0]["body"]["rule"].startswith("busy")
        checked = novactl("journal", "check", "--data", str(data), "--json")
        assert checked.status == 0 and checked.json["ok"] and checked.json["records"]["decision"] >= 5, checked.out
        assert novactl("journal", "check", "--data", str(data)).status == 0


@pytest.mark.parametrize(("statement", "word"), [
    ("UPDATE records_decision SET body=replace(body, '\"host\"', '\"hoxt\"') WHERE seq=3", "the chain breaks at 3"),
    ("UPDATE records_decision SET wall=wall+1 WHERE seq=2", "the chain breaks at 2"),
    ("UPDATE records_event SET chain=zeroblob(16) WHERE seq=1", "the chain breaks at 1"),
    ("DELETE FROM records_decision WHERE seq=4", "4 is missing, 5 follows"),
    ("DELETE FROM records_decision WHERE seq=1", "1 is missing, 2 follows"),
])
def test_journal_check_catches_a_changed_byte_and_a_removed_row(novactl: Command, copied: Path, statement: str, word: str) -> None:
    with contextlib.closing(sqlite3.connect(copied / "journal" / "journal.db")) as file:
        file.execute(statement)
        file.commit()
    checked = novactl("journal", "check", "--data", str(copied), "--json")
    assert checked.status == 1 and not checked.json["ok"] and word in str(checked.json["problems"])
    assert word in novactl("journal", "check", "--data", str(copied)).out


def test_journal_check_catches_a_removed_tail(novactl: Command, copied: Path) -> None:
    """The last rows are gone; only the marks know of them, once they were written with a receipt."""
    with contextlib.closing(sqlite3.connect(copied / "journal" / "journal.db")) as file:
        file.execute("UPDATE streams SET next_seq=(SELECT max(seq)+1 FROM records_decision) WHERE stream='decision'")
        file.execute("DELETE FROM records_decision WHERE seq=(SELECT max(seq) FROM records_decision)")
        file.commit()
    checked = novactl("journal", "check", "--data", str(copied), "--json")
    assert checked.status == 1 and "the marks say" in str(checked.json["problems"])


def test_a_journal_that_is_none_is_said_in_one_line(novactl: Command, copied: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for what in ("summary", "check", "show"):
        one_line(novactl("journal", what, "--data", str(empty)), "no ", "data_dir")
        one_line(novactl("journal", what, "--data", str(tmp_path / "nowhere")), "nowhere")
    one_line(novactl("journal", "show", "weather", "--data", str(copied)), "weather", "telemetry")
    one_line(novactl("journal", "show", "telemetry; DROP TABLE x", "--data", str(copied)), "unknown")
    shutil.copytree(copied, tmp_path / "damaged")
    for name in ("journal.db", "telemetry.db"):
        (tmp_path / "damaged" / "journal" / name).write_bytes(b"garbage, and a lot of it " * 500)
    for what in ("summary", "check", "show"):
        one_line(novactl("journal", what, "--data", str(tmp_path / "damaged")), "journal.db" if what != "show" else "")


@pytest.mark.parametrize("words", [
    ["--hub", "https://h", "--token", "t", "--ca-file", "c", "--edge-api", "e", "--json", "status"], ["status", "--hub", "https://h", "--token", "t", "--ca-file", "c", "--edge-api", "e", "--json"],
    ["--hub", "https://other", "--token", "t", "--ca-file", "c", "status", "--hub", "https://h", "--edge-api", "e", "--json"],
])
def test_where_the_hub_is_may_be_said_before_the_command_and_behind_it(words: list[str]) -> None:
    told = _parser().parse_args(words)
    assert (told.hub, told.token, told.ca_file, told.edge_api, told.json) == ("https://h", "t", "c", "e", True)
    nothing = _parser().parse_args(["status"])
    assert (nothing.hub, nothing.token, nothing.ca_file, nothing.edge_api, nothing.json) == (None, None, None, None, False)


def test_no_name_in_a_table_is_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is read by a program it is one line, in a narrow terminal it is folded."""
    monkeypatch.delenv("COLUMNS", raising=False)
    row = ["run-container-b0d1a2", "container", "placed", "gateway-1", "running", "a reason that is longer than any terminal of eighty columns is wide, at least beside the others"]
    head = ["workload", "kind", "state", "node", "said", "reason"]
    _print(None, False, [row], head)
    assert [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()] == ["workload", row[0]]
    _print(None, False, [row], head)
    assert row[-1] in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    _print(None, False, [row], head)
    said = capsys.readouterr().out
    assert "…" not in said and "".join(line[:said.index("kind")].strip() for line in said.splitlines()[1:]) == row[0]
