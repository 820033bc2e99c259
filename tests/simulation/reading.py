"""Files that people give the simulator: scenarios, lists of seeds, traces. What is wrong with one is said with its line and its field."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .scenario import EDGES_MAX, FAULTS, KINDS, Fault, Scenario, draw

FILE_MAX_BYTES = 64 << 20
"""A trace of 72 hours has a few megabytes; past this it is not one of our files."""

FAULTS_MAX = 10_000
"""Faults of one scenario."""

HOURS_MAX = 10_000
SEED_MAX = 2**63 - 1

NUMBER = (int, float)
FIELDS: dict[str, tuple[type, ...]] = {
    "seed": (int,), "hours": NUMBER, "kind": (str,), "edges": (int,), "devices": (int,), "idle_s": NUMBER, "burst_s": NUMBER, "telemetry_bytes": (int,), "retain": (int,),
    "wal_bytes": (int,), "bus_on_host": (bool,), "storage_keep": NUMBER, "faults": (list,),
}
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, SEED_MAX), "hours": (0.01, HOURS_MAX), "edges": (1, EDGES_MAX), "devices": (1, 20), "idle_s": (0.1, 1_000_000), "burst_s": (0.1, 1_000_000),
    "telemetry_bytes": (1 << 16, 1 << 30), "retain": (0, 10_000_000), "wal_bytes": (1 << 15, 1 << 24), "storage_keep": (0, 1),
}
FAULT_FIELDS: dict[str, tuple[type, ...]] = {"at": NUMBER, "kind": (str,), "edge": (int,), "for": NUMBER, "value": NUMBER}

WHOLE: dict[str, tuple[int, int]] = {
    "partition": (0, 2), "hub_partition": (0, 2), "bus_restart": (0, 1), "hub_restore": (0, 2), "power_cut": (0, 100_000), "disk_full": (0, 1 << 30), "desired": (0, 3), "clone": (0, 1),
}
"""What `value` may be where it is a whole number."""

VALUES: dict[str, tuple[float, float]] = {"flaky": (0, 1), "delay": (0, 3600), "slow_disk": (0, 60), "clock_jump": (-1e9, 1e9), "hub_clock": (-1e9, 1e10), "clock_1970": (-1, 1e9)}
"""What `value` may be where it is not; the other kinds take none."""

TRACE_TIME = re.compile(r"\d+d [0-2]\d:[0-5]\d:[0-6]\d\.\d{3}  ")
TRACE_REST = re.compile(r"\S+ +\S.*")
TRACE_HEAD = "# scenario "


class ScenarioError(ValueError):
    """A file that cannot be used: where (file and line), which field, what would mend it."""


def text_of(path: Path) -> str:
    """A file's text; raises `ScenarioError`."""
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_MAX_BYTES + 1)
    except OSError as error:
        raise ScenarioError(f"{path}:1: cannot be read: {error.strerror or error}") from None
    if len(data) > FILE_MAX_BYTES:
        raise ScenarioError(f"{path}:1: has over {FILE_MAX_BYTES >> 20} MiB; give a smaller file")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}:{data.count(10, 0, error.start) + 1}: is not UTF-8 text: byte {data[error.start]:#04x}") from None
    if not text.strip():
        raise ScenarioError(f"{path}:1: is empty")
    return text


# -- scenarios ---------------------------------------------------------------------------------------------------------------------

def line_of(text: str, keys: list[str | int]) -> int:
    """The line of `text` (JSON that parses) where the value at `keys` stands."""
    decoder = json.JSONDecoder()
    position = 0

    def skip() -> None:
        nonlocal position
        while position < len(text) and text[position] in " \t\r\n:,":
            position += 1

    for key in keys:
        skip()
        if position >= len(text) or text[position] not in "{[":
            break
        position += 1
        index = 0
        while True:
            skip()
            if position >= len(text) or text[position] in "}]":
                break
            if isinstance(key, str):
                name, position = decoder.raw_decode(text, position)
                skip()
                if name == key:
                    break
            elif index == key:
                break
            index += 1
            _, position = decoder.raw_decode(text, position)
    skip()
    return text.count("\n", 0, position) + 1


@dataclass(frozen=True, slots=True)
class _Source:
    """A scenario's text and where it comes from, for errors."""

    text: str
    where: str

    def bad(self, keys: list[str | int], problem: str) -> ScenarioError:
        name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
        return ScenarioError(f"{self.where}:{line_of(self.text, keys)}: field {name}: {problem}")

    def check(self, entry: dict[str, Any], fields: dict[str, tuple[type, ...]], under: list[str | int]) -> None:
        """Known fields of the right type."""
        for key, given in entry.items():
            if key not in fields:
                raise self.bad([*under, key], f"is unknown; use {', '.join(fields)}")
            if not isinstance(given, fields[key]) or (isinstance(given, bool) and bool not in fields[key]):
                raise self.bad([*under, key], f"is {type(given).__name__}; give {' or '.join(kind.__name__ for kind in fields[key])}")


def parse(text: str, where: str, seed: int | None = None, hours: float | None = None) -> Scenario:
    """A scenario file's text; what it leaves out is drawn from its seed. Raises `ScenarioError` with line and field."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ScenarioError(f"{where}:{getattr(error, 'lineno', 1)}: not JSON ({error}); send one JSON object") from None
    if not isinstance(value, dict):
        raise ScenarioError(f"{where}:1: is {type(value).__name__}, not an object; write {{\"seed\": 1, \"faults\": [...]}}")
    source = _Source(text, where)
    source.check(value, FIELDS, [])
    if value.get("kind", "mixed") not in KINDS:
        raise source.bad(["kind"], f"{value['kind']!r} is unknown; use {', '.join(KINDS)}")
    for key, (low, high) in RANGES.items():
        if key in value and not low <= value[key] <= high:
            raise source.bad([key], f"{value[key]} is outside {low}..{high}")
    if value.get("kind") == "mirror" and value.get("edges", 2) != 2:
        raise source.bad(["edges"], f"{value['edges']} in a mirror; it has 2, the edge and its twin")
    made = draw(int(value.get("seed", seed or 0)), float(value.get("hours", hours or 72.0)), value.get("kind", "mixed" if "faults" in value else ""), edges=value.get("edges", 0))
    for key, given in value.items():
        if key != "faults":
            setattr(made, key, given)
    if "faults" in value:
        if len(value["faults"]) > FAULTS_MAX:
            raise source.bad(["faults", FAULTS_MAX], f"is one too many; give at most {FAULTS_MAX}")
        made.faults = sorted((_fault(source, made, index, entry) for index, entry in enumerate(value["faults"])), key=lambda fault: fault.at)
    return made


def _fault(source: _Source, made: Scenario, index: int, entry: Any) -> Fault:
    here: list[str | int] = ["faults", index]
    if not isinstance(entry, dict):
        raise source.bad(here, f"is {type(entry).__name__}; give an object with {', '.join(FAULT_FIELDS)}")
    source.check(entry, FAULT_FIELDS, here)
    for key in ("at", "kind"):
        if key not in entry:
            raise source.bad(here, f"has no {key}; give at and kind")
    kind = entry["kind"]
    if kind not in FAULTS:
        raise source.bad([*here, "kind"], f"{kind!r} is unknown; use {', '.join(FAULTS)}")
    if not 0 <= entry.get("edge", 0) < made.edges:
        raise source.bad([*here, "edge"], f"{entry['edge']} is not one of the {made.edges} edges; give 0 to {made.edges - 1}")
    for key in ("at", "for"):
        if not 0 <= entry.get(key, 0) <= made.seconds:
            raise source.bad([*here, key], f"{entry[key]} lies outside the {made.hours:g} hours; give seconds from 0 to {made.seconds:.0f}")
    value = entry.get("value", 0)
    low, high = WHOLE.get(kind) or VALUES.get(kind) or (0, 0)
    if not low <= value <= high or (kind not in VALUES and value != int(value)):
        raise source.bad([*here, "value"], f"{value} is not {'a number' if kind in VALUES else 'a whole number'} from {low:g} to {high:g}: {FAULTS[kind]}")
    return Fault(float(entry["at"]), kind, entry.get("edge", 0), float(entry.get("for", 0)), value)


def load(path: Path, seed: int | None = None, hours: float | None = None) -> Scenario:
    """A scenario file; raises `ScenarioError`."""
    return parse(text_of(path), str(path), seed, hours)


# -- seeds -------------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Seed:
    """One line of a file of seeds."""

    seed: int
    hours: float
    kind: str = ""


def read_seeds(path: Path, hours: float) -> list[Seed]:
    """A file with one seed a line: a number, or an object with `seed` and perhaps `hours` and `kind`. Errors name line and field."""
    found: list[Seed] = []
    for number, line in enumerate(text_of(path).split("\n"), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise ScenarioError(f"{path}:{number}: field seed: {text[:40]!r} is neither a number nor a JSON object; write 17 or {{\"seed\": 17, \"hours\": 72}}") from None
        entry = value if isinstance(value, dict) else {"seed": value}
        for key in entry:
            if key not in ("seed", "hours", "kind"):
                raise ScenarioError(f"{path}:{number}: field {key}: is unknown; use seed, hours, kind")
        if type(entry.get("seed")) is not int or not 0 <= entry["seed"] <= SEED_MAX:
            raise ScenarioError(f"{path}:{number}: field seed: {str(entry.get('seed'))[:40]!r} is not a whole number from 0 to {SEED_MAX}")
        if type(entry.get("hours", hours)) not in NUMBER or not 0 < entry.get("hours", hours) <= HOURS_MAX:
            raise ScenarioError(f"{path}:{number}: field hours: {entry['hours']!r} is not a number of hours up to {HOURS_MAX}")
        if entry.get("kind", "") not in ("", *KINDS):
            raise ScenarioError(f"{path}:{number}: field kind: {entry['kind']!r} is unknown; use {', '.join(KINDS)}")
        found.append(Seed(entry["seed"], float(entry.get("hours", hours)), entry.get("kind", "")))
    if not found:
        raise ScenarioError(f"{path}:1: field seed: no line holds one")
    return found


# -- traces ------------------------------------------------------------------------------------------------------------------------

def head_of(scenario: Scenario) -> str:
    """The first line of a trace: the scenario that it is of."""
    return TRACE_HEAD + json.dumps(scenario.to_json())


def read_trace(path: Path) -> tuple[Scenario, list[str]]:
    """A trace: its scenario and its lines after the first. Errors name line and field."""
    text = text_of(path)
    head, *lines = text.removesuffix("\n").split("\n")
    if not head.startswith(TRACE_HEAD):
        raise ScenarioError(f"{path}:1: field scenario: is not there; the first line of a trace is '{TRACE_HEAD}' and a JSON object")
    scenario = parse(head.removeprefix(TRACE_HEAD), str(path))
    for number, line in enumerate(lines, 2):
        time = TRACE_TIME.match(line)
        if time is None or TRACE_REST.fullmatch(line, time.end()) is None:
            raise ScenarioError(f"{path}:{number}: field {'machine' if time else 'time'}: {line[:40]!r} is not '0d 00:00:00.000  machine    what happened'")
    if not lines or not text.endswith("\n") or not (lines[-1].endswith(f"{'world':10} end") or " VIOLATION of " in lines[-1]):
        raise ScenarioError(f"{path}:{len(lines) + 1}: field what: the trace breaks off; its last line says that the world ends, or what was violated")
    return scenario, lines


def difference(path: Path, kept: list[str], now: list[str]) -> str:
    """Where a run departs from its trace, empty where it does not: the first line of `path` (whose first is the scenario) that is another one."""
    for number, (one, other) in enumerate(zip(kept, now, strict=False), 2):
        if one != other:
            return f"{path}:{number}: the trace says {one!r}, this run {other!r}"
    if len(kept) != len(now):
        return f"{path}:{min(len(kept), len(now)) + 2}: the trace has {len(kept)} lines of events, this run {len(now)}"
    return ""
