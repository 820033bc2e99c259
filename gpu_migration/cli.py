"""The command line: send, receive, verify, base, key, bench, vm-send, vm-receive. Results are one JSON object on the standard output; errors one line, exit status 1."""

import argparse
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from . import choice, keys, precopy, qemu_cli, receiver
from .convergence import CEILING_S, FIRST_S, STALL_S, Limits
from .errors import MigrationError, PauseFailed
from .receiver import PATIENCE_S, STREAMS_MOST, Receiver
from .sender import STREAMS_AT_FIRST, Sender
from .sources import FileSource

_THREADS_MOST = 256


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text}: give HOST:PORT")
    return host.strip("[]"), int(port)


def _number(least: float, most: float) -> Any:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: give a number from {least:g} to {most:g}")
        return value

    return parse


def _whole(least: int, most: int) -> Any:
    return lambda text: int(_number(least, most)(text))


def _codecs(text: str) -> tuple[str, ...]:
    try:
        return choice.names_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gpu_migration", description="Move files, disks and guest memory: encrypted, in parallel, resumable, committed at once.")
    commands = parser.add_subparsers(dest="command", required=True)
    send = commands.add_parser("send", help="send a file, disk or memory file to a receiver")
    send.add_argument("source", type=Path)
    send.add_argument("to", type=_address, metavar="HOST:PORT")
    send.add_argument("--transfer", default="", help="name of the transfer, by which it is taken up again (the source's name)")
    send.add_argument("--base", type=Path, help="a copy here of what the destination has as a base")
    send.add_argument("--codecs", type=_codecs, default=choice.FREE, help="auto, or those to choose from, as lz4,zstd-1")
    send.add_argument("--streams", type=_whole(1, STREAMS_MOST), default=STREAMS_MOST, help=f"at most (up to {STREAMS_MOST}); as many are used as bring something")
    send.add_argument("--threads", type=_whole(0, _THREADS_MOST), default=0, help="encoders; 0: one a processor")
    send.add_argument("--limit-mbit", type=_number(0, 1e7), default=0.0, help="bandwidth limit, Mbit/s; 0: none")
    send.add_argument("--changing", action="store_true", help="the source may change: pass again until what remains is little, then switch over")
    send.add_argument("--pause-command", default="", help="with --changing: pauses who writes the source, for the last pass; returns once it is paused")
    send.add_argument("--resume-command", default="", help="lets it run again, where the move fails before its commit")
    send.add_argument("--downtime", type=_number(0.001, 3600), default=CEILING_S, help=f"seconds that the writer may stand still, at most ({CEILING_S:g}); less is tried first")
    send.add_argument("--stall", type=_number(0.1, 86400), default=STALL_S, help=f"seconds without progress after which the move is given up ({STALL_S:g})")
    receive = commands.add_parser("receive", help="receive one object")
    receive.add_argument("destination", type=Path)
    receive.add_argument("--listen", type=_address, default=("127.0.0.1", 0), metavar="HOST:PORT")
    receive.add_argument("--bases", type=Path, help="folder of bases, named by their root hash")
    receive.add_argument("--replace", action="store_true", help="put it in place of what is there, at once, at the end")
    qemu_cli.add(commands, _address, _number, _whole, _codecs)
    for command in (send, receive):
        command.add_argument("--key-file", type=Path, help=f"file with the key, for its owner alone (else {keys.KEY_VARIABLE})")
        command.add_argument("--patience", type=_number(0.1, 86400), default=PATIENCE_S, help="seconds to bear without the other end")
    verify = commands.add_parser("verify", help="the root hash of a file, and whether it is the one given")
    verify.add_argument("file", type=Path)
    verify.add_argument("--root", help="the root hash it should have, hexadecimal")
    base = commands.add_parser("base", help="keep a copy of a file as a base")
    base.add_argument("file", type=Path)
    base.add_argument("--bases", type=Path, required=True)
    commands.add_parser("key", help="make a key")
    bench = commands.add_parser("bench", help="send a file to this machine itself, into memory, and verify it")
    bench.add_argument("source", type=Path)
    bench.add_argument("--codecs", type=_codecs, default=choice.FREE)
    return parser


