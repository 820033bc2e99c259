"""What the tests of workloads at a hub share: documents, nodes without an agent, the independent checker."""

from typing import Any

from hub.scheduler.audit import check_invariants
from hub.server import Hub
from hub.workloads.documents import read_list
from tools.bench import placement_log

Json = dict[str, Any]


def work(name: str, cpu: Any = 1, **more: Any) -> Json:
    return {"id": name, "kind": "container", "requests": {"cpu": cpu}, **more}


async def declare(hub: Hub, name: str, **more: Any) -> None:
    await hub.workloads.ask(lambda planner, now: planner.put_node(name, {"capacity": {"cpu": 4, "memory": "8Gi"}, **more}, "declared", now))


async def submit(hub: Hub, *documents: Json) -> list[str]:
    return [row.state for row in await hub.workloads.submit(read_list(list(documents)))]


def clean(hub: Hub, acknowledged: dict[str, Json] | None = None, gone: dict[str, Json] | None = None) -> None:
    """The independent checker on the file and on what was published."""
    log = placement_log.read(hub.settings.data_dir / "hub.db")
    assert placement_log.overcommit(log, hub.now_ms(), gone) == (0.0, [])
    assert placement_log.doubles(log, hub.desired) == []
    assert placement_log.lost(log, acknowledged or {}) == []
    check_invariants(hub.workloads.planner.state)
