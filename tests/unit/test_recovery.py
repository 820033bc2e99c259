"""Rebuilding a journal: a stop at any step of it loses neither what could be saved nor a number; a disk that is away is not a damaged file."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.clock import SystemClock
from edge_runtime.journal import Journal, JournalSettings, recovery
from edge_runtime.journal.storage import FileStorage

from .test_journal import append, check_whole, make


class Stops(OSError):
    """The process ends here."""


class StoppingStorage(FileStorage):
    """Ends at the `left`-th change of names; every change before it has happened."""

    def __init__(self, left: int) -> None:
        self.left = left

    def _change(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stops("the power is gone")

    def write(self, path: Path, data: bytes) -> None:
        self._change()
        super().write(path, data)

    def replace(self, source: Path, target: Path) -> None:
        self._change()
        super().replace(source, target)

    def remove(self, path: Path) -> None:
        self._change()
        super().remove(path)

    def sync_directory(self, directory: Path) -> None:
        self._change()
        super().sync_directory(directory)

    def connect(self, path: Path, timeout_s: float) -> sqlite3.Connection:
        self._change()
        return super().connect(path, timeout_s)


async def damaged(folder: Path, count: int = 3000) -> list[Any]:
    """A journal whose file is damaged in the middle; what was written."""
    journal = make(folder)
    journal.start()
    written = await append(journal, "decision", count)
    await journal.close()
    path = folder / "journal.db"
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8192] = b"\xa5" * 8192
    path.write_bytes(data)
    return written


async def stopped_at_every_step(tmp_path: Path) -> int:
    """Damage, a start that is stopped at step n, a start that is not; for every n. Returns the steps."""
    step = 0
    while True:
        folder = tmp_path / str(step)
        written = await damaged(folder, 400)
        try:
            started = Journal(JournalSettings(folder, ballast_bytes=0, min_free_bytes=0), SystemClock(), storage=StoppingStorage(step))
        except Stops:
            started = None
        if started is not None:
            await started.close()
            return step
        journal = make(folder)
        journal.start()
        saved = [record for record in await check_whole(journal, "decision") if record.kind == "decision"]
        assert saved and all(record == written[record.seq - 1] for record in saved), f"step {step}: nothing was saved"
        fresh = await append(journal, "decision", 3)
        assert fresh[0].seq > len(written), f"step {step}: a number is used again"
        await journal.close()
        assert not list(folder.glob("*.rebuilt"))
        step += 1


async def test_a_rebuild_may_be_stopped_at_every_step(tmp_path: Path) -> None:
    assert await stopped_at_every_step(tmp_path) > 15


async def test_a_file_set_aside_before_the_rebuild_is_whole_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: as it was once done."""
    build: Callable[..., Any] = recovery._rebuild

    def too_early(database: Any, *rest: Any) -> None:
        path = database.path.with_name(database.path.name.removesuffix(".building"))
        if path.exists():
            recovery._quarantine(rest[3].storage, path, 1)
        build(database, *rest)

    monkeypatch.setattr(recovery, "_rebuild", too_early)
    with pytest.raises(AssertionError, match=r"nothing was saved"):
        await stopped_at_every_step(tmp_path)


@pytest.mark.parametrize("problem", ["disk I/O error", "unable to open database file", "attempt to write a readonly database"])
async def test_a_disk_that_is_away_for_a_moment_damages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    journal = make(tmp_path)
    journal.start()
    await append(journal, "decision", 20)
    await journal.close()
    left = [1]
    real = recovery._check_marks

    def away(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise sqlite3.OperationalError(problem)
        real(*arguments)

    monkeypatch.setattr(recovery, "_check_marks", away)
    again = make(tmp_path)
    assert not again.recoveries and again.durable("decision") == 20 and not list(tmp_path.glob("*.damaged-*"))
    await again.close()
    left[0] = 1_000_000  # it stays away, and takes nothing else either: the start fails, the file stays
    with pytest.raises(Stops):
        Journal(JournalSettings(tmp_path, ballast_bytes=0, min_free_bytes=0), SystemClock(), storage=_Dead())
    assert not list(tmp_path.glob("*.damaged-*"))
    left[0] = 2  # one file that cannot be read on a disk that works: it is set aside and what can be read is saved
    journal = make(tmp_path)
    assert [item.damage for item in journal.recoveries] == [problem] and journal.recoveries[0].salvaged["decision"] == 20
    await journal.close()


class _Dead(FileStorage):
    def write(self, path: Path, data: bytes) -> None:
        raise Stops("the disk takes nothing")


async def test_a_database_that_is_gone_goes_on_above_its_numbers(tmp_path: Path) -> None:
    journal = make(tmp_path)
    journal.start()
    written = await append(journal, "decision", 20)
    await journal.close()
    (tmp_path / "journal.db").unlink()
    journal = make(tmp_path)
    assert journal.recoveries[0].damage == "the file is missing"
    journal.start()
    assert (await append(journal, "decision", 1))[0].seq > written[-1].seq
    await check_whole(journal, "decision")
    await journal.close()
