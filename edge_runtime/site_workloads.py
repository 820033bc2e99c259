"""Workloads of a shared site in the composition root: what the site's member and its leader decide, done to this node's runner, leases and journal.

Imported only where both `duties.enabled` and `workloads.enabled` are set. A workload whose document says `when_cut_off: move` runs here only while it is a duty of ours (`site.member`): its lease
is written down for the driver, which ends what runs when it is over, whether or not this process lives. What a sibling had is run from a copy of its entry, which is kept in the journal.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .contract import jsoncodec
from .contract.limits import MAX_MESSAGE_BYTES, MAX_SHARED_WORKLOADS
from .contract.site_messages import WORKLOAD, Duty, is_workload
from .contract.workloads import RUNNING, STOPPED, may_move
from .site.actions import Occupied
from .site.link import SiteLink
from .site.member import Member
from .workloads.cutoff import Shift, name_of, others, share
from .workloads.drivers import lease

if TYPE_CHECKING:
    from .runtime import EdgeRuntime

log = logging.getLogger(__name__)

KEPT = "site_workloads"
"""The journal's state document: what may run here by the site's table, entries that siblings had, and which entries of ours could move."""

RENEW_MS = 1_000
"""A lease is written again when it has grown by so much: a heartbeat."""

MAX_OVER = 64
"""Ends of what siblings had that are remembered, the newest: twice what one edge may be given."""

KEEPER_MS = 2_000
"""A keeper looks at its lease every second, and ends what runs in the next."""

AGAIN_S = 5.0
"""What could not be ended is tried again after so long."""


class SiteWorkloads:
    """The runtime's side of the workloads of its site: `workloads.node.Siblings`, and the part of `site.link.Effects` that speaks of workloads.

    Args:
        shift: the leader's view of who runs what.
    """

    def __init__(self, runtime: "EdgeRuntime", member: Member, link: SiteLink, shift: Callable[[], Shift]) -> None:
        self._runtime, self._member, self._link, self._shift = runtime, member, link, shift()
        self._edge = runtime.config.edge_id
        self._runs: dict[str, Duty] = {}
        """Workload to the duty under which it may run here: in the journal before it does."""
        self._granted: dict[str, Duty] = {}
        """Those that may run now."""
        self._held: dict[str, dict[str, Any]] = {}
        """Workload to the entry that a sibling had, with `for`, `fence` and `generation`."""
        self._moves: set[str] = set()
        """`id/epoch` of entries of ours that the site may have given to others."""
        self._over: dict[str, str] = {}
        """`id/epoch` of what siblings had to how it ended here, or that it cannot run here: told until nobody asks any more."""
        self._certain: set[str] = set()
        """Those that have stopped everywhere."""
        self._renewed: dict[str, int] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._told = ""
        self.known = False
        """We have said what runs here, in this process."""
        self._restore(runtime.journal.state(KEPT))

    def _restore(self, kept: Any) -> None:
        if not isinstance(kept, dict):
            return
        try:
            self._runs = {workload: Duty(self._edge, int(fence), str(origin), int(epoch)) for workload, (fence, origin, epoch) in kept["runs"].items()}
            self._held = {str(entry["id"]): dict(entry) for entry in kept["held"] if entry["for"]}
            self._moves = {str(name) for name in kept["moves"]}
            self._over = {str(name): str(state) for name, state in kept["over"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            log.error("what the site let run here is not known any more: %s", error)
        for workload, duty in self._runs.items():
            self._member.occupied[WORKLOAD + workload] = Occupied(duty, lease.read(lease.folder_of(self._runtime.config.data_dir, workload, duty.epoch)))

    async def close(self) -> None:
        """Let go; what runs goes on, for as long as its lease."""
        tasks = list(self._ending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _keep(self, then: Callable[[], None] | None = None) -> None:
        runs = {workload: [duty.fence, duty.origin, duty.epoch] for workload, duty in self._runs.items()}
        self._runtime.journal.put_state(KEPT, {"runs": runs, "held": list(self._held.values()), "moves": sorted(self._moves), "over": self._over}, then)

    # -- what the member decides ---------------------------------------------------------------------------------------------

    def start(self, duties: Mapping[str, Duty]) -> None:
        """These may run here from now: written down first, so that a later process knows of it."""
        fresh = {key.removeprefix(WORKLOAD): duty for key, duty in duties.items()}
        new = {workload: duty for workload, duty in fresh.items() if self._runs.get(workload) != duty}
        kept = False
        for workload, duty in fresh.items():
            self._runs[workload] = duty
            kept = self._hold(workload, duty) or kept

        def grant() -> None:
            for workload, duty in fresh.items():
                if self._member.started.get(WORKLOAD + workload) == duty:
                    self._granted[workload] = duty
            self._renew()
            self._runtime.workload_node().again()

        if new:
            self._tell_event("taken", [{"workload": workload, "origin": duty.origin, "fence": duty.fence} for workload, duty in new.items()])
        if new or kept:
            self._keep(grant)
        else:
            grant()

    def vacate(self, duties: Mapping[str, Duty], done: Callable[[], None]) -> None:
        """End these, forget them, then call `done`."""
        names = [key.removeprefix(WORKLOAD) for key in duties]
        self._end("|".join(sorted(names)), names, done)

    def _end(self, task: str, names: Sequence[str], done: Callable[[], None]) -> None:
        for workload in names:
            self._granted.pop(workload, None)

        async def end() -> None:
            node = self._runtime.workload_node()
            while True:
                try:
                    await asyncio.gather(*(node.ended(workload) for workload in names))
                    if not node.driven:  # what an earlier agent started runs until its keeper ends it
                        over = max((held.until_ms for workload in names if (held := self._member.occupied.get(WORKLOAD + workload)) is not None), default=0) + KEEPER_MS
                        await asyncio.sleep(max(0, over - self._now()) / 1000)
                    break
                except Exception:  # whatever it is: siblings wait until it has ended
                    self._runtime.metrics.inc("workload_errors_total")
                    log.exception("workloads that are another's now could not be ended; trying again in %.0f s", AGAIN_S)
                    await asyncio.sleep(AGAIN_S)
            gone = [workload for workload in names if workload not in self._granted and self._member.may_send(WORKLOAD + workload, self._now()) is None]
            told = [{"workload": workload, "origin": duty.origin, "fence": duty.fence, "to": self._member.server(WORKLOAD + workload)} for workload in gone if (duty := self._runs.get(workload)) is not None]
            for workload in gone:
                if (duty := self._runs.pop(workload, None)) is not None:
                    lease.remove(lease.folder_of(self._runtime.config.data_dir, workload, duty.epoch))
                self._renewed.pop(workload, None)
                if self._member.server(WORKLOAD + workload) != self._edge:
                    self._held.pop(workload, None)
            if told:
                self._tell_event("released", told)
            self._keep(done)
            self.tell()

        before = self._ending.get(task)
        if before is not None:
            before.cancel()
        self._ending[task] = made = asyncio.get_running_loop().create_task(end(), name=f"ending {task}")
        made.add_done_callback(lambda ended: self._ending.pop(task, None) if self._ending.get(task) is ended else None)

    def _hold(self, workload: str, duty: Duty) -> bool:
        """Keep the entry of what a sibling had, where we do not have one of our own; whether that has changed anything."""
        if any(entry["id"] == workload and entry["epoch"] == duty.epoch and entry["wanted"] == RUNNING for entry in self._runtime.workload_node().entries):
            return self._held.pop(workload, None) is not None
        held = self._held.get(workload)
        if held is not None and held["epoch"] == duty.epoch:
            self._held[workload] = {**held, "fence": duty.fence}
            return bool(held["fence"] != duty.fence)
        found = self._shift.entry(WORKLOAD + workload, duty)
        if found is not None and (workload in self._held or len(self._held) < MAX_SHARED_WORKLOADS):
            entry, source, generation = found
            self._held[workload] = {**entry, "for": source, "generation": generation, "fence": duty.fence}
            return True
        return False

    # -- time ----------------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Renew leases, end what is overdue, say what has become certain."""
        now = self._now()
        self._renew()
        for key in self._member.overdue(now):
            workload = key.removeprefix(WORKLOAD)
            if workload not in self._ending:
                self._end(workload, [workload], lambda key=key: self._member.vacated(key, self._now()))  # type: ignore[misc]
        stopped = [entry for entry in self._runtime.workload_node().entries if entry["wanted"] == STOPPED and name_of(entry) in self._moves - self._certain]
        if certain := {name_of(entry) for entry in stopped if self._member.free(WORKLOAD + entry["id"], now)}:
            self._certain |= certain
            self._runtime.workload_node().again()

    def _now(self) -> int:
        return self._runtime.clock.mono_ms()

    def _renew(self) -> None:
        now = self._now()
        for workload, duty in self._granted.items():
            key = WORKLOAD + workload
            if self._member.started.get(key) != duty or not self._member.leased(now):
                continue
            until = self._member.occupied[key].until_ms
            if not 0 <= until - self._renewed.get(workload, -RENEW_MS) < RENEW_MS:
                try:
                    lease.write(lease.folder_of(self._runtime.config.data_dir, workload, duty.epoch), until)
                    self._renewed[workload] = until
                except OSError as error:
                    self._runtime.metrics.inc("workload_errors_total")
                    log.error("the lease of %s could not be written, it will be ended: %s", workload, error)

    def heard(self) -> None:
        """A sibling has told what it shall run: what was given to us and not known may be known now."""
        missing = [key for key, duty in self._member.started.items() if is_workload(key) and not self._known(key.removeprefix(WORKLOAD), duty)]
        if missing:
            self.start({key: self._member.started[key] for key in missing})

    def _known(self, workload: str, duty: Duty) -> bool:
        held = self._held.get(workload)
        return (held is not None and held["epoch"] == duty.epoch) or any(entry["id"] == workload and entry["epoch"] == duty.epoch for entry in self._runtime.workload_node().entries)

    # -- what the node asks --------------------------------------------------------------------------------------------------

    def compose(self, entries: Sequence[dict[str, Any]], runs: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, bool]]:
        """See `workloads.node.Siblings`."""
        before = (set(self._moves), set(self._held))
        moving = [entry for entry in entries if entry["wanted"] == RUNNING and may_move(entry["document"])]
        for entry in entries:  # what the hub says of a workload comes before what the site gave
            held = self._held.get(entry["id"])
            if held is not None and held["epoch"] <= entry["epoch"]:
                del self._held[entry["id"]]
                self._moves.add(name_of(held))
        self._moves |= {name_of(entry) for entry in moving}
        self._moves &= {name_of(entry) for entry in entries} | {name_of(held) for held in self._held.values()}
        self._certain &= self._moves
        shared, refused = share(moving, self._held.values())
        out: list[dict[str, Any]] = []
        may: dict[str, bool] = {}
        for entry in entries:
            if entry in refused:
                out.append({**entry, "refusal": f"more workloads that may move than the {MAX_SHARED_WORKLOADS}, or their documents more bytes, than one edge can share with its site"})
            elif entry in moving:
                if entry in shared:
                    out.append(entry)
                    may[name_of(entry)] = self._may(entry)
            elif entry["wanted"] == RUNNING or name_of(entry) not in self._moves or name_of(entry) in self._certain:
                out.append(entry)  # else it is not certain yet that it has stopped everywhere
        for held in self._held.values():
            out.append(held)
            may[name_of(held)] = self._may(held)
        if before != (self._moves, set(self._held)):
            self._keep()
        return out, may

    def _may(self, entry: Mapping[str, Any]) -> bool:
        duty = self._granted.get(entry["id"])
        return duty is not None and duty.epoch == entry["epoch"] and WORKLOAD + entry["id"] in self._member.occupied

    def tell(self, anew: bool = False) -> None:
        """Publish what siblings need to take workloads over, where it has changed, or `anew`."""
        node = self._runtime.workload_node()
        if anew:
            self._told = ""
        if not node.ready:
            return
        entries = [entry for entry in node.entries if entry["wanted"] != RUNNING or entry["kind"] in node.runs]
        shared, _ = share(entries, self._held.values())
        listed, ends = {name_of(entry): entry for entry in shared}, node.ends()
        # What we refuse ourselves the hub hears of; a sibling's we only leave to the next one.
        ended = {name: state if listed[name].get("for") or state != "refused" else "stopped" for name, state in ends.items() if name in listed}
        self._remember({name: state for name, state in ended.items() if listed[name].get("for")})
        ended = {**self._over, **ended}
        ended |= {name_of(entry): "stopped" for entry in entries if entry["wanted"] == STOPPED and name_of(entry) in self._moves}
        generation = self._runtime.desired.generation if self._runtime.desired else 0
        body = {
            "edge": self._edge, "generation": generation, "capacity": node.told or {}, "entries": [{"for": "", "generation": generation, **_plain(entry)} for entry in shared],
            "others": others(entry for entry in entries if entry["wanted"] == RUNNING and not may_move(entry["document"])), "ended": ended,
        }
        self._shift.loads[self._edge], self.known = body, True
        text = jsoncodec.encode(body)
        if len(text) > MAX_MESSAGE_BYTES - 1024:
            log.error("what this edge tells of its workloads is over %d bytes: no sibling hears of what has changed", MAX_MESSAGE_BYTES)
        elif text != self._told and self._link.say("load", self._edge, body):
            self._told = text

    def _remember(self, over: Mapping[str, str]) -> None:
        new = {name: state for name, state in over.items() if self._over.get(name) != state}
        if new:
            self._over |= new
            while len(self._over) > MAX_OVER:
                del self._over[next(iter(self._over))]
            self._keep()

    # -- told to people ------------------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """What is wrong, in words."""
        node, table = self._runtime.workload_node(), self._member.table
        waiting = [entry["id"] for entry in node.entries if entry["wanted"] == RUNNING and may_move(entry["document"]) and not self._may(entry) and (
            table is None or (given := table.duties.get(WORKLOAD + entry["id"])) is None or given.edge == self._edge)]
        told = [f"workloads that may move wait for the site's bus: {', '.join(sorted(waiting)[:10])}"] if waiting else []
        if self._member.leads and self._shift.unplaced:
            told += [f"workload {key.removeprefix(WORKLOAD)} fits no sibling: {why}"[:500] for key, why in sorted(self._shift.unplaced.items())[:10]]
        return told

    def _tell_event(self, what: str, workloads: list[dict[str, Any]]) -> None:
        self._runtime.journal.append("event", "site", {"what": what, "number": self._member.number, "workloads": workloads})


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "fence"}
