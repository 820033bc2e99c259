"""The API as one table: method, path, what it does, what it takes. Routes and the OpenAPI document both come from it."""

from dataclasses import dataclass
from typing import Any

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
        "expires_ms": COUNT,
    },
}
COMMAND = {
    "type": "object", "required": ["device", "name"],
    "properties": {
        "id": NAME, "device": NAME, "name": NAME, "args": OBJECT, "expires_seconds": {"type": "number", "exclusiveMinimum": 0, "maximum": 2_592_000, "default": 300},
    },
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the table; `handler` names a method of `HubApi`."""

    method: str
    path: str
    handler: str
    summary: str
    answer: dict[str, Any]
    query: tuple[tuple[str, dict[str, Any], str], ...] = ()
    body: dict[str, Any] | None = None
    open: bool = False


_STREAM = ("stream", {"type": "string", "enum": ["decision", "event", "telemetry"]}, "the stream")

OPERATIONS: tuple[Operation, ...] = (
    Operation("get", "/healthz", "healthz", "200 while the hub works, else 503 and why", OBJECT, open=True),
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
    Operation("get", "/api/v1/decisions", "decisions", "The newest decisions of all edges", LIST, (
        ("limit", LIMIT, "at most so many"), ("edge", NAME, "of this edge only"),
    )),
    Operation("get", "/api/v1/events", "events", "The newest events of all edges", LIST, (
        ("limit", LIMIT, "at most so many"), ("edge", NAME, "of this edge only"), ("kind", NAME, "of this kind only"),
    )),
    Operation("get", "/api/v1/outages", "outages", "Outages, newest first", LIST, (("hours", {"type": "number", "minimum": 0, "maximum": 8760}, "how far back"),)),
    Operation("get", "/api/v1/errors", "errors", "The last refused messages", LIST),
)


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": COUNT if name == "seq" else NAME}
            for name in ("edge", "seq") if f"{{{name}}}" in operation.path
        ]
        parameters += [{"name": name, "in": "query", "schema": schema, "description": text} for name, schema, text in operation.query]
        kind = "text/plain" if operation.handler == "metrics" else "application/json"
        responses: dict[str, Any] = {"200": {"description": operation.summary, "content": {kind: {"schema": operation.answer}}}}
        error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
        if operation.handler in ("healthz", "readyz"):
            responses["503"] = {"description": "not well", "content": {"application/json": {"schema": OBJECT}}}
        if not operation.open:
            responses["401"] = {"description": "no valid token", **error}
            responses["400"] = {"description": "a field is wrong; it is named", **error}
        if "{edge}" in operation.path:
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
