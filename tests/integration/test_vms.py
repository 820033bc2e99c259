"""The driver of virtual machines with real guests: how they boot, what reaches them, what they may not, and how their ends are told."""

import asyncio
import os
import signal
import socket
import time
import urllib.request
from hashlib import sha256
from pathlib import Path

import pytest

from edge_runtime.workloads.drivers import vm_image, vm_machine, vm_qcow2, vm_templates
from edge_runtime.workloads.drivers.face import Ability, Failed, Key, Order, Phase, Refused
from edge_runtime.workloads.drivers.instance import read
from edge_runtime.workloads.drivers.keeping import OOM_SCORE
from edge_runtime.workloads.drivers.programs import searched
from edge_runtime.workloads.drivers.qemu_driver import QEMU_OWN
from edge_runtime.workloads.drivers.vm import UID, VmDriver
from edge_runtime.workloads.images import ImageStore
from hub.broker.mosquitto import free_port
from tests.unit.workloads.image_side import layer, layout

from .container_side import LIMITS
from .vm_side import HELLO, MEMORY, console, made_vms, reason_against, started, vms
from .waiting import until

__all__ = ["vms"]

pytestmark = pytest.mark.skipif(bool(reason_against()), reason=reason_against())

needs_network = pytest.mark.skipif(searched("slirp4netns") is None, reason="no slirp4netns (as root: apt install slirp4netns)")


async def test_the_probe_boots_a_guest_and_tells_what_can_be_done(vms: VmDriver) -> None:
    told = await vms.probe()
    assert told.usable and told.driver == told.kind == "vm" and "QEMU" in told.runtime and "Linux" in told.runtime
    assert {"start", "stop", "adopt", "pause", "logs", "stats", "limits"} <= set(told.to_json()["can"])
    with pytest.raises(Refused, match="log in to it"):
        told.demand(Ability.EXEC)


@needs_network
async def test_a_disk_boots_by_bios_with_its_seed_and_its_port_and_ends_by_its_button(vms: VmDriver) -> None:
    port = free_port("127.0.0.1")
    ours = socket.create_server(("127.0.0.1", 0))  # a service on the node's loopback, which no guest may reach
    base = vm_image.find(vms._store.lower(vms._store.find("raw:1"))).disk
    before = sha256(base.read_bytes()).digest()
    script = f"echo seen $(hostname); echo mark > /data/mark; nc -w 3 10.0.2.2 {ours.getsockname()[1]} </dev/null && echo reached; echo resolver $(cat /etc/resolv.conf); echo over"
    key = await started(vms, "first:a", script=script, network={"ports": [{"port": 80, "host_port": port}]})
    try:
        found = await console(vms, key, b"over")
        assert b"seen first-a" in found and b"reached" not in found and b"resolver nameserver 10.0.2.3" in found
        hello = HELLO.search(found)
        assert hello is not None and hello[1] == b"first-a" and hello[2] == b"1"
        answer = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60).read())
        assert answer.startswith(b"hello from first-a")
        stats = await vms.stats(key)
        assert stats.cpu_ns > 0 and stats.memory_bytes > 10 << 20
        taken = Order(Key("second", 1), "raw:1", {"memory": MEMORY}, {"network": {"ports": [{"port": 80, "host_port": port}]}})
        await vms.prepare(taken)
        with pytest.raises(Refused, match="cannot be had on this node: it is taken"):
            await vms.start(taken.key)
        await vms.delete(taken.key)
        ended = await vms.stop(key, 60.0)
        assert ended.phase is Phase.ENDED and ended.exit is not None and ended.exit.code == 0 and not ended.reason
        assert b"the power button was pressed" in (await vms.logs(key, 65_536)).stdout
        assert await vms.start(key) == ended and await vms.stop(key, 1.0) == ended
        disk = vms.folder(key) / "disk.qcow2"
        assert sha256(base.read_bytes()).digest() == before and disk.stat().st_blocks * 512 > 64 << 10
        assert vm_qcow2.check(disk.read_bytes()[:vm_qcow2.LOOK], disk.stat().st_size).bytes == base.stat().st_size
    finally:
        ours.close()
        await vms.delete(key)
    assert not vms.folder(key).exists()
    with pytest.raises(Refused, match="no virtual machine"):
        await vms.status(key)


