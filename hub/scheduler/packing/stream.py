"""VMs that come and go, on alike hosts, as few of them in use as can be: best fit, a fit that keeps cores and memory in balance, lifetimes where they are foretold, and migration.

A VM goes to a host in use; only where it fits on none is an empty one taken. Lower scores are better, equal ones go to the host of lower number:

    best fit        (cores + memory left free, each as a share of the host)
    balanced        the same, plus BALANCE times how far cores and memory drift apart
    foretold        plus LIFETIME times by how much the VM is expected to outlive all that is on the host (LAVA's idea: fill hosts with what ends together)

Migration runs every `MIGRATE_EVERY_S`: hosts with few VMs are emptied, least used first, all of a host's VMs or none, onto hosts that are fuller; a VM that moved stays
for `STAY_S`. Whole seconds, cores and MiB.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import kernel
from .gpus import Bad, Ints

BALANCE = 8.0
"""Weight of the drift between free cores and free memory, as shares of a host; of 0.2 to 8, which differ by half a percent of the hosts, 8 was the best on three shapes of host."""

LIFETIME = 0.05
"""Weight of each doubling by which a VM is expected to outlive a host's others."""

MIGRATE_EVERY_S = 3_600
"""Between two rounds of migration: hosts saved for less than an hour are not worth a move."""

VMS_MAX = 8
"""A host with more VMs is not emptied: moves per host saved are bounded by it, as VMware's default is."""

STAY_S = 6 * 3_600
"""A VM that has moved is left alone for so long, so that none wanders."""

HOSTS_MAX = 50_000
"""Hosts at most; beyond it a VM is refused, counted by host -1."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Served:
    """host `[V]` at arrival (-1: refused); moves `[K, 3]` (second, VM, to host); in_use `[B]` hosts after each sample time, stranded `[B]` cores that their hosts' memory cannot serve."""

    host: Ints
    moves: Ints
    in_use: Ints
    stranded: Floats


@kernel
def _pick(cores: int, memory: int, ends: int, now: int, but: int, used_min: int, top: int, capacity: Any, free: Any, count: Any, last: Any, balance: float, lifetime: float) -> int:
    """The host in use for a VM, not `but`, with more than `used_min` cores in use; -1 where there is none."""
    best, at = 1e18, -1
    for h in range(top):
        if count[h] == 0 or free[h, 0] < cores or free[h, 1] < memory or h == but or capacity[0] - free[h, 0] <= used_min:
            continue
        c, m = (free[h, 0] - cores) / capacity[0], (free[h, 1] - memory) / capacity[1]
        score = c + m
        if balance > 0:
            score += balance * (abs(c - m) - abs(free[h, 0] / capacity[0] - free[h, 1] / capacity[1]))
        if lifetime > 0 and ends > 0 and ends > last[h]:
            score += lifetime * np.log2((ends - now + 300.0) / (max(last[h] - now, 0) + 300.0))
        if score < best:
            best, at = score, h
    return at


