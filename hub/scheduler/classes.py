"""Equivalence classes: what is the same for all workloads of one shape is worked out once.

Affinity, anti-affinity and spread are answered from *counter rows*: per row an integer per node, moved by a placement through `bumps`, read through the `reads_*`
of the class that is being placed. No decision ever looks at the single workloads.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .attributes import UNSCHEDULABLE_TAINT, Attributes
from .model import Effect, Op, PeerTerm, Selector, Shape
from .parse import peer_matches
from .reasons import Bits, Bools, Fail, Ints
from .units import BASE_RESOURCES, CPU, MEMORY, SLOTS

CPU_ROW, MEMORY_ROW, SLOTS_ROW = (BASE_RESOURCES.index(name) for name in (CPU, MEMORY, SLOTS))


class RowKey(NamedTuple):
    """What a counter row counts.

    `match`: workloads that all `terms` speak of. `spread`: workloads of a namespace that a selector selects and that are not on their way out.
    `anti`, `need`, `like`: workloads that carry the term as anti-affinity, affinity or preference (the last summed by weight).
    """

    what: str
    terms: tuple[PeerTerm, ...] = ()
    namespace: str = ""
    selector: Selector | None = None


@dataclass(frozen=True, slots=True)
class Klass:
    """One shape and what follows from it. Never changed in place: a state replaces it, so snapshots may share it."""

    id: int
    shape: Shape
    resources: Ints
    """Rows of the capacity arrays that the shape asks for."""
    amounts: Ints
    """[resource, 1]: how much of each."""
    request: Ints
    """[all resources] for the bookkeeping."""
    weighed: Ints
    """Rows that balance and packing look at: CPU, memory and what is asked for, but slots."""
    ignores_cordon: bool
    no_execute: bool
    """Whether some NoExecute taint could chase it (it does not tolerate all)."""
    bumps: tuple[tuple[int, int], ...] = ()
    """(row, change) of one placement."""
    spread_bumps: tuple[tuple[int, int], ...] = ()
    """Those among the bumps that end when the workload is on its way out."""
    affinity: tuple[int, tuple[str, ...], bool] | None = None
    """Row of the workloads that all affinity terms speak of, the topology keys, whether it matches itself."""
    anti: tuple[tuple[int, str], ...] = ()
    excluded_by: tuple[tuple[int, str], ...] = ()
    needed_by: tuple[tuple[int, str], ...] = ()
    liked_by: tuple[tuple[int, str], ...] = ()
    likes: tuple[tuple[int, str, int], ...] = ()
    spread_rows: tuple[int, ...] = ()
    """One per spread constraint of the shape."""
    spread_self: tuple[int, ...] = ()
    facts: "Facts | None" = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the nodes' descriptions say to a shape; stale when the version of the attributes moves on."""

    version: int
    fails: Bits
    affine: Bools
    preferred: Ints
    disliked: Ints
    any_disliked: bool
    cost: npt.NDArray[np.float64]
    """The price of what one workload takes of each node: price times its largest share of a resource."""
    work: npt.NDArray[np.float64]
    """The power that its work adds to each node: its share of the CPUs of what the node takes when busy above idle."""
    any_price: bool
    any_power: bool
    gpu_nodes: Ints
    """Nodes with enough devices of a wanted model."""
    devices: Bools
    """[gpu node, device] whether the device is of a wanted model."""


def facts(attributes: Attributes, klass: "Klass", cap: Ints, gpu_model: "npt.NDArray[np.int16]", price: Ints, power: Ints) -> Facts:
    """Work them out: O(nodes) per requirement. `cap` is [resource, node], `gpu_model` [node, device]."""
    shape = klass.shape
    affine, disliked = attributes.affine(shape), attributes.disliked(shape)
    share = (klass.amounts / np.maximum(cap[klass.resources], 1)).max(0, initial=0)  # a shape may ask for nothing but a device
    cpu_share = np.minimum(klass.request[0] / np.maximum(cap[0], 1), 1.0)
    fails, nodes, devices = attributes.fails(shape, affine), np.empty(0, np.int64), np.empty((0, gpu_model.shape[1]), np.bool_)
    if shape.gpu is not None:
        nodes = np.flatnonzero(fails & np.uint32(Fail.GPU_MODEL) == 0)
        models = [attributes.models[model] for model in shape.gpu.models if model in attributes.models]
        devices = np.isin(gpu_model[nodes], models) if shape.gpu.models else gpu_model[nodes] >= 0
    return Facts(attributes.version, fails, affine, attributes.preferred(shape), disliked, bool(disliked.any()), price * share,
                 (power[1] - power[0]) * cpu_share, bool(price.any()), bool(power.any()), nodes, devices)


