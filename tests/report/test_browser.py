"""The page in Debian's Chromium: no error, no request, every control works, and it is accessible.

`make test-browser` installs what these tests need. With FIREOPD_SHOWN_RUNS="RUN RUN" the
screenshots of the documentation are made anew, from those runs.
"""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from fireopd_jax.method.batch import stage_context
from fireopd_jax.method.filtering import TeacherQuantile
from fireopd_jax.report.page import write_report
from fireopd_jax.report.watching import WatchedPage, watching
from fireopd_jax.runs.tracking import Tracker
from tests.report.made import make_case, make_run

pytestmark = pytest.mark.browser
chromium = pytest.importorskip(
    "tests.report.chromium", reason="make test-browser installs Selenium"
)
FIGURES = Path(__file__).parents[2] / "docs" / "figures" / "report"
SIZES = chromium.SIZES


@pytest.fixture(scope="module")
def driver():
    started = chromium.start()
    if started is None:
        pytest.skip("make test-browser installs Chromium")
    yield started
    started.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def made(folder):
    return make_run(folder / "made", words=4, rows=32)


@pytest.fixture(scope="module")
def pages(folder, made):
    """Pages of runs of several kinds, by name."""
    other = make_run(folder / "other", "method.reweight={kind: uniform}", seed=4)
    empty = make_run(folder / "empty", steps=0)
    (made / "report.html").unlink(missing_ok=True)
    runs = {"one": [made], "two": [made, other], "empty": [empty]}
    return {
        name: write_report([str(run) for run in each], folder / f"{name}.html")
        for name, each in runs.items()
    }


@pytest.fixture
def page(driver):
    opened = chromium.Page(driver)
    opened.driver.get("about:blank")
    opened.errors()
    opened.requests()
    return opened


@pytest.mark.parametrize("name", ["one", "two", "empty"])
@pytest.mark.parametrize("size", SIZES)
def test_a_page_opens_without_error_or_request(name, size, page, pages):
    page.open(pages[name], size)
    assert page.errors() == []
    assert [url for url in page.requests() if not url.startswith(("file:", "data:"))] == []
    assert len(page.all("main > section")) == 7
    wide, room = page.script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= room  # nothing but tables scrolls sideways


def test_every_control_works(page, pages):
    page.open(pages["two"])
    before = page.script("return document.querySelectorAll('*').length")
    for count in range(len(page.all("select"))):
        for at in (-1, 0):
            chosen = chromium.Select(page.see(page.all("select")[count]))
            if not (count == 0 and at == 0):  # that is a heading, no metric
                chosen.select_by_index(len(chosen.options) - 1 if at else 0)
    for count in range(len(page.all("input[type=range]"))):
        slider = page.see(page.all("input[type=range]")[count])
        slider.send_keys(chromium.Keys.HOME, chromium.Keys.ARROW_RIGHT, chromium.Keys.END)
    for count in range(len(page.all("input[type=radio]"))):
        radio = page.all("input[type=radio]")[count]
        if radio.is_enabled():
            page.script("arguments[0].click()", radio)
            assert page.all("input[type=radio]")[count].is_selected()
    for count in range(len(page.all("button"))):
        button = page.all("button")[count]
        if button.is_enabled():
            page.see(button).click()
    for details in page.all("details"):
        page.script("arguments[0].open = true", details)
    for chart in page.all("svg[role=slider]"):
        page.script("arguments[0].focus()", chart)
        chart.send_keys(chromium.Keys.HOME, chromium.Keys.ARROW_RIGHT)
    assert page.errors() == []
    assert page.script("return document.querySelectorAll('*').length") > before
    tables = page.script(
        "return [...document.querySelectorAll('details[open]')]"
        ".map(details => details.querySelectorAll('td').length)"
    )
    assert tables and min(tables) > 0


