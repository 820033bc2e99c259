"""Answers the hub's questions about workloads that are here: the end of what one has written, or what came since; a command in one, where this node's configuration lets the hub do that."""

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from ..contract.questions import EXEC, MAX_EXEC_S, MAX_OUTPUT, pieces
from .drivers.face import Ability, Driver, DriverError, Executes, Observes, Phase, Refused, Status
from .drivers.instance import Mark, since

log = logging.getLogger(__name__)

MAX_ANSWERING = 4
"""Questions that are answered at a time; a half of a megabyte each."""

REMEMBERED = 256
"""Questions that are remembered, so that one that the broker brings twice is answered once: more than come while a broker sends again."""

MAX_TOLD_ARGS = 1024
"""Characters of a command that its record has."""

_SINCE = re.compile(r"(\d{1,19}):(\d{1,19}):(\d{1,10})/(\d{1,19}):(\d{1,19}):(\d{1,10})\Z")

Send = Callable[[dict[str, Any]], Awaitable[bool]]
"""Sends a piece; False where nobody waits any more."""


class Journal(Protocol):
    """What is needed of the journal."""

    def append(self, stream: str, kind: str, body: dict[str, Any], on_durable: Callable[..., None] | None = None) -> Any:
        """One record."""


class Questions:
    """Answers.

    Args:
        edge: this edge's name.
        newest: on whose disk a workload's newest placement is, and how it stands; None where there is none.
        left: the end of what a workload wrote that was removed, as text by stream.
        exec: whether the hub may run commands here.
    """

    def __init__(self, edge: str, journal: Journal, newest: Callable[[str], Awaitable[tuple[Driver, Status] | None]], left: Callable[[str], Mapping[str, Any] | None], exec_: bool) -> None:
        self._edge, self._journal, self._newest, self._left, self._exec = edge, journal, newest, left, exec_
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, question: Mapping[str, Any], send: Send) -> None:
        """A question, as `contract.questions.QUESTION` has it; answered by and by, through `send`."""
        if question["id"] in self._seen:
            return
        self._seen[question["id"]] = None
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        busy = len(self._tasks) >= MAX_ANSWERING
        task = asyncio.get_running_loop().create_task(self._answer(question, send, busy), name=f"question {question['id']}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Answer nothing more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer(self, question: Mapping[str, Any], send: Send, busy: bool) -> None:
        output: Mapping[str, bytes] = {}
        try:
            if busy:
                raise Refused("edge", f"answers {MAX_ANSWERING} questions already", "ask again in a second")
            output, detail = await (self._run(question) if question["kind"] == EXEC else self._written(question))
        except DriverError as error:
            detail = error.to_json()
        except Exception as error:
            log.exception("question %s could not be answered", question["id"])
            detail = {"field": "edge", "problem": f"it could not be answered ({type(error).__name__})", "remedy": "see the edge's log"}
        for piece in pieces(self._edge, question["id"], output, detail):
            if not await send(piece):
                return

    async def _there(self, workload: str) -> tuple[Driver, Status]:
        found = await self._newest(workload)
        if found is None:
            raise Refused("workload", f"nothing of {workload} is here", "see where it runs: novactl workload list")
        return found

    async def _written(self, question: Mapping[str, Any]) -> tuple[Mapping[str, bytes], dict[str, Any]]:
        workload, most = question["workload"], min(int(question["bytes"]), MAX_OUTPUT)
        marks = _marks(question["since"])
        try:
            driver, status = await self._there(workload)
        except Refused:
            kept = self._left(workload)
            if kept is None:
                raise
            output = {stream: str(kept[stream]).encode() if not question["since"] else b"" for stream in ("stdout", "stderr")}
            return output, {"epoch": kept["epoch"], "phase": kept["phase"], "reason": kept["reason"], "cut": kept["cut"], "since": question["since"] or "0:0:0/0:0:0"}
        told = {"epoch": status.key.epoch, "phase": status.phase.value, "reason": status.reason}
        if not isinstance(driver, Observes) or not hasattr(driver, "folder"):
            return {}, {**told, "cut": False, "since": question["since"]}
        folder = driver.folder(status.key)
        (out, out_mark, out_cut), (err, err_mark, err_cut) = [
            await asyncio.to_thread(since, folder / f"{stream}.log", mark, most) for stream, mark in zip(("stdout", "stderr"), marks, strict=True)
        ]
        return {"stdout": out, "stderr": err}, {**told, "cut": out_cut or err_cut, "since": "/".join(":".join(map(str, mark)) for mark in (out_mark, err_mark))}

    async def _run(self, question: Mapping[str, Any]) -> tuple[Mapping[str, bytes], dict[str, Any]]:
        if not self._exec:
            raise Refused(Ability.EXEC.value, "this node lets the hub run no commands in workloads", "set workloads.exec in its configuration, or run it there")
        driver, status = await self._there(question["workload"])
        if status.phase is not Phase.RUNNING:
            raise Refused("workload", f"{question['workload']} does not run ({status.phase.value})", "ask when it runs")
        if not isinstance(driver, Executes):
            raise Refused(Ability.EXEC.value, "the driver that runs it runs no commands in it", "run it as a container")
        told = {"id": status.key.id, "epoch": status.key.epoch, "question": question["id"], "hub": question["hub"], "args": " ".join(question["args"])[:MAX_TOLD_ARGS]}
        durable = asyncio.Event()
        self._journal.append("event", "workload.exec", {**told, "state": "begun"}, lambda _: durable.set())
        await durable.wait()  # nothing is run of which there could be no record
        try:
            ran = await driver.exec(status.key, question["args"], min(float(question["timeout_s"]), MAX_EXEC_S))
        except DriverError as error:
            self._journal.append("event", "workload.exec", {**told, "state": "failed", "reason": str(error)[:1000]})
            raise
        self._journal.append("event", "workload.exec", {**told, "state": "ended", "code": ran.exit.code})
        output = {"stdout": ran.output.stdout[:MAX_OUTPUT], "stderr": ran.output.stderr[:MAX_OUTPUT]}
        cut = ran.output.cut or len(ran.output.stdout) > MAX_OUTPUT or len(ran.output.stderr) > MAX_OUTPUT
        return output, {"epoch": status.key.epoch, "phase": status.phase.value, "reason": ran.exit.reason, "cut": cut, "code": ran.exit.code}


def _marks(text: str) -> tuple[Mark | None, Mark | None]:
    """Places in both logs, from an answer's `since`. Raises `Refused`."""
    if not text:
        return None, None
    found = _SINCE.match(text)
    if found is None:
        raise Refused("since", f"{text[:40]!r} is no place in a log", "send what an answer had as `since`, or leave it out")
    inode, place, before, other_inode, other_place, other_before = (int(one) for one in found.groups())
    return (inode, place, before), (other_inode, other_place, other_before)
