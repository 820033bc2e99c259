"""A function that is a container, through everything: submitted to the hub, called by the agent's API, adopted after a kill, started again after a call that took too long."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.integration.container_side import reason_against
from tests.integration.hub_side import running_hub
from tests.integration.test_container_functions import PATH, SERVE
from tests.integration.waiting import until

from .test_containers_adopted import said, states, submit
from .test_functions_adopted import Node, work

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), pytest.mark.system]


async def test_a_containers_function_is_called_adopted_and_started_again(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub)
        try:
            await asyncio.to_thread(node.start, functions=False)
            await until(lambda: "bench-edge" in hub.workloads.planner.tables.nodes and "function" in hub.workloads.planner.runs("bench-edge"), 60.0, what="a node that runs functions")
            told = {"command": ["sh", "-c", SERVE], "path": PATH, "timeout_s": 60}
            await submit(hub, work("web", "function", "box", **told), work("wrong", "function", "box", **told, network={}), work("module", "function", "echo"))
            await until(lambda: states(hub, "web") == ["accepted", "running"] and states(hub, "wrong")[-1:] == states(hub, "module")[-1:] == ["refused"], 60.0, what="the function")
            reasons = {name: reason for name, _, state, reason in said(hub) if state == "refused"}
            assert "spec.network" in reasons["wrong"] and "for the driver of functions" in reasons["module"]
            status, answer, headers = await node.call("web", b"world")
            assert (status, answer) == (200, b"hello world") and int(headers["Novacron-Ran-Us"]) > 0
            status, answer, _ = await node.call("web", b"fail")
            assert status == 502 and answer["code"] == 500 and answer["problem"] == "it answered with status 500" and answer["stdout"] == "trouble"
            status, answer, _ = await node.call("nobody", b"")
            assert status == 404 and "no function nobody runs here" in answer["problem"]

            running = node.folder("web", "containers") / "running.json"
            first = json.loads(running.read_text())["pid"]
            await asyncio.to_thread(node.kill)
            await asyncio.to_thread(node.start, functions=False)

            async def greeted() -> bool:
                return (await node.call("web", b"again"))[:2] == (200, b"hello again")

            await until(greeted, 60.0, what="the adopted function's answer")
            assert json.loads(running.read_text())["pid"] == first

            async def another() -> bool:
                """A call whose time is over before it was sent ends nothing; then comes another."""
                if running.exists() and json.loads(running.read_text())["pid"] != first:
                    return True
                assert (await node.call("web", b"slow", "?timeout_ms=300"))[0] in (503, 504)
                return False

            await until(another, 60.0, what="another process")
            await until(greeted, 60.0, what="an answer of the next one")
        finally:
            await asyncio.to_thread(node.end)
