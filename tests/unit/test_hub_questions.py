"""The hub's questions: an answer counts from the edge that was asked alone, whatever else is said; nothing waits for ever, and nothing is kept."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.questions import pieces
from hub import questions
from hub.questions import MAX_ASKED, Questions, Unanswered


class Side:
    """A hub's questions, and what it published and refused."""

    def __init__(self) -> None:
        self.published: list[dict[str, Any]] = []
        self.refused: list[tuple[str, str]] = []
        self.asked = asyncio.Event()
        self.questions = Questions("hub", self._publish, lambda edge, error: self.refused.append((edge, error.field)), lambda: 1000, lambda edge: edge == "gw-away")

    def _publish(self, edge: str, leaf: str, payload: bytes, retain: bool) -> None:
        assert leaf == "ask" and not retain
        self.published.append({"to": edge, **jsoncodec.decode(payload)})
        self.asked.set()

    def answer(self, edge: str, name: str, output: dict[str, bytes], detail: dict[str, Any], by: str = "") -> None:
        for piece in pieces(edge, name, output, detail):
            self.questions.answered(by or edge, jsoncodec.encode(piece).encode())


async def test_an_answer_counts_from_the_edge_that_was_asked_alone() -> None:
    side = Side()
    asking = asyncio.create_task(side.questions.ask("gw-1", "logs", "a", bytes=100))
    await side.asked.wait()
    [told] = side.published
    assert (told["to"], told["edge"], told["bytes"], told["hub"]) == ("gw-1", "gw-1", 100, "hub") and told["expires_ms"] > 1000
    side.answer("gw-2", told["id"], {"stdout": b"forged"}, {})
    side.answer("gw-1", told["id"], {"stdout": b"forged"}, {}, by="gw-2")
    side.questions.answered("gw-1", b"\xff not json")
    side.answer("gw-1", "q-of-nobody", {}, {})
    assert {edge for edge, _ in side.refused} == {"gw-1", "gw-2"} and not asking.done()
    side.answer("gw-1", told["id"], {"stdout": b"out", "stderr": b"err"}, {"phase": "running"})
    detail, found = await asking
    assert (detail, found.output("stdout"), found.output("stderr")) == ({"phase": "running"}, b"out", b"err")
    assert side.questions._waiting == {}


async def test_what_an_edge_refuses_is_passed_on_and_silence_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side()
    asking = asyncio.create_task(side.questions.ask("gw-1", "exec", "a", args=["id"]))
    await side.asked.wait()
    side.answer("gw-1", side.published[0]["id"], {}, {"field": "exec", "problem": "no", "remedy": "set it"})
    with pytest.raises(Unanswered) as caught:
        await asking
    assert (caught.value.status, caught.value.field, caught.value.problem, caught.value.remedy) == (409, "exec", "no", "set it")
    monkeypatch.setattr(questions, "ANSWER_S", 0.0)
    with pytest.raises(Unanswered) as caught:
        await side.questions.ask("gw-1", "logs", "a")
    assert caught.value.status == 503 and side.questions._waiting == {}
    published = len(side.published)
    with pytest.raises(Unanswered, match="is offline"):
        await side.questions.ask("gw-away", "logs", "a")
    assert len(side.published) == published, "an edge that is away is not even asked"
    with pytest.raises(ContractError, match="args"):
        await side.questions.ask("gw-1", "exec", "a")


async def test_no_more_wait_than_there_is_memory_for() -> None:
    side = Side()
    waiting = [asyncio.create_task(side.questions.ask("gw-1", "logs", "a")) for _ in range(MAX_ASKED)]
    while len(side.published) < MAX_ASKED:
        await asyncio.sleep(0)
    with pytest.raises(Unanswered, match="wait already"):
        await side.questions.ask("gw-1", "logs", "a")
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert side.questions._waiting == {}, "who goes leaves nothing behind"


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["v", "edge", "id", "part", "data", "last", "detail"]), inner, max_size=7)).map(lambda value: jsoncodec.encode(value).encode()))
def test_nothing_that_an_edge_publishes_breaks_it(payload: bytes) -> None:
    side = Side()
    side.questions.answered("gw-1", payload)
    assert len(side.refused) <= 1
