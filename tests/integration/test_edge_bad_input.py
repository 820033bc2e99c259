"""Bad input of every kind from devices: told with field and remedy, counted, and without effect on any other device."""

import json
from typing import Any

import pytest

from edge_runtime.config.schema import DevicesConfig
from edge_runtime.contract.limits import MAX_BODY_BYTES, MAX_MESSAGE_BYTES

from .edges import Device, Edge, Edges, LocalBroker
from .waiting import until


def nested(depth: int) -> Any:
    out: Any = 1
    for _ in range(depth):
        out = {"in": out}
    return out


BAD: list[tuple[str, str, bytes, str, str]] = [
    ("malformed JSON", "telemetry", b'{"temp": 90', "payload", "json"), ("no JSON", "telemetry", b"hot", "payload", "json"), ("nothing", "telemetry", b"", "payload", "json"),
    ("two values", "telemetry", b'{"temp": 1} {"temp": 2}', "payload", "json"), ("a list as value", "telemetry", b'{"temp": [90]}', "temp", "type"), ("null", "telemetry", b"null", "payload", "type"),
    ("no value", "telemetry", b'{"temp": null}', "payload", "empty"), ("one of several", "telemetry", b'[{"temp": 90}, {"temp": 91}, null]', "[2]", "type"),
    ("value of one of several", "telemetry", b'[{"temp": 90}, {"temp": {"x": []}}]', "[1].temp.x", "type"), ("oversized", "telemetry", b'{"temp": "' + b"x" * MAX_MESSAGE_BYTES + b'"}', "payload", "size"),
    ("long text", "telemetry", json.dumps({"temp": "x" * 1025}).encode(), "temp", "limit"), ("many readings", "telemetry", json.dumps([1] * 101).encode(), "payload", "limit"),
    ("many metrics", "telemetry", json.dumps({f"m{number}": 1 for number in range(65)}).encode(), "payload", "limit"),
    ("more text than a record holds", "telemetry", json.dumps({f"m{number}": "\u20ac" * 1024 for number in range(20)}, ensure_ascii=False).encode(), "payload", "limit"),
    ("deep lists", "telemetry", b"[" * 100_000 + b"]" * 100_000, "payload", "depth"), ("deep objects", "telemetry", json.dumps({"temp": nested(6)}).encode(), "temp.in.in.in", "depth"),
    ("invalid UTF-8", "telemetry", b'{"temp": "\xff\xfe"}', "payload", "utf8"), ("binary", "telemetry", bytes(range(256)), "payload", "utf8"), ("NaN", "telemetry", b'{"temp": NaN}', "payload", "nan"),
    ("infinity", "telemetry", b'{"temp": -Infinity}', "payload", "nan"), ("infinity by exponent", "telemetry", b'{"temp": 1e999}', "temp", "nan"), ("past 64 bits", "telemetry", b'{"temp": 9223372036854775808}', "temp", "limit"),
    ("metric name", "telemetry", b'{"t emp": 90}', "t emp", "name"), ("device time", "telemetry", b'{"ts": -1, "values": {"temp": 90}}', "ts", "time"),
    ("register: no JSON", "register", b"boiler", "payload", "json"), ("register: list", "register", b"[]", "payload", "type"), ("register: kind", "register", b'{"kind": 3}', "kind", "type"),
    ("register: parent", "register", b'{"parent": "a b"}', "parent", "name"), ("register: name", "register", json.dumps({"name": "x" * 129}).encode(), "name", "limit"), ("register: NaN", "register", b'{"meta": {"x": NaN}}', "payload", "nan"),
    ("reported: list", "reported", b"[1]", "reported", "type"), ("reported: deep", "reported", json.dumps(nested(12)).encode(), "reported", "depth"),
    ("reported: large", "reported", json.dumps({"x": "y" * MAX_BODY_BYTES}).encode(), "reported", "limit"), ("reported: many", "reported", json.dumps(dict.fromkeys(map(str, range(200)), 1)).encode(), "reported", "limit"),
    ("result: no id", "result", b'{"ok": true}', "id", "missing"), ("result: ok", "result", b'{"id": "c-1", "ok": "yes"}', "ok", "type"), ("result: deep", "result", json.dumps({"id": "c-1", "ok": True, "value": nested(12)}).encode(), "value", "depth"),
    ("result: large", "result", json.dumps({"id": "c-1", "ok": True, "value": {"x": "y" * MAX_BODY_BYTES}}).encode(), "value", "limit"),
]


