"""Handlers of moves of workloads with their state, and of how far a node's drain is."""

from typing import TYPE_CHECKING, Any

from aiohttp import web

from ..scheduler import Invalid
from ..workloads import moving
from ..workloads.documents import name_of
from ..workloads.planner import Planner
from .reading import NotKnown, answer, limit_of
from .workloads import WorkloadApi, object_of

if TYPE_CHECKING:
    from ..server import Hub


class MoveApi(WorkloadApi):
    """Mixed into `HubApi`."""

    _hub: "Hub"

    async def moves(self, request: web.Request) -> web.Response:
        """See the table."""
        found = await self._hub.workloads.look(lambda planner: list(planner.tables.moves.values())[::-1][: limit_of(request)])
        return answer([self._shown_move(one) for one in found])

    async def move(self, request: web.Request) -> web.Response:
        """See the table."""
        value = await object_of(request)
        unknown = sorted(set(value) - {"workload", "to", "limit_mbit"})
        if unknown:
            raise Invalid(unknown[0][:80], "is not known here", "send workload, to and limit_mbit")
        name, to, limit = name_of(value.get("workload"), "workload"), value.get("to", ""), value.get("limit_mbit", moving.LIMIT_MBIT)
        if to:
            name_of(to, "to")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 1 <= limit <= moving.LIMIT_MOST_MBIT:
            raise Invalid("limit_mbit", f"{str(limit)[:20]!r} is not 1 to {moving.LIMIT_MOST_MBIT:.0f}", "give Mbit/s")
        if name not in self._hub.workloads.rows:
            raise NotKnown("workload", f"{name[:64]!r} is not known", "list /api/v1/workloads")
        return answer(self._shown_move(await self._hub.workloads.ask(lambda planner, now: moving.begin(planner, name, to, now, "asked for", float(limit)))))

    async def cancel_move(self, request: web.Request) -> web.Response:
        """See the table."""
        name = request.match_info["move"]
        found = await self._hub.workloads.ask(lambda planner, now: moving.cancel(planner, name, now))
        if found is None:
            raise NotKnown("move", f"{name[:64]!r} is not known", "list /api/v1/moves")
        return answer(self._shown_move(found))

    async def draining(self, request: web.Request) -> web.Response:
        """See the table."""
        name = self._node(request)

        def look(planner: Planner) -> tuple[list[tuple[str, str]], dict[str, dict[str, Any]]]:
            live, there = {move["workload"]: move for move in moving.live(planner)}, []
            for workload, epoch in sorted(planner.tables.on_node.get(name, ())):
                row = planner.tables.rows[workload]
                if epoch == row.epoch and row.state == "placed":
                    there.append((workload, row.reason))
                elif workload not in live:  # else its room is reserved here
                    there.append((workload, "is being stopped"))
            return there, live

        there, moves = await self._hub.workloads.look(look)
        return answer([{"workload": workload, "reason": reason, "move": self._shown_move(moves[workload]) if workload in moves else None} for workload, reason in there])

    def _shown_move(self, move: dict[str, Any]) -> dict[str, Any]:
        """Without what only its parties need; with how far its state is, and how long that is expected to take."""
        carried = self._hub.transfers.book.transfers.get(moving.shown_transfer(move))
        progress = dict(carried.progress) if carried is not None else {}
        if progress and moving.runs_on(move):  # nobody knows how much it will be: what it writes meanwhile goes over again
            progress["length"] = max(progress["moved_bytes"], move["offer"].get("bytes", 0))
        shown = {key: part for key, part in move.items() if key not in ("offer", "ready", "takes_live", "waits", "listens", "takes_ahead", "root")}
        return {
            **shown, "needs_bytes": move["offer"].get("bytes", 0), "progress": progress, "why_still": _why_still(move), "prediction": dict(carried.prediction) if carried is not None else {},
            "expected_s": carried.prediction.get("estimated_duration_seconds") if carried is not None else None,
        }


def _why_still(move: dict[str, Any]) -> str:
    """For how long one that moved while it ran stood still, or why it had to for its way; empty where there is nothing to say."""
    if move["state"] == moving.DONE and move.get("live"):
        return f"moved while it ran, and stood still for {move['still_ms']:.0f} ms" if move["still_ms"] else "moved while it ran"
    return f"not while it ran: {move['live_problem']}" if move.get("live_problem") else ""
