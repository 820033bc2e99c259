"""The kernels of preemption, compiled by numba: what may have to go, added up, and where that does the least harm. `compiled` holds the others, and gives these on."""

from typing import Any

import numpy as np
from numba import njit

from .leastharm import PRIORITY_OFFSET

_OFFSET = int(PRIORITY_OFFSET)


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
