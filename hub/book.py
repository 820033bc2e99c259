"""The ingest book: which records of which edge the hub holds, what is missing, what to answer. Pure: no clock, no database, no network.

One `StreamBook` per (edge, stream). Records come in any order, several times, with gaps; the contiguous mark moves only over records
that are stored, or that the edge says are gone (its floor). The chain is computed over the contiguous part and compared with the edge's.
"""

from dataclasses import dataclass, field

from edge_runtime.contract.limits import MAX_WANT_RANGES
from edge_runtime.contract.records import CHAIN_START, Batch, Record

GRACE_MS = 2_000
"""How long a gap may stand before it is asked for: in-flight messages of the same edge overtake each other by less than this."""

WANT_AGAIN_MS = 5_000
"""How long an asked-for range is given before it is asked for again."""

MAX_HELD_RANGES = 4_096
"""Separate ranges above the contiguous mark per stream: past it, a record that would make another one is left for the edge to send again."""

MAX_CHAIN_CHECKS = 256
"""Chain values of the edge that wait for the contiguous mark to reach them; the newest are kept."""


class RangeSet:
    """Disjoint, sorted, closed ranges of integers."""

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: list[list[int]] = []

    @staticmethod
    def of(ranges: list[list[int]]) -> "RangeSet":
        """From what `to_json` gave."""
        made = RangeSet()
        made._ranges = [list(pair) for pair in ranges]
        return made

    def __len__(self) -> int:
        return len(self._ranges)

    def __contains__(self, value: int) -> bool:
        index = self._find(value)
        return index < len(self._ranges) and self._ranges[index][0] <= value

    def _find(self, value: int) -> int:
        low, high = 0, len(self._ranges)
        while low < high:
            middle = (low + high) // 2
            if self._ranges[middle][1] < value:
                low = middle + 1
            else:
                high = middle
        return low

    def add(self, value: int) -> bool:
        """Add one integer; False where it was there already."""
        index = self._find(value)
        if index < len(self._ranges) and self._ranges[index][0] <= value:
            return False
        joins_left = index > 0 and self._ranges[index - 1][1] == value - 1
        joins_right = index < len(self._ranges) and self._ranges[index][0] == value + 1
        if joins_left and joins_right:
            self._ranges[index - 1][1] = self._ranges[index][1]
            del self._ranges[index]
        elif joins_left:
            self._ranges[index - 1][1] = value
        elif joins_right:
            self._ranges[index][0] = value
        else:
            self._ranges.insert(index, [value, value])
        return True

    def drop_upto(self, value: int) -> None:
        """Forget everything up to `value`."""
        while self._ranges and self._ranges[0][1] <= value:
            del self._ranges[0]
        if self._ranges and self._ranges[0][0] <= value:
            self._ranges[0][0] = value + 1

    @property
    def first(self) -> list[int] | None:
        """The lowest range."""
        return self._ranges[0] if self._ranges else None

    @property
    def top(self) -> int:
        """The highest integer, 0 for none."""
        return self._ranges[-1][1] if self._ranges else 0

    @property
    def size(self) -> int:
        """How many integers."""
        return sum(last - first + 1 for first, last in self._ranges)

    def gaps(self, after: int) -> list[tuple[int, int]]:
        """Ranges between `after` and the top that are not here."""
        out = []
        start = after + 1
        for first, last in self._ranges:
            if first > start:
                out.append((start, first - 1))
            start = max(start, last + 1)
        return out

    def to_json(self) -> list[list[int]]:
        """The ranges as lists."""
        return [list(pair) for pair in self._ranges]


