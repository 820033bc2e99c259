"""An agent that is killed at a point of its part in a move, once: `python -m tests.system.moving_agent POINT FILE run --config ...`; FILE is made when it is, and then it is an agent as any other.

With AHEAD_LEAST in its environment the disks of virtual machines go ahead from so many bytes on.

POINT: at a source `leaving` (written down: it shall be copied while it runs), `near` (nearly all of it is at its target), `live` (the same, not written down), `copied` (the disk that goes ahead), `ahead` (done, not written down), `taking` (written down), what `container_checkpoint.STEPS` has, `packed-up` (the file for the way is there), `out` (done, not written down); `returned` (its state has its name back), `back` (it runs again, not written
down). At a target `laid-out` (to see whether it fits; of a virtual machine: looked at), `arrived` (one waits for a machine that runs), `come` (that is done, not written down), `room` (done, not written down), `came` (the checkpoint is made of the file), `filled` (of a virtual machine: laid out from it),
`restored` (it runs, not told), `settled` (told, and its state removed). `refuses`: it is not killed; nothing that comes is taken. `drops`: nor is it then; what waits for a machine that runs
is ended when it is told that that may begin.
"""

import inspect
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_runtime.cli import main
from edge_runtime.workloads import moves, runner
from edge_runtime.workloads.drivers import vm_checkpoint, vm_live
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.face import Failed
from edge_runtime.workloads.drivers.vm import VmDriver
from edge_runtime.workloads.operations import Operations


def planted(point: str, mark: Path) -> None:
    """Have this process killed there."""
    if mark.exists():
        return

    def kill(word: str) -> None:
        if word == point and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def after(where: Any, name: str, word: Callable[..., str]) -> None:
        """Kill when an awaited or plain function has done its work."""
        before = getattr(where, name)

        async def awaited(*rest: Any, **more: Any) -> Any:
            found = await before(*rest, **more)
            kill(word(*rest, **more))
            return found

        def plain(*rest: Any, **more: Any) -> Any:
            found = before(*rest, **more)
            kill(word(*rest, **more))
            return found

        setattr(where, name, awaited if inspect.iscoroutinefunction(before) else plain)

    if point == "refuses":
        async def refuses(*_: Any, **__: Any) -> Any:
            raise Failed("restore", "planted", "none")

        ContainerDriver.restore = VmDriver.restore = refuses  # type: ignore[method-assign]
    if point == "drops":
        go = vm_live.Live.go

        async def drops(self: Any, key: Any) -> Any:
            await self.drop(key)
            return await go(self, key)

        vm_live.Live.go = drops  # type: ignore[method-assign]
    checkpoints, end, say = {ContainerDriver: ContainerDriver.checkpoint, VmDriver: VmDriver.checkpoint}, Operations.end, runner.Runner._say

    async def taken(self: Any, *rest: Any, **more: Any) -> Any:
        return await checkpoints[type(self)](self, *rest, **more, step=kill)

    def over(self: Operations, name: str, *rest: Any, **more: Any) -> None:
        kill(name.rpartition(".")[2])
        end(self, name, *rest, **more)

    def told(self: runner.Runner, entry: Any, state: str, *rest: Any, **more: Any) -> None:
        if entry.get("from") and state == "running":
            kill("restored")
        say(self, entry, state, *rest, **more)

    ContainerDriver.checkpoint = VmDriver.checkpoint = taken  # type: ignore[method-assign]
    Operations.end, runner.Runner._say = over, told  # type: ignore[method-assign,assignment]
    after(Operations, "reach", lambda self, name, step: step)
    after(moves.Moves, "pack", lambda *_: "packed-up")
    after(moves.Moves, "came", lambda *_: "came")
    after(moves.Moves, "settled", lambda *_: "settled")
    after(moves.Moves, "return_of", lambda *_: "returned")
    after(VmDriver, "ahead", lambda *_: "copied")
    after(VmDriver, "arrive", lambda *_: "arrived")
    after(VmDriver, "leave", lambda *_: "near")
    after(VmDriver, "migrate_in", lambda *_: "laid-out")
    after(VmDriver, "_laid", lambda self, order, fill=None, arrives="": "filled" if fill is not None and not arrives else "")
    after(ContainerDriver, "prepare", lambda self, order: "laid-out" if order.key.epoch == moves.TRIED_EPOCH else "")


if __name__ == "__main__":
    vm_checkpoint.AHEAD_LEAST = int(os.environ.get("AHEAD_LEAST", vm_checkpoint.AHEAD_LEAST))
    planted(sys.argv[1], Path(sys.argv[2]))
    sys.argv[1:3] = []
    sys.exit(main())
