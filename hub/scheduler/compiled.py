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
_SPREAD, _GPU = np.uint32(Fail.SPREAD), np.uint32(Fail.GPU)
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


@njit(cache=True)  # type: ignore[untyped-decorator]
def evenness(eligible: Any, domain: Any, size: Any, counts: Any, may_lead: Any, min_domains: Any, unbounded: Any) -> Any:
    """[node] how many more its domain may hold: as many as the least of the other domains and `may_lead`; `unbounded` where nothing is compared."""
    sums, there = np.zeros(size, np.int64), np.zeros(size, np.bool_)
    free = np.full(len(domain), unbounded, np.int64)
    for node in range(len(domain)):
        if eligible[node]:
            sums[domain[node]] += counts[node]
            there[domain[node]] = True
    known, first, second = 0, np.int64(0), np.int64(0)
    for at in range(size):
        if there[at]:
            if known == 0 or sums[at] < first:
                first, second = sums[at], first
            elif known == 1 or sums[at] < second:
                second = sums[at]
            known += 1
    few = known < min_domains
    if known == 0 or (known == 1 and not few):
        return free
    for node in range(len(domain)):
        if eligible[node]:
            mine = sums[domain[node]]
            free[node] = may_lead - mine + (0 if few else second if mine == first else first)
    return free


@njit(cache=True)  # type: ignore[untyped-decorator]
def add_victims(w_class: Any, w_node: Any, w_priority: Any, w_fixed: Any, w_ending: Any, slots: Any, table: Any, ends: Any, levels: Any, sums: Any) -> Any:
    """Adds to [level, row, node] `sums` what workloads that may have to go give back of rows by [row, class] `table`: those of one of the priorities `levels`. Gives whether one of them is on its way
    out; of these nothing is added where `ends` [row]."""
    leaving = False
    counts = np.zeros(table.shape[1], np.bool_)
    for kind in range(len(counts)):
        for row in range(len(table)):
            counts[kind] |= table[row, kind] != 0
    for slot in range(slots):
        kind = w_class[slot]
        if not counts[kind] or w_node[slot] < 0 or w_fixed[slot]:
            continue
        for level in range(len(levels)):
            if levels[level] == w_priority[slot]:
                leaving |= w_ending[slot]
                for row in range(len(table)):
                    if not (ends[row] and w_ending[slot]):
                        sums[level, row, w_node[slot]] += table[row, kind]
                break
    return leaving


@njit(cache=True)  # type: ignore[untyped-decorator]
def _shift(milli: Any, memory: Any, bits: Any, class_gpus: Any, kind: Any, sign: Any) -> None:
    """What a workload holds of the devices of its node is given back (1) or taken again (-1)."""
    for device in range(len(milli)):
        if (bits >> device) & 1:
            milli[device] += sign * class_gpus[0, kind]
            memory[device] += sign * class_gpus[1, kind]


@njit(cache=True)  # type: ignore[untyped-decorator]
def _room(have_milli: Any, have_memory: Any, serves: Any, node: Any, milli: Any, memory: Any) -> Any:
    """How many devices of a node can take their part."""
    found = 0
    for device in range(len(have_milli)):
        if serves[node, device] and have_milli[device] >= milli and (memory == 0 or have_memory[device] >= memory):
            found += 1
    return found


@njit(cache=True)  # type: ignore[untyped-decorator]
def _scarce(free: Any, rows: Any, amounts: Any) -> Any:
    """Those rows and amounts that are not free on every node: the others decide nothing, whoever goes."""
    count = 0
    few, least = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    for at in range(len(rows)):
        have = free[rows[at]]
        for node in range(len(have)):
            if have[node] < amounts[at, 0]:
                few[count], least[count] = rows[at], amounts[at, 0]
                count += 1
                break
    return few[:count], least[:count]


