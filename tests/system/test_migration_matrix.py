"""The matrix against named baselines: what comes out wrong does not count, the table says what was measured, and bytes and bandwidth are the link's own."""

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.bench import migration_matrix as matrix
from tools.bench.migration_guest import Missing
from tools.bench.migration_links import Carried, Link, link
from tools.bench.migration_matrix import Cell, Move

LENGTH = (2 << 20) + 4096 * 3


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "memory"
    path.write_bytes(random.Random(1).randbytes(1 << 20) + bytes(LENGTH - (1 << 20)))
    return path


def _copy(spoil: int | None = None) -> Move:
    def move(source: Path, folder: Path, base: Path | None) -> tuple[float, Path]:
        data = bytearray(source.read_bytes())
        if spoil is not None:
            data[spoil] ^= 1
        (folder / "out").write_bytes(data)
        return 2.0, folder / "out"

    return move


def _counter(step: int) -> "Iterator[int]":
    at = 0
    while True:
        yield at
        at += step


def test_a_cell_counts_only_where_every_byte_came_out(tmp_path: Path, memory: Path) -> None:
    counts = _counter(1000)
    right = matrix.measured("a", 10, _copy(), memory, None, lambda: next(counts), tmp_path)
    assert (right.why_not, right.seconds, right.wire_bytes, right.base) == ("", 2.0, 1000, False)
    for place in (0, LENGTH // 2, LENGTH - 1):
        wrong = matrix.measured("a", 10, _copy(place), memory, memory, lambda: 0, tmp_path)
        assert wrong.why_not == "what came out is not the guest's memory" and wrong.base


def test_a_move_that_fails_does_not_count(tmp_path: Path, memory: Path) -> None:
    def move(source: Path, folder: Path, base: Path | None) -> tuple[float, Path]:
        subprocess.run(["false"], check=True)
        return 1.0, folder

    assert matrix.measured("a", 10, move, memory, None, lambda: 0, tmp_path).why_not.startswith("it failed: ")
    nothing = matrix.measured("a", 10, lambda source, folder, base: (1.0, folder / "none"), memory, None, lambda: 0, tmp_path)
    assert nothing.why_not == "what came out is not the guest's memory"


def test_the_table_has_medians_and_compares_like_with_like() -> None:
    cells = [
        Cell("ours", False, 10, 1.0, 100_000_000), Cell("ours", False, 10, 3.0, 100_000_000), Cell("ours", True, 10, 0.5, 1_000_000), Cell("qemu", False, 10, 4.0, 500_000_000),
        Cell("rsync", False, 10, 6.0, 500_000_000), Cell("rsync", True, 10, 5.0, 4_000_000), Cell("tar | zstd", False, 10, 1.0, 1, "what came out is not the guest's memory"),
    ]
    rows = {(row["way"], row["start"]): row for row in matrix.table(cells)}
    assert rows["ours", "cold"]["seconds"] == 2.0 and rows["ours", "cold"]["least_seconds"] == 1.0 and rows["ours", "cold"]["wire_mb"] == 100.0
    assert rows["qemu", "cold"]["times_cold"] == {"seconds": 2.0, "bytes": 5.0}
    assert rows["qemu", "cold"]["times_base"] == {"seconds": 8.0, "bytes": 500.0}  # a base is of no use to it
    assert rows["rsync", "cold"]["times_cold"]["seconds"] == 3.0 and "times_base" not in rows["rsync", "cold"]
    assert rows["rsync", "base"]["times_base"] == {"seconds": 10.0, "bytes": 4.0} and "times_cold" not in rows["rsync", "base"]
    wrong = rows["tar | zstd", "cold"]
    assert not wrong["counts"] and "seconds" not in wrong and "times_cold" not in wrong
    shown = "\n".join(matrix.lines(list(rows.values()), [Carried(10, False, 5.0, "left as it is")]))
    assert "does not count" in shown and "left as it is" in shown


def test_without_ours_nothing_is_compared() -> None:
    rows = matrix.table([Cell("ours", False, 10, 1.0, 1, "it failed: x"), Cell("qemu", False, 10, 4.0, 5)])
    assert not any("times_cold" in row or "times_base" in row for row in rows)


@pytest.fixture(scope="module")
def cable() -> Iterator[Link]:
    try:
        with link() as made:
            yield made
    except (Missing, OSError) as error:
        pytest.skip(f"no link of our own can be made here: {error}")


def test_a_link_is_shaped_and_one_that_is_too_fast_says_so(cable: Link) -> None:
    cable._free = max(cable._free, 1.0)  # however busy this machine is
    try:
        shaped = cable.set(0.05)
    except Missing as error:
        pytest.skip(f"the kernel shapes no link: {error}")
    assert shaped.shaped and 0 < shaped.probe_gbit < 0.1 and not shaped.why
    fast = cable.set(1e6)
    assert not fast.shaped and fast.probe_gbit > 0 and "processors" in fast.why


@pytest.mark.parametrize("way", ["tar", "rsync", "rsync with a base", "ours", "ours with a base"])
def test_ways_over_the_link(cable: Link, way: str, tmp_path: Path, memory: Path) -> None:
    missing = [name for name in ("rsync", "zstd", "nsenter") if not shutil.which(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    base = None
    if way.endswith("base"):
        base = tmp_path / "base"
        data = bytearray(memory.read_bytes())
        data[5000:5008] = b"changed!"
        base.write_bytes(data)
    bases = tmp_path / "none"
    made = {"tar": lambda: matrix._tar(cable), "rsync": lambda: matrix._rsync(cable), "ours": lambda: matrix._ours(cable, 10, bases)}
    cell = matrix.measured(way, 10, made[way.partition(" ")[0]](), memory, base, cable.passed, tmp_path)
    assert cell.why_not == "" and cell.wire_bytes > 0
    if way == "rsync with a base":
        assert cell.wire_bytes < LENGTH / 4
    elif base is None:
        assert cell.wire_bytes > 1 << 20  # as many as are random
