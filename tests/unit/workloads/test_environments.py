"""What a process was started with, also just as it ends or becomes another."""

import asyncio
import os
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from edge_runtime.workloads.conversion import hot
from edge_runtime.workloads.conversion.environments import ending, environment_of
from edge_runtime.workloads.drivers.face import Key, Refused


async def test_a_process_shows_what_it_was_started_with() -> None:
    with subprocess.Popen(["sleep", "1000"], env={"A": "1", "B": "x=y"}) as child:
        try:
            assert await environment_of(child.pid) == {"A": "1", "B": "x=y"}
        finally:
            child.kill()


async def test_one_without_an_environment_has_none() -> None:
    with subprocess.Popen(["/bin/sleep", "1000"], env={}) as child:
        try:
            assert await environment_of(child.pid) == {}
        finally:
            child.kill()


async def test_one_that_has_ended_and_was_not_waited_for_is_left_out() -> None:
    """It shows an empty environment, as one does that has none: a conversion was refused for a program that would not run any more."""
    child = subprocess.Popen(["/bin/true"], env={"A": "1"})
    await asyncio.to_thread(os.waitid, os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert await environment_of(child.pid) is None
    child.wait()
    assert await environment_of(child.pid) is None


@pytest.mark.parametrize("layout", ["v1", "v2"])
async def test_one_that_has_ended_is_in_no_other_control_group(layout: str) -> None:
    """Where control groups are of version 1 it shows the root's: a conversion of a workload that starts short programs was refused now and then."""
    workload: Any = SimpleNamespace(_group=lambda _key: "/novacron/of-the-workload", _groups=SimpleNamespace(layout=layout))
    one = {"pid": 7, "name": "sleep"}
    with subprocess.Popen(["sleep", "1000"]) as child:
        try:
            assert not ending(child.pid)
            with pytest.raises(Refused, match=r"process 7 \(sleep\) is in the control group"):
                hot.Conversions._in_its_group(workload, Key("w", 1), child.pid, one)
        finally:
            child.kill()
        await asyncio.to_thread(os.waitid, os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert ending(child.pid)
        hot.Conversions._in_its_group(workload, Key("w", 1), child.pid, one)
    assert ending(child.pid)
    hot.Conversions._in_its_group(workload, Key("w", 1), child.pid, one)
