"""A scenario: how large the world is, what its devices do, and which faults come when. Drawn from a seed here, read from a
file in reading.py.

A fault is `{"at": seconds, "kind": ..., "edge": number, "for": seconds, "value": number}`; what `value` means stands in `FAULTS`.
"""

import random
from dataclasses import asdict, dataclass, field
from typing import Any

FAULTS: dict[str, str] = {
    "partition": "no message passes between the edge and the hub's broker; value 0 both ways, 1 only towards the broker, 2 only from it",
    "hub_partition": "no message passes between the hub and its broker; value as for partition",
    "flaky": "the broker loses, doubles and reorders this edge's messages; value is the probability of each",
    "delay": "messages between the edge and the broker take value seconds more",
    "broker_restart": "the hub's broker is away for so long and forgets sessions and retained messages",
    "broker_slams": "the hub's broker accepts connections and closes them at once",
    "bus_restart": "the edge's local broker is away for so long; value 1: it forgets sessions and retained messages",
    "hub_restart": "the hub is killed and comes back after so long",
    "hub_restore": "the hub is killed and comes back from its backup number value, counted from the newest (0)",
    "power_cut": "power goes at the edge's next journal write but value; back after so long",
    "kill": "the agent is killed (kill -9) and started again after so long",
    "restart": "the agent is stopped in good order and started again after so long",
    "disk_full": "only value bytes more than now fit on the edge's disk, for so long",
    "slow_disk": "each fsync of the edge takes value seconds, for so long",
    "clock_jump": "the edge's wall clock jumps by value seconds; set right after so long",
    "clock_1970": "power goes at once and comes back after so long with the clock in 1970; set right value seconds later (-1: never)",
    "hub_clock": "the hub's wall clock jumps by value seconds; set right after so long",
    "desired": "the hub wants something else of the edge; value 0 rules, 1 twins, 2 a command, 3 rules that the edge must refuse",
    "clone": "a second machine runs with an image of the edge's disk, for so long; value 1: copied while the edge runs on",
    "backup": "the hub's store is backed up",
    "refused": "the broker does not let the edge in (no valid certificate), for so long",
}
"""Every kind of fault and what it does."""

KINDS = ("mixed", "mirror", "storm")
"""`mixed`: all faults. `mirror`: an edge and its twin with the same devices, one of them with link faults; they must decide alike. `storm`:
hundreds of edges that lose their broker again and again."""


@dataclass(slots=True)
class Fault:
    """One fault; times in seconds."""

    at: float
    kind: str
    edge: int = 0
    lasts: float = 0.0
    value: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As in a scenario file."""
        return {"at": self.at, "kind": self.kind, "edge": self.edge, "for": self.lasts, "value": self.value}


@dataclass(slots=True)
class Scenario:
    """One world.

    Attributes:
        idle_s, burst_s: seconds between two readings of a device in quiet times and around faults.
        telemetry_bytes: the edges' cap for telemetry.
        retain: receipted records per stream that an edge keeps.
        wal_bytes: how large a new WAL is made.
        bus_on_host: the local broker loses power with the edge.
        storage_keep: probability that an unsynced write survives a power cut.
    """

    seed: int
    hours: float = 72.0
    kind: str = "mixed"
    edges: int = 1
    devices: int = 2
    idle_s: float = 900.0
    burst_s: float = 10.0
    telemetry_bytes: int = 4 << 20
    retain: int = 500
    wal_bytes: int = 1 << 17
    bus_on_host: bool = False
    storage_keep: float = 0.5
    faults: list[Fault] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Length of the run before the quiet end."""
        return self.hours * 3600

    def to_json(self) -> dict[str, Any]:
        """As in a scenario file."""
        out = asdict(self)
        out["faults"] = [fault.to_json() for fault in self.faults]
        return out


# -- drawing -----------------------------------------------------------------------------------------------------------------------

