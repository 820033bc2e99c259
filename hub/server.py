"""The composition root of the hub: broker, link, store, ingest, fleet, API."""

import asyncio
import contextlib
import logging
import os
import random
import secrets
import shutil
import ssl
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from edge_runtime.contract import jsoncodec
from edge_runtime.system.parts import Parts

from .api.visitors import IDLE_S, Visitors
from .broker import open_broker
from .broker.base import Broker, BrokerError, Door, authority, is_loopback
from .broker.mosquitto import MosquittoBroker
from .fleet import SILENT_AFTER_MS, Change, Fleet, next_desired
from .ingest import Ingest, Pace
from .link import HubLink
from .questions import Questions
from .retention import Retention, RetentionSettings
from .store.base import EdgeRow, Store, StoredRecord
from .store.sqlite import SqliteStore
from .store.workloads import LIVE_STATES
from .tls import load, served
from .transfers.service import Transfers
from .workloads.service import Workloads

log = logging.getLogger(__name__)

METRIC_PREFIX = "novacron_hub_"

STORE = "hub.db"

LOW_BYTES = 1 << 30
"""Free bytes of the hub's disk below which it is told: hours, with a hundred busy edges, until nothing can be stored."""

RETELL_FIRST_MS = 20_000
RETELL_CAP_MS = 3_600_000
"""An edge that still reports an older generation is told again after this long, doubled each time: the message may have been lost, but an
edge that refuses it would refuse it again, and it may be large."""


@dataclass(frozen=True, slots=True)
class HubSettings:
    """How a hub runs.

    Attributes:
        broker: auto, embedded, mosquitto or a URL; with `broker_host` and `broker_port` where ours listens (0: a free port).
        door: who comes in to ours, and its certificate, which API and page have too.
        broker_ca_file: authorities by which an external one is trusted (PEM); empty: the system's.
        host, port: where API and page listen (0: a free port).
        token: the API's token; empty: made at the first start and kept in data_dir/token.
        retention: how long records are kept.
        rebalance_minutes: between two looks whether to rebalance workloads; 0: only when asked.
    """

    data_dir: Path
    name: str = "hub"
    broker: str = "auto"
    broker_host: str = "127.0.0.1"
    broker_port: int = 1883
    door: Door = Door()
    broker_ca_file: str = ""
    host: str = "127.0.0.1"
    port: int = 8460
    token: str = ""
    shared_group: str = ""
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    rebalance_minutes: float = 0


def _wall_ms() -> int:
    return int(time.time() * 1000)


def _steady_ms() -> int:
    return int(time.monotonic() * 1000)


@dataclass(slots=True)
class HubSurroundings:
    """Where one hub runs: this machine by default; the simulator brings its own.

    Attributes:
        now_ms: the hub's wall time, milliseconds since 1970 UTC; it may be wrong, and set.
        steady_ms: milliseconds that pass evenly while this machine is awake, from whenever.
        entropy: chance: the boot's id, jitter.
        executor: makes a thread that does jobs in order; its argument is a name.
        client: makes MQTT clients; the arguments of `aiomqtt.Client`. None takes that.
        store: opens the store.
        pace: how often periodic duties run.
        silent_after_ms: after so long without a sign of life an edge is offline, whatever the broker believes.
    """

    now_ms: Callable[[], int] = _wall_ms
    steady_ms: Callable[[], int] = _steady_ms
    entropy: random.Random = field(default_factory=random.SystemRandom)
    executor: Callable[[str], Executor] = lambda name: ThreadPoolExecutor(1, name)
    client: Callable[..., Any] | None = None
    store: Callable[[Path], Store] = SqliteStore
    pace: Pace = field(default_factory=Pace)
    silent_after_ms: int = SILENT_AFTER_MS


