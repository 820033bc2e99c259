"""Negative controls: planted bugs. A simulator that lets one of them through checks nothing.

Each replaces one function of the running code, by name, for the length of a run. `needs` says which faults it takes for the bug to matter: the
runs of a control are drawn with that focus, and one of the first few must break a promise that the same run without the bug keeps.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from edge_runtime.clock import Stamp, SystemClock
from edge_runtime.contract.records import Batch, Record
from edge_runtime.decisions.engine import DecisionEngine
from edge_runtime.desired_state import DesiredState
from edge_runtime.devices.bus import Bus
from edge_runtime.journal.database import Group, JournalDatabase
from edge_runtime.journal.journal import Journal
from edge_runtime.journal.lane import Lane
from edge_runtime.pipeline import Pipeline
from edge_runtime.uplink import link as uplink_link
from edge_runtime.uplink.backoff import Backoff
from edge_runtime.uplink.lanes import Lanes
from hub.book import BootWatch, StreamBook
from hub.ingest import Ingest
from hub.retention import Retention
from hub.server import Hub
from hub.store.sqlite import SqliteStore

SEEDS_MAX = 12
"""Seeds that are tried per control."""

HOURS = 1.5
"""Length of a control's runs: room for its faults to come eight times."""


SETTLE_S = 900.0
"""Virtual seconds in which a control's run must have converged: a quarter of what a seed gets, or most of the time goes into waiting for what a
planted bug prevents. The run without the bug has no more."""


@dataclass(frozen=True, slots=True)
class Control:
    """One planted bug."""

    name: str
    text: str
    needs: tuple[str, ...]
    replace: Callable[[], Iterator[None]]


CONTROLS: dict[str, Control] = {}


def control(text: str, *needs: str) -> Callable[[Callable[[], list[tuple[Any, str, Any]]]], None]:
    """Register a control: the function returns what to replace, as (owner, name, value)."""

    def register(make: Callable[[], list[tuple[Any, str, Any]]]) -> None:
        name = make.__name__.strip("_").replace("_", "-")

        def replace() -> Iterator[None]:
            replaced = [(owner, attribute, owner.__dict__[attribute], value) for owner, attribute, value in make()]
            for owner, attribute, _, value in replaced:
                setattr(owner, attribute, value)
            try:
                yield
            finally:
                for owner, attribute, before, _ in replaced:
                    setattr(owner, attribute, before)

        CONTROLS[name] = Control(name, text, needs, replace)

    return register


def planted(name: str) -> contextlib.AbstractContextManager[None]:
    """The bug `name` in force while the context lasts; none for an empty name."""
    if not name:
        return contextlib.nullcontext()
    return contextlib.contextmanager(CONTROLS[name].replace)()


# -- journal -----------------------------------------------------------------------------------------------------------------------

@control("a device's message is acknowledged when it arrives, not when it is durable", "power_cut")
def _acknowledge_before_commit() -> list[tuple[Any, str, Any]]:
    shipped = Bus._message

    def message(self: Bus, topic: str, payload: bytes, done: Callable[[], None]) -> None:
        done()
        shipped(self, topic, payload, lambda: None)

    return [(Bus, "_message", message)]


@control("the number of a boot is remembered although the commit that gave it was undone", "restart", "disk_full")
def _boot_of_an_undone_commit() -> list[tuple[Any, str, Any]]:
    shipped = JournalDatabase.commit

    def commit(self: JournalDatabase, group: Group) -> None:
        class Remembers(dict[str, int]):
            def __delitem__(self, boot: str) -> None:
                return

        if not isinstance(self._boots, Remembers):
            self._boots = Remembers(self._boots)
        shipped(self, group)

    return [(JournalDatabase, "commit", commit)]


