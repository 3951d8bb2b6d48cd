"""The page in a real browser: headless Chromium, driven by Playwright. Screenshots are for looking at.

`FEDFUSE_SCREENSHOTS=DIR pytest tests/results/test_browser.py` keeps them in DIR.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from synthetic import write_run, write_sweep

from fedfuse.results.report import report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("FEDFUSE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium on this machine", allow_module_level=True)
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
SMALLEST = 9.0  # CSS pixels of figure text; 9 is what printed axis labels have


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    write_sweep(root / "runs", ["local", "fedavg", "fedmd", "knfu"], 3, rounds=20, clients=10)
    write_run(root / "runs" / "late", "fedprox", rounds=20, clients=10, done=7, hyper={"mu": 0.1})
    (root / "runs" / "foreign").mkdir()
    (root / "runs" / "foreign" / "summary.json").write_text("{}")
    return report([root / "runs"], root / "out").path


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    kept = os.environ.get("FEDFUSE_SCREENSHOTS")
    directory = Path(kept) if kept else tmp_path_factory.mktemp("screenshots")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


class Opened:
    """A page, and everything it complained about or asked for."""

    def __init__(self, browser, path, width=1280, theme="light"):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_quiet_drawn_and_legible(browser, page_file, screenshots, width, theme):
    with Opened(browser, page_file, width, theme) as opened:
        page = opened.page
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        page.screenshot(path=screenshots / f"report-{width}-{theme}.png", full_page=True)
        assert opened.complaints == []
        outside = [url for url in opened.requests if not url.startswith("data:") and url != page_file.as_uri()]
        assert outside == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # only tables scroll sideways
        figures = page.evaluate(
            """[...document.querySelectorAll('figure svg')].map(one => {
                const box = one.getBoundingClientRect();
                const marks = [...one.querySelectorAll('path, use, image')].filter(part => {
                    const b = part.getBoundingClientRect(); return b.width + b.height > 0; });
                return [box.width, box.height, marks.length];
            })"""
        )
        assert len(figures) >= 9
        assert all(wide > 250 and high > 80 and marks > 5 for wide, high, marks in figures)
        smallest = page.evaluate(
            """Math.min(...[...document.querySelectorAll('svg text')].map(one =>
                parseFloat(getComputedStyle(one).fontSize) * one.getScreenCTM().a
                / (one.transform.baseVal.consolidate()?.matrix.a || 1) || 99))"""
        )
        words = page.evaluate(
            """Math.min(...[...document.querySelectorAll('p, td, th, li, figcaption, dt, dd, summary, pre')]
                .map(one => parseFloat(getComputedStyle(one).fontSize)))"""
        )
        assert smallest >= SMALLEST
        assert words >= 12
        overflowing = page.evaluate(
            """[...document.querySelectorAll('figure svg')].flatMap(one => {
                const box = one.getBoundingClientRect();
                return [...one.querySelectorAll('text')].filter(part => {
                    const b = part.getBoundingClientRect();
                    return b.left < box.left - 2 || b.right > box.right + 2 || b.bottom > box.bottom + 2; })
                    .map(part => part.textContent);
            })"""
        )
        assert overflowing == []


def test_contrast(browser, page_file):
    """Text and series stand out from the paper in both themes: 4.5 and 3 to 1 (WCAG AA)."""
    for theme in ("light", "dark"):
        with Opened(browser, page_file, theme=theme) as opened:
            ratios = opened.page.evaluate(
                """() => {
                    const style = getComputedStyle(document.documentElement);
                    const light = (name) => {
                        const hex = style.getPropertyValue(name).trim();
                        const parts = [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16) / 255)
                            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
                    };
                    const paper = light('--paper');
                    const names = ['--ink', '--muted', ...Array.from({length: 10}, (_, k) => `--s${k}`)];
                    return names.map(name => {
                        const [high, low] = [light(name), paper].sort((a, b) => b - a);
                        return [name, (high + 0.05) / (low + 0.05)];
                    });
                }"""
            )
            for name, ratio in ratios:
                assert ratio >= (3 if name.startswith("--s") else 4.5), (theme, name, ratio)


def test_sorting(browser, page_file):
    with Opened(browser, page_file) as opened:
        page = opened.page
        header = page.locator("#comparison th", has_text="global %").first
        column = "[...document.querySelectorAll('#comparison tbody tr')].map(row => row.cells[2].dataset.v)"
        header.locator("button").click()
        assert header.get_attribute("aria-sort") == "descending"
        values = page.evaluate(column)
        numbers = [float(value) for value in values if value]
        assert numbers == sorted(numbers, reverse=True)
        assert values[-1] == ""  # the strategy without a finished run stays last
        header.locator("button").click()
        assert header.get_attribute("aria-sort") == "ascending"
        assert [float(value) for value in page.evaluate(column) if value] == sorted(numbers)
        assert page.evaluate(column)[-1] == ""
        page.locator("#comparison th", has_text="strategy").locator("button").press("Enter")
        names = page.evaluate(
            "[...document.querySelectorAll('#comparison tbody tr')].map(row => row.cells[0].innerText.trim())"
        )
        assert names == sorted(names)
        assert opened.complaints == []


def test_theme(browser, page_file):
    with Opened(browser, page_file, theme="light") as opened:
        page = opened.page
        paper = "getComputedStyle(document.body).backgroundColor"
        line = "(s => s.fill + s.stroke)(getComputedStyle(document.querySelector('.series-0 > path')))"
        before = page.evaluate(paper), page.evaluate(line)
        page.locator("#theme").click()
        after = page.evaluate(paper), page.evaluate(line)
        assert before[0] != after[0]
        assert before[1] != after[1]
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        page.reload()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        page.locator("#theme").click()
        assert page.evaluate(paper) == before[0]
        assert opened.complaints == []


def test_bringing_out_a_strategy(browser, page_file, screenshots):
    with Opened(browser, page_file) as opened:
        page = opened.page
        chip = page.locator("button[data-series]", has_text="knfu").first
        chip.click()
        faint = "[...document.querySelectorAll('section.lit .series')].map(one => getComputedStyle(one).opacity)"
        assert set(page.evaluate(faint)) == {"1", "0.12"}
        page.screenshot(path=screenshots / "report-lit.png")
        chip.click()
        assert page.evaluate("document.querySelectorAll('.lit').length") == 0


def test_print(browser, page_file, screenshots):
    with Opened(browser, page_file, theme="dark") as opened:
        page = opened.page
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        page.pdf(path=screenshots / "report.pdf", format="A4")
        assert (screenshots / "report.pdf").stat().st_size > 20_000
        assert opened.complaints == []


def test_hostile_names_run_nothing(browser, tmp_path):
    evil = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    for seed in (0, 1):
        write_run(tmp_path / f"{seed}", evil, seed, hyper={evil: evil}, environment={evil: evil})
    written = report([tmp_path], tmp_path / "out").path
    with Opened(browser, written) as opened:
        opened.page.wait_for_timeout(200)
        assert "owned" not in opened.page.title() or "<img" in opened.page.title()
        assert opened.page.evaluate("document.querySelectorAll('img').length") == 0
        assert opened.complaints == []
