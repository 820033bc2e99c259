"""Conditions that ask a detector: parsed whole or refused by field, journalled with what the detector said, bounded, kept over a restart."""

from typing import Any

import pytest

from edge_runtime.contract import jsoncodec
from edge_runtime.decisions.detectors import Detector, DetectorStateError
from edge_runtime.decisions.detectors import bank as bank_module
from edge_runtime.decisions.detectors.bank import IDLE_MS, DetectorBank
from edge_runtime.decisions.engine import Decision, DecisionEngine
from edge_runtime.decisions.rules import RuleError, parse_rules

MINUTE = 60_000
ALERT = [{"alert": {"text": "{device}"}}]


def engine(condition: dict[str, Any], **more: Any) -> DecisionEngine:
    return DecisionEngine(parse_rules([{"id": "r", "on": {"device": "b-*"}, "if": condition, "then": ALERT, **more}]), {})


def feed(made: DecisionEngine, values: list[float], first_ms: int = 0, device: str = "b-1") -> list[Decision]:
    found = []
    for number, value in enumerate(values):
        at_ms = first_ms + number * MINUTE
        found += made.evaluate(device, {"temp": value}, at_ms, at_ms)
    return found


def wave(rows: int, start: int = 0) -> list[float]:
    return [20 + row % 5 * 0.3 + row % 7 * 0.1 for row in range(start, start + rows)]


@pytest.mark.parametrize(("condition", "field"), [
    ({"anomaly": {"metric": "temp"}, "op": "==", "than": 1}, "rules[0].if.op"),
    ({"anomaly": {"metric": ""}, "op": ">", "than": 1}, "rules[0].if.anomaly.metric"),
    ({"anomaly": "temp", "op": ">", "than": 1}, "rules[0].if.anomaly"),
    ({"anomaly": {"metric": "temp", "low": 3}, "op": ">", "than": 1}, "rules[0].if.anomaly.low"),
    ({"anomaly": {"metric": "temp"}, "op": ">", "than": "much"}, "rules[0].if.than"),
    ({"quality": {"metric": "temp"}, "op": "in", "than": ["stuck", "sad"]}, "rules[0].if.than"),
    ({"quality": {"metric": "temp"}, "op": "==", "than": "sad"}, "rules[0].if.than"),
    ({"quality": {"metric": "temp"}, "op": ">", "than": 1}, "rules[0].if.op"),
    ({"quality": {"metric": "temp", "low": "x"}, "op": "==", "than": "good"}, "rules[0].if.quality.low"),
    ({"quality": {"metric": "temp", "low": 5, "high": 1}, "op": "==", "than": "good"}, "rules[0].if.quality.low"),
    ({"forecast": {"metric": "temp"}, "op": ">", "than": 1}, "rules[0].if.forecast.within"),
    ({"forecast": {"metric": "temp", "within": "0s"}, "op": ">", "than": 1}, "rules[0].if.forecast.within"),
    ({"forecast": {"metric": "temp", "within": "9d"}, "op": ">", "than": 1}, "rules[0].if.forecast.within"),
    ({"forecast": {"metric": "temp", "within": "1h"}, "op": "==", "than": 1}, "rules[0].if.op"),
    ({"anomaly": {"metric": "temp"}, "forecast": {"metric": "temp"}, "op": ">", "than": 1}, "rules[0].if"),
])
def test_what_is_wrong_with_a_condition_is_named(condition: dict[str, Any], field: str) -> None:
    with pytest.raises(RuleError) as caught:
        engine(condition)
    assert caught.value.field == field


def test_an_anomaly_fires_once_and_its_inputs_are_journalled() -> None:
    made = engine({"anomaly": {"metric": "temp"}, "op": ">", "than": 0.99})
    assert feed(made, wave(600)) == []
    (fired,) = [decision for decision in feed(made, [45.0], 600 * MINUTE) if decision.outcome == "fired"]
    said = fired.inputs["anomaly(temp)"]
    assert said["value"] == 45 and said["score"] > 0.99 and said["quality"] == "spike" and 19 < said["expected"] < 24
    jsoncodec.encode(fired.inputs)


def test_a_stuck_sensor_is_a_quality_and_limits_are_the_rules() -> None:
    stuck = engine({"quality": {"metric": "temp"}, "op": "in", "than": ["stuck"]})
    assert feed(stuck, wave(300)) == []
    assert [decision.outcome for decision in feed(stuck, [21.5] * 60, 300 * MINUTE)] == ["fired"]
    limits = engine({"quality": {"metric": "temp", "low": -40, "high": 22}, "op": "==", "than": "out_of_range"}, trigger="each")
    assert len(feed(limits, [20, 21, 22, 22.1, 21, -41])) == 2


