"""The warm pool: what each policy keeps loaded, what a call finds, and that the best windows are the best."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler import Placed, Ranker, Scheduler, State
from hub.scheduler import functions as module
from hub.scheduler import node as parse_node
from hub.scheduler import workload as parse_workload
from hub.scheduler.functions import MINUTE_MS, ExpectedValue, FixedKeepAlive, Function, HybridHistogram, Policy, WarmFirst, WarmPool, best_windows, cold_ms_of
from tests.unit.scheduler.fleet_builder import Fleet, node
from tools.bench import functions_warm

F = Function("f", 100_000_000, 1_000)
HOUR = 60 * MINUTE_MS


def pool_of(policy: Policy, capacity: int | None = None, *functions: Function) -> WarmPool:
    return WarmPool({each.name: each for each in functions or (F,)}, policy, capacity)


def test_a_fixed_keep_alive_serves_within_ten_minutes() -> None:
    pool = pool_of(FixedKeepAlive())
    assert pool.call("f", 0).wait_ms == 1_000
    pool.done("f", 5_000)
    assert not pool.call("f", 5_000 + 10 * MINUTE_MS - 1).cold
    pool.done("f", 700_000)
    assert pool.next_ms() == 700_000 + 10 * MINUTE_MS
    assert [(action.load, action.id) for action in pool.tick(700_000 + 10 * MINUTE_MS)] == [(False, "f/0")]
    assert pool.call("f", 700_000 + 10 * MINUTE_MS).cold
    assert pool.totals.idle_byte_ms == F.memory_bytes * (2 * 10 * MINUTE_MS - 1) and (pool.totals.calls, pool.totals.cold) == (3, 2)


def test_calls_at_once_take_an_instance_each() -> None:
    pool = pool_of(FixedKeepAlive())
    assert [pool.call("f", 0).id for _ in range(3)] == ["f/0", "f/1", "f/2"]
    for now in (1_000, 2_000, 3_000):
        pool.done("f", now)
    again = [pool.call("f", 4_000) for _ in range(4)]
    assert [call.cold for call in again] == [False, False, False, True]
    with pytest.raises(ValueError, match="no call is under way"):
        pool_of(FixedKeepAlive()).done("f", 0)


@pytest.mark.parametrize("policy", [HybridHistogram(), ExpectedValue(3e10)])
def test_a_timer_is_loaded_just_before_its_next_call(policy: Policy) -> None:
    pool = pool_of(policy)
    now = 0
    for _ in range(60):
        while (due := pool.next_ms()) is not None and due <= now:
            pool.tick(due)
        call = pool.call("f", now)
        pool.done("f", now + call.wait_ms + 10)
        now += HOUR
    assert not call.cold, "it has learned"
    start, end = next(window for window in policy.windows(("f", 0), F) if window[0] <= HOUR < window[1])
    assert 0.85 * HOUR < start <= HOUR < end < 1.2 * HOUR
    assert pool.tick(now - 1)[0].load, "loaded ahead"


def test_a_call_during_the_load_waits_for_the_rest_of_it() -> None:
    policy = ExpectedValue(1e12)
    for _ in range(50):
        policy.observe(("f", 0), HOUR)
    pool = pool_of(policy)
    pool.call("f", 0)
    pool.done("f", 1_000)
    pool.tick(1_000)
    due = pool.next_ms()
    while due is not None and not any(action.load for action in pool.tick(due)):
        due = pool.next_ms()
    assert due is not None
    call = pool.call("f", due + 400)
    assert call.cold and call.wait_ms == 600


def test_what_is_never_called_again_is_not_kept() -> None:
    policy = ExpectedValue(1e8)
    assert sum(end - start for start, end in policy.windows(("f", 0), F)) < 10 * MINUTE_MS
    cheap = Function("g", 1_000_000, 20_000)
    assert sum(end - start for start, end in policy.windows(("g", 0), cheap)) > sum(end - start for start, end in policy.windows(("f", 0), F)), "small and slow to load is kept longer"


def test_memory_that_is_short_goes_to_what_is_worth_most() -> None:
    often, seldom = Function("often", 100, 1_000), Function("seldom", 100, 1_000)
    policy = ExpectedValue(1e6)
    for _ in range(30):
        policy.observe(("often", 0), 2_000)
        policy.observe(("seldom", 0), 20 * HOUR)
    pool = pool_of(policy, 100, often, seldom)
    for name in ("often", "seldom"):
        pool.call(name, 0)
    pool.done("often", 1_000)
    assert [(action.load, action.id) for action in pool.done("seldom", 1_001)] == [(False, "seldom/0")]
    assert pool.idle_bytes == 100


def test_hybrid_histogram_as_published() -> None:
    policy = HybridHistogram()
    assert policy.windows(("f", 0), F) == ((0, 4 * HOUR),), "unknown: all of the range"
    for _ in range(100):
        policy.observe(("f", 0), 30 * MINUTE_MS + 5)
    assert policy.windows(("f", 0), F) == ((27 * MINUTE_MS, 27 * MINUTE_MS + int(4 * MINUTE_MS * 1.1)),)
    for _ in range(101):
        policy.observe(("f", 0), 10 * HOUR)
    assert policy.windows(("f", 0), F) == ((int(8.5 * HOUR), int(11.5 * HOUR)),), "most lie beyond: around the forecast"
    even = HybridHistogram()
    for minute in range(240):
        even.observe(("f", 0), minute * MINUTE_MS)
    assert even.windows(("f", 0), F) == ((0, 4 * HOUR),), "too even to tell"


def test_bad_input_is_one_error() -> None:
    with pytest.raises(ValueError, match="function f: memory_bytes and cold_ms must be above 0"):
        Function("f", 0, 1)
    with pytest.raises(ValueError, match="give one or more"):
        cold_ms_of([])
    with pytest.raises(ValueError, match="wait_worth"):
        ExpectedValue(0)
    with pytest.raises(KeyError):
        pool_of(FixedKeepAlive()).call("unknown", 0)
    assert cold_ms_of([100, 300]) == 200


def test_instances_are_workloads_of_the_scheduler() -> None:
    fleet, pool = Fleet(node("n1")), pool_of(ExpectedValue(1e12))
    instance = parse_workload({"id": "f/0", "kind": "function", "requests": {"cpu": "100m", "memory": F.memory_bytes}})
    assert isinstance(fleet.scheduler.reserve(instance, 0), Placed) and pool.call("f", 0).id == instance.id
    pool.done("f", 1_000)
    actions = [action for _ in range(9) if (due := pool.next_ms()) is not None for action in pool.tick(due)]
    assert actions and {action.id for action in actions} == {"f/0"}
    for action in actions:
        assert fleet.scheduler.reserve(instance, 0) if action.load else fleet.scheduler.release(action.id)


def test_functions_go_where_image_and_instances_are() -> None:
    state = State(seed=3)
    state.add_nodes([parse_node({"name": f"n{at}", "capacity": {"cpu": 8}, "images": ["f"] if at == 1 else []}) for at in range(3)])
    scheduler = Scheduler(state, Ranker({"warm": WarmFirst()}))
    for name in ("a", "b"):
        placed = scheduler.reserve(parse_workload({"id": name, "kind": "function", "requests": {"cpu": "100m"}, "image": "f"}), 0)
        assert isinstance(placed, Placed) and placed.node == "n1"


# against brute force


def value(windows: tuple[tuple[int, int], ...], chances: "np.ndarray[tuple[int], np.dtype[np.float64]]", edges: "np.ndarray[tuple[int], np.dtype[np.int64]]", about: Function, worth: float) -> float:
    """Expected worth of some windows, bin by bin, from the definition."""
    total, on = 0.0, True
    for at in range(len(edges) - 1):
        now = any(start <= edges[at] < end for start, end in windows)
        not_yet = 1 - chances[:at].sum()
        if now:
            total += chances[at] * about.cold_ms * worth - about.memory_bytes * (edges[at + 1] - edges[at]) * (not_yet - chances[at] / 2)
            if not on:
                total -= about.memory_bytes * about.cold_ms * not_yet
        on = now
    return float(total)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 20), min_size=7, max_size=7), st.integers(1, 10**6), st.floats(1e3, 1e12))
def test_the_windows_are_the_best_of_all(counts: list[int], memory: int, worth: float) -> None:
    edges = np.array([0, 1_000, 3_000, 9_000, 27_000, 81_000, 243_000], np.int64)
    chances = (np.array(counts, float) + 0.01) / (sum(counts) + 0.07)
    about = Function("f", memory, 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_EDGES", edges)
        patch.setattr(module, "_BINS", 6)
        found = value(best_windows(chances, about, worth), chances, edges, about, worth)
    every = (tuple((int(edges[at]), int(edges[at + 1])) for at in range(6) if bits[at]) for bits in itertools.product((False, True), repeat=6))
    best = max(value(windows, chances, edges, about, worth) for windows in every)
    assert found == pytest.approx(best, rel=1e-9, abs=1e-3)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["f", "g"]), st.integers(0, 900_000), st.integers(1, 60_000)), min_size=1, max_size=40), st.sampled_from([None, 100, 350]),
       st.sampled_from(["fixed", "hybrid", "ours"]))
def test_the_pool_agrees_with_its_actions(calls: list[tuple[str, int, int]], capacity: int | None, which: str) -> None:
    """Loaded or not, bytes held and cold calls, kept by hand from the actions alone."""
    about = {"f": Function("f", 100, 700), "g": Function("g", 250, 2_500)}
    policy: Policy = {"fixed": FixedKeepAlive(), "hybrid": HybridHistogram(), "ours": ExpectedValue(3e5)}[which]
    pool = WarmPool(about, policy, capacity)
    warm: dict[str, int] = {}
    held = now = cold = 0

    def heed(actions: object, at: int) -> None:
        nonlocal held
        for action in actions:  # type: ignore[attr-defined]
            if action.load:
                warm[action.id] = at
            else:
                held += about[action.function].memory_bytes * (at - warm.pop(action.id))

    def pass_time(until: int) -> None:
        while (due := pool.next_ms()) is not None and due <= until:
            heed(pool.tick(due), due)

    for name, gap, runs in calls:
        now += gap
        pass_time(now)
        call = pool.call(name, now)
        assert (call.id in warm) or call.wait_ms == about[name].cold_ms
        if call.id in warm:
            held += about[name].memory_bytes * (now - warm.pop(call.id))
        cold += call.cold
        now += call.wait_ms + runs
        pass_time(now)
        warm[call.id] = now
        heed(pool.done(name, now), now)
        assert sum(about[each.split("/")[0]].memory_bytes for each in warm) == pool.idle_bytes
        assert capacity is None or pool.idle_bytes <= capacity
    assert (pool.totals.idle_byte_ms, pool.totals.cold, pool.totals.calls) == (held, cold, len(calls))


def test_a_policy_that_forgets_the_cost_of_memory_is_seen() -> None:
    """Negative control: planted chances that are not the ones that are used give windows that the definition calls worse."""
    edges, chances, about = module._EDGES, ExpectedValue(1e9).chances(("f", 0)), F
    good, planted = best_windows(chances, about, 1e9), best_windows(chances, Function("f", 1, F.cold_ms), 1e9)
    assert value(planted, chances, edges, about, 1e9) < value(good, chances, edges, about, 1e9)


# the benchmark


def test_the_trace_is_the_same_every_time_and_as_described() -> None:
    trace = functions_warm.generate(60, 2, 5, [[100.0, 300.0], [50.0]])
    assert trace == functions_warm.generate(60, 2, 5, [[100.0, 300.0], [50.0]]) != functions_warm.generate(60, 2, 6)
    assert trace.times == sorted(trace.times) and {each.cold_ms for each in trace.functions} == {50, 200}, "load times that are given are used"
    per_hour = np.bincount(trace.which, minlength=60) / 48
    assert 0.3 < (per_hour < 1).mean() < 0.6


def test_all_policies_see_the_same_calls_and_the_knob_holds_what_it_is_set_to() -> None:
    trace = functions_warm.generate(6, 1, 5)
    fixed = functions_warm.simulate(trace, FixedKeepAlive())
    knob = functions_warm.knob_for(trace, fixed[0].idle_gb_s)
    ours = functions_warm.simulate(trace, ExpectedValue(knob))
    assert [part.calls for part in ours] == [part.calls for part in fixed] and sum(part.calls for part in fixed) == len(trace.times)
    assert 0 < ours[0].idle_gb_s <= fixed[0].idle_gb_s
