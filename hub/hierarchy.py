"""The hierarchy cloud > region > site > node > device, as the edges' presence tells it. Pure."""

from collections.abc import Iterable
from typing import Any

from .store.base import EdgeRow


def build_tree(rows: Iterable[EdgeRow], now_ms: int) -> dict[str, Any]:
    """The tree, each level with how many edges below it are online."""
    root: dict[str, Any] = {"level": "cloud", "name": "cloud", "children": {}}
    for row in sorted(rows, key=lambda item: item.edge):
        presence = row.presence
        region = _child(root, "region", presence.get("region") or "unplaced")
        site = _child(region, "site", presence.get("site") or "default")
        node = _child(site, "node", presence.get("node") or row.edge)
        node["children"][row.edge] = {
            "level": "edge", "name": row.edge, "state": row.state, "reason": row.reason, "since_ms": row.since_ms, "last_seen_ms": row.last_seen_ms,
            "seen_seconds_ago": max(0.0, (now_ms - row.last_seen_ms) / 1000) if row.last_seen_ms else None, "quarantine": row.quarantine,
            "health": presence.get("health", ""), "outage_hours": presence.get("outage_hours"), "generation": row.generation,
            "children": [{"level": "device", "name": name, "children": []} for name in presence.get("devices", [])],
        }
    _finish(root)
    return root


def _child(parent: dict[str, Any], level: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = parent["children"].setdefault(name, {"level": level, "name": name, "children": {}})
    return found


def _finish(node: dict[str, Any]) -> tuple[int, int]:
    if node["level"] == "edge":
        return (1 if node["state"] == "online" else 0), 1
    online = total = 0
    node["children"] = list(node["children"].values())
    for child in node["children"]:
        some, all_ = _finish(child)
        online, total = online + some, total + all_
    node["edges_online"], node["edges"] = online, total
    return online, total
