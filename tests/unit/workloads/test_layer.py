"""Layers from people one does not know: nothing outside the folder is touched, whatever is in them; and what overlayfs shows of them is what OCI says."""

import ctypes
import gzip
import io
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edge_runtime.workloads.images import layer as layers
from edge_runtime.workloads.images.errors import ImageError
from edge_runtime.workloads.images.layer import Inflate, Limits, unpack

from .image_side import AS_ROOT, Entry, layer, sha, tree

LIMITS = Limits(keep_free=0)
needs_root = pytest.mark.skipif(not AS_ROOT, reason="whiteouts, owners and mounts need root")


def unpacked(folder: Path, entries: Sequence[Entry], limits: Limits = LIMITS, **more: Any) -> Path:
    folder.mkdir()
    data = layer(entries, **more)
    unpack(io.BytesIO(data), folder, sha(data), limits, own=AS_ROOT)
    return folder


NASTY = st.lists(st.sampled_from(("a", "b", "out", "..", ".", "", "/", ".wh.a", ".wh.b", ".wh..wh..opq", ".wh...", ".wh.", ".wh..", "dir")), min_size=1, max_size=4).map("/".join)
TARGET = st.one_of(NASTY, st.just("@outside"), st.just("@outside/secret"), st.sampled_from(("/etc", "../../outside", "a", "dir")))
HOSTILE = st.lists(
    st.one_of(
        st.tuples(st.just("file"), NASTY, st.binary(max_size=30)), st.tuples(st.sampled_from(("folder", "fifo", "char")), NASTY, st.just(b"")), st.tuples(st.sampled_from(("symlink", "hard")), NASTY, TARGET.map(str.encode)),
    ),
    max_size=10,
)


def try_hostile(entries: Sequence[Entry]) -> None:
    """Unpack beside a folder with a secret; whether or not it is refused, the secret and all around it are as they were, and nothing in the layer is linked to it."""
    with tempfile.TemporaryDirectory() as top:
        root, outside = Path(top, "x/layer"), Path(top, "outside")
        outside.mkdir()
        (outside / "secret").write_bytes(b"secret")
        root.mkdir(parents=True)
        around = {path: told for path, told in tree(Path(top)).items() if not path.startswith("x/layer/")}
        entries = [(kind, name, content.replace(b"@outside", str(outside).encode())) for kind, name, content in entries]
        data = layer(entries)
        try:
            unpack(io.BytesIO(data), root, sha(data), LIMITS, own=AS_ROOT)
        except ImageError:
            pass
        assert {path: told for path, told in tree(Path(top)).items() if not path.startswith("x/layer/")} == around
        assert os.stat(outside / "secret").st_nlink == 1
        for where, folders, names in os.walk(root):
            for name in folders + names:
                told = os.lstat(os.path.join(where, name))
                assert not told.st_mode & (stat.S_ISUID | (0 if stat.S_ISDIR(told.st_mode) else stat.S_ISGID))
                assert not stat.S_ISBLK(told.st_mode) and (not stat.S_ISCHR(told.st_mode) or told.st_rdev == 0)


ESCAPES: tuple[list[Entry], ...] = (
    [("symlink", "a", b"@outside"), ("file", "a/planted", b"x")], [("file", "../../outside/planted", b"x")], [("symlink", "a", b"@outside/secret"), ("file", "a", b"x")],
    [("hard", "a", b"../../outside/secret")], [("symlink", "d", b"@outside"), ("hard", "a", b"d/secret")], [("symlink", "a", b"@outside"), ("folder", "a", b"")],
    [("symlink", "a", b"@outside"), ("file", "a/.wh.secret", b"")], [("symlink", "a", b"@outside"), ("file", "a/.wh..wh..opq", b"")],
)


@given(HOSTILE)
@settings(max_examples=100)
@example(ESCAPES[0])
@example(ESCAPES[1])
@example(ESCAPES[2])
@example(ESCAPES[3])
@example(ESCAPES[4])
@example(ESCAPES[5])
@example(ESCAPES[6])
@example(ESCAPES[7])
def test_nothing_outside_is_touched(entries: list[Entry]) -> None:
    try_hostile(entries)


