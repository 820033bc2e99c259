"""Layers compressed with zstd, and archives compressed as a whole: read as what they are, bounded, refused with a remedy."""

import gzip
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.workloads.images import ImageError, ImageStore, Limits
from edge_runtime.workloads.images import store as stores
from edge_runtime.workloads.images.layer import MAX_ZSTD_WINDOW, Unzstd, opener, packed, unpack
from edge_runtime.workloads.images.tar import TarError

from .image_side import AS_ROOT, archive, docker_save, layer, layout, sha

zstandard = pytest.importorskip("zstandard", reason="no zstandard (pip install '.[zstd]')")

ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
DATA = layer([("file", "a", bytes(range(256)) * 40)])
Squeeze = Callable[[bytes], bytes]
SQUEEZES: dict[str, Squeeze] = {"gzip": lambda data: gzip.compress(data, mtime=0), "zstd": lambda data: zstandard.ZstdCompressor().compress(data)}


def frames(data: bytes, size: int) -> bytes:
    """Each piece a frame of its own, without saying its size, as a stream is written."""
    out = io.BytesIO()
    for at in range(0, len(data), size):
        one = zstandard.ZstdCompressor().compressobj()
        out.write(one.compress(data[at:at + size]) + one.flush())
    return out.getvalue()


@given(st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=3), st.integers(1, 5000))
def test_zstd_in_several_frames_is_one(parts: list[bytes], piece: int) -> None:
    stream = Unzstd(io.BytesIO(b"".join(frames(part, 1000) for part in parts)))
    assert b"".join(iter(lambda: stream.read(piece), b"")) == b"".join(parts)


@given(st.integers(0, len(frames(DATA, 1000)) - 1), st.integers(1, 255))
@example(8, 1)  # a block that says it is longer than what is left: damaged, it looks cut
def test_zstd_that_was_damaged_or_cut_never_becomes_something_else(at: int, flip: int) -> None:
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(DATA)
    at %= len(whole)
    for broken in (whole[:at], whole[:at] + bytes((whole[at] ^ flip,)) + whole[at + 1:]):
        try:
            read = b"".join(iter(Unzstd(io.BytesIO(broken)).read, b""))
        except TarError:
            continue
        assert DATA.startswith(read)  # a cut, or what looks like one, gives less, never something else: the layer's hash tells


def test_a_zstd_bomb_is_stopped_by_what_it_becomes_and_by_its_window(tmp_path: Path) -> None:
    data = layer([("file", "zeros", bytes(5_000_000))])
    with pytest.raises(ImageError, match="more than 1000000 bytes"):
        unpack(opener(ZSTD, io.BytesIO(frames(data, 5_000_000))), tmp_path, sha(data), Limits(layer_bytes=1_000_000, keep_free=0), own=False)
    assert (tmp_path / "zeros").stat().st_size <= 1_000_000
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)).compressobj()
    stream = Unzstd(io.BytesIO(wide.compress(bytes(1000)) + wide.flush()))
    with pytest.raises(TarError, match=str(MAX_ZSTD_WINDOW)):
        stream.read()


def test_without_the_package_a_zstd_layer_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImageError, match=r"novacron\[zstd\]"):
        opener(ZSTD, io.BytesIO())


def test_an_image_with_a_zstd_layer_is_taken_from_a_layout_and_from_docker_save(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store", limits=Limits(keep_free=0), own=AS_ROOT)
    source = layout(tmp_path / "in", [DATA], packed=False)
    index = (source / "index.json").read_text()
    from .test_image_store import _changed

    squeezed = SQUEEZES["zstd"](DATA)
    (source / "blobs/sha256" / sha(squeezed)).write_bytes(squeezed)
    assert index and _changed(source, lambda manifest: manifest["layers"].__setitem__(0, {"mediaType": ZSTD, "digest": f"sha256:{sha(squeezed)}", "size": len(squeezed)}))
    image = store.add(source)
    assert (store.lower(image)[0] / "a").read_bytes() == bytes(range(256)) * 40
    store.close()


@pytest.mark.parametrize("how", SQUEEZES)
def test_a_whole_archive_may_be_compressed(how: str, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store", limits=Limits(keep_free=0), own=AS_ROOT)
    for name, plain in (("oci", archive(layout(tmp_path / "in", [DATA]), tmp_path / "in.tar")), ("docker", docker_save(tmp_path / "save.tar", [DATA]))):
        squeezed = tmp_path / f"{name}.{how}"
        squeezed.write_bytes(SQUEEZES[how](plain.read_bytes()))
        assert packed(squeezed.read_bytes()[:4]) == how
        assert store.add(squeezed).names == ("app:1",)
        assert list((store.directory / "new").iterdir()) == []
    store.close()


@pytest.mark.parametrize("how", SQUEEZES)
def test_an_archive_that_becomes_too_much_or_was_cut_is_refused_and_leaves_nothing(how: str, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb"
    bomb.write_bytes(SQUEEZES[how](bytes(3_000_000)))
    cut = tmp_path / "cut"
    cut.write_bytes(SQUEEZES[how](archive(layout(tmp_path / "in", [DATA]), tmp_path / "in.tar").read_bytes())[:-100])
    store = ImageStore(tmp_path / "store", limits=Limits(image_bytes=1_000_000, keep_free=0), own=AS_ROOT)
    for path, says in ((bomb, "archive: more than 1000000 bytes"), (cut, "ends|missing|damaged")):
        with pytest.raises(ImageError, match=says):
            store.add(path)
        assert list((store.directory / "new").iterdir()) == [] and store.images() == []
    store.close()


def test_a_compressed_archive_is_unpacked_once_for_a_name_that_it_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, count = tmp_path / "archives", []
    folder.mkdir()
    (folder / "one.tar.gz").write_bytes(SQUEEZES["gzip"](archive(layout(tmp_path / "in", [DATA]), tmp_path / "in.tar").read_bytes()))
    store = ImageStore(tmp_path / "store", limits=Limits(keep_free=0), own=AS_ROOT)
    real = stores.inflate
    monkeypatch.setattr(stores, "inflate", lambda *args: (count.append(1), real(*args)))
    for _ in range(2):
        with pytest.raises(ImageError, match="not on this node"):
            store.find_or_take("other:1", folder)
    assert len(count) == 1
    assert store.find_or_take("app:1", folder).names == ("app:1",)
    store.close()
