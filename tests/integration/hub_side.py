"""What the tests of the hub share: a broker of the test's own, an edge made of the real journal and uplink, a hub, and the proof by content."""

import asyncio
import contextlib
import http.client
import json
import sqlite3
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import aiomqtt
import jsonschema
import pytest

from edge_runtime.clock import SystemClock
from edge_runtime.contract.desired import Desired
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.streams import STREAMS
from edge_runtime.journal import Journal, JournalSettings
from edge_runtime.metrics import Metrics
from edge_runtime.mqtt_session import Endpoint
from edge_runtime.uplink.link import Uplink, UplinkSettings
from hub.api.openapi import document
from hub.broker.base import authority
from hub.broker.mosquitto import find_mosquitto, free_port
from hub.link import SOCKET_OPTIONS
from hub.server import Hub, HubSettings
from tools.novactl.client import Api
from tools.novactl.verify import verify_edge

from .waiting import until

EDGE = "gw-1"
T = TypeVar("T")

needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed (apt install mosquitto)")


class Mosquitto:
    """A broker that belongs to the test: it can be killed and comes back on the same port, having forgotten everything."""

    def __init__(self, folder: Path, *, tcp_nodelay: bool = True) -> None:
        self._folder = folder
        self._tcp_nodelay = tcp_nodelay
        self._process: asyncio.subprocess.Process | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for _ in range(5):
            port = self.port or free_port("127.0.0.1")
            configuration = self._folder / "mosquitto.conf"
            configuration.write_text(
                f"listener {port} 127.0.0.1\nset_tcp_nodelay {str(self._tcp_nodelay).lower()}\nallow_anonymous true\npersistence false\nmax_queued_messages 100000\n"
                "log_dest none\nuser root\n"
            )
            program = find_mosquitto()
            assert program is not None
            self._process = await asyncio.create_subprocess_exec(program, "-c", str(configuration), stdin=asyncio.subprocess.DEVNULL)
            while self._process.returncode is None:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.01)
                    continue
                writer.close()
                self.port = port
                return
        raise AssertionError("mosquitto does not start")

    async def kill(self) -> None:
        """SIGKILL: sessions and retained messages are gone."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def client(self, name: str, protocol: aiomqtt.ProtocolVersion = aiomqtt.ProtocolVersion.V311) -> aiomqtt.Client:
        """A raw client, to say what no edge would say."""
        return raw_client(self.port, name, protocol)


def raw_client(port: int, name: str, protocol: aiomqtt.ProtocolVersion = aiomqtt.ProtocolVersion.V311) -> aiomqtt.Client:
    """An MQTT client of the test's own."""
    return aiomqtt.Client("127.0.0.1", port, identifier=name, protocol=protocol, socket_options=SOCKET_OPTIONS, max_queued_outgoing_messages=0)


