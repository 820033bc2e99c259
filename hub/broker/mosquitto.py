"""mosquitto, supervised: configured, started, restarted with back-off when it dies, ended with the hub."""

import asyncio
import base64
import ctypes
import hashlib
import logging
import os
import random
import secrets
import shutil
import signal
import socket
from pathlib import Path

from edge_runtime.contract import topics
from edge_runtime.contract.limits import BROKER_PACKET_BYTES

from .base import BrokerError, Door, authority, is_loopback

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 10.0
RESTART_BASE_S = 0.2
RESTART_CAP_S = 10.0
DOUBLINGS_MAX = 16
"""Beyond the cap; two to the power of a thousand is no float."""

STABLE_S = 30.0
"""A broker that ran so long and died is restarted without the pauses collected before."""

_PR_SET_PDEATHSIG = 1


OWN_USER = "novacron-hub-"
"""How the hub's own name begins at a broker of ours that asks for names. Eight random bytes follow, new at each start: no certificate and no line of anybody's has that name, and with it all rights."""

TOPICS = f"""pattern write {topics.edge_topic("%u", "up")}
pattern write {topics.edge_topic("%u", "status")}
pattern write {topics.edge_topic("%u", "answer")}
pattern read {topics.edge_topic("%u", "receipts")}
pattern read {topics.edge_topic("%u", "desired")}
pattern read {topics.edge_topic("%u", "ask")}
pattern read {topics.HUB_STATUS}
"""
"""mosquitto's list of who may do what: an edge that came in by its certificate has its own topics, and no other's. The hub's own rights come before it."""

HASH_TURNS = 101
"""As mosquitto_passwd has them by default. What is hashed here are 24 random bytes, which nobody guesses."""


def hashed(password: str) -> str:
    """As a line of mosquitto's password file has it: PBKDF2 by SHA-512 (mosquitto 2, mosquitto_passwd(1))."""
    salt = secrets.token_bytes(12)
    return f"$7${HASH_TURNS}${base64.b64encode(salt).decode()}${base64.b64encode(hashlib.pbkdf2_hmac('sha512', password.encode(), salt, HASH_TURNS)).decode()}"


