"""From a workload and its image to the OCI configuration that a runtime is given; everything is checked here, before anything is touched. Pure, but for resolving the paths of mounts.

`spec` of a container's document:

    command, args    lists; `command` takes the place of the image's entrypoint (its arguments then do not count), `args` that of its arguments
    env              object of texts; over the image's
    cwd, user        as in the image; user `1000`, `1000:1000`, `name`, `name:group`
    limits           cpu, memory, pids, beyond (or below) what is requested
    mounts           [{"target": "/data", "source": "/srv/data", "read_only": true}] from the folders that the node allows, or {"target": "/tmp", "tmpfs": "64Mi"}
    capabilities     some of `CAPABILITIES`; all of them by default
    network          {"ports": [...]}, see `network`; loopback alone without it
    read_only_root   true: the root file system cannot be written
    hostname, stop_signal
"""

import os
import posixpath
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..images import Config
from ..placement import quantity
from .face import Order, Refused
from .keeping import OOM_SCORE
from .network import network
from .seccomp import profile

SPEC_KEYS = ("args", "capabilities", "command", "cwd", "env", "hostname", "limits", "mounts", "network", "read_only_root", "stop_signal", "user")

CAPABILITIES = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETGID", "CAP_SETUID")
"""What root in a container may have: files of its own, users of its own, ports of its own network. Docker's has six more (raw sockets, device nodes, chroot, ...)."""

DEFAULT_MEMORY, DEFAULT_PIDS = 256 << 20, 512
"""Limits (bytes; processes and threads) where nothing is said."""

MIN_MEMORY = 6 << 20
"""Bytes; with less, a runtime cannot start anything."""

MIN_PIDS, MAX_PIDS = 16, 32_768
"""What starts a container is a program with threads of its own, and counts too: with 5 it fails now and then, without a word."""

MAX_MOUNTS = 32
MAX_TEXTS, MAX_TEXT = 1024, 32_768
"""Arguments or variables, and bytes of one: execve(2) takes 128 KiB each, and 2 MiB in all."""

CPU_PERIOD_US = 100_000
"""The kernel's default period of a processor quota."""

OPEN_FILES = (1024, 65_536)
"""Soft and hard limit, the latter at most the agent's own."""

ID_RANGE = 65_536
"""User and group ids of one user namespace."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,254}\Z")
_HOST = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_OWN = ("/proc", "/sys", "/dev")
"""What a mount may not cover."""

_MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
    "/sys/devices/virtual/powercap", "/sys/firmware",
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Host:
    """What matters of the host.

    Attributes:
        machine: as uname says.
        id_base: first id of the user namespace on the host; None: without one.
        swap: whether there is swap that is accounted: then containers get none of it.
        open_files: hard limit of the agent.
        allowed_mounts: folders that may be mounted, with all below them; real paths.
        seccomp: whether the runtime and the host can.
        memory, cpu: what there is, bytes and milli-CPU.
        network: why there is no network but loopback; empty where there is.
        publish: addresses on which ports may be published.
        unlimited: why no limits can be kept; empty where they are.
        files: where the container's own /etc/resolv.conf and /etc/hosts will be, where it has a network.
    """

    machine: str
    id_base: int | None = None
    swap: bool = False
    open_files: int = 1024
    allowed_mounts: tuple[str, ...] = ()
    seccomp: bool = True
    memory: int = 1 << 50
    cpu: int = 1 << 30
    network: str = "it was not looked for"
    publish: tuple[str, ...] = ()
    files: str = ""
    unlimited: str = ""


@dataclass(frozen=True, slots=True)
class Limit:
    """Memory (bytes), processor (milli-CPU; 0: only its share), processes and threads, and its share's weight (milli-CPU)."""

    memory: int
    cpu: int
    pids: int
    share: int


