"""One process at a time has a data folder, and the folder has one edge: by the two programs themselves."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_runtime.system import data_folder
from tools.bench.harness import ROOT, die_with_parent, free_port

from .waiting import until_sync

PROGRAMS = ("edge", "hub")


def command(program: str, folder: Path, edge_id: str = "plant-a") -> list[str]:
    """As a person starts one, with ports of its own: nothing but the folder is in the other's way."""
    if program == "hub":
        return [sys.executable, "-m", "hub", "--data-dir", str(folder), "--broker", "embedded", "--broker-listen", f"127.0.0.1:{free_port()}", "--listen", f"127.0.0.1:{free_port()}", "--compiled", "off"]
    told = {
        **({"edge_id": edge_id} if edge_id else {}), "data_dir": str(folder), "uplink": {"enabled": False}, "bus": {"enabled": False}, "api": {"enabled": False},
        "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0},
    }
    config = folder.with_name(f"{edge_id or 'unnamed'}.yaml")
    config.write_text(json.dumps(told))
    return [sys.executable, "-m", "edge_runtime", "run", "--config", str(config)]


@contextmanager
def begun(program: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that has the folder."""
    process = subprocess.Popen(command(program, folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent)
    try:
        until_sync(lambda: process.poll() is not None or has(folder) == process.pid, what="it has the folder")
        assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.wait()


def has(folder: Path) -> int:
    """Who has it, or had it last."""
    path = folder / data_folder.FILE
    return int(path.read_text() or 0) if path.exists() else 0


def run(words: list[str]) -> tuple[int, str]:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_second_one_is_refused_until_the_first_has_ended_however_it_ended(program: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with begun(program, folder) as first:
        code, said = run(command(program, folder))
        assert code == 1 and f"another process ({first.pid}) works on it; stop that one, or give this one a data folder of its own" in said and str(folder) in said
        assert first.poll() is None and has(folder) == first.pid
        first.kill()
        first.wait()
        with begun(program, folder) as second:
            assert has(folder) == second.pid != first.pid


def test_what_it_starts_or_forks_does_not_have_the_folder(tmp_path: Path) -> None:
    """The control: a keeper of containers that outlives its agent would keep the next one out."""
    script = "import os, sys, time; from edge_runtime.system.data_folder import hold; hold(sys.argv[1]); os.write(1, b'%d\\n' % os.fork()); time.sleep(1000)"
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
    assert holder.stdout is not None
    child = max(int(holder.stdout.readline()) for _ in range(2))
    with pytest.raises(data_folder.InUse, match=str(holder.pid)):
        data_folder.hold(str(tmp_path))
    holder.kill()
    holder.wait()
    try:
        os.kill(child, 0)  # it is there
        os.close(data_folder.hold(str(tmp_path)))
    finally:
        os.kill(child, 9)
        holder.stdout.close()


def test_a_folder_stays_with_its_edge(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with begun("edge", folder):
        until_sync((folder / "edge_id").exists, what="its name is written down")
    code, said = run(command("edge", folder, "plant-b"))
    assert code == 2 and "edge_id: 'plant-b', and " in said and "is the data folder of 'plant-a'" in said and "say plant-a, or give this edge a data_dir of its own" in said
    done = subprocess.run([word if word != "run" else "check" for word in command("edge", folder, "")], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["edge_id"] == "plant-a" and "and the edge stays plant-a" in done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_its_databases_are_nobody_elses_to_read_also_those_that_an_older_version_made(program: str, tmp_path: Path) -> None:
    def modes() -> dict[str, int]:
        return {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "data").rglob("*.db*")}

    before = os.umask(0o022)
    try:
        with begun(program, tmp_path / "data"):
            until_sync(lambda: any(name.endswith("-wal") for name in modes()), what="it has opened them")
            assert set(modes().values()) == {0o600}
        older = list((tmp_path / "data").rglob("*.db"))  # one may have been ended before it had made all that it has
        assert older
        for path in older:
            path.chmod(0o644)
        with begun(program, tmp_path / "data"):
            until_sync(lambda: {path.stat().st_mode & 0o777 for path in older} == {0o640}, what="it takes them away from others, and lets the group have what it was given")
    finally:
        os.umask(before)
