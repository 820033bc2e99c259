"""Containers on a machine with control groups of version 2 alone, which is what Debian 12 and 13 are: the tests of containers once more, in a guest with this machine's own root.

Emulated, so that these are slow; where this machine itself has version 2 alone, the ordinary tests show the same.
"""

import re
import sys
from pathlib import Path

import pytest

from tests.system import own_root

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(7200), pytest.mark.skipif(bool(own_root.reason_against()), reason=own_root.reason_against())]

MEMORY_MIB = 4096
GUEST_S = 6600.0
"""Longest wait for the tests of one group: three to six minutes on an idle machine (2026-11-29), many times that beside others."""

ONE_S = 1200
"""Seconds for one test there: it takes some 20 times as long as here."""

PYTEST = ["-m", "pytest", "-p", "no:cacheprovider", "-q", "-rA", "--tb=short", "--color=no", "-m", "not slow", "-o", f"timeout={ONE_S}"]

GROUPS = {
    "containers": ["test_containers.py", "test_container_disk.py", "test_container_leases.py", "test_keeper_begins.py"],
    "checkpoints": ["test_container_checkpoints.py"],
    "snapshots": [f"test_snapshots.py::{name}" for name in ("test_a_snapshot_has_what_was_changed_with_its_owners_and_the_container_goes_on", "test_one_whose_copy_fails_or_is_given_up_goes_on", "test_a_workload_is_begun_from_a_snapshot_and_sees_what_was_there")],
    "network": ["test_container_network.py", "test_container_functions.py"],
    "isolation": ["test_isolation.py", "test_functions.py"],
    "agent": ["../system/test_containers_adopted.py", "../system/test_eviction.py"],
}


def there(folder: Path, *words: str) -> own_root.Ended:
    """What this interpreter does with these words in such a guest."""
    return own_root.run(folder, [sys.executable, *words], MEMORY_MIB, GUEST_S)


def test_the_guest_has_version_2_alone_and_tells_a_failure(tmp_path: Path) -> None:
    """The control of the others."""
    told = there(tmp_path, "-c", "from edge_runtime.workloads.drivers import cgroups; print('layout', cgroups.read().layout, cgroups.read().lacks or 'whole'); raise SystemExit(7)")
    assert told.code == 7 and "layout v2 whole" in told.said, told.said


@pytest.mark.parametrize("group", GROUPS)
def test_containers_with_control_groups_of_version_2(group: str, tmp_path: Path) -> None:
    told = there(tmp_path, *PYTEST, *(f"tests/integration/{name}" for name in GROUPS[group]))
    passed = re.search(r"(\d+) passed", told.said)
    assert told.code == 0 and passed is not None, told.said[-20_000:]
    print("\n".join(line for line in told.said.splitlines() if re.search(r" passed|^SKIPPED", line)))


def test_a_state_that_would_come_into_the_group_of_its_source_is_seen(tmp_path: Path) -> None:
    """The control of the checkpoints' tests: runc tells CRIU no control group of version 2."""
    planted = (
        "import pytest, sys\n"
        "from edge_runtime.workloads.drivers import container_checkpoint as ours\n"
        "whole = ours.write_options\n"
        "ours.write_options = lambda path, *, stopped, group='': whole(path, stopped=stopped)\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    told = there(tmp_path, "-c", planted, *PYTEST[2:], "tests/integration/test_container_checkpoints.py", "-k", "the_probe_takes")
    assert told.code == 1 and "1 failed" in told.said, told.said[-20_000:]
