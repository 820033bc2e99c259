"""Nodes, workloads and placements in SQLite: the part of `SqliteStore` that the scheduler needs."""

import json
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import sqlite_utils

from edge_runtime.contract.records import Record

from .workloads import FINAL_STATES, NodeRow, PlacementRow, WorkloadChanges, WorkloadRow

_FINAL = ",".join(f"'{state}'" for state in FINAL_STATES)

CURSOR = "workloads.cursor"
"""The setting that says up to which record the edges' words have been acted upon."""


def workload_schema(db: sqlite_utils.Database) -> None:
    """The tables."""
    db["nodes"].create({"name": str, "origin": str, "document": str, "cordon": str, "seq": int, "changed_ms": int, "problem": str}, pk="name")
    db["workloads"].create(
        {"id": str, "document": str, "state": str, "node": str, "epoch": int, "reason": str, "created_ms": int, "changed_ms": int, "avoid": str},
        pk="id", not_null={"document", "state", "node", "epoch"},
    )
    db["workloads"].create_index(["state", "changed_ms"], index_name="workloads_by_state")
    db["placements"].create(
        {"workload": str, "epoch": int, "node": str, "seat": str, "from_ms": int, "to_ms": int, "said": str, "why": str}, pk=("workload", "epoch"),
        not_null={"node", "seat", "from_ms"},
    )
    db.execute("CREATE INDEX placements_open ON placements(from_ms) WHERE to_ms IS NULL")
    db["budgets"].create({"name": str, "document": str}, pk="name")
    db["quotas"].create({"name": str, "document": str}, pk="name")
    db["utilisation"].create({"minute": int, "document": str}, pk="minute")


def plans_schema(db: sqlite_utils.Database) -> None:
    """What is planned, and what must outlive a restart."""
    db["workloads"].add_column("plan", str, not_null_default="{}")
    db["nodes"].add_column("tainted", str, not_null_default="{}")
    db["rebalances"].create({"name": str, "document": str}, pk="name")
    db["epochs"].create({"workload": str, "epoch": int}, pk="workload")


def moves_schema(db: sqlite_utils.Database) -> None:
    """Moves of workloads with their state."""
    db["moves"].create({"name": str, "document": str}, pk="name")


def order_schema(db: sqlite_utils.Database) -> None:
    """In which order edges said what they said."""
    db["placements"].add_column("seqs", str, not_null_default="{}")
    db["workloads"].add_column("fences", str, not_null_default="{}")


