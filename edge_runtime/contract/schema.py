"""Messages as tables: one description per message validates it, documents it and feeds the OpenAPI schema."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from .errors import ContractError
from .lean_dataclass import dataclass, field
from .limits import MAX_ID_CHARS, MAX_INTEGER, PROTOCOL_VERSION

ID_PATTERN = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.:-]{{0,{MAX_ID_CHARS - 1}}}\Z")
_HEX = re.compile(r"[0-9a-f]{0,64}\Z")
_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,), "string": (str,), "hex": (str,), "integer": (int,), "boolean": (bool,), "number": (int, float),
    "object": (dict,), "array": (list,), "enum": (str,),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message: its JSON name, its type word (a key of `_TYPES`), its limits and its one-line meaning."""

    name: str
    type: str
    doc: str
    required: bool = True
    default: Any = None
    choices: tuple[str, ...] = ()
    minimum: int = -MAX_INTEGER
    maximum: int = MAX_INTEGER
    max_items: int = 1024
    items: "tuple[Field, ...]" = ()

    def check(self, given: object, where: str) -> Any:
        """Return `given` if it fits, else raise `ContractError` naming `where`."""
        value: Any = given
        if not isinstance(given, _TYPES[self.type]) or (self.type in ("integer", "number") and isinstance(given, bool)):
            raise ContractError(where, f"is {type(value).__name__}, not {self.type}", f"send {self.doc}", "type")
        if self.type == "id" and not ID_PATTERN.match(value):
            raise ContractError(
                where, f"{value[:80]!r} is not a name", f"use 1 to {MAX_ID_CHARS} of A-Z a-z 0-9 _ . : -, a letter or digit first", "name"
            )
        if self.type == "hex" and not _HEX.match(value):
            raise ContractError(where, "is not lower-case hexadecimal of at most 64 digits", f"send {self.doc}", "type")
        if self.type == "string" and len(value) > self.max_items:
            raise ContractError(where, f"{len(value)} characters are over {self.max_items}", "shorten it", "limit")
        if self.type == "enum" and value not in self.choices:
            raise ContractError(where, f"{value[:80]!r} is unknown", f"use one of {', '.join(self.choices)}", "type")
        if self.type in ("integer", "number") and not self.minimum <= value <= self.maximum:
            raise ContractError(where, f"{value} is outside {self.minimum}..{self.maximum}", f"send {self.doc}", "limit")
        if self.type in ("array", "object") and len(value) > self.max_items:
            raise ContractError(where, f"{len(value)} entries are over {self.max_items}", "send fewer", "limit")
        if self.type == "array" and self.items:
            return [check_fields(self.items, entry, f"{where}[{index}]") for index, entry in enumerate(value)]
        if self.type == "object" and self.items:
            return check_fields(self.items, value, where)
        return value


def check_fields(fields: tuple[Field, ...], value: Any, where: str) -> dict[str, Any]:
    """Check an object against `fields`; unknown fields are left out (a newer peer may send them)."""
    if not isinstance(value, dict):
        raise ContractError(where, f"is {type(value).__name__}, not an object", "send a JSON object", "type")
    out: dict[str, Any] = {}
    prefix = "" if where == "payload" else f"{where}."
    for item in fields:
        if item.name in value and not (value[item.name] is None and not item.required):
            out[item.name] = item.check(value[item.name], prefix + item.name)
        elif item.required:
            raise ContractError(prefix + item.name, "is missing", f"send {item.doc}", "missing")
        else:
            out[item.name] = item.default
    return out


VERSION = Field("v", "integer", f"the contract's major version, {PROTOCOL_VERSION}", minimum=0, maximum=1_000_000)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the public MQTT API."""

    name: str
    topic: str
    direction: str
    retained: bool
    doc: str
    fields: tuple[Field, ...]
    example: Mapping[str, Any] = field(default_factory=dict)
    versioned: bool = True
    after: Callable[[dict[str, Any]], None] | None = None

    def parse(self, value: Any) -> dict[str, Any]:
        """Validate a decoded payload: version first, then every field.

        Raises:
            ContractError: with `reason` `version` for another major version, else naming the field.
        """
        if self.versioned:
            if not isinstance(value, dict):
                raise ContractError("payload", f"is {type(value).__name__}, not an object", "send a JSON object", "type")
            version = value.get("v")
            if version != PROTOCOL_VERSION or isinstance(version, bool):
                raise ContractError(
                    "v", f"version {str(version)[:20]!r} is not spoken here", f"speak version {PROTOCOL_VERSION}, or update this side", "version"
                )
        out = check_fields(self.fields, value, "payload")
        if self.after is not None:
            self.after(out)
        return out
