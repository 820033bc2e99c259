"""The same data folder again: latches, effects, twins and desired state outlive an orderly stop and a crash."""

import json
import shutil
from pathlib import Path
from typing import Any

from .edges import EACH, Device, Edge, Edges, LocalBroker
from .waiting import until

RISE = {**EACH, "id": "rise", "trigger": "rise", "clear": {"value": "temp", "op": "<", "than": 50}}


async def say(edge: Edge, device: Device, name: str, temp: float) -> int:
    """One reading, taken in; how many decisions there are after it."""
    taken = edge.runtime.pipeline.readings_taken
    await device.say("telemetry", {"temp": temp}, name=name)
    await until(lambda: edge.runtime.pipeline.readings_taken > taken, what=f"the reading of {name}")
    return edge.runtime.pipeline.decided


def crashed(edge: Edge, to: Path) -> Path:
    """The data folder as a power cut would leave it now: everything committed, nothing closed."""
    shutil.copytree(edge.config.data_dir, to)
    assert not (to / "journal" / "clean").exists()
    return to


async def test_latches_outlive_an_orderly_stop(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port, rules=(RISE,))
    async with Device(broker.port, "client") as device:
        assert await say(edge, device, "boiler-1", 90) == 1 and await say(edge, device, "boiler-1", 91) == 1
        await edge.stop()
        edge = await edges.start(port=broker.port, rules=(RISE,))
        assert edge.runtime.journal.clean and edge.runtime.journal.boot_n == 2
        assert await say(edge, device, "boiler-1", 92) == 0  # still latched
        assert await say(edge, device, "boiler-2", 92) == 1
        assert await say(edge, device, "boiler-1", 40) == 2 and await say(edge, device, "boiler-1", 90) == 3
    assert [(body["device"], body["outcome"]) for body in await edge.records("decision")] == [
        ("boiler-1", "fired"), ("boiler-2", "fired"), ("boiler-1", "cleared"), ("boiler-1", "fired"),
    ]
    assert [body["clean"] for body in await edge.records("event", "boot")] == [True, True]


async def test_latches_outlive_a_crash_before_any_state_was_kept(broker: LocalBroker, edges: Edges, tmp_path: Path) -> None:
    edge = await edges.start(port=broker.port, rules=(RISE,))
    async with Device(broker.port, "client") as device:
        await say(edge, device, "boiler-1", 90)
        await say(edge, device, "boiler-2", 90)
        await say(edge, device, "boiler-2", 40)
        await edge.runtime.journal.flush()
        assert edge.runtime.journal.state("engine") is None
        copy = crashed(edge, tmp_path / "after")
        await edge.stop()
        edge = await edges.start(port=broker.port, rules=(RISE,), data_dir=copy)
        assert not edge.runtime.journal.clean
        assert await say(edge, device, "boiler-1", 91) == 0
        assert await say(edge, device, "boiler-2", 91) == 1


async def test_a_lost_latch_would_be_seen(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port, rules=(RISE,))
    async with Device(broker.port, "client") as device:
        await say(edge, device, "boiler-1", 90)
        await edge.runtime.journal.flush()  # else the decision is newer than the kept state, and sets the latch at boot
        edge.runtime.engine.export_state = lambda _mono_ms: {"rules": {}, "states": []}  # type: ignore[method-assign]
        await edge.stop()
        edge = await edges.start(port=broker.port, rules=(RISE,))
        assert await say(edge, device, "boiler-1", 91) == 1


async def unconfirmed(edges: Edges, broker: LocalBroker, expires: str = "60s") -> tuple[Edge, list[Any]]:
    """An edge whose bus is dead, with three decisions whose commands wait."""
    broker.kill()
    rule = {**EACH, "on": {"device": "host"}, "then": [{"command": {"device": "fan-1", "name": "speed", "args": {"temp": "$value:temp"}, "expires": expires}}, {"alert": {"text": "hot"}}]}
    edge = await edges.start(port=broker.port, rules=(rule,), wait=False)
    for temp in (90, 91, 92):
        edge.runtime.pipeline.host_reading("host", {"temp": temp})
    await until(lambda: len(edge.runtime.pipeline._commands) == 3, what="three commands that wait")
    await edge.runtime.journal.flush()
    assert edge.runtime.journal.marks("decision").effects == 0
    return edge, list(edge.runtime.pipeline._commands.values())


async def replayed(edges: Edges, broker: LocalBroker, data_dir: Path | None = None) -> tuple[Edge, list[dict[str, Any]]]:
    """Another boot with a bus: the edge and what the fan got."""
    edge = await edges.start(port=broker.port, rules=(), data_dir=data_dir, wait=False)
    broker.start()
    async with Device(broker.port, "fan-1", persistent=True) as fan:
        await edge.bus_up()
        await until(lambda: not edge.runtime.pipeline._commands, what="no command waits")
        await edge.runtime.journal.flush()
        assert edge.runtime.journal.marks("decision").effects == edge.runtime.journal.durable("decision")
        await fan.say("telemetry", {"temp": 0}, name="fan-1")  # ordered after what the broker had for it
        await until(lambda: edge.runtime.pipeline.readings_taken == 1, what="the mark")
    return edge, fan.got("command")


