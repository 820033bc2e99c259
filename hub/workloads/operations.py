"""Operations on workloads that are placed: entries of an edge's desired state, and what its records say of them. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.operations import Operation
from edge_runtime.contract.schema import check_fields
from edge_runtime.contract.workloads import ASKED as KINDS
from edge_runtime.contract.workloads import CHECKPOINT, CONVERT, CONVERTS, DELETE_SNAPSHOT, FORMS, MOVES, OPERATION_FIELDS, RESTORE, SNAPSHOT, SNAPSHOTS

from ..store.base import StoredRecord
from ..store.workloads import WorkloadRow
from .documents import Conflict

ASKED_S = 300.0
"""Seconds for which an operation waits for an edge that is away, where nothing else is asked for."""

MOST_ASKED_S = 2_592_000.0
"""Thirty days: as long as a command may wait."""

LOOK_BACK = 1000
"""Newest records of operations of one edge that are looked at for how one stands: fifteen for each that a desired state may list."""

ASKED = ("id", "kind", "name", "stop", "to", "expires_seconds")


def entry(row: WorkloadRow, asked: Mapping[str, Any], name: str, now_ms: int, labels: Mapping[str, Any]) -> dict[str, Any]:
    """What an edge is asked, from a request: `name` is the operation's where the request has none. Raises `ContractError`, or `Conflict` where the workload is nowhere, or (`labels`) on a node that cannot."""
    unknown = sorted(set(asked) - set(ASKED))
    if unknown:
        raise ContractError(unknown[0][:80], "is not known here", f"send {', '.join(ASKED)}", "field")
    seconds = asked.get("expires_seconds", ASKED_S)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MOST_ASKED_S:
        raise ContractError("expires_seconds", f"{str(seconds)[:20]!r} is not 0 to {MOST_ASKED_S:.0f}", "use seconds")
    if row.state != "placed":
        raise Conflict("workload", f"{row.id} is {row.state}, and on no node", "ask when it is placed")
    if asked.get("kind") in MOVES:
        raise ContractError("kind", f"{asked['kind']!r} is a part of a move", f"POST /api/v1/moves; here use one of {', '.join(KINDS)}")
    told = {key: value for key, value in asked.items() if key != "expires_seconds"}
    found = check_fields(OPERATION_FIELDS, {"id": name, **told, "workload": row.id, "epoch": row.epoch, "expires_ms": now_ms + int(seconds * 1000)}, "payload")
    if not found["name"] and found["kind"] not in (RESTORE, CHECKPOINT, CONVERT, SNAPSHOT):
        raise ContractError("name", "is missing", f"name the {'snapshot' if found['kind'] == DELETE_SNAPSHOT else 'checkpoint'}", "missing")
    if found["stop"] and found["kind"] != CHECKPOINT:
        raise ContractError("stop", f"is not for a {found['kind']}", "leave it out")
    if found["kind"] in (SNAPSHOT, DELETE_SNAPSHOT) and labels.get(SNAPSHOTS) != "true":
        raise Conflict("workload", f"{row.id} is on {row.node}, which takes no snapshots", f"see which nodes have the label {SNAPSHOTS}, and docs/workloads.md, Snapshots")
    if (found["kind"] == CONVERT) != bool(found["to"]):
        raise ContractError("to", "is missing" if not found["to"] else f"is not for a {found['kind']}", f"say what it shall be: {', '.join(FORMS)}" if not found["to"] else "leave it out", "missing")
    if found["kind"] == CONVERT and (row.document.get("spec") or {}).get(CONVERTS) is not True:
        raise Conflict(f"spec.{CONVERTS}", f"{row.id} was not started as one that can be converted", f"submit it anew, under another id, with {CONVERTS}: true in its spec")
    return {name: value for name, value in found.items() if value or name not in ("to", "offer")}  # an older edge knows nothing of them


def added(spec: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The change of a desired state that asks for an operation; empty where it is asked for already. Raises `Conflict` where another one has its id."""
    listed = list(spec.get("operations", ()))
    for one in listed:
        if one["id"] == wanted["id"]:
            other = next((key for key in wanted if key != "expires_ms" and one.get(key) != wanted[key]), "")
            if other:
                raise Conflict(other, f"operation {wanted['id']} was asked for with another {other}", "give this one an id of its own")
            return {}
    return {"operations": [*listed, wanted]}


def shown(listed: Iterable[Mapping[str, Any]], records: Iterable[StoredRecord], workload: str) -> list[dict[str, Any]]:
    """The operations on one workload, the newest first.

    Args:
        listed: what the edge's desired state asks for.
        records: `operation` records of the edge's stream of events. What it said last counts, by its own numbers: what is live is sent before what waited, so the end of an operation may arrive before its beginning.
    """
    found: dict[str, dict[str, Any]] = {}
    for stored in sorted(records, key=lambda one: -one.record.seq):
        try:
            told = Operation.from_json(jsoncodec.decode(stored.record.body.encode())).to_json()
        except ContractError:
            continue
        if told["detail"].get("workload") == workload and told["id"] not in found:
            found[told["id"]] = {**told, "node": stored.edge, "said_ms": stored.received_ms}
    waiting = [
        Operation(one["id"], one["kind"], "pending", one["epoch"], "", "the edge has not answered yet", {"workload": workload, "name": one["name"]}).to_json()
        for one in listed if one["workload"] == workload and one["id"] not in found
    ]
    return [*reversed(waiting), *found.values()]


def kept(word: str, record: StoredRecord | None, workload: str) -> list[dict[str, Any]]:
    """The checkpoints (or snapshots: `word`) of one workload by an edge's newest record of them."""
    if record is None:
        return []
    there = jsoncodec.decode(record.record.body.encode()).get(word)
    return [one for one in there if isinstance(one, dict) and one.get("workload") == workload] if isinstance(there, list) else []