async def decided(edge: Edge, device: Device, name: str, temp: float) -> None:
    """One hot reading of `name` leads to one more decision."""
    before = edge.runtime.pipeline.decided
    await device.say("telemetry", {"temp": temp}, name=name)
    await until(lambda: edge.runtime.pipeline.decided == before + 1, what=f"a decision on {name}")


@pytest.mark.parametrize(("leaf", "payload", "field", "reason"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
async def test_a_bad_message_is_told_counted_and_touches_nobody_else(broker: LocalBroker, edges: Edges, leaf: str, payload: bytes, field: str, reason: str) -> None:
    edge = await edges.start(port=broker.port)
    async with Device(broker.port, "client") as device:
        await decided(edge, device, "boiler-1", 90)
        await device.say(leaf, payload, name="boiler-bad")
        await device.say("telemetry", {"temp": 91}, name="boiler-1")  # on the same connection, so it is read after the bad one
        await until(lambda: edge.runtime.pipeline.decided == 2, what="the decision after the bad message")
        (error,) = (await edge.get("/api/v1/errors"))["devices"]
        assert (error["device"], error["field"], error["reason"]) == ("boiler-bad", field, reason) and error["problem"] and error["remedy"]
        assert await edge.metric(f'device_rejected_messages_total{{reason="{reason}"}}') == 1
        assert [item["id"] for item in await edge.get("/api/v1/devices")] == ["boiler-1"]
        assert [body["device"] for body in await edge.records("telemetry")] == ["boiler-1", "boiler-1"]
        assert not [body for body in await edge.records("event") if "boiler-bad" in json.dumps(body)]
        # The device itself is not punished either.
        await decided(edge, device, "boiler-bad", 92)
        assert (await edge.get("/api/v1/devices/boiler-bad"))["errors"] == 0
        await device.say(leaf, payload, name="boiler-bad")
        await until(lambda: edge.runtime.registry.devices["boiler-bad"].errors == 1, what="the error of a known device")
        assert field in (await edge.get("/api/v1/devices/boiler-bad"))["last_error"] and (await edge.get("/api/v1/devices/boiler-1"))["errors"] == 0
        assert (await edge.ask("/healthz"))[0] == 200


async def test_a_flood_of_bad_messages_between_good_ones_loses_no_good_one(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port)
    async with Device(broker.port, "client") as device:
        for number, (_, leaf, payload, _, _) in enumerate(BAD):
            await device.say(leaf, payload, name="boiler-bad")
            await device.say("telemetry", {"temp": 100 + number}, name="boiler-1")
        await until(lambda: edge.runtime.pipeline.decided == len(BAD), what="every good reading is decided")
    assert [body["values"]["temp"] for body in await edge.records("telemetry")] == [100 + number for number in range(len(BAD))]
    assert edge.runtime.metrics.total("device_rejected_messages_total") == len(BAD)


async def test_the_check_that_others_go_on_can_fail(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port)

    def planted(device: str, error: Exception) -> None:
        raise RuntimeError("a refused message ends the session")

    edge.runtime.bus._sink.refused = planted  # type: ignore[union-attr,method-assign,assignment]
    async with Device(broker.port, "client") as device:
        await device.say("telemetry", b"hot", name="boiler-bad")
        await decided(edge, device, "boiler-1", 90)
    assert (await edge.get("/api/v1/errors"))["devices"] == []  # so the assertion on it above would have failed


OUTSIDE = ["novacron/1/device/boiler-1/firmware", "novacron/2/device/boiler-1/telemetry", "novacron/1/device/boiler-1/x/telemetry", "sensors/boiler-1", "novacron/1/edge/gw-1/desired", "novacron/1/device/boiler-1/command"]


async def test_topics_outside_the_contract_have_no_effect(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port)
    async with Device(broker.port, "client") as device:
        for topic in OUTSIDE:
            await device.publish(topic, {"temp": 99})
        await decided(edge, device, "boiler-1", 90)
    assert len(await edge.records("telemetry")) == 1 and edge.runtime.desired is None
    # The edge does not even ask for them. A broker that sends them all the same is refused by name.
    assert edge.runtime.bus is not None
    acknowledged: list[str] = []
    for topic in OUTSIDE:
        edge.runtime.bus._message(topic, b'{"temp": 99}', lambda topic=topic: acknowledged.append(topic))  # type: ignore[misc]
    told = (await edge.get("/api/v1/errors"))["devices"]
    assert [item["field"] for item in told] == ["topic"] * len(OUTSIDE) and all(item["remedy"] and item["device"] == "" for item in told) and acknowledged == OUTSIDE
    assert len(await edge.records("telemetry")) == 1


@pytest.mark.parametrize("name", ["bad name", "-boiler", "b\u00f6iler", "boiler.1/", "x" * 65, "$boiler", "\u200bboiler"])
async def test_a_name_that_is_none_is_told_as_the_topics_fault(broker: LocalBroker, edges: Edges, name: str) -> None:
    edge = await edges.start(port=broker.port)
    async with Device(broker.port, "client") as device:
        await device.say("telemetry", {"temp": 99}, name=name)
        await decided(edge, device, "boiler-1", 90)
    told = (await edge.get("/api/v1/errors"))["devices"]
    if "/" in name:  # another topic altogether, to which nobody listens
        assert told == []
    else:
        assert [(item["field"], item["reason"]) for item in told] == [("topic", "name")] and "64" in told[0]["remedy"]
        assert await edge.metric('device_rejected_messages_total{reason="name"}') == 1
    assert [item["id"] for item in await edge.get("/api/v1/devices")] == ["boiler-1"]


async def test_retained_garbage_on_register_is_told_at_every_connection_and_stops_nothing(broker: LocalBroker, edges: Edges) -> None:
    async with Device(broker.port, "client") as device:
        await device.say("register", b"\xffgarbage", name="boiler-bad", retain=True)
        await device.say("register", {"kind": "boiler", "name": "Hall 2"}, name="boiler-1", retain=True)
        await device.say("register", b"", name="boiler-gone", retain=True)
        edge = await edges.start(port=broker.port, devices=DevicesConfig(auto_register=False))
        await until(lambda: "boiler-1" in edge.runtime.registry.devices, what="the good registration")
        await until(lambda: len(edge.runtime.registry.errors) == 1, what="the bad registration is told")
        await decided(edge, device, "boiler-1", 90)
        (error,) = (await edge.get("/api/v1/errors"))["devices"]
        assert (error["device"], error["field"], error["reason"]) == ("boiler-bad", "payload", "utf8")
        assert [(item["id"], item["name"]) for item in await edge.get("/api/v1/devices")] == [("boiler-1", "Hall 2")]
        assert edge.runtime.bus is not None and edge.runtime.bus._session is not None
        edge.runtime.bus._session.abort("the test cuts the line")
        await edge.bus_up(2)
        await until(lambda: len(edge.runtime.registry.errors) == 2, what="the bad registration is told again")
        await decided(edge, device, "boiler-1", 91)
        await device.say("register", {"kind": "boiler"}, name="boiler-bad", retain=True)
        await until(lambda: "boiler-bad" in edge.runtime.registry.devices, what="the mended registration")


async def test_a_full_registry_is_told_to_the_newcomer_only(broker: LocalBroker, edges: Edges) -> None:
    edge = await edges.start(port=broker.port, devices=DevicesConfig(registry_max=1))
    async with Device(broker.port, "client") as device:
        await decided(edge, device, "boiler-1", 90)
        await device.say("telemetry", [{"temp": 99}, {"temp": 98}], name="boiler-2")
        await decided(edge, device, "boiler-1", 91)
        (error,) = (await edge.get("/api/v1/errors"))["devices"]
        assert error["device"] == "boiler-2" and "registry_max" in error["remedy"] and error["reason"] == "limit"
        assert len(await edge.records("telemetry")) == 2
