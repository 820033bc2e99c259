"""Planted bugs: the agent with one of its safeguards taken away, started as `python -m tools.powercut.controls NAME run --config ...`. Each must be caught."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTROLS: dict[str, tuple[str, Callable[[], None]]] = {}
"""Name: what the bug is, and what plants it."""


def control(text: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a control under its function's name."""

    def register(plant: Callable[[], None]) -> Callable[[], None]:
        CONTROLS[plant.__name__.replace("_", "-")] = (text, plant)
        return plant

    return register


@control("commits do not wait for the disk (synchronous=OFF)")
def sync_off() -> None:
    from edge_runtime.journal.database import JournalDatabase

    real = JournalDatabase.__init__

    def planted(self: JournalDatabase, *arguments: Any, **named: Any) -> None:
        real(self, *arguments, **named)
        self._synchronous = "OFF"

    JournalDatabase.__init__ = planted  # type: ignore[method-assign]


@control("devices are acknowledged and commands sent before the commit")
def early_ack() -> None:
    from edge_runtime.journal.lane import Lane

    real = Lane._submit

    def planted(self: Lane) -> None:
        if self._group is not None:
            group, rows, callbacks = self._group
            self._group = (group, [(record, None) for record, _ in rows], callbacks)
            for record, callback in rows:
                if callback is not None:
                    callback(record)
            assert self._loop is not None
            self._loop.call_later(EARLY_S, real, self)  # a slow disk: what was sent is on its way before the commit begins

    Lane._submit = planted  # type: ignore[method-assign]


@control("the side file is replaced without waiting for the disk")
def side_unsynced() -> None:
    from edge_runtime.journal.storage import FileStorage

    def write(self: FileStorage, path: Path, data: bytes) -> None:
        path.write_bytes(data)

    def sync_directory(self: FileStorage, directory: Path) -> None:
        assert os.path.isdir(directory)

    FileStorage.write = write  # type: ignore[method-assign]
    FileStorage.sync_directory = sync_directory  # type: ignore[method-assign]


EARLY_S = 0.01
"""How long before its commit the control `early-ack` acts: more than the way of a message through the bus."""


def main() -> int:
    """Plant the bug, then be the agent."""
    from edge_runtime.cli import main as agent

    from .small_agent import shrink

    shrink()
    CONTROLS[sys.argv[1]][1]()
    return agent(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
