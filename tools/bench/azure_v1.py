"""VMs with departures on Azure V1 arrivals: hosts in use, stranding and migrations of our rules against best fit, with and without a lifetime advisor.

Hosts are alike (`--host cores,GiB`). The stream is played in its bins of 300 s; a VM that ended in a duration bin lives for that bin's middle, one that was still running at the end does
not end. The second half of the stream counts. The advisor knows of a VM what is known when it arrives, its flavour and the size of its batch, and learns from the first half how long such
VMs lived (the median, a censored one counting as longer than all); in the first half it says nothing. `oracle` is the same rule with the true departures: no advisor can do better by this
rule. The advisor counts as a help only where its hosts are fewer than without it.
"""

import sys
import time
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

import numpy as np

from hub.scheduler.packing import compiled
from hub.scheduler.packing.stream import LIFETIME, Served, serve

from .harness import arguments, machine, note, report
from .nab import DATA as NAB
from .packing_check import check_stream

DATA = NAB.parent / "azure_v1"
"""Where the stream is looked for."""

BIN_S = 300
"""Seconds per line."""

HELP_MIN = 0.002
"""Share of host-hours that the advisor must save to count as a help: less is chance."""

BATCHES = (1, 2, 5, 17)
"""Least batch sizes of the advisor's classes."""

MIB = 1024


