"""The power cut at the writes of a short recording (the whole promise: `python -m tools.bench.power_cut`), and planted bugs that must be caught."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.integration.edges import MOSQUITTO
from tools.bench.harness import ROOT, die_with_parent
from tools.bench.power_cut import NO_VERDICT

LIMIT_S = 600
"""A run takes 30 s alone and minutes beside others."""

# Slow: a file system that is served by a process which others starve can stand still for minutes.
pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 60)]


def run(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and result; skips where this machine cannot do it."""
    if not MOSQUITTO:
        pytest.skip("mosquitto is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.power_cut", "--seed", "5", "--json", *arguments], capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=die_with_parent,
    )
    if done.returncode == NO_VERDICT:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_a_power_cut_at_the_writes_of_a_run_loses_and_doubles_nothing() -> None:
    status, found = run("--writes", "240", "--cuts", "60")
    details = found["details"]
    assert status == 0 and found["value"] == 0, details["violations"]
    assert details["writes"] >= 240 and details["flushes"] > 100 and details["boots"] == 120 and details["boots_as_process"] >= 1
    assert details["power_lost_while_recording"] >= 1 and details["lives_ended_by"]["stop"] >= 1 and details["lives_ended_by"]["kill"] >= 1
    assert all(details["effects_seen"].get(kind, 0) > 0 for kind in ("record", "reading", "command", "receipt", "twin", "boot", "generation")), details["effects_seen"]
    assert details["effects_checked"] > 1000 and details["recoveries"] == 0


@pytest.mark.parametrize(
    ("bug", "words", "writes", "cuts"), [("sync-off", "lost: ", "60", "12"), ("early-ack", "lost: ", "160", "24"), ("side-unsynced", "marks.json", "160", "24")],
)
def test_a_planted_bug_is_caught(bug: str, words: str, writes: str, cuts: str) -> None:
    status, found = run("--writes", writes, "--cuts", cuts, "--control", bug)
    assert status == 1 and found["value"] > 0
    assert any(words in violation for violation in found["details"]["violations"]), found["details"]["violations"]