class LinkedEdge:
    """An edge without bus and rules: the real journal and the real uplink, wired as `edge_runtime.runtime` wires them."""

    def __init__(self, folder: Path, port: int, name: str = EDGE, *, retain: int = 10_000, keepalive_s: int = 5, protocol: str = "auto", host: str = "127.0.0.1", user: str = "") -> None:
        self.folder, self.name = folder, name
        self.metrics = Metrics()
        self.clock = SystemClock()
        self.journal = Journal(
            JournalSettings(folder / "journal", telemetry_commit_interval_s=0.05, retain_receipted_records=retain, min_free_bytes=0, ballast_bytes=0), self.clock, self.clock.raise_floor
        )
        endpoint = Endpoint.parse(f"mqtt://{authority(host, port)}", protocol=protocol, username=user)
        settings = UplinkSettings(endpoint, name, keepalive_s=keepalive_s, backoff_base_s=0.05, backoff_cap_s=0.3, stable_after_s=1.0)
        self.uplink = Uplink(
            settings, self.journal, self.clock, self.metrics, presence=self._presence, on_desired=self._on_desired, on_bad_desired=self._on_bad_desired,
            on_link=lambda up, detail: self.links.append((up, detail)),
        )
        self.links: list[tuple[bool, str]] = []
        self.desired: Desired | None = None
        self.bad_desired: list[tuple[ContractError, int]] = []
        self._ended = False

    async def start(self) -> "LinkedEdge":
        self.journal.start()
        self.uplink.start()
        return self

    async def stop(self) -> None:
        """Orderly."""
        if not self._ended:
            self._ended = True
            await self.uplink.stop()
            await self.journal.close()

    async def vanish(self) -> None:
        """The power goes: no goodbye on the link (the broker publishes the Last Will); the files are closed so that they can be opened again."""
        if not self._ended:
            self._ended = True
            task = self.uplink._task
            assert task is not None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.journal.close()

    def _presence(self) -> dict[str, Any]:
        return {
            "generation": self.desired.generation if self.desired else 0, "agent": "test", "region": "eu", "site": "plant", "node": self.name, "devices": ["host"],
            "outage_hours": 100.0, "health": "ok",
        }

    def _on_desired(self, desired: Desired) -> None:
        if self.desired is None or desired.generation > self.desired.generation:
            self.desired = desired
            self.journal.append("event", "desired.applied", {"generation": desired.generation})
            self.uplink.announce("desired")

    def _on_bad_desired(self, error: ContractError, generation: int) -> None:
        self.bad_desired.append((error, generation))

    async def append(self, count: int, streams: tuple[str, ...] = tuple(STREAMS)) -> None:
        """`count` records on each stream, durable when this returns."""
        for number in range(count):
            for stream in streams:
                device = f"d-{number % 7}"
                if stream == "telemetry":
                    self.journal.append(stream, "reading", {"device": device, "values": {"temp": number / 3, "text": "\u00e9 \U0001f600"}})
                elif stream == "event":
                    self.journal.append(stream, "alert", {"rule": "hot", "device": device, "severity": "info", "text": f"n {number}", "decision": number})
                else:
                    self.journal.append(stream, "decision", {
                        "rule": "hot", "device": device, "outcome": "fired", "inputs": {"temp": number / 3}, "actions": [], "generation": 0, "offline": not self.uplink.up,
                    })
        await self.journal.flush()


@contextlib.asynccontextmanager
async def linked_edge(folder: Path, port: int, name: str = EDGE, **more: Any) -> AsyncIterator[LinkedEdge]:
    """A running edge; ended orderly unless the test ended it."""
    edge = await LinkedEdge(folder, port, name, **more).start()
    try:
        yield edge
    finally:
        await edge.stop()


@contextlib.asynccontextmanager
async def running_hub(folder: Path, broker: str, **more: Any) -> AsyncIterator[Hub]:
    """A hub in this process, on free ports, up when this returns."""
    hub = Hub(replace(HubSettings(folder, broker=broker, broker_port=0, port=0), **more))
    try:
        await hub.start()
        await until(lambda: hub.link.up, what="the hub's link")
        yield hub
    finally:
        await hub.stop()


def api_of(hub: Hub) -> Api:
    return Api(f"http://127.0.0.1:{hub.port}", hub.token)


async def in_thread(job: Any, *arguments: Any) -> Any:
    """A blocking call beside the loop."""
    return await asyncio.get_running_loop().run_in_executor(None, lambda: job(*arguments))


