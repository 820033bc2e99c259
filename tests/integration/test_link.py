"""Edge and hub over a real mosquitto and a link that breaks: cut, held, hubs and brokers that come back older or empty, losses, doubles, clones, new disks.

After each scenario the proof: every record of the edge's journal against the hub's rows by content, the chains, and what `novactl verify` says.
"""

import asyncio
import contextlib
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.contract import jsoncodec, topics
from edge_runtime.contract.streams import STREAMS
from edge_runtime.uplink import lanes as lanes_module
from hub import ingest as ingest_module
from hub.credit import PER_EDGE_MAX
from hub.ingest import QUEUE_MAX
from hub.server import Hub
from tools.demo import compare
from tools.ending import ended
from tools.faultproxy import FaultProxy
from tools.novactl.verify import verify_edge

from .hub_side import EDGE, Mosquitto, api_of, differences, in_thread, linked_edge, needs_mosquitto, proven, raw_client, rows_of_edge, rows_of_hub, running_hub, synced
from .waiting import until

pytestmark = needs_mosquitto


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Mosquitto]:
    """The test's own broker, which keeps nothing over a restart."""
    made = Mosquitto(tmp_path / "broker")
    await made.start()
    yield made
    await made.kill()


@pytest.fixture
async def proxy(broker: Mosquitto) -> AsyncIterator[FaultProxy]:
    """The edge's way to the broker."""
    made = FaultProxy("127.0.0.1", broker.port)
    await made.start()
    yield made
    await made.close()


def seqs_at(hub: Hub, stream: str = "decision") -> list[int]:
    return [item.record.seq for item in hub.store.read_records(EDGE, stream, limit=100_000)]


@dataclass
class Tap:
    """What goes over the broker on the edge's topic: payloads as they were, and how often each record went by."""

    payloads: list[bytes] = field(default_factory=list)
    counted: Counter[tuple[str, int]] = field(default_factory=Counter)
    top_history: dict[str, int] = field(default_factory=dict)


@contextlib.asynccontextmanager
async def tapped(broker: Mosquitto) -> AsyncIterator[Tap]:
    """Listen in on every batch."""
    tap = Tap()
    async with raw_client(broker.port, "tap") as client:
        await client.subscribe("novacron/1/edge/+/up", qos=1)

        async def listen() -> None:
            async for message in client.messages:
                assert isinstance(message.payload, bytes)
                tap.payloads.append(message.payload)
                batch = jsoncodec.decode(message.payload)
                for record in batch["records"]:
                    tap.counted[batch["stream"], record["seq"]] += 1
                    if batch["lane"] == "history":
                        tap.top_history[batch["stream"]] = max(tap.top_history.get(batch["stream"], 0), record["seq"])

        listener = asyncio.create_task(listen())
        try:
            yield tap
        finally:
            await ended(listener)


# -- the link ----------------------------------------------------------------------------------------------------------------


