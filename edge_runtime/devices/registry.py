"""Who the devices are, what they last said, how they are meant to be. Pure: its owner journals what it returns.

Readings that come before a device is registered are kept, bounded, and handed out at registration.
"""

from collections import OrderedDict, deque
from typing import Any

from ..contract.device_messages import Reading, Value, check_object
from ..contract.errors import ContractError
from ..contract.lean_dataclass import dataclass, field
from ..contract.limits import MAX_METRICS

MAX_TWIN_PROPERTIES = 128
"""Properties of one twin: one journal record holds them."""

MAX_LAST_ERRORS = 50
"""Refused messages kept for a person to look at."""


def check_twin(properties: dict[str, Any], which: str) -> None:
    """Raise `ContractError` naming `which` where one side of a twin is over a limit."""
    if len(properties) > MAX_TWIN_PROPERTIES or any(len(key) > 64 for key in properties):
        raise ContractError(which, f"over {MAX_TWIN_PROPERTIES} properties, or a name over 64 characters", "send fewer or shorter ones", "limit")
    check_object(properties, which)


@dataclass(slots=True)
class Device:
    """One registered device. Times are monotonic milliseconds."""

    id: str
    kind: str = "generic"
    name: str = ""
    parent: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    last_seen_ms: int = 0
    readings: int = 0
    values: dict[str, Value] = field(default_factory=dict)
    reported: dict[str, Any] = field(default_factory=dict)
    reported_version: int = 0
    desired: dict[str, Any] = field(default_factory=dict)
    desired_version: int = 0
    errors: int = 0
    last_error: str = ""

    def twin(self) -> dict[str, Any]:
        """Desired, reported and where they differ."""
        delta = {key: value for key, value in self.desired.items() if self.reported.get(key) != value}
        return {
            "desired": self.desired, "desired_version": self.desired_version, "reported": self.reported,
            "reported_version": self.reported_version, "delta": delta,
        }

    def to_state(self) -> dict[str, Any]:
        """What is kept across restarts."""
        return {
            "kind": self.kind, "name": self.name, "parent": self.parent, "meta": self.meta, "reported": self.reported,
            "reported_version": self.reported_version, "desired": self.desired, "desired_version": self.desired_version,
        }

    def to_json(self, now_ms: int) -> dict[str, Any]:
        """What the API shows."""
        return {
            "id": self.id, "kind": self.kind, "name": self.name, "parent": self.parent, "meta": self.meta, "values": self.values,
            "readings": self.readings, "seen_seconds_ago": (now_ms - self.last_seen_ms) / 1000 if self.last_seen_ms else None,
            "twin": self.twin(), "errors": self.errors, "last_error": self.last_error,
        }


