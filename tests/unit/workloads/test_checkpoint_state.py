"""A container's state on the disk: what is written is read back, and what differs anywhere is refused before anything of it is used."""

import io
import os
import shutil
import stat
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.workloads.drivers import checkpoint_state as state
from edge_runtime.workloads.drivers import criu
from edge_runtime.workloads.drivers.container_checkpoint import user_namespace
from edge_runtime.workloads.drivers.face import Capabilities, Refused
from edge_runtime.workloads.drivers.outside import short_of_root
from edge_runtime.workloads.drivers.overlay_layer import pack_disk
from edge_runtime.workloads.images import Limits
from edge_runtime.workloads.images.layer import unpack

HERE = Capabilities("container", "container", "runc 1.1.5", "x86_64", ("avx", "avx2", "sse2"), "hybrid", "6.18.44", {})
DOCUMENT: dict[str, Any] = {
    "kind": "container", "host": {"arch": "x86_64", "kernel": "6.18.44", "cpu_flags": ["avx", "sse2"], "cgroup": "hybrid", "criu": "4.2.1"}, "order": {"id": "a"}, "config": {}, "image": "0", "layers": [], "base": -1,
    "processes": [{"pid": 1, "name": "é\ud800"}],
}
BLOBS = st.binary(max_size=3000) | st.integers(0, 300_000).map(bytes) | st.integers(1, 4000).map(lambda n: os.urandom(16) * n)


def written(folder: Path, blobs: list[bytes], how: str = "zlib") -> dict[str, Any]:
    (folder / state.IMAGES).mkdir(parents=True)
    files = [state.add(folder, state.DISK if not at else f"{state.IMAGES}/f-{at}.img", io.BytesIO(blob), how) for at, blob in enumerate(blobs)]
    return state.seal(folder, DOCUMENT, files, how)


def content(folder: Path, manifest: dict[str, Any], name: str, piece: int) -> bytes:
    entry = next(one for one in manifest["files"] if one["name"] == name)
    with state.Reader(folder, entry, manifest["codec"]) as source:
        found = b""
        while data := source.read(piece):
            assert len(data) <= piece
            found += data
        return found


def codecs() -> list[str]:
    return ["zlib", "zstd"] if state.codec() == "zstd" else ["zlib"]


@settings(max_examples=25, deadline=None)
@given(st.lists(BLOBS, min_size=1, max_size=4), st.sampled_from(codecs()), st.integers(1, 70_000))
def test_what_is_written_is_read_back(blobs: list[bytes], how: str, piece: int) -> None:
    with tempfile.TemporaryDirectory() as top:
        manifest = written(Path(top, "s"), blobs, how)
        assert state.check(Path(top, "s")) == manifest
        for at, blob in enumerate(blobs):
            assert content(Path(top, "s"), manifest, state.DISK if not at else f"{state.IMAGES}/f-{at}.img", max(piece, len(blob) // 50)) == blob


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(codecs()))
def test_a_bit_that_differs_anywhere_is_found(data: st.DataObject, how: str) -> None:
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top, "s")
        written(folder, [b"disk" * 100, b"image" * 50], how)
        path = data.draw(st.sampled_from([folder / state.MANIFEST, folder / state.DISK, folder / state.IMAGES / "f-1.img"]))
        there = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(there) * 8 - 1))
        there[at // 8] ^= 1 << at % 8
        path.write_bytes(there)
        with pytest.raises(Refused):
            state.check(folder)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200) | st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda one: st.lists(one) | st.dictionaries(st.text(), one)).map(state.canonical))
