"""What a large run must have met. A fault that is drawn and changes nothing shows nothing, so effects are counted where they happen, and so is
every check that the oracle makes; one that is never met in a run large enough to meet it (`SEEDS_MIN`) fails the run."""

from collections.abc import Mapping

from .scenario import FAULTS

SEEDS_MIN = 300
"""Seeds of 72 hours from which nothing may be missing: the rarest effect (power lost while a name changes: 2 in 140 cuts, and a seed has two or three
cuts) is missing from three hundred seeds by chance in one of 10,000; the rarest kind (a clone) comes in about every tenth seed."""

HOURS_MIN = 72.0

EFFECTS: dict[str, str] = {
    "partition both ways": "of an edge from the hub's broker",
    "partition towards the broker": "what the edge says is held back, what it is told arrives",
    "partition from the broker": "the other way round",
    "hub partition both ways": "of the hub from its broker",
    "hub partition towards the broker": "",
    "hub partition from the broker": "",
    "links ended by silence": "a side took the other for dead: one and a half keep-alives without a word",
    "messages lost": "acknowledged by the broker, never delivered",
    "messages doubled": "delivered more often than sent",
    "messages overtaken": "delivered after later ones",
    "sessions lost at the hub's broker": "",
    "sessions lost at a local broker": "",
    "hub records rolled back": "in the store of the hub before a restore, not in the backup",
    "power lost in a write of a WAL": "the very write was under way",
    "power lost in a write of a database": "",
    "power lost in an fsync": "",
    "power lost in a change of names or sizes": "new files, renames, unlinks, truncations",
    "power lost between changes": "at once, whatever the disk does",
    "unsynced writes lost": "",
    "unsynced writes kept": "a disk may keep any of them",
    "writes torn": "a part of the sectors of a write survived",
    "names lost": "a new file or a rename that was not durable",
    "writes refused by a full disk": "",
    "slow fsyncs": "",
    "clock jumps ahead": "",
    "clock jumps back": "",
    "the hub's clock jumps ahead": "",
    "the hub's clock jumps back": "",
    "boots in 1970": "",
    "boots in 1970, never set right": "until all is healed at the end",
    "desired state changed during an outage": "while the edge had no link to the hub",
    "boots after a crash": "after kill -9 or power cut",
    "decisions without a hub": "",
    "edges cut off together": "in reconnect storms",
}
"""Effect to what it means, where the name does not say it."""

CHECKS: dict[str, str] = {
    "records": "committed at an edge: next in its stream, monotonic time, wall time, quality",
    "readings in order": "the first record of a reading comes after those of all earlier readings of its device",
    "acknowledged readings": "decided on, and durable after each boot",
    "decisions": "of the engine, against the journal's records in order",
    "commands": "one id one meaning, one decision one command, durable before it acts",
    "boots": "what was committed is there, the same, and goes on behind it",
    "records at the hub": "new, and what the edge wrote",
    "rows at the hub": "read back at each boot of the hub and at the end: exactly what it committed",
    "receipts": "cover only what the hub has committed",
    "restores": "an older store came back",
    "streams": "at the end: nothing lost, nothing made up, chains agree",
    "desired states": "converged: generation, rules, twins",
    "mirrored decisions": "the same with link faults as without",
    "pauses": "between tries to connect: the law of back-off with full jitter",
    "storm": "an edge has its receipt in time after a storm",
    "audits": "queues, tables, WALs and disk within their limits; nothing has ended",
    "clones": "told apart by the hub",
}
"""Check to what it looks at."""


def never(happened: Mapping[str, int], checked: Mapping[str, int]) -> list[str]:
    """Kinds of fault, effects and checks that did not come once."""
    return [name for name in (*FAULTS, *EFFECTS) if not happened.get(name)] + [f"check: {name}" for name in CHECKS if not checked.get(name)]
