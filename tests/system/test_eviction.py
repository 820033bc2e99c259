"""A node that is short of memory, which here it only believes: a real agent ends what matters least, says so, and takes nothing new; the hub looks for another place."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.integration.function_side import reason_against
from tests.integration.hub_side import running_hub
from tests.integration.waiting import until
from tests.unit.workloads.image_side import AS_ROOT

from .test_containers_adopted import said, states, submit
from .test_functions_adopted import Node, alive, work

pytestmark = [pytest.mark.skipif(bool(reason_against()) or not AS_ROOT, reason=reason_against() or "the image store needs root"), pytest.mark.system]


async def test_what_matters_least_is_ended_first_and_nothing_new_comes(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub)
        planner = hub.workloads.planner
        try:
            await asyncio.to_thread(node.start, evict_memory_bytes=0, evict_disk_bytes=0)
            try:
                await until(lambda: "bench-edge" in planner.tables.nodes and "function" in planner.runs("bench-edge"), 60.0, what="a node that runs functions")
            except AssertionError as error:
                raise AssertionError(f"{error}; told was {[item.record.body for _, item in hub.store.read_events_after(('workload.driver', 'node.capacity'), 0, 100)[0]]}") from None
            await submit(hub, *({**work(name, "function", "echo"), "priority": priority} for name, priority in (("least", -5), ("middle", 0), ("most", 10))))
            await until(lambda: all(states(hub, name) == ["accepted", "running"] for name in ("least", "middle", "most")), 60.0, what="three functions")
            pids = {name: node.pid(name) for name in ("least", "middle", "most")}
            await asyncio.to_thread(node.kill)
            await asyncio.to_thread(node.start, evict_memory_bytes=1 << 46, evict_disk_bytes=0)
            await until(lambda: states(hub, "least") == ["accepted", "running", "refused"], 60.0, what="the end of what matters least")
            assert not alive(pids["least"]) and not node.folder("least").exists() and alive(pids["most"])
            reason = next(reason for name, _, state, reason in said(hub) if (name, state) == ("least", "refused"))
            assert reason == "evicted: this node is short of memory"
            await until(lambda: planner.tables.rows["least"].state == "pending", 60.0, what="the hub that looks for another place")
            evicted = [json.loads(item.record.body) for _, item in hub.store.read_events_after(("workload.evicted",), 0, 1000)[0]]
            assert evicted[0]["id"] == "least" and evicted[0]["what"] == "memory" and evicted[0]["free"] < evicted[0]["limit"] == 1 << 46 and evicted[0]["priority"] == -5 and evicted[0]["used"] > 0
            await until(lambda: any(taint["key"] == "novacron.pressure" for taint in planner.tables.nodes["bench-edge"].document["taints"]), 60.0, what="the taint")
            await submit(hub, work("newcomer", "function", "echo"))
            assert planner.tables.rows["newcomer"].state == "pending" and "taint" in planner.tables.rows["newcomer"].reason.lower()
            await until(lambda: states(hub, "middle") == ["accepted", "running", "refused"], 60.0, what="the next one, since that did not help")
            assert [one["id"] for one in (json.loads(item.record.body) for _, item in hub.store.read_events_after(("workload.evicted",), 0, 1000)[0])][:2] == ["least", "middle"]
        finally:
            await asyncio.to_thread(node.end)
