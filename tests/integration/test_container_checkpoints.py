"""Checkpoint and restore of real containers: what they hold on to is carried, what cannot be is named, and nothing runs twice."""

import asyncio
import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers import keeper_restore
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.face import Ability, Checkpoints, Failed, Key, Order, Phase, Refused

from .checkpoint_program import PARTS
from .checkpoint_side import SLEEPY, begun, driver, made, next_of, out, python, reason_against_checkpoints, says
from .waiting import until

__all__ = ["driver"]

pytestmark = pytest.mark.skipif(bool(reason_against_checkpoints()), reason=reason_against_checkpoints())

ALL = (Path(__file__).parent / "checkpoint_program.py").read_text()
SHELL = {"command": ["sh", "-c", SLEEPY]}


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


async def counted(driver: ContainerDriver, key: Key, least: dict[str, int]) -> dict[str, Any]:
    """The first line in which every part has done as much."""
    found: list[dict[str, Any]] = []

    async def enough() -> bool:
        told = lines(await out(driver, key))
        found[:] = [one for one in told if one["wrong"] or all(one[part] >= least[part] for part in PARTS)][:1]
        return bool(found)

    await until(enough, 30)
    return found[0]


async def test_the_probe_takes_a_real_checkpoint_and_says_where_it_cannot(driver: ContainerDriver, tmp_path: Path) -> None:
    told = await driver.probe()
    assert told.can(Ability.CHECKPOINT) and told.can(Ability.RESTORE) and isinstance(driver, Checkpoints)
    broken = tmp_path / "bin/criu"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Version: 4.2' && exit 0\nexit 1\n")
    broken.chmod(0o755)
    old = tmp_path / "old/criu"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'Version: 3.17.1'\n")
    old.chmod(0o755)
    for path, word in ((broken, "CRIU 4.2: "), (old, "CRIU is 3.17.1"), (tmp_path / "none/criu", "not installed")):
        folder = tmp_path / f"of-{path.parent.name}"
        folder.mkdir()
        other = made(folder, criu=str(path))
        told = await other.probe()
        assert told.usable and word in told.cannot[Ability.CHECKPOINT], told.cannot
        with pytest.raises(Refused, match="cannot do this here"):
            await other.checkpoint(Key("cp-a", 1), tmp_path / "state", leave_running=True)
        other.close()


async def test_processes_threads_pipes_sockets_connections_timers_and_deleted_files_go_on(driver: ContainerDriver, tmp_path: Path) -> None:
    spec = python(ALL)
    key = await begun(driver, "cp-all", spec)
    least = dict.fromkeys(PARTS, 3)
    first = await counted(driver, key, least)
    assert not first["wrong"]
    manifest = await driver.checkpoint(key, tmp_path / "state", leave_running=False)
    assert len(manifest["processes"]) >= 10 and any(one["threads"] > 1 for one in manifest["processes"])
    status = await driver.status(key)
    assert status.phase is Phase.CHECKPOINTED and "its state was taken to" in status.reason
    last = lines(await out(driver, key))[-1]
    again = next_of(key, spec)
    status = await driver.restore(again, tmp_path / "state")
    assert status.phase is Phase.RUNNING and not status.reason
    after = await counted(driver, again.key, {part: last[part] + 20 for part in PARTS})
    assert not after["wrong"]
    assert (await driver.status(again.key)).phase is Phase.RUNNING
    await driver.delete(key)
    # Once more, from what was brought back.
    await driver.checkpoint(again.key, tmp_path / "second", leave_running=False)
    third = next_of(again.key, spec)
    await driver.restore(third, tmp_path / "second")
    after = await counted(driver, third.key, {part: after[part] + 20 for part in PARTS})
    assert not after["wrong"]
    for one in (again.key, third.key):
        await driver.delete(one)


