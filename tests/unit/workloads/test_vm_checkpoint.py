"""What the state of a virtual machine fits to, and what of one is no state."""

import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.workloads.drivers import cgroups, checkpoint_state, vm_checkpoint, vm_qcow2
from edge_runtime.workloads.drivers.face import Failed, Key, Phase, Refused, Status
from edge_runtime.workloads.drivers.instance import NOTE
from edge_runtime.workloads.drivers.vm import described
from edge_runtime.workloads.drivers.vm_checkpoint import same_machine, suits

from .test_vm_spec import asked

HOST: dict[str, Any] = {"arch": "x86_64", "qemu": "7.2.22", "accelerator": "tcg", "cpu_model": "", "cpu_flags": []}
KVM = {**HOST, "accelerator": "kvm", "cpu_model": "A", "cpu_flags": ["avx", "sse2"]}
DISK_BYTES = 1 << 20
MACHINE = {**described(asked()), "disk_bytes": DISK_BYTES}
DOCUMENT: dict[str, Any] = {"kind": "vm", "token": "t", "host": HOST, "machine": MACHINE, "order": {"id": "a"}, "image": "sha256:0", "layers": []}


@pytest.mark.parametrize(("there", "here", "field"), [
    ({"arch": "aarch64"}, HOST, "host.arch"), ({"accelerator": "kvm"}, HOST, "host.accelerator"), ({"qemu": "8.0.0"}, HOST, "host.qemu"), ({"qemu": "7.1.22"}, HOST, "host.qemu"), ({"qemu": "72.2.2"}, HOST, "host.qemu"),
    ({"qemu": ""}, {**HOST, "qemu": ""}, "host.qemu"), ({"qemu": None}, HOST, "host.qemu"), ({**KVM, "cpu_model": "B"}, KVM, "host.cpu"), ({**KVM, "cpu_flags": ["avx"]}, KVM, "host.cpu"),
    ({**KVM, "cpu_flags": ["avx", "sse2", "x"]}, KVM, "host.cpu"), ({**KVM, "cpu_flags": 7}, KVM, "host.cpu"),
])
def test_what_does_not_fit_its_host_is_refused_by_name(there: dict[str, Any], here: dict[str, Any], field: str) -> None:
    with pytest.raises(Refused) as told:
        suits({**HOST, **there}, here)
    assert told.value.field == field and told.value.remedy


def test_a_bug_fix_release_is_the_same_machine() -> None:
    suits({**HOST, "qemu": "7.2.5"}, HOST)
    suits({**KVM, "cpu_flags": ["sse2", "avx"]}, KVM)


@given(st.dictionaries(st.sampled_from([*HOST, "other"]), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text() | st.integers())))
def test_whatever_is_told_of_a_host_is_taken_or_refused(told: dict[str, Any]) -> None:
    for here in (HOST, KVM):
        try:
            suits({**here, **told}, here)
        except Refused:
            continue
        assert all(told.get(name, here[name]) == here[name] for name in ("arch", "accelerator", "cpu_model"))


@pytest.mark.parametrize("name", sorted(MACHINE))
def test_another_machine_is_refused(name: str) -> None:
    same_machine(MACHINE, dict(MACHINE))
    for was in ({**MACHINE, name: "odd"}, {field: value for field, value in MACHINE.items() if field != name}, {**MACHINE, "more": 1}):
        with pytest.raises(Refused, match=f"its ({name}|more) was"):
            same_machine(was, MACHINE)


