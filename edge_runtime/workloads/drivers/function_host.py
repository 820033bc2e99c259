"""What stands between the agent and one function: a process of its own that outlives the agent, keeps workers ready, hands them calls, and ends what takes too long.

Forked by `function_spawner`; forks its workers itself. It keeps its rights, to end workers of another user, and reads nothing that a module's program wrote but frames of bounded size.

    running.json    pid, start and boot of the host: written when an instance stands ready
    exit.json       how it ended (code and signal, as with a container), or that it could not be run, and why
    stdout.log, stderr.log    and with .1 the piece before: what a job wrote, and what calls wrote to stderr
    call.sock       where calls come in: one for each connection
"""

import contextlib
import heapq
import json
import os
import selectors
import signal
import socket
import time
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

import wasmtime

from .function_frames import ANSWERS, ASKS, CALL, CRASHED, ERR, EXITED, MAX_INPUT, OUT, READY, REFUSED, SAYS, TIMED_OUT, TRAPPED
from .function_worker import MAX_STDERR, MAX_TRAP, Program, work

CLIENT_S = 10.0
"""A caller that does not send its call, or take its answer, within this is cut off."""

SPARE_CLIENTS = 16
"""Connections beyond those whose calls run or wait: to hear that there is no room."""

HOLD_WORTH = 600.0 * (128 << 20)
"""Byte-seconds of idle memory that a second of waiting is worth: what providers pay who keep a function of 128 MiB, which loads in a second, for ten minutes."""

KEEP_LEAST_S, KEEP_MOST_S = 1.0, 3600.0
"""Bounds of how long a worker is kept without a call."""

SPARE_DUES = 256
"""Times beyond two for each call and worker that may stand in the queue of what comes due; more are those of calls that were answered, and are swept out."""

MAX_DEATHS = 5
"""Workers in a row that ended before they were ready: the function cannot be run."""

CHUNK = 65_536


def put(folder: str, name: str, value: dict[str, Any]) -> None:
    """A document, whole or not at all. Not awaited on the disk: after a power cut there is neither process nor document, and both are told as lost."""
    temporary = f"{folder}/{name}.new"
    with open(temporary, "w") as handle:
        json.dump(value, handle)
    os.replace(temporary, f"{folder}/{name}")


def keep_s(load_s: float, held_bytes: int) -> float:
    """How long a worker beyond those that are kept ready stays without a call, seconds: until holding it has cost as much as starting it again would.

    So what is paid is at most twice what is paid by somebody who knows when the next call comes (ski rental; Karlin et al., Algorithmica 1988).
    """
    return min(KEEP_MOST_S, max(KEEP_LEAST_S, load_s * HOLD_WORTH / max(1, held_bytes)))


