"""Which nodes will do: every filter over all nodes at once, one bit per failed filter. O(nodes) per constraint, whatever runs there."""

import numpy as np

from . import kernels
from .arrays import GONE, UP
from .classes import Klass
from .model import HOST, GpuRequest, Shape
from .reasons import Bits, Bools, Fail, Ints
from .state import State
from .units import CPU, GPU_WHOLE, MEMORY


def verdicts(state: State, klass: Klass) -> Bits:
    """[node] the filters that each node fails for a class; 0 where it will do."""
    facts, shape = state.facts(klass), klass.shape
    if kernels.active is not None:
        bits: Bits = kernels.active.base_bits(facts.fails, state.status, state.cordon, klass.ignores_cordon, state.free, klass.resources, klass.amounts)
    else:
        bits = facts.fails.copy()
        if state.status.any():
            _mark(bits, state.status != UP, Fail.DOWN)
        if not klass.ignores_cordon and state.cordon.any():
            _mark(bits, state.cordon, Fail.CORDONED)
        short: Bools = np.logical_or.reduce(state.free[klass.resources] < klass.amounts)
        _mark(bits, short, Fail.RESOURCES)
    if shape.gpu is not None and kernels.active is not None:
        kernels.active.mark_gpu(bits, facts.gpu_nodes, facts.devices, state.gpu_free, state.gpu_mem, shape.gpu.milli, shape.gpu.memory, shape.gpu.count)
    elif shape.gpu is not None:
        room = devices_for(state, klass, shape.gpu).sum(1)
        bits[facts.gpu_nodes[room < shape.gpu.count]] |= np.uint32(Fail.GPU)
    if shape.numa_single and state.numa_free.shape[1]:
        _mark(bits, ~numa_fits(state, shape), Fail.NUMA)
    for link in shape.links:
        _mark(bits, ~state.sites.allows(link, state.site_of), Fail.LINK)
    if klass.affinity is not None:
        _mark(bits, ~with_peers(state, klass), Fail.AFFINITY)
    if klass.anti:
        _mark(bits, occupied(state, klass.anti), Fail.ANTI_AFFINITY)
    if klass.excluded_by:
        _mark(bits, occupied(state, klass.excluded_by), Fail.EXCLUDED)
    if shape.spread:
        _spread(state, klass, facts.affine, bits)
    return bits


def _mark(bits: Bits, mask: Bools, flag: Fail) -> None:
    np.bitwise_or(bits, np.uint32(flag), out=bits, where=mask)


def devices_for(state: State, klass: Klass, gpu: GpuRequest) -> Bools:
    """[gpu node of the class, device] whether a device can take its part of the request."""
    facts = state.facts(klass)
    fits: Bools = facts.devices & (state.gpu_free[facts.gpu_nodes] >= gpu.milli)
    return fits & (state.gpu_mem[facts.gpu_nodes] >= gpu.memory) if gpu.memory else fits


def gpu_room(state: State, klass: Klass, gpu: GpuRequest) -> Ints:
    """[node] how many devices can take their part."""
    room = np.zeros(state.size, np.int64)
    room[state.facts(klass).gpu_nodes] = devices_for(state, klass, gpu).sum(1)
    return room


def numa_fits(state: State, shape: Shape) -> Bools:
    """[node] whether one zone holds CPU and memory; a node without zones is one zone."""
    need = shape.request_map
    zones = state.numa_free
    found: Bools = ((zones[:, :, 0] >= need.get(CPU, 0)) & (zones[:, :, 1] >= need.get(MEMORY, 0))).any(1) | (zones[:, 0, 0] < 0)
    return found


def in_domain(state: State, key: str, counts: Ints) -> Ints:
    """[node] the sum of `counts` over the node's domain of a topology key; 0 where it has none."""
    if key == HOST:
        return counts
    domain, size = state.attributes.domains(key)
    if kernels.active is not None:
        compiled: Ints = kernels.active.in_domain(domain, size, counts)
        return compiled
    sums = np.bincount(domain + 1, weights=counts, minlength=size + 1)
    sums[0] = 0
    result: Ints = sums[domain + 1].astype(np.int64)
    return result


