"""Three rules of a site's member, each met by itself: random schedules hardly ever need them, and a member without them passes there."""

from dataclasses import replace
from typing import Any

from edge_runtime.contract.site_messages import Duty, Heartbeat, Table
from edge_runtime.site.actions import Beat, Start
from edge_runtime.site.member import HEARTBEAT_MS, LEASE_MS, WAIT_MS, Member

DUTY = Duty("b", 5, "b")
GIVEN = Table(5, "lead", {"boiler": DUTY})
ROUND_TRIP_MS = 20


class Lone:
    """One member whose broker returns every heartbeat after `ROUND_TRIP_MS`; what else it hears is said by the test. Remembers when it started."""

    def __init__(self, make: type[Member]) -> None:
        self.member = make("b", "boot-b")
        self.now = 0
        self.started_ms: int | None = None

    def take(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Beat):
                self._returning = action.heartbeat
            elif isinstance(action, Start) and "boiler" in action.duties:
                self.started_ms = self.now

    def connect(self, session: int) -> None:
        self.member.session_up(session, self.now)
        self.take(self.member.subscribed(self.now))

    def run(self, until: int) -> None:
        while self.now < until:
            self.now += ROUND_TRIP_MS
            self.take(self.member.heard(self._returning, self.now))
            if self.now % HEARTBEAT_MS == 0:
                self.take(self.member.tick(self.now))

    def hear(self, table: int, leader: str, leads: bool = False) -> None:
        """The other member, `c`, says which table it goes by."""
        self.take(self.member.heard(Heartbeat("c", "boot-c", 1, self.now, 5, table, leader, 0.5, 0, (), leads), self.now))


class StartsWhileOthersAreUnheard(Member):
    """Takes whom it has not heard for not being there."""

    def _stopped_elsewhere(self, table: tuple[int, str]) -> bool:
        assert self._lease_ms is not None
        lease_ms = self._lease_ms
        return all((peer.heartbeat.table, peer.heartbeat.leader) == table or lease_ms >= peer.heard_ms + WAIT_MS for peer in self.peers.values())


def starts_at(make: type[Member]) -> int | None:
    lone = Lone(make)
    lone.connect(1)
    lone.take(lone.member.tabled(GIVEN, lone.now))  # retained; who served the boiler before has not been heard yet
    lone.run(2 * WAIT_MS)
    return lone.started_ms


def test_a_newcomer_waits_for_members_that_it_has_not_heard() -> None:
    at = starts_at(Member)
    assert at is not None and at >= WAIT_MS > LEASE_MS


def test_the_first_check_can_fail() -> None:
    at = starts_at(StartsWhileOthersAreUnheard)
    assert at is not None and at < LEASE_MS


class KeepsItsTable(Member):
    """Goes on with the table of the connection before."""

    def session_up(self, session: int, now: int) -> None:
        table, applied = self.table, self._applied
        super().session_up(session, now)
        self.table, self._applied = table, applied


def starts_again_without_a_table(make: type[Member]) -> bool:
    lone = Lone(make)
    lone.connect(1)
    lone.take(lone.member.tabled(GIVEN, lone.now))
    lone.run(2 * WAIT_MS)
    assert lone.started_ms is not None
    lone.take(lone.member.session_down(lone.now))
    lone.now += 10 * LEASE_MS  # meanwhile another may have been given the boiler, and the broker has forgotten the table that says so
    lone.started_ms = None
    lone.connect(2)
    lone.hear(6, "c", leads=True)  # somebody leads: nothing is claimed, the table is on its way
    until = lone.now + WAIT_MS - 2 * HEARTBEAT_MS
    while lone.now < until:
        lone.run(lone.now + HEARTBEAT_MS)
        lone.hear(6, "c", leads=True)
    for _ in range(8):
        lone.run(lone.now + HEARTBEAT_MS)
        lone.hear(5, "lead", leads=True)  # and goes by the old one as far as it says
    return lone.started_ms is not None


def test_a_table_counts_only_on_the_connection_it_came_in_on() -> None:
    assert not starts_again_without_a_table(Member)


def test_the_second_check_can_fail() -> None:
    assert starts_again_without_a_table(KeepsItsTable)


class NumbersAreEnough(Member):
    """Takes two tables of one number for the same."""

    def _stopped_elsewhere(self, table: tuple[int, str]) -> bool:
        kept = self.peers
        self.peers = {name: replace_leader(peer, table[1]) for name, peer in kept.items()}
        try:
            return super()._stopped_elsewhere(table)
        finally:
            self.peers = kept


def replace_leader(peer: Any, leader: str) -> Any:
    return replace(peer, heartbeat=replace(peer.heartbeat, leader=leader))


def starts_beside_another_table(make: type[Member]) -> bool:
    lone = Lone(make)
    lone.connect(1)
    lone.take(lone.member.tabled(GIVEN, lone.now))
    for _ in range(2 * WAIT_MS // HEARTBEAT_MS):
        lone.hear(5, "other")  # the table of that number by another leader may give the boiler to c
        lone.run(lone.now + HEARTBEAT_MS)
    return lone.started_ms is not None


def test_two_tables_with_one_number_are_two() -> None:
    assert not starts_beside_another_table(Member)


def test_the_third_check_can_fail() -> None:
    assert starts_beside_another_table(NumbersAreEnough)


def test_who_goes_by_the_same_table_is_not_waited_for() -> None:
    lone = Lone(Member)
    lone.connect(1)
    lone.take(lone.member.tabled(GIVEN, lone.now))
    for _ in range(2 * WAIT_MS // HEARTBEAT_MS):
        lone.hear(5, "lead")
        lone.run(lone.now + HEARTBEAT_MS)
    assert lone.started_ms is not None and lone.started_ms < WAIT_MS + 3 * HEARTBEAT_MS
