"""Handlers of workloads, nodes and the scheduler."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from aiohttp import web

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.errors import ContractError

from ..scheduler import Invalid
from ..store.workloads import FINAL_STATES, LIVE_STATES
from ..workloads import views, whatif
from ..workloads.documents import name_of, read_list, read_node
from ..workloads.planner import Planner
from ..workloads.rebalancing import MAX_DRAINED
from ..workloads.service import KEEP_MINUTES, Busy
from .reading import NotKnown, answer, hours_of, integer_of, limit_of

if TYPE_CHECKING:
    from ..server import Hub

STATES = (*LIVE_STATES, *FINAL_STATES)

MAX_WORKLOAD_BODY_BYTES = 1_000_000
"""A list of a thousand workloads of a thousand bytes each."""

MAX_NODES_SHOWN = 10_000
"""Nodes of one answer where nothing less is asked for: as many as a hub has edges."""

MAX_POINTS = 720
"""Points of a history: more than a screen has columns to spare; from a longer one every so-manieth is taken."""


async def body_of(request: web.Request) -> Any:
    """The request's JSON: any value. Raises `ContractError`."""
    return jsoncodec.decode(await request.clone(client_max_size=MAX_WORKLOAD_BODY_BYTES).read(), MAX_WORKLOAD_BODY_BYTES)


async def object_of(request: web.Request) -> dict[str, Any]:
    """The request's JSON object; an empty body is an empty one. Raises `ContractError`."""
    raw = await request.read()
    value = jsoncodec.decode(raw) if raw else {}
    if not isinstance(value, dict):
        raise ContractError("body", f"is {type(value).__name__}, not an object", "send a JSON object", "type")
    return value


