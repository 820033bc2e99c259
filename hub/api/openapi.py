"""The API as one table: method, path, what it does, what it takes. Routes and the OpenAPI document both come from it."""

from dataclasses import dataclass
from typing import Any

from edge_runtime.contract.workloads import ASKED

from .. import __version__

ERROR = {
    "type": "object", "required": ["field", "problem", "remedy"],
    "properties": {"field": {"type": "string"}, "problem": {"type": "string"}, "remedy": {"type": "string"}, "reason": {"type": "string"}},
}
NAME = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}$"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 999_999_999_999_999_999}
LIMIT = {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}
OBJECT = {"type": "object"}
LIST = {"type": "array", "items": OBJECT}

CHANGE = {
    "type": "object", "additionalProperties": False,
    "properties": {
        "rules": {"type": ["array", "null"], "items": OBJECT, "maxItems": 256}, "models": {"type": "array", "items": OBJECT, "maxItems": 16},
        "twins": {"type": "object", "additionalProperties": OBJECT}, "commands": {"type": "array", "items": OBJECT, "maxItems": 256},
        "update": {"type": ["object", "null"], "required": ["id"], "properties": {"id": NAME, "url": {"type": "string"}, "token": {"type": "string"}, "path": {"type": "string"}}}, "expires_ms": COUNT,
    },
}
COMMAND = {
    "type": "object", "required": ["device", "name"],
    "properties": {
        "id": NAME, "device": NAME, "name": NAME, "args": OBJECT, "expires_seconds": {"type": "number", "exclusiveMinimum": 0, "maximum": 2_592_000, "default": 300},
    },
}
WORKLOAD = {
    "type": "object", "required": ["id"],
    "properties": {
        "id": NAME, "kind": {"enum": ["vm", "container", "function", "batch"], "default": "container"}, "image": {"type": "string"}, "requests": OBJECT, "gpu": OBJECT,
        "priority": {"type": "integer"}, "lost_after_ms": {"type": "integer", "minimum": 1}, "when_cut_off": {"enum": ["stay", "move"], "default": "stay"}, "spec": OBJECT,
        "duration_ms": {"type": "integer", "minimum": 1}, "deadline_ms": COUNT, "when_late": {"enum": ["refuse", "accept"], "default": "refuse"},
    },
}
"""The rest of it is told in docs/workloads.md: the scheduler checks it whole."""
WORKLOADS = {"oneOf": [WORKLOAD, {"type": "array", "items": WORKLOAD, "minItems": 1, "maxItems": 1000}]}
NODE = {
    "type": "object",
    "properties": {
        "name": NAME, "kind": {"enum": ["cloud", "edge", "hybrid", "gpu", "storage"], "default": "cloud"}, "capacity": OBJECT, "gpus": LIST, "numa": LIST, "labels": OBJECT, "taints": LIST,
        "runs": {"type": "array", "items": {"enum": ["vm", "container", "function", "batch"]}}, "unschedulable": {"type": "boolean"},
    },
}
BUDGET = {"type": "object", "properties": {"namespace": {"type": "string"}, "selector": OBJECT, "allowed": {"type": "integer", "minimum": 0}}}
QUOTA = {
    "type": "object",
    "properties": {"nominal": OBJECT, "cohort": {"type": "string"}, "borrow": OBJECT, "weight": {"type": "integer", "minimum": 1, "maximum": 1_000_000}},
}
REBALANCE = {
    "type": "object", "additionalProperties": False,
    "properties": {"drain": {"type": "array", "items": NAME, "maxItems": 32}, "go": {"type": "boolean", "default": False}},
}
OPERATION = {
    "type": "object", "additionalProperties": False, "required": ["kind"],
    "properties": {
        "id": NAME, "kind": {"enum": list(ASKED)}, "name": {"type": "string", "maxLength": 64}, "stop": {"type": "boolean", "default": False},
        "to": {"enum": ["container", "microvm"]},
        "expires_seconds": {"type": "number", "exclusiveMinimum": 0, "maximum": 2_592_000, "default": 300},
    },
}
EXECUTE = {
    "type": "object", "additionalProperties": False, "required": ["args"],
    "properties": {"args": {"type": "array", "items": {"type": "string", "maxLength": 8192}, "minItems": 1, "maxItems": 64}, "timeout_s": {"type": "number", "minimum": 0, "maximum": 60, "default": 10}},
}
WHAT_IF = {
    "type": "object", "additionalProperties": False,
    "properties": {
        "workloads": {"type": "array", "items": WORKLOAD, "maxItems": 256}, "lose": {"type": "array", "items": NAME, "maxItems": 256},
        "add": {"type": "array", "items": NODE, "maxItems": 256},
    },
}
MOVE = {
    "type": "object", "additionalProperties": False, "required": ["workload"],
    "properties": {"workload": NAME, "to": NAME, "limit_mbit": {"type": "number", "minimum": 1, "maximum": 10_000_000, "default": 1000}},
}
END = {"type": "object", "required": ["worker", "path"], "properties": {"worker": NAME, "path": {"type": "string", "maxLength": 1024}}}
TRANSFER = {
    "type": "object", "required": ["id", "source", "destination"], "additionalProperties": False,
    "properties": {
        "id": NAME, "source": END, "destination": END, "limit_mbit": {"type": "number", "minimum": 0, "default": 0}, "base": {"type": "string"}, "replace": {"type": "boolean", "default": False},
        "not_before_ms": COUNT,
    },
}
LEASE = {
    "type": "object",
    "properties": {
        "facts": OBJECT, "held": {"type": "array", "items": {"type": "object", "required": ["task", "epoch"]}, "maxItems": 64}, "wait_s": {"type": "number", "minimum": 0, "maximum": 30, "default": 0},
    },
}
REPORT = {
    "type": "object", "required": ["task", "epoch", "state"],
    "properties": {
        "task": {"type": "string"}, "epoch": COUNT, "state": {"enum": ["working", "listening", "done", "failed"]}, "address": {"type": "string"}, "progress": OBJECT, "prediction": OBJECT,
        "root": {"type": "string"}, "result": OBJECT, "error": {"type": "string"}, "final": {"type": "boolean", "default": False},
    },
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the table; `handler` names a method of `HubApi`; `changes`: the placing task does it, which may be busy or find that it `contradicts` what stands; `asks`: an edge answers it now, or does not."""

    method: str
    path: str
    handler: str
    summary: str
    answer: dict[str, Any]
    query: tuple[tuple[str, dict[str, Any], str], ...] = ()
    body: dict[str, Any] | None = None
    open: bool = False
    changes: bool = False
    contradicts: bool = False
    asks: bool = False


_STREAM = ("stream", {"type": "string", "enum": ["decision", "event", "telemetry"]}, "the stream")

OPERATIONS: tuple[Operation, ...] = (
    Operation("get", "/healthz", "healthz", "200 while the hub works, else 503 and why", OBJECT, open=True),
    Operation("get", "/livez", "livez", "200 unless a part of the hub has ended, which only a new start brings back; a broker that is away is none of that", OBJECT, open=True),
    Operation("get", "/readyz", "readyz", "200 once the hub takes records in", OBJECT, open=True),
    Operation("get", "/metrics", "metrics", "Prometheus text", {"type": "string"}, open=True),
    Operation("get", "/openapi.json", "openapi", "This document", OBJECT, open=True),
    Operation("get", "/api/v1/status", "status", "The hub at a glance", OBJECT),
    Operation("get", "/api/v1/hierarchy", "hierarchy", "cloud > region > site > node > edge > device", OBJECT),
    Operation("get", "/api/v1/edges", "edges", "Every edge with presence and marks", LIST),
    Operation("get", "/api/v1/edges/{edge}", "edge", "One edge", OBJECT),
    Operation("get", "/api/v1/edges/{edge}/records", "records", "Records of one stream by sequence number", LIST, (
        _STREAM, ("after", COUNT, "only records after this seq"), ("limit", LIMIT, "at most so many"), ("newest", {"type": "boolean"}, "newest first"),
    )),
    Operation("get", "/api/v1/edges/{edge}/decisions/{seq}", "decision", "One decision with the inputs that led to it", OBJECT),
    Operation("get", "/api/v1/edges/{edge}/desired", "get_desired", "The desired state", OBJECT),
    Operation("put", "/api/v1/edges/{edge}/desired", "put_desired", "Change parts of the desired state", OBJECT, body=CHANGE),
    Operation("post", "/api/v1/edges/{edge}/commands", "command", "Order a command; it waits while the edge is away, until it expires", OBJECT, body=COMMAND),
    Operation("post", "/api/v1/edges/{edge}/release", "release", "End a quarantine", OBJECT),
    Operation("get", "/api/v1/edges/{edge}/verify", "verify", "What the hub can prove of an edge's records by itself", OBJECT),
    Operation("get", "/api/v1/bundles", "bundles", "Update bundles that this hub serves, each with the token that opens it to a device", LIST),
    Operation("get", "/bundles/{bundle}", "bundle", "An update bundle, with ranges; its own token (see /api/v1/bundles), or the hub's", {"type": "string"}),
    Operation("get", "/api/v1/decisions", "decisions", "The newest decisions of all edges", LIST, (
        ("limit", LIMIT, "at most so many"), ("edge", NAME, "of this edge only"),
    )),
    Operation("get", "/api/v1/events", "events", "The newest events of all edges", LIST, (
        ("limit", LIMIT, "at most so many"), ("edge", NAME, "of this edge only"), ("kind", NAME, "of this kind only"),
    )),
    Operation("get", "/api/v1/outages", "outages", "Outages, newest first", LIST, (("hours", {"type": "number", "minimum": 0, "maximum": 8760}, "how far back"),)),
    Operation("get", "/api/v1/errors", "errors", "The last refused messages", LIST),
    Operation("post", "/api/v1/workloads", "submit", "Submit a workload or a list; the same again is answered as it stands", OBJECT, body=WORKLOADS, changes=True),
    Operation("get", "/api/v1/workloads", "workloads", "Workloads, newest first", LIST, (
        ("state", {"enum": ["pending", "placed", "ending", "done", "failed", "cancelled"]}, "in this state only"), ("node", NAME, "on this node only"), ("limit", LIMIT, "at most so many"),
    )),
    Operation("get", "/api/v1/workloads/{workload}", "workload", "One workload with its placements", OBJECT),
    Operation("delete", "/api/v1/workloads/{workload}", "cancel", "Cancel a workload", OBJECT, changes=True),
    Operation("get", "/api/v1/workloads/{workload}/explain", "explain_workload", "Per node, why it will do or will not", OBJECT),
    Operation("post", "/api/v1/workloads/{workload}/operations", "operate", "Take a checkpoint or a snapshot of a workload, go on from a checkpoint, delete one, or make it a micro-VM or a container while it runs; it waits while the edge is away, until it expires", OBJECT, body=OPERATION, contradicts=True),
    Operation("get", "/api/v1/workloads/{workload}/operations", "operations", "Operations on a workload on its present node, newest first", LIST),
    Operation("get", "/api/v1/workloads/{workload}/checkpoints", "checkpoints", "The checkpoints of a workload on its present node, the oldest first", LIST),
    Operation("get", "/api/v1/workloads/{workload}/snapshots", "snapshots", "The snapshots of a workload on its present node, the oldest first", LIST),
    Operation("get", "/api/v1/workloads/{workload}/logs", "logs", "The end of what a workload has written, asked of its edge now; with since, what came after an earlier answer", OBJECT, (
        ("bytes", {"type": "integer", "minimum": 1, "maximum": 262_144, "default": 262_144}, "of each stream at most so many"), ("since", {"type": "string", "maxLength": 128}, "an earlier answer's `since`"),
    ), asks=True),
    Operation("post", "/api/v1/workloads/{workload}/exec", "execute", "Run a command in a workload, where its edge lets the hub do that (workloads.exec)", OBJECT, body=EXECUTE, asks=True),
    Operation("post", "/api/v1/what-if", "what_if", "Where workloads would go, what would move, and which deadlines would be promised, if; changes nothing", OBJECT, body=WHAT_IF, contradicts=True),
    Operation("get", "/api/v1/nodes", "nodes", "Nodes by name: what each has and what is in use", LIST, (("limit", {"type": "integer", "minimum": 1, "default": 10_000}, "at most so many"),)),
    Operation("put", "/api/v1/nodes/{node}", "put_node", "Declare a node that has no agent", OBJECT, body=NODE, changes=True),
    Operation("delete", "/api/v1/nodes/{node}", "delete_node", "Take a node out; what it held is placed anew", OBJECT, (
        ("lost", {"type": "boolean", "default": False}, "also where its site may have moved workloads of it to another node by itself: those do not run any more either"),
    ), changes=True),
    Operation("post", "/api/v1/nodes/{node}/drain", "drain", "Move away what is there; it takes nothing new", OBJECT, changes=True),
    Operation("post", "/api/v1/nodes/{node}/cordon", "cordon", "It takes nothing new", OBJECT, changes=True),
    Operation("post", "/api/v1/nodes/{node}/uncordon", "uncordon", "It takes workloads again", OBJECT, changes=True),
    Operation("get", "/api/v1/nodes/{node}/drain", "draining", "What is still on a node: how far its move is, or why it stays", LIST),
    Operation("get", "/api/v1/moves", "moves", "Moves of workloads with their state, newest first", LIST, (("limit", LIMIT, "at most so many"),)),
    Operation("post", "/api/v1/moves", "move", "Move a running workload with its state to a node, or to the best one", OBJECT, body=MOVE, changes=True),
    Operation("delete", "/api/v1/moves/{move}", "cancel_move", "End a move; what was taken goes on where it was", OBJECT, changes=True),
    Operation("get", "/api/v1/rebalance", "rebalances", "Rebalancing operations, newest first", LIST),
    Operation("post", "/api/v1/rebalance", "rebalance", "Plan moves that rebalance the cluster, or empty nodes; with go, carry them out step by step", OBJECT, body=REBALANCE, changes=True),
    Operation("delete", "/api/v1/rebalance/{rebalance}", "cancel_rebalance", "Begin no more of its moves", OBJECT, changes=True),
    Operation("get", "/api/v1/budgets", "budgets", "Disruption budgets", LIST),
    Operation("put", "/api/v1/budgets/{budget}", "put_budget", "Allow so many of the selected workloads to be moved at once", OBJECT, body=BUDGET, changes=True),
    Operation("delete", "/api/v1/budgets/{budget}", "delete_budget", "Forget a budget", OBJECT, changes=True),
    Operation("get", "/api/v1/quotas", "quotas", "What tenants may use", LIST),
    Operation("put", "/api/v1/quotas/{tenant}", "put_quota", "Say what a tenant may use, and borrow from its cohort", OBJECT, body=QUOTA, changes=True),
    Operation("delete", "/api/v1/quotas/{tenant}", "delete_quota", "Let a tenant use what there is", OBJECT, changes=True),
    Operation("post", "/api/v1/transfers", "submit_transfer", "Move a file or disk from one migration worker to another; the same again is answered as it stands", OBJECT, body=TRANSFER, contradicts=True),
    Operation("get", "/api/v1/transfers", "transfers", "Transfers, newest first", LIST, (("limit", LIMIT, "at most so many"),)),
    Operation("get", "/api/v1/transfers/{transfer}", "transfer", "One transfer: its sides, how far it is, what was expected", OBJECT),
    Operation("delete", "/api/v1/transfers/{transfer}", "cancel_transfer", "End a transfer", OBJECT),
    Operation("get", "/api/v1/migration-workers", "migration_workers", "Migration workers that were seen", LIST),
    Operation("get", "/api/v1/migration-workers/{worker}/token", "migration_worker_token", "The token by which a worker of that name may ask for its tasks, and nothing else", OBJECT),
    Operation("post", "/api/v1/migration-workers/{worker}/lease", "lease_transfers", "For workers: what to do, and what to stop", OBJECT, body=LEASE),
    Operation("post", "/api/v1/migration-workers/{worker}/report", "report_transfer", "For workers: how a task stands; says whether to go on", OBJECT, body=REPORT),
    Operation("get", "/api/v1/scheduler", "scheduler", "Use of the cluster now and by the minute, counts, latencies", OBJECT, (
        ("hours", {"type": "number", "minimum": 0, "maximum": 168}, "how far back"),
    )),
)

IN_PATH = {"edge": NAME, "seq": COUNT, "workload": NAME, "node": NAME, "budget": NAME, "tenant": NAME, "rebalance": NAME, "move": NAME, "transfer": NAME, "worker": NAME, "bundle": NAME}


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": schema} for name, schema in IN_PATH.items() if f"{{{name}}}" in operation.path
        ]
        parameters += [{"name": name, "in": "query", "schema": schema, "description": text} for name, schema, text in operation.query]
        kind = {"metrics": "text/plain", "bundle": "application/octet-stream"}.get(operation.handler, "application/json")
        responses: dict[str, Any] = {"200": {"description": operation.summary, "content": {kind: {"schema": operation.answer}}}}
        error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
        if operation.handler in ("healthz", "livez", "readyz"):
            responses["503"] = {"description": "not well", "content": {"application/json": {"schema": OBJECT}}}
        if not operation.open:
            responses["401"] = {"description": "no valid token", **error}
            responses["400"] = {"description": "a field is wrong; it is named", **error}
        if operation.asks:
            responses["503"] = {"description": "the edge does not answer", **error}
        if operation.changes or operation.contradicts or operation.asks:
            responses["409"] = {"description": "it contradicts what stands", **error}
        if operation.changes:
            responses["503"] = {"description": "busy, or the store refused: nothing was done", **error}
        if any(f"{{{name}}}" in operation.path for name in ("edge", "workload", "node", "budget", "tenant", "rebalance", "transfer")):
            responses["404"] = {"description": "not known", **error}
        if operation.body is not None:
            responses["413"] = {"description": "the body is too large", **error}
        entry: dict[str, Any] = {"operationId": operation.handler, "summary": operation.summary, "responses": responses}
        if parameters:
            entry["parameters"] = parameters
        if operation.body is not None:
            entry["requestBody"] = {"required": True, "content": {"application/json": {"schema": operation.body}}}
        if operation.open:
            entry["security"] = []
        paths.setdefault(operation.path, {})[operation.method] = entry
    return {
        "openapi": "3.1.0",
        "info": {"title": "NovaCron hub", "version": __version__, "summary": "Edges, their records and their desired state", "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "security": [{"bearer": []}],
        "components": {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}, "schemas": {"Error": ERROR}},
        "paths": paths,
    }
