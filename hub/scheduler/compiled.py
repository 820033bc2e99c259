"""The kernels compiled by numba; imported only through `kernels.use`. Each gives bit for bit what the numpy form beside its call gives (no fast-math)."""

from typing import Any

import numpy as np
from numba import njit

from .compiled_harm import add_victims as add_victims
from .compiled_harm import evenness as evenness
from .compiled_harm import least_harm as least_harm
from .fragmentation import LEAST
from .rank import BEST
from .reasons import Fail
from .units import GPU_WHOLE

_DOWN, _CORDONED, _RESOURCES = np.uint32(Fail.DOWN), np.uint32(Fail.CORDONED), np.uint32(Fail.RESOURCES)
_SPREAD, _GPU = np.uint32(Fail.SPREAD), np.uint32(Fail.GPU)
_BEST, _WHOLE, _LEAST = int(BEST), int(GPU_WHOLE), int(LEAST)


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
def mark_gpu(bits: Any, nodes: Any, devices: Any, gpu_free: Any, gpu_mem: Any, milli: Any, memory: Any, count: Any) -> None:
    """Marks those of `nodes` on which too few of the wanted devices can take their part."""
    for at in range(len(nodes)):
        node, room = nodes[at], 0
        for device in range(devices.shape[1]):
            room += devices[at, device] and gpu_free[node, device] >= milli and (memory == 0 or gpu_mem[node, device] >= memory)
        if room < count:
            bits[node] |= _GPU


@njit(cache=True)  # type: ignore[untyped-decorator]
def in_domain(domain: Any, size: Any, counts: Any) -> Any:
    """[node] the sum of `counts` over the node's domain, 0 where it has none."""
    sums, result = np.zeros(size, np.int64), np.zeros(len(domain), np.int64)
    for node in range(len(domain)):
        if domain[node] >= 0:
            sums[domain[node]] += counts[node]
    for node in range(len(domain)):
        if domain[node] >= 0:
            result[node] = sums[domain[node]]
    return result


@njit(cache=True)  # type: ignore[untyped-decorator]
def mark_spread(bits: Any, eligible: Any, domain: Any, size: Any, counts: Any, own: Any, max_skew: Any, min_domains: Any) -> None:
    """Marks the nodes on which one hard spread constraint would become too uneven."""
    sums, there = np.zeros(size, np.int64), np.zeros(size, np.bool_)
    for node in range(len(domain)):
        if eligible[node]:
            sums[domain[node]] += counts[node]
            there[domain[node]] = True
    known, least = 0, np.int64(0)
    for at in range(size):
        if there[at]:
            least = sums[at] if known == 0 else min(least, sums[at])
            known += 1
    if known == 0:
        return
    if known < min_domains:
        least = np.int64(0)
    for node in range(len(domain)):
        if domain[node] >= 0 and sums[domain[node]] + own - least > max_skew:
            bits[node] |= _SPREAD


@njit(cache=True)  # type: ignore[untyped-decorator]
def spread_sums(counted: Any, scored: Any, domain: Any, size: Any, counts: Any) -> Any:
    """[domain] the sum of `counts` over the nodes that are counted, and how many domains have a node that is scored."""
    sums, seen = np.zeros(size, np.float64), np.zeros(size, np.bool_)
    for node in range(len(domain)):
        if domain[node] >= 0:
            if counted[node]:
                sums[domain[node]] += counts[node]
            seen[domain[node]] |= scored[node]
    return sums, seen.sum()


@njit(cache=True)  # type: ignore[untyped-decorator]
def add_spread(total: Any, domain: Any, sums: Any, weight: Any, more: Any) -> None:
    """Adds to [node] `total` what one soft spread constraint costs."""
    for node in range(len(domain)):
        if domain[node] >= 0:
            total[node] += sums[domain[node]] * weight + more


@njit(cache=True)  # type: ignore[untyped-decorator]
def spread_scores(total: Any, scored: Any, keyed: Any) -> Any:
    """[node] what soft spread costs in `total` as 0 to 100, the cheapest the most; 0 where a node is not `keyed`, and everywhere where none is scored."""
    size = len(total)
    scores = np.zeros(size, np.int64)
    most, least, none = np.int64(0), np.int64(0), True
    for node in range(size):
        if scored[node]:
            cost = np.int64(total[node])
            most, least = cost if none else max(most, cost), cost if none else min(least, cost)
            none = False
    if not none:
        for node in range(size):
            if keyed[node]:
                scores[node] = _BEST if most == 0 else _BEST * (most + least - np.int64(total[node])) // most
    return scores


@njit(cache=True)  # type: ignore[untyped-decorator]
def _even(cap: Any, used: Any, count: Any) -> Any:
    """Of one node: 100 less the deviation of the used shares; `used` and `cap` are [resource] of `count`."""
    there, total = 0, 0.0
    for row in range(count):
        if cap[row] > 0:
            there += 1
            total += min(used[row] / cap[row], 1.0)
    if count == 2:
        spread = abs(min(used[0] / cap[0], 1.0) - min(used[1] / cap[1], 1.0)) / 2 if there == 2 else 0.0
    else:
        there = max(there, 1)
        mean, squares = total / there, 0.0
        for row in range(count):
            if cap[row] > 0:
                off = min(used[row] / cap[row], 1.0) - mean
                squares += off * off
        spread = np.sqrt(squares / there)
    return int((1.0 - spread) * _BEST)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _full(cap: Any, used: Any, weights: Any, count: Any, packing: Any) -> Any:
    """Of one node: the used (packing) or free share of the resources by weight."""
    score, total = 0, 0
    for row in range(count):
        have = cap[row]
        if have > 0:
            part = min(used[row], have) if packing else max(have - used[row], 0)
            score += part * _BEST // have * weights[row]
            total += weights[row]
    return score // max(total, 1)


