"""When a container's keeper says that it runs: with processes of this machine that become another program when they are told to."""

import asyncio
import subprocess
from pathlib import Path

from edge_runtime.workloads.drivers import keeper

from .waiting import until


async def test_it_runs_once_its_program_does_and_no_sooner() -> None:
    with subprocess.Popen(["sh", "-c", "read word; exec sleep 1000"], stdin=subprocess.PIPE) as child:
        try:
            await until(lambda: b"read word" in Path(f"/proc/{child.pid}/cmdline").read_bytes())
            stands = keeper.program(child.pid)
            assert stands is not None and child.stdin is not None
            waiting = asyncio.ensure_future(asyncio.to_thread(keeper.begun, child.pid, stands))
            assert not (await asyncio.wait([waiting], timeout=0.05))[0] and keeper.program(child.pid) == stands
            child.stdin.write(b"go\n")
            child.stdin.flush()
            await waiting
            assert keeper.program(child.pid) not in (None, stands)
        finally:
            child.kill()


async def test_one_that_ends_instead_is_not_waited_for() -> None:
    with subprocess.Popen(["sh", "-c", "read word"], stdin=subprocess.PIPE) as child:
        await until(lambda: b"read word" in Path(f"/proc/{child.pid}/cmdline").read_bytes())
        stands = keeper.program(child.pid)
        waiting = asyncio.ensure_future(asyncio.to_thread(keeper.begun, child.pid, stands))
        child.kill()
        child.wait()
        await waiting
    keeper.begun(child.pid, None)  # it may not be looked at: it is believed
