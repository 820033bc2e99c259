"""What drivers read and write of an instance's folder, and how they watch processes that are not their children."""

import asyncio
import fcntl
import json
import os
import select
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .face import Exit, Key, Phase, Refused, Status

MAX_EXEC_OUTPUT = 1 << 20
"""Bytes kept of each stream of a command; what comes after is read and dropped."""


OUTPUT = ("stdout.log.1", "stdout.log", "stderr.log.1", "stderr.log")
"""Files of what an instance wrote, in its folder."""

NOTE = "checkpoint.json"
"""In an instance's folder: the checkpoint that is under way, or that has ended it."""

BLOCK = 512
"""Bytes of a block, as stat(2) counts them."""

SNAPSHOT = "snapshot.json"
"""In a container's folder: it stands still for its snapshot."""

UPPER = "rest.qcow2"
"""In a virtual machine's folder: what lies over its disk until its keeper has written it into that."""

LEFT = "left.json"
"""In a virtual machine's folder: it leaves for another node while it runs, or has; whose it is only the hub knows."""

LOOK_S = 0.02
"""Pause between two looks at a lock, for which there is no event."""


def link_output(source: Path, target: Path) -> None:
    """Give what an instance wrote a second name in another folder of the same file system; what is there goes, but for a file that `source` has not."""
    for name in OUTPUT:
        if (source / name).exists():
            (target / name).unlink(missing_ok=True)
            os.link(source / name, target / name)


def held(folder: Path) -> bool:
    """Whether what watches over the instance lives: it holds the folder's lock."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)


async def unheld(folder: Path) -> None:
    """Until nobody holds it."""
    while held(folder):
        await asyncio.sleep(LOOK_S)


def released(folder: Path, seconds: float) -> bool:
    """Wait until nobody holds it, so long at most; whether that is so. Blocks."""
    end = time.monotonic() + seconds
    while held(folder):
        if time.monotonic() >= end:
            return False
        time.sleep(LOOK_S)
    return True


def ended(key: Key, end: Mapping[str, Any]) -> Status:
    """How an instance ended, from its `exit.json`."""
    if "failed" in end:
        return Status(key, Phase.ENDED, reason=str(end["failed"]))
    told = Exit(int(end["code"]), int(end["signal"]), bool(end["out_of_memory"]), int(end["at_ms"]), int(end.get("memory_kills", 0)))
    return Status(key, Phase.ENDED, exit=told, reason=told.reason)


def present(folder: Path) -> dict[str, dict[str, Any]]:
    """The documents of the instances in a driver's folder, by the names of theirs. What begins with a dot is under way."""
    found = {}
    for entry in os.scandir(folder):
        if not entry.name.startswith("."):
            value = read(Path(entry.path, "instance.json"))
            if value is not None and isinstance(value.get("id"), str) and isinstance(value.get("epoch"), int):
                found[entry.name] = value
    return found


def known(folder: Path, what: str) -> dict[str, Any]:
    """An instance's document. Raises `Refused` where there is none; `what` it would be."""
    value = read(folder / "instance.json")
    if value is None:
        raise Refused("id", f"there is no {what} {folder.name} here", "prepare it first")
    return value


async def over(folder: Path, status: Callable[[], Status], watched: Callable[[], int | None]) -> Status:
    """Until it does not run any more. `watched`: a descriptor that becomes readable at its end, None where that is not there yet, or any more. Raises `Refused` where it was never started."""
    while True:
        now, descriptor = status(), watched()
        if now.phase is Phase.PREPARED and not held(folder):
            raise Refused("id", f"{folder.name} was never started", "start it first")
        if now.phase in (Phase.ENDED, Phase.LOST, Phase.CHECKPOINTED):
            return now
        if descriptor is None:  # between two states
            await asyncio.sleep(LOOK_S)
            continue
        try:
            await readable(descriptor)
        finally:
            os.close(descriptor)


def alive(running: Mapping[str, Any]) -> bool:
    """Whether the first process that was written down is there: of this boot, with this start."""
    try:
        if Path("/proc/sys/kernel/random/boot_id").read_text().strip() != running["boot"]:
            return False
        fields = Path(f"/proc/{int(running['pid'])}/stat").read_bytes().rpartition(b")")[2].split()
        return int(fields[19]) == running["started"] and fields[0] not in (b"Z", b"X")
    except (OSError, ValueError, KeyError, IndexError):
        return False


