"""Desired state at the edge: applied whole or refused whole with the field named, once, never backwards; commands done once."""

import base64
import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.config.schema import DecisionsConfig, ModelConfig

from .edges import EACH, Device, Edge, Edges, LocalBroker
from .waiting import until

HUBS = {**EACH, "id": "hubs"}
ASKS = {**EACH, "id": "asks", "if": {"model": "m", "op": ">", "than": 80}}


def model(weight: float, name: str = "m", **changes: Any) -> dict[str, Any]:
    """A model whose one output is `weight * temp`, as it travels; `changes` are to its manifest, `data` replaces its bytes."""
    data = changes.pop("data", json.dumps({"kind": "mlp", "layers": [{"weights": [[weight]], "bias": [0.0], "activation": "linear"}]}).encode())
    manifest = {
        "schema_version": 1, "name": name, "format": "portable", "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data), "inputs": [{"name": "temp"}], "output": {"kind": "vector", "size": 1}, **changes,
    }
    return {"manifest": manifest, "data_b64": base64.b64encode(data).decode()}


def nested(depth: int) -> dict[str, Any]:
    out: dict[str, Any] = {"leaf": 1}
    for _ in range(depth - 1):
        out = {"in": out}
    return out


def with_args(args: dict[str, Any]) -> dict[str, Any]:
    return {**HUBS, "then": [{"command": {"device": "fan-1", "name": "on", "args": args}}]}


async def applied(edge: Edge, generation: int) -> None:
    await until(lambda: edge.runtime.desired is not None and edge.runtime.desired.generation == generation, what=f"generation {generation}")
    await edge.runtime.journal.flush()


def judged(edge: Edge, temp: float) -> list[str]:
    """The rules that decide on one reading."""
    return [decision.rule for decision in edge.runtime.engine.evaluate("boiler-1", {"temp": temp}, edge.runtime.clock.mono_ms())]


async def test_a_good_document_is_applied_as_a_whole(edges: Edges, broker: LocalBroker) -> None:
    edge = await edges.start(port=broker.port)
    async with Device(broker.port, "fan-1") as fan:
        edge.desire(3, rules=[ASKS], models=[model(2)], twins={"fan-1": {"speed": 1}}, commands=[{"id": "c-1", "device": "fan-1", "name": "on", "args": {"level": 2}, "expires_ms": edge.now_ms() + 60_000}])
        await applied(edge, 3)
        await until(lambda: fan.got("command") and fan.got("desired"), what="twin and command")
    assert fan.got("command")[0]["id"] == "c-1" and fan.got("command")[0]["args"] == {"level": 2} and fan.got("desired") == [{"version": 1, "desired": {"speed": 1}}]
    status = await edge.get("/api/v1/status")
    assert (status["generation"], status["rules"], status["models"]) == (3, ["asks"], {"m": {"engine": "portable", "sha256": model(2)["manifest"]["sha256"]}})
    assert judged(edge, 39) == [] and judged(edge, 41) == ["asks"]
    assert await edge.records("event", "desired.applied") == [{"generation": 3}]
    assert [body["outcome"] for body in await edge.records("event", "model")] == ["activated"]


