"""Updates of an image: the bundle's format and every refusal, deltas, what systemd-boot starts, the installer cut at every step, the agent's half."""

import asyncio
import functools
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.clock import SystemClock
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.updates import parse_order
from edge_runtime.journal import Journal, JournalSettings
from edge_runtime.updates import bundle, signature, slots
from edge_runtime.updates import duty as duty_module
from edge_runtime.updates.bundle import Refused, Running, check_for, open_manifest, parse_head, parse_manifest
from edge_runtime.updates.duty import SETTLED_LOOKS, UpdateDuty
from edge_runtime.updates.install import read_document, write_document, write_file
from edge_runtime.updates.source import FileSource, Interrupted, WebSource
from edge_runtime.updates.verity import BLOCK, hash_tree
from firmware_images import bundles, tools
from tests.integration.waiting import until
from tests.unit.updates_world import SLOT_BYTES, Device, Image, image, packed

FIRST, SECOND = image(1), image(2)
SMALL, SMALL_NEXT = image(1, blocks=8), image(2, blocks=8)
LARGE = image(2, blocks=300)
TOLD = SECOND.manifest().to_json()
ORDER = {"id": "u-1", "action": "install"}


def device(folder: Path, *known: Image) -> Device:
    made = Device(folder, FIRST)
    for one in known:
        made.know(one)
    return made


def placed(folder: Path, data: bytes) -> dict[str, Any]:
    """An order for a bundle with these bytes."""
    (folder / "bundle").write_bytes(data)
    return {**ORDER, "path": str(folder / "bundle")}


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


# -- what starts -----------------------------------------------------------------------------------------------------------------

ENTRIES = st.builds(slots.Entry, st.integers(0, 4), st.sampled_from(slots.SLOTS), st.none() | st.integers(0, 3), st.integers(0, 3)).map(lambda entry: replace(entry, done=0) if entry.left is None else entry)


def boot_entry_compare(one: slots.Entry, two: slots.Entry) -> int:
    """systemd's own function (src/boot/boot.c), for entries with one sort key, line by line."""
    def compare(a: int, b: int) -> int:
        return (a > b) - (a < b)

    def left(entry: slots.Entry) -> int:
        return -1 if entry.left is None else entry.left

    if result := compare(left(one) == 0, left(two) == 0):
        return result
    if result := -compare(one.sequence, two.sequence):
        return result
    if left(one) < 0 or left(two) < 0:
        return 0
    if result := -compare(left(one), left(two)):
        return result
    return compare(one.done, two.done)


@given(st.lists(ENTRIES, min_size=1, max_size=6))
def test_the_order_is_systemd_boots(entries: list[slots.Entry]) -> None:
    ours = slots.order(entries)
    theirs = sorted(entries, key=functools.cmp_to_key(boot_entry_compare))
    assert boot_entry_compare(ours[0], theirs[0]) == 0
    assert (ours[0].left == 0) == all(entry.left == 0 for entry in entries)


@given(ENTRIES)
def test_an_entry_comes_back_from_its_name(entry: slots.Entry) -> None:
    assert slots.parse_name(entry.name) == entry
    assert slots.parse_name(entry.name.upper()) == entry  # FAT keeps no case that matters
    assert slots.parse_name(entry.name + ".new") is None


# -- the installer ---------------------------------------------------------------------------------------------------------------

def updated(here: Device, order: dict[str, Any]) -> None:
    """The whole way, the agent saying yes."""
    installer = here.installer()
    assert not installer.turn(order)
    assert installer.status["state"] == "written", installer.status
    assert installer.turn({**order, "action": "switch"})
    assert here.boot().sequence == SECOND.sequence
    installer = here.installer()
    installer.settle()
    assert installer.status["state"] == "trial"
    installer.turn({**order, "action": "good"})
    assert installer.status["state"] == "good"


