"""States of real virtual machines: taken, brought back, refused. The guest is the witness (`counting_guest`)."""

import asyncio
import json
import os
import select
import socket
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers import checkpoint_state, vm_checkpoint
from edge_runtime.workloads.drivers.face import Failed, Key, Migrates, Order, Phase, Refused
from edge_runtime.workloads.drivers.instance import NOTE, read, write
from edge_runtime.workloads.drivers.programs import searched
from edge_runtime.workloads.drivers.vm import VmDriver
from hub.broker.mosquitto import free_port
from tools.bench.harness import die_with_parent

from .counting_guest import IMAGE, MEMORY, counted
from .live_side import needs_live
from .vm_side import BOOT_S, COUNTS, console, made_vms, reason_against, started, vms
from .vm_side import MEMORY as LINUX_MEMORY
from .waiting import until

__all__ = ["vms"]

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), pytest.mark.timeout(600)]

needs_network = pytest.mark.skipif(searched("slirp4netns") is None, reason="no slirp4netns (as root: apt install slirp4netns)")


async def counting(driver: VmDriver, name: str, **spec: Any) -> Key:
    """A machine that counts, as far as 3."""
    key = Key(name, 1)
    await driver.prepare(order_of(key, **spec))
    await driver.start(key)
    await goes_on(driver, key, 2)
    return key


def order_of(key: Key, memory: int = MEMORY, **spec: Any) -> Order:
    """A machine that counts."""
    return Order(key, IMAGE, {"memory": memory}, {"boot_s": BOOT_S, **spec})


async def goes_on(driver: VmDriver, key: Key, beyond: int) -> list[int]:
    """What it has said, as soon as that is beyond a number."""
    async def found() -> list[int] | None:
        numbers = counted((await driver.logs(key, 65_536)).stdout)
        return numbers if numbers and numbers[-1] > beyond else None

    numbers: list[int] = await until(found, 60.0, f"it counts beyond {beyond}")
    return numbers


async def test_a_machine_goes_on_from_its_state_with_its_memory_and_its_disk(vms: VmDriver, tmp_path: Path) -> None:
    assert isinstance(vms, Migrates)
    steps: list[str] = []
    key = await counting(vms, "witness")
    other = Key("witness", 2)
    offer = await vms.migrate_out(key)
    order = order_of(other)
    await vms.migrate_in(order, offer)
    with pytest.raises(Refused, match="QEMU 1.0.0"):
        await vms.migrate_in(order, {**offer, "host": {**offer["host"], "qemu": "1.0.0"}})
    with pytest.raises(Refused, match="memory_mb was 63"):
        await vms.migrate_in(order, {**offer, "machine": {**offer["machine"], "memory_mb": 63}})
    with pytest.raises(Refused, match="stands on"):
        await vms.migrate_in(order, {**offer, "layers": ["sha256:0"]})
    manifest = await vms.checkpoint(key, tmp_path / "kept", leave_running=True, step=steps.append)
    assert tuple(steps) == vm_checkpoint.STEPS and manifest["root"] == checkpoint_state.read_manifest(tmp_path / "kept")["root"] and 0 < sum(one["size"] for one in manifest["files"]) <= offer["bytes"] + (32 << 20)
    seen = (await goes_on(vms, key, counted((await vms.logs(key, 65_536)).stdout)[-1] + 2))[-1]
    assert (await vms.status(key)).phase is Phase.RUNNING and not (vms.folder(key) / NOTE).exists()
    await vms.checkpoint(key, tmp_path / "state", leave_running=False)
    before = (await vms.logs(key, 65_536)).stdout
    status = await vms.status(key)
    assert status.phase is Phase.CHECKPOINTED and counted(before)[-1] >= seen
    assert (await vms.restore(order, tmp_path / "state")).phase is Phase.RUNNING
    await goes_on(vms, other, counted(before)[-1] + 3)
    after = (await vms.logs(other, 65_536)).stdout
    numbers = counted(before + after)
    assert numbers == list(range(len(numbers))) and b"differs" not in before + after, before + after
    assert not (vms.folder(other) / vm_checkpoint.RESTORE).exists() and (await vms.migrate_out(other))["machine"] == offer["machine"]
    with pytest.raises(Refused, match="there is a virtual machine witness.2 already"):
        await vms.restore(order, tmp_path / "state")
    # The first state is of an earlier moment, of memory and disk alike; it goes on from there once more, as a disk that was written to since would show.
    await vms.delete(other)
    await vms.restore(order, tmp_path / "kept")
    again = await goes_on(vms, other, seen + 1)
    assert again[0] < seen and counted(before) + again != list(range(len(counted(before) + again))) and b"differs" not in (await vms.logs(other, 65_536)).stdout
    await vms.delete(other)
    await vms.delete(key)


