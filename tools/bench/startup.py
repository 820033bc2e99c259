"""Create to the first line of the program, verified, for each driver: a container, a micro-VM, a function that is cold (its module is here and compiled, no process of it is), a function that is warm.

A cold function is laid out on the disk, its native code verified, its host and first worker forked, and its first call answered: the answer must be what the program says. A warm one answers a
call with an instance that was ready. A container is believed where its first process is the image's program. Beside that: what each driver takes of memory over the workload's own.
A micro-VM is a clone of its image's template, and believed where its first line stands in its output. Beside it: the first one of an image, for which there is only the template of its size yet; what that took
to boot and to be saved (what every micro-VM would cost without it); what the image's took to be made. Its memory over the workload's own is what each of eight takes (PSS of QEMU, the guest's pages in it, and
keeper; the program is a shell that sleeps): what they share - QEMU's program, pages of the template - is counted once for all eight. Beside it: one alone, one more beside seven, and what the templates take.
A virtual machine is believed where its serial console has the line that its first process writes once it is up, with its own name in it; a clone's name is told to it after it was copied.
The peer of the cold function is a Python process that loads the same engine and native code, and runs it once.
"""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from edge_runtime.workloads.drivers import vm
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.face import Key, Order, Phase
from edge_runtime.workloads.drivers.function import FunctionDriver
from edge_runtime.workloads.drivers.microvm import MicrovmDriver, Settings
from edge_runtime.workloads.images import ImageStore, Limits
from tools.novactl import samples
from tools.novactl.client import CommandError

from . import container_start
from .functions_image import LINE, artefact
from .harness import arguments, machine, memory_of, note, report, spread

GUEST_KERNEL = next((str(path) for path in [Path(__file__).parents[2] / ".novacron/guest-kernel"] if path.is_dir()), "")
"""What the set-up fetched, else this machine's own."""

BUSYBOX = Path("/bin/busybox")

COLD, WARM = 20, 500
"""Functions, and calls, of a round."""

PEERS = 5

MICROVMS = 8
"""Micro-VMs of a round, one after the other: a clone has QEMU and a guest's start to itself, as on a node that is not just booting."""

VMS_COLD, VMS_CLONED = 2, 8
"""Virtual machines of a round, one after the other."""

BAR_MS = {"function cold": 10.0, "function warm": 1.0, "container": 50.0, "micro-VM": 250.0, "VM cold": 5000.0, "VM from template": 150.0}

MICROVM_BAR_MB = 40 * 1.048576
"""Of one micro-VM over the workload's own memory: 40 MiB."""

SETTLED_S = 0.5
"""Before a guest's memory is looked at: what its start began is over then."""

_PEER = """
import sys, wasmtime
from edge_runtime.workloads.drivers.function_worker import Kept, Program, engine
own, kept = engine(), Kept(100)
Program(own, wasmtime.Module.deserialize(own, open(sys.argv[1], "rb").read()), [], [], 1 << 20, 100).ready(kept.say).run(b"")
sys.stdout.buffer.write(kept.parts[0])
"""


async def functions(driver: FunctionDriver) -> dict[str, Any]:
    """One round: ms of each cold start and its parts, of each warm call, MB."""
    rows: dict[str, Any] = {"function cold": [], "prepare": [], "start": [], "call": [], "function warm": []}
    keys = [Key(f"cold-{number}", 1) for number in range(COLD)]
    keep = Key("keep", 1)
    try:
        for key in (keep, *keys):  # the first one has the spawner started, which stays while there are functions
            times = [time.perf_counter()]
            await driver.prepare(Order(key, "line:1", {}, {"limits": {"memory": "1Mi"}, "concurrency": 1}))
            times.append(time.perf_counter())
            status = await driver.start(key)
            times.append(time.perf_counter())
            answer = await driver.call(key.id, b"")
            times.append(time.perf_counter())
            if answer.stdout != LINE or not status.pid:
                raise RuntimeError(f"it did not run: {answer}")
            if key is keep:
                rows["with the spawner's own start"] = (times[-1] - times[0]) * 1000
                continue
            rows["function cold"].append((times[-1] - times[0]) * 1000)
            for name, begin, end in zip(("prepare", "start", "call"), times, times[1:], strict=False):
                rows[name].append((end - begin) * 1000)
        for _ in range(WARM):
            began = time.perf_counter()
            answer = await driver.call("keep", b"")
            rows["function warm"].append((time.perf_counter() - began) * 1000)
            if answer.stdout != LINE or answer.cold:
                raise RuntimeError(f"it did not run, or was not warm: {answer}")
        rows["pss_mb"] = [(await driver.stats(key)).memory_bytes / 1e6 for key in keys]
        assert driver._spawner is not None
        rows["spawner"] = memory_of(driver._spawner[0].pid)
        rows["host"] = memory_of((await driver.status(keys[0])).pid)
    finally:
        for key in (keep, *keys):
            await driver.delete(key)
    return rows