@pytest.mark.parametrize("delta", [False, True])
def test_an_update_runs_and_stays(tmp_path: Path, delta: bool) -> None:
    second = image(2, FIRST) if delta else SECOND
    here = device(tmp_path, second)
    made = second.manifest(FIRST if delta else None)
    assert not delta or made.carried < 40_000
    updated(here, placed(tmp_path, packed(made, second.content)))
    for _ in range(5):
        assert here.boot() == second
    assert [entry.left for entry, _ in here.installer().entries()] == [None, None]
    # And the next one goes into the other slot.
    third = image(3)
    here.know(third)
    order = {**placed(tmp_path, packed(third.manifest(), third.content)), "id": "u-2"}
    installer = here.installer()
    installer.turn(order)
    installer.turn({**order, "action": "switch"})
    assert here.boot() == third and here.running[0] == "novacron-a"


def test_an_image_that_never_comes_up_is_left_after_its_starts_with_the_reason(tmp_path: Path) -> None:
    here = device(tmp_path, SECOND)
    order = placed(tmp_path, packed(SECOND.manifest(), SECOND.content))
    installer = here.installer()
    installer.turn(order)
    installer.turn({**order, "action": "switch"})
    assert [here.boot().sequence for _ in range(4)] == [2, 2, 2, 1]
    installer = here.installer()
    installer.settle()
    assert installer.status["state"] == "failed"
    assert "3 of 3 starts, 0 of them came up" in installer.status["reason"]
    assert [entry.sequence for entry, _ in installer.entries()] == [1]


def test_an_image_that_comes_up_and_does_not_prove_itself_is_given_up_with_the_reason(tmp_path: Path) -> None:
    here = device(tmp_path, SECOND)
    order = placed(tmp_path, packed(SECOND.manifest(), SECOND.content))
    installer = here.installer()
    installer.turn(order)
    installer.turn({**order, "action": "switch"})
    assert here.boot() == SECOND
    installer = here.installer()
    installer.settle()
    installer.give_up("no reading has been taken")
    assert here.boot() == FIRST
    installer = here.installer()
    installer.settle()
    assert installer.status["state"] == "failed" and "no reading has been taken" in installer.status["reason"]


def names(here: Device) -> list[tuple[int, int | None]]:
    """Sequences and starts left of the entries."""
    return [(entry.sequence, entry.left) for entry, _ in here.installer().entries()]


def test_what_a_disk_is_made_with_shows_whether_starts_are_counted_and_is_kept(tmp_path: Path) -> None:
    here = Device(tmp_path, FIRST, factory=slots.FACTORY_STARTS)
    here.know(SECOND)
    assert names(here) == [(1, 0)] and here.installer().to_settle()
    here.installer().settle()
    assert names(here) == [(1, None)] and not here.installer().to_settle()
    assert read_document(here.state / "firmware.json") == {"counts": True}
    updated(here, placed(tmp_path, GOOD))
    assert names(here) == [(1, None), (2, None)]


def test_where_the_firmware_does_not_count_starts_an_update_is_refused_with_the_reason(tmp_path: Path) -> None:
    here = Device(tmp_path, FIRST, factory=slots.FACTORY_STARTS, renames=False)
    here.know(SECOND)
    for _ in range(3):
        here.installer().settle()
        assert names(here) == [(1, None)]
        assert here.boot() == FIRST
    installer = here.installer()
    before = here.slots["novacron-b"].read_bytes()
    installer.turn(placed(tmp_path, GOOD))
    assert (installer.status["state"], installer.status["detail"]["why"]) == ("refused", "firmware"), installer.status
    assert "cannot rename" in installer.status["reason"]
    assert here.slots["novacron-b"].read_bytes() == before and names(here) == [(1, None)]


def test_an_image_on_trial_is_not_kept_by_a_start(tmp_path: Path) -> None:
    here = device(tmp_path, SECOND)
    order = placed(tmp_path, GOOD)
    here.installer().turn(order)
    here.installer().turn({**order, "action": "switch"})
    (here.state / "trial.json").unlink()  # also where the plan of the trial is lost
    assert here.boot() == SECOND
    here.installer().settle()
    assert names(here) == [(1, None), (2, 2)]


