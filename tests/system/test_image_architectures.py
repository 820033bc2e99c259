"""The image of a device on each architecture: boots without network and clock, decides, keeps its records through a power cut, hands them to a hub; its model answers as TFLite does here."""

import json
import os
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.decisions.models.manifest import read_manifest
from edge_runtime.decisions.models.model import load_model
from edge_runtime.decisions.models.tflite_engine import find_library
from firmware_images import recipes, tools
from firmware_images.boot import API_PORT, credentials, hand_over
from firmware_images.build import Built, current
from firmware_images.data import take_out
from firmware_images.errors import FirmwareError
from firmware_images.machine import HERE, Machine, Wiring, comes_up, command, free_port, prepare
from tests.integration.edges import MOSQUITTO
from tests.integration.waiting import until_sync
from tests.system.image_device import ALL_RECORDS, every, told_to
from tools.bench.harness import ROOT
from tools.bench.image_inside import HubProcess
from tools.novactl.journal import check, show

pytestmark = [pytest.mark.system, pytest.mark.timeout(7200)]

BOOT_S = 1800
"""Longest wait for a boot: 30 s on an idle core (riscv64 a minute and a half), many times that where others want it too."""

NAME = "image-test"

CONFIG = """edge_id: {name}
uplink: {{url: "mqtt://{here}:{port}", backoff_cap: 5s}}
journal: {{retain_receipted_records: 1000000}}
api: {{host: 0.0.0.0, token_file: /var/lib/novacron/config/api.token}}
devices: {{host: {{interval: 5s}}}}
decisions:
  models: ["shipped:host-anomaly/portable"]
  rules:
    - {{id: awake, "on": {{device: host, metric: uptime_seconds}}, if: {{value: uptime_seconds, op: ">", than: 0}}, trigger: each, then: [{{alert: {{severity: info, text: awake}}}}]}}
    - {{id: model, "on": {{device: host}}, trigger: each, then: [{{alert: {{severity: info, text: judged}}}}], if: {{all: [{{model: host-anomaly, op: ">=", than: 0}}, {features}]}}}}
"""
"""Decides at each look at itself, with a model too, whose features and answer are then in the decision; keeps what the hub has, so that the two can be compared."""

MODELS = ROOT / "edge_runtime" / "decisions" / "models" / "shipped" / "host-anomaly"


def device_config(port: int) -> str:
    """The configuration of a device whose hub's broker is at the port."""
    names = [feature.name for feature in read_manifest((MODELS / "portable.json").read_bytes()).inputs]
    return CONFIG.format(name=NAME, here=HERE, port=port, features=", ".join(f'{{value: {name}, op: ">=", than: -1}}' for name in names))


def judged_otherwise(decisions: Iterable[dict[str, Any]]) -> tuple[int, list[str]]:
    """How many decisions had the model, and those for which TFLite on this machine answers otherwise."""
    manifest = read_manifest((MODELS / "tflite.json").read_bytes())
    model = load_model(manifest, MODELS)
    count, told = 0, []
    for body in decisions:
        if body["rule"] == "model":
            count += 1
            inputs = body["inputs"]
            there, here = inputs["model:host-anomaly"]["output"][0], model.predict(inputs)[0]
            near = here == pytest.approx(there, rel=1e-4, abs=1e-3)
            assert manifest.threshold is not None
            if not near or (abs(here - manifest.threshold) > 1e-3 and (here > manifest.threshold) != (there > manifest.threshold)):
                told.append(f"{there} there, {here} here, of {inputs}")
    model.close()
    return count, told


def image_of(arch_name: str, profile_name: str = "device") -> Built:
    """The image of this code; built where it is not there (the first time with the network)."""
    arch, profile = recipes.architecture(arch_name), recipes.profile(profile_name)
    home = Path(os.environ.get("NOVACRON_IMAGES", ROOT / ".novacron" / "images"))
    try:
        tools.require([*tools.BUILD, arch.qemu, "e2fsck", "debugfs"])
        return current(home, arch, profile, print)
    except FirmwareError as error:
        if error.field in ("tools", "network", "space"):
            pytest.skip(f"no image can be built here: {error}")
        raise


