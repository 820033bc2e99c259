"""Which of many reasons that come again are worth a line of the log. Pure."""

TELL_AGAIN_S, TELL_APART_S = 3600.0, 60.0
"""The log has why there is no connection, once an hour while that stays so; another reason at once, but not more often than that: two that take turns must not fill a disk in an outage of days."""


class Reasons:
    """Of ends of one connection after the other."""

    def __init__(self) -> None:
        self._reason, self._at_s = "", float("-inf")
        self.told = False
        """The log has that there is no connection."""

    def worth(self, reason: str, now_s: float) -> bool:
        """Whether it is to be told now."""
        if now_s - self._at_s < (TELL_AGAIN_S if self.told and reason == self._reason else TELL_APART_S):
            return False
        self._reason, self._at_s, self.told = reason, now_s, True
        return True
