"""An agent that carries out operations, as a process that can be killed at any step: `python -m tests.system.operation_agent FOLDER OPERATIONS [POINT]`.

OPERATIONS is a JSON list of [id, kind, more fields of `spec.operations`]; they are asked for one after the other, and the agent ends when the last has ended; it prints how each did. POINT is a step of the last one at which it
is killed: `accepted`, `taking`, `clearing`, `placing` (written down), what `container_checkpoint.STEPS` has, `deleted`, `laid`, `criu`, `running`, `back` (of a restore), `standing`, `copied`, `finished`, `written` (of a snapshot), or `ended` (not written down yet).
With `keeper:` before one of `container_checkpoint.STEPS` the workload's keeper is killed first.
"""

import asyncio
import hashlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from edge_runtime.config import EdgeConfig
from edge_runtime.config.schema import ApiConfig, BusConfig, DevicesConfig, HostConfig, JournalConfig, UplinkConfig, WorkloadsConfig
from edge_runtime.contract.desired import parse_desired
from edge_runtime.contract.operations import FINAL_STATES
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.workloads.drivers import container_snapshot
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.face import Key
from edge_runtime.workloads.images.archive import ArchiveWriter
from edge_runtime.workloads.operations import Operations
from edge_runtime.workloads.snapshots import Snapshotting
from tests.integration.checkpoint_side import program
from tests.system.checkpoint_agent import keeper_of

EDGE = "operating"
COUNTS = "trap 'exit 0' TERM; i=0; while true; do echo $i >> /shared/numbers; i=$((i+1)); sleep 0.005; done"
RESTORE = {"laid": "", "criu": "restore/restore.log", "running": "running.json"}
"""Files by which it is seen from outside how far a restore has come."""

LOOK_S = 0.01


def key(folder: Path) -> Key:
    """The workload's. Control groups are the machine's: each test has a name of its own."""
    return Key(f"op-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}", 1)


def config(folder: Path) -> EdgeConfig:
    """One edge without link, bus and API."""
    return EdgeConfig(
        edge_id=EDGE, data_dir=str(folder / "data"), uplink=UplinkConfig(enabled=False), bus=BusConfig(enabled=False), api=ApiConfig(enabled=False), devices=DevicesConfig(host=HostConfig(enabled=False)),
        journal=JournalConfig(min_free_bytes=0, ballast_bytes=0, target_hours=0),
        workloads=WorkloadsConfig(enabled=True, runtimes=("runc",), criu=program(), functions=False, reserve_cpu_milli=0, reserve_memory_bytes=0, reserve_disk_bytes=0, evict_memory_bytes=0, evict_disk_bytes=0, mounts=(str(folder / "shared"),)),
    )


def desired(folder: Path, generation: int, operations: list[list[Any]]) -> Any:
    """The workload, and what shall be done with it."""
    one, epoch = key(folder).id, key(folder).epoch
    spec = {"command": ["sh", "-c", COUNTS], "restart": "always", "mounts": [{"target": "/shared", "source": str(folder / "shared"), "read_only": False}]}
    return parse_desired({
        "v": 1, "edge": EDGE, "generation": generation, "spec": {
            "workloads": [{"id": one, "epoch": epoch, "wanted": "running", "kind": "container", "image": "box:1", "document": {"id": one, "image": "box:1", "spec": spec}}],
            "operations": [{"id": name, "kind": kind, "workload": one, "epoch": epoch, "expires_ms": 2**53, **more} for name, kind, more in operations],
        },
    }, EDGE)


def killed_at(folder: Path, point: str, last: str) -> None:
    """Have this process killed there, in the operation `last`."""
    def kill(word: str) -> None:
        if word == point:
            print(f"killed at {point}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def kill_both(driver: ContainerDriver, word: str) -> None:
        if point == f"keeper:{word}":
            descriptor = os.pidfd_open(keeper := keeper_of(driver.folder(key(folder))))
            os.kill(keeper, signal.SIGKILL)
            select.select([descriptor], [], [])
            kill(point)
        kill(word)

    reach, end, checkpoint, delete, restore = Operations.reach, Operations.end, ContainerDriver.checkpoint, ContainerDriver.delete, ContainerDriver.restore
    now = [""]

    async def reached(self: Operations, name: str, step: str) -> None:
        now[0] = name
        if name == last:
            kill("accepted")
        await reach(self, name, step)
        if name == last:
            kill(step)

    def over(self: Operations, name: str, *rest: Any) -> None:
        end(self, name, *rest)
        if name == last:
            kill("ended")

    async def taken(self: ContainerDriver, *rest: Any, **more: Any) -> Any:
        return await checkpoint(self, *rest, **more, step=partial(kill_both, self) if now[0] == last else None)

    async def deleted(self: ContainerDriver, one: Key) -> None:
        await delete(self, one)
        if one == key(folder) and now[0] == last:
            kill("deleted")

    async def restored(self: ContainerDriver, *rest: Any, **more: Any) -> Any:
        if point in RESTORE and now[0] == last:
            where = self.folder(key(folder)) / RESTORE[point]

            def watch() -> None:
                while not where.exists():
                    time.sleep(0.0002)
                kill(point)

            threading.Thread(target=watch, daemon=True).start()
        found = await restore(self, *rest, **more)
        if now[0] == last:
            kill("back")
        return found

    pack, make, finish = container_snapshot._pack, Snapshotting._archive, ArchiveWriter.finish

    def packed(*rest: Any) -> None:
        kill("standing")
        pack(*rest)

    def made(self: Snapshotting, *rest: Any) -> None:
        kill("copied")
        make(self, *rest)
        kill("written")

    def finished(self: ArchiveWriter, *rest: Any) -> str:
        found = finish(self, *rest)
        kill("finished")
        return found

    for where, name, other in ((container_snapshot, "_pack", packed), (Snapshotting, "_archive", made), (ArchiveWriter, "finish", finished)):
        setattr(where, name, other)
    for where, name, other in ((Operations, "reach", reached), (Operations, "end", over), (ContainerDriver, "checkpoint", taken), (ContainerDriver, "delete", deleted), (ContainerDriver, "restore", restored)):
        setattr(where, name, other)


async def lived(folder: Path, operations: list[list[Any]]) -> None:
    """One agent's life."""
    runtime = EdgeRuntime(config(folder))
    await runtime.start()
    generation = runtime.desired.generation if runtime.desired else 0
    numbers = folder / "shared/numbers"

    async def until(true: Callable[[], bool]) -> None:
        while not true():  # the test that waits for this process bounds it
            await asyncio.sleep(LOOK_S)

    runtime.desired_state.receive(desired(folder, generation + 1, []))
    await until(lambda: numbers.exists() and len(numbers.read_text().splitlines()) > 3)
    for at, (name, _, _) in enumerate(operations):
        runtime.desired_state.receive(desired(folder, generation + 2 + at, operations[: at + 1]))
        await until(lambda name=name: (runtime.workload_node().asked.operation(name) or {}).get("state") in FINAL_STATES)  # type: ignore[misc]
        print(json.dumps(runtime.workload_node().asked.operation(name)), flush=True)
    await runtime.stop("test")


def main() -> int:
    """See the module."""
    folder, operations = Path(sys.argv[1]), json.loads(sys.argv[2])
    if len(sys.argv) > 3:
        killed_at(folder, sys.argv[3], operations[-1][0])
    asyncio.run(lived(folder, operations))
    return 0


if __name__ == "__main__":
    sys.exit(main())
