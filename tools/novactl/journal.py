"""Looking into a journal file, running agent or not: sqlite-utils, read only."""

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_runtime.contract.records import Record

from .client import CommandError


def open_database(folder: Path, name: str) -> Any:
    """`journal.db` or `telemetry.db` of a data folder as a sqlite-utils database, read only."""
    import sqlite_utils

    path = folder / "journal" / f"{name}.db"
    if not path.exists():
        path = folder / f"{name}.db"
    if not path.exists():
        raise CommandError(f"data: no {name}.db in {folder}; give the edge's data_dir")
    if not os.access(path, os.R_OK):
        raise CommandError(f"data: {path} is not this user's to read; ask as the agent's user, or as root")
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        connection.execute("SELECT count(*) FROM streams")
    except sqlite3.Error as error:
        raise CommandError(f"data: {path} cannot be read ({error}); is it an edge's journal?") from None
    return sqlite_utils.Database(connection)


def summary(folder: Path) -> list[dict[str, Any]]:
    """One row per stream: marks, kept rows, dropped."""
    rows = []
    for name in ("journal", "telemetry"):
        database = open_database(folder, name)
        for row in database["streams"].rows:
            table = database[f"records_{row['stream']}"]
            # The marks of an append are those of the last record; the row holds what was stored with the last receipt or release.
            last = next(table.rows_where(order_by="seq desc", limit=1), None)
            if last is None or last["seq"] < row["next_seq"]:
                last = {"seq": row["next_seq"] - 1, "chain": row["chain"]}
            rows.append({
                "stream": row["stream"], "next": last["seq"] + 1, "receipted": row["receipted"], "floor": row["floor"],
                "kept": table.count, "dropped": row["dropped"], "chain": last["chain"].hex(),
            })
    return rows


def check(folder: Path, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Read every record and compute the chain anew; `progress(stream, done, total)`."""
    problems: list[str] = []
    counted: dict[str, int] = {}
    for name in ("journal", "telemetry"):
        database = open_database(folder, name)
        with contextlib.closing(database.conn) as connection:
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                problems.append(f"{name}.db: {verdict}")
            for row in list(database["streams"].rows):
                stream, seq, chain = row["stream"], row["floor"], row["floor_chain"]
                total = database[f"records_{stream}"].count
                for record_row in connection.execute(
                    f"SELECT seq, boots.boot, mono, wall, tq, kind, body, chain FROM records_{stream} AS r CROSS JOIN boots ON boots.number=r.boot ORDER BY seq"
                ):
                    record = Record(*record_row[:7])
                    if record.seq != seq:
                        problems.append(f"{stream}: {seq} is missing, {record.seq} follows")
                        break
                    chain = record.chain(chain)
                    if chain != record_row[7]:
                        problems.append(f"{stream}: the chain breaks at {seq}")
                        break
                    seq += 1
                    if seq % 1000 == 0:
                        progress(stream, seq - row["floor"], total)
                progress(stream, total, total)
                counted[stream] = seq - row["floor"]
                if seq < row["next_seq"]:
                    problems.append(f"{stream}: ends at {seq - 1}, the marks say {row['next_seq'] - 1}")
    return {"ok": not problems, "records": counted, "problems": problems}


def show(folder: Path, stream: str, limit: int) -> list[dict[str, Any]]:
    """The newest records of a stream."""
    database = open_database(folder, "telemetry" if stream == "telemetry" else "journal")
    table = f"records_{stream}"
    if table not in database.table_names():
        raise CommandError(f"stream: {stream!r} is unknown; use decision, event or telemetry")
    return [
        {"seq": row["seq"], "wall_ms": row["wall"], "time_quality": row["tq"], "kind": row["kind"], "body": json.loads(row["body"])}
        for row in database[table].rows_where(order_by="seq desc", limit=limit)
    ]
