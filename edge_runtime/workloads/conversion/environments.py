"""What the processes of a workload were started with: their environment, as the kernel shows it."""

import asyncio
from pathlib import Path

from ..drivers.instance import LOOK_S

LOOKS = 5
"""At a process that shows no environment, `LOOK_S` apart, before it is taken for one that has none."""


def environment(raw: bytes) -> dict[str, str]:
    """What /proc/PID/environ says."""
    return dict(one.decode("utf-8", "replace").partition("=")[::2] for one in raw.split(b"\0") if b"=" in one)  # type: ignore[misc]


async def environment_of(pid: int) -> dict[str, str] | None:
    """What a process was started with; None where it has ended. One that is just becoming another program, or has just ended, shows nothing for a moment, as one without an environment does for good."""
    for _ in range(LOOKS):
        try:
            raw = Path(f"/proc/{pid}/environ").read_bytes()
            ended = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")
        except OSError:
            return None
        if raw:
            return environment(raw)
        if ended:
            return None
        await asyncio.sleep(LOOK_S)
    return {}
