"""Releases that meet: `tools/bench/earlier.py` with commits of this repository, the first of them in each run."""

import subprocess
from pathlib import Path

import pytest

from hub.broker.mosquitto import find_mosquitto
from tools.bench.earlier import STAGES, meet
from tools.bench.harness import ROOT

EARLIER = {"the-first": "a7f6470", "with-workloads": "8be6846", "with-images": "902aa87"}
"""Landmarks of the history, oldest first."""

pytestmark = [pytest.mark.system, pytest.mark.timeout(600), pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed (apt install mosquitto)")]


@pytest.mark.parametrize("commit", [pytest.param(commit, id=name, marks=() if name == "the-first" else pytest.mark.slow) for name, commit in EARLIER.items()])
def test_either_takes_up_what_the_other_left_and_speaks_with_its_hub(commit: str, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    made = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"the history does not reach back to {commit}: {made.stderr.decode()[:100]}")
    subprocess.run(["tar", "-x"], cwd=earlier, input=made.stdout, check=True)
    found = meet(earlier, tmp_path)
    assert len(found) == STAGES and all(stream["lost"] == 0 for stage in found.values() for stream in stage.values()), found
