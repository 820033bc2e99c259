"""Disks of real virtual machines that go ahead of the rest of their state, while the machine runs. The guest is the witness: it has all that it ever wrote to its disk in memory too, and compares the two, past its cache."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from edge_runtime.workloads.drivers import checkpoint_state, vm_checkpoint
from edge_runtime.workloads.drivers.face import Failed, GoesAhead, Key, Order, Phase, Refused
from edge_runtime.workloads.drivers.instance import UPPER
from edge_runtime.workloads.drivers.vm import VmDriver

from .disk_guest import BLOCK, BLOCKS, WRITES
from .disk_guest import laid as said
from .vm_side import BOOT_S, MEMORY, console, reason_against, started, vms
from .waiting import until

__all__ = ["vms"]

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), pytest.mark.timeout(600)]

async def writing(vms: VmDriver, name: str, template: bool = False) -> Key:
    """A machine that has laid its file, and writes."""
    key = await started(vms, name, "kernel:1", WRITES, **({"template": True} if template else {}))
    await console(vms, key, b"laid", BOOT_S)
    return key


async def on(vms: VmDriver, key: Key, more: int) -> bytes:
    """What it has said, when it has gone on by so many numbers."""
    async def text() -> bytes:
        return (await vms.logs(key, 65_536)).stdout

    had = len(said(await text()))

    async def found() -> bytes:
        now = await text()
        return now if len(said(now)) >= had + more else b""

    return await until(found, BOOT_S, "it goes on")


def arrived(source: Path, ahead: Path, target: Path) -> Path:
    """A state as it is where it came to: without the disk that lies beside it, with the copy that went ahead."""
    shutil.copytree(source, target, ignore=lambda *_: [checkpoint_state.KEPT_DISK])
    os.link(ahead, target / checkpoint_state.AHEAD_DISK)
    return target


def order_of(vms: VmDriver, key: Key, other: Key) -> Order:
    return Order(other, "kernel:1", {"memory": MEMORY}, vms.spec(key))


@pytest.mark.parametrize("template", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_what_was_written_after_its_disk_went_ahead_is_in_the_disk_when_it_goes_on(vms: VmDriver, tmp_path: Path, template: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(vms, GoesAhead)
    key, other = await writing(vms, f"ahead-{template}", template), Key(f"ahead-{template}", 2)
    told = await vms.ahead(key, "move-1", tmp_path / "copy")
    assert told == {"bytes": os.path.getsize(tmp_path / "copy")} and told["bytes"] >= BLOCKS * BLOCK
    await on(vms, key, 6)
    with monkeypatch.context() as patch:  # there is room for its memory, and not for its disk once more
        patch.setattr(vm_checkpoint, "free", lambda place: vms.checkpoints()._bytes(key, disk=False) + checkpoint_state.SPARE + BLOCK)
        with pytest.raises(Refused, match="its state may take"):
            await vms.checkpoint(key, tmp_path / "state", leave_running=False)
        manifest = await vms.checkpoint(key, tmp_path / "state", leave_running=False, since="move-1")
    sizes = {one["name"]: one["size"] for one in manifest["files"]}
    assert manifest["ahead"] == "move-1" and checkpoint_state.MACHINE_DISK not in sizes and sizes[checkpoint_state.REST] < told["bytes"]
    assert os.path.samefile(tmp_path / "state" / checkpoint_state.KEPT_DISK, vms.folder(key) / vm_checkpoint.MACHINE) and not (vms.folder(key) / vm_checkpoint.SINCE).exists()
    before, order = (await vms.logs(key, 65_536)).stdout, order_of(vms, key, other)

    # Where it came to: more than once, as where a keeper or an agent is killed; then the copy is the machine's.
    came = arrived(tmp_path / "state", tmp_path / "copy", tmp_path / "came")
    assert (await vms.restore(order, came)).phase is Phase.RUNNING
    assert not (came / checkpoint_state.AHEAD_DISK).exists() and not (vms.folder(other) / UPPER).exists() and os.path.samefile(vms.folder(other) / vm_checkpoint.MACHINE, tmp_path / "copy")
    after = await on(vms, other, 8)
    numbers = [*said(before), *said(after)]
    assert numbers == list(range(len(numbers)))

    # It can go ahead again, from there.
    again = await vms.ahead(other, "move-2", tmp_path / "copy-2", 1 << 28)
    assert again["bytes"] >= BLOCKS * BLOCK
    await on(vms, other, 2)
    await vms.checkpoint(other, tmp_path / "state-2", leave_running=False, since="move-2")
    after, third = (await vms.logs(other, 65_536)).stdout, Key(other.id, 3)
    await vms.restore(order_of(vms, key, third), arrived(tmp_path / "state-2", tmp_path / "copy-2", tmp_path / "came-2"))
    last = await on(vms, third, 4)
    numbers += [*said(after)[len(numbers) - len(said(before)):], *said(last)]
    assert numbers == list(range(len(numbers)))
    for one in (key, other, third):
        await vms.delete(one)


@pytest.mark.slow
async def test_where_it_was_taken_it_goes_on_from_its_own_disk_as_often_as_need_be(vms: VmDriver, tmp_path: Path) -> None:
    key, other = await writing(vms, "back"), Key("back", 2)
    await vms.ahead(key, "move-1", tmp_path / "copy")
    await on(vms, key, 3)
    await vms.checkpoint(key, tmp_path / "state", leave_running=False, since="move-1")
    order, before = order_of(vms, key, other), said((await vms.logs(key, 65_536)).stdout)
    await vms.delete(key)
    for _ in range(2):
        await vms.restore(order, tmp_path / "state")
        numbers = [*before, *said(await on(vms, other, 3))]
        assert numbers == list(range(len(numbers)))
        await vms.delete(other)
    # A copy that is not there (any more) is named.
    shutil.copytree(tmp_path / "state", tmp_path / "alone", ignore=lambda *_: [checkpoint_state.KEPT_DISK])
    with pytest.raises(Refused, match="went ahead as move-1, which is not here"):
        await vms.restore(order, tmp_path / "alone")
    assert not vms.folder(other).exists()


async def test_a_state_that_came_to_nothing_takes_nothing_from_the_next_one(vms: VmDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, other = await writing(vms, "again"), Key("again", 2)
    await vms.ahead(key, "move-1", tmp_path / "copy")
    await on(vms, key, 4)

    async def fails(*_: object) -> None:
        raise Failed("disk", "planted", "none")

    with monkeypatch.context() as patch, pytest.raises(Failed, match="planted"):
        patch.setattr(vm_checkpoint.Checkpoints, "_saved", fails)
        await vms.checkpoint(key, tmp_path / "state", leave_running=False, since="move-1")
    assert (await vms.status(key)).phase is Phase.RUNNING and not (vms.folder(key) / vm_checkpoint.SINCE).exists()
    await on(vms, key, 1)
    await vms.checkpoint(key, tmp_path / "state", leave_running=False, since="move-1")
    before = said((await vms.logs(key, 65_536)).stdout)
    await vms.restore(order_of(vms, key, other), arrived(tmp_path / "state", tmp_path / "copy", tmp_path / "came"))
    numbers = [*before, *said(await on(vms, other, 3))]
    assert numbers == list(range(len(numbers)))
    await vms.delete(other)
    await vms.delete(key)


@pytest.mark.slow
async def test_what_the_keeper_does_not_know_goes_whole(vms: VmDriver, tmp_path: Path) -> None:
    """Of a copy of another name, as after its QEMU was another one, nothing is known."""
    key, other = await writing(vms, "whole"), Key("whole", 2)
    await vms.ahead(key, "move-1", tmp_path / "copy")
    with pytest.raises(Failed, match="nothing is known of 'move-1', or it does not stand still"):  # else what is written meanwhile would be in none
        await vms.ask(key, {"do": "since", "path": str(tmp_path / "copy"), "name": "move-1"})
    manifest = await vms.checkpoint(key, tmp_path / "state", leave_running=False, since="move-9")
    assert "ahead" not in manifest and checkpoint_state.MACHINE_DISK in {one["name"] for one in manifest["files"]} and not (tmp_path / "state" / checkpoint_state.KEPT_DISK).exists()
    order = order_of(vms, key, other)
    await vms.restore(order, tmp_path / "state")
    await on(vms, other, 3)
    await vms.delete(other)
    await vms.delete(key)


@pytest.mark.slow
async def test_a_copy_whose_agent_has_gone_holds_nothing_up(vms: VmDriver, tmp_path: Path) -> None:
    """It is made at most once at a time; the next one that is asked for takes its place, a state too."""
    key = await writing(vms, "gone")

    async def left() -> None:
        """An agent that asks, and goes."""
        asked = asyncio.ensure_future(vms.ahead(key, "move-1", tmp_path / "left"))
        await until((tmp_path / "left").exists, what="it is asked for")
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert not (tmp_path / "left").exists()

    await left()
    await vms.ahead(key, "move-2", tmp_path / "copy")
    await left()
    manifest = await vms.checkpoint(key, tmp_path / "state", leave_running=True, since="move-1")  # it goes on, so all of it is taken
    assert "ahead" not in manifest
    await on(vms, key, 2)
    await vms.delete(key)