WEIGHTS: dict[str, float] = {
    "partition": 5, "hub_partition": 1, "flaky": 4, "delay": 1.5, "broker_restart": 2, "broker_slams": 0.7, "bus_restart": 1.5, "hub_restart": 2,
    "hub_restore": 1.2, "power_cut": 6, "kill": 2, "restart": 1, "disk_full": 1, "slow_disk": 1, "clock_jump": 1, "clock_1970": 1, "hub_clock": 1, "desired": 5,
    "clone": 0.25, "refused": 0.4,
}
"""How often each kind is drawn in a mixed world, relative to the others."""

QUIET_START_S = 600.0
"""No fault before: everybody has come up."""

EDGES_MAX = 1000
"""Edges of one world at most: some 3 MB each."""

CROWD = 30
"""Edges from which a world runs at the paces of a crowd (`world.CROWD_PACE`): hundreds of edges for days within a minute."""

STORM_EVERY_S = 700.0
"""Between two outages of a storm: the longest, the time in which everybody must have been served, and some quiet."""


def draw(seed: int, hours: float, kind: str = "", focus: tuple[str, ...] = (), edges: int = 0) -> Scenario:
    """The scenario of a seed; with `focus` one edge that meets these faults, one soon after the other, again and again; with `edges` so many
    (a mirror always has two)."""
    if focus:
        return _draw_focused(seed, hours, focus)
    chance = random.Random(f"scenario {seed}")
    if not kind:
        kind = chance.choices(KINDS, (0.91, 0.075, 0.015))[0]
    made = Scenario(seed, hours, kind)
    made.bus_on_host = chance.random() < 0.5
    made.storage_keep = chance.choice((0.0, 0.3, 0.5, 0.9, 1.0))
    made.retain = chance.choice((20, 100, 500, 10_000))
    made.wal_bytes = chance.choice((1 << 15, 1 << 17, 1 << 20))
    if kind == "storm":
        _draw_storm(made, chance, edges)
        return made
    if kind == "mirror":
        made.edges, made.devices = 2, chance.randrange(1, 4)
        weights = {name: WEIGHTS[name] for name in ("partition", "hub_partition", "flaky", "delay", "broker_restart", "hub_restart", "hub_restore")}
    else:
        made.edges = chance.choices((1, 2, 3, 6), (0.5, 0.3, 0.15, 0.05))[0]
        made.devices = chance.randrange(1, 4) if made.edges < 4 and edges < 4 else 1
        made.edges = edges or made.edges
        if made.edges >= CROWD:
            made.wal_bytes = 1 << 15  # each file is there twice, as written and as durable
        weights = dict(WEIGHTS)
        if made.edges > 3:
            weights["clone"] = 0.0
        if chance.random() < 0.2:
            made.telemetry_bytes = 1 << 18
    made.idle_s = chance.uniform(600, 3600) * max(1.0, made.edges * made.devices / 2) * max(1.0, hours / 72)
    made.burst_s = chance.choice((2.0, 5.0, 10.0, 20.0))
    episodes = max(2, round(chance.uniform(4, 9) * min(1.0, hours / 72) ** 0.5))
    for _ in range(episodes):
        at = chance.uniform(QUIET_START_S, max(QUIET_START_S + 1, made.seconds - 1800))
        for _ in range(chance.choices((1, 2, 3, 4), (3, 3, 2, 1))[0]):
            made.faults += _draw_fault(made, chance, weights, at + chance.uniform(0, 300))
    made.faults.sort(key=lambda fault: fault.at)
    return made


