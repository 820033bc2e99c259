"""Rules, windows and the engine: what fires, what does not, against plain oracles; and every bad rule named."""

import math
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.decisions.engine import MAX_DEVICES, DecisionEngine
from edge_runtime.decisions.rules import RuleError, parse_duration, parse_rules
from edge_runtime.decisions.windows import MAX_CELLS, STATISTICS, Window


def rule(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"id": "r", "on": {"device": "d-*"}, "if": {"value": "temp", "op": ">", "than": 80}, "then": [{"alert": {"text": "{device} at {temp}"}}]}
    base.update(changes)
    return {key: value for key, value in base.items() if value is not None}


def engine(*rules: dict[str, Any], models: dict[str, Any] | None = None) -> DecisionEngine:
    return DecisionEngine(parse_rules(list(rules)), models or {})


def outcomes(made: list[Any]) -> list[str]:
    return [decision.outcome for decision in made]


# -- windows -------------------------------------------------------------------------------------------------------------------


def oracle(samples: list[tuple[int, float]], span: int, now: int, name: str) -> float | None:
    inside = [(at, value) for at, value in samples if at > now - span]
    values = [value for _, value in inside]
    if not values:
        return 0.0 if name == "count" else None
    if name == "rate":
        elapsed = inside[-1][0] - inside[0][0]
        return (values[-1] - values[0]) * 1000 / elapsed if elapsed else None
    return {
        "mean": lambda: math.fsum(values) / len(values), "min": lambda: min(values), "max": lambda: max(values), "sum": lambda: math.fsum(values), "count": lambda: float(len(values)),
        "stddev": lambda: statistics.pstdev(values), "first": lambda: values[0], "last": lambda: values[-1], "p95": lambda: sorted(values)[max(0, math.ceil(0.95 * len(values)) - 1)],
    }[name]()


@given(
    st.lists(st.tuples(st.integers(0, 500), st.floats(-1e6, 1e6)), min_size=1, max_size=MAX_CELLS), st.integers(1, 5000), st.integers(0, 3000), st.sampled_from(STATISTICS),
)
def test_a_window_with_few_samples_is_exact(steps: list[tuple[int, float]], span: int, later: int, name: str) -> None:
    window, samples, now = Window(span), [], 1000
    for step, value in steps:
        now += step
        window.add(value, now)
        samples.append((now, value))
    now += later
    expected, found = oracle(samples, span, now, name), window.statistic(name, now)
    if expected is None:
        assert found is None
    else:
        assert found is not None and found[0] == pytest.approx(expected, rel=1e-9, abs=1e-6)


@settings(max_examples=40)
@given(
    st.integers(1, 40).flatmap(lambda most: st.lists(st.tuples(st.integers(0, most), st.floats(-1e3, 1e3)), min_size=200, max_size=800)), st.integers(1, 20_000), st.floats(-1e9, 1e9))