async def test_its_files_its_output_its_keeper_and_its_end_are_those_of_any_container(driver: ContainerDriver, tmp_path: Path) -> None:
    script = "mkdir /srv/new; echo kept > /srv/new/file; ln /srv/new/file /srv/hard; ln -s file /srv/new/link; rm -r /srv/old; mkdir /srv/old; echo x > /srv/old/mine; mkfifo /tmp/fifo; chown 1000:1001 /srv/hard; echo 7 > /dev/shm/seven; "
    spec = {"command": ["sh", "-c", script.replace("mkfifo /tmp/fifo; ", "").replace("chown 1000:1001 /srv/hard; ", "") + SLEEPY.replace("sleep 0.05", "sleep 0.05; [ -e /tmp/end ] && exit 5")]}
    key = await begun(driver, "cp-files", spec)
    await says(driver, key, "3\n")
    await driver.checkpoint(key, tmp_path / "state", leave_running=False)
    before = await out(driver, key)
    await driver.delete(key)
    again = next_of(key, spec)
    await driver.restore(again, tmp_path / "state")
    ran = await driver.exec(again.key, ["sh", "-c", "cat /srv/new/link /srv/hard /dev/shm/seven; stat -c %h /srv/hard; ls /srv/old; stat -c %u /srv/new/file; id -u; cat /proc/self/uid_map"], 10)
    assert ran.output.stdout.decode().split() == ["kept", "kept", "7", "2", "mine", "0", "0", "0", str(driver._instance(again.key)["slot"] * 65536 + 0x7000_0000), "65536"]
    await driver.exec(again.key, ["touch", "/tmp/end"], 10)
    status = await driver.wait(again.key)
    assert status.exit is not None and status.exit.code == 5
    numbers = [int(one) for one in (before + await out(driver, again.key)).split()]
    assert numbers == list(range(len(numbers))), "something was written twice, or is lost"
    assert not (driver.folder(again.key) / "restore").exists()
    await driver.delete(again.key)


async def test_one_that_goes_on_is_not_disturbed_and_its_state_can_be_used_many_times(driver: ContainerDriver, tmp_path: Path) -> None:
    key = await begun(driver, "cp-on", SHELL)
    await says(driver, key, "1\n")
    await driver.checkpoint(key, tmp_path / "state", leave_running=True)
    seen = len((await out(driver, key)).split())
    await says(driver, key, f"\n{seen + 3}\n")
    assert (await driver.status(key)).phase is Phase.RUNNING and not (driver.folder(key) / "checkpoint.json").exists() and not (driver.folder(key) / "dump").exists()
    for _ in range(2):
        await driver.restore(next_of(key, SHELL), tmp_path / "state")
        first = await until(lambda: out(driver, Key("cp-on", 2)))
        assert int(first.split()[0]) in (seen - 1, seen, seen + 1)
        await driver.delete(Key("cp-on", 2))
    # As another workload it has other ids on the node, in its user namespace and on its disk.
    other = replace(next_of(key, SHELL), key=Key("cp-other", 1))
    await driver.restore(other, tmp_path / "state")
    ran = await driver.exec(other.key, ["sh", "-c", "touch /tmp/new && stat -c %u /tmp /tmp/new && cat /proc/self/uid_map"], 10)
    assert ran.output.stdout.decode().split()[:4] == ["0", "0", "0", str(driver._instance(other.key)["slot"] * 65536 + 0x7000_0000)]
    assert driver._instance(other.key)["slot"] != driver._instance(key)["slot"]
    await driver.delete(other.key)
    await driver.delete(key)


async def test_what_is_not_whole_or_of_another_host_is_refused_before_anything_is_touched(driver: ContainerDriver, tmp_path: Path) -> None:
    key = await begun(driver, "cp-odd", SHELL)
    await driver.checkpoint(key, tmp_path / "state", leave_running=False)
    order = next_of(key, SHELL)

    async def refused(word: str) -> None:
        before = {entry.name for entry in os.scandir(driver.scratch.parent)}
        with pytest.raises(Refused, match=word):
            await driver.restore(order, tmp_path / "bad")
        assert {entry.name for entry in os.scandir(driver.scratch.parent)} == before and not list(driver.scratch.iterdir())

    for name in ("images/pages-1.img", "disk.tar", "manifest.json"):
        shutil.copytree(tmp_path / "state", tmp_path / "bad")
        path = tmp_path / "bad" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        await refused("pages-1" if "pages" in name else "disk.tar" if "disk" in name else "manifest")
        shutil.rmtree(tmp_path / "bad")
    shutil.copytree(tmp_path / "state", tmp_path / "bad")
    here = driver.capabilities
    assert here is not None
    try:
        driver.capabilities = replace(here, cpu_flags=tuple(one for one in here.cpu_flags if one not in ("sse2", "fpu")))
        await refused("fpu, sse2")
        driver.capabilities = replace(here, kernel="5.4.0")
        await refused("5.4.0")
        other = "v1" if here.cgroup == "v2" else "v2"
        driver.capabilities = replace(here, cgroup=other)
        await refused(other)
    finally:
        driver.capabilities = here
    with pytest.raises(Refused, match="process of the container differs|process.args"):
        await driver.restore(next_of(key, {"command": ["sh", "-c", "true"]}), tmp_path / "state")
    assert not list(driver.scratch.iterdir())
    with pytest.raises(Refused, match="already"):
        await driver.restore(Order(key, "box:1", {}, SHELL), tmp_path / "state")
    assert (await driver.restore(order, tmp_path / "state")).phase is Phase.RUNNING  # the control: as it is, it can
    for one in (key, order.key):
        await driver.delete(one)


