"""The hub's store: one suite for every implementation of `hub.store.base.Store`, then what belongs to SQLite's file alone.

A new implementation joins by a row in `IMPLEMENTATIONS`.
"""

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.contract.records import Record
from hub.dating import BootClock
from hub.store import sqlite as sqlite_module
from hub.store.base import EdgeRow, Outage, Store, StoredRecord, StoreError, StreamRow, Transaction
from hub.store.sqlite import DESIRED_HISTORY, SqliteStore
from hub.store.workloads import NodeRow, PlacementRow, WorkloadChanges, WorkloadRow

IMPLEMENTATIONS: dict[str, Callable[[Path], Store]] = {"sqlite": lambda folder: SqliteStore(folder / "hub.db")}


class Opener:
    """Opens the store of one test, as often as it is asked to, and closes it at the end."""

    def __init__(self, make: Callable[[Path], Store], folder: Path) -> None:
        self._make, self._folder = make, folder
        self._open: list[Store] = []

    def __call__(self) -> Store:
        self.close()
        self._open.append(self._make(self._folder))
        return self._open[-1]

    def close(self) -> None:
        while self._open:
            self._open.pop().close()


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """A factory: each call opens the same store again."""
    made = Opener(IMPLEMENTATIONS[request.param], tmp_path)
    yield made
    made.close()


@pytest.fixture
def store(opener: Opener) -> Store:
    """A new, empty store."""
    return opener()


def stored(edge: str, stream: str, seq: int, *, kind: str = "reading", body: str | None = None, received: int = 0) -> StoredRecord:
    return StoredRecord(edge, stream, Record(seq, "boot-1", 1000 + seq, 1_795_500_000_000 + seq, "ntp", kind, body if body is not None else f'{{"n":{seq}}}'), received or 5000 + seq)


def stream_row(edge: str, stream: str, contiguous: int, above: list[list[int]] | None = None) -> StreamRow:
    return StreamRow(edge, stream, contiguous, bytes(range(16)), 1, 2, 3, 4, 5, contiguous + 9, 7, 8, above or [])


def keep(store: Store, *records: StoredRecord) -> None:
    store.commit(Transaction(records=list(records)))


def outage(store: Store, edge: str, start_ms: int, end_ms: int | None, reason: str) -> None:
    store.commit(Transaction(outages={(edge, start_ms): Outage(end_ms, reason)}))


def seqs(records: list[StoredRecord]) -> list[int]:
    return [item.record.seq for item in records]


# -- every implementation ----------------------------------------------------------------------------------------------------


def test_an_empty_store_answers_with_nothing(store: Store) -> None:
    assert store.edges() == [] and store.streams() == [] and dict(store.all_desired()) == {}
    assert store.read_records("gw-1", "decision") == [] and store.read_count("gw-1", "decision", 1, 10) == 0
    assert store.read_latest(streams=("decision", "event"), kinds=(), limit=10) == []
    assert store.desired("gw-1") is None and store.setting("any") is None and store.read_outages(0) == []


def test_what_one_commit_brings_is_read_back_whole(store: Store) -> None:
    record = StoredRecord("gw-1", "event", Record(7, "b", 0, 2**63 - 1, "unsynced", "twin.reported", '{"text":"\\u00e9\\ud83d\\ude00 \' \\" ; DROP"}'), 12)
    row = EdgeRow("gw-1", "online", "start", 11, 12, "b", 3, 4, "why", {"site": "plant", "labels": {"a": "b"}, "devices": ["host"]})
    marks = stream_row("gw-1", "event", 7, [[9, 9], [11, 2**62]])
    store.commit(Transaction([record], {("gw-1", "event"): marks}, {"gw-1": row}))
    assert store.read_records("gw-1", "event") == [record]
    assert store.edges() == [row]
    assert store.streams() == [marks]


