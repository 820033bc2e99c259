"""Rules: the document that says when to act, validated whole into a `RuleSet`. Pure.

A rule:

    {"id": "overheat",
     "on": {"device": "boiler-*", "metric": "temp"},         which readings it looks at; `*` and `?` match, metric is optional
     "if": <condition>,
     "clear": <condition>,                                   optional: what ends it (hysteresis); default: `if` is false
     "for": "10s",                                           optional: how long the condition must hold
     "trigger": "rise" | "each",                             once when it becomes true (default), or at every reading that is true
     "cooldown": "30s",                                      optional: least time between two firings per device
     "then": [{"alert": {"severity": "warning", "text": "temp {temp} of {device}"}},
              {"command": {"device": "fan-1", "name": "on", "args": {"level": "$value:temp"}, "expires": "60s"}},
              {"desired": {"device": "$device", "set": {"mode": "safe"}}}]}

A condition is one of

    {"value": "temp", "op": ">", "than": 80}                 > >= < <= == != in between; `than` may be {"value": "other"}
    {"window": {"metric": "temp", "over": "60s", "stat": "mean", "min_count": 3}, "op": ">", "than": 75}
    {"model": "host-anomaly", "output": 0, "op": ">", "than": 0.8}
    {"anomaly": {"metric": "temp"}, "op": ">", "than": 0.99} how strange the newest value is to what was learned of this metric, 0 to 1
    {"quality": {"metric": "temp", "low": -40, "high": 125}, "op": "in", "than": ["stuck", "spike"]}     see `detectors.quality`; limits optional
    {"forecast": {"metric": "temp", "within": "30m"}, "op": ">", "than": 80}                             will be so within 30 minutes, or is already
    {"silent": "5m"}                                         no reading of the device for so long
    {"all": [...]}, {"any": [...]}, {"not": {...}}
"""

import json
import math
import re
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from ..contract.errors import ContractError
from ..contract.jsoncodec import check_tree
from ..contract.lean_dataclass import dataclass
from ..contract.limits import MAX_RULES
from ..contract.schema import ID_PATTERN
from .windows import STATISTICS

MAX_DEPTH = 8
"""Nesting of a condition, and of arguments and twin properties."""
MAX_NODES = 64
"""Conditions of one rule: bounds the time of one evaluation."""
MAX_ACTIONS = 8
MAX_SPAN_MS = 86_400_000
"""Longest window and duration: a day."""
MAX_TEXT = 512
MAX_ARGS_BYTES = 4096

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)\Z")
_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}
_PATTERN = re.compile(r"[A-Za-z0-9_.:*?-]{1,64}\Z")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">": lambda a, b: bool(a > b), ">=": lambda a, b: bool(a >= b), "<": lambda a, b: bool(a < b), "<=": lambda a, b: bool(a <= b),
    "==": lambda a, b: bool(a == b), "!=": lambda a, b: bool(a != b), "in": lambda a, b: a in b, "between": lambda a, b: bool(b[0] <= a <= b[1]),
}
_ORDERING = frozenset((">", ">=", "<", "<=", "between"))
DETECTED = ("anomaly", "quality", "forecast")
"""Conditions that ask a detector of their metric."""
_CONDITIONS = ("all", "any", "not", "value", "window", "model", *DETECTED, "silent")
SEVERITIES = ("info", "warning", "critical")


class RuleError(ValueError):
    """A rule document that is refused as a whole: `field` (its path), `problem`, `remedy`."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field = field
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Comparison:
    """`left op than`; `kind` is `value`, `window`, `model`, `anomaly`, `quality` or `forecast` and says what `left` is.

    `low` and `high` are the limits of a `quality`; `span_ms` is how far a `window` looks back or a `forecast` ahead.
    """

    kind: str
    name: str
    op: str
    test: Callable[[Any, Any], bool]
    than: Any
    than_metric: str = ""
    span_ms: int = 0
    statistic: str = ""
    min_count: int = 1
    output: int = 0
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, slots=True)
class Silent:
    """No reading of the device for `span_ms`."""

    span_ms: int


@dataclass(frozen=True, slots=True)
class Combination:
    """`all`, `any` or `not` over `parts`."""

    kind: str
    parts: "tuple[Condition, ...]"


Condition = Comparison | Silent | Combination


@dataclass(frozen=True, slots=True)
class Action:
    """One effect: `kind` is `command`, `alert` or `desired`; `detail` is its object, resolved for one decision."""

    kind: str
    detail: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As it is journalled."""
        return {self.kind: self.detail}


