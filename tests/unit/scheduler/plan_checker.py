"""Follows a plan of moves on plain dicts, sharing no code with the scheduler: capacity and devices at both ends, who must be apart, spread, budgets, limits, order.

A node: `{name, capacity: {resource: amount}, gpus: count, zone, kbps}`. A workload: `{id, app, requests, gpu: milli, apart: key or None, spread: key or None, skew, migratable,
bytes, zone: where it must be}`. `apart`: no two of one app in a domain of the key.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hub.scheduler.moves import Limits, Move


class Broken(AssertionError):
    """A plan does what it must not."""


def domain(nodes: Mapping[str, Mapping[str, Any]], node: str, key: str) -> str:
    return node if key == "host" else str(nodes[node]["zone"])


def uneven(nodes: Mapping[str, Mapping[str, Any]], items: Mapping[str, Mapping[str, Any]], where: Mapping[str, str], app: str, key: str, dead: Sequence[str] = ()) -> int:
    """Most minus least of an app's workloads over the domains."""
    counts = Counter({domain(nodes, node, key): 0 for node in nodes if node not in dead})
    for name, node in where.items():
        if items[name]["app"] == app:
            counts[domain(nodes, node, key)] += 1
    return max(counts.values()) - min(counts.values())


def follow(nodes: Mapping[str, Mapping[str, Any]], items: Mapping[str, Mapping[str, Any]], where: Mapping[str, str], devices: Mapping[str, int], steps: Sequence[Sequence[Move]],
           limits: Limits, budgets: Mapping[str, int] | None = None, sites: Mapping[str, str] | None = None) -> dict[str, str]:
    """Where everything is after the plan. `devices`: the GPU device of each workload that has one; `budgets`: app to restarts at a time. Raises `Broken`."""
    place, device, clock = dict(where), dict(devices), 0
    legs: Counter[str] = Counter()
    hops: Counter[str] = Counter()
    for number, step in enumerate(steps):
        if len({move.workload for move in step}) != len(step):
            raise Broken(f"step {number}: one workload moves twice in it")
        at_once: Counter[str] = Counter()
        over: Counter[tuple[str, str]] = Counter()
        restarts: Counter[str] = Counter()
        held = [(name, node, device.get(name)) for name, node in place.items()]
        for move in step:
            if move.start_ms < clock:
                raise Broken(f"{move.workload} begins before step {number - 1} is over")
            if place[move.workload] != move.source or move.target == move.source:
                raise Broken(f"{move.workload} is on {place[move.workload]}, the plan moves it from {move.source} to {move.target}")
            item = items[move.workload]
            at_once[move.source] += 1
            at_once[move.target] += 1
            if sites is not None and sites[move.source] and sites[move.target] and sites[move.source] != sites[move.target]:
                over[min(sites[move.source], sites[move.target]), max(sites[move.source], sites[move.target])] += 1
            if not item["migratable"]:
                restarts[item["app"]] += 1
            elif move.end_ms - move.start_ms < item["bytes"] * 8 / min(nodes[move.source]["kbps"], nodes[move.target]["kbps"]):
                raise Broken(f"{move.workload} is faster than its nodes")
            legs[move.workload] += 1
            hops[move.workload] += move.hop
            held.append((move.workload, move.target, move.seat.gpus[0] if move.seat.gpus else None))
            if item["zone"] and nodes[move.target]["zone"] != item["zone"]:
                raise Broken(f"{move.workload} may not be in zone {nodes[move.target]['zone']}")
            before = {(app, key, skew): uneven(nodes, items, place, app, key) for app, key, skew in {(each["app"], each["spread"], each["skew"]) for each in items.values() if each["spread"]}}
            place[move.workload] = move.target
            for (app, key, skew), old in before.items():
                new = uneven(nodes, items, place, app, key)
                if new > max(old, skew):
                    raise Broken(f"{move.workload} makes the spread of {app} over {key} worse: {old} to {new}")
        for node in nodes:
            for resource, amount in nodes[node]["capacity"].items():
                used = sum(items[name]["requests"].get(resource, 0) for name, at, _ in held if at == node)
                if used > amount:
                    raise Broken(f"step {number}: {node} holds {used} {resource} of {amount}")
            for index in range(nodes[node]["gpus"]):
                used = sum(items[name]["gpu"] for name, at, used_device in held if at == node and used_device == index)
                if used > 1000:
                    raise Broken(f"step {number}: device {index} of {node} holds {used}")
        for name, at, _ in held:
            item = items[name]
            for other, there, _ in held:
                if other != name and item["apart"] and items[other]["app"] == item["app"] and domain(nodes, at, item["apart"]) == domain(nodes, there, item["apart"]):
                    raise Broken(f"step {number}: {name} and {other} are together")
        if len(step) > limits.total or any(count > limits.per_node for count in at_once.values()) or any(count > limits.per_link for count in over.values()):
            raise Broken(f"step {number}: more moves at once than the limits allow")
        for app, count in restarts.items():
            if budgets is not None and app in budgets and count > budgets[app]:
                raise Broken(f"step {number}: {count} of {app} are disrupted")
        for move in step:
            device[move.workload] = move.seat.gpus[0] if move.seat.gpus else -1
        clock = max((move.end_ms for move in step), default=clock)
    for name, count in legs.items():
        if count - hops[name] > 1 or hops[name] > 1:
            raise Broken(f"{name} moves {count} times")
    if sum(legs.values()) > 2 * limits.per_plan:
        raise Broken("the plan is too long")
    return place
