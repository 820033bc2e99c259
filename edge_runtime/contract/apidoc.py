"""docs/mqtt-api.md, generated from the message tables: `python -m edge_runtime.contract.apidoc [--check]`."""

import json
import sys
from pathlib import Path

from . import device_messages as device
from .desired import DESIRED
from .limits import MAX_BODY_BYTES, MAX_DEPTH, MAX_MESSAGE_BYTES, MAX_METRICS, PROTOCOL_VERSION
from .operations import OPERATION_FIELDS, STATES
from .presence import EDGE_PRESENCE, HUB_PRESENCE
from .questions import ANSWER, QUESTION
from .receipts import RECEIPTS
from .records import BATCH, RECORD_KINDS
from .schema import Field, Message
from .site_messages import CLAIM, DUTY, LOAD, MEMBER, SPEC, TABLE
from .streams import STREAMS
from .workloads import REPORT_FIELDS

TARGET = Path(__file__).resolve().parents[2] / "docs" / "mqtt-api.md"

MESSAGES: tuple[Message, ...] = (
    BATCH, EDGE_PRESENCE, RECEIPTS, DESIRED, QUESTION, ANSWER, HUB_PRESENCE, device.TELEMETRY, device.REGISTER, device.REPORTED, device.TWIN_DESIRED, device.COMMAND, device.RESULT,
    MEMBER, CLAIM, TABLE, SPEC, DUTY, LOAD,
)


def _rows(fields: tuple[Field, ...], prefix: str = "") -> list[str]:
    rows = []
    for field in fields:
        kind = field.type if not field.choices else " or ".join(f"`{choice}`" for choice in field.choices)
        rows.append(f"| `{prefix}{field.name}` | {kind} | {'yes' if field.required else 'no'} | {field.doc} |")
        if field.items:
            rows += _rows(field.items, f"{prefix}{field.name}{'[]' if field.type == 'array' else ''}.")
    return rows


def markdown() -> str:
    """The page."""
    lines = [
        "# MQTT API", "", "Generated from `edge_runtime/contract` by `python -m edge_runtime.contract.apidoc`; `make check` compares.", "",
        "Any broker with MQTT 3.1.1 (QoS 1, retained messages, Last Will) serves. Where MQTT 5 is offered, message expiry, receive maximum, shared",
        "subscriptions and reason codes are used; meaning never depends on them. Everything is published with QoS 1. Payloads are JSON in UTF-8.", "",
        "## Versions", "",
        f"The major version is {PROTOCOL_VERSION}: part of every topic and, as `v`, of every message between edge and hub. A peer ignores fields it does not know and",
        "refuses another major version as a whole, counted and named. `speaks` in both presences lists what each side understands; sides without a",
        "common version leave each other alone, and the edge keeps working by itself and keeps its records.", "",
        "## Limits", "", f"A message has at most {MAX_MESSAGE_BYTES} bytes and {MAX_DEPTH} levels, a record's body {MAX_BODY_BYTES} bytes, a reading {MAX_METRICS} metrics. NaN, infinity and integers past 64 bits are refused.", "",
        "## Streams", "", "| stream | durability | what |", "|---|---|---|",
    ]
    lines += [f"| `{policy.name}` | {policy.durability} | {policy.doc} |" for policy in STREAMS.values()]
    lines += [
        "", "## Record kinds", "", "| kind | stream | body |", "|---|---|---|", *(f"| `{kind}` | {stream} | {body} |" for kind, (stream, body) in RECORD_KINDS.items()), "",
        "The chain of a stream starts with 16 zero bytes; after each record it is blake2b-128 over the chain before it and the UTF-8 text",
        "`seq,boot,mono,wall,tq,kind,body`, with the body as compact JSON (ASCII escapes, keys in their order).", "",
        "## Operations", "", f"Long work, told in `operation` records. States: {', '.join(STATES)}.", "", "| field | type | required | meaning |", "|---|---|---|---|", *_rows(OPERATION_FIELDS), "",
        "## Workloads", "", "What became of a placement, told in `workload` records. An edge answers every entry of `spec.workloads`, a `stopped` one with `stopped`.", "",
        "| field | type | required | meaning |", "|---|---|---|---|", *_rows(REPORT_FIELDS), "",
        "## Messages", "",
    ]
    for message in MESSAGES:
        lines += [f"### {message.name}", "", f"`{message.topic}`, {message.direction}{', retained' if message.retained else ''}", "", message.doc, ""]
        if message.fields:
            lines += ["| field | type | required | meaning |", "|---|---|---|---|", *_rows(message.fields), ""]
        lines += ["```json", json.dumps(message.example), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    text = markdown()
    if "--check" in sys.argv:
        if not TARGET.exists() or TARGET.read_text() != text:
            sys.exit(f"{TARGET} is not what the code says: run python -m edge_runtime.contract.apidoc")
    else:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(text)
