"""Templates of images: what a clone of one is, that it is nobody's copy, and what becomes of those that are damaged, stale, unfinished or not wanted any more."""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime.workloads.drivers import microvm_guest, qemu_kernel
from edge_runtime.workloads.drivers.face import Failed, Key, Order
from edge_runtime.workloads.drivers.microvm import MicrovmDriver
from edge_runtime.workloads.drivers.microvm_templates import Background, Held, Templates, sealed
from edge_runtime.workloads.drivers.qemu_machine import Machine
from edge_runtime.workloads.images import ImageStore

from .container_side import LIMITS, layer, made_store
from .microvm_side import end_all, made_microvms, output, reason_against, started
from .waiting import until

pytestmark = pytest.mark.skipif(bool(reason_against()), reason=reason_against())

FOREVER = "trap 'exit 7' TERM; echo up; while :; do sleep 0.1; done"

WHO = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/hostname; date +%s"

BOOT_S = 150.0
"""For a guest's boot, or a template of an image: a bound for the slowest machine."""

DISK = 64 << 20
"""Bytes of these guests' disks."""


@pytest.fixture(scope="module")
def microvms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MicrovmDriver]:
    """One driver for all, that makes templates again at once."""
    folder = tmp_path_factory.mktemp("templates")
    store = made_store(folder)
    made = made_microvms(folder, store, boot_s=BOOT_S)
    made._holding = Background(4, rest_s=0.0)
    yield made
    end_all(made)
    store.close()


def held(driver: MicrovmDriver, disk: int = DISK) -> Held:
    return Held(Machine(256, 1, driver._accelerator), driver._store.find("box:1").digest, disk)


async def first(driver: MicrovmDriver) -> Templates:
    """A start that leaves a template of its image behind, where there is none."""
    await driver.settled()
    if driver._templates is None or not driver._templates.has(held(driver)):
        await output(driver, "first", "true", requests={"disk": DISK})
        await driver.settled()
    assert driver._templates is not None and driver._templates.has(held(driver))
    return driver._templates


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said about templates."""
    return [record.getMessage() for record in caplog.records if "template" in record.getMessage() or "cloned" in record.getMessage()]


async def test_clones_of_an_image_are_whole_and_differ_in_all_that_they_must(microvms: MicrovmDriver) -> None:
    await first(microvms)
    script = f"{WHO}; id -u; pwd; echo a=$A; stat -c %a /tmp; echo $$; touch /srv/x 2>/dev/null; ls /srv; grep -c novacron /proc/1/environ; ls /proc/self/fd | wc -l"
    told = []
    for number in range(2):
        status, out, err = await output(microvms, f"clone-{number}", script, requests={"disk": DISK}, user="app", cwd="/srv", env={"A": "it's \"so\" $HOME\n"}, mounts=[{"target": "/tmp", "tmpfs": "1Mi"}])
        assert status.exit is not None and status.exit.code == 0, (out, err)
        told.append(out.splitlines())
    for one, name in zip(told, ("clone-0", "clone-1"), strict=True):
        assert one[3] == name and abs(int(one[4]) - time.time()) < 600
        assert one[5:10] == ["1000", "/srv", "a=it's \"so\" $HOME", "1777", "1"]
        assert one[-1] == "4"  # its three, and the folder that ls reads
    assert all(told[0][at] != told[1][at] for at in (0, 1, 2))  # random numbers, the machine's id of this boot


async def test_a_guest_that_cannot_make_its_random_numbers_new_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: one that merely goes on with the template's is found out."""
    planted = qemu_kernel.RENEW.replace(bytes.fromhex("be07520000"), bytes.fromhex("be0f520000"))  # another ioctl, which there is none of
    assert planted != qemu_kernel.RENEW
    monkeypatch.setattr(qemu_kernel, "RENEW", planted)
    store = made_store(tmp_path)
    driver = made_microvms(tmp_path, store, boot_s=BOOT_S)
    await driver.prepare(Order(Key("stale", 1), "box:1"))
    with pytest.raises(Failed, match="random numbers could not be made new"):
        await driver.start(Key("stale", 1))
    await asyncio.to_thread(end_all, driver)
    store.close()


