"""Waiting for what has no event to await: bounded polling, and words about what did not happen."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

STEP_S = 0.01
"""Pause between two looks: short beside anything that is waited for here."""

PATIENCE_S = 60.0
"""What is waited for may take so long on a machine that does other work as well. A test that passes never waits it out."""


async def until(check: Callable[[], Any], seconds: float = PATIENCE_S, what: str = "") -> Any:
    """Wait until `check()` (a plain or a coroutine function) gives something true and return it; AssertionError past `seconds`, or `PATIENCE_S` where that is more."""
    loop = asyncio.get_running_loop()
    end = loop.time() + max(seconds, PATIENCE_S)
    while True:
        found = check()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        if loop.time() > end:
            raise AssertionError(f"{what or inspect.getsource(check).strip()} did not happen within {max(seconds, PATIENCE_S):g} s")
        await asyncio.sleep(STEP_S)


def until_sync(check: Callable[[], Any], seconds: float = PATIENCE_S, what: str = "") -> Any:
    """`until` for tests outside an event loop."""
    end = time.monotonic() + max(seconds, PATIENCE_S)
    while not (found := check()):
        if time.monotonic() > end:
            raise AssertionError(f"{what or inspect.getsource(check).strip()} did not happen within {max(seconds, PATIENCE_S):g} s")
        time.sleep(STEP_S)
    return found
