"""Sense, decide, act: the path of a reading to its effect, every step journalled before the next.

    reading -> registry -> engine -> journal (decision) -> durable -> effect (command, alert, twin)
                        \\-> journal (telemetry) -> durable -> the device's message is acknowledged
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from .clock import JUMP_MS, Clock, Stamp
from .contract import jsoncodec
from .contract.device_messages import Reading, Value
from .contract.errors import ContractError
from .contract.operations import Operation
from .contract.records import Record
from .decisions.engine import Decision, DecisionEngine
from .devices.registry import Device, DeviceRegistry
from .journal import Journal
from .metrics import Metrics

log = logging.getLogger(__name__)

MAX_OUTSTANDING = 2_000
"""Commands sent and not acknowledged by the bus, or waiting for it: a bus that is away for long must not fill the memory. The
oldest is expired, recorded."""

DEFAULT_EXPIRY_MS = 60_000
"""How long a command without an expiry of its own may wait for the bus."""

TAKEN_MAX = 200
"""Messages whose readings wait for their decisions' commit: as many as one read of the bus brings."""

REPLAY_MAX = 10_000
"""Decisions looked at after a crash for effects that were not confirmed; more cannot be unexpired."""

Done = Callable[[], None]


class Publish(Protocol):
    """The bus's `publish`."""

    def __call__(self, device: str, leaf: str, payload: bytes, *, retain: bool = False, expiry_s: int | None = None, on_ack: Done | None = None) -> bool:
        """See `Bus.publish`."""


class Duties(Protocol):
    """Which devices are ours to act on, where several edges share them; see `site_wiring`."""

    def admit(self, device: str, take: Callable[[], None], done: Done) -> bool:
        """Whether a message of `device` is taken now. Where not, it is called with `take` later, or dropped; `done` is seen to."""

    def engine(self, device: str) -> DecisionEngine:
        """What decides on `device`."""

    def tick(self, mono_ms: int) -> list[Decision]:
        """What only time decides, on our devices."""

    def tag(self, device: str) -> dict[str, Any]:
        """What the journal says of a decision on `device` besides: `fence`, and `for` and that edge's `generation` where another is stood in for."""

    def snapshot(self, decision: Decision) -> dict[str, Any] | None:
        """The hand-over state of its device as this decision left it, None where nothing of it has changed."""

    def hand_over(self, device: str, state: dict[str, Any] | None = None) -> None:
        """Publish the hand-over state of `device`; None takes what it is now."""

    def sending(self, device: str, fence: int) -> tuple[str, int]:
        """Whether a command of the duty `device` may go out now: `ours` and the fence to send, `waits`, or `others` and 0."""

    def replied(self, device: str, message: dict[str, Any]) -> bool:
        """Whether the reply to a command is ours to journal."""

    def server(self, device: str) -> str:
        """Who serves the device, in words."""

    def together(self) -> AbstractContextManager[None]:
        """What is published inside goes out in one write."""


class _Countdown:
    """Calls `done` when it has been called `count` times (once per record of a message)."""

    __slots__ = ("count", "done")

    def __init__(self, count: int, done: Done) -> None:
        self.count = count
        self.done = done

    def __call__(self, _record: Record) -> None:
        self.count -= 1
        if self.count == 0:
            self.done()


