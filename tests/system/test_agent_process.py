"""The agent as a process: what it tells its service manager, how it ends, and what is left when it is killed, its disk fills or its files are damaged."""

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.edges import Device, LocalBroker
from tests.integration.waiting import until
from tools.bench.agent import Agent
from tools.bench.harness import ROOT
from tools.novactl.journal import check

RULE: dict[str, Any] = {
    "id": "each", "on": {"device": "boiler-*", "metric": "n"}, "if": {"value": "n", "op": ">=", "than": 0}, "trigger": "each",
    "then": [{"command": {"device": "fan-1", "name": "act", "args": {"n": "$value:n"}, "expires": "10m"}}],
}
RULES = {"decisions": {"rules": [RULE]}}


def metric(agent: Agent, series: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{agent.api_port}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(f"novacron_edge_{series} "):
                return float(line.rsplit(" ", 1)[1])
    return 0.0


# -- service manager -----------------------------------------------------------------------------------------------------------


def test_ready_watchdog_and_goodbye_reach_the_service_manager(tmp_path: Path, broker: LocalBroker) -> None:
    with Agent(broker.port, model="", data=tmp_path / "data", environment={"WATCHDOG_USEC": "600000"}) as agent:
        agent.hear("WATCHDOG=1")
        assert agent.process is not None
        agent.process.send_signal(signal.SIGTERM)
        agent.hear("STOPPING=1")
        assert agent.process.wait(30) == 0
    assert "READY=1" in agent.heard[0] and "STATUS=" in agent.heard[0]
    assert (tmp_path / "data" / "journal" / "clean").exists()


@pytest.mark.parametrize(
    ("config", "word"), [("edge_id: gw\nuplnk: {}\n", "uplink"), ("bus: {url: 'http://x'}\n", "url"), ("decisions: {rules: [{id: r}]}\n", "rules[0]"), ("a: [\n", "line"), ("edge_id: 'a b'\n", "edge_id")],
)
def test_a_configuration_that_cannot_be_used_ends_with_status_2_and_names_the_key(tmp_path: Path, config: str, word: str) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(config)
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "run", "--config", str(path)], capture_output=True, text=True, timeout=60, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )
    assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr


def test_a_data_folder_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "edge.yaml"
    path.write_text(f"data_dir: {tmp_path}/file/data\nuplink: {{enabled: false}}\napi: {{port: 0}}\n")
    done = subprocess.run([sys.executable, "-m", "edge_runtime", "run", "--config", str(path)], capture_output=True, text=True, timeout=60, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and "data_dir" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["novacron-edge.service", "novacron-hub.service"])
def test_the_unit_file_is_one_that_systemd_takes(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    if os.geteuid() != 0 and not Path("/run/systemd").is_dir():
        pytest.skip("no systemd runs here, and only root can make the folder that systemd-analyze asks for")
    unit = tmp_path / name
    text = (ROOT / "tools" / "systemd" / name).read_text()
    unit.write_text(text.replace("/opt/novacron/.venv/bin/python", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if name in line]
    assert not complaints
    unit.write_text(unit.read_text().replace("TimeoutStopSec=30", "TimeoutStopSec=soon"))  # the checker can fail
    assert f"{name}:" in subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True).stderr


# -- killed --------------------------------------------------------------------------------------------------------------------


async def test_killed_again_and_again_no_reading_goes_undecided_and_no_decision_is_done_twice(tmp_path: Path, broker: LocalBroker) -> None:
    """A device's message is acknowledged after its decision is durable, so the broker keeps what a killed agent had not finished. A command has
    the id of its decision: sent again after a kill, it is the same command."""
    draw = random.Random(11)
    data = tmp_path / "data"
    sent = 0
    async with Device(broker.port, "fan-1") as fan:
        for _ in range(6):
            with Agent(broker.port, model="", host=False, data=data, extra=RULES) as agent:
                for _ in range(draw.randrange(50, 150)):
                    await fan.say("telemetry", {"n": sent}, name="boiler-1")
                    sent += 1
                await asyncio.to_thread(agent.kill)
            await fan.say("telemetry", {"n": sent}, name="boiler-1")  # while nobody is there
            sent += 1
        with Agent(broker.port, model="", host=False, data=data, extra=RULES) as agent:
            await until(lambda: {body["args"]["n"] for body in fan.got("command")} == set(range(sent)), 60, what="a command for every reading")
            status = await asyncio.to_thread(agent.get, "/api/v1/status")
            marks = status["journal"]["decision"]
    by_id: dict[str, set[str]] = {}
    for body in fan.got("command"):
        by_id.setdefault(body["id"], set()).add(json.dumps({**body, "again": None}, sort_keys=True))
    assert all(len(contents) == 1 for contents in by_id.values())  # one id, one command
    assert len(by_id) <= marks["next"] - 1
    report = check(data, lambda *_: None)
    assert report["ok"], report
    with sqlite3.connect(f"file:{data}/journal/journal.db?mode=ro", uri=True) as connection:
        decided = Counter(json.loads(row[0])["inputs"]["n"] for row in connection.execute("SELECT body FROM records_decision"))
    assert set(decided) == set(range(sent))
    assert sum(count - 1 for count in decided.values()) <= 6 * 1000  # only what was under way at a kill may be decided anew


# -- the disk ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MiB of its own."""
    target = tmp_path / "small"
    target.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(target)], capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield target
    subprocess.run(["umount", "-l", str(target)], check=True)