def test_control_following_links_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_FOLDER", os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(AssertionError):
        try_hostile(ESCAPES[0])
    with pytest.raises(AssertionError):
        try_hostile(ESCAPES[4])


def test_control_taking_dots_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_parts", lambda name: tuple(part for part in name.split(b"/") if part not in (b"", b".")))
    with pytest.raises(AssertionError):
        try_hostile(ESCAPES[1])
    with pytest.raises(AssertionError):
        try_hostile(ESCAPES[3])


@pytest.mark.parametrize(("entries", "says"), [
    ([("file", "a/../../b", b"")], "leads out"), ([("file", "a", b""), ("file", "a/b", b"")], "is no folder"), ([("symlink", "a", b"/b"), ("file", "a/b", b"")], "is no folder"), ([("hard", "a", b"b")], "no file of this layer"),
    ([("folder", "b", b""), ("hard", "a", b"b")], "no file of this layer"), ([("file", "/".join("d" * 130), b"")], "folders deep"), ([("file", "n" * 256, b"")], "255 bytes"), ([("file", ".wh...", b"")], "no name"),
])
def test_what_is_refused_says_why(tmp_path: Path, entries: list[Entry], says: str) -> None:
    with pytest.raises(ImageError, match=says):
        unpacked(tmp_path / "l", entries)


def test_bombs_are_stopped(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="more than 10 members"):
        unpacked(tmp_path / "a", [("folder", f"d{at}", b"") for at in range(11)], Limits(entries=10, keep_free=0))
    data = layer([("file", "zeros", bytes(5_000_000))])
    (tmp_path / "b").mkdir()
    packed = io.BytesIO(gzip.compress(data))
    with pytest.raises(ImageError, match="more than 1000000 bytes"):
        unpack(Inflate(packed), tmp_path / "b", sha(data), Limits(layer_bytes=1_000_000, keep_free=0), own=False)
    assert (tmp_path / "b/zeros").stat().st_size <= 1_000_000
    with pytest.raises(ImageError, match="would stay free"):
        unpacked(tmp_path / "c", [("file", "a", b"x")], Limits(keep_free=1 << 60))


def test_a_layer_is_what_its_config_says_it_is(tmp_path: Path) -> None:
    data = layer([("file", "a", b"x")])
    with pytest.raises(ImageError, match="the image's config says"):
        unpack(io.BytesIO(data), tmp_path, sha(data + b"\0"), LIMITS, own=AS_ROOT)


@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=3), st.integers(1, 5000))
def test_gzip_in_several_streams_is_one(parts: list[bytes], piece: int) -> None:
    stream = Inflate(io.BytesIO(b"".join(gzip.compress(part) for part in parts)))
    assert b"".join(iter(lambda: stream.read(piece), b"")) == b"".join(parts)


def test_gzip_that_was_cut_or_damaged_is_an_error() -> None:
    data = layer([("file", "a", os.urandom(5000))])
    packed = gzip.compress(data)
    for broken in (packed[:-1], packed[:2000], packed[:2000] + b"x" + packed[2001:], b"\x1f\x8b" + bytes(50)):
        with tempfile.TemporaryDirectory() as folder, pytest.raises(ImageError, match="gzip stream|checksum"):  # what was changed may also be read as a header
            unpack(Inflate(io.BytesIO(broken)), Path(folder), sha(data), LIMITS, own=False)


def test_names_that_are_not_utf8_owners_bits_and_times_are_kept(tmp_path: Path) -> None:
    folder = unpacked(tmp_path / "l", [("file", "d/caf\udce9", b"x"), ("hard", "h", b"d/caf\xe9"), ("symlink", "s", b"/etc/passwd"), ("fifo", "f", b""), ("char", "null", b"")], mode=0o6755, uid=1234, form=1)
    told = os.lstat(os.fsencode(folder) + b"/d/caf\xe9")
    assert stat.S_IMODE(told.st_mode) == 0o755 and told.st_mtime == 1_700_000_000 and told.st_nlink == 2
    assert not AS_ROOT or told.st_uid == 1234
    assert os.readlink(folder / "s") == "/etc/passwd" and stat.S_ISFIFO(os.lstat(folder / "f").st_mode) and not (folder / "null").exists()


# -- what overlayfs shows ------------------------------------------------------------------------------------------------------


