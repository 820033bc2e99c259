"""Durable decisions per second of one edge: readings over MQTT as fast as the replies come back, every decision committed with FULL.

Two ways to send: a message per reading, and messages of ten readings (an array), as a gateway behind a field bus sends them.
"""

import json
import statistics
import sys

from .agent import COMMAND_TOPIC, FEATURES, TELEMETRY_TOPIC, Agent, number_of, payload
from .harness import arguments, machine, note, private_mosquitto, report, spread
from .mqtt_load import Load, null_load

BAR = 5_000
WINDOW = 200


def null_number(message: bytes) -> int | None:
    """The number of our own message."""
    found: int = json.loads(message)["n"]
    return found


def main() -> int:
    parser = arguments(__doc__, seconds=8)
    parser.add_argument("--window", type=int, default=WINDOW)
    options = parser.parse_args()
    about = machine()
    rates, nulls, lost = [], [], 0
    with private_mosquitto() as port, Agent(port) as agent:
        null = null_load(port, payload, null_number)
        load = Load(port, TELEMETRY_TOPIC, COMMAND_TOPIC, payload, number_of)
        null.warm_up()
        load.warm_up()
        for number in range(options.rounds):
            nulls.append(null.closed_loop(options.seconds / 2, options.window)[0])
            before = agent.get("/api/v1/status")["journal"]["decision"]["next"]
            rate, latency = load.closed_loop(options.seconds, options.window)
            durable = agent.get("/api/v1/status")["journal"]["decision"]["next"] - before
            rates.append(rate)
            lost += latency.lost + latency.twice
            note(options, f"round {number + 1}: null {nulls[-1]:.0f}/s, agent {rate:.0f}/s, {durable} durable, {latency.to_json()}")
        null.close()
        load.close()
        memory = agent.memory()
    value = statistics.median(rates)
    return report(
        options, about, "durable decisions per second, one edge", round(value), "1/s", value >= BAR and lost == 0, spread_=spread(rates),
        peer={"null messages per second": round(statistics.median(nulls))},
        inputs={"window": options.window, "seconds": options.seconds, "features": len(FEATURES), "journal": "FULL, grouped", "bar": BAR},
        details={"lost_or_twice": lost, "rss_mb_after": round(memory.rss / 1e6, 1)},
    )


if __name__ == "__main__":
    sys.exit(main())
