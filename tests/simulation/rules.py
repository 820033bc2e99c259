"""The rules of the simulated sites, in variants that the hub switches between: thresholds with hysteresis, windows, durations, silence, each."""

from typing import Any

RISING = frozenset(("hot", "mean", "steady", "silent"))
"""Rules that fire once until they are cleared."""


def rules_of(variant: int) -> list[dict[str, Any]]:
    """The rules of a variant; `{"n": "$value:n"}` in a command says which reading led to it."""
    high = 75 + 5 * (variant % 4)
    rules: list[dict[str, Any]] = [
        {
            "id": "hot", "on": {"device": "*", "metric": "temp"}, "if": {"value": "temp", "op": ">", "than": high}, "clear": {"value": "temp", "op": "<", "than": high - 15},
            "then": [{"command": {"device": "$device", "name": "cool", "args": {"n": "$value:n"}, "expires": "10m"}}, {"alert": {"severity": "warning", "text": "temp {temp} of {device}"}}],
        },
        {
            "id": "peak", "on": {"device": "*", "metric": "temp"}, "if": {"value": "temp", "op": ">", "than": high + 8}, "trigger": "each",
            "then": [{"command": {"device": "$device", "name": "vent", "args": {"n": "$value:n", "level": 2}}}],
        },
        {
            "id": "mean", "on": {"device": "*", "metric": "temp"},
            "if": {"all": [{"window": {"metric": "temp", "over": "5m", "stat": "mean", "min_count": 3}, "op": ">", "than": 55 + variant}, {"value": "temp", "op": ">", "than": 50}]},
            "then": [{"desired": {"device": "$device", "set": {"mode": "eco"}}}],
        },
    ]
    if variant % 2 == 0:
        rules.append({
            "id": "steady", "on": {"device": "*", "metric": "temp"}, "if": {"value": "temp", "op": ">", "than": 58}, "for": "30s", "cooldown": "2m",
            "then": [{"alert": {"severity": "info", "text": "{device} is warm"}}],
        })
    if variant % 3 != 1:
        rules.append({"id": "silent", "on": {"device": "*"}, "if": {"silent": "2h"}, "then": [{"alert": {"severity": "critical", "text": "{device} says nothing"}}]})
    return rules


def refused_rules() -> list[dict[str, Any]]:
    """Rules that an edge must refuse as a whole."""
    return [*rules_of(1), {"id": "broken", "on": {"device": "*"}, "if": {"value": "temp", "op": "~", "than": 1}, "then": [{"alert": {"severity": "info", "text": "x"}}]}]
