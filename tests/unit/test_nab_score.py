"""The scorer against what the benchmark's definition says, each with a detector that must be punished."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.decisions.detectors import Detector
from tools.bench.nab import BAR, DATA, LooksAhead, check_no_look_ahead, cross_validated, detect
from tools.bench.nab_score import PROFILES, Profile, Stream, gains, probation, read_corpus, score_corpus, sigmoid

STANDARD, LOW_FP, LOW_FN = PROFILES
ROWS, WINDOWS = 1000, ((400, 449), (700, 749))
STREAM = Stream("made/one.csv", tuple(range(0, ROWS * 60_000, 60_000)), (0.0,) * ROWS, WINDOWS)
QUIET = Stream("made/none.csv", STREAM.times_ms, STREAM.values, ())


def at(*rows: int) -> list[float]:
    return [1.0 if row in rows else 0.0 for row in range(ROWS)]


@pytest.mark.parametrize("profile", PROFILES)
def test_the_perfect_detector_gets_100_and_the_null_detector_0(profile: Profile) -> None:
    assert score_corpus([(STREAM, at(400, 700)), (QUIET, at())], profile, 0.5).score == pytest.approx(100)
    assert score_corpus([(STREAM, at()), (QUIET, at())], profile, 0.5).score == 0
    assert score_corpus([(STREAM, at(400, 700)), (QUIET, at())], profile).score == pytest.approx(100)


def test_the_worth_of_a_detection_falls_over_the_window_and_on_after_it() -> None:
    worth, inside = gains(ROWS, WINDOWS)
    assert worth[400] == pytest.approx(1) and inside[400] == 0 and inside[749] == 1
    assert all(before > after for before, after in pairwise(worth[400:450])) and 0 < worth[449] < 0.06
    assert -0.06 < worth[450] < 0 and all(before > after for before, after in pairwise(worth[450:591]))
    assert worth[600] == worth[699] == -1.0 and worth[399] == -1.0
    assert sigmoid(-1) == pytest.approx(0.98661, abs=1e-5) and sigmoid(0) == 0 and sigmoid(3.01) == -1


def test_a_late_detection_is_worth_less_than_an_early_one_and_a_second_one_nothing() -> None:
    early, late = (score_corpus([(STREAM, at(row, 700))], STANDARD, 0.5).score for row in (405, 445))
    assert 50 < late < early < 100
    assert score_corpus([(STREAM, at(405, 406, 420, 449, 700))], STANDARD, 0.5).score == pytest.approx(early)


def test_detections_only_before_the_windows_are_punished() -> None:
    assert score_corpus([(STREAM, at(399, 699))], STANDARD, 0.5).score == pytest.approx(-100 * 2 * 0.11 / 4)
    assert score_corpus([(STREAM, at(399, 699))], STANDARD).score == 0, "the sweep rather says nothing"


def test_just_after_a_window_costs_less_than_far_from_it() -> None:
    near, far = (score_corpus([(STREAM, at(row))], STANDARD, 0.5).score for row in (455, 650))
    assert far < near < 0


def test_probation_does_not_count() -> None:
    assert (probation(1000), probation(4000), probation(22_000)) == (150, 600, 750)
    assert score_corpus([(STREAM, at(*range(150), 400, 700))], STANDARD, 0.5).score == pytest.approx(100)
    assert score_corpus([(STREAM, at(*range(151), 400, 700))], STANDARD, 0.5).score < 100


def test_a_window_that_lies_in_probation_is_not_missed() -> None:
    stream = Stream("made/early.csv", STREAM.times_ms, STREAM.values, ((20, 60), (700, 749)))
    assert score_corpus([(stream, at(700))], STANDARD, 0.5).score == pytest.approx(100)


def test_each_weight_matters() -> None:
    one_missed_two_false = at(400, 200, 300)
    scores = [score_corpus([(STREAM, one_missed_two_false)], profile, 0.5).score for profile in PROFILES]
    assert scores[0] == pytest.approx(100 * (1 - 0.22 - 1 + 2) / 4)
    assert scores[1] == pytest.approx(100 * (1 - 0.44 - 1 + 2) / 4)
    assert scores[2] == pytest.approx(100 * (1 - 0.22 - 2 + 4) / 6)


def test_one_threshold_serves_the_whole_corpus() -> None:
    """Two streams that each could be perfect with a threshold of its own, but not with one."""
    first = [0.9 if row in (400, 700) else 0.8 if row % 10 == 5 else 0.0 for row in range(ROWS)]
    second = [0.7 if row in (400, 700) else 0.0 for row in range(ROWS)]
    twin = Stream("made/two.csv", STREAM.times_ms, STREAM.values, WINDOWS)
    both = score_corpus([(STREAM, first), (twin, second)], STANDARD)
    assert both.threshold == 0.9 and both.score == pytest.approx(50)
    assert score_corpus([(twin, second)], STANDARD).score == pytest.approx(100)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, math.nan]), min_size=ROWS, max_size=ROWS), st.sampled_from(PROFILES))
@settings(max_examples=30, deadline=None)
def test_the_sweep_is_the_best_of_all_thresholds(scores: list[float], profile: Profile) -> None:
    swept = score_corpus([(STREAM, scores)], profile)
    each = [score_corpus([(STREAM, scores)], profile, threshold).score for threshold in (0.0, 0.25, 0.5, 0.75, 1.0, 2.0)]
    assert swept.score == pytest.approx(max(each)) and 0 <= swept.score <= 100 + 1e-9
    assert swept.score == pytest.approx(sum(swept.streams.values()))


class Steps:
    """Scores by the step from the last value."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, _at_ms: int, value: float) -> float:
        step, self.last = abs(value - self.last), value
        return step