async def test_a_cut_link_loses_and_doubles_nothing(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    async with running_hub(tmp_path / "hub", broker.url) as hub, linked_edge(tmp_path / "edge", proxy.port) as edge:
        await until(lambda: edge.uplink.up, what="the link")
        for round_ in range(3):
            await edge.append(100)
            await proxy.cut()  # at once: batches are on their way
            await until(lambda: not edge.uplink.connected, what="the edge's notice of it")
            await edge.append(400)
            await proxy.heal()
            await until(lambda: edge.uplink.up, what="the link")
            await edge.append(50)
            report = await proven(hub, edge)
            assert report["streams"]["decision"]["counted"] == 550 * (round_ + 1)
        assert [up for up, _ in edge.links].count(True) == 4 and all(up != after for (up, _), (after, _) in zip(edge.links, edge.links[1:], strict=False))


async def test_a_black_hole_is_noticed_by_both_sides_and_healed(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    """Connections stand and no byte passes: only the keep-alive tells."""
    async with running_hub(tmp_path / "hub", broker.url) as hub, linked_edge(tmp_path / "edge", proxy.port, keepalive_s=1) as edge:
        await edge.append(50)
        await synced(hub, edge)
        proxy.hold()
        await edge.append(100)  # into the hole
        await until(lambda: not edge.uplink.connected, 20, "the edge's notice of it")
        await until(lambda: hub.fleet.rows[EDGE].state == "offline", 20, "the broker's notice of it")
        await edge.append(100)
        await proxy.heal()  # and what was held comes out late, beside what is sent anew
        await proven(hub, edge)
        assert hub.fleet.rows[EDGE].quarantine == ""


async def test_a_restarted_hub_goes_on_where_it_was(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    async with linked_edge(tmp_path / "edge", proxy.port) as edge:
        boots = set()
        for _ in range(3):
            await edge.append(100)
            async with running_hub(tmp_path / "hub", broker.url) as hub:
                boots.add(hub.boot)
                await until(lambda: edge.uplink.up, what="the link")
                await edge.append(100)
                await proven(hub, edge)
                assert sum(book.mismatches for book in hub.ingest.books.values()) == 0
            await until(lambda: not edge.uplink.up, what="the hub's goodbye")
            assert edge.uplink.connected, "the broker is still there"
        assert len(boots) == 3 and edge.journal.durable("decision") == 600


@pytest.mark.parametrize("kept", [True, False], ids=["the edge kept all", "the edge freed what was receipted"])
async def test_a_hub_restored_from_an_older_copy_gets_again_what_the_edge_has(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy, kept: bool) -> None:
    async with linked_edge(tmp_path / "edge", proxy.port, retain=10_000 if kept else 20) as edge:
        async with running_hub(tmp_path / "hub", broker.url) as hub:
            await edge.append(100)
            await hub.change_desired(EDGE, {"twins": {"fan-1": {"speed": 1}}})
            await until(lambda: edge.desired is not None, what="the desired state")
            await synced(hub, edge)
        shutil.copy(tmp_path / "hub" / "hub.db", tmp_path / "older.db")
        async with running_hub(tmp_path / "hub", broker.url) as hub:
            await until(lambda: edge.uplink.up, what="the link")
            await edge.append(100)
            for speed in (2, 3, 4):
                await hub.change_desired(EDGE, {"twins": {"fan-1": {"speed": speed}}})
            await until(lambda: edge.desired is not None and edge.desired.generation == 4, what="generation 4")
            await synced(hub, edge)
            await edge.journal.upkeep()
        shutil.copy(tmp_path / "older.db", tmp_path / "hub" / "hub.db")
        assert len([key for key in rows_of_hub(tmp_path / "hub", EDGE) if key[0] == "decision"]) == 100
        async with running_hub(tmp_path / "hub", broker.url) as hub:
            await until(lambda: edge.uplink.up, what="the link")
            await edge.append(10)
            report = await proven(hub, edge)
            decision = report["streams"]["decision"]
            if kept:
                assert decision["counted"] == 210 and decision["gone"] == 0 and decision["lost"] == 0
            else:
                # What was freed cannot come again: it is named, not passed over.
                assert decision["gone"] == decision["lost"] == 80 and decision["base"] == 181 and decision["counted"] == 30
            await until(lambda: edge.desired is not None and edge.desired.generation == 5, what="a generation above what the edge has seen")
            assert hub.desired[EDGE]["generation"] == 5 and edge.desired is not None and edge.desired.twins == {"fan-1": {"speed": 1}}


async def test_a_broker_that_lost_sessions_and_retained_messages(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    async with running_hub(tmp_path / "hub", broker.url) as hub, linked_edge(tmp_path / "edge", proxy.port) as edge:
        await hub.change_desired(EDGE, {"twins": {"fan-1": {"speed": 1}}})
        await edge.append(100)
        await synced(hub, edge)
        await broker.kill()
        await until(lambda: not edge.uplink.connected and not hub.link.up, what="the notice of it")
        assert (await hub.change_desired(EDGE, {"twins": {"fan-1": {"speed": 2}}}))["generation"] == 2
        await edge.append(300)
        await broker.start()
        await until(lambda: hub.link.up and edge.uplink.up, what="both at the broker")
        await proven(hub, edge)
        await until(lambda: edge.desired is not None and edge.desired.generation == 2, what="the desired state changed meanwhile")
        # The retained messages are there again: one who comes now is told.
        async with raw_client(broker.port, "late") as client:
            await client.subscribe([(topics.HUB_STATUS, 1), (topics.edge_topic(EDGE, "status"), 1), (topics.edge_topic(EDGE, "desired"), 1)])
            said: dict[str, Any] = {}
            async with asyncio.timeout(10):
                async for message in client.messages:
                    assert isinstance(message.payload, bytes)
                    said[str(message.topic)] = jsoncodec.decode(message.payload)
                    if len(said) == 3:
                        break
        assert said[topics.HUB_STATUS]["boot"] == hub.boot and said[topics.edge_topic(EDGE, "desired")]["generation"] == 2
        assert said[topics.edge_topic(EDGE, "status")]["state"] == "online"


# -- losses and doubles ------------------------------------------------------------------------------------------------------


async def test_a_lost_batch_is_asked_for_by_range_and_only_that(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    """A broker that acknowledges a message and loses it (it crashed, or its queue was full) cannot be made to order: the loss is planted in the edge's publish."""
    async with running_hub(tmp_path / "hub", broker.url) as hub, linked_edge(tmp_path / "edge", proxy.port) as edge, tapped(broker) as tap:
        await edge.append(50, ("decision",))
        await synced(hub, edge)
        session = edge.uplink._session
        assert session is not None
        publish, lost = session.publish, []

        def losing(topic: str, payload: bytes, **more: Any) -> bool:
            if topic.endswith("/up") and not lost:
                lost.append(jsoncodec.decode(payload))
                asyncio.get_running_loop().call_soon(more["on_ack"])
                return True
            return publish(topic, payload, **more)

        session.publish = losing  # type: ignore[method-assign]
        await edge.append(40, ("decision",))
        await until(lambda: lost, what="the loss")
        await edge.append(60, ("decision",))
        gone = [record["seq"] for record in lost[0]["records"]]
        await until(lambda: hub.ingest.books[EDGE, "decision"].top == 150, what="the records after the gap")
        assert hub.ingest.books[EDGE, "decision"].contiguous == gone[0] - 1
        report = await proven(hub, edge)
        assert report["streams"]["decision"]["counted"] == 150 and hub.ingest.counters["gap_requests_total"] >= 1
        assert edge.metrics.total("uplink_gap_requests_total") == 1
        assert all(tap.counted["decision", seq] == 1 for seq in range(1, 151)), "each record crossed the broker once: the others were not sent again"


async def test_a_refused_commit_keeps_nothing_and_is_made_good(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    """A disk error of the store, planted in its commit."""
    async with running_hub(tmp_path / "hub", broker.url) as hub, linked_edge(tmp_path / "edge", proxy.port) as edge:
        await edge.append(50)
        await synced(hub, edge)
        commit, failures = hub.store.commit, []

        def failing(transaction: Any) -> None:
            if transaction.records and not failures:
                failures.append(len(transaction.records))
                raise sqlite3.OperationalError("disk I/O error")
            commit(transaction)

        hub.store.commit = failing  # type: ignore[method-assign]
        await edge.append(30)
        await until(lambda: hub.ingest.counters["failed_commits_total"] == 1, what="the failure")
        await edge.append(30)
        report = await proven(hub, edge, 60)
        assert hub.ingest.counters["failed_commits_total"] == 1 and sum(entry["counted"] for entry in report["streams"].values()) == 330


async def test_a_store_that_is_away_for_a_while_does_not_end_the_intake(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    """Neither commits nor reads work; the hub must still be taking records in when they do again."""
    async with running_hub(tmp_path / "hub", broker.url) as hub, linked_edge(tmp_path / "edge", proxy.port) as edge:
        await edge.append(50, ("decision",))
        await synced(hub, edge)
        away = True
        reads = 0

        def broken(method: Any) -> Any:
            def call(*arguments: Any, **more: Any) -> Any:
                nonlocal reads
                if away:
                    reads += method.__name__ == "streams"
                    raise sqlite3.OperationalError("disk I/O error")
                return method(*arguments, **more)
            return call

        for name in ("commit", "streams", "read_records"):
            setattr(hub.store, name, broken(getattr(hub.store, name)))
        await edge.append(30, ("decision",))
        await until(lambda: reads >= 2, what="the hub's tries to read its store")
        away = False
        await edge.append(30, ("decision",))
        await proven(hub, edge, 60)


async def test_injected_duplicates_are_dropped_and_counted(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    async with running_hub(tmp_path / "hub", broker.url) as hub, linked_edge(tmp_path / "edge", proxy.port) as edge, tapped(broker) as tap:
        await edge.append(100)
        await synced(hub, edge)
        batches = list(tap.payloads)
        records = sum(len(jsoncodec.decode(payload)["records"]) for payload in batches)
        assert records == 300
        async with raw_client(broker.port, "echo") as client:
            for payload in [*batches, *reversed(batches)]:
                await client.publish(topics.edge_topic(EDGE, "up"), payload, qos=1)
        await until(lambda: hub.ingest.counters["duplicate_records_total"] == 2 * records, what="both echoes counted")
        await edge.append(10)
        report = await proven(hub, edge)
        assert sum(entry["duplicates"] for entry in report["streams"].values()) == 2 * records
        assert hub.ingest.counters["records_total"] == 330 and f"novacron_hub_duplicate_records_total {2 * records}" in hub.render_metrics()


# -- identities --------------------------------------------------------------------------------------------------------------


async def test_a_clone_is_quarantined_both_go_on_alone_and_a_release_ends_it(tmp_path: Path, broker: Mosquitto) -> None:
    async with linked_edge(tmp_path / "edge", broker.port):
        pass  # its first boot, of which the copy is made
    shutil.copytree(tmp_path / "edge", tmp_path / "clone")
    async with running_hub(tmp_path / "hub", broker.url) as hub, linked_edge(tmp_path / "edge", broker.port) as edge, linked_edge(tmp_path / "other", broker.port, "gw-2") as other:
        await edge.append(50)
        await synced(hub, edge)
        async with linked_edge(tmp_path / "clone", broker.port) as clone:
            assert clone.journal.boot_n == edge.journal.boot_n and clone.journal.boot != edge.journal.boot
            await until(lambda: hub.fleet.rows[EDGE].quarantine, what="the quarantine")
            reason = hub.fleet.rows[EDGE].quarantine
            assert edge.journal.boot in reason and clone.journal.boot in reason and "two machines" in reason
            held = hub.ingest.counters["records_total"]
            await edge.append(30)
            await clone.append(60)  # more than the hub has of the other
            await until(lambda: edge.uplink.lanes.quarantine and clone.uplink.lanes.quarantine, 30, "both told")
            assert edge.journal.durable("decision") == 80 and clone.journal.durable("decision") == 60, "both keep their records"
            assert clone.journal.marks("decision").receipted == 0, "nothing of the clone's is taken for the other's records, which the hub has"
            assert seqs_at(hub) == list(range(1, 51)) and hub.ingest.counters["records_total"] == held
            # No other edge notices.
            await other.append(20)
            await proven(hub, other)
            seen = await in_thread(api_of(hub).get, f"/api/v1/edges/{EDGE}")
            assert seen["quarantine"] == reason and (await in_thread(api_of(hub).get, "/api/v1/status"))["quarantined"] == 1
        await until(lambda: edge.uplink.connected and edge.uplink.up, what="the first edge alone at the broker")
        released = await in_thread(api_of(hub).call, "POST", f"/api/v1/edges/{EDGE}/release")
        assert released["quarantine"] == ""
        await edge.append(5)
        report = await proven(hub, edge)
        assert report["streams"]["decision"]["counted"] == 85 and not hub.fleet.rows[EDGE].quarantine


async def test_a_replaced_disk_goes_on_above_what_the_hub_holds(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    async with running_hub(tmp_path / "hub", broker.url) as hub:
        async with linked_edge(tmp_path / "edge", proxy.port) as old:
            await old.append(100)
            await proven(hub, old)
        before = {item.record.seq: item.record for item in hub.store.read_records(EDGE, "decision", limit=1000)}
        # A new disk has no memory of boots or sequence numbers; its first boot is number 1 again, as the old disk's was.
        async with linked_edge(tmp_path / "new disk", proxy.port) as new:
            await new.append(20)
            # From afar that is a clone: a person has to say that the old disk is gone.
            await until(lambda: hub.fleet.rows[EDGE].quarantine, what="the doubt about a clone")
            await in_thread(api_of(hub).call, "POST", f"/api/v1/edges/{EDGE}/release")
            await until(lambda: new.metrics.total("journal_rebases_total") >= 3, 30, "the rebase of each stream")
            await new.append(10)
            report = await proven(hub, new)
            for stream in STREAMS:
                assert report["streams"][stream]["base"] == 101 and report["streams"][stream]["contiguous"] == 130 and report["streams"][stream]["counted"] == 30
        after = {item.record.seq: item.record for item in hub.store.read_records(EDGE, "decision", limit=1000)}
        assert len(after) == 130 and {seq: after[seq] for seq in before} == before, "the old disk's records are as they were"


async def test_a_replaced_disk_that_has_written_more_than_the_hub_holds_loses_nothing(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    """Its first records stand under sequence numbers that the hub has already, with other content: only the chain tells."""
    async with running_hub(tmp_path / "hub", broker.url) as hub:
        async with linked_edge(tmp_path / "edge", proxy.port) as old:
            await old.append(20)
            await proven(hub, old)
        await proxy.cut()
        async with linked_edge(tmp_path / "new disk", proxy.port) as new:
            await new.append(50)
            contents = sorted(row[-1] for (stream, _), row in rows_of_edge(tmp_path / "new disk").items() if stream == "decision")
            await hub.release(EDGE)  # a person knows of the new disk
            await proxy.heal()
            await until(
                lambda: new.metrics.total("journal_rebases_total") >= 3 or any(book.mismatches for book in hub.ingest.books.values()), 30, "the rebase of each stream, or the chain's word on its lack"
            )
            assert new.metrics.total("journal_rebases_total") >= 3
            report = await proven(hub, new)
            assert report["streams"]["decision"]["contiguous"] == 70
            held = sorted(rows[0][-1] for (stream, seq), rows in rows_of_hub(tmp_path / "hub", EDGE).items() if stream == "decision" and seq > 20)
            assert held == contents


# -- credit ------------------------------------------------------------------------------------------------------------------


async def test_history_beyond_the_credit_waits_and_a_full_queue_gives_none(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    count = 2 * PER_EDGE_MAX + 3000
    async with linked_edge(tmp_path / "edge", proxy.port) as edge:
        await edge.append(count, ("telemetry",))
        async with tapped(broker) as tap, running_hub(tmp_path / "hub", broker.url) as hub:
            hold = threading.Event()
            try:
                await until(lambda: edge.uplink.lanes.credit, what="a first credit")  # a store that is stuck before it gives none
                hub.ingest.write(hold.wait)  # nothing is committed, so nothing is receipted
                lane = edge.uplink.lanes.streams["telemetry"]
                await until(
                    lambda: edge.uplink.lanes.outstanding_history() == PER_EDGE_MAX == edge.uplink.lanes.credit and tap.top_history.get("telemetry") == lane.receipted + PER_EDGE_MAX,
                    what="the credit used up, all of it at the broker",
                )
                allowed = lane.receipted + PER_EDGE_MAX
                # The queue fills behind the stuck store: the next receipt allows nothing at all.
                for _ in range(QUEUE_MAX):
                    hub.ingest.message(EDGE, "status", b"", False)
                hub.ingest.message(EDGE, "status", b"", False)
                assert hub.ingest.queue_fill == 1.0 and hub.ingest.counters["dropped_messages_total"] >= 1 and "nearly full" in str(hub.problems())
                hub.ingest.send_receipts(EDGE, set(STREAMS))
                await until(lambda: edge.uplink.lanes.credit == 0, what="no credit")
                assert edge.uplink.lanes.next(edge.clock.mono_ms()) is None
                # Live records are not history: they have their own window and still go.
                await edge.append(3, ("decision",))
                await until(lambda: tap.counted["decision", 3], what="live records")
                assert tap.top_history["telemetry"] == allowed < count
            finally:
                hold.set()
            await proven(hub, edge, 60)
            assert edge.journal.durable("telemetry") == count == hub.store.read_count(EDGE, "telemetry", 1, count)


@pytest.mark.parametrize("by_bytes", [False, True])
async def test_what_a_full_queue_dropped_is_asked_for_when_there_is_room(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy, by_bytes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "RECEIPT_TIMEOUT_MS", 3_600_000)  # by itself the edge would send it again in an hour
    monkeypatch.setattr(ingest_module, "QUEUE_MAX", 8)
    if by_bytes:
        monkeypatch.setattr(ingest_module, "QUEUE_MAX", 1_000_000)
        monkeypatch.setattr(ingest_module, "QUEUE_BYTES", 40_000)
    async with running_hub(tmp_path / "hub", broker.url) as hub, linked_edge(tmp_path / "edge", proxy.port) as edge:
        await edge.append(3)
        await synced(hub, edge)
        hold = threading.Event()
        try:
            hub.ingest.write(hold.wait)
            await edge.append(1, ("event",))  # goes into the commit that waits
            await until(lambda: hub.ingest.counters["records_total"] == 10, what="a commit under way")
            while not hub.ingest.counters["dropped_messages_total"]:
                hub.ingest.message(EDGE, "status", b" " * 1000, False)
            assert hub.ingest.queue_fill > 0.9
            await edge.append(2)
            await until(lambda: hub.ingest.counters["dropped_messages_total"] >= 4, what="its batches dropped")
        finally:
            hold.set()
        await proven(hub, edge)
        assert hub.ingest._queued_bytes == 0 and not hub.ingest._missed and edge.uplink.lanes.resyncs == 0


# -- versions ----------------------------------------------------------------------------------------------------------------


async def test_an_edge_of_a_newer_major_version_is_left_alone_with_a_clear_error(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    async with running_hub(tmp_path / "hub", broker.url) as hub, linked_edge(tmp_path / "edge", proxy.port) as edge, raw_client(broker.port, "newer") as newer:
        presence = {"v": 1, "edge": "gw-9", "boot": "b", "boot_n": 1, "state": "online", "speaks": [2, 3]}
        await newer.publish(topics.edge_topic("gw-9", "status"), jsoncodec.encode(presence).encode(), qos=1)
        await newer.publish(topics.edge_topic("gw-9", "up"), jsoncodec.encode({"v": 2, "edge": "gw-9", "frames": []}).encode(), qos=1)
        await newer.publish("novacron/2/edge/gw-9/up", b"{}", qos=1)  # its own tree: not ours to look at
        await until(lambda: hub.ingest.counters["rejected_messages_total:version"] == 2, what="both refused")
        errors = await in_thread(api_of(hub).get, "/api/v1/errors")
        assert [(error["edge"], error["field"], error["reason"]) for error in errors] == [("gw-9", "v", "version"), ("gw-9", "speaks", "version")]
        assert all("1" in error["problem"] + error["remedy"] and "update" in error["remedy"] for error in errors)
        assert "gw-9" not in hub.fleet.rows and ("gw-9", "decision") not in hub.ingest.books
        await edge.append(20)
        await proven(hub, edge)


async def test_a_hub_of_a_newer_major_version_is_left_alone_and_the_records_stay(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    async with raw_client(broker.port, "newer hub") as newer, tapped(broker) as tap:
        await newer.publish(topics.HUB_STATUS, jsoncodec.encode({"v": 1, "hub": "h", "boot": "b", "state": "online", "speaks": [2]}).encode(), qos=1, retain=True)
        async with linked_edge(tmp_path / "edge", proxy.port) as edge:
            await until(lambda: edge.metrics.value("uplink_rejected_messages_total", reason="version"), what="the refusal")
            assert "update this edge" in edge.uplink.last_error and not edge.uplink.up
            await edge.append(20)
            assert not tap.payloads and edge.journal.marks("decision").receipted == 0
            async with running_hub(tmp_path / "hub", broker.url) as hub:  # one that it understands
                await proven(hub, edge)


# -- the checkers see what they are for --------------------------------------------------------------------------------------


async def test_a_deleted_row_and_a_changed_byte_are_caught(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    async with running_hub(tmp_path / "hub", broker.url) as hub, linked_edge(tmp_path / "edge", proxy.port) as edge:
        await edge.append(50)
        await proven(hub, edge)
        await edge.journal.flush()  # what the edge's file says of receipts is what is compared
        assert compare(edge.folder, tmp_path / "hub", EDGE)["lost"] == 0
        with contextlib.closing(sqlite3.connect(tmp_path / "hub" / "hub.db")) as file:
            file.execute("DELETE FROM records WHERE edge=? AND stream='decision' AND seq=17", (EDGE,))
            file.commit()
        report = await in_thread(verify_edge, api_of(hub), EDGE, None)
        assert not report["exact"] and not report["streams"]["decision"]["exact"] and report["streams"]["event"]["exact"]
        assert report["streams"]["decision"]["lost"] == 1 and "1 rows are missing" in str(report["streams"]["decision"]["verdict"])
        assert compare(edge.folder, tmp_path / "hub", EDGE)["lost"] == 1
        [missing] = differences(edge.folder, tmp_path / "hub")
        assert missing.startswith("('decision', 17)")
        with contextlib.closing(sqlite3.connect(tmp_path / "hub" / "hub.db")) as file:
            file.execute("UPDATE records SET body=replace(body, '\"n 9\"', '\"n 8\"') WHERE edge=? AND stream='event' AND seq=10", (EDGE,))
            file.commit()
        report = await in_thread(verify_edge, api_of(hub), EDGE, None)
        assert not report["streams"]["event"]["exact"] and "a row was changed" in str(report["streams"]["event"]["verdict"]) and report["streams"]["telemetry"]["exact"]
        assert len(differences(edge.folder, tmp_path / "hub")) == 2 and compare(edge.folder, tmp_path / "hub", EDGE)["lost"] == 2


async def test_an_edge_whose_records_are_not_what_it_says_is_caught_by_the_chain(tmp_path: Path, broker: Mosquitto, proxy: FaultProxy) -> None:
    """A byte changes between journal and hub, everywhere plausible: only the chain tells."""
    async with running_hub(tmp_path / "hub", broker.url) as hub, linked_edge(tmp_path / "edge", proxy.port) as edge:
        await edge.append(20, ("decision",))
        await synced(hub, edge)
        session = edge.uplink._session
        assert session is not None
        publish = session.publish
        session.publish = lambda topic, payload, **more: publish(topic, payload.replace(b'"fired"', b'"fixed"'), **more)  # type: ignore[method-assign]
        await edge.append(5, ("decision",))
        await synced(hub, edge)
        report = await in_thread(verify_edge, api_of(hub), EDGE, None)
        assert not report["exact"] and report["streams"]["decision"]["mismatches"] >= 1
        assert len(differences(edge.folder, tmp_path / "hub")) == 5
