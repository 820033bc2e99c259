"""The agent's half of an update: an order becomes an operation, each of its steps a record before it is taken; the health gate of an image on trial; how it ended.

What has rights over disks is another process (`__main__.py`). The two speak by files: `request.json` in a folder of the agent's, `status.json` in one of root's. Neither waits for the other: each may be cut off at any
time, and goes by what stands there.
"""

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..contract import jsoncodec
from ..contract.errors import ContractError
from ..contract.operations import FINAL_STATES, Operation
from ..contract.updates import parse_order
from ..journal import Journal

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks at the status while an update is under way."""

IDLE_LOOK_S = 60.0
"""Between two looks without one: what the initrd left behind is told by the other process at some time after a start."""

ASK_AGAIN_LOOKS = 30
"""Looks without news after which a request is written anew: the one before may have come while the other process was ending."""

SETTLED_LOOKS = 10
"""Looks in a row in which nothing may be missing before an image has proven itself: what fails right after its start is not taken for well."""

PROGRESS_PERCENT = 10
"""A download is worth a record each so many percent."""

REMEMBERED = 32
"""Ended updates whose ids are known, so that none is done twice."""

STATUS_MAX_BYTES = 65_536

_NEXT = {"written": ("switching", "switch"), "trial": ("proven", "good")}
"""The installer's state to the step that follows (written down first) and what is then asked of it."""

_ENDS = {"good": "succeeded", "refused": "failed", "failed": "failed"}


