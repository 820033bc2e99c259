"""The fleet: presence of every edge, outages, desired state. Bookkeeping is pure; `ingest` and `server` carry it to store and broker."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.desired import Desired, parse_desired
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.limits import MAX_COMMANDS, MAX_MESSAGE_BYTES, MAX_OPERATIONS

from .book import BootWatch
from .store.base import EdgeRow

SILENT_AFTER_MS = 100_000
"""An edge says its presence every 30 s; three missed ones and ten seconds are silence, whatever the broker believes."""

MAX_EDGES = 10_000
"""Edges of one hub."""


@dataclass(slots=True)
class Change:
    """What a presence message changed: the row to keep, an outage that begins or ends, whether to greet the edge."""

    row: EdgeRow
    outage_started_ms: int | None = None
    outage_ended: tuple[int, int] | None = None
    came: bool = False


@dataclass(slots=True)
class Fleet:
    """Every edge that ever spoke; `silent_after_ms` without a sign of life is silence."""

    rows: dict[str, EdgeRow] = field(default_factory=dict)
    watches: dict[str, BootWatch] = field(default_factory=dict)
    open_outages: dict[str, int] = field(default_factory=dict)
    silent_after_ms: int = SILENT_AFTER_MS
    began_ms: int = 0
    """The hub's wall milliseconds when it began to listen: silence before that is its own."""
    looked_ms: int = 0
    """Those of its last look at its clock: up to then a step is taken out of what it believes."""

    def row(self, edge: str) -> EdgeRow:
        """The row of `edge`, made where it is new. Raises `ContractError` past `MAX_EDGES`."""
        row = self.rows.get(edge)
        if row is None:
            if len(self.rows) >= MAX_EDGES:
                raise ContractError("edge", f"{MAX_EDGES} edges are known already", "remove some, or run another hub", "limit")
            row = self.rows[edge] = EdgeRow(edge)
        return row

    def heard(self, edge: str, boot: str, boot_n: int, now_ms: int) -> EdgeRow:
        """A sign of life (a batch or a presence): keeps last seen, watches for clones."""
        row = self.row(edge)
        row.last_seen_ms = now_ms
        watch = self.watches.get(edge)
        if watch is None:
            watch = self.watches[edge] = BootWatch(row.boot, row.boot_n)
        reason = watch.heard(boot, boot_n, now_ms)
        if reason and not row.quarantine:
            row.quarantine = reason
        row.boot, row.boot_n = watch.boot, watch.number
        return row

    def presence(self, message: dict[str, Any], now_ms: int, retained: bool = False) -> Change:
        """Take a presence message in.

        Args:
            retained: it was kept by the broker from before: its age is unknown, so it does not count as a sign of life.
        """
        edge = message["edge"]
        row = self.row(edge)
        if message["state"] == "online":
            if not retained:
                self.heard(edge, message["boot"], message["boot_n"], now_ms)
            came = row.state != "online"
            ended = None
            if came:
                row.state, row.since_ms, row.reason = "online", now_ms, _storable(message["reason"]) or "online"
                start = self.open_outages.pop(edge, None)
                if start is not None:
                    ended = (start, now_ms)
            if retained and not row.last_seen_ms:
                row.last_seen_ms = now_ms
            row.presence = {key: value for key, value in message.items() if key not in ("v", "state", "reason")}
            row.generation = message["generation"]
            return Change(row, outage_ended=ended, came=came)
        if row.boot and message["boot"] != row.boot:
            return Change(row)  # the Last Will of a boot that has been replaced
        return self._gone(row, _storable(message["reason"]) or "lost", now_ms)

    def _gone(self, row: EdgeRow, reason: str, now_ms: int) -> Change:
        started = None
        if row.state == "online" or not row.since_ms:
            row.state, row.since_ms, row.reason = "offline", now_ms, reason
            if row.edge not in self.open_outages:
                self.open_outages[row.edge] = started = now_ms
        return Change(row, outage_started_ms=started)

    def stepped(self, by_ms: int) -> None:
        """The hub's clock went so much further than it was there: it was set, or the hub itself stood still. Nobody was silent for that."""
        for row in self.rows.values():
            if row.last_seen_ms >= self.began_ms:  # by the clock as it was before
                row.last_seen_ms += by_ms
        self.began_ms += by_ms

    def silence_ms(self, row: EdgeRow) -> int:
        """For how long an edge had given no sign of life to a hub that listened, at its last look."""
        return max(0, self.looked_ms - max(self.began_ms, row.last_seen_ms))

    def silent(self, now_ms: int) -> list[Change]:
        """Edges called online that have said nothing for `silent_after_ms`."""
        return [
            self._gone(row, "silent", now_ms) for row in self.rows.values() if row.state == "online" and now_ms - row.last_seen_ms > self.silent_after_ms
        ]

    def release(self, edge: str) -> EdgeRow:
        """An administrator ends a quarantine: the boot that speaks next is believed."""
        row = self.row(edge)
        row.quarantine = ""
        row.boot, row.boot_n = "", 0
        self.watches[edge] = BootWatch()
        return row


def _storable(text: str) -> str:
    """JSON can escape half of a surrogate pair, which no database takes as text."""
    return text.encode("utf-8", "replace").decode()


def next_desired(edge: str, current: Mapping[str, Any] | None, change: Mapping[str, Any], now_ms: int, edge_generation: int) -> dict[str, Any]:
    """A new desired state document: `change`'s parts replace the current ones, the generation grows past what anyone has seen.

    Args:
        change: any of `rules`, `models`, `twins`, `commands`, `workloads`, `operations`, `update`, `expires_ms`; `rules: null` gives the rules back to the edge, `update: null` wants none.
        edge_generation: the generation that the edge reports; higher than ours after a hub was restored from a backup.

    Raises:
        ContractError: a part that does not fit, naming it; nothing is changed then.
    """
    unknown = sorted(set(change) - {"rules", "models", "twins", "commands", "workloads", "operations", "update", "expires_ms"})
    if unknown:
        raise ContractError(unknown[0][:80] or "body", f"{unknown[0][:80]!r} is not part of desired state", "send rules, models, twins, commands, update or expires_ms", "field")
    spec: dict[str, Any] = dict((current or {}).get("spec", {}))
    spec.update({key: value for key, value in change.items() if key != "expires_ms"})
    if spec.get("rules", 0) is None:
        del spec["rules"]
    if spec.get("update", 0) is None:
        del spec["update"]
    # What has expired is no one's wish any more; without this the document only grows.
    for kind, most in (("commands", MAX_COMMANDS), ("operations", MAX_OPERATIONS)):
        listed = spec.get(kind, [])
        if isinstance(listed, list):
            spec[kind] = [one for one in listed if not (isinstance(one, dict) and type(one.get("expires_ms")) is int and one["expires_ms"] < now_ms - 3_600_000)]
            if len(spec[kind]) > most:
                raise ContractError(kind, f"{len(spec[kind])} are over {most}", "wait until some are done or expired", "limit")
    generation = max((current or {}).get("generation", 0), edge_generation) + 1
    desired: Desired = parse_desired(
        {"v": 1, "edge": edge, "generation": generation, "issued_ms": now_ms, "expires_ms": change.get("expires_ms", 0), "spec": spec}, edge
    )
    document = desired.to_json()
    size = len(jsoncodec.encode(document))
    if size > MAX_MESSAGE_BYTES:
        # A broker answers a message over its limit by closing the hub's connection, again after every reconnect.
        raise ContractError("spec", f"{size} bytes with what it had are over the {MAX_MESSAGE_BYTES} of one message", "send less, or empty another part", "size")
    return document
