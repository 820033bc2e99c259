"""The hub with each of its three brokers, a real edge behind it: records up, receipts after the commit, desired state down, presence and Last Will."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.contract import jsoncodec, topics
from hub.broker import BrokerError, open_broker
from hub.broker.mosquitto import MosquittoBroker, find_mosquitto
from hub.server import Hub, HubSettings
from tools.ending import ended
from tools.faultproxy import FaultProxy
from tools.novactl.client import Api

from .hub_side import EDGE, Mosquitto, api_of, differences, in_thread, linked_edge, needs_mosquitto, proven, raw_client, running_hub, synced
from .waiting import until

KINDS = ("embedded", pytest.param("mosquitto", marks=needs_mosquitto), pytest.param("external", marks=needs_mosquitto), pytest.param("external with Nagle", marks=needs_mosquitto))


def _ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


IPV6 = _ipv6()


@asynccontextmanager
async def hub_with(kind: str, folder: Path) -> AsyncIterator[Hub]:
    """A hub whose broker is of `kind`; an external one is the test's own process."""
    if not kind.startswith("external"):
        async with running_hub(folder / "hub", kind) as hub:
            assert hub.broker.kind == kind
            yield hub
        return
    broker = Mosquitto(folder / "broker", tcp_nodelay="Nagle" not in kind)
    await broker.start()
    try:
        async with running_hub(folder / "hub", broker.url) as hub:
            assert hub.broker.kind == "external" and hub.broker.mqtt5, "the probe sees that mosquitto speaks MQTT 5"
            yield hub
    finally:
        await broker.kill()


@pytest.mark.parametrize("kind", KINDS)
async def test_records_go_up_and_desired_state_comes_down(kind: str, tmp_path: Path) -> None:
    async with hub_with(kind, tmp_path) as hub:
        # Wanted before the edge was ever seen: it waits for it, retained.
        await hub.change_desired(EDGE, {"twins": {"fan-1": {"speed": 2}}})
        async with linked_edge(tmp_path / "edge", hub.broker.port) as edge:
            await edge.append(300)
            await until(lambda: edge.desired is not None, what="the desired state that waited")
            assert edge.desired is not None and edge.desired.twins == {"fan-1": {"speed": 2}}
            report = await proven(hub, edge)
            assert report["streams"]["decision"]["counted"] == 300 and report["streams"]["telemetry"]["counted"] == 300
            document = await hub.change_desired(EDGE, {"twins": {"fan-1": {"speed": 3}}})
            await until(lambda: hub.fleet.rows[EDGE].generation == document["generation"] == 2, what="the applied generation told to the hub")
            row = hub.fleet.rows[EDGE]
            assert row.state == "online" and row.presence["site"] == "plant" and row.boot == edge.journal.boot
            await edge.append(50)
            await proven(hub, edge)
        await until(lambda: hub.fleet.rows[EDGE].state == "offline", what="the goodbye")
        assert hub.fleet.rows[EDGE].reason == "shutdown"


