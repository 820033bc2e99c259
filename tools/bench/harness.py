"""What every benchmark shares: the machine, the result, processes that end with us, a broker of our own."""

import argparse
import ctypes
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1


def machine() -> dict[str, Any]:
    """The machine as a reader of the figure needs it; load is that before the run."""
    model = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        model = platform.processor()
    return {
        "cpu": model, "cores": os.cpu_count(), "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1), "kernel": platform.release(),
        "arch": platform.machine(), "python": platform.python_version(), "python_from": sys.base_prefix, "load_before": round(os.getloadavg()[0], 2), "date": time.strftime("%Y-%m-%d"),
    }


class Stolen:
    """How much of the processors' time the hypervisor gave to others since this was made: what a virtual machine's latencies then show is not ours."""

    def __init__(self) -> None:
        self._before = self._read()

    @staticmethod
    def _read() -> tuple[int, int]:
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except (OSError, ValueError, IndexError):
            return 0, 0
        return ticks[7] if len(ticks) > 7 else 0, sum(ticks)

    def percent(self) -> float:
        """Percent of all processors' time; 0 where the kernel does not say."""
        (stolen, total), (stolen_before, total_before) = self._read(), self._before
        return round(100 * (stolen - stolen_before) / max(1, total - total_before), 2)


def percentile(values: Sequence[float], q: float) -> float:
    """Nearest-rank percentile; NaN for nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, int(q * len(ordered) + 0.5) - 1))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, most and count of the rounds."""
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4), "rounds": len(values)}


def arguments(description: str | None, seconds: float = 10, rounds: int = 3) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    parser.add_argument("--seconds", type=float, default=seconds, help="length of one round")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds; the median counts")
    return parser


def report(options: Any, about: dict[str, Any], promise: str, value: float, unit: str, ok: bool, *, spread_: Any = None, peer: Any = None, inputs: Any = None, details: Any = None) -> int:
    """Print the result, the JSON object last; the exit status."""
    result = {
        "promise": promise, "value": value, "unit": unit, "spread": spread_, "peer": peer, "machine": about, "inputs": inputs, "ok": bool(ok), "details": details,
    }
    if not options.json:
        print(f"{promise}: {value} {unit} {'ok' if ok else 'NOT MET'}")
        for name, part in (("spread", spread_), ("peer", peer), ("inputs", inputs), ("details", details)):
            if part is not None:
                print(f"  {name}: {json.dumps(part)}")
    print(json.dumps(result), flush=True)
    return 0 if ok else 1


def note(options: Any, text: str) -> None:
    """Progress, for people only."""
    if not options.json:
        print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident and proportional set size, bytes."""

    rss: int
    pss: int


def memory_of(pid: int) -> Memory:
    """From /proc/PID/smaps_rollup."""
    found = {"Rss": 0, "Pss": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) * 1024
    return Memory(found["Rss"], found["Pss"])


def die_with_parent() -> None:
    """For preexec_fn: what we started ends when we do."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(process: "subprocess.Popen[Any]", seconds: float = 10) -> None:
    """End a child in good order, or by force."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def wait_for_port(port: int, seconds: float = 10) -> None:
    """Until something listens; raises TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 0.5).close()
            return
        except OSError:
            time.sleep(0.02)
    raise TimeoutError(f"nothing listens on port {port}")


class Tls(NamedTuple):
    """Files (PEM): an authority, and a certificate and its key by it, which serve a broker on this machine and its clients."""

    ca: str
    cert: str
    key: str


@contextmanager
def own_tls() -> Iterator[Tls]:
    """Such, made anew."""
    from tests.integration.certificates import Authority

    if shutil.which("openssl") is None:
        raise SystemExit("this benchmark needs openssl for --tls: apt install openssl")
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder), "authority")
        yield Tls(str(authority.ca), *authority.gives("bench"))


@contextmanager
def private_mosquitto(port: int = 0, *, nodelay: bool = True, tls: "Tls | None" = None) -> Iterator[int]:
    """A mosquitto of our own on loopback; gives its port. With `tls` it asks for a certificate of that authority."""
    program = shutil.which("mosquitto") or ("/usr/sbin/mosquitto" if os.access("/usr/sbin/mosquitto", os.X_OK) else "")
    if not program:
        raise SystemExit("this benchmark needs mosquitto: apt install mosquitto")
    port = port or free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "mosquitto.conf"
        config.write_text(
            f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay {'true' if nodelay else 'false'}\nmax_inflight_messages 1000\n"
            "max_queued_messages 100000\nlog_dest none\npersistence false\n" + ("user root\n" if os.getuid() == 0 else "")
            + (f"cafile {tls.ca}\ncertfile {tls.cert}\nkeyfile {tls.key}\nrequire_certificate true\n" if tls else "")
        )
        process = subprocess.Popen([program, "-c", str(config)], preexec_fn=die_with_parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for_port(port)
            yield port
        finally:
            stop(process)
