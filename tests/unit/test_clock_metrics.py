"""Time on a device without a clock, the Prometheus text, and systemd's notification over a real socket."""

import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.clock import JUMP_MS, RELEASE_MS, SYNC_CHECK_INTERVAL_MS, SystemClock, kernel_synchronised
from edge_runtime.metrics import MAX_SERIES, PREFIX, Metrics
from edge_runtime.system.process import open_descriptors, prefer, resident_bytes
from edge_runtime.system.service import ServiceManager
from tests.prometheus_text import parse_exposition


class Sources:
    """Wall and monotonic time and whether the kernel is synchronised, all set by hand; seconds."""

    def __init__(self, wall: float, mono: float = 5.0, synchronised: bool = False) -> None:
        self.wall, self.mono, self.synchronised = wall, mono, synchronised
        self.asked = 0

    def clock(self, floor_ms: int = 0) -> SystemClock:
        def synchronised() -> bool:
            self.asked += 1
            return self.synchronised

        return SystemClock(floor_ms, wall=lambda: self.wall, mono=lambda: self.mono, synchronised=synchronised)

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.mono += seconds


NOW = RELEASE_MS / 1000 + 86_400


def test_a_board_that_boots_in_1970_starts_at_the_floor_and_says_so() -> None:
    sources = Sources(wall=12.0)
    clock = sources.clock()
    assert clock.stamp() == (5000, RELEASE_MS, "unsynced")
    sources.pass_(1.5)
    assert clock.stamp() == (6500, RELEASE_MS + 1500, "unsynced")
    clock.raise_floor(RELEASE_MS + 10_000)  # what the journal has seen
    sources.pass_(1)
    assert clock.stamp() == (7500, RELEASE_MS + 11_000, "unsynced")
    clock.raise_floor(RELEASE_MS)  # an older one changes nothing
    assert clock.stamp().wall_ms == RELEASE_MS + 11_000
    sources.wall, sources.synchronised = NOW, True  # the network gave it the time
    assert clock.stamp() == (7500, int(NOW * 1000), "ntp") and clock.jumps == 1


def test_a_floor_from_before_this_release_is_not_believed_either() -> None:
    assert Sources(wall=0.0).clock(floor_ms=1000).stamp().wall_ms == RELEASE_MS
    assert Sources(wall=0.0).clock(floor_ms=RELEASE_MS + 5).stamp().wall_ms == RELEASE_MS + 5


def test_quality_follows_the_kernel_and_is_asked_seldom() -> None:
    sources = Sources(wall=NOW)
    clock = sources.clock()
    assert clock.stamp().quality == "rtc" and sources.asked == 1
    sources.synchronised = True
    sources.pass_(SYNC_CHECK_INTERVAL_MS / 1000 - 1)
    assert clock.stamp().quality == "rtc" and sources.asked == 1
    sources.pass_(1)
    assert clock.stamp().quality == "ntp" and sources.asked == 2
    sources.synchronised = False
    sources.pass_(1)
    sources.wall += 3600  # a jump: the kernel is asked at once
    assert clock.stamp().quality == "rtc" and sources.asked == 3


def test_jumps_are_counted_and_slewing_is_none() -> None:
    sources = Sources(wall=NOW)
    clock = sources.clock()
    clock.stamp()
    for _ in range(100):
        sources.pass_(1)
        sources.wall += 0.0005 * JUMP_MS / 1000
        clock.stamp()
    assert clock.jumps == 0
    for count, step in enumerate((JUMP_MS / 1000 + 0.01, -3600, 86_400), 1):
        sources.wall += step
        clock.stamp()
        assert clock.jumps == count


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(-1e9, 1e9), st.integers(0, 10**11)), max_size=30), st.floats(0, 4e9))
def test_no_stamp_is_older_than_the_release_and_monotonic_time_only_grows(steps: list[tuple[float, float, int]], wall: float) -> None:
    sources = Sources(wall=wall)
    clock = sources.clock()
    last = clock.stamp()
    for passed, jump, above in steps:
        sources.pass_(passed)
        sources.wall = max(0.0, sources.wall + jump)
        if above % 3 == 0:
            clock.raise_floor(RELEASE_MS + above)
            assert clock.stamp().wall_ms >= RELEASE_MS
        stamp = clock.stamp()
        assert stamp.wall_ms >= RELEASE_MS and stamp.mono_ms >= last.mono_ms and stamp.quality in ("unsynced", "rtc", "ntp")
        if stamp.quality == last.quality == "unsynced":
            assert stamp.wall_ms >= last.wall_ms
        last = stamp


