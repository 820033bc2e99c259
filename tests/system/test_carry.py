"""`carry-out` and `carry-in` as processes: connections of local processes go from a folder of sockets at one end to the sockets of another, whole or not at all."""

import contextlib
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_migration import cli
from gpu_migration.carry import CHANNELS, CHANNELS_MOST, channels_of
from tests.integration.waiting import until_sync

ROOT = Path(__file__).resolve().parents[2]
KEY = "5ec4e7" * 11
MUCH = 64 << 20
SECONDS = 60.0


def reach(folder: Path, name: str, *, listen: bool = False) -> socket.socket:
    """A socket in that folder, whose path may be long: connected with it, or listening there."""
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(SECONDS)
    inside = os.open(folder, os.O_RDONLY)
    try:
        if listen:
            made.bind(f"/proc/self/fd/{inside}/{name}")
            made.listen()
        else:
            made.connect(f"/proc/self/fd/{inside}/{name}")
    except OSError:
        made.close()
        raise
    finally:
        os.close(inside)
    return made


class Carry:
    """Both ends, the folders of sockets, and who listens in the second."""

    def __init__(self, folder: Path) -> None:
        self.out, self.into = folder / "out", folder / "in"
        self.into.mkdir(parents=True)
        self.listeners = {name: reach(self.into, name, listen=True) for name in CHANNELS}
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *words: str, key: str = KEY, channels: str = "", patience: float = SECONDS) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "gpu_migration", *words, "--channels", channels or ",".join(CHANNELS), "--patience", str(patience), "--events"]
        made = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), "NOVACRON_MIGRATION_KEY": key}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.processes.append(made)
        return made

    def receiving(self, **more: str) -> tuple["subprocess.Popen[str]", str]:
        """A carry-in, and where it listens."""
        made = self.start("carry-in", str(self.into), **more)  # type: ignore[arg-type]
        assert made.stderr is not None
        return made, f"127.0.0.1:{json.loads(made.stderr.readline())['listening']}"

    def sending(self, address: str, **more: object) -> "subprocess.Popen[str]":
        """A carry-out, whose folder is there."""
        made = self.start("carry-out", str(self.out), address, **more)  # type: ignore[arg-type]
        until_sync(lambda: self.out.exists() or made.poll() is not None, what="the folder of sockets")
        return made

    def pair(self, name: str = "word") -> tuple[socket.socket, socket.socket]:
        """A connection that goes over."""
        near = reach(self.out, name)
        far, _ = self.listeners[name].accept()
        far.settimeout(SECONDS)
        return near, far

    def close(self) -> None:
        for one in self.processes:
            one.kill()
            one.communicate()
        for listener in self.listeners.values():
            listener.close()


@pytest.fixture
def carry(tmp_path: Path) -> Iterator[Carry]:
    made = Carry(tmp_path)
    yield made
    made.close()


def ended(process: "subprocess.Popen[str]") -> tuple[int, dict[str, object], dict[str, str]]:
    """Its status, what it printed, and the error among its events."""
    out, events = process.communicate(timeout=SECONDS)
    errors = [event for event in map(json.loads, events.splitlines()) if "error" in event]
    return process.returncode, json.loads(out) if out else {}, errors[0] if errors else {}


def read(sock: socket.socket) -> bytes:
    out = bytearray()
    while part := sock.recv(1 << 16):
        out += part
    return bytes(out)


def test_three_channels_at_once_carry_both_ways(carry: Carry) -> None:
    into, address = carry.receiving()
    out = carry.sending(address)
    assert stat.S_IMODE(carry.out.stat().st_mode) == 0o700 and sorted(one.name for one in carry.out.iterdir()) == sorted(CHANNELS)
    assert all(stat.S_IMODE(one.stat().st_mode) == 0o600 for one in carry.out.iterdir()) and not (carry.out.parent / ".out.new").exists()
    pairs = [carry.pair(name) for name in CHANNELS]
    data = {sock: random.Random(number).randbytes(5_000_000 + number) for number, sock in enumerate(sock for pair in pairs for sock in pair)}
    got: dict[socket.socket, bytes] = {}

    def write(sock: socket.socket) -> None:
        sock.sendall(data[sock])
        sock.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=write, args=(sock,)) for sock in data] + [threading.Thread(target=lambda sock=sock: got.update({sock: read(sock)})) for sock in data]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    for near, far in pairs:
        assert got[far] == data[near] and got[near] == data[far]
        near.close()
        far.close()
    there = sum(len(data[near]) for near, _ in pairs)
    back = sum(len(data[far]) for _, far in pairs)
    assert ended(out) == (0, {"root": "", "bytes_out": there, "bytes_in": back, "streams": 3}, {})
    assert ended(into) == (0, {"root": "", "bytes_out": back, "bytes_in": there, "streams": 3}, {})
    assert not carry.out.exists()


