"""The scripts that take a configuration over, run as they are: in a folder instead of the data partition, with this machine's Python and group."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.provisioned import provisioned
from firmware_images import layout, scripts

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "edge_id: first\nuplink: {enabled: false}\napi: {enabled: false}\n"


def reason_against() -> str:
    """Why the scripts cannot be run here; empty where they can."""
    if shutil.which("busybox") is None:
        return "busybox is not installed"
    alone = ["busybox", "unshare", "-m", "true"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount", "true"]
    return "" if shutil.which(alone[0]) and subprocess.run(alone, capture_output=True).returncode == 0 else "no mount namespace can be made here (in a container without CAP_SYS_ADMIN)"


pytestmark = pytest.mark.skipif(bool(reason_against()), reason=reason_against())


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

    def run(self, script: str, **more: str) -> str:
        script = script.replace(layout.DATA, str(self.config.parent)).replace(layout.TOLD, str(self.top / "told")).replace("chgrp novacron ", f"chgrp {os.getgid()} ")
        if os.geteuid() != 0:
            script = script.replace("busybox unshare -m", "unshare --map-root-user --mount")
        path = f"{self.top / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            ["busybox", "sh", "-c", script], capture_output=True, text=True, cwd="/", env={"PATH": path, "CREDENTIALS_DIRECTORY": str(self.top / "given"), "PYTHONPATH": str(REPOSITORY), "HOME": str(self.top), **more}
        )
        self.said = done.stderr
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self) -> str:
        shutil.rmtree(self.top / "told", ignore_errors=True)  # which is in memory
        return self.run(scripts.PROVISION)

    def told(self) -> list[tuple[str, str]]:
        """What the hub hears of it: what came of it, and why."""
        return [(one["outcome"], one["reason"]) for one in provisioned(self.top / "told") if one["what"] == "configuration"]

    def started(self, runs: bool) -> str:
        """What is looked at after the agent's start."""
        (self.top / "bin" / "systemctl").write_text(f'#!/bin/sh\necho "$*" >> {self.top}/systemctl\n[ $1 = reboot ] || exit {0 if runs else 3}\n')
        (self.top / "bin" / "systemctl").chmod(0o755)
        return self.run(scripts.CONFIGURED.replace(f"sleep {scripts.SETTLED_S}", "sleep 0"))

    def kept(self) -> dict[str, str]:
        return {name: (self.config / name).read_text() for name in self.names() if name != "edge.yaml.json"}

    def names(self) -> list[str]:
        return sorted(item.name for item in self.config.iterdir())