@pytest.mark.parametrize("image", ["kernel:1", "qcow2:1"])
async def test_clones_of_a_template_are_their_own(vms: VmDriver, image: str) -> None:
    if image == "qcow2:1" and searched("qemu-img") is None:
        pytest.skip("no qemu-img (apt install qemu-utils)")
    script = "echo random $(cat /proc/sys/kernel/random/uuid); echo own $(hostname) >> /data/own; cat /data/own; date +%s; echo over"
    first = await started(vms, "clone-a", image, script, template=True)
    second = await started(vms, "clone-b", image, script, template=True)
    found = {}
    for key in (first, second):
        found[key] = await console(vms, key, b"over")
        hello = HELLO.search(found[key])
        assert hello is not None and hello[1].decode() == key.id and hello[2] == b"1", found[key]
        assert f"own {key.id}\r\n".encode() in found[key] and found[key].count(b"own clone") == 1
        seconds = next(int(line) for line in found[key].split() if line.isdigit() and len(line) == 10)
        assert abs(seconds - time.time()) < 120
    random = [next(line for line in text.splitlines() if line.startswith(b"random ")) for text in found.values()]
    assert random[0] != random[1] and len(random[0]) > 40
    assert {os.stat(f"/proc/{(await vms.status(key)).pid}").st_uid for key in (first, second)}.isdisjoint({UID})
    links = [os.stat(vms.folder(key) / vm_templates.DISK) for key in (first, second)]
    assert links[0].st_ino == links[1].st_ino and links[0].st_nlink == 3
    assert (await vms.pause(first)).phase is Phase.PAUSED
    spent = (await vms.stats(first)).cpu_ns
    assert (await vms.stop(second, 0.0)).reason == "killed by signal 9"
    assert (await vms.stats(first)).cpu_ns - spent < 100_000_000
    assert (await vms.resume(first)).phase is Phase.RUNNING
    ended = await vms.stop(first, 60.0)
    assert ended.exit is not None and ended.exit.code == 0
    for key in (first, second):
        await vms.delete(key)


async def test_a_snapshot_is_a_disk_that_boots(vms: VmDriver, tmp_path: Path) -> None:
    key = await started(vms, "source", "kernel:1", "sync; echo over", template=True)
    await console(vms, key, b"over")
    (tmp_path / "copy").mkdir()
    told = await vms.snapshot(key, tmp_path / "copy")
    assert told["bytes"] == vm_image.disk_bytes(tmp_path / "copy/disk.qcow2") and (await vms.status(key)).phase is Phase.RUNNING
    with pytest.raises(Refused, match="is not empty"):
        await vms.snapshot(key, tmp_path / "copy")
    assert list((tmp_path / "copy").iterdir()) == [tmp_path / "copy/disk.qcow2"]
    await vms.delete(key)
    vms._store.add(layout(tmp_path / "in", [layer([("file", "disk/a.qcow2", (tmp_path / "copy/disk.qcow2").read_bytes())], mode=0o644)], name="copy:1", packed=False))
    again = await started(vms, "again", "copy:1")
    hello = HELLO.search(await console(vms, again, b"start 2"))
    assert hello is not None and hello[1] == b"again"
    await vms.delete(again)


async def test_a_clone_that_an_earlier_agent_prepared_gets_the_template_that_is_there_now(vms: VmDriver) -> None:
    key = Key("late", 1)
    await vms.prepare(Order(key, "kernel:1", {"memory": MEMORY}, {"template": True}))
    vms._templates.close()
    await vms.start(key)
    hello = HELLO.search(await console(vms, key, b"start 1"))
    assert hello is not None and hello[1] == b"late"
    await vms.delete(key)


