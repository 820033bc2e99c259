"""Functions as small workloads: which instances to keep loaded, for how long, and which to load before the next call. Pure; times in ms.

An instance of a function is named by its *level*: how many others of the function were busy when it became idle. A call takes the lowest idle level, so each level has idle times of
its own, and a function that is called by twenty at once keeps twenty only if that comes again soon. An instance is a workload of the scheduler under the name `function/level`.

Three policies decide from the idle times seen so far: `FixedKeepAlive`, `HybridHistogram` (both published, peers here) and `ExpectedValue` (ours).
"""

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .rank import BEST, View
from .reasons import Ints

Floats = npt.NDArray[np.float64]

MINUTE_MS = 60_000

KEEP_ALIVE_MS = 10 * MINUTE_MS
"""What large providers were measured to keep idle instances, whatever the function."""

MAX_INSTANCES = 100_000
"""Instances that one pool knows, loaded or not; a call that needs more is refused."""

Key = tuple[str, int]
"""Function and level."""

Windows = tuple[tuple[int, int], ...]
"""When to be loaded, (from, until) in ms since the instance became idle; in order, apart."""


@dataclass(frozen=True, slots=True)
class Function:
    """`cold_ms`: what a start takes when nothing is loaded, from measured load times (`cold_ms_of`)."""

    name: str
    memory_bytes: int
    cold_ms: int

    def __post_init__(self) -> None:
        if self.memory_bytes <= 0 or self.cold_ms <= 0:
            raise ValueError(f"function {self.name}: memory_bytes and cold_ms must be above 0; give what was measured")


def cold_ms_of(load_times_ms: Sequence[float]) -> int:
    """The cost of a cold start from measured load times: their mean, as it is a sum of waits that is saved."""
    if not load_times_ms or min(load_times_ms) < 0:
        raise ValueError("load times: give one or more, none below 0")
    return max(1, round(sum(load_times_ms) / len(load_times_ms)))


class Policy(Protocol):
    """Learns idle times and says when to be loaded."""

    def observe(self, key: Key, idle_ms: int) -> None:
        """An instance was idle that long until a call took it."""

    def windows(self, key: Key, function: Function) -> Windows:
        """For an instance that becomes idle now."""

    def worth(self, key: Key, function: Function, idle_ms: int) -> float:
        """What a byte that stays loaded is worth now; the least is unloaded first where memory is short."""


class FixedKeepAlive:
    """Every instance is kept so long after its call, and never loaded ahead."""

    def __init__(self, keep_ms: int = KEEP_ALIVE_MS) -> None:
        self.keep_ms = keep_ms

    def observe(self, key: Key, idle_ms: int) -> None:
        """Nothing is learned."""

    def windows(self, key: Key, function: Function) -> Windows:
        """One, the same for all."""
        return ((0, self.keep_ms),)

    def worth(self, key: Key, function: Function, idle_ms: int) -> float:
        """The longest idle goes first."""
        return -float(idle_ms)


