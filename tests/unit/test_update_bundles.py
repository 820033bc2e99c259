"""Bundles of updates: their format and every refusal, signatures, deltas."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.updates import bundle, signature
from edge_runtime.updates.bundle import Refused, Running, check_for, open_manifest, parse_head, parse_manifest
from edge_runtime.updates.source import Interrupted
from edge_runtime.updates.verity import BLOCK, hash_tree
from firmware_images import bundles, tools
from tests.unit.updates_world import FIRST, ORDER, SALT, SECOND, SLOT_BYTES, TOLD, Image, device, image, packed, placed

# -- the format ------------------------------------------------------------------------------------------------------------------

def believed(raw: bytes, verified: bool = True) -> bundle.Manifest:
    length, _ = parse_head(raw)
    return open_manifest(raw[: bundle.HEAD_BYTES], raw[bundle.HEAD_BYTES : bundle.HEAD_BYTES + length], lambda message, signed: verified)


def test_a_manifest_comes_back_from_its_bundle() -> None:
    made = SECOND.manifest(FIRST)
    assert believed(packed(made, SECOND.content)) == made


def test_a_manifest_is_read_only_where_the_signature_holds() -> None:
    seen: list[bytes] = []
    raw = packed(SECOND.manifest(), SECOND.content)
    with pytest.raises(Refused, match="no key that this image trusts") as told:
        open_manifest(raw[: bundle.HEAD_BYTES], raw[bundle.HEAD_BYTES : bundle.HEAD_BYTES + parse_head(raw)[0]], lambda message, signed: bool(seen.append(message)))
    assert told.value.reason == "signature"
    assert seen[0].startswith(bundle.MAGIC)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)
NAMES = st.sampled_from([field.name for field in bundle.MANIFEST_FIELDS])


@given(st.dictionaries(NAMES, JSON, max_size=4), st.lists(NAMES, max_size=2))
def test_a_manifest_with_anything_in_it_is_taken_or_refused(changed: dict[str, Any], gone: list[str]) -> None:
    told = {**TOLD, **changed}
    for name in gone:
        told.pop(name, None)
    try:
        parse_manifest(json.dumps(told).encode())
    except Refused as error:
        assert error.field and error.remedy and error.reason == "format"


@given(st.binary(max_size=200))
def test_noise_is_no_bundle(noise: bytes) -> None:
    with pytest.raises(Refused):
        parse_head(noise)
    with pytest.raises(Refused):
        parse_manifest(noise)


@pytest.mark.parametrize(("changed", "field"), [
    ({"command_line": "quiet\noptions evil"}, "command_line"), ({"command_line": "novacron.slot=novacron-a"}, "command_line"), ({"salt": "00"}, "salt"), ({"root_hash": ""}, "root_hash"), ({"base": "00"}, "base"),
    ({"tries": 0}, "tries"), ({"gate_s": 1}, "gate_s"), ({"version": "a b"}, "version"), ({"sequence": -1}, "sequence"),
])
def test_a_manifest_that_cannot_be_is_refused_by_field(changed: dict[str, Any], field: str) -> None:
    with pytest.raises(Refused) as told:
        parse_manifest(json.dumps(replace(SECOND.manifest(), **changed).to_json()).encode())
    assert field in told.value.field


@pytest.mark.parametrize(("change", "reason"), [
    (lambda manifest: replace(manifest, arch="arm64"), "board"), (lambda manifest: replace(manifest, profile="host"), "board"), (lambda manifest: replace(manifest, sequence=1), "downgrade"),
    (lambda manifest: replace(manifest, sequence=0), "downgrade"), (lambda manifest: replace(manifest, base="0" * 64), "base"), (lambda manifest: replace(manifest, root_hash=FIRST.root_hash), "downgrade"),
])
def test_a_bundle_for_another_device_or_an_older_one_is_refused(change: Any, reason: str) -> None:
    running = Running("amd64", "device", 1, FIRST.root_hash, SLOT_BYTES)
    check_for(SECOND.manifest(), running)
    with pytest.raises(Refused) as told:
        check_for(change(SECOND.manifest()), running)
    assert told.value.reason == reason
    with pytest.raises(Refused, match="do not fit"):
        check_for(SECOND.manifest(), replace(running, slot_bytes=SECOND.manifest().root.size))


def test_the_size_of_a_hash_tree_is_that_of_the_tree() -> None:
    for blocks in (2, 127, 128, 129, 128 * 128, 128 * 128 + 1):
        assert bundle.tree_bytes(blocks) == len(hash_tree(bytes(blocks * BLOCK), b"").tree)


def test_openssl_takes_what_our_key_signed_and_nothing_else(tmp_path: Path) -> None:
    if tools.missing(["openssl"]):
        pytest.skip("openssl is not installed (Debian package openssl)")
    bundles.make_key(tmp_path)
    key, trusted = tmp_path / "keys" / "update.key", tmp_path / "keys" / "trusted"
    assert key.stat().st_mode & 0o077 == 0
    signed = bundles.sign(key, b"message")
    assert signature.verified(trusted, b"message", signed)
    assert not signature.verified(trusted, b"massage", signed)
    assert not signature.verified(trusted, b"message", signed[:-1] + bytes([signed[-1] ^ 1]))
    assert not signature.verified(trusted, b"message", signed[:-1])
    other = tmp_path / "other"
    bundles.make_key(other)
    assert not signature.verified(trusted, b"message", bundles.sign(other / "keys" / "update.key", b"message"))
    assert not signature.verified(tmp_path / "nothing", b"message", signed)


def built(folder: Path, image: Image) -> Path:
    """A folder as a build leaves it."""
    folder.mkdir()
    for name, data in image.content.items():
        (folder / name).write_bytes(data)
    told = {"root_hash": image.root_hash, "salt": SALT.hex(), "sequence": image.sequence, "command_line": "quiet", "arch": "amd64", "profile": "device", "version": f"1.{image.sequence}"}
    (folder / "manifest.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("delta", [False, True])
def test_what_is_bundled_of_an_image_runs_on_a_device_that_trusts_its_key(tmp_path: Path, delta: bool) -> None:
    if tools.missing(["openssl"]):
        pytest.skip("openssl is not installed (Debian package openssl)")
    bundles.make_key(tmp_path)
    second = image(2, FIRST)
    here = device(tmp_path / "device", second)
    made = bundles.bundle(built(tmp_path / "second", second), built(tmp_path / "first", FIRST) if delta else None, tmp_path / "keys" / "update.key", tmp_path / "bundle", more=("loud",))
    assert made.size == (tmp_path / "bundle").stat().st_size < (40_000 if delta else 1_000_000)
    order = {**ORDER, "path": str(tmp_path / "bundle")}
    verified = partial(signature.verified, tmp_path / "keys" / "trusted")
    assert not here.installer(verified).turn(order)
    assert here.installer(verified).turn({**order, "action": "switch"}), here.installer(verified).status
    assert here.boot() == second and here.command_line.startswith("quiet loud ")


def test_a_device_too_busy_to_check_a_signature_waits_and_takes_the_bundle_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in openssl's place that never ends: nothing was refused, so nothing may be given up, and the reason is told."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "update.pem").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "openssl").write_text("#!/bin/sh\nexec sleep 3600\n")
    (tmp_path / "bin" / "openssl").chmod(0o755)
    here, order = device(tmp_path, SECOND), placed(tmp_path, packed(SECOND.manifest(), SECOND.content))
    with monkeypatch.context() as busy:
        busy.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
        busy.setattr(signature, "OPENSSL_TIMEOUT_S", 0.1)
        installer = here.installer(partial(signature.verified, tmp_path / "keys"))
        with pytest.raises(Interrupted):
            installer.turn(order)
    assert installer.status["state"] == "waiting" and installer.status["reason"] == "the signature was not checked within 0.1 s: the device is busy"
    here.installer().turn(order)
    assert installer.status["state"] == "written", installer.status


# -- deltas ----------------------------------------------------------------------------------------------------------------------

def rebuilt(base: bytes, new: bytes) -> tuple[bytes, int]:
    """`new` from its pieces, and how much of it a delta carries."""
    out, carried = bytearray(), 0
    for piece in bundles.pieces(new, base):
        assert piece.size <= bundle.PIECE_MAX_BYTES
        out += base[piece.offset : piece.offset + piece.size] if piece.source == "base" else new[len(out) : len(out) + piece.size]
        carried += piece.size if piece.source == "data" else 0
    return bytes(out), carried


@settings(suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 60_000), st.binary(max_size=40), st.integers(0, 9000)), max_size=5), st.integers(0, 1 << 32))
def test_a_delta_gives_the_new_image(edits: list[tuple[int, bytes, int]], seed: int) -> None:
    base = FIRST.content["root"][seed % 5000 : seed % 5000 + 60_000]
    new = bytearray(base)
    for at, insert, gone in edits:
        new[at : at + gone] = insert
    out, carried = rebuilt(base, bytes(new))
    assert out == bytes(new)
    assert carried <= sum(len(insert) for _, insert, _ in edits) + (len(edits) + 2) * (bundles.ANCHOR_STEP + 2 * bundles.MATCH_LEAST_BYTES)


def test_a_delta_of_nothing_in_common_carries_all() -> None:
    out, carried = rebuilt(FIRST.content["root"], SECOND.content["root"])
    assert out == SECOND.content["root"] and carried == len(out)
