"""A virtual machine on a bridge, in a network namespace of this process's own: `unshare --net python -m tests.integration.tap_program FOLDER [live]`. Prints one JSON object.

A client on the bridge talks to the guest over one TCP connection, before and after the guest went through its state, and writes to it while it stands still. With `live` it goes to another driver while it runs.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from edge_runtime.workloads.drivers.face import Key, Order, Phase
from edge_runtime.workloads.drivers.vm import VmDriver
from tests.integration.live_side import Carried, live_qemu
from tests.integration.vm_side import BOOT_S, MEMORY, console, kernel_store, made_vms
from tests.integration.waiting import until

BRIDGE, OURS, ITS, PORT = "nvtest0", "10.93.0.1", "10.93.0.2", 7
ANSWER_S = 120.0
"""For an answer of a guest on a busy machine."""

SCRIPT = f"#!/bin/sh\nifconfig eth0 {ITS} netmask 255.255.255.0; nc -l -p {PORT} -e cat & sleep 0.2; echo listening; wait"


def ports() -> list[str]:
    """Of the bridge."""
    return [one["ifname"] for one in json.loads(subprocess.run(["ip", "-j", "link", "show", "master", BRIDGE], check=True, capture_output=True).stdout or b"[]")]


async def gone(driver: VmDriver, target: VmDriver, order: Order, key: Key, folder: Path) -> None:
    """From one to the other, while it runs."""
    out, into = folder / "out", folder / "in"
    await driver.probe()
    await target.arrive(order, await driver.migrate_out(key), into)
    Carried(out, into)
    await driver.leave(key, out, 0)
    await target.go(order.key)


async def main(folder: Path, live: bool) -> None:
    """All of it."""
    for words in (("link", "set", "lo", "up"), ("link", "add", BRIDGE, "type", "bridge"), ("addr", "add", f"{OURS}/24", "dev", BRIDGE), ("link", "set", BRIDGE, "up")):
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode or not os.path.exists("/dev/net/tun"):
            print(json.dumps({"cannot": done.stderr.strip() or "there is no /dev/net/tun"}))
            return
    store = kernel_store(folder)
    qemu = {"qemu": (live_qemu(),)} if live else {}
    driver = made_vms(folder / "a", store, bridges=(BRIDGE,), network=False, **qemu)
    target = made_vms(folder / "b", store, bridges=(BRIDGE,), network=False, **qemu) if live else driver
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
        order = Order(other, "kernel:1", {"memory": MEMORY}, spec)
        if live:
            going = asyncio.ensure_future(gone(driver, target, order, key, folder))
            writer.write(b"meanwhile\n")
            await going
            await driver.stop(key, 0.0)
            await driver.delete(key)
        else:
            await driver.checkpoint(key, folder / "state", leave_running=False)
            await until(lambda: not ports(), ANSWER_S, "its port is gone")
            writer.write(b"meanwhile\n")
            await driver.restore(order, folder / "state")
        status = await target.status(other)
        found.append((await asyncio.wait_for(reader.readexactly(10), ANSWER_S)).decode())
        found.append((await said(b"after\n")).decode())
        writer.close()
        print(json.dumps({"said": found, "runs": status.phase is Phase.RUNNING, "ports": len(ports())}))
    finally:
        for one in {driver, target}:
            await asyncio.gather(*(one.delete(there.key) for there in await one.instances()))
            one.close()
        store.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), "live" in sys.argv[2:]))
