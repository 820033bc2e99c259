"""A guest moves with its disk. Its program writes blocks past every cache, synced, and checks each against what it remembers in memory: after a move both have to be of the same moment.

Whatever is killed or cut, and whenever, just one end runs the guest, and its disk there is whole.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_migration import qemu_disks, qemu_question, qemu_source, wire
from gpu_migration.errors import DestinationError, MigrationError, Refused, SourceError
from gpu_migration.qemu_qmp import Qmp
from tests.integration.waiting import until_sync
from tools.bench import live_guest
from tools.bench.migration_proxy import Proxy, cut_all

from .live_world import DISK_MIB, ENVIRONMENT, KEY, LONG, NODE, Receiving, World, make, options, receiving, sending, taken, where


@contextlib.contextmanager
def guest_with(disk: str, **more: int) -> Iterator[World]:
    found = live_guest.qemus()
    if not found:
        pytest.skip("no qemu-system-x86_64: apt install qemu-system-x86, or tools/setup/qemu.sh")
    if shutil.which("qemu-img") is None:
        pytest.skip("no qemu-img: apt install qemu-utils")
    made = make(found[max(found, key=int)], disk, **more)
    try:
        yield made
    finally:
        made.end()
        subprocess.run(["rm", "-rf", str(made.folder)], check=True)


@pytest.fixture(scope="module", params=["raw", pytest.param("qcow2", marks=pytest.mark.slow)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with guest_with(request.param) as made:
        yield made


@pytest.mark.slow
def test_a_disk_with_a_header_goes_too() -> None:
    with guest_with("qcow2") as world:
        folder = world.next()
        there = Receiving(world, folder)
        qemu_source.Source(world.guest.control, KEY, there.address, options()).move()
        world.moved_to(folder, there.done().pid)
        told = json.loads(subprocess.run(["qemu-img", "info", "-U", "--output=json", str(folder / "disks" / NODE)], check=True, capture_output=True).stdout)
        assert told["format"] == "qcow2" and told["virtual-size"] == DISK_MIB << 20


def left(world: World) -> list[str]:
    """What is left in the source's QEMU of mirrors."""
    qmp = Qmp(world.guest.control)
    try:
        return [*(job["id"] for job in qmp("query-jobs")), *(node["node-name"] for node in qmp("query-named-block-nodes") if node["node-name"].startswith("novacron"))]
    finally:
        qmp.close()


def runs_on(world: World, folder: Path, disks: Path | None = None) -> None:
    """It runs where it was, nothing is left of the move at either end; the target tidies up when it has seen that the source is gone."""
    world.runs_here()
    assert left(world) == [] and not list(world.guest.control.parent.glob("*novacron*"))
    until_sync(lambda: not any(path.exists() for path in ((disks or folder / "disks") / NODE, folder / "store-pid", folder / "memory")), LONG, "the target tidies up")


def test_it_goes_with_its_guest_by_commands_and_comes_back(world: World) -> None:
    folder, disks = world.next(), world.next()
    receive = subprocess.Popen(
        [sys.executable, "-m", "gpu_migration", "vm-receive", str(folder), "--patience", str(LONG), "--disks", str(disks), "--", *world.command(folder)], env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )
    try:
        assert receive.stderr is not None
        address = receive.stderr.readline().split()[-1]
        sent = subprocess.run(
            [sys.executable, "-m", "gpu_migration", "vm-send", str(world.guest.control), address, "--downtime", "30"], env=ENVIRONMENT, capture_output=True, text=True, timeout=LONG
        )
        assert sent.returncode == 0, sent.stderr
        pid = taken(receive)
    finally:
        receive.kill()
        receive.communicate()
    result = json.loads(sent.stdout)
    assert result["disks"] == [NODE] and result["disk_bytes"] > 0 and (disks / NODE).exists() and not (folder / "store-pid").exists()
    world.moved_to(folder, pid)
    folder = world.next()
    there = Receiving(world, folder)
    qemu_source.Source(world.guest.control, KEY, there.address, options()).move()
    done = there.done()
    assert done.disks == [str(folder / "disks" / NODE)]
    world.moved_to(folder, done.pid)


