"""Vector bin packing: items of d sizes into as few equal bins as can be found in the time given, with a lower bound beside it.

First some constructive orders (first fit by decreasing weighted size, bins filled one by one by dot product), then `ejection`: one bin is emptied and its
items are worked into the others, again and again, until the bound is reached or time is up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import COMPILED, MODULUS, kernel
from .ejection import eject, fits, put
from .gpus import Bad, Ints

ITEMS_MAX = 200_000
"""Beyond it the tables of items per bin would not fit in ordinary memory."""

SIZE_MAX = 1 << 40
"""Largest size or capacity: sums of `ITEMS_MAX` of them are exact in int64."""

CHUNK = 200 if COMPILED else 5
"""Insertions between two looks at the clock: about 2 ms for 500 items."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Packing:
    """`bins [n]`: the bin of each item, 0 .. count-1; no packing has fewer than `bound` bins; `steps` insertions were tried to improve on `constructed` bins."""

    bins: Ints
    count: int
    bound: int
    constructed: int
    steps: int


def checked(sizes: Any, capacity: Any) -> tuple[Ints, Ints]:
    """As int64 arrays `[n, d]`, `[d]`; raises `Bad` naming the item and the dimension."""
    room = np.asarray(capacity)
    items = np.asarray(sizes)
    if room.ndim != 1 or not len(room):
        raise Bad("capacity: give one number per dimension, at least one")
    if items.size == 0:
        return np.zeros((0, len(room)), dtype=np.int64), room.astype(np.int64)
    if items.ndim != 2 or items.shape[1] != len(room):
        raise Bad(f"sizes: give {len(room)} numbers per item, one per dimension of the capacity")
    if len(items) > ITEMS_MAX:
        raise Bad(f"sizes: {len(items)} items; give at most {ITEMS_MAX} at a time")
    for name, array in (("capacity", room), ("sizes", items)):
        if not np.issubdtype(array.dtype, np.integer):
            raise Bad(f"{name}: give whole numbers; scale fractions up")
        if (array < 0).any() or (array > SIZE_MAX).any():
            raise Bad(f"{name}: {int(array[(array < 0) | (array > SIZE_MAX)][0])} is out of range; give 0 .. {SIZE_MAX}")
    over = np.argwhere(items > room)
    if len(over):
        item, k = int(over[0][0]), int(over[0][1])
        raise Bad(f"sizes[{item}]: {int(items[item, k])} in dimension {k} is more than a bin's {int(room[k])}; take the item out or give larger bins")
    return np.ascontiguousarray(items, dtype=np.int64), np.ascontiguousarray(room, dtype=np.int64)


