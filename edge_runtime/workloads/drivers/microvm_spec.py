"""From a workload and its image to what a micro-VM is told: the same `spec` as a container's, and the same checks. Pure, but for the files of users."""

from collections.abc import Callable
from typing import Any

from ..images import Config
from .container_spec import CAPABILITIES, CPU_PERIOD_US, Host, configuration, limits
from .face import Order, Refused
from .qemu_machine import Machine

OWN_MB = 80
"""MiB that a guest has beside the workload's limit: its kernel (36 MiB of them the guest never sees as free), its first process, its page tables."""

STEPS_MB = ((1024, 128), (8192, 512), (1 << 20, 4096))
"""Memory comes in steps, up to the first number by the second, so that few templates serve many: what a guest does not touch costs nothing, and its limit is kept by a control group inside."""

MAX_CPUS = 16
"""Processors of one guest."""

DEFAULT_DISK, MIN_DISK = 1 << 30, 16 << 20
"""Bytes that it may write to its root, where `requests.disk` does not say; and the least for which a file system can be made."""


def memory_mb(limit: int) -> int:
    """MiB of a guest whose workload may use `limit` bytes."""
    asked = -(-limit // (1 << 20)) + OWN_MB
    step = next((size for most, size in STEPS_MB if asked <= most), STEPS_MB[-1][1])
    return -(-asked // step) * step


def machine(order: Order, accelerator: str, host_cpus: int) -> Machine:
    """Which template serves it."""
    limit = limits(order)
    cpus = max(1, -(-limit.cpu // 1000))
    if cpus > min(MAX_CPUS, host_cpus):
        raise Refused("spec.limits.cpu", f"{limit.cpu} milli-CPU need {cpus} processors, a micro-VM here has {min(MAX_CPUS, host_cpus)} at most", "ask for less, or place it on a larger node")
    return Machine(memory_mb(limit.memory), cpus, accelerator)


def disk_bytes(order: Order) -> int:
    """What it may write."""
    asked = order.requests.get("disk", 0) or DEFAULT_DISK
    if asked < MIN_DISK:
        raise Refused("requests.disk", f"{asked} bytes are too few for a file system", f"ask for {MIN_DISK} or more")
    return -(-asked // 4096) * 4096


def document(order: Order, image: Config, host: Host, ids: Callable[[str], tuple[int, int]]) -> dict[str, Any]:
    """What the guest is told. Raises `Refused`."""
    if set(order.spec.get("capabilities", CAPABILITIES) or ()) != set(CAPABILITIES):
        raise Refused("spec.capabilities", "cannot be taken away in a micro-VM, whose program has a kernel of its own", "leave it out, or run it as another user than root")
    if "network" in order.spec:
        raise Refused("spec.network", "a micro-VM has no network but loopback yet", "leave it out, or run it with isolation namespaces")
    told = configuration(order, image, host, "/", "", ids)
    process, limit = told["process"], limits(order)
    if "=" in process["args"][0]:
        raise Refused("spec.command", f"{process['args'][0][:80]!r} has a = in its name, which a micro-VM takes for a variable", "give the program another name")
    tmpfs = []
    for mount in order.spec.get("mounts") or ():
        if "tmpfs" not in mount:
            raise Refused("spec.mounts", f"{str(mount.get('target'))[:80]!r} is a folder of the node, which a micro-VM does not share", "put the data into the image, or run it with isolation namespaces")
    for mount in told["mounts"][5:]:
        tmpfs.append([mount["destination"], mount["options"][-1].removeprefix("size=")])
    return {
        "args": process["args"], "env": process["env"], "cwd": process["cwd"], "uid": process["user"]["uid"], "gid": process["user"]["gid"], "hostname": told["hostname"], "read_only": told["root"]["readonly"],
        "tmpfs": tmpfs, "memory": limit.memory, "pids": limit.pids, "cpu_us": limit.cpu * CPU_PERIOD_US // 1000,
    }
