"""MQTT topics: how they are built and how they are read. Names only; what travels on them is in the message modules."""

from .errors import ContractError
from .limits import PROTOCOL_VERSION
from .schema import ID_PATTERN

ROOT = f"novacron/{PROTOCOL_VERSION}"

EDGE_UP = f"{ROOT}/edge/<edge>/up"
EDGE_STATUS = f"{ROOT}/edge/<edge>/status"
EDGE_RECEIPTS = f"{ROOT}/edge/<edge>/receipts"
EDGE_DESIRED = f"{ROOT}/edge/<edge>/desired"
EDGE_ASK = f"{ROOT}/edge/<edge>/ask"
EDGE_ANSWER = f"{ROOT}/edge/<edge>/answer"
HUB_STATUS = f"{ROOT}/hub/status"
DEVICE_TELEMETRY = f"{ROOT}/device/<device>/telemetry"
DEVICE_REGISTER = f"{ROOT}/device/<device>/register"
DEVICE_REPORTED = f"{ROOT}/device/<device>/reported"
DEVICE_DESIRED = f"{ROOT}/device/<device>/desired"
DEVICE_COMMAND = f"{ROOT}/device/<device>/command"
DEVICE_RESULT = f"{ROOT}/device/<device>/result"

SITE_MEMBER = f"{ROOT}/site/<site>/member/<edge>"
SITE_CLAIM = f"{ROOT}/site/<site>/claim"
SITE_TABLE = f"{ROOT}/site/<site>/table"
SITE_SPEC = f"{ROOT}/site/<site>/spec/<edge>"
SITE_DUTY = f"{ROOT}/site/<site>/duty/<device>"

SITE_LOAD = f"{ROOT}/site/<site>/load/<edge>"

SITE_LEAVES = {"member": True, "claim": False, "table": False, "spec": True, "duty": True, "load": True}
"""What stands behind `site/<site>/`, and whether a name follows."""

EDGE_LEAVES = ("up", "status", "receipts", "desired", "ask", "answer")
DEVICE_LEAVES = ("telemetry", "register", "reported", "desired", "command", "result")


def edge_topic(edge: str, leaf: str) -> str:
    """`novacron/1/edge/<edge>/<leaf>`; `leaf` is one of `EDGE_LEAVES`."""
    return f"{ROOT}/edge/{edge}/{leaf}"


def device_topic(device: str, leaf: str) -> str:
    """`novacron/1/device/<device>/<leaf>`; `leaf` is one of `DEVICE_LEAVES`."""
    return f"{ROOT}/device/{device}/{leaf}"


def site_topic(site: str, leaf: str, name: str = "") -> str:
    """`novacron/1/site/<site>/<leaf>[/<name>]`; `leaf` is one of `SITE_LEAVES`."""
    return f"{ROOT}/site/{site}/{leaf}/{name}" if name else f"{ROOT}/site/{site}/{leaf}"


def site_subscriptions(site: str) -> tuple[str, ...]:
    """What a member of a site subscribes to on the shared bus: everything of its site, its own messages too (their return is its lease)."""
    return tuple(site_topic(site, leaf, "+" if named else "") for leaf, named in SITE_LEAVES.items())


def hub_subscriptions(shared_group: str = "") -> tuple[str, ...]:
    """What a hub subscribes to; with `shared_group` (MQTT 5) the batches are shared among the hubs of that group."""
    prefix = f"$share/{shared_group}/" if shared_group else ""
    return (f"{prefix}{ROOT}/edge/+/up", f"{ROOT}/edge/+/status", f"{ROOT}/edge/+/answer")


def edge_subscriptions(edge: str) -> tuple[str, ...]:
    """What an edge subscribes to on its uplink."""
    return (edge_topic(edge, "receipts"), edge_topic(edge, "desired"), edge_topic(edge, "ask"), HUB_STATUS)


def bus_subscriptions() -> tuple[str, ...]:
    """What an edge subscribes to on its local bus: what devices say. Not `#`: the edge's own commands would come back to it."""
    return tuple(f"{ROOT}/device/+/{leaf}" for leaf in ("telemetry", "register", "reported", "result"))


def parse(topic: str, scope: str, leaves: tuple[str, ...]) -> tuple[str, str]:
    """`(name, leaf)` of an edge or device topic.

    Args:
        topic: as received.
        scope: `edge` or `device`.
        leaves: which last levels are expected.

    Raises:
        ContractError: a topic outside the contract (reason `topic`) or a name that is none (reason `name`).
    """
    parts = topic.split("/")
    if len(parts) != 5 or parts[0] != "novacron" or parts[2] != scope or parts[4] not in leaves:
        raise ContractError("topic", f"{topic[:120]!r} is not in the contract", f"publish on {ROOT}/{scope}/<name>/<{'|'.join(leaves)}>", "topic")
    if parts[1] != str(PROTOCOL_VERSION):
        raise ContractError("topic", f"version {parts[1][:20]!r} is not spoken here", f"use {ROOT}/...", "version")
    if not ID_PATTERN.match(parts[3]):
        raise ContractError("topic", f"{parts[3][:80]!r} is not a name", "use letters, digits, _ . : - and at most 64 of them", "name")
    return parts[3], parts[4]


def parse_site(topic: str, site: str) -> tuple[str, str]:
    """`(leaf, name)` of a topic of `site`; the name is empty for `claim` and `table`.

    Raises:
        ContractError: a topic outside the contract or of another site (reason `topic`), or a name that is none (reason `name`).
    """
    parts = topic.split("/")
    named = SITE_LEAVES.get(parts[4]) if len(parts) > 4 else None
    if named is None or parts[:3] != [*ROOT.split("/"), "site"] or len(parts) != (6 if named else 5):
        raise ContractError("topic", f"{topic[:120]!r} is not in the contract", f"publish on {ROOT}/site/<site>/<{'|'.join(SITE_LEAVES)}>", "topic")
    if parts[3] != site:
        raise ContractError("topic", f"{parts[3][:80]!r} is not this site", f"publish on {ROOT}/site/{site}/...", "topic")
    if named and not ID_PATTERN.match(parts[5]):
        raise ContractError("topic", f"{parts[5][:80]!r} is not a name", "use letters, digits, _ . : - and at most 64 of them", "name")
    return parts[4], parts[5] if named else ""


_AROUND = 16
"""Bytes of a PUBLISH at most beside topic and payload: a byte of header and four of length, two each before the topic and as its number, six of properties."""


def packet_bytes(topic: str, payload: bytes) -> int:
    """Of a PUBLISH with one of these topics, at most."""
    return len(topic) + len(payload) + _AROUND
