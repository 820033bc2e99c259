"""The journal: gapless over restarts, durable before anything is told, whole after kill -9, rebuilt when damaged, within its limits."""

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.clock import SystemClock
from edge_runtime.contract.records import CHAIN_START, Record, chain_over
from edge_runtime.journal import Journal, JournalSettings
from edge_runtime.journal.database import PAGE_BYTES, WAL_GROWN_BYTES, insert_chunks
from edge_runtime.journal.planner import GrowthRate, plan
from edge_runtime.journal.recovery import RESERVE_BLOCK
from edge_runtime.journal.storage import FileStorage
from tests.integration.waiting import until


def make(folder: Path, **settings: Any) -> Journal:
    return Journal(JournalSettings(folder, ballast_bytes=0, min_free_bytes=0, **settings), SystemClock())


async def append(journal: Journal, stream: str, count: int) -> list[Record]:
    done: list[Record] = []
    for number in range(count):
        journal.append(stream, "decision", {"n": number}, done.append)
    await journal.flush()
    return done


async def check_whole(journal: Journal, stream: str) -> list[Record]:
    """The checker: from the floor to the end without a gap, the chain as marked."""
    marks = journal.marks(stream)
    records: list[Record] = []
    while True:
        found, _ = await journal.read(stream, marks.floor + len(records), 1000, 1 << 24)
        if not found:
            break
        records += found
    assert [record.seq for record in records] == list(range(marks.floor, marks.next_seq))
    assert chain_over(records, marks.floor_chain) == marks.chain
    return records


async def test_sequences_go_on_without_a_gap_over_restarts(tmp_path: Path) -> None:
    boots = set()
    for round_ in range(3):
        journal = make(tmp_path)
        journal.start()
        records = await append(journal, "decision", 50)
        assert [record.seq for record in records] == list(range(50 * round_ + 1, 50 * round_ + 51))
        await append(journal, "telemetry", 5)
        await check_whole(journal, "decision")
        assert journal.boot_n == round_ + 1 and journal.clean
        boots.add(journal.boot)
        await journal.close()
    assert len(boots) == 3


async def test_nothing_is_told_before_it_is_durable(tmp_path: Path) -> None:
    journal = make(tmp_path)
    journal.start()
    seen: list[int] = []

    def durable(record: Record) -> None:
        # Another connection sees only what is committed.
        other = sqlite3.connect(tmp_path / "journal.db")
        seen.append(other.execute("SELECT count(*) FROM records_decision WHERE seq=?", (record.seq,)).fetchone()[0])
        other.close()

    for number in range(20):
        journal.append("decision", "decision", {"n": number}, durable)
    await journal.flush()
    assert seen == [1] * 20
    await journal.close()


def test_a_planted_acknowledgement_before_commit_is_seen(tmp_path: Path) -> None:
    async def run() -> list[int]:
        journal = make(tmp_path)
        journal.start()
        seen: list[int] = []
        lane = journal.lanes["journal"]
        original = lane.append

        def early(stream: str, kind: str, body: str, stamp: Any, callback: Any) -> None:
            original(stream, kind, body, stamp, None)
            callback(Record(1, "", 0, 0, "rtc", kind, body))

        lane.append = early  # type: ignore[method-assign]

        def durable(record: Record) -> None:
            other = sqlite3.connect(tmp_path / "journal.db")
            seen.append(other.execute("SELECT count(*) FROM records_decision").fetchone()[0])
            other.close()

        journal.append("decision", "decision", {}, durable)
        await journal.flush()
        await journal.close()
        return seen

    assert asyncio.run(run()) == [0]


async def test_a_decision_is_one_commit(tmp_path: Path) -> None:
    """Marks that moved (effects done) ride with a later commit; they are none of their own after each decision."""
    journal = make(tmp_path)
    journal.start()
    lane = journal.lanes["journal"]
    before = lane.commits
    for number in range(20):
        durable = asyncio.Event()
        journal.append("decision", "decision", {"n": number}, lambda _record, durable=durable: durable.set())  # type: ignore[misc]
        journal.commit_now()
        await durable.wait()
        for _ in range(5):
            await asyncio.sleep(0)  # what stands in the loop's queue runs
        journal.effects_done("decision", number + 1)
    assert lane.commits - before <= 21, "each decision, and at most once the marks"
    await journal.flush()
    assert journal.marks("decision").effects == 20
    await journal.close()


