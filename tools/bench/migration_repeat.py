"""A guest that moves back: wire bytes of moving its memory after 10 s and after 60 s of work to where its memory of before lies as a base.

The memory is that of a Debian guest under QEMU at three moments (`migration_guest.py`, `--images FOLDER` keeps it). Every byte is compared afterwards.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from . import migration_guest
from .harness import ROOT, arguments, machine, note, report
from .migration_cpu import figures, move

TIMES = {10: 100.0, 60: 50.0}
"""Seconds of work, and how many times fewer bytes than the memory then have to do."""


def main() -> int:
    """Exit status 0 where both are met."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=Path, help="folder that keeps the guest's memory (a temporary one)")
    options = parser.parse_args()
    about = machine()
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary:
        folder = options.images or Path(temporary) / "guest"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            images = dict(zip(migration_guest.MOMENTS_S, migration_guest.images(folder, options), strict=True))
        except migration_guest.Missing as error:
            print(f"migration_repeat: {error}", file=sys.stderr)
            return 2
        bases = Path(temporary) / "bases"
        subprocess.run([sys.executable, "-m", "gpu_migration", "base", str(images[0]), "--bases", str(bases)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        for seconds in TIMES:
            note(options, f"after {seconds} s of work")
            result = move(images[seconds], "--base", str(images[0]), "--codecs", "zstd-3", receive=("--bases", str(bases)))
            found[seconds] = {**figures(result), "pages": result["pages"], "times": round(result["length"] / result["wire_bytes"], 1)}
    worst = min(found[seconds]["times"] / least for seconds, least in TIMES.items())
    return report(
        options, about, "a repeat move sends at least 100 times fewer bytes than the memory after 10 s of work, 50 times after 60 s", round(worst, 3), "of what is promised, the worse of both",
        worst >= 1, inputs={"memory_mib": migration_guest.MEMORY_MIB, "verified": "every byte compared"}, details=found,
    )


if __name__ == "__main__":
    sys.exit(main())
