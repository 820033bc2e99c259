"""The rim of a member: its messages in and out on the local bus, its number durable before it is used. What it means is in `member`."""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from ..contract import jsoncodec, topics
from ..contract.errors import ContractError
from ..contract.limits import PROTOCOL_VERSION
from ..contract.site_messages import CLAIM, DUTY, LOAD, SPEC, Duty, parse, parse_heartbeat, parse_table
from ..metrics import Metrics
from . import actions as core
from .actions import Action
from .member import Member

log = logging.getLogger(__name__)

MAX_ERRORS = 50
"""Refused messages kept for a person to look at."""


class Effects(Protocol):
    """What becomes of what the member decides."""

    def start(self, duties: dict[str, Duty]) -> None:
        """These duties are ours from now."""

    def release(self, duties: dict[str, Duty], done: Callable[[], None]) -> None:
        """Finish what is decided on these, hand them over, then call `done`."""

    def vacate(self, duties: dict[str, Duty], done: Callable[[], None]) -> None:
        """End these workloads, then call `done`."""

    def resume(self) -> None:
        """Nothing has changed: go on with what waits."""

    def forget(self) -> None:
        """What waits may have been decided by others."""

    def moved(self) -> None:
        """Another table is in force, perhaps."""

    def elected(self, number: int) -> None:
        """We lead."""

    def spec(self, edge: str, spec: dict[str, Any]) -> None:
        """What a sibling decides by."""

    def load(self, edge: str, load: dict[str, Any]) -> None:
        """What a member has for workloads, and what it shall run; also what we said, in an earlier life perhaps."""

    def handed(self, state: dict[str, Any]) -> None:
        """The hand-over state of one device."""


class SiteLink:
    """One member on its bus.

    Args:
        publish: `publish(topic, payload, retain)`; False where the bus is not there.
        keep: `keep(number, then)`: make the number durable, then call `then`.
    """

    def __init__(
        self, site: str, member: Member, effects: Effects, metrics: Metrics, *, publish: Callable[[str, bytes, bool], bool], mono_ms: Callable[[], int],
        keep: Callable[[int, Callable[[], None]], None],
    ) -> None:
        self.site = site
        self.member = member
        self._effects = effects
        self._metrics = metrics
        self._publish = publish
        self._mono_ms = mono_ms
        self._keep = keep
        self._sessions = 0
        self.errors: deque[dict[str, str]] = deque(maxlen=MAX_ERRORS)

    # -- the connection ------------------------------------------------------------------------------------------------------

    def connected(self) -> None:
        """A new connection; the subscription follows."""
        self._sessions += 1
        self.member.session_up(self._sessions, self._mono_ms())

    def subscribed(self) -> None:
        """The broker has the subscription."""
        self._do(self.member.subscribed(self._mono_ms()))

    def down(self) -> None:
        """The connection is gone."""
        self._do(self.member.session_down(self._mono_ms()))

    def tick(self) -> None:
        """Let time pass."""
        self._do(self.member.tick(self._mono_ms()))

    def outdone(self, number: int) -> None:
        """A device knows a higher number."""
        self._do(self.member.outdone(number, self._mono_ms()))

    def leave(self) -> None:
        """Say goodbye; everything is released already."""
        self._do(self.member.leave(self._mono_ms()))

    # -- messages ------------------------------------------------------------------------------------------------------------

    def message(self, topic: str, payload: bytes) -> None:
        """A message of the site; a bad one is counted and named, and has no effect."""
        try:
            leaf, name = topics.parse_site(topic, self.site)
            if not payload:
                return  # a retained message that somebody cleared
            now = self._mono_ms()
            if leaf == "member":
                self._do(self.member.heard(parse_heartbeat(payload, self.site, name), now))
            elif leaf == "claim":
                claim = parse(CLAIM, payload, self.site)
                self._do(self.member.claimed(claim["edge"], claim["number"], now))
            elif leaf == "table":
                self._do(self.member.tabled(parse_table(payload, self.site), now))
                self._effects.moved()
            elif leaf == "spec":
                spec = parse(SPEC, payload, self.site, name)
                if name != self.member.edge:
                    self.member.home(name, tuple(spec["duties"]))
                    self._effects.spec(name, spec)
            elif leaf == "load":
                self._effects.load(name, parse(LOAD, payload, self.site, name))
            else:
                self._effects.handed(parse(DUTY, payload, self.site, name))
        except ContractError as error:
            self._metrics.inc("site_rejected_messages_total", reason=error.reason)
            self.errors.append({"topic": topic[:200], **error.to_json()})
            log.warning("a message of the site was refused: %s", error)

    def say(self, leaf: str, name: str, body: dict[str, Any]) -> bool:
        """Publish a retained document of the site; False where the bus is not there."""
        return self._publish(topics.site_topic(self.site, leaf, name), jsoncodec.encode({"v": PROTOCOL_VERSION, "site": self.site, **body}).encode(), True)

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, core.Beat):
                payload = jsoncodec.encode(action.heartbeat.to_json(self.site)).encode()
                self._publish(topics.site_topic(self.site, "member", self.member.edge), payload, False)
            elif isinstance(action, core.Keep):
                self._keep(action.number, _nothing)
            elif isinstance(action, core.Claim):
                body = {"v": PROTOCOL_VERSION, "site": self.site, "edge": self.member.edge, "number": action.number}
                self._when_kept(action.number, topics.site_topic(self.site, "claim"), body, False)
            elif isinstance(action, core.Publish):
                self._when_kept(action.table.number, topics.site_topic(self.site, "table"), action.table.to_json(self.site), True)
            elif isinstance(action, core.Release):
                self._effects.release(action.duties, lambda table=action.table: self._do(self.member.drained(table, self._mono_ms())))  # type: ignore[misc]
            elif isinstance(action, core.Vacate):
                self._effects.vacate(action.duties, lambda table=action.table: self._do(self.member.ended(table, self._mono_ms())))  # type: ignore[misc]
            elif isinstance(action, core.Start):
                self._effects.start(action.duties)
            elif isinstance(action, core.Resume):
                self._effects.resume()
            elif isinstance(action, core.Forget):
                self._effects.forget()
            else:
                self._effects.elected(action.number)

    def _when_kept(self, number: int, topic: str, body: dict[str, Any], retain: bool) -> None:
        """Publish once the number is durable, on the connection for which it was meant."""
        session = self.member.session

        def durable() -> None:
            if self.member.session == session:
                self._publish(topic, jsoncodec.encode(body).encode(), retain)

        self._keep(number, durable)


def _nothing() -> None:
    """Nobody waits."""
