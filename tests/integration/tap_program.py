"""A virtual machine on a bridge, in a network namespace of this process's own: `unshare --net python -m tests.integration.tap_program FOLDER`. Prints one JSON object.

A client on the bridge talks to the guest over one TCP connection, before and after the guest went through its state, and writes to it while it stands still.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from edge_runtime.workloads.drivers.face import Key, Order, Phase
from tests.integration.vm_side import BOOT_S, MEMORY, console, kernel_store, made_vms
from tests.integration.waiting import until

BRIDGE, OURS, ITS, PORT = "nvtest0", "10.93.0.1", "10.93.0.2", 7
ANSWER_S = 120.0
"""For an answer of a guest on a busy machine."""

SCRIPT = f"#!/bin/sh\nifconfig eth0 {ITS} netmask 255.255.255.0; nc -l -p {PORT} -e cat & sleep 0.2; echo listening; wait"


def ports() -> list[str]:
    """Of the bridge."""
    return [one["ifname"] for one in json.loads(subprocess.run(["ip", "-j", "link", "show", "master", BRIDGE], check=True, capture_output=True).stdout or b"[]")]


async def main(folder: Path) -> None:
    """All of it."""
    for words in (("link", "set", "lo", "up"), ("link", "add", BRIDGE, "type", "bridge"), ("addr", "add", f"{OURS}/24", "dev", BRIDGE), ("link", "set", BRIDGE, "up")):
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode or not os.path.exists("/dev/net/tun"):
            print(json.dumps({"cannot": done.stderr.strip() or "there is no /dev/net/tun"}))
            return
    store = kernel_store(folder)
    driver = made_vms(folder, store, bridges=(BRIDGE,), network=False)
    try:
        key, other = Key("bridged", 1), Key("bridged", 2)
        spec = {"boot_s": BOOT_S, "network": {"tap": BRIDGE}, "cloud_init": {"user_data": SCRIPT}}
        await driver.prepare(Order(key, "kernel:1", {"memory": MEMORY}, spec))
        await driver.start(key)
        await console(driver, key, b"listening")

        async def connected() -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
            try:
                return await asyncio.open_connection(ITS, PORT)
            except OSError:
                return None

        reader, writer = await until(connected, ANSWER_S, "a connection")

        async def said(text: bytes) -> bytes:
            writer.write(text)
            return await asyncio.wait_for(reader.readexactly(len(text)), ANSWER_S)

        found = [(await said(b"before\n")).decode()]
        await driver.checkpoint(key, folder / "state", leave_running=False)
        await until(lambda: not ports(), ANSWER_S, "its port is gone")
        writer.write(b"meanwhile\n")
        status = await driver.restore(Order(other, "kernel:1", {"memory": MEMORY}, spec), folder / "state")
        found.append((await asyncio.wait_for(reader.readexactly(10), ANSWER_S)).decode())
        found.append((await said(b"after\n")).decode())
        writer.close()
        print(json.dumps({"said": found, "runs": status.phase is Phase.RUNNING, "ports": len(ports())}))
    finally:
        await asyncio.gather(*(driver.delete(one.key) for one in await driver.instances()))
        driver.close()
        store.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
