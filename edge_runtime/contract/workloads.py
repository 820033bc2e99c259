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

WHEN_DRAINED = "when_drained"
"""Key of a workload's document: what becomes of it while its node is drained."""

RESTART = "restart"
"""It begins anew elsewhere. Beside it `MOVE` (with its state, or not at all) and `STAY`; without any it moves with its state where that can be, else it begins anew."""

WORKLOAD_FIELDS = (
    Field("id", "id", "the workload's name"),
    Field("epoch", "integer", "the fencing epoch: grows with every placement; an older one must not run", minimum=1),
    Field("wanted", "enum", "whether it shall run here; what is not listed shall not run either", choices=(RUNNING, STOPPED)),
    Field("kind", "enum", "what it is", required=False, default="container", choices=KINDS),
    Field("image", "string", "what to run", required=False, default=""),
    Field("requests", "object", "resources that are set aside: cpu in milli-CPU, memory and disk in bytes, network in kbit/s", required=False, default={}, max_items=64),
    Field("gpus", "array", "GPU devices that are set aside, by their place in the node's `gpus`", required=False, default=[], max_items=16),
    Field("numa", "array", "shares of NUMA zones: [zone, milli-CPU, bytes]", required=False, default=[], max_items=8),
    Field("over", "integer", "bytes of memory that are set aside beside `requests`, for what it needs while it is converted and as a micro-VM", required=False, default=0, minimum=0),
    Field("document", "object", "the workload as it was submitted", required=False, default={}, max_items=64),
    Field("held", "boolean", "of one whose state is on its way to another node: the state stays here, and it is not started", required=False, default=False),
    Field("from", "object", "of one that comes with its state: `move` and `root`, the name and the hash of the state that it goes on from, or `move` and `live`, true, of one that comes while it runs; refused where it cannot", required=False, default={}, max_items=8),
)
"""One entry of `spec.workloads`. A `stopped` one has only the first three; the edge answers it with a `stopped` record, also where it never ran."""

CHECKPOINT, RESTORE, DELETE_CHECKPOINT, CONVERT, SNAPSHOT, DELETE_SNAPSHOT = ASKED = ("checkpoint", "restore", "delete-checkpoint", "convert", "snapshot", "delete-snapshot")
"""What people can have done with a workload that is placed, beside running and stopping it."""

MOVE_CHECK, MOVE_ROOM, MOVE_COME, MOVE_LIVE, MOVE_AHEAD, MOVE_OUT, MOVE_BACK = MOVES = ("move-check", "move-room", "move-come", "move-live", "move-ahead", "move-out", "move-back")
"""Parts of a move with its state, asked for by the hub alone: look whether it can leave; whether it can come (at the target); wait for it (at the target); copy it there while it runs; copy its disk while it runs; stop it and
write its state for the way; go on with it here."""

LIVE = "live"
"""Key of what is told about moves while it runs: in a source's offer and in a target's answer true where that can be; in the `from` of one that comes so true as well."""

AHEAD = "ahead"
"""Key of what is told about disks that go ahead: in a source's offer the bytes of its disk, where it can copy that while it runs; in a target's answer, and in `move-out`, true."""

SPEED = "speed"
"""Key of what `move-ahead` and `move-live` are told: bytes in a second with which it is copied, at most."""

OPERATIONS = ASKED + MOVES

SNAPSHOTS = "novacron.snapshots"
"""The label by which a node says that it takes snapshots: an older one would refuse all of a desired state that asks for one."""

SNAPSHOT_IMAGES = "snapshots/"
"""How the names of snapshots as images begin: `snapshots/WORKLOAD:NAME`."""

MOVING = "move-"
"""How the names of moves begin, and so those of the states that are on their way: nobody but the hub has such a state gone on from."""

MOVABLE = "novacron.moves/"
"""Prefix of the labels by which a node says which kinds of workload it can give away and take in with their state."""

MAX_OFFER = 64
"""Keys of what a source tells of a workload that may leave: about ten there are."""

AS_CONTAINER, AS_MICROVM = FORMS = ("container", "microvm")
"""What a workload that can be converted is, or shall be."""

OPERATION_FIELDS = (
    Field("id", "id", "the operation's name, unique; an edge that sees it twice does it once"),
    Field("kind", "enum", "what to do", choices=OPERATIONS),
    Field("workload", "id", "with which workload"),
    Field("epoch", "integer", "the epoch of the placement that is meant; of another one it is refused", minimum=1),
    Field("name", "string", "the checkpoint, or the snapshot; checkpoint and snapshot: empty takes the operation's id; restore: empty takes the newest", required=False, default="", max_items=64),
    Field("to", "enum", "convert: what it shall be; empty for the others", required=False, default="", choices=("", *FORMS)),
    Field("stop", "boolean", "checkpoint: the workload does not go on; it is checkpointed then, until it is restored", required=False, default=False),
    Field("offer", "object", "move-room, move-come: what the source told of the workload and its host, and `document`, `image`, `kind`, `requests`; move-ahead, move-live: `speed`, bytes in a second at most; move-out: `ahead`, true where a copy of its disk is at the target", required=False, default={}, max_items=MAX_OFFER),
    Field("expires_ms", "integer", "wall time after which it must not be begun, milliseconds since 1970 UTC", minimum=0),
)
"""One entry of `spec.operations`. The answers are `operation` records."""

REPORT_FIELDS = (
    Field("id", "id", "the workload's name"),
    Field("epoch", "integer", "the epoch of the placement it speaks of", minimum=1),
    Field("state", "enum", "what became of it", choices=REPORTED),
    Field("reason", "string", "why", required=False, default=""),
    Field("load_ms", "number", "of `running`: how long the start took until it stood ready; 0 where that was not measured", required=False, default=0, minimum=0),
    Field("still_ms", "number", "of `running`: how long it stood still when it came while it ran; 0 where it did not, or that is not known", required=False, default=0, minimum=0),
    Field("form", "enum", "of `running`: what it is, where that has changed; empty: a container, or what its document says", required=False, default="", choices=("", *FORMS)),
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

CONVERTS = "converts"
"""Key of a container's or batch job's `spec`: true: it can become a micro-VM while it runs, and come back."""

CONVERTING = "novacron.converts"
"""The label by which a node says that it can convert."""

GUEST_OWN, GUEST_STEP = 192 << 20, 64 << 20
"""Bytes that the guest of a converted workload has beside the workload's limit twice (CRIU's images lie in memory while it is restored): its kernel, CRIU with its libraries, page tables. In steps."""

QEMU_OWN = 160 << 20
"""Bytes that a QEMU may use beside its guest's memory: its program, its translated code and its buffers take up to 100 MB."""


def guest_bytes(limit: int) -> int:
    """Memory of the guest of a converted workload that may use `limit` bytes."""
    return -(-(2 * limit + GUEST_OWN) // GUEST_STEP) * GUEST_STEP


def conversion_bytes(limit: int) -> int:
    """What a workload that can be converted needs beside its own `limit`: for a moment the container and the guest are both there."""
    return guest_bytes(limit) + QEMU_OWN
