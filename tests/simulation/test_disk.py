"""The simulated disk: what is durable survives a power cut, what is not may not; SQLite on it keeps its word at every single write."""

import errno
import random
import sqlite3
from pathlib import Path

import pytest

pytest.importorskip("apsw", reason="the simulated disk needs apsw (the dev extra)")

from edge_runtime.clock import SystemClock
from edge_runtime.contract.records import CHAIN_START, Record
from edge_runtime.journal import Journal, JournalSettings
from edge_runtime.journal.database import Group, JournalDatabase
from edge_runtime.journal.storage import write_durably
from tests.simulation.disk import DISKS, SECTOR, PowerLost, SimDisk


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> SimDisk:
    made = SimDisk(request.node.name.replace("/", "_"), random.Random(1), lambda _seconds: None)
    request.addfinalizer(lambda: DISKS.pop(made.name, None))
    return made


def test_what_was_synchronised_survives_and_what_was_not_may_be_lost(disk: SimDisk) -> None:
    path = Path(disk.root) / "a"
    disk.write(path, b"old")
    disk.sync_names()
    disk.files[str(path)].write(0, b"new")
    disk.lose_power(keep=0.0)
    assert disk.read(path) == b"old"
    disk.files[str(path)].write(0, b"new")
    disk.lose_power(keep=1.0)
    assert disk.read(path) == b"new"


def test_a_name_is_durable_only_after_the_directory(disk: SimDisk) -> None:
    path = Path(disk.root) / "a"
    found = set()
    for _ in range(50):
        disk.files.clear()
        disk._names.clear()
        disk._moves.clear()
        disk.write(path, b"x")
        disk.lose_power(keep=1.0)
        found.add(disk.exists(path))
    assert found == {True, False}


@pytest.mark.parametrize("at", range(8))
def test_a_durable_replacement_is_old_or_new_wherever_the_power_goes(disk: SimDisk, at: int) -> None:
    path = Path(disk.root) / "marks"
    write_durably(disk, path, b"old")
    for keep in (0.0, 0.5, 1.0):
        disk.countdown = at
        try:
            write_durably(disk, path, b"new")
            done = True
        except PowerLost:
            done = False
        disk.countdown = -1
        disk.lose_power(keep)
        assert disk.read(path) in ((b"new",) if done else (b"old", b"new"))
        write_durably(disk, path, b"old")


def test_a_write_is_torn_at_a_sector(disk: SimDisk) -> None:
    lengths = set()
    for _ in range(60):
        file = disk.open(f"{disk.root}/f")
        file.truncate(0)
        file.sync()
        disk.sync_names()
        file.write(0, b"x" * 4096)
        disk.lose_power(keep=1.0)
        lengths.add(len(disk.files[f"{disk.root}/f"].data.rstrip(b"\0")))
    assert all(length % SECTOR == 0 for length in lengths) and len(lengths) > 3


@pytest.mark.parametrize("seed", range(3))
def test_commits_survive_a_power_cut_at_every_write(disk: SimDisk, seed: int) -> None:
    draw = random.Random(seed)
    path = Path(disk.root) / "journal.db"
    committed, chain = 0, CHAIN_START
    for at in range(60):
        database = JournalDatabase(path, ("decision",), storage=disk, wal_bytes=1 << 15)
        try:
            database.open()
            assert database.writer.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
            marks = database.marks()["decision"]
            assert marks.next_seq - 1 in (committed, committed + 1)  # durable and not told is allowed
            committed, chain = marks.next_seq - 1, marks.chain
            disk.countdown = at % 20 + draw.randrange(3)
            for _ in range(40):
                record = Record(committed + 1, "boot", 1, 1, "rtc", "decision", '{"pad":"' + "x" * draw.randrange(3000) + '"}')
                after = record.chain(chain)
                database.commit(Group(records={"decision": [(record, after)]}))
                committed, chain = committed + 1, after
                if draw.random() < 0.2:
                    database.checkpoint_beside()
                if draw.random() < 0.1:
                    database.grow_wal()
        except sqlite3.Error:
            assert disk.countdown < 0
        disk.countdown = -1
        disk.lose_power(draw.random())
    assert committed > 40


def test_a_commit_without_fsync_is_lost(disk: SimDisk) -> None:
    path = Path(disk.root) / "journal.db"
    database = JournalDatabase(path, ("decision",), "OFF", storage=disk)
    database.open()
    disk.sync_names()
    for seq in range(1, 20):
        database.commit(Group(records={"decision": [(Record(seq, "b", 1, 1, "rtc", "decision", "{}"), CHAIN_START)]}))
    disk.lose_power(keep=0.3)
    again = JournalDatabase(path, ("decision",), storage=disk)
    try:
        again.open()
        assert again.marks()["decision"].next_seq < 20
    except sqlite3.Error:
        pass  # not even a database is left: lost all the same


def test_a_full_disk_refuses_as_a_real_one(disk: SimDisk) -> None:
    database = JournalDatabase(Path(disk.root) / "journal.db", ("decision",), storage=disk)
    database.open()
    disk.capacity = disk.used + 10_000
    with pytest.raises(sqlite3.OperationalError, match="full"):
        for seq in range(1, 50):
            database.commit(Group(records={"decision": [(Record(seq, "b", 1, 1, "rtc", "decision", '{"pad":"' + "x" * 900 + '"}'), CHAIN_START)]}))
    with pytest.raises(OSError) as raised:
        disk.allocate(Path(disk.root) / "ballast", 1 << 20)
    assert raised.value.errno == errno.ENOSPC


def test_a_full_disk_at_the_start_is_no_damage(disk: SimDisk) -> None:
    def make() -> Journal:
        return Journal(JournalSettings(Path(disk.root), ballast_bytes=32_768, min_free_bytes=1 << 20), SystemClock(), storage=disk)

    first = make()
    assert disk.exists(Path(disk.root) / "ballast")
    for lane in first.lanes.values():
        lane.database.close()
    disk.lose_power(keep=1.0)
    disk.capacity = disk.used
    second = make()
    assert second.recoveries == [] and second.boot_n == first.boot_n + 1
    assert not disk.exists(Path(disk.root) / "ballast")
