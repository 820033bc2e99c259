"""The composition root of the edge: makes every part once, wires them, runs them, stops them. The only place that knows all."""

import asyncio
import logging
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .agent_metrics import describe
from .config import EdgeConfig
from .contract.desired import Desired
from .contract.operations import Operation
from .decisions.detectors.bank import KEPT_APART_MS, MAX_DETECTORS
from .decisions.rules import RuleSet
from .desired_state import DesiredState
from .devices.bus import RETRY_BASE_S, RETRY_CAP_S, Bus
from .devices.registry import DeviceRegistry
from .journal import Journal, JournalSettings
from .metrics import Metrics
from .mqtt_session import Endpoint
from .pipeline import Pipeline
from .surroundings import Surroundings
from .system.parts import Parts
from .system.service import ServiceManager
from .uplink.backoff import Backoff
from .uplink.link import Uplink, UplinkSettings

if TYPE_CHECKING:
    from .site_wiring import SharedDuties
    from .updates.duty import UpdateDuty

log = logging.getLogger(__name__)

DETECTORS_KEPT_MAX = 16
"""Detectors written in one such round: about 26 KiB each, so at most 14 KiB/s, and a thousand of them take turns of half an hour."""


class EdgeRuntime:
    """One edge. `start`, then `wait` until a signal or `stop`.

    Args:
        service: who started us.
        surroundings: clock, disk, network, threads; this machine's where left out.

    Attributes are the parts; tests and the local API look at them.
    """

    def __init__(self, config: EdgeConfig, service: ServiceManager | None = None, surroundings: Surroundings | None = None) -> None:
        self.config = config
        self.surroundings = around = surroundings or Surroundings()
        self.metrics = Metrics()
        self.clock = around.clock
        self.service = service or ServiceManager()
        self.journal = Journal(
            self._journal_settings(), self.clock, self.clock.raise_floor, storage=around.storage, worker=around.worker, entropy=around.entropy, pace=around.pace
        )
        devices = config.devices
        self.registry = DeviceRegistry(
            max_devices=devices.registry_max, auto_register=devices.auto_register, early_max_devices=devices.early_max_devices,
            early_max_readings=devices.early_max_readings, early_ttl_ms=int(devices.early_ttl_s * 1000),
        )
        self.engine = around.engine(RuleSet(()), {})
        self.bus: Bus | None = None
        self.uplink: Uplink | None = None
        self.pipeline = Pipeline(
            config.edge_id, self.journal, self.clock, self.metrics, self.registry, self.engine, offline=self.is_offline,
            publish=self._publish if config.bus.enabled and config.bus.url else None,
        )
        self.desired_state = DesiredState(self)
        self.pipeline.command_source = self.desired_state.command_moved
        self._offline_since_ms: int | None = self.clock.mono_ms()
        self._decided_offline_before = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.parts = Parts()
        self._told: tuple[int, str] = (0, "")
        self._stopping = asyncio.Event()
        self._api: Any = None
        self._workloads: Any = None
        self.updates: UpdateDuty | None = None
        self.api_port = 0
        self.site: SharedDuties | None = None
        if config.duties.enabled:
            from . import site_wiring

            self.pipeline.duties = self.site = site_wiring.SharedDuties(self)
        describe(self)

    def _journal_settings(self) -> JournalSettings:
        journal = self.config.journal
        return JournalSettings(
            Path(self.config.data_dir) / "journal", commit_interval_s=journal.commit_interval_s,
            telemetry_commit_interval_s=journal.telemetry_commit_interval_s, max_bytes=journal.max_bytes,
            telemetry_max_bytes=journal.telemetry_max_bytes, retain_receipted_records=journal.retain_receipted_records,
            min_free_bytes=journal.min_free_bytes, ballast_bytes=journal.ballast_bytes, target_hours=journal.target_hours,
            pending_max=journal.pending_max, wal_bytes=self.surroundings.wal_bytes, reserve_block=self.surroundings.reserve_block,
        )

    # -- life ----------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring everything up from local state alone; the network is not waited for. Ready is who senses and decides; the interface comes after."""
        self.journal.start()
        recovered = [
            {"database": item.database, "damage": item.damage[:300], "salvaged": item.salvaged, "lost": item.lost} for item in self.journal.recoveries
        ]
        self.journal.append("event", "boot", {
            "agent": __version__, "boot_n": self.journal.boot_n, "clean": self.journal.clean, "recovered": recovered,
        })
        if self.surroundings.told:
            from .provisioned import provisioned

            for body in provisioned(Path(self.surroundings.told)):
                self.journal.append("event", "provisioned", dict(body))
        for key in self.journal.state_keys("twin/"):
            state = self.journal.state(key)
            if isinstance(state, dict):
                self.registry.restore(key.removeprefix("twin/"), state)
        self.desired_state.begin()
        engine_state = self.journal.state("engine")
        if isinstance(engine_state, dict):
            self.engine.import_state(engine_state, self.clock.mono_ms())
        self._restore_detectors()
        if self.config.bus.enabled and self.config.bus.url:
            self._start_bus()
            if self.site is not None:
                self._tasks.append(self.parts.start(self.site.run(), name="site"))
        if self.config.uplink.enabled:
            self._start_uplink()
        kept = engine_state.get("decisions") if isinstance(engine_state, dict) else 0
        latched = kept if isinstance(kept, int) else 0
        self.journal.hold("decision", latched)
        await self.pipeline.replay(latched)
        for task in (self._tick_forever, self._keep_engine_state, self._watch):
            self._tasks.append(self.parts.start(task(), name=task.__name__))
        if self.config.devices.host.enabled:
            self._tasks.append(self.parts.start(self._sample_host(), name="host"))
        if self.config.workloads.enabled:
            self._tasks.append(self.parts.start(self.workload_node().run(), name="workloads"))
        if self.config.updates.enabled:
            from .updates.duty import UpdateDuty

            requests = Path(self.config.data_dir) / "updates"
            updates = self.config.updates
            self.updates = UpdateDuty(requests, Path(updates.status_file), self.journal, self._unproven, lambda: not self.is_offline(), updates.ca_file)
            self._tasks.append(self.parts.start(self.updates.run(), name="updates"))
            self.take_update(self.desired.update if self.desired else None)
        await asyncio.sleep(0)  # each duty begins: the first look at this host is decided on before the interface is loaded, which takes as long as all the rest
        self.service.ready(self._status_line())
        if self.config.api.enabled:
            self._api, self.api_port = await self._serve()
        self.surroundings.settle()
        self.service.settled()
        self.journal.grow()

    async def _serve(self) -> tuple[Any, int]:
        """The interface. Its modules are loaded beside the loop: on a slow machine that takes longer than the watchdog waits for a sign of life, and the agent decides meanwhile."""
        from concurrent.futures import ThreadPoolExecutor

        from .local_api import aiohttp_server, server

        with ThreadPoolExecutor(1) as loader:
            await asyncio.get_running_loop().run_in_executor(loader, aiohttp_server.import_web)
        return await server.serve(self)

    async def wait(self) -> None:
        """Until SIGTERM, SIGINT or `stop_soon`; then stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        await self._stopping.wait()
        await self.stop()

    def stop_soon(self) -> None:
        """Let `wait` return."""
        self._stopping.set()

    async def stop(self, reason: str = "shutdown") -> None:
        """Orderly: stop taking in, journal what there is, say goodbye, close."""
        self.service.notify(STOPPING="1")
        self.parts.ending = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._api is not None:
            await self._api.cleanup()
        if self.bus is not None:
            if self.site is not None:
                await self.site.leave()
            await self.bus.stop()
        self.journal.put_state("engine", self._engine_state())
        self._keep_detectors(MAX_DETECTORS, 0)
        self.journal.append("event", "shutdown", {"reason": reason})
        try:
            await asyncio.wait_for(self.journal.flush(), 10)
        except TimeoutError:
            log.error("the journal could not be written before the stop: %s", self.journal.errors)
        if self.uplink is not None:
            await self.uplink.stop(reason)
        await self.journal.close()

    # -- parts ---------------------------------------------------------------------------------------------------------------

    def _start_bus(self) -> None:
        bus = self.config.bus
        backoff = Backoff(RETRY_BASE_S, RETRY_CAP_S, stable_s=10, draw=self.surroundings.entropy)

        self.bus = Bus(
            Endpoint.configured(bus), self.config.edge_id, self.pipeline, self.clock, self.metrics, next_pause_s=backoff.next_s, keepalive_s=int(bus.keepalive_s),
            receive_max=bus.inflight_max, session=self.surroundings.session, aside=self.site,
        )

        def moved(up: bool) -> None:
            if self.site is not None:
                self.site.session(up)
            now_s = self.clock.mono_ms() / 1000
            if up:
                backoff.link_up(now_s)
            else:
                backoff.link_down(now_s)

        self.bus.on_session = moved
        self.parts.watch(self.bus.start())

    def _publish(self, device: str, leaf: str, payload: bytes, *, retain: bool = False, expiry_s: int | None = None, on_ack: Callable[[], None] | None = None) -> bool:
        return self.bus is not None and self.bus.publish(device, leaf, payload, retain=retain, expiry_s=expiry_s, on_ack=on_ack)

    def _start_uplink(self) -> None:
        uplink = self.config.uplink
        settings = UplinkSettings(
            Endpoint.configured(uplink), self.config.edge_id, keepalive_s=int(uplink.keepalive_s), backoff_base_s=uplink.backoff_base_s, backoff_cap_s=uplink.backoff_cap_s,
            stable_after_s=uplink.stable_after_s, inflight=uplink.inflight, batch_records=uplink.batch_records, batch_bytes=uplink.batch_bytes,
        )
        self.uplink = Uplink(
            settings, self.journal, self.clock, self.metrics, presence=self._presence, on_desired=self.desired_state.receive,
            on_bad_desired=self.desired_state.refuse, on_link=self._on_link, session=self.surroundings.session, entropy=self.surroundings.entropy,
            pace=self.surroundings.pace, on_question=self._question,
        )
        self.parts.watch(self.uplink.start())

    def _question(self, question: dict[str, Any]) -> None:
        if self.uplink is not None:
            self.workload_node().asked.question(question, self.uplink.answer)

    async def _sample_host(self) -> None:
        from .devices.host import HostSampler

        host = self.config.devices.host
        sampler = HostSampler()
        loop = asyncio.get_running_loop()
        due = loop.time()
        first = True
        while True:
            try:
                # The first look at once: it is decided on before the interface is loaded.
                values = sampler.sample() if first else await sampler.sample_in_turns()
                first = False
                self.pipeline.host_reading(host.device_id, dict(values))
            except Exception:
                self.metrics.inc("host_sample_errors_total")
                log.exception("sampling the host failed")
            due = max(due + host.interval_s, loop.time())
            await asyncio.sleep(due - loop.time())

    def workload_node(self) -> Any:
        """What tells the hub what this node has, answers for workloads and runs them."""
        if self._workloads is None:
            from .workloads.node import WorkloadNode

            self._workloads = WorkloadNode(self.config, self.journal, self.metrics)
            if self.site is not None and self.site.workloads is not None:
                self._workloads.siblings = self.site.workloads
        return self._workloads

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(self.surroundings.pace.tick_s)
            try:
                self.pipeline.tick()
                self._tell_changes()
            except Exception:
                self.metrics.inc("tick_errors_total")
                log.exception("time-driven rules failed")

    def _tell_changes(self) -> None:
        """The presence names devices and health: where they have changed the hub hears of it now, not with the next heartbeat."""
        now = (len(self.registry.devices), "; ".join(self.health()))
        if now != self._told:
            self._told = now
            if self.uplink is not None:
                self.uplink.announce("changed")

    async def _keep_engine_state(self) -> None:
        last = False
        while True:
            await asyncio.sleep(self.surroundings.pace.engine_state_s)
            state = self._engine_state()
            if any(entry[2] or entry[3] >= 0 for entry in state["states"]) or last:
                last = bool(state["states"])
                self.journal.put_state("engine", state, partial(self.journal.hold, "decision", state["decisions"]))
            else:
                self.journal.hold("decision", state["decisions"])  # no latch is set: there is nothing to find again in older decisions
            self._keep_detectors(DETECTORS_KEPT_MAX, KEPT_APART_MS)

    def _keep_detectors(self, limit: int, apart_ms: int) -> None:
        """Write down what detectors learned, each in a state document of its own; forget those that no rule asks about."""
        for device, metric in self.engine.detectors.take_gone():
            self.journal.put_state(f"detector/{device}/{metric}", None)
        for device, metric, state in self.engine.detectors.take_changed(self.clock.mono_ms(), limit, apart_ms):
            self.journal.put_state(f"detector/{device}/{metric}", state)

    def _restore_detectors(self) -> None:
        """Every detector goes on from what it knew; one whose state is damaged or unknown starts anew, and this is told."""
        keys = self.journal.state_keys("detector/")
        if not keys:
            return
        from .decisions.detectors import DetectorStateError

        for key in keys:
            device, _, metric = key.removeprefix("detector/").partition("/")
            if not self.engine.asks_detector(device, metric):
                self.journal.put_state(key, None)
                continue
            try:
                self.engine.detectors.restore(device, metric, self.journal.state(key), self.clock.mono_ms())
            except DetectorStateError as error:
                self.metrics.inc("detectors_refused_total")
                log.error("the detector of %s %s starts anew: %s", device, metric, error)
                self.journal.append("event", "detector", {"device": device, "metric": metric, "outcome": "refused", "reason": str(error)[:500]})
                self.journal.put_state(key, None)

    def _engine_state(self) -> dict[str, Any]:
        return {**self.engine.export_state(self.clock.mono_ms()), "decisions": self.journal.durable("decision")}

    async def _watch(self) -> None:
        """Signs of life to systemd, only while the agent is healthy enough to decide; memory return; storage alarms."""
        alarmed = False
        loop = asyncio.get_running_loop()
        tidy_at = loop.time() + self.surroundings.pace.tidy_s
        while True:
            watch_s = self.surroundings.pace.watch_s
            await asyncio.sleep(min(watch_s, self.service.watchdog_s / 3) if self.service.watchdog_s else watch_s)
            if self.service.watchdog_s and not self.parts.ended:  # else systemd starts us anew
                self.service.notify(WATCHDOG="1", STATUS=self._status_line())
            if loop.time() >= tidy_at:
                tidy_at = loop.time() + self.surroundings.pace.tidy_s
                self.surroundings.tidy()
            plan = self.journal.storage_plan
            if plan.alarm and not alarmed:
                self.journal.append("event", "storage", {
                    "alarm": True, "outage_hours": round(plan.outage_hours, 1), "target_hours": plan.target_hours, "free_bytes": plan.free_bytes,
                })
            alarmed = plan.alarm

    @property
    def desired(self) -> Desired | None:
        """The hub's desired state in force."""
        return self.desired_state.applied

    # -- the link ------------------------------------------------------------------------------------------------------------

    def is_offline(self) -> bool:
        """No hub is reachable."""
        return self._offline_since_ms is not None

    def _on_link(self, up: bool, detail: str) -> None:
        now = self.clock.mono_ms()
        if up:
            outage = now - self._offline_since_ms if self._offline_since_ms is not None else 0
            decided = self.pipeline.decided_offline - self._decided_offline_before
            self._offline_since_ms = None
            self.metrics.inc("offline_seconds_total", outage / 1000)
            self.journal.append("event", "link.up", {"hub": detail, "outage_ms": outage, "decided_offline": decided})
        else:
            self._offline_since_ms = now
            self._decided_offline_before = self.pipeline.decided_offline
            self.metrics.inc("offline_total")
            self.journal.append("event", "link.down", {"reason": detail[:300]})

    def _presence(self) -> dict[str, Any]:
        config = self.config
        devices = sorted(self.registry.devices)
        shared: dict[str, Any] = {}
        if self.site is not None:
            serves = self.site.serves()
            devices = [name for name in devices if name in serves or name == config.devices.host.device_id]
            shared["serves"] = dict(list(serves.items())[:256])
        return {
            **shared,
            "generation": self.desired.generation if self.desired else 0, "desired_ms": self.desired.issued_ms if self.desired else 0,
            "agent": __version__, "region": config.region, "site": config.site,
            "node": config.node, "labels": dict(config.labels), "devices": devices[:256],
            "outage_hours": round(self.journal.storage_plan.outage_hours, 1), "health": "; ".join(self.health()) or "ok",
        }

    # -- health --------------------------------------------------------------------------------------------------------------

    def health(self) -> list[str]:
        """What is wrong, in words; empty when all is well. A missing hub is not illness: working alone is the job."""
        problems = self.fatal()
        if not self.journal.telemetry_open:
            problems.append("the disk is nearly full: telemetry is refused, decisions go on")
        if self.journal.storage_plan.alarm:
            problems.append(
                f"free space holds {self.journal.storage_plan.outage_hours:.0f} h of outage, under the target of {self.journal.storage_plan.target_hours:.0f} h"
            )
        if self.bus is not None and not self.bus.up:
            problems.append(f"the local bus is away: {self.bus.last_error or 'connecting'}")
        if self.site is not None:
            problems += self.site.problems()
        if self.uplink is not None and self.uplink.lanes.quarantine:
            problems.append(f"the hub refuses this identity: {self.uplink.lanes.quarantine}")
        if self.uplink is not None and self.uplink.unheard:
            problems.append(self.uplink.unheard)
        if self.desired_state.last_error is not None:
            problems.append(f"desired state {self.desired_state.last_error['generation']} was refused: {self.desired_state.last_error['field']}: {self.desired_state.last_error['problem']}")
        return problems

    def fatal(self) -> list[str]:
        """What makes /healthz unhealthy: the agent can no longer do its job by itself."""
        return [*self.parts.problems(), *(f"{name} cannot be written: {error}" for name, error in self.journal.errors.items())]

    def ready(self) -> list[str]:
        """What is still missing before the agent senses and decides; empty when ready."""
        missing = []
        if self.bus is not None and not self.bus.up:
            missing.append(f"the local bus is away: {self.bus.last_error or 'connecting'}")
        return missing

    def take_update(self, order: dict[str, Any] | None) -> None:
        """The hub wants an update of the image. One that is ordered while another is under way is taken when that has ended."""
        if order is None:
            return
        if self.updates is not None:
            self.updates.want(order)
        elif not self.config.updates.enabled and self.journal.state("update_unable") != order["id"]:
            self.journal.put_state("update_unable", order["id"])
            self.journal.append("event", "operation", Operation(order["id"], "update", "failed", 0, "refused", "updates: this edge does not run from an image that can be updated").to_json())

    def _unproven(self, linked: bool) -> list[str]:
        """What a new image must still show before it is kept: it senses, its journal can be written, and it has its hub again where the old one had it (`linked`)."""
        missing = self.ready() + self.fatal()
        if self.config.devices.host.enabled and not self.pipeline.readings_taken:
            missing.append("no reading has been taken")
        if linked and self.is_offline():
            missing.append("the hub, which was there before the update, has not been reached")
        return missing

    def _status_line(self) -> str:
        link = "hub up" if not self.is_offline() else "alone"
        return f"{link}, {self.pipeline.decided} decisions, {len(self.registry.devices)} devices, {'; '.join(self.health()) or 'well'}"
