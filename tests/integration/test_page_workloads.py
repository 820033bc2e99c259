"""The workloads page in a real browser (headless Chromium): the heat map, what waits and why, use over time; nothing that is submitted becomes more than text."""

import json
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from hub.server import Hub
from hub.workloads.documents import read_list

from .hub_side import served_hub
from .test_page import HOSTILE, browser, contrast, pytestmark  # noqa: F401 - the browser is a fixture of both
from .waiting import until_sync

NODE = {"capacity": {"cpu": 4, "memory": "8Gi", "disk": 1000}, "gpus": [{"model": "t4"}], "region": "eu"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with served_hub(tmp_path_factory.mktemp("page-workloads") / "hub") as (background, hub):
        async def fill() -> None:
            for name in ("n-1", "n-2"):
                await hub.workloads.ask(lambda planner, now, name=name: planner.put_node(name, {**NODE, "taints": [{"key": HOSTILE, "effect": "PreferNoSchedule"}]}, "declared", now))
            await hub.workloads.ask(lambda planner, now: planner.cordon("n-2", "cordon", now))
            await hub.workloads.submit(read_list([
                {"id": "web", "requests": {"cpu": 3, "memory": "2Gi"}}, {"id": "huge", "kind": "vm", "priority": 7, "requests": {"cpu": 64}}, {"id": "part", "gpu": {"milli": 500}},
                *({"id": name, "kind": "batch", "requests": {"disk": 600}, "duration_ms": 3_600_000} for name in ("job-1", "job-2")),
                {"id": "evil", "requests": {"cpu": 1}, "tenant": HOSTILE, "namespace": HOSTILE, "image": HOSTILE, "weights": {}, "gang": {"id": HOSTILE, "size": 2}},
            ]))
            points = [(minute, {"resources": {"cpu": [minute % 4000, 4000], HOSTILE: [1, 2]}, "gpu_milli": [500, 1000], "nodes": {}, "workloads": {}}) for minute in range(3)]
            now = hub.now_ms() // 60_000
            for minute, document in points:
                await hub.ingest.write(lambda minute=minute, document=document: hub.store.put_utilisation(now - minute, document, 10_000))  # type: ignore[misc]

        background.run(fill())
        yield hub


@pytest.fixture
def page(browser: object, hub: Hub) -> Iterator["Page"]:  # noqa: F811
    shown = Page(browser, hub)
    shown.driver.get("about:blank")
    for kind in ("browser", "performance"):
        shown.driver.get_log(kind)
    yield shown
    shown.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


class Page:
    """The page in the browser."""

    def __init__(self, driver: object, hub: Hub) -> None:
        from typing import Any

        self.driver: Any = driver
        self.hub = hub

    def open(self) -> "Page":
        self.driver.get(f"http://127.0.0.1:{self.hub.port}/workloads.html#token={self.hub.token}")
        self.next_refresh()
        return self

    def script(self, text: str, *given: object) -> object:
        return self.driver.execute_script(text, *given)

    def text(self, selector: str) -> str:
        return str(self.script("return document.querySelector(arguments[0]).innerText", selector))

    def refreshed(self) -> int:
        return int(str(self.script("return Number(document.body.dataset.refreshed || 0)")))

    def next_refresh(self) -> None:
        before = self.refreshed()
        until_sync(lambda: self.refreshed() > before, what="the page's next refresh")


def test_it_shows_nodes_what_waits_and_why_and_use_over_time(page: Page) -> None:
    page.open()
    assert "2 of 2 nodes up, 3 workloads placed, 3 waiting" in page.text("#summary")
    heat = page.text("#heat")
    assert "n-1" in heat and "75 %" in heat and "25 %" in heat and "50 %" in heat and "cordon" in heat
    assert page.script("return [...document.querySelectorAll('#heat td.heat')].some(cell => cell.title === 'cpu: 3.0 CPU of 4.0 CPU' && cell.style.getPropertyValue('--share') === '33.75%')")
    pending = page.text("#pending")
    assert "on n-1" in pending and "is to start at" in pending and "UTC on n-1" in pending
    assert "huge" in pending and "more than any node has" in pending and "waits for 1 more" in pending
    assert "web" in page.text("#workloads") and page.script("return document.querySelectorAll('#use polyline').length") == 3
    points = str(page.script("return document.querySelector('#use polyline').getAttribute('points')"))
    assert len(points.split()) == 3 and "NaN" not in points


def test_a_click_tells_why_and_stays_over_refreshes(page: Page) -> None:
    page.open()
    page.script("[...document.querySelectorAll('#pending button')].find(button => button.innerText === 'huge').click()")
    until_sync(lambda: page.script("return document.getElementById('explain').offsetParent !== null"), what="the explanation")
    page.next_refresh()
    assert "huge: pending" in page.text("#explain-text") and "64000m CPU wanted" in page.text("#explain-nodes") and "ask for at most" in page.text("#explain-nodes")
    page.script("document.getElementById('filter').value = 'WEB'")
    page.next_refresh()
    assert page.script("return document.querySelectorAll('#workloads tbody tr').length") == 1


def test_moves_are_shown_step_by_step(page: Page) -> None:
    page.open()
    assert page.script("return document.getElementById('rebalance-section').hidden"), "nothing has been moved yet"
    moves = [{"workload": "web", "source": "n-1", "target": "n-2", "how": "restart", "state": "waiting", "epoch": 1}]
    document = {"id": "rebalance-1", "kind": "rebalance", "nodes": ["n-1"], "state": "cancelled", "text": "after moving", "reason": "for the test", "steps": [moves], "step": 0, "moves": 1}
    planner = page.hub.workloads.planner
    planner.tables.rebalances["rebalance-1"] = document
    try:
        page.next_refresh()
        page.next_refresh()
        assert "rebalance-1: cancelled, empties n-1. for the test" in page.text("#rebalance-text") and "web" in page.text("#rebalance") and "waiting" in page.text("#rebalance")
    finally:
        del planner.tables.rebalances["rebalance-1"]


def test_hostile_text_is_text_nothing_leaves_and_the_console_stays_empty(page: Page) -> None:
    page.open()
    page.script("[...document.querySelectorAll('#pending button')].find(button => button.innerText === 'evil').click()")
    page.next_refresh()
    page.next_refresh()
    assert HOSTILE in page.text("#pending") and HOSTILE in page.text("#use") and HOSTILE in page.text("#explain-text")
    assert page.script("return document.querySelectorAll('main img, main script').length") == 0 and page.script("return document.body.dataset.owned") is None
    entries = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = [entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    assert {urlsplit(url).netloc for url in asked if urlsplit(url).scheme not in ("data", "about", "chrome")} == {f"127.0.0.1:{page.hub.port}"}
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable_and_a_narrow_screen_is_enough(page: Page, scheme: str) -> None:
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False})
    page.open()
    paper = str(page.script("return getComputedStyle(document.querySelector('#heat th')).backgroundColor"))
    for selector in ("#summary", "#pending td.bad", "#workloads td.good"):
        ink = str(page.script("return getComputedStyle(document.querySelector(arguments[0])).color", selector))
        assert contrast(ink, paper) >= 4.5, f"{scheme} {selector}: {ink} on {paper}"
    assert int(str(page.script("return document.documentElement.scrollWidth"))) <= 400, "the page itself does not scroll sideways"
