"""The scheduler under test as rules over instances: `together` (the whole backlog is known), `online` (one by one as they arrive), and ablations."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hub.scheduler import State, node, workload
from hub.scheduler.improve import Weights, place_together
from hub.scheduler.model import Workload
from hub.scheduler.place import Placed, Scheduler
from hub.scheduler.rank import POLICIES, WEIGHTS, Ranker
from hub.scheduler.units import quantities

from .optimality_instances import Instance, as_scheduler_input
from .optimality_objective import Seat


def state_of(instance: Instance) -> tuple[Scheduler, list[Workload], dict[str, dict[str, int]]]:
    """An empty cluster, the workloads in order of arrival, the quotas."""
    given = as_scheduler_input(instance)
    state = State(seed=instance.seed)
    state.add_nodes([node(item) for item in given["nodes"]])
    for way in given["ways"]:
        if way["from"] < way["to"]:
            state.set_link(way["from"], way["to"], way["rtt_us"], way["kbps"])
    return Scheduler(state), [workload(item) for item in given["workloads"]], {tenant: quantities(limits, "quota") for tenant, limits in given["quotas"].items()}


def placement_of(instance: Instance, scheduler: Scheduler) -> dict[str, Seat]:
    """What the scheduler's state holds, in the terms of the checker."""
    found = {}
    for item in instance.workloads:
        seat = scheduler.state.seat(item.id)
        if seat is not None:
            found[item.id] = Seat(seat.node, tuple(sorted(seat.gpus)), _zone(item.numa, seat.numa))
    return found


def _zone(single: bool, shares: tuple[tuple[int, int, int], ...]) -> int:
    return shares[0][0] if single and shares else 0 if single else -1


def together(instance: Instance, **how: Any) -> Mapping[str, Seat]:
    """All of the instance as one backlog."""
    scheduler, workloads, quotas = state_of(instance)
    place_together(scheduler, workloads, 0, quotas, seed=instance.seed, **how)
    return placement_of(instance, scheduler)
