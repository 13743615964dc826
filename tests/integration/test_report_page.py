"""The report in a real browser: no error, search and filters, both themes, phone width, no network, print."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coalign.evaluation import cases
from coalign.evaluation.metrics_file import read_metrics
from coalign.report import comparison, page
from unit.worlds import by_rule, make_run, summarised, world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LONG = "antidisestablishmentarianism" * 4
TEXT = "a long answer <b>of words</b> & 中文 عربي"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the report of a made-up run of 12 tasks, and the page that compares two such runs."""
    tasks, pairs = world(12, num_inputs=4, num_wordings=5)

    def answer(pair: Any) -> str:
        number = int(pair.example.id[1])
        text = TEXT.replace("long ", "") if pair.wording.id == "w4" else TEXT
        return ["yes", "no", f"{LONG} {pair.wording.id}", f"{text} {pair.wording.id}"][number]

    outputs = {
        "base": by_rule(pairs, lambda pair: "yes" if pair.wording.id in ("w0", "w1") else "no"),
        "sft": by_rule(pairs, answer),
        "align": by_rule(pairs, lambda pair: "yes" if pair.example.id == "e3" else answer(pair)),
    }
    stages = {name: name for name in outputs}
    metrics = summarised(outputs, tasks, pairs, {"sources": stages, "settings": {"run.name": LONG}})
    assert len(metrics.cases) == 48 <= cases.NUM_CASES
    folder = tmp_path_factory.mktemp("report")
    found = {}
    for name in ("one", "two"):
        found[name] = read_metrics(make_run(folder / name, dataclasses.replace(metrics, run=name)))
    report = page.write_page(*found["one"])
    compared = comparison.write_comparison(folder / "compare.html", comparison.name_runs(found))
    return {"report": report, "compare": compared}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start the machine's Chromium; without one the tests are skipped, in CI they fail."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is not installed; .ci/run installs it as root")
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


