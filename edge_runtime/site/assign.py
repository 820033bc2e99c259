"""Who serves which device: a function of the last table, the devices, and the members that live. Pure."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..contract.site_messages import Duty


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live member as the leader sees it.

    Attributes:
        stable: it has been there long enough to get its home devices back.
        crashed: it came back under the leader's eyes just now; who does so again and again must not hold devices up.
    """

    edge: str
    capacity: float
    stable: bool
    crashed: bool = False


def home_of(device: str, patterns: Mapping[str, Collection[str]]) -> str:
    """The member whose patterns match `device`, the first by name where several do; empty for none."""
    return next((edge for edge in sorted(patterns) if any(fnmatchcase(device, pattern) for pattern in patterns[edge])), "")


def assign(
    before: Mapping[str, Duty], devices: Collection[str], live: Collection[Candidate], home: Callable[[str], str], number: int, *, anew: bool
) -> dict[str, Duty]:
    """The duties of every device, sorted by name.

    A device goes to its home where that lives and is stable; it stays where it is while that member lives and has not crashed; else it goes to
    the member with the least load for its capacity. Who gets a device gets it under `number`; who keeps it keeps the fence.

    Args:
        before: the duties up to now.
        devices: every device of the site.
        live: at least one member.
        home: the member, live or not, where a device has its home; empty for none.
        anew: give every duty under `number`: nobody knows whether `before` is the last word.
    """
    there = {one.edge: one for one in live if not one.crashed} or {one.edge: one for one in live}
    chosen: dict[str, str] = {}
    for device in sorted(devices):
        old = before.get(device)
        kept = old.edge if old is not None and old.edge in there else ""
        at_home = there.get(home(device))
        if at_home is not None and (not kept or at_home.stable):
            kept = at_home.edge
        chosen[device] = kept
    load = dict.fromkeys(there, 0)
    for edge in chosen.values():
        if edge:
            load[edge] += 1
    duties: dict[str, Duty] = {}
    for device, edge in chosen.items():
        if not edge:
            edge = min(there, key=lambda name: ((load[name] + 1) / there[name].capacity if there[name].capacity > 0 else float("inf"), name))
            load[edge] += 1
        old = before.get(device)
        origin = home(device) or (old.origin if old is not None else edge)
        fence = old.fence if old is not None and old.edge == edge and old.origin == origin and not anew else number
        duties[device] = Duty(edge, fence, origin)
    return duties
