"""The oracle: books of its own about what was acknowledged, committed, decided and told, and the promises checked against them.

Nothing here asks the code under test what it believes, but for its databases' rows and the lengths of its queues.
"""

import json
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edge_runtime.clock import RELEASE_MS, SYNC_CHECK_INTERVAL_MS
from edge_runtime.contract.records import Record
from edge_runtime.contract.streams import STREAMS
from edge_runtime.pipeline import MAX_OUTSTANDING
from edge_runtime.uplink.backoff import MIN_PAUSE_S
from hub.book import MAX_CHAIN_CHECKS, MAX_HELD_RANGES
from hub.ingest import QUEUE_BYTES, QUEUE_MAX
from hub.store.base import StoredRecord

from .broker import Message
from .rules import RISING

if TYPE_CHECKING:
    from hub.server import Hub

    from .edge import Machine
    from .world import World

READ_ALL = 1 << 40
PAUSE_SLACK_S = 1.0
"""How much longer than the law a pause may be: the loop is blocked by three fsyncs of the slowest disk, on whichever machine."""


class Violated(Exception):
    """A promise was broken."""


@dataclass
class StreamBooks:
    """One stream of one edge: what the edge committed, what the hub holds, what a restored backup took from the hub."""

    edge: dict[int, int] = field(default_factory=dict)
    hub: dict[int, int] = field(default_factory=dict)
    rolled_back: set[int] = field(default_factory=set)
    last: int = 0
    told: int = 0
    floor: int = 1
    dropped: int = 0


@dataclass
class EdgeBooks:
    """One machine's books."""

    streams: dict[str, StreamBooks] = field(default_factory=lambda: {name: StreamBooks() for name in STREAMS})
    readings: Counter[tuple[str, int]] = field(default_factory=Counter)
    newest: dict[str, int] = field(default_factory=dict)
    deliveries: Counter[tuple[str, int]] = field(default_factory=Counter)
    evaluated: Counter[tuple[str, int]] = field(default_factory=Counter)
    unproven: dict[tuple[str, int], float] = field(default_factory=dict)
    expected: deque[tuple[str, str, str, int]] = field(default_factory=deque)
    decided: list[tuple[str, str, str, str]] = field(default_factory=list)
    commands: dict[tuple[str, str, int], set[str]] = field(default_factory=dict)
    unproven_commands: dict[str, tuple[str, int]] = field(default_factory=dict)
    boots: set[str] = field(default_factory=set)
    undurable: int = 0
    refused: int = 0
    foreign: bool = False
    written: set[int] = field(default_factory=set)
    failures: int = 0
    up_since: float | None = None
    ended_s: float | None = None
    draws: list[float] = field(default_factory=list)
    receipt_s: float = -1.0
    latched: dict[tuple[str, str], int] = field(default_factory=dict)
    generation: int = -1
    mono: dict[str, tuple[str, int]] = field(default_factory=dict)


class Draws(random.Random):
    """Chance of one edge that remembers its last draws, so that the law of the pauses can be checked exactly."""

    def __init__(self, seed: int, now: Callable[[], float]) -> None:
        super().__init__(seed)
        self._now = now
        self.drawn: deque[tuple[float, float]] = deque(maxlen=256)

    def random(self) -> float:
        """See `random.Random`."""
        value = super().random()
        self.drawn.append((self._now(), value))
        return value


