"""The hub's REST API: every route against its description, errors that name field and remedy, no query or body that breaks it, the token, the metrics."""

import json
import os
import re
import socket
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator

from edge_runtime.contract.records import Record
from edge_runtime.updates.source import WebSource
from hub import questions
from hub.api.handlers import MAX_BODY_BYTES, HubApi
from hub.api.openapi import OPERATIONS, Operation, document
from hub.server import Hub, HubSettings
from hub.store.base import StoredRecord, Transaction
from hub.transfers.document import read_transfer
from hub.workloads import moving
from hub.workloads.documents import read_list

from .hub_side import EDGE, Served, error_of, linked_edge, served_hub, synced
from .waiting import until

NODE: dict[str, Any] = {"capacity": {"cpu": 8, "memory": "16Gi"}, "region": "eu"}
WORKLOAD: dict[str, Any] = {"id": "w-1", "kind": "vm", "labels": {"app": "w"}, "requests": {"cpu": "500m", "memory": "1Gi"}}

MOVE = {
    "id": "move-1", "workload": "on-edge", "epoch": 1, "new_epoch": 2, "source": EDGE, "target": "n-2", "why": "asked for", "drain": False, "state": "done", "step": "starting", "reason": "", "problem": "", "offer": {}, "ready": True,
    "root": "ab", "bytes": 9, "limit_mbit": 1000.0, "created_ms": 5, "changed_ms": 6, "end_ms": 6, "since_ms": {"checking": 5},
}
CHECKPOINT = {"workload": "on-edge", "epoch": 1, "name": "x", "taken_ms": 5, "bytes": 9, "root": "ab"}

AT_AN_EDGE = {"operate", "operations", "checkpoints", "snapshots", "logs", "execute"}
"""Handlers that ask the agent of the workload's node."""

API_OPERATIONS = [operation for operation in OPERATIONS if not operation.open]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("api")
    with served_hub(folder / "hub") as (background, hub):
        (folder / "hub" / "bundles").mkdir()
        (folder / "hub" / "bundles" / "b-1").write_bytes(b"a bundle")

        async def fill() -> None:
            await hub.change_desired(EDGE, {"twins": {"fan-1": {"speed": 2}}})
            async with linked_edge(folder / "edge", hub.broker.port) as edge:
                await edge.append(25)
                edge.journal.append("event", "node.capacity", {"kind": "edge", "capacity": {"cpu": "1000m", "memory": 1 << 30, "slots": 4}, "runs": ["container"]})
                edge.journal.append("event", "workload.checkpoints", {"checkpoints": [CHECKPOINT, {**CHECKPOINT, "workload": "another"}]})
                await synced(hub, edge)
                await hub.workloads.submit(read_list([{"id": "on-edge", "kind": "container", "requests": {"cpu": "100m"}, "node_kinds": ["edge"]}]))
                await until(lambda: hub.workloads.rows["on-edge"].state == "placed")
            hub.ingest.message("gw-x", "up", b"garbage", False)
            await hub.workloads.ask(lambda planner, now: planner.put_node("n-1", NODE, "declared", now))
            await hub.workloads.submit(read_list([WORKLOAD, {"id": "too-big", "requests": {"cpu": 64}}]))
            await hub.workloads.ask(lambda planner, _: planner.put_budget("b-1", {"selector": {"labels": {"app": "w"}}, "allowed": 1}))
            await hub.workloads.ask(lambda planner, _: planner.put_quota("t-1", {"nominal": {"cpu": 4}}))
            over = {"id": "r-1", "kind": "rebalance", "nodes": [], "state": "done", "steps": []}
            await hub.workloads.ask(lambda planner, _: planner.ledger.put(planner.tables.rebalances, "r-1", over))
            await hub.workloads.ask(lambda planner, _: planner.ledger.put(planner.tables.moves, "move-1", MOVE))
            await hub.transfers.submit(read_transfer(BODIES["submit_transfer"]))

        background.run(fill())
        yield Served(background, hub)


