"""Commands of an OCI runtime (runc, crun) about containers that there are."""

import asyncio
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from .face import Exit, Failed, Output, Ran
from .instance import LOOK_S, bounded

COMMAND_S = 60.0
"""A runtime that takes longer for one command hangs."""

LEFT_S = 10.0
"""A container that was killed, and its keeper, are gone by then; more means that the kernel holds on to a process."""

SAID = 2000
"""Characters of a runtime's own words in an error."""


def command(runtime: Sequence[str], state: Path) -> list[str]:
    """The runtime, with its folder of states."""
    return [*runtime, "--root", str(state)]


def _ordinary() -> None:
    """In the child: the ordinary priority, whatever ours is. Without nice(1), which an image need not have."""
    if os.getpriority(os.PRIO_PROCESS, 0) < 0:
        os.setpriority(os.PRIO_PROCESS, 0, 0)


async def run(runtime: Sequence[str], *words: str, environment: Mapping[str, str] | None = None, seconds: float = COMMAND_S) -> None:
    """One command of what `command` gives; raises `Failed` with the runtime's own words, and where it does not come back in time."""
    process = await asyncio.create_subprocess_exec(
        *runtime, *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True, env=environment, preexec_fn=_ordinary,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(seconds):
            (said, _), code = await asyncio.gather(bounded(process.stderr), process.wait())
    except TimeoutError:
        raise Failed(words[0], f"the runtime did not come back within {seconds:g} s", "look at the node: its kernel or disk hangs") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code != 0:
        raise Failed(words[0], f"the runtime says: {said.decode('utf-8', 'replace').strip()[:SAID] or code}", "look at the node")


async def beside(runtime: Sequence[str], name: str, folder: Path, args: Sequence[str], timeout_s: float) -> Ran:
    """Run a program in a container beside its own; how it ended and what it wrote. `folder`: for a note while it runs. Raises `Failed` where it takes longer: it has been killed then."""
    note = folder / f"exec-{time.monotonic_ns()}.pid"
    process = await asyncio.create_subprocess_exec(
        *runtime, "exec", "--pid-file", str(note), name, *args, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, start_new_session=True, preexec_fn=_ordinary,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        async with asyncio.timeout(timeout_s):
            (out, cut), (err, also), code = await asyncio.gather(bounded(process.stdout), bounded(process.stderr), process.wait())
    except TimeoutError:
        raise Failed("exec", f"{args[0][:80]} took longer than {timeout_s:g} s, and was killed", "give it more time") from None
    finally:
        if process.returncode is None:
            # The runtime waits for the command, so its pid is its own still; without it the command would live on. On a busy node it may not have come as far as to write it down.
            with suppress(TimeoutError):
                async with asyncio.timeout(LEFT_S):
                    while process.returncode is None and not note.exists():
                        await asyncio.sleep(LOOK_S)
            with suppress(OSError, ValueError):
                os.kill(int(note.read_text()), signal.SIGKILL)
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        note.unlink(missing_ok=True)
    return Ran(Exit(code, max(0, code - 128) if 128 < code <= 192 else 0), Output(out, err, cut or also))
