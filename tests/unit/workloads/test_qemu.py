"""What a micro-VM is made from, without QEMU: archive, marks, answers, memory steps, QMP."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.workloads.drivers import microvm_guest, qemu_kernel
from edge_runtime.workloads.drivers.keeping import Trouble
from edge_runtime.workloads.drivers.microvm_spec import OWN_MB, memory_mb
from edge_runtime.workloads.drivers.programs import searched
from edge_runtime.workloads.drivers.qemu_keeper import MAX_SAID, Kept, Lines, Stream
from edge_runtime.workloads.drivers.qemu_machine import PORTS, Machine, boot, command
from edge_runtime.workloads.drivers.qemu_qmp import Qmp, QmpError


@pytest.mark.skipif(searched("cpio") is None and not Path("/bin/busybox").exists(), reason="no cpio to read it with")
def test_an_archive_is_read_by_others(tmp_path: Path) -> None:
    raw = qemu_kernel.cpio([("a", 0o040755, b""), ("a/b", 0o100644, b"12345"), ("c", 0o100755, b"")])
    tool = [searched("cpio")] if searched("cpio") else ["/bin/busybox", "cpio"]
    subprocess.run([*tool, "-idm"], input=raw, cwd=tmp_path, check=True, capture_output=True)  # type: ignore[list-item]
    assert (tmp_path / "a/b").read_bytes() == b"12345" and (tmp_path / "c").stat().st_mode & 0o777 == 0o755


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 400), max_size=8), after=st.binary(max_size=20))
def test_a_stream_ends_at_its_mark_however_it_is_cut(data: bytes, cuts: list[int], after: bytes) -> None:
    mark = microvm_guest.mark("0123456789abcdef")
    data = data.replace(mark, b"")
    whole, kept = data + mark + after, Kept()
    stream = Stream("0123456789abcdef", kept.take)
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(whole)], strict=True):
        stream.feed(whole[begin:end])
    assert stream.ended and bytes(kept.data) == data


@given(data=st.lists(st.sampled_from([b"\0", b"end ", b"0123", b"\0end 0123456789abcde", b"x"]), max_size=12).map(b"".join))
def test_what_only_looks_like_a_mark_is_kept(data: bytes) -> None:
    kept = Kept()
    stream = Stream("0123456789abcdef", kept.take)
    for at in range(len(data)):
        stream.feed(data[at:at + 1])
    stream.feed(microvm_guest.mark("0123456789abcdef"))
    assert stream.ended and bytes(kept.data) == data


@given(st.binary(max_size=3 * MAX_SAID))
def test_a_guest_may_say_anything(data: bytes) -> None:
    try:
        assert all(words for words in Lines().take(data))
    except Trouble as error:
        assert "no answer" in str(error)


@given(st.integers(6 << 20, 1 << 36))
def test_memory_comes_in_steps_that_hold_the_limit(limit: int) -> None:
    size = memory_mb(limit)
    assert size << 20 >= limit + (OWN_MB << 20) and size % 128 == 0 and (size << 20) - limit <= (OWN_MB << 20) + (4096 << 20)


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    def module(name: str, *needs: str) -> None:
        path = tmp_path / "lib/modules/6.1.0-1/kernel" / f"{name}.ko"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x7fELF\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0name=x\0")

    (tmp_path / "boot").mkdir()
    for release in ("6.1.0-1", "6.1.0-0"):
        (tmp_path / f"boot/vmlinuz-{release}").touch()
    module("top", "middle", "builtin-one")
    module("middle", "low-est")
    module("low_est")
    module("round", "about")
    module("about", "round")
    (tmp_path / "lib/modules/6.1.0-1/modules.builtin").write_text("kernel/builtin_one.ko\n")
    kernel = qemu_kernel.find(str(tmp_path))
    assert kernel.release == "6.1.0-1" and list(qemu_kernel.modules(kernel, ("top",))) == ["low_est", "middle", "top"]
    for names in (("round",), ("absent",)):
        with pytest.raises(qemu_kernel.NoKernel, match="lacks the module"):
            qemu_kernel.modules(kernel, names)
    with pytest.raises(qemu_kernel.NoKernel, match="guest_kernel.sh"):
        qemu_kernel.find(str(tmp_path / "lib"))


def test_a_template_and_its_clones_differ_only_where_they_may() -> None:
    machine = Machine(256, 2)
    template = command("qemu", machine, "ram", True, ["a", "b"], *boot("k", "i", 2_600_000))
    clone = command("qemu", machine, "ram", False, ["c", "d"], "-incoming", "defer")
    assert [word for word in template if "accel=" in word or word.startswith("tcg")] == ["tcg,tb-size=24"]
    assert {word for word in template if word.startswith("virt")} == {word for word in clone if word.startswith("virt")}
    assert "tsc_early_khz=2600000" in template[-1] and "-kernel" not in clone
    assert "accel=kvm" in next(word for word in command("qemu", Machine(256, 1, "kvm"), "r", True, []) if word.startswith("microvm"))
    assert all(f"{{{name}}}" in " ".join(clone) for name in (*PORTS, "qmp"))


def test_qmp_keeps_events_apart_and_gives_up() -> None:
    ours, its = socket.socketpair()
    qmp = Qmp(ours, 0.2)
    its.sendall(b'{"QMP": {}}\n{"return": {}, "id": 1}\n{"event": "STOP"}\n{"return": 5, "id": 2}\n{"error": {"desc": "no"}, "id": 3}\n{"event": "MIGRATION", "data": {"status": "completed"}}\nnonsense\n')
    qmp.begin()
    assert qmp.ask("query") == 5 and qmp.events == [("STOP", {})]
    with pytest.raises(QmpError, match="no"):
        qmp.ask("other")
    assert qmp.until("MIGRATION", "status", ("completed",)) == "completed"
    with pytest.raises(QmpError, match="no JSON"):
        qmp.ask("x")
    with pytest.raises(QmpError, match="said nothing"):
        qmp.ask("x")
    sent = its.recv(1 << 16).splitlines()
    assert json.loads(sent[0]) == {"execute": "qmp_capabilities", "id": 1}
    its.close()
    with pytest.raises(QmpError, match="has ended"):
        qmp.ask("x")
    assert not qmp.drain()
    ours.close()


def test_what_comes_too_late_is_no_answer_to_the_next_question() -> None:
    ours, its = socket.socketpair()
    qmp = Qmp(ours, 0.1)
    with pytest.raises(QmpError, match="said nothing"):
        qmp.ask("slow")
    its.sendall(b'{"return": {"of": "slow"}, "id": 1}\n{"error": {"desc": "of slow"}, "id": 1}\n{"return": [], "id": 2}\n')
    assert qmp.ask_with(its.fileno(), "next") == []
    message, descriptors, *_ = socket.recv_fds(its, 4096, 4)
    assert [json.loads(line)["id"] for line in message.splitlines()] == [1, 2] and len(descriptors) == 1
    for one in descriptors:
        os.close(one)
    its.close()
    ours.close()


def test_an_event_that_comes_together_with_an_answer_is_seen() -> None:
    import socket

    from edge_runtime.workloads.drivers.qemu_qmp import Qmp

    ours, its = socket.socketpair()
    qmp = Qmp(ours, 5.0)
    its.sendall(b'{"return": {}, "id": 1}\n{"event": "BLOCK_JOB_COMPLETED", "data": {"device": "copy"}}\n')
    assert qmp.ask("anything") == {} and qmp.events == []
    assert qmp.drain() and [name for name, _ in qmp.events] == ["BLOCK_JOB_COMPLETED"]
    its.close()
    assert not qmp.drain()
    ours.close()
