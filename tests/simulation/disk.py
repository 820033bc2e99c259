"""A disk that keeps what was made durable and forgets the rest when the power goes.

Each file is its content as programs see it, the content that is durable, and the writes in between. Names (a new file, a rename, an
unlink) are durable after the directory was synchronised. A power cut keeps what is durable, a prefix of the changes of names (a journalling
file system keeps their order), and of the other writes a random part, some of them torn at a sector.

SQLite runs on it through a VFS in Python (apsw, with a SQLite of its own). WAL's shared memory is not simulated: the connections of one file
share one SQLite connection in exclusive locking mode, which keeps the WAL index on the heap. All of it runs on one thread, so the three
connections of the journal never are in each other's transactions anyway.
"""

# ruff: noqa: N802 (the names of the VFS are SQLite's)

import errno
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import apsw

SECTOR = 512
"""Bytes that a disk writes whole or not at all."""

VFS_NAME = "novacron-simulation"
ROOT = "/sim"


class File:
    """One file: its content, what of it is durable, and the writes since; a write is (offset, bytes), a truncation (size, None)."""

    __slots__ = ("data", "durable", "pending")

    def __init__(self) -> None:
        self.data = bytearray()
        self.durable = bytearray()
        self.pending: list[tuple[int, bytes | None]] = []

    def write(self, offset: int, data: bytes) -> None:
        """Change the content; durable after `sync`."""
        _apply(self.data, offset, data)
        self.pending.append((offset, data))

    def truncate(self, size: int) -> None:
        """Change the size; durable after `sync`."""
        _apply(self.data, size, None)
        self.pending.append((size, None))

    def sync(self) -> None:
        """What was written is durable."""
        for offset, data in self.pending:
            _apply(self.durable, offset, data)
        self.pending.clear()

    def lose(self, draw: random.Random, keep: float, happened: Counter[str]) -> None:
        """The power goes: each write since the last sync survives with probability `keep`, the last one or a few others torn."""
        last = len(self.pending) - 1
        for number, (offset, data) in enumerate(self.pending):
            if draw.random() >= keep:
                happened["unsynced writes lost"] += 1
                continue
            if data is not None and len(data) > SECTOR and (number == last or draw.random() < 0.1):
                cut = draw.randrange(0, len(data), SECTOR)
                happened["writes torn"] += 1
                if draw.random() < 0.5:
                    _apply(self.durable, offset, data[:cut])
                elif offset + cut <= len(self.durable):
                    _apply(self.durable, offset + cut, data[cut:])
                continue
            happened["unsynced writes kept"] += 1
            _apply(self.durable, offset, data)
        self.pending.clear()
        self.data = bytearray(self.durable)


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        if offset < len(content):
            del content[offset:]
        elif offset > len(content):
            content.extend(bytes(offset - len(content)))
        return
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


class PowerLost(OSError):
    """The machine is off: nothing reads or writes any more."""


class PowerGoes(PowerLost):
    """The power goes in this very change."""


