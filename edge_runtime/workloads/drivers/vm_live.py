"""Virtual machines that move while they run, as the agent has it: what is laid out where one comes to, and what its keeper is asked (`vm_live_keeper` has how it goes).

    left.json    in the folder of one that leaves: from here on only the hub knows whose it is; one that has gone meanwhile is not begun anew
    keeper.json  of one that comes: `arrives`, the folder with the sockets by which it comes

A copy of a template moves standing still: what it has between its disk and its image does not come by these ways. UEFI's variables come as the memory of their chip, which QEMU writes to their file when the machine begins.
"""

import asyncio
import base64
import binascii
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...contract.workloads import LIVE
from . import vm_files, vm_machine, vm_seed
from .face import Failed, Key, Order, Refused, Status
from .instance import LEFT, held, read, sync_folder
from .qemu_driver import LEFT_S
from .vm_live_keeper import WORD

if TYPE_CHECKING:
    from .vm import VmDriver
    from .vm_spec import Vm

SEED = "seed"
"""Key of an offer: the machine's second disk, packed. It is the one that the guest has mounted, so that a new one would be another one."""

SEED_MOST = 4_096
"""Bytes of that, packed: an offer is a record, and a part of a document that both nodes have. One with more cloud-init in it moves standing still."""

MEET_S = 20.0
"""What carries a machine is there this long after it was asked for, or something is amiss: the hub asks when its other end listens."""

LOOK_S = 0.05
"""Between two looks at what there is no event for: a folder that another program makes, a lock."""

TRIES = 3
"""Times that a keeper is asked to let one go on that stands still, which nobody else could."""

LONGEST_S = 4 * 3_600.0
"""A machine that takes longer to be copied hangs, beside what its bytes take at its limit; nobody waits for it."""

TIMES = 3
"""So many times as long as its bytes take at its limit it may take."""

GO_S = 660.0
"""One that may begin has done so by then, or its keeper has given it up: it bounds each of its steps."""


