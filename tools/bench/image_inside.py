"""The agent's own promises inside a booted image: its memory after decisions, the round trip of a reading that threshold and model decide beside the broker's own, a hub that is away for a while; and that its portable evaluator
decides each reading there as TFLite does on this machine.

The machine is emulated (QEMU without KVM), for each architecture the same: what is shown is that it works there, a speed is stated for the emulated machine only. Bus and hub are on this machine, as the guest sees them.
MB are 10^6 bytes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

import yaml

from edge_runtime.decisions.models.manifest import read_manifest
from edge_runtime.decisions.models.model import load_model
from edge_runtime.desired_state import model_path
from firmware_images import recipes, tools
from firmware_images.boot import API_PORT, credentials, hand_over
from firmware_images.build import Built, current
from firmware_images.errors import FirmwareError
from firmware_images.machine import HERE, Machine, Wiring, command, prepare

from .agent import COMMAND_TOPIC, FEATURES, RULE, TELEMETRY_TOPIC, number_of
from .harness import ROOT, arguments, die_with_parent, free_port, machine, note, private_mosquitto, report, spread, stop
from .mqtt_load import Load, null_load

EDGE = "bench-edge"

RATE = 4.0
"""Readings per second: an emulated processor that others use too takes some tens of milliseconds for one decision with a model."""

DRAIN_S = 300.0
"""Longest wait for late answers at the end of a round: none is lost because the machine that emulates is busy."""

OUTAGE_S = 20.0
"""How long the hub is away."""

BOOT_S = 1800
"""Longest wait for what a start brings: half a minute on an idle core, many times that beside others."""

RSS_MB = 50.0
"""Bar: the agent's resident memory."""

LOOK_S = 0.2

TOLERANCE = 1e-3
"""Relative: TFLite works with 32 bits, the portable evaluator with 64."""

PAGE = 1000
"""Records of one answer of the hub."""


class HubProcess:
    """A hub with a broker of its own, on loopback; it may be stopped and started again on what it has."""

    def __init__(self, folder: Path) -> None:
        self.broker_port, self.port, self._data = free_port(), free_port(), folder / "hub"

    def __enter__(self) -> "HubProcess":
        line = [sys.executable, "-m", "hub", "--data-dir", str(self._data), "--listen", f"127.0.0.1:{self.port}", "--broker", "mosquitto", "--broker-listen", f"127.0.0.1:{self.broker_port}"]
        words = self._data.with_name("hub.log")
        with words.open("ab") as log:
            self._process = subprocess.Popen(line, preexec_fn=die_with_parent, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)})

        def ready() -> Any:
            if self._process.poll() is not None:  # another may have taken its port since that was free
                raise SystemExit(f"the hub ended with status {self._process.returncode}: {words.read_text(errors='replace')[-2000:]}")
            return self.get("/readyz")

        until(ready, "the hub's start", 120)
        return self

    def __exit__(self, *_: object) -> None:
        stop(self._process)

    def get(self, path: str) -> Any:
        """An answer, or None while there is none."""
        token = (self._data / "token").read_text().strip() if (self._data / "token").exists() else ""
        return answer(f"http://127.0.0.1:{self.port}{path}", token)

    def decisions(self, edge: str) -> dict[int, Any]:
        """What it has of an edge, by number."""
        found: dict[int, Any] = {}
        while more := self.get(f"/api/v1/edges/{edge}/records?stream=decision&limit={PAGE}&after={max(found, default=0)}"):
            found |= {record["seq"]: record["body"] for record in more}
        return found


def answer(url: str, token: str) -> Any:
    """JSON from there, or text; None while there is none."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}), timeout=10) as told:
            raw = told.read().decode()
    except (OSError, ValueError):
        return None
    try:
        return json.loads(raw)
    except ValueError:
        return raw


def until(check: Callable[[], Any], what: str, seconds: float = BOOT_S, running: Machine | None = None) -> Any:
    """What `check` gives, once that is something. SystemExit where it does not come, with the machine's last words."""
    end = time.monotonic() + seconds
    while not (found := check()):
        if time.monotonic() > end or (running is not None and running.ended):
            raise SystemExit(f"{what} did not come within {seconds:g} s{f':{chr(10)}{running.tail(40)}' if running is not None else ''}")
        time.sleep(LOOK_S)
    return found