def shown(stack: Sequence[Sequence[Entry]]) -> dict[str, tuple[str, Any]]:
    """What OCI says of layers of files, folders and whiteouts, worked out plainly: whiteouts first, then what the layer brings."""
    view: dict[str, tuple[str, Any]] = {}

    def gone(path: str) -> None:
        for key in [key for key in view if key == path or key.startswith(path + "/")]:
            del view[key]

    for entries in stack:
        for kind, path, _ in entries:
            parent, _, name = path.rpartition("/")
            if kind == "file" and name == ".wh..wh..opq":
                for key in [key for key in view if key.startswith(parent + "/") or not parent]:
                    del view[key]
            elif kind == "file" and name.startswith(".wh."):
                gone(f"{parent}/{name[4:]}".strip("/"))
        for kind, path, content in entries:
            parent, _, name = path.rpartition("/")
            parts = (parent if name.startswith(".wh.") else path).split("/")
            for depth in range(1, len(parts) + 1):
                above = "/".join(parts[:depth])
                if above and (depth < len(parts) or kind == "folder" or name.startswith(".wh.")):
                    if view.get(above, ("folder",))[0] != "folder":
                        gone(above)
                    view[above] = ("folder", None)
            if kind == "file" and not name.startswith(".wh."):
                gone(path)
                view[path] = ("file", content)
    return view


PLAIN = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)


def _whole(entries: list[Entry]) -> bool:
    """No path goes through a file of its own layer, and none is a file and a folder at once."""
    files = {path for kind, path, _ in entries if kind == "file" and ".wh." not in path}
    folders = {path for kind, path, _ in entries if kind == "folder"} | {path[:at] for _, path, _ in entries for at, mark in enumerate(path) if mark == "/"}
    return not files & folders


LAYER = st.lists(
    st.one_of(
        st.tuples(st.just("file"), PLAIN, st.binary(max_size=4)), st.tuples(st.just("folder"), PLAIN, st.just(b"")),
        st.tuples(st.just("file"), PLAIN.map(lambda path: "/".join((*path.split("/")[:-1], ".wh." + path.split("/")[-1]))), st.just(b"")),
        st.tuples(st.just("file"), PLAIN.map(lambda path: path + "/.wh..wh..opq"), st.just(b"")),
    ), min_size=1, max_size=6,
).filter(_whole)


def mounted(stack: Sequence[Sequence[Entry]]) -> dict[str, tuple[str, Any]]:
    """The tree that overlayfs shows."""
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.TemporaryDirectory() as top:
        lower = [unpacked(Path(top, f"l{at}"), entries) for at, entries in enumerate(stack)]
        Path(top, "empty").mkdir()
        merged = Path(top, "merged")
        merged.mkdir()
        options = "lowerdir=" + ":".join(str(one) for one in (*reversed(lower), Path(top, "empty")))
        if libc.mount(b"overlay", bytes(merged), b"overlay", 1, options.encode()) != 0:
            pytest.skip(f"overlayfs cannot be mounted here ({os.strerror(ctypes.get_errno())})")
        try:
            return tree(merged)
        finally:
            libc.umount2(bytes(merged), 2)


STACK = st.lists(LAYER, min_size=1, max_size=3)


@needs_root
@given(STACK)
@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@example([[("file", "a/b", b"1")], [("file", ".wh.a", b""), ("file", "a/c", b"2")]])
@example([[("file", "a/b", b"1")], [("file", "a/c", b"2"), ("file", ".wh.a", b"")]])
@example([[("file", "a/b", b"1")], [("file", ".wh.a", b""), ("folder", "a", b"")]])
@example([[("file", "a/b", b"1"), ("file", "a/c", b"1")], [("file", "a/.wh..wh..opq", b""), ("file", "a/c", b"2")]])
def test_overlayfs_shows_what_oci_says(stack: list[list[Entry]]) -> None:
    assert mounted(stack) == shown(stack)


@needs_root
def test_control_a_forgotten_opaque_mark_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers._Tree, "_opaque", lambda self, descriptor: None)
    stack: list[list[Entry]] = [[("file", "a/b", b"1")], [("file", "a/.wh..wh..opq", b"")]]
    assert mounted(stack) != shown(stack)
