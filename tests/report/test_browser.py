"""The page in a real browser, headless. Skipped where there is none with its driver."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gacd.study.report import write_study_report
from made_up import STAND_INS, Maker, whole_study

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


@pytest.fixture(scope="module")
def driver() -> Iterator:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    chromedriver = shutil.which("chromedriver")
    if browser is None or chromedriver is None:
        pytest.skip("needs Chromium or Chrome, and chromedriver (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    except WebDriverException as error:
        pytest.skip(f"the browser does not start: {str(error).splitlines()[0]}")
    yield driver
    driver.quit()


def show(driver, page: Path, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.get(page.as_uri())


@pytest.fixture(scope="module")
def study_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a made-up study in all its parts."""
    folder = tmp_path_factory.mktemp("study")
    results = whole_study(Maker(folder / "cells"), seeds=(0, 1))
    write_study_report(results, folder, title="Made up", stand_ins=STAND_INS, scale="full")
    return folder / "report.html"


def check_fits(driver, figures):
    assert driver.get_log("browser") == []
    sizes = driver.execute_script(
        "return [...document.images].map(i => [i.naturalWidth, i.clientWidth, i.clientHeight])"
    )
    assert len(sizes) == figures
    assert all(min(size) > 100 for size in sizes)
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert driver.execute_script(overflow) == 0


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_figures_are_there_and_the_page_fits(driver, page, width):
    show(driver, page, width)
    check_fits(driver, figures=3)


def test_a_phone_gets_the_narrow_drawing_and_scrolls_the_table_inside(driver, page):
    show(driver, page, 1200)
    wide = driver.execute_script("return document.images[1].naturalWidth")
    assert not driver.execute_script(_SCROLLS)
    show(driver, page, 360)
    assert driver.execute_script("return document.images[1].naturalWidth") < wide / 2
    assert driver.execute_script(_SCROLLS)


_SCROLLS = "const t = document.querySelector('.scroll'); return t.scrollWidth > t.clientWidth"


def test_what_the_page_refuses_would_be_logged(driver, page, tmp_path):
    """The console check above can fail: a page that asks for a file outside is reported."""
    outside = tmp_path / "outside.html"
    text = page.read_text(encoding="utf-8")
    outside.write_text(text.replace("<main>", '<main><img src="x.png" alt="">'), encoding="utf-8")
    show(driver, outside, 1200)
    assert any("Content Security Policy" in entry["message"] for entry in driver.get_log("browser"))


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_of_a_study_fits_and_its_tables_leave_room_for_figures(driver, study_page, width):
    show(driver, study_page, width)
    check_fits(driver, figures=6)
    shares = driver.execute_script(
        "return [...document.querySelectorAll('tbody th')]"
        ".map(th => th.offsetWidth / th.closest('.scroll').clientWidth)"
    )
    assert len(shares) > 100
    assert max(shares) < 0.5


def test_a_claim_leads_to_its_evidence(driver, study_page):
    show(driver, study_page, 1200)
    driver.execute_script("document.documentElement.style.scrollBehavior = 'auto'")
    driver.execute_script("document.querySelector('.checks li:nth-child(7) a').click()")
    top = "return document.getElementById('c7').getBoundingClientRect().top"
    assert driver.execute_script("return location.hash") == "#c7"
    assert abs(driver.execute_script(top)) < 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_schemes(driver, page, scheme):
    """Contrast of at least 4.5 to 1 (WCAG 2.1, success criterion 1.4.3)."""
    show(driver, page, 1200, scheme)
    paper = _luminance(driver.execute_script("return getComputedStyle(document.body).background"))
    assert (paper > 0.5) == (scheme == "light")
    places = ("body", "a", ".note", ".aside", ".good .verdict", ".bad .verdict", ".open .verdict")
    for place in places:
        colour = driver.execute_script(
            "return getComputedStyle(document.querySelector(arguments[0])).color", place
        )
        darker, lighter = sorted((paper, _luminance(colour)))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, place


def _luminance(css: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.1, definition)."""
    channels = [int(v) / 255 for v in css[css.index("(") + 1 : css.index(")")].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