def path_of(operation: Operation) -> str:
    return operation.path.format(
        edge=EDGE, seq=3, workload="on-edge" if operation.handler in AT_AN_EDGE else "w-1", node="n-1", budget="b-1", tenant="t-1", rebalance="r-1", move="move-1", transfer="x-1", worker="w-a", bundle="b-1",
    )


# -- the description ---------------------------------------------------------------------------------------------------------


def test_the_description_is_valid_openapi_31_and_its_checker_sees_a_mistake(served: Served) -> None:
    said = served.json("/openapi.json")
    assert said == document() and said["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(said).validate()
    ids = [entry["operationId"] for methods in said["paths"].values() for entry in methods.values()]
    assert len(ids) == len(set(ids)) == len(OPERATIONS)
    said["paths"]["/api/v1/edges/{edge}"]["get"].pop("parameters")
    with pytest.raises(Exception, match="edge"):
        OpenAPIV31SpecValidator(said).validate()


def test_the_described_routes_are_exactly_the_served_ones(served: Served) -> None:
    described = {(method.upper(), path) for path, methods in document()["paths"].items() for method in methods}
    routed = {(route.method, resource.canonical) for resource in HubApi(served.hub).application().router.resources() for route in resource}
    page = {(method, path) for method, path in routed if path == "/" or "{name" in path}
    assert {path for _, path in page} == {"/", "/{name}"}
    # aiohttp answers HEAD where a page's GET is; the API has only what is described.
    assert routed - page == described


BODIES: dict[str, Any] = {
    "put_desired": {"twins": {"fan-1": {"speed": 2}}}, "command": {"device": "fan-1", "name": "on"}, "submit": WORKLOAD, "what_if": {"workloads": [{**WORKLOAD, "id": "w-2"}], "lose": ["n-1"]},
    "put_node": NODE, "put_budget": {"selector": {"labels": {"app": "w"}}, "allowed": 1}, "put_quota": {"nominal": {"cpu": 4}},
    "rebalance": {"drain": ["n-1"], "go": False}, "move": {"workload": "w-1", "to": "n-1", "limit_mbit": 100}, "operate": {"kind": "checkpoint", "name": "x", "stop": True}, "execute": {"args": ["id"], "timeout_s": 0.01},
    "submit_transfer": {"id": "x-1", "source": {"worker": "w-a", "path": "disk"}, "destination": {"worker": "w-b", "path": "disk"}},
    "lease_transfers": {"facts": {"slots": 1}, "held": [], "wait_s": 0}, "report_transfer": {"task": "x-1/send", "epoch": 1, "state": "working"},
}
AGAIN = {"cancel": ("POST", "/api/v1/workloads", {**WORKLOAD, "id": "w-3"}), "delete_node": ("PUT", "/api/v1/nodes/n-1", NODE), "delete_quota": ("PUT", "/api/v1/quotas/t-1", {}), "delete_budget": ("PUT", "/api/v1/budgets/b-1", BODIES["put_budget"])}
"""What puts back what a route took away."""


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.handler)
def test_every_route_answers_as_it_is_described(served: Served, operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    body = BODIES.get(operation.handler)
    if operation.asks:  # the edge is away
        monkeypatch.setattr(questions, "ANSWER_S", 0.05)
        status, _, text = served.ask(operation.method.upper(), path_of(operation), json.dumps(body).encode() if body is not None else None)
        assert status == 503 and error_of(text)["field"] == "edge" and not served.hub.questions._waiting
        return
    if operation.handler == "move":  # what really moves is the system tests'
        monkeypatch.setattr(moving, "begin", lambda planner, *_: planner.tables.moves["move-1"])
    if operation.handler == "metrics":
        status, headers, _ = served.ask("GET", operation.path)
        assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
        return
    if operation.handler == "bundle":
        status, headers, raw_body = served.ask("GET", path_of(operation))
        assert status == 200 and headers["content-type"] == "application/octet-stream" and raw_body == b"a bundle"
        return
    answer = served.json(path_of(operation), operation.method.upper(), body)
    jsonschema.validate(answer, operation.answer)
    if operation.handler in AGAIN:
        method, path, value = AGAIN[operation.handler]
        served.json(path, method, value)
    if body is not None:
        assert operation.body is not None
        jsonschema.validate(body, operation.body)


def test_what_the_answers_say_is_what_the_edge_did(served: Served) -> None:
    status = served.json("/api/v1/status")
    assert status["edges"] == 1 and status["counters"]["records_total"] >= 75 and status["broker"]["kind"] == "embedded"
    [edge] = served.json("/api/v1/edges")
    assert edge == served.json(f"/api/v1/edges/{EDGE}") and edge["reason"] == "shutdown" and edge["streams"]["decision"]["contiguous"] == 25
    tree = served.json("/api/v1/hierarchy")
    assert tree["children"][0]["name"] == "eu" and tree["children"][0]["children"][0]["children"][0]["children"][0]["name"] == EDGE
    records = served.json(f"/api/v1/edges/{EDGE}/records?stream=telemetry&after=3&limit=4")
    assert [record["seq"] for record in records] == [4, 5, 6, 7] and records[0]["body"]["values"]["text"] == "\u00e9 \U0001f600"
    assert [record["seq"] for record in served.json(f"/api/v1/edges/{EDGE}/records?newest=true&limit=2")] == [25, 24]
    decision = served.json(f"/api/v1/edges/{EDGE}/decisions/7")
    assert decision["seq"] == 7 and decision["body"]["inputs"] == {"temp": 2.0} and decision["kind"] == "decision"
    latest = served.json(f"/api/v1/decisions?limit=3&edge={EDGE}")
    assert [record["seq"] for record in latest] == [25, 24, 23] and served.json("/api/v1/decisions?edge=nobody") == []
    assert {event["kind"] for event in served.json("/api/v1/events?kind=alert")} == {"alert"}
    assert served.json("/api/v1/outages")[0]["edge"] == EDGE
    assert served.json("/api/v1/errors")[0]["edge"] == "gw-x"
    proof = served.json(f"/api/v1/edges/{EDGE}/verify")
    assert proof["exact"] and all(entry["counted"] == entry["expected"] for entry in proof["streams"].values())


def test_a_command_with_an_id_is_ordered_once(served: Served) -> None:
    order = {"id": "c-once", "device": "fan-1", "name": "on", "args": {"level": 3}, "expires_seconds": 60}
    first = served.json(f"/api/v1/edges/{EDGE}/commands", "POST", order)
    assert first["again"] is False and first["command"]["args"] == {"level": 3}
    second = served.json(f"/api/v1/edges/{EDGE}/commands", "POST", order)
    assert second["again"] is True and second["generation"] == first["generation"] and second["command"] == first["command"]
    held = served.json(f"/api/v1/edges/{EDGE}/desired")
    assert [command["id"] for command in held["spec"]["commands"]].count("c-once") == 1 and held["spec"]["twins"]["fan-1"] == {"speed": 2}
    assert served.hub.store.desired(EDGE) == held, "what was answered is kept"


# -- the token ---------------------------------------------------------------------------------------------------------------

WRONG_HEADERS: list[dict[str, str]] = [
    {}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic d3Jvbmc6"}, {"authorization": "Bearer \u00e9"},
    {"Authorization": "Bearer " + "x" * 4000},
]


@pytest.mark.parametrize("operation", API_OPERATIONS, ids=lambda operation: operation.handler)
def test_nothing_under_api_is_told_or_done_without_the_token(served: Served, operation: Operation) -> None:
    before = served.hub.desired[EDGE]["generation"]
    for headers in WRONG_HEADERS:
        status, _, text = served.ask(operation.method.upper(), path_of(operation), b'{"device":"a","name":"b"}', headers)
        assert status == 401 and error_of(text)["field"] == "Authorization" and "Bearer" in error_of(text)["remedy"]
    assert served.hub.desired[EDGE]["generation"] == before


def test_a_bundle_opens_to_its_own_token_from_any_byte_on_and_to_no_other(served: Served) -> None:
    told = next(one for one in served.json("/api/v1/bundles") if one["name"] == "b-1")
    assert told["bytes"] == 8
    status, headers, text = served.ask("GET", told["path"], headers={"Authorization": f"Bearer {told['token']}", "Range": "bytes=2-"})
    assert (status, headers["content-range"], text) == (206, "bytes 2-7/8", b"bundle")
    source = WebSource(f"http://127.0.0.1:{served.hub.port}{told['path']}", told["token"])  # as a device reads it, from the first byte and from another one
    assert (source.size, source.read(0, 4), source.read(2, 6)) == (8, b"a bu", b"bundle")
    source.close()
    for path in ("/bundles/b-2", "/api/v1/bundles"):
        assert served.ask("GET", path, headers={"Authorization": f"Bearer {told['token']}"})[0] == 401
    for path in ("/bundles/..%2Ftoken", "/bundles/%2e%2e%2ftoken", "/bundles/b-9"):
        assert served.ask("GET", path)[0] == 404


def raw(port: int, request: bytes) -> bytes:
    """Bytes as no client library would send them."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(request)
        answer = b""
        while data := sock.recv(65536):
            answer += data
    return answer


@pytest.mark.parametrize("path", ["/api/v1/status", "/%61pi/v1/status", "/api/./v1/status", "//api/v1/status", "/api/v1/../v1/status", "/x/../api/v1/status", "/api%2fv1/status", "/API/v1/status"])
def test_no_spelling_of_a_path_goes_around_the_token(served: Served, path: str) -> None:
    answer = raw(served.hub.port, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] in (b"401", b"404") and served.hub.boot.encode() not in answer


def test_a_token_that_is_no_text_is_a_wrong_token(served: Served) -> None:
    answer = raw(served.hub.port, b"GET /api/v1/status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\nConnection: close\r\n\r\n")
    assert answer.split()[1] in (b"400", b"401")


def test_the_open_routes_tell_nothing_of_edges(served: Served) -> None:
    for operation in OPERATIONS:
        if operation.open:
            status, _, text = served.ask("GET", operation.path, headers={})
            assert status == 200 and EDGE.encode() not in text and served.hub.token.encode() not in text


async def test_the_token_is_made_for_its_owner_only_and_kept(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        first = Hub(HubSettings(tmp_path))
    finally:
        os.umask(old)
    path = tmp_path / "token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text().strip() == first.token and len(first.token) >= 32
    await first.stop()
    again = Hub(HubSettings(tmp_path))
    assert again.token == first.token
    await again.stop()
    chosen = Hub(HubSettings(tmp_path, token="chosen"))
    assert chosen.token == "chosen"
    await chosen.stop()
    # A first start that ended between making the file and writing it must not leave a hub that lets everybody in.
    path.write_text("")
    empty = Hub(HubSettings(tmp_path))
    assert empty.token and empty.token != first.token and path.read_text().strip() == empty.token and stat.S_IMODE(path.stat().st_mode) == 0o600
    await empty.stop()


# -- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "body", "status", "field"), [
    ("GET", "/api/v1/nothing", None, 404, "path"), ("GET", "/nothing", None, 404, "path"), ("GET", "/no.js", None, 404, "path"), ("DELETE", "/api/v1/edges", None, 405, "path"),
    ("GET", "/api/v1/edges/nobody", None, 404, "edge"), ("GET", "/api/v1/edges/nobody/records", None, 404, "edge"), ("GET", "/api/v1/edges/nobody/verify", None, 404, "edge"),
    ("GET", "/api/v1/edges/nobody/desired", None, 404, "edge"), ("POST", "/api/v1/edges/nobody/release", None, 404, "edge"), ("GET", "/api/v1/edges/nobody/decisions/1", None, 404, "edge"),
    ("GET", f"/api/v1/edges/{EDGE}/decisions/999", None, 404, "seq"), ("GET", f"/api/v1/edges/{EDGE}/decisions/0", None, 404, "seq"), ("GET", f"/api/v1/edges/{EDGE}/decisions/x", None, 400, "seq"),
    ("GET", f"/api/v1/edges/{EDGE}/decisions/-1", None, 400, "seq"), ("GET", f"/api/v1/edges/{EDGE}/decisions/{'9' * 40}", None, 400, "seq"),
    ("GET", f"/api/v1/edges/{EDGE}/records?stream=secrets", None, 400, "stream"), ("GET", f"/api/v1/edges/{EDGE}/records?after=-1", None, 400, "after"),
    ("GET", f"/api/v1/edges/{EDGE}/records?after={'9' * 19}", None, 400, "after"), ("GET", f"/api/v1/edges/{EDGE}/records?limit=ten", None, 400, "limit"), ("GET", "/api/v1/decisions?limit=1e3", None, 400, "limit"),
    ("GET", "/api/v1/outages?hours=-1", None, 400, "hours"), ("GET", "/api/v1/outages?hours=nan", None, 400, "hours"), ("GET", "/api/v1/outages?hours=9999999", None, 400, "hours"), ("GET", "/api/v1/outages?hours=", None, 400, "hours"),
    ("PUT", f"/api/v1/edges/{EDGE}/desired", b"", 400, "payload"), ("PUT", f"/api/v1/edges/{EDGE}/desired", b"[]", 400, "body"), ("PUT", f"/api/v1/edges/{EDGE}/desired", b"\xff", 400, "payload"),
    ("PUT", f"/api/v1/edges/{EDGE}/desired", b'{"rules":5}', 400, "spec.rules"), ("PUT", f"/api/v1/edges/{EDGE}/desired", b'{"twins":{"a b":{}}}', 400, "spec.twins"), ("PUT", f"/api/v1/edges/{EDGE}/desired", b'{"other":1}', 400, "other"),
    ("PUT", "/api/v1/edges/a%20b/desired", b"{}", 400, "edge"), ("POST", "/api/v1/edges/..%2fx/commands", b"{}", 400, "edge"), ("PUT", f"/api/v1/edges/{EDGE}/desired", b'{"twins":' + b'{"a":' * 30 + b"1" + b"}" * 31, 400, "payload"),
    ("POST", f"/api/v1/edges/{EDGE}/commands", b"{}", 400, "spec.commands"), ("POST", f"/api/v1/edges/{EDGE}/commands", b'{"device":"a","name":"b","expires_seconds":0}', 400, "expires_seconds"),
    ("POST", f"/api/v1/edges/{EDGE}/commands", b'{"device":"a","name":"b","expires_seconds":true}', 400, "expires_seconds"), ("POST", f"/api/v1/edges/{EDGE}/commands", b'{"device":"a","name":"b","id":"no way"}', 400, "spec.commands"),
    ("POST", f"/api/v1/edges/{EDGE}/commands", b'{"device":"a","name":"b","args":[]}', 400, "spec.commands"), ("PUT", f"/api/v1/edges/{EDGE}/desired", b'{"rules":"' + b"x" * MAX_BODY_BYTES + b'"}', 413, "body"),
    ("PUT", f"/api/v1/edges/{EDGE}/desired", b'{"operations":[]}', 400, "operations"), ("POST", "/api/v1/workloads/on-edge/operations", b"{}", 400, "kind"), ("POST", "/api/v1/workloads/on-edge/operations", b"[]", 400, "body"),
    ("POST", "/api/v1/workloads/on-edge/operations", b'{"kind":"explode"}', 400, "kind"), ("POST", "/api/v1/workloads/on-edge/operations", b'{"kind":"delete-checkpoint"}', 400, "name"),
    ("POST", "/api/v1/workloads/on-edge/operations", b'{"kind":"restore","epoch":9}', 400, "epoch"), ("POST", "/api/v1/workloads/on-edge/operations", b'{"kind":"checkpoint","stop":1}', 400, "stop"),
    ("POST", "/api/v1/workloads/on-edge/operations", b'{"kind":"checkpoint","id":"a b"}', 400, "id"), ("POST", "/api/v1/workloads/on-edge/operations", b'{"kind":"checkpoint","expires_seconds":-1}', 400, "expires_seconds"),
    ("POST", "/api/v1/workloads/on-edge/operations", b'{"kind":"convert"}', 400, "to"), ("POST", "/api/v1/workloads/on-edge/operations", b'{"kind":"convert","to":"vm"}', 400, "to"),
    ("POST", "/api/v1/workloads/on-edge/operations", b'{"kind":"checkpoint","to":"microvm"}', 400, "to"), ("POST", "/api/v1/workloads/on-edge/operations", b'{"kind":"convert","to":"microvm"}', 409, "spec.converts"),
    ("POST", "/api/v1/workloads/on-edge/operations", b'{"kind":"delete-snapshot"}', 400, "name"), ("POST", "/api/v1/workloads/on-edge/operations", b'{"kind":"snapshot","stop":true}', 400, "stop"),
    ("POST", "/api/v1/workloads/on-edge/operations", b'{"kind":"snapshot","name":"a"}', 409, "workload"), ("GET", "/api/v1/workloads/none/snapshots", None, 404, "workload"),
    ("POST", "/api/v1/workloads/w-3/operations", b'{"kind":"checkpoint"}', 404, "workload"), ("POST", "/api/v1/workloads/too-big/operations", b'{"kind":"checkpoint"}', 409, "workload"),
    ("POST", "/api/v1/workloads/on-edge/exec", b"{}", 400, "args"), ("POST", "/api/v1/workloads/on-edge/exec", b'{"args":["a"],"timeout_s":61}', 400, "timeout_s"), ("POST", "/api/v1/workloads/on-edge/exec", b'{"args":[5]}', 400, "args[0]"),
    ("POST", "/api/v1/workloads/on-edge/exec", b'{"args":["a"],"workload":"b"}', 400, "workload"), ("GET", "/api/v1/workloads/on-edge/logs?bytes=0", None, 400, "bytes"), ("GET", "/api/v1/workloads/w-3/logs", None, 404, "workload"),
    ("GET", "/api/v1/workloads/too-big/logs", None, 409, "workload"), ("POST", "/api/v1/workloads/none/operations", b'{"kind":"checkpoint"}', 404, "workload"), ("GET", "/api/v1/workloads/none/checkpoints", None, 404, "workload"),
])
def test_an_error_names_the_field_and_the_remedy_and_changes_nothing(served: Served, method: str, path: str, body: bytes | None, status: int, field: str) -> None:
    before = json.dumps(served.hub.desired)
    got, _, text = served.ask(method, path, body)
    said = error_of(text)
    assert got == status and said["field"].startswith(field), said
    assert json.dumps(served.hub.desired) == before


def test_an_operation_is_asked_for_once_whatever_is_asked_how_often(served: Served) -> None:
    path = "/api/v1/workloads/on-edge/operations"
    first = served.json(path, "POST", {"id": "o-once", "kind": "checkpoint", "name": "x"})
    assert first["node"] == EDGE and served.json(path, "POST", {"id": "o-once", "kind": "checkpoint", "name": "x"})["generation"] == first["generation"]
    status, _, text = served.ask("POST", path, json.dumps({"id": "o-once", "kind": "restore", "name": "x"}).encode())
    assert status == 409 and error_of(text)["field"] == "kind"
    [one] = [one for one in served.json(path) if one["id"] == "o-once"]
    assert (one["state"], one["detail"]) == ("pending", {"workload": "on-edge", "name": "x"})
    assert [one["id"] for one in served.hub.desired[EDGE]["spec"]["operations"]].count("o-once") == 1
    assert served.json("/api/v1/workloads/on-edge/checkpoints") == [CHECKPOINT], "another workload's is not shown"


def test_a_store_that_fails_is_an_error_in_words_and_the_next_request_works(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, planted in the store's writing."""
    before = served.hub.desired[EDGE]

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(served.hub.store, "put_desired", full)
        status, _, text = served.ask("PUT", f"/api/v1/edges/{EDGE}/desired", b"{}")
        assert status == 500 and "log" in error_of(text)["remedy"] and served.hub.desired[EDGE] == before
    assert served.json(f"/api/v1/edges/{EDGE}/desired", "PUT", {})["generation"] == before["generation"] + 1


# -- anything ----------------------------------------------------------------------------------------------------------------

ODD = st.one_of(
    st.text(max_size=30), st.integers(-(2**70), 2**70).map(str), st.floats().map(str), st.sampled_from(["0", "1", "-1", "1001", "\x00", "\ud7ff", "' OR 1=1 --", "9" * 400, "%", "true", "decision", "telemetry", EDGE]),
    st.binary(max_size=8).map(lambda data: data.decode("latin-1")),
)
READ_PATHS = [path_of(operation) for operation in OPERATIONS if operation.method == "get"]
QUERY = st.dictionaries(st.one_of(st.sampled_from(["limit", "after", "edge", "kind", "stream", "newest", "hours", "state", "node", "bytes", "since"]), st.text(max_size=8)), ODD, max_size=4)


@settings(max_examples=250, deadline=None)
@given(path=st.sampled_from(READ_PATHS), query=QUERY)
def test_no_query_breaks_the_api(served: Served, path: str, query: dict[str, str]) -> None:
    text = "&".join(f"{quote(name)}={quote(value, safe='')}" for name, value in query.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "ANSWER_S", 0.002)  # the edge that is asked is away
        status, _, body = served.ask("GET", f"{path}?{text}")
    assert status in (200, 400, 404, *((503,) if path.endswith("/logs") else ())), (status, body[:300])
    if status != 200:
        error_of(body)


@settings(max_examples=150, deadline=None)
@given(raw_query=st.binary(max_size=40), segment=st.binary(min_size=1, max_size=20))
def test_no_bytes_in_a_path_break_the_api(served: Served, raw_query: bytes, segment: bytes) -> None:
    escaped = "".join(f"%{byte:02x}" for byte in segment)
    for path in (f"/api/v1/edges/{escaped}", f"/api/v1/edges/{escaped}/desired", f"/api/v1/edges/{EDGE}/decisions/{escaped}", f"/{escaped}", f"/api/v1/events?kind={''.join(f'%{byte:02x}' for byte in raw_query)}"):
        status, _, body = served.ask("GET", path)
        assert status in (200, 400, 404), (path, status, body[:300])


ANY_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=10), st.just("\ud800")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)), max_leaves=10,
)
PARTS = st.dictionaries(st.sampled_from(["rules", "models", "twins", "commands", "expires_ms", "device", "name", "args", "id", "expires_seconds"]), ANY_JSON, max_size=4)


