"""The scheduler under test as rules over instances: `together` (the whole backlog is known) and `online` (each as it arrives), with ablations."""

from collections.abc import Mapping
from typing import Any

from hub.scheduler import State, gang, node, quota, workload
from hub.scheduler.model import Kind, Workload
from hub.scheduler.parse import quota as parse_quota
from hub.scheduler.place import Scheduler
from hub.scheduler.rank import WEIGHTS, Ranker
from hub.scheduler.together import Result, place_together

from .optimality_instances import Instance, as_scheduler_input
from .optimality_judge import Broken
from .optimality_objective import Seat, units
from .placement_check import Checker

Ready = tuple[Scheduler, list[Workload], dict[str, Any]]


def prepared(instance: Instance, without: str = "") -> Ready:
    """A scheduler on an empty cluster, the workloads in order of arrival, the input it came from. `without`: a policy whose weight is 0."""
    given = as_scheduler_input(instance)
    state = State(seed=instance.seed)
    state.add_nodes([node(item) for item in given["nodes"]])
    for way in given["ways"]:
        if way["from"] < way["to"]:
            state.set_link(way["from"], way["to"], way["rtt_us"], way["kbps"])
    for tenant, limits in given["quotas"].items():
        state.set_quota(parse_quota({"tenant": tenant, "nominal": limits}))
    weights: Mapping[Kind, Mapping[str, int]] = {kind: {name: weight for name, weight in of.items() if name != without} for kind, of in WEIGHTS.items()}
    return Scheduler(state, Ranker(weights=weights)), [workload(item) for item in given["workloads"]], given


def placement_of(instance: Instance, scheduler: Scheduler) -> dict[str, Seat]:
    """What the scheduler's state holds, in the terms of the checker."""
    found = {}
    for item in instance.workloads:
        seat = scheduler.state.seat(item.id)
        if seat is not None:
            found[item.id] = Seat(seat.node, tuple(sorted(seat.gpus)), (seat.numa[0][0] if seat.numa else 0) if item.numa else -1)
    return found


def backlog(instance: Instance, **how: Any) -> tuple[Mapping[str, Seat], Result]:
    """All of the instance as one backlog: the placement, and what the library says of it."""
    scheduler, workloads, given = prepared(instance)
    result = place_together(scheduler, workloads, 0, seed=instance.seed, **how)
    check_log(scheduler, given)
    return placement_of(instance, scheduler), result


def together(instance: Instance, **how: Any) -> Mapping[str, Seat]:
    """The placement of `backlog` alone."""
    return backlog(instance, **how)[0]


def online(instance: Instance, without: str = "") -> Mapping[str, Seat]:
    """One after the other as they arrive, nothing known of what comes, nothing tried again."""
    scheduler, workloads, given = prepared(instance, without)
    by_id = {item.id: item for item in workloads}
    for unit in units(instance.workloads):
        members = [by_id[w.id] for w in unit]
        if not members[0].gang:
            quota.admit_one(scheduler, members[0], 0)
            continue
        mark = scheduler.state.begin()
        done = gang.reserve(scheduler, members, 0)
        over = any(_over(scheduler, tenant) for tenant in {item.tenant for item in members})
        if isinstance(done, gang.Refused) or over:
            scheduler.state.undo(mark)
        else:
            scheduler.state.keep(mark)
    check_log(scheduler, given)
    return placement_of(instance, scheduler)


def _over(scheduler: Scheduler, tenant: str) -> bool:
    limit = scheduler.state.quotas.get(tenant)
    held = quota.used(scheduler.state, tenant)
    return limit is not None and any(held.get(name, 0) > most for name, most in limit.nominal)


def check_log(scheduler: Scheduler, given: Mapping[str, Any]) -> None:
    """Every event that stands, one by one, by the checker that the other benchmarks use. Raises `Broken`."""
    raw = {item["id"]: item for item in given["workloads"]}
    checker = Checker(given["nodes"], quotas=given["quotas"])
    for event in scheduler.state.log:
        if event[0] == "place":
            item, seat = event[1], event[2]
            single = raw[item.id]["numa"] == "single"
            checker.placed(raw[item.id], scheduler.state.nodes[seat.node].name, seat.gpus, seat.numa[0][0] if single and seat.numa else None)
        elif event[0] == "release":
            checker.released(event[1])
    if checker.problems:
        raise Broken(f"placement_check: {'; '.join(checker.problems[:3])}")
