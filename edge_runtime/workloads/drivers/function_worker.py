"""One process that runs calls of one function, one at a time, an instance for each call. It gives up what it could harm the host with before the first instruction of a module runs.

What it is not trusted with is held by others: its time by its host, which kills it; its memory by the engine's limit and the kernel's; its words by their sizes.
"""

import ctypes
import os
import resource
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import wasmtime

from . import function_seccomp
from .function_frames import CALL, ERR, EXITED, MAX_INPUT, OUT, READY, SAYS, TRAPPED
from .function_wasi import MODULE, SIGNATURES, Exit, World

MAX_STDERR = 65_536
"""Bytes kept of what a call writes to stderr."""

MAX_TRAP = 2000
"""Characters of what the engine says of a trap."""

MAX_TABLE = 1 << 20
"""Elements of a module's tables: 8 MiB of pointers; large C++ programs have some thousands."""

SPARE_DATA = 32 << 20
"""Bytes of writable memory that the interpreter may take beside the instance's."""

OPEN_FILES = 64
"""Descriptors of a worker: it opens none."""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_libc = ctypes.CDLL(None, use_errno=True)


class BadModule(Exception):
    """A module that cannot be run here; the text is for people."""


def engine() -> Any:
    """The engine, set up in one way everywhere: what one has compiled another must be able to load. No shared memory: the limits know nothing of it. No threads of its own: it is forked."""
    config = wasmtime.Config()
    config.parallel_compilation = False
    config.wasm_threads = False
    config.wasm_memory64 = False
    return wasmtime.Engine(config)


def checked(module: Any) -> None:
    """Raises `BadModule` where it asks for what there is not."""
    for one in module.imports:
        if one.module != MODULE or one.name not in SIGNATURES:
            raise BadModule(f"it imports {one.module}.{one.name}, and there is only WASI preview 1 ({MODULE})")
    exports = {one.name: one.type for one in module.exports}
    if not isinstance(exports.get("_start"), wasmtime.FuncType) or not isinstance(exports.get("memory"), wasmtime.MemoryType):
        raise BadModule("it does not export `_start` and `memory`: build it as a WASI command")


def compile_module(raw: bytes) -> bytes:
    """The native code of a module. Raises `BadModule`."""
    try:
        module = wasmtime.Module(engine(), raw)
    except wasmtime.WasmtimeError as error:
        raise BadModule(f"it is no WebAssembly that can be compiled: {str(error)[:MAX_TRAP]}") from None
    checked(module)
    return bytes(module.serialize())


class Program:
    """A module, linked, and how it is run. Made once, before workers are forked: they share it.

    Args:
        module: of `engine`, and `checked`.
        memory, output: bytes of an instance's memory, and bytes kept of what a call answers.
    """

    def __init__(self, engine: Any, module: Any, args: Sequence[str], env: Sequence[str], memory: int, output: int) -> None:
        self.memory, self.output = memory, output
        self._engine, self._world = engine, World(args, env)
        linker = wasmtime.Linker(engine)
        types = {"i": wasmtime.ValType.i32(), "I": wasmtime.ValType.i64()}
        for name in {one.name for one in module.imports}:
            kind = wasmtime.FuncType([types[letter] for letter in SIGNATURES[str(name)]], [] if name == "proc_exit" else [types["i"]])
            linker.define_func(MODULE, str(name), kind, self._world.function(str(name)))
        self._linked = linker.instantiate_pre(module)

    def ready(self, say: Callable[[int, bytes], None]) -> "Instance":
        """An instance that waits for its call; one at a time."""
        return Instance(self._engine, self._linked, self._world, self.memory, say)


