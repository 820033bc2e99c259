"""The rounds: who is there, who is lost, who must leave, what can be placed now. Pure; each does bounded work."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..scheduler import quota
from ..scheduler.arrays import SILENT, UP
from ..scheduler.model import Effect
from . import moving
from .planner import Planner
from .rebalancing import Rebalancing

LOST_AFTER_MS = 300_000
"""A node that is no edge has lost what it held after so long without a sign of life: kube's default for the same."""

KEEPERS = ("edge", "hybrid")
"""Kinds of node that work on by themselves for days: in their silence they surely still run what they hold, so it stays theirs."""

BEAT_EVERY_MS = 10_000
"""A node that is heard from is noted so often: an event per node and second would fill the scheduler's log with nothing."""

DECISIONS_PER_ROUND = 64
"""Waiting workloads tried, or lost ones placed anew, in one round: under 100 ms of work beside which the hub takes records in."""
GANG_DECISIONS = 16
"""What a try of a gang counts as: it may search, up to half a second."""


@dataclass(slots=True)
class Heard:
    """What the fleet knows of one node's agent."""

    online: bool
    silent_ms: int
    """Without a sign of life, while the hub listened."""


class Rounds:
    """What a planner does by itself, without being asked."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._rebalancing = Rebalancing(planner)
        self._tried = -1
        self._drained = -1
        self._first: list[str] = []
        self._rest: list[str] = []
        self._again = False
        self._up = 0

    def reconcile(self, heard: Mapping[str, Heard], now_ms: int) -> None:
        """One round: who is there, who is lost, who must leave, who can be placed. Bounded work."""
        planner = self._planner
        self.beats(heard, now_ms)
        self._losses(heard, now_ms)
        planner.budgets()
        if self._drained != planner.version:
            self._drained = planner.version
            emptied = (self._rebalancing.running() or {}).get("nodes", ())  # by a plan, in its order
            for name in [row.name for row in planner.tables.nodes.values() if row.cordon == "drain" and row.name in planner.state.node_index]:
                if name not in emptied and planner.tables.on_node.get(name):
                    planner.drain(name, now_ms)
        tainted = any(taint.effect is Effect.NO_EXECUTE and planner.state.attributes.tainted[code].any() for taint, code in planner.state.attributes.taints.items())
        if tainted or planner.scheduler.tainted_since:
            trial = planner.trial()
            moves = trial.execute_taints(now_ms)
            planner.keep_taints(trial.tainted_since)
            planner.apply(moves[:DECISIONS_PER_ROUND], now_ms)
        moving.advance(planner, now_ms)
        self._rebalancing.advance(now_ms)
        planner.replan(now_ms)
        self._retry(now_ms)

    def beats(self, heard: Mapping[str, Heard], now_ms: int) -> None:
        """Nodes whose agent is there take workloads, the others take nothing new."""
        planner, state = self._planner, self._planner.state
        for name, row in planner.tables.nodes.items():
            index = state.node_index.get(name)
            if index is None or row.origin != "edge":
                continue
            there = heard.get(name)
            if there is not None and there.online:
                if state.status[index] == SILENT:
                    planner.version += 1
                if state.status[index] != UP or not 0 <= now_ms - int(state.beat_ms[index]) < BEAT_EVERY_MS:
                    planner.beat(name, now_ms)
            elif state.status[index] == UP:
                state.set_status(name, SILENT)

    def _losses(self, heard: Mapping[str, Heard], now_ms: int) -> None:
        planner = self._planner
        left = DECISIONS_PER_ROUND
        silent = [name for name, row in planner.tables.nodes.items() if row.origin == "edge" and (index := planner.state.node_index.get(name)) is not None and planner.state.status[index] == SILENT]
        for name in silent:
            there = heard.get(name)
            silence = there.silent_ms if there is not None else now_ms - planner.started_ms
            keeps = planner.tables.nodes[name].document.get("kind", "cloud") in KEEPERS
            for key in sorted(planner.tables.on_node.get(name, ())):
                if (move := planner.move_of(key[0])) is not None and key[1] == move["new_epoch"]:
                    continue  # silence says nothing of what a move has brought there: it may be running
                item = planner.tables.items.get(key[0])
                limit = item.lost_after_ms if item is not None else None
                if limit is None and (keeps or (item is not None and item.moves)):
                    continue
                if silence >= (LOST_AFTER_MS if limit is None else limit) and left > 0:
                    left -= 1
                    planner.lose(planner.tables.open[key], now_ms, f"{name} has not been heard from for {silence // 1000} s")

    def _retry(self, now_ms: int) -> None:
        """Try what waits, by priority, then age. Half of a round begins at the top after every change, half goes on where it was: so nobody is passed over for ever."""
        version = self._planner.version
        if self._tried != version:
            self._tried = version
            self._first = self._order()
            self._again = True
            up = sum(self._planner.is_up(name) for name in self._planner.tables.nodes)
            if up > self._up and self._first:
                self._together(now_ms)
            self._up = up
        if not self._rest and self._again:
            self._rest, self._again = self._order(), False
        failed: set[tuple[Any, ...]] = set()
        self._attempt(self._asked_again(now_ms), DECISIONS_PER_ROUND, failed, now_ms)
        left = self._attempt(self._first, DECISIONS_PER_ROUND // 2, failed, now_ms)
        self._attempt(self._rest, DECISIONS_PER_ROUND // 2 + left, failed, now_ms)

    def _together(self, now_ms: int) -> None:
        """Nodes have come, as after the hub's start: what goes first of all that waits is placed together."""
        tables, planner = self._planner.tables, self._planner
        first = self._first[-DECISIONS_PER_ROUND // 2:][::-1]
        names = [name for name in first if tables.rows[name].state == "pending" and not tables.items[name].item.gang and not tables.rows[name].avoid and name not in tables.room]
        if len(names) > 1:
            planner.place_list(names, now_ms)

    def _order(self) -> list[str]:
        """What waits, the next one last: by priority, then the tenant that has least of its share, then age."""
        tables, state = self._planner.tables, self._planner.state
        whole = quota.totals(state)
        shares = {tenant: quota.share(state, tenant, whole) for tenant in {tables.items[name].item.tenant for name in tables.waiting}}

        def turn(name: str) -> tuple[int, float, int, str]:
            item = tables.items[name].item
            return -item.priority, shares[item.tenant], tables.rows[name].created_ms, name

        return sorted((name for name in tables.waiting if name not in tables.timed), key=turn, reverse=True)

    def _asked_again(self, now_ms: int) -> list[str]:
        """Those that a node refused, and that have left it alone for long enough."""
        tables = self._planner.tables
        due = [name for name in tables.waiting if any(0 < until <= now_ms for until, *_ in tables.rows[name].avoid.values())][:DECISIONS_PER_ROUND]
        for name in due:
            row = tables.rows[name]
            self._planner.set(replace(row, avoid={node: [0 if until <= now_ms else until, *more] for node, (until, *more) in row.avoid.items()}))
        return due

    def _attempt(self, queue: list[str], most: int, failed: set[tuple[Any, ...]], now_ms: int) -> int:
        """Take from the end of `queue`; what has the shape of one that failed just now fails too. Returns how many of `most` decisions are left."""
        tables = self._planner.tables
        while queue and most > 0:
            name = queue.pop()
            row, item = tables.rows.get(name), tables.items.get(name)
            if row is None or item is None or row.state != "pending":
                continue
            alike = not item.item.gang and not row.avoid
            kin = item.item.shape, item.item.priority, item.item.tenant
            if (alike and kin in failed) or (item.item.gang and (item.item.gang,) in failed):
                continue
            if item.item.gang:
                failed.add((item.item.gang,))  # once per round: its search is the dearest of all
                most -= GANG_DECISIONS - 1
            most -= 1
            if not self._planner.attempt(name, now_ms) and alike:
                failed.add(kin)
        return most
