"""Why a workload ended: memory only where it was the reason, told by what the kernel counted in its own control group."""

from pathlib import Path

import pytest

from edge_runtime.workloads.drivers.face import Exit
from edge_runtime.workloads.drivers.keeping import for_memory, memory_kills


@pytest.mark.parametrize(("code", "kills", "memory"), [(137, 1, True), (137, 3, True), (137, 0, False), (6, 1, False), (0, 1, False), (143, 1, False), (9, 1, False)])
def test_memory_is_the_reason_only_of_what_was_killed(code: int, kills: int, memory: bool) -> None:
    assert for_memory(code, kills) is memory


def test_what_the_kernel_counted_is_read_of_both_versions(tmp_path: Path) -> None:
    one, two, none = tmp_path / "memory.oom_control", tmp_path / "memory.events", tmp_path / "none"
    one.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    two.write_text("low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 1\n")
    assert [memory_kills({"oom": [str(path)]}) for path in (one, two, none)] == [2, 3, 0] and memory_kills({}) == 0
    one.write_text("oom_kill_disable 0\nunder_oom 0\n")  # a kernel before 4.13
    assert memory_kills({"oom": [str(one)]}) == 0
    one.write_text("oom_kill much\n")
    assert memory_kills({"oom": [str(one)]}) == 0


def test_a_reason_says_what_was_killed_before() -> None:
    assert Exit(137, 9, out_of_memory=True, memory_kills=1).reason == "killed: its memory limit was reached"
    assert Exit(6, memory_kills=2).reason == "exit code 6; before that the kernel killed 2 of its processes for want of memory"
    assert Exit(0, memory_kills=2).reason == "" and Exit(6).reason == "exit code 6"