def test_nothing_is_lost_where_the_writer_closes_and_the_reader_is_slow(carry: Carry) -> None:
    into, address = carry.receiving()
    out = carry.sending(address)
    near, far = carry.pair("memory")
    data = random.Random(3).randbytes(1 << 20)

    def write() -> None:
        for _ in range(MUCH >> 20):
            near.sendall(data)
        near.close()

    writing = threading.Thread(target=write)
    writing.start()
    got = bytearray()
    while writing.is_alive():
        got += far.recv(8192)
    got += read(far)
    assert bytes(got) == data * (MUCH >> 20)
    far.close()
    assert ended(out)[:2] == (0, {"root": "", "bytes_out": MUCH, "bytes_in": 0, "streams": 1}) and ended(into)[0] == 0


def test_streams_of_one_channel_one_after_the_other_and_side_by_side(carry: Carry) -> None:
    into, address = carry.receiving()
    out = carry.sending(address)
    held = carry.pair()
    for number in range(5):
        near, far = carry.pair("disk")
        near.sendall(bytes([number]))
        near.close()
        assert read(far) == bytes([number])
        far.close()
    assert out.poll() is None and into.poll() is None, "one is there still"
    for one in held:
        one.close()
    assert ended(out)[1]["streams"] == 6 and ended(into)[1]["streams"] == 6


def test_a_channel_that_the_other_end_does_not_have_and_a_socket_that_is_not_there(carry: Carry) -> None:
    """Neither counts: the connection ends, another may be made."""
    into, address = carry.receiving(channels="disk,word")
    out = carry.sending(address)
    near = reach(carry.out, "memory")
    assert near.recv(1) == b""
    near.close()
    (carry.into / "disk").unlink()
    near = reach(carry.out, "disk")
    near.settimeout(SECONDS)
    assert near.recv(1) == b""
    near.close()
    carry.listeners["disk"].close()
    (carry.into / "disk").unlink(missing_ok=True)
    carry.listeners["disk"] = reach(carry.into, "disk", listen=True)
    for one in carry.pair("disk"):
        one.close()
    assert ended(out)[1]["streams"] == 1 and ended(into)[1]["streams"] == 1


def test_nobody_listening_is_said_where_it_comes_to_nothing(carry: Carry) -> None:
    _, address = carry.receiving()
    for name in CHANNELS:
        (carry.into / name).unlink()
    out = carry.sending(address, patience=3)
    near = reach(carry.out, "word")
    assert near.recv(1) == b""
    near.close()
    status, _, error = ended(out)
    assert status == 1 and error["kind"] == "TransferLost" and "nobody listens on socket word" in error["error"] and not carry.out.exists()


def test_another_key_is_refused_and_said(carry: Carry) -> None:
    into, address = carry.receiving()
    out = carry.sending(address, key="ab" * 32)
    near = reach(carry.out, "word")
    assert near.recv(1) == b""
    near.close()
    status, _, error = ended(out)
    assert status == 1 and error["kind"] == "KeyRefused" and not carry.out.exists() and into.poll() is None


@pytest.mark.parametrize("which", ["out", "in"])
def test_an_end_that_is_killed_ends_the_connections_at_the_other(carry: Carry, which: str) -> None:
    into, address = carry.receiving()
    out = carry.sending(address)
    pairs = [carry.pair(name) for name in CHANNELS]
    for near, far in pairs:
        near.sendall(b"there")
        assert far.recv(5) == b"there"
    killed, left = (out, into) if which == "out" else (into, out)
    killed.kill()
    for one in (sock for pair in pairs for sock in pair):
        assert one.recv(1) == b""
        one.close()
    status, _, error = ended(left)
    assert status == 1 and error["kind"] == "TransferLost" and "3 of 3 streams" in error["error"]
    assert carry.out.exists() == (which == "out"), "a killed one leaves its folder, for the next to replace"


