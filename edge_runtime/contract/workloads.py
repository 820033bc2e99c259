"""Workloads as hub and edge speak of them: what shall run (desired state), what became of it (`workload` records), what a node has (`node.capacity`)."""

from collections.abc import Mapping
from typing import Any

from .schema import Field

KINDS = ("vm", "container", "function", "batch")
"""What a workload can be."""

RUNNING, STOPPED = "running", "stopped"

CHECKPOINTED = "checkpointed"
"""It stands still in a checkpoint on its node: it neither runs nor has it ended, and goes on where it is restored."""

REPORTED = ("accepted", "running", CHECKPOINTED, "refused", "stopped", "done", "failed")
"""What an edge says of a placement. The last four end it."""

ENDED = frozenset(("refused", "stopped", "done", "failed"))
"""After one of these the edge holds nothing of that placement any more."""

NODE_KINDS = ("edge", "hybrid", "cloud", "gpu", "storage")
"""What a node can be; edges and hybrids keep what they run while nobody hears of them."""

WHEN_CUT_OFF = "when_cut_off"
"""Key of a workload's document: what becomes of it while its site has no hub and its node is gone."""

STAY, MOVE = "stay", "move"
"""It waits for its node (default), or a sibling of the site takes it over."""

WORKLOAD_FIELDS = (
    Field("id", "id", "the workload's name"),
    Field("epoch", "integer", "the fencing epoch: grows with every placement; an older one must not run", minimum=1),
    Field("wanted", "enum", "whether it shall run here; what is not listed shall not run either", choices=(RUNNING, STOPPED)),
    Field("kind", "enum", "what it is", required=False, default="container", choices=KINDS),
    Field("image", "string", "what to run", required=False, default=""),
    Field("requests", "object", "resources that are set aside: cpu in milli-CPU, memory and disk in bytes, network in kbit/s", required=False, default={}, max_items=64),
    Field("gpus", "array", "GPU devices that are set aside, by their place in the node's `gpus`", required=False, default=[], max_items=16),
    Field("numa", "array", "shares of NUMA zones: [zone, milli-CPU, bytes]", required=False, default=[], max_items=8),
    Field("document", "object", "the workload as it was submitted", required=False, default={}, max_items=64),
)
"""One entry of `spec.workloads`. A `stopped` one has only the first three; the edge answers it with a `stopped` record, also where it never ran."""

CHECKPOINT, RESTORE, DELETE_CHECKPOINT = OPERATIONS = ("checkpoint", "restore", "delete-checkpoint")
"""What can be done with a workload that is placed, beside running and stopping it."""

OPERATION_FIELDS = (
    Field("id", "id", "the operation's name, unique; an edge that sees it twice does it once"),
    Field("kind", "enum", "what to do", choices=OPERATIONS),
    Field("workload", "id", "with which workload"),
    Field("epoch", "integer", "the epoch of the placement that is meant; of another one it is refused", minimum=1),
    Field("name", "string", "the checkpoint; checkpoint: empty takes the operation's id; restore: empty takes the newest", required=False, default="", max_items=64),
    Field("stop", "boolean", "checkpoint: the workload does not go on; it is checkpointed then, until it is restored", required=False, default=False),
    Field("expires_ms", "integer", "wall time after which it must not be begun, milliseconds since 1970 UTC", minimum=0),
)
"""One entry of `spec.operations`. The answers are `operation` records."""

REPORT_FIELDS = (
    Field("id", "id", "the workload's name"),
    Field("epoch", "integer", "the epoch of the placement it speaks of", minimum=1),
    Field("state", "enum", "what became of it", choices=REPORTED),
    Field("reason", "string", "why", required=False, default=""),
    Field("load_ms", "number", "of `running`: how long the start took until it stood ready; 0 where that was not measured", required=False, default=0, minimum=0),
    Field("for", "string", "the node that had it, where the site itself gave it to this one while no hub was there", required=False, default="", max_items=64),
    Field("fence", "integer", "the number of the site's table that gave it; the highest counts", required=False, default=0, minimum=0),
)
"""The body of a `workload` record."""


def may_move(document: Mapping[str, Any]) -> bool:
    """Whether a workload's document lets siblings of its node take it over."""
    return bool(document.get(WHEN_CUT_OFF, STAY) == MOVE)

ISOLATION = "isolation"
"""Key of a container's or batch job's `spec`: what stands between it and the node's kernel."""

NAMESPACES, MICROVM, KATA = ISOLATIONS = ("namespaces", "microvm", "kata")
"""Namespaces of the node's own kernel (the default), a kernel of its own in a small QEMU, or what containerd's Kata shim makes."""

ISOLATES = "novacron.isolation/"
"""Prefix of the labels by which a node says which others than `namespaces` it has."""
