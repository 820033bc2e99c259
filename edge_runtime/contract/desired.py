"""Desired state: what comes down. One document per edge; its generation only grows; the whole document is applied or none of it."""

from typing import Any

from .errors import ContractError
from .lean_dataclass import dataclass, field
from .limits import MAX_COMMANDS, MAX_INTEGER, MAX_MODELS, MAX_OPERATIONS, MAX_RULES, MAX_TWINS, MAX_WORKLOADS, PROTOCOL_VERSION
from .schema import ID_PATTERN, VERSION, Field, Message
from .topics import EDGE_DESIRED
from .updates import UPDATE_FIELDS, check_order
from .workloads import OPERATION_FIELDS, WORKLOAD_FIELDS

COMMAND_FIELDS = (
    Field("id", "id", "the command's name, unique; a device that sees it twice does it once"),
    Field("device", "id", "the device that shall do it"),
    Field("name", "id", "what to do"),
    Field("args", "object", "its arguments", required=False, default={}),
    Field("expires_ms", "integer", "wall time after which it must not be done, milliseconds since 1970 UTC", minimum=0),
)

_SPEC_FIELDS = (
    Field("rules", "array", "the rules to decide by; absent keeps the edge's own", required=False, default=None, max_items=MAX_RULES),
    Field("models", "array", "models: manifest and data_b64", required=False, default=[], max_items=MAX_MODELS),
    Field("twins", "object", "device to desired twin state", required=False, default={}, max_items=MAX_TWINS),
    Field("commands", "array", "commands that wait", required=False, default=[], max_items=MAX_COMMANDS, items=COMMAND_FIELDS),
    Field("workloads", "array", "workloads that shall run here, and those that shall stop", required=False, default=[], max_items=MAX_WORKLOADS, items=WORKLOAD_FIELDS),
    Field("operations", "array", "what shall be done with workloads that are here", required=False, default=[], max_items=MAX_OPERATIONS, items=OPERATION_FIELDS),
    Field("update", "object", "an update of the image that the edge runs from; absent: none is wanted", required=False, default=None, items=UPDATE_FIELDS),
)


def _check_spec(message: dict[str, Any]) -> None:
    for device, twin in message["spec"]["twins"].items():
        if not ID_PATTERN.match(device):
            raise ContractError("spec.twins", f"{device[:80]!r} is not a device name", "use letters, digits, _ . : -", "name")
        if not isinstance(twin, dict):
            raise ContractError(f"spec.twins.{device}", f"is {type(twin).__name__}, not an object", "send {property: value}", "type")
    for kind in ("rules", "models"):
        for index, entry in enumerate(message["spec"][kind] or ()):
            if not isinstance(entry, dict):
                raise ContractError(f"spec.{kind}[{index}]", f"is {type(entry).__name__}, not an object", "send a JSON object", "type")
    if message["spec"]["update"] is not None:
        check_order(message["spec"]["update"], "spec.update.")
    for kind in ("commands", "operations"):
        seen: set[str] = set()
        for index, entry in enumerate(message["spec"][kind]):
            if entry["id"] in seen:
                raise ContractError(f"spec.{kind}[{index}].id", f"{entry['id']!r} stands twice", f"give each of the {kind} its own id", "duplicate")
            seen.add(entry["id"])
    placed: set[tuple[str, int]] = set()
    for index, workload in enumerate(message["spec"]["workloads"]):
        if (workload["id"], workload["epoch"]) in placed:
            raise ContractError(f"spec.workloads[{index}].epoch", f"{workload['id']!r} stands twice with epoch {workload['epoch']}", "list each placement once", "duplicate")
        placed.add((workload["id"], workload["epoch"]))


DESIRED = Message(
    name="desired state",
    topic=EDGE_DESIRED,
    direction="hub to edge",
    retained=True,
    doc="What the hub wants of the edge. Kept by the edge across restarts; refused as a whole, naming the field, when any part is wrong.",
    fields=(
        VERSION,
        Field("edge", "id", "the edge's name"),
        Field("generation", "integer", "grows with every change; an edge ignores what is not newer", minimum=1),
        Field("issued_ms", "integer", "when the hub wrote it, milliseconds since 1970 UTC", required=False, default=0, minimum=0),
        Field("expires_ms", "integer", "not applied for the first time after this; 0 for never", required=False, default=0, minimum=0, maximum=MAX_INTEGER),
        Field("spec", "object", "the state itself", items=_SPEC_FIELDS),
    ),
    after=_check_spec,
    example={
        "v": 1, "edge": "gw-1", "generation": 7, "issued_ms": 1795500000000, "expires_ms": 0,
        "spec": {
            "rules": [{"id": "overheat", "on": {"device": "boiler-*", "metric": "temp"}, "if": {"value": "temp", "op": ">", "than": 80},
                       "then": [{"alert": {"severity": "warning", "text": "temp {temp} of {device}"}}]}],
            "models": [], "twins": {"fan-1": {"speed": 3}},
            "commands": [{"id": "c-81", "device": "fan-1", "name": "on", "args": {}, "expires_ms": 1795500060000}],
            "workloads": [
                {"id": "camera-7", "epoch": 3, "wanted": "running", "kind": "container", "image": "registry.example/camera:2", "requests": {"cpu": 500, "memory": 268435456},
                 "gpus": [], "numa": [], "document": {"id": "camera-7", "image": "registry.example/camera:2", "requests": {"cpu": "500m", "memory": "256Mi"}}},
                {"id": "old-job", "epoch": 1, "wanted": "stopped"},
            ],
            "operations": [{"id": "o-17", "kind": "checkpoint", "workload": "camera-7", "epoch": 3, "name": "before-update", "stop": False, "expires_ms": 1795500060000}],
        },
    },
)


@dataclass(frozen=True, slots=True)
class Desired:
    """A validated desired state."""

    edge: str
    generation: int
    issued_ms: int = 0
    expires_ms: int = 0
    rules: list[dict[str, Any]] | None = None
    models: list[dict[str, Any]] = field(default_factory=list)
    twins: dict[str, dict[str, Any]] = field(default_factory=dict)
    commands: list[dict[str, Any]] = field(default_factory=list)
    workloads: list[dict[str, Any]] = field(default_factory=list)
    operations: list[dict[str, Any]] = field(default_factory=list)
    update: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The document as it travels."""
        spec: dict[str, Any] = {"models": self.models, "twins": self.twins, "commands": self.commands}
        if self.rules is not None:
            spec["rules"] = self.rules
        if self.workloads:  # absent where there are none: an edge from before workloads gets the document it knows
            spec["workloads"] = self.workloads
        if self.operations:
            spec["operations"] = self.operations
        if self.update is not None:
            spec["update"] = self.update
        return {
            "v": PROTOCOL_VERSION, "edge": self.edge, "generation": self.generation, "issued_ms": self.issued_ms,
            "expires_ms": self.expires_ms, "spec": spec,
        }


def parse_desired(value: Any, edge: str) -> Desired:
    """A decoded payload as desired state for `edge`; raises `ContractError` naming the field."""
    data = DESIRED.parse(value)
    if data["edge"] != edge:
        raise ContractError("edge", f"is for {data['edge']!r}, not {edge!r}", "publish on that edge's topic", "topic")
    spec = data["spec"]
    return Desired(
        edge, data["generation"], data["issued_ms"], data["expires_ms"], spec["rules"], spec["models"], spec["twins"], spec["commands"], spec["workloads"], spec["operations"], spec["update"],
    )
