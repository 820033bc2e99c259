"""The tar reader: against the standard library's on what that writes, against damage, and what it refuses."""

import io
import tarfile
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.workloads.images import tar
from edge_runtime.workloads.images.tar import Member, TarError, TarReader

from .image_side import layer

NAME = st.text(st.characters(blacklist_characters="\0/", blacklist_categories=("Cs",)), min_size=1, max_size=70)
PATH = st.lists(NAME, min_size=1, max_size=6).map("/".join)
ENTRIES = st.lists(
    st.one_of(st.tuples(st.just("file"), PATH, st.binary(max_size=1500)), st.tuples(st.sampled_from(("folder", "fifo")), PATH, st.just(b"")), st.tuples(st.sampled_from(("symlink", "hard")), PATH, PATH.map(str.encode))),
    max_size=8,
)


def read(data: bytes, most: int = 1000) -> list[tuple[Member, bytes]]:
    reader = TarReader(io.BytesIO(data), most)
    return [(member, b"".join(iter(lambda: reader.read(97), b""))) for member in reader]


@given(ENTRIES, st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)), st.integers(0, 1 << 30), st.integers(0, 0o7777))
def test_it_reads_what_the_standard_library_writes(entries: Any, form: int, uid: int, mode: int) -> None:
    data = layer(entries, form=form, uid=uid, mode=mode)
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as theirs:
        wanted = [(one.name.rstrip("/").encode("utf-8", "surrogateescape"), one.type, one.size, one.mode, one.uid, one.mtime, one.linkname.encode("utf-8", "surrogateescape")) for one in theirs]
        contents = [handle.read() if one.isreg() and (handle := theirs.extractfile(one)) else b"" for one in theirs]
    ours = read(data)
    assert [(one.name, one.kind, one.size, one.mode, one.uid, one.mtime, one.target) for one, _ in ours] == wanted
    assert [content for _, content in ours] == contents


class Watched(io.BytesIO):
    """Remembers the most that was asked of it at once."""

    most = 0

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None and size >= 0
        self.most = max(self.most, size)
        return super().read(size)


@given(ENTRIES, st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=40)), max_size=4), st.integers(0, 1 << 20), st.booleans())
def test_damage_is_an_error_of_its_own_and_never_takes_much_memory(entries: Any, patches: list[tuple[int, bytes]], cut: int, mend: bool) -> None:
    data = bytearray(layer(entries))
    for at, patch in patches:
        at %= len(data)
        data[at:at + len(patch)] = patch
        block = at // 512 * 512
        if mend and len(data) >= block + 512:  # a header that was changed on purpose has a good checksum
            data[block + 148:block + 156] = b" " * 8
            data[block + 148:block + 156] = b"%06o\0 " % sum(data[block:block + 512])
    stream = Watched(bytes(data[:len(data) - cut % len(data)]))
    reader = TarReader(stream, 100)
    try:
        for member in reader:
            assert len(member.name) <= tar.MAX_NAME and member.size < tar.MAX_NUMBER and member.uid <= tar.MAX_ID
            while reader.read(1000):
                pass
    except TarError:
        pass
    assert stream.most <= tar.MAX_EXTENDED


@given(st.binary(max_size=3000))
def test_anything_else_is_an_error_too(data: bytes) -> None:
    try:
        read(data)
    except TarError:
        pass


def _with(**fields: bytes) -> bytes:
    """One member with fields of its header replaced, and a good checksum."""
    where = {"name": 0, "size": 124, "kind": 156, "mtime": 136, "uid": 108}
    data = bytearray(layer([("file", "a", b"x")], form=tarfile.USTAR_FORMAT))
    for key, value in fields.items():
        data[where[key]:where[key] + len(value)] = value
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


@pytest.mark.parametrize(("data", "says"), [
    (_with(kind=b"S"), "sparse"), (_with(kind=b"Q"), "unknown kind"), (_with(size=b"\x80" + b"\xff" * 11), "size is out of range"), (_with(size=b"99999999999\0"), "size is not a number"),
    (_with(size=b"77777777777\0"), "ends in the middle"), (_with(kind=b"x", size=b"77777777777\0"), "extended header of"), (_with(kind=b"x"), "extended header is damaged"),
    (_with(kind=b"5"), "data, which its kind cannot have"), (b"x" * 512, "checksum"), (_with()[:700], "ends in the middle"), (_with(uid=b"\x80\0\0\xff\xff\xff\xff\xff"), "belongs to"),
])
def test_what_is_refused_says_why(data: bytes, says: str) -> None:
    with pytest.raises(TarError, match=says):
        read(data)


def test_members_and_headers_in_a_row_are_limited() -> None:
    with pytest.raises(TarError, match="more than 5 members"):
        read(layer([("folder", f"d{at}", b"") for at in range(6)], form=tarfile.USTAR_FORMAT), most=5)
    long = layer([("file", "n" * 200, b"")], form=tarfile.GNU_FORMAT)[:1024]
    with pytest.raises(TarError, match="extended headers before one member"):
        read(long * 40)


def test_a_time_before_1970_counts_as_the_beginning() -> None:
    assert read(_with(mtime=b"\xff" * 12))[0][0].mtime == 0


@pytest.mark.parametrize("bug", [lambda size: 0, lambda size: size + 1])
def test_control_a_reader_that_miscounts_is_caught(bug: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
    begin = TarReader._begin
    monkeypatch.setattr(TarReader, "_begin", lambda self, size: begin(self, bug(size)))
    with pytest.raises((AssertionError, TarError)):
        test_it_reads_what_the_standard_library_writes.hypothesis.inner_test([("file", "a", b"x" * 600), ("file", "b", b"y")], tarfile.PAX_FORMAT, 0, 0o644)  # type: ignore[attr-defined]
