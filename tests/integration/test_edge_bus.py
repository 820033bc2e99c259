"""The local bus: early readings, twins, commands and results, and a broker that is killed and comes back."""

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.clock import JUMP_MS
from edge_runtime.config.schema import DevicesConfig, UplinkConfig
from edge_runtime.contract.records import Record

from .edges import EACH, Device, Edge, Edges, LocalBroker
from .waiting import until


async def decided(edge: Edge, count: int) -> None:
    await until(lambda: edge.runtime.pipeline.decided >= count, what=f"decision {count}")


async def test_readings_before_registration_wait_and_are_decided_with_it(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port, devices=DevicesConfig(auto_register=False, early_max_readings=3))
    async with Device(broker.port, "client") as device:
        for temp in (90, 91, 92, 93):
            await device.say("telemetry", {"temp": temp}, name="boiler-1")
        await until(lambda: edge.runtime.registry.early_dropped == 1, what="the bound of early readings")
        assert await edge.metric("early_readings") == 3 and await edge.metric("early_dropped_readings_total") == 1
        assert await edge.get("/api/v1/devices") == [] and await edge.records("telemetry") == [] and edge.runtime.pipeline.decided == 0
        await device.say("register", {"kind": "boiler", "name": "Hall 2", "meta": {"bought": 2019}}, name="boiler-1", retain=True)
        await decided(edge, 3)
    assert [body["values"]["temp"] for body in await edge.records("telemetry")] == [91, 92, 93]
    assert [body["inputs"]["temp"] for body in await edge.records("decision")] == [91, 92, 93]
    assert await edge.records("event", "device.registered") == [{"device": "boiler-1", "kind": "boiler", "name": "Hall 2", "early": 3}]
    shown = await edge.get("/api/v1/devices/boiler-1")
    assert (shown["kind"], shown["meta"], shown["readings"], shown["values"]) == ("boiler", {"bought": 2019}, 3, {"temp": 93})
    assert await edge.metric("early_readings") == 0


