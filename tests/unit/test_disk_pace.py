"""The pace of bulk writing, against disks that are models: how much may wait for the disk, and how it finds a piece's size."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from edge_runtime.system.disk_pace import FIRST, LEAST, MOST, PIECE_S, REST_MOST_S, Pace, PacedFile, remove, syncfs


@dataclass
class Disk:
    """Takes `rate` bytes in a second, `fixed` seconds beside that for each flush. With `slice_s` what it takes in so many seconds is taken at once, and more waits for the next slice. Others write `hog` bytes before each flush."""

    rate: float
    fixed: float = 0.0
    slice_s: float = 0.0
    hog: int = 0
    used: float = 0.0
    now: float = 0.0
    waiting: int = 0
    flushes: list[float] = field(default_factory=list)
    most: int = 0
    slept: list[float] = field(default_factory=list)

    def write(self, count: int) -> None:
        self.waiting += count
        self.most = max(self.most, self.waiting)

    def flush(self, _: int) -> None:
        began, count = self.now, self.waiting + self.hog
        self.now += self.fixed
        if self.slice_s:
            number = int(self.now / self.slice_s)
            left = (number + 1) * self.slice_s * self.rate - max(self.used, number * self.slice_s * self.rate)
            self.used = max(self.used, number * self.slice_s * self.rate) + count
            if count > left:
                self.now = int(self.used / self.rate / self.slice_s) * self.slice_s + 1e-9
        else:
            self.now += count / self.rate
        self.waiting = 0
        self.flushes.append(self.now - began)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def written(disk: Disk, total: int, each: int, rest: bool = True) -> Pace:
    pace = Pace(disk.flush, rest=rest, clock=lambda: disk.now, sleep=disk.sleep)
    for _ in range(total // each):
        disk.write(each)
        pace.wrote(0, each)
    return pace


@given(rate=some.floats(1e5, 5e9), fixed=some.floats(0, 0.1), each=some.integers(1, 4 << 20), slice_s=some.sampled_from((0.0, 0.1)))
def test_what_waits_is_a_piece_and_one_write_at_the_most(rate: float, fixed: float, each: int, slice_s: float) -> None:
    disk = Disk(rate, fixed, slice_s)
    pace = written(disk, 64 << 20 if each > 4096 else 1 << 20, each)
    assert disk.most < MOST + each and LEAST <= pace.piece <= MOST and all(0 <= seconds <= REST_MOST_S for seconds in disk.slept) and len(disk.slept) == len(disk.flushes)


def test_on_a_slow_disk_a_piece_takes_as_long_as_a_commit_may_wait() -> None:
    disk = Disk(20 << 20)
    assert written(disk, 100 << 20, 1 << 18).piece == LEAST and max(disk.flushes[5:]) <= 2 * PIECE_S and sum(disk.slept) == pytest.approx(sum(disk.flushes))


def test_on_a_quick_disk_pieces_are_large_and_it_costs_little() -> None:
    disk = Disk(2e9, 0.0003)
    assert written(disk, 200 << 20, 1 << 18).piece == MOST and disk.now < 3 * (200 << 20) / 2e9


def test_a_disk_that_takes_some_at_once_is_not_taken_for_a_quick_one() -> None:
    """With pieces that grow after each that was quick, and are halved after one that was slow, it went up and down between the bounds (seen on a limited disk)."""
    disk = Disk(20 << 20, slice_s=0.1)
    written(disk, 100 << 20, 1 << 18)
    assert disk.most <= (1 << 20) + (1 << 18) and max(disk.flushes) < 0.11


def test_where_others_fill_the_disk_it_is_flushed_seldom() -> None:
    alone, beside = Disk(20 << 20), Disk(20 << 20, hog=100 << 20)
    for disk in (alone, beside):
        written(disk, 64 << 20, 1 << 18)
    assert len(beside.flushes) < len(alone.flushes) / 2


def test_without_rests_there_are_none() -> None:
    disk = Disk(20 << 20)
    written(disk, 8 << 20, 1 << 18, rest=False)
    assert disk.flushes and not disk.slept


def test_a_file_is_written_at_a_pace_and_a_disk_that_fails_is_heard(tmp_path: Path) -> None:
    seen: list[int] = []
    with open(tmp_path / "a", "wb") as handle:
        file = PacedFile(handle, Pace(seen.append, rest=False))
        for _ in range(3):
            file.write(bytes(FIRST))
        file.seek(1)
        assert file.write(b"x") == 1 and file.tell() == 2 and seen == [handle.fileno()] * 3

    def fails(_: int) -> None:
        raise OSError(5, "Input/output error")

    with open(tmp_path / "b", "wb") as handle, pytest.raises(OSError, match="Input/output"):
        PacedFile(handle, Pace(fails)).write(bytes(FIRST))


def test_a_whole_file_system_is_written_out_and_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    syncfs(descriptor)
    os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        syncfs(descriptor)


def test_a_folder_is_removed_at_a_pace_and_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/a").touch()
    (tmp_path / "gone/deep/er").mkdir(parents=True)
    for at in range(300):
        (tmp_path / "gone/deep" / str(at)).touch()
    (tmp_path / "gone/out").symlink_to(tmp_path / "kept")
    (tmp_path / "gone/deep/nowhere").symlink_to("nowhere")
    os.mkfifo(tmp_path / "gone/pipe")
    seen: list[int] = []
    remove(tmp_path / "gone", Pace(seen.append, rest=False))
    assert len(seen) == 1 and [one.name for one in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept/a").exists()
    remove(tmp_path / "gone", Pace())
    remove(tmp_path / "kept/a", Pace())
    assert (tmp_path / "kept/a").exists(), "it is no folder"
