"""Pods with GPUs placed one by one as they arrive, by three rules: best fit, FGD, and ours; ours also with migration.

Ours is FGD's score less what the placement strands (`fragmentation.stranded`), and less a penalty where a pod that accepts many models would take what is
reserved for pods that accept few (`devices.limits`). Every pod that fits somewhere is placed: a reserve says where, never whether.
Equal scores go to the first node of the given order.

With migration, a pod that fits nowhere may have up to `VICTIMS_MAX` pods of one node moved elsewhere; those find their new place by the same rule. A try that does not
come off is undone. Nothing is known of the order of arrivals or of their end; the mix of kinds is (FGD's typical pods, and the same counts for the reserves).

The kernel keeps a score per (kind, node) and renews it only where the node has changed since.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .compiled import kernel
from .devices import limits
from .fragmentation import SCORE_MAX, SIGMOID_MILLI, of_node, stranded
from .gpus import WHOLE, Bad, Ints, Kinds, Mix, Nodes, cpu_per_gpu, typical

BEST_FIT, FGD, OURS = 0, 1, 2
"""The rules."""

STRANDED_WEIGHT = 8.0
"""Score per 1000 milli-GPU newly stranded; a whole GPU fragmented costs FGD's score about 25 near its middle. Between 4 and 32 the mixes tried differ by less than the seeds do."""

RESERVED_PENALTY = 1000.0
"""Above every score: a reserve is touched only where nothing else is left."""

NOWHERE = -1e18
"""Score of a node that cannot take the pod."""

VICTIMS_MAX = 2
"""Pods that may move for one that arrives."""

TRIES_MAX = 48
"""Sets of victims tried for one arrival, cheapest (least memory to copy) first."""

MEMBERS_MAX = 256
"""Pods per node that are considered as victims; a node may hold more, those beyond stay where they are."""

BEST_FIT_CPU, BEST_FIT_GPU = 128_000.0, 8_000.0
"""What the published best fit divides by: the largest node's milli-CPU and milli-GPU."""


class State(NamedTuple):
    """What changes: free cpu, memory `[N]`, device `[N, 8]`; version `[N]`; used `[A, M]` milli-GPU; score, stamp, pick `[C, N]`; whole `[N]` F and lost `[N]` stranded as the node stands."""

    cpu: Any
    memory: Any
    device: Any
    version: Any
    used: Any
    score: Any
    stamp: Any
    pick: Any
    whole: Any
    lost: Any
    members: Any
    count: Any
    node_of: Any
    device_of: Any


class Rule(NamedTuple):
    """Which rule: policy, ratio (milli-CPU per milli-GPU), weight of stranding; limits `[A, M]` and freedom `[A]` of the reserves; order `[N]` for ties."""

    policy: int
    ratio: float
    weight: float
    limits: Any
    freedom: Any
    order: Any


@kernel
def _refresh(n: int, nodes: Any, mix: Any, rule: Any, state: Any) -> None:
    """The node has changed: scores of it are void, its own figures new."""
    state.version[n] += 1
    if rule.policy != BEST_FIT:
        state.whole[n] = of_node(state.cpu[n], state.device[n], nodes.gpus[n], nodes.model[n], mix)
        if rule.policy == OURS:
            state.lost[n] = stranded(state.cpu[n], state.device[n], nodes.gpus[n], rule.ratio)


@kernel
def _worth(n: int, cpu: int, device: Any, nodes: Any, mix: Any, rule: Any, state: Any) -> float:
    """Score of leaving node n with `cpu` and `device` free."""
    gain = state.whole[n] - of_node(cpu, device, nodes.gpus[n], nodes.model[n], mix)
    score = math.floor(SCORE_MAX / (1.0 + math.exp(-gain / SIGMOID_MILLI)))
    if rule.policy == OURS:
        score -= rule.weight * (stranded(cpu, device, nodes.gpus[n], rule.ratio) - state.lost[n]) / WHOLE
    return score


