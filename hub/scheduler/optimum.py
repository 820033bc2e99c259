"""A `Programme` solved by branch and bound (HiGHS): level after level, each held while the next is improved, then the cost.

What is too large for that, or is not proven by it, is improved part by part: all but a few nodes' columns stay as they are, and the rest is solved.
Bounded by nodes and rounds, one thread, a fixed seed and no clock: the same programme and effort give the same answer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np

from .programme import Programme, Terms

EFFORT = 150_000
"""Default: columns of the programme x nodes of branch and bound for each level, as a node takes about as long as the programme is large.

40 workloads on 12 nodes have up to 270 columns, so 550 nodes or more, and 95 % of them need 40: 0.2 s on average, a few seconds at most.
"""

FEWEST_NODES = 50
"""What the effort does not allow that many nodes is solved part by part at once: its first relaxation alone may take longer than all of a small one."""

PART_COLUMNS = 300
"""Columns that are free in one part: about what is solved at the first node, in 0.05 s."""

PART_NODES = 30
"""Of branch and bound for each level of a part; a part that needs more is not worth it."""

PART_EFFORT = 3_000
"""Effort that one part counts for: 50 parts by default, 3 s."""

SLACK = 1e-6
"""How far from whole the solver's numbers may be: its own tolerance."""


@dataclass(frozen=True)
class Optimum:
    """Values of the programme's columns. `value`: workloads per level, highest first, then minus the cost; no placement is above `bound`, where the programme is exact."""

    columns: list[int]
    value: tuple[int, ...]
    bound: tuple[int, ...]
    nodes: int
    """Explored by branch and bound in all."""
    whole: bool = True
    """Solved as one, not only part by part."""


def optimum(programme: Programme, start: Mapping[int, int], effort: int, rng: Random) -> Optimum | None:
    """The best that `effort` finds from `start` (the columns of groups and gangs; the solver completes it); None where nothing allowed was found.

    Raises `ImportError` where the solver is not installed.
    """
    import highspy  # only needed where a backlog is placed together

    if not programme.columns_of_groups:
        nothing = (0,) * (len(programme.levels) + 1)
        return Optimum([0] * len(programme.upper), nothing, nothing, 0)
    nodes = effort // max(1, len(programme.upper))
    best = _solve(highspy, programme, start, nodes, {}) if nodes >= FEWEST_NODES else None
    if best is not None and best.value == best.bound:
        return best
    for _ in range(effort // PART_EFFORT):
        known = start if best is None else dict(enumerate(best.columns))
        free = _part(programme, known, rng)
        fixed = {column: known[column] for column in programme.columns_of_groups if column not in free}
        found = _solve(highspy, programme, known, PART_NODES, fixed)
        if found is None:
            continue
        if best is None:
            best = replace(found, bound=(*(most for _, most in programme.levels.values()), 0), whole=False)
        elif found.value >= best.value:
            best = replace(found, bound=best.bound, nodes=best.nodes + found.nodes, whole=best.whole)
    return best


def _part(programme: Programme, known: Mapping[int, int], rng: Random) -> set[int]:
    """The columns of some nodes, mostly of those where one group may go, half the time a group that is not all placed."""
    groups = [group for group in programme.groups if group.x]
    waiting = [group for group in groups if sum(known[x] for x in group.x.values()) < len(group.members)]
    group = rng.choice(waiting if waiting and rng.random() < 0.5 else groups)
    nodes = list(programme.columns_of_nodes)
    rng.shuffle(nodes)
    if rng.random() < 0.7:
        nodes.sort(key=lambda node: node not in group.x)
    free: set[int] = set()
    for node in nodes:
        mine = programme.columns_of_nodes[node]
        if free and len(free) + len(mine) > PART_COLUMNS:
            break
        free.update(mine)
    return free


def _solve(highspy: Any, programme: Programme, start: Mapping[int, int], nodes: int, fixed: Mapping[int, int]) -> Optimum | None:
    solver = _load(highspy, programme, nodes, fixed)
    every = np.arange(len(programme.upper), dtype=np.int32)
    at = np.array(sorted(start), np.int32)
    solver.setSolution(len(at), at, np.array([start[column] for column in at.tolist()], np.float64))
    columns, value, bound, explored, gap = list[int](), list[int](), list[int](), 0, False
    for terms, most in [*programme.levels.values(), ([(column, -cost) for column, cost in programme.cost.items()], 0)]:
        worth = np.zeros(len(every))
        for column, factor in terms:
            worth[column] = factor
        solver.changeColsCost(len(every), every, -worth)
        if columns:
            solver.setSolution(len(every), every, np.array(columns, np.float64))
        columns = _run(highspy, solver, terms)
        if not columns or not programme.holds(columns):
            return None
        info, reached = solver.getInfo(), _sum(terms, columns)
        proven = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
        limit = reached if proven else most if not math.isfinite(info.mip_dual_bound) else min(most, math.floor(-info.mip_dual_bound + SLACK))
        value.append(reached)
        # Below a level that is not proven a better placement may be worth anything: it counts less there.
        bound.append(most if gap else limit)
        gap |= limit > reached
        explored += max(0, int(info.mip_node_count))
        used = np.flatnonzero(worth).astype(np.int32)
        solver.addRow(float(reached), math.inf, len(used), used, worth[used])
    return Optimum(columns, tuple(value), tuple(bound), explored)


def _run(highspy: Any, solver: Any, terms: Terms) -> list[int]:
    """The values of the columns; none where nothing allowed was found."""
    for _ in range(2):
        solver.run()
        info = solver.getInfo()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return []
        columns = [round(found) for found in solver.getSolution().col_value]
        if abs(_sum(terms, columns) + info.objective_function_value) <= SLACK * max(1, abs(info.objective_function_value)):
            return columns
        # HiGHS 1.16 gives the start back instead of what it found, where presolve alone improves it: once more, without a start.
        solver.clearSolver()
    return []


def _sum(terms: Terms, columns: list[int]) -> int:
    return sum(factor * columns[column] for column, factor in terms)


def _load(highspy: Any, programme: Programme, nodes: int, fixed: Mapping[int, int]) -> Any:
    solver = highspy.Highs()
    for name, setting in (("output_flag", False), ("threads", 1), ("mip_rel_gap", 0.0), ("mip_max_nodes", nodes), ("mip_detect_symmetry", False)):
        # Groups leave few symmetries, and the search for them runs beside the solver: what it finds would depend on when.
        solver.setOptionValue(name, setting)
    columns, rows = len(programme.upper), programme.rows
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = columns, len(rows)
    lower, upper = np.zeros(columns), np.array(programme.upper, np.float64)
    for column, value in fixed.items():
        lower[column] = upper[column] = value
    model.col_cost_, model.col_lower_, model.col_upper_ = np.zeros(columns), lower, upper
    model.integrality_ = [highspy.HighsVarType.kInteger] * columns
    model.row_lower_, model.row_upper_ = np.array([low for low, _, _ in rows], np.float64), np.array([high for _, _, high in rows], np.float64)
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.cumsum([0, *(len(terms) for _, terms, _ in rows)])
    model.a_matrix_.index_ = np.array([column for _, terms, _ in rows for column, _ in terms], np.int32)
    model.a_matrix_.value_ = np.array([factor for _, terms, _ in rows for _, factor in terms], np.float64)
    solver.passModel(model)
    return solver
