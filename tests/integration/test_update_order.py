"""An update ordered by the hub's desired state: it becomes an operation on the edge, what follows is told by records, and an edge that cannot be updated says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.config.schema import UpdatesConfig
from edge_runtime.contract.errors import ContractError
from edge_runtime.updates.install import read_document, write_document

from .edges import Edge, Edges
from .waiting import until

ORDER = {"id": "u-1", "url": "http://hub/bundles/b-1", "token": "t"}


async def operations(edge: Edge) -> list[tuple[str, str, str]]:
    return [(body["id"], body["state"], body["step"]) for body in await edge.records("event", "operation")]


async def test_an_update_that_the_hub_wants_is_done_once_and_told(edges: Edges, tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    edge = await edges.start(updates=UpdatesConfig(enabled=True, status_file=str(status)))
    requests = Path(edge.config.data_dir) / "updates"
    edge.desire(1, update=ORDER)
    await until(lambda: read_document(requests / "request.json").get("action") == "install", what="the request")
    assert read_document(requests / "request.json")["token"] == "t"
    assert await operations(edge) == [("u-1", "running", "accepted")]
    # Another one while it is under way waits.
    edge.desire(2, update={**ORDER, "id": "u-2"})
    write_document(status, {"id": "u-1", "state": "refused", "reason": "signature: no", "detail": {}})
    await until(lambda: read_document(requests / "request.json").get("id") == "u-2", what="the second request")
    assert await operations(edge) == [("u-1", "running", "accepted"), ("u-1", "failed", "refused"), ("u-2", "running", "accepted")]
    write_document(status, {"id": "u-2", "state": "good", "reason": "", "detail": {"sequence": 3}})
    await until(lambda: edge.runtime.updates is not None and edge.runtime.updates.to_json()[-1]["state"] == "succeeded", what="the second's end")
    # The same again, also after a restart, is not done again.
    edge.desire(3, update={**ORDER, "id": "u-2"})
    code, told = await edge.ask("/api/v1/updates", "POST", body={"id": "u-1", "url": "http://hub/x"})
    assert (code, told["state"]) == (200, "failed")
    assert len(await operations(edge)) == 4
    code, told = await edge.ask("/api/v1/updates", "POST", body={"id": "u-3"})
    assert code == 400 and told["field"] == "url"


async def test_an_edge_that_runs_from_no_image_says_so_once(edges: Edges) -> None:
    edge = await edges.start()
    for generation in (1, 2):
        edge.desire(generation, update=ORDER)
        await edge.runtime.journal.flush()
    assert await operations(edge) == [("u-1", "failed", "refused")]
    code, told = await edge.ask("/api/v1/updates", "POST", body=ORDER)
    assert code == 404 and json.dumps(told)


@pytest.mark.parametrize("order", [{}, {"id": "u"}, {"id": "u", "path": "/etc/shadow"}])
async def test_a_desired_state_with_an_order_that_cannot_be_is_refused_as_a_whole(edges: Edges, order: dict[str, Any]) -> None:
    edge = await edges.start()
    with pytest.raises(ContractError) as told:
        edge.document(1, update=order)
    assert told.value.field.startswith("spec.update.")
