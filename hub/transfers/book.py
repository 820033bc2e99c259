"""The book of transfers: a state machine. Pure: no clock, no input or output.

A transfer has two sides, each a task for the worker that its document names: the receiver first; once that says where it listens, the sender. A worker works on a task by a lease, which each
report renews and which has an epoch: whoever comes with an older one is told to stop. A lease that ran out is given anew, to the same worker (the bytes are there), which takes up what has
arrived. So a task is worked on by one process at most, as far as its worker obeys, and for the rest the engine's journal and its one commit see to it that the destination is whole or absent.

A transfer of a stream (`stream` in its document, which the hub's own moves set and no user) carries connections between two nodes, and what has gone over cannot be taken up again: once it is not held any more, each side is given
once, and it has failed with either side, or with its lease. It is done when the sender says so.

    queued -> moving -> done | failed | cancelled
"""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from edge_runtime.contract.errors import ContractError

LEASE_MS = 30_000
"""A worker that says nothing for so long is held for dead. Its reports come every few seconds."""
TRIES_MOST = 6
"""Times that a side may fail in passing, one after the other without progress, before the transfer has failed."""
AGAIN_MS = (1_000, 60_000)
"""Between two tries, at first and at most; doubled."""
LIVE_MOST = 1_000
"""Transfers that are not over."""
KEPT_MOST = 5_000
"""Transfers that are over and remembered, the newest: some megabytes."""
WORKERS_MOST = 10_000
"""Workers that are remembered: as many as a hub has edges."""
NEVER_MS = (1 << 53) - 1
"""A time that does not come, and that every reader of JSON reads as it is."""
FINAL = ("done", "failed", "cancelled")
SIDES = ("receive", "send")


class Contradicts(ContractError):
    """It contradicts what stands."""


@dataclass(slots=True)
class Side:
    """One end's task. Times are the hub's wall milliseconds."""

    worker: str
    epoch: int = 0
    until_ms: int = 0
    """End of the lease; 0: none."""
    tries: int = 0
    after_ms: int = 0
    """Not to be leased before."""


@dataclass(slots=True)
class Transfer:
    """One transfer. `key` is what its two ends authenticate each other with; it is forgotten when the transfer is over."""

    document: dict[str, Any]
    created_ms: int
    key: str
    state: str = "queued"
    reason: str = ""
    changed_ms: int = 0
    address: str = ""
    root: str = ""
    receive: Side = field(default_factory=lambda: Side(""))
    send: Side = field(default_factory=lambda: Side(""))
    progress: dict[str, Any] = field(default_factory=dict)
    prediction: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    held: bool = False
    """What is sent is not there yet: its receiver is made ready, its sender waits (`let_go`)."""

    @property
    def id(self) -> str:
        """Its name."""
        return str(self.document["id"])

    @property
    def live(self) -> bool:
        """It is not over."""
        return self.state not in FINAL

    @property
    def once(self) -> bool:
        """It is a stream's, and something may have been carried: nothing of it is given anew."""
        return bool(self.document.get("stream")) and not self.held

    def side(self, name: str) -> Side:
        """`receive` or `send`."""
        return self.receive if name == "receive" else self.send

    def to_json(self) -> dict[str, Any]:
        """All of it, for the store."""
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Transfer":
        """From the store. Raises TypeError, KeyError where it is none."""
        return cls(**{**told, "receive": Side(**told["receive"]), "send": Side(**told["send"])})


@dataclass(slots=True)
class Worker:
    """What is known of a worker."""

    name: str
    seen_ms: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def task_of(transfer: str, side: str) -> str:
    """A task's name."""
    return f"{transfer}/{side}"


