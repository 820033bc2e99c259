"""Transfers in SQLite: the part of `SqliteStore` that they need."""

import json
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import sqlite_utils


def transfers_schema(db: sqlite_utils.Database) -> None:
    """The table."""
    db["transfers"].create({"name": str, "created_ms": int, "document": str}, pk="name", not_null={"created_ms", "document"})


class SqliteTransfers(ABC):
    """See `base.Store`; mixed into `SqliteStore`."""

    _write: sqlite3.Connection

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """All or nothing; the whole store's."""

    def commit_transfers(self, changes: Mapping[str, dict[str, Any] | None]) -> None:
        """See `Store.commit_transfers`."""
        with self._transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO transfers VALUES (?,?,?)", [(name, one["created_ms"], json.dumps(one)) for name, one in changes.items() if one is not None])
            connection.executemany("DELETE FROM transfers WHERE name=?", [(name,) for name, one in changes.items() if one is None])

    def transfers(self) -> list[dict[str, Any]]:
        """See `Store.transfers`."""
        return [json.loads(text) for (text,) in self._write.execute("SELECT document FROM transfers ORDER BY created_ms, name")]
