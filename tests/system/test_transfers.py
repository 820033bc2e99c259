"""A hub and two migration workers as processes: files are moved, a worker is killed in the midst of it, a transfer is cancelled, and what is not theirs is refused."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_migration.layout import EXTENT
from hub.transfers import book
from hub.transfers.service import worker_token
from tests.integration.hub_side import Served, error_of, served_hub
from tests.integration.waiting import until_sync
from tests.system.test_carry import reach
from tools.novactl.cli import main as novactl

pytest.importorskip("blake3", reason="no blake3 (pip install '.[migration]')")

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]


class Worker:
    """A worker process with a folder of its own."""

    def __init__(self, served: Served, folder: Path, name: str) -> None:
        self.folder, self.name = folder / name, name
        self.folder.mkdir()
        token = folder / f"{name}.token"
        token.touch(mode=0o600)
        token.write_text(served.json(f"/api/v1/migration-workers/{name}/token")["token"])
        self.command = [
            sys.executable, "-m", "gpu_migration", "worker", "--hub", f"http://127.0.0.1:{served.hub.port}", "--name", name, "--token-file", str(token), "--folder", str(self.folder),
        ]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(60)
            self.process = None


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_hub(tmp_path_factory.mktemp("transfers") / "hub") as (background, hub):
        yield Served(background, hub)


@pytest.fixture(scope="module")
def ends(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Worker, Worker]]:
    folder = tmp_path_factory.mktemp("workers")
    both = Worker(served, folder, "wa"), Worker(served, folder, "wb")
    try:
        yield both
    finally:
        for one in both:
            one.end()


def submit(served: Served, name: str, path: str, **more: Any) -> Json:
    asked = {"id": name, "source": {"worker": "wa", "path": path}, "destination": {"worker": "wb", "path": f"in/{path}"}, **more}
    said: Json = served.json("/api/v1/transfers", "POST", asked)
    return said


def over(served: Served, name: str, seconds: float = 120.0) -> Json:
    def ended() -> Json | None:
        said: Json = served.json(f"/api/v1/transfers/{name}")
        return said if said["state"] in book.FINAL else None

    found: Json = until_sync(ended, seconds, f"the end of {name}")
    return found


def test_a_file_is_moved_from_worker_to_worker(served: Served, ends: tuple[Worker, Worker]) -> None:
    here, there = ends
    data = random.Random(1).randbytes(3 * EXTENT) + bytes(5 * EXTENT)
    (here.folder / "disk.raw").write_bytes(data)
    assert submit(served, "t-1", "disk.raw", limit_mbit=400)["state"] in ("queued", "moving")
    done = over(served, "t-1")
    assert done["state"] == "done", done
    assert (there.folder / "in/disk.raw").read_bytes() == data and (here.folder / "disk.raw").read_bytes() == data
    assert len(done["root"]) == 64 and done["result"]["length"] == len(data) and "key" not in done
    assert done["prediction"]["recommended_streams"] >= 1, "it was predicted, for its bandwidth is known"
    assert {one["worker"] for one in served.json("/api/v1/migration-workers")} == {"wa", "wb"}
    assert submit(served, "t-1", "disk.raw", limit_mbit=400)["state"] == "done", "the same again"


@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_worker_killed_in_the_midst_takes_it_up_again(served: Served, ends: tuple[Worker, Worker], which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "LEASE_MS", 6_000)  # what is waited for here
    here, there = ends
    name = f"t-kill-{which}"
    data = random.Random(which + 2).randbytes(24 * EXTENT)
    (here.folder / name).write_bytes(data)
    submit(served, name, name, limit_mbit=40)  # five seconds at least
    until_sync(lambda: served.json(f"/api/v1/transfers/{name}")["progress"].get("moved_bytes", 0) > 2 * EXTENT, 120, "progress")
    ends[which].end(signal.SIGKILL)
    assert not (there.folder / "in" / name).exists(), "whole or absent"
    ends[which].start()
    done = over(served, name)
    assert done["state"] == "done", done
    assert (there.folder / "in" / name).read_bytes() == data
    assert done["receive" if which else "send"]["epoch"] >= 2


def test_a_cancelled_transfer_stops_at_both_ends(served: Served, ends: tuple[Worker, Worker]) -> None:
    here, there = ends
    (here.folder / "slow").write_bytes(random.Random(9).randbytes(8 * EXTENT))
    submit(served, "t-slow", "slow", limit_mbit=0.5)
    until_sync(lambda: served.json("/api/v1/transfers/t-slow")["send"]["epoch"] > 0, 120, "the sender's lease")
    assert served.json("/api/v1/transfers/t-slow", "DELETE")["state"] == "cancelled"

    def processes() -> str:
        return subprocess.run(["pgrep", "-f", f"gpu_migration (send|receive) .*{here.folder.parent}/w[ab]/(in/)?slow"], capture_output=True, text=True, check=False).stdout

    until_sync(lambda: not processes(), 60, "the end of its processes")
    assert not (there.folder / "in/slow").exists() and served.json("/api/v1/transfers/t-slow")["state"] == "cancelled"


def test_what_cannot_be_is_failed_with_the_reason(served: Served, ends: tuple[Worker, Worker]) -> None:
    here, there = ends
    submit(served, "t-none", "not-there")
    failed = over(served, "t-none")
    assert failed["state"] == "failed" and "not-there" in failed["reason"] and "No such file" in failed["reason"]
    outside = here.folder.parent / "secret"
    outside.write_text("secret")
    (here.folder / "link").symlink_to(outside)
    submit(served, "t-link", "link")
    failed = over(served, "t-link")
    assert failed["state"] == "failed" and "not below the worker's folder" in failed["reason"]
    assert not (there.folder / "in/link").exists()


@contextlib.contextmanager
def listens(folder: Path, name: str) -> Iterator[socket.socket]:
    """A local process at the receiving end."""
    folder.mkdir(parents=True, exist_ok=True)
    with reach(folder, name, listen=True) as made:
        yield made


def stream(served: Served, name: str, *, held: bool = False) -> Json:
    """As the hub's own moves ask for it."""
    asked = {"id": name, "source": {"worker": "wa", "path": name}, "destination": {"worker": "wb", "path": f"in/{name}"}, "limit_mbit": 0, "base": "", "replace": True, "not_before_ms": 0, "stream": True}
    return served.background.run(served.hub.transfers.submit(asked, held=held))


