"""A configuration's quick form: the same configuration from JSON as from YAML, for exactly the file it was made from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.cli import main
from edge_runtime.config import ConfigError, load_config, quick_form
from edge_runtime.config.load import read_yaml

TEXT = """
edge_id: quick
labels: {room: "12", on: yes}
nice: -5
uplink: {enabled: false, keepalive: 10s, password: "${SECRET}"}
decisions:
  rules:
    - {id: awake, on: {device: host, metric: uptime_seconds}, if: {value: uptime_seconds, op: ">", than: 1.0}, then: [{alert: {severity: info, text: "\u00e4 {value}"}}]}
"""
ENV = {"HOME": "/tmp", "SECRET": "s"}


def made(folder: Path, text: str = TEXT) -> Path:
    """A configuration with its quick form."""
    path = folder / "edge.yaml"
    path.write_text(text)
    quick_form.write(path, path.read_bytes(), read_yaml(path))
    return path


def no_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)


def test_the_same_configuration_comes_of_it_without_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(TEXT)
    of_yaml = load_config(path, ENV)
    made(tmp_path)
    no_yaml(monkeypatch)
    of_json = load_config(path, ENV)
    assert (of_json.config, of_json.source_of, of_json.warnings) == (of_yaml.config, of_yaml.source_of, of_yaml.warnings)
    assert repr(of_json.config) == repr(of_yaml.config) and of_json.config.uplink.password == "s"


def test_what_is_wrong_is_told_as_for_the_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(TEXT + "nise: 3\nregion: [1]\n")
    with pytest.raises(ConfigError) as of_yaml:
        load_config(path, {})
    quick_form.write(path, path.read_bytes(), read_yaml(path))
    no_yaml(monkeypatch)
    with pytest.raises(ConfigError) as of_json:
        load_config(path, {})
    assert str(of_json.value) == str(of_yaml.value) and "nise" in str(of_json.value) and "SECRET" in str(of_json.value)


def test_a_file_that_was_changed_since_is_read_itself(tmp_path: Path) -> None:
    path = made(tmp_path)
    path.write_text(TEXT.replace("edge_id: quick", "edge_id: other"))
    assert load_config(path, ENV).config.edge_id == "other"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff", b'{"form": 1}', b"[" * 100_000], ids=["empty", "cut off", "a list", "null", "no text", "without its text", "deep"])
def test_a_damaged_quick_form_is_passed_over(tmp_path: Path, damage: bytes) -> None:
    path = made(tmp_path)
    quick_form.path_of(path).write_bytes(damage)
    assert load_config(path, ENV).config.edge_id == "quick"


@pytest.mark.parametrize("change", [{"form": 0}, {"text": "edge_id: other"}, {"text": None}, {"text": "\ud800"}, {"values": None}, {"values": [1]}])
def test_a_quick_form_of_another_kind_is_passed_over(tmp_path: Path, change: dict[str, object]) -> None:
    path = made(tmp_path)
    kept = quick_form.path_of(path)
    kept.write_text(json.dumps({**json.loads(kept.read_text()), **change}))
    assert load_config(path, ENV).config.edge_id == "quick"


@pytest.mark.parametrize("line", ["labels: {1: one}", "region: 2026-11-29", "region: .nan", "region: !!binary aGk=", "labels: {a: &x [1], b: *x}\nsite: !!set {a}"])
def test_what_json_cannot_say_is_read_as_yaml(tmp_path: Path, line: str) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(line)
    values = read_yaml(path)
    quick_form.write(path, path.read_bytes(), values)
    assert repr(read_yaml(path)) == repr(values)


def test_it_is_as_secret_as_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(TEXT)
    path.chmod(0o600)
    quick_form.write(path, path.read_bytes(), read_yaml(path))
    assert quick_form.path_of(path).stat().st_mode & 0o777 == 0o600
    assert [item.name for item in tmp_path.iterdir() if item.name.endswith(".new")] == []


def test_the_command_writes_it_anew_and_not_for_what_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s")
    path = made(tmp_path)
    kept = quick_form.path_of(path)
    wrong = json.loads(kept.read_text())
    wrong["values"]["edge_id"] = "wrong"
    kept.write_text(json.dumps(wrong))
    assert main(["check", "--quick", "--config", str(path)]) == 0 and json.loads(kept.read_text())["values"]["edge_id"] == "quick"
    kept.unlink()
    path.write_text("nise: 3\n")
    assert main(["check", "--quick", "--config", str(path)]) == 2 and not kept.exists()
    capsys.readouterr()


def test_a_service_starts_without_what_it_does_not_need(tmp_path: Path) -> None:
    path = made(tmp_path)
    names = ["argparse", "gettext", "yaml", "difflib", "aiohttp", "paho", "ssl", "_hashlib", "inspect", "ast", "dataclasses", "traceback", "textwrap", "string", "subprocess", "typing", "asyncio.streams", "asyncio.sslproto", "base64"]
    code = (
        "import sys, edge_runtime.cli as cli\n"
        "sys.modules['psutil'] = None\n"  # as on a device
        "import edge_runtime.system.service as service\n"
        "def ready(self, *line): print([name for name in sys.argv[2].split(',') if sys.modules.get(name)]); sys.stdout.flush(); import os; os._exit(0)\n"
        "service.ServiceManager.ready = ready\n"
        "cli.main(['run', '--config', sys.argv[1]])"
    )
    env = {"PATH": "/usr/bin:/bin", "SECRET": "s", "NOVACRON_EDGE__DATA_DIR": str(tmp_path / "data"), "NOVACRON_EDGE__API__PORT": "0", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code, str(path), ",".join(names)], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "[]", done.stderr