class UpdateDuty:
    """One edge's updates, one at a time.

    Args:
        requests: the agent's folder for its requests.
        status: the installer's status file.
        missing: what is still missing before this edge is well; the argument says whether its hub was there before the update.
        linked: whether the hub is there now.
        ca_file: by what an order's address is trusted; empty for the system's authorities.
    """

    def __init__(
        self, requests: Path, status: Path, journal: Journal, missing: Callable[[bool], list[str]], linked: Callable[[], bool], ca_file: str = "",
    ) -> None:
        self._ca_file = ca_file
        self._requests, self._status, self._journal, self._missing, self._linked = requests, status, journal, missing, linked
        self._now: dict[str, Any] = journal.state("update") or {}
        self._ended: dict[str, Any] = journal.state("updates_ended") or {}
        self._writing = False
        self._quiet = self._well = 0
        self._gate_told: list[str] | None = None
        self._wanted: dict[str, Any] | None = None
        self._news = asyncio.Event()

    # -- orders --------------------------------------------------------------------------------------------------------------

    def to_json(self) -> list[dict[str, Any]]:
        """The updates that are known, as operations, the newest last."""
        return [*self._ended.values(), *([self._now["operation"]] if self._now else [])]

    def order(self, value: Any) -> dict[str, Any]:
        """Take an order on; the operation. Raises ContractError: it cannot be, or another update is under way."""
        order = parse_order(value)
        if ended := self._ended.get(order["id"]):
            return dict(ended)
        if self._now:
            if self._now["operation"]["id"] == order["id"]:
                return dict(self._now["operation"])
            raise ContractError("id", f"update {self._now['operation']['id']} is under way", "wait until it has ended", "busy")
        self._now = {"order": order, "linked": self._linked(), "operation": Operation(order["id"], "update").to_json()}
        self._move("running", "accepted", then=lambda: self._ask("install"))
        self._news.set()
        return dict(self._now["operation"])

    def want(self, order: dict[str, Any]) -> None:
        """What the hub's desired state names: ordered now, or when the update that is under way has ended. A checked order."""
        self._wanted = order
        self._news.set()

    def _take_wanted(self) -> None:
        if self._wanted is None or self._now:
            return
        order, self._wanted = self._wanted, None
        self.order(order)

    # -- following -----------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow updates until cancelled."""
        while True:
            try:
                self.look()
                self._take_wanted()
            except Exception:
                log.exception("looking at the update failed")
            if self._now or self._wanted is not None:
                await asyncio.sleep(LOOK_S)
            else:
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), IDLE_LOOK_S)

    def look(self) -> None:
        """One look at the installer's status, and what follows from it."""
        status = self._read()
        if self._writing:
            return  # a step is being written down
        if not self._now:
            # The journal does not know of it (it was lost, or this is another edge's disk): told as it stands, so that a good image is not given up.
            if status.get("state") in (*_NEXT, *_ENDS, "switched") and status["id"] not in self._ended:
                self._now = {"order": {"id": status["id"]}, "linked": False, "operation": Operation(status["id"], "update").to_json()}
            else:
                return
        operation = self._now["operation"]
        state = status.get("state", "") if status.get("id") == operation["id"] else ""
        detail = {name: value for name, value in status.get("detail", {}).items() if name != "field"} if state else {}
        if state in _ENDS:
            self._move(_ENDS[state], state, str(status.get("reason", ""))[:500], detail, self._forget)
        elif state in _NEXT and (state == "written" or self._proven()):
            step, action = _NEXT[state]
            if operation["step"] == step:
                self._ask_again(action)
            else:
                self._move("running", step, "", detail, lambda: self._ask(action))
        elif state == "switched":
            if operation["step"] != "restarting":
                self._move("running", "restarting", "", detail)
            self._ask_again("switch")
        elif state in ("writing", "waiting") and self._further(operation, state, detail):
            self._move("running", state, str(status.get("reason", ""))[:500], detail)
        elif state in ("", "checking"):
            self._ask_again("install")

    def _further(self, operation: dict[str, Any], state: str, detail: dict[str, Any]) -> bool:
        if operation["step"] != state:
            return True
        total = max(1, int(detail.get("total", 0) or 0))
        return (int(detail.get("bytes", 0)) - int(operation["detail"].get("bytes", 0))) * 100 >= PROGRESS_PERCENT * total and total > 1

    def _proven(self) -> bool:
        """Whether the image on trial has done what it must: nothing missing, for a while. The record that says so then has to reach the journal."""
        missing = self._missing(bool(self._now.get("linked")))
        if missing != self._gate_told:
            self._gate_told = missing
            self._write("gate.json", {"id": self._now["operation"]["id"], "missing": missing})
        self._well = 0 if missing else self._well + 1
        return self._well >= SETTLED_LOOKS

    def _move(self, state: str, step: str, reason: str = "", detail: dict[str, Any] | None = None, then: Callable[[], None] | None = None) -> None:
        """The operation moves: first as a record; `then` when that is durable."""
        operation = Operation.from_json(self._now["operation"])
        moved = operation.advance(state, epoch=operation.epoch, step=step, reason=reason, detail=detail or operation.detail).to_json()
        self._now["operation"] = moved
        self._writing, self._quiet = True, 0

        def durable(_record: Any = None) -> None:
            self._writing = False
            if then is not None:
                then()

        if state in FINAL_STATES:
            self._ended[moved["id"]] = moved
            for known in list(self._ended)[:-REMEMBERED]:
                del self._ended[known]
            self._journal.put_state("updates_ended", self._ended)
        self._journal.put_state("update", None if state in FINAL_STATES else self._now)
        self._journal.append("event", "operation", moved, durable)

    def _forget(self) -> None:
        self._now = {}
        self._well, self._gate_told = 0, None
        for name in ("request.json", "gate.json"):
            (self._requests / name).unlink(missing_ok=True)

    # -- files ---------------------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Any]:
        try:
            with self._status.open("rb") as file:
                value = jsoncodec.decode(file.read(STATUS_MAX_BYTES))
        except (OSError, ContractError):
            return {}
        return value if isinstance(value, dict) and isinstance(value.get("id"), str) and isinstance(value.get("detail", {}), dict) else {}

    def _ask_again(self, action: str) -> None:
        self._quiet += 1
        if self._quiet % ASK_AGAIN_LOOKS == 0:
            self._ask(action)

    def _ask(self, action: str) -> None:
        # `asked` makes it another file each time.
        self._write("request.json", {**self._now["order"], "ca_file": self._ca_file, "action": action, "asked": self._quiet})

    def _write(self, name: str, value: dict[str, Any]) -> None:
        try:
            self._requests.mkdir(parents=True, exist_ok=True)
            new = self._requests / (name + ".new")
            with new.open("w") as file:
                json.dump(value, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self._requests / name)
        except OSError as error:
            log.error("%s cannot be written: %s", name, error)
