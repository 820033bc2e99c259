"""The edge's own HTTP: every route, its errors, the token, health that can be unhealthy."""

import asyncio
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.config import EdgeConfig, public_dict
from edge_runtime.config.schema import ApiConfig, BusConfig, DecisionsConfig, DevicesConfig, HostConfig, UplinkConfig
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.records import CHAIN_START
from edge_runtime.local_api import aiohttp_server
from edge_runtime.local_api.server import MAX_BODY_BYTES
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.system.service import ServiceManager
from tests.prometheus_text import parse_exposition

from .edges import EACH, Edge, Edges, LocalBroker
from .waiting import until

ALERT = {**EACH, "id": "alert", "then": [{"alert": {"severity": "critical", "text": "{device} at {temp}"}}]}


async def with_decisions(edges: Edges, count: int = 3) -> Edge:
    """An edge without bus that has decided `count` times."""
    edge = await edges.start(rules=(ALERT,))
    for number in range(count):
        edge.runtime.pipeline.host_reading("boiler-1", {"temp": 90 + number})
    await until(lambda: edge.runtime.pipeline.decided == count, what="the decisions")
    await edge.runtime.journal.flush()
    return edge


async def test_status_devices_config_and_errors(edges: Edges) -> None:
    edge = await with_decisions(edges)
    status = await edge.get("/api/v1/status")
    assert (status["edge"], status["link"], status["uplink_error"], status["generation"], status["decided"], status["decided_offline"]) == ("gw-1", "down", "disabled", 0, 3, 3)
    assert (status["boot_n"], status["devices"], status["readings"], status["rules"], status["models"], status["health"]) == (1, 1, 3, ["alert"], {}, [])
    assert status["journal"]["decision"]["next"] == 4 and status["backlog_records"] is None and status["boot"] == edge.runtime.journal.boot
    (device,) = await edge.get("/api/v1/devices")
    assert (device["id"], device["values"], device["readings"]) == ("boiler-1", {"temp": 92}, 3) and device["seen_seconds_ago"] >= 0
    assert {**(await edge.get("/api/v1/devices/boiler-1")), "seen_seconds_ago": 0} == {**device, "seen_seconds_ago": 0}
    config = await edge.get("/api/v1/config")
    assert config == json.loads(json.dumps(public_dict(edge.config))) and "hunter2" not in json.dumps(config) and config["uplink"]["password"] == "***"
    edge.runtime.pipeline.host_reading("boiler-1", {"temp": "hot"})
    assert await edge.get("/api/v1/errors") == {"devices": [], "rules": {"alert:type": 1}}


async def test_what_a_running_edge_counts_is_valid_exposition(edges: Edges) -> None:
    edge = await with_decisions(edges)
    edge.runtime.metrics.inc("device_rejected_messages_total", reason="json")
    found = {name.removeprefix("novacron_edge_"): series for name, series in parse_exposition(await edge.get("/metrics")).items()}
    assert found["decisions_total"] == found["decisions_offline_total"] == found["readings_total"] == {"": 3} and found["alerts_total"] == {'{severity="critical"}': 3}
    assert found["devices"] == {"": 1} and found["link_up"] == {"": 0} and found["resident_memory_bytes"][""] > 1 << 20 and found["journal_commits_total"][""] >= 2


async def test_what_this_machines_start_made_of_what_it_was_given_is_journalled(edges: Edges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / "configuration").write_text("refused\nedge.yaml: nise: is unknown; did you mean nice?\n")
    monkeypatch.setenv("NOVACRON_TOLD", str(tmp_path / "told"))
    edge = await with_decisions(edges, 0)
    first, second = reversed(await edge.get("/api/v1/journal/event"))
    assert first["kind"] == "boot" and second["kind"] == "provisioned"
    assert second["body"] == {"what": "configuration", "outcome": "refused", "reason": "edge.yaml: nise: is unknown; did you mean nice?"}