class Scaled(Steps):
    """The same, divided by the largest value of the whole stream: a normalisation that needs the future."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.largest = max(map(abs, stream.values))

    def __call__(self, at_ms: int, value: float) -> float:
        return super().__call__(at_ms, value) / self.largest


class Peeks:
    """Scores a row by the step that comes next."""

    def __init__(self, stream: Stream) -> None:
        self.values, self.row = stream.values, 0

    def __call__(self, _at_ms: int, value: float) -> float:
        self.row += 1
        return abs(self.values[min(self.row, len(self.values) - 1)] - value)


def test_a_detector_that_looks_ahead_is_caught() -> None:
    values = tuple(10.0 if 400 <= row < 450 else row % 7 / 10 for row in range(ROWS))
    stream = Stream("made/step.csv", STREAM.times_ms, values, WINDOWS[:1])
    check_no_look_ahead(lambda _stream: Steps(), stream)
    for cheat in (Scaled, Peeks):
        with pytest.raises(LooksAhead, match="before it"):
            check_no_look_ahead(cheat, stream)


def test_a_detector_sees_one_row_at_a_time() -> None:
    seen: list[float] = []

    class Notes:
        def __call__(self, _at_ms: int, value: float) -> float:
            seen.append(value)
            return float(len(seen))

    scores = detect(Notes(), Stream("made/x.csv", (0, 1, 2), (5.0, 6.0, 7.0), ()))
    assert scores == [1.0, 2.0, 3.0] and seen == [5.0, 6.0, 7.0]


def test_a_corpus_is_read_by_its_labels(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    lines = [f"2014-04-{1 + row // 24:02} {row % 24:02}:00:00,{row}" for row in range(100)]
    (tmp_path / "made" / "one.csv").write_text("timestamp,value\n" + "\n".join(lines) + "\n")
    (tmp_path / "windows.json").write_text(json.dumps({"made/one.csv": [["2014-04-02 00:00:00.000000", "2014-04-02 05:00:00.000000"]], "made/gone.csv": []}))
    (stream,) = read_corpus(tmp_path)
    assert stream.name == "made/one.csv" and stream.windows == ((24, 29),) and stream.values[99] == 99.0


def test_the_benchmark_s_own_layout_is_read(tmp_path: Path) -> None:
    for folder in ("data/real", "labels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "real" / "a.csv").write_text("timestamp,value\n2014-04-01 00:00:00,1\n2014-04-01 00:05:00.5,2\n")
    (tmp_path / "labels" / "combined_windows.json").write_text('{"real/a.csv": []}')
    (stream,) = read_corpus(tmp_path)
    assert stream.values == (1.0, 2.0) and stream.times_ms[1] - stream.times_ms[0] == 300_500


def test_a_corpus_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"windows\.json"):
        read_corpus(tmp_path)
    (tmp_path / "windows.json").write_text('{"a.csv": []}')
    with pytest.raises(ValueError, match="none of the streams"):
        read_corpus(tmp_path)
    (tmp_path / "a.csv").write_text("timestamp,value\n2014-04-01 00:00:00,1\n2014-04-01 00:05:00,much\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 3"):
        read_corpus(tmp_path)


def test_a_threshold_chosen_elsewhere_is_what_cross_validation_scores() -> None:
    """Each stream is perfect with a threshold of its own, which is too high or too low for the other."""
    loud = [0.9 if row in (400, 700) else 0.5 if row % 10 == 5 else 0.0 for row in range(ROWS)]
    soft = [0.4 if row in (400, 700) else 0.0 for row in range(ROWS)]
    corpus = [(Stream("a/1.csv", STREAM.times_ms, STREAM.values, WINDOWS), loud), (Stream("b/2.csv", STREAM.times_ms, STREAM.values, WINDOWS), soft)]
    assert cross_validated(corpus, STANDARD, lambda name: name) < score_corpus(corpus, STANDARD).score
    assert cross_validated([corpus[0], (Stream("b/1.csv", STREAM.times_ms, STREAM.values, WINDOWS), loud)], STANDARD, lambda name: name) == pytest.approx(100)
    assert math.isnan(cross_validated(corpus, STANDARD, lambda name: 0))


@pytest.mark.skipif(not (DATA / "windows.json").is_file(), reason=f"no benchmark streams in {DATA}; set NOVACRON_DATA to the folder that holds nab/")
def test_the_detector_reaches_the_bar_on_the_benchmark_s_streams() -> None:
    corpus = []
    for stream in read_corpus(DATA):
        detector = Detector()
        corpus.append((stream, detect(lambda at_ms, value, detector=detector: detector.observe(at_ms, value).score, stream)))
        assert len(detector.export_state()) <= 65_536, stream.name
    assert score_corpus(corpus, STANDARD).score >= BAR
    assert cross_validated(corpus, STANDARD, lambda name: name.rpartition("/")[0]) >= BAR - 5
    shuffled = [(stream, scores[::-1]) for stream, scores in corpus]
    assert score_corpus(shuffled, STANDARD).score < 40, "the same scores at the wrong times are worth little"