@control("effects run when the commit begins, not when it is done", "power_cut")
def _act_before_commit() -> list[tuple[Any, str, Any]]:
    shipped = Lane._submit

    def submit(self: Lane) -> None:
        assert self._group is not None
        group, rows, callbacks = self._group
        if not self._droppable:
            for record, callback in rows:
                if callback is not None:
                    callback(record)
            self._group = (group, [(record, None) for record, _ in rows], callbacks)
        shipped(self)

    return [(Lane, "_submit", submit)]


@control("the journal of decisions commits without fsync", "power_cut")
def _no_fsync() -> list[tuple[Any, str, Any]]:
    shipped = JournalDatabase.open

    def open_(self: JournalDatabase) -> None:
        self._synchronous = "OFF"
        shipped(self)

    return [(JournalDatabase, "open", open_)]


@control("telemetry commits with synchronous=NORMAL: what was acknowledged may roll back, and its numbers come again", "power_cut")
def _telemetry_synchronous_normal() -> list[tuple[Any, str, Any]]:
    shipped = JournalDatabase.open

    def open_(self: JournalDatabase) -> None:
        if self.path.stem == "telemetry":
            self._synchronous = "NORMAL"
        shipped(self)

    return [(JournalDatabase, "open", open_)]


@control("after a boot the last sequence number is given again", "power_cut")
def _sequence_reused() -> list[tuple[Any, str, Any]]:
    shipped, commit = JournalDatabase.marks, JournalDatabase.commit

    def marks(self: JournalDatabase) -> Any:
        found = shipped(self)
        for entry in found.values():
            if entry.next_seq > entry.floor + 1:
                entry.next_seq -= 1
        return found

    def commit_(self: JournalDatabase, group: Group) -> None:
        for stream, rows in group.records.items():
            self.writer.execute(f"DELETE FROM records_{stream} WHERE seq>=?", (rows[0][0].seq,))
        commit(self, group)

    return [(JournalDatabase, "marks", marks), (JournalDatabase, "commit", commit_)]


@control("where several records wait the newest is dropped and taken for written")
def _drop_newest() -> list[tuple[Any, str, Any]]:
    shipped = Lane._begin

    def begin(self: Lane) -> None:
        if self._droppable and len(self._pending) > 1 and self._group is None:
            item = self._pending.pop()
            self._awaited -= item.callback is not None
            if item.callback is not None:
                item.callback(Record(0, "", 0, 0, "rtc", "", ""))
        shipped(self)

    return [(Lane, "_begin", begin)]


@control("readings of one turn are written newest first", "kill")
def _newest_first() -> list[tuple[Any, str, Any]]:
    shipped = Pipeline._keep_telemetry

    def keep(self: Pipeline) -> None:
        self._taken.reverse()
        shipped(self)

    return [(Pipeline, "_keep_telemetry", keep)]


@control("every receipt is taken for one of everything: records are freed that the hub never had", "partition", "flaky")
def _receipt_covers_all() -> list[tuple[Any, str, Any]]:
    shipped = Journal.receipt
    return [(Journal, "receipt", lambda self, stream, upto: shipped(self, stream, self.durable(stream)))]


@control("the WAL is never checkpointed")
def _wal_grows() -> list[tuple[Any, str, Any]]:
    shipped = JournalDatabase.open

    def open_(self: JournalDatabase) -> None:
        shipped(self)
        self.writer.execute("PRAGMA wal_autocheckpoint=0")

    return [(JournalDatabase, "open", open_), (Lane, "_checkpoint", lambda self: None)]


@control("the clock's word is believed in 1970", "clock_1970")
def _believes_1970() -> list[tuple[Any, str, Any]]:
    def stamp(self: SystemClock) -> Stamp:
        return Stamp(self.mono_ms(), max(0, int(self._wall() * 1000)), "rtc")

    return [(SystemClock, "stamp", stamp)]


# -- uplink ------------------------------------------------------------------------------------------------------------------------

@control("the back-off begins anew with every connection, however short", "broker_slams")
def _backoff_reset_at_once() -> list[tuple[Any, str, Any]]:
    shipped = Backoff.link_down

    def link_down(self: Backoff, now_s: float) -> None:
        shipped(self, now_s)
        self._failures = 0

    return [(Backoff, "link_down", link_down)]


