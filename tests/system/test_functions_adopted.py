"""Functions through everything: hub, agent as a process, engine. They are called by the agent's API, outlive a killed agent, stand beside jobs and containers, and go when they are not wanted."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hub.server import Hub
from tests.integration import container_side
from tests.integration.function_side import artefact, module, reason_against
from tests.integration.hub_side import running_hub
from tests.integration.waiting import until
from tests.unit.workloads.image_side import AS_ROOT, archive, layout
from tools.bench.agent import Agent

from .test_containers_adopted import said, states, submit

pytestmark = [pytest.mark.skipif(bool(reason_against()) or not AS_ROOT, reason=reason_against() or "the image store needs root"), pytest.mark.system]

Json = dict[str, Any]

CONTAINERS = not container_side.reason_against()


def work(name: str, kind: str, image: str, **spec: Any) -> Json:
    return {"id": name, "kind": kind, "image": f"{image}:1", "requests": {"cpu": "100m", "memory": "16Mi"}, "spec": spec}


class Node:
    """An agent process, and what it leaves."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.data = folder / "data"
        archives = self.data / "workloads/archives"
        archives.mkdir(parents=True)
        for name in ("echo", "exit", "trap", "loop", "args"):
            archive(artefact(folder / f"in-{name}", module(name), f"{name}:1"), archives / f"{name}.tar")
        if CONTAINERS:
            archive(layout(folder / "in", [container_side.base()], name="box:1"), archives / "box.tar")
        self._port = hub.broker.port
        self.agent: Agent | None = None

    def start(self, **workloads: Any) -> None:
        """`workloads`: more of that part of the configuration."""
        self.agent = Agent(0, api=True, uplink_port=self._port, model="", host=False, data=self.data, extra={
            "bus": {"enabled": False}, "workloads": {"enabled": True, "reserve_cpu_milli": 0, "reserve_memory_bytes": 0, "reserve_disk_bytes": 0, "runtimes": ["runc"] if CONTAINERS else [], **workloads}, "decisions": {},
            "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0},
        })
        self.agent.__enter__()

    def kill(self) -> None:
        assert self.agent is not None
        self.agent.kill()
        self.agent.__exit__()
        self.agent = None

    def end(self) -> None:
        """Kill the agent where it runs, and everything that it left."""
        if self.agent is not None:
            self.kill()
        from edge_runtime.workloads.drivers.container import ContainerDriver
        from edge_runtime.workloads.drivers.function import FunctionDriver
        from edge_runtime.workloads.images import ImageStore
        from tests.integration.function_side import end_all

        store = ImageStore(self.data / "workloads/images")
        end_all(FunctionDriver(self.data / "workloads", store))
        container_side.end_all(ContainerDriver(self.data / "workloads", store))
        store.close()

    def folder(self, name: str, kind: str = "functions") -> Path:
        return self.data / f"workloads/{kind}/{name}.1"

    def pid(self, name: str) -> int:
        return int(json.loads((self.folder(name) / "running.json").read_text())["pid"])

    async def call(self, name: str, body: bytes = b"", query: str = "", **headers: str) -> tuple[int, Any, Any]:
        """Status, answer, headers."""
        assert self.agent is not None
        async with aiohttp.ClientSession() as session, session.post(f"http://127.0.0.1:{self.agent.api_port}/api/v1/functions/{name}{query}", data=body, headers=headers) as answer:
            raw = await answer.read()
            return answer.status, json.loads(raw) if answer.content_type == "application/json" else raw, answer.headers