@dataclass(slots=True)
class StreamBook:
    """One stream of one edge as the hub holds it.

    Attributes:
        contiguous: every seq up to here is stored, or gone at the edge.
        chain: the chain after `contiguous`.
        base: the chain is proven from this seq on (1, or the floor where the edge lost or dropped something); base_chain: the chain before it, empty where
            an older hub did not keep it.
        gone: records below `contiguous` that the edge no longer had.
        stored: records stored.
        duplicates: records that came again.
        mismatches: times the edge's chain differed from ours at one seq.
        edge_next, edge_floor, edge_dropped: as the edge last said.
    """

    contiguous: int = 0
    chain: bytes = CHAIN_START
    base: int = 1
    gone: int = 0
    stored: int = 0
    duplicates: int = 0
    mismatches: int = 0
    edge_next: int = 1
    edge_floor: int = 1
    edge_dropped: int = 0
    base_chain: bytes = CHAIN_START
    history: int = 1
    live: int = 1
    above: RangeSet = field(default_factory=RangeSet)
    chains: dict[int, bytes] = field(default_factory=dict)
    gap_since_ms: dict[int, int] = field(default_factory=dict)
    asked_ms: dict[int, int] = field(default_factory=dict)

    def fresh(self, batch: Batch) -> list[Record]:
        """The records of `batch` that are not stored yet; they are counted as stored from here on."""
        out = []
        for record in batch.records:
            seq = record.seq
            if seq <= self.contiguous or seq in self.above:
                self.duplicates += 1
            elif seq == self.contiguous + 1 and not len(self.above):
                # The common case, in order: the chain moves along.
                self.contiguous = seq
                self.chain = record.chain(self.chain)
                out.append(record)
            elif len(self.above) >= MAX_HELD_RANGES and seq != self.contiguous + 1 and seq - 1 not in self.above and seq + 1 not in self.above:
                continue
            else:
                self.above.add(seq)
                out.append(record)
        self.stored += len(out)
        return out

    def told(self, batch: Batch) -> None:
        """Take in what `batch` says about the edge's side, before its records. The floor may move us past records that are gone."""
        self.edge_next, self.edge_floor, self.edge_dropped = batch.next_seq, batch.floor, batch.dropped
        self.history, self.live = batch.history, batch.live
        if batch.floor <= self.contiguous:
            return
        if batch.floor == self.contiguous + 1:
            if batch.floor_chain != self.chain:
                # Another journal goes on here under this name (a replaced disk): proven from its first record on.
                self.chain, self.base, self.base_chain = batch.floor_chain, batch.floor, batch.floor_chain
            return
        held = sum(min(last, batch.floor - 1) - first + 1 for first, last in self.above.to_json() if first < batch.floor)
        self.gone += batch.floor - 1 - self.contiguous - held
        self.contiguous = batch.floor - 1
        self.chain, self.base, self.base_chain = batch.floor_chain, batch.floor, batch.floor_chain
        self.above.drop_upto(self.contiguous)
        self.chains = {seq: chain for seq, chain in self.chains.items() if seq > self.contiguous}

    def check(self, batch: Batch) -> None:
        """Compare the edge's chain after the last record of `batch` with ours, now or when the contiguous mark gets there."""
        if not batch.chain or not batch.records:
            return
        last = batch.records[-1].seq
        if last == self.contiguous:
            self.mismatches += batch.chain != self.chain
        elif last > self.contiguous:
            if len(self.chains) >= MAX_CHAIN_CHECKS:
                del self.chains[min(self.chains)]
            self.chains[last] = batch.chain

    def reachable(self) -> tuple[int, int] | None:
        """Stored records just above the contiguous mark, whose chain is still to be computed: (first, last)."""
        first = self.above.first
        if first is None or first[0] != self.contiguous + 1:
            return None
        return first[0], first[1]

    def advance(self, records: list[Record]) -> None:
        """Move the contiguous mark over stored `records`, which follow it without a gap."""
        for record in records:
            if record.seq != self.contiguous + 1:
                raise ValueError(f"record {record.seq} does not follow {self.contiguous}")
            self.chain = record.chain(self.chain)
            self.contiguous = record.seq
            expected = self.chains.pop(record.seq, None)
            if expected is not None and expected != self.chain:
                self.mismatches += 1
        self.above.drop_upto(self.contiguous)

    def _gaps(self) -> list[tuple[int, int]]:
        """Missing ranges that the edge says it has sent: below its history cursor, or in its live lane."""
        gaps = self.above.gaps(self.contiguous)
        if self.history - 1 > self.top:
            gaps.append((self.top + 1, self.history - 1))
        out = []
        for first, last in gaps:
            first = max(first, self.edge_floor)
            for low, high in ((first, min(last, self.history - 1)), (max(first, self.live), last)):
                if low <= high:
                    out.append((low, high))
        return out

    def due(self, now_ms: int) -> bool:
        """Note which gaps stand; True where one is old enough to be asked for."""
        gaps = self._gaps()
        self.gap_since_ms = {low: self.gap_since_ms.get(low, now_ms) for low, _ in gaps}
        self.asked_ms = {low: at for low, at in self.asked_ms.items() if low in self.gap_since_ms}
        return any(self._is_due(low, now_ms) for low, _ in gaps)

    def _is_due(self, low: int, now_ms: int) -> bool:
        return now_ms - self.gap_since_ms.get(low, now_ms) >= GRACE_MS and now_ms - self.asked_ms.get(low, now_ms - WANT_AGAIN_MS) >= WANT_AGAIN_MS

    def wants(self, now_ms: int) -> list[list[int]]:
        """Ranges to ask for now: gaps older than the grace that were not asked for just before. They count as asked for."""
        self.due(now_ms)
        ranges = [[low, high] for low, high in self._gaps() if self._is_due(low, now_ms)][:MAX_WANT_RANGES]
        for low, _ in ranges:
            self.asked_ms[low] = now_ms
        return ranges

    @property
    def top(self) -> int:
        """The highest seq stored."""
        return max(self.contiguous, self.above.top)


@dataclass(slots=True)
class BootWatch:
    """Which boots speak under one name; tells a restart from a clone. Pure.

    A restart brings a new boot id with a higher number, and the old one never speaks again. Two ids with one number, or an old boot that
    speaks after a newer one more often than late messages explain, are two machines with one identity.
    """

    boot: str = ""
    number: int = 0
    alternations: int = 0
    first_alternation_ms: int = 0

    def heard(self, boot: str, number: int, now_ms: int) -> str:
        """Take a sign of life in; returns why this identity is to be quarantined, or an empty text."""
        if boot == self.boot:
            return ""
        if not self.boot or number > self.number:
            self.boot, self.number = boot, number
            return ""
        if number == self.number:
            return f"boots {self.boot} and {boot} both call themselves number {number}: two machines run with one identity"
        if now_ms - self.first_alternation_ms > ALTERNATION_WINDOW_MS:
            self.alternations, self.first_alternation_ms = 0, now_ms
        self.alternations += 1
        if self.alternations >= ALTERNATIONS_MAX:
            return f"boot {boot} (number {number}) keeps speaking after boot {self.boot} (number {self.number}): two machines run with one identity"
        return ""


ALTERNATION_WINDOW_MS = 60_000
ALTERNATIONS_MAX = 12
"""Signs of an older boot within a minute that are too many for messages that were merely late: more than an edge's window of 8."""
