"""The scorer of the Numenta Anomaly Benchmark (Lavin and Ahmad, 2015, arXiv:1510.03336; its sweeper and its three profiles). Pure.

A detector gives each row a score; a row whose score reaches the threshold is a detection. One threshold serves the whole corpus, and per profile
it is the one that scores best, as the benchmark does it. Per stream the first 15 % of the rows (of at most 5,000) are probation and do not count.

* The best detection inside a window counts `sigmoid(p) / sigmoid(-1)` at its position `p`, from -1 at the window's first row towards 0 at its last.
* A window without a detection counts `-fn`.
* A detection outside counts `fp * sigmoid(d / (width - 1))`, `d` rows after the last window's end: -fp beyond three widths, or before any window.

Scores are normalised so that 0 is a detector that says nothing and 100 one that detects every window at its first row and nothing else.
"""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

PROBATION_SHARE = 0.15
PROBATION_ROWS_MAX = 5_000
"""Probation is a share of at most so many rows, so at most 750."""

SIGMOID_SLOPE = 5.0
SIGMOID_END = 3.0
"""Widths after a window from where a false detection costs its full weight."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Weights of one application profile; a found window always weighs 1."""

    name: str
    fp: float
    fn: float


PROFILES = (Profile("standard", 0.11, 1.0), Profile("low_fp", 0.22, 1.0), Profile("low_fn", 0.11, 2.0))


@dataclass(frozen=True, slots=True)
class Stream:
    """One labelled stream: milliseconds and value per row; windows as (first, last) row, both inside."""

    name: str
    times_ms: tuple[int, ...]
    values: tuple[float, ...]
    windows: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Result:
    """One profile's result: normalised score, the threshold that gave it, and per stream its normalised part (they add up to the score)."""

    score: float
    threshold: float
    streams: dict[str, float]


def sigmoid(position: float) -> float:
    """The benchmark's scaled sigmoid: 1 far before, 0 at 0, -1 from `SIGMOID_END` on."""
    return -1.0 if position > SIGMOID_END else 2.0 / (1.0 + math.exp(SIGMOID_SLOPE * position)) - 1.0


def probation(rows: int) -> int:
    """Rows at the start that do not count."""
    return int(PROBATION_SHARE * min(rows, PROBATION_ROWS_MAX))


def gains(rows: int, windows: Sequence[tuple[int, int]]) -> tuple[list[float], list[int]]:
    """Per row what a detection there is worth (in a window: 0..1; outside: -1..0, before the weight), and its window's number or -1; -2 is probation."""
    worth, inside = [-1.0] * rows, [-1] * rows
    for number, (first, last) in enumerate(windows):
        width = last - first + 1
        for row in range(first, last + 1):
            worth[row], inside[row] = sigmoid(-(last - row + 1) / width) / sigmoid(-1.0), number
        until = windows[number + 1][0] if number + 1 < len(windows) else rows
        for row in range(last + 1, until):
            worth[row] = sigmoid((row - last) / max(1, width - 1))
    for row in range(probation(rows)):
        inside[row] = -2
    return worth, inside


def score_corpus(corpus: Sequence[tuple[Stream, Sequence[float]]], profile: Profile, threshold: float | None = None) -> Result:
    """Score the detections of a corpus.

    Args:
        corpus: streams with one score per row (higher is stranger; NaN counts as no detection).
        threshold: the one to use; None sweeps all and takes the best.
    """
    rows: list[tuple[float, int, int, float]] = []
    found: dict[tuple[int, int], float] = {}
    for number, (stream, scores) in enumerate(corpus):
        if len(scores) != len(stream.values):
            raise ValueError(f"{stream.name}: {len(scores)} scores for {len(stream.values)} rows; give one per row")
        worth, inside = gains(len(scores), stream.windows)
        found.update({(number, window): -profile.fn for window in inside if window >= 0})
        rows += [(score, number, window, gain) for score, window, gain in zip(scores, inside, worth, strict=True) if window != -2 and score > -math.inf]
    rows.sort(key=lambda row: -row[0])
    parts = [sum(value for (owner, _), value in found.items() if owner == number) for number in range(len(corpus))]
    total = sum(parts)
    null, best, best_threshold, best_parts = total, total, math.inf, list(parts)
    for index, (score, number, window, gain) in enumerate(rows):
        if threshold is not None and score < threshold:
            break
        change = profile.fp * gain
        if window >= 0:
            before = found[number, window]
            change = max(0.0, gain - before)
            found[number, window] = before + change
        parts[number] += change
        total += change
        last_of_equals = index + 1 == len(rows) or rows[index + 1][0] != score
        if threshold is not None or (last_of_equals and total > best):
            best, best_threshold, best_parts = total, score, list(parts)
    span = len(found) - null
    scale = 100.0 / span if span else 0.0
    empty = [-profile.fn * len({window for owner, window in found if owner == number}) for number in range(len(corpus))]
    return Result(
        scale * (best - null), best_threshold if threshold is None else threshold,
        {stream.name: scale * (part - base) for (stream, _), part, base in zip(corpus, best_parts, empty, strict=True)},
    )


# -- the corpus on disk ----------------------------------------------------------------------------------------------------------


def _time_ms(text: str) -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def read_stream(path: Path, name: str, windows: Iterable[Sequence[str]]) -> Stream:
    """A `timestamp,value` file with its labelled windows; raises ValueError that names file and line."""
    times: list[int] = []
    values: list[float] = []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        next(rows, None)
        for row in rows:
            try:
                times.append(_time_ms(row[0]))
                values.append(float(row[1]))
            except (IndexError, ValueError) as error:
                raise ValueError(f"{name}, line {rows.line_num}: {error}; a line is timestamp,value") from None
    spans: list[tuple[int, int]] = []
    for first, last in windows:
        inside = [row for row, at in enumerate(times) if _time_ms(first) <= at <= _time_ms(last)]
        if inside:
            spans.append((inside[0], inside[-1]))
    return Stream(name, tuple(times), tuple(values), tuple(sorted(spans)))


def read_corpus(folder: Path) -> list[Stream]:
    """Every stream that `windows.json` (or the benchmark's own `combined_windows.json`) labels, wherever it lies below `folder`, in order of name.

    Raises ValueError that says what is missing; a file without labels is not read (one without anomalies is labelled with an empty list).
    """
    labels = next((path for name in ("windows.json", "combined_windows.json") for path in sorted(folder.rglob(name))), None)
    if labels is None:
        raise ValueError(f"{folder}: has no windows.json; give the folder that holds the labels and the streams")
    windows = json.loads(labels.read_text(encoding="utf-8"))
    if not isinstance(windows, dict):
        raise ValueError(f"{labels}: is not an object of relative path to windows")
    files = {"/" + path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.csv"))}
    streams = []
    for name in sorted(windows):
        path = next((found for relative, found in files.items() if relative.endswith("/" + name)), None)
        if path is not None:
            streams.append(read_stream(path, name, windows[name]))
    if not streams:
        raise ValueError(f"{folder}: none of the streams that {labels.name} labels is there; keep its relative paths")
    return streams