class WorkloadApi:
    """Mixed into `HubApi`."""

    _hub: "Hub"

    # -- workloads -----------------------------------------------------------------------------------------------------------

    async def submit(self, request: web.Request) -> web.Response:
        """See the table."""
        rows, together = await self._hub.workloads.submit_all(read_list(await body_of(request)))
        shown = await self._hub.workloads.look(lambda planner: [views.workload_view(planner, row) for row in rows])
        return answer({"workloads": shown, "together": None if together is None else asdict(together)})

    async def workloads(self, request: web.Request) -> web.Response:
        """See the table."""
        state, node, limit = request.query.get("state"), request.query.get("node"), limit_of(request)
        if state is not None and state not in STATES:
            raise ContractError("state", f"{state[:40]!r} is unknown", f"use {', '.join(STATES)}")
        found = []
        for row in reversed(self._hub.workloads.rows.values()):
            if (state is None or row.state == state) and (node is None or row.node == node):
                found.append(row)
                if len(found) == limit:
                    break
        return answer(await self._hub.workloads.look(lambda planner: [views.workload_view(planner, row) for row in found]))

    def _workload(self, request: web.Request) -> str:
        name = request.match_info["workload"]
        if name not in self._hub.workloads.rows:
            raise NotKnown("workload", f"{name[:64]!r} is not known", "list /api/v1/workloads")
        return name

    async def workload(self, request: web.Request) -> web.Response:
        """See the table."""
        name = self._workload(request)
        past = await self._hub.read(lambda: self._hub.store.read_placements(name))
        row = self._hub.workloads.rows.get(name)
        if row is None:
            raise NotKnown("workload", f"{name!r} was forgotten just now", "list /api/v1/workloads")
        shown = await self._hub.workloads.look(lambda planner: views.workload_view(planner, row))
        return answer({**shown, "placements": [views.placement_view(placement) for placement in past]})

    async def cancel(self, request: web.Request) -> web.Response:
        """See the table."""
        name = self._workload(request)
        await self._hub.workloads.ask(lambda planner, now: planner.cancel(name, now))
        row = self._hub.workloads.rows[name]
        return answer(await self._hub.workloads.look(lambda planner: views.workload_view(planner, row)))

    async def explain_workload(self, request: web.Request) -> web.Response:
        """See the table."""
        name = self._workload(request)

        def explained(planner: Planner) -> dict[str, Any] | None:
            return views.explain(planner, name, self._hub.workloads.now_ms()) if name in planner.tables.items else None

        said = await self._hub.workloads.look(explained)
        if said is None:
            raise NotKnown("workload", f"the document of {name!r} cannot be read any more", "see its reason")
        return answer(said)

    async def what_if(self, request: web.Request) -> web.Response:
        """See the table."""
        value = await body_of(request)
        if not isinstance(value, dict):
            raise Invalid("body", f"is {type(value).__name__}, not an object", "send workloads, lose or add")
        unknown = sorted(set(value) - {"workloads", "lose", "add"})
        if unknown:
            raise Invalid(unknown[0][:80], "is not known here", "send workloads, lose or add")
        parts = {key: value.get(key, []) for key in ("workloads", "lose", "add")}
        for key, part in parts.items():
            if not isinstance(part, list) or len(part) > whatif.MAX_WHAT_IF:
                raise Invalid(key, "is not a list, or too long", f"send a list of at most {whatif.MAX_WHAT_IF}")
        entries = read_list(parts["workloads"]) if parts["workloads"] else []
        lose = [name_of(name, f"lose[{index}]") for index, name in enumerate(parts["lose"])]
        add: dict[str, Any] = {}
        for index, node in enumerate(parts["add"]):
            name = name_of(node.get("name") if isinstance(node, dict) else None, f"add[{index}].name")
            if name in add:
                raise Invalid(f"add[{index}].name", f"{name!r} stands twice", "give each node its own name")
            add[name] = read_node(node, name)[0]
        now, fork = await self._hub.workloads.look(lambda planner: (self._hub.workloads.now_ms(), planner.fork()))
        return answer(await self._hub.think(lambda: whatif.what_if(fork, entries, lose, add, now)))

    # -- nodes ---------------------------------------------------------------------------------------------------------------

    def _node(self, request: web.Request) -> str:
        name = request.match_info["node"]
        if name not in self._hub.workloads.planner.tables.nodes:
            raise NotKnown("node", f"{name[:64]!r} is not known", "list /api/v1/nodes")
        return name

    async def nodes(self, request: web.Request) -> web.Response:
        """See the table."""
        most = max(1, integer_of(request, "limit", MAX_NODES_SHOWN))
        return answer(await self._hub.workloads.look(lambda planner: views.nodes_view(planner, sorted(planner.tables.nodes)[:most])))

    async def _shown(self, name: str) -> web.Response:
        return answer(await self._hub.workloads.look(lambda planner: views.nodes_view(planner, [name])[0] if name in planner.tables.nodes else {"node": name, "status": "gone"}))

    async def put_node(self, request: web.Request) -> web.Response:
        """See the table."""
        name, value = name_of(request.match_info["node"], "node"), await object_of(request)
        read_node(value, name)
        await self._hub.workloads.ask(lambda planner, now: planner.put_node(name, value, "declared", now))
        return await self._shown(name)

    async def delete_node(self, request: web.Request) -> web.Response:
        """See the table."""
        name = self._node(request)
        row = self._hub.fleet.rows.get(name)
        lost = request.query.get("lost", "false").lower() in ("1", "true", "yes")
        await self._hub.workloads.ask(lambda planner, now: planner.remove_node(name, row is not None and row.state == "online", now, lost))
        return answer({"node": name, "status": "gone"})

    async def drain(self, request: web.Request) -> web.Response:
        """See the table."""
        return await self._cordon(request, "drain")

    async def cordon(self, request: web.Request) -> web.Response:
        """See the table."""
        return await self._cordon(request, "cordon")

    async def uncordon(self, request: web.Request) -> web.Response:
        """See the table."""
        return await self._cordon(request, "")

    async def _cordon(self, request: web.Request, how: str) -> web.Response:
        name = self._node(request)
        await self._hub.workloads.ask(lambda planner, now: planner.cordon(name, how, now))
        return await self._shown(name)

    # -- rebalancing ---------------------------------------------------------------------------------------------------------

    async def rebalances(self, _request: web.Request) -> web.Response:
        """See the table."""
        return answer(await self._hub.workloads.look(lambda planner: list(planner.tables.rebalances.values())[::-1]))

    async def rebalance(self, request: web.Request) -> web.Response:
        """See the table."""
        value = await object_of(request)
        unknown = sorted(set(value) - {"drain", "go"})
        if unknown:
            raise Invalid(unknown[0][:80], "is not known here", "send drain or go")
        drained, go = value.get("drain", []), value.get("go", False)
        if not isinstance(drained, list) or len(drained) > MAX_DRAINED:
            raise Invalid("drain", "is not a list, or too long", f"send a list of at most {MAX_DRAINED} nodes")
        if not isinstance(go, bool):
            raise Invalid("go", f"{str(go)[:40]!r} is neither true nor false", "send true to carry the plan out")
        nodes = list(dict.fromkeys(name_of(name, f"drain[{index}]") for index, name in enumerate(drained)))
        return answer(await self._hub.workloads.rebalance(nodes, go))

    async def cancel_rebalance(self, request: web.Request) -> web.Response:
        """See the table."""
        name, service = request.match_info["rebalance"], self._hub.workloads
        found = await service.ask(lambda _, now: service.rebalancing.stop(name, now))
        if found is None:
            raise NotKnown("rebalance", f"{name[:64]!r} is not known", "list /api/v1/rebalance")
        return answer(found)

    # -- budgets and quotas: documents by name -------------------------------------------------------------------------------

    async def budgets(self, _request: web.Request) -> web.Response:
        """See the table."""
        return await self._documents(lambda planner: planner.tables.budgets, "name")

    async def put_budget(self, request: web.Request) -> web.Response:
        """See the table."""
        return await self._put_document(request, "budget", "budget", "name", Planner.put_budget)

    async def delete_budget(self, request: web.Request) -> web.Response:
        """See the table."""
        return await self._delete_document(request, "budget", "budget", Planner.remove_budget)

    async def quotas(self, _request: web.Request) -> web.Response:
        """See the table."""
        return await self._documents(lambda planner: planner.tables.quotas, "tenant")

    async def put_quota(self, request: web.Request) -> web.Response:
        """See the table."""
        return await self._put_document(request, "quota", "tenant", "tenant", Planner.put_quota)

    async def delete_quota(self, request: web.Request) -> web.Response:
        """See the table."""
        return await self._delete_document(request, "quota", "tenant", Planner.remove_quota)

    async def _documents(self, table: Callable[[Planner], dict[str, dict[str, Any]]], key: str) -> web.Response:
        return answer(await self._hub.workloads.look(lambda planner: [{**document, key: name} for name, document in table(planner).items()]))

    async def _put_document(self, request: web.Request, what: str, part: str, key: str, put: Callable[[Planner, str, Any], Any]) -> web.Response:
        """`part`: what the path calls its name, `key`: what the document calls it."""
        name, value = name_of(request.match_info[part], what), await object_of(request)
        await self._hub.workloads.ask(lambda planner, _: put(planner, name, value))
        return answer({**value, key: name})

    async def _delete_document(self, request: web.Request, what: str, part: str, remove: Callable[[Planner, str], bool]) -> web.Response:
        name = request.match_info[part]
        if not await self._hub.workloads.ask(lambda planner, _: remove(planner, name)):
            raise NotKnown(what, f"{name[:64]!r} is not known", f"list /api/v1/{what}s")
        return answer({part: name, "known": False})

    # -- the whole -----------------------------------------------------------------------------------------------------------

    async def scheduler(self, request: web.Request) -> web.Response:
        """See the table."""
        hours, service = hours_of(request, KEEP_MINUTES / 60), self._hub.workloads
        since = int(self._hub.now_ms() - hours * 3_600_000) // 60_000
        history = await self._hub.read(lambda: self._hub.store.read_utilisation(since, KEEP_MINUTES))
        step = max(1, -(-len(history) // MAX_POINTS))
        now = await service.look(views.usage)
        waits, decisions = sorted(service.waits_ms), sorted(service.decisions_ms)
        return answer({
            "now": now, "history": [{"minute": minute, **document} for minute, document in history[::-1][::step][::-1]], "counters": dict(service.counters),
            "submit_ms": _percentiles(waits), "decision_ms": _percentiles(decisions),
        })


def _percentiles(values: list[float]) -> dict[str, Any]:
    """Of sorted milliseconds; null where nothing was measured yet."""
    return {name: round(values[min(len(values) - 1, int(share * len(values)))], 3) if values else None for name, share in (("p50", 0.5), ("p99", 0.99))} | {"count": len(values)}


def error_answer(error: Exception) -> web.Response | None:
    """What the scheduler's errors are to a caller; None for others."""
    from ..workloads.documents import Conflict

    if not isinstance(error, Invalid | Conflict | Busy):
        return None
    status = 400 if isinstance(error, Invalid) else 409 if isinstance(error, Conflict) else 503
    return web.Response(text=json.dumps({"field": error.field or "body", "problem": error.problem, "remedy": error.remedy}), content_type="application/json", status=status)
