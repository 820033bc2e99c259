"""Functions: how long an idle instance is worth keeping, and where the next call finds one warm.

An idle instance is a small workload that holds memory. Keeping it for a time `t` is worth the cold starts it saves, P(next call within t) times the cost of one,
less the memory it holds meanwhile. Both come from what was measured: the load times of the image, the gaps between calls.
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .model import Workload
from .place import Pending, Placed, Scheduler
from .rank import BEST, View
from .reasons import Ints
from .units import MEMORY, Invalid

MAX_GAPS = 256
"""Gaps between calls that are remembered per function: enough for the 95th percentile, forgotten when the pattern changes."""

MAX_FUNCTIONS = 65_536
"""Functions of one pool."""

GIB_MS = (1 << 30) * 3_600_000
"""Byte-milliseconds in one GiB-hour."""


def worth(gaps_ms: Sequence[int], keep_ms: int, cold_cost: float, memory: int, price_per_gib_hour: float) -> float:
    """What keeping an instance `keep_ms` is worth: saved cold starts less held memory, per call, in the unit of the prices. `gaps_ms` ascending."""
    if not gaps_ms:
        return 0.0
    within = bisect_right(gaps_ms, keep_ms)
    held = sum(gaps_ms[:within]) + keep_ms * (len(gaps_ms) - within)
    return (within * cold_cost - held * memory * price_per_gib_hour / GIB_MS) / len(gaps_ms)


def keep_alive_ms(gaps_ms: Sequence[int], cold_cost: float, memory: int, price_per_gib_hour: float) -> int:
    """The time that is worth most; 0: let it go at once. Only a gap that was seen can be best, as between two of them memory is held for nothing."""
    ordered = sorted(gaps_ms)
    best, most, held = 0, 0.0, 0
    for at, gap in enumerate(ordered):
        held += gap
        value = (at + 1) * cold_cost - (held + gap * (len(ordered) - at - 1)) * memory * price_per_gib_hour / GIB_MS
        if value > most:
            best, most = gap, value
    return best


@dataclass(slots=True)
class _Known:
    cold_ms: int = 0
    last_call_ms: int | None = None
    recent: "deque[int]" = field(default_factory=deque)
    ordered: list[int] = field(default_factory=list)
    idle: "dict[str, int]" = field(default_factory=dict)
    """Instance to when it became idle, the latest last."""
    busy: set[str] = field(default_factory=set)
    started: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """Where a call runs. `cold`: a new instance had to start, which takes `wait_ms`."""

    instance: str
    node: str
    cold: bool
    wait_ms: int


class FunctionPool:
    """Instances of functions on a scheduler. `cold_cost_per_ms`: what a millisecond of waiting costs, in the unit of the memory price."""

    def __init__(self, scheduler: Scheduler, cold_cost_per_ms: float = 1.0, price_per_gib_hour: float = 1_000.0) -> None:
        self.scheduler, self.cold_cost_per_ms, self.price = scheduler, cold_cost_per_ms, price_per_gib_hour
        self.known: dict[str, _Known] = {}

    def learn_cold_start(self, function: str, load_ms: int) -> None:
        """What loading took when it was measured; a slow average, as loads vary."""
        mine = self._of(function)
        mine.cold_ms = load_ms if not mine.cold_ms else (7 * mine.cold_ms + load_ms) // 8

    def _of(self, function: str) -> _Known:
        if function not in self.known and len(self.known) >= MAX_FUNCTIONS:
            raise Invalid("function", f"more than {MAX_FUNCTIONS} functions", "remove some, or use another pool")
        return self.known.setdefault(function, _Known())

    def call(self, function: Workload, now_ms: int) -> Call | Pending:
        """Run a call of a function (`function.id` names it): on the instance that was idle the shortest, else on a new one."""
        mine = self._of(function.id)
        if mine.last_call_ms is not None:
            gap = max(0, now_ms - mine.last_call_ms)
            insort(mine.ordered, gap)
            mine.recent.append(gap)
            if len(mine.recent) > MAX_GAPS:
                mine.ordered.remove(mine.recent.popleft())
        mine.last_call_ms = now_ms
        while mine.idle:
            instance, _ = mine.idle.popitem()
            seat = self.scheduler.state.seat(instance)
            if seat is not None:
                mine.busy.add(instance)
                return Call(instance, self.scheduler.state.nodes[seat.node].name, False, 0)
        instance = f"{function.id}#{mine.started}"
        answer = self.scheduler.reserve(replace(function, id=instance), now_ms)
        if not isinstance(answer, Placed):
            return answer
        mine.started += 1
        mine.busy.add(instance)
        return Call(instance, answer.node, True, mine.cold_ms)

    def done(self, function: str, instance: str, now_ms: int) -> None:
        """The call has ended; its instance is idle."""
        mine = self._of(function)
        if instance in mine.busy:
            mine.busy.discard(instance)
            mine.idle[instance] = now_ms

    def keep_ms(self, function: Workload) -> int:
        """How long its idle instances are kept."""
        mine = self._of(function.id)
        return keep_alive_ms(mine.ordered, mine.cold_ms * self.cold_cost_per_ms, function.shape.request_map.get(MEMORY, 0), self.price)

    def expire(self, functions: Sequence[Workload], now_ms: int) -> list[str]:
        """Release instances that are worth their memory no longer; gives their ids."""
        gone = []
        for function in functions:
            mine, keep = self._of(function.id), self.keep_ms(function)
            for instance, since in list(mine.idle.items()):
                if now_ms - since > keep:
                    del mine.idle[instance]
                    self.scheduler.release(instance)
                    gone.append(instance)
        return gone


class WarmFirst:
    """The policy `warm` for functions: a node that holds the image and runs an instance of the same shape has its libraries in the page cache."""

    def score(self, view: View) -> Ints | None:
        """100 with instance, 60 with the image only, 0 elsewhere."""
        state, klass = view.state, view.klass
        row = state.attributes.images.get(klass.shape.image)
        held = np.zeros(state.size, np.bool_) if row is None else state.attributes.has_image[row]
        there = np.bincount(state.w_node[(state.w_class == klass.id) & (state.w_node >= 0)], minlength=state.size) > 0
        return np.where(there, BEST, np.where(held, 60, 0)).astype(np.int64)
