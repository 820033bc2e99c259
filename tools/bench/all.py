"""Every benchmark, one after the other; a table at the end, and the results as JSON lines in `.novacron/bench/results.jsonl`."""

import argparse
import json
import subprocess
import sys

if not __package__:
    __import__("as_module").again(__file__)

from .harness import ROOT

BENCHES = (
    "edge_footprint",
    "decision_latency", "decision_bulk",
    "decision_rate",
    "peer_node_red",
    "journal",
    "outage",
    "many_edges",
    "earlier",
    "nab",
    "site_failover",
    "checkpoint", "snapshot", "container_start", "containerd_start",
    "startup", "reconcile", "convert",
    "migration_cpu", "migration_matrix", "migration_repeat", "migration_faults", "migration_live", "prediction",
    "image", "image_inside",
    "scheduler_latency",
    "k8s_cases",
    "vbp",
    "openb",
    "scheduler_batch",
    "scheduler_concurrency",
    "timed_submit",
    "power_cut",
    "soak",
    "scheduler_optimality",
    "azure_v1",
)


def main() -> int:
    """Exit status 0 where every promise is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=BENCHES, default=BENCHES)
    parser.add_argument("--json", action="store_true", help="one JSON object last")
    options = parser.parse_args()
    results = []
    for name in options.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, "-m", f"tools.bench.{name}", "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        try:
            result = json.loads(lines[-1])
        except (IndexError, ValueError):
            result = {"promise": name, "value": None, "unit": "", "ok": False, "details": f"no result (status {done.returncode})"}
        results.append({"bench": name, **result})
    folder = ROOT / ".novacron" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    for result in results:
        print(f"{'met    ' if result['ok'] else 'NOT MET'}  {result['bench']:18} {result['value']} {result['unit']}   ({result['promise']})", file=sys.stderr if options.json else sys.stdout)
    ok = all(result["ok"] for result in results)
    print(json.dumps({"promise": "every benchmark meets its bar", "value": sum(bool(result["ok"]) for result in results), "unit": f"of {len(results)}", "spread": None, "peer": None, "machine": results[0].get("machine") if results else None, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
