"""JSON in and out, strictly: UTF-8, bounded size and depth, no NaN or infinity, one canonical text.

The canonical text (compact separators, keys in the order given, ASCII escapes, shortest floats) is what the record chain is
computed over; `decode` then `encode` gives the same text again.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

from .errors import ContractError
from .limits import MAX_DEPTH, MAX_INTEGER, MAX_MESSAGE_BYTES


def _refuse_constant(name: str) -> NoReturn:
    raise ContractError("payload", f"{name} is not JSON", "send null or leave the value out", "nan")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)
_MAY_OVERFLOW = re.compile(rb"\d[eE]|\d{19}")
"""What a number that is infinite as a float (1e999, or 400 digits) or past 64 bits (19 digits and more) must hold: much else holds it too."""

_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False, ensure_ascii=True, check_circular=False)


def _made_once() -> Callable[[Any], str]:
    """What `_encoder.encode` builds anew at every call, built once: it takes longer than a reading's text. `_encoder.encode` itself where this Python builds it otherwise."""
    sample = {"text": 'é"', "numbers": [1, 0.1, -1e300, True, None], "empty": {}}
    try:
        parts = json.encoder.c_make_encoder(None, _encoder.default, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, False)  # type: ignore[attr-defined]
        if "".join(parts(sample, 0)) == _encoder.encode(sample):
            return lambda value: "".join(parts(value, 0))
    except (AttributeError, TypeError, ValueError):
        pass
    return _encoder.encode


_encode = _made_once()


def encode(value: Any) -> str:
    """Canonical JSON text of `value`.

    Raises:
        ContractError: NaN, infinity or a type that JSON lacks.
    """
    try:
        return _encode(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise ContractError("payload", f"cannot be written as JSON ({error})", "send finite numbers and JSON types", "type") from None


def decode(payload: bytes | bytearray | memoryview, max_bytes: int = MAX_MESSAGE_BYTES, *, look: bool = True) -> Any:
    """Parse one JSON text of at most `max_bytes` bytes and `MAX_DEPTH` levels.

    Args:
        look: refuse what is too deep, infinite or past 64 bits. Only where the caller refuses these itself, value by value, is it False.

    Raises:
        ContractError: too large, not UTF-8, not JSON, too deep, NaN or infinity, an integer past 64 bits.
    """
    if len(payload) > max_bytes:
        raise ContractError("payload", f"{len(payload)} bytes are over the limit of {max_bytes}", "send smaller messages", "size")
    raw = payload if type(payload) is bytes else bytes(payload)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ContractError("payload", f"not UTF-8 at byte {error.start}", "encode the JSON as UTF-8", "utf8") from None
    try:
        value, end = _decoder.raw_decode(text, 0 if text[:1] == "{" else _skip_space(text, 0))
    except ContractError:
        raise
    except RecursionError:
        raise ContractError("payload", f"nested deeper than {MAX_DEPTH} levels", "flatten the message", "depth") from None
    except ValueError as error:
        raise ContractError("payload", f"not JSON ({error})", "send one JSON value", "json") from None
    if end != len(text) and _skip_space(text, end) != len(text):
        raise ContractError("payload", f"text after the JSON value at character {end}", "send one JSON value", "json")
    # A message with few brackets and no exponent or long digit run can be neither too deep nor overflow; only others are walked.
    if look and (raw.count(b"{") + raw.count(b"[") > MAX_DEPTH or _MAY_OVERFLOW.search(raw)):
        check_tree(value)
    return value


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\n\r":
        position += 1
    return position


def check_tree(value: Any, field: str = "payload", max_depth: int = MAX_DEPTH) -> None:
    """Refuse depth over `max_depth`, non-finite floats and integers past 64 bits anywhere in `value` (iterative, bounded)."""
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        kind = type(item)
        if kind is dict or kind is list:
            if depth > max_depth:
                raise ContractError(field, f"nested deeper than {max_depth} levels", "flatten the message", "depth")
            children = item.values() if kind is dict else item
            for child in children:
                child_kind = type(child)
                if child_kind is dict or child_kind is list:
                    stack.append((child, depth + 1))
                elif child_kind is float:
                    if not math.isfinite(child):
                        raise ContractError(field, "a number overflows to infinity", "send finite numbers", "nan")
                elif child_kind is int and not -MAX_INTEGER <= child <= MAX_INTEGER:
                    raise ContractError(field, "an integer is past 64 bits", "send it as text or as a float", "limit")
        elif kind is float and not math.isfinite(item):
            raise ContractError(field, "a number overflows to infinity", "send finite numbers", "nan")
        elif kind is int and not -MAX_INTEGER <= item <= MAX_INTEGER:
            raise ContractError(field, "an integer is past 64 bits", "send it as text or as a float", "limit")
