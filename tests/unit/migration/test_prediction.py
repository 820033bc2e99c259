"""What a move would take: the sample, the calculation, the trees, the intervals, and what is refused."""

import json
import math
import random
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_migration import precopy_model, sample
from gpu_migration.calibration import COVERAGE, LEAST, Calibration
from gpu_migration.convergence import Limits
from gpu_migration.errors import ModelError
from gpu_migration.layout import EXTENT, PAGE
from gpu_migration.precopy_model import Link, foresee
from gpu_migration.prediction import FEATURES, HISTORY_MOST, History, Outcome, Predictor, Question
from gpu_migration.sample import Sample
from gpu_migration.sources import FileSource
from gpu_migration.trees import LEAF, Trees

STILL = Sample(64 << 20, 1.0, 0.5, 2.0, 3.0, 0.0, 0.0, 2e9)
LINK = Link(100e6, 2)
LEAF_OF = {"start": 0.0, "trees": [[[LEAF, 0.0, 0, 0, 0.0]]]}


def head(value: float) -> Trees:
    return Trees(value, (), len(FEATURES))


def predictor(low: float = -0.1, high: float = 0.1, scores: int = 50) -> Predictor:
    """One that says that it takes as long as was reckoned."""
    return Predictor({"low": head(low), "middle": head(0.0), "high": head(high)}, [(-100.0, 100.0)] * len(FEATURES), [0.0] * scores)


@contextmanager
def opened(path: Path) -> Iterator[FileSource]:
    source = FileSource(path)
    try:
        yield source
    finally:
        source.close()


# -- the sample ------------------------------------------------------------------------------------------------------------


