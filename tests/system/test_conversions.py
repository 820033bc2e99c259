"""Conversion through everything: hub and command, agent as a process, runtime, CRIU and QEMU. A workload becomes a micro-VM, its agent is killed, the next one has it as what it is, and it comes back."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.contract.workloads import CONVERTING, conversion_bytes
from hub.server import Hub
from tests.integration.checkpoint_side import program, reason_against_checkpoints
from tests.integration.hub_side import running_hub
from tests.integration.microvm_side import kernel_folder, reason_against
from tests.integration.waiting import until
from tests.system.test_containers_adopted import Node, states, submit, work
from tests.system.test_operations import EDGE, command, operations, why

REASON = reason_against_checkpoints() or reason_against()

pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.system, pytest.mark.timeout(600)]

COUNTS = "trap 'exit 0' TERM; i=0; while true; do echo $i; i=$((i+1)); sleep 0.1; done"
ROOM_S = 240.0
"""For what takes ten seconds on a machine of one's own: guests are booted under emulation."""


async def numbers(hub: Hub, name: str, capsys: pytest.CaptureFixture[str]) -> list[int]:
    """What it has written, asked of its edge by way of the hub, when that answers; without a last line that may be cut."""
    found: list[int] = []

    async def there() -> bool:
        capsys.readouterr()
        if await command(hub, "logs", name, "--json") != 0:
            return False
        told = json.loads(capsys.readouterr().out)
        found[:] = [int(one) for one in told["stdout"].split("\n")[:-1]]
        return bool(told["phase"] == "running")

    await until(there, ROOM_S, what=f"{name} runs, and its edge answers")
    return found


async def shown(hub: Hub, name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert await command(hub, "workload", "list", "--json") == 0
    return next(one for one in json.loads(capsys.readouterr().out) if one["workload"] == name)


async def test_a_workload_is_converted_by_the_hub_adopted_as_what_it_is_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join((os.path.dirname(program()), os.environ["PATH"])))
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub, conversions=True, guest_kernel=kernel_folder())
        try:
            await asyncio.to_thread(node.start)
            await until(lambda: any(key == CONVERTING for key, _ in hub.workloads.planner.state.nodes[0].labels) if hub.workloads.planner.state.nodes else False, ROOM_S, what="a node that converts")
            counter = {**work("counter", COUNTS, converts=True), "requests": {"cpu": "100m", "memory": "32Mi", "disk": "64Mi"}}
            await submit(hub, counter, work("plain", "exec sleep 1000"))
            await until(lambda: states(hub, "counter")[-1:] == states(hub, "plain")[-1:] == ["running"], ROOM_S, what="they run")
            await until(lambda: all(hub.workloads.planner.current(name).said == "running" for name in ("counter", "plain")), ROOM_S, what="the hub knows")  # type: ignore[union-attr]
            assert (await shown(hub, "counter", capsys))["form"] == "container" and (await shown(hub, "plain", capsys))["form"] == ""
            entries = {one["id"]: one for one in hub.desired[EDGE]["spec"]["workloads"]}
            assert entries["counter"]["requests"]["memory"] == 32 << 20 and entries["counter"]["over"] == conversion_bytes(32 << 20) and entries["plain"].get("over", 0) == 0
            assert dict(hub.workloads.planner.tables.items["counter"].item.shape.requests)["memory"] == (32 << 20) + conversion_bytes(32 << 20), "what its guest takes is set aside"

            assert await command(hub, "workload", "convert", "plain", "--to", "microvm") == 1
            assert "spec.converts: plain was not started as one that can be converted" in capsys.readouterr().err
            assert await command(hub, "workload", "convert", "counter", "--to", "microvm", "--wait", str(ROOM_S)) == 0, why(hub)
            await until(lambda: hub.workloads.planner.current("counter").seat.get("form") == "microvm", ROOM_S, what="the hub knows")  # type: ignore[union-attr]
            assert (await shown(hub, "counter", capsys))["form"] == "microvm"

            await asyncio.to_thread(node.kill)
            await asyncio.to_thread(node.start)
            seen = len(await numbers(hub, "counter", capsys))
            assert await command(hub, "workload", "checkpoint", "counter", "--wait", str(ROOM_S)) == 1 and "takes no states" in why(hub)
            assert await command(hub, "workload", "snapshot", "counter", "--wait", str(ROOM_S)) == 1 and "it is a micro-VM now" in why(hub)
            assert await command(hub, "workload", "convert", "counter", "--to", "container", "--wait", str(ROOM_S)) == 0, why(hub)
            await until(lambda: hub.workloads.planner.current("counter").seat.get("form") == "container", ROOM_S, what="the hub knows")  # type: ignore[union-attr]
            found: list[int] = []

            async def more() -> bool:
                found[:] = await numbers(hub, "counter", capsys)
                return len(found) > seen + 3

            await until(more, ROOM_S, what="it goes on")
            assert found == list(range(len(found))), "the same processes, in all forms, with one output"
            assert states(hub, "counter") == ["accepted", "running", "running", "running"], "it was not begun anew, by anybody"
            assert await command(hub, "workload", "snapshot", "counter", "--wait", str(ROOM_S)) == 0, why(hub)
            assert [told[-1][0] for told in operations(hub).values()] == ["succeeded", "failed", "failed", "succeeded", "succeeded"]

            await hub.workloads.ask(lambda planner, now: planner.cancel("counter", now))
            await until(lambda: states(hub, "counter")[-1] == "stopped", ROOM_S, what="it ends")
            assert not any((node.data / "workloads/convertible/conversions").glob("counter*")) and not any((node.data / "workloads/convertible/containers").glob("counter*"))
        finally:
            await asyncio.to_thread(ended, node)


def ended(node: Node) -> None:
    """All that the agent left."""
    if node.agent is not None:
        node.kill()
        node.agent = None
    from tests.system.test_operation_convert import closed, opened

    driver = opened(node.data.parent)

    async def end() -> None:
        for status in await driver.instances():
            await driver.delete(status.key)

    asyncio.run(end())
    closed(driver)
    node.end()