@dataclass(frozen=True, slots=True)
class Rule:
    """One validated rule; durations in milliseconds; `digest` identifies its content."""

    id: str
    device: str
    metric: str
    condition: Condition
    clear: Condition | None
    for_ms: int
    each: bool
    cooldown_ms: int
    actions: tuple[Action, ...]
    digest: str
    needs_tick: bool
    windows: tuple[tuple[str, int], ...]
    detectors: tuple[str, ...]
    matches: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class RuleSet:
    """Rules in order."""

    rules: tuple[Rule, ...]

    @property
    def models(self) -> set[str]:
        """Names of the models the rules ask."""
        found: set[str] = set()
        for rule in self.rules:
            for condition in (rule.condition, rule.clear):
                if condition is not None:
                    _collect_models(condition, found)
        return found


def _collect_models(condition: Condition, found: set[str]) -> None:
    if isinstance(condition, Comparison) and condition.kind == "model":
        found.add(condition.name)
    elif isinstance(condition, Combination):
        for part in condition.parts:
            _collect_models(part, found)


def parse_duration(value: object, field: str, maximum_ms: int = MAX_SPAN_MS) -> int:
    """`250ms`, `10s`, `5m`, `2h` or a number of seconds, as milliseconds; raises `RuleError`."""
    found: float | None = None
    if isinstance(value, str) and (match := _DURATION.match(value)):
        found = float(match[1]) * _UNITS[match[2]]
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        found = value * 1000
    if found is None or not 0 <= found <= maximum_ms:
        raise RuleError(field, f"{str(value)[:40]!r} is not a duration up to {maximum_ms // 1000} s", "use 250ms, 10s, 5m or 2h")
    return int(found)


def parse_rules(document: object) -> RuleSet:
    """The rules of a document (a list of rule objects). All or none: raises `RuleError` with the path of what is wrong."""
    if document is None:
        return RuleSet(())
    if not isinstance(document, list | tuple):
        raise RuleError("rules", f"is {type(document).__name__}, not a list", "send a list of rules")
    if len(document) > MAX_RULES:
        raise RuleError("rules", f"{len(document)} are over {MAX_RULES}", "send fewer rules")
    rules = tuple(_parse_rule(value, f"rules[{index}]") for index, value in enumerate(document))
    seen: set[str] = set()
    for index, rule in enumerate(rules):
        if rule.id in seen:
            raise RuleError(f"rules[{index}].id", f"{rule.id!r} stands twice", "give each rule its own id")
        seen.add(rule.id)
    return RuleSet(rules)


