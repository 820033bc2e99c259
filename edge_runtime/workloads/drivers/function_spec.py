"""From a function's document to what its host is told; everything is checked here, before anything is touched. Pure.

`spec` of a function's document, and of a batch job's whose image is a WebAssembly module:

    args, env        list of texts, object of texts; the program's name comes before `args`
    timeout_s        seconds of one call, its wait for a turn included; of a job: of its run (0: no limit)
    limits           {"memory": "16Mi"}: of one instance. Without it: an equal part of what is requested, else `DEFAULT_MEMORY`
    concurrency      calls that run at once
    queue            calls that wait beyond those; further ones are refused
    warm             instances kept ready; 0: each call waits for a process to be forked
    output           bytes kept of what one call answers
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..placement import quantity
from .face import Order, Refused

SPEC_KEYS = ("args", "concurrency", "env", "limits", "output", "queue", "timeout_s", "warm")

CALL_KEYS = ("concurrency", "output", "queue", "warm")
"""What only calls have."""

DEFAULT_MEMORY = 64 << 20
"""Bytes of one instance where nothing is said: what a program of a language with a runtime of its own (Go, .NET) takes at least."""

PAGE, MAX_MEMORY = 65_536, 4 << 30
"""Bytes: a page of WebAssembly, and what 32 bits address."""

DEFAULT_TIMEOUT_S, MAX_TIMEOUT_S, MAX_JOB_S = 5.0, 900.0, 30 * 86_400.0
"""Seconds of a call where nothing is said; at most: what large providers allow; and of a job."""

DEFAULT_CONCURRENCY, MAX_CONCURRENCY = 4, 64
"""Each is a process."""

DEFAULT_QUEUE, MAX_QUEUE = 32, 256
"""Each holds a connection and its input, at most 64 KiB."""

DEFAULT_OUTPUT, MAX_OUTPUT = 65_536, 1 << 20
"""Bytes of an answer: what a message carries to a hub is less."""

MAX_TEXTS, MAX_BYTES = 256, 32_768
"""Arguments or variables, and bytes of all of them: what one datagram to the spawner carries, twice."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How a function is run; the fields are those of `spec`, `memory` in bytes."""

    args: tuple[str, ...]
    env: tuple[str, ...]
    timeout_s: float
    memory: int
    concurrency: int
    queue: int
    warm: int
    output_bytes: int


def limits(order: Order) -> Limits:
    """Read and check. Raises `Refused`."""
    spec = order.spec
    for key in spec:
        if key not in SPEC_KEYS:
            raise Refused(f"spec.{key[:40]}", "is not known of a function", f"use {', '.join(SPEC_KEYS)}")
        if order.job and key in CALL_KEYS:
            raise Refused(f"spec.{key}", "is of calls, and nobody calls a batch job", "leave it out, or submit a function")
    concurrency = 1 if order.job else _whole(spec, "concurrency", DEFAULT_CONCURRENCY, 1, MAX_CONCURRENCY)
    told = spec.get("limits", {})
    if not isinstance(told, dict) or not set(told) <= {"memory"}:
        raise Refused("spec.limits", "is not an object with `memory` alone", "give {\"memory\": \"16Mi\"}, or leave it out")
    asked = order.requests.get("memory", 0)
    memory = asked // concurrency if asked else DEFAULT_MEMORY
    if "memory" in told:
        try:
            memory = quantity("memory", told["memory"])
        except ValueError as error:
            raise Refused("spec.limits.memory", str(error), "write it as 16Mi or a plain number of bytes") from None
    if not PAGE <= memory <= MAX_MEMORY:
        raise Refused("spec.limits.memory", f"{memory} bytes are not {PAGE} to {MAX_MEMORY} for an instance", "give each instance a page of 64 KiB at least: request more, or let fewer calls run at once")
    if asked and memory * concurrency > asked:
        raise Refused("spec.limits.memory", f"{concurrency} instances of {memory} bytes are more than the {asked} that are requested", "request more, or let fewer calls run at once")
    warm = 1 if order.job else _whole(spec, "warm", 1, 0, MAX_CONCURRENCY)
    if warm > concurrency:
        raise Refused("spec.warm", f"{warm} instances are kept ready, and {concurrency} calls may run at once", "keep no more ready than may run")
    timeout = spec.get("timeout_s", 0 if order.job else DEFAULT_TIMEOUT_S)
    most = MAX_JOB_S if order.job else MAX_TIMEOUT_S
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or not (0.001 <= timeout <= most or (order.job and timeout == 0)):
        raise Refused("spec.timeout_s", f"{str(timeout)[:40]} is no number of seconds from 0.001 to {most:g}", "say how long it may take")
    args, env = _args(spec.get("args", [])), _env(spec.get("env", {}))
    if sum(len(one.encode()) + 1 for one in (*args, *env)) > MAX_BYTES:
        raise Refused("spec.args", f"arguments and variables are over {MAX_BYTES} bytes", "send what is large with the call")
    return Limits(
        args, env, float(timeout), memory, concurrency, _whole(spec, "queue", DEFAULT_QUEUE, 0, MAX_QUEUE), warm, _whole(spec, "output", DEFAULT_OUTPUT, 0, MAX_OUTPUT),
    )


def _whole(spec: Mapping[str, Any], key: str, default: int, least: int, most: int) -> int:
    value = spec.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise Refused(f"spec.{key}", f"{str(value)[:40]} is no whole number from {least} to {most}", "give one, or leave it out")
    return value


def _args(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_TEXTS or not all(_text(one) for one in value):
        raise Refused("spec.args", f"is not a list of up to {MAX_TEXTS} texts without zero bytes", "give one, or leave it out")
    return tuple(value)


def _env(value: Any) -> tuple[str, ...]:
    if not isinstance(value, dict) or len(value) > MAX_TEXTS or not all(_text(name) and name and "=" not in name and _text(one) for name, one in value.items()):
        raise Refused("spec.env", f"is not an object of up to {MAX_TEXTS} texts, with names that have no `=`", "give one, or leave it out")
    return tuple(f"{name}={one}" for name, one in value.items())


def _text(value: Any) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
