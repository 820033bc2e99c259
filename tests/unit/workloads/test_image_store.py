"""The image store: what it takes, what it refuses and keeps nothing of, what a kill leaves, what goes when room is short."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.images import ImageError, ImageStore, Limits, Platform
from edge_runtime.workloads.images import store as stores

from .image_side import AS_ROOT, HERE, archive, config, docker_save, layer, layout, sha, tree

LIMITS = Limits(keep_free=0)
BASE = layer([("folder", "bin", b""), ("file", "bin/app", b"#!" * 500), ("file", "gone", b"x")])
TOP = layer([("file", ".wh.gone", b""), ("file", "etc/conf", b"k=v")]) if AS_ROOT else layer([("file", "etc/conf", b"k=v")])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    opened = ImageStore(tmp_path / "store", limits=LIMITS, own=AS_ROOT)
    yield opened
    opened.close()


def reopened(store: ImageStore) -> ImageStore:
    store.close()
    return ImageStore(store.directory, limits=LIMITS, own=AS_ROOT)


def kept(store: ImageStore) -> dict[str, Any]:
    return {path: told for path, told in tree(store.directory).items() if path != "lock"}


SOURCES: dict[str, Callable[[Path], Path]] = {
    "folder": lambda folder: layout(folder / "in", [BASE, TOP], run={"Cmd": ["app"]}), "plain layers": lambda folder: layout(folder / "in", [BASE, TOP], run={"Cmd": ["app"]}, packed=False),
    "archive": lambda folder: archive(layout(folder / "in", [BASE, TOP], run={"Cmd": ["app"]}), folder / "in.tar"), "docker save": lambda folder: docker_save(folder / "in.tar", [BASE, TOP], run={"Cmd": ["app"]}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_image(source: str, store: ImageStore, tmp_path: Path) -> None:
    image = store.add(SOURCES[source](tmp_path))
    assert image.names == ("app:1",) and image.config.args == ("app",)
    assert image.config.diff_ids == (sha(BASE), sha(TOP))
    upper, lower = store.lower(image)
    assert (upper / "etc/conf").read_bytes() == b"k=v" and (lower / "bin/app").read_bytes() == b"#!" * 500
    assert store.find("app:1").digest == store.find(f"sha256:{image.digest}").digest == image.digest
    assert list((store.directory / "new").iterdir()) == []


def test_a_layer_is_unpacked_once_however_many_images_have_it(store: ImageStore, tmp_path: Path) -> None:
    first = store.add(layout(tmp_path / "a", [BASE]))
    born = (store.directory / "layers" / sha(BASE)).stat().st_ino
    second = store.add(docker_save(tmp_path / "b.tar", [BASE, TOP, BASE], name="other:2", linked=True))
    assert (store.directory / "layers" / sha(BASE)).stat().st_ino == born
    assert second.digest != first.digest and store.used_bytes() == 1001 + 3


def test_what_is_here_is_found_while_another_image_comes_or_goes(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that is started again does not wait until somebody else's image is unpacked, which takes a slow disk half a minute."""
    first = store.add(layout(tmp_path / "a", [BASE], name="here:1"))
    comes, goes_on = threading.Event(), threading.Event()

    def stands(word: str) -> None:
        if word == "settle":
            comes.set()
            assert goes_on.wait(60)

    monkeypatch.setattr(store, "_step", stands)
    coming = threading.Thread(target=lambda: store.add(layout(tmp_path / "b", [TOP], name="coming:1")))
    coming.start()
    assert comes.wait(60)
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.extend((store.find("here:1").digest, len(store.images()), store.used_bytes() > 0)), daemon=True)
    asking.start()
    asking.join(30)
    goes_on.set()
    coming.join(60)
    assert found == [first.digest, 1, True] and store.find("coming:1").names == ("coming:1",)
    comes.clear()
    goes_on.clear()
    paced = stores.remove
    monkeypatch.setattr(stores, "remove", lambda *words: (comes.set(), goes_on.wait(60), paced(*words)))
    going = threading.Thread(target=lambda: store.prune(0, {sha(BASE)}))
    going.start()
    assert comes.wait(60)
    asking = threading.Thread(target=lambda: found.append([image.names for image in store.images()]), daemon=True)
    asking.start()
    asking.join(30)
    goes_on.set()
    going.join(60)
    assert found[-1] == [("here:1",)] and not list((store.directory / "new").iterdir())


