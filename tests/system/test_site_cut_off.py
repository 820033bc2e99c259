"""A site that is cut off, through everything: hub, brokers, agents as processes, real containers. What ran on an edge that dies runs on a sibling, once, and the hub finds it there when it is back."""

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub.server import Hub
from hub.workloads.documents import read_list
from tests.integration.container_side import base, end_all, reason_against
from tests.integration.edges import LocalBroker
from tests.integration.hub_side import Mosquitto, needs_mosquitto, running_hub
from tests.integration.waiting import until
from tests.integration.workload_side import clean
from tests.unit.workloads.image_side import archive, layout
from tools.bench.agent import Agent
from tools.ending import ended

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), needs_mosquitto, pytest.mark.system, pytest.mark.slow]

Json = dict[str, Any]
NAMES = ("gw-1", "gw-2", "gw-3")


def work(name: str, **more: Any) -> Json:
    command = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"]
    return {"id": name, "kind": "container", "image": "box:1", "requests": {"cpu": "100m", "memory": "32Mi"}, "spec": {"command": command}, **more}


class Member:
    """An edge of the site, as a process of its own."""

    def __init__(self, name: str, folder: Path, bus: int, uplink: int) -> None:
        self.name, self.data = name, folder / name
        archives = self.data / "workloads/archives"
        archives.mkdir(parents=True)
        archive(layout(folder / f"in-{name}", [base()], name="box:1"), archives / "box.tar")
        self._bus, self._uplink = bus, uplink
        self.agent: Agent | None = None

    def start(self) -> None:
        self.agent = Agent(self._bus, api=False, uplink_port=self._uplink, model="", host=False, data=self.data, extra={
            "edge_id": self.name, "site": "hall-2", "duties": {"enabled": True}, "decisions": {}, "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0},
            "workloads": {"enabled": True, "reserve_cpu_milli": 0, "reserve_memory_bytes": 0, "reserve_disk_bytes": 0, "runtimes": ["runc"]},
        })
        self.agent.__enter__()

    def kill(self) -> None:
        """SIGKILL of the agent; its containers have keepers of their own."""
        assert self.agent is not None
        self.agent.kill()
        self.agent.__exit__()
        self.agent = None

    def end(self) -> None:
        """Kill the agent where it runs, and everything that it left."""
        if self.agent is not None:
            self.kill()
        from edge_runtime.workloads.drivers.container import ContainerDriver
        from edge_runtime.workloads.images import ImageStore

        store = ImageStore(self.data / "workloads/images")
        end_all(ContainerDriver(self.data / "workloads", store))
        store.close()

    def pids(self, name: str) -> list[int]:
        """The first processes of a workload's containers that run here."""
        found = []
        for running in (self.data / "workloads/containers").glob(f"{name}.*/running.json"):
            with contextlib.suppress(OSError, ValueError):
                pid = int(json.loads(running.read_text())["pid"])
                if b"novacron" in Path(f"/proc/{pid}/cgroup").read_bytes():
                    found.append(pid)
        return found


def where(members: dict[str, Member], workload: str) -> list[str]:
    """Where a workload runs now."""
    return [name for name, member in members.items() for _ in member.pids(workload)]


class Watch:
    """Looks all the time where a workload runs."""

    def __init__(self, members: dict[str, Member], workload: str) -> None:
        self._members, self._workload = members, workload
        self.twice: list[list[str]] = []
        self.seen: list[tuple[str, int]] = []
        self._task = asyncio.get_running_loop().create_task(self._run())

    def where(self) -> list[str]:
        return where(self._members, self._workload)

    async def _run(self) -> None:
        while True:
            if len(there := self.where()) > 1:
                self.twice.append(there)
            for name, member in self._members.items():
                self.seen += [(name, pid) for pid in member.pids(self._workload) if (name, pid) not in self.seen]
            await asyncio.sleep(0.05)

    async def end(self) -> None:
        await ended(self._task)


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[LocalBroker]:
    broker = LocalBroker(tmp_path / "bus")
    broker.start()
    yield broker
    broker.stop()


def wanted(hub: Hub, edge: str) -> list[tuple[str, int, str]]:
    """What the hub wants of an edge, without the workload that stays."""
    entries = (hub.desired.get(edge) or {"spec": {}})["spec"].get("workloads", [])
    return [(entry["id"], entry["epoch"], entry["wanted"]) for entry in entries if entry["id"] != "meter"]


async def nodes_there(hub: Hub) -> None:
    await until(lambda: all(name in hub.workloads.planner.tables.nodes and hub.workloads.planner.runs(name) == ["container"] for name in NAMES), 60.0, what="nodes that run containers")


async def test_what_ran_on_a_killed_edge_runs_on_a_sibling_once_and_the_hub_finds_it_there(tmp_path: Path, bus: LocalBroker) -> None:
    cloud = Mosquitto(tmp_path / "cloud")
    await cloud.start()
    members = {name: Member(name, tmp_path, bus.port, cloud.port) for name in NAMES}
    watch = Watch(members, "camera")
    try:
        await asyncio.gather(*(asyncio.to_thread(member.start) for member in members.values()))
        async with running_hub(tmp_path / "hub", cloud.url) as hub:
            await nodes_there(hub)
            await hub.workloads.submit(read_list([work("camera", when_cut_off="move"), work("meter")]))
            await until(lambda: len(watch.where()) == 1, 120.0, what="the workload that may move runs")
            await until(lambda: len(where(members, "meter")) == 1, 60.0, what="the one that stays runs")
            origin, row = hub.workloads.rows["camera"].node, hub.workloads.rows["camera"]
            assert watch.where() == [origin] and row.epoch == 1
            meter = hub.workloads.rows["meter"].node
        await cloud.kill()
        pid = members[origin].pids("camera")[0]
        members[origin].kill()
        assert os.path.exists(f"/proc/{pid}"), "a container outlives its agent"
        await until(lambda: not os.path.exists(f"/proc/{pid}"), 45.0, what="its keeper ends it, without an agent")
        await until(lambda: len(watch.where()) == 1, 90.0, what="a sibling runs it")
        (other,) = watch.where()
        moved = members[other].pids("camera")
        assert other != origin and where(members, "meter") == [meter], "what stays has stayed"

        await asyncio.to_thread(members[origin].start)
        await cloud.start()
        async with running_hub(tmp_path / "hub", cloud.url) as hub:
            await until(lambda: hub.workloads.rows["camera"].node == other, 90.0, what="the hub sees it there")
            await until(lambda: wanted(hub, other) == [("camera", 1, "running")] and wanted(hub, origin) == [], 30.0, what="both are told")
            assert hub.workloads.rows["camera"].epoch == 1 and hub.workloads.rows["camera"].state == "placed"
            await nodes_there(hub)
            clean(hub)
            await hub.workloads.ask(lambda planner, now: planner.cancel("camera", now))
            assert members[other].pids("camera") == moved, "it was never begun anew there"
            await until(lambda: hub.workloads.rows["camera"].state == "cancelled", 60.0, what="its end at the hub")
            assert watch.where() == []
        assert watch.twice == [] and [name for name, _ in watch.seen] == [origin, other]
    finally:
        await watch.end()
        await asyncio.gather(*(asyncio.to_thread(member.end) for member in members.values()))
        await cloud.kill()
