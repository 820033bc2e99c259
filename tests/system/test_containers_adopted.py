"""Containers through everything: hub, agent as a process, runtime. What is submitted runs, what ends is told, what is not wanted stops, and a killed agent's containers are the next one's."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from hub.server import Hub
from hub.workloads.documents import read_list
from tests.integration import registry_side
from tests.integration.container_side import base, reason_against
from tests.integration.hub_side import running_hub
from tests.integration.waiting import until
from tests.unit.workloads.image_side import archive, docker_save, layout
from tools.bench.agent import Agent

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), pytest.mark.system]

Json = dict[str, Any]


def work(name: str, script: str, image: str = "box:1", **spec: Any) -> Json:
    return {"id": name, "kind": "container", "image": image, "requests": {"cpu": "100m", "memory": "32Mi"}, "spec": {"command": ["sh", "-c", script], **spec}}


async def submit(hub: Hub, *documents: Json) -> None:
    await hub.workloads.submit(read_list(list(documents)))


def said(hub: Hub) -> list[tuple[str, int, str, str]]:
    """All that the edge said of workloads, in order."""
    bodies = [json.loads(item.record.body) for _, item in hub.store.read_events_after(("workload",), 0, 1000)[0]]
    return [(one["id"], one["epoch"], one["state"], one["reason"]) for one in bodies]


def states(hub: Hub, name: str) -> list[str]:
    return [state for one, _, state, _ in said(hub) if one == name]


class Node:
    """An agent process that runs containers, and a look at what runs."""

    def __init__(self, folder: Path, hub: Hub, **workloads: Any) -> None:
        self._workloads = workloads
        self.data = folder / "data"
        archives = self.data / "workloads/archives"
        archives.mkdir(parents=True)
        archive(layout(folder / "in", [base()], name="box:1"), archives / "box.tar")
        docker_save(archives / "other.tar", [base()], name="other:2")
        (archives / "broken.tar").write_bytes(b"not a tar" * 100)
        self._port = hub.broker.port
        self.agent: Agent | None = None

    def start(self, api: bool = False) -> None:
        self.agent = Agent(0, api=api, uplink_port=self._port, model="", host=False, data=self.data, extra={
            "bus": {"enabled": False}, "workloads": {"enabled": True, "reserve_cpu_milli": 0, "reserve_memory_bytes": 0, "reserve_disk_bytes": 0, "runtimes": ["runc"], "functions": False, **self._workloads}, "decisions": {},
            "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0},
        })
        self.agent.__enter__()

    def kill(self) -> None:
        """SIGKILL."""
        assert self.agent is not None
        self.agent.kill()
        self.agent.__exit__()

    def stop(self) -> None:
        """SIGTERM, as at an update."""
        assert self.agent is not None
        self.agent.__exit__()

    def end(self) -> None:
        """Kill the agent where it runs, and everything that it left."""
        if self.agent is not None:
            self.kill()
        from edge_runtime.workloads.drivers.container import ContainerDriver
        from edge_runtime.workloads.images import ImageStore
        from tests.integration.container_side import end_all

        store = ImageStore(self.data / "workloads/images")
        end_all(ContainerDriver(self.data / "workloads", store))
        store.close()

    def pid(self, name: str, epoch: int = 1) -> int:
        return int(json.loads((self.data / f"workloads/containers/{name}.{epoch}/running.json").read_text())["pid"])

    def there(self, name: str, epoch: int = 1) -> bool:
        return (self.data / f"workloads/containers/{name}.{epoch}").exists()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_workloads_run_end_stop_and_outlive_a_killed_agent(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub)
        try:
            await asyncio.to_thread(node.start)
            await until(lambda: "bench-edge" in hub.workloads.planner.tables.nodes and hub.workloads.planner.runs("bench-edge") == ["container", "function", "batch"], 40.0, what="a node that runs containers")
            await submit(
                hub, work("good", "echo fine"), work("bad", "exit 7"), work("lasting", "trap 'exit 0' TERM; while :; do sleep 0.1; done"), work("later", "trap 'exit 9' USR1; while :; do sleep 0.1; done"),
                work("odd", "true", privileged=True), work("absent", "true", image="nowhere:1"), work("docker", "exit 0", image="other:2"),
            )
            await until(lambda: states(hub, "good")[-1:] == ["done"] and states(hub, "docker")[-1:] == ["done"] and states(hub, "bad")[-1:] == ["failed"], 60.0, what="the ends")
            await until(lambda: states(hub, "lasting") == states(hub, "later") == ["accepted", "running"], 60.0, what="the lasting ones")
            await until(lambda: "refused" in states(hub, "odd") and "refused" in states(hub, "absent"), 60.0, what="refusals")
            reasons = {name: reason for name, _, state, reason in said(hub) if state in ("refused", "failed")}
            assert reasons["bad"] == "exit code 7" and "privileged" in reasons["odd"] and "nowhere:1 is not on this node" in reasons["absent"] and "broken.tar" in reasons["absent"]
            await until(lambda: hub.workloads.rows["good"].state == "done" and hub.workloads.rows["bad"].state == "failed", what="the hub's rows")
            await until(lambda: not node.there("good") and not node.there("bad"), 30.0, what="what ended is removed once the hub has heard of it")
            pids = {name: node.pid(name) for name in ("lasting", "later")}

            assert node.agent is not None
            agents = os.getpriority(os.PRIO_PROCESS, node.agent.pid)
            assert all(os.getpriority(os.PRIO_PROCESS, pid) == max(0, agents) for pid in pids.values()), "the agent prefers itself, not what it starts"

            await asyncio.to_thread(node.kill)
            assert all(alive(pid) for pid in pids.values())
            os.kill(pids["later"], signal.SIGUSR1)
            await until((node.data / "workloads/containers/later.1/exit.json").exists, 30.0, what="an end while there is no agent")
            await asyncio.to_thread(node.start)
            await until(lambda: states(hub, "later") == ["accepted", "running", "failed"], 60.0, what="the end that nobody saw")
            assert ("later", 1, "failed", "exit code 9") in said(hub)
            assert node.pid("lasting") == pids["lasting"] and alive(pids["lasting"]) and states(hub, "lasting") == ["accepted", "running"]

            await asyncio.to_thread(node.stop)
            await asyncio.to_thread(node.start)
            assert node.pid("lasting") == pids["lasting"] and alive(pids["lasting"])

            await hub.workloads.ask(lambda planner, now: planner.cancel("lasting", now))
            await until(lambda: states(hub, "lasting") == ["accepted", "running", "stopped"], 60.0, what="the stop")
            assert not alive(pids["lasting"]) and not node.there("lasting")
            await until(lambda: hub.workloads.rows["lasting"].state == "cancelled", what="its end at the hub")
        finally:
            await asyncio.to_thread(node.end)


@pytest.mark.skipif(bool(registry_side.reason_against()), reason=registry_side.reason_against())
async def test_an_agent_with_an_interface_fetches_an_image(tmp_path: Path) -> None:
    """Its interface needs half of a package of which the other half fetches."""
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        with registry_side.registry(tmp_path / "registry") as registry:
            await asyncio.to_thread(registry_side.push, registry, "box", "1", layout(tmp_path / "pushed", [base()], name="box:1"))
            node = Node(tmp_path, hub, registries=[{"host": registry, "insecure": True}])
            try:
                await asyncio.to_thread(node.start, True)
                await submit(hub, work("fetched", "exit 0", image=f"{registry}/box:1"))
                await until(lambda: states(hub, "fetched")[-1:] in (["done"], ["failed"], ["refused"]), 60.0, what="its end")
                assert said(hub)[-1][2:] == ("done", ""), said(hub)
            finally:
                await asyncio.to_thread(node.end)


@pytest.mark.skipif(bool(registry_side.reason_against()), reason=registry_side.reason_against())
async def test_an_agent_that_is_told_of_no_registry_can_speak_to_one(tmp_path: Path) -> None:
    """With a plain uplink an agent leaves TLS out of its memory, and registries speak it. (Where some are configured, reading that loads a part of it, and it stays.)"""
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub)
        try:
            await asyncio.to_thread(node.start)
            await submit(hub, work("fetched", "exit 0", image="127.0.0.1:1/box:1"))
            await until(lambda: states(hub, "fetched")[-1:] in (["failed"], ["refused"]) or any(reason for *_, reason in said(hub)), 60.0, what="why it is not there")
            assert "package" not in said(hub)[-1][3] and "127.0.0.1:1" in said(hub)[-1][3], said(hub)
        finally:
            await asyncio.to_thread(node.end)


async def test_the_umask_of_the_agents_unit_is_not_that_of_what_it_runs(tmp_path: Path) -> None:
    """A unit may keep the agent's files from others. The root folder of a container is not the agent's: nobody but root could go through it."""
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub)
        try:
            own = os.umask(0o077)
            try:
                await asyncio.to_thread(node.start)
            finally:
                os.umask(own)
            await submit(hub, work("other", "test $(stat -c %a /) = 755 && test $(cat /srv/old/a) = a && test $(id -u) = 1000", user="app"))
            await until(lambda: states(hub, "other")[-1:] in (["done"], ["failed"], ["refused"]), 60.0, what="its end")
            assert said(hub)[-1][2:] == ("done", ""), said(hub)
        finally:
            await asyncio.to_thread(node.end)


@pytest.mark.parametrize("marks", [("", "pid"), pytest.param((".", "keeper.err", "stdout.log", "running.json"), marks=pytest.mark.slow)])
async def test_an_agent_killed_at_any_moment_starts_nothing_twice(marks: tuple[str, ...], tmp_path: Path) -> None:
    """Each container says a word when it starts; the agent is killed again and again while they start: as soon as a file is there, which comes later in the start each time."""
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub)
        try:
            await asyncio.to_thread(node.start)
            await until(lambda: "bench-edge" in hub.workloads.planner.tables.nodes and hub.workloads.planner.runs("bench-edge") == ["container", "function", "batch"], 40.0, what="a node that runs containers")
            names = [f"once-{at}" for at in range(len(marks))]
            for mark, name in zip(marks, names, strict=True):
                await submit(hub, work(name, "echo began; sleep 600"))
                await until((node.data / f"workloads/containers/{name}.1" / mark).exists, 30.0, what=f"{mark} of {name}")
                await asyncio.to_thread(node.kill)
                await asyncio.to_thread(node.start)
            await until(lambda: all(states(hub, name) == ["accepted", "running"] for name in names), 90.0, what="all of them")
            for name in names:
                log = node.data / f"workloads/containers/{name}.1/stdout.log"
                await until(lambda log=log: log.exists() and log.read_text() != "", 20.0, what="its word")
                assert log.read_text() == "began\n", name
                assert alive(node.pid(name))
        finally:
            await asyncio.to_thread(node.end)
