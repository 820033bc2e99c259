"""Ingest: batches in, one commit for many, then receipts. The books are pure; this is their clock, thread and broker.

    broker -> queue (bounded) -> parse -> books -> commit (writer thread) -> receipts
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.limits import MAX_WANT_RANGES, PROTOCOL_VERSION
from edge_runtime.contract.presence import EDGE_PRESENCE
from edge_runtime.contract.records import Batch, Record, parse_batch
from edge_runtime.contract.streams import STREAMS
from edge_runtime.system.reasons import Reasons

from .book import RangeSet, StreamBook
from .credit import credit
from .dating import MAX_CLOCKS, Clocks
from .fleet import Change, Fleet
from .store.base import EdgeRow, Outage, Store, StoredRecord, StreamRow, Transaction

log = logging.getLogger(__name__)

QUEUE_MAX = 20_000
QUEUE_BYTES = 64 << 20
"""Messages that wait for the books, and their bytes: batches of 200 records reach the second first, and that is far more than the credit lets through; when thousands of edges come at once, each says
five small things. Past either a message is dropped, counted, and asked for again when there is room."""

QUEUE_LOW = 0.25
"""Share of the queue in use below which who was starved, or lost a message here, is spoken to again."""

MISSED_RECORDS = 200
"""Records behind the last that are asked for of an edge that lost a message here: one batch, and it sends no more than it has sent."""

COMMIT_RECORDS = 4_000
"""Records of one commit at most: about 40 ms here, which bounds how long a receipt waits."""

ADVANCE_CHUNK = 2_000
"""Stored records read back at once when a gap closes and the chain has to be computed over what came before its turn."""

DRAINING_MS = 10_000
"""An edge that sent history within this is draining."""

MAX_ERRORS = 100
"""Refused messages kept for a person to look at."""

REFUSED_LOG_MS = 60_000
"""One line per edge and this long: an edge gone wrong must not fill the hub's disk with its complaints."""

STEP_MS = 2_000
"""A difference between what passed by the hub's wall clock and while it was there, above which the clock was set, or the hub stood still (a machine that was suspended): a slewed clock never differs so much between two looks."""

THERE_S = 5.0
"""Seconds between two looks at most for which the hub was there: no job of its loop takes longer."""

OUTAGES_WAITING_MAX = 10_000
"""Outages kept in memory while the store takes no commit; the oldest give way, counted."""


@dataclass(slots=True)
class Pace:
    """How often the hub does what no message asks for, seconds; read anew each time.

    Attributes:
        tick_s: gaps, silence and credit are looked at.
    """

    tick_s: float = 0.5


