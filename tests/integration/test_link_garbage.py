"""Garbage on the hub's topics, said raw over a real broker: refused with field and remedy, counted, and no other edge notices."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.contract import jsoncodec, topics
from edge_runtime.contract.limits import MAX_BATCH_RECORDS, MAX_BODY_BYTES, MAX_INTEGER, MAX_MESSAGE_BYTES
from edge_runtime.contract.records import BATCH, CHAIN_START
from edge_runtime.contract.streams import STREAMS
from hub.ingest import MAX_ERRORS
from hub.server import Hub

from .hub_side import EDGE, Background, api_of, in_thread, linked_edge, needs_mosquitto, proven, raw_client, running_hub, served_hub, synced
from .waiting import until

RECORD = {"seq": 1, "boot": "b", "mono": 1, "wall": 1, "tq": "rtc", "kind": "reading", "body": {"n": 1}}
ZERO = CHAIN_START.hex()


def batch(**changes: Any) -> dict[str, Any]:
    """A good batch of the edge `evil`, with changes; a value of None takes the field out."""
    made = {
        "v": 1, "edge": "evil", "boot": "b", "boot_n": 1, "stream": "telemetry", "lane": "live", "floor": 1, "floor_chain": ZERO, "dropped": 0, "live": 1, "history": 1, "next": 2,
        "records": [RECORD], "chain": "", **changes,
    }
    return {key: value for key, value in made.items() if value is not None}


def record(**changes: Any) -> dict[str, Any]:
    return batch(records=[{**RECORD, **changes}])


def status(**changes: Any) -> dict[str, Any]:
    return {"v": 1, "edge": "evil", "boot": "b", "boot_n": 1, "state": "online", **changes}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


BAD: dict[str, tuple[str, bytes | dict[str, Any], str, str]] = {
    # name: (leaf, payload, the field that must be named, the reason that is counted)
    "nothing": ("up", b"", "payload", "json"), "half a JSON": ("up", b'{"v":1,"edge":', "payload", "json"), "two JSONs": ("up", b"{}{}", "payload", "json"),
    "a list": ("up", b"[1,2]", "payload", "type"), "null": ("up", b"null", "payload", "type"), "not UTF-8": ("up", b'{"v":1,"edge":"\xff\xfe"}', "payload", "utf8"),
    "random bytes": ("up", random.Random(1).randbytes(2000), "payload", "utf8"), "NaN": ("up", b'{"v":1,"next":NaN}', "payload", "nan"), "infinity": ("up", b'{"v":1,"next":-Infinity}', "payload", "nan"),
    "overflow": ("up", b'{"v":1,"next":1e999}', "payload", "nan"), "past 64 bits": ("up", b'{"v":1,"next":123456789012345678901}', "payload", "limit"),
    "digits without end": ("up", b'{"v":1,"next":' + b"9" * 10_000 + b"}", "payload", "json"),
    "too deep": ("up", jsoncodec.encode(nested(40)).encode(), "payload", "depth"), "brackets without end": ("up", b"[" * 100_000, "payload", "depth"),
    "too large": ("up", b'{"v":1,"text":"' + b"x" * MAX_MESSAGE_BYTES + b'"}', "payload", "size"),
    "no version": ("up", batch(v=None), "v", "version"), "version 2": ("up", batch(v=2), "v", "version"), "version true": ("up", batch(v=True), "v", "version"), "version text": ("up", batch(v="1"), "v", "version"),
    "no edge": ("up", batch(edge=None), "edge", "missing"), "another edge": ("up", batch(edge=EDGE), "edge", "topic"), "edge a number": ("up", batch(edge=7), "edge", "type"),
    "edge a path": ("up", batch(edge="../x"), "edge", "name"), "boot empty": ("up", batch(boot=""), "boot", "name"), "boot 0": ("up", batch(boot_n=0), "boot_n", "limit"), "boot true": ("up", batch(boot_n=True), "boot_n", "type"),
    "unknown stream": ("up", batch(stream="secrets"), "stream", "type"), "unknown lane": ("up", batch(lane="fast"), "lane", "type"), "floor 0": ("up", batch(floor=0), "floor", "limit"),
    "floor text": ("up", batch(floor="1"), "floor", "type"), "floor 1.5": ("up", batch(floor=1.5), "floor", "type"), "chain short": ("up", batch(floor_chain="00"), "floor_chain", "type"),
    "chain no hex": ("up", batch(floor_chain="zz" * 16), "floor_chain", "type"), "chain of another length": ("up", batch(chain="00" * 8), "chain", "type"),
    "records an object": ("up", batch(records={}), "records", "type"), "a record a number": ("up", batch(records=[RECORD, 7]), "records[1]", "type"), "seq 0": ("up", record(seq=0), "records[0].seq", "limit"),
    "seq negative": ("up", record(seq=-5), "records[0].seq", "limit"), "seq twice": ("up", batch(records=[RECORD, RECORD]), "records[1].seq", "order"),
    "kind with a space": ("up", record(kind="a b"), "records[0].kind", "name"), "quality unknown": ("up", record(tq="gps"), "records[0].tq", "type"), "body a list": ("up", record(body=[]), "records[0].body", "type"),
    "body too large": ("up", record(body={"text": "x" * MAX_BODY_BYTES}), "records[0].body", "size"), "too many records": ("up", batch(records=[{**RECORD, "seq": seq} for seq in range(1, MAX_BATCH_RECORDS + 2)]), "records", "limit"),
    "status of another edge": ("status", status(edge=EDGE, state="offline"), "edge", "topic"), "status unknown": ("status", status(state="maybe"), "state", "type"),
    "status without boot": ("status", {"v": 1, "edge": "evil", "state": "online"}, "boot", "missing"), "status devices": ("status", status(devices="all"), "devices", "type"),
    "status hours": ("status", status(outage_hours="many"), "outage_hours", "type"), "status labels": ("status", status(labels={str(number): "" for number in range(65)}), "labels", "limit"),
    "status text": ("status", status(reason="x" * 2000), "reason", "limit"), "status speaks": ("status", status(speaks=["1", None, {}]), "speaks", "version"), "status not JSON": ("status", b"\x00", "payload", "json"),
}


def encoded(payload: bytes | dict[str, Any]) -> bytes:
    return payload if isinstance(payload, bytes) else json.dumps(payload).encode()


@needs_mosquitto
async def test_every_kind_of_garbage_is_refused_named_and_counted_and_no_other_edge_notices(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "mosquitto") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge, raw_client(hub.broker.port, "evil") as evil:
        await edge.append(20)
        await synced(hub, edge)
        for number, (name, (leaf, payload, field, reason)) in enumerate(BAD.items()):
            if leaf == "status" and payload == b"":
                continue
            before = hub.ingest.counters[f"rejected_messages_total:{reason}"]
            await evil.publish(topics.edge_topic("evil", leaf), encoded(payload), qos=1)
            await until(lambda reason=reason, before=before: hub.ingest.counters[f"rejected_messages_total:{reason}"] > before, what=f"the refusal of: {name}")  # type: ignore[misc]
            said = hub.ingest.errors[-1]
            assert (said["edge"], said["field"], said["reason"]) == ("evil", field, reason), name
            assert said["problem"] and said["remedy"] and len(said["problem"]) < 500, name
            assert "evil" not in hub.fleet.rows and not [key for key in hub.ingest.books if key[0] == "evil"], f"{name}: nothing half-applied"
            if number % 10 == 0:
                await edge.append(3)
        await proven(hub, edge)
        assert hub.fleet.rows[EDGE].state == "online" and hub.ingest.counters["failed_messages_total"] == 0
        listed = await in_thread(api_of(hub).get, "/api/v1/errors")
        assert len(listed) == len(BAD) <= MAX_ERRORS and listed[0]["time_ms"] >= listed[-1]["time_ms"]
        metrics = hub.render_metrics()
        for reason in {entry[3] for entry in BAD.values()}:
            count = sum(entry[3] == reason for entry in BAD.values())
            assert f'novacron_hub_rejected_messages_total{{reason="{reason}"}} {count}\n' in metrics
        # A good batch of the same sender is still taken: it was the messages that were bad.
        await evil.publish(topics.edge_topic("evil", "up"), encoded(batch()), qos=1)
        await until(lambda: hub.store.read_count("evil", "telemetry", 1, 1), what="the good one")


@needs_mosquitto
async def test_topics_outside_the_contract_are_refused_and_the_errors_are_bounded(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "mosquitto") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge, raw_client(hub.broker.port, "evil") as evil:
        names = ["a b", "-x", "\u00e9", "x" * 65, "<img src=x>", "a'b", "%2e%2e", "\U0001f600", ".."]
        for name in names:
            for leaf in ("up", "status"):
                await evil.publish(f"novacron/1/edge/{name}/{leaf}", encoded(batch()), qos=1)
        # These the hub does not even listen to.
        for topic in ("novacron/1/edge/evil/other", "novacron/1/edge/evil", "novacron/1/edge/a/b/up", "novacron/9/edge/evil/up", "other/1/edge/evil/up", "novacron/1/edge/evil/receipts"):
            await evil.publish(topic, encoded(batch()), qos=1)
        refused = lambda: hub.ingest.counters["rejected_messages_total:name"]  # noqa: E731
        await until(lambda: refused() >= 2 * (len(names) - 2), what="the refusals")
        assert all(error["field"] == "topic" and error["remedy"] for error in hub.ingest.errors)
        for number in range(2 * MAX_ERRORS):
            await evil.publish(topics.edge_topic("evil", "up"), f"garbage {number}", qos=1)
        await until(lambda: hub.ingest.counters["rejected_messages_total:json"] == 2 * MAX_ERRORS, what="all refused")
        assert len(hub.ingest.errors) == MAX_ERRORS and "evil" not in hub.fleet.rows
        await edge.append(20)
        await proven(hub, edge)


HOSTILE: dict[str, list[tuple[str, bytes | dict[str, Any]]]] = {
    # Messages that the contract lets pass, and that only their sender shall suffer from.
    "half a surrogate pair": [("status", status(reason="\ud800", site="\udfff", health="\ud800")), ("status", status(state="offline", reason="\ud800"))],
    "NUL and control sequences": [("status", status(reason="\x00\x1b[2J", region="\x00", devices=["\x00", 5, None, {"a": []}], labels={"\x00": ["x"]}))],
    "a floor at the end of the world": [("up", batch(floor=MAX_INTEGER, next=MAX_INTEGER))],
    "the last sequence numbers": [("up", record(seq=MAX_INTEGER)), ("up", batch(floor=MAX_INTEGER - 1, records=[{**RECORD, "seq": MAX_INTEGER - 1}], next=MAX_INTEGER)), ("up", record(seq=MAX_INTEGER))],
    "history of all the world": [("up", batch(history=MAX_INTEGER, live=MAX_INTEGER, next=MAX_INTEGER))],
    "holes everywhere": [("up", batch(records=[{**RECORD, "seq": seq} for seq in range(1000 * number + 3, 1000 * number + 900, 2)], history=10**9, next=10**9)) for number in range(5, -1, -1)],
    "a floor that jumps": [("up", batch(floor=floor, records=[{**RECORD, "seq": floor}])) for floor in (50, 10, 10**12, 3)],
    "a chain that is none": [("up", batch(chain="11" * 16, records=[{**RECORD, "seq": seq}])) for seq in (1, 3, 2)],
    "empty batches": [("up", batch(records=[]))] * 3, "a quarrel of boots": [("up", batch(boot=f"b{number % 3}", boot_n=1)) for number in range(20)],
    "a retained batch that comes with every connection": [("up", batch())],
}


@needs_mosquitto
async def test_hostile_messages_within_the_contract_hurt_only_their_sender(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "mosquitto") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge, raw_client(hub.broker.port, "evil") as evil:
        await edge.append(10)
        await synced(hub, edge)
        for number, (name, messages) in enumerate(HOSTILE.items()):
            sender = f"evil-{number}"
            for leaf, payload in messages:
                body = json.dumps(payload).replace('"edge": "evil"', f'"edge": "{sender}"')
                await evil.publish(topics.edge_topic(sender, leaf), body, qos=1, retain="retained" in name)
            await until(lambda sender=sender: sender in hub.fleet.rows, what=f"{name}: taken in")  # type: ignore[misc]
            await edge.append(5)
            try:
                await synced(hub, edge, 20)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
            assert not any(task.done() for task in hub.ingest._tasks), name
        for path in ("/api/v1/status", "/api/v1/hierarchy", "/api/v1/edges", "/api/v1/events", "/api/v1/outages", "/api/v1/errors"):
            await in_thread(api_of(hub).get, path)
        for sender in list(hub.fleet.rows):
            await in_thread(api_of(hub).get, f"/api/v1/edges/{sender}/verify")
        assert hub.ingest.counters["failed_commits_total"] == 0 and hub.ingest.counters["failed_messages_total"] == 0
        await proven(hub, edge)
    # And what was kept can be loaded again.
    async with running_hub(tmp_path / "hub", "mosquitto") as again:
        assert len(again.fleet.rows) == len(HOSTILE) + 1


# -- generated ---------------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=12), st.sampled_from(["evil", "b", ZERO, "live", "telemetry", "online", "\ud800"]))
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)), max_leaves=12)
FIELD_NAMES = [field.name for field in BATCH.fields]
MUTATED = st.builds(lambda changes: batch(**changes), st.dictionaries(st.sampled_from(FIELD_NAMES), VALUES, min_size=1, max_size=3))
ODD_RECORDS = st.builds(lambda records: batch(records=records), st.lists(st.fixed_dictionaries({**{key: st.just(value) for key, value in RECORD.items()}, "seq": st.integers(1, 2**63 - 1)}), max_size=5))


class Target:
    """A hub in a thread whose intake is fed without a broker in between: the same entry the link uses."""

    def __init__(self, background: Background, hub: Hub) -> None:
        self.background, self.hub = background, hub

    def feed(self, leaf: str, payload: bytes) -> None:
        async def work() -> None:
            self.hub.ingest.message("evil", leaf, payload, False)
            await until(self.hub.ingest._queue.empty, what="the queue taken in")
            await self.hub.ingest.write(lambda: None)

        self.background.run(work())
        ended = [task for task in self.hub.ingest._tasks if task.done()]
        assert not ended, f"{payload!r} ended {ended}"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with served_hub(tmp_path_factory.mktemp("garbage")) as (background, hub):
        yield Target(background, hub)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(leaf=st.sampled_from(("up", "status")), payload=st.one_of(st.binary(max_size=60), VALUES, MUTATED, ODD_RECORDS, st.builds(lambda changes: status(**changes), st.dictionaries(st.sampled_from(["devices", "labels", "speaks", "reason", "generation", "outage_hours", "boot_n"]), VALUES, max_size=3))))
def test_no_message_ends_the_intake(target: Target, leaf: str, payload: Any) -> None:
    target.feed(leaf, payload if isinstance(payload, bytes) else json.dumps(payload).encode())
    hub = target.hub
    for stream in STREAMS:
        book = hub.ingest.books.get(("evil", stream))
        if book is not None and not hub.fleet.rows["evil"].quarantine:
            # What the book says is stored is stored, whatever was sent.
            assert hub.store.read_count("evil", stream, 1, MAX_INTEGER) == book.stored
    target.background.run(clear(hub))


async def clear(hub: Hub) -> None:
    """A quarantine would keep everything after it from being looked at."""
    if "evil" in hub.fleet.rows and hub.fleet.rows["evil"].quarantine:
        await hub.release("evil")