def features(n: int) -> dict[str, float]:
    """Of reading `n`: each another, some of them far from all that the model has learnt."""
    return {name: value * (1 + n * (at + 3) * 7 % 50 / 10) + (n * (at + 1) % 13) / 20 for at, (name, value) in enumerate(FEATURES.items())}


def payload(n: int) -> bytes:
    """A device's message number `n`."""
    return json.dumps({"n": n, **features(n)}).encode()


def agreement(decisions: dict[int, Any]) -> dict[str, Any]:
    """What the device's evaluator said, beside TFLite on this machine, for each reading that was decided; as decisions too: over the median or not."""
    path = model_path("shipped:host-anomaly/tflite")
    here = load_model(read_manifest(path.read_bytes()), path.parent)
    both = []
    for body in decisions.values():
        for action in body["actions"]:
            if "command" in action and "model:host-anomaly" in body["inputs"]:
                both.append((body["inputs"]["model:host-anomaly"]["output"][0], here.predict(features(int(action["command"]["args"]["n"])))[0]))
    ordered = sorted(two for _, two in both)
    limit = ordered[len(ordered) // 2] if ordered else 0.0
    apart = max((abs(one - two) / max(abs(two), 1e-6) for one, two in both), default=1.0)
    # One that stands on the limit itself is decided by the last bit.
    otherwise = sum((one > limit) != (two > limit) and abs(two - limit) > TOLERANCE * abs(limit) for one, two in both)
    return {"compared": len(both), "least": round(min(ordered, default=0.0), 3), "most": round(max(ordered, default=0.0), 3), "limit": round(limit, 3), "most_apart_relative": float(f"{apart:.2g}"), "decided_otherwise": otherwise}


def configuration(bus_port: int, hub_port: int) -> dict[str, Any]:
    """A device that has its bus and its hub on this machine."""
    return {
        "edge_id": EDGE, "bus": {"url": f"mqtt://{HERE}:{bus_port}"}, "uplink": {"url": f"mqtt://{HERE}:{hub_port}", "backoff_cap": "2s"}, "api": {"host": "0.0.0.0", "token_file": "/var/lib/novacron/config/api.token"},
        "devices": {"host": {"enabled": False}}, "decisions": {"rules": [RULE], "models": ["shipped:host-anomaly/portable"]}, "journal": {"retain_receipted_records": 1_000_000}, "logging": {"level": "warning"},
    }


def outage(load: Load, hub: HubProcess, newest: Callable[[], int], running: Machine, options: Any) -> dict[str, Any]:
    """The hub goes, readings go on, it comes again; what was decided meanwhile, and the hub's own verdict at the end."""
    before = newest()
    hub.__exit__()
    alone = load.paced(options.rate, options.outage)
    decided = newest() - before
    back = time.monotonic()
    hub.__enter__()
    try:
        last = newest()
        # What is new comes first, the backlog behind it.
        until(lambda: set(range(1, last + 1)) <= hub.decisions(EDGE).keys(), "the backlog at the hub", BOOT_S, running)
        drained = time.monotonic() - back
        agreed = agreement(hub.decisions(EDGE))
        verdict = until(lambda: (found := hub.get(f"/api/v1/edges/{EDGE}/verify")) and not any(stream["missing"] for stream in found["streams"].values()) and found, "the end of the backlog", BOOT_S, running)
    finally:
        hub.__exit__()
    return {"readings": alone.to_json(), "decided_alone": decided, "hub_whole_again_s": round(drained, 1), "exact": bool(verdict["exact"]), "agreement": agreed, "verdict": verdict}


def measure(built: Built, arch: recipes.Architecture, chosen: recipes.Profile, options: Any, top: Path) -> dict[str, Any]:
    """One boot, and all that is asked of it."""
    hub = HubProcess(top)
    with private_mosquitto() as bus:
        (top / "config.yaml").write_text(yaml.safe_dump(configuration(bus, hub.broker_port)))
        disk, flash = prepare(arch, built.image, top)
        found, token = credentials(top, top / "config.yaml", [], False, EDGE)
        handed = hand_over(arch, built, disk, found)
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        hub.__enter__()
        with Machine(command(arch, disk, flash, Wiring(recipes.memory_mib(arch, chosen), {port: API_PORT}, handed, online=True))) as running:
            try:
                until(lambda: (answer(f"{address}/api/v1/status", token) or {}).get("link") == "up", "the device at its hub", BOOT_S, running)
                note(options, f"at its hub {time.monotonic() - running.started_s:.0f} s after power-on")
                null, load = null_load(bus, payload, lambda raw: int(json.loads(raw)["n"])), Load(bus, TELEMETRY_TOPIC, COMMAND_TOPIC, payload, number_of, DRAIN_S)
                null.warm_up()
                load.warm_up(BOOT_S)

                def newest() -> int:
                    return int(until(lambda: answer(f"{address}/api/v1/status", token), "the device's answer", BOOT_S, running)["journal"]["decision"]["next"]) - 1

                rounds = [(null.paced(options.rate, options.seconds), load.paced(options.rate, options.seconds)) for _ in range(options.rounds)]
                for one, two in rounds:
                    note(options, f"null {one.to_json()}  device {two.to_json()}")
                cut = outage(load, hub, newest, running, options)
                metrics = until(lambda: answer(f"{address}/metrics", token), "the device's metrics", BOOT_S, running)
            finally:
                hub.__exit__()
            null.close()
            load.close()
    memory = re.search(r"^\S*resident_memory_bytes(?:\{[^}]*\})? (\S+)$", metrics, re.MULTILINE)
    if memory is None:
        raise SystemExit("the device's metrics have no resident_memory_bytes")
    return {"null": [one.to_json() for one, _ in rounds], "device": [two.to_json() for _, two in rounds], "outage": cut, "agent_rss_mb": round(float(memory[1]) / 1e6, 1)}


def main() -> int:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--arch", default="amd64")
    parser.add_argument("--profile", default="device")
    parser.add_argument("--home", type=Path, default=ROOT / ".novacron" / "images")
    parser.add_argument("--rate", type=float, default=RATE, help=f"readings per second ({RATE:g})")
    parser.add_argument("--outage", type=float, default=OUTAGE_S, metavar="SECONDS", help=f"how long the hub is away ({OUTAGE_S:g})")
    options = parser.parse_args()
    about = machine()
    try:
        arch, chosen = recipes.architecture(options.arch), recipes.profile(options.profile)
        built = current(options.home, arch, chosen, lambda text: note(options, text))
        with tempfile.TemporaryDirectory(dir=options.home) as top:
            told = measure(built, arch, chosen, options, Path(top))
    except FirmwareError as error:
        raise SystemExit(str(error)) from None
    cut = told["outage"]
    every = [*told["device"], cut["readings"]]
    whole = all(part["lost"] == 0 and part["twice"] == 0 for part in every)
    agreed = cut["agreement"]
    ok = agreed["compared"] > 0 and agreed["decided_otherwise"] == 0 and agreed["most_apart_relative"] <= TOLERANCE
    ok = ok and whole and cut["exact"] and cut["decided_alone"] >= cut["readings"]["sent"] and told["agent_rss_mb"] < RSS_MB
    inputs = {"arch": arch.name, "profile": chosen.name, "memory_mib": recipes.memory_mib(arch, chosen), "emulated": True, "qemu": ".".join(map(str, tools.qemu_version(tools.find(arch.qemu) or arch.qemu))), "rate": options.rate, "outage_s": options.outage, "bars": {"agent_rss_mb": RSS_MB, "lost": 0, "twice": 0}}
    median = spread([part["p50"] for part in told["device"]])
    return report(options, about, f"a reading decided inside the booted image for {arch.name} (emulated), round trip, and nothing lost by an outage of the hub", median["median"], "ms", ok, spread_=median, inputs=inputs, details=told)


if __name__ == "__main__":
    sys.exit(main())
