"""What the kernel shows of a workload's processes: what they were started with, and whether they are ending, as which it shows other things."""

import asyncio
from pathlib import Path

from ..drivers.instance import LOOK_S

LOOKS = 5
"""At a process that shows no environment, `LOOK_S` apart, before it is taken for one that has none."""


PF_EXITING = 0x4
"""Of a process's flags, the seventh field behind its name (proc(5)); include/linux/sched.h."""


def ending(pid: int) -> bool:
    """Whether a process has ended or is just doing so. It shows no environment then, and where control groups are of version 1 the root's as its own (proc_cgroup_show)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return True
    return fields[0] in (b"Z", b"X") or bool(int(fields[6]) & PF_EXITING)


def environment(raw: bytes) -> dict[str, str]:
    """What /proc/PID/environ says."""
    return dict(one.decode("utf-8", "replace").partition("=")[::2] for one in raw.split(b"\0") if b"=" in one)  # type: ignore[misc]


async def environment_of(pid: int) -> dict[str, str] | None:
    """What a process was started with; None where it has ended. One that is just becoming another program, or has just ended, shows nothing for a moment, as one without an environment does for good."""
    for _ in range(LOOKS):
        try:
            raw = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return None
        if raw:
            return environment(raw)
        if ending(pid):
            return None
        await asyncio.sleep(LOOK_S)
    return {}
