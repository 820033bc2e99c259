"""Detectors: whatever is fed, they answer; what they learned survives a restart bit by bit; each quality, anomaly and forecast has its counter-case."""

import base64
import json
import math
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.decisions.detectors import Detector, DetectorStateError, Observation
from edge_runtime.decisions.detectors import strangeness as strangeness_module
from edge_runtime.decisions.detectors.novelty import MEMORY, Novelty
from edge_runtime.decisions.detectors.packing import MAX_STATE_CHARS
from edge_runtime.decisions.detectors.quality import QUALITIES

MINUTE = 60_000
DAY = 1440 * MINUTE
START = 1_795_478_400_000

anything = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(-(2**70), 2**70), st.sampled_from([0.0, 20.0, 20_000.0, -1e308, 1e308, 5e-324, math.nan, 10**400]),
)
steps_ms = st.one_of(st.just(MINUTE), st.integers(-(2**40), 2**40), st.sampled_from([0, -1, DAY, 30 * DAY, -30 * DAY]))
readings = st.lists(st.tuples(steps_ms, anything), max_size=300)


def feed(detector: Detector, values: Iterable[float], first: int = 0, step_ms: int = MINUTE) -> list[Observation]:
    return [detector.observe(START + (first + row) * step_ms, value) for row, value in enumerate(values)]


def noise(rows: int, seed: int = 1, level: float = 20.0, spread: float = 0.3) -> list[float]:
    source = random.Random(seed)
    return [level + source.gauss(0, spread) for _ in range(rows)]


def sane(seen: Observation) -> bool:
    return 0 <= seen.score <= 1 and seen.quality in QUALITIES and all(part is None or math.isfinite(part) for part in (seen.value, seen.expected))


@given(readings, st.sampled_from([0, 100]))
@settings(max_examples=150, deadline=None)
def test_whatever_is_fed_it_answers_and_its_state_goes_on_exactly(fed: list[tuple[int, float]], calm: int) -> None:
    detector = Detector()
    feed(detector, noise(calm))
    at_ms = START + calm * MINUTE
    for step_ms, value in fed:
        at_ms += step_ms
        assert sane(detector.observe(at_ms, value))
        for threshold in (0.0, 25.0, -1e300):
            found = detector.time_to(threshold, rising=True, within_ms=DAY)
            assert found is None or (0 <= found.earliest_ms <= found.in_ms and (found.latest_ms is None or found.in_ms <= found.latest_ms))
    state = detector.export_state()
    assert len(state) <= MAX_STATE_CHARS
    again = Detector.from_state(json.loads(json.dumps(state)))
    assert again.export_state() == state
    for row, value in enumerate([*noise(20, 2), math.nan, 1e308, -5.0]):
        assert detector.observe(at_ms + row * MINUTE, value) == again.observe(at_ms + row * MINUTE, value)


@pytest.mark.parametrize("make", [
    lambda row: 0.0, lambda row: 5e-324 * (row % 3), lambda row: 1e308 * (-1) ** row, float, lambda row: 2.0**row if row < 1000 else 0.0,
    lambda row: float(row % 1009) ** 3, lambda row: random.Random(row).gauss(0, 1), lambda row: math.nan if row % 2 else 1.0, lambda row: 1e300 / (row + 1),
])
def test_memory_is_bounded_and_nothing_overflows_over_long_streams(make: Callable[[int], float]) -> None:
    detector = Detector()
    largest = 0
    for row in range(12_000):
        assert sane(detector.observe(START + row * 5 * MINUTE, make(row)))
        if row % 1000 == 999:
            largest = max(largest, len(detector.export_state()))
    assert largest <= 32_768
    assert Detector.from_state(detector.export_state()).export_state() == detector.export_state()


# -- state -----------------------------------------------------------------------------------------------------------------------