def private_bytes(pid: int) -> int:
    """What a process has of its own; 0 where that cannot be read."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as handle:
            return 1024 * sum(int(line.split()[1]) for line in handle if line.startswith(b"Private_"))
    except (OSError, ValueError, IndexError):
        return 0


class Log:
    """The end of a stream in two files that together stay within `most` bytes; nothing is opened before something is written. What the disk does not take is dropped."""

    def __init__(self, path: str, most: int) -> None:
        self._path, self._half, self.file, self._size = path, max(1, most // 2), -1, 0

    def take(self, data: bytes) -> None:
        """Append."""
        with contextlib.suppress(OSError):
            for at in range(0, len(data), self._half):
                piece = data[at:at + self._half]
                if self.file < 0 or self._size + len(piece) > self._half:
                    if self.file >= 0:
                        os.close(self.file)
                        os.replace(self._path, self._path + ".1")
                    self.file, self._size = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), 0
                self._size += os.write(self.file, piece)


class Call:
    """One call, from its connection to its answer. `due` and `began`: monotonic seconds."""

    __slots__ = ("answer", "asked", "began", "body", "client", "cold", "due")

    def __init__(self, client: socket.socket) -> None:
        self.client, self.due, self.began, self.cold = client, 0.0, 0.0, False
        self.asked, self.body, self.answer = bytearray(), b"", b""


class Worker:
    """One worker as its host sees it. `call`: what it runs; `began`: monotonic seconds of its start; `load_s`: how long that took; `due`: when it is looked at next, 0: never."""

    __slots__ = ("began", "call", "due", "heard", "idle_since", "link", "load_s", "pid", "ready")

    def __init__(self, pid: int, link: socket.socket, began: float) -> None:
        self.pid, self.link, self.heard, self.ready, self.idle_since = pid, link, bytearray(), False, 0.0
        self.began, self.load_s, self.due = began, 0.0, 0.0
        self.call: Call | None = None


class Host:
    """One function's life.

    Args:
        told: `folder`, `uid`, `job` (run it once, to its end), `timeout_s`, `warm`, `concurrency`, `queue`, `log_bytes`.
        own: the engine.
        descriptors: its lock, its pipe to the agent (which hears `running` or `ended` once), the verified native code.
        began: monotonic seconds of its start.
    """

    def __init__(self, told: dict[str, Any], own: wasmtime.Engine, descriptors: list[int], began: float) -> None:
        self._told, self._engine, self._began = told, own, began
        self._lock, self._reply, self._code = descriptors
        self._program: Program | None = None
        self._job = bool(told["job"])
        self._select = selectors.DefaultSelector()
        self._workers: dict[int, Worker] = {}
        self._calls: dict[int, Call] = {}
        self._waiting: deque[Call] = deque()
        self._dues: list[tuple[float, int, Call | Worker]] = []
        self._number = 0
        self._deaths = 0
        self._end: dict[str, Any] | None = None
        self._logs = {OUT: Log(f"{told['folder']}/stdout.log", told["log_bytes"]), ERR: Log(f"{told['folder']}/stderr.log", told["log_bytes"])}
        self._listener: socket.socket | None = None
        if not self._job:
            self._listener = listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.setblocking(False)
            folder = os.open(told["folder"], os.O_PATH | os.O_DIRECTORY)
            listener.bind(f"/proc/self/fd/{folder}/call.sock")  # the folder's own path may be longer than a socket's name can be
            os.close(folder)
            listener.listen(told["queue"] + told["concurrency"] + SPARE_CLIENTS)
            self._select.register(listener, selectors.EVENT_READ, self._accept)
        self._woken = socket.socketpair()
        for end in self._woken:
            end.setblocking(False)
        self._select.register(self._woken[0], selectors.EVENT_READ, self._signalled)
        signal.set_wakeup_fd(self._woken[1].fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def run(self, first: tuple[int, socket.socket] | None) -> dict[str, Any]:
        """Until it has ended; how. `first`: pid of a worker that was forked ahead, and the socket to it."""
        if first is None:
            self._spawn()
        else:
            told = json.dumps(self._told).encode()
            socket.send_fds(first[1], [CALL.pack(len(told))], [self._code])
            first[1].sendall(told)
            self._take(*first)
        while self._end is None:
            now = time.monotonic()
            for key, _ in self._select.select(max(0.0, self._dues[0][0] - now) if self._dues else None):
                live = self._select.get_map().get(key.fd)
                if live is not None and live.fileobj is key.fileobj:  # else it went with another one's event
                    key.data() if key.fileobj in (self._listener, self._woken[0]) else key.data[0](key.data[1])
            self._pass(time.monotonic())
        for worker in list(self._workers.values()):
            self._bury(worker)
        return self._end

    # -- time ----------------------------------------------------------------------------------------------------------------

    def _due(self, at: float, what: "Call | Worker") -> None:
        """From now on it is looked at then, and not before."""
        what.due = at
        self._number += 1
        heapq.heappush(self._dues, (at, self._number, what))
        if len(self._dues) > SPARE_DUES + 2 * (len(self._calls) + len(self._workers)):
            self._dues = [entry for entry in self._dues if entry[0] == entry[2].due and self._there(entry[2])]
            heapq.heapify(self._dues)

    def _there(self, what: "Call | Worker") -> bool:
        return self._workers.get(what.pid) is what if isinstance(what, Worker) else self._calls.get(what.client.fileno()) is what

    def _pass(self, now: float) -> None:
        """What has come due: callers that are slow, calls that take too long, workers that nobody needs."""
        while self._dues and self._dues[0][0] <= now:
            at, _, what = heapq.heappop(self._dues)
            if at != what.due or not self._there(what):
                continue
            if isinstance(what, Worker):
                self._worker_due(what, now)
            else:
                self._call_due(what)

    def _worker_due(self, worker: Worker, now: float) -> None:
        worker.due = 0.0
        if self._job and worker.call is None and self._told["timeout_s"]:
            self._end = {"failed": f"it ran longer than {self._told['timeout_s']:g} s, and was ended", "at_ms": int(time.time() * 1000)}
        elif not self._job and worker.ready and worker.call is None and len(self._workers) > max(1, self._told["warm"]):
            until = worker.idle_since + keep_s(worker.load_s, private_bytes(worker.pid))
            if until <= now:
                self._bury(worker)
            else:
                self._due(until, worker)

    def _call_due(self, call: Call) -> None:
        if call.answer or (not call.body and not call.began):  # its caller takes or sends nothing
            self._drop(call)
            return
        worker = next((one for one in self._workers.values() if one.call is call), None)
        if worker is not None:
            worker.call = None
            self._bury(worker)
        elif call in self._waiting:
            self._waiting.remove(call)
        else:  # it was answered
            return
        self._answer(call, TIMED_OUT, 0, 0, b"", b"" if worker is not None else b"it waited for its turn")
        self._enough()

    # -- calls ---------------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        if len(self._calls) >= self._told["queue"] + self._told["concurrency"] + SPARE_CLIENTS:
            client.close()
            return
        client.setblocking(False)
        call = self._calls[client.fileno()] = Call(client)
        self._due(time.monotonic() + CLIENT_S, call)
        self._select.register(client, selectors.EVENT_READ, (self._read, call))

    def _read(self, call: Call) -> None:
        if call.answer:
            self._write(call)
            return
        try:
            data = call.client.recv(CHUNK)
        except OSError:
            data = b""
        if not data or call.began or call.body:  # it left, or says more than it should
            self._leave(call)
            return
        call.asked += data
        if len(call.asked) < ASKS.size:
            return
        left_ms, size = ASKS.unpack_from(call.asked)
        if size > MAX_INPUT:
            self._answer(call, REFUSED, 0, 0, b"", b"its input is too large")
        elif len(call.asked) == ASKS.size + size:
            call.body = CALL.pack(size) + bytes(call.asked[ASKS.size:])
            self._due(time.monotonic() + min(left_ms / 1000, self._told["timeout_s"]), call)
            self._place(call)

    def _place(self, call: Call) -> None:
        worker = next((one for one in self._workers.values() if one.ready and one.call is None), None)
        if worker is not None:
            self._give(worker, call)
            return
        unready = sum(not one.ready and one.call is None for one in self._workers.values())
        more = self._told["concurrency"] - len(self._workers)
        if len(self._waiting) >= self._told["queue"] + unready + more:
            self._answer(call, REFUSED, 0, 0, b"", b"as many calls run and wait as may")
            return
        self._waiting.append(call)
        if len(self._waiting) > unready and more > 0:
            call.cold = True
            self._spawn()

    def _give(self, worker: Worker, call: Call) -> None:
        worker.call, call.began = call, time.monotonic()
        try:
            sent = worker.link.send(call.body)
        except OSError:
            sent = 0
        if sent != len(call.body):  # what waits in its socket is no more than one call
            self._died(worker)

    def _leave(self, call: Call) -> None:
        """Its caller is gone: what runs for it goes on to its deadline at most, and is told to nobody."""
        if call in self._waiting:
            self._waiting.remove(call)
        self._drop(call)

    def _answer(self, call: Call, what: int, cut: int, code: int, out: bytes, err: bytes) -> None:
        if err and what in (EXITED, TRAPPED):
            self._logs[ERR].take(err + b"\n" * (not err.endswith(b"\n")))
        if self._calls.get(call.client.fileno()) is not call:
            return
        ran = int((time.monotonic() - call.began) * 1e6) if call.began else 0
        call.answer = ANSWERS.pack(what, cut, call.cold, code, min(ran, 0xFFFF_FFFF), len(out), len(err)) + out + err
        self._due(time.monotonic() + CLIENT_S, call)
        self._write(call)

    def _write(self, call: Call) -> None:
        try:
            sent = call.client.send(call.answer)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(call)
            return
        call.answer = call.answer[sent:]
        if call.answer:
            self._select.modify(call.client, selectors.EVENT_WRITE, (self._write, call))
        else:
            self._drop(call)

    def _drop(self, call: Call) -> None:
        if self._calls.get(call.client.fileno()) is call:
            del self._calls[call.client.fileno()]
            self._select.unregister(call.client)
            call.client.close()

    # -- workers -------------------------------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        if self._program is None:
            self._program = linked(self._engine, self._told, self._code)
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                self._select.close()
                for one in (ours, self._listener, *self._woken, *(worker.link for worker in self._workers.values()), *(call.client for call in self._calls.values())):
                    if one is not None:
                        one.close()
                for descriptor in (self._lock, self._reply, self._code, *(log.file for log in self._logs.values())):
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
                work(theirs, self._program, self._told["uid"], self._job)
            finally:
                os._exit(1)
        theirs.close()
        self._take(pid, ours)

    def _take(self, pid: int, link: socket.socket) -> None:
        link.setblocking(False)
        worker = self._workers[pid] = Worker(pid, link, time.monotonic())
        self._select.register(link, selectors.EVENT_READ, (self._hear, worker))
        if self._job and self._told["timeout_s"]:
            self._due(time.monotonic() + self._told["timeout_s"], worker)

    def _enough(self) -> None:
        """As many workers as are kept ready, and one for each call that waits."""
        while self._end is None and len(self._workers) < min(self._told["concurrency"], max(self._told["warm"], len(self._waiting))):
            self._spawn()

    def _hear(self, worker: Worker) -> None:
        try:
            data = worker.link.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._died(worker)
            return
        worker.heard += data
        while len(worker.heard) >= SAYS.size and self._workers.get(worker.pid) is worker:
            what, cut, code, out, err = SAYS.unpack_from(worker.heard)
            if out > max(self._told["output_bytes"], MAX_INPUT) or err > MAX_STDERR + 4 * MAX_TRAP:
                self._died(worker)
                return
            if len(worker.heard) < SAYS.size + out + err:
                return
            parts = bytes(worker.heard[SAYS.size:SAYS.size + out]), bytes(worker.heard[SAYS.size + out:SAYS.size + out + err])
            del worker.heard[:SAYS.size + out + err]
            self._heard(worker, what, min(cut, 1), code, *parts)

    def _heard(self, worker: Worker, what: int, cut: int, code: int, out: bytes, err: bytes) -> None:
        if what in (OUT, ERR) and self._job:
            self._logs[what].take(out)
        elif what == READY and not worker.ready:
            worker.ready, worker.idle_since, self._deaths = True, time.monotonic(), 0
            worker.load_s = worker.load_s or worker.idle_since - worker.began
            self._say_running()
            if self._job:
                return
            if self._waiting:
                self._give(worker, self._waiting.popleft())
            elif not worker.due:
                self._due(worker.idle_since + KEEP_LEAST_S, worker)
        elif what in (EXITED, TRAPPED) and self._job:
            self._logs[ERR].take(err)
            now = int(time.time() * 1000)
            self._end = {"failed": err.decode("utf-8", "replace")[:MAX_TRAP], "at_ms": now} if what == TRAPPED else {"code": code, "signal": 0, "out_of_memory": False, "at_ms": now}
        elif what in (EXITED, TRAPPED) and worker.call is not None:
            call, worker.call, worker.ready = worker.call, None, False
            self._answer(call, what, cut, code, out, err)
        else:
            self._died(worker)

    def _died(self, worker: Worker) -> None:
        """A worker that ended, or talks nonsense: its call is answered, another worker takes its place."""
        call, worker.call = worker.call, None
        status = self._bury(worker)
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        words = f"its process was killed by signal {number}" if number else "its process ended"
        if self._job:
            self._end = {"code": 128 + number, "signal": number, "out_of_memory": False, "at_ms": int(time.time() * 1000)} if number else {"failed": words, "at_ms": int(time.time() * 1000)}
            return
        if call is not None:
            self._answer(call, CRASHED, 0, 0, b"", words.encode())
        elif not worker.ready:
            self._deaths += 1
            if self._deaths >= MAX_DEATHS:
                self._end = {"failed": f"{self._deaths} processes in a row did not get ready: {words}", "at_ms": int(time.time() * 1000)}
        self._enough()

    def _bury(self, worker: Worker) -> int:
        """End a worker for good; its wait status."""
        with contextlib.suppress(KeyError):
            self._select.unregister(worker.link)
        worker.link.close()
        del self._workers[worker.pid]
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
        return os.waitpid(worker.pid, 0)[1]

    # -- the agent -----------------------------------------------------------------------------------------------------------

    def _say_running(self) -> None:
        """Once: an instance stands ready."""
        if self._reply < 0:
            return
        with open("/proc/self/stat", "rb") as handle:
            started = int(handle.read().rpartition(b")")[2].split()[19])
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        put(self._told["folder"], "running.json", {
            "pid": os.getpid(), "started": started, "boot": boot, "at_ms": int(time.time() * 1000), "load_ms": round((time.monotonic() - self._began) * 1000, 3),
        })
        self.tell("running")
        self._enough()

    def tell(self, word: str) -> None:
        """One line to the agent, which may be dead; the first one only."""
        if self._reply >= 0:
            with contextlib.suppress(OSError):
                os.write(self._reply, word.encode() + b"\n")
            os.close(self._reply)
            self._reply = -1

    def _signalled(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken[0].recv(64)
            self._end = {"code": 143 if self._job else 0, "signal": signal.SIGTERM if self._job else 0, "out_of_memory": False, "at_ms": int(time.time() * 1000)}


def linked(own: wasmtime.Engine, told: dict[str, Any], code: int) -> Program:
    """The program of verified native code. By `pread`: others read the same file."""
    module = wasmtime.Module.deserialize(own, os.pread(code, os.fstat(code).st_size, 0))
    return Program(own, module, told["args"], told["env"], told["memory"], told["output_bytes"])


def host(own: wasmtime.Engine, told: dict[str, Any], descriptors: list[int], first: tuple[int, socket.socket] | None = None) -> NoReturn:
    """A host's life, in the process that was forked for it; the arguments are those of `Host`."""
    life: Host | None = None
    try:
        life = Host(told, own, descriptors, time.monotonic())
        result = life.run(first)
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {error}"[:MAX_TRAP], "at_ms": int(time.time() * 1000)}
    with contextlib.suppress(OSError):
        put(told["folder"], "exit.json", result)
    if life is not None:
        life.tell("ended")
    os._exit(0)