def limits(order: Order) -> Limit:
    """What it may use: what `spec.limits` says, else what was set aside for it."""
    told = _object(order.spec.get("limits"), "spec.limits", ("cpu", "memory", "pids"))
    memory = _amount("memory", told["memory"], "spec.limits.memory") if "memory" in told else order.requests.get("memory", 0) or DEFAULT_MEMORY
    if memory < MIN_MEMORY:
        raise Refused("spec.limits.memory", f"{memory} bytes are too few to start anything", f"give it {MIN_MEMORY} or more")
    cpu = _amount("cpu", told["cpu"], "spec.limits.cpu") if "cpu" in told else 0
    if cpu and cpu < 10:
        raise Refused("spec.limits.cpu", f"{cpu} milli-CPU are less than the kernel's least quota", "give it 10m or more")
    pids = told.get("pids", DEFAULT_PIDS)
    if not isinstance(pids, int) or isinstance(pids, bool) or not MIN_PIDS <= pids <= MAX_PIDS:
        raise Refused("spec.limits.pids", f"{str(pids)[:40]} is no number from {MIN_PIDS} to {MAX_PIDS}", "say how many processes and threads it needs; the runtime's own count while it starts")
    return Limit(memory, cpu, pids, order.requests.get("cpu", 0) or 100)


def _amount(resource: str, value: Any, field: str) -> int:
    try:
        amount = quantity(resource, value)
    except ValueError as error:
        raise Refused(field, str(error), "write it as 500m, 64Mi or a plain number") from None
    if amount >= 1 << 50:
        raise Refused(field, f"{str(value)[:40]} is more than any machine has", "ask for less")
    return amount


def configuration(order: Order, image: Config, host: Host, root: str, cgroup: str, ids: Callable[[str], tuple[int, int]]) -> dict[str, Any]:
    """`config.json`.

    Args:
        root: where its root file system will be.
        cgroup: path of its control group.
        ids: user and group of a `user[:group]` by the image's /etc/passwd and /etc/group.
    """
    spec = _object(dict(order.spec), "spec", SPEC_KEYS)
    command, arguments = _texts(spec.get("command"), "spec.command"), _texts(spec.get("args"), "spec.args")
    args = (command or image.entrypoint) + (arguments if "args" in spec else () if command else image.args)
    if not args or not args[0]:
        raise Refused("spec.command", "neither the workload nor the image says what to run", "give a command")
    uid, gid = ids(_text(spec.get("user"), "spec.user") or image.user)
    if host.id_base is not None and max(uid, gid) >= ID_RANGE:
        raise Refused("spec.user", f"{uid}:{gid} is beyond {ID_RANGE - 1}, the last id of a user namespace", "use a smaller one")
    cwd = _text(spec.get("cwd"), "spec.cwd") or image.cwd
    if not cwd.startswith("/"):
        raise Refused("spec.cwd", f"{cwd[:80]!r} does not begin with a slash", "name the folder from the root on")
    limit = limits(order)
    if host.unlimited and order.spec.get("limits"):
        raise Refused("spec.limits", f"cannot be kept on this node: {host.unlimited}", "leave it out, or place it on a node that can")
    for field, asked, there in (("memory", limit.memory, host.memory), ("cpu", limit.cpu, host.cpu)):
        if asked > there:
            raise Refused(f"spec.limits.{field}", f"{asked} are more than this node has ({there})", "ask for less, or place it on a larger node")
    wanted = spec.get("capabilities", list(CAPABILITIES))
    if not isinstance(wanted, list) or not set(map(str, wanted)) <= set(CAPABILITIES):
        raise Refused("spec.capabilities", "is not a list of some of those that a container can have", f"choose from {', '.join(CAPABILITIES)}")
    read_only = spec.get("read_only_root", False)
    if not isinstance(read_only, bool):
        raise Refused("spec.read_only_root", "is neither true nor false", "say true or false")
    hostname = _text(spec.get("hostname"), "spec.hostname") or re.sub(r"[^a-z0-9]+", "-", order.key.id.lower()).strip("-")[:63].rstrip("-") or "container"
    if not _HOST.match(hostname):
        raise Refused("spec.hostname", f"{hostname[:80]!r} is no host name", "use up to 63 small letters, digits and -")
    stop_signal(order, image)
    connected = network(spec.get("network"), host.publish)
    if connected is not None and host.network:
        raise Refused("spec.network", f"containers have no network on this node: {host.network}", "leave it out, or place it on a node that has one")
    sets = sorted(set(wanted))
    hard = min(OPEN_FILES[1], host.open_files)
    process = {
        "terminal": False, "user": {"uid": uid, "gid": gid}, "args": list(args), "env": _environment(image.env, spec.get("env")), "cwd": posixpath.normpath(cwd), "noNewPrivileges": True, "oomScoreAdj": OOM_SCORE,
        # None are ambient: a program that does not run as root has none.
        "capabilities": {"bounding": sets, "effective": sets, "permitted": sets, "inheritable": [], "ambient": []},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": min(OPEN_FILES[0], hard), "hard": hard}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
    }
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network", "cgroup")], "maskedPaths": list(_MASKED), "readonlyPaths": list(_READ_ONLY), "rootfsPropagation": "private",
        **({"resources": {"devices": [{"allow": False, "access": "rwm"}]}} if host.unlimited else {"cgroupsPath": cgroup, "resources": _resources(limit, host.swap)}),
    }
    if host.id_base is not None:
        linux["namespaces"].append({"type": "user"})
        linux["uidMappings"] = linux["gidMappings"] = [{"containerID": 0, "hostID": host.id_base, "size": ID_RANGE}]
    if host.seccomp:
        linux["seccomp"] = profile(host.machine)
    return {
        "ociVersion": "1.0.2", "hostname": hostname, "root": {"path": root, "readonly": read_only}, "process": process, "linux": linux,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            *([{"destination": f"/etc/{name}", "type": "bind", "source": f"{host.files}/{name}", "options": ["bind", "nosuid", "nodev", "noexec", "ro"]} for name in ("resolv.conf", "hosts")]
              if connected is not None else ()),
            *_mounts(spec.get("mounts"), host.allowed_mounts),
        ],
    }


