"""Durable decisions per second of one edge: readings over MQTT as fast as the replies come back, every decision committed with FULL.

One message per reading. The null is the broker alone: the generator's own messages coming back.
"""

import json
import statistics
import sys

if not __package__:
    __import__("as_module").again(__file__)

from .agent import COMMAND_TOPIC, FEATURES, TELEMETRY_TOPIC, Agent, number_of, payload
from .harness import arguments, machine, note, private_mosquitto, report, spread
from .raw_load import RawLoad

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
        null = RawLoad(port, "bench/null", "bench/null", payload, null_number)
        load = RawLoad(port, TELEMETRY_TOPIC, COMMAND_TOPIC, payload, number_of)
        null.warm_up()
        load.warm_up()
        for number in range(options.rounds):
            nulls.append(null.closed_loop(options.seconds / 2, options.window).per_second)
            before = agent.get("/api/v1/status")["journal"]["decision"]["next"]
            one = load.closed_loop(options.seconds, options.window)
            durable = agent.get("/api/v1/status")["journal"]["decision"]["next"] - before
            rates.append(one.per_second)
            lost += one.lost + one.twice + (durable < one.sent)
            note(options, f"round {number + 1}: null {nulls[-1]:.0f}/s, agent {one.per_second:.0f}/s, sent {one.sent}, durable {durable}, lost {one.lost}, twice {one.twice}")
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
