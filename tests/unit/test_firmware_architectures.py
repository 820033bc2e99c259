"""What differs between architectures: the machine's command line, where a kernel is, what the lock gives, how files are handed over, and whether a kernel comes up is told by its console."""

import subprocess
from pathlib import Path

import pytest
import yaml

from firmware_images import build, configuration, containers, initrd, machine, recipes
from firmware_images.boot import hand_over
from firmware_images.layout import ESP_NAME, PROVISIONED
from firmware_images.tree import Tree
from tests.system.image_device import PAGE, every
from tools.bench import image_inside
from tools.bench.harness import ROOT

ARCHITECTURES = list(recipes.ARCHITECTURES.values())


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: str(arch.name))
def test_a_machine_starts_by_its_firmware_with_the_memory_that_this_wants(arch: recipes.Architecture) -> None:
    memory = recipes.memory_mib(arch, recipes.profile("device"))
    line = machine.command(arch, Path("disk"), Path("flash"), machine.Wiring(memory))
    assert line[0] == arch.qemu and line[line.index("-m") + 1] == f"{memory}M" and memory >= max(192, arch.least_mib)
    flash = [word for word in line if word.startswith("if=pflash")]
    said = [word for word in line if word.startswith("type=11,")]
    direct = machine.command(arch, Path("disk"), Path("flash"), machine.Wiring(memory, direct=(Path("linux"), Path("initrd"), "quiet")))
    assert said == ([f"type=11,value=io.systemd.boot.kernel-cmdline-extra={arch.emulated}"] if arch.emulated else []) and direct[direct.index("-append") + 1] == f"quiet {arch.emulated}".rstrip()
    assert len(flash) == 2 if arch.firmware[1] else line[line.index("-kernel") + 1] == arch.firmware[0] and not flash


def test_a_kernel_is_found_in_boot_or_beside_its_modules_and_only_one() -> None:
    for path in ("/boot/vmlinuz-6.12-amd64", "/usr/lib/modules/7.2-riscv64/vmlinuz"):
        tree = Tree()
        tree.file(path, b"kernel")
        tree.file("/usr/lib/modules/7.2-riscv64/kernel/vmlinuz", b"no kernel")
        version, entry = initrd.kernel_of(tree)
        assert version in path and entry.data == b"kernel"
        initrd.drop_kernel(tree)
        assert path not in tree and "/usr/lib/modules/7.2-riscv64/kernel/vmlinuz" in tree
        with pytest.raises(ValueError, match="0 kernels"):
            initrd.kernel_of(tree)
    tree.file("/boot/vmlinuz-1", b"")
    tree.file("/boot/vmlinuz-2", b"")
    with pytest.raises(ValueError, match="2 kernels"):
        initrd.kernel_of(tree)


def test_what_describes_boards_stays_out_and_their_drivers_do_not() -> None:
    device = recipes.profile("device")
    assert all(recipes.unwanted(f"/usr/lib/modules/7.2/{name}", device) for name in ("dtb/sifive/a.dtb", "System.map"))
    assert not recipes.unwanted("/usr/lib/modules/7.2/vmlinuz", device) and not recipes.unwanted("/usr/lib/modules/7.2/modules.builtin", device)


def test_a_kernel_that_lacks_what_a_profile_needs_is_noticed_and_how_it_was_made_stays_out() -> None:
    for config in ("/boot/config-7.2", "/usr/lib/modules/7.2/config"):
        tree = Tree()
        tree.file("/usr/lib/modules/7.2/modules.dep", "kernel/drivers/nvme/target/nvmet.ko.xz: kernel/lib/a.ko.xz\n")
        tree.file("/usr/lib/modules/7.2/modules.builtin", "kernel/drivers/net/tun.ko\n")
        tree.file(config, "CONFIG_LIVEPATCH=y\n# CONFIG_OTHER is not set\n")
        assert not initrd.lacking(tree, "7.2", ("nvmet", "tun"), ("LIVEPATCH",))
        assert initrd.lacking(tree, "7.2", ("nvmet", "rdma_rxe"), ("LIVEPATCH", "OTHER")) == ["rdma_rxe", "CONFIG_OTHER"]
        initrd.drop_kernel(tree)
        assert config not in tree and "/usr/lib/modules/7.2/modules.dep" in tree


