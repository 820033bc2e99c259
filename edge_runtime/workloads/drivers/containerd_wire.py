"""The few messages of containerd's API that we use, and their form on the wire (protocol buffers). Pure.

Field numbers are the format: from containerd's api/services/{containers,tasks,version}/v1/*.proto, api/types/{mount.proto,task/task.proto} and google's any, timestamp; the same from 1.6 to 2.x. What we do not
know of a message is skipped, as the format wants it. No code is generated and no package read it: five kinds of fields are all there is here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class WireError(ValueError):
    """Bytes that are no such message."""


class Kind(Enum):
    """What a field holds."""

    TEXT = 1
    BYTES = 2
    NUMBER = 3
    """uint32, int64, an enumeration: a varint; none of ours is negative."""
    FLAG = 4


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its number, and what it holds; `many` of it, or `table`: texts by texts."""

    number: int
    kind: "Kind | Message" = Kind.TEXT
    many: bool = False
    table: bool = False


Message = Mapping[str, Field]

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
"""Wire types."""

MAX_VARINT = 10
"""Bytes of a varint, at most."""

_PAIR: Message = {"key": Field(1), "value": Field(2)}

EMPTY: Message = {}
ANY: Message = {"type_url": Field(1), "value": Field(2, Kind.BYTES)}
TIMESTAMP: Message = {"seconds": Field(1, Kind.NUMBER), "nanos": Field(2, Kind.NUMBER)}
MOUNT: Message = {"type": Field(1), "source": Field(2), "options": Field(4, many=True)}
RUNTIME: Message = {"name": Field(1), "options": Field(2, ANY)}
CONTAINER: Message = {"id": Field(1), "labels": Field(2, table=True), "image": Field(3), "runtime": Field(4, RUNTIME), "spec": Field(5, ANY)}
PROCESS: Message = {
    "container_id": Field(1), "id": Field(2), "pid": Field(3, Kind.NUMBER), "status": Field(4, Kind.NUMBER), "exit_status": Field(9, Kind.NUMBER), "exited_at": Field(10, TIMESTAMP),
}
_OF_TASK: Message = {"container_id": Field(1), "exec_id": Field(2)}
_DELETED: Message = {"id": Field(1), "pid": Field(2, Kind.NUMBER), "exit_status": Field(3, Kind.NUMBER), "exited_at": Field(4, TIMESTAMP)}

CREATED, RUNNING, STOPPED, PAUSED = 1, 2, 3, 4
"""`status` of a process."""


@dataclass(frozen=True, slots=True)
class Method:
    """One call: its path, what is asked, what is answered."""

    path: str
    request: Message
    answer: Message


_CONTAINERS, _TASKS = "/containerd.services.containers.v1.Containers/", "/containerd.services.tasks.v1.Tasks/"

VERSION = Method("/containerd.services.version.v1.Version/Version", EMPTY, {"version": Field(1), "revision": Field(2)})
CREATE_CONTAINER = Method(_CONTAINERS + "Create", {"container": Field(1, CONTAINER)}, {"container": Field(1, CONTAINER)})
LIST_CONTAINERS = Method(_CONTAINERS + "List", {"filters": Field(1, many=True)}, {"containers": Field(1, CONTAINER, many=True)})
DELETE_CONTAINER = Method(_CONTAINERS + "Delete", {"id": Field(1)}, EMPTY)
CREATE = Method(
    _TASKS + "Create", {"container_id": Field(1), "rootfs": Field(3, MOUNT, many=True), "stdin": Field(4), "stdout": Field(5), "stderr": Field(6)}, {"container_id": Field(1), "pid": Field(2, Kind.NUMBER)},
)
START = Method(_TASKS + "Start", _OF_TASK, {"pid": Field(1, Kind.NUMBER)})
GET = Method(_TASKS + "Get", _OF_TASK, {"process": Field(1, PROCESS)})
WAIT = Method(_TASKS + "Wait", _OF_TASK, {"exit_status": Field(1, Kind.NUMBER), "exited_at": Field(2, TIMESTAMP)})
KILL = Method(_TASKS + "Kill", {"container_id": Field(1), "exec_id": Field(2), "signal": Field(3, Kind.NUMBER), "all": Field(4, Kind.FLAG)}, EMPTY)
PAUSE = Method(_TASKS + "Pause", {"container_id": Field(1)}, EMPTY)
RESUME = Method(_TASKS + "Resume", {"container_id": Field(1)}, EMPTY)
DELETE = Method(_TASKS + "Delete", {"container_id": Field(1)}, _DELETED)
EXEC = Method(_TASKS + "Exec", {"container_id": Field(1), "stdin": Field(2), "stdout": Field(3), "stderr": Field(4), "spec": Field(6, ANY), "exec_id": Field(7)}, EMPTY)
DELETE_PROCESS = Method(_TASKS + "DeleteProcess", _OF_TASK, _DELETED)