class SimDisk:
    """One machine's disk; see `edge_runtime.journal.storage.Storage` for what the journal asks of it.

    Attributes:
        capacity: bytes; writes past it fail as a full disk's do.
        sync_s: seconds of one fsync.
        countdown: changes until the power goes, -1 for never; `on_cut` is called then.
        syncs, writes: how many there were.
        happened: effects of faults, counted (see coverage.py).
    """

    def __init__(self, name: str, draw: random.Random, block: Callable[[float], None], happened: Counter[str] | None = None) -> None:
        self.name = name
        self.happened: Counter[str] = Counter() if happened is None else happened
        self.root = f"{ROOT}/{name}"
        self._draw = draw
        self._block = block
        self.files: dict[str, File] = {}
        self._names: dict[str, File] = {}
        self._moves: list[tuple[str, str, File | None]] = []
        self.capacity = 1 << 40
        self.used = 0
        self.sync_s = 0.0
        self.countdown = -1
        self.on_cut: Callable[[], None] = lambda: None
        self.mounted = object()
        self._shared: dict[str, _Shared] = {}
        self.syncs = 0
        self.writes = 0
        self.full_errors = 0
        DISKS[name] = self

    # -- power ---------------------------------------------------------------------------------------------------------------

    def unmount(self) -> None:
        """The process is gone (killed): its handles are void; what it wrote is there."""
        self.mounted = object()
        shared, self._shared = self._shared, {}
        for entry in shared.values():
            entry.abandon()

    def lose_power(self, keep: float) -> None:
        """Everything that was not durable is lost, but for a random part."""
        self.unmount()
        self.countdown = -1
        kept = self._draw.randrange(len(self._moves) + 1)
        for change in self._moves[:kept]:
            _move(self._names, change)
        self.happened["names lost"] += len(self._moves) - kept
        self._moves.clear()
        self.files = dict(self._names)
        for file in self.files.values():
            file.lose(self._draw, keep, self.happened)
        self.used = sum(len(file.data) for file in self.files.values())

    def copy_to(self, other: "SimDisk") -> None:
        """An image of this disk as it is now (everything written counts): how clones are made."""
        for path, file in self.files.items():
            twin = File()
            twin.data, twin.durable = bytearray(file.data), bytearray(file.data)
            other.files[path.replace(self.root, other.root, 1)] = twin
        other._names = dict(other.files)
        other.used = sum(len(file.data) for file in other.files.values())

    def changing(self, mounted: object | None = None, what: str = "a change of names or sizes") -> None:
        """Before every change: is there power, and does it last?"""
        if mounted is not None and mounted is not self.mounted:
            raise PowerLost(errno.EIO, "no power")
        self.writes += 1
        if self.countdown >= 0:
            self.countdown -= 1
            if self.countdown < 0:
                self.mounted = object()
                self.happened[f"power lost in {what}"] += 1
                self.on_cut()
                raise PowerGoes(errno.EIO, "the power went")

    def room(self, more: int) -> None:
        """Raise OSError ENOSPC where `more` bytes do not fit."""
        if more > 0 and self.used + more > self.capacity:
            self.refuse()
            raise OSError(errno.ENOSPC, "no space left on device")

    def refuse(self) -> None:
        """The disk is full: counted."""
        self.full_errors += 1
        self.happened["writes refused by a full disk"] += 1

    def synced(self) -> None:
        """One fsync."""
        self.syncs += 1
        if self.sync_s:
            self.happened["slow fsyncs"] += 1
            self._block(self.sync_s)

    # -- names ---------------------------------------------------------------------------------------------------------------

    def open(self, path: str) -> File:
        """The file `path`, made where it is not there."""
        file = self.files.get(path)
        if file is None:
            self.changing()
            file = self.files[path] = File()
            self._moves.append(("link", path, file))
        return file

    def unlink(self, path: str) -> None:
        """Delete a name; nothing where it is not there."""
        if path in self.files:
            self.changing()
            self.used -= len(self.files.pop(path).data)
            self._moves.append(("unlink", path, None))

    def sync_names(self) -> None:
        """Names are durable."""
        self.changing()
        for change in self._moves:
            _move(self._names, change)
        self._moves.clear()
        self.synced()

    # -- the storage interface -----------------------------------------------------------------------------------------------

    def connect(self, path: Path, timeout_s: float) -> sqlite3.Connection:
        """See `Storage`."""
        key = str(path)
        shared = self._shared.get(key)
        if shared is None:
            shared = self._shared[key] = _Shared(self, key)
        shared.users += 1
        return SimConnection(shared)  # type: ignore[return-value]

    def disconnect(self, path: str) -> None:
        """The last connection of `path` is closed."""
        self._shared.pop(path, None)

    def make_directory(self, path: Path) -> None:
        """Directories are always there."""

    def read(self, path: Path) -> bytes:
        """See `Storage`."""
        try:
            return bytes(self.files[str(path)].data)
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from None

    def write(self, path: Path, data: bytes) -> None:
        """See `Storage`."""
        file = self.open(str(path))
        self.changing()
        self.room(len(data) - len(file.data))
        self.used += len(data) - len(file.data)
        file.truncate(0)
        file.write(0, data)
        self.changing()
        file.sync()
        self.synced()

    def sync_directory(self, directory: Path) -> None:
        """See `Storage`."""
        self.sync_names()

    def exists(self, path: Path) -> bool:
        """See `Storage`."""
        return str(path) in self.files

    def size(self, path: Path) -> int:
        """See `Storage`."""
        return len(self.read(path)) if str(path) not in self.files else len(self.files[str(path)].data)

    def replace(self, source: Path, target: Path) -> None:
        """See `Storage`."""
        self.changing()
        old = self.files.get(str(target))
        if old is not None:
            self.used -= len(old.data)
        file = self.files.pop(str(source))
        self.files[str(target)] = file
        self._moves.append((str(source), str(target), file))

    def remove(self, path: Path) -> None:
        """See `Storage`."""
        self.unlink(str(path))

    def names(self, directory: Path, pattern: str) -> list[str]:
        """See `Storage`."""
        prefix = f"{directory}/"
        return sorted(path[len(prefix) :] for path in self.files if path.startswith(prefix) and fnmatchcase(path[len(prefix) :], pattern))

    def allocate(self, path: Path, size: int) -> None:
        """See `Storage`."""
        self.room(size)
        file = self.open(str(path))
        self.changing()
        self.used += size - len(file.data)
        file.truncate(size)

    def lengthen(self, path: Path, size: int) -> None:
        """See `Storage`."""
        more = size - self.size(path)
        file = self.files[str(path)]
        self.room(more)
        if more > 0:
            self.changing(what="a write of a WAL")
            self.used += more
            file.write(len(file.data), bytes(more))

    def free_bytes(self, directory: Path) -> int:
        """See `Storage`."""
        return max(0, self.capacity - self.used)


