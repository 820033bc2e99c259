"""Operations: long work as a state machine whose step is written down before it is taken, fenced by an epoch."""

from typing import Any

from .errors import ContractError
from .lean_dataclass import dataclass
from .schema import Field, check_fields

STATES = ("pending", "running", "succeeded", "failed", "expired", "cancelled", "superseded")
FINAL_STATES = frozenset(("succeeded", "failed", "expired", "cancelled", "superseded"))
_NEXT = {
    "pending": frozenset(("running", "succeeded", "failed", "expired", "cancelled", "superseded")),
    "running": frozenset(("running", "succeeded", "failed", "expired", "cancelled", "superseded")),
}

OPERATION_FIELDS = (
    Field("id", "id", "the operation's name, unique within the edge"),
    Field("kind", "id", "what is done: command, ..."),
    Field("state", "enum", "where it stands", choices=STATES),
    Field("epoch", "integer", "the fencing epoch; a party with an older one may not move the operation", minimum=0),
    Field("step", "string", "the step last written down", required=False, default=""),
    Field("reason", "string", "why it failed or ended", required=False, default=""),
    Field("detail", "object", "what belongs to the kind", required=False, default={}),
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation as it stands."""

    id: str
    kind: str
    state: str = "pending"
    epoch: int = 0
    step: str = ""
    reason: str = ""
    detail: dict[str, Any] | None = None

    def advance(self, state: str, *, epoch: int, step: str = "", reason: str = "", detail: dict[str, Any] | None = None) -> "Operation":
        """The operation moved to `state` by a party that holds `epoch`.

        Raises:
            ContractError: the epoch is older than the operation's, the operation has ended, or the state cannot follow.
        """
        if epoch < self.epoch:
            raise ContractError("epoch", f"{epoch} is older than {self.epoch}", "another party has taken over: stop", "fenced")
        if self.state in FINAL_STATES:
            raise ContractError("state", f"the operation has ended as {self.state}", "start a new operation", "ended")
        if state not in _NEXT[self.state]:
            raise ContractError("state", f"{state!r} cannot follow {self.state!r}", f"use one of {', '.join(sorted(_NEXT[self.state]))}", "state")
        return Operation(self.id, self.kind, state, epoch, step or self.step, reason, detail if detail is not None else self.detail)

    def to_json(self) -> dict[str, Any]:
        """The operation as a record body."""
        return {
            "id": self.id, "kind": self.kind, "state": self.state, "epoch": self.epoch, "step": self.step, "reason": self.reason,
            "detail": self.detail or {},
        }

    @staticmethod
    def from_json(value: Any) -> "Operation":
        """An operation from a record body; raises `ContractError`."""
        return Operation(**check_fields(OPERATION_FIELDS, value, "operation"))