def read(folder: Path) -> dict[str, np.ndarray]:
    """arrives, departs (int64 seconds), flavour, batch, cores, memory (MiB) per VM; raises ValueError naming file and line."""
    flavours = {}
    for line in (folder / "flav_map.txt").read_text().splitlines():
        size, letter = line.split()
        cores, gib = size.split(",")
        flavours[letter] = (len(flavours), int(cores), round(float(gib) * MIB))
    bins: dict[int, list[int]] = {}
    for line in (folder / "v1.interval_map.txt").read_text().splitlines():
        second, number = (int(word) for word in line.split())
        bins.setdefault(number, []).append(second)
    middle = {number: max(BIN_S, (min(seconds) + max(seconds) + BIN_S) // 2) for number, seconds in bins.items()}
    endless = 1 << 40
    rows = []
    durations = next(iter(sorted(folder.glob("v1.*.c*.txt"))), None)
    if durations is None:
        raise ValueError(f"{folder}: no file v1.*.c*.txt with the durations")
    arrivals = folder / f"{durations.name.split('.c')[0]}.txt"
    for number, (line, lives) in enumerate(zip(arrivals.read_text().splitlines(), durations.read_text().splitlines(), strict=True), 1):
        second, _, what = line.partition(" ")
        other, _, long = lives.partition(" ")
        batches, lengths = what.strip(",").split("|"), long.strip(",").split("|")
        if second != other or len(batches) != len(lengths):
            raise ValueError(f"{arrivals}, line {number}: does not go with the same line of {durations.name}")
        for batch, length in zip(batches, lengths, strict=True):
            letters, spans = [word for word in batch.split(",") if word], [word for word in length.split(",") if word]
            if len(letters) != len(spans) or any(letter not in flavours for letter in letters):
                raise ValueError(f"{arrivals}, line {number}: {batch!r} does not go with {length!r}")
            for letter, span in zip(letters, spans, strict=True):
                ended = span[0] == "U"
                rows.append((int(second), int(second) + middle[int(span[1:])] if ended else endless, flavours[letter][0], len(letters), flavours[letter][1], flavours[letter][2]))
    table = np.array(rows, dtype=np.int64)
    return dict(zip(("arrives", "departs", "flavour", "batch", "cores", "memory"), np.ascontiguousarray(table.T), strict=True))


def foretell(stream: dict[str, np.ndarray], half: int) -> np.ndarray:
    """When each VM that arrives from `half` on is expected to end, learned from what was seen before; 0 where nothing is known."""
    size = np.searchsorted(BATCHES, stream["batch"], side="right")
    kind = stream["flavour"] * (len(BATCHES) + 1) + size
    seen = stream["arrives"] < half
    lived = np.where(stream["departs"] <= half, stream["departs"] - stream["arrives"], 1 << 40)
    ends = np.zeros(len(kind), dtype=np.int64)
    for one in np.unique(kind[~seen]):
        known = lived[seen & (kind == one)]
        if len(known) >= 10:
            later = ~seen & (kind == one)
            ends[later] = stream["arrives"][later] + int(np.median(known))
    return np.minimum(ends, 1 << 40)


def main() -> int:
    """Exit status 0 where ours needs no more host-hours than best fit, and fewer with migration."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with v1.*.txt, v1.*.c*.txt, flav_map.txt, v1.interval_map.txt")
    parser.add_argument("--host", default="64,128", help="cores and GiB of a host; 2 GiB per core is what the VMs that run ask for, so that both bind")
    options = parser.parse_args()
    about = machine()
    try:
        stream = read(options.data)
        host = (int(options.host.split(",")[0]), int(options.host.split(",")[1]) * MIB)
    except (OSError, ValueError, IndexError) as error:
        print(f"azure_v1: {error}", file=sys.stderr)
        return 2
    samples = np.unique(stream["arrives"])
    half = int(samples[len(samples) // 2])
    counted = samples >= half
    told = foretell(stream, half)
    load = np.stack([np.cumsum(np.bincount(np.searchsorted(samples, stream["arrives"]), stream[name], len(samples)) - np.bincount(np.searchsorted(samples, stream["departs"]), stream[name], len(samples) + 1)[: len(samples)]) for name in ("cores", "memory")])
    least = np.ceil(load / np.array(host)[:, None]).max(axis=0)
    rules: dict[str, dict[str, Any]] = {
        "best_fit": {"balance": 0.0}, "ours": {}, "ours_advised": {"ends": told, "lifetime": LIFETIME}, "ours_oracle": {"ends": stream["departs"], "lifetime": LIFETIME},
        "best_fit_migrating": {"balance": 0.0, "migrate": True}, "ours_migrating": {"migrate": True}, "ours_advised_migrating": {"ends": told, "lifetime": LIFETIME, "migrate": True},
    }
    short = slice(0, 200)
    began = time.perf_counter()
    serve(stream["arrives"][short], stream["departs"][short], stream["cores"][short], stream["memory"][short], host, samples[:20], migrate=True)
    compile_s = time.perf_counter() - began
    found: dict[str, Any] = {}
    for name, rule in rules.items():
        cpu = time.process_time()
        done: Served = serve(stream["arrives"], stream["departs"], stream["cores"], stream["memory"], host, samples, **rule)
        cpu = time.process_time() - cpu
        in_use = check_stream([list(map(int, row)) for row in zip(*(stream[key] for key in ("arrives", "departs", "cores", "memory")), strict=True)], host, done.host.tolist(), done.moves.tolist(), samples.tolist())
        if in_use != done.in_use.tolist():
            raise AssertionError(f"{name}: the hosts in use are not those that the placements come to")
        used = done.in_use[counted]
        found[name] = {
            "host_hours": round(float(used.sum()) * BIN_S / 3600, 1), "hosts_peak": int(used.max()), "of_least": round(float(used.sum() / least[counted].sum()), 4), "stranded_cores_pct": round(float(100 * done.stranded[counted].sum() / (used.sum() * host[0])), 3),
            "migrations": len(done.moves), "migrations_per_vm": round(len(done.moves) / len(stream["arrives"]), 4), "us_per_vm": round(cpu / len(stream["arrives"]) * 1e6, 1),
        }
        note(options, f"{name}: {found[name]}")
    saved = 1 - found["ours_advised"]["host_hours"] / found["ours"]["host_hours"]
    gain = 1 - found["ours"]["host_hours"] / found["best_fit"]["host_hours"]
    return report(
        options, about, "VMs with departures: no more host-hours than best fit, fewer with migration", round(100 * gain, 2), "% fewer host-hours than best fit, no migration", gain >= 0 and found["ours_migrating"]["host_hours"] < found["ours"]["host_hours"],
        peer=found["best_fit"], inputs={"data": str(options.data), "host": options.host, "vms": len(stream["arrives"]), "numba": compiled.COMPILED, "compile_s": round(compile_s, 1)},
        details={**found, "advisor": {"saves_pct": round(100 * saved, 2), "helps": saved >= HELP_MIN, "oracle_saves_pct": round(100 * (1 - found["ours_oracle"]["host_hours"] / found["ours"]["host_hours"]), 2)}},
    )


if __name__ == "__main__":
    sys.exit(main())