def delta(key: RowKey, shape: Shape, namespaces: Mapping[str, Mapping[str, str]]) -> int:
    """How a placement of `shape` moves the row."""
    if key.what == "match":
        return int(all(peer_matches(term, shape, namespaces) for term in key.terms))
    if key.what == "spread":
        return int(key.selector is not None and shape.namespace == key.namespace and key.selector.matches(dict(shape.labels)))
    if key.what == "anti":
        return shape.anti_affinity.count(key.terms[0])
    if key.what == "need":
        return shape.affinity.count(key.terms[0])
    return sum(item.weight for item in shape.preferred_peers if item.term == key.terms[0])


def keys_of(shape: Shape) -> list[RowKey]:
    """The rows that the shape needs, for reading or for being read by others."""
    keys = []
    if shape.affinity:
        keys.append(RowKey("match", shape.affinity))
    keys += [RowKey("match", (term,)) for term in shape.anti_affinity]
    keys += [RowKey("anti", (term,)) for term in shape.anti_affinity]
    keys += [RowKey("need", (term,)) for term in shape.affinity]
    for item in shape.preferred_peers:
        keys += [RowKey("match", (item.term,)), RowKey("like", (item.term,))]
    keys += [spread_key(shape, item.selector) for item in shape.spread]
    return list(dict.fromkeys(keys))


def spread_key(shape: Shape, selector: Selector | None) -> RowKey:
    """The row of one spread constraint."""
    return RowKey("spread", (), shape.namespace, selector)


def hook(key: RowKey) -> tuple[tuple[str, str], ...] | None:
    """Labels of which a shape must have one to be selected by the row; None where its selector asks for no particular value."""
    selector = key.terms[0].selector if key.terms else key.selector
    if selector is None:
        return ()
    return next((tuple((item.key, value) for value in item.values) for item in selector.requirements if item.op is Op.IN), None)


def connect(klass: Klass, rows: Mapping[RowKey, int], among: Iterable[RowKey], namespaces: Mapping[str, Mapping[str, str]], *, anew: bool) -> Klass:
    """The class wired to the rows `among`: to these alone (`anew`), or to these beside those that it knows."""
    shape = klass.shape
    bumps, spread_bumps = list(klass.bumps), list(klass.spread_bumps)
    excluded, needed, liked = list(klass.excluded_by), list(klass.needed_by), list(klass.liked_by)
    if anew:
        for kept in (bumps, spread_bumps, excluded, needed, liked):
            kept.clear()
    for key in among:
        row = rows[key]
        change = delta(key, shape, namespaces)
        if change:
            bumps.append((row, change))
            if key.what == "spread":
                spread_bumps.append((row, change))
        if key.what in ("anti", "need", "like") and peer_matches(key.terms[0], shape, namespaces):
            {"anti": excluded, "need": needed, "like": liked}[key.what].append((row, key.terms[0].topology_key))
    if not anew and len(bumps) == len(klass.bumps) and (len(excluded), len(needed), len(liked)) == (len(klass.excluded_by), len(klass.needed_by), len(klass.liked_by)):
        return klass
    return replace(
        klass, bumps=tuple(bumps), spread_bumps=tuple(spread_bumps), excluded_by=tuple(excluded), needed_by=tuple(needed), liked_by=tuple(liked),
        affinity=(rows[RowKey("match", shape.affinity)], tuple(term.topology_key for term in shape.affinity),
                  all(peer_matches(term, shape, namespaces) for term in shape.affinity)) if shape.affinity else None,
        anti=tuple((rows[RowKey("match", (term,))], term.topology_key) for term in shape.anti_affinity),
        likes=tuple((rows[RowKey("match", (item.term,))], item.term.topology_key, item.weight) for item in shape.preferred_peers),
        spread_rows=tuple(rows[spread_key(shape, item.selector)] for item in shape.spread),
        spread_self=tuple(int(item.selector is not None and item.selector.matches(dict(shape.labels))) for item in shape.spread),
    )


def new(number: int, shape: Shape, resource_rows: Mapping[str, int]) -> Klass:
    """A class without rows yet. Every resource of the shape must have its row."""
    asked = {name: amount for name, amount in shape.request_map.items() if amount}
    resources = np.array(sorted(resource_rows[name] for name in asked), np.int64)
    request = np.zeros(len(resource_rows), np.int64)
    for name, amount in asked.items():
        request[resource_rows[name]] = amount
    return Klass(
        number, shape, resources, request[resources][:, None], request, np.array([CPU_ROW, MEMORY_ROW, *(row for row in resources.tolist() if row > MEMORY_ROW and row != SLOTS_ROW)], np.int64),
        any(item.tolerates(UNSCHEDULABLE_TAINT) for item in shape.tolerations),
        not any(not item.key and item.value is None and item.effect in (None, Effect.NO_EXECUTE) and item.for_ms is None for item in shape.tolerations),
    )