class Instance:
    """One instance. Where already its making fails, `run` tells so."""

    def __init__(self, engine: Any, linked: Any, world: World, memory: int, say: Callable[[int, bytes], None]) -> None:
        self._world = world
        world.begin(say)
        self._store = store = wasmtime.Store(engine)
        store.set_limits(memory_size=memory, table_elements=MAX_TABLE, instances=1, tables=16, memories=1)
        self._failed: tuple[int, int, str] | None = None
        try:
            exports = linked.instantiate(store).exports(store)
            self._start, own = exports["_start"], exports["memory"]
            world.read, world.write = (lambda start, end: own.read(store, start, end)), (lambda data, start: own.write(store, data, start))
        except Exit as left:
            self._failed = (EXITED, left.code, "")
        except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
            self._failed = (TRAPPED, 0, _words(error))

    def run(self, stdin: bytes) -> tuple[int, int, str]:
        """Run it to its end: how it ended, its exit code, and the engine's words of a trap."""
        if self._failed is not None:
            return self._failed
        self._world.stdin = memoryview(stdin)
        try:
            self._start(self._store)
        except Exit as left:
            return EXITED, left.code, ""
        except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
            return TRAPPED, 0, _words(error)
        return EXITED, 0, ""

    def end(self) -> None:
        """Give its memory back."""
        self._world.begin(lambda _descriptor, _data: None)
        self._store.close()


def _words(error: Exception) -> str:
    return str(getattr(error, "message", "") or error)[:MAX_TRAP]


class Kept:
    """What a call writes, the beginning of each stream; what comes after is dropped."""

    def __init__(self, output: int) -> None:
        self.parts, self.most, self.cut = (bytearray(), bytearray()), (output, MAX_STDERR), False

    def say(self, descriptor: int, data: bytes) -> None:
        kept, most = self.parts[descriptor - 1], self.most[descriptor - 1]
        room = most - len(kept)
        self.cut = self.cut or len(data) > room
        kept += data[:room]


def confine(uid: int, memory: int, file_bytes: int = 0) -> None:
    """Give up all that a module's program has no use for: rights, files, processes, memory beyond its own. `uid` 0: there is no other user to become. `file_bytes`: what it may write to a file."""
    parent = os.getppid()
    with open("/proc/self/statm") as handle:
        taken = int(handle.read().split()[5]) * resource.getpagesize()  # data and stack: a little more than what the limit counts
    with open("/proc/self/oom_score_adj", "w") as handle:
        handle.write("900")
    for what, most in (
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, OPEN_FILES), (resource.RLIMIT_FSIZE, file_bytes), (resource.RLIMIT_DATA, taken + memory + SPARE_DATA),
    ):
        resource.setrlimit(what, (most, most))
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # after the user has changed: that clears it
    if os.getppid() != parent:
        os._exit(1)
    function_seccomp.install()


def work(link: socket.socket, program: Program, uid: int, job: bool) -> NoReturn:
    """A worker's life: prepare an instance, say so, run the call that comes, answer. `job`: once, without a call, and what is written is said as it comes."""
    link.setblocking(True)  # now: it is a call that is not left to it afterwards
    confine(uid, program.memory, program.memory)  # the engine keeps a module's data in a file in memory, from which instances are mapped
    while True:
        kept = Kept(program.output)
        if job:
            def tell(descriptor: int, data: bytes) -> None:
                for at in range(0, len(data), MAX_INPUT):
                    piece = data[at:at + MAX_INPUT]
                    link.sendall(SAYS.pack(OUT if descriptor == 1 else ERR, 0, 0, len(piece), 0) + piece)

            instance = program.ready(tell)
        else:
            instance = program.ready(kept.say)
        link.sendall(SAYS.pack(READY, 0, 0, 0, 0))
        stdin = b"" if job else exactly(link, CALL.unpack(exactly(link, CALL.size))[0])
        how, code, words = instance.run(stdin)
        instance.end()  # its memory goes before the next one's comes
        out, err = kept.parts
        said = err + words.encode() if how == TRAPPED else err
        link.sendall(SAYS.pack(how, kept.cut, code, len(out), len(said)) + out + said)
        if job:
            os._exit(0)


def exactly(link: socket.socket, size: int) -> bytes:
    """So many bytes; the process ends where its host has."""
    found = bytearray()
    while len(found) < size:
        data = link.recv(size - len(found))
        if not data:  # its host has ended
            os._exit(0)
        found += data
    return bytes(found)
