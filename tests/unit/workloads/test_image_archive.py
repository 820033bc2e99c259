"""What is written as an image is read as that image: by our reader, and by the standard library's, which shares no code with it."""

import gzip
import io
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from edge_runtime.workloads.images import Config, ImageError, ImageStore, Limits
from edge_runtime.workloads.images.archive import ArchiveWriter, _header
from edge_runtime.workloads.images.manifest import Platform
from edge_runtime.workloads.images.source import opened, plan
from edge_runtime.workloads.images.tar import TarReader

from .image_side import layer, tree

HERE = Platform.here()
CONFIG = Config(("-l",), ("/bin/ls",), ("A=b", "EMPTY="), "/srv", "1000:50", "SIGINT", ())


def written(path: Path, layers: list[bytes], piece: int = 1000) -> str:
    """The digest of an image of these."""
    with open(path, "wb") as handle:
        writer = ArchiveWriter(handle)
        for one in layers:
            with writer.layer() as target:
                for at in range(0, len(one), piece):
                    target.write(one[at:at + piece])
        return writer.finish(CONFIG, HERE, "snapshots/web:a")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=some.lists(some.binary(max_size=5000), min_size=1, max_size=4), piece=some.integers(1, 20_000))
def test_every_reader_finds_what_was_written(tmp_path: Path, contents: list[bytes], piece: int) -> None:
    layers = [layer([("file", f"srv/{at % 2}", content)]) for at, content in enumerate(contents)]
    digest = written(tmp_path / "one.tar", layers, piece)
    found = plan(opened(tmp_path / "one.tar"), "snapshots/web:a", HERE, Limits(), strict=True)
    assert found.digest == digest and found.names == ("snapshots/web:a",)
    assert [one.diff_id for one in found.layers] == [sha256(one).hexdigest() for one in layers] == list(found.config.diff_ids)
    assert (found.config.args, found.config.entrypoint, found.config.env, found.config.cwd, found.config.user, found.config.stop_signal) == (CONFIG.args, CONFIG.entrypoint, CONFIG.env, CONFIG.cwd, CONFIG.user, CONFIG.stop_signal)
    for one, told in zip(layers, found.layers, strict=True):
        with told.open() as source:
            assert gzip.decompress(source.read()) == one
    with tarfile.open(tmp_path / "one.tar") as archive:
        names = archive.getnames()
        assert len(set(names)) == len(names) == len({*layers}) + 4
        for name in names:
            member = archive.extractfile(name)
            assert member is not None and (not name.startswith("blobs/") or sha256(member.read()).hexdigest() == name.rpartition("/")[2])
    written(tmp_path / "again.tar", layers, 512)
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "one.tar").read_bytes(), "the same content is the same image, however it came"


def test_a_store_takes_it_and_a_bit_that_differs_is_found(tmp_path: Path) -> None:
    digest = written(tmp_path / "one.tar", [layer([("file", "srv/a", b"below"), ("file", "srv/b", b"x" * 5000)]), layer([("file", "srv/a", b"above"), ("folder", "srv/new", b"")])])
    store = ImageStore(tmp_path / "images", limits=Limits(keep_free=0), own=False)
    image = store.add(tmp_path / "one.tar", "snapshots/web:a", strict=True)
    assert image.digest == digest and tree(store.lower(image)[0])["srv/a"] == ("file", b"above")
    store.close()
    data = bytearray((tmp_path / "one.tar").read_bytes())
    data[540] ^= 1
    (tmp_path / "bad.tar").write_bytes(data)
    other = ImageStore(tmp_path / "others", limits=Limits(keep_free=0), own=False)
    with pytest.raises(ImageError, match="digest|damaged"):
        other.add(tmp_path / "bad.tar", "snapshots/web:a", strict=True)
    other.close()


def test_a_layer_of_more_than_8_gib_is_told_as_tar_tells_it() -> None:
    assert next(iter(TarReader(io.BytesIO(_header("blobs/sha256/" + "0" * 64, 9 << 30)), 2))).size == 9 << 30


def test_what_is_abandoned_ends_with_its_reason(tmp_path: Path) -> None:
    def no() -> None:
        raise KeyboardInterrupt

    with open(tmp_path / "one.tar", "wb") as handle, pytest.raises(KeyboardInterrupt), ArchiveWriter(handle, no).layer() as target:
        target.write(b"a")
