"""Messages of the local bus: between a device and its edge. No version field: a device may be a one-line script."""

import re
from typing import Any

from .errors import ContractError
from .jsoncodec import check_tree, encode
from .lean_dataclass import dataclass
from .limits import MAX_INTEGER, MAX_METRICS, MAX_READINGS_PER_MESSAGE, MAX_SITE_NUMBER, MAX_STRING_CHARS
from .schema import Field, Message
from .topics import DEVICE_COMMAND, DEVICE_DESIRED, DEVICE_REGISTER, DEVICE_REPORTED, DEVICE_RESULT, DEVICE_TELEMETRY

METRIC_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_.:/-]{0,63}\Z")
NAMES_REMEMBERED = 1_024
"""Metric names that are known to be ones: a device sends the same few for ever. At 64 characters each at most 120 KiB."""

_names: set[str] = set()
MAX_FLATTEN_DEPTH = 4
"""Levels of nested objects that become dotted metric names."""

MAX_DEVICE_DEPTH = 8
"""Levels of a twin or of a result's value. They travel on inside a record inside a batch, five levels deeper, and past `limits.MAX_DEPTH` the
hub would refuse the batch again and again."""

MAX_DEVICE_BYTES = 32_768
"""Bytes of one side of a twin, or of a result's value, as canonical JSON: half of what a record holds, and one message to a device."""

MAX_READING_TEXT = 49_152
"""Characters of JSON that the text values of one reading may make (a character outside ASCII makes 6 or 12): with its numbers and names the
reading then fits `limits.MAX_BODY_BYTES`."""

LONG_TEXT_CHARS = 64
"""Text up to here cannot pass `MAX_READING_TEXT` whatever it holds: `limits.MAX_METRICS` times 64 times 12 characters."""

Value = float | int | str | bool


def check_object(value: dict[str, Any], field: str) -> None:
    """Raise `ContractError` where an object of a device is too deep or too large to travel on in a record."""
    check_tree(value, field, MAX_DEVICE_DEPTH)
    if len(encode(value)) > MAX_DEVICE_BYTES:
        raise ContractError(field, f"over {MAX_DEVICE_BYTES} bytes of JSON", "send less", "limit")


def _check_result(message: dict[str, Any]) -> None:
    check_object(message["value"], "value")


TELEMETRY = Message(
    name="telemetry", topic=DEVICE_TELEMETRY, direction="device to edge", retained=False, versioned=False,
    doc=(
        "A JSON object of metric to number, text or boolean; nested objects become dotted names; a bare number becomes `value`; "
        "`{\"ts\": <milliseconds>, \"values\": {...}}` carries the device's own time; an array carries up to "
        f"{MAX_READINGS_PER_MESSAGE} of these. null is left out; NaN and infinity are refused."
    ),
    fields=(), example={"temp": 71.5, "fan": {"rpm": 900}, "on": True},
)
REGISTER = Message(
    name="register", topic=DEVICE_REGISTER, direction="device to edge", retained=True, versioned=False,
    doc="What the device is. Readings that came before are kept, within limits, and follow at once.",
    fields=(
        Field("kind", "string", "the kind of device", required=False, default="generic", max_items=64),
        Field("name", "string", "a name for people", required=False, default="", max_items=128),
        Field("parent", "id", "the device it hangs on", required=False, default=None),
        Field("meta", "object", "anything else worth knowing", required=False, default={}, max_items=64),
    ),
    example={"kind": "boiler", "name": "Boiler, hall 2"},
)
REPORTED = Message(
    name="reported", topic=DEVICE_REPORTED, direction="device to edge", retained=False, versioned=False,
    doc=(
        "Reported twin state: an object of property to value, merged into the twin; null removes a property. "
        f"A twin has at most {MAX_DEVICE_BYTES} bytes and {MAX_DEVICE_DEPTH} levels."
    ),
    fields=(), example={"speed": 3},
)
TWIN_DESIRED = Message(
    name="desired twin", topic=DEVICE_DESIRED, direction="edge to device", retained=True, versioned=False,
    doc="The whole desired twin state of the device.",
    fields=(
        Field("version", "integer", "grows with every change", minimum=0),
        Field("desired", "object", "property to value"),
    ),
    example={"version": 4, "desired": {"speed": 3}},
)
COMMAND = Message(
    name="command", topic=DEVICE_COMMAND, direction="edge to device", retained=False, versioned=False,
    doc=(
        "A command, at least once: a device that sees an id twice does it once. `again` marks a second sending after a restart. On a site whose edges stand in "
        "for each other a command carries `duty` and `fence`: the device keeps the highest fence it has seen of each duty, refuses a command with a lower one "
        "(it comes from an edge that has been replaced and does not know it yet), and answers `ok` false with `reason` \"fenced\" and that highest `fence`."
    ),
    fields=(
        Field("id", "id", "the command's name"),
        Field("name", "id", "what to do"),
        Field("args", "object", "its arguments", required=False, default={}),
        Field("expires_ms", "integer", "wall time after which it must not be done", required=False, default=0, minimum=0),
        Field("again", "boolean", "sent before, perhaps received before", required=False, default=False),
        Field("duty", "id", "the device whose readings led to it, or the device itself where a person or the hub ordered it", required=False, default=None),
        Field("fence", "integer", "the number under which that duty was given to the edge that sends this", required=False, default=0, minimum=0, maximum=MAX_SITE_NUMBER),
    ),
    example={"id": "gw-1.decision.121.0", "name": "on", "args": {"level": 2}, "expires_ms": 1795500060000},
)
RESULT = Message(
    name="result", topic=DEVICE_RESULT, direction="device to edge", retained=False, versioned=False,
    doc="The reply to a command.",
    fields=(
        Field("id", "id", "the command's name"),
        Field("ok", "boolean", "whether it was done"),
        Field("reason", "string", "why not", required=False, default="", max_items=256),
        Field("value", "object", "what came of it", required=False, default={}, max_items=64),
        Field("fence", "integer", "where the command was refused as fenced: the highest fence seen of its duty", required=False, default=0, minimum=0, maximum=MAX_SITE_NUMBER),
    ),
    after=_check_result,
    example={"id": "gw-1.decision.121.0", "ok": True},
)