def _hook(options: argparse.Namespace) -> precopy.Hook | None:
    """How to pause the writer, where that was given."""
    if not options.pause_command and not options.resume_command:
        return None
    if not options.changing or not options.pause_command or not options.resume_command:
        raise PauseFailed("--pause-command, --resume-command: give both, with --changing")
    signal.signal(signal.SIGTERM, _terminated)
    return precopy.commands(options.pause_command, options.resume_command)


def _terminated(number: int, _: object) -> None:
    """Ended as by an exception, once, so that a paused writer is resumed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _send(options: argparse.Namespace) -> dict[str, Any]:
    hook = _hook(options)
    key = keys.load_key(options.key_file)
    source = FileSource(options.source)
    base = FileSource(options.base) if options.base else None
    try:
        sender = Sender(
            source, key, options.to, transfer=options.transfer, base=base, codecs=options.codecs, threads=options.threads, streams=(min(STREAMS_AT_FIRST, options.streams), options.streams),
            limit=options.limit_mbit * 1e6 / 8, patience=options.patience,
        )
        if not options.changing:
            return {**dataclasses.asdict(sent := sender.run()), "root": sent.root.hex()}
        limits = precopy.limits_for(source.length, Limits(first=min(FIRST_S, options.downtime), ceiling=options.downtime, stall=options.stall))
        live = dataclasses.asdict(precopy.move(sender, hook, limits))
        sent_live = live.pop("sent")
        return {**sent_live, **{f"{name}_s": round(value, 4) for name, value in live.items()}, "root": sent_live["root"].hex()}
    finally:
        source.close()
        if base is not None:
            base.close()


def _receive(options: argparse.Namespace) -> dict[str, Any]:
    taking = Receiver(options.destination, keys.load_key(options.key_file), options.listen, bases=options.bases, replace=options.replace, patience=options.patience)
    print(f"listening on {taking.address[0]}:{taking.address[1]}", file=sys.stderr, flush=True)
    done = taking.serve()
    return {**dataclasses.asdict(done), "root": done.root.hex()}


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    source = FileSource(options.file)
    try:
        root = source.root(os.cpu_count() or 1).hex()
    finally:
        source.close()
    if options.root and options.root.lower() != root:
        raise MigrationError(f"verify {options.file}: its root is {root}, not {options.root}")
    return {"root": root, "length": source.length}


def _bench(options: argparse.Namespace) -> dict[str, Any]:
    key, target = os.urandom(keys.KEY_LEAST), Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp") / f"migration-bench-{os.getpid()}"
    source = FileSource(options.source)
    taking = Receiver(target, key, ("127.0.0.1", 0))
    thread = threading.Thread(target=taking.serve, daemon=True)
    thread.start()
    try:
        began = time.monotonic()
        sent = Sender(source, key, taking.address, codecs=options.codecs).run()
        seconds = time.monotonic() - began
        thread.join()
        same = FileSource(target)
        verified = same.root(os.cpu_count() or 1) == sent.root
        same.close()
        return {**dataclasses.asdict(sent), "root": sent.root.hex(), "gb_s": round(source.length / seconds / 1e9, 3), "ratio": round(source.length / sent.wire_bytes, 2), "verified": verified}
    finally:
        source.close()
        for path in (target, target.with_name(target.name + ".partial"), target.with_name(target.name + ".journal")):
            path.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with one line that says what is wrong."""
    options = _parser().parse_args(arguments)
    _keep_memory()
    if options.command == "vm-send":
        signal.signal(signal.SIGTERM, _terminated)  # as an exception, so that a guest that stands still runs again
    try:
        if options.command == "key":
            print(keys.new_key())
            return 0
        if options.command == "base":
            result = {"root": receiver.add_base(options.file, options.bases, os.cpu_count() or 1).hex()}
        else:
            result = {"send": _send, "receive": _receive, "verify": _verify, "bench": _bench, "vm-send": qemu_cli.send, "vm-receive": qemu_cli.receive}[options.command](options)
    except MigrationError as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result), flush=True)
    return 0


def _keep_memory() -> None:
    """Let the allocator keep what it has: each buffer of an extent would otherwise be given back and faulted in again, a tenth of all time."""
    import ctypes

    try:
        libc = ctypes.CDLL(None)
        for parameter, value in ((-3, 64 << 20), (-1, 512 << 20)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(parameter, value)
    except (OSError, AttributeError):
        pass  # another C library: slower, no more