@settings(max_examples=200, deadline=None)
@given(route=st.sampled_from([("PUT", "desired"), ("POST", "commands")]), body=st.one_of(st.binary(max_size=40), st.one_of(ANY_JSON, PARTS).map(lambda value: json.dumps(value).encode())))
def test_no_body_breaks_the_api_and_a_refused_one_changes_nothing(served: Served, route: tuple[str, str], body: bytes) -> None:
    before = served.json("/api/v1/status")["boot"], json.dumps(served.hub.desired.get("gw-fuzz"))
    status, _, text = served.ask(route[0], f"/api/v1/edges/gw-fuzz/{route[1]}", body)
    assert status in (200, 400, 413), (status, text[:300])
    if status != 200:
        error_of(text)
        assert json.dumps(served.hub.desired.get("gw-fuzz")) == before[1]
    else:
        assert served.hub.store.desired("gw-fuzz") == served.hub.desired["gw-fuzz"]


def test_a_record_of_any_kind_is_shown(served: Served) -> None:
    """The hub keeps kinds it does not know: the API must show them."""
    record = StoredRecord("gw-odd", "event", Record(1, "b", 0, 2**62, "unsynced", "x.y", '{"\\ud800":[{"a":1e308}]}'), 1)
    served.background.run(write(served.hub, record))
    [shown] = served.json("/api/v1/events?edge=gw-odd")
    assert shown["kind"] == "x.y" and shown["wall_ms"] == 2**62


