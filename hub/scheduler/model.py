"""What is placed and where: nodes and workloads as immutable values. `parse.py` makes them from JSON; nothing here looks at a clock or a network."""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from .units import GPU_WHOLE, SLOTS

MAX_PRIORITY = 2_000_000_000
"""Priorities lie between plus and minus this, as kube's do."""

LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?\Z")
"""What a label value may be: at most 63 characters (kube's rule)."""

HOST = "host"
"""Topology key that every node has: its own name."""

REGION, ZONE, SITE, RACK = "region", "zone", "site", "rack"

TOPOLOGY_KEYS = (REGION, ZONE, SITE, RACK, HOST)
"""From wide to narrow; each is a label of the node where it is given."""


class Kind(StrEnum):
    """What a workload is; it chooses the default weights and what may be done to it."""

    VM = "vm"
    CONTAINER = "container"
    FUNCTION = "function"
    BATCH = "batch"


class NodeKind(StrEnum):
    """What a node is."""

    CLOUD = "cloud"
    EDGE = "edge"
    HYBRID = "hybrid"
    GPU = "gpu"
    STORAGE = "storage"


class Effect(StrEnum):
    """What a taint does to a workload that does not tolerate it."""

    NO_SCHEDULE = "NoSchedule"
    PREFER_NO_SCHEDULE = "PreferNoSchedule"
    NO_EXECUTE = "NoExecute"


class Op(StrEnum):
    """How a requirement compares a label."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"
    GT = "Gt"
    LT = "Lt"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One comparison of one label. `values` has exactly one integer for Gt and Lt, none for Exists and DoesNotExist."""

    key: str
    op: Op
    values: tuple[str, ...] = ()

    def matches(self, labels: dict[str, str]) -> bool:
        """On a label set (of a workload or namespace)."""
        value = labels.get(self.key)
        if self.op is Op.IN:
            return value in self.values
        if self.op is Op.NOT_IN:
            return value not in self.values
        if self.op is Op.EXISTS:
            return value is not None
        if self.op is Op.DOES_NOT_EXIST:
            return value is None
        number = integer(value)
        if number is None:
            return False
        return number > int(self.values[0]) if self.op is Op.GT else number < int(self.values[0])