def test_a_commit_is_all_or_nothing(store: Store) -> None:
    keep(store, stored("gw-1", "decision", 1))
    good, bad = stored("gw-1", "decision", 2), stored("gw-1", "decision", 3)
    broken = replace(bad, record=replace(bad.record, body=None))  # type: ignore[arg-type]
    transaction = Transaction([good, broken], {("gw-1", "decision"): stream_row("gw-1", "decision", 3)}, {"gw-1": EdgeRow("gw-1")})
    with pytest.raises(Exception):  # noqa: B017 - every database has its own class for it
        store.commit(transaction)
    assert seqs(store.read_records("gw-1", "decision")) == [1]
    assert store.streams() == [] and store.edges() == []
    # The store is not stuck in the broken transaction.
    keep(store, good)
    assert seqs(store.read_records("gw-1", "decision")) == [1, 2]


def test_a_commit_whose_last_part_fails_leaves_no_records(store: Store) -> None:
    edge = EdgeRow("gw-1", presence={"unwritable": object()})
    with pytest.raises(TypeError):
        store.commit(Transaction([stored("gw-1", "decision", 1)], {("gw-1", "decision"): stream_row("gw-1", "decision", 1)}, {"gw-1": edge}))
    assert store.read_records("gw-1", "decision") == [] and store.streams() == []


def test_a_desired_state_that_cannot_be_kept_does_not_stop_the_store(store: Store) -> None:
    with pytest.raises(TypeError):
        store.put_desired("gw-1", {"generation": 1, "spec": object()}, 1)
    keep(store, stored("gw-1", "decision", 1))
    assert store.desired("gw-1") is None and store.read_count("gw-1", "decision", 1, 1) == 1


def test_a_record_that_is_there_is_left_as_it_is(store: Store) -> None:
    first = stored("gw-1", "decision", 5, body='{"first":true}', received=1)
    keep(store, first)
    keep(store, stored("gw-1", "decision", 5, body='{"second":true}', received=2), stored("gw-1", "decision", 6))
    # The key is the three of them together: another edge or stream with this seq is another record.
    keep(store, stored("gw-2", "decision", 5), stored("gw-1", "event", 5))
    assert store.read_records("gw-1", "decision", limit=1) == [first]
    assert seqs(store.read_records("gw-1", "decision")) == [5, 6]
    assert store.read_count("gw-1", "decision", 1, 100) == 2 and store.read_count("gw-2", "decision", 5, 5) == 1


def test_rows_of_edges_and_streams_are_replaced(store: Store) -> None:
    for contiguous in (1, 9):
        store.commit(Transaction(
            [], {("gw-1", "decision"): stream_row("gw-1", "decision", contiguous), ("gw-1", "event"): stream_row("gw-1", "event", 2)},
            {"gw-1": EdgeRow("gw-1", "online", "start", contiguous)},
        ))
    assert {(row.edge, row.stream): row.contiguous for row in store.streams()} == {("gw-1", "decision"): 9, ("gw-1", "event"): 2}
    assert [(row.edge, row.since_ms) for row in store.edges()] == [("gw-1", 9)]


def test_records_are_read_by_seq_kind_and_limit(store: Store) -> None:
    # Written out of order: history comes after live records.
    keep(store, *(stored("gw-1", "event", seq, kind="boot" if seq % 4 == 0 else "alert") for seq in (7, 8, 9, 1, 2, 3, 4, 5, 6)))
    read = store.read_records
    assert seqs(read("gw-1", "event")) == list(range(1, 10))
    assert seqs(read("gw-1", "event", newest_first=True)) == list(range(9, 0, -1))
    assert seqs(read("gw-1", "event", after=3)) == [4, 5, 6, 7, 8, 9]
    assert seqs(read("gw-1", "event", after=3, before=7)) == [4, 5, 6]
    assert seqs(read("gw-1", "event", after=3, before=4)) == []
    assert seqs(read("gw-1", "event", limit=2)) == [1, 2] and seqs(read("gw-1", "event", limit=2, newest_first=True)) == [9, 8]
    assert seqs(read("gw-1", "event", limit=0)) == []
    assert seqs(read("gw-1", "event", kinds=("boot",))) == [4, 8]
    assert seqs(read("gw-1", "event", kinds=("boot", "alert"), limit=3)) == [1, 2, 3]
    assert seqs(read("gw-1", "event", kinds=("none",))) == [] and seqs(read("gw-1", "event", kinds=("' OR 1=1 --",))) == []
    assert seqs(read("gw-2", "event")) == [] and seqs(read("gw-1", "decision")) == []
    assert store.read_count("gw-1", "event", 3, 6) == 4 and store.read_count("gw-1", "event", 6, 3) == 0


