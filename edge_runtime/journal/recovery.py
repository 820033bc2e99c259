"""Opening the journal whatever state the disk is in: check, quarantine, rebuild. Never a refusal to start.

A damaged file is set aside (not deleted) and what can be read of it is copied into a new one. Sequence numbers are never given
twice: a small side file reserves them ahead in blocks, so that a rebuilt journal continues above everything that may have been sent.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any

from ..contract.lean_dataclass import dataclass, field
from ..contract.records import CHAIN_START, Record
from .database import BUSY_TIMEOUT_MS, WAL_GROWN_BYTES, Group, JournalDatabase, StreamMarks
from .storage import FILES, Storage, is_full, write_durably

RESERVE_BLOCK = 10_000
"""Sequence numbers reserved ahead: one small fsync per 10,000 records, and at most so many `lost` records after a rebuild."""

QUARANTINE_KEEP = 2
"""Damaged files kept per database for a person to look at; older ones are deleted to bound the disk."""

CHECK_ALWAYS_BYTES = 64 * 1024 * 1024
"""Files up to this size are checked at every boot; larger telemetry only after an unclean stop (quick_check reads it all)."""

OPEN_TRIES = 2
"""A disk that was away for a moment must not have a whole file set aside; one that fails twice and takes writes meanwhile has a bad file."""

TROUBLE = ("disk I/O error", "unable to open", "readonly", "read-only", "out of memory", "locking protocol")
"""SQLite's words for what is wrong around a file and not in it."""

SALVAGE_MAX = 5_000_000
"""Records copied out of a damaged file at most: bounds the time of a boot."""