@kernel
def _score(c: int, n: int, nodes: Any, kinds: Any, mix: Any, rule: Any, state: Any, left: Any) -> None:
    """Score of kind c on node n as it stands, and the device to take, into the state."""
    state.stamp[c, n] = state.version[n]
    state.score[c, n] = NOWHERE
    gpus, num, milli = nodes.gpus[n], kinds.num[c], kinds.milli[c]
    cpu = state.cpu[n] - kinds.cpu[c]
    if cpu < 0 or state.memory[n] < kinds.memory[c] or not kinds.access[c, nodes.model[n]]:
        return
    for d in range(gpus):
        left[d] = state.device[n, d]
    if rule.policy == BEST_FIT:
        total, idle, tightest = 0, 0, -1
        for d in range(gpus):
            total += left[d]
            if left[d] == WHOLE:
                idle += 1
            if num == 1 and milli < WHOLE and left[d] >= milli and (tightest < 0 or left[d] < left[tightest]):
                tightest = d
        if (num == 1 and milli < WHOLE and tightest < 0) or (milli == WHOLE and idle < num):
            return
        state.pick[c, n] = tightest
        state.score[c, n] = math.floor(SCORE_MAX * (1.0 - 0.5 * cpu / BEST_FIT_CPU - 0.5 * (total - num * milli) / BEST_FIT_GPU))
    elif num == 0:
        state.score[c, n] = _worth(n, cpu, left, nodes, mix, rule, state)
    elif milli < WHOLE:
        for d in range(gpus):
            seen = False
            for e in range(d):
                if state.device[n, e] == state.device[n, d]:
                    seen = True
            if left[d] < milli or seen:
                continue
            left[d] -= milli
            score = _worth(n, cpu, left, nodes, mix, rule, state)
            left[d] += milli
            if score > state.score[c, n]:
                state.score[c, n], state.pick[c, n] = score, d
    else:
        taken = 0
        for d in range(gpus):
            if left[d] == WHOLE and taken < num:
                left[d] = 0
                taken += 1
        if taken == num:
            state.score[c, n] = _worth(n, cpu, left, nodes, mix, rule, state)


@kernel
def _choose(c: int, but: int, nodes: Any, kinds: Any, mix: Any, rule: Any, state: Any, left: Any, penalty: Any) -> int:
    """The node for a pod of kind c, not `but`; -1 where it fits nowhere."""
    asks = kinds.num[c] * kinds.milli[c]
    mine = kinds.accepts[c]
    for m in range(len(penalty)):
        penalty[m] = 0.0
        if rule.policy == OURS and asks > 0:
            used = asks
            for a in range(len(rule.freedom)):
                if rule.freedom[a] >= rule.freedom[mine]:
                    used += state.used[a, m]
            if used > rule.limits[mine, m]:
                penalty[m] = RESERVED_PENALTY
    best, at = NOWHERE, -1
    for n in rule.order:
        if state.stamp[c, n] != state.version[n]:
            _score(c, n, nodes, kinds, mix, rule, state, left)
        if state.score[c, n] > NOWHERE and n != but:
            score = state.score[c, n] - penalty[nodes.model[n]]
            if score > best:
                best, at = score, n
    return at


@kernel
def _put(t: int, c: int, n: int, d: int, nodes: Any, kinds: Any, mix: Any, rule: Any, state: Any) -> None:
    """Pod t of kind c onto node n; d is the device of a shared pod. `device_of` keeps the device, or a bit per whole device."""
    state.cpu[n] -= kinds.cpu[c]
    state.memory[n] -= kinds.memory[c]
    state.device_of[t] = 0
    if kinds.milli[c] == WHOLE:
        taken = 0
        for e in range(nodes.gpus[n]):
            if state.device[n, e] == WHOLE and taken < kinds.num[c]:
                state.device[n, e] = 0
                state.device_of[t] |= 1 << e
                taken += 1
    elif kinds.num[c] > 0:
        state.device[n, d] -= kinds.milli[c]
        state.device_of[t] = d
    state.used[kinds.accepts[c], nodes.model[n]] += kinds.num[c] * kinds.milli[c]
    state.node_of[t] = n
    if state.count[n] < MEMBERS_MAX:
        state.members[n, state.count[n]] = t
        state.count[n] += 1
    _refresh(n, nodes, mix, rule, state)


