"""Retention: what the hub keeps, and for how long. Records go from the oldest on, stream by stream, and the chain goes on from where they end.

`verify` stays exact: the book's base, and the chain before it, move with what went, in the transaction that deletes it.

Age is what the hub has run since a record came, by a clock that only passes and that nobody sets: no date of the hub's deletes anything. A machine whose battery clock says 2099, or that says last month until it has a network, would
else let go of all it has, or of what has just come. It is kept with the records: every hour (`MARK_MS`) the number of the newest record is noted with the running time.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_runtime.contract.records import Record

if TYPE_CHECKING:
    from .ingest import Ingest
    from .store.base import StoredRecord

log = logging.getLogger(__name__)

DAY_MS = 86_400_000

RAN = "ran_ms"
"""The store's setting with how long hubs of it have run."""

ROUND_S = 600.0
"""Between two rounds: a round that finds nothing reads one record per stream."""

MARK_MS = 3_600_000
"""Running time between two notes of which record was the newest: what is past its time goes so much later at most."""

SLICE = 2_000
"""Records hashed and deleted at once: about 10 ms on each of the two threads, so that neither ingest nor a page waits long."""

SLICES_PER_ROUND = 1_000
"""A round's work at most: two million records, more than ten minutes bring in."""


@dataclass(frozen=True, slots=True)
class RetentionSettings:
    """Days that the hub has run from a record's arrival until it goes; 0 keeps it for ever. Decisions and events are small and are what people ask about later."""

    telemetry_days: float = 30.0
    decision_days: float = 365.0

    def days(self, stream: str) -> float:
        """The days of one stream; events are kept as long as decisions."""
        return self.telemetry_days if stream == "telemetry" else self.decision_days


def old_enough(rows: "list[StoredRecord]", first: int, upto: int, newest: int) -> list[Record]:
    """The records of `rows` that may go: they follow each other from seq `first`, are at most `upto`, and came no later than the hub's record number `newest`."""
    out: list[Record] = []
    for row in rows:
        if row.record.seq != first + len(out) or row.record.seq > upto or row.number > newest:
            break
        out.append(row.record)
    return out


class Retention:
    """Deletes what is past its time. `round` does one round; `run` does them for ever.

    Args:
        read: runs a job on the store's reading thread.
        steady_ms: milliseconds that pass evenly, from whenever.
    """

    def __init__(self, ingest: "Ingest", settings: RetentionSettings, *, read: Callable[[Callable[[], Any]], Awaitable[Any]], steady_ms: Callable[[], int]) -> None:
        self._ingest = ingest
        self._settings = settings
        self._read = read
        self._steady = steady_ms
        self._began = steady_ms() - int(ingest.store.setting(RAN) or 0)

    def ran_ms(self) -> int:
        """For how long hubs of this store have run, those before this one within a round too little."""
        return self._steady() - self._began

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(ROUND_S)
            try:
                await self.round()
            except Exception:
                log.exception("old records could not be deleted; trying again in %.0f s", ROUND_S)

    async def round(self) -> int:
        """Let go of what is past its time; returns how many records went."""
        went, ran, store = 0, self.ran_ms(), self._ingest.store
        longest = max(self._settings.telemetry_days, self._settings.decision_days)

        def note() -> None:
            store.put_setting(RAN, str(ran))
            store.note_arrivals(ran, MARK_MS, ran - int(longest * DAY_MS))

        await self._ingest.write(note)
        left = SLICES_PER_ROUND
        for key in list(self._ingest.books):
            kept = self._settings.days(key[1])
            while kept and left > 0:
                count = await self._slice(key, ran - int(kept * DAY_MS))
                went += count
                left -= count > 0
                if count < SLICE:
                    break
        if went:
            self._ingest.counters["pruned_records_total"] += went
        return went

    async def _slice(self, key: tuple[str, str], before_ms: int) -> int:
        ingest = self._ingest
        book = ingest.books[key]
        base, before = book.base, book.base_chain
        newest = await self._read(lambda: ingest.store.read_arrived(before_ms))
        first = await self._read(lambda: ingest.store.read_records(*key, after=base - 1, limit=1))
        if not old_enough(first, base, book.contiguous, newest):
            return 0
        rows = await self._read(lambda: ingest.store.read_records(*key, after=base - 1, limit=SLICE))
        records = old_enough(rows, base, book.contiguous, newest)
        if not records:
            return 0

        def hashed() -> bytes:
            chain = before
            for record in records if before else ():  # an older hub did not keep the chain before the base: it stays unknown
                chain = record.chain(chain)
            return chain

        after = await self._read(hashed)
        if ingest.books.get(key) is not book or (book.base, book.base_chain) != (base, before):
            return 0  # moved meanwhile: the next round looks again
        upto = records[-1].seq
        # The book first: a commit that comes between would else store the old base over records that are gone.
        book.base, book.base_chain = upto + 1, after
        try:
            await ingest.write(lambda: ingest.store.prune(*key, upto, after))
        except Exception:
            if (book.base, book.base_chain) == (upto + 1, after):
                book.base, book.base_chain = base, before
            raise
        return len(records)
