"""The admin page in a real browser (headless Chromium): what it shows, that it keeps itself fresh, and that nothing an edge says becomes more than text."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import ClientSession, web

from edge_runtime.config import EdgeConfig
from edge_runtime.config.schema import ApiConfig, BusConfig, DecisionsConfig, DevicesConfig, HostConfig, JournalConfig, UplinkConfig
from edge_runtime.contract import jsoncodec, topics
from edge_runtime.contract.records import CHAIN_START
from edge_runtime.runtime import EdgeRuntime
from hub.server import Hub
from tools.faultproxy import FaultProxy

from .hub_side import EDGE, Background, raw_client, served_hub
from .waiting import until, until_sync

CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
selenium = pytest.importorskip("selenium", reason="selenium is not installed")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM.exists() and CHROMEDRIVER.exists()), reason="chromium or chromedriver is not installed (apt install chromium chromium-driver)"),
    pytest.mark.xdist_group("browser"),
]

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1280,900",
)
HOSTILE = "<img src=x onerror=\"document.body.dataset.owned='1'\">"
RULE: dict[str, Any] = {
    "id": "busy", "on": {"device": "host", "metric": "cpu_ratio"}, "trigger": "each", "cooldown": "2s", "if": {"value": "cpu_ratio", "op": ">=", "than": 0},
    "then": [{"alert": {"severity": "info", "text": HOSTILE + " cpu {cpu_ratio}"}}],
}


@dataclass
class Scene:
    """A hub, an agent on this host's real telemetry behind a link that can be cut, and an edge whose every word is an attack."""

    background: Background
    hub: Hub
    edge: EdgeRuntime
    proxy: FaultProxy

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.hub.port}/"