def test_a_name_goes_to_the_image_that_was_added_last(store: ImageStore, tmp_path: Path) -> None:
    old, new = store.add(layout(tmp_path / "a", [BASE]), "web:2"), store.add(layout(tmp_path / "b", [BASE, TOP]), "web:2")
    assert store.find("web:2").digest == new.digest and store.find(f"x@sha256:{old.digest}").names == ()
    with pytest.raises(ImageError, match="not on this node"):
        store.find("web:3")


def test_of_several_the_one_for_this_machine_is_taken(store: ImageStore, tmp_path: Path) -> None:
    folder = layout(tmp_path / "in", [TOP], platform={"os": "linux", "architecture": "vax"})
    layout(folder, [BASE], platform={"os": HERE.os, "architecture": HERE.arch, **({"variant": HERE.variant} if HERE.variant else {})})
    assert store.add(folder, "app:1").config.diff_ids == (sha(BASE),)
    with pytest.raises(ImageError, match=r"has nothing for linux/riscv64 \(it has linux/"):
        ImageStore(tmp_path / "other", limits=LIMITS, here=Platform("linux", "riscv64"), own=AS_ROOT).add(folder)


def test_variants_of_arm_run_on_newer_ones() -> None:
    v7 = Platform("linux", "arm", "v7")
    assert v7.takes({"os": "linux", "architecture": "arm", "variant": "v6"}) and v7.takes({"os": "linux", "architecture": "arm"}) and not v7.takes({"os": "linux", "architecture": "arm", "variant": "v8"})
    assert not Platform("linux", "arm", "v6").takes({"os": "linux", "architecture": "arm"}) and Platform("linux", "arm64").takes({"os": "linux", "architecture": "arm64", "variant": "v8"})


def _every_blob(folder: Path) -> list[Path]:
    return sorted((folder / "blobs/sha256").iterdir())


def test_one_wrong_byte_anywhere_is_refused_and_nothing_is_kept(store: ImageStore, tmp_path: Path) -> None:
    source = layout(tmp_path / "in", [BASE, TOP])
    before = kept(store)
    for blob in _every_blob(source):
        good = blob.read_bytes()
        for bad, says in ((good[:-9] + bytes((good[-9] ^ 1,)) + good[-8:], "digest|damaged"), (good[:-1], "bytes|digest"), (None, "missing")):
            blob.unlink()
            if bad is not None:
                blob.write_bytes(bad)
            with pytest.raises(ImageError, match=says):
                store.add(source)
            blob.write_bytes(good)
            shutil.rmtree(store.directory / "layers" / sha(BASE), ignore_errors=True)  # the lower one was whole, and may stay
            (store.directory / "layers" / f"{sha(BASE)}.json").unlink(missing_ok=True)
            assert kept(store) == before
    assert store.add(source).names == ("app:1",)