@kernel
def _take(t: int, c: int, nodes: Any, kinds: Any, mix: Any, rule: Any, state: Any) -> None:
    """Pod t of kind c off its node."""
    n = state.node_of[t]
    state.cpu[n] += kinds.cpu[c]
    state.memory[n] += kinds.memory[c]
    if kinds.milli[c] == WHOLE:
        for e in range(nodes.gpus[n]):
            if state.device_of[t] >> e & 1:
                state.device[n, e] = WHOLE
    elif kinds.num[c] > 0:
        state.device[n, state.device_of[t]] += kinds.milli[c]
    state.used[kinds.accepts[c], nodes.model[n]] -= kinds.num[c] * kinds.milli[c]
    state.node_of[t] = -1
    for at in range(state.count[n]):
        if state.members[n, at] == t:
            state.members[n, at] = state.members[n, state.count[n] - 1]
            state.count[n] -= 1
            break
    _refresh(n, nodes, mix, rule, state)


@kernel
def _would_fit(c: int, n: int, a: int, b: int, arrivals: Any, nodes: Any, kinds: Any, state: Any, left: Any) -> bool:
    """Whether kind c fits on node n once pods a and b (-1: none) have left."""
    cpu, memory = state.cpu[n], state.memory[n]
    gpus = nodes.gpus[n]
    for d in range(gpus):
        left[d] = state.device[n, d]
    for t in (a, b):
        if t < 0:
            continue
        k = arrivals[t]
        cpu += kinds.cpu[k]
        memory += kinds.memory[k]
        if kinds.milli[k] == WHOLE:
            for d in range(gpus):
                if state.device_of[t] >> d & 1:
                    left[d] = WHOLE
        elif kinds.num[k] > 0:
            left[state.device_of[t]] += kinds.milli[k]
    if cpu < kinds.cpu[c] or memory < kinds.memory[c]:
        return False
    if kinds.num[c] == 0:
        return True
    good = 0
    for d in range(gpus):
        if left[d] >= kinds.milli[c]:
            good += 1
    return bool(good >= kinds.num[c])


@kernel
def _homes(nodes: Any, kinds: Any, order: Any, state: Any, first: Any, second: Any) -> None:
    """For each kind two nodes it fits on now (-1: none), so that one is left whichever node is cleared."""
    for c in range(len(kinds.cpu)):
        first[c] = second[c] = -1
        for n in order:
            if state.cpu[n] < kinds.cpu[c] or state.memory[n] < kinds.memory[c] or not kinds.access[c, nodes.model[n]]:
                continue
            good = 0
            if kinds.num[c] > 0:
                for d in range(nodes.gpus[n]):
                    if state.device[n, d] >= kinds.milli[c]:
                        good += 1
            if good >= kinds.num[c]:
                if first[c] < 0:
                    first[c] = n
                else:
                    second[c] = n
                    break


@kernel
def _keep(cost: int, n: int, a: int, b: int, costs: Any, sets: Any, found: int) -> int:
    """Keep the TRIES_MAX cheapest sets, in order; how many there are now."""
    if found == TRIES_MAX and cost >= costs[found - 1]:
        return found
    at = min(found, TRIES_MAX - 1)
    while at > 0 and costs[at - 1] > cost:
        costs[at] = costs[at - 1]
        for k in range(3):
            sets[at, k] = sets[at - 1, k]
        at -= 1
    costs[at] = cost
    sets[at, 0], sets[at, 1], sets[at, 2] = n, a, b
    return min(found + 1, TRIES_MAX)


