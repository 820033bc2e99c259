"""Workloads that move within a site, with agents in this process, a real bus, real containers and shorter leases: a goodbye, an edge that cannot run it, a bus that is away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime.config.schema import UplinkConfig, WorkloadsConfig
from edge_runtime.site import member
from edge_runtime.workloads.drivers import lease
from hub.server import Hub
from hub.workloads.documents import read_list

from .container_side import reason_against
from .edges import Edge, LocalBroker
from .hub_side import Mosquitto, needs_mosquitto, running_hub
from .moving_side import Watch, end_containers, give_image, lasting, pids, wanted, where
from .site_edges import site_config
from .waiting import until

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), needs_mosquitto]

NAMES = ("gw-1", "gw-2", "gw-3")
SHORTER = {"RUN_LEASE_MS": 7_000, "RUN_WAIT_MS": 9_500, "RUN_SILENT_MS": 10_500, "HUB_AWAY_MS": 2_000}


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of a few seconds; a device's is six."""
    for name, value in SHORTER.items():
        monkeypatch.setattr(member, name, value)


class Hall:
    """Three edges of one site, that can be stopped and started anew."""

    def __init__(self, folder: Path, bus: int, cloud: str, images: tuple[str, ...]) -> None:
        self.folders = {name: folder / name for name in NAMES}
        workloads = WorkloadsConfig(enabled=True, reserve_cpu_milli=0, reserve_memory_bytes=0, reserve_disk_bytes=0, runtimes=("runc",), functions=False)
        uplink = UplinkConfig(url=cloud, backoff_base_s=0.2, backoff_cap_s=0.5)
        self._configs = {name: replace(site_config(name, folder, bus, (), uplink, ()), workloads=workloads) for name in NAMES}
        for name in images:
            give_image(self.folders[name], folder / f"in-{name}")
        self.edges: dict[str, Edge] = {}

    async def start(self, name: str) -> None:
        self.edges[name] = Edge(self._configs[name])
        await self.edges[name].start()


@asynccontextmanager
async def hall(folder: Path, broker: LocalBroker, cloud: Mosquitto, images: tuple[str, ...] = NAMES) -> AsyncIterator[Hall]:
    await cloud.start()
    made = Hall(folder, broker.port, cloud.url, images)
    try:
        for name in NAMES:
            await made.start(name)
        yield made
    finally:
        await asyncio.gather(*(edge.stop() for edge in made.edges.values()))
        await cloud.kill()
        for data in made.folders.values():
            await asyncio.to_thread(end_containers, data)


async def placed(hub: Hub, made: Hall, *documents: dict[str, object]) -> None:
    """Submitted, and all of them run."""
    await until(lambda: all(name in hub.workloads.planner.tables.nodes and "container" in hub.workloads.planner.runs(name) for name in NAMES), 40.0, what="nodes that run containers")
    await hub.workloads.submit(read_list(list(documents)))
    await until(lambda: all(len(where(made.folders, str(one["id"]))) == 1 for one in documents), 60.0, what="all run")


def prefers(**weights: int) -> dict[str, object]:
    """Nodes by how much they are preferred."""
    return {"preferred": [{"weight": weight, "term": {"names": [{"key": "host", "op": "In", "values": [name.replace("_", "-")]}]}} for name, weight in weights.items()]}


async def test_after_a_goodbye_the_next_that_can_runs_it_and_the_hub_leaves_it_there(tmp_path: Path, broker: LocalBroker) -> None:
    cloud = Mosquitto(tmp_path / "cloud")
    async with hall(tmp_path, broker, cloud, ("gw-1", "gw-3")) as made, Watch(made.folders, "camera") as watch:
        async with running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{cloud.port}") as hub:
            await placed(hub, made, lasting("camera", when_cut_off="move", node_affinity=prefers(gw_1=100, gw_2=50)))
            assert where(made.folders, "camera") == ["gw-1"]
        await cloud.kill()
        (pid,) = pids(made.folders["gw-1"], "camera")
        await made.edges["gw-1"].stop()
        assert pids(made.folders["gw-1"], "camera") == [pid], "a goodbye ends nothing"
        await until(lambda: where(made.folders, "camera") == ["gw-3"], 60.0, what="a sibling that has the image runs it")
        site = made.edges["gw-2"].runtime.site
        assert site is not None and site.workloads is not None and site.workloads._over == {"camera/1": "refused"}, "gw-2 was asked first"
        (moved,) = pids(made.folders["gw-3"], "camera")
        await made.edges["gw-3"].stop()
        folder = lease.folder_of(str(made.folders["gw-3"]), "camera", 1)
        last = lease.read(folder)
        await made.start("gw-3")
        await until(lambda: lease.read(folder) > last + SHORTER["RUN_LEASE_MS"], 30.0, what="the next agent goes on with it, from its journal")
        assert pids(made.folders["gw-3"], "camera") == [moved]
        await made.start("gw-1")
        await cloud.start()
        async with running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{cloud.port}") as hub:
            await until(lambda: wanted(hub, "gw-3", "camera") == [(1, "running")] and wanted(hub, "gw-1", "camera") == [], 30.0, what="the hub has it there")
            assert (hub.workloads.rows["camera"].node, hub.workloads.rows["camera"].state) == ("gw-3", "placed")
            home = made.edges["gw-3"].runtime.site
            assert home is not None and home.workloads is not None
            await until(lambda: not home.workloads._held, what="it is gw-3's own")  # type: ignore[union-attr]
            await hub.workloads.ask(lambda planner, now: planner.cancel("camera", now))
            await until(lambda: hub.workloads.rows["camera"].state == "cancelled", 30.0, what="its end at the hub")
            assert where(made.folders, "camera") == []
        assert watch.twice == [] and watch.lives == [("gw-1", pid), ("gw-3", moved)]


@pytest.mark.slow
async def test_a_bus_that_is_away_ends_what_may_move_and_leaves_what_stays(tmp_path: Path, broker: LocalBroker) -> None:
    cloud = Mosquitto(tmp_path / "cloud")
    async with hall(tmp_path, broker, cloud) as made, running_hub(tmp_path / "hub", cloud.url) as hub, Watch(made.folders, "camera") as watch:
        await placed(hub, made, lasting("camera", when_cut_off="move"), lasting("meter"))
        (node,), (meter,) = where(made.folders, "camera"), where(made.folders, "meter")
        (first,), (stays,) = pids(made.folders[node], "camera"), pids(made.folders[meter], "meter")
        broker.kill()
        broker.start()
        await until(lambda: made.edges[node].runtime.site.member.leased(made.edges[node].runtime.clock.mono_ms()), 30.0, what="the bus is back")  # type: ignore[union-attr]
        broker.kill()
        await until(lambda: where(made.folders, "camera") == [], 30.0, what="without a bus it is ended")
        await until(lambda: any("wait for the site's bus: camera" in problem for problem in made.edges[node].runtime.health()), what="it is told why")
        broker.start()
        await until(lambda: where(made.folders, "camera") == [node], 60.0, what="it begins anew at its node")
        assert watch.twice == [] and set(watch.edges()) == {node} and watch.lives[0] == (node, first)
        assert pids(made.folders[meter], "meter") == [stays] and hub.workloads.rows["camera"].epoch == 1 and hub.workloads.rows["camera"].state == "placed"
