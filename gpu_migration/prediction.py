"""How long a move will take, and within what: a calculation of its passes, corrected by what moves that were really made took, with an interval calibrated on the last ones here.

    seconds = precopy_model.foresee(sample) * exp(residual trees(features))

The residual has three heads, the quantiles 0.05, 0.5 and 0.95; `calibration` widens the outer two. Where a feature lies outside of what was trained on, or the source is reckoned
not to converge, there is no prediction but the reason. `tools/train_prediction.py` makes the runs and the model; `tools/bench/prediction.py` holds it against other runs.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from . import calibration, precopy_model
from .calibration import COVERAGE, Calibration
from .choice import START_SHIP
from .convergence import Limits
from .errors import ModelError
from .layout import EXTENT
from .precopy_model import Foreseen, Link
from .receiver import STREAMS_MOST
from .sample import Sample
from .trees import Trees

FORM = 1
"""Version of the model's file."""
FEATURES = ("length", "data", "plain", "guess", "strong", "hot", "rate", "hashing", "bandwidth", "foreseen", "first", "passes", "busy", "changing")
"""In this order; times, sizes and rates as natural logarithms."""
OF_THE_MACHINE = ("hashing", "busy")
"""Features that say where it is moved and not what: what they do to the time here is learnt from moves that were made here."""
SLACK = 0.05
"""Share of a feature's range by which it may lie outside of what was trained on."""
HEADS = ("low", "middle", "high")
HISTORY_MOST = 2000
"""Outcomes that a history keeps: several windows of the calibration."""
HISTORY_BYTES_MOST = 4 << 20
"""Bytes of a history that are read: `HISTORY_MOST` lines have a quarter of that."""
BANDWIDTH_LEAST = 1e3
"""Bytes a second: a link that is slower moves nothing."""


@dataclass(frozen=True, slots=True)
class MigrationPrediction:
    """What to expect. Where `reason` says why there is no prediction, `confidence` is 0, and the numbers are the calculation's alone."""

    estimated_duration_seconds: float
    low_seconds: float
    high_seconds: float
    confidence: float
    """Share of moves that end within low to high."""
    expected_compression_ratio: float
    optimal_chunk_size_mb: float
    """The format's extent: it has one size."""
    recommended_streams: int
    expected_downtime_seconds: float
    expected_wire_bytes: float
    passes: int
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; infinite numbers are null."""
        return {name: (round(value, 6) if math.isfinite(value) else None) if isinstance(value, float) else value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Question:
    """What is known before a move, or after its first pass. `busy`: runnable processes a processor, of others; `first_took`: seconds of the first pass, 0 where it was not made yet."""

    sample: Sample
    link: Link
    limits: Limits | None
    busy: float
    first_took: float = 0.0

    def foresee(self) -> Foreseen:
        """The calculation."""
        return precopy_model.foresee(self.sample, self.link, self.limits, self.first_took)

    def features(self, foreseen: Foreseen) -> list[float]:
        """In the order of `FEATURES`."""
        sample = self.sample
        return [
            math.log(sample.length), sample.data, sample.plain, math.log(sample.guess), math.log(sample.strong), sample.hot, math.log1p(sample.rate), math.log(sample.hashing),
            math.log(max(BANDWIDTH_LEAST, self.link.bandwidth)), math.log(max(1e-3, foreseen.seconds)), math.log(max(1e-3, foreseen.first)), math.log(foreseen.passes), self.busy, float(self.limits is not None),
        ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A move that was made: the features of before, what was reckoned, what it took. Seconds."""

    features: tuple[float, ...]
    foreseen: float
    seconds: float


