"""How many bytes may be under way to the broker: what the link takes in a few seconds. Pure.

Where more is under way than that (a megabyte at 16 kbit/s is eight minutes), nothing of it is acknowledged before the connection's keep-alive or the hub's silence is taken for its end, and all of it is sent again, for ever, by a link that is
paid by the byte. Neither does a command come through, nor a ping: they wait behind it. So the time that the broker takes for a message is held near `GOAL_MS`, whatever the link's rate, which nobody tells: the way of Vegas and
LEDBAT (RFC 6817), by delay, but of whole messages and with seconds for a goal, so that a fast link is never held up.
"""

GOAL_MS = 4_000
"""From a message's sending to its acknowledgement: a quarter of the keep-alive, so that a ping behind it is answered in time, and below the hub's silence that is taken for a loss (`lanes.RECEIPT_TIMEOUT_MS`)."""

START, LEAST = 16_384, 4_096
"""Bytes: before anything is known, eight seconds at 16 kbit/s, and six round trips until a fast link is full; and however slow it is: a handful of records."""


class Window:
    """Of one link, over its connections.

    Args:
        most: bytes, from which the link is no bound.
    """

    def __init__(self, most: int) -> None:
        self._most = max(LEAST, most)
        self.size = min(START, self._most)
        self._under_way = 0
        self._cut_ms = 0

    def begin(self) -> None:
        """A connection, or all is sent again: nothing is under way."""
        self._under_way = 0

    def lost(self) -> None:
        """A connection has ended; with something under way it may have been too much."""
        if self._under_way:
            self.size = max(LEAST, self.size // 2)
        self._under_way = 0

    def sent(self, size: int) -> None:
        """A message of so many bytes."""
        self._under_way += size

    def acknowledged(self, size: int, sent_ms: int, now_ms: int) -> None:
        """One that was sent at this connection."""
        full = self._under_way >= self.size // 2
        self._under_way = max(0, self._under_way - size)
        took = now_ms - sent_ms
        if took > GOAL_MS:
            if sent_ms >= self._cut_ms:  # what was sent before the last cut tells of what was under way then
                self.size, self._cut_ms = max(LEAST, self.size * GOAL_MS // took), now_ms
        elif full and took <= GOAL_MS // 2:  # how soon a little is there says nothing of more
            self.size = min(self._most, self.size + size)

    def room(self) -> int:
        """Bytes that the next message may have; 0: it has to wait. One may always be under way."""
        if not self._under_way:
            return self.size
        left = self.size - self._under_way
        return left if left >= LEAST else 0
