"""Shared duties in the composition root: what the site's member decides, done to engines, journal, twins and commands.

Imported only where `duties.enabled` is set. A device of ours is decided by our engine where it has its home here, else by an engine made from
the rules of the edge that we stand in for.
"""

import asyncio
import base64
import logging
import re
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contract import jsoncodec, topics
from .contract.errors import ContractError
from .contract.limits import MAX_DUTY_BYTES, MAX_MESSAGE_BYTES, MAX_MODELS, MAX_SITE_DEVICES, MAX_SITE_MEMBERS
from .contract.records import Record
from .contract.site_messages import Duty, is_workload
from .decisions.engine import Decision, DecisionEngine
from .decisions.rules import RuleError, RuleSet, parse_rules
from .site.link import SiteLink
from .site.member import OTHERS, OURS, Member

if TYPE_CHECKING:
    from .runtime import EdgeRuntime
    from .site_workloads import SiteWorkloads
    from .workloads.cutoff import Shift

log = logging.getLogger(__name__)

TICK_S = 0.25
"""How often the member is asked: fine beside its heartbeat of a second and the half second between two claims."""

WAITING_MAX = 1_000
"""Messages that wait for a duty to start: some seconds of a busy site; the oldest goes, counted."""

SMALL_MODELS_CHARS = 65_536
"""Characters of base64 of all models that travel with the rules: the detector models of a device are a few KiB, and everybody keeps everybody's."""

EVENT_DUTIES = 200
"""Duties told in one record."""

LEAVE_S = 5.0
"""How long an orderly stop waits for the disk before it hands over."""

_DECISION_ID = re.compile(r".+\.[0-9a-f]{8}\.\d+\.\d+\Z")
"""The id of a command that a decision of some edge led to; others are the hub's."""