async def microvm(driver: MicrovmDriver, key: Key) -> tuple[float, float, float]:
    """Start one: ms of its preparation, its start, and all until its first line stands in its output."""
    began = time.perf_counter()
    await driver.prepare(Order(key, "box:1", {}, {"limits": {"memory": "64Mi"}, "command": ["/busybox", "sh", "-c", "echo first; exec /busybox sleep 1000"]}))
    laid = time.perf_counter()
    await driver.start(key)
    started = time.perf_counter()
    while (await driver.logs(key, 100)).stdout != b"first\n":
        if (await driver.status(key)).phase is not Phase.RUNNING:
            raise RuntimeError(f"it did not run: {await driver.status(key)}")
        await asyncio.sleep(0.001)
    return (laid - began) * 1000, (started - laid) * 1000, (time.perf_counter() - began) * 1000


async def microvms(driver: MicrovmDriver) -> dict[str, Any]:
    """One round: ms of each start from its document to the first line in its output; MB of QEMU and keeper while the program sleeps, of one alone and of each of eight, and what they are made of."""
    rows: dict[str, Any] = {"micro-VM": [], "prepare": [], "start": []}
    key = Key("bench", 1)
    try:
        rows["first of its image"] = (await microvm(driver, key))[2]
        await driver.settled()
    finally:
        await driver.delete(key)
    for _ in range(MICROVMS):
        try:
            prepared, started, line = await microvm(driver, key)
            rows["prepare"].append(prepared)
            rows["start"].append(started)
            rows["micro-VM"].append(line)
        finally:
            await driver.delete(key)
    keys = [Key(f"bench-{number}", 1) for number in range(MICROVMS)]
    try:
        taken: list[float] = []
        for key in keys:
            await microvm(driver, key)
            await asyncio.sleep(SETTLED_S)
            found = [_memory((await driver.status(one)).pid, driver.folder(one)) for one in keys[: len(taken) + 1]]
            taken.append(sum(one["pss_mb"] for one in found))
            if len(taken) == 1:
                rows["alone"] = found[0]
        rows["each"] = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
        rows["one more"] = (taken[-1] - taken[0]) / (len(taken) - 1)
    finally:
        for key in keys:
            await driver.delete(key)
    return rows


async def vms(driver: vm.VmDriver) -> dict[str, Any]:
    """One round: ms of each start from its document to the line on its console that has its name; of clones also MB, as for micro-VMs."""
    rows: dict[str, Any] = {"VM cold": [], "VM from template": [], "prepare": [], "start": [], "pss_mb": [], "anonymous_mb": [], "guest_mb": [], "keeper_mb": []}
    for number in range(VMS_COLD + 1 + VMS_CLONED):
        key, cloned = Key(f"bench-{number}", 1), number >= VMS_COLD
        try:
            began = time.perf_counter()
            await driver.prepare(Order(key, samples.NAMES["vm"], {"memory": 128 << 20}, {"template": cloned}))
            laid = time.perf_counter()
            status = await driver.start(key)
            started = time.perf_counter()
            while f"hello from {key.id},".encode() not in (await driver.logs(key, 4096)).stdout:
                if (await driver.status(key)).phase is not Phase.RUNNING:
                    raise RuntimeError(f"it did not run: {await driver.status(key)}")
                await asyncio.sleep(0.001)
            if number == VMS_COLD:  # with its template's own boot
                continue
            rows["VM from template" if cloned else "VM cold"].append((time.perf_counter() - began) * 1000)
            if cloned:
                rows["prepare"].append((laid - began) * 1000)
                rows["start"].append((started - laid) * 1000)
                for name, value in _memory(status.pid, driver.folder(key)).items():
                    rows[name].append(value)
        finally:
            await driver.delete(key)
    return rows