def test_the_latest_over_all_edges_come_newest_first(store: Store) -> None:
    keep(store, stored("gw-1", "event", 1, kind="boot"), stored("gw-2", "event", 1, kind="boot"))
    keep(store, stored("gw-1", "decision", 1), stored("gw-2", "event", 2, kind="alert"), stored("gw-1", "telemetry", 1))
    both = store.read_latest(streams=("decision", "event"), kinds=(), limit=10)
    assert [(item.edge, item.stream, item.record.seq) for _, item in both] == [
        ("gw-2", "event", 2), ("gw-1", "decision", 1), ("gw-2", "event", 1), ("gw-1", "event", 1),
    ]
    numbers = [number for number, _ in both]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == 4
    assert [number for number, _ in store.read_latest(streams=("decision", "event"), kinds=(), limit=2)] == numbers[:2]
    assert [number for number, _ in store.read_latest(streams=("decision", "event"), kinds=(), limit=10, after_id=numbers[2])] == numbers[:2]
    assert [item.edge for _, item in store.read_latest(streams=("event",), kinds=("boot",), limit=10)] == ["gw-2", "gw-1"]
    assert [item.record.seq for _, item in store.read_latest(streams=("event",), kinds=(), limit=10, edge="gw-1")] == [1]
    assert store.read_latest(streams=(), kinds=(), limit=10) == [] and store.read_latest(streams=("event",), kinds=(), limit=10, edge="gw-3") == []


def test_desired_state_keeps_the_newest_and_a_bounded_history(store: Store) -> None:
    for generation in range(1, DESIRED_HISTORY + 31):
        store.put_desired("gw-1", {"generation": generation, "spec": {"n": generation}}, generation)
    store.put_desired("gw-2", {"generation": 3, "spec": {}}, 1)
    newest = {"generation": DESIRED_HISTORY + 30, "spec": {"n": DESIRED_HISTORY + 30}}
    assert store.desired("gw-1") == newest
    assert dict(store.all_desired()) == {"gw-1": newest, "gw-2": {"generation": 3, "spec": {}}}
    assert store.desired("gw-3") is None


def test_settings_are_kept_and_replaced(store: Store) -> None:
    store.put_setting("name", "one")
    store.put_setting("name", "two")
    store.put_setting("other", "")
    assert store.setting("name") == "two" and store.setting("other") == "" and store.setting("none") is None


def test_outages_open_and_end(store: Store) -> None:
    outage(store, "gw-1", 1000, None, "lost")
    outage(store, "gw-2", 2000, None, "silent")
    outage(store, "gw-1", 1000, 1500, "")
    outage(store, "gw-1", 3000, None, "lost")
    found = store.read_outages(0)
    assert [(one["edge"], one["start_ms"], one["end_ms"]) for one in found] == [("gw-1", 3000, None), ("gw-2", 2000, None), ("gw-1", 1000, 1500)]
    # Its end does not take the reason away that its beginning gave.
    assert [one["reason"] for one in found] == ["lost", "silent", "lost"]
    # An outage that is still open belongs to every span; one that ended before the span does not.
    assert [one["start_ms"] for one in store.read_outages(1501)] == [3000, 2000]
    assert [one["start_ms"] for one in store.read_outages(1500)] == [3000, 2000, 1000]
    assert [one["start_ms"] for one in store.read_outages(0, 1)] == [3000]


