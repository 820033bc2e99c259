"""What hosts of functions come from: a process that has the interpreter and the engine loaded, started by the agent at the first function, and gone with it.

It forks a host for each function, the next one, with its first worker, ahead of its need; and a compiler for each module. It is told by datagrams: a JSON object, with descriptors beside it.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import wasmtime

from .function_frames import CALL, PROBE, PROBE_MEMORY
from .function_host import host, linked
from .function_worker import MAX_TRAP, BadModule, Program, compile_module, confine, engine, exactly, work

MAX_REQUEST = 65_536
"""Bytes of what the agent asks of a spawner: paths, arguments and variables."""

SPARE_AFTER_S = 0.005
"""The next host is forked so long after the last one was told what to be: not while that one starts."""

COMPILE_S, COMPILE_BYTES, COMPILED_BYTES = 60, 1 << 30, 512 << 20
"""Processor time, memory and output of a compiler: a module of 10 MB takes a few seconds."""

_CLONE_NEWNET, _CLONE_NEWIPC = 0x4000_0000, 0x0800_0000


def compiler(told: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """Compile a module that nobody vouches for, without rights. `descriptors`: the module, where to write its native code, the pipe to the agent."""
    module, target, reply = descriptors
    word = "ended"
    try:
        with os.fdopen(module, "rb") as handle:
            raw = handle.read()
        resource.setrlimit(resource.RLIMIT_CPU, (COMPILE_S, COMPILE_S))
        confine(told["uid"], COMPILE_BYTES, COMPILED_BYTES)
        native = compile_module(raw)
        at = 0
        while at < len(native):
            at += os.write(target, native[at:])
        word = "compiled"
    except BadModule as error:
        word = "bad " + " ".join(str(error).split())
    except (OSError, MemoryError) as error:
        word = f"failed {type(error).__name__}: {error}"
    with contextlib.suppress(OSError):
        os.write(reply, word.encode()[:MAX_TRAP] + b"\n")
    os._exit(0)


def spawner() -> int:
    """Fork what the agent asks for, until it is gone. Arguments: the socket to it."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.setpriority(os.PRIO_PROCESS, 0, max(0, os.getpriority(os.PRIO_PROCESS, 0)))  # the agent's own is better than what it starts may have
    for folder in json.loads(sys.argv[2]):  # out of the agent's control groups: a service manager ends all that is in them
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            Path(folder, "cgroup.procs").write_text(str(os.getpid()))
    isolate()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for a host: its end is on the disk
    os.chdir("/")
    own = engine()
    # What is run once here, all that are forked have ready: libraries bound, types made, memory mapped.
    probe = Program(own, wasmtime.Module(own, PROBE), [], [], PROBE_MEMORY, 0)
    rehearse(probe)
    gc.freeze()  # what is there now stays: a collection would write to all of it, and so copy what is shared
    next_one = spare(own, probe, channel)
    channel.send(b"ready")
    while True:
        if next_one.fileno() < 0 and not select.select([channel], [], [], SPARE_AFTER_S)[0]:
            next_one = spare(own, probe, channel)
        data, descriptors, _, _ = socket.recv_fds(channel, MAX_REQUEST, 3)
        if not data:
            return 0
        if json.loads(data)["what"] == "run":
            if next_one.fileno() < 0:
                next_one = spare(own, probe, channel, descriptors)
            with contextlib.suppress(OSError):  # it was killed: the agent hears no word
                socket.send_fds(next_one, [data], descriptors)
            next_one.close()
        elif os.fork() == 0:
            try:
                channel.close()
                next_one.close()
                compiler(json.loads(data), descriptors)
            finally:
                os._exit(1)
        for descriptor in descriptors:
            os.close(descriptor)


def spare(own: wasmtime.Engine, probe: Program, channel: socket.socket, held: Sequence[int] = ()) -> socket.socket:
    """A host, and its first worker, that wait to be told of their function: the forks are done before they are needed. Returns the socket to the host; both end with that.

    Args:
        held: what they shall not inherit, a lock above all.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            channel.close()
            ours.close()
            for descriptor in held:
                os.close(descriptor)
            os.setsid()
            link, its = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                theirs.close()
                link.close()
                first_worker(own, probe, its)
            its.close()
            data, descriptors, _, _ = socket.recv_fds(theirs, MAX_REQUEST, 3)
            theirs.close()
            if data:
                host(own, json.loads(data), descriptors, (pid, link))
        finally:
            os._exit(1)
    theirs.close()
    return ours


def rehearse(probe: Program) -> None:
    """Run a program that does nothing."""
    instance = probe.ready(lambda _descriptor, _data: None)
    instance.run(b"")
    instance.end()


def first_worker(own: wasmtime.Engine, probe: Program, link: socket.socket) -> NoReturn:
    """A worker that was forked before there was a function for it: it links the program by itself, while its host listens for calls."""
    try:
        rehearse(probe)  # memory that it shares with the spawner becomes its own where it is written to: that takes a millisecond, and nobody waits for it now
        head, descriptors, _, _ = socket.recv_fds(link, CALL.size, 1)
        if not head:
            os._exit(0)
        told = json.loads(exactly(link, CALL.unpack(head)[0]))
        program = linked(own, told, descriptors[0])
        os.close(descriptors[0])
        work(link, program, told["uid"], told["job"])
    finally:
        os._exit(1)


def isolate() -> None:
    """A network, and System V objects, of its own with nothing in them, where the system lets it: a module has no way to ask for one, and what has broken out of one finds none."""
    ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET | _CLONE_NEWIPC)
