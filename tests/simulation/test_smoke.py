"""The simulator itself: the same seed is the same run, twenty seeds break no promise, every planted bug is caught, bad files are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("apsw", reason="the simulated disk needs apsw (the dev extra)")

from tests.simulation.controls import CONTROLS
from tests.simulation.scenario import FAULTS, ScenarioError, draw, line_of, load, parse
from tests.simulation.world import simulate
from tools.simulate import Job, read_seeds, run_control, run_job

ROOT = Path(__file__).resolve().parents[2]
LONG = (5, 7)
"""Seeds that run the whole 72 hours in the default run."""


@pytest.mark.parametrize("seed", range(1, 21))
def test_no_promise_is_broken(seed: int) -> None:
    job, outcome = run_job(Job(seed, 72.0 if seed in LONG else 8.0))
    assert outcome.failure is None, "\n".join([*outcome.trace[-60:], str(outcome.failure), job.replay()])


@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_a_planted_bug_is_caught(name: str) -> None:
    _, tried, _, failure, _ = run_control(name)
    assert failure is not None, f"{CONTROLS[name].text}: not caught in {tried} seeds"


@pytest.mark.parametrize("seed", [3, 11])
def test_the_same_seed_is_the_same_run_in_any_process(seed: int) -> None:
    here = [simulate(draw(seed, 1.0)).digest for _ in range(2)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(
        [sys.executable, "-m", "tools.simulate", "--seed", str(seed), "--hours", "1", "--json"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )
    assert {*here, json.loads(done.stdout)["details"]["trace"]} == {here[0]}


def test_another_seed_is_another_run() -> None:
    assert simulate(draw(3, 1.0)).digest != simulate(draw(4, 1.0)).digest


def test_a_failing_run_ends_with_the_command_that_replays_it() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(
        [sys.executable, "-m", "tools.simulate", "--seed", "1", "--hours", "1", "--control", "backoff-without-jitter", "--focus", "broker_restart"], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False,
    )
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 1
    assert lines[-1] == "python -m tools.simulate --seed 1 --hours 1 --focus broker_restart --control backoff-without-jitter"
    assert any("VIOLATION" in line for line in lines)


def test_every_kind_of_fault_is_drawn() -> None:
    drawn = {fault.kind for seed in range(200) for fault in draw(seed, 72.0).faults}
    assert drawn == set(FAULTS) - {"backup"}  # which the world does by itself


@pytest.mark.parametrize(("text", "where", "field"), [
    ('{"seed": 1,\n "hours": "x"}', ":2:", "field hours"),
    ('{"seed": 1,\n "ours": 2}', ":2:", "field ours"),
    ('{"faults": [\n {"at": 1, "kind": "kill"},\n {"at": 2,\n  "kind": "rain"}]}', ":4:", "field faults[1].kind"),
    ('{"faults": [\n {"at": 1, "kind": "kill", "edge": 9}]}', ":2:", "field faults[0].edge"),
    ('{"faults": [\n {"kind": "kill"}]}', ":2:", "field faults[0]"),
    ('{"seed": 1,\n oops}', ":2:", "not JSON"),
    ("[]", ":1:", "not an object"),
])
def test_a_wrong_scenario_names_line_and_field(text: str, where: str, field: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        parse(text, "file")
    assert f"file{where}" in str(caught.value) and field in str(caught.value)


def test_a_scenario_file_fixes_what_the_seed_would_draw(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"seed": 4, "hours": 1, "edges": 1, "devices": 1, "faults": [{"at": 900, "kind": "power_cut", "for": 5, "value": 1}]}))
    made = load(file)
    assert (made.seed, made.edges, [fault.kind for fault in made.faults]) == (4, 1, ["power_cut"])
    assert simulate(made).failure is None
    again = parse(json.dumps(made.to_json()), "again")
    assert again == made


@pytest.mark.parametrize(("text", "where", "field"), [
    ("1\n2\nx\n", ":3:", "field seed"), ('1\n{"seed": 2, "hours": -1}\n', ":2:", "field hours"), ('{"sed": 2}', ":1:", "field sed"), ("# nothing\n", ":1:", "field seed"),
])
def test_a_wrong_seed_file_names_line_and_field(tmp_path: Path, text: str, where: str, field: str) -> None:
    file = tmp_path / "seeds"
    file.write_text(text)
    with pytest.raises(ScenarioError) as caught:
        read_seeds(file, 72.0)
    assert where in str(caught.value) and field in str(caught.value)


def test_a_seed_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "seeds"
    file.write_text('7\n{"seed": 8, "hours": 3, "kind": "mirror"}  # found last week\n')
    assert read_seeds(file, 72.0) == [Job(7, 72.0), Job(8, 3.0, "mirror")]


def test_the_line_of_a_value() -> None:
    text = '{"a": {"b": [1,\n2,\n{"c": 3}]},\n"d": 4}'
    assert [line_of(text, keys) for keys in (["a"], ["a", "b", 1], ["a", "b", 2, "c"], ["d"])] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_no_promise_is_broken_in_72_hours(seed: int) -> None:
    job, outcome = run_job(Job(seed, 72.0))
    assert outcome.failure is None, "\n".join([*outcome.trace[-60:], str(outcome.failure), job.replay()])


@pytest.mark.slow
def test_thirty_days() -> None:
    job, outcome = run_job(Job(11, 720.0))
    assert outcome.failure is None, f"{outcome.failure} {job.replay()}"
