"""What is asked of the placing of workloads besides placing: cancel, lose, nodes, what they say, budgets and quotas. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from edge_runtime.contract.workloads import ENDED, MOVE, RESTART, RUNNING, STAY, WHEN_DRAINED

from ..scheduler import Budget, Moved, Scheduler, parse
from ..scheduler.arrays import GONE
from ..scheduler.model import Quota
from ..store.workloads import FINAL_STATES, NodeRow, PlacementRow, WorkloadRow
from . import moving
from .agenda import Agenda
from .book import UNTOUCHED, ghost, short
from .documents import Conflict, name_of, read_node

MOVES_AT_ONCE = 64
"""Workloads moved in one go: under 100 ms of work beside which the hub takes records in."""

MAX_EPOCH_LEAD = 1_000_000
"""An edge may speak of epochs so far above what this hub gave: a backup is days old, and a placement a second would be a week. What is higher is a fault, and would use them up."""

MAX_FENCES = 8
"""Epochs of one workload of which the site's fences are remembered: that of what stands, and of what may still be told of those before it."""


class Planner(Agenda):
    """Every method may raise `Invalid` or `Conflict` having changed part: call within `begin` and `undo` or `keep`."""

    # -- leaving -------------------------------------------------------------------------------------------------------------

    def cancel(self, workload: str, now_ms: int) -> bool:
        """Nobody wants it any more: at once where it waits or has no agent, else when its edge says that it stopped. False where it is not known."""
        row = self.tables.rows.get(workload)
        if row is None:
            return False
        if row.state == "pending":
            self.set(replace(row, state="cancelled", reason="", changed_ms=now_ms))
        elif row.state == "placed":
            placement = self.current(workload)
            assert placement is not None
            if self.is_agent(placement.node):
                self.leave(placement, now_ms, "cancelled")
                self.set(replace(row, state="ending", reason=f"waits for {placement.node} to stop it", changed_ms=now_ms))
            else:
                self.close(placement, now_ms, "cancelled")
                self.set(replace(row, state="cancelled", node="", reason="", changed_ms=now_ms))
        return True

    def lose(self, placement: PlacementRow, now_ms: int, why: str) -> None:
        """The node is gone with what it held."""
        if moving.lost(self, placement, now_ms):
            placement = self.tables.open.get((placement.workload, placement.epoch), placement)
        row = self.tables.rows.get(placement.workload)
        current = self.current(placement.workload)
        self.close(placement, now_ms, why)
        if row is None or current is None or current.epoch != placement.epoch:
            return
        if row.state == "ending":
            self.set(replace(row, state="cancelled", node="", reason="", changed_ms=now_ms))
        else:
            self.set(replace(row, state="pending", node="", reason=short(why), changed_ms=now_ms))
            self.attempt(row.id, now_ms)

    # -- nodes ---------------------------------------------------------------------------------------------------------------

    def put_node(self, name: str, value: Any, origin: str, now_ms: int, seq: int = 0) -> NodeRow:
        """A new node, or a new description of a known one. Raises `Invalid` or `Conflict`."""
        name_of(name, "node")
        known = self.tables.nodes.get(name)
        if known is not None and known.origin == "edge" and origin == "declared":
            raise Conflict("node", f"{name!r} is an edge that tells by itself what it has", "change the edge's configuration")
        document, node = read_node(value, name, agent=origin == "edge")
        row = NodeRow(name, origin, document, known.cordon if known else "", seq, now_ms, tainted=known.tainted if known else {})
        self.ledger.put(self.tables.nodes, name, row)
        self.describe(row, node, now_ms)
        if known is not None and known.origin != origin:
            for key in self.tables.on_node.get(name, ()):  # from now on an agent must be told
                self.soil(self.tables.open[key].node)
        self.version += 1
        return row

    def remove_node(self, name: str, online: bool, now_ms: int, lost: bool = True) -> bool:
        """The node is gone; what it held is placed anew. False where it is not known; raises `Conflict` for an agent that is there.

        `lost`: nothing of it runs any more, nor on a sibling to which its site may have moved it; else such workloads are a `Conflict`.
        """
        row = self.tables.nodes.get(name)
        if row is None:
            return False
        if row.origin == "edge" and online:
            raise Conflict("node", f"{name!r} is online and would come back", "drain it, and stop its agent first")
        if not lost and (held := self._sites_own(name)):
            raise Conflict(
                "node", f"{name!r} has {', '.join(held[:5])}, which its site may be running on another node by now (when_cut_off: move)",
                "wait until the site is heard from, or cancel them first; where its other nodes are lost too, say lost=true",
            )
        self.state.set_status(name, GONE)
        for key in sorted(self.tables.on_node.get(name, ())):
            self.lose(self.tables.open[key], now_ms, f"{name} was taken out")
        self.ledger.put(self.tables.nodes, name, None)
        return True

    def _sites_own(self, node: str) -> list[str]:
        """Workloads of a node that its site moves by itself while it is cut off: placed anew, they could run twice."""
        rows = (self.tables.rows[workload] for workload, epoch in sorted(self.tables.on_node.get(node, ())) if self.tables.rows[workload].epoch == epoch)
        return [row.id for row in rows if row.state == "placed" and row.document.get("when_cut_off") == "move"]

    def cordon(self, name: str, how: str, now_ms: int) -> bool:
        """`cordon`, `drain` or empty (takes workloads again). False where the node is not known."""
        row = self.tables.nodes.get(name)
        if row is None:
            return False
        if row.cordon != how:
            self.ledger.put(self.tables.nodes, name, replace(row, cordon=how, changed_ms=now_ms))
        if name in self.state.node_index:
            self.state.set_cordon(name, bool(how) or bool(row.document.get("unschedulable", False)))
        self.version += 1
        if how == "drain":
            self.drain(name, now_ms)
        else:
            for move in moving.live(self):  # what has not been touched stays
                if move["source"] == name and move["drain"] and move["step"] in UNTOUCHED:
                    moving.cancel(self, move["id"], now_ms)
        return True

    def drain(self, name: str, now_ms: int) -> list[Moved]:
        """Move what is on the node, as the scheduler's drain says; what cannot move keeps its place, with the reason."""
        trial = self.trial(name)
        moves = trial.drain(name, now_ms)[:MOVES_AT_ONCE]
        self.apply([moved for moved in moves if not self._kept_with_its_state(moved, now_ms)], now_ms)
        return moves

    def _kept_with_its_state(self, moved: Moved, now_ms: int) -> bool:
        """Whether a drained workload stays, moves with its state, or waits for that, as its document says (`when_drained`); else it begins anew elsewhere."""
        row = self.tables.rows.get(moved.workload)
        if row is None or row.state != "placed" or moved.workload in self.tables.moving:
            return True
        wish = row.document.get(WHEN_DRAINED, "")
        if wish == RESTART:
            return False
        if wish == STAY:
            self._must_leave(row, moved.source, f"it stays, as its document says ({WHEN_DRAINED}: {STAY})", now_ms)
            return True
        if moved.held:  # a budget, or no place: so it cannot move with its state either
            return False
        tried = moving.newest(self.tables.moves.values(), row.id)
        since = self.tables.nodes[moved.source].changed_ms
        why = moving.why_not(self, row)
        if not why and tried is not None and tried["state"] != moving.DONE and tried["created_ms"] >= since:
            why = tried["reason"]
        elif not why and moving.busy(self, moved.source) >= moving.AT_ONCE:
            self._must_leave(row, moved.source, f"waits to be moved with its state: {moving.AT_ONCE} are on their way", now_ms)
            return True
        elif not why:
            try:
                moving.begin(self, row.id, "", now_ms, f"{moved.source} is drained", drain=True)
                return True
            except Conflict as error:
                why = error.problem
        if wish == MOVE:
            self._must_leave(row, moved.source, f"it moves only with its state, and cannot: {why}", now_ms)
        return bool(wish == MOVE)

    def _must_leave(self, row: WorkloadRow, source: str, why: str, now_ms: int) -> None:
        if row.reason != (reason := short(f"must leave {source}: {why}")):
            self.set(replace(row, reason=reason, changed_ms=now_ms))

    def trial(self, node: str = "") -> Scheduler:
        """The scheduler on a snapshot without what is on its way out of `node` (or of any)."""
        trial = self.scheduler.on(self.state.snapshot())
        for key in self.tables.on_node.get(node, ()) if node else self.tables.open:
            row = self.tables.rows.get(key[0])
            if row is None or key[1] != row.epoch or row.state != "placed":
                trial.release(ghost(key))
        return trial

    def keep_taints(self, since: Mapping[tuple[str, str, str], int]) -> None:
        """Since when NoExecute taints are there ((node, key, value) to ms): kept with the node, so that the grace that is tolerated outlives a restart."""
        self.scheduler.tainted_since = dict(since)
        for name, row in self.tables.nodes.items():
            found = {f"{key}={value}": ms for (node, key, value), ms in since.items() if node == name}
            if row.tainted != found:
                self.ledger.put(self.tables.nodes, name, replace(row, tainted=found))

    def apply(self, moves: Iterable[Moved], now_ms: int) -> None:
        for moved in moves:
            row = self.tables.rows.get(moved.workload)
            if row is None or row.state != "placed":
                continue
            why = moved.reason or f"{moved.source} is left"
            if moved.to is not None and (self.move(row.id, now_ms, why, moved.to) or self.move(row.id, now_ms, why)):
                continue
            if moved.held or moved.to is not None:
                if row.reason != short(why):
                    self.set(replace(row, reason=short(f"must leave {moved.source}: {why}"), changed_ms=now_ms))
            else:
                self.evict(row.id, now_ms, why)

    def budgets(self) -> None:
        """A budget allows so many of its workloads to be without a running copy at once; those that are now count."""
        for name, document in self.tables.budgets.items():
            budget = parse.budget({**document, "name": name})
            out = 0
            for workload in [*self.tables.waiting, *(key for key, epochs in self.tables.epochs.items() if len(epochs) > 1)]:
                row, item = self.tables.rows.get(workload), self.tables.items.get(workload)
                out += row is not None and item is not None and row.epoch > 0 and budget.covers(item.item)
            wanted = replace(budget, allowed=budget.allowed - out)
            if self.state.budgets.get(name) != wanted:
                self.state.set_budget(wanted)
                self.version += 1

    def put_budget(self, name: str, value: Any) -> Budget:
        """Know a disruption budget. Raises `Invalid`."""
        name_of(name, "budget")
        budget = parse.budget({**value, "name": name}, "budget")
        self.ledger.put(self.tables.budgets, name, {key: part for key, part in value.items() if key != "name"})
        self.budgets()
        return budget

    def remove_budget(self, name: str) -> bool:
        """Forget a budget; False where it is not known."""
        if name not in self.tables.budgets:
            return False
        self.ledger.put(self.tables.budgets, name, None)
        self.state.set_budget(Budget(name, "", parse.selector({}, "selector"), 0))  # an empty selector covers nothing
        self.version += 1
        return True

    def put_quota(self, tenant: str, value: Any) -> Quota:
        """Know what a tenant may use; what it holds already stays. Raises `Invalid`."""
        name_of(tenant, "quota")
        limits = parse.quota({**value, "tenant": tenant}, "quota")
        self.ledger.put(self.tables.quotas, tenant, {key: part for key, part in value.items() if key != "tenant"})
        self.state.set_quota(limits)
        self.version += 1
        return limits

    def remove_quota(self, tenant: str) -> bool:
        """Let a tenant use what there is; False where it had no quota."""
        if tenant not in self.tables.quotas:
            return False
        self.ledger.put(self.tables.quotas, tenant, None)
        self.state.set_quota(Quota(tenant, ()))  # names nothing, so it limits nothing
        self.version += 1
        return True

    # -- what edges say ------------------------------------------------------------------------------------------------------

    def capacity(self, edge: str, seq: int, body: Any, now_ms: int) -> None:
        """A `node.capacity` record. Raises `Invalid`; what the node was stands then."""
        known = self.tables.nodes.get(edge)
        if known is not None and known.origin == "edge" and seq <= known.seq:
            return
        self.put_node(edge, body, "edge", now_ms, seq)

    def refuse_capacity(self, edge: str, seq: int, problem: str, now_ms: int) -> None:
        """Keep why a description does not count."""
        known = self.tables.nodes.get(edge)
        if known is not None and known.origin == "edge" and seq > known.seq:
            self.ledger.put(self.tables.nodes, edge, replace(known, seq=seq, problem=short(problem), changed_ms=now_ms))

    def said(self, edge: str, seq: int, body: Mapping[str, Any], now_ms: int) -> None:
        """A `workload` record of an edge, `seq` its number in the edge's stream of events, body as `REPORT_FIELDS`. What speaks of no open placement there is old news.

        Records come in any order, what is live before what waited; the edge's numbers only grow, also over a replaced journal. So of one placement counts what its edge said last by them, whatever came last: what is older
        tells only what nothing newer has told. An end is the last word.
        """
        key = (body["id"], body["epoch"])
        load_ms = body.get("load_ms", 0)
        if load_ms and edge in self.state.node_index and (item := self.tables.items.get(body["id"])) is not None:  # measured is measured, whatever became of it since
            self.loads.observe(item.item.shape.image, edge, load_ms)
        if body.get("for"):
            self._moved_by_site(edge, body, now_ms)
        placement, row = self.tables.open.get(key), self.tables.rows.get(body["id"])
        if placement is not None and placement.node != edge and placement.seat.get("site"):
            return  # the site gave it to another since: what this one says of it is from before
        if placement is None or row is None or placement.node != edge:
            self._old_news(edge, body["id"], body["epoch"], now_ms)
            return
        what, why, newer = body["state"], body["reason"], seq > placement.seqs.get("said", 0)
        if newer and moving.spoken(self, placement, what, why, now_ms, float(body.get("still_ms", 0))):
            return
        placement, row = self.tables.open[key], self.tables.rows[row.id]
        if what not in ENDED:
            self._noted(placement, seq, {"said": what, "form": body.get("form", ""), "load_ms": load_ms})
            if what == RUNNING and edge in row.avoid:
                self.set(replace(row, avoid={node: entry for node, entry in row.avoid.items() if node != edge}))
            return
        if not newer:
            return
        current = self.current(row.id)
        self.close(replace(placement, said=what, seqs={**placement.seqs, "said": seq}), now_ms, why or what)
        if current is None or current.epoch != placement.epoch:
            return
        if row.state == "ending":
            self.set(replace(row, state="cancelled", node="", reason="", changed_ms=now_ms))
        elif what in FINAL_STATES:
            self.set(replace(row, state=what, node="", reason=short(why), changed_ms=now_ms))
        else:
            self.refused(replace(row, state="pending", node=""), edge, f"{edge} {what} it: {why or 'no reason given'}", now_ms)

    def _noted(self, placement: PlacementRow, seq: int, told: Mapping[str, Any]) -> None:
        """What a record of that number tells of an open placement, each where nothing newer has told it; empty: it tells nothing of that."""
        newer = {name: value for name, value in told.items() if value and seq > placement.seqs.get(name, 0)}
        if newer:
            seat = {**placement.seat, **{name: value for name, value in newer.items() if name != "said"}}
            found = replace(placement, said=newer.get("said", placement.said), seat=seat, seqs={**placement.seqs, **dict.fromkeys(newer, seq)})
            self.ledger.put(self.tables.open, (placement.workload, placement.epoch), found)

    def _moved_by_site(self, edge: str, body: Mapping[str, Any], now_ms: int) -> None:
        """A site that was cut off gave a placement to a sibling of its node, by itself. Where it stands, it stands there now, under the same epoch; where it does not, the sibling shall stop it.

        The highest fence counts: two may have had it, one after the other. So it does where the placement has ended since: what was said under that fence, or a lower one, is from before.
        """
        workload, epoch, fence = body["id"], body["epoch"], body["fence"]
        key, row, node = (workload, epoch), self.tables.rows.get(workload), self.tables.nodes.get(edge)
        if row is None or epoch > row.epoch:
            return  # from before this hub was restored: as any other word of such an epoch
        if node is None or edge not in self.state.node_index:
            raise Conflict("for", f"{edge} runs {workload!r} of epoch {epoch} by its site's own doing, and it is no node here", "see what the edge runs")
        placement = self.tables.open.get(key)
        site = placement.seat.get("site") if placement is not None else None
        if fence <= max(row.fences.get(str(epoch), 0), site["fence"] if site is not None else 0):
            return
        row = replace(row, fences=dict(sorted({**row.fences, str(epoch): fence}.items(), key=lambda each: int(each[0]))[-MAX_FENCES:]))
        self.set(row)
        seat = {"gpus": [], "numa": [], "site": {"origin": body["for"], "fence": fence}}
        if placement is None:
            found = PlacementRow(workload, epoch, edge, seat, now_ms)
            if row.state == "pending" and row.epoch == epoch:  # also where it has ended there: that it ran may be told later
                self.settle(row, found, now_ms)
                return
            if body["state"] in ENDED:
                return
            self.intrude(replace(found, why="its site ran it here while it was cut off; it is placed otherwise since"), now_ms)
        else:
            self.carry(placement, replace(placement, node=edge, seat=seat, from_ms=max(now_ms, placement.from_ms), said="", seqs={}), now_ms)

    def _old_news(self, edge: str, workload: str, epoch: int, now_ms: int) -> None:
        """An edge speaks of no open placement of its own: of one that has ended, or of one that this hub gave before it was restored from an older backup.

        Then an epoch was given that the hub does not know of, or gives a second time. As with generations the highest heard counts: what stands goes on above it. But one that this hub reserved for a move of which
        nothing came is known of: the target's words of it may come after its refusal, and what goes on at the source must not begin anew for them.
        """
        row = self.tables.rows.get(workload)
        given = row.epoch if row is not None else 0
        known = max(given, self.tables.heard.get(workload, 0))  # of one that is placed: given, or reserved by `moving.begin`
        if epoch > known + MAX_EPOCH_LEAD:
            raise Conflict("epoch", f"{epoch} of {workload!r} is far above {given}", "see what the edge runs: no hub gave that")
        if epoch > given:
            self.hear(workload, epoch)
        current = self.current(workload) if row is not None and row.state == "placed" else None
        if row is not None and current is not None and (epoch > known or (epoch == given and current.node != edge)):
            self.renumber(row, now_ms, f"{edge} knows epoch {epoch} from before this hub was restored")

    def untellable(self, node: str, reason: str, now_ms: int) -> bool:
        """The node's desired state cannot be written: a move that has touched nothing yet, or else the newest placement there is taken back. False where there is none."""
        for move in moving.live(self):
            if node in (move["source"], move["target"]) and move["step"] in UNTOUCHED:
                moving.give_up(self, move, f"{node} cannot be told: {reason}", now_ms)
                return True
        newest = max((self.tables.open[key] for key in self.tables.on_node.get(node, ()) if self.current(key[0]) is self.tables.open[key] and self.tables.rows[key[0]].state == "placed"),
                     key=lambda placement: (placement.from_ms, placement.workload), default=None)
        if newest is None:
            return False
        self.close(newest, now_ms, reason)
        self.refused(replace(self.tables.rows[newest.workload], state="pending", node=""), node, f"{node} cannot be told: {reason}", now_ms)
        return True
