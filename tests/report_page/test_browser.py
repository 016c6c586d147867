"""The page in a real browser: it is drawn, in both colour schemes, and nothing is wider than it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cerwu_gpu.report_page.comparison import Compared, comparison
from cerwu_gpu.report_page.page import page
from tests.report_page.reports import REPORT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# What the page itself must not hold, the test adds: a script that writes down what was drawn.
MEASURE = """<script nonce="test">addEventListener("load", () => {
  const box = (e) => e.getBoundingClientRect();
  const drawn = [...document.querySelectorAll("svg")].filter(
    (e) => box(e).width > 100 && box(e).height > 20);
  document.body.dataset.drawings = drawn.length;
  document.body.dataset.columns = [...document.querySelectorAll("rect.column")].filter(
    (e) => box(e).height > 1).length;
  document.body.dataset.overflow =
    document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.body.dataset.background = getComputedStyle(document.body).backgroundColor;
  document.body.dataset.fetched = performance.getEntriesByType("resource").length;
});</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


def run(browser: str, folder: Path, *options: str) -> str:
    """What the browser prints about folder/report.html."""
    arguments = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1366,768")
    result = subprocess.run(
        [
            *(browser, *arguments, f"--user-data-dir={folder / 'profile'}", *options),
            (folder / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def measured(html: str, browser: str, folder: Path, scheme: str) -> dict[str, str]:
    """Return what the browser made of a page, by MEASURE."""
    text = html.replace("</body>", MEASURE)
    text = text.replace("default-src 'none';", "script-src 'nonce-test';")
    (folder / "report.html").write_text(text, encoding="utf-8")
    setting = f"--blink-settings=preferredColorScheme={scheme}"
    document = run(browser, folder, setting, "--virtual-time-budget=2000", "--dump-dom")
    (body,) = re.findall("<body[^>]*>", document)
    return dict(re.findall(r'data-(\w+)="([^"]*)"', body))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "background"),
    [("1", "rgb(247, 247, 245)"), ("0", "rgb(21, 24, 28)")],
    ids=["light", "dark"],
)
def test_a_browser_draws_all_of_it(
    scheme: str, background: str, browser: str, tmp_path: Path
) -> None:
    assert measured(page(REPORT), browser, tmp_path, scheme) == {
        "drawings": str(3 + 3 * 4 + len(REPORT["seconds"])),
        "columns": str(2 * 7),  # bits and gap of each weight
        "overflow": "0",
        "background": background,
        "fetched": "0",
    }


@pytest.mark.slow
def test_a_screenshot_has_ink_on_it(browser: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page(REPORT), encoding="utf-8")
    picture = tmp_path / "report.png"
    run(browser, tmp_path, f"--screenshot={picture}")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 20_000  # a blank page of that size has about 5,000 bytes


@pytest.mark.slow
def test_a_browser_draws_a_comparison(browser: str, tmp_path: Path) -> None:
    evaluation = {"perplexity": 14.0, "kl_divergence": 0.1}
    directories = [Compared(name, REPORT, evaluation) for name in ("one", "two")]
    assert measured(comparison(directories), browser, tmp_path, "1") == {
        "drawings": str(2 + 2 * 2 * 4),  # two plots; bits and loss of four kinds of matrices
        "columns": str(2 * 7),
        "overflow": "0",
        "background": "rgb(247, 247, 245)",
        "fetched": "0",
    }
