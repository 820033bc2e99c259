"""Which drivers there are on a node, what they can do, and why others are not there."""

import asyncio
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EdgeConfig
from ..contract.workloads import CONVERTING, CONVERTS, ISOLATES, ISOLATION, KATA, KINDS, MICROVM, MOVABLE, SNAPSHOTS
from ..journal import Journal

if TYPE_CHECKING:
    from .conversion.driver import ConvertibleDriver
    from .drivers.container import ContainerDriver
    from .drivers.container_laying import Settings
    from .drivers.containerd import ContainerdDriver
    from .drivers.face import Driver
    from .drivers.function import FunctionDriver
    from .drivers.microvm import MicrovmDriver
    from .drivers.vm import VmDriver
    from .images import ImageStore

log = logging.getLogger(__name__)

CONTAINERD, KATA_SHIM = "containerd", "containerd-shim-kata-v2"
"""In `workloads.runtimes`, and the name of its driver; the program that makes Kata's machines."""

UMASK = 0o022
"""Roots, layers and states belong to users of containers: a root folder that nobody but root may go through, because the agent's unit says so of the agent's files, stops every other user in it, and a whole user namespace."""


class NodeDrivers:
    """The drivers of one node.

    Attributes:
        all: those that were made, by name; some of them may not be usable any more, and end only what they left.
        runs: kinds of workload for which there is a usable one.
        moves: kinds of workload that can leave for other nodes, and come from them, with their state.
        snapshots: whether snapshots can be taken of some.
        why: why some cannot be used.
        runs_containers: the name of the one that runs containers.
        containers: the one that runs them directly; the others likewise.
    """

    def __init__(self, config: EdgeConfig, journal: Journal) -> None:
        self._config, self._journal = config, journal
        self.all: dict[str, Driver] = {}
        self.runs: tuple[str, ...] = ()
        self.moves: tuple[str, ...] = ()
        self.snapshots = False
        self.why = ""
        self.runs_containers = "container"
        self.containers: ContainerDriver | None = None
        self.by_containerd: list[ContainerdDriver] = []
        self.functions: FunctionDriver | None = None
        self.microvms: MicrovmDriver | None = None
        self.vms: VmDriver | None = None
        self.convertible: ConvertibleDriver | None = None
        self._usable: set[str] = set()
        self._taking: set[str] = set()
        """Those that take snapshots."""
        self._reasons: dict[str, str] = {CONVERTS: "switched off (workloads.conversions in its configuration), or containers are", MICROVM: "switched off (workloads.microvms in its configuration)"}
        """Why a driver is not to be had, in its own words."""

    @property
    def wanted(self) -> bool:
        """Whether the configuration asks for any."""
        asked = self._config.workloads
        return asked.enabled and bool(asked.runtimes or asked.functions or asked.microvms or asked.vms)

    async def probe(self, folder: Path, store: "ImageStore") -> None:
        """Make them, and try what each can do. `folder`: where all of them keep what is theirs."""
        from .images import ImageError

        why: list[str] = []
        try:
            await self._make(folder, store, why)
        except (ImageError, OSError) as error:
            why.append(str(error))
            log.error("workloads cannot be run: %s", error)
        for name, driver in self.all.items():
            reasons = await self._try(name, driver)
            why += reasons
            self._reasons[name] = "; ".join(reasons)
        asked = [CONTAINERD if one == CONTAINERD else "container" for one in self._config.workloads.runtimes]
        self.runs_containers = next((name for name in asked if name in self._usable), "container")
        if self.runs_containers in self._usable:
            self._usable.add("container")
        # A job and a function are of whatever kind their image is; no machine is a job.
        self.runs = tuple(
            kind for kind in KINDS
            if kind in self._usable or (kind == "container" and self._usable & {MICROVM, KATA}) or (kind == "function" and "container" in self._usable) or (kind == "batch" and self._usable - {"vm", CONVERTS})
        )
        self.why = "; ".join(why)
        self.moves = self._moves_states()
        self.snapshots = bool(self._taking)

    async def _make(self, folder: Path, store: "ImageStore", lacking: list[str]) -> None:
        """What the configuration asks for, and what an earlier one left something of. Raises `ImageError`, OSError."""
        workloads = self._config.workloads
        os.umask(UMASK)
        if workloads.runtimes:
            from .drivers.container import ContainerDriver
            from .drivers.container_laying import Settings

            told = Settings(tuple(one for one in workloads.runtimes if one != CONTAINERD), allowed_mounts=workloads.mounts, network=workloads.network, publish=workloads.publish, criu=workloads.criu)
            self.all["container"] = self.containers = await asyncio.to_thread(ContainerDriver, folder, store, told)
            more, absent = await asyncio.to_thread(by_containerd, self._config, folder, store, told)
            lacking += absent
            self.by_containerd = list(more.values())
            self.all |= more
            if workloads.conversions or (folder / "convertible").exists():  # after that of containers: whose probe is its own
                from .conversion import host
                from .conversion.driver import ConvertibleDriver

                how = host.Settings(kernel=workloads.guest_kernel, network=workloads.network, publish=workloads.publish)
                self.all[CONVERTS] = self.convertible = await asyncio.to_thread(ConvertibleDriver, folder / "convertible", store, self.containers, how, told, enabled=workloads.conversions)
        if workloads.functions:
            from .drivers.function import FunctionDriver

            self.all["function"] = self.functions = await asyncio.to_thread(FunctionDriver, folder, store)
        if workloads.microvms or (folder / "microvms").exists():  # what an earlier configuration left is still theirs to end
            from .drivers import microvm

            settings = microvm.Settings(kernel=workloads.guest_kernel, enabled=workloads.microvms)
            self.all[MICROVM] = self.microvms = await asyncio.to_thread(microvm.MicrovmDriver, folder, store, settings)
        if workloads.vms or (folder / "vms").exists():
            from .drivers import vm

            machines = vm.Settings(kernel=workloads.guest_kernel, network=workloads.network, publish=workloads.publish, bridges=workloads.bridges, enabled=workloads.vms)
            self.all["vm"] = self.vms = await asyncio.to_thread(vm.VmDriver, folder, store, machines)

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
            if told.can(Ability.SNAPSHOT):
                self._taking.add(name)
            return []
        return [f"{name}: {told.cannot[Ability.START]}"]

    def _moves_states(self) -> tuple[str, ...]:
        from .carrier import reason_against
        from .drivers.face import Ability

        if why := reason_against(self._config.workloads):
            if self._config.workloads.moves_hub:
                log.warning("workloads do not move with their state: %s", why)
            return ()
        told = {"container": self.containers.capabilities if self.containers is not None and self.runs_containers == "container" else None, "vm": self.vms.capabilities if self.vms is not None else None}
        return tuple(kind for kind, found in told.items() if found is not None and found.can(Ability.MIGRATE_OUT) and found.can(Ability.MIGRATE_IN))

    async def needed(self) -> bool:
        """Whether one can run something, or something is left of one that cannot any more: that is still its to end."""
        if self._usable:
            return True
        for driver in self.all.values():
            try:
                if await driver.instances():
                    return True
            except OSError as error:
                log.error("what is left of workloads cannot be looked at: %s", error)
        return False

    async def choose(self, kind: str, module: bool) -> str:
        """The name of the driver that runs an image as a workload of this kind (or by what it is to be isolated, or converted). Raises `Refused`.

        Args:
            module: the image is a WebAssembly module.
        """
        from .drivers.face import Refused

        name = kind if kind not in ("batch", "function") else "function" if module else "container"
        if name == CONVERTS and name not in self._usable:
            raise Refused(f"spec.{CONVERTS}", f"workloads cannot be converted here: {self._reasons[name]}", "place it on a node that can, or leave it out")
        if name in (MICROVM, KATA) and name not in self._usable:
            why = self._reasons.get(name) or await asyncio.to_thread(_why_no_kata)
            raise Refused(f"spec.{ISOLATION}", f"{name} cannot be had here: {why}", "place it on a node that has it, or leave it out")
        if name not in self._usable:
            raise Refused("image", f"is for the driver of {name}s, which cannot be used here: {self.why}", "place it on a node whose driver can")
        return self.runs_containers if name == "container" else name

    def labels(self) -> dict[str, str]:
        """What the hub places by, beside the kinds."""
        told = {ISOLATES + name: "true" for name in (MICROVM, KATA) if name in self._usable}
        if CONVERTS in self._usable:
            told[CONVERTING] = "true"
        if self.snapshots:
            told[SNAPSHOTS] = "true"
        return told | {MOVABLE + kind: "true" for kind in self.moves}

    def name(self, driver: "Driver") -> str:
        """Of one of them; empty where it is none of them."""
        return next((name for name, one in self.all.items() if one is driver), "")

    def on_the_disk(self) -> list[Any]:
        """Those whose workloads are held to the disk that they asked for."""
        return [driver for driver in (self.containers, self.convertible, *self.by_containerd) if driver is not None]

    async def prune(self, store: "ImageStore", budget: int, held: Iterable[str], taken: int) -> bool:
        """Drop images, and what was made of them, that nothing stands on, beyond `budget` bytes; whether images went.

        Args:
            held: layers that something else stands on.
            taken: bytes of the budget that something else has.
        """
        layers = set(held)
        for driver in self._with_layers():
            layers |= await asyncio.to_thread(driver.layers)
        for maker in (self.microvms, self.convertible):
            if maker is not None:
                await maker.prune(budget)
        left = max(0, budget - taken)
        if self.containers is not None:
            return bool(await self.containers.prune(left, layers))
        return bool(await asyncio.to_thread(store.prune, left, layers))

    def _with_layers(self) -> Iterator[Any]:
        yield from (one for one in (self.functions, self.microvms, self.vms, self.convertible, *self.by_containerd) if one is not None)

    async def close(self) -> None:
        """Let go of what they hold; what runs goes on."""
        for driver in (self.functions, self.convertible, self.containers, *self.by_containerd, self.microvms, self.vms):
            if driver is not None:
                await asyncio.to_thread(driver.close)


def by_containerd(config: EdgeConfig, folder: Path, store: "ImageStore", settings: "Settings") -> "tuple[Mapping[str, ContainerdDriver], list[str]]":
    """The drivers that go by containerd, where they are asked for or can be, or where an earlier configuration left something of theirs; and why one that is asked for is not there."""
    from .drivers.programs import searched

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
    from .drivers.programs import searched

    missing = [name for name in ("containerd", KATA_SHIM) if searched(name) is None]
    return f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed" if missing else "grpcio is not installed, or containers are switched off (workloads.runtimes)"
