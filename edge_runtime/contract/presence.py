"""Presence: who is there, retained, with the Last Will saying who is not."""

from .limits import PROTOCOL_VERSION
from .schema import VERSION, Field, Message
from .topics import EDGE_STATUS, HUB_STATUS

STATES = ("online", "offline")

EDGE_PRESENCE = Message(
    name="edge status",
    topic=EDGE_STATUS,
    direction="edge to hub",
    retained=True,
    doc="The edge's presence. The broker publishes the Last Will (state offline, reason lost) when the link dies without a word.",
    fields=(
        VERSION,
        Field("edge", "id", "the edge's name"),
        Field("boot", "id", "the boot that speaks"),
        Field("boot_n", "integer", "the number of that boot, from 1", minimum=1),
        Field("state", "enum", "online or offline", choices=STATES),
        Field("reason", "string", "why: start, reconnect, shutdown, lost, heartbeat", required=False, default=""),
        Field("time_ms", "integer", "the edge's wall time, milliseconds since 1970 UTC", required=False, default=0, minimum=0),
        Field("tq", "string", "the quality of that time", required=False, default="unsynced"),
        Field("generation", "integer", "the desired state the edge has applied, 0 for none", required=False, default=0, minimum=0),
        Field("desired_ms", "integer", "the issued_ms of that desired state: a hub restored from a backup may give a number twice", required=False, default=0, minimum=0),
        Field("agent", "string", "the agent's version", required=False, default=""),
        Field("speaks", "array", "the contract versions that the edge speaks", required=False, default=[PROTOCOL_VERSION], max_items=16),
        Field("region", "string", "where the edge stands", required=False, default=""),
        Field("site", "string", "the site it belongs to", required=False, default=""),
        Field("node", "string", "the node it runs on", required=False, default=""),
        Field("labels", "object", "labels, text to text", required=False, default={}, max_items=64),
        Field("devices", "array", "names of the devices behind it, the first 256", required=False, default=[], max_items=256),
        Field("serves", "object", "shared devices that it serves, to the number at which each was given to it, the first 256", required=False, default={}, max_items=256),
        Field("outage_hours", "number", "hours of outage that the journal still has room for", required=False, default=0),
        Field("health", "string", "ok, or what is wrong", required=False, default="ok"),
    ),
    example={
        "v": 1, "edge": "gw-1", "boot": "6f1c0a9e2b7d4c55", "boot_n": 12, "state": "online", "reason": "reconnect",
        "time_ms": 1795500000000, "tq": "ntp", "generation": 7, "desired_ms": 1795500000000, "agent": "0.1.0", "speaks": [1], "region": "eu", "site": "plant-a",
        "node": "gw-1", "labels": {}, "devices": ["host", "boiler-1"], "outage_hours": 210.5, "health": "ok",
    },
)

HUB_PRESENCE = Message(
    name="hub status",
    topic=HUB_STATUS,
    direction="hub to edges",
    retained=True,
    doc="The hub's presence. An edge sends records only while a hub is online; a new `boot` makes it start its lanes afresh.",
    fields=(
        VERSION,
        Field("hub", "id", "the hub's name"),
        Field("boot", "id", "the hub process that speaks"),
        Field("state", "enum", "online or offline", choices=STATES),
        Field("time_ms", "integer", "the hub's wall time, milliseconds since 1970 UTC", required=False, default=0, minimum=0),
        Field("speaks", "array", "the contract versions that the hub speaks", required=False, default=[PROTOCOL_VERSION], max_items=16),
    ),
    example={"v": 1, "hub": "hub", "boot": "0b7e4f8a91c2d3e4", "state": "online", "time_ms": 1795500000000, "speaks": [1]},
)
