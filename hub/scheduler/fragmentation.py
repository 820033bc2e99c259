"""How much GPU capacity a placement makes useless for the workloads that are typical (FGD, Weng et al., ATC'23).

A node's fragmentation is, over the typical shapes by popularity, the free milli-GPU that the shape cannot use there: all of it where the shape lacks CPU or
devices, else what is free on devices with too little left. Kept per class and node; only nodes that changed since are worked out again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import kernels
from .arrays import MAX_CLASSES
from .classes import Klass
from .feasible import devices_for
from .model import GpuRequest
from .rank import BEST, View
from .reasons import Ints
from .state import State
from .units import CPU, GPU_WHOLE

MAX_TYPES = 64
"""Typical shapes: the most frequent of the openb lists cover 95 % with fewer."""

PPM = 1_000_000
"""Popularities are whole millionths, so that sums are exact."""

LEAST = int(np.iinfo(np.int64).min)
"""Gain of a node that has no device for the workload."""

CHUNK = 128
"""Nodes worked out in one piece: keeps the intermediate arrays in the cache."""


@dataclass(frozen=True, slots=True)
class Typical:
    """One typical shape: milli-CPU, devices (0: none), milli of each, models (empty: any), how popular (millionths)."""

    cpu: int
    count: int
    milli: int
    models: tuple[str, ...]
    ppm: int


def typical_of(state: State) -> tuple[Typical, ...]:
    """The most frequent shapes among what runs."""
    found: dict[tuple[int, int, int, tuple[str, ...]], int] = {}
    for klass in state.classes:
        if klass is not None and (live := int(state.class_live[klass.id])):
            gpu = klass.shape.gpu or GpuRequest(0, 0)
            key = (klass.shape.request_map.get(CPU, 0), gpu.count, gpu.milli, gpu.models)
            found[key] = found.get(key, 0) + live
    most = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:MAX_TYPES]
    total = sum(count for _, count in most) or 1
    return tuple(Typical(*key, PPM * count // total) for key, count in most)


class Fragmentation:
    """The policy: 100 * sigmoid of how much less fragmented the node becomes, for workloads with GPUs."""

    def __init__(self, typical: Sequence[Typical]) -> None:
        self.typical = tuple(typical[:MAX_TYPES])
        with_gpu = [item for item in self.typical if item.count]
        self._levels = np.array(sorted({item.milli for item in with_gpu}), np.int64)
        self._level = np.searchsorted(self._levels, [item.milli for item in with_gpu])
        self._cpu = np.array([item.cpu for item in with_gpu], np.int64)
        self._count = np.array([item.count for item in with_gpu], np.int64)
        self._ppm = np.array([item.ppm for item in with_gpu], np.int64)
        self._models = [item.models for item in with_gpu]
        self._cpu_only = sum(item.ppm for item in self.typical if not item.count)

    def of(self, state: State, nodes: Ints, cpu: Ints, gpu: "np.ndarray[tuple[int, int], np.dtype[np.int64]]") -> Ints:
        """[node] fragmentation in milli-GPU * ppm of `nodes`, were their free CPU and devices [node, device] these."""
        free = np.maximum(gpu, 0)
        total = free.sum(1)
        waste: Ints = total * self._cpu_only
        if not len(self._count):
            return waste
        usable = gpu[:, None, :] >= self._levels[None, :, None]
        room, lost = usable.sum(2), (free[:, None, :] * ~usable).sum(2)
        capable = (cpu[:, None] >= self._cpu) & (room[:, self._level] >= self._count)
        capable &= self.allowed(state)[nodes]
        result: Ints = waste + (np.where(capable, lost[:, self._level], total[:, None]) * self._ppm).sum(1)
        return result

    def allowed(self, state: State) -> "npt.NDArray[np.bool_]":
        """[node, typical shape with GPU] whether the node has a model that the shape may use."""
        attributes = state.attributes
        known: tuple[int, npt.NDArray[np.bool_]] | None = state.caches.get((self, "allowed"))
        if known is None or known[0] != attributes.version:
            found = np.ones((state.size, len(self._models)), np.bool_)
            for at, models in enumerate(self._models):
                if models:
                    found[:, at] = attributes.model_count[[attributes.models[model] for model in models if model in attributes.models]].sum(0) > 0
            known = state.caches[(self, "allowed")] = attributes.version, found
        return known[1]

    def _gradients(self, state: State, klass: Klass, nodes: Ints) -> tuple[Ints, Ints]:
        """For `nodes`: how much the fragmentation falls at best (milli * ppm), and on which device (whole devices: 0)."""
        gpu = klass.shape.gpu
        assert gpu is not None
        if kernels.active is not None:
            fits, own = devices_for(state, klass, gpu), state.facts(klass).gpu_nodes
            best, chosen = kernels.active.gradients(
                state.free[0], state.gpu_free, fits[np.searchsorted(own, nodes)], nodes, gpu.milli, gpu.count, int(klass.request[0]), self.allowed(state), self._levels, self._level, self._cpu,
                self._count, self._ppm, self._cpu_only,
            )
            return best, chosen
        cpu = state.free[0, nodes]
        devices = state.gpu_free[nodes].astype(np.int64)
        before = self.of(state, nodes, cpu, devices)
        after_cpu = cpu - int(klass.request[0])
        fits = np.zeros((state.size, devices.shape[1]), np.bool_)
        fits[state.facts(klass).gpu_nodes] = devices_for(state, klass, gpu)
        fits = fits[nodes]
        if gpu.milli == GPU_WHOLE:
            taken = fits & (np.cumsum(fits, 1) <= gpu.count)
            return before - self.of(state, nodes, after_cpu, devices - GPU_WHOLE * taken), np.zeros(len(nodes), np.int64)
        at, device = np.nonzero(fits)
        tried = devices[at]
        tried[np.arange(len(at)), device] -= gpu.milli
        gain = before[at] - self.of(state, nodes[at], after_cpu[at], tried)
        order = np.lexsort((device, -gain, at))
        first = order[np.unique(at[order], return_index=True)[1]]
        best, chosen = np.full(len(nodes), LEAST, np.int64), np.zeros(len(nodes), np.int64)
        best[at[first]], chosen[at[first]] = gain[first], device[first]
        return best, chosen

    def kept(self, state: State, klass: Klass) -> tuple[Ints, Ints]:
        """[node] scores and devices for a class, brought up to date."""
        mine = state.caches.setdefault(self, {})
        known = mine.get(klass.shape)
        stale = state.facts(klass).gpu_nodes
        if known is None or known[3] != state.attributes.version:
            scores, devices = np.zeros(state.size, np.int64), np.zeros(state.size, np.int64)
        else:
            position, scores, devices, _ = known
            stale = stale[state.stamp[stale] > position]
        for start in range(0, len(stale), CHUNK):
            part = stale[start: start + CHUNK]
            gain, device = self._gradients(state, klass, part)
            scores[part] = (BEST / (1.0 + np.exp(-np.clip(gain / (PPM * GPU_WHOLE), -50, 50)))).astype(np.int64)
            devices[part] = device
        if len(mine) >= MAX_CLASSES:
            mine.clear()
        mine[klass.shape] = (state.stamps, scores, devices, state.attributes.version)
        return scores, devices

    def score(self, view: View) -> Ints | None:
        """[node] 50 where nothing changes, more where the node becomes less fragmented."""
        return None if view.klass.shape.gpu is None else self.kept(view.state, view.klass)[0]

    def device(self, state: State, klass: Klass, node: int) -> int:
        """The device on which a part of a GPU hurts least."""
        return int(self.kept(state, klass)[1][node])
