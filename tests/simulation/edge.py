"""One simulated machine with the shipped edge agent on it, its local broker and its devices."""

import asyncio
import json
import math
import random
import sqlite3
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from edge_runtime.clock import SystemClock
from edge_runtime.config.schema import ApiConfig, BusConfig, DecisionsConfig, DevicesConfig, EdgeConfig, HostConfig, JournalConfig, UplinkConfig
from edge_runtime.contract import topics
from edge_runtime.decisions.engine import Decision, DecisionEngine, Predictor
from edge_runtime.decisions.rules import RuleSet
from edge_runtime.mqtt_session import Endpoint
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.surroundings import Surroundings
from edge_runtime.system.service import ServiceManager

from .broker import LocalClient, SimBroker
from .disk import SimDisk
from .loop import Life, SimWorker
from .network import Path
from .rules import rules_of
from .session import SimSession

if TYPE_CHECKING:
    from .world import World

TRUE_EPOCH_S = 1_796_083_200.0
"""Wall time at the start of a run: 2026-12-01 00:00 UTC."""

RESTART_S = 5.0
"""systemd starts a failed agent again after so long (RestartSec)."""

JOURNAL_BYTES = 2 << 20
BALLAST_BYTES = 64 << 10
MIN_FREE_BYTES = 256 << 10
"""Sizes for an edge that sees a few thousand records: small enough that caps, relief and ballast come into play."""

DISK_BYTES = 64 << 20


class Device:
    """A device on the local bus: readings with a number each, obeys commands once, reports the twin state it is told."""

    def __init__(self, machine: "Machine", name: str, draw: random.Random) -> None:
        self.machine = machine
        self.name = name
        self._draw = draw
        self._phase = draw.random() * 6.28
        self.sent = 0
        self.commands: dict[str, tuple[Any, ...]] = {}
        self.desired: tuple[int, dict[str, Any]] | None = None
        self._backlog: list[tuple[str, bytes, bool]] = []

    def start(self) -> None:
        """Register, then read for ever."""
        self._publish("register", json.dumps({"kind": "boiler", "name": self.name}), retain=True)
        self._later()

    def attach(self) -> None:
        """Subscribe at the (new) local broker."""
        bus = self.machine.bus
        bus.local.append(LocalClient([topics.device_topic(self.name, "command"), topics.device_topic(self.name, "desired")], self._message))

    def bus_back(self) -> None:
        """The local broker is there again: say who we are and what was kept."""
        self._publish("register", json.dumps({"kind": "boiler", "name": self.name}), retain=True)
        backlog, self._backlog = self._backlog, []
        for topic, payload, retain in backlog:
            self.machine.bus.publish(self.name, topic, payload, retain)

    def _later(self) -> None:
        world = self.machine.world
        period = world.burst_s if world.lively else world.scenario.idle_s
        pause = period * self._draw.uniform(0.5, 1.5)
        until = world.next_lively() - world.loop.time()
        if not world.lively and pause > until > 0:
            pause = until + self._draw.random() * world.burst_s
        world.loop.call_later(pause, self._read, context=world.loop.outside)

    def _read(self) -> None:
        if self.machine.world.devices_stopped:
            return
        self.sent += 1
        now = self.machine.world.loop.time()
        wave = 60 + 30 * math.sin(now / 97 + self._phase) + self._draw.gauss(0, 4)
        self._publish("telemetry", f'{{"temp":{wave:.2f},"n":{self.sent}}}')
        self._later()

    def _publish(self, leaf: str, text: str, retain: bool = False) -> None:
        topic = topics.device_topic(self.name, leaf)
        if self.machine.bus.up:
            self.machine.bus.publish(self.name, topic, text.encode(), retain)
        elif len(self._backlog) < 1000 and leaf != "register":
            self._backlog.append((topic, text.encode(), retain))

    def _message(self, topic: str, payload: bytes) -> None:
        body = json.loads(payload)
        if topic.endswith("/desired"):
            self.desired = (body["version"], body["desired"])
            self._publish("reported", json.dumps(body["desired"]))
            return
        content = (body["name"], json.dumps(body["args"]), body["expires_ms"])
        known = self.commands.get(body["id"])
        self.machine.world.oracle.command(self.machine, self.name, body, known, content)
        if known is None:
            self.commands[body["id"]] = content
            self._publish("result", json.dumps({"id": body["id"], "ok": True}))


