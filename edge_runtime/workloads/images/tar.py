"""A reader of tar streams that nobody has vouched for: ustar, GNU long names and PAX, every field checked, every loop and buffer limited. Pure but for the reading itself.

The standard library's reader takes a header's word for how much to keep in memory. This one knows what an image layer may hold, and refuses the rest.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
"""Bytes of a tar block."""

MAX_EXTENDED = 1 << 20
"""Bytes of one extended header: a path of 4096 bytes and some attributes need a hundredth."""

MAX_NAME = 4096
"""Bytes of a path or a link's target: PATH_MAX of Linux."""

MAX_ID = (1 << 32) - 2
"""Largest user or group id; the last one means `none` to the kernel."""

MAX_NUMBER = 1 << 50
"""Sizes and times below this: a petabyte, and seeking to it never overflows."""

MAX_EXTENDED_IN_ROW = 16
"""Extended headers before one member: real archives have up to three."""

FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, FOLDER, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
KINDS = frozenset((FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, FOLDER, FIFO))


class TarError(ValueError):
    """The archive is damaged, or not what this reads; `remedy` says what helps."""

    def __init__(self, problem: str, remedy: str = "make the archive again") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


@dataclass(frozen=True, slots=True)
class Member:
    """One member. `name` and `target` are bytes as they stand there (without a final slash); `offset` is where its data begins in the stream."""

    name: bytes
    kind: bytes
    size: int
    mode: int
    uid: int
    gid: int
    mtime: int
    target: bytes
    offset: int


class TarReader:
    """Members of a stream, one after the other; the data of the current one by `read`.

    Args:
        stream: gives bytes by `read(n)`, at most n, none at its end.
        most: members, with all extended headers.
    Errors: `TarError`; what `stream` raises.
    """

    def __init__(self, stream: BinaryIO, most: int) -> None:
        self._stream, self._most = stream, most
        self._offset = 0
        self._left = 0
        self._padding = 0
        self._seen = 0

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            yield member

    def read(self, most: int) -> bytes:
        """Up to `most` bytes of the current member's data; empty at its end."""
        if self._left == 0 or most <= 0:
            return b""
        data = self._exactly(min(most, self._left))
        self._left -= len(data)
        return data

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            data = self._stream.read(size)
            if not data:
                raise TarError("the archive ends in the middle of a member", "copy it again: it was cut off")
            parts.append(data)
            size -= len(data)
            self._offset += len(data)
        return b"".join(parts)

    def _skip(self) -> None:
        while self.read(1 << 16):
            pass
        self._exactly(self._padding)
        self._padding = 0

    def _begin(self, size: int) -> None:
        self._left, self._padding = size, -size % BLOCK

    def _next(self) -> Member | None:
        self._skip()
        changes: dict[str, bytes] = {}
        for _ in range(MAX_EXTENDED_IN_ROW):
            header = self._header()
            if header is None:
                if changes:
                    raise TarError("the archive ends after an extended header")
                return None
            self._seen += 1
            if self._seen > self._most:
                raise TarError(f"more than {self._most} members", "split the image into smaller layers, or raise the limit")
            kind = header[156:157]
            size = _number(header[124:136], "size")
            if kind in (b"L", b"K", b"x", b"g"):
                if size > MAX_EXTENDED:
                    raise TarError(f"an extended header of {size} bytes, over {MAX_EXTENDED}")
                self._begin(size)
                data = self._exactly(size)
                self._left = 0
                self._skip()
                if kind == b"x":
                    changes |= _pax(data)
                elif kind != b"g":  # what a global header says is told by every member again, or is a comment
                    changes["path" if kind == b"L" else "linkpath"] = data.split(b"\0", 1)[0]
                continue
            return self._member(header, kind, size, changes)
        raise TarError(f"more than {MAX_EXTENDED_IN_ROW} extended headers before one member")

    def _header(self) -> bytes | None:
        """The next block; None at the end: a block of zeros, or nothing more."""
        first = self._stream.read(BLOCK)
        if not first:
            return None
        self._offset += len(first)
        header = first + self._exactly(BLOCK - len(first))
        if header == bytes(BLOCK):
            return None
        if _number(header[148:156], "checksum") != 256 + sum(header[:148]) + sum(header[156:]):
            raise TarError("a header's checksum is wrong", "this is not a tar archive, or it is damaged")
        return header

    def _member(self, header: bytes, kind: bytes, size: int, changes: dict[str, bytes]) -> Member:
        if any(key.startswith("GNU.sparse") for key in changes) or kind == b"S":
            raise TarError("a sparse file", "build the image without sparse files (tar without --sparse)")
        if kind in (b"\0", b"7"):  # old, and contiguous: plain files
            kind = FILE
        if kind not in KINDS:
            raise TarError(f"a member of unknown kind {kind!r}")
        name, target = header[:100].split(b"\0", 1)[0], header[157:257].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0":
            prefix = header[345:500].split(b"\0", 1)[0]
            name = prefix + b"/" + name if prefix else name
        name, target = changes.get("path", name), changes.get("linkpath", target)
        if "size" in changes:
            size = _decimal(changes["size"], "size")
        if kind == FILE and name.endswith(b"/"):  # how a folder was written before there was a kind for it
            kind = FOLDER
        if kind != FILE:
            if size and kind != HARD_LINK:
                raise TarError(f"{name[:80]!r} has {size} bytes of data, which its kind cannot have")
            size = 0
        for text in (name, target):
            if len(text) > MAX_NAME or b"\0" in text:
                raise TarError(f"a name of {len(text)} bytes, over {MAX_NAME}, or with a zero byte in it")
        uid = _decimal(changes["uid"], "uid") if "uid" in changes else _number(header[108:116], "uid")
        gid = _decimal(changes["gid"], "gid") if "gid" in changes else _number(header[116:124], "gid")
        if uid > MAX_ID or gid > MAX_ID:
            raise TarError(f"{name[:80]!r} belongs to {uid}:{gid}, over {MAX_ID}")
        mtime = _seconds(changes["mtime"]) if "mtime" in changes else _number(header[136:148], "mtime")
        self._begin(size)
        return Member(name.rstrip(b"/") if name.strip(b"/") else b"", kind, size, _number(header[100:108], "mode") & 0o7777, uid, gid, min(mtime, (1 << 33)), target, self._offset)


