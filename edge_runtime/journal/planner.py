"""The storage planner: how many hours of outage the free space holds, from the rate at which each database really grows. Pure."""

from ..contract.lean_dataclass import dataclass

RATE_WINDOW_MS = 600_000
"""Time constant of the growth rate: ten minutes follow a change of load without jumping at a burst."""

MIN_OBSERVED_MS = 2_000
"""Growth seen over less than this says nothing yet."""

MAX_HOURS = 10_000.0
"""What is shown for a database that does not grow: over a year."""


@dataclass(slots=True)
class GrowthRate:
    """Bytes per millisecond appended to one database, exponentially weighted; `observe` with the bytes since the last call."""

    per_ms: float = 0.0
    observed_ms: int = 0

    def observe(self, appended_bytes: int, elapsed_ms: int) -> None:
        """Take `appended_bytes` in over `elapsed_ms`."""
        if elapsed_ms <= 0:
            return
        self.observed_ms += elapsed_ms
        weight = min(1.0, elapsed_ms / min(RATE_WINDOW_MS, max(self.observed_ms, MIN_OBSERVED_MS)))
        self.per_ms += weight * (appended_bytes / elapsed_ms - self.per_ms)


@dataclass(frozen=True, slots=True)
class StoragePlan:
    """What the disk allows.

    Attributes:
        hours: hours of outage that fit, per database; the edge's is the smallest.
        free_bytes: free on the file system.
        used_bytes: per database.
        alarm: hours are known and under the target.
    """

    hours: dict[str, float]
    free_bytes: int
    used_bytes: dict[str, int]
    target_hours: float
    alarm: bool

    @property
    def outage_hours(self) -> float:
        """Hours until the first database has to drop something."""
        return min(self.hours.values(), default=MAX_HOURS)


def plan(
    rates: dict[str, GrowthRate], used: dict[str, int], caps: dict[str, int], unreceipted: dict[str, float], free_bytes: int, min_free_bytes: int, target_hours: float
) -> StoragePlan:
    """Hours of outage that fit.

    Args:
        rates: growth per database.
        used: bytes in use per database.
        caps: most bytes a database may use.
        unreceipted: share (0 to 1) of `used` that no receipt covers; the rest can be freed.
        free_bytes: free on the file system; `min_free_bytes` of it stay free.
    """
    total = sum(rate.per_ms for rate in rates.values())
    disk = max(0, free_bytes - min_free_bytes)
    hours: dict[str, float] = {}
    known = True
    for name, rate in rates.items():
        if rate.observed_ms < MIN_OBSERVED_MS:
            known = False
        if rate.per_ms <= 0:
            hours[name] = MAX_HOURS
            continue
        freeable = used[name] * (1 - unreceipted.get(name, 1.0))
        own = max(0.0, caps[name] - used[name] + freeable)
        share = (disk + freeable) * rate.per_ms / total
        hours[name] = min(MAX_HOURS, min(own, share) / rate.per_ms / 3_600_000)
    alarm = known and min(hours.values(), default=MAX_HOURS) < target_hours
    return StoragePlan(hours, free_bytes, dict(used), target_hours, alarm)