async def test_a_state_that_fits_nothing_is_refused_and_a_bit_that_differs_is_found(vms: VmDriver, tmp_path: Path) -> None:
    key, other = await counting(vms, "copied"), Key("copied", 2)
    await vms.checkpoint(key, tmp_path / "state", leave_running=False)
    with pytest.raises(Refused, match="memory_mb was 64"):
        await vms.restore(order_of(other, 2 * MEMORY), tmp_path / "state")
    with pytest.raises(Refused, match="stands on"):
        await vms.restore(replace(order_of(other), image="blank:1"), tmp_path / "state")
    state = tmp_path / "state" / checkpoint_state.MEMORY
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    with pytest.raises(Refused, match="is not what the manifest says"):
        await vms.restore(order_of(other), tmp_path / "state")
    assert not vms.folder(other).exists() and not (vms._new / "copied.2").exists()
    await vms.delete(key)


async def test_a_linux_that_is_a_copy_of_a_template_goes_on_as_a_machine_of_its_own(vms: VmDriver, tmp_path: Path) -> None:
    key, other = await started(vms, "linux", "kernel:1", COUNTS, template=True), Key("linux", 2)
    await console(vms, key, b"\n3\r\n")
    await vms.checkpoint(key, tmp_path / "state", leave_running=False)
    before = (await vms.logs(key, 65_536)).stdout
    order = Order(other, "kernel:1", {"memory": LINUX_MEMORY}, vms.spec(key))
    await vms.delete(key)
    await vms.restore(order, tmp_path / "state")
    await goes_on(vms, other, counted(before)[-1] + 2)
    after = (await vms.logs(other, 65_536)).stdout
    numbers = counted(before + after)
    assert numbers == list(range(len(numbers))) and b"differs" not in before + after
    await vms.checkpoint(other, tmp_path / "again", leave_running=True)  # with its layer of the template's
    await vms.delete(other)


async def test_what_qemu_cannot_load_does_not_run_and_leaves_nothing(vms: VmDriver, tmp_path: Path) -> None:
    """A state whose hashes are right, and whose content is no machine's: who wrote it is for others to know."""
    key = await counting(vms, "odd")
    manifest = dict(await vms.checkpoint(key, tmp_path / "state", leave_running=True))
    forged, name = tmp_path / "forged", checkpoint_state.MEMORY
    (forged / checkpoint_state.IMAGES).mkdir(parents=True)
    files = [one for one in manifest.pop("files") if one["name"] != name]
    for one in files:
        os.link(tmp_path / "state" / one["name"], forged / one["name"])
    (tmp_path / "odd").write_bytes(b"QEVM" + bytes(100_000))
    with open(tmp_path / "odd", "rb") as source:
        files.append(checkpoint_state.add(forged, name, source, manifest["codec"]))
    checkpoint_state.seal(forged, {field: value for field, value in manifest.items() if field not in ("root", "codec", "version")}, files, manifest["codec"])
    order = order_of(Key("odd", 2))
    with pytest.raises(Failed, match="cannot be loaded"):
        await vms.restore(order, forged)
    assert not vms.folder(order.key).exists() and (await vms.status(key)).phase is Phase.RUNNING
    await vms.delete(key)


@pytest.mark.parametrize("early", [False, True])
async def test_one_whose_agent_goes_while_it_is_saved_goes_on(vms: VmDriver, tmp_path: Path, early: bool) -> None:
    """Nobody reads what QEMU writes, and then it is cut off; `early`: somebody has it go on before. Were its saving not cancelled, QEMU would stop it when that is over."""
    key, pipe = await counting(vms, "cut"), tmp_path / "pipe"
    os.mkfifo(pipe)
    source = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    await vms.pause(key)
    saving = asyncio.ensure_future(vms.ask(key, {"do": "save", "path": str(pipe)}, BOOT_S))
    await until(lambda: select.select([source], [], [], 0)[0], what="QEMU writes")
    going = asyncio.ensure_future(vms.ask(key, {"do": "resume"})) if early else None
    os.close(source)
    with pytest.raises(Failed, match="could not save it|it goes on"):
        await saving
    await (going if going is not None else vms.resume(key))
    assert (await vms.status(key)).phase is Phase.RUNNING
    await goes_on(vms, key, counted((await vms.logs(key, 65_536)).stdout)[-1] + 10)
    await vms.delete(key)