class SqliteWorkloads(ABC):
    """See `workloads.WorkloadStore`; mixed into `SqliteStore`."""

    _write: sqlite3.Connection
    _read: sqlite3.Connection

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """All or nothing; the whole store's."""

    def commit_workloads(self, changes: WorkloadChanges) -> None:
        """See `WorkloadStore.commit_workloads`."""
        with self._transaction() as connection:
            _put(connection, "workloads", 11, [
                (row.id, json.dumps(row.document), row.state, row.node, row.epoch, row.reason, row.created_ms, row.changed_ms, json.dumps(row.avoid), json.dumps(row.plan),
                 json.dumps(row.fences))
                for row in changes.workloads.values() if row is not None
            ])
            connection.executemany("DELETE FROM workloads WHERE id=?", [(key,) for key, row in changes.workloads.items() if row is None])
            _put(connection, "placements", 9, [
                (row.workload, row.epoch, row.node, json.dumps(row.seat), row.from_ms, row.to_ms, row.said, row.why, json.dumps(row.seqs)) for row in changes.placements.values() if row is not None
            ])
            connection.executemany("DELETE FROM placements WHERE workload=? AND epoch=?", [key for key, row in changes.placements.items() if row is None])
            _put(connection, "nodes", 8, [
                (row.name, row.origin, json.dumps(row.document), row.cordon, row.seq, row.changed_ms, row.problem, json.dumps(row.tainted)) for row in changes.nodes.values() if row is not None
            ])
            connection.executemany("DELETE FROM nodes WHERE name=?", [(key,) for key, row in changes.nodes.items() if row is None])
            for table, rows in (("budgets", changes.budgets), ("quotas", changes.quotas), ("rebalances", changes.rebalances), ("moves", changes.moves)):
                _put(connection, table, 2, [(name, json.dumps(document)) for name, document in rows.items() if document is not None])
                connection.executemany(f"DELETE FROM {table} WHERE name=?", [(name,) for name, document in rows.items() if document is None])
            _put(connection, "epochs", 2, [(name, epoch) for name, epoch in changes.epochs.items() if epoch is not None])
            connection.executemany("DELETE FROM epochs WHERE workload=?", [(name,) for name, epoch in changes.epochs.items() if epoch is None])
            if changes.cursor is not None:
                connection.execute("INSERT OR REPLACE INTO settings VALUES (?,?)", (CURSOR, str(changes.cursor)))

    def nodes(self) -> list[NodeRow]:
        """See `WorkloadStore.nodes`."""
        rows = self._write.execute("SELECT name, origin, document, cordon, seq, changed_ms, problem, tainted FROM nodes ORDER BY name")
        return [NodeRow(row[0], row[1], json.loads(row[2]), row[3], row[4], row[5], row[6], json.loads(row[7])) for row in rows]

    def workloads(self) -> list[WorkloadRow]:
        """See `WorkloadStore.workloads`."""
        rows = self._write.execute("SELECT id, document, state, node, epoch, reason, created_ms, changed_ms, avoid, plan, fences FROM workloads ORDER BY created_ms, id")
        return [WorkloadRow(row[0], json.loads(row[1]), row[2], row[3], row[4], row[5], row[6], row[7], json.loads(row[8]), json.loads(row[9]), json.loads(row[10])) for row in rows]

    def open_placements(self) -> list[PlacementRow]:
        """See `WorkloadStore.open_placements`."""
        rows = self._write.execute(
            "SELECT workload, epoch, node, seat, from_ms, to_ms, said, why, seqs FROM placements WHERE to_ms IS NULL ORDER BY from_ms, workload, epoch"
        )
        return [_placement(row) for row in rows]

    def budgets(self) -> dict[str, dict[str, Any]]:
        """See `WorkloadStore.budgets`."""
        return {name: json.loads(text) for name, text in self._write.execute("SELECT name, document FROM budgets ORDER BY name")}

    def quotas(self) -> dict[str, dict[str, Any]]:
        """See `WorkloadStore.quotas`."""
        return {name: json.loads(text) for name, text in self._write.execute("SELECT name, document FROM quotas ORDER BY name")}

    def moves(self) -> dict[str, dict[str, Any]]:
        """See `WorkloadStore.moves`."""
        return {name: json.loads(text) for name, text in self._write.execute("SELECT name, document FROM moves ORDER BY rowid")}

    def rebalances(self) -> dict[str, dict[str, Any]]:
        """See `WorkloadStore.rebalances`."""
        return {name: json.loads(text) for name, text in self._write.execute("SELECT name, document FROM rebalances ORDER BY rowid")}

    def heard_epochs(self) -> dict[str, int]:
        """See `WorkloadStore.heard_epochs`."""
        return dict(self._write.execute("SELECT workload, epoch FROM epochs").fetchall())

    def workload_cursor(self) -> int:
        """See `WorkloadStore.workload_cursor`."""
        row = self._write.execute("SELECT value FROM settings WHERE key=?", (CURSOR,)).fetchone()
        return int(row[0]) if row else 0

    def read_events_after(self, kinds: Sequence[str], after_id: int, limit: int) -> tuple[list[tuple[int, Any]], int]:
        """See `WorkloadStore.read_events_after`."""
        from .base import StoredRecord

        newest = self._read.execute("SELECT id FROM records WHERE stream='event' ORDER BY id DESC LIMIT 1").fetchone()
        upto = int(newest[0]) if newest else 0
        rows = self._read.execute(
            "SELECT id, edge, stream, received, seq, boot, mono, wall, tq, kind, body FROM records WHERE stream='event' AND id>? AND id<=? "
            f"AND kind IN ({','.join('?' * len(kinds))}) ORDER BY id LIMIT ?", (after_id, upto, *kinds, limit),
        ).fetchall()
        found = [(row[0], StoredRecord(row[1], row[2], Record(*row[4:]), row[3])) for row in rows]
        return found, found[-1][0] if len(found) == limit else upto

    def read_placements(self, workload: str, limit: int = 100) -> list[PlacementRow]:
        """See `WorkloadStore.read_placements`."""
        rows = self._read.execute(
            "SELECT workload, epoch, node, seat, from_ms, to_ms, said, why, seqs FROM placements WHERE workload=? ORDER BY epoch DESC LIMIT ?", (workload, limit)
        )
        return [_placement(row) for row in rows]

    def put_utilisation(self, minute: int, document: dict[str, Any], keep_minutes: int) -> None:
        """See `WorkloadStore.put_utilisation`."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO utilisation VALUES (?,?)", (minute, json.dumps(document)))
            connection.execute("DELETE FROM utilisation WHERE minute<=?", (minute - keep_minutes,))

    def read_utilisation(self, since_minute: int, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """See `WorkloadStore.read_utilisation`."""
        rows = self._read.execute("SELECT minute, document FROM utilisation WHERE minute>=? ORDER BY minute DESC LIMIT ?", (since_minute, limit)).fetchall()
        return [(row[0], json.loads(row[1])) for row in reversed(rows)]

    def forget_workloads(self, before_ms: int, keep: int) -> list[str]:
        """See `WorkloadStore.forget_workloads`."""
        with self._transaction() as connection:
            old = connection.execute(
                f"SELECT id FROM workloads WHERE state IN ({_FINAL}) AND changed_ms<? UNION SELECT id FROM "
                f"(SELECT id FROM workloads WHERE state IN ({_FINAL}) ORDER BY changed_ms DESC, id LIMIT -1 OFFSET ?)", (before_ms, keep),
            ).fetchall()
            connection.executemany("DELETE FROM workloads WHERE id=?", old)
            connection.executemany("DELETE FROM placements WHERE workload=?", old)
        return [row[0] for row in old]


def _put(connection: sqlite3.Connection, table: str, columns: int, rows: list[tuple[Any, ...]]) -> None:
    connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({','.join('?' * columns)})", rows)


def _placement(row: Any) -> PlacementRow:
    return PlacementRow(row[0], row[1], row[2], json.loads(row[3]), row[4], row[5], row[6], row[7], json.loads(row[8]))
