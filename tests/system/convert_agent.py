"""An agent's part in a conversion, as a process that can be killed at any step: `python -m tests.system.convert_agent FOLDER POINT TO`.

POINT is `WHOM:STEP`: whom to kill (`agent`, `guest`: the guest's keeper, `qemu`, `keeper`: the container's) and at which of `record.POINTS`; or a time, as `agent:+0.2`, after the conversion began. TO is a form.
"""

import asyncio
import hashlib
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from edge_runtime.workloads.conversion import hot
from edge_runtime.workloads.conversion.host import Settings as HostSettings
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_laying import Settings
from edge_runtime.workloads.drivers.face import DriverError, Key
from edge_runtime.workloads.images import ImageStore, Limits
from tests.integration.checkpoint_side import program
from tests.integration.microvm_side import KERNEL
from tests.system.checkpoint_agent import keeper_of


def key(folder: Path) -> Key:
    """Control groups are the machine's: each test has a name of its own."""
    return Key(f"convert-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}", 1)


def made(folder: Path, step: object = None) -> tuple[ContainerDriver, hot.Conversions]:
    """The driver and the conversions of the test's folder, as any agent on it has them."""
    store = ImageStore(folder / "images", limits=Limits(keep_free=0))
    driver = ContainerDriver(folder, store, Settings(criu=program()))
    return driver, hot.Conversions(folder, driver, store, HostSettings(kernel=KERNEL), step or (lambda word: None))  # type: ignore[arg-type]


def machine(folder: Path, name: str) -> int:
    """The pid of a guest's QEMU (`pid`) or of its keeper (`keeper`); 0 where there is none."""
    with suppress(OSError, ValueError, KeyError):
        return int(json.loads((folder / "machine.json").read_text())[name])
    return 0


def main() -> int:
    """Convert, and kill."""
    folder, (whom, when), to = Path(sys.argv[1]), sys.argv[2].split(":"), sys.argv[3]

    def kill() -> None:
        guest = conversions._path(key(folder)) / "guest"
        pid = os.getpid() if whom == "agent" else keeper_of(driver.folder(key(folder))) if whom == "keeper" else machine(guest, "keeper" if whom == "guest" else "pid")
        if pid:
            descriptor = os.pidfd_open(pid)
            print(f"killed at {when}", flush=True)
            os.kill(pid, signal.SIGKILL)
            if pid != os.getpid():
                import select

                select.select([descriptor], [], [], 30)

    def step(word: str) -> None:
        if word == when:
            kill()

    def later() -> None:
        time.sleep(float(when))
        kill()

    driver, conversions = made(folder, step)

    async def do() -> None:
        await driver.probe()
        if when.startswith("+"):
            threading.Thread(target=later, daemon=True).start()
        try:
            await conversions.convert(key(folder), to)
        except DriverError as error:
            print(error, flush=True)

    asyncio.run(do())
    driver.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