async def readable(descriptor: int) -> None:
    """Until a descriptor can be read; of a pidfd: until its process has ended."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(descriptor)


async def bounded(stream: asyncio.StreamReader) -> tuple[bytes, bool]:
    """All of a stream, of which the first `MAX_EXEC_OUTPUT` bytes are kept; whether that was not all."""
    kept, cut = bytearray(), False
    while data := await stream.read(1 << 16):
        room = MAX_EXEC_OUTPUT - len(kept)
        cut = cut or len(data) > room
        kept += data[:room]
    return bytes(kept), cut


def line(descriptor: int, seconds: float, stop: int = -1) -> str:
    """One line of a pipe, without its end; empty where there is none in time, or before `stop` can be read."""
    found, end = b"", time.monotonic() + seconds
    while not found.endswith(b"\n") and len(found) < 100:
        if descriptor not in select.select([descriptor, *([stop] if stop >= 0 else [])], [], [], max(0.0, end - time.monotonic()))[0]:
            break
        data = os.read(descriptor, 1)
        if not data:
            break
        found += data
    return found.decode("ascii", "replace").strip()


def tail(path: Path, most: int) -> tuple[bytes, bool]:
    """The last bytes of a log and the one before it; whether there was more."""
    found, more = b"", False
    for file in (path, path.with_name(path.name + ".1")):
        try:
            with open(file, "rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                take = min(size, max(0, most - len(found)))
                more = more or size > take
                handle.seek(size - take)
                found = handle.read(take) + found
        except FileNotFoundError:
            continue
    return found, more


Mark = tuple[int, int, int]
"""A place in a log: the file's inode, bytes from its beginning, and the CRC-32 of what stands before it there: inodes are used again, at once."""

NOWHERE: Mark = (0, 0, 0)
"""The place in a log of which there is nothing yet."""

MARKED = 64
"""Bytes before a place that are looked at: a line or two, so that with its number or time no two are the same."""


def since(path: Path, mark: Mark | None, most: int) -> tuple[bytes, Mark, bool]:
    """What a log got after `mark` (None: its end), at most `most` bytes; the place after it; whether something is missing before it, since the files have turned meanwhile."""
    with ExitStack() as stack:
        files: list[tuple[BinaryIO, int, int]] = []
        for name in (path.with_name(path.name + ".1"), path):
            with suppress(FileNotFoundError):
                opened = stack.enter_context(open(name, "rb"))
                told = os.fstat(opened.fileno())
                if told.st_size:
                    files.append((opened, told.st_ino, told.st_size))
        at = next((number for number, (file, inode, size) in enumerate(files) if mark is not None and 0 < mark[1] <= size and mark == (inode, mark[1], _before(file, mark[1]))), None)
        if at is not None and mark is not None:
            starts, missing = [size if number < at else mark[1] if number == at else 0 for number, (_, _, size) in enumerate(files)], False
        else:
            room, starts = most, [0] * len(files)
            for number in reversed(range(len(files))):
                starts[number] = max(0, files[number][2] - room)
                room -= files[number][2] - starts[number]
            missing = sum(starts) > 0 or (mark is not None and (mark != NOWHERE or len(files) > 1))  # with two files there may have been a third
        found, place = b"", mark or NOWHERE
        for (file, inode, size), start in zip(files, starts, strict=True):
            file.seek(start)
            data = file.read(min(size - start, most - len(found)))
            if data:
                found, place = found + data, (inode, start + len(data), _before(file, start + len(data)))
        return found, place, missing


def _before(file: BinaryIO, place: int) -> int:
    file.seek(max(0, place - MARKED))
    return zlib.crc32(file.read(min(place, MARKED)))


def read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or where it is not whole."""
    try:
        value: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write(path: Path, value: Any) -> None:
    """A document, on the disk when this returns; in a folder that has not got its name yet."""
    with open(path, "w") as handle:
        json.dump(value, handle)
        handle.flush()
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """The names in a folder, on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