def test_what_a_killed_one_left_is_replaced_and_nothing_else(carry: Carry) -> None:
    _, address = carry.receiving()
    carry.sending(address).kill()
    carry.processes[-1].wait(SECONDS)
    assert sorted(one.name for one in carry.out.iterdir()) == sorted(CHANNELS)
    again = carry.start("carry-out", str(carry.out), address)

    def connects() -> socket.socket | None:
        with contextlib.suppress(OSError):
            return reach(carry.out, "word")
        return None

    until_sync(connects, what="a folder whose sockets listen").close()
    assert ended(again)[0] == 0
    carry.out.mkdir()
    (carry.out / "mine").write_text("mine")
    status, _, error = ended(carry.start("carry-out", str(carry.out), address))
    assert status == 1 and "something else than sockets" in error["error"] and (carry.out / "mine").read_text() == "mine" and not (carry.out.parent / ".out.new").exists()
    (carry.out / "mine").unlink()
    carry.out.rmdir()
    carry.out.symlink_to(carry.into)
    assert ended(carry.start("carry-out", str(carry.out), address))[0] == 1 and len(list(carry.into.iterdir())) == len(CHANNELS)
    carry.out.unlink()


def test_paths_may_be_long(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30) / ("longer" * 20)
    carry = Carry(folder)
    try:
        into, address = carry.receiving()
        out = carry.sending(address)
        assert len(str(carry.out / "memory")) > 2 * 108
        near, far = carry.pair("memory")
        near.sendall(b"x")
        near.close()
        assert read(far) == b"x"
        far.close()
        assert ended(out)[0] == 0 and ended(into)[0] == 0 and not carry.out.exists()
    finally:
        carry.close()


@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_ends_it_at_once_and_leaves_no_folder(carry: Carry, busy: bool) -> None:
    into, address = carry.receiving()
    out = carry.sending(address)
    pairs = [carry.pair()] if busy else []
    for one in (out, into):
        one.send_signal(signal.SIGTERM)
    assert ended(out) == (128 + signal.SIGTERM, {}, {}) and ended(into)[0] in (1, 128 + signal.SIGTERM)  # 1: it saw the other's end first
    assert sorted(one.name for one in carry.out.parent.iterdir()) == ["in"]
    for one in (sock for pair in pairs for sock in pair):
        assert one.recv(1) == b""
        one.close()


def test_without_any_connection_both_give_up(carry: Carry) -> None:
    into = carry.start("carry-in", str(carry.into), patience=1)
    out = carry.start("carry-out", str(carry.out), "127.0.0.1:1", patience=1)
    for one in (into, out):
        status, _, error = ended(one)
        assert status == 1 and error["kind"] == "TransferLost" and "no connection for 1 s" in error["error"]
    assert not carry.out.exists()


def test_there_are_no_more_than_may_be_at_once(carry: Carry) -> None:
    _, address = carry.receiving()
    carry.sending(address)
    pairs = [carry.pair() for _ in range(16)]
    with contextlib.suppress(ConnectionError):
        more = reach(carry.out, "disk")
        assert more.recv(1) == b""
        more.close()
    for near, far in pairs:
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        near.close()
        far.close()


@pytest.mark.parametrize("text", ["", "a,", "a,a", "A", "a/b", "..", "x" * 33, ",".join(f"n{number}" for number in range(CHANNELS_MOST + 1)), "a b", "ä"])
def test_what_is_no_list_of_channels(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="give 1 to 8 names"):
        channels_of(text)
    with pytest.raises(SystemExit):
        cli.main(["carry-in", "x", "--channels", text])
    assert "give 1 to 8 names" in capsys.readouterr().err


def test_a_list_of_channels() -> None:
    assert channels_of(",".join(CHANNELS)) == CHANNELS and channels_of("x" * 32 + ",-") == ("x" * 32, "-")