@pytest.mark.parametrize("service", list(containers.SERVICES.values()), ids=lambda service: str(service.name))
def test_the_lock_gives_one_wheel_of_each_name_for_the_targets_python(service: containers.Service) -> None:
    lock = (ROOT / "requirements" / "run.lock").read_text()
    for python in ((3, 11), (3, 13)):
        lines = recipes.locked(lock, service.wheels, python).splitlines()
        names = [line.split("==")[0] for line in lines if "==" in line]
        assert sorted(names) == sorted(service.wheels) and not any(";" in line for line in lines)
    two = "one==1 ; python_full_version < '3.12' \\\n    --hash=sha256:a\none==2 ; python_full_version >= '3.12' \\\n    --hash=sha256:b\n"  # control: one for older and one for newer Pythons
    assert [recipes.locked(two, ["one"], python).split()[0] for python in ((3, 11), (3, 13))] == ["one==1", "one==2"]


def test_files_go_into_the_boot_partition_where_there_is_no_other_way(tmp_path: Path) -> None:
    if build.tools.missing(["mcopy", "mkfs.vfat", "mmd"]):
        pytest.skip("no mtools or dosfstools")
    disk, start = tmp_path / "disk.img", 1 << 20
    esp = tmp_path / "esp"
    with esp.open("wb") as file:
        file.truncate(40 << 20)
    for words in (["mkfs.vfat", "-F", "32", "-s", "1", str(esp)], ["mmd", "-i", str(esp), "::/novacron"]):
        subprocess.run([str(build.tools.find(words[0])), *words[1:]], check=True, capture_output=True)
    disk.write_bytes(bytes(start) + esp.read_bytes())
    (tmp_path / "yaml").write_text("edge_id: a\n")
    found = {"novacron.edge.yaml": tmp_path / "yaml", "novacron.report": tmp_path / "yaml"}
    built = build.Built(disk, {"partitions": {ESP_NAME: {"start": start, "size": 40 << 20}}})
    for arch in ARCHITECTURES:
        left = hand_over(arch, built, disk, found)
        assert left == (found if arch.fw_cfg else {})
    for name in ("edge.yaml", "report"):
        assert name in PROVISIONED
        said = subprocess.run(["mtype", "-i", f"{disk}@@{start}", f"::/novacron/{name}"], capture_output=True, check=True)
        assert said.stdout == b"edge_id: a\n"


def test_kvm_is_not_taken_for_another_machine_or_where_it_is_not_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.os, "access", lambda *_: True)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    assert machine.kvm_boots(recipes.architecture("arm64"), tmp_path, tmp_path) == "this machine is no arm64"
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert "not ours" in machine.kvm_boots(recipes.architecture("amd64"), tmp_path, tmp_path)


def test_the_bench_inside_an_image_has_a_configuration_that_a_device_takes(tmp_path: Path) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(yaml.safe_dump(image_inside.configuration(1883, 1884)))
    config = configuration.check(path)
    assert config.bus.url == "mqtt://10.0.2.2:1883" and config.uplink.url == "mqtt://10.0.2.2:1884" and not config.devices.host.enabled


def test_a_devices_records_are_read_page_by_page() -> None:
    rows = [{"seq": seq} for seq in range(2 * PAGE + 8, 0, -1)]

    def get(path: str) -> list[dict[str, int]]:
        asked = {name: int(value) for name, value in (word.split("=") for word in path.partition("?")[2].split("&"))}
        return [row for row in rows if row["seq"] < asked.get("before", len(rows) + 1)][: asked["limit"]]

    assert every(get, "/api/v1/decisions") == rows


def test_a_hubs_decisions_are_read_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"seq": seq, "body": {"n": seq}} for seq in range(1, 2 * image_inside.PAGE + 8)]
    asked: list[str] = []

    def get(_self: image_inside.HubProcess, path: str) -> list[dict[str, object]]:
        asked.append(path)
        after = int(path.rpartition("after=")[2])
        return [row for row in rows if row["seq"] > after][: image_inside.PAGE]

    monkeypatch.setattr(image_inside.HubProcess, "get", get)
    assert list(image_inside.HubProcess(tmp_path).decisions("e")) == [row["seq"] for row in rows]
    assert len(asked) == 4
