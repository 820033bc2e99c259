"""Lets `python tools/bench/NAME.py` work: starts again as the module it is, in the project's environment."""

import os
import sys
from pathlib import Path


def again(file: str) -> None:
    """Replace this process by `.venv/bin/python -m tools.bench.NAME` with the same arguments; by this interpreter where there is no `.venv`."""
    root = Path(file).resolve().parents[2]
    ours = root / ".venv" / "bin" / "python"
    python = str(ours) if ours.exists() else sys.executable
    path = os.pathsep.join(entry for entry in (str(root), os.environ.get("PYTHONPATH", "")) if entry)
    os.execve(python, [python, "-m", f"tools.bench.{Path(file).stem}", *sys.argv[1:]], {**os.environ, "PYTHONPATH": path})
