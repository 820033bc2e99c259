"""A node that is short of memory: real containers, one of them hungry; who ends, what is told, what is not taken meanwhile."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.config.schema import EdgeConfig, WorkloadsConfig
from edge_runtime.metrics import Metrics
from edge_runtime.workloads import node as nodes
from edge_runtime.workloads import pressure as pressures
from edge_runtime.workloads.node import WorkloadNode
from edge_runtime.workloads.pressure import Thresholds
from tests.unit.workloads.image_side import layout

from .container_side import base, reason_against
from .waiting import until


class Book:
    """A journal in memory."""

    def __init__(self) -> None:
        self.records: list[tuple[str, dict[str, Any]]] = []
        self.documents: dict[str, Any] = {}

    def append(self, stream: str, kind: str, body: dict[str, Any]) -> None:
        self.records.append((kind, body))

    def state(self, key: str) -> Any:
        return self.documents.get(key)

    def put_state(self, key: str, value: Any) -> None:
        self.documents[key] = value

    def said(self, workload: str) -> list[str]:
        return [body["state"] for kind, body in self.records if kind == "workload" and body["id"] == workload]


def entry(workload: str, priority: int, script: str, memory: int) -> dict[str, Any]:
    return {"id": workload, "epoch": 1, "wanted": "running", "kind": "container", "image": "box:1", "requests": {"memory": memory},
            "document": {"priority": priority, "spec": {"command": ["sh", "-c", script], "limits": {"memory": "128Mi"}, "restart": "always"}}}


async def test_the_hungry_one_of_the_least_priority_ends_and_nothing_new_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := reason_against():
        pytest.skip(reason)
    monkeypatch.setattr(nodes, "LOOK_S", 0.05)
    monkeypatch.setattr(pressures, "COOL_S", 600.0)  # also on a machine that is slow today, the next one is not due before this test is over
    layout(tmp_path / "data/workloads/archives/box", [base()], name="box:1")
    book, metrics = Book(), Metrics()
    config = EdgeConfig(data_dir=str(tmp_path / "data"), workloads=WorkloadsConfig(enabled=True, functions=False, evict_memory_bytes=1, evict_disk_bytes=0))
    node = WorkloadNode(config, book, metrics)  # type: ignore[arg-type]
    eats = "trap 'exit 0' TERM; x=$(yes 0123456789abcdef | head -c 40000000); echo fed; sleep 999 & wait"
    wanted = [entry("modest", 0, "trap 'exit 0' TERM; echo fed; sleep 999 & wait", 64 << 20), entry("hungry", 0, eats, 1 << 20), entry("precious", 9, eats, 1 << 20)]
    run = asyncio.create_task(node.run())
    try:
        await asyncio.wait_for(node._ready.wait(), 60)
        node.take(wanted)

        async def fed() -> bool:
            told = [await node.output(one["id"], 100) for one in wanted]
            return all(one is not None and "fed" in one["stdout"] for one in told)

        await until(fed)
        assert all(book.said(one["id"])[-1] == "running" for one in wanted) and not [kind for kind, _ in book.records if kind == "workload.evicted"]
        node._thresholds = Thresholds(1 << 50, 0)  # a threshold that no machine reaches: from now on it is short
        await until(lambda: book.said("hungry")[-1] == "failed")
        (told,) = [body for kind, body in book.records if kind == "workload.evicted"]
        assert told["id"] == "hungry" and told["short"] == "memory" and told["over_bytes"] > 20 << 20 and told["priority"] == 0
        failed = next(body for kind, body in book.records if kind == "workload" and body["id"] == "hungry" and body["state"] == "failed")
        assert failed["reason"].startswith("evicted: the node is short of memory")
        assert {one["id"] for one in await node.instances() if one["phase"] == "running"} == {"modest", "precious"}, "the cool-down keeps the others, and the evicted one is not started again"
        assert metrics.total("workload_evictions_total") == 1
        kept = await node.output("hungry", 100)
        assert kept is not None and kept["stdout"] == "fed\n"
        node.take([*wanted, entry("late", 99, "sleep 999", 1 << 20)])
        await until(lambda: bool(book.said("late")) and book.said("late")[-1] == "refused")
        node._thresholds = Thresholds(1, 0)  # there is enough again
        await until(lambda: node._pressure.short == "")
        node.take([*wanted, entry("later", 0, "trap 'exit 0' TERM; sleep 999 & wait", 1 << 20)])
        await until(lambda: bool(book.said("later")) and book.said("later")[-1] == "running")
        assert book.said("hungry") == ["accepted", "running", "failed"]
        node.take([])

        async def gone() -> bool:
            return not await node.instances()

        await until(gone, seconds=40)
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
