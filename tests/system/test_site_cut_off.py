"""A site that is cut off, through everything: hub, brokers, agents as processes, real containers. What ran on an edge that dies runs on a sibling, once, and the hub finds it there when it is back."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub.server import Hub
from hub.workloads.documents import read_list
from tests.integration.container_side import reason_against
from tests.integration.edges import LocalBroker
from tests.integration.hub_side import Mosquitto, needs_mosquitto, running_hub
from tests.integration.moving_side import Watch, end_containers, give_image, lasting, pids, wanted, where
from tests.integration.waiting import until
from tests.integration.workload_side import clean
from tools.bench.agent import Agent

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), needs_mosquitto, pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(600)]

NAMES = ("gw-1", "gw-2", "gw-3")


class Member:
    """An edge of the site, as a process of its own."""

    def __init__(self, name: str, folder: Path, bus: int, uplink: int) -> None:
        self.name, self.data = name, folder / name
        give_image(self.data, folder / f"in-{name}")
        self._bus, self._uplink = bus, uplink
        self.agent: Agent | None = None

    def start(self) -> None:
        self.agent = Agent(self._bus, api=False, uplink_port=self._uplink, model="", host=False, data=self.data, extra={
            "edge_id": self.name, "site": "hall-2", "duties": {"enabled": True}, "decisions": {}, "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0},
            "workloads": {"enabled": True, "reserve_cpu_milli": 0, "reserve_memory_bytes": 0, "reserve_disk_bytes": 0, "runtimes": ["runc"], "functions": False},
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
        end_containers(self.data)


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[LocalBroker]:
    broker = LocalBroker(tmp_path / "bus")
    broker.start()
    yield broker
    broker.stop()


async def nodes_there(hub: Hub) -> None:
    await until(lambda: all(name in hub.workloads.planner.tables.nodes and "container" in hub.workloads.planner.runs(name) for name in NAMES), 60.0, what="nodes that run containers")


async def test_what_ran_on_a_killed_edge_runs_on_a_sibling_once_and_the_hub_finds_it_there(tmp_path: Path, bus: LocalBroker) -> None:
    cloud = Mosquitto(tmp_path / "cloud")
    await cloud.start()
    members = {name: Member(name, tmp_path, bus.port, cloud.port) for name in NAMES}
    folders = {name: member.data for name, member in members.items()}
    try:
        async with Watch(folders, "camera") as watch:
            await asyncio.gather(*(asyncio.to_thread(member.start) for member in members.values()))
            async with running_hub(tmp_path / "hub", cloud.url) as hub:
                await nodes_there(hub)
                await hub.workloads.submit(read_list([lasting("camera", when_cut_off="move"), lasting("meter")]))
                await until(lambda: len(where(folders, "camera")) == len(where(folders, "meter")) == 1, 120.0, what="both run")
                origin, meter = hub.workloads.rows["camera"].node, hub.workloads.rows["meter"].node
                assert where(folders, "camera") == [origin] and hub.workloads.rows["camera"].epoch == 1
            (pid,) = pids(folders[origin], "camera")
            members[origin].kill()
            await asyncio.to_thread(members[origin].start)
            await until(lambda: members[origin].agent is not None and pids(folders[origin], "camera") == [pid], what="it outlives its agent")
            await cloud.kill()
            members[origin].kill()
            began = asyncio.get_running_loop().time()
            assert os.path.exists(f"/proc/{pid}"), "a container outlives its agent"
            await until(lambda: not os.path.exists(f"/proc/{pid}"), 45.0, what="its keeper ends it, without an agent")
            await until(lambda: len(where(folders, "camera")) == 1, 90.0, what="a sibling runs it")
            print(f"a sibling runs it after {asyncio.get_running_loop().time() - began:.1f} s")
            (other,) = where(folders, "camera")
            moved = pids(folders[other], "camera")
            assert other != origin and where(folders, "meter") == [meter], "what stays has stayed"

            await asyncio.to_thread(members[origin].start)
            await cloud.start()
            async with running_hub(tmp_path / "hub", cloud.url) as hub:
                await until(lambda: hub.workloads.rows["camera"].node == other, 90.0, what="the hub sees it there")
                await until(lambda: wanted(hub, other, "camera") == [(1, "running")] and wanted(hub, origin, "camera") == [], 30.0, what="both are told")
                assert hub.workloads.rows["camera"].epoch == 1 and hub.workloads.rows["camera"].state == "placed"
                await nodes_there(hub)
                clean(hub)
                await hub.workloads.ask(lambda planner, now: planner.cancel("camera", now))
                await until(lambda: hub.workloads.rows["camera"].state == "cancelled", 60.0, what="its end at the hub")
                assert where(folders, "camera") == []
            assert watch.twice == [] and watch.lives == [(origin, pid), (other, moved[0])]
    finally:
        await asyncio.gather(*(asyncio.to_thread(member.end) for member in members.values()))
        await cloud.kill()
