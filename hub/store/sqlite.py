"""The hub's store in one SQLite file. sqlite-utils makes and migrates the schema; the hot path is plain SQL."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlite_utils

from edge_runtime.contract.records import Record
from edge_runtime.system.data_folder import keep_private

from ..dating import BootClock
from .base import EdgeRow, StoredRecord, StoreError, StreamRow, Transaction
from .sqlite_transfers import SqliteTransfers, transfers_schema
from .sqlite_workloads import SqliteWorkloads, moves_schema, order_schema, plans_schema, workload_schema

DESIRED_HISTORY = 100
"""Desired state documents kept per edge, the newest."""

BUSY_TIMEOUT_S = 5.0
"""How long a statement waits for another process that holds the file."""

CHECK_BYTES = 256 * 1024 * 1024
"""Files up to this size are checked whole when they are opened (about a second); damage in a larger one shows when it is read."""

FULL_BYTES = 1 << 16
"""Free bytes below which a disk is full: what SQLite needs beside the database when it opens one."""


def _first_schema(db: sqlite_utils.Database) -> None:
    db["records"].create(
        {
            "id": int, "edge": str, "stream": str, "seq": int, "boot": str, "mono": int, "wall": int, "tq": str, "kind": str, "body": str,
            "received": int,
        },
        pk="id", not_null={"edge", "stream", "seq", "boot", "mono", "wall", "tq", "kind", "body", "received"},
    )
    db["records"].create_index(["edge", "stream", "seq"], unique=True, index_name="records_key")
    db["records"].create_index(["stream", "id"], index_name="records_by_stream")
    db["streams"].create(
        {
            "edge": str, "stream": str, "contiguous": int, "chain": bytes, "base": int, "gone": int, "stored": int, "duplicates": int,
            "mismatches": int, "edge_next": int, "edge_floor": int, "edge_dropped": int, "above": str,
        },
        pk=("edge", "stream"),
    )
    db["edges"].create(
        {
            "edge": str, "state": str, "reason": str, "since_ms": int, "last_seen_ms": int, "boot": str, "boot_n": int, "generation": int,
            "quarantine": str, "presence": str,
        },
        pk="edge",
    )
    db["desired"].create({"edge": str, "generation": int, "document": str, "written_ms": int}, pk=("edge", "generation"))
    db["settings"].create({"key": str, "value": str}, pk="key")
    db["outages"].create({"edge": str, "start_ms": int, "end_ms": int, "reason": str}, pk=("edge", "start_ms"))


def _clocks(db: sqlite_utils.Database) -> None:
    db["clocks"].create({"edge": str, "boot": str, "quality": str, "offset_ms": int}, pk=("edge", "boot"))


def _arrivals(db: sqlite_utils.Database) -> None:
    db["arrivals"].create({"ran_ms": int, "number": int}, pk="ran_ms")


def _base_chain(db: sqlite_utils.Database) -> None:
    db["streams"].add_column("base_chain", bytes)


MIGRATIONS: tuple[tuple[str, Callable[[sqlite_utils.Database], None]], ...] = (
    ("0001_first", _first_schema), ("0002_clocks", _clocks), ("0003_base_chain", _base_chain), ("0004_workloads", workload_schema), ("0005_plans", plans_schema),
    ("0006_transfers", transfers_schema), ("0007_moves", moves_schema), ("0008_order", order_schema), ("0009_arrivals", _arrivals),
)
"""Applied in order, each once; a name is never reused."""


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether that is for want of room on the disk, and nothing is damaged. SQLite says so of its own writes; where there is none for the files beside the database, it cannot open it, or speaks of an I/O error."""
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or (isinstance(error, sqlite3.OperationalError) and shutil.disk_usage(folder).free < FULL_BYTES)


