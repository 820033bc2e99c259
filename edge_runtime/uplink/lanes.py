"""What to send next: live records first, history at the hub's pace, and again what the hub misses. Pure: no clock, no network.

At link-up each stream is split at its next seq. What comes after is *live*; what waited is *history*, sent in order within the hub's
credit. The hub's first receipt of a stream opens both lanes and says where history starts: the hub may hold more than we know (receipts were lost),
less (it was restored) or something else (our disk was replaced).
"""

from collections import deque
from collections.abc import Mapping

from ..contract.lean_dataclass import dataclass, field
from ..contract.limits import MAX_WANT_RANGES
from ..contract.streams import STREAMS

LINGER_MS: Mapping[str, int] = {"decision": 20, "event": 20, "telemetry": 250}
"""How long a live record waits for company, milliseconds: one message for many costs the edge and the hub a tenth."""

LIVE_WINDOW = 5_000
"""Live records that may be sent and not yet known to the hub: a hub that stopped reading must not fill the broker's memory."""

LIVE_LAG = 4_000
"""A live lane further behind than this has become history: newer records must not wait behind it."""

RECEIPT_TIMEOUT_MS = 10_000
"""Silence of the hub about records that were sent; then everything unreceipted is sent again (the hub drops duplicates)."""

SLOW_MS = 1_000
"""A broker that takes so long for a message is behind a slow link: a quick one takes some milliseconds, a satellite 0.6 s. Else each message would put off what a deaf hub is known by."""

UNTAKEN = 3
"""Times as long the hub may be silent while the broker has not taken what was sent: the hub cannot have heard it. Not for ever: there are brokers that never acknowledge what is too large for them."""

IDLE_WAKE_MS = 3_600_000
"""Where nothing is owed only an event changes anything; the processor of an idle edge need not be woken for it."""


@dataclass(frozen=True, slots=True)
class Send:
    """One batch to read and publish: records `first` to at most `last` of `stream`."""

    stream: str
    lane: str
    first: int
    last: int
    again: bool = False


@dataclass(slots=True)
class StreamLanes:
    """Where one stream stands on the link. Sequence numbers; `next` ones are the first not yet sent."""

    durable: int = 0
    floor: int = 1
    receipted: int = 0
    live_from: int = 1
    live_next: int = 1
    history_next: int = 1
    held: int = 0
    progress_ms: int = 0
    waiting_since_ms: int | None = None
    wants: deque[tuple[int, int]] = field(default_factory=deque)


