"""Update bundles on a booted image: one that is downloaded in two goes, proves itself and stays; bad ones, which are refused; images that do not come up or do not prove themselves, which are left."""

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from edge_runtime.contract import jsoncodec
from edge_runtime.updates import bundle as form
from edge_runtime.updates.bundle import HEAD_BYTES, parse_head, parse_manifest, signed_part
from edge_runtime.updates.install import SYNC_BYTES
from firmware_images import bundles
from firmware_images.build import Built, output
from firmware_images.data import take_out
from firmware_images.machine import HERE, Machine
from tests.integration.waiting import until_sync
from tests.system.image_device import ALL_RECORDS, ARCH, BOOT_S, HOME, PROFILE, Device, every, image
from tools.novactl.journal import check, show

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(14400)]

KEY = HOME / "keys" / "update.key"

UPDATE_S = 5400
"""Longest wait for an update: up to five boots and the writing of a slot, all emulated, beside others."""


@pytest.fixture(scope="module")
def built() -> Built:
    """The image that devices run."""
    return image()


@pytest.fixture(scope="module")
def newer() -> Path:
    """The folder of one that differs in its sequence alone."""
    image("next", 1)
    return output(HOME, ARCH, PROFILE, "next")


class Server:
    """Bundles by name over HTTP with ranges; `cut` has the first byte counts after which an answer ends."""

    def __init__(self) -> None:
        self.bundles: dict[str, bytes] = {}
        self.cut: list[int] = []
        self.sent = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                data = outer.bundles[self.path[1:]]
                begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - begin))
                self.end_headers()
                try:
                    part = data[begin : begin + outer.cut.pop(0)] if outer.cut else data[begin:]
                    self.wfile.write(part)
                    outer.sent += len(part)
                except OSError:
                    pass  # refused before its end

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def url(self, name: str, data: bytes) -> str:
        """Serve it; its address for the guest."""
        self.bundles[name] = data
        return f"http://{HERE}:{self._server.server_address[1]}/{name}"

    def stop(self) -> None:
        """No more answers."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


def ended(device: Device, name: str) -> dict[str, Any]:
    """The update's operation once it has ended."""
    def look() -> dict[str, Any] | None:
        try:
            found = next((one for one in device.ask("/api/v1/updates") if one["id"] == name), None)
        except (OSError, ValueError):
            return None  # it starts again
        return found if found and found["state"] in ("succeeded", "failed") else None

    found: dict[str, Any] = until_sync(look, UPDATE_S, f"the end of update {name}")
    return found


def steps(records: list[dict[str, Any]], name: str) -> list[str]:
    """The steps that the journal has of an update, oldest first."""
    return [record["body"]["step"] for record in sorted(records, key=lambda record: int(record["seq"])) if record["kind"] == "operation" and record["body"]["id"] == name]


def running(machine: Machine, device: Device) -> None:
    """Until the agent answers."""
    device.get("/healthz")