def test_prune_moves_the_base_with_what_went(store: Store) -> None:
    for edge in ("gw-1", "gw-2"):
        keep(store, *(stored(edge, "telemetry", seq) for seq in range(1, 11)), stored(edge, "decision", 1))
        store.commit(Transaction(streams={(edge, "telemetry"): stream_row(edge, "telemetry", 10, [])}))
    assert store.prune("gw-1", "telemetry", 6, b"c" * 16) == 6
    assert seqs(store.read_records("gw-1", "telemetry")) == [7, 8, 9, 10]
    assert len(store.read_records("gw-2", "telemetry")) == 10 and len(store.read_records("gw-1", "decision")) == 1
    assert {row.edge: (row.base, row.base_chain) for row in store.streams()} == {"gw-1": (7, b"c" * 16), "gw-2": (1, bytes(16))}
    assert store.prune("gw-1", "telemetry", 6, b"c" * 16) == 0 and store.prune("nobody", "telemetry", 6, b"") == 0


def test_opening_again_keeps_all(opener: Opener) -> None:
    first = opener()
    records = [stored("gw-1", "decision", seq) for seq in (1, 2, 3)]
    marks, row = stream_row("gw-1", "decision", 3, [[5, 6]]), EdgeRow("gw-1", "online", "start", 1, 2, "b", 3, 4, "", {"site": "plant"})
    first.commit(Transaction(records, {("gw-1", "decision"): marks}, {"gw-1": row}))
    first.put_desired("gw-1", {"generation": 2}, 9)
    first.put_setting("key", "value")
    outage(first, "gw-1", 5, None, "lost")
    numbers = [number for number, _ in first.read_latest(streams=("decision",), kinds=(), limit=10)]
    for _ in range(2):
        again = opener()
        assert again.read_records("gw-1", "decision") == records and again.streams() == [marks] and again.edges() == [row]
        assert again.desired("gw-1") == {"generation": 2} and again.setting("key") == "value"
        assert again.read_outages(0) == [{"edge": "gw-1", "start_ms": 5, "end_ms": None, "reason": "lost"}]
    keep(again, stored("gw-1", "decision", 4))
    assert again.read_latest(streams=("decision",), kinds=(), limit=1)[0][0] > max(numbers), "arrival numbers go on after a restart"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(commits=st.lists(st.lists(st.tuples(st.sampled_from(("a", "b")), st.integers(1, 12), st.integers(0, 99)), max_size=6), max_size=8), after=st.integers(0, 12), limit=st.integers(0, 8))
def test_commits_agree_with_a_dictionary(opener: Opener, tmp_path_factory: pytest.TempPathFactory, commits: list[list[tuple[str, int, int]]], after: int, limit: int) -> None:
    store = opener._make(tmp_path_factory.mktemp("model"))
    try:
        model: dict[tuple[str, int], StoredRecord] = {}
        for commit in commits:
            batch = [stored(edge, "decision", seq, body=f'{{"c":{content}}}') for edge, seq, content in commit]
            keep(store, *batch)
            for item in batch:
                model.setdefault((item.edge, item.record.seq), item)
        for edge in ("a", "b"):
            expected = [model[key] for key in sorted(model) if key[0] == edge and key[1] > after][:limit]
            assert store.read_records(edge, "decision", after=after, limit=limit) == expected
            assert store.read_count(edge, "decision", 1, 12) == sum(key[0] == edge for key in model)
        assert {(item.edge, item.record.seq): item for _, item in store.read_latest(streams=("decision",), kinds=(), limit=100)} == model
    finally:
        store.close()


# -- SQLite's file -----------------------------------------------------------------------------------------------------------


def filled(folder: Path, count: int = 400) -> Path:
    """A closed hub.db with records in it."""
    path = folder / "hub.db"
    store = SqliteStore(path)
    keep(store, *(stored("gw-1", "decision", seq, body='{"text":"' + "x" * 200 + '"}') for seq in range(1, count + 1)))
    store.put_desired("gw-1", {"generation": 1}, 1)
    store.close()
    return path


def damaged_header(path: Path) -> None:
    path.write_bytes(b"not a database at all, but long enough to look at " * 100)


