"""Reads VM arrivals with durations in the layout of the processed Azure V1 trace, line by line.

A folder holds pairs `NAME.txt` (flavours) and `NAME.c<seconds>.txt` (duration bins, `U15` ended, `C46` still running at <seconds>), `flav_map.txt` (`cores,GiB letter`) and
`NAME-or-any.interval_map.txt` (`seconds bin`). One line per 300 s: `seconds a,b,|,c,`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from random import Random

import numpy as np

from hub.scheduler.lifetime import FEATURES, Floats, Recent

BIN_S = 300
"""One line of the trace."""

MAX_LINE = 64 << 20
"""Bytes of one line: two orders above the fullest bin known."""

NEVER = 1 << 60
"""End of a VM that outlives the trace."""


class BadTrace(ValueError):
    """A file that is not in the layout: which, where and what would be right."""


@dataclass(frozen=True, slots=True)
class Vm:
    """Times in seconds; `batch` VMs of one tenant arrived together; `seen_s`: how long it is known to have lived; `ended`: whether that was its end."""

    id: int
    at_s: int
    cores: float
    gib: float
    batch: int
    seen_s: int
    ended: bool

    @property
    def end_s(self) -> int:
        """When it leaves."""
        return self.at_s + self.seen_s if self.ended else NEVER


def pairs(folder: Path) -> list[tuple[Path, Path, int]]:
    """(flavours, durations, seconds of censoring) in a folder. Raises `BadTrace` where there are none."""
    found = []
    for durations in sorted(folder.glob("*.txt")):
        match = re.fullmatch(r"(.+)\.c(\d+)\.txt", durations.name)
        flavours = folder / f"{match[1]}.txt" if match else None
        if match and flavours and flavours.is_file():
            found.append((flavours, durations, int(match[2])))
    if not found:
        raise BadTrace(f"{folder}: no pair NAME.txt and NAME.c<seconds>.txt; give the folder that holds them")
    return found


def flavours(path: Path) -> dict[str, tuple[float, float]]:
    """Letter to (cores, GiB). Raises `BadTrace`."""
    out = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            size, letter = line.split()
            cores, gib = (float(part) for part in size.split(","))
            if not (cores > 0 and gib > 0):
                raise ValueError
        except ValueError:
            raise BadTrace(f"{path}:{number}: {line[:60]!r} is not `cores,GiB letter` with sizes above 0") from None
        out[letter] = (cores, gib)
    return out


def bins(folder: Path) -> dict[int, tuple[int, int]]:
    """Duration bin to its least and largest seconds. Raises `BadTrace`."""
    maps = sorted(folder.glob("*interval_map.txt"))
    if not maps:
        raise BadTrace(f"{folder}: no interval_map.txt; it gives the bounds of the duration bins")
    out: dict[int, tuple[int, int]] = {}
    for number, line in enumerate(_lines(maps[0]), 1):
        try:
            seconds, index = (int(part) for part in line.split())
        except ValueError:
            raise BadTrace(f"{maps[0]}:{number}: {line[:60]!r} is not `seconds bin`") from None
        least, most = out.get(index, (seconds, seconds))
        out[index] = (min(least, seconds), max(most, seconds))
    return out


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="ascii") as file:
            while line := file.readline(MAX_LINE):
                if line.strip():
                    yield line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadTrace(f"{path}: cannot be read as ASCII text: {error}") from None


def _batches(path: Path, number: int, line: str) -> tuple[int, list[list[str]]]:
    head, _, rest = line.partition(" ")
    if not head.isdigit():
        raise BadTrace(f"{path}:{number}: {line[:40]!r} does not begin with seconds")
    return int(head), [[item for item in batch.split(",") if item] for batch in rest.split("|")]


def read(folder: Path, flavour_file: Path, duration_file: Path, censored_s: int, seed: int) -> Iterator[Vm]:
    """VMs in order of arrival. A duration is drawn within its bin from `seed`; one that is still running lasts to the end. Raises `BadTrace`."""
    sizes, bounds, rng = flavours(folder / "flav_map.txt"), bins(folder), Random(seed)
    count = 0
    for number, (one, two) in enumerate(zip_longest(_lines(flavour_file), _lines(duration_file)), 1):
        if one is None or two is None:
            raise BadTrace(f"{flavour_file}:{number}: {flavour_file.name} and {duration_file.name} have different numbers of lines")
        at_s, letters = _batches(flavour_file, number, one)
        other_s, ends = _batches(duration_file, number, two)
        if at_s != other_s or [len(batch) for batch in letters] != [len(batch) for batch in ends]:
            raise BadTrace(f"{flavour_file}:{number}: the batches of {flavour_file.name} and {duration_file.name} differ; they must be of one trace")
        for batch, marks in zip(letters, ends, strict=True):
            for letter, mark in zip(batch, marks, strict=True):
                if letter not in sizes:
                    raise BadTrace(f"{flavour_file}:{number}: flavour {letter[:20]!r} is not in flav_map.txt")
                index = int(mark[1:]) if mark[:1] in "UC" and mark[1:].isdigit() else -1
                ended = mark[0] == "U"
                if index < 0 or (ended and index not in bounds):
                    raise BadTrace(f"{duration_file}:{number}: {mark[:20]!r} is not U or C and a bin of the interval map")
                seconds = BIN_S * rng.randint(bounds[index][0] // BIN_S, bounds[index][1] // BIN_S) + rng.randrange(1, BIN_S) if ended else max(0, censored_s - at_s)
                yield Vm(count, at_s, *sizes[letter], len(batch), seconds, ended)
                count += 1


def arrivals_with_features(vms: list[Vm]) -> Floats:
    """[VM] what is known about each when it arrives (`hub.scheduler.lifetime.FEATURES`): only VMs that ended before say anything."""
    known, leaving = Recent(), sorted((vm.end_s, vm.id) for vm in vms if vm.ended)
    rows, at = np.empty((len(vms), len(FEATURES))), 0
    for index, vm in enumerate(vms):
        while at < len(leaving) and leaving[at][0] <= vm.at_s:
            gone = vms[leaving[at][1]]
            known.ended(gone.cores, gone.gib, gone.batch, gone.seen_s)
            at += 1
        rows[index] = known.features(vm.cores, vm.gib, vm.batch, vm.at_s)
    return rows
