"""The journal as the runtime uses it: append, be told when it is durable, read back, receive receipts, keep within limits."""

import asyncio
import logging
import random
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..clock import Clock, Stamp
from ..contract import jsoncodec
from ..contract.errors import ContractError
from ..contract.lean_dataclass import dataclass
from ..contract.limits import MAX_BODY_BYTES
from ..contract.records import Record
from ..contract.streams import STREAMS
from ..pace import Pace
from .database import WAL_GROWN_BYTES, JournalDatabase, StreamMarks, database_streams
from .lane import Callback, Lane, Worker
from .planner import GrowthRate, StoragePlan, plan
from .recovery import RESERVE_BLOCK, Recovery, SideFile, open_checked
from .storage import FILES, Storage, is_full, write_durably

log = logging.getLogger(__name__)

RELEASE_SLICES = 20
"""Slices of 500 rows freed per upkeep at most: 10,000 rows per 2 s outrun any load this runtime takes, and leave room for commits."""

CLOSE_TIMEOUT_S = 10.0
"""How long a stop waits for a disk that does not take what is left."""

RELIEF_SHARE = 0.1
"""Share of the telemetry that is dropped when the disk is full: enough that it does not happen again at once."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JournalSettings:
    """How the journal is kept; sizes in bytes, times in seconds."""

    directory: Path
    commit_interval_s: float = 0.0
    telemetry_commit_interval_s: float = 0.5
    max_bytes: int = 1 << 30
    telemetry_max_bytes: int = 4 << 30
    retain_receipted_records: int = 10_000
    min_free_bytes: int = 64 << 20
    ballast_bytes: int = 8 << 20
    target_hours: float = 72.0
    pending_max: int = 20_000
    wal_bytes: int = WAL_GROWN_BYTES
    reserve_block: int = RESERVE_BLOCK


class Journal:
    """The journal of one edge; make it, `start` it in a running loop, `close` it.

    Args:
        clock: stamps the records.
        raise_floor: told the newest wall time that the journal knows.
        storage: the disk.
        worker: makes the threads that write and read.
        entropy: where this boot's random id is drawn.
        pace: how often upkeep runs.

    Attributes:
        boot: this boot's random id; boot_n: its number in this edge's life.
        clean: the stop before this boot was orderly.
        recoveries: what was rebuilt at this boot.
    """

    def __init__(
        self, settings: JournalSettings, clock: Clock, raise_floor: Callable[[int], None] = lambda _: None, *, storage: Storage = FILES,
        worker: Callable[[str, asyncio.AbstractEventLoop], Worker] = Worker, entropy: random.Random | None = None, pace: Pace | None = None,
    ) -> None:
        """Open both databases, rebuilding what is damaged, and count this boot. Raises OSError where the directory cannot be used."""
        self.settings = settings
        self._clock = clock
        self._storage = storage
        self._make_worker = worker
        self._pace = pace or Pace()
        storage.make_directory(settings.directory)
        self.boot = f"{(entropy or random.SystemRandom()).getrandbits(64):016x}"
        self._side = SideFile.load(settings.directory / "marks.json", storage, settings.reserve_block)
        self._side_lock = threading.Lock()
        clean_path = settings.directory / "clean"
        self.clean = storage.exists(clean_path) or self._side.boot_n == 0
        storage.remove(clean_path)
        self._clean_path = clean_path
        self.recoveries: list[Recovery] = []
        self.lanes: dict[str, Lane] = {}
        self._lane_of: dict[str, Lane] = {}
        stamp = clock.stamp()
        newest = 0
        boots = self._side.boot_n
        self._ballast = settings.directory / "ballast"
        for name, streams in database_streams().items():
            path = settings.directory / f"{name}.db"
            database, recovery = self._on_full_disk_too(
                lambda path=path, streams=streams: open_checked(  # type: ignore[misc]
                    path, streams, self._side, unclean=not self.clean, stamp=stamp, boot=self.boot, wal_bytes=settings.wal_bytes
                )
            )
            if recovery.damage:
                self.recoveries.append(recovery)
                log.error("%s was damaged (%s) and has been rebuilt: %s", database.path, recovery.damage, recovery)
            newest = max(newest, database.newest_wall_ms())
            boots = max(boots, len(database._boots))
            self._add_lane(name, database)
        raise_floor(newest)
        self.boot_n = boots + 1
        self._side.boot_n = self.boot_n
        # Not counted means that the next boot has this one's number, and two boots with one number are a clone to the hub.
        self._on_full_disk_too(self._side.save)
        self._state: dict[str, str] = self.lanes["journal"].database.state()
        self._reader: Worker | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self._rates = {name: GrowthRate() for name in self.lanes}
        self._observed: dict[str, int] = dict.fromkeys(self.lanes, 0)
        self._observed_ms = clock.mono_ms()
        self._held: dict[str, int] = {}
        self._listeners: list[Callable[[str, int], None]] = []
        self.refused_telemetry = 0
        self.trimmed_full = 0
        self.telemetry_open = True
        self.storage_plan: StoragePlan = self._plan()
        self._make_ballast()

    def _on_full_disk_too(self, job: Callable[[], T]) -> T:
        """Do `job`; where the disk is full, give the ballast back and do it again: an edge comes up on a full disk as well."""
        try:
            return job()
        except (OSError, sqlite3.Error) as error:
            if not is_full(error) or not self._storage.exists(self._ballast):
                raise
            log.error("the disk is full at the start: the ballast is released")
            self._storage.remove(self._ballast)
            return job()

    def _add_lane(self, name: str, database: JournalDatabase) -> None:
        telemetry = name == "telemetry"
        lane = Lane(
            database, self._side, self._side_lock, self.boot, pending_max=self.settings.pending_max, droppable=telemetry,
            interval_s=self.settings.telemetry_commit_interval_s if telemetry else self.settings.commit_interval_s,
            on_commit=self._committed, on_full=self._full, worker=self._make_worker,
        )
        self.lanes[name] = lane
        for stream in database.streams:
            self._lane_of[stream] = lane

    # -- life ----------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin writing; call inside the running loop."""
        self._loop = asyncio.get_running_loop()
        self._reader = self._make_worker("journal-read", self._loop)
        for lane in self.lanes.values():
            lane.start(self._loop)
        self._upkeep = self._loop.create_task(self._upkeep_forever(), name="journal upkeep")

    def grow(self) -> None:
        """Make the files as large as they will be in ordinary operation, which spares each commit the flush of a size: after the start, as it writes megabytes."""
        for lane in self.lanes.values():
            lane.grow()

    async def close(self) -> None:
        """Make everything durable that can be, mark the stop as orderly, close the files."""
        if self._upkeep is not None:
            self._upkeep.cancel()
        clean = True
        try:
            await asyncio.wait_for(self.flush(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            clean = False
        if self._reader is not None:
            self._reader.stop()
            self._reader = None
        for lane in self.lanes.values():
            lane.stop()
        if clean:
            try:
                write_durably(self._storage, self._clean_path, self.boot.encode())
            except OSError as error:
                log.warning("the orderly stop could not be marked: %s", error)

    # -- writing -------------------------------------------------------------------------------------------------------------

    def append(self, stream: str, kind: str, body: Any, on_durable: Callback | None = None, stamp: Stamp | None = None) -> bool:
        """Append one record; it is durable when `on_durable(record)` runs.

        Args:
            body: a JSON object, or its canonical text.

        Returns:
            False where a telemetry record is refused because the disk is full, or dead and as much as may wait is waiting (counted in
            `refused_telemetry`).

        Raises:
            ContractError: the body is not JSON or over `MAX_BODY_BYTES`.
        """
        text = body if isinstance(body, str) else jsoncodec.encode(body)
        if len(text) > MAX_BODY_BYTES:
            raise ContractError("body", f"{len(text)} bytes are over {MAX_BODY_BYTES}", "split the record", "size")
        if stream == "telemetry" and not (self.telemetry_open and self._lane_of[stream].has_room):
            self.refused_telemetry += 1
            return False
        self._lane_of[stream].append(stream, kind, text, stamp or self._clock.stamp(), on_durable)
        return True

    def commit_now(self) -> None:
        """Begin the commit that would begin at the end of this turn of the loop."""
        self.lanes["journal"].begin_now()

    def breathe(self) -> None:
        """Nobody waits at this moment: telemetry that is due soon may go down now."""
        self.lanes["telemetry"].breathe()

    def put_state(self, key: str, value: Any, on_durable: Callable[[], None] | None = None) -> None:
        """Keep a JSON document under `key` across restarts (None forgets it)."""
        text = None if value is None else jsoncodec.encode(value)
        if text is None:
            self._state.pop(key, None)
        else:
            self._state[key] = text
        self.lanes["journal"].put_state(key, text, on_durable)

    def state(self, key: str) -> Any:
        """The document under `key`, None where there is none or it cannot be read any more."""
        text = self._state.get(key)
        if text is None:
            return None
        try:
            return jsoncodec.decode(text.encode(), max_bytes=1 << 24)
        except ContractError as error:
            log.error("state %s cannot be read: %s", key, error)
            return None

    def state_keys(self, prefix: str) -> list[str]:
        """Every key that starts with `prefix`."""
        return sorted(key for key in self._state if key.startswith(prefix))

    @property
    def bytes_in_use(self) -> int:
        """Bytes of both databases."""
        return sum(lane.database.used_bytes() for lane in self.lanes.values())

    def receipt(self, stream: str, upto: int) -> None:
        """The hub holds everything of `stream` up to `upto`; what it never got cannot be receipted."""
        lane = self._lane_of[stream]
        marks = lane.marks[stream]
        upto = min(upto, marks.next_seq - 1)
        if upto > marks.receipted:
            marks.receipted = upto
            lane.touch(stream)

    def effects_done(self, stream: str, upto: int) -> None:
        """The effects of every record of `stream` up to `upto` are done."""
        lane = self._lane_of[stream]
        if upto > lane.marks[stream].effects:
            lane.marks[stream].effects = upto
            lane.touch(stream)

    def hold(self, stream: str, upto: int) -> None:
        """Records of `stream` above `upto`, or with effects that are not done, are read at the next start: retention leaves them (a cap does not)."""
        self._held[stream] = upto

    async def rebase(self, stream: str, above: int) -> None:
        """Give every unreceipted record of `stream` a sequence number after `above`; see `JournalDatabase.rebase`."""
        lane = self._lane_of[stream]
        with self._side_lock:
            self._side.reserve(stream, above + lane.marks[stream].next_seq)
        await lane.exclusively(lambda: lane.database.rebase(stream, lane.marks[stream], above))

    def on_commit(self, listener: Callable[[str, int], None]) -> None:
        """Have `listener(stream, last durable seq)` called after each commit."""
        self._listeners.append(listener)

    def _committed(self, last: dict[str, int]) -> None:
        for stream, seq in last.items():
            for listener in self._listeners:
                listener(stream, seq)

    async def flush(self) -> None:
        """Wait until everything appended so far is durable."""
        await asyncio.gather(*(lane.drain() for lane in self.lanes.values()))

    # -- reading -------------------------------------------------------------------------------------------------------------

    def marks(self, stream: str) -> StreamMarks:
        """A copy of the stream's durable marks."""
        return self._lane_of[stream].marks[stream].copy()

    def durable(self, stream: str) -> int:
        """The last durable seq of the stream."""
        return self._lane_of[stream].marks[stream].next_seq - 1

    async def read(self, stream: str, first: int, limit: int, max_bytes: int, last: int | None = None) -> tuple[list[Record], bytes]:
        """Records from `first`, and the chain after the last of them; see `JournalDatabase.read`."""
        database = self._lane_of[stream].database
        result = await self._on_reader(lambda: database.read(stream, first, limit, max_bytes, last))
        records: list[Record] = result[0]
        return records, result[1]

    async def chain_at(self, stream: str, seq: int) -> bytes | None:
        """The chain after record `seq` of `stream`, None where it is no longer known."""
        marks = self._lane_of[stream].marks[stream]
        if seq == marks.next_seq - 1:
            return marks.chain
        if seq == marks.floor - 1:
            return marks.floor_chain
        database = self._lane_of[stream].database
        chain: bytes | None = await self._on_reader(lambda: database.chain_at(stream, seq))
        return chain

    async def tail(self, stream: str, limit: int, before: int | None = None, kinds: tuple[str, ...] = ()) -> list[Record]:
        """The newest records of a stream, newest first."""
        database = self._lane_of[stream].database
        records: list[Record] = await self._on_reader(lambda: database.tail(stream, limit, before, kinds))
        return records

    async def _on_reader(self, job: Callable[[], Any]) -> Any:
        if self._reader is None:
            return job()
        return await self._reader.call(job)

    # -- limits --------------------------------------------------------------------------------------------------------------

    @property
    def pressure(self) -> bool:
        """Senders should hold back."""
        return any(lane.pressure for lane in self.lanes.values())

    @property
    def errors(self) -> dict[str, str]:
        """What stops a database from being written, by database; empty when all is well."""
        return {name: lane.error for name, lane in self.lanes.items() if lane.error}

    def free_bytes(self) -> int:
        """Free bytes of the journal's file system, for an unprivileged process."""
        return self._storage.free_bytes(self.settings.directory)

    def _plan(self) -> StoragePlan:
        used = {name: lane.database.used_bytes() for name, lane in self.lanes.items()}
        unreceipted = {}
        for name, lane in self.lanes.items():
            kept = sum(marks.next_seq - marks.floor for marks in lane.marks.values())
            open_ = sum(marks.next_seq - 1 - max(marks.receipted, marks.floor - 1) for marks in lane.marks.values())
            unreceipted[name] = open_ / kept if kept else 0.0
        caps = {"journal": self.settings.max_bytes, "telemetry": self.settings.telemetry_max_bytes}
        return plan(self._rates, used, caps, unreceipted, self.free_bytes(), self.settings.min_free_bytes, self.settings.target_hours)

    async def _upkeep_forever(self) -> None:
        while True:
            await asyncio.sleep(self._pace.upkeep_s)
            try:
                await self.upkeep()
            except Exception:
                log.exception("journal upkeep failed")

    async def upkeep(self) -> None:
        """Observe growth, free what may go, keep the caps and the free space. Runs at the pace's `upkeep_s`."""
        now = self._clock.mono_ms()
        for name, lane in self.lanes.items():
            self._rates[name].observe(lane.appended_bytes - self._observed[name], now - self._observed_ms)
            self._observed[name] = lane.appended_bytes
        self._observed_ms = now
        for name, lane in self.lanes.items():
            cap = self.settings.telemetry_max_bytes if name == "telemetry" else self.settings.max_bytes
            if lane.worker is not None and not lane.error:
                try:
                    freed = await lane.worker.call(lambda lane=lane, cap=cap: lane.locked(lambda: self._keep_within(lane, cap)))  # type: ignore[misc]
                    if freed:
                        await self._give_back(lane)
                except sqlite3.Error as error:
                    log.error("%s cannot be kept within its limits: %s", lane.database.path.name, error)
        free = self.free_bytes()
        if free < self.settings.min_free_bytes:
            lane = self.lanes["telemetry"]
            if lane.worker is not None:
                try:
                    await lane.worker.call(lambda: self.lanes["telemetry"].locked(self._relieve))
                except sqlite3.Error as error:
                    log.error("telemetry cannot be trimmed: %s", error)
            free = self.free_bytes()
        elif not self._storage.exists(self._ballast):
            self._make_ballast()
        # Telemetry stops before decisions do: half of the reserve is theirs alone.
        self.telemetry_open = free >= self.settings.min_free_bytes // 2
        self.storage_plan = self._plan()

    @staticmethod
    async def _give_back(lane: Lane) -> None:
        """Give free pages back to the file system, in steps: a commit may come between two of them, and after each the WAL is checkpointed, into which it was all written first."""
        for _ in range(RELEASE_SLICES):
            if lane.worker is None:
                return
            left = await lane.worker.call(lambda: lane.locked(lane.database.vacuum_step))
            await lane.checkpoint()
            if not left:
                return

    def _keep_within(self, lane: Lane, cap: int) -> int:
        """On the lane's thread: free receipted records past the retention, then the oldest past the cap; how many slices were freed."""
        freed = 0
        for stream in sorted(lane.database.streams, key=lambda name: -STREAMS[name].priority):
            marks = lane.marks[stream]
            upto = min(marks.receipted, marks.next_seq - 1 - self.settings.retain_receipted_records)
            if stream in self._held:
                upto = min(upto, self._held[stream], marks.effects)
            for _ in range(RELEASE_SLICES):
                if marks.floor > upto or not lane.database.release(stream, marks, upto):
                    break
                freed += 1
        for stream in sorted(lane.database.streams, key=lambda name: -STREAMS[name].priority):
            marks = lane.marks[stream]
            # Critical records go only where they are receipted: a cap never loses a decision, a full disk may have to.
            upto = marks.receipted if STREAMS[stream].durability == "critical" else marks.next_seq - 1
            for _ in range(RELEASE_SLICES):
                if lane.database.used_bytes() - lane.database.wal_bytes() <= cap or not lane.database.release(stream, marks, upto):
                    break
                freed += 1
        return freed

    def _relieve(self) -> None:
        """On the telemetry lane's thread: drop the oldest telemetry and give its space back to the file system.

        In small steps with a checkpoint after each: deleting writes to the WAL first, and there may be no room for it to grow. For the
        same reason the WAL is started over and never truncated here: the space it has is the space we can still write to.
        """
        lane = self.lanes["telemetry"]
        marks = lane.marks["telemetry"]
        target = min(marks.next_seq - 1, marks.floor + max(DELETE_AT_LEAST, int((marks.next_seq - marks.floor) * RELIEF_SHARE)))
        self.trimmed_full += 1
        free = 1
        for _ in range(RELIEF_STEPS_MAX):
            if marks.floor > target and not free:
                break
            try:
                lane.database.release("telemetry", marks, target, RELIEF_ROWS)
                lane.database.checkpoint()
                free = lane.database.vacuum_step(RELIEF_BYTES)
                lane.database.checkpoint()
            except sqlite3.OperationalError as error:
                if not is_full(error) or not self._storage.exists(self._ballast):
                    raise
                self._storage.remove(self._ballast)

    def _full(self, done: Callable[[], None]) -> None:
        """The disk is full: release the ballast, drop telemetry, then, last, the oldest events and decisions; then `done()`."""
        self.telemetry_open = False
        try:
            self._storage.remove(self._ballast)
        except OSError as error:
            log.error("the ballast cannot be released: %s", error)
        telemetry, journal = self.lanes["telemetry"], self.lanes["journal"]
        if telemetry.worker is None or journal.worker is None:
            return

        def relieved(_result: Any, error: BaseException | None) -> None:
            if error is not None:
                log.error("telemetry cannot be trimmed: %s", error)
            marks = telemetry.marks["telemetry"]
            if marks.floor < marks.next_seq or journal.worker is None or not journal.error:
                done()
                return
            journal.worker.submit(lambda: journal.locked(self._last_resort), lambda _r, _e: done())

        telemetry.worker.submit(lambda: telemetry.locked(self._relieve), relieved)

    def _last_resort(self) -> None:
        """On the journal lane's thread, when no telemetry is left: make room inside the file by its oldest events, then decisions."""
        lane = self.lanes["journal"]
        for stream in ("event", "decision"):
            marks = lane.marks[stream]
            if lane.database.release(stream, marks, marks.next_seq - 1):
                log.error("disk full: the oldest records of stream %s were dropped", stream)
                return

    def _make_ballast(self) -> None:
        """Space that is ours to give when the disk is full (made of random-free zero blocks: allocated, not sparse)."""
        if self.settings.ballast_bytes <= 0 or self._storage.exists(self._ballast) or self.free_bytes() < self.settings.min_free_bytes + self.settings.ballast_bytes:
            return
        try:
            self._storage.allocate(self._ballast, self.settings.ballast_bytes)
        except OSError as error:
            log.warning("no ballast could be set aside: %s", error)
            self._storage.remove(self._ballast)


DELETE_AT_LEAST = 500
"""Rows of telemetry that one relief drops at least."""

RELIEF_ROWS = 100
RELIEF_BYTES = 256 * 1024
"""Rows and free pages of one step of a relief: a few hundred KiB of WAL, which even a nearly full disk has."""

RELIEF_STEPS_MAX = 50_000
"""Steps of one relief at most: a tenth of the largest telemetry database."""
