"""VMs that come and go on a number of equal hosts: best fit, with or without an advisor on lifetimes, with or without moves. Replays a trace in memory; all by integers and a seed.

Best fit: the host with the least free (cores and memory as shares of a host, added) among those that fit, the first among equals. With exits: first the host whose time until it
is empty is prolonged least (`hub.scheduler.lifetime.stretch`), then best fit. A move relocates a running VM by the same rule so that an arrival fits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hub.scheduler.lifetime import Exits, Floats, expected_left_s, stretch

from .azure_trace import NEVER, Vm

UNIT = 100
"""Sizes are whole hundredths of a core and of a GiB."""

SAMPLE_S = 3_600
"""How often stranding is looked at and outlived predictions are made anew."""

MAX_MOVES = 4
"""VMs moved at most so that one arrival fits."""

CANDIDATES = 8
"""Hosts that are looked at for making room: those that lack least."""

Predict = Callable[[Sequence[int], Floats], Floats]
"""VM ids and their ages to the seconds that each is expected to live on."""


@dataclass(frozen=True)
class Host:
    """Size of every host."""

    cores: int
    gib: int


@dataclass
class Outcome:
    """`failed_at`: id of the first VM that found no place (the replay ends there), -1 where all did. Shares are means over the samples after `since_s`."""

    failed_at: int = -1
    moves: int = 0
    stranded_cores: list[float] = field(default_factory=list)
    stranded_gib: list[float] = field(default_factory=list)
    empty: list[float] = field(default_factory=list)
    host_of: "npt.NDArray[np.int32]" = field(default_factory=lambda: np.empty(0, np.int32))
    moved: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(before arrival of VM, VM that moves, from, to)."""

    def means(self) -> dict[str, float]:
        """For the report."""
        return {name: round(float(np.mean(getattr(self, name))) if getattr(self, name) else 0.0, 5) for name in ("stranded_cores", "stranded_gib", "empty")}


def oracle(vms: Sequence[Vm]) -> Predict:
    """Knows every end: what perfect prediction would be worth."""
    ends = np.array([min(vm.end_s, vm.at_s + 10 * vm.seen_s if vm.end_s == NEVER else vm.end_s) for vm in vms], np.float64)
    at = np.array([vm.at_s for vm in vms], np.float64)
    return lambda ids, age: np.maximum(ends[list(ids)] - at[list(ids)] - age, 1.0)


def learned(chance: Floats) -> Predict:
    """From [VM, class] chances."""
    return lambda ids, age: expected_left_s(chance[list(ids)], age)


