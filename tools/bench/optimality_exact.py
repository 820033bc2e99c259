"""Instances solved to proven optimality (CP-SAT of OR-Tools), from the definitions in `optimality_objective.py` and nothing of the scheduler.

`solve(instance, fixed)` gives the best placement in which the workloads in `fixed` sit where it says (None: not placed).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ortools.sat.python import cp_model

from .optimality_instances import Instance, Workload, kbps
from .optimality_objective import GPU_WHOLE, SKEW_POINTS, SPREAD, Seat, eligible, fits_alone, placement_cost

WORKERS = 2
"""Threads of the solver: a machine with two cores runs this."""


class Undecided(RuntimeError):
    """No proof within the time limit."""


@dataclass(frozen=True)
class Solution:
    """A proven optimum: `score` is the objective as one integer, larger is better."""

    score: int
    placement: dict[str, Seat]


@dataclass
class _Model:
    instance: Instance
    model: Any
    x: dict[tuple[int, int], Any]
    device: dict[tuple[int, int, int], Any]
    zone: dict[tuple[int, int, int], Any]
    objective: Any


def solve(instance: Instance, fixed: Mapping[str, Seat | None], seconds: float, hint: Mapping[str, Seat] | None = None) -> Solution | None:
    """The optimum with `fixed` kept; None where nothing allowed is left. Raises `Undecided` after `seconds` of the solver's own, repeatable time."""
    built = _build(instance)
    model = built.model
    for index, w in enumerate(instance.workloads):
        if w.id in fixed:
            _fix(built, index, fixed[w.id])
    if hint is not None:
        _hint(built, hint)
    solver = cp_model.CpSolver()
    solver.parameters.max_deterministic_time = seconds
    solver.parameters.num_workers = WORKERS
    solver.parameters.random_seed = 1
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return None
    if status != cp_model.OPTIMAL:
        raise Undecided(f"instance {instance.seed}: {solver.status_name(status)} after {seconds} s")
    placement = {}
    for (index, node), variable in built.x.items():
        if solver.value(variable):
            w = instance.workloads[index]
            devices = tuple(d for d in range(instance.nodes[node].gpus) if (index, node, d) in built.device and solver.value(built.device[index, node, d]))
            zone = next((z for z in range(instance.nodes[node].zones) if (index, node, z) in built.zone and solver.value(built.zone[index, node, z])), -1)
            placement[w.id] = Seat(node, devices, zone)
    return Solution(round(solver.objective_value), placement)


def _fix(built: _Model, index: int, seat: Seat | None) -> None:
    model = built.model
    for (other, node), variable in built.x.items():
        if other == index:
            model.add(variable == int(seat is not None and node == seat.node))
    if seat is None:
        return
    if (index, seat.node) not in built.x:
        model.add_bool_or([])
        return
    for (other, node, d), variable in built.device.items():
        if other == index and node == seat.node:
            model.add(variable == int(d in seat.devices))
    for (other, node, z), variable in built.zone.items():
        if other == index and node == seat.node:
            model.add(variable == int(z == seat.zone))


def _hint(built: _Model, hint: Mapping[str, Seat]) -> None:
    names = [w.id for w in built.instance.workloads]
    for (index, node), variable in built.x.items():
        seat = hint.get(names[index])
        built.model.add_hint(variable, int(seat is not None and seat.node == node))
    for table, part in ((built.device, "devices"), (built.zone, "zone")):
        for (index, node, at), variable in table.items():
            seat = hint.get(names[index])
            here = seat is not None and seat.node == node
            built.model.add_hint(variable, int(here and seat is not None and (at in seat.devices if part == "devices" else at == seat.zone)))


def _build(instance: Instance) -> _Model:
    model = cp_model.CpModel()
    nodes, workloads = instance.nodes, instance.workloads
    built = _Model(instance, model, {}, {}, {}, None)
    for i, w in enumerate(workloads):
        for n, node in enumerate(nodes):
            if fits_alone(instance, w, node):
                continue
            x = built.x[i, n] = model.new_bool_var(f"x{i}_{n}")
            if w.gpu_count:
                for d in range(node.gpus):
                    built.device[i, n, d] = model.new_bool_var(f"g{i}_{n}_{d}")
                model.add(sum(built.device[i, n, d] for d in range(node.gpus)) == w.gpu_count * x)
            if w.numa:
                for z in range(node.zones):
                    built.zone[i, n, z] = model.new_bool_var(f"z{i}_{n}_{z}")
                model.add(sum(built.zone[i, n, z] for z in range(node.zones)) == x)
        model.add_at_most_one(built.x[i, n] for n in range(len(nodes)) if (i, n) in built.x)
    _capacity(built)
    _apart_and_together(built)
    penalties = _spread(built)
    for gang in {w.gang for w in workloads if w.gang}:
        members = [i for i, w in enumerate(workloads) if w.gang == gang]
        for i in members[1:]:
            model.add(_placed(built, i) == _placed(built, members[0]))
        if len(members) != workloads[members[0]].gang_size:
            model.add(_placed(built, members[0]) == 0)
    # Lexicographic as one integer: a point of a higher level is worth more than everything below it together.
    costs = {(i, n): placement_cost(instance, workloads[i], nodes[n]) for i, n in built.x}
    most_cost = sum(max((cost for (other, _), cost in costs.items() if other == i), default=0) for i in range(len(workloads)))
    most_cost += SPREAD * SKEW_POINTS * sum(len(w.spread) for w in workloads) * len(workloads)
    unit, total = most_cost + 1, []
    for level in sorted({w.priority for w in workloads}):
        mine = [i for i, w in enumerate(workloads) if w.priority == level]
        total += [unit * x for (i, _), x in built.x.items() if workloads[i].priority == level]
        unit *= len(mine) + 1
    total += [-costs[at] * x for at, x in built.x.items()]
    model.maximize(sum(total) - sum(penalties))
    return built


