"""Files that people give the simulator: what is wrong is named with line and field, what is right is read, a trace is the same run again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("apsw", reason="the simulated disk needs apsw (the dev extra)")

from tests.simulation.reading import FILE_MAX_BYTES, ScenarioError, Seed, difference, head_of, line_of, load, parse, read_seeds, read_trace
from tests.simulation.scenario import FAULTS, draw
from tests.simulation.world import simulate

ROOT = Path(__file__).resolve().parents[2]


def fault(**fields: Any) -> str:
    return '{"hours": 1, "edges": 2,\n "faults": [\n  {"at": 1, "kind": "kill"},\n  ' + json.dumps({"at": 900, "kind": "kill", **fields}) + "]}"


@pytest.mark.parametrize(("text", "where", "field"), [
    ('{"seed": 1,\n "hours": "x"}', ":2:", "field hours"),
    ('{"seed": 1,\n "hours": -3}', ":2:", "field hours"),
    ('{"seed": 1,\n "hours": NaN}', ":2:", "field hours"),
    ('{"seed": 1,\n "hours": true}', ":2:", "field hours"),
    ('{"seed": 1,\n "ours": 2}', ":2:", "field ours"),
    ('{"hours": 1,\n\n "seed": 1.5}', ":3:", "field seed"),
    ('{"hours": 1,\n\n "seed": -1}', ":3:", "field seed"),
    ('{"hours": 1,\n\n "seed": "one"}', ":3:", "field seed"),
    ('{"kind":\n "calm"}', ":2:", "field kind"),
    ('{"edges":\n 0}', ":2:", "field edges"),
    ('{"kind": "mirror",\n "edges": 3}', ":2:", "field edges"),
    ('{"wal_bytes": -1}', ":1:", "field wal_bytes"),
    ('{"telemetry_bytes": 0}', ":1:", "field telemetry_bytes"),
    ('{"bus_on_host": 1}', ":1:", "field bus_on_host"),
    ('{"faults": {}}', ":1:", "field faults"),
    ('{"faults": [\n {"at": 1, "kind": "kill"},\n 7]}', ":3:", "field faults[1]"),
    ('{"faults": [\n {"at": 1, "kind": "kill"},\n {"at": 2,\n  "kind": "rain"}]}', ":4:", "field faults[1].kind"),
    ('{"faults": [\n {"kind": "kill"}]}', ":2:", "field faults[0]"),
    (fault(edge=2), ":4:", "field faults[1].edge"),
    (fault(edge=-1), ":4:", "field faults[1].edge"),
    (fault(edge=0.5), ":4:", "field faults[1].edge"),
    (fault(at=-1), ":4:", "field faults[1].at"),
    (fault(at=3601), ":4:", "field faults[1].at"),
    (fault(at=float("nan")), ":4:", "field faults[1].at"),
    (fault(at="1"), ":4:", "field faults[1].at"),
    (fault(kind=3), ":4:", "field faults[1].kind"),
    (fault(**{"for": -5}), ":4:", "field faults[1].for"),
    (fault(**{"for": float("inf")}), ":4:", "field faults[1].for"),
    (fault(value=None), ":4:", "field faults[1].value"),
    (fault(value=1), ":4:", "field faults[1].value"),
    (fault(kind="partition", value=3), ":4:", "field faults[1].value"),
    (fault(kind="partition", value=0.5), ":4:", "field faults[1].value"),
    (fault(kind="flaky", value=1.1), ":4:", "field faults[1].value"),
    (fault(kind="delay", value=float("nan")), ":4:", "field faults[1].value"),
    (fault(fore=1), ":4:", "field faults[1].fore"),
    ('{"seed": 1,\n oops}', ":2:", "not JSON"),
    ('{"seed": 1,\n "faults": [{"at": 1,', ":2:", "not JSON"),
    ("[" * 100_000, ":1:", "not JSON"),
    ("[]", ":1:", "not an object"),
])
def test_a_wrong_scenario_names_line_and_field(text: str, where: str, field: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        parse(text, "file")
    assert f"file{where}" in str(caught.value) and field in str(caught.value)


def test_every_kind_of_fault_that_is_drawn_is_read_again() -> None:
    kinds = set()
    for seed in range(120):
        made = draw(seed, 72.0)
        assert parse(json.dumps(made.to_json()), "again") == made
        kinds |= {entry.kind for entry in made.faults}
    assert kinds == set(FAULTS) - {"backup"}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_scenario_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    text = json.dumps(draw(5, 72.0).to_json(), indent=1)
    at = data.draw(st.integers(0, len(text)))
    to = data.draw(st.integers(at, min(len(text), at + 40)))
    damaged = text[:at] + data.draw(st.text(max_size=10)) + text[to:]
    try:
        parse(damaged, "file")
    except ScenarioError as error:
        line = int(str(error).split(":")[1])
        assert 1 <= line <= damaged.count("\n") + 1


def test_a_scenario_file_fixes_what_the_seed_would_draw(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"seed": 4, "hours": 1, "edges": 1, "devices": 1, "faults": [{"at": 900, "kind": "power_cut", "for": 5, "value": 1}]}))
    made = load(file)
    assert (made.seed, made.edges, [entry.kind for entry in made.faults]) == (4, 1, ["power_cut"])
    assert simulate(made).failure is None
    again = parse(json.dumps(made.to_json()), "again")
    assert again == made


@pytest.mark.parametrize(("text", "where", "field"), [
    ("1\n2\nx\n", ":3:", "field seed"), ("1\n2.5\n", ":2:", "field seed"), ("1\n-2\n", ":2:", "field seed"), ('1\n"2"\n', ":2:", "field seed"), ("1\ntrue\n", ":2:", "field seed"),
    (f"{10**30}\n", ":1:", "field seed"), ("9" * 10_000, ":1:", "field seed"), ("[" * 100_000, ":1:", "field seed"), ("[1, 2]\n", ":1:", "field seed"),
    ('1\n{"seed": 2, "hours": -1}\n', ":2:", "field hours"), ('{"seed": 2, "hours": NaN}\n', ":1:", "field hours"), ('{"seed": 2, "hours": "1"}\n', ":1:", "field hours"),
    ('1\n\n{"seed": 2, "hou', ":3:", "field seed"), ('{"hours": 2}', ":1:", "field seed"), ('{"seed": 2, "kind": []}', ":1:", "field kind"), ('{"seed": 2, "kind": "calm"}', ":1:", "field kind"),
    ('{"sed": 2}', ":1:", "field sed"), ("# nothing\n", ":1:", "field seed"),
])
def test_a_wrong_seed_file_names_line_and_field(tmp_path: Path, text: str, where: str, field: str) -> None:
    file = tmp_path / "seeds"
    file.write_text(text)
    with pytest.raises(ScenarioError) as caught:
        read_seeds(file, 72.0)
    assert where in str(caught.value) and field in str(caught.value) and len(str(caught.value)) < 500


def test_a_seed_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "seeds"
    file.write_text('7\r\n{"seed": 8, "hours": 3, "kind": "mirror"}  # found last week\n')
    assert read_seeds(file, 72.0) == [Seed(7, 72.0), Seed(8, 3.0, "mirror")]


@pytest.mark.parametrize("read", [load, lambda path: read_seeds(path, 72.0), read_trace])
def test_a_file_that_is_no_text_of_ours_is_named(tmp_path: Path, read: Any) -> None:
    file = tmp_path / "f"
    cases: list[tuple[bytes, str]] = [(b"", ":1: is empty"), (b" \n\n", ":1: is empty"), (b"1\n2\n\xff\n", ":3: is not UTF-8")]
    for content, message in cases:
        file.write_bytes(content)
        with pytest.raises(ScenarioError, match=message):
            read(file)
    with open(file, "wb") as large:
        large.truncate(FILE_MAX_BYTES + 1)
    with pytest.raises(ScenarioError, match="smaller file"):
        read(file)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(ScenarioError, match=":1: cannot be read"):
            read(missing)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trace of a run of half an hour."""
    path = tmp_path_factory.mktemp("trace") / "t"
    scenario = draw(6, 0.5)
    with open(path, "w") as file:
        print(head_of(scenario), file=file)
        assert simulate(scenario, file).failure is None
    return path


