"""The streams of records and what each may lose."""

from .lean_dataclass import dataclass


@dataclass(frozen=True, slots=True)
class StreamPolicy:
    """How one stream is kept.

    Attributes:
        name: the stream's name in records and receipts.
        durability: `critical` is never dropped while anything else can be; `event` goes before it; `bulk` goes first.
        database: which SQLite file holds it.
        priority: order on the link, 0 first.
    """

    name: str
    durability: str
    database: str
    priority: int
    doc: str


DECISION = StreamPolicy("decision", "critical", "journal", 0, "decisions with the inputs that led to them")
EVENT = StreamPolicy("event", "event", "journal", 1, "boots, link changes, desired state, twins, alerts, operations")
TELEMETRY = StreamPolicy("telemetry", "bulk", "telemetry", 2, "readings; the oldest may be dropped, counted, when space ends")

STREAMS: dict[str, StreamPolicy] = {policy.name: policy for policy in (DECISION, EVENT, TELEMETRY)}
"""Every stream of this version; a peer refuses names it does not know."""
