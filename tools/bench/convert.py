"""A container that becomes a micro-VM and a container again, as the same process: a Python service, and a TCP client that asks it all the time over one connection.

A round is believed only where the service finds its memory unchanged in each form (by a hash that it makes then), has answered each request once and in order (it counts them), on the connection with
which the client began, under the guest's kernel and the node's in turn. Counted is what the client sees: the longest wait for an answer during a conversion. How long a conversion takes from order to
end, with the boot of the guest, during which the service goes on, stands beside it, and what the wait is made of; also the processor's
time that the guest had for its part of it, which other load on the machine does not change.
"""

import asyncio
import itertools
import json
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from edge_runtime.workloads.conversion import hot
from edge_runtime.workloads.conversion.host import Settings
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_laying import Settings as Containers
from edge_runtime.workloads.drivers.face import Ability, Key, Order
from edge_runtime.workloads.images import ImageStore, Limits

from .container_start import layout_of
from .convert_program import PYTHON, SERVICE, files
from .harness import arguments, free_port, machine, note, report, spread

IN_S, BACK_S = 2.0, 0.3
"""Bars: what a client waits when the container goes into a guest, and when it comes back."""

PAUSE_S = 0.005
"""Between an answer and the next request."""

PATIENCE_S = 120.0
"""For one answer: the machine may be busy."""

AROUND_S = 1.0
"""The client asks for so long before and after a conversion."""

ROOT = Path(__file__).parents[2] / ".novacron"
"""Where the set-up lays CRIU and the guests' kernel."""


class Client(threading.Thread):
    """Asks one thing after the other on one connection.

    Attributes:
        waits: seconds of each answer.
        problem: what was not as it should be.
    """

    def __init__(self, line: socket.socket, answered: int) -> None:
        super().__init__(daemon=True)
        self.line, self.answered, self.waits, self.problem = line, answered, list[float](), ""
        self.stop = threading.Event()

    def run(self) -> None:
        try:
            while not self.stop.is_set() and not self.problem:
                began = time.perf_counter()
                self.ask("next")
                self.waits.append(time.perf_counter() - began)
                time.sleep(PAUSE_S)
        except OSError as error:
            self.problem = f"the connection broke: {error}"

    def ask(self, what: str) -> str:
        """One request; what came with the answer."""
        said, told = f"{what}-{self.answered + 1}" if what == "next" else what, b""
        self.line.sendall(said.encode() + b"\n")
        while not told.endswith(b"\n"):
            data = self.line.recv(65_536)
            if not data:
                raise ConnectionError("closed")
            told += data
        words = told.decode().split()
        self.answered += 1
        if told.count(b"\n") != 1 or words[0] != said or int(words[1]) != self.answered:
            self.problem = f"request {said} was answered with {told!r}, as number {self.answered}"
        return words[3] if len(words) > 3 else ""


def guest_cpu(conversions: hot.Conversions, key: Key) -> float:
    """Seconds of processor that the guest's QEMU has had; 0 where there is none."""
    return max(0, conversions.guest(key).cpu_ns()) / 1e9


async def converted(conversions: hot.Conversions, key: Key, client: Client, to: str, reached: list[tuple[str, float, float]]) -> tuple[Client, dict[str, float]]:
    """One conversion, with the client asking all the while; what it saw."""
    client.start()
    await asyncio.sleep(AROUND_S)
    reached.clear()
    began = time.perf_counter()
    await conversions.convert(key, to)
    took = time.perf_counter() - began
    await asyncio.sleep(AROUND_S)
    client.stop.set()
    await asyncio.to_thread(client.join, PATIENCE_S)
    if client.problem or client.is_alive():
        raise SystemExit(f"to {to}: {client.problem or 'no answer any more'}")
    words = ("frozen", "dumped", "restored", "passing", "ended", "went", "plugged")
    parts = {f"{word}_s": at - before for (_, before, _), (word, at, _) in itertools.pairwise(reached) if word in words}
    parts |= {f"{word}_guest_cpu_s": cpu - before for (_, _, before), (word, _, cpu) in itertools.pairwise(reached) if word in (("restored",) if to == "microvm" else ("dumped",))}
    return Client(client.line, client.answered), {"wait_s": max(client.waits), "order_to_end_s": took, "requests": len(client.waits), **parts}