def test_a_slot_that_was_left_for_damage_is_told_once_with_the_reason(tmp_path: Path) -> None:
    here = device(tmp_path, SECOND)
    updated(here, placed(tmp_path, GOOD))
    # As the initrd does it.
    (here.esp / slots.DAMAGED).parent.mkdir()
    (here.esp / slots.DAMAGED).write_text(f"novacron-b {SECOND.root_hash} the slot novacron-b is damaged: it was read twice\n")
    (here.esp / slots.ENTRIES / slots.Entry(2, "novacron-b").name).unlink()
    assert here.boot() == FIRST
    assert here.installer().to_settle()
    here.installer().settle()
    told = here.installer().status
    assert told["state"] == "failed" and "novacron-b is damaged: it was read twice" in told["reason"] and "novacron-a with sequence 1 runs" in told["reason"]
    assert told["id"] == f"damaged-{SECOND.root_hash[:16]}" and not (here.esp / slots.DAMAGED).exists()
    updated(here, {**placed(tmp_path, GOOD), "id": "u-2"})  # and is written anew
    here.installer().settle()
    assert here.installer().status["id"] == "u-2"


@given(st.binary(max_size=300))
def test_a_note_of_damage_that_is_noise_stops_nothing(noise: bytes) -> None:
    with tempfile.TemporaryDirectory() as top:
        here = device(Path(top))
        (here.esp / slots.DAMAGED).parent.mkdir()
        (here.esp / slots.DAMAGED).write_bytes(noise)
        here.installer().settle()
        assert here.installer().status == {}