class Watched(DecisionEngine):
    """The shipped engine, told to the oracle: what it was asked and what it decided."""

    def __init__(self, rules: RuleSet, models: Mapping[str, Predictor], told: Callable[[str, Any, int, list[Decision]], None]) -> None:
        super().__init__(rules, models)
        self._told = told

    def evaluate(self, device: str, values: Mapping[str, Any], mono_ms: int, at_ms: int | None = None) -> list[Decision]:
        """See `DecisionEngine`."""
        decisions = super().evaluate(device, values, mono_ms, at_ms)
        self._told(device, values, mono_ms, decisions)
        return decisions

    def tick(self, mono_ms: int, only: Callable[[str], bool] | None = None) -> list[Decision]:
        """See `DecisionEngine`."""
        decisions = super().tick(mono_ms, only)
        if decisions:
            self._told("", None, mono_ms, decisions)
        return decisions


class Machine:
    """One machine: power, clock, disk, local broker, the way to the hub, and the agent's process."""

    def __init__(self, world: "World", number: int, edge: str, clone_of: "Machine | None" = None) -> None:
        self.world = world
        self.number = number
        self.edge = edge
        self.name = edge if clone_of is None else f"{edge}~clone"
        loop, scenario = world.loop, world.scenario
        self._draw = world.stream(f"machine {self.name}")
        self.entropy = world.stream(f"entropy {self.name}")
        self.disk = SimDisk(f"{world.serial}-{self.name}", world.stream(f"disk {self.name}"), loop.block, world.happened)
        self.disk.capacity = DISK_BYTES
        self.disk.on_cut = self._cut
        self.path = Path(self.name, loop, world.stream(f"path {self.name}"), delay_s=0.002 + 0.05 * self._draw.random(), jitter_s=0.02 * self._draw.random(), happened=world.happened)
        self.bus_path = Path(f"{self.name} bus", loop, world.stream(f"bus {self.name}"), delay_s=0.0005, jitter_s=0.0005 if scenario.kind != "mirror" else 0.0)
        self.bus = SimBroker(f"{self.name} bus", loop, world.stream(f"bus broker {self.name}"), happened=world.happened)
        self.bus.on_deliver = partial(world.oracle.delivered, self)
        self.devices: list[Device] = []
        if clone_of is None:
            seed = f"device {number if scenario.kind != 'mirror' else 0}"
            self.devices = [Device(self, f"{edge if scenario.kind != 'mirror' else 'm'}-d{index}", world.stream(f"{seed} {index}")) for index in range(scenario.devices)]
            for device in self.devices:
                device.attach()
        self.life: Life | None = None
        self.runtime: EdgeRuntime | None = None
        self.powered = True
        self.power_on_s = loop.time()
        self.wall_offset_s = 0.0
        self.synchronised = True
        self.downtime_s = 10.0
        self.boots = 0
        self._keep_clock = True
        self._sync_later_s = 0.0
        self._crashed = False

    # -- clock ---------------------------------------------------------------------------------------------------------------

    def _wall(self) -> float:
        return TRUE_EPOCH_S + self.world.loop.time() + self.wall_offset_s

    def _mono(self) -> float:
        return self.world.loop.time() - self.power_on_s + 4.0

    def set_right(self) -> None:
        """A time source has been reached."""
        if self.wall_offset_s or not self.synchronised:
            self.world.trace(self.name, "clock set right")
        self.wall_offset_s, self.synchronised = 0.0, True

    def unsynchronised_for(self) -> float:
        """Seconds since the clock was last right."""
        return 0.0 if self.synchronised else self.world.loop.time() - self.power_on_s

    # -- process -------------------------------------------------------------------------------------------------------------

    def _config(self) -> EdgeConfig:
        scenario = self.world.scenario
        return EdgeConfig(
            edge_id=self.edge, region="r", site="s", node=self.edge, data_dir=self.disk.root,
            uplink=UplinkConfig(url="mqtt://hub:1883", protocol="5"), bus=BusConfig(url="mqtt://bus:1883", protocol="5", inflight_max=20),
            journal=JournalConfig(
                max_bytes=JOURNAL_BYTES, telemetry_max_bytes=scenario.telemetry_bytes, retain_receipted_records=scenario.retain, min_free_bytes=MIN_FREE_BYTES,
                ballast_bytes=BALLAST_BYTES, pending_max=2_000,
            ),
            devices=DevicesConfig(host=HostConfig(enabled=False)), decisions=DecisionsConfig(rules=tuple(rules_of(0))), api=ApiConfig(enabled=False),
        )

    def _session(self, endpoint: Endpoint, client_id: str, on_message: Any, **arguments: Any) -> SimSession:
        if endpoint.host == "bus":
            return SimSession(
                self.bus, self.bus_path, endpoint, client_id, on_message, **arguments, on_acknowledged=partial(self.world.oracle.acknowledged, self),
            )
        return SimSession(self.world.broker, self.path, endpoint, client_id, on_message, **arguments, on_attempt=self._attempt)

    def _attempt(self, what: str) -> None:
        self.world.oracle.attempt(self, what)

    def boot(self) -> None:
        """Start the agent."""
        if self.life is not None or not self.powered:
            return
        self.boots += 1
        if self._crashed:
            self.world.happened["boots after a crash"] += 1
        self._crashed = False
        self.life = Life(self.name)
        self.world.trace(self.name, f"agent starts ({self.boots})")
        self.life.run(self._start)

    def _start(self) -> None:
        loop, world = self.world.loop, self.world
        life = self.life
        clock = SystemClock(wall=self._wall, mono=self._mono, synchronised=lambda: self.synchronised)
        around = Surroundings(
            clock=clock, storage=self.disk, entropy=world.oracle.entropy(self), session=self._session,  # type: ignore[arg-type]
            worker=lambda name, _loop: SimWorker(name, loop), engine=lambda rules, models: Watched(rules, models, partial(world.oracle.evaluated, self)),
            pace=world.pace, settle=lambda: None, tidy=lambda: None, wal_bytes=world.scenario.wal_bytes, reserve_block=100,
        )
        try:
            self.runtime = EdgeRuntime(self._config(), ServiceManager({}), around)
        except (OSError, sqlite3.Error) as error:
            self._failed(error)
            return
        world.oracle.booted(self)
        task = loop.create_task(self.runtime.start(), name="start")

        def started(done: "asyncio.Task[None]") -> None:
            if not done.cancelled() and (error := done.exception()) is not None and life is not None and life.alive:
                if isinstance(error, OSError | sqlite3.Error):
                    self._failed(error)
                else:
                    world.oracle.violation(self.name, "start", f"the agent cannot start: {type(error).__name__}: {error}")

        task.add_done_callback(started)

    def _failed(self, error: Exception) -> None:
        """The agent ended at once; systemd starts it again."""
        life = self.life
        if life is None or not life.alive:
            return  # the power went
        self.world.trace(self.name, f"agent cannot start: {error}")
        if self.disk.free_bytes(None) > 1 << 20:  # type: ignore[arg-type]
            self.world.oracle.violation(self.name, "start", f"the agent cannot start on a disk with room: {error}")
        self._end_process()
        self.world.loop.call_later(RESTART_S, self.boot, context=self.world.loop.outside)

    def _end_process(self) -> None:
        if self.life is None:
            return
        self.life.alive = False
        self.world.oracle.ended(self)
        self.life, self.runtime = None, None
        for path in (self.path, self.bus_path):
            for connection in list(path.connections):
                connection.close_by_client("the process ended")
        self.disk.unmount()

    def kill(self, back_s: float) -> None:
        """kill -9; started again."""
        if self.life is not None:
            self.world.trace(self.name, "killed")
            self._crashed = True
            self._end_process()
            self.world.loop.call_later(back_s, self.boot, context=self.world.loop.outside)

    def restart(self, back_s: float) -> None:
        """Stopped in good order; started again."""
        runtime, life = self.runtime, self.life
        if runtime is None or life is None or runtime.journal._loop is None:
            return
        self.world.trace(self.name, "stops in good order")

        def stop() -> None:
            task = self.world.loop.create_task(runtime.stop("restart"))

            def stopped(done: "asyncio.Task[None]") -> None:
                if not done.cancelled() and (error := done.exception()) is not None:
                    self.world.oracle.violation(self.name, "stop", f"stopping failed: {type(error).__name__}: {error}")
                self.world.loop.call_soon(after, context=self.world.loop.outside)

            task.add_done_callback(stopped)

        def after() -> None:
            if self.life is life:
                self._end_process()
                self.world.loop.call_later(back_s, self.boot, context=self.world.loop.outside)

        life.run(stop)

    # -- power ---------------------------------------------------------------------------------------------------------------

    def cut_at(self, write: int, back_s: float, clock_1970: bool = False, sync_later_s: float = 0.0) -> None:
        """The power goes at the `write`-th change of the disk from now; -1: at once."""
        if not self.powered:
            return
        self.downtime_s = back_s
        self._keep_clock, self._sync_later_s = not clock_1970, sync_later_s
        if write < 0 or self.life is None:
            self.world.happened["power lost between changes"] += 1
            self._cut()
        else:
            self.disk.countdown = write

    def _cut(self) -> None:
        # May be called from inside a write: nothing of the process runs after this, the rest follows when the stack is unwound.
        self.powered = False
        if self.life is not None:
            self.life.alive = False
        self.disk.mounted = object()
        self.world.loop.call_soon(self._dark, context=self.world.loop.outside)

    def _dark(self) -> None:
        world = self.world
        world.trace(self.name, "power lost")
        if self.life is not None:
            self._crashed = True
            world.oracle.ended(self)
        self.life, self.runtime = None, None
        for path in (self.path, self.bus_path):
            for connection in list(path.connections):
                connection.vanish()
        self.disk.lose_power(world.scenario.storage_keep)
        if world.scenario.bus_on_host and self.bus.up:
            self.bus.stop()
        world.loop.call_later(self.downtime_s, self.power_on, context=world.loop.outside)

    def power_on(self) -> None:
        """Power is back: local broker, then the agent."""
        loop = self.world.loop
        if self.powered:
            return
        self.powered, self.power_on_s = True, loop.time()
        if not self._keep_clock:
            self.wall_offset_s, self.synchronised = 20.0 - TRUE_EPOCH_S - loop.time(), False
            world = self.world
            world.happened["boots in 1970" if self._sync_later_s >= 0 else "boots in 1970, never set right"] += 1
            if self._sync_later_s >= 0:
                loop.call_later(self._sync_later_s, self.set_right, context=loop.outside)
        self._keep_clock = True
        if not self.bus.up:
            self.bus_start()
        loop.call_later(1.0, self.boot, context=loop.outside)

    def off(self) -> None:
        """Switched off for good (a clone that was found)."""
        self.downtime_s = 1e12
        if self.powered:
            self._cut()

    # -- local broker --------------------------------------------------------------------------------------------------------

    def bus_stop(self, keep: bool) -> None:
        """The local broker ends."""
        if self.bus.up:
            self.world.trace(self.name, "bus down" if keep else "bus down, sessions lost")
            self.bus.stop(keep)

    def bus_start(self) -> None:
        """The local broker is back."""
        if not self.bus.up and self.powered:
            self.world.trace(self.name, "bus up")
            self.bus.start()
            for device in self.devices:
                device.bus_back()

