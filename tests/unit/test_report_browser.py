"""Pages in a real browser: charts are drawn, nothing is requested, nothing overflows, hostile text is inert."""

import base64
import io
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from codeparrot_ds.report.make import Options, make
from tests.report_runs import HOSTILE, make_eventful_run, make_run, train_row, write_lines

SOME = (("light", 360), ("dark", 1440))  # colour schemes and widths in pixels
ALL = (*SOME, ("dark", 360), ("light", 1440))
SECONDS = 20  # for a page to be drawn

# For each canvas, whether a pixel has the colour of a line, to the eye.
_DRAWN = """
const style = getComputedStyle(document.documentElement);
const wanted = ["--one", "--two"].map((name) => {
  const color = style.getPropertyValue(name).trim();
  return [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
});
return [...document.querySelectorAll("canvas")].map((canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < data.length; i += 4) {
    if (data[i + 3] < 96) continue;
    for (const [r, g, b] of wanted) {
      if (Math.max(Math.abs(data[i] - r), Math.abs(data[i + 1] - g), Math.abs(data[i + 2] - b)) <= 12) return true;
    }
  }
  return false;
});
"""
_INK = "return getComputedStyle(document.documentElement).getPropertyValue('--one').trim()"


class Browser:
    """One headless browser for all tests of this file."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, width: int = 1440, scheme: str = "light") -> None:
        """Open a page at a width and in a colour scheme."""
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(page.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """Result of a script's `return`."""
        return self.driver.execute_script(script, *arguments)

    def messages(self) -> list[str]:
        """What the console got since the last call."""
        return [str(entry["message"]) for entry in self.driver.get_log("browser")]

    def requests(self) -> set[str]:
        """Addresses requested since the last call, but for data that is in the page itself."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return {url for url in urls if not url.startswith("data:")}

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium, without a screen."""
    program, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or chromedriver is None:
        pytest.skip("no chromium here: launch/test.sh installs it")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def pages(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each subject."""
    root = tmp_path_factory.mktemp("pages")
    hostile, calm = make_eventful_run(root / "hostile", HOSTILE).path, make_run(root / "calm").path
    long_name = make_eventful_run(root / "long", "un" + "broken" * 40).path
    subjects = {"run": [hostile], "long words": [long_name], "two runs": [hostile, calm]}
    subjects |= {"corpus": [data / "corpus"], "tokenizer": [data / "tokenizer"]}
    found = {}
    for name, directories in subjects.items():
        text = [str(root / "text.jsonl")] if name == "tokenizer" else []
        if text:
            (root / "text.jsonl").write_text(json.dumps({"content": HOSTILE, "path": HOSTILE}) + "\n")
        found[name] = root / f"{name}.html"
        found[name].write_text(make(directories, Options(text=text)).html(), encoding="utf-8")
    return found


@pytest.mark.parametrize("name", ["run", "long words", "two runs", "corpus", "tokenizer"])
def test_a_page_is_drawn_at_any_width_and_in_both_schemes(browser: Browser, pages: dict[str, Path], name: str) -> None:
    page = pages[name]
    for scheme, width in ALL if name == "run" else SOME:
        browser.open(page, width, scheme)
        title = browser.run("return document.title")
        assert title != "owned" and browser.run("return document.images.length") == 0
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert browser.messages() == []
        assert browser.requests() == {page.as_uri()}
        charts = browser.run(_DRAWN)
        assert len(charts) == browser.run("return document.querySelectorAll('[data-chart]').length")
        assert len(charts) >= (7 if name in ("run", "long words", "two runs") else 0)
        assert all(charts), "a chart without its line, in the colour of this scheme"


def test_runs_with_few_or_no_numbers_are_drawn_without_errors(browser: Browser, tmp_path: Path) -> None:
    rows = {"none": [], "one": [train_row(0)], "no number": [train_row(step, loss=None) for step in range(3)]}
    for name, of_run in rows.items():
        write_lines(make_run(tmp_path / name).metrics, of_run)
        page = tmp_path / f"{name}.html"
        page.write_text(make([tmp_path / name], Options()).html(), encoding="utf-8")
        browser.open(page)
        assert browser.messages() == []
        assert browser.run("return document.querySelectorAll('canvas').length") == (7 if of_run else 0)


def test_the_sections_are_landmarks_and_charts_have_texts(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    assert browser.run("return [...document.querySelectorAll('h1,main,header,footer,nav')].length") == 5
    labels = browser.run("return [...document.querySelectorAll('[role=img]')].map((e) => e.getAttribute('aria-label'))")
    assert len(labels) == 9 and all(labels)
    assert labels[0].startswith("Loss, nats per token. training: 9 at step 0, 2.")
    headings = browser.run("return [...document.querySelectorAll('h1,h2,h3')].map((e) => Number(e.tagName[1]))")
    assert headings[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(headings))


def test_the_keyboard_moves_a_common_cursor_and_values_are_read_out(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    press = """
      const plot = document.querySelector("[data-chart]");
      plot.focus();
      for (const key of arguments[0]) plot.dispatchEvent(new KeyboardEvent("keydown", { key }));
      return [document.activeElement === plot, document.querySelector(".live").textContent];
    """
    focused, text = browser.run(press, ["Home", "ArrowRight", "ArrowRight", "ArrowLeft"])
    assert focused and text.startswith("step 1: training 9.111, ")
    legend = "return document.querySelectorAll('[data-chart]')[1].querySelector('.u-legend').textContent"
    browser.until(lambda: browser.run(legend).startswith("step1"))  # the cursor of another chart
    _, text = browser.run(press, ["End"])
    assert text == "step 200: validation 2.775"


def test_loss_can_be_smoothed_and_logarithmic(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    picture = "return document.querySelector('canvas').toDataURL()"
    seen = [browser.run(picture)]
    for number in (0, 1):
        browser.run("document.querySelectorAll('.tools input')[arguments[0]].click()", number)
        seen.append(browser.run(picture))
    assert len(set(seen)) == 3
    browser.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    browser.until(lambda: browser.run(picture) not in seen)  # drawn again, with the same choices
    assert browser.run("return [...document.querySelectorAll('.tools input')].map((e) => e.checked)") == [False, True]


def test_what_is_not_of_this_package_is_refused_by_the_policy(browser: Browser, pages: dict[str, Path]) -> None:
    """The checks above can fail: a page into which markup was injected says so."""
    injected = HOSTILE + "<style>h1{font-size:99px}</style><link rel=stylesheet href=http://127.0.0.1:9/x.css>"
    page = pages["run"].with_name("injected.html")
    page.write_text(pages["run"].read_text(encoding="utf-8").replace("<main", f"{injected}<main", 1), encoding="utf-8")
    browser.open(page)
    messages = browser.messages()
    assert browser.run("return document.title") != "owned" and browser.run("return document.images.length") == 1
    assert browser.run("return getComputedStyle(document.querySelector('h1')).fontSize") != "99px"
    assert len([each for each in messages if "Content Security Policy" in each]) >= 4, messages


def test_a_page_is_printed_in_light_colours(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"], scheme="dark")
    printed = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True, "scale": 0.5})["data"]
    assert io.BytesIO(base64.b64decode(printed)).read(5) == b"%PDF-"
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(_INK) == "#1f5fbf" and all(browser.run(_DRAWN))