def _object(value: object, field: str, known: tuple[str, ...], required: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RuleError(field, f"is {type(value).__name__}, not an object", f"send an object with {', '.join(required or known)}")
    for key in value:
        if key not in known:
            raise RuleError(f"{field}.{str(key)[:40]}", "is unknown", f"use {', '.join(known)}")
    for key in required:
        if key not in value:
            raise RuleError(f"{field}.{key}", "is missing", f"send {key}")
    return value


def _name(value: object, field: str, pattern: re.Pattern[str] = ID_PATTERN) -> str:
    if not isinstance(value, str) or not pattern.match(value):
        raise RuleError(field, f"{str(value)[:40]!r} is not a name", "use 1 to 64 letters, digits, _ . : -")
    return value


def _parse_rule(value: object, field: str) -> Rule:
    data = _object(value, field, ("id", "on", "if", "clear", "for", "trigger", "cooldown", "then", "note"), ("id", "on", "if", "then"))
    on = _object(data["on"], f"{field}.on", ("device", "metric"), ("device",))
    trigger = data.get("trigger", "rise")
    if trigger not in ("rise", "each"):
        raise RuleError(f"{field}.trigger", f"{str(trigger)[:40]!r} is unknown", "use rise or each")
    nodes = [0]
    condition = _parse_condition(data["if"], f"{field}.if", 1, nodes)
    clear = _parse_condition(data["clear"], f"{field}.clear", 1, nodes) if data.get("clear") is not None else None
    if not isinstance(data["then"], list) or not 1 <= len(data["then"]) <= MAX_ACTIONS:
        raise RuleError(f"{field}.then", f"is not a list of 1 to {MAX_ACTIONS} actions", "send at least one action")
    actions = tuple(_parse_action(action, f"{field}.then[{index}]") for index, action in enumerate(data["then"]))
    metric = data["on"].get("metric", "")
    if metric != "" and (not isinstance(metric, str) or len(metric) > 64):
        raise RuleError(f"{field}.on.metric", f"{str(metric)[:40]!r} is not a metric", "name one metric, or leave it out")
    for_ms = parse_duration(data.get("for", 0), f"{field}.for")
    windows: set[tuple[str, int]] = set()
    detectors: set[str] = set()
    silent = [False]
    for part in (condition, clear):
        if part is not None:
            _collect(part, windows, detectors, silent)
    try:
        digest = blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=12).hexdigest()
    except (TypeError, ValueError) as error:
        raise RuleError(field, f"cannot be written as JSON ({error})", "use JSON types only") from None
    device = _name(on["device"], f"{field}.on.device", _PATTERN)
    return Rule(
        _name(data["id"], f"{field}.id"), device, metric, condition, clear, for_ms, trigger == "each",
        parse_duration(data.get("cooldown", 0), f"{field}.cooldown"), actions, digest, bool(for_ms) or silent[0], tuple(sorted(windows)), tuple(sorted(detectors)), _matcher(device),
    )


def _matcher(pattern: str) -> Callable[[str], bool]:
    if "*" not in pattern and "?" not in pattern:
        return lambda device: device == pattern
    expression = re.compile("".join(".*" if char == "*" else "." if char == "?" else re.escape(char) for char in pattern) + r"\Z")
    return lambda device: expression.match(device) is not None


def _collect(condition: Condition, windows: set[tuple[str, int]], detectors: set[str], silent: list[bool]) -> None:
    if isinstance(condition, Comparison):
        if condition.kind == "window":
            windows.add((condition.name, condition.span_ms))
        elif condition.kind in DETECTED:
            detectors.add(condition.name)
    elif isinstance(condition, Silent):
        silent[0] = True
    else:
        for part in condition.parts:
            _collect(part, windows, detectors, silent)


def _parse_condition(value: object, field: str, depth: int, nodes: list[int]) -> Condition:
    nodes[0] += 1
    if nodes[0] > MAX_NODES:
        raise RuleError(field, f"the rule has over {MAX_NODES} conditions", "split the rule")
    if depth > MAX_DEPTH:
        raise RuleError(field, f"is nested deeper than {MAX_DEPTH}", "flatten the condition")
    if not isinstance(value, dict):
        raise RuleError(field, f"is {type(value).__name__}, not an object", "send a condition")
    kinds = [key for key in _CONDITIONS if key in value]
    if len(kinds) != 1:
        raise RuleError(field, "is not one condition", f"use exactly one of {', '.join(_CONDITIONS)}")
    kind = kinds[0]
    if kind in ("all", "any"):
        _object(value, field, (kind,))
        parts = value[kind]
        if not isinstance(parts, list) or not parts:
            raise RuleError(f"{field}.{kind}", "is not a list of conditions", "send at least one condition")
        return Combination(kind, tuple(_parse_condition(part, f"{field}.{kind}[{index}]", depth + 1, nodes) for index, part in enumerate(parts)))
    if kind == "not":
        _object(value, field, ("not",))
        return Combination("not", (_parse_condition(value["not"], f"{field}.not", depth + 1, nodes),))
    if kind == "silent":
        _object(value, field, ("silent",))
        return Silent(parse_duration(value["silent"], f"{field}.silent"))
    return _parse_comparison(value, field, kind)