@pytest.mark.parametrize(("number", "old", "new", "field"), [
    (1, "# scenario ", "", "field scenario"), (1, '"hours": 0.5', '"hours": "0.5"', "field hours"), (1, '"kind": "', '"kind": "un', "kind"), (1, "}", "", "not JSON"),
    (3, "0d", "-1d", "field time"), (3, "0d", "", "field time"), (4, ":", ";", "field time"), (5, "  ", " ", "field time"),
])
def test_a_wrong_trace_names_line_and_field(tmp_path: Path, trace: Path, number: int, old: str, new: str, field: str) -> None:
    lines = trace.read_text().split("\n")
    lines[number - 1] = lines[number - 1].replace(old, new, 1) if old != "}" else lines[number - 1][:-1]
    file = tmp_path / "t"
    file.write_text("\n".join(lines))
    with pytest.raises(ScenarioError) as caught:
        read_trace(file)
    assert f"{file}:{number}:" in str(caught.value) and field in str(caught.value)


def test_a_trace_without_its_machine_or_its_end_is_wrong(tmp_path: Path, trace: Path) -> None:
    lines = trace.read_text().split("\n")
    file = tmp_path / "t"
    file.write_text("\n".join([*lines[:3], lines[3][:18], *lines[4:]]))
    with pytest.raises(ScenarioError, match=":4: field machine"):
        read_trace(file)
    file.write_text("\n".join(lines[:20]))
    with pytest.raises(ScenarioError, match=":20: field what: the trace breaks off"):
        read_trace(file)
    file.write_text("\n".join(lines)[:-1])
    with pytest.raises(ScenarioError, match="breaks off"):
        read_trace(file)


