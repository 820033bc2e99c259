"""One database's writer: what is appended waits here, goes down in groups on a thread of its own, and comes back as callbacks.

The group is whatever arrived while the last commit ran (or, for telemetry, within its interval). A failed commit is retried as it
is: sequence numbers belong to the group and are never given twice. While the disk stays dead, what arrives joins that group, so that it has
its numbers and its effects can be done.
"""

import asyncio
import functools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from ..clock import Stamp
from ..contract.lean_dataclass import dataclass
from ..contract.records import Record
from .database import Group, JournalDatabase, StreamMarks
from .recovery import SideFile
from .storage import is_full

log = logging.getLogger(__name__)

GROUP_MAX = 1000
"""Records of one transaction: about 3 ms here, so that the first of them does not wait long for the last."""

ACK_DELAY_S = 0.1
"""How long a record that somebody waits for (a device's QoS 1 message is acknowledged after the commit) may wait for others: ten to twenty
fsyncs a second under steady load, so that telemetry hardly slows the decisions' own fsync down."""

EARLY_S = 0.04
"""How much before its time a group that nobody is in a hurry for may begin when the loop has just handled a message: its fsync then falls into
the pause before the next message, not beside that message's own."""

MARKS_DELAY_S = 0.25
"""How long moved marks (receipts, effects done) may wait to be stored, and the least time between two storings: a page of its own in a
commit. Losing the last ones means work done again with the same ids, not twice."""

CALLBACK_SLICE = 16
"""Callbacks after a commit that run in one turn of the loop: acknowledging 100 messages at once would hold a decision up for 2 ms."""

ACK_BATCH = 16
QUIET_S = 0.005
"""So many waiting records and nothing new for so long: the broker has probably used its window up (20 unacknowledged messages per client
is common) and waits for us, so they are committed at once. From then on a group begins at three quarters of that many: who waits for a silence has lost
its 5 ms already."""

AWAITED_EASE = 0.000_2
"""By so much of a record each group lets that number grow again: the broker may have got a larger window, or the silence was a device's. One
silence in some ten minutes then shows it anew."""

INLINE_LIMIT_S = 0.002
"""While commits take less than this on average they are made on the event loop: two changes of thread cost as much as the commit. On a
slow disk they move to a thread, so that nothing else waits for the disk."""

INLINE_RECORD_S = 0.000_02
"""What a record of a group may take besides: that is the processor's time, which a thread would take from the loop all the same."""

INLINE_WEIGHT = 0.1
"""Weight of the newest commit in that average: one slow commit of 20 ms moves the next ones to the thread."""

PAGE_FILL = 0.75
FRAMES_PER_PAGE = 4
"""For estimating what is in the WAL: the part of a page that records fill, and frames that a new page brings (itself, its parent, the
pointer map, the header). Checkpoints are made on the thread through a
connection of their own: inside a commit one takes 3 ms and more, which is what p99.9 then shows."""

RETRY_FIRST_S = 0.05
RETRY_CAP_S = 5.0
"""Pauses between tries of a failed commit, doubled each time: a full disk is asked again soon, a dead one not all the time."""

STALL_ACT_S = 1.0
"""A group that could not be made durable for so long has its effects run all the same, once, and from then on so has every record that arrives, up
to `pending_max` of them, until the disk is there again: a full or dead disk must not stop a site from being controlled. Counted, and shown
as unhealthy."""

Callback = Callable[[Record], None]


