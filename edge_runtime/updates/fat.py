"""FAT32 as a boot loader reads it (Microsoft's FAT specification, 2000): for looking at what a power cut left, and for keeping room in a folder. Pure over a function that reads. It believes the first table alone, as the
firmware does.

Room: when systemd-boot counts a start, the firmware's driver (EDK2's EnhancedFatDxe) writes the new name behind the folder's last one, never into a hole, and where a folder is full it lets it grow; the table that leads to the
new cluster is then on the disk before the one that ends the chain there, and a cut between the two leaves a folder that cannot be read: nothing starts any more. A folder that has room never grows.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ENTRY_BYTES = 32
SECTOR = 512
"""What a disk writes whole."""

FILE_MAX_BYTES = 64 << 20
"""No kernel is larger."""

FOLDER_MAX_BYTES = 1 << 20
_DIRECTORY, _LABEL, _LONG = 0x10, 0x08, 0x0F
_LAST = 0x0FFFFFF8
_FREE = 0xE5


@dataclass(frozen=True, slots=True)
class Found:
    """One name in a folder."""

    name: str
    folder: bool
    cluster: int
    size: int


class Fat:
    """One file system.

    Args:
        read: bytes from (offset, size) of the partition.

    Raises:
        ValueError: it is no FAT32.
    """

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        boot = read(0, 512)
        sector, per_cluster, reserved, tables = struct.unpack_from("<HBHB", boot, 11)
        self._table_bytes = struct.unpack_from("<I", boot, 36)[0] * sector
        self._root = struct.unpack_from("<I", boot, 44)[0]
        if boot[510:512] != b"\x55\xaa" or sector not in (512, 1024, 2048, 4096) or not per_cluster or not self._table_bytes or not tables:
            raise ValueError("it is no FAT32")
        self._cluster_bytes = sector * per_cluster
        self._table = reserved * sector
        self._data = self._table + tables * self._table_bytes
        self._kept: dict[int, bytes] = {}

    def _next(self, cluster: int) -> int:
        at = cluster * 4
        if not 0 <= at < self._table_bytes:
            raise ValueError(f"cluster {cluster} is outside the table")
        page = at // 4096
        if page not in self._kept:
            self._kept[page] = self._read(self._table + page * 4096, min(4096, self._table_bytes - page * 4096))
        return int(struct.unpack_from("<I", self._kept[page], at % 4096)[0]) & 0x0FFFFFFF

    def _runs(self, cluster: int, most: int) -> Iterator[tuple[int, int]]:
        """Place and bytes of the runs of a chain; raises ValueError where it leads astray, or on and on."""
        done = 0
        while cluster < _LAST:
            if cluster < 2 or done >= most:
                raise ValueError("a chain of clusters leads astray")
            run, first = 1, cluster
            cluster = self._next(cluster)
            while cluster == first + run and run * self._cluster_bytes < most:
                cluster = self._next(first + run)
                run += 1
            done += run * self._cluster_bytes
            yield self._data + (first - 2) * self._cluster_bytes, run * self._cluster_bytes

    def _chain(self, cluster: int, most: int) -> bytes:
        """The bytes of a chain; raises ValueError."""
        return b"".join(self._read(at, size) for at, size in self._runs(cluster, most))

    def _entries(self, cluster: int) -> Iterator[Found]:
        parts: dict[int, str] = {}
        check = -1
        raw = self._chain(cluster, FOLDER_MAX_BYTES)
        for at in range(0, len(raw), ENTRY_BYTES):
            entry = raw[at : at + ENTRY_BYTES]
            if entry[0] == 0:
                return
            if entry[0] == _FREE:
                parts = {}
            elif entry[11] == _LONG:
                if entry[0] & 0x40:
                    parts, check = {}, entry[13]
                text = entry[1:11] + entry[14:26] + entry[28:32]
                if entry[13] == check:
                    parts[entry[0] & 0x1F] = text.decode("utf-16-le", "replace").split("\0")[0]
            elif not entry[11] & _LABEL:
                short = entry[:8].decode("latin-1").rstrip() + ("." + entry[8:11].decode("latin-1").rstrip() if entry[8:11].strip() else "")
                total = 0
                for byte in entry[:11]:
                    total = ((total >> 1) | ((total & 1) << 7)) + byte & 0xFF
                whole = parts and total == check and sorted(parts) == list(range(1, len(parts) + 1))
                name = "".join(parts[number] for number in sorted(parts)) if whole else short
                high, low = struct.unpack_from("<H", entry, 20)[0], struct.unpack_from("<H", entry, 26)[0]
                yield Found(name, bool(entry[11] & _DIRECTORY), high << 16 | low, struct.unpack_from("<I", entry, 28)[0])
                parts = {}

    def _find(self, path: str) -> Found:
        here = Found("", True, self._root, 0)
        for part in path.strip("/").split("/"):
            if part:
                if not here.folder:
                    raise FileNotFoundError(path)
                found = next((one for one in self._entries(here.cluster) if one.name.lower() == part.lower()), None)
                if found is None:
                    raise FileNotFoundError(path)
                here = found
        return here

    def names(self, path: str) -> list[Found]:
        """What is in a folder. Raises FileNotFoundError, ValueError."""
        here = self._find(path)
        if not here.folder:
            raise FileNotFoundError(path)
        return [found for found in self._entries(here.cluster) if found.name not in (".", "..")]

    def _behind(self, path: str) -> tuple[list[tuple[int, bytes]], int]:
        """A folder's sectors with their places, and the number of its first entry behind the last name."""
        sectors = [(at + step, self._read(at + step, SECTOR)) for at, size in self._runs(self._find(path).cluster, FOLDER_MAX_BYTES) for step in range(0, size, SECTOR)]
        raw = b"".join(data for _, data in sectors)
        used = [at for at in range(0, len(raw), ENTRY_BYTES) if raw[at] not in (0, _FREE)]
        return sectors, (used[-1] // ENTRY_BYTES + 1 if used else 0)

    def room(self, path: str) -> int:
        """How many entries are behind a folder's last name and were never used, or were cleaned. Raises FileNotFoundError, ValueError."""
        sectors, behind = self._behind(path)
        raw = b"".join(data for _, data in sectors)
        return sum(raw[at] == 0 for at in range(behind * ENTRY_BYTES, len(raw), ENTRY_BYTES))

    def cleaned(self, path: str) -> list[tuple[int, bytes]]:
        """Writes, each a sector, that make all behind a folder's last name as if it had never been used; to be done in this order, from the end to the front: cut anywhere, the names stay. Raises FileNotFoundError, ValueError."""
        sectors, behind = self._behind(path)
        writes = []
        for number, (at, data) in reversed(list(enumerate(sectors))):
            kept = max(0, min(SECTOR, behind * ENTRY_BYTES - number * SECTOR))
            clean = data[:kept].ljust(SECTOR, b"\0")
            if clean != data:
                writes.append((at, clean))
        return writes

    def file(self, path: str) -> bytes:
        """A file's bytes. Raises FileNotFoundError; ValueError where its clusters are not there."""
        found = self._find(path)
        if found.folder:
            raise FileNotFoundError(path)
        if not found.size:
            return b""
        if found.size > FILE_MAX_BYTES:
            raise ValueError(f"{path}: {found.size} bytes are too many")
        data = self._chain(found.cluster, found.size + self._cluster_bytes)
        if len(data) < found.size:
            raise ValueError(f"{path}: clusters are missing")
        return data[: found.size]
