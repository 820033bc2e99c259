"""The benchmark of many workloads on one host, in small, and that it sees a workload which ended with its agent."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.integration.container_side import reason_against
from tools.bench.harness import ROOT

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), pytest.mark.system]


def reconcile(*more: str) -> tuple[int, dict[str, Any]]:
    """Exit status and result."""
    done = subprocess.run([sys.executable, "-m", "tools.bench.reconcile", "--json", "--workloads", "10", "--kills", "5", *more], cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_what_runs_is_adopted_by_the_next_agent_and_nothing_is_left() -> None:
    status, result = reconcile()
    assert status == 0 and result["value"] == 0 and result["details"]["adopted"] >= 5, result


def test_the_control_is_caught() -> None:
    status, result = reconcile("--control")
    assert status == 1 and result["details"]["wrong"] and "ended with the agent" in result["details"]["wrong"][0], result