async def test_a_silence_shows_the_brokers_window_and_the_next_group_does_not_wait_for_one(tmp_path: Path) -> None:
    """A broker that sends no more than 20 messages without an acknowledgement; before it stops the second time, what it waits for is being written."""
    journal = make(tmp_path)
    journal.start()
    lane = journal.lanes["telemetry"]
    durable = asyncio.Semaphore(0)

    def arrive(count: int) -> None:
        for number in range(count):
            journal.append("telemetry", "reading", {"n": number}, lambda _record: durable.release())
            journal.breathe()

    arrive(1)
    await durable.acquire()  # the first one of all does not wait for others
    arrive(20)
    for _ in range(20):
        await durable.acquire()
    assert lane.commits == 2, "the silence began the group"
    arrive(14)
    assert lane.waiting == 14 and lane._group is None, "three quarters of the window, and no less"
    arrive(1)
    assert lane._group is not None, "it begins by itself, five messages before the broker stops"
    for _ in range(15):
        await durable.acquire()
    await journal.close()


async def test_a_new_file_has_pages_of_half_a_block_and_an_old_one_keeps_its_own(tmp_path: Path) -> None:
    journal = make(tmp_path)
    journal.start()
    await append(journal, "decision", 3)
    database = journal.lanes["journal"].database
    assert database.page_bytes == PAGE_BYTES
    await journal.close()
    with sqlite3.connect(database.path) as connection:  # what an agent before this one made
        connection.executescript("PRAGMA journal_mode=DELETE; PRAGMA page_size=4096; VACUUM; PRAGMA journal_mode=WAL;")
    connection.close()
    journal = make(tmp_path)
    journal.start()
    await append(journal, "decision", 3)
    database = journal.lanes["journal"].database
    assert database.page_bytes == 4096
    assert len(await check_whole(journal, "decision")) == 6
    await journal.close()


async def test_a_boot_whose_first_commit_fails_is_known_to_the_second(tmp_path: Path) -> None:
    """Its number is written in the same transaction: remembered after a rollback, the records of the next try would belong to no boot and no reader would find them."""
    journal = make(tmp_path)
    lane = journal.lanes["journal"]
    writer = lane.database.writer
    writer.execute(f"PRAGMA max_page_count={writer.execute('PRAGMA page_count').fetchone()[0] + 1}")
    journal.start()
    done: list[Record] = []
    journal.append("decision", "decision", {"n": "x" * 20_000}, done.append)
    await until(lambda: lane.failed_commits > 0)
    writer.execute("PRAGMA max_page_count=4294967294")
    await journal.flush()
    records = await check_whole(journal, "decision")
    assert [record.boot for record in records] == [journal.boot] and len(done) == 1
    assert (await append(journal, "decision", 1))[0].seq == 2
    await check_whole(journal, "decision")
    await journal.close()


async def test_receipts_free_records_and_the_floor_keeps_the_chain(tmp_path: Path) -> None:
    journal = make(tmp_path, retain_receipted_records=10)
    journal.start()
    records = await append(journal, "decision", 100)
    journal.receipt("decision", 60)
    journal.receipt("decision", 40)  # a late one changes nothing
    await journal.upkeep()
    marks = journal.marks("decision")
    assert (marks.floor, marks.receipted, marks.dropped) == (61, 60, 0)
    assert marks.floor_chain == chain_over(records[:60], CHAIN_START)
    await check_whole(journal, "decision")
    assert await journal.chain_at("decision", 60) == marks.floor_chain
    assert await journal.chain_at("decision", 59) is None
    journal.receipt("decision", 30_000)  # beyond what was ever written
    assert journal.marks("decision").receipted == 100
    await journal.close()


