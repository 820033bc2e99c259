"""One SQLite file of the journal: schema, group commit, reads, receipts, caps. Synchronous; its owner decides on threads.

One connection writes, a second one reads (WAL: neither waits for the other). Every statement that writes many rows is one
`sqlite3_step`, because Python hands the interpreter lock back after each, and a busy event loop would take it 5 ms a time.
"""

import contextlib
import functools
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..contract.lean_dataclass import dataclass, field
from ..contract.records import CHAIN_START, Record
from ..contract.streams import STREAMS
from .storage import FILES, Storage

SCHEMA_VERSION = 1

WAL_LIMIT_BYTES = 12 * 1024 * 1024
"""`journal_size_limit`: what the WAL is cut back to after a checkpoint; without it a long reader lets it grow for ever. Above what
`grow_wal` makes, so that the WAL is not cut in ordinary operation."""

WAL_GROWN_BYTES = 4 * 1024 * 1024
"""What `grow_wal` makes of a new WAL. A commit that overwrites blocks the file has already costs 0.13 ms here, one that appends 0.23 ms,
because the file's size has to be made durable as well."""

CHECKPOINT_BYTES = 7 * WAL_GROWN_BYTES // 8
"""Bytes of frames after which the WAL is checkpointed: before the end of what `grow_wal` made. A checkpoint holds two or three commits
up by a millisecond, which at 500 a second is one in 300; recovery at boot reads at most these 3.5 MiB."""

CHECKPOINT_LATE_BYTES = 16 * 1024 * 1024
"""Bytes of pages after which a commit itself checkpoints: only where the checkpoints beside it (`checkpoint_beside`) did not keep up."""

PAGE_BYTES = 2048
"""Of a new file; one that is there keeps its own. A commit writes the whole page that the last record stands on, and the flush of 4 KiB across two blocks takes
a tenth longer than that of 2 KiB (0.35 and 0.32 ms here, 1 KiB no less). Smaller than a block of the disk asks nothing new of it: a WAL's frames never were aligned to blocks."""

FRAME_HEADER_BYTES = 24
"""Before each page in the WAL (SQLite file format, 4.1)."""

DELETE_SLICE = 500
"""Rows deleted per transaction: 0.24 ms here, so that freeing a backlog never holds a decision's commit up."""

VACUUM_BYTES = 1024 * 1024
"""Given back to the file system per step."""

BUSY_TIMEOUT_MS = 2_000
"""How long a statement waits for another process (novactl) that holds a lock."""

INSERT_CHUNK_MAX = 128
"""Rows of one INSERT: 8 values each are 1,024 variables; SQLite takes 32,766 since 3.32 (2020)."""


@dataclass(slots=True)
class StreamMarks:
    """What is known of one stream. All counts are durable once the commit that carries them returns.

    Attributes:
        next_seq: the seq that the next record gets.
        receipted: the hub holds everything up to here.
        floor: the first seq still on disk.
        floor_chain: the chain before `floor`.
        chain: the chain after `next_seq - 1`.
        dropped: unreceipted records that were dropped, ever.
        effects: the effects of every record up to here are done (or expired).
    """

    next_seq: int = 1
    receipted: int = 0
    floor: int = 1
    floor_chain: bytes = CHAIN_START
    chain: bytes = CHAIN_START
    dropped: int = 0
    effects: int = 0

    def copy(self) -> "StreamMarks":
        """One of its own, at a fifth of what `dataclasses.replace` takes: there is one per commit."""
        return StreamMarks(self.next_seq, self.receipted, self.floor, self.floor_chain, self.chain, self.dropped, self.effects)


@dataclass(slots=True)
class Group:
    """What one transaction writes: records with their chains per stream, the marks after them, and state documents."""

    records: dict[str, list[tuple[Record, bytes]]] = field(default_factory=dict)
    marks: dict[str, StreamMarks] = field(default_factory=dict)
    state: dict[str, str | None] = field(default_factory=dict)


