"""Makes what runs on this node what desired state says, by a driver: one task for each workload, which goes by what is on the disk, never by what it remembers.

A workload's epochs are instances of their own, and no epoch starts before the earlier ones have ended here. What is not wanted is stopped and removed. What has ended stays on the disk, with its
output, until desired state does not list it any more. What was said of a placement is said once, also over restarts (`REPORTED`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

from ..contract.workloads import RUNNING, STOPPED, WHEN_CUT_OFF
from .drivers.face import Driver, DriverError, Failed, Key, Leases, Order, Phase, Refused, Status

log = logging.getLogger(__name__)

REPORTED = "workload_reports"
"""The journal's state document that keeps what was said last of each placement."""

GRACE_S = 10.0
"""Between being asked to end and being killed: what Docker gives."""

AGAIN_S = 15.0
"""After an operation that failed (a process that cannot be killed, a disk that fails) it is tried again."""

ENDS = ("refused", "stopped", "done", "failed")


class Journal(Protocol):
    """What is needed of the journal."""

    def append(self, stream: str, kind: str, body: dict[str, Any]) -> Any:
        """One record."""

    def state(self, key: str) -> Any:
        """A kept document."""

    def put_state(self, key: str, value: Any) -> None:
        """Keep a document, in one group with the records before it."""


