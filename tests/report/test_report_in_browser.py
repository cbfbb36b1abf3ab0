"""The report in a real browser, in the two widths and the two colour schemes it is made for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sample_run import write_dense_run, write_sample_run
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from stillhouse.report import write_report

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]
BROKEN_PICTURES = "return [...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.alt)"
WIDTHS = "const page = document.documentElement; return [innerWidth, page.scrollWidth - page.clientWidth]"
PAINTED = "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.plot path.student')).stroke]"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        sentence = "Chromium and its driver are not here; on Debian: apt-get install chromium chromium-driver."
        if "CI" in os.environ:
            pytest.fail(sentence)
        pytest.skip(sentence)
    options = Options()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of a small grey run that finished, of a coloured one that is running and whose names have no place to break, and of runs
    of the other tasks, one with so many masks that some are left out."""
    folder = tmp_path_factory.mktemp("runs")
    long = "x" * 300
    grey = write_sample_run(folder / "grey")
    rgb = write_sample_run(
        folder / "rgb",
        size=96,
        channels=3,
        status="running",
        title=long,
        result=[],
        command=[long],
        data={"name": long, "classes": [long] * 10, "skipped": [long]},
    )
    names = [long] * 3
    boxes = write_dense_run(folder / "boxes", "detect", data={"name": long, "classes": names}, per_class={long: 0.3})
    masks = write_dense_run(folder / "masks", "segment", side=(64, 48), masks=19, channels=512, collapsed=True, alarms=[long])
    return {run.name: write_report(run).as_uri() for run in (grey, rgb, boxes, masks)}


IMAGES = {"grey": 28, "rgb": 28, "boxes": 4 * (6 + 3 * (1 + 6 + 1)), "masks": 4 * (6 + 3 * (1 + 8 + 1))}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", IMAGES)
def test_it_opens_cleanly_and_fits(browser: webdriver.Chrome, pages: dict[str, str], name: str, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 1000}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(pages[name])
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.images.length") == IMAGES[name]
    assert browser.execute_script(BROKEN_PICTURES) == []
    assert browser.execute_script(WIDTHS) == [width, 0]
    ground, student = browser.execute_script(PAINTED)
    assert (ground, student) == {
        "light": ("rgb(252, 251, 249)", "rgb(194, 87, 12)"),
        "dark": ("rgb(19, 21, 24)", "rgb(240, 144, 74)"),
    }[scheme]


def test_a_script_would_not_run_even_unescaped(browser: webdriver.Chrome, pages: dict[str, str], tmp_path: Path) -> None:
    page = write_report(write_sample_run(tmp_path))
    page.write_text(page.read_text(encoding="utf-8").replace("</main>", "<script>document.title = 'run'</script></main>"), encoding="utf-8")
    browser.get(page.as_uri())
    assert browser.title == "MaskedKD \N{MIDDLE DOT} Stillhouse"
    assert [entry for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]]