def rows_of_edge(folder: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Every record of a journal on disk, straight from the files: (stream, seq) to its content."""
    found: dict[tuple[str, int], tuple[Any, ...]] = {}
    for name, streams in (("journal", ("decision", "event")), ("telemetry", ("telemetry",))):
        with contextlib.closing(sqlite3.connect(f"file:{folder / 'journal' / f'{name}.db'}?mode=ro", uri=True)) as connection:
            for stream in streams:
                rows = connection.execute(f"SELECT seq, boots.boot, mono, wall, tq, kind, body FROM records_{stream} AS r JOIN boots ON boots.number=r.boot")
                found |= {(stream, row[0]): row[1:] for row in rows}
    return found


def rows_of_hub(folder: Path, edge: str) -> dict[tuple[str, int], list[tuple[Any, ...]]]:
    """Every record of an edge in hub.db: (stream, seq) to all rows that carry it."""
    found: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'hub.db'}?mode=ro", uri=True)) as connection:
        for row in connection.execute("SELECT stream, seq, boot, mono, wall, tq, kind, body FROM records WHERE edge=?", (edge,)):
            found.setdefault((row[0], row[1]), []).append(row[2:])
    return found


def differences(edge_folder: Path, hub_folder: Path, edge: str = EDGE) -> list[str]:
    """What of the edge's journal is not at the hub exactly once with the same content, and what the hub has above it that the edge never wrote."""
    ours, theirs = rows_of_edge(edge_folder), rows_of_hub(hub_folder, edge)
    assert ours, "a comparison of nothing proves nothing"
    found = [f"{key}: {theirs.get(key)} at the hub, {content} at the edge" for key, content in ours.items() if theirs.get(key) != [content]]
    for stream in STREAMS:
        mine = [seq for name, seq in ours if name == stream]
        lowest = min(mine, default=0)
        found += [f"{key}: only at the hub" for key in theirs if key[0] == stream and mine and key[1] >= lowest and key not in ours]
    return found


async def synced(hub: Hub, edge: LinkedEdge, seconds: float = 30.0) -> None:
    """Wait until the hub has everything and the edge knows it."""
    def level() -> bool:
        return edge.uplink.up and all(
            (book := hub.ingest.books.get((edge.name, stream))) is not None and book.contiguous == edge.journal.durable(stream) == edge.journal.marks(stream).receipted
            for stream in STREAMS if edge.journal.durable(stream)
        )

    def standing() -> str:
        return str({stream: (edge.journal.marks(stream), hub.ingest.books.get((edge.name, stream))) for stream in STREAMS})

    try:
        await until(level, seconds, "everything at the hub")
    except AssertionError as error:
        raise AssertionError(f"{error}: up {edge.uplink.up}, {edge.uplink.last_error}, {standing()}"[:4000]) from None


async def proven(hub: Hub, edge: LinkedEdge, seconds: float = 30.0) -> dict[str, Any]:
    """The proof after a scenario: content, chains and counts; returns what `novactl verify` says."""
    await synced(hub, edge, seconds)
    assert differences(edge.folder, hub.settings.data_dir, edge.name) == []
    report: dict[str, Any] = await in_thread(verify_edge, api_of(hub), edge.name, None)
    assert report["exact"], report
    for stream in STREAMS:
        book = hub.ingest.books.get((edge.name, stream))
        if book is not None:
            assert book.chain == edge.journal.marks(stream).chain, f"chain of {stream}"
    return report


class Background:
    """An event loop in a thread, for tests that are synchronous themselves (a browser, a command, a property test)."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="hub of a test", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], seconds: float = 30.0) -> T:
        """Run a coroutine there and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@contextlib.contextmanager
def served_hub(folder: Path, broker: str = "embedded") -> Iterator[tuple[Background, Hub]]:
    """A running hub in a thread."""
    background = Background()
    try:
        async def start() -> Hub:
            hub = Hub(HubSettings(folder, broker=broker, broker_port=0, port=0))
            try:
                await hub.start()
                await until(lambda: hub.link.up, what="the hub's link")
            except BaseException:
                await hub.stop()
                raise
            return hub

        hub = background.run(start())
        try:
            yield background, hub
        finally:
            background.run(hub.stop())
    finally:
        background.close()


class Served:
    """A hub with one edge's records behind it, and plain HTTP to it."""

    def __init__(self, background: Background, hub: Hub) -> None:
        self.background, self.hub = background, hub

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body; with the token unless `headers` are given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.hub.port, timeout=20)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {self.hub.token}"} if headers is None else headers)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, path: str, method: str = "GET", body: Any = None, status: int = 200) -> Any:
        """The decoded answer, whose status must be `status`."""
        got, headers, text = self.ask(method, path, None if body is None else json.dumps(body).encode())
        assert got == status, f"{method} {path}: {got} {text[:300]!r}"
        assert headers["content-type"].startswith("application/json")
        return json.loads(text)


def error_of(text: bytes) -> dict[str, Any]:
    """The body of an error: it must say field, problem and remedy."""
    said: dict[str, Any] = json.loads(text)
    jsonschema.validate(said, document()["components"]["schemas"]["Error"])
    assert said["field"] and said["problem"] and said["remedy"], said
    return said