async def test_qemu_has_no_rights_and_dies_with_its_keeper_and_the_next_driver_sees_it(vms: VmDriver) -> None:
    key = await started(vms, "confined", "kernel:1", template=True)
    pid = (await vms.status(key)).pid
    told = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert set(told["Uid"].split()) == set(told["Gid"].split()) and int(told["Uid"].split()[0]) > UID and told["Groups"].strip() == ""
    assert int(told["CapPrm"], 16) == int(told["CapEff"], 16) == 0 and told["NoNewPrivs"] == "1" and told["Seccomp"] == "2"
    assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == f"{OOM_SCORE}\n", "it goes before the agent, whose unit may spare it"
    second = VmDriver(vms._folder.parent, vms._store, vms._settings)
    assert (await second.status(key)).phase is Phase.RUNNING and (await second.start(key)).phase is Phase.RUNNING
    second.close()
    running = read(vms.folder(key) / "running.json")
    assert running is not None
    os.kill(int(running["keeper"]), signal.SIGKILL)
    lost = await vms.wait(key)
    assert lost.phase is Phase.LOST and "keeper was killed" in lost.reason
    await until(lambda: not Path(f"/proc/{pid}").exists())
    await vms.delete(key)


async def test_a_clone_that_has_no_kernel_to_boot_again_is_ended(vms: VmDriver) -> None:
    key = await started(vms, "bare", "kernel:1", "reboot -f", template=True)
    ended = await vms.wait(key)
    assert ended.phase is Phase.ENDED and ended.exit is None and "start it anew" in ended.reason
    await vms.delete(key)


async def test_bombs_in_a_guest_stay_in_it(vms: VmDriver) -> None:
    """Memory, processes and disk: the node gives what was set aside, and a neighbour goes on."""
    quiet = await started(vms, "neighbour", "kernel:1", "while :; do echo alive; sleep 0.1; done", template=True)
    bomb = await started(vms, "bomb", "kernel:1", "umount /data; dd if=/dev/urandom of=/dev/vda2 bs=1M count=64 2>/dev/null; echo full; b() { b | b & }; b; tail /dev/zero; echo over", template=True)
    await console(vms, bomb, b"full")
    disk = vms.folder(bomb) / "disk.qcow2"
    size = int(vms._instance(bomb)["bytes"])
    await until(lambda: disk.stat().st_blocks * 512 > 8 << 20, 60.0, what="the disk grows")
    assert disk.stat().st_blocks * 512 <= size + (4 << 20)
    spent = (await vms.stats(bomb)).cpu_ns

    async def rages() -> bool:
        return (await vms.stats(bomb)).cpu_ns - spent > 300_000_000

    await until(rages, 90.0)
    stats = await vms.stats(bomb)
    assert stats.memory_bytes <= MEMORY + QEMU_OWN and stats.processes <= 256
    before = len((await vms.logs(quiet, 65_536)).stdout)

    async def goes_on() -> bool:
        return len((await vms.logs(quiet, 65_536)).stdout) > before

    await until(goes_on, 60.0)
    for key in (bomb, quiet):
        assert (await vms.stop(key, 0.0)).phase is Phase.ENDED
        await vms.delete(key)


@pytest.mark.slow
async def test_the_firmware_of_uefi_starts(vms: VmDriver) -> None:
    if not all(map(os.path.exists, vm_machine.FIRMWARE)):
        pytest.skip("no OVMF (as root: apt install ovmf)")
    key = await started(vms, "uefi", "blank:1", boot="uefi")
    await console(vms, key, b"BdsDxe", 100.0)
    await vms.delete(key)
    with pytest.raises(Refused, match="cannot be had of a machine that boots by uefi"):
        await vms.prepare(Order(key, "blank:1", {"memory": MEMORY}, {"boot": "uefi", "template": True}))


