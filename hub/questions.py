"""Questions to edges about workloads that are there, and the answers that come back; nothing of either is stored."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.limits import PROTOCOL_VERSION
from edge_runtime.contract.questions import ANSWER, EXEC, QUESTION, Collected

log = logging.getLogger(__name__)

MAX_ASKED = 32
"""Questions that wait for an answer; each may bring half a megabyte."""

ANSWER_S = 10.0
"""An edge that is there answers in a fraction of this; with a command, so much longer than that may take."""


class Unanswered(RuntimeError):
    """No answer came, or the edge refused: `field`, `problem`, `remedy`; `status`: what HTTP calls it."""

    def __init__(self, field: str, problem: str, remedy: str, status: int) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field, self.problem, self.remedy, self.status = field, problem, remedy, status


class Questions:
    """The questions of one hub.

    Args:
        publish: `publish(edge, leaf, payload, retain)`.
        refused: counts and remembers a bad message of an edge.
        away: whether an edge is known to be offline: nobody waits for what cannot come.
    """

    def __init__(self, hub: str, publish: Callable[[str, str, bytes, bool], None], refused: Callable[[str, ContractError], None], now_ms: Callable[[], int], away: Callable[[str], bool]) -> None:
        self._hub, self._publish, self._refused, self._now_ms, self._away = hub, publish, refused, now_ms, away
        self._waiting: dict[str, tuple[str, Collected, asyncio.Event]] = {}

    async def ask(self, edge: str, kind: str, workload: str, **more: Any) -> tuple[Mapping[str, Any], Collected]:
        """Ask, and wait for all of the answer; its detail and its streams. Raises `ContractError` for what cannot be asked, `Unanswered` where nothing comes or the edge refuses."""
        if len(self._waiting) >= MAX_ASKED:
            raise Unanswered("hub", f"{MAX_ASKED} questions wait already", "ask again in a second", 503)
        name = f"q-{secrets.token_hex(8)}"
        asked = QUESTION.parse({"v": PROTOCOL_VERSION, "edge": edge, "id": name, "hub": self._hub, "kind": kind, "workload": workload, "expires_ms": 0, **more})
        if self._away(edge):
            raise Unanswered("edge", f"{edge} is offline", "ask when it is back", 503)
        seconds = ANSWER_S + (asked["timeout_s"] if kind == EXEC else 0.0)
        asked["expires_ms"] = self._now_ms() + int(seconds * 1000)
        collected, whole = Collected(), asyncio.Event()
        self._waiting[name] = edge, collected, whole
        try:
            self._publish(edge, "ask", jsoncodec.encode(asked).encode(), False)
            async with asyncio.timeout(seconds):
                await whole.wait()
        except TimeoutError:
            raise Unanswered("edge", f"{edge} did not answer within {seconds:g} s", "see whether it is online (novactl status), and whether its agent is of a version that answers", 503) from None
        finally:
            del self._waiting[name]
        detail = collected.detail or {}
        if "problem" in detail:
            raise Unanswered(str(detail.get("field"))[:80], str(detail["problem"])[:1000], str(detail.get("remedy"))[:1000], 409)
        return detail, collected

    def answered(self, edge: str, payload: bytes) -> None:
        """A piece of an answer; what nobody waits for is dropped."""
        try:
            piece = ANSWER.parse(jsoncodec.decode(payload))
            waiting = self._waiting.get(piece["id"])
            if waiting is None:
                return
            if piece["edge"] != edge or waiting[0] != edge:
                raise ContractError("edge", f"{edge!r} answers a question to {waiting[0]!r}", "publish on the edge's own topic", "topic")
            waiting[1].take(piece)
        except ContractError as error:
            self._refused(edge, error)
            return
        if waiting[1].detail is not None:
            waiting[2].set()
