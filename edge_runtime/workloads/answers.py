"""What the agent answers to those workloads of desired state for which it has no driver. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..contract.workloads import STOPPED

MAX_REASON = 1000
"""Characters of a reason."""


def answers(entries: Iterable[Mapping[str, Any]], answered: Iterable[str], runs: Sequence[str], enabled: bool, why: str = "", driven: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """Bodies of `workload` records, one for each entry that was not answered before; and which entries are answered now.

    An entry that shall stop is answered `stopped` where nothing can run here (else its driver answers: the entry does not say its kind). One that shall run is refused with the
    reason, so that the hub places it elsewhere. `why`: why there is no driver. `driven`: a runner looks after what drivers have here, also those that can run nothing any more: then the answer is its, once nothing of it runs.
    """
    before, now, reports = set(answered), [], []
    for entry in entries:
        key = f"{entry['id']}/{entry['epoch']}/{entry['wanted']}"
        now.append(key)
        if key in before:
            continue
        if entry["wanted"] == STOPPED:
            if (runs or driven) and enabled:
                continue
            state, reason = "stopped", ""
        elif not enabled:
            state, reason = "refused", "workloads are not enabled on this edge"
        elif entry["kind"] not in runs and not driven:
            state, reason = "refused", undriven(entry["kind"], why)
        else:
            continue  # its driver answers
        reports.append({"id": entry["id"], "epoch": entry["epoch"], "state": state, "reason": reason})
    return reports, now


def undriven(kind: str, why: str) -> str:
    """Why a workload of that kind is refused."""
    return f"no driver for kind {kind} on this edge{': ' * bool(why)}{why}"[:MAX_REASON]
