"""What people ask of a node: at any time, also while the agent still makes its drivers."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.config import EdgeConfig
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.workloads.drivers.face import Key, Phase, Status
from edge_runtime.workloads.node import WorkloadNode


class Held:
    """A driver that has one instance, and tells of it when it is let."""

    def __init__(self) -> None:
        self.asked, self.may = asyncio.Event(), asyncio.Event()

    async def instances(self) -> list[Status]:
        self.asked.set()
        await self.may.wait()
        return [Status(Key("w", 1), Phase.RUNNING)]


ASKED: dict[str, tuple[Callable[[WorkloadNode], Awaitable[Any]], Callable[[Any], Any]]] = {
    "instances": (lambda node: node.instances(), lambda told: [one["driver"] for one in told]),
    "output": (lambda node: node.output("w", 10), lambda told: [told["driver"]]),
    "newest": (lambda node: node._newest("w"), lambda told: [told[1].key.id]),
}


@pytest.mark.parametrize("what", ASKED)
async def test_a_driver_that_is_made_while_somebody_asks_disturbs_no_answer(tmp_path: Path, what: str) -> None:
    ask, seen = ASKED[what]
    node = EdgeRuntime(EdgeConfig(edge_id="gw-1", data_dir=str(tmp_path))).workload_node()
    first: Any = Held()
    node.here.all["container"] = first
    answer = asyncio.ensure_future(ask(node))
    await first.asked.wait()
    later: Any = Held()
    node.here.all["function"] = later
    first.may.set()
    assert seen(await answer) == ["w" if what == "newest" else "container"]
