"""The one task that places: takes what waits, decides in memory, writes it in one transaction, only then answers and publishes.

    API, edges' records, the clock -> jobs (bounded) -> planner -> commit (writer thread) -> answers -> desired state
"""

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.operations import Operation
from edge_runtime.contract.schema import check_fields
from edge_runtime.contract.workloads import MOVES, MOVING, REPORT_FIELDS, RUNNING

from ..fleet import Fleet
from ..scheduler import Invalid
from ..store.base import Store, StoredRecord
from ..store.workloads import WorkloadRow
from ..transfers.service import Transfers
from . import moving
from .book import AHEAD, BEGUN, LIVE, ROOM, SENDING, TAKING
from .documents import Conflict, Submitted, read_workload
from .placing import Together
from .planner import Planner
from .rebalancing import Rebalancing, propose
from .rounds import Heard, Rounds
from .views import usage

log = logging.getLogger(__name__)

QUEUE_MAX = 1_024
"""Requests that wait for the placing task: sixteen for each of 64 callers at once; past it a caller is told to come again."""

BATCH_MAX = 256
"""Workloads of one transaction, but for a longer list that came as one: at about 0.3 ms each the others wait under 100 ms."""

YIELD_EVERY = 16
"""Decisions between two looks at what else the hub has to do."""

ROUND_S = 1.0
"""Between two rounds: who is silent, what must move, what can be placed now."""

EVENTS_MAX = 500
"""Records of edges acted upon in one transaction."""

KINDS = ("node.capacity", "workload", "operation")
"""Records that say something of nodes and workloads."""

CATCH_UP_MS = 60_000
"""Of the workloads' time ahead of the wall clock, up to which it goes half as fast until they meet: a clock that was slewed, not one that was wrong."""

KEEP_ENDED_MS = 7 * 86_400_000
KEEP_ENDED = 10_000
"""Ended workloads are remembered so long, and so many of them, so that a request that is repeated late finds what became of it."""

KEEP_MINUTES = 7 * 1_440
"""Utilisation is kept by the minute for a week."""

LATENCIES = 2_048
"""Newest waits of submissions that are remembered, for the percentiles."""

TELL_AGAIN_S = 30.0
"""An edge whose desired state could not be written is tried again after so long."""


