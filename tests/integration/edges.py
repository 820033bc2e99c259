"""A real edge in this process, a real mosquitto beside it, and devices that speak to it: what the tests of the edge share."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import aiomqtt

from edge_runtime.config import EdgeConfig
from edge_runtime.config.schema import ApiConfig, BusConfig, DecisionsConfig, DevicesConfig, HostConfig, JournalConfig, UpdatesConfig, UplinkConfig
from edge_runtime.contract.desired import Desired, parse_desired
from edge_runtime.runtime import EdgeRuntime
from tools.bench.harness import die_with_parent, free_port, stop, wait_for_port
from tools.ending import ended

from .waiting import until, until_sync

MOSQUITTO = shutil.which("mosquitto") or ("/usr/sbin/mosquitto" if os.access("/usr/sbin/mosquitto", os.X_OK) else "")

EACH: dict[str, Any] = {
    "id": "overheat", "on": {"device": "boiler-*", "metric": "temp"}, "if": {"value": "temp", "op": ">", "than": 80}, "trigger": "each",
    "then": [{"command": {"device": "fan-1", "name": "speed", "args": {"temp": "$value:temp"}, "expires": "60s"}}],
}
"""Decides at every hot reading, so that decisions count readings."""


class LocalBroker:
    """One mosquitto; sessions and retained messages outlive a kill once `save` has written them down."""

    def __init__(self, folder: Path, extra: str = "") -> None:
        folder.mkdir(parents=True)
        self.port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.configure(extra)

    def configure(self, extra: str) -> None:
        """What it reads at its next start."""
        (self._folder / "mosquitto.conf").write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\npersistence true\npersistence_location {self._folder}/\nautosave_interval 0\nlog_dest none\n"
            + ("user root\n" if os.getuid() == 0 else "") + extra
        )

    def start(self) -> None:
        """Start and wait until it listens."""
        self._process = subprocess.Popen([MOSQUITTO, "-c", str(self._folder / "mosquitto.conf")], preexec_fn=die_with_parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_port(self.port)

    def save(self) -> None:
        """Have it write down what it holds."""
        assert self._process is not None
        database = self._folder / "mosquitto.db"
        before = database.stat().st_mtime_ns if database.exists() else 0
        self._process.send_signal(signal.SIGUSR1)
        until_sync(lambda: database.exists() and database.stat().st_mtime_ns > before, what="mosquitto writes its database")

    def freeze(self) -> None:
        """It stays connected and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def reload(self) -> None:
        """Have it read its files of rights again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGCONT)
            stop(self._process)


class Device:
    """An MQTT client that is a device: keeps every message it got. `async with` connects and subscribes."""

    def __init__(self, port: int, name: str, persistent: bool = False) -> None:
        self.name = name
        self.messages: list[tuple[str, dict[str, Any], bool]] = []
        self.on_message: Callable[[str, dict[str, Any]], None] = lambda _leaf, _body: None
        self._client = aiomqtt.Client("127.0.0.1", port, identifier=f"device-{name}", clean_session=not persistent, protocol=aiomqtt.ProtocolVersion.V311)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Device":
        await self._client.__aenter__()
        self._task = asyncio.get_running_loop().create_task(self._listen())
        await self._client.subscribe([(f"novacron/1/device/{self.name}/{leaf}", 1) for leaf in ("command", "desired")])
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            await ended(self._task)
        try:
            await self._client.__aexit__(None, None, None)
        except aiomqtt.MqttError:
            pass  # the broker was killed

    async def _listen(self) -> None:
        try:
            async for message in self._client.messages:
                leaf, body = str(message.topic).rsplit("/", 1)[1], json.loads(bytes(message.payload))  # type: ignore[arg-type]
                self.on_message(leaf, body)
                self.messages.append((leaf, body, message.retain))
        except aiomqtt.MqttError:
            pass  # the broker was killed

    def got(self, leaf: str) -> list[dict[str, Any]]:
        """Bodies of one kind of message, in order."""
        return [body for kind, body, _ in self.messages if kind == leaf]

    async def say(self, leaf: str, payload: Any, *, name: str = "", retain: bool = False) -> None:
        """Publish as this device (or as `name`); returns when the broker has it."""
        await self.publish(f"novacron/1/device/{name or self.name}/{leaf}", payload, retain)

    async def publish(self, topic: str, payload: Any, retain: bool = False) -> None:
        """Publish anywhere; bytes as they are, all else as JSON."""
        await self._client.publish(topic, payload if isinstance(payload, bytes) else json.dumps(payload), qos=1, retain=retain)


class Edge:
    """A running `EdgeRuntime` with shortcuts to what it tells."""

    def __init__(self, config: EdgeConfig) -> None:
        self.config = config
        self.runtime = EdgeRuntime(config)
        self.stopped = False

    async def start(self) -> None:
        """Start; the bus is not waited for."""
        await self.runtime.start()

    async def stop(self) -> None:
        """The orderly stop, once."""
        if not self.stopped:
            self.stopped = True
            await self.runtime.stop("test")

    async def bus_up(self, times: int = 1) -> None:
        """Until the bus was connected and subscribed so many times."""
        await until(lambda: self.runtime.metrics.value("bus_connects_total") >= times and self.runtime.bus is not None and self.runtime.bus.up, what=f"bus connection {times}")

    async def ask(self, path: str, method: str = "GET", *, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and decoded answer of the local API."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body)
        async with aiohttp.ClientSession() as session, session.request(method, f"http://127.0.0.1:{self.runtime.api_port}{path}", data=data, headers=headers) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if answer.content_type == "application/json" else text

    async def get(self, path: str) -> Any:
        """The answer of a GET that must succeed."""
        status, answer = await self.ask(path)
        assert status == 200, answer
        return answer

    async def metric(self, name: str) -> float:
        """One series of /metrics, written as there without the prefix; 0 where it is not shown."""
        for line in (await self.get("/metrics")).splitlines():
            series, _, value = line.rpartition(" ")
            if series == f"novacron_edge_{name}":
                return float(value)
        return 0.0

    async def records(self, stream: str, kind: str = "") -> list[dict[str, Any]]:
        """Bodies of the newest durable records of a stream, oldest first."""
        await self.runtime.journal.flush()
        return [record["body"] for record in reversed(await self.get(f"/api/v1/journal/{stream}?limit=1000")) if kind in ("", record["kind"])]

    def desire(self, generation: int, **spec: Any) -> None:
        """Desired state as the uplink hands it over; `expires_ms` is the document's."""
        self.runtime.desired_state.receive(self.document(generation, **spec))

    def document(self, generation: int, **spec: Any) -> Desired:
        """A parsed desired state of this edge."""
        expires_ms = spec.pop("expires_ms", 0)
        return parse_desired({"v": 1, "edge": self.config.edge_id, "generation": generation, "expires_ms": expires_ms, "spec": spec}, self.config.edge_id)

    def now_ms(self) -> int:
        """The edge's wall time."""
        return self.runtime.clock.stamp().wall_ms