@njit(cache=True)  # type: ignore[untyped-decorator]
def least_harm(
    fresh: Any, left: Any, spare: Any, largest: Any, free: Any, held: Any, most: Any, first: Any, last: Any, rows: Any, amounts: Any, class_request: Any, w_next: Any, w_class: Any,
    w_priority: Any, w_start: Any, tie: Any, priority: Any, lowest: Any, limit: Any, devices: Any, milli: Any, memory: Any, gpu_free: Any, gpu_mem: Any, serves: Any, w_gpus: Any,
    class_gpus: Any,
) -> Any:
    """The node of the least harm (-1: none), its victims' slots, the sum of their weights, and the nodes that hold more than `limit`: one level of priority of `leastharm.search`.

    `left` [node], `spare` and `largest` [resource, node] are brought on to this level (`fresh`: the first one, which sets them), `most` of it is tightened where a chain was looked at.
    Nodes are walked in order of how few victims could do, and only while they could be better than what was found.
    `held` has the milli-GPU first. `devices` (0: none), each of `milli` and `memory`: those of a node that `serves` [node, device]; `w_gpus` are bits, `class_gpus` [milli, memory; class].
    """
    size, width = len(left), gpu_free.shape[1]
    rows, amounts = _scarce(free, rows, amounts)
    count = len(rows)
    have_milli, have_memory = np.empty(width, np.int64), np.empty(width, np.int64)
    overfull = np.empty(0, np.int64)
    opened, fewest, members = np.empty(size, np.int64), np.empty(size, np.int64), 0
    chosen, alone, least = -1, -1, limit
    opens, atleast = left.copy(), np.zeros(size, np.int64)
    for at in range(count):
        need, have, gives, most_now, sums, most_so_far = amounts[at], free[rows[at]], held[rows[at] + 1], most[rows[at]], spare[at], largest[at]
        before, most_before = (have, most_now) if fresh else (sums, most_so_far)
        for node in range(size):
            room, most_of = before[node] + gives[node], max(most_before[node], most_now[node])
            sums[node], most_so_far[node] = room, most_of
            short = need - have[node]
            opens[node] &= room >= need
            atleast[node] = max(atleast[node], int(short > 0) + int(short > most_of) + int(short > 2 * most_of))
    for node in range(size):
        if not opens[node] or (devices > 0 and last[node] < 0):
            continue
        left[node] = False
        few = atleast[node]
        if few > 2:
            for at in range(count):
                few = max(few, -((free[rows[at], node] - amounts[at]) // largest[at, node]))
        if devices > 0:
            few = max(few, 1)
        if few > 0:
            opened[members], fewest[members] = node, min(few, limit)
            least = min(least, fewest[members])
            members += 1
    for member in range(members if least == 1 else 0):
        node = opened[member]
        latest = w_start[last[node]]
        if fewest[member] != 1 or (chosen >= 0 and (latest < w_start[alone] or (latest == w_start[alone] and tie[node] > tie[chosen]))):
            continue
        slot, steps, mine = first[node], 0, -1
        while slot >= 0 and w_priority[slot] > priority:
            slot = w_next[slot]
        for at in range(count):
            most[rows[at], node] = 1
        while slot >= 0 and steps < limit:
            if w_priority[slot] == priority:
                enough = True
                for at in range(count):
                    amount = class_request[rows[at], w_class[slot]]
                    most[rows[at], node] = max(most[rows[at], node], amount)
                    if free[rows[at], node] + amount < amounts[at]:
                        enough = False
                if enough and devices > 0 and (mine < 0 or w_start[slot] > w_start[mine]):
                    for device in range(width):
                        have_milli[device], have_memory[device] = gpu_free[node, device], gpu_mem[node, device]
                    _shift(have_milli, have_memory, w_gpus[slot], class_gpus, w_class[slot], 1)
                    enough = _room(have_milli, have_memory, serves, node, milli, memory) >= devices
                if enough and (mine < 0 or w_start[slot] > w_start[mine]):
                    mine = slot
            slot = w_next[slot]
            steps += 1
        if slot >= 0:
            overfull = np.append(overfull, node)
            fewest[member] = 0
            for at in range(count):
                most[rows[at], node] = held[rows[at] + 1, node]
        elif mine >= 0 and (chosen < 0 or w_start[mine] > w_start[alone] or (w_start[mine] == w_start[alone] and tie[node] < tie[chosen])):
            chosen, alone = node, mine
    if chosen >= 0:
        return chosen, np.array([alone], np.int64), np.int64(priority + _OFFSET), overfull
    best_weight, best_count, best_start = np.int64(0), 0, np.int64(0)
    victims, mine_gone, room = np.empty(limit, np.int64), np.empty(limit, np.int64), np.empty(count, np.int64)
    turn = least
    while members > 0 and turn <= limit:
        following = limit + 1
        for member in range(members):
            if fewest[member] != turn:
                if fewest[member] > turn:
                    following = min(following, fewest[member])
                continue
            node = opened[member]
            if chosen >= 0:
                few = max(turn, 2)
                bound = priority + _OFFSET + (few - 1) * (lowest + _OFFSET)
                if bound > best_weight or (bound == best_weight and few > best_count):
                    following = limit + 1  # nor does a node that needs more do better
                    break
                latest = w_start[last[node]]
                if bound == best_weight and few == best_count and (latest < best_start or (latest == best_start and tie[node] > tie[chosen])):
                    continue
            for at in range(count):
                room[at] = spare[at, node] - amounts[at]
            slot, steps, gone, weight, start = first[node], 0, 0, np.int64(0), np.int64(0)
            while slot >= 0 and w_priority[slot] > priority:
                slot = w_next[slot]
            if devices > 0:
                for device in range(width):
                    have_milli[device], have_memory[device] = gpu_free[node, device], gpu_mem[node, device]
                other = slot
                while other >= 0 and steps < limit:
                    _shift(have_milli, have_memory, w_gpus[other], class_gpus, w_class[other], 1)
                    other = w_next[other]
                    steps += 1
                if other < 0 and _room(have_milli, have_memory, serves, node, milli, memory) < devices:
                    left[node] = True
                    continue
                steps = 0
            for at in range(count):
                most[rows[at], node] = 1
            while slot >= 0 and steps < limit:
                stays = True
                for at in range(count):
                    amount = class_request[rows[at], w_class[slot]]
                    if w_priority[slot] == priority:
                        most[rows[at], node] = max(most[rows[at], node], amount)
                    if room[at] < amount:
                        stays = False
                if stays and devices > 0 and w_gpus[slot] != 0:
                    _shift(have_milli, have_memory, w_gpus[slot], class_gpus, w_class[slot], -1)
                    stays = _room(have_milli, have_memory, serves, node, milli, memory) >= devices
                    if not stays:
                        _shift(have_milli, have_memory, w_gpus[slot], class_gpus, w_class[slot], 1)
                if stays:
                    for at in range(count):
                        room[at] -= class_request[rows[at], w_class[slot]]
                else:
                    if gone == 0:
                        start = w_start[slot]
                    mine_gone[gone] = slot
                    gone += 1
                    weight += w_priority[slot] + _OFFSET
                slot = w_next[slot]
                steps += 1
            if slot >= 0:
                overfull = np.append(overfull, node)
                for at in range(count):
                    most[rows[at], node] = held[rows[at] + 1, node]
                continue
            less = chosen < 0 or weight < best_weight or (
                weight == best_weight and (gone < best_count or (gone == best_count and (start > best_start or (start == best_start and tie[node] < tie[chosen]))))
            )
            if gone > 0 and less:
                chosen, best_weight, best_count, best_start = node, weight, gone, start
                victims[:gone] = mine_gone[:gone]
        turn = following
    return chosen, victims[:best_count].copy(), best_weight, overfull