class Hub:
    """One hub. `start`, `stop`; the parts are attributes."""

    def __init__(self, settings: HubSettings, surroundings: HubSurroundings | None = None) -> None:
        self.settings = settings
        self.surroundings = around = surroundings or HubSurroundings()
        self.now_ms = around.now_ms
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self.boot = f"{around.entropy.getrandbits(64):016x}"
        self.store: Store = around.store(settings.data_dir / STORE)
        self.token = settings.token or self._token()
        self.fleet = Fleet(silent_after_ms=around.silent_after_ms)
        self.desired: dict[str, dict[str, Any]] = dict(self.store.all_desired())
        self._told: dict[str, tuple[int, int, int]] = {}
        """What each edge was last told of its desired state: generation, when, and how long it is given to apply it (ms)."""
        self._reader = around.executor("hub-read")
        self._lock = asyncio.Lock()
        self._raising: set[str] = set()
        self.broker: Broker
        self.link: HubLink
        self.ingest = Ingest(
            self.store, self.fleet, settings.name, self.boot, publish=self._publish, now_ms=self.now_ms, on_presence=self._presence,
            writer=around.executor("hub-store"), pace=around.pace, on_records=self._stored,
        )
        self.questions = Questions(settings.name, self._publish, self.ingest.refused, self.now_ms, lambda edge: self.fleet.rows[edge].state == "offline")
        self._thinker = around.executor("hub-think")
        self.transfers = Transfers(self.store, write=self.ingest.write, now_ms=self.now_ms)
        self.workloads = Workloads(
            self.store, self.fleet, write=self.ingest.write, read=self.read, tell=self.change_desired, desired=self.desired, now_ms=self.now_ms, steady_ms=around.steady_ms,
            think=self.think, rebalance_s=settings.rebalance_minutes * 60, transfers=self.transfers,
        )
        self.workloads.load()
        for outage in self.store.read_outages(0, 100_000):
            if outage["end_ms"] is None:
                self.fleet.open_outages[outage["edge"]] = outage["start_ms"]
        self.retention = Retention(self.ingest, settings.retention, read=self.read, steady_ms=around.steady_ms)
        self.parts = Parts()
        self._pruning: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None
        self.visitors: Visitors | None = None
        """Who is connected to the API; None before `start`."""
        self._shown: ssl.SSLContext | None = None
        self.port = 0

    def _token(self) -> str:
        path = self.settings.data_dir / "token"
        kept = path.read_text().strip() if path.exists() else ""
        if kept:
            return kept
        # None yet, or left empty by a first start that was cut short: an empty token would let everybody in.
        path.unlink(missing_ok=True)
        token = secrets.token_hex(24)  # no sign among it that a command line would take for an option
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as handle:
            handle.write(token + "\n")
        return token

    async def start(self) -> None:
        """Bring everything up; raises `BrokerError` or OSError."""
        from .api.handlers import HubApi

        settings = self.settings
        door = settings.door
        self._shown = served(door.cert_file, door.key_file) if door.cert_file or door.key_file else None
        if self._shown is None and not is_loopback(settings.host):
            log.warning("the API listens on %s without TLS: give the hub a certificate (tls-cert), or put a TLS proxy in front of it", settings.host)
        self.broker = await open_broker(settings.broker, settings.data_dir / "broker", settings.broker_host, settings.broker_port, door, settings.broker_ca_file)
        self.serve(self.broker)
        self._runner = web.AppRunner(HubApi(self).application(), access_log=None, keepalive_timeout=IDLE_S)
        await self._runner.setup()
        assert self._runner.server is not None
        self.visitors = Visitors(self._runner.server, self._shown)
        self.port = await self.visitors.listen(settings.host, settings.port)
        log.info("hub on %s, broker %s on %s", self.url, self.broker.kind, authority(self.broker.host, self.broker.port))

    @property
    def url(self) -> str:
        """Where API and page are."""
        return f"{'http' if self._shown is None else 'https'}://{authority(self.settings.host, self.port)}"

    async def reload(self) -> None:
        """Take certificates and passwords anew from their files; what is wrong is told in the log, and all is as it was."""
        door = self.settings.door
        try:
            if self._shown is not None:
                load(self._shown, door.cert_file, door.key_file)
            if isinstance(self.broker, MosquittoBroker):
                await self.broker.reload()
        except (OSError, BrokerError) as error:
            log.error("not taken anew: %s", error)
        else:
            log.info("certificates and passwords have been taken anew")

    def serve(self, broker: Broker) -> None:
        """Take records in from `broker` and answer; without API and page. Call inside the running loop."""
        self.broker = broker
        self.link = HubLink(
            broker, self.settings.name, self.boot, on_message=self._message, on_up=self._link_up, on_bad=self.ingest.refused, now_ms=self.now_ms,
            shared_group=self.settings.shared_group, client=self.surroundings.client, entropy=self.surroundings.entropy,
        )
        self._pruning = asyncio.get_running_loop().create_task(self.retention.run(), name="retention")
        for task in (*self.ingest.start(), self.link.start(), *self.workloads.start(), self._pruning):
            self.parts.watch(task)

    async def stop(self) -> None:
        """Say goodbye, commit nothing new, close."""
        self.parts.ending = True
        await self.transfers.stop()
        if self.visitors is not None:
            self.visitors.close()
        if self._runner is not None:
            await self._runner.cleanup()
        if hasattr(self, "link"):
            await self.link.stop()
        if self._pruning is not None:
            self._pruning.cancel()
            await asyncio.gather(self._pruning, return_exceptions=True)
        await self.workloads.stop()
        await self.ingest.stop()
        if hasattr(self, "broker"):
            await self.broker.close()
        self._reader.shutdown()
        self._thinker.shutdown()
        self.store.close()

    async def read(self, job: Callable[[], Any]) -> Any:
        """Run a store read on the reader thread."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, job)

    async def think(self, job: Callable[[], Any]) -> Any:
        """Run a long thought on a thread of its own, one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._thinker, job)

    def _stored(self, stored: list[StoredRecord]) -> None:
        self.workloads.records(stored)

    # -- desired state -------------------------------------------------------------------------------------------------------

    async def change_desired(self, edge: str, change: dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Change parts of an edge's desired state: checked, kept, then published; raises `ContractError`.

        `change` may be a function of the present `spec`: between its look and the change nobody else changes anything. Where it gives nothing, nothing is changed.
        """
        async with self._lock:
            if callable(change):
                current = self.desired.get(edge) or {}
                change = change(current.get("spec", {}))
                if not change and current:
                    return current
            row = self.fleet.rows.get(edge)
            document = next_desired(edge, self.desired.get(edge), change, self.now_ms(), row.generation if row else 0)
            now = self.now_ms()
            await self.ingest.write(lambda: self.store.put_desired(edge, document, now))
            self.desired[edge] = document
            self._publish_desired(edge)
            return document

    def _message(self, edge: str, leaf: str, payload: bytes, retained: bool) -> None:
        if leaf == "answer":
            self.questions.answered(edge, payload)
        else:
            self.ingest.message(edge, leaf, payload, retained)

    def _publish(self, edge: str, leaf: str, payload: bytes, retain: bool) -> None:
        if hasattr(self, "link"):
            self.link.publish(edge, leaf, payload, retain)

    def _publish_desired(self, edge: str) -> None:
        document = self.desired.get(edge)
        if document is not None:
            generation, _, patience = self._told.get(edge, (0, 0, 0))
            self._told[edge] = document["generation"], self.now_ms(), min(RETELL_CAP_MS, patience * 2) if generation == document["generation"] else RETELL_FIRST_MS
            self._publish(edge, "desired", jsoncodec.encode(document).encode(), True)

    def _overdue(self, edge: str) -> bool:
        """The edge has had long enough to apply what it was told last."""
        _, at, patience = self._told.get(edge, (0, 0, 0))
        return not 0 <= self.now_ms() - at < patience

    @staticmethod
    def _another(row: EdgeRow, document: dict[str, Any]) -> bool:
        """The edge has applied another document of the same generation: a restored hub gave the number again before it heard from the edge."""
        applied_ms = row.presence.get("desired_ms", 0)
        return bool(applied_ms > 0 and row.generation == document["generation"] and applied_ms != document["issued_ms"])

    def _presence(self, change: Change) -> None:
        document = self.desired.get(change.row.edge)
        if document is None or change.row.state != "online":
            return
        if change.row.generation < document["generation"]:
            if change.came or self._overdue(change.row.edge):  # the broker may have lost its retained messages, or this one
                self._publish_desired(change.row.edge)
        elif (change.row.generation > document["generation"] or self._another(change.row, document)) and change.row.edge not in self._raising:
            # This hub was restored from a backup: what it wants now goes above what the edge has seen.
            edge = change.row.edge
            self._raising.add(edge)
            task = asyncio.get_running_loop().create_task(self.change_desired(edge, {}))

            def told(done: "asyncio.Task[dict[str, Any]]") -> None:
                self._raising.discard(edge)
                if not done.cancelled() and done.exception() is not None:
                    log.error("desired state of %s could not be raised: %s", edge, done.exception())

            task.add_done_callback(told)

    async def release(self, edge: str) -> None:
        """End a quarantine."""
        self.ingest.changed(Change(self.fleet.release(edge)))
        self.ingest.send_receipts(edge, {"decision", "event", "telemetry"})

    def _link_up(self) -> None:
        for edge in self.desired:
            self._publish_desired(edge)

    # -- health --------------------------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """What is wrong, in words."""
        problems = self.parts.problems()
        if not self.link.up:
            problems.append(f"no connection to the broker: {self.link.last_error or 'connecting'}")
        elif self.link.refusal:
            problems.append(f"the broker refuses what the hub says ({self.link.refusal})")
        if self.link.rival:
            problems.append(f"another hub ({self.link.rival}) speaks to the same edges at this broker: stop one of the two, or give it a broker of its own")
        if self.ingest.store_refusal:
            problems.append(f"nothing is stored ({self.ingest.store_refusal}): the edges keep what they have; see that {self.settings.data_dir} can be written to and has room")
        if self.ingest.queue_fill > 0.9:
            problems.append("the ingest queue is nearly full")
        return problems

    def storage(self) -> dict[str, Any]:
        """Bytes that the store has, and that are free beside it; `warning` where these are few."""
        folder, held = self.settings.data_dir, 0
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            return {"bytes": 0, "free_bytes": 0, "warning": f"{folder}: {error.strerror}"}
        for name in (STORE, f"{STORE}-wal"):
            with contextlib.suppress(OSError):
                held += (folder / name).stat().st_size
        few = f"{folder} has {free >> 20} MiB free: where it is full nothing is stored, and the edges keep what they have" if free < LOW_BYTES else ""
        return {"bytes": held, "free_bytes": free, "warning": few}

    def render_metrics(self) -> str:
        """Prometheus text; names follow its conventions, no per-edge labels."""
        rows, storage = self.fleet.rows.values(), self.storage()
        gauges = {
            "edges": (len(self.fleet.rows), "Edges ever seen."), "edges_online": (sum(row.state == "online" for row in rows), "Edges online."),
            "edges_quarantined": (sum(bool(row.quarantine) for row in rows), "Edges in quarantine."),
            "ingest_queue_ratio": (self.ingest.queue_fill, "Share of the ingest queue in use."), "link_up": (int(self.link.up), "1 while the broker is connected."),
            "store_bytes": (storage["bytes"], "Size of the store's files."), "disk_free_bytes": (storage["free_bytes"], "Free space beside the store."),
            "store_refuses": (int(bool(self.ingest.store_refusal)), "1 while the store takes no commits."),
            "api_connections": (len(self.visitors) if self.visitors is not None else 0, "Connections to the API now."),
            "broker_restarts": (self.broker.restarts, "Restarts of the supervised broker."),
        }
        lines = []
        for name, (value, text) in gauges.items():
            lines += [f"# HELP {METRIC_PREFIX}{name} {text}", f"# TYPE {METRIC_PREFIX}{name} gauge", f"{METRIC_PREFIX}{name} {value:.10g}"]
        usage = Counter(row.state for row in self.workloads.rows.values())
        for state in LIVE_STATES:
            lines += [f"# HELP {METRIC_PREFIX}workloads_{state} Workloads that are {state}.", f"# TYPE {METRIC_PREFIX}workloads_{state} gauge", f"{METRIC_PREFIX}workloads_{state} {usage[state]}"]
        seen = set()
        for key, count in sorted([*self.ingest.counters.items(), *((f"workloads_{key}", count) for key, count in self.workloads.counters.items())]):
            name, _, reason = key.partition(":")
            if name not in seen:
                seen.add(name)
                lines += [f"# HELP {METRIC_PREFIX}{name} {name.removesuffix('_total').replace('_', ' ')}.", f"# TYPE {METRIC_PREFIX}{name} counter"]
            lines.append(f'{METRIC_PREFIX}{name}{{reason="{reason}"}} {count}' if reason else f"{METRIC_PREFIX}{name} {count}")
        return "\n".join(lines) + "\n"


__all__ = ["BrokerError", "Hub", "HubSettings"]
