"""Imports that cost a device memory it gets nothing for, left out. Each falls back to the ordinary import.

Measured here (MB of resident memory, Python 3.11, x86_64): OpenSSL through `ssl` and `_hashlib` 4.5; `urllib.request` with `http.client` and
`email`, which paho wants for websockets, 2.6.
"""

import importlib
import re
import sys
import types
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_OPENSSL = ("ssl", "_ssl", "_hashlib")


class _Never(Exception):
    """Stands where an exception of ssl is named and no ssl is."""


def leave_out_openssl() -> bool:
    """Let `import ssl` fail from now on; asyncio, aiohttp and paho then work without TLS, hashlib with its own C code.

    Only where no configured address asks for TLS, and only before anything has imported it. Returns whether it was left out.
    """
    if any(name in sys.modules for name in _OPENSSL):
        return False
    for name in _OPENSSL:
        sys.modules[name] = None  # type: ignore[assignment]
    return True


class _Later(types.ModuleType):
    """A module that is imported when something of it is first asked for that is not among `known`."""

    def __init__(self, name: str, **known: "Any") -> None:
        super().__init__(name)
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> "Any":
        if name.startswith("__"):  # `import` itself asks whether it has parts
            raise AttributeError(name)
        for finder in sys.meta_path:
            if isinstance(finder, _StandingIn):
                finder.leave(self)
        found = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, found)
        return found


class _LaterObject:
    """An object that is made when something of it is first asked for."""

    def __init__(self, make: "Callable[[], Any]") -> None:
        self._make = make

    def _made(self) -> "Any":
        made = self._make()
        self._make = lambda: made
        return made

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._made(), name)

    def __call__(self, *args: "Any", **words: "Any") -> "Any":
        return self._made()(*args, **words)


class _StandingIn:
    """Within it each of these modules is what an import of its name finds, unless that has been imported before; whoever imports later gets the real ones. With `patterns`, regular expressions are compiled when they are first used.

    It is a finder and a loader (PEP 302), so that a part is bound to its package as any other."""

    def __init__(self, *modules: types.ModuleType, patterns: bool = False) -> None:
        self._modules = {module.__name__: module for module in modules}
        self._compile, self._patterns = re.compile, patterns

    def __enter__(self) -> None:
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]
        if self._patterns:
            re.compile = lambda pattern, flags=0: _LaterObject(lambda: self._compile(pattern, flags))  # type: ignore[assignment, misc]

    def __exit__(self, *error: object) -> None:
        re.compile = self._compile
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        for module in list(self._modules.values()):
            self.leave(module)

    def leave(self, module: types.ModuleType) -> None:
        """From now on this one is not what an import finds."""
        self._modules.pop(module.__name__, None)
        if sys.modules.get(module.__name__) is module:
            del sys.modules[module.__name__]

    def find_spec(self, name: str, path: object = None, target: object = None) -> "Any":
        """As importlib asks."""
        return type(importlib.__spec__)(name, self) if name in self._modules else None  # type: ignore[arg-type]

    def create_module(self, spec: "Any") -> types.ModuleType:
        """The one that stands in."""
        return self._modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


class _Named:
    """Stands for what is only named: in an annotation, or as a base that adds nothing."""

    def __class_getitem__(cls, item: object) -> type:
        return cls


def leave_out_typing() -> _StandingIn:
    """Within it, modules of ours are imported without `typing`, of which they need nothing once they run: a twenty-fifth of a start, and 0.4 MB. Not for modules of others, nor for any that asks a type what it is."""
    return _StandingIn(_typing())


def _typing() -> types.ModuleType:
    named = {name: type(name, (_Named,), {}) for name in ("Any", "Awaitable", "BinaryIO", "Callable", "IO", "Iterable", "List", "NoReturn", "Optional", "Protocol", "Tuple", "Type")}
    return _Later("typing", TYPE_CHECKING=False, cast=lambda kind, value: value, final=lambda kind: kind, TypeVar=lambda name: type(name, (_Named,), {}), **named)


def _extract_stack(frame: types.FrameType | None = None, limit: int | None = None) -> "Any":
    """`traceback.extract_stack`, for which asyncio's own C code asks at once and which it uses when it is debugged."""
    return importlib.import_module("traceback").extract_stack(frame or sys._getframe(1), limit)


def import_logging() -> types.ModuleType:
    """logging, without what it has for the text of an error and for templates, and the patterns that it checks formats of both with."""
    if "logging" not in sys.modules:
        string = _Later("string", Template=_LaterObject(lambda: importlib.import_module("string").Template), Formatter=lambda: _LaterObject(lambda: importlib.import_module("string").Formatter()))
        with _StandingIn(_Later("traceback"), string, patterns=True):
            importlib.import_module("json")  # its patterns are those of its parts that are not in C
            return importlib.import_module("logging")
    return importlib.import_module("logging")


