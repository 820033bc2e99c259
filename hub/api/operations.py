"""Handlers of what is done with a workload that is placed: operations on checkpoints, its output, commands in it."""

import logging
import secrets
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.questions import EXEC, LOGS, MAX_OUTPUT, STREAMS, Collected

from ..workloads import operations
from ..workloads.documents import Conflict
from .reading import NotKnown, answer, integer_of
from .workloads import WorkloadApi, object_of

log = logging.getLogger(__name__)


class OperationApi(WorkloadApi):
    """Mixed into `HubApi`."""

    async def operate(self, request: web.Request) -> web.Response:
        """See the table."""
        asked, row = await object_of(request), self._placed(request)
        node = self._hub.workloads.planner.tables.nodes.get(row.node)
        wanted = operations.entry(row, asked, f"o-{secrets.token_hex(6)}", self._hub.now_ms(), (node.document.get("labels") or {}) if node is not None else {})
        document = await self._hub.change_desired(row.node, lambda spec: operations.added(spec, wanted))
        return answer({"operation": wanted["id"], "workload": row.id, "node": row.node, "epoch": row.epoch, "generation": document["generation"]})

    async def operations(self, request: web.Request) -> web.Response:
        """See the table."""
        row = self._hub.workloads.rows[self._workload(request)]
        if not row.node:
            return answer([])
        listed = (self._hub.desired.get(row.node) or {}).get("spec", {}).get("operations", ())
        found = await self._hub.read(lambda: self._hub.store.read_records(row.node, "event", kinds=("operation",), limit=operations.LOOK_BACK, newest_first=True))
        return answer(operations.shown(listed, found, row.id))

    async def checkpoints(self, request: web.Request) -> web.Response:
        """See the table."""
        return await self._kept(request, "checkpoints")

    async def snapshots(self, request: web.Request) -> web.Response:
        """See the table."""
        return await self._kept(request, "snapshots")

    async def _kept(self, request: web.Request, word: str) -> web.Response:
        row = self._hub.workloads.rows[self._workload(request)]
        found = await self._hub.read(lambda: self._hub.store.read_records(row.node, "event", kinds=(f"workload.{word}",), limit=1, newest_first=True)) if row.node else []
        return answer(operations.kept(word, found[0] if found else None, row.id))

    async def logs(self, request: web.Request) -> web.Response:
        """See the table."""
        row = self._placed(request)
        past = [] if row.node else await self._hub.read(lambda: self._hub.store.read_placements(row.id, 1))
        node = row.node or next((one.node for one in past if one.node in self._hub.fleet.rows), "")  # its last node shows for a while what it wrote
        if not node:
            raise Conflict("workload", f"{row.id} is {row.state}, and was on no node", "ask when it is placed")
        detail, found = await self._hub.questions.ask(node, LOGS, row.id, bytes=integer_of(request, "bytes", MAX_OUTPUT), since=request.query.get("since", ""))
        return answer(_said(node, detail, found))

    async def execute(self, request: web.Request) -> web.Response:
        """See the table."""
        asked, row = await object_of(request), self._placed(request)
        unknown = sorted(set(asked) - {"args", "timeout_s"})
        if unknown:
            raise ContractError(unknown[0][:80], "is not known here", "send args, and timeout_s", "field")
        if not row.node:
            raise Conflict("workload", f"{row.id} is {row.state}, and on no node", "ask when it runs")
        detail, found = await self._hub.questions.ask(row.node, EXEC, row.id, **asked)
        log.info("a command was run in %s on %s by way of the API", row.id, row.node)
        return answer(_said(row.node, detail, found))

    def _placed(self, request: web.Request) -> Any:
        """The workload's row, where an agent can be asked about it. Raises `NotKnown` or `Conflict`."""
        row = self._hub.workloads.rows[self._workload(request)]
        if row.node and row.node not in self._hub.fleet.rows:
            raise NotKnown("workload", f"{row.id} is on {row.node}, which has no agent that could be asked", "place it on an edge")
        return row


def _said(node: str, detail: Mapping[str, Any], found: Collected) -> dict[str, Any]:
    """Bytes that are no UTF-8 are shown by a mark: a piece of a log may begin or end within a character."""
    return {"node": node, **detail, **{stream: found.output(stream).decode("utf-8", "replace") for stream in STREAMS}}