def _parse_comparison(value: dict[str, Any], field: str, kind: str) -> Comparison:
    data = _object(value, field, (kind, "op", "than", *(("output",) if kind == "model" else ())), (kind, "op", "than"))
    op = data["op"]
    if not isinstance(op, str) or op not in _OPERATORS:
        raise RuleError(f"{field}.op", f"{str(op)[:20]!r} is unknown", f"use one of {' '.join(_OPERATORS)}")
    than, than_metric = data["than"], ""
    if isinstance(than, dict):
        than_metric = str(_object(than, f"{field}.than", ("value",), ("value",))["value"])
        if op in ("in", "between"):
            raise RuleError(f"{field}.than", f"{op} needs a list", "send the values themselves")
    elif op == "in":
        if not isinstance(than, list) or not than or len(than) > 64 or not all(isinstance(item, int | float | str | bool) for item in than):
            raise RuleError(f"{field}.than", "is not a list of 1 to 64 values", "send the values that match")
    elif op == "between":
        if not isinstance(than, list) or len(than) != 2 or not all(_is_number(item) for item in than) or than[0] > than[1]:
            raise RuleError(f"{field}.than", "is not [low, high]", "send two numbers, the lower first")
    elif op in _ORDERING and not _is_number(than):
        raise RuleError(f"{field}.than", f"{str(than)[:40]!r} is not a finite number", f"{op} compares numbers")
    elif not isinstance(than, int | float | str | bool):
        raise RuleError(f"{field}.than", f"is {type(than).__name__}", "send a number, text or boolean")
    test = _OPERATORS[op]
    if kind == "value":
        if not isinstance(data["value"], str) or not data["value"]:
            raise RuleError(f"{field}.value", "is not a metric name", "name the metric")
        return Comparison("value", data["value"], op, test, than, than_metric)
    if kind == "model":
        output = data.get("output", 0)
        if type(output) is not int or not 0 <= output < 256:
            raise RuleError(f"{field}.output", f"{str(output)[:20]!r} is not an output number", "use 0 for the first output")
        return Comparison("model", _name(data["model"], f"{field}.model"), op, test, than, than_metric, output=output)
    if kind in DETECTED:
        return _parse_detected(data, field, kind, test, than, than_metric)
    window = _object(data["window"], f"{field}.window", ("metric", "over", "stat", "min_count"), ("metric", "over", "stat"))
    if window["stat"] not in STATISTICS:
        raise RuleError(f"{field}.window.stat", f"{str(window['stat'])[:20]!r} is unknown", f"use one of {', '.join(STATISTICS)}")
    if not isinstance(window["metric"], str) or not window["metric"]:
        raise RuleError(f"{field}.window.metric", "is not a metric name", "name the metric")
    span = parse_duration(window["over"], f"{field}.window.over")
    if span < 1:
        raise RuleError(f"{field}.window.over", "is no time at all", "use at least 1ms")
    least = window.get("min_count", 1)
    if type(least) is not int or not 1 <= least <= 1_000_000:
        raise RuleError(f"{field}.window.min_count", f"{str(least)[:20]!r} is not a count", "use 1 or more")
    return Comparison("window", window["metric"], op, test, than, than_metric, span, window["stat"], least)


