"""A real guest moves while it runs, from one QEMU to another. A program in it has filled most of its memory, goes on rewriting pages, and checks every one of them after each move.

Whatever is killed or cut, and whenever, just one end runs the guest, or, where the target was asked and cannot be reached, none until it can.
"""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gpu_migration import qemu_question, qemu_source, qemu_target, wire
from gpu_migration.dirty import Numbers
from gpu_migration.errors import DestinationError, KeyRefused, MigrationError, NotConverged, Refused, SourceError, TransferLost, Undecided
from gpu_migration.layout import PAGE
from gpu_migration.qemu_qmp import QemuError, Qmp
from tests.integration.waiting import until_sync
from tools.bench import live_guest, migration_live
from tools.bench.live_guest import Machine
from tools.bench.migration_guest import Missing
from tools.bench.migration_proxy import Proxy, cut, cut_all, flip

from .live_world import ENVIRONMENT, KEY, LONG, STEP_OF_WORDS, Receiving, World, gone, make, options, receiving, sending, taken, where


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    found = live_guest.qemus()
    if not found:
        pytest.skip("no qemu-system-x86_64: apt install qemu-system-x86, or tools/setup/qemu.sh")
    made = make(found[max(found, key=int)])
    try:
        yield made
    finally:
        made.end()
        subprocess.run(["rm", "-rf", str(made.folder)], check=True)