class Edges:
    """Makes edges and stops what is left of them."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._made: list[Edge] = []

    async def start(
        self, *, port: int = 0, rules: tuple[dict[str, Any], ...] = (EACH,), data_dir: Path | None = None, api: ApiConfig | None = None, devices: DevicesConfig | None = None, decisions: DecisionsConfig | None = None,
        uplink: UplinkConfig | None = None, wait: bool = True, updates: UpdatesConfig | None = None, bus: BusConfig | None = None,
    ) -> Edge:
        """An edge without host sampling and, unless `uplink` says otherwise, hub; with `port` its bus is awaited (unless not `wait`)."""
        config = EdgeConfig(
            edge_id="gw-1", node="gw-1", site="hall-2", data_dir=str(data_dir or self._data_dir), uplink=uplink or UplinkConfig(enabled=False, password="hunter2"),
            bus=bus or BusConfig(url=f"mqtt://127.0.0.1:{port}" if port else ""), journal=JournalConfig(ballast_bytes=0, min_free_bytes=0),
            devices=replace(devices or DevicesConfig(), host=HostConfig(enabled=False)), decisions=decisions or DecisionsConfig(rules=rules), api=api or ApiConfig(port=0), updates=updates or UpdatesConfig(),
        )
        edge = Edge(config)
        self._made.append(edge)
        await edge.start()
        if port and wait:
            await edge.bus_up()
        return edge

    async def stop_all(self) -> None:
        """Stop every edge that a test left running."""
        for edge in self._made:
            await edge.stop()
