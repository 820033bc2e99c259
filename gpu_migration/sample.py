"""A quick look at a source: what its pages are, how far they shrink, how fast they are written to, and what this machine makes of hashing them. Reads a bounded part of it."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from .codecs import BY_NAME
from .layout import EXTENT, PAGE
from .sources import FileSource

LOOKED_AT = 256
"""Extents of which pages are read: a share is then known to three hundredths."""
PAGES_EACH = 4
"""Pages of each, spread over it: neighbours are alike, extents less so."""
WATCHED = 64
"""Extents that are hashed whole, again and again, to see which were written to: 64 MiB, some 30 ms each time."""
WATCH_S = (0.1, 0.4)
"""After how long they are looked at again, seconds: two points tell a few that are always written to from all that are now and then. The second is four times the first, which `fit` relies on."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen. Shares are of 0 to 1."""

    length: int
    data: float
    """Share of the extents that are not holes."""
    plain: float
    """Share of those extents' bytes that are neither zero nor one word repeated."""
    guess: float
    """Ratio to which the quickest coder brings the plain pages."""
    strong: float
    """Ratio of `zstd-1`."""
    hot: float
    """Share of the extents that are written to at all; 0 where none was seen to be, or nobody looked."""
    rate: float
    """How often one of those is written to, a second."""
    hashing: float
    """Bytes a second that one thread reads and hashes, now."""


def take(source: FileSource, *, changing: bool, seed: int = 0, wait: Callable[[float], None] = time.sleep) -> Sample:
    """Look at it; with `changing` for as long as `WATCH_S` says, else once. Raises SourceError."""
    draw = random.Random(seed)
    chosen = sorted(draw.sample(range(source.extents), min(LOOKED_AT, source.extents)))
    data = [index for index in chosen if not source.hole(index)]
    plain: list[bytes] = []
    seen = 0
    for index in data:
        pages = min(EXTENT, source.length - index * EXTENT) // PAGE
        for page in draw.sample(range(pages), min(PAGES_EACH, pages)):
            found = source.page(index * (EXTENT // PAGE) + page) or b""
            seen += 1
            words = np.frombuffer(found, np.uint64) if len(found) == PAGE else None
            if words is None or (words != words[0]).any():
                plain.append(found)
    joined = b"".join(plain)
    watched = draw.sample(data, min(WATCHED, len(data)))
    digests, hashing = _digests(source, watched)
    hot = rate = 0.0
    if changing and watched:
        changed, waited = [], 0.0
        for until in WATCH_S:
            wait(until - waited)
            waited = until
            now, _ = _digests(source, watched)
            changed.append(sum(one != other for one, other in zip(digests, now, strict=True)) / len(watched))
        hot, rate = fit(changed[0], changed[1])
        hot *= len(data) / max(1, len(chosen))
    return Sample(
        source.length, len(data) / max(1, len(chosen)), len(plain) / max(1, seen), _ratio("lz4-fast", joined), _ratio("zstd-1", joined), hot, rate, hashing,
    )


def fit(first: float, second: float) -> tuple[float, float]:
    """Share that is written to at all, and how often a second, from the shares that had been after each of `WATCH_S`.

    One that is written to `rate` times a second at random has been after t with 1 - exp(-rate t). With x = exp(-rate t) for the first, second / first is 1 + x + x^2 + x^3."""
    if second <= 0.0:
        return 0.0, 0.0
    ratio = second / first if first else math.inf
    if ratio >= 4.0:  # in proportion to the time: there is no end to be seen
        return 1.0, -math.log1p(-min(second, 0.999)) / WATCH_S[1]
    low, high = 0.0, 1.0
    for _ in range(50):
        x = (low + high) / 2
        low, high = (x, high) if 1 + x + x * x + x * x * x < ratio else (low, x)
    x = max(high, 1e-4)  # all of it within the first look: faster cannot be told
    return min(1.0, second / (1 - x**4)) if x < 1 else 1.0, -math.log(min(x, 1 - 1e-6)) / WATCH_S[0]


def _digests(source: FileSource, which: list[int]) -> tuple[list[bytes], float]:
    """Hashes, and bytes a second of processor time."""
    buffer, began, size = memoryview(bytearray(EXTENT)), time.thread_time(), 0
    digests = []
    for index in which:
        view = source.read(index, buffer)
        size += len(view)
        digests.append(blake3(view).digest())
    return digests, size / max(1e-6, time.thread_time() - began) if size else 1e9


def _ratio(coder: str, data: bytes) -> float:
    return max(1.0, len(data) / max(1, len(BY_NAME[coder].encode(data)))) if data else 1.0
