"""Two hubs at one broker, as where a backup is tried out beside the hub that it is of: both say so, and the one that stays goes on as if nothing had been."""

from pathlib import Path

import pytest

from edge_runtime.contract import jsoncodec, topics

from .edges import LocalBroker
from .hub_side import differences, linked_edge, needs_mosquitto, proven, raw_client, running_hub
from .waiting import until

pytestmark = needs_mosquitto


@pytest.mark.parametrize("protocol", ["3.1.1", "5"])
@pytest.mark.parametrize("name", ["hub", "other"])
async def test_both_say_so_and_the_one_that_stays_goes_on(name: str, protocol: str, tmp_path: Path) -> None:
    broker = LocalBroker(tmp_path / "broker")
    broker.start()
    try:
        url = f"mqtt://127.0.0.1:{broker.port}"
        async with running_hub(tmp_path / "hub", url) as hub, linked_edge(tmp_path / "edge", broker.port, protocol=protocol) as edge:
            await edge.append(20)
            await proven(hub, edge)
            assert hub.problems() == []
            async with running_hub(tmp_path / "second", url, name=name) as second:
                await until(lambda: hub.link.rival == name and second.link.rival == "hub", what="each has heard of the other")
                for one, other in ((hub, name), (second, "hub")):
                    assert f"another hub ({other}) speaks to the same edges at this broker: stop one of the two, or give it a broker of its own" in one.problems()
                await edge.append(20)
            await until(lambda: hub.link.rival == "", what="that the second has gone")
            await edge.append(20)
            await proven(hub, edge)
            assert hub.problems() == [] and edge.uplink.up
            await edge.stop()
        assert differences(tmp_path / "edge", tmp_path / "hub") == []
    finally:
        broker.stop()


async def test_what_is_left_of_a_hub_that_was_killed_is_no_second_one(tmp_path: Path) -> None:
    """Its presence, retained, and its last word, which may come late."""
    broker = LocalBroker(tmp_path / "broker")
    broker.start()
    try:
        before = {"v": 1, "hub": "hub", "boot": "0123456789abcdef", "state": "online", "speaks": [1], "time_ms": 1}
        async with raw_client(broker.port, "before") as client:
            await client.publish(topics.HUB_STATUS, jsoncodec.encode(before).encode(), qos=1, retain=True)
            async with running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{broker.port}") as hub, linked_edge(tmp_path / "edge", broker.port) as edge:
                await edge.append(20)
                await proven(hub, edge)
                assert hub.link.rival == "" and hub.problems() == [], "its presence is old"
                await client.subscribe(topics.HUB_STATUS, 1)
                await client.publish(topics.HUB_STATUS, jsoncodec.encode(before | {"state": "offline"}).encode(), qos=1, retain=True)
                async for message in client.messages:  # the retained one, the last word, and what the hub says to that
                    assert isinstance(message.payload, bytes)
                    said = jsoncodec.decode(message.payload)
                    if not message.retain and said["state"] == "online":
                        break
                await edge.append(20)
                await proven(hub, edge)
                assert hub.link.rival == "" and hub.problems() == [] and edge.uplink.up, "who took it for gone has heard that it is not"
    finally:
        broker.stop()
