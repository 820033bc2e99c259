"""What the deadline planner speaks of: batch jobs, the capacity held for them, forecasts, and the verdict at submit with its reason. Pure values; times in ms."""

from dataclasses import dataclass, field

from .profile import Bools, Ints

MARGIN_PERMILLE = 200
"""Durations are estimates: a reservation is this much longer, in thousandths, unless the job says otherwise."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """`need` per member, one entry per resource. `duration_ms` is an estimate; `allowed` ([N]) the nodes it may use, None: all."""

    id: str
    need: tuple[int, ...]
    duration_ms: int
    deadline_ms: int | None = None
    priority: int = 0
    members: int = 1
    margin_permille: int = MARGIN_PERMILLE
    allowed: Bools | None = None

    @property
    def planned_ms(self) -> int:
        """The estimate with its margin, rounded up."""
        return -(-self.duration_ms * (1000 + self.margin_permille) // 1000)


@dataclass(frozen=True, slots=True)
class Hold:
    """Capacity held for a job on a node per member within [start, end)."""

    job: Job
    nodes: tuple[int, ...]
    start_ms: int
    end_ms: int
    need: Ints = field(repr=False)


@dataclass(frozen=True, slots=True)
class Forecast:
    """When a job starts, finishes if its estimate is right, and is through with the margin used up. `late_ms` is `by_ms` past the deadline, 0 where in time."""

    job: str
    start_ms: int
    finish_ms: int
    by_ms: int
    late_ms: int
    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a job starts no earlier: `resource` is short by `short` on `node` until `until_ms`, held by `held_by`. `text` says it; without a resource it is the whole reason."""

    text: str
    resource: str = ""
    node: str = ""
    short: int = 0
    until_ms: int | None = None
    held_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Remedy:
    """One thing that alone would make the deadline, tried on a copy of the plan. `amount`: ms, or nodes."""

    kind: str
    text: str
    amount: int
    job: str = ""


@dataclass(frozen=True, slots=True)
class Admission:
    """The verdict at submit. Refused: nothing is kept of the job; `late_ms` is None where it could never run."""

    admitted: bool
    forecast: Forecast | None
    late_ms: int | None = None
    reason: Reason | None = None
    remedies: tuple[Remedy, ...] = ()
    moved: tuple[Forecast, ...] = ()

    @property
    def text(self) -> str:
        """For people."""
        if self.admitted:
            return "admitted" if self.forecast is None else f"admitted: starts at {self.forecast.start_ms} ms, is through by {self.forecast.by_ms} ms"
        why = self.reason.text if self.reason else ""
        if self.late_ms is None:
            return why
        made = "; it makes it " + ", or ".join(remedy.text for remedy in self.remedies) if self.remedies else ""
        return f"will miss by {duration(self.late_ms)}: {why}{made}"


@dataclass(frozen=True, slots=True)
class Late:
    """A promise that is broken, by what, and by how much."""

    forecast: Forecast
    because: str


def duration(ms: int) -> str:
    """`40 s`, `1.5 s`, `250 ms`."""
    return f"{ms} ms" if ms < 1000 else f"{ms / 1000:g} s"
