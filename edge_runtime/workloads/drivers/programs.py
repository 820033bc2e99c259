"""Where a program of the node is."""

import os
import shutil


def searched(name: str) -> str | None:
    """A program's path, also where only root's PATH has it; None where there is none."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin")))
