"""Keeps the migration worker that carries the states of moves: a process of the migration engine, which knows nothing of ours, while a move has use for it and no longer.

The hub hands out what is to be carried (`hub/transfers`), by leases, and the engine takes up what had come before. So this keeps nothing: a worker that died is started again after a pause, and one that
an earlier agent left has ended with it.
"""

import asyncio
import ctypes
import importlib.util
import logging
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from ..config.schema import WorkloadsConfig

log = logging.getLogger(__name__)

AGAIN_S, AGAIN_MOST_S = 1.0, 60.0
"""Pause before a worker that ended by itself is started again, doubled each time."""

END_S = 15.0
"""Seconds that a worker is given to end: it gives its own processes five."""

SLOTS = 4
"""Sides that it carries at once: as many as moves in which a node takes part, with some to spare for one that is being given up."""

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
"""Loaded before any fork."""


def reason_against(workloads: WorkloadsConfig) -> str:
    """Why nothing can be carried to and from this node; empty where it can."""
    if not workloads.moves_hub:
        return "no hub to carry states by is configured (workloads.moves_hub)"
    if not workloads.moves_token_file or not Path(workloads.moves_token_file).exists():
        return "workloads.moves_token_file is not there"
    return "" if importlib.util.find_spec("gpu_migration") is not None else "the migration engine is not installed"


class Carrier:
    """One node's migration worker.

    Args:
        name: the node's, and so the worker's.
        folder: what it may read and write.
        sweep: takes away what no move has use for, given the names of those that are under way.
    """

    def __init__(self, name: str, folder: Path, workloads: WorkloadsConfig, sweep: Callable[[set[str]], None]) -> None:
        self._name, self._folder, self._workloads, self._sweep = name, folder, workloads, sweep
        self._wanted: set[str] = set()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def need(self, moves: Collection[str]) -> None:
        """These moves are under way here. Returns at once."""
        self._wanted = set(moves)
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="migration worker")

    async def close(self) -> None:
        """The worker ends with the agent; the next one has it go on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        process: asyncio.subprocess.Process | None = None
        pause = AGAIN_S
        try:
            while True:
                self._changed.clear()
                if not self._wanted:
                    await _ended(process)
                    process, pause = None, AGAIN_S
                elif process is None or process.returncode is not None:
                    process = await self._begun()
                try:
                    await asyncio.to_thread(self._sweep, set(self._wanted))
                except OSError as error:  # what is left lying is not worth a move
                    log.error("what no move has use for could not be taken away: %s", error)
                if await self._news(process):
                    continue
                log.warning("the migration worker ended with status %s; it is started again in %.0f s", process.returncode if process is not None else None, pause)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), pause)
                pause = min(AGAIN_MOST_S, 2 * pause)
        finally:
            await _ended(process)

    async def _begun(self) -> asyncio.subprocess.Process | None:
        workloads = self._workloads
        words = [
            sys.executable, "-m", "gpu_migration", "worker", "--hub", workloads.moves_hub, "--name", self._name, "--token-file", workloads.moves_token_file, "--folder", str(self._folder),
            "--listen", workloads.moves_listen, "--slots", str(SLOTS), *(["--advertise", workloads.moves_advertise] if workloads.moves_advertise else []),
            *(["--ca-file", workloads.moves_ca_file] if workloads.moves_ca_file else []),
        ]
        try:
            return await asyncio.create_subprocess_exec(*words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, preexec_fn=_die_with_parent)
        except OSError as error:
            log.error("the migration worker could not be started: %s", error)
            return None

    async def _news(self, process: asyncio.subprocess.Process | None) -> bool:
        """Until other moves are under way (True), or the worker has ended by itself, or could not be started (False)."""
        if self._changed.is_set():
            return True
        if process is None and self._wanted:
            return False
        waiting = [asyncio.ensure_future(self._changed.wait()), *([asyncio.ensure_future(process.wait())] if process is not None else [])]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        return self._changed.is_set()


async def _ended(process: asyncio.subprocess.Process | None) -> None:
    if process is None or process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), END_S)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
