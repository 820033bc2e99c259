"""The kernels compiled by numba; imported only through `kernels.use`. Each gives bit for bit what the numpy form beside its call gives (no fast-math)."""

from typing import Any

import numpy as np
from numba import njit

from .fragmentation import LEAST
from .leastharm import PRIORITY_OFFSET
from .rank import BEST
from .reasons import Fail
from .units import GPU_WHOLE

_DOWN, _CORDONED, _RESOURCES = np.uint32(Fail.DOWN), np.uint32(Fail.CORDONED), np.uint32(Fail.RESOURCES)
_BEST, _WHOLE, _LEAST, _OFFSET = int(BEST), int(GPU_WHOLE), int(LEAST), int(PRIORITY_OFFSET)


@njit(cache=True)  # type: ignore[untyped-decorator]
def base_bits(fails: Any, status: Any, cordon: Any, ignores_cordon: Any, free: Any, rows: Any, amounts: Any) -> Any:
    """[node] uint32 of the description's filters, status, cordon and room."""
    bits = fails.copy()
    for node in range(len(bits)):
        if status[node] != 0:
            bits[node] |= _DOWN
        if cordon[node] and not ignores_cordon:
            bits[node] |= _CORDONED
    for at in range(len(rows)):
        row, amount = rows[at], amounts[at, 0]
        for node in range(len(bits)):
            if free[row, node] < amount:
                bits[node] |= _RESOURCES
    return bits


@njit(cache=True)  # type: ignore[untyped-decorator]
def balance(cap: Any, used: Any) -> Any:
    """[node] 100 less the deviation of the used shares."""
    count, size = cap.shape
    result = np.empty(size, np.int64)
    for node in range(size):
        there, total = 0, 0.0
        for row in range(count):
            if cap[row, node] > 0:
                there += 1
                total += min(used[row, node] / cap[row, node], 1.0)
        if count == 2:
            spread = abs(min(used[0, node] / cap[0, node], 1.0) - min(used[1, node] / cap[1, node], 1.0)) / 2 if there == 2 else 0.0
        else:
            there = max(there, 1)
            mean, squares = total / there, 0.0
            for row in range(count):
                if cap[row, node] > 0:
                    off = min(used[row, node] / cap[row, node], 1.0) - mean
                    squares += off * off
            spread = np.sqrt(squares / there)
        result[node] = int((1.0 - spread) * _BEST)
    return result


@njit(cache=True)  # type: ignore[untyped-decorator]
def fullness(cap: Any, used: Any, weights: Any, packing: Any) -> Any:
    """[node] the used (packing) or free share of the resources by weight."""
    count, size = cap.shape
    result = np.empty(size, np.int64)
    for node in range(size):
        score, total = 0, 0
        for row in range(count):
            have = cap[row, node]
            if have > 0:
                part = min(used[row, node], have) if packing else max(have - used[row, node], 0)
                score += part * _BEST // have * weights[row]
                total += weights[row]
        result[node] = score // max(total, 1)
    return result


@njit(cache=True)  # type: ignore[untyped-decorator]
def stretched(raw: Any, feasible: Any, reverse: Any) -> Any:
    """Whether the feasible values differ, and [node] them from 0 to 100."""
    size = len(raw)
    result = np.zeros(size, np.int64)
    least, most = np.inf, -np.inf
    for node in range(size):
        if feasible[node]:
            least, most = min(least, raw[node]), max(most, raw[node])
    if not most > least:
        return False, result
    span = most - least
    for node in range(size):
        off = most - raw[node] if reverse else raw[node] - least
        result[node] = int(min(max(_BEST * off / span, 0.0), 100.0))
    return True, result


@njit(cache=True)  # type: ignore[untyped-decorator]
def _fragmentation(cpu: Any, free: Any, allowed: Any, levels: Any, level: Any, type_cpu: Any, type_count: Any, ppm: Any, cpu_only: Any, room: Any, lost: Any) -> Any:
    """Of one node, were its free CPU and devices these; `room` and `lost` are scratch, one entry per level."""
    total = 0
    room[:] = 0
    lost[:] = 0
    for device in range(len(free)):
        have = max(free[device], 0)
        total += have
        for at in range(len(levels)):
            if free[device] >= levels[at]:
                room[at] += 1
            else:
                lost[at] += have
    waste = total * cpu_only
    for kind in range(len(ppm)):
        capable = allowed[kind] and cpu >= type_cpu[kind] and room[level[kind]] >= type_count[kind]
        waste += (lost[level[kind]] if capable else total) * ppm[kind]
    return waste