class SlowKeeper:
    """A driver whose keeper comes to what it is asked only with the next question, after whoever asked has given up; but for what it is."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._late, self.paused = folder, "", False
        (folder / "keeper.json").write_text(json.dumps({"machine": MACHINE}))
        (folder / "instance.json").write_text("{}")

    def folder(self, key: Key) -> Path:
        return self._folder

    async def status(self, key: Key) -> Status:
        return Status(key, Phase.PAUSED if self.paused else Phase.RUNNING)

    async def ask(self, key: Key, request: Mapping[str, Any], seconds: float = 0.0) -> dict[str, Any]:
        if request["do"] == "version":
            return {"version": HOST["qemu"]}
        for word in (self._late, request["do"] if request["do"] != "pause" else ""):
            self.paused = word == "pause" or (self.paused and word != "resume")
        self._late = request["do"]
        if request["do"] == "pause":
            raise Failed("pause", "its keeper does not answer (in time)", "look at whether it still runs")
        return {"done": True}


async def test_a_machine_whose_keeper_is_told_to_hold_it_and_comes_to_that_too_late_goes_on(tmp_path: Path) -> None:
    (own := tmp_path / "own").mkdir()
    keeper = SlowKeeper(own)
    with pytest.raises(Failed, match="does not answer"):
        await vm_checkpoint.Checkpoints(keeper, cgroups.read()).take(Key("a", 1), tmp_path / "state", leave_running=False)  # type: ignore[arg-type]
    await keeper.ask(Key("a", 1), {"do": "anything"})
    assert not keeper.paused and not (own / NOTE).exists() and not (tmp_path / "state").exists()


def state(folder: Path, disk: bytes, **more: bytes) -> dict[str, Any]:
    """One with a disk of so many bytes; `more`: other files."""
    (folder / checkpoint_state.IMAGES).mkdir(parents=True)
    contents = {"state": b"QEVM", "disk.qcow2": disk, "seed.img": bytes(1 << 20), **more}
    files = [checkpoint_state.add(folder, f"{checkpoint_state.IMAGES}/{name}", io.BytesIO(content), "zlib") for name, content in contents.items()]
    checkpoint_state.seal(folder, DOCUMENT, files, "zlib")
    return checkpoint_state.check(folder)


def empty(size: int = DISK_BYTES) -> bytes:
    head, length = vm_qcow2.empty(size)
    return head.ljust(length, b"\0")


def test_a_state_is_laid_out_for_its_keeper(tmp_path: Path) -> None:
    manifest = state(tmp_path / "s", empty())
    (tmp_path / "laid").mkdir()
    vm_checkpoint.Checkpoints(None, None).fill(tmp_path / "s", manifest, tmp_path / "laid", MACHINE)  # type: ignore[arg-type]
    assert (tmp_path / "laid/restore/state").read_bytes() == b"QEVM" and (tmp_path / "laid/disk.qcow2").read_bytes() == empty() and (tmp_path / "laid/disk.qcow2").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("disk", "more", "words"), [
    (empty(2 << 20), {}, "and the machine's disk"), (b"raw" * 1000, {}, "does not begin as a qcow2"), (empty(), {"x.img": b"odd"}, "nothing of a virtual machine"),
    (empty()[:8] + struct.pack(">QI", 600, 11) + empty()[20:], {}, "names a backing file"), (empty(), {"template.qcow2": empty(2 << 20)}, "template.qcow2 has"),
])
def test_a_disk_that_names_a_file_of_the_node_or_is_another_one_is_refused(tmp_path: Path, disk: bytes, more: dict[str, bytes], words: str) -> None:
    manifest = state(tmp_path / "s", disk, **more)
    (tmp_path / "laid").mkdir()
    with pytest.raises(Refused, match=words):
        vm_checkpoint.Checkpoints(None, None).fill(tmp_path / "s", manifest, tmp_path / "laid", MACHINE)  # type: ignore[arg-type]


@pytest.mark.parametrize("lacks", ["machine", "host", "order", "layers", "disk"])
def test_what_lacks_a_part_is_no_state(tmp_path: Path, lacks: str) -> None:
    (tmp_path / checkpoint_state.IMAGES).mkdir()
    names = ["state"] if lacks == "disk" else ["state", "disk.qcow2"]
    files = [checkpoint_state.add(tmp_path, f"{checkpoint_state.IMAGES}/{name}", io.BytesIO(b"x"), "zlib") for name in names]
    checkpoint_state.seal(tmp_path, {name: value for name, value in DOCUMENT.items() if name != lacks}, files, "zlib")
    with pytest.raises(Refused, match="list of files" if lacks == "disk" else f"lacks {lacks}"):
        checkpoint_state.read_manifest(tmp_path)
