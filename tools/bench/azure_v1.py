"""VMs that come and go (Azure V1 arrivals with durations): hosts needed, stranding and migrations; best fit, with the lifetime advisor, with perfect foresight.

    python -m tools.bench.azure_v1 --data DIR --json

Every pair of files in the folder is replayed (`azure_trace.py` says the layout). Equal hosts, `--cores` and `--gib`. Reported per rule:

- hosts needed: the least number that holds every VM without moving any, by search; beside the lower bound (the fullest moment by cores or memory);
- on the number that best fit needs: stranded cores and memory (the free part of each host that VMs of the running mean shape could not use) and empty hosts, means over the hours;
- migrations: VMs moved so that everything fits on `--tight` permille fewer hosts than best fit needs without moves (None: not even so).

The advisor was trained on the first part of one trace; on that trace it speaks, and is judged, only from the split on; on others from the start. `advisor_helps` is whether it
needs fewer hosts, or as many with fewer migrations or less stranding; by that `tools/train_lifetime_model.py --decide` switches it.
Every outcome is verified by a checker that replays it on its own. The same seed gives the same numbers.
"""

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

import numpy as np

from hub.lifetime_model import SHIPPED, BadModel, LifetimeModel
from hub.scheduler.lifetime import chances, class_of

from .azure_sim import Host, Outcome, Predict, Replay, check, hosts_needed, learned, lower_bound, oracle
from .azure_trace import BadTrace, Vm, arrivals_with_features, pairs, read
from .harness import ROOT, arguments, machine, note, report

DATA = Path(os.environ.get("NOVACRON_DATA") or ROOT.parent / "shared" / "data") / "azure_v1"
"""Where the trace is looked for."""

CORES, GIB = 64, 160
"""Default host: the trace asks for 2 to 2.7 GiB per core, so that now the one and now the other runs out first."""

MOST = 8
"""Times the lower bound up to which the search for hosts goes."""

TIGHT = 10
"""Permille of the hosts that best fit needs that are taken away to count migrations. 67 is about the lower bound on the known trace, and cannot be reached so."""


def quality(vms: Sequence[Vm], chance: "np.ndarray[Any, Any]", from_s: int) -> dict[str, Any] | None:
    """The model's class predictions on VMs that arrived from `from_s` on and ended, against always saying how the classes were distributed among them; None where there are none."""
    ids = [vm.id for vm in vms if vm.at_s >= from_s and vm.ended]
    if not ids:
        return None
    truth = class_of([vms[index].seen_s for index in ids])
    share = np.bincount(truth, minlength=chance.shape[1]) / max(1, len(truth))
    mine = chance[ids, truth]
    return {
        "vms": len(ids), "log_loss": round(float(-np.log(np.maximum(mine, 1e-9)).mean()), 4), "log_loss_of_class_shares": round(float(-np.log(np.maximum(share[truth], 1e-9)).mean()), 4),
        "accuracy": round(float((chance[ids].argmax(1) == truth).mean()), 4), "accuracy_of_largest_class": round(float(share.max()), 4),
    }