class Busy(RuntimeError):
    """The queue is full, or the store refused: nothing was done; come again."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.field, self.problem, self.remedy = "hub", problem, remedy


@dataclass(slots=True)
class _Job:
    work: Callable[[Planner, int], Any]
    size: int
    answer: "asyncio.Future[Any]"


class Workloads:
    """Nodes, workloads and their placing.

    Args:
        write, read: run a job on the store's writing thread, on its reading thread.
        tell: changes parts of an edge's desired state; raises `ContractError`.
        desired: every edge's desired state document.
        now_ms: the hub's wall milliseconds.
        steady_ms: milliseconds that pass evenly, from whenever.
        think: runs a long thought on a thread of its own.
        rebalance_s: seconds between two looks whether to rebalance; 0: only when asked.
        transfers: what carries the states of moves; None: nothing is moved with its state.
    """

    def __init__(
        self, store: Store, fleet: Fleet, *, write: Callable[[Callable[[], Any]], Awaitable[Any]], read: Callable[[Callable[[], Any]], Awaitable[Any]],
        tell: Callable[[str, Callable[[dict[str, Any]], dict[str, Any]]], Awaitable[Any]], desired: Mapping[str, dict[str, Any]], now_ms: Callable[[], int], steady_ms: Callable[[], int],
        think: Callable[[Callable[[], Any]], Awaitable[Any]], rebalance_s: float = 0, transfers: Transfers | None = None,
    ) -> None:
        self._store, self._fleet = store, fleet
        self._write, self._read, self._tell, self._desired, self._clock = write, read, tell, desired, now_ms
        self._think, self._rebalance_s, self._transfers = think, rebalance_s, transfers
        self.planner = Planner()
        self._rounds = Rounds(self.planner)
        self.rebalancing = Rebalancing(self.planner)
        self.turn = asyncio.Lock()
        """Held while the planner may know more than the store: whoever reads the planner takes it."""
        self.rows: dict[str, WorkloadRow] = {}
        """What is committed."""
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue(QUEUE_MAX)
        self._wake = asyncio.Event()
        self._news = True
        self._cursor = 0
        self._now = 0
        self._time = threading.Lock()
        self._steady = steady_ms
        self._steady_was = steady_ms()
        self._tasks: list[asyncio.Task[None]] = []
        self._untold = asyncio.Event()
        self._moving = asyncio.Event()
        """A move may have come to a step in which migration workers have a part."""
        self._listed: dict[str, str] = {}
        """Workload to the node whose document wants it running."""
        self._minute = 0
        self._tell_after: dict[str, float] = {}
        self.counters: Counter[str] = Counter()
        self.waits_ms: deque[float] = deque(maxlen=LATENCIES)
        self.decisions_ms: deque[float] = deque(maxlen=LATENCIES)

    def now_ms(self) -> int:
        """The hub's time, never going back, and never standing still: placements follow each other. Where it was ahead once, or the wall clock is set back, it goes on from there, more slowly while little is missing."""
        with self._time:  # who explains asks on another thread
            wall, steady = self._clock(), self._steady()
            passed, self._steady_was = steady - self._steady_was, steady
            ahead = self._now - wall
            self._now = wall if ahead <= 0 else self._now + (passed if ahead > CATCH_UP_MS else passed // 2)
            return self._now

    # -- life ----------------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Build the state from the store; on the thread that owns it, before anything is asked. Raises what the store raises."""
        planner, store = self.planner, self._store
        self._cursor = store.workload_cursor()
        rows, placements = store.workloads(), store.open_placements()
        self._now = max([self._clock(), *(placement.from_ms for placement in placements), *(row.changed_ms for row in rows)])
        problems = planner.load(store.nodes(), rows, placements, store.budgets(), store.quotas(), read_workload, self._now, store.rebalances(), store.heard_epochs(), store.moves())
        for problem in problems[:100]:
            log.error("set right at the start: %s", problem)
        changes = planner.changes()
        if changes:
            store.commit_workloads(changes)
        planner.keep()
        self.rows = dict(planner.tables.rows)
        self._listed = {name: node for node in self._desired for name in _running(self._told(node))}
        planner.tables.dirty |= {node: True for node in self._desired if self._told(node)}  # nodes that are gone too

    def start(self) -> "list[asyncio.Task[None]]":
        """Begin; call inside the running loop. The tasks never end by themselves."""
        loop = asyncio.get_running_loop()
        self._untold.set()
        self._tasks = [loop.create_task(self._run(), name="workloads"), loop.create_task(self._tell_forever(), name="workloads, telling")]
        if self._transfers is not None:
            self._tasks.append(loop.create_task(self._carry_forever(self._transfers), name="workloads, moving"))
        if self._rebalance_s:
            self._tasks.append(loop.create_task(self._rebalance_forever(), name="workloads, rebalancing"))
        return self._tasks

    async def stop(self) -> None:
        """End; who still waits for an answer is told to come again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while not self._jobs.empty():
            _fail(self._jobs.get_nowait(), Busy("the hub stops", "ask again when it is back"))

    def records(self, stored: list[StoredRecord]) -> None:
        """Records that were committed just now."""
        if any(item.record.kind in KINDS for item in stored):
            self._news = True
            self._wake.set()

    # -- asking --------------------------------------------------------------------------------------------------------------

    async def ask(self, work: Callable[[Planner, int], Any], size: int = 1) -> Any:
        """Have the placing task do `work(planner, now)` and wait until its outcome is kept. Raises what it raises (`Invalid`, `Conflict`), or `Busy`."""
        job = _Job(work, size, asyncio.get_running_loop().create_future())
        try:
            self._jobs.put_nowait(job)
        except asyncio.QueueFull:
            self.counters["refused_requests_total"] += 1
            raise Busy(f"{QUEUE_MAX} requests wait already", "ask again in a second") from None
        self._wake.set()
        return await job.answer

    async def submit(self, entries: list[Submitted]) -> list[WorkloadRow]:
        """Take workloads in; what became of each, kept by the store when this returns."""
        return (await self.submit_all(entries))[0]

    async def submit_all(self, entries: list[Submitted]) -> tuple[list[WorkloadRow], Together | None]:
        """As `submit`; and how well a list was placed."""
        began = perf_counter()
        ids, found = await self.ask(lambda planner, now: planner.submit_all(entries, now), len(entries))
        self.waits_ms.append((perf_counter() - began) * 1000)
        return [row for name in ids if (row := self.rows.get(name)) is not None], found

    async def rebalance(self, nodes: Sequence[str], go: bool) -> dict[str, Any]:
        """Plan moves that rebalance the cluster, or empty `nodes`; with `go` the plan is carried out. Raises `Invalid`, `Conflict` or `Busy`."""
        inputs = await self.look(lambda _: self.rebalancing.inputs(nodes, self.now_ms()))
        proposal: dict[str, Any] = await self._think(lambda: propose(inputs))
        return await self.ask(lambda _, now: self.rebalancing.start(proposal, now)) if go else proposal

    async def _rebalance_forever(self) -> None:
        """By itself, where that is configured: a plan that gains enough is carried out, one after the other."""
        while True:
            await asyncio.sleep(self._rebalance_s)
            try:
                begun = await self.rebalance((), go=True)
                log.info("%s: %s", begun["id"], begun["text"])
            except (Invalid, Conflict, Busy) as error:
                log.debug("no rebalancing now: %s", error)
            except Exception:
                log.exception("rebalancing failed; the next try is in %.0f s", self._rebalance_s)

    # -- the task ------------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            try:
                async with self.turn:
                    if self._news:
                        await self._events()
                    while not self._jobs.empty():
                        await self._batch()
                        if loop.time() >= due:
                            break
                    if loop.time() >= due:
                        due = loop.time() + ROUND_S
                        await self._round()
                await self._each_minute()
            except asyncio.CancelledError:
                raise
            except Exception:
                self.counters["failed_rounds_total"] += 1
                log.exception("a round of placing failed; trying again in %.0f s", ROUND_S)
                await asyncio.sleep(ROUND_S)
            if self._jobs.empty() and not self._news:
                self._wake.clear()
                idle = not self.planner.tables.nodes and not self.rows  # nothing changes by itself then: no round is due
                try:
                    async with asyncio.timeout(None if idle else max(0.0, due - loop.time())):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def _commit(self, cursor: int | None = None) -> None:
        """Write the plan under way, then let it stand; raises `Busy` with everything of it taken back."""
        changes = self.planner.changes()
        changes.cursor = cursor
        if changes:
            try:
                await self._write(lambda: self._store.commit_workloads(changes))
            except BaseException as error:
                self.planner.undo()
                if not isinstance(error, Exception):
                    raise  # cancelled: whether it was written is for the next start to see
                self.counters["failed_commits_total"] += 1
                log.error("the store refused placements: %s; nothing of them was kept", error)
                raise Busy("the store refused to keep it, nothing was done", "see the hub's log and /healthz, then ask again") from None
        self.planner.keep()
        if self.planner.tables.dirty:
            self._untold.set()
        if changes.moves:
            self._moving.set()
        self.counters["placements_total"] += sum(row is not None and row.to_ms is None for row in changes.placements.values())
        for name, row in changes.workloads.items():
            if row is None:
                self.rows.pop(name, None)
            else:
                self.rows[name] = row

    async def _batch(self) -> None:
        planner, now = self.planner, self.now_ms()
        jobs: list[_Job] = []
        size = 0
        while not self._jobs.empty() and size < BATCH_MAX:
            job = self._jobs.get_nowait()
            if job.answer.done():
                continue  # who asked is gone, and nothing has been done yet
            jobs.append(job)
            size += job.size
        done: list[tuple[_Job, Any]] = []
        planner.begin()
        try:
            for number, job in enumerate(jobs):
                began = perf_counter()
                planner.begin()
                try:
                    result = job.work(planner, now)
                except Exception as error:
                    planner.undo()
                    if not isinstance(error, Invalid | Conflict):
                        log.exception("a request to the placing task failed")
                    _fail(job, error)
                    continue
                planner.keep()
                done.append((job, result))
                self.decisions_ms.append((perf_counter() - began) * 1000 / job.size)
                if number % YIELD_EVERY == YIELD_EVERY - 1:
                    await asyncio.sleep(0)
        except BaseException:
            planner.undo()
            for job in jobs:
                _fail(job, Busy("the hub stops", "ask again when it is back"))
            raise
        try:
            await self._commit()
        except BaseException as error:
            refusal = error if isinstance(error, Busy) else Busy("the hub stops", "ask again when it is back")
            for job, _ in done:
                _fail(job, refusal)
            if not isinstance(error, Busy):
                raise
            return
        for job, result in done:
            if not job.answer.done():
                job.answer.set_result(result)

    async def _plan(self, work: Callable[[Planner, int], None], cursor: int | None = None) -> None:
        """Work that nobody waits for, in a transaction of its own."""
        self.planner.begin()
        try:
            work(self.planner, self.now_ms())
        except BaseException:
            self.planner.undo()
            raise
        await self._commit(cursor)

    async def _events(self) -> None:
        """Act on what edges said, in the order in which it came, each once: the mark moves in the same transaction. In which order one edge said it is for the planner to see, by its numbers."""
        self._news = False
        found, upto = await self._read(lambda: self._store.read_events_after(KINDS, self._cursor, EVENTS_MAX))
        if upto < self._cursor:
            log.warning("the records begin anew at %d: what edges said of nodes and workloads is read again", upto)
            self._cursor, self._news = 0, True
            return

        def act(planner: Planner, now: int) -> None:
            for _, stored in found:
                self._act(planner, stored, now)
            self._rounds.beats(self._heard(), now)

        if found:
            try:
                await self._plan(act, upto)
            except Busy:
                self._news = True
                raise
        self._cursor = upto
        if len(found) == EVENTS_MAX:
            self._news = True

    def _act(self, planner: Planner, stored: StoredRecord, now: int) -> None:
        record = stored.record
        planner.begin()
        try:
            body = jsoncodec.decode(record.body.encode())
            if record.kind == "operation":
                if str(body.get("id", "")).startswith(MOVING):
                    moving.answered(planner, stored.edge, Operation.from_json(body).to_json(), now)
            elif record.kind == "workload":
                planner.said(stored.edge, record.seq, check_fields(REPORT_FIELDS, body, "payload"), now)
            else:
                planner.capacity(stored.edge, record.seq, body, now)
        except (Invalid, Conflict, ContractError) as error:
            planner.undo()
            self.counters["refused_records_total"] += 1
            log.warning("what edge %s says of its %s does not count: %s", stored.edge, "node" if record.kind == "node.capacity" else "workloads", error)
            if record.kind == "node.capacity":
                planner.refuse_capacity(stored.edge, record.seq, str(error), now)
        except Exception:  # one edge's oddity must not stop the placing
            planner.undo()
            self.counters["refused_records_total"] += 1
            log.exception("what edge %s says could not be taken in", stored.edge)
        else:
            planner.keep()

    def _heard(self) -> dict[str, Heard]:
        return {
            name: Heard(row.state == "online" and not row.quarantine, self._fleet.silence_ms(row)) for name in self.planner.tables.nodes if (row := self._fleet.rows.get(name)) is not None
        }

    async def _round(self) -> None:
        try:
            await self._plan(lambda _, now: self._rounds.reconcile(self._heard(), now))
        except Busy:
            pass  # said already; the next round tries again

    # -- telling -------------------------------------------------------------------------------------------------------------

    async def _tell_forever(self) -> None:
        """Tell the nodes whose part of desired state has changed: a task of its own, as each is a transaction and placing must not wait for a thousand of them."""
        while True:
            self._untold.clear()
            for node in list(self.planner.tables.dirty):
                try:
                    await self._tell_node(node)
                except Exception as error:
                    log.error("the desired state of %s could not be written: %s; trying again in %.0f s", node, error, TELL_AGAIN_S)
                    self._later(node)
            try:
                async with asyncio.timeout(TELL_AGAIN_S if self._tell_after else None):
                    await self._untold.wait()
            except TimeoutError:
                pass

    def _later(self, node: str) -> None:
        self.planner.tables.dirty[node] = True
        self._tell_after[node] = asyncio.get_running_loop().time() + TELL_AGAIN_S

    async def _tell_node(self, node: str) -> None:
        if self._tell_after.get(node, 0.0) > asyncio.get_running_loop().time():
            return
        self._tell_after.pop(node, None)
        async with self.turn:  # only what is kept may be told
            self.planner.clean(node)
            wanted, asked = self.planner.wanted(node), moving.operations(self.planner, node)
            others = {other: self.planner.wanted(other) for name in _running(wanted) if (other := self._listed.get(name, node)) != node}
        if wanted == self._told(node) and asked == self._asked(node):
            return
        # At no moment do two documents want one workload running: the older one is changed first.
        for other, rest in others.items():
            mine = set(_running(wanted))
            await self._write_workloads(other, [entry for entry in rest if entry["id"] not in mine or entry.get("held") or entry["wanted"] != RUNNING])
            self.planner.tables.dirty[other] = True
        try:
            await self._write_workloads(node, wanted, asked)
        except ContractError as error:
            await self._untellable(node, str(error))

    def _told(self, node: str) -> list[dict[str, Any]]:
        return (self._desired.get(node) or {}).get("spec", {}).get("workloads") or []

    def _asked(self, node: str) -> list[dict[str, Any]]:
        """What moves ask of a node, as its document says."""
        return [one for one in (self._desired.get(node) or {}).get("spec", {}).get("operations") or [] if one["kind"] in MOVES]

    async def _write_workloads(self, node: str, entries: list[dict[str, Any]], asked: list[dict[str, Any]] | None = None) -> None:
        """`asked`: what moves ask of it; None leaves that as it is. People's operations stay."""
        before = _running(self._told(node))

        def change(spec: dict[str, Any]) -> dict[str, Any]:
            if asked is None or asked == self._asked(node):
                return {"workloads": entries}
            return {"workloads": entries, "operations": [*(one for one in spec.get("operations") or () if one["kind"] not in MOVES), *asked]}

        await self._tell(node, change)
        self.counters["told_total"] += 1
        for name in before:
            self._listed.pop(name, None)
        self._listed |= dict.fromkeys(_running(entries), node)

    # -- moves with their state ----------------------------------------------------------------------------------------------

    async def _carry_forever(self, transfers: Transfers) -> None:
        """Have the migration workers carry what moves have taken, and tell the planner how that went: a transfer has its move's name, so doing this again changes nothing."""
        while True:
            seen = transfers.changes
            try:
                for move in await self.look(lambda planner: list(moving.live(planner))):
                    await self._carry(transfers, move)
                for name in transfers.unfinished(MOVING):
                    move, steps = moving.carries(name)
                    kept = self.planner.tables.moves.get(move, {})
                    if kept.get("state") != BEGUN or kept.get("step") not in steps:  # what is kept of a move never goes back to these steps
                        await transfers.cancel(name)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                log.error("the states of moves could not be looked after: %s; trying again in %.0f s", error, ROUND_S)
                await asyncio.sleep(ROUND_S)
                continue
            await transfers.next(seen, self._moving)

    async def _carry(self, transfers: Transfers, move: dict[str, Any]) -> None:
        if move["step"] == ROOM and move["ready"] and transfers.there(move["source"]) and transfers.there(move["target"]):
            await self.ask(lambda planner, now: moving.met(planner, move["id"], now))
        if move["step"] == LIVE:  # while one is made ready that waits there is time to have somebody listen
            told = await transfers.submit(moving.transfer(move, moving.ALIVE), held=not move["waits"])
            if move["waits"] and not move["listens"] and told["address"]:
                await self.ask(lambda planner, now: moving.listened(planner, move["id"], now))
            if told["state"] in ("done", "failed", "cancelled"):
                await self.ask(lambda planner, now: moving.connected(planner, move["id"], told["state"], told["reason"], now))
        if move["step"] == AHEAD and move["ahead_bytes"]:
            told = await transfers.submit(moving.transfer(move, moving.BEFORE))
            if told["state"] in ("done", "failed", "cancelled"):
                await self.ask(lambda planner, now: moving.preceded(planner, move["id"], told["state"], told["reason"], now))
        if move["step"] == TAKING:  # while its state is being written there is time to have somebody ready who takes it
            await transfers.submit(moving.transfer(move), held=True)
        if move["step"] == SENDING:
            told = await transfers.submit(moving.transfer(move))
            if told["state"] in ("done", "failed", "cancelled"):
                await self.ask(lambda planner, now: moving.carried(planner, move["id"], told["state"], told["reason"], now))

    async def _untellable(self, node: str, problem: str) -> None:
        """Take the newest placement back, until what is left fits the document."""
        log.warning("what %s shall run does not fit its desired state: %s", node, problem)
        found = False

        def take_back(planner: Planner, now: int) -> None:
            nonlocal found
            found = planner.untellable(node, problem, now)

        async with self.turn:
            await self._plan(take_back)
            if not found:
                self._later(node)

    async def _each_minute(self) -> None:
        minute = self.now_ms() // 60_000
        if minute == self._minute or (not self.planner.tables.nodes and not self.rows):
            return
        self._minute = minute
        async with self.turn:
            document = usage(self.planner)
        await self._write(lambda: self._store.put_utilisation(minute, document, KEEP_MINUTES))
        gone = await self._write(lambda: self._store.forget_workloads(self._now - KEEP_ENDED_MS, KEEP_ENDED))
        self.planner.forget(gone)
        for name in gone:
            self.rows.pop(name, None)

    # -- reading -------------------------------------------------------------------------------------------------------------

    async def look(self, view: Callable[[Planner], Any]) -> Any:
        """`view(planner)` while the planner knows nothing that is not kept."""
        async with self.turn:
            return view(self.planner)


def _fail(job: _Job, error: BaseException) -> None:
    if not job.answer.done():
        job.answer.set_exception(error)


def _running(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["id"] for entry in entries if entry["wanted"] == RUNNING and not entry.get("held")]