def test_a_start_that_lasted_is_counted_from_zero_and_an_image_leaves_room_for_the_count(tmp_path: Path) -> None:
    here = device(tmp_path)
    slot = here.slots["novacron-a"]
    whole = slot.read_bytes()
    with slot.open("r+b") as file:
        file.seek(SLOT_BYTES - BLOCK)
        file.write(f"{slots.STARTS_WORD} {FIRST.root_hash} 3\n".encode())
    assert slot.read_bytes() != whole
    here.installer().lasted()
    assert slot.read_bytes() == whole
    tight = image(2, blocks=SLOT_BYTES // BLOCK - bundle.tree_bytes(SLOT_BYTES // BLOCK - 9) // BLOCK)
    installer = here.installer()
    installer.turn(placed(tmp_path, packed(tight.manifest(), tight.content)))
    assert installer.status["detail"]["why"] == "size", installer.status


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


GOOD = packed(SECOND.manifest(), SECOND.content)


@pytest.mark.parametrize(("data", "reason"), [
    (packed(SECOND.manifest(), SECOND.content, b"x" * 64), "signature"), (flipped(GOOD, len(GOOD) - 1), "digest"), (flipped(GOOD, len(GOOD) // 2), "digest"), (GOOD[:-1], "truncated"), (GOOD[: bundle.HEAD_BYTES + 10], "truncated"),
    (GOOD[:20], "truncated"), (b"", "truncated"), (GOOD + b"x", "format"), (b"x" + GOOD, "format"), (packed(SECOND.manifest(arch="arm64"), SECOND.content), "board"), (packed(SECOND.manifest(sequence=1), SECOND.content), "downgrade"),
    (packed(SECOND.manifest(root_hash="0" * 64), SECOND.content), "verity"), (packed(image(2, SECOND).manifest(SECOND), SECOND.content), "base"),
], ids=["signature", "last byte", "middle byte", "one byte short", "in the manifest", "in the head", "empty", "one byte more", "other magic", "board", "downgrade", "verity", "base"])
def test_a_bad_bundle_is_refused_and_nothing_new_can_start(tmp_path: Path, data: bytes, reason: str) -> None:
    here = device(tmp_path, SECOND)
    installer = here.installer()
    order = placed(tmp_path, data)
    installer.turn(order)
    assert (installer.status["state"], installer.status["detail"]["why"]) == ("refused", reason), installer.status
    assert not installer.turn({**order, "action": "switch"})
    assert [entry.sequence for entry, _ in installer.entries()] == [1]
    assert here.boot() == FIRST
    # A good one afterwards is taken.
    updated(here, {**placed(tmp_path, GOOD), "id": "u-2"})


def test_a_delta_on_a_damaged_base_is_refused(tmp_path: Path) -> None:
    second = image(2, FIRST)
    here = device(tmp_path, second)
    with here.slots["novacron-a"].open("r+b") as slot:
        slot.seek(1000)
        slot.write(b"damage")
    installer = here.installer()
    installer.turn(placed(tmp_path, packed(second.manifest(FIRST), second.content)))
    assert installer.status["detail"]["why"] == "digest" and "running slot" in installer.status["reason"]


class Cut(BaseException):
    """The power is gone."""


def cut_everywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Cut an update at every sync, rename, removal and write, before it and after, and let it go on; how many cuts there were. AssertionError where something else than one of the two whole images would start."""
    left = -1
    real = {name: getattr(os, name) for name in ("replace", "unlink", "rmdir", "write", "mkdir")}
    real["fsync"] = lambda handle: None  # a place to cut; what is in the page cache is what the next look sees anyway

    def cutting(name: str, *arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise Cut
        done = real[name](*arguments, **named)
        left -= 1
        if left == 0:
            raise Cut
        return done

    for name in real:
        monkeypatch.setattr(os, name, partial(cutting, name))
    monkeypatch.setattr("edge_runtime.updates.install.SYNC_BYTES", 10_000)
    monkeypatch.setattr("firmware_images.bundles.PIECE_MAX_BYTES", 5_000)
    monkeypatch.setattr("tests.unit.updates_world.SLOT_BYTES", 40_960)
    data = packed(SMALL_NEXT.manifest(), SMALL_NEXT.content)
    cuts = seen = 0
    while True:
        cuts += 1
        here = Device(folder / str(cuts), SMALL)
        here.know(SMALL_NEXT)
        order = placed(folder / str(cuts), data)
        left = cuts
        for _ in range(20):
            try:
                installer = here.installer()
                installer.settle()
                state = installer.status.get("state", "")
                if state == "good":
                    break
                if installer.turn({**order, "action": {"written": "switch", "switched": "switch", "trial": "good"}.get(state, "install")}):
                    here.boot()
            except Cut:
                left = -1
                seen += 1
                assert here.boot().sequence in (1, 2)
                assert here.boot().sequence in (1, 2)  # and once more: a start is not what mends it
        left = -1
        assert here.boot() == SMALL_NEXT
        if seen < cuts:
            return cuts  # this one was never reached: all have been


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: thousands of renames wait for a disk each."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def test_a_file_is_written_once_more_when_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On FAT the name that a folder's fsync brings to the disk has neither size nor place; the file's own brings them."""
    done: list[int | str] = []
    sync, name = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.fstat(handle).st_ino), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (name(old, new), done.append("named")))
    write_file(tmp_path / "entry", b"options")
    file = (tmp_path / "entry").stat().st_ino
    assert done == [file, "named", file, tmp_path.stat().st_ino]


def test_cut_at_every_step_it_starts_one_of_the_two_and_can_go_on(in_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        assert cut_everywhere(in_memory, patched) > 60


@pytest.mark.parametrize("method", ["_clear", "_write_kernel", "_write_tree"])
def test_an_installer_that_leaves_a_step_out_is_caught(in_memory: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """The checker's own check."""
    monkeypatch.setattr(f"edge_runtime.updates.install.Installer.{method}", lambda *_: None)
    if method == "_clear":  # an entry from an earlier time then names a slot that is being written
        stale = slots.Entry(3, "novacron-b")
        options = slots.slot_words("novacron-b", 8, SMALL.root_hash, "00")
        made = Device.__post_init__

        def with_stale(self: Device) -> None:
            made(self)
            (self.esp / slots.ENTRIES / stale.name).write_text(slots.entry_text("x", "1", 3, SMALL.root_hash, options))

        monkeypatch.setattr(Device, "__post_init__", with_stale)
    with pytest.raises((AssertionError, FileNotFoundError)), monkeypatch.context() as patched:
        cut_everywhere(in_memory, patched)


def test_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.updates.install.SYNC_BYTES", 250_000)
    here = device(tmp_path, LARGE)
    with Served(packed(LARGE.manifest(), LARGE.content), cut_after=700_000) as (url, asked):
        installer = here.installer()
        order = {**ORDER, "url": url, "token": "secret"}
        with pytest.raises(Interrupted):
            installer.turn(order)
        assert installer.status["state"] == "waiting"
        done = read_document(here.state / "progress.json")["bytes"]
        assert done > 0
        here.installer().turn(order)
        assert installer.status["state"] == "written", installer.status
        assert asked[-1] >= done  # the bytes before were not asked for again
    assert installer.turn({**order, "action": "switch"})
    assert here.boot() == LARGE


class Served:
    """A web server with ranges and one file, whose first answer for the pieces is cut; (address, first bytes asked for)."""

    def __init__(self, data: bytes, cut_after: int = 0, ranges: bool = True, status: int = 0, moved_to: str = "") -> None:
        asked: list[int] = []
        cuts = [cut_after] if cut_after else []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if moved_to:
                    self.send_response(302)
                    self.send_header("Location", moved_to)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if status or self.headers.get("Authorization") != "Bearer secret":
                    self.send_error(status or 401)
                    return
                begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                asked.append(begin)
                self.send_response(206 if ranges else 200)
                if ranges:
                    self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - begin))
                self.end_headers()
                self.wfile.write(data[begin : cuts.pop()] if cuts else data[begin:])

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._asked = asked

    def __enter__(self) -> tuple[str, list[int]]:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_address[1]}/bundle", self._asked

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_a_server_that_will_not_give_it_is_a_refusal_and_one_that_is_ill_is_not() -> None:
    with Served(GOOD) as (url, _), pytest.raises(Refused, match="401"):
        WebSource(url, "wrong")
    with Served(GOOD, ranges=False) as (url, _), pytest.raises(Refused, match="ranges"):
        WebSource(url, "secret")
    with Served(GOOD, status=503) as (url, _), pytest.raises(Interrupted, match="503"):
        WebSource(url, "secret")
    with Served(GOOD) as (url, _):
        pass
    with pytest.raises(Interrupted):
        WebSource(url, "secret")