@kernel
def _serve(
    arrives: Any, departs: Any, leaving: Any, ends: Any, cores: Any, memory: Any, capacity: Any, ratio: float, balance: float, lifetime: float, migrate: bool, samples: Any, host: Any, first: Any,
    free: Any, count: Any, last: Any, head: Any, after: Any, before: Any, stays: Any, moves: Any, in_use: Any, stranded: Any,
) -> int:
    """Play arrivals, departures and migration in order of time; how many moves."""
    gone, top, moved, sample, next_round = 0, 0, 0, 0, samples[0] + MIGRATE_EVERY_S
    vm = 0
    picked = np.empty(VMS_MAX, dtype=np.int64)
    goes = np.empty(VMS_MAX, dtype=np.int64)
    while sample < len(samples):
        now = samples[sample]
        while gone < len(leaving) and departs[leaving[gone]] <= now:
            v = leaving[gone]
            gone += 1
            h = host[v]
            if h >= 0:
                free[h, 0] += cores[v]
                free[h, 1] += memory[v]
                count[h] -= 1
                if before[v] >= 0:
                    after[before[v]] = after[v]
                else:
                    head[h] = after[v]
                if after[v] >= 0:
                    before[after[v]] = before[v]
                if count[h] == 0:
                    last[h] = 0
        while vm < len(arrives) and arrives[vm] <= now:
            h = _pick(cores[vm], memory[vm], ends[vm], now, -1, -1, top, capacity, free, count, last, balance, lifetime)
            if h < 0:
                for e in range(min(top + 1, len(count))):
                    if count[e] == 0:
                        h = e
                        break
                top = max(top, h + 1)
            first[vm] = h
            host[vm] = h
            if h >= 0:
                free[h, 0] -= cores[vm]
                free[h, 1] -= memory[vm]
                count[h] += 1
                last[h] = max(last[h], ends[vm])
                before[vm] = -1
                after[vm] = head[h]
                if head[h] >= 0:
                    before[head[h]] = vm
                head[h] = vm
            vm += 1
        if migrate and now >= next_round:
            next_round = now + MIGRATE_EVERY_S
            for h in np.argsort(-free[:top, 0], kind="mergesort"):
                n = count[h]
                if n == 0 or n > VMS_MAX:
                    continue
                can, v, k = True, head[h], 0
                while v >= 0:
                    if stays[v] > now:
                        can = False
                        break
                    picked[k] = v
                    k += 1
                    v = after[v]
                if not can:
                    continue
                load, done = capacity[0] - free[h, 0], 0
                for k in range(n):
                    v = picked[k]
                    to = _pick(cores[v], memory[v], ends[v], now, h, load, top, capacity, free, count, last, balance, lifetime)
                    if to < 0:
                        break
                    free[to, 0] -= cores[v]
                    free[to, 1] -= memory[v]
                    goes[k] = to
                    done += 1
                if done < n or moved + n > len(moves):
                    for k in range(done):
                        free[goes[k], 0] += cores[picked[k]]
                        free[goes[k], 1] += memory[picked[k]]
                    continue
                for k in range(n):
                    v, to = picked[k], goes[k]
                    free[h, 0] += cores[v]
                    free[h, 1] += memory[v]
                    count[h] -= 1
                    count[to] += 1
                    last[to] = max(last[to], ends[v])
                    before[v] = -1
                    after[v] = head[to]
                    if head[to] >= 0:
                        before[head[to]] = v
                    head[to] = v
                    host[v] = to
                    stays[v] = now + STAY_S
                    moves[moved, 0], moves[moved, 1], moves[moved, 2] = now, v, to
                    moved += 1
                head[h] = -1
                last[h] = 0
        total, lost = 0, 0.0
        for h in range(top):
            if count[h] > 0:
                total += 1
                lost += max(0.0, free[h, 0] - free[h, 1] / ratio)
        in_use[sample] = total
        stranded[sample] = lost
        sample += 1
    return moved


def serve(arrives: Ints, departs: Ints, cores: Ints, memory: Ints, capacity: tuple[int, int], samples: Ints, *, ends: Ints | None = None, balance: float = BALANCE, lifetime: float = 0.0, migrate: bool = False) -> Served:
    """Serve V VMs `arrives, departs, cores, memory [V]`, in order of arrival; departures, arrivals, migration at each of the seconds `samples [B]`. `ends [V]`: when each is expected to end (0: unknown).

    Raises `Bad` naming the VM that no host can hold, or that arrives before the one before it.
    """
    count = len(arrives)
    for name, array in (("departs", departs), ("cores", cores), ("memory", memory)):
        if len(array) != count:
            raise Bad(f"{name}: give one number per VM ({count})")
    if count and ((np.diff(arrives) < 0).any() or (departs <= arrives).any()):
        raise Bad("arrives: give the VMs in order of arrival, each with a later departure")
    for name, array, room in (("cores", cores, capacity[0]), ("memory", memory, capacity[1])):
        wrong = (array < 0) | (array > room)
        if wrong.any():
            raise Bad(f"{name}[{int(np.argmax(wrong))}] is {int(array[np.argmax(wrong)])}; a host has {room}")
    if not len(samples):
        return Served(np.full(count, -1), np.zeros((0, 3), dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))
    foretold = np.zeros(count, dtype=np.int64) if ends is None else np.ascontiguousarray(ends, dtype=np.int64)
    leaving = np.argsort(departs, kind="stable").astype(np.int64)
    hosts = min(HOSTS_MAX, max(count, 1))
    host, first = np.full(count, -1, dtype=np.int64), np.full(count, -1, dtype=np.int64)
    free = np.tile(np.array(capacity, dtype=np.int64), (hosts, 1))
    moves = np.zeros((count if migrate else 0, 3), dtype=np.int64)
    in_use, stranded = np.zeros(len(samples), dtype=np.int64), np.zeros(len(samples))
    ratio = float(memory.sum() / max(int(cores.sum()), 1)) or 1.0
    made = _serve(
        arrives, departs, leaving, foretold, cores, memory, np.array(capacity, dtype=np.int64), ratio, balance, lifetime, migrate, samples, host, first, free, np.zeros(hosts, dtype=np.int64),
        np.zeros(hosts, dtype=np.int64), np.full(hosts, -1, dtype=np.int64), np.full(count, -1, dtype=np.int64), np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=np.int64), moves, in_use, stranded,
    )
    return Served(first, moves[:made], in_use, stranded)
