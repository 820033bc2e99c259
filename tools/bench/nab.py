"""The quality of the streaming detector by the Numenta Anomaly Benchmark's own measure, as the agent would see the streams: reading by reading.

One parameter set and one threshold for all streams. `--data` is a folder with `windows.json` and the streams at its relative paths; where it holds
`published_scores.csv` the published detectors stand beside the result. `--explain FILE` shows the detections of one stream.
"""

import csv
import math
import os
import sys
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from edge_runtime.decisions.detectors import Detector

from .harness import ROOT, arguments, machine, note, percentile, report
from .nab_score import PROFILES, Profile, Result, Stream, read_corpus, score_corpus

DATA = Path(os.environ.get("NOVACRON_DATA") or ROOT.parent / "shared" / "data") / "nab"
"""Where the streams are looked for."""

BAR = 70.0
"""Standard score to reach: the best published detectors of the benchmark get 70 to 75."""

MEAN_US_MAX = 100.0
"""Microseconds per reading that the detector may take on average: a gateway with 1,000 readings a second then spends a tenth of a core."""

STATE_BYTES_MAX = 65_536
"""Bytes of state per stream."""

LOOK_AHEAD_CUT = 0.6
"""Where the stream is cut to see whether earlier scores depend on what follows."""

Feed = Callable[[int, float], float]


class LooksAhead(AssertionError):
    """A detector whose scores depend on rows that come later."""


def detect(feed: Feed, stream: Stream) -> list[float]:
    """The score of each row, each given before the next row is shown."""
    return [feed(at_ms, value) for at_ms, value in zip(stream.times_ms, stream.values, strict=True)]


def check_no_look_ahead(make: Callable[[Stream], Feed], stream: Stream) -> None:
    """Score two streams with one past and different futures; raises `LooksAhead` where the past is not scored the same."""
    cut = int(LOOK_AHEAD_CUT * len(stream.values))
    other = Stream(stream.name, stream.times_ms, stream.values[:cut] + tuple(3.0 * value + 1e3 for value in reversed(stream.values[cut:])), stream.windows)
    for row, (before, after) in enumerate(zip(detect(make(stream), stream)[:cut], detect(make(other), other)[:cut], strict=True)):
        if before != after:
            raise LooksAhead(f"{stream.name}: the score of row {row} depends on rows from {cut} on; decide on each row before it is over")


def cross_validated(corpus: Sequence[tuple[Stream, Sequence[float]]], profile: Profile, fold_of: Callable[[str], Any]) -> float:
    """The score where each fold's threshold was chosen on the other folds only."""
    folds: dict[Any, list[tuple[Stream, Sequence[float]]]] = defaultdict(list)
    for item in corpus:
        folds[fold_of(item[0].name)].append(item)
    if len(folds) < 2:
        return float("nan")
    merged: list[tuple[Stream, Sequence[float]]] = []
    for fold, held in folds.items():
        threshold = score_corpus([item for other, items in folds.items() if other != fold for item in items], profile).threshold
        merged += [(stream, [1.0 if score >= threshold else 0.0 for score in scores]) for stream, scores in held]
    return score_corpus(merged, profile, 0.5).score


def _peers(folder: Path) -> dict[str, list[float]] | None:
    path = folder / "published_scores.csv"
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return {row[0]: [float(cell) for cell in row[1:4]] for row in rows if len(row) >= 4}


def _run(stream: Stream) -> tuple[list[float], "array[int]", int]:
    """Scores, nanoseconds per reading, bytes of state at the end."""
    detector = Detector()
    scores: list[float] = []
    spent = array("q")
    clock = time.perf_counter_ns
    for at_ms, value in zip(stream.times_ms, stream.values, strict=True):
        begin = clock()
        seen = detector.observe(at_ms, value)
        spent.append(clock() - begin)
        scores.append(seen.score)
    return scores, spent, len(detector.export_state())


