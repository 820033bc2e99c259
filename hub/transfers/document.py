"""What a transfer is asked with, and what a worker says of itself: checked, named fields, defaults filled in."""

from typing import Any

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.schema import Field, check_fields

PATH_CHARS = 1_024
"""Characters of a path, at most: it is relative to a worker's folder."""
TEXT_CHARS = 400
"""Characters of a worker's words that are kept."""
SLOTS_MOST = 64
"""Sides that one worker may carry at once: each has its process."""

END = (Field("worker", "id", "the name of a worker"), Field("path", "string", "a path below the worker's folder, without `..`", max_items=PATH_CHARS))
TRANSFER = (
    Field("id", "id", "a name that is used once"),
    Field("source", "object", "worker and path of what is moved", items=END),
    Field("destination", "object", "worker and path of where to", items=END),
    Field("limit_mbit", "number", "bandwidth limit in Mbit/s", required=False, default=0, minimum=0, maximum=10_000_000),
    Field("base", "string", "path, below the source's folder, of what the destination has as a base", required=False, default="", max_items=PATH_CHARS),
    Field("replace", "boolean", "true to put it in place of what is there", required=False, default=False),
    Field("not_before_ms", "integer", "wall milliseconds before which it does not begin", required=False, default=0, minimum=0),
)
FACTS = (
    Field("version", "string", "the worker's version", required=False, default="", max_items=64),
    Field("cpus", "integer", "processors", required=False, default=0, minimum=0, maximum=1_000_000),
    Field("gpu", "string", "name of the accelerator; empty for none", required=False, default="", max_items=120),
    Field("free_bytes", "integer", "free space of its folder", required=False, default=0, minimum=0),
    Field("slots", "integer", "sides that it carries at once", required=False, default=2, minimum=1, maximum=SLOTS_MOST),
)
HELD = (Field("task", "string", "the task's name", max_items=200), Field("epoch", "integer", "the lease's epoch", minimum=0))
LEASE = (
    Field("facts", "object", "what the worker says of itself", required=False, default=None, items=FACTS),
    Field("held", "array", "what it works on", required=False, default=None, max_items=SLOTS_MOST, items=HELD),
    Field("wait_s", "number", "seconds to wait for something to do", required=False, default=0, minimum=0, maximum=30),
)
PROGRESS = (
    Field("moved_bytes", "integer", "bytes of the source that are dealt with", required=False, default=0, minimum=0),
    Field("wire_bytes", "integer", "bytes on the wire", required=False, default=0, minimum=0),
    Field("length", "integer", "bytes of the source", required=False, default=0, minimum=0),
    Field("passes", "integer", "passes", required=False, default=0, minimum=0),
)
REPORT = (
    *HELD,
    Field("state", "enum", "what happened", choices=("working", "listening", "done", "failed")),
    Field("address", "string", "listening: HOST:PORT", required=False, default="", max_items=300),
    Field("progress", "object", "how far it is", required=False, default=None, items=PROGRESS),
    Field("prediction", "object", "what was expected", required=False, default=None, max_items=32),
    Field("root", "string", "done: the root hash", required=False, default="", max_items=64),
    Field("result", "object", "done: figures", required=False, default=None, max_items=64),
    Field("error", "string", "failed: cause and remedy", required=False, default="", max_items=4_000),
    Field("final", "boolean", "failed: trying again would not help", required=False, default=False),
)


def _path(value: str, where: str) -> None:
    parts = value.split("/")
    if not value or value.startswith("/") or "\x00" in value or any(part in ("", ".", "..") for part in parts):
        raise ContractError(where, f"{value[:80]!r} is not a path below a folder", "give it relative to the worker's folder, without `..`", "path")


def read_transfer(value: Any) -> dict[str, Any]:
    """The checked document. Raises ContractError."""
    if isinstance(value, dict):
        unknown = sorted(set(value) - {one.name for one in TRANSFER})
        if unknown:
            raise ContractError(unknown[0][:80], "is not known here", f"send {', '.join(one.name for one in TRANSFER)}", "unknown")
    document = check_fields(TRANSFER, value, "payload")
    for end in ("source", "destination"):
        _path(document[end]["path"], f"{end}.path")
    if document["base"]:
        _path(document["base"], "base")
    if document["source"] == document["destination"]:
        raise ContractError("destination", "is the source itself", "give another worker or path", "path")
    return document