def _placed(built: _Model, i: int) -> Any:
    return sum(x for (other, _), x in built.x.items() if other == i)


def _inside(built: _Model, i: int, key: str, domain: str) -> Any:
    return sum(x for (other, n), x in built.x.items() if other == i and built.instance.nodes[n].domain(key) == domain)


def _domains(built: _Model, key: str) -> list[str]:
    return sorted({node.domain(key) for node in built.instance.nodes})


def _capacity(built: _Model) -> None:
    model, instance = built.model, built.instance
    for n, node in enumerate(instance.nodes):
        here = [(w, i) for i, w in enumerate(instance.workloads) if (i, n) in built.x]
        model.add(sum(w.cpu * built.x[i, n] for w, i in here) <= node.cpu)
        model.add(sum(w.memory * built.x[i, n] for w, i in here) <= node.memory)
        for z in range(node.zones):
            pinned = [(w, i) for w, i in here if w.numa]
            model.add(sum(w.cpu * built.zone[i, n, z] for w, i in pinned) <= node.cpu // node.zones)
            model.add(sum(w.memory * built.zone[i, n, z] for w, i in pinned) <= node.memory // node.zones)
        for d in range(node.gpus):
            users = [(w, i) for w, i in here if w.gpu_count]
            model.add(sum(w.gpu_milli * built.device[i, n, d] for w, i in users) <= GPU_WHOLE)
            model.add(sum(w.gpu_memory * built.device[i, n, d] for w, i in users) <= node.gpu_memory)
    for tenant, (cpu, memory) in instance.quotas.items():
        mine = [i for i, w in enumerate(instance.workloads) if w.tenant == tenant]
        model.add(sum(instance.workloads[i].cpu * _placed(built, i) for i in mine) <= cpu)
        model.add(sum(instance.workloads[i].memory * _placed(built, i) for i in mine) <= memory)
    ways: dict[tuple[str, str], list[Any]] = {}
    for (i, n), x in built.x.items():
        for site, _, least in instance.workloads[i].links:
            here_site = instance.nodes[n].site
            if least and here_site != site:
                ways.setdefault((min(here_site, site), max(here_site, site)), []).append(least * x)
    for pair, terms in ways.items():
        model.add(sum(terms) <= kbps(*pair))


def _apart_and_together(built: _Model) -> None:
    model, workloads = built.model, built.instance.workloads
    for i, w in enumerate(workloads):
        for app, key in w.anti_affinity:
            for domain in _domains(built, key):
                for j, other in enumerate(workloads):
                    if j != i and other.app == app:
                        model.add(_inside(built, i, key, domain) + _inside(built, j, key, domain) <= 1)
        for app, key in w.affinity:
            if app != w.app:
                for domain in _domains(built, key):
                    model.add(sum(_inside(built, j, key, domain) for j, other in enumerate(workloads) if other.app == app) >= _inside(built, i, key, domain))
    groups = {(app, key): w for w in workloads for app, key in w.affinity if app == w.app}
    for app, key in groups:
        chosen = {domain: model.new_bool_var(f"home_{app}_{domain}") for domain in _domains(built, key)}
        model.add_at_most_one(chosen.values())
        for i, w in enumerate(workloads):
            if w.app == app:
                for domain, home in chosen.items():
                    model.add(_inside(built, i, key, domain) <= home)


def _spread(built: _Model) -> list[Any]:
    """Hard spreads as constraints; the points of the soft ones."""
    model, instance = built.model, built.instance
    points = []
    groups: dict[tuple[str, int, str, bool], Workload] = {(w.app, *spread): w for w in instance.workloads for spread in w.spread}
    for (app, skew, key, hard), like in groups.items():
        members = [i for i, w in enumerate(instance.workloads) if w.app == app]
        domains = sorted({node.domain(key) for node in instance.nodes if eligible(like, node)})
        counts = {domain: sum(_inside(built, i, key, domain) for i in members) for domain in domains}
        beyond = 0 if hard else model.new_int_var(0, len(members), f"skew_{app}_{key}")
        for one in domains:
            for other in domains:
                if one != other:
                    model.add(counts[one] - counts[other] <= skew + beyond)
        if not hard:
            points.append(SPREAD * SKEW_POINTS * beyond)
    return points
