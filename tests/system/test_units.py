"""Hub and edge under systemd, installed as docs/operate.md says, on a plain Debian: this machine's own root in a guest whose first process is systemd."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.system import own_root


def reason_against() -> str:
    """Why it cannot be seen here; empty where it can."""
    needed = {"mosquitto": "mosquitto", "openssl": "openssl", "runc": "runc"}
    absent = next((package for program, package in needed.items() if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None), "")
    if not Path("/lib/systemd/systemd").exists():
        return "no systemd (as root: apt install systemd)"
    return f"no {absent} (as root: apt install {absent})" if absent else own_root.reason_against()


pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(2400), pytest.mark.skipif(bool(reason_against()), reason=reason_against())]

MEMORY_MIB = 2048
GUEST_S = 2000.0
"""Longest wait: two minutes on an idle machine (2026-11-29)."""


def there(folder: Path, control: str) -> own_root.Ended:
    return own_root.run(folder, [sys.executable, "-m", "tests.system.units_program", control], MEMORY_MIB, GUEST_S, systemd=True)


def test_hub_and_edge_run_as_they_are_installed(tmp_path: Path) -> None:
    told = there(tmp_path, "-")
    assert told.code == 0, told.said[-20_000:]


@pytest.mark.parametrize(("control", "words"), [("walls", "the container says numbers did not happen"), ("mode", "tls-key: /etc/novacron/hub.key cannot be read")])
def test_what_is_installed_wrongly_is_seen(control: str, words: str, tmp_path: Path) -> None:
    """The control: one more wall around the agent; a key that the hub's user cannot read, which the hub says."""
    told = there(tmp_path, control)
    assert told.code == 1 and words in told.said, told.said[-20_000:]
