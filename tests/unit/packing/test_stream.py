"""VMs that come and go: never more on a host than it has, every departure gives back what was taken, migration moves whole hosts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler.packing import Bad
from hub.scheduler.packing.stream import MIGRATE_EVERY_S, VMS_MAX, serve
from tools.bench.azure_v1 import foretell, read
from tools.bench.packing_check import Wrong, check_stream

HOST = (16, 64)


def arrays(rows: list[tuple[int, int, int, int]]) -> list[np.ndarray]:
    return [np.array([row[at] for row in rows], dtype=np.int64) for at in range(4)]


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    rows = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(0, 16), st.integers(0, 64)), max_size=40))
    return sorted((600 * at, 600 * (at + life), cores, memory) for at, life, cores, memory in rows)


@settings(max_examples=50)
@given(streams(), st.booleans(), st.sampled_from([(0.0, 0.0), (8.0, 0.0), (8.0, 0.05)]))
def test_hosts_are_never_overfull_and_are_counted_right(rows: list[tuple[int, int, int, int]], migrate: bool, weights: tuple[float, float]) -> None:
    samples = np.arange(0, 600 * 82, 600)
    parts = arrays(rows)
    done = serve(*parts, HOST, samples, ends=parts[1], balance=weights[0], lifetime=weights[1], migrate=migrate)
    assert check_stream(rows, HOST, done.host.tolist(), done.moves.tolist(), samples.tolist()) == done.in_use.tolist()
    assert done.in_use[-1:].tolist() == [0]
    assert len(done.moves) == 0 or migrate


def test_migration_empties_the_emptiest_host_as_a_whole() -> None:
    """Two hosts are left with little; the lesser one's VMs go to the other."""
    rows = [(0, 300, 12, 4), (0, 90_000, 4, 4), (0, 300, 13, 4), (0, 90_000, 3, 4)]
    samples = np.arange(0, 3 * MIGRATE_EVERY_S, 300)
    plain, moved = (serve(*arrays(rows), HOST, samples, migrate=migrate) for migrate in (False, True))
    assert plain.in_use[-1] == 2
    assert moved.in_use[-1] == 1
    assert [row[1] for row in moved.moves.tolist()] == [3]


def test_a_host_with_many_vms_is_left_alone() -> None:
    small = [(0, 90_000, 1, 1)] * (VMS_MAX + 1)
    rows = [(0, 90_000, 16, 4), (0, 300, 5, 1), *small]
    done = serve(*arrays(rows), HOST, np.arange(0, 3 * MIGRATE_EVERY_S, 300), migrate=True)
    assert len(done.moves) == 0


def test_what_is_foretold_ends_together() -> None:
    """A long and a short VM each have a host; another long one goes to the long one's, though the other is fuller."""
    rows = [(0, 100_000, 9, 9), (0, 600, 10, 10), (0, 100_000, 5, 5)]
    parts = arrays(rows)
    assert serve(*parts, HOST, np.array([0]), ends=parts[1], lifetime=1.0).host.tolist() == [0, 1, 0]
    assert serve(*parts, HOST, np.array([0])).host.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("rows", "said"), [([(0, 300, 17, 1)], r"cores\[0\] is 17; a host has 16"), ([(0, 300, 1, -1)], r"memory\[0\] is -1"), ([(600, 900, 1, 1), (0, 300, 1, 1)], "in order of arrival"), ([(600, 600, 1, 1)], "later departure")],
)
def test_bad_streams_are_named(rows: list[tuple[int, int, int, int]], said: str) -> None:
    with pytest.raises(Bad, match=said):
        serve(*arrays(rows), HOST, np.array([0, 600]))


@pytest.mark.parametrize(
    ("host", "moves", "said"),
    [([0, 0, 0], [], "host 0 holds"), ([0, 1, -1], [], "VM 2 has no host"), ([0, 1, 2], [(300, 2, 0)], "host 0 holds"), ([0, 1, 2], [(600, 2, 1)], "VM 2 is moved at 600, when it is not there"), ([0, 1, 2], [(450, 0, 1)], "move 0 is at no sample time")],
)
def test_the_checker_catches(host: list[int], moves: list[tuple[int, int, int]], said: str) -> None:
    rows = [(0, 900, 8, 8), (0, 900, 8, 8), (0, 600, 9, 9)]
    assert check_stream(rows, HOST, [0, 0, 1], [(300, 0, 2)], [0, 300, 600, 900]) == [2, 3, 2, 0]
    with pytest.raises(Wrong, match=said):
        check_stream(rows, HOST, host, moves, [0, 300, 600, 900])


def made(folder: Path, arrivals: str, lives: str) -> dict[str, Any]:
    (folder / "flav_map.txt").write_text("1,1.75 a\n2,4 b\n")
    (folder / "v1.interval_map.txt").write_text("0 0\n300 1\n600 2\n900 2\n")
    (folder / "v1.made.txt").write_text(arrivals)
    (folder / "v1.made.c900.txt").write_text(lives)
    return read(folder)


def test_a_stream_is_read(tmp_path: Path) -> None:
    stream = made(tmp_path, "0 a,b,|,b,\n300 a,\n", "0 U0,U2,|,C2,\n300 U1,\n")
    assert stream["arrives"].tolist() == [0, 0, 0, 300]
    assert (stream["departs"] - stream["arrives"]).tolist() == [300, 900, 1 << 40, 450]
    assert stream["batch"].tolist() == [2, 2, 1, 1]
    assert stream["memory"].tolist() == [1792, 4096, 4096, 1792]


@pytest.mark.parametrize(("arrivals", "lives", "said"), [("0 a,b,\n", "0 U0,\n", "does not go with"), ("0 a,\n", "300 U0,\n", "line 1: does not go with the same line"), ("0 z,\n", "0 U0,\n", "'z' does not go with")])
def test_bad_files_are_named(tmp_path: Path, arrivals: str, lives: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(tmp_path, arrivals, lives)


def test_the_advisor_knows_only_what_has_ended() -> None:
    """Twelve lived 300 s before the half; one kind had not ended by then and counts as long; of the third nothing was seen."""
    count = 12
    stream = {
        "arrives": np.array([0] * 2 * count + [1000] * 3), "departs": np.array([300] * count + [5000] * count + [9999] * 3), "flavour": np.array([0] * count + [1] * count + [0, 1, 2]),
        "batch": np.ones(2 * count + 3, dtype=np.int64),
    }
    ends = foretell(stream, 1000)
    assert ends[: 2 * count].tolist() == [0] * 2 * count
    assert ends[-3:].tolist() == [1300, 1 << 40, 0]
