"""Checks placements from the raw requests with plain loops; knows nothing of the packing code."""

from collections.abc import Sequence
from typing import Any

WHOLE_GPU = 1000
"""Milli-GPU of one device."""


class Wrong(AssertionError):
    """A placement that breaks a rule; names the item and the rule."""


def check_bins(sizes: Sequence[Sequence[int]], capacity: Sequence[int], bins: Sequence[int], claimed: int) -> None:
    """Every item in one bin of 0 .. claimed-1, no bin above `capacity` in any dimension; raises `Wrong`."""
    if len(bins) != len(sizes):
        raise Wrong(f"{len(sizes)} items, but {len(bins)} have a bin")
    loads = [[0] * len(capacity) for _ in range(claimed)]
    for item, b in enumerate(bins):
        if not 0 <= b < claimed:
            raise Wrong(f"item {item} is in bin {b}, of {claimed}")
        for k, size in enumerate(sizes[item]):
            loads[b][k] += int(size)
    for b, load in enumerate(loads):
        for k, total in enumerate(load):
            if total > capacity[k]:
                raise Wrong(f"bin {b} holds {total} of {capacity[k]} in dimension {k}")


def check_groups(requests: Sequence[Sequence[int]], counts: Sequence[int], capacities: Sequence[Sequence[int]], allowed: Sequence[Sequence[bool]], node_group: Sequence[int], placed: Sequence[tuple[int, int, int]]) -> list[int]:
    """`placed`: (class, node, how many). No node above its group's capacity, no class where it is not allowed or more often than asked for; how many of each class were placed."""
    done = [0] * len(requests)
    loads = [[0] * len(capacities[0]) for _ in node_group]
    for kind, node, many in placed:
        if many < 0:
            raise Wrong(f"class {kind} on node {node}: {many} of it")
        if many and not allowed[kind][node_group[node]]:
            raise Wrong(f"class {kind} is on node {node}, of group {node_group[node]}, where it is not allowed")
        done[kind] += int(many)
        for k, size in enumerate(requests[kind]):
            loads[node][k] += int(size) * int(many)
    for kind, many in enumerate(done):
        if many > counts[kind]:
            raise Wrong(f"class {kind} is placed {many} times, asked for {counts[kind]} times")
    for node, load in enumerate(loads):
        for k, total in enumerate(load):
            if total > capacities[node_group[node]][k]:
                raise Wrong(f"node {node} holds {total} of {capacities[node_group[node]][k]} of resource {k}")
    return done


def check_gpus(nodes: Sequence[dict[str, Any]], pods: Sequence[dict[str, Any]], node_of: Sequence[int], device_of: Sequence[int]) -> int:
    """Pods of openb on its nodes, by the columns' names; `device_of` is a shared pod's device, else a bit per whole device. The milli-GPU allocated; raises `Wrong`."""
    cpu = [int(node["cpu_milli"]) for node in nodes]
    memory = [int(node["memory_mib"]) for node in nodes]
    device = [[WHOLE_GPU] * int(node["gpu"]) for node in nodes]
    allocated = 0
    for index, pod in enumerate(pods):
        at = node_of[index]
        if at < 0:
            continue
        name = f"pod {index} on node {at}"
        models = [model for model in pod["gpu_spec"].split("|") if model]
        num = int(pod["num_gpu"])
        if models and num and nodes[at]["model"] not in models:
            raise Wrong(f"{name}: model {nodes[at]['model']} is not of {models}")
        cpu[at] -= int(pod["cpu_milli"])
        memory[at] -= int(pod["memory_mib"])
        if cpu[at] < 0 or memory[at] < 0:
            raise Wrong(f"{name}: {-cpu[at]} milli-CPU or {-memory[at]} MiB too much")
        if not num:
            continue
        milli = int(pod["gpu_milli"])
        if milli < WHOLE_GPU:
            taken = [int(device_of[index])]
        else:
            taken = [d for d in range(64) if int(device_of[index]) >> d & 1]
        if len(taken) != num:
            raise Wrong(f"{name}: {len(taken)} devices instead of {num}")
        for d in taken:
            if not 0 <= d < len(device[at]):
                raise Wrong(f"{name}: there is no device {d}")
            device[at][d] -= milli
            if device[at][d] < 0:
                raise Wrong(f"{name}: device {d} is {-device[at][d]} milli-GPU over")
            allocated += milli
    return allocated
