"""Which of the nodes that will do is best: policies give every node 0 to 100, weights add them up, a fixed order by seed breaks ties.

Scores are whole numbers as kube's are. Coarse scores are no accident: on the openb lists finer ones place worse.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import kernels
from .classes import CPU_ROW, MEMORY_ROW, Facts, Klass
from .feasible import in_domain
from .model import Kind
from .reasons import Bools, Ints
from .state import State
from .units import Invalid

BEST = 100
"""The most that a policy gives."""

RESOURCE_ROWS = (CPU_ROW, MEMORY_ROW)
"""CPU and memory: always among the resources that balance and packing look at."""


@dataclass(frozen=True, slots=True)
class View:
    """What a policy sees: the state, the class to place, the nodes that will do."""

    state: State
    klass: Klass
    facts: Facts
    feasible: Bools
    now_ms: int
    kept: dict[str, Any] = field(default_factory=dict)
    """What several policies need, worked out once per view."""

    def use(self, weights: tuple[tuple[str, int], ...] | None) -> "Use":
        """Capacity and use after placement of the resources that balance and packing look at."""
        if weights is None:
            if "use" not in self.kept:
                self.kept["use"] = _use(self, None)
            found: Use = self.kept["use"]
            return found
        return _use(self, dict(weights))


class Use(NamedTuple):
    """[resource, node] of some resources: rows and weights, capacity, the same but at least 1, used after placement; whether every node has all of them."""

    rows: Ints
    weights: Ints
    cap: Ints
    safe: Ints
    used: Ints
    complete: bool


def _use(view: "View", weights: Mapping[str, int] | None) -> Use:
    state = view.state
    rows, weighing = _looked_at(view, weights)
    key = ("capacity", rows.tobytes())
    known = state.caches.get(key)
    if known is None or known[0] != state.attributes.version:
        cap = state.cap[rows]
        known = state.caches[key] = state.attributes.version, cap, np.maximum(cap, 1), bool((cap > 0).all())
    _, cap, safe, complete = known
    return Use(rows, weighing, cap, safe, (cap + view.klass.request[rows][:, None]) - state.free[rows], complete)


class Policy(Protocol):
    """Scores all nodes at once."""

    def score(self, view: View) -> Ints | None:
        """[node] 0 to 100; None where the policy has no opinion on this workload. What stands at nodes that will not do is ignored."""


def normalised(raw: Ints, feasible: Bools, *, reverse: bool = False) -> Ints:
    """Raw scores so that the largest is 100 (kube's default); reversed, the largest is 0."""
    most = int(raw[feasible].max(initial=0))
    if most == 0:
        return np.full(len(raw), BEST if reverse else 0, np.int64)
    scaled: Ints = BEST * raw // most
    return BEST - scaled if reverse else scaled


def stretched(raw: "np.ndarray[Any, Any]", feasible: Bools, *, reverse: bool = False) -> Ints | None:
    """Raw scores so that the least is 0 and the largest 100; None where all are the same."""
    if kernels.active is not None:
        varied, compiled = kernels.active.stretched(raw.astype(np.float64), feasible, reverse)
        return compiled if varied else None
    seen = raw[feasible]
    if not seen.size:
        return None
    least, most = seen.min(), seen.max()
    if most == least:
        return None
    scaled = BEST * (most - raw if reverse else raw - least) / (most - least)
    result: Ints = np.minimum(np.maximum(scaled, 0), BEST).astype(np.int64)
    return result


def _looked_at(view: View, weights: Mapping[str, int] | None) -> tuple[Ints, Ints]:
    """Resource rows and weights: those that the class weighs, or those given. Extended ones count only where they are asked for."""
    rows = view.state.resource_rows
    if weights is None:
        return view.klass.weighed, np.ones(len(view.klass.weighed), np.int64)
    chosen = [(rows[name], weight) for name, weight in weights.items() if name in rows and (rows[name] in RESOURCE_ROWS or rows[name] in view.klass.resources)]
    return np.array([row for row, _ in chosen], np.int64), np.array([weight for _, weight in chosen], np.int64)


@dataclass(frozen=True, slots=True)
class Balance:
    """Even use of the resources of a node: 100 minus the deviation of their used shares. `weights` chooses the resources (all count the same)."""

    weights: tuple[tuple[str, int], ...] | None = None

    def score(self, view: View) -> Ints | None:
        """As kube's NodeResourcesBalancedAllocation."""
        use = view.use(self.weights)
        if kernels.active is not None:
            compiled: Ints = kernels.active.balance(use.cap, use.used)
            return compiled
        share = np.minimum(use.used / use.safe, 1.0)
        if len(use.rows) == 2 and use.complete:
            spread = np.abs(share[0] - share[1]) / 2
        else:
            there = use.cap > 0
            count = np.maximum(there.sum(0), 1)
            mean = np.where(there, share, 0.0).sum(0) / count
            spread = np.sqrt((np.where(there, share - mean, 0.0) ** 2).sum(0) / count)
            if len(use.rows) == 2:
                spread = np.where(there.all(0), np.abs(share[0] - share[1]) / 2, 0.0)
        result: Ints = ((1.0 - spread) * BEST).astype(np.int64)
        return result


@dataclass(frozen=True, slots=True)
class Fullness:
    """The used share of the requested resources after placement (`packing`), or the free share (`headroom`)."""

    packing: bool = True
    weights: tuple[tuple[str, int], ...] | None = None

    def score(self, view: View) -> Ints | None:
        """As kube's most and least allocated strategies."""
        use = view.use(self.weights)
        if not len(use.rows):
            return None
        if kernels.active is not None:
            compiled: Ints = kernels.active.fullness(use.cap, use.used, use.weights, self.packing)
            return compiled
        part = np.minimum(use.used, use.cap) if self.packing else np.maximum(use.cap - use.used, 0)
        each = part * BEST // use.safe * use.weights[:, None]
        if use.complete:
            total: Any = max(int(use.weights.sum()), 1)
        else:
            there = use.cap > 0
            each, total = np.where(there, each, 0), np.maximum((there * use.weights[:, None]).sum(0), 1)
        result: Ints = each.sum(0) // total
        return result


class NodeAffinity:
    """Preferred node terms, the largest sum of weights being 100."""

    def score(self, view: View) -> Ints | None:
        """As kube's NodeAffinity."""
        return normalised(view.facts.preferred, view.feasible) if view.klass.shape.preferred_nodes else None


class TaintPreference:
    """Nodes with fewer PreferNoSchedule taints that are not tolerated."""

    def score(self, view: View) -> Ints | None:
        """As kube's TaintToleration."""
        return normalised(view.facts.disliked, view.feasible, reverse=True) if view.facts.any_disliked else None


@dataclass(frozen=True, slots=True)
class Peers:
    """Preferred affinity to workloads, of the one that comes and of those that are there; `need_weight` for those there that must be with this one."""

    need_weight: int = 1

    def score(self, view: View) -> Ints | None:
        """As kube's InterPodAffinity."""
        state, klass = view.state, view.klass
        if not (klass.likes or klass.liked_by or klass.needed_by):
            return None
        by_key: dict[str, Ints] = {}
        parts = [(row, key, weight) for row, key, weight in klass.likes] + [(row, key, 1) for row, key in klass.liked_by]
        parts += [(row, key, self.need_weight) for row, key in klass.needed_by] if self.need_weight else []
        for row, key, weight in parts:
            counts = state.counts[row] * weight
            by_key[key] = by_key[key] + counts if key in by_key else counts
        total = np.zeros(state.size, np.int64)
        for key, counts in by_key.items():
            if counts.any():
                total += in_domain(state, key, counts)
        return stretched(total, view.feasible) if by_key else None


class SoftSpread:
    """Soft spread constraints: the emptier the node's domains, the better."""

    def score(self, view: View) -> Ints | None:
        """As kube's PodTopologySpread: domains of few values weigh less, by log(values + 2)."""
        state, klass = view.state, view.klass
        if not klass.shape.spread:
            return None
        soft = [(item, row) for item, row in zip(klass.shape.spread, klass.spread_rows, strict=True) if not item.hard]
        if not soft:
            return None
        keyed = np.ones(state.size, np.bool_)
        for item, _ in soft:
            if item.needs_key:
                keyed = keyed & (state.attributes.domains(item.topology_key)[0] >= 0)
        scored, counted = view.feasible & keyed, view.facts.affine & keyed
        total = np.zeros(state.size)
        for item, row in soft:
            domain, size = state.attributes.domains(item.topology_key)
            if kernels.active is not None:
                compiled, values = kernels.active.spread_sums(counted, scored, domain, size, state.counts[row])
                kernels.active.add_spread(total, domain, compiled, np.log(values + 2.0), item.max_skew - 1)
                continue
            sums = np.bincount(np.where(counted, domain, -1) + 1, weights=state.counts[row], minlength=size + 1)[1:]
            values = np.count_nonzero(np.bincount(np.where(scored, domain, -1) + 1, minlength=size + 1)[1:])
            total += np.where(domain >= 0, np.append(sums, 0.0)[domain] * np.log(values + 2.0) + (item.max_skew - 1), 0.0)
        if kernels.active is not None:
            scores: Ints = kernels.active.spread_scores(total, scored, keyed)
            return scores
        cost = total.astype(np.int64)
        seen = cost[scored]
        if not seen.size:
            return np.zeros(state.size, np.int64)
        most, least = int(seen.max()), int(seen.min())
        result: Ints = np.full(state.size, BEST, np.int64) if most == 0 else BEST * (most + least - cost) // most
        return np.where(keyed, result, 0)


class Cost:
    """The price of what the workload takes of a node: price times its largest share of a resource."""

    def score(self, view: View) -> Ints | None:
        """The dearest node that will do gets 0, the cheapest 100."""
        if not view.facts.any_price:
            return None
        return stretched(view.facts.cost, view.feasible, reverse=True)


class Energy:
    """The power that the placement adds: waking an empty node costs its idle power, work costs its share of the rest."""

    def score(self, view: View) -> Ints | None:
        """The node that adds most gets 0, the one that adds least 100."""
        state = view.state
        if not view.facts.any_power:
            return None
        return stretched(np.where(state.load == 0, state.power[0], 0) + view.facts.work, view.feasible, reverse=True)


class Warm:
    """Nodes that hold the image."""

    def score(self, view: View) -> Ints | None:
        """100 where it is, 0 elsewhere."""
        row = view.state.attributes.images.get(view.klass.shape.image)
        return None if row is None else BEST * view.state.attributes.has_image[row].astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """Scores from outside per node, for all or by class: scarcity prices from LP duals (reverse: dear is bad), an advisor, a warm pool.

    `of` gives [node] raw values for a view, or None.
    """

    of: Callable[[View], "np.ndarray[Any, Any] | None"]
    reverse: bool = True

    def score(self, view: View) -> Ints | None:
        """Stretched to 0 to 100 over the nodes that will do."""
        raw = self.of(view)
        if raw is None:
            return None
        if raw.shape != (view.state.size,):
            raise Invalid("policy", f"gives {raw.shape} values for {view.state.size} nodes", "give one per node, in the order of state.nodes")
        return stretched(raw, view.feasible, reverse=self.reverse)


POLICIES: Mapping[str, Policy] = {
    "resource_balance": Balance(), "node_affinity": NodeAffinity(), "cost_optimization": Cost(), "topology_spread": SoftSpread(), "taint_preference": TaintPreference(),
    "peer_affinity": Peers(), "packing": Fullness(packing=True), "headroom": Fullness(packing=False), "energy": Energy(), "warm": Warm(),
}
"""Those that come with the library."""

FUSED = ("resource_balance", "packing", "headroom", "cost_optimization", "energy")
"""Those that depend on nothing but the node's own numbers: where kernels are compiled, one pass over the nodes that will do scores them all."""

MAX_SUMS = 256
"""Different weights of which a ranker remembers what to add up: workloads name their own, and those that do are few."""

_COMMON = {"resource_balance": 10, "node_affinity": 8, "cost_optimization": 6, "topology_spread": 5, "peer_affinity": 5, "taint_preference": 3, "scarcity": 6, "fragmentation": 8, "energy": 1}

WEIGHTS: Mapping[Kind, Mapping[str, int]] = {
    Kind.VM: {**_COMMON, "packing": 6}, Kind.CONTAINER: {**_COMMON, "packing": 3, "warm": 2}, Kind.FUNCTION: {**_COMMON, "warm": 12, "cold_start": 6, "packing": 2}, Kind.BATCH: {**_COMMON, "packing": 6},
}
"""Default weights by kind; a workload's own `weights` take their place name by name. Names without a policy count nothing."""


class Ranker:
    """Policies and weights. Unknown names in weights of workloads are refused by `check`."""

    def __init__(self, policies: Mapping[str, Policy] | None = None, weights: Mapping[Kind, Mapping[str, int]] | None = None) -> None:
        self.policies = {**POLICIES, **(policies or {})}
        self.weights = weights or WEIGHTS
        self._sums: dict[tuple[Kind, tuple[tuple[str, int], ...], bool], tuple[tuple[tuple[Policy, int], ...], tuple[int, ...]]] = {}
        """What `total` adds up, by kind, a shape's own weights and whether kernels are compiled: policies and their weights; weights of those that one kernel scores together."""

    def check(self, weights: Iterable[tuple[str, int]]) -> None:
        """Raises `Invalid` for a weight of a policy that is not here."""
        for name, _ in weights:
            if name not in self.policies and name not in _COMMON:
                raise Invalid(f"workload.weights.{name}", "is an unknown policy", f"use one of {', '.join(sorted(self.policies))}")

    def weights_of(self, klass: Klass) -> dict[str, int]:
        """Policy to weight for a class, zeros left out."""
        merged = {**self.weights[klass.shape.kind], **dict(klass.shape.weights)}
        return {name: weight for name, weight in merged.items() if weight and name in self.policies}

    def parts(self, view: View) -> list[tuple[str, int, Ints]]:
        """(policy, weight, [node] scores) of those that have an opinion."""
        found = []
        for name, weight in self.weights_of(view.klass).items():
            scores = self.policies[name].score(view)
            if scores is not None:
                found.append((name, weight, scores))
        return found

    def total(self, view: View) -> Ints:
        """[node] weighted sums, -1 where the node will not do."""
        total = np.zeros(view.state.size, np.int64)
        policies, fused = self._summed(view.klass)
        for policy, weight in policies:
            scores = policy.score(view)
            if scores is not None:
                total += scores * weight
        if kernels.active is None:
            return np.where(view.feasible, total, -1)
        state, facts, klass = view.state, view.facts, view.klass
        kernels.active.add_scores(
            total, view.feasible, state.cap, state.free, klass.weighed, klass.request, facts.cost, facts.any_price, facts.work, state.power, state.load, facts.any_power, *fused)
        return total

    def _summed(self, klass: Klass) -> tuple[tuple[tuple[Policy, int], ...], tuple[int, ...]]:
        key = klass.shape.kind, klass.shape.weights, kernels.active is not None
        found = self._sums.get(key)
        if found is None:
            if len(self._sums) >= MAX_SUMS:
                self._sums.clear()
            left = self.weights_of(klass)
            fused = tuple(self._fused(left)) if kernels.active is not None else ()
            found = self._sums[key] = tuple((self.policies[name], weight) for name, weight in left.items()), fused
        return found

    def _fused(self, weights: dict[str, int]) -> list[int]:
        """Takes the policies that one kernel scores together out of `weights`, and gives the weights of each in the kernel's order."""
        return [weights.pop(name, 0) if self.policies.get(name) == POLICIES[name] else 0 for name in FUSED]


def best(state: State, total: Ints) -> int | None:
    """The node with the highest total, the first in the seed's order among equals; None where none will do."""
    if not total.size:
        return None
    if kernels.active is not None:
        found = kernels.active.best(total, state.tie)
        return None if found < 0 else found
    most = total.max()
    if most < 0:
        return None
    ties = np.flatnonzero(total == most)
    return int(ties[0]) if len(ties) == 1 else int(ties[np.argmin(state.tie[ties])])


def policies_from(entry_points: Iterable[Any]) -> dict[str, Policy]:
    """Policies from installed entry points (each has `name` and `load()`), loaded by whoever owns the process. Raises `Invalid` for one without `score`."""
    found: dict[str, Policy] = {}
    for point in entry_points:
        made = point.load()
        policy = made() if isinstance(made, type) else made
        if not callable(getattr(policy, "score", None)):
            raise Invalid(f"policy {point.name}", "has no score(view)", "give an object or class with score(view) -> integers 0 to 100 per node, or None")
        found[point.name] = policy
    return found

