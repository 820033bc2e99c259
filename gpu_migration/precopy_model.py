"""What a move would take, by calculation: the passes that `convergence` would decide on, over a source that changes as its sample says. Pure; the limits are those of the real thing."""

import math
from dataclasses import dataclass, replace

from .choice import Model
from .convergence import Control, Limits, Next, Pass
from .layout import EXTENT
from .sample import Sample

COMMIT_S = 0.05
"""Seconds from the last extent to the destination's answer, and of the first handshake, on one machine."""
PASSES_MOST = 400
"""Passes that are followed: a move that takes more is one that does not converge."""


@dataclass(frozen=True, slots=True)
class Link:
    """Between the two ends. `bandwidth` in bytes a second; `threads` are the encoders here."""

    bandwidth: float
    threads: int


@dataclass(frozen=True, slots=True)
class Foreseen:
    """Seconds and bytes."""

    seconds: float
    first: float
    """Seconds of the first pass."""
    downtime: float
    wire_bytes: float
    passes: int
    converges: bool
    ratio: float
    """Length over the bytes of the first pass."""


def foresee(sample: Sample, link: Link, limits: Limits | None = None, first_took: float = 0.0) -> Foreseen:
    """The whole move. Without `limits` the source stands still. `first_took`: seconds that the first pass really took; what follows is then reckoned at that pace.

    A source of which h extents are written to at random, each r times a second, has h (1 - exp(-r t)) that differ after t seconds."""
    extents = sample.length / EXTENT
    data = extents * sample.data
    plain = EXTENT * sample.plain
    model = Model(link.threads, limit=link.bandwidth)
    model.wire.value = max(model.wire.value, link.bandwidth)
    name = min(model.names, key=lambda one: model.cost(one, EXTENT, int(plain), sample.guess))
    each = model.cost(name, EXTENT, int(plain), sample.guess)
    out = plain / (1 + model.factors[name].value * max(0.0, sample.guess - 1))
    first = data * each
    pace = first_took / first if first_took and first else 1.0
    look = data * EXTENT / (sample.hashing * link.threads)
    wire, first = data * out, first * pace
    ratio = sample.length / max(wire, 1.0)
    if limits is None:
        return Foreseen(first + COMMIT_S, first, 0.0, wire, 1, True, ratio)
    control, seconds, passing, remaining = Control(replace(limits, passes=min(limits.passes, PASSES_MOST))), 0.0, first, data
    kind = plain  # of the first pass, what is not zero counts; of later ones all, as the real thing has it
    while True:
        seconds += passing + look
        # What is written during the look itself is found by it, or next time.
        sent, remaining = remaining * kind, _written(sample, extents, passing + look)
        kind = float(EXTENT)
        verdict = control.after(Pass(sent, max(passing, 1e-6), passing + look, remaining * EXTENT, look))
        if verdict.next is not Next.PASS:
            break
        passing = remaining * each * pace
        wire += remaining * out
    last = look + remaining * each * pace
    return Foreseen(seconds + last + COMMIT_S, first, last + COMMIT_S, wire + remaining * out, control.passes + 1, verdict.next is Next.SWITCH, ratio)


def _written(sample: Sample, extents: float, seconds: float) -> float:
    return extents * sample.hot * -math.expm1(-sample.rate * seconds)