class Tab:
    """An opened page and everything that it has complained about or asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1200, **how: Any) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **how)
        self.page.set_default_timeout(90_000)  # a loaded machine is slow, not wrong
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.own = path.as_uri()

    def close(self) -> None:
        """Fail if the page has complained or asked for anything but itself."""
        assert self.complaints == []
        assert [url for url in self.requests if url.partition("#")[0] != self.own and url != "data:,"] == []
        self.page.close()

    def shown(self, expected: int) -> None:
        """Wait until this many inputs are shown, and the line above them says so."""
        from playwright.sync_api import expect

        expect(self.page.locator("#count")).to_have_text(f"{expected} of 48 inputs", timeout=90_000)
        assert self.page.locator("details.case:visible").count() == expected


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_search_and_filters(browser: Any, pages: dict[str, Path]) -> None:
    """By text, task, model and agreement, alone and together; the order; with the keyboard; cleared again."""
    tab = Tab(browser, pages["report"])

    def choice(name: str) -> Any:
        return tab.page.locator(f"select[name={name}]")

    tab.shown(48)
    search = tab.page.get_by_label("Search in inputs, wordings and answers")
    search.fill("e1 OF t7")
    tab.shown(1)
    search.fill("中文")
    tab.shown(12)
    search.fill("nothing like this")
    tab.shown(0)
    assert tab.page.locator("#nothing").is_visible()
    tab.page.get_by_role("button", name="Clear").click()
    tab.shown(48)
    choice("task").select_option("t3")
    tab.shown(4)
    choice("agreement").select_option(label="always right")
    tab.shown(2)  # e0 of sft and align, e3 of align
    choice("model").select_option(label="SFT (IA)")
    tab.shown(1)
    first = tab.page.locator("details.case:visible").first
    first.locator("summary").focus()
    tab.page.keyboard.press("Enter")
    assert first.locator("td:visible").count() == 5  # one model's column
    choice("model").select_option("")
    tab.page.get_by_role("button", name="Clear").click()
    tab.shown(48)
    choice("order").select_option("least")
    assert sorted_crs(tab, -1)
    tab.close()


def sorted_crs(tab: Tab, model: int) -> bool:
    """Return whether the inputs stand in the order of the CR of a model, and their CRs differ."""
    script = "(all, model) => all.map(one => Number(one.dataset.crs.split(' ').at(model)))"
    values = tab.page.locator("details.case").evaluate_all(script, model)
    return values == sorted(values) and values[0] < values[-1]


def test_a_chosen_model_decides_what_is_said_sorted_and_searched(browser: Any, pages: dict[str, Path]) -> None:
    """The closed line of an input, the least consistent first, and whose answers are looked through; and back again."""
    from playwright.sync_api import expect

    tab = Tab(browser, pages["report"])
    model, search = tab.page.locator("select[name=model]"), tab.page.get_by_role("searchbox")
    line = tab.page.locator("details.case[data-task=t3]", has_text="input e3 of t3").locator("summary")
    before = line.text_content()
    assert before is not None and "CR 0.40 → 1.00 · 2 → 5 of 5 right" in before and "always right" in before
    model.select_option(label="base")
    tab.shown(48)
    expected = [("base", "CR 0.40 · 2 of 5 right", "inconsistent"), ("SFT (IA)", "CR 0.00 · 0 of 5", "inconsistent")]
    for name, said, outcome in expected:
        model.select_option(label=name)
        expect(line).to_contain_text(said)
        expect(line).to_contain_text(outcome)
        expect(line).not_to_contain_text("→")
    search.fill("中文")
    tab.shown(12)
    model.select_option(label="base")
    tab.shown(0)  # none of its own answers
    search.fill("e3 of t3")
    tab.shown(1)
    search.fill("")
    tab.shown(48)
    tab.page.locator("select[name=order]").select_option("least")
    assert sorted_crs(tab, 0) is False  # all the same under base
    model.select_option(label="SFT (IA)")
    assert sorted_crs(tab, 1) and not sorted_crs(tab, -1)
    tab.page.get_by_role("button", name="Clear").click()
    expect(line).to_have_text(before)
    places = tab.page.locator("details.case").evaluate_all("all => all.map(one => Number(one.dataset.place))")
    assert places == list(range(48))
    tab.close()


def test_missing_words_are_marked_with_a_name(browser: Any, pages: dict[str, Path]) -> None:
    tab = Tab(browser, pages["report"])
    tab.page.get_by_label("Search in inputs, wordings and answers").fill("e3 of t3")
    tab.shown(1)
    tab.page.locator("details.case:visible summary").first.click()
    gaps = tab.page.locator("details.case[open]").get_by_role("img", name="words missing here")
    assert gaps.count() == 1
    box = gaps.bounding_box()
    assert box is not None and min(box["width"], box["height"]) > 8
    tab.close()


@pytest.mark.parametrize("which", ["report", "compare"])
def test_both_themes_are_legible(which: str, browser: Any, pages: dict[str, Path]) -> None:
    """As the system has it, by the button, remembered; texts of 4.5 to 1 on what is behind them."""
    for scheme in ("light", "dark"):
        tab = Tab(browser, pages[which], color_scheme=scheme)
        script = """() => {
            const style = getComputedStyle(document.documentElement);
            const probe = document.createElement('i'); document.body.append(probe);
            const of = name => { probe.style.color = style.getPropertyValue('--' + name);
                                 return getComputedStyle(probe).color; };
            return Object.fromEntries(['ink', 'soft', 'paper', 'shade', 'mark', 'on', 'grey',
                                       'c1', 'c2', 'c3', 'c4', 'c5', 'c6'].map(name => [name, of(name)])); }"""
        colours = tab.page.evaluate(script)
        assert (luminance(colours["paper"]) > 0.5) == (scheme == "light")
        pairs = [("ink", "paper"), ("ink", "shade"), ("ink", "mark"), ("soft", "paper"), ("soft", "shade")]
        pairs += [(f"c{n}", "paper") for n in range(1, 7)] + [("on", f"c{n}") for n in range(1, 7)] + [("on", "grey")]
        assert [(a, b) for a, b in pairs if contrast(colours[a], colours[b]) < 4.5] == []
        script = """() => [...document.querySelectorAll('mark, tr.difference td.clear')].map(one => {
            const style = getComputedStyle(one);
            return [one.className, style.color, style.backgroundColor, style.fontWeight]; })"""
        found = tab.page.evaluate(script)
        marks = [(colour, behind) for name, colour, behind, _ in found if name != "clear"]
        assert all(contrast(*pair) >= 4.5 for pair in marks) and bool(marks) == (which == "report")
        clear = {(colour, weight) for name, colour, _, weight in found if name == "clear"}
        assert clear == ({(colours["ink"], "600")} if which == "report" else set())
        button = tab.page.locator("#theme")
        button.click()
        button.click()
        assert button.text_content() == "Theme: dark"
        paper = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert luminance(paper) < 0.5
        tab.close()


@pytest.mark.parametrize("which", ["report", "compare"])
def test_a_phone_needs_no_sideways_scrolling(which: str, browser: Any, pages: dict[str, Path]) -> None:
    tab = Tab(browser, pages[which], width=390)
    assert pages[which].stat().st_size <= page.MAX_BYTES
    tab.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    script = """() => [...document.querySelectorAll('main *, header *, footer *')].filter(one =>
        one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.wide')).map(one => one.outerHTML)"""
    assert tab.page.evaluate(script) == []
    tab.close()


def test_it_can_be_read_without_scripts_and_printed(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto(pages["report"].as_uri())
    assert plain.locator("details.case:visible").count() == 48
    assert not plain.locator("#filter").is_visible() and not plain.locator("#theme").is_visible()
    plain.locator("details.case summary").first.click()
    assert plain.locator("details.case table:visible").count() == 1
    context.close()
    tab = Tab(browser, pages["report"], color_scheme="dark")
    tab.page.emulate_media(media="print")
    assert luminance(tab.page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.5
    assert not tab.page.locator("nav").is_visible() and tab.page.locator("details.case:visible").count() == 30
    tab.close()


def num_pages(pdf: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


def test_nothing_that_is_closed_is_missing_on_paper(browser: Any, pages: dict[str, Path]) -> None:
    """All that opens is open on paper, of the inputs 30; closed again afterwards; open without scripts as well."""
    tab = Tab(browser, pages["report"])
    tab.page.locator("details.case summary").nth(2).click()

    def num_open(which: str) -> int:
        found: int = tab.page.locator(f"{which}[open]").count()
        return found

    others = tab.page.locator("details:not(.case)").count()
    for _ in range(2):
        tab.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert (num_open("details.case"), num_open("details:not(.case)")) == (30, others)
        tab.page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert (num_open("details.case"), num_open("details:not(.case)")) == (1, 0)
    long = num_pages(tab.page.pdf(format="A4"))
    assert num_open("details.case") == 1
    tab.page.evaluate("document.querySelectorAll('details').forEach(one => one.remove())")
    assert long > num_pages(tab.page.pdf(format="A4")) + 5
    tab.close()
    tab = Tab(browser, pages["report"])
    tab.page.locator("select[name=task]").select_option("t11")
    tab.shown(4)
    tab.page.emulate_media(media="print")
    assert tab.page.locator("details.case:visible").count() == 4
    tab.close()
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto(pages["report"].as_uri())
    plain.emulate_media(media="print")
    assert plain.locator("details.case table:visible").count() == 30
    context.close()