@control("the back-off has no jitter", "broker_restart")
def _backoff_without_jitter() -> list[tuple[Any, str, Any]]:
    shipped = Backoff.next_s

    def next_s(self: Backoff) -> float:
        bound = min(self._cap_s, self._base_s * 2.0 ** min(self._failures, 32))
        shipped(self)
        return bound

    return [(Backoff, "next_s", next_s)]


@control("ranges that the hub asks for are not sent again", "flaky", "flaky")
def _wants_ignored() -> list[tuple[Any, str, Any]]:
    shipped = Lanes.receipt
    return [
        (Lanes, "receipt", lambda self, stream, upto, held, want, now: shipped(self, stream, upto, held, [], now)),
        (Lanes, "ask_self", lambda self, now: False), (Lanes, "silent", lambda self, now: False),
    ]


@control("the hub is not told where the journal begins", "backup", "kill", "kill", "hub_restore")
def _floor_not_told() -> list[tuple[Any, str, Any]]:
    shipped = uplink_link.encode_batch  # type: ignore[attr-defined]
    return [(uplink_link, "encode_batch", lambda **given: shipped(**{**given, "floor": 1, "floor_chain": bytes(16)}))]


@control("the live lane is not told what was dropped below it: it asks for it for ever", "disk_full")
def _live_below_floor() -> list[tuple[Any, str, Any]]:
    def released(self: Lanes, stream: str, floor: int) -> None:
        self.streams[stream].floor = max(self.streams[stream].floor, floor)

    return [(Lanes, "released", released)]


# -- decisions ---------------------------------------------------------------------------------------------------------------------

@control("readings are not decided on while no hub is reachable", "partition")
def _decides_only_online() -> list[tuple[Any, str, Any]]:
    original = Pipeline._take

    def take(self: Pipeline, device: str, readings: Any, stamp: Stamp, done: Any) -> None:
        if self._offline():
            for reading in readings:
                self._journal.append("telemetry", "reading", {"device": device, "values": reading.values}, None, stamp)
            done()
            return
        original(self, device, readings, stamp, done)

    return [(Pipeline, "_take", take)]


@control("inputs are rounded while no hub is reachable", "mirror")
def _rounds_offline() -> list[tuple[Any, str, Any]]:
    shipped = Pipeline._take

    def take(self: Pipeline, device: str, readings: Any, stamp: Stamp, done: Any) -> None:
        if self._offline():
            for reading in readings:
                reading.values = {name: round(value) if isinstance(value, float) else value for name, value in reading.values.items()}
        shipped(self, device, readings, stamp, done)

    return [(Pipeline, "_take", take)]


@control("latches are not set from the journal after a crash: a rule fires again", "power_cut")
def _latches_forgotten() -> list[tuple[Any, str, Any]]:
    return [(DecisionEngine, "latch", lambda self, rule, device, active: None)]


@control("a command that is sent again after a restart gets a new id", "kill")
def _new_id_at_replay() -> list[tuple[Any, str, Any]]:
    shipped = Pipeline._command_of

    def command_of(self: Pipeline, record: Record, number: int, detail: dict[str, Any], duty: str, fence: int, again: bool = False) -> Any:
        command = shipped(self, record, number, detail, duty, fence, again)
        command.id = f"{self._edge}.{self._journal.boot[:8]}.{record.seq}.{number}"
        return command

    return [(Pipeline, "_command_of", command_of), (Journal, "effects_done", lambda self, stream, upto: None)]


@control("a command that is sent again is given more time", "kill")
def _expiry_moves_at_replay() -> list[tuple[Any, str, Any]]:
    shipped = Pipeline._command_of

    def command_of(self: Pipeline, record: Record, number: int, detail: dict[str, Any], duty: str, fence: int, again: bool = False) -> Any:
        command = shipped(self, record, number, detail, duty, fence, again)
        command.expires_ms += 60_000 if again else 0
        return command

    return [(Pipeline, "_command_of", command_of), (Journal, "effects_done", lambda self, stream, upto: None)]


