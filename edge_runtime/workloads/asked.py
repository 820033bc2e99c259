"""What the hub and people at the node ask of the workloads here, beside running them: operations on checkpoints, and questions."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EdgeConfig
from ..contract.errors import ContractError
from ..contract.limits import MAX_OPERATIONS
from ..contract.schema import check_fields
from ..contract.workloads import ASKED, MOVE_COME, MOVES, MOVING, OPERATION_FIELDS, RUNNING
from ..journal import Journal
from .operations import Operations

if TYPE_CHECKING:
    from .carrier import Carrier
    from .checkpoints import CheckpointFolder, Checkpointing
    from .drivers.face import Driver, Status
    from .images import ImageStore
    from .questions import Questions
    from .runner import Runner
    from .snapshots import SnapshotFolder, Snapshotting

ASKED_HERE_MS = 300_000
"""An operation that is asked for at the node itself is begun within this, or not at all."""

TOLD, TOLD_SNAPSHOTS = "workload_checkpoints", "workload_snapshots"
"""The journal's state documents that keep what was told last of the checkpoints, and of the snapshots, here."""


class Asked:
    """Of one node.

    Args:
        entries: the workloads that desired state lists.
        newest: on whose disk a workload's newest placement is, and how it stands; None where there is none.
        left: the end of what a workload wrote that was removed.
    """

    def __init__(
        self, config: EdgeConfig, journal: Journal, entries: Callable[[], Sequence[Mapping[str, Any]]], newest: Callable[[str], Awaitable["tuple[Driver, Status] | None"]],
        left: Callable[[str], Mapping[str, Any] | None],
    ) -> None:
        self._config, self._journal, self._entries, self._newest, self._left = config, journal, entries, newest, left
        self._operations = Operations(journal, self._carry_out)
        self._early: tuple[Sequence[dict[str, Any]], frozenset[str]] = ((), frozenset())
        """Operations that were asked for before the drivers had been probed, and those of them that had expired."""
        self._probed = not config.workloads.enabled
        self._runner: Runner | None = None
        self._why = ""
        self._checkpoints: CheckpointFolder | None = None
        self._snapshots: SnapshotFolder | None = None
        self.snapshotting: Snapshotting | None = None
        self._telling: asyncio.Task[None] | None = None
        self._carrier: Carrier | None = None
        self._questions: Questions | None = None

    async def checkpointing(self, folder: Path) -> "Checkpointing":
        """What carries out operations; called once, when the drivers have settled what an earlier agent left."""
        from .checkpoints import CheckpointFolder, Checkpointing

        self._checkpoints = await asyncio.to_thread(CheckpointFolder, folder)
        await asyncio.to_thread(self._checkpoints.tidy)
        moves = None
        if self._config.workloads.moves_hub:
            from .carrier import Carrier
            from .moves import Moves

            moves = Moves(folder.parent / "moves", self._checkpoints, self._config.workloads.evict_disk_bytes)
            self._carrier = Carrier(self._config.edge_id, folder.parent / "moves", self._config.workloads, moves.sweep)
        return Checkpointing(self._checkpoints, self._operations, self._config.workloads.images_bytes, self._changed, moves)

    async def snapshots(self, folder: "SnapshotFolder", store: "ImageStore") -> "Snapshotting":
        """What carries out operations on snapshots; called once, after `checkpointing`."""
        from .snapshots import Snapshotting

        async def held() -> int:
            return (await self.held())[1]

        await asyncio.to_thread(folder.tidy)
        self._snapshots = folder
        self.snapshotting = Snapshotting(folder, self._operations, store, self._config.workloads.images_bytes, held, self._changed)
        return self.snapshotting

    def begin(self, runner: "Runner | None", why: str) -> None:
        """The drivers have been probed; `why` there is no runner, where there is none."""
        self._runner, self._why, self._probed = runner, why, True
        self._operations.resume()
        self.operate(*self._early)
        self._changed()

    async def close(self) -> None:
        """Begin nothing more, and answer nothing more."""
        if self._questions is not None:
            await self._questions.close()
        if self._carrier is not None:
            await self._carrier.close()
        if self.snapshotting is not None:
            await self.snapshotting.close()
        if self._telling is not None:
            await asyncio.gather(self._telling, return_exceptions=True)

    async def held(self) -> tuple[set[str], int]:
        """Layers of images that checkpoints stand on and snapshots are being made of, and the bytes that both take."""
        kept = await asyncio.to_thread(self._checkpoints.all) if self._checkpoints is not None else []
        taken = await asyncio.to_thread(self._snapshots.all) if self._snapshots is not None else []
        layers = self.snapshotting.layers() if self.snapshotting is not None else set()
        return layers.union(*(one.layers for one in kept)), sum(one.bytes for one in kept) + sum(one.bytes for one in taken)

    def operate(self, entries: Sequence[dict[str, Any]], late: frozenset[str]) -> None:
        """Operations of a desired state that was taken, `late` those that had expired; each is carried out once, also over restarts."""
        if self._probed:
            if self._runner is not None:
                self._runner.expect({(one["workload"], int(one["epoch"])) for one in entries if one["kind"] == MOVE_COME})
            self._operations.take(entries, late)
            if self._carrier is not None:
                self._carrier.need({one["name"] for one in entries if one["kind"] in MOVES and one["name"].startswith(MOVING)})
        else:
            self._early = (entries, late)

    def ask(self, workload: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """An operation that somebody at the node asks for: `kind`, `name`, `stop`, and `id` where it shall be done once however often it is asked. How it stands then. Raises `ContractError`."""
        if not self._probed:
            raise ContractError("node", "the agent has just started, and looks at what it can run", "come again")
        entry = next((one for one in self._entries() if one["id"] == workload and one["wanted"] == RUNNING), None)
        if entry is None:
            raise ContractError("workload", f"{workload[:80]!r} shall not run here", "list /api/v1/workloads; ask the hub where it runs")
        if self._operations.open >= MAX_OPERATIONS:
            raise ContractError("operations", f"{self._operations.open} are under way, the most there may be", "wait until some have ended", "limit")
        if asked.get("kind") in MOVES:
            raise ContractError("kind", f"{asked['kind']!r} is the hub's to ask for", f"use one of {', '.join(ASKED)}")
        told = check_fields(OPERATION_FIELDS, {
            "id": f"local-{secrets.token_hex(8)}", **asked, "workload": workload, "epoch": entry["epoch"], "expires_ms": int(time.time() * 1000) + ASKED_HERE_MS,
        }, "payload")
        self._operations.take([told])
        return self._operations.get(told["id"]) or {}

    def operation(self, name: str) -> dict[str, Any] | None:
        """One operation, as its newest record says; None where it is not known (any more)."""
        return self._operations.get(name)

    async def checkpoints(self, workload: str) -> list[dict[str, Any]]:
        """The checkpoints of one workload that are here, the oldest first."""
        if self._checkpoints is None:
            return []
        return [one.to_json() for one in await asyncio.to_thread(self._checkpoints.all, workload)]

    async def snapshots_here(self, workload: str = "") -> list[dict[str, Any]]:
        """The snapshots that are here, the oldest first; of one workload only where it is named."""
        if self._snapshots is None:
            return []
        return [one.to_json() for one in await asyncio.to_thread(self._snapshots.all) if workload in ("", one.workload)]

    def question(self, question: Mapping[str, Any], send: Callable[[dict[str, Any]], Awaitable[bool]]) -> None:
        """Answer a question of the hub, by and by."""
        if self._questions is None:
            from .questions import Questions

            self._questions = Questions(self._config.edge_id, self._journal, self._newest, self._left, self._config.workloads.exec)
        self._questions.take(question, send)

    def _carry_out(self, asked: Mapping[str, Any]) -> None:
        if self._runner is not None and self._checkpoints is not None:
            self._runner.operate(asked)
        else:
            self._operations.end(asked["id"], "failed", f"containers cannot be run here: {self._why or 'switched off (workloads in its configuration)'}")

    def _changed(self) -> None:
        """Tell which checkpoints and snapshots are here, where that is news."""
        if self._checkpoints is None:
            return
        folder, before = self._checkpoints, self._telling

        def say(word: str, kept: str, there: list[dict[str, Any]]) -> None:
            if there != (self._journal.state(kept) or []):
                self._journal.append("event", f"workload.{word}", {word: there})
                self._journal.put_state(kept, there)

        async def tell() -> None:
            if before is not None:
                await asyncio.gather(before, return_exceptions=True)
            say("checkpoints", TOLD, [one.to_json() for one in await asyncio.to_thread(folder.all)])
            say("snapshots", TOLD_SNAPSHOTS, await self.snapshots_here())

        self._telling = asyncio.get_running_loop().create_task(tell(), name="checkpoints and snapshots, telling")
