"""report.html and annotate.html in a real browser: every picture drawn, nothing fetched, a rater's path."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import lines, run_script

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium here; Debian: apt-get install chromium fonts-noto-cjk"
)

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a file as a reader does; at the end of the test nothing may have gone wrong or been fetched."""
    contexts, said, fetched = [], [], []

    def open_page(path: Path, viewport: dict = WIDE):
        contexts.append(browser.new_context(viewport=viewport))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said
    assert not [url for url in fetched if not url.startswith(("file:", "data:", "blob:"))]


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_every_picture_is_drawn_and_nothing_sticks_out(run: Path, visit, viewport: dict) -> None:
    page = visit(run / "report.html", viewport)
    figures = page.locator("figure")
    assert figures.count() == 8
    for n in range(8):
        figure = figures.nth(n)
        assert figure.locator("svg, img").count() == 1
        if figure.locator("img").count():
            assert figure.locator("img").evaluate("image => image.complete && image.naturalWidth > 0")
            continue
        shapes = figure.locator("svg :is(path, circle, rect)")  # the training curves are two, all others more
        assert shapes.count() >= 2, figure.inner_text()
        assert "NaN" not in figure.locator("svg").inner_html()
        cut = """svg => { const box = svg.getBoundingClientRect();
            return [...svg.querySelectorAll("text")].filter(t => {
            const b = t.getBoundingClientRect();
            return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1;
        }).map(t => t.textContent); }"""
        assert figure.locator("svg").evaluate(cut) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    # The finding and the table are what is seen first.
    assert page.locator(".finding").bounding_box()["y"] < 150
    assert page.locator("#policies table").bounding_box()["y"] < viewport["height"]


def test_chinese_in_pictures_is_no_row_of_boxes(run: Path, visit) -> None:
    page = visit(run / "report.html")
    assert "创意" in page.locator("#radar svg").text_content()
    drawn = """character => { const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
        pen.font = getComputedStyle(document.querySelector("#radar svg text")).font.replace("12px", "40px");
        pen.fillText(character, 10, 60); return canvas.toDataURL(); }"""
    assert len({page.evaluate(drawn, character) for character in "语创情文化"}) == 5  # boxes would all look the same


def test_the_report_shows_the_figures_of_the_summary(run: Path, visit) -> None:
    page, summary = visit(run / "report.html"), json.loads((run / "05_summary.json").read_text())
    assert page.locator(".finding").inner_text() == summary["finding"]
    assert summary["finding"] in (run / "report.md").read_text(encoding="utf-8")
    table = page.locator("#policies tbody tr")
    assert table.count() == len(summary["policies"]) == 4
    for n, (name, figures) in enumerate(summary["policies"].items()):
        cells = table.nth(n).locator("td").all_inner_texts()
        assert cells[0] == name and cells[1].startswith(f"{100 * figures['excellence']['value']:.1f}%")
    marked = {
        name: page.locator("#policies tr", has_text=name).last.inner_text().count("†") for name in summary["policies"]
    }
    assert marked == {"base": 0, "sft": 0, "grpo_rm": 1, "grpo_judge": 1}
    wins = [row for row in lines(run / "results.jsonl") if row["table"] == "wins"]
    shown = page.locator("#matrix svg").text_content()
    judged = next(row["figures"] for row in wins if row["row"] == "judged")
    assert all(
        f"{round(100 * r['value'])}%" in shown
        for others in judged.values()
        for r in others.values()
        if r["value"] * 200 % 2 != 1
    )


def test_the_filter_finds_queries_and_greetings(run: Path, visit) -> None:
    page, rows = visit(run / "report.html"), lines(run / "generations.jsonl")
    queries = {r["query"] for r in rows}
    assert page.locator("#count").inner_text() == f"{len(queries)} of {len(queries)} queries"
    wanted = sorted(queries)[3]
    page.fill("#filter", wanted)
    assert wanted in page.locator(".sample h3").all_inner_texts()
    assert page.locator(".sample").count() == sum(wanted in q for q in queries) or wanted in "".join(
        r["response"] for r in rows
    )
    assert page.locator(".sample").first.locator(".answers div").count() == 4
    page.fill("#filter", "nothing holds this")
    assert page.locator(".sample").count() == 0 and page.locator("#count").inner_text().startswith("0 of")
    page.fill("#filter", "")
    before = page.locator(".sample").count()
    if page.locator("#more").is_visible():
        page.click("#more")
        assert page.locator(".sample").count() > before


def test_the_cost_curve_changes_with_its_unit(run: Path, visit) -> None:
    page = visit(run / "report.html")
    before = page.locator("#cost-curve svg").inner_html()
    page.select_option("#cost-curve select", "tokens")
    after = page.locator("#cost-curve svg").inner_html()
    assert before != after and "tokens" in after
    page.select_option("#cost-curve select", "money")
    assert "no prices were given" in page.locator("#cost-curve svg").text_content()


def test_a_persons_path_by_keyboard_with_a_reload_to_the_joined_report(run: Path, visit, tmp_path: Path) -> None:
    page = visit(run / "annotate.html")
    assert "grpo" not in page.content() and "sft" not in page.content()
    place = page.locator("#place")
    page.keyboard.type("甲")
    page.keyboard.press("Enter")
    for _ in range(3):
        for key in "32232":
            page.keyboard.press(key)
    assert "第 4 条" in place.inner_text() and "已完成 3 条" in place.inner_text()
    page.keyboard.press("1")
    page.reload()
    assert page.input_value("#rater") == "甲"
    assert "第 4 条" in place.inner_text() and "已完成 3 条" in place.inner_text()
    assert page.locator(".row button.on").count() == 1  # the fourth is half-finished, and stays so
    page.keyboard.press("m")
    page.keyboard.press("1")
    page.keyboard.press("0")
    assert "第 3 条" in place.inner_text() and "已完成 2 条" in place.inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("2")  # a change of mind
    with page.expect_download() as download:
        page.keyboard.press("s")
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    rows = lines(saved)
    assert saved.name == "annotations_甲.jsonl" and len(rows) == 6
    assert [r["better"] for r in rows if "one" in r] == ["one", "other"]
    assert [list(r["grades"].values()) for r in rows if "grades" in r][:1] != [[]]

    # A second rater says the same, in a file of their own.
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(r | {"rater": "乙"}) + "\n" for r in rows), encoding="utf-8")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    heldout = run.parent / "heldout.jsonl"
    done = run_script("05_evaluate.py", "--offline", "--run", copy, "--queries", heldout, "--annotations", saved, other)
    assert done.returncode == 0, done.stdout + done.stderr
    people = json.loads((copy / "05_summary.json").read_text())["people"]
    assert (people["raters"], people["ratings"], people["pairs"], people["half_finished"]) == (2, 6, 4, 2)
    assert people["evaluators"]["rubric"]["n"] == 3
    report = visit(copy / "report.html")
    assert report.locator("#policies th", has_text="people").count() == 1
    assert "2 raters" in report.locator("#people").inner_text()
