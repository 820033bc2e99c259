"""A `Programme` solved by branch and bound (HiGHS): level after level, each held while the next is improved, then the cost. Bounded by nodes, not by time.

One thread, a fixed seed and no clock: the same programme and effort give the same answer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .programme import Programme, Terms

EFFORT = 150_000
"""Default: columns of the programme x nodes of branch and bound for each level, as a node takes about as long as the programme is large. 600 nodes or more for 40 workloads on 12 nodes, and most take 1."""

FEWEST_NODES = 100
"""What is too large for that many nodes within the effort is not begun: its first relaxation alone would take longer than all of a small one."""

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


def optimum(programme: Programme, start: Mapping[int, int], effort: int = EFFORT) -> Optimum | None:
    """The best that `effort` finds from `start` (columns to values; the solver completes it); None where nothing allowed was found, or the programme is too large.

    Raises `ImportError` where the solver is not installed.
    """
    nodes = effort // max(1, len(programme.upper))
    if nodes < FEWEST_NODES:
        return None
    import highspy  # only needed where a backlog is placed together

    solver = _load(highspy, programme, nodes)
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
        solver.run()
        info = solver.getInfo()
        if abs(_sum(terms, _columns(solver)) + info.objective_function_value) > SLACK * max(1, abs(info.objective_function_value)):
            # HiGHS 1.16 gives the start back instead of what it found, where presolve alone improves it: again, without a start.
            solver.clearSolver()
            solver.run()
            info = solver.getInfo()
        columns = _columns(solver)
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible or not programme.holds(columns):
            return None
        reached = _sum(terms, columns)
        proven = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal and abs(reached + info.objective_function_value) <= SLACK * max(1, abs(reached))
        limit = reached if proven else most if not math.isfinite(info.mip_dual_bound) else min(most, math.floor(-info.mip_dual_bound + SLACK))
        value.append(reached)
        # Below a level that is not proven a better placement may be worth anything: it counts less there.
        bound.append(most if gap else limit)
        gap |= limit > reached
        explored += max(0, int(info.mip_node_count))
        used = np.flatnonzero(worth).astype(np.int32)
        solver.addRow(float(reached), math.inf, len(used), used, worth[used])
    return Optimum(columns, tuple(value), tuple(bound), explored)


def _columns(solver: Any) -> list[int]:
    return [round(found) for found in solver.getSolution().col_value]


def _sum(terms: Terms, columns: list[int]) -> int:
    return sum(factor * columns[column] for column, factor in terms)


def _load(highspy: Any, programme: Programme, nodes: int) -> Any:
    solver = highspy.Highs()
    for name, setting in (("output_flag", False), ("threads", 1), ("mip_rel_gap", 0.0), ("mip_max_nodes", nodes), ("mip_detect_symmetry", False)):
        # Groups leave few symmetries, and the search for them runs beside the solver: what it finds would depend on when.
        solver.setOptionValue(name, setting)
    columns, rows = len(programme.upper), programme.rows
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = columns, len(rows)
    model.col_cost_, model.col_lower_, model.col_upper_ = np.zeros(columns), np.zeros(columns), np.array(programme.upper, np.float64)
    model.integrality_ = [highspy.HighsVarType.kInteger] * columns
    model.row_lower_, model.row_upper_ = np.array([low for low, _, _ in rows], np.float64), np.array([high for _, _, high in rows], np.float64)
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.cumsum([0, *(len(terms) for _, terms, _ in rows)])
    model.a_matrix_.index_ = np.array([column for _, terms, _ in rows for column, _ in terms], np.int32)
    model.a_matrix_.value_ = np.array([factor for _, terms, _ in rows for _, factor in terms], np.float64)
    solver.passModel(model)
    return solver
