"""Two nodes, each an agent as a process, and a hub: what the tests of moves share. The workload is the witness: it writes 0, 1, 2.. to a folder that both nodes have.

A number that is there twice was written by two copies, or by one that went on from too early; one that is missing was lost; a workload that began anew begins with 0.
"""

import asyncio
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.images import ImageStore
from hub.server import Hub
from hub.transfers.service import worker_token
from hub.workloads import moving
from hub.workloads.documents import read_list
from tests.integration.checkpoint_side import program
from tests.integration.container_side import base, end_all
from tests.integration.waiting import until
from tests.unit.workloads.image_side import archive, layout
from tools.bench.agent import Agent

Json = dict[str, Any]

ROOM_S = 240.0
"""For what takes some seconds on a machine of one's own."""

COUNTS = "trap 'exit 0' TERM; i=0; while true; do echo $i >> /shared/numbers; i=$((i+1)); sleep 0.01; done"


class Node:
    """One agent, which can be killed and started again."""

    FOLDER = "containers"
    """Where its driver has its instances."""

    def __init__(self, folder: Path, hub: Hub, name: str, **workloads: Any) -> None:
        self.name, self.data = name, folder / name / "data"
        archives = self.data / "workloads/archives"
        archives.mkdir(parents=True)
        self.give_image(archives, folder / name / "in")
        token = folder / name / "token"
        token.touch(mode=0o600)
        token.write_text(worker_token(hub.token, name))
        self._workloads = {
            "enabled": True, "reserve_cpu_milli": 0, "reserve_memory_bytes": 0, "reserve_disk_bytes": 0, "evict_memory_bytes": 0, "evict_disk_bytes": 0, "runtimes": ["runc"], "criu": program(), "functions": False,
            "mounts": [str(folder / "shared")], "moves_hub": f"http://127.0.0.1:{hub.port}", "moves_token_file": str(token), **workloads,
        }
        self._port, self._program, self.agent = hub.broker.port, ("-m", "edge_runtime"), None

    agent: Agent | None

    def give_image(self, archives: Path, scratch: Path) -> None:
        """What its workload runs from."""
        archive(layout(scratch, [base()], name="box:1"), archives / "box.tar")

    def start(self, program: tuple[str, ...] = ("-m", "edge_runtime"), **environment: str) -> None:
        """Start it; `program`: another one that is it."""
        self.agent = Agent(0, api=False, uplink_port=self._port, model="", host=False, data=self.data, program=program, environment=environment, extra={
            "edge_id": self.name, "bus": {"enabled": False}, "workloads": self._workloads, "decisions": {}, "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0},
        })
        self.agent.__enter__()

    def kill(self) -> None:
        """SIGKILL."""
        if self.agent is not None:
            self.agent.kill()
            self.agent.__exit__()
            self.agent = None

    def driver(self) -> tuple[ContainerDriver, ImageStore]:
        """To look at what is on its disk, or to end it."""
        store = ImageStore(self.data / "workloads/images")
        return ContainerDriver(self.data / "workloads", store), store

    def instances(self) -> list[str]:
        """What is on its disk, as `ID.EPOCH`."""
        folder = self.data / "workloads" / self.FOLDER
        return sorted(one.name for one in os.scandir(folder) if not one.name.startswith(".")) if folder.exists() else []

    def end(self) -> None:
        """Kill it, and all that it left."""
        self.kill()
        if (self.data / "workloads/images").exists():
            self.end_all()

    def end_all(self) -> None:
        """All that it left."""
        driver, store = self.driver()
        end_all(driver)
        store.close()


