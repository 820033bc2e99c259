"""Memory of the whole agent: API, MQTT, journal and TFLite model loaded, after 3,000 decisions; and of the lean profile (API off). And of both with a link to the hub's broker by TLS, with a certificate of
their own, as off loopback: the bars are for agents without, what OpenSSL takes is printed beside them.

MB are 10^6 bytes. RSS counts every page the process maps, also those it shares with others; PSS shares them out.
"""

import contextlib
import json
import shutil
import statistics
import sys
import urllib.request
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from .agent import COMMAND_TOPIC, FEATURES, TELEMETRY_TOPIC, Agent, number_of, payload
from .harness import Tls, arguments, machine, note, own_tls, private_mosquitto, report, spread
from .mqtt_load import Load

FULL_MB, LEAN_MB = 50.0, 36.0
DECISIONS = 3_000


def connections(agent: Agent) -> int:
    """How often it has connected to the hub's broker."""
    with urllib.request.urlopen(f"http://127.0.0.1:{agent.api_port}/metrics", timeout=10) as answer:
        return sum(int(float(line.split()[-1])) for line in answer.read().decode().splitlines() if line.startswith("novacron_edge_uplink_connects_total "))


def measure(api: bool, model: str, tls: Tls | None) -> dict[str, float]:
    """One fresh agent, 3,000 decisions, its memory in MB; with `tls` it is linked to a hub's broker by it, behind which there is no hub."""
    with contextlib.ExitStack() as stack:
        port, extra = stack.enter_context(private_mosquitto()), None
        if tls is not None:
            above = stack.enter_context(private_mosquitto(tls=tls))
            extra = {"uplink": {"enabled": True, "url": f"mqtts://127.0.0.1:{above}", "ca_file": tls.ca, "cert_file": tls.cert, "key_file": tls.key}}
        agent = stack.enter_context(Agent(port, api=api, model=model, extra=extra))
        load = Load(port, TELEMETRY_TOPIC, COMMAND_TOPIC, payload, number_of)
        load.warm_up()
        started = agent.memory()
        result = load.paced(1000, DECISIONS / 1000)
        if api:
            with_metrics = agent.get("/api/v1/status")
            if tls is not None and connections(agent) != 1:
                raise RuntimeError(f"it is not connected by TLS: {with_metrics['uplink_error']}")
            if with_metrics["decided"] < DECISIONS:
                raise RuntimeError(f"only {with_metrics['decided']} decisions were made")
        elif result.received < DECISIONS:
            raise RuntimeError(f"only {result.received} decisions came back")
        load.close()
        after = agent.memory()
        return {"rss_mb": after.rss / 1e6, "pss_mb": after.pss / 1e6, "rss_at_start_mb": started.rss / 1e6}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="tflite", choices=("tflite", "onnx", "portable"))
    options = parser.parse_args()
    about = machine()
    profiles = ("full", "lean", "full_tls", "lean_tls") if shutil.which("openssl") else ("full", "lean")
    rows: dict[str, list[dict[str, float]]] = {profile: [] for profile in profiles}
    with contextlib.ExitStack() as stack:
        tls = stack.enter_context(own_tls()) if len(profiles) > 2 else None
        for number in range(options.rounds):
            for profile, found in rows.items():
                found.append(measure(profile.startswith("full"), options.model, tls if profile.endswith("tls") else None))
                note(options, f"round {number + 1} {profile}: {json.dumps(found[-1])}")
    full, lean = ([row["rss_mb"] for row in rows[name]] for name in ("full", "lean"))
    value = round(statistics.median(full), 2)
    details: dict[str, Any] = {
        "lean_rss_mb": spread(lean), "full_pss_mb": spread([row["pss_mb"] for row in rows["full"]]), "lean_pss_mb": spread([row["pss_mb"] for row in rows["lean"]]),
        "full_rss_at_start_mb": spread([row["rss_at_start_mb"] for row in rows["full"]]),
        **{f"{profile}_{kind}": spread([row[kind] for row in rows[profile]]) for profile in profiles[2:] for kind in ("rss_mb", "pss_mb")},
    }
    ok = value < FULL_MB and statistics.median(lean) < LEAN_MB
    inputs = {"decisions": DECISIONS, "model": f"host-anomaly {options.model}", "features": len(FEATURES), "bars_mb": {"full": FULL_MB, "lean": LEAN_MB}}
    return report(options, about, "memory of the whole agent", value, "MB RSS", ok, spread_=spread(full), inputs=inputs, details=details)


if __name__ == "__main__":
    sys.exit(main())
