"""The page of the payment examples in headless Chromium: pay twice, kill the worker in the middle of a payment, retry."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import require
from payments_app import started
from servers import Server, free_port

pytestmark = pytest.mark.once

SCRIPTS = ["fastapi_payments.py", "aiohttp_payments.py"]


class Browser:
    """A browser that is driven by the WebDriver protocol (W3C).

    Args:
        session: the URL of its session.
        http: what speaks to its driver.
    """

    def __init__(self, session: str, http: httpx.Client) -> None:
        self._session = session
        self._http = http

    def do(self, method: str, path: str, **parameters: Any) -> Any:
        """Do a command."""
        content = None if method == "GET" else parameters
        response = self._http.request(method, f"{self._session}/{path}", json=content)
        value = response.json()["value"]
        assert response.status_code == 200, value
        return value

    def run(self, script: str) -> Any:
        """Run a script in the page; return what it returns."""
        return self.do("POST", "execute/sync", script=script, args=[])

    def click(self, button: str) -> None:
        """Click as a person does: where the button is, if nothing covers it."""
        (element,) = self.do("POST", "element", using="css selector", value=f"#{button}").values()
        self.do("POST", f"element/{element}/click")

    def answers(self) -> list[str]:
        """Return what sort of answers the page shows, the first one first."""
        found: list[str] = self.run(
            "return [...document.querySelectorAll('#answers li')].map(e => e.className).reverse()"
        )
        return found

    def note(self) -> str:
        """Return what the page says about the state of things."""
        return str(self.run("return document.getElementById('note').textContent"))

    def count(self) -> int:
        """Return how many charges the page shows."""
        return int(self.run("return document.getElementById('count').textContent"))


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A browser of the machine's."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no chromium and chromedriver on this machine, and CI=true")
        pytest.skip("no chromium and chromedriver on this machine")
    port = free_port()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}"]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"binary": chromium, "args": flags}}
        with httpx.Client(timeout=60) as http:
            session = until(lambda: _session(http, f"http://127.0.0.1:{port}", wanted))
            yield Browser(session, http)
            http.delete(session)
    finally:
        process.terminate()
        process.wait(20)


def _session(http: httpx.Client, driver: str, wanted: dict[str, Any]) -> str | None:
    with contextlib.suppress(httpx.ConnectError):  # it is not up yet
        body = {"capabilities": {"alwaysMatch": wanted}}
        value = http.post(f"{driver}/session", json=body).json()["value"]
        return f"{driver}/session/{value['sessionId']}"
    return None


def until(reached: Callable[[], Any]) -> Any:
    """Wait for something that is true, and return it."""
    deadline = time.monotonic() + 30
    while not (found := reached()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("script", SCRIPTS)
def test_pay_twice_kill_and_retry(script: str, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One charge, however often and whatever for the button is pressed."""
    directory = tmp_path_factory.mktemp("valkey")
    with Server(require("valkey", "redis"), directory) as server, started(script, server.url) as address:
        browser.do("POST", "url", url=address)
        browser.click("pay")
        until(lambda: browser.answers() == ["first"])
        browser.click("pay")
        until(lambda: browser.answers() == ["first", "replayed"])
        assert browser.count() == 1

        browser.click("new")
        browser.click("pay")
        browser.click("new")  # while the payment is under way: its answer belongs to the order before
        until(lambda: not browser.run("return running"))
        until(lambda: browser.answers() == [] and browser.count() == 0)
        worker = httpx.get(f"{address}/charges", params={"order": "o"}).json()["worker"]
        browser.click("pay")
        browser.click("kill")
        until(lambda: "lost" in browser.answers())
        assert "press Retry" in until(browser.note)
        browser.click("retry")
        until(lambda: browser.answers()[-1] == "first")
        assert "asked the provider first" in until(browser.note)
        assert browser.answers().count("lost") == 1  # however often it asked while the worker started
        assert "attempt 2" in browser.run("return document.querySelector('#answers li').textContent")
        browser.click("pay")
        until(lambda: browser.answers()[-1] == "replayed")
        assert browser.count() == 1
        assert httpx.get(f"{address}/charges", params={"order": "o"}).json()["worker"] != worker
        assert browser.do("GET", "title") == "Pay once"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_fits_a_phone_and_a_desktop_window(script: str, browser: Browser) -> None:
    """Nothing is cut off; it says that what is in memory would die, and asks nobody else for anything."""
    with started(script) as address:
        for width, height in ((360, 740), (1400, 900)):
            browser.do("POST", "window/rect", width=width, height=height)
            browser.do("POST", "url", url=address)
            until(lambda: "process" in browser.run("return document.getElementById('worker').textContent"))
            assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
        browser.click("kill")
        until(lambda: "would die with it" in browser.run("return document.getElementById('note').textContent"))
        loaded = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert all(url.startswith(address) for url in loaded), loaded