@kernel
def _make_room(t: int, c: int, arrivals: Any, nodes: Any, kinds: Any, mix: Any, rule: Any, state: Any, left: Any, penalty: Any) -> int:
    """Place pod t by moving one or two pods off a node; how many moved (0: it could not be done, nothing changed)."""
    first, second = np.empty(len(kinds.cpu), dtype=np.int64), np.empty(len(kinds.cpu), dtype=np.int64)
    _homes(nodes, kinds, rule.order, state, first, second)
    costs, sets = np.zeros(TRIES_MAX, dtype=np.int64), np.zeros((TRIES_MAX, 3), dtype=np.int64)
    for victims in range(1, VICTIMS_MAX + 1):
        found = 0
        for n in rule.order:
            if not kinds.access[c, nodes.model[n]] or nodes.gpus[n] < kinds.num[c] or nodes.cpu[n] < kinds.cpu[c] or nodes.memory[n] < kinds.memory[c]:
                continue
            for p in range(state.count[n]):
                a = state.members[n, p]
                ka = arrivals[a]
                if first[ka] < 0 or (first[ka] == n and second[ka] < 0):
                    continue
                if victims == 1:
                    if _would_fit(c, n, a, -1, arrivals, nodes, kinds, state, left):
                        found = _keep(kinds.memory[ka], n, a, -1, costs, sets, found)
                    continue
                for q in range(p + 1, state.count[n]):
                    b = state.members[n, q]
                    kb = arrivals[b]
                    if first[kb] < 0 or (first[kb] == n and second[kb] < 0):
                        continue
                    cost = kinds.memory[ka] + kinds.memory[kb]
                    if (found < TRIES_MAX or cost < costs[found - 1]) and _would_fit(c, n, a, b, arrivals, nodes, kinds, state, left):
                        found = _keep(cost, n, a, b, costs, sets, found)
        for at in range(found):
            n, a, b = sets[at, 0], sets[at, 1], sets[at, 2]
            device_a = state.device_of[a]
            _take(a, arrivals[a], nodes, kinds, mix, rule, state)
            device_b = 0
            if b >= 0:
                device_b = state.device_of[b]
                _take(b, arrivals[b], nodes, kinds, mix, rule, state)
            _score(c, n, nodes, kinds, mix, rule, state, left)
            _put(t, c, n, state.pick[c, n], nodes, kinds, mix, rule, state)
            to_a = _choose(arrivals[a], -1, nodes, kinds, mix, rule, state, left, penalty)
            to_b = -1
            if to_a >= 0:
                _put(a, arrivals[a], to_a, state.pick[arrivals[a], to_a], nodes, kinds, mix, rule, state)
                if b < 0:
                    return 1
                to_b = _choose(arrivals[b], -1, nodes, kinds, mix, rule, state, left, penalty)
                if to_b >= 0:
                    _put(b, arrivals[b], to_b, state.pick[arrivals[b], to_b], nodes, kinds, mix, rule, state)
                    return 2
                _take(a, arrivals[a], nodes, kinds, mix, rule, state)
            _take(t, c, nodes, kinds, mix, rule, state)
            _restore(a, arrivals[a], n, device_a, nodes, kinds, mix, rule, state)
            if b >= 0:
                _restore(b, arrivals[b], n, device_b, nodes, kinds, mix, rule, state)
    return 0


@kernel
def _restore(t: int, c: int, n: int, device: int, nodes: Any, kinds: Any, mix: Any, rule: Any, state: Any) -> None:
    """Pod t back onto exactly the devices it had."""
    if kinds.milli[c] < WHOLE:
        _put(t, c, n, device, nodes, kinds, mix, rule, state)
        return
    state.cpu[n] -= kinds.cpu[c]
    state.memory[n] -= kinds.memory[c]
    for e in range(nodes.gpus[n]):
        if device >> e & 1:
            state.device[n, e] = 0
    state.device_of[t] = device
    state.used[kinds.accepts[c], nodes.model[n]] += kinds.num[c] * kinds.milli[c]
    state.node_of[t] = n
    if state.count[n] < MEMBERS_MAX:
        state.members[n, state.count[n]] = t
        state.count[n] += 1
    _refresh(n, nodes, mix, rule, state)


