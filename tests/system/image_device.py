"""An image of ours in a machine of its own, for tests: built where there is none, booted offline or not, asked over its interface."""

import base64
import json
import os
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from firmware_images import recipes, tools
from firmware_images.boot import API_PORT, credentials
from firmware_images.build import Built, current
from firmware_images.errors import FirmwareError
from firmware_images.machine import Machine, Wiring, command, free_port, prepare
from tests.integration.waiting import until_sync
from tools.bench.harness import ROOT

ARCH, PROFILE = recipes.architecture("amd64"), recipes.profile("device")

HOME = Path(os.environ.get("NOVACRON_IMAGES", ROOT / ".novacron" / "images"))

BOOT_S = 1800
"""Longest wait for a boot: 30 s on an idle core; 455 s were seen on two cores that ten others wanted too (2026-11-29)."""


def image(variant: str = "", sequence: int = 0) -> Built:
    """The image of this code; built where it is not there (the first time with the network). Skips where it cannot be."""
    try:
        tools.require([*tools.BUILD, ARCH.qemu, "e2fsck", "debugfs"])
        return current(HOME, ARCH, PROFILE, print, sequence, variant)
    except FirmwareError as error:
        if error.field in ("tools", "network", "space"):
            pytest.skip(f"no image can be built here: {error}")
        raise


def told_to(path: Path) -> Callable[[str], None]:
    """Keeps a console in a file, each line with the time it came: what is read when a test has failed."""
    def write(line: str) -> None:
        with path.open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    return write


PAGE = 500
"""Records that a device gives at once at most."""

ALL_RECORDS = 1_000_000
"""More than any of these tests makes: a device that is starved senses all the same, so how many there are is a matter of how long it ran."""


def every(get: Callable[[str], Any], path: str) -> list[dict[str, Any]]:
    """All records that a device has behind a path of its interface, newest first: asked for page by page."""
    found: list[dict[str, Any]] = []
    while page := get(f"{path}?limit={PAGE}" + (f"&before={found[-1]['seq']}" if found else "")):
        found += page
    return found


def planted(units: Mapping[str, str]) -> list[str]:
    """Words of a machine's command line that hand it units: texts by credential (`systemd.extra-unit.NAME`, `systemd.unit-dropin.NAME`). fw_cfg takes no names of that length."""
    return [word for name, text in units.items() for word in ("-smbios", f"type=11,value=io.systemd.credential.binary:{name}={base64.b64encode(text.encode()).decode()}")]


class Device:
    """The image in a machine of its own, at 1970, without a network unless `online`; its interface. `units`: as `planted` takes them, with which a fault is planted."""

    def __init__(self, built: Built, folder: Path, config: Path | None = None, online: bool = False, units: Mapping[str, str] = MappingProxyType({})) -> None:
        self.built, self.state = built, folder / "state"
        self.disk, self.flash = prepare(ARCH, built.image, self.state)
        handed, self.token = credentials(self.state, config, [], True, "image-test")
        self._units = planted(units)
        self.port = free_port()
        self.wiring = Wiring(PROFILE.memory_mib, {self.port: API_PORT}, handed, online=online, clock="1970-01-02")

    def on(self) -> Machine:
        """Power on."""
        return Machine([*command(ARCH, self.disk, self.flash, self.wiring), *self._units], told_to(self.state / "console.log"))

    def ask(self, path: str, body: Any = None) -> Any:
        """One answer of the interface, or OSError or ValueError; with a body it is a POST."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", None if body is None else json.dumps(body).encode(), {"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def get(self, path: str, seconds: float = BOOT_S, body: Any = None) -> Any:
        """An answer of the interface, asked for until there is one."""
        def asked() -> tuple[Any] | None:
            try:
                return (self.ask(path, body),)
            except (OSError, ValueError):
                return None

        return until_sync(asked, seconds, f"an answer on {path}")[0]