SPEC, PROCESS_SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec", "types.containerd.io/opencontainers/runtime-spec/1/Process"
"""What is in an `ANY`: JSON of the OCI runtime specification."""


def encode(message: Message, value: Mapping[str, Any]) -> bytes:
    """A message; what is not in `value`, and what is empty, zero or false, is left out. KeyError for a field that it has not."""
    found = bytearray()
    for name, told in value.items():
        field = message[name]
        if field.table:
            for key, text in told.items():
                found += _part(field.number, encode(_PAIR, {"key": key, "value": text}))
        elif field.many:
            for one in told:
                found += _part(field.number, _content(field.kind, one))
        elif field.kind in (Kind.NUMBER, Kind.FLAG):
            if told:
                found += _varint(field.number << 3 | VARINT) + _varint(int(told))
        elif told or not isinstance(field.kind, Kind):
            found += _part(field.number, _content(field.kind, told))
    return bytes(found)


def _part(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | LENGTH) + _varint(len(content)) + content


def _content(kind: Kind | Message, value: Any) -> bytes:
    if kind is Kind.TEXT:
        return str(value).encode()
    return bytes(value) if isinstance(kind, Kind) else encode(kind, value)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def decode(message: Message, data: bytes) -> dict[str, Any]:
    """A message; a field that is not there is empty, zero, false, or None where it is a message. Raises `WireError`."""
    found: dict[str, Any] = {name: _absent(field) for name, field in message.items()}
    names = {field.number: name for name, field in message.items()}
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        content: int | bytes
        if wire == VARINT:
            content, at = _read_varint(data, at)
        elif wire in (LENGTH, FIXED64, FIXED32):
            size, at = _read_varint(data, at) if wire == LENGTH else (8 if wire == FIXED64 else 4, at)
            if size > len(data) - at:
                raise WireError(f"field {number} is cut off")
            content, at = data[at:at + size], at + size
        else:
            raise WireError(f"field {number} has wire type {wire}")
        if number == 0:
            raise WireError("a field has number 0")
        name = names.get(number)
        if name is None:
            continue
        field = message[name]
        if (field.kind in (Kind.NUMBER, Kind.FLAG)) != (wire == VARINT) or wire in (FIXED64, FIXED32):
            raise WireError(f"{name} has wire type {wire}")
        _take(found, name, field, content)
    return found


def _take(found: dict[str, Any], name: str, field: Field, content: Any) -> None:
    if field.table:
        pair = decode(_PAIR, content)
        found[name][pair["key"]] = pair["value"]
        return
    if field.kind is Kind.TEXT:
        try:
            content = content.decode()
        except UnicodeDecodeError:
            raise WireError(f"{name} is no text") from None
    elif field.kind is Kind.FLAG:
        content = content != 0
    elif not isinstance(field.kind, Kind):
        content = decode(field.kind, content)
    if field.many:
        found[name].append(content)
    else:
        found[name] = content


def _absent(field: Field) -> Any:
    if field.table:
        return {}
    if field.many:
        return []
    return {Kind.TEXT: "", Kind.BYTES: b"", Kind.NUMBER: 0, Kind.FLAG: False}[field.kind] if isinstance(field.kind, Kind) else None


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = 0
    for place in range(MAX_VARINT):
        if at + place >= len(data):
            raise WireError("a number is cut off")
        byte = data[at + place]
        number |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return number & (1 << 64) - 1, at + place + 1
    raise WireError("a number is too long")


def overlay(lower: Sequence[str], upper: str, work: str) -> dict[str, Any]:
    """The mount of a root: `lower`, the uppermost first."""
    return {"type": "overlay", "source": "overlay", "options": [f"lowerdir={':'.join(lower)}", f"upperdir={upper}", f"workdir={work}", "nosuid", "nodev"]}
