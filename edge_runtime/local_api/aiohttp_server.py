"""aiohttp's server without its client: the package's `__init__` imports both, and the client half costs 4.4 MiB that an edge never uses.

A bare package module named `aiohttp` with the right search path stands in while `aiohttp.web` is imported; submodules then load as usual.
Where that fails (another aiohttp lays its modules out otherwise) the ordinary import is taken: more memory, same behaviour.
"""

import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any


def import_web() -> Any:
    """The module `aiohttp.web`."""
    if "aiohttp" in sys.modules:
        return importlib.import_module("aiohttp.web")
    spec = importlib.util.find_spec("aiohttp")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("the local API needs aiohttp: install it, or set api.enabled to false")
    package = types.ModuleType("aiohttp")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    # aiohttp.http asks its package for this one name; it is the first assignment of `__init__`.
    found = re.search(r'^__version__\s*=\s*"([^"]+)"', Path(spec.origin or "").read_text(), re.MULTILINE)
    package.__dict__["__version__"] = found[1] if found else "3"
    sys.modules["aiohttp"] = package
    try:
        return importlib.import_module("aiohttp.web")
    except Exception:
        for name in [name for name in sys.modules if name == "aiohttp" or name.startswith("aiohttp.")]:
            del sys.modules[name]
        return importlib.import_module("aiohttp.web")