async def attack(port: int, first: int = 1) -> None:
    """An edge that puts markup wherever the contract leaves text free, and bodies that are none in five records from seq `first`."""
    said = {
        "v": 1, "edge": "evil-1", "boot": "b", "boot_n": 1, "state": "online", "reason": HOSTILE, "region": HOSTILE, "site": HOSTILE, "node": HOSTILE, "devices": [HOSTILE, {"a": HOSTILE}, 5, None],
        "health": HOSTILE, "agent": HOSTILE, "outage_hours": -9e15,
    }
    actions = [{"alert": {"severity": "x", "text": HOSTILE}}, {"command": {"device": HOSTILE, "name": HOSTILE}}, {"desired": {"device": HOSTILE, "set": {HOSTILE: HOSTILE}}}]
    bodies = [
        {"rule": HOSTILE, "device": HOSTILE, "outcome": HOSTILE, "inputs": {HOSTILE: HOSTILE}, "actions": actions, "offline": HOSTILE}, {}, {"actions": 5}, {"actions": [None, 7, {"command": None}, []]},
        {"inputs": None, "rule": {"a": [HOSTILE]}},
    ]
    records = [{"seq": seq, "boot": "b", "mono": 1, "wall": 2**62 if seq == first + 1 else 1_795_500_000_000, "tq": "rtc", "kind": "decision", "body": body} for seq, body in enumerate(bodies, first)]
    batch = {
        "v": 1, "edge": "evil-1", "boot": "b", "boot_n": 1, "lane": "live", "floor": 1, "floor_chain": CHAIN_START.hex(), "dropped": 0, "live": 1, "history": 1, "next": first + len(records), "records": records,
    }
    async with raw_client(port, "evil") as client:
        await client.publish(topics.edge_topic("evil-1", "status"), jsoncodec.encode(said).encode(), qos=1)
        for stream in ("decision", "event"):
            await client.publish(topics.edge_topic("evil-1", "up"), jsoncodec.encode({**batch, "stream": stream}).encode(), qos=1)
        await client.publish("novacron/1/device/boiler-1/register", json.dumps({"kind": HOSTILE, "name": HOSTILE}), qos=1)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("page")
    with served_hub(folder / "hub", "auto") as (background, hub):
        proxy = FaultProxy("127.0.0.1", hub.broker.port)
        protocol = "5" if hub.broker.mqtt5 else "3.1.1"

        async def start() -> EdgeRuntime:
            await proxy.start()
            edge = EdgeRuntime(EdgeConfig(
                edge_id=EDGE, site="plant", region="eu", node=EDGE, data_dir=str(folder / "edge"), journal=JournalConfig(min_free_bytes=0, ballast_bytes=0, target_hours=0),
                uplink=UplinkConfig(url=f"mqtt://127.0.0.1:{proxy.port}", backoff_base_s=0.05, backoff_cap_s=0.3, protocol=protocol), bus=BusConfig(url=f"mqtt://127.0.0.1:{hub.broker.port}", protocol=protocol),
                devices=DevicesConfig(host=HostConfig(interval_s=0.25)), decisions=DecisionsConfig(rules=(RULE,)), api=ApiConfig(enabled=False),
            ))
            await edge.start()
            await until(lambda: edge.uplink is not None and edge.uplink.up, what="the link")
            await attack(hub.broker.port)
            await until(lambda: "evil-1" in hub.fleet.rows and hub.store.read_count("evil-1", "event", 1, 9) == 5 and "boiler-1" in edge.registry.devices, what="the attack taken in")
            await proxy.cut()  # an outage for the timeline
            await until(lambda: EDGE in hub.fleet.open_outages, what="the outage")
            await proxy.heal()
            await until(lambda: edge.uplink is not None and edge.uplink.up and hub.fleet.rows[EDGE].state == "online", what="the link again")
            await until(lambda: (book := hub.ingest.books.get((EDGE, "decision"))) is not None and book.contiguous > 3, what="decisions at the hub")
            return edge

        edge = background.run(start(), 60)
        try:
            yield Scene(background, hub, edge, proxy)
        finally:
            background.run(edge.stop())
            background.run(proxy.close())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER)))
    driver.set_page_load_timeout(30)
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page in the browser: look, click, wait for its next refresh."""

    def __init__(self, driver: Any, scene: Scene) -> None:
        self.driver, self.scene = driver, scene

    def open(self, token: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get(self.scene.url + (f"#token={token}" if token else ""))

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def text(self, selector: str) -> str:
        return str(self.script("return document.querySelector(arguments[0]).innerText", selector))

    def count(self, selector: str) -> int:
        return int(self.script("return document.querySelectorAll(arguments[0]).length", selector))

    def shown(self, selector: str) -> bool:
        return bool(self.script("return document.querySelector(arguments[0]).offsetParent !== null", selector))

    @property
    def refreshed(self) -> int:
        return int(self.script("return Number(document.body.dataset.refreshed || 0)"))

    def next_refresh(self) -> int:
        before = self.refreshed
        until_sync(lambda: self.refreshed > before, what="the page's next refresh")
        return self.refreshed

    def write(self, selector: str, text: str) -> None:
        field = self.driver.find_element("css selector", selector)
        field.clear()
        field.send_keys(text)


@pytest.fixture
def page(browser: Any, scene: Scene) -> Iterator[Page]:
    """Logged out, with the logs empty."""
    browser.get("about:blank")
    browser.get(scene.url)
    browser.execute_script("sessionStorage.clear()")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    yield Page(browser, scene)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def logged_in(page: Page) -> None:
    page.open(page.scene.hub.token)
    page.next_refresh()


def test_it_shows_what_a_real_edge_sent(page: Page) -> None:
    logged_in(page)
    assert "2 of 2 edges online" in page.text("#summary") and page.scene.hub.broker.kind in page.text("#summary")
    tree = page.text("#tree")
    for word in ("cloud", "eu", "plant", EDGE, "host", "boiler-1", "online"):
        assert word in tree, tree
    row = page.script("return [...document.querySelectorAll('#edges tbody tr')].find(row => row.cells[0].innerText === arguments[0]).innerText", EDGE)
    assert "online" in row and "chains agree" in row
    decisions = page.text("#decisions")
    assert "busy" in decisions and "host" in decisions and "fired" in decisions and "cpu_ratio" in decisions and "linked" in decisions
    events = page.text("#events tbody")
    assert "alert" in events and "device.registered" in events and "link.up" in events
    until_sync(lambda: page.count("#timeline .row i") >= 1, what="the outage in the timeline")
    assert "lost" in page.script("return document.querySelector('#timeline .row i').title")
    mark, bar = page.script("return ['#timeline .row i', '#timeline .row .bar'].map(what => { const box = document.querySelector(what).getBoundingClientRect(); return [box.left, box.right] })")
    assert bar[0] <= mark[0] and mark[0] + 1 < bar[1], "an outage of a second is a mark that can be seen in a day's bar"


def test_the_token_in_the_fragment_logs_in_and_does_not_stay_in_the_address(page: Page) -> None:
    logged_in(page)
    assert page.shown("#main") and not page.shown("#login")
    assert "token" not in page.driver.current_url and page.driver.current_url == page.scene.url
    page.driver.refresh()
    page.next_refresh()  # remembered for this tab
    page.driver.find_element("id", "logout").click()
    until_sync(lambda: page.shown("#login") and not page.shown("#main"), what="the login form")
    assert page.script("return sessionStorage.getItem('token')") is None


def test_the_form_tells_of_a_wrong_token_and_takes_the_right_one(page: Page) -> None:
    page.open()
    until_sync(lambda: page.shown("#login"), what="the login form")
    assert not page.shown("#main") and page.text("#login-error") == ""
    page.write("#token", "wrong")
    page.driver.find_element("css selector", "#login button").click()
    until_sync(lambda: "not valid" in page.text("#login-error"), what="the refusal")
    assert not page.shown("#main") and page.count("#edges tbody tr") == 0
    page.write("#token", page.scene.hub.token)
    page.driver.find_element("css selector", "#login button").click()
    until_sync(lambda: page.shown("#main") and page.refreshed, what="the page")
    assert not page.shown("#login")
    # A token that the hub does not know any more leads back to the form.
    page.script("token = 'old'")
    until_sync(lambda: page.shown("#login"), what="the login form")


def test_it_keeps_itself_fresh_and_filters(page: Page) -> None:
    logged_in(page)
    newest = "return document.querySelector('#decisions tbody tr').cells[0].title"
    before = page.script(newest)
    until_sync(lambda: page.script(newest) != before, what="a newer decision")
    assert page.next_refresh() >= 2
    page.write("#filter", "nothing-like-it")
    until_sync(lambda: page.count("#decisions tbody tr") == 0, what="an empty table")
    page.write("#filter", "BUSY")
    until_sync(lambda: page.count("#decisions tbody tr") > 0, what="the decisions of the rule")
    # What a person is at is not taken away by a refresh.
    page.next_refresh()
    assert page.script("return document.activeElement.id") == "filter" and page.script("return document.getElementById('filter').value") == "BUSY"
    page.script("const span = document.getElementById('span'); span.value = '0.25'; span.dispatchEvent(new Event('change'))")
    page.next_refresh()


def test_an_edge_that_goes_is_seen_and_seen_again(page: Page) -> None:
    scene = page.scene
    logged_in(page)
    scene.background.run(scene.proxy.cut())
    state = "return [...document.querySelectorAll('#edges tbody tr')].find(row => row.cells[0].innerText === arguments[0]).cells[1]"
    alone = scene.edge.pipeline.decided_offline
    try:
        until_sync(lambda: page.script(f"{state}.innerText", EDGE) == "offline" and scene.edge.pipeline.decided_offline > alone, what="offline, and deciding alone")
        assert page.script(f"{state}.title", EDGE) == "lost" and "1 of 2 edges online" in page.text("#summary")
    finally:
        scene.background.run(scene.proxy.heal())
    until_sync(lambda: page.script(f"{state}.innerText", EDGE) == "online", what="online")
    until_sync(lambda: "alone" in page.text("#decisions"), what="decisions made alone")


def test_hostile_text_is_shown_as_text_and_runs_nothing(page: Page) -> None:
    logged_in(page)
    page.scene.background.run(attack(page.scene.hub.broker.port, 101))
    row = "return [...document.querySelectorAll('#decisions tbody tr')].some(row => row.cells[1].innerText === 'evil-1' && row.cells[0].title.startsWith('seq 101,'))"
    until_sync(lambda: page.script(row), what="the hostile records in the table")
    page.next_refresh()  # odd records do not stop the page
    assert page.count("#tree img, #edges img, #decisions img, #events img, #timeline img, main img, main script") == 0
    assert page.script("return document.body.dataset.owned") is None
    for selector in ("#tree", "#edges", "#decisions", "#events"):
        assert HOSTILE in page.script("return document.querySelector(arguments[0]).textContent", selector).replace('\\"', '"'), selector
    # The second fence: were markup ever let through, the policy stops it. A handler put in by hand must not run.
    page.script("const trap = document.createElement('div'); trap.innerHTML = arguments[0]; document.body.append(trap)", HOSTILE)
    page.next_refresh()
    assert page.script("return document.body.dataset.owned") is None


def test_nothing_leaves_for_another_host_and_the_console_stays_empty(page: Page) -> None:
    logged_in(page)
    for _ in range(2):
        page.next_refresh()
    entries = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = [entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    asked += page.script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    hosts = {urlsplit(url).netloc for url in asked if urlsplit(url).scheme not in ("data", "about", "chrome")}
    assert hosts == {f"127.0.0.1:{page.scene.hub.port}"} and len(asked) > 12
    assert not [url for url in asked if page.scene.hub.token in url], "the token is in a header, never in a request's address"
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_the_policy_and_the_headers_of_the_page(page: Page) -> None:
    import urllib.request

    for name in ("", "page.js", "page.css"):
        with urllib.request.urlopen(page.scene.url + name, timeout=10) as answer:
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Referrer-Policy"] == "no-referrer"


def contrast(first: str, second: str) -> float:
    """WCAG 2.2 contrast ratio of two CSS colours `rgb(r, g, b)`, 1 to 21."""
    def luminance(colour: str) -> float:
        channels = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(page: Page, scheme: str, tmp_path: Path) -> None:
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    logged_in(page)
    paper = page.script("return getComputedStyle(document.querySelector('#edges th')).backgroundColor")
    assert (contrast(paper, "rgb(255,255,255)") < 2) == (scheme == "light"), f"{scheme}: the paper is {paper}"
    for selector in ("#summary", "#edges tbody td", "main .good", "main .bad", "#tree .level"):
        ink = page.script("return getComputedStyle(document.querySelector(arguments[0])).color", selector)
        assert ink.startswith("rgb("), f"{selector}: {ink} lets what is behind it through"
        assert contrast(ink, paper) >= 4.5, f"{scheme} {selector}: {ink} on {paper} is {contrast(ink, paper):.1f}, WCAG AA asks for 4.5"
    assert page.driver.save_screenshot(str(tmp_path / f"page-{scheme}.png"))


def test_a_narrow_screen_is_enough(page: Page, tmp_path: Path) -> None:
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False})
    logged_in(page)
    assert page.script("return window.innerWidth") == 400
    wide = page.script(
        "return [...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll') && one.getBoundingClientRect().right > 400.5).map(one => one.outerHTML.slice(0, 80))"
    )
    assert page.script("return document.documentElement.scrollWidth") <= 400 and wide == [], "nothing makes the page itself scroll sideways"
    for selector in ("#tree", "#edges", "#timeline", "#decisions", "#events", "#logout", "#filter"):
        box = page.script("const box = document.querySelector(arguments[0]).getBoundingClientRect(); return [box.width, box.height]", selector)
        assert box[0] > 0 and box[1] > 0, f"{selector} is not to be seen"
    for selector in ("#logout", "#filter", "#span"):
        left, right = page.script("const box = document.querySelector(arguments[0]).getBoundingClientRect(); return [box.left, box.right]", selector)
        assert left >= 0 and right <= 400, f"{selector} is out of reach"
    assert page.driver.save_screenshot(str(tmp_path / "page-narrow.png"))
    page.script("sessionStorage.clear()")
    page.open()
    until_sync(lambda: page.shown("#login"), what="the login form")
    assert page.script("return document.documentElement.scrollWidth") <= 400


@pytest.fixture
def below_a_path(scene: Scene) -> Iterator[str]:
    """The hub as a reverse proxy shows it that has other things beside it: below `/plant/`, and nothing of it elsewhere."""

    async def pass_on(request: web.Request) -> web.Response:
        async with ClientSession() as session, session.get(scene.url + str(request.rel_url).removeprefix("/plant/"), headers=request.headers) as answer:
            return web.Response(body=await answer.read(), status=answer.status, headers={name: value for name, value in answer.headers.items() if name not in ("Content-Length", "Transfer-Encoding", "Content-Encoding")})

    async def serve() -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/plant/{rest:.*}", pass_on)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = scene.background.run(serve())
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/plant/"
    scene.background.run(runner.cleanup())


def test_all_pages_work_below_a_path(page: Page, scene: Scene, below_a_path: str) -> None:
    page.driver.get(f"{below_a_path}#token={scene.hub.token}")
    for title in ("Workloads", "Transfers", "Edges"):
        page.next_refresh()
        assert page.shown("main") and not page.shown("#login")
        page.driver.find_element("link text", title).click()
    page.next_refresh()
    assert page.driver.current_url == below_a_path and page.count("#edges tbody tr") == 2