def test_a_redirect_does_not_get_the_token() -> None:
    with Served(GOOD) as (elsewhere, asked), Served(GOOD, moved_to=elsewhere) as (url, _), pytest.raises(Refused, match="302"):
        WebSource(url, "secret")
    assert asked == []


def test_a_file_that_is_no_plain_file_is_refused_and_does_not_hold_it_up(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(GOOD)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "nothing", "."):
        with pytest.raises(Refused) as told:
            FileSource(tmp_path / name)
        assert told.value.reason == "source"


# -- the agent's half ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    yield Journal(JournalSettings(tmp_path / "journal", ballast_bytes=0, min_free_bytes=0), SystemClock())


@pytest.mark.parametrize("order", [{}, {"id": "u"}, {"id": "u", "url": "ftp://x"}, {"id": "u", "path": "/etc/shadow"}, {"id": "u", "path": "/var/lib/novacron/../../../etc/shadow"}, {"id": "u", "url": "http://x", "path": "/var/lib/novacron/x"}, {"id": "-"}, 7])
def test_an_order_that_cannot_be(order: Any) -> None:
    with pytest.raises(ContractError):
        parse_order(order)


async def told(journal: Journal) -> list[tuple[str, str]]:
    await journal.flush()
    records, _ = await journal.read("event", 1, 1000, 1 << 24)
    return [(body["state"], body["step"]) for record in records if record.kind == "operation" and (body := json.loads(record.body))]


