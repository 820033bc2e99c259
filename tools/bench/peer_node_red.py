"""The same flow in Node-RED (npm's node-red), same load, same broker, same run: memory, latency, rate.

MQTT in, a threshold and the same autoencoder, MQTT out, QoS 1. Node-RED has no journal: beside the flow as people build it (`plain`) stands
one that makes each decision durable in a file before it acts (`journal`), which is what our agent does. Node-RED's MQTT client leaves Nagle's
algorithm on, which costs it milliseconds; `nodelay` is each of these with it off. The promise is met where our agent is ahead of both flows
as npm installs them, `plain` and `journal`; the other two are reported and not left out where we lose.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from .agent import COMMAND_TOPIC, TELEMETRY_TOPIC, Agent, number_of, payload
from .decision_latency import null_number
from .harness import ROOT, Memory, arguments, die_with_parent, free_port, machine, memory_of, note, private_mosquitto, report, spread, stop
from .mqtt_load import Load, null_load
from .raw_load import RawLoad

HERE = Path(__file__).parent / "node_red"
CACHE = ROOT / ".novacron" / "bench" / "node_red"
RATE = 500
WINDOW = 200
MODEL = ROOT / "edge_runtime/decisions/models/shipped/host-anomaly"
KINDS = {"plain": (False, False), "journal": (False, True), "plain, nodelay": (True, False), "journal, nodelay": (True, True)}


def install() -> str:
    """Node-RED in the cache, once; its version. Exits with the remedy where it cannot be had."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise SystemExit("this benchmark needs Node.js and npm: apt install nodejs npm")
    CACHE.mkdir(parents=True, exist_ok=True)
    package = CACHE / "node_modules" / "node-red" / "package.json"
    wanted = json.loads((HERE / "package.json").read_text())["dependencies"]["node-red"]
    if not package.exists() or json.loads(package.read_text())["version"] != wanted:
        shutil.copy(HERE / "package.json", CACHE)
        done = subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--omit=dev", "--loglevel=error"], cwd=CACHE, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"Node-RED could not be installed (is the network there?): {done.stderr.strip()[-300:]}")
    version: str = json.loads(package.read_text())["version"]
    return version


def flow(broker_port: int) -> list[dict[str, Any]]:
    """The flow file."""
    return [
        {"id": "tab", "type": "tab", "label": "bench"},
        {"id": "broker", "type": "mqtt-broker", "broker": "127.0.0.1", "port": str(broker_port), "clientid": "node-red", "autoConnect": True, "protocolVersion": "4", "keepalive": "60", "cleansession": True},
        {"id": "in", "type": "mqtt in", "z": "tab", "topic": TELEMETRY_TOPIC, "qos": "1", "datatype": "json", "broker": "broker", "wires": [["decide"]]},
        {"id": "decide", "type": "function", "z": "tab", "func": (HERE / "decide.js").read_text(), "outputs": 1, "wires": [["out"]]},
        {"id": "out", "type": "mqtt out", "z": "tab", "topic": "", "qos": "1", "retain": "false", "broker": "broker", "wires": []},
    ]


