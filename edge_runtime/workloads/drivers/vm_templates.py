"""Templates of virtual machines: one guest for each image and shape, booted once until it says that it is ready, and saved there. Clones share its memory and its disk, and copy what they write.

As with micro-VMs (`microvm_templates`) memory and state are sealed memory, which no clone can change, and go with the agent. What the guest wrote to its disk before it was ready is a file,
which clones have as a layer of their own disks (a hard link in their folders), read-only.
"""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .face import Failed
from .instance import read
from .keepers import Keepers
from .microvm_templates import SEALS, memory

MAX_TEMPLATES = 4
"""Images and shapes that are kept; each takes what its guest has touched of its memory, which its clones share."""

DISK = "template.qcow2"
"""What the guest wrote to its disk, in the template's folder and in those of its clones."""


@dataclass(frozen=True, slots=True)
class Template:
    """Descriptors of memory and state, the folder with the disk, and how long it took to boot and to save (seconds)."""

    ram: int
    state: int
    folder: Path
    booted_s: float
    saved_s: float


class VmTemplates:
    """Those of one agent. Used by one thread at a time; blocks.

    Args:
        folder: theirs; what an earlier agent left there goes.
    """

    def __init__(self, folder: Path, keepers: Keepers) -> None:
        self._folder, self._keepers = folder, keepers
        self._made: dict[object, Template] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)

    def close(self) -> None:
        """Clones go on."""
        for template in self._made.values():
            _forget(template)
        self._made.clear()

    def get(self, key: object, boot_s: float, told: Callable[[Path], Mapping[str, Any]]) -> Template:
        """That of `key`, made where it is not there. Raises `Failed`. `told`: lays out what its guest needs in a folder; what its keeper is told beside what all are."""
        found = self._made.pop(key, None)
        if found is not None and not (found.folder / DISK).exists():  # removed by hand
            _forget(found)
            found = None
        found = found or self._make(boot_s, told)
        self._made[key] = found  # as the one that was used last
        while len(self._made) > MAX_TEMPLATES:
            _forget(self._made.pop(next(iter(self._made))))
        return found

    def drop(self, key: object) -> None:
        """Nobody will ask for it again."""
        if (template := self._made.pop(key, None)) is not None:
            _forget(template)

    def _make(self, boot_s: float, told: Callable[[Path], Mapping[str, Any]]) -> Template:
        folder = self._folder / uuid.uuid4().hex[:12]
        folder.mkdir(mode=0o700)
        ram, state = memory("novacron-guest"), memory("novacron-state")
        try:
            document = {
                "folder": str(folder), "template": True, "boot_s": boot_s, "groups": [], "files": [], "descriptors": ["ram", "state"], "ask": "", "lease": "", "network": None, **told(folder),
            }
            os.ftruncate(ram, int(document["memory_mb"]) << 20)
            (folder / "keeper.json").write_text(json.dumps(document))
            (folder / "lock").touch(mode=0o600)
            word = self._keepers.start(folder, boot_s + 30, (ram, state))
            end: Mapping[str, Any] = read(folder / "exit.json") or {}
            if word != "ended" or not end.get("template"):
                raise Failed("template", str(end.get("failed") or "its keeper ended without a word"), "see the reason")
            for descriptor in (ram, state):
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            return Template(ram, state, folder, float(end["booted_s"]), float(end["saved_s"]))
        except BaseException:
            os.close(ram)
            os.close(state)
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _forget(template: Template) -> None:
    os.close(template.ram)
    os.close(template.state)
    shutil.rmtree(template.folder, ignore_errors=True)
