"""The hierarchy cloud > region > site > node > device, as the edges' presence tells it. Pure."""

from collections.abc import Iterable
from typing import Any

from .store.base import EdgeRow


def build_tree(rows: Iterable[EdgeRow], now_ms: int) -> dict[str, Any]:
    """The tree, each level with how many edges below it are online. A device that edges share stands under the one it was given to last."""
    root: dict[str, Any] = {"level": "cloud", "name": "cloud", "children": {}}
    ordered = sorted(rows, key=lambda item: item.edge)
    newest: dict[tuple[str, str], int] = {}
    for row in ordered:
        for device, fence in _serves(row).items():
            where = (row.presence.get("site") or "default", device)  # both are text: the contract and JSON say so
            newest[where] = max(newest.get(where, 0), fence)
    for row in ordered:
        presence = row.presence
        serves = _serves(row)
        site_name = presence.get("site") or "default"
        region = _child(root, "region", presence.get("region") or "unplaced")
        site = _child(region, "site", site_name)
        node = _child(site, "node", presence.get("node") or row.edge)
        node["children"][row.edge] = {
            "level": "edge", "name": row.edge, "state": row.state, "reason": row.reason, "since_ms": row.since_ms, "last_seen_ms": row.last_seen_ms,
            "seen_seconds_ago": max(0.0, (now_ms - row.last_seen_ms) / 1000) if row.last_seen_ms else None, "quarantine": row.quarantine,
            "health": presence.get("health", ""), "outage_hours": presence.get("outage_hours"), "generation": row.generation,
            "children": [
                {"level": "device", "name": name, "children": []} for name in presence.get("devices", [])
                if not isinstance(name, str) or serves.get(name, 0) >= (newest[site_name, name] if name in serves else 0)
            ],
        }
    _finish(root)
    return root


def _serves(row: EdgeRow) -> dict[str, int]:
    """Shared devices that an edge said it serves, to the number at which each was given to it."""
    said = row.presence.get("serves")
    return {device: fence for device, fence in said.items() if type(fence) is int} if isinstance(said, dict) else {}


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
