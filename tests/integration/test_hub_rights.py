"""A broker of somebody else's that gives the hub too few rights: it is told, where nothing would come and nobody would know why."""

import asyncio
from pathlib import Path

import pytest

from hub.broker.choose import ExternalBroker
from hub.link import HubLink
from hub.server import Hub, HubSettings

from .edges import LocalBroker
from .hub_side import needs_mosquitto
from .test_mqtt_session import RawBroker
from .waiting import until


@needs_mosquitto
@pytest.mark.parametrize(("rights", "refused"), [("topic read novacron/#", True), ("topic readwrite novacron/#", False)])
async def test_a_hub_that_may_not_speak_says_so(tmp_path: Path, rights: str, refused: bool, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rights").write_text(f"{rights}\n")  # of who comes without a name
    broker = LocalBroker(tmp_path / "broker", f"acl_file {tmp_path}/rights\n")
    broker.start()
    hub = Hub(HubSettings(tmp_path / "hub", broker=f"mqtt://127.0.0.1:{broker.port}", port=0))
    try:
        await hub.start()
        await until(lambda: hub.link.up, what="the hub's link")
        if refused:
            await until(lambda: hub.link.refusal != "", what="the broker's refusal")
            assert "give it all rights on novacron/#" in "".join(hub.problems()) and "the broker refuses what the hub says" in caplog.text
        else:
            await hub.change_desired("e", {"twins": {}})
            await until(hub.link._outbox.empty, what="what it says")
            assert hub.problems() == [] and hub.link.refusal == ""
    finally:
        await hub.stop()
        broker.stop()


async def test_a_hub_that_may_not_hear_its_edges_is_not_up() -> None:
    asked = asyncio.Event()

    async def refuses(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readexactly(2)
        body = await reader.readexactly(head[1])
        writer.write(b"\x90\x05" + body[:2] + b"\x01\x80\x01")  # granted, refused, granted (MQTT 3.1.1, 3.9.3)
        asked.set()
        await reader.read()

    async with RawBroker(refuses) as raw:
        link = HubLink(ExternalBroker(f"mqtt://somebody@127.0.0.1:{raw.port}"), "h", "b", on_message=lambda *_: None, on_up=lambda: None, on_bad=lambda *_: None, now_ms=lambda: 0)
        link.start()
        await asyncio.wait_for(asked.wait(), 60)
        await until(lambda: link.last_error != "", what="the reason")
        assert not link.up and "does not let the hub hear its edges" in link.last_error and "give somebody all rights" in link.last_error
        await link.stop()
