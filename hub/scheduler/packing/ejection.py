"""Fewer bins by ejection: put an item that has no place into a full bin, put out what is easiest to place elsewhere, and go on with that.

How hard an item is, is learned: every time an item finds no place its penalty grows, and the items put out are those of least penalty together.
Nagata and Bräysy (2009) remove routes from vehicle routes in this way; a bin is a route without an order. Between two ejections feasible moves and
swaps at random keep the bins from settling.
"""

from typing import Any

import numpy as np

from .compiled import kernel, lehmer

PERTURBATIONS = 24
"""Random moves and swaps tried after each ejection."""

TRIPLES_UP_TO = 7
"""Bins of up to so many items are also tried with three items put out: 35 subsets, as many as the pairs of a bin of nine."""

PENALTY_MAX = 1 << 40
"""Penalties stay below it, so that sums of three are exact."""


@kernel
def fits(load: Any, size: Any, capacity: Any) -> bool:
    """Whether `size` fits on top of `load`."""
    for k in range(len(capacity)):
        if load[k] + size[k] > capacity[k]:
            return False
    return True


@kernel
def put(item: int, b: int, sizes: Any, load: Any, members: Any, count: Any, where: Any) -> None:
    """Item into bin b."""
    members[b, count[b]] = item
    count[b] += 1
    where[item] = b
    for k in range(sizes.shape[1]):
        load[b, k] += sizes[item, k]


@kernel
def take(item: int, sizes: Any, load: Any, members: Any, count: Any, where: Any) -> None:
    """Item out of its bin."""
    b = where[item]
    for at in range(count[b]):
        if members[b, at] == item:
            members[b, at] = members[b, count[b] - 1]
            break
    count[b] -= 1
    where[item] = -1
    for k in range(sizes.shape[1]):
        load[b, k] -= sizes[item, k]


@kernel
def _perturb(times: int, bins: int, sizes: Any, capacity: Any, load: Any, members: Any, count: Any, where: Any, state: Any) -> None:
    """Feasible moves and swaps at random."""
    items, dims = sizes.shape
    for _ in range(times):
        i = lehmer(state) % items
        j = lehmer(state) % items
        a, b = where[i], where[j]
        if a < 0 or b < 0 or a == b:
            continue
        move = swap_a = swap_b = True
        for k in range(dims):
            if load[b, k] + sizes[i, k] > capacity[k]:
                move = False
            if load[b, k] - sizes[j, k] + sizes[i, k] > capacity[k]:
                swap_b = False
            if load[a, k] - sizes[i, k] + sizes[j, k] > capacity[k]:
                swap_a = False
        if move:
            take(i, sizes, load, members, count, where)
            put(i, b, sizes, load, members, count, where)
        elif swap_a and swap_b:
            take(i, sizes, load, members, count, where)
            take(j, sizes, load, members, count, where)
            put(i, b, sizes, load, members, count, where)
            put(j, a, sizes, load, members, count, where)


@kernel
def eject(budget: int, bins: int, sizes: Any, capacity: Any, load: Any, members: Any, count: Any, where: Any, pool: Any, waiting: int, penalty: Any, state: Any) -> int:
    """Up to `budget` insertions into bins 0 .. bins-1; how many items still wait in `pool` (0: every item has a bin). All arrays are changed in place."""
    items, dims = sizes.shape
    over = np.empty(dims, dtype=np.int64)
    for _ in range(budget):
        if waiting == 0:
            return 0
        waiting -= 1
        item = pool[waiting]
        start = lehmer(state) % bins
        placed = False
        for step in range(bins):
            b = start + step
            if b >= bins:
                b -= bins
            if fits(load[b], sizes[item], capacity):
                put(item, b, sizes, load, members, count, where)
                placed = True
                break
        if placed:
            continue
        if penalty[item] < PENALTY_MAX:
            penalty[item] += 1
        best, ties, best_b, out1, out2, out3 = np.int64(1 << 62), 0, -1, -1, -1, -1
        for b in range(bins):
            for k in range(dims):
                over[k] = load[b, k] + sizes[item, k] - capacity[k]
            n = count[b]
            for p in range(n):
                i = members[b, p]
                sum1 = penalty[i]
                if sum1 > best:
                    continue
                good = True
                for k in range(dims):
                    if over[k] > sizes[i, k]:
                        good = False
                        break
                if good:
                    if sum1 < best:
                        best, ties, best_b, out1, out2, out3 = sum1, 1, b, i, -1, -1
                    else:
                        ties += 1
                        if lehmer(state) % ties == 0:
                            best_b, out1, out2, out3 = b, i, -1, -1
                    continue
                for q in range(p + 1, n):
                    j = members[b, q]
                    sum2 = sum1 + penalty[j]
                    if sum2 > best:
                        continue
                    good = True
                    for k in range(dims):
                        if over[k] > sizes[i, k] + sizes[j, k]:
                            good = False
                            break
                    if good:
                        if sum2 < best:
                            best, ties, best_b, out1, out2, out3 = sum2, 1, b, i, j, -1
                        else:
                            ties += 1
                            if lehmer(state) % ties == 0:
                                best_b, out1, out2, out3 = b, i, j, -1
                        continue
                    if n > TRIPLES_UP_TO:
                        continue
                    for r in range(q + 1, n):
                        h = members[b, r]
                        sum3 = sum2 + penalty[h]
                        if sum3 > best:
                            continue
                        good = True
                        for k in range(dims):
                            if over[k] > sizes[i, k] + sizes[j, k] + sizes[h, k]:
                                good = False
                                break
                        if good:
                            if sum3 < best:
                                best, ties, best_b, out1, out2, out3 = sum3, 1, b, i, j, h
                            else:
                                ties += 1
                                if lehmer(state) % ties == 0:
                                    best_b, out1, out2, out3 = b, i, j, h
        if best_b < 0:
            pool[waiting] = pool[0]
            pool[0] = item
            waiting += 1
        else:
            take(out1, sizes, load, members, count, where)
            if out3 >= 0:
                take(out3, sizes, load, members, count, where)
            if out2 >= 0:
                take(out2, sizes, load, members, count, where)
            put(item, best_b, sizes, load, members, count, where)
            pool[waiting] = out1
            waiting += 1
            if out2 >= 0:
                pool[waiting] = out2
                waiting += 1
            if out3 >= 0:
                pool[waiting] = out3
                waiting += 1
        _perturb(PERTURBATIONS, bins, sizes, capacity, load, members, count, where, state)
    return waiting