def test_a_busy_window_is_bounded_and_late_by_at_most_a_cell(steps: list[tuple[int, float]], span: int, shift: float) -> None:
    window, samples, now = Window(span), [], 0
    for step, value in steps:
        now += step
        window.add(value + shift, now)
        samples.append((now, value + shift))
    assert window.cells <= MAX_CELLS
    found = window.statistic("count", now)
    cell = -(-span // (MAX_CELLS - 1))
    least = sum(at > now - span for at, _ in samples)
    most = sum(at > now - span - cell for at, _ in samples)
    assert found is not None
    assert least <= found[0] <= most, "none of the window's is missing, and what is too old is at most a cell too old"
    spread = window.statistic("stddev", now)
    inside = [value for at, value in samples if at > now - span - cell]
    assert spread is not None and 0 <= spread[0] <= (max(inside) - min(inside)) + 1e-6
    assert window.statistic("max", now)[0] in inside  # type: ignore[index]


def test_the_spread_of_a_large_mean_is_not_lost() -> None:
    window = Window(100_000)
    values = [1e9 + (number % 7) for number in range(500)]
    for number, value in enumerate(values):
        window.add(value, number * 10)
    found = window.statistic("stddev", 5000)
    assert found is not None and found[0] == pytest.approx(statistics.pstdev(values), rel=1e-3)


# -- rules that are refused ----------------------------------------------------------------------------------------------------


BAD_RULES: list[tuple[Any, str]] = [
    ("no list", "rules"), ([1], "rules[0]"), ([{}], "rules[0].id"), ([rule(id="a b")], "rules[0].id"), ([rule(), rule()], "rules[1].id"), ([rule(color=1)], "rules[0].color"),
    ([rule(on={"device": "d", "x": 1})], "rules[0].on.x"), ([rule(on={"device": "bad device"})], "rules[0].on.device"), ([rule(on={"device": "d", "metric": 3})], "rules[0].on.metric"),
    ([rule(then=[])], "rules[0].then"), ([rule(then=[{"explode": {}}])], "rules[0].then[0].explode"), ([rule(then=[{"alert": {"text": "x" * 600}}])], "rules[0].then[0].alert.text"),
    ([rule(then=[{"alert": {"text": "x", "severity": "mild"}}])], "rules[0].then[0].alert.severity"), ([rule(then=[{"command": {"device": "f"}}])], "rules[0].then[0].command.name"),
    ([rule(then=[{"command": {"device": "f", "name": "on", "args": []}}])], "rules[0].then[0].command.args"), ([rule(then=[{"desired": {"device": "f", "set": 1}}])], "rules[0].then[0].desired.set"),
    ([rule(trigger="sometimes")], "rules[0].trigger"), ([rule(**{"for": "soon"})], "rules[0].for"), ([rule(**{"for": -1})], "rules[0].for"), ([rule(cooldown="2 days")], "rules[0].cooldown"),
    ([rule(**{"if": {}})], "rules[0].if"), ([rule(**{"if": {"value": "a", "model": "b", "op": ">", "than": 1}})], "rules[0].if"), ([rule(**{"if": {"value": "a", "op": "~", "than": 1}})], "rules[0].if.op"),
    ([rule(**{"if": {"value": "a", "op": ">", "than": "x"}})], "rules[0].if.than"), ([rule(**{"if": {"value": "a", "op": ">", "than": math.nan}})], "rules[0].if.than"),
    ([rule(**{"if": {"value": "a", "op": ">", "than": math.inf}})], "rules[0].if.than"), ([rule(**{"if": {"value": "a", "op": "in", "than": []}})], "rules[0].if.than"),
    ([rule(**{"if": {"value": "a", "op": "between", "than": [2, 1]}})], "rules[0].if.than"), ([rule(**{"if": {"value": "a", "op": "in", "than": {"value": "b"}}})], "rules[0].if.than"),
    ([rule(**{"if": {"value": "", "op": ">", "than": 1}})], "rules[0].if.value"), ([rule(**{"if": {"all": []}})], "rules[0].if.all"), ([rule(**{"if": {"not": 1}})], "rules[0].if.not"),
    ([rule(**{"if": {"window": {"metric": "a", "over": "1s", "stat": "median"}, "op": ">", "than": 1}})], "rules[0].if.window.stat"),
    ([rule(**{"if": {"window": {"metric": "a", "over": 0, "stat": "mean"}, "op": ">", "than": 1}})], "rules[0].if.window.over"),
    ([rule(**{"if": {"window": {"metric": "a", "over": "1s", "stat": "mean", "min_count": 0}, "op": ">", "than": 1}})], "rules[0].if.window.min_count"),
    ([rule(**{"if": {"model": "m", "output": 999, "op": ">", "than": 1}})], "rules[0].if.output"), ([rule(**{"if": {"silent": "forever"}})], "rules[0].if.silent"),
    ([rule(id=f"r{number}") for number in range(2000)], "rules"),
]


@pytest.mark.parametrize("document,field", BAD_RULES, ids=[field for _, field in BAD_RULES])
def test_a_bad_rule_is_named_with_its_path_and_remedy(document: Any, field: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_rules(document)
    assert caught.value.field == field and caught.value.problem and caught.value.remedy


def test_too_deep_and_too_many_conditions_are_refused() -> None:
    deep: dict[str, Any] = {"value": "a", "op": ">", "than": 1}
    for _ in range(2000):
        deep = {"not": deep}
    with pytest.raises(RuleError, match="deeper"):
        parse_rules([rule(**{"if": deep})])
    wide = {"any": [{"value": "a", "op": ">", "than": 1}] * 100}
    with pytest.raises(RuleError, match="conditions"):
        parse_rules([rule(**{"if": wide})])


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "on", "if", "then", "value", "op", "than", "all", "window", "metric", "over", "stat", "alert", "text", "for", "device"]), inner, max_size=5),
    max_leaves=20,
)