def _move(names: dict[str, File], change: tuple[str, str, File | None]) -> None:
    kind, path, file = change
    if kind == "unlink":
        names.pop(path, None)
    elif file is not None:
        names[path] = file
        if kind != "link":
            names.pop(kind, None)


DISKS: dict[str, SimDisk] = {}
"""Every disk of this process by name; the VFS finds them here."""


class _VfsFile:
    """One open file of SQLite's."""

    def __init__(self, disk: SimDisk, path: str, created: bool) -> None:
        self._disk = disk
        self._path = path
        self._file = disk.open(path)
        self._mounted = disk.mounted
        self._name_pending = created and path.endswith(("-wal", "-journal"))
        self._kind = "a write of a WAL" if path.endswith("-wal") else "a write of a database"

    def xRead(self, amount: int, offset: int) -> bytes:
        if self._mounted is not self._disk.mounted:
            raise apsw.IOError("no power")
        return bytes(self._file.data[offset : offset + amount])

    def xWrite(self, data: bytes, offset: int) -> None:
        disk, file = self._disk, self._file
        more = offset + len(data) - len(file.data)
        if more > 0 and disk.used + more > disk.capacity:
            disk.refuse()
            raise apsw.FullError("no space left on device")
        try:
            disk.changing(self._mounted, self._kind)
        except PowerGoes:
            file.pending.append((offset, bytes(data)))  # it was under way
            raise apsw.IOError("the power went") from None
        except PowerLost:
            raise apsw.IOError("no power") from None
        if more > 0:
            disk.used += more
        file.write(offset, bytes(data))

    def xTruncate(self, size: int) -> None:
        try:
            self._disk.changing(self._mounted)
        except PowerLost:
            raise apsw.IOError("the power went") from None
        self._disk.used += size - len(self._file.data)
        self._file.truncate(size)

    def xSync(self, _flags: int) -> None:
        disk = self._disk
        try:
            disk.changing(self._mounted, "an fsync")
            self._file.sync()
            disk.synced()
            if self._name_pending:  # what SQLite's own VFS does for a new journal or WAL
                self._name_pending = False
                disk.sync_names()
        except PowerLost:
            raise apsw.IOError("the power went") from None

    def xFileSize(self) -> int:
        return len(self._file.data)

    def xClose(self) -> None:
        """Nothing is kept open."""

    def xLock(self, _level: int) -> None:
        """One process."""

    def xUnlock(self, _level: int) -> None:
        """One process."""

    def xCheckReservedLock(self) -> bool:
        return False

    def xFileControl(self, _op: int, _pointer: int) -> bool:
        return False

    def xSectorSize(self) -> int:
        return 4096

    def xDeviceCharacteristics(self) -> int:
        return apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE


