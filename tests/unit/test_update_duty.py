"""Updates, the agent's half: orders, records, what is followed and told."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edge_runtime.updates.__main__ as root_half
from edge_runtime.clock import SystemClock
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.updates import parse_order
from edge_runtime.journal import Journal, JournalSettings
from edge_runtime.updates import duty as duty_module
from edge_runtime.updates.duty import SETTLED_LOOKS, UpdateDuty
from edge_runtime.updates.install import read_document, write_document
from tests.integration.waiting import until


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    yield Journal(JournalSettings(tmp_path / "journal", ballast_bytes=0, min_free_bytes=0), SystemClock())


@pytest.mark.parametrize("order", [{}, {"id": "u"}, {"id": "u", "url": "ftp://x"}, {"id": "u", "path": "/etc/shadow"}, {"id": "u", "path": "/var/lib/novacron/../../../etc/shadow"}, {"id": "u", "url": "http://x", "path": "/var/lib/novacron/x"}, {"id": "-"}, 7])
def test_an_order_that_cannot_be(order: Any) -> None:
    with pytest.raises(ContractError):
        parse_order(order)


async def told(journal: Journal) -> list[tuple[str, str]]:
    await journal.flush()
    records, _ = await journal.read("event", 1, 1000, 1 << 24)
    return [(body["state"], body["step"]) for record in records if record.kind == "operation" and (body := json.loads(record.body))]


async def test_by_whom_an_address_is_trusted_goes_with_the_order_and_root_looks_at_it_again(tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.start()
    requests = tmp_path / "requests"
    monkeypatch.setattr(root_half, "REQUEST", requests / "request.json")
    ours = "/var/lib/novacron/config/ca.pem"
    UpdateDuty(requests, tmp_path / "status.json", journal, lambda linked: [], lambda: True, ours).order({"id": "u-1", "url": "https://hub/bundle"})
    await journal.flush()
    assert root_half.request()["ca_file"] == ours and root_half.request()["url"] == "https://hub/bundle"
    asked = read_document(requests / "request.json")
    for spoilt in ("/etc/shadow", 7):
        write_document(requests / "request.json", {**asked, "ca_file": spoilt})
        assert root_half.request() == {}
    write_document(requests / "request.json", {name: value for name, value in asked.items() if name != "ca_file"})
    assert root_half.request()["ca_file"] == "", "an agent of an older image asks so"


async def test_each_step_is_a_record_before_it_is_asked_for(tmp_path: Path, journal: Journal) -> None:
    journal.start()
    requests, status = tmp_path / "requests", tmp_path / "status.json"
    missing: list[str] = ["no reading has been taken"]
    duty = UpdateDuty(requests, status, journal, lambda linked: missing, lambda: True)
    duty.look()
    assert not requests.exists()
    duty.order({"id": "u-1", "url": "http://hub/bundle"})
    assert not (requests / "request.json").exists()  # the record is not durable yet
    assert await told(journal) == [("running", "accepted")]
    assert read_document(requests / "request.json")["action"] == "install"
    with pytest.raises(ContractError, match="under way"):
        duty.order({"id": "u-2", "url": "http://hub/bundle"})
    assert duty.order({"id": "u-1", "url": "http://hub/bundle"})["step"] == "accepted"

    async def stands(state: str, looks: int = 1, **detail: Any) -> None:
        write_document(status, {"id": "u-1", "state": state, "reason": "", "detail": detail})
        for _ in range(looks):
            duty.look()
            await journal.flush()

    for done in (0, 5, 6, 50, 100):
        await stands("writing", bytes=done, total=100)
    await stands("written")
    assert read_document(requests / "request.json")["action"] == "switch"
    await stands("switched")
    # The agent of the new image: another process, the same journal.
    await journal.close()
    journal = Journal(JournalSettings(tmp_path / "journal", ballast_bytes=0, min_free_bytes=0), SystemClock())
    journal.start()
    duty = UpdateDuty(requests, status, journal, lambda linked: missing if linked else [], lambda: False)
    await stands("trial", 3 * SETTLED_LOOKS)
    assert read_document(requests / "gate.json")["missing"] == missing
    assert read_document(requests / "request.json")["action"] == "switch"
    missing.clear()
    await stands("trial", SETTLED_LOOKS - 1)
    assert read_document(requests / "request.json")["action"] == "switch"  # well, but not for long enough
    await stands("trial")
    assert read_document(requests / "request.json")["action"] == "good"
    await stands("good")
    assert await told(journal) == [
        ("running", "accepted"), ("running", "writing"), ("running", "writing"), ("running", "writing"), ("running", "switching"), ("running", "restarting"), ("running", "proven"), ("succeeded", "good"),
    ]
    assert not (requests / "request.json").exists()
    assert duty.order({"id": "u-1", "url": "http://hub/bundle"})["state"] == "succeeded"
    await stands("good", 3)
    assert len(await told(journal)) == 8
    await journal.close()


async def test_a_refusal_ends_the_operation_with_its_reason(tmp_path: Path, journal: Journal) -> None:
    journal.start()
    status = tmp_path / "status.json"
    duty = UpdateDuty(tmp_path / "requests", status, journal, lambda linked: [], lambda: True)
    duty.order({"id": "u-1", "path": "/var/lib/novacron/edge/bundle"})
    await journal.flush()
    for junk in (b"", b"{", b"[]", b'{"id": 1}', b'{"id": "u-1", "state": "?", "detail": 3}', b'{"id": "u-0", "state": "good", "detail": {}}'):
        status.write_bytes(junk)
        duty.look()
        await journal.flush()
    write_document(status, {"id": "u-1", "state": "refused", "reason": "signature: no", "detail": {"why": "signature", "field": "signature"}})
    duty.look()
    assert (await told(journal))[-1] == ("failed", "refused")
    assert duty.to_json()[-1]["reason"] == "signature: no"
    await journal.close()


async def test_an_image_on_trial_that_the_journal_does_not_know_is_followed_all_the_same(tmp_path: Path, journal: Journal) -> None:
    journal.start()
    status = tmp_path / "status.json"
    duty = UpdateDuty(tmp_path / "requests", status, journal, lambda linked: ["away"] if linked else [], lambda: True)
    write_document(status, {"id": "u-9", "state": "trial", "reason": "", "detail": {}})
    for _ in range(SETTLED_LOOKS):
        duty.look()
    await journal.flush()
    assert read_document(tmp_path / "requests" / "request.json")["action"] == "good"
    await journal.close()


async def test_what_is_told_later_without_an_order_is_told_on(tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duty_module, "IDLE_LOOK_S", 0.01)
    journal.start()
    status = tmp_path / "status.json"
    duty = UpdateDuty(tmp_path / "requests", status, journal, lambda linked: [], lambda: True)
    running = asyncio.create_task(duty.run())
    for _ in range(3):
        await asyncio.sleep(0)  # it has looked, and waits
    write_document(status, {"id": "damaged-1", "state": "failed", "reason": "the slot novacron-b is damaged", "detail": {}})
    await until(duty.to_json, what="the operation")
    assert await told(journal) == [("failed", "failed")] and "damaged" in duty.to_json()[0]["reason"]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await journal.close()