def _number(field: bytes, what: str) -> int:
    """Octal, or base 256 where the first bit is set; negative ones (times before 1970) count as 0 where they may be."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes((field[0] & 0x7F,)) + field[1:], "big")
        if field[0] == 0xFF and what == "mtime":
            return 0
        if value >= MAX_NUMBER:
            raise TarError(f"a header's {what} is out of range")
        return value
    text = field.split(b"\0", 1)[0].strip(b" ")
    if not text:
        return 0
    if text.strip(b"01234567"):
        raise TarError(f"a header's {what} is not a number", "this is not a tar archive, or it is damaged")
    return int(text, 8)


def _decimal(text: bytes, what: str) -> int:
    if not text.isdigit() or len(text) > 19 or int(text) >= MAX_NUMBER:
        raise TarError(f"an extended header's {what} is not a number")
    return int(text)


def _seconds(text: bytes) -> int:
    whole = text.split(b".", 1)[0]
    return 0 if whole.startswith(b"-") else _decimal(whole or b"0", "mtime")


def _pax(data: bytes) -> dict[str, bytes]:
    """Records `LENGTH KEY=VALUE\\n`; extended attributes are left out (no attribute of an image is kept)."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 8)
        if space < 0 or not data[at:space].isdigit():
            raise TarError("an extended header is damaged")
        end = at + int(data[at:space])
        if end > len(data) or end < space + 3 or data[end - 1:end] != b"\n":
            raise TarError("an extended header is damaged")
        key, equals, value = data[space + 1:end - 1].partition(b"=")
        if not equals:
            raise TarError("an extended header is damaged")
        if not key.startswith((b"SCHILY.xattr.", b"LIBARCHIVE.xattr.")):
            found[key.decode("utf-8", "replace")] = value
        at = end
    return found
