"""Vector bin packing: mean bins / optimum over every instance of a folder whose optimum is known, at most a second each.

`--data` is a folder (or a .tar.gz) with `.vbp` files: dimensions, capacities, number of lines, then `sizes... demand`. `--results` is a table with the columns
instance_name, LB, OPT (-1: unknown) and best_overall, comma or tab separated. Without either, the sets beside the project are taken. No instance is treated by its name.
"""

import csv
import io
import os
import statistics
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

import numpy as np

from hub.scheduler.packing import compiled, vector

from .harness import arguments, machine, note, report, spread
from .nab import DATA as NAB
from .packing_check import check_bins

DATA = NAB.parent / "vbp"
"""Where the sets are looked for."""

BARS = {"panigrahy": 1.008, "new": 1.025, "triplet": 1.08}
"""Mean bins / optimum, by a word in the name of the results file; for other sets it is the best published heuristic's own mean."""

SECONDS_MAX = 1.0
"""Wall time per instance."""

MARGIN_S = 0.05
"""Kept back for building the first packing and the last look at the clock."""

ITEMS_MAX = 100_000
"""Items an instance may come to once the demands are written out."""


@dataclass(frozen=True)
class Known:
    """What is published of one instance; None where unknown."""

    optimum: int | None
    best: int | None