async def test_what_does_not_boot_is_ended_within_its_bound(vms: VmDriver) -> None:
    key = Key("blank", 1)
    await vms.prepare(Order(key, "blank:1", {"memory": MEMORY}, {"boot_s": 1.0}))
    with pytest.raises(Failed, match=r"wrote nothing to its serial console within 1 s: it does not boot"):
        await vms.start(key)
    assert (await vms.status(key)).phase is Phase.ENDED
    await vms.delete(key)
    with pytest.raises(Failed, match="was not ready within 1 s"):
        await vms.prepare(Order(key, "blank:1", {"memory": MEMORY}, {"boot_s": 1.0, "template": True}))
    assert not vms.folder(key).exists() and not [path for path in (vms._folder / ".templates").iterdir() if (path / "seed.img").exists() and path not in {one.folder for one in vms._templates._made.values()}]
    silent = Key("silent", 1)
    await vms.prepare(Order(silent, "blank:1", {"memory": MEMORY}, {"boot_s": 0}))
    assert (await vms.start(silent)).phase is Phase.RUNNING  # asked for
    os.kill((await vms.status(silent)).pid, signal.SIGKILL)
    ended = await vms.wait(silent)
    assert ended.phase is Phase.ENDED and "QEMU ended by itself" in ended.reason
    await vms.delete(silent)


async def test_a_lease_that_is_over_ends_it(vms: VmDriver) -> None:
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
    vms.renew(Key("leased", 1), now + 600_000)
    key = await started(vms, "leased", "blank:1", boot_s=0, leased=True)
    assert (await vms.status(key)).leased
    vms.renew(key, now)
    lost = await vms.wait(key)
    assert lost.phase is Phase.LOST and lost.leased
    await vms.delete(key)


async def test_what_cannot_be_is_refused_before_anything_is_touched(vms: VmDriver, tmp_path: Path) -> None:
    head, length = vm_qcow2.empty(1 << 20)
    disk = bytearray(head.ljust(length, b"\0"))
    disk[8:20] = (4096).to_bytes(8, "big") + (11).to_bytes(4, "big")
    disk[4096:4107] = b"/etc/shadow"
    store = ImageStore(tmp_path / "images", limits=LIMITS)
    store.add(layout(tmp_path / "evil", [layer([("file", "disk/a.qcow2", bytes(disk))])], name="evil:1"))
    store.add(layout(tmp_path / "none", [layer([("file", "bin/sh", b"x")])], name="none:1"))
    driver = made_vms(tmp_path, store)
    await vms._ready()
    driver._capabilities = vms._capabilities  # a probe is a boot
    for image, spec, requests, field in (
        ("evil:1", {}, {}, "image"), ("none:1", {}, {}, "image"), ("gone:1", {}, {}, "image"), ("evil:1", {"x": 1}, {}, "image"),
    ):
        with pytest.raises(Refused) as told:
            await driver.prepare(Order(Key("refused", 1), image, requests, spec))
        assert told.value.field.startswith(field) and told.value.remedy, told.value
        assert not driver.folder(Key("refused", 1)).exists()
    driver.close()
    store.close()
    for requests in ({"disk": 1 << 49}, {"disk": 4096}):
        with pytest.raises(Refused, match=r"requests\.disk"):
            await vms.prepare(Order(Key("refused", 1), "raw:1", requests, {}))


async def test_a_node_without_what_it_needs_says_so(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", limits=LIMITS)
    for settings, why in (({"kernel": str(tmp_path)}, "guest_kernel.sh"), ({"qemu": ("no-such-qemu",)}, "QEMU is not installed"), ({"enabled": False}, "switched off")):
        driver = made_vms(tmp_path, store, **settings)
        told = await driver.probe()
        assert not told.usable and why in told.cannot[Ability.START]
        with pytest.raises(Refused):
            await driver.prepare(Order(Key("a", 1), "raw:1"))
        driver.close()
    store.close()
