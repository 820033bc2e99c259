"""The driver of workloads that can be converted (`spec.converts`): each runs as a container, or as the same processes in a micro-VM, and is one instance all the while.

    <dir>/convertible/    containers/, runtime/ (a driver of containers of its own, so that each instance is on one driver's disk), conversions/ (`hot`)

What is on the disk is the truth, as for containers; whatever an agent was killed at is settled by the next one's probe, before anybody asks for anything.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...contract.workloads import AS_CONTAINER
from ..drivers.container import ContainerDriver
from ..drivers.container_disk import Over
from ..drivers.container_laying import CONVERTIBLE_FIRST_ID
from ..drivers.container_laying import Settings as Containers
from ..drivers.face import Ability, Capabilities, DriverError, Key, Order, Output, Phase, Ran, Refused, Stats, Status
from ..images import ImageStore
from .host import Settings
from .hot import Conversions

log = logging.getLogger(__name__)

CANNOT = {
    Ability.PAUSE: "what can be converted is not paused", Ability.CHECKPOINT: "of what can be converted no checkpoints are taken: it goes on as a micro-VM", Ability.RESTORE: "as there are no checkpoints of it",
    **dict.fromkeys((Ability.MIGRATE_OUT, Ability.MIGRATE_IN, Ability.LIVE, Ability.INCREMENTAL, Ability.LAZY), "this driver has no code for it yet"),
}


class ConvertibleDriver:
    """See `face.Driver` and `face.Converts`. Needs root.

    Args:
        directory: its own, in the agent's data folder; absolute.
        store: where the images are.
        containers: the node's driver of containers, whose probe tells for this one too. It is probed first.
        enabled: False: nothing new is taken; what is there is seen to its end.
    """

    def __init__(self, directory: Path, store: ImageStore, containers: ContainerDriver, settings: Settings, told: Containers, *, enabled: bool = True) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._known, self._enabled = containers, enabled
        self._containers = ContainerDriver(directory, store, replace(told, allowed_mounts=(), first_id=CONVERTIBLE_FIRST_ID))
        self.conversions = Conversions(directory, self._containers, store, settings)

    def close(self) -> None:
        """What runs goes on."""
        self._containers.close()

    async def probe(self) -> Capabilities:
        """Settle what an agent left, and boot a guest with CRIU in it, where that was not done here with this QEMU."""
        await self._containers.same_as(self._known)
        capabilities = self._containers.capabilities
        assert capabilities is not None
        why = ""
        try:
            await self.conversions.resume()
        except (DriverError, OSError) as error:
            log.error("conversions that were under way could not be brought to their end: %s", error)
        try:
            if not self._enabled:
                raise Refused("host", "switched off", "set workloads.conversions")
            await self.conversions.host.can()
            await self.conversions.host.flags()
        except (DriverError, OSError) as error:
            why = str(error)
        cannot = {**capabilities.cannot, **CANNOT}
        if why:
            cannot |= {ability: why for ability in Ability if ability not in (Ability.STOP, Ability.ADOPT)}
        return replace(capabilities, driver="convertible", cannot=cannot)

    # -- a life --------------------------------------------------------------------------------------------------------------

    async def prepare(self, order: Order) -> Status:
        if order.leased:
            raise Refused("when_cut_off", "what can be converted cannot be moved by its site", "let it stay")
        return await self.conversions.prepare(order)

    async def start(self, key: Key) -> Status:
        if self.conversions.workload(key).form != AS_CONTAINER:
            return await self.status(key)
        await self.conversions.start(key)
        return await self.status(key)

    async def wait(self, key: Key) -> Status:
        """Until it does not run any more. Nothing converts it meanwhile: whoever does that is who waits."""
        if self.conversions.workload(key).form == AS_CONTAINER:
            await self._containers.wait(key)
        else:
            await self.conversions.guest(key).over()
        return await self.status(key)

    async def stop(self, key: Key, grace_s: float) -> Status:
        with suppress(Refused):  # of which nothing is laid out any more
            return await self.conversions.stop(key, grace_s)
        return Status(key, Phase.LOST, reason="it was never laid out, or has just been removed")

    async def delete(self, key: Key) -> None:
        await self.conversions.delete(key)

    async def convert(self, key: Key, to: str) -> Status:
        return await self.conversions.convert(key, to)

    # -- what is there -------------------------------------------------------------------------------------------------------

    async def status(self, key: Key) -> Status:
        return await self.conversions.status(key)

    async def instances(self) -> Sequence[Status]:
        found = []
        for now in self.conversions.all():
            try:
                found.append(await self.conversions.status(now.order.key))
            except Refused:
                found.append(Status(now.order.key, Phase.LOST, reason="an agent was killed before it was laid out"))
        return found

    def folder(self, key: Key) -> Path:
        """Where what it writes is now."""
        return self.conversions.folder(key)

    async def stats(self, key: Key) -> Stats:
        """Of its container, or of the QEMU that it is in: what the node spends."""
        return await self.conversions.stats(key)

    async def logs(self, key: Key, most: int) -> Output:
        return await self.conversions.logs(key, most)

    async def exec(self, key: Key, args: Sequence[str], timeout_s: float) -> Ran:
        if self.conversions.workload(key).form != AS_CONTAINER:
            raise Refused("exec", "it is a micro-VM now, in which no other commands can be run", "convert it to a container first")
        return await self._containers.exec(key, args, timeout_s)

    def snapshot_bytes(self, key: Key) -> int:
        """See `face.Snapshots`."""
        self._is_container(key)
        return self._containers.snapshot_bytes(key)

    async def snapshot(self, key: Key, folder: Path) -> Mapping[str, Any]:
        """See `face.Snapshots`: while it is a container."""
        self._is_container(key)
        return await self._containers.snapshot(key, folder)

    def _is_container(self, key: Key) -> None:
        if self.conversions.workload(key).form != AS_CONTAINER:
            raise Refused("snapshot", "it is a micro-VM now, and its disk the guest's", "convert it to a container first")

    # -- room ----------------------------------------------------------------------------------------------------------------

    def layers(self) -> set[str]:
        """Layers of the store that instances stand on."""
        return self.conversions.layers()

    async def prune(self, budget: int) -> None:
        """Keep the images' file systems within `budget` bytes."""
        await self.conversions.prune(budget)

    async def hold_disks(self) -> list[Over]:
        """End containers that have more on the disk than they asked for; a guest's disk is as large as that."""
        return await self._containers.hold_disks()
