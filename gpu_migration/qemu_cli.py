"""The commands `vm-send` and `vm-receive`."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import choice, keys
from .convergence import CEILING_S, STALL_S
from .qemu_source import FIRST_S, Options, Source
from .qemu_target import Target
from .receiver import PATIENCE_S, STREAMS_MOST


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", address: Callable[[str], Any], number: Callable[[float, float], Any], whole: Callable[[int, int], Any], codecs: Callable[[str], Any]) -> None:
    """Their options."""
    send = commands.add_parser("vm-send", help="move a guest of QEMU, while it runs, to a vm-receive")
    send.add_argument("control", type=Path, metavar="QMP", help="QEMU's control socket, which nobody else uses meanwhile")
    send.add_argument("to", type=address, metavar="HOST:PORT")
    send.add_argument("--codecs", type=codecs, default=choice.FREE, help="auto, or those to choose from, as lz4,zstd-1")
    send.add_argument("--streams", type=whole(1, STREAMS_MOST), default=STREAMS_MOST, help=f"for the memory, at most (up to {STREAMS_MOST})")
    send.add_argument("--limit-mbit", type=number(0, 1e7), default=0.0, help="bandwidth limit of the memory's transfer, Mbit/s; 0: none")
    send.add_argument("--downtime", type=number(0.001, 3600), default=CEILING_S, help=f"seconds that the last pages may take, at most ({CEILING_S:g}); {FIRST_S:g} s are tried first")
    send.add_argument("--stall", type=number(0.1, 86400), default=STALL_S, help=f"seconds without progress after which the move is given up ({STALL_S:g})")
    send.add_argument("--track", choices=("auto", "protect", "hash"), default="auto", help="how written pages are found: write protection (Linux 6.7), a hash of every page, or the first that works")
    send.add_argument("--verify", action="store_true", help="compare the whole memory of both ends while the guest stands still (longer)")
    send.add_argument("--leave", action="store_true", help="leave QEMU here, stopped, once the guest is over; else it is ended")
    receive = commands.add_parser("vm-receive", help="take one guest of QEMU into a folder, best in memory (/dev/shm)")
    receive.add_argument("folder", type=Path)
    receive.add_argument("qemu", nargs="+", metavar="QEMU", help="after --: QEMU's command line, the same machine as at the source, with {memory} for the file of its memory and {disk:NODE} for that of each disk that is to come with it; -qmp, -incoming and -S are added")
    receive.add_argument("--disks", type=Path, metavar="FOLDER", help="folder for the disks that come with it, best with nothing else in it (else disks in its folder)")
    receive.add_argument("--listen", type=address, default=("127.0.0.1", 0), metavar="HOST:PORT")
    for command in (send, receive):
        command.add_argument("--key-file", type=Path, help=f"file with the key, for its owner alone (else {keys.KEY_VARIABLE})")
        command.add_argument("--patience", type=number(0.1, 86400), default=PATIENCE_S, help="seconds to bear without the other end")


def send(options: argparse.Namespace) -> dict[str, Any]:
    """Raises MigrationError."""
    how = Options(
        codecs=options.codecs, streams=options.streams, limit=options.limit_mbit * 1e6 / 8, patience=options.patience, first=min(FIRST_S, options.downtime), ceiling=options.downtime, stall=options.stall,
        track=options.track, verify=options.verify, leave=options.leave,
    )
    return dataclasses.asdict(Source(options.control, keys.load_key(options.key_file), options.to, how).move())


def receive(options: argparse.Namespace) -> dict[str, Any]:
    """Raises MigrationError."""
    target = Target(options.folder, keys.load_key(options.key_file), options.listen, options.qemu, disks=options.disks, patience=options.patience)
    print(f"listening on {target.address[0]}:{target.address[1]}", file=sys.stderr, flush=True)
    return dataclasses.asdict(target.serve())