def insert_chunks(count: int) -> Iterable[int]:
    """`count` split into powers of two up to `INSERT_CHUNK_MAX`, so that few distinct statements are compiled."""
    size = INSERT_CHUNK_MAX
    while count:
        while size > count:
            size //= 2
        yield size
        count -= size


@functools.cache
def _insert_of(stream: str, size: int) -> str:
    return f"INSERT INTO records_{stream} VALUES {','.join(('(?,?,?,?,?,?,?,?)',) * size)}"


class JournalDatabase:
    """One file. `open` first; every method but `read*` belongs to the one writing thread.

    Args:
        path: the file; `-wal` and `-shm` stand beside it.
        streams: names of the streams it holds.
        synchronous: `FULL` (each commit survives power loss) unless a test plants a fault.
        storage: the disk.
        wal_bytes: what `grow_wal` makes of a new WAL.
    """

    def __init__(self, path: Path, streams: Sequence[str], synchronous: str = "FULL", storage: Storage = FILES, wal_bytes: int = WAL_GROWN_BYTES) -> None:
        self.path = path
        self._wal = path.with_name(path.name + "-wal")
        self.streams = tuple(streams)
        self._synchronous = synchronous
        self._storage = storage
        self._wal_bytes = wal_bytes
        self._write: sqlite3.Connection | None = None
        self._read: sqlite3.Connection | None = None
        self._beside: sqlite3.Connection | None = None
        self.page_bytes = PAGE_BYTES
        self._boots: dict[str, int] = {}
        self._new_boots: list[str] = []
        """Those first seen in the transaction under way."""

    # -- opening -------------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open or make the file. Raises `sqlite3.Error` where it is not a healthy database (see recovery.py)."""
        self._write = self._connect()
        connection = self._write
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version < SCHEMA_VERSION:  # it writes a page even where nothing changes, and a full disk has none
            connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={self._synchronous}")
        self.page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
        connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_LATE_BYTES // self.page_bytes}")
        if version > SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"{self.path} has schema {version}, this agent knows {SCHEMA_VERSION}: start the newer agent")
        if version < SCHEMA_VERSION:
            self._create(connection)
        self._read = self._connect()
        self._read.execute("PRAGMA query_only=ON")
        self._boots = {boot: number for number, boot in connection.execute("SELECT number, boot FROM boots")}

    def _connect(self) -> sqlite3.Connection:
        connection = self._storage.connect(self.path, BUSY_TIMEOUT_MS / 1000)
        connection.execute("PRAGMA mmap_size=0")
        # Debian's SQLite writes zeros over what is deleted: each page of the journal would go to the disk once more when its records are freed.
        connection.execute("PRAGMA secure_delete=OFF")
        connection.execute("PRAGMA cache_size=-512")
        connection.execute(f"PRAGMA journal_size_limit={WAL_LIMIT_BYTES}")
        connection.execute("PRAGMA temp_store=MEMORY")
        return connection

    def _create(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        for stream in self.streams:
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS records_{stream} (seq INTEGER PRIMARY KEY, boot INTEGER NOT NULL, mono INTEGER NOT NULL, "
                "wall INTEGER NOT NULL, tq TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, chain BLOB NOT NULL)"
            )
        connection.execute("CREATE TABLE IF NOT EXISTS boots (number INTEGER PRIMARY KEY AUTOINCREMENT, boot TEXT NOT NULL UNIQUE)")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS streams (stream TEXT PRIMARY KEY, next_seq INTEGER NOT NULL, receipted INTEGER NOT NULL, "
            "floor INTEGER NOT NULL, floor_chain BLOB NOT NULL, chain BLOB NOT NULL, dropped INTEGER NOT NULL, effects INTEGER NOT NULL) WITHOUT ROWID"
        )
        connection.execute("CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")

    def close(self) -> None:
        """Close both connections; the last one checkpoints and removes the WAL."""
        for connection in (self._beside, self._read, self._write):
            if connection is not None:
                connection.close()
        self._beside = self._read = self._write = None

    @property
    def writer(self) -> sqlite3.Connection:
        """The writing connection."""
        if self._write is None:
            raise sqlite3.ProgrammingError(f"{self.path} is not open")
        return self._write

    @property
    def reader(self) -> sqlite3.Connection:
        """The reading connection."""
        if self._read is None:
            raise sqlite3.ProgrammingError(f"{self.path} is not open")
        return self._read

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of frames after which the WAL is checkpointed beside the commits; see `CHECKPOINT_BYTES`."""
        return CHECKPOINT_BYTES * self._wal_bytes // WAL_GROWN_BYTES

    @property
    def frame_bytes(self) -> int:
        """Bytes of the WAL that a page takes."""
        return self.page_bytes + FRAME_HEADER_BYTES

    # -- writing -------------------------------------------------------------------------------------------------------------

    def grow_wal(self) -> None:
        """Make the WAL's file as large as it will be, while no commit runs: zeros behind its frames. To SQLite they are no frame, as their salt is not the WAL's (file format, 4.1).

        Nothing of the database changes. A full disk only means that the WAL grows later.
        """
        with contextlib.suppress(OSError):
            self._storage.lengthen(self._wal, self._wal_bytes)

    def commit(self, group: Group) -> None:
        """Write a group in one transaction; on any error nothing of it is written and the error is raised."""
        connection = self.writer
        if len(group.records) == 1 and not group.marks and not group.state:
            (stream, rows), = group.records.items()
            number = self._boots.get(rows[0][0].boot)
            if len(rows) == 1 and number is not None:
                # One decision: a single statement is a transaction of its own, at a third of the calls.
                record, chain = rows[0]
                connection.execute(
                    _insert_of(stream, 1), (record.seq, number, record.mono_ms, record.wall_ms, record.quality, record.kind, record.body, chain),
                )
                return
        connection.execute("BEGIN IMMEDIATE")
        try:
            for stream, rows in group.records.items():
                self._insert(connection, stream, rows)
            for stream, marks in group.marks.items():
                self._put_marks(connection, stream, marks)
            for key, value in group.state.items():
                if value is None:
                    connection.execute("DELETE FROM state WHERE key=?", (key,))
                else:
                    connection.execute("INSERT INTO state VALUES (?,?) ON CONFLICT(key) DO UPDATE SET value=excluded.value", (key, value))
            connection.execute("COMMIT")
            self._new_boots.clear()
        except BaseException:
            # Its number went with the transaction. Were it remembered, the next try would write records of a boot that the file does not know, and no reader finds those.
            while self._new_boots:
                del self._boots[self._new_boots.pop()]
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _insert(self, connection: sqlite3.Connection, stream: str, rows: Sequence[tuple[Record, bytes]]) -> None:
        start = 0
        for size in insert_chunks(len(rows)):
            flat: list[object] = []
            for record, chain in rows[start : start + size]:
                flat += (
                    record.seq, self._boot_number(connection, record.boot), record.mono_ms, record.wall_ms, record.quality, record.kind,
                    record.body, chain,
                )
            connection.execute(_insert_of(stream, size), flat)
            start += size

    def _boot_number(self, connection: sqlite3.Connection, boot: str) -> int:
        number = self._boots.get(boot)
        if number is None:
            connection.execute("INSERT OR IGNORE INTO boots (boot) VALUES (?)", (boot,))
            number = connection.execute("SELECT number FROM boots WHERE boot=?", (boot,)).fetchone()[0]
            assert isinstance(number, int)
            self._boots[boot] = number
            self._new_boots.append(boot)
        return number

    @staticmethod
    def _put_marks(connection: sqlite3.Connection, stream: str, marks: StreamMarks) -> None:
        connection.execute(
            "INSERT INTO streams VALUES (?,?,?,?,?,?,?,?) ON CONFLICT(stream) DO UPDATE SET next_seq=excluded.next_seq, "
            "receipted=excluded.receipted, floor=excluded.floor, floor_chain=excluded.floor_chain, chain=excluded.chain, "
            "dropped=excluded.dropped, effects=excluded.effects",
            (stream, marks.next_seq, marks.receipted, marks.floor, marks.floor_chain, marks.chain, marks.dropped, marks.effects),
        )

    def release(self, stream: str, marks: StreamMarks, upto: int, rows: int = DELETE_SLICE) -> int:
        """Delete up to `rows` of the oldest records with seq <= `upto`; `marks` (floor, dropped) are updated and stored with it.

        Records above `marks.receipted` count as dropped. Returns how many rows went.
        """
        connection = self.writer
        last = min(upto, marks.next_seq - 1, marks.floor + rows - 1)
        if last < marks.floor:
            return 0
        connection.execute("BEGIN IMMEDIATE")
        try:
            row = connection.execute(f"SELECT chain FROM records_{stream} WHERE seq=?", (last,)).fetchone()
            count = connection.execute(f"DELETE FROM records_{stream} WHERE seq<=?", (last,)).rowcount
            dropped = max(0, last - max(marks.receipted, marks.floor - 1))
            after = StreamMarks(
                marks.next_seq, marks.receipted, last + 1, row[0] if row else marks.floor_chain, marks.chain, marks.dropped + dropped, marks.effects
            )
            self._put_marks(connection, stream, after)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        marks.floor, marks.floor_chain, marks.dropped = after.floor, after.floor_chain, after.dropped
        return int(count)

    def rebase(self, stream: str, marks: StreamMarks, above: int) -> None:
        """Move every unreceipted record of `stream` to sequence numbers after `above`, in order; `marks` are updated with it.

        For a journal whose name already has records at the hub that it never wrote: none of its own may be taken for one of those.
        """
        connection = self.writer
        kept = max(marks.floor, marks.receipted + 1)
        shift = above + 1 - kept
        after = StreamMarks(above + 1, above, above + 1, CHAIN_START, CHAIN_START, marks.dropped, above + max(0, marks.effects - kept + 1))
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute(f"DELETE FROM records_{stream} WHERE seq<?", (kept,))
            # Upwards in two steps: through negative numbers, because a rowid may not collide on the way.
            connection.execute(f"UPDATE records_{stream} SET seq=-(seq+?)", (shift,))
            connection.execute(f"UPDATE records_{stream} SET seq=-seq")
            cursor = connection.execute(
                f"SELECT seq, boots.boot, mono, wall, tq, kind, body FROM records_{stream} AS r CROSS JOIN boots ON boots.number=r.boot ORDER BY seq"
            )
            for row in cursor.fetchall():
                record = Record(*row)
                after.chain = record.chain(after.chain)
                after.next_seq = record.seq + 1
                connection.execute(f"UPDATE records_{stream} SET chain=? WHERE seq=?", (after.chain, record.seq))
            self._put_marks(connection, stream, after)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        marks.next_seq, marks.receipted, marks.floor, marks.effects = after.next_seq, after.receipted, after.floor, after.effects
        marks.floor_chain, marks.chain = after.floor_chain, after.chain

    def vacuum_step(self, limit_bytes: int = VACUUM_BYTES) -> int:
        """Give up to `limit_bytes` of free pages back to the file system; returns how many pages are still free."""
        self.writer.execute(f"PRAGMA incremental_vacuum({limit_bytes // self.page_bytes})").fetchall()
        return int(self.writer.execute("PRAGMA freelist_count").fetchone()[0])

    def checkpoint_beside(self) -> None:
        """Move the WAL into the file through a connection of its own: neither commits nor reads wait for it."""
        if self._beside is None:
            self._beside = self._connect()
            self._beside.execute("PRAGMA cache_size=-64")
        self._beside.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def checkpoint(self, mode: str = "PASSIVE") -> None:
        """Move the WAL into the file (`PASSIVE`, `TRUNCATE`)."""
        self.writer.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()

    # -- reading -------------------------------------------------------------------------------------------------------------

    def marks(self) -> dict[str, StreamMarks]:
        """The marks of every stream of this file. What an append moves (`next_seq`, `chain`) is taken from the last record."""
        found = {name: StreamMarks() for name in self.streams}
        for stream, *values in self.reader.execute(
            "SELECT stream, next_seq, receipted, floor, floor_chain, chain, dropped, effects FROM streams"
        ):
            if stream in found:
                found[stream] = StreamMarks(*values)
        for stream, marks in found.items():
            last = self.reader.execute(f"SELECT seq, chain FROM records_{stream} ORDER BY seq DESC LIMIT 1").fetchone()
            if last is not None and last[0] >= marks.next_seq:
                marks.next_seq, marks.chain = last[0] + 1, bytes(last[1])
        return found

    def state(self) -> dict[str, str]:
        """Every state document."""
        return dict(self.reader.execute("SELECT key, value FROM state"))

    def read(self, stream: str, first: int, limit: int, max_bytes: int, last: int | None = None) -> tuple[list[Record], bytes]:
        """Up to `limit` records from seq `first` (to `last`), at most `max_bytes` of bodies but at least one, and the chain after them."""
        records: list[Record] = []
        chain = b""
        size = 0
        for row in self.reader.execute(
            "SELECT seq, boots.boot, mono, wall, tq, kind, body, chain "
            f"FROM records_{stream} AS r CROSS JOIN boots ON boots.number=r.boot WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT ?",
            (first, last if last is not None else 2**63 - 1, limit),
        ):
            size += len(row[6]) + 120  # the record's frame on the wire
            if records and size > max_bytes:
                break
            records.append(Record(*row[:7]))
            chain = row[7]
        return records, chain

    def chain_at(self, stream: str, seq: int) -> bytes | None:
        """The chain after record `seq`, or None where that record is no longer here."""
        row = self.reader.execute(f"SELECT chain FROM records_{stream} WHERE seq=?", (seq,)).fetchone()
        return bytes(row[0]) if row else None

    def tail(self, stream: str, limit: int, before: int | None = None, kinds: Sequence[str] = ()) -> list[Record]:
        """The newest `limit` records (below `before`, of the given kinds), newest first."""
        where = ["seq < ?"] if before is not None else ["1"]
        values: list[object] = [before] if before is not None else []
        if kinds:
            where.append(f"kind IN ({','.join('?' * len(kinds))})")
            values += kinds
        rows = self.reader.execute(
            f"SELECT seq, boots.boot, mono, wall, tq, kind, body FROM records_{stream} AS r CROSS JOIN boots ON boots.number=r.boot "
            f"WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?", (*values, limit),
        )
        return [Record(*row) for row in rows]

    def newest_wall_ms(self) -> int:
        """The newest wall time of any stream's last record, 0 for none."""
        newest = 0
        for stream in self.streams:
            row = self.reader.execute(f"SELECT wall FROM records_{stream} ORDER BY seq DESC LIMIT 1").fetchone()
            newest = max(newest, row[0] if row else 0)
        return newest

    def used_bytes(self) -> int:
        """Bytes of live pages (without free ones) plus the WAL."""
        pages = self.reader.execute("PRAGMA page_count").fetchone()[0] - self.reader.execute("PRAGMA freelist_count").fetchone()[0]
        return int(pages) * self.page_bytes + self.wal_bytes()

    def wal_bytes(self) -> int:
        """Bytes of the WAL file."""
        try:
            return self._storage.size(self._wal)
        except FileNotFoundError:
            return 0


def database_streams() -> Mapping[str, tuple[str, ...]]:
    """Which streams each database file holds, from the contract."""
    out: dict[str, tuple[str, ...]] = {}
    for policy in STREAMS.values():
        out[policy.database] = (*out.get(policy.database, ()), policy.name)
    return out
