"""What a micro-VM's start is made of, without QEMU: the words of its program, the copies of disks, work for which there is time later."""

import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.workloads.drivers import microvm_guest
from edge_runtime.workloads.drivers.microvm_disks import copy_data
from edge_runtime.workloads.drivers.microvm_templates import Background

BUSYBOX = Path("/bin/busybox")

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)

needs_busybox = pytest.mark.skipif(not BUSYBOX.exists(), reason="no busybox (apt install busybox-static)")


def document(**more: Any) -> dict[str, Any]:
    return {"args": ["true"], "env": [], "cwd": "/", "uid": 0, "gid": 0, "hostname": "h", "read_only": False, "tmpfs": [], "memory": 1 << 26, "pids": 64, "cpu_us": 0, "root_mode": "755", **more}


def ran(script: str) -> subprocess.CompletedProcess[bytes]:
    """A script of a guest's, on this machine, with this machine's tools."""
    return subprocess.run([str(BUSYBOX), "sh", "-c", script.replace("/dev/.guest/busybox", str(BUSYBOX))], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)


@needs_busybox
@settings(max_examples=30)
@given(args=st.lists(WORDS, max_size=4), value=WORDS)
def test_a_program_gets_its_words_and_variables_as_they_are(args: list[str], value: str) -> None:
    told = document(env=[f"A={value}"])
    done = ran(microvm_guest._program(told, [str(BUSYBOX), "sh", "-c", 'printf "%s\\0" "$A" "$@"', "sh", *args]))
    assert done.returncode == 0 and done.stdout.decode().split("\0")[:-1] == [value, *args], done.stderr


@needs_busybox
def test_a_program_is_looked_for_in_its_own_path(tmp_path: Path) -> None:
    (tmp_path / "b c").mkdir()
    for folder, mode in ((tmp_path, 0o644), (tmp_path / "b c", 0o755)):
        (folder / "factor").write_text(f"#!{BUSYBOX} sh\necho mine\n")
        (folder / "factor").chmod(mode)
    told = document(env=["PATH=/nowhere", f"PATH={tmp_path}:{tmp_path}/b c:/bin"])
    assert ran(microvm_guest._program(told, ["factor", "12"])).stdout == b"mine\n"
    absent = ran(microvm_guest._program(told, ["not-there"]))
    assert absent.returncode == 127 and b"not-there: not found" in absent.stderr


@needs_busybox
@settings(max_examples=30)
@given(args=st.lists(WORDS, min_size=1, max_size=3), cwd=WORDS.filter(bool), name=WORDS, mode=st.booleans())
def test_what_a_guest_is_sent_is_a_script_whatever_is_in_it(args: list[str], cwd: str, name: str, mode: bool) -> None:
    told = document(args=args, cwd=cwd, hostname=name, tmpfs=[[cwd, "65536"]], read_only=mode, env=[f"B={name}"])
    for script in (microvm_guest.start(told, "00ff", "11", 1_700_000_000_123_456_789, mode), microvm_guest.run(told, args, "00ff"), microvm_guest.hold(told, microvm_guest.warm(told, mode))):
        checked = subprocess.run([str(BUSYBOX), "sh", "-n"], input=microvm_guest.framed(script), capture_output=True, timeout=60, check=False)
        assert checked.returncode == 0 and not checked.stderr, (script, checked.stderr)


def test_random_numbers_are_new_and_limits_set_before_a_program_is_let_go() -> None:
    for held in (False, True):
        script = microvm_guest.start(document(), "00ff", "5eed", 1, held)
        places = [script.index(part) for part in ("5eed >/dev/urandom", "' >/run/renew", "random numbers could not", "memory.max", ">/run/program", "echo go >&8")]
        assert places == sorted(places)
        assert ("mount -a" in script) != held


def test_a_copy_has_the_same_bytes_and_holes(tmp_path: Path) -> None:
    with open(tmp_path / "from", "w+b") as source, open(tmp_path / "to", "w+b") as target:
        source.truncate(64 << 20)
        for at in (0, 5 << 20, (64 << 20) - 3):
            source.seek(at)
            source.write(b"xyz")
        source.flush()
        copy_data(source.fileno(), target.fileno())
        assert os.fstat(target.fileno()).st_size == 64 << 20 and os.fstat(target.fileno()).st_blocks * 512 < 8 << 20
        for at in (0, 5 << 20, (64 << 20) - 3):
            assert os.pread(target.fileno(), 3, at) == b"xyz"
        assert os.pread(target.fileno(), 4, 1 << 20) == bytes(4)


def test_work_is_done_once_in_a_while_in_turn_and_not_after_the_end() -> None:
    work, go, done = Background(2, rest_s=3600.0), threading.Event(), []

    def first() -> None:
        go.wait(60)
        done.append("first")
        raise OSError("it failed")

    work.add("first", first)
    work.add("second", lambda: done.append("second"))
    work.add("second", lambda: done.append("twice"))
    work.add("third", lambda: done.append("too many wait"))
    go.set()
    work.join()
    assert done == ["first", "second"]
    work.add("first", lambda: done.append("it rests"))
    work.add("third", lambda: done.append("third"))
    work.join()
    assert done == ["first", "second", "third"]
    work.close()
    work.add("fourth", lambda: done.append("closed"))
    work.join()
    assert done == ["first", "second", "third"]


def test_the_end_waits_for_what_is_under_way_and_begins_nothing() -> None:
    work, begun, go, done = Background(4), threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        go.wait(60)
        done.append("first")

    work.add("first", first)
    work.add("second", lambda: done.append("second"))
    assert begun.wait(60)
    closing = threading.Thread(target=work.close)
    closing.start()
    while not work._closed:
        closing.join(0.01)
    go.set()
    closing.join(60)
    assert not closing.is_alive() and done == ["first"]
