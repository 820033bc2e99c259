"""A machine that starts with nothing: no hub, no network, the clock at 1970. And clocks that jump while it works."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.clock import RELEASE_MS
from tests.integration.edges import Device, LocalBroker
from tests.integration.waiting import until
from tests.system.settable_clock import SettableClock
from tools.bench.agent import Agent
from tools.bench.harness import ROOT, free_port
from tools.novactl.journal import check

RULE: dict[str, Any] = {
    "id": "hot", "on": {"device": "boiler-*", "metric": "temp"}, "if": {"value": "temp", "op": ">", "than": 80}, "trigger": "each",
    "then": [{"command": {"device": "fan-1", "name": "speed", "args": {"temp": "$value:temp"}}}],
}
DESIRED = {
    "v": 1, "edge": "bench-edge", "generation": 7, "spec": {"rules": [RULE], "twins": {"fan-1": {"mode": "eco"}}, "commands": [], "models": []},
}

KEEP = """
import asyncio, json, sys
from pathlib import Path
from edge_runtime.clock import SystemClock
from edge_runtime.journal import Journal, JournalSettings
async def main():
    journal = Journal(JournalSettings(Path(sys.argv[1]) / "journal", ballast_bytes=0), SystemClock())
    journal.start()
    journal.put_state("desired", json.loads(sys.argv[2]))
    await journal.close()
asyncio.run(main())
"""
"""What a run with a hub leaves behind: the last desired state, in the journal."""


def faketime() -> str:
    """The library that shows a process another clock."""
    for path in ("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1", "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1", "/usr/lib/riscv64-linux-gnu/faketime/libfaketime.so.1"):
        if os.path.exists(path):
            return path
    pytest.skip("libfaketime is not installed (Debian package faketime)")


def clock(when: str) -> dict[str, str]:
    """Variables that give a process the wall clock `when`; the monotonic clocks stay true. It is read once: what reads it again, without a lock, shows another time meanwhile."""
    return {"LD_PRELOAD": faketime(), "FAKETIME": when, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1", "FAKETIME_CACHE_DURATION": "86400"}


def keep_desired(data: Path) -> None:
    subprocess.run([sys.executable, "-c", KEEP, str(data), json.dumps(DESIRED)], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


async def test_cold_boot_in_1970_without_hub_works_from_the_last_desired_state(tmp_path: Path, broker: LocalBroker) -> None:
    data = tmp_path / "data"
    keep_desired(data)
    nobody = free_port()
    with Agent(broker.port, uplink_port=nobody, model="", host=True, data=data, environment=clock("@1970-01-01 00:00:05"), extra={"decisions": {"rules": []}}) as agent:
        async with Device(broker.port, "fan-1") as fan:
            await until(lambda: any(body["desired"] == {"mode": "eco"} for body in fan.got("desired")), what="the fan's desired state")
            for number in range(20):
                await fan.say("telemetry", {"temp": 90 + number}, name="boiler-1")
            await until(lambda: len(fan.got("command")) == 20, what="twenty commands")
        status = await asyncio.to_thread(agent.get, "/api/v1/status")
        assert status["link"] == "down" and status["generation"] == 7 and status["rules"] == ["hot"] and status["decided_offline"] == 20
        decisions = await asyncio.to_thread(agent.get, "/api/v1/decisions")
        health = await asyncio.to_thread(agent.get, "/healthz")
    assert {record["time_quality"] for record in decisions} == {"unsynced"} and all(record["wall_ms"] >= RELEASE_MS for record in decisions)
    assert health["status"] == "ok"
    assert all(command["expires_ms"] > RELEASE_MS for command in fan.got("command"))
    # The next boot, still in 1970, does not go back behind what is journalled.
    newest = decisions[0]["wall_ms"]
    with Agent(broker.port, uplink_port=nobody, model="", host=False, data=data, environment=clock("@1970-01-01 00:00:05"), extra={"decisions": {"rules": []}}) as agent:
        events = await asyncio.to_thread(agent.get, "/api/v1/journal/event?limit=1")
        assert events[0]["kind"] == "boot" and events[0]["wall_ms"] >= newest and events[0]["body"]["boot_n"] == 3
    assert check(data, lambda *_: None)["ok"]


async def test_cold_boot_without_any_network(tmp_path: Path) -> None:
    """In a network namespace of its own whose loopback is down: no bus, no hub. Ready all the same, sensing and deciding about the host."""
    if os.getuid() != 0 or shutil.which("unshare") is None or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode != 0:
        pytest.skip("a network namespace cannot be made here (needs root)")
    rule = {"id": "up", "on": {"device": "host", "metric": "uptime_seconds"}, "trigger": "each", "if": {"value": "uptime_seconds", "op": ">", "than": 0}, "then": [{"alert": {"text": "{uptime_seconds}"}}]}
    data = tmp_path / "data"
    extra = {"decisions": {"rules": [rule]}, "devices": {"host": {"interval_s": 0.05}}}
    with Agent(free_port(), api=False, uplink_port=free_port(), model="", data=data, wrap=("unshare", "-n"), extra=extra) as agent:
        database = data / "journal" / "journal.db"

        def decided() -> int:
            import sqlite3

            with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
                return int(connection.execute("SELECT count(*) FROM records_decision").fetchone()[0])

        await until(lambda: decided() >= 5, what="five decisions about the host")
        assert agent.process is not None and agent.process.poll() is None
    report = check(data, lambda *_: None)
    assert report["ok"] and report["records"]["decision"] >= 5


HOUR, DAY = 3600, 86_400


async def test_a_clock_that_jumps_both_ways_stops_nothing(tmp_path: Path, broker: LocalBroker) -> None:
    data = tmp_path / "data"
    windowed = {**RULE, "if": {"all": [RULE["if"], {"window": {"metric": "temp", "over": "60s", "stat": "count"}, "op": ">=", "than": 1}]}}
    before = time.time() * 1000
    with SettableClock(tmp_path) as wall, Agent(broker.port, model="", host=False, data=data, program=wall.program, extra={"decisions": {"rules": [windowed]}}) as agent:
        async with Device(broker.port, "fan-1") as fan:
            sent = 0
            for offset in (0, 3 * HOUR, 0, -30 * DAY, 400 * DAY, 0):
                wall.off_by(offset)
                for _ in range(10):
                    await fan.say("telemetry", {"temp": 90 + sent}, name="boiler-1")
                    sent += 1
                await until(lambda sent=sent: len(fan.got("command")) >= sent, what=f"a command for each reading at {offset} s")  # type: ignore[misc]
                assert len(fan.got("command")) == sent
        records = (await asyncio.to_thread(agent.get, "/api/v1/decisions?limit=1000"))[::-1]
        metrics = await asyncio.to_thread(lambda: text(agent, "/metrics"))
    assert [json.loads(json.dumps(record["body"]["inputs"]))["temp"] for record in records] == [90 + number for number in range(60)]
    assert all(after["mono_ms"] >= before_["mono_ms"] and after["seq"] == before_["seq"] + 1 for before_, after in pairwise(records))
    walls = [record["wall_ms"] for record in records]
    assert walls[15] - walls[5] > 10_000_000 and walls[55] < before + 86_400_000  # told as the clock said, with the jump counted
    assert jumps(metrics) >= 4
    assert check(data, lambda *_: None)["ok"]


def text(agent: Agent, path: str) -> str:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{agent.api_port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def jumps(metrics: str) -> float:
    return next(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith("novacron_edge_clock_jumps "))


