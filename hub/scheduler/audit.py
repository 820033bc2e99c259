"""What must always hold: the books worked out again from the single workloads. Raises `AssertionError` naming the first that does not."""

import numpy as np

from . import classes
from .arrays import MAX_RESOURCES
from .model import GpuRequest
from .state import State
from .units import GPU_WHOLE


def check_invariants(state: State, *, overcommit: bool = False) -> None:
    """All books against all workloads; `overcommit`: nodes may hold more than they have (after `adopt`)."""
    free, load = state.cap.copy(), np.zeros(state.size, np.int64)
    gpu, memory = np.full_like(state.gpu_free, -1), np.full_like(state.gpu_mem, -1)
    numa = np.full_like(state.numa_free, -1)
    counts = {row: np.zeros(state.size, np.int64) for row in state.rows.values()}
    live = np.zeros_like(state.class_live)
    used: dict[str, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
    for index, node in enumerate(state.nodes):
        gpu[index, : len(node.gpus)] = GPU_WHOLE
        memory[index, : len(node.gpus)] = [device.memory for device in node.gpus]
        for at, part in enumerate(node.numa):
            numa[index, at] = part.cpu, part.memory
    levels = {priority: np.zeros((len(state.cap) + 1, state.size), np.int64) for priority in state.levels}
    orders: dict[int, list[tuple[int, int, int]]] = {}
    placed = 0
    for slot, item in enumerate(state.items):
        seat = state.seats[slot]
        if item is None or seat is None:
            assert item is None and seat is None and state.w_node[slot] == -1, f"slot {slot} is half empty"
            continue
        placed += 1
        assert state.slot_of.get(item.id) == slot, f"{item.id} is not found in its slot"
        klass = state.classes[state.class_of[item.shape]]
        assert klass is not None and state.w_class[slot] == klass.id and state.w_node[slot] == seat.node and state.w_priority[slot] == item.priority, f"{item.id}: columns differ"
        for name, amount in item.shape.request_map.items():
            free[state.resource_rows[name], seat.node] -= amount
        load[seat.node] += 1
        live[klass.id] += 1
        request = item.shape.gpu or GpuRequest(0, 0)
        assert len(set(seat.gpus)) == request.count == len(seat.gpus), f"{item.id} holds {seat.gpus} for {request.count} devices"
        if item.preemptible:
            for name, amount in item.shape.request_map.items():
                levels[item.priority][state.resource_rows[name] + 1, seat.node] += amount
            levels[item.priority][0, seat.node] += request.count * request.milli
            orders.setdefault(seat.node, []).append((-item.priority, int(state.w_start[slot]), slot))
        assert state.w_gpus[slot] == sum(1 << device for device in seat.gpus), f"{item.id}: its devices differ"
        for device in seat.gpus:
            gpu[seat.node, device] -= request.milli
            memory[seat.node, device] -= request.memory
        for zone, cpu, size in seat.numa:
            numa[seat.node, zone] -= (cpu, size)
        for key, row in state.rows.items():
            if not (key.what == "spread" and state.w_ending[slot]):
                counts[row][seat.node] += classes.delta(key, item.shape, state.namespaces)
        if item.tenant:
            mine = used.setdefault(item.tenant, np.zeros(MAX_RESOURCES + 1, np.int64))
            for name, amount in item.shape.request_map.items():
                mine[state.resource_rows[name]] += amount
            mine[MAX_RESOURCES] += request.count * request.milli
    assert placed == len(state.slot_of), "an id points to an empty slot"
    for name, ours, theirs in (("free", free, state.free), ("load", load, state.load), ("gpu_free", gpu, state.gpu_free), ("gpu_mem", memory, state.gpu_mem),
                               ("numa_free", numa, state.numa_free), ("class_live", live, state.class_live)):
        assert np.array_equal(ours, theirs), f"{name} differs from what the workloads hold, at {np.argwhere(ours != theirs)[:3].tolist()}"
    for key, row in state.rows.items():
        assert np.array_equal(counts[row], state.counts[row]), f"counter row {key.what} {key.terms} {key.selector} differs"
    _check_orders(state, orders)
    for priority, held in levels.items():
        assert np.array_equal(held, state.levels[priority]), f"what priority {priority} holds differs"
    for tenant in used.keys() | state.used_by.keys():
        assert np.array_equal(used.get(tenant, np.zeros(MAX_RESOURCES + 1, np.int64)), state.used_by.get(tenant, np.zeros(MAX_RESOURCES + 1, np.int64))), f"use of {tenant} differs"
    if not overcommit:
        assert (state.free >= 0).all(), f"overcommitted: {np.argwhere(state.free < 0)[:3].tolist()}"
        assert (state.gpu_free >= -1).all() and (gpu[state.gpu_free == -1] == -1).all(), "a device is overcommitted"


def _check_orders(state: State, orders: dict[int, list[tuple[int, int, int]]]) -> None:
    """The chains of what may be preempted, against (-priority, start, slot) of it per node."""
    assert state.levels.keys() == state.last.keys() == state.largest.keys(), "the levels and what is known of their chains are not of the same priorities"
    assert state.w_next[-1] == state.w_prev[-1] == -1, "the entry past the slots leads somewhere"
    for node in range(state.size):
        order = [slot for _, _, slot in sorted(orders.get(node, []))]
        found, slot = list[int](), int(state.first[node])
        while slot >= 0 and len(found) <= len(order):
            assert state.w_prev[slot] == (found[-1] if found else -1), f"slot {slot} does not lead back"
            found.append(slot)
            slot = int(state.w_next[slot])
        assert found == order, f"the order of importance on node {node} is {found[:8]} instead of {order[:8]}"
        for priority, last in state.last.items():
            expected = next((slot for slot in reversed(order) if state.w_priority[slot] == priority), -1)
            assert last[node] == expected, f"the last of priority {priority} on node {node} is {last[node]} instead of {expected}"
            requests = state.class_request[:, [state.w_class[slot] for slot in order if state.w_priority[slot] == priority]].max(1, initial=1)
            assert (state.largest[priority][:, node] >= requests).all(), f"a request of priority {priority} on node {node} is larger than the largest that is known"
