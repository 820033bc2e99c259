"""Documents as they are submitted, checked and read as the scheduler's model. Pure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.limits import MAX_WORKLOAD_BYTES, MAX_WORKLOADS
from edge_runtime.contract.schema import ID_PATTERN
from edge_runtime.contract.workloads import (
    CONVERTING,
    CONVERTS,
    ISOLATES,
    ISOLATION,
    ISOLATIONS,
    KINDS,
    MOVE,
    NAMESPACES,
    RESTART,
    STAY,
    WHEN_CUT_OFF,
    WHEN_DRAINED,
    conversion_bytes,
    may_move,
)

from ..scheduler import Invalid, Node, Workload, parse
from ..scheduler.batch import Forecast
from ..scheduler.model import Kind
from ..scheduler.parse import MAX_TIME_MS
from ..scheduler.units import MEMORY, SLOTS, quantity, whole

MAX_LIST = 1_000
"""Workloads of one request: it is one transaction, and its decisions are under a second."""

MAX_DOCUMENT_DEPTH = 10
"""Levels of one document: with those of desired state around it within what a message may have."""

RUNS = "novacron.runs/"
"""Prefix of the node labels that say which kinds of workload a node has a driver for; set by the hub alone."""

ISOLATED = (Kind.CONTAINER, Kind.BATCH)
"""Kinds that may say what stands between them and their node."""

HUB_KEYS = ("lost_after_ms", "spec", "when_late", WHEN_CUT_OFF, WHEN_DRAINED)
"""Keys of a workload's document that are not the scheduler's: when its node counts as lost, what the driver wants to know, whether a job that misses its deadline is taken, whether a site that is cut off may move it, what becomes of it while its node is drained."""

REFUSE, ACCEPT = "refuse", "accept"
"""Of a job that will miss its deadline: it is not taken, or it is taken for the earliest time that there is."""


class Conflict(ValueError):
    """What is asked contradicts what stands: field, problem, remedy."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field, self.problem, self.remedy = field, problem, remedy


class Missed(Conflict):
    """A deadline that is not promised.

    Attributes:
        workload: whose; of a gang the first.
        forecast: when and where it would run at the earliest, and by how much it would be late; None where that is not known.
    """

    def __init__(self, workload: str, problem: str, remedy: str, forecast: Forecast | None = None) -> None:
        super().__init__("workload.deadline_ms", f"{workload!r} {problem}", remedy)
        self.workload, self.forecast = workload, forecast


@dataclass(frozen=True, slots=True)
class Submitted:
    """One workload: the document, what the scheduler sees of it, and after how long of silence of its node it moves (ms; None: as the node's kind says). `over`: bytes of memory that the scheduler
    sets aside beside what the document requests."""

    document: dict[str, Any]
    item: Workload
    lost_after_ms: int | None = None
    when_late: str = REFUSE
    over: int = 0

    @property
    def moves(self) -> bool:
        """Whether the site of its node takes it over by itself: then its node's silence does not say that it runs nowhere."""
        return may_move(self.document)


def checked(value: Any, field: str) -> dict[str, Any]:
    """A document as the hub can keep and send it. Raises `Invalid`."""
    if not isinstance(value, dict):
        raise Invalid(field, f"is {type(value).__name__}, not an object", "send a JSON object")
    try:
        jsoncodec.check_tree(value, field, MAX_DOCUMENT_DEPTH)
        size = len(jsoncodec.encode(value))
        json.dumps(value, ensure_ascii=False).encode()
    except ContractError as error:
        raise Invalid(field, error.problem, error.remedy) from None
    except UnicodeEncodeError:
        raise Invalid(field, "holds half of a surrogate pair", "send whole characters") from None
    if size > MAX_WORKLOAD_BYTES:
        raise Invalid(field, f"{size} bytes are over {MAX_WORKLOAD_BYTES}", "keep what is large in the image")
    return value


def name_of(value: Any, field: str) -> str:
    """A name that may travel to edges. Raises `Invalid`."""
    if not isinstance(value, str) or not ID_PATTERN.match(value):
        raise Invalid(field, f"{str(value)[:80]!r} is not a name", "use 1 to 64 letters, digits, _ . : -, a letter or digit first")
    return value