@kernel
def _run(arrivals: Any, migrate: bool, nodes: Any, kinds: Any, mix: Any, rule: Any, state: Any, allocated: Any, log: Any) -> int:
    """Place `arrivals` in order; allocated `[T]` milli-GPU after each, the moves `[T, 2]` (victim's arrival, after which arrival) into log; how many moves."""
    left, penalty = np.zeros(state.device.shape[1], dtype=np.int64), np.zeros(rule.limits.shape[1])
    moves, total = 0, 0
    for n in range(len(nodes.cpu)):
        _refresh(n, nodes, mix, rule, state)
    for t in range(len(arrivals)):
        c = arrivals[t]
        n = _choose(c, -1, nodes, kinds, mix, rule, state, left, penalty)
        if n >= 0:
            _put(t, c, n, state.pick[c, n], nodes, kinds, mix, rule, state)
            total += kinds.num[c] * kinds.milli[c]
        elif migrate:
            moved = _make_room(t, c, arrivals, nodes, kinds, mix, rule, state, left, penalty)
            if moved > 0:
                total += kinds.num[c] * kinds.milli[c]
                moves += moved
        allocated[t] = total
        log[t] = moves
    return moves


@dataclass(frozen=True)
class Run:
    """What became of T arrivals: node `[T]` (-1: dropped) and device `[T]` (of a shared pod; else a bit per whole device) at the end, allocated `[T]` milli-GPU and moves `[T]` after each arrival."""

    node: Ints
    device: Ints
    allocated: Ints
    moves: Ints


@dataclass(frozen=True)
class Knowledge:
    """What the rules may know of the pods to come: the mix, and what follows from it."""

    mix: Mix
    ratio: float
    limits: Ints
    freedom: Ints


def learn(nodes: Nodes, of: Kinds, counts: Ints) -> Knowledge:
    """From how often each kind occurs (`counts [C]`), nothing else."""
    first = np.unique(of.accepts, return_index=True)[1]
    return Knowledge(typical(of, counts), cpu_per_gpu(nodes, of, counts), limits(nodes, of, counts), of.access[first].sum(axis=1).astype(np.int64))


def place(nodes: Nodes, of: Kinds, arrivals: Ints, order: Ints, knowledge: Knowledge, policy: int = OURS, *, migrate: bool = False) -> Run:
    """Place pods of kinds `arrivals [T]`, one by one; `order [N]` breaks ties. Raises `Bad` for a kind or an order that does not exist."""
    count, size = len(nodes.cpu), len(of.cpu)
    arrivals = np.ascontiguousarray(arrivals, dtype=np.int64)
    if len(arrivals) and (arrivals.min() < 0 or arrivals.max() >= size):
        raise Bad(f"arrivals: kinds are 0..{size - 1}; give only these")
    if sorted(order) != list(range(count)):
        raise Bad(f"order: give each of the {count} nodes once")
    if len(nodes.model) and nodes.model.max() >= of.access.shape[1]:
        raise Bad("kinds.access: give a column for each model of the nodes")
    slots = max(1, int(nodes.gpus.max(initial=0)))
    device = (np.arange(slots) < nodes.gpus[:, None]).astype(np.int64) * WHOLE
    here = np.full(len(arrivals), -1, dtype=np.int64)
    state = State(
        nodes.cpu.copy(), nodes.memory.copy(), device, np.zeros(count, dtype=np.int64), np.zeros(knowledge.limits.shape, dtype=np.int64),
        np.zeros((size, count)), np.full((size, count), -1, dtype=np.int64), np.zeros((size, count), dtype=np.int64), np.zeros(count), np.zeros(count),
        np.zeros((count, MEMBERS_MAX), dtype=np.int64), np.zeros(count, dtype=np.int64), here, np.zeros(len(arrivals), dtype=np.int64),
    )
    rule = Rule(policy, knowledge.ratio, STRANDED_WEIGHT, knowledge.limits, knowledge.freedom, np.ascontiguousarray(order, dtype=np.int64))
    allocated, log = np.zeros(len(arrivals), dtype=np.int64), np.zeros(len(arrivals), dtype=np.int64)
    _run(arrivals, migrate, nodes, of, knowledge.mix, rule, state, allocated, log)
    return Run(here, state.device_of, allocated, log)


