"""Questions and answers: what a log got is read once, in order, whatever turns meanwhile; an answer comes in pieces and is put together again, and nobody vouches for them."""

import asyncio
import base64
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.limits import MAX_MESSAGE_BYTES
from edge_runtime.contract.questions import ANSWER, MAX_OUTPUT, MAX_PIECES, QUESTION, Collected, pieces
from edge_runtime.workloads.drivers.face import Exit, Failed, Key, Output, Phase, Ran, Status
from edge_runtime.workloads.drivers.instance import NOWHERE, since
from edge_runtime.workloads.drivers.keeping import Log
from edge_runtime.workloads.questions import MAX_ANSWERING, Questions

EDGE = "gw-1"


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 60)), max_size=25), st.integers(40, 200))
@settings(max_examples=200)
def test_what_a_log_got_is_read_once_in_order_and_what_is_missing_is_said(steps: list[tuple[int, int]], most: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stdout.log")
        assert since(path, None, 10) == (b"", NOWHERE, False)
        log, mark, written, read, count = Log(str(path), most), NOWHERE, b"", b"", 0
        for lines, size in steps:
            data = b"".join(b"%d\n" % number for number in range(count, count + lines))
            count += lines
            log.take(data)
            written += data
            found, mark, missing = since(path, mark, size)
            assert len(found) <= size
            if missing:
                assert written.endswith(found)
                read = written
            else:
                assert written[len(read):].startswith(found), (written, read, found)
                read += found
        while True:  # the rest, with nobody writing
            found, mark, missing = since(path, mark, 7)
            if missing:
                assert written.endswith(found)
                read = written
            elif found:
                read += found
            else:
                break
        assert read == written
        assert written.endswith(since(path, None, 10_000)[0])


def test_a_reader_that_is_slower_than_its_log_hears_that_something_is_missing(tmp_path: Path) -> None:
    """The negative control of the above: two turns of the files between two looks."""
    path = tmp_path / "stdout.log"
    log = Log(str(path), 20)
    log.take(b"0123")
    found, mark, missing = since(path, None, 100)
    assert (found, missing) == (b"0123", False)
    for _ in range(3):
        log.take(b"abcdefghij")
    found, _, missing = since(path, mark, 100)
    assert missing and found == b"ghijabcdefghij", "what the two files have still"
    assert since(path, None, 3) == (b"hij", since(path, None, 3)[1], True)


@given(st.binary(max_size=400_000), st.binary(max_size=2000))
@settings(max_examples=25)
def test_an_answer_is_put_together_as_it_was(out: bytes, err: bytes) -> None:
    sent = list(pieces(EDGE, "q-1", {"stdout": out, "stderr": err}, {"phase": "running"}))
    assert len(sent) <= MAX_PIECES and all(len(jsoncodec.encode(one)) < MAX_MESSAGE_BYTES for one in sent)
    found = Collected()
    for one in sent:
        assert found.detail is None
        for _ in range(2):  # a broker may bring each twice
            found.take(ANSWER.parse(jsoncodec.decode(jsoncodec.encode(one).encode())))
    assert found.detail == {"phase": "running"}
    assert (found.output("stdout"), found.output("stderr")) == (out[-MAX_OUTPUT:], err[-MAX_OUTPUT:])


def test_pieces_that_do_not_follow_or_are_too_much_are_refused() -> None:
    piece = {"v": 1, "edge": EDGE, "id": "q-1", "part": 1, "stream": "stdout", "data": "", "last": False, "detail": {}}
    with pytest.raises(ContractError, match="does not follow"):
        Collected().take(piece)
    with pytest.raises(ContractError, match="base64"):
        Collected().take({**piece, "part": 0, "data": "%"})
    found = Collected()
    with pytest.raises(ContractError, match="more than"):
        for part in range(10):
            found.take({**piece, "part": part, "data": base64.b64encode(bytes(98_304)).decode()})
    for odd in ({"part": MAX_PIECES}, {"stream": "x"}, {"data": "x" * 200_000}, {"detail": 5}):
        with pytest.raises(ContractError):
            ANSWER.parse({**piece, **odd})
    question = {"v": 1, "edge": EDGE, "id": "q-1", "hub": "hub", "kind": "exec", "workload": "a", "expires_ms": 1}
    for more in ({}, {"args": [1]}, {"args": ["a\0"]}, {"args": ["x" * 9000]}, {"args": ["a"], "timeout_s": 61}, {"args": ["a"] * 65}):
        with pytest.raises(ContractError):
            QUESTION.parse({**question, **more})


async def never(_: dict[str, Any]) -> bool:
    raise AssertionError("it was answered already")


class Journalled:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def append(self, stream: str, kind: str, body: dict[str, Any], on_durable: Callable[..., None] | None = None) -> None:
        self.records.append(body)
        if on_durable is not None:
            asyncio.get_running_loop().call_soon(on_durable, None)


class Runs:
    """A driver with output and commands."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.ran = folder, 0
        self.waits: asyncio.Event | None = None

    def folder(self, key: Key) -> Path:
        return self._folder

    async def stats(self, key: Key) -> None:
        raise AssertionError

    async def logs(self, key: Key, most: int) -> None:
        raise AssertionError

    async def exec(self, key: Key, args: list[str], timeout_s: float) -> Ran:
        self.ran += 1
        if self.waits is not None:
            await self.waits.wait()
        if args == ["hangs"]:
            raise Failed("exec", "took longer", "give it more time")
        return Ran(Exit(3), Output(b"out", b"err"))


class Side:
    def __init__(self, folder: Path, exec_: bool = True) -> None:
        self.driver, self.journal, self.sent = Runs(folder), Journalled(), []

        async def newest(workload: str) -> Any:
            return (self.driver, Status(Key("a", 2), Phase.RUNNING)) if workload == "a" else None

        left = {"epoch": 1, "phase": "ended", "reason": "", "stdout": "was", "stderr": "", "cut": False}
        self.questions = Questions(EDGE, self.journal, newest, lambda name: left if name == "gone" else None, exec_)

    async def ask(self, name: str, **more: Any) -> dict[str, Any]:
        """All of an answer."""
        found, whole = Collected(), asyncio.Event()

        async def send(piece: dict[str, Any]) -> bool:
            found.take(ANSWER.parse(piece))
            if found.detail is not None:
                whole.set()
            return True

        self.questions.take(QUESTION.parse({"v": 1, "edge": EDGE, "id": name, "hub": "hub", "kind": "logs", "workload": "a", "expires_ms": 1, **more}), send)
        await asyncio.wait_for(whole.wait(), 20)
        return {**(found.detail or {}), "stdout": found.output("stdout"), "stderr": found.output("stderr")}


async def test_logs_are_asked_from_where_the_last_answer_ended(tmp_path: Path) -> None:
    side, log = Side(tmp_path), Log(str(tmp_path / "stdout.log"), 1000)
    log.take(b"one")
    first = await side.ask("q-1")
    assert (first["stdout"], first["cut"], first["epoch"], first["phase"]) == (b"one", False, 2, "running")
    log.take(b"two")
    assert (await side.ask("q-2", since=first["since"]))["stdout"] == b"two"
    assert (await side.ask("q-3", since="odd"))["problem"].endswith("is no place in a log")
    assert (await side.ask("q-4", workload="gone"))["stdout"] == b"was"
    assert (await side.ask("q-5", workload="none"))["field"] == "workload"
    assert side.journal.records == [], "reading is no event"


async def test_a_command_is_recorded_before_it_is_run_and_is_run_once(tmp_path: Path) -> None:
    side = Side(tmp_path)
    said = await side.ask("q-1", kind="exec", args=["id"])
    assert (said["stdout"], said["stderr"], said["code"]) == (b"out", b"err", 3)
    assert [one["state"] for one in side.journal.records] == ["begun", "ended"] and side.journal.records[0]["args"] == "id" and side.journal.records[0]["hub"] == "hub"
    side.questions.take(QUESTION.parse({"v": 1, "edge": EDGE, "id": "q-1", "hub": "hub", "kind": "exec", "workload": "a", "args": ["id"], "expires_ms": 1}), never)
    assert (await side.ask("q-2", kind="exec", args=["hangs"]))["problem"] == "took longer" and side.journal.records[-1]["state"] == "failed"
    assert side.driver.ran == 2


async def test_without_leave_nothing_is_run(tmp_path: Path) -> None:
    side = Side(tmp_path, exec_=False)
    assert "workloads.exec" in (await side.ask("q-1", kind="exec", args=["id"]))["remedy"]
    assert side.driver.ran == 0 and side.journal.records == []


async def test_more_than_can_be_answered_at_a_time_is_refused_at_once(tmp_path: Path) -> None:
    side = Side(tmp_path)
    side.driver.waits = asyncio.Event()
    waiting = [asyncio.create_task(side.ask(f"q-{at}", kind="exec", args=["id"])) for at in range(MAX_ANSWERING)]
    while side.driver.ran < MAX_ANSWERING:
        await asyncio.sleep(0)
    assert "already" in (await side.ask("q-more"))["problem"]
    side.driver.waits.set()
    assert [one["code"] for one in await asyncio.gather(*waiting)] == [3] * MAX_ANSWERING
    await side.questions.close()