def test_a_sample_finds_holes_zeros_words_and_what_shrinks(tmp_path: Path) -> None:
    path, draw = tmp_path / "source", random.Random(1)
    with open(path, "wb") as file:
        file.truncate(64 * EXTENT)
        for index in range(0, 64, 2):
            file.seek(index * EXTENT)
            for _ in range(EXTENT // PAGE // 4):
                file.write(bytes(PAGE) + b"ABCDEFGH" * (PAGE // 8) + draw.randbytes(PAGE) + draw.randbytes(PAGE // 2) + bytes(PAGE // 2))
    with opened(path) as source:
        seen = sample.take(source, changing=False)
    assert seen.length == 64 * EXTENT and seen.data == 0.5 and abs(seen.plain - 0.5) < 0.15
    assert 1.2 < seen.guess < 1.5 and 1.2 < seen.strong < 1.5 and seen.hot == seen.rate == 0 and seen.hashing > 0


def test_a_sample_finds_who_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(random.Random(1).randbytes(16 * EXTENT))

    def write(_: float) -> None:
        with open(path, "r+b") as file:
            for index in range(4):
                file.seek(index * EXTENT)
                file.write(random.randbytes(64))

    with opened(path) as source:
        seen = sample.take(source, changing=True, wait=write)
        still = sample.take(source, changing=True, wait=lambda _: None)
    assert abs(seen.hot - 0.25) < 0.01 and seen.rate > 10
    assert still.hot == still.rate == 0


@given(st.floats(0.02, 1.0), st.floats(0.2, 30.0))
def test_what_is_written_to_at_random_is_found_again(hot: float, rate: float) -> None:
    first, second = (hot * -math.expm1(-rate * t) for t in sample.WATCH_S)
    found = sample.fit(first, second)
    for t in (0.05, 0.4):  # where both are extremes, one cannot be told from the other, but what has been written to can
        assert found[0] * -math.expm1(-found[1] * t) == pytest.approx(hot * -math.expm1(-rate * t), rel=0.05)


@given(st.floats(0, 1), st.floats(0, 1))
def test_any_two_shares_give_numbers(first: float, second: float) -> None:
    hot, rate = sample.fit(first, second)
    assert 0 <= hot <= 1 and 0 <= rate < math.inf


def test_a_tiny_or_empty_source_is_sampled(tmp_path: Path) -> None:
    for data in (b"x", bytes(10), bytes(EXTENT + 1)):
        path = tmp_path / "source"
        path.write_bytes(data)
        with opened(path) as source:
            seen = sample.take(source, changing=True, wait=lambda _: None)
        assert seen.length == len(data) and math.isfinite(foresee(seen, LINK, Limits()).seconds)


# -- the calculation -------------------------------------------------------------------------------------------------------


def samples(changing: bool) -> st.SearchStrategy[Sample]:
    rates = (st.floats(0, 1), st.floats(0, 50)) if changing else (st.just(0.0), st.just(0.0))
    return st.builds(Sample, st.integers(1, 1 << 36), st.floats(0, 1), st.floats(0, 1), st.floats(1, 20), st.floats(1, 40), *rates, st.floats(1e8, 1e10))


@given(samples(True), st.floats(1e4, 1e10), st.integers(1, 64), st.floats(0, 5))
def test_it_always_ends_and_is_finite(seen: Sample, bandwidth: float, threads: int, took: float) -> None:
    found = foresee(seen, Link(bandwidth, threads), Limits(), took)
    assert all(math.isfinite(value) and value >= 0 for value in (found.seconds, found.first, found.downtime, found.wire_bytes, found.ratio))
    assert 1 <= found.passes <= precopy_model.PASSES_MOST + 1


@given(samples(False), st.floats(1e6, 1e10), st.floats(1.0, 10.0))
def test_a_faster_link_is_never_slower(seen: Sample, bandwidth: float, times: float) -> None:
    assert foresee(seen, Link(bandwidth * times, 2)).seconds <= foresee(seen, Link(bandwidth, 2)).seconds * 1.001


def test_a_source_that_changes_too_fast_is_reckoned_not_to_converge() -> None:
    fast = Sample(1 << 30, 1.0, 1.0, 1.0, 1.0, 1.0, 20.0, 2e9)
    assert not foresee(fast, LINK, Limits()).converges
    assert foresee(fast, LINK, Limits(first=60.0, ceiling=60.0)).converges
    said = predictor().predict(Question(fast, LINK, Limits(), 0.0))
    assert said.confidence == 0 and "faster than it can be moved" in said.reason and said.high_seconds == math.inf and said.to_json()["high_seconds"] is None


def test_what_the_first_pass_took_is_followed() -> None:
    assert foresee(STILL, LINK, None, 10.0).seconds == pytest.approx(10.0 + precopy_model.COMMIT_S)


# -- the trees -------------------------------------------------------------------------------------------------------------


def test_trees_give_what_they_were_trained_to_give() -> None:
    pytest.importorskip("sklearn", reason="no scikit-learn (pip install '.[bench]')")
    from sklearn.ensemble import GradientBoostingRegressor

    from tools import train_prediction

    draw = random.Random(3)
    rows = [Outcome(tuple(draw.random() for _ in FEATURES), 1.0, math.exp(draw.random())) for _ in range(120)]
    mine = Trees.from_json(json.loads(json.dumps(train_prediction.fit(rows, 0.5).to_json())), len(FEATURES))
    theirs = GradientBoostingRegressor(
        loss="quantile", alpha=0.5, n_estimators=train_prediction.TREES, max_depth=train_prediction.DEPTH, min_samples_leaf=train_prediction.LEAST, learning_rate=train_prediction.RATE, subsample=0.8,
        random_state=train_prediction.SEED,
    ).fit([row.features for row in rows], [math.log(row.seconds) for row in rows])
    said = [mine(row.features) for row in rows]
    assert said == pytest.approx(list(theirs.predict([row.features for row in rows])), abs=1e-4)
    assert statistics.pstdev(said) > 0.05


@given(st.recursive(st.none() | st.booleans() | st.integers(-3, 20) | st.floats(allow_nan=True) | st.text(max_size=3), lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["start", "trees"]), inner), max_leaves=30))
def test_whatever_a_file_says_is_a_forest_that_ends_or_refused(told: object) -> None:
    try:
        trees = Trees.from_json(told, 2)
    except ModelError:
        return
    assert isinstance(trees((0.0, 0.0)), float)


def test_a_tree_that_leads_back_is_refused() -> None:
    for tree in ([[0, 0.5, 0, 1, 0.0], [LEAF, 0, 0, 0, 1.0]], [[0, 0.5, 1, 7, 0.0], [LEAF, 0, 0, 0, 1.0]], [[9, 0.5, 1, 1, 0.0], [LEAF, 0, 0, 0, 1.0]], []):
        with pytest.raises(ModelError, match=r"leads nowhere|empty"):
            Trees.from_json({"start": 0, "trees": [tree]}, 2)


# -- the intervals ---------------------------------------------------------------------------------------------------------


def covered(learning: bool) -> float:
    """On a machine that becomes four times as uneven half way."""
    draw, calibration, inside = random.Random(5), Calibration([random.Random(6).gauss(0, 1) for _ in range(100)]), 0
    for n in range(1000):
        score = draw.gauss(0, 1 if n < 500 else 4)
        inside += score <= calibration.margin()
        if learning:
            calibration.learn(score)
    return inside / 1000


def test_nine_in_ten_lie_inside_also_where_the_machine_changes() -> None:
    assert abs(covered(True) - COVERAGE) < 0.02


def test_control_without_learning_they_do_not() -> None:
    assert covered(False) < COVERAGE - 0.04


def test_before_enough_is_known_nothing_is_promised() -> None:
    said = predictor(scores=LEAST - 1).predict(Question(STILL, LINK, None, 0.0))
    assert said.confidence == 0 and "too few" in said.reason
    said = predictor(scores=LEAST).predict(Question(STILL, LINK, None, 0.0))
    assert said.confidence == COVERAGE and said.low_seconds <= said.estimated_duration_seconds <= said.high_seconds and not said.reason


def test_what_it_was_not_trained_on_has_a_reason_instead() -> None:
    known = predictor()
    ranges = [(-100.0, 100.0)] * len(FEATURES)
    ranges[FEATURES.index("busy")] = (0.0, 1.0)
    strict = Predictor({"low": head(-0.1), "middle": head(0.0), "high": head(0.1)}, ranges, [0.0] * 50)
    question = Question(STILL, LINK, None, 9.0)
    assert not known.predict(question).reason
    said = strict.predict(question)
    assert said.confidence == 0 and "busy is 9" in said.reason and math.isfinite(said.estimated_duration_seconds)
    for _ in range(LEAST):
        strict.learn(outcome(1.0))
    assert not strict.predict(question).reason, "what the machine does has been learnt from it"
    ranges[FEATURES.index("plain")] = (0.8, 1.0)
    other = Predictor({"low": head(-0.1), "middle": head(0.0), "high": head(0.1)}, ranges, [0.0] * 50)
    for _ in range(LEAST):
        other.learn(outcome(1.0))
    assert "plain is 0.5" in other.predict(question).reason, "what a source is like has not"


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3), st.lists(st.floats(-3, 3), min_size=LEAST, max_size=60))
def test_low_middle_and_high_keep_their_order(low: float, middle: float, high: float, scores: list[float]) -> None:
    made = Predictor({"low": head(low), "middle": head(middle), "high": head(high)}, [(-100.0, 100.0)] * len(FEATURES), scores)
    said = made.interval([0.0] * len(FEATURES))
    assert said[0] <= said[1] <= said[2]


