"""The soak's instrument on a process that leaks and one that does not; in the slow run the agent itself, with and without a planted leak."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.edges import MOSQUITTO
from tools.bench.harness import ROOT, die_with_parent, private_mosquitto, stop
from tools.bench.soak import FILES_MORE, WARM_SHARE, Samples, leaks, soak

PROCESS = """
import sys
kept, files = [], []
for line in sys.stdin:
    if sys.argv[1] == "leaks":
        kept.append(b"x" * 40_000)
        files.append(open("/dev/null"))
    else:
        kept = [b"x" * 40_000]
    print("done", flush=True)
"""


@pytest.mark.parametrize("kind", ["leaks", "is-well"])
def test_a_process_that_leaks_is_told_from_one_that_does_not(kind: str) -> None:
    """Time is what the test says it is: a step is a second."""
    process = subprocess.Popen([sys.executable, "-c", PROCESS, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, preexec_fn=die_with_parent)
    assert process.stdin is not None and process.stdout is not None
    samples = Samples()
    try:
        for second in range(300):
            process.stdin.write("step\n")
            assert process.stdout.readline() == "done\n"
            samples.take(process.pid, second)
    finally:
        process.stdin.close()
        stop(process)
    slope = samples.slope(60)
    assert leaks(slope) == (kind == "leaks")
    assert (samples.files_grown(60) > FILES_MORE) == (kind == "leaks")
    if kind == "leaks":
        assert slope.value == pytest.approx(40_000 / 1024 * 3600, rel=0.2)


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(900)
@pytest.mark.parametrize("program", ["edge_runtime", "tests.system.leaking_agent"])
async def test_the_agent_does_not_grow_while_its_link_flaps(tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not MOSQUITTO:
        pytest.skip("mosquitto is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))))
    options = argparse.Namespace(minutes=6.0, rate=50.0, seed=3)
    with private_mosquitto() as port:
        samples, went = await soak(options, tmp_path, port, ("-m", program))
    assert went["connections"] > 60 and went["commands_missing"] == 0
    warm_s = options.minutes * 60 * WARM_SHARE
    assert leaks(samples.slope(warm_s)) == (program != "edge_runtime"), samples.slope(warm_s)
    assert samples.files_grown(warm_s) <= FILES_MORE
