"""report.html as text, and in a real browser: nothing runs or loads that should not, sorting sorts, and it can be read on a telephone.

The browser is Debian's chromium with its driver (apt-get install chromium chromium-driver). Without it those tests are skipped; with
REQUIRE_BROWSER set they fail instead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.extended_records import HOSTILE

if TYPE_CHECKING:
    from selenium import webdriver

pytestmark = pytest.mark.integration
PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
MISSING = [name for name, path in PROGRAMS.items() if path is None] + ([] if find_spec("selenium") else ["the package selenium"])
DESKTOP, PHONE = (1280, 900), (390, 844)
needs_browser = pytest.mark.skipif(
    bool(MISSING) and not os.environ.get("REQUIRE_BROWSER"), reason=f"no browser here: no {', '.join(MISSING)}"
)


class Parts(HTMLParser):
    """Start tags with their attributes, and the text outside of style and script."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("style", "script"):
            self.words += data


@pytest.fixture(scope="module")
def parts(full_report: Path) -> Parts:
    found = Parts()
    found.feed((full_report / "report.html").read_text())
    return found


def test_hostile_text_is_shown_and_not_run(parts: Parts) -> None:
    """In a flag, in generated samples, and in the tokens of an attacked text."""
    assert parts.words.count(HOSTILE) >= 3
    assert [tag for tag, _ in parts.tags].count("script") == 1
    assert not [name for _, attributes in parts.tags for name in attributes if name.startswith("on")]
    assert "\u202e" not in parts.words


def test_the_file_needs_no_other(parts: Parts) -> None:
    addresses = [value for _, attributes in parts.tags for name, value in attributes.items() if name in ("src", "href", "action", "srcset")]
    assert len(addresses) > 10
    assert all(value is not None and value.startswith(("data:", "#")) for value in addresses)
    targets = {attributes["id"] for _, attributes in parts.tags if "id" in attributes}
    assert {str(value)[1:] for value in addresses if str(value).startswith("#")} <= targets
    (policy,) = (str(attributes["content"]) for tag, attributes in parts.tags if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy


def test_every_figure_and_every_table_is_in_it(parts: Parts, full_report: Path) -> None:
    images = [attributes for tag, attributes in parts.tags if tag == "img"]
    assert len(images) == len(list((full_report / "figures").glob("*.png"))) == 9
    assert all(attributes["alt"] for attributes in images)
    targets = {attributes["id"] for _, attributes in parts.tags if "id" in attributes}
    assert {f"table-{path.stem}" for path in (full_report / "tables").glob("*.csv")} < targets


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    assert not MISSING, f"REQUIRE_BROWSER is set and {', '.join(MISSING)} cannot be found"
    options = webdriver.ChromeOptions()
    options.binary_location = str(PROGRAMS["chromium"])
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(PROGRAMS["chromedriver"]), log_output=subprocess.DEVNULL))
    yield driver
    driver.quit()


def opened(browser: webdriver.Chrome, page: Path, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Open a file at a size of window; returns what the browser told of it since: DevTools messages and console lines."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(page.as_uri())
    return [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]


@needs_browser
def test_nothing_is_requested_and_nothing_goes_wrong(browser: webdriver.Chrome, full_report: Path) -> None:
    messages = opened(browser, full_report / "report.html", DESKTOP)
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [(full_report / "report.html").as_uri()]
    assert browser.get_log("browser") == []
    assert browser.title == "tiny: neox-tiny"
    assert browser.execute_script("return [...document.images].every(each => each.complete && each.naturalWidth > 300)")


@needs_browser
def test_the_policy_stops_a_script_that_got_in(browser: webdriver.Chrome, full_report: Path, tmp_path: Path) -> None:
    """As if escaping had failed; this also proves that the test above would see it."""
    text = (full_report / "report.html").read_text()
    (tmp_path / "broken.html").write_text(text.replace('<h2 id="verdict">', f'{HOSTILE}<h2 id="verdict">', 1))
    opened(browser, tmp_path / "broken.html", DESKTOP)
    assert browser.title == "tiny: neox-tiny"
    assert len([entry for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]]) >= 2


@needs_browser
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_can_be_read(size: tuple[int, int], browser: webdriver.Chrome, full_report: Path) -> None:
    """The page is not wider than the window, also with everything unfolded; tables scroll in their box; letters are large enough."""
    opened(browser, full_report / "report.html", size)
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    boxes = browser.execute_script("return [...document.querySelectorAll('.box')].map(each => [each.scrollWidth, each.clientWidth])")
    assert all(inside <= size[0] for _, inside in boxes)
    assert any(whole > inside for whole, inside in boxes) or size == DESKTOP
    sizes = "[...document.querySelectorAll('p, li, td, th, summary, pre')].map(each => parseFloat(getComputedStyle(each).fontSize))"
    assert browser.execute_script(f"return Math.min(...{sizes})") >= 13
    heads = browser.execute_script("return [...document.querySelectorAll('thead button')].map(each => each.getBoundingClientRect().height)")
    assert min(heads) >= 36
    shown = browser.execute_script("return document.querySelector('#verdict').getBoundingClientRect().top")
    assert shown < size[1], "the verdict is on the first screen"


@needs_browser
def test_sorting(browser: webdriver.Chrome, full_report: Path) -> None:
    """By number at full precision, both ways, what is absent last; by word too. Rows stay whole."""
    opened(browser, full_report / "report.html", DESKTOP)
    table = browser.find_element("xpath", "//h3[@id='table-comparisons']/following::table[1]")
    heads = table.find_elements("css selector", "thead button")

    def cells() -> list[list[tuple[str, str | None]]]:
        rows = table.find_elements("css selector", "tbody tr")
        return [[(cell.text, cell.get_attribute("data-value")) for cell in row.find_elements("tag name", "td")] for row in rows]

    def column(place: int) -> list[float | None]:
        return [float(row[place][1]) if row[place][1] else None for row in cells()]

    before = cells()
    for place, head in enumerate(heads):
        if head.text.startswith(("rise difference", "holm")):
            for sign, order in ((1, "ascending"), (-1, "descending")):
                head.click()
                there = [value for value in column(place) if value is not None]
                assert there == sorted(there, reverse=sign < 0) and len(set(there)) > 1
                assert column(place)[len(there) :] == [None] * (len(before) - len(there))
                assert [each.get_attribute("aria-sort") for each in table.find_elements("css selector", "thead th")].count(order) == 1
    heads[1].click()
    assert [row[1][0] for row in cells()] == sorted(row[1][0] for row in before)
    assert sorted(map(str, cells())) == sorted(map(str, before))
