"""What the hub, or somebody at this node, asks to be done with workloads that are here: which operations there are and how far each is, kept in the journal.

An operation is carried out by the workload's own task in the runner, one after the other, so that nothing else is done with the workload meanwhile. It begins when its first record is durable.
One that an agent's death interrupted is carried out again by the next agent, from the step that was written down last.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

from ..contract.limits import MAX_OPERATIONS
from ..contract.operations import FINAL_STATES, Operation

KEPT = "workload_operations"
"""The journal's state document that keeps the operations: by id, `operation` (as its record says) and `entry` (as it was asked)."""

REMEMBERED = 2 * MAX_OPERATIONS
"""Operations that are remembered, so that none is done twice: twice what one desired state may hold."""

MAX_REASON = 1000
"""Characters of a reason in a record."""

ACCEPTED = "accepted"
"""The first step: nothing has been done yet."""


class Journal(Protocol):
    """What is needed of the journal."""

    def append(self, stream: str, kind: str, body: dict[str, Any]) -> Any:
        """One record."""

    def state(self, key: str) -> Any:
        """A kept document."""

    def put_state(self, key: str, value: Any, on_durable: Callable[[], None] | None = None) -> None:
        """Keep a document, in one group with the records before it."""


class Operations:
    """The operations of one node.

    Args:
        begin: called with the entry of one that is to be carried out, when it is durable that it was taken. It may be one that was begun before.
    """

    def __init__(self, journal: Journal, begin: Callable[[Mapping[str, Any]], None]) -> None:
        self._journal, self._begin = journal, begin
        kept = journal.state(KEPT)
        self._rows: dict[str, dict[str, Any]] = dict(kept) if isinstance(kept, dict) else {}
        self._given: set[str] = set()
        """What this agent carries out, or has."""

    def take(self, entries: Iterable[Mapping[str, Any]], late: Collection[str] = ()) -> None:
        """These are asked for. Each is taken once, whatever is asked how often; those in `late` have expired before they came."""
        listed = [dict(entry) for entry in entries]
        new = [entry for entry in listed if entry["id"] not in self._rows]
        for entry in new:
            expired = entry["id"] in late
            told = Operation(
                entry["id"], entry["kind"], "expired" if expired else "running", entry["epoch"], ACCEPTED, "expired before it arrived" if expired else "",
                {"workload": entry["workload"], "name": entry["name"]},
            )
            self._rows[entry["id"]] = {"operation": told.to_json(), "entry": None if expired else entry}
            self._journal.append("event", "operation", told.to_json())
        if new:
            self._forget({entry["id"] for entry in listed})
            self._journal.put_state(KEPT, dict(self._rows), self.resume)

    def resume(self) -> None:
        """Have carried out what is under way, and this agent has not begun."""
        for name, row in list(self._rows.items()):
            if row["operation"]["state"] not in FINAL_STATES and name not in self._given:
                self._given.add(name)
                self._begin(row["entry"])

    def get(self, name: str) -> dict[str, Any] | None:
        """One, as its newest record says."""
        row = self._rows.get(name)
        return dict(row["operation"]) if row is not None else None

    @property
    def open(self) -> int:
        """How many have not ended."""
        return sum(row["entry"] is not None for row in self._rows.values())

    def under_way(self, workload: str) -> bool:
        """Whether there is one on this workload that has not ended."""
        return any(row["entry"] is not None and row["entry"]["workload"] == workload for row in self._rows.values())

    def step(self, name: str) -> str:
        """The step that was written down last."""
        return str(self._rows[name]["operation"]["step"])

    async def reach(self, name: str, step: str) -> None:
        """Write a step down; it may be taken when this returns."""
        durable = asyncio.get_running_loop().create_future()
        told = self._moved(name, "running", step, "", {})
        self._rows[name] = {**self._rows[name], "operation": told}
        self._journal.put_state(KEPT, dict(self._rows), lambda: durable.set_result(None) if not durable.done() else None)
        await durable

    def end(self, name: str, state: str, reason: str = "", detail: Mapping[str, Any] | None = None) -> None:
        """It has ended."""
        told = self._moved(name, state, "", reason[:MAX_REASON], detail or {})
        self._rows[name] = {"operation": told, "entry": None}
        self._journal.append("event", "operation", told)
        self._journal.put_state(KEPT, dict(self._rows))

    def _moved(self, name: str, state: str, step: str, reason: str, detail: Mapping[str, Any]) -> dict[str, Any]:
        before = Operation.from_json(self._rows[name]["operation"])
        return before.advance(state, epoch=before.epoch, step=step, reason=reason, detail={**(before.detail or {}), **detail}).to_json()

    def _forget(self, listed: Collection[str]) -> None:
        """The oldest that have ended and are not asked for any more."""
        gone = [name for name, row in self._rows.items() if row["operation"]["state"] in FINAL_STATES and name not in listed]
        for name in gone[: max(0, len(self._rows) - REMEMBERED)]:
            del self._rows[name]