async def test_retention_leaves_what_the_next_start_reads(tmp_path: Path) -> None:
    journal = make(tmp_path, retain_receipted_records=0)
    journal.start()
    await append(journal, "decision", 50)
    journal.receipt("decision", 50)
    journal.hold("decision", 20)
    journal.effects_done("decision", 50)
    await journal.upkeep()
    assert journal.marks("decision").floor == 21
    journal.hold("decision", 50)
    await journal.upkeep()
    assert journal.marks("decision").floor == 51
    await journal.close()


async def test_freeing_a_backlog_leaves_the_wal_as_large_as_it_was_made(tmp_path: Path) -> None:
    """What a release and the giving back of its pages write goes through the WAL too; the control is the same without a checkpoint between."""
    grown: dict[bool, int] = {}
    for planted in (False, True):
        journal = make(tmp_path / str(planted), retain_receipted_records=10)
        journal.start()
        lane = journal.lanes["journal"]
        if planted:
            lane.checkpoint = _no_checkpoint  # type: ignore[method-assign]
        for _ in range(60):
            for number in range(1000):
                journal.append("decision", "decision", {"n": number, "text": "x" * 100}, None)
            await journal.flush()
        await lane.exclusively(lambda: lane.database.checkpoint("TRUNCATE"))  # noqa: B023
        journal.receipt("decision", 60_000)
        journal.effects_done("decision", 60_000)
        for _ in range(8):
            await journal.upkeep()
        assert journal.marks("decision").floor > 59_900
        grown[planted] = lane.database.wal_bytes()
        await journal.close()
    assert 0 < 2 * grown[False] < grown[True], grown  # on a busy machine one checkpoint may not have got all, and then it is two steps large


async def _no_checkpoint() -> None:
    """The planted bug."""


async def test_over_the_cap_the_oldest_telemetry_goes_counted_and_decisions_stay(tmp_path: Path) -> None:
    journal = make(tmp_path, telemetry_max_bytes=1 << 20, max_bytes=1 << 20)
    journal.start()
    for stream in ("telemetry", "decision"):
        for _ in range(3000):
            journal.append(stream, "reading", {"pad": "x" * 700})
    await journal.flush()
    for _ in range(3):
        await journal.upkeep()
    telemetry, decision = journal.marks("telemetry"), journal.marks("decision")
    assert telemetry.floor > 1 and telemetry.dropped == telemetry.floor - 1
    assert (decision.floor, decision.dropped) == (1, 0)
    await check_whole(journal, "telemetry")
    database = journal.lanes["telemetry"].database
    assert database.used_bytes() - database.wal_bytes() <= 1 << 20
    await journal.close()


@pytest.mark.parametrize("where", [0.02, 0.5, 0.9])
async def test_a_damaged_file_is_set_aside_and_numbers_are_never_used_again(tmp_path: Path, where: float) -> None:
    journal = make(tmp_path)
    journal.start()
    written = await append(journal, "decision", 3000)
    journal.put_state("desired", {"generation": 3})
    await journal.close()
    path = tmp_path / "journal.db"
    data = bytearray(path.read_bytes())
    start = int(len(data) * where)
    data[start : start + 16384] = b"\xa5" * 16384
    path.write_bytes(data)
    journal = make(tmp_path)
    assert journal.recoveries and journal.recoveries[0].damage
    journal.start()
    assert journal.marks("decision").next_seq > 3000
    fresh = await append(journal, "decision", 10)
    assert fresh[0].seq > max(record.seq for record in written)
    kept = [record for record in await check_whole(journal, "decision") if record.kind == "decision" and record.seq <= 3000]
    assert all(record == written[record.seq - 1] for record in kept)
    assert list(tmp_path.glob("journal.db.damaged-*"))
    await journal.close()
    again = make(tmp_path)
    assert not again.recoveries
    await again.close()


async def test_a_file_that_is_no_database_or_a_truncated_one_does_not_stop_the_start(tmp_path: Path) -> None:
    for damage in (b"not a database at all", b""):
        journal = make(tmp_path)
        journal.start()
        await append(journal, "decision", 20)
        top = journal.durable("decision")
        await journal.close()
        path = tmp_path / "journal.db"
        path.write_bytes(damage if damage else path.read_bytes()[:5000])
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        journal = make(tmp_path)
        journal.start()
        records = await append(journal, "decision", 5)
        assert records[0].seq > top
        await journal.close()


