"""The least harm of making room, the slow way: every node tried on the state itself, workload by workload. Shares nothing with the search but the filters and the order of harm."""

from typing import Any

from hub.scheduler.feasible import verdicts
from hub.scheduler.place import Scheduler
from hub.scheduler.reasons import UNRESOLVABLE

OFFSET = 1 << 31
"""Added to every priority before they are summed (kube's rule)."""

Harm = tuple[int, ...]
Found = tuple[Harm, int, tuple[str, ...]]
"""Harm, the node's place among equals, the victims."""


def fits(scheduler: Scheduler, asked: Any, node: int) -> bool:
    """Whether the node takes the workload now."""
    klass = scheduler.state.klass(asked.shape)
    return not verdicts(scheduler.state, klass)[node] and scheduler.seat_on(klass, node) is not None


def harm(victims: list[tuple[Any, int]], violations: int) -> Harm:
    """Of (workload, start): violations, highest priority, sum, number, how long the oldest of the highest has run (its start, negated)."""
    highest = max(item.priority for item, _ in victims)
    return violations, highest, sum(item.priority + OFFSET for item, _ in victims), len(victims), -min(start for item, start in victims if item.priority == highest)


def kube(scheduler: Scheduler, asked: Any, node: int, lower: list[tuple[Any, int, Any, bool]]) -> tuple[Harm, tuple[str, ...]] | None:
    """Kube's plan of a node: all of lower priority go; then those that budgets protect come back where that goes, then the others, the most important first."""
    state = scheduler.state
    allowed = {name: budget.allowed for name, budget in state.budgets.items()}
    violating, others = [], []
    for entry in lower:
        covering = [budget.name for budget in state.budgets.values() if budget.covers(entry[0])]
        for name in covering:
            allowed[name] -= 1
        (violating if any(allowed[name] < 0 for name in covering) else others).append(entry)
    mark = state.begin()
    try:
        for item, _, _, _ in lower:
            state.release(item.id)
        if not fits(scheduler, asked, node):
            return None
        gone = []
        for item, start, seat, ending in violating + others:
            back = state.begin()
            state.adopt(item, seat, start)
            if ending:
                state.set_ending(item.id)
            if fits(scheduler, asked, node):
                state.keep(back)
            else:
                state.undo(back)
                gone.append((item, start))
    finally:
        state.undo(mark)
    if not gone:
        return None
    protected = {entry[0].id for entry in violating}
    return harm(gone, sum(item.id in protected for item, _ in gone)), tuple(item.id for item, _ in gone)


def alone(scheduler: Scheduler, asked: Any, node: int, lower: list[tuple[Any, int, Any, bool]]) -> list[tuple[Harm, tuple[str, ...]]]:
    """The victims that are enough alone; none where there are budgets."""
    state, found = scheduler.state, []
    for item, start, _, _ in [] if state.budgets else lower:
        mark = state.begin()
        state.release(item.id)
        if fits(scheduler, asked, node):
            found.append((harm([(item, start)], 0), (item.id,)))
        state.undo(mark)
    return found


def lower_on(scheduler: Scheduler, asked: Any, node: int) -> list[tuple[Any, int, Any, bool]]:
    """Those that may have to go from a node, the most important first: workload, start, seat, whether it is on its way out."""
    state = scheduler.state
    slots = [slot for slot, item in enumerate(state.items) if item is not None and state.w_node[slot] == node and item.preemptible and item.priority < asked.priority]
    slots.sort(key=lambda slot: (-int(state.w_priority[slot]), int(state.w_start[slot]), slot))
    return [(state.items[slot], int(state.w_start[slot]), state.seats[slot], bool(state.w_ending[slot])) for slot in slots]


def of_node(scheduler: Scheduler, asked: Any, node: int) -> tuple[Harm, tuple[str, ...]] | None:
    """Kube's plan of a node; None where it has none."""
    lower = lower_on(scheduler, asked, node)
    return kube(scheduler, asked, node, lower) if lower else None


def least(scheduler: Scheduler, asked: Any) -> Found | None:
    """The least harmful of all plans of all nodes."""
    state = scheduler.state
    bits = verdicts(state, state.klass(asked.shape))
    plans: list[Found] = []
    for node in range(state.size):
        if int(bits[node]) & int(UNRESOLVABLE):
            continue
        whole = of_node(scheduler, asked, node)
        if whole is not None:
            plans += [(worst, int(state.tie[node]), names) for worst, names in [whole, *alone(scheduler, asked, node, lower_on(scheduler, asked, node))]]
    return min(plans, default=None)