@given(json_like)
def test_no_document_crashes_the_parser(document: Any) -> None:
    try:
        parse_rules(document)
    except RuleError as error:
        assert error.field and error.remedy


@pytest.mark.parametrize("text,expected", [("250ms", 250), ("10s", 10_000), ("1.5m", 90_000), ("2h", 7_200_000), (3, 3000), (0.25, 250)])
def test_durations(text: Any, expected: int) -> None:
    assert parse_duration(text, "x") == expected


# -- the engine ----------------------------------------------------------------------------------------------------------------


def test_rise_fires_once_and_clears_with_hysteresis() -> None:
    made = engine(rule(clear={"value": "temp", "op": "<", "than": 76}))
    values = [70, 81, 85, 79, 77, 75, 75, 90]
    found = [outcomes(made.evaluate("d-1", {"temp": value}, at)) for at, value in enumerate(values)]
    assert found == [[], ["fired"], [], [], [], ["cleared"], [], ["fired"]]


def test_each_fires_at_every_reading_and_other_devices_do_not_matter() -> None:
    made = engine(rule(trigger="each"))
    assert outcomes(made.evaluate("d-1", {"temp": 81}, 0)) == ["fired"]
    assert outcomes(made.evaluate("d-1", {"temp": 82}, 1)) == ["fired"]
    assert made.evaluate("e-1", {"temp": 99}, 2) == []
    assert outcomes(made.evaluate("d-2", {"temp": 99}, 3)) == ["fired"]


def test_for_needs_the_condition_to_hold_also_between_readings() -> None:
    made = engine(rule(**{"for": "10s"}))
    assert made.evaluate("d-1", {"temp": 90}, 0) == []
    assert made.tick(9_999) == []
    assert outcomes(made.tick(10_000)) == ["fired"] and made.tick(11_000) == []
    made.evaluate("d-1", {"temp": 10}, 12_000)
    made.evaluate("d-1", {"temp": 90}, 13_000)
    made.evaluate("d-1", {"temp": 10}, 15_000)
    made.evaluate("d-1", {"temp": 90}, 16_000)
    assert made.tick(24_000) == [] and outcomes(made.tick(26_000)) == ["fired"]


def test_cooldown_silence_metric_and_text() -> None:
    made = engine(
        rule(id="cool", trigger="each", cooldown="5s"), rule(id="quiet", on={"device": "d-1"}, **{"if": {"silent": "30s"}}),
        rule(id="other", on={"device": "d-1", "metric": "pressure"}, trigger="each", **{"if": {"value": "temp", "op": ">", "than": 0}}),
    )
    found = made.evaluate("d-1", {"temp": 81.5}, 0)
    assert [one.rule for one in found] == ["cool"] and found[0].actions[0].detail["text"] == "d-1 at 81.5" and found[0].inputs == {"temp": 81.5}
    assert made.evaluate("d-1", {"temp": 82}, 4_000) == []
    assert [one.rule for one in made.evaluate("d-1", {"temp": 82, "pressure": 1}, 6_000)] == ["cool", "other"]
    assert [one.rule for one in made.tick(40_000)] == ["quiet"]
    assert [one.outcome for one in made.evaluate("d-1", {"temp": 1}, 41_000)] == ["cleared"]


