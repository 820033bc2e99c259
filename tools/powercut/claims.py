"""What the world has seen of the agent, each with the position of the recorded log at that moment: all of it must outlive a cut after that."""

import bisect
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.records import BATCH, Record


@dataclass(frozen=True, slots=True)
class Claim:
    """`kind` says what was seen: record, reading, command, order, twin, reported, result, generation, boot, receipt. `position`: see `BlockLog`."""

    position: int
    kind: str
    key: tuple[Any, ...]
    value: Any = None


@dataclass(slots=True)
class Expected:
    """Everything that was claimed up to one position, as it can be asked for. `newest`: the highest number of each stream that was seen."""

    records: dict[tuple[str, int], Record] = field(default_factory=dict)
    readings: set[tuple[str, int]] = field(default_factory=set)
    commands: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    orders: set[str] = field(default_factory=set)
    results: set[str] = field(default_factory=set)
    twins: dict[str, int] = field(default_factory=dict)
    reported: dict[str, int] = field(default_factory=dict)
    receipts: dict[str, int] = field(default_factory=dict)
    newest: dict[str, int] = field(default_factory=dict)
    generation: int = 0
    boot_n: int = 0
    position: int = 0
    conflicts: list[str] = field(default_factory=list)

    def add(self, claim: Claim) -> None:
        """Take one claim in; what contradicts an earlier one is kept in `conflicts`."""
        kind, key, value = claim.kind, claim.key, claim.value
        if kind == "record":
            known = self.records.setdefault(key, value)  # type: ignore[arg-type]
            if known != value:
                self.conflicts.append(f"{key[0]} {key[1]} was published with two contents: {known} and {value}")
            self.newest[key[0]] = max(self.newest.get(key[0], 0), key[1])
        elif kind == "reading":
            self.readings.add(key)  # type: ignore[arg-type]
        elif kind == "command":
            known_command = self.commands.setdefault(key[0], value)
            self.newest["decision"] = max(self.newest.get("decision", 0), value[1])
            if known_command != value:
                self.conflicts.append(f"command {key[0]} was published with two contents: {known_command} and {value}")
        elif kind == "order":
            self.orders.add(key[0])
        elif kind == "result":
            self.results.add(key[0])
        elif kind in ("twin", "reported", "receipt"):
            table = {"twin": self.twins, "reported": self.reported, "receipt": self.receipts}[kind]
            table[key[0]] = max(table.get(key[0], 0), value)
        elif kind == "generation":
            self.generation = max(self.generation, value)
        elif kind == "boot":
            self.boot_n = max(self.boot_n, value)

    def __len__(self) -> int:
        """How many things can be asked for."""
        return len(self.records) + len(self.readings) + len(self.commands) + len(self.orders) + len(self.results) + len(self.twins) + len(self.reported) + 2


class Claims:
    """All claims of a recording, in order of position."""

    def __init__(self, claims: Iterable[Claim] = ()) -> None:
        self.all: list[Claim] = list(claims)

    def __len__(self) -> int:
        return len(self.all)

    def advance(self, expected: Expected, position: int) -> None:
        """Bring `expected` up to `position`."""
        first = bisect.bisect_right(self.all, expected.position, key=lambda claim: claim.position)
        last = bisect.bisect_right(self.all, position, key=lambda claim: claim.position)
        if expected.position == 0:
            first = 0
        for claim in self.all[first:last]:
            expected.add(claim)
        expected.position = position

    # -- from messages -------------------------------------------------------------------------------------------------------

    def edge_published(self, position: int, topic: str, payload: bytes) -> None:
        """The agent published this."""
        parts = topic.split("/")
        where, name, leaf = parts[2], parts[3], parts[4] if len(parts) > 4 else ""
        if where == "edge" and leaf == "up":
            batch = BATCH.parse(jsoncodec.decode(payload))
            self.all.append(Claim(position, "boot", (batch["boot"],), batch["boot_n"]))
            for item in batch["records"]:
                record = Record(item["seq"], item["boot"], item["mono"], item["wall"], item["tq"], item["kind"], jsoncodec.encode(item["body"]))
                self.all.append(Claim(position, "record", (batch["stream"], record.seq), record))
        elif where == "edge" and leaf == "status":
            status = json.loads(payload)
            self.all.append(Claim(position, "boot", (status["boot"],), status["boot_n"]))
            self.all.append(Claim(position, "generation", (), status.get("generation", 0)))
        elif where == "device" and leaf == "command":
            command = json.loads(payload)
            edge, _, rest = command["id"].partition(".")
            words = rest.split(".")
            if len(words) == 3 and words[1].isdigit():
                self.all.append(Claim(position, "command", (command["id"],), (words[0], int(words[1]), command["args"].get("n", -1))))
            else:
                self.all.append(Claim(position, "order", (command["id"],)))
        elif where == "device" and leaf == "desired":
            self.all.append(Claim(position, "twin", (name,), json.loads(payload)["version"]))

    def edge_acknowledged(self, position: int, topic: str, payload: bytes) -> None:
        """The agent acknowledged a message of a device."""
        _, _, where, name, leaf = topic.split("/")
        if where != "device":
            return
        body = json.loads(payload)
        if leaf == "telemetry":
            self.all.append(Claim(position, "reading", (name, body["n"])))
        elif leaf == "reported":
            self.all.append(Claim(position, "reported", (name,), body["n"]))
        elif leaf == "result":
            self.all.append(Claim(position, "result", (body["id"],)))

    def hub_said(self, position: int, topic: str, payload: bytes) -> None:
        """The hub's receipts: what the agent may free."""
        if topic.endswith("/receipts"):
            for mark in json.loads(payload)["marks"]:
                self.all.append(Claim(position, "receipt", (mark["stream"],), mark["upto"]))