class Worker:
    """A thread that does jobs in order; results come back on the event loop."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]] | None] = queue.SimpleQueue()
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """Run `job()` on the thread, then `done(result, error)` on the loop."""
        self._jobs.put((job, done))

    def call(self, job: Callable[[], Any]) -> "asyncio.Future[Any]":
        """Run `job()` on the thread; the future carries its result or error."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def done(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.submit(job, done)
        return future

    def stop(self) -> None:
        """Finish what is queued, then end; waits."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            item = self._jobs.get()
            if item is None:
                return
            job, done = item
            result: Any = None
            error: BaseException | None = None
            try:
                result = job()
            except Exception as raised:
                error = raised
            try:
                self._loop.call_soon_threadsafe(done, result, error)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more


@dataclass(slots=True)
class _Pending:
    stream: str
    kind: str
    body: str
    stamp: Stamp
    callback: Callback | None


class Lane:
    """The writer of one database.

    Args:
        database: opened.
        side: the shared side file; reserved under a lock.
        boot: this boot's id.
        interval_s: least time between two commits when nothing urgent waits.
        pending_max: records that may wait; past it the oldest of a droppable lane go, and `pressure` asks senders to stop.
        droppable: the oldest waiting records may be dropped when `pending_max` is reached.
        on_commit: called on the loop after each commit with the new last seq per stream.
        on_full: called on the loop when the disk is full; makes room, then calls its argument.
        worker: makes the writing thread.
    """

    def __init__(
        self, database: JournalDatabase, side: SideFile, side_lock: threading.Lock, boot: str, *, interval_s: float, pending_max: int,
        droppable: bool, on_commit: Callable[[dict[str, int]], None], on_full: Callable[[Callable[[], None]], None],
        worker: Callable[[str, asyncio.AbstractEventLoop], Worker] = Worker,
    ) -> None:
        self.database = database
        self._side = side
        self._side_lock = side_lock
        self._boot = boot
        self._interval_s = interval_s
        self._pending_max = pending_max
        self._droppable = droppable
        self._on_commit = on_commit
        self._on_full = on_full
        self._make_worker = worker
        self._checkpoint_bytes = database.checkpoint_bytes
        self._frame_bytes = database.frame_bytes
        self.marks: dict[str, StreamMarks] = database.marks()
        """Durable marks, as of the last commit."""
        self._dirty: set[str] = set()
        self._marks_stored = 0.0
        self._pending: deque[_Pending] = deque()
        self._state: dict[str, str | None] = {}
        self._state_callbacks: list[Callable[[], None]] = []
        self._group: tuple[Group, list[tuple[Record, Callback | None]], list[Callable[[], None]]] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._begin_soon = False
        self._paused = 0
        self._group_waiters: list[asyncio.Future[None]] = []
        self._awaited = 0
        self._awaited_most: float = GROUP_MAX
        """A group that somebody waits for begins at so many; see `ACK_BATCH`."""
        self._last_awaited = 0.0
        self._quiet_timer: asyncio.TimerHandle | None = None
        self._inline = not droppable
        self._commit_s = 0.0
        self._lock = threading.Lock()
        self._wal_bytes = 0.0
        self._after: dict[str, StreamMarks] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.worker: Worker | None = None
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._retry_s = RETRY_FIRST_S
        self._stalled_since: float | None = None
        self._between_tries = False
        self._join_soon = False
        self._acted = 0
        self._last_commit = 0.0
        self.error = ""
        self.commits = 0
        self.appended_bytes = 0
        self.dropped_waiting = 0
        self.acted_undurable = 0
        self.failed_commits = 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin writing."""
        self._loop = loop
        self.worker = self._make_worker(f"journal-{self.database.path.stem}", loop)
        self._kick()

    @property
    def waiting(self) -> int:
        """Records appended and not yet durable."""
        return len(self._pending) + (len(self._group[1]) if self._group else 0)

    @property
    def stalled(self) -> bool:
        """Nothing could be made durable for `STALL_ACT_S`: effects no longer wait for the disk."""
        return self._stalled_since is not None and self._loop is not None and self._loop.time() - self._stalled_since >= STALL_ACT_S

    @property
    def has_room(self) -> bool:
        """False where the disk is dead and as much as may wait is waiting."""
        return not self.stalled or self.waiting < self._pending_max

    @property
    def pressure(self) -> bool:
        """More than half of what may wait is waiting: senders should hold back."""
        return self.waiting * 2 > self._pending_max

    def append(self, stream: str, kind: str, body: str, stamp: Stamp, callback: Callback | None) -> None:
        """Queue one record. One with a callback has somebody waiting for it and goes down within `ACK_DELAY_S`."""
        if self._droppable and len(self._pending) >= self._pending_max:
            self._awaited -= self._pending.popleft().callback is not None
            self.dropped_waiting += 1
        self._pending.append(_Pending(stream, kind, body, stamp, callback))
        if callback is not None:
            self._awaited += 1
            if self._loop is not None and self._interval_s:
                self._last_awaited = self._loop.time()
        if self._group is None:
            self._schedule()
        elif self._between_tries and not self._join_soon and self._loop is not None and self.stalled:
            self._join_soon = True
            self._loop.call_soon(self._join)

    def _schedule(self) -> None:
        """Begin a group when it is due: full, awaited by somebody who has gone quiet, or at the end of the interval."""
        if self._dirty and not self._pending and not self._state:
            if self._loop is not None and self._timer is None and not self.error:
                self._timer = self._loop.call_later(MARKS_DELAY_S, self._timed)
        elif len(self._pending) >= GROUP_MAX:
            self._kick(0.0)
        elif self._awaited and self._interval_s and self._loop is not None:
            if self._awaited >= ACK_BATCH and self._quiet_timer is None:
                self._quiet_timer = self._loop.call_later(QUIET_S, self._quiet)
            self._kick(ACK_DELAY_S)
        else:
            self._kick(ACK_DELAY_S if self._awaited or self._state else 3600.0)

    def _quiet(self) -> None:
        self._quiet_timer = None
        if self._loop is None or self._group is not None or self._awaited < ACK_BATCH:
            return
        left = self._last_awaited + QUIET_S - self._loop.time()
        if left <= 0.0005:
            self._awaited_most = max(ACK_BATCH / 2, self._awaited * 0.75)
            self._kick(0.0)
        else:
            self._quiet_timer = self._loop.call_later(left, self._quiet)

    def put_state(self, key: str, value: str | None, callback: Callable[[], None] | None = None) -> None:
        """Queue a state document (None deletes it); `callback` runs once it is durable."""
        self._state[key] = value
        if callback is not None:
            self._state_callbacks.append(callback)
        if self._group is None:
            self._kick(0.0)

    def touch(self, stream: str) -> None:
        """The marks of `stream` (receipted, effects) have changed: store them with the next commit."""
        self._dirty.add(stream)
        if self._group is None:
            self._schedule()

    def flush(self) -> None:
        """Commit what waits as soon as the running commit is done."""
        if self._group is None:
            self._kick(0.0)
        else:
            self._last_commit = 0.0

    def _kick(self, within_s: float = 3600.0) -> None:
        """Begin a group now or at the interval's end, at the latest `within_s` seconds from now."""
        if self._loop is None or self._group is not None or self.error:
            return
        if not (self._pending or self._state or self._dirty):
            return
        now = self._loop.time()
        due = min(self._last_commit + self._interval_s, now + within_s)
        if due <= now:
            if not self._begin_soon:
                # At the end of this turn of the loop, so that everything read from the socket in it is one group.
                self._begin_soon = True
                self._loop.call_soon(self._begin_due)
        elif self._timer is None or due < self._timer.when() - 0.001:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(due, self._timed)

    def _begin_due(self) -> None:
        if self._begin_soon:  # else `begin_now` was faster, and what has come since has a time of its own
            self._begin()

    def begin_now(self) -> None:
        """Begin the group that is due at the end of this turn of the loop: the caller knows that nothing more comes in it."""
        if self._begin_soon:
            self._begin()

    def breathe(self) -> None:
        """A message has just been handled: a good moment for a group that is due soon, or for which the broker will soon wait."""
        if self._timer is None or self._loop is None or self.error:
            return
        if self._awaited >= int(self._awaited_most) or self._timer.when() - self._loop.time() <= EARLY_S:
            self._begin()

    def _timed(self) -> None:
        self._timer = None
        self._begin()

    def _begin(self) -> None:
        self._begin_soon = False
        if self._group is not None or self._paused or self.error or not (self._pending or self._state or self._dirty):
            return
        assert self._loop is not None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._awaited_most = min(GROUP_MAX, self._awaited_most + AWAITED_EASE)
        group = Group(state=self._state)
        rows: list[tuple[Record, Callback | None]] = []
        self._after, self._acted = {}, 0
        self._take(group, rows, GROUP_MAX)
        # Marks that an append moves are found again in the last record; writing them as well would cost a page per commit.
        now = self._loop.time()
        if self._dirty and (not rows or now - self._marks_stored >= MARKS_DELAY_S):
            group.marks = {stream: self._after.get(stream) or self.marks[stream].copy() for stream in self._dirty}
            self._marks_stored = now
            self._dirty = set()
        self._state = {}
        callbacks, self._state_callbacks = self._state_callbacks, []
        self._group = (group, rows, callbacks)
        self._submit()

    def _take(self, group: Group, rows: list[tuple[Record, Callback | None]], limit: int) -> None:
        """Give the oldest waiting records, up to `limit`, their numbers in `group`."""
        for _ in range(min(limit, len(self._pending))):
            item = self._pending.popleft()
            self._awaited -= item.callback is not None
            marks = self._after.get(item.stream)
            if marks is None:
                marks = self._after[item.stream] = group.marks.get(item.stream) or self.marks[item.stream].copy()
                group.records[item.stream] = []
            record = Record(marks.next_seq, self._boot, *item.stamp, item.kind, item.body)
            marks.chain = record.chain(marks.chain)
            marks.next_seq += 1
            group.records[item.stream].append((record, marks.chain))
            self.appended_bytes += len(item.body) + 64
            rows.append((record, item.callback))

    def _submit(self) -> None:
        assert self._group is not None and self.worker is not None and self._loop is not None
        group = self._group[0]
        self._between_tries = False
        if self._inline and self._commit_s < INLINE_LIMIT_S and len(self._group[1]) <= GROUP_MAX and self._lock.acquire(blocking=False):
            failure: BaseException | None = None
            started = self._loop.time()
            try:
                self._write(group)
            except Exception as error:
                failure = error
            finally:
                self._lock.release()
            self._took(self._loop.time() - started)
            self._done(None, failure)
        else:
            self.worker.submit(lambda: self._write_locked(group), self._done)

    def _write_locked(self, group: Group) -> None:
        assert self._loop is not None
        started = self._loop.time()
        with self._lock:
            self._write(group)
        self._took(self._loop.time() - started)

    def _took(self, seconds: float) -> None:
        """Take the time of one commit into the average."""
        assert self._group is not None
        disk = max(0.0, seconds - INLINE_RECORD_S * len(self._group[1]))
        self._commit_s += INLINE_WEIGHT * (disk - self._commit_s)

    def locked(self, job: Callable[[], Any]) -> Any:
        """Run `job` on the calling thread (the worker's) while no commit runs."""
        with self._lock:
            return job()

    def _write(self, group: Group) -> None:
        # Receipts and releases may have moved marks meanwhile: only what this group knows is overwritten.
        for stream, marks in group.marks.items():
            live = self.marks[stream]
            marks.receipted, marks.effects = max(marks.receipted, live.receipted), max(marks.effects, live.effects)
            marks.floor, marks.floor_chain, marks.dropped = live.floor, live.floor_chain, live.dropped
        for stream, rows in group.records.items():
            with self._side_lock:
                self._side.reserve(stream, rows[-1][0].seq)
        self.database.commit(group)
        for stream, marks in self._after.items():
            # Here and not in `_done`: a release that follows on this thread stores the live marks.
            live = self.marks[stream]
            live.next_seq, live.chain = marks.next_seq, marks.chain

    def _done(self, _result: Any, error: BaseException | None) -> None:
        assert self._group is not None and self._loop is not None
        group, rows, callbacks = self._group
        if error is not None:
            self._failed(error)
            return
        self.commits += 1
        self._last_commit = self._loop.time()
        self._retry_s, self._stalled_since, self.error = RETRY_FIRST_S, None, ""
        self._group = None
        group_waiters, self._group_waiters = self._group_waiters, []
        for waiter in group_waiters:
            if not waiter.done():
                waiter.set_result(None)
        if self._interval_s and len(rows) > CALLBACK_SLICE:
            self._run_slice(rows, 0)
        else:
            for record, callback in rows:
                if callback is not None:
                    _run(callback, record)
        for done in callbacks:
            _run(done)
        if group.records:
            self._on_commit({stream: self.marks[stream].next_seq - 1 for stream in group.records})
        if self._pending or self._dirty or self._state:
            self._schedule()
        # A page of each table that was touched and of each document; pages of their own where documents are long, new ones for records.
        self._wal_bytes += self._frame_bytes * (len(group.records) + bool(group.marks) + len(group.state)) + FRAMES_PER_PAGE / PAGE_FILL * sum(len(record.body) + 100 for record, _ in rows)
        if group.state:
            self._wal_bytes += sum(len(value) for value in group.state.values() if value is not None) / PAGE_FILL
        if self._wal_bytes >= self._checkpoint_bytes and self.worker is not None:
            self._wal_bytes = 0.0
            self.worker.submit(self._checkpoint, functools.partial(_beside, "a checkpoint"))
        if self.waiting == 0 and not self._state:
            waiters, self._idle_waiters = self._idle_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def grow(self) -> None:
        """Make the WAL as large as it will be, beside what else is done; commits wait meanwhile."""
        if self.worker is not None:
            self.worker.submit(lambda: self.locked(self.database.grow_wal), functools.partial(_beside, "growing the WAL"))

    async def checkpoint(self) -> None:
        """Move what is in the WAL into the file, beside commits."""
        if self.worker is not None:
            self._wal_bytes = 0.0
            await self.worker.call(self._checkpoint)

    def _checkpoint(self) -> None:
        self.database.checkpoint_beside()
        # Commits went on meanwhile, and the WAL begins at its start again only when nothing of it is left: the few last frames go while none runs.
        self.locked(self.database.checkpoint_beside)

    def _run_slice(self, rows: list[tuple[Record, Callback | None]], start: int) -> None:
        for record, callback in rows[start : start + CALLBACK_SLICE]:
            if callback is not None:
                _run(callback, record)
        if start + CALLBACK_SLICE < len(rows) and self._loop is not None:
            self._loop.call_soon(self._run_slice, rows, start + CALLBACK_SLICE)

    def _failed(self, error: BaseException) -> None:
        assert self._group is not None and self._loop is not None
        now = self._loop.time()
        self.failed_commits += 1
        if not self.error:
            log.error("journal %s cannot be written: %s; will be tried again", self.database.path.name, error)
        self.error = str(error) or type(error).__name__
        self._between_tries = True
        if self._stalled_since is None:
            self._stalled_since = now
        elif self.stalled:
            self._join()
        pause, self._retry_s = self._retry_s, min(RETRY_CAP_S, self._retry_s * 2)
        if is_full(error):
            self._on_full(lambda: self._later(pause))
        else:
            self._later(pause)

    def _later(self, pause: float) -> None:
        if self._loop is not None and self.worker is not None:
            self._timer = self._loop.call_later(pause, self._retry)

    def _retry(self) -> None:
        self._timer = None
        if self._group is not None:
            self._submit()

    def _join(self) -> None:
        """What waits joins the group that cannot be written, as much as may wait there, and the effects of all of it are done, each once."""
        self._join_soon = False
        if self._group is None or not self._between_tries:
            return  # it is being written again, or is
        group, rows, _ = self._group
        self._take(group, rows, self._pending_max - len(rows))
        first, self._acted = self._acted, len(rows)
        for number in range(first, len(rows)):
            record, callback = rows[number]
            if callback is not None:
                rows[number] = (record, None)
                self.acted_undurable += 1
                _run(callback, record)

    async def exclusively(self, job: Callable[[], Any]) -> Any:
        """Run `job` on the writer's thread while no group is under way; what is appended meanwhile waits."""
        assert self._loop is not None and self.worker is not None
        self._paused += 1
        try:
            while self._group is not None:
                waiter: asyncio.Future[None] = self._loop.create_future()
                self._group_waiters.append(waiter)
                await waiter
            return await self.worker.call(lambda: self.locked(job))
        finally:
            self._paused -= 1
            self._kick(0.0)

    async def drain(self) -> None:
        """Wait until everything appended so far is durable; at once where the lane was never started."""
        if self._loop is None:
            return
        self.flush()
        while self.waiting or self._state or self._dirty or self._group is not None:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._idle_waiters.append(waiter)
            self.flush()
            await waiter

    def stop(self) -> None:
        """End the thread and close the file; what could not be written is lost with it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.worker is not None:
            self.worker.stop()
            self.worker = None
        self.database.close()


def _beside(what: str, _result: Any, error: BaseException | None) -> None:
    if error is not None:
        log.warning("%s failed: %s", what, error)


def _run(callback: Callable[..., None], *arguments: Any) -> None:
    """A callback's error is its own: it must not stop the journal."""
    try:
        callback(*arguments)
    except Exception:
        log.exception("a callback after a commit failed")