class DeviceRegistry:
    """Every device of this edge.

    Args:
        max_devices: registered devices at most.
        auto_register: a device's first reading registers it; else it waits for its `register` message.
        early_max_devices, early_max_readings, early_ttl_ms: what is kept of devices that are not registered yet.
    """

    def __init__(self, *, max_devices: int = 1000, auto_register: bool = True, early_max_devices: int = 256, early_max_readings: int = 64, early_ttl_ms: int = 600_000) -> None:
        self._max_devices = max_devices
        self._auto = auto_register
        self._early_max_devices = early_max_devices
        self._early_max_readings = early_max_readings
        self._early_ttl_ms = early_ttl_ms
        self.devices: dict[str, Device] = {}
        self._early: OrderedDict[str, deque[tuple[int, Reading]]] = OrderedDict()
        self.early_dropped = 0
        self.errors: deque[dict[str, Any]] = deque(maxlen=MAX_LAST_ERRORS)

    def restore(self, device_id: str, state: dict[str, Any]) -> None:
        """A device from the journal's state, as `to_state` wrote it."""
        fields = {key: state[key] for key in Device(device_id).to_state() if key in state}
        self.devices[device_id] = Device(device_id, **fields)

    def adopt(self, device_id: str, state: dict[str, Any]) -> Device:
        """A device as another edge left it (`to_state`): each side of the twin is taken where it is newer than ours.

        Raises:
            ContractError: the registry is full, or the state is none.
        """
        kept = Device(device_id).to_state()
        given: dict[str, Any] = {key: value for key, value in state.items() if key in kept and (type(value) is type(kept[key]) or (key == "parent" and isinstance(value, str)))}
        for side in ("reported", "desired"):
            check_twin(given.get(side, {}), side)
        device = self.devices.get(device_id)
        if device is None:
            device = self._add(Device(device_id))
            for key in ("kind", "name", "parent", "meta"):
                setattr(device, key, given.get(key, getattr(device, key)))
        for side in ("reported", "desired"):
            if given.get(f"{side}_version", 0) > getattr(device, f"{side}_version"):
                setattr(device, side, given.get(side, {}))
                setattr(device, f"{side}_version", given[f"{side}_version"])
            elif side == "desired" and given.get("desired_version", 0) == device.desired_version and given.get("desired", {}) != device.desired:
                device.desired_version += 1  # both changed it as often: ours holds, and the device must see that it is another
        return device

    def seen(self, device_id: str, reading: Reading, now_ms: int) -> tuple[Device | None, bool]:
        """Take one reading in.

        Returns:
            The device and whether this reading registered it; (None, False) where the reading waits for registration.

        Raises:
            ContractError: the registry is full.
        """
        device = self.devices.get(device_id)
        fresh = False
        if device is None:
            if not self._auto:
                self._keep_early(device_id, reading, now_ms)
                return None, False
            device = self._add(Device(device_id))
            fresh = True
        device.last_seen_ms = now_ms
        device.readings += 1
        values = device.values
        if values.keys() >= reading.values.keys() or len(values) + len(reading.values) <= MAX_METRICS:
            values.update(reading.values)
        else:
            device.values = dict(reading.values)
        return device, fresh

    def _add(self, device: Device) -> Device:
        if len(self.devices) >= self._max_devices:
            raise ContractError("device", f"{self._max_devices} devices are registered already", "raise devices.registry_max or remove some", "limit")
        self.devices[device.id] = device
        return device

    def _keep_early(self, device_id: str, reading: Reading, now_ms: int) -> None:
        queue = self._early.get(device_id)
        if self._early_max_devices < 1:
            self.early_dropped += 1
            return
        if queue is None:
            if len(self._early) >= self._early_max_devices:
                self.early_dropped += len(self._early.popitem(last=False)[1])
            queue = self._early[device_id] = deque()
        else:
            self._early.move_to_end(device_id)
        if len(queue) >= self._early_max_readings:
            queue.popleft()
            self.early_dropped += 1
        queue.append((now_ms, reading))

    def register(self, device_id: str, message: dict[str, Any], now_ms: int) -> tuple[Device, bool, list[Reading]]:
        """Register or update a device.

        Returns:
            The device, whether anything changed, and its early readings, oldest first, that are not too old.
        """
        device = self.devices.get(device_id)
        if device is None:
            device = self._add(Device(device_id))
            changed = True
        else:
            changed = any(getattr(device, key) != message[key] for key in ("kind", "name", "parent", "meta"))
        device.kind, device.name, device.parent, device.meta = message["kind"], message["name"], message["parent"], message["meta"]
        waited = self._early.pop(device_id, ())
        early = [reading for at_ms, reading in waited if now_ms - at_ms <= self._early_ttl_ms]
        self.early_dropped += len(waited) - len(early)
        return device, changed, early

    @property
    def early_waiting(self) -> int:
        """Readings that wait for registration."""
        return sum(len(queue) for queue in self._early.values())

    def report(self, device_id: str, patch: Any) -> Device | None:
        """Merge reported twin state (null removes); None where nothing changed.

        Raises:
            ContractError: not an object, or over the limit.
        """
        return self._merge(device_id, patch, "reported")

    def desire(self, device_id: str, patch: Any, replace: bool = False) -> Device | None:
        """Merge (or `replace`) desired twin state; None where nothing changed. The device need not exist yet."""
        return self._merge(device_id, patch, "desired", replace)

    def _merge(self, device_id: str, patch: Any, which: str, replace: bool = False) -> Device | None:
        if not isinstance(patch, dict):
            raise ContractError(which, f"is {type(patch).__name__}, not an object", "send {property: value}", "type")
        device = self.devices.get(device_id)
        current: dict[str, Any] = {} if device is None or replace else getattr(device, which)
        merged = {key: value for key, value in {**current, **patch}.items() if value is not None}
        check_twin(merged, which)
        if device is None:
            device = self._add(Device(device_id))
        elif merged == getattr(device, which):
            return None
        setattr(device, which, merged)
        setattr(device, f"{which}_version", getattr(device, f"{which}_version") + 1)
        return device

    def failed(self, device_id: str, error: ContractError, now_ms: int) -> None:
        """Remember a refused message; only this device is touched."""
        device = self.devices.get(device_id)
        if device is not None:
            device.errors += 1
            device.last_error = str(error)
        self.errors.append({"device": device_id, "mono_ms": now_ms, **error.to_json()})