def test_the_real_clock_and_process_facts() -> None:
    clock = SystemClock()
    first, second = clock.stamp(), clock.stamp()
    assert second.mono_ms >= first.mono_ms and isinstance(kernel_synchronised(), bool)
    assert resident_bytes() > 1 << 20 and open_descriptors() > 2


# -- the Prometheus text -------------------------------------------------------------------------------------------------------

GOOD = '# HELP a_total Things.\n# TYPE a_total counter\na_total{x="1",y="q\\"q"} 3\na_total{x="2"} 4.5e+10\n# HELP b Heat.\n# TYPE b gauge\nb -Inf\n'


@pytest.mark.parametrize(("old", "new"), [
    ("# TYPE a_total counter\n", ""), ("a_total{x=\"2\"}", 'a_total{x="1",y="q\\"q"}'), ('x="2"', 'x="2'), ('x="2"', "x=2"), ('x="2"', 'x="a\nb"'), ('x="2"', '2x="2"'), ("4.5e+10", "many"), ("4.5e+10", "-1"),
    ("b -Inf\n", "b -Inf"), ("b -Inf", "a_total 3"), ("# HELP b Heat.", "# HELP a_total Heat."), ("counter", "speed"), ("Things.", "Things\\t."), ("a_total{", "a-total{"), ("b -Inf\n", "b -Inf\n\n"), ('"} 3', '"}  3'),
])
def test_the_checker_of_the_text_can_fail(old: str, new: str) -> None:
    assert parse_exposition(GOOD) == {"a_total": {'{x="1",y="q\\"q"}': 3, '{x="2"}': 4.5e10}, "b": {"": float("-inf")}}
    with pytest.raises(ValueError):
        parse_exposition(GOOD.replace(old, new, 1))


def test_metrics_are_valid_exposition() -> None:
    metrics = Metrics()
    assert metrics.render() == "\n" or parse_exposition(metrics.render()) == {}
    metrics.describe("rejected_total", "counter", "Messages refused, by reason.")
    metrics.describe("never_total", "counter", "Nothing yet.")
    metrics.gauge("heat", "Heat.", lambda: 1.5)
    metrics.gauge("endless", "Hours.", lambda: float("inf"))
    metrics.inc("rejected_total", reason="json")
    metrics.inc("rejected_total", 2, reason="size", lane="live")
    metrics.inc("rejected_total", 2, lane="live", reason="size")
    metrics.inc("plain_total")
    metrics.set("level", -3)
    found = parse_exposition(metrics.render())
    assert found == {
        f"{PREFIX}rejected_total": {'{reason="json"}': 1, '{lane="live",reason="size"}': 4}, f"{PREFIX}never_total": {"": 0}, f"{PREFIX}heat": {"": 1.5},
        f"{PREFIX}endless": {"": float("inf")}, f"{PREFIX}plain_total": {"": 1}, f"{PREFIX}level": {"": -3},
    }
    assert metrics.value("rejected_total", reason="json") == 1 and metrics.total("rejected_total") == 5 and metrics.value("nothing") == 0


def test_series_are_bounded_and_no_count_is_lost() -> None:
    metrics = Metrics()
    for number in range(MAX_SERIES * 3):
        metrics.inc("rejected_total", reason=f"r{number}")
        metrics.inc("other_total", kind=f"k{number}")
    found = parse_exposition(metrics.render())
    assert sum(len(series) for series in found.values()) <= MAX_SERIES + 2
    assert metrics.total("rejected_total") == metrics.total("other_total") == MAX_SERIES * 3
    assert found[f"{PREFIX}rejected_total"]['{reason="other"}'] > 0