def test_windows_models_and_combinations_are_inputs_of_the_decision() -> None:
    class Twice:
        manifest = type("M", (), {"sha256": "ab"})()

        def predict(self, values: Any) -> list[float]:
            if "temp" not in values:
                raise ValueError("temp is missing")
            return [values["temp"] * 2]

    condition = {"all": [
        {"window": {"metric": "temp", "over": "10s", "stat": "mean", "min_count": 3}, "op": ">", "than": 50}, {"model": "twice", "op": ">", "than": {"value": "limit"}},
        {"not": {"value": "mode", "op": "in", "than": ["off", "service"]}},
    ]}
    made = engine(rule(trigger="each", **{"if": condition}), models={"twice": Twice()})
    assert made.evaluate("d-1", {"temp": 60, "limit": 100, "mode": "on"}, 0) == []
    assert made.evaluate("d-1", {"temp": 60}, 1) == []
    (decision,) = made.evaluate("d-1", {"temp": 60}, 2)
    assert decision.inputs["mean(temp,10000ms)"] == {"value": 60, "count": 3}
    assert decision.inputs["model:twice"] == {"output": [120], "sha256": "ab"} and decision.inputs["limit"] == 100
    assert made.evaluate("d-1", {"mode": "service"}, 3) == []
    assert made.evaluate("d-9", {"other": 1}, 4) == [] and made.errors == {}
    made.replace_models({})
    made.evaluate("d-1", {"temp": 60, "mode": "on"}, 5)
    assert made.errors == {"r:no model": 1}


def test_nan_and_wrong_types_are_counted_and_change_nothing_of_other_devices() -> None:
    made = engine(rule())
    made.evaluate("d-1", {"temp": 70.0}, 0)
    assert made.evaluate("d-1", {"temp": math.nan}, 1) == [] and made.evaluate("d-1", {"temp": math.inf}, 2) == []
    assert made.evaluate("d-1", {"temp": "hot"}, 3) == []
    assert made.errors == {"value:nan": 2, "r:type": 1}
    assert outcomes(made.evaluate("d-2", {"temp": 81}, 4)) == ["fired"]


def test_state_survives_a_restart_and_a_changed_rule_does_not_keep_it() -> None:
    first = engine(rule(cooldown="60s"), rule(id="slow", **{"for": "10s"}))
    first.evaluate("d-1", {"temp": 90}, 1000)
    kept = first.export_state(5000)
    second = engine(rule(cooldown="60s"), rule(id="slow", **{"for": "10s"}))
    second.import_state(kept, 100)  # another boot: monotonic time is another
    assert second.evaluate("d-1", {"temp": 90}, 200) == []  # still active, so it does not fire again
    assert [one.rule for one in second.evaluate("d-1", {"temp": 91}, 6_200)] == ["slow"]  # 4 s before and 6 s after the restart
    changed = engine(rule(cooldown="61s"))
    changed.import_state(kept, 100)
    assert outcomes(changed.evaluate("d-1", {"temp": 90}, 200)) == ["fired"]


@given(json_like)
def test_no_kept_state_crashes_the_import(state: Any) -> None:
    if isinstance(state, dict):
        engine(rule()).import_state({"rules": {"r": "x"}, "states": state.get("all", state)}, 0)


def test_memory_is_bounded_by_devices_seen() -> None:
    made = engine(rule())
    for number in range(MAX_DEVICES + 500):
        made.evaluate(f"d-{number}", {"temp": 90}, number)
    assert len(made._devices) == MAX_DEVICES and made.evicted >= 500


@given(st.lists(st.floats(0, 100, allow_nan=False), max_size=60))
def test_the_latch_follows_a_two_line_oracle(values: list[float]) -> None:
    made, active, expected, found = engine(rule(clear={"value": "temp", "op": "<", "than": 40})), False, [], []
    for at, value in enumerate(values):
        if not active and value > 80:
            active = True
            expected.append("fired")
        elif active and value < 40:
            active = False
            expected.append("cleared")
        found += outcomes(made.evaluate("d-1", {"temp": value}, at))
    assert found == expected
