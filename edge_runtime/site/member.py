"""One member of a site: leases, election, duties. Pure: `(state, event, now) -> actions`; no clock, no network, no disk.

All members share one broker, and every publish comes back in the broker's order, our own too. Three rules make that enough:

1.  *Lease.* A member acts only while a heartbeat that it sent less than `LEASE_MS` ago, on the connection of now, has come back. So whoever
    acts has read everything that the broker took before that heartbeat.
2.  *Start.* Who is given a device starts with it only when every other member has said that it goes by the same table, or has been silent so
    long that its lease is over on any clock, and a heartbeat of our own that was sent after that has come back. So whoever may have served
    the device has either read that it is not its own any more and stopped, or cannot act.
    A workload is a duty too, under its own name (`WORKLOAD`). What runs outlives the agent and a short break, so its lease is longer (`RUN_LEASE_MS`),
    and it is ended at the end of that lease whoever is alive; others wait longer before they start it (`RUN_WAIT_MS`), and a goodbye shortens nothing.
    To end it takes longer too, so a member says apart from the rest which table its workloads go by.
3.  *Number.* One counter for elections and tables, kept by every member across restarts; only a table with a higher number is taken over.

Safety comes from 1 and 2 alone, whoever leads and however many believe they do; the election (first claim of a number wins, in the broker's
order) is there so that somebody writes tables. What a broker remembers is not trusted: a table counts only once it has come in on the connection
of now, and where the broker has forgotten it, all duties are given anew.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from ..contract.limits import MAX_SITE_DEVICES, MAX_SITE_MEMBERS, MAX_SITE_NUMBER
from ..contract.site_messages import Duty, Heartbeat, Table, is_workload
from .actions import Action, Beat, Claim, Elected, Forget, Keep, Occupied, Place, Publish, Release, Resume, Standing, Start, Vacate
from .assign import Candidate, assign, home_of

HEARTBEAT_MS = 1_000
"""Time between two signs of life: six fit a lease, so one late one costs nothing; 64 members make 64 messages a second."""

LEASE_MS = 6_000
"""How long a heartbeat that came back lets its sender act. Longer rides out slower brokers and longer pauses, and takes longer to fail over."""

WAIT_MS = LEASE_MS + 500
"""How long the silence of another must last before its lease is over: clocks of two machines differ by far less than 8 % over a lease."""

SILENT_MS = LEASE_MS + 2_000
"""Silence after which a member counts as dead: two heartbeats more than its lease, so that a short pause moves nothing."""

RUN_LEASE_MS = 30_000
"""How long what runs may go on after the last proof that it is ours: an update of the agent and a restart of the broker fit in. The keeper of a container ends it then."""

RUN_WAIT_MS = RUN_LEASE_MS + 4_500
"""How long the silence of another must last before nothing runs there any more: 8 % for the clocks, and two seconds for its end."""

RUN_SILENT_MS = RUN_WAIT_MS + 1_500
"""Silence after which the workloads of a member are given to others, while no hub is there."""

HUB_AWAY_MS = SILENT_MS
"""Nobody who is there may have had a hub for so long: a short break of the uplinks moves nothing."""

HUB_SLACK_MS = 120_000
"""A hub that was still there so long after a member was last heard does not count as having decided about it: an uplink that is gone is noticed after a keepalive or two."""

SETTLE_MS = 2_000
"""How long a leader in office may say that it does not lead (it restarted, it has just won) before others claim."""

CLAIM_STEP_MS = 500
"""Candidates claim one after the other, the most able first, so far apart that the first claim has come round before the second is due."""

STABLE_MS = 20_000
"""How long a member must be there before its home devices go back to it: an edge that keeps crashing does not drag its devices along."""

REPEAT_MS = 3_000
"""A table that a member still does not go by is published again after this."""

FORGET_MS = 86_400_000
"""A device that has not spoken for a day leaves the table; it comes back when it speaks."""

ASSIGN_MS = 500
"""A leader looks at who serves what at most this often: it takes milliseconds with a thousand devices."""

OURS, WAITS, OTHERS = "ours", "waits", "others"
"""How a device stands to us: act on it; ours, or perhaps, but not yet; another's."""


@dataclass(slots=True)
class Peer:
    """What is known of another member in this connection; times by our clock."""

    heartbeat: Heartbeat
    heard_ms: int
    since_ms: int
    follows_since_ms: int
    """Since when it says that it does not lead."""
    crashed: bool = False
    """It came back with another boot, at `since_ms`."""


