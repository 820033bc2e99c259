"""An asyncio event loop on virtual time: it never sleeps, and when nothing is ready it jumps to the next timer.

Whatever runs belongs to a *life* (one run of one process on one machine), carried in a context variable, so that ending a life stops its
tasks and timers where they stand, as a power cut does, without one line of their clean-up running.
"""

import asyncio
import heapq
import weakref
from asyncio.events import Handle, TimerHandle
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextvars import Context, ContextVar, copy_context
from typing import Any

from edge_runtime.journal.lane import Worker

STEPS_MAX = 40_000_000
"""Callbacks of one run at most: a run that needs more is in a loop that does not let time pass."""

STUCK_STEPS = 300_000
"""Callbacks at one instant at most."""

LIFE: ContextVar["Life | None"] = ContextVar("life", default=None)


class Life:
    """One run of one process. `alive` false: nothing of it runs any more."""

    __slots__ = ("alive", "context", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.context: Context = copy_context()
        self.context.run(LIFE.set, self)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function` as this process; nothing happens once it has ended."""
        if not self.alive:
            return None
        if LIFE.get() is self:
            return function(*arguments)
        return self.context.run(function, *arguments)


class Stuck(RuntimeError):
    """The run does not get anywhere: too many callbacks, or nothing left to wait for."""


class SimLoop(asyncio.BaseEventLoop):
    """See the module. `time()` is seconds since the start of the run."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._ahead: float | None = None
        self._timers: list[tuple[float, int, TimerHandle]] = []
        self._order = 0
        self.steps = 0
        self._tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self.outside: Context = copy_context()
        """The context of what belongs to no process: the network, the brokers, the devices."""

    def create_task(self, coro: Any, **arguments: Any) -> "asyncio.Task[Any]":  # type: ignore[override]
        """See asyncio; remembered, for `bury`."""
        task: asyncio.Task[Any] = super().create_task(coro, **arguments)
        self._tasks.add(task)
        return task

    def bury(self) -> None:
        """End what processes that were killed had begun; their clean-up may not wait for anything, so it is told twice."""
        for task in list(self._tasks):
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                for _ in range(3):
                    try:
                        task.get_coro().close()  # type: ignore[union-attr]
                        break
                    except RuntimeError:
                        continue

    def time(self) -> float:
        """Virtual seconds."""
        return self._now + self._ahead if self._ahead else self._now

    def block(self, seconds: float) -> None:
        """Whoever runs now is held up (a slow disk): on the loop everything waits, on a worker only its own result comes later."""
        if self._ahead is not None:
            self._ahead += seconds
        else:
            self._now += seconds

    def on_thread(self, job: Callable[[], Any]) -> tuple[Any, BaseException | None, float]:
        """Run `job` as a worker's thread would: result, error, and the seconds it was held up."""
        self._ahead = 0.0
        try:
            return job(), None, self._ahead
        except Exception as error:
            return None, error, self._ahead or 0.0
        finally:
            self._ahead = None

    # -- what asyncio asks for -----------------------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Handle:  # type: ignore[override]
        """See asyncio."""
        handle = Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> TimerHandle:  # type: ignore[override]
        """See asyncio; equal times keep their order."""
        timer = TimerHandle(when, callback, args, self, context)
        self._order += 1
        heapq.heappush(self._timers, (when, self._order, timer))
        return timer

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> TimerHandle:  # type: ignore[override]
        """See asyncio."""
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":  # type: ignore[override]
        """See asyncio; only with an executor of ours, there is no other thread."""
        return asyncio.wrap_future(executor.submit(func, *args), loop=self)

    def _timer_handle_cancelled(self, handle: TimerHandle) -> None:
        """Cancelled timers are skipped when their time comes."""

    def _run_once(self) -> None:
        ready: deque[Handle] = self._ready  # type: ignore[attr-defined]
        timers = self._timers
        life_of = LIFE
        instant = 0
        while not self._stopping:  # type: ignore[attr-defined]
            while ready:
                handle = ready.popleft()
                if handle._cancelled:
                    continue
                life = handle._context.get(life_of)  # type: ignore[attr-defined]
                if life is not None and not life.alive:
                    continue
                instant += 1
                handle._run()
                if self._stopping:  # type: ignore[attr-defined]
                    return
                if instant > STUCK_STEPS:
                    raise Stuck(f"{STUCK_STEPS} callbacks at {self._now:.3f} s")
            if not timers:
                raise Stuck("nothing is left to wait for")
            when, _, timer = heapq.heappop(timers)
            if timer._cancelled:
                continue
            if when > self._now:
                self._now = when
                self.steps += instant
                instant = 0
                if self.steps > STEPS_MAX:
                    raise Stuck(f"{STEPS_MAX} callbacks by {self._now:.0f} s")
            ready.append(timer)


class SimWorker(Worker):
    """A worker without a thread: a job runs in a later turn of the loop, its result comes when the disk has let it through."""

    def __init__(self, name: str, loop: SimLoop) -> None:
        self._sim = loop
        self._loop = loop
        self._waiting: deque[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]] = deque()
        self._busy = False

    def submit(self, job: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """See `Worker`."""
        self._waiting.append((job, done))
        if not self._busy:
            self._busy = True
            self._sim.call_soon(self._next)

    def _next(self) -> None:
        if not self._waiting:
            self._busy = False
            return
        job, done = self._waiting.popleft()
        result, error, seconds = self._sim.on_thread(job)
        if seconds:
            self._sim.call_later(seconds, self._finish, result, error, done)
        else:
            self._sim.call_soon(self._finish, result, error, done)

    def _finish(self, result: Any, error: BaseException | None, done: Callable[[Any, BaseException | None], None]) -> None:
        self._sim.call_soon(self._next)
        done(result, error)

    def stop(self) -> None:
        """See `Worker`: what is queued is done first."""
        while self._waiting:
            job, done = self._waiting.popleft()
            result, error, _ = self._sim.on_thread(job)
            self._sim.call_soon(done, result, error)


class SimExecutor(Executor):
    """One thread of the hub's: jobs in order, each after a moment, so that a hub can end between a job and what follows it."""

    def __init__(self, loop: SimLoop, delay_s: Callable[[], float]) -> None:
        self._loop = loop
        self._delay_s = delay_s
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._busy = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """See `Executor`."""
        future: Future[Any] = Future()
        self._jobs.append((lambda: fn(*args, **kwargs), future))
        if not self._busy:
            self._busy = True
            self._loop.call_later(self._delay_s(), self._next)
        return future

    def _next(self) -> None:
        job, future = self._jobs.popleft()
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(error)
        if self._jobs:
            self._loop.call_later(self._delay_s(), self._next)
        else:
            self._busy = False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """What is queued is done first."""
        while self._jobs:
            self._next()
