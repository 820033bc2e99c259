"""The decision engine: readings in, decisions out. Pure: same rules, same readings, same times, same decisions.

A condition looks at the newest value of each metric of the device (devices often send their metrics apart), at windows, and at model
outputs. What a condition cannot evaluate (a missing value, text against a number, a model that fails) is false and counted; it never
touches another rule or device.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..contract.device_messages import Value
from ..contract.lean_dataclass import dataclass
from .detectors.bank import DetectorBank
from .rules import DETECTED, Action, Combination, Comparison, Condition, Rule, RuleSet, Silent
from .windows import Window

MAX_STATES = 4_096
"""(rule, device) pairs with a latch or timer; the one untouched for longest goes, counted."""

MAX_DEVICES = 4_096
"""Devices whose newest values are kept for conditions."""

MAX_WINDOWS = 4_096
"""Windows kept: at 5 KiB each at most 20 MiB, in practice far less."""

MAX_ERROR_KINDS = 256
"""Distinct (rule, reason) pairs counted; the rest is counted together."""

_TEMPLATE = re.compile(r"\{([A-Za-z_$][A-Za-z0-9_.:/-]{0,63})\}")
_NUMBERS = (int, float)


class Predictor(Protocol):
    """A model as the engine sees it."""

    def predict(self, values: Mapping[str, Any]) -> list[float]:
        """Outputs for the newest values of a device; raises ValueError where an input is missing or wrong."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision: the rule, the device that led to it, what it was (`fired`, `cleared`), every input looked at, what to do."""

    rule: str
    device: str
    outcome: str
    inputs: dict[str, Any]
    actions: tuple[Action, ...]


class _State:
    """Latch and timers of one rule for one device; monotonic milliseconds (below zero for what began before this boot), None for none."""

    __slots__ = ("active", "fired_ms", "true_since_ms")

    def __init__(self, active: bool = False, true_since_ms: int | None = None, fired_ms: int | None = None) -> None:
        self.active = active
        self.true_since_ms = true_since_ms
        self.fired_ms = fired_ms


class _Device:
    """The newest values of one device and when it last spoke."""

    __slots__ = ("rules", "seen_ms", "values")

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self.seen_ms = 0
        self.rules: tuple[Rule, ...] | None = None