def test_checkpoints_and_operations_are_what_the_edge_said_last_though_older_words_came_since(served: Served) -> None:
    [before] = served.json("/api/v1/workloads/on-edge/checkpoints")
    asked = {"id": "op-order", "kind": "checkpoint", "epoch": 1, "step": "", "reason": "", "detail": {"workload": "on-edge", "name": "y"}}
    for seq, kind, body in (
        (1_002, "operation", {**asked, "state": "succeeded"}), (1_003, "workload.checkpoints", {"checkpoints": [before, {**before, "name": "y"}]}),
        (1_001, "operation", {**asked, "state": "running", "step": "accepted"}), (1_000, "workload.checkpoints", {"checkpoints": []}),
    ):
        served.background.run(write(served.hub, StoredRecord(EDGE, "event", Record(seq, "b", 0, 0, "ntp", kind, json.dumps(body)), 1)))
    try:
        assert [one["name"] for one in served.json("/api/v1/workloads/on-edge/checkpoints")] == ["x", "y"]
        assert [one["state"] for one in served.json("/api/v1/workloads/on-edge/operations") if one["id"] == "op-order"] == ["succeeded"]
    finally:
        served.background.run(write(served.hub, StoredRecord(EDGE, "event", Record(1_004, "b", 0, 0, "ntp", "workload.checkpoints", json.dumps({"checkpoints": [before]})), 1)))