def carried(folder: Path, listener: socket.socket, name: str = "word") -> tuple[socket.socket, socket.socket]:
    """A connection between local processes of both workers' machines, once the folder for it is there."""
    until_sync(folder.exists, 120, "the folder of sockets")
    near = reach(folder, name)
    far, _ = listener.accept()
    far.settimeout(60)
    return near, far


def carrying(folder: Path) -> str:
    return subprocess.run(["pgrep", "-f", f"gpu_migration carry-(in|out) {folder}/"], capture_output=True, text=True, check=False).stdout


def test_a_stream_goes_from_socket_to_socket(served: Served, ends: tuple[Worker, Worker]) -> None:
    here, there = ends
    stream(served, "s-1")
    with listens(there.folder / "in/s-1", "memory") as listener:
        near, far = carried(here.folder / "s-1", listener, "memory")
        data = random.Random(4).randbytes(10_000_000)
        writing = threading.Thread(target=lambda: (near.sendall(data), near.shutdown(socket.SHUT_WR)))
        writing.start()
        got = bytearray()
        while part := far.recv(1 << 16):
            got += part
        writing.join()
        assert bytes(got) == data
        far.sendall(b"taken")
        far.close()
        assert near.recv(100) == b"taken"
        near.close()
    done = over(served, "s-1")
    assert done["state"] == "done" and done["root"] == "" and done["result"] == {"bytes_out": len(data), "bytes_in": 5, "streams": 1}, done
    assert done["send"]["epoch"] == done["receive"]["epoch"] == 1 and not (here.folder / "s-1").exists()
    until_sync(lambda: not carrying(here.folder.parent), 60, "the end of its processes")


def test_a_stream_that_is_held_has_its_receiver_ready_and_its_sender_waits(served: Served, ends: tuple[Worker, Worker]) -> None:
    here, there = ends
    stream(served, "s-held", held=True)
    address = until_sync(lambda: served.json("/api/v1/transfers/s-held")["address"], 120, "where it listens")
    stream(served, "s-other")
    until_sync((here.folder / "s-other").exists, 120, "another's sender, which came later")
    assert served.json("/api/v1/transfers/s-held")["send"]["epoch"] == 0 and not (here.folder / "s-held").exists()
    served.json("/api/v1/transfers/s-other", "DELETE")
    until_sync(lambda: not (here.folder / "s-other").exists(), 60, "the end of its folder")
    with listens(there.folder / "in/s-held", "word") as listener:
        assert stream(served, "s-held")["address"] == address, "the one that was ready"
        for one in carried(here.folder / "s-held", listener):
            one.close()
    assert over(served, "s-held")["state"] == "done"


@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_killed_in_the_midst_of_a_stream_fails_it(served: Served, ends: tuple[Worker, Worker], which: int) -> None:
    here, there = ends
    name = f"s-kill-{which}"
    stream(served, name)
    with listens(there.folder / "in" / name, "disk") as listener:
        near, far = carried(here.folder / name, listener, "disk")
        near.sendall(b"there")
        assert far.recv(5) == b"there"
        ends[which].end(signal.SIGKILL)
        assert near.recv(1) == b"" and far.recv(1) == b""
        near.close()
        far.close()
        ends[which].start()
        failed = over(served, name)
    assert failed["state"] == "failed" and "streams ended because the other end was gone" in failed["reason"], failed
    assert failed["send"]["epoch"] == failed["receive"]["epoch"] == 1, "not given anew"
    until_sync(lambda: not carrying(here.folder.parent), 60, "the end of its processes")