class _Command:
    """A command on its way to a device.

    It is for so long by the monotonic clock (`until_ms`), where we decided it: a wall clock that is set between the decision and its sending, as on a board that learns the time, ends nothing. Where a hub wants it, or it was
    decided before the agent was started again (`until_ms` 0), only the wall clock can say.
    """

    __slots__ = ("again", "args", "device", "duty", "expires_ms", "fence", "id", "name", "sent", "seq", "until_ms")

    def __init__(
        self, id_: str, device: str, name: str, args: dict[str, Any], expires_ms: int, seq: int, again: bool = False, duty: str = "", fence: int = 0, until_ms: int = 0,
    ) -> None:
        self.id = id_
        self.device = device
        self.name = name
        self.args = args
        self.expires_ms = expires_ms
        self.seq = seq
        self.again = again
        self.duty = duty
        self.fence = fence
        self.until_ms = until_ms
        self.sent = False

    def left_ms(self, now: Stamp) -> int:
        """How long it may still be sent. Where the wall clock was set since, what the device is told is by the clock as it is now."""
        if not self.until_ms:
            return self.expires_ms - now.wall_ms
        left = self.until_ms - now.mono_ms
        if abs(self.expires_ms - now.wall_ms - left) > JUMP_MS:
            self.expires_ms = now.wall_ms + left
        return left

    def payload(self) -> bytes:
        body: dict[str, Any] = {"id": self.id, "name": self.name, "args": self.args, "expires_ms": self.expires_ms}
        if self.again:
            body["again"] = True
        if self.fence:
            body |= {"duty": self.duty, "fence": self.fence}
        return jsoncodec.encode(body).encode()


