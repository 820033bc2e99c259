"""One real agent under measurement: configured, started as it is deployed, waited for, ended."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.system.process import HEAP_TUNABLES

from .harness import ROOT, Memory, Tls, die_with_parent, free_port, memory_of, stop

DEVICE = "bench"
COMMAND_TOPIC = f"novacron/1/device/{DEVICE}/command"
TELEMETRY_TOPIC = f"novacron/1/device/{DEVICE}/telemetry"

FEATURES: dict[str, float] = {
    "cpu_ratio": 0.21, "load1_per_core": 0.4, "memory_used_ratio": 0.2, "disk_read_bytes_per_second": 0.0, "disk_write_bytes_per_second": 40960.0,
    "network_receive_bytes_per_second": 1200.0, "network_transmit_bytes_per_second": 900.0, "context_switches_per_second": 2500.0, "processes": 120.0,
}
"""A reading that the shipped model takes."""

RULE: dict[str, Any] = {
    "id": "bench", "on": {"device": DEVICE, "metric": "n"}, "trigger": "each",
    "if": {"all": [{"value": "cpu_ratio", "op": ">", "than": 0.0}, {"model": "host-anomaly", "output": 0, "op": ">=", "than": 0.0}]},
    "then": [{"command": {"device": "$device", "name": "act", "args": {"n": "$value:n"}, "expires": "60s"}}],
}
"""Fires at every reading: a threshold and the autoencoder's error decide, a command answers."""


def payload(n: int) -> bytes:
    """A device's message number `n`."""
    return json.dumps({"n": n, **FEATURES}).encode()


def number_of(message: bytes) -> int | None:
    """The number in a command's arguments."""
    try:
        return int(json.loads(message)["args"]["n"])
    except (ValueError, KeyError, TypeError):
        return None


class Agent:
    """A context manager around one agent process.

    Args:
        bus_port: the local broker.
        api: serve the local API (the lean profile does not).
        uplink_port: the hub's broker; 0 for none.
        model: `tflite`, `onnx`, `portable` or empty.
        wrap: a command to run the agent under, such as `unshare -n`.
        program: what the interpreter is given to run; a control of a test puts its planted bug there.
        tls: by which the local broker is spoken to; None for plainly.
        environment: variables besides our own; the first start of a machine whose clock is wrong is made this way.
    """

    def __init__(
        self, bus_port: int, *, api: bool = True, uplink_port: int = 0, model: str = "tflite", host: bool = True, extra: dict[str, Any] | None = None, data: Path | None = None,
        wrap: Sequence[str] = (), environment: Mapping[str, str] | None = None, program: Sequence[str] = ("-m", "edge_runtime"),
        tls: Tls | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.data = data or Path(self._folder.name) / "data"
        self.api_port = free_port() if api else 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify = str(Path(self._folder.name) / "notify")
        self._socket.bind(self._notify)
        self._socket.settimeout(60)
        config: dict[str, Any] = {
            "edge_id": "bench-edge", "data_dir": str(self.data), "bus": {"url": f"mqtt://127.0.0.1:{bus_port}", "inflight_max": 1000},
            "uplink": {"enabled": bool(uplink_port), "url": f"mqtt://127.0.0.1:{uplink_port or 1}"}, "api": {"enabled": api, "port": self.api_port},
            "devices": {"host": {"enabled": host}}, "decisions": {"rules": [RULE], "models": [f"shipped:host-anomaly/{model}"] if model else []}, "logging": {"level": "warning"},
        }
        if tls is not None:
            config["bus"] |= {"url": f"mqtts://127.0.0.1:{bus_port}", "ca_file": tls.ca, "cert_file": tls.cert, "key_file": tls.key}
        config |= extra or {}
        import yaml

        self._config = Path(self._folder.name) / "edge.yaml"
        self._config.write_text(yaml.safe_dump(config))
        self.process: subprocess.Popen[bytes] | None = None
        self._wrap = tuple(wrap)
        self._program = tuple(program)
        self._environment = dict(environment or {})
        self.heard: list[str] = []
        """What the agent told its service manager, in order."""

    def __enter__(self) -> "Agent":
        env = {**os.environ, "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": self._notify, "MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": HEAP_TUNABLES, **self._environment}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [*self._wrap, sys.executable, "-OO", "-X", "no_debug_ranges", *self._program, "run", "--config", str(self._config)]
        self.process = subprocess.Popen(command, env=env, preexec_fn=die_with_parent, cwd=ROOT)
        self.hear("READY=1")
        if self.api_port:
            self._until_ready()
        return self

    def hear(self, wanted: str) -> None:
        """Wait until the agent has told its service manager `wanted`; raises TimeoutError."""
        while not self.heard or wanted not in self.heard[-1]:
            self.heard.append(self._socket.recv(4096).decode())

    def kill(self) -> None:
        """SIGKILL: what a power cut is to the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _until_ready(self) -> None:
        import time

        end = time.monotonic() + 30
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f"http://127.0.0.1:{self.api_port}/readyz", timeout=5):
                    return
            time.sleep(0.05)
        raise TimeoutError("the agent did not get ready")

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            stop(self.process, 30)
        self._socket.close()
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        """The agent's process id."""
        if self.process is None:
            raise RuntimeError("the agent is not running")
        return self.process.pid

    def memory(self) -> Memory:
        """RSS and PSS now."""
        return memory_of(self.pid)

    def get(self, path: str) -> Any:
        """An answer of the local API."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.api_port}{path}", timeout=10) as answer:
            return json.loads(answer.read())