class Ingest:
    """The hub's intake.

    Args:
        publish: sends a payload to a topic's edge: `publish(edge, leaf, payload, retain)`.
        now_ms: the hub's wall milliseconds.
        on_records: called after each commit with the records stored in it.
        writer: the store's one writing thread.
        pace: how often gaps, silence and credit are looked at.
    """

    def __init__(
        self, store: Store, fleet: Fleet, hub: str, boot: str, *, publish: Callable[[str, str, bytes, bool], None], now_ms: Callable[[], int],
        on_records: Callable[[list[StoredRecord]], None] = lambda _: None, on_presence: Callable[[Change], None] = lambda _: None,
        writer: Executor | None = None, pace: Pace | None = None,
    ) -> None:
        self.store = store
        self.fleet = fleet
        self._hub = hub
        self._boot = boot
        self._publish = publish
        self._now_ms = now_ms
        self._on_records = on_records
        self._on_presence = on_presence
        self.books: dict[tuple[str, str], StreamBook] = {}
        self._queue: asyncio.Queue[tuple[str, str, bytes, bool]] = asyncio.Queue(QUEUE_MAX)
        self._queued_bytes = 0
        self._missed: set[str] = set()
        """Edges of which a batch was dropped: it is the only one who would else know, after `RECEIPT_TIMEOUT_MS`."""
        self._writer = writer or ThreadPoolExecutor(1, "hub-store")
        self._pace = pace or Pace()
        self._tasks: list[asyncio.Task[None]] = []
        self.counters: Counter[str] = Counter()
        self.errors: list[dict[str, Any]] = []
        self._refused_logged: dict[str, int] = {}
        self._drained_ms: dict[str, int] = {}
        self._starved: set[str] = set()
        self._dirty_edges: dict[str, EdgeRow] = {}
        self._dirty_outages: dict[tuple[str, int], Outage] = {}
        self._complaints = Reasons()
        self.store_refusal = ""
        """Why the store did not take the last commit; empty where it did."""
        self._ahead: set[tuple[str, str]] = set()
        """Streams whose books know records that are not committed yet: no receipt may speak of them."""
        self.clocks = Clocks()
        self._load()

    def _load(self) -> None:
        for clock in self.store.clocks(MAX_CLOCKS):
            self.clocks.remember(clock)
        for row in self.store.streams():
            self.books[row.edge, row.stream] = _book(row)
        for edge in self.store.edges():
            # What the hub believed before it stopped is history: an edge is online when it says so again.
            if edge.state == "online":
                edge.state, edge.reason = "offline", "the hub was away"
            self.fleet.rows[edge.edge] = edge

    def start(self) -> "list[asyncio.Task[None]]":
        """Begin; call inside the running loop. The tasks never end by themselves."""
        loop = asyncio.get_running_loop()
        self.fleet.began_ms = self.fleet.looked_ms = self._now_ms()
        self._tasks = [loop.create_task(self._consume(), name="ingest"), loop.create_task(self._tick_forever(), name="ingest tick")]
        return self._tasks

    async def stop(self) -> None:
        """End; what was queued and not committed is sent again by the edges. What they do not send again is committed, if the store takes it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._dirty_edges:
            await self._commit(Transaction(), {})
        self._writer.shutdown()

    def write(self, job: Callable[[], Any]) -> "asyncio.Future[Any]":
        """Run `job` on the store's writer thread."""
        return asyncio.get_running_loop().run_in_executor(self._writer, job)

    # -- in ------------------------------------------------------------------------------------------------------------------

    def message(self, edge: str, leaf: str, payload: bytes, retained: bool) -> None:
        """A message of an edge from the broker (`leaf` is `up` or `status`)."""
        if self._queue.full() or self._queued_bytes + len(payload) > QUEUE_BYTES:
            self.counters["dropped_messages_total"] += 1
            if leaf == "up" and len(self._missed) < QUEUE_MAX:
                self._missed.add(edge)
            return
        self._queue.put_nowait((edge, leaf, payload, retained))
        self._queued_bytes += len(payload)

    def refused(self, edge: str, error: ContractError) -> None:
        """Count and remember a refused message; no other edge notices."""
        self.counters[f"rejected_messages_total:{error.reason}"] += 1
        if len(self.errors) >= MAX_ERRORS:
            del self.errors[0]
        self.errors.append({"edge": edge, "time_ms": self._now_ms(), **error.to_json()})
        now = self._now_ms()
        if not 0 <= now - self._refused_logged.get(edge, -REFUSED_LOG_MS) < REFUSED_LOG_MS:
            if len(self._refused_logged) >= MAX_ERRORS:
                self._refused_logged.clear()
            self._refused_logged[edge] = now
            log.warning("a message of edge %s was refused: %s (its others of this minute are only counted)", edge, error)

    @property
    def queue_fill(self) -> float:
        """Share of the queue in use."""
        return max(self._queue.qsize() / QUEUE_MAX, self._queued_bytes / QUEUE_BYTES)

    async def _consume(self) -> None:
        while True:
            messages = [await self._queue.get()]
            transaction = Transaction()
            touched: dict[str, set[str]] = {}
            count = 0
            while True:
                for edge, leaf, payload, retained in messages:
                    self._queued_bytes -= len(payload)
                    try:
                        if leaf == "status":
                            self._presence(edge, payload, retained, transaction, touched)
                        else:
                            count += self._batch(edge, payload, transaction, touched)
                    except ContractError as error:
                        self.refused(edge, error)
                    except Exception:
                        self.counters["failed_messages_total"] += 1
                        log.exception("a message of edge %s could not be taken in", edge)
                if count >= COMMIT_RECORDS or self._queue.empty():
                    break
                messages = [self._queue.get_nowait()]
            await self._commit(transaction, touched)

    def _batch(self, edge: str, payload: bytes, transaction: Transaction, touched: dict[str, set[str]]) -> int:
        batch: Batch = parse_batch(jsoncodec.decode(payload), edge)
        now = self._now_ms()
        row = self.fleet.heard(edge, batch.boot, batch.boot_n, now)
        transaction.edges[edge] = row
        touched.setdefault(edge, set())
        if row.quarantine:
            self.counters["quarantined_messages_total"] += 1
            return 0
        book = self.books.setdefault((edge, batch.stream), StreamBook())
        book.told(batch)
        fresh = book.fresh(batch)
        book.check(batch)
        self.counters["records_total"] += len(fresh)
        self.counters["duplicate_records_total"] += len(batch.records) - len(fresh)
        transaction.records += [StoredRecord(edge, batch.stream, record, now) for record in fresh]
        transaction.clocks += [clock for record in fresh if (clock := self.clocks.observe(edge, record)) is not None]
        touched[edge].add(batch.stream)
        self._ahead.add((edge, batch.stream))
        if batch.lane == "history":
            self._drained_ms[edge] = now
        return len(batch.records)

    def _presence(self, edge: str, payload: bytes, retained: bool, transaction: Transaction, touched: dict[str, set[str]]) -> None:
        if not payload:
            return
        message = EDGE_PRESENCE.parse(jsoncodec.decode(payload))
        if message["edge"] != edge:
            raise ContractError("edge", f"{message['edge']!r} on the topic of {edge!r}", "publish on the edge's own topic", "topic")
        if message["state"] == "online" and PROTOCOL_VERSION not in message["speaks"]:
            raise ContractError("speaks", f"the edge speaks {message['speaks']}, not {PROTOCOL_VERSION}", "update the edge or this hub", "version")
        self.changed(self.fleet.presence(message, self._now_ms(), retained), transaction)
        if message["state"] == "online":
            touched.setdefault(edge, set()).update(STREAMS)  # answered after the commit

    def changed(self, change: Change, transaction: Transaction | None = None) -> None:
        """Keep what a presence changed."""
        row = change.row
        if transaction is None:
            self._dirty_edges[row.edge] = row
        else:
            transaction.edges[row.edge] = row
        outages = self._dirty_outages if transaction is None else transaction.outages
        if change.outage_started_ms is not None:
            outages[row.edge, change.outage_started_ms] = Outage(None, row.reason)
        if change.outage_ended is not None:
            begin, end = change.outage_ended
            _end(outages, (row.edge, begin), Outage(end, ""))
        self._on_presence(change)

    # -- commit and answer ---------------------------------------------------------------------------------------------------

    async def _commit(self, transaction: Transaction, touched: dict[str, set[str]]) -> None:
        transaction.edges |= self._dirty_edges
        waited, self._dirty_edges, self._dirty_outages = self._dirty_outages, {}, {}
        for began, outage in transaction.outages.items():
            _end(waited, began, outage)
        transaction.outages = waited
        keys = [(edge, stream) for edge, streams in touched.items() for stream in streams]
        transaction.streams = {key: _row(key, self.books[key]) for key in keys if key in self._ahead}
        try:
            await self.write(lambda: self.store.commit(transaction))
        except Exception as error:
            self.counters["failed_commits_total"] += 1
            self.store_refusal = str(error)
            if self._complaints.worth(self.store_refusal, self._now_ms() / 1000):  # it comes again with each try, and its log may be on the same disk
                log.error("the store refuses commits: %s; nothing of them is kept, the edges will send it again", error)
            self._keep(transaction)
            for clock in transaction.clocks:
                self.clocks.forget(clock)
            await self._reload(list(transaction.streams))
            return
        finally:
            self._ahead.difference_update(transaction.streams)
        self.counters["commits_total"] += 1
        if self.store_refusal:
            if self._complaints.told:
                log.info("the store takes commits again")
            self.store_refusal, self._complaints.told = "", False
        for key in transaction.streams:
            try:
                if self.books[key].reachable() is not None:
                    await self._advance(key)
            except Exception:  # one stream's trouble is not another's
                self.counters["failed_advances_total"] += 1
                log.exception("the mark of %s %s could not be moved", *key)
        for edge, streams in touched.items():
            self.send_receipts(edge, streams)
        if transaction.records:
            self._on_records(transaction.records)

    def _keep(self, failed: Transaction) -> None:
        """What nobody sends again: presence, and the outages that it told."""
        self._dirty_edges = failed.edges | self._dirty_edges
        for began, outage in self._dirty_outages.items():  # while it failed
            _end(failed.outages, began, outage)
        self._dirty_outages = failed.outages
        while len(self._dirty_outages) > OUTAGES_WAITING_MAX:
            del self._dirty_outages[next(iter(self._dirty_outages))]
            self.counters["dropped_outages_total"] += 1

    async def _reload(self, keys: list[tuple[str, str]]) -> None:
        """After a failed commit the books must not know more than the store."""
        while keys:
            try:
                rows = {(row.edge, row.stream): row for row in await self.write(self.store.streams)}
            except Exception as error:  # taking records in must not end with a disk that is away for a while
                if self._complaints.worth(str(error), self._now_ms() / 1000):
                    log.error("the store cannot be read: %s; trying again", error)
                await asyncio.sleep(self._pace.tick_s)
            else:
                for key in keys:
                    self.books[key] = _book(rows[key]) if key in rows else StreamBook()
                return

    async def _advance(self, key: tuple[str, str]) -> None:
        """A gap has closed: compute the chain over what was stored above it, then keep the new mark."""
        book = self.books[key]
        while (ahead := book.reachable()) is not None:
            first, last = ahead
            stop = min(last, first + ADVANCE_CHUNK - 1)
            rows = await self.write(lambda first=first, count=stop - first + 1: self.store.read_records(*key, after=first - 1, limit=count, committed=True))  # type: ignore[misc]
            records: list[Record] = [row.record for row in rows]
            if len(records) != stop - first + 1:
                # The store lost what the book says is there (it was restored or damaged): ask for it again.
                log.error("store holds %d of %s %s %d..%d: asking the edge again", len(records), *key, first, stop)
                book.above.drop_upto(stop)
                break
            book.advance(records)
        row = _row(key, book)
        await self.write(lambda: self.store.commit(Transaction(streams={key: row})))

    def draining(self) -> int:
        """Edges that have sent history just now."""
        now = self._now_ms()
        self._drained_ms = {edge: at for edge, at in self._drained_ms.items() if now - at < DRAINING_MS}
        return len(self._drained_ms)

    def send_receipts(self, edge: str, streams: set[str], missed: bool = False) -> None:
        """Tell `edge` what is committed, what is wanted and how much may come; a stream whose commit is under way is told after it.

        Args:
            missed: what it sent last may have been dropped here: ask for that, too.
        """
        row = self.fleet.rows.get(edge)
        now = self._now_ms()
        marks = []
        # To an identity in quarantine nothing is said of records: which of the two machines would free, or move, its own by it?
        for stream in sorted(streams) if row is None or not row.quarantine else ():
            if (edge, stream) in self._ahead:
                continue
            book = self.books.get((edge, stream)) or StreamBook()
            want = book.wants(now)
            if missed and len(want) < MAX_WANT_RANGES:
                want.append([book.top + 1, book.top + MISSED_RECORDS])
            marks.append({"stream": stream, "upto": book.contiguous, "chain": book.chain.hex(), "top": book.top, "held": book.above.size, "want": want})
        allowed = credit(max(1, self.draining()), self.queue_fill)
        if allowed:
            self._starved.discard(edge)
        else:
            self._starved.add(edge)
        body = {
            "v": PROTOCOL_VERSION, "edge": edge, "hub": self._hub, "boot": self._boot, "marks": marks, "credit": allowed,
            "quarantine": row.quarantine if row else "",
        }
        self.counters["receipts_total"] += 1
        self._publish(edge, "receipts", jsoncodec.encode(body).encode(), False)

    async def _tick_forever(self) -> None:
        loop = asyncio.get_running_loop()
        wall, steady = self._now_ms(), loop.time()
        while True:
            await asyncio.sleep(self._pace.tick_s)
            wall_before, steady_before, wall, steady = wall, steady, self._now_ms(), loop.time()
            self._look_at_clock(wall - wall_before - int(1000 * min(steady - steady_before, max(THERE_S, 2 * self._pace.tick_s))))
            self.fleet.looked_ms = wall
            try:
                self._tick()
            except Exception:
                log.exception("the ingest tick failed")
            if self._dirty_edges:
                await self._commit(Transaction(), {})

    def _look_at_clock(self, by_ms: int) -> None:
        if abs(by_ms) > STEP_MS:
            log.warning("the hub's clock was set by %.1f s, or the hub stood still for so long: no edge is taken for silent for that", by_ms / 1000)
            self.counters["clock_steps_total"] += 1
            self.fleet.stepped(by_ms)

    def _tick(self) -> None:
        now = self._now_ms()
        for change in self.fleet.silent(now):
            self.changed(change)
        for edge, row in self.fleet.rows.items():
            if row.state != "online" or row.quarantine:
                continue
            wanting = {stream for stream in STREAMS if (book := self.books.get((edge, stream))) is not None and book.due(now)}
            if wanting:
                self.counters["gap_requests_total"] += len(wanting)
                self.send_receipts(edge, wanting)
            elif edge in self._starved and self.queue_fill < QUEUE_LOW:
                self.send_receipts(edge, set(STREAMS))
        if self._missed and self.queue_fill < QUEUE_LOW:
            # Also of one whose presence was dropped with it: it begins by what it hears.
            for edge in self._missed - {edge for edge, _ in self._ahead}:
                self._missed.discard(edge)
                self.send_receipts(edge, set(STREAMS), missed=True)


def _end(outages: dict[tuple[str, int], Outage], key: tuple[str, int], outage: Outage) -> None:
    """What became of an outage; the reason is its beginning's."""
    known = outages.get(key)
    outages[key] = replace(outage, reason=known.reason) if known is not None else outage


def _row(key: tuple[str, str], book: StreamBook) -> StreamRow:
    return StreamRow(
        key[0], key[1], book.contiguous, book.chain, book.base, book.gone, book.stored, book.duplicates, book.mismatches, book.edge_next,
        book.edge_floor, book.edge_dropped, book.above.to_json(), book.base_chain,
    )


def _book(row: StreamRow) -> StreamBook:
    book = StreamBook(
        row.contiguous, row.chain, row.base, row.gone, row.stored, row.duplicates, row.mismatches, row.edge_next, row.edge_floor, row.edge_dropped
    )
    book.above, book.base_chain = RangeSet.of(row.above), row.base_chain
    return book
