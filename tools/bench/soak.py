"""The agent under load while its link goes up and down all the time: its memory must not grow.

The uplink is cut or held every few seconds (a cut resets connections, a hold lets no byte pass), so that an hour here has more reconnections than a
year in the field. RSS is read once a second; the first part is left out, and the slope of the rest is Theil-Sen's with its 95 % interval. It is not
met where the whole interval lies above the bar. Open files are counted as well: they leak the same way.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from tools.demo import ask, until
from tools.faultproxy import FaultProxy
from tools.novactl.client import Api

from ..ending import ended
from .agent import Agent
from .harness import ROOT, arguments, die_with_parent, free_port, machine, memory_of, note, private_mosquitto, report
from .outage import Device
from .slope import POINTS_MIN, Slope, blocks, theil_sen

MINUTES = 20.0
WARM_SHARE = 0.35
"""What is left out at the start: caches, the WAL's index and the interpreter's arenas fill in the first minutes."""

BAR_KIB_PER_HOUR = 1024.0
"""More than this is a leak. An hour of this flapping has over a thousand reconnections: it is less than one KiB each, which at one reconnection an
hour would be 24 KiB a day. The noise of RSS (whole arenas come and go) lets 20 minutes see no less."""

RATE = 50.0
"""Readings, and so decisions, per second."""

UP_S, DOWN_S = (0.8, 2.5), (0.2, 1.2)
"""Least and most seconds that the link is up, and down."""

BLOCK_S = 10.0
"""Length of the stretches whose medians are the points of the slope."""

SAMPLE_S = 1.0
FILES_MORE = 4
"""Open files that the second half may have more than the first: connections come and go."""


@dataclass(slots=True)
class Samples:
    """(seconds, KiB) of RSS and of its anonymous part (heap and stacks, without pages of files), and (seconds, count) of open files."""

    rss: list[tuple[float, float]] = field(default_factory=list)
    anonymous: list[tuple[float, float]] = field(default_factory=list)
    files: list[tuple[float, float]] = field(default_factory=list)

    def take(self, pid: int, at_s: float) -> None:
        """Look at a process once."""
        self.rss.append((at_s, memory_of(pid).rss / 1024))
        self.anonymous.append((at_s, anonymous_kib(pid)))
        self.files.append((at_s, float(len(os.listdir(f"/proc/{pid}/fd")))))

    def slope(self, warm_s: float, block_s: float = BLOCK_S) -> Slope:
        """KiB per hour after `warm_s`."""
        return per_hour(self.rss, warm_s, self.rss[-1][0] + 1, block_s)

    def thirds(self, warm_s: float) -> list[dict[str, float]]:
        """KiB per hour of RSS and of its anonymous part in each third after `warm_s`: what only fills up flattens, a leak does not. Empty where a third is too short."""
        length = (self.rss[-1][0] + 1 - warm_s) / 3
        if length < (POINTS_MIN + 1) * BLOCK_S:
            return []
        spans = [(warm_s + part * length, warm_s + (part + 1) * length) for part in range(3)]
        return [{"rss": round(per_hour(self.rss, *span).value, 1), "anonymous": round(per_hour(self.anonymous, *span).value, 1)} for span in spans]

    def files_grown(self, warm_s: float) -> float:
        """Open files in the last quarter above those in the first after `warm_s`: least of each, which a passing connection does not touch."""
        counts = [count for at_s, count in self.files if at_s >= warm_s]
        quarter = max(1, len(counts) // 4)
        return min(counts[-quarter:]) - min(counts[:quarter])


def anonymous_kib(pid: int) -> float:
    """RssAnon of a process (proc_pid_status(5))."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return float(line.split()[1])
    return 0.0


def per_hour(series: list[tuple[float, float]], first_s: float, end_s: float, block_s: float = BLOCK_S) -> Slope:
    """The slope of (seconds, KiB) from `first_s` to before `end_s`, KiB per hour."""
    found = theil_sen(blocks([(at_s, kib) for at_s, kib in series if first_s <= at_s < end_s], block_s))
    return Slope(found.value * 3600, found.low * 3600, found.high * 3600)


def leaks(slope: Slope) -> bool:
    """Whether it is certain that memory grows by more than the bar."""
    return slope.low > BAR_KIB_PER_HOUR


async def flap(proxy: FaultProxy, draw: random.Random, stop: asyncio.Event, counts: dict[str, int]) -> None:
    """Cut or hold the link, and heal it, until `stop`."""
    while not stop.is_set():
        await asyncio.sleep(draw.uniform(*UP_S))
        if draw.random() < 0.2:
            proxy.hold()
            counts["holds"] += 1
            await asyncio.sleep(draw.uniform(*DOWN_S))
            await proxy.cut()
        else:
            await proxy.cut()
            counts["cuts"] += 1
            await asyncio.sleep(draw.uniform(*DOWN_S))
        await proxy.heal()


