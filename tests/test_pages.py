"""report.html and annotate.html in a real browser: every picture drawn, nothing fetched, a rater's path."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import lines, run_script
from test_stats import greeting

from common.answers import WEIGHTS
from common.report.pages import templates
from common.report.people import rating_id, rating_page, read_ratings

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
    assert figures.count() == 9
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
    assert marked == {"base": 0, "sft": 1, "grpo_rm": 2, "grpo_judge": 2}  # the agents made the labels
    shown = page.locator("#matrix svg").text_content()
    judged = summary["wins"]["judged"]
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
    flags = ["--offline", "--run", copy, "--search", 8, "--queries", heldout, "--annotations", saved, other]
    done = run_script("05_evaluate.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    people = json.loads((copy / "05_summary.json").read_text())["people"]
    assert (people["raters"], people["ratings"], people["pairs"], people["half_finished"]) == (2, 6, 4, 2)
    assert people["evaluators"]["rubric"]["n"] == 3
    report = visit(copy / "report.html")
    assert report.locator("#policies th", has_text="people").count() == 1
    assert "2 raters" in report.locator("#people").inner_text()


# ---- the rating page ------------------------------------------------------------------------------------------------


@pytest.fixture
def rating_tab(tmp_path: Path, visit):
    """Opens the rating page of two policies' greetings for six queries; `beside` a tab: in the same browser."""
    rows = [greeting(name, n, f"{name}祝{n}", 1) for name in ("a", "b") for n in range(6)]
    path = tmp_path / "annotate.html"
    shown = rating_page(SimpleNamespace(annotate=10), rows, [f"q{n}" for n in range(6)])
    path.write_text(templates().get_template("annotate.html").render(page=shown, dimensions=list(WEIGHTS)), "utf-8")

    def open_tab(rater: str = "", beside=None):
        tab = share_a_store(beside, path.as_uri()) if beside else visit(path)
        if rater:
            sign_in(tab, rater)
        return tab

    open_tab.rows = rows
    return open_tab


def share_a_store(tab, url: str):
    """A tab beside `tab`. Once in some hundred times Chromium gives it a localStorage of its own: then another."""
    from playwright.sync_api import TimeoutError

    tab.evaluate("localStorage.setItem('shared', 'yes')")
    for _ in range(3):
        beside = tab.context.new_page()
        beside.goto(url)
        try:
            beside.wait_for_function("localStorage.getItem('shared')", polling=50, timeout=10_000)
        except TimeoutError:
            beside.close()
            continue
        beside.evaluate("localStorage.removeItem('shared')")
        tab.wait_for_function("!localStorage.getItem('shared')", polling=50)
        return beside
    raise AssertionError("three tabs in a row do not share the first one's localStorage")


def sign_in(tab, rater: str) -> None:
    tab.fill("#rater", rater)
    tab.press("#rater", "Enter")


def press(tab, keys: str) -> None:
    for key in keys:
        tab.keyboard.press(key)


def finished(tab) -> int:
    """How many items the page says are done, of those it shows now."""
    return int(tab.locator("#place").inner_text().split("已完成")[1].split()[0])


def saved_rows(tab, path: Path) -> list[dict]:
    with tab.expect_download() as download:
        tab.click("#save")
    download.value.save_as(path)
    return lines(path)


def test_enter_that_ends_an_input_methods_word_does_not_end_the_name(rating_tab) -> None:
    tab = rating_tab()
    tab.focus("#rater")
    keyboard = tab.context.new_cdp_session(tab)
    keyboard.send("Input.imeSetComposition", {"text": "zhang'san", "selectionStart": 9, "selectionEnd": 9})
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
    keyboard.send("Input.dispatchKeyEvent", {"type": "rawKeyDown"} | enter)
    after_the_word = (
        "$('rater').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', keyCode: 229, bubbles: true}))"
    )
    tab.evaluate(after_the_word)  # Safari sends it when the word is complete
    assert tab.locator("#place").inner_text() == "" and tab.evaluate("localStorage.length") == 0
    keyboard.send("Input.insertText", {"text": "张三"})
    tab.press("#rater", "Enter")
    press(tab, "1")
    assert tab.input_value("#rater") == "张三" and tab.evaluate("Object.keys(localStorage)") == ["greetings 张三"]


def test_digits_that_choose_an_input_methods_word_rate_nothing(rating_tab) -> None:
    tab = rating_tab("甲")
    press(tab, "m")
    choosing = "{key: '1', keyCode: 229, isComposing: true, bubbles: true}"
    tab.evaluate(
        f"for (const e of [$('rater'), document.body]) e.dispatchEvent(new KeyboardEvent('keydown', {choosing}))"
    )
    assert finished(tab) == 0


def test_a_key_held_down_and_a_double_click_rate_one_pair(rating_tab) -> None:
    tab = rating_tab("甲")
    press(tab, "m")
    for _ in range(5):
        tab.keyboard.down("1")  # as the keyboard repeats it
    tab.keyboard.up("1")
    assert finished(tab) == 1
    tab.locator(".choices button").first.dblclick()
    assert finished(tab) == 2
    tab.locator(".choices button").first.click()
    assert finished(tab) == 3