class Book:
    """Every transfer and worker. What changed and must be kept is in `changed`, by id, until `taken`."""

    def __init__(self, transfers: Iterable[Transfer] = (), *, key: Callable[[], str] = lambda: secrets.token_hex(32)) -> None:
        self.transfers = {one.id: one for one in transfers}
        self.workers: dict[str, Worker] = {}
        self.changed: dict[str, Transfer | None] = {}
        self._key = key
        self._asked_ms: int | None = None
        """When a worker asked for the last time."""
        self._since_ms = 0
        """Since when they do without a pause."""

    # -- what users ask ------------------------------------------------------------------------------------------------------

    def submit(self, document: dict[str, Any], now: int, held: bool = False) -> Transfer:
        """A checked document; `held`: its sender waits until it is let go. The same again is answered as it stands. Raises Contradicts."""
        known = self.transfers.get(document["id"])
        if known is not None:
            if known.document != document:
                raise Contradicts("id", f"{known.id!r} is another transfer", "use a new id", "contradicts")
            return known
        if sum(one.live for one in self.transfers.values()) >= LIVE_MOST:
            raise Contradicts("transfers", f"{LIVE_MOST} are not over yet", "wait, or cancel some", "limit")
        for one in self.transfers.values():
            if one.live and one.document["destination"] == document["destination"]:
                raise Contradicts("destination", f"{one.id!r} is on its way there", "cancel it, or give another path", "contradicts")
        made = Transfer(document, now, self._key(), changed_ms=now, receive=Side(document["destination"]["worker"]), send=Side(document["source"]["worker"]), held=held)
        self.transfers[made.id] = made
        self.changed[made.id] = made
        over = [one for one in self.transfers.values() if not one.live]
        for old in sorted(over, key=lambda one: one.changed_ms)[: max(0, len(over) - KEPT_MOST)]:
            del self.transfers[old.id]
            self.changed[old.id] = None
        return made

    def let_go(self, transfer: str, now: int) -> None:
        """What is sent is there. Raises KeyError."""
        one = self.transfers[transfer]
        if one.held:
            if one.document.get("stream") and one.receive.until_ms <= now:  # it ran out before anything was carried
                one.receive.until_ms = 0
                self._unheard(one)
            one.held = False
            one.receive.tries = one.send.tries = 0
            self._note(one, now)

    def cancel(self, transfer: str, now: int) -> Transfer:
        """End it. One that is over stays what it is. Raises KeyError."""
        one = self.transfers[transfer]
        if one.live:
            self._over(one, "cancelled", "cancelled by a user; a sender that had asked for the commit may have got it: look at the destination", now)
        return one

    # -- what workers ask ----------------------------------------------------------------------------------------------------

    def hello(self, name: str, facts: dict[str, Any] | None, now: int) -> Worker:
        """It is there. Raises Contradicts."""
        if name not in self.workers and len(self.workers) >= WORKERS_MOST:
            stale = min(self.workers.values(), key=lambda one: one.seen_ms)
            if now - stale.seen_ms < LEASE_MS:
                raise Contradicts("worker", f"{WORKERS_MOST} workers are there already", "take some out", "limit")
            del self.workers[stale.name]
        worker = self.workers.setdefault(name, Worker(name))
        worker.seen_ms = now
        if facts is not None:
            worker.facts = facts
        return worker

    def lease(self, name: str, held: dict[str, int], now: int) -> tuple[list[dict[str, Any]], list[str]]:
        """New tasks for a worker, and those of `held` (task to epoch) that it shall stop. What it holds by the newest lease is renewed."""
        if self._asked_ms is None or now - self._asked_ms > LEASE_MS // 2:
            self._since_ms = now
        self._asked_ms = now
        stop = []
        for task, epoch in held.items():
            transfer, side = self._find(task)
            if transfer is None or side is None or not transfer.live or side.epoch != epoch or side.worker != name:
                stop.append(task)
            elif side.until_ms:
                side.until_ms = now + LEASE_MS
            else:
                stop.append(task)
        self._run_out(now)
        tasks: list[dict[str, Any]] = []
        free = int(self.workers[name].facts.get("slots", 1)) - len(held) if name in self.workers else 0
        for transfer in self.transfers.values():
            for which in SIDES:
                if free <= len(tasks):
                    return tasks, stop
                side = transfer.side(which)
                if side.worker == name and self._due(transfer, which, now) and held.get(task_of(transfer.id, which)) is None:
                    tasks.append(self._give(transfer, which, now))
        return tasks, stop

    def _run_out(self, now: int) -> None:
        """Streams end with a lease that ran out. Where no worker asked for anything for a while, it is the hub that was away, or its clock that leapt: all have a lease's time to come back."""
        if now < self._since_ms + LEASE_MS:
            return
        for transfer in self.transfers.values():
            if transfer.live and transfer.once:
                for which in SIDES:
                    if 0 < transfer.side(which).until_ms <= now:
                        self._over(transfer, "failed", f"{which}: its worker said nothing for {LEASE_MS // 1000} s", now)
                        break

    def _due(self, transfer: Transfer, which: str, now: int) -> bool:
        side = transfer.side(which)
        if transfer.once and side.until_ms:
            return False
        if not transfer.live or side.until_ms > now or side.after_ms > now or transfer.document["not_before_ms"] > now:
            return False
        return which == "receive" or (bool(transfer.address) and not transfer.held)

    def _give(self, transfer: Transfer, which: str, now: int) -> dict[str, Any]:
        side = transfer.side(which)
        side.epoch += 1
        side.until_ms = now + LEASE_MS
        if which == "receive":
            self._unheard(transfer)
        if transfer.state == "queued":
            transfer.state = "moving"
        transfer.changed_ms = now
        self.changed[transfer.id] = transfer
        document = transfer.document
        end = document["destination" if which == "receive" else "source"]
        return {
            "task": task_of(transfer.id, which), "epoch": side.epoch, "what": which, "transfer": transfer.id, "path": end["path"], "key": transfer.key, "address": transfer.address if which == "send" else "",
            "limit_mbit": document["limit_mbit"], "base": document["base"], "replace": document["replace"], "stream": bool(document.get("stream")),
        }

    @staticmethod
    def _unheard(transfer: Transfer) -> None:
        """Where the receiver listened counts no more, and a sender that calls there works in vain."""
        transfer.address = ""
        transfer.send.until_ms = 0

    def report(self, name: str, said: dict[str, Any], now: int) -> bool:
        """What a worker says of a task. False: it shall stop, and what it said does not count."""
        transfer, side = self._find(said["task"])
        which = said["task"].rpartition("/")[2]
        if transfer is None or side is None or side.worker != name or side.epoch != said["epoch"] or not side.until_ms or not transfer.live:
            return False
        side.until_ms = now + LEASE_MS
        if said["progress"] is not None and which == "send":
            if said["progress"]["moved_bytes"] > transfer.progress.get("moved_bytes", 0):
                side.tries = transfer.receive.tries = 0
            transfer.progress = said["progress"]
        if said["prediction"] is not None:
            transfer.prediction = said["prediction"]
        if said["state"] == "listening" and which == "receive":
            transfer.address = said["address"]
            self._note(transfer, now)
        elif said["state"] == "done":
            self._done(transfer, which, said, now)
        elif said["state"] == "failed":
            self._failed(transfer, which, said, now)
        return True

    def _done(self, transfer: Transfer, which: str, said: dict[str, Any], now: int) -> None:
        if which == "send":
            transfer.root, transfer.result = said["root"], said["result"] or {}
            if not transfer.once:  # how far a stream was is how far it came
                transfer.progress = {name: transfer.result.get(of, 0) for name, of in (("moved_bytes", "length"), ("wire_bytes", "wire_bytes"), ("length", "length"), ("passes", "passes"))}
            self._over(transfer, "done", "", now)
            return
        # The receiver has committed. Should its answer have been lost, the sender asks again: a receiver that is started again answers by its journal.
        # Of a stream nobody asks again: what the sender says of it counts, or that it says nothing more.
        if transfer.once and not transfer.send.until_ms:  # who would say it is not at work
            self._over(transfer, "failed", "receive: it ended before anything was sent", now)
            return
        transfer.receive.until_ms = 0
        transfer.receive.after_ms = NEVER_MS if transfer.once else now + LEASE_MS
        self._note(transfer, now)

    def _failed(self, transfer: Transfer, which: str, said: dict[str, Any], now: int) -> None:
        side = transfer.side(which)
        side.until_ms = 0
        side.tries += not transfer.held  # a receiver that waited in vain for what is not there yet has not failed
        transfer.reason = f"{which}: {said['error']}"[:1000]
        stream = bool(transfer.document.get("stream"))
        if transfer.once or (said["final"] and not stream) or side.tries >= TRIES_MOST:
            self._over(transfer, "failed", transfer.reason, now)
            return
        side.after_ms = now + min(AGAIN_MS[1], AGAIN_MS[0] << max(0, side.tries - 1))
        if which == "receive":
            self._unheard(transfer)
        self._note(transfer, now)

    def _over(self, transfer: Transfer, state: str, reason: str, now: int) -> None:
        transfer.state, transfer.reason, transfer.key, transfer.address = state, reason, "", ""
        transfer.receive.until_ms = transfer.send.until_ms = 0
        self._note(transfer, now)

    def _note(self, transfer: Transfer, now: int) -> None:
        transfer.changed_ms = now
        self.changed[transfer.id] = transfer

    def _find(self, task: str) -> tuple[Transfer | None, Side | None]:
        transfer, _, which = task.rpartition("/")
        found = self.transfers.get(transfer)
        return (found, found.side(which)) if found is not None and which in SIDES else (None, None)

    def taken(self) -> dict[str, dict[str, Any] | None]:
        """What is to be kept, or forgotten, since the last call."""
        changed, self.changed = self.changed, {}
        return {name: None if one is None else one.to_json() for name, one in changed.items()}

    # -- what is shown -------------------------------------------------------------------------------------------------------

    def view(self, transfer: Transfer, now: int) -> dict[str, Any]:
        """Without the key."""
        shown = transfer.to_json()
        del shown["key"]
        waits = ""
        if transfer.live:
            for which in SIDES:
                side = transfer.side(which)
                worker = self.workers.get(side.worker)
                if side.until_ms <= now and (worker is None or now - worker.seen_ms > LEASE_MS):
                    waits = f"worker {side.worker} {'was never seen' if worker is None else 'is not there'}"
                    break
        return {"id": transfer.id, **shown, "waits_for": waits}