class SqliteStore(SqliteWorkloads, SqliteTransfers):
    """See `base.Store`.

    Args:
        path: the file; `:memory:` is not supported (reads and writes use two connections).

    Raises:
        StoreError: the file is damaged, of a newer hub, or held by another process. Nothing is written to it then.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        connections: list[sqlite3.Connection] = []
        try:
            for _ in range(2):
                connections.append(self._connect())
            self._write, self._read = connections
            self._check()
            self._write.execute("PRAGMA journal_mode=WAL")
            self._write.execute("PRAGMA synchronous=FULL")
            self._migrate()
            self._read.execute("PRAGMA query_only=ON")
        except (sqlite3.Error, StoreError) as error:
            for connection in connections:
                connection.close()
            if isinstance(error, StoreError):
                raise
            remedy = "stop the other hub" if "locked" in str(error) else "free space on its disk; nothing of it is damaged" if _is_full(error, path.parent) else "restore it from a backup, or move it away: the edges send again what they still have"
            raise StoreError("data-dir", f"{path} cannot be used ({error})", remedy) from None

    def _check(self) -> None:
        if self.path.stat().st_size <= CHECK_BYTES:
            verdict = self._write.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise sqlite3.DatabaseError(" ".join(str(verdict).split()))

    def _connect(self) -> sqlite3.Connection:
        keep_private(self.path)
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S)
        connection.execute("PRAGMA journal_size_limit=67108864")
        connection.execute("PRAGMA cache_size=-16384")
        return connection

    def _migrate(self) -> None:
        db = sqlite_utils.Database(self._write)
        if "migrations" not in db.table_names():
            db["migrations"].create({"name": str}, pk="name")
        done = {row["name"] for row in db["migrations"].rows}
        newer = sorted(done - {name for name, _ in MIGRATIONS})
        if newer:
            raise StoreError("data-dir", f"{self.path} was written by a newer hub (it has {newer[-1]})", "start the newer hub")
        for name, apply in MIGRATIONS:
            if name not in done:
                with self._transaction():  # a process that ends halfway leaves nothing of this migration behind
                    apply(db)
                    db["migrations"].insert({"name": name})

    def close(self) -> None:
        """Close both connections."""
        self._read.close()
        self._write.close()

    # -- writing -------------------------------------------------------------------------------------------------------------

    def commit(self, transaction: Transaction) -> None:
        """See `Store.commit`."""
        with self._transaction() as connection:
            connection.executemany(
                "INSERT INTO records (edge, stream, seq, boot, mono, wall, tq, kind, body, received) VALUES (?,?,?,?,?,?,?,?,?,?) "
                "ON CONFLICT(edge, stream, seq) DO NOTHING",
                [
                    (s.edge, s.stream, r.seq, r.boot, r.mono_ms, r.wall_ms, r.quality, r.kind, r.body, s.received_ms)
                    for s in transaction.records for r in (s.record,)
                ],
            )
            connection.executemany(
                "INSERT OR REPLACE INTO streams VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                [
                    (
                        s.edge, s.stream, s.contiguous, s.chain, s.base, s.gone, s.stored, s.duplicates, s.mismatches, s.edge_next, s.edge_floor,
                        s.edge_dropped, json.dumps(s.above), s.base_chain,
                    )
                    for s in transaction.streams.values()
                ],
            )
            connection.executemany(
                "INSERT OR REPLACE INTO edges VALUES (?,?,?,?,?,?,?,?,?,?)",
                [
                    (e.edge, e.state, e.reason, e.since_ms, e.last_seen_ms, e.boot, e.boot_n, e.generation, e.quarantine, json.dumps(e.presence))
                    for e in transaction.edges.values()
                ],
            )
            connection.executemany("INSERT OR REPLACE INTO clocks VALUES (?,?,?,?)", [(c.edge, c.boot, c.quality, c.offset_ms) for c in transaction.clocks])
            connection.executemany(
                "INSERT INTO outages VALUES (?,?,?,?) ON CONFLICT(edge, start_ms) DO UPDATE SET end_ms=excluded.end_ms", [(*key, outage.end_ms, outage.reason) for key, outage in transaction.outages.items()]
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; whatever happens, the connection is out of the transaction afterwards."""
        connection = self._write
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            if connection.in_transaction:
                connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def put_desired(self, edge: str, document: dict[str, Any], now_ms: int) -> None:
        """See `Store.put_desired`."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO desired VALUES (?,?,?,?)", (edge, document["generation"], json.dumps(document), now_ms))
            connection.execute(
                "DELETE FROM desired WHERE edge=? AND generation<=(SELECT generation FROM desired WHERE edge=? ORDER BY generation DESC LIMIT 1 OFFSET ?)",
                (edge, edge, DESIRED_HISTORY),
            )

    def put_setting(self, key: str, value: str) -> None:
        """See `Store.put_setting`."""
        self._write.execute("INSERT OR REPLACE INTO settings VALUES (?,?)", (key, value))

    def note_arrivals(self, ran_ms: int, every_ms: int, needed_ms: int) -> None:
        """See `Store.note_arrivals`."""
        with self._transaction() as connection:
            (last,) = connection.execute("SELECT max(ran_ms) FROM arrivals").fetchone()
            if last is None or ran_ms - last >= every_ms:
                connection.execute("INSERT OR IGNORE INTO arrivals SELECT ?, coalesce(max(id), 0) FROM records", (ran_ms,))
            connection.execute("DELETE FROM arrivals WHERE ran_ms < (SELECT max(ran_ms) FROM arrivals WHERE ran_ms <= ?)", (needed_ms,))

    def read_arrived(self, ran_ms: int) -> int:
        """See `Store.read_arrived`."""
        (found,) = self._read.execute("SELECT min(max(number), (SELECT max(id) - 1 FROM records)) FROM arrivals WHERE ran_ms <= ?", (ran_ms,)).fetchone()
        return int(found or 0)

    def prune(self, edge: str, stream: str, upto: int, chain: bytes) -> int:
        """See `Store.prune`."""
        with self._transaction() as connection:
            count = connection.execute("DELETE FROM records WHERE edge=? AND stream=? AND seq<=?", (edge, stream, upto)).rowcount
            connection.execute("UPDATE streams SET base=?, base_chain=? WHERE edge=? AND stream=?", (upto + 1, chain, edge, stream))
        return int(count)

    # -- reading -------------------------------------------------------------------------------------------------------------

    def edges(self) -> list[EdgeRow]:
        """See `Store.edges`."""
        rows = self._write.execute(
            "SELECT edge, state, reason, since_ms, last_seen_ms, boot, boot_n, generation, quarantine, presence FROM edges ORDER BY edge"
        )
        return [_edge_row(row) for row in rows]

    def streams(self) -> list[StreamRow]:
        """See `Store.streams`."""
        rows = self._write.execute(
            "SELECT edge, stream, contiguous, chain, base, gone, stored, duplicates, mismatches, edge_next, edge_floor, edge_dropped, above, base_chain FROM streams"
        )
        return [_stream_row(row) for row in rows]

    def clocks(self, limit: int) -> list[BootClock]:
        """See `Store.clocks`."""
        rows = self._write.execute("SELECT edge, boot, quality, offset_ms FROM clocks ORDER BY rowid DESC LIMIT ?", (limit,)).fetchall()
        return [BootClock(*row) for row in reversed(rows)]

    def read_records(
        self, edge: str, stream: str, *, after: int = 0, before: int | None = None, limit: int = 100, newest_first: bool = False, kinds: Sequence[str] = (), committed: bool = False,
    ) -> list[StoredRecord]:
        """See `Store.read_records`. What others read at the same time holds the connection for reading at what there was when they began."""
        values: list[Any] = [edge, stream, after]
        where = "edge=? AND stream=? AND seq>?"
        if before is not None:
            where += " AND seq<?"
            values.append(before)
        if kinds:
            where += f" AND kind IN ({','.join('?' * len(kinds))})"
            values += kinds
        rows = (self._write if committed else self._read).execute(
            f"SELECT edge, stream, received, id, seq, boot, mono, wall, tq, kind, body FROM records WHERE {where} "
            f"ORDER BY seq {'DESC' if newest_first else 'ASC'} LIMIT ?", (*values, limit),
        )
        return [StoredRecord(row[0], row[1], Record(*row[4:]), row[2], row[3]) for row in rows]

    def read_latest(self, *, streams: Sequence[str], kinds: Sequence[str], limit: int, edge: str | None = None, after_id: int = 0) -> list[tuple[int, StoredRecord]]:
        """See `Store.read_latest`."""
        found: list[tuple[int, StoredRecord]] = []
        for stream in streams:  # one index scan per stream
            values: list[Any] = [stream, after_id]
            where = "stream=? AND id>?"
            if edge is not None:
                where += " AND edge=?"
                values.append(edge)
            if kinds:
                where += f" AND kind IN ({','.join('?' * len(kinds))})"
                values += kinds
            rows = self._read.execute(
                f"SELECT id, edge, stream, received, seq, boot, mono, wall, tq, kind, body FROM records WHERE {where} ORDER BY id DESC LIMIT ?",
                (*values, limit),
            )
            found += [(row[0], StoredRecord(row[1], row[2], Record(*row[4:]), row[3])) for row in rows]
        return sorted(found, key=lambda pair: -pair[0])[:limit]

    def read_count(self, edge: str, stream: str, first: int, last: int) -> int:
        """See `Store.read_count`."""
        row = self._read.execute("SELECT count(*) FROM records WHERE edge=? AND stream=? AND seq BETWEEN ? AND ?", (edge, stream, first, last)).fetchone()
        return int(row[0])

    def desired(self, edge: str) -> dict[str, Any] | None:
        """See `Store.desired`."""
        row = self._write.execute("SELECT document FROM desired WHERE edge=? ORDER BY generation DESC LIMIT 1", (edge,)).fetchone()
        return json.loads(row[0]) if row else None

    def all_desired(self) -> Mapping[str, dict[str, Any]]:
        """See `Store.all_desired`."""
        rows = self._write.execute("SELECT edge, document, max(generation) FROM desired GROUP BY edge")
        return {row[0]: json.loads(row[1]) for row in rows}

    def setting(self, key: str) -> str | None:
        """See `Store.setting`."""
        row = self._write.execute("SELECT value FROM settings WHERE key=?", (key,)).fetchone()
        return str(row[0]) if row else None

    def read_outages(self, since_ms: int, limit: int = 1000) -> list[dict[str, Any]]:
        """See `Store.read_outages`."""
        rows = self._read.execute(
            "SELECT edge, start_ms, end_ms, reason FROM outages WHERE end_ms IS NULL OR end_ms>=? ORDER BY start_ms DESC LIMIT ?", (since_ms, limit)
        )
        return [{"edge": row[0], "start_ms": row[1], "end_ms": row[2], "reason": row[3]} for row in rows]


def _edge_row(row: Any) -> EdgeRow:
    return EdgeRow(*(*row[:9], json.loads(row[9])))


def _stream_row(row: Any) -> StreamRow:
    return StreamRow(*(*row[:12], json.loads(row[12]), row[13] or b""))
