"""Why a node will not do: one bit per filter, so that one uint32 per node tells all of it."""

from enum import IntFlag

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Fail(IntFlag):
    """A filter that a node failed."""

    DOWN = 1 << 0
    CORDONED = 1 << 1
    NODE_AFFINITY = 1 << 2
    TAINT = 1 << 3
    KIND = 1 << 4
    RESIDENCY = 1 << 5
    GPU_MODEL = 1 << 6
    RESOURCES = 1 << 7
    GPU = 1 << 8
    NUMA = 1 << 9
    AFFINITY = 1 << 10
    ANTI_AFFINITY = 1 << 11
    EXCLUDED = 1 << 12
    SPREAD_KEY = 1 << 13
    SPREAD = 1 << 14
    LINK = 1 << 15


WORDS = {
    Fail.DOWN: "the node is not heard from", Fail.CORDONED: "the node takes nothing new", Fail.NODE_AFFINITY: "labels do not match the node selector or affinity",
    Fail.TAINT: "a taint is not tolerated", Fail.KIND: "the kind of node is not wanted", Fail.RESIDENCY: "outside the regions where it may be",
    Fail.GPU_MODEL: "no GPU of a wanted model", Fail.RESOURCES: "too little is free", Fail.GPU: "no GPU has enough free", Fail.NUMA: "no single NUMA zone has enough free",
    Fail.AFFINITY: "not where the workloads are that it must be with", Fail.ANTI_AFFINITY: "a workload is there that it must be apart from",
    Fail.EXCLUDED: "a workload there keeps it away", Fail.SPREAD_KEY: "the label to spread over is missing", Fail.SPREAD: "it would make the spread too uneven",
    Fail.LINK: "the way to a site is too slow or too full",
}
"""What each bit says to people."""

UNRESOLVABLE = (
    Fail.DOWN | Fail.CORDONED | Fail.NODE_AFFINITY | Fail.TAINT | Fail.KIND | Fail.RESIDENCY | Fail.GPU_MODEL | Fail.AFFINITY | Fail.SPREAD_KEY
)
"""What taking workloads off the node cannot cure: preemption leaves such nodes alone."""
