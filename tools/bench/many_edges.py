"""Many edges at one hub: all come at once, work, lose the broker, lose the hub; how long until each has its hub again and all that it wrote is there, and what the hub takes for it.

Hub and its supervised mosquitto are as they are deployed; the edges are agents' own runtimes with journals and links of their own, `--edges` of them in `--processes` processes (`many_edges_side`), journals in memory.
With `--tls` as off loopback: edges, broker, API and hub speak TLS, and each edge shows a certificate of its own, which the hub's authority has given.
Broker and hub are killed (SIGKILL); the broker is started again by the hub, the hub by this program after two seconds. A phase ends when every edge is linked and the hub has all records but those of the last moments; at
the end, with no more readings, every record of every journal is compared with the hub's rows by content.
"""

import contextlib
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from tests.integration.certificates import Authority
from tools.demo import compare
from tools.novactl.client import Api, CommandError

from .harness import ROOT, Stolen, arguments, die_with_parent, free_port, machine, memory_of, note, percentile, report, stop
from .many_edges_side import AUTHORITY, name_of

EDGES, PROCESSES = 1000, 4
EVERY_S = 5.0
"""Seconds between two readings of an edge: a thousand edges are 200 readings a second."""

PHASE_S = 120.0
"""A phase that takes longer has failed."""

LOOK_S = 0.25
LATE = 3
"""Records of an edge that may be on their way while it works, on average."""

BACK_S = 60.0
"""The bar: every edge has its hub again, and the hub all that they wrote, so long after broker or hub were killed."""


class Sides:
    """The processes with the edges."""

    def __init__(self, options: Any, folder: Path, port: int, certificates: Path | None) -> None:
        share, more = divmod(options.edges, options.processes)
        self.processes, first = [], 0
        for number in range(options.processes):
            count = share + (number < more)
            command = [
                sys.executable, "-OO", "-m", "tools.bench.many_edges_side", "--first", str(first), "--count", str(count), "--folder", str(folder), "--port", str(port), "--every", str(options.every),
                "--certificates", str(certificates or ""),
            ]
            self.processes.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=die_with_parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            first += count

    def ask(self, word: str) -> dict[str, int]:
        """The sum of what they say."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(word + "\n")
            process.stdin.flush()
        total = {"linked": 0, "waiting": 0, "readings": 0}
        for process in self.processes:
            assert process.stdout is not None
            for name, value in json.loads(process.stdout.readline()).items():
                total[name] += value
        return total

    def close(self) -> None:
        for process in self.processes:
            stop(process, 30)


class Hub:
    """The hub under measurement."""

    def __init__(self, folder: Path, files: int = 0, certificates: Path | None = None) -> None:
        """`files`: how many it may have open unless it asks for more; 0: as here. `certificates`: the folder of them, where TLS is spoken."""
        self._files, self._certificates = files, certificates
        self.folder, self.port, self.broker_port = folder, free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.api = Api("")

    def start(self) -> None:
        """Until its API answers."""
        command = [sys.executable, "-m", "hub", "--data-dir", str(self.folder), "--listen", f"127.0.0.1:{self.port}", "--broker", "mosquitto", "--broker-listen", f"127.0.0.1:{self.broker_port}"]
        if self._certificates is not None:
            cert, key = (str(self._certificates / f"hub.{ending}") for ending in ("pem", "key"))
            command += ["--tls-cert", cert, "--tls-key", key, "--broker-client-ca", str(self._certificates / f"{AUTHORITY}.pem")]
        with (self.folder.parent / "hub.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=self._as_child, stdout=log, stderr=log)
        end = time.monotonic() + PHASE_S
        while time.monotonic() < end:
            with contextlib.suppress(CommandError, OSError):
                self.api = Api(f"{'https' if self._certificates else 'http'}://127.0.0.1:{self.port}", (self.folder / "token").read_text().strip())
                if self.api.get("/readyz")["ready"]:
                    return
            time.sleep(0.05)
        raise TimeoutError(f"the hub did not start: {(self.folder.parent / 'hub.log').read_text()[-1000:]}")

    def _as_child(self) -> None:
        die_with_parent()
        if self._files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (self._files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    def kill(self) -> None:
        """SIGKILL; its broker goes with it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def broker(self) -> int:
        """The broker's pid."""
        assert self.process is not None
        for child in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in child.read_text().split():
                if "mosquitto" in Path(f"/proc/{pid}/comm").read_text():
                    return int(pid)
        raise ProcessLookupError("the hub has no broker")

    def seconds(self) -> float:
        """Of the processors, so far."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def level(options: Any, hub: Hub, sides: Sides) -> bool:
    """Whether every edge has its hub, by its own word and the hub's, and the hub nearly all that they wrote."""
    told = sides.ask("state")
    with contextlib.suppress(CommandError, OSError):
        return bool(told["linked"] == options.edges and told["waiting"] <= LATE * options.edges and hub.api.get("/api/v1/status")["edges_online"] == options.edges)
    return False


