"""Control groups of this host: which layout there is, and what a group uses. Version 1, version 2, or both at once (hybrid: the controllers are in version 1)."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import outside
from .face import Stats

PARENT = outside.GROUPS
"""The group above all containers, in every hierarchy."""

KEEPERS = f"{outside.GROUPS}-keepers"
"""The group of those that watch over containers, and of functions: outside of the agent's, which a service manager ends as a whole, and of the containers'."""

PERIOD_US = 100_000
"""The kernel's default period of a processor quota."""

MACHINE_PIDS = 256
"""Processes and threads of a QEMU: a hundred for its disks and processors."""

NEEDED = ("memory", "cpu", "pids", "freezer", "devices")
"""Controllers that a container needs in version 1; version 2 has the last two without a controller."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Where they are mounted: by controller (version 1; named hierarchies as `name=systemd`), and version 2's, empty where there is none.

    Attributes:
        unified_controllers: what version 2 has to give.
    """

    mounts: Mapping[str, str]
    unified: str
    unified_controllers: frozenset[str]

    @property
    def layout(self) -> str:
        """`v1`, `v2`, `hybrid` or `none`."""
        if any(not name.startswith("name=") for name in self.mounts):
            return "hybrid" if self.unified else "v1"
        return "v2" if self.unified else "none"

    @property
    def lacks(self) -> str:
        """What containers need and is not there, in words; empty where all is."""
        if self.layout == "none":
            return "no control groups are mounted"
        have = self.unified_controllers if self.layout == "v2" else self.mounts.keys()
        missing = [name for name in (NEEDED[:3] if self.layout == "v2" else NEEDED) if name not in have]
        return f"the cgroup controllers {', '.join(missing)} are missing" if missing else ""

    def undelegated(self, group: str = PARENT) -> str:
        """Why limits cannot be kept below a group that root has to make for us, in words; empty where they can."""
        if outside.UID is None:
            return ""
        if self.layout == "v2":
            return "limits without root are kept with control groups of version 1 only, and this node has version 2"
        lacking = [name for name, top in self.mounts.items() if not os.access(top + group, os.W_OK)]
        return f"no control group is this user's (as root, in each of {', '.join(sorted(lacking))}: mkdir {group[1:]}, chown -R {outside.UID} {group[1:]})" if lacking else ""

    def folders(self, group: str) -> list[str]:
        """A group's folder in every hierarchy in which a process can simply be put (not cpuset: an empty one takes none)."""
        tops = [mount for name, mount in self.mounts.items() if name != "cpuset"] + ([self.unified] if self.unified else [])
        return list(dict.fromkeys(top + group for top in tops))

    def of_all(self, group: str) -> list[str]:
        """A group's folder in every hierarchy."""
        return [top + group for top in dict.fromkeys([*self.mounts.values(), *([self.unified] if self.unified else [])])]

    def remove(self, group: str) -> bool:
        """Take away a group in which nothing runs any more, with those below it; whether it is gone from every hierarchy."""
        for top in self.of_all(group):
            for folder, _, _ in os.walk(top, topdown=False):
                with suppress(OSError):  # what is busy is not gone
                    os.rmdir(folder)
        return not any(os.path.exists(top) for top in self.of_all(group))

    def of_keepers(self) -> list[str]:
        """The folders of those that watch over workloads: `KEEPERS`, but for the processor the node's own group where that can be chosen (version 1, root of the machine).

        In a group of theirs all of them, with the runtimes that they call and the guests that they boot, would have the share of one process: on a busy machine nothing would start in time.
        """
        own = self.mounts.get("cpu") if outside.UID is None else None
        return [top.removesuffix(KEEPERS) if own is not None and top == own + KEEPERS else top for top in self.folders(KEEPERS)]

    def stir(self, own: str | None = None) -> None:
        """Have the kernel ready for a process that is about to be put into a group; changes nothing, blocks for about as long as that would.

        Whoever is the first for some 10 ms to put a process into a group waits for a grace period, 8 to 20 ms, and those after it do not (Linux, kernel/rcu/sync.c, below `cgroup_threadgroup_rwsem`). It
        is a quarter of a container's start; waited for here, it passes while the keeper mounts and the runtime is loaded. We write ourselves into the group that we are in. Without the right to, nothing happens.

        Args:
            own: what /proc/self/cgroup says, where not that.
        """
        for line in (_text("/proc/self/cgroup") if own is None else own).splitlines():
            _, names, group = line.split(":", 2)
            top = next((self.mounts[name] for name in names.split(",") if name in self.mounts), "") if names else self.unified
            if not top:
                continue
            try:
                procs = os.open(f"{top}{group}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                with suppress(OSError):  # the lock was taken, which is all that is wanted
                    os.write(procs, b"0")
            finally:
                os.close(procs)
            return

    def memory_events(self, group: str) -> list[str]:
        """Files that tell of kills for want of memory."""
        return [f"{self.unified}{group}/memory.events"] if self.layout == "v2" else [f"{self.mounts['memory']}{group}/memory.oom_control"] if "memory" in self.mounts else []

    def processes(self, group: str) -> str:
        """The file with the processes of a group."""
        return f"{self.unified if self.layout == 'v2' else self.mounts.get('freezer', '')}{group}/cgroup.procs"

    def memory_limit(self, group: str) -> int:
        """Bytes; -1 where none can be read."""
        path = f"{self.unified}{group}/memory.max" if self.layout == "v2" else f"{self.mounts.get('memory', '')}{group}/memory.limit_in_bytes"
        return _number(path)

    def stats(self, group: str) -> Stats:
        """What a group uses; -1 for what cannot be read."""
        if self.layout == "v2":
            top = self.unified + group
            spent = next((int(line.split()[1]) * 1000 for line in _text(f"{top}/cpu.stat").splitlines() if line.startswith("usage_usec ")), -1)
            return Stats(spent, _number(f"{top}/memory.current"), _number(f"{top}/pids.current"))
        return Stats(
            _number(f"{self.mounts.get('cpuacct', '')}{group}/cpuacct.usage"), _number(f"{self.mounts.get('memory', '')}{group}/memory.usage_in_bytes"), _number(f"{self.mounts.get('pids', '')}{group}/pids.current"),
        )

    def frozen(self, group: str) -> bool:
        """Whether all in it stands still."""
        if self.layout == "v2":
            return "frozen 1" in _text(f"{self.unified}{group}/cgroup.events").splitlines()
        return _text(f"{self.mounts.get('freezer', '')}{group}/freezer.state").strip() == "FROZEN"

    def of_machine(self, group: str, most: int, weight: int, quota_us: int = 0) -> list[list[Any]]:
        """The control groups of a QEMU: files and what to write, None for those that take its process. They hold a QEMU that misbehaves.

        Args:
            most: bytes that it may use.
            weight: of its share of the processor, milli-CPU; 0: that of any process. All groups of workloads together have the share of one process of the node's.
            quota_us: of each `PERIOD_US`; 0: only its share.
        """
        if self.layout == "v2":
            top = self.unified
            told: list[list[Any]] = [[f"{top}/cgroup.subtree_control", "+memory +cpu +pids"], [f"{top}{PARENT}/cgroup.subtree_control", "+memory +cpu +pids"]]
            told += [[f"{top}{group}/memory.max", most], [f"{top}{group}/pids.max", MACHINE_PIDS]]
            told += [[f"{top}{group}/cpu.weight", min(10_000, max(1, weight // 10))]] if weight else []
            return [*told, *([[f"{top}{group}/cpu.max", f"{quota_us} {PERIOD_US}"]] if quota_us else []), [f"{top}{group}/cgroup.procs", None]]
        mounts = self.mounts
        told = [[f"{mounts['memory']}{group}/memory.limit_in_bytes", most], [f"{mounts['pids']}{group}/pids.max", MACHINE_PIDS]]
        told += [[f"{mounts['cpu']}{group}/cpu.shares", max(2, weight * 1024 // 1000)]] if weight else []
        told += [[f"{mounts['cpu']}{group}/cpu.cfs_quota_us", quota_us]] if quota_us else []
        return told + [[f"{mount}{group}/cgroup.procs", None] for mount in dict.fromkeys(mounts[name] for name in ("memory", "pids", *(("cpu", "cpuacct") if weight else ())) if name in mounts)] + ([] if weight or "cpu" not in mounts else [[f"{mounts['cpu']}/cgroup.procs", None]])

    @property
    def accounts_swap(self) -> bool:
        """Whether there is swap, and a group's use of it can be limited."""
        swaps = len(_text("/proc/swaps").splitlines()) > 1
        return swaps and (self.layout == "v2" or os.path.exists(f"{self.mounts.get('memory', '')}/memory.memsw.limit_in_bytes"))


def read(mountinfo: str | None = None) -> Groups:
    """This host's, by /proc/self/mountinfo."""
    mounts: dict[str, str] = {}
    unified, given = "", frozenset[str]()
    for line in (_text("/proc/self/mountinfo") if mountinfo is None else mountinfo).splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) < 5 or len(right) < 3:
            continue
        where = left[4]
        if right[0] == "cgroup2" and not unified:
            unified, given = where, frozenset(_text(f"{where}/cgroup.controllers").split())
        elif right[0] == "cgroup":
            for option in right[2].split(","):
                if option.startswith("name=") or option in ("memory", "cpu", "cpuacct", "cpuset", "pids", "freezer", "devices", "blkio"):
                    mounts.setdefault(option, where)
    return Groups(mounts, unified, given)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _number(path: str) -> int:
    text = _text(path).strip()
    return int(text) if text.isdigit() else -1
