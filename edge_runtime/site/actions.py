"""What a member of a site decides (`member.Member` returns it, `link` does it), and what it passes to whoever fills in the workloads of its table. Data only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..contract.site_messages import Duty, Heartbeat, Table


@dataclass(frozen=True, slots=True)
class Beat:
    """Publish this sign of life."""

    heartbeat: Heartbeat


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep `number` across restarts; it must be durable before a claim or table with it goes out."""

    number: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Publish a claim of `number`."""

    number: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish this table, retained."""

    table: Table


@dataclass(frozen=True, slots=True)
class Release:
    """Stop with these duties: finish what is decided, publish the hand-over where `may_send` still allows it, then call `Member.drained(table)`."""

    duties: dict[str, Duty]
    table: tuple[int, str]


@dataclass(frozen=True, slots=True)
class Vacate:
    """End these workloads, then call `Member.ended(table)`."""

    duties: dict[str, Duty]
    table: tuple[int, str]


@dataclass(frozen=True, slots=True)
class Start:
    """These duties are ours to act on from now."""

    duties: dict[str, Duty]


@dataclass(frozen=True, slots=True)
class Resume:
    """A short break of the connection is over and everything that was ours still is: go on with what waited."""


@dataclass(frozen=True, slots=True)
class Forget:
    """Others may have acted since: readings that wait and are not covered by a duty of now must not be decided any more."""


@dataclass(frozen=True, slots=True)
class Elected:
    """We lead under `number`."""

    number: int


Action = Beat | Keep | Claim | Publish | Release | Vacate | Start | Resume | Forget | Elected

@dataclass(frozen=True, slots=True)
class Standing:
    """How the members of a site stand, as its leader sees it, for who shall run which workload.

    Attributes:
        live: who is there, the leader too.
        gone: who has been silent for so long that nothing runs there any more.
        cut_off: nobody who is there has a hub.
        binding: members that are gone, of which the last word still counts: no hub can have decided about them since.
    """

    live: frozenset[str]
    gone: frozenset[str]
    cut_off: bool
    binding: frozenset[str]


Place = Callable[[Mapping[str, Duty], Standing, int, bool, int], dict[str, Duty]]
"""`place(before, standing, number, anew, now)`: the duties of workloads; as `assign` of devices."""


@dataclass(slots=True)
class Occupied:
    """A workload that may run here. `until_ms`: what runs is ended then, where the lease is not renewed; 0 where that is not known."""

    duty: Duty
    until_ms: int = 0