@contextmanager
def node_red(broker_port: int, nodelay: bool, journal: bool) -> Iterator[int]:
    """Node-RED with the flow, as `npm` installs it; gives its process id."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "flows.json").write_text(json.dumps(flow(broker_port)))
        model = json.loads((MODEL / "model.portable").read_text())
        model["inputs"] = json.loads((MODEL / "portable.json").read_text())["inputs"]
        (home / "model.json").write_text(json.dumps(model))
        opened = f'require("fs").openSync({json.dumps(str(home / "decisions.jsonl"))}, "a")' if journal else "null"
        (home / "settings.js").write_text(
            f'module.exports = {{ uiHost: "127.0.0.1", uiPort: {free_port()}, flowFile: "flows.json", userDir: {json.dumps(folder)}, telemetry: {{ enabled: false }},\n'
            f'  functionGlobalContext: {{ fs: require("fs"), model: require({json.dumps(str(home / "model.json"))}), journal: {opened} }},\n'
            '  logging: { console: { level: "warn", metrics: false, audit: false } } };\n'
        )
        command = ["node", *(["-r", str(HERE / "without_nagle.js")] if nodelay else []), str(CACHE / "node_modules/node-red/red.js"), "-u", folder, "-s", str(home / "settings.js")]
        process = subprocess.Popen(command, cwd=CACHE, env={**os.environ, "HOME": folder}, preexec_fn=die_with_parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield process.pid
        finally:
            stop(process)


def measure(port: int, pid: int, options: Any) -> dict[str, Any]:
    """Latency at a fixed rate, then the most decisions per second, then memory, of whoever answers now."""
    load = Load(port, TELEMETRY_TOPIC, COMMAND_TOPIC, payload, number_of)
    load.warm_up(60)
    load.paced(options.rate, 3)
    latencies = [load.paced(options.rate, options.seconds) for _ in range(options.rounds)]
    load.close()
    raw = RawLoad(port, TELEMETRY_TOPIC, COMMAND_TOPIC, payload, number_of)
    raw.warm_up()
    after_paced: Memory = memory_of(pid)
    rates = [raw.closed_loop(options.seconds, WINDOW) for _ in range(options.rounds)]
    raw.close()
    after: Memory = memory_of(pid)
    return {
        "p50_ms": round(statistics.median(one.p50 for one in latencies), 3), "p99_ms": round(statistics.median(one.p99 for one in latencies), 3),
        "p99_spread": spread([one.p99 for one in latencies]), "per_second": round(statistics.median(one.per_second for one in rates)),
        "per_second_spread": spread([one.per_second for one in rates]), "rss_mb": round(after_paced.rss / 1e6, 1), "rss_mb_after_rate": round(after.rss / 1e6, 1),
        "lost_or_twice": sum(one.lost + one.twice for one in latencies) + sum(one.lost + one.twice for one in rates),
    }


def ahead(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, bool]:
    """Where our agent is better."""
    return {"memory": ours["rss_mb"] < theirs["rss_mb"], "latency_p99": ours["p99_ms"] < theirs["p99_ms"], "rate": ours["per_second"] > theirs["per_second"]}


def main() -> int:
    parser = arguments(__doc__, seconds=8)
    parser.add_argument("--rate", type=float, default=RATE)
    options = parser.parse_args()
    version = install()
    about = machine()
    about["node"] = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    found: dict[str, dict[str, Any]] = {}
    with private_mosquitto() as port:
        null = null_load(port, payload, null_number)
        null.warm_up()
        null_latency = null.paced(options.rate, options.seconds).to_json()
        null.close()
        with Agent(port) as agent:
            found["ours"] = measure(port, agent.pid, options)
        note(options, f"ours: {found['ours']}")
        for kind, (nodelay, journal) in KINDS.items():
            time.sleep(0.5)  # the agent's persistent session is gone from the broker's queue of things to do
            with node_red(port, nodelay, journal) as pid:
                found[kind] = measure(port, pid, options)
            note(options, f"{kind}: {found[kind]}")
    ours = found.pop("ours")
    compared = {kind: ahead(ours, theirs) for kind, theirs in found.items()}
    same = found["plain"]
    return report(
        options, about, "ahead of the same flow in Node-RED as installed on memory, latency and rate", round(same["p99_ms"] / ours["p99_ms"], 2), "x latency p99",
        all(compared["journal"].values()) and all(compared["plain"].values()) and ours["lost_or_twice"] == 0, spread_=ours["p99_spread"], peer={f"Node-RED {version}, {kind}": value for kind, value in found.items()},
        inputs={"rate_per_second": options.rate, "seconds": options.seconds, "window": WINDOW, "qos": 1}, details={"ours": ours, "null": null_latency, "ahead": compared},
    )


if __name__ == "__main__":
    sys.exit(main())