class Predictor:
    """A model and its calibration. `learn` every outcome, in their order."""

    def __init__(self, heads: dict[str, Trees], ranges: Sequence[tuple[float, float]], scores: Sequence[float], *, passed: bool = False) -> None:
        """`ranges`: least and most of each feature in training. `passed`: it is asked after the first pass."""
        self._heads, self._ranges, self.passed = heads, tuple(ranges), passed
        self._calibration = Calibration(scores)
        self._learnt = 0

    def predict(self, question: Question) -> MigrationPrediction:
        """What to expect."""
        foreseen = question.foresee()
        features = question.features(foreseen)
        reason = self._reason(question, foreseen, features)
        low, middle, high = self.interval(features) if not reason else (0.0, 0.0, math.inf)
        return MigrationPrediction(
            foreseen.seconds * math.exp(middle), foreseen.seconds * math.exp(low) if not reason else 0.0, foreseen.seconds * math.exp(high) if not reason else math.inf, 0.0 if reason else COVERAGE,
            foreseen.ratio, EXTENT / 1e6, streams_for(question.link, foreseen), foreseen.downtime, foreseen.wire_bytes, foreseen.passes, reason,
        )

    def interval(self, features: Sequence[float]) -> tuple[float, float, float]:
        """Low, middle and high of the logarithm of seconds over what was foreseen, calibrated."""
        low, middle, high = self._raw(features)
        margin = self._calibration.margin()
        low, high = low - margin, high + margin
        middle = min(max(middle, low), high) if low <= high else (low + high) / 2
        return min(low, middle), middle, max(high, middle)

    def learn(self, outcome: Outcome) -> None:
        """How it really went."""
        low, _, high = self._raw(outcome.features)
        self._learnt += 1
        self._calibration.learn(calibration.score(math.log(outcome.seconds / outcome.foreseen), low, high))

    def _raw(self, features: Sequence[float]) -> tuple[float, float, float]:
        low, middle, high = (self._heads[name](features) for name in HEADS)
        return min(low, middle), middle, max(high, middle)

    def _reason(self, question: Question, foreseen: Foreseen, features: Sequence[float]) -> str:
        if not foreseen.converges:
            return f"the source is written to faster than it can be moved within a downtime of {question.limits.ceiling if question.limits else 0:g} s; give it more, or a faster link"
        if not self._calibration.known:
            return "too few moves were made to know how far they are from what is reckoned"
        for name, value, (least, most) in zip(FEATURES, features, self._ranges, strict=True):
            slack = SLACK * (most - least) + 1e-9
            if least - slack <= value <= most + slack:
                continue
            if name not in OF_THE_MACHINE:
                return f"nothing like it was trained on: {name} is {value:.3g} and was between {least:.3g} and {most:.3g}"
            if self._learnt < calibration.LEAST:
                return f"no machine like this was trained on ({name} is {value:.3g} and was between {least:.3g} and {most:.3g}); {calibration.LEAST} moves in the history make up for it"
        return ""

    @classmethod
    def load(cls, path: Path | None = None, *, passed: bool = False) -> "Predictor":
        """From a file, or the model that comes along. Raises ModelError."""
        try:
            text = path.read_text() if path else (resources.files(__package__) / "models/prediction.json").read_text()
            told = json.loads(text)
            if told["form"] != FORM or tuple(told["features"]) != FEATURES:
                raise ModelError(f"prediction: the model {path or ''} is of another version; train it again (python -m tools.train_prediction)")
            part = told["after_first" if passed else "before"]
            heads = {name: Trees.from_json(part["heads"][name], len(FEATURES)) for name in HEADS}
            ranges = [(float(least), float(most)) for least, most in part["ranges"]]
            if len(ranges) != len(FEATURES):
                raise ValueError
            return cls(heads, ranges, [float(one) for one in part["scores"]], passed=passed)
        except ModelError:
            raise
        except OSError as error:
            raise ModelError(f"prediction: the model {path or ''} cannot be read: {error.strerror or error}") from None
        except (KeyError, TypeError, ValueError):
            raise ModelError(f"prediction: the model {path or ''} is damaged; train it again (python -m tools.train_prediction)") from None


def streams_for(link: Link, foreseen: Foreseen) -> int:
    """As many as bring what the slower of link and encoders gives: sealing is what one stream's thread can do."""
    rate = min(link.bandwidth, foreseen.wire_bytes / max(foreseen.seconds, 1e-3))
    return min(STREAMS_MOST, max(1, math.ceil(rate / START_SHIP) + 1))


def busy() -> float:
    """Processes that wanted to run in the last minute, a processor."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


class History:
    """Outcomes in a file, one JSON object a line. Of two processes that add at once, one may be forgotten."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Outcome]:
        """In their order; a last line that a crash cut short is left out. Raises ModelError."""
        try:
            with open(self._path, "rb") as file:
                text = file.read(HISTORY_BYTES_MOST + 1)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ModelError(f"history {self._path}: {error.strerror or error}") from None
        if len(text) > HISTORY_BYTES_MOST:
            raise ModelError(f"history {self._path}: more than {HISTORY_BYTES_MOST} bytes; it is no history, give another file")
        lines = text.split(b"\n")
        return [self._outcome(line, number) for number, line in enumerate(lines[:-1], 1)][-HISTORY_MOST:]

    def _outcome(self, line: bytes, number: int) -> Outcome:
        try:
            told = json.loads(line)
            outcome = Outcome(tuple(float(one) for one in told["features"]), float(told["foreseen"]), float(told["seconds"]))
        except (KeyError, TypeError, ValueError):
            outcome = None
        if outcome is None or len(outcome.features) != len(FEATURES) or not all(map(math.isfinite, outcome.features)) or not (0 < outcome.foreseen < math.inf and 0 < outcome.seconds < math.inf):
            raise ModelError(f"history {self._path}: line {number} is no outcome of this version; move the file away")
        return outcome

    def add(self, outcome: Outcome) -> None:
        """Append it; beyond `HISTORY_MOST` the oldest goes. Raises ModelError."""
        kept = [*self.read(), outcome][-HISTORY_MOST:]
        lines = [json.dumps({"features": [round(one, 6) for one in each.features], "foreseen": each.foreseen, "seconds": each.seconds}) for each in kept]
        try:
            partial = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            partial.write_text("".join(f"{line}\n" for line in lines))
            os.replace(partial, self._path)
        except OSError as error:
            raise ModelError(f"history {self._path}: {error.strerror or error}") from None
