"""The world of one run: machines, networks, brokers, devices, faults in their order, and the oracle over all of it."""

import asyncio
import contextlib
import gc
import hashlib
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, TextIO

from edge_runtime.pace import Pace
from hub.ingest import Pace as HubPace

from .broker import SimBroker
from .disk import DISKS
from .edge import JOURNAL_BYTES, Machine
from .faults import inflict
from .hub import HubMachine
from .loop import SimLoop
from .oracle import Oracle
from .scenario import CROWD, Scenario

RING = 400
"""Lines of the trace kept for a failure."""

SETTLE_MAX_S = 3600.0
"""Virtual seconds within which everything must have converged once all is well."""

LIVELY_BEFORE_S, LIVELY_AFTER_S = 20.0, 80.0
"""Around the begin and the end of each fault devices speak often and periodic duties run at their shipped pace; in between at a stretched one,
or 72 hours would be two million wake-ups that do nothing."""

READINGS_AIM = 700
"""Readings around faults, about, over all devices of a run: what keeps a run of 72 hours within seconds."""

IDLE_PACE = Pace(tick_s=300.0, engine_state_s=1200.0, watch_s=1200.0, upkeep_s=300.0, heartbeat_s=900.0)
WAKING_PACE = Pace(tick_s=20.0, engine_state_s=60.0, watch_s=60.0, upkeep_s=60.0, heartbeat_s=60.0)
"""From `WAKE_S` before a lively span: whoever sleeps at the idle pace wakes before it begins."""

CROWD_PACE = Pace(tick_s=10.0, engine_state_s=600.0, watch_s=60.0, upkeep_s=60.0, heartbeat_s=60.0)
CROWD_IDLE_PACE = Pace(tick_s=600.0, engine_state_s=7200.0, watch_s=7200.0, upkeep_s=1800.0, heartbeat_s=1500.0)
IDLE_HUB_TICK_S, WAKING_HUB_TICK_S = 300.0, 20.0
WAKE_S = 300.0
AUDIT_S = 600.0
BACKUP_SHARE = 0.11
"""A backup of the hub after this share of the run, again and again."""

_serial = 0


@dataclass
class Outcome:
    """What one run came to."""

    seed: int
    hours: float
    kind: str
    failure: tuple[str, str, str] | None
    digest: str
    cpu_s: float
    steps: int
    edges: int = 1
    checks: dict[str, int] = field(default_factory=dict)
    happened: dict[str, int] = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)


class _Log(logging.Handler):
    """The shipped code's log goes into the trace; an exception that it did not expect is a violation."""

    def __init__(self, world: "World") -> None:
        super().__init__(logging.WARNING)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0] is not None and not self._world.over:
            self._world.oracle.violation(record.name, "no unexpected error", f"{record.getMessage()}: {record.exc_info[0].__name__}: {record.exc_info[1]}")
        self._world.trace(record.name.split(".")[-1], f"{record.levelname.lower()}: {record.getMessage()[:300]}")