def read_workload(value: Any, field: str = "workload") -> Submitted:
    """One workload. Raises `Invalid`."""
    document = checked(value, field)
    name_of(document.get("id"), f"{field}.id")
    lost = document.get("lost_after_ms")
    if not isinstance(document.get("spec", {}), dict):
        raise Invalid(f"{field}.spec", f"is {type(document['spec']).__name__}, not an object", "send what the driver wants to know as an object")
    item = parse.workload({key: part for key, part in document.items() if key not in HUB_KEYS}, field)
    for key, _ in item.shape.node_selector:
        if key.startswith(RUNS):
            raise Invalid(f"{field}.node_selector.{key}", "is the hub's own", "leave it out: the kind of the workload asks for it")
    asked = [(RUNS + item.shape.kind.value, "true")]
    isolation = document.get("spec", {}).get(ISOLATION, NAMESPACES)
    if isolation in ISOLATIONS[1:] and item.shape.kind in ISOLATED:
        asked.append((ISOLATES + isolation, "true"))
    requests, over = dict(item.shape.requests), _over(document, item, field)
    if over:
        asked.append((CONVERTING, "true"))
        requests[MEMORY] = requests.get(MEMORY, 0) + over
    shape = replace(item.shape, requests=tuple(sorted(requests.items())), node_selector=tuple(sorted({*item.shape.node_selector, *asked})))
    # A promise is broken by no priority, unless the document says so.
    item = replace(item, shape=shape, preemptible=item.preemptible and (item.deadline_ms is None or "preemptible" in document))
    when_late = document.get("when_late", REFUSE)
    if when_late not in (REFUSE, ACCEPT):
        raise Invalid(f"{field}.when_late", f"{str(when_late)[:40]!r} is unknown", f"use {REFUSE} or {ACCEPT}")
    return Submitted(document, item, None if lost is None else whole(lost, f"{field}.lost_after_ms", 1, MAX_TIME_MS), when_late, over)


def _over(document: Mapping[str, Any], item: Workload, field: str) -> int:
    """Bytes that one that can be converted needs beside its own: a guest's memory follows from the workload's limit. 0 where it cannot be, or does not say its limit (which `_check_converts` refuses)."""
    spec = document.get("spec", {})
    if spec.get(CONVERTS) is not True or item.shape.kind not in ISOLATED:
        return 0
    told = spec.get("limits")
    limit = quantity(MEMORY, told[MEMORY], f"{field}.spec.limits.memory") if isinstance(told, dict) and MEMORY in told else dict(item.shape.requests).get(MEMORY, 0)
    return conversion_bytes(limit) if limit else 0


def _check_cut_off(entry: Submitted, field: str) -> None:
    """What a workload needs that a site may move; only of what is submitted now. Raises `Invalid`."""
    if entry.document.get(WHEN_CUT_OFF, STAY) not in (STAY, MOVE):
        raise Invalid(f"{field}.{WHEN_CUT_OFF}", f"{str(entry.document[WHEN_CUT_OFF])[:40]!r} is unknown", f"use {STAY} or {MOVE}")
    if entry.moves and entry.item.shape.kind is not Kind.CONTAINER:
        raise Invalid(f"{field}.{WHEN_CUT_OFF}", f"a {entry.item.shape.kind.value} cannot be moved by its site", f"use kind container, or {STAY}")
    if entry.moves and entry.lost_after_ms is not None:
        raise Invalid(f"{field}.{WHEN_CUT_OFF}", "its site and the hub would both place it anew, each without the other", f"leave lost_after_ms out, or use {STAY}")
    if entry.moves and entry.item.shape.gpu is not None:
        raise Invalid(f"{field}.{WHEN_CUT_OFF}", "GPU devices are given by the hub alone", f"ask for no gpu, or use {STAY}")


def _check_drained(entry: Submitted, field: str) -> None:
    """What it wants of a drain; only of what is submitted now. Raises `Invalid`."""
    wish = entry.document.get(WHEN_DRAINED)
    if wish is not None and wish not in (MOVE, RESTART, STAY):
        raise Invalid(f"{field}.{WHEN_DRAINED}", f"{str(wish)[:40]!r} is unknown", f"use {MOVE}, {RESTART} or {STAY}, or leave it out")
    if wish == MOVE and entry.item.shape.kind not in (*ISOLATED, Kind.VM):
        raise Invalid(f"{field}.{WHEN_DRAINED}", f"a {entry.item.shape.kind.value} cannot be moved with its state", f"use {RESTART} or {STAY}, or leave it out")


def _check_isolation(entry: Submitted, field: str) -> None:
    """What stands between it and its node; only of what is submitted now. Raises `Invalid`."""
    spec = entry.document.get("spec", {})
    if ISOLATION not in spec:
        return
    if entry.item.shape.kind not in ISOLATED:
        raise Invalid(f"{field}.spec.{ISOLATION}", f"is not for a {entry.item.shape.kind.value}", "use kind container or batch, or leave it out")
    if spec[ISOLATION] not in ISOLATIONS:
        raise Invalid(f"{field}.spec.{ISOLATION}", f"{str(spec[ISOLATION])[:40]!r} is unknown", f"use one of {', '.join(ISOLATIONS)}")