def offered(own: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """What an offer says of a machine that can move while it runs; nothing of others. `told`: its keeper.json. Blocks."""
    machine = told.get("machine") or {}
    if machine.get("template"):
        return {}
    packed = zlib.compress((own / "seed.img").read_bytes(), 9)
    return {LIVE: True, SEED: base64.b64encode(packed).decode()} if len(packed) <= SEED_MOST else {}


def seed_of(offer: Mapping[str, Any]) -> bytes:
    """The second disk that an offer has. Raises `Refused`."""
    size = vm_seed.SECTORS * vm_seed.SECTOR
    try:
        unpacking = zlib.decompressobj()
        found = unpacking.decompress(base64.b64decode(str(offer.get(SEED)), validate=True), size + 1)
    except (zlib.error, binascii.Error, ValueError):
        found = b""
    if len(found) != size:
        raise Refused("offer.seed", "is not the second disk of a virtual machine", "move it from a node whose agent is of this version")
    return found


class Live:
    """One for a driver."""

    def __init__(self, driver: "VmDriver") -> None:
        self._driver = driver

    # -- out -----------------------------------------------------------------------------------------------------------------

    async def leave(self, key: Key, folder: Path, speed: int) -> None:
        """Copy a running machine to where it shall go, until nearly all of it is there; then it goes on being copied, and leaves when its target says that it may begin. Raises `Failed`: then it stays, as it was."""
        await _there(folder)
        size = sum(os.stat(path).st_blocks * 512 for path in self._driver.folder(key).glob("*.qcow2")) + self._memory(key)
        seconds = max(LONGEST_S, TIMES * size / speed if speed else 0.0)
        await self._driver.ask(key, {"do": "leave", "folder": str(folder), "speed": speed}, seconds)

    def _memory(self, key: Key) -> int:
        told = read(self._driver.folder(key) / "keeper.json") or {}
        return int((told.get("machine") or {}).get("memory_mb", 0)) << 20

    async def stay(self, key: Key) -> None:
        """It is this node's again: goes on where it stands still, or was gone already and is that now. Raises `Failed`."""
        own = self._driver.folder(key)
        for left in range(TRIES - 1, -1, -1):
            try:
                if held(own):
                    await self._driver.ask(key, {"do": "stay"})
                break
            except Failed:
                if not (own / LEFT).exists():
                    break  # its keeper is of an agent that knew nothing of this, or it was never asked to leave
                if not left:
                    raise
        await asyncio.to_thread(_forget, own)

    # -- in ------------------------------------------------------------------------------------------------------------------

    def lay(self, laid: Path, offer: Mapping[str, Any], vm: "Vm") -> None:
        """What it begins with; its disk is written to when it comes. Blocks."""
        vm_files.lay(laid / "disk.qcow2", vm.disk_bytes)
        (laid / "seed.img").write_bytes(seed_of(offer))
        if vm.shape.boot == vm_machine.UEFI:
            shutil.copyfile(vm_machine.FIRMWARE[1], laid / "variables.fd")

    async def arrive(self, order: Order, offer: Mapping[str, Any], folder: Path) -> None:
        """Have a QEMU wait for a machine, whose sockets are in `folder` then. Where one waits already it is that one. Raises `DriverError`: then nothing of it is here."""
        driver, key = self._driver, order.key
        if driver.folder(key).exists():
            if driver.waits(key) and held(driver.folder(key)):
                return
            await driver.delete(key)
        await asyncio.to_thread(shutil.rmtree, folder, True)
        await driver.lay_arriving(order, offer, folder)
        try:
            word = await asyncio.to_thread(driver.launch, key)
            if word != "waiting":
                raise Failed("live", (read(driver.folder(key) / "exit.json") or {}).get("failed") or "its keeper ended without a word", "see why; it moves standing still meanwhile")
        except BaseException:
            await driver.delete(key)
            raise

    async def go(self, key: Key) -> Status:
        """Let one that comes begin, as soon as all of it is here; how it is then. Raises `Refused` where it never will: nothing of it is here then."""
        driver, why, still_ms = self._driver, "", 0.0
        if driver.folder(key).exists() and driver.waits(key):
            try:
                still_ms = float((await driver.ask(key, {"do": "go"}, GO_S)).get("still_ms", 0.0))
            except Failed as error:
                why = error.problem
                await self.drop(key)
        if not driver.folder(key).exists():
            raise Refused("from", "nothing waits here for it any more", "move it again; see what its node says")
        if driver.waits(key):  # it never began, and does not any more
            why = (read(driver.folder(key) / "exit.json") or {}).get("failed") or why
            await driver.delete(key)
            raise Refused("from", f"it did not come while it ran: {why}", "move it again; see what its node says")
        return replace(await driver.status(key), still_ms=still_ms)

    async def drop(self, key: Key) -> None:
        """End one that waits; when this returns it has begun before, or never will. Raises `Failed` where that cannot be had."""
        own = self._driver.folder(key)
        if self._driver.waits(key) and held(own):
            with suppress(Failed):  # it begins, has just ended, or hangs
                await self._driver.ask(key, {"do": "drop"})
            try:
                async with asyncio.timeout(LEFT_S):
                    while held(own) and self._driver.waits(key):
                        await asyncio.sleep(LOOK_S)
            except TimeoutError:
                raise Failed("from", "the keeper of what should come does not end", "look at the node") from None


async def _there(folder: Path) -> None:
    """Until what carries a machine is there: it makes this folder. Raises `Failed`."""
    try:
        async with asyncio.timeout(MEET_S):
            while not (folder / WORD).exists():
                await asyncio.sleep(LOOK_S)
    except TimeoutError:
        raise Failed("move", f"what carries it was not there within {MEET_S:g} s", "see the migration workers of both nodes") from None


def _forget(own: Path) -> None:
    (own / LEFT).unlink(missing_ok=True)
    if own.exists():
        sync_folder(own)
