"""The proof: what the hub holds is exactly what the edge journalled.

Edge and hub each compute the chain over the records of a stream. Equal chains at one seq mean equal records up to there (from the seq the
hub's proof is based on). The hub also counts its rows and computes the chain over them as they stand now. An edge that can be asked is asked
for its chain at the hub's mark; of an edge that is away, the chains it sent along with its batches are the proof, up to the last of them.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from .client import Api, CommandError


def verify_edge(hub: Api, edge: str, edge_api: Api | None, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The result for one edge: per stream counts, ranges, hash, verdict; `exact` over all."""
    report = hub.get(f"/api/v1/edges/{quote(edge, safe='')}/verify")
    marks: dict[str, Any] | None = None
    if edge_api is not None:
        status = edge_api.get("/api/v1/status")
        if status["edge"] != edge:
            raise CommandError(f"--edge-api: that is edge {status['edge']}, not {edge}; give the address of {edge}")
        marks = status["journal"]
    for stream, entry in report["streams"].items():
        progress(f"{edge} {stream}")
        verdict = []
        if entry["counted"] != entry["expected"]:
            verdict.append(f"{entry['expected'] - entry['counted']} rows are missing between {entry['base']} and {entry['contiguous']}")
        if entry["mismatches"]:
            verdict.append(f"the edge's chain differed {entry['mismatches']} times")
        if entry.get("rows_chain") not in (None, entry["chain"]):
            verdict.append(f"the rows hash to {entry['rows_chain']}, what came from the edge to {entry['chain']}: a row was changed")
        if entry["missing"]:
            verdict.append(f"gaps {entry['missing']}")
        entry["proof"] = "the edge's own chains, as sent"
        if edge_api is not None and marks is not None and entry["contiguous"]:
            said = edge_api.get(f"/api/v1/journal/chain?stream={stream}&seq={entry['contiguous']}")["chain"]
            if said is None:
                entry["proof"] = "the edge's own chains, as sent (its journal has freed that record)"
            else:
                entry["proof"] = f"chain at {entry['contiguous']} asked from the edge"
                if said != entry["chain"]:
                    verdict.append(f"chain at {entry['contiguous']} is {said} at the edge and {entry['chain']} at the hub")
            entry["not_yet_sent"] = marks[stream]["next"] - 1 - entry["contiguous"]
        entry["lost"] = max(0, entry["expected"] - entry["counted"]) + entry["gone"]
        entry["verdict"] = verdict
        entry["exact"] = not verdict
    report["exact"] = all(entry["exact"] for entry in report["streams"].values())
    return dict(report)
