"""A worker of a hub: asks for tasks, carries each out as a process of its own (`send` or `receive`; of a stream `carry-out` or `carry-in`), says how it goes, and stops what the hub wants stopped.

It speaks HTTP with JSON to the hub's `/api/v1/migration-workers/NAME/{lease,report}` (the hub's openapi.json has the fields) with nothing but the standard library. A hub that is away for a
while stops nothing: transfers go on, and what came of them is told when it is back. A worker that is killed takes its processes with it; the hub gives their tasks out again when their lease is
over, and the engine takes up what had arrived. Paths are below one folder; the key of a transfer goes to the process by its environment and is never written down.
"""

import argparse
import ctypes
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .carry import CHANNELS
from .errors import KeyRefused, MigrationError, Refused, TransferLost
from .keys import KEY_VARIABLE

WAIT_S = 20.0
"""Seconds that the hub is asked to wait for something to do."""
ANSWER_S = 15.0
"""Seconds within which the hub answers besides."""
AGAIN_S = (0.5, 10.0)
"""Seconds between two tries to reach the hub, at first and at most; doubled."""
REPORT_S = 2.0
"""Seconds between two reports: a lease is fifteen times as long."""
PATIENCE_S = 20.0
"""Seconds that one end bears without the other: then the hub brings them together anew."""
STREAM_WAIT_S = 3600.0
"""Seconds that the receiving side of a stream waits for its first connection. The hub stops it where there will be none: one that is made ready long before must not give up just as the sender begins."""
END_S = 5.0
"""Seconds that a process is given to end by itself."""
LINE_MOST = 65_536
"""Bytes of a line of a process, at most."""
BODY_MOST = 4 << 20
"""Bytes of an answer of the hub, at most."""
PASSING = ("TransferLost", "Unauthentic")
"""Errors that may be gone with the next try; with others a person is needed."""
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
"""Loaded before any fork."""


@dataclass(slots=True)
class _Task:
    """One that is worked on."""

    name: str
    epoch: int
    stop: threading.Event = field(default_factory=threading.Event)
    process: "subprocess.Popen[bytes] | None" = None
    port: int = 0


