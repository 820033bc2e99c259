"""When a source that changes is switched over: it always ends, never above the ceiling, never gives up what could be moved."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gpu_migration import convergence
from gpu_migration.convergence import HOPELESS, STEPS, Control, Limits, Next, Pass, Reason, Verdict

MIB = 1 << 20

limits = st.builds(
    lambda first, more, steps, cool_down, stall, passes, seconds: Limits(first, first + more, steps, cool_down, stall, passes, seconds),
    st.floats(0, 1), st.floats(0, 2), st.integers(1, 9), st.floats(0, 20), st.floats(0, 60), st.integers(1, 60), st.floats(0, 600),
)
passes = st.builds(Pass, st.floats(0, 1e10), st.floats(0, 100), st.floats(0, 200), st.one_of(st.just(0.0), st.floats(0, 1e10)), st.floats(0, 2))
busy = st.builds(Pass, st.floats(0, 1e8), st.floats(1, 100), st.floats(0, 2), st.floats(1e9, 1e10), st.floats(0, 2))
"""Never within any ceiling above: at least ten seconds of downtime."""
sixty = st.one_of(st.lists(passes, min_size=60, max_size=60), st.lists(busy, min_size=60, max_size=60))


def follow(control: Control, several: Iterable[Pass]) -> list[Verdict]:
    """Until it ends, or they do."""
    out = []
    for one in several:
        out.append(control.after(one))
        if out[-1].next is not Next.PASS:
            break
    return out


def source(dirty: Callable[[float], float], bandwidth: float, size: float = 1e9, look: float = 0.05) -> Iterable[Pass]:
    """The passes over a source of `size` bytes of which `dirty(t)` a second are changed at `t`."""
    now, remaining = 0.0, size
    while True:
        sending = remaining / bandwidth
        sent, remaining = remaining, min(size, dirty(now) * (sending + look))
        now += sending + look
        yield Pass(sent, sending, sending + look, remaining, look)


@given(limits, sixty)
def test_it_ends_never_above_the_ceiling_and_gives_up_only_what_cannot_be(given_limits: Limits, several: list[Pass]) -> None:
    found = follow(Control(given_limits), several)
    last = found[-1]
    assert last.next is not Next.PASS
    for verdict in found:
        assert given_limits.first <= verdict.allowed <= given_limits.ceiling
        assert (verdict.reason is not None) == (verdict.next is Next.GIVE_UP)
    if last.next is Next.SWITCH:
        assert last.implied <= given_limits.ceiling
    else:
        assert last.implied > given_limits.ceiling
    allowed = [verdict.allowed for verdict in found]
    assert allowed == sorted(allowed)


@given(limits, st.lists(passes, max_size=30), st.floats(0, 1))
def test_a_source_that_gets_quiet_is_switched_over(given_limits: Limits, several: list[Pass], share: float) -> None:
    control = Control(given_limits)
    found = follow(control, several)
    if not found or found[-1].next is Next.PASS:
        assert control.after(Pass(0, 0, 0.1, 0, share * given_limits.first)).next is Next.SWITCH


@given(limits, st.lists(passes, min_size=1, max_size=60), st.floats(1, 100))
def test_more_bandwidth_is_never_worse(given_limits: Limits, several: list[Pass], times: float) -> None:
    """The same passes, but each brought over quicker: switched over as soon or sooner."""
    faster = [Pass(one.sent, one.sending / times, one.seconds, one.remaining, one.overhead) for one in several if not one.sent or one.sending / times]
    slower = [one for one in several if not one.sent or one.sending / times]
    slow, fast = follow(Control(given_limits), slower), follow(Control(given_limits), faster)
    if slow and slow[-1].next is Next.SWITCH:
        assert fast[-1].next is Next.SWITCH and len(fast) <= len(slow)


def test_an_idle_source_takes_one_pass_and_the_least_downtime() -> None:
    assert follow(Control(), source(lambda _: 0, 1e8)) == [Verdict(Next.SWITCH, 0.05, 0.15)]


def test_a_slow_writer_converges_within_the_first_downtime() -> None:
    found = follow(Control(), source(lambda _: 1e7, 1e8))
    assert found[-1].next is Next.SWITCH and found[-1].allowed == convergence.FIRST_S and len(found) > 1


def test_one_that_settles_above_the_first_is_switched_over_by_the_ramp() -> None:
    control = Control(Limits(seconds=1e4, stall=1e4))
    found = follow(control, source(lambda _: 0.85e8, 1e8, look=0.1))
    raises = len({verdict.allowed for verdict in found}) - 1
    assert found[-1].next is Next.SWITCH and 1 <= raises <= STEPS
    assert control.elapsed >= (raises - 1) * convergence.COOL_DOWN_S


def test_one_faster_than_the_wire_is_given_up_as_stalled() -> None:
    control = Control(Limits(seconds=1e4))
    found = follow(control, source(lambda _: 2e8, 1e8))
    assert found[-1].next is Next.GIVE_UP and found[-1].reason is Reason.STALLED
    assert control.elapsed < 3 * convergence.STALL_S


def test_a_source_in_bursts_is_switched_over_in_its_low() -> None:
    """After the stall the ceiling is allowed, and the next low within it is taken; what is hopeless gets no second window."""
    low, high = 0.8e8, 5e8
    several = [Pass(1e8, 1, 1, low if n % 5 == 0 else high) for n in range(200)]
    settled = follow(Control(Limits(cool_down=1e6)), several)
    assert settled[-1].next is Next.SWITCH and convergence.STALL_S < len(settled) <= convergence.STALL_S + 5
    near = [Pass(1e8, 1, 1, 1.4 * 0.9e8)] * 200
    far = [Pass(1e8, 1, 1, 1.01 * HOPELESS * 0.9e8)] * 200
    assert len(follow(Control(), near)) == 2 * convergence.STALL_S + 1 and len(follow(Control(), far)) == convergence.STALL_S + 1


@pytest.mark.parametrize(("bounds", "reason"), [(Limits(passes=7), Reason.PASSES), (Limits(seconds=20), Reason.SECONDS)])
def test_passes_and_time_are_limited(bounds: Limits, reason: Reason) -> None:
    assert follow(Control(bounds), source(lambda _: 1e9, 1e8, size=2e8))[-1].reason is reason


def test_a_small_pass_says_nothing_of_the_bandwidth() -> None:
    control = Control()
    for sent, sending in ((100 * MIB, 1.0), (1 * MIB, 1e-4)):
        control.after(Pass(sent, sending, 1, 500 * MIB))
    assert control.bandwidth == 100 * MIB
    control.after(Pass(200 * MIB, 1, 1, 500 * MIB))
    assert math.isclose(control.bandwidth, 140 * MIB)


def test_without_any_bandwidth_only_an_unchanged_source_is_switched_over() -> None:
    assert Control().after(Pass(0, 0, 1, 1)).next is Next.PASS
    assert Control().after(Pass(0, 0, 1, 0)).next is Next.SWITCH


@pytest.mark.parametrize("bad", [{"first": 2.0}, {"ceiling": math.nan}, {"stall": -1.0}, {"passes": 0}, {"steps": 0}, {"seconds": math.inf}])
def test_bad_limits_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*; give"):
        Limits(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["sent", "sending", "seconds", "remaining", "overhead"])
def test_a_bad_pass_is_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is nan"):
        Pass(**{"sent": 0, "sending": 0, "seconds": 0, "remaining": 0, field: math.nan})


# Negative controls: each plants a fault in the rules, and the property above that guards it finds it.


def found_by(property_: Callable[..., None], *strategies: st.SearchStrategy[object]) -> None:
    """The property finds it; the example is not made smaller, which takes minutes."""
    again = settings(phases=(Phase.generate,), database=None)(given(*strategies)(property_.hypothesis.inner_test))  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        again()




def test_negative_control_a_ramp_without_a_ceiling_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def unbounded(self: Control) -> None:
        self.allowed += 1.0

    monkeypatch.setattr(Control, "_ramp", unbounded)
    found_by(test_it_ends_never_above_the_ceiling_and_gives_up_only_what_cannot_be, limits, sixty)


def test_negative_control_a_switch_over_above_the_ceiling_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    after = Control.after

    def reckless(self: Control, one: Pass) -> Verdict:
        verdict = after(self, one)
        return replace(verdict, next=Next.SWITCH, reason=None) if verdict.next is Next.GIVE_UP else verdict

    monkeypatch.setattr(Control, "after", reckless)
    found_by(test_it_ends_never_above_the_ceiling_and_gives_up_only_what_cannot_be, limits, sixty)


def test_negative_control_no_limit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Control, "_end", lambda self: None)
    found_by(test_it_ends_never_above_the_ceiling_and_gives_up_only_what_cannot_be, limits, sixty)


def test_negative_control_a_worse_verdict_for_more_bandwidth_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Control, "_implied", lambda self, one: self.bandwidth / 1e9)
    found_by(test_more_bandwidth_is_never_worse, limits, st.lists(passes, min_size=1, max_size=60), st.floats(1, 100))


def test_negative_control_a_quiet_source_that_waits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Control, "_implied", lambda self, one: 9.0)
    found_by(test_a_source_that_gets_quiet_is_switched_over, limits, st.lists(passes, max_size=30), st.floats(0, 1))