def _put(path: Path, text: str) -> None:
    """For the owner alone, at once."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
        handle.write(text)
    os.rename(new, path)


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

    Where somebody stands at its door, or it speaks TLS, the hub has one of its own: a second port, on loopback, and a password that is made anew at each start. So it needs no certificate, and no line in anybody's file.

    Args:
        door: who may come in; needed where `host` is reachable from outside.
    """

    kind = "mosquitto"
    tls = False
    ca_file = ""
    mqtt5 = True

    def __init__(self, host: str, port: int, data_dir: Path, door: Door = Door()) -> None:
        program = find_mosquitto()
        if program is None:
            raise BrokerError("broker", "mosquitto is not installed", "apt install mosquitto, or use embedded")
        if not is_loopback(host) and not door.guards:
            raise BrokerError("broker.password_file", f"{host} is reachable from outside and anyone could connect", "give a mosquitto password file, or authorities for edges' certificates (broker-client-ca), or listen on 127.0.0.1")
        if door.client_ca_file and not door.cert_file:
            raise BrokerError("broker-client-ca", "asks edges for certificates, and the broker has none itself", "give tls-cert and tls-key")
        if door.client_ca_file and door.password_file:
            raise BrokerError("broker-client-ca", "lets edges in by certificates, and broker-password-file by passwords", "give one of them")
        self._program = program
        self.host = host
        self.port = port
        self.username, self.password = (f"{OWN_USER}{secrets.token_hex(8)}", secrets.token_hex(24)) if door.guards else ("", "")
        self.inside = host, port
        self.restarts = 0
        self._data_dir = data_dir
        self._door = door
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def pid(self) -> int:
        """The child's process id, 0 while it is down."""
        return self._process.pid if self._process is not None and self._process.returncode is None else 0

    @property
    def _apart(self) -> bool:
        """Whether the hub has a door of its own."""
        return self._door != Door()

    def _configuration(self) -> str:
        door = self._door
        lines = [f"listener {self.port} {self.host}"]
        if door.cert_file:
            lines += [f"certfile {Path(door.cert_file).resolve()}", f"keyfile {Path(door.key_file).resolve()}", "tls_version tlsv1.2"]
        if door.client_ca_file:
            lines += [f"cafile {Path(door.client_ca_file).resolve()}", "require_certificate true", "use_identity_as_username true"]
        if self._apart:
            lines.append(f"listener {self.inside[1]} {self.inside[0]}")
        lines += [
            "set_tcp_nodelay true",  # without it p50 rose from 0.4 to 15-23 ms
            "max_inflight_messages 1000", "max_queued_messages 10000", f"max_packet_size {BROKER_PACKET_BYTES}", "persistence true",
            f"persistence_location {self._data_dir}/", "autosave_interval 60", "persistent_client_expiration 7d", "log_dest stderr",
            "log_type error", "log_type warning", f"allow_anonymous {'false' if door.guards else 'true'}",
        ]
        if door.guards:
            lines.append(f"password_file {self._data_dir}/passwords")
        if door.client_ca_file:
            lines.append(f"acl_file {self._data_dir}/topics")
        if os.getuid() == 0:
            lines.append("user root")  # or it drops to a user that cannot write data_dir
        return "\n".join(lines) + "\n"

    def _write(self) -> None:
        """What it is started with. Raises `BrokerError`."""
        self._data_dir.mkdir(parents=True, exist_ok=True)
        if self._door.guards:
            _put(self._data_dir / "passwords", f"{self._known()}{self.username}:{hashed(self.password)}\n")
        if self._door.client_ca_file:
            _put(self._data_dir / "topics", f"user {self.username}\ntopic readwrite #\n\n{TOPICS}")
        _put(self._data_dir / "mosquitto.conf", self._configuration())

    def _known(self) -> str:
        """Lines of the password file that was given."""
        if not (path := self._door.password_file):
            return ""
        try:
            text = Path(path).read_text()
        except (OSError, ValueError) as error:
            raise BrokerError("broker.password_file", f"{path} cannot be read ({getattr(error, 'strerror', None) or error})", "make it by mosquitto_passwd, readable by the hub's user") from None
        lines = [line for line in text.splitlines() if line.strip()]
        if odd := next((line for line in lines if line.count(":") != 1 or not line.partition(":")[2].startswith("$")), None):
            raise BrokerError("broker.password_file", f"{path}: {odd.partition(':')[0][:40]!r} has no hashed password", f"mosquitto_passwd -U {path}")
        return "".join(f"{line}\n" for line in lines)

    async def reload(self) -> None:
        """Take passwords and certificates anew. Raises `BrokerError`; then all is as it was."""
        self._write()
        if self.pid:
            # It reads passwords at SIGHUP; certificates, by version, or not: it is started again then, and edges come back as after any cut.
            os.kill(self.pid, signal.SIGTERM if self._door.cert_file else signal.SIGHUP)

    async def start(self) -> None:
        """Start and wait until it listens; raises `BrokerError`."""
        chosen = self.port == 0
        if not chosen:
            self._claim()
        for attempt in range(3):
            if chosen:
                self.port = free_port(self.host)
            self.inside = ("127.0.0.1", free_port("127.0.0.1")) if self._apart else (self.host, self.port)
            self._write()
            await self._spawn()
            if await self._listening():
                break
            status = self._process.returncode if self._process is not None else None
            if not (chosen or self._apart) or attempt == 2:
                await self.close()
                raise BrokerError("broker.port", f"mosquitto does not listen on {authority(self.host, self.port)} (status {status})", "choose another port, or 0; its words are above")
        self._task = asyncio.get_running_loop().create_task(self._supervise(), name="mosquitto")

    def _claim(self) -> None:
        """A stranger who listens there would pass for our broker when it is looked for."""
        with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((self.host, self.port))
            except OSError as error:
                raise BrokerError("broker.port", f"{authority(self.host, self.port)} cannot be listened on: {error}", "choose another port, or 0") from None

    async def _spawn(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            self._program, "-c", str(self._data_dir / "mosquitto.conf"), stdin=asyncio.subprocess.DEVNULL, preexec_fn=_die_with_parent,
            env={name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},  # it would tell systemd that the hub is ready
        )

    async def _listening(self) -> bool:
        loop = asyncio.get_running_loop()
        end = loop.time() + READY_TIMEOUT_S
        while loop.time() < end and self._process is not None and self._process.returncode is None:
            try:
                for host, port in {(self.host, self.port), self.inside}:
                    _, writer = await asyncio.open_connection(host, port)
                    writer.close()
            except OSError:
                await asyncio.sleep(0.02)
                continue
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
                await asyncio.sleep(random.random() * min(RESTART_CAP_S, RESTART_BASE_S * 2 ** min(failures, DOUBLINGS_MAX)))
            self.restarts += 1
            try:
                await self._spawn()
            except OSError as error:  # no memory, or the program is just being replaced
                log.error("mosquitto cannot be started: %s; trying again", error)
                self._process = None

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
