"""Whose a data folder is, as the configuration sees it."""

import socket
from pathlib import Path

import pytest

from edge_runtime.config import ConfigError, identity, load_config


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's id, in a file that a test may change."""
    path = tmp_path / "machine-id"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    monkeypatch.setattr(identity, "MACHINE_ID", path)
    return path


def called(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)


def edge(folder: Path, given: str = "") -> tuple[str, list[str]]:
    """What an edge on that folder is called, and what it is warned of."""
    loaded = load_config(None, {"NOVACRON_EDGE__DATA_DIR": str(folder), **({"NOVACRON_EDGE__EDGE_ID": given} if given else {})})
    assert loaded.config.node == loaded.config.edge_id
    return loaded.config.edge_id, [text for text in loaded.warnings if text.startswith("edge_id")]


def test_a_host_that_is_renamed_stays_the_edge_that_it_was(tmp_path: Path, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called(monkeypatch, "plant-a")
    assert edge(tmp_path) == ("plant-a", [])
    identity.keep(str(tmp_path), "plant-a")
    assert edge(tmp_path) == ("plant-a", [])
    called(monkeypatch, "dhcp-17")
    assert edge(tmp_path) == ("plant-a", [f"edge_id: this host is called dhcp-17, and the edge stays plant-a, whose data folder {tmp_path} is"])
    assert edge(tmp_path, "plant-a") == ("plant-a", [])
    assert edge(tmp_path / "other") == ("dhcp-17", [])


def test_another_name_is_refused_on_a_folder_that_is_an_edge_s(tmp_path: Path, machine: Path) -> None:
    identity.keep(str(tmp_path), "plant-a")
    with pytest.raises(ConfigError) as caught:
        edge(tmp_path, "plant-b")
    (problem,) = caught.value.problems
    assert problem.key == "edge_id" and "'plant-a'" in problem.problem and str(tmp_path) in problem.problem and problem.remedy == "say plant-a, or give this edge a data_dir of its own"


def test_a_disk_that_was_cloned_is_another_edge_s(tmp_path: Path, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity.keep(str(tmp_path), "golden")
    machine.write_text("f" * 32)
    called(monkeypatch, "plant-c")
    assert edge(tmp_path) == ("plant-c", []) and edge(tmp_path, "plant-d") == ("plant-d", [])
    identity.keep(str(tmp_path), "plant-c")
    called(monkeypatch, "dhcp-17")
    assert edge(tmp_path)[0] == "plant-c"


@pytest.mark.parametrize("absent", [True, False])
def test_a_machine_without_an_id_is_the_same_one(tmp_path: Path, machine: Path, monkeypatch: pytest.MonkeyPatch, absent: bool) -> None:
    """As containers are, whose host names are new each time."""
    if absent:
        machine.unlink()
    else:
        machine.write_text("")
    identity.keep(str(tmp_path), "plant-a")
    called(monkeypatch, "0a1b2c3d4e5f")
    assert edge(tmp_path)[0] == "plant-a"


@pytest.mark.parametrize("content", [b"", b"\n", b"\0" * 4096, b"\xff\xfe", b"a/b 0123456789abcdef0123456789abcdef\n", b"x" * 4096])
def test_a_file_that_says_nothing_is_none(tmp_path: Path, machine: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    called(monkeypatch, "plant-a")
    (tmp_path / identity.FILE).write_bytes(content)
    assert edge(tmp_path) == ("plant-a", [])


def test_it_is_written_once(tmp_path: Path, machine: Path) -> None:
    identity.keep(str(tmp_path), "plant-a")
    before = (tmp_path / identity.FILE).stat()
    identity.keep(str(tmp_path), "plant-a")
    after = (tmp_path / identity.FILE).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns) and sorted(one.name for one in tmp_path.iterdir()) == [identity.FILE, "machine-id"]