_ASYNCIO_LATER = ("queues", "streams", "subprocess", "taskgroups", "threads")
"""Modules of asyncio whose names are found when they are first asked for: nothing of asyncio itself needs them."""


def import_asyncio() -> types.ModuleType:
    """asyncio, without `inspect` and the nine modules that come with it, down to Python's grammar (asyncio asks it only for what awaitables of a foreign kind are), and without what it has for TLS, programs, streams and the text of an error: a fifth of all that a
    start imports."""
    import_logging()
    if "asyncio" in sys.modules:
        return sys.modules["asyncio"]
    parts = {name: _Later(f"asyncio.{name}", __all__=()) for name in _ASYNCIO_LATER}
    with _StandingIn(_typing(), _Later("inspect"), _Later("traceback", extract_stack=_extract_stack), _Later("subprocess", PIPE=-1, STDOUT=-2, DEVNULL=-3), _Later("asyncio.sslproto"), *parts.values(), patterns=True):
        asyncio = importlib.import_module("asyncio")
    own = getattr(asyncio, "__getattr__", None)

    def found(name: str) -> "Any":
        for part in () if name.startswith("__") else _ASYNCIO_LATER:
            module = importlib.import_module(f"asyncio.{part}")
            if name == part or name in module.__all__:
                value = module if name == part else getattr(module, name)
                setattr(asyncio, name, value)
                return value
        if own is not None:
            return own(name)
        raise AttributeError(f"module 'asyncio' has no attribute {name!r}")

    for name, stand_in in parts.items():
        if vars(asyncio).get(name) is stand_in:
            delattr(asyncio, name)
    asyncio.__getattr__ = found  # type: ignore[method-assign]
    return asyncio


def import_paho() -> "Any":
    """The module `paho.mqtt.client`, without what only its websocket transport needs."""
    name = "paho.mqtt.client"
    if name in sys.modules:
        _share_property_tables()
        return sys.modules[name]
    stand_ins = {"urllib.request": types.ModuleType("urllib.request"), "socks": None}
    added = [module for module in stand_ins if module not in sys.modules]
    for module in added:
        sys.modules[module] = stand_ins[module]  # type: ignore[assignment]
    try:
        client = importlib.import_module(name)
        if getattr(client, "ssl", None) is None:
            # paho names ssl's exceptions in `except` clauses even where it found no ssl; these are never raised.
            client.ssl = types.SimpleNamespace(SSLWantReadError=_Never, SSLWantWriteError=_Never, SSLError=_Never)  # type: ignore[attr-defined]
        _share_property_tables()
        return client
    finally:
        # Whoever imports them later gets the real ones.
        for module in added:
            sys.modules.pop(module, None)
        if "urllib.request" in added:
            urllib = sys.modules.get("urllib")
            if urllib is not None and hasattr(urllib, "request"):
                del urllib.request


def _share_property_tables() -> None:
    """Let every MQTT 5 packet share paho's three tables of properties, which it builds anew for each packet and each acknowledgement.

    That was a tenth of the agent's time under load. Left alone where this version of paho keeps them elsewhere.
    """
    packet = sys.modules.get("paho.mqtt._packet")
    original = getattr(packet, "Properties", None)
    if packet is None or original is None or original.__module__ == __name__:
        return
    tables = {name: value for name, value in vars(original(3)).items() if name in ("types", "names", "properties")}
    if len(tables) != 3:
        return

    # paho takes the spaces out of all 27 names at each packet, and the interpreter's cache of attribute names keeps thousands of the copies: a third of a
    # megabyte after some thousand connections. Names without spaces are given back as they are.
    tables["names"] = {sys.intern(name.replace(" ", "")): identifier for name, identifier in tables["names"].items()}

    class SharedTables(original):  # type: ignore[misc, valid-type]
        """paho's `Properties`, without building its tables."""

        def __init__(self, packetType: int) -> None:  # noqa: N803 - paho's name
            self.__dict__.update(tables, packetType=packetType)

        def unpack(self, buffer: bytes) -> "tuple[Any, int]":
            """No properties, the usual case, are nothing to clear and nothing to read."""
            if buffer[:1] == b"\0":
                return self, 1
            read: tuple[Any, int] = super().unpack(buffer)
            return read

    packet.Properties = SharedTables  # type: ignore[attr-defined]


def packet_properties() -> "Any":
    """paho's class of MQTT 5 properties, the one with shared tables where this version of paho lets it."""
    found = getattr(sys.modules.get("paho.mqtt._packet"), "Properties", None)
    if found is not None:
        return found
    from paho.mqtt.properties import Properties

    return Properties