def bound(sizes: Ints, capacity: Ints) -> int:
    """Martello and Toth's L2 in each dimension: items above half a bin are alone, and those that still fit beside none of them fill bins of their own."""
    best = int(len(sizes) > 0)
    for k in range(len(capacity)):
        size, room = np.sort(sizes[:, k]), int(capacity[k])
        total = np.concatenate([[0], np.cumsum(size)])
        if room == 0:
            continue
        half = int(np.searchsorted(size, room // 2, side="right"))  # from here on: more than half a bin
        for cut in np.unique(np.concatenate([[0], size[:half]])):
            low = int(np.searchsorted(size, cut, side="left"))
            high = int(np.searchsorted(size, room - cut, side="right"))
            alone, large = len(size) - max(high, half), max(high - half, 0)
            small = int(total[half] - total[low])
            free = large * room - int(total[max(high, half)] - total[half])
            best = max(best, alone + large + max(0, -(-(small - free) // room)))
    return best


def most_per_bin(sizes: Ints, capacity: Ints) -> int:
    """No bin can hold more items than this."""
    fewest = len(sizes)
    for k in range(len(capacity)):
        fewest = min(fewest, int(np.searchsorted(np.cumsum(np.sort(sizes[:, k])), capacity[k], side="right")))
    return fewest


@kernel
def _first_fit(order: Any, sizes: Any, capacity: Any, bins: Any) -> int:
    """Each item into the first bin it fits; how many bins."""
    load = np.zeros((len(order), len(capacity)), dtype=np.int64)
    used = 0
    for item in order:
        at = used
        for b in range(used):
            if fits(load[b], sizes[item], capacity):
                at = b
                break
        if at == used:
            used += 1
        for k in range(len(capacity)):
            load[at, k] += sizes[item, k]
        bins[item] = at
    return used


@kernel
def _fill_by_dot(sizes: Any, scaled: Any, capacity: Any, bins: Any) -> int:
    """Bins one by one, each with the item whose sizes agree best with what is free; how many bins."""
    items, dims = sizes.shape
    load, free = np.zeros(dims, dtype=np.int64), np.ones(dims)
    bins[:] = -1
    left, b = items, 0
    while left > 0:
        best, at = -1.0, -1
        for item in range(items):
            if bins[item] < 0 and fits(load, sizes[item], capacity):
                worth = 0.0
                for k in range(dims):
                    worth += free[k] * scaled[item, k]
                if worth > best:
                    best, at = worth, item
        if at < 0:
            b += 1
            load[:] = 0
            free[:] = 1.0
        else:
            bins[at] = b
            left -= 1
            for k in range(dims):
                load[k] += sizes[at, k]
                free[k] -= scaled[at, k]
    return b + 1


def construct(sizes: Ints, capacity: Ints) -> tuple[Ints, int]:
    """The best of some constructive orders: the bin of each item, and how many bins."""
    scaled = sizes / np.maximum(capacity, 1)
    mean = scaled.mean(axis=0)
    best, fewest = np.zeros(len(sizes), dtype=np.int64), len(sizes) + 1
    for weight in (scaled @ mean, (scaled**2) @ mean, scaled.max(axis=1), scaled.sum(axis=1)):
        found = np.empty(len(sizes), dtype=np.int64)
        count = _first_fit(np.argsort(-weight, kind="stable"), sizes, capacity, found)
        if count < fewest:
            best, fewest = found, count
    found = np.empty(len(sizes), dtype=np.int64)
    count = _fill_by_dot(sizes, np.ascontiguousarray(scaled * mean), capacity, found)
    return (found, count) if count < fewest else (best, fewest)


def _empty_one(bins: Ints, count: int, sizes: Ints, scaled: Floats, depth: int) -> tuple[Any, ...]:
    """State with the lightest bin's items in the pool and the last bin in its place."""
    weight = np.zeros(count)
    np.add.at(weight, bins, scaled)
    gone = int(np.argmin(weight))
    load, members = np.zeros((count, sizes.shape[1]), dtype=np.int64), np.zeros((count, depth), dtype=np.int64)
    filled, where, pool = np.zeros(count, dtype=np.int64), np.full(len(sizes), -1, dtype=np.int64), np.zeros(len(sizes), dtype=np.int64)
    waiting = 0
    for item, b in enumerate(bins.tolist()):
        if b == gone:
            pool[waiting] = item
            waiting += 1
        else:
            put(item, gone if b == count - 1 else b, sizes, load, members, filled, where)
    return load, members, filled, where, pool, waiting


def pack(sizes: Any, capacity: Any, out_of_time: Callable[[], bool], *, steps_max: int = 1 << 62, seed: int = 1) -> Packing:
    """Pack `sizes [n, d]` into bins of `capacity [d]` until the bound is reached, `out_of_time()` says so, or after `steps_max` insertions; raises `Bad`.

    For equal `seed` and `steps_max`, where time does not run out, the result is always the same.
    """
    items, room = checked(sizes, capacity)
    if not len(items):
        return Packing(np.zeros(0, dtype=np.int64), 0, 0, 0, 0)
    least = bound(items, room)
    bins, count = construct(items, room)
    constructed, steps = count, 0
    scaled = (items / np.maximum(room, 1)).sum(axis=1)
    depth = most_per_bin(items, room)
    penalty, state = np.ones(len(items), dtype=np.int64), np.array([seed % (MODULUS - 1) + 1], dtype=np.int64)
    while count > least and steps < steps_max and not out_of_time():
        load, members, filled, where, pool, waiting = _empty_one(bins, count, items, scaled, depth)
        while waiting and steps < steps_max and not out_of_time():
            budget = min(CHUNK, steps_max - steps)
            waiting = eject(budget, count - 1, items, room, load, members, filled, where, pool, waiting, penalty, state)
            steps += budget
        if waiting:
            break
        bins, count = where, count - 1
    return Packing(bins, count, least, constructed, steps)
