"""The concurrency bench as a whole, shortened: clean on the hub, and not on one that answers before it writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(*more: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.scheduler_concurrency", "--json", "--seconds", "12", "--kills", "3", *more], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=150, check=False,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, result


@pytest.mark.slow
def test_many_callers_and_kills_lose_and_double_nothing() -> None:
    status, result = bench()
    assert status == 0 and result["ok"] and result["value"] == 0 and result["details"]["placements"] > 20, result


@pytest.mark.slow
def test_a_hub_that_answers_before_it_writes_is_found_out() -> None:
    status, result = bench("--planted")
    assert status == 1 and not result["ok"] and result["details"]["lost"] > 0, result