class Lanes:
    """The two lanes of every stream.

    Args:
        inflight: messages handed to the broker and not acknowledged, at most.
    """

    def __init__(self, inflight: int = 8) -> None:
        self._inflight_max = inflight
        self.inflight = 0
        self.up = False
        self.credit = 0
        self.quarantine = ""
        self.streams: dict[str, StreamLanes] = {name: StreamLanes() for name in STREAMS}
        self._order = sorted(STREAMS, key=lambda name: STREAMS[name].priority)
        self._heard_ms = 0
        self._known: set[str] = set()
        self.resyncs = 0

    # -- events --------------------------------------------------------------------------------------------------------------

    def link_up(self, durable: Mapping[str, int], floors: Mapping[str, int], now_ms: int) -> None:
        """A hub is there. Both lanes of a stream wait for its first receipt: it may hold another history under our name (a replaced disk)."""
        self.up, self.inflight, self.credit, self._heard_ms = True, 0, 0, now_ms
        self._known.clear()
        for name, lane in self.streams.items():
            lane.durable, lane.floor = durable[name], floors[name]
            lane.live_from = lane.live_next = lane.durable + 1
            lane.history_next = 1  # nothing is claimed to be sent until the hub has said where history starts
            lane.held, lane.waiting_since_ms, lane.progress_ms = 0, None, now_ms
            lane.wants.clear()

    def link_down(self) -> None:
        """No hub: nothing is sent; what is under way counts as not sent."""
        self.up, self.inflight = False, 0

    def committed(self, stream: str, seq: int, now_ms: int) -> None:
        """Records up to `seq` are durable at the edge."""
        lane = self.streams[stream]
        lane.durable = seq
        if lane.waiting_since_ms is None:
            lane.waiting_since_ms = now_ms
        if self.up and lane.live_next + LIVE_LAG <= seq:
            if lane.history_next >= lane.live_from:
                lane.history_next = lane.live_next
            lane.live_from = lane.live_next = seq + 1
            lane.waiting_since_ms = None

    def released(self, stream: str, floor: int) -> None:
        """The edge has freed what is below `floor`."""
        lane = self.streams[stream]
        lane.floor = max(lane.floor, floor)
        # What was dropped before the live lane came to it is never sent; without this the lane would ask for it for ever.
        lane.live_next = max(lane.live_next, lane.floor)

    def receipt(self, stream: str, upto: int, held: int, want: list[list[int]], now_ms: int) -> None:
        """The hub's word on one stream; the first one after link-up decides where history starts."""
        lane = self.streams[stream]
        self._heard_ms = now_ms
        if stream not in self._known:
            self._known.add(stream)
            lane.receipted = upto
            lane.history_next = min(max(upto + 1, lane.floor), lane.live_from)
        elif upto > lane.receipted:
            lane.receipted = upto
            lane.progress_ms = now_ms
        if held != lane.held:
            lane.progress_ms = now_ms
        if upto + 1 > lane.history_next:
            lane.history_next = min(upto + 1, max(lane.live_from, lane.history_next))
        lane.held = held
        sent_to = lane.live_next - 1
        for first, last in want[:MAX_WANT_RANGES]:
            bounded = (max(first, lane.floor, upto + 1), min(last, sent_to))
            if bounded[0] <= bounded[1] and bounded not in lane.wants and len(lane.wants) < MAX_WANT_RANGES:
                lane.wants.append(bounded)

    def acked(self, stream: str, sent_ms: int, now_ms: int) -> None:
        """The broker acknowledged one message. Where that took long the link is slow, and the hub cannot have heard of it before: its silence begins now."""
        self.inflight = max(0, self.inflight - 1)
        if now_ms - sent_ms >= SLOW_MS:
            self._heard_ms = self.streams[stream].progress_ms = now_ms

    def sent(self, send: Send, last: int, now_ms: int) -> None:
        """A batch was published; `last` is the last seq that fitted."""
        lane = self.streams[send.stream]
        self.inflight += 1
        if send.again:
            if lane.wants and lane.wants[0][0] == send.first:
                _, end = lane.wants.popleft()
                if last < end:
                    lane.wants.appendleft((last + 1, end))
        elif send.lane == "live":
            if lane.live_next - 1 <= lane.receipted + lane.held:
                lane.progress_ms = now_ms  # nothing was owed: the wait begins now
            lane.live_next = last + 1
            lane.waiting_since_ms = now_ms if lane.durable > last else None
        else:
            lane.history_next = last + 1

    # -- what to do ----------------------------------------------------------------------------------------------------------

    def outstanding_history(self) -> int:
        """History records sent and not yet receipted, over all streams."""
        return sum(max(0, lane.history_next - 1 - lane.receipted) for name, lane in self.streams.items() if name in self._known)

    def backlog(self) -> int:
        """Records that the hub is not known to have."""
        return sum(max(0, lane.durable - max(lane.receipted, lane.floor - 1)) - lane.held for lane in self.streams.values())

    def next(self, now_ms: int) -> Send | None:
        """The next batch to send, or None where there is nothing to send or no room."""
        if not self.up or self.quarantine or self.inflight >= self._inflight_max:
            return None
        for name in self._order:
            lane = self.streams[name]
            if name in self._known and lane.live_next <= lane.durable and self._lingered(name, lane, now_ms) and self._live_room(lane):
                return Send(name, "live", lane.live_next, lane.durable)
        for name in self._order:
            lane = self.streams[name]
            while lane.wants:
                first, last = lane.wants[0]
                if last < lane.floor or last <= lane.receipted:
                    lane.wants.popleft()
                    continue
                if first < max(lane.floor, lane.receipted + 1):
                    lane.wants[0] = (max(lane.floor, lane.receipted + 1), last)
                    first = lane.wants[0][0]
                return Send(name, "history", first, last, again=True)
        room = self.credit - self.outstanding_history()
        if room > 0:
            for name in self._order:
                lane = self.streams[name]
                if name in self._known and lane.history_next < lane.live_from:
                    first = max(lane.history_next, lane.floor)
                    if first >= lane.live_from:
                        lane.history_next = lane.live_from
                        continue
                    return Send(name, "history", first, min(lane.live_from - 1, first + room - 1))
        return None

    def _lingered(self, name: str, lane: StreamLanes, now_ms: int) -> bool:
        return lane.waiting_since_ms is None or now_ms - lane.waiting_since_ms >= LINGER_MS[name]

    def _live_room(self, lane: StreamLanes) -> bool:
        first = max(lane.live_from, lane.receipted + 1)
        return lane.live_next - first - lane.held < LIVE_WINDOW

    def ask_self(self, now_ms: int) -> bool:
        """The hub may not know that it misses something: the tail of a live lane was lost, or the last message that reached it was an old one, which tells of less. With no progress for too
        long, send again: the tail, or, where the hub holds some of what comes after, the one record that it surely misses; that message tells it how much was sent."""
        found = False
        for name, lane in self.streams.items():
            underway = lane.history_next < lane.live_from
            if name not in self._known or lane.wants or (lane.history_next if underway else lane.live_next) - 1 <= lane.receipted:
                continue
            if self.up and not self.quarantine and now_ms - lane.progress_ms >= RECEIPT_TIMEOUT_MS:
                first = max(lane.receipted + 1, lane.floor)
                lane.wants.append((first, first if underway or lane.held else lane.live_next - 1))
                lane.progress_ms = now_ms
                found = True
        return found

    def wake_ms(self, now_ms: int) -> int:
        """Milliseconds until `next` or `silent` may answer differently without another event."""
        wake = RECEIPT_TIMEOUT_MS if self._owed() else IDLE_WAKE_MS
        for name, lane in self.streams.items():
            if lane.live_next <= lane.durable and lane.waiting_since_ms is not None:
                due_ms = lane.waiting_since_ms + LINGER_MS[name] - now_ms
                if due_ms > 0:  # else it has lingered long enough and waits for an event: room, or the end of a quarantine
                    wake = min(wake, due_ms)
        return wake

    def silent(self, now_ms: int) -> bool:
        """The hub has said nothing for too long about what was sent: start the lanes afresh (`link_up`)."""
        patience = RECEIPT_TIMEOUT_MS * (UNTAKEN if self.inflight else 1)
        if not self.up or self.quarantine or now_ms - self._heard_ms < patience:
            return False
        return self._owed()

    def _owed(self) -> bool:
        """The hub has yet to say something: about what was sent, or where history starts."""
        sent = any(lane.live_next - 1 > lane.receipted or lane.history_next - 1 > lane.receipted for lane in self.streams.values())
        return sent or len(self._known) < len(self.streams)
