"""What a process was started with, also just as it ends or becomes another."""

import asyncio
import os
import subprocess

from edge_runtime.workloads.conversion.environments import environment_of


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