async def test_what_they_write_is_theirs_and_the_disk_has_its_size(microvms: MicrovmDriver) -> None:
    await first(microvms)
    for number in range(2):
        status, out, err = await output(microvms, f"writes-{number}", "ls /srv; echo here > /srv/own; sync; dd if=/dev/zero of=/big bs=65536 count=2000 2>&1 | grep -c 'No space'; cat /srv/own", requests={"disk": DISK})
        assert status.exit is not None and status.exit.code == 0 and out.splitlines()[-2:] == ["1", "here"] and "own" not in out.splitlines()[:-2], (out, err)


async def test_a_command_is_the_images_own(microvms: MicrovmDriver) -> None:
    """Guests start with a busybox of Debian's, that has hundreds of commands of its own."""
    await first(microvms)
    key = await started(microvms, "own", "mkdir /srv/bin; printf '#!/bin/sh\\necho mine \"$@\"\\n' > /srv/bin/factor; chmod 755 /srv/bin/factor; " + FOREVER, env={"PATH": "/srv/bin:/bin"}, requests={"disk": DISK})
    await until(lambda: b"up" in (microvms._path(key) / "stdout.log").read_bytes(), 60)
    assert (await microvms.exec(key, ["factor", "12"], 60.0)).output.stdout == b"mine 12\n"
    ran = await microvms.exec(key, ["nowhere-there"], 60.0)
    assert ran.exit.code == 127 and b"not found" in ran.output.stderr
    await microvms.delete(key)


@pytest.mark.parametrize("which", ["image", "size"])
async def test_a_template_that_cannot_be_loaded_is_made_anew(microvms: MicrovmDriver, caplog: pytest.LogCaptureFixture, which: str) -> None:
    templates, key = await first(microvms), held(microvms)
    if which == "size":
        templates.drop(key)
    damaged = key if which == "image" else key.machine
    bad = sealed("novacron-state", b"QEVM no state " * 4000)
    number = os.fstat(bad).st_ino
    os.close(templates._made[damaged].state)
    templates._made[damaged] = replace(templates._made[damaged], state=bad)
    with caplog.at_level(logging.WARNING):
        status, out, _ = await output(microvms, "after", "echo fine", requests={"disk": DISK})
    assert status.exit is not None and status.exit.code == 0 and out == "fine\n"
    assert any(f"the template of its {which}" in line for line in said(caplog)), caplog.text
    await microvms.settled()
    assert os.fstat(templates._made[damaged].state).st_ino != number
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert (await output(microvms, "again", "echo fine", requests={"disk": DISK}))[1] == "fine\n"
    assert not said(caplog)


async def test_another_image_or_file_or_disk_is_another_template(microvms: MicrovmDriver, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    templates, old = await first(microvms), held(microvms)
    assert not templates.has(held(microvms, 32 << 20))
    path = microvms._disks.path(old.image)  # type: ignore[union-attr]
    with caplog.at_level(logging.WARNING):
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))  # as if it was written to
        assert (await output(microvms, "changed", "echo fine", requests={"disk": DISK}))[1] == "fine\n"
    assert any("is not used" in line for line in said(caplog))
    await microvms.settled()
    assert templates.has(old)
    made_store(tmp_path / "second", [layer([("file", "srv/new", b"new")])]).close()
    microvms._store.add(tmp_path / "second/in", "box:1")
    assert held(microvms) != old
    assert (await output(microvms, "newer", "cat /srv/new", requests={"disk": DISK}))[1] == "new"
    await microvms.settled()
    assert templates.has(old) and templates.has(held(microvms))
    assert (await output(microvms, "newest", "cat /srv/new", requests={"disk": DISK}))[1] == "new"


async def test_templates_go_with_their_images_and_the_oldest_first(microvms: MicrovmDriver) -> None:
    templates, key = await first(microvms), held(microvms)
    await microvms.prepare(Order(Key("stands", 1), "box:1", {"disk": DISK}, {"limits": {"memory": "64Mi"}}))
    await microvms.prune(0)
    assert templates.has(key)
    await microvms.delete(Key("stands", 1))
    before = len(os.listdir("/proc/self/fd"))
    await microvms.prune(0)
    assert not templates.has(key) and not microvms._disks.path(key.image).exists()  # type: ignore[union-attr]
    assert len(os.listdir("/proc/self/fd")) == before - 4
    most, templates._most_held = templates._most_held, 1
    for disk in (DISK, 2 * DISK):
        assert (await output(microvms, "again", "echo fine", requests={"disk": disk}))[1] == "fine\n"
        await microvms.settled()
    templates._most_held = most
    assert not templates.has(key) and templates.has(held(microvms, 2 * DISK))
    assert microvms.make_room() and not microvms.make_room() and not templates.images()