class HybridHistogram:
    """The hybrid histogram policy as published (Shahrad et al., USENIX ATC 2020), with the mean of the latest idle times where the paper forecasts by ARIMA.

    One-minute bins up to four hours. Loaded from the 5th percentile (rounded down, less 10 %) to the 99th (rounded up, plus 10 %). Where the bins are too even (coefficient of
    variation of their counts below 2) or too few idle times are known: loaded for all four hours. Where most lie beyond four hours: around the forecast, 15 % either way.
    """

    BINS = 240
    HEAD, TAIL = 0.05, 0.99
    MARGIN, FORECAST_MARGIN = 0.10, 0.15
    VARIATION = 2.0
    FORECAST_OVER = 10

    def __init__(self) -> None:
        self._counts: dict[Key, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
        self._beyond: dict[Key, int] = {}
        self._latest: dict[Key, deque[int]] = {}

    def observe(self, key: Key, idle_ms: int) -> None:
        """Into its bin."""
        counts = self._counts.setdefault(key, np.zeros(self.BINS, np.int64))
        self._latest.setdefault(key, deque(maxlen=self.FORECAST_OVER)).append(idle_ms)
        if idle_ms // MINUTE_MS < self.BINS:
            counts[idle_ms // MINUTE_MS] += 1
        else:
            self._beyond[key] = self._beyond.get(key, 0) + 1

    def windows(self, key: Key, function: Function) -> Windows:
        """Head to tail of the histogram."""
        whole = ((0, self.BINS * MINUTE_MS),)
        counts, beyond = self._counts.get(key), self._beyond.get(key, 0)
        if counts is None:
            return whole
        total = int(counts.sum())
        if beyond > total:
            forecast = sum(self._latest[key]) / len(self._latest[key])
            return ((int(forecast * (1 - self.FORECAST_MARGIN)), int(forecast * (1 + self.FORECAST_MARGIN))),)
        if not total or counts.std() / counts.mean() < self.VARIATION:
            return whole
        running = np.cumsum(counts)
        head = int(np.searchsorted(running, self.HEAD * total)) * MINUTE_MS
        tail = (int(np.searchsorted(running, self.TAIL * total)) + 1) * MINUTE_MS
        start = int(head * (1 - self.MARGIN))
        return ((start, start + int((tail - start) * (1 + self.MARGIN))),)

    def worth(self, key: Key, function: Function, idle_ms: int) -> float:
        """The longest idle goes first: the paper says nothing of a full memory."""
        return -float(idle_ms)


LEVELS = 8
"""The bins of idle time are halved so many times: 256 of them, each 4.6 % longer than the one before."""

FIRST_BIN_MS = 1_000

LONGEST_MS = 24 * 60 * MINUTE_MS
"""Idle times beyond a day count as never: nothing is kept so long."""

PRIOR_WEIGHT = 0.5
"""What all functions do counts as so many idle times of one, times the depth of the halving: a few idle times tell the order of magnitude, the single bin needs many."""

PRIOR_EACH = 8
"""Idle times that one instance gives to what is known of all: else the busiest function would speak for the rest."""

HALVE_AT = 2_048
"""Idle times of one instance after which all before count half: what it does now says more."""

GAP_CALLS = 2.0
"""A gap between windows is charged as if so many calls more had been seen in it: few idle times leave gaps by chance, where the next one may fall."""

RELEARN_SHARE = 8
"""Windows are worked out anew when the idle times known have grown by one in so many."""

_BINS = 1 << LEVELS
_EDGES = np.concatenate([[0], np.round(np.geomspace(FIRST_BIN_MS, LONGEST_MS, _BINS)).astype(np.int64)])


@dataclass(slots=True)
class _Known:
    counts: Floats = field(default_factory=lambda: np.zeros(_BINS + 1))
    seen: int = 0
    worked_out: int = -1
    windows: Windows = ()
    chances: Floats = field(default_factory=lambda: np.full(_BINS + 1, 1.0 / (_BINS + 1)))


class ExpectedValue:
    """Loaded where that is worth more than it costs: P(call now) x wait saved against memory x time, over all later times at once.

    From the idle times of the instance, and of all instances where few are known, follows the chance that a call comes in each bin of time. A backward pass over the bins then gives
    the best windows, the load ahead of a window included in its cost. `wait_worth`: bytes that one ms of waiting is worth holding for one ms; it is the only knob.
    """

    def __init__(self, wait_worth: float) -> None:
        if not wait_worth > 0:
            raise ValueError(f"wait_worth: {wait_worth} must be above 0; give the bytes that a ms of waiting is worth holding for a ms")
        self.wait_worth = wait_worth
        self._known: dict[Key, _Known] = {}
        self._all = np.full(_BINS + 1, 1.0 / (_BINS + 1))
        """Before anything is seen: every bin alike, that is every order of magnitude of time."""

    def observe(self, key: Key, idle_ms: int) -> None:
        """Into its bin; the first few also into what is known of all."""
        known = self._known.setdefault(key, _Known())
        at = min(int(np.searchsorted(_EDGES, idle_ms, side="right")) - 1, _BINS)
        known.counts[at] += 1
        known.seen += 1
        if known.seen <= PRIOR_EACH:
            self._all[at] += 1
        elif known.seen >= HALVE_AT:
            known.counts /= 2
            known.seen //= 2
            known.worked_out = -1

    def chances(self, key: Key) -> Floats:
        """[bin, and beyond the last] the chance that the idle time lies there.

        A Polya tree: each halving of the range is weighed between what the instance did and what the level below did, level 0 between itself and all functions.
        """
        below: Floats = self._all / self._all.sum() if key[1] == 0 else self._known[key[0], key[1] - 1].chances if (key[0], key[1] - 1) in self._known else self.chances((key[0], 0))
        known = self._known.get(key)
        return below if known is None else blend(known.counts, below)

    def windows(self, key: Key, function: Function) -> Windows:
        """The best ones by what is known."""
        known = self._known.setdefault(key, _Known())
        if known.worked_out < 0 or (known.seen - known.worked_out) * RELEARN_SHARE >= max(1, known.worked_out):
            known.chances = self.chances(key)
            known.windows = best_windows(known.chances, function, self.wait_worth, GAP_CALLS / (known.seen + 1))
            known.worked_out = known.seen
        return known.windows

    def worth(self, key: Key, function: Function, idle_ms: int) -> float:
        """The best ratio of wait saved to byte x ms held, over all times up to which it could stay, given that no call came before."""
        at = min(int(np.searchsorted(_EDGES, idle_ms, side="right")) - 1, _BINS - 1)
        chances = self.chances(key)[at:]
        called = np.cumsum(chances[:-1])
        held = np.cumsum(np.diff(_EDGES[at:]) * (chances.sum() - called + chances[:-1] / 2))
        return float((called / np.maximum(held, 1e-9)).max()) * function.cold_ms / function.memory_bytes


def blend(counts: Floats, prior: Floats) -> Floats:
    """Chances from counts ([bins, and beyond]) and a prior of the same shape; both are halved again and again, so few counts are spread wide and many stay where they are."""
    beyond = (counts[-1] + PRIOR_WEIGHT * prior[-1]) / (counts.sum() + PRIOR_WEIGHT)
    chances, inner = np.array([1.0 - beyond]), np.maximum(prior[:-1], 1e-12)
    for depth in range(int(np.log2(len(inner)))):
        seen, expected = (values.reshape(2 << depth, -1).sum(1).reshape(-1, 2) for values in (counts[:-1], inner))
        weight = PRIOR_WEIGHT * (depth + 2)
        share = (seen + weight * expected / expected.sum(1, keepdims=True)) / (seen.sum(1, keepdims=True) + weight)
        chances = (chances[:, None] * share).reshape(-1)
    return np.append(chances, beyond)


def best_windows(chances: Floats, function: Function, wait_worth: float, doubt: float = 0.0) -> Windows:
    """The windows with the highest expected value for the chances of each bin: a backward pass over two states, loaded and not.

    `doubt`: the chance of a call that a gap between windows is charged with, beside what the bins say.
    """
    saved = (chances[:_BINS] * function.cold_ms * wait_worth).tolist()
    after = (1.0 - np.cumsum(chances[:_BINS])).clip(0)
    widths = np.diff(_EDGES)
    held = (function.memory_bytes * widths * (after + chances[:_BINS] / 2)).tolist()
    load = (function.memory_bytes * function.cold_ms * np.concatenate([[1.0], after[:-1]]) + doubt * function.cold_ms * wait_worth).tolist()
    stay, enter = [False] * _BINS, [False] * _BINS
    loaded = empty = 0.0
    for at in range(_BINS - 1, -1, -1):
        keep = saved[at] - held[at] + loaded
        stay[at] = keep > empty
        enter[at] = keep - load[at] > empty
        loaded, empty = max(keep, empty), max(keep - load[at], empty)
    windows: list[tuple[int, int]] = []
    on = True
    for at in range(_BINS):
        on = stay[at] if on else enter[at]
        if on:
            start, end = int(_EDGES[at]), int(_EDGES[at + 1])
            if windows and windows[-1][1] == start:
                windows[-1] = (windows[-1][0], end)
            else:
                windows.append((start, end))
    return tuple(windows)


@dataclass(frozen=True, slots=True)
class Action:
    """Load or unload an instance now; `id` is its name as a workload."""

    load: bool
    id: str
    function: str


@dataclass(frozen=True, slots=True)
class Call:
    """How a call is served: by which instance, and after which wait. `cold`: it was not ready, though it may have been loading."""

    id: str
    level: int
    cold: bool
    wait_ms: int


@dataclass(slots=True)
class _Idle:
    since_ms: int
    windows: Windows
    loaded: bool
    loaded_ms: int
    ready_ms: int
    turn: int
    next_window: int = 0


@dataclass(slots=True)
class Totals:
    """What a pool has done: calls, cold ones, ms waited, and byte x ms loaded without a call to serve."""

    calls: int = 0
    cold: int = 0
    waited_ms: int = 0
    idle_byte_ms: int = 0


class WarmPool:
    """The instances of all functions. Every method takes the time now, which never goes back. `capacity_bytes`: what idle instances may hold in all."""

    def __init__(self, functions: Mapping[str, Function], policy: Policy, capacity_bytes: int | None = None) -> None:
        self.functions, self.policy, self.capacity_bytes = functions, policy, capacity_bytes
        self.totals = Totals()
        self.idle_bytes = 0
        self._busy: dict[str, int] = {}
        self._idle: dict[Key, _Idle] = {}
        self._due: list[tuple[int, int, Key]] = []
        self._turn = 0
        self._warm: dict[Key, None] = {}

    def call(self, function: str, now_ms: int) -> Call:
        """A call comes. Raises KeyError for a function that is not known, OverflowError where the pool is full."""
        about = self.functions[function]
        level = self._busy.get(function, 0)
        key = (function, level)
        if key not in self._idle and len(self._idle) + sum(self._busy.values()) >= MAX_INSTANCES:
            raise OverflowError(f"{MAX_INSTANCES} instances are known; end some calls first")
        idle = self._idle.pop(key, None)
        wait = about.cold_ms
        if idle is not None:
            self.policy.observe(key, now_ms - idle.since_ms)
            if idle.loaded:
                wait = max(0, idle.ready_ms - now_ms)
                self._forget(key, idle, now_ms)
        self._busy[function] = level + 1
        self.totals.calls += 1
        self.totals.cold += wait > 0
        self.totals.waited_ms += wait
        return Call(_id(key), level, wait > 0, wait)

    def done(self, function: str, now_ms: int) -> tuple[Action, ...]:
        """A call has ended; its instance is idle now."""
        level = self._busy.get(function, 0) - 1
        if level < 0:
            raise ValueError(f"{function}: no call is under way")
        self._busy[function] = level
        key = (function, level)
        windows = self.policy.windows(key, self.functions[function])
        self._turn += 1
        self._idle[key] = _Idle(now_ms, windows, True, now_ms, now_ms, self._turn)
        self._warm[key] = None
        self.idle_bytes += self.functions[function].memory_bytes
        if not windows or windows[0][0] > self.functions[function].cold_ms:
            return (self._unload(key, now_ms), *self._shrink(now_ms))
        self._schedule(key, now_ms + windows[0][1])
        return self._shrink(now_ms)

    def next_ms(self) -> int | None:
        """When `tick` has something to do next."""
        while self._due and not self._current(self._due[0]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def tick(self, now_ms: int) -> tuple[Action, ...]:
        """What is to be loaded or unloaded by now."""
        actions: list[Action] = []
        while (due := self.next_ms()) is not None and due <= now_ms:
            at, _, key = heapq.heappop(self._due)
            idle = self._idle[key]
            if idle.loaded:
                actions.append(self._unload(key, at))
            else:
                idle.loaded, idle.loaded_ms, idle.ready_ms = True, at, at + self.functions[key[0]].cold_ms
                self._warm[key] = None
                self.idle_bytes += self.functions[key[0]].memory_bytes
                actions.append(Action(True, _id(key), key[0]))
                self._schedule(key, idle.since_ms + idle.windows[idle.next_window][1])
                actions += self._shrink(at)
        return tuple(actions)

    def settle(self, now_ms: int) -> None:
        """Count what idle instances hold up to now, as if they were unloaded and loaded again."""
        for key in self._warm:
            idle = self._idle[key]
            self.totals.idle_byte_ms += (now_ms - idle.loaded_ms) * self.functions[key[0]].memory_bytes
            idle.loaded_ms = now_ms

    def _unload(self, key: Key, now_ms: int) -> Action:
        """Unload one, and plan its next window, loaded ahead by the time that a load takes."""
        idle, cold = self._idle[key], self.functions[key[0]].cold_ms
        self._forget(key, idle, now_ms)
        idle.loaded, idle.turn = False, 0
        while idle.next_window < len(idle.windows) and idle.since_ms + idle.windows[idle.next_window][0] - cold <= now_ms:
            idle.next_window += 1
        if idle.next_window < len(idle.windows):
            self._schedule(key, idle.since_ms + idle.windows[idle.next_window][0] - cold)
        return Action(False, _id(key), key[0])

    def _forget(self, key: Key, idle: _Idle, now_ms: int) -> None:
        memory = self.functions[key[0]].memory_bytes
        self.totals.idle_byte_ms += (now_ms - idle.loaded_ms) * memory
        self.idle_bytes -= memory
        del self._warm[key]

    def _shrink(self, now_ms: int) -> tuple[Action, ...]:
        """Unload what is worth least until the capacity holds."""
        actions = []
        while self.capacity_bytes is not None and self.idle_bytes > self.capacity_bytes:
            key = min(self._warm, key=lambda key: self.policy.worth(key, self.functions[key[0]], now_ms - self._idle[key].since_ms))
            actions.append(self._unload(key, now_ms))
        return tuple(actions)

    def _schedule(self, key: Key, at_ms: int) -> None:
        self._turn += 1
        self._idle[key].turn = self._turn
        heapq.heappush(self._due, (at_ms, self._turn, key))

    def _current(self, due: tuple[int, int, Key]) -> bool:
        idle = self._idle.get(due[2])
        return idle is not None and idle.turn == due[1]


def _id(key: Key) -> str:
    return f"{key[0]}/{key[1]}"


class WarmFirst:
    """The policy `warm` for functions: a node that holds the image and runs an instance of the same shape has its libraries in the page cache."""

    def score(self, view: View) -> Ints | None:
        """100 with instance, 60 with the image only, 0 elsewhere."""
        state, klass = view.state, view.klass
        row = state.attributes.images.get(klass.shape.image)
        held = np.zeros(state.size, np.bool_) if row is None else state.attributes.has_image[row]
        there = np.bincount(state.w_node[(state.w_class == klass.id) & (state.w_node >= 0)], minlength=state.size) > 0
        return np.where(there, BEST, np.where(held, 60, 0)).astype(np.int64)
