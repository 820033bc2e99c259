"""Makes what runs on this node what desired state says, by a driver: one task for each workload, which goes by what is on the disk, never by what it remembers.

A workload's epochs are instances of their own, and no epoch starts before the earlier ones have ended here. What is not wanted is stopped and removed, by the driver on whose disk it is: what shall
stop does not say its kind. What has ended is started again where its document says so (`restarts`), else it stays on the disk, with its output, until desired state does not list it any more.
What was said of a placement is said once, also over restarts of the agent (`REPORTED`), which forget no tries (`TRIES`).

Operations (`operations`, `checkpoints`) are carried out by the workload's task between two other things that it does, so nothing else is done with the workload meanwhile. What a checkpoint has ended is
checkpointed: it is not started again by itself, and neither done nor failed; it waits for its restore, or for not being wanted any more.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ..contract.workloads import (
    AS_CONTAINER,
    CHECKPOINTED,
    CONVERT,
    CONVERTS,
    DELETE_SNAPSHOT,
    ISOLATION,
    ISOLATIONS,
    LIVE,
    MOVE_BACK,
    MOVE_COME,
    MOVE_ROOM,
    NAMESPACES,
    RUNNING,
    SNAPSHOT,
    STOPPED,
    WHEN_CUT_OFF,
)
from .checkpoints import Checkpointing
from .converting import convert
from .drivers.checkpoint_state import read_manifest
from .drivers.face import Ability, Checkpoints, Driver, DriverError, Failed, Key, Leases, Lives, Order, Phase, Refused, Status
from .restarts import KEYS, STABLE_MS, Policy, pause_s, policy, succeeded, when_to_pull

if TYPE_CHECKING:
    from .snapshots import Snapshotting

log = logging.getLogger(__name__)

REPORTED = "workload_reports"
"""The journal's state document that keeps what was said last of each placement."""

TRIES = "workload_tries"
"""The journal's state document that keeps of each placement its restarts in a row (`tries`), when the present run began and when the first one did (`began_ms`, `first_ms`; ms since 1970). Written
before a restart: one that a kill interrupts counts as a try."""

SAID_FORMS = "workload_forms"
"""The journal's state document that keeps of each placement that can be converted what was said last that it is."""

GRACE_S = 10.0
"""Between being asked to end and being killed: what Docker gives."""

AGAIN_S = 15.0
"""After an operation that failed (a process that cannot be killed, a disk that fails) it is tried again."""

LOOK_S, LOOKS = 0.25, 600
"""Pause between two looks at a start that an earlier agent began, and their number: what a driver gives a start at most (150 s)."""

ENDS = ("refused", "stopped", "done", "failed")


class Journal(Protocol):
    """What is needed of the journal."""

    def append(self, stream: str, kind: str, body: dict[str, Any]) -> Any:
        """One record."""

    def state(self, key: str) -> Any:
        """A kept document."""

    def put_state(self, key: str, value: Any, on_durable: Callable[[], None] | None = None) -> None:
        """Keep a document, in one group with the records before it."""


