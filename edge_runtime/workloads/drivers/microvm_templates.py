"""Templates of micro-VMs: one guest for each size, booted once and saved while it waits for orders. Clones share its memory, and copy what they write.

A template lives in memory (memfd) that is sealed once it is whole: a QEMU that was taken over can change its own guest, never what others will start from. It goes with the agent, whose next run
boots it anew; clones that run keep what they have of it.
"""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import microvm_guest, qemu_kernel
from .face import Failed
from .instance import read
from .keepers import Keepers
from .qemu_machine import Machine, boot, command

MAX_TEMPLATES = 4
"""Sizes that are kept; each takes 60 to 110 MB of memory, which its clones share."""

BOOT_S = 60.0
"""A guest that has not booted by then will not: under emulation, on two busy processors, it takes 2 to 6 s."""

UID = 0x6FFF_0000
"""User of a template's QEMU; those of instances come after it. Below the ranges of containers."""

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

PLACEHOLDERS = ("driver=null-co,node-name=disk0,size=1048576,read-only=on", "driver=null-co,node-name=disk1,size=1048576")
"""What stands for a clone's disks; a template does not look at them."""


@dataclass(frozen=True, slots=True)
class Template:
    """Descriptors of memory and state, and how long it took to boot and to save (seconds)."""

    ram: int
    state: int
    booted_s: float
    saved_s: float


class Templates:
    """Those of one agent. Used by one thread at a time; blocks.

    Args:
        folder: for what is needed while one is made.
    """

    def __init__(self, qemu: str, kernel: qemu_kernel.Kernel, folder: Path, keepers: Keepers, boot_s: float = BOOT_S) -> None:
        self._qemu, self._folder, self._keepers, self._boot_s = qemu, folder, keepers, boot_s
        self._kernel = sealed("kernel", kernel.image.read_bytes())
        self._initramfs = sealed("initramfs", qemu_kernel.initramfs(qemu_kernel.busybox(), qemu_kernel.modules(kernel), microvm_guest.INIT))
        self._made: dict[Machine, Template] = {}

    def close(self) -> None:
        """Clones go on."""
        for template in self._made.values():
            os.close(template.ram)
            os.close(template.state)
        self._made.clear()
        for descriptor in (self._kernel, self._initramfs):
            os.close(descriptor)

    def get(self, machine: Machine) -> Template:
        """That of a machine, made where it is not there. Raises `Failed`."""
        found = self._made.pop(machine, None) or self._make(machine)
        self._made[machine] = found  # as the one that was used last
        while len(self._made) > MAX_TEMPLATES:
            old = self._made.pop(next(iter(self._made)))
            os.close(old.ram)
            os.close(old.state)
        return found

    def _make(self, machine: Machine) -> Template:
        folder = self._folder / f"template-{uuid.uuid4().hex[:12]}"
        folder.mkdir(mode=0o700)
        ram, state = memory("novacron-guest"), memory("novacron-state")
        try:
            os.ftruncate(ram, machine.memory_mb << 20)
            told = {
                "folder": str(folder), "template": True, "boot_s": self._boot_s, "uid": UID, "more_groups": kvm_groups(machine), "groups": [], "files": [], "descriptors": ["ram", "state", "kernel", "initramfs"], "ask": "", "lease": "",
                "command": command(self._qemu, machine, "/proc/self/fd/{ram}", True, PLACEHOLDERS, *boot("/proc/self/fd/{kernel}", "/proc/self/fd/{initramfs}", tsc_khz())),
            }
            (folder / "keeper.json").write_text(json.dumps(told))
            (folder / "lock").touch(mode=0o600)
            word = self._keepers.start(folder, self._boot_s + 30, (ram, state, self._kernel, self._initramfs))
            end: Mapping[str, Any] = read(folder / "exit.json") or {}
            if word != "ended" or not end.get("template"):
                raise Failed("template", str(end.get("failed") or "its keeper ended without a word"), "see the reason")
            for descriptor in (ram, state):
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            return Template(ram, state, float(end["booted_s"]), float(end["saved_s"]))
        except BaseException:
            os.close(ram)
            os.close(state)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def memory(name: str) -> int:
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def sealed(name: str, data: bytes) -> int:
    descriptor = memory(name)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    return descriptor


def tsc_khz() -> int:
    """How fast this machine's clock register counts; 0 where it is not told."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("cpu MHz"):
                return int(float(line.partition(":")[2]) * 1000)
    except (OSError, ValueError):
        pass
    return 0


def kvm_groups(machine: Machine) -> list[int]:
    """The group of /dev/kvm, where a machine needs it."""
    return [os.stat("/dev/kvm").st_gid] if machine.accelerator == "kvm" else []
