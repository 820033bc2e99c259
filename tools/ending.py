"""Ending tasks that talk over MQTT, for certain."""

import asyncio
from typing import Any

AGAIN_S = 1.0
"""How long a task has to end before it is cancelled once more."""


async def ended(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks until they are done; what they raised is dropped.

    Once is not always enough: asyncio.wait_for (until Python 3.12) forgets a cancellation where what it waits for ends in the same turn, and
    aiomqtt waits that way, so that a loop of publishes may go on for ever.
    """
    waiting = {task for task in tasks if not task.done()}
    while waiting:
        for task in waiting:
            task.cancel()
        _, waiting = await asyncio.wait(waiting, timeout=AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)