def test_a_worker_that_is_gone_before_anything_is_carried_fails_its_stream_by_its_lease(served: Served, ends: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "LEASE_MS", 6_000)  # what is waited for here
    here, _ = ends
    stream(served, "s-lease")
    until_sync((here.folder / "s-lease").exists, 120, "the folder of sockets")
    ends[1].end(signal.SIGKILL)
    failed = over(served, "s-lease")
    assert failed["state"] == "failed" and failed["reason"] == "receive: its worker said nothing for 6 s", failed
    ends[1].start()
    until_sync(lambda: not (here.folder / "s-lease").exists(), 60, "the end of the folder: its worker is told to stop")
    assert served.json("/api/v1/transfers/s-lease")["receive"]["epoch"] == 1


def test_what_cannot_be_carried_fails_a_stream_with_the_reason(served: Served, ends: tuple[Worker, Worker]) -> None:
    here, _ = ends
    (here.folder / "s-file").mkdir()
    (here.folder / "s-file/mine").write_text("mine")
    stream(served, "s-file")
    failed = over(served, "s-file")
    assert failed["state"] == "failed" and "something else than sockets" in failed["reason"] and (here.folder / "s-file/mine").exists()


def test_a_worker_that_is_not_there_is_waited_for_by_name(served: Served) -> None:
    said = served.json("/api/v1/transfers", "POST", {"id": "t-wait", "source": {"worker": "nobody", "path": "x"}, "destination": {"worker": "wc", "path": "y"}})
    assert "wc was never seen" in said["waits_for"]
    served.json("/api/v1/transfers/t-wait", "DELETE")


def test_a_workers_token_opens_its_own_tasks_and_no_more(served: Served) -> None:
    token = worker_token(served.hub.token, "wx")
    lease = json.dumps({"facts": {"slots": 1}}).encode()
    asks = [
        ("POST", "/api/v1/migration-workers/wx/lease", 200), ("POST", "/api/v1/migration-workers/wy/lease", 401), ("GET", "/api/v1/migration-workers/wx/token", 401), ("GET", "/api/v1/transfers", 401),
        ("POST", "/api/v1/migration-workers/wx/../wy/lease", 401), ("GET", "/api/v1/status", 401),
    ]
    for method, path, status in asks:
        assert served.ask(method, path, lease if method == "POST" else None, {"Authorization": f"Bearer {token}"})[0] == status, path


def test_bad_requests_name_the_field(served: Served) -> None:
    for body, field in (({"id": "x"}, "source"), ({"id": "x", "source": {"worker": "a", "path": "../x"}, "destination": {"worker": "b", "path": "x"}}, "source.path"), ([], "body")):
        status, _, text = served.ask("POST", "/api/v1/transfers", json.dumps(body).encode())
        assert status == 400 and error_of(text)["field"] == field
    assert served.ask("GET", "/api/v1/transfers/none")[0] == 404
    status, _, text = served.ask("POST", "/api/v1/transfers", json.dumps({"id": "t-1", "source": {"worker": "a", "path": "o"}, "destination": {"worker": "b", "path": "o"}}).encode())
    assert status in (200, 409)
    status, _, text = served.ask("POST", "/api/v1/migration-workers/wx/report", json.dumps({"task": "t/send", "epoch": 1, "state": "gone"}).encode())
    assert status == 400 and error_of(text)["field"] == "state"


def test_the_command_line_shows_and_asks(served: Served, ends: tuple[Worker, Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NOVACRON_HUB_URL", f"http://127.0.0.1:{served.hub.port}")
    monkeypatch.setenv("NOVACRON_TOKEN", served.hub.token)
    here, there = ends
    (here.folder / "small").write_bytes(b"small")
    assert novactl(["transfer", "submit", "t-cli", "--from", "wa:small", "--to", "wb:small"]) == 0
    assert over(served, "t-cli")["state"] == "done" and (there.folder / "small").read_bytes() == b"small"
    assert novactl(["transfer", "list"]) == 0 and "t-cli" in capsys.readouterr().out
    assert novactl(["transfer", "show", "t-cli", "--json"]) == 0 and json.loads(capsys.readouterr().out)["state"] == "done"
    assert novactl(["transfer", "submit", "t-bad", "--from", "wa", "--to", "wb:small"]) == 1 and "WORKER:PATH" in capsys.readouterr().err
    assert novactl(["migration-worker", "token", "wq", "--out", str(tmp_path / "token")]) == 0
    assert (tmp_path / "token").read_text().strip() == worker_token(served.hub.token, "wq") and (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert novactl(["migration-worker", "list"]) == 0 and "wa" in capsys.readouterr().out


def test_a_worker_says_what_is_wrong_with_its_set_up(served: Served, tmp_path: Path) -> None:
    token = tmp_path / "token"

    def run(**change: str) -> str:
        options = {"--hub": f"http://127.0.0.1:{served.hub.port}", "--name": "wz", "--token-file": str(token), "--folder": str(tmp_path), **change}
        done = subprocess.run([sys.executable, "-m", "gpu_migration", "worker", *(word for pair in options.items() for word in pair)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        return done.stderr

    assert "No such file" in run()
    token.touch(mode=0o600)
    assert "no token" in run()
    token.write_text("wrong")
    assert "does not take this token" in run()
    assert "no address" in run(**{"--hub": "hub.example"})
    assert "make it first" in run(**{"--folder": str(tmp_path / "none")})
    token.chmod(0o644)
    assert "chmod 600" in run()
