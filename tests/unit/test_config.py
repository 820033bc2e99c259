"""The configuration: defaults < YAML < environment, every key settable, every problem named, nothing heavy or hostile let through."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.cli import main
from edge_runtime.config import ConfigError, EdgeConfig, LoadedConfig, load_config, public_dict
from edge_runtime.config.document import markdown
from edge_runtime.config.load import MAX_DEPTH, MAX_FILE_BYTES, MAX_NODES, _known_names

ROOT = Path(__file__).resolve().parents[2]


def load(tmp_path: Path, text: str | bytes, env: dict[str, str] | None = None) -> LoadedConfig:
    path = tmp_path / "edge.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path, {"HOME": str(tmp_path), **(env or {})})


def problems(tmp_path: Path, text: str | bytes, env: dict[str, str] | None = None) -> dict[str, str]:
    """Key to the whole line of every problem; each has a source and a remedy."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, env)
    assert all(item.source and item.problem and item.remedy for item in caught.value.problems)
    return {item.key: str(item) for item in caught.value.problems}


def keys(cls: type = EdgeConfig, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Every key of the schema: path, type, dataclass field."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            yield from keys(hints[item.name], (*prefix, item.name))  # type: ignore[arg-type]
        else:
            yield (*prefix, item.name), hints[item.name], item


SCALARS = [(path, kind, item) for path, kind, item in keys() if kind in (bool, int, float, str)]


def another(kind: Any, item: Any) -> Any:
    """A valid value that is not the default."""
    default = item.default if item.default is not MISSING else None
    if kind is bool:
        return not default
    if kind is str:
        return next(choice for choice in item.metadata["choices"] if choice != default) if item.metadata["choices"] else "other"
    low, high = item.metadata["low"], item.metadata["high"]
    return kind(high if high != default else low)


def nested(path: tuple[str, ...], value: Any) -> str:
    out: Any = value
    for part in reversed(path):
        out = {part: out}
    return json.dumps(out)  # JSON is YAML


def found(config: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        config = getattr(config, part)
    return config


# -- every key -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "kind", "item"), SCALARS, ids=[".".join(path) for path, _, _ in SCALARS])
def test_every_key_can_be_set_by_file_and_environment_and_the_environment_wins(tmp_path: Path, path: tuple[str, ...], kind: Any, item: Any) -> None:
    value = another(kind, item)
    # `api.host` off loopback asks for a token, shared duties for a bus; these rules have their own tests.
    env = {("api", "host"): {"NOVACRON_EDGE__API__TOKEN_FILE": "/token"}, ("duties", "enabled"): {"NOVACRON_EDGE__BUS__URL": "mqtt://h"}}.get(path, {})
    loaded = load(tmp_path, nested(path, value), env)
    assert found(loaded.config, path) == value and type(found(loaded.config, path)) is kind
    assert loaded.source_of[".".join(path)].endswith("edge.yaml")
    name = "NOVACRON_EDGE__" + "__".join(path).upper()
    text = str(value).lower() if kind is bool else str(value)
    assert found(load(tmp_path, "", {**env, name: text}).config, path) == value
    file_value = value if item.default is MISSING or path == ("edge_id",) else item.default
    loaded = load(tmp_path, nested(path, file_value) if file_value != "" else "", {**env, name: text})
    assert found(loaded.config, path) == value and loaded.source_of[".".join(path)] == f"environment {name}"


def test_the_other_keys_can_be_set_by_file(tmp_path: Path) -> None:
    rest = {".".join(path) for path, kind, _ in keys() if kind not in (bool, int, float, str)}
    assert rest == {"labels", "decisions.rules", "decisions.models", "duties.home", "workloads.taints", "workloads.runtimes", "workloads.mounts", "workloads.publish", "workloads.bridges", "workloads.registries"}
    config = load(tmp_path, "labels: {line: 4, hot: true}\ndecisions:\n  rules: [{id: r}]\n  models: [shipped:host-anomaly/portable, {manifest: m.json, name: n, data: d}]\nduties: {home: ['boiler-*', pump-1]}\nworkloads: {taints: [{key: k, effect: NoSchedule}], runtimes: [crun], mounts: [/srv/data], publish: [192.0.2.7], bridges: [br0], registries: [{host: r.example, short: true}]}\n").config
    assert config.duties.home == ("boiler-*", "pump-1")
    assert config.workloads.runtimes == ("crun",) and config.workloads.mounts == ("/srv/data",) and config.workloads.publish == ("192.0.2.7",) and config.workloads.bridges == ("br0",) and config.workloads.registries == ({"host": "r.example", "short": True},)
    assert config.labels == {"line": "4", "hot": "True"} and config.decisions.rules == ({"id": "r"},) and config.workloads.taints == ({"key": "k", "effect": "NoSchedule"},)
    assert [(item.manifest, item.name, item.data) for item in config.decisions.models] == [("shipped:host-anomaly/portable", "", ""), ("m.json", "n", "d")]


def test_defaults_are_the_schemas_and_what_depends_on_the_machine_is_filled(tmp_path: Path) -> None:
    config = load_config(None, {"HOME": "/home/x"}).config
    for path, _, item in keys():
        if path not in (("edge_id",), ("node",), ("data_dir",)):
            assert found(config, path) == (item.default if item.default is not MISSING else item.default_factory())
    assert config.edge_id and config.node == config.edge_id and config.data_dir == "/home/x/.local/share/novacron/edge"
    assert load_config(None, {"STATE_DIRECTORY": "/var/lib/novacron/edge"}).config.data_dir == "/var/lib/novacron/edge"
    assert load(tmp_path, "# nothing\n").config.site == "default"


@pytest.mark.parametrize(("text", "value"), [
    ("keepalive: 15", 15.0), ("keepalive: 2500ms", 2.5), ("keepalive: 2500 ms", 2.5), ("keepalive: 5m", 300.0), ("keepalive_s: 0.5h", 1800.0), ("keepalive_s: '20'", 20.0), ("keepalive: 10s", 10.0),
])
def test_units_of_time(tmp_path: Path, text: str, value: float) -> None:
    assert load(tmp_path, f"uplink: {{{text}}}").config.uplink.keepalive_s == value


@pytest.mark.parametrize(("text", "value"), [("64MiB", 64 << 20), ("1GB", 10**9), ("1.5GiB", 3 << 29), ("2 MB", 2_000_000), ("1048576", 1 << 20), ("2048KiB", 2 << 20), ("1e9", None), ("12 apples", None), ("-1GB", None)])
def test_units_of_size(tmp_path: Path, text: str, value: int | None) -> None:
    for name in ("max_bytes", "max"):
        if value is None:
            assert "64MiB" in problems(tmp_path, f"journal: {{{name}: {text!r}}}")["journal.max_bytes"]
        else:
            assert load(tmp_path, f"journal: {{{name}: {text!r}}}").config.journal.max_bytes == value


# -- what is refused -----------------------------------------------------------------------------------------------------------

BAD = [
    ("uplnk: {}", "uplnk", "did you mean uplink?"), ("uplink: {urll: x}", "uplink.urll", "did you mean uplink.url?"), ("zzz: 1", "zzz", "known are"), ("1: x", "1", "unknown"),
    ("devices: {host: {intervall: 1}}", "devices.host.intervall", "did you mean devices.host.interval"), ("uplink: 3", "uplink", "not a mapping"), ("uplink: [a]", "uplink", "not a mapping"),
    ("uplink: {enabled: maybe}", "uplink.enabled", "use true or false"), ("uplink: {enabled: 3}", "uplink.enabled", "use true or false"), ("uplink: {keepalive: soon}", "uplink.keepalive_s", "250ms"),
    ("uplink: {keepalive: true}", "uplink.keepalive_s", "250ms"), ("uplink: {keepalive: .nan}", "uplink.keepalive_s", "250ms"), ("uplink: {keepalive: .inf}", "uplink.keepalive_s", "250ms"),
    ("uplink: {keepalive: 1}", "uplink.keepalive_s", "outside 2 to 3600"), ("uplink: {inflight: 1.5}", "uplink.inflight", "whole number"), ("uplink: {inflight: 101}", "uplink.inflight", "outside 1 to 100"),
    ("uplink: {inflight: [1]}", "uplink.inflight", "use a number"), ("uplink: {protocol: 4}", "uplink.protocol", "auto, 5, 3.1.1"), ("uplink: {url: [a]}", "uplink.url", "not text"),
    ("uplink: {url: true}", "uplink.url", "not text"), ("edge_id: 2024-01-01", "edge_id", "not text"), ("edge_id: 'a b'", "edge_id", "not a name"), ("devices: {host: {device_id: '#'}}", "devices.host.device_id", "not a name"),
    ("labels: [a]", "labels", "mapping of text"), ("labels: {a: [1]}", "labels", "mapping of text"), ("decisions: {rules: {}}", "decisions.rules", "not a list"), ("decisions: {rules: [x]}", "decisions.rules[0]", "not a rule"),
    ("decisions: {models: x}", "decisions.models", "not a list"), ("decisions: {models: [3]}", "decisions.models[0]", "not a mapping"), ("decisions: {models: [{file: x}]}", "decisions.models[0].file", "unknown"),
    ("api: {port: 65536}", "api.port", "outside 0 to 65535"), ("api: {host: 0.0.0.0}", "api.host", "set api.token_file"), ("logging: {level: loud}", "logging.level", "debug, info"),
    ("edge_id: ${NO_SUCH}", "edge_id", "set NO_SUCH or write ${NO_SUCH:-default}"),
]


@pytest.mark.parametrize(("text", "name", "says"), BAD, ids=[f"{name}-{number}" for number, (_, name, _) in enumerate(BAD)])
def test_what_is_wrong_is_named_with_its_key_and_remedy(tmp_path: Path, text: str, name: str, says: str) -> None:
    told = problems(tmp_path, text)
    assert list(told) == [name] and says in told[name]


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    told = problems(tmp_path, "zzz: 1\nuplink: {inflight: 0, protocol: 9}\napi: {port: x}\n", {"NOVACRON_EDGE__BUS__PROTOCOL": "7", "NOVACRON_EDGE__NOPE": "1"})
    assert set(told) == {"zzz", "uplink.inflight", "uplink.protocol", "api.port", "bus.protocol", "NOVACRON_EDGE__NOPE"}
    assert told["bus.protocol"].startswith("environment:") and "edge.yaml" in told["zzz"]


@pytest.mark.parametrize(("name", "value", "says"), [
    ("NOVACRON_EDGE__UPLINK", "x", "section"), ("NOVACRON_EDGE__LABELS", "x", "set it in the file"), ("NOVACRON_EDGE__DECISIONS__RULES", "[]", "set it in the file"), ("NOVACRON_EDGE__", "x", "names no key"),
    ("NOVACRON_EDGE__SITE__NAME", "x", "site is not a section"), ("NOVACRON_EDGE__API__PORT", "http", "use a number"), ("NOVACRON_EDGE__UPLINK__ULR", "x", "known here are"),
])
def test_a_bad_variable_is_named(tmp_path: Path, name: str, value: str, says: str) -> None:
    (text,) = problems(tmp_path, "", {name: value}).values()
    assert says in text


@pytest.mark.parametrize(("text", "says"), [
    ("site: a\nsite: b\n", "stands twice"), ("uplink:\n  url: a\n  url: b\n", "stands twice"), ("site: [\n", "line"), ("- a\n", "not a mapping"), ("just text\n", "not a mapping"), ("? [a, b]\n: c\n", "not text"),
    ("? {a: b}\n: c\n", "not text"), ("site: !!python/object/apply:os.system [id]\n", "constructor"), ("site: 2024-99-99\n", "month"), ("a: &a [*b]\n", "alias"), ("site: \x00\n", "special characters"),
    ("[" * 20_000, "file"), ("a: " + "[" * 500 + "]" * 500, "file"), ("base: &b {site: x}\nuplink: {<<: *b}\n", "merge"), (b"site: \xff\xfe\n", "UTF-8"), (b"x: " + b"y" * MAX_FILE_BYTES, "smaller"),
])
def test_a_file_that_is_no_sound_yaml_is_refused(tmp_path: Path, text: str | bytes, says: str) -> None:
    (told,) = problems(tmp_path, text).values()
    assert says in told


def test_alias_bombs_are_stopped_by_count_and_depth(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    merge = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
    for text in (bomb, merge, "a: &a [*a]\n", f"a: [{'1,' * MAX_NODES}1]\n"):
        assert len(problems(tmp_path, text)) == 1
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert str(MAX_DEPTH) in str(problems(tmp_path, json.dumps({"labels": deep})))


def test_a_missing_file_or_a_folder_is_told(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="--config"):
            load_config(path, {})


@settings(max_examples=150)
@given(st.binary(max_size=300) | st.text(alphabet="abc:-[]{}&*!?|>'\"#%@, \n\t<", max_size=120).map(str.encode))
def test_no_bytes_raise_anything_but_a_config_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    try:
        load(tmp_path_factory.getbasetemp(), raw)
    except ConfigError as error:
        assert error.problems


def test_rules_keep_on_and_other_bare_words_as_names(tmp_path: Path) -> None:
    (rule,) = load(tmp_path, """
decisions:
  rules:
    - id: hot
      on: {device: "boiler-*", metric: temp}
      if: {value: temp, op: ">", than: 80}
      then:
        - command: {device: fan-1, name: set, args: {yes: on, n: off}}
""").config.decisions.rules
    assert rule["on"] == {"device": "boiler-*", "metric": "temp"} and rule["then"][0]["command"]["args"] == {"yes": True, "n": False}


def test_variables_are_expanded_in_text(tmp_path: Path) -> None:
    env = {"HUB": "hub.local", "PORT": "2883", "SECRET": "s3"}
    text = "uplink: {url: 'mqtt://${HUB}:${PORT}', password: '${SECRET}', username: '${WHO:-edge}', ca_file: '${EMPTY:-}', inflight: '${INFLIGHT:-4}'}\nlabels: {line: '${HUB}'}\n"
    config = load(tmp_path, text, env).config
    assert (config.uplink.url, config.uplink.password, config.uplink.username, config.uplink.ca_file, config.uplink.inflight) == ("mqtt://hub.local:2883", "s3", "edge", "", 4)
    assert config.labels == {"line": "hub.local"}
    told = problems(tmp_path, "uplink: {url: 'mqtt://${HUB}:${PORT}'}\n", {"HUB": "h"})
    assert "set PORT" in told["uplink.url"]


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    config = load(tmp_path, "uplink: {password: hunter2, username: u}\nbus: {password: hunter3}\ndecisions: {models: [shipped:x/portable]}\n").config
    shown = public_dict(config)
    text = json.dumps(shown)
    assert "hunter" not in text and shown["uplink"]["password"] == shown["bus"]["password"] == "***" and shown["uplink"]["username"] == "u"
    assert public_dict(load(tmp_path, "").config)["uplink"]["password"] == ""
    assert {path for path, _, item in keys() if item.metadata["secret"]} == {path for path, _, _ in keys() if path[-1] == "password"}


# -- the page and the command --------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_schema_says() -> None:
    page = (ROOT / "docs" / "edge-config.md").read_text()
    assert page == markdown()
    assert all(f"`{'.'.join(path)}`" in page and item.metadata["doc"] for path, _, item in keys())


def test_short_names_are_never_ambiguous() -> None:
    for cls in {EdgeConfig, *(kind for kind in get_type_hints(EdgeConfig).values() if is_dataclass(kind))}:
        names = _known_names(cls)  # type: ignore[arg-type]
        assert all(names[item.name] == item.name for item in fields(cls))  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "status", "says"), [
    ("site: hall-2\nuplink: {password: hunter2}\n", 0, '"site": "hall-2"'), ("zzz: 1\n", 2, "zzz: is unknown"), ("decisions: {rules: [{id: x}]}\n", 2, "decisions.rules[0].on: is missing"), (None, 2, "file"),
])
def test_check_says_what_the_configuration_comes_to(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, status: int, says: str) -> None:
    path = tmp_path / "edge.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["check", "--config", str(path)]) == status
    told = capsys.readouterr()
    assert says in (told.out if status == 0 else told.err) and "hunter" not in told.out + told.err
    if status == 0:
        assert json.loads(told.out)["site"] == "hall-2"


def test_the_command_itself_ends_with_these_statuses(tmp_path: Path) -> None:
    def status(*arguments: str, **env: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", "edge_runtime", *arguments], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **env}, timeout=60, check=False)
        return done.returncode, done.stderr

    good = tmp_path / "edge.yaml"
    good.write_text("site: a\n")
    assert status("check", "--config", str(good))[0] == 0
    assert status("check", NOVACRON_EDGE__UPLNK="x") == (2, "the configuration cannot be used:\nenvironment: NOVACRON_EDGE__UPLNK: names no key; known here are api, bus, data_dir, decisions, devices, duties, edge_id, journal, labels, logging, nice, node, region, site, updates, uplink, workloads\n")
    assert status("run", "--config", str(tmp_path / "none"))[0] == 2
    code, told = status("run", "--config", str(good), NOVACRON_EDGE__DATA_DIR=str(tmp_path / "d"), NOVACRON_EDGE__UPLINK__URL="http://x", NOVACRON_EDGE__API__ENABLED="false")
    assert code == 2 and "mqtt://host:port" in told and "Traceback" not in told
    code, told = status("run", "--config", str(good), NOVACRON_EDGE__DATA_DIR="/proc/nowhere")
    assert code == 1 and "/proc/nowhere" in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("uplink: {url: 'http://x'}", "uplink.url"), ("bus: {url: 'mqtt://'}", "bus.url"), ("decisions: {rules_file: /nowhere.json}", "/nowhere.json"),
        ("decisions: {rules: [{id: r}]}", "decisions.rules[0]"), ("decisions: {models: ['shipped:nothing/onnx']}", "nothing/onnx"), ("uplink: {url: 'mqtt://h'}", ""),
        ("decisions: {models: ['shipped:host-anomaly/portable']}", ""),
    ],
)
def test_check_looks_at_all_that_a_start_would_need(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, word: str) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(text)
    status = main(["check", "--config", str(path)])
    said = capsys.readouterr().err
    assert (status, word in said, "Traceback" in said) == (2 if word else 0, True, False), said