class Two:
    """Nodes `a` and `b`, and the witness, which runs on `a` at first."""

    NODE: type[Node] = Node
    MOVES = "container"
    """What its nodes must be able to move."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder, self.hub = folder, hub
        self.workload = f"moved-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"  # control groups are the machine's
        (folder / "shared").mkdir(exist_ok=True)
        (folder / "shared").chmod(0o777)
        self.nodes = {name: self.NODE(folder, hub, name) for name in ("a", "b")}

    async def start(self, **more: Any) -> None:
        """Both nodes are up, and the witness counts on `a`."""
        await asyncio.gather(*(asyncio.to_thread(node.start) for node in self.nodes.values()))
        await self.ready()
        await self.submit(self.workload, **more)
        await until(lambda: self.said(self.workload)[-1:] == ["running"] and len(self.numbers()) > 3, ROOM_S, what="it counts")

    async def ready(self, *names: str) -> None:
        """Until these nodes (or both) have told that they can move states."""
        tables = self.hub.workloads.planner.tables
        for name in names or ("a", "b"):
            await until(lambda name=name: name in tables.nodes and (tables.nodes[name].document.get("labels") or {}).get(f"novacron.moves/{self.MOVES}") == "true" and self.hub.workloads.planner.is_up(name), ROOM_S, what=f"{name} can move states")

    def document(self, name: str, **more: Any) -> Json:
        """The witness."""
        spec = {"command": ["sh", "-c", COUNTS], "mounts": [{"target": "/shared", "source": str(self.folder / "shared"), "read_only": False, "shared": True}]}
        return {"id": name, "kind": "container", "image": "box:1", "requests": {"cpu": "100m", "memory": "64Mi"}, "spec": spec, **more}

    async def submit(self, name: str, **more: Any) -> None:
        """The witness; on `a`, as `b` takes nothing new meanwhile."""
        await self.hub.workloads.ask(lambda planner, now: planner.cordon("b", "cordon", now))
        await self.hub.workloads.submit(read_list([self.document(name, **more)]))
        await until(lambda: self.hub.workloads.rows[name].node == "a", ROOM_S)
        await self.hub.workloads.ask(lambda planner, now: planner.cordon("b", "", now))

    def said(self, name: str) -> list[str]:
        """States that edges told of a workload, in order."""
        bodies = [json.loads(item.record.body) for _, item in self.hub.store.read_events_after(("workload",), 0, 1000)[0]]
        return [one["state"] for one in bodies if one["id"] == name]

    def numbers(self) -> list[int]:
        """What the witness has written, whole lines."""
        with suppress(FileNotFoundError):
            return [int(one) for one in (self.folder / "shared/numbers").read_text().split("\n")[:-1]]
        return []

    async def move(self, name: str) -> Json:
        """As it is kept."""
        return dict(await self.hub.workloads.look(lambda planner: planner.tables.moves[name]))

    async def over(self, name: str) -> Json:
        """How a move ended."""
        async def ended() -> bool:
            return bool((await self.move(name))["state"] != "running")

        try:
            await until(ended, ROOM_S, what=f"the end of {name}")
        except AssertionError as error:
            carried = self.hub.transfers.book.transfers.get(name)
            raise AssertionError(f"{error}: {await self.move(name)}; {carried}; {self.hub.transfers.workers()}") from None
        return await self.move(name)

    async def one_copy(self) -> str:
        """Which node runs it, after it was seen that it goes on, has left nothing out, and is nowhere else in the end."""
        row = self.hub.workloads.rows[self.workload]
        seen = len(self.numbers())
        await until(lambda: len(self.numbers()) > seen + 3, ROOM_S, what="it goes on")
        found = self.numbers()
        assert found == list(range(len(found))), next((at, found[max(0, at - 1):at + 3]) for at in range(len(found)) if found[at] != at)
        here, other = row.node, "b" if row.node == "a" else "a"
        await until(lambda: self.nodes[other].instances() == [], ROOM_S, what="nothing of it is left at the other node")
        await until(lambda: len(self.hub.workloads.planner.tables.epochs[self.workload]) == 1, ROOM_S, what="the hub has heard that it stopped there")
        # An agent that has just started also has its probe there, for a moment.
        await until(lambda: self.nodes[here].instances() == [f"{self.workload}.{row.epoch}"], ROOM_S, what="it is all that is left")
        return here

    async def end(self) -> None:
        """End all of it."""
        for node in self.nodes.values():
            await asyncio.to_thread(node.end)


async def known(two: Two) -> None:
    """Until the hub knows that it runs."""
    async def may() -> bool:
        return str(await two.hub.workloads.look(lambda planner: moving.why_not(planner, planner.tables.rows[two.workload]))) == ""

    await until(may, ROOM_S, what="the hub knows that it runs")


async def begun(two: Two, target: str) -> str:
    """A move to a node."""
    await known(two)
    found = await two.hub.workloads.ask(lambda planner, now: moving.begin(planner, two.workload, target, now, "asked for"))
    return str(found["id"])


async def killed_once(two: Two, name: str, point: str) -> Path:
    """Node `name` is an agent now that is killed at a point; what is there when that has been."""
    mark, node, rows = two.folder / f"killed-{name}-{point.replace(' ', '-')}", two.nodes[name], two.hub.fleet.rows
    before = rows[name].boot
    await asyncio.to_thread(node.kill)
    await asyncio.to_thread(node.start, ("-m", "tests.system.moving_agent", point, str(mark)))

    def heard() -> bool:
        """Of the new one: that the old one has gone the hub may have to learn still, and it seems to be up until then."""
        return rows[name].boot != before and rows[name].state == "online"

    await until(heard, ROOM_S, what=f"the hub hears the new {name}")
    await two.ready(name)
    return mark


async def again_when_killed(two: Two, name: str, mark: Path) -> None:
    """The next agent, once that one has been killed at its point."""
    await until(mark.exists, ROOM_S, what=f"{name} is killed at {mark.name}")
    await asyncio.to_thread(two.nodes[name].kill)
    await asyncio.to_thread(two.nodes[name].start)


async def killed_at(two: Two, source: str, target: str) -> None:
    """A move whose agents are killed at those points (empty: at none): one copy runs at the target in the end. Ends all that it starts."""
    try:
        await two.start()
        marks = {name: await killed_once(two, name, point) for name, point in (("a", source), ("b", target)) if point}
        name = await begun(two, "b")
        await asyncio.gather(*(again_when_killed(two, node, mark) for node, mark in marks.items()))
        assert (await two.over(name))["state"] == "done" and await two.one_copy() == "b"
    finally:
        await two.end()


async def goes_on_at_its_source(two: Two, point: str) -> None:
    """A move to an agent that refuses what comes, with the source's killed at that point (empty: not): it goes on where it was, and nothing of its way is left. Ends all that it starts."""
    try:
        await two.start()
        mark = await killed_once(two, "a", point) if point else None
        await killed_once(two, "b", "refuses")
        name = await begun(two, "b")
        if mark is not None:
            await again_when_killed(two, "a", mark)
        ended = await two.over(name)
        assert ended["state"] == "failed" and "b could not go on with it" in ended["reason"] and "planted" in ended["reason"]
        assert await two.one_copy() == "a" and two.hub.workloads.rows[two.workload].epoch == 1
        left = two.nodes["a"].data / "workloads/checkpoints" / two.workload
        await until(lambda: not left.exists() or not os.listdir(left), ROOM_S, what="its state is gone")
    finally:
        await two.end()
