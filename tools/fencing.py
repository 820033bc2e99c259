"""What a device does with the fence of a command: twenty lines that its author may copy. See docs/site.md."""

from typing import Any

MAX_DUTIES = 1_000
"""Duties remembered: as many as a site has devices."""


class Fences:
    """The highest fence seen of each duty."""

    def __init__(self) -> None:
        self.highest: dict[str, int] = {}

    def admits(self, command: dict[str, Any]) -> bool:
        """Whether `command` may be done; a lower fence than one seen before is that of an edge that has been replaced."""
        duty, fence = command.get("duty"), command.get("fence", 0)
        if not duty:
            return True  # no site: nobody else can send it
        if fence < self.highest.get(duty, 0):
            return False
        if duty in self.highest or len(self.highest) < MAX_DUTIES:
            self.highest[duty] = fence
        return True

    def refusal(self, command: dict[str, Any]) -> dict[str, Any]:
        """The result that says so: an edge whose site has lost its count learns where to go on."""
        return {"id": command["id"], "ok": False, "reason": "fenced", "fence": self.highest[command["duty"]]}