class Replay:
    """One run over a trace on `hosts` hosts."""

    def __init__(self, vms: Sequence[Vm], host: Host, hosts: int, predict: Predict | None = None, predict_from_s: int = 0, moves: bool = False, since_s: int = 0) -> None:
        self.vms, self.host, self.count, self.moves, self.since_s = vms, host, hosts, moves, since_s
        self.cores = np.full(hosts, host.cores * UNIT, np.int64)
        self.gib = np.full(hosts, host.gib * UNIT, np.int64)
        self.left = self.cores * host.gib + self.gib * host.cores
        """What is free, cores and memory weighed as shares of a host."""
        self.step = 4 * UNIT * host.cores * host.gib
        """More than any difference of `left`."""
        self.on: list[set[int]] = [set() for _ in range(hosts)]
        self.exits = Exits(hosts) if predict else None
        self.predict, self.predict_from_s = predict, predict_from_s
        self.out = Outcome(host_of=np.full(len(vms), -1, np.int32))
        self.need = [(round(vm.cores * UNIT), round(vm.gib * UNIT)) for vm in vms]
        self.first = predict(range(len(vms)), np.zeros(len(vms))).tolist() if predict else []

    def run(self) -> Outcome:
        """To the end, or to the first VM that finds no place."""
        leaving = sorted((vm.end_s, vm.id) for vm in self.vms if vm.ended)
        at, sample_s = 0, self.vms[0].at_s if self.vms else 0
        for vm in self.vms:
            now = vm.at_s
            while at < len(leaving) and leaving[at][0] <= now:
                self._leave(leaving[at][1])
                at += 1
            if now >= sample_s:
                sample_s = now + SAMPLE_S
                self._sample(now)
            place = self._best(vm.id, now)
            if place < 0 and self.moves:
                place = self._make_room(vm.id, now)
            if place < 0:
                self.out.failed_at = vm.id
                break
            self._arrive(vm.id, place, now)
        return self.out

    def _best(self, vm: int, now: int, without: int = -1) -> int:
        cores, gib = self.need[vm]
        fit = np.flatnonzero((self.cores >= cores) & (self.gib >= gib))
        if without >= 0:
            fit = fit[fit != without]
        if not fit.size:
            return -1
        left = self.left[fit]
        if self.exits is not None and now >= self.predict_from_s:
            # A prediction that has passed, and an empty host, count as free from now on.
            left = left + stretch(self._exit(vm, now), np.maximum(self.exits.of_node[fit], now)) * self.step
        return int(fit[left.argmin()])

    def _exit(self, vm: int, now: int) -> float:
        age = now - self.vms[vm].at_s
        if not age:
            return float(now + self.first[vm])
        assert self.predict is not None
        return float(now + self.predict([vm], np.array([float(age)]))[0])

    def _arrive(self, vm: int, place: int, now: int) -> None:
        cores, gib = self.need[vm]
        self.cores[place] -= cores
        self.gib[place] -= gib
        self.left[place] -= cores * self.host.gib + gib * self.host.cores
        self.on[place].add(vm)
        self.out.host_of[vm] = place
        if self.exits is not None:
            self.exits.predict(place, vm, self._exit(vm, now))

    def _leave(self, vm: int) -> None:
        place = int(self.out.host_of[vm])
        cores, gib = self.need[vm]
        self.cores[place] += cores
        self.gib[place] += gib
        self.left[place] += cores * self.host.gib + gib * self.host.cores
        self.on[place].discard(vm)
        if self.exits is not None:
            self.exits.forget(place, vm)

    def _make_room(self, vm: int, now: int) -> int:
        """Move up to MAX_MOVES VMs off one host so that the arrival fits there; -1, with nothing changed, where that finds no way."""
        cores, gib = self.need[vm]
        lack = np.maximum(cores - self.cores, 0) / (self.host.cores * UNIT) + np.maximum(gib - self.gib, 0) / (self.host.gib * UNIT)
        for place in np.argsort(lack, kind="stable")[:CANDIDATES].tolist():
            done: list[tuple[int, int]] = []
            for other in sorted(self.on[place], key=lambda item: self._waste(item, cores - int(self.cores[place]), gib - int(self.gib[place]))):
                if len(done) == MAX_MOVES or (self.cores[place] >= cores and self.gib[place] >= gib):
                    break
                if not (self.need[other][0] and cores > self.cores[place]) and not (self.need[other][1] and gib > self.gib[place]):
                    continue
                target = self._best(other, now, place)
                if target >= 0:
                    self._leave(other)
                    self._arrive(other, target, now)
                    done.append((other, target))
            if self.cores[place] >= cores and self.gib[place] >= gib:
                self.out.moves += len(done)
                self.out.moved += [(vm, other, place, target) for other, target in done]
                return int(place)
            for other, _ in reversed(done):
                self._leave(other)
                self._arrive(other, place, now)
        return -1

    def _waste(self, vm: int, cores: int, gib: int) -> tuple[bool, int]:
        """Those first that cover what is lacking by themselves, the smallest of them first; then the largest."""
        mine = self.need[vm]
        size = mine[0] * self.host.gib + mine[1] * self.host.cores
        enough = mine[0] >= cores and mine[1] >= gib
        return not enough, size if enough else -size

    def _sample(self, now: int) -> None:
        if self.exits is not None and self.predict is not None:
            old = self.exits.outlived(now)
            if old:
                left = self.predict([vm for _, vm in old], np.array([float(now - self.vms[vm].at_s) for _, vm in old]))
                for (place, vm), seconds in zip(old, left.tolist(), strict=True):
                    self.exits.predict(place, vm, now + seconds)
        if now < self.since_s:
            return
        used_cores, used_gib = self.host.cores * UNIT * self.count - int(self.cores.sum()), self.host.gib * UNIT * self.count - int(self.gib.sum())
        if not used_cores or not used_gib:
            return
        # What VMs of the mean shape of those that run could not use of the free part of each host.
        ratio = used_gib / used_cores
        usable = np.minimum(self.cores, self.gib / ratio)
        self.out.stranded_cores.append(float((self.cores - usable).sum()) / (self.host.cores * UNIT * self.count))
        self.out.stranded_gib.append(float((self.gib - usable * ratio).sum()) / (self.host.gib * UNIT * self.count))
        self.out.empty.append(sum(not here for here in self.on) / self.count)