class Oracle:
    """See the module."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.books: dict[str, EdgeBooks] = {}
        self.checks: Counter[str] = Counter()
        self.failure: tuple[str, str, str] | None = None
        self._draws: dict[str, Draws] = {}
        self._restored = False

    def violation(self, who: str, promise: str, what: str) -> None:
        """A promise is broken: the first one ends the run."""
        if self.failure is None:
            self.failure = (promise, who, what)
            self.world.trace(who, f"VIOLATION of '{promise}': {what}")
            self.world.stop()

    def of(self, machine: "Machine") -> EdgeBooks:
        """The books of a machine."""
        books = self.books.get(machine.name)
        if books is None:
            books = self.books[machine.name] = EdgeBooks()
        return books

    # -- chance and back-off -------------------------------------------------------------------------------------------------

    def entropy(self, machine: "Machine") -> random.Random:
        """The chance of one boot."""
        draws = self._draws[machine.name] = Draws(machine.entropy.getrandbits(64), self.world.loop.time)
        books = self.of(machine)
        books.failures, books.up_since, books.ended_s = 0, None, None
        return draws

    def attempt(self, machine: "Machine", what: str) -> None:
        """A try to connect to the hub's broker begins, succeeds, or its connection ends."""
        books, now = self.of(machine), self.world.loop.time()
        if what == "up":
            books.up_since = now
            self.world.trace(machine.name, "link up")
        elif what == "down":
            if books.up_since is not None:
                self.world.trace(machine.name, "link down")
                if now - books.up_since >= 60.0:
                    books.failures = 0
            books.up_since, books.ended_s = None, now
        elif books.ended_s is not None:
            self.checks["pauses"] += 1
            bound = min(60.0, 2.0**books.failures)
            books.failures = min(books.failures + 1, 40)
            pause = now - books.ended_s
            # The local bus draws from the same chance: of the draws at the moment when the link ended one must explain the pause.
            dues = [max(MIN_PAUSE_S, value * bound) for at, value in self._draws[machine.name].drawn if abs(at - books.ended_s) < PAUSE_SLACK_S]
            if not any(due - 0.01 <= pause <= due + PAUSE_SLACK_S for due in dues):
                law = ", ".join(f"{due:.3f}" for due in dues) or "no draw"
                self.violation(machine.name, "back-off with full jitter", f"pause {pause:.3f} s after {books.failures - 1} failures, the law says {law} s of at most {bound:.0f} s")

    # -- devices -------------------------------------------------------------------------------------------------------------

    def delivered(self, machine: "Machine", _client: str, message: Message) -> None:
        """The local broker hands a message to the agent."""
        if message.topic.endswith("/telemetry"):
            self.of(machine).deliveries[_key(message)] += 1

    def acknowledged(self, machine: "Machine", message: Message) -> None:
        """The agent acknowledges a device's message: what came of it must be durable."""
        if not message.topic.endswith("/telemetry"):
            return
        books, key = self.of(machine), _key(message)
        self.checks["acknowledged readings"] += 1
        if not books.evaluated[key]:
            self.violation(machine.name, "every accepted reading is decided on", f"reading {key} was acknowledged and never evaluated")
        if not books.readings[key]:
            books.unproven[key] = self.world.loop.time()

    def evaluated(self, machine: "Machine", device: str, values: Any, mono_ms: int, decisions: Any) -> None:
        """The engine was asked."""
        books = self.of(machine)
        if values is not None and "n" in values:
            books.evaluated[(device, values["n"])] += 1
        for decision in decisions:
            self.checks["decisions"] += 1
            uplink = machine.runtime.uplink if machine.runtime is not None else None
            self.world.happened["decisions without a hub"] += uplink is not None and not uplink.up
            books.expected.append((decision.rule, decision.device, decision.outcome, mono_ms))
            books.decided.append((decision.rule, decision.device, decision.outcome, json.dumps(decision.inputs)))

    def command(self, machine: "Machine", device: str, body: dict[str, Any], known: Any, content: Any) -> None:
        """A device gets a command."""
        books, identifier = self.of(machine), body["id"]
        self.checks["commands"] += 1
        self.world.trace(machine.name, f"{device} gets {body['name']} {identifier}{' again' if body.get('again') else ''}")
        if known is not None and known != content:
            self.violation(machine.name, "a command's id means one thing", f"{identifier}: {known} and {content}")
        parts = identifier.split(".")
        if len(parts) != 4 or parts[0] != machine.edge:
            return  # one of the hub's
        seq = int(parts[2])
        if seq not in books.streams["decision"].edge:
            books.unproven_commands[identifier] = (parts[1], seq)
        number = body["args"].get("n")
        if number is not None:
            ids = books.commands.setdefault((body["name"], device, number), set())
            ids.add(identifier)
            if len(ids) > max(1, books.deliveries[(device, number)]):
                self.violation(machine.name, "one decision, one command", f"{body['name']} for reading {number} of {device} has ids {sorted(ids)}, delivered {books.deliveries[(device, number)]} times")

    # -- the edge's journal --------------------------------------------------------------------------------------------------

    def booted(self, machine: "Machine") -> None:
        """The agent has opened its journal: everything that was told is in it."""
        books, journal = self.of(machine), machine.runtime.journal  # type: ignore[union-attr]
        self.checks["boots"] += 1
        if journal.boot in books.boots:
            self.violation(machine.name, "a boot has an id of its own", journal.boot)
        books.boots.add(journal.boot)
        if journal.recoveries:
            self.violation(machine.name, "a power cut damages nothing", f"rebuilt: {journal.recoveries}")
            return
        for stream in STREAMS:
            database, marks, book = journal._lane_of[stream].database, journal.marks(stream), books.streams[stream]
            if marks.next_seq <= book.last:
                self.violation(machine.name, "nothing that was committed is lost", f"{stream} ends at {marks.next_seq - 1}, {book.last} was committed")
                return
            first = max(marks.floor, book.last - 40)
            for record in database.read(stream, first, READ_ALL, READ_ALL, book.last)[0]:
                self._same(machine, stream, book, record)
        self.take(machine)
        self._proven(machine, "after a boot")
        books.expected.clear()
        journal.on_commit(lambda stream, _seq: self.take(machine, stream))

    def ended(self, machine: "Machine") -> None:
        """The agent's process has ended."""
        runtime = machine.runtime
        if runtime is not None:
            self._look_at_floors(machine.edge)
            books = self.of(machine)
            books.undurable, books.refused = self._counted(machine)

    def _counted(self, machine: "Machine") -> tuple[int, int]:
        """What the agent counted: effects of records that could not be made durable, readings refused or given up because the disk was full."""
        books, runtime = self.of(machine), machine.runtime
        if runtime is None:
            return books.undurable, books.refused
        lanes = runtime.journal.lanes.values()
        return books.undurable + sum(lane.acted_undurable for lane in lanes), books.refused + runtime.journal.refused_telemetry + sum(lane.dropped_waiting for lane in lanes)

    def take(self, machine: "Machine", only: str = "") -> None:
        """Read what is new in the journal."""
        books, journal = self.of(machine), machine.runtime.journal  # type: ignore[union-attr]
        for stream in (only,) if only else tuple(STREAMS):
            book = books.streams[stream]
            marks = journal._lane_of[stream].marks[stream]
            book.floor, book.dropped = marks.floor, marks.dropped
            first = max(book.last + 1, marks.floor)
            for record in journal._lane_of[stream].database.read(stream, first, READ_ALL, READ_ALL)[0]:
                if record.seq != book.last + 1 and book.last + 1 >= marks.floor and not books.foreign:
                    self.violation(machine.name, "no gap in a stream", f"{stream}: {record.seq} follows {book.last}")
                self.checks["records"] += 1
                if not books.foreign:
                    self._time(machine, books, stream, record)
                book.edge[record.seq] = hash(record)
                book.last = record.seq
                content = hash((stream, replace(record, seq=0)))
                if content in books.written and books.foreign:
                    continue  # one of two machines with one name moves its records above the other's: the same record under another number
                books.written.add(content)
                if stream == "telemetry":
                    self._reading(machine, books, record)
                elif stream == "decision":
                    self._decision(machine, books, record)

    def _time(self, machine: "Machine", books: EdgeBooks, stream: str, record: Record) -> None:
        boot, mono = books.mono.get(stream, ("", 0))
        if record.boot == boot and record.mono_ms < mono:
            self.violation(machine.name, "monotonic time grows", f"{stream} {record.seq} of {record.mono_ms} ms follows {mono} ms")
        books.mono[stream] = (record.boot, record.mono_ms)
        if record.wall_ms < RELEASE_MS:
            self.violation(machine.name, "no record is older than the software", f"{stream} {record.seq} has wall time {record.wall_ms} ms ({record.quality})")
        if record.quality == "ntp" and machine.unsynchronised_for() > 2 * SYNC_CHECK_INTERVAL_MS / 1000:
            self.violation(machine.name, "time says what it is worth", f"{stream} {record.seq} is called ntp, the clock was not synchronised for {machine.unsynchronised_for():.0f} s")

    def _same(self, machine: "Machine", stream: str, book: StreamBooks, record: Record) -> None:
        if book.edge.get(record.seq, hash(record)) != hash(record) and not self.of(machine).foreign:
            self.violation(machine.name, "a sequence number is used once", f"{stream} {record.seq} has another content than before: {record}")

    def _reading(self, machine: "Machine", books: EdgeBooks, record: Record) -> None:
        body = json.loads(record.body)
        device, number = key = (body["device"], body["values"].get("n", 0))
        if not books.readings[key]:  # a message that comes again after a crash is late by right
            self.checks["readings in order"] += 1
            if number <= books.newest.get(device, 0) and not books.foreign:
                self.violation(machine.name, "a device's readings keep their order", f"reading {number} of {device} is first written after reading {books.newest[device]}")
            books.newest[device] = number
        books.readings[key] += 1
        books.unproven.pop(key, None)

    def _decision(self, machine: "Machine", books: EdgeBooks, record: Record) -> None:
        body = json.loads(record.body)
        found = (body["rule"], body["device"], body["outcome"], record.mono_ms)
        self.world.trace(machine.name, f"decides {found[0]} {found[2]} for {found[1]} (decision {record.seq})")
        wanted = books.expected.popleft() if books.expected else None
        if body["generation"] != books.generation:
            books.generation = body["generation"]
            books.latched.clear()  # other rules, perhaps
        if body["rule"] in RISING:
            key = (body["rule"], body["device"])
            if body["outcome"] == "fired" and key in books.latched:
                self.violation(machine.name, "a rule fires once until it is cleared", f"{key} fired in decision {books.latched[key]} and again in {record.seq}")
            if body["outcome"] == "fired":
                books.latched[key] = record.seq
            else:
                books.latched.pop(key, None)
        if wanted is not None and wanted != found:
            self.violation(machine.name, "the journal holds what was decided", f"record {record.seq} is {found}, decided was {wanted}")

    def _proven(self, machine: "Machine", when: str) -> None:
        books = self.of(machine)
        undurable, refused = self._counted(machine)
        if len(books.unproven) > undurable + refused:
            key, at = next(iter(books.unproven.items()))
            self.violation(machine.name, "what is acknowledged is durable", f"{len(books.unproven)} readings {when}, the first {key} acknowledged at {self.world.clock_text(at)}; {undurable + refused} counted as refused")
        for identifier, (boot, seq) in books.unproven_commands.items():
            if seq not in books.streams["decision"].edge and not undurable and seq >= books.streams["decision"].floor:
                self.violation(machine.name, "nothing acts before it is durable", f"command {identifier} was sent, decision {seq} of boot {boot} is not in the journal")
        books.unproven_commands.clear()

    # -- the hub -------------------------------------------------------------------------------------------------------------

    def _machine(self, edge: str) -> EdgeBooks | None:
        return self.books.get(edge)

    def hub_stored(self, records: list[StoredRecord]) -> None:
        """The hub has committed records that it takes for new."""
        for stored in records:
            books = self.books.get(stored.edge)
            if books is None:
                continue
            book, seq = books.streams[stored.stream], stored.record.seq
            self.checks["records at the hub"] += 1
            if books.foreign:
                book.hub[seq] = hash(stored.record)
                continue
            if seq in book.hub:
                self.violation("hub", "nothing counts twice", f"{stored.edge} {stored.stream} {seq} was taken for new again")
            self._hub_row(book, stored)

    def _hub_row(self, book: StreamBooks, stored: StoredRecord) -> None:
        seq = stored.record.seq
        if seq in book.edge and book.edge[seq] != hash(stored.record):
            self.violation("hub", "the hub holds what the edge wrote", f"{stored.edge} {stored.stream} {seq}: {stored.record}")
        book.hub[seq] = hash(stored.record)

    def hub_booted(self, hub: "Hub") -> None:
        """What the hub's store holds is what counts; it may lack what it had only where a backup was restored."""
        for edge in sorted(self.books):
            for stream, book in self.books[edge].streams.items():
                before = dict(book.hub)
                self._read_back(hub, edge, stream, restored=self._restored)
                book.told = 0
                if self._restored:
                    gone = before.keys() - book.hub.keys()
                    book.rolled_back |= gone
                    self.world.happened["hub records rolled back"] += len(gone)
        self._restored = False

    def _read_back(self, hub: "Hub", edge: str, stream: str, restored: bool = False) -> None:
        """The hub's rows of a stream as they stand in its store: those that it committed, no other, unless a backup was `restored`."""
        books = self.books[edge]
        book = books.streams[stream]
        before, book.hub = book.hub, {}
        for stored in hub.store.read_records(edge, stream, limit=READ_ALL):
            self.checks["rows at the hub"] += 1
            if books.foreign:
                book.hub[stored.record.seq] = hash(stored.record)
            else:
                self._hub_row(book, stored)
        if not restored and not books.foreign and before != book.hub:
            wrong = sorted(seq for seq in before.keys() | book.hub.keys() if before.get(seq) != book.hub.get(seq))
            self.violation("hub", "the hub keeps what it committed", f"{edge} {stream}: {len(wrong)} rows are not as committed, the first {wrong[0]}")

    def hub_restored(self) -> None:
        """An older store comes back."""
        self.checks["restores"] += 1
        self._restored = True

    def _look_at_floors(self, edge: str) -> None:
        for machine in self.world.machines:
            if machine.edge == edge and machine.runtime is not None:
                for stream, book in self.of(machine).streams.items():
                    marks = machine.runtime.journal._lane_of[stream].marks[stream]
                    book.floor, book.dropped = marks.floor, marks.dropped

    def hub_published(self, client: str, topic: str, payload: bytes) -> None:
        """Something passes the hub's broker."""
        if not topic.endswith("/receipts") or not client.startswith("novacron-hub"):
            return
        message = json.loads(payload)
        books = self.books.get(message["edge"])
        if books is None:
            return
        now = self.world.loop.time()
        books.receipt_s = now
        if message["boot"] != (self.world.hub.hub.boot if self.world.hub.hub is not None else ""):
            return
        self.checks["receipts"] += 1
        for mark in message["marks"]:
            book = books.streams[mark["stream"]]
            if books.foreign:
                continue
            for seq in range(book.told + 1, mark["upto"] + 1):
                if seq in book.hub:
                    continue
                if seq >= book.floor:
                    self._look_at_floors(message["edge"])
                if seq >= book.floor or not (seq in book.rolled_back or book.dropped):
                    self.violation("hub", "a receipt covers only what is committed", f"{message['edge']} {mark['stream']} up to {mark['upto']}, {seq} is not at the hub")
                    return
            book.told = max(book.told, mark["upto"])

    # -- limits --------------------------------------------------------------------------------------------------------------

    def audit(self) -> None:
        """Queues, dictionaries and files within their limits."""
        self.checks["audits"] += 1
        for machine in self.world.machines:
            runtime = machine.runtime
            if runtime is None:
                continue
            sizes: list[tuple[str, int, int]] = [
                ("commands that wait", len(runtime.pipeline._commands), MAX_OUTSTANDING), ("open effects", len(runtime.pipeline._open_effects), MAX_OUTSTANDING * 8),
                ("remembered commands", len(runtime.desired_state.commands), 768), ("disk bytes", machine.disk.used, self.world.disk_limit),
            ]
            for name, lane in runtime.journal.lanes.items():
                sizes.append((f"records waiting for {name}", lane.waiting, 3_000))
                sizes.append((f"bytes of {name}'s WAL", lane.database.wal_bytes(), 8 * self.world.scenario.wal_bytes + (1 << 20)))
            if runtime.uplink is not None:
                sizes.append(("messages in flight", runtime.uplink.lanes.inflight, 8))
            applied = runtime.desired
            if applied is not None and applied.rules is not None and [rule.id for rule in runtime.engine.rules.rules] != [rule["id"] for rule in applied.rules]:
                self.violation(machine.name, "desired state is applied whole", f"generation {applied.generation} is in force with other rules")
            for what, size, limit in sizes:
                if size > limit:
                    self.violation(machine.name, "memory and disk stay within their limits", f"{what}: {size} over {limit}")
            for task in (runtime.uplink._task if runtime.uplink else None, runtime.bus._task if runtime.bus else None, runtime.journal._upkeep):
                if task is not None and task.done() and machine.life is not None and machine.life.alive:
                    self.violation(machine.name, "the agent's parts keep running", f"task {task.get_name()} has ended: {task.exception() if not task.cancelled() else 'cancelled'}")
        hub = self.world.hub.hub
        if hub is not None:
            sizes = [("hub queue", hub.ingest._queue.qsize(), QUEUE_MAX), ("bytes of the hub's queue", hub.ingest._queued_bytes, QUEUE_BYTES)]
            for (edge, stream), book in hub.ingest.books.items():
                sizes += [(f"held ranges of {edge} {stream}", len(book.above), MAX_HELD_RANGES), (f"chains of {edge} {stream}", len(book.chains), MAX_CHAIN_CHECKS)]
            for what, size, limit in sizes:
                if size > limit:
                    self.violation("hub", "memory and disk stay within their limits", f"{what}: {size} over {limit}")

    def served(self, since_s: float, why: str) -> None:
        """Every edge that may has had a receipt since: nobody is starved when all come back at once."""
        for machine in self.world.machines:
            if machine.runtime is None or f"novacron-edge-{machine.edge}" in self.world.broker.refuses or self.world.refused_since.get(machine.edge, -1e9) > since_s - 120:
                continue
            self.checks["storm"] += 1
            if self.of(machine).receipt_s < since_s:
                self.violation(machine.name, "nobody is starved in a storm", f"no receipt within {self.world.loop.time() - since_s:.0f} s of {why}")
                return

    def cloned(self, machine: "Machine", clone: "Machine", quarantine: str) -> None:
        """Both ran long enough side by side: the hub must have told them apart."""
        self.checks["clones"] += 1
        if not quarantine:
            self.violation(machine.name, "a clone is found", f"{machine.name} and {clone.name} ran for minutes under one name")

    # -- the end -------------------------------------------------------------------------------------------------------------

    def unsettled(self) -> str:
        """What has not converged yet; empty when all has."""
        hub = self.world.hub.hub
        if hub is None:
            return "the hub is away"
        for machine in self.world.machines:
            runtime = machine.runtime
            if machine.name not in self.world.alive:
                continue
            if runtime is None or runtime.uplink is None:
                return f"{machine.name} is away"
            if not runtime.uplink.up:
                return f"{machine.name} has no hub"
            row = hub.fleet.rows.get(machine.edge)
            if row is None or row.state != "online":
                return f"the hub calls {machine.edge} {row.state if row else 'unknown'}"
            for stream in STREAMS:
                book = hub.ingest.books.get((machine.edge, stream))
                last = runtime.journal._lane_of[stream].marks[stream].next_seq - 1
                if last and (book is None or book.contiguous != last):
                    return f"{machine.edge} {stream} ends at {last}, the hub has {book.contiguous if book else 0}"
            document = hub.desired.get(machine.edge)
            if document is not None and not self.world.refuses(document):
                applied = runtime.desired
                if applied is None or (applied.generation, applied.issued_ms) != (document["generation"], document["issued_ms"]):
                    return f"{machine.edge} has generation {applied.generation if applied else 0}, the hub wants {document['generation']}"
        return ""

    def final(self) -> None:
        """Everything is quiet and has converged: the books must agree."""
        hub = self.world.hub.hub
        assert hub is not None
        for machine in self.world.machines:
            if machine.name not in self.world.alive or machine.runtime is None:
                continue
            self.take(machine)
            self._proven(machine, "at the end")
            books = self.of(machine)
            for stream in STREAMS:
                self._final_stream(machine, books, stream, hub)
            if books.expected:
                self.violation(machine.name, "every decision is journalled", f"{len(books.expected)} were decided and are not in the journal, the first {books.expected[0]}")
            for key, count in books.readings.items():
                if count > max(1, books.deliveries[key]):
                    self.violation(machine.name, "no reading counts twice", f"{key} is in the journal {count} times and was delivered {books.deliveries[key]} times")
            self._final_desired(machine, hub)

    def _final_stream(self, machine: "Machine", books: EdgeBooks, stream: str, hub: "Hub") -> None:
        book = books.streams[stream]
        self.checks["streams"] += 1
        self._read_back(hub, machine.edge, stream)
        journal = machine.runtime.journal  # type: ignore[union-attr]
        marks = journal.marks(stream)
        at_hub = hub.ingest.books.get((machine.edge, stream))
        if at_hub is not None and not books.foreign:
            if at_hub.mismatches:
                self.violation(machine.name, "chains agree", f"{stream}: {at_hub.mismatches} mismatches")
            if at_hub.chain != marks.chain:
                self.violation(machine.name, "chains agree", f"{stream}: the hub's chain at {at_hub.contiguous} is not the edge's")
        if books.foreign:
            return
        lost = [seq for seq in range(1, book.last + 1) if seq not in book.hub and not (seq < marks.floor and seq in book.rolled_back)]
        if len([seq for seq in lost if seq < marks.floor]) > marks.dropped or any(seq >= marks.floor for seq in lost):
            self.violation(machine.name, "no acknowledged record is lost", f"{stream}: {len(lost)} are not at the hub, the first {lost[0]}; floor {marks.floor}, {marks.dropped} counted as dropped")
        for seq, digest in book.hub.items():
            if seq in book.edge and book.edge[seq] != digest:
                self.violation(machine.name, "the hub holds what the edge wrote", f"{stream} {seq}")
            elif seq not in book.edge and seq > book.last:
                self.violation(machine.name, "the hub holds what the edge wrote", f"{stream} {seq} was never committed at the edge")
        database = journal._lane_of[stream].database
        for record in database.read(stream, marks.floor, READ_ALL, READ_ALL)[0]:
            self._same(machine, stream, book, record)

    def _final_desired(self, machine: "Machine", hub: "Hub") -> None:
        document, runtime = hub.desired.get(machine.edge), machine.runtime
        assert runtime is not None
        if document is None or self.world.refuses(document) or runtime.desired is None:
            return
        self.checks["desired states"] += 1
        if runtime.desired.to_json()["spec"] != document["spec"]:
            self.violation(machine.name, "desired state converges", f"generation {document['generation']} differs at the edge")
        wanted = document["spec"].get("rules")
        if wanted is not None and [rule.id for rule in runtime.engine.rules.rules] != [rule["id"] for rule in wanted]:
            self.violation(machine.name, "desired state converges", "other rules are in force")
        for device in machine.devices:
            known = runtime.registry.devices.get(device.name)
            if known is not None and known.desired_version and (device.desired is None or device.desired[1] != known.desired):
                self.violation(machine.name, "desired state converges", f"the twin of {device.name} is {known.desired}, the device was told {device.desired}")

    def mirror(self) -> None:
        """Two edges with the same inputs, one of them cut off again and again, have decided alike."""
        first, second = (self.books[machine.name].decided for machine in self.world.machines[:2])
        self.checks["mirrored decisions"] += len(first)
        for number, (one, other) in enumerate(zip(first, second, strict=False)):
            if one != other:
                self.violation("mirror", "decisions are the same offline and online", f"decision {number} is {one} at the edge with link faults and {other} at its twin")
                return
        if len(first) != len(second):
            self.violation("mirror", "decisions are the same offline and online", f"{len(first)} decisions with link faults, {len(second)} without")


def _key(message: Message) -> tuple[str, int]:
    return message.topic.split("/")[3], json.loads(message.payload)["n"]