def instances(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each `.vbp` of a folder, an archive or a folder of archives, by name."""
    if path.is_dir():
        for file in sorted(path.rglob("*.vbp")):
            yield file.stem, file.read_text()
    elif path.suffix == ".vbp":
        yield path.stem, path.read_text()
    else:
        with tarfile.open(path) as archive:
            for member in sorted((member for member in archive if member.name.endswith(".vbp")), key=lambda member: member.name):
                content = archive.extractfile(member)
                assert content is not None
                yield Path(member.name).stem, content.read().decode()


def parse(name: str, text: str) -> tuple[list[int], list[list[int]]]:
    """Capacity and the sizes of every item; raises ValueError naming the instance and what is wrong."""
    try:
        numbers = [int(word) for word in text.split()]
    except ValueError as error:
        raise ValueError(f"{name}: {error}; give whole numbers only") from None
    if len(numbers) < 2 or numbers[0] < 1 or len(numbers) < numbers[0] + 2:
        raise ValueError(f"{name}: give the dimensions, the capacities and the number of lines first")
    dims, lines = numbers[0], numbers[1 + numbers[0]]
    rest = numbers[2 + dims:]
    if lines < 0 or len(rest) != lines * (dims + 1):
        raise ValueError(f"{name}: {lines} lines of {dims + 1} numbers are announced, {len(rest)} numbers follow")
    rows = [rest[at:at + dims + 1] for at in range(0, len(rest), dims + 1)]
    if any(row[-1] < 0 for row in rows) or sum(row[-1] for row in rows) > ITEMS_MAX:
        raise ValueError(f"{name}: demands must be 0 or more and come to at most {ITEMS_MAX} items")
    return numbers[1:1 + dims], [row[:-1] for row in rows for _ in range(row[-1])]


def published(path: Path) -> dict[str, Known]:
    """By instance; raises ValueError where a column is missing."""
    text = path.read_text(encoding="utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if "\t" in text.partition("\n")[0] else ","))
    for column in ("instance_name", "OPT"):
        if not rows or column not in rows[0]:
            raise ValueError(f"{path}: column {column} is missing")

    def number(row: dict[str, str], column: str) -> int | None:
        value = int(row.get(column) or -1)
        return value if value > 0 else None

    return {row["instance_name"]: Known(number(row, "OPT"), number(row, "best_overall")) for row in rows}


def run(name: str, data: Path, results: Path, options: Any) -> dict[str, Any]:
    """One set; every packing checked."""
    known = published(results)
    ratios, peers, against, walls, cpus, at_optimum, proven, missing, families = [], [], [], [], [], 0, 0, 0, {}  # type: ignore[var-annotated]
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    for count, (instance, text) in enumerate(instances(data)):
        if count % options.every:
            continue
        capacity, sizes = parse(instance, text)
        began, cpu = time.perf_counter(), time.process_time()
        end = clock() + options.limit - MARGIN_S
        packing = vector.pack(np.array(sizes, dtype=np.int64).reshape(len(sizes), len(capacity)), np.array(capacity), lambda: clock() >= end)  # noqa: B023 called before the next turn
        walls.append(time.perf_counter() - began)
        cpus.append(time.process_time() - cpu)
        check_bins(sizes, capacity, packing.bins.tolist(), packing.count)
        about = known.get(instance)
        if about is None:
            missing += 1
            continue
        if about.best:
            against.append(packing.count / about.best)
        if about.optimum:
            if packing.count < about.optimum or packing.bound > about.optimum:
                raise AssertionError(f"{instance}: {packing.count} bins, bound {packing.bound}, but {about.optimum} is published as the optimum")
            ratio = packing.count / about.optimum
            ratios.append(ratio)
            families.setdefault("_".join(instance.split("_")[:2]), []).append(ratio)
            at_optimum += packing.count == about.optimum
            proven += packing.count == packing.bound
            if about.best:
                peers.append(about.best / about.optimum)
        if count % 60 == 59:
            note(options, f"{name}: {count + 1} instances, mean {statistics.fmean(ratios) if ratios else float('nan'):.4f}")
    if not ratios:
        raise ValueError(f"{results}: no instance of {data} has a known optimum there")
    bar = next((bar for word, bar in BARS.items() if word in name.lower()), statistics.fmean(peers) if peers else 1.0)
    mean = statistics.fmean(ratios)
    return {
        "mean_of_optimum": round(mean, 5), "bar": round(bar, 5), "published_best": round(statistics.fmean(peers), 5) if peers else None, "instances": len(walls), "with_optimum": len(ratios),
        "share_at_optimum": round(at_optimum / len(ratios), 4), "share_proven_by_bound": round(proven / len(ratios), 4), "of_published_best_all": round(statistics.fmean(against), 5) if against else None,
        "not_in_results": missing, "wall_s": spread(walls), "cpu_s": spread(cpus), "worst_families": dict(sorted(((key, round(statistics.fmean(each), 4)) for key, each in families.items()), key=lambda item: -item[1])[:5]),
        "ok": mean <= bar and max(walls if options.clock == "wall" else cpus) <= options.limit,
    }


def main() -> int:
    """Exit status 0 where the bar is met on every set."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="folder or .tar.gz of .vbp files")
    parser.add_argument("--results", type=Path, help="table of what is published of them")
    parser.add_argument("--limit", type=float, default=SECONDS_MAX, help="seconds per instance")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what the limit counts: cpu where others share the machine")
    parser.add_argument("--every", type=int, default=1, help="only every n-th instance, for a quick look")
    options = parser.parse_args()
    about = machine()
    if bool(options.data) != bool(options.results):
        parser.error("give --data and --results together, or neither")
    sets = [(options.results.stem, options.data, options.results)] if options.data else [
        (file.name.removesuffix("_results.csv"), file.with_name(file.name.replace("_results.csv", ".tar.gz")), file) for file in sorted(DATA.glob("*_results.csv"))
    ]
    if not sets:
        print(f"vbp: no sets in {DATA}; give --data and --results, or {os.path.relpath(DATA)} as described in --help", file=sys.stderr)
        return 2
    began = time.perf_counter()
    # Five bins where the bound says four: the search is reached, so that it is compiled here and not within the first instance's second.
    if not vector.pack(np.array([[6, 1], [1, 6], [6, 6], [6, 1], [4, 5], [5, 4], [5, 5], [3, 6]]), np.array([10, 10]), lambda: False, steps_max=1000).steps:
        raise AssertionError("the packing that is to compile the search does not reach it")
    compile_s = time.perf_counter() - began
    found = {}
    try:
        for name, data, results in sets:
            found[name] = run(name, data, results, options)
    except (OSError, ValueError, tarfile.TarError) as error:
        print(f"vbp: {error}", file=sys.stderr)
        return 2
    worst = max(found.values(), key=lambda one: one["mean_of_optimum"] / one["bar"])
    return report(
        options, about, f"vector bin packing within the bars of the sets, at most {options.limit:g} s an instance", worst["mean_of_optimum"], f"bins / optimum, mean of the set nearest its bar of {worst['bar']:g}",
        all(one["ok"] for one in found.values()), spread_={name: one["mean_of_optimum"] for name, one in found.items()}, peer={name: one["published_best"] for name, one in found.items()},
        inputs={"sets": list(found), "clock": options.clock, "every": options.every, "numba": compiled.COMPILED, "compile_s": round(compile_s, 1), "bars": {name: one["bar"] for name, one in found.items()}}, details=found,
    )


if __name__ == "__main__":
    sys.exit(main())