def occupied(state: State, rows: tuple[tuple[int, str], ...]) -> Bools:
    """[node] whether any of the (counter row, topology key) is above 0 in the node's domain."""
    found = np.zeros(state.size, np.bool_)
    by_key: dict[str, Ints] = {}
    for row, key in rows:
        counts = state.counts[row]
        by_key[key] = by_key[key] + counts if key in by_key else counts
    for key, counts in by_key.items():
        if counts.any():
            found |= in_domain(state, key, counts) > 0
    return found


def with_peers(state: State, klass: Klass) -> Bools:
    """[node] whether all affinity terms find their workloads in the node's domains; the first of a group that matches itself may start anywhere with the keys."""
    assert klass.affinity is not None
    row, keys, matches_itself = klass.affinity
    counts = state.counts[row]
    found = np.ones(state.size, np.bool_)
    keyed = np.ones(state.size, np.bool_)
    anywhere = np.zeros(state.size, np.bool_)
    for key in keys:
        has = state.attributes.domains(key)[0] >= 0
        keyed &= has
        anywhere |= has & (counts > 0)
        found &= in_domain(state, key, counts) > 0
    return keyed if matches_itself and not anywhere.any() else found & keyed


def _spread(state: State, klass: Klass, affine: Bools, bits: Bits) -> None:
    hard = [(item, row, own) for item, row, own in zip(klass.shape.spread, klass.spread_rows, klass.spread_self, strict=True) if item.hard]
    if not hard:
        return
    eligible = affine & (state.status != GONE)  # a machine that is gone is no empty domain that everybody has to wait for
    for item, _, _ in hard:
        keyed = state.attributes.domains(item.topology_key)[0] >= 0
        _mark(bits, ~keyed, Fail.SPREAD_KEY)
        eligible = eligible & keyed
    for item, row, own in hard:
        domain, size = state.attributes.domains(item.topology_key)
        if kernels.active is not None:
            kernels.active.mark_spread(bits, eligible, domain, size, state.counts[row], own, item.max_skew, item.min_domains)
            continue
        index = np.where(eligible, domain, size)
        there = np.bincount(index, minlength=size + 1)[:size] > 0
        if not there.any():
            continue
        sums = np.bincount(index, weights=state.counts[row], minlength=size + 1)[:size]
        least = sums[there].min() if np.count_nonzero(there) >= item.min_domains else 0
        full = np.append(np.where(there, sums, 0) + own - least > item.max_skew, False)
        _mark(bits, full[domain], Fail.SPREAD)


def shortage(state: State, klass: Klass) -> Ints:
    """[requested resource, node] how much is missing, 0 where there is enough; in the order of `klass.resources`."""
    missing: Ints = np.maximum(klass.amounts - state.free[klass.resources], 0)
    return missing


def choose_devices(state: State, node: int, gpu: GpuRequest) -> tuple[int, ...] | None:
    """The devices of one node for a request: whole ones in order, a part on the fullest that fits; None where it does not fit."""
    fits = [device for device in range(len(state.nodes[node].gpus)) if state.gpu_free[node, device] >= gpu.milli and state.gpu_mem[node, device] >= gpu.memory
            and (not gpu.models or state.nodes[node].gpus[device].model in gpu.models)]
    if len(fits) < gpu.count:
        return None
    if gpu.milli == GPU_WHOLE:
        return tuple(fits[: gpu.count])
    return (min(fits, key=lambda device: (int(state.gpu_free[node, device]), device)),)


def numa_share(state: State, node: int, shape: Shape) -> tuple[tuple[int, int, int], ...] | None:
    """What a workload takes of the zones of a node: one zone where it must (the tightest that fits), else spread over the freest; None where it does not fit."""
    zones, need = len(state.nodes[node].numa), dict(shape.requests)
    cpu, memory = need.get(CPU, 0), need.get(MEMORY, 0)
    if not zones or not (cpu or memory):
        return ()
    free: list[list[int]] = state.numa_free[node, :zones].tolist()
    if shape.numa_single:
        fits = [zone for zone in range(zones) if free[zone][0] >= cpu and free[zone][1] >= memory]
        best = min(fits, key=lambda zone: (*free[zone], zone), default=None)
        return None if best is None else ((best, cpu, memory),)
    shares = []
    for zone in sorted(range(zones), key=lambda zone: (-free[zone][0], zone)):
        share = (zone, min(cpu, max(0, free[zone][0])), min(memory, max(0, free[zone][1])))
        cpu, memory = cpu - share[1], memory - share[2]
        if share[1] or share[2]:
            shares.append(share)
    return None if cpu or memory else tuple(shares)
