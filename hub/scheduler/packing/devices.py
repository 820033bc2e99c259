"""What any scheduler can allocate: an upper bound on the GPU that a set of pods can be given, by a linear programme over device patterns.

Per group of alike nodes CPU, memory and devices are pooled; a device holds a pattern of shared pods (sizes in units of `UNIT`, rounded down, so the bound
stays one) or is taken whole. Patterns are generated as they pay (knapsack over the duals). The programme also says how much of each model the
pods that accept few models need: `reserve`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .gpus import WHOLE, Ints, Kinds, Nodes

UNIT = 10
"""Milli-GPU per unit of a device in the patterns; 1 where a pod asks for less than 10."""

GAP_REL = 1e-4
"""Columns are generated until the bound is this close, relative to the value; what is left is added to the bound."""

ROUNDS_MAX = 400
"""Bound of the rounds of column generation: more than five times what the largest lists needed (77)."""

KILO = 1000.0
"""CPU and memory rows are in thousands, so that coefficients are near one."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DevicePlan:
    """`bound`: value no placement exceeds; `share [C, G]`: pods of each kind per group; `price [C]`: worth of one more pod; `device, cpu, memory [G]`: worth of one more device, core, 1000 MiB."""

    bound: float
    share: Floats
    price: Floats
    device: Floats
    cpu: Floats
    memory: Floats
    rounds: int


def knapsack(sizes: Ints, worth: Floats, units: int) -> tuple[float, dict[int, int]]:
    """Best worth of items, any number of each, in `units`; the items by index. Sizes are at least 1."""
    best: dict[int, int] = {}
    for at in np.flatnonzero(worth > 1e-9).tolist():
        size = int(sizes[at])
        if size not in best or worth[at] > worth[best[size]]:
            best[size] = at
    table = np.zeros(units + 1)
    choice = np.full(units + 1, -1)
    for fill in range(1, units + 1):
        table[fill] = table[fill - 1]
        for size, item in best.items():
            if size <= fill and table[fill - size] + worth[item] > table[fill] + 1e-12:
                table[fill], choice[fill] = table[fill - size] + worth[item], item
    pattern: dict[int, int] = {}
    fill = units
    while fill > 0:
        item = int(choice[fill])
        if item < 0:
            fill -= 1
        else:
            pattern[item] = pattern.get(item, 0) + 1
            fill -= int(sizes[item])
    return float(table[units]), pattern


def plan(nodes: Nodes, of: Kinds, demand: Floats, value: Floats) -> DevicePlan:
    """Solve for `demand [C]` pods of each kind at `value [C]` each (milli-GPU, or what else counts)."""
    import highspy  # the solver is only needed where a plan is made

    first = np.unique(nodes.group, return_index=True)[1]
    many = np.bincount(nodes.group)
    kinds_, groups = len(of.cpu), len(first)
    cpu, memory, gpus, model = (part[first] for part in nodes[:4])
    allowed = of.access[:, model] & (of.cpu[:, None] <= cpu) & (of.memory[:, None] <= memory) & (of.num[:, None] <= gpus)
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    endless = highspy.kHighsInf
    upper = np.concatenate([demand, gpus * many, cpu * many / KILO, memory * many / KILO]).astype(np.float64)
    none = np.zeros(0, dtype=np.int32)
    for bound in upper:
        solver.addRow(-endless, float(bound), 0, none, np.zeros(0))
    columns: list[tuple[dict[int, int], int]] = []

    def add(pattern: dict[int, int], group: int, devices: float) -> None:
        index = [*pattern, kinds_ + group, kinds_ + groups + group, kinds_ + 2 * groups + group]
        used = [sum(part[kind] * times for kind, times in pattern.items()) / KILO for part in (of.cpu, of.memory)]
        solver.addCol(-float(sum(value[kind] * times for kind, times in pattern.items())), 0.0, endless, len(index), np.array(index, dtype=np.int32), np.array([*pattern.values(), devices, *used], dtype=np.float64))
        columns.append((pattern, group))

    for kind in np.flatnonzero((of.num == 0) | (of.milli == WHOLE)).tolist():
        for group in np.flatnonzero(allowed[kind]).tolist():
            add({kind: 1}, group, float(of.num[kind]))
    shared = np.flatnonzero((of.milli > 0) & (of.milli < WHOLE))
    unit = UNIT if not len(shared) or of.milli[shared].min() >= UNIT else 1
    rounds, gap = 0, 0.0
    while True:
        solver.run()
        duals: Any = -np.array(solver.getSolution().row_dual)
        reached = -float(solver.getInfo().objective_function_value)
        price, device, core, mem = duals[:kinds_], duals[kinds_:kinds_ + groups], duals[kinds_ + groups:kinds_ + 2 * groups], duals[kinds_ + 2 * groups:]
        rounds, gap, added = rounds + 1, 0.0, 0
        for group in range(groups):
            worth = np.where(allowed[shared, group], value[shared] - price[shared] - core[group] * of.cpu[shared] / KILO - mem[group] * of.memory[shared] / KILO, -1.0)
            best, pattern = knapsack(of.milli[shared] // unit, worth, WHOLE // unit)
            if best > device[group] + 1e-6:
                gap += (best - device[group]) * float(gpus[group] * many[group])
                add({int(shared[at]): times for at, times in pattern.items()}, group, 1.0)
                added += 1
        if not added or gap <= GAP_REL * max(reached, 1.0) or rounds >= ROUNDS_MAX:
            break
    share = np.zeros((kinds_, groups))
    for amount, (pattern, group) in zip(solver.getSolution().col_value, columns, strict=False):
        for item, times in pattern.items():
            share[item, group] += times * amount
    return DevicePlan(reached + gap, share, price, device, core, mem, rounds)


RESERVE_SHARE = 0.97
"""Share of a model's GPUs that counts as usable where places are reserved; the rest is what fragments in any case."""

CORE_VALUE = 1.0
"""Milli-GPU that a pod without GPU is worth per milli-CPU, where the plan is for reserving: enough to have it placed, since it will be placed anyhow."""


def limits(nodes: Nodes, of: Kinds, counts: Ints) -> Ints:
    """For each distinct set of accepted models `[A, M]`: the milli-GPU of model m that pods as free as these, or freer, may take while others are to be expected.

    The plan fills the whole cluster with the mix `counts [C]`; what it gives to pods that accept fewer models is kept for them.
    """
    capacity = np.bincount(nodes.model, weights=nodes.gpus * float(WHOLE), minlength=of.access.shape[1])
    first = np.unique(of.accepts, return_index=True)[1]
    freedom = of.access[first].sum(axis=1)
    asks = of.num * of.milli
    total = float((counts * asks).sum())
    result = np.tile(capacity, (len(first), 1))
    if total > 0 and len(np.unique(freedom)) > 1:
        value = asks + (of.num == 0) * of.cpu * CORE_VALUE
        found = plan(nodes, of, counts * (capacity.sum() / total), value.astype(np.float64))
        model = nodes.model[np.unique(nodes.group, return_index=True)[1]]
        given = np.zeros(result.shape)
        for group in range(found.share.shape[1]):
            np.add.at(given[:, model[group]], of.accepts, found.share[:, group] * asks)
        for at in range(len(first)):
            stricter = freedom < freedom[at]
            if given[stricter].any():
                result[at] = np.where(given[stricter].sum(axis=0) > 0, RESERVE_SHARE * capacity - given[stricter].sum(axis=0), capacity)
    return result.astype(np.int64)