@given(st.lists(st.tuples(st.sampled_from(["a_total", "b_total"]), st.integers(0, 10**15), st.sampled_from(["x", "y"])), max_size=40))
def test_large_counters_lose_no_digit(steps: list[tuple[str, int, str]]) -> None:
    metrics = Metrics()
    expected: dict[tuple[str, str], int] = {}
    for name, by, reason in steps:
        metrics.inc(name, by, reason=reason)
        expected[name, reason] = expected.get((name, reason), 0) + by
    found = parse_exposition(metrics.render()) if steps else {}
    for (name, reason), value in expected.items():
        assert found[PREFIX + name][f'{{reason="{reason}"}}'] == pytest.approx(value, rel=1e-15)


# -- systemd -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    """A datagram socket where systemd would listen; its address as systemd writes it."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@novacron-{os.getpid()}-{tmp_path.name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.bind(address.replace("@", "\0", 1))
        yield sock, address


def test_readiness_status_and_watchdog_arrive(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    service = ServiceManager({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())})
    assert service.watchdog_s == 30
    assert service.notify(READY="1", STATUS="hub up, 3 decisions") and sock.recv(4096) == b"READY=1\nSTATUS=hub up, 3 decisions"
    assert service.notify(WATCHDOG="1") and sock.recv(4096) == b"WATCHDOG=1"


def test_a_start_may_be_silent_for_longer_than_what_is_up(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    service = ServiceManager({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000"})
    service.ready("coming")
    assert sock.recv(4096) == b"READY=1\nSTATUS=coming\nWATCHDOG_USEC=300000000"
    service.settled()
    assert sock.recv(4096) == b"WATCHDOG=1\nWATCHDOG_USEC=30000000"
    service = ServiceManager({"NOTIFY_SOCKET": address})
    service.settled()  # no watchdog, no word of it
    service.ready("coming")
    assert sock.recv(4096) == b"READY=1\nSTATUS=coming"


def test_a_status_from_outside_can_neither_add_fields_nor_stop_the_watchdog(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    service = ServiceManager({"NOTIFY_SOCKET": address})
    assert service.notify(WATCHDOG="1", STATUS="rules[0].\ud800\nMAINPID=1\r\nERRNO=2: is unknown")
    told = sock.recv(4096).decode()
    assert told.startswith("WATCHDOG=1\nSTATUS=rules[0].") and len(told.splitlines()) == 2


@pytest.mark.parametrize(("environment", "seconds"), [
    ({}, 0), ({"WATCHDOG_USEC": "5000000"}, 5), ({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}, 0), ({"WATCHDOG_USEC": "soon"}, 0), ({"WATCHDOG_USEC": "-3"}, 0), ({"WATCHDOG_USEC": "\u00b2"}, 0),
])
def test_the_watchdog_is_ours_only_where_it_is_meant_for_us(environment: dict[str, str], seconds: float) -> None:
    assert ServiceManager(environment).watchdog_s == seconds


def test_where_nobody_listens_notify_says_so_and_raises_nothing(tmp_path: Path) -> None:
    assert ServiceManager({}).notify(READY="1") is False
    assert ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).notify(READY="1") is False
    assert ServiceManager({"NOTIFY_SOCKET": "x" * 500}).notify(READY="1") is False


@pytest.mark.skipif(os.getpriority(os.PRIO_PROCESS, 0) != 0, reason="these tests were given a priority: run them without nice")
def test_only_the_thread_that_asks_is_preferred_and_only_where_nobody_chose() -> None:
    found: list[object] = []
    chosen = threading.Event()
    looked = threading.Event()

    def other() -> None:
        chosen.wait()
        found.append(os.getpriority(os.PRIO_PROCESS, 0))
        looked.set()

    def deciding() -> None:
        found.append(prefer(5))  # downwards, which anyone may
        found.append(prefer(7))  # somebody chose already
        found.append(os.getpriority(os.PRIO_PROCESS, 0))
        chosen.set()
        looked.wait()

    threads = [threading.Thread(target=one) for one in (other, deciding)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True, False, 5, os.getpriority(os.PRIO_PROCESS, 0)]
    assert prefer(0) == (os.getpriority(os.PRIO_PROCESS, 0) == 0)
