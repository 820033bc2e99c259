"""A site in model time: one broker with a queue per subscriber, members that are slow, stopped, killed, cut off, and a broker that restarts.

Only `edge_runtime.site.member` is real. Delays are drawn; the invariants are looked at after every event and at every moment in between at which
something could change by time alone (leases only end).
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.contract.site_messages import Heartbeat, Table
from edge_runtime.site.actions import Beat, Claim, Keep, Publish, Release
from edge_runtime.site.member import Member

TICK_MS = 250
DEVICES = ("boiler-1", "boiler-2", "pump-1", "pump-2")


@dataclass
class Node:
    """One machine: its member, what is durable on it, its connection."""

    name: str
    skew_ms: int
    """Its boot-time clock against model time."""
    member: Member | None = None
    kept: int = 0
    boots: int = 0
    sessions: int = 0
    connection: int = 0
    """At the broker; 0 for none."""
    stopped_until: int = 0
    cut_until: int = 0
    inbox: list[tuple[int, Any]] = field(default_factory=list)
    """What came while it was stopped."""
    seen_table: int = 0


class World:
    """Everything. `make` builds a member (a control builds a broken one)."""

    def __init__(self, seed: int, members: int = 3, make: Callable[..., Member] = Member, slowest_ms: int = 400) -> None:
        self.draw = random.Random(seed)
        self.make = make
        self.slowest_ms = slowest_ms
        self.now = 0
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0
        self._connections = 0
        self._subscribers: dict[int, Node] = {}
        self._last_in: dict[int, int] = {}
        self._last_out: dict[int, int] = {}
        self._retained: Table | None = None
        self._retained_before: list[Table] = []
        self.problems: list[str] = []
        self.nodes = {
            f"e{index}": Node(f"e{index}", self.draw.randrange(1_000_000)) for index in range(1, members + 1)
        }
        for node in self.nodes.values():
            self.boot(node)

    # -- time ----------------------------------------------------------------------------------------------------------------

    def at(self, delay_ms: int, job: Callable[[], None]) -> None:
        """Do `job` so much later."""
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay_ms, self._count, job))

    def run(self, until_ms: int) -> None:
        """Let model time pass."""
        while self._queue and self._queue[0][0] <= until_ms:
            self.now, _, job = heapq.heappop(self._queue)
            job()
            self.check()
        self.now = max(self.now, until_ms)

    def _delay(self) -> int:
        return self.draw.randrange(1, 20) if self.draw.random() < 0.9 else self.draw.randrange(1, self.slowest_ms)

    # -- what happens --------------------------------------------------------------------------------------------------------

    def boot(self, node: Node) -> None:
        """A new process on this machine."""
        node.boots += 1
        node.sessions, node.inbox = 0, []
        patterns = {"e1": ("boiler-*",), "e2": ("pump-1",)}.get(node.name, ())
        node.member = self.make(node.name, f"boot{node.boots}", 1.0, patterns, node.kept)
        self._tick(node, node.member)

    def kill(self, node: Node) -> None:
        """kill -9: only what is kept stays."""
        node.member = None
        self._drop(node)

    def stop(self, node: Node, length_ms: int) -> None:
        """SIGSTOP for a while: time goes on, nothing is read or sent."""
        node.stopped_until = max(node.stopped_until, self.now + length_ms)

    def cut(self, node: Node, length_ms: int, noticed_ms: int) -> None:
        """Its connection is gone for a while; it notices after `noticed_ms`."""
        node.cut_until = max(node.cut_until, self.now + length_ms)
        self._drop(node, noticed_ms)

    def restart_broker(self, memory: str, away_ms: int) -> None:
        """All connections end; the retained table is `kept`, `lost`, or an `old` one from a saved state."""
        if memory != "kept":
            self._retained = self.draw.choice(self._retained_before) if memory == "old" and self._retained_before else None
        for node in self.nodes.values():
            node.cut_until = max(node.cut_until, self.now + away_ms)
            self._drop(node)

    def _drop(self, node: Node, noticed_ms: int = 0) -> None:
        connection, node.connection = node.connection, 0
        self._subscribers.pop(connection, None)
        member = node.member
        if connection and member is not None:
            def notice() -> None:
                if node.member is member and not node.connection:
                    self._give(node, member, member.session_down)

            self.at(noticed_ms, notice)

    def _tick(self, node: Node, member: Member) -> None:
        if node.member is not member:
            return
        self.at(TICK_MS, lambda: self._tick(node, member))
        if self.now < node.stopped_until:
            return
        if not node.connection and self.now >= node.cut_until:
            self._connect(node, member)
        self._give(node, member, member.tick)

    def _connect(self, node: Node, member: Member) -> None:
        self._connections += 1
        node.connection, node.inbox = self._connections, []
        node.sessions += 1
        self._subscribers[node.connection] = node
        if self._retained is not None:
            self._deliver(node, self._retained)
        for device in DEVICES:
            member.noticed(device, self.now + node.skew_ms)
        member.session_up(node.sessions, self.now + node.skew_ms)
        self._give(node, member, member.subscribed)

    def _give(self, node: Node, member: Member, event: Callable[[int], list[Any]]) -> None:
        if node.member is not member:
            return
        if self.now < node.stopped_until:
            self.at(node.stopped_until - self.now, lambda: self._give(node, member, event))
            return
        self._act(node, member, event(self.now + node.skew_ms))

    def _act(self, node: Node, member: Member, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Keep):
                node.kept = max(node.kept, action.number)
            elif isinstance(action, Beat):
                self._publish(node, action.heartbeat)
            elif isinstance(action, Claim):
                self._publish(node, (node.name, action.number))
            elif isinstance(action, Publish):
                self._publish(node, action.table)
            elif isinstance(action, Release):
                self.at(self._delay(), lambda table=action.table: self._give(node, member, lambda now: member.drained(table, now)))  # type: ignore[misc]

    # -- the broker ----------------------------------------------------------------------------------------------------------

    def _publish(self, node: Node, message: Any) -> None:
        """In order per connection, after a delay."""
        connection = node.connection
        if not connection:
            return
        due = max(self.now + self._delay(), self._last_in.get(connection, 0))
        self._last_in[connection] = due

        def take() -> None:
            if node.connection != connection:
                return
            if isinstance(message, Table):
                self._retained = message
                self._retained_before.append(message)
            for subscriber in list(self._subscribers.values()):
                self._deliver(subscriber, message)

        self.at(due - self.now, take)

    def _deliver(self, node: Node, message: Any) -> None:
        connection, member = node.connection, node.member
        due = max(self.now + self._delay(), self._last_out.get(connection, 0))
        self._last_out[connection] = due

        def arrive() -> None:
            if node.connection != connection or node.member is not member or member is None:
                return
            if self.now < node.stopped_until:
                self._last_out[connection] = max(self._last_out[connection], node.stopped_until)
                self.at(node.stopped_until - self.now, arrive)
                return
            now = self.now + node.skew_ms
            if isinstance(message, Heartbeat):
                actions = member.heard(message, now)
            elif isinstance(message, Table):
                actions = member.tabled(message, now)
            else:
                actions = member.claimed(*message, now)
            self._act(node, member, actions)

        self.at(due - self.now, arrive)

    # -- what must hold ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """At no moment do two act on one device, at no moment do two lead by one number; no member's table goes back."""
        leading = [node.member._won_number for node in self.nodes.values() if node.member is not None and node.member.leads and node.member.leased(self.now + node.skew_ms)]
        if len(leading) > len(set(leading)):
            self.problems.append(f"{self.now}: two lead by number {leading}")
        for device in DEVICES:
            able = [node.name for node in self.nodes.values() if node.member is not None and node.member.may_send(device, self.now + node.skew_ms)]
            if len(able) > 1:
                self.problems.append(f"{self.now}: {device} is served by {able}")
        for node in self.nodes.values():
            if node.member is not None and node.member.table is not None:
                if node.member.table.number < node.seen_table:
                    self.problems.append(f"{self.now}: {node.name} went back from table {node.seen_table} to {node.member.table.number}")
                node.seen_table = max(node.seen_table, node.member.table.number)

    def served(self) -> dict[str, list[str]]:
        """Device to who can act on it now."""
        return {
            device: [node.name for node in self.nodes.values() if node.member is not None and node.member.standing(device, self.now + node.skew_ms) == "ours"]
            for device in DEVICES
        }