def test_a_disk_that_is_copied_in_part_is_found_by_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that writes little: on a busy machine another writes all of its disk anew during the move, and all of it goes over."""
    monkeypatch.setattr(qemu_disks, "SYNC", "none")
    with guest_with("raw", disk_writes=1) as world:
        folder = world.next()
        there = Receiving(world, folder)
        qemu_source.Source(world.guest.control, KEY, there.address, options()).move()
        pid = there.done().pid
        with pytest.raises(ValueError, match="damaged.*BAD"):
            world.moved_to(folder, pid)


@pytest.mark.slow
def test_a_write_that_is_left_behind_is_found_by_the_guest(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirrors end before the guest stands still, as if the two moments were one."""
    end = qemu_disks.Mirrors.end
    ended = []

    def early(self: qemu_disks.Mirrors, stall: float) -> None:
        same(self, stall)
        end(self)
        sweeps = world.guest.console.wait(r"^D (\d+) (\d+)$", LONG, len(world.guest.console.text))
        ended.append(world.guest.console.wait(rf"^D \d+ (?!{sweeps[2]}$)\d+$", LONG, len(world.guest.console.text)))  # it has written since

    same = qemu_disks.Mirrors.same
    monkeypatch.setattr(qemu_disks.Mirrors, "same", early)
    monkeypatch.setattr(qemu_disks.Mirrors, "end", lambda self: None)
    folder = world.next()
    there = Receiving(world, folder)
    qemu_source.Source(world.guest.control, KEY, there.address, options()).move()
    pid = there.done().pid
    assert ended
    with pytest.raises(ValueError, match="damaged.*BAD block"):
        world.moved_to(folder, pid)
    world.guest.end()
    world.boot()


SOURCE_QUICK = ["detaching"]
SOURCE_SLOW = ["asked", "disks", "memory", "live", "syncing", "passes", "stopping", "pages", "state", "loaded", "asking", "taken", "leaving"]


@pytest.mark.parametrize("step", [*SOURCE_QUICK, *(pytest.param(step, marks=pytest.mark.slow) for step in SOURCE_SLOW)])
def test_a_source_that_is_killed(world: World, step: str) -> None:
    folder = world.next()
    with receiving(world, folder) as (process, address):
        assert sending(world, address, step).returncode == -signal.SIGKILL
        if step not in ("asked", "taken", "leaving"):
            world.runs_here()
        else:
            assert world.guest.ask() in ("paused", "postmigrate")
        again = sending(world, address, "none")
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["earlier"] == (step in ("taken", "leaving"))
        world.moved_to(folder, taken(process))


TARGET_QUICK = ["closing"]
TARGET_SLOW = ["decided", "disks", "memory", "starting", "ready", "loading", "loaded", "deciding", "running"]


@pytest.mark.parametrize("step", [*TARGET_QUICK, *(pytest.param(step, marks=pytest.mark.slow) for step in TARGET_SLOW)])
def test_a_target_that_is_killed(world: World, step: str) -> None:
    folder = world.next()
    with receiving(world, folder, step=step) as (process, address):
        found: list[BaseException | qemu_source.Moved] = []

        def send() -> None:
            try:
                found.append(qemu_source.Source(world.guest.control, KEY, where(address), options()).move())
            except MigrationError as error:
                found.append(error)

        sender = threading.Thread(target=send)
        sender.start()
        assert process.wait(LONG) == -signal.SIGKILL
        if step not in ("deciding", "decided", "running"):
            sender.join(LONG)
            assert isinstance(found[0], MigrationError), found
            world.runs_here()
            assert left(world) == []
        with receiving(world, folder, address) as (second, _):
            sender.join(LONG)
            if step in ("decided", "running"):
                assert isinstance(found[0], qemu_source.Moved), found
            else:
                assert isinstance(found[0], MigrationError), found
                world.runs_here()
                again = sending(world, address, "none")
                assert again.returncode == 0, again.stderr
            world.moved_to(folder, taken(second))


@pytest.mark.parametrize("step", [pytest.param("memory", marks=pytest.mark.slow), "live", pytest.param("stopping", marks=pytest.mark.slow)])
def test_what_writes_the_disks_is_killed_and_the_guest_runs_on(world: World, step: str) -> None:
    folder = world.next()

    def kill(at: qemu_source.Step) -> None:
        if at == step:
            live_guest.kill(int((folder / "store-pid").read_text()))

    there = Receiving(world, folder)
    with pytest.raises(MigrationError, match=r"could not be copied|mirror|disks"):
        qemu_source.Source(world.guest.control, KEY, there.address, options(progress=kill)).move()
    runs_on(world, folder)


def test_a_wire_that_is_cut_while_the_disk_is_copied(world: World) -> None:
    folder = world.next()
    there = Receiving(world, folder)
    proxy = Proxy(there.address)
    try:
        proxy.plan(1 << 20, cut_all)
        with pytest.raises(MigrationError):
            qemu_source.Source(world.guest.control, KEY, proxy.address, options()).move()
        assert proxy.fired
    finally:
        proxy.close()
    world.runs_here()
    assert left(world) == []
    qemu_source.Source(world.guest.control, KEY, there.address, options()).move()  # the target waits for the next attempt
    world.moved_to(folder, there.done().pid)


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_target_that_has_no_room_any_more(world: World) -> None:
    """There was enough when it was asked; another has taken it since."""
    folder = world.next()
    with small_disk(world.folder / f"small-{folder.name}", DISK_MIB << 20) as small:

        def fill(step: qemu_source.Step) -> None:
            if step == qemu_source.Step.DISKS:
                with contextlib.suppress(OSError), (small / "another's").open("wb") as file:
                    file.write(bytes(DISK_MIB << 20))

        there = Receiving(world, folder, disks=small)
        with pytest.raises(SourceError, match="could not be copied.*room"):
            qemu_source.Source(world.guest.control, KEY, there.address, options(progress=fill)).move()
        runs_on(world, folder, small)


