"""An edge whose broker does not pass on what it says: the hub's presence reaches it, so that it takes the hub for there, and nothing it sends ever arrives. It says so itself, as nobody else can know."""

from pathlib import Path

import pytest

from edge_runtime.uplink import lanes, link

from .edges import LocalBroker
from .hub_side import EDGE, linked_edge, needs_mosquitto, proven, running_hub
from .waiting import until


@needs_mosquitto
@pytest.mark.parametrize("protocol", ["3.1.1", "5"])
async def test_an_edge_that_may_not_speak_says_so_until_it_may(tmp_path: Path, protocol: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "RECEIPT_TIMEOUT_MS", 500)
    edge_may = tmp_path / "rights"
    everything = "topic readwrite novacron/#\n"
    mute = f"user mute\ntopic read novacron/#\n\nuser hub\n{everything}"
    edge_may.write_text(mute)
    broker = LocalBroker(tmp_path / "broker", f"acl_file {edge_may}\n")
    broker.start()
    try:
        async with running_hub(tmp_path / "hub", f"mqtt://hub@127.0.0.1:{broker.port}") as hub, linked_edge(tmp_path / "edge", broker.port, protocol=protocol, user="mute") as edge:
            await edge.append(50)
            await until(lambda: edge.uplink.unheard != "", what="what it says of itself")
            assert edge.uplink.up and hub.ingest.books.get((EDGE, "decision")) is None
            assert f"lets mute publish on novacron/1/edge/{EDGE}/#" in edge.uplink.unheard and "dots" not in edge.uplink.unheard
            told = caplog.text.count("answers nothing of what this edge says")
            resyncs = edge.uplink.lanes.resyncs
            await until(lambda: edge.uplink.lanes.resyncs > resyncs + 2, what="more silence")
            assert told == caplog.text.count("answers nothing of what this edge says") == 1
            edge_may.write_text(mute.replace("user mute\ntopic read", "user mute\ntopic readwrite"))
            broker.reload()
            await until(lambda: edge.uplink.unheard == "", what="that it is heard")
            await proven(hub, edge)
    finally:
        broker.stop()


@needs_mosquitto
async def test_a_hub_that_is_slow_once_is_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "RECEIPT_TIMEOUT_MS", 500)
    monkeypatch.setattr(link, "UNHEARD_AFTER", 1_000_000)
    broker = LocalBroker(tmp_path / "broker", "")
    broker.start()
    try:
        async with running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{broker.port}") as hub, linked_edge(tmp_path / "edge", broker.port) as edge:
            heard, hub.ingest.send_receipts = hub.ingest.send_receipts, lambda *_: None  # type: ignore[method-assign]
            await edge.append(5)
            await until(lambda: edge.uplink._unanswered >= 2, what="two silences")
            hub.ingest.send_receipts = heard  # type: ignore[method-assign]
            await proven(hub, edge)
            assert edge.uplink._unanswered == 0 and edge.uplink.unheard == ""
    finally:
        broker.stop()