@dataclass(slots=True)
class Reading:
    """One reading: metric to value, and the device's own time in milliseconds since 1970 where it sent one."""

    values: dict[str, Value]
    device_ms: int | None = None


def parse_telemetry(value: Any) -> list[Reading]:
    """The readings of one telemetry message, in order. Looks at every value that it takes, so `jsoncodec.decode` need not.

    Raises:
        ContractError: names the metric and what would mend it. Nothing of a message with an error is used.
    """
    if type(value) is list:
        if len(value) > MAX_READINGS_PER_MESSAGE:
            raise ContractError("payload", f"{len(value)} readings are over {MAX_READINGS_PER_MESSAGE}", "send several messages", "limit")
        return [_parse_reading(entry, f"[{index}].") for index, entry in enumerate(value)]
    return [_parse_reading(value, "")]


def _parse_reading(value: Any, where: str) -> Reading:
    device_ms: int | None = None
    if type(value) is dict:
        inner = value.get("values")
        if type(inner) is dict:
            stamp = value.get("ts")
            if stamp is not None:
                if type(stamp) not in (int, float) or not 0 <= stamp <= MAX_INTEGER:
                    raise ContractError(f"{where}ts", "is not a time", "send milliseconds since 1970 UTC", "time")
                device_ms = int(stamp)
            value = inner
    elif type(value) in (int, float, bool, str):
        value = {"value": value}
    else:
        raise ContractError(where.rstrip(".") or "payload", f"is {type(value).__name__}", "send an object of metric to value", "type")
    values: dict[str, Value] = {}
    _flatten(value, "", values, where, 1)
    if not values:
        raise ContractError(where.rstrip(".") or "payload", "holds no value", "send at least one metric", "empty")
    for item in values.values():
        if type(item) is str and len(item) > LONG_TEXT_CHARS:
            _check_text(values, where)
            break
    return Reading(values, device_ms)


def _check_text(values: dict[str, Value], where: str) -> None:
    made = sum(len(encode(item)) for item in values.values() if type(item) is str)
    if made > MAX_READING_TEXT:
        raise ContractError(where.rstrip(".") or "payload", f"holds text that makes {made} characters of JSON, over {MAX_READING_TEXT}", "shorten the text, or send it in several readings", "limit")


def _flatten(source: dict[str, Any], prefix: str, out: dict[str, Value], where: str, depth: int) -> None:
    for key, item in source.items():
        name = prefix + key if prefix else key
        if name not in _names:
            if not METRIC_PATTERN.match(name):
                raise ContractError(f"{where}{name[:80]}", "is not a metric name", "use letters, digits and _ . : / -, 64 at most", "name")
            if len(_names) < NAMES_REMEMBERED:
                _names.add(name)
        kind = type(item)
        if kind is float:
            if item - item != 0.0:  # infinite: NaN is not JSON
                raise ContractError(where + name, "is not finite", "send a finite number or null", "nan")
            out[name] = item
        elif kind is int:
            if not -MAX_INTEGER <= item <= MAX_INTEGER:
                raise ContractError(where + name, "is past 64 bits", "send it as text or as a float", "limit")
            out[name] = item
        elif kind is bool:
            out[name] = item
        elif kind is str:
            if len(item) > MAX_STRING_CHARS:
                raise ContractError(where + name, f"{len(item)} characters are over {MAX_STRING_CHARS}", "shorten the text", "limit")
            out[name] = item
        elif kind is dict:
            if depth >= MAX_FLATTEN_DEPTH:
                raise ContractError(where + name, f"is nested deeper than {MAX_FLATTEN_DEPTH} levels", "flatten the reading", "depth")
            _flatten(item, name + ".", out, where, depth + 1)
        elif item is not None:
            raise ContractError(where + name, f"is {kind.__name__}", "send a number, text, boolean or object", "type")
    if len(out) > MAX_METRICS:  # a message is 256 KiB at most, so that the loop has an end before this
        raise ContractError(where.rstrip(".") or "payload", f"has over {MAX_METRICS} metrics", "split the reading", "limit")
