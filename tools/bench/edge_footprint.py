"""Memory of the whole agent: API, MQTT, journal and TFLite model loaded, after 3,000 decisions; and of the lean profile (API off).

MB are 10^6 bytes. RSS counts every page the process maps, also those it shares with others; PSS shares them out.
"""

import json
import statistics
import sys
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from .agent import COMMAND_TOPIC, FEATURES, TELEMETRY_TOPIC, Agent, number_of, payload
from .harness import arguments, machine, note, private_mosquitto, report, spread
from .mqtt_load import Load

FULL_MB, LEAN_MB = 50.0, 36.0
DECISIONS = 3_000


def measure(api: bool, model: str) -> dict[str, float]:
    """One fresh agent, 3,000 decisions, its memory in MB."""
    with private_mosquitto() as port, Agent(port, api=api, model=model) as agent:
        load = Load(port, TELEMETRY_TOPIC, COMMAND_TOPIC, payload, number_of)
        load.warm_up()
        started = agent.memory()
        result = load.paced(1000, DECISIONS / 1000)
        if api:
            with_metrics = agent.get("/api/v1/status")
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
    rows: dict[str, list[dict[str, float]]] = {"full": [], "lean": []}
    for number in range(options.rounds):
        for profile in rows:
            rows[profile].append(measure(profile == "full", options.model))
            note(options, f"round {number + 1} {profile}: {json.dumps(rows[profile][-1])}")
    full, lean = ([row["rss_mb"] for row in rows[name]] for name in ("full", "lean"))
    value = round(statistics.median(full), 2)
    details: dict[str, Any] = {
        "lean_rss_mb": spread(lean), "full_pss_mb": spread([row["pss_mb"] for row in rows["full"]]), "lean_pss_mb": spread([row["pss_mb"] for row in rows["lean"]]),
        "full_rss_at_start_mb": spread([row["rss_at_start_mb"] for row in rows["full"]]),
    }
    ok = value < FULL_MB and statistics.median(lean) < LEAN_MB
    inputs = {"decisions": DECISIONS, "model": f"host-anomaly {options.model}", "features": len(FEATURES), "bars_mb": {"full": FULL_MB, "lean": LEAN_MB}, "tls": False}
    return report(options, about, "memory of the whole agent", value, "MB RSS", ok, spread_=spread(full), inputs=inputs, details=details)


if __name__ == "__main__":
    sys.exit(main())