def damaged_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for page in range(4096, len(data) - 4096, 8192):
        data[page : page + 4096] = bytes(reversed(data[page : page + 4096]))
    path.write_bytes(data)


def torn(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 + 100])


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [damaged_header, damaged_pages, torn, a_folder])
def test_a_damaged_file_is_refused_in_one_clear_error_and_left_alone(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = filled(tmp_path)
    damage(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StoreError) as caught:
        SqliteStore(path)
    assert "hub.db" in str(caught.value) and caught.value.remedy and "\n" not in str(caught.value)
    assert (path.read_bytes() if path.is_file() else b"") == before, "a damaged file is evidence: nothing is written to it"


def test_the_check_of_the_file_lets_a_whole_one_pass(tmp_path: Path) -> None:
    SqliteStore(filled(tmp_path)).close()


def test_a_torn_write_ahead_log_loses_the_torn_commit_and_nothing_before(tmp_path: Path) -> None:
    source = SqliteStore(tmp_path / "hub.db")
    for seq in range(1, 21):
        keep(source, stored("gw-1", "decision", seq))
    copy = tmp_path / "copy"
    copy.mkdir()
    # What a power cut leaves: the files as they are, the log's end not written out.
    shutil.copy(tmp_path / "hub.db", copy / "hub.db")
    log = (tmp_path / "hub.db-wal").read_bytes()
    source.close()
    (copy / "hub.db-wal").write_bytes(log[: len(log) - 1000])
    again = SqliteStore(copy / "hub.db")
    kept = seqs(again.read_records("gw-1", "decision"))
    again.close()
    assert kept == list(range(1, len(kept) + 1)) and len(kept) == 19


def test_a_second_process_that_holds_the_file_is_waited_for_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path, 1)
    monkeypatch.setattr(sqlite_module, "BUSY_TIMEOUT_S", 0.05)
    store = SqliteStore(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        keep(store, stored("gw-1", "decision", 2))
    other.execute("ROLLBACK")
    other.close()
    keep(store, stored("gw-1", "decision", 2))
    assert seqs(store.read_records("gw-1", "decision")) == [1, 2]
    store.close()


def names(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    found = [row[0] for row in connection.execute("SELECT name FROM migrations ORDER BY name")]
    connection.close()
    return found


def test_an_older_schema_is_migrated_once_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path, 3)
    applied: list[str] = []

    def add_note(db: Any) -> None:
        applied.append("note")
        db["edges"].add_column("note", str, not_null_default="none")

    monkeypatch.setattr(sqlite_module, "MIGRATIONS", (*sqlite_module.MIGRATIONS, ("9999_note", add_note)))
    for _ in range(2):
        store = SqliteStore(path)
        assert seqs(store.read_records("gw-1", "decision")) == [1, 2, 3] and store.desired("gw-1") == {"generation": 1}
        store.close()
    assert applied == ["note"]
    assert names(path) == [name for name, _ in sqlite_module.MIGRATIONS]
    connection = sqlite3.connect(path)
    assert "note" in [row[1] for row in connection.execute("PRAGMA table_info(edges)")]
    connection.close()


def test_a_migration_cut_short_is_done_again_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path, 3)
    fail = [True]

    def two_steps(db: Any) -> None:
        db["edges"].add_column("one", str)
        if fail.pop() if fail else False:
            raise KeyboardInterrupt  # the process ends here
        db["edges"].add_column("two", str)

    monkeypatch.setattr(sqlite_module, "MIGRATIONS", (*sqlite_module.MIGRATIONS, ("9999_two_steps", two_steps)))
    with pytest.raises(KeyboardInterrupt):
        SqliteStore(path)
    store = SqliteStore(path)
    assert seqs(store.read_records("gw-1", "decision")) == [1, 2, 3]
    store.close()