def away(sides: Sides, options: Any) -> None:
    """Until an edge has noticed that the broker is gone."""
    end = time.monotonic() + PHASE_S
    while sides.ask("state")["linked"] == options.edges and time.monotonic() < end:
        time.sleep(0.01)


def until_level(options: Any, hub: Hub, sides: Sides, what: str) -> float:
    """Seconds until then. Raises TimeoutError."""
    began = time.monotonic()
    while not level(options, hub, sides):
        if time.monotonic() - began > PHASE_S:
            with contextlib.suppress(CommandError, OSError):
                what += f" ({hub.api.get('/api/v1/status')['edges_online']} online at the hub)"
            raise TimeoutError(f"{what}: not all edges were back after {PHASE_S:.0f} s: {sides.ask('state')}; {(hub.folder.parent / 'hub.log').read_text()[-1500:]}")
        time.sleep(LOOK_S)
    took = time.monotonic() - began
    note(options, f"{what}: {took:.1f} s")
    return round(took, 2)


def answers(hub: Hub) -> dict[str, float]:
    """Milliseconds of what the admin page asks for, the least of five."""
    found = {}
    for path in ("/api/v1/status", "/api/v1/edges", "/api/v1/hierarchy", "/api/v1/decisions?limit=50", "/api/v1/events?limit=30"):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            hub.api.get(path)
            times.append(time.perf_counter() - began)
        found[path] = round(min(times) * 1e3, 1)
    return found


def delays(hub: Hub, since_ms: int, until_ms: int) -> dict[str, float]:
    """Seconds from a decision's own time to the hub's receipt of it, of those in a span; both clocks are this machine's."""
    with contextlib.closing(sqlite3.connect(f"file:{hub.folder / 'hub.db'}?mode=ro", uri=True)) as connection:
        rows = [row[0] / 1e3 for row in connection.execute("SELECT received - wall FROM records WHERE stream='decision' AND wall BETWEEN ? AND ?", (since_ms, until_ms))]
    return {"decisions": len(rows), "p50_s": round(percentile(rows, 0.5), 3), "p99_s": round(percentile(rows, 0.99), 3), "most_s": round(max(rows, default=0), 3)}


@contextlib.contextmanager
def fabric(options: Any) -> Iterator[tuple[Hub, Sides, Path]]:
    """Hub and edges; ended afterwards."""
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".many-") as home, tempfile.TemporaryDirectory(dir="/dev/shm", prefix="many-") as journals:
        (Path(home) / "hub").mkdir()
        certificates = None
        if options.tls:
            certificates = Path(home) / "certificates"
            authority = Authority(certificates, AUTHORITY)
            for name in ("hub", *(name_of(number) for number in range(options.edges))):
                authority.gives(name)
            os.environ["NOVACRON_CA_FILE"] = str(authority.ca)
            note(options, f"{options.edges} certificates have been made")
        hub = Hub(Path(home) / "hub", options.files, certificates)
        hub.start()
        sides = None
        try:
            sides = Sides(options, Path(journals), hub.broker_port, certificates)
            yield hub, sides, Path(journals)
        finally:
            if sides is not None:
                sides.close()
            if hub.process is not None:
                stop(hub.process, 30)