async def test_a_full_disk_is_told_telemetry_stops_decisions_go_on_and_all_is_well_again(small_disk: Path, broker: LocalBroker) -> None:
    data, filler = small_disk / "data", small_disk / "filler"
    extra = {**RULES, "journal": {"min_free_bytes": 4 << 20, "ballast_bytes": 2 << 20}}
    with Agent(broker.port, model="", host=False, data=data, extra=extra) as agent:
        async with Device(broker.port, "fan-1") as fan:
            sent = 0

            async def readings(count: int) -> None:
                nonlocal sent
                for _ in range(count):
                    await fan.say("telemetry", {"n": sent, "pad": "x" * 500}, name="boiler-1")
                    sent += 1
                await until(lambda: len(fan.got("command")) == sent, 30, what="a command for every reading")

            def fill() -> None:
                try:
                    with open(filler, "ab", buffering=0) as handle:
                        while True:
                            handle.write(bytes(65_536))
                except OSError:
                    pass  # full

            await readings(50)
            full = False
            for _ in range(40):
                fill()
                await readings(20)
                full = await asyncio.to_thread(metric, agent, "journal_refused_telemetry_total") > 0
                if full:
                    break
            assert full
            health = await asyncio.to_thread(agent.get, "/healthz")
            assert health["status"] == "ok" and any("disk" in problem for problem in health["problems"])
            await readings(50)
            filler.unlink()
            await until(lambda: metric(agent, "journal_free_bytes") > 4 << 20, 30, what="the free space is seen")

            async def taken_again() -> bool:
                before = metric(agent, "journal_refused_telemetry_total")
                await readings(5)
                return metric(agent, "journal_refused_telemetry_total") == before

            await until(taken_again, 30, what="telemetry is taken again")
    report = check(data, lambda *_: None)
    assert report["ok"], report
    with sqlite3.connect(f"file:{data}/journal/journal.db?mode=ro", uri=True) as connection:
        decided = [json.loads(row[0])["inputs"]["n"] for row in connection.execute("SELECT body FROM records_decision ORDER BY seq")]
    assert decided == list(range(sent))


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "garbage", "wal"])
async def test_damaged_files_never_stop_a_start_and_numbers_go_on(tmp_path: Path, broker: LocalBroker, damage: str) -> None:
    data = tmp_path / "data"
    path = data / "journal" / "journal.db"
    async with Device(broker.port, "fan-1") as fan:
        with Agent(broker.port, model="", host=False, data=data, extra=RULES) as agent:
            for number in range(300):
                await fan.say("telemetry", {"n": number}, name="boiler-1")
            await until(lambda: len(fan.got("command")) == 300, what="300 commands")
            top = (await asyncio.to_thread(agent.get, "/api/v1/status"))["journal"]["decision"]["next"] - 1
            if damage == "wal":
                await asyncio.to_thread(agent.kill)
        raw = bytearray(path.read_bytes())
        if damage == "truncated":
            path.write_bytes(raw[: len(raw) // 2])
        elif damage == "overwritten":
            raw[8192:24576] = os.urandom(16384)
            path.write_bytes(raw)
        elif damage == "garbage":
            path.write_bytes(os.urandom(50_000))
        else:
            wal = Path(f"{path}-wal")
            torn = bytearray(wal.read_bytes())
            torn[len(torn) // 3 : len(torn) // 3 + 600] = bytes(600)
            wal.write_bytes(torn)
        with Agent(broker.port, model="", host=False, data=data, extra=RULES) as agent:
            await fan.say("telemetry", {"n": 1000}, name="boiler-1")
            await until(lambda: any(body["args"]["n"] == 1000 for body in fan.got("command")), what="a decision after the damage")
            journal = await asyncio.to_thread(agent.get, "/api/v1/journal")
            newest = (await asyncio.to_thread(agent.get, "/api/v1/decisions?limit=1"))[0]
            boot = next(record for record in await asyncio.to_thread(agent.get, "/api/v1/journal/event?limit=50") if record["kind"] == "boot")
    if damage != "wal":
        assert journal["recoveries"] and boot["body"]["recovered"] and list(path.parent.glob("journal.db.damaged-*"))
        assert newest["seq"] > top
    assert check(data, lambda *_: None)["ok"]