class World:
    """One run of one scenario."""

    def __init__(self, scenario: Scenario, folder: FilePath, trace: TextIO | None = None, settle_s: float = SETTLE_MAX_S) -> None:
        global _serial
        _serial += 1
        self.serial = _serial
        self.scenario = scenario
        self._trace_file = trace
        self._settle_s = settle_s
        self._ring: deque[str] = deque(maxlen=RING)
        self._hash = hashlib.blake2b(digest_size=16)
        self.loop = SimLoop()
        self.loop.set_exception_handler(self._exception)
        self.over = False
        self.lively = True
        self.devices_stopped = False
        self.pace = Pace()
        self.hub_pace = HubPace()
        self._spans = self._lively_spans()
        busy_s = sum(end - begin for begin, end in self._spans)
        self.burst_s = max(scenario.burst_s, busy_s * scenario.devices * scenario.edges / READINGS_AIM)
        self.happened: Counter[str] = Counter()
        self.oracle = Oracle(self)
        self.broker = SimBroker("broker", self.loop, self.stream("broker"), "the hub's broker", happened=self.happened)
        self.broker.on_publish = self.oracle.hub_published
        self.machines = [Machine(self, number, f"e{number}") for number in range(scenario.edges)]
        self.alive = {machine.name for machine in self.machines}
        self.hub = HubMachine(self, folder)
        self.changes: dict[str, int] = {}
        self.refused_since: dict[str, float] = {}
        self.disk_limit = JOURNAL_BYTES + scenario.telemetry_bytes + (6 << 20) + 20 * scenario.wal_bytes
        self._stopped: asyncio.Future[None] | None = None

    def stream(self, name: str) -> random.Random:
        """Chance of its own for each part: one more draw here changes nothing there."""
        return random.Random(f"{self.scenario.seed} {name}")

    # -- trace ---------------------------------------------------------------------------------------------------------------

    @staticmethod
    def clock_text(at: float) -> str:
        """Virtual seconds as days, hours, minutes, seconds."""
        return f"{int(at // 86400)}d {int(at // 3600) % 24:02}:{int(at // 60) % 60:02}:{at % 60:06.3f}"

    def trace(self, who: str, what: str) -> None:
        """One line."""
        line = f"{self.clock_text(self.loop.time())}  {who:10} {what}".replace("\n", "\\n")
        self._ring.append(line)
        self._hash.update(line.encode())
        if self._trace_file is not None:
            self._trace_file.write(line + "\n")

    def _exception(self, _loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None and not self.over:
            self.oracle.violation("loop", "no unexpected error", f"{context.get('message')}: {type(error).__name__}: {error}")

    # -- time ----------------------------------------------------------------------------------------------------------------

    def _lively_spans(self) -> list[tuple[float, float]]:
        edges: list[float] = [0.0]
        for fault in self.scenario.faults:
            edges += [fault.at, fault.at + fault.lasts]
        spans: list[tuple[float, float]] = []
        for at in sorted(edges):
            begin, end = at - LIVELY_BEFORE_S, at + LIVELY_AFTER_S
            if spans and begin <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
            else:
                spans.append((begin, end))
        return spans

    def next_lively(self) -> float:
        """When the next lively span begins."""
        now = self.loop.time()
        return next((begin for begin, _ in self._spans if begin > now), self.scenario.seconds)

    def quiet_for(self, seconds: float) -> bool:
        """No fault was under way for so long, but for a clone."""
        now = self.loop.time()
        return not any(fault.kind != "clone" and fault.at <= now and fault.at + fault.lasts >= now - seconds for fault in self.scenario.faults)

    def hurry(self, lively: bool) -> None:
        """Change the pace of everybody."""
        self.lively = lively
        crowd = self.scenario.edges >= CROWD
        self._at_pace((CROWD_PACE if crowd else Pace()) if lively else CROWD_IDLE_PACE if crowd else IDLE_PACE, HubPace().tick_s if lively else IDLE_HUB_TICK_S)

    def _wake(self) -> None:
        if not self.lively:
            self._at_pace(WAKING_PACE if self.scenario.edges < CROWD else CROWD_IDLE_PACE, WAKING_HUB_TICK_S)

    def _at_pace(self, pace: Pace, hub_tick_s: float) -> None:
        for name in ("tick_s", "engine_state_s", "watch_s", "upkeep_s", "heartbeat_s"):
            setattr(self.pace, name, getattr(pace, name))
        self.hub_pace.tick_s = hub_tick_s

    # -- the run -------------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the run now."""
        if self._stopped is not None and not self._stopped.done():
            self._stopped.set_result(None)

    def refuses(self, document: dict[str, Any]) -> bool:
        """Whether an edge must refuse this desired state."""
        return any(rule.get("id") == "broken" for rule in document["spec"].get("rules") or ())

    async def _main(self) -> None:
        loop, scenario = self.loop, self.scenario
        self._stopped = loop.create_future()
        self.hub.boot()
        for machine in self.machines:
            machine.boot()
            for device in machine.devices:
                device.start()
        for begin, end in self._spans:
            if begin > 0:
                loop.call_at(max(0.0, begin - WAKE_S), self._wake)
                loop.call_at(begin, self.hurry, True)
            loop.call_at(end, self.hurry, False)
        for fault in scenario.faults:
            loop.call_at(fault.at, inflict, self, fault)
        for number in range(1, int(1 / BACKUP_SHARE)):
            loop.call_at(scenario.seconds * BACKUP_SHARE * number, self.hub.backup)
        self._audit()
        await self._until(scenario.seconds)
        self.trace("world", "all faults are over")
        self.hurry(True)
        self.heal()
        await self._until(loop.time() + 120)
        self.devices_stopped = True
        begun = loop.time()
        while self.oracle.failure is None:
            await self._until(loop.time() + 20)
            left = self.oracle.unsettled()
            if not left:
                await self._until(loop.time() + 5)
                # Time alone makes decisions too: one of the last milliseconds is still on its way to the hub.
                left = self.oracle.unsettled()
            if not left:
                break
            if loop.time() - begun > self._settle_s:
                self.oracle.violation("world", "everything converges once all is well", left)
        if self.oracle.failure is None:
            self.oracle.audit()
            self.oracle.final()
            if scenario.kind == "mirror":
                self.oracle.mirror()
        self.trace("world", "end")

    async def _until(self, when: float) -> None:
        if self.oracle.failure is None and self._stopped is not None and when > self.loop.time():
            await asyncio.wait((self._stopped,), timeout=when - self.loop.time())

    def _audit(self) -> None:
        self.oracle.audit()
        self.loop.call_later(AUDIT_S, self._audit)

    def heal(self) -> None:
        """All is well from now on."""
        self.broker.slams = False
        self.broker.refuses.clear()
        self.broker.start()
        self.hub.path.block(False, False)
        self.hub.wall_offset_s = 0.0
        self.hub.boot()
        for machine in self.machines:
            machine.path.block(False, False)
            machine.path.loss = machine.path.duplicate = machine.path.reorder = 0.0
            machine.path.delay_s = min(machine.path.delay_s, 0.1)
            machine.disk.capacity, machine.disk.sync_s, machine.disk.countdown = 1 << 40, 0.0, -1
            if machine.name in self.alive:
                machine.set_right()
                machine.power_on()
                machine.bus_start()

    def run(self) -> Outcome:
        """Run it; the outcome."""
        began = time.process_time()
        handler = _Log(self)
        with _logging(handler), _no_gc():
            try:
                self.loop.run_until_complete(self._main())
            except Exception as error:
                self.oracle.violation("world", "no unexpected error", f"{type(error).__name__}: {error}")
                if not isinstance(error, RuntimeError):
                    raise
            finally:
                self.over = True
                for machine in self.machines:
                    if machine.life is not None:
                        machine.life.alive = False
                    machine.disk.unmount()
                    DISKS.pop(machine.disk.name, None)
                self.hub.close()
                self.loop.bury()
                self.loop.close()
        scenario = self.scenario
        return Outcome(
            scenario.seed, scenario.hours, scenario.kind, self.oracle.failure, self._hash.hexdigest(), time.process_time() - began, self.loop.steps,
            scenario.edges, dict(self.oracle.checks), dict(self.happened), list(self._ring) if self.oracle.failure else [],
        )


@contextlib.contextmanager
def _logging(handler: logging.Handler) -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:] = before
        root.setLevel(level)


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    """Collected between runs only: when the collector runs must not depend on what ran before in this process."""
    enabled, hook = gc.isenabled(), sys.unraisablehook
    gc.disable()
    sys.unraisablehook = lambda _: None  # coroutines of processes that were killed end here, and may not wait for anything
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.collect()
        sys.unraisablehook = hook


def memory_folder() -> str | None:
    """A file system in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def simulate(scenario: Scenario, trace: TextIO | None = None, settle_s: float = SETTLE_MAX_S) -> Outcome:
    """Run one scenario; after its last fault it has `settle_s` to converge."""
    with tempfile.TemporaryDirectory(prefix="novacron-sim-", dir=memory_folder()) as folder:
        return World(scenario, FilePath(folder), trace, settle_s).run()