class Runner:
    """The workloads of this node.

    Args:
        drivers: by name; what is on the disk of any of them is seen to.
        bring: takes the image of a reference into the store where it can, and says which driver runs a workload of this kind (or isolation) from it; raises `DriverError`. Called with kind,
            reference and when to ask a registry (`pull`). It may take minutes, and is cancelled where something else is wanted meanwhile.
        tidy: called when something may have become too much: an image came, or an instance went.
        errors: counts what failed.
        said: called when something was said.
        short: why nothing new can be taken, empty where it can.
        leaves: called before what has ended is removed.
        checkpoints: carries out operations; None: there are none.
        snapshots: carries out those on snapshots.
    """

    def __init__(
        self, drivers: Mapping[str, Driver], journal: Journal, bring: Callable[[str, str, str], Awaitable[str]], tidy: Callable[[], Any], errors: Callable[[], None],
        said: Callable[[], None] = lambda: None, short: Callable[[], str] = lambda: "", leaves: Callable[[Driver, Status], Awaitable[None]] | None = None,
        checkpoints: Checkpointing | None = None, snapshots: "Snapshotting | None" = None,
    ) -> None:
        self._short = short
        self._evicted: dict[str, str] = {}
        """What is ended for want of room, to why; until that has been said."""
        self._drivers, self._journal, self._bring, self._tidy, self._errors, self._on_said = drivers, journal, bring, tidy, errors, said
        self._leaves, self._checkpoints, self._snapshots = leaves, checkpoints, snapshots
        self._asked: dict[str, dict[str, Mapping[str, Any]]] = {}
        """Operations that wait, by workload and id."""
        self._began_to_tend = False
        self._wanted: dict[str, list[Mapping[str, Any]]] = {}
        self._may: Mapping[str, bool] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed: dict[str, asyncio.Event] = {}
        told = journal.state(REPORTED)
        self._told: dict[str, str] = {key: state for key, state in told.items() if isinstance(state, str)} if isinstance(told, dict) else {}
        tries = journal.state(TRIES)
        self._tries: dict[str, dict[str, int]] = {key: dict(row) for key, row in tries.items() if isinstance(row, dict)} if isinstance(tries, dict) else {}
        forms = journal.state(SAID_FORMS)
        self._forms: dict[str, str] = {key: form for key, form in forms.items() if isinstance(form, str)} if isinstance(forms, dict) else {}
        self._due: dict[str, float] = {}
        self._taking: dict[str, float] = {}
        """When the next checkpoint that nobody asks for is due; times of the loop."""
        self._coming: frozenset[tuple[str, int]] = frozenset()
        """What waits here for a workload that comes while it runs (id and epoch), which is not wanted here yet."""
        self._going_on: set[str] = set()
        """What is brought back from one: once for each time that it is lost."""

    async def take(self, entries: Iterable[Mapping[str, Any]], may: Mapping[str, bool] | None = None) -> None:
        """From now on these are wanted, and nothing else. Returns at once; the tasks see to it.

        `may`: of those (`id/epoch`) that run on a lease whether they may run here now. One that may not is ended, and nothing is said of that: it is wanted still.
        """
        wanted: dict[str, list[Mapping[str, Any]]] = {}
        for entry in entries:
            wanted.setdefault(entry["id"], []).append(entry)
        there = {status.key.id for driver in self._drivers.values() for status in await driver.instances()} | (await self._checkpoints.workloads() if self._checkpoints is not None else set())
        self._began_to_tend = True
        self._wanted, self._may = wanted, dict(may or {})
        listed = {_said(entry) for those in wanted.values() for entry in those}
        if not listed.issuperset(self._told):
            self._told = {key: state for key, state in self._told.items() if key in listed}
            self._journal.put_state(REPORTED, dict(self._told))
        if not listed.issuperset(self._forms):
            self._forms = {key: form for key, form in self._forms.items() if key in listed}
            self._journal.put_state(SAID_FORMS, dict(self._forms))
        self._forget_tries(set(self._tries) - listed)
        self._taking = {key: at for key, at in self._taking.items() if key in listed}
        self._going_on &= listed
        self._evicted = {key: why for key, why in self._evicted.items() if key in listed}
        for workload in {*wanted, *there, *self._tasks, *self._asked}:
            self._wake(workload)

    def _wake(self, workload: str) -> None:
        self._changed.setdefault(workload, asyncio.Event()).set()
        if workload not in self._tasks:
            self._tasks[workload] = asyncio.create_task(self._tend(workload), name=f"workload {workload}")

    def operate(self, asked: Mapping[str, Any]) -> None:
        """Have an operation carried out, an entry of `spec.operations`. Returns at once; what became of it is told by `operations`. None is begun before it is known what is wanted here."""
        self._asked.setdefault(asked["workload"], {})[asked["id"]] = asked
        if self._began_to_tend:
            self._wake(asked["workload"])

    def expect(self, coming: Collection[tuple[str, int]]) -> None:
        """Id and epoch of those that shall be waited for here: what waits for another one goes."""
        gone, self._coming = {workload for workload, epoch in self._coming.difference(coming)}, frozenset(coming)
        for workload in gone:
            if self._began_to_tend:
                self._wake(workload)

    async def ended(self, workload: str) -> None:
        """Until nothing of a workload is under way or runs, where nothing of it may."""
        while (task := self._tasks.get(workload)) is not None:
            await asyncio.wait((task,))

    async def running(self) -> list[tuple[Mapping[str, Any], Driver]]:
        """Entries that run here and may be ended for want of room: those that are not the site's, which has a say of its own."""
        found = []
        for driver in self._drivers.values():
            for status in await driver.instances():
                entry = next((one for one in self._wanted.get(status.key.id, ()) if one["epoch"] == status.key.epoch and one["wanted"] == RUNNING), None)
                if entry is not None and status.phase is Phase.RUNNING and not status.leased and _said(entry) not in self._evicted:
                    found.append((entry, driver))
        return found

    def evict(self, entry: Mapping[str, Any], why: str) -> None:
        """End one that runs, then say that it was refused: the hub places it elsewhere, and not before it has ended here. Returns at once."""
        changed = self._changed.get(entry["id"])
        if changed is not None:
            self._evicted[_said(entry)] = why
            changed.set()

    def ends(self) -> dict[str, str]:
        """`id/epoch` to how it ended, of what is listed."""
        return {key.removesuffix(f"/{RUNNING}"): state for key, state in self._told.items() if state in ENDS and key.endswith(f"/{RUNNING}")}

    async def close(self) -> None:
        """Let go; what runs goes on, and what is asked for from now on is for the next agent."""
        self._began_to_tend = False
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
        for driver in self._drivers.values():
            for status in await driver.instances():
                if status.key.id != workload or ((workload, status.key.epoch) in self._coming and not any(one["epoch"] == status.key.epoch and one["wanted"] == STOPPED for one in entries)):
                    continue
                leaves = wanted is None or status.key.epoch != wanted["epoch"] or status.leased != (may is not None) or _said(wanted) in self._evicted or "refusal" in wanted
                if wanted is not None and not leaves and may is False and status.phase is Phase.ENDED:
                    self._ended_alone(wanted, status)
                elif leaves or may is False or (may is not None and status.phase is Phase.LOST):
                    ended = await driver.stop(status.key, GRACE_S)
                    if self._leaves is not None:
                        await self._leaves(driver, ended)
                    await driver.delete(status.key)
                    self._tidy()
        await self._operate(workload, wanted)
        if wanted is None and self._checkpoints is not None:
            await self._checkpoints.forget(workload)
        for entry in entries:
            if entry["wanted"] == STOPPED:
                self._say(entry, "stopped", "")
            elif entry is not wanted:
                self._say(entry, "refused", f"epoch {wanted['epoch'] if wanted else 0} of it is wanted here too")
        if wanted is not None and (why := self._evicted.pop(_said(wanted), None)) is not None:
            self._say(wanted, "refused", why)
            self._forget_tries({_said(wanted)})
        if wanted is not None and "refusal" in wanted:
            self._say(wanted, "refused", str(wanted["refusal"]))
        if wanted is not None and may is not False and self._told.get(_said(wanted)) not in ENDS:
            await self._run(wanted, changed)

    async def _operate(self, workload: str, wanted: Mapping[str, Any] | None) -> None:
        """Carry out what is asked, one after the other."""
        waiting = self._asked.get(workload, {})
        while waiting:
            asked = next(iter(waiting.values()))
            assert self._checkpoints is not None  # nobody else asks
            operations = self._checkpoints.operations
            try:
                if asked["kind"] == MOVE_ROOM and self._checkpoints.moves is not None:
                    operations.end(asked["id"], "succeeded", "", await self._checkpoints.moves.room(asked, self._bring, self._drivers, self._short()))
                    del waiting[asked["id"]]
                    continue
                if asked["kind"] == MOVE_COME and self._checkpoints.moves is not None:
                    if (workload, int(asked["epoch"])) not in self._coming:
                        raise Refused("move", "nobody waits for it any more", "see the hub's moves")
                    await self._checkpoints.moves.come(asked, self._bring, self._drivers, self._short())
                    operations.end(asked["id"], "succeeded")
                    del waiting[asked["id"]]
                    continue
                if wanted is None or wanted["epoch"] != asked["epoch"] or self._told.get(_said(wanted)) in ENDS:
                    raise Refused("workload", f"{workload} of epoch {asked['epoch']} is not here, or has ended", "see where it is; ask again")
                driver, status = await self._there(Key(workload, int(asked["epoch"])))
                held = self._told.get(_said(wanted)) == CHECKPOINTED or (status is not None and status.phase is Phase.CHECKPOINTED)
                clears = partial(self._say, wanted, CHECKPOINTED, "it is being restored")  # from here on it is nothing that could be started anew, also where its instance is gone
                detail: dict[str, Any] | None
                if asked["kind"] == CONVERT:
                    detail = await convert(asked, operations, driver, status)
                elif asked["kind"] in (SNAPSHOT, DELETE_SNAPSHOT):
                    assert self._snapshots is not None  # there wherever checkpoints are
                    detail = await self._snapshots.carry_out(asked, driver, status)
                else:
                    detail = await self._checkpoints.carry_out(asked, self._drivers, driver, status, held, clears)
                    if asked["kind"] == MOVE_BACK:
                        await self._stands_no_more(wanted)
            except DriverError as error:
                operations.end(asked["id"], "failed", str(error))
            except Exception as error:
                log.exception("operation %s of workload %s", asked["id"], workload)
                operations.end(asked["id"], "failed", f"it could not be done ({type(error).__name__}); see the agent's log")
            else:
                if detail is not None:  # else it ends by itself
                    operations.end(asked["id"], "succeeded", "", detail)
            del waiting[asked["id"]]
        self._asked.pop(workload, None)

    async def _stands_no_more(self, entry: Mapping[str, Any]) -> None:
        """It is this node's again, and nothing of it stands in a state: what was said of that holds no longer, also where it has ended meanwhile."""
        _, status = await self._there(Key(entry["id"], int(entry["epoch"])))
        if self._told.get(_said(entry)) == CHECKPOINTED and (status is None or status.phase is not Phase.CHECKPOINTED):
            self._told[_said(entry)] = "accepted"
            self._journal.put_state(REPORTED, dict(self._told))

    async def _there(self, key: Key) -> tuple[Driver | None, Status | None]:
        """On whose disk an instance is, and how it stands."""
        for driver in self._drivers.values():
            try:
                return driver, await driver.status(key)
            except Refused:
                continue
        return None, None

    async def _run(self, entry: Mapping[str, Any], changed: asyncio.Event) -> None:
        key, said = Key(entry["id"], int(entry["epoch"])), _said(entry)
        self._say(entry, "accepted", "")
        while True:
            try:
                spec = _spec(entry)
                how = policy(str(entry["kind"]), spec)
                _, there = await self._there(key)
                if _stands(there, bool(entry.get("held"))) if there is not None else self._told.get(said) == CHECKPOINTED or entry.get("held"):
                    self._say(entry, CHECKPOINTED, there.reason if there is not None else "")
                    if await _changes(changed, self._left_s(said, how)):
                        return
                    self._late(entry, how)
                    return
                begun = await (self._begin_from(key, entry) if self._comes(entry) else self._begin(key, entry, spec, changed))
                if begun is None:
                    return
                driver, status = begun
            except DriverError as error:
                self._errors()
                await self._remove(key)
                await self._has_come(entry)
                if isinstance(error, Refused) or self._told.get(said) != "running":
                    self._say(entry, "refused" if isinstance(error, Refused) else "failed", str(error))
                    return
                status = Status(key, Phase.LOST, reason=str(error))  # it ran here before: this was one more try
            else:
                if status.phase in (Phase.RUNNING, Phase.PAUSED):
                    self._began(said, how, status)
                    self._say(entry, "running", status.reason, status.load_ms, status.still_ms)
                    if entry.get("from") and await _unless(changed, self._kept()) is not None:
                        await self._has_come(entry)
                    self._say_form(entry, status)
                    self._going_on.discard(said)
                    ended = await self._until(driver, key, changed, await self._next_s(key, said, how))
                    if ended is None:
                        if changed.is_set():
                            return
                        if self._left_s(said, how) != 0.0:
                            assert self._checkpoints is not None
                            self._taking[said] = asyncio.get_running_loop().time() + how.checkpoint_s
                            self._checkpoints.take_one(key)
                            continue
                        await driver.stop(key, GRACE_S)
                        self._late(entry, how)
                        return
                    status = ended
                    if _stands(status, bool(entry.get("held"))):
                        continue
                if status.leased and status.phase is Phase.LOST:
                    raise Failed(WHEN_CUT_OFF, status.reason, "see whether the site's bus is there; it begins anew when it is this node's again")
            if status.phase is Phase.LOST and not status.leased and await self._goes_on(key, said, how):
                await changed.wait()
                return
            if not await self._again(entry, how, status, changed):
                return
            await self._remove(key)

    async def _next_s(self, key: Key, said: str, how: Policy) -> float | None:
        """Seconds until its deadline, or until its next checkpoint; None: it has neither."""
        left_s = self._left_s(said, how)
        if not how.checkpoint_s or self._checkpoints is None:
            return left_s
        now = asyncio.get_running_loop().time()
        if said not in self._taking:
            self._taking[said] = now + await self._checkpoints.due_s(key.id, how.checkpoint_s)
        due_s = max(0.0, self._taking[said] - now)
        return due_s if left_s is None else min(left_s, due_s)

    async def _goes_on(self, key: Key, said: str, how: Policy) -> bool:
        """Whether what was lost is brought back from its newest checkpoint; tried once, then it is as if there were none."""
        if self._checkpoints is None or not how.checkpoint_s or (said in self._going_on and not self._checkpoints.operations.under_way(key.id)):
            return False
        self._going_on.add(said)
        return await self._checkpoints.goes_on(key)

    def _late(self, entry: Mapping[str, Any], how: Policy) -> None:
        self._say(entry, "failed", f"its deadline of {how.deadline_s:g} s has passed")
        self._forget_tries({_said(entry)})

    def _ended_alone(self, entry: Mapping[str, Any], status: Status) -> None:
        """It had ended by itself before it was another's: told, unless it would be started again."""
        if not policy(str(entry["kind"]), _spec(entry)).again(status, self._tries.get(_said(entry), {}).get("tries", 0)):
            self._say(entry, "done" if succeeded(status) else "failed", status.reason)

    async def _again(self, entry: Mapping[str, Any], how: Policy, ended: Status, changed: asyncio.Event) -> bool:
        """Whether it shall be started again now that it has ended, and its pause is over."""
        said = _said(entry)
        row = self._tries.get(said, {})
        tries = row.get("tries", 0)
        if ended.exit is not None and ended.exit.at_ms - row.get("began_ms", ended.exit.at_ms) >= STABLE_MS:
            tries = 0
        left_s = self._left_s(said, how)
        if not how.again(ended, tries) or (left_s is not None and left_s <= pause_s(tries)):
            if ended.phase in (Phase.ENDED, Phase.LOST):
                after = f" (after {tries} restart{'s' * (tries > 1)})" if tries else ""
                self._say(entry, "done" if succeeded(ended) else "failed", ended.reason + after if ended.reason else "")
                self._forget_tries({said})
            return False
        loop = asyncio.get_running_loop()
        due = self._due.setdefault(said, loop.time() + pause_s(tries))  # what else is wanted of this workload meanwhile does not put it off
        try:
            async with asyncio.timeout_at(due):
                await changed.wait()
            return False
        except TimeoutError:
            pass
        del self._due[said]
        self._tries[said] = {**row, "tries": tries + 1}
        self._journal.append("event", "workload.restart", {"id": entry["id"], "epoch": entry["epoch"], "tries": tries + 1, "reason": ended.reason[:1000]})
        self._journal.put_state(TRIES, dict(self._tries))
        return True

    def _began(self, said: str, how: Policy, status: Status) -> None:
        """Keep when it began, where that will be asked for: once for each run."""
        row = self._tries.get(said, {})
        if (how.restart == "never" and not how.deadline_s) or row.get("run") == status.pid:
            return
        now = int(time.time() * 1000)
        self._tries[said] = {"tries": row.get("tries", 0), "began_ms": now, "first_ms": row.get("first_ms", now), "run": status.pid}
        self._journal.put_state(TRIES, dict(self._tries))

    def _left_s(self, said: str, how: Policy) -> float | None:
        """Seconds until its deadline; None: it has none."""
        first = self._tries.get(said, {}).get("first_ms")
        return max(0.0, how.deadline_s - (time.time() - first / 1000)) if how.deadline_s and first is not None else None

    def _forget_tries(self, said: Iterable[str]) -> None:
        gone = [key for key in said if self._tries.pop(key, None) is not None]
        for key in said:
            self._due.pop(key, None)
        if gone:
            self._journal.put_state(TRIES, dict(self._tries))

    async def _remove(self, key: Key) -> None:
        for driver in self._drivers.values():
            await driver.delete(key)

    async def _begin(self, key: Key, entry: Mapping[str, Any], spec: Mapping[str, Any], changed: asyncio.Event) -> tuple[Driver, Status] | None:
        """What runs it, and how it stands; None where something else is wanted before its image is here."""
        driver, _ = await self._there(key)
        if driver is not None:
            return driver, await _started(driver, key)  # what is on the disk, from an earlier agent too
        if short := self._short():
            raise Refused("node", short, "place it on another node")
        if entry.get("gpus"):
            raise Refused("gpus", "there is no driver here that can give a workload GPU devices", "place it on a node whose driver can")
        image = str(entry.get("image") or (entry.get("document") or {}).get("image") or "")
        isolation = spec.get(ISOLATION, NAMESPACES) if entry["kind"] in ("container", "batch") else NAMESPACES
        if isolation not in ISOLATIONS:
            raise Refused(f"spec.{ISOLATION}", f"{str(isolation)[:40]!r} is unknown", f"use one of {', '.join(ISOLATIONS)}")
        converts = spec.get(CONVERTS, False)
        if not isinstance(converts, bool):
            raise Refused(f"spec.{CONVERTS}", f"{str(converts)[:40]!r} is neither true nor false", "say true or false")
        if converts and (isolation != NAMESPACES or entry["kind"] not in ("container", "batch")):
            raise Refused(f"spec.{CONVERTS}", f"is not for a {entry['kind']} with isolation {isolation}", f"use kind container or batch, without {ISOLATION}")
        name = await _unless(changed, self._bring(CONVERTS if converts else str(entry["kind"]) if isolation == NAMESPACES else isolation, image, when_to_pull(spec)))
        if name is None:
            return None
        driver = self._drivers[name]
        if spec.get("checkpoint") is not None:
            if not isinstance(driver, Checkpoints):
                raise Refused("spec.checkpoint", f"the driver {name} takes no states", "leave it out, or run it as a container")
            driver.demand(Ability.CHECKPOINT)
        spec = {name: value for name, value in spec.items() if name not in (*KEYS, CONVERTS) and not (name == ISOLATION and entry["kind"] in ("container", "batch"))}
        if entry["kind"] == "function" and name == "container":
            from .drivers.function_container import container

            spec = container(spec)
        requests = {name: amount for name, amount in (entry.get("requests") or {}).items() if isinstance(amount, int)}
        leased = f"{key.id}/{key.epoch}" in self._may
        if leased and not isinstance(driver, Leases):
            raise Refused(WHEN_CUT_OFF, "this driver cannot end what it runs by itself", "let it stay, or place it on a node whose driver can")
        await driver.prepare(Order(key, image, requests, spec, entry["kind"] == "batch", leased))
        self._tidy()  # only now: what is prepared stands on its image, and keeps it
        return driver, await _started(driver, key)

    def _comes(self, entry: Mapping[str, Any]) -> bool:
        """It is to go on from a state that has come, and has not yet been seen to."""
        return bool(entry.get("from")) and self._told.get(_said(entry)) in (None, "accepted")

    async def _begin_from(self, key: Key, entry: Mapping[str, Any]) -> tuple[Driver, Status]:
        """What runs it from the state that has come with it, and how it stands. Raises `Refused`: then nothing of it has been seen to live here, and its source may have it again."""
        from .moves import begin_from, let_go

        if self._checkpoints is None or self._checkpoints.moves is None:
            raise Refused("from", "this node takes in no states", "see workloads.moves_hub")
        if f"{key.id}/{key.epoch}" in self._may:
            raise Refused("from", "it runs only as long as its site says (when_cut_off: move)", "let its site run it")
        driver, status = await self._there(key)
        if entry["from"].get(LIVE) is True:
            return await let_go(driver, key)
        if isinstance(driver, Lives) and driver.waits(key):  # for what did not come so
            await driver.delete(key)
            driver = status = None
        try:
            path = await asyncio.to_thread(self._checkpoints.moves.came, key.id, str(entry["from"].get("move")), str(entry["from"].get("root")))
        except OSError as error:
            if status is not None:
                raise
            raise Refused("disk", f"its state could not be laid out: {error.strerror}", "free space, or move it to another node") from None  # nothing of it has run here: its source has it again
        if driver is None:
            driver = self._drivers.get(str((await asyncio.to_thread(read_manifest, path)).get("kind")))
        if driver is None:
            raise Refused("from", "there is no driver here that brings such a state back", "move it to a node with CRIU")
        return driver, await begin_from(driver, key, status, path, self._checkpoints.output(key.id))

    async def _kept(self) -> str:
        """Until all that was said is durable. A state that came goes only then: an agent that found neither it nor that it had been said to run would refuse what runs, and its source would go on from too early."""
        durable = asyncio.get_running_loop().create_future()
        self._journal.put_state(REPORTED, dict(self._told), lambda: durable.set_result("kept") if not durable.done() else None)
        return str(await durable)

    async def _has_come(self, entry: Mapping[str, Any]) -> None:
        """What became of a state that came has been said and kept, or nothing is left of it here, and that is said next: nothing of its way is needed any more."""
        if entry.get("from") and self._checkpoints is not None and self._checkpoints.moves is not None:
            await asyncio.to_thread(self._checkpoints.moves.settled, entry["id"], str(entry["from"].get("move")))

    async def _until(self, driver: Driver, key: Key, changed: asyncio.Event, left_s: float | None) -> Status | None:
        """How it ended; None where something else is wanted first, or `left_s` seconds have passed."""
        end, other = asyncio.ensure_future(driver.wait(key)), asyncio.ensure_future(changed.wait())
        try:
            await asyncio.wait((end, other), return_when=asyncio.FIRST_COMPLETED, timeout=left_s)
            return end.result() if end.done() else None
        finally:
            for waiting in (end, other):
                waiting.cancel()
            await asyncio.gather(end, other, return_exceptions=True)

    def _say_form(self, entry: Mapping[str, Any], status: Status) -> None:
        """What one that can be converted is, where that is news; a container goes without saying."""
        key = _said(entry)
        if status.form == self._forms.get(key, AS_CONTAINER if status.form else "") or all(_said(listed) != key for listed in self._wanted.get(entry["id"], ())):
            return
        self._forms[key] = status.form
        self._journal.append("event", "workload", {"id": entry["id"], "epoch": entry["epoch"], "state": RUNNING, "reason": status.reason[:1000], "form": status.form})
        self._journal.put_state(SAID_FORMS, dict(self._forms))
        self._on_said()

    def _say(self, entry: Mapping[str, Any], state: str, reason: str, load_ms: float = 0.0, still_ms: float = 0.0) -> None:
        """Once each (but what was checkpointed runs again), nothing after an end, and nothing of what is not listed any more."""
        key = _said(entry)
        if all(_said(listed) != key for listed in self._wanted.get(entry["id"], ())):
            return
        before = self._told.get(key)
        if before in ENDS or before == state or (before is not None and state == "accepted"):
            return
        self._told[key] = state
        body = {"id": entry["id"], "epoch": entry["epoch"], "state": state, "reason": reason[:1000], **({"load_ms": load_ms} if load_ms else {}), **({"still_ms": still_ms} if still_ms else {})}
        if not entry.get("for"):
            self._journal.append("event", "workload", body)
        elif state not in ("accepted", "refused"):  # before it runs here it is nobody's but the site's: a sibling may have it next
            self._journal.append("event", "workload", {**body, "for": entry["for"], "fence": entry["fence"]})
        self._journal.put_state(REPORTED, dict(self._told))
        self._on_said()


