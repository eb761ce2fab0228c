# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser: all of it drawn, nothing fetched, nothing wider than the window."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_polyspec.bench.report import folded

SECTIONS = ("table2", "paper", "speed", "acceptance", "time", "memory", "identity", "texts", "made")
NEEDS = (
    "The report's test needs Chromium and its driver, and selenium: apt-get install chromium chromium-driver, "
    'pip install "hf_polyspec[test]" (python3 bootstrap.py test installs both where it may).'
)
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        program = None
    # A test that is left out where no browser is would be no test.
    if program is None or driver is None:
        pytest.fail(NEEDS)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()


def show(browser: Any, page: Path, width: int, dark: bool = False) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.get_log("browser")  # what was said of other pages before
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_the_report_is_readable_in_a_browser(browser: Any, bench_run: Path, width: int, dark: bool) -> None:
    show(browser, bench_run / "report.html", width, dark)
    heights = browser.execute_script(
        "return Object.fromEntries(arguments[0].map(name => "
        "[name, (document.getElementById('run0-' + name) || document.head).getBoundingClientRect().height]))",
        list(SECTIONS),
    )
    assert all(heights[name] > 40 for name in SECTIONS), heights
    wide, seen = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= seen
    cut = browser.execute_script(
        "return [...document.querySelectorAll('p, h1, h2, h3, h4, li, td, dd, .text, svg text')]"
        ".filter(e => { const box = e.getBoundingClientRect(); return box.width && (box.right > innerWidth + 1 || "
        "box.left < -1) }).map(e => e.textContent.slice(0, 60))"
    )
    assert cut == []
    ink, paper = browser.execute_script(
        "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (ink, paper)]
    assert (light[0] > 0.8 and light[1] < 0.2) if dark else (light[0] < 0.2 and light[1] > 0.8)
    # Of files: a browser's own pages say much of what they cannot fetch.
    assert [said for said in browser.get_log("browser") if "file://" in said["message"]] == []


def test_bars_histograms_and_texts_are_drawn(browser: Any, bench_run: Path) -> None:
    show(browser, bench_run / "report.html", 1280)
    drawn = browser.execute_script(
        "const count = what => [...document.querySelectorAll(what)]"
        ".filter(e => e.getBoundingClientRect().width > 0.5).length;"
        "return {bars: count('#run0-speed rect'), whiskers: count('#run0-speed .whisker'), "
        "columns: count('#run0-acceptance rect'), shares: count('#run0-time rect'), "
        "pieces: count('#run0-texts .text span'), colours: new Set([...document.querySelectorAll("
        "'#run0-texts .text span')].map(e => getComputedStyle(e).backgroundColor)).size, "
        "paper: document.querySelectorAll('#run0-paper tbody tr').length}"
    )
    assert drawn["bars"] >= 6
    assert drawn["whiskers"] >= 2
    assert drawn["columns"] >= 4
    assert drawn["shares"] >= 4
    assert drawn["pieces"] >= 6
    assert drawn["colours"] >= 2
    assert drawn["paper"] == 8


def asked_by(browser: Any, page: Path) -> set[str]:
    """Whatever the page itself asked for: a browser's own pages (a new tab's, late) ask for much beside it."""
    browser.get_log("performance")
    show(browser, page, 1280)
    said = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    asked = [one["params"] for one in said if one["method"] == "Network.requestWillBeSent"]
    return {one["request"]["url"] for one in asked if one["documentURL"] == page.as_uri()}


def test_the_report_fetches_nothing(browser: Any, bench_run: Path, tmp_path: Path) -> None:
    report = bench_run / "report.html"
    assert asked_by(browser, report) == {report.as_uri()}
    page = report.read_text()
    assert not re.search(r"https?://|<script|@import", page)
    other = tmp_path / "other.html"
    other.write_text(page.replace("</body>", '<img src="beside.png"></body>'))
    assert asked_by(browser, other) == {other.as_uri(), (tmp_path / "beside.png").as_uri()}


@pytest.mark.parametrize(
    "command",
    [
        "polyspec bench --model m --limit 10",
        "polyspec bench --model m --methods 'plain plain-packed hf:prompt-lookup polyspec:int8@draft=4 planned "
        "polyspec:suffix@draft=12 polyspec:int8,suffix@block=12' --assistant int8=int8 --assistant suffix=suffix",
    ],
)
def test_a_folded_command_is_the_same_command(command: str) -> None:
    found = folded(command)
    assert max(map(len, found.splitlines())) <= 92
    read = [word.split() for word in shlex.split(found.replace("\\\n", ""))]
    assert read == [word.split() for word in shlex.split(command)]
