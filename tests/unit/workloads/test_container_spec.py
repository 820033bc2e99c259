"""From a document to an OCI configuration: what is refused names the field, what is taken is within the limits, whatever the document."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.workloads.drivers import cgroups, seccomp
from edge_runtime.workloads.drivers.container_spec import CAPABILITIES, DEFAULT_MEMORY, Host, configuration, stop_signal
from edge_runtime.workloads.drivers.face import Ability, Capabilities, Checkpoints, Driver, Executes, Exit, Key, Migrates, Observes, Order, Pauses, Refused
from edge_runtime.workloads.drivers.keeping import Log
from edge_runtime.workloads.drivers.probe_program import program
from edge_runtime.workloads.drivers.users import ids
from edge_runtime.workloads.images import Config

IMAGE = Config(("serve",), ("/bin/app",), ("PATH=/bin", "A=1"), "/work", "", "", ("0" * 64,))
HOST = Host("x86_64", id_base=1 << 30, open_files=20_000, memory=8 << 30, cpu=4000)


def made(spec: Any = None, requests: dict[str, int] | None = None, host: Host = HOST, image: Config = IMAGE) -> dict[str, Any]:
    return configuration(Order(Key("web", 1), "i", requests or {}, spec or {}), image, host, "/root", "/group", lambda user: (int(user or 0), 0))


def test_what_the_image_says_holds_where_the_workload_says_nothing() -> None:
    told = made()
    process = told["process"]
    assert process["args"] == ["/bin/app", "serve"] and process["cwd"] == "/work" and process["env"] == ["PATH=/bin", "A=1"] and process["noNewPrivileges"] is True
    assert process["capabilities"]["bounding"] == sorted(CAPABILITIES) and process["capabilities"]["ambient"] == []
    assert {one["type"] for one in told["linux"]["namespaces"]} == {"pid", "mount", "ipc", "uts", "network", "cgroup", "user"}
    assert told["linux"]["resources"]["memory"] == {"limit": DEFAULT_MEMORY} and told["hostname"] == "web"
    assert "quota" not in told["linux"]["resources"]["cpu"] and told["linux"]["resources"]["cpu"]["shares"] == 102


@pytest.mark.parametrize(("spec", "args"), [
    ({}, ["/bin/app", "serve"]), ({"command": ["x"]}, ["x"]), ({"args": ["y"]}, ["/bin/app", "y"]), ({"args": []}, ["/bin/app"]), ({"command": ["x"], "args": ["y"]}, ["x", "y"]),
])
def test_command_and_arguments(spec: Any, args: list[str]) -> None:
    assert made(spec)["process"]["args"] == args


def test_limits_are_what_is_said_or_else_what_was_set_aside() -> None:
    told = made({"limits": {"memory": "64Mi", "cpu": "1500m", "pids": 20}}, {"memory": 1 << 30, "cpu": 500})["linux"]["resources"]
    assert told["memory"]["limit"] == 64 << 20 and told["cpu"] == {"shares": 512, "period": 100_000, "quota": 150_000} and told["pids"] == {"limit": 20}
    assert made(None, {"memory": 1 << 30})["linux"]["resources"]["memory"]["limit"] == 1 << 30
    assert made(None, host=Host("x86_64", swap=True))["linux"]["resources"]["memory"]["swap"] == DEFAULT_MEMORY


@pytest.mark.parametrize(("spec", "field"), [
    ({"x": 1}, "spec.x"), ({"command": "sh"}, "spec.command"), ({"command": [""]}, "spec.command"), ({"command": ["a\0"]}, r"spec.command\[0\]"), ({"command": ["\ud800"]}, r"spec.command\[0\]"), ({"env": []}, "spec.env"), ({"env": {"A=B": ""}}, "spec.env"),
    ({"env": {"A": 1}}, "spec.env.A"), ({"cwd": "tmp"}, "spec.cwd"), ({"user": "70000"}, "spec.user"), ({"limits": {"memory": "x"}}, "spec.limits.memory"), ({"limits": {"memory": 10}}, "spec.limits.memory"),
    ({"limits": {"memory": "9Gi"}}, "spec.limits.memory"), ({"limits": {"cpu": 5}}, "spec.limits.cpu"), ({"limits": {"cpu": "1m"}}, "spec.limits.cpu"), ({"limits": {"pids": True}}, "spec.limits.pids"), ({"limits": {"io": 1}}, "spec.limits.io"),
    ({"mounts": {}}, "spec.mounts"), ({"mounts": [{"target": "/"}]}, r"spec.mounts\[0\].target"), ({"mounts": [{"target": "/x/../proc/y", "tmpfs": 1}]}, r"spec.mounts\[0\].target"), ({"mounts": [{"target": "/a"}]}, r"spec.mounts\[0\]"),
    ({"mounts": [{"target": "/a", "source": "/etc"}]}, r"spec.mounts\[0\].source"), ({"capabilities": ["ALL"]}, "spec.capabilities"), ({"read_only_root": 1}, "spec.read_only_root"), ({"hostname": "A_b"}, "spec.hostname"),
    ({"stop_signal": "SIGNOTHING"}, "spec.stop_signal"), ({"stop_signal": "65"}, "spec.stop_signal"),
])
def test_what_is_refused_names_the_field(spec: Any, field: str) -> None:
    with pytest.raises(Refused, match=f"^{field}: "):
        made(spec)


JUNK = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4), max_leaves=10)
SPEC = st.dictionaries(st.sampled_from(("command", "args", "env", "cwd", "user", "limits", "mounts", "capabilities", "read_only_root", "hostname", "stop_signal")), JUNK, max_size=4)


@given(SPEC)
def test_any_document_is_refused_or_gives_a_configuration_within_bounds(spec: dict[str, Any]) -> None:
    try:
        told = configuration(Order(Key("w", 1), "i", {}, spec), IMAGE, HOST, "/root", "/group", lambda user: ids(user, ()))
    except Refused as error:
        assert error.field.startswith("spec") and error.remedy
        return
    assert set(told["process"]["capabilities"]["bounding"]) <= set(CAPABILITIES) and told["process"]["noNewPrivileges"] is True
    assert told["linux"]["resources"]["memory"]["limit"] <= HOST.memory and all(mount["type"] != "bind" for mount in told["mounts"])
    json.dumps(told).encode()


def test_signals() -> None:
    order = Order(Key("a", 1), "i")
    assert stop_signal(order, IMAGE) == 15 and stop_signal(Order(Key("a", 1), "i", {}, {"stop_signal": "INT"}), IMAGE) == 2
    assert stop_signal(order, Config((), (), (), "/", "", "SIGQUIT", ())) == 3


def test_who_a_user_is(tmp_path: Path) -> None:
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    for layer, passwd in ((upper, b"app:x:1000:1001::/:\nbad:x:99999999999:0::/:\nshort\n"), (lower, b"old:x:5:5::/:\n")):
        (layer / "etc").mkdir(parents=True)
        (layer / "etc/passwd").write_bytes(passwd)
    (lower / "etc/group").write_text("staff:x:50:\n")
    layers = [upper, lower]
    assert ids("", layers) == (0, 0) and ids("app", layers) == (1000, 1001) and ids("1000", layers) == (1000, 1001) and ids("7", layers) == (7, 0)
    assert ids("app:staff", layers) == (1000, 50) and ids("7:8", layers) == (7, 8)
    for user in ("old", "bad", "nobody", "app:none", "4294967295", "-1", "²"):
        with pytest.raises(Refused, match="spec.user"):
            ids(user, layers)
    os.unlink(upper / "etc/passwd")
    os.symlink("/etc/passwd", upper / "etc/passwd")
    with pytest.raises(Refused):
        ids("daemon", [upper])


V1 = """25 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw
26 25 0:23 / /sys/fs/cgroup/cpu,cpuacct rw shared:1 - cgroup cgroup rw,cpu,cpuacct
27 25 0:24 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
28 25 0:25 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
29 25 0:26 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
30 25 0:27 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices
31 25 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
32 25 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
"""
V2 = "33 25 0:30 / {top} rw - cgroup2 cgroup2 rw\n"


def test_a_group_goes_from_each_hierarchy_with_what_is_below_it_and_one_that_is_busy_stays(tmp_path: Path) -> None:
    groups = cgroups.Groups({name: f"{tmp_path}/{name}" for name in ("memory", "cpuset")}, f"{tmp_path}/unified", frozenset())
    assert groups.remove("/novacron/a.1"), "there is none"
    for top in groups.of_all("/novacron/a.1"):
        (Path(top) / "below").mkdir(parents=True)
    (busy := tmp_path / "cpuset/novacron/a.1/below/file").touch()
    assert not groups.remove("/novacron/a.1") and busy.exists()
    assert [Path(top).exists() for top in groups.of_all("/novacron/a.1")] == [False, True, False]
    busy.unlink()
    assert groups.remove("/novacron/a.1") and all((tmp_path / name / "novacron").exists() for name in ("memory", "cpuset", "unified"))


def test_stirring_writes_this_process_into_the_first_of_its_own_groups_that_may_be_written(tmp_path: Path) -> None:
    groups = cgroups.Groups({"name=systemd": f"{tmp_path}/systemd", "cpu": f"{tmp_path}/cpu", "cpuacct": f"{tmp_path}/cpu"}, f"{tmp_path}/unified", frozenset())
    own = "9:name=systemd:/init\n4:memory:/not/mounted\n1:cpu,cpuacct:/a:b\n0::/a\n"
    groups.stir(own)
    assert not list(tmp_path.iterdir()), "nothing is made"
    for name in ("cpu/a:b", "unified/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "cgroup.procs").touch()
    groups.stir(own)
    assert [(tmp_path / name / "cgroup.procs").read_text() for name in ("cpu/a:b", "unified/a")] == ["0", ""]
    groups.stir("0::/a\n")
    assert (tmp_path / "unified/a/cgroup.procs").read_text() == "0"
    before = Path("/proc/self/cgroup").read_text()
    cgroups.read().stir()
    assert Path("/proc/self/cgroup").read_text() == before


def test_layouts_of_control_groups(tmp_path: Path) -> None:
    assert cgroups.read("").layout == "none" and cgroups.read("").lacks and cgroups.read("junk\n - \n").layout == "none"
    one = cgroups.read(V1)
    assert one.layout == "v1" and one.lacks == "" and one.memory_events("/g") == ["/sys/fs/cgroup/memory/g/memory.oom_control"]
    assert one.folders("/k") == [f"/sys/fs/cgroup/{name}/k" for name in ("cpu,cpuacct", "memory", "pids", "freezer", "devices", "systemd")]
    assert cgroups.read(V1 + V2.format(top=tmp_path)).layout == "hybrid"
    keepers = [path.removesuffix(cgroups.KEEPERS) for path in one.folders(cgroups.KEEPERS)]
    assert one.of_keepers() == [path if path.endswith("cpuacct") else path + cgroups.KEEPERS for path in keepers], "each keeper has the processor as any process has"
    assert cgroups.read(V2.format(top=tmp_path)).of_keepers() == [f"{tmp_path}{cgroups.KEEPERS}"], "there is one hierarchy"
    assert "memory" in cgroups.read(V1.replace("rw,memory", "rw,other")).lacks
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    group = tmp_path / "g"
    group.mkdir()
    for name, text in (("cpu.stat", "usage_usec 12\nuser_usec 1\n"), ("memory.current", "4096\n"), ("pids.current", "3\n"), ("memory.max", "max\n"), ("cgroup.events", "populated 1\nfrozen 1\n")):
        (group / name).write_text(text)
    two = cgroups.read(V2.format(top=tmp_path))
    told = two.stats("/g")
    assert two.layout == "v2" and two.lacks == "" and (told.cpu_ns, told.memory_bytes, told.processes) == (12_000, 4096, 3) and two.memory_limit("/g") == -1 and two.frozen("/g")
    (tmp_path / "cgroup.controllers").write_text("cpu\n")
    assert "memory, pids are missing" in cgroups.read(V2.format(top=tmp_path)).lacks


def test_the_profile_lets_through_what_programs_need_and_nothing_that_reaches_out() -> None:
    told = seccomp.profile("x86_64")
    freely = {name for rule in told["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule for name in rule["names"]}
    assert told["defaultAction"] == "SCMP_ACT_ERRNO" and {"read", "execve", "futex", "openat", "rseq", "getrandom"} <= freely
    for name in ("mount", "umount2", "ptrace", "bpf", "unshare", "setns", "clone", "clone3", "keyctl", "add_key", "init_module", "kexec_load", "reboot", "userfaultfd", "io_uring_setup", "perf_event_open", "open_by_handle_at", "socket", "personality"):
        assert name not in freely, name


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(2, 400))
def test_a_log_keeps_the_end_within_its_limit(pieces: list[bytes], most: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        log = Log(f"{folder}/l", most)
        for piece in pieces:
            log.take(piece)
        os.close(log._file)
        kept = b"".join(path.read_bytes() for path in (Path(folder, "l.1"), Path(folder, "l")) if path.exists())
        whole = b"".join(pieces)
        assert whole.endswith(kept) and len(kept) <= most and len(kept) >= min(len(whole), most // 2)


def test_the_probes_program_is_one_for_each_machine_that_we_know() -> None:
    for machine in ("x86_64", "aarch64", "riscv64"):
        made_program = program(machine)
        assert made_program is not None and made_program.startswith(b"\x7fELF") and len(made_program) < 200
    assert program("vax") is None


def test_a_report_says_what_can_and_why_the_rest_cannot() -> None:
    told = Capabilities("container", "container", "runc 1", "x86_64", ("avx",), "v2", "6.1", {Ability.CHECKPOINT: "no CRIU"})
    assert told.usable and told.to_json()["cannot"] == {"checkpoint": "no CRIU"} and set(told.to_json()["can"]) == {ability.value for ability in Ability} - {"checkpoint"}
    with pytest.raises(Refused, match="no CRIU"):
        told.demand(Ability.CHECKPOINT)
    assert (Exit(0).reason, Exit(3).reason, Exit(137, 9).reason, Exit(137, 9, True).reason) == ("", "exit code 3", "killed by signal 9", "killed: its memory limit was reached")


def test_the_driver_has_what_it_may_say_that_it_can() -> None:
    from edge_runtime.workloads.drivers.container import ContainerDriver

    face: type[Driver] = ContainerDriver
    assert all(issubclass(face, part) for part in (Pauses, Observes, Executes, Checkpoints, Migrates))
