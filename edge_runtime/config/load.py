"""Reading the configuration: defaults < YAML < environment. Every problem is named, all at once."""

import math
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..contract.lean_dataclass import dataclass, field, is_lean, metadata_of
from ..contract.schema import ID_PATTERN
from . import identity, quick_form
from .schema import EdgeConfig, ModelConfig

MAX_FILE_BYTES = 1 << 20
"""A configuration is text by a person; a megabyte is a mistake."""

MAX_DEPTH = 24
MAX_NODES = 20_000
"""Values of one file after YAML aliases are expanded: stops alias bombs."""

ENV_PREFIX = "NOVACRON_EDGE__"

# Compiled when one is first met: most configurations have none, and the agent's start waits for each.
_SIZE = r"(\d+(?:\.\d+)?)\s*(B|kB|KB|KiB|MB|MiB|GB|GiB|TB|TiB)?\Z"
_SIZES = {
    None: 1, "B": 1, "kB": 10**3, "KB": 10**3, "KiB": 1 << 10, "MB": 10**6, "MiB": 1 << 20, "GB": 10**9, "GiB": 1 << 30, "TB": 10**12, "TiB": 1 << 40,
}
_TIME = r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\Z"
_TIMES = {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_VARIABLE = r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong: where it comes from, the dotted key, what, and the remedy."""

    source: str
    key: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.source}: {self.key}: {self.problem}; {self.remedy}"


class ConfigError(ValueError):
    """A configuration that cannot be used; `problems` lists everything that is wrong with it."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """The configuration, what is odd about it, and where each key that is not a default comes from."""

    config: EdgeConfig
    warnings: list[str]
    source_of: dict[str, str]


@dataclass(slots=True)
class _Reader:
    source: str
    env: Mapping[str, str]
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, name: str, problem: str, remedy: str) -> None:
        self.problems.append(Problem(self.source, name, problem, remedy))

    def expand(self, name: str, text: str) -> str:
        def value(match: re.Match[str]) -> str:
            found = self.env.get(match[1], match[2])
            if found is None:
                self.wrong(name, f"${{{match[1]}}} is not set", f"set {match[1]} or write ${{{match[1]}:-default}}")
                return ""
            return found

        return re.sub(_VARIABLE, value, text) if "${" in text else text


def load_config(path: Path | None, env: Mapping[str, str] | None = None) -> LoadedConfig:
    """Read `path` (None: defaults only) and the environment.

    Raises:
        ConfigError: with every problem found.
    """
    environment = os.environ if env is None else env
    data: dict[str, Any] = {}
    warnings: list[str] = []
    source_of: dict[str, str] = {}
    reader = _Reader(str(path) if path else "defaults", environment)
    if path is not None:
        data = read_yaml(path)
        from .prototype import is_prototype, translate

        if is_prototype(data):
            data, warnings, unknown = translate(data, reader.expand)
            for name, remedy in unknown:
                reader.wrong(name, "is unknown", remedy)
    merged = _merge(reader, EdgeConfig, data, "", source_of)
    overrides = _Reader("environment", environment)
    _override(overrides, merged, source_of)
    problems = reader.problems + overrides.problems
    if problems:
        raise ConfigError(problems)
    config: EdgeConfig = _build(EdgeConfig, merged)
    return LoadedConfig(_complete(config, environment, warnings), warnings, source_of)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as an object; raises `ConfigError`. PyYAML is imported here and only here, and not where the file's quick form is beside it (`quick_form`)."""
    source = str(path)
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= MAX_FILE_BYTES else b""
    except OSError as error:
        raise ConfigError([Problem(source, "file", error.strerror or str(error), "give a readable file with --config")]) from None
    if size > MAX_FILE_BYTES:
        raise ConfigError([Problem(source, "file", f"{size} bytes are over {MAX_FILE_BYTES}", "a configuration is smaller")])
    if (kept := quick_form.read(path, raw)) is not None:
        return kept
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(source, f"byte {error.start}", "is not UTF-8", "save the file as UTF-8")]) from None
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe, and refuses keys that stand twice."""

    def mapping(loader: Any, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            name = name_of(loader, key_node)
            try:
                if name in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {name!r} stands twice", key_node.start_mark)
                seen.add(name)
            except TypeError:
                raise yaml.constructor.ConstructorError(None, None, "a key is not text", key_node.start_mark) from None
        loader.flatten_mapping(node)
        return {name_of(loader, k): loader.construct_object(v, deep=deep) for k, v in node.value}

    def name_of(loader: Any, node: Any) -> Any:
        # YAML 1.1 takes a bare `on` or `yes` for a boolean; as a key it is a name (rules have `on:`).
        return node.value if node.tag == "tag:yaml.org,2002:bool" else loader.construct_object(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, lambda loader, node: mapping(loader, node, deep=True))
    try:
        value = yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark is not None else "file"
        problem = getattr(error, "problem", None) or (str(error).splitlines() or ["unreadable"])[0]
        raise ConfigError([Problem(source, where, str(problem), "write valid YAML")]) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError([Problem(source, "file", f"is a {type(value).__name__}, not a mapping of keys", "write `key: value` lines")])
    stack: list[tuple[Any, int]] = [(value, 1)]
    count = 0
    while stack:
        item, depth = stack.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_NODES:
            raise ConfigError([Problem(source, "file", f"is deeper than {MAX_DEPTH} or has over {MAX_NODES} values", "make it smaller")])
        if isinstance(item, dict):
            stack += [(child, depth + 1) for child in item.values()]
        elif isinstance(item, list):
            stack += [(child, depth + 1) for child in item]
    return value


def _hints(cls: type) -> dict[str, Any]:
    """Attribute -> type. No section of the configuration inherits, and none has an annotation in quotes (tested), so nothing has to be resolved."""
    return cls.__annotations__


def _origin(kind: Any) -> Any:
    """What `typing.get_origin` says of `tuple[...]` and `dict[...]`, the only ones here, without loading it."""
    return getattr(kind, "__origin__", None)


def _known_names(cls: type) -> dict[str, str]:
    """Accepted name -> attribute: the attribute and, where it is free, the attribute without its unit."""
    attributes: tuple[str, ...] = cls.__match_args__  # type: ignore[attr-defined]
    names = {name: name for name in attributes}
    for name in attributes:
        for unit in ("_s", "_bytes", "_hours"):
            short = name.removesuffix(unit)
            if short != name and short not in names:
                names[short] = name
    return names


def _merge(reader: _Reader, cls: type, data: Any, prefix: str, source_of: dict[str, str]) -> dict[str, Any]:
    """`data` checked against `cls`, as nested dictionaries of attribute to value (only what is set)."""
    if data is None:
        return {}
    if not isinstance(data, dict):
        reader.wrong(prefix.rstrip(".") or "file", f"is {type(data).__name__}, not a mapping", "write `key: value` lines below it")
        return {}
    names, hints, limits, out = _known_names(cls), _hints(cls), metadata_of(cls), {}
    for given, value in data.items():
        attribute = names.get(given) if isinstance(given, str) else None
        if attribute is None:
            import difflib

            near = difflib.get_close_matches(str(given), names, n=1)
            reader.wrong(f"{prefix}{given}", "is unknown", f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(sorted(set(names.values())))}")
            continue
        path = prefix + attribute
        if is_lean(hints[attribute]):
            out[attribute] = _merge(reader, hints[attribute], value, path + ".", source_of)
        else:
            out[attribute] = _value(reader, hints[attribute], limits[attribute], value, path)
            source_of[path] = reader.source
    return out


def _value(reader: _Reader, kind: Any, metadata: Mapping[str, Any], value: Any, path: str) -> Any:
    if isinstance(value, str):
        value = reader.expand(path, value)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return value.lower() in ("true", "yes", "on", "1")
        reader.wrong(path, f"{str(value)[:40]!r} is not a boolean", "use true or false")
        return False
    if kind is int or kind is float:
        return _number(reader, kind, metadata, value, path)
    if kind is str:
        if value is None:
            return ""
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            reader.wrong(path, f"is {type(value).__name__}, not text", "write text")
            return ""
        text = str(value)
        if metadata["choices"] and text not in metadata["choices"]:
            reader.wrong(path, f"{text[:40]!r} is unknown", f"use one of {', '.join(metadata['choices'])}")
        return text
    origin = _origin(kind)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, str | int | float | bool) for k, v in value.items()):
            reader.wrong(path, "is not a mapping of text to text", "write `name: text` lines below it")
            return {}
        return {k: reader.expand(f"{path}.{k}", v) if isinstance(v, str) else str(v) for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, list):
            reader.wrong(path, f"is {type(value).__name__}, not a list", "write a list (`- ...`)")
            return ()
        if kind.__args__[0] is str:
            return _texts(reader, value, path)
        if kind.__args__[0] is ModelConfig:
            return tuple(
                _build(ModelConfig, _merge(reader, ModelConfig, {"manifest": item} if isinstance(item, str) else item, f"{path}[{index}].", {}))
                for index, item in enumerate(value)
            )
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                reader.wrong(f"{path}[{index}]", f"is {type(item).__name__}, not a rule", "write a rule with id, on, if and then")
        return tuple(value)
    raise TypeError(f"{path}: no reader for {kind}")


def _texts(reader: _Reader, value: list[Any], path: str) -> tuple[str, ...]:
    for index, item in enumerate(value):
        if not isinstance(item, str):
            reader.wrong(f"{path}[{index}]", f"is {type(item).__name__}, not text", "write text, in quotes")
    return tuple(reader.expand(path, item) for item in value if isinstance(item, str))


def _number(reader: _Reader, kind: type, metadata: Mapping[str, Any], value: Any, path: str) -> Any:
    unit = "bytes" if path.endswith("_bytes") else "s" if path.endswith("_s") else ""
    number: float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value) if math.isfinite(value) else None
    elif isinstance(value, str):
        text = value.strip()
        if unit == "bytes" and (match := re.match(_SIZE, text)):
            number = float(match[1]) * _SIZES[match[2]]
        elif unit == "s" and (match := re.match(_TIME, text)):
            number = float(match[1]) * _TIMES[match[2]]
        elif not unit:
            try:
                number = float(text)
            except ValueError:
                number = None
    remedy = {"bytes": "use bytes, 64MiB or 1GB", "s": "use seconds, 250ms, 10s, 5m or 2h"}.get(unit, "use a number")
    if number is None or not math.isfinite(number) or (kind is int and number != int(number)):
        reader.wrong(path, f"{str(value)[:40]!r} is not {'a whole number' if kind is int else 'a number'}", remedy)
        return kind(0)
    low, high = metadata["low"], metadata["high"]
    if (low is not None and number < low) or (high is not None and number > high):
        reader.wrong(path, f"{number:g} is outside {low:g} to {high:g}", remedy)
    return kind(number)


def _override(reader: _Reader, merged: dict[str, Any], source_of: dict[str, str]) -> None:
    """`NOVACRON_EDGE__UPLINK__URL=...` and the like."""
    for name, value in sorted(reader.env.items()):
        if not name.startswith(ENV_PREFIX):
            continue
        path = name[len(ENV_PREFIX):].lower().split("__")
        cls: type = EdgeConfig
        target = merged
        for depth, part in enumerate(path):
            attribute = _known_names(cls).get(part)
            if attribute is None:
                reader.wrong(name, "names no key", f"known here are {', '.join(sorted(set(_known_names(cls).values())))}")
                break
            kind = _hints(cls)[attribute]
            if depth == len(path) - 1:
                if is_lean(kind) or _origin(kind) in (tuple, dict):
                    reader.wrong(name, "is a section or a list", "set it in the file")
                    break
                target[attribute] = _value(reader, kind, metadata_of(cls)[attribute], value, ".".join([*path[:-1], attribute]))
                source_of[".".join([*path[:-1], attribute])] = f"environment {name}"
            elif not is_lean(kind):
                reader.wrong(name, f"{part} is not a section", f"use {ENV_PREFIX}{'__'.join(path[: depth + 1]).upper()}")
                break
            else:
                target = target.setdefault(attribute, {})
                cls = kind


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    hints = _hints(cls)
    return cls(**{name: _build(hints[name], value) if is_lean(hints[name]) else value for name, value in values.items()})


def _complete(config: EdgeConfig, env: Mapping[str, str], warnings: list[str]) -> EdgeConfig:
    """Fill what depends on the machine; check what depends on other keys."""
    data_dir = config.data_dir or env.get("STATE_DIRECTORY", "") or str(Path(env.get("HOME", "/tmp")) / ".local/share/novacron/edge")
    host = re.sub(r"[^A-Za-z0-9_.:-]", "-", socket.gethostname()).lstrip("_.:-")[:64] or "edge"
    kept = identity.kept(data_dir)
    kept = kept if ID_PATTERN.match(kept) else ""
    edge_id = config.edge_id or kept or host
    problems = []
    for key, value in (("edge_id", edge_id), ("devices.host.device_id", config.devices.host.device_id)):
        if not ID_PATTERN.match(value):
            problems.append(Problem("configuration", key, f"{value[:80]!r} is not a name", "use 1 to 64 letters, digits, _ . : -"))
    if kept not in ("", edge_id):
        problems.append(Problem("configuration", "edge_id", f"{edge_id[:80]!r}, and {data_dir} is the data folder of {kept!r}, whose records and workloads the hub has under that name", f"say {kept}, or give this edge a data_dir of its own"))
    elif not config.edge_id and edge_id != host:
        warnings.append(f"edge_id: this host is called {host}, and the edge stays {edge_id}, whose data folder {data_dir} is")
    if config.api.enabled and not config.api.token_file and config.api.host not in ("127.0.0.1", "::1", "localhost"):
        problems.append(Problem("configuration", "api.host", f"{config.api.host} is reachable from outside and no token is asked for", "set api.token_file, or listen on 127.0.0.1"))
    for name, part in (("uplink", config.uplink), ("bus", config.bus)):
        if part.password and part.password_file:
            problems.append(Problem("configuration", f"{name}.password_file", f"{name}.password is set too", "set one of them"))
    if config.duties.enabled:
        problems += _check_duties(config)
    if config.workloads.enabled and config.workloads.registries:
        problems += _check_registries(config)
    if problems:
        raise ConfigError(problems)
    given = {key: getattr(config, key) for key in EdgeConfig.__match_args__}
    return EdgeConfig(**{**given, "edge_id": edge_id, "node": config.node or edge_id, "data_dir": data_dir})


def _check_registries(config: EdgeConfig) -> list[Problem]:
    from ..workloads.images.errors import ImageError
    from ..workloads.images.reference import hosts  # only where registries are configured

    try:
        hosts(config.workloads.registries)
    except ImageError as error:
        return [Problem("configuration", error.field, error.problem, error.remedy)]
    return []


def _check_duties(config: EdgeConfig) -> list[Problem]:
    """What sharing devices needs of the rest of the configuration."""
    from ..contract.errors import ContractError
    from ..contract.limits import MAX_DUTY_PATTERNS
    from ..contract.site_messages import check_patterns  # only where duties are shared: an edge without pays nothing

    problems = []
    if not config.bus.enabled or not config.bus.url:
        problems.append(Problem("configuration", "duties.enabled", "no local bus is configured", "set bus.url to the broker that the edges of this site share"))
    if not ID_PATTERN.match(config.site):
        problems.append(Problem("configuration", "site", f"{config.site[:80]!r} is not a name", "use 1 to 64 letters, digits, _ . : -: it is part of topics where duties are shared"))
    if len(config.duties.home) > MAX_DUTY_PATTERNS:
        problems.append(Problem("configuration", "duties.home", f"{len(config.duties.home)} patterns are over {MAX_DUTY_PATTERNS}", "use * and ? to say more with less"))
    try:
        check_patterns(config.duties.home, "duties.home")
    except ContractError as error:
        problems.append(Problem("configuration", error.field, error.problem, error.remedy))
    return problems


def public_dict(config: EdgeConfig) -> dict[str, Any]:
    """The configuration as JSON, secrets replaced."""
    from dataclasses import fields, is_dataclass

    def show(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return {
                item.name: ("***" if getattr(value, item.name) else "") if item.metadata.get("secret") else show(getattr(value, item.name))
                for item in fields(value)
            }
        if isinstance(value, tuple):
            return [show(item) for item in value]
        return value

    shown: dict[str, Any] = show(config)
    return shown