class Runner:
    """Workloads of one kind on this node.

    Args:
        bring: takes the image of a reference into the store where it can; raises `DriverError`.
        tidy: called when something may have become too much: an image came, or an instance went.
        errors: counts what failed.
        said: called when something was said.
    """

    def __init__(self, driver: Driver, journal: Journal, bring: Callable[[str], Awaitable[None]], tidy: Callable[[], Any], errors: Callable[[], None], said: Callable[[], None] = lambda: None) -> None:
        self._driver, self._journal, self._bring, self._tidy, self._errors, self._on_said = driver, journal, bring, tidy, errors, said
        self._wanted: dict[str, list[Mapping[str, Any]]] = {}
        self._may: Mapping[str, bool] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed: dict[str, asyncio.Event] = {}
        told = journal.state(REPORTED)
        self._told: dict[str, str] = {key: state for key, state in told.items() if isinstance(state, str)} if isinstance(told, dict) else {}

    async def take(self, entries: Iterable[Mapping[str, Any]], may: Mapping[str, bool] | None = None) -> None:
        """From now on these are wanted, and nothing else. Returns at once; the tasks see to it.

        `may`: of those (`id/epoch`) that run on a lease whether they may run here now. One that may not is ended, and nothing is said of that: it is wanted still.
        """
        wanted: dict[str, list[Mapping[str, Any]]] = {}
        for entry in entries:
            wanted.setdefault(entry["id"], []).append(entry)
        there = {status.key.id for status in await self._driver.instances()}
        self._wanted, self._may = wanted, dict(may or {})
        listed = {_said(entry) for those in wanted.values() for entry in those}
        if not listed.issuperset(self._told):
            self._told = {key: state for key, state in self._told.items() if key in listed}
            self._journal.put_state(REPORTED, dict(self._told))
        for workload in {*wanted, *there, *self._tasks}:
            self._changed.setdefault(workload, asyncio.Event()).set()
            if workload not in self._tasks:
                self._tasks[workload] = asyncio.create_task(self._tend(workload), name=f"workload {workload}")

    async def ended(self, workload: str) -> None:
        """Until nothing of a workload is under way or runs, where nothing of it may."""
        while (task := self._tasks.get(workload)) is not None:
            await asyncio.wait((task,))

    def ends(self) -> dict[str, str]:
        """`id/epoch` to how it ended, of what is listed."""
        return {key.removesuffix(f"/{RUNNING}"): state for key, state in self._told.items() if state in ENDS and key.endswith(f"/{RUNNING}")}

    async def close(self) -> None:
        """Let go; what runs goes on."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _tend(self, workload: str) -> None:
        changed = self._changed[workload]
        try:
            while changed.is_set():
                changed.clear()
                try:
                    await self._settle(workload, changed)
                except Exception as error:
                    self._errors()
                    log.log(logging.WARNING if isinstance(error, DriverError) else logging.ERROR, "workload %s: %s", workload, error, exc_info=not isinstance(error, DriverError))
                    try:
                        await asyncio.wait_for(changed.wait(), AGAIN_S)
                    except TimeoutError:
                        changed.set()
        finally:
            self._tasks.pop(workload, None)
            if self._changed.get(workload) is changed:
                del self._changed[workload]

    async def _settle(self, workload: str, changed: asyncio.Event) -> None:
        """Once: end what is not wanted, then run what is, until it ends or something else is wanted."""
        entries = self._wanted.get(workload, [])
        wanted = max((entry for entry in entries if entry["wanted"] == RUNNING), key=lambda entry: int(entry["epoch"]), default=None)
        may = self._may.get(f"{workload}/{wanted['epoch']}") if wanted is not None else None
        for status in await self._driver.instances():
            if status.key.id != workload:
                continue
            leaves = wanted is None or status.key.epoch != wanted["epoch"] or status.leased != (may is not None)
            if wanted is not None and not leaves and may is not None and status.phase is Phase.ENDED:
                self._finished(wanted, status)
            elif leaves or (may is not None and (not may or status.phase is Phase.LOST)):
                await self._driver.stop(status.key, GRACE_S)
                await self._driver.delete(status.key)
                self._tidy()
        for entry in entries:
            if entry["wanted"] == STOPPED:
                self._say(entry, "stopped", "")
            elif entry is not wanted:
                self._say(entry, "refused", f"epoch {wanted['epoch'] if wanted else 0} of it is wanted here too")
        if wanted is not None and "refusal" in wanted:
            self._say(wanted, "refused", str(wanted["refusal"]))
        if wanted is not None and may is not False and self._told.get(_said(wanted)) not in ENDS:
            await self._run(wanted, changed)

    async def _run(self, entry: Mapping[str, Any], changed: asyncio.Event) -> None:
        key = Key(entry["id"], int(entry["epoch"]))
        self._say(entry, "accepted", "")
        try:
            status = await self._begin(key, entry)
        except DriverError as error:
            self._errors()
            await self._driver.delete(key)
            self._say(entry, "refused" if isinstance(error, Refused) else "failed", str(error))
            return
        if status.phase in (Phase.RUNNING, Phase.PAUSED):
            self._say(entry, "running", status.reason)
            status = await self._until(key, changed) or status
        if status.phase is Phase.LOST and status.leased:
            raise Failed(WHEN_CUT_OFF, status.reason, "see whether the site's bus is there; it begins anew when it is this node's again")
        else:
            self._finished(entry, status)

    def _finished(self, entry: Mapping[str, Any], status: Status) -> None:
        if status.phase is Phase.LOST:
            self._say(entry, "failed", status.reason)
        elif status.phase is Phase.ENDED:
            self._say(entry, "done" if status.exit is not None and status.exit.code == 0 else "failed", status.reason)

    async def _begin(self, key: Key, entry: Mapping[str, Any]) -> Status:
        try:
            return await self._driver.start(key)  # what is on the disk, from an earlier agent too
        except Refused as error:
            if error.field != "id":
                raise
        if entry.get("gpus"):
            raise Refused("gpus", "this driver cannot give a container GPU devices", "place it on a node whose driver can")
        document = entry.get("document") or {}
        image = str(entry.get("image") or document.get("image") or "")
        await self._bring(image)
        spec = document.get("spec") or {}
        if not isinstance(spec, dict):
            raise Refused("spec", "is not an object", "see what a container's spec has")
        requests = {name: amount for name, amount in (entry.get("requests") or {}).items() if isinstance(amount, int)}
        leased = f"{key.id}/{key.epoch}" in self._may
        if leased and not isinstance(self._driver, Leases):
            raise Refused(WHEN_CUT_OFF, "this driver cannot end what it runs by itself", "let it stay, or place it on a node whose driver can")
        await self._driver.prepare(Order(key, image, requests, spec, leased))
        self._tidy()  # only now: what is prepared stands on its image, and keeps it
        return await self._driver.start(key)

    async def _until(self, key: Key, changed: asyncio.Event) -> Status | None:
        """How it ended; None where something else is wanted first."""
        end, other = asyncio.ensure_future(self._driver.wait(key)), asyncio.ensure_future(changed.wait())
        try:
            await asyncio.wait((end, other), return_when=asyncio.FIRST_COMPLETED)
            return end.result() if end.done() else None
        finally:
            for waiting in (end, other):
                waiting.cancel()
            await asyncio.gather(end, other, return_exceptions=True)

    def _say(self, entry: Mapping[str, Any], state: str, reason: str) -> None:
        """Once each, nothing after an end, and nothing of what is not listed any more."""
        key, order = _said(entry), ("accepted", "running", *ENDS)
        if all(_said(listed) != key for listed in self._wanted.get(entry["id"], ())):
            return
        before = self._told.get(key)
        if before in ENDS or (before is not None and order.index(state) <= order.index(before)):
            return
        self._told[key] = state
        body = {"id": entry["id"], "epoch": entry["epoch"], "state": state, "reason": reason[:1000]}
        if not entry.get("for"):
            self._journal.append("event", "workload", body)
        elif state not in ("accepted", "refused"):  # before it runs here it is nobody's but the site's: a sibling may have it next
            self._journal.append("event", "workload", {**body, "for": entry["for"], "fence": entry["fence"]})
        self._journal.put_state(REPORTED, dict(self._told))
        self._on_said()


def _said(entry: Mapping[str, Any]) -> str:
    return f"{entry['id']}/{entry['epoch']}/{entry['wanted']}"
