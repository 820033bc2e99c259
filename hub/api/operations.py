"""Handlers of what is done with a workload that is placed: operations on checkpoints."""

import secrets
from typing import Any

from aiohttp import web

from ..workloads import operations
from .reading import NotKnown, answer
from .workloads import WorkloadApi, object_of


class OperationApi(WorkloadApi):
    """Mixed into `HubApi`."""

    async def operate(self, request: web.Request) -> web.Response:
        """See the table."""
        asked, row = await object_of(request), self._placed(request)
        wanted = operations.entry(row, asked, f"o-{secrets.token_hex(6)}", self._hub.now_ms())
        document = await self._hub.change_desired(row.node, lambda spec: operations.added(spec, wanted))
        return answer({"operation": wanted["id"], "workload": row.id, "node": row.node, "epoch": row.epoch, "generation": document["generation"]})

    async def operations(self, request: web.Request) -> web.Response:
        """See the table."""
        row = self._hub.workloads.rows[self._workload(request)]
        if not row.node:
            return answer([])
        listed = (self._hub.desired.get(row.node) or {}).get("spec", {}).get("operations", ())
        found = await self._hub.read(lambda: self._hub.store.read_latest(streams=("event",), kinds=("operation",), limit=operations.LOOK_BACK, edge=row.node))
        return answer(operations.shown(listed, [item for _, item in found], row.id))

    async def checkpoints(self, request: web.Request) -> web.Response:
        """See the table."""
        row = self._hub.workloads.rows[self._workload(request)]
        found = await self._hub.read(lambda: self._hub.store.read_latest(streams=("event",), kinds=("workload.checkpoints",), limit=1, edge=row.node)) if row.node else []
        return answer(operations.checkpoints(found[0][1] if found else None, row.id))

    def _placed(self, request: web.Request) -> Any:
        """The workload's row, where an agent can be asked about it. Raises `NotKnown` or `Conflict`."""
        row = self._hub.workloads.rows[self._workload(request)]
        if row.node and row.node not in self._hub.fleet.rows:
            raise NotKnown("workload", f"{row.id} is on {row.node}, which has no agent that could be asked", "place it on an edge")
        return row
