"""From JSON-like mappings to the model, refusing what cannot be with one clear error each (`Invalid`: field, problem, remedy)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, TypeVar

from .model import (
    GPU_MILLI,
    HOST,
    LABEL_VALUE,
    MAX_PRIORITY,
    TOPOLOGY_KEYS,
    Budget,
    Effect,
    GpuDevice,
    GpuRequest,
    Kind,
    Link,
    Node,
    NodeKind,
    NodeTerm,
    Numa,
    Op,
    PeerTerm,
    PreferredNode,
    PreferredPeer,
    Quota,
    Requirement,
    Selector,
    Shape,
    Spread,
    Taint,
    Toleration,
    Workload,
    integer,
)
from .units import GPU_WHOLE, MAX_GPUS_PER_NODE, MAX_NAME, Invalid, quantities, quantity, whole

MAX_ITEMS = 64
"""Entries of any one list in a workload or node: each costs work per decision."""

MAX_NUMA_ZONES = 8
"""NUMA zones of one node: two sockets in four domains each."""

MAX_WEIGHT = 100
"""Weight of a preference or policy."""

MAX_GANG = 4096
"""Members of a gang."""

MAX_TIME_MS = 1 << 53
"""Times and durations fit a float64 exactly."""

E = TypeVar("E", bound=StrEnum)
T = TypeVar("T")


def _mapping(value: Any, field: str, known: Iterable[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or any(not isinstance(key, str) for key in value):
        raise Invalid(field, "is not a mapping with string keys", "give an object")
    if known is not None:
        allowed = tuple(known)
        for key in value:
            if key not in allowed:
                raise Invalid(f"{field}.{key}"[:MAX_NAME], "is not known here", f"use {', '.join(allowed)}")
    return value


def _list(value: Any, field: str, most: int = MAX_ITEMS) -> Sequence[Any]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise Invalid(field, "is not a list", "give a list")
    if len(value) > most:
        raise Invalid(field, f"has {len(value)} entries", f"give at most {most}")
    return value


def _each(value: Any, field: str, parse: Callable[[Any, str], T], most: int = MAX_ITEMS) -> tuple[T, ...]:
    return tuple(parse(item, f"{field}[{index}]") for index, item in enumerate(_list(value, field, most)))


def _text(value: Any, field: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME or not (value or empty) or "\0" in value:
        raise Invalid(field, f"{str(value)[:40]!r} is not a name", f"give a string of {0 if empty else 1} to {MAX_NAME} characters")
    return value


def _flag(value: Any, field: str) -> bool:
    if not isinstance(value, bool):
        raise Invalid(field, f"{value!r} is not true or false", "give true or false")
    return value


def _choice(kind: type[E], value: Any, field: str) -> E:
    try:
        return kind(value)
    except ValueError:
        raise Invalid(field, f"{str(value)[:40]!r} is unknown", f"use one of {', '.join(kind)}") from None


def labels(value: Any, field: str) -> dict[str, str]:
    """A label set. Raises `Invalid`."""
    result = {}
    for key, text in _mapping(value, field).items():
        _text(key, field)
        if not isinstance(text, str) or not LABEL_VALUE.match(text):
            raise Invalid(f"{field}.{key}", f"{str(text)[:70]!r} is not a label value", "use at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends")
        result[key] = text
    if len(result) > MAX_ITEMS:
        raise Invalid(field, f"has {len(result)} labels", f"give at most {MAX_ITEMS}")
    return result


def requirement(value: Any, field: str) -> Requirement:
    """One comparison `{key, op, values}`. Raises `Invalid`."""
    value = _mapping(value, field, ("key", "op", "values"))
    op = _choice(Op, value.get("op"), f"{field}.op")
    values = _each(value.get("values", ()), f"{field}.values", lambda text, where: _text(text, where, empty=True))
    if op in (Op.IN, Op.NOT_IN) and not values:
        raise Invalid(f"{field}.values", f"is empty, but {op} needs values", "list at least one value")
    if op in (Op.EXISTS, Op.DOES_NOT_EXIST) and values:
        raise Invalid(f"{field}.values", f"is not empty, but {op} takes none", "leave it out")
    if op in (Op.GT, Op.LT) and (len(values) != 1 or integer(values[0]) is None):
        raise Invalid(f"{field}.values", f"is not one integer, but {op} compares numbers", "give exactly one integer as a string")
    for index, text in enumerate(values):
        if op in (Op.IN, Op.NOT_IN) and not LABEL_VALUE.match(text):
            raise Invalid(f"{field}.values[{index}]", f"{text[:70]!r} can be no label's value", "use at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends")
    return Requirement(_text(value.get("key"), f"{field}.key"), op, values)


def selector(value: Any, field: str) -> Selector:
    """`{labels: {..}, requirements: [..]}`; empty selects everything. Raises `Invalid`."""
    value = _mapping(value, field, ("labels", "requirements"))
    equal = tuple(Requirement(key, Op.IN, (text,)) for key, text in sorted(labels(value.get("labels", {}), f"{field}.labels").items()))
    return Selector(equal + _each(value.get("requirements", ()), f"{field}.requirements", requirement))


def node_term(value: Any, field: str) -> NodeTerm:
    """`{labels: [..], names: [..]}` of requirements. Raises `Invalid`."""
    value = _mapping(value, field, ("labels", "names"))
    names = _each(value.get("names", ()), f"{field}.names", lambda item, where: requirement({"key": HOST, **_mapping(item, where)}, where))
    return NodeTerm(_each(value.get("labels", ()), f"{field}.labels", requirement), names)


def _preferred_node(value: Any, field: str) -> PreferredNode:
    value = _mapping(value, field, ("weight", "term"))
    return PreferredNode(whole(value.get("weight"), f"{field}.weight", 1, MAX_WEIGHT), node_term(value.get("term"), f"{field}.term"))


def _peer_term(namespace: str) -> Callable[[Any, str], PeerTerm]:
    def parse(value: Any, field: str) -> PeerTerm:
        value = _mapping(value, field, ("selector", "topology_key", "namespaces", "namespace_selector"))
        spaces = tuple(sorted(set(_each(value.get("namespaces", ()), f"{field}.namespaces", lambda text, where: _text(text, where, empty=True)))))
        chosen = value.get("namespace_selector")
        picked = value.get("selector")
        return PeerTerm(
            None if picked is None else selector(picked, f"{field}.selector"), _text(value.get("topology_key"), f"{field}.topology_key"),
            spaces if spaces or chosen is not None else (namespace,), None if chosen is None else selector(chosen, f"{field}.namespace_selector"),
        )

    return parse


def _preferred_peer(namespace: str) -> Callable[[Any, str], PreferredPeer]:
    def parse(value: Any, field: str) -> PreferredPeer:
        value = _mapping(value, field, ("weight", "term"))
        weight = whole(value.get("weight"), f"{field}.weight", -MAX_WEIGHT, MAX_WEIGHT)
        return PreferredPeer(weight, _peer_term(namespace)(value.get("term"), f"{field}.term"))

    return parse


def _taint(value: Any, field: str) -> Taint:
    value = _mapping(value, field, ("key", "value", "effect"))
    return Taint(_text(value.get("key"), f"{field}.key"), _text(value.get("value", ""), f"{field}.value", empty=True), _choice(Effect, value.get("effect"), f"{field}.effect"))


def _toleration(value: Any, field: str) -> Toleration:
    value = _mapping(value, field, ("key", "value", "effect", "for_ms"))
    key, text, effect, for_ms = _text(value.get("key", ""), f"{field}.key", empty=True), value.get("value"), value.get("effect"), value.get("for_ms")
    if not key and text is not None:
        raise Invalid(f"{field}.key", "is empty, but a value is given", "name the key, or leave out the value to tolerate every taint")
    return Toleration(
        key, None if text is None else _text(text, f"{field}.value", empty=True), None if effect is None else _choice(Effect, effect, f"{field}.effect"),
        None if for_ms is None else whole(for_ms, f"{field}.for_ms", 0, MAX_TIME_MS),
    )


def _spread(value: Any, field: str) -> Spread:
    value = _mapping(value, field, ("max_skew", "topology_key", "selector", "hard", "min_domains", "needs_key"))
    picked = value.get("selector")
    return Spread(
        whole(value.get("max_skew", 1), f"{field}.max_skew", 1), _text(value.get("topology_key"), f"{field}.topology_key"),
        None if picked is None else selector(picked, f"{field}.selector"), _flag(value.get("hard", True), f"{field}.hard"),
        whole(value.get("min_domains", 1), f"{field}.min_domains", 1), _flag(value.get("needs_key", True), f"{field}.needs_key"),
    )


def _gpu(value: Any, field: str) -> GpuRequest:
    value = _mapping(value, field, ("count", "milli", "memory", "models"))
    count = whole(value.get("count", 1), f"{field}.count", 1)
    if count > MAX_GPUS_PER_NODE:
        raise Invalid(f"{field}.count", f"{count} devices: no node can have them", f"ask for at most {MAX_GPUS_PER_NODE}, or split the workload into a gang")
    milli = whole(value.get("milli", GPU_WHOLE), f"{field}.milli", 1, GPU_WHOLE)
    if count > 1 and milli != GPU_WHOLE:
        raise Invalid(f"{field}.milli", f"{milli} of each of {count} devices", f"ask for whole devices ({GPU_WHOLE}), or for a part of one")
    models = _each(value.get("models", ()), f"{field}.models", _text)
    return GpuRequest(count, milli, quantity("memory", value.get("memory", 0), f"{field}.memory"), tuple(sorted(set(models))))


def _link(value: Any, field: str) -> Link:
    value = _mapping(value, field, ("site", "max_rtt_us", "min_kbps"))
    return Link(_text(value.get("site"), f"{field}.site"), whole(value.get("max_rtt_us", 0), f"{field}.max_rtt_us"), whole(value.get("min_kbps", 0), f"{field}.min_kbps"))


_SHAPE = (
    "kind", "namespace", "labels", "requests", "gpu", "node_selector", "node_affinity", "affinity", "anti_affinity", "preferred_peers", "tolerations", "spread", "numa",
    "residency", "node_kinds", "links", "image", "weights",
)
_WORKLOAD = (*_SHAPE, "id", "priority", "preemptible", "preempts", "migratable", "state_bytes", "tenant", "gang", "duration_ms", "deadline_ms")


def shape(value: Any, field: str = "workload") -> Shape:
    """What decides the place; ignores the keys that belong to the single workload. Raises `Invalid`."""
    value = _mapping(value, field, _WORKLOAD)
    namespace = _text(value.get("namespace", "default"), f"{field}.namespace", empty=True)
    asked = quantities(value.get("requests", {}), f"{field}.requests")
    if "slots" in asked:
        raise Invalid(f"{field}.requests.slots", "cannot be requested", "leave it out: every workload takes one")
    affinity = _mapping(value.get("node_affinity", {}), f"{field}.node_affinity", ("required", "preferred"))
    required = affinity.get("required")
    numa = value.get("numa", "any")
    if numa not in ("any", "single"):
        raise Invalid(f"{field}.numa", f"{str(numa)[:40]!r} is unknown", "use 'any' or 'single'")
    weights = _mapping(value.get("weights", {}), f"{field}.weights")
    gpu = value.get("gpu")
    peer = _peer_term(namespace)
    return Shape(
        kind=_choice(Kind, value.get("kind", "container"), f"{field}.kind"), namespace=namespace, labels=tuple(sorted(labels(value.get("labels", {}), f"{field}.labels").items())),
        requests=tuple(sorted((name, amount) for name, amount in asked.items())), gpu=None if gpu is None else _gpu(gpu, f"{field}.gpu"),
        node_selector=tuple(sorted(labels(value.get("node_selector", {}), f"{field}.node_selector").items())),
        node_terms=None if required is None else _each(required, f"{field}.node_affinity.required", node_term),
        preferred_nodes=_each(affinity.get("preferred", ()), f"{field}.node_affinity.preferred", _preferred_node),
        affinity=_each(value.get("affinity", ()), f"{field}.affinity", peer), anti_affinity=_each(value.get("anti_affinity", ()), f"{field}.anti_affinity", peer),
        preferred_peers=_each(value.get("preferred_peers", ()), f"{field}.preferred_peers", _preferred_peer(namespace)),
        tolerations=_each(value.get("tolerations", ()), f"{field}.tolerations", _toleration), spread=_each(value.get("spread", ()), f"{field}.spread", _spread),
        numa_single=numa == "single", residency=_each(value.get("residency", ()), f"{field}.residency", _text),
        node_kinds=_each(value.get("node_kinds", ()), f"{field}.node_kinds", lambda item, where: _choice(NodeKind, item, where)),
        links=_each(value.get("links", ()), f"{field}.links", _link), image=_text(value.get("image", ""), f"{field}.image", empty=True),
        weights=tuple(sorted((_text(name, f"{field}.weights"), whole(weight, f"{field}.weights.{name}", 0, MAX_WEIGHT)) for name, weight in weights.items())),
    )


def workload(value: Any, field: str = "workload") -> Workload:
    """One workload. Raises `Invalid`."""
    value = _mapping(value, field, _WORKLOAD)
    gang = _mapping(value.get("gang", {}), f"{field}.gang", ("id", "size"))
    duration, deadline = value.get("duration_ms"), value.get("deadline_ms")
    kind = shape(value, field)
    return Workload(
        id=_text(value.get("id"), f"{field}.id"), shape=kind, priority=whole(value.get("priority", 0), f"{field}.priority", -MAX_PRIORITY, MAX_PRIORITY),
        preemptible=_flag(value.get("preemptible", True), f"{field}.preemptible"), preempts=_flag(value.get("preempts", True), f"{field}.preempts"),
        migratable=_flag(value.get("migratable", kind.kind is Kind.VM), f"{field}.migratable"), state_bytes=quantity("memory", value.get("state_bytes", 0), f"{field}.state_bytes"),
        tenant=_text(value.get("tenant", ""), f"{field}.tenant", empty=True), gang=_text(gang["id"], f"{field}.gang.id") if gang else "",
        gang_size=whole(gang.get("size"), f"{field}.gang.size", 1, MAX_GANG) if gang else 0,
        duration_ms=None if duration is None else whole(duration, f"{field}.duration_ms", 1, MAX_TIME_MS),
        deadline_ms=None if deadline is None else whole(deadline, f"{field}.deadline_ms", 0, MAX_TIME_MS),
    )


def _gpus(value: Any, field: str) -> tuple[GpuDevice, ...]:
    devices: list[GpuDevice] = []
    for index, item in enumerate(_list(value, field)):
        where = f"{field}[{index}]"
        item = _mapping(item, where, ("model", "memory", "count"))
        device = GpuDevice(_text(item.get("model"), f"{where}.model"), quantity("memory", item.get("memory", 0), f"{where}.memory"))
        devices += [device] * whole(item.get("count", 1), f"{where}.count", 1, MAX_GPUS_PER_NODE)
    if len(devices) > MAX_GPUS_PER_NODE:
        raise Invalid(field, f"{len(devices)} devices", f"give at most {MAX_GPUS_PER_NODE} per node")
    return tuple(devices)


def _numa(value: Any, field: str) -> Numa:
    value = _mapping(value, field, ("cpu", "memory"))
    return Numa(quantity("cpu", value.get("cpu", 0), f"{field}.cpu"), quantity("memory", value.get("memory", 0), f"{field}.memory"))


_NODE = (
    "name", "kind", "capacity", "gpus", "numa", "labels", "taints", "region", "zone", "site", "rack", "location", "price", "idle_mw", "busy_mw", "unschedulable", "images",
)


def node(value: Any, field: str = "node") -> Node:
    """One node; `region`, `zone`, `site`, `rack` and its name become labels. Raises `Invalid`."""
    value = _mapping(value, field, _NODE)
    name = _text(value.get("name"), f"{field}.name")
    tags = labels(value.get("labels", {}), f"{field}.labels")
    for key in TOPOLOGY_KEYS:
        text = name if key == HOST else value.get(key)
        if text is not None:
            if tags.get(key, text) != text:
                raise Invalid(f"{field}.labels.{key}", f"{tags[key]!r} contradicts {field}.{'name' if key == HOST else key} {str(text)[:40]!r}", "leave one of them out")
            tags[key] = _text(text, f"{field}.{key}")
    location = value.get("location")
    if location is not None:
        pair = _list(location, f"{field}.location", 2)
        if len(pair) != 2 or any(isinstance(item, bool) or not isinstance(item, int | float) for item in pair) or not (-90 <= pair[0] <= 90 and -180 <= pair[1] <= 180):
            raise Invalid(f"{field}.location", f"{list(pair)!r} is no place on earth", "give [latitude, longitude] in degrees")
        location = (float(pair[0]), float(pair[1]))
    capacity = quantities(value.get("capacity", {}), f"{field}.capacity")
    numa = _each(value.get("numa", ()), f"{field}.numa", _numa, MAX_NUMA_ZONES)
    for resource in ("cpu", "memory") if numa else ():
        total = sum(getattr(zone, resource) for zone in numa)
        if total != capacity.get(resource, 0):
            raise Invalid(f"{field}.numa", f"zones have {total} of {resource}, the node {capacity.get(resource, 0)}", "let the zones add up to the capacity")
    return Node(
        name=name, kind=_choice(NodeKind, value.get("kind", "cloud"), f"{field}.kind"), capacity=tuple(sorted(capacity.items())), gpus=_gpus(value.get("gpus", ()), f"{field}.gpus"),
        numa=numa, labels=tuple(sorted(tags.items())), taints=_each(value.get("taints", ()), f"{field}.taints", _taint), location=location,
        price=whole(value.get("price", 0), f"{field}.price"), idle_mw=whole(value.get("idle_mw", 0), f"{field}.idle_mw"), busy_mw=whole(value.get("busy_mw", 0), f"{field}.busy_mw"),
        unschedulable=_flag(value.get("unschedulable", False), f"{field}.unschedulable"), images=_each(value.get("images", ()), f"{field}.images", _text, 1024),
    )


def budget(value: Any, field: str = "budget") -> Budget:
    """One disruption budget. Raises `Invalid`."""
    value = _mapping(value, field, ("name", "namespace", "selector", "allowed", "disrupted"))
    return Budget(
        _text(value.get("name"), f"{field}.name"), _text(value.get("namespace", "default"), f"{field}.namespace", empty=True), selector(value.get("selector", {}), f"{field}.selector"),
        whole(value.get("allowed", 0), f"{field}.allowed", -MAX_PRIORITY), _each(value.get("disrupted", ()), f"{field}.disrupted", _text, 4096),
    )


def _limits(value: Any, field: str) -> tuple[tuple[str, int], ...]:
    value = _mapping(value, field)
    found = quantities({name: amount for name, amount in value.items() if name != GPU_MILLI}, field)
    if GPU_MILLI in value:
        found[GPU_MILLI] = whole(value[GPU_MILLI], f"{field}.{GPU_MILLI}")
    return tuple(sorted(found.items()))


def quota(value: Any, field: str = "quota") -> Quota:
    """One tenant's quota. Raises `Invalid`."""
    value = _mapping(value, field, ("tenant", "nominal", "cohort", "borrow", "weight"))
    return Quota(
        _text(value.get("tenant"), f"{field}.tenant"), _limits(value.get("nominal", {}), f"{field}.nominal"), _text(value.get("cohort", ""), f"{field}.cohort", empty=True),
        _limits(value.get("borrow", {}), f"{field}.borrow"), whole(value.get("weight", 1), f"{field}.weight", 1, 1_000_000),
    )