@pytest.mark.skipif(not IPV6, reason="this machine has no IPv6 on its loopback")
@pytest.mark.parametrize("kind", ["embedded", pytest.param("mosquitto", marks=needs_mosquitto)])
async def test_all_of_it_over_ipv6_and_addresses_that_can_be_opened_as_they_are_printed(kind: str, tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", kind, broker_host="::1", host="::1") as hub, linked_edge(tmp_path / "edge", hub.broker.port, host="::1") as edge:
        await edge.append(30)
        await synced(hub, edge)
        assert hub.url == f"http://[::1]:{hub.port}"
        assert (await in_thread(Api(hub.url, hub.token).get, "/api/v1/status"))["edges_online"] == 1
    assert differences(edge.folder, hub.settings.data_dir, edge.name) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_the_last_will_tells_of_a_lost_edge_and_an_outage_is_kept(kind: str, tmp_path: Path) -> None:
    async with hub_with(kind, tmp_path) as hub:
        proxy = FaultProxy("127.0.0.1", hub.broker.port)
        await proxy.start()
        try:
            async with linked_edge(tmp_path / "edge", proxy.port) as edge:
                await edge.append(20)
                await synced(hub, edge)
                await proxy.cut()
                await until(lambda: hub.fleet.rows[EDGE].state == "offline", what="the Last Will")
                assert hub.fleet.rows[EDGE].reason == "lost" and EDGE in hub.fleet.open_outages
                await until(lambda: not edge.uplink.connected, what="the edge's notice of it")
                await edge.append(200)
                assert hub.ingest.books[EDGE, "decision"].contiguous == 20
                await proxy.heal()
                await proven(hub, edge)
                assert hub.fleet.rows[EDGE].state == "online"
                await hub.ingest.write(lambda: None)  # what the store was told before this is written
                [outage] = await hub.read(lambda: hub.store.read_outages(0))
                assert outage["edge"] == EDGE and outage["reason"] == "lost" and outage["end_ms"] >= outage["start_ms"]
        finally:
            await proxy.close()


@pytest.mark.parametrize("kind", ["embedded", pytest.param("mosquitto", marks=needs_mosquitto)])
async def test_a_receipt_follows_the_commit_and_never_precedes_it(kind: str, tmp_path: Path) -> None:
    """The store's writing thread is held: records arrive, nothing is receipted. Let go: they are."""
    async with hub_with(kind, tmp_path) as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge:
        await edge.append(5)
        await synced(hub, edge)
        hold = threading.Event()
        try:
            held = hub.ingest.write(hold.wait)
            await edge.append(40, ("decision",))
            await until(lambda: hub.ingest.books[EDGE, "decision"].contiguous == 45, what="the records in the hub's memory")
            assert hub.store.read_count(EDGE, "decision", 1, 100) == 5 and edge.journal.marks("decision").receipted == 5
        finally:
            hold.set()
        await held
        await until(lambda: edge.journal.marks("decision").receipted == 45, what="the receipt")
        assert hub.store.read_count(EDGE, "decision", 1, 100) == 45
        await proven(hub, edge)


@needs_mosquitto
async def test_a_killed_mosquitto_is_started_again_and_everything_comes_back(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "mosquitto") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge:
        broker = hub.broker
        assert isinstance(broker, MosquittoBroker)
        await hub.change_desired(EDGE, {"twins": {"fan-1": {"speed": 1}}})
        await edge.append(30)
        await synced(hub, edge)
        for count in (1, 2):
            pid = broker.pid
            assert pid
            os.kill(pid, signal.SIGKILL)
            await until(lambda count=count: broker.restarts == count and broker.pid, 20, "the restart")  # type: ignore[misc]
            assert broker.pid != pid
            await edge.append(30)
            await until(lambda: hub.link.up and edge.uplink.up, 30, "hub and edge at the new broker")
            await proven(hub, edge)
        status = await in_thread(api_of(hub).get, "/api/v1/status")
        assert status["broker"]["restarts"] == 2 and status["broker"]["up"]
        metrics = hub.render_metrics()
        assert "novacron_hub_broker_restarts 2" in metrics
        pid = broker.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)  # ended with the hub


