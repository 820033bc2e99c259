"""A real process writes into a shared-memory file while it is moved: what arrives is what it left when it was paused, and whatever fails, it runs again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_migration import precopy
from gpu_migration.convergence import FIRST_S, Limits, Reason
from gpu_migration.errors import DestinationError, MigrationError, NotConverged, PauseFailed, TransferLost, Undecided
from gpu_migration.layout import EXTENT, PAGE
from gpu_migration.precopy import Hook, Live
from gpu_migration.sender import Sender
from gpu_migration.sinks import FileSink
from gpu_migration.sources import FileSource

ROOT = Path(__file__).resolve().parents[2]
KEY = bytes(range(32))
EXTENTS = 16
SLOW, FAST = 10.0, 500.0
"""Pages a second, each in another extent: 10 and 500 MiB a second are then to be sent again."""
LINK = 10e6
"""Bytes a second of a link that the fast writer outruns."""
PATIENT = Limits(first=30.0, ceiling=30.0)
"""Whatever disturbs: switched over after the first pass."""

WRITER = """
import mmap, os, signal, sys, time
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), 0)
rate, n, began = float(sys.argv[2]), 0, time.monotonic()
extents = -(-len(memory) // (1 << 20))
print("ready", flush=True)
while not rate:
    signal.pause()
while True:
    n += 1
    at = (n % extents << 20) + n // extents * 4096 % (1 << 20)
    memory[at : at + 4096] = os.urandom(min(4096, len(memory) - at))
    time.sleep(max(0.0, began + n / rate - time.monotonic()))
"""


class Writer:
    """A process that writes into a file of /dev/shm."""

    def __init__(self, path: Path, rate: float) -> None:
        self.path = path
        path.write_bytes(os.urandom(EXTENTS * EXTENT - PAGE // 2))
        self.process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(rate)], stdout=subprocess.PIPE)
        assert self.process.stdout is not None and self.process.stdout.readline()

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)
        self.wait_paused()

    def wait_paused(self) -> None:
        assert os.WIFSTOPPED(os.waitpid(self.process.pid, os.WUNTRACED)[1])

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    @property
    def hook(self) -> Hook:
        return Hook(self.pause, self.resume)

    @property
    def paused(self) -> bool:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def assert_writing(self) -> None:
        """It is not only not paused: the file goes on changing."""
        assert not self.paused, "the writer is paused"
        before, end = self.path.read_bytes(), time.monotonic() + 30
        while self.path.read_bytes() == before:
            assert time.monotonic() < end, "the writer does not write"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def writing(rate: float) -> Iterator[Writer]:
    path = Path("/dev/shm") / f"precopy-test-{os.getpid()}"
    writer = Writer(path, rate)
    try:
        yield writer
    finally:
        writer.end()
        path.unlink()


@contextlib.contextmanager
def receiving(target: Path) -> Iterator[tuple["subprocess.Popen[str]", tuple[str, int]]]:
    """A receiver as a process, that may be killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gpu_migration", "receive", str(target)], cwd=ROOT, env={**os.environ, "NOVACRON_MIGRATION_KEY": KEY.hex()},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )
    try:
        assert process.stderr is not None
        host, _, port = process.stderr.readline().split()[-1].rpartition(":")
        yield process, (host, int(port))
    finally:
        process.kill()
        process.communicate()


def move(writer: Writer, address: tuple[str, int], hook: Hook | None, limits: Limits, *, link: float = 0.0, pause_most: float = 60.0) -> Live:
    source = FileSource(writer.path)
    try:
        return precopy.move(Sender(source, KEY, address, transfer="t", limit=link, patience=60), hook, limits, pause_most)
    finally:
        source.close()


@pytest.mark.parametrize("rate", [0.0, SLOW], ids=["idle", "slow"])
def test_a_writer_that_the_link_outruns_is_switched_over(tmp_path: Path, rate: float) -> None:
    with writing(rate) as writer, receiving(tmp_path / "out") as (receiver, address):
        live = move(writer, address, writer.hook, Limits(ceiling=30.0))
        assert receiver.wait(30) == 0
        assert writer.paused, "the destination has it: who is paused stays so"
        assert (tmp_path / "out").read_bytes() == writer.path.read_bytes()
        assert 0 < live.pausing + live.last_pass + live.committing <= live.downtime + 1e-6 and live.implied <= live.allowed


def test_one_faster_than_the_link_is_given_up_and_runs_on(tmp_path: Path) -> None:
    with writing(FAST) as writer, receiving(tmp_path / "out") as (_, address):
        with pytest.raises(NotConverged, match=r"faster than it can be moved .*--downtime") as caught:
            move(writer, address, writer.hook, Limits(ceiling=0.3, stall=2.0), link=LINK)
        assert caught.value.reason is Reason.STALLED
        writer.assert_writing()
        assert not (tmp_path / "out").exists()


def test_one_faster_than_the_link_is_switched_over_where_the_ramp_allows_it(tmp_path: Path) -> None:
    with writing(FAST) as writer, receiving(tmp_path / "out") as (receiver, address):
        live = move(writer, address, writer.hook, Limits(ceiling=30.0, cool_down=0.0), link=LINK)
        assert receiver.wait(30) == 0
        assert FIRST_S < live.implied <= live.allowed
        assert (tmp_path / "out").read_bytes() == writer.path.read_bytes()


def test_without_a_hook_one_that_writes_is_never_committed(tmp_path: Path) -> None:
    with writing(FAST) as writer, receiving(tmp_path / "out") as (_, address):
        with pytest.raises(NotConverged, match="--pause-command"):
            move(writer, address, None, Limits(stall=0.5))
        assert not (tmp_path / "out").exists()
    with writing(0.0) as writer, receiving(tmp_path / "out2") as (receiver, address):
        assert move(writer, address, None, Limits()).downtime == 0 and receiver.wait(30) == 0
        assert (tmp_path / "out2").read_bytes() == writer.path.read_bytes()


def test_a_receiver_killed_in_the_last_pass_and_the_writer_runs_again(tmp_path: Path) -> None:
    with writing(FAST) as writer, receiving(tmp_path / "out") as (receiver, address):
        was_paused = []

        def pause() -> None:
            writer.pause()
            was_paused.append(writer.paused)
            receiver.kill()
            receiver.wait()

        with pytest.raises(TransferLost, match="not done in time"):
            move(writer, address, Hook(pause, writer.resume), PATIENT, pause_most=1.0)
        assert was_paused == [True]
        writer.assert_writing()
        assert not (tmp_path / "out").exists()
        # And once more, from what has arrived.
        with receiving(tmp_path / "out") as (again, address):
            live = move(writer, address, writer.hook, PATIENT)
            assert again.wait(30) == 0 and live.downtime > 0
            assert (tmp_path / "out").read_bytes() == writer.path.read_bytes()


def test_a_commit_whose_outcome_is_not_known_leaves_the_writer_paused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends would run otherwise. The next run learns that it was committed."""
    from .test_migration_transfer import Far

    commit = FileSink.commit

    def committed_and_failed(self: FileSink, root: bytes) -> None:
        commit(self, root)
        raise DestinationError("destination: the folder cannot be synced")

    with writing(FAST) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(FileSink, "commit", committed_and_failed)
            far = Far(tmp_path / "out")
            with pytest.raises(Undecided, match="stays paused"):
                move(writer, far.receiver.address, writer.hook, PATIENT)
            far.end()
        assert writer.paused
        far = Far(tmp_path / "out")
        assert move(writer, far.receiver.address, writer.hook, PATIENT).downtime == 0
        assert far.end().result is not None
        assert (tmp_path / "out").read_bytes() == writer.path.read_bytes()


def test_a_pause_that_fails_is_undone(tmp_path: Path) -> None:
    with writing(SLOW) as writer, receiving(tmp_path / "out") as (_, address):
        hook = precopy.commands(f"sh -c 'kill -STOP {writer.process.pid}; echo no such monitor >&2; exit 3'", f"kill -CONT {writer.process.pid}")
        with pytest.raises(PauseFailed, match="--pause-command sh: exit status 3: no such monitor"):
            move(writer, address, hook, PATIENT)
        writer.assert_writing()
        with pytest.raises(PauseFailed, match=r"--resume-command false: exit status 1; the writer may still be paused.*before that: --pause-command false"):
            move(writer, address, precopy.commands("false", "false"), PATIENT)


@pytest.mark.parametrize(("pause", "says"), [("'", "quote it"), (" ", "is empty"), ("/none/such", "No such file")])
def test_bad_commands(pause: str, says: str) -> None:
    with pytest.raises(PauseFailed, match=says):
        precopy.commands(pause, "true").pause()


def send(writer: Writer, address: tuple[str, int], *more: str) -> "subprocess.Popen[str]":
    pid = writer.process.pid
    return subprocess.Popen(
        [sys.executable, "-m", "gpu_migration", "send", str(writer.path), f"{address[0]}:{address[1]}", "--changing", "--pause-command", f"kill -STOP {pid}",
         "--resume-command", f"kill -CONT {pid}", "--downtime", "30", *more],
        cwd=ROOT, env={**os.environ, "NOVACRON_MIGRATION_KEY": KEY.hex()}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


def test_by_commands(tmp_path: Path) -> None:
    with writing(SLOW) as writer, receiving(tmp_path / "out") as (receiver, address):
        out, err = send(writer, address).communicate(timeout=60)
        assert receiver.wait(30) == 0, err
        assert json.loads(out)["downtime_s"] > 0
        assert writer.paused and (tmp_path / "out").read_bytes() == writer.path.read_bytes()


def test_a_sender_that_is_ended_in_the_last_pass_lets_the_writer_run_again(tmp_path: Path) -> None:
    with writing(FAST) as writer, receiving(tmp_path / "out") as (_, address):
        sender = send(writer, address, "--limit-mbit", "60")
        try:
            writer.wait_paused()
            sender.terminate()
            sender.communicate(timeout=60)
        finally:
            sender.kill()
            sender.wait()
        assert sender.returncode == 128 + signal.SIGTERM
        writer.assert_writing()
        assert not (tmp_path / "out").exists()


def test_half_a_hook_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_migration import cli

    assert cli.main(["send", "x", "127.0.0.1:1", "--changing", "--pause-command", "true"]) == 1
    assert "give both" in capsys.readouterr().err


def test_negative_control_without_a_last_pass_the_destination_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparisons of contents would see of a switch-over that forgot what was written since the last look."""
    pass_over = Sender.pass_over
    monkeypatch.setattr(Sender, "pass_over", lambda self, which=None, deadline=float("inf"): None if deadline < float("inf") else pass_over(self, which))
    with writing(FAST) as writer, receiving(tmp_path / "out") as (receiver, address):
        move(writer, address, writer.hook, PATIENT)
        assert receiver.wait(30) == 0
        assert (tmp_path / "out").read_bytes() != writer.path.read_bytes()


def test_negative_control_without_a_resume_the_writer_is_found_paused(tmp_path: Path) -> None:
    with writing(FAST) as writer, receiving(tmp_path / "out") as (receiver, address):

        def pause() -> None:
            writer.pause()
            receiver.kill()

        with pytest.raises(MigrationError):
            move(writer, address, Hook(pause, lambda: None), PATIENT, pause_most=0.5)
        with pytest.raises(AssertionError, match="the writer is paused"):
            writer.assert_writing()
