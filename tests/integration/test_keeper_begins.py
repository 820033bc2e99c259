"""When a container's keeper says that it runs, and what it waits for: with processes of this machine that become another program, or end, when they are told to."""

import asyncio
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

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


def test_a_command_of_the_runtime_is_waited_for_by_its_end_and_not_by_looking_again_and_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Looking again has its price: 50 ms between two looks. The control: what Python's own wait does with a limit."""
    looks: list[float] = []
    rest = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (looks.append(seconds), rest(seconds)))
    subprocess.run(["sleep", "0.05"], timeout=60)
    assert looks, "the control"
    looks.clear()
    keeper.runtime(_told(tmp_path, "sleep 0.05"), "create")
    assert not looks


@pytest.mark.parametrize(("script", "seconds", "says"), [("exec sleep 1000", 0.05, "had not ended"), ("exit 3", 60.0, "failed with 3"), ("kill -9 $$", 60.0, "failed with -9")])
def test_a_command_of_the_runtime_that_hangs_or_fails_is_told(tmp_path: Path, script: str, seconds: float, says: str) -> None:
    with pytest.raises(keeper.Trouble, match=f"create: .*{says}"):
        keeper.runtime(_told(tmp_path, f"echo $$ > {tmp_path}/pid; {script}"), "create", seconds=seconds)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists(), "nothing of it is left"


def _told(folder: Path, script: str) -> dict[str, Any]:
    return {"folder": str(folder), "runtime": ["sh", "-c", script]}