def alive(pid: int) -> bool:
    """Whether it runs; what nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def test_functions_are_called_outlive_a_killed_agent_and_stop(tmp_path: Path) -> None:
    kinds = ["container"] * CONTAINERS + ["function", "batch"]
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub)
        try:
            await asyncio.to_thread(node.start)
            await until(lambda: "bench-edge" in hub.workloads.planner.tables.nodes and sorted(hub.workloads.planner.runs("bench-edge")) == sorted(kinds), 60.0, what="a node that runs functions")
            more = [work("box", "container", "box", command=["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"]), work("boxed", "batch", "box", command=["sh", "-c", "exit 4"]),
                    work("flaky", "container", "box", command=["sh", "-c", "exit 5"], restart="on-failure", retries=2)] if CONTAINERS else []
            await submit(
                hub, work("greet", "function", "echo"), work("stuck", "function", "loop", timeout_s=0.2), work("broken", "function", "trap"), work("job", "batch", "exit"), work("good", "batch", "echo", restart="never"),
                work("again", "batch", "exit", retries=1), work("odd", "function", "echo", privileged=True), work("absent", "function", "nowhere"), *more,
            )
            await until(lambda: states(hub, "job")[-1:] == ["failed"] and states(hub, "good")[-1:] == ["done"] and states(hub, "again")[-1:] == ["failed"], 60.0, what="the jobs' ends")
            await until(lambda: all(states(hub, name) == ["accepted", "running"] for name in ("greet", "stuck", "broken")), 60.0, what="the functions")
            await until(lambda: "refused" in states(hub, "odd") and "refused" in states(hub, "absent"), 60.0, what="refusals")
            reasons = {name: reason for name, _, state, reason in said(hub) if state in ("refused", "failed")}
            assert reasons["job"] == "exit code 3" and reasons["again"] == "exit code 3 (after 1 restart)" and "spec.privileged" in reasons["odd"] and "nowhere:1 is not on this node" in reasons["absent"]
            if CONTAINERS:
                await until(lambda: states(hub, "box") == ["accepted", "running"] and states(hub, "boxed")[-1:] == states(hub, "flaky")[-1:] == ["failed"], 60.0, what="the containers beside them")
                assert [reason for name, _, _, reason in said(hub) if name == "boxed"][-1] == "exit code 4"
                assert [reason for name, _, _, reason in said(hub) if name == "flaky"][-1] == "exit code 5 (after 2 restarts)"
            bodies = [json.loads(item.record.body) for _, item in hub.store.read_events_after(("workload",), 0, 1000)[0]]
            assert next(one for one in bodies if one["id"] == "greet" and one["state"] == "running")["load_ms"] > 0
            planner = hub.workloads.planner
            await until(lambda: bool(planner.loads.measured_ms("echo:1", "bench-edge")), 60.0, what="the measured load time at the hub")
            again = [json.loads(item.record.body) for _, item in hub.store.read_events_after(("workload.restart",), 0, 1000)[0]]
            assert sorted((one["id"], one["tries"]) for one in again) == [("again", 1), *([("flaky", 1), ("flaky", 2)] if CONTAINERS else [])]

            status, answer, headers = await node.call("greet", b"world")
            assert (status, answer, headers["Novacron-Cold"]) == (200, b"hello world", "0")
            assert (await node.call("stuck"))[0] == 504
            status, answer, _ = await node.call("broken")
            assert status == 502 and answer["problem"] == "it trapped" and "unreachable" in answer["stderr"]
            status, answer, _ = await node.call("job")
            assert status == 404 and "no function job runs here" in answer["problem"]
            assert (await node.call("greet", bytes(65_537)))[0] == 413 and (await node.call("greet", b"", "?timeout_ms=x"))[0] == 400
            assert (await node.call("greet", b"", Origin="http://evil.example"))[0] == 403
            assert node.agent is not None
            assert "libwasmtime" not in Path(f"/proc/{node.agent.pid}/maps").read_text(), "the agent never loads the engine"

            pids = {name: node.pid(name) for name in ("greet", "stuck", "broken")}
            await asyncio.to_thread(node.kill)
            assert all(alive(pid) for pid in pids.values())
            os.kill(pids["broken"], signal.SIGKILL)  # while nobody looks
            await asyncio.to_thread(node.start)

            async def greeted() -> bool:
                return (await node.call("greet", b"again"))[:2] == (200, b"hello again")

            await until(greeted, 60.0, what="the adopted function's answer")
            await until(lambda: {"echo:1", "loop:1"} <= set(planner.tables.nodes["bench-edge"].document["images"]), 60.0, what="the node's images at the hub")
            assert node.pid("greet") == pids["greet"] and states(hub, "greet") == ["accepted", "running"]
            await until(lambda: (node.folder("broken") / "running.json").exists() and alive(node.pid("broken")) and node.pid("broken") != pids["broken"], 60.0, what="what was lost is started again")

            for name in ("greet", "stuck", "broken", *(("box",) if CONTAINERS else ())):
                await hub.workloads.ask(lambda planner, now, name=name: planner.cancel(name, now))
            await until(lambda: all(states(hub, name) == ["accepted", "running", "stopped"] for name in ("greet", "stuck", "broken")), 60.0, what="the stops")
            assert not any(alive(pid) for pid in pids.values()) and not any(node.folder(name).exists() for name in pids)
            if CONTAINERS:
                await until(lambda: states(hub, "box") == ["accepted", "running", "stopped"], 60.0, what="the container's stop")
        finally:
            await asyncio.to_thread(node.end)


def holders(lock: Path) -> list[int]:
    """Processes that have a file open."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found += [int(entry.name) for one in os.listdir(entry / "fd") if os.readlink(entry / "fd" / one) == str(lock)][:1]
            except OSError:
                continue
    return found


async def test_an_agent_killed_during_a_start_starts_nothing_twice(tmp_path: Path) -> None:
    """As soon as a file is there, which comes later in the start each time."""
    marks = ("", "call.sock", "running.json")
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub)
        try:
            await asyncio.to_thread(node.start)
            await until(lambda: "bench-edge" in hub.workloads.planner.tables.nodes and "function" in hub.workloads.planner.runs("bench-edge"), 60.0, what="a node that runs functions")
            for at, mark in enumerate(marks):
                await submit(hub, work(f"once-{at}", "function", "echo"))
                await until((node.folder(f"once-{at}") / mark).exists, 30.0, what=f"{mark} of once-{at}")
                await asyncio.to_thread(node.kill)
                await asyncio.to_thread(node.start)
            names = [f"once-{at}" for at in range(len(marks))]
            try:
                await until(lambda: all(states(hub, name) == ["accepted", "running"] for name in names), 60.0)
            except AssertionError:
                pytest.fail(f"{[(name, states(hub, name)) for name in names]}")
            for name in names:
                async def met(name: str = name) -> bool:
                    status, answer, _ = await node.call(name, b"me")
                    assert status in (200, 503), answer  # an agent that has just started says so
                    return bool(answer == b"hello me")

                await until(met, 30.0, what=f"an answer of {name}")
                assert holders(node.folder(name) / "lock") == [node.pid(name)], "one host, and nobody else, holds the lock"
        finally:
            await asyncio.to_thread(node.end)