async def test_each_step_is_a_record_before_it_is_asked_for(tmp_path: Path, journal: Journal) -> None:
    journal.start()
    requests, status = tmp_path / "requests", tmp_path / "status.json"
    missing: list[str] = ["no reading has been taken"]
    duty = UpdateDuty(requests, status, journal, lambda linked: missing, lambda: True)
    duty.look()
    assert not requests.exists()
    duty.order({"id": "u-1", "url": "http://hub/bundle"})
    assert not (requests / "request.json").exists()  # the record is not durable yet
    assert await told(journal) == [("running", "accepted")]
    assert read_document(requests / "request.json")["action"] == "install"
    with pytest.raises(ContractError, match="under way"):
        duty.order({"id": "u-2", "url": "http://hub/bundle"})
    assert duty.order({"id": "u-1", "url": "http://hub/bundle"})["step"] == "accepted"

    async def stands(state: str, looks: int = 1, **detail: Any) -> None:
        write_document(status, {"id": "u-1", "state": state, "reason": "", "detail": detail})
        for _ in range(looks):
            duty.look()
            await journal.flush()

    for done in (0, 5, 6, 50, 100):
        await stands("writing", bytes=done, total=100)
    await stands("written")
    assert read_document(requests / "request.json")["action"] == "switch"
    await stands("switched")
    # The agent of the new image: another process, the same journal.
    await journal.close()
    journal = Journal(JournalSettings(tmp_path / "journal", ballast_bytes=0, min_free_bytes=0), SystemClock())
    journal.start()
    duty = UpdateDuty(requests, status, journal, lambda linked: missing if linked else [], lambda: False)
    await stands("trial", 3 * SETTLED_LOOKS)
    assert read_document(requests / "gate.json")["missing"] == missing
    assert read_document(requests / "request.json")["action"] == "switch"
    missing.clear()
    await stands("trial", SETTLED_LOOKS - 1)
    assert read_document(requests / "request.json")["action"] == "switch"  # well, but not for long enough
    await stands("trial")
    assert read_document(requests / "request.json")["action"] == "good"
    await stands("good")
    assert await told(journal) == [
        ("running", "accepted"), ("running", "writing"), ("running", "writing"), ("running", "writing"), ("running", "switching"), ("running", "restarting"), ("running", "proven"), ("succeeded", "good"),
    ]
    assert not (requests / "request.json").exists()
    assert duty.order({"id": "u-1", "url": "http://hub/bundle"})["state"] == "succeeded"
    await stands("good", 3)
    assert len(await told(journal)) == 8
    await journal.close()


async def test_a_refusal_ends_the_operation_with_its_reason(tmp_path: Path, journal: Journal) -> None:
    journal.start()
    status = tmp_path / "status.json"
    duty = UpdateDuty(tmp_path / "requests", status, journal, lambda linked: [], lambda: True)
    duty.order({"id": "u-1", "path": "/var/lib/novacron/edge/bundle"})
    await journal.flush()
    for junk in (b"", b"{", b"[]", b'{"id": 1}', b'{"id": "u-1", "state": "?", "detail": 3}', b'{"id": "u-0", "state": "good", "detail": {}}'):
        status.write_bytes(junk)
        duty.look()
        await journal.flush()
    write_document(status, {"id": "u-1", "state": "refused", "reason": "signature: no", "detail": {"why": "signature", "field": "signature"}})
    duty.look()
    assert (await told(journal))[-1] == ("failed", "refused")
    assert duty.to_json()[-1]["reason"] == "signature: no"
    await journal.close()


async def test_an_image_on_trial_that_the_journal_does_not_know_is_followed_all_the_same(tmp_path: Path, journal: Journal) -> None:
    journal.start()
    status = tmp_path / "status.json"
    duty = UpdateDuty(tmp_path / "requests", status, journal, lambda linked: ["away"] if linked else [], lambda: True)
    write_document(status, {"id": "u-9", "state": "trial", "reason": "", "detail": {}})
    for _ in range(SETTLED_LOOKS):
        duty.look()
    await journal.flush()
    assert read_document(tmp_path / "requests" / "request.json")["action"] == "good"
    await journal.close()


async def test_what_is_told_later_without_an_order_is_told_on(tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duty_module, "IDLE_LOOK_S", 0.01)
    journal.start()
    status = tmp_path / "status.json"
    duty = UpdateDuty(tmp_path / "requests", status, journal, lambda linked: [], lambda: True)
    running = asyncio.create_task(duty.run())
    for _ in range(3):
        await asyncio.sleep(0)  # it has looked, and waits
    write_document(status, {"id": "damaged-1", "state": "failed", "reason": "the slot novacron-b is damaged", "detail": {}})
    await until(duty.to_json, what="the operation")
    assert await told(journal) == [("failed", "failed")] and "damaged" in duty.to_json()[0]["reason"]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await journal.close()