def _parse_detected(data: dict[str, Any], field: str, kind: str, test: Callable[[Any, Any], bool], than: Any, than_metric: str) -> Comparison:
    """The three conditions that ask a detector; `data` has its `op` and `than` checked already."""
    op, within = data["op"], f"{field}.{kind}"
    known = {"anomaly": ("metric",), "quality": ("metric", "low", "high"), "forecast": ("metric", "within")}[kind]
    asked = _object(data[kind], within, known, known if kind != "quality" else ("metric",))
    metric = asked["metric"]
    if not isinstance(metric, str) or not metric:
        raise RuleError(f"{within}.metric", "is not a metric name", "name the metric")
    if kind == "quality":
        if op not in ("in", "==", "!="):
            raise RuleError(f"{field}.op", f"{op} does not compare qualities", "use in, == or !=")
        from .detectors.quality import QUALITIES  # only where a rule asks: see detectors/__init__.py

        for quality in than if op == "in" else (than,):
            if quality not in QUALITIES:
                raise RuleError(f"{field}.than", f"{str(quality)[:40]!r} is not a quality", f"use {', '.join(QUALITIES)}")
        for limit in ("low", "high"):
            if limit in asked and not _is_number(asked[limit]):
                raise RuleError(f"{within}.{limit}", f"{str(asked[limit])[:40]!r} is not a finite number", "send what the sensor can measure, or leave it out")
        low, high = asked.get("low", -math.inf), asked.get("high", math.inf)
        if low > high:
            raise RuleError(f"{within}.low", "is above high", "swap them")
        return Comparison(kind, metric, op, test, than, low=low, high=high)
    if kind == "anomaly":
        if op not in _ORDERING:
            raise RuleError(f"{field}.op", f"{op} does not fit a score", "use > >= < <= or between")
        return Comparison(kind, metric, op, test, than, than_metric)
    if op not in (">", ">=", "<", "<="):
        raise RuleError(f"{field}.op", f"{op} has no direction to cross in", "use > or >= for rising, < or <= for falling")
    span = parse_duration(asked["within"], f"{within}.within")
    if span < 1:
        raise RuleError(f"{within}.within", "is no time at all", "use at least 1ms")
    return Comparison(kind, metric, op, test, than, than_metric, span)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _target(value: object, field: str) -> str:
    return "$device" if value == "$device" else _name(value, field)


def _check_json(value: dict[str, Any], field: str) -> None:
    """Refuse what a record, a command or a twin could not carry."""
    try:
        check_tree(value, field, MAX_DEPTH)
    except ContractError as error:
        raise RuleError(error.field, error.problem, error.remedy) from None


def _parse_action(value: object, field: str) -> Action:
    if not isinstance(value, dict) or len(value) != 1:
        raise RuleError(field, "is not one action", "send {command: ...}, {alert: ...} or {desired: ...}")
    kind, detail = next(iter(value.items()))
    if kind == "alert":
        data = _object(detail, f"{field}.alert", ("severity", "text"), ("text",))
        severity = data.get("severity", "warning")
        if severity not in SEVERITIES:
            raise RuleError(f"{field}.alert.severity", f"{str(severity)[:20]!r} is unknown", f"use {', '.join(SEVERITIES)}")
        if not isinstance(data["text"], str) or len(data["text"]) > MAX_TEXT:
            raise RuleError(f"{field}.alert.text", f"is not text of at most {MAX_TEXT} characters", "shorten it")
        return Action("alert", {"severity": severity, "text": data["text"]})
    if kind == "command":
        data = _object(detail, f"{field}.command", ("device", "name", "args", "expires"), ("device", "name"))
        args = data.get("args", {})
        if not isinstance(args, dict) or len(json.dumps(args, default=str)) > MAX_ARGS_BYTES:
            raise RuleError(f"{field}.command.args", f"is not an object of at most {MAX_ARGS_BYTES} bytes", "send fewer arguments")
        _check_json(args, f"{field}.command.args")
        return Action("command", {
            "device": _target(data["device"], f"{field}.command.device"), "name": _name(data["name"], f"{field}.command.name"), "args": args,
            "expires_ms": parse_duration(data.get("expires", "60s"), f"{field}.command.expires"),
        })
    if kind == "desired":
        data = _object(detail, f"{field}.desired", ("device", "set"), ("device", "set"))
        if not isinstance(data["set"], dict) or len(json.dumps(data["set"], default=str)) > MAX_ARGS_BYTES:
            raise RuleError(f"{field}.desired.set", f"is not an object of at most {MAX_ARGS_BYTES} bytes", "send {property: value}")
        _check_json(data["set"], f"{field}.desired.set")
        return Action("desired", {"device": _target(data["device"], f"{field}.desired.device"), "set": data["set"]})
    raise RuleError(f"{field}.{str(kind)[:20]}", "is not an action", "use command, alert or desired")