@dataclass(slots=True)
class SideFile:
    """`marks.json`: the boot counter and the reserved sequence numbers, outside of any database; `block` numbers are reserved at once."""

    path: Path
    boot_n: int = 0
    reserved: dict[str, int] = field(default_factory=dict)
    storage: Storage = FILES
    block: int = RESERVE_BLOCK

    @staticmethod
    def load(path: Path, storage: Storage = FILES, block: int = RESERVE_BLOCK) -> "SideFile":
        """The side file, empty where it is missing or damaged (the databases then say how far things went)."""
        side = SideFile(path, storage=storage, block=block)
        try:
            value: Any = json.loads(storage.read(path))
            side.boot_n = max(0, int(value["boot_n"]))
            side.reserved = {str(name): max(0, int(upto)) for name, upto in value["reserved"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return SideFile(path, storage=storage, block=block)
        return side

    def save(self) -> None:
        """Write it durably."""
        write_durably(self.storage, self.path, json.dumps({"boot_n": self.boot_n, "reserved": self.reserved}).encode())

    def reserve(self, stream: str, seq: int) -> None:
        """Make sure that `seq` and a block above it are reserved before it is used."""
        if seq > self.reserved.get(stream, 0):
            self.reserved[stream] = seq + self.block
            self.save()


@dataclass(slots=True)
class Recovery:
    """What happened to one database at boot."""

    database: str
    damage: str = ""
    quarantined: str = ""
    salvaged: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)


def open_checked(
    path: Path, streams: tuple[str, ...], side: SideFile, *, unclean: bool, stamp: tuple[int, int, str], boot: str, wal_bytes: int = WAL_GROWN_BYTES
) -> tuple[JournalDatabase, Recovery]:
    """Open `path`, rebuilding it where it is damaged, or where it is gone and numbers of its streams were reserved.

    A rebuild is made beside the damaged file and takes its place when it is whole: a power cut at any moment leaves one of the two.

    Raises `sqlite3.OperationalError` or OSError where the disk is full or takes nothing at all, or another process holds the file for too long.

    Args:
        side: reserved sequence numbers; updated. Its storage holds the database too.
        unclean: the last stop was not orderly.
        stamp: monotonic ms, wall ms and quality for `lost` records.
        boot: this boot's id.
    """
    recovery = Recovery(path.stem)
    storage = side.storage
    if storage.exists(_rebuilt(path)):
        recovery.damage = "an earlier rebuild was cut short; it is finished now"
        recovery.quarantined = _take_place(storage, path, stamp[1])
    existed = storage.exists(path) and storage.size(path) > 0
    damage = "" if existed or not any(side.reserved.get(stream) for stream in streams) else "the file is missing"
    for attempt in range(OPEN_TRIES):
        if damage:
            break
        database = JournalDatabase(path, streams, storage=storage, wal_bytes=wal_bytes)
        try:
            database.open()
            thorough = existed and (unclean or storage.size(path) <= CHECK_ALWAYS_BYTES)
            if thorough:
                result = database.writer.execute("PRAGMA quick_check(1)").fetchone()[0]
                if result != "ok":
                    raise sqlite3.DatabaseError(f"quick_check: {result}")
            _check_marks(database, thorough)
            return database, recovery
        except sqlite3.Error as error:
            database.close()
            if is_full(error) or "locked" in str(error):
                raise  # nothing is wrong with the file: it must not be set aside
            if any(text in str(error) for text in TROUBLE) and attempt + 1 < OPEN_TRIES:
                _prove_writable(storage, path)
                continue
            damage = str(error)
    recovery.damage = damage
    salvaged, marks, state = _salvage(storage, path, streams) if existed else ({}, {}, {})
    building = path.with_name(path.name + ".building")
    _remove(storage, building)
    database = JournalDatabase(building, streams, storage=storage, wal_bytes=wal_bytes)
    database.open()
    try:
        for stream in streams:
            _rebuild(database, stream, salvaged.get(stream, []), marks.get(stream), side, stamp, boot, recovery)
        if state:
            database.commit(Group(state=dict(state)))
        database.checkpoint("TRUNCATE")
    finally:
        database.close()
    storage.sync_directory(path.parent)
    storage.replace(building, _rebuilt(path))
    storage.sync_directory(path.parent)
    recovery.quarantined = _take_place(storage, path, stamp[1])
    database = JournalDatabase(path, streams, storage=storage, wal_bytes=wal_bytes)
    database.open()
    return database, recovery


def _rebuilt(path: Path) -> Path:
    """A rebuild that is whole and has not taken its place yet."""
    return path.with_name(path.name + ".rebuilt")


def _take_place(storage: Storage, path: Path, wall_ms: int) -> str:
    """Set what is at `path` aside and put the rebuild there; each step is durable before the next, and may be done again."""
    name = _quarantine(storage, path, wall_ms)
    storage.sync_directory(path.parent)
    storage.replace(_rebuilt(path), path)
    storage.sync_directory(path.parent)
    return name


def _prove_writable(storage: Storage, path: Path) -> None:
    """Raises OSError where the disk takes nothing: then it is the disk that is ill, and the file may be whole."""
    probe = path.with_name("probe")
    write_durably(storage, probe, b"")
    storage.remove(probe)


def _remove(storage: Storage, path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        storage.remove(Path(f"{path}{suffix}"))


def _check_marks(database: JournalDatabase, thorough: bool) -> None:
    """The marks must agree with the records: the last record is `next_seq - 1` and its chain is the stream's; `thorough` counts them."""
    for stream, marks in database.marks().items():
        first, last = database.reader.execute(f"SELECT (SELECT min(seq) FROM records_{stream}), (SELECT max(seq) FROM records_{stream})").fetchone()
        if first is None:
            if marks.floor != marks.next_seq:
                raise sqlite3.DatabaseError(f"stream {stream}: marks say {marks.floor}..{marks.next_seq - 1}, no record is there")
        elif (first, last + 1) != (marks.floor, marks.next_seq):
            raise sqlite3.DatabaseError(f"stream {stream}: records {first}..{last} against marks {marks.floor}..{marks.next_seq - 1}")
        elif thorough and database.reader.execute(f"SELECT count(*) FROM records_{stream}").fetchone()[0] != last - first + 1:
            raise sqlite3.DatabaseError(f"stream {stream}: records are missing between {first} and {last}")
        elif database.chain_at(stream, last) != marks.chain:
            raise sqlite3.DatabaseError(f"stream {stream}: the last record's chain is not the stream's")


def _salvage(storage: Storage, path: Path, streams: tuple[str, ...]) -> tuple[dict[str, list[tuple[Record, bytes]]], dict[str, StreamMarks], dict[str, str]]:
    """The newest unbroken run of each stream whose chain proves it, the marks and the state, as far as they can be read."""
    records: dict[str, list[tuple[Record, bytes]]] = {}
    marks: dict[str, StreamMarks] = {}
    state: dict[str, str] = {}
    try:
        connection = storage.connect(path, BUSY_TIMEOUT_MS / 1000)
    except sqlite3.Error:
        return records, marks, state
    try:
        boots = _read_rows(connection, "SELECT number, boot FROM boots")
        names = dict(boots)
        for stream in streams:
            run: list[tuple[Record, bytes]] = []
            for row in _read_rows(connection, f"SELECT seq, boot, mono, wall, tq, kind, body, chain FROM records_{stream} ORDER BY seq DESC LIMIT {SALVAGE_MAX}"):
                try:
                    record, chain = Record(row[0], names[row[1]], *row[2:7]), bytes(row[7])
                except (KeyError, TypeError):
                    break
                if run and (record.seq != run[-1][0].seq - 1 or run[-1][0].chain(chain) != run[-1][1]):
                    break
                run.append((record, chain))
            records[stream] = run[::-1]
        for stream, *values in _read_rows(connection, "SELECT stream, next_seq, receipted, floor, floor_chain, chain, dropped, effects FROM streams"):
            marks[stream] = StreamMarks(*values)
        state = dict(_read_rows(connection, "SELECT key, value FROM state"))
    finally:
        connection.close()
    return records, marks, state


def _read_rows(connection: sqlite3.Connection, query: str) -> list[Any]:
    """Rows up to the first one that cannot be read."""
    rows: list[Any] = []
    try:
        for row in connection.execute(query):
            rows.append(row)
    except (sqlite3.Error, UnicodeDecodeError, OverflowError):
        pass  # what was read before the damage is what can be saved
    return rows


def _rebuild(
    database: JournalDatabase, stream: str, run: list[tuple[Record, bytes]], old: StreamMarks | None, side: SideFile,
    stamp: tuple[int, int, str], boot: str, recovery: Recovery,
) -> None:
    """Write a salvaged run and, above it, `lost` records up to the reservation; sequence numbers then continue above both."""
    if run and not (run[0][0].seq == 1 or (old is not None and old.floor == run[0][0].seq)):
        # The chain before the first saved record was in the damage. That record is given up so that the rest stays provable: its
        # own chain is the chain before the second.
        first_chain: bytes | None = run[0][1]
        run = run[1:]
    else:
        first_chain = None
    last = run[-1][0].seq if run else (old.next_seq - 1 if old else 0)
    reserved = max(side.reserved.get(stream, 0), last)
    marks = StreamMarks()
    if old is not None:
        marks.receipted, marks.dropped, marks.effects = min(old.receipted, reserved), old.dropped, old.effects
    if run:
        marks.floor = run[0][0].seq
        if first_chain is not None:
            marks.floor_chain = first_chain
        else:
            marks.floor_chain = CHAIN_START if marks.floor == 1 or old is None else old.floor_chain
        chain = run[-1][1]
        rows = list(run)
        lost = reserved - last
        for seq in range(last + 1, reserved + 1):
            record = Record(seq, boot, *stamp, "lost", "{}")
            chain = record.chain(chain)
            rows.append((record, chain))
        marks.chain = chain
    else:
        rows, lost = [], max(0, reserved - marks.receipted)
        marks.floor = reserved + 1
        marks.dropped += lost
    marks.next_seq = reserved + 1
    for start in range(0, len(rows), 5000):
        part = rows[start : start + 5000]
        done = start + 5000 >= len(rows)
        step = marks if done else StreamMarks(part[-1][0].seq + 1, marks.receipted, marks.floor, marks.floor_chain, part[-1][1], marks.dropped, marks.effects)
        database.commit(Group(records={stream: part}, marks={stream: step}))
    if not rows:
        database.commit(Group(marks={stream: marks}))
    recovery.salvaged[stream] = len(run)
    recovery.lost[stream] = lost


def _quarantine(storage: Storage, path: Path, wall_ms: int) -> str:
    """Set a damaged file and its companions aside; keep the newest `QUARANTINE_KEEP`."""
    target = path.with_name(f"{path.name}.damaged-{wall_ms}")
    for suffix in ("", "-wal", "-shm"):
        source = Path(f"{path}{suffix}")
        if storage.exists(source):
            storage.replace(source, Path(f"{target}{suffix}"))
    kept = [name for name in storage.names(path.parent, f"{path.name}.damaged-*") if not name.endswith(("-wal", "-shm"))]
    for old in kept[:-QUARANTINE_KEEP]:
        _remove(storage, path.with_name(old))
    return target.name if target.name in kept else ""
