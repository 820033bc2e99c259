"""aiohttp's server without its client: the package's `__init__` imports both, and the client half costs 4.4 MiB that most edges never use.

A bare package module named `aiohttp` with the right search path stands in while `aiohttp.web` is imported; submodules then load as usual. It becomes the whole package when it is asked for a name that it lacks: who
fetches images is a client. Where that fails (another aiohttp lays its modules out otherwise) the ordinary import is taken: more memory, same behaviour.
"""

import importlib
import importlib.machinery
import importlib.util
import re
import sys
import threading
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
        web = importlib.import_module("aiohttp.web")
    except Exception:
        for name in [name for name in sys.modules if name == "aiohttp" or name.startswith("aiohttp.")]:
            del sys.modules[name]
        return importlib.import_module("aiohttp.web")
    package.__dict__["__getattr__"] = _Rest(package, spec)
    return web


class _Rest:
    """The package's `__getattr__` (PEP 562) until it is whole: makes it so."""

    def __init__(self, package: types.ModuleType, spec: importlib.machinery.ModuleSpec) -> None:
        self._package, self._spec, self._lock, self._whole = package, spec, threading.RLock(), False

    def __call__(self, name: str) -> Any:
        if name.startswith("__") or self._spec.loader is None:  # an import asks for such names, and wants nothing
            raise AttributeError(f"module 'aiohttp' has no attribute {name!r}")
        with self._lock:
            if not self._whole:
                self._whole = True
                self._spec.loader.exec_module(self._package)  # it takes the submodules that are there, and puts another `__getattr__` in this one's place
        if name in self._package.__dict__:
            return self._package.__dict__[name]
        raise AttributeError(f"module 'aiohttp' has no attribute {name!r}")