# -- desired state -----------------------------------------------------------------------------------------------------------------

@control("after a restart the edge knows the generation but not its rules", "desired", "kill")
def _rules_not_restored() -> list[tuple[Any, str, Any]]:
    shipped = DesiredState._take_desired

    def take(self: DesiredState, desired: Any, rules: Any, restored: bool = False) -> None:
        shipped(self, desired, None if restored else rules, restored)

    return [(DesiredState, "_take_desired", take)]


@control("a hub restored from a backup does not go above the generation that the edge has seen", "desired", "backup", "desired", "hub_restore")
def _generation_not_raised() -> list[tuple[Any, str, Any]]:
    shipped = Hub._presence

    def presence(self: Hub, change: Any) -> None:
        document = self.desired.get(change.row.edge)
        if document is None or change.row.generation <= document["generation"]:
            shipped(self, change)

    return [(Hub, "_presence", presence)]


# -- hub ---------------------------------------------------------------------------------------------------------------------------

@control("a receipt reaches beyond a gap", "flaky")
def _receipt_beyond_a_gap() -> list[tuple[Any, str, Any]]:
    shipped = StreamBook.fresh

    def fresh(self: StreamBook, batch: Batch) -> list[Record]:
        out = shipped(self, batch)
        if len(self.above):
            self.contiguous = self.above.top
            self.above.drop_upto(self.contiguous)
        return out

    return [(StreamBook, "fresh", fresh)]


@control("records that came before are stored as new", "flaky")
def _duplicates_counted() -> list[tuple[Any, str, Any]]:
    shipped = StreamBook.fresh

    def fresh(self: StreamBook, batch: Batch) -> list[Record]:
        shipped(self, batch)
        return list(batch.records)

    return [(StreamBook, "fresh", fresh)]


@control("receipts are sent before the commit")
def _receipt_before_commit() -> list[tuple[Any, str, Any]]:
    shipped = Ingest._commit

    async def commit(self: Ingest, transaction: Any, touched: dict[str, set[str]]) -> None:
        ahead, self._ahead = self._ahead, set()
        for edge, streams in touched.items():
            self.send_receipts(edge, streams)
        self._ahead = ahead
        await shipped(self, transaction, touched)

    return [(Ingest, "_commit", commit)]


@control("the hub deletes what is old by the date that its clock tells", "hub_clock")
def _deletes_by_the_date() -> list[tuple[Any, str, Any]]:
    return [(Retention, "ran_ms", lambda self: self._ingest._now_ms())]


@control("the hub's store loses the last record of each commit")
def _store_loses_a_row() -> list[tuple[Any, str, Any]]:
    shipped = SqliteStore.commit
    return [(SqliteStore, "commit", lambda self, transaction: shipped(self, replace(transaction, records=transaction.records[:-1])))]


@control("the hub loses its newest record when it starts again", "hub_restart")
def _store_forgets_at_start() -> list[tuple[Any, str, Any]]:
    shipped = SqliteStore.__init__

    def init(self: SqliteStore, path: Any) -> None:
        shipped(self, path)
        with self._transaction() as connection:
            connection.execute("DELETE FROM records WHERE rowid=(SELECT max(rowid) FROM records)")

    return [(SqliteStore, "__init__", init)]


@control("two machines with one identity are not told apart", "clone")
def _clones_not_noticed() -> list[tuple[Any, str, Any]]:
    return [(BootWatch, "heard", lambda self, boot, number, now: "")]


@control("only the first ten edges of a storm are given credit", "storm")
def _credit_for_few() -> list[tuple[Any, str, Any]]:
    shipped = Ingest.send_receipts

    def send(self: Ingest, edge: str, streams: set[str]) -> None:
        if edge in sorted(self.fleet.rows)[:10]:
            shipped(self, edge, streams)

    return [(Ingest, "send_receipts", send)]