async def test_a_lost_side_file_or_database_alone_keeps_the_numbers(tmp_path: Path) -> None:
    journal = make(tmp_path)
    journal.start()
    await append(journal, "decision", 20)
    await journal.close()
    (tmp_path / "marks.json").write_text("{broken")
    journal = make(tmp_path)
    assert journal.durable("decision") == 20 and journal.boot_n >= 2
    await journal.close()


async def test_moving_above_what_another_journal_used(tmp_path: Path) -> None:
    journal = make(tmp_path)
    journal.start()
    await append(journal, "decision", 30)
    journal.receipt("decision", 10)
    await journal.rebase("decision", 500)
    marks = journal.marks("decision")
    assert (marks.floor, marks.next_seq, marks.receipted) == (501, 521, 500)
    records = await check_whole(journal, "decision")
    assert [json.loads(record.body)["n"] for record in records] == list(range(10, 30))
    assert (await append(journal, "decision", 1))[0].seq == 521
    await journal.close()


CHILD = """
import asyncio, sys
from pathlib import Path
from edge_runtime.clock import SystemClock
from edge_runtime.journal import Journal, JournalSettings
async def main():
    journal = Journal(JournalSettings(Path(sys.argv[1]), ballast_bytes=0, min_free_bytes=0), SystemClock())
    journal.start()
    n = 0
    def durable(record):
        print(record.seq, record.body, flush=True)
    while True:
        for _ in range(7):
            journal.append("decision", "decision", {"n": n}, durable)
            n += 1
        await asyncio.sleep(0)
        while journal.lanes["journal"].waiting > 200:
            await asyncio.sleep(0.001)
asyncio.run(main())
"""


