"""Decision latency: a device's reading in over MQTT, threshold and model, a FULL commit, a command out over MQTT; beside the broker's own round trip.

Null and agent take turns, a second each, in the same run over the same broker: what the machine has for us changes within seconds, and both must meet the
same of it. Both at QoS 1. A round in which the hypervisor gave more than `STOLEN_MAX` of the
processors' time to others is shown and made again: the bar is for a quiet machine. With `--tls` all of them speak it to the broker, the null too.
"""

import contextlib
import json
import statistics
import sys

if not __package__:
    __import__("as_module").again(__file__)

from .agent import COMMAND_TOPIC, TELEMETRY_TOPIC, Agent, number_of, payload
from .harness import Stolen, arguments, machine, note, own_tls, private_mosquitto, report, spread
from .mqtt_load import Latency, Load, null_load

RATE = 500
TIMES_NULL = 3.0
QUIET_MS = 10.0
ROUNDS = 5
TURN_S = 1.0
"""Seconds of a turn: 500 readings."""

STOLEN_MAX = 1.0
"""Percent of the processors' time that others may take in a round that counts."""

ROUNDS_MORE = 3
"""Times the rounds asked for that are made at most until so many were quiet; where fewer than half were, all count."""


def null_number(message: bytes) -> int | None:
    """The number of our own message."""
    found: int = json.loads(message)["n"]
    return found


def main() -> int:
    parser = arguments(__doc__, rounds=ROUNDS)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--tls", action="store_true")
    options = parser.parse_args()
    about = machine()
    rounds: list[tuple[Latency, Latency, float]] = []
    with contextlib.ExitStack() as stack:
        tls = stack.enter_context(own_tls()) if options.tls else None
        port = stack.enter_context(private_mosquitto(tls=tls))
        agent = stack.enter_context(Agent(port, tls=tls))
        null = null_load(port, payload, null_number, tls)
        load = Load(port, TELEMETRY_TOPIC, COMMAND_TOPIC, payload, number_of, tls=tls)
        null.warm_up()
        load.warm_up()
        for number in range(options.rounds * ROUNDS_MORE):
            stolen = Stolen()
            turns = [(null.paced(options.rate, TURN_S), load.paced(options.rate, TURN_S)) for _ in range(max(1, round(options.seconds / TURN_S)))]
            rounds.append((Latency.pooled([one for one, _ in turns]), Latency.pooled([one for _, one in turns]), stolen.percent()))
            note(options, f"round {number + 1}: null {rounds[-1][0].to_json()}  agent {rounds[-1][1].to_json()}  stolen {rounds[-1][2]} %")
            if sum(percent <= STOLEN_MAX for *_, percent in rounds) >= options.rounds:
                break
        commits = agent.get("/api/v1/status")["journal"]["decision"]["next"] - 1
        null.close()
        load.close()
    quiet = [one for one in rounds if one[2] <= STOLEN_MAX]
    counted = quiet if 2 * len(quiet) >= options.rounds else rounds
    nulls, ours = [one[0] for one in counted], [one[1] for one in counted]
    p99 = statistics.median(one.p99 for one in ours)
    null_p99 = statistics.median(one.p99 for one in nulls)
    lost = sum(one.lost + one.twice for _, one, _ in rounds)
    ok = p99 <= TIMES_NULL * null_p99 and p99 < QUIET_MS and lost == 0
    details = {
        "p50_ms": spread([one.p50 for one in ours]), "p999_ms": spread([one.p999 for one in ours]), "null_p50_ms": spread([one.p50 for one in nulls]),
        "null_p99_ms": spread([one.p99 for one in nulls]), "null_p999_ms": spread([one.p999 for one in nulls]), "lost_or_twice": lost, "decisions_durable": commits,
        "times_null_p99": round(p99 / null_p99, 2), "stolen_percent": [percent for *_, percent in rounds], "quiet": counted is quiet,
    }
    return report(
        options, about, "decision latency p99, at most 3x the null round trip's and under 10 ms", round(p99, 3), "ms", ok, spread_=spread([one.p99 for one in ours]),
        peer={"null p99 ms": round(null_p99, 3)}, inputs={"rate_per_second": options.rate, "seconds": options.seconds, "model": "host-anomaly tflite", "journal": "FULL", "tls": options.tls}, details=details,
    )


if __name__ == "__main__":
    sys.exit(main())
