"""This node towards the hub's scheduler: tells what it has, answers what it shall run, runs it."""

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..config import EdgeConfig
from ..journal import Journal
from ..metrics import Metrics
from .answers import answers, undriven
from .asked import Asked
from .capacity import changed, describe
from .node_drivers import NodeDrivers
from .node_images import NodeImages
from .pressure import DISK, LOOK_S, MEMORY, Candidate, Pressure, disk_used, free, priority, requested, victim

if TYPE_CHECKING:
    from .drivers.face import Driver, Status
    from .drivers.function_call import Answer
    from .drivers.function_container import ContainerFunctions
    from .runner import Runner

log = logging.getLogger(__name__)

KEPT_OUTPUTS, KEPT_BYTES = 16, 8192
"""Outputs of what has been removed that are shown still, in memory, and bytes of each stream: 256 KiB in all."""

ANSWERED = "workloads"
"""The journal's state document that keeps which entries of desired state have been answered."""


class Siblings(Protocol):
    """What a site says of the workloads here; see `site_workloads`."""

    def compose(self, entries: Sequence[dict[str, Any]], runs: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, bool]]:
        """What the runner shall go by: entries, and which of those that run on a lease may run now."""

    def tell(self) -> None:
        """Something may have changed that siblings should know."""


class WorkloadNode:
    """One node; says everything through the journal.

    Attributes:
        here: which drivers there are; none before they have been probed.
        images: those of this node.
        siblings: where workloads may move within the site.
        told: the newest `node.capacity`.
        asked: what is asked of the workloads here, beside running them.
    """

    def __init__(self, config: EdgeConfig, journal: Journal, metrics: Metrics) -> None:
        self._config, self._journal, self._metrics = config, journal, metrics
        self.here, self.images = NodeDrivers(config, journal), NodeImages(config, journal, metrics)
        self.siblings: Siblings | None = None
        self.told: dict[str, Any] | None = None
        self._entries: Sequence[dict[str, Any]] | None = None
        self._probed = not self.here.wanted
        self._taken = asyncio.Event()
        self._ready = asyncio.Event()
        self._handing = asyncio.Lock()
        self._called: dict[str, ContainerFunctions] = {}
        """By the driver that runs them: which one that is is known when all have been probed."""
        self._left: dict[str, dict[str, Any]] = {}
        self._pressure = Pressure({MEMORY: config.workloads.evict_memory_bytes, DISK: config.workloads.evict_disk_bytes})
        self._shortage = asyncio.Event()
        self._runner: Runner | None = None
        self.asked = Asked(config, journal, lambda: self.entries, self._newest, self._left.get)

    async def run(self) -> None:
        """Probe the drivers, then make true what is wanted, and tell what this node has, at boot and when it has changed. Until cancelled; what runs then goes on."""
        try:
            if not self._probed:
                await self._probe()
            if self._entries is not None:
                self._answer(self._entries)
            self.asked.begin(self._runner, self.here.why)
            self._ready.set()
            self._taken.set()
            await asyncio.gather(self._tell(), self._follow(), self._watch_room(), self._watch_disks())
        finally:
            if self._runner is not None:
                await self._runner.close()
            await self.asked.close()
            await self.images.stop()
            await self.here.close()
            self.images.close()

    async def _probe(self) -> None:
        from .images import ImageError
        from .runner import Runner

        folder = (Path(self._config.data_dir) / "workloads").resolve()
        try:
            await self.here.probe(folder, await self.images.open(folder))
        except (ImageError, OSError) as error:
            self.here.why = str(error)
            log.error("workloads cannot be run: %s", error)
        checkpointing = await self.asked.checkpointing(folder / "checkpoints") if self.here.containers is not None or self.here.vms is not None else None
        snapshots = await self.asked.snapshots(self.images.snapshots, self.images.store) if checkpointing is not None and self.images.snapshots is not None and self.images.store is not None else None
        if await self.here.needed():
            self._runner = Runner(self.here.all, self._journal, self._bring, self._tidy, lambda: self._metrics.inc("workload_errors_total"), self._said, self._pressure.refusal, self._leaves, checkpointing, snapshots)
        self._probed = True

    @property
    def runs(self) -> tuple[str, ...]:
        """The kinds of workload for which there is a driver here; none before the drivers have been probed."""
        return self.here.runs

    async def _follow(self) -> None:
        """Hand what is wanted to the runner, the newest only."""
        while self._runner is not None:
            await self._taken.wait()
            self._taken.clear()
            try:
                await self._hand()
            except Exception as error:
                self._metrics.inc("workload_errors_total")
                log.error("what runs here could not be looked at: %s", error, exc_info=not isinstance(error, OSError))

    async def _hand(self) -> None:
        assert self._runner is not None
        async with self._handing:  # what is asked last counts last
            entries, refused = [], []
            for entry in self._entries or ():
                if entry["wanted"] != "running" or entry["kind"] in self.runs:
                    entries.append(entry)
                else:  # what an earlier agent could run may run here still
                    refused.append({**entry, "refusal": undriven(entry["kind"], self.here.why)})
            if self.siblings is None:
                await self._runner.take([*entries, *refused])
            else:
                wanted, may = self.siblings.compose(entries, self.runs)
                await self._runner.take([*wanted, *refused], may)
        self._said()

    def _said(self) -> None:
        if self.siblings is not None:
            self.siblings.tell()

    # -- what siblings ask ---------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """The drivers have been probed."""
        return self._ready.is_set()

    @property
    def driven(self) -> bool:
        """There is a driver that sees and ends what runs."""
        return self._runner is not None

    @property
    def entries(self) -> Sequence[dict[str, Any]]:
        """What desired state lists."""
        return self._entries or ()

    def ends(self) -> dict[str, str]:
        """`id/epoch` to how it ended here."""
        return self._runner.ends() if self._runner is not None else {}

    def again(self) -> None:
        """What may run here has changed."""
        self._taken.set()

    async def ended(self, workload: str) -> None:
        """Until nothing of a workload that may not run here does. Raises OSError where that cannot be seen."""
        await self._ready.wait()
        if self._runner is not None:
            await self._hand()
            await self._runner.ended(workload)

    async def _bring(self, kind: str, reference: str, pull: str) -> str:
        """Have an image here; which driver runs it. Raises `Refused`."""
        image = await self.images.bring(reference, pull)
        return await self.here.choose(kind, image.config.module)

    def _tidy(self) -> None:
        """Keep images within their budget, when there is time."""
        task = asyncio.ensure_future(self._prune())
        task.add_done_callback(lambda done: None if done.cancelled() or done.exception() is None else log.warning("images could not be pruned: %s", done.exception()))

    async def _prune(self, most: int | None = None) -> bool:
        """Drop what nothing stands on beyond the budget, or beyond `most` bytes; whether anything went."""
        if self.images.store is None:
            return False
        budget = self._config.workloads.images_bytes if most is None else most
        layers, taken = await self.asked.held()
        return await self.here.prune(self.images.store, budget, layers, taken)

    # -- what people ask -----------------------------------------------------------------------------------------------------

    async def instances(self) -> list[dict[str, Any]]:
        """What is on this node, for people."""
        return [_shown(name, status) for name, _, status in await self._all()]

    async def output(self, workload: str, most: int) -> dict[str, Any] | None:
        """The end of what a workload wrote, of its newest epoch: also for a while after it was removed. None where nothing is known of it."""
        from .drivers.face import Refused

        there = [one for one in await self._all() if one[2].key.id == workload]
        if there:
            name, driver, status = max(there, key=lambda one: one[2].key.epoch)
            try:
                return {**_shown(name, status), **await _written(driver, status, most)}
            except Refused:
                pass  # it was removed meanwhile
        return self._left.get(workload)

    async def _newest(self, workload: str) -> "tuple[Driver, Status] | None":
        there = [(driver, status) for _, driver, status in await self._all() if status.key.id == workload]
        return max(there, key=lambda one: one[1].key.epoch, default=None)

    async def _all(self) -> "list[tuple[str, Driver, Status]]":
        """What is on this node, by the names of its drivers. People ask at any time, also while the agent starts and makes them: who asks then hears of those that are there."""
        return [(name, driver, status) for name, driver in list(self.here.all.items()) for status in await driver.instances()]

    async def _leaves(self, driver: "Driver", status: "Status") -> None:
        """What it wrote is shown for a while: the hub forgets what is done at once, and whoever started it wants to read it."""
        name = self.here.name(driver)
        try:
            told = {**_shown(name, status), **await _written(driver, status, KEPT_BYTES)}
        except Exception as error:  # whatever is the matter with its output: it goes all the same
            log.warning("what %s wrote cannot be kept: %s", status.key.id, error)
            return
        self._left.pop(status.key.id, None)
        self._left[status.key.id] = told
        while len(self._left) > KEPT_OUTPUTS:
            del self._left[next(iter(self._left))]

    async def call(self, function: str, body: bytes, timeout_s: float | None) -> "Answer | None":
        """Run a function that runs on this node; None where there is no driver for functions. Raises `DriverError`. What an earlier agent left is called before the probe has ended."""
        from .drivers.face import Refused

        if self.here.functions is None and self.here.containers is None:
            if self._probed:
                return None
            raise Refused("node", "the agent has just started, and looks at what it can run", "come again")
        try:
            answer = await self._container_functions().call(function, body, timeout_s) if self.here.containers is not None else None
            if answer is None:
                if self.here.functions is None:
                    raise Refused("id", f"no function {function[:80]} runs here", "submit it to the hub, or ask the node that runs it")
                answer = await self.here.functions.call(function, body, timeout_s)
        except Refused as error:
            if error.field == "id" and any(entry["id"] == function and entry["kind"] == "function" and entry["wanted"] == "running" for entry in self.entries):
                raise Refused("node", "it does not run at this moment", "come again, or see what the hub says of it") from None
            raise
        self._metrics.inc("function_calls_total", outcome=answer.what.replace(" ", "_"))
        if answer.cold:
            self._metrics.inc("function_cold_calls_total")
        return answer

    def _container_functions(self) -> "ContainerFunctions":
        if self.here.runs_containers not in self._called:
            from .drivers.function_container import ContainerFunctions

            assert self.here.containers is not None
            driver = next((one for one in self.here.by_containerd if one.name == self.here.runs_containers), self.here.containers)
            self._called[self.here.runs_containers] = ContainerFunctions(driver, lambda: self.entries)
        return self._called[self.here.runs_containers]

    async def _tell(self) -> None:
        told: dict[str, Any] | None = None
        while True:
            self._shortage.clear()  # before the look: what comes while it is taken is looked at again
            try:
                body = await asyncio.get_running_loop().run_in_executor(None, self.describe)
                if changed(told, body):
                    self._journal.append("event", "node.capacity", body)
                    told = self.told = body
                    self._said()
            except Exception:
                self._metrics.inc("capacity_errors_total")
                log.exception("what this node has could not be told")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._shortage.wait(), self._config.workloads.interval_s)

    # -- room ----------------------------------------------------------------------------------------------------------------

    async def _watch_room(self) -> None:
        """End workloads, one after the other, while this node is short of memory or disk."""
        while self._runner is not None:
            try:
                await self._make_room(time.monotonic())
            except Exception as error:
                self._metrics.inc("workload_errors_total")
                log.error("whether there is room left could not be seen: %s", error, exc_info=not isinstance(error, OSError))
            await asyncio.sleep(LOOK_S)

    async def _watch_disks(self) -> None:
        """End containers that have more on the disk than they asked for."""
        drivers = self.here.on_the_disk()
        if not drivers:
            return
        from .drivers.container_disk import LOOK_S as DISK_LOOK_S

        while True:
            try:
                for one in [found for driver in drivers for found in await driver.hold_disks()]:
                    told = {"id": one.key.id, "epoch": one.key.epoch, "used": one.used, "limit": one.limit}
                    self._journal.append("event", "workload.disk", told)
                    self._metrics.inc("workloads_over_disk_total")
                    log.warning("workload %s is ended: it has %d bytes on the disk, and asked for %d", one.key.id, one.used, one.limit)
            except Exception as error:
                self._metrics.inc("workload_errors_total")
                log.error("what containers have on the disk could not be counted: %s", error, exc_info=not isinstance(error, OSError))
            await asyncio.sleep(DISK_LOOK_S)

    async def _make_room(self, now_s: float) -> None:
        assert self._runner is not None
        before = self._pressure.short
        there = await asyncio.to_thread(self._free)
        lacking = self._pressure.look(there, now_s)
        if self._pressure.short != before:
            log.warning("this node %s", self._pressure.refusal() or "has room again")
            self._shortage.set()
        if not lacking:
            return
        if lacking == DISK and await self._prune(0):
            self._pressure.ended(now_s)
            return
        if lacking == MEMORY and self.here.microvms is not None and await asyncio.to_thread(self.here.microvms.make_room):
            self._pressure.ended(now_s)
            return
        running = await self._runner.running()
        candidates = [Candidate(entry["id"], int(entry["epoch"]), priority(entry), await self._used(entry, driver, lacking), requested(entry, lacking) + (int(entry.get("over", 0)) if lacking == MEMORY else 0)) for entry, driver in running]
        chosen = victim(candidates)
        if chosen is None:
            return
        self._pressure.ended(now_s)
        told = {"id": chosen.id, "epoch": chosen.epoch, "what": lacking, "free": there[lacking], "limit": self._pressure.limit(lacking), "priority": chosen.priority, "used": chosen.used, "requested": chosen.requested}
        self._journal.append("event", "workload.evicted", told)
        self._metrics.inc("workloads_evicted_total", what=lacking)
        log.warning("workload %s is ended: %d bytes of %s are free, and %d have to be", chosen.id, there[lacking], lacking, self._pressure.limit(lacking))
        entry = next(entry for entry, _ in running if (entry["id"], int(entry["epoch"])) == (chosen.id, chosen.epoch))
        self._runner.evict(entry, f"evicted: this node {self._pressure.refusal()}")

    def _free(self) -> dict[str, int]:
        told = os.statvfs(self._config.data_dir)
        return free(Path("/proc/meminfo").read_text(), told.f_bavail * told.f_frsize)

    async def _used(self, entry: Mapping[str, Any], driver: "Driver", what: str) -> int:
        """Bytes that one uses; 0 where that cannot be seen, as of one that has just ended."""
        from .drivers.face import DriverError, Key, Observes

        key = Key(entry["id"], int(entry["epoch"]))
        if what == DISK:
            return await asyncio.to_thread(disk_used, [driver.folder(key)]) if hasattr(driver, "folder") else 0
        try:
            return (await driver.stats(key)).memory_bytes if isinstance(driver, Observes) else 0
        except (DriverError, OSError):
            return 0

    def describe(self) -> dict[str, Any]:
        """The body of a `node.capacity` record."""
        config, workloads = self._config, self._config.workloads
        return describe(
            kind=workloads.kind, region=config.region, site=config.site, labels={**config.labels, **self.here.labels()}, taints=[*workloads.taints, *self._pressure.taints()], runs=self.runs, reserve_milli=workloads.reserve_cpu_milli,
            reserve_memory=workloads.reserve_memory_bytes, reserve_disk=workloads.reserve_disk_bytes, most=workloads.max_workloads, data_dir=Path(config.data_dir),
            images=self.images.held(),
        )

    def take(self, entries: Sequence[dict[str, Any]]) -> None:
        """Answer the workloads of a desired state that was taken; each entry once, also over restarts. What comes before the drivers have been probed is answered then."""
        self._entries = list(entries)
        if self._probed:
            self._answer(self._entries)

    def _answer(self, entries: Sequence[dict[str, Any]]) -> None:
        answered = self._journal.state(ANSWERED) or []
        reports, now = answers(entries, answered, self.runs, self._config.workloads.enabled, self.here.why, self.driven)
        for body in reports:
            self._journal.append("event", "workload", body)
        if now != answered:
            self._journal.put_state(ANSWERED, now)
        self._taken.set()


def _shown(driver: str, status: "Status") -> dict[str, Any]:
    return {
        "id": status.key.id, "epoch": status.key.epoch, "driver": driver, **({"form": status.form} if status.form else {}), "phase": status.phase.value, "pid": status.pid, "reason": status.reason or (status.exit.reason if status.exit else ""),
        "exit_code": status.exit.code if status.exit else None,
    }


async def _written(driver: "Driver", status: "Status", most: int) -> dict[str, Any]:
    from .drivers.face import Observes

    if not isinstance(driver, Observes):
        return {"stdout": "", "stderr": "", "cut": False}
    told = await driver.logs(status.key, most)
    return {"stdout": told.stdout.decode("utf-8", "replace"), "stderr": told.stderr.decode("utf-8", "replace"), "cut": told.cut}