class SharedDuties:
    """The runtime's side of its site: `pipeline.Duties`, `site.link.Effects` and `devices.bus.Aside` in one."""

    def __init__(self, runtime: "EdgeRuntime") -> None:
        config = runtime.config
        self._runtime = runtime
        self._edge = config.edge_id
        self._host = config.devices.host.device_id
        self._journal = runtime.journal
        kept = runtime.journal.state("site")
        number = kept.get("number") if isinstance(kept, dict) else 0
        self.member = Member(config.edge_id, runtime.journal.boot, config.duties.capacity, config.duties.home, number if type(number) is int and number > 0 else 0)
        self.link = SiteLink(config.site, self.member, self, runtime.metrics, publish=self._publish, mono_ms=runtime.clock.mono_ms, keep=self._keep)
        self.topics = topics.site_subscriptions(config.site)
        self.prefix = topics.site_topic(config.site, "")
        self._kept = self.member.number
        self._standins: dict[str, DecisionEngine] = {}
        self._specs: dict[str, dict[str, Any]] = {}
        self._lent: dict[str, Any] = {}
        """Models that came with a sibling's rules, by digest."""
        self._states: dict[str, dict[str, Any]] = {}
        """The newest hand-over state of each device, by whomever."""
        self._held: dict[str, Duty] = {}
        """Duties whose engine state and twin are in this process."""
        self._left: set[str] = set()
        """Devices that were handed over since this process began."""
        self._waiting: deque[tuple[str, Callable[[], None]]] = deque()
        self._leaving = False
        self._told_spec = b""
        self._shift: Shift | None = None
        self.workloads: SiteWorkloads | None = None
        if config.workloads.enabled:
            from . import site_workloads

            self.workloads = site_workloads.SiteWorkloads(runtime, self.member, self.link, self.shift)
        for name, text in (
            ("site_dropped_messages_total", "Messages of devices that another edge serves, or that came while nobody could tell."),
            ("site_rejected_messages_total", "Messages of the site refused, by reason."),
            ("commands_superseded_total", "Commands not sent because another edge serves the device now."),
        ):
            runtime.metrics.describe(name, "counter", text)
        runtime.metrics.gauge("site_duties", "Shared devices that this edge serves.", lambda: len(self._serving()))
        runtime.metrics.gauge("site_leads", "1 while this edge leads its site.", lambda: float(self.member.leads))

    # -- life ----------------------------------------------------------------------------------------------------------------

    def connected(self) -> None:
        """The bus is there; see `devices.bus.Aside`."""
        self.link.connected()

    def session(self, up: bool) -> None:
        """The bus is subscribed, or gone."""
        if up:
            self._told_spec = b""
            self.tell_spec()
            if self.workloads is not None:
                self.workloads.tell(anew=True)
            self.link.subscribed()
        else:
            self.link.down()

    def message(self, topic: str, payload: bytes) -> None:
        """A message of the site."""
        self.link.message(topic, payload)

    async def run(self) -> None:
        """Let time pass, for ever."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self.member.hub = not self._runtime.is_offline()
                self.link.tick()
                if self.workloads is not None:
                    self.workloads.tick()
                self._flush()
                self._runtime.pipeline.send_waiting()
            except Exception:
                self._runtime.metrics.inc("tick_errors_total")
                log.exception("the site's tick failed")

    async def leave(self) -> None:
        """An orderly stop: decide nothing more, finish, hand over, say so; the siblings go on at once."""
        self._leaving = True
        if self.workloads is not None:
            await self.workloads.close()
        try:
            await asyncio.wait_for(self._journal.flush(), LEAVE_S)
        except TimeoutError:
            log.error("the journal could not be written before the hand-over")
        with self.together():
            for device in self._serving():
                self._hand_over(device, None, released=True)
            self.link.leave()

    def _publish(self, topic: str, payload: bytes, retain: bool) -> bool:
        bus = self._runtime.bus
        return bus is not None and bus.publish_aside(topic, payload, retain)

    def _keep(self, number: int, then: Callable[[], None]) -> None:
        self._kept = max(self._kept, number)
        self._journal.put_state("site", {"number": self._kept}, then)

    # -- what the pipeline asks ----------------------------------------------------------------------------------------------

    def admit(self, device: str, take: Callable[[], None], done: Callable[[], None]) -> bool:
        """See `pipeline.Duties`."""
        if device == self._host:
            return True
        now = self._now()
        self.member.noticed(device, now)
        standing = OTHERS if self._leaving else self.member.standing(device, now)
        if standing == OURS:
            return True
        if standing == OTHERS:
            self._dropped(1)
        else:
            self._waiting.append((device, take))
            if len(self._waiting) > WAITING_MAX:
                self._waiting.popleft()
                self._dropped(1)
        done()
        return False

    def engine(self, device: str) -> DecisionEngine:
        """See `pipeline.Duties`."""
        duty = self._held.get(device)
        return self._runtime.engine if duty is None or duty.origin == self._edge else self._standin(duty.origin)

    def tick(self, mono_ms: int) -> list[Decision]:
        """See `pipeline.Duties`."""

        def ours(device: str) -> bool:
            return device == self._host or (not self._leaving and self.member.standing(device, mono_ms) == OURS)

        decisions = self._runtime.engine.tick(mono_ms, ours)
        for engine in self._standins.values():
            decisions += engine.tick(mono_ms, ours)
        return decisions

    def tag(self, device: str) -> dict[str, Any]:
        """See `pipeline.Duties`."""
        duty = self.member.may_send(device, self._now())
        if duty is None:
            return {}
        if duty.origin == self._edge:
            return {"fence": duty.fence}
        return {"fence": duty.fence, "for": duty.origin, "generation": self._specs.get(duty.origin, {}).get("generation", 0)}

    def snapshot(self, decision: Decision) -> dict[str, Any] | None:
        """See `pipeline.Duties`."""
        if decision.device not in self._held:
            return None
        engine = self.engine(decision.device)
        rule = next((rule for rule in engine.rules.rules if rule.id == decision.rule), None)
        if rule is None or (rule.each and not rule.for_ms and not rule.cooldown_ms):
            return None  # it has neither latch nor timer
        return engine.export_device(decision.device, self._now())

    def hand_over(self, device: str, state: dict[str, Any] | None = None) -> None:
        """See `pipeline.Duties`."""
        self._hand_over(device, state)

    def sending(self, device: str, fence: int) -> tuple[str, int]:
        """See `pipeline.Duties`."""
        if device == self._host:
            return OURS, 0
        now = self._now()
        duty = self.member.may_send(device, now)
        if duty is not None:
            return (OURS, duty.fence) if fence in (0, duty.fence) else (OTHERS, 0)
        standing = self.member.standing(device, now)
        table = self.member.table
        if fence and standing != OTHERS and table is not None and (given := table.duties.get(device)) is not None and given.fence != fence:
            return OTHERS, 0  # ours again, after somebody else's
        return standing, 0

    def replied(self, device: str, message: dict[str, Any]) -> bool:
        """See `pipeline.Duties`."""
        if message["fence"] and message["reason"] == "fenced":
            self._runtime.metrics.inc("commands_fenced_total")
            self.link.outdone(message["fence"])
        if message["id"].startswith(f"{self._edge}."):
            return True
        return not _DECISION_ID.match(message["id"]) and self.sending(device, 0)[0] == OURS

    def server(self, device: str) -> str:
        """See `pipeline.Duties`."""
        return self.member.server(device) or "another edge"

    def together(self) -> AbstractContextManager[None]:
        """See `pipeline.Duties`."""
        return self._runtime.bus.together() if self._runtime.bus is not None else nullcontext()

    # -- what the member decides ---------------------------------------------------------------------------------------------

    def start(self, duties: dict[str, Duty]) -> None:
        """See `site.link.Effects`."""
        mono_ms = self._now()
        runs = {key: duty for key, duty in duties.items() if is_workload(key)}
        if runs and self.workloads is not None:
            self.workloads.start(runs)
        duties = {device: duty for device, duty in duties.items() if device not in runs}
        fresh = {device: duty for device, duty in duties.items() if self._held.get(device) != duty}
        before = {device: state["edge"] for device in fresh if (state := self._states.get(device)) is not None}
        with self.together():
            for device, duty in fresh.items():
                self._take_over(device, duty, mono_ms)
                self._hand_over(device, None)
        if fresh:
            self._tell("taken", ({"device": device, "origin": duty.origin, "fence": duty.fence, "from": before.get(device, "")} for device, duty in fresh.items()))
        self._flush()
        self._runtime.pipeline.send_waiting()
        self._announce()

    def _take_over(self, device: str, duty: Duty, mono_ms: int) -> None:
        state = self._states.get(device)
        self._held[device] = duty
        engine = self.engine(device)
        if state is None or (state["edge"] == self._edge and duty.origin == self._edge and device not in self._left):
            return  # what the journal gave back at boot is at least as new
        engine.forget(device)
        engine.import_state(state["state"], mono_ms)
        if state["twin"] and state["edge"] != self._edge:
            try:
                self._runtime.pipeline.adopt(device, state["twin"])
            except ContractError as error:
                self._runtime.metrics.inc("twin_rejected_total", reason=error.reason)
                log.error("the twin of %s as %s left it was refused: %s", device, state["edge"], error)

    def release(self, duties: dict[str, Duty], done: Callable[[], None]) -> None:
        """See `site.link.Effects`."""

        def finished(_record: Record) -> None:
            with self.together():
                for device, duty in duties.items():
                    if self._held.get(device) == duty:  # else an earlier table had taken it already
                        self._hand_over(device, None, released=True)
                        self.engine(device).forget(device)
                        self._left.add(device)
                        del self._held[device]
                done()
            self._announce()

        # Decisions become durable in their order, so when this record is, the commands of all that was decided before are out.
        self._tell("released", ({"device": device, "origin": duty.origin, "fence": duty.fence, "to": self.member.server(device)} for device, duty in duties.items()), finished)

    def vacate(self, duties: dict[str, Duty], done: Callable[[], None]) -> None:
        """See `site.link.Effects`."""
        if self.workloads is not None:
            self.workloads.vacate(duties, done)

    def load(self, edge: str, load: dict[str, Any]) -> None:
        """See `site.link.Effects`."""
        if edge == self._edge and (self.workloads is None or self.workloads.known):
            if self.workloads is None and (load["entries"] or load["capacity"]):  # workloads are not enabled any more
                self.link.say("load", edge, {"edge": edge, "generation": load["generation"]})
            return
        loads = self.shift().loads
        if edge in loads or len(loads) < MAX_SITE_MEMBERS:
            loads[edge] = load
            if self.workloads is not None:
                self.workloads.heard()

    def shift(self) -> "Shift":
        """Who runs which workload: there from the first that a member tells of."""
        if self._shift is None:
            from .workloads.cutoff import Shift

            self._shift = Shift()
            self.member.place = self._shift.place
        return self._shift

    def resume(self) -> None:
        """See `site.link.Effects`."""
        self._flush()
        self._runtime.pipeline.send_waiting()

    def forget(self) -> None:
        """See `site.link.Effects`."""
        self._dropped(len(self._waiting))
        self._waiting.clear()

    def moved(self) -> None:
        """See `site.link.Effects`."""
        self._flush()

    def elected(self, number: int) -> None:
        """See `site.link.Effects`."""
        self._journal.append("event", "site", {"what": "elected", "number": number})

    def spec(self, edge: str, spec: dict[str, Any]) -> None:
        """See `site.link.Effects`."""
        if edge not in self._specs and len(self._specs) >= MAX_SITE_MEMBERS:
            return
        self._specs[edge] = spec
        if edge in self._standins:
            rules, models = self._rules_of(edge)
            self._standins[edge].replace_models(models)
            self._standins[edge].replace_rules(rules)

    def handed(self, state: dict[str, Any]) -> None:
        """See `site.link.Effects`."""
        device = state["device"]
        known = self._states.get(device)
        if (known is None and len(self._states) >= MAX_SITE_DEVICES) or (known is not None and known["fence"] > state["fence"]):
            return  # an edge that was replaced and did not know it yet
        self._states[device] = state

    # -- specs and engines ---------------------------------------------------------------------------------------------------

    def tell_spec(self) -> None:
        """Publish what a sibling needs to stand in for us, where it has changed."""
        runtime = self._runtime
        body = {
            "edge": self._edge, "generation": runtime.desired.generation if runtime.desired else 0, "rules": runtime.desired_state.rule_documents, "duties": list(self.member.duties),
            "models": {name: model.manifest.sha256 for name, model in runtime.desired_state.models.items()}, "small_models": self._small_models(),
        }
        text = jsoncodec.encode(body).encode()
        if len(text) > MAX_MESSAGE_BYTES - 1024:
            log.error("the rules are over %d bytes: no sibling can stand in for this edge", MAX_MESSAGE_BYTES)
            self._journal.append("event", "site", {"what": "held back", "number": self.member.number, "rules": [{"rule": "*", "reason": f"over {MAX_MESSAGE_BYTES} bytes together"}]})
        elif text != self._told_spec and self.link.say("spec", self._edge, body):
            self._told_spec = text

    def _small_models(self) -> list[dict[str, Any]]:
        small, left = [], SMALL_MODELS_CHARS
        for entry in sorted(self._runtime.desired.models if self._runtime.desired else (), key=lambda entry: len(entry["data_b64"])):
            left -= len(entry["data_b64"])
            if left < 0:
                break
            small.append({"manifest": entry["manifest"], "data_b64": entry["data_b64"]})
        return small

    def _borrow(self, spec: dict[str, Any], wanted: set[str]) -> None:
        """Load the models of `spec` with these digests; one that cannot be loaded is left out, and its rules are held back."""
        from .decisions.models import ModelError, ModelStore

        for entry in spec["small_models"]:
            digest = str(entry["manifest"].get("sha256", ""))
            if digest in wanted and digest not in self._lent and len(self._lent) < MAX_MODELS * MAX_SITE_MEMBERS:
                try:
                    store = ModelStore(Path(self._runtime.config.data_dir) / "site-models")
                    kept = store.put(jsoncodec.encode(entry["manifest"]).encode(), base64.b64decode(entry["data_b64"], validate=True))
                    self._lent[kept.sha256] = store.load(kept.sha256)
                except (ModelError, OSError, ValueError) as error:
                    log.error("a model of %s cannot be used here: %s", spec["edge"], error)

    def _standin(self, origin: str) -> DecisionEngine:
        engine = self._standins.get(origin)
        if engine is None:
            engine = self._standins[origin] = self._runtime.surroundings.engine(*self._rules_of(origin))
        return engine

    def _rules_of(self, origin: str) -> tuple[RuleSet, dict[str, Any]]:
        """The rules of a sibling that can be decided here, and our models under its names; what cannot be is journalled."""
        spec = self._specs.get(origin)
        held: list[dict[str, str]] = []
        if spec is None:
            held.append({"rule": "*", "reason": f"{origin} has said nothing of its rules on this bus"})
            rules = RuleSet(())
        else:
            try:
                rules = parse_rules(spec["rules"])
            except RuleError as error:
                held.append({"rule": "*", "reason": str(error)[:300]})
                rules = RuleSet(())
        ours = {model.manifest.sha256: model for model in self._runtime.desired_state.models.values()}
        if spec is not None and spec["small_models"] and (wanted := {spec["models"][name] for name in rules.models if name in spec["models"]} - set(ours)):
            self._borrow(spec, wanted)
            ours = {**self._lent, **ours}
        models = {name: ours[digest] for name, digest in (spec or {"models": {}})["models"].items() if digest in ours}
        able = []
        for rule in rules.rules:
            missing = sorted(RuleSet((rule,)).models - set(models))
            if missing:
                held.append({"rule": rule.id, "reason": f"model {', '.join(missing)} is not here"})
            else:
                able.append(rule)
        if held:
            log.error("standing in for %s without: %s", origin, held)
            self._journal.append("event", "site", {"what": "held back", "number": self.member.number, "origin": origin, "rules": held[:EVENT_DUTIES]})
        return RuleSet(tuple(able)), models

    # -- shared --------------------------------------------------------------------------------------------------------------

    def _now(self) -> int:
        return self._runtime.clock.mono_ms()

    def _dropped(self, count: int) -> None:
        if count:
            self._runtime.metrics.inc("site_dropped_messages_total", count)

    def _flush(self) -> None:
        """Take what waited for a duty that is ours now; drop what has become another's."""
        if not self._waiting:
            return
        now, taken = self._now(), False
        waiting, self._waiting = self._waiting, deque()
        for device, take in waiting:
            standing = self.member.standing(device, now)
            if standing == OURS:
                take()
                taken = True
            elif standing == OTHERS:
                self._dropped(1)
            else:
                self._waiting.append((device, take))
        if taken:
            self._runtime.pipeline.batch_end()
            self._runtime.pipeline.batch_sent()

    def _hand_over(self, device: str, state: dict[str, Any] | None, released: bool = False) -> None:
        duty = self.member.may_send(device, self._now())
        if duty is None:
            return
        known = self._runtime.registry.devices.get(device)
        body = {
            "edge": self._edge, "device": device, "origin": duty.origin, "fence": duty.fence, "released": released,
            "state": state if state is not None else self.engine(device).export_device(device, self._now()), "twin": known.to_state() if known is not None else {},
        }
        if len(jsoncodec.encode(body)) > MAX_DUTY_BYTES - 1024:
            body["twin"] = {}
        self.link.say("duty", device, body)

    def _tell(self, what: str, duties: Iterable[dict[str, Any]], on_durable: Callable[[Record], None] | None = None) -> None:
        """Journal duties; `on_durable` after the last record."""
        told = list(duties)
        for start in range(0, max(1, len(told)), EVENT_DUTIES):
            last = start + EVENT_DUTIES >= len(told)
            body = {"what": what, "number": self.member.number, "duties": told[start : start + EVENT_DUTIES]}
            self._journal.append("event", "site", body, on_durable if last else None)

    def _announce(self) -> None:
        if self._runtime.uplink is not None:
            self._runtime.uplink.announce("duties")

    def admit_now(self, device: str) -> bool:
        """Whether a reading of the device would be decided here at this moment."""
        return not self._leaving and self.member.standing(device, self._now()) == OURS

    # -- told to people ------------------------------------------------------------------------------------------------------

    def _serving(self) -> list[str]:
        """Devices of ours."""
        return sorted(device for device in self.member.started if not is_workload(device))

    def serves(self) -> dict[str, int]:
        """Our duties: device to fence."""
        return {device: self.member.started[device].fence for device in self._serving()} if self.member.leased(self._now()) else {}

    def problems(self) -> list[str]:
        """What is wrong, in words."""
        if self._runtime.bus is not None and self._runtime.bus.up and not self.member.leased(self._now()):
            return ["the site's bus does not return our heartbeats in time: nothing is done for shared devices"]
        return self.workloads.problems() if self.workloads is not None else []

    def to_json(self) -> dict[str, Any]:
        """The site as this member sees it."""
        table, now = self.member.table, self._now()
        return {
            "number": self.member.number, "leader": table.leader if table is not None else "", "leads": self.member.leads, "leased": self.member.leased(now),
            "serves": self.serves(), "waiting": len(self._waiting), "errors": list(self.link.errors),
            "members": {
                name: {"heard_seconds_ago": (now - peer.heard_ms) / 1000, "table": peer.heartbeat.table, "capacity": peer.heartbeat.capacity, "load": peer.heartbeat.load}
                for name, peer in sorted(self.member.peers.items())
            },
            "duties": {device: duty.edge for device, duty in table.duties.items() if not is_workload(device)} if table is not None else {},
            "workloads": {key.partition("/")[2]: duty.edge for key, duty in table.duties.items() if is_workload(key)} if table is not None else {},
        }

