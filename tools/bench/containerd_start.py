"""How long a container under containerd takes from its document to running, and what it takes of memory beside the workload; the peer is the direct driver, start by start in the same rounds.

Each start is believed only where the driver says that it runs and its first process is the image's program. containerd is one of its own, started for this.
"""

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

if not __package__:
    __import__("as_module").again(__file__)

from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.face import Capabilities
from edge_runtime.workloads.drivers.programs import searched
from edge_runtime.workloads.images import ImageStore, Limits

from .container_start import BAR_S, LAYERS, STARTS, image, measure
from .harness import arguments, machine, memory_of, note, report, spread
from .own_containerd import Containerd

ANSWER_S = 60.0
"""containerd that does not answer by then has not come up."""


async def usable(driver: ContainerDriver) -> Capabilities:
    """Its report, once it can run something: containerd has to come up first."""
    end = time.monotonic() + ANSWER_S
    while not (told := await driver.probe()).usable:
        if time.monotonic() > end or "does not answer" not in told.to_json()["cannot"]["start"]:
            raise SystemExit(f"containers cannot be run by {told.driver} here: {told.to_json()['cannot']['start']}")
        await asyncio.sleep(0.2)
    return told


def main() -> int:
    options = arguments(__doc__).parse_args()
    for name in ("containerd", "containerd-shim-runc-v2"):
        if searched(name) is None:
            raise SystemExit(f"{name} is not installed (as root: apt install containerd)")
    before = memory_of(os.getpid()).rss
    from edge_runtime.workloads.drivers.containerd import ContainerdDriver

    loaded = memory_of(os.getpid()).rss - before
    about, one = machine(), Containerd()
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        store = ImageStore(folder / "images", limits=Limits(keep_free=0))
        store.add(image(folder / "image"), "bench:1")
        drivers = {"containerd": ContainerdDriver(folder, store, path=one.socket), "direct": ContainerDriver(folder, store)}
        rows: dict[str, list[dict[str, list[float]]]] = {name: [] for name in drivers}
        shims: list[float] = []

        async def rounds() -> Capabilities:
            told = [await usable(driver) for driver in drivers.values()]
            for number in range(options.rounds):
                for name, driver in drivers.items():
                    looking = asyncio.ensure_future(_shims(one, shims)) if name == "containerd" else None
                    rows[name].append(await measure(driver))
                    if looking is not None:
                        looking.cancel()
                    note(options, f"round {number + 1}, {name}: median {median(rows[name][-1]['start_s']) * 1000:.0f} ms, worst {max(rows[name][-1]['start_s']) * 1000:.0f} ms")
            return told[0]

        one.start()
        try:
            told = asyncio.run(rounds())
        finally:
            for driver in drivers.values():
                driver.close()
            one.remove()
            store.close()
    middle = {name: [median(row["start_s"]) for row in those] for name, those in rows.items()}
    worst = max(max(row["start_s"]) for row in rows["containerd"])
    return report(
        options, about, "container start under containerd, median of the rounds", round(median(middle["containerd"]), 4), "s", worst < BAR_S, spread_=spread(middle["containerd"]),
        peer={"direct driver, median s": round(median(middle["direct"]), 4)}, inputs={"starts": STARTS * options.rounds, "layers": LAYERS, "worst_bar_s": BAR_S},
        details={
            "worst_s": round(worst, 3), "least_s": {name: round(min(min(row["start_s"]) for row in those), 4) for name, those in rows.items()}, "shim_pss_mb": spread(shims) if shims else None,
            "keeper_pss_mb": spread([median(row["keeper_pss_mb"]) for row in rows["containerd"]]), "loaded_for_it_mb": round(loaded / 1e6, 1), "runtime": told.runtime,
        },
    )


async def _shims(one: Containerd, found: list[float]) -> None:
    """Look at the shims' memory (MB each) now and then, until cancelled."""
    while True:
        await asyncio.sleep(0.5)
        for pid in await asyncio.to_thread(one.shims):
            try:
                found.append(memory_of(pid).pss / 1e6)
            except OSError:
                continue  # it has just ended


if __name__ == "__main__":
    sys.exit(main())
