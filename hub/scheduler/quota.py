"""Who may use how much, and who is next: quotas with borrowing in cohorts, dominant-resource fairness, reclaim that frees room where it is of use.

Quota and place are decided together: what quota allows but no node takes never blocks those behind it, and reclaiming evicts borrowers on one node where the
workload then fits, not the right amount spread over many.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import gang, preempt
from .arrays import GONE, MAX_RESOURCES
from .model import GPU_MILLI, Quota, Workload
from .place import Pending, Placed, Scheduler
from .state import State
from .units import human

Amounts = dict[str, int]


@dataclass(frozen=True, slots=True)
class Admitted:
    """What `admit` did: who was placed, who waits and why, who was evicted to give back what was borrowed."""

    placed: tuple[Placed, ...]
    pending: tuple[Pending, ...]
    evicted: tuple[Workload, ...]


def asks(workload: Workload) -> Amounts:
    """What counts against a quota."""
    found = dict(workload.shape.requests)
    if workload.shape.gpu is not None:
        found[GPU_MILLI] = workload.shape.gpu.count * workload.shape.gpu.milli
    return found


def used(state: State, tenant: str) -> Amounts:
    """What a tenant holds now."""
    held = state.used_by.get(tenant)
    if held is None:
        return {}
    return {**{name: int(held[row]) for name, row in state.resource_rows.items()}, GPU_MILLI: int(held[MAX_RESOURCES])}


def refusal(state: State, workload: Workload) -> str | None:
    """Why quota forbids a workload now, None where it does not."""
    return _refusal(state, workload.tenant, asks(workload))


def _refusal(state: State, tenant: str, wanted: Amounts) -> str | None:
    """Why the tenant may not have `wanted` beside what it holds; only resources that are wanted count."""
    quota = state.quotas.get(tenant)
    if quota is None:
        return None
    held, borrow = used(state, tenant), dict(quota.borrow)
    for name, nominal in quota.nominal:
        total = held.get(name, 0) + wanted.get(name, 0)
        if not wanted.get(name) or total <= nominal:
            continue
        most = nominal + (borrow.get(name, 0) if quota.cohort else 0)
        if total > most:
            return f"tenant {tenant} would use {human(name, total)} of {human(name, most)}"
        left = unused(state, quota.cohort, name) - wanted[name]
        if left < 0:
            return f"tenant {tenant} would borrow {human(name, total - nominal)}, and cohort {quota.cohort} has {human(name, -left)} too little to lend"
    return None


def admit_gang(scheduler: Scheduler, members: Sequence[Workload], now_ms: int) -> gang.Gang | gang.Refused:
    """Quota and places for all members, or nothing."""
    wanted: dict[str, Amounts] = {}
    for item in members:
        if item.id not in scheduler.state.slot_of:
            mine = wanted.setdefault(item.tenant, {})
            for name, amount in asks(item).items():
                mine[name] = mine.get(name, 0) + amount
    for tenant, amounts in wanted.items():
        reason = _refusal(scheduler.state, tenant, amounts)
        if reason is not None:
            return gang.Refused(members[0].gang, f"quota: {reason}", True)
    return gang.reserve(scheduler, members, now_ms)


def within_nominal(state: State, workload: Workload) -> bool:
    """Whether the workload asks for no more than the tenant's own: then it may reclaim."""
    quota = state.quotas.get(workload.tenant)
    if quota is None:
        return False
    held, wanted = used(state, quota.tenant), asks(workload)
    return all(held.get(name, 0) + wanted.get(name, 0) <= nominal for name, nominal in quota.nominal)


def unused(state: State, cohort: str, name: str) -> int:
    members = [quota for quota in state.quotas.values() if quota.cohort == cohort]
    return sum(dict(quota.nominal).get(name, 0) for quota in members) - sum(used(state, quota.tenant).get(name, 0) for quota in members)


def borrowers(state: State, cohort: str, keep: str) -> frozenset[str]:
    """Workloads of tenants in the cohort, other than `keep`, that hold more than their own; each tenant's newest, until the rest is its own."""
    found: set[str] = set()
    for quota in state.quotas.values():
        if quota.cohort != cohort or not cohort or quota.tenant == keep:
            continue
        over = {name: amount - nominal for name, nominal in quota.nominal if (amount := used(state, quota.tenant).get(name, 0)) > nominal}
        if over:
            found |= {item.id for item in state.items if item is not None and item.tenant == quota.tenant and any(asks(item).get(name) for name in over)}
    return frozenset(found)


def share(state: State, tenant: str, totals: Mapping[str, int]) -> float:
    """Dominant share: the largest part of a resource that the tenant holds, by its weight."""
    quota = state.quotas.get(tenant)
    parts = [amount / totals[name] for name, amount in used(state, tenant).items() if totals.get(name)]
    return max(parts, default=0.0) / (quota.weight if quota else 1)


def totals(state: State) -> Amounts:
    """What the cluster has; slots are nobody's."""
    there = state.status != GONE
    found = {name: int(state.cap[row][there].sum()) for name, row in state.resource_rows.items() if name != "slots"}
    found[GPU_MILLI] = 1000 * int(np.count_nonzero(state.gpu_model[there] >= 0)) if state.gpu_model.size else 0
    return found


def admit(scheduler: Scheduler, pending: Sequence[Workload], now_ms: int) -> Admitted:
    """Place a queue: always the first of the tenant with the smallest dominant share. Who finds no place waits and blocks nobody."""
    state = scheduler.state
    whole = totals(state)
    queues: dict[str, deque[Workload]] = {}
    for item in sorted(pending, key=lambda item: -item.priority):
        queues.setdefault(item.tenant, deque()).append(item)
    placed: list[Placed] = []
    waiting: list[Pending] = []
    evicted: list[Workload] = []
    shares = {tenant: share(state, tenant, whole) for tenant in queues}
    while queues:
        tenant = min(queues, key=lambda name: (shares[name], name))
        item = queues[tenant].popleft()
        if not queues[tenant]:
            del queues[tenant]
        answer, gone = admit_one(scheduler, item, now_ms)
        evicted += gone
        if isinstance(answer, Placed):
            placed.append(answer)
            for name in {tenant, *(other.tenant for other in gone)}:
                shares[name] = share(state, name, whole)
        else:
            waiting.append(answer)
    return Admitted(tuple(placed), tuple(waiting), tuple(evicted))


def admit_one(scheduler: Scheduler, item: Workload, now_ms: int) -> tuple[Placed | Pending, list[Workload]]:
    """Quota, place and, where the tenant asks for its own, reclaim, as one step: all or nothing. Also gives who was evicted."""
    state = scheduler.state
    reason = refusal(state, item)
    answer: Placed | Pending | None = scheduler.standing(item)
    if answer is None and reason is None:
        answer = scheduler.reserve(item, now_ms)
    if isinstance(answer, Placed):
        return answer, []
    quota = state.quotas.get(item.tenant)
    if quota is not None and quota.cohort and within_nominal(state, item):
        made = preempt.plan(scheduler, item, now_ms, only=_reclaimable(state, quota))
        if made is not None:
            gone = [other for name in made.evicted if (other := state.workload(name)) is not None]
            mark = state.begin()
            done = preempt.carry_out(scheduler, made, now_ms)
            if done is not None:
                state.keep(mark)
                return done, gone
            state.undo(mark)
    return answer if answer is not None else Pending(item.id, reason or ""), []


def _reclaimable(state: State, quota: Quota) -> frozenset[str]:
    return borrowers(state, quota.cohort, quota.tenant)