class Worker:
    """`run` until SIGTERM or SIGINT."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Raises MigrationError where folder or token cannot be used."""
        self._url = f"{options.hub.rstrip('/')}/api/v1/migration-workers/{options.name}/"
        if not self._url.startswith(("http://", "https://")):
            raise MigrationError(f"worker: --hub {options.hub} is no address; give it as https://hub.example")
        self._token = _token(options.token_file)
        self._tls = _trusted(options.ca_file) if self._url.startswith("https://") else None
        try:
            self._folder = options.folder.resolve(strict=True)
        except OSError as error:
            raise MigrationError(f"worker: --folder {options.folder}: {error.strerror or error}; make it first") from None
        self._bases: Path | None = options.bases
        self._listen, self._advertise, self._ports, self._slots = options.listen, options.advertise or options.listen, options.ports, options.slots
        self._tasks: dict[str, _Task] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()

    def run(self) -> None:
        """Ask, do, tell. Raises Refused where the hub does not know this worker's token."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._end.set())
        # The wait for the hub's answer must not keep us from ending, so that it is a thread's.
        asking = threading.Thread(target=self._guarded, daemon=True, name="lease")
        self._refused: MigrationError | None = None
        asking.start()
        self._end.wait()
        with self._lock:
            tasks = list(self._tasks.values())
        for task in tasks:
            task.stop.set()
            _kill(task.process)
        if self._refused is not None:
            raise self._refused

    def _guarded(self) -> None:
        try:
            wait = AGAIN_S[0]
            while not self._end.is_set():
                try:
                    self._once()
                    wait = AGAIN_S[0]
                except TransferLost as error:
                    print(f"worker: {error}", file=sys.stderr, flush=True)
                    self._end.wait(wait)
                    wait = min(AGAIN_S[1], 2 * wait)
        except MigrationError as error:
            self._refused = error
        finally:
            self._end.set()

    def _once(self) -> None:
        with self._lock:
            held = [{"task": one.name, "epoch": one.epoch} for one in self._tasks.values()]
        said = self._call("lease", {"facts": self._facts(), "held": held, "wait_s": WAIT_S}, WAIT_S + ANSWER_S)
        try:
            stop, tasks = list(said["stop"]), [(_Task(told["task"], told["epoch"]), told) for told in said["tasks"]]
        except (KeyError, TypeError):
            raise TransferLost("what answers in the hub's place is no hub") from None
        for name in stop:
            self._stop(name)
        for task, told in tasks:
            self._stop(task.name)
            with self._lock:
                self._tasks[task.name] = task
            threading.Thread(target=self._carry_out, args=(task, told), daemon=True, name=task.name).start()

    def _facts(self) -> dict[str, Any]:
        free = os.statvfs(self._folder)
        return {"version": "1", "cpus": os.cpu_count() or 1, "gpu": "", "free_bytes": free.f_bavail * free.f_frsize, "slots": self._slots}

    def _stop(self, name: str) -> None:
        """Its process has ended when this returns."""
        with self._lock:
            task = self._tasks.pop(name, None)
        if task is not None:
            task.stop.set()
            _kill(task.process)

    # -- one task ------------------------------------------------------------------------------------------------------------

    def _carry_out(self, task: _Task, told: dict[str, Any]) -> None:
        try:
            self._tell(task, **self._work(task, told))
        except MigrationError as error:  # not even begun
            self._tell(task, state="failed", error=str(error), final=True)
        except Exception as error:  # a fault of ours ends one task, not the worker
            self._tell(task, state="failed", error=f"{type(error).__name__}: {error}", final=True)
        finally:
            _kill(task.process)
            with self._lock:
                if self._tasks.get(task.name) is task:
                    del self._tasks[task.name]

    def _work(self, task: _Task, told: dict[str, Any]) -> dict[str, Any]:
        """Run the process; what to report at its end."""
        path = self._below(told["path"])
        command = [sys.executable, "-m", "gpu_migration", *self._command(task, told, path), "--events", "--patience", f"{PATIENCE_S:g}"]
        stream = bool(told.get("stream"))
        with self._lock:
            if task.stop.is_set():
                return {"state": "failed", "error": "stopped", "final": stream}
            process = task.process = subprocess.Popen(
                command, env={**os.environ, KEY_VARIABLE: told["key"]}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_die_with_parent,
            )
        with process:
            failed = self._follow(task, process)
            assert process.stdout is not None
            out = process.stdout.read(LINE_MOST)
        if process.returncode == 0:
            result = json.loads(out)
            return {"state": "done", "root": result.pop("root"), "result": {name: value for name, value in result.items() if isinstance(value, int | float)}}
        if failed is None:
            return {"state": "failed", "error": f"its process ended with status {process.returncode}", "final": stream}
        return {"state": "failed", "error": failed["error"], "final": stream or failed["kind"] not in PASSING}  # what a stream has carried cannot be taken up again

    def _command(self, task: _Task, told: dict[str, Any], path: Path) -> list[str]:
        """What the process is started with. Raises Refused."""
        if told.get("stream"):
            words = ["carry-out" if told["what"] == "send" else "carry-in", str(path), "--channels", ",".join(CHANNELS)]
        else:
            words = [told["what"], str(path)]
        if told["what"] == "send":
            words += [told["address"], "--transfer", told["transfer"]]
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            task.port = self._port()
            words += ["--listen", f"{self._listen}:{task.port}"]
        if told.get("stream"):
            return words + (["--wait", f"{STREAM_WAIT_S:g}"] if told["what"] == "receive" else [])
        if told["what"] == "receive":
            return words + (["--replace"] if told["replace"] else []) + (["--bases", str(self._bases)] if self._bases else [])
        if told["limit_mbit"]:
            words += ["--limit-mbit", str(told["limit_mbit"]), "--history", str(self._folder / ".migration-history")]
        return words + (["--base", str(self._below(told["base"]))] if told["base"] else [])

    def _follow(self, task: _Task, process: "subprocess.Popen[bytes]") -> dict[str, Any] | None:
        """Pass on what it says until it ends; its error, where it said one."""
        assert process.stderr is not None
        failed, told_at = None, 0.0
        while line := process.stderr.readline(LINE_MOST):
            try:
                event = json.loads(line)
            except ValueError:
                print(f"worker: {task.name}: {line.decode(errors='replace').rstrip()}", file=sys.stderr, flush=True)
                continue
            if "error" in event:
                failed = event
            elif "listening" in event:
                self._tell(task, state="listening", address=f"{self._advertise}:{event['listening']}")
            elif "prediction" in event:
                self._tell(task, state="working", prediction=event["prediction"])
            elif time.monotonic() - told_at >= REPORT_S:
                told_at = time.monotonic()
                self._tell(task, once=True, state="working", progress=event["progress"])
        process.wait()
        return failed

    def _tell(self, task: _Task, *, once: bool = False, **what: Any) -> None:
        """Report; `once`: not again where the hub is away, for there will be a newer one. Sets `stop` where the hub says so."""
        wait = AGAIN_S[0]
        while not task.stop.is_set():
            try:
                if not self._call("report", {"task": task.name, "epoch": task.epoch, **what}, ANSWER_S)["go_on"]:
                    task.stop.set()
                    _kill(task.process)
                return
            except TransferLost:
                if once:
                    return
            except MigrationError as error:
                print(f"worker: {task.name}: {error}", file=sys.stderr, flush=True)
                return
            task.stop.wait(wait)
            wait = min(AGAIN_S[1], 2 * wait)

    def _below(self, path: str) -> Path:
        """A path in the folder. Raises Refused where it, or a link on its way, leads out."""
        found: Path = (self._folder / path).resolve()
        if self._folder not in found.parents:
            raise Refused(f"worker: {path!r} is not below the worker's folder; give another path")
        return found

    def _port(self) -> int:
        low, high = self._ports
        with self._lock:
            taken = {one.port for one in self._tasks.values()}
        free = [port for port in range(low, high + 1) if port == 0 or port not in taken]
        if not free:
            raise Refused("worker: all of --ports are in use; give more, or fewer --slots")
        return free[0]

    # -- the hub -------------------------------------------------------------------------------------------------------------

    def _call(self, what: str, body: dict[str, Any], seconds: float) -> Any:
        """Its answer. Raises TransferLost where there is none now, Refused where there never will be."""
        request = urllib.request.Request(
            self._url + what, json.dumps(body).encode(), {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}, method="POST",
        )
        try:
            with urllib.request.urlopen(request, timeout=seconds, context=self._tls) as answer:
                return json.loads(answer.read(BODY_MOST))
        except urllib.error.HTTPError as error:
            text = error.read(LINE_MOST).decode(errors="replace")
            if error.code == 401:
                raise KeyRefused("worker: the hub does not take this token for this name; ask it for a new one (GET /api/v1/migration-workers/NAME/token)") from None
            if error.code < 500:
                raise Refused(f"worker: the hub answers {error.code}: {text[:300]}") from None
            raise TransferLost(f"the hub answers {error.code}: {text[:300]}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:  # an answer that was cut off is none of OSError's
            raise TransferLost(f"the hub at {self._url.partition('/api/')[0]} is out of reach ({error})") from None


def _trusted(path: Path | None) -> ssl.SSLContext:
    """Raises MigrationError."""
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        raise MigrationError(f"worker: --ca-file {path}: holds no certificate authorities ({error.strerror or error}); give a PEM file") from None


def _token(path: Path) -> str:
    """Raises KeyRefused."""
    try:
        if path.stat().st_mode & 0o077:
            raise KeyRefused(f"worker: --token-file {path}: others may read it; chmod 600 {path}")
        token = path.read_text().strip()
    except OSError as error:
        raise KeyRefused(f"worker: --token-file {path}: {error.strerror or error}") from None
    if not token or not token.isascii() or not token.isprintable():
        raise KeyRefused(f"worker: --token-file {path}: there is no token in it")
    return token


def _kill(process: "subprocess.Popen[bytes] | None") -> None:
    """Ask it to end, and end it."""
    if process is None or process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
