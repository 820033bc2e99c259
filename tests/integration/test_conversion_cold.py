"""A cold conversion with real disks: an image becomes a disk that boots and runs its program as the `spec` says, and comes back as an image with the same files."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.conversion import cold
from edge_runtime.workloads.drivers import qemu_kernel
from edge_runtime.workloads.drivers.face import Key, Order, Refused
from edge_runtime.workloads.drivers.microvm_templates import tsc_khz
from edge_runtime.workloads.images import ImageStore
from tests.integration.container_side import base, made_store
from tests.integration.microvm_side import kernel_folder, reason_against
from tests.unit.workloads.image_side import layout

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), pytest.mark.timeout(600)]

BOOT_S = 300.0
"""For a machine under emulation on a busy host."""

SAYS = "echo hello $X; id -u; pwd; cat /data/file; stat -c %u:%a /srv/old/a; echo new > /scratch/new && echo wrote; ls -A / | grep -c novacron; exit 7"


def order(folder: Path, **more: Any) -> Order:
    (folder / "volume").mkdir(exist_ok=True)
    (folder / "volume/file").write_text("from the node\n")
    spec = {"command": ["sh", "-c", SAYS], "env": {"X": "world"}, "user": "app", "cwd": "/tmp", "mounts": [{"target": "/data", "source": str(folder / "volume")}, {"target": "/scratch", "tmpfs": "1Mi"}], "limits": {"memory": "64Mi"}}
    return Order(Key("cold", 1), "box:1", {"disk": 32 << 20}, spec | more)


def planned(store: ImageStore, folder: Path, **more: Any) -> cold.Plan:
    return cold.plan(store, order(folder, **more), (str(folder / "volume"),))


async def test_an_image_becomes_a_disk_that_boots_and_runs_its_program(tmp_path: Path) -> None:
    store = made_store(tmp_path)
    found = planned(store, tmp_path)
    disk, volume = await asyncio.to_thread(cold.to_disk, found, tmp_path / "disk", qemu_kernel.find(kernel_folder()))
    (tmp_path / "parts").mkdir()
    kernel, initramfs, document = cold.boot_parts(disk, tmp_path / "parts")
    words = cold.boot_command(disk, [volume], kernel, initramfs, document, tsc_khz=tsc_khz())
    ran = await asyncio.to_thread(subprocess.run, words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BOOT_S)
    lines = [line.strip() for line in ran.stdout.splitlines()]
    assert lines[lines.index("hello world"):][:8] == ["hello world", "1000", "/tmp", "from the node", "0:755", "wrote", "1", "novacron: exit 7"], ran.stdout + ran.stderr
    store.close()


async def test_the_disk_comes_back_as_an_image_with_the_same_files_and_program(tmp_path: Path) -> None:
    store = made_store(tmp_path)
    found = planned(store, tmp_path)
    disk, _ = await asyncio.to_thread(cold.to_disk, found, tmp_path / "disk", qemu_kernel.find(kernel_folder()))
    told = cold.to_image(disk, tmp_path / "layout", "back:1")
    assert [loss["field"] for loss in told["lost"]] == ["spec.mounts"]
    back = store.add(tmp_path / "layout", "back:1")
    assert back.config.args == ("sh", "-c", SAYS) and back.config.user == "1000:1001" and back.config.cwd == "/tmp" and "X=world" in back.config.env

    def seen(top: Path) -> dict[str, Any]:
        rows = {}
        for path in sorted(top.rglob("*")):
            about = path.lstat()
            content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
            rows[str(path.relative_to(top))] = (about.st_mode, about.st_uid, about.st_gid, content)
        return rows

    before, after = seen(store.lower(store.find("box:1"))[0]), seen(store.lower(back)[0])
    assert {name: row for name, row in after.items() if name not in ("dev", "proc", "sys")} == before
    store.close()


def test_what_is_lost_is_said_before_anything_is_written(tmp_path: Path) -> None:
    store = made_store(tmp_path)
    found = planned(store, tmp_path, capabilities=["CAP_CHOWN"], limits={"cpu": "500m"}, network={"ports": [{"port": 80}]})
    assert {loss.field for loss in found.lost} >= {"isolation", "spec.capabilities", "spec.limits.cpu", "spec.mounts", "spec.network", "spec.stop_signal"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "in", "volume"]
    with pytest.raises(Refused, match="no folder|not in a folder"):
        cold.plan(store, order(tmp_path))  # it is not allowed to mount it
    with pytest.raises(Refused, match="is a file"):
        cold.plan(store, order(tmp_path, mounts=[{"target": "/data", "source": str(tmp_path / "volume/file")}]), (str(tmp_path),))
    (tmp_path / "disk").touch()
    with pytest.raises(Refused, match="is there already"):
        cold.to_disk(found, tmp_path / "disk", qemu_kernel.find(kernel_folder()))
    store.close()


async def test_a_disk_with_partitions_and_one_in_qcow2_are_taken_in(tmp_path: Path) -> None:
    store = made_store(tmp_path)
    disk, _ = await asyncio.to_thread(cold.to_disk, planned(store, tmp_path), tmp_path / "disk", qemu_kernel.find(kernel_folder()))
    content = disk.read_bytes()
    with open(tmp_path / "parts", "wb") as whole:
        table = bytes(446) + bytes((0, 0, 0, 0, 0x83, 0, 0, 0)) + (2048).to_bytes(4, "little") + (len(content) // 512).to_bytes(4, "little") + bytes(48) + b"\x55\xaa"
        whole.write(table + bytes(2048 * 512 - 512) + content)
    want = cold.to_image(disk, tmp_path / "one", "one:1")["digest"]
    assert cold.to_image(tmp_path / "parts", tmp_path / "two", "two:1")["digest"] == want
    if shutil.which("qemu-img") is not None:
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(disk), str(tmp_path / "packed")], check=True)
        assert cold.to_image(tmp_path / "packed", tmp_path / "three", "three:1")["digest"] == want
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", str(tmp_path / "sly")], check=True)
        with pytest.raises(Refused, match="stands on another file"):
            cold.to_image(tmp_path / "sly", tmp_path / "four", "four:1")
    (tmp_path / "nothing").write_bytes(bytes(1 << 20))
    with pytest.raises(Refused, match="none of the kind ext4"):
        cold.to_image(tmp_path / "nothing", tmp_path / "five", "five:1")
    assert not (tmp_path / "five").exists() and not list(tmp_path.glob(".*"))
    store.close()


async def test_the_command_says_what_is_lost_and_converts_both_ways(tmp_path: Path) -> None:
    layout(tmp_path / "in", [base()], name="box:1", run={"Cmd": ["sh"]})

    async def novactl(*words: str) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(subprocess.run, [sys.executable, "-m", "tools.novactl", "convert", *words], capture_output=True, text=True, timeout=120)

    told = await novactl("report", str(tmp_path / "in"), "--image", "box:1", "--json")
    assert told.returncode == 0 and {"isolation", "logs"} <= {loss["field"] for loss in json.loads(told.stdout)["lost"]}, told.stderr
    made = await novactl("disk", str(tmp_path / "in"), "--image", "box:1", "--to", str(tmp_path / "disk"), "--disk-bytes", str(32 << 20), "--guest-kernel", kernel_folder())
    assert made.returncode == 0 and "lost: isolation" in made.stdout and "written:" in made.stdout, made.stderr
    back = await novactl("image", str(tmp_path / "disk"), "--to", str(tmp_path / "out"), "--image", "again:1")
    assert back.returncode == 0 and (tmp_path / "out/index.json").exists(), back.stderr
    wrong = await novactl("image", str(tmp_path / "in/index.json"), "--to", str(tmp_path / "never"))
    assert wrong.returncode == 1 and "file system cannot be read" in wrong.stderr and "Traceback" not in wrong.stderr