@pytest.mark.parametrize("packed", [True, False])
def test_a_source_that_changes_between_its_two_readings_is_refused(packed: bool, store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of an archive that is still under way, as it may be put there by hand."""
    source, other = (archive(layout(tmp_path / name, [layer([("file", "a", content)])], packed=packed), tmp_path / f"{name}.tar") for name, content in (("first", b"1"), ("other", b"2")))
    verify = ImageStore._verify
    monkeypatch.setattr(ImageStore, "_verify", lambda self, *words: (verify(self, *words), shutil.copy(other, source)))
    with pytest.raises(ImageError, match="the image's config says|damaged"):
        store.add(source)
    assert store.images() == [] and not kept(store).keys() - {"layers", "images", "new"}


def test_control_a_store_that_believes_is_caught(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Believing(stores.Counted):
        """What it reads has whatever hash is asked for."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.digest = type("Said", (), {"update": lambda self, data: None, "hexdigest": lambda self: _Any()})()

    class _Any(str):
        __eq__, __ne__, __hash__ = lambda self, other: True, lambda self, other: False, str.__hash__  # type: ignore[assignment]

    monkeypatch.setattr(stores, "Counted", Believing)
    monkeypatch.setattr("edge_runtime.workloads.images.layer.Counted", Believing)
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        test_one_wrong_byte_anywhere_is_refused_and_nothing_is_kept(store, tmp_path)


def _changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The manifest changed, and the index after it, so that all digests are right."""
    index = json.loads((folder / "index.json").read_text())
    old = folder / "blobs/sha256" / index["manifests"][0]["digest"][7:]
    manifest = json.loads(old.read_bytes())
    change(manifest)
    raw = json.dumps(manifest).encode()
    (folder / "blobs/sha256" / sha(raw)).write_bytes(raw)
    index["manifests"][0] |= {"digest": f"sha256:{sha(raw)}", "size": len(raw)}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        *way, last = path.split(".")
        here: Any = manifest
        for part in way:
            here = here[int(part) if part.isdigit() else part]
        here[int(last) if last.isdigit() else last] = value

    return change


@pytest.mark.parametrize(("change", "field"), [
    (_set("schemaVersion", 1), "manifest.schemaVersion"), (_set("layers", []), "manifest.layers"), (_set("layers", "x"), "manifest.layers"), (_set("layers", [1]), r"manifest.layers\[0\]"),
    (_set("layers.0.digest", "sha256:../../etc/passwd"), r"manifest.layers\[0\].digest"), (_set("layers.0.digest", "md5:aa"), r"manifest.layers\[0\].digest"), (_set("layers.0.size", -1), r"manifest.layers\[0\].size"),
    (_set("layers.0.size", 1 << 45), r"manifest.layers\[0\].size"), (_set("layers.0.mediaType", "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"), "mediaType"),
    (_set("layers.0.mediaType", "application/vnd.oci.image.layer.v1.tar+zstd"), r"layers\[0\]: the zstd stream is damaged"), (_set("config", None), "manifest.config"),
])
def test_bad_manifests_name_the_field(change: Any, field: str, store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=field):
        store.add(_changed(layout(tmp_path / "in", [BASE]), change))
    assert store.images() == [] and store.used_bytes() == 0


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"null", b"[" * 100_000, b'{"manifests": {}}', b'{"manifests": [{"digest": 5, "size": 1}]}', b"\xff\xfe"])
def test_broken_documents_are_one_error(raw: bytes, store: ImageStore, tmp_path: Path) -> None:
    source = layout(tmp_path / "in", [BASE])
    (source / "index.json").write_bytes(raw)
    with pytest.raises(ImageError):
        store.add(source)
    docker = tmp_path / "d"
    docker.mkdir()
    (docker / "manifest.json").write_bytes(raw)
    with pytest.raises(ImageError):
        store.add(docker)


def test_what_is_no_image_is_refused_with_a_remedy(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello" * 300)
    for path, says in ((tmp_path / "nowhere", "cannot be read"), (Path("/dev/null"), "neither a folder nor a file"), (tmp_path / "text", "checksum"), (tmp_path, "docker save")):
        with pytest.raises(ImageError, match=says):
            store.add(path)
    with pytest.raises(ImageError, match="no name of an image"):
        store.add(tmp_path / "in", "../x y")
    wrong = config([BASE], architecture="vax")
    with pytest.raises(ImageError, match="this machine is"):
        stores.plan.__globals__["documents"].config(wrong, HERE, 1)


def test_a_layout_whose_blob_is_a_link_is_refused(store: ImageStore, tmp_path: Path) -> None:
    source = layout(tmp_path / "in", [BASE])
    blob = _every_blob(source)[0]
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ImageError, match="plain files"):
        store.add(source)


# -- kills ---------------------------------------------------------------------------------------------------------------------

STEPS = ("verify", "unpack", "settle", "rename", "kept", "write", "forget", "drop", "dropped")


def _killed(directory: Path, at: tuple[str, int], do: Callable[[ImageStore], object]) -> None:
    """`do` in a process of its own that is killed at the n-th time of a step."""
    child = os.fork()
    if child == 0:
        left = at[1]

        def step(word: str) -> None:
            nonlocal left
            if word == at[0]:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            do(ImageStore(directory, limits=LIMITS, own=AS_ROOT, step=step))
        finally:
            os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("word", STEPS)
@pytest.mark.parametrize("time", [1, 2])
def test_a_kill_at_any_step_leaves_whole_things(word: str, time: int, tmp_path: Path) -> None:
    source, other = layout(tmp_path / "in", [BASE, TOP]), layout(tmp_path / "other", [BASE, layer([("file", "o", b"1")])], name="other:1")
    directory = tmp_path / "store"
    first = ImageStore(directory, limits=LIMITS, own=AS_ROOT)
    first.add(other)
    first.close()

    def do(store: ImageStore) -> None:
        store.add(source)
        store.prune(0, ())

    _killed(directory, (word, time), do)
    after = ImageStore(directory, limits=LIMITS, own=AS_ROOT)
    assert list((directory / "new").iterdir()) == []
    for image in after.images():
        for folder, diff_id in zip(after.lower(image), reversed(image.config.diff_ids), strict=True):
            assert tree(folder) and folder.name == diff_id
    assert after.used_bytes() >= 0
    assert len(after.lower(after.add(source))) == 2 and (after.lower(after.find("app:1"))[0] / "etc/conf").exists()
    after.close()


def test_control_a_layer_that_is_unpacked_in_its_place_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it not for the rename, a kill while unpacking would leave half a layer under its name."""
    source, directory = layout(tmp_path / "in", [BASE, TOP]), tmp_path / "store"

    def in_place(stream: Any, folder: Path, *rest: Any, **more: Any) -> Any:
        os.rename(folder, directory / "layers" / folder.name)
        raise SystemExit

    monkeypatch.setattr(stores, "unpack", in_place)
    _killed(directory, ("never", 1), lambda store: store.add(source))
    monkeypatch.undo()
    after = ImageStore(directory, limits=LIMITS, own=AS_ROOT)
    assert not all(tree(folder) for folder in after.lower(after.add(source)))
    after.close()


def test_opening_repairs(store: ImageStore, tmp_path: Path) -> None:
    image = store.add(layout(tmp_path / "in", [BASE, TOP]))
    (store.directory / "new/half").mkdir()
    (store.directory / "new/half/file").write_text("x")
    (store.directory / "layers" / f"{sha(BASE)}.json").write_text("{")
    again = reopened(store)
    assert list((store.directory / "new").iterdir()) == [] and again.used_bytes() == image.bytes
    shutil.rmtree(store.directory / "layers" / sha(TOP))
    third = reopened(again)
    assert third.images() == [] and third.used_bytes() == 1001
    third.add(tmp_path / "in")
    document = next((store.directory / "images").iterdir())
    document.write_bytes(document.read_bytes().replace(b"app:1", b"app:2"))
    assert reopened(third).images() == []


def test_only_one_has_it(store: ImageStore) -> None:
    with pytest.raises(ImageError, match="used by another process"):
        ImageStore(store.directory, limits=LIMITS)
    reopened(store).close()


# -- room ----------------------------------------------------------------------------------------------------------------------


def _filled(store: ImageStore, tmp_path: Path) -> list[Any]:
    """Three images of 1001 shared bytes, and 1000, 2000, 3000 of their own; the last one was asked for last."""
    return [store.add(layout(tmp_path / f"i{at}", [BASE, layer([("file", f"own{at}", bytes(1000 * at))])], name=f"i:{at}")) for at in (1, 2, 3)]


def test_pruning_keeps_to_the_budget_and_what_is_in_use(store: ImageStore, tmp_path: Path) -> None:
    one, two, three = _filled(store, tmp_path)
    assert store.prune(7001, ()) == [] and store.used_bytes() == 7001
    assert store.prune(7000, one.config.diff_ids) == [two.digest] and store.used_bytes() == 5001
    store.remove(one.digest)
    assert store.prune(5001, one.config.diff_ids) == [] and store.used_bytes() == 5001  # what runs stays, also when its image was removed
    assert store.prune(0, one.config.diff_ids) == [three.digest] and store.used_bytes() == 2001
    assert store.prune(0, ()) == [] and store.used_bytes() == 0


def test_what_was_asked_for_goes_last(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = _filled(store, tmp_path)
    monkeypatch.setattr(stores.time, "time", lambda: 9e9)
    store.find("i:1")
    assert store.prune(3000, ()) == [two.digest, three.digest]


def test_too_large_is_refused_before_it_is_copied(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="more than 1500 bytes|over 1500"):
        ImageStore(tmp_path / "a", limits=Limits(image_bytes=1500, keep_free=0), own=AS_ROOT).add(layout(tmp_path / "in", [layer([("file", "a", bytes(1000))]), layer([("file", "b", bytes(1000))])]))
    full = ImageStore(tmp_path / "b", limits=Limits(keep_free=1 << 60), own=AS_ROOT)
    with pytest.raises(ImageError, match="stay free"):
        full.add(tmp_path / "in")
    assert full.used_bytes() == 0
    with pytest.raises(ImageError, match="2 layers are over 1"):
        ImageStore(tmp_path / "c", limits=Limits(layers=1, keep_free=0), own=AS_ROOT).add(tmp_path / "in")
