"""The interface of the hub's store. One test suite runs against every implementation.

Methods are synchronous; the hub calls them on one writer thread and (the `read_` ones) on one reader thread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edge_runtime.contract.records import CHAIN_START, Record

from ..dating import BootClock
from .workloads import WorkloadStore


@dataclass(slots=True)
class EdgeRow:
    """One edge as kept. Times are the hub's wall milliseconds; `presence` is the edge's last status message."""

    edge: str
    state: str = "offline"
    reason: str = "never seen"
    since_ms: int = 0
    last_seen_ms: int = 0
    boot: str = ""
    boot_n: int = 0
    generation: int = 0
    quarantine: str = ""
    presence: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class StreamRow:
    """The durable part of a `StreamBook`; `above` holds the ranges above the contiguous mark."""

    edge: str
    stream: str
    contiguous: int
    chain: bytes
    base: int
    gone: int
    stored: int
    duplicates: int
    mismatches: int
    edge_next: int
    edge_floor: int
    edge_dropped: int
    above: list[list[int]]
    base_chain: bytes = CHAIN_START


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record with the edge and stream it belongs to and the hub's receive time (ms)."""

    edge: str
    stream: str
    record: Record
    received_ms: int
    number: int = field(default=0, compare=False)
    """Of its arrival, where it was read: later ones have higher ones."""


@dataclass(slots=True)
class Transaction:
    """What one ingest commit writes."""

    records: list[StoredRecord] = field(default_factory=list)
    streams: dict[tuple[str, str], StreamRow] = field(default_factory=dict)
    edges: dict[str, EdgeRow] = field(default_factory=dict)
    clocks: list[BootClock] = field(default_factory=list)
    outages: dict[tuple[str, int], "Outage"] = field(default_factory=dict)
    """By edge and beginning (the hub's wall milliseconds)."""


@dataclass(frozen=True, slots=True)
class Outage:
    """What is known of one: when it ended, by the hub's wall milliseconds (None: it goes on), and why it began, where that is known."""

    end_ms: int | None
    reason: str


class StoreError(RuntimeError):
    """A store that cannot be opened: `field`, `problem`, `remedy`."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field = field
        self.problem = problem
        self.remedy = remedy


class Store(WorkloadStore, Protocol):
    """Everything durable of the hub."""

    def close(self) -> None:
        """Release it."""

    def commit(self, transaction: Transaction) -> None:
        """Write all of it or none. A record that is there already (edge, stream, seq) is left as it is; an outage that is there keeps the reason that its beginning gave."""

    def edges(self) -> list[EdgeRow]:
        """Every edge."""

    def streams(self) -> list[StreamRow]:
        """Every stream of every edge."""

    def clocks(self, limit: int) -> list[BootClock]:
        """What is known of the clocks of the newest boots, oldest first."""

    def read_records(
        self, edge: str, stream: str, *, after: int = 0, before: int | None = None, limit: int = 100, newest_first: bool = False, kinds: Sequence[str] = (), committed: bool = False,
    ) -> list[StoredRecord]:
        """Records of one stream by seq. `committed`: for the thread that commits alone, which misses none that it has committed, whoever reads beside it."""

    def read_latest(self, *, streams: Sequence[str], kinds: Sequence[str], limit: int, edge: str | None = None, after_id: int = 0) -> list[tuple[int, StoredRecord]]:
        """The newest records over all edges by arrival, newest first, with their arrival number."""

    def read_count(self, edge: str, stream: str, first: int, last: int) -> int:
        """How many records of a stream lie in [first, last]."""

    def desired(self, edge: str) -> dict[str, Any] | None:
        """The desired state document of an edge."""

    def all_desired(self) -> Mapping[str, dict[str, Any]]:
        """Every desired state document."""

    def put_desired(self, edge: str, document: dict[str, Any], now_ms: int) -> None:
        """Keep a desired state document (and its history)."""

    def setting(self, key: str) -> str | None:
        """One of the hub's own values."""

    def put_setting(self, key: str, value: str) -> None:
        """Keep one of the hub's own values."""

    def read_outages(self, since_ms: int, limit: int = 1000) -> list[dict[str, Any]]:
        """Outages that ended after `since_ms` or have not ended."""

    def commit_transfers(self, changes: Mapping[str, dict[str, Any] | None]) -> None:
        """Keep what transfers have become, or forget them (None), by id: all of it or none."""

    def transfers(self) -> list[dict[str, Any]]:
        """Every transfer, oldest first."""

    def note_arrivals(self, ran_ms: int, every_ms: int, needed_ms: int) -> None:
        """Note the newest record's number beside the hub's running time, unless that was done less than `every_ms` ago; forget notes that nobody needs who asks for `needed_ms` and later."""

    def read_arrived(self, ran_ms: int) -> int:
        """The number of a record up to which all had come when the hub had run for `ran_ms`; 0 where that is not known. Never the newest record's: what is deleted never has the highest number, so that none is given twice."""

    def prune(self, edge: str, stream: str, upto: int, chain: bytes) -> int:
        """Delete a stream's records with seq <= `upto`; its base becomes `upto` + 1, the chain before it `chain`. Returns how many went."""