class Device:
    """The image in a machine of its own, at 1970, without a network; its interface."""

    def __init__(self, built: Built, folder: Path, config: Path | None = None) -> None:
        self.arch, profile = recipes.architecture(built.manifest["arch"]), recipes.profile(built.manifest["profile"])
        self.built, self.state = built, folder / "state"
        try:
            self.disk, self.flash = prepare(self.arch, built.image, self.state)
        except FirmwareError as error:
            pytest.skip(f"no machine can be made here: {error}")
        found, self.token = credentials(self.state, config, [], True, NAME)
        handed = hand_over(self.arch, built, self.disk, found)
        self.port = free_port()
        self.wiring = Wiring(recipes.memory_mib(self.arch, profile), {self.port: API_PORT}, handed, clock="1970-01-02")

    def on(self, online: bool = False) -> Machine:
        """Power on."""
        return Machine(command(self.arch, self.disk, self.flash, replace(self.wiring, online=online)), told_to(self.state / "console.log"))

    def get(self, path: str, seconds: float = BOOT_S) -> Any:
        """An answer of the interface, asked for until there is one."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers={"Authorization": f"Bearer {self.token}"})

        def asked() -> tuple[Any] | None:
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    return (json.load(answer),)
            except (OSError, ValueError):
                return None

        return until_sync(asked, seconds, f"an answer on {path}")[0]


def decisions(device: Device, least: int) -> list[dict[str, Any]]:
    """The newest decisions once there are `least`."""
    def enough() -> list[dict[str, Any]] | None:
        found = device.get("/api/v1/decisions?limit=100")
        return found if len(found) >= least else None

    found: list[dict[str, Any]] = until_sync(enough, BOOT_S, f"{least} decisions")
    return list(found)


def synced(hub: HubProcess, newest: int) -> dict[int, Any] | None:
    """What the hub has of the device once it goes beyond `newest` and lacks nothing: what is new comes first, the backlog behind it."""
    found = hub.decisions(NAME)
    return found if max(found, default=0) > newest and sorted(found) == list(range(1, max(found) + 1)) else None


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubProcess]:
    """A hub that is not running yet: the first boot is offline."""
    if not MOSQUITTO:
        pytest.skip("no mosquitto: apt install mosquitto")
    yield HubProcess(tmp_path)


@pytest.mark.parametrize("arch", [pytest.param(name, marks=[] if name == "amd64" else pytest.mark.slow) for name in recipes.ARCHITECTURES])
def test_image_decides_offline_syncs_and_loses_nothing_by_a_power_cut(arch: str, tmp_path: Path, hub: HubProcess) -> None:
    built = image_of(arch)
    config = tmp_path / "edge.yaml"
    config.write_text(device_config(hub.broker_port))
    device = Device(built, tmp_path, config)
    with device.on() as machine:
        before = decisions(device, 3)
        machine.wait_for("=== end of report", BOOT_S)
        report = machine.between("=== novacron report", "=== end of report")
    with pytest.raises(AssertionError, match="an answer on"):
        device.get("/healthz", 0)
    newest = max(record["seq"] for record in before)
    with hub, device.on(online=True) as machine:
        try:
            told = until_sync(lambda: synced(hub, newest), BOOT_S, "a decision of the second start, and all before it, reach the hub")
            verdict = until_sync(lambda: (found := hub.get(f"/api/v1/edges/{NAME}/verify")) and found["exact"] and found, BOOT_S, "the hub's proof that it lacks nothing")
        except AssertionError as error:
            raise AssertionError(f"{error}; the hub's errors: {hub.get('/api/v1/errors')}; the console:\n{machine.tail(60)}") from None
        kept = {record["seq"]: record for record in every(device.get, "/api/v1/decisions")}
    assert verdict["exact"], verdict
    for record in before:
        assert kept[record["seq"]] == record
        assert told[record["seq"]] == record["body"]
    assert sorted(told) == list(range(1, max(told) + 1))
    text = "\n".join(report)
    assert " / squashfs ro" in text
    listening = report[report.index("listening:") + 1 : report.index("failed:")]
    assert {line.split(":")[-1] for line in listening if "/tcp" in line} == {f"{API_PORT:04X}"}, listening
    assert {line.split(":")[-1] for line in listening if "/udp" in line} <= {"0044", "0222"}, listening  # it asks for an address (DHCP)
    assert report[report.index("failed:") + 1 : report.index("slot:")] == []
    assert device.arch.emulated in report[report.index("command line:") + 1]  # came by way of firmware and boot loader
    # The dead device's disk says the same, and has all that the hub was told.
    edge = take_out(device.disk, tmp_path / "autopsy") / "edge"
    verdict = check(edge, lambda *_: None)
    assert verdict["ok"], verdict
    assert verdict["records"]["decision"] >= newest
    on_disk = {record["seq"]: record["body"] for record in show(edge, "decision", ALL_RECORDS)}
    assert {record["seq"] for record in before} <= on_disk.keys()
    assert all(on_disk[number] == body for number, body in told.items())
    if find_library() is not None:
        judged, otherwise = judged_otherwise(told.values())
        assert judged and not otherwise, otherwise


@pytest.mark.skipif(find_library() is None, reason="TFLite is not installed (pip install ai-edge-litert)")
def test_control_a_model_that_answers_otherwise_is_noticed() -> None:
    portable = load_model(read_manifest((MODELS / "portable.json").read_bytes()), MODELS)
    values = {feature.name: feature.mean for feature in portable.manifest.inputs}
    body = {"rule": "model", "inputs": {**values, "model:host-anomaly": {"output": portable.predict(values)}}}
    assert judged_otherwise([body, {"rule": "awake"}]) == (1, [])
    body["inputs"]["model:host-anomaly"]["output"][0] += 0.1
    assert judged_otherwise([body])[1]


@pytest.mark.slow
def test_whether_a_kernel_comes_up_is_found_by_booting_it(tmp_path: Path) -> None:
    built = image_of("amd64")
    arch, kernel, early = recipes.architecture("amd64"), built.image.with_name("linux"), built.image.with_name("initrd")
    assert comes_up(arch, kernel, early, "tcg", BOOT_S)  # emulated, beside others, that takes longer than what KVM is given
    (tmp_path / "none").write_bytes(b"")
    assert not comes_up(arch, kernel, tmp_path / "none", "tcg", BOOT_S)  # its panic ends the machine: no wait decides this