def _check_converts(entry: Submitted, field: str) -> None:
    """What a workload needs that can be converted; only of what is submitted now. Raises `Invalid`."""
    spec = entry.document.get("spec", {})
    wanted = spec.get(CONVERTS, False)
    if not isinstance(wanted, bool):
        raise Invalid(f"{field}.spec.{CONVERTS}", f"{str(wanted)[:40]!r} is neither true nor false", "say true or false")
    if not wanted:
        return
    if entry.item.shape.kind not in ISOLATED:
        raise Invalid(f"{field}.spec.{CONVERTS}", f"is not for a {entry.item.shape.kind.value}", "use kind container or batch, or leave it out")
    if spec.get(ISOLATION, NAMESPACES) != NAMESPACES:
        raise Invalid(f"{field}.spec.{ISOLATION}", "what can be converted begins as a container", f"leave it out, and convert the workload when it runs, or leave {CONVERTS} out")
    if spec.get("checkpoint") is not None:
        raise Invalid(f"{field}.spec.checkpoint", "of what can be converted no checkpoints are taken", f"leave it out, or leave {CONVERTS} out")
    if entry.moves:
        raise Invalid(f"{field}.{WHEN_CUT_OFF}", "what can be converted cannot be moved by its site", f"use {STAY}, or leave {CONVERTS} out")
    if not entry.over:
        raise Invalid(f"{field}.requests.memory", f"is missing: how large the guest of a workload is that {CONVERTS} follows from it", "say how much memory it may use")


def _check_times(entry: Submitted, field: str) -> None:
    """What a deadline needs; only of what is submitted now: older rows may stand otherwise. Raises `Invalid`."""
    if entry.item.deadline_ms is None:
        if "when_late" in entry.document:
            raise Invalid(f"{field}.when_late", "says what becomes of a missed deadline, and there is none", "give deadline_ms, or leave it out")
    elif entry.item.shape.kind is not Kind.BATCH:
        raise Invalid(f"{field}.deadline_ms", f"a {entry.item.shape.kind.value} does not end by itself", "use kind batch, or leave it out")
    elif entry.item.duration_ms is None:
        raise Invalid(f"{field}.duration_ms", "is missing: a deadline cannot be promised without it", "give an estimate in ms")


def read_list(value: Any) -> list[Submitted]:
    """What a request submits: one workload, or a list of them. Raises `Invalid`; nothing of a list counts where one is wrong."""
    several = isinstance(value, list)
    values: Sequence[Any] = value if several else [value]
    if not values or len(values) > MAX_LIST:
        raise Invalid("body", f"has {len(values)} workloads", f"send 1 to {MAX_LIST}")
    found = [read_workload(entry, f"workloads[{index}]" if several else "workload") for index, entry in enumerate(values)]
    seen: set[str] = set()
    for index, entry in enumerate(found):
        _check_times(entry, f"workloads[{index}]" if several else "workload")
        _check_isolation(entry, f"workloads[{index}]" if several else "workload")
        _check_converts(entry, f"workloads[{index}]" if several else "workload")
        _check_cut_off(entry, f"workloads[{index}]" if several else "workload")
        _check_drained(entry, f"workloads[{index}]" if several else "workload")
        if entry.item.id in seen:
            raise Invalid(f"workloads[{index}].id", f"{entry.item.id!r} stands twice", "give each workload its own id")
        seen.add(entry.item.id)
    return found


def read_node(value: Any, name: str, *, agent: bool = False) -> tuple[dict[str, Any], Node]:
    """A node's document, and the node; `runs` (all kinds where it is missing) become labels. Raises `Invalid`.

    Args:
        agent: an agent told it: it watches no more workloads than one desired state holds.
    """
    document = {**checked(value, "node"), "name": name}
    if value.get("name", name) != name:
        raise Invalid("node.name", f"{str(value['name'])[:64]!r} is not {name!r}", "leave it out")
    runs = document.get("runs", list(KINDS))
    if not isinstance(runs, list) or any(kind not in KINDS for kind in runs):
        raise Invalid("node.runs", f"{str(runs)[:80]} is not a list of workload kinds", f"use some of {', '.join(KINDS)}")
    node = parse.node({key: part for key, part in document.items() if key != "runs"})
    for key, _ in node.labels:
        if key.startswith(RUNS):
            raise Invalid(f"node.labels.{key}", "is the hub's own", "list the kind in `runs`")
    labels = tuple(sorted((*node.labels, *((RUNS + kind, "true") for kind in set(runs)))))
    capacity = dict(node.capacity)
    if agent:
        capacity[SLOTS] = min(MAX_WORKLOADS, capacity.get(SLOTS, MAX_WORKLOADS))
    return document, replace(node, labels=labels, capacity=tuple(sorted(capacity.items())))


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first key in which two documents differ; empty where they are the same."""
    # As text, since to Python 1, 1.0 and true are equal.
    return next((key for key in sorted({*old, *new}) if (key in old) != (key in new) or _text(old[key]) != _text(new[key])), "")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
