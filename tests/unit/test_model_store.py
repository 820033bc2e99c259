"""The model store: content addresses, all or nothing, the last good one kept, nothing left lying about."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.decisions.models import ModelError, ModelStore


def artefact(weight: float, name: str = "m") -> tuple[bytes, bytes, str]:
    """Manifest, data and address of a one-weight model whose output is `weight * a`."""
    data = json.dumps({"kind": "mlp", "layers": [{"weights": [[weight]], "bias": [0.0], "activation": "linear"}]}).encode()
    digest = hashlib.sha256(data).hexdigest()
    document: dict[str, Any] = {
        "schema_version": 1, "name": name, "format": "portable", "sha256": digest, "size_bytes": len(data), "inputs": [{"name": "a"}], "output": {"kind": "vector", "size": 1},
    }
    return json.dumps(document).encode(), data, digest


def keep(store: ModelStore, weight: float, name: str = "m") -> str:
    manifest, data, digest = artefact(weight, name)
    assert store.put(manifest, data).sha256 == digest
    return digest


def weight_of(store: ModelStore, name: str = "m") -> float:
    return store.active(name)[0].predict({"a": 1})[0]


def test_artefacts_stand_under_their_hash_and_are_active_only_when_activated(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models")
    digest = keep(store, 2.0)
    assert (tmp_path / "models" / f"{digest}.data").read_bytes() == artefact(2.0)[1]
    assert hashlib.sha256((tmp_path / "models" / f"{digest}.data").read_bytes()).hexdigest() == digest
    with pytest.raises(ModelError, match="no model 'm'"):
        store.active("m")
    store.activate({"m": store.load(digest)})
    assert weight_of(store) == 2.0
    assert weight_of(ModelStore(tmp_path / "models")) == 2.0  # also for the next process


def test_what_does_not_fit_its_manifest_is_not_kept(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    manifest, data, _ = artefact(2.0)
    for bad_manifest, bad_data, field in ((manifest, data + b" ", "size_bytes"), (manifest, data.replace(b"2", b"3"), "sha256"), (b"{}", data, "schema_version")):
        with pytest.raises(ModelError) as caught:
            store.put(bad_manifest, bad_data)
        assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ModelError, match="no artefact"):
        store.load("0" * 64)


def test_activation_is_of_all_models_or_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ModelStore(tmp_path)
    store.activate({"a": store.load(keep(store, 1.0, "a")), "b": store.load(keep(store, 2.0, "b"))})
    first = store.load(keep(store, 10.0, "a"))
    keep(store, 20.0, "b")

    def full(_name: str, _data: bytes) -> None:
        # The fault of a full disk at the one moment that counts; a small file system cannot be filled to the byte.
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(store, "_write", full)
        with pytest.raises(OSError, match="No space"):
            store.activate({"a": first, "b": first})
    again = ModelStore(tmp_path)
    assert (weight_of(again, "a"), weight_of(again, "b")) == (1.0, 2.0)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\x00" * 40])
@pytest.mark.parametrize("part", ["data", "json"])
def test_a_file_that_was_damaged_on_the_disk_gives_way_to_the_last_good_one(tmp_path: Path, part: str, damage: bytes) -> None:
    store = ModelStore(tmp_path)
    store.activate({"m": store.load(keep(store, 1.0))})
    current = keep(store, 2.0)
    store.activate({"m": store.load(current)})
    assert weight_of(store) == 2.0
    (tmp_path / f"{current}.{part}").write_bytes(damage)
    model, errors = ModelStore(tmp_path).active("m")
    assert model.predict({"a": 1}) == [1.0] and len(errors) == 1 and errors[0].remedy
    (tmp_path / f"{current}.{part}").unlink()
    assert weight_of(ModelStore(tmp_path)) == 1.0


def test_where_neither_can_be_read_the_newest_one_is_named(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    digests = [keep(store, 1.0)]
    store.activate({"m": store.load(digests[0])})
    digests.append(keep(store, 2.0))
    store.activate({"m": store.load(digests[1])})
    for digest in digests:
        (tmp_path / f"{digest}.data").unlink()
    with pytest.raises(ModelError) as caught:
        store.active("m")
    assert digests[1] in caught.value.problem


def test_what_is_neither_current_nor_last_good_goes(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    digests = []
    for weight in (1.0, 2.0, 3.0, 4.0):
        digests.append(keep(store, weight))
        store.activate({"m": store.load(digests[-1])})
    store.activate({"m": store.load(digests[-1])})  # again the same: the last good one is still the one before it
    (tmp_path / f"{digests[0]}.data.new").write_bytes(b"half written when the power went")
    store.activate({"other": store.load(keep(store, 9.0, "other"))})
    kept = {digests[2], digests[3], artefact(9.0)[2]}
    assert {path.name for path in tmp_path.iterdir()} == {"active.json", *(f"{digest}.{part}" for digest in kept for part in ("data", "json"))}
    assert weight_of(store) == 4.0 and weight_of(store, "other") == 9.0


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"m": 3}', b"\xff\xfe", b'{"m": {"current": "../../etc/passwd"}}'])
def test_a_damaged_list_of_what_is_active_is_no_crash(tmp_path: Path, damage: bytes) -> None:
    store = ModelStore(tmp_path)
    digest = keep(store, 1.0)
    store.activate({"m": store.load(digest)})
    (tmp_path / "active.json").write_bytes(damage)
    with pytest.raises(ModelError):
        store.active("m")
    digest = keep(store, 1.0)
    store.activate({"m": store.load(digest)})
    assert weight_of(store) == 1.0
