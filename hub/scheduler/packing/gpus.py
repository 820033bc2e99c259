"""Nodes with GPUs and pods that ask for fractions or several of them, as arrays: what `fragmentation`, `devices` and `online` work on.

Units: milli-CPU, MiB, milli-GPU (1000 is one whole GPU). A pod of one GPU may ask for less than 1000, from one device; a pod of several needs as many
idle devices. The named tuples hold only arrays, so that compiled and plain kernels take them alike.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

WHOLE = 1000
"""Milli-GPU of one device."""

TYPICAL_SHARE = 0.95
"""The typical pods are the most frequent kinds that make up this share of all (Weng et al., ATC'23)."""

CPU_SCARCE_FROM = 0.9
"""Share of the nodes' CPU per GPU that the mix may ask for before its pods without GPU count towards `cpu_per_gpu`; nodes never fill to the last core."""

Ints = NDArray[np.int64]


class Bad(ValueError):
    """Input that cannot be packed; names the field and the remedy."""


class Nodes(NamedTuple):
    """Capacities of N nodes: cpu, memory, gpus `[N]`, model `[N]` (an index), group `[N]` (nodes alike share one)."""

    cpu: Ints
    memory: Ints
    gpus: Ints
    model: Ints
    group: Ints


class Kinds(NamedTuple):
    """What C kinds of pods ask for: cpu, memory, num, milli `[C]` (milli per GPU), access `[C, M]` (may it use model m), accepts `[C]` (an index of distinct rows of access)."""

    cpu: Ints
    memory: Ints
    num: Ints
    milli: Ints
    access: NDArray[np.bool_]
    accepts: Ints


class Mix(NamedTuple):
    """The typical pods: weight `[T]` sums to 1; cpu, milli, num `[T]`, access `[T, M]`; memory plays no part."""

    weight: NDArray[np.float64]
    cpu: Ints
    milli: Ints
    num: Ints
    access: NDArray[np.bool_]


def nodes(cpu: Sequence[int], memory: Sequence[int], gpus: Sequence[int], model: Sequence[int]) -> Nodes:
    """Group alike nodes; raises `Bad` where a quantity is negative."""
    arrays: list[Ints] = [np.asarray(part, dtype=np.int64) for part in (cpu, memory, gpus, model)]
    for name, array in zip(("cpu", "memory", "gpus", "model"), arrays, strict=True):
        if array.ndim != 1 or len(array) != len(arrays[0]):
            raise Bad(f"nodes.{name}: give one number per node ({len(arrays[0])})")
        if (array < 0).any():
            raise Bad(f"nodes.{name}[{int(np.argmax(array < 0))}] is negative; give 0 or more")
    _, group = np.unique(np.stack(arrays, axis=1), axis=0, return_inverse=True)
    return Nodes(arrays[0], arrays[1], arrays[2], arrays[3], group.reshape(-1).astype(np.int64))


def kinds(cpu: Sequence[int], memory: Sequence[int], num: Sequence[int], milli: Sequence[int], access: Any) -> Kinds:
    """Check what the kinds ask for; raises `Bad`."""
    arrays: list[Ints] = [np.asarray(part, dtype=np.int64) for part in (cpu, memory, num, milli)]
    allowed = np.ascontiguousarray(access, dtype=np.bool_)
    for name, array in zip(("cpu", "memory", "num", "milli"), arrays, strict=True):
        if array.ndim != 1 or len(array) != len(allowed):
            raise Bad(f"kinds.{name}: give one number per kind ({len(allowed)})")
        if (array < 0).any():
            raise Bad(f"kinds.{name}[{int(np.argmax(array < 0))}] is negative; give 0 or more")
    count, part = arrays[2], arrays[3]
    wrong = ((count > 1) & (part != WHOLE)) | (part > WHOLE) | ((count > 0) != (part > 0))
    if wrong.any():
        raise Bad(f"kinds.milli[{int(np.argmax(wrong))}]: give 1..{WHOLE} with one GPU, {WHOLE} with several, 0 with none")
    _, accepts = np.unique(allowed, axis=0, return_inverse=True)
    return Kinds(arrays[0], arrays[1], arrays[2], arrays[3], allowed, accepts.reshape(-1).astype(np.int64))


def typical(of: Kinds, counts: Ints) -> Mix:
    """The most frequent kinds up to `TYPICAL_SHARE` of the pods, `counts [C]` of each; kinds that differ in memory only are one."""
    merged: dict[tuple[int, int, int, int], list[int]] = {}
    for kind in range(len(counts)):
        key = (int(of.cpu[kind]), int(of.milli[kind]), int(of.num[kind]), int(of.accepts[kind]))
        merged.setdefault(key, [kind, 0])[1] += int(counts[kind])
    ranked = sorted(merged.values(), key=lambda entry: -entry[1])
    total, chosen, weights = sum(entry[1] for entry in ranked), [], []
    for kind, count in ranked:
        chosen.append(kind)
        weights.append(count)
        if sum(weights) >= TYPICAL_SHARE * total:
            break
    at = np.array(chosen, dtype=np.int64)
    weight = np.array(weights, dtype=np.float64) / max(sum(weights), 1)
    return Mix(weight, of.cpu[at], of.milli[at], of.num[at], np.ascontiguousarray(of.access[at]))


def cpu_per_gpu(nodes: Nodes, of: Kinds, counts: Ints) -> float:
    """Milli-CPU per milli-GPU at which a node's free GPU can be put to use; 0 where no pod asks for a GPU.

    It is what the pods with GPUs ask for, over the whole mix. Where the mix as a whole asks for about as much CPU per GPU as the nodes have (`CPU_SCARCE_FROM` .. 1 of it),
    the pods without GPU count as well: they take the CPU that the GPUs would need.
    """
    asks = int((counts * of.num * of.milli).sum())
    if not asks:
        return 0.0
    own, all_ = float((counts * of.cpu * (of.num > 0)).sum() / asks), float((counts * of.cpu).sum() / asks)
    there = float(nodes.cpu.sum() / max(int(nodes.gpus.sum()) * WHOLE, 1))
    scarcity = min(max((all_ / there - CPU_SCARCE_FROM) / (1.0 - CPU_SCARCE_FROM), 0.0), 1.0) if there > 0 else 1.0
    return own + scarcity * (all_ - own)