async def test_what_an_agent_left_half_done_is_settled_by_the_next_one(vms: VmDriver, tmp_path: Path) -> None:
    """It stands still, with a note, and a state that is not whole: it goes on. With one that is whole: it ends, checkpointed."""
    key = await counting(vms, "left")
    note = {"folder": str(tmp_path / "state"), "new": str(tmp_path / ".state.new"), "leave_running": False, "token": "a"}
    write(vms.folder(key) / NOTE, note)
    (tmp_path / ".state.new").mkdir()
    await vms.pause(key)
    next_one = made_vms(vms._folder.parent, vms._store)
    try:
        await next_one.settle()
        assert (await next_one.status(key)).phase is Phase.RUNNING and not (vms.folder(key) / NOTE).exists() and not (tmp_path / ".state.new").exists()
        told = dict(await vms.checkpoint(key, tmp_path / "state", leave_running=True))
        write(vms.folder(key) / NOTE, {**note, "token": told["token"]})
        await next_one.pause(key)
        await next_one.settle()
        assert (await next_one.status(key)).phase is Phase.CHECKPOINTED and (read(vms.folder(key) / NOTE) or {})["whole"]
        await next_one.delete(key)
    finally:
        next_one.close()


@needs_network
async def test_one_that_does_not_run_or_has_a_network_cannot_be_taken(vms: VmDriver, tmp_path: Path) -> None:
    key = Key("connected", 1)
    await vms.prepare(order_of(key, network={}))
    with pytest.raises(Refused, match="does not run"):
        await vms.migrate_out(key)
    await vms.start(key)
    with pytest.raises(Refused, match="spec.network: connections"):
        await vms.migrate_out(key)
    with pytest.raises(Refused, match="spec.network: connections"):
        await vms.checkpoint(key, tmp_path / "state", leave_running=True)
    assert not (tmp_path / "state").exists() and not (vms.folder(key) / NOTE).exists()
    await vms.delete(key)


@pytest.mark.slow
@needs_network
async def test_one_that_connects_anew_goes_on_behind_the_same_port(vms: VmDriver, tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    spec = {"boot_s": BOOT_S, "network": {"ports": [{"port": 80, "host_port": port}]}, "when_moved": "reconnect", "cloud_init": {"user_data": "#!/bin/sh\necho over"}}
    key, other = Key("served", 1), Key("served", 2)

    async def served() -> bytes:
        """As soon as it answers: a guest that has just been brought back may still be busy with what it was at."""
        async def answer() -> bytes:
            try:
                return await asyncio.to_thread(lambda: bytes(urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20).read()))
            except OSError:
                return b""

        found: bytes = await until(answer, 90.0, "an answer")
        return found

    await vms.prepare(Order(key, "kernel:1", {"memory": LINUX_MEMORY}, spec))
    await vms.start(key)
    await console(vms, key, b"over")
    before = await served()
    await vms.checkpoint(key, tmp_path / "state", leave_running=False)

    def taken_here() -> socket.socket | None:
        """As soon as its own network has let go of it."""
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            return None

    taken = await until(taken_here, what="its port is free")
    with pytest.raises(Refused, match="cannot be had on this node: it is taken"):
        await vms.restore(Order(other, "kernel:1", {"memory": LINUX_MEMORY}, spec), tmp_path / "state")
    taken.close()
    assert not vms.folder(other).exists()
    await vms.restore(Order(other, "kernel:1", {"memory": LINUX_MEMORY}, spec), tmp_path / "state")
    assert await served() == before and b"hello from served" in before
    await vms.delete(other)
    await vms.delete(key)


@pytest.mark.slow
@pytest.mark.skipif(searched("ip") is None or searched("unshare") is None, reason="no iproute2 or unshare")
@pytest.mark.parametrize("way", [[], pytest.param(["live"], marks=needs_live)])
async def test_on_a_bridge_a_connection_outlives_the_move(tmp_path: Path, way: list[str]) -> None:
    """In a network namespace of its own, with a bridge of its own."""
    process = await asyncio.create_subprocess_exec("unshare", "--net", sys.executable, "-m", "tests.integration.tap_program", str(tmp_path), *way, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, preexec_fn=die_with_parent)
    said, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()[-3000:]
    if reason := json.loads(said).get("cannot"):
        pytest.skip(f"no bridge can be made here: {reason}")
    assert json.loads(said) == {"said": ["before\n", "meanwhile\n", "after\n"], "runs": True, "ports": 1}