# -- files -----------------------------------------------------------------------------------------------------------------


def test_the_model_that_comes_along_predicts() -> None:
    question = Question(Sample(200 << 20, 1.0, 0.5, 2.0, 3.0, 0.0, 0.0, 2.2e9), LINK, None, 0.3)
    said = Predictor.load().predict(question)
    assert not said.reason and 0.1 < said.low_seconds <= said.estimated_duration_seconds <= said.high_seconds < 10
    after = Question(question.sample, LINK, Limits(), 0.3, first_took=1.0)
    assert Predictor.load(passed=True).predict(after).reason == ""


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"form": 99}', "null", json.dumps({"form": 1, "features": list(FEATURES), "before": {"heads": {"low": LEAF_OF}}})])
def test_a_damaged_model_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"train it again"):
        Predictor.load(path)
    with pytest.raises(ModelError, match="No such file"):
        Predictor.load(tmp_path / "none.json")


def outcome(seconds: float) -> Outcome:
    return Outcome((0.5,) * len(FEATURES), 1.0, seconds)


def test_a_history_keeps_the_newest_and_bears_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "history"
    history = History(path)
    assert history.read() == []
    line = json.dumps({"features": [0.5] * len(FEATURES), "foreseen": 1.0, "seconds": 1.0})
    path.write_text(f"{line}\n" * HISTORY_MOST)
    history.add(outcome(2.0))
    kept = history.read()
    assert len(kept) == HISTORY_MOST and kept[-1] == outcome(2.0) and kept[0] == outcome(1.0)
    with open(path, "ab") as file:
        file.write(line.encode()[:20])
    assert history.read() == kept


@pytest.mark.parametrize("line", ["{}", "[]", "x", json.dumps({"features": [1], "foreseen": 1, "seconds": 1}), json.dumps({"features": [0.5] * len(FEATURES), "foreseen": 0, "seconds": 1}),
                                  json.dumps({"features": [math.nan] * len(FEATURES), "foreseen": 1, "seconds": 1})])
def test_a_history_that_is_none_is_refused_by_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_text(f"{line}\n")
    with pytest.raises(ModelError, match="line 1"):
        History(path).read()
    with pytest.raises(ModelError, match="line 1"):
        History(path).add(outcome(1.0))
    assert path.read_text() == f"{line}\n"
