"""How large a batch may be for the broker that it goes through. Pure.

The contract's messages have up to `limits.MAX_MESSAGE_BYTES`, and there are brokers that take less: by their nature, or since somebody has set it so. One that speaks MQTT 5 says how much at CONNACK (Maximum Packet Size, 3.2.2.3.6), or
by the reason for which it ends a connection. With MQTT 3.1.1 it just ends it, and would again, for ever.
"""

LEAST = 8_192
"""Bytes of a batch below which no limit is looked for: what ends the connection then is something else."""

AGAIN_MS = 3_600_000
"""After which a limit that no broker has told is taken for twice as much: it may have been a bad line, or the broker is another one since."""

LOST_AFTER = 3
"""Connections in a row that ended with a batch under way that was larger than all that they acknowledged, from which it was too large."""


class Room:
    """Of one link. Sizes are of packets, in bytes.

    Args:
        most: from which a limit is none.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.told = 0
        """By the broker, at this connection; 0: nothing."""
        self.found = 0
        """By what has happened; 0: nothing."""
        self._found_ms = 0
        self._lost = 0
        self._largest = 0
        """Acknowledged at this connection."""
        self._under_way: list[int] = []

    def begin(self, told: int) -> None:
        """A connection."""
        self.told, self._largest, self._under_way = told, 0, []

    def sent(self, size: int) -> None:
        """A batch."""
        self._under_way.append(size)

    def acknowledged(self, size: int) -> None:
        """One that was sent at this connection."""
        if size in self._under_way:
            self._under_way.remove(size)
        self._largest = max(self._largest, size)

    def lost(self, too_large: bool, now_ms: int) -> int:
        """The connection has ended; `too_large`: for a packet's size, the broker says. The size that was too large where that is new, else 0."""
        size = max(self._under_way, default=0)
        self._under_way = []
        if size <= max(LEAST, self._largest):
            self._lost = 0
            return 0
        self._lost += 1
        if not too_large and self._lost < LOST_AFTER:
            return 0
        self._lost, self.found, self._found_ms = 0, max(LEAST, size // 2), now_ms
        return size

    def doubt(self, now_ms: int) -> int:
        """The hub goes on asking for what was sent: a broker that speaks MQTT 3.1.1 drops what is too large for it without a word. The size in doubt where that is new, else 0."""
        size = max(self._largest, *self._under_way, 0)
        if size <= max(LEAST, self.found and self.found // 2):
            return 0
        self.found, self._found_ms, self._largest = max(LEAST, size // 2), now_ms, 0
        self._under_way = []
        return size

    def most(self, now_ms: int) -> int:
        """That a packet may have; 0: no limit is known."""
        if self.found and now_ms - self._found_ms >= AGAIN_MS:
            self.found, self._found_ms = 2 * self.found, now_ms
            if self.found >= self._most:
                self.found = 0
        return min((limit for limit in (self.told, self.found) if limit), default=0)