def judge(vms: Sequence[Vm], host: Host, predict: Predict | None, from_s: int, least: int, common: int | None, permille: int) -> dict[str, Any]:
    """All figures of one rule. `common`: hosts on which stranding is measured, None: those that it needs itself."""
    begin = time.process_time()
    faults: list[str] = []

    def verified(hosts: int, out: Outcome) -> Outcome:
        if out.failed_at < 0:
            faults.extend(check(vms, host, hosts, out)[:3])
        return out

    @cache
    def plain(hosts: int) -> Outcome:
        return verified(hosts, Replay(vms, host, hosts, predict, from_s, since_s=from_s).run())

    needed = hosts_needed(lambda hosts: plain(hosts).failed_at < 0, least, MOST * least)
    at = common if common is not None and plain(common).failed_at < 0 else needed
    tight = max(least, (common or needed) * (1000 - permille) // 1000)
    with_moves = verified(tight, Replay(vms, host, tight, predict, from_s, moves=True, since_s=from_s).run())
    return {
        "hosts_needed": needed, "measured_on": at, **plain(at).means(), "tight_hosts": tight, "migrations": with_moves.moves if with_moves.failed_at < 0 else None,
        "tight_failed_at_vm": with_moves.failed_at if with_moves.failed_at >= 0 else None, "faults": faults, "cpu_s": round(time.process_time() - begin, 1),
    }


def helps(without: dict[str, Any], with_it: dict[str, Any]) -> bool:
    """Fewer hosts; or as many, and migrations and stranding both no worse and one of them better."""
    if with_it["hosts_needed"] != without["hosts_needed"]:
        return bool(with_it["hosts_needed"] < without["hosts_needed"])
    moves = [outcome["migrations"] if outcome["migrations"] is not None else float("inf") for outcome in (without, with_it)]
    strands = [outcome["stranded_cores"] + outcome["stranded_gib"] for outcome in (without, with_it)]
    return bool(moves[1] <= moves[0] and strands[1] <= strands[0] and (moves[1] < moves[0] or strands[1] < strands[0]))


def main() -> int:
    """Exit status 0 where every outcome was verified and the advisor's switch stands as the figures say."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the trace")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of the lifetime model")
    parser.add_argument("--cores", type=int, default=CORES)
    parser.add_argument("--gib", type=int, default=GIB)
    parser.add_argument("--seed", type=int, default=1, help="of the durations within their bins")
    parser.add_argument("--tight", type=int, default=TIGHT, help="permille fewer hosts than best fit needs, for migrations")
    parser.add_argument("--limit", type=int, default=0, help="only the first VMs of each file (0: all)")
    parser.add_argument("--no-oracle", action="store_true", help="leave perfect foresight out")
    options = parser.parse_args()
    if options.cores < 1 or options.gib < 1 or not 0 <= options.tight < 1000 or options.limit < 0:
        parser.error("--cores and --gib must be above 0, --limit 0 or more, --tight 0 to 999")
    about = machine()
    files: dict[str, Any] = {}
    host = Host(options.cores, options.gib)
    try:
        model = LifetimeModel(options.model)
        for flavours, durations, censored_s in pairs(options.data):
            files[flavours.name] = _one(options, model, host, flavours, durations, censored_s)
    except (BadTrace, BadModel, ValueError) as error:
        print(f"azure_v1: {error}", file=sys.stderr)
        return 2
    bare = sum(found["rules"]["best_fit"]["hosts_needed"] for found in files.values())
    advised = sum(found["rules"]["advisor"]["hosts_needed"] for found in files.values())
    bound = sum(found["lower_bound"] for found in files.values())
    better = all(found["advisor_helps"] for found in files.values())
    faults = [fault for found in files.values() for rule in found["rules"].values() for fault in rule["faults"]]
    chosen = advised if model.on_by_default else bare
    first = next(iter(files.values()))
    return report(
        options, about, "hosts that hold every VM of the trace, the advisor as it is switched, at most as many as best fit without it", chosen, "hosts", not faults and chosen <= bare,
        spread_={"lower_bound": bound, "over_bound": round(chosen / bound - 1, 4)}, peer={"best_fit": bare, "advisor": advised}, inputs={"data": str(options.data), "host": [host.cores, host.gib], "seed": options.seed},
        details={
            "advisor_on_by_default": model.on_by_default, "advisor_helps": better, "faults": faults, "files": files,
            "held_out": {"quality": first["quality"], **{name: {key: rule[key] for key in ("hosts_needed", "migrations", "stranded_cores", "stranded_gib")} for name, rule in first["rules"].items()}},
        },
    )


def _one(options: Any, model: LifetimeModel, host: Host, flavours: Path, durations: Path, censored_s: int) -> dict[str, Any]:
    vms = list(read(options.data, flavours, durations, censored_s, options.seed))
    vms = vms[: options.limit or None]
    if not vms:
        raise BadTrace(f"{flavours}: holds no VM")
    known = hashlib.sha256(durations.read_bytes()).hexdigest() == model.manifest["training"]["trace_sha256"]
    from_s = model.manifest["training"]["split_s"] if known else vms[0].at_s
    chance = chances(model.hazards(arrivals_with_features(vms)))
    bound = lower_bound(vms, host)
    rules: dict[str, dict[str, Any]] = {}
    predictors: dict[str, Predict | None] = {"best_fit": None, "advisor": learned(chance), **({} if options.no_oracle else {"perfect_foresight": oracle(vms)})}
    for name, predict in predictors.items():
        rules[name] = judge(vms, host, predict, from_s, bound, rules["best_fit"]["hosts_needed"] if rules else None, options.tight)
        note(options, f"{flavours.name} {name}: {rules[name]}")
    return {
        "vms": len(vms), "lower_bound": bound, "trained_on_its_first_part": known, "judged_from_s": from_s, "quality": quality(vms, chance, from_s), "rules": rules,
        "advisor_helps": helps(rules["best_fit"], rules["advisor"]),
    }


if __name__ == "__main__":
    sys.exit(main())