def peer_matches(term: PeerTerm, other: Shape, namespaces: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether workloads of shape `other` are what the term speaks of. `namespaces`: the labels of each namespace."""
    if term.selector is None:
        return False
    if other.namespace not in term.namespaces and (term.namespace_selector is None or not term.namespace_selector.matches(dict(namespaces.get(other.namespace, {})))):
        return False
    return term.selector.matches(dict(other.labels))


def refuse_cycles(batch: Sequence[Workload], live: Iterable[Shape] = (), namespaces: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Refuse a batch in which workloads wait for each other's affinity in a circle. `live`: shapes that run already. Raises `Invalid` naming the circle."""
    spaces = namespaces or {}
    there = list(live)
    waiting = list(batch)
    while True:
        ready = [
            item for item in waiting
            if all(peer_matches(term, item.shape, spaces) or any(peer_matches(term, other, spaces) for other in there) for term in item.shape.affinity)
        ]
        if not ready:
            break
        there += [item.shape for item in ready]
        done = {id(item) for item in ready}
        waiting = [item for item in waiting if id(item) not in done]
    for start in waiting:
        path, at = [start], start
        while True:
            ahead = next((other for other in waiting for term in at.shape.affinity if peer_matches(term, other.shape, spaces)), None)
            if ahead is None:
                break
            if ahead in path:
                circle = [*path[path.index(ahead):], ahead]
                raise Invalid("workload.affinity", f"is a circle: {' -> '.join(item.id for item in circle)}", "let one of them go without, or match itself")
            path.append(ahead)
            at = ahead
