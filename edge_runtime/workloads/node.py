"""This node towards the hub's scheduler: tells what it has, answers what it shall run, runs it."""

import asyncio
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..config import EdgeConfig
from ..contract.workloads import CONVERTING, CONVERTS, ISOLATES, ISOLATION, KATA, KINDS, MICROVM, MOVABLE
from ..journal import Journal
from ..metrics import Metrics
from .answers import answers, undriven
from .asked import Asked
from .capacity import changed, describe
from .pressure import DISK, LOOK_S, MEMORY, Candidate, Pressure, disk_used, free, priority, requested, victim

if TYPE_CHECKING:
    from .conversion.driver import ConvertibleDriver
    from .drivers.container import ContainerDriver, Settings
    from .drivers.containerd import ContainerdDriver
    from .drivers.face import Driver, Status
    from .drivers.function import FunctionDriver
    from .drivers.function_call import Answer
    from .drivers.function_container import ContainerFunctions
    from .drivers.microvm import MicrovmDriver
    from .drivers.vm import VmDriver
    from .images import Image, ImageStore
    from .images.pull import Puller
    from .images.reference import Host
    from .images.shared import Shared
    from .runner import Runner

log = logging.getLogger(__name__)

KEPT_OUTPUTS, KEPT_BYTES = 16, 8192
"""Outputs of what has been removed that are shown still, in memory, and bytes of each stream: 256 KiB in all."""

MAX_TOLD_IMAGES = 256
"""Images that the hub is told of: those asked for last; what it takes is 1,024."""

MAX_TOLD_NAME = 253
"""Characters of a reference that the hub takes in a node's description."""