def test_state_that_is_damaged_or_of_another_form_is_refused_with_one_clear_error() -> None:
    detector = Detector()
    feed(detector, noise(300))
    good = detector.export_state()
    raw = bytearray(base64.b64decode(good))
    wrong: list[object] = [None, 7, {}, [good], "", "not base64 !", good[:-8], good[:40], good + good, base64.b64encode(b"NDET").decode(), "A" * (MAX_STATE_CHARS + 4)]
    for place in (0, 4, 9, 20, len(raw) // 2, len(raw) - 1):
        changed = bytearray(raw)
        changed[place] ^= 1
        wrong.append(base64.b64encode(changed).decode())
    for state in wrong:
        with pytest.raises(DetectorStateError, match="start the detector anew"):
            Detector.from_state(state)
    Detector.from_state(good)


@given(st.lists(st.floats(), max_size=1500))
@settings(max_examples=100, deadline=None)
def test_numbers_under_a_right_checksum_that_are_no_detector_are_refused(numbers: list[float]) -> None:
    from edge_runtime.decisions.detectors.packing import Packer

    packer = Packer()
    packer.put(*numbers)
    with pytest.raises(DetectorStateError):
        Detector.from_state(packer.text())


@given(st.integers(0, 2000), st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=200, deadline=None)
def test_one_number_changed_under_a_right_checksum_never_makes_it_crash(place: int, number: float) -> None:
    """The checksum guards against damage, not against ourselves: a state that passes it may be wrong, the answers must stay sane."""
    from edge_runtime.decisions.detectors.packing import Packer, Unpacker

    detector = Detector()
    feed(detector, noise(400))
    values = list(Unpacker(detector.export_state())._values)
    values[place % len(values)] = number
    packer = Packer()
    packer.put(*values)
    try:
        again = Detector.from_state(packer.text())
    except DetectorStateError:
        return
    assert all(sane(seen) for seen in feed(again, noise(100, 3), 400))


# -- quality ---------------------------------------------------------------------------------------------------------------------


def qualities(seen: list[Observation]) -> set[str]:
    return {item.quality for item in seen}


def test_healthy_sensors_are_good() -> None:
    source = random.Random(5)
    for values in (noise(3000), [round(value, 1) for value in noise(3000)], [float(row // 40 % 7) for row in range(3000)], [0.0] * 3000, [20 + row * 0.01 for row in range(3000)]):
        assert qualities(feed(Detector(), values)) == {"good"}
    walk = [0.0]
    for _ in range(3000):
        walk.append(walk[-1] + source.gauss(0, 1))
    assert qualities(feed(Detector(), walk)) == {"good"}


def test_random_arrivals_have_no_gaps_and_a_silence_is_one() -> None:
    source, detector, at_ms, gaps = random.Random(7), Detector(), START, 0
    for value in noise(3000):
        at_ms += int(source.expovariate(1 / MINUTE))
        gaps += detector.observe(at_ms, value).quality == "gap"
    assert gaps <= 3
    assert detector.observe(at_ms + DAY, 20.0).quality == "gap" and detector.observe(at_ms + DAY + MINUTE, 20.1).quality == "good"


def test_a_sensor_that_stops_moving_is_stuck_and_recovers() -> None:
    detector = Detector()
    feed(detector, noise(500))
    seen = feed(detector, [20.123] * 100, 500)
    assert seen[0].quality == "good" and [item.quality for item in seen].index("stuck") <= 12 and seen[-1].quality == "stuck"
    assert feed(detector, [20.2], 600)[0].quality == "good"


def test_a_night_of_zeros_every_night_is_not_stuck() -> None:
    night = [0.0] * 60 + [5 + row % 7 for row in range(60)]
    seen = feed(Detector(), night * 30)
    assert "stuck" not in qualities(seen[240:])


def test_a_spike_is_one_and_its_return_is_not() -> None:
    detector = Detector()
    feed(detector, noise(300))
    assert [item.quality for item in feed(detector, [20.1, 60.0, 20.2, 19.9], 300)] == ["good", "spike", "good", "good"]


def test_a_level_shift_is_a_spike_at_first_and_then_the_new_level() -> None:
    detector = Detector()
    feed(detector, noise(300))
    seen = feed(detector, noise(100, 2, 60.0), 300)
    assert seen[0].quality == "spike" and qualities(seen[5:]) == {"good"} and seen[-1].expected == pytest.approx(60, abs=1)


@pytest.mark.parametrize("calm", [noise(300), [20.0] * 300])
def test_a_thousandfold_value_is_suspect_and_does_not_blind(calm: list[float]) -> None:
    detector = Detector()
    feed(detector, calm)
    wild = feed(detector, [20_000.0], 300)[0]
    assert wild.quality == "suspect" and (calm[0] == 20.0 or wild.score > 0.99)
    feed(detector, calm, 301)
    after = feed(detector, [26.0], 601)[0]
    assert after.expected == pytest.approx(20, abs=0.5) and (calm[0] == 20.0 or after.score > 0.99)
    assert detector.observe(START + 602 * MINUTE, 20.0).value == 20.0


def test_a_new_unit_is_believed_in_the_end() -> None:
    detector = Detector()
    feed(detector, noise(300))
    seen = feed(detector, noise(300, 2, 20_000.0, 300.0), 300)
    assert seen[0].quality == "suspect" and qualities(seen[40:]) == {"good"} and all(item.score < 0.99 for item in seen[200:])


def test_what_is_not_finite_changes_nothing() -> None:
    one, other = Detector(), Detector()
    feed(one, noise(200))
    feed(other, noise(200))
    for value in (math.nan, math.inf, -math.inf, 10**400):
        seen = one.observe(START + 200 * MINUTE, value)
        assert seen.quality == "not_finite" and seen.value is None and seen.score == 0
    assert one.export_state() == other.export_state()


def test_time_backwards_is_marked_once() -> None:
    detector = Detector()
    feed(detector, noise(200))
    assert [item.quality for item in feed(detector, noise(3, 2), 100)] == ["backwards", "good", "good"]


def test_limits_belong_to_who_asks() -> None:
    seen = feed(Detector(), [50.0])[0]
    assert seen.quality == "good" and seen.quality_within(0, 40) == "out_of_range" and seen.quality_within(0, 60) == "good"


# -- anomalies -------------------------------------------------------------------------------------------------------------------


def alarms(seen: list[Observation], above: float = 0.99) -> list[int]:
    return [row for row, item in enumerate(seen) if item.score > above]


def test_false_alarms_are_rare_on_plain_noise() -> None:
    """At most one in 1,000 readings, over kinds of noise that occur: normal, counted, heavy-tailed, wandering, daily."""
    source = random.Random(11)
    walk, walked = 0.0, []
    for _ in range(6000):
        walk = 0.98 * walk + source.gauss(0, 1)
        walked.append(walk)
    kinds = {
        "normal": noise(6000), "counts": [float(sum(source.random() < 0.1 for _ in range(40))) for _ in range(6000)],
        "heavy": [source.lognormvariate(0, 0.5) for _ in range(6000)], "autoregressive": walked,
        "daily": [20 + 8 * math.sin(row / 288 * 2 * math.pi) + source.gauss(0, 0.5) for row in range(6000)],
        "constant": [7.0] * 6000, "ramp": [row * 0.01 for row in range(6000)],
    }
    found = {name: len(alarms(feed(Detector(), values, step_ms=5 * MINUTE)[300:])) for name, values in kinds.items()}
    assert all(count <= 5 for count in found.values()), found


@pytest.mark.parametrize("what", ["spike", "shift", "dropout"])
def test_what_never_was_is_found_at_once_and_once(what: str) -> None:
    detector = Detector()
    feed(detector, noise(1500))
    fault = {"spike": [24.0, 20.0], "shift": noise(60, 9, 24.0), "dropout": [0.0] * 60}[what]
    seen = feed(detector, fault + noise(40, 4), 1500)
    assert alarms(seen)[0] == 0 and len(alarms(seen)) <= 3


def test_a_new_normal_is_not_alarmed_about_for_ever() -> None:
    detector = Detector()
    feed(detector, noise(1500))
    assert len(alarms(feed(detector, noise(3000, 2, 30.0), 1500)[10:])) <= 2


def test_what_was_normal_long_ago_is_strange_again() -> None:
    detector = Detector()
    feed(detector, noise(600, 1, 30.0) + noise(MEMORY + 600, 2, 20.0))
    assert alarms(feed(detector, [30.0], MEMORY + 1200)) == [0]
    other = Detector()
    feed(other, noise(600, 1, 30.0) + noise(600, 2, 20.0))
    assert alarms(feed(other, [30.0], 1200)) == [], "after an hour it is not"


def daily(row: int, source: random.Random) -> float:
    return 20 + 8 * math.sin(row / 288 * 2 * math.pi) + source.gauss(0, 0.3)


def test_a_usual_value_at_an_unusual_hour_is_found_by_the_daily_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_alarm() -> int | None:
        source, detector = random.Random(3), Detector()
        feed(detector, [daily(row, source) for row in range(10 * 288)], step_ms=5 * MINUTE)
        seen = feed(detector, [daily(row + 144, source) for row in range(72)], 10 * 288 + 36, 5 * MINUTE)
        return next(iter(alarms(seen)), None)

    found = first_alarm()
    assert found is not None and found <= 3
    monkeypatch.setattr(strangeness_module, "FEATURE_WEIGHT", 0.0)
    assert first_alarm() is None, "it is the pattern that finds it"


@pytest.mark.parametrize("what", ["calm", "swing", "faster", "a day that did not happen"])
def test_what_usual_values_hide_is_found_by_the_features(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here leaves the usual range; the value alone finds none of it."""
    source = random.Random(what)
    usual: Callable[[int], float] = {
        "calm": lambda row: 10 + source.gauss(0, 1), "swing": lambda row: 10 + math.sin(row / 40) + source.gauss(0, 0.05),
        "faster": lambda row: 20 + 10 * math.sin(row / 37 * 2 * math.pi) + source.gauss(0, 1),
        "a day that did not happen": lambda row: (80 if 108 <= row % 288 < 216 else 20) + source.gauss(0, 2.5),
    }[what]
    fault: Callable[[int], float] = {
        "calm": lambda row: 10 + source.gauss(0, 0.1), "swing": lambda row: 10 + 0.9 * (-1) ** row,
        "faster": lambda row: 20 + 9 * math.sin(row / 12 * 2 * math.pi) + source.gauss(0, 1),
        "a day that did not happen": lambda row: 20 + source.gauss(0, 2),
    }[what]
    values = [usual(row) for row in range(2880 + 108)] + [fault(row) for row in range(108)]

    def found() -> bool:
        detector = Detector()
        feed(detector, values[:2880 + 108], step_ms=5 * MINUTE)
        return bool(alarms(feed(detector, values[2880 + 108:], 2880 + 108, 5 * MINUTE)))

    assert found()
    monkeypatch.setattr(strangeness_module, "FEATURE_WEIGHT", 0.0)
    assert not found()


def test_a_fast_wandering_signal_is_no_pattern() -> None:
    """Many readings fall into a quarter of an hour: a profile that followed them would look proven and tell nothing of other days."""
    source, detector, value = random.Random(4), Detector(), 0.0
    for row in range(20_000):
        value = 0.999 * value + source.gauss(0, 1)
        detector.observe(START + row * 20_000, value)
    assert detector._strangeness.season.active < 0


def test_one_reading_a_day_has_a_weekly_pattern() -> None:
    source, detector = random.Random(4), Detector()
    for row in range(400):
        detector.observe(START + row * DAY, (5.0 if row % 7 < 2 else 20.0) + source.gauss(0, 0.5))
    assert detector._strangeness.season.active >= 1 and detector._strangeness.season.expected(START + 399 * DAY) == pytest.approx(5.0 if 399 % 7 < 2 else 20.0, abs=1)


def test_a_period_that_nobody_named_is_found() -> None:
    source, detector = random.Random(3), Detector()
    values = [20 + (10 if row % 37 < 12 else 0) + source.gauss(0, 0.3) for row in range(3000)]
    seen = feed(detector, values)
    missed = sum(abs((item.expected or 0) - value) > 2 for item, value in zip(seen[2500:], values[2500:], strict=True))
    assert missed < 60, "what is expected follows the period"
    plain = sum(abs(20 + 10 * 12 / 37 - value) > 2 for value in values[2500:])
    assert plain > 400


def test_the_cover_forgets_merges_and_keeps_its_limit() -> None:
    novelty = Novelty(16)
    for row in range(5000):
        novelty.observe(float(row * row % 997))
        assert len(novelty.points) == len(novelty.seen) == len(novelty.hits) <= 16 and list(novelty.points) == sorted(novelty.points)
    for row in range(MEMORY + 200):
        novelty.observe(row % 3 / 10)
    assert len(novelty.points) <= 3


# -- forecasts -------------------------------------------------------------------------------------------------------------------


def test_a_ramp_crosses_when_it_will() -> None:
    source, detector = random.Random(2), Detector()
    feed(detector, [20 + 0.2 * row + source.gauss(0, 0.2) for row in range(200)])
    found = detector.time_to(80.0, rising=True, within_ms=DAY)
    assert found is not None and found.latest_ms is not None
    assert found.earliest_ms <= 101 * MINUTE <= found.latest_ms and abs(found.in_ms - 101 * MINUTE) < 6 * MINUTE
    assert detector.time_to(10.0, rising=False, within_ms=DAY) is None
    assert detector.time_to(30.0, rising=True, within_ms=DAY) == (0, 0, 0)


def test_the_interval_holds_what_it_promises() -> None:
    """Of 100 noisy ramps the true time lies in the interval at least 85 times; half as wide an interval would not do."""
    inside = 0
    for seed in range(100):
        source, detector = random.Random(seed), Detector()
        feed(detector, [20 + 0.2 * row + source.gauss(0, 1.0) for row in range(150)])
        found = detector.time_to(70.0, rising=True, within_ms=DAY)
        assert found is not None
        inside += found.earliest_ms <= 101 * MINUTE <= (found.latest_ms if found.latest_ms is not None else math.inf)
    assert inside >= 85


def test_noise_without_a_trend_has_no_time() -> None:
    told = 0
    for seed in range(50):
        detector = Detector()
        feed(detector, noise(200, seed))
        told += detector.time_to(30.0, rising=True, within_ms=DAY) is not None
    assert told <= 5


def test_a_daily_wave_is_followed_and_not_extrapolated() -> None:
    source, detector = random.Random(3), Detector()
    feed(detector, [daily(row, source) for row in range(8 * 288 + 40)], step_ms=5 * MINUTE)
    assert detector.time_to(32.0, rising=True, within_ms=DAY) is None, "the morning's rise ends below it"
    found = detector.time_to(16.0, rising=False, within_ms=DAY)
    true_ms = (288 / 2 + 288 / 2 / math.pi * math.asin(0.5) - 40) * 5 * MINUTE
    assert found is not None and abs(found.in_ms - true_ms) < 45 * MINUTE