class Pipeline:
    """Wires registry, engine, journal and bus together.

    Args:
        offline: whether the hub is out of reach now.
        publish: sends to a device on the local bus, False where the bus is not there; None where no bus is configured.
    """

    def __init__(
        self, edge: str, journal: Journal, clock: Clock, metrics: Metrics, registry: DeviceRegistry, engine: DecisionEngine, *,
        offline: Callable[[], bool], publish: Publish | None,
    ) -> None:
        self._edge = edge
        self._journal = journal
        self._clock = clock
        self._metrics = metrics
        self.registry = registry
        self.engine = engine
        self._offline = offline
        self._publish = publish
        self.generation = 0
        self.decided = 0
        self.decided_offline = 0
        self.readings_taken = 0
        self.duties: Duties | None = None
        """Set where devices are shared with other edges."""
        self.command_source: Callable[[str, str], None] = lambda _id, _state: None
        self._commands: OrderedDict[str, _Command] = OrderedDict()
        self._open_effects: dict[int, int] = {}
        self._last_decision = journal.durable("decision")
        self._taken: list[tuple[str, list[Reading], Stamp, _Countdown]] = []

    # -- sensing -------------------------------------------------------------------------------------------------------------

    def readings(self, device: str, readings: list[Reading], done: Done) -> None:
        """Readings of one message, in order; `done` once all that came of them is durable."""
        if self.duties is not None and not self.duties.admit(device, lambda: self.readings(device, readings, _nothing), done):
            return
        self._read(device, readings, done)

    def _read(self, device: str, readings: list[Reading], done: Done) -> None:
        stamp = self._clock.stamp()
        kept: list[Reading] = []
        for reading in readings:
            found, fresh = self.registry.seen(device, reading, stamp.mono_ms)
            if fresh and found is not None:
                self._registered(found, 0)
            if found is not None:
                kept.append(reading)
        self._take(device, kept, stamp, done)

    def _take(self, device: str, readings: list[Reading], stamp: Stamp, done: Done) -> None:
        decisions: list[Decision] = []
        engine = self.engine if self.duties is None else self.duties.engine(device)
        for reading in readings:
            decisions += engine.evaluate(device, reading.values, stamp.mono_ms, stamp.wall_ms if reading.device_ms is None else reading.device_ms)
        self.readings_taken += len(readings)
        count = _Countdown(len(readings) + len(decisions), done)
        if not count.count:
            done()
            return
        for decision in decisions:
            self._decide(decision, stamp, count)
        # Written down after the decisions that they led to are committed: nothing acts on telemetry.
        self._taken.append((device, readings, stamp, count))
        if len(self._taken) >= TAKEN_MAX:
            self._keep_telemetry()

    def _keep_telemetry(self) -> None:
        taken, self._taken = self._taken, []
        for device, readings, stamp, count in taken:
            for reading in readings:
                body: dict[str, Any] = {"device": device, "values": reading.values}
                if reading.device_ms is not None:
                    body["device_ms"] = reading.device_ms
                try:
                    kept = self._journal.append("telemetry", "reading", body, count, stamp)
                except ContractError as error:
                    # The contract lets no such reading through; were there one, it must not take the others of this turn with it.
                    self._metrics.inc("device_rejected_messages_total", reason=error.reason)
                    self.refused(device, error)
                    kept = False
                if not kept:
                    count(_REFUSED)

    def host_reading(self, device: str, values: dict[str, Value]) -> None:
        """A reading of the host itself: nobody waits for it, and it is nobody's but ours."""
        self._read(device, [Reading(values)], _nothing)
        self._keep_telemetry()

    def tick(self) -> None:
        """Let time-driven rules decide (durations, silence)."""
        stamp = self._clock.stamp()
        for decision in self.engine.tick(stamp.mono_ms) if self.duties is None else self.duties.tick(stamp.mono_ms):
            self._decide(decision, stamp, _nobody_waits)

    # -- deciding ------------------------------------------------------------------------------------------------------------

    def _decide(self, decision: Decision, stamp: Stamp, count: Callable[[Record], None]) -> None:
        offline = self._offline()
        body: dict[str, Any] = {
            "rule": decision.rule, "device": decision.device, "outcome": decision.outcome, "inputs": decision.inputs,
            "actions": [action.to_json() for action in decision.actions], "generation": self.generation, "offline": offline,
        }

        handed: dict[str, Any] | None = None
        if self.duties is not None:
            body |= self.duties.tag(decision.device)
            handed = self.duties.snapshot(decision)
        fence = body.get("fence", 0)

        def durable(record: Record) -> None:
            if self.duties is None:
                self._act(record, decision, fence)
            else:
                with self.duties.together():  # a kill leaves both or neither: who takes over knows of a latch whose command is out
                    if handed is not None:
                        self.duties.hand_over(decision.device, handed)
                    self._act(record, decision, fence)
            count(record)

        try:
            self._journal.append("decision", "decision", body, durable, stamp)
        except ContractError as error:
            self._metrics.inc("decision_rejected_total", reason=error.reason)
            log.error("a decision of rule %s could not be journalled: %s", decision.rule, error)
            count(_REFUSED)
            return
        self.decided += 1
        if offline:
            self.decided_offline += 1

    # -- acting --------------------------------------------------------------------------------------------------------------

    def _act(self, record: Record, decision: Decision, fence: int) -> None:
        self._last_decision = max(self._last_decision, record.seq)
        commands = 0
        for number, action in enumerate(decision.actions):
            detail = action.to_json()
            if action.kind == "command":
                commands += 1
                self._open_effects[record.seq] = self._open_effects.get(record.seq, 0) + 1
                self._command(self._command_of(record, number, detail["command"], decision.device, fence))
            elif action.kind == "alert":
                alert = detail["alert"]
                self._metrics.inc("alerts_total", severity=alert["severity"])
                self._journal.append("event", "alert", {
                    "rule": decision.rule, "device": decision.device, "severity": alert["severity"], "text": alert["text"], "decision": record.seq,
                })
            elif action.kind == "desired":
                try:
                    self.desire(detail["desired"]["device"], detail["desired"]["set"])
                except ContractError as error:  # a twin or registry that is full must not stop the other actions
                    self._metrics.inc("twin_rejected_total", reason=error.reason)
                    log.error("a twin that rule %s sets was refused: %s", decision.rule, error)
        if not commands:
            self._effects_settled()

    def _command_of(self, record: Record, number: int, detail: dict[str, Any], duty: str, fence: int, again: bool = False) -> _Command:
        lasts_ms = int(detail.get("expires_ms") or DEFAULT_EXPIRY_MS)
        # The boot is part of the id: a record that was acted on but never became durable must not share its id with a later one.
        return _Command(
            f"{self._edge}.{record.boot[:8]}.{record.seq}.{number}", detail["device"], detail["name"], detail.get("args") or {}, record.wall_ms + lasts_ms, record.seq, again,
            duty if fence else "", fence, 0 if again else record.mono_ms + lasts_ms,
        )

    def _command(self, command: _Command) -> None:
        if len(self._commands) >= MAX_OUTSTANDING:
            _, oldest = self._commands.popitem(last=False)
            self._expired(oldest, "too many commands wait for the bus")
        self._commands[command.id] = command
        self._send(command)

    def _send(self, command: _Command) -> None:
        if self._publish is None:
            self._commands.pop(command.id, None)
            self._expired(command, "no local bus is configured")
            return
        left_ms = command.left_ms(self._clock.stamp())
        if left_ms <= 0:
            self._commands.pop(command.id, None)
            self._expired(command, "expired before the bus took it")
            return
        if self.duties is not None and command.duty:
            # Here and not only where it was decided: a process that was stopped in between must not act when it goes on.
            standing, fence = self.duties.sending(command.duty, command.fence)
            if standing == "waits":
                return
            if standing == "others":
                self._commands.pop(command.id, None)
                self._expired(command, f"{command.duty} is served by {self.duties.server(command.duty)} now, not by this edge", "superseded")
                return
            command.fence = fence

        def acknowledged() -> None:
            if self._commands.pop(command.id, None) is not None:
                self._metrics.inc("commands_sent_total")
                self.command_source(command.id, "sent")
                self._settle(command.seq)

        command.sent = self._publish(
            command.device, "command", command.payload(), expiry_s=max(1, left_ms // 1000), on_ack=acknowledged
        )

    def _expired(self, command: _Command, reason: str, state: str = "expired") -> None:
        self._metrics.inc(f"commands_{state}_total")
        operation = Operation(command.id, "command", state, 0, "", reason, {"device": command.device, "name": command.name})
        self._journal.append("event", "operation", operation.to_json())
        self.command_source(command.id, state)
        self._settle(command.seq)

    def _settle(self, seq: int) -> None:
        if seq <= 0:
            return
        left = self._open_effects.get(seq, 0) - 1
        if left > 0:
            self._open_effects[seq] = left
        else:
            self._open_effects.pop(seq, None)
            self._effects_settled()

    def _effects_settled(self) -> None:
        # Dictionaries keep insertion order and decisions become durable in order, so the first open one is the oldest.
        oldest = next(iter(self._open_effects), None)
        self._journal.effects_done("decision", oldest - 1 if oldest is not None else self._last_decision)

    def batch_end(self) -> None:
        """What one read of the bus led to is one commit, made now."""
        self._journal.commit_now()

    def batch_sent(self) -> None:
        """The commands of that commit are on their way: time for the telemetry."""
        self._keep_telemetry()
        self._journal.breathe()

    def bus_up(self) -> None:
        """The bus is there: say every twin's desired state and send the commands that wait."""
        for device in self.registry.devices.values():
            if device.desired_version:
                self._publish_desired(device)
        for command in list(self._commands.values()):
            if command.sent:
                command.again = True
                command.sent = False
        self.send_waiting()

    def send_waiting(self) -> None:
        """Send the commands that have not gone out, as far as they may now."""
        for command in list(self._commands.values()):
            if not command.sent:
                self._send(command)

    async def replay(self, latched: int) -> int:
        """After a restart: send again what was decided and not confirmed, with the same ids, unless it has expired; set the latches
        of decisions after seq `latched` (what the kept engine state knows). Returns how many commands were sent again."""
        marks = self._journal.marks("decision")
        first = max(min(marks.effects, latched) + 1, marks.floor, marks.next_seq - REPLAY_MAX)
        count = 0
        while first < marks.next_seq:
            records, _ = await self._journal.read("decision", first, 500, 1 << 20)
            if not records:
                break
            for record in records:
                body = jsoncodec.decode(record.body.encode())
                if record.seq > latched and record.kind == "decision" and "for" not in body:
                    self.engine.latch(body.get("rule", ""), body.get("device", ""), body.get("outcome") == "fired")
                for number, detail in enumerate(body.get("actions", ()) if record.seq > marks.effects else ()):
                    if "command" in detail:
                        self._open_effects[record.seq] = self._open_effects.get(record.seq, 0) + 1
                        self._command(self._command_of(record, number, detail["command"], body.get("device", ""), body.get("fence", 0), again=True))
                        count += 1
            first = records[-1].seq + 1
        self._effects_settled()
        return count

    # -- twins and commands from above ---------------------------------------------------------------------------------------

    def desire(self, device_id: str, patch: dict[str, Any], replace: bool = False) -> bool:
        """Change a twin's desired state; kept, then published. True where it changed."""
        device = self.registry.desire(device_id, patch, replace)
        if device is None:
            return False
        self._journal.put_state(f"twin/{device.id}", device.to_state(), lambda: self._publish_desired(device, changed=True))
        return True

    def _publish_desired(self, device: Device, changed: bool = False) -> None:
        if self.duties is not None and self.duties.sending(device.id, 0)[0] != "ours":
            return  # said when the device is ours (again)
        if changed and self.duties is not None:
            self.duties.hand_over(device.id)
        if self._publish is not None:
            body = {"version": device.desired_version, "desired": device.desired}
            self._publish(device.id, "desired", jsoncodec.encode(body).encode(), retain=True)

    def order(self, command_id: str, device: str, name: str, args: dict[str, Any], expires_ms: int, again: bool = False) -> None:
        """Send a command that the hub wants; its record must be durable already."""
        self._command(_Command(command_id, device, name, args, expires_ms, 0, again, device if self.duties is not None else ""))

    def adopt(self, device: str, state: dict[str, Any]) -> None:
        """Take a device over as another edge left it, and say its desired state."""
        found = self.registry.adopt(device, state)
        self._journal.put_state(f"twin/{device}", found.to_state())
        if found.desired_version:
            self._publish_desired(found)

    # -- what devices say besides readings -----------------------------------------------------------------------------------

    def registered(self, device: str, message: dict[str, Any], done: Done) -> None:
        """A device said what it is; readings that came early follow at once."""
        if self.duties is not None and not self.duties.admit(device, lambda: self.registered(device, message, _nothing), done):
            return
        stamp = self._clock.stamp()
        found, changed, early = self.registry.register(device, message, stamp.mono_ms)
        if changed:
            self._registered(found, len(early))
            if self.duties is not None:
                self.duties.hand_over(device)
        for reading in early:
            self.registry.seen(device, reading, stamp.mono_ms)
        self._take(device, early, stamp, _nothing)
        self._keep_telemetry()
        self._journal.put_state(f"twin/{device}", found.to_state(), done)

    def _registered(self, device: Device, early: int) -> None:
        self._journal.put_state(f"twin/{device.id}", device.to_state())
        self._journal.append("event", "device.registered", {"device": device.id, "kind": device.kind, "name": device.name, "early": early})

    def reported(self, device: str, patch: Any, done: Done) -> None:
        """A device reported twin state."""
        if self.duties is not None and not self.duties.admit(device, lambda: self.reported(device, patch, _nothing), done):
            return
        changed = self.registry.report(device, patch)
        if changed is None:
            done()
            return
        self._journal.append("event", "twin.reported", {"device": device, "reported": changed.reported, "version": changed.reported_version})
        self._journal.put_state(f"twin/{device}", changed.to_state(), done)

    def result(self, device: str, message: dict[str, Any], done: Done) -> None:
        """A device replied to a command."""
        if self.duties is not None and not self.duties.replied(device, message):
            done()
            return
        operation = Operation(
            message["id"], "command", "succeeded" if message["ok"] else "failed", 0, "replied", message["reason"], {"device": device, "value": message["value"]}
        )
        self._metrics.inc("command_results_total", ok=str(message["ok"]).lower())
        self._journal.append("event", "operation", operation.to_json(), lambda _record: done())

    def refused(self, device: str, error: ContractError) -> None:
        """A message was refused; only its own device notices."""
        self.registry.failed(device, error, self._clock.mono_ms())


_REFUSED = Record(0, "", 0, 0, "unsynced", "", "")


def _nothing() -> None:
    """Nobody waits."""


def _nobody_waits(_record: Record) -> None:
    """A decision that no message waits for."""