def _resources(limit: Limit, swap: bool) -> dict[str, Any]:
    cpu: dict[str, int] = {"shares": max(2, limit.share * 1024 // 1000)}
    if limit.cpu:
        cpu |= {"period": CPU_PERIOD_US, "quota": limit.cpu * CPU_PERIOD_US // 1000}
    return {
        "memory": {"limit": limit.memory, **({"swap": limit.memory} if swap else {})}, "cpu": cpu, "pids": {"limit": limit.pids}, "devices": [{"allow": False, "access": "rwm"}],
    }


def stop_signal(order: Order, image: Config) -> int:
    """What asks it to end: TERM, where neither workload nor image say otherwise."""
    name = _text(order.spec.get("stop_signal"), "spec.stop_signal") or image.stop_signal or "SIGTERM"
    found = int(name) if name.isdigit() and len(name) < 3 else getattr(signal.Signals, name if name.startswith("SIG") else f"SIG{name}", None)
    if not isinstance(found, int) or not 1 <= found <= 64:
        raise Refused("spec.stop_signal", f"{name[:40]!r} is no signal", "use a name such as SIGTERM")
    return int(found)


def _environment(image: Sequence[str], told: Any) -> list[str]:
    found = dict(one.partition("=")[::2] for one in (_PATH, *image))
    if told is not None:
        for name, value in _object(told, "spec.env", None).items():
            if not _NAME.match(name):
                raise Refused("spec.env", f"{name[:40]!r} is no name of a variable", "use letters, digits and _")
            found[name] = _text(value, f"spec.env.{name[:40]}")
    if len(found) > MAX_TEXTS:
        raise Refused("spec.env", f"{len(found)} variables are over {MAX_TEXTS}", "give fewer")
    return [f"{name}={value}" for name, value in found.items()]


def _mounts(told: Any, allowed: Sequence[str]) -> list[dict[str, Any]]:
    if told is None:
        return []
    if not isinstance(told, list) or len(told) > MAX_MOUNTS:
        raise Refused("spec.mounts", f"is not a list of up to {MAX_MOUNTS} mounts", "give fewer")
    found = []
    for at, one in enumerate(told):
        field = f"spec.mounts[{at}]"
        mount = _object(one, field, ("target", "source", "read_only", "tmpfs", "shared"))
        target = posixpath.normpath(_text(mount.get("target"), f"{field}.target") or ".")
        if not target.startswith("/") or target.strip("/") == "" or any(target == own or target.startswith(own + "/") for own in _OWN):
            raise Refused(f"{field}.target", f"{target[:80]!r} cannot be mounted on", f"name a folder from the root on, not the root itself and nothing in {', '.join(_OWN)}")
        target = "/" + target.lstrip("/")
        if ("tmpfs" in mount) == ("source" in mount):
            raise Refused(field, "has not one of source and tmpfs", "give source (a folder of the node) or tmpfs (a size)")
        if "tmpfs" in mount:
            size = _amount("memory", mount["tmpfs"], f"{field}.tmpfs")
            found.append({"destination": target, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777", f"size={size}"]})
            continue
        source = _text(mount.get("source"), f"{field}.source")
        real = os.path.realpath(source)
        if not source.startswith("/") or not any(real == folder or real.startswith(folder.rstrip("/") + "/") for folder in allowed):
            raise Refused(f"{field}.source", f"{source[:80]!r} is not in a folder that this node allows to be mounted", "have the node's operator allow it, or put the data into the image")
        if not os.path.exists(real):
            raise Refused(f"{field}.source", f"{source[:80]!r} is not there", "make it on the node first")
        read_only = mount.get("read_only", True)
        for name in ("read_only", "shared"):
            if not isinstance(mount.get(name, True), bool):
                raise Refused(f"{field}.{name}", "is neither true nor false", "say true or false")
        found.append({"destination": target, "type": "bind", "source": real, "options": _bind(f"{field}.read_only", real, read_only)})
    return found


def _bind(field: str, source: str, read_only: bool) -> list[str]:
    """How a folder of the node is mounted. What the node mounted it with is locked for whoever is in a user namespace: a mount that does not say `noexec` where the node did is refused by the kernel, not made so."""
    flags = os.statvfs(source).f_flag
    if flags & os.ST_RDONLY and not read_only:
        raise Refused(field, f"is false, and the node has mounted the file system of {source[:80]!r} read-only", "say true, or have the node's operator mount it so that it can be written")
    return ["bind", "nosuid", "nodev", *(["noexec"] if flags & os.ST_NOEXEC else []), "ro" if read_only else "rw"]


def own_folders(spec: Mapping[str, Any]) -> list[str]:
    """Folders of the node that it may write to, and that its document does not say are the same on every node (`shared`): what is in them stays where it is."""
    return [str(one.get("source")) for one in spec.get("mounts") or () if "source" in one and one.get("read_only", True) is False and not one.get("shared", False)]


def _object(value: Any, field: str, known: Sequence[str] | None) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise Refused(field, "is not an object", "see what a container's spec has")
    if known is not None and (odd := sorted(set(value) - set(known))):
        raise Refused(f"{field}.{odd[0][:40]}", "is not known to the container driver", f"leave it out; known are {', '.join(known)}")
    return value


def _text(value: Any, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value or len(value) > MAX_TEXT:
        raise Refused(field, f"is not a text of up to {MAX_TEXT} characters without zero bytes", "give a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(field, "has half a character (a lone surrogate)", "give plain text") from None
    return value


def _texts(value: Any, field: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_TEXTS:
        raise Refused(field, f"is not a list of up to {MAX_TEXTS} texts", "give a list")
    return tuple(_text(one, f"{field}[{at}]") for at, one in enumerate(value))