@njit(cache=True)  # type: ignore[untyped-decorator]
def gradients(
    cpu: Any, gpu_free: Any, fits: Any, nodes: Any, milli: Any, count: Any, need_cpu: Any, allowed: Any, levels: Any, level: Any, type_cpu: Any, type_count: Any, ppm: Any, cpu_only: Any,
) -> Any:
    """[of nodes] how much the fragmentation falls at best, and the device of a part."""
    gain, chosen = np.empty(len(nodes), np.int64), np.zeros(len(nodes), np.int64)
    room, lost = np.zeros(len(levels), np.int64), np.zeros(len(levels), np.int64)
    width = gpu_free.shape[1]
    free = np.empty(width, np.int64)
    for at in range(len(nodes)):
        node = nodes[at]
        for device in range(width):
            free[device] = gpu_free[node, device]
        before = _fragmentation(cpu[node], free, allowed[node], levels, level, type_cpu, type_count, ppm, cpu_only, room, lost)
        if milli == _WHOLE:
            taken = 0
            for device in range(width):
                if fits[at, device] and taken < count:
                    free[device] -= _WHOLE
                    taken += 1
            gain[at] = before - _fragmentation(cpu[node] - need_cpu, free, allowed[node], levels, level, type_cpu, type_count, ppm, cpu_only, room, lost)
        else:
            best = _LEAST
            for device in range(width):
                if fits[at, device]:
                    free[device] -= milli
                    found = before - _fragmentation(cpu[node] - need_cpu, free, allowed[node], levels, level, type_cpu, type_count, ppm, cpu_only, room, lost)
                    free[device] += milli
                    if found > best:
                        best = found
                        chosen[at] = device
            gain[at] = best
    return gain, chosen


@njit(cache=True)  # type: ignore[untyped-decorator]
def least_harm(
    nodes: Any, starts: Any, last: Any, fewest: Any, spare: Any, free: Any, rows: Any, amounts: Any, class_request: Any, w_next: Any, w_class: Any, w_priority: Any, w_start: Any, tie: Any,
    priority: Any, lowest: Any, limit: Any,
) -> Any:
    """The position in `nodes` of the least harm (-1: none), its victims' slots, and which nodes hold more than `limit`.

    `starts` is where the chain of each node begins, `last` [node of all] where its part of the level ends, `fewest` how few victims could be enough, `spare` [resource, node of all] the room were all of the chain gone.
    """
    size, count = len(nodes), len(rows)
    overfull = np.zeros(size, np.bool_)
    chosen, alone = -1, -1
    for at in range(size):
        node, slot, steps, mine_alone = nodes[at], starts[at], 0, -1
        while slot >= 0 and steps < limit:
            if fewest[at] == 1 and w_priority[slot] == priority and (mine_alone < 0 or w_start[slot] > w_start[mine_alone]):
                enough = True
                for row in range(count):
                    if free[rows[row], node] + class_request[rows[row], w_class[slot]] < amounts[row, 0]:
                        enough = False
                        break
                if enough:
                    mine_alone = slot
            slot = w_next[slot]
            steps += 1
        overfull[at] = slot >= 0
        if mine_alone >= 0 and not overfull[at] and (
            chosen < 0 or w_start[mine_alone] > w_start[alone] or (w_start[mine_alone] == w_start[alone] and tie[node] < tie[nodes[chosen]])
        ):
            chosen, alone = at, mine_alone
    if chosen >= 0:
        return chosen, np.array([alone], np.int64), overfull
    chosen = -1
    best_weight, best_count, best_start = np.int64(0), 0, np.int64(0)
    victims, mine, room = np.empty(limit, np.int64), np.empty(limit, np.int64), np.empty(count, np.int64)
    for at in range(size):
        if overfull[at] or fewest[at] < 1:
            continue
        if chosen >= 0:
            few = max(fewest[at], 2)
            least = priority + _OFFSET + (few - 1) * (lowest + _OFFSET)
            if least > best_weight or (least == best_weight and few >= best_count and w_start[last[nodes[at]]] < best_start):
                continue
        node, slot = nodes[at], starts[at]
        for row in range(count):
            room[row] = spare[row, node]
        gone, weight, start = 0, np.int64(0), np.int64(0)
        while slot >= 0:
            stays = True
            for row in range(count):
                if room[row] < class_request[rows[row], w_class[slot]]:
                    stays = False
                    break
            if stays:
                for row in range(count):
                    room[row] -= class_request[rows[row], w_class[slot]]
            else:
                if gone == 0:
                    start = w_start[slot]
                mine[gone] = slot
                gone += 1
                weight += w_priority[slot] + _OFFSET
                if chosen >= 0 and weight > best_weight:
                    break
            slot = w_next[slot]
        if gone == 0 or slot >= 0:
            continue
        less = weight < best_weight or (weight == best_weight and (gone < best_count or (gone == best_count and (start > best_start or (start == best_start and tie[node] < tie[nodes[chosen]])))))
        if chosen < 0 or less:
            chosen, best_weight, best_count, best_start = at, weight, gone, start
            victims[:gone] = mine[:gone]
    return chosen, victims[:best_count].copy(), overfull
