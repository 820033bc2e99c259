"""Messages among the edges of one site, on the local bus that they share: who is there, who leads, who serves which device.

Every member gets every message back, its own too, in the one order in which the broker took them. `docs/site.md` says what follows from that.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import jsoncodec
from .errors import ContractError
from .jsoncodec import check_tree
from .limits import (
    MAX_DUTY_BYTES,
    MAX_DUTY_PATTERNS,
    MAX_INTEGER,
    MAX_MODELS,
    MAX_RULES,
    MAX_SHARED_WORKLOADS,
    MAX_SITE_DEVICES,
    MAX_SITE_NUMBER,
    MAX_SITE_WORKLOADS,
    MAX_WORKLOADS,
    PROTOCOL_VERSION,
)
from .schema import ID_PATTERN, VERSION, Field, Message
from .topics import SITE_CLAIM, SITE_DUTY, SITE_LOAD, SITE_MEMBER, SITE_SPEC, SITE_TABLE
from .workloads import ENDED, WORKLOAD_FIELDS

PATTERN = re.compile(r"[A-Za-z0-9_.:*?-]{1,64}\Z")
"""A pattern of device names; `*` and `?` match."""

WORKLOAD = "workload/"
"""Before a workload's name where duties are keyed by what they are for; no device's name has a slash."""

SHARED_FIELDS = (
    *WORKLOAD_FIELDS,
    Field("for", "string", "who has it from the hub, where the site gave it to the sender", required=False, default="", max_items=64),
    Field("generation", "integer", "the desired state of whoever has it from the hub", required=False, default=0, minimum=0),
)
"""One workload that siblings may take over."""


def is_workload(key: str) -> bool:
    """Whether a duty is for a workload."""
    return key.startswith(WORKLOAD)


_SITE = Field("site", "id", "the site's name")
_EDGE = Field("edge", "id", "the member that speaks")


def _number(doc: str, name: str = "number") -> Field:
    return Field(name, "integer", doc, minimum=0, maximum=MAX_SITE_NUMBER)


def _check_member(message: dict[str, Any]) -> None:
    check_patterns(message["duties"], "duties")
    for key in ("leader", "run_leader"):
        if message[key] and not ID_PATTERN.match(message[key]):
            raise ContractError(key, f"{message[key][:80]!r} is not a name", "send the leader of the table in force, or nothing", "name")


def check_patterns(patterns: Any, field: str) -> None:
    """Raise `ContractError` naming `field` where an entry is no pattern of device names."""
    for index, pattern in enumerate(patterns):
        if not isinstance(pattern, str) or not PATTERN.match(pattern):
            raise ContractError(f"{field}[{index}]", f"{str(pattern)[:80]!r} is not a pattern of device names", "use letters, digits, _ . : - and * ?, 64 at most", "name")


MEMBER = Message(
    name="site member", topic=SITE_MEMBER, direction="edge to the edges of its site", retained=False,
    doc="A sign of life, once a second, and at once when a table has been taken over. Its return to the sender within the lease is the sender's right to act.",
    fields=(
        VERSION, _SITE, _EDGE,
        Field("boot", "id", "the boot that speaks"),
        Field("session", "integer", "the connection it was sent on, counted from 1 within the boot", minimum=1),
        Field("sent", "integer", "when it was sent, milliseconds of the sender's boot-time clock", minimum=0),
        _number("the highest number that the sender knows of"),
        _number("the number of the table that the sender goes by, 0 for none: it has stopped with everything that this table gives to others", "table"),
        Field("leader", "string", "the leader of that table, empty for none", required=False, default="", max_items=64),
        Field("capacity", "number", "how much it can take on, compared with the others", minimum=0, maximum=1_000_000),
        Field("load", "integer", "devices it serves", minimum=0, maximum=MAX_SITE_DEVICES),
        Field("duties", "array", "patterns of the devices that have their home here", required=False, default=[], max_items=MAX_DUTY_PATTERNS),
        Field("leads", "boolean", "it is the leader"),
        Field("leaving", "boolean", "its last message: it has stopped with every device; its workloads may go on", required=False, default=False),
        Field("run_table", "integer", "the same of the table's workloads, which take longer to stop", required=False, default=0, minimum=0, maximum=MAX_SITE_NUMBER),
        Field("run_leader", "string", "the leader of that one", required=False, default="", max_items=64),
        Field("hub", "boolean", "it is connected to its hub; where it is not said it may be", required=False, default=True),
    ),
    after=_check_member,
    example={
        "v": 1, "site": "plant-a", "edge": "gw-1", "boot": "6f1c0a9e2b7d4c55", "session": 1, "sent": 8123456, "number": 7, "table": 7, "leader": "gw-2", "capacity": 1.0,
        "load": 3, "duties": ["boiler-*"], "leads": False, "leaving": False, "run_table": 7, "run_leader": "gw-2", "hub": True,
    },
)
CLAIM = Message(
    name="site claim", topic=SITE_CLAIM, direction="edge to the edges of its site", retained=False,
    doc="A claim to lead. The first claim of a number that is higher than every number before wins; all see the same first one.",
    fields=(VERSION, _SITE, _EDGE, _number("the highest known number and one more")),
    example={"v": 1, "site": "plant-a", "edge": "gw-2", "number": 7},
)


def _check_table(message: dict[str, Any]) -> None:
    for device, entry in message["duties"].items():
        where = f"duties.{device[:80]}"
        if not ID_PATTERN.match(device):
            raise ContractError(where, "is not a device name", "use letters, digits, _ . : -", "name")
        if not isinstance(entry, list) or len(entry) != 3:
            raise ContractError(where, "is not [edge, fence, origin]", "send the serving edge, the number it was given at, and whose rules decide", "type")
        _check_entry(entry, where, message["number"])
    for workload, entry in message["workloads"].items():
        where = f"workloads.{workload[:80]}"
        if not ID_PATTERN.match(workload):
            raise ContractError(where, "is not a workload's name", "use letters, digits, _ . : -", "name")
        if not isinstance(entry, list) or len(entry) != 4 or type(entry[3]) is not int or not 1 <= entry[3] <= MAX_INTEGER:
            raise ContractError(where, "is not [edge, fence, origin, epoch]", "send who may run it, the number it was given at, who had it from the hub, and its epoch", "type")
        _check_entry(entry, where, message["number"])


def _check_entry(entry: list[Any], where: str, number: int) -> None:
    if not isinstance(entry[0], str) or type(entry[1]) is not int or not isinstance(entry[2], str):
        raise ContractError(where, "is not [edge, fence, origin, ...]", "send an edge, a number, an edge", "type")
    if not ID_PATTERN.match(entry[0]) or not ID_PATTERN.match(entry[2]):
        raise ContractError(where, "names an edge that is no name", "use letters, digits, _ . : -", "name")
    if not 1 <= entry[1] <= number:
        raise ContractError(where, f"fence {entry[1]} is outside 1..{number}", "send the number of the table that gave the duty", "limit")


TABLE = Message(
    name="site table", topic=SITE_TABLE, direction="edge to the edges of its site", retained=True,
    doc="Who serves which device, written by the leader. `number` grows with every election and every change and never goes back.",
    fields=(
        VERSION, _SITE, Field("number", "integer", "the number of this table", minimum=1, maximum=MAX_SITE_NUMBER), Field("leader", "id", "who wrote it"),
        Field("duties", "object", "device to [edge that serves it, number at which it was given to it, edge whose rules decide]", max_items=MAX_SITE_DEVICES),
        Field("workloads", "object", "workload to [edge that may run it, number at which it was given to it, edge that has it from the hub, epoch]", required=False, default={}, max_items=MAX_SITE_WORKLOADS),
    ),
    after=_check_table,
    example={"v": 1, "site": "plant-a", "number": 7, "leader": "gw-2", "duties": {"boiler-1": ["gw-1", 3, "gw-1"], "pump-1": ["gw-2", 7, "gw-3"]}, "workloads": {"camera-7": ["gw-2", 7, "gw-3", 3]}},
)


def _check_spec(message: dict[str, Any]) -> None:
    check_patterns(message["duties"], "duties")
    for index, rule in enumerate(message["rules"]):
        if not isinstance(rule, dict):
            raise ContractError(f"rules[{index}]", f"is {type(rule).__name__}, not an object", "send a JSON object", "type")
    for index, entry in enumerate(message["small_models"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("manifest"), dict) or not isinstance(entry.get("data_b64"), str):
            raise ContractError(f"small_models[{index}]", "has no manifest or no data_b64", "send both", "missing")
    for name, digest in message["models"].items():
        if not isinstance(digest, str) or len(digest) > 64:
            raise ContractError(f"models.{name[:64]}", "is not a digest", "send the SHA-256 of the model's data", "type")


SPEC = Message(
    name="site spec", topic=SITE_SPEC, direction="edge to the edges of its site", retained=True,
    doc="What a sibling needs to do this edge's duties. All of them together are the site's view of desired state while no hub is there.",
    fields=(
        VERSION, _SITE, _EDGE,
        Field("generation", "integer", "the desired state that the rules come from, 0 for the edge's own", minimum=0),
        Field("rules", "array", "the rules in force", max_items=MAX_RULES),
        Field("models", "object", "name of each loaded model to the SHA-256 of its data: a sibling uses its own model of that digest", required=False, default={}, max_items=MAX_MODELS * 4),
        Field("small_models", "array", "models of the desired state that are small enough to travel: manifest and data_b64", required=False, default=[], max_items=MAX_MODELS),
        Field("duties", "array", "patterns of the devices that have their home there", required=False, default=[], max_items=MAX_DUTY_PATTERNS),
    ),
    after=_check_spec,
    example={
        "v": 1, "site": "plant-a", "edge": "gw-1", "generation": 7, "models": {}, "duties": ["boiler-*"],
        "rules": [{"id": "overheat", "on": {"device": "boiler-*", "metric": "temp"}, "if": {"value": "temp", "op": ">", "than": 80},
                   "then": [{"alert": {"severity": "warning", "text": "temp {temp} of {device}"}}]}],
    },
)


def _check_duty(message: dict[str, Any]) -> None:
    check_tree(message["state"], "state")
    check_tree(message["twin"], "twin")


DUTY = Message(
    name="site duty", topic=SITE_DUTY, direction="edge to the edges of its site", retained=True,
    doc="The hand-over state of one device, written by the edge that serves it together with the commands of the decision that changed it.",
    fields=(
        VERSION, _SITE, _EDGE, Field("device", "id", "the device"), Field("origin", "id", "the edge whose rules decide"),
        Field("fence", "integer", "the number at which the duty was given to the writer", minimum=1, maximum=MAX_SITE_NUMBER),
        Field("released", "boolean", "the writer has stopped serving it", required=False, default=False),
        Field("state", "object", "latches and timers of its rules", required=False, default={}, max_items=16),
        Field("twin", "object", "what the device is, its reported and desired state", required=False, default={}, max_items=16),
    ),
    after=_check_duty,
    example={
        "v": 1, "site": "plant-a", "edge": "gw-1", "device": "boiler-1", "origin": "gw-1", "fence": 3, "released": False,
        "state": {"rules": {"overheat": "5e0c2d9a52a3c1f3"}, "states": [["overheat", "boiler-1", True, 1200, 1200]]}, "twin": {},
    },
)


def _check_load(message: dict[str, Any]) -> None:
    check_tree(message["capacity"], "capacity")
    for key in ("others", "entries"):
        check_tree(message[key], key)
    for index, other in enumerate(message["others"]):
        if not isinstance(other, dict) or not isinstance(other.get("id"), str):
            raise ContractError(f"others[{index}]", "is not a document with an id", "send what it asks for", "type")
    for name, state in message["ended"].items():
        if state not in ENDED:
            raise ContractError(f"ended.{name[:80]}", f"{str(state)[:40]!r} is no end", f"send one of {', '.join(sorted(ENDED))}", "type")


LOAD = Message(
    name="site load", topic=SITE_LOAD, direction="edge to the edges of its site", retained=True,
    doc="What an edge has for workloads and what it shall run: what a sibling needs to take its workloads over while no hub is there.",
    fields=(
        VERSION, _SITE, _EDGE,
        Field("generation", "integer", "the desired state that it comes from", minimum=0),
        Field("capacity", "object", "the body of its node.capacity record; empty where it is not known yet", required=False, default={}, max_items=64),
        Field("entries", "array", "workloads that siblings may take over: entries of desired state, for and generation where the site gave them to it", required=False, default=[],
              max_items=MAX_SHARED_WORKLOADS, items=SHARED_FIELDS),
        Field("others", "array", "what else runs there, as far as it matters to where something fits: id, requests, labels, namespace, anti_affinity", required=False, default=[], max_items=MAX_WORKLOADS),
        Field("ended", "object", "workload/epoch to how it ended there, or why it cannot run there", required=False, default={}, max_items=2 * MAX_WORKLOADS),
    ),
    after=_check_load,
    example={
        "v": 1, "site": "plant-a", "edge": "gw-1", "generation": 7, "capacity": {"kind": "edge", "capacity": {"cpu": "3750m", "memory": 8000000000}, "runs": ["container"]},
        "entries": [{"id": "camera-7", "epoch": 3, "wanted": "running", "kind": "container", "image": "registry.example/camera:2", "requests": {"cpu": 500}, "gpus": [], "numa": [],
                     "document": {"id": "camera-7", "when_cut_off": "move"}, "for": "", "generation": 7}],
        "others": [{"id": "meter", "requests": {"cpu": "250m"}}], "ended": {"old-job/2": "failed"},
    },
)


@dataclass(frozen=True, slots=True)
class Duty:
    """One entry of the table: who serves the device (may run the workload), the number at which it was given to it, whose rules decide (who has it from the hub), a workload's epoch."""

    edge: str
    fence: int
    origin: str
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """Who serves which device, and who may run which workload (`WORKLOAD` and its name). Two tables are the same where number and leader are."""

    number: int
    leader: str
    duties: Mapping[str, Duty]

    @property
    def identity(self) -> tuple[int, str]:
        """Number and leader."""
        return self.number, self.leader

    def to_json(self, site: str) -> dict[str, Any]:
        """The table as it travels."""
        duties = {device: [duty.edge, duty.fence, duty.origin] for device, duty in self.duties.items() if not is_workload(device)}
        out = {"v": PROTOCOL_VERSION, "site": site, "number": self.number, "leader": self.leader, "duties": duties}
        workloads = {key.removeprefix(WORKLOAD): [duty.edge, duty.fence, duty.origin, duty.epoch] for key, duty in self.duties.items() if is_workload(key)}
        return {**out, "workloads": workloads} if workloads else out  # absent where there are none: a member from before workloads gets the table it knows


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life of one member; see `MEMBER`."""

    edge: str
    boot: str
    session: int
    sent_ms: int
    number: int
    table: int
    leader: str
    capacity: float
    load: int
    duties: tuple[str, ...]
    leads: bool
    leaving: bool = False
    hub: bool = False
    run_table: int = 0
    run_leader: str = ""

    def to_json(self, site: str) -> dict[str, Any]:
        """The message as it travels."""
        return {
            "v": PROTOCOL_VERSION, "site": site, "edge": self.edge, "boot": self.boot, "session": self.session, "sent": self.sent_ms, "number": self.number,
            "table": self.table, "leader": self.leader, "capacity": self.capacity, "load": self.load, "duties": list(self.duties), "leads": self.leads,
            "leaving": self.leaving, "run_table": self.run_table, "run_leader": self.run_leader, "hub": self.hub,
        }


def parse(message: Message, payload: bytes, site: str, name: str = "") -> dict[str, Any]:
    """A payload of `site` as the fields of `message`; `name` is the last level of its topic, where it has one.

    Raises:
        ContractError: a field that does not fit, another site's message, or a name that is not the topic's.
    """
    data = message.parse(jsoncodec.decode(payload, MAX_DUTY_BYTES) if message is DUTY else jsoncodec.decode(payload))
    if data["site"] != site:
        raise ContractError("site", f"{data['site']!r} is not {site!r}", "publish on the topics of your own site", "topic")
    field = "device" if message is DUTY else "edge"
    if name and data[field] != name:
        raise ContractError(field, f"{data[field]!r} published on the topic of {name!r}", "publish on the topic of that name", "topic")
    return data


def parse_heartbeat(payload: bytes, site: str, edge: str) -> Heartbeat:
    """A sign of life from the topic of `edge`; raises `ContractError`."""
    data = parse(MEMBER, payload, site, edge)
    return Heartbeat(
        data["edge"], data["boot"], data["session"], data["sent"], data["number"], data["table"], data["leader"], float(data["capacity"]), data["load"],
        tuple(data["duties"]), data["leads"], data["leaving"], data["hub"], data["run_table"], data["run_leader"],
    )


def parse_table(payload: bytes, site: str) -> Table:
    """A table of `site`; raises `ContractError`."""
    data = parse(TABLE, payload, site)
    workloads = {WORKLOAD + workload: Duty(*entry) for workload, entry in data["workloads"].items()}
    return Table(data["number"], data["leader"], {**{device: Duty(*entry) for device, entry in data["duties"].items()}, **workloads})
