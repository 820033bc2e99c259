"""The simulated machine of the hub: the shipped hub without its HTTP side, its store on a real file in memory, backups, restore."""

import asyncio
import random
import shutil
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from edge_runtime.contract.errors import ContractError
from hub.server import Hub, HubSettings, HubSurroundings
from hub.store.base import Transaction
from hub.store.sqlite import SqliteStore

from .edge import TRUE_EPOCH_S
from .loop import Life, SimExecutor
from .network import Path
from .session import SimClient

if TYPE_CHECKING:
    from .world import World

BACKUPS_MAX = 3
"""Backups kept; `hub_restore` names one by its age."""

ATTEND_S = 600.0
"""How often an administrator looks after an identity that had been in two machines."""

COMMIT_S = 0.01
"""A commit of the hub takes up to so long."""


class SimulatedBroker:
    """What the hub knows of its broker (`hub.broker.Broker`)."""

    kind, host, port, tls, ca_file, inside, username, password, mqtt5, restarts = "external", "hub", 1883, False, "", ("hub", 1883), "", "", True, 0

    async def close(self) -> None:
        """Not ours."""


class ObservedStore(SqliteStore):
    """The shipped store, told to the oracle at the moment of each commit."""

    def __init__(self, path: FilePath, world: "World") -> None:
        super().__init__(path)
        self._world = world

    def commit(self, transaction: Transaction) -> None:
        """See `Store.commit`."""
        super().commit(transaction)
        if transaction.records:
            self._world.oracle.hub_stored(transaction.records)


class HubMachine:
    """One hub."""

    def __init__(self, world: "World", folder: FilePath) -> None:
        self.world = world
        self._folder = folder
        self._draw = world.stream("hub")
        self.path = Path("hub", world.loop, world.stream("hub path"), delay_s=0.001, jitter_s=0.002, happened=world.happened)
        self.life: Life | None = None
        self.hub: Hub | None = None
        self.backups: list[bytes] = []
        self.boots = 0
        self.wall_offset_s = 0.0

    def now_ms(self) -> int:
        """The hub's wall time."""
        return int((TRUE_EPOCH_S + self.world.loop.time() + self.wall_offset_s) * 1000)

    def boot(self) -> None:
        """Start the hub."""
        if self.life is None:
            self.boots += 1
            self.life = Life("hub")
            self.world.trace("hub", f"starts ({self.boots})")
            self.life.run(self._start)

    def _start(self) -> None:
        world = self.world
        entropy = random.Random(self._draw.getrandbits(64))
        delay = random.Random(self._draw.getrandbits(64))
        around = HubSurroundings(
            now_ms=self.now_ms, steady_ms=lambda: int(world.loop.time() * 1000), entropy=entropy, executor=lambda _name: SimExecutor(world.loop, lambda: COMMIT_S * delay.random()),
            client=partial(SimClient, world.broker, self.path), store=lambda path: ObservedStore(path, world), pace=world.hub_pace, silent_after_ms=2_000_000,
        )
        self.hub = Hub(HubSettings(self._folder, token="simulated"), around)
        world.oracle.hub_booted(self.hub)
        self.hub.serve(SimulatedBroker())

    def kill(self, back_s: float, restore: int | None = None) -> None:
        """The hub ends without a word; it comes back, perhaps from a backup."""
        if self.life is None:
            return
        self.world.trace("hub", "killed" if restore is None else f"killed, backup {restore} will be restored")
        self.life.alive = False
        hub, self.life, self.hub = self.hub, None, None
        assert hub is not None
        hub.store.close()
        for connection in list(self.path.connections):
            connection.close_by_client("the process ended")
        if restore is not None and self.backups:
            content = self.backups[max(0, len(self.backups) - 1 - restore)]
            for suffix in ("-wal", "-shm"):
                FilePath(f"{self._folder / 'hub.db'}{suffix}").unlink(missing_ok=True)
            (self._folder / "hub.db").write_bytes(content)
            self.world.oracle.hub_restored()
        self.world.loop.call_later(back_s, self.boot, context=self.world.loop.outside)

    def backup(self) -> None:
        """Keep the store as it is now."""
        if self.hub is not None:
            memory = sqlite3.connect(":memory:")
            with sqlite3.connect(self._folder / "hub.db") as source:
                source.backup(memory)
            source.close()
            self.backups = [*self.backups, memory.serialize()][-BACKUPS_MAX:]
            memory.close()
            self.world.happened["backup"] += 1
            self.world.trace("hub", "backup")

    def change(self, edge: str, change: dict[str, Any]) -> None:
        """Someone at the hub wants something else of an edge."""
        hub, life = self.hub, self.life
        if hub is None or life is None:
            return

        def told(done: "asyncio.Task[dict[str, Any]]") -> None:
            if done.cancelled():
                return
            if isinstance(done.exception(), ContractError):
                self.world.trace("hub", f"desired state of {edge} refused: {done.exception()}")
            elif done.exception() is not None:
                self.world.oracle.violation("hub", "desired", f"{type(done.exception()).__name__}: {done.exception()}")
            else:
                self.world.trace("hub", f"wants generation {done.result()['generation']} of {edge}")

        life.run(lambda: self.world.loop.create_task(hub.change_desired(edge, change)).add_done_callback(told))

    def attend(self, edge: str, gone: Callable[[], set[str]]) -> None:
        """From now on an administrator looks in now and then and ends a quarantine of `edge` that names a boot of the machine that is `gone`.

        Once is not enough: the hub may be away just then, hear late what its broker kept, or come back from a backup of before the release. One that
        names no such boot stays, and the run does not converge.
        """
        hub, life = self.hub, self.life
        row = hub.fleet.rows.get(edge) if hub is not None else None
        if hub is not None and life is not None and row is not None and any(boot in row.quarantine for boot in gone()):
            self.world.trace("hub", f"the quarantine of {edge} is ended")
            life.run(lambda: self.world.loop.create_task(hub.release(edge)))
        self.world.loop.call_later(ATTEND_S, self.attend, edge, gone, context=self.world.loop.outside)

    def close(self) -> None:
        """The run is over."""
        if self.hub is not None:
            self.hub.store.close()
        shutil.rmtree(self._folder, ignore_errors=True)
