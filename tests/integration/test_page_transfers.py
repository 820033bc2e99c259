"""The transfers page in a real browser (headless Chromium): what moves, how far it is, what was expected; nothing that a worker says becomes more than text."""

from collections.abc import Iterator
from typing import Any

import pytest

from edge_runtime.contract.schema import check_fields
from hub.server import Hub
from hub.transfers.document import FACTS, REPORT, read_transfer

from .hub_side import served_hub
from .test_page import HOSTILE, browser, pytestmark  # noqa: F401 - the browser is a fixture of both
from .waiting import until_sync


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with served_hub(tmp_path_factory.mktemp("page-transfers") / "hub") as (background, hub):
        async def fill() -> None:
            service = hub.transfers
            for worker in ("wa", "wb"):
                await service.lease(worker, {"facts": check_fields(FACTS, {"cpus": 2, "gpu": HOSTILE, "free_bytes": 3 << 30, "slots": 4}, "facts"), "held": None, "wait_s": 0})

            async def say(worker: str, task: str, state: str, **more: Any) -> None:
                assert (await service.report(worker, check_fields(REPORT, {"task": task, "epoch": 1, "state": state, **more}, "payload")))["go_on"]

            for name, path in (("t-1", "disk.raw"), ("t-2", HOSTILE.replace("/", "")), ("t-3", "other")):
                await service.submit(read_transfer({"id": name, "source": {"worker": "wa", "path": path}, "destination": {"worker": "wb" if name != "t-3" else "wc", "path": path}}))
            await service.lease("wb", {"facts": None, "held": None, "wait_s": 0})
            for name in ("t-1", "t-2"):
                await say("wb", f"{name}/receive", "listening", address="wb:7400")
            await service.lease("wa", {"facts": None, "held": None, "wait_s": 0})
            await say("wa", "t-1/send", "working", progress={"moved_bytes": 256 << 20, "length": 1 << 30, "wire_bytes": 100 << 20, "passes": 2}, prediction={
                "estimated_duration_seconds": 42.0, "low_seconds": 30.0, "high_seconds": 60.0, "confidence": 0.9, "expected_compression_ratio": 3.1, "recommended_streams": 2, "reason": "",
            })
            await say("wa", "t-2/send", "failed", error=HOSTILE, final=True)
            moved = {
                "workload": HOSTILE, "epoch": 1, "new_epoch": 2, "source": "na", "target": "nb", "why": HOSTILE, "drain": True, "state": "running", "step": "sending", "reason": "", "problem": "", "offer": {"bytes": 5 << 20}, "ready": True,
                "root": "ab", "bytes": 0, "limit_mbit": 1000.0, "created_ms": 5, "changed_ms": 6, "since_ms": {"checking": 5},
            }
            for name, state in (("t-1", "running"), ("move-2", "failed")):  # the first has the name of a transfer, as the state of one that is sent has
                one = {**moved, "id": name, "state": state, "reason": HOSTILE if state == "failed" else ""}
                await hub.workloads.ask(lambda planner, _, one=one: planner.ledger.put(planner.tables.moves, one["id"], one))

        background.run(fill())
        yield hub


def test_it_shows_what_moves_and_hostile_text_is_text(browser: Any, hub: Hub) -> None:  # noqa: F811
    browser.get(f"http://127.0.0.1:{hub.port}/transfers.html#token={hub.token}")
    until_sync(lambda: browser.execute_script("return Number(document.body.dataset.refreshed || 0)") >= 2, 30, "two refreshes")

    def text(selector: str) -> str:
        return str(browser.execute_script("return document.querySelector(arguments[0]).innerText", selector))

    shown = text("#transfers")
    assert "1 of 3 transfers under way, 2 workers" in text("#summary")
    assert "wa: disk.raw" in shown and "25 %, pass 2" in shown and "1.0 GiB" in shown and "100.0 MiB" in shown and "42 s, 30.0 to 60.0 s in 90 %" in shown
    assert "worker wc was never seen" in shown
    moving = text("#moves")
    assert HOSTILE in moving and "sending" in moving and "failed" in moving and "5.0 MiB" in moving and "25 %, pass 2" in moving and "42 s, 30.0 to 60.0 s in 90 %" in moving
    assert f"send: {HOSTILE}" in shown and HOSTILE in text("#workers") and "3.0 GiB" in text("#workers")
    assert browser.execute_script("return document.body.dataset.owned === undefined && !document.querySelector('main img')")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert [link.text for link in browser.find_elements("css selector", "nav a")] == ["Edges", "Workloads"]
