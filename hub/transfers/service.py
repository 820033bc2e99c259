"""The book of transfers at work: kept before anything is handed out, and workers that wait are woken."""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ..store.base import Store
from .book import AGAIN_MS, LEASE_MS, Book, Transfer

log = logging.getLogger(__name__)

LOOK_S = AGAIN_MS[0] / 1000
"""Between two looks of a worker that waits: leases run out and pauses end by the clock, for which there is no event."""


class Transfers:
    """Every method runs on the loop. What a caller is told has been kept."""

    def __init__(self, store: Store, *, write: Callable[[Callable[[], Any]], Awaitable[Any]], now_ms: Callable[[], int]) -> None:
        self._store, self._write, self._now = store, write, now_ms
        known = []
        for told in store.transfers():
            try:
                known.append(Transfer.from_json(told))
            except (KeyError, TypeError) as error:
                log.error("a transfer in the store cannot be read and is left there: %r", error)
        self.book = Book(known)
        self._new = asyncio.Condition()
        self.changes = 0
        """Grows with every change of a transfer, and when a worker is there that was not."""
        self._stopped = False
        self._keeping = asyncio.Lock()

    async def submit(self, document: dict[str, Any], held: bool = False) -> dict[str, Any]:
        """A checked document; raises ContractError. `held`: its receiver is made ready, and its sender waits until it is submitted without that."""
        transfer = self.book.submit(document, self._now(), held)
        if not held:
            self.book.let_go(transfer.id, self._now())
        await self._keep()
        return self.view(transfer)

    async def cancel(self, transfer: str) -> dict[str, Any]:
        """Raises KeyError."""
        one = self.book.cancel(transfer, self._now())
        await self._keep()
        return self.view(one)

    async def lease(self, worker: str, asked: dict[str, Any], gone: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """What a worker is to do, and to stop; waits for it as long as it asked for. `gone`: nobody waits for the answer any more, so that nothing may be given with it: its lease would have to run out first."""
        held = {one["task"]: one["epoch"] for one in asked["held"] or ()}
        end = asyncio.get_running_loop().time() + asked["wait_s"]
        while not gone():
            came = not self.there(worker)
            self.book.hello(worker, asked["facts"], self._now())
            if came:
                self.changes += 1
                async with self._new:
                    self._new.notify_all()
            tasks, stop = self.book.lease(worker, held, self._now())
            left = end - asyncio.get_running_loop().time()
            if tasks or stop or left <= 0 or self._stopped:
                await self._keep()
                return {"tasks": tasks, "stop": stop}
            if self.book.changed:  # a stream has ended with a lease that ran out, which others wait for
                await self._keep()
            async with self._new:
                try:
                    await asyncio.wait_for(self._new.wait(), min(left, LOOK_S))
                except TimeoutError:
                    pass
        return {"tasks": [], "stop": []}

    async def stop(self) -> None:
        """Let nobody wait any more."""
        self._stopped = True
        async with self._new:
            self._new.notify_all()

    async def report(self, worker: str, said: dict[str, Any]) -> dict[str, Any]:
        """Whether it shall go on."""
        self.book.hello(worker, None, self._now())
        go_on = self.book.report(worker, said, self._now())
        await self._keep()
        return {"go_on": go_on}

    async def _keep(self) -> None:
        """Nothing is answered before what it rests on is kept. Where that fails, the caller is told so, and it is tried again with the next change."""
        async with self._keeping:
            changed = self.book.changed
            taken = self.book.taken()
            if taken:
                self.changes += 1
                try:
                    await self._write(lambda: self._store.commit_transfers(taken))
                except BaseException:
                    self.book.changed = {**changed, **self.book.changed}
                    raise
        async with self._new:
            self._new.notify_all()

    def there(self, worker: str) -> bool:
        """Whether a worker has been heard from lately."""
        known = self.book.workers.get(worker)
        return known is not None and self._now() - known.seen_ms <= LEASE_MS

    def unfinished(self, prefix: str) -> list[str]:
        """Names of transfers under way that begin so."""
        return [name for name, one in self.book.transfers.items() if one.live and name.startswith(prefix)]

    async def next(self, seen: int, other: asyncio.Event) -> None:
        """Until `changes` is no longer `seen`, or `other` is set, which is cleared then."""
        while self.changes == seen and not other.is_set():
            waiting = [asyncio.ensure_future(other.wait()), asyncio.ensure_future(self._changes_from(seen))]
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in waiting:
                    one.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
        other.clear()

    async def _changes_from(self, seen: int) -> None:
        async with self._new:
            await self._new.wait_for(lambda: self.changes != seen)

    def view(self, transfer: Transfer) -> dict[str, Any]:
        """As the API shows it."""
        return self.book.view(transfer, self._now())

    def workers(self) -> list[dict[str, Any]]:
        """Every worker that was seen since this hub's start, by name."""
        now = self._now()
        return [{"worker": one.name, "seen_ms": one.seen_ms, "silent_ms": now - one.seen_ms, **one.facts} for _, one in sorted(self.book.workers.items())]


def worker_token(hub_token: str, worker: str) -> str:
    """What a worker shows to the hub: made of the hub's own token, it need not be kept, and gives no more than that worker's tasks."""
    return hmac.new(hub_token.encode(), f"migration-worker:{worker}".encode(), hashlib.sha256).hexdigest()
