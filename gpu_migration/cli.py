"""The command line: send, receive, carry-out, carry-in, predict, verify, base, key, bench, worker, vm-send, vm-receive. Results are one JSON object on the standard output; errors one line, exit status 1."""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import carry, choice, keys, precopy, qemu_cli, receiver, sample
from .convergence import CEILING_S, FIRST_S, STALL_S, Limits
from .errors import DeviceFailed, MigrationError, ModelError, PauseFailed
from .layout import PAGE
from .precopy_model import Link
from .prediction import History, MigrationPrediction, Outcome, Predictor, Question, busy
from .receiver import PATIENCE_S, STREAMS_MOST, Receiver
from .sender import STREAMS_AT_FIRST, Sender, Sent
from .sources import FileSource
from .transforms import nvcomp
from .transforms.gpu import Gpu, probe

_THREADS_MOST = 256
PROGRESS_S = 1.0
"""Between two words on how far it is."""


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


def _ports(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not (low.isdigit() and high.isdigit() and 0 < int(low) <= int(high) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text}: give LOW-HIGH, as 7400-7431")
    return int(low), int(high)


def _codecs(text: str) -> tuple[str, ...]:
    try:
        return choice.names_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _channels(text: str) -> tuple[str, ...]:
    try:
        return carry.channels_of(text)
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
    send.add_argument("--transforms", choices=("cpu", "gpu", "auto"), default="cpu", help="what sorts out pages; auto: a GPU where there is one of use (cpu). A GPU codes them too where nvCOMP is there")
    send.add_argument("--no-references", action="store_true", help="send pages again that the destination holds elsewhere in the object: the sizes of records then say nothing of equal pages")
    send.add_argument("--limit-mbit", type=_number(0, 1e7), default=0.0, help="bandwidth limit, Mbit/s; 0: none")
    send.add_argument("--changing", action="store_true", help="the source may change: pass again until what remains is little, then switch over")
    send.add_argument("--pause-command", default="", help="with --changing: pauses who writes the source, for the last pass; returns once it is paused")
    send.add_argument("--resume-command", default="", help="lets it run again, where the move fails before its commit")
    send.add_argument("--downtime", type=_number(0.001, 3600), default=CEILING_S, help=f"seconds that the writer may stand still, at most ({CEILING_S:g}); less is tried first")
    send.add_argument("--stall", type=_number(0.1, 86400), default=STALL_S, help=f"seconds without progress after which the move is given up ({STALL_S:g})")
    send.add_argument("--history", type=Path, help="predict it first, and add how it went to this file; needs --limit-mbit")
    predict = commands.add_parser("predict", help="how long a move would take, and within what")
    predict.add_argument("source", type=Path)
    predict.add_argument("--limit-mbit", type=_number(0.01, 1e7), required=True, help="bandwidth of the link or its limit, Mbit/s")
    predict.add_argument("--changing", action="store_true", help="the source is written to: watch it for half a second, and reckon with its passes")
    predict.add_argument("--threads", type=_whole(0, _THREADS_MOST), default=0, help="encoders; 0: one a processor")
    predict.add_argument("--downtime", type=_number(0.001, 3600), default=CEILING_S, help=f"seconds that the writer may stand still, at most ({CEILING_S:g})")
    predict.add_argument("--stall", type=_number(0.1, 86400), default=STALL_S, help=argparse.SUPPRESS)
    predict.add_argument("--history", type=Path, help="how moves went here before: calibrates the interval")
    receive = commands.add_parser("receive", help="receive one object")
    receive.add_argument("destination", type=Path)
    receive.add_argument("--listen", type=_address, default=("127.0.0.1", 0), metavar="HOST:PORT")
    receive.add_argument("--bases", type=Path, help="folder of bases, named by their root hash")
    receive.add_argument("--replace", action="store_true", help="put it in place of what is there, at once, at the end")
    out = commands.add_parser("carry-out", help="carry connections of local processes to a carry-in: make a folder of sockets for them")
    out.add_argument("folder", type=Path, help="made, and gone at the end; what is left of an earlier one is replaced")
    out.add_argument("to", type=_address, metavar="HOST:PORT")
    out.add_argument("--transfer", default="", help="name that both ends' records are bound to (the folder's name)")
    into = commands.add_parser("carry-in", help="connect what a carry-out carries with sockets in which local processes listen")
    into.add_argument("folder", type=Path, help="where those sockets are; it may come later than this")
    into.add_argument("--listen", type=_address, default=("127.0.0.1", 0), metavar="HOST:PORT")
    for command in (out, into):
        command.add_argument("--channels", type=_channels, required=True, metavar="NAMES", help=f"names of the sockets, as disk,memory,word; at most {carry.CHANNELS_MOST}")
        command.add_argument("--wait", type=_number(0.1, 86400), help="seconds to wait for the first connection (as --patience)")
    worker = commands.add_parser("worker", help="do what a hub asks for: send and receive files below a folder")
    worker.add_argument("--hub", required=True, help="the hub's address, as https://hub.example")
    worker.add_argument("--ca-file", type=Path, help="certificate authorities by which the hub is trusted (PEM); else the system's")
    worker.add_argument("--name", required=True, help="this worker's name")
    worker.add_argument("--token-file", type=Path, required=True, help="file with the token that the hub has for this name, for its owner alone")
    worker.add_argument("--folder", type=Path, required=True, help="what may be sent and where to receive: nothing outside of it is touched")
    worker.add_argument("--bases", type=Path, help="folder of bases")
    worker.add_argument("--listen", default="127.0.0.1", metavar="HOST", help="where receivers listen (127.0.0.1)")
    worker.add_argument("--advertise", default="", metavar="HOST", help="how others reach it, where that is another name")
    worker.add_argument("--ports", type=_ports, default=(0, 0), metavar="LOW-HIGH", help="ports for receivers (any free one)")
    worker.add_argument("--slots", type=_whole(1, 64), default=2, help="sides that are carried at once (2)")
    qemu_cli.add(commands, _address, _number, _whole, _codecs)
    for command in (send, receive, out, into):
        command.add_argument("--events", action="store_true", help="for programs: what happens, as one JSON object a line on the standard error")
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


def _limits(options: argparse.Namespace, length: int) -> Limits:
    return precopy.limits_for(length, Limits(first=min(FIRST_S, options.downtime), ceiling=options.downtime, stall=options.stall))


def _question(options: argparse.Namespace, source: FileSource) -> Question:
    link = Link(options.limit_mbit * 1e6 / 8, options.threads or os.cpu_count() or 1)
    return Question(sample.take(source, changing=options.changing), link, _limits(options, source.length) if options.changing else None, busy())


def _predicted(question: Question, history: Path | None) -> MigrationPrediction:
    predictor = Predictor.load()
    for outcome in History(history).read() if history else ():
        predictor.learn(outcome)
    return predictor.predict(question)


def _predict(options: argparse.Namespace) -> dict[str, Any]:
    source = FileSource(options.source)
    try:
        return _predicted(_question(options, source), options.history).to_json()
    finally:
        source.close()


def _send(options: argparse.Namespace) -> dict[str, Any]:
    if options.history and not options.limit_mbit:
        raise ModelError("--history: a move over a link of unknown bandwidth cannot be predicted; give --limit-mbit")
    hook = _hook(options)
    key = keys.load_key(options.key_file)
    source = FileSource(options.source)
    base = FileSource(options.base) if options.base else None
    gpu: Gpu | None = None
    try:
        gpu = _gpu(options.transforms, base is not None)
        question = _question(options, source) if options.history else None
        said = {"predicted": _predicted(question, options.history).to_json()} if question else {}
        if options.events and said:
            _event(prediction=said["predicted"])
        sender = Sender(
            source, key, options.to, transfer=options.transfer, base=base, codecs=options.codecs, threads=options.threads, streams=(min(STREAMS_AT_FIRST, options.streams), options.streams),
            limit=options.limit_mbit * 1e6 / 8, patience=options.patience, gpu=gpu, references=not options.no_references,
        )
        if options.events:
            _tell_progress(sender.progress)
        if not options.changing:
            sent = sender.run()
            _learn(options, question, sent)
            return {**dataclasses.asdict(sent), "root": sent.root.hex(), **said}
        moved = precopy.move(sender, hook, _limits(options, source.length))
        _learn(options, question, moved.sent)
        live = dataclasses.asdict(moved)
        sent_live = live.pop("sent")
        return {**said, **sent_live, **{f"{name}_s": round(value, 4) for name, value in live.items()}, "root": sent_live["root"].hex()}
    finally:
        source.close()
        if base is not None:
            base.close()
        if gpu is not None:
            with contextlib.suppress(DeviceFailed):  # it failed before, and that was said
                gpu.close()


def _gpu(wanted: str, with_base: bool) -> Gpu | None:
    """Raises DeviceFailed where a GPU is asked for and there is none of use."""
    if wanted == "cpu":
        return None
    try:
        gpu = probe(with_base=with_base)
    except DeviceFailed as error:
        if wanted == "gpu":
            raise
        print(f"send: by the processors: {error}", file=sys.stderr)
        return None
    try:
        coder = nvcomp.attach(gpu)
        if coder.refused:
            print(f"send: not coded by the GPU: {coder.why()}", file=sys.stderr)
    except DeviceFailed as error:  # an extra, and the processors code as well
        print(f"send: coded by the processors: {error}", file=sys.stderr)
    return gpu


def _learn(options: argparse.Namespace, question: Question | None, sent: Sent) -> None:
    """Add how it went, where it was a whole move: one that took up an earlier one, or had a base or a cut, says nothing of others. The move is done, whatever becomes of the history."""
    if question is None or sum(sent.pages.values()) * PAGE < sent.length or sent.cuts or options.base:
        return
    foreseen = question.foresee()
    if foreseen.converges:
        try:
            History(options.history).add(Outcome(tuple(question.features(foreseen)), foreseen.seconds, sent.seconds))
        except ModelError as error:
            print(f"send: {error}", file=sys.stderr)


def _event(**what: Any) -> None:
    print(json.dumps(what), file=sys.stderr, flush=True)


def _tell_progress(how_far: Callable[[], dict[str, int]]) -> None:
    """On a thread, until the process ends."""
    def tell() -> None:
        while True:
            _event(progress=how_far())
            time.sleep(PROGRESS_S)

    threading.Thread(target=tell, daemon=True, name="progress").start()


def _receive(options: argparse.Namespace) -> dict[str, Any]:
    taking = Receiver(options.destination, keys.load_key(options.key_file), options.listen, bases=options.bases, replace=options.replace, patience=options.patience)
    _tell_address(options, taking.address)
    done = taking.serve()
    return {**dataclasses.asdict(done), "root": done.root.hex()}


def _tell_address(options: argparse.Namespace, address: tuple[str, int]) -> None:
    if options.events:
        _event(listening=address[1])
    else:
        print(f"listening on {address[0]}:{address[1]}", file=sys.stderr, flush=True)


def _carry_out(options: argparse.Namespace) -> dict[str, Any]:
    end = carry.CarryOut(options.folder, keys.load_key(options.key_file), options.to, options.channels, transfer=options.transfer, patience=options.patience, wait=options.wait)
    return _carried(options, end)


def _carry_in(options: argparse.Namespace) -> dict[str, Any]:
    end = carry.CarryIn(options.folder, keys.load_key(options.key_file), options.listen, options.channels, patience=options.patience, wait=options.wait)
    _tell_address(options, end.address)
    return _carried(options, end)


def _carried(options: argparse.Namespace, end: carry.CarryOut | carry.CarryIn) -> dict[str, Any]:
    """How long it is, nobody knows; and there is no root, as nobody has looked at it."""
    if options.events:
        _tell_progress(lambda: {"moved_bytes": (moved := end.carried()), "wire_bytes": moved, "length": 0, "passes": 0})
    return {"root": "", **dataclasses.asdict(end.run())}


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
    if options.command in ("vm-send", "carry-out", "carry-in"):
        signal.signal(signal.SIGTERM, _terminated)  # as an exception, so that a guest that stands still runs again, and no folder of sockets is left
    try:
        if options.command == "key":
            print(keys.new_key())
            return 0
        if options.command == "worker":
            from .worker import Worker

            Worker(options).run()
            return 0
        if options.command == "base":
            result = {"root": receiver.add_base(options.file, options.bases, os.cpu_count() or 1).hex()}
        else:
            result = {
                "send": _send, "predict": _predict, "receive": _receive, "verify": _verify, "bench": _bench, "carry-out": _carry_out, "carry-in": _carry_in, "vm-send": qemu_cli.send, "vm-receive": qemu_cli.receive,
            }[options.command](options)
    except MigrationError as error:
        if getattr(options, "events", False):
            _event(error=str(error), kind=type(error).__name__)
        else:
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