async def round_of(folder: Path, criu: str, kernel: str, blocks: int, options: Any) -> dict[str, dict[str, float]]:
    """One container, into a guest and back."""
    store = ImageStore(folder / "images", limits=Limits(keep_free=0))
    store.add(layout_of(folder / "image", files()), "service:1")
    driver = ContainerDriver(folder, store, Containers(criu=criu))
    reached: list[tuple[str, float, float]] = []
    key, port = Key(f"bench-convert-{os.getpid()}", 1), free_port()
    conversions = hot.Conversions(folder, driver, store, Settings(kernel=kernel), lambda word: reached.append((word, time.perf_counter(), guest_cpu(conversions, key))))
    try:
        told = await driver.probe()
        if not told.can(Ability.CHECKPOINT):
            raise SystemExit(f"no checkpoints can be taken here: {told.cannot[Ability.CHECKPOINT]}")
        spec = {"command": [PYTHON, "-S", "-c", SERVICE], "env": {"BLOCKS": str(blocks)}, "limits": {"memory": "64Mi"}, "network": {"ports": [{"port": 80, "host_port": port}]}}
        await conversions.prepare(Order(key, "service:1", {"disk": 64 << 20}, spec))
        await conversions.start(key)
        end = time.monotonic() + PATIENCE_S
        while b"ready" not in (await conversions.logs(key, 4096)).stdout:
            if time.monotonic() > end:
                raise SystemExit("the service did not start")
            await asyncio.sleep(0.02)
        line = await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port), PATIENCE_S)
        client = Client(line, 0)
        digest, kernels, rows = client.ask("digest"), [client.ask("kernel")], {}
        for to in ("microvm", "container"):
            client, rows[to] = await converted(conversions, key, client, to, reached)
            kernels.append(await asyncio.to_thread(client.ask, "kernel"))
            if await asyncio.to_thread(client.ask, "digest") != digest or client.problem:
                raise SystemExit(f"to {to}: {client.problem or 'its memory is not what it was'}")
            note(options, f"to {to}: {json.dumps({name: round(value, 3) for name, value in rows[to].items()})}")
        if kernels[0] != kernels[2] or kernels[1] == kernels[0]:
            raise SystemExit(f"it ran under the kernels {kernels}, not under a guest's in between")
        return rows
    finally:
        await conversions.delete(key)
        driver.close()
        store.close()


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--criu", default=str(ROOT / "criu/criu") if (ROOT / "criu/criu").exists() else "criu", help="the program")
    parser.add_argument("--guest-kernel", default=str(ROOT / "guest-kernel") if (ROOT / "guest-kernel").is_dir() else "", help="folder with the guests' kernel; empty: this machine's")
    parser.add_argument("--blocks", type=int, default=64, help="memory that the service holds, in blocks of 32 KiB")
    options = parser.parse_args()
    about = machine()
    rows = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as top:
            rows.append(asyncio.run(round_of(Path(top), options.criu, options.guest_kernel, options.blocks, options)))
    into, back = ([row[to]["wait_s"] for row in rows] for to in ("microvm", "container"))
    details = {to: {name: spread([row[to].get(name, 0.0) for row in rows]) for name in rows[0][to]} for to in ("microvm", "container")}
    ok = median(into) <= IN_S and median(back) <= BACK_S
    return report(
        options, about, "a container goes on in a micro-VM, and comes back: the longest wait of its client, on the way in", round(median(into), 3), "s", ok, spread_=spread(into),
        peer="none: no other runtime converts a running container", details={**details, "way_back_wait_s": spread(back)}, inputs={"bar_in_s": IN_S, "bar_back_s": BACK_S, "held_mib": options.blocks / 32, "accelerator": "tcg"},
    )


if __name__ == "__main__":
    sys.exit(main())
