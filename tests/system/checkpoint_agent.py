"""An agent's part in a move through a checkpoint, as a process that can be killed at any step: `python -m tests.system.checkpoint_agent FOLDER POINT`.

POINT is `agent:STEP` or `keeper:STEP`, whom to kill and when: a step that `Moves` or `Checkpoints` tells of, or of the restore `laid` (the target's folder is there), `criu` (CRIU restores) or `running`
(its keeper has written down that it runs). Or it is a time, as `agent:+0.2`: so many seconds after the move began.
"""

import asyncio
import hashlib
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_laying import Settings
from edge_runtime.workloads.drivers.container_move import Moves
from edge_runtime.workloads.drivers.face import DriverError, Key
from edge_runtime.workloads.images import ImageStore, Limits
from tests.integration.checkpoint_side import program

RESTORE = {"laid": "", "criu": "restore/restore.log", "running": "running.json"}


def keys(folder: Path) -> tuple[Key, Key]:
    """Source and target. Control groups are the machine's: each test has names of its own."""
    name = f"witness-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    return Key(name, 1), Key(name, 2)


def made(folder: Path) -> ContainerDriver:
    """The driver of the test's folder, as any agent on it has it."""
    return ContainerDriver(folder, ImageStore(folder / "images", limits=Limits(keep_free=0)), Settings(criu=program(), allowed_mounts=(str(folder / "shared"), "/usr")))


def keeper_of(folder: Path) -> int:
    """Who holds an instance's lock; 0 where nobody does."""
    lock = str(folder / "lock")
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdigit() and Path(f"/proc/{name}/comm").read_text() == "novacron-keeper\n" and any(os.readlink(one.path) == lock for one in os.scandir(f"/proc/{name}/fd")):
                return int(name)
    return 0


def main() -> int:
    """Move, and kill."""
    folder, (whom, when) = Path(sys.argv[1]), sys.argv[2].split(":")
    driver = made(folder)
    source, target = keys(folder)

    def kill(where: Path, known: int = 0) -> None:
        pid = os.getpid() if whom == "agent" else known or keeper_of(where)
        if pid:
            print(f"killed at {when}", flush=True)
            os.kill(pid, signal.SIGKILL)

    def watch() -> None:
        where, known = driver.folder(target), 0
        while whom == "keeper" and not known:  # found early: between its writing down that the container runs and its letting go there is only a moment
            known = keeper_of(where)
        while not (where / RESTORE[when]).exists():
            time.sleep(0.0002)
        kill(where, known)

    def after() -> None:
        time.sleep(float(when))
        kill(driver.folder(source))

    if when in RESTORE:
        threading.Thread(target=watch, daemon=True).start()
    moves = Moves(driver, folder / "operations", lambda word: kill(driver.folder(source)) if word == when else None)

    async def do() -> None:
        await driver.probe()
        if when.startswith("+"):
            threading.Thread(target=after, daemon=True).start()
        try:
            await moves.move("one", source, target, folder / "state")
        except DriverError as error:
            print(error, flush=True)

    asyncio.run(do())
    driver.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
