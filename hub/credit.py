"""Credit: how much history each edge may have under way, so that a storm of returning edges is a queue and not a flood. Pure."""

from edge_runtime.contract.receipts import MAX_CREDIT

TOTAL_RECORDS = 20_000
"""History records under way to this hub at once, over all edges: about two seconds of what one SQLite hub commits."""

PER_EDGE_MIN = 200
"""Least credit of an edge that is served at all: one batch."""

PER_EDGE_MAX = 5_000
"""Most credit of one edge: a long outage drains at full rate without holding the queue alone."""

QUEUE_HIGH = 0.5
"""Share of the ingest queue above which nobody gets new credit."""


def credit(draining_edges: int, queue_fill: float) -> int:
    """History records one edge may have under way.

    Args:
        draining_edges: edges that have a backlog now, this one included.
        queue_fill: share (0 to 1) of the ingest queue in use.
    """
    if queue_fill >= QUEUE_HIGH:
        return 0
    share = int(TOTAL_RECORDS * (1 - queue_fill / QUEUE_HIGH) / max(1, draining_edges))
    return min(MAX_CREDIT, PER_EDGE_MAX, max(PER_EDGE_MIN, share))