def lower_bound(vms: Sequence[Vm], host: Host) -> int:
    """Hosts that the fullest moment needs at least, by cores or memory."""
    events = sorted([(vm.end_s, 0, -vm.cores, -vm.gib) for vm in vms if vm.ended] + [(vm.at_s, 1, vm.cores, vm.gib) for vm in vms])
    cores = gib = 0.0
    most = 0.0
    for _, _, more_cores, more_gib in events:
        cores, gib = cores + more_cores, gib + more_gib
        most = max(most, cores / host.cores, gib / host.gib)
    return max(1, math.ceil(most - 1e-9))


def hosts_needed(holds: Callable[[int], bool], least: int, most: int) -> int:
    """The least number that holds everything, by doubling steps up from `least` and bisection. Raises `ValueError` where `most` do not."""
    low, step = least - 1, 1
    while not holds(least - 1 + step):
        low, step = least - 1 + step, step * 2
        if low >= most:
            raise ValueError(f"{low} hosts do not hold the trace; give larger hosts")
    high = least - 1 + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def check(vms: Sequence[Vm], host: Host, hosts: int, out: Outcome) -> list[str]:
    """Faults of an outcome, by a replay that shares nothing with `Replay`: every VM on a host from arrival to end, no host over its size at any time."""
    faults: list[str] = []
    moved: dict[int, list[tuple[int, int, int]]] = {}
    for before, vm, source, target in out.moved:
        moved.setdefault(before, []).append((vm, source, target))
    first: dict[int, int] = {vm.id: int(out.host_of[vm.id]) for vm in vms}
    for _, vm, source, _ in reversed(out.moved):
        first[vm] = source
    used: dict[int, list[float]] = {}
    where: dict[int, int] = {}
    events: list[tuple[int, int, int]] = sorted([(vm.end_s, 0, vm.id) for vm in vms if vm.ended] + [(vm.at_s, 1, vm.id) for vm in vms])
    arrived = {vm.id for vm in vms}

    def shift(vm: Vm, place: int, sign: int) -> None:
        total = used.setdefault(place, [0.0, 0.0])
        total[0] += sign * vm.cores
        total[1] += sign * vm.gib
        if not 0 <= place < hosts or total[0] > host.cores + 1e-6 or total[1] > host.gib + 1e-6:
            faults.append(f"host {place} of {hosts}: {total[0]} of {host.cores} cores, {total[1]} of {host.gib} GiB")

    for _, coming, name in events:
        if not coming:
            if name in where:
                shift(vms[name], where.pop(name), -1)
            continue
        for vm, source, target in moved.get(name, ()):
            if where.get(vm) != source:
                faults.append(f"VM {vm} is moved from host {source}, but is on {where.get(vm)}")
                continue
            shift(vms[vm], source, -1)
            shift(vms[vm], target, 1)
            where[vm] = target
        where[name] = first[name]
        shift(vms[name], first[name], 1)
        arrived.discard(name)
    faults += [f"VM {name} never arrived" for name in arrived]
    return faults


