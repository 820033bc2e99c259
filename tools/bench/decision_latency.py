"""Decision latency: a device's reading in over MQTT, threshold and model, a FULL commit, a command out over MQTT; beside the broker's own round trip.

Null and agent take turns in the same run over the same broker. Both at QoS 1.
"""

import json
import statistics
import sys

if not __package__:
    __import__("as_module").again(__file__)

from .agent import COMMAND_TOPIC, TELEMETRY_TOPIC, Agent, number_of, payload
from .harness import arguments, machine, note, private_mosquitto, report, spread
from .mqtt_load import Load, null_load

RATE = 500
TIMES_NULL = 3.0
QUIET_MS = 10.0


def null_number(message: bytes) -> int | None:
    """The number of our own message."""
    found: int = json.loads(message)["n"]
    return found


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rate", type=float, default=RATE)
    options = parser.parse_args()
    about = machine()
    nulls, ours = [], []
    with private_mosquitto() as port, Agent(port) as agent:
        null = null_load(port, payload, null_number)
        load = Load(port, TELEMETRY_TOPIC, COMMAND_TOPIC, payload, number_of)
        null.warm_up()
        load.warm_up()
        for number in range(options.rounds):
            nulls.append(null.paced(options.rate, options.seconds))
            ours.append(load.paced(options.rate, options.seconds))
            note(options, f"round {number + 1}: null {nulls[-1].to_json()}  agent {ours[-1].to_json()}")
        commits = agent.get("/api/v1/status")["journal"]["decision"]["next"] - 1
        null.close()
        load.close()
    p99 = statistics.median(one.p99 for one in ours)
    null_p99 = statistics.median(one.p99 for one in nulls)
    lost = sum(one.lost + one.twice for one in ours)
    ok = p99 <= TIMES_NULL * null_p99 and p99 < QUIET_MS and lost == 0
    details = {
        "p50_ms": spread([one.p50 for one in ours]), "p999_ms": spread([one.p999 for one in ours]), "null_p50_ms": spread([one.p50 for one in nulls]),
        "null_p99_ms": spread([one.p99 for one in nulls]), "null_p999_ms": spread([one.p999 for one in nulls]), "lost_or_twice": lost, "decisions_durable": commits,
        "times_null_p99": round(p99 / null_p99, 2),
    }
    return report(
        options, about, "decision latency p99, at most 3x the null round trip's and under 10 ms", round(p99, 3), "ms", ok, spread_=spread([one.p99 for one in ours]),
        peer={"null p99 ms": round(null_p99, 3)}, inputs={"rate_per_second": options.rate, "seconds": options.seconds, "model": "host-anomaly tflite", "journal": "FULL"}, details=details,
    )


if __name__ == "__main__":
    sys.exit(main())