async def _unless(changed: asyncio.Event, doing: Awaitable[str]) -> str | None:
    """What comes of it; None, and it is cancelled, where something changes first."""
    done, other = asyncio.ensure_future(doing), asyncio.ensure_future(changed.wait())
    try:
        await asyncio.wait((done, other), return_when=asyncio.FIRST_COMPLETED)
        return done.result() if done.done() else None
    finally:
        for waiting in (done, other):
            waiting.cancel()
        await asyncio.gather(done, other, return_exceptions=True)


async def _changes(changed: asyncio.Event, left_s: float | None) -> bool:
    """Whether something else is wanted before so many seconds have passed."""
    try:
        async with asyncio.timeout(left_s):
            await changed.wait()
    except TimeoutError:
        return False
    return True


def _stands(there: Status, held: bool) -> bool:
    """Whether what is there is not begun anew: it stands in a checkpoint, or has ended while another node may be going on with it."""
    return there.phase is Phase.CHECKPOINTED or (held and there.phase in (Phase.ENDED, Phase.LOST))


def _said(entry: Mapping[str, Any]) -> str:
    return f"{entry['id']}/{entry['epoch']}/{entry['wanted']}"


async def _started(driver: Driver, key: Key) -> Status:
    """Start it. Where an earlier agent, which was killed, had begun that, it is still under way: it is waited for, and not done twice."""
    for _ in range(LOOKS):
        status = await driver.start(key)
        if status.phase is not Phase.PREPARED:
            return status
        await asyncio.sleep(LOOK_S)
    raise Failed("start", "its start, which an earlier agent began, does not come to an end", "look at the node; it is removed now")


def _spec(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    spec = (entry.get("document") or {}).get("spec") or {}
    if not isinstance(spec, dict):
        raise Refused("spec", "is not an object", "see what a workload's spec has")
    return spec