NEVER = "755 /root && read -r never <&8 && chmod 755"
"""As the mode of an image's root: its template waits for what nobody says."""


async def making(driver: MicrovmDriver, key: Held) -> tuple[asyncio.Task[None], int, int]:
    """A template that is being made: who waits for it, its keeper, its QEMU."""
    task = asyncio.create_task(asyncio.to_thread(driver._hold, key, {"root_mode": NEVER, "args": ["true"], "env": []}))
    return task, *await under_way(driver)


async def under_way(driver: MicrovmDriver) -> tuple[int, int]:
    """The keeper that makes a template now, and its QEMU."""
    def both() -> tuple[int, int] | None:
        # Together at each look: a keeper that was there at the first may have been the one before, which has just ended.
        keeper = _keeper_of(driver)
        children = _children(keeper) if keeper else []
        return (keeper, children[0]) if keeper and children else None

    found: tuple[int, int] = await until(both, 60)
    return found


async def test_a_keeper_that_is_killed_while_it_makes_a_template_leaves_nothing(microvms: MicrovmDriver) -> None:
    templates, key = await first(microvms), held(microvms)
    templates.drop(key)
    before = len(os.listdir("/proc/self/fd"))
    task, keeper, qemu = await making(microvms, key)
    os.kill(keeper, signal.SIGKILL)
    with pytest.raises(Failed, match="keeper"):
        await task
    await until(lambda: not Path(f"/proc/{qemu}").exists(), 60)
    assert not templates.has(key) and not list(microvms._new.iterdir()) and len(os.listdir("/proc/self/fd")) == before
    assert (await output(microvms, "after", "echo fine", requests={"disk": DISK}))[1] == "fine\n"
    await microvms.settled()
    assert templates.has(key)


SILENT = b"#!/bin/busybox sh\nwhile :; do /bin/busybox sleep 60; done\n"
"""A guest's first process that never says that it is ready."""


async def test_a_driver_that_is_closed_does_not_wait_for_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microvm_guest, "INIT", SILENT)
    store = made_store(tmp_path)
    driver = made_microvms(tmp_path, store, boot_s=3600.0)
    probing = asyncio.create_task(driver.probe())
    keeper, qemu = await under_way(driver)
    await asyncio.to_thread(driver.close)
    assert not (await probing).usable
    await until(lambda: not Path(f"/proc/{qemu}").exists() and not Path(f"/proc/{keeper}").exists(), 60)
    assert driver._templates is None and not list(driver._new.iterdir())
    store.close()


_AGENT = """
import asyncio, sys
from pathlib import Path
from tests.integration import microvm_side, test_microvm_templates as here
from tests.integration.container_side import made_store

async def main(folder):
    here.microvm_guest.INIT = here.SILENT
    driver = microvm_side.made_microvms(folder, made_store(folder), boot_s=3600.0)
    probing = asyncio.create_task(driver.probe())
    print(*await here.under_way(driver), flush=True)
    await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1])))
"""
"""An agent whose template is never whole."""


async def test_an_agent_that_is_killed_while_a_template_is_made_leaves_no_process_and_nothing_half(tmp_path: Path) -> None:
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", _AGENT, str(tmp_path), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert agent.stdout is not None
    pids = [int(word) for word in (await asyncio.wait_for(agent.stdout.readline(), 150)).split()]
    assert len(pids) == 2
    agent.kill()
    await agent.wait()
    await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 60)
    store = ImageStore(tmp_path / "images", limits=LIMITS)
    driver = made_microvms(tmp_path, store)
    assert not list(driver._new.iterdir()) and not list(await driver.instances())
    driver.close()
    store.close()


def _keeper_of(driver: MicrovmDriver) -> int:
    """The keeper that makes a template: it has the lock of its folder open; 0 where none does."""
    server = driver._keepers._server
    for pid in _children(server.pid) if server is not None else []:
        try:
            if any(os.readlink(f"/proc/{pid}/fd/{name}").startswith(f"{driver._new}/template-") for name in os.listdir(f"/proc/{pid}/fd")):
                return pid
        except OSError:
            continue
    return 0


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