BAD: list[tuple[str, Callable[[], dict[str, Any]], str, str]] = [
    ("rule", lambda: {"rules": [HUBS, {**HUBS, "id": "other", "if": {"value": "temp", "op": "~", "than": 1}}]}, "spec.rules[1].if.op", "rule"),
    ("rule twice", lambda: {"rules": [HUBS, HUBS]}, "spec.rules[1].id", "rule"),
    ("arguments too deep", lambda: {"rules": [with_args({"in": nested(8)})]}, "spec.rules[0].then[0].command.args", "rule"),
    ("arguments that are not finite", lambda: {"rules": [with_args({"x": [float("nan")]})]}, "spec.rules[0].then[0].command.args", "rule"),
    ("a twin too deep", lambda: {"twins": {"fan-1": {"speed": 9}, "fan-2": nested(12)}}, "spec.twins.fan-2", "depth"),
    ("a twin too large", lambda: {"twins": {"fan-1": {"speed": 9}, "fan-2": {"x": "y" * 40_000}}}, "spec.twins.fan-2", "limit"),
    ("model hash", lambda: {"models": [model(5, sha256="0" * 64)]}, "spec.models.m", "model"),
    ("model size", lambda: {"models": [model(5, size_bytes=3)]}, "spec.models.m", "model"),
    ("model shape", lambda: {"models": [model(5, inputs=[{"name": "temp"}, {"name": "more"}])]}, "spec.models.m", "model"),
    ("model outputs", lambda: {"models": [model(5, output={"kind": "vector", "size": 2})]}, "spec.models.m", "model"),
    ("model manifest", lambda: {"models": [model(5, format="pickle")]}, "spec.models.m", "model"),
    ("model bytes", lambda: {"models": [model(5, data=b"not a model")]}, "spec.models.m", "model"),
    ("second of two models", lambda: {"models": [model(5), model(6, "n", data=b"{}")]}, "spec.models.n", "model"),
    ("base64", lambda: {"models": [{**model(5), "data_b64": "&&&"}]}, "spec.models[0].data_b64", "type"),
    ("base64 that is not ASCII", lambda: {"models": [{**model(5), "data_b64": "\u00e4"}]}, "spec.models[0].data_b64", "type"),
    ("no data", lambda: {"models": [model(5), {"manifest": {}}]}, "spec.models[1]", "missing"),
    ("a manifest without a name", lambda: {"models": [{"manifest": {}, "data_b64": ""}]}, "spec.models.", "model"),
]