async def test_one_that_does_not_live_after_its_restore_is_removed_and_told(driver: ContainerDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program is changed below it: where it goes on there is an instruction that no processor has."""
    spec = python("import ctypes, time\nlibc = ctypes.CDLL(None)\nprint('up', flush=True)\nwhile True: time.sleep(0.05)\n")
    key = await begun(driver, "cp-dies", spec)
    await says(driver, key, "up")
    await driver.checkpoint(key, tmp_path / "state", leave_running=False)
    order = next_of(key, spec)
    fill = driver.checkpoints().fill

    def spoilt(*where: Any) -> None:
        fill(*where)
        for pages in (where[4] / "restore/images").glob("pages-*.img"):
            data = pages.read_bytes()
            pages.write_bytes(b"\x0f\x0b" * (len(data) // 2))  # ud2 in all of its memory

    monkeypatch.setattr(driver.checkpoints(), "fill", spoilt)
    with pytest.raises(Failed) as caught:
        await driver.restore(order, tmp_path / "state")
    assert caught.value.field in ("restore", "start")
    assert not driver.folder(order.key).exists() and (await driver.status(key)).phase is Phase.CHECKPOINTED
    monkeypatch.undo()
    assert (await driver.restore(order, tmp_path / "state")).phase is Phase.RUNNING
    for one in (key, order.key):
        await driver.delete(one)


async def test_what_came_back_is_held_against_what_was_there(driver: ContainerDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await begun(driver, "cp-less", SHELL)
    await driver.checkpoint(key, tmp_path / "state", leave_running=False)
    fill = driver.checkpoints().fill

    def more(*where: Any) -> None:
        fill(*where)
        where[6]["restore"]["processes"][0]["descriptors"] += 1

    monkeypatch.setattr(driver.checkpoints(), "fill", more)
    with pytest.raises(Failed, match="not what was there"):
        await driver.restore(next_of(key, SHELL), tmp_path / "state")
    assert not driver.folder(Key("cp-less", 2)).exists()
    await driver.delete(key)


async def test_a_process_that_a_signal_stopped_is_named(driver: ContainerDriver, tmp_path: Path) -> None:
    spec = python("import os, signal, time\nchild = os.fork()\nif child == 0:\n    os.kill(os.getpid(), signal.SIGSTOP)\n    time.sleep(100)\nprint('up', flush=True)\ntime.sleep(1000)\n")
    key = await begun(driver, "cp-still", spec)
    await says(driver, key, "up")
    group = driver._groups.processes(f"/novacron/{driver.folder(key).name}")
    await until(lambda: any(one["stopped"] for one in keeper_restore.processes(group).values()))
    with pytest.raises(Refused, match=r"process \d+ \(python3\) was stopped by a signal"):
        await driver.checkpoint(key, tmp_path / "state", leave_running=False)
    await driver.exec(key, ["sh", "-c", "kill -CONT -1"], 10)
    await until(lambda: not any(one["stopped"] for one in keeper_restore.processes(group).values()))
    await driver.checkpoint(key, tmp_path / "state", leave_running=False)
    await driver.delete(key)


async def test_odd_requests_are_refused_and_it_goes_on(driver: ContainerDriver, tmp_path: Path) -> None:
    key = await begun(driver, "cp-asked", SHELL)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for folder, word in ((tmp_path / "full", "not an empty folder"), (tmp_path / "no/state", "make it first")):
        with pytest.raises(Refused, match=word):
            await driver.checkpoint(key, folder, leave_running=True)
    await driver.pause(key)
    with pytest.raises(Refused, match="paused"):
        await driver.checkpoint(key, tmp_path / "state", leave_running=True)
    await driver.resume(key)
    running = asyncio.ensure_future(driver.exec(key, ["sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.05; done"], 30))
    group = driver._groups.processes(f"/novacron/{driver.folder(key).name}")
    first = (await driver.status(key)).pid
    await until(lambda: any(pid != first and keeper_restore.parent(pid) not in keeper_restore.processes(group) for pid in keeper_restore.processes(group)))
    with pytest.raises(Refused, match="by exec"):
        await driver.checkpoint(key, tmp_path / "state", leave_running=True)
    await driver.exec(key, ["touch", "/tmp/go"], 10)
    await running
    assert (await driver.status(key)).phase is Phase.RUNNING and not (tmp_path / "state").exists()
    await driver.delete(key)


async def test_a_root_that_is_read_only_is_so_afterwards_here_and_there(driver: ContainerDriver, tmp_path: Path) -> None:
    spec = {"command": ["sh", "-c", "while true; do touch /tmp/x 2>/dev/null && echo written; sleep 0.01; done"], "read_only_root": True}
    key = await begun(driver, "cp-read-only", spec)
    again = next_of(key, spec)
    await driver.checkpoint(key, tmp_path / "state", leave_running=True)
    await driver.restore(again, tmp_path / "state")
    for one in (key, again.key):
        ran = await driver.exec(one, ["sh", "-c", "touch /srv/x; grep ' / / ' /proc/self/mountinfo"], 10)
        assert "Read-only" in ran.output.stderr.decode() and " ro," in ran.output.stdout.decode()
        assert not await out(driver, one)
        await driver.delete(one)


IN_THE_WAY = {
    "unix": ("unix socket", "s = socket.socket(socket.AF_UNIX); s.connect('/shared/stream')", "outside of the container"),
    "datagrams": ("unix socket", "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect('/shared/datagrams')", "outside of the container"),
    "queue": ("descriptor", "ctypes.CDLL(None).mq_open(b'/queue', os.O_CREAT | os.O_RDWR, 0o600, None)", "descriptor 3 (/queue)"),
    "mptcp": ("socket", "s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)", "protocol 262"),
    "name": ("deleted file", "f = open('/tmp/a', 'w'); os.link('/tmp/a', '/tmp/b'); os.unlink('/tmp/a')", "has another name"),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
async def test_what_stands_in_the_way_is_named_and_it_goes_on(driver: ContainerDriver, tmp_path: Path, name: str) -> None:
    field, code, word = IN_THE_WAY[name]
    shared = driver.scratch.parents[1] / "shared"
    shared.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as stream, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        for line, there in ((stream, "stream"), (datagrams, "datagrams")):
            (shared / there).unlink(missing_ok=True)
            line.bind(str(shared / there))
            (shared / there).chmod(0o777)
        stream.listen()
        end = "\nn = 0\nwhile True:\n    print(n, flush=True); n += 1\n    time.sleep(0.05)\n"
        spec = python(f"import ctypes, os, socket, time\n{code}{end}", mounts=[{"target": "/usr", "source": "/usr"}, {"target": "/shared", "source": str(shared), "read_only": False}])
        key = await begun(driver, f"cp-{name}", spec)
        await says(driver, key, "0\n")
        with pytest.raises(Refused) as caught:
            await driver.checkpoint(key, tmp_path / "state", leave_running=False)
        assert caught.value.field == f"resource.{field}" and word in caught.value.problem and "(process 1, python3)" in caught.value.problem and caught.value.remedy
        seen = len((await out(driver, key)).split())
        await says(driver, key, f"\n{seen + 3}\n")
        assert (await driver.status(key)).phase is Phase.RUNNING and not list(tmp_path.iterdir()) and not (driver.folder(key) / "dump").exists()
        await driver.delete(key)
