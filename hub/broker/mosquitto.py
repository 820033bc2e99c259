"""mosquitto, supervised: configured, started, restarted with back-off when it dies, ended with the hub."""

import asyncio
import ctypes
import logging
import os
import random
import shutil
import signal
import socket
from pathlib import Path

from .base import BrokerError, is_loopback

log = logging.getLogger(__name__)

MAX_PACKET_BYTES = 300_000
"""Largest packet taken: a message of the contract (262,144) and its frame."""

READY_TIMEOUT_S = 10.0
RESTART_BASE_S = 0.2
RESTART_CAP_S = 10.0
STABLE_S = 30.0
"""A broker that ran so long and died is restarted without the pauses collected before."""

_PR_SET_PDEATHSIG = 1


def find_mosquitto() -> str | None:
    """mosquitto on the PATH, or where Debian puts it (sbin is not on every user's PATH)."""
    return shutil.which("mosquitto") or next((path for path in ("/usr/sbin/mosquitto", "/usr/local/sbin/mosquitto") if os.access(path, os.X_OK)), None)


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port


def _die_with_parent() -> None:
    # A hub that is killed with -9 must not leave a broker behind that holds the port.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class MosquittoBroker:
    """See `Broker`.

    Args:
        password_file: mosquitto's own password file; required when `host` is reachable from outside.
    """

    kind = "mosquitto"
    tls = False
    mqtt5 = True

    def __init__(self, host: str, port: int, data_dir: Path, password_file: str = "", username: str = "", password: str = "") -> None:
        program = find_mosquitto()
        if program is None:
            raise BrokerError("broker", "mosquitto is not installed", "apt install mosquitto, or use embedded")
        if not is_loopback(host) and not password_file:
            raise BrokerError("broker.password_file", f"{host} is reachable from outside and anyone could connect", "give a mosquitto password file, or listen on 127.0.0.1")
        self._program = program
        self.host = host
        self.port = port
        self.username = username
        self.password = password
        self.restarts = 0
        self._data_dir = data_dir
        self._password_file = password_file
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def pid(self) -> int:
        """The child's process id, 0 while it is down."""
        return self._process.pid if self._process is not None and self._process.returncode is None else 0

    def _configuration(self) -> str:
        lines = [
            f"listener {self.port} {self.host}",
            "set_tcp_nodelay true",  # without it p50 rose from 0.4 to 15-23 ms
            "max_inflight_messages 1000", "max_queued_messages 10000", f"max_packet_size {MAX_PACKET_BYTES}", "persistence true",
            f"persistence_location {self._data_dir}/", "autosave_interval 60", "persistent_client_expiration 7d", "log_dest stderr",
            "log_type error", "log_type warning", f"allow_anonymous {'false' if self._password_file else 'true'}",
        ]
        if self._password_file:
            lines.append(f"password_file {self._password_file}")
        if os.getuid() == 0:
            lines.append("user root")  # or it drops to a user that cannot write data_dir
        return "\n".join(lines) + "\n"

    async def start(self) -> None:
        """Start and wait until it listens; raises `BrokerError`."""
        chosen = self.port == 0
        if not chosen:
            self._claim()
        self._data_dir.mkdir(parents=True, exist_ok=True)
        for attempt in range(3):
            if chosen:
                self.port = free_port(self.host)
            (self._data_dir / "mosquitto.conf").write_text(self._configuration())
            await self._spawn()
            if await self._listening():
                break
            status = self._process.returncode if self._process is not None else None
            if not chosen or attempt == 2:
                await self.close()
                raise BrokerError("broker.port", f"mosquitto does not listen on {self.host}:{self.port} (status {status})", "choose another port, or 0; its words are above")
        self._task = asyncio.get_running_loop().create_task(self._supervise(), name="mosquitto")

    def _claim(self) -> None:
        """A stranger who listens there would pass for our broker when it is looked for."""
        with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((self.host, self.port))
            except OSError as error:
                raise BrokerError("broker.port", f"{self.host}:{self.port} cannot be listened on: {error}", "choose another port, or 0") from None

    async def _spawn(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            self._program, "-c", str(self._data_dir / "mosquitto.conf"), stdin=asyncio.subprocess.DEVNULL, preexec_fn=_die_with_parent
        )

    async def _listening(self) -> bool:
        loop = asyncio.get_running_loop()
        end = loop.time() + READY_TIMEOUT_S
        while loop.time() < end and self._process is not None and self._process.returncode is None:
            try:
                _, writer = await asyncio.open_connection(self.host, self.port)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            return True
        return False

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while not self._closing:
            started = loop.time()
            if self._process is not None:
                status = await self._process.wait()
                if self._closing:
                    return
                log.error("mosquitto ended with status %s; starting it again", status)
            failures = 0 if loop.time() - started > STABLE_S else failures + 1
            if failures > 1:
                await asyncio.sleep(random.random() * min(RESTART_CAP_S, RESTART_BASE_S * 2**failures))
            self.restarts += 1
            await self._spawn()

    async def close(self) -> None:
        """End the child: it saves its state on SIGTERM."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 5)
            except TimeoutError:
                process.kill()
                await process.wait()
