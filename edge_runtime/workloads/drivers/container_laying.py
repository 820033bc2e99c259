"""A container's folder, laid out for its keeper: what `container` writes before anything runs, all of it or nothing."""

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..images import Config, Image
from . import lease, outside
from .cgroups import Groups
from .container_spec import ID_RANGE, Host, configuration, stop_signal
from .face import Order, Refused
from .instance import present, sync_folder, write
from .network import connection, hosts, network, resolv_conf
from .users import ids

Fill = Callable[[Path, Path, dict[str, Any], dict[str, Any]], None]
"""Puts more into an instance that is being laid out: its folder as it will be called, and as it is; its `config.json` and `keeper.json`, not written yet."""

FIRST_ID = 0x7000_0000
"""First id on the host of the user namespaces' ranges: above those that systemd gives to containers of its own, and far above those of /etc/subuid."""

MAX_INSTANCES = 512
"""Instances on the disk, the ended ones too."""

_RANGES = (MAX_INSTANCES + 1) * ID_RANGE
"""Ids of one driver."""

CONTAINERD_FIRST_ID, CONVERTIBLE_FIRST_ID = FIRST_ID + _RANGES, FIRST_ID + 2 * _RANGES
"""Of the other drivers of a node, which have containers at the same time."""

ROOT = f"{outside.RUN}/root"
"""Where a container's root is mounted, in its keeper's mount namespace: each has its own there. Not in the data folder, which the container's root may not enter."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How containers are run.

    Attributes:
        runtimes: programs to try, in this order.
        log_bytes: kept of each stream of a container.
        allowed_mounts: folders of the node that may be mounted into containers, with all below them.
        users: give each container a user namespace where the host can.
        criu: the program that takes checkpoints, by a path or by its name on PATH; empty: none.
        network: let containers have the node's network, where slirp4netns is installed.
        publish: addresses of the node on which containers may publish ports.
        first_id: first id on the host of the user namespaces' ranges; each driver of a node has others.
    """

    runtimes: tuple[str, ...] = ("runc", "crun")
    log_bytes: int = 4 << 20
    allowed_mounts: tuple[str, ...] = ()
    users: bool = True
    criu: str = "criu"
    network: bool = True
    publish: tuple[str, ...] = ("127.0.0.1",)
    first_id: int = FIRST_ID


@dataclass(frozen=True, slots=True)
class Ways:
    """What has been found to work here: the runtime's command, whether with user namespaces, whether with seccomp; the program that connects containers, or why they have no
    network."""

    runtime: tuple[str, ...]
    users: bool
    seccomp: bool
    connector: str = ""
    unconnected: str = "it was not looked for"
    unlimited: str = ""
    """Why no limits can be kept; empty where they are."""


@dataclass(frozen=True, slots=True)
class Ground:
    """Where a driver's containers stand.

    Attributes:
        folder: of its instances.
        new: of what is being laid out, on the same disk.
        state: the runtime's own.
        settings: the driver's.
        groups: the node's control groups.
    """

    folder: Path
    new: Path
    state: Path
    settings: Settings
    groups: Groups


def lay_out(
    ground: Ground, order: Order, config: Config, lower: Sequence[Path], ways: Ways, group: str, leased: Path, image: Image | None = None, fill: Fill | None = None, was: int = -1,
) -> None:
    """Write an instance's folder, all or nothing, with what `fill` puts there; blocks. Raises `Refused`, or OSError.

    Args:
        lower: folders of its image's layers, the topmost first.
        group: its control group, in every hierarchy.
        leased: by which folder its lease goes, where it has one.
        was: first id of the range that it had, which it gets again where no other workload has it; below 0: it had none.
    """
    settings, groups = ground.settings, ground.groups
    there = present(ground.folder)
    if len(there) >= MAX_INSTANCES:
        raise Refused("instances", f"there are {len(there)} on this node, the most there may be", "delete those that have ended")
    told = os.statvfs(ground.folder)
    free, asked = told.f_bavail * told.f_frsize, order.requests.get("disk", 0)
    if free < asked:
        raise Refused("requests.disk", f"{asked} bytes are asked for, {free} are free", "ask for less, free space, or place it on another node")
    slot = _slot(there, order.key.id, was - settings.first_id)
    base = settings.first_id + slot * ID_RANGE if ways.users else None
    name = lease.name_of(order.key.id, order.key.epoch)
    folder = ground.folder / name
    host = Host(
        platform.machine(), base, groups.accounts_swap, _open_files(), tuple(os.path.realpath(one) for one in settings.allowed_mounts), ways.seccomp, _memory(), (os.cpu_count() or 1) * 1000,
        ways.unconnected, settings.publish, str(folder), ways.unlimited,
    )
    document = configuration(order, config, host, ROOT, group, lambda user: ids(user, lower))
    connected = network(order.spec.get("network"), settings.publish)
    laid = ground.new / name
    shutil.rmtree(laid, ignore_errors=True)
    laid.mkdir(mode=0o700)
    (laid / "disk").mkdir()
    for part in ("upper", "work"):
        (laid / "disk" / part).mkdir()
    top = os.stat(lower[0])
    os.chmod(laid / "disk/upper", top.st_mode & 0o7777)
    os.chown(laid / "disk/upper", top.st_uid + (base or 0), top.st_gid + (base or 0))  # the root folder itself comes from the upper layer
    keeper = {
        "folder": str(folder), "name": name, "root": ROOT, "lower": [str(one) for one in lower], "id_base": base, "id_range": ID_RANGE, "log_bytes": settings.log_bytes,
        "runtime": [*ways.runtime, "--root", str(ground.state)], "oom": groups.memory_events(group), "lease": str(lease.path_of(leased)) if order.leased else "",
        "network": connection(ways.connector, connected, ways.users) if connected is not None else None,
    }
    instance = {
        "id": order.key.id, "epoch": order.key.epoch, "slot": slot, "image": image.digest if image else "", "layers": list(config.diff_ids), "signal": stop_signal(order, config), "runtime": list(ways.runtime), "leased": order.leased,
        "reference": order.image, "requests": dict(order.requests), "spec": dict(order.spec), "job": order.job,
    }
    if connected is not None:
        (laid / "resolv.conf").write_text(resolv_conf())
        (laid / "hosts").write_text(hosts(document["hostname"]))
    if fill is not None:
        fill(folder, laid, document, keeper)
    for file, value in (("config.json", document), ("keeper.json", keeper), ("instance.json", instance)):
        write(laid / file, value)
    (laid / "lock").touch(mode=0o600)
    os.rename(laid, folder)
    sync_folder(ground.folder)


def _slot(there: dict[str, dict[str, Any]], workload: str, was: int) -> int:
    """Which range of ids, of those that no instance has; `was`: offset of the one that it had, below 0: none."""
    before, odd = divmod(was, ID_RANGE)
    if not odd and 0 <= before <= MAX_INSTANCES and before not in {entry.get("slot") for entry in there.values() if entry["id"] != workload}:
        return before  # what it wrote to folders of the node belongs to these ids
    taken = {entry.get("slot") for entry in there.values()}
    return next(number for number in range(MAX_INSTANCES + 1) if number not in taken)


def _open_files() -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
