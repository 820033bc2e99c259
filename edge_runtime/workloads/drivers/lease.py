"""How long a container may run without its agent: a file per instance that the agent renews and the keeper looks at. In memory: no wear of flash, and gone with a restart of the machine, as its clock is."""

import hashlib
import os
from pathlib import Path

from . import outside

FOLDER = Path(outside.RUN, "leases")
"""Where they are."""


def name_of(workload: str, epoch: int) -> str:
    """What an instance's folder and control group are called, and the runtime's name of it. Ids have no `+`, runtimes take no colon."""
    return f"{workload.replace(':', '+')}.{epoch}"


def folder_of(data_dir: str, workload: str, epoch: int) -> Path:
    """The folder of a container, there or not."""
    return Path(data_dir).resolve() / "workloads/containers" / name_of(workload, epoch)


def path_of(folder: Path) -> Path:
    """The lease of the instance in `folder`; the agents of one machine (as in tests) have their own."""
    return FOLDER / f"{folder.name}-{hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest()}"


def write(folder: Path, until_ms: int) -> None:
    """The instance may run until then, milliseconds of CLOCK_BOOTTIME. Raises OSError."""
    path = path_of(folder)
    outside.made(str(path.parent))
    new = path.with_name(path.name + ".new")
    new.write_text(str(until_ms))
    os.replace(new, path)


def read(folder: Path) -> int:
    """Until when it may run; 0 where nobody said."""
    try:
        return int(path_of(folder).read_text())
    except (OSError, ValueError):
        return 0


def remove(folder: Path) -> None:
    """Nothing runs there any more."""
    path_of(folder).unlink(missing_ok=True)
