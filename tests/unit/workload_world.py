"""Workloads on the site of `site_world`: containers that outlive their agent, keepers that end them with their lease, a leader that gives them to anybody at random."""

from collections.abc import Callable, Mapping
from typing import Any

from edge_runtime.contract.site_messages import WORKLOAD, Duty
from edge_runtime.site.actions import Occupied, Place, Standing, Start, Vacate
from edge_runtime.site.member import Member
from edge_runtime.workloads.cutoff import Shift

from .site_world import Node, World

KEYS = tuple(f"{WORKLOAD}{name}" for name in ("camera", "meter"))


class Sites(World):
    """Every container has a keeper: it runs until it is stopped, or until the end (by its machine's clock) of the lease that was written down last."""

    def __init__(self, seed: int, members: int = 3, make: Callable[..., Member] = Member, slowest_ms: int = 400, keys: tuple[str, ...] = KEYS) -> None:
        self.keys = keys
        self.until: dict[tuple[str, str], int] = {}
        """(machine, workload) to when its container ends."""
        self.written: dict[str, dict[str, Duty]] = {}
        """Machine to what may run there, as its journal has it."""
        self.given = dict.fromkeys(keys, "e1")
        self.runs = 0
        self.hub = False
        super().__init__(seed, members, make, slowest_ms)

    def boot(self, node: Node) -> None:
        super().boot(node)
        member = node.member
        assert member is not None
        member.occupied = {key: Occupied(duty, self.until.get((node.name, key), 0)) for key, duty in self.written.get(node.name, {}).items()}
        member.place, member.hub = self.placer(node), self.hub

    def placer(self, _node: Node) -> Place:
        """How this member would place as leader: at random."""
        return self._place

    def power(self, node: Node) -> None:
        """Agent and containers, at once."""
        self.kill(node)
        for key in self.keys:
            self.until.pop((node.name, key), None)

    def _place(self, before: Any, standing: Standing, number: int, anew: bool, _now: int) -> dict[str, Duty]:
        if self.draw.random() < 0.03:
            self.given[self.draw.choice(self.keys)] = self.draw.choice(list(self.nodes))
        for key, edge in self.given.items():
            if edge in standing.gone or self.draw.random() < 0.01:
                self.given[key] = self.draw.choice(sorted(standing.live))
        out = {}
        for key, edge in self.given.items():
            old = before.get(key)
            if old is not None and old.edge == edge and not anew:
                out[key] = old
            elif self.draw.random() < 0.98:  # else it leaves the table
                out[key] = Duty(edge, number, "e1", 1)
        return out

    def _act(self, node: Node, member: Member, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Start):
                for key in action.duties:
                    if key in self.keys:
                        self.written.setdefault(node.name, {})[key] = action.duties[key]
                        self.runs += self.until.get((node.name, key), 0) <= self.now + node.skew_ms
                        self.until[node.name, key] = member.occupied[key].until_ms
            elif isinstance(action, Vacate):
                self.at(self._delay(), lambda action=action: self._end(node, member, action))  # type: ignore[misc]
        super()._act(node, member, [action for action in actions if not isinstance(action, Vacate)])
        for key in self.keys:
            if key in member.started and member.leased(self.now + node.skew_ms) and (node.name, key) in self.until:
                self.until[node.name, key] = member.occupied[key].until_ms

    def _end(self, node: Node, member: Member, action: Vacate) -> None:
        if node.member is not member:
            return
        if self.now < node.stopped_until:
            self.at(node.stopped_until - self.now, lambda: self._end(node, member, action))
            return
        for key in action.duties:
            if key not in member.started:
                self.until.pop((node.name, key), None)
        self._give(node, member, lambda now: member.ended(action.table, now))
        self.written[node.name] = {key: duty for key, duty in self.written.get(node.name, {}).items() if key in member.occupied}

    def running(self, key: str) -> list[str]:
        """The machines on which it runs now."""
        return [node.name for node in self.nodes.values() if self.until.get((node.name, key), 0) > self.now + node.skew_ms]

    def check(self) -> None:
        super().check()
        for key in self.keys:
            if len(there := self.running(key)) > 1:
                self.problems.append(f"{self.now}: {key} runs on {there}")


class Placed(Sites):
    """The leader places as it does for real; what each member has from the hub, and its capacity, are on the bus."""

    def __init__(self, seed: int, loads: Mapping[str, Mapping[str, Any]], hub: bool, members: int = 5) -> None:
        self.loads = dict(loads)
        super().__init__(seed, members, keys=tuple(f"{WORKLOAD}{entry['id']}" for load in loads.values() for entry in load["entries"]))
        self.connect(hub)

    def placer(self, node: Node) -> Place:
        return Shift(self.loads).place

    def connect(self, hub: bool) -> None:
        """The hub is there, or gone."""
        self.hub = hub
        for node in self.nodes.values():
            if node.member is not None:
                node.member.hub = hub