def explain(stream: Stream, scores: Sequence[float], threshold: float) -> None:
    """The windows and detections of one stream, in order of time."""

    def when(row: int) -> str:
        return datetime.fromtimestamp(stream.times_ms[row] / 1000, UTC).strftime("%Y-%m-%d %H:%M")

    print(f"{stream.name}: {len(scores)} rows from {when(0)}, threshold {threshold:.6f}")
    lines = [(first, f"window  {when(first)} to {when(last)}, rows {first} to {last}") for first, last in stream.windows]
    for row, score in enumerate(scores):
        if score >= threshold:
            inside = any(first <= row <= last for first, last in stream.windows)
            lines.append((row, f"  {'inside ' if inside else 'outside'} {when(row)}, row {row}, value {stream.values[row]:g}, score {score:.6f}"))
    for _, line in sorted(lines):
        print(line)


def main() -> int:
    """Exit status 0 where the bar is met."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with windows.json and the streams")
    parser.add_argument("--explain", metavar="FILE", help="show the detections of one stream, by its name in windows.json or the end of it")
    options = parser.parse_args()
    about = machine()
    try:
        streams = read_corpus(options.data)
    except (OSError, ValueError) as error:
        print(f"nab: {error}", file=sys.stderr)
        return 2
    corpus: list[tuple[Stream, list[float]]] = []
    spent = array("q")
    state_bytes = 0
    for stream in streams:
        note(options, stream.name)
        scores, times, size = _run(stream)
        corpus.append((stream, scores))
        spent.extend(times)
        state_bytes = max(state_bytes, size)
    check_no_look_ahead(lambda _stream: _feed(), min(streams, key=lambda stream: len(stream.values)))
    results: dict[str, Result] = {profile.name: score_corpus(corpus, profile) for profile in PROFILES}
    standard = results["standard"]
    if options.explain:
        shown = [item for item in corpus if item[0].name.endswith(options.explain)]
        if not shown:
            print(f"nab: no stream is called {options.explain}; {', '.join(stream.name for stream in streams[:3])} ... are", file=sys.stderr)
            return 2
        for stream, scores in shown:
            explain(stream, scores, standard.threshold)
        return 0
    mean_us = sum(spent) / len(spent) / 1000
    in_order = {stream.name: index for index, stream in enumerate(streams)}
    details = {
        "standard": round(standard.score, 2), "low_fp": round(results["low_fp"].score, 2), "low_fn": round(results["low_fn"].score, 2),
        "thresholds": {name: _number(result.threshold, 6) for name, result in results.items()},
        "cross_validated": {
            profile.name: {
                "by_category": _number(cross_validated(corpus, profile, lambda name: name.rpartition("/")[0])),
                "by_halves": _number(cross_validated(corpus, profile, lambda name: in_order[name] % 2)),
            } for profile in PROFILES
        },
        "streams": len(streams), "windows": sum(len(stream.windows) for stream in streams), "readings": len(spent),
        "us_per_reading": {"mean": round(mean_us, 1), "p50": round(percentile(spent, 0.5) / 1000, 1), "p99": round(percentile(spent, 0.99) / 1000, 1)},
        "state_bytes_max": state_bytes,
        "per_file": {name: round(part, 2) for name, part in standard.streams.items()},
    }
    ok = standard.score >= BAR and mean_us <= MEAN_US_MAX and state_bytes <= STATE_BYTES_MAX
    return report(
        options, about, f"the detector scores at least {BAR:g} on the Numenta Anomaly Benchmark, at most {MEAN_US_MAX:g} us a reading", round(standard.score, 2), "points", ok,
        peer=_peers(options.data), inputs={"data": str(options.data)}, details=details,
    )


def _number(value: float, digits: int = 2) -> float | None:
    """Rounded; None where there is none, which JSON has no number for."""
    return round(value, digits) if math.isfinite(value) else None


def _feed() -> Feed:
    detector = Detector()
    return lambda at_ms, value: detector.observe(at_ms, value).score


if __name__ == "__main__":
    sys.exit(main())
