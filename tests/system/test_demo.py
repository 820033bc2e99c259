"""`make run` as a person starts it, and the benchmark of outages in small: whole programs, a real link that is cut, the books compared at the end."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.integration.edges import MOSQUITTO
from tests.integration.waiting import until_sync
from tools.bench.harness import ROOT, die_with_parent
from tools.demo import compare


def run(module: str, *arguments: str, seconds: float = 170) -> tuple[int, dict[str, Any], str]:
    """Exit status, the JSON object of the last line, standard error."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=seconds, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=die_with_parent,
    )
    lines = done.stdout.strip().splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


@pytest.mark.system
@pytest.mark.parametrize("broker", ["embedded", "mosquitto"])
def test_the_demo_loses_and_doubles_nothing_and_decides_while_the_link_is_cut(tmp_path: Path, broker: str) -> None:
    if broker == "mosquitto" and not MOSQUITTO:
        pytest.skip("mosquitto is not installed")
    status, found, words = run("tools.demo", "--duration", "22", "--outage", "8", "--json", "--broker", broker, "--port", "0", "--home", str(tmp_path / "demo"))
    assert status == 0, (found, words)
    assert (found["lost"], found["duplicated"]) == (0, 0) and found["decided_offline"] > 0 and found["verify_exact"] and found["links_cut"] == 1 and found["compared"] > 100
    # The comparison can fail: one row less at the hub, one changed body.
    import sqlite3

    database = tmp_path / "demo" / "hub" / "hub.db"
    with sqlite3.connect(database) as connection:
        connection.execute("DELETE FROM records WHERE stream='decision' AND seq=3")
        connection.execute("UPDATE records SET body=replace(body, '\"device\"', '\"devise\"') WHERE stream='decision' AND seq=5")
    assert compare(tmp_path / "demo" / "edge", tmp_path / "demo" / "hub")["lost"] == 2


@pytest.mark.system
def test_without_a_duration_it_runs_until_it_is_told_to_end_and_serves_the_page(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.demo", "--port", "0", "--home", str(tmp_path / "demo")], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=die_with_parent,
    )
    assert process.stdout is not None
    try:
        page = ""
        for line in process.stdout:
            if line.strip().startswith("page"):
                page = line.split()[1]
            if line.strip().startswith("end"):
                break
        address, _, token = page.partition("/#token=")
        with urllib.request.urlopen(address + "/", timeout=10) as answer:
            assert b"NovaCron" in answer.read()

        def decisions() -> Any:
            with urllib.request.urlopen(urllib.request.Request(address + "/api/v1/decisions", headers={"Authorization": f"Bearer {token}"}), timeout=10) as answer:
                return json.loads(answer.read())

        until_sync(lambda: {one["body"]["rule"] for one in decisions()} >= {"overheat", "peak-shaving"}, 60, what="decisions of the sample devices")
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(40) == 0


@pytest.mark.system
@pytest.mark.parametrize("name", ["edge_runtime", "hub"])
def test_when_the_hub_or_the_edge_has_ended_it_says_so_and_ends(tmp_path: Path, name: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.demo", "--port", "0", "--home", str(tmp_path / "demo")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=die_with_parent,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.strip().startswith("end"):
                break
        children = [int(word) for task in Path(f"/proc/{process.pid}/task").iterdir() for word in (task / "children").read_text().split()]
        (pid,) = [pid for pid in children if f"\0-m\0{name}\0" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(pid, signal.SIGKILL)
        _, words = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1 and f"the {name.partition('_')[0]} has ended with status -9" in words, words


@pytest.mark.system
def test_cuts_and_kills_in_small(tmp_path: Path) -> None:
    if not MOSQUITTO:
        pytest.skip("mosquitto is not installed")
    status, found, words = run("tools.bench.outage", "--seconds", "24", "--cuts", "6", "--last-outage", "6", "--home", str(tmp_path / "outage"), "--json")
    assert status == 0, (found, words)
    details = found["details"]
    assert details["hub_killed"] == details["broker_killed"] == 1 and details["cuts"] == 6 and details["commands_missing"] == details["commands_twice"] == 0