def run(options: Any) -> dict[str, Any]:
    """All phases; the findings."""
    found: dict[str, Any] = {}
    with fabric(options) as (hub, sides, journals):
        found["came_s"] = until_level(options, hub, sides, "all have come")
        assert hub.process is not None
        spent, began, began_ms, readings = hub.seconds(), time.monotonic(), int(time.time() * 1000), sides.ask("state")["readings"]
        time.sleep(options.seconds)
        passed, ended_ms = time.monotonic() - began, int(time.time() * 1000)
        found["readings_per_second"] = round((sides.ask("state")["readings"] - readings) / passed, 1)
        found["hub_processor_share"] = round((hub.seconds() - spent) / passed, 3)
        found["answers_ms"] = answers(hub)
        found["delay"] = delays(hub, began_ms, ended_ms - 2000)
        os.kill(hub.broker(), signal.SIGKILL)
        away(sides, options)
        found["broker_back_s"] = until_level(options, hub, sides, "the broker was killed; all are back")
        found["broker_restarts"] = hub.api.get("/api/v1/status")["broker"]["restarts"]
        hub.kill()
        time.sleep(2)
        hub.start()
        found["hub_back_s"] = until_level(options, hub, sides, "the hub was killed; all are back")
        found["hub_rss_mb"], found["broker_rss_mb"] = round(memory_of(hub.process.pid).rss / 1e6, 1), round(memory_of(hub.broker()).rss / 1e6, 1)
        sides.ask("quiet")
        end = time.monotonic() + PHASE_S
        while sides.ask("state")["waiting"] and time.monotonic() < end:
            time.sleep(LOOK_S)
        found["left"] = sides.ask("state")["waiting"]
        outages = hub.api.get("/api/v1/outages?hours=1")
        found["outages"], found["outages_open"] = len(outages), sum(one["end_ms"] is None for one in outages)
        sides.ask("end")
        for process in sides.processes:
            process.wait(60)
        total = {"lost": 0, "duplicated": 0, "compared": 0}
        for folder in sorted(journals.iterdir()):
            for name, value in compare(folder, hub.folder, folder.name).items():
                total[name] += value
        found |= total
    return found


def main() -> int:
    parser = arguments(__doc__, seconds=30, rounds=1)
    parser.add_argument("--edges", type=int, default=EDGES)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between two readings of an edge")
    parser.add_argument("--files", type=int, default=1024, help="files that the hub may have open unless it asks for more; 1,024 are a login's, 0: as here")
    parser.add_argument("--tls", action="store_true", help="all speak TLS, and each edge has a certificate of its own (needs openssl)")
    options = parser.parse_args()
    about, stolen = machine(), Stolen()
    found = run(options)
    worst = max(found["broker_back_s"], found["hub_back_s"])
    ok = found["lost"] == found["duplicated"] == found["left"] == 0 and found["compared"] > options.edges and worst <= BACK_S
    return report(
        options, about, f"{options.edges} edges at one hub{', over TLS' if options.tls else ''}: all are back, and all they wrote is there, {BACK_S:.0f} s after broker or hub were killed; nothing is lost or doubled", worst, "s", ok,
        inputs={"edges": options.edges, "seconds_between_readings": options.every, "processes": options.processes, "steady_seconds": options.seconds, "files": options.files, "tls": options.tls}, details={**found, "stolen_percent": stolen.percent()},
    )


if __name__ == "__main__":
    sys.exit(main())
