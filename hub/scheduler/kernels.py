"""The hot loops compiled with numba where it is installed and wanted; the numpy forms stand beside them in the modules that call these, and give the same results."""

from importlib import import_module
from typing import Any

from .units import Invalid

active: Any = None
"""The compiled functions, None while numpy does the work."""


def use(choice: str) -> bool:
    """`auto`: where numba is installed; `on`: or `Invalid`; `off`: numpy. Gives whether compiled code is used from now on."""
    global active
    active = None
    if choice == "off":
        return False
    try:
        compiled = import_module("hub.scheduler.compiled")
    except ImportError as error:
        if choice == "on":
            raise Invalid("numba", "is not installed", "pip install 'novacron[numba]', or leave it off") from error
        return False
    active = compiled
    return True