def kill_at_random(folder: Path, seconds: float, child: str = CHILD) -> dict[int, str]:
    """Start a writer, kill it -9 after a while; what it said was durable."""
    process = subprocess.Popen([sys.executable, "-c", child, str(folder)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert process.stdout is not None
    first = process.stdout.readline()
    timer = subprocess.Popen(["sleep", str(seconds)])
    lines = [first]
    os.set_blocking(process.stdout.fileno(), True)
    timer_done = False
    while not timer_done:
        lines.append(process.stdout.readline())
        timer_done = timer.poll() is not None
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read()
    process.wait()
    acknowledged = {}
    for line in "".join([*lines, rest]).splitlines():
        number, _, body = line.partition(" ")
        if number.isdigit() and body.endswith("}"):
            acknowledged[int(number)] = body
    return acknowledged


async def test_kill_9_loses_nothing_acknowledged_and_doubles_nothing(tmp_path: Path) -> None:
    draw = random.Random(5)
    acknowledged: dict[int, str] = {}
    for _ in range(5):
        said = kill_at_random(tmp_path, draw.uniform(0.05, 0.4))
        assert said and not set(said) & set(acknowledged)
        acknowledged |= said
    journal = make(tmp_path)
    assert not journal.clean and not journal.recoveries
    records = {record.seq: record.body for record in await check_whole(journal, "decision")}
    assert all(records.get(seq) == body for seq, body in acknowledged.items())
    await journal.close()


@pytest.mark.parametrize("planted", [False, True])
async def test_a_wal_that_is_made_large_keeps_its_frames_and_a_start_does_not_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: bool) -> None:
    """Records before and after it, and what a reader of its own finds in copies of the files, as a kill would leave them; the control writes zeros over the frames too."""
    def all_zeros(storage: FileStorage, path: Path, size: int) -> None:
        path.write_bytes(bytes(size))

    if planted:
        monkeypatch.setattr(FileStorage, "lengthen", all_zeros)
    journal = make(tmp_path / "journal")
    journal.start()
    lane = journal.lanes["journal"]
    before = await append(journal, "decision", 50)
    assert lane.database.wal_bytes() < 1 << 18
    journal.grow()
    await lane.exclusively(lambda: None)
    assert lane.database.wal_bytes() == WAL_GROWN_BYTES
    copies = [shutil.copytree(tmp_path / "journal", tmp_path / "grown")]
    after = before + await append(journal, "decision", 50)
    copies.append(shutil.copytree(tmp_path / "journal", tmp_path / "used"))
    assert lane.database.wal_bytes() == WAL_GROWN_BYTES
    found = []
    for copy, records in zip(copies, (before, after), strict=True):
        again = make(copy)
        found.append((again.recoveries, [record.seq for record in await check_whole(again, "decision")][: len(records)] == [record.seq for record in records]))
        await again.close()
    assert (found == [([], True)] * 2) is not planted, found
    await journal.close()


async def test_the_kill_9_checker_can_fail(tmp_path: Path) -> None:
    # The planted bug: a record is called durable when it is appended. The child then dies before the loop had a turn to commit it.
    planted = CHILD.replace('{"n": n}, durable)', '{"n": n}); print(n + 1, \'{"n":%d}\' % n, flush=True)').replace(
        "        await asyncio.sleep(0)\n", "        if n >= 700: os.kill(os.getpid(), 9)\n        await asyncio.sleep(0)\n"
    ).replace("import asyncio, sys", "import asyncio, os, sys")
    said = kill_at_random(tmp_path, 0.3, planted)
    journal = make(tmp_path)
    records = {record.seq: record.body for record in await check_whole(journal, "decision")}
    assert not all(records.get(seq) == body for seq, body in said.items())
    await journal.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 24 MiB of its own."""
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system needs root to be mounted")
    target = tmp_path / "small"
    target.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(target)], capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield target
    subprocess.run(["umount", "-l", str(target)], check=True)


async def test_a_full_disk_stops_telemetry_first_and_decisions_go_on(small_disk: Path) -> None:
    journal = Journal(JournalSettings(small_disk / "j", ballast_bytes=2 << 20, min_free_bytes=4 << 20), SystemClock())
    journal.start()
    for _ in range(16):
        for _ in range(1500):
            journal.append("telemetry", "reading", {"pad": "x" * 900})
        await asyncio.wait_for(journal.flush(), 60)
        await journal.upkeep()
    assert journal.marks("telemetry").dropped > 0 or not journal.telemetry_open
    filler = small_disk / "filler"
    for _ in range(60):  # somebody else fills the disk again and again, until nothing is left to give up
        with open(filler, "ab", buffering=0) as handle, pytest.raises(OSError):
            while True:
                handle.write(bytes(65536))
        await journal.upkeep()
        if not journal.telemetry_open:
            break
    assert not journal.telemetry_open and journal.marks("telemetry").dropped > 0
    assert journal.append("telemetry", "reading", {"a": 1}) is False and journal.refused_telemetry == 1
    for _ in range(5):
        records = await asyncio.wait_for(append(journal, "decision", 400), 60)
        assert len(records) == 400
    filler.unlink()
    await journal.upkeep()
    assert journal.telemetry_open and not journal.errors
    await asyncio.wait_for(append(journal, "telemetry", 10), 60)
    await check_whole(journal, "decision")
    await check_whole(journal, "telemetry")
    await journal.close()


async def test_effects_go_on_when_the_journal_cannot_be_written(tmp_path: Path) -> None:
    journal = make(tmp_path)
    journal.start()
    lane = journal.lanes["journal"]
    broken = asyncio.Event()
    original = lane.database.commit

    def fail(group: Any) -> None:
        # A disk that answers EIO cannot be had here without device-mapper; the error is raised where SQLite would raise it.
        raise sqlite3.OperationalError("disk I/O error")

    lane.database.commit = fail  # type: ignore[method-assign]
    acted: list[Record] = []
    journal.append("decision", "decision", {"n": 1}, lambda record: (acted.append(record), broken.set()))  # type: ignore[func-returns-value]
    await asyncio.wait_for(broken.wait(), 30)
    assert lane.acted_undurable == 1 and journal.errors
    lane.database.commit = original  # type: ignore[method-assign]
    await asyncio.wait_for(journal.flush(), 30)
    assert len(acted) == 1 and journal.durable("decision") == 1 and not journal.errors
    await journal.close()


async def test_while_the_disk_stays_dead_every_record_that_arrives_has_its_effect_once_and_keeps_its_number(tmp_path: Path) -> None:
    journal = Journal(JournalSettings(tmp_path, ballast_bytes=0, pending_max=100), SystemClock())
    journal.start()
    await append(journal, "decision", 5)
    lane, telemetry = journal.lanes["journal"], journal.lanes["telemetry"]
    originals = {name: one.database.commit for name, one in journal.lanes.items()}
    acted: list[Record] = []

    def fail(group: Any) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    for one in journal.lanes.values():
        one.database.commit = fail  # type: ignore[method-assign]
    for number in range(60):
        assert journal.append("decision", "decision", {"n": number}, acted.append)
        assert journal.append("telemetry", "reading", {"n": number}, acted.append)
        if number % 7 == 0:
            await until(lambda number=number: len(acted) == 2 * (number + 1), 30, "every effect is done")  # type: ignore[misc]
    await until(lambda: len(acted) == 120, 30, "every effect is done")
    assert lane.acted_undurable == telemetry.acted_undurable == 60 and journal.durable("decision") == 5
    # As much as may wait is waiting: telemetry is refused, decisions wait for the disk.
    for number in range(60, 110):
        journal.append("decision", "decision", {"n": number}, acted.append)
        journal.append("telemetry", "reading", {"n": number}, acted.append)
    await until(lambda: len(acted) == 200, 30, "effects up to the limit")
    assert journal.refused_telemetry == 10 and lane.waiting == 110 and telemetry.waiting == 100
    for name, one in journal.lanes.items():
        one.database.commit = originals[name]  # type: ignore[method-assign]
    await asyncio.wait_for(journal.flush(), 30)
    await until(lambda: len(acted) == 210, what="the rest")
    await asyncio.wait_for(append(journal, "decision", 3), 30)
    assert not journal.errors and journal.durable("decision") == 118
    kept = {record.seq: record for record in (await journal.read("decision", 1, 1000, 1 << 20))[0]}
    decided = [record for record in acted if record.kind == "decision"]
    assert [record.seq for record in decided] == list(range(6, 116)) and all(kept[record.seq] == record for record in decided)
    await check_whole(journal, "decision")
    await check_whole(journal, "telemetry")
    await journal.close()


def test_the_planner_says_how_long_it_lasts() -> None:
    rate = GrowthRate()
    for _ in range(100):
        rate.observe(10_000, 1000)  # 10 kB a second
    found = plan({"telemetry": rate}, {"telemetry": 0}, {"telemetry": 10**12}, {"telemetry": 1.0}, 3_600_000_000, 0, 72)
    assert found.outage_hours == pytest.approx(100, rel=0.02) and not found.alarm
    found = plan({"telemetry": rate}, {"telemetry": 0}, {"telemetry": 10**9}, {"telemetry": 1.0}, 3_600_000_000, 0, 72)
    assert found.outage_hours == pytest.approx(27.8, rel=0.02) and found.alarm
    half = plan({"telemetry": rate}, {"telemetry": 10**9}, {"telemetry": 10**9}, {"telemetry": 0.5}, 0, 0, 72)
    assert half.outage_hours == pytest.approx(13.9, rel=0.02)


def test_chunks_are_powers_of_two_and_add_up() -> None:
    for count in range(1, 700):
        chunks = list(insert_chunks(count))
        assert sum(chunks) == count and all(chunk & (chunk - 1) == 0 and chunk <= 128 for chunk in chunks)


def test_reservations_are_ahead_of_what_is_written(tmp_path: Path) -> None:
    async def run() -> None:
        journal = make(tmp_path)
        journal.start()
        await append(journal, "decision", 3)
        assert json.loads((tmp_path / "marks.json").read_text())["reserved"]["decision"] >= RESERVE_BLOCK
        await journal.close()

    asyncio.run(run())
