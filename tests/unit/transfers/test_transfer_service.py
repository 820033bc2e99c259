"""The book at work: what ends by the clock is kept, and told to who waits for it, while all workers just wait."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest

from hub.store.base import Store
from hub.transfers import service
from hub.transfers.service import Transfers
from tests.integration.waiting import PATIENCE_S
from tests.unit.transfers.test_transfer_book import FACTS, said, stream


class Kept:
    """A store of transfers in memory."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}

    def transfers(self) -> list[dict[str, Any]]:
        return []

    def commit_transfers(self, changes: dict[str, Any]) -> None:
        self.states |= {name: one["state"] for name, one in changes.items()}


async def test_a_stream_that_failed_by_its_lease_is_kept_and_told_while_another_worker_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LOOK_S", 0.0)
    kept, clock = Kept(), itertools.count(0, 200)  # a look is 200 ms or more

    async def write(work: Callable[[], Any]) -> Any:
        return work()

    transfers = Transfers(cast(Store, kept), write=write, now_ms=lambda: next(clock))
    asked: dict[str, Any] = {"facts": FACTS, "held": None, "wait_s": 0}
    await transfers.submit(stream())
    (task,) = (await transfers.lease("b", asked))["tasks"]
    assert task["stream"] and (await transfers.report("b", said("t/receive", 1, "listening", address="b:1")))["go_on"]
    assert (await transfers.lease("a", asked))["tasks"]
    waiting = asyncio.create_task(transfers.lease("c", asked | {"wait_s": 100 * PATIENCE_S}))
    try:
        seen = transfers.changes
        while kept.states["t"] != "failed":
            await asyncio.wait_for(transfers.next(seen, asyncio.Event()), PATIENCE_S)
            seen = transfers.changes
        assert not waiting.done() and "said nothing" in transfers.book.transfers["t"].reason
    finally:
        await transfers.stop()
        assert await waiting == {"tasks": [], "stop": []}
