"""Receipts: what the hub has committed, what it misses, and how fast history may come."""

from typing import Any

from .errors import ContractError
from .limits import MAX_WANT_RANGES
from .schema import VERSION, Field, Message
from .streams import STREAMS
from .topics import EDGE_RECEIPTS

MAX_CREDIT = 100_000
"""History records a hub may allow an edge to have under way at once."""


def _check_wants(message: dict[str, Any]) -> None:
    for index, mark in enumerate(message["marks"]):
        for number, pair in enumerate(mark["want"]):
            where = f"marks[{index}].want[{number}]"
            if not (isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair) and 1 <= pair[0] <= pair[1]):
                raise ContractError(where, "is not a range", "send [first, last] with 1 <= first <= last", "type")


RECEIPTS = Message(
    name="receipts",
    topic=EDGE_RECEIPTS,
    direction="hub to edge",
    retained=False,
    doc="Sent after the hub's commit. The edge may free what is at or below `upto`, sends `want` again, and keeps history within `credit`.",
    fields=(
        VERSION,
        Field("edge", "id", "the edge's name"),
        Field("hub", "id", "the hub's name"),
        Field("boot", "id", "the hub process that speaks"),
        Field(
            "marks", "array", "one mark per stream", max_items=16,
            items=(
                Field("stream", "enum", "the stream", choices=tuple(STREAMS)),
                Field("upto", "integer", "every record up to this seq is committed at the hub (or known to be gone)", minimum=0),
                Field("chain", "hex", "the hub's chain after `upto`; an edge whose own differs has another history and moves above `top`", required=False, default=""),
                Field("top", "integer", "the highest seq that the hub has", required=False, default=0, minimum=0),
                Field("held", "integer", "records above `upto` that the hub has already", required=False, default=0, minimum=0),
                Field("want", "array", "ranges [first, last] to send again", required=False, default=[], max_items=MAX_WANT_RANGES),
            ),
        ),
        Field("credit", "integer", "history records that may be on their way at once; 0 means wait", minimum=0, maximum=MAX_CREDIT),
        Field("quarantine", "string", "empty, or why this identity is not served", required=False, default=""),
    ),
    after=_check_wants,
    example={
        "v": 1, "edge": "gw-1", "hub": "hub", "boot": "0b7e4f8a91c2d3e4",
        "marks": [{"stream": "decision", "upto": 121, "chain": "5e0c2d9a52a3c1f3a8f4b6f07c9d1e22", "top": 121, "held": 0, "want": [[90, 95]]}], "credit": 2000, "quarantine": "",
    },
)