def test_two_tabs_of_one_rater_keep_what_both_rate(rating_tab, tmp_path: Path) -> None:
    one = rating_tab("甲")
    two = rating_tab("甲", beside=one)
    press(one, "33333")
    two.wait_for_function("$('place').textContent.includes('已完成 1 条')", polling=50)  # it hears of it at once
    two.keyboard.press("ArrowRight")
    press(two, "22222")
    one.keyboard.press("ArrowRight")
    press(one, "11")  # the third greeting: half in one tab, half in the other
    two.wait_for_function("document.querySelectorAll('.row button.on').length === 2", polling=50)
    press(two, "11")
    two.keyboard.press("ArrowDown")
    two.keyboard.press("ArrowDown")
    press(two, "3")
    for tab in (one, two):
        tab.reload()
        assert tab.input_value("#rater") == "甲" and finished(tab) == 2
    grades = [list(row["grades"].values()) for row in saved_rows(two, tmp_path / "saved.jsonl")]
    assert sorted(grades) == [[1, 1, 3], [2] * 5, [3] * 5]


def test_a_reloaded_tab_knows_what_the_browser_forgot(rating_tab) -> None:
    tab = rating_tab("甲")
    press(tab, "33333")
    tab.evaluate("localStorage.clear()")  # Chromium once in some hundred reloads, with two tabs open
    tab.reload()
    assert tab.input_value("#rater") == "甲" and finished(tab) == 1
    assert finished(rating_tab("甲", beside=tab)) == 1  # it is kept for all tabs again


def test_a_tab_puts_back_what_another_one_did_not_know(rating_tab) -> None:
    one = rating_tab("甲")
    press(one, "3333322222")
    two = rating_tab("甲", beside=one)
    two.evaluate("localStorage.setItem(store(), '{}')")  # as one does to which the browser showed an empty store
    two.wait_for_function("Object.keys(JSON.parse(localStorage.getItem(store()))).length === 2", polling=50)


def test_the_next_rater_takes_nothing_over_and_the_first_finds_it_all_again(rating_tab, tmp_path: Path) -> None:
    first = rating_tab("甲")
    press(first, "33333m12")
    second = rating_tab(beside=first)
    assert second.input_value("#rater") == "" and second.locator("#place").inner_text() == ""
    press(second, "1m1")  # no name, so nobody rates
    sign_in(second, "乙")
    assert finished(second) == 0 and "第 1 条" in second.locator("#place").inner_text()
    press(second, "22222")
    first.reload()
    assert first.input_value("#rater") == "甲" and finished(first) == 1
    # In one tab: the name changed, taken away, and written by another keyboard.
    sign_in(first, "丙")
    assert finished(first) == 0
    press(first, "11111")
    sign_in(first, " ")
    assert first.input_value("#rater") == "丙"
    sign_in(first, " 甲\u3000")
    assert first.input_value("#rater") == "甲" and finished(first) == 1
    rows = saved_rows(first, tmp_path / "saved.jsonl")
    assert {row["rater"] for row in rows} == {"甲"} and len(rows) == 3
    assert [row["grades"]["culture"] for row in saved_rows(second, tmp_path / "other.jsonl")] == [2]


def test_a_browser_that_keeps_nothing_loses_nothing_while_the_page_is_open(rating_tab, tmp_path: Path) -> None:
    tab = rating_tab()
    tab.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
    sign_in(tab, "甲")
    press(tab, "33333")
    assert "浏览器不让存" in tab.locator("#told").inner_text()
    sign_in(tab, "乙")
    assert finished(tab) == 0
    sign_in(tab, "甲")
    assert finished(tab) == 1 and len(saved_rows(tab, tmp_path / "saved.jsonl")) == 1


def test_ratings_outlast_a_page_made_again_and_two_saves_count_once(rating_tab, tmp_path: Path) -> None:
    tab = rating_tab("甲")
    press(tab, "33333" * 3 + "m12")
    early = saved_rows(tab, tmp_path / "annotations.jsonl")
    # A policy and queries come, the ids are others.
    rows = [greeting(name, n, f"{name}祝{n}", 1) for name in ("c", "a", "b") for n in range(8)]
    rows = [row | {"id": f"new {row['id']}", "query_id": f"new {row['query_id']}"} for row in rows]
    queries = [f"new q{n}" for n in reversed(range(8))]
    shown = rating_page(SimpleNamespace(annotate=10), rows, queries)
    page = templates().get_template("annotate.html").render(page=shown, dimensions=list(WEIGHTS))
    (tmp_path / "annotate.html").write_text(page, "utf-8")
    tab.reload()
    assert finished(tab) == 3 and "共 24 条" in tab.locator("#place").inner_text()
    for item in shown["greetings"]:
        if item["id"] == early[0]["id"]:
            tab.evaluate(f"at.grades = {shown['greetings'].index(item)}; show()")
    press(tab, "11111")  # a change of mind
    late = saved_rows(tab, tmp_path / "annotations (1).jsonl")
    assert len(early) == len(late) == 5
    # The shell names the later file first.
    files = [tmp_path / "annotations (1).jsonl", tmp_path / "annotations.jsonl"]
    ratings = read_ratings(SimpleNamespace(annotations=files, run=tmp_path), rows)
    assert len(ratings) == 5 and all(rating.finished for rating in ratings)
    texts = {rating_id(row): row["response"] for row in rating_tab.rows}
    of_run = {row["id"]: row["response"] for row in rows}
    by_text = {of_run[r.id]: set(r.grades.values()) for r in ratings if not r.one}
    rated = [texts[row["id"]] for row in early if "grades" in row]
    assert by_text == {rated[0]: {1}, rated[1]: {3}, rated[2]: {3}}
    winners = {of_run[getattr(r, r.better)] for r in ratings if r.one}
    assert winners == {texts[row[row["better"]]] for row in early if "better" in row}