def test_what_is_no_manifest_is_refused_and_crashes_nothing(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as top:
        Path(top, state.MANIFEST).write_bytes(data)
        with pytest.raises(Refused):
            state.read_manifest(Path(top))


def sealed_anew(folder: Path, **changed: Any) -> None:
    """A manifest that is whole by its own hash, and says something else: what somebody could write on purpose."""
    manifest = state.read_manifest(folder)
    (folder / state.MANIFEST).unlink()
    told = {key: value for key, value in manifest.items() if key != "root"} | changed
    import hashlib

    (folder / state.MANIFEST).write_bytes(state.canonical({**told, "root": hashlib.sha256(state.canonical(told)).hexdigest()}))


def test_files_that_are_missing_too_many_linked_or_lied_about_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    manifest = written(whole, [b"disk" * 100, bytes(5_000_000)])

    def refused(word: str, change: Any) -> None:
        folder = tmp_path / "bad"
        shutil.copytree(whole, folder)
        change(folder)
        with pytest.raises(Refused, match=word):
            told = state.check(folder)
            content(folder, told, "images/f-1.img", 100_000)
        shutil.rmtree(folder)

    image = f"{state.IMAGES}/f-1.img"
    refused("missing", lambda folder: (folder / image).unlink())
    refused("not in the manifest", lambda folder: (folder / state.IMAGES / "more").touch())
    refused("read", lambda folder: ((folder / image).rename(tmp_path / "elsewhere"), (folder / image).symlink_to(tmp_path / "elsewhere")))
    refused("cut|bytes of", lambda folder: os.truncate(folder / image, 10))
    refused("list of files", lambda folder: sealed_anew(folder, files=[{**one, "name": one["name"].replace("f-1", "../../f")} for one in manifest["files"]]))
    refused("list of files", lambda folder: sealed_anew(folder, files=[{**one, "size": -1} for one in manifest["files"]]))
    refused("lacks", lambda folder: sealed_anew(folder, layers="all"))
    refused("version 2", lambda folder: sealed_anew(folder, version=2))
    for size, word in ((100, "longer"), (6_000_000, "shorter")):  # a few bytes can be a great many when they are decompressed
        refused(word, lambda folder, size=size: sealed_anew(folder, files=[{**one, "size": size} if one["name"] == image else one for one in manifest["files"]]))
    assert content(whole, state.check(whole), image, 100_000) == bytes(5_000_000)  # the control


def test_another_host_is_refused_with_what_stands_against_it() -> None:
    from dataclasses import replace

    state.suits(DOCUMENT, HERE, "4.2.1")
    for here, version, field, word in (
        (replace(HERE, arch="aarch64"), "4.2.1", "host.arch", "aarch64"), (replace(HERE, cpu_flags=("sse2",)), "4.2.1", "host.cpu_flags", "lacks: avx"), (replace(HERE, kernel="6.1.0"), "4.2.1", "host.kernel", "6.1.0"),
        (replace(HERE, cgroup="v2"), "4.2.1", "host.cgroup", "v2"), (HERE, "4.2", "host.criu", "4.2"),
    ):
        with pytest.raises(Refused) as caught:
            state.suits(DOCUMENT, here, version)
        assert caught.value.field == field and word in caught.value.problem and caught.value.remedy
    state.suits(DOCUMENT, replace(HERE, kernel="6.1.0"), "4.10", other_kernel=True)


@pytest.mark.skipif(bool(short_of_root()), reason="whiteouts and owners need a machine's root")
@pytest.mark.parametrize("base", [0, 0x7000_0000])
def test_the_changed_root_goes_through_a_layer_unchanged(tmp_path: Path, base: int) -> None:
    upper = tmp_path / "upper"
    (upper / "folder/below").mkdir(parents=True)
    (upper / "folder/below/file").write_bytes(os.urandom(70_000))
    os.chown(upper / "folder/below/file", base + 1000, base + 1001)
    (upper / "folder/below/file").chmod(0o640)
    os.link(upper / "folder/below/file", upper / "second")
    (upper / "link").symlink_to("/etc/passwd")
    os.mkfifo(upper / "fifo")
    os.mknod(upper / "gone", stat.S_IFCHR, os.makedev(0, 0))
    os.setxattr(upper / "folder", b"trusted.overlay.opaque", b"y")
    for path in (upper, *upper.rglob("*")):
        told = os.lstat(path)
        if told.st_uid < base:
            os.lchown(path, base, base)
    stream = io.BytesIO()
    pack_disk(upper, stream, base)
    stream.seek(0)
    other = tmp_path / "other"
    other.mkdir()
    unpack(stream, other, None, Limits(keep_free=0))

    def seen(top: Path, less: int) -> dict[str, Any]:
        found = {}
        for path in top.rglob("*"):
            told = os.lstat(path)
            data = path.read_bytes() if stat.S_ISREG(told.st_mode) else os.readlink(path) if stat.S_ISLNK(told.st_mode) else b""
            marked = os.getxattr(path, "trusted.overlay.opaque") if stat.S_ISDIR(told.st_mode) and "trusted.overlay.opaque" in os.listxattr(path) else b""
            mode = told.st_mode if not stat.S_ISCHR(told.st_mode) else stat.S_IFCHR
            found[str(path.relative_to(top))] = (mode, told.st_uid - less, told.st_gid - less, told.st_rdev, told.st_nlink if not stat.S_ISDIR(told.st_mode) else 0, data, marked)
        return found

    assert seen(upper, base) == seen(other, 0)


def test_what_a_layer_cannot_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".wh.odd").touch()
    with pytest.raises(Refused, match="has a name that means something else"):
        pack_disk(tmp_path, io.BytesIO(), 0)