CONTAINERD, KATA_SHIM = "containerd", "containerd-shim-kata-v2"
"""In `workloads.runtimes`, and the name of its driver; the program that makes Kata's machines."""

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
        runs: the kinds of workload for which there is a driver here; none before the drivers have been probed.
        siblings: where workloads may move within the site.
        told: the newest `node.capacity`.
        asked: what is asked of the workloads here, beside running them.
    """

    def __init__(self, config: EdgeConfig, journal: Journal, metrics: Metrics) -> None:
        self._config, self._journal, self._metrics = config, journal, metrics
        self.runs: tuple[str, ...] = ()
        self.siblings: Siblings | None = None
        self.told: dict[str, Any] | None = None
        self._why = ""
        self._entries: Sequence[dict[str, Any]] | None = None
        self._probed = not config.workloads.enabled or not (config.workloads.runtimes or config.workloads.functions or config.workloads.microvms or config.workloads.vms)
        self._taken = asyncio.Event()
        self._ready = asyncio.Event()
        self._handing = asyncio.Lock()
        self._store: ImageStore | None = None
        self._containers: ContainerDriver | None = None
        self._by_containerd: list[ContainerdDriver] = []
        self._runs_containers = "container"
        """Which driver does."""
        self._kata_why = ""
        self._functions: FunctionDriver | None = None
        self._called: dict[str, ContainerFunctions] = {}
        """By the driver that runs them: which one that is is known when all have been probed."""
        self._microvms: MicrovmDriver | None = None
        self._vms: VmDriver | None = None
        self._convertible: ConvertibleDriver | None = None
        self._convertible_why = "switched off (workloads.conversions in its configuration), or containers are"
        self._microvms_why = "switched off (workloads.microvms in its configuration)"
        self._usable: set[str] = set()
        self._moves: tuple[str, ...] = ()
        """Kinds of workload that can leave for other nodes, and come from them, with their state."""
        self._drivers: Mapping[str, Driver] = {}
        self._left: dict[str, dict[str, Any]] = {}
        self._images: Shared[Image] | None = None
        self._puller: Puller | None = None
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
            self.asked.begin(self._runner, self._why)
            self._ready.set()
            self._taken.set()
            await asyncio.gather(self._tell(), self._follow(), self._watch_room(), self._watch_disks())
        finally:
            if self._runner is not None:
                await self._runner.close()
            await self.asked.close()
            if self._images is not None:
                await self._images.close()
            if self._puller is not None:
                await self._puller.close()
            for driver in (self._functions, self._convertible, self._containers, *self._by_containerd, self._microvms, self._vms):
                if driver is not None:
                    await asyncio.to_thread(driver.close)
            if self._store is not None:
                self._store.close()

    async def _probe(self) -> None:
        from .images import ImageError, ImageStore
        from .images.shared import Shared
        from .runner import Runner

        self._images = Shared()
        workloads, folder = self._config.workloads, (Path(self._config.data_dir) / "workloads").resolve()
        drivers: dict[str, Driver] = {}
        why: list[str] = []
        try:
            self._store = await asyncio.to_thread(ImageStore, folder / "images")
            if workloads.runtimes:
                from .drivers.container import ContainerDriver, Settings

                told = Settings(tuple(one for one in workloads.runtimes if one != CONTAINERD), allowed_mounts=workloads.mounts, network=workloads.network, publish=workloads.publish, criu=workloads.criu)
                drivers["container"] = self._containers = await asyncio.to_thread(ContainerDriver, folder, self._store, told)
                more, lacking = await asyncio.to_thread(_by_containerd, self._config, folder, self._store, told)
                self._by_containerd, why = list(more.values()), [*why, *lacking]
                drivers |= more
                if workloads.conversions or (folder / "convertible").exists():  # after that of containers: whose probe is its own
                    from .conversion import host
                    from .conversion.driver import ConvertibleDriver

                    how = host.Settings(kernel=workloads.guest_kernel, network=workloads.network, publish=workloads.publish)
                    drivers[CONVERTS] = self._convertible = await asyncio.to_thread(ConvertibleDriver, folder / "convertible", self._store, self._containers, how, told, enabled=workloads.conversions)
            if workloads.functions:
                from .drivers.function import FunctionDriver

                drivers["function"] = self._functions = await asyncio.to_thread(FunctionDriver, folder, self._store)
            if workloads.microvms or (folder / "microvms").exists():  # what an earlier configuration left is still theirs to end
                from .drivers import microvm

                settings = microvm.Settings(kernel=workloads.guest_kernel, enabled=workloads.microvms)
                drivers[MICROVM] = self._microvms = await asyncio.to_thread(microvm.MicrovmDriver, folder, self._store, settings)
            if workloads.vms or (folder / "vms").exists():
                from .drivers import vm

                machines = vm.Settings(kernel=workloads.guest_kernel, network=workloads.network, publish=workloads.publish, bridges=workloads.bridges, enabled=workloads.vms)
                drivers["vm"] = self._vms = await asyncio.to_thread(vm.VmDriver, folder, self._store, machines)
        except (ImageError, OSError) as error:
            why.append(str(error))
            log.error("workloads cannot be run: %s", error)
        for name, driver in drivers.items():
            reasons = await self._try(name, driver)
            why += reasons
            if name == MICROVM:
                self._microvms_why = "; ".join(reasons)
            elif name == KATA:
                self._kata_why = "; ".join(reasons)
            elif name == CONVERTS:
                self._convertible_why = "; ".join(reasons)
        asked = [CONTAINERD if one == CONTAINERD else "container" for one in workloads.runtimes]
        self._runs_containers = next((name for name in asked if name in self._usable), "container")
        if self._runs_containers in self._usable:
            self._usable.add("container")
        # A job and a function are of whatever kind their image is; no machine is a job.
        self.runs = tuple(
            kind for kind in KINDS
            if kind in self._usable or (kind == "container" and self._usable & {MICROVM, KATA}) or (kind == "function" and "container" in self._usable) or (kind == "batch" and self._usable - {"vm", CONVERTS})
        )
        self._why = "; ".join(why)
        self._moves = self._moves_states()
        checkpointing = await self.asked.checkpointing(folder / "checkpoints") if self._containers is not None or self._vms is not None else None
        if self._usable or await _any_left(drivers.values()):  # with those that cannot run anything any more: what they left is still theirs to end
            self._runner = Runner(drivers, self._journal, self._bring, self._tidy, lambda: self._metrics.inc("workload_errors_total"), self._said, self._pressure.refusal, self._leaves, checkpointing)
            self._drivers = drivers
        self._probed = True

    def _moves_states(self) -> tuple[str, ...]:
        from .carrier import reason_against
        from .drivers.face import Ability

        if why := reason_against(self._config.workloads):
            if self._config.workloads.moves_hub:
                log.warning("workloads do not move with their state: %s", why)
            return ()
        told = {"container": self._containers.capabilities if self._containers is not None and self._runs_containers == "container" else None, "vm": self._vms.capabilities if self._vms is not None else None}
        return tuple(kind for kind, found in told.items() if found is not None and found.can(Ability.MIGRATE_OUT) and found.can(Ability.MIGRATE_IN))

    async def _try(self, name: str, driver: "Driver") -> list[str]:
        """Probe one driver; why it cannot be used, where it cannot."""
        from .drivers.face import Ability

        try:
            told = await driver.probe()
        except Exception as error:  # what a host can come up with has no end; the agent's other work goes on
            log.exception("the driver of %ss cannot be used", name)
            return [f"{name}: the probe failed: {error}"]
        self._journal.append("event", "workload.driver", {**told.to_json(), "cpu_flags": len(told.cpu_flags)})
        if told.usable:
            self._usable.add(name)
            return []
        return [f"{name}: {told.cannot[Ability.START]}"]

    async def _follow(self) -> None:
        """Hand what is wanted to the runner, the newest only."""
        while self._runner is not None:
            await self._taken.wait()
            self._taken.clear()
            try:
                await self._hand()
            except OSError as error:
                self._metrics.inc("workload_errors_total")
                log.error("what runs here could not be looked at: %s", error)

    async def _hand(self) -> None:
        assert self._runner is not None
        async with self._handing:  # what is asked last counts last
            entries, refused = [], []
            for entry in self._entries or ():
                if entry["wanted"] != "running" or entry["kind"] in self.runs:
                    entries.append(entry)
                else:  # what an earlier agent could run may run here still
                    refused.append({**entry, "refusal": undriven(entry["kind"], self._why)})
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
        """Take an image from the archives that were put into `<data>/workloads/archives`, or from its registry, where the store does not have it yet; which driver runs it."""
        from .drivers.face import Refused
        from .images import ImageError

        assert self._images is not None
        try:
            image = await self._images.get((reference, pull), lambda: self._image(reference, pull))
        except ImageError as error:
            raise Refused(error.field, error.problem, error.remedy) from None
        name = kind if kind not in ("batch", "function") else "function" if image.config.module else "container"
        if name == CONVERTS and name not in self._usable:
            raise Refused(f"spec.{CONVERTS}", f"workloads cannot be converted here: {self._convertible_why}", "place it on a node that can, or leave it out")
        if name in (MICROVM, KATA) and name not in self._usable:
            why = self._microvms_why if name == MICROVM else self._kata_why or await asyncio.to_thread(_why_no_kata)
            raise Refused(f"spec.{ISOLATION}", f"{name} cannot be had here: {why}", "place it on a node that has it, or leave it out")
        if name not in self._usable:
            raise Refused("image", f"is for the driver of {name}s, which cannot be used here: {self._why}", "place it on a node whose driver can")
        return self._runs_containers if name == "container" else name

    async def _image(self, reference: str, pull: str) -> "Image":
        """Raises `ImageError`."""
        from .images import ImageError
        from .images.reference import hosts, parse

        assert self._store is not None
        known = hosts(self._config.workloads.registries)
        if pull != "always":
            try:
                return await asyncio.to_thread(self._store.find_or_take, reference, self._store.directory.parent / "archives")
            except ImageError as error:
                if pull == "never" or not self._config.workloads.fetch or parse(reference, known) is None:
                    raise
                absent = error
        elif not self._config.workloads.fetch:
            raise ImageError("spec.pull", "is always, and this node fetches nothing (workloads.fetch)", "use missing, and put the image into the archives folder")
        try:
            image = await self._registries(known).pull(reference)
        except ImageError as error:
            self._metrics.inc("image_pulls_total", outcome="failed")
            if pull != "always" and "some cannot be taken" in absent.problem:
                raise ImageError(error.field, f"{error.problem}; and {absent.problem}", error.remedy) from None
            raise
        self._metrics.inc("image_pulls_total", outcome="done")
        return image

    def _registries(self, known: "Mapping[str, Host]") -> "Puller":
        """What fetches; made, and the client for HTTP imported, when something is fetched for the first time. Raises `ImageError`."""
        if self._puller is None:
            from .images import ImageError

            try:
                from .images.pull import Puller
            except ImportError as error:
                raise ImageError("image", f"is not on this node, and fetching needs a package that is not there ({error})", "pip install 'novacron[edge]', or put the image into the archives folder") from None

            assert self._store is not None
            workloads, folder = self._config.workloads, self._store.directory.parent / "pulls"
            folder.mkdir(exist_ok=True, mode=0o700)
            self._puller = Puller(folder, self._store, known, workloads.registry_credentials, workloads.images_bytes, self._pulled)
        return self._puller

    def _pulled(self, body: dict[str, Any]) -> None:
        self._journal.append("event", "image.pull", body)
        self._metrics.inc("image_pull_bytes_total", body["bytes"])

    def _tidy(self) -> None:
        """Keep images within their budget, when there is time."""
        task = asyncio.ensure_future(self._prune())
        task.add_done_callback(lambda done: None if done.cancelled() or done.exception() is None else log.warning("images could not be pruned: %s", done.exception()))

    async def _prune(self, most: int | None = None) -> bool:
        """Drop what nothing stands on beyond the budget, or beyond `most` bytes; whether anything went."""
        budget = self._config.workloads.images_bytes if most is None else most
        modules = await asyncio.to_thread(self._functions.layers) if self._functions is not None else set[str]()
        if self._microvms is not None:
            modules = modules | await asyncio.to_thread(self._microvms.layers)
            await self._microvms.prune(budget)
        if self._vms is not None:
            modules = modules | await asyncio.to_thread(self._vms.layers)
        if self._convertible is not None:
            modules = modules | await asyncio.to_thread(self._convertible.layers)
            await self._convertible.prune(budget)
        layers, taken = await self.asked.held()
        modules, budget = modules | layers, max(0, budget - taken)
        for one in self._by_containerd:
            modules = modules | await asyncio.to_thread(one.layers)
        if self._containers is not None:
            return bool(await self._containers.prune(budget, modules))
        return bool(await asyncio.to_thread(self._store.prune, budget, modules)) if self._store is not None else False

    # -- what people ask -----------------------------------------------------------------------------------------------------

    async def instances(self) -> list[dict[str, Any]]:
        """What is on this node, for people."""
        return [_shown(name, status) for name, driver in self._drivers.items() for status in await driver.instances()]

    async def output(self, workload: str, most: int) -> dict[str, Any] | None:
        """The end of what a workload wrote, of its newest epoch: also for a while after it was removed. None where nothing is known of it."""
        from .drivers.face import Refused

        there = [(status, name, driver) for name, driver in self._drivers.items() for status in await driver.instances() if status.key.id == workload]
        if there:
            status, name, driver = max(there, key=lambda one: one[0].key.epoch)
            try:
                return {**_shown(name, status), **await _written(driver, status, most)}
            except Refused:
                pass  # it was removed meanwhile
        return self._left.get(workload)

    async def _newest(self, workload: str) -> "tuple[Driver, Status] | None":
        there = [(driver, status) for driver in self._drivers.values() for status in await driver.instances() if status.key.id == workload]
        return max(there, key=lambda one: one[1].key.epoch, default=None)

    async def _leaves(self, driver: "Driver", status: "Status") -> None:
        """What it wrote is shown for a while: the hub forgets what is done at once, and whoever started it wants to read it."""
        name = next((name for name, one in self._drivers.items() if one is driver), "")
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

        if self._functions is None and self._containers is None:
            if self._probed:
                return None
            raise Refused("node", "the agent has just started, and looks at what it can run", "come again")
        try:
            answer = await self._container_functions().call(function, body, timeout_s) if self._containers is not None else None
            if answer is None:
                if self._functions is None:
                    raise Refused("id", f"no function {function[:80]} runs here", "submit it to the hub, or ask the node that runs it")
                answer = await self._functions.call(function, body, timeout_s)
        except Refused as error:
            if error.field == "id" and any(entry["id"] == function and entry["kind"] == "function" and entry["wanted"] == "running" for entry in self.entries):
                raise Refused("node", "it does not run at this moment", "come again, or see what the hub says of it") from None
            raise
        self._metrics.inc("function_calls_total", outcome=answer.what.replace(" ", "_"))
        if answer.cold:
            self._metrics.inc("function_cold_calls_total")
        return answer

    def _container_functions(self) -> "ContainerFunctions":
        if self._runs_containers not in self._called:
            from .drivers.function_container import ContainerFunctions

            assert self._containers is not None
            driver = next((one for one in self._by_containerd if one.name == self._runs_containers), self._containers)
            self._called[self._runs_containers] = ContainerFunctions(driver, lambda: self.entries)
        return self._called[self._runs_containers]

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
            except OSError as error:
                self._metrics.inc("workload_errors_total")
                log.error("whether there is room left could not be seen: %s", error)
            await asyncio.sleep(LOOK_S)

    async def _watch_disks(self) -> None:
        """End containers that have more on the disk than they asked for."""
        drivers = [driver for driver in (self._containers, self._convertible, *self._by_containerd) if driver is not None]
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
            except OSError as error:
                self._metrics.inc("workload_errors_total")
                log.error("what containers have on the disk could not be counted: %s", error)
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
        if lacking == MEMORY and self._microvms is not None and await asyncio.to_thread(self._microvms.make_room):
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
        labels = {**config.labels, **{ISOLATES + name: "true" for name in (MICROVM, KATA) if name in self._usable}}
        if CONVERTS in self._usable:
            labels[CONVERTING] = "true"
        labels |= {MOVABLE + kind: "true" for kind in self._moves}
        return describe(
            kind=workloads.kind, region=config.region, site=config.site, labels=labels, taints=[*workloads.taints, *self._pressure.taints()], runs=self.runs, reserve_milli=workloads.reserve_cpu_milli,
            reserve_memory=workloads.reserve_memory_bytes, reserve_disk=workloads.reserve_disk_bytes, most=workloads.max_workloads, data_dir=Path(config.data_dir),
            images=self._held(),
        )

    def _held(self) -> list[str]:
        """References of the images here, the newest asked for; in order, so that what is told changes only where they do."""
        names = [name for image in sorted(self._store.images(), key=lambda image: -image.used_ms) for name in image.names] if self._store is not None else []
        return sorted(name for name in names[:MAX_TOLD_IMAGES] if len(name) <= MAX_TOLD_NAME)

    def take(self, entries: Sequence[dict[str, Any]]) -> None:
        """Answer the workloads of a desired state that was taken; each entry once, also over restarts. What comes before the drivers have been probed is answered then."""
        self._entries = list(entries)
        if self._probed:
            self._answer(self._entries)

    def _answer(self, entries: Sequence[dict[str, Any]]) -> None:
        answered = self._journal.state(ANSWERED) or []
        reports, now = answers(entries, answered, self.runs, self._config.workloads.enabled, self._why, self.driven)
        for body in reports:
            self._journal.append("event", "workload", body)
        if now != answered:
            self._journal.put_state(ANSWERED, now)
        self._taken.set()


async def _any_left(drivers: "Iterable[Driver]") -> bool:
    """Whether something is on the disk of any of them."""
    for driver in drivers:
        try:
            if await driver.instances():
                return True
        except OSError as error:
            log.error("what is left of workloads cannot be looked at: %s", error)
    return False


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


def _by_containerd(config: EdgeConfig, folder: Path, store: "ImageStore", settings: "Settings") -> "tuple[dict[str, ContainerdDriver], list[str]]":
    """The drivers that go by containerd, where they are asked for or can be, or where an earlier configuration left something of theirs; and why one that is asked for is not there."""
    from .drivers.container import searched

    wanted = [name for name, there in ((CONTAINERD, CONTAINERD in config.workloads.runtimes), (KATA, searched(KATA_SHIM) is not None)) if there or (folder / name / "containers").exists()]
    if not wanted:
        return {}, []
    try:
        from .drivers import containerd
    except ImportError as error:
        return {}, [f"{name}: it needs a package that is not there ({error}): pip install 'novacron[containerd]'" for name in wanted]
    handlers = {CONTAINERD: containerd.RUNC, KATA: containerd.KATA}
    return {name: containerd.ContainerdDriver(folder, store, settings, path=config.workloads.containerd, handler=handlers[name]) for name in wanted}, []


def _why_no_kata() -> str:
    """Why nothing can be run by Kata, where there is no driver of it."""
    from .drivers.container import searched

    missing = [name for name in ("containerd", KATA_SHIM) if searched(name) is None]
    return f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed" if missing else "grpcio is not installed, or containers are switched off (workloads.runtimes)"
