"""One piece of work for all who want the same."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Result = TypeVar("Result")

LINGER_S = 5.0
"""Work that nobody waits for goes on for so long: whoever waited mostly comes back at once, because something else of its desired state has changed."""


@dataclass(slots=True)
class _Job(Generic[Result]):
    task: asyncio.Task[Result]
    waiting: int = 0


class Shared(Generic[Result]):
    """Tasks by what they are for. Whoever is cancelled leaves, and the others go on waiting; when all have left, the task is cancelled."""

    def __init__(self, linger_s: float = LINGER_S) -> None:
        self._linger_s = linger_s
        self._jobs: dict[Hashable, _Job[Result]] = {}

    async def get(self, key: Hashable, make: Callable[[], Awaitable[Result]]) -> Result:
        """What comes of it; begun by `make()` where it is not under way."""
        job = self._jobs.get(key)
        if job is None:
            job = self._jobs[key] = _Job(asyncio.ensure_future(make()))  # type: ignore[arg-type]
            job.task.add_done_callback(lambda task: self._over(key, task))
        job.waiting += 1
        try:
            return await asyncio.shield(job.task)
        finally:
            job.waiting -= 1
            if not job.waiting and not job.task.done():
                asyncio.get_running_loop().call_later(self._linger_s, self._leave, job)

    async def close(self) -> None:
        """End all."""
        tasks = [job.task for job in self._jobs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def __iter__(self) -> Iterator[Hashable]:
        """What is under way."""
        return iter(list(self._jobs))

    def _over(self, key: Hashable, task: "asyncio.Task[Result]") -> None:
        self._jobs.pop(key, None)
        if not task.cancelled():
            task.exception()  # whoever waits gets it; nobody may

    @staticmethod
    def _leave(job: "_Job[Result]") -> None:
        if not job.waiting:
            job.task.cancel()
