"""The script of the first boot, run as it is: in a folder instead of the data partition, with this machine's Python and group."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from firmware_images import layout, scripts

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "edge_id: first\nuplink: {enabled: false}\napi: {enabled: false}\n"

pytestmark = pytest.mark.skipif(shutil.which("busybox") is None, reason="busybox is not installed")


class Device:
    """A data folder, and what is handed over as credentials."""

    def __init__(self, top: Path) -> None:
        self.top, self.config = top, top / "data" / "config"
        (top / "given").mkdir()
        (top / "bin").mkdir()
        (top / "bin" / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # a link would not find this environment's packages
        (top / "bin" / "python3").chmod(0o755)
        self.config.parent.mkdir()

    def give(self, **files: str) -> None:
        for name, text in files.items():
            (self.top / "given" / f"novacron.{name.replace('_', '.')}").write_text(text)

    def start(self) -> str:
        script = scripts.PROVISION.replace(layout.DATA, str(self.config.parent)).replace("chgrp novacron ", f"chgrp {os.getgid()} ")
        path = f"{self.top / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env={"PATH": path, "CREDENTIALS_DIRECTORY": str(self.top / "given"), "PYTHONPATH": str(REPOSITORY), "HOME": str(self.top)})
        assert done.returncode == 0, done.stderr
        return done.stdout

    def names(self) -> list[str]:
        return sorted(item.name for item in self.config.iterdir())


def test_a_first_boot_takes_the_configuration_over_with_its_quick_form(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.give(edge_yaml=CONFIG, api_token="t")
    assert "taken over" in device.start()
    assert device.names() == ["api.token", "edge.yaml", "edge.yaml.json"]
    assert json.loads((device.config / "edge.yaml.json").read_text())["values"]["edge_id"] == "first"
    assert {(device.config / name).stat().st_mode & 0o777 for name in device.names()} == {0o640}
    before = (device.config / "edge.yaml.json").stat().st_mtime_ns
    device.give(edge_yaml=CONFIG.replace("first", "other"))  # no later boot takes another
    assert device.start() == "" and (device.config / "edge.yaml.json").stat().st_mtime_ns == before and "first" in (device.config / "edge.yaml").read_text()


def test_a_device_of_an_older_image_gets_the_quick_form_at_its_next_boot(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.give(edge_yaml=CONFIG)
    device.start()
    (device.config / "edge.yaml.json").write_bytes(b"")  # or one that a power cut left empty
    device.start()
    assert json.loads((device.config / "edge.yaml.json").read_text())["values"]["edge_id"] == "first"


def test_nothing_is_taken_over_of_a_configuration_that_cannot_be_used(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.give(edge_yaml=CONFIG + "nise: 3\n", api_token="t")
    assert "nothing was taken over" in device.start() and device.names() == []