def test_the_slider_drops_what_the_filter_drops(page, pages):
    """The page's script and the filter's own code, on the same rows at every fraction."""
    page.open(pages["one"])
    _, seed = (int(x) for x in np.random.default_rng(0).integers(1000, size=2))  # of step 6
    scores, rollout = make_case(32, 16, 4, seed)
    context = stage_context(rollout, 2)
    real = np.flatnonzero(np.asarray(rollout.mask).any(axis=1))
    for fraction in np.arange(0, 0.96, 0.05).round(2).tolist():
        slider = page.one("#fraction")
        page.script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
            slider, fraction,
        )  # fmt: skip
        expected = np.asarray(TeacherQuantile(drop_fraction=fraction)(scores, context)[0])[real]
        kept = page.script(
            "const f = RUNS[0].filter; return f.rows.step.map((s, i) => [s, i])"
            ".filter(([s]) => s === 6).map(([_, i]) => wouldKeep(f, i, arguments[0]))",
            fraction,
        )
        assert kept == expected.tolist()
        said = page.text("#whatif")
        assert said.startswith(f"{expected.sum()} of {len(real)} kept")
        now = np.asarray(TeacherQuantile()(scores, context)[0])[real]
        changed = int((now != expected).sum())
        assert ("as in the run" if fraction == 0.2 else f"{changed} change sides") in said
        rows = page.all("#filter table")[0].find_elements(chromium.By.CSS_SELECTOR, "tbody tr")
        assert changed == 0 or len(rows) == min(changed, 40)


def test_a_token_shows_its_numbers_words_and_formula(page, pages):
    page.open(pages["one"])
    words = page.see(page.one(".map"))
    words.send_keys(chromium.Keys.HOME, chromium.Keys.ARROW_RIGHT, chromium.Keys.ARROW_RIGHT)
    page.driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
    chosen = page.one("[role=option][aria-selected=true]")
    assert chosen.get_attribute("data-i") == "2"
    at = int(page.one("#tokens select").get_attribute("value"))
    numbers = page.script("const r = RUNS[0].responses[arguments[0]]; return [r.w[2], r.tl[2]]", at)
    said = page.text("aside.panel")
    assert f"{numbers[0]:.3f}" in said and f"{abs(numbers[1]):.3f}" in said
    assert "teacher’s likeliest" in said and "cT = 1" in said
    assert "token 3 of" in said


def test_a_hover_is_shown_within_a_frame_at_two_thousand_tokens(page, folder):
    long = make_run(folder / "long", steps=1, every=1, rows=6, tokens=2000, words=8)
    page.open(write_report([str(long)]))
    taken = page.driver.execute_async_script(
        """
        const done = arguments[0], taken = [];
        const nodes = [...document.querySelectorAll("[role=option]")];
        const next = () => {
          if (taken.length === 40) return done([nodes.length, taken.sort((a, b) => a - b)[20]]);
          const start = performance.now();
          const node = nodes[(taken.length * 47 + 5) % nodes.length];
          node.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
          requestAnimationFrame(() => {
            document.body.offsetHeight;
            taken.push(performance.now() - start);
            next();
          });
        };
        next();
        """
    )
    assert taken[0] > 1000
    assert taken[1] < 34  # two frames, of a machine that draws without a GPU


def test_a_watched_page_says_that_its_run_has_gone_on(page, folder):
    run = make_run(folder / "watched")
    with watching(WatchedPage([str(run)]), 0) as address:
        page.driver.get(address)
        assert not page.one("button.news").is_displayed()
        time.sleep(4)  # it has asked once
        with Tracker(run) as tracker:
            tracker.log(7, {"loss": 0.125})
        wait = chromium.WebDriverWait(page.driver, 20)
        wait.until(lambda _: page.one("button.news").is_displayed())
        page.one("button.news").click()
        assert page.errors() == []
        assert {url.rpartition("/")[0] for url in page.requests()} >= {address.rstrip("/")}


@pytest.mark.parametrize("name", ["one", "two", "empty"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_no_fault(name, scheme, size, page, pages):
    file = os.environ.get("FIREOPD_AXE")
    if file is None:
        pytest.skip("make test-browser installs axe-core")
    page.open(pages[name], size, scheme)
    page.script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.script(Path(file).read_text(encoding="utf-8"))
    found = page.driver.execute_async_script(
        "axe.run().then(r => arguments[0](r.violations.map(v => [v.id, v.impact, "
        "v.nodes.slice(0, 3).map(n => n.html.slice(0, 160) + ' ' + n.failureSummary)])))"
    )
    assert found == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_pictures_show_something(size, scheme, page, pages, tmp_path):
    shown = os.environ.get("FIREOPD_SHOWN_RUNS", "").split()
    file = write_report(shown[:1], tmp_path / "shown.html") if shown else pages["one"]
    page.open(file, size, scheme)
    home = FIGURES if shown else tmp_path
    for section in ("summary", "curves", "filter", "tokens"):
        picture = home / f"{section}_{size}_{scheme}.webp"
        page.picture(picture, None if section == "summary" else section)
        assert 5_000 < picture.stat().st_size < 200_000