async def test_unconfirmed_commands_are_sent_again_with_the_same_ids(broker: LocalBroker, edges: Edges) -> None:
    async with Device(broker.port, "fan-1", persistent=True):
        pass
    broker.save()
    edge, waiting = await unconfirmed(edges, broker)
    await edge.stop()
    edge, got = await replayed(edges, broker)
    assert [(item["id"], item["args"], item["expires_ms"]) for item in got] == [(item.id, item.args, item.expires_ms) for item in waiting]
    assert all(item["again"] is True for item in got)
    assert len(await edge.records("decision")) == 3 and len(await edge.records("event", "alert")) == 3  # nothing is decided or alerted twice


async def test_unconfirmed_commands_are_sent_again_after_a_crash_too(broker: LocalBroker, edges: Edges, tmp_path: Path) -> None:
    async with Device(broker.port, "fan-1", persistent=True):
        pass
    broker.save()
    edge, waiting = await unconfirmed(edges, broker)
    copy = crashed(edge, tmp_path / "after")
    await edge.stop()
    edge, got = await replayed(edges, broker, copy)
    assert [(item["id"], item["again"]) for item in got] == [(item.id, True) for item in waiting]
    await edge.stop()
    # And not a third time: they are confirmed now.
    broker.kill()
    _, got = await replayed(edges, broker, copy)
    assert got == []


async def test_unconfirmed_commands_that_have_expired_are_not_sent_again(broker: LocalBroker, edges: Edges) -> None:
    async with Device(broker.port, "fan-1", persistent=True):
        pass
    broker.save()
    edge, waiting = await unconfirmed(edges, broker, expires="500ms")
    await until(lambda: edge.now_ms() > max(item.expires_ms for item in waiting), what="the expiry")
    await edge.stop()
    edge, got = await replayed(edges, broker)
    assert got == []
    assert [(body["id"], body["state"]) for body in await edge.records("event", "operation")] == [(item.id, "expired") for item in waiting]


async def test_twins_and_devices_outlive_a_restart(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port)
    async with Device(broker.port, "fan-1") as fan:
        await fan.say("register", {"kind": "fan", "name": "Fan", "parent": "boiler-1", "meta": {"rpm": [1, 2]}})
        await fan.say("reported", {"speed": 2, "deep": {"a": {"b": [1]}}})
        await until(lambda: "fan-1" in edge.runtime.registry.devices and edge.runtime.registry.devices["fan-1"].reported_version == 1, what="the report")
        await edge.ask("/api/v1/devices/fan-1/desired", "PATCH", body={"speed": 3})
        await until(lambda: fan.got("desired"), what="the twin")
        before = edge.runtime.registry.devices["fan-1"].to_state()
        await edge.stop()
        edge = await edges.start(port=broker.port)
        assert edge.runtime.registry.devices["fan-1"].to_state() == before
        await until(lambda: len(fan.got("desired")) == 2, what="the twin is said again at connection")
        assert fan.got("desired")[1] == {"version": 1, "desired": {"speed": 3}}
    shown = await edge.get("/api/v1/devices/fan-1")
    assert (shown["kind"], shown["parent"], shown["twin"]["delta"]) == ("fan", "boiler-1", {"speed": 3})


async def test_the_hubs_desired_state_outlives_a_restart(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port)
    hubs = {**EACH, "id": "hubs", "if": {"value": "temp", "op": ">", "than": 30}}
    edge.desire(7, rules=[hubs], twins={"fan-1": {"speed": 1}}, commands=[{"id": "c-1", "device": "fan-1", "name": "on", "expires_ms": edge.now_ms() + 60_000}])
    async with Device(broker.port, "fan-1") as fan:
        await until(lambda: edge.runtime.desired_state.commands.get("c-1") not in (None, "running"), what="the desired state, and its command on its way")
        await edge.stop()
        edge = await edges.start(port=broker.port)
        status = await edge.get("/api/v1/status")
        assert (status["generation"], status["rules"]) == (7, ["hubs"])
        assert await say(edge, fan, "boiler-1", 40) == 1
        assert (await edge.records("decision"))[0]["generation"] == 7
        await until(lambda: any(item["name"] == "speed" for item in fan.got("command")), what="the command of the hub's rule")
        assert [item for item in fan.got("command") if item["id"] == "c-1" and item.get("again")] == []  # it was sent before the stop
        edge.desire(6, rules=[])
        edge.desire(7, rules=[])
        assert (await edge.get("/api/v1/status"))["rules"] == ["hubs"]
    assert [body["generation"] for body in await edge.records("event", "desired.applied")] == [7]


async def test_a_kept_desired_state_that_is_damaged_leaves_the_edges_own_rules(edges: Edges) -> None:
    edge = await edges.start()
    edge.desire(7, rules=[{**EACH, "id": "hubs"}])
    await edge.runtime.journal.flush()
    kept = edge.runtime.journal.state("desired")
    kept["spec"]["rules"][0]["if"] = {"value": "temp", "op": "~", "than": 1}
    edge.runtime.journal.put_state("desired", kept)
    await edge.stop()
    edge = await edges.start()
    status = await edge.get("/api/v1/status")
    assert (status["generation"], status["rules"]) == (0, ["overheat"])
    edge.runtime.pipeline.host_reading("boiler-1", {"temp": 90})
    await until(lambda: edge.runtime.pipeline.decided == 1, what="a decision by the own rule")
    assert json.dumps(kept)  # what is kept is JSON, so that another agent can read it
