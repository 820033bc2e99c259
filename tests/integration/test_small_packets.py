"""A broker that takes smaller packets than the contract has: an edge sends less at once, and nothing is lost; what cannot be made smaller is named."""

import asyncio
from pathlib import Path

import pytest

from edge_runtime.uplink import lanes, room
from hub import book

from .edges import LocalBroker
from .hub_side import differences, linked_edge, needs_mosquitto, proven, running_hub
from .waiting import until

pytestmark = needs_mosquitto

WAYS = {
    "it says how much": ("5", "max_packet_size 12000"),
    "it refuses the message": ("5", "message_size_limit 12000"),
    "it ends the connection": ("3.1.1", "max_packet_size 12000"),
    "it drops the message": ("3.1.1", "message_size_limit 12000"),
}


@pytest.mark.parametrize("way", WAYS)
async def test_what_waited_arrives_in_smaller_batches(way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "RECEIPT_TIMEOUT_MS", 1_000)
    protocol, setting = WAYS[way]
    broker = LocalBroker(tmp_path / "broker", f"{setting}\n")
    broker.start()
    try:
        async with linked_edge(tmp_path / "edge", broker.port, protocol=protocol) as edge:
            await edge.append(600)  # by itself: batches of 25 KB of each stream
            async with running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{broker.port}") as hub:
                await proven(hub, edge)
                await edge.append(5)
                await proven(hub, edge)
                if way == "it says how much":
                    assert edge.uplink._room.told == 12_000 and edge.uplink._room.found == 0 and "does not take" not in caplog.text
                else:
                    assert room.LEAST <= edge.uplink._room.found <= 25_000
                    assert "let it take 300000 (mosquitto: max_packet_size)" in caplog.text
            await edge.stop()
            assert differences(tmp_path / "edge", tmp_path / "hub") == []
    finally:
        broker.stop()


async def test_a_hub_that_asks_again_and_again_gets_smaller_batches(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker drops what waited, and passes on what is new: it is heard, and would never have the rest."""
    monkeypatch.setattr(book, "WANT_AGAIN_MS", 500)
    monkeypatch.setattr(book, "GRACE_MS", 200)
    broker = LocalBroker(tmp_path / "broker", "message_size_limit 12000\n")
    broker.start()
    try:
        async with linked_edge(tmp_path / "edge", broker.port, protocol="3.1.1") as edge:
            await edge.append(600)
            async with running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{broker.port}") as hub:
                while edge.journal.marks("decision").receipted < 600:
                    await edge.append(1)
                    await asyncio.sleep(0.05)  # as devices do
                await proven(hub, edge)
                assert room.LEAST <= edge.uplink._room.found <= 25_000 and edge.uplink.unheard == ""
    finally:
        broker.stop()


async def test_a_record_that_is_too_large_for_the_broker_is_named_and_goes_when_it_is_not(tmp_path: Path) -> None:
    broker = LocalBroker(tmp_path / "broker", "max_packet_size 12000\n")
    broker.start()
    try:
        async with running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{broker.port}") as hub, linked_edge(tmp_path / "edge", broker.port, protocol="5") as edge:
            await edge.append(3)
            await proven(hub, edge)
            edge.journal.append("event", "alert", {"text": "x" * 20_000})
            await edge.journal.flush()
            await until(lambda: "record 4 of event takes a packet of " in edge.uplink.last_error, what="what it says of it")
            assert "and the hub's broker takes 12000: let it take 300000 (mosquitto: max_packet_size)" in edge.uplink.last_error
            broker.stop()
            broker.configure("")
            broker.start()
            await proven(hub, edge)
    finally:
        broker.stop()


async def test_a_hub_does_not_lose_its_link_over_what_the_broker_does_not_take(tmp_path: Path) -> None:
    broker = LocalBroker(tmp_path / "broker", "max_packet_size 12000\n")
    broker.start()
    try:
        async with running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{broker.port}") as hub, linked_edge(tmp_path / "edge", broker.port, protocol="5") as edge:
            await until(lambda: edge.name in hub.fleet.rows, what="the edge")
            await hub.change_desired(edge.name, {"twins": {"boiler": {"text": "x" * 20_000}}})
            await until(lambda: hub.link.refusal != "", what="what it says")
            assert f"packets have at most 12000 bytes there, and what is to be said on novacron/1/edge/{edge.name}/desired has 20" in "".join(hub.problems())
            await edge.append(3)
            await proven(hub, edge)
            assert hub.link.up
            await hub.change_desired(edge.name, {"twins": {"boiler": {"text": "less"}}})
            await until(lambda: edge.desired is not None and edge.desired.twins["boiler"]["text"] == "less", what="what it can be told")
            assert hub.problems() == [] and hub.link.refusal == ""
    finally:
        broker.stop()