async def test_a_new_device_and_an_illness_are_told_to_the_hub_at_once_and_once(broker: LocalBroker, edges: Edges, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = await edges.start(port=broker.port, uplink=UplinkConfig(url=f"mqtt://127.0.0.1:{broker.port}"))
    assert edge.runtime.uplink is not None
    told: list[tuple[list[str], str]] = []

    def announce(_reason: str) -> None:
        presence = edge.runtime._presence()
        told.append((presence["devices"], presence["health"]))

    await until(lambda: edge.runtime._told[1] == "", what="it is well")
    monkeypatch.setattr(edge.runtime.uplink, "announce", announce)
    async with Device(broker.port, "boiler-1") as device:
        await device.say("telemetry", {"temp": 20})
        await until(lambda: bool(told), what="the new device is told")
        await device.say("telemetry", {"temp": 20})
    monkeypatch.setattr(edge.runtime.desired_state, "last_error", {"generation": "3", "field": "spec", "problem": "bad"})
    await until(lambda: len(told) > 1, what="the illness is told")
    assert told == [(["boiler-1"], "ok"), (["boiler-1"], "desired state 3 was refused: spec: bad")]


async def test_a_twin_goes_down_retained_and_comes_back_reported(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port)
    status, answer = await edge.ask("/api/v1/devices/fan-1/desired", "PATCH", body={"speed": 3, "mode": "auto"})
    assert status == 200 and answer["changed"] is True and answer["twin"]["delta"] == {"speed": 3, "mode": "auto"}
    assert (await edge.ask("/api/v1/devices/fan-1/desired", "PATCH", body={"speed": 3}))[1]["changed"] is False
    await edge.runtime.journal.flush()
    async with Device(broker.port, "fan-1") as fan:  # it comes after the fact
        await until(lambda: fan.got("desired"), what="the retained twin")
        assert fan.messages[0] == ("desired", {"version": 1, "desired": {"speed": 3, "mode": "auto"}}, True)
        await fan.say("reported", {"speed": 2})
        await until(lambda: edge.runtime.registry.devices["fan-1"].reported_version == 1, what="the first report")
        assert (await edge.get("/api/v1/devices/fan-1"))["twin"]["delta"] == {"speed": 3, "mode": "auto"}
        await fan.say("reported", {"speed": 3, "mode": "auto"})
        await until(lambda: edge.runtime.registry.devices["fan-1"].reported_version == 2, what="the second report")
        assert (await edge.get("/api/v1/devices/fan-1"))["twin"]["delta"] == {}
        await edge.ask("/api/v1/devices/fan-1/desired", "PATCH", body={"mode": None})
        await until(lambda: len(fan.got("desired")) == 2, what="the changed twin")
        assert fan.got("desired")[1] == {"version": 2, "desired": {"speed": 3}}
    assert await edge.records("event", "twin.reported") == [
        {"device": "fan-1", "reported": {"speed": 2}, "version": 1}, {"device": "fan-1", "reported": {"speed": 3, "mode": "auto"}, "version": 2},
    ]


async def test_a_rule_changes_a_twin(broker: LocalBroker, edges: Edges) -> None:
    rule = {**EACH, "trigger": "rise", "then": [{"desired": {"device": "$device", "set": {"mode": "safe", "seen": "$value:temp"}}}]}
    edge = await edges.start(port=broker.port, rules=(rule,))
    async with Device(broker.port, "boiler-1") as boiler:
        await boiler.say("telemetry", {"temp": 90})
        await until(lambda: boiler.got("desired"), what="the twin that the rule set")
        assert boiler.got("desired") == [{"version": 1, "desired": {"mode": "safe", "seen": 90}}]
    assert (await edge.records("decision"))[0]["actions"] == [{"desired": {"device": "boiler-1", "set": {"mode": "safe", "seen": 90}}}]


async def test_a_twin_that_cannot_be_set_does_not_stop_the_other_actions(broker: LocalBroker, edges: Edges) -> None:
    rule = {**EACH, "then": [{"desired": {"device": "newcomer", "set": {"mode": "safe"}}}, *EACH["then"]]}
    edge = await edges.start(port=broker.port, rules=(rule,), devices=DevicesConfig(registry_max=1))
    async with Device(broker.port, "fan-1") as fan:
        await fan.say("telemetry", {"temp": 90}, name="boiler-1")
        await until(lambda: fan.got("command"), what="the command")
    assert await edge.metric('twin_rejected_total{reason="limit"}') == 1 and [item["id"] for item in await edge.get("/api/v1/devices")] == ["boiler-1"]


async def rows_at_arrival(edge: Edge, fan: Device, planted: bool) -> list[int]:
    """How many rows the decision has, seen by another connection when its command arrives, while the journal fails at first."""
    lane, original, rows = edge.runtime.journal.lanes["journal"], edge.runtime.journal.lanes["journal"].database.commit, []
    database = Path(edge.config.data_dir) / "journal" / "journal.db"

    def arrived(leaf: str, body: dict[str, Any]) -> None:
        if leaf == "command":
            other = sqlite3.connect(database)
            rows.append(other.execute("SELECT count(*) FROM records_decision WHERE seq=?", (int(body["id"].split(".")[-2]),)).fetchone()[0])
            other.close()

    def commit(group: Any) -> None:
        # The disk answers again only when a command that did not wait for it would have arrived.
        if lane.failed_commits < 3 or (planted and not rows):
            raise sqlite3.OperationalError("disk I/O error")
        original(group)

    fan.on_message = arrived
    lane.database.commit = commit  # type: ignore[method-assign]
    if planted:
        append = edge.runtime.journal.append

        def early(stream: str, kind: str, body: Any, on_durable: Any = None, stamp: Any = None) -> bool:
            done = append(stream, kind, body, None, stamp)
            if on_durable is not None and stream == "decision":
                on_durable(Record(edge.runtime.journal.durable("decision") + 1, edge.runtime.journal.boot, *stamp, kind, ""))
            return done

        edge.runtime.journal.append = early  # type: ignore[method-assign]
    await fan.say("telemetry", {"temp": 90}, name="boiler-1")
    await until(lambda: rows, what="the command")
    await edge.runtime.journal.flush()
    assert planted or (lane.failed_commits >= 3 and lane.acted_undurable == 0)
    return rows


async def test_a_command_is_published_only_when_its_decision_is_durable(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port)
    async with Device(broker.port, "fan-1") as fan:
        assert await rows_at_arrival(edge, fan, planted=False) == [1]
        for temp in range(20):
            await fan.say("telemetry", {"temp": 100 + temp}, name="boiler-1")
        await until(lambda: len(fan.got("command")) == 21, what="21 commands")
    commands = fan.got("command")
    assert [item["args"] for item in commands] == [{"temp": 90}, *({"temp": 100 + number} for number in range(20))]
    assert len({item["id"] for item in commands}) == 21 and all("again" not in item and item["name"] == "speed" and item["expires_ms"] > edge.now_ms() - 60_000 for item in commands)


async def test_a_command_that_is_published_before_the_commit_is_seen(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port)
    async with Device(broker.port, "fan-1") as fan:
        assert await rows_at_arrival(edge, fan, planted=True) == [0]


@pytest.mark.parametrize(("reply", "state", "reason"), [({"ok": True, "value": {"rpm": 900}}, "succeeded", ""), ({"ok": False, "reason": "stuck"}, "failed", "stuck")])
async def test_the_reply_to_a_command_becomes_an_operation(broker: LocalBroker, edges: Edges, reply: dict[str, Any], state: str, reason: str) -> None:
    edge = await edges.start(port=broker.port)
    async with Device(broker.port, "fan-1") as fan:
        await fan.say("telemetry", {"temp": 90}, name="boiler-1")
        await until(lambda: fan.got("command"), what="the command")
        await fan.say("result", {"id": fan.got("command")[0]["id"], **reply})
        await until(lambda: edge.runtime.metrics.total("command_results_total") == 1, what="the result")
    assert await edge.records("event", "operation") == [{
        "id": fan.got("command")[0]["id"], "kind": "command", "state": state, "epoch": 0, "step": "replied", "reason": reason, "detail": {"device": "fan-1", "value": reply.get("value", {})},
    }]
    assert await edge.metric(f'command_results_total{{ok="{str(reply["ok"]).lower()}"}}') == 1 and await edge.metric("commands_sent_total") == 1


# -- the broker dies -----------------------------------------------------------------------------------------------------------

LOCAL = {**EACH, "id": "host-hot", "on": {"device": "host"}}
SOON = {**EACH, "id": "soon", "on": {"device": "host"}, "then": [{"command": {"device": "fan-1", "name": "soon", "expires": "30ms"}}]}


async def test_a_broker_that_is_killed_loses_no_decision_and_no_command(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port, rules=(EACH, LOCAL, SOON))
    async with Device(broker.port, "fan-1", persistent=True) as fan:
        await fan.say("telemetry", {"temp": 90}, name="boiler-1")
        await until(lambda: fan.got("command"), what="the first command")
    broker.save()
    first = fan.got("command")[0]
    # A frozen broker takes the command from the socket and never acknowledges it.
    broker.freeze()
    edge.runtime.pipeline.host_reading("host", {"temp": 100})
    await decided(edge, 3)
    await until(lambda: any(item.sent for item in edge.runtime.pipeline._commands.values()), what="a command that is sent and not acknowledged")
    broker.kill()
    await until(lambda: not edge.runtime.bus.up, what="the edge notices")  # type: ignore[union-attr]
    assert (await edge.ask("/readyz"))[0] == 503 and (await edge.ask("/healthz"))[0] == 200
    # Decisions of devices that do not need the bus go on.
    for temp in (101, 102):
        edge.runtime.pipeline.host_reading("host", {"temp": temp})
    await decided(edge, 7)
    await edge.runtime.journal.flush()
    waiting = {item.id: item for item in edge.runtime.pipeline._commands.values()}
    assert sorted(item.args.get("temp", 0) for item in waiting.values() if item.name == "speed") == [100, 101, 102]
    expires = max((item.expires_ms for item in waiting.values() if item.name == "soon"), default=0)  # on a busy machine they may have expired by now
    await until(lambda: edge.now_ms() > expires, what="the short commands' expiry")
    broker.start()
    async with Device(broker.port, "fan-1", persistent=True) as back:
        await edge.bus_up(2)
        await until(lambda: len(back.got("command")) >= 3, what="the waiting commands")
        await back.say("telemetry", {"temp": 91}, name="boiler-1")
        await until(lambda: any(item["args"] == {"temp": 91} for item in back.got("command")), what="a decision after the restart")
    again = {item["id"]: item for item in back.got("command")}
    assert again.keys() >= {id_ for id_, item in waiting.items() if item.name == "speed"} and first["id"] not in again
    assert {item["name"] for item in again.values()} == {"speed"}
    assert [again[id_].get("again", False) for id_, item in waiting.items() if item.name == "speed"] == [True, False, False]  # only the first one may have arrived
    expired = [body for body in await edge.records("event", "operation") if body["state"] == "expired"]
    assert {body["id"] for body in expired} >= {id_ for id_, item in waiting.items() if item.name == "soon"} and len(expired) == len({body["id"] for body in expired}) == 3
    assert all("expired" in body["reason"] for body in expired) and await edge.metric("commands_expired_total") == 3
    await until(lambda: not edge.runtime.pipeline._commands, what="every command acknowledged")
    assert edge.runtime.journal.marks("decision").effects == edge.runtime.journal.durable("decision")


@pytest.mark.parametrize("hours", [3, -3])
async def test_a_wall_clock_that_is_set_ends_no_command_that_waits(broker: LocalBroker, edges: Edges, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """A board that learns the time: what it decided just before is for the device as long as it was; the device is told by the clock as it is now."""
    edge = await edges.start(port=broker.port, rules=(EACH, LOCAL))
    async with Device(broker.port, "fan-1", persistent=True):
        await edge.bus_up()
    broker.save()
    broker.kill()
    await until(lambda: not edge.runtime.bus.up, what="the edge notices")  # type: ignore[union-attr]
    edge.runtime.pipeline.host_reading("host", {"temp": 100})
    await edge.runtime.journal.flush()
    await until(lambda: edge.runtime.pipeline._commands, what="the command that waits")
    (waits,) = edge.runtime.pipeline._commands.values()
    expires, clock = waits.expires_ms, edge.runtime.clock
    was, wall = clock.stamp(), clock._wall
    monkeypatch.setattr(clock, "_wall", lambda: wall() + hours * 3600)
    set_ = clock.stamp()
    shift = set_.wall_ms - was.wall_ms - (set_.mono_ms - was.mono_ms)
    broker.start()
    async with Device(broker.port, "fan-1", persistent=True) as fan:
        await until(lambda: fan.got("command"), what="the command")
    (command,) = fan.got("command")
    assert command["id"] == waits.id and abs(command["expires_ms"] - expires - shift) <= JUMP_MS
    assert [body for body in await edge.records("event", "operation") if body["state"] == "expired"] == []


async def test_commands_that_expire_while_the_bus_is_away_do_not_pile_up(edges: Edges, broker: LocalBroker) -> None:
    broker.kill()
    edge = await edges.start(port=broker.port, rules=(SOON,), wait=False)
    for temp in range(50):
        edge.runtime.pipeline.host_reading("host", {"temp": 100 + temp})
    await decided(edge, 50)
    await edge.runtime.journal.flush()
    expires = max((item.expires_ms for item in edge.runtime.pipeline._commands.values()), default=0)  # on a busy machine they have expired already
    await until(lambda: edge.now_ms() > expires, what="the commands' expiry")
    broker.start()
    await edge.bus_up()
    await until(lambda: not edge.runtime.pipeline._commands, what="all expired")
    await edge.runtime.journal.flush()
    assert len([body for body in await edge.records("event", "operation") if body["state"] == "expired"]) == 50
    # What is remembered of commands is for the hub's: a rule that fires for hours must not fill it.
    assert edge.runtime.desired_state.commands == {} and not edge.runtime.journal.state("commands")


async def test_a_reading_is_acknowledged_only_when_it_is_durable(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port)
    assert edge.runtime.bus is not None and edge.runtime.bus._session is not None
    held = asyncio.Event()
    lane = edge.runtime.journal.lanes["telemetry"]
    original = lane.database.commit

    def fail(group: Any) -> None:
        if not held.is_set():
            raise sqlite3.OperationalError("disk I/O error")
        original(group)

    lane.database.commit = fail  # type: ignore[method-assign]
    acknowledged: list[str] = []
    edge.runtime.pipeline.readings("probe", [], lambda: acknowledged.append("empty"))
    edge.runtime.bus._message("novacron/1/device/boiler-1/telemetry", json.dumps({"temp": 90}).encode(), lambda: acknowledged.append("reading"))
    edge.runtime.pipeline.batch_end()
    edge.runtime.pipeline.batch_sent()
    await until(lambda: lane.failed_commits >= 2, what="two failed commits")
    assert acknowledged == ["empty"] and edge.runtime.pipeline.decided == 1  # the decision does not wait for the telemetry
    held.set()
    await edge.runtime.journal.flush()
    assert acknowledged == ["empty", "reading"]
