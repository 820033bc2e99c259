"""QEMU's own migration of a paused guest to another QEMU, as others would have it: what ours is held against."""

import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from . import migration_guest
from .harness import die_with_parent, stop

STREAMS = 2
"""Of QEMU's multifd: its default, and as many as there are cores."""
DEFAULT_BYTES_S = 128 << 20
"""QEMU's bandwidth limit where nobody gave one."""
_UNLIMITED = 1 << 40
_MOVE_S = 300
"""A migration takes at most so long."""
_PORT = 45454


def move(made: tuple[Path, Path, Path], source: migration_guest.Qmp, memory: Path, address: str, prefix: tuple[str, ...], *, multifd: str = "none") -> float:
    """Seconds, by QEMU's clock. The target's QEMU, started with that prefix and reached at that address, has its memory in that file; it has ended when this returns.

    `multifd`: its compression; empty: QEMU as it is without a word, one stream and a limit of 128 MiB/s. Raises Missing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        control = Path(scratch) / "qmp"
        process = subprocess.Popen(
            [*prefix, *migration_guest.arguments(made, memory, control, "-serial", "null", "-incoming", "defer", "-S")], preexec_fn=die_with_parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            end = time.monotonic() + _MOVE_S
            while not control.exists():
                if time.monotonic() > end or process.poll() is not None:
                    raise migration_guest.Missing("the target's QEMU does not start")
                time.sleep(0.02)
            target = migration_guest.Qmp(control)
            for qmp in (source, target):
                qmp("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": bool(multifd)}])
                qmp("migrate-set-parameters", **{"multifd-channels": STREAMS, "multifd-compression": multifd or "none", "max-bandwidth": _UNLIMITED if multifd else DEFAULT_BYTES_S})
            target("migrate-incoming", uri=f"tcp:{address}:{_PORT}")
            if source("query-status")["status"] == "postmigrate":
                source("cont")  # it refuses to move what it has moved; for an instant the guest goes on
                source("stop")
            source("migrate", uri=f"tcp:{address}:{_PORT}")
            while (found := source("query-migrate")).get("status") not in ("completed", "failed", "cancelled") and time.monotonic() < end:
                time.sleep(0.01)
            if found.get("status") != "completed":
                raise migration_guest.Missing(f"QEMU's migration ended as {found.get('status')}: {found.get('error-desc', '')}")
            while (there := _status(target)) in ("inmigrate", "") and time.monotonic() < end:
                time.sleep(0.01)
            if there != "paused":
                raise migration_guest.Missing(f"the target's QEMU has not taken the guest over: {there or 'no answer'}")
            return float(found["total-time"]) / 1000
        finally:
            stop(process)


def _status(qmp: Any) -> str:
    return str(qmp("query-status").get("status", ""))