@njit(cache=True)  # type: ignore[untyped-decorator]
def balance(cap: Any, used: Any) -> Any:
    """[node] 100 less the deviation of the used shares."""
    count, size = cap.shape
    result = np.empty(size, np.int64)
    for node in range(size):
        result[node] = _even(cap[:, node], used[:, node], count)
    return result


@njit(cache=True)  # type: ignore[untyped-decorator]
def fullness(cap: Any, used: Any, weights: Any, packing: Any) -> Any:
    """[node] the used (packing) or free share of the resources by weight."""
    count, size = cap.shape
    result = np.empty(size, np.int64)
    for node in range(size):
        result[node] = _full(cap[:, node], used[:, node], weights, count, packing)
    return result


@njit(cache=True)  # type: ignore[untyped-decorator]
def add_scores(
    total: Any, feasible: Any, cap: Any, free: Any, rows: Any, request: Any, cost: Any, any_price: Any, work: Any, power: Any, load: Any, any_power: Any,
    even_weight: Any, packing_weight: Any, headroom_weight: Any, cost_weight: Any, energy_weight: Any,
) -> None:
    """Adds the scores of `rank.FUSED` by their weights to [node] `total`, which becomes -1 where a node will not do."""
    size, count = len(total), len(rows)
    have, used, ones = np.empty(count, np.int64), np.empty(count, np.int64), np.ones(count, np.int64)
    cheap, dear, low, high = np.inf, -np.inf, np.inf, -np.inf
    for node in range(size):
        if not feasible[node]:
            total[node] = -1
            continue
        for at in range(count):
            have[at] = cap[rows[at], node]
            used[at] = have[at] + request[rows[at]] - free[rows[at], node]
        if even_weight:
            total[node] += even_weight * _even(have, used, count)
        if packing_weight:
            total[node] += packing_weight * _full(have, used, ones, count, True)
        if headroom_weight:
            total[node] += headroom_weight * _full(have, used, ones, count, False)
        cheap, dear = min(cheap, cost[node]), max(dear, cost[node])
        drawn = (power[0, node] if load[node] == 0 else 0) + work[node]
        low, high = min(low, drawn), max(high, drawn)
    by_cost, by_power = cost_weight != 0 and any_price and dear > cheap, energy_weight != 0 and any_power and high > low
    if not by_cost and not by_power:
        return
    for node in range(size):
        if feasible[node]:
            if by_cost:
                total[node] += cost_weight * int(min(max(_BEST * (dear - cost[node]) / (dear - cheap), 0.0), 100.0))
            if by_power:
                drawn = (power[0, node] if load[node] == 0 else 0) + work[node]
                total[node] += energy_weight * int(min(max(_BEST * (high - drawn) / (high - low), 0.0), 100.0))


@njit(cache=True)  # type: ignore[untyped-decorator]
def best(total: Any, tie: Any) -> Any:
    """The node with the highest total, the one with the least tie among equals; -1 where no total is 0 or more."""
    found = -1
    for node in range(len(total)):
        if total[node] >= 0 and (found < 0 or total[node] > total[found] or (total[node] == total[found] and tie[node] < tie[found])):
            found = node
    return found


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
def hold(free: Any, load: Any, live: Any, held: Any, counted: Any, rows: Any, amounts: Any, node: Any, kind: Any, sign: Any, milli: Any) -> None:
    """`State._hold` of resources: taken (1) or given back (-1); `held` is the level of what may be preempted, used where `counted`."""
    for at in range(len(rows)):
        free[rows[at], node] -= sign * amounts[at, 0]
        if counted:
            held[rows[at] + 1, node] += sign * amounts[at, 0]
    load[node] += sign
    live[kind] += sign
    if counted:
        held[0, node] += sign * milli


@njit(cache=True)  # type: ignore[untyped-decorator]
def enlist(first: Any, onward: Any, backward: Any, last: Any, most: Any, request: Any, w_priority: Any, w_start: Any, slot: Any, node: Any, priority: Any, start_ms: Any) -> None:
    """`Arrays._enlist`; `most` is [resource] of the node and priority."""
    for row in range(len(most)):
        most[row] = max(most[row], request[row])
    before, after = -1, first[node]
    while after >= 0 and w_priority[after] > priority:
        before, after = after, onward[after]
    if after >= 0 and w_priority[after] == priority:
        before = last[node]
        while before >= 0 and w_priority[before] == priority and (w_start[before] > start_ms or (w_start[before] == start_ms and before > slot)):
            before = backward[before]
        after = first[node] if before < 0 else onward[before]
    backward[slot], onward[slot] = before, after
    if before < 0:
        first[node] = slot
    else:
        onward[before] = slot
    if after >= 0:
        backward[after] = slot
    if after < 0 or w_priority[after] != priority:
        last[node] = slot


@njit(cache=True)  # type: ignore[untyped-decorator]
def delist(first: Any, onward: Any, backward: Any, last: Any, w_priority: Any, slot: Any, node: Any, priority: Any) -> None:
    """`Arrays._delist`."""
    before, after = backward[slot], onward[slot]
    if before < 0:
        first[node] = after
    else:
        onward[before] = after
    if after >= 0:
        backward[after] = before
    if last[node] == slot:
        last[node] = before if before >= 0 and w_priority[before] == priority else -1