@dataclass(slots=True)
class Member:
    """This edge as a member of its site.

    Attributes:
        number: the highest number known of; what `Keep` kept is given back here at boot.
        table: the table in force, None until one came in on this connection.
    """

    edge: str
    boot: str
    capacity: float = 1.0
    duties: tuple[str, ...] = ()
    number: int = 0
    session: int = 0
    """Number of the connection, 0 for none."""
    up_ms: int = 0
    """When the broker had our subscription at the latest."""
    table: Table | None = None
    leads: bool = False
    peers: dict[str, Peer] = field(default_factory=dict)
    started: dict[str, Duty] = field(default_factory=dict)
    releasing: dict[str, Duty] = field(default_factory=dict)
    hub: bool = False
    """Our own uplink is up."""
    place: Place | None = None
    """Who shall run which workload; None where nobody here can tell."""
    occupied: dict[str, Occupied] = field(default_factory=dict)
    """Workloads that may run here, over connections and boots, until `vacated` or `ended`."""
    refused: int = 0
    """Members and devices beyond the limits, and messages of another process under our name."""
    _applied: tuple[int, str] = (0, "")
    _run_applied: tuple[int, str] = (0, "")
    _lease_ms: int | None = None
    """When the newest heartbeat that came back on this connection was sent."""
    _old_lease_ms: int | None = None
    """The same of the connection before, as long as it may still count."""
    _lapsed: bool = False
    _subscribed: bool = False
    _beat_ms: int | None = None
    _last: Table | None = None
    """The last table of any connection: what a new leader begins with."""
    _noticed: dict[str, int] = field(default_factory=dict)
    _homes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Home patterns of every member that was ever heard or wrote a spec."""
    _home: dict[str, str] = field(default_factory=dict)
    """What these patterns come to, by device."""
    _winner: str = ""
    _won_number: int = 0
    _won_ms: int = 0
    _claimed: tuple[int, int] | None = None
    """Number and time of our claim that has not come round."""
    _vacant_ms: int | None = None
    _sent_table: Table | None = None
    _repeated_ms: int = 0
    _assigned_ms: int = 0
    _anew: bool = False
    _heard: dict[str, int] = field(default_factory=dict)
    """When each member was last heard, on whatever connection."""
    _hub_ms: int = 0
    """When anybody was last heard to have a hub."""

    # -- what others ask -----------------------------------------------------------------------------------------------------

    def leased(self, now: int) -> bool:
        """Our lease runs."""
        return self._lease_ms is not None and self._lease_ms <= now < self._lease_ms + LEASE_MS

    def standing(self, device: str, now: int) -> str:
        """`OURS`, `WAITS` or `OTHERS`."""
        duty = self.table.duties.get(device) if self.table is not None else None
        if duty is not None and duty.edge != self.edge:
            return OTHERS
        return OURS if device in self.started and self.leased(now) else WAITS

    def may_send(self, device: str, now: int) -> Duty | None:
        """The duty under which a command for what was decided on `device` may go out now; None for not."""
        duty = self.started.get(device) or self.releasing.get(device)
        return duty if duty is not None and self.leased(now) else None

    def overdue(self, now: int) -> list[str]:
        """Workloads here whose time is over: what runs must end now; `vacated` when it has."""
        return [key for key, held in self.occupied.items() if held.until_ms <= now and self.may_send(key, now) is None]

    def vacated(self, key: str, now: int) -> None:
        """It does not run here any more, where it has not become ours again meanwhile."""
        if self.may_send(key, now) is None:
            self.started.pop(key, None)
            self.occupied.pop(key, None)

    def free(self, key: str, now: int) -> bool:
        """It is certain that no other member runs this workload, nor will by the table in force."""
        if self.table is None or not self.leased(now) or self._run_applied != self.table.identity:
            return False
        given = self.table.duties.get(key)
        return (given is None or given.edge == self.edge) and self._ended_elsewhere(self.table.identity)

    def server(self, device: str) -> str:
        """Who serves the device; empty where that is not known."""
        duty = self.table.duties.get(device) if self.table is not None else None
        return duty.edge if duty is not None else ""

    # -- the connection ------------------------------------------------------------------------------------------------------

    def session_up(self, session: int, now: int) -> None:
        """Connected; messages may come from now on, though the subscription is not confirmed."""
        self._expire(now)
        if self._lease_ms is not None:
            self._old_lease_ms = self._lease_ms
        self.session, self.up_ms, self._lease_ms, self._lapsed, self._subscribed = session, now, None, False, False
        self.table, self._applied, self._run_applied, self._beat_ms = None, (0, ""), (0, ""), None
        self.releasing.clear()
        self.peers.clear()
        self._resign()
        self._winner, self._won_number, self._vacant_ms = "", 0, None

    def subscribed(self, now: int) -> list[Action]:
        """The broker has our subscription to the site's topics: nothing that it takes from now on is missed."""
        if not self.session:
            return []
        self.up_ms, self._subscribed = now, True
        return self.tick(now)

    def session_down(self, now: int) -> list[Action]:
        """The connection is gone: what was sent on it gives no lease any more."""
        self._expire(now)
        if self._lease_ms is not None:
            self._old_lease_ms = self._lease_ms
        self.session, self._lease_ms = 0, None
        self._resign()
        return []

    def leave(self, now: int) -> list[Action]:
        """The last word before an orderly stop; everything must have been released."""
        if not self.session:
            return []
        self.started.clear()
        self.releasing.clear()
        self._resign()
        beat = replace(self._heartbeat(now), leaving=True, leads=False)
        self.session, self._lease_ms = 0, None
        return [Beat(beat)]

    # -- messages ------------------------------------------------------------------------------------------------------------

    def heard(self, beat: Heartbeat, now: int) -> list[Action]:
        """A heartbeat came in, perhaps our own."""
        if not self.session:
            return []
        self._expire(now)
        actions = self._know(beat.number)
        if beat.hub:
            self._hub_ms = now
        if beat.edge == self.edge:
            return actions + self._returned(beat, now)
        peer = self.peers.get(beat.edge)
        if peer is None:
            if len(self.peers) >= MAX_SITE_MEMBERS - 1:
                self.refused += 1
                return actions
            peer = self.peers[beat.edge] = Peer(beat, now, now, now)
        elif beat.boot != peer.heartbeat.boot:
            peer.crashed = not peer.heartbeat.leaving
            peer.since_ms = peer.follows_since_ms = now
        elif now - peer.heard_ms >= SILENT_MS or peer.heartbeat.leaving:
            peer.since_ms = peer.follows_since_ms = now
        if peer.heartbeat.leads and not beat.leads:
            peer.follows_since_ms = now
        peer.heartbeat, peer.heard_ms = beat, now
        if beat.edge in self._heard or len(self._heard) < MAX_SITE_MEMBERS:
            self._heard[beat.edge] = now
        self.home(beat.edge, beat.duties)
        return actions + self._consider(now)

    def home(self, edge: str, duties: tuple[str, ...]) -> None:
        """These patterns name the devices whose home is at `edge`."""
        if self._homes.get(edge) != duties and (edge in self._homes or len(self._homes) < MAX_SITE_MEMBERS):
            self._homes[edge] = duties
            self._home.clear()

    def _returned(self, beat: Heartbeat, now: int) -> list[Action]:
        """Our own heartbeat came back."""
        if beat.boot != self.boot:
            self.refused += 1  # left in the broker by our last boot, or another process under our name
            return []
        if beat.session != self.session or (self._lease_ms is not None and beat.sent_ms <= self._lease_ms) or now - beat.sent_ms >= LEASE_MS:
            return []
        first = self._lease_ms is None
        self._lease_ms, self._lapsed = beat.sent_ms, False
        actions: list[Action] = []
        if first:
            # Nobody can have started with what we serve while our old lease ran, and it has never stopped: go on as if nothing had been.
            unbroken = self._old_lease_ms is not None and now < self._old_lease_ms + LEASE_MS and self.table is not None
            if unbroken:
                actions.append(Resume())
            else:
                self.started.clear()
                actions.append(Forget())
            self._old_lease_ms = None
        actions += self._consider(now)
        for key in self.started:
            if is_workload(key):
                self.occupied[key] = Occupied(self.started[key], beat.sent_ms + RUN_LEASE_MS)
        return actions

    def claimed(self, edge: str, number: int, now: int) -> list[Action]:
        """A claim came round, perhaps our own: the first with a number above all known ones wins."""
        if not self.session:
            return []
        self._expire(now)
        ours, self._claimed = (self._claimed, None) if edge == self.edge else (None, self._claimed)
        if not self._wins(number):
            return []
        actions = self._know(number)
        self._winner, self._won_number, self._won_ms, self._vacant_ms = edge, number, now, None
        self._resign(keep_claim=True)
        if ours is not None and ours[0] == number and self.leased(now):
            self.leads, self._anew = True, self.table is None
            actions.append(Elected(number))
        return actions + self._consider(now)

    def _wins(self, number: int) -> bool:
        return number > self.number

    def tabled(self, table: Table, now: int) -> list[Action]:
        """A table came in, as retained or newly written, perhaps our own."""
        if not self.session:
            return []
        self._expire(now)
        if self._sent_table is not None and table.identity == self._sent_table.identity:
            self._sent_table = None
        if table.number < self.number or (self.table is not None and table.number <= self.table.number):
            return []  # a broker that went back in time, a leader that was replaced, or one that we have
        if table.number == self._won_number and table.leader != self._winner:
            return []
        actions = self._know(table.number)
        before = self.started
        self.table = self._last = table
        self.started = {device: duty for device, duty in before.items() if table.duties.get(device) == duty}
        lost = {device: duty for device, duty in before.items() if device not in self.started and not is_workload(device)}
        if table.leader != self.edge:
            self._resign(keep_claim=True)
        self._vacant_ms = None
        leaving = self._leaving()
        if leaving:
            actions.append(Vacate(leaving, table.identity))
        else:
            self._run_applied = table.identity
        if lost or self.releasing:
            # Not at once: what has been decided is acted on first. Until `drained` the others see us go by the old table and wait.
            if self.leased(now):
                self.releasing |= lost
            actions.append(Release(lost | self.releasing, table.identity))
            return actions + self._consider(now)
        return actions + self._apply(table.identity, now)

    def drained(self, table: tuple[int, str], now: int) -> list[Action]:
        """What `Release` asked for is done."""
        self._expire(now)
        if self.table is None or self.table.identity != table or not self.session:
            return []
        self.releasing.clear()
        return self._apply(table, now)

    def ended(self, table: tuple[int, str], now: int) -> list[Action]:
        """What `Vacate` asked for is done."""
        self._expire(now)
        if self.table is None or self.table.identity != table or not self.session:
            return []
        for key in self._leaving():
            del self.occupied[key]
        self._run_applied = table
        return [*([self._beat(now)] if self._subscribed else []), *self._consider(now)]

    def _leaving(self) -> dict[str, Duty]:
        """Workloads that may run here and are another's, or nobody's, by the table; over breaks and boots too. What is ours under a new number goes on."""
        duties = self.table.duties if self.table is not None else {}
        return {key: held.duty for key, held in self.occupied.items() if self.table is not None and ((given := duties.get(key)) is None or given.edge != self.edge)}

    def _apply(self, table: tuple[int, str], now: int) -> list[Action]:
        self._applied = table
        return [*([self._beat(now)] if self._subscribed else []), *self._consider(now)]

    def noticed(self, device: str, now: int) -> None:
        """A device spoke on the bus."""
        if device not in self._noticed and len(self._noticed) >= MAX_SITE_DEVICES:
            oldest = min(self._noticed, key=self._noticed.__getitem__)
            if now - self._noticed[oldest] < FORGET_MS:
                self.refused += 1
                return
            del self._noticed[oldest]
        self._noticed[device] = now

    def outdone(self, number: int, now: int) -> list[Action]:
        """A device has seen a higher number than ours: the site forgot one, and has to go above it."""
        return self._know(min(number, MAX_SITE_NUMBER)) + self._consider(now)

    # -- time ----------------------------------------------------------------------------------------------------------------

    def tick(self, now: int) -> list[Action]:
        """Let time pass; to be called a few times a second."""
        self._expire(now)
        if not self.session or not self._subscribed:
            return []
        actions: list[Action] = []
        if self._beat_ms is None or now - self._beat_ms >= HEARTBEAT_MS or now < self._beat_ms:
            actions.append(self._beat(now))
        return actions + self._consider(now)

    def _expire(self, now: int) -> None:
        """Notice that the lease has run out before anything else is done: what was started has to be started again."""
        if self._lease_ms is not None and not self._lapsed and not self.leased(now):
            self._lapsed = True
            self.started.clear()
            self.releasing.clear()
            self._resign()

    def _resign(self, keep_claim: bool = False) -> None:
        self.leads, self._sent_table = False, None
        if not keep_claim:
            self._claimed = None

    def _beat(self, now: int) -> Beat:
        self._beat_ms = now
        return Beat(self._heartbeat(now))

    def _heartbeat(self, now: int) -> Heartbeat:
        load = sum(duty.edge == self.edge and not is_workload(key) for key, duty in self.table.duties.items()) if self.table is not None else 0
        return Heartbeat(
            self.edge, self.boot, self.session, now, self.number, self._applied[0], self._applied[1], self.capacity, load, self.duties, self.leads, hub=self.hub,
            run_table=self._run_applied[0], run_leader=self._run_applied[1],
        )

    def _know(self, number: int) -> list[Action]:
        if number <= self.number:
            return []
        self.number = number
        return [Keep(number)]

    # -- starting ------------------------------------------------------------------------------------------------------------

    def _consider(self, now: int) -> list[Action]:
        return self._start(now) + self._lead(now) + self._candidate(now)

    def _start(self, now: int) -> list[Action]:
        if self.table is None or not self.leased(now):
            return []
        devices, runs = self._applied == self.table.identity, self._run_applied == self.table.identity
        fresh = {device: duty for device, duty in self.table.duties.items() if duty.edge == self.edge and device not in self.started}
        if not fresh:
            return []
        stopped, ended = devices and self._stopped_elsewhere(self.table.identity), self._ended_elsewhere(self.table.identity)
        fresh = {key: duty for key, duty in fresh.items() if (runs and (ended or self._unbroken(key, now)) if is_workload(key) else stopped)}
        if not fresh:
            return []
        self.started |= fresh
        assert self._lease_ms is not None
        self.occupied |= {key: Occupied(duty, self._lease_ms + RUN_LEASE_MS) for key, duty in fresh.items() if is_workload(key)}
        return [Start(fresh)]

    def _unbroken(self, key: str, now: int) -> bool:
        """It runs here on a lease that is not over: the others wait longer than that since they last heard from us, and hear from us again before they may start."""
        held = self.occupied.get(key)
        return held is not None and now < held.until_ms

    def _ended_elsewhere(self, table: tuple[int, str]) -> bool:
        """As `_stopped_elsewhere`, of what outlives an agent."""
        assert self._lease_ms is not None
        if self._lease_ms < self.up_ms + RUN_WAIT_MS:
            return False
        return all((peer.heartbeat.run_table, peer.heartbeat.run_leader) == table or self._lease_ms >= peer.heard_ms + RUN_WAIT_MS for peer in self.peers.values())

    def _stopped_elsewhere(self, table: tuple[int, str]) -> bool:
        """Nobody but us can act on what `table` gives to us: proven by what the broker took before a heartbeat of ours."""
        assert self._lease_ms is not None
        if self._lease_ms < self.up_ms + WAIT_MS:
            return False  # somebody of whom we have heard nothing yet may hold a lease from before we came
        return all(
            (peer.heartbeat.table, peer.heartbeat.leader) == table or peer.heartbeat.leaving or self._lease_ms >= peer.heard_ms + WAIT_MS
            for peer in self.peers.values()
        )

    # -- leading -------------------------------------------------------------------------------------------------------------

    def _silent(self, edge: str) -> bool:
        """Dead, as far as one who reads everything can tell; so is one that said goodbye."""
        assert self._lease_ms is not None
        peer = self.peers.get(edge)
        if peer is None:
            return self._lease_ms >= self.up_ms + SILENT_MS
        return peer.heartbeat.leaving or self._lease_ms >= peer.heard_ms + SILENT_MS

    def _gone(self, edge: str) -> bool:
        """Nothing of what it ran runs there any more, as far as one who reads everything can tell."""
        assert self._lease_ms is not None
        peer = self.peers.get(edge)
        return self._lease_ms >= (self.up_ms if peer is None else peer.heard_ms) + RUN_SILENT_MS

    def _standing(self, names: Collection[str]) -> Standing:
        assert self._lease_ms is not None
        live = {self.edge, *(name for name in self.peers if not self._silent(name))}
        gone = frozenset(name for name in {*names, *self.peers} - {self.edge} if self._gone(name))
        cut_off = not self.hub and self._lease_ms >= max(self._hub_ms, self.up_ms) + HUB_AWAY_MS
        return Standing(frozenset(live), gone, cut_off, frozenset(name for name in gone if self._hub_ms < self._heard.get(name, -HUB_SLACK_MS) + HUB_SLACK_MS))

    def _live(self, now: int) -> list[Candidate]:
        live = [Candidate(self.edge, self.capacity, now - self.up_ms >= STABLE_MS)]
        return live + [
            Candidate(name, peer.heartbeat.capacity, stable := now - peer.since_ms >= STABLE_MS, peer.crashed and not stable)
            for name, peer in sorted(self.peers.items()) if not self._silent(name)
        ]

    def _lead(self, now: int) -> list[Action]:
        if not self.leads or not self.leased(now) or self._sent_table is not None:
            return []
        mine = self.table is not None and self.table.leader == self.edge and self.table.number >= self._won_number
        if self.number > (self.table.number if mine and self.table is not None else self._won_number):
            self.leads = False  # somebody knows a higher number: claim above it
            return self._claim(now)
        if self.number >= MAX_SITE_NUMBER or (mine and 0 <= now - self._assigned_ms < ASSIGN_MS):
            return []
        self._assigned_ms = now
        last = self._last.duties if self._last is not None else {}
        before = {device: duty for device, duty in last.items() if not is_workload(device)}
        number = self.number + 1 if mine else self._won_number
        for device in before:
            self._noticed.setdefault(device, now)
        spoke = sorted(device for device, at_ms in self._noticed.items() if now - at_ms < FORGET_MS)
        anew = self._anew and not mine
        duties = assign(before, spoke[:MAX_SITE_DEVICES], self._live(now), self._home_of, number, anew=anew)
        run = {key: duty for key, duty in last.items() if is_workload(key)}
        if self.place is None:
            duties |= run
        else:
            duties |= self.place(run, self._standing({duty.edge for duty in run.values()} | self._heard.keys() | self._homes.keys()), number, anew, now)
        if mine and self.table is not None and duties == self.table.duties:
            return self._repeat(now)
        self._sent_table = Table(number, self.edge, duties)
        return [*self._know(number), Publish(self._sent_table)]

    def _home_of(self, device: str) -> str:
        home = self._home.get(device)
        if home is None:
            if len(self._home) >= 2 * MAX_SITE_DEVICES:
                self._home.clear()
            home = self._home[device] = home_of(device, {**self._homes, self.edge: self.duties})
        return home

    def _repeat(self, now: int) -> list[Action]:
        """The broker, or a member, may have lost the table."""
        assert self.table is not None
        behind = any(
            (peer.heartbeat.table, peer.heartbeat.leader) != self.table.identity and not self._silent(name) for name, peer in self.peers.items()
        )
        if not behind:
            self._repeated_ms = now
        elif now - self._repeated_ms >= REPEAT_MS:
            self._repeated_ms = now
            return [Publish(self.table)]
        return []

    def _candidate(self, now: int) -> list[Action]:
        if self.leads or not self.leased(now) or self._lease_ms is None:
            return []
        if self._claimed is not None:
            if now < self._claimed[1] + LEASE_MS:
                return []
            self._claimed = None
        if not self._vacant(now):
            self._vacant_ms = None
            return []
        if self._vacant_ms is None:
            self._vacant_ms = now
        order = sorted(self._live(now), key=lambda one: (-one.capacity, one.edge))
        rank = next(index for index, one in enumerate(order) if one.edge == self.edge)
        return self._claim(now) if now >= self._vacant_ms + rank * CLAIM_STEP_MS else []

    def _vacant(self, now: int) -> bool:
        """Nobody leads, or whoever does is gone."""
        assert self._lease_ms is not None
        if self._lease_ms < self.up_ms + WAIT_MS:
            return False  # whoever won before we came is heard of by then, or leads no more
        leader = self._winner if self.table is None or self._won_number > self.table.number else self.table.leader
        if not leader and any(peer.heartbeat.leads and not self._silent(name) for name, peer in self.peers.items()):
            return False  # the table is on its way
        if not leader or leader == self.edge or self._silent(leader):
            return True
        peer = self.peers.get(leader)
        return peer is not None and not peer.heartbeat.leads and self._lease_ms >= max(peer.follows_since_ms, self._won_ms) + SETTLE_MS

    def _claim(self, now: int) -> list[Action]:
        if self.number >= MAX_SITE_NUMBER or self._claimed is not None:
            return []
        self._claimed = (self.number + 1, now)
        return [Keep(self.number + 1), Claim(self.number + 1)]