class SimVfs(apsw.VFS):
    """SQLite's way to the simulated disks; paths are /sim/<disk>/..."""

    def __init__(self) -> None:
        super().__init__(VFS_NAME, "")

    @staticmethod
    def _disk(path: str) -> SimDisk:
        return DISKS[path.split("/", 3)[2]]

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        path = name if isinstance(name, str) else name.filename()
        disk = self._disk(path)
        flags[1] = flags[0]
        created = path not in disk.files
        if created and not flags[0] & apsw.SQLITE_OPEN_CREATE:
            raise apsw.CantOpenError("no such file")
        try:
            return _VfsFile(disk, path, created)
        except PowerLost:
            raise apsw.CantOpenError("no power") from None

    def xFullPathname(self, name: str) -> str:
        return name

    def xAccess(self, path: str, _flags: int) -> bool:
        return path in self._disk(path).files

    def xDelete(self, path: str, sync_directory: bool) -> None:
        disk = self._disk(path)
        try:
            disk.unlink(path)
            if sync_directory:
                disk.sync_names()
        except PowerLost:
            raise apsw.IOError("no power") from None


_vfs: list[SimVfs] = []


class _Shared:
    """The one SQLite connection of a file, and how many use it."""

    def __init__(self, disk: SimDisk, path: str) -> None:
        if not _vfs:
            _vfs.append(SimVfs())
        self.disk = disk
        self.path = path
        self.users = 0
        self.transaction = False
        try:
            self.connection = apsw.Connection(path, vfs=VFS_NAME, statementcachesize=64)
        except apsw.Error as error:
            raise translated(error) from None
        self.connection.execute("PRAGMA locking_mode=EXCLUSIVE")

    def release(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.disk.disconnect(self.path)
            self._close()

    def abandon(self) -> None:
        """The process is gone."""
        self._close()

    def _close(self) -> None:
        try:
            self.connection.close(True)
        except apsw.Error:
            pass  # its disk is gone


def translated(error: apsw.Error) -> sqlite3.Error:
    """What the standard library's sqlite3 would raise."""
    if isinstance(error, apsw.FullError):
        return sqlite3.OperationalError("database or disk is full")
    if isinstance(error, apsw.CorruptError | apsw.NotADBError):
        return sqlite3.DatabaseError(str(error))
    if isinstance(error, apsw.ConstraintError):
        return sqlite3.IntegrityError(str(error))
    return sqlite3.OperationalError(str(error))


class Rows:
    """The rows of one statement, read at once; an error met on the way is raised behind the rows before it."""

    __slots__ = ("_error", "_next", "_rows", "rowcount")

    def __init__(self, rows: list[Any], error: sqlite3.Error | None, rowcount: int) -> None:
        self._rows = rows
        self._error = error
        self._next = 0
        self.rowcount = rowcount

    def fetchone(self) -> Any:
        """The next row or None."""
        if self._next < len(self._rows):
            self._next += 1
            return self._rows[self._next - 1]
        if self._error is not None:
            raise self._error
        return None

    def fetchall(self) -> list[Any]:
        """The rows that are left."""
        rows, self._next = self._rows[self._next :], len(self._rows)
        if self._error is not None:
            raise self._error
        return rows

    def __iter__(self) -> Iterator[Any]:
        while (row := self.fetchone()) is not None:
            yield row


class SimConnection:
    """The part of `sqlite3.Connection` that the journal uses."""

    def __init__(self, shared: _Shared) -> None:
        self._shared: _Shared | None = shared
        self._connection = shared.connection

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Rows:
        """See sqlite3."""
        if statement.startswith("PRAGMA query_only"):
            return Rows([], None, -1)  # the connection is the writer's too
        connection = self._connection
        rows: list[Any] = []
        error: sqlite3.Error | None = None
        try:
            cursor = connection.execute(statement, values)
        except apsw.Error as raised:
            raise translated(raised) from None
        try:
            for row in cursor:
                rows.append(row)
        except apsw.Error as raised:
            error = translated(raised)
            if not rows:
                raise error from None
        return Rows(rows, error, connection.changes() if statement.startswith("DELETE") else -1)

    @property
    def in_transaction(self) -> bool:
        """See sqlite3."""
        return bool(self._connection.in_transaction)

    def __enter__(self) -> "SimConnection":
        return self

    def __exit__(self, *_: object) -> None:
        """Autocommit: nothing is open."""

    def close(self) -> None:
        """See sqlite3."""
        if self._shared is not None:
            self._shared.release()
            self._shared = None