async def test_the_journal_is_shown_newest_first_with_limits(edges: Edges) -> None:
    edge = await with_decisions(edges, 5)
    assert [item["seq"] for item in await edge.get("/api/v1/decisions")] == [5, 4, 3, 2, 1]
    assert [item["seq"] for item in await edge.get("/api/v1/decisions?limit=2&before=4")] == [3, 2]
    assert len(await edge.get("/api/v1/decisions?limit=0")) == 1 and len(await edge.get("/api/v1/journal/decision?limit=999999999")) == 5
    one = await edge.get("/api/v1/decisions/2")
    assert one["kind"] == "decision" and one["body"]["inputs"] == {"temp": 91} and one["body"]["offline"] is True and one["time_quality"] in ("rtc", "ntp", "unsynced")
    assert one["body"]["actions"] == [{"alert": {"severity": "critical", "text": "boiler-1 at 91"}}]
    assert [item["body"]["values"] for item in await edge.get("/api/v1/journal/telemetry?limit=1")] == [{"temp": 94}]
    assert [item["body"]["decision"] for item in await edge.get("/api/v1/journal/event?limit=5")] == [5, 4, 3, 2, 1]
    journal = await edge.get("/api/v1/journal")
    assert journal["errors"] == {} and journal["telemetry_open"] is True and journal["recoveries"] == [] and journal["used_bytes"].keys() == {"journal", "telemetry"}
    marks = journal["streams"]["decision"]
    assert (marks["next"], marks["floor"], marks["receipted"], marks["dropped"]) == (6, 1, 0, 0)
    assert (await edge.get("/api/v1/journal/chain?stream=decision&seq=5"))["chain"] == marks["chain"]
    assert (await edge.get("/api/v1/journal/chain?stream=decision&seq=0"))["chain"] == CHAIN_START.hex()
    assert (await edge.get("/api/v1/journal/chain?stream=decision&seq=99"))["chain"] is None


ERRORS: list[tuple[str, str, bytes | None, int, str]] = [
    ("GET", "/api/v1/devices/nobody", None, 404, "device"), ("GET", "/api/v1/decisions/99", None, 404, "seq"), ("GET", "/api/v1/decisions/first", None, 400, "seq"), ("GET", "/api/v1/decisions/1e3", None, 400, "seq"),
    ("GET", "/api/v1/decisions/" + "9" * 19, None, 400, "seq"), ("GET", "/api/v1/decisions/%C2%B2", None, 400, "seq"), ("GET", "/api/v1/decisions?limit=-1", None, 400, "limit"), ("GET", "/api/v1/decisions?limit=%C2%B2", None, 400, "limit"),
    ("GET", "/api/v1/decisions?before=x", None, 400, "before"), ("GET", "/api/v1/journal/secrets", None, 400, "stream"), ("GET", "/api/v1/journal/event?limit=1.5", None, 400, "limit"),
    ("GET", "/api/v1/journal/chain", None, 400, "stream"), ("GET", "/api/v1/journal/chain?stream=decision", None, 400, "stream"), ("GET", "/api/v1/journal/chain?stream=x&seq=1", None, 400, "stream"),
    ("GET", "/api/v1/journal/chain?stream=decision&seq=%FF", None, 400, "seq"), ("PATCH", "/api/v1/devices/fan-1/desired", b"", 400, "payload"), ("PATCH", "/api/v1/devices/fan-1/desired", b"{", 400, "payload"),
    ("PATCH", "/api/v1/devices/fan-1/desired", b"[1]", 400, "desired"), ("PATCH", "/api/v1/devices/fan-1/desired", b"\xff", 400, "payload"), ("PATCH", "/api/v1/devices/fan-1/desired", b'{"x": NaN}', 400, "payload"),
    ("PATCH", "/api/v1/devices/fan-1/desired", b"[" * 5000, 400, "payload"), ("PATCH", "/api/v1/devices/fan-1/desired", json.dumps(dict.fromkeys(map(str, range(200)), 1)).encode(), 400, "desired"),
    ("PATCH", "/api/v1/devices/%2B/desired", b'{"x": 1}', 400, "device"), ("PATCH", "/api/v1/devices/%23/desired", b'{"x": 1}', 400, "device"), ("PATCH", "/api/v1/devices/a%2Fb/desired", b'{"x": 1}', 400, "device"),
    ("PATCH", "/api/v1/devices/a%20b/desired", b'{"x": 1}', 400, "device"), ("PATCH", "/api/v1/devices/" + "x" * 65 + "/desired", b'{"x": 1}', 400, "device"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "field"), ERRORS, ids=[f"{row[0]} {row[1][:60]} {number}" for number, row in enumerate(ERRORS)])
async def test_an_error_names_its_field_and_the_remedy(edges: Edges, method: str, path: str, body: bytes | None, status: int, field: str) -> None:
    edge = await edges.start()
    told, answer = await edge.ask(path, method, body=body)
    assert (told, answer["field"]) == (status, field) and answer["problem"] and answer["remedy"]
    assert edge.runtime.registry.devices == {} and edge.runtime.journal.state_keys("twin/") == []