async def soak(options: argparse.Namespace, home: Path, bus_port: int, program: Sequence[str] = ("-m", "edge_runtime"), tell: Callable[[str], None] = lambda _: None) -> tuple[Samples, dict[str, Any]]:
    """Run for `options.minutes`; the samples and how it went. `program`: what the agent's interpreter is given to run."""
    hub_port, broker_port = free_port(), free_port()
    with open(home / "hub.log", "ab") as log:
        hub = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hub", "--data-dir", str(home / "hub"), "--listen", f"127.0.0.1:{hub_port}", "--broker", "mosquitto", "--broker-listen", f"127.0.0.1:{broker_port}",
            stdout=log, stderr=log, stdin=asyncio.subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=die_with_parent,
        )
    proxy, device, stop = FaultProxy("127.0.0.1", broker_port), Device(bus_port, options.rate), asyncio.Event()
    samples, counts = Samples(), {"cuts": 0, "holds": 0}
    extra = {"uplink": {"enabled": True, "url": "", "backoff_base_s": 0.05, "backoff_cap_s": 0.3, "keepalive_s": 2}}
    agent: Agent | None = None
    tasks: list[asyncio.Task[None]] = []
    try:
        await until(lambda: ask(Api(f"http://127.0.0.1:{hub_port}"), "/readyz"), 60, "the hub's start", hub, home / "hub.log")
        await proxy.start()
        extra["uplink"]["url"] = f"mqtt://127.0.0.1:{proxy.port}"
        agent = Agent(bus_port, data=home / "edge", extra=extra, program=program)
        await asyncio.to_thread(agent.__enter__)
        tasks = [asyncio.create_task(device.run()), asyncio.create_task(flap(proxy, random.Random(options.seed), stop, counts))]
        began = time.monotonic()
        while (passed := time.monotonic() - began) < options.minutes * 60:
            samples.take(agent.pid, passed)
            if len(samples.rss) % 60 == 0:
                tell(f"{passed / 60:.0f} min: {samples.rss[-1][1] / 1024:.2f} MiB, {samples.files[-1][1]:.0f} files, {proxy.connections} connections")
            for task in tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(max(0.0, (len(samples.rss)) * SAMPLE_S - (time.monotonic() - began)))
        stop.set()
        device.stop.set()
        await asyncio.gather(*tasks)
        missing = sum(device.commands[number] == 0 for number in range(device.sent))
        return samples, {**counts, "connections": proxy.connections, "readings": device.sent, "commands_missing": missing}
    finally:
        await ended(*tasks)
        if agent is not None:
            await asyncio.to_thread(agent.__exit__)
        await proxy.close()
        if hub.returncode is None:
            hub.terminate()
            await hub.wait()


def main() -> int:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="length of the soak")
    parser.add_argument("--rate", type=float, default=RATE, help="readings per second")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    options = parser.parse_args()
    if options.minutes < 2:
        parser.error("--minutes takes 2 or more")
    options.seed = options.seed or random.SystemRandom().randrange(1, 1 << 30)
    about = machine()
    with tempfile.TemporaryDirectory() as folder, private_mosquitto() as bus_port:
        samples, went = asyncio.run(soak(options, Path(folder), bus_port, tell=lambda text: note(options, text)))
    warm_s = options.minutes * 60 * WARM_SHARE
    slope, files = samples.slope(warm_s), samples.files_grown(warm_s)
    ok = not leaks(slope) and files <= FILES_MORE and went["commands_missing"] == 0 and went["connections"] > 10
    rss = [kib for at_s, kib in samples.rss if at_s >= warm_s]
    return report(
        options, about, "memory does not grow while the link flaps under load", round(slope.value, 1), "KiB per hour (Theil-Sen)", ok,
        spread_={"low_95": round(slope.low, 1), "high_95": round(slope.high, 1)}, inputs={"minutes": options.minutes, "readings_per_second": options.rate, "seed": options.seed, "bar_kib_per_hour": BAR_KIB_PER_HOUR},
        details={**went, "rss_mib_first": round(rss[0] / 1024, 2), "rss_mib_last": round(rss[-1] / 1024, 2), "rss_mib_max": round(max(rss) / 1024, 2), "by_thirds_kib_per_hour": samples.thirds(warm_s), "open_files_grown": files, "samples": len(samples.rss)},
    )


if __name__ == "__main__":
    sys.exit(main())