def other(world: World) -> str:
    return "qcow2" if world.disk == "raw" else "raw"


@pytest.mark.parametrize("wrong", ["format", "name", "full", "small"])
def test_a_disk_that_cannot_be_taken_is_refused_before_anything_is_sent(world: World, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world.next()
    command, disks = world.command(folder), folder / "disks"
    if wrong == "format":
        command = [word.replace(f"driver={world.disk},", f"driver={other(world)},") for word in command]
    if wrong == "name":
        command = [word.replace(f"{{disk:{NODE}}}", "{disk:boot}") for word in command]
    if wrong == "full":
        room = os.statvfs(folder)
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*room[:3], 1, 1, *room[5:])))  # one block is free; a disk that is full is not made for less than the rights to mount one
    if wrong == "small":
        disks.mkdir()
        with (disks / NODE).open("wb") as file:
            file.truncate((DISK_MIB - 1) << 20)
    seen: list[qemu_source.Step] = []
    there = Receiving(world, folder, command=command)
    with pytest.raises(Refused, match={"format": "same format", "name": "node-name", "full": "make room", "small": "too small|remove it"}[wrong]):
        qemu_source.Source(world.guest.control, KEY, there.address, options(progress=seen.append)).move()
    assert isinstance(there.failed(), DestinationError)
    assert qemu_source.Step.MEMORY not in seen
    assert (disks / NODE).exists() == (wrong == "small")
    (disks / NODE).unlink(missing_ok=True)
    runs_on(world, folder)


@pytest.mark.slow
def test_a_volume_of_the_right_size_is_taken_and_one_with_something_in_it_is_not(world: World) -> None:
    if world.disk != "raw":
        pytest.skip("a volume has no header")
    folder = world.next()
    (folder / "disks").mkdir()
    with (folder / "disks" / NODE).open("wb") as file:
        file.write(b"the only copy")
        file.truncate(DISK_MIB << 20)
    there = Receiving(world, folder)
    with pytest.raises(Refused, match="something in it"):
        qemu_source.Source(world.guest.control, KEY, there.address, options()).move()
    with (folder / "disks" / NODE).open("rb") as file:
        assert file.read(13) == b"the only copy"
    with (folder / "disks" / NODE).open("wb") as file:
        file.truncate(DISK_MIB << 20)
    there = Receiving(world, folder)
    qemu_source.Source(world.guest.control, KEY, there.address, options()).move()
    world.moved_to(folder, there.done().pid)


@pytest.mark.slow
def test_a_disk_that_both_ends_reach_stays_where_it_is(world: World) -> None:
    qmp = Qmp(world.guest.control)
    path = next(device["inserted"]["file"] for device in qmp("query-block") if device.get("inserted", {}).get("node-name") == NODE)
    qmp.close()
    folder = world.next()
    command = [word.replace(f"{{disk:{NODE}}}", f"{path},file.locking=off") for word in world.command(folder)]
    there = Receiving(world, folder, command=command)
    moved = qemu_source.Source(world.guest.control, KEY, there.address, options()).move()
    assert moved.disks == [] and moved.disk_bytes == 0
    world.moved_to(folder, there.done().pid)
    world.guest.end()
    world.boot()  # without file.locking=off, which its disk's next node would have otherwise


def test_a_stream_of_another_session_gets_no_disk(world: World) -> None:
    """One with the key too: it is the guest's own session that opens its disk."""
    folder = world.next()
    answers: list[bool] = []

    def intrude(step: qemu_source.Step) -> None:
        if step == qemu_source.Step.DISKS:  # the target waits for it now
            stranger = qemu_question.call(there.address, KEY, LONG)
            stranger.send(wire.Kind.DISK, wire.DISK_GUEST.pack(bytes(wire.SESSION), 0))
            with pytest.raises(OSError):
                stranger.receive()
            answers.append(True)
            stranger.close()

    there = Receiving(world, folder)
    qemu_source.Source(world.guest.control, KEY, there.address, options(progress=intrude)).move()
    assert answers == [True]
    world.moved_to(folder, there.done().pid)


def test_only_qemu_gets_to_the_target_by_the_socket_beside_its_own(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    stream = wire.Stream(here, None)  # type: ignore[arg-type]
    waiting = [stream]
    way = qemu_disks._Way(tmp_path / "way", os.getppid(), waiting, LONG)
    try:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(way.path))
            assert stranger.recv(1) == b"", "it is hung up on"
    finally:
        assert way.close() is None
        stream.close()
        there.close()
    assert waiting == [stream] and not way.path.exists()