def _draw_fault(made: Scenario, chance: random.Random, weights: dict[str, float], at: float) -> list[Fault]:
    kind = chance.choices(list(weights), list(weights.values()))[0]
    edge = chance.randrange(made.edges) if made.kind != "mirror" else 0
    left = max(60.0, made.seconds - at)
    lasts = min(chance.choice((5, 20, 60, 300)) * chance.uniform(0.5, 2), left)
    if kind in ("partition", "hub_partition"):
        if kind == "partition" and chance.random() < 0.25:
            lasts = min(chance.uniform(0.1, 0.6) * made.seconds, left)
        found = [Fault(at, kind, edge, lasts, chance.choice((0, 0, 1, 2)))]
        if made.kind != "mirror" and chance.random() < 0.4:
            found.append(Fault(at + lasts * chance.random(), "desired", edge, 0, chance.choice((0, 0, 1, 2, 3))))
        return found
    if kind == "hub_clock" and chance.random() < 0.5:
        lasts = min(chance.uniform(1200, 86_400), left)  # duties of the hub that look only now and then
    value = {
        "flaky": chance.choice((0.02, 0.1, 0.3)), "delay": chance.uniform(0.2, 8.0), "bus_restart": float(chance.random() < 0.5),
        "hub_restore": chance.randrange(3), "power_cut": chance.choice((0, 1, 2, 3, 5, 8, 13, 40)), "disk_full": chance.choice((0, 4096, 40_000, 200_000)),
        "slow_disk": chance.choice((0.003, 0.03, 0.3)), "clock_jump": chance.choice((-86_400, -3600, -5, 5, 3600, 30 * 86_400)),
        "clock_1970": chance.choice((5, 60, 3600, -1)), "hub_clock": chance.choice((-30 * 86_400, -3600, -5, 5, 3600, 400 * 86_400)), "clone": chance.randrange(2), "desired": chance.choice((0, 0, 1, 2, 3)),
    }.get(kind, 0)
    if kind == "flaky" and made.kind == "mixed" and chance.random() < 0.4:
        return [Fault(at, kind, edge, lasts, value), Fault(at + lasts * chance.random(), chance.choice(("desired", "desired", "hub_restart")), edge, 5)]
    if kind == "power_cut" and chance.random() < 0.4:  # again, while it recovers
        return [Fault(at, kind, edge, 3, value), Fault(at + 3.5, kind, edge, 3, chance.randrange(12)), Fault(at + 7.5, kind, edge, lasts, chance.randrange(12))]
    return [Fault(at, kind, edge, lasts, value)]


def _draw_focused(seed: int, hours: float, focus: tuple[str, ...]) -> Scenario:
    chance = random.Random(f"focus {seed} {focus}")
    made = Scenario(seed, hours, bus_on_host=chance.random() < 0.3, storage_keep=chance.choice((0.0, 0.3, 0.5, 0.9)), retain=20, idle_s=900.0, burst_s=2.0)
    made.wal_bytes = 1 << 15
    at = QUIET_START_S
    while at < made.seconds - 400:
        then = at
        for kind in focus:
            for fault in _draw_fault(made, chance, {kind: 1.0}, then):
                fault.lasts = {"clone": 300.0, "hub_clock": 900.0}.get(kind, min(fault.lasts, 120.0))
                if kind == "flaky":
                    fault.value = chance.choice((0.3, 0.6))
                if kind == "desired":
                    fault.value = 0 if chance.random() < 0.6 else 1
                made.faults.append(fault)
            then += chance.uniform(20, 60)
        at += 600
    made.faults.sort(key=lambda fault: fault.at)
    return made


def _draw_storm(made: Scenario, chance: random.Random, edges: int = 0) -> None:
    made.edges, made.devices = edges or (chance.choice((100, 100, 200)) if made.hours > 2 else 60), 1
    made.idle_s = made.burst_s = 1200.0 * max(1.0, made.hours / 6)
    made.wal_bytes, made.retain = 1 << 15, 100
    for at in (QUIET_START_S, *((chance.uniform(0.2, 0.9) * made.seconds,) if made.hours > 6 else ())):
        for edge in range(0, made.edges, 25):
            made.faults.append(Fault(at + 100 + chance.uniform(0, 300), "refused", edge, 600))
        for _ in range(2):
            made.faults.append(Fault(at, "broker_restart", 0, chance.choice((10, 60, 180))))
            at += STORM_EVERY_S
        made.faults.append(Fault(at, "hub_restart", 0, 20))
    made.faults.sort(key=lambda fault: fault.at)
