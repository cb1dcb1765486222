"""The report in a real browser: nothing overflows, nothing is fetched, everything can be read, light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from made_reports import HOSTILE, hostile_report, make_evaluation, make_plan, make_report  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from steer2edit.plan import merge  # noqa: E402
from steer2edit.report.page import Report, write_report  # noqa: E402

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM.is_file() and DRIVER.is_file()), reason=f"{CHROMIUM} and {DRIVER} are not there"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTHS = (390, 1280)
# the contrast of each element that holds text of its own, against the nearest background that is not transparent
CONTRAST = """
const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m };
const lum = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b };
const found = [];
for (const e of document.body.querySelectorAll('*')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || e.closest('svg')) continue;
  let at = e, back = [0, 0, 0, 0];
  while (at && back[3] === 0) { back = parse(getComputedStyle(at).backgroundColor); at = at.parentElement }
  const pair = [lum(parse(getComputedStyle(e).color).slice(0, 3)), lum(back.slice(0, 3))].sort((a, b) => b - a);
  found.push([(pair[0] + 0.05) / (pair[1] + 0.05), e.tagName, e.textContent.trim().slice(0, 40)]);
}
return found;
"""
OVERFLOW = """
const inside = e => e.closest('.scroll, pre, svg');
const root = document.documentElement;
return [root.scrollWidth - root.clientWidth, window.innerWidth, [...document.body.querySelectorAll('*')].filter(
  e => !inside(e) && e.getBoundingClientRect().right > window.innerWidth + 0.5).map(e => e.tagName + '.' + e.className)];
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of several kinds, as files."""
    folder = tmp_path_factory.mktemp("reports")
    strengths = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
    reports = {
        "whole": make_report(30, 9, 1536, evaluation=make_evaluation(64, strengths=strengths)),
        "deep": make_report(80, 64, 32),
        "plan": Report(make_plan(3, 4, 0)),
        "merged": Report(merge([make_plan(), make_plan(lam=2.0)])),
        "script": hostile_report(HOSTILE[0]),
        "image": hostile_report(HOSTILE[1]),
        "long": hostile_report("x" * 3000),
    }
    for name, report in reports.items():
        write_report(report, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in reports}


def show(browser: Any, page: Path, width: int, scheme: str) -> None:
    """Open a page afresh on a screen of a width, in a colour scheme; logs begin here."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    # on a busy machine get() may return from the second visit of a page before all of it is read
    ready = "return document.readyState === 'complete'"
    WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(ready))


def requested(browser: Any) -> list[str]:
    """The addresses asked for since :func:`show`."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["whole", "deep", "plan", "merged", "script", "image", "long"])
def test_the_page_fits_is_read_and_asks_for_nothing(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    show(browser, pages[name], width, scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    over, inside, beyond = browser.execute_script(OVERFLOW)
    assert (over, inside, beyond) == (0, width, [])
    assert browser.get_log("browser") == []
    addresses = requested(browser)
    assert [a for a in addresses if not a.startswith("data:")] == [pages[name].as_uri()]
    contrasts = browser.execute_script(CONTRAST)
    assert len(contrasts) > 30
    assert [one for one in contrasts if one[0] < 4.5] == []
    # no data became an element or ran
    assert browser.execute_script("return document.querySelectorAll('script, img, b').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_follow_the_colour_scheme(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    show(browser, pages["whole"], 390, scheme)
    body, fills, strokes = browser.execute_script(
        "const style = (s, key) => [...new Set([...document.querySelectorAll(s)].map(e => getComputedStyle(e)[key]))];"
        "return [getComputedStyle(document.body).color, style('svg text', 'fill'), style('svg .none, svg use', 'stroke')]"
    )
    assert fills == [body] and body in strokes
    light = sum(map(int, body.removeprefix("rgb(").removesuffix(")").split(","))) > 3 * 128
    assert light == (scheme == "dark")


def test_text_of_figures_can_be_read_on_a_phone(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["whole"], 390, "light")
    heights = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => Math.min(...[...s.querySelectorAll('text')].map(t => "
        "parseFloat(getComputedStyle(t).fontSize) * s.getBoundingClientRect().width / s.viewBox.baseVal.width)))"
    )
    assert len(heights) == 4 and min(heights) >= 8
    clipped = browser.execute_script(
        "return [...document.querySelectorAll('svg')].flatMap(s => { const a = s.getBoundingClientRect(); "
        "return [...s.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect(); "
        "return b.left < a.left - 1 || b.right > a.right + 1 }).map(t => t.textContent) })"
    )
    assert clipped == []


def test_wide_screens_have_two_figures_in_a_row_and_phones_one(browser: Any, pages: dict[str, Path]) -> None:
    for width, columns in zip(WIDTHS, (1, 2), strict=True):
        show(browser, pages["whole"], width, "light")
        rows = browser.execute_script(
            "return [...document.querySelectorAll('#changed figure')].map(e => e.getBoundingClientRect().left)"
        )
        assert len(rows) == 3 and len(set(rows)) == columns


def test_sections_are_there_and_wide_tables_scroll_by_themselves(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["whole"], 390, "light")
    titles = browser.execute_script("return [...document.querySelectorAll('section > h2')].map(e => e.textContent)")
    assert titles == [
        "Trade-off",
        "Candidates",
        "Before and after",
        "What changed",
        "Selection",
        "Load it",
        "Reproduce it",
        "Limits",
    ]
    scrolled = browser.execute_script(
        "const box = document.querySelector('#candidates .scroll'); box.scrollLeft = 200; "
        "return [box.scrollLeft, box.querySelector('tbody th').getBoundingClientRect().left - box.getBoundingClientRect().left]"
    )
    # the candidates' names stay in sight
    assert scrolled == [200, 0]


def test_pictures_within_figures_are_drawn(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["whole"], 1280, "light")
    sizes = browser.execute_async_script(
        "const done = arguments[0]; Promise.all([...document.querySelectorAll('svg image')].map(e => new Promise(ok => { "
        "const i = new Image(); i.onload = () => ok(i.width); i.onerror = () => ok(0); "
        "i.src = e.href.baseVal }))).then(done)"
    )
    assert len(sizes) >= 12 and min(sizes) > 0
