"""Updates of an image: what systemd-boot starts, the installer cut at every step, where bundles come from."""

import functools
import os
import ssl
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.updates import trusted_file
from edge_runtime.updates import bundle, slots
from edge_runtime.updates.bundle import Refused
from edge_runtime.updates.install import read_document, write_file
from edge_runtime.updates.source import FileSource, Interrupted, WebSource, open_source
from edge_runtime.updates.verity import BLOCK
from tests.integration.certificates import Authority
from tests.unit.updates_world import FIRST, LARGE, ORDER, SECOND, SLOT_BYTES, SMALL, SMALL_NEXT, Device, device, image, packed, placed

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


def test_an_image_on_trial_that_has_no_data_partition_says_so_by_the_boot_partition(tmp_path: Path) -> None:
    here = device(tmp_path, SECOND)
    order = placed(tmp_path, GOOD)
    here.installer().turn(order)
    here.installer().turn({**order, "action": "switch"})
    for _ in range(3):
        assert here.boot() == SECOND
        hidden = here.state.rename(tmp_path / "elsewhere")  # what is on the data partition
        here.installer().no_data("the data partition cannot be mounted")
        hidden.rename(here.state)
    assert here.boot() == FIRST
    here.installer().settle()
    told = here.installer().status
    assert (told["id"], told["state"]) == ("u-1", "failed") and "3 of 3 starts" in told["reason"] and "the data partition cannot be mounted" in told["reason"]
    here.installer().settle()
    assert here.installer().status == told and not (here.esp / slots.DAMAGED).exists()


def test_what_a_start_without_data_left_behind_is_forgotten_where_a_later_one_proves_itself(tmp_path: Path) -> None:
    here = device(tmp_path, SECOND)
    order = placed(tmp_path, GOOD)
    here.installer().turn(order)
    here.installer().turn({**order, "action": "switch"})
    assert here.boot() == SECOND
    here.installer().no_data("the data partition was not there in time")
    assert here.boot() == SECOND
    here.installer().settle()
    here.installer().turn({**order, "action": "good"})
    assert here.installer().status["state"] == "good" and not (here.esp / slots.DAMAGED).exists()


def test_an_image_that_is_kept_is_not_told_of_for_want_of_data(tmp_path: Path) -> None:
    here = device(tmp_path)
    here.installer().no_data("the data partition cannot be mounted")
    assert not (here.esp / slots.DAMAGED).exists() and here.boot() == FIRST


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

    def __init__(self, data: bytes, cut_after: int = 0, ranges: bool = True, status: int = 0, moved_to: str = "", certificate: tuple[str, str] | None = None) -> None:
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
        self._asked, self._scheme = asked, "http"
        if certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*certificate)
            self._server.socket, self._scheme = context.wrap_socket(self._server.socket, server_side=True), "https"

    def __enter__(self) -> tuple[str, list[int]]:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}/bundle", self._asked

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


def test_a_server_of_the_sites_own_authority_is_trusted_where_that_is_named(tmp_path: Path) -> None:
    ours = Authority(tmp_path / "ours", "ours")
    strangers = Authority(tmp_path / "strangers", "strangers")
    with Served(GOOD, certificate=ours.gives("hub")) as (url, asked):
        for ca_file in ("", str(strangers.ca)):
            with pytest.raises(Interrupted, match="certificate"):
                WebSource(url, "secret", ca_file)
        assert asked == []
        source = open_source({"url": url, "token": "secret", "ca_file": str(ours.ca)})
        assert source.read(0, len(GOOD)) == GOOD
        source.close()
        (tmp_path / "empty.pem").write_text("")
        for name in ("empty.pem", "nothing.pem"):
            with pytest.raises(Refused, match=f"updates.ca_file: {tmp_path}/{name} cannot be used"):
                WebSource(url, "secret", str(tmp_path / name))


def test_root_reads_authorities_from_a_device_s_own_places_alone() -> None:
    assert [trusted_file(value) for value in (None, "", "/var/lib/novacron/config/ca.pem", "/etc/ssl/certs/ca-certificates.crt")] == ["", "", "/var/lib/novacron/config/ca.pem", "/etc/ssl/certs/ca-certificates.crt"]
    for value in ("/etc/shadow", "/var/lib/novacron/../../../etc/shadow", "ca.pem", 1):
        with pytest.raises(ContractError, match="ca_file"):
            trusted_file(value)


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