def resigned(raw: bytes, key: Path = KEY, **changed: Any) -> bytes:
    """A bundle with another manifest, signed."""
    length, _ = parse_head(raw)
    manifest = replace(parse_manifest(raw[HEAD_BYTES : HEAD_BYTES + length]), **changed)
    told = jsoncodec.encode(manifest.to_json()).encode()
    return form.head(told, bundles.sign(key, signed_part(told))) + told + raw[HEAD_BYTES + length :]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_bundle_that_is_cut_on_its_way_goes_on_from_there_proves_itself_and_stays(built: Built, newer: Path, server: Server, tmp_path: Path) -> None:
    made = bundles.bundle(newer, None, KEY, tmp_path / "whole", gate_s=1200)
    device = Device(built, tmp_path, online=True)
    server.cut = [made.size // 2]
    with device.on() as machine:
        before = until_sync(lambda: device.get("/api/v1/decisions?limit=5"), BOOT_S, "a decision")
        device.get("/api/v1/updates", body={"id": "u-1", "url": server.url("whole", (tmp_path / "whole").read_bytes())})
        told = ended(device, "u-1")
        assert told["state"] == "succeeded", (told, machine.tail(40))
        assert told["detail"]["sequence"] == 1
        kept = {record["seq"]: record for record in every(device.get, "/api/v1/decisions")}
        assert all(kept[record["seq"]] == record for record in before)
    assert server.sent < made.size + 2 * SYNC_BYTES  # the first half did not travel twice
    with device.on() as machine:  # after a power cut it is still the new one, and without a counter
        running(machine, device)
        machine.wait_for("=== end of report", BOOT_S)
        assert any("novacron-b" in text for text in machine.between("slot:", "root:")), machine.tail()
    edge = take_out(device.disk, tmp_path / "autopsy") / "edge"
    verdict = check(edge, lambda *_: None)
    assert verdict["ok"], verdict
    seen = steps(list(show(edge, "event", ALL_RECORDS)), "u-1")
    assert [step for step in seen if step not in ("writing", "waiting")] == ["accepted", "switching", "restarting", "proven", "good"]
    assert "waiting" in seen


def test_bundle_that_is_bad_is_refused_with_its_reason_and_nothing_changes(built: Built, newer: Path, server: Server, tmp_path: Path) -> None:
    bundles.bundle(newer, built.image.parent, KEY, tmp_path / "delta")
    good = (tmp_path / "delta").read_bytes()
    bundles.make_key(tmp_path)
    bad = {
        "signature": resigned(good, tmp_path / "keys" / "update.key"), "digest": flipped(good, len(good) - 1), "board": resigned(good, arch="arm64"), "downgrade": resigned(good, sequence=0), "truncated": good[:-1],
        "base": resigned(good, base="0" * 64), "verity": resigned(good, root_hash="1" * 64), "format": b"no bundle at all" * 100,
    }
    device = Device(built, tmp_path, online=True)
    with device.on() as machine:
        boot = device.get("/api/v1/status")["boot"]
        for reason, data in bad.items():
            device.get("/api/v1/updates", body={"id": f"u-{reason}", "url": server.url(reason, data)})
            told = ended(device, f"u-{reason}")
            assert (told["state"], told["step"], told["detail"]["why"]) == ("failed", "refused", reason), (told, machine.tail(40))
            assert told["reason"]
        assert device.get("/api/v1/status")["boot"] == boot
        records = every(device.get, "/api/v1/journal/event")
    assert {record["body"]["id"] for record in records if record["kind"] == "operation" and record["body"]["state"] == "failed"} == {f"u-{reason}" for reason in bad}
    with device.on() as machine:
        running(machine, device)


def test_bundle_whose_root_is_damaged_when_it_runs_is_left_and_the_old_slot_says_why(built: Built, newer: Path, server: Server, tmp_path: Path) -> None:
    made = bundles.bundle(newer, built.image.parent, KEY, tmp_path / "delta")
    assert made.size < 1_000_000, made  # one line differs
    device = Device(built, tmp_path, online=True)
    with device.on() as machine:
        device.get("/api/v1/updates", body={"id": "u-1", "url": server.url("delta", (tmp_path / "delta").read_bytes())})
        machine.wait_for("update u-1: switched", UPDATE_S)
    slot = built.manifest["partitions"]["novacron-b"]
    with device.disk.open("r+b") as disk:
        for block in range(64, built.manifest["blocks"], 64):
            disk.seek(slot["start"] + block * 4096 + 100)
            disk.write(b"damage")
    with device.on() as machine:
        told = ended(device, "u-1")
        panics = sum("Kernel panic" in text or "has corrupted" in text for _, text in machine.lines)
        assert panics >= 3, machine.tail(60)
    assert (told["state"], told["step"]) == ("failed", "failed")
    assert "3 of 3 starts, 0 of them came up" in told["reason"]


def test_bundle_whose_agent_does_not_start_is_given_up_and_the_old_slot_says_why(built: Built, newer: Path, server: Server, tmp_path: Path) -> None:
    bundles.bundle(newer, None, KEY, tmp_path / "whole", gate_s=60, more=("systemd.mask=novacron-edge.service",))
    device = Device(built, tmp_path, online=True)
    with device.on() as machine:
        device.get("/api/v1/updates", body={"id": "u-1", "url": server.url("whole", (tmp_path / "whole").read_bytes())})
        told = ended(device, "u-1")
        assert any("has not proven itself within 60 s" in text for _, text in machine.lines), machine.tail(60)
    assert told["state"] == "failed" and "the agent does not run" in told["reason"], told
    assert json.dumps(told)


def given_up(built: Built, newer: Path, server: Server, folder: Path, *words: str, units: Mapping[str, str] = MappingProxyType({}), tries: int = 1) -> tuple[dict[str, Any], list[str]]:
    """How an update ends whose kernel is started with `words`, and what the console said; what the device knew before, it knows after."""
    bundles.bundle(newer, None, KEY, folder / "whole", gate_s=60, tries=tries, more=words)
    device = Device(built, folder, online=True, units=units)
    with device.on() as machine:
        before = until_sync(lambda: device.get("/api/v1/decisions?limit=5"), BOOT_S, "a decision")
        device.get("/api/v1/updates", body={"id": "u-1", "url": server.url("whole", (folder / "whole").read_bytes())})
        told = ended(device, "u-1")
        kept = {record["seq"]: record for record in every(device.get, "/api/v1/decisions")}
        assert all(kept[record["seq"]] == record for record in before)
        console = [text for _, text in machine.lines]
    assert told["state"] == "failed", (told, console[-60:])
    return told, console


def test_bundle_whose_kernel_cannot_mount_the_data_is_left_and_the_old_slot_says_why(built: Built, newer: Path, server: Server, tmp_path: Path) -> None:
    told, console = given_up(built, newer, server, tmp_path, "module_blacklist=ext4", tries=2)
    assert "2 of 2 starts, 0 of them came up" in told["reason"] and "the data partition cannot be mounted" in told["reason"], told
    assert sum("the data partition cannot be mounted; starting again" in text for text in console) == 2, console[-60:]


def test_bundle_that_does_not_find_the_data_is_left_after_a_while_and_the_old_slot_says_why(built: Built, newer: Path, server: Server, tmp_path: Path) -> None:
    # Nobody names partitions without udev. The wait, half an hour at most and a quarter on trial, is made short.
    blind = [f"systemd.mask=systemd-udevd{unit}" for unit in (".service", "-kernel.socket", "-control.socket")]
    told, _ = given_up(built, newer, server, tmp_path, *blind, units={"systemd.unit-dropin.novacron-no-data.timer": "[Timer]\nOnBootSec=\nOnBootSec=60\n"})
    assert "the data partition was not there in time" in told["reason"], told


def test_bundle_whose_start_gets_stuck_is_given_up_and_the_old_slot_says_why(built: Built, newer: Path, server: Server, tmp_path: Path) -> None:
    stuck = "[Unit]\nDefaultDependencies=no\nConditionKernelCommandLine=stuck\nBefore=sysinit.target\n[Service]\nType=oneshot\nTimeoutStartSec=infinity\nExecStart=/usr/bin/busybox sleep infinity\n"
    told, _ = given_up(built, newer, server, tmp_path, "stuck", units={"systemd.extra-unit.stuck.service": stuck, "systemd.unit-dropin.sysinit.target": "[Unit]\nWants=stuck.service\n"})
    assert "not proven within 60 s: the agent does not run" in told["reason"], told