@given(st.integers(0, 2**32 - 65537))
def test_the_image_of_a_user_namespace_is_written_as_criu_reads_it(base: int) -> None:
    image = user_namespace(b"\x56\x16\x96\x54magi" + b"what was", base)
    assert image[:8] == b"\x56\x16\x96\x54magi" and struct.unpack_from("<I", image, 8)[0] == len(image) - 12

    def numbers(data: bytes) -> list[tuple[int, Any]]:
        found, at = [], 0
        while at < len(data):
            key, at = data[at], at + 1
            value = shift = 0
            while True:
                byte, at = data[at], at + 1
                value |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            if key & 7 == 2:
                found.append((key >> 3, numbers(data[at:at + value])))
                at += value
            else:
                found.append((key >> 3, value))
        return found

    assert numbers(image[12:]) == [(kind, [(1, 0), (2, base), (3, 65536)]) for kind in (1, 2)]


LOG = """(00.040258) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
(00.05) Dumping task (pid: 77 comm: python3)
(00.06) {}
(00.07) Error (criu/cr-dump.c:1679): Dump files (pid: 77) failed with -1
(00.08) Error (criu/cr-dump.c:2111): Dumping FAILED.
"""


@pytest.mark.parametrize(("line", "field", "word"), [
    ("Error (criu/sk-unix.c:1): unix: Dangling connection 3644450", "unix socket", "outside"),
    ("Error (criu/sk-unix.c:1): unix: External socket is used. Consider using --ext-unix-sk option.", "unix socket", "outside"),
    ("Error (criu/sk-inet.c:1): Unsupported proto 262 for socket", "socket", "262"),
    ("Error (criu/files.c:1): Can't lookup mount=97 for fd=3 path=/q", "descriptor", "descriptor 3 (/q)"),
    ("Error (criu/files.c:1): Can't dump file 5 of that type [600] (unknown /anon_inode:[io_uring])", "descriptor", "io_uring"),
    ("Error (criu/files-reg.c:1): Can't dump ghost file /tmp/x of 999999999 size, increase limit", "deleted file", "999999999"),
    ("Error (criu/sk-inet.c:1): inet: In-flight connection (l) for 3", "tcp", "set up"),
    ("Error (criu/tty.c:1): tty: Found dangling tty with sid 1 pgid 1 (pts) on peer fd 0.", "terminal", "terminal"),
])
def test_what_criu_says_is_told_in_our_words(line: str, field: str, word: str) -> None:
    found = criu.offence(LOG.format(line), {77: "5, python3"})
    assert found is not None and found.field == f"resource.{field}" and word in found.problem and "(process 5, python3)" in found.problem
    assert criu.offence(LOG.format("Error (criu/x.c:1): something else"), {}) is None and criu.errors(LOG.format(line))[0] == line.partition("): ")[2]
