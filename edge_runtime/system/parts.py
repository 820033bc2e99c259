"""Long-lived tasks, none of which may end by itself: one that does is told, where nobody would notice that its work is not done any more."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Parts:
    """What a program consists of. `ended` says, by name, of which it has no more, and why; only a new start brings it back."""

    def __init__(self) -> None:
        self.ended: dict[str, str] = {}
        self.ending = False
        """Set it when the program stops: from then on ends are what is wanted, also by themselves."""

    def start(self, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        """Begin one; call inside the running loop. Cancel it to end it."""
        return self.watch(asyncio.get_running_loop().create_task(work, name=name))

    def watch(self, task: "asyncio.Task[None]") -> "asyncio.Task[None]":
        """One that was begun by somebody else, by its own name."""
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled():
            return
        error = task.exception()
        if self.ending:
            return
        self.ended[task.get_name()] = f"{type(error).__name__}: {error}"[:300] if error else "it returned"
        log.critical("%s has ended and does not come back before a new start", task.get_name(), exc_info=error)

    def problems(self) -> list[str]:
        """In words; empty when all is there."""
        return [f"{name} has ended ({why}): start anew" for name, why in self.ended.items()]
