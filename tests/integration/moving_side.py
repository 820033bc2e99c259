"""What the tests of workloads that move within a site share: what runs where, looked at all the time, and the documents."""

import asyncio
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_runtime.workloads.drivers import lease
from hub.server import Hub
from tests.unit.workloads.image_side import archive, layout

from .container_side import base, end_all

Json = dict[str, Any]


def lasting(name: str, **more: Any) -> Json:
    """A container that runs until it is asked to end."""
    command = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"]
    return {"id": name, "kind": "container", "image": "box:1", "requests": {"cpu": "100m", "memory": "32Mi"}, "spec": {"command": command}, **more}


def give_image(data: Path, scratch: Path) -> None:
    """Put the image where an edge looks for it."""
    archives = data / "workloads/archives"
    archives.mkdir(parents=True)
    archive(layout(scratch, [base()], name="box:1"), archives / "box.tar")


def end_containers(data: Path) -> None:
    """Everything that an edge left."""
    from edge_runtime.workloads.drivers.container import ContainerDriver
    from edge_runtime.workloads.images import ImageStore

    store = ImageStore(data / "workloads/images")
    end_all(ContainerDriver(data / "workloads", store))
    store.close()
    for name in ("camera.1", "meter.1"):
        lease.remove(data.resolve() / "workloads/containers" / name)


def pids(data: Path, workload: str) -> list[int]:
    """The first processes of a workload's containers that run there."""
    found = []
    for running in (data / "workloads/containers").glob(f"{workload}.*/running.json"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(json.loads(running.read_text())["pid"])
            if b"novacron" in Path(f"/proc/{pid}/cgroup").read_bytes():
                found.append(pid)
    return found


def where(folders: Mapping[str, Path], workload: str) -> list[str]:
    """Edges on which a workload runs now."""
    return [name for name, data in folders.items() for _ in pids(data, workload)]


def wanted(hub: Hub, edge: str, workload: str) -> list[tuple[int, str]]:
    """What the hub wants of an edge and a workload."""
    entries = (hub.desired.get(edge) or {"spec": {}})["spec"].get("workloads", [])
    return [(entry["epoch"], entry["wanted"]) for entry in entries if entry["id"] == workload]


LOOK_S = 0.05
"""Seconds between two looks: there is no event for what another machine's processes are."""


class Watch:
    """Looks all the time where a workload runs: `lives` are edge and process of each life, `twice` moments at which there were two."""

    def __init__(self, folders: Mapping[str, Path], workload: str) -> None:
        self._folders, self._workload = folders, workload
        self.twice: list[list[tuple[str, int]]] = []
        self.lives: list[tuple[str, int]] = []
        self._over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Watch":
        self._task = asyncio.get_running_loop().create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._over.set()
        await self._task

    def edges(self) -> list[str]:
        """The edge of each life."""
        return [name for name, _ in self.lives]

    async def _run(self) -> None:
        while not self._over.is_set():
            there = [(name, pid) for name, data in self._folders.items() for pid in pids(data, self._workload)]
            if len(there) > 1:
                self.twice.append(there)
            self.lives += [one for one in there if one not in self.lives]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), LOOK_S)
