"""Waiting for what has no event to await: bounded polling, and words about what did not happen."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

STEP_S = 0.01
"""Pause between two looks: short beside anything that is waited for here."""


async def until(check: Callable[[], Any], seconds: float = 60.0, what: str = "") -> Any:
    """Wait until `check()` (a plain or a coroutine function) gives something true and return it; AssertionError past `seconds`."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while True:
        found = check()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        if loop.time() > end:
            raise AssertionError(f"{what or inspect.getsource(check).strip()} did not happen within {seconds:g} s")
        await asyncio.sleep(STEP_S)


def until_sync(check: Callable[[], Any], seconds: float = 60.0, what: str = "") -> Any:
    """`until` for tests outside an event loop."""
    end = time.monotonic() + seconds
    while not (found := check()):
        if time.monotonic() > end:
            raise AssertionError(f"{what or inspect.getsource(check).strip()} did not happen within {seconds:g} s")
        time.sleep(STEP_S)
    return found