def _memory(pid: int, folder: Path) -> dict[str, float]:
    """MB of a QEMU and its keeper, and what they are made of."""
    rollup = {name: int(rest.split()[0]) / 1000 for name, _, rest in (line.partition(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])}
    keeper = memory_of(json.loads((folder / "running.json").read_text())["keeper"]).pss / 1e6
    return {"pss_mb": rollup["Pss"] * 1.024 + keeper, "anonymous_mb": rollup["Pss_Anon"] * 1.024, "guest_mb": rollup["Pss_Shmem"] * 1.024, "keeper_mb": keeper}


PARTS = {"pss_mb": "QEMU and keeper, pss", "anonymous_mb": "of that QEMU's own and pages that the guest wrote", "guest_mb": "of that shared with the template", "keeper_mb": "of that the keeper"}


def _parts(rows: list[dict[str, float]]) -> dict[str, Any]:
    """What memory is made of, over rounds."""
    return {said: spread([row[part] for row in rows]) for part, said in PARTS.items()}


def alone(code: Path) -> list[float]:
    """The peer: ms."""
    found = []
    for _ in range(PEERS):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", _PEER, str(code)], check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
        found.append((time.perf_counter() - began) * 1000)
        if done.stdout != LINE:
            raise RuntimeError("the peer did not run")
    return found