class DecisionEngine:
    """Evaluates a `RuleSet` over readings.

    Args:
        rules: what to decide by.
        models: name to model, for `model` conditions.
    """

    def __init__(self, rules: RuleSet, models: Mapping[str, Predictor]) -> None:
        self._rules = rules
        self._models = dict(models)
        self._devices: OrderedDict[str, _Device] = OrderedDict()
        self._states: OrderedDict[tuple[str, str], _State] = OrderedDict()
        self._windows: OrderedDict[tuple[str, str, int], Window] = OrderedDict()
        self._outputs: dict[str, list[float] | None] = {}
        self.detectors = DetectorBank()
        self.errors: dict[str, int] = {}
        self.evicted = 0

    @property
    def rules(self) -> RuleSet:
        """The rules in force."""
        return self._rules

    def replace_models(self, models: Mapping[str, Predictor]) -> None:
        """Use other models from the next reading on."""
        self._models = dict(models)

    def replace_rules(self, rules: RuleSet) -> None:
        """Use other rules; a rule whose content is unchanged keeps its latches and timers."""
        old = {rule.id: rule.digest for rule in self._rules.rules}
        kept = {rule.id for rule in rules.rules if old.get(rule.id) == rule.digest}
        for key in [key for key in self._states if key[0] not in kept]:
            del self._states[key]
        wanted = {(metric, span) for rule in rules.rules for metric, span in rule.windows}
        for window in [key for key in self._windows if key[1:] not in wanted]:
            del self._windows[window]
        self._rules = rules
        self.detectors.keep_only(self.asks_detector)
        for device in self._devices.values():
            device.rules = None

    def asks_detector(self, device: str, metric: str) -> bool:
        """Whether a rule in force asks the detector of this metric."""
        return any(metric in rule.detectors and rule.matches(device) for rule in self._rules.rules)

    # -- deciding ------------------------------------------------------------------------------------------------------------

    def evaluate(self, device: str, values: Mapping[str, Value], mono_ms: int, at_ms: int | None = None) -> list[Decision]:
        """Decide on one reading.

        Args:
            values: metric to value; non-finite numbers are ignored and counted (detectors see them, as bad quality).
            mono_ms: monotonic milliseconds of the reading: windows and durations go by it.
            at_ms: when it was measured, milliseconds since 1970: detectors learn days and weeks by it, and it may jump. None: `mono_ms`.
        """
        known = self._devices.get(device)
        if known is None:
            known = self._devices[device] = _Device()
            if len(self._devices) > MAX_DEVICES:
                self._devices.popitem(last=False)
                self.evicted += 1
        else:
            self._devices.move_to_end(device)
        newest = known.values
        for metric, value in values.items():
            if type(value) is float and not math.isfinite(value):
                self._error("value", "nan")
            else:
                newest[metric] = value
        known.seen_ms = mono_ms
        rules = known.rules
        if rules is None:
            rules = known.rules = tuple(rule for rule in self._rules.rules if rule.matches(device))
        if not rules:
            return []
        self._outputs.clear()
        decisions: list[Decision] = []
        fed: set[tuple[str, int]] | None = None
        observed: set[str] | None = None
        for rule in rules:
            for metric, span in rule.windows:
                if fed is None:
                    fed = set()
                if (metric, span) not in fed:
                    fed.add((metric, span))
                    sample: Any = values.get(metric)
                    if type(sample) in _NUMBERS and math.isfinite(sample):
                        self._window(device, metric, span).add(sample, mono_ms)
            for metric in rule.detectors:
                if observed is None:
                    observed = set()
                if metric not in observed:
                    observed.add(metric)
                    sample = values.get(metric)
                    if type(sample) in _NUMBERS and not self.detectors.observe(device, metric, mono_ms if at_ms is None else at_ms, sample, mono_ms):
                        self._error(rule.id, "too many detectors")
        for rule in rules:
            if rule.metric and rule.metric not in values:
                continue
            decision = self._judge(rule, device, known, mono_ms)
            if decision is not None:
                decisions.append(decision)
        return decisions

    def tick(self, mono_ms: int, only: Callable[[str], bool] | None = None) -> list[Decision]:
        """Decide what only time decides: `for` that has run its course, devices that fell silent; `only` says for which devices."""
        timed = [rule for rule in self._rules.rules if rule.needs_tick]
        if not timed:
            return []
        decisions = []
        self._outputs.clear()
        for device, known in self._devices.items():
            if only is not None and not only(device):
                continue
            for rule in timed:
                if not rule.matches(device):
                    continue
                if not rule.each or rule.for_ms:
                    self._outputs.clear()
                    decision = self._judge(rule, device, known, mono_ms)
                    if decision is not None:
                        decisions.append(decision)
        return decisions

    def _judge(self, rule: Rule, device: str, known: _Device, now: int) -> Decision | None:
        inputs: dict[str, Any] = {}
        state = self._states.get((rule.id, device))
        if state is not None and state.active:
            if rule.clear is not None:
                over = self._holds(rule.clear, rule, device, known, now, inputs)
            else:
                over = not self._holds(rule.condition, rule, device, known, now, inputs)
            if not over:
                return None
            state.active, state.true_since_ms = False, None
            return Decision(rule.id, device, "cleared", inputs, ())
        if not self._holds(rule.condition, rule, device, known, now, inputs):
            if state is not None:
                state.true_since_ms = None
            return None
        if state is None:
            if rule.each and not rule.for_ms and not rule.cooldown_ms:
                return self._fire(rule, device, known, inputs)
            state = self._state(rule.id, device)
        if state.true_since_ms is None:
            state.true_since_ms = now
        if rule.for_ms and now - state.true_since_ms < rule.for_ms:
            return None
        if rule.cooldown_ms and state.fired_ms is not None and now - state.fired_ms < rule.cooldown_ms:
            return None
        state.fired_ms = now
        if not rule.each:
            state.active = True
        else:
            state.true_since_ms = now if rule.for_ms else None
        return self._fire(rule, device, known, inputs)

    def _fire(self, rule: Rule, device: str, known: _Device, inputs: dict[str, Any]) -> Decision:
        return Decision(rule.id, device, "fired", inputs, tuple(_resolve(action, rule.id, device, known.values) for action in rule.actions))

    def _holds(self, condition: Condition, rule: Rule, device: str, known: _Device, now: int, inputs: dict[str, Any]) -> bool:
        if type(condition) is Comparison:
            return self._compare(condition, rule, device, known, now, inputs)
        if type(condition) is Combination:
            if condition.kind == "all":
                for part in condition.parts:
                    if not self._holds(part, rule, device, known, now, inputs):
                        return False
                return True
            if condition.kind == "any":
                for part in condition.parts:
                    if self._holds(part, rule, device, known, now, inputs):
                        return True
                return False
            return not self._holds(condition.parts[0], rule, device, known, now, inputs)
        assert isinstance(condition, Silent)
        silent = now - known.seen_ms
        if silent >= condition.span_ms:
            inputs["silent_ms"] = silent
            return True
        return False

    def _compare(self, item: Comparison, rule: Rule, device: str, known: _Device, now: int, inputs: dict[str, Any]) -> bool:
        left: Any
        if item.kind == "value":
            left = known.values.get(item.name)
            if left is None:
                return False
            inputs[item.name] = left
        elif item.kind == "window":
            window = self._windows.get((device, item.name, item.span_ms))
            found = window.statistic(item.statistic, now) if window is not None else None
            if found is None or found[1] < item.min_count:
                return False
            left = found[0]
            inputs[f"{item.statistic}({item.name},{item.span_ms}ms)"] = {"value": left, "count": found[1]}
        elif item.kind in DETECTED:
            return self._detected(item, rule, device, known, inputs)
        else:
            output = self._ask(item.name, rule, known)
            if output is None or item.output >= len(output):
                return False
            left = output[item.output]
            manifest = getattr(self._models[item.name], "manifest", None)
            inputs[f"model:{item.name}"] = {"output": output, "sha256": getattr(manifest, "sha256", "")}
        than = item.than
        if item.than_metric:
            than = known.values.get(item.than_metric)
            if than is None:
                return False
            inputs[item.than_metric] = than
        if type(left) is not type(than) and item.op not in ("in", "between") and not (
            type(left) in _NUMBERS and type(than) in _NUMBERS
        ):
            self._error(rule.id, "type")
            return False
        try:
            return item.test(left, than)
        except TypeError:
            self._error(rule.id, "type")
            return False

    def _detected(self, item: Comparison, rule: Rule, device: str, known: _Device, inputs: dict[str, Any]) -> bool:
        """A condition that asks the detector of its metric; its answer is among the inputs."""
        detector = self.detectors.get(device, item.name)
        newest = detector.newest if detector is not None else None
        if detector is None or newest is None:
            return False
        than = item.than
        if item.than_metric:
            than = known.values.get(item.than_metric)
            if than is None:
                return False
            if type(than) not in _NUMBERS:
                self._error(rule.id, "type")
                return False
            inputs[item.than_metric] = than
        if item.kind == "forecast":
            crossing = detector.time_to(than, rising=item.op[0] == ">", within_ms=item.span_ms)
            if crossing is None:
                return False
            inputs[f"forecast({item.name}{item.op}{than:g})"] = {
                "value": newest.value, "in_ms": crossing.in_ms, "earliest_ms": crossing.earliest_ms, "latest_ms": crossing.latest_ms, "within_ms": item.span_ms,
            }
            return crossing.in_ms <= item.span_ms
        quality = newest.quality_within(item.low, item.high) if item.kind == "quality" else newest.quality
        inputs[f"anomaly({item.name})"] = {"value": newest.value, "score": newest.score, "quality": quality, "expected": newest.expected}
        return item.test(quality if item.kind == "quality" else newest.score, than)

    def _ask(self, name: str, rule: Rule, known: _Device) -> list[float] | None:
        if name in self._outputs:
            return self._outputs[name]
        model = self._models.get(name)
        output: list[float] | None = None
        if model is None:
            self._error(rule.id, "no model")
        else:
            try:
                output = model.predict(known.values)
            except Exception as error:  # a model is foreign code: whatever it raises is this condition's problem only
                self._error(rule.id, type(error).__name__)
        self._outputs[name] = output
        return output

    # -- state ---------------------------------------------------------------------------------------------------------------

    def _state(self, rule: str, device: str) -> _State:
        key = (rule, device)
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = _State()
            if len(self._states) > MAX_STATES:
                self._states.popitem(last=False)
                self.evicted += 1
        return state

    def _window(self, device: str, metric: str, span_ms: int) -> Window:
        key = (device, metric, span_ms)
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = Window(span_ms)
            if len(self._windows) > MAX_WINDOWS:
                self._windows.popitem(last=False)
                self.evicted += 1
        return window

    def _error(self, rule: str, reason: str) -> None:
        key = f"{rule}:{reason}"
        if key not in self.errors and len(self.errors) >= MAX_ERROR_KINDS:
            key = "other"
        self.errors[key] = self.errors.get(key, 0) + 1

    def latch(self, rule: str, device: str, active: bool) -> None:
        """Set a latch as a journalled decision left it (at boot, for decisions newer than the kept state)."""
        for known in self._rules.rules:
            if known.id == rule and not known.each:
                self._state(rule, device).active = active

    def export_device(self, device: str, mono_ms: int) -> dict[str, Any]:
        """`export_state` of one device only."""
        digests = {rule.id: rule.digest for rule in self._rules.rules if (rule.id, device) in self._states}
        states = [
            [rule, device, state.active, _ran(mono_ms, state.true_since_ms), _ran(mono_ms, state.fired_ms)]
            for rule in digests if (state := self._states[rule, device]).active or state.true_since_ms is not None or state.fired_ms is not None
        ]
        return {"rules": digests, "states": states} if states else {}

    def forget(self, device: str) -> None:
        """Another engine decides on this device from now on: values, latches, timers and windows go; what its detectors learned stays."""
        self._devices.pop(device, None)
        for state in [key for key in self._states if key[1] == device]:
            del self._states[state]
        for window in [key for key in self._windows if key[0] == device]:
            del self._windows[window]

    def export_state(self, mono_ms: int) -> dict[str, Any]:
        """Latches and timers as JSON; times as milliseconds already run, since monotonic time starts anew at boot."""
        digests = {rule.id: rule.digest for rule in self._rules.rules}
        return {
            "rules": digests,
            "states": [
                [rule, device, state.active, _ran(mono_ms, state.true_since_ms), _ran(mono_ms, state.fired_ms)]
                for (rule, device), state in self._states.items()
                if state.active or state.true_since_ms is not None or state.fired_ms is not None
            ],
        }

    def import_state(self, state: Mapping[str, Any], mono_ms: int) -> None:
        """Take back what `export_state` gave; what does not fit today's rules is left out."""
        digests = {rule.id: rule.digest for rule in self._rules.rules}
        known = state.get("rules")
        entries = state.get("states")
        if not isinstance(known, dict) or not isinstance(entries, list):
            return
        for entry in entries[:MAX_STATES]:
            if not isinstance(entry, list) or [type(part) for part in entry] != [str, str, bool, int, int] or known.get(entry[0]) != digests.get(entry[0], ""):
                continue
            rule, device, active, true_for, fired_ago = entry
            made = self._state(rule, device)
            made.active = active
            made.true_since_ms = mono_ms - true_for if true_for >= 0 else None
            made.fired_ms = mono_ms - fired_ago if fired_ago >= 0 else None


def _ran(now_ms: int, since_ms: int | None) -> int:
    """Milliseconds since, -1 for none."""
    return -1 if since_ms is None else max(0, now_ms - since_ms)


def _resolve(action: Action, rule: str, device: str, values: Mapping[str, Value]) -> Action:
    """An action for one decision: `$device` and `$value:metric` replaced, text filled."""
    detail = dict(action.detail)
    if detail.get("device") == "$device":
        detail["device"] = device
    if action.kind == "alert":
        names: dict[str, Any] = {**values, "device": device, "rule": rule}
        # Only whole names are replaced; no format language, so text from a hub cannot reach into objects.
        detail["text"] = _TEMPLATE.sub(lambda match: str(names.get(match[1], match[0]))[:128], detail["text"])
    else:
        key = "args" if action.kind == "command" else "set"
        detail[key] = {
            name: values.get(item[7:]) if type(item) is str and item.startswith("$value:") else item for name, item in detail[key].items()
        }
    return Action(action.kind, detail)