def test_there_by_commands_and_back_by_the_other_tracker(world: World) -> None:
    folder = world.next()
    receive = subprocess.Popen(
        [sys.executable, "-m", "gpu_migration", "vm-receive", str(folder), "--patience", str(LONG), "--", *world.command(folder)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert receive.stderr is not None
        address = receive.stderr.readline().split()[-1]
        sent = subprocess.run(
            [sys.executable, "-m", "gpu_migration", "vm-send", str(world.guest.control), address, "--verify", "--downtime", "30"], env=ENVIRONMENT, capture_output=True, text=True, timeout=LONG
        )
        assert sent.returncode == 0, sent.stderr
        pid = taken(receive)
    finally:
        receive.kill()
        receive.communicate()
    result = json.loads(sent.stdout)
    assert result["length"] == world.machine.memory << 20 and result["passes"] >= 1 and result["pages"] > 0 and 0 < result["downtime_s"] < result["total_s"]
    world.moved_to(folder, pid)
    assert not told(world), "its own migration would leave out the memory"
    folder = world.next()
    there = Receiving(world, folder)
    moved = qemu_source.Source(world.guest.control, KEY, there.address, options(track="hash")).move()
    assert moved.tracker == "page hashes"
    world.moved_to(folder, there.done().pid)
    assert not told(world)


def test_a_page_that_is_lost_is_found_by_the_guest_and_before_by_verify(world: World) -> None:
    def lose(pages: Numbers) -> Numbers:
        """All that the guest's program has rewritten."""
        words = np.memmap(memory, np.uint64, "r").reshape(-1, PAGE // 8)
        return pages[words[pages, 1] - words[pages, 0] != np.uint64(STEP_OF_WORDS)]

    memory = qemu_memory(world)
    there = Receiving(world, world.next())
    with pytest.raises(Refused, match="not what it is at the source"):
        qemu_source.Source(world.guest.control, KEY, there.address, options(lose=lose, verify=True)).move()
    assert "not what it is at the source" in str(there.failed())
    world.runs_here()
    folder = world.next()
    there = Receiving(world, folder)
    qemu_source.Source(world.guest.control, KEY, there.address, options(lose=lose)).move()
    pid = there.done().pid
    with pytest.raises(ValueError, match="damaged.*BAD"):
        world.moved_to(folder, pid)
    world.guest.end()
    world.boot()


def qemu_memory(world: World) -> Path:
    return world.guest.control.with_name("memory")


def told(world: World) -> list[str]:
    """What the guest's QEMU is told of a move that is not of its own, once the guard has had its say."""
    found: list[str] = []

    def none() -> bool:
        qmp = Qmp(world.guest.control)
        try:
            found[:] = [one["capability"] for one in qmp("query-migrate-capabilities") if one["state"] and one["capability"] in ("x-ignore-shared", "pause-before-switchover")]
        finally:
            qmp.close()
        return not found

    until_sync(none, what="QEMU is told of nothing any more")
    return found


SOURCE_QUICK = ["pages", "taken"]
SOURCE_SLOW = ["asked", "memory", "live", "passes", "stopping", "state", "loaded", "asking", "leaving"]


@pytest.mark.parametrize("step", [*SOURCE_QUICK, *(pytest.param(step, marks=pytest.mark.slow) for step in SOURCE_SLOW)])
def test_a_source_that_is_killed(world: World, step: str) -> None:
    folder = world.next()
    with receiving(world, folder) as (process, address):
        assert sending(world, address, step).returncode == -signal.SIGKILL
        if step not in ("asked", "taken", "leaving"):
            world.runs_here()  # it never stood still, or the guard has resumed it
            assert not told(world), "its own migration would leave out the memory"
        else:
            assert world.guest.ask() in ("paused", "postmigrate"), "nobody but the target knows whose it is"
        again = sending(world, address, "none")
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["earlier"] == (step in ("taken", "leaving"))
        world.moved_to(folder, taken(process))


TARGET_QUICK = ["decided"]
TARGET_SLOW = ["loaded", "deciding", "memory", "starting", "ready", "loading", "running"]


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
        if step in ("deciding", "decided", "running"):
            with receiving(world, folder, address) as (second, _):  # the same folder and address, as one would start it again
                sender.join(LONG)
                if step == "deciding":
                    assert isinstance(found[0], Refused), found
                    world.runs_here()
                    again = sending(world, address, "none")
                    assert again.returncode == 0, again.stderr
                else:
                    assert isinstance(found[0], qemu_source.Moved), found
                world.moved_to(folder, taken(second))
        else:
            sender.join(LONG)
            assert isinstance(found[0], TransferLost), found
            world.runs_here()
            with receiving(world, folder, address) as (second, _):
                again = sending(world, address, "none")
                assert again.returncode == 0, again.stderr
                world.moved_to(folder, taken(second))


def test_undecided_it_stands_still_until_the_target_is_there_again(world: World) -> None:
    folder = world.next()
    with receiving(world, folder, step="decided") as (process, address):
        assert sending(world, address, "asked").returncode == -signal.SIGKILL  # it had written that it asks, and had not yet
        process.kill()
        process.wait()
    with pytest.raises(Undecided, match="start the target again"):
        qemu_source.Source(world.guest.control, KEY, where(address), options_with_little_patience()).move()
    assert world.guest.ask() in ("paused", "postmigrate")
    with receiving(world, folder, address) as (second, _):
        again = sending(world, address, "none")
        assert again.returncode == 0, again.stderr
        world.moved_to(folder, taken(second))


def options_with_little_patience() -> qemu_source.Options:
    return qemu_source.Options(patience=0.5)


def test_a_wire_that_is_cut_and_damaged(world: World) -> None:
    """Streams of the memory are made again; without that of the guest it runs on, and the next attempt takes up what has arrived."""
    folder = world.next()
    there = Receiving(world, folder)
    proxy = Proxy(there.address)
    try:
        for place, fault in ((300, cut_all), (4_000_000, cut), (9_000_000, cut_all), (30_000_000, flip)):
            proxy.plan(place, fault)
        source = qemu_source.Source(world.guest.control, KEY, proxy.address, options())
        for _ in range(6):
            try:
                source.move()
                break
            except (TransferLost, Refused):
                assert there.error is None, there.error
                world.runs_here()
        else:
            pytest.fail("it never got through")
        assert proxy.fired >= 3
        world.moved_to(folder, there.done().pid)
    finally:
        proxy.close()


def test_what_is_no_source_does_no_harm(world: World) -> None:
    """Bytes of anybody, a stream with another key, and one with the key that says what it should not: the target says so or hangs up, and takes the guest from the next that comes."""
    folder = world.next()
    there = Receiving(world, folder)
    for junk in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096)):
        with socket.create_connection(there.address, LONG) as stranger:
            stranger.sendall(junk)
    with pytest.raises(KeyRefused):
        wire.call(there.address, bytes(32), qemu_question.TRANSFER)
    asking = qemu_question.call(there.address, KEY, LONG)
    asking.send(wire.Kind.ASK, bytes(16))
    assert asking.receive()[0] == wire.Kind.VERDICT
    asking.close()
    qemu_source.Source(world.guest.control, KEY, there.address, options()).move()
    world.moved_to(folder, there.done().pid)
    with pytest.raises(DestinationError, match="cannot be read"):
        (folder / "decision").write_text("{")
        qemu_target.Target(folder, KEY, ("127.0.0.1", 0), world.command(folder)).serve()
    world.runs_here()


@pytest.fixture
def seven() -> Iterator[World]:
    program = live_guest.qemus().get("7")
    if program is None:
        pytest.skip("there is no QEMU 7")
    made = make(program)
    try:
        yield made
    finally:
        made.end()
        subprocess.run(["rm", "-rf", str(made.folder)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_qemu_7_too(seven: World) -> None:
    for _ in range(6):
        folder = seven.next()
        there = Receiving(seven, folder)
        qemu_source.Source(seven.guest.control, KEY, there.address, options()).move()
        seven.moved_to(folder, there.done().pid)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_qemu_7_alone_damages_guests_under_emulation(tmp_path: Path) -> None:
    """Why it is no peer, and why its own log of written pages is not used. Not each time: a run in which all went well says so."""
    program = live_guest.qemus().get("7")
    if program is None:
        pytest.skip("there is no QEMU 7")
    try:
        machine = Machine(program, live_guest.kernel(), live_guest.initial(tmp_path), memory=2048, checked=1400, rewrites=10_000, checks=200_000, accelerator="tcg,thread=single")
    except Missing as error:
        pytest.skip(str(error))
    moves, wrong = migration_live.series("qemu", machine, tmp_path / "own", 8)
    if not wrong:
        pytest.skip(f"{len(moves)} moves went well this time")
    assert "damaged" in wrong[0] or "panic" in wrong[0] or "did not say" in wrong[0], wrong


def test_a_journal_of_another_guest_ends_none(world: World) -> None:
    """The target says that it has the guest of that session; the one that runs here is left alone."""
    folder = world.next()
    there = Receiving(world, folder)
    qemu_source.Source(world.guest.control, KEY, there.address, options()).move()
    world.moved_to(folder, there.done().pid)
    again = Receiving(world, folder)
    session = bytes.fromhex(json.loads((folder / "decision").read_text())["session"])
    assert qemu_question.ask(again.address, KEY, bytes(16), LONG) is None  # it answers, and so has let go of QEMU's control socket, which here is the source's too
    journal = qemu_question.Journal(world.guest.control)
    journal.write(session, again.address)
    with pytest.raises(SourceError, match="remove"):
        qemu_source.Source(world.guest.control, KEY, again.address, options()).move()
    again.done()
    journal.remove()
    world.runs_here()


def test_one_that_writes_faster_than_it_may_be_stopped_for_runs_on(world: World) -> None:
    every: Numbers = np.arange(world.machine.memory << 8, dtype=np.int64)
    there = Receiving(world, world.next())
    with pytest.raises(NotConverged, match="--downtime"):
        qemu_source.Source(world.guest.control, KEY, there.address, qemu_source.Options(patience=LONG, first=0.001, ceiling=0.001, stall=0.2, lose=lambda pages: every)).move()
    world.runs_here()
    there.target.close()


@pytest.mark.parametrize("wrong", ["machine", "program", "key", "still", "line"])
def test_what_cannot_be_is_said_and_the_guest_runs_on(world: World, wrong: str) -> None:
    folder = world.next()
    command = world.command(folder)
    if wrong == "line":
        with pytest.raises(MigrationError, match="memory"):
            qemu_target.Target(folder, KEY, ("127.0.0.1", 0), ["qemu-system-x86_64"])
        return
    if wrong == "machine":
        command[command.index("q35,memory-backend=ram")] = "pc,memory-backend=ram"
    if wrong == "program":
        command[0] = "/nonexistent/qemu"
    target = qemu_target.Target(folder, KEY, ("127.0.0.1", 0), command, patience=LONG)
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            target.serve()
        except (MigrationError, OSError) as error:
            failed.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    source = qemu_source.Source(world.guest.control, bytes(32) if wrong == "key" else KEY, target.address, options())
    if wrong == "still":
        qmp = Qmp(world.guest.control)
        qmp("stop")
        qmp.close()
        with pytest.raises(SourceError, match="resume it first"):
            source.move()
        qmp = Qmp(world.guest.control)
        qmp("cont")
        qmp.close()
    else:
        with pytest.raises(MigrationError, match={"machine": "same machine", "program": "nonexistent", "key": "another key"}[wrong]):
            source.move()
    if wrong in ("machine", "program"):
        thread.join(LONG)
        assert isinstance(failed[0], QemuError)
        assert gone(folder)
    world.runs_here()