def test_a_first_boot_takes_the_configuration_over_with_its_quick_form(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.give(edge_yaml=CONFIG, api_token="t")
    assert "taken over" in device.start() and device.told() == [("taken", "")]
    assert device.names() == ["api.token", "edge.yaml", "edge.yaml.json"]
    assert json.loads((device.config / "edge.yaml.json").read_text())["values"]["edge_id"] == "first"
    assert {(device.config / name).stat().st_mode & 0o777 for name in device.names()} == {0o640}
    before = (device.config / "edge.yaml.json").stat().st_mtime_ns
    assert device.start() == "" and device.names() == ["api.token", "edge.yaml", "edge.yaml.json"]  # the same again: nothing is done
    assert device.told() == []
    assert (device.config / "edge.yaml.json").stat().st_mtime_ns == before


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


def certificates(top: Path) -> dict[str, str]:
    """One that signed itself, its key, and a key that is another's."""
    for name in ("own", "other"):
        made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=first", "-keyout", str(top / f"{name}.key"), "-out", str(top / f"{name}.pem")]
        subprocess.run(made, check=True, capture_output=True)
    return {path.name: path.read_text() for path in top.iterdir() if path.suffix in (".key", ".pem")}


def secured(device: Device) -> str:
    """A configuration whose link has a certificate."""
    return f"edge_id: first\nuplink: {{url: 'mqtts://hub.example:8883', ca_file: {device.config}/ca.pem, cert_file: {device.config}/cert.pem, key_file: {device.config}/key.pem}}\napi: {{enabled: false}}\n"


def test_a_later_boot_takes_another_configuration_and_keeps_the_one_before_until_the_agent_runs(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.give(edge_yaml=CONFIG, api_token="t")
    device.start()
    device.give(edge_yaml=CONFIG + "site: north\n")
    assert "configuration taken over" in device.start()
    assert device.names() == [".before", "api.token", "edge.yaml", "edge.yaml.json"] and "north" in (device.config / "edge.yaml").read_text()
    assert json.loads((device.config / "edge.yaml.json").read_text())["values"]["site"] == "north"
    assert {(device.config / name).stat().st_mode & 0o777 for name in ("api.token", "edge.yaml", "edge.yaml.json")} == {0o640}
    assert device.start() == ""  # the power was cut before the agent ran
    assert (device.config / ".before" / "edge.yaml").read_text() == CONFIG
    device.give(edge_yaml=CONFIG + "site: south\n")  # and somebody changed it once more: what is gone back to is what the agent ran with
    assert "taken over" in device.start() and "south" in (device.config / "edge.yaml").read_text()
    assert {path.name: path.read_text() for path in (device.config / ".before").iterdir() if path.suffix != ".json"} == {"api.token": "t", "edge.yaml": CONFIG}
    assert "runs with its new configuration" in device.started(True)
    assert device.names() == ["api.token", "edge.yaml", "edge.yaml.json"]


def test_a_configuration_with_which_the_agent_does_not_start_is_gone_back_from_and_not_taken_again(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.give(edge_yaml=CONFIG, api_token="t")
    device.start()
    device.give(edge_yaml=CONFIG + "site: north\n", ca_pem="new")
    device.start()
    assert "going back" in device.started(False) and (tmp_path / "systemctl").read_text().splitlines()[-1] == "reboot"
    assert "did not start" in device.start() and device.told() == [("refused", "it is the one with which the agent did not start")]
    assert device.kept() == {"api.token": "t", "edge.yaml": CONFIG, "ca.pem": "new", ".refused": (device.config / ".refused").read_text()}
    assert json.loads((device.config / "edge.yaml.json").read_text())["text"] == CONFIG
    assert "did not start" in device.start() and device.kept()["edge.yaml"] == CONFIG
    device.give(edge_yaml=CONFIG + "site: south\n")  # mended
    assert "taken over" in device.start() and "runs with" in device.started(True)
    assert sorted(device.kept()) == ["api.token", "ca.pem", "edge.yaml"] and "south" in device.kept()["edge.yaml"]


def test_a_certificate_is_renewed_by_its_two_files_together(tmp_path: Path) -> None:
    device = Device(tmp_path)
    pem = certificates(tmp_path)
    device.give(edge_yaml=secured(device), ca_pem=pem["own.pem"], cert_pem=pem["own.pem"], key_pem=pem["own.key"])
    assert "taken over" in device.start()
    for path in (tmp_path / "given").iterdir():
        path.unlink()
    before = device.kept()
    device.give(cert_pem=pem["other.pem"])
    assert "nothing was taken over" in device.start() and "is not the key of" in device.said and device.kept() == before
    device.give(cert_pem="-----BEGIN")
    assert "nothing was taken over" in device.start() and "are no certificate and its key" in device.said and device.kept() == before
    device.give(cert_pem=pem["other.pem"], key_pem=pem["other.key"], ca_pem="none")
    assert "nothing was taken over" in device.start() and "is no certificate" in device.said and device.kept() == before
    device.give(ca_pem=pem["own.pem"])
    assert "taken over" in device.start() and device.started(True)
    assert device.kept() == {**before, "cert.pem": pem["other.pem"], "key.pem": pem["other.key"]}


@pytest.mark.parametrize(("files", "said", "heard"), [
    ({"edge_yaml": CONFIG.replace("first", "other")}, 'edge_id is "other", and this device is "first"', 'edge_id is "other"'),
    ({"edge_yaml": CONFIG + "nise: 3\n"}, "see above", "edge.yaml: nise: is unknown; did you mean nice?"), ({"edge_yaml": CONFIG + "#" * (1 << 20)}, "larger than", "edge.yaml is larger than"),
    ({"edge_yaml": CONFIG.replace("api: {enabled: false}", "api: {token_file: /nowhere/api.token}")}, "see above", "api.token_file"), ({"edge_yaml": ""}, "not among the files", "not among the files"),
])
def test_what_cannot_be_used_changes_nothing_and_is_told(tmp_path: Path, files: dict[str, str], said: str, heard: str) -> None:
    device = Device(tmp_path)
    device.give(edge_yaml=CONFIG, api_token="t")
    device.start()
    before, quick = device.kept(), (device.config / "edge.yaml.json").read_bytes()
    device.give(api_token="u", **files)
    told = device.start()
    assert said in told and "nothing was taken over" in told, told
    assert [outcome for outcome, _ in device.told()] == ["refused"] and heard in device.told()[0][1]
    assert device.kept() == before and (device.config / "edge.yaml.json").read_bytes() == quick and device.names() == ["api.token", "edge.yaml", "edge.yaml.json"]


def test_a_device_alone_says_that_it_has_no_configuration(tmp_path: Path) -> None:
    device = Device(tmp_path)
    assert "no configuration" in device.start() and device.names() == []
    device.give(api_token="t")  # one that is not whole is none
    told = device.start()
    assert "edge.yaml is not among the files" in told and "no configuration" in told and device.names() == []


COUNTED = 'busybox() { echo "$1" >> "$STEPS"; [ "$(command busybox wc -l < "$STEPS")" -ne $CUT ] || kill -9 $$; command busybox "$@"; }\n'
"""Counts what a script does, and kills it before the step of that number."""


def test_wherever_the_power_is_cut_a_configuration_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    """Killed before each step that changes anything, and begun again: what the agent finds is never a mixture, and what it is to go back to is whole."""
    old, new = {"api.token": "old", "edge.yaml": CONFIG}, {"api.token": "new", "edge.yaml": CONFIG + "site: north\n"}
    device = Device(tmp_path)
    device.give(edge_yaml=old["edge.yaml"], api_token=old["api.token"])
    device.start()
    shutil.copytree(device.config, tmp_path / "first")
    device.give(edge_yaml=new["edge.yaml"], api_token=new["api.token"])
    script = scripts.PROVISION.replace("set -u\n", f"set -u\n{COUNTED}", 1)

    def files(folder: Path) -> dict[str, str]:
        return {name: (folder / name).read_text() for name in old}

    def cut_before(number: int) -> list[str]:
        shutil.rmtree(device.config)
        shutil.copytree(tmp_path / "first", device.config)
        steps = tmp_path / "steps"
        steps.unlink(missing_ok=True)
        try:
            device.run(script, CUT=str(number), STEPS=str(steps))
        except AssertionError:
            assert number
        return steps.read_text().split()

    whole = cut_before(0)
    assert files(device.config) == new
    seen = []
    for number in range(whole.index("mv") + 1, len(whole) + 1):  # before the first `mv` nothing is touched but what is looked at
        assert len(cut_before(number)) == number
        if not (device.config / ".take").exists():
            assert files(device.config) in (old, new)
            seen.append(files(device.config) == new)
        device.start()
        assert files(device.config) == new and files(device.config / ".before") == old, number
    assert {False, True} == set(seen) and len(whole) > 25
