"""Operations by the edge's own API: an edge that is cut off can be asked where it stands."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.config.schema import ApiConfig
from edge_runtime.contract.limits import MAX_OPERATIONS
from edge_runtime.contract.operations import FINAL_STATES
from edge_runtime.workloads.operations import Operations
from tests.system.operation_agent import config, desired, key
from tests.unit.workloads.image_side import archive, layout

from .checkpoint_side import reason_against_checkpoints
from .container_side import base
from .edges import Edge
from .waiting import until

pytestmark = pytest.mark.skipif(bool(reason_against_checkpoints()), reason=reason_against_checkpoints())

ROOM_S = 90.0
"""For what takes a second on a machine of one's own."""


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    """An edge that runs one workload, which counts."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "data/workloads/archives").mkdir(parents=True)
    archive(layout(tmp_path / "in", [base()], name="box:1"), tmp_path / "data/workloads/archives/box.tar")
    found = Edge(replace(config(tmp_path), api=ApiConfig(port=0)))
    await found.start()
    found.runtime.desired_state.receive(desired(tmp_path, 1, []))
    try:
        await until((tmp_path / "shared/numbers").exists, ROOM_S, what="it runs")
        yield found
    finally:
        for driver in found.runtime.workload_node().here.all.values():
            await found.runtime.workload_node()._runner.take([])
            await until(lambda driver=driver: empty(driver), ROOM_S)
        await found.stop()


async def empty(driver: Any) -> bool:
    return not await driver.instances()


async def done(edge: Edge, workload: str, body: Any) -> dict[str, Any]:
    """How an operation ended."""
    status, asked = await edge.ask(f"/api/v1/workloads/{workload}/operations", "POST", body=body)
    assert status == 200 and asked["state"] in ("running", *FINAL_STATES), asked

    async def ended() -> bool:
        return bool((await edge.get(f"/api/v1/operations/{asked['id']}"))["state"] in FINAL_STATES)

    await until(ended, ROOM_S)
    found: dict[str, Any] = await edge.get(f"/api/v1/operations/{asked['id']}")
    return found


async def test_a_checkpoint_is_taken_held_and_gone_on_from_at_the_edge_alone(edge: Edge, tmp_path: Path) -> None:
    name = key(tmp_path).id
    taken = await done(edge, name, {"kind": "checkpoint", "name": "here", "stop": True})
    assert (taken["state"], taken["reason"]) == ("succeeded", "")
    [kept] = await edge.get(f"/api/v1/workloads/{name}/checkpoints")
    assert {key: kept[key] for key in ("workload", "epoch", "name", "root", "bytes")} == {key: taken["detail"][key] for key in ("workload", "epoch", "name", "root", "bytes")}
    [shown] = await edge.get("/api/v1/workloads")
    assert shown["phase"] == "checkpointed"
    assert (await done(edge, name, {"kind": "delete-checkpoint", "name": "here"}))["state"] == "failed"
    assert (await done(edge, name, {"kind": "restore", "id": "mine"}))["state"] == "succeeded"
    assert (await done(edge, name, {"kind": "restore", "id": "mine"}))["state"] == "succeeded", "asked for again it is not done again"
    kinds = [record for record in await edge.get("/api/v1/journal/event?limit=100") if record["kind"] == "operation" and record["body"]["id"] == "mine"]
    assert len(kinds) == 2
    [shown] = await edge.get("/api/v1/workloads")
    assert shown["phase"] == "running"


BAD: list[tuple[str, Any, dict[str, str], int, str]] = [
    ("none", {"kind": "checkpoint"}, {}, 400, "workload"), ("", [], {}, 400, "body"), ("", {}, {}, 400, "kind"), ("", {"kind": "explode"}, {}, 400, "kind"), ("", {"kind": "checkpoint", "id": "a b"}, {}, 400, "id"),
    ("", {"kind": "checkpoint", "stop": "yes"}, {}, 400, "stop"), ("", b"\xff", {}, 400, "payload"), ("", {"kind": "checkpoint"}, {"Origin": "http://page"}, 403, "Origin"),
]


async def test_what_cannot_be_asked_names_its_field(edge: Edge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, body, headers, status, field in BAD:
        got, said = await edge.ask(f"/api/v1/workloads/{path or key(tmp_path).id}/operations", "POST", body=body, headers=headers)
        assert (got, said["field"]) == (status, field) and said["problem"] and said["remedy"], (path, body)
    assert (await edge.ask("/api/v1/operations/none"))[0] == 404
    monkeypatch.setattr(Operations, "open", MAX_OPERATIONS)
    got, said = await edge.ask(f"/api/v1/workloads/{key(tmp_path).id}/operations", "POST", body={"kind": "checkpoint"})
    assert (got, said["field"]) == (400, "operations")