def test_a_forecast_fires_before_the_threshold_and_tells_when() -> None:
    made = engine({"forecast": {"metric": "temp", "within": "40m"}, "op": ">", "than": 80})
    rising = [20 + 0.5 * row + row % 3 * 0.1 for row in range(150)]
    found = feed(made, rising)
    (fired,) = found
    said = fired.inputs["forecast(temp>80)"]
    assert 30 * MINUTE < said["in_ms"] <= 40 * MINUTE and said["earliest_ms"] <= said["in_ms"] <= said["latest_ms"] and 58 < said["value"] < 66
    assert feed(engine({"forecast": {"metric": "temp", "within": "40m"}, "op": "<", "than": 10}), rising) == []
    jsoncodec.encode(fired.inputs)


def test_a_threshold_may_be_another_metric() -> None:
    made = engine({"forecast": {"metric": "temp", "within": "30m"}, "op": ">=", "than": {"value": "limit"}})
    found = []
    for row in range(100):
        found += made.evaluate("b-1", {"temp": 20 + row * 0.5 + row % 2 * 0.1, "limit": 60}, row * MINUTE, row * MINUTE)
    assert found[0].inputs["limit"] == 60 and 44 < found[0].inputs["forecast(temp>=60)"]["value"] < 50
    assert made.evaluate("b-1", {"temp": 90.0, "limit": "high"}, 101 * MINUTE, 101 * MINUTE)[0].outcome == "cleared"
    assert made.errors == {"r:type": 1}


def test_detectors_are_bounded_and_the_idle_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "MAX_DETECTORS", 3)
    made = engine({"anomaly": {"metric": "temp"}, "op": ">", "than": 0.99})
    for number in range(5):
        feed(made, [20.0, 21.0], device=f"b-{number}")
    assert len(made.detectors) == 3 and made.errors == {"r:too many detectors": 4} and made.detectors.get("b-4", "temp") is None
    made.evaluate("b-4", {"temp": 20.0}, IDLE_MS + 2 * MINUTE, 0)
    assert len(made.detectors) == 3 and made.detectors.get("b-4", "temp") is not None and made.detectors.take_gone() == [("b-0", "temp")]


def test_only_what_a_rule_asks_about_is_watched() -> None:
    made = engine({"anomaly": {"metric": "temp"}, "op": ">", "than": 0.99})
    made.evaluate("b-1", {"temp": 20.0, "fan": 3, "name": "x", "on": True}, 0, 0)
    made.evaluate("c-1", {"temp": 20.0}, 0, 0)
    made.evaluate("b-2", {"temp": "text"}, 0, 0)
    made.evaluate("b-3", {"temp": True}, 0, 0)
    assert len(made.detectors) == 1
    made.replace_rules(parse_rules([{"id": "r", "on": {"device": "*"}, "if": {"value": "temp", "op": ">", "than": 3}, "then": ALERT}]))
    assert len(made.detectors) == 0 and made.detectors.take_gone() == [("b-1", "temp")] and made.detectors.take_gone() == []


def test_values_that_are_no_numbers_are_a_quality_and_an_error_of_the_value() -> None:
    made = engine({"quality": {"metric": "temp"}, "op": "==", "than": "not_finite"}, trigger="each")
    assert len(feed(made, [20.0, float("nan"), float("inf"), 20.0])) == 2 and made.errors == {"value:nan": 2}


def test_state_is_taken_when_changed_the_longest_unwritten_first_and_goes_on() -> None:
    bank = DetectorBank()
    for number in range(4):
        for row, value in enumerate(wave(50)):
            bank.observe(f"d{number}", "temp", row * MINUTE, value, row * MINUTE + number)
    assert bank.take_changed(10_000, 9) == [], "not before their time"
    taken = bank.take_changed(10_000_000, 3)
    assert [device for device, _, _ in taken] == ["d0", "d1", "d2"]
    assert [device for device, _, _ in bank.take_changed(20_000_000, 9)] == ["d3"] and bank.take_changed(30_000_000, 9) == []
    other = DetectorBank()
    other.restore("d0", "temp", jsoncodec.decode(jsoncodec.encode(taken[0][2]).encode()), 0)
    before, after = bank.get("d0", "temp"), other.get("d0", "temp")
    assert before is not None and after is not None
    for row, value in enumerate(wave(30, 50)):
        assert before.observe((row + 50) * MINUTE, value) == after.observe((row + 50) * MINUTE, value)
    with pytest.raises(DetectorStateError):
        other.restore("d1", "temp", {"not": "a state"}, 0)
    assert other.get("d1", "temp") is None


def test_the_time_of_measuring_may_jump_and_durations_do_not_mind() -> None:
    made = engine({"quality": {"metric": "temp"}, "op": "==", "than": "backwards"}, **{"for": "2m", "trigger": "each"})
    for row, value in enumerate(wave(40)):
        assert made.evaluate("b-1", {"temp": value}, row * MINUTE, (row if row < 30 else row - 10_000) * MINUTE) == []
    detector = made.detectors.get("b-1", "temp")
    assert isinstance(detector, Detector) and detector.newest is not None and detector.newest.quality == "good"