async def write(hub: Hub, record: StoredRecord) -> None:
    await hub.ingest.write(lambda: hub.store.commit(Transaction([record])))


# -- metrics -----------------------------------------------------------------------------------------------------------------

SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{([a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"(?:,[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*")*)\})? (-?[0-9.]+(?:e[+-]?[0-9]+)?|NaN|[+-]Inf)\Z')


def check_exposition(text: str) -> dict[str, str]:
    """The Prometheus text format (version 0.0.4): HELP and TYPE once before a metric's samples, samples together, no series twice; returns the types."""
    assert text.endswith("\n")
    types: dict[str, str] = {}
    helped: set[str] = set()
    series: set[str] = set()
    done: set[str] = set()
    current = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in helped and len(line.split()) > 3, line
            helped.add(name)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name in helped and name not in types and kind in ("counter", "gauge"), line
            types[name] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            name = match[1]
            if name != current:
                assert name not in done, f"{name} is scattered"
                done.add(current)
                current = name
            assert name in types, f"{name} has no type"
            assert types[name] == "gauge" or float(match[3]) >= 0
            key = f"{name}{{{match[2]}}}"
            assert key not in series, f"{key} stands twice"
            series.add(key)
    return types


def test_the_metrics_are_valid_prometheus_text(served: Served) -> None:
    types = check_exposition(served.ask("GET", "/metrics")[2].decode())
    assert types["novacron_hub_records_total"] == "counter" and types["novacron_hub_edges_online"] == "gauge"
    assert all(name.startswith("novacron_hub_") and (kind == "gauge" or name.endswith("_total")) for name, kind in types.items())


@pytest.mark.parametrize("bad", ["# TYPE a counter\na 1\n", "# HELP a x\n# TYPE a counter\na -1\n", "# HELP a x\n# TYPE a gauge\na{b=\"c} 1\n", "# HELP a x\n# TYPE a gauge\na 1\na 1\n", "# HELP a x\n# TYPE a gauge\na one\n"])
def test_the_checker_of_the_metrics_sees_mistakes(bad: str) -> None:
    with pytest.raises(AssertionError):
        check_exposition(bad)