async def all_rounds(options: Any, folder: Path, store: ImageStore) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str], list[float]]:
    """Rounds by driver, the reasons of drivers that cannot be used here, the peer."""
    found: dict[str, list[dict[str, Any]]] = {"function": [], "container": [], "micro-VM": [], "VM": []}
    cannot, peer = {}, []
    driver = FunctionDriver(folder, store)
    told = await driver.probe()
    if told.usable:
        for number in range(options.rounds):
            found["function"].append(await functions(driver))
            row = found["function"][-1]
            note(options, f"round {number + 1}: cold median {median(row['function cold']):.1f} ms, least {min(row['function cold']):.1f} ms; warm median {median(row['function warm']):.2f} ms")
        peer = await asyncio.to_thread(alone, next(folder.glob(f"functions/.code/{store.find('line:1').config.diff_ids[0]}*.code")))
    else:
        cannot["function"] = told.to_json()["cannot"]["start"]
    driver.close()
    containers = ContainerDriver(folder, store)
    told = await containers.probe()
    if told.usable:
        for number in range(options.rounds):
            found["container"].append(await container_start.measure(containers))
            note(options, f"round {number + 1}: container median {median(found['container'][-1]['start_s']) * 1000:.0f} ms")
    else:
        cannot["container"] = told.to_json()["cannot"]["start"]
    containers.close()
    guests = MicrovmDriver(folder, store, Settings(kernel=options.guest_kernel))
    told = await guests.probe()
    if told.usable:
        for number in range(options.rounds):
            found["micro-VM"].append({**await microvms(guests), "cold_s": guests.template_s, "templates": guests.templates(), "runtime": told.runtime})
            note(options, f"round {number + 1}: micro-VM median {median(found['micro-VM'][-1]['micro-VM']):.0f} ms, least {min(found['micro-VM'][-1]['micro-VM']):.0f} ms")
    else:
        cannot["micro-VM"] = told.to_json()["cannot"]["start"]
    guests.close()
    machines = vm.VmDriver(folder, store, vm.Settings(kernel=options.guest_kernel))
    told = await machines.probe()
    if told.usable:
        for number in range(options.rounds):
            found["VM"].append({**await vms(machines), "runtime": told.runtime})
            note(options, f"round {number + 1}: VM cold least {min(found['VM'][-1]['VM cold']):.0f} ms; from template median {median(found['VM'][-1]['VM from template']):.0f} ms, least {min(found['VM'][-1]['VM from template']):.0f} ms")
    else:
        cannot["VM"] = told.to_json()["cannot"]["start"]
    machines.close()
    return found, cannot, peer


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--guest-kernel", default=GUEST_KERNEL, help="folder with boot/ and lib/modules/ of the kernel that guests boot")
    options = parser.parse_args()
    about = machine()
    if importlib.util.find_spec("wasmtime") is None:
        raise SystemExit("no wasmtime (pip install '.[functions]')")
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        store = ImageStore(folder / "images", limits=Limits(keep_free=0), own=os.geteuid() == 0)
        store.add(artefact(folder / "module"), "line:1")
        store.add(container_start.image(folder / "image"), "bench:1")
        if BUSYBOX.exists():
            store.add(container_start.layout_of(folder / "box", {"busybox": BUSYBOX.read_bytes()}), "box:1")
        try:
            store.add(samples.make("vm", folder / "vm", options.guest_kernel))
        except CommandError as error:
            note(options, f"no sample of a virtual machine: {error}")
        found, cannot, peer = asyncio.run(all_rounds(options, folder, store))
        store.close()
    times: dict[str, list[list[float]]] = {name: [row[name] for row in found["function"]] for name in ("function cold", "function warm")}
    times["container"] = [[second * 1000 for second in row["start_s"]] for row in found["container"]]
    times["micro-VM"] = [row["micro-VM"] for row in found["micro-VM"]]
    times |= {name: [row[name] for row in found["VM"]] for name in ("VM cold", "VM from template")}
    told: dict[str, dict[str, Any]] = {
        name: {"median": spread([median(row) for row in rows]), "least": round(min(min(row) for row in rows), 3), "worst": round(max(max(row) for row in rows), 3), "bar": BAR_MS[name],
               "ok": median([median(row) for row in rows]) <= BAR_MS[name]}
        for name, rows in times.items() if rows
    }
    ok = len(told) == len(BAR_MS) and all(entry["ok"] for entry in told.values())
    details: dict[str, Any] = {"ms": told, "cannot": cannot}
    if functions_rows := found["function"]:
        details["function cold, its parts, median ms"] = {name: spread([median(row[name]) for row in functions_rows]) for name in ("prepare", "start", "call")}
        details["first function of a node, ms"] = spread([row["with the spawner's own start"] for row in functions_rows])
        last = functions_rows[-1]
        details["memory over the workload's own, MB"] = {
            "function: host and one worker, pss": spread([median(row["pss_mb"]) for row in functions_rows]), "of that the host, rss": round(last["host"].rss / 1e6, 1), "spawner, one for all, pss": round(last["spawner"].pss / 1e6, 1),
            "spawner, rss": round(last["spawner"].rss / 1e6, 1), "container: keeper, pss": spread([median(row["keeper_pss_mb"]) for row in found["container"]]) if found["container"] else None,
        }
    for name, guests in (("micro-VM", found["micro-VM"]), ("VM", found["VM"])):
        if not guests:
            continue
        details[name] = {"with": guests[0]["runtime"], "from template, parts, median ms": {part: spread([median(row[part]) for row in guests]) for part in ("prepare", "start")}}
        if name == "VM":
            details[name]["memory over the workload's own, MB"] = _parts([{part: median(row[part]) for part in PARTS} for row in guests])
            continue
        each = _parts([row["each"] for row in guests])
        fine = each["QEMU and keeper, pss"]["median"] <= MICROVM_BAR_MB
        ok = ok and fine
        details[name] |= {
            "first of its image, ms": spread([row["first of its image"] for row in guests]), "cold (boot of the template of its size), ms": round(guests[0]["cold_s"] * 1000),
            "memory over the workload's own, MB": {
                f"each of {MICROVMS}": each, "bar": round(MICROVM_BAR_MB, 1), "ok": fine, "one more": spread([row["one more"] for row in guests]), "one alone": _parts([row["alone"] for row in guests]),
                "templates, once for all": guests[-1]["templates"],
            },
        }
    return report(
        options, about, "create to the first line of the program, a cold function, median", told["function cold"]["median"]["median"] if "function cold" in told else -1.0, "ms", ok,
        spread_=told.get("function cold", {}).get("median"), peer={"python, the engine and the same native code, ms": round(median(peer), 1)} if peer else None,
        inputs={"cold": COLD * options.rounds, "warm": WARM * options.rounds, "containers": container_start.STARTS * options.rounds}, details=details,
    )


if __name__ == "__main__":
    sys.exit(main())