def test_the_first_line_that_differs_is_named(trace: Path) -> None:
    _, kept = read_trace(trace)
    other = [*kept]
    other[4] += " twice"
    assert difference(trace, kept, kept) == ""
    assert difference(trace, kept, other).startswith(f"{trace}:6: the trace says ")
    assert difference(trace, kept, kept[:-2]).startswith(f"{trace}:{len(kept)}: ")


def _command(*words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.run([sys.executable, "-m", "tools.simulate", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_command_replays_a_trace_and_says_where_it_departs(tmp_path: Path) -> None:
    file = tmp_path / "t"
    assert _command("--seed", "6", "--hours", "0.5", "--trace", str(file)).returncode == 0
    again = _command("--replay", str(file), "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["details"]["difference"] == ""
    with_bug = _command("--replay", str(file), "--json", "--control", "receipt-before-commit")
    assert with_bug.returncode == 1 and json.loads(with_bug.stdout)["details"]["difference"].startswith(f"{file}:")


@pytest.mark.parametrize(("words", "message"), [
    (("--seeds", "many"), "--seeds"), (("--seeds", "0"), "--seeds"), (("--seed", "-1"), "--seed"), (("--hours", "nan"), "--hours"), (("--hours", "-1"), "--hours"), (("--edges", "5000"), "--edges"),
    (("--minutes", "-1"), "--minutes"), (("--focus", "rain"), "rain"), (("--kind", "calm"), "--kind"), (("--trace", "/nowhere/t", "--seed", "1"), "/nowhere/t"), (("--trace", "t"), "--trace"),
    (("--scenario", "/nowhere"), "/nowhere:1:"), (("--seed-file", "/nowhere"), "/nowhere:1:"), (("--replay", "/nowhere"), "/nowhere:1:"),
])
def test_a_wrong_option_is_one_line_and_status_2(words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.simulate import main

    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setattr(sys, "argv", ["simulate", *words])
    try:
        status = main()
    except SystemExit as ended:
        status = ended.code  # type: ignore[assignment]
    said = capsys.readouterr()
    assert status == 2 and message in said.err.splitlines()[-1] and not said.out


def test_the_line_of_a_value() -> None:
    text = '{"a": {"b": [1,\n2,\n{"c": 3}]},\n"d": 4}'
    assert [line_of(text, keys) for keys in (["a"], ["a", "b", 1], ["a", "b", 2, "c"], ["d"])] == [1, 2, 3, 4]