@needs_mosquitto
async def test_a_port_that_a_stranger_has_is_an_error_with_its_field(tmp_path: Path) -> None:
    """Also where a look at the port finds somebody listening: that is not our broker."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for setting in ("mosquitto", "embedded"):
            with pytest.raises(BrokerError) as caught:
                broker = await open_broker(setting, tmp_path / setting, "127.0.0.1", port)
                await broker.close()
            assert caught.value.field == "broker.port" and str(port) in caught.value.problem


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org"])
async def test_off_loopback_the_embedded_broker_is_refused_and_mosquitto_wants_passwords(host: str, tmp_path: Path) -> None:
    with pytest.raises(BrokerError) as caught:
        await open_broker("embedded", tmp_path, host, 0)
    assert caught.value.field == "broker.host" and "mosquitto" in caught.value.remedy
    if find_mosquitto():
        with pytest.raises(BrokerError) as caught:
            await open_broker("mosquitto", tmp_path, host, 0)
        assert caught.value.field == "broker.password_file" and "password" in caught.value.remedy
        assert not list(tmp_path.iterdir()), "nothing was started or written"


@pytest.mark.parametrize("url", [
    "", "mosquito", "http://127.0.0.1:1883", "mqtt://", "mqtt://:1883", "127.0.0.1:1883", "mqtt://127.0.0.1:99999", "mqtt://127.0.0.1:port", "mqtt://[::1", "ws://127.0.0.1",
])
async def test_a_bad_url_is_named(url: str, tmp_path: Path) -> None:
    hub = Hub(HubSettings(tmp_path, broker=url, port=0))
    with pytest.raises(BrokerError) as caught:
        await hub.start()
    await hub.stop()
    assert caught.value.field == "broker" and repr(url) in str(caught.value) and "mqtt://host:port" in caught.value.remedy


async def test_a_hub_without_its_broker_says_so_and_goes_on_when_it_is_there(tmp_path: Path) -> None:
    """The broker is away at the hub's start: no refusal, /readyz says what is missing."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else gets the port
        hub = Hub(HubSettings(tmp_path, broker=f"mqtt://127.0.0.1:{closed.getsockname()[1]}", port=0))
        try:
            await hub.start()
            await until(lambda: hub.link.last_error, what="the failure of the first try")
            answer = await in_thread(api_of(hub).get, "/readyz")
            assert answer["ready"] is False and "broker" in answer["missing"][0]
            health = await in_thread(api_of(hub).get, "/healthz")
            assert health["status"] == "unhealthy" and health["problems"]
            assert await in_thread(api_of(hub).get, "/livez") == {"status": "ok", "problems": []}, "a hub that is started anew for it has no broker either"
            # Desired state can be changed meanwhile; it goes out when there is a broker.
            assert (await hub.change_desired(EDGE, {}))["generation"] == 1
        finally:
            await hub.stop()


@needs_mosquitto
@pytest.mark.parametrize("fault", ["held", "cut"])
async def test_a_hub_stops_although_its_broker_does_not_answer(fault: str, tmp_path: Path) -> None:
    """The goodbye cannot be said: that must not keep the hub from ending."""
    broker = Mosquitto(tmp_path / "broker")
    await broker.start()
    proxy = FaultProxy("127.0.0.1", broker.port)
    await proxy.start()
    try:
        hub = Hub(HubSettings(tmp_path / "hub", broker=f"mqtt://127.0.0.1:{proxy.port}", port=0))
        await hub.start()
        await until(lambda: hub.link.up, what="the link")
        stop = asyncio.ensure_future(hub.stop())
        if fault == "held":
            proxy.hold()
        else:
            await until(lambda: hub.link._task is not None and hub.link._task.cancelling(), what="the stop reaching the link")
            await proxy.cut()
        await asyncio.wait_for(stop, 30)
    finally:
        await proxy.close()
        await broker.kill()


@needs_mosquitto
async def test_the_hubs_own_presence_and_last_will(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path / "broker")
    await broker.start()
    said: list[dict[str, Any]] = []
    try:
        async with raw_client(broker.port, "watcher") as watcher:
            await watcher.subscribe(topics.HUB_STATUS, qos=1)

            async def listen() -> None:
                async for message in watcher.messages:
                    assert isinstance(message.payload, bytes)
                    said.append(jsoncodec.decode(message.payload))

            listener = asyncio.create_task(listen())
            proxy = FaultProxy("127.0.0.1", broker.port)
            await proxy.start()
            async with running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{proxy.port}") as hub:
                await until(lambda: said and said[-1]["state"] == "online", what="online")
                assert said[-1]["boot"] == hub.boot and said[-1]["hub"] == "hub" and said[-1]["speaks"] == [1]
                await proxy.cut()
                await until(lambda: said[-1]["state"] == "offline", what="the Last Will")
                await proxy.heal()
                await until(lambda: said[-1]["state"] == "online", what="online again")
            await until(lambda: said[-1]["state"] == "offline", what="the goodbye of an orderly stop")
            await proxy.close()
            await ended(listener)
    finally:
        await broker.kill()