@pytest.mark.parametrize(("make", "field", "reason"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
async def test_a_bad_part_refuses_the_whole_and_the_last_good_one_stays(edges: Edges, make: Callable[[], dict[str, Any]], field: str, reason: str) -> None:
    edge = await edges.start()
    edge.desire(1, rules=[ASKS], models=[model(2)], twins={"fan-1": {"speed": 1}})
    await applied(edge, 1)
    bad = {"rules": [HUBS], "twins": {"fan-1": {"speed": 9}}, "commands": [{"id": "c-9", "device": "fan-1", "name": "on", "expires_ms": edge.now_ms() + 60_000}], **make()}
    edge.desire(2, **bad)
    await edge.runtime.journal.flush()
    status = await edge.get("/api/v1/status")
    assert (status["generation"], status["rules"], status["models"]["m"]["sha256"]) == (1, ["asks"], model(2)["manifest"]["sha256"]) and list(status["models"]) == ["m"]
    assert judged(edge, 41) == ["asks"] and judged(edge, 39) == []
    assert edge.runtime.registry.devices["fan-1"].desired == {"speed": 1} and edge.runtime.desired_state.commands == {}
    (told,) = await edge.records("event", "desired.rejected")
    assert (told["generation"], told["field"]) == (2, field) and told["problem"] and told["remedy"]
    assert await edge.metric(f'desired_rejected_total{{reason="{reason}"}}') == 1
    assert status["health"] == [f"desired state 2 was refused: {field}: {told['problem']}"] and (await edge.ask("/healthz"))[0] == 200
    # The retained document comes back with every connection: told once.
    edge.desire(2, **bad)
    assert len(await edge.records("event", "desired.rejected")) == 1 and edge.runtime.metrics.total("desired_rejected_total") == 1
    # A mended one takes its place, and no other boot finds what was refused.
    await edge.stop()
    edge = await edges.start()
    assert (await edge.get("/api/v1/status"))["generation"] == 1 and judged(edge, 41) == ["asks"]
    edge.desire(3, rules=[HUBS])
    await applied(edge, 3)
    assert (await edge.get("/api/v1/status"))["health"] == [] and judged(edge, 81) == ["hubs"]


async def test_models_of_the_hub_serve_the_edges_own_rules(edges: Edges) -> None:
    edge = await edges.start(rules=(ASKS,))
    assert judged(edge, 90) == []
    edge.desire(1, models=[model(2)])
    await applied(edge, 1)
    assert judged(edge, 41) == ["asks"] and judged(edge, 39) == []
    closed: list[str] = []
    before = edge.runtime.desired_state.models["m"]
    close = before.close
    before.close = lambda: (closed.append(before.manifest.sha256), close())
    edge.desire(2, models=[model(4)])
    assert closed == []  # it decides until the new one is durable
    await applied(edge, 2)
    assert judged(edge, 21) == ["asks"] and closed == [model(2)["manifest"]["sha256"]]
    await edge.stop()
    edge = await edges.start(rules=(ASKS,))
    assert judged(edge, 21) == ["asks"] and judged(edge, 19) == []


async def test_without_rules_the_edges_own_are_in_force_before_and_after_a_restart(edges: Edges) -> None:
    edge = await edges.start()
    edge.desire(1, rules=[HUBS])
    await applied(edge, 1)
    assert judged(edge, 90) == ["hubs"]
    edge.desire(2, twins={"fan-1": {"speed": 1}})
    await applied(edge, 2)
    assert judged(edge, 90) == ["overheat"]
    await edge.stop()
    edge = await edges.start()
    assert judged(edge, 90) == ["overheat"]
    edge.desire(3, rules=[])
    await applied(edge, 3)
    assert judged(edge, 90) == []


@pytest.mark.parametrize("part", ["data", "json"])
async def test_a_model_that_is_damaged_on_the_disk_is_mended_from_the_document(edges: Edges, part: str) -> None:
    edge = await edges.start()
    edge.desire(1, rules=[ASKS], models=[model(2)])
    await applied(edge, 1)
    (Path(edge.config.data_dir) / "models" / f"{model(2)['manifest']['sha256']}.{part}").write_bytes(b"\x00")
    await edge.stop()
    edge = await edges.start()
    assert judged(edge, 41) == ["asks"] and judged(edge, 39) == []


async def test_an_expired_document_is_not_applied_and_told(edges: Edges) -> None:
    edge = await edges.start()
    edge.desire(1, rules=[HUBS])
    await applied(edge, 1)
    edge.desire(2, rules=[], expires_ms=edge.now_ms() - 1)
    (told,) = await edge.records("event", "desired.rejected")
    assert (told["generation"], told["field"]) == (2, "expires_ms") and told["remedy"] and judged(edge, 90) == ["hubs"]
    assert await edge.metric('desired_rejected_total{reason="expired"}') == 1
    edge.desire(3, rules=[], expires_ms=edge.now_ms() + 60_000)
    await applied(edge, 3)
    assert judged(edge, 90) == []


async def test_older_and_equal_generations_change_nothing(edges: Edges) -> None:
    edge = await edges.start()
    edge.desire(5, rules=[HUBS], twins={"fan-1": {"speed": 1}})
    await applied(edge, 5)
    for generation in (5, 4, 1):
        edge.desire(generation, rules=[], twins={"fan-1": {"speed": 9}}, models=[model(1, sha256="0" * 64)])
    await edge.runtime.journal.flush()
    assert judged(edge, 90) == ["hubs"] and edge.runtime.registry.devices["fan-1"].desired == {"speed": 1}
    assert await edge.records("event", "desired.applied") == [{"generation": 5}] and await edge.records("event", "desired.rejected") == []


async def test_a_command_is_done_once_though_its_document_comes_again_and_again(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port)
    one = {"id": "c-1", "device": "fan-1", "name": "on", "args": {}, "expires_ms": edge.now_ms() + 60_000}
    async with Device(broker.port, "fan-1") as fan:
        for generation in (1, 1, 2, 3):  # a new generation carries what still waits
            edge.desire(generation, commands=[one])
            await applied(edge, generation)
            await until(lambda: not edge.runtime.pipeline._commands, what="the acknowledgement")
        await edge.stop()
        edge = await edges.start(port=broker.port)
        edge.desire(3, commands=[one])
        edge.desire(4, commands=[one, {**one, "id": "c-2"}])
        await applied(edge, 4)
        await until(lambda: any(item["id"] == "c-2" for item in fan.got("command")), what="the second command")
        assert [item["id"] for item in fan.got("command")] == ["c-1", "c-2"]
    assert [(body["id"], body["state"]) for body in await edge.records("event", "operation")] == [("c-1", "running"), ("c-2", "running")]


async def test_a_command_without_a_bus_or_past_its_time_becomes_an_expired_operation_once(broker: LocalBroker, edges: Edges, tmp_path: Path) -> None:
    edge = await edges.start(port=broker.port)
    late = {"id": "late", "device": "fan-1", "name": "on", "expires_ms": edge.now_ms() - 1}
    async with Device(broker.port, "fan-1") as fan:
        for generation in (1, 2):
            edge.desire(generation, commands=[late])
            await applied(edge, generation)
        edge.desire(3, commands=[late, {**late, "id": "mark", "expires_ms": edge.now_ms() + 60_000}])
        await until(lambda: fan.got("command"), what="the command that is in time")
        assert [item["id"] for item in fan.got("command")] == ["mark"]
    expired = [body for body in await edge.records("event", "operation") if body["state"] == "expired"]
    assert [(body["id"], body["detail"]) for body in expired] == [("late", {"device": "fan-1", "name": "on"})] and "expired" in expired[0]["reason"]
    alone = await edges.start(data_dir=tmp_path / "alone")
    alone.desire(1, commands=[{**late, "expires_ms": alone.now_ms() + 60_000}])
    await applied(alone, 1)
    assert [(body["state"], body["reason"]) for body in await alone.records("event", "operation")] == [("running", ""), ("expired", "no local bus is configured")]


async def test_a_configured_model_that_is_bad_is_told_and_the_edge_starts(edges: Edges, tmp_path: Path) -> None:
    good = model(2)
    (tmp_path / "good.json").write_text(json.dumps({**good["manifest"], "data_file": "good.data"}))
    (tmp_path / "good.data").write_bytes(base64.b64decode(good["data_b64"]))
    (tmp_path / "bad.json").write_text("{}")
    models = (ModelConfig(str(tmp_path / "bad.json"), name="bad"), ModelConfig(str(tmp_path / "none.json")), ModelConfig(str(tmp_path / "good.json"), name="m"), ModelConfig("shipped:host-anomaly/portable"))
    edge = await edges.start(decisions=DecisionsConfig(rules=(ASKS,), models=models))
    assert set((await edge.get("/api/v1/status"))["models"]) == {"m", "host-anomaly"} and judged(edge, 41) == ["asks"]
    told = await edge.records("event", "model")
    assert [(body["name"], body["outcome"]) for body in told] == [("bad", "refused"), (str(tmp_path / "none.json"), "refused")] and all(body["reason"] for body in told)
    assert await edge.metric("models_refused_total") == 2


async def test_a_boot_does_not_undo_what_was_changed_here_since_the_hubs_word(edges: Edges) -> None:
    edge = await edges.start()
    edge.desire(2, twins={"fan-1": {"speed": 1, "mode": "eco"}})
    await applied(edge, 2)
    status, _ = await edge.ask("/api/v1/devices/fan-1/desired", "PATCH", body={"speed": 5})
    assert status == 200
    await edge.runtime.journal.flush()
    await edge.stop()
    edge = await edges.start()
    assert edge.runtime.registry.devices["fan-1"].desired == {"speed": 5, "mode": "eco"}
    edge.desire(3, twins={"fan-1": {"speed": 2}})  # the hub's next word holds again
    await applied(edge, 3)
    assert edge.runtime.registry.devices["fan-1"].desired == {"speed": 2}


async def test_two_models_of_one_name_are_refused(edges: Edges) -> None:
    edge = await edges.start()
    edge.desire(2, models=[model(2), model(3)])
    assert edge.runtime.desired_state.last_error is not None and edge.runtime.desired_state.last_error["field"] == "spec.models[1].manifest.name"
    assert edge.runtime.desired is None


async def test_a_command_that_stands_in_two_desired_states_of_one_commit_waits_for_its_record(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port)
    command = {"id": "c-1", "device": "fan-1", "name": "on", "expires_ms": edge.now_ms() + 600_000}
    recorded: list[int] = []
    real = edge.runtime.pipeline.order

    def order(command_id: str, *more: Any) -> None:
        with contextlib.closing(sqlite3.connect(Path(edge.config.data_dir) / "journal" / "journal.db")) as other:
            recorded.append(other.execute("SELECT count(*) FROM records_event WHERE kind='operation' AND body LIKE '%c-1%running%'").fetchone()[0])
        real(command_id, *more)

    edge.runtime.pipeline.order = order  # type: ignore[method-assign]
    edge.desire(7, commands=[command])
    edge.desire(8, commands=[command])
    await until(lambda: recorded and edge.runtime.desired is not None and edge.runtime.desired.generation == 8, what="the command")
    await edge.runtime.journal.flush()
    assert recorded == [1]
