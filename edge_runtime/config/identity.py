"""Which edge a data folder is of: its name, and the machine that took it, in the file `edge_id` of the folder.

At the hub the records of a folder, and the workloads that its agent runs, are under one name. Under another one all that is kept would be sent again, what the hub asked for would be nobody's, and workloads would run here while the hub
places them elsewhere. The host's name, which is an edge's where no other is given, is changed by a router's DHCP, by a cloud's first boot, by each new container. So the name that a folder was first used under is kept.

A disk that was cloned is told from a host that was renamed by the machine's id (machine-id(5)): whoever clones machines gives each its own, or should.
"""

import os
from pathlib import Path

FILE = "edge_id"

MACHINE_ID = Path("/etc/machine-id")

MOST = 256
"""Bytes of what is read of either file: a name of 64 characters and an id of 32."""


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MOST).decode("ascii", "replace").strip()
    except OSError:
        return ""


def kept(folder: str) -> str:
    """The name of the edge that this machine has run on this folder; empty where it has not, or where that cannot be read. A machine without an id is taken for the same one."""
    name, _, machine = _text(Path(folder) / FILE).partition(" ")
    return name if machine == _text(MACHINE_ID) else ""


def keep(folder: str, name: str) -> None:
    """This machine runs the edge of that name on this folder, which is there. On the disk when this returns, where it was not before; raises OSError."""
    path, said = Path(folder) / FILE, f"{name} {_text(MACHINE_ID)}".strip()
    if _text(path) == said:
        return
    part = path.with_name(f"{FILE}.part")
    with part.open("w") as file:
        file.write(f"{said}\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
