"""What the builder and the boot refuse: in one line with field and remedy, before anything is done."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from firmware_images import boot, build, bundles, cli, configuration, recipes, room, tools
from firmware_images.errors import FirmwareError
from firmware_images.machine import prepare
from tools.bench.harness import ROOT

AMD64, DEVICE = recipes.architecture("amd64"), recipes.profile("device")


@pytest.mark.parametrize(("arguments", "words"), [
    (["build", "--arch", "vax"], "arch: 'vax' is unknown; take one of amd64"), (["build", "--profile", "toaster"], "profile: 'toaster' is unknown"), (["boot", "--memory", "8"], "memory: 8 MiB"),
    (["boot"], "image: there is none"), (["boot", "--config", "/nonexistent.yaml"], "config:"), (["build", "--sequence", "-1"], "sequence: -1; give 0 to 9999999999"), (["build", "--variant", "../x"], "variant: '../x' is no name"),
    (["boot", "--port", "99999"], "port: 99999; give 1 to 65535"), (["boot", "--port", "-1"], "port: -1; give 1 to 65535"), (["boot", "--profile", "gateway", "--devices-port", "-1"], "devices-port: -1; give 1 to 65535, or leave --devices-port out"), (["boot", "--devices-port", "1"], "devices-port: an image of device has no broker"), (["boot", "--clock", "noon"], "clock: 'noon' is no date; give one such as 1970-01-02"),
    (["bundle", "--output", "/nonexistent/bundle"], "image:"), (["bundle", "--output", "x", "--tries", "0"], "tries: 0; give 1 to 9 with --tries"), (["bundle", "--output", "x", "--gate", "1"], "gate: 1; give 30 to 86400 with --gate"),
    (["bundle", "--output", "x", "--profile", "toaster"], "profile: 'toaster' is unknown"), (["containers", "--arch", "vax"], "arch: 'vax' is unknown"), (["containers", "--service", "x"], "service: 'x' is unknown; take one of edge, hub"),
    (["containers", "--mode", "x"], "mode: 'x' is unknown; take one of production, development"), (["boot", "--arch", "vax"], "arch: 'vax' is unknown"), (["boot", "--profile", "toaster"], "profile: 'toaster' is unknown"),
])
def test_bad_input_is_one_clear_line_before_anything_is_done(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments, "--home", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["build", "containers"])
@pytest.mark.parametrize(("home", "words"), [("file", "file is no folder"), ("file/in", "file is no folder"), ("link", "link cannot be made or written (File exists)")])
def test_a_home_that_cannot_be_used_is_one_clear_line(command: str, home: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find", lambda program: "/bin/true")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert cli.main([command, "--home", str(tmp_path / home)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("home: ") and words in told[-1] and told[-1].endswith("give another one with --home")


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir(0o555)
    if os.geteuid() == 0:  # whom rights do not stop
        monkeypatch.setattr(room.os, "access", lambda path, mode: bool(os.stat(path).st_mode & 0o200))
    with pytest.raises(FirmwareError, match=r"^state: .*theirs cannot be written; give another one with --state$"):
        room.ready(tmp_path / "theirs" / "new" / "machine", "state", "--state")


def test_a_bundle_has_a_place_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_contents", lambda folder: ({}, {"root": b""}))
    (tmp_path / "file").touch()
    for target, words in ((tmp_path, "is a folder; give the name of the bundle's file"), (tmp_path / "file" / "x", "is no folder; give another one with --output")):
        with pytest.raises(FirmwareError, match=f"^output: .*{words}"):
            bundles.bundle(tmp_path, None, tmp_path / "key", target)


def test_a_key_that_cannot_sign_is_refused_before_images_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_contents", lambda folder: ({}, {"root": b""}))
    monkeypatch.setattr(bundles, "pieces", lambda data, base: pytest.fail("compared"))
    key = tmp_path / "key"
    with pytest.raises(FirmwareError, match="^key: .*key is no file; give an Ed25519 private key .PEM. with --key$"):
        bundles.bundle(tmp_path, None, key, tmp_path / "bundle")
    key.write_text("no key\n")
    with pytest.raises(FirmwareError, match=r"(?s)^key: openssl failed: .*; give an Ed25519 private key .PEM. with --key$"):
        bundles.bundle(tmp_path, None, key, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [key]


def test_a_disk_that_becomes_full_is_one_clear_line_and_our_own_faults_are_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(number: int) -> None:
        def build_it(*arguments: object) -> None:
            raise OSError(number, os.strerror(number), "some/file")

        monkeypatch.setattr(build, "build", build_it)

    fails(errno.ENOSPC)
    assert cli.main(["build", "--home", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "space: some/file cannot be written or read (No space left on device); make room, or give another folder (--home, --state, --output)\n"
    fails(errno.ECHILD)
    with pytest.raises(ChildProcessError):
        cli.main(["build", "--home", str(tmp_path)])


def test_a_port_that_another_has_is_refused_and_one_that_is_free_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server((boot.LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["boot", "--home", str(tmp_path), "--port", str(port)]) == 2
        assert f"port: {port} of 127.0.0.1 cannot be had (Address already in use); give another one" in capsys.readouterr().err
    assert boot.usable_port(port) == port and boot.usable_port(0)


def test_missing_tools_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tools, "find", lambda program: None if program in ("mcopy", "mmd", "mksquashfs") else "/bin/true")
    with pytest.raises(FirmwareError, match=r"mksquashfs, mmd, mcopy not found; as root, apt install --no-install-recommends mtools squashfs-tools"):
        build.preflight(tmp_path, AMD64, DEVICE)


@pytest.mark.parametrize(("arch", "without", "words"), [
    ("amd64", "qemu-system-x86_64", "tools: qemu-system-x86_64 not found; as root, apt install --no-install-recommends qemu-system-x86"), ("riscv64", "", "tools: no {tmp}/none; as root, apt install --no-install-recommends u-boot-qemu"),
])
def test_a_machine_without_its_programs_or_firmware_is_refused_before_it_has_a_folder(arch: str, without: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tools, "find", lambda program: None if program == without else "/bin/true")
    wanted = recipes.ARCHITECTURES[arch]
    monkeypatch.setitem(recipes.ARCHITECTURES, arch, replace(wanted, firmware=(str(tmp_path / "none"), "")))
    folder = build.output(tmp_path, wanted, DEVICE)
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    assert cli.main(["boot", "--home", str(tmp_path), "--arch", arch]) == 2
    assert capsys.readouterr().err == words.format(tmp=tmp_path) + "\n"
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


def test_no_space_is_said_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tools, "find", lambda program: "/bin/true")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 20))
    with pytest.raises(FirmwareError, match=r"^space: .*100 MiB free, 2368 are wanted; make room, or give another folder with --home$"):
        build.preflight(tmp_path / "new", AMD64, DEVICE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["build", "containers"])
def test_a_small_disk_is_refused_before_the_build_begins(command: str, tmp_path: Path) -> None:
    """A real one: a file system of 64 MiB in a namespace of the command's own."""
    wrap = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'mount -t tmpfs -o size=64m none {tmp_path} && "$@"; code=$?; ls -A {tmp_path}; exit $code', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*wrap, "true"], capture_output=True).returncode:
        pytest.skip("no mount in a namespace of one's own here (unshare, of util-linux)")
    if tools.missing(tools.BUILD):
        pytest.skip(f"not installed: {', '.join(tools.missing(tools.BUILD))}")
    done = subprocess.run([*wrap, sys.executable, "-m", "firmware_images", command, "--home", str(tmp_path / "home")], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("space: ") and "home has 64 MiB free" in done.stderr and "make room, or give another folder with --home" in done.stderr, done


def test_a_path_without_the_programs_is_refused_before_the_build_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, with a PATH that has nothing, and nothing where it looks besides."""
    program = "from firmware_images import cli, tools; import sys; tools.SBIN = (); sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", program, "build", "--home", str(tmp_path / "home")], cwd=ROOT, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert done.stderr == f"tools: {', '.join(tools.BUILD)} not found; as root, apt install --no-install-recommends apt coreutils dosfstools dpkg e2fsprogs kmod mtools openssl squashfs-tools\n"


@pytest.mark.parametrize(("text", "words"), [
    ("edge_id: a\nuplink: {enabled: false}\n", "no login"), ("edge_id: a\n", "no login"), ("uplink: {url: 'mqtt://hub:1883'}\n", "edge_id is left out"), ("edge_id: a\nuplink: {urll: x}\n", "urll"),
    ("edge_id: a\nuplink: {url: 'mqtt://hub:1883'}\n", ""), ("edge_id: a\nuplink: {enabled: false}\nbus: {url: 'mqtt://10.0.0.2:1883'}\n", ""),
    ("edge_id: a\nuplink: {enabled: false}\napi: {host: 0.0.0.0, token_file: /x}\n", ""),
])
def test_a_configuration_that_leaves_a_device_out_of_reach_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(text)
    if words:
        with pytest.raises(FirmwareError, match=words):
            configuration.check(path)
    else:
        configuration.check(path)


CONFIG = "/var/lib/novacron/config"


@pytest.mark.parametrize(("keys", "given", "words"), [
    ("api: {host: 0.0.0.0, token_file: /etc/novacron/api.token}", [], rf"^config: api.token_file is /etc/novacron/api.token, which a device does not have; name one of ca.pem, .* in {CONFIG}, and give it with --credential$"),
    (f"uplink: {{url: 'mqtts://hub:8883', ca_file: {CONFIG}/ca.pem}}", [], rf"^config: uplink.ca_file is {CONFIG}/ca.pem, and the device is given none; give --credential novacron.ca.pem=FILE too$"),
    (f"uplink: {{url: 'mqtts://hub:8883', cert_file: {CONFIG}/cert.pem, key_file: {CONFIG}/mine.pem}}", ["cert.pem"], r"^config: uplink.key_file .* does not have"),
    (f"uplink: {{url: 'mqtts://hub:8883', ca_file: {CONFIG}/ca.pem}}", ["ca.pem"], ""), ("uplink: {url: 'mqtts://hub:8883', ca_file: /etc/ssl/certs/ca-certificates.crt}", [], ""),
    (f"uplink: {{url: 'mqtt://hub'}}\nbus: {{url: 'mqtts://gw', ca_file: {CONFIG}/ca.pem}}", [], r"^config: bus.ca_file .* is given none"), (f"uplink: {{url: 'mqtt://hub', password_file: {CONFIG}/uplink.password}}", [], r"^config: uplink.password_file .* is given none"),
    (f"uplink: {{url: 'mqtt://hub'}}\nupdates: {{ca_file: {CONFIG}/ca.pem}}", [], r"^config: updates.ca_file .* is given none"), (f"uplink: {{url: 'mqtt://hub', password_file: {CONFIG}/uplink.password}}\nupdates: {{ca_file: {CONFIG}/ca.pem}}", ["uplink.password", "ca.pem"], ""),
    (f"api: {{host: 0.0.0.0, token_file: {CONFIG}/api.token}}", [], ""), ("uplink: {url: 'mqtt://hub:1883', ca_file: /x}", [], ""), ("api: {enabled: false, token_file: /x}\nuplink: {url: 'mqtt://hub'}", [], ""),
])
def test_a_configuration_that_names_a_file_which_the_device_will_not_have_is_refused(tmp_path: Path, keys: str, given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, before anything is done; what it takes ends at the image, which is not there."""
    path, home, more = tmp_path / "edge.yaml", tmp_path / "home", []
    path.write_text(f"edge_id: a\n{keys}\n" if "uplink" in keys else f"edge_id: a\nuplink: {{url: 'mqtt://hub:1883'}}\n{keys}\n")
    for name in given:
        (tmp_path / name).touch()
        more += ["--credential", f"novacron.{name}={tmp_path / name}"]
    assert cli.main(["boot", "--home", str(home), "--config", str(path), *more]) == 2
    assert re.match(words or "^image: there is none", capsys.readouterr().err.rstrip()) and not home.exists()
    if words:  # one that has been started keeps its files
        (home / "amd64-device" / "machine").mkdir(parents=True)
        (home / "amd64-device" / "machine" / "disk.img").touch()
        assert cli.main(["boot", "--home", str(home), "--config", str(path), *more]) == 2
        assert capsys.readouterr().err.startswith("image: there is none")


@pytest.mark.parametrize(("word", "words"), [("novacron.ca.pem", "cannot be used; give NAME=FILE"), ("novacron.cacert=FILE", "a device takes no novacron.cacert; give novacron. and one of ca.pem, cert.pem"), ("ca.pem=FILE", "cannot be used")])
def test_a_credential_that_a_device_would_not_look_at_is_refused(tmp_path: Path, word: str, words: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FirmwareError, match=f"^credential: .*{words}"):
        boot.credentials(tmp_path, None, [word.replace("FILE", str(tmp_path / "file"))], False, "a")


def test_what_lets_devices_in_is_taken_by_an_image_with_a_broker_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    word = f"novacron.broker.passwords={tmp_path / 'file'}"
    assert "novacron.broker.passwords" in boot.credentials(tmp_path, None, [word], False, "a", boot.taken(recipes.profile("gateway")))[0]
    with pytest.raises(FirmwareError, match=r"a device takes no novacron.broker.passwords"):
        boot.credentials(tmp_path, None, [word], False, "a", boot.taken(recipes.profile("device")))


def test_a_gateway_that_is_given_no_configuration_listens_to_its_own_broker(tmp_path: Path) -> None:
    for bus, url in ((True, "mqtt://127.0.0.1:1883"), (False, "")):
        (tmp_path / "edge.yaml").write_text(boot.plain("gateway-amd64", "", bus))
        assert configuration.check(tmp_path / "edge.yaml", bus).bus.url == url


@pytest.mark.parametrize(("hub", "url"), [
    ("mqtt://127.0.0.1:1883", "mqtt://10.0.2.2:1883"), ("mqtt://localhost", "mqtt://10.0.2.2"), ("mqtts://[::1]:8883", "mqtts://10.0.2.2:8883"), ("mqtt://a:b@127.0.0.1:1883", "mqtt://a:b@10.0.2.2:1883"), ("mqtt://hub:1883", "mqtt://hub:1883"),
])
def test_a_device_that_is_given_a_hub_alone_finds_it_also_on_this_machine(tmp_path: Path, hub: str, url: str) -> None:
    (tmp_path / "edge.yaml").write_text(boot.plain("device-amd64", hub))
    config = configuration.check(tmp_path / "edge.yaml")
    assert config.uplink.enabled and config.uplink.url == url and config.edge_id == "device-amd64"
    (tmp_path / "edge.yaml").write_text(boot.plain("device-amd64"))
    assert not configuration.check(tmp_path / "edge.yaml").uplink.enabled


@pytest.mark.parametrize("hub", ["127.0.0.1:1883", "http://hub:8460", "mqtt://", "mqtt://hub:port", "mqtt://hub:99999", 'mqtt://hub"}'])
def test_what_is_no_address_of_a_hub_is_refused(hub: str) -> None:
    with pytest.raises(FirmwareError, match="no address of a broker"):
        boot.plain("device-amd64", hub)


def test_a_machine_that_has_been_started_is_given_another_configuration_and_not_another_name(tmp_path: Path) -> None:
    state = tmp_path / "machine"
    boot.settle(state, "edge_id: a\n")
    assert boot.settle(state, "edge_id: b\n").read_text() == "edge_id: b\n"  # it has not been started yet
    (state / "disk.img").touch()
    boot.settle(state, "edge_id: b\nsite: north\n")
    with pytest.raises(FirmwareError, match="edge_id is a, and the machine in .* is b"):
        boot.settle(state, "edge_id: a\n")
    assert (state / boot.GIVEN).read_text() == "edge_id: b\nsite: north\n"


def test_a_machines_disk_is_made_larger_and_never_smaller(tmp_path: Path) -> None:
    image, state = tmp_path / "disk.img", tmp_path / "machine"
    image.write_bytes(b"image" + bytes((8 << 20) - 5))
    arch = replace(AMD64, firmware=(__file__, ""))
    disk, _ = prepare(arch, image, state, 16)
    assert disk.stat().st_size == 16 << 20 and disk.read_bytes()[: 8 << 20] == image.read_bytes()
    assert prepare(arch, image, state)[0].stat().st_size == 16 << 20  # as it was left
    with pytest.raises(FirmwareError, match=r"^disk: 12 MiB, and the disk of .* has 16; give more, or leave --disk out$"):
        prepare(arch, image, state, 12)
    for wrong in (-1, 1 << 40):
        with pytest.raises(FirmwareError, match=r"^disk: "):
            prepare(arch, image, tmp_path / "other", wrong)
    assert not (tmp_path / "other").exists()


def test_a_machine_gets_no_folder_whose_name_qemu_would_cut(tmp_path: Path) -> None:
    with pytest.raises(FirmwareError, match=r"^state: .*comma.*give another one with --state$"):
        boot.settle(tmp_path / "a,b", "edge_id: a\n")
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_does_not_start_is_a_failure_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build.output(tmp_path, AMD64, DEVICE)
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    monkeypatch.setattr(boot, "require", lambda arch: None)
    monkeypatch.setattr(boot, "prepare", lambda arch, image, state, disk_mib: (Path("disk"), Path("flash")))
    for status in (1, 0):
        monkeypatch.setattr(boot, "command", lambda *arguments, status=status: ["sh", "-c", f"echo no such machine; exit {status}"])
        assert cli.main(["boot", "--home", str(tmp_path), "--accel", "tcg"]) == 2 * status
        told = capsys.readouterr().err
        assert "no such machine" in told and ("machine: QEMU ended with status 1" in told) == bool(status)


def test_an_image_of_other_code_than_this_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What measures or tests an image would tell of code that is no more. That it is built is seen by what a build refuses first: here there is no program for it."""
    (tmp_path / "keys" / "trusted").mkdir(parents=True)
    (tmp_path / "keys" / "trusted" / "one.pem").write_bytes(b"one")
    folder = build.output(tmp_path, AMD64, DEVICE)
    folder.mkdir()
    told = {"sources": build.sources(tmp_path), "sequence": 3}
    monkeypatch.setattr(tools, "find", lambda program: None)

    def asked(said: dict[str, object]) -> str:
        (folder / "manifest.json").write_text(json.dumps(said))
        try:
            return str(build.current(tmp_path, AMD64, DEVICE, print, 3).image.relative_to(tmp_path))
        except FirmwareError as error:
            return error.field

    assert asked(told) == "amd64-device/disk.img"
    assert asked({**told, "sequence": 2}) == asked({**told, "sources": "0" * 64}) == asked({"sequence": 3}) == "tools"
    (tmp_path / "keys" / "trusted" / "two.pem").write_bytes(b"two")
    assert asked(told) == "tools", "it does not trust the second key"