async def test_what_is_too_large_not_there_or_not_allowed(edges: Edges) -> None:
    edge = await edges.start()
    assert (await edge.ask("/api/v1/devices/fan-1/desired", "PATCH", body=b'{"x": "' + b"y" * MAX_BODY_BYTES + b'"}'))[0] == 413
    assert (await edge.ask("/api/v1/nothing"))[0] == 404 and (await edge.ask("/api/v1/status", "DELETE"))[0] == 405
    assert edge.runtime.registry.devices == {}


async def test_no_desired_name_can_end_the_bus(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port)
    for name in ("%2B", "%23", "a%2F%23"):
        await edge.ask(f"/api/v1/devices/{name}/desired", "PATCH", body={"x": 1})
    assert edge.runtime.bus is not None and edge.runtime.bus._session is not None
    edge.runtime.bus._session.abort("the test cuts the line")
    await edge.bus_up(2)
    assert edge.runtime.bus._task is not None and not edge.runtime.bus._task.done()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["/api/v1/decisions", "/api/v1/journal/event", "/api/v1/journal/chain", "/api/v1/devices/"]), st.binary(max_size=12), st.sampled_from(["limit", "before", "seq", "stream"]), st.binary(max_size=200))
def test_no_query_and_no_body_gives_a_500(api_process: int, path: str, value: bytes, name: str, body: bytes) -> None:
    quoted = "".join(f"%{byte:02X}" for byte in value)
    requests = [f"GET {path}?{name}={quoted} HTTP/1.0\r\n\r\n".encode(), f"GET {path}{quoted} HTTP/1.0\r\n\r\n".encode()]
    requests.append(f"PATCH /api/v1/devices/{quoted or 'x'}/desired HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    for request in requests:
        assert status_of(api_process, request) in (200, 400, 404)


def status_of(port: int, request: bytes) -> int:
    """The status of one raw HTTP request."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(request)
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
    return int(answer.split(b" ", 2)[1])


AGENT = """
import asyncio, sys
from pathlib import Path
from edge_runtime.config.load import load_config
from edge_runtime.runtime import EdgeRuntime
async def main():
    runtime = EdgeRuntime(load_config(None).config)
    await runtime.start()
    print(runtime.api_port, "aiohttp.client" in sys.modules, flush=True)
    await runtime.wait()
asyncio.run(main())
"""


def agent(folder: Path, **variables: str) -> tuple["subprocess.Popen[str]", list[str]]:
    """An agent of its own process with an API and nothing else; what it said at start."""
    settings_ = {"DATA_DIR": str(folder), "UPLINK__ENABLED": "false", "DEVICES__HOST__ENABLED": "false", "API__PORT": "0", "JOURNAL__BALLAST_BYTES": "0", "JOURNAL__MIN_FREE_BYTES": "0", **variables}
    process = subprocess.Popen([sys.executable, "-c", AGENT], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd(), **{f"NOVACRON_EDGE__{name}": value for name, value in settings_.items()}})
    assert process.stdout is not None
    return process, process.stdout.readline().split()


@pytest.fixture(scope="module")
def api_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The port of an agent that also proves what a lean process looks like."""
    process, (port, client) = agent(tmp_path_factory.mktemp("agent"))
    assert client == "False"  # the server came without aiohttp's client half
    yield int(port)
    process.terminate()
    assert process.wait(20) == 0


# -- the token -----------------------------------------------------------------------------------------------------------------


async def test_a_token_guards_the_api_and_nothing_else(edges: Edges, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    edge = await edges.start(api=ApiConfig(port=0, token_file=str(tmp_path / "token")))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": "Bearer s3cret2"}, {"Authorization": "Basic s3cre"}):
        for method, path in (("GET", "/api/v1/status"), ("GET", "/api/v1/config"), ("GET", "/api/v1/nothing"), ("PATCH", "/api/v1/devices/x/desired")):
            status, answer = await edge.ask(path, method, headers=headers)
            assert status == 401 and answer["field"] == "Authorization" and answer["remedy"] and "s3cret" not in json.dumps(answer)
    assert edge.runtime.registry.devices == {}
    assert (await edge.ask("/api/v1/status", headers={"Authorization": "Bearer s3cret"}))[0] == 200
    assert [(await edge.ask(path))[0] for path in ("/healthz", "/readyz", "/metrics")] == [200, 200, 200]


def test_a_token_that_is_no_text_is_refused_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret")
    process, (port, _) = agent(tmp_path / "data", API__TOKEN_FILE=str(tmp_path / "token"))
    for token, status in ((b"\xff\xfe", 401), (b"s3cret\xff", 401), (b"s3cret", 200)):
        assert status_of(int(port), b"GET /api/v1/status HTTP/1.0\r\nAuthorization: Bearer " + token + b"\r\n\r\n") == status
    process.terminate()
    assert process.wait(20) == 0


async def test_a_token_file_that_is_empty_or_missing_stops_the_start(edges: Edges, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(" \n")
    with pytest.raises(ContractError, match=r"api.token_file.*is empty"):
        await edges.start(api=ApiConfig(port=0, token_file=str(tmp_path / "token")))
    with pytest.raises(OSError, match="nowhere"):
        await edges.start(api=ApiConfig(port=0, token_file=str(tmp_path / "nowhere")), data_dir=tmp_path / "other")


# -- health --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lane", "stream"), [("journal", "decision"), ("telemetry", "telemetry")])
async def test_health_is_503_with_the_reason_while_the_journal_cannot_be_written(edges: Edges, lane: str, stream: str) -> None:
    edge = await edges.start(rules=(ALERT,))
    assert await edge.get("/healthz") == {"status": "ok", "problems": []}
    database = edge.runtime.journal.lanes[lane].database
    original = database.commit

    def fail(group: Any) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    database.commit = fail  # type: ignore[method-assign]
    edge.runtime.pipeline.host_reading("boiler-1", {"temp": 90})
    await until(lambda: edge.runtime.journal.errors, what="a failed commit")
    status, answer = await edge.ask("/healthz")
    assert (status, answer["status"], answer["problems"]) == (503, "unhealthy", [f"{lane} cannot be written: disk I/O error"])
    assert await edge.get("/livez") == {"status": "ok", "problems": []}, "a new start brings no disk back"
    assert (await edge.ask("/readyz"))[0] == 200 and (await edge.get("/api/v1/journal"))["errors"] == {lane: "disk I/O error"}
    assert edge.runtime.pipeline.decided == 1 and await edge.metric("journal_failed_commits_total") >= 1
    database.commit = original  # type: ignore[method-assign]
    await edge.runtime.journal.flush()
    assert await edge.get("/healthz") == {"status": "ok", "problems": []}
    assert len(await edge.records(stream)) == 1


async def test_readiness_follows_the_bus(broker: LocalBroker, edges: Edges) -> None:
    broker.kill()
    edge = await edges.start(port=broker.port, wait=False)
    await until(lambda: edge.runtime.bus is not None and edge.runtime.bus.last_error, what="the first failure")
    status, answer = await edge.ask("/readyz")
    assert status == 503 and answer["ready"] is False and "the local bus is away" in answer["missing"][0]
    assert (await edge.ask("/healthz"))[0] == 200
    broker.start()
    await edge.bus_up()
    assert await edge.get("/readyz") == {"ready": True, "missing": []}


def alone(folder: Path) -> EdgeConfig:
    """An edge that decides at its first look at the host, and looks once."""
    rule = {"id": "awake", "on": {"device": "host", "metric": "uptime_seconds"}, "if": {"value": "uptime_seconds", "op": ">", "than": 0}, "trigger": "each", "then": [{"alert": {"severity": "info", "text": "up"}}]}
    return EdgeConfig(
        edge_id="gw-1", data_dir=str(folder / "data"), uplink=UplinkConfig(enabled=False), bus=BusConfig(enabled=False), api=ApiConfig(port=0), decisions=DecisionsConfig(rules=(rule,)),
        devices=DevicesConfig(host=HostConfig(device_id="host", interval_s=3600)),
    )


async def test_ready_is_told_when_the_first_look_is_decided_on_and_before_the_interface_listens(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    class Manager(ServiceManager):
        def notify(self, **fields: str) -> bool:
            told.append((next(iter(fields)), runtime.pipeline.decided, runtime.api_port))
            return True

    runtime = EdgeRuntime(alone(tmp_path), Manager({}))
    await runtime.start()
    assert told[0] == ("READY", 1, 0) and runtime.api_port > 0
    await runtime.stop()


async def test_an_edge_decides_and_is_alive_while_its_interface_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        loading.set()
        assert go_on.wait(60)

    monkeypatch.setattr(aiohttp_server, "import_web", slow)
    runtime = EdgeRuntime(alone(tmp_path))
    starting = asyncio.create_task(runtime.start())
    await until(loading.is_set)
    runtime.pipeline.host_reading("host", {"uptime_seconds": 5})
    await until(lambda: runtime.pipeline.decided == 2)
    assert not starting.done() and runtime.api_port == 0
    go_on.set()
    await starting
    assert runtime.api_port > 0
    await runtime.stop()
