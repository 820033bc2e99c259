"""A root file system as data: paths, modes and contents, without a file system. Pure.

Everything belongs to root and nothing is set-uid: who may write where is the business of the data partition. So an image can be made by any user, and the
same entries give the same bytes.
"""

import io
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

LINKS_MAX = 40
"""Symbolic links followed for one path; Linux follows as many (ELOOP)."""

FILE_MAX_BYTES = 512 << 20
"""Largest single file of a package; the largest we take in is a kernel module of a few MB, QEMU has firmware of 64 MiB."""


@dataclass(frozen=True, slots=True)
class Entry:
    """`kind` is dir, file or link; `data` is a file's content, `target` where a link points to, `mode` the permission bits."""

    kind: str
    mode: int = 0o755
    data: bytes = b""
    target: str = ""


class Tree:
    """Entries by absolute path (`/usr/bin/env`). Folders come into being with what is in them; symbolic links to folders (`/bin`) are followed."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {"/": Entry("dir")}

    def __contains__(self, path: str) -> bool:
        return self.resolve(path) in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, path: str) -> Entry:
        return self._entries[self.resolve(path)]

    def items(self) -> Iterator[tuple[str, Entry]]:
        """All entries, parents before children, in one order."""
        yield from sorted(self._entries.items())

    def items_for_reading(self, first: Sequence[str]) -> Iterator[tuple[str, Entry]]:
        """All entries, folders before all else, then the files `first` in that order, then the rest; each once."""
        early = dict.fromkeys(path for path in first if (entry := self._entries.get(path)) is not None and entry.kind == "file")
        yield from ((path, entry) for path, entry in self.items() if entry.kind == "dir")
        yield from ((path, self._entries[path]) for path in early)
        yield from ((path, entry) for path, entry in self.items() if entry.kind != "dir" and path not in early)

    def files(self, under: str = "/") -> Iterator[tuple[str, bytes]]:
        """Path and content of each file below a folder, in one order."""
        prefix = under.rstrip("/") + "/"
        for path, entry in self.items():
            if entry.kind == "file" and path.startswith(prefix):
                yield path, entry.data

    def resolve(self, path: str, last: bool = False) -> str:
        """The path with the links of its folders followed (and of its last part, where `last`); stays inside. Raises ValueError for a loop."""
        followed = 0
        done: list[str] = []
        rest = [part for part in path.split("/") if part not in ("", ".")][::-1]
        while rest:
            part = rest.pop()
            if part == "..":
                if done:
                    done.pop()
                continue
            here = "/" + "/".join([*done, part])
            entry = self._entries.get(here)
            if entry is not None and entry.kind == "link" and (rest or last):
                followed += 1
                if followed > LINKS_MAX:
                    raise ValueError(f"{path}: too many symbolic links")
                if entry.target.startswith("/"):
                    done = []
                rest.extend([part for part in entry.target.split("/") if part not in ("", ".")][::-1])
                continue
            done.append(part)
        return "/" + "/".join(done)

    def follow(self, path: str) -> Entry | None:
        """What the path leads to in the end; None where nothing is."""
        return self._entries.get(self.resolve(path, last=True))

    def put(self, path: str, entry: Entry) -> None:
        """Add or replace. A folder over a link to a folder leaves the link (packages name `/lib`, which is `/usr/lib`)."""
        path = self.resolve(path)
        if path == "/":
            return
        there = self._entries.get(path)
        if entry.kind == "dir" and there is not None and (there.kind == "dir" or (there.kind == "link" and (led := self.follow(path)) is not None and led.kind == "dir")):
            return
        if there is not None and there.kind == "dir" and entry.kind != "dir" and any(other.startswith(path + "/") for other in self._entries):
            raise ValueError(f"{path}: a folder that is not empty cannot become a {entry.kind}")
        parent = posixpath.dirname(path)
        if parent not in self._entries:
            self.put(parent, Entry("dir"))
        elif self._entries[parent].kind != "dir":
            raise ValueError(f"{path}: {parent} is no folder")
        self._entries[path] = entry

    def file(self, path: str, data: str | bytes, mode: int = 0o644) -> None:
        """A file; text is UTF-8."""
        self.put(path, Entry("file", mode, data.encode() if isinstance(data, str) else data))

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self.put(path, Entry("link", 0o777, target=target))

    def folder(self, path: str, mode: int = 0o755) -> None:
        """A folder."""
        self.put(path, Entry("dir", mode))

    def drop(self, gone: Callable[[str], bool]) -> None:
        """Take away the entries that `gone` names, and what is below them."""
        named = sorted(path for path in self._entries if path != "/" and gone(path))
        for path in named:
            for other in [other for other in self._entries if other == path or other.startswith(path + "/")]:
                del self._entries[other]


def take_tar(tree: Tree, stream: IO[bytes], unwanted: Callable[[str], bool]) -> None:
    """Put a package's files into the tree. Owners, times, set-uid bits, devices and pipes are left behind.

    Raises:
        ValueError: the archive is damaged, or a file is larger than FILE_MAX_BYTES.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                path = posixpath.normpath("/" + member.name)
                if unwanted(path):
                    continue
                mode = member.mode & 0o777
                if member.isdir():
                    tree.put(path, Entry("dir", mode))
                elif member.issym():
                    tree.put(path, Entry("link", 0o777, target=member.linkname))
                elif member.islnk():
                    led = tree.follow(posixpath.normpath("/" + member.linkname))
                    if led is None:
                        raise ValueError(f"{path}: its hard link leads nowhere")
                    tree.put(path, led)
                elif member.isfile():
                    if member.size > FILE_MAX_BYTES:
                        raise ValueError(f"{path}: {member.size} bytes are too many")
                    part = archive.extractfile(member)
                    assert part is not None
                    tree.put(path, Entry("file", mode, part.read()))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"the archive is damaged: {error}") from None


def as_tar(entries: Iterable[tuple[str, Entry]], time_s: int) -> Iterator[bytes]:
    """The tree as a tar archive in pieces, all of root's, each with the time `time_s` (seconds since 1970)."""
    for path, entry in entries:
        if path == "/":
            continue
        member = tarfile.TarInfo("." + path)
        member.mtime, member.mode = time_s, entry.mode
        if entry.kind == "dir":
            member.type = tarfile.DIRTYPE
        elif entry.kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, entry.target
        else:
            member.size = len(entry.data)
        yield member.tobuf(tarfile.GNU_FORMAT)
        if entry.kind == "file":
            yield entry.data
            yield bytes(-len(entry.data) % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def as_cpio(entries: Iterable[tuple[str, Entry]], time_s: int) -> bytes:
    """The tree as a cpio archive (newc, the form the kernel unpacks; Documentation/driver-api/early-userspace/buffer-format.rst)."""
    kinds = {"dir": 0o040000, "file": 0o100000, "link": 0o120000}
    out = io.BytesIO()

    def member(number: int, name: str, mode: int, data: bytes, links: int) -> None:
        named = name.encode() + b"\0"
        fields = (number, mode, 0, 0, links, time_s, len(data), 0, 0, 0, 0, len(named), 0)
        out.write(b"070701" + b"".join(b"%08X" % value for value in fields) + named)
        out.write(bytes(-out.tell() % 4))
        out.write(data)
        out.write(bytes(-out.tell() % 4))

    for number, (path, entry) in enumerate(entries, 1):
        if path != "/":
            member(number, path[1:], kinds[entry.kind] | entry.mode, entry.target.encode() if entry.kind == "link" else entry.data, 1)
    member(0, "TRAILER!!!", 0, b"", 1)
    return out.getvalue()
