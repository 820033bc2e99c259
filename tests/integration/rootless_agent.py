"""What an agent that is not root does with containers, as a program of its own: enters its user namespace, then one thing. Prints JSON lines; started by `test_rootless`."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from edge_runtime.workloads import rootless


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


async def work(driver: Any, what: str) -> None:
    from edge_runtime.workloads.drivers.face import DriverError, Key, Order

    report = await driver.probe()
    if what in ("run", "run-connected"):
        say(report=report.to_json())
        for line in sys.stdin:
            key = Key("one", 1)
            try:
                await driver.prepare(Order(key, "box:1", {}, json.loads(line)))
                await driver.start(key)
                status = await driver.wait(key)
                told = await driver.logs(key, 65_536)
                say(reason=status.reason, out_of_memory=bool(status.exit and status.exit.out_of_memory), stdout=told.stdout.decode(), stderr=told.stderr.decode())
            except DriverError as error:
                say(refused=str(error))
            await driver.delete(key)
    elif what == "begin":
        key = Key("lasting", 1)
        await driver.prepare(Order(key, "box:1", {}, {"command": ["sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done"], "user": "app"}))
        status = await driver.start(key)
        say(pid=status.pid)
        sys.stdin.readline()
    elif what == "end":
        for status in await driver.instances():
            said = (await driver.logs(status.key, 100)).stdout.decode()
            ran = await driver.exec(status.key, ["id", "-u"], 30.0)
            ended = await driver.stop(status.key, 60.0)
            say(phase=status.phase.value, stdout=said, user=ran.output.stdout.decode().strip(), code=ended.exit.code if ended.exit else None)
            await driver.delete(status.key)


def main(folder: Path, what: str) -> None:
    entered = rootless.enter(folder)
    say(entered=entered, why=rootless.why, uid=os.geteuid(), holder=rootless._holder(folder))
    if what == "enter":
        return
    from edge_runtime.workloads.images import ImageStore
    from tests.integration.container_side import LIMITS, made_driver, made_store
    from tests.unit.workloads.image_side import layer

    if entered and not (folder / "workloads/images").exists():
        store = made_store(folder / "workloads", [layer([("file", "srv/.wh.gone", b""), ("file", "srv/old/.wh..wh..opq", b""), ("file", "srv/old/c", b"c")])])
    else:
        store = ImageStore(folder / "workloads/images", limits=LIMITS, own=entered)
    driver = made_driver(folder / "workloads", store, network=what == "run-connected")
    try:
        asyncio.run(work(driver, what))
    finally:
        driver.close()
        store.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