def test_the_first_schema_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sqlite_module.MIGRATIONS[0]

    def cut_short(db: Any) -> None:
        first[1](db)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sqlite_module, "MIGRATIONS", ((first[0], cut_short),))
        with pytest.raises(KeyboardInterrupt):
            SqliteStore(tmp_path / "hub.db")
    store = SqliteStore(tmp_path / "hub.db")
    keep(store, stored("gw-1", "decision", 1))
    store.close()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path, 1)
    connection = sqlite3.connect(path)
    connection.execute("INSERT INTO migrations (name) VALUES ('9999_of_a_newer_hub')")
    connection.commit()
    connection.close()
    with pytest.raises(StoreError, match="9999_of_a_newer_hub"):
        SqliteStore(path)


def test_the_hub_says_in_one_line_that_its_store_is_damaged(tmp_path: Path) -> None:
    damaged_header(filled(tmp_path, 1))
    ran = subprocess.run(
        [sys.executable, "-m", "hub", "--data-dir", str(tmp_path), "--broker", "embedded", "--broker-listen", "127.0.0.1:0", "--listen", "127.0.0.1:0"], capture_output=True, text=True, timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 1 and ran.stdout == "" and ran.stderr.count("\n") == 1, ran.stderr
    assert ran.stderr.startswith("novacron-hub: data-dir: ") and "hub.db" in ran.stderr and "backup" in ran.stderr


def test_clocks_of_boots_are_replaced_and_the_newest_given_back(store: Store) -> None:
    made = [BootClock("gw-1", f"b{number}", "rtc", number) for number in range(5)]
    store.commit(Transaction(clocks=made))
    better = BootClock("gw-1", "b1", "ntp", 7)
    store.commit(Transaction(clocks=[better]))
    assert store.clocks(3) == [made[3], made[4], better] and len(store.clocks(100)) == 5


# -- nodes, workloads, placements: every implementation ----------------------------------------------------------------------


def workload(name: str, state: str = "pending", **more: Any) -> WorkloadRow:
    return WorkloadRow(name, {"id": name, "labels": {"a": "\u00e9"}}, state, **{"created_ms": 1, "changed_ms": 5, **more})


def test_an_empty_store_has_no_workloads(store: Store) -> None:
    assert store.nodes() == [] and store.workloads() == [] and store.open_placements() == [] and store.budgets() == {} and store.quotas() == {}
    assert store.workload_cursor() == 0 and store.read_events_after(("workload",), 0, 10) == ([], 0) and store.read_placements("a") == [] and store.read_utilisation(0, 10) == []
    assert store.forget_workloads(10**15, 0) == []


def test_what_one_transaction_says_of_workloads_is_read_back_whole_and_none_deletes(opener: Opener) -> None:
    store = opener()
    rows = [workload("b", "placed", node="n-1", epoch=2, reason="why \u00fc", avoid={"n-2": [7, 1, "no"]}, plan={"start_ms": 5, "nodes": ["n-1"]}, fences={"1": 7}), workload("a", created_ms=2)]
    node = NodeRow("n-1", "edge", {"capacity": {"cpu": 4}}, "drain", 7, 8, "odd", {"bad=": 12})
    places = [PlacementRow("b", 1, "n-2", {"gpus": [], "numa": []}, 1, 3, "running", "moved"), PlacementRow("b", 2, "n-1", {"gpus": [1], "numa": [[0, 1, 2]]}, 3, seqs={"said": 12, "form": 3})]
    changes = WorkloadChanges({row.id: row for row in rows}, {(row.workload, row.epoch): row for row in places}, {"n-1": node}, {"b": {"allowed": 1}}, {"t": {"nominal": {}}}, 99, {"r": {"state": "running"}}, {"x": 7})
    assert changes and not WorkloadChanges()
    store.commit_workloads(changes)
    store = opener()
    assert store.workloads() == rows and store.nodes() == [node] and store.open_placements() == [places[1]] and store.read_placements("b") == places[::-1] and store.read_placements("b", 1) == places[1:]
    assert store.budgets() == {"b": {"allowed": 1}} and store.quotas() == {"t": {"nominal": {}}} and store.workload_cursor() == 99
    assert store.rebalances() == {"r": {"state": "running"}} and store.heard_epochs() == {"x": 7}
    store.commit_workloads(WorkloadChanges({"a": None}, {("b", 2): None}, {"n-1": None}, {"b": None}, {"t": None}, None, {"r": None}, {"x": None}))
    assert store.rebalances() == {} and store.heard_epochs() == {}
    assert store.workloads() == rows[:1] and store.nodes() == [] and store.open_placements() == [] and store.budgets() == store.quotas() == {} and store.workload_cursor() == 99


def test_a_transaction_of_workloads_is_all_or_nothing(store: Store) -> None:
    store.commit_workloads(WorkloadChanges({"a": workload("a")}))
    with pytest.raises(TypeError):
        store.commit_workloads(WorkloadChanges({"a": workload("a", "placed"), "b": workload("b")}, quotas={"t": {"x": object()}}, cursor=5))
    assert store.workloads() == [workload("a")] and store.workload_cursor() == 0
    store.commit_workloads(WorkloadChanges({"a": workload("a", "done")}))
    assert store.workloads() == [workload("a", "done")]


def test_events_are_read_on_from_a_number_and_the_answer_says_how_far(store: Store) -> None:
    keep(store, *(stored("gw-1", "event", seq, kind="workload" if seq % 2 else "alert") for seq in range(1, 8)))
    keep(store, stored("gw-1", "telemetry", 1), stored("gw-2", "event", 1, kind="node.capacity"), stored("gw-2", "event", 2, kind="alert"))
    found, upto = store.read_events_after(("workload", "node.capacity"), 0, 100)
    assert [(item.edge, item.record.seq) for _, item in found] == [("gw-1", 1), ("gw-1", 3), ("gw-1", 5), ("gw-1", 7), ("gw-2", 1)] and upto > found[-1][0]
    assert store.read_events_after(("workload",), upto, 100) == ([], upto)
    part, upto = store.read_events_after(("workload",), found[0][0], 2)
    assert [item.record.seq for _, item in part] == [3, 5] and upto == part[-1][0], "cut short: go on from there"


def test_utilisation_is_kept_by_the_minute_and_no_longer_than_asked(store: Store) -> None:
    for minute in range(100, 110):
        store.put_utilisation(minute, {"n": minute}, 5)
    assert [minute for minute, _ in store.read_utilisation(0, 100)] == [105, 106, 107, 108, 109] and store.read_utilisation(107, 2) == [(108, {"n": 108}), (109, {"n": 109})]


def test_ended_workloads_are_forgotten_by_age_and_by_number_with_their_placements(store: Store) -> None:
    rows = [workload(f"w{n}", "done" if n % 2 else "cancelled", changed_ms=n) for n in range(6)] + [workload("live", "placed", changed_ms=0), workload("waits", changed_ms=0)]
    store.commit_workloads(WorkloadChanges({row.id: row for row in rows}, {(row.id, 1): PlacementRow(row.id, 1, "n", {}, 0, 1) for row in rows}))
    assert sorted(store.forget_workloads(2, 3)) == ["w0", "w1", "w2"]
    assert {row.id for row in store.workloads()} == {"w3", "w4", "w5", "live", "waits"} and store.read_placements("w1") == [] and len(store.read_placements("w3")) == 1


def test_the_thread_that_commits_reads_what_it_has_committed_whoever_reads_beside_it(tmp_path: Path) -> None:
    """A page that is being read holds its connection at what there was; ingest took what it had just committed for lost then, and asked the edge for it again."""
    store = SqliteStore(tmp_path / "hub.db")
    try:
        store.commit(Transaction(records=[stored("e", "event", seq) for seq in (1, 2)]))
        page = store._read.execute("SELECT seq FROM records ORDER BY seq")
        assert page.fetchone() == (1,)
        store.commit(Transaction(records=[stored("e", "event", 3)]))
        assert [row.record.seq for row in store.read_records("e", "event", committed=True)] == [1, 2, 3]
        assert [row.record.seq for row in store.read_records("e", "event")] == [1, 2], "the control: it is held"
        assert page.fetchall() == [(2,)]
        assert len(store.read_records("e", "event")) == 3
    finally:
        store.close()