def integer(text: str | None) -> int | None:
    """A label value as Gt and Lt read it."""
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Selector:
    """All requirements must hold; without any it selects everything."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: dict[str, str]) -> bool:
        """Whether all requirements hold."""
        return all(requirement.matches(labels) for requirement in self.requirements)


@dataclass(frozen=True, slots=True)
class NodeTerm:
    """A conjunction over node labels and names. Without requirements it matches no node (kube's rule)."""

    labels: tuple[Requirement, ...] = ()
    names: tuple[Requirement, ...] = ()


@dataclass(frozen=True, slots=True)
class PreferredNode:
    """Weight 1 to 100 for nodes that the term matches; a term without requirements says nothing."""

    weight: int
    term: NodeTerm


@dataclass(frozen=True, slots=True)
class Taint:
    """Keeps workloads off a node."""

    key: str
    value: str
    effect: Effect


@dataclass(frozen=True, slots=True)
class Toleration:
    """`key` empty: every taint. `value` None: any value (operator Exists). `effect` None: every effect. `for_ms`: how long NoExecute is tolerated, None for ever."""

    key: str = ""
    value: str | None = None
    effect: Effect | None = None
    for_ms: int | None = None

    def tolerates(self, taint: Taint) -> bool:
        """Whether it lets the taint pass."""
        return (self.effect is None or self.effect is taint.effect) and (not self.key or self.key == taint.key) and (self.value is None or self.value == taint.value)


@dataclass(frozen=True, slots=True)
class PeerTerm:
    """Workloads that `selector` selects in `namespaces` (or in namespaces that `namespace_selector` selects), seen per domain of `topology_key`.

    Selector None selects nothing. Without namespaces and namespace selector: the namespace of the workload that carries the term, filled in by the parser.
    """

    selector: Selector | None
    topology_key: str
    namespaces: tuple[str, ...] = ()
    namespace_selector: Selector | None = None


@dataclass(frozen=True, slots=True)
class PreferredPeer:
    """Weight 1 to 100, negative to keep apart."""

    weight: int
    term: PeerTerm


@dataclass(frozen=True, slots=True)
class Spread:
    """At most `max_skew` more selected workloads (of the same namespace) in one domain than in the emptiest.

    `needs_key`: a node without the topology key is out (hard) or scores nothing (soft); False only for defaults that a whole cluster sets.
    """

    max_skew: int
    topology_key: str
    selector: Selector | None
    hard: bool = True
    min_domains: int = 1
    needs_key: bool = True


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """`count` devices of `milli` each (below 1000 only for one shared device), `memory` bytes on each, on one of `models` (empty: any)."""

    count: int
    milli: int = GPU_WHOLE
    memory: int = 0
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Link:
    """The way to `site` (where a data source or a fixed peer is): at most `max_rtt_us` there and back, at least `min_kbps` free. 0: no bound."""

    site: str
    max_rtt_us: int = 0
    min_kbps: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """Everything about a workload that decides where it may go and how nodes score: workloads of equal shape form an equivalence class."""

    kind: Kind
    namespace: str
    labels: tuple[tuple[str, str], ...]
    requests: tuple[tuple[str, int], ...]
    gpu: GpuRequest | None = None
    node_selector: tuple[tuple[str, str], ...] = ()
    node_terms: tuple[NodeTerm, ...] | None = None
    preferred_nodes: tuple[PreferredNode, ...] = ()
    affinity: tuple[PeerTerm, ...] = ()
    anti_affinity: tuple[PeerTerm, ...] = ()
    preferred_peers: tuple[PreferredPeer, ...] = ()
    tolerations: tuple[Toleration, ...] = ()
    spread: tuple[Spread, ...] = ()
    numa_single: bool = False
    residency: tuple[str, ...] = ()
    node_kinds: tuple[NodeKind, ...] = ()
    links: tuple[Link, ...] = ()
    image: str = ""
    weights: tuple[tuple[str, int], ...] = ()
    _hash: int = field(default=0, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.kind, self.namespace, self.labels, self.requests, self.gpu, self.node_selector, self.node_terms, self.affinity,
                                                self.anti_affinity, self.tolerations, self.spread, self.image)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def request_map(self) -> dict[str, int]:
        """Requests by resource, with the slot that every workload takes."""
        return {SLOTS: 1, **dict(self.requests)}


@dataclass(frozen=True, slots=True)
class Workload:
    """One thing to place. Times are ms on the caller's clock; `state_bytes` is what a migration has to carry."""

    id: str
    shape: Shape
    priority: int = 0
    preemptible: bool = True
    preempts: bool = True
    migratable: bool = False
    state_bytes: int = 0
    tenant: str = ""
    gang: str = ""
    gang_size: int = 0
    duration_ms: int | None = None
    deadline_ms: int | None = None


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """One device; memory in bytes."""

    model: str
    memory: int = 0


@dataclass(frozen=True, slots=True)
class Numa:
    """CPU (milli) and memory (bytes) of one NUMA zone."""

    cpu: int
    memory: int


@dataclass(frozen=True, slots=True)
class Node:
    """One machine. `labels` holds its topology too. `price` in millionths of the currency per hour, power in mW, location in degrees."""

    name: str
    kind: NodeKind = NodeKind.CLOUD
    capacity: tuple[tuple[str, int], ...] = ()
    gpus: tuple[GpuDevice, ...] = ()
    numa: tuple[Numa, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    taints: tuple[Taint, ...] = ()
    location: tuple[float, float] | None = None
    price: int = 0
    idle_mw: int = 0
    busy_mw: int = 0
    unschedulable: bool = False
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """Of the selected workloads of a namespace, `allowed` may be disrupted now. `disrupted` names those already on their way out: they count no more."""

    name: str
    namespace: str
    selector: Selector
    allowed: int
    disrupted: tuple[str, ...] = ()

    def covers(self, workload: Workload) -> bool:
        """Whether it protects the workload. An empty selector covers nothing (kube's rule for budgets)."""
        return workload.shape.namespace == self.namespace and bool(self.selector.requirements) and self.selector.matches(dict(workload.shape.labels)) and workload.id not in self.disrupted


GPU_MILLI = "gpu_milli"
"""How quotas name GPUs: milli-GPU over all devices."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tenant may use. `nominal` is its own; within a `cohort` it may use up to `borrow` more of what the others leave. A resource not named is not limited."""

    tenant: str
    nominal: tuple[tuple[str, int], ...]
    cohort: str = ""
    borrow: tuple[tuple[str, int], ...] = ()
    weight: int = 1
