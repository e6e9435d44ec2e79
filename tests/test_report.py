"""What step 5 makes of its scores: figures of policies, of evaluators, of cost, of people, and the pages."""

import argparse
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, lines
from test_stats import greeting

from common.answers import WEIGHTS, weighted_mean
from common.greetings import Policy
from common.records import write
from common.report.cost import cost_figures
from common.report.evaluators import NEAR, balanced, evaluate_evaluators, labelled_rows
from common.report.figures import policy_figures
from common.report.pages import finding, write_pages
from common.report.people import add_human_scores, alpha, people_figures, rating_id, rating_page, read_ratings
from common.texts import runs_of_12


def labelled(n: int, label: int, text: str, part: str, **more) -> dict:
    row = {"id": f"{n}.{label}", "query": f"q{n}", "response": text, "label": label, "part": part, "leaked": []}
    return row | more


# ---- policies -------------------------------------------------------------------------------------------------------


def test_policy_figures_by_hand() -> None:
    texts = ["万事如意，祝你明天比今天更加快乐健康。", "祝你平安。"]
    rows = []
    for n, text in enumerate(texts):
        rows.append(greeting("a", n, text, 1) | {"grades": dict.fromkeys(WEIGHTS, 2), "quality": 2.0})
    rows.append(rows[1] | {"sample": 1, "response": "祝你平安吉祥。"})
    rows[0]["query"], rows[1]["query"] = "生日 八个字", "生日 十个字以内"
    learnt = {"sft": runs_of_12(["他说：祝你明天比今天更加快乐健康。"]), "references": set()}
    figures = policy_figures(rows, Policy("a", "base", Path("run/policy_rm")), 20, learnt)
    assert figures["length"] == 10.3 and figures["trained_on"] == ["reward_model"] and figures["distinct_texts"] == 1.0
    assert figures["copied_12"] == {"sft": 0.3333, "references": 0.0} and figures["dimensions"]["culture"] == 2
    assert figures["commonest_opening"] == ["祝你", 0.6667]
    best = Policy("a", "base", Path("run/policy_rm_best"))  # which the rubric has chosen
    assert best.trained_on == ["reward_model", "rubric"]
    # 祝你 你平 平安 are in both of a query's samples, 安。 and 安吉 吉祥 祥。 in one.
    assert figures["self_overlap"] == round(3 / 7, 4)
    assert (figures["constraints"]["value"], figures["constraints"]["n"]) == (0.5, 2)
    assert weighted_mean({"language": 3, "creativity": 1, "emotion": 2, "culture": 2, "richness": 2}) == 2.0


# ---- cost -----------------------------------------------------------------------------------------------------------


def test_cost_is_the_sum_of_the_steps_and_equal_cost_takes_the_point_reached(tmp_path: Path) -> None:
    asked = {"ledger": {"calls": 10, "input_tokens": 1_000_000, "output_tokens": 500_000, "money": 4.0}}
    summaries = {
        "01_summary": {"seconds": 10, **asked, "candidates": 60, "completions": 40, "pairs": 7},
        "02_summary": {"seconds": 20},
        "03_summary": {"seconds": 5, **asked, "parts": {"reflect": 8, "validation": 6, "test": 6}},
        "04_summary_none": {"seconds": 3},
        "04_summary_rm": {"seconds": {"total": 100.0}, "completions": 80},
        "04_summary_judge": {"seconds": {"total": 40.0}, **asked, "completions": 80},
    }
    for step, summary in summaries.items():
        (tmp_path / f"{step}.json").write_text(json.dumps(summary))
    rows = []
    for name, excellent in {"base": 2, "sft": 4, "grpo_rm": 6, "grpo_judge": 8}.items():
        rows += [greeting(name, n, "x", int(n < excellent)) for n in range(10)]
    graded = [{"route": "A", "at": 0.25, "query_id": f"q{n}", "excellent": int(n < 5)} for n in range(10)]
    cost = cost_figures(tmp_path, rows, graded)
    a, b = cost["totals"]["A"], cost["totals"]["B"]
    assert a == {"completions": 120, "calls": 10, "tokens": 1_500_000, "seconds": 133, "money": 4.0}
    assert b["money"] == 12.0 and b["seconds"] == 58
    equal = {row["unit"]: row for row in cost["equal"]}
    assert equal["seconds"]["cost"] == 58 and equal["seconds"]["B"]["at"] == "grpo_judge"
    assert equal["seconds"]["A"]["at"] == "25% of GRPO"  # 10 + 3 + 20 + 25
    assert equal["seconds"]["A"]["excellence"]["value"] == 0.5
    assert equal["tokens"]["A"]["at"] == "grpo_rm" and equal["tokens"]["B"]["at"] == "sft"
    assert cost["labels"] == {"A": 0, "B": 14} and cost["pairs"] == 7


def test_a_route_whose_steps_have_not_all_run_has_no_cost(tmp_path: Path) -> None:
    (tmp_path / "01_summary.json").write_text(json.dumps({"seconds": 10}))
    cost = cost_figures(tmp_path, [greeting("base", 0, "x", 1)], [])
    assert list(cost["steps"]) == ["01_summary"] and cost["totals"] == cost["curve"] == {} and cost["equal"] == []


# ---- evaluators -----------------------------------------------------------------------------------------------------


def test_evaluators_are_judged_on_unseen_rows_and_leaked_ones_stand_apart() -> None:
    rng, rows = random.Random(0), []
    for n in range(120):
        for label in (0, 1):
            said = label if rng.random() < 0.8 else 1 - label
            text = ("好" if label else "坏") * rng.randint(10, 30)
            row = labelled(n, label, text, "test" if n < 60 else "reflect", leaked=["sft"] if n < 10 else [])
            row |= {"excellent": said, "judge": None if n % 4 == 0 else said}
            rows.append(row | {"reward_model": label + rng.gauss(0, 0.5)})
    comparisons = [
        {"one": "20.1", "other": "20.0", "outcome": 1.0, "longer_by": 3},
        {"one": "21.1", "other": "21.0", "outcome": None, "longer_by": -2},
        {"one": "3.1", "other": "3.0", "outcome": 0.0, "longer_by": 1},  # leaked
        {"one": "20.1", "other": "20.0", "outcome": 0.0, "longer_by": 1, "query": "of two policies"},
    ]
    figures = evaluate_evaluators(rows, comparisons)
    clean = [row for row in rows if row["part"] == "test" and not row["leaked"]]
    evaluators = figures["evaluators"]
    assert figures["leaked"] == {"sft": 20, "rows": 20} and figures["labelled_test_rows"] == 120
    assert evaluators["rubric"]["n"] == 100 and evaluators["rubric"]["queries"] == evaluators["rubric"]["good"] == 50
    right = sum(row["excellent"] == row["label"] for row in clean)
    assert evaluators["rubric"]["accuracy"]["value"] == right / 100
    assert figures["evaluators_on_leaked_rows"]["rubric"]["n"] == 20
    assert figures["evaluators_on_all_rows"]["rubric"]["n"] == 120
    assert evaluators["judge"]["n"] + evaluators["judge"]["failed"] == 100 and evaluators["judge"]["failed"] > 0
    assert evaluators["null: n-grams"]["accuracy"]["value"] == 1.0  # as the texts were made
    assert evaluators["reward_model"]["accuracy"]["value"] > 0.75
    pairs = figures["labelled_pairs"]
    assert (pairs["pairwise"]["value"], pairs["pairwise"]["n"]) == (1.0, 1)
    assert (pairs["null: the longer"]["value"], pairs["null: the longer"]["n"]) == (0.5, 2)


def test_length_tells_nothing_where_lengths_are_balanced() -> None:
    rng, rows = random.Random(0), []
    for n in range(1000):
        for label in (0, 1):
            text = "字" * rng.randint(*((28, 60) if label else (10, 40)))
            rows.append(labelled(n, label, text, "test" if n < 500 else "reflect"))
    figures = evaluate_evaluators(rows, [])
    even = figures["evaluators_at_equal_length"]["null: length"]
    assert figures["evaluators"]["null: length"]["kappa"] > 0.5 and abs(even["kappa"]) < 0.1 and even["n"] >= 200
    matched = balanced([row for row in rows if row["part"] == "test"])
    assert sum(row["label"] for row in matched) * 2 == len(matched) == even["n"]
    for good, bad in zip(matched[::2], matched[1::2], strict=True):
        assert good["label"] == 1 and abs(len(good["response"]) - len(bad["response"])) <= NEAR


def test_rows_that_the_run_learnt_from_are_flagged_with_the_source(tmp_path: Path, capsys) -> None:
    rows = lines(ROOT / "data/labelled.jsonl")
    texts = [row["response"] for row in rows[:4]]
    user = [{"role": "user", "content": "x"}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in texts[:2])
    write(tmp_path / "pairs.jsonl", [{"prompt": user, "chosen": chosen, "rejected": rejected}])
    write(tmp_path / "sft.jsonl", [{"prompt": user, "completion": chosen}])
    write(tmp_path / "references.jsonl", [{"query": "q", "response": texts[2]}])
    inputs = [("02_summary", "preferences", "pairs"), ("04_summary_none", "sft", "sft")]
    for step, flag, file in [*inputs, ("01_summary", "references", "references")]:
        (tmp_path / f"{step}.json").write_text(json.dumps({"settings": {flag: str(tmp_path / f"{file}.jsonl")}}))
    args = argparse.Namespace(run=tmp_path, labelled=ROOT / "data/labelled.jsonl", seed=0)
    leaked = {row["response"]: row["leaked"] for row in labelled_rows(args)}
    assert [leaked[text] for text in texts] == [["preferences", "sft"], ["preferences"], ["references"], []]
    assert sum(map(bool, leaked.values())) == 3
    (tmp_path / "sft.jsonl").unlink()
    labelled_rows(args)
    assert f"{tmp_path / 'sft.jsonl'} no longer exists" in capsys.readouterr().err


def test_a_row_is_in_the_part_in_which_step_3_had_it_whatever_the_file_and_the_seed(tmp_path: Path) -> None:
    args = argparse.Namespace(run=tmp_path, labelled=ROOT / "data/labelled.jsonl", seed=0)
    parts = {row["response"]: row["part"] for row in labelled_rows(args)}
    (tmp_path / "03_summary.json").write_text(json.dumps({"settings": {"labelled": str(args.labelled), "seed": 0}}))
    args.labelled, args.seed = tmp_path / "again.jsonl", 1
    write(args.labelled, [row | {"note": "in another file"} for row in lines(ROOT / "data/labelled.jsonl")[::-1]])
    assert {row["response"]: row["part"] for row in labelled_rows(args)} == parts


# ---- people ---------------------------------------------------------------------------------------------------------


def test_alpha_is_krippendorffs_own_example() -> None:
    """Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, part C."""
    table = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
        [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
    ]
    ratings = [(f"rater {r}", f"{i:02}", v) for r, row in enumerate(table) for i, v in enumerate(row) if v]
    assert alpha(ratings, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert alpha(ratings, "ordinal") == pytest.approx(0.815, abs=5e-4)
    assert alpha([r for r in ratings if r[0] == "rater 0"], "nominal") is None
    assert alpha([("a", "1", 2), ("b", "1", 2)], "nominal") is None


def rating(row: dict, rater: str, grade: int, time: int = 0, **changed) -> dict:
    return {"id": rating_id(row), "rater": rater, "time": time, "grades": dict.fromkeys(WEIGHTS, grade) | changed}


def test_ratings_are_joined_by_id_and_half_finished_ones_left_out(tmp_path: Path) -> None:
    rows = []
    for name in ("a", "b"):
        rows += [greeting(name, n, f"{name}祝{n}", 1) | {"judge": n % 2} for n in range(3)]
    saved = []
    for row in rows[:5]:
        saved += [rating(row, who, 3 if row["policy"] == "a" else 1) for who in ("甲", "乙")]
    saved.append(rating(rows[5], "甲", 2, culture=None))
    pair = {"id": "p", "one": rating_id(rows[0]), "other": rating_id(rows[3])}
    saved += [pair | {"rater": "甲", "better": "one"}, pair | {"rater": "乙", "better": "tie"}]
    write(tmp_path / "first.jsonl", saved[::2])
    write(tmp_path / "second.jsonl", saved[1::2])
    args = SimpleNamespace(annotations=[tmp_path / "first.jsonl", tmp_path / "second.jsonl"], run=tmp_path)
    ratings = read_ratings(args, rows)
    add_human_scores(rows, ratings)
    assert [row.get("human_excellent") for row in rows] == [1, 1, 1, 0, 0, None]
    seen = [labelled(n, n % 2, "字" * (20 + n % 5), "reflect") for n in range(40)]
    compared = [{"one": rows[3]["id"], "other": rows[0]["id"], "outcome": 0.0}]
    people = people_figures(ratings, rows, compared, seen, ["a", "b"])
    assert (people["raters"], people["ratings"], people["pairs"], people["half_finished"]) == (2, 10, 2, 1)
    assert people["alpha"]["excellent"] == 1.0 and people["alpha"]["language"] == 1.0
    assert people["pairs_agree"]["value"] == 0.5  # the automatic comparison said a, as 甲 did
    assert people["evaluators"]["rubric"]["n"] == 5 and "null: length" in people["evaluators"]
    assert people["evaluators"]["rubric"]["accuracy"]["value"] == 0.6 and people["evaluators"]["judge"]["n"] == 5
    assert people["wins"]["a"]["b"]["value"] == 0.75


def read_saved(tmp_path: Path, rows: list[dict], *files: list[dict]) -> list:
    """The ratings in files of these lines."""
    paths = [tmp_path / f"saved_{number}.jsonl" for number in range(len(files))]
    for path, saved in zip(paths, files, strict=True):
        write(path, saved)
    return read_ratings(SimpleNamespace(annotations=paths, run=tmp_path), rows)


def test_ratings_of_greetings_that_are_gone_do_not_count_and_those_of_another_run_are_refused(
    tmp_path: Path, capsys
) -> None:
    rows = [greeting("a", n, f"祝{n}", 1) for n in range(2)]
    saved = [rating(row, "甲", 3) for row in rows]
    gone = saved[1] | {"id": "nobody"}
    pair = {"id": "p", "rater": "甲", "one": rating_id(rows[0]), "other": "nobody", "better": "one"}
    assert [r.id for r in read_saved(tmp_path, rows, [saved[0], gone, pair])] == [rows[0]["id"]]
    assert "saved_0.jsonl: this run has not the greetings of 2 ratings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        read_saved(tmp_path, rows, saved, [gone, pair])
    assert f"{tmp_path / 'saved_1.jsonl'}: rated on the page of another run" in capsys.readouterr().err


def test_of_two_saves_the_newer_rating_counts_once_in_whatever_order_they_are_named(tmp_path: Path) -> None:
    rows = [greeting("a", 0, "祝一", 1), greeting("b", 0, "祝二", 1)]
    old, new = rating(rows[0], "甲", 1, time=1), rating(rows[0], "甲", 3, time=2)
    begun = rating(rows[0], "甲", 2, time=3, culture=None)  # elsewhere, and never finished
    other = rating(rows[0], "乙", 2, time=9)
    for files in ([old], [new, begun], [other]), ([begun, new], [other, old]), ([other], [new], [old, begun]):
        grades = {r.rater: r.grades["culture"] for r in read_saved(tmp_path, rows, *files)}
        assert grades == {"甲": 3, "乙": 2}


def test_a_rating_holds_for_its_text_whatever_is_added_and_for_no_other_text(tmp_path: Path) -> None:
    rows = [greeting(name, n, f"{name}祝{n}", 1) for name in ("a", "b") for n in range(3)]
    args = SimpleNamespace(annotate=10)
    before = rating_page(args, rows, ["q0", "q1", "q2"])
    # A third policy, a query before all others, and other ids everywhere; one text is written anew.
    later = [greeting(name, n, f"{name}祝{n}", 1) for name in ("c", "a", "b") for n in range(4)]
    for row in later:
        row |= {"id": f"new {row['id']}", "query_id": f"new {row['query_id']}"}
    later[4]["response"] = "另写一句"  # a, 0
    after = rating_page(args, later, ["new q3", "new q2", "new q1", "new q0"])
    shown = {item["id"]: item["response"] for item in after["greetings"]}
    for item in before["greetings"]:
        assert shown.get(item["id"], "a祝0") == item["response"]
    saved = [rating(row, "甲", 2) for row in rows]
    texts = {row["id"]: row["response"] for row in later}
    assert [texts[r.id] for r in read_saved(tmp_path, later, saved)] == [row["response"] for row in rows[1:]]


def test_the_rating_page_is_blind_and_shuffled() -> None:
    rows = []
    for number, name in enumerate(("base", "grpo_rm")):
        rows += [greeting(name, n, f"祝{number}{n}", 1) | {"id": f"{number}{n}"} for n in range(20)]
    page = rating_page(SimpleNamespace(annotate=10), rows, [f"q{n}" for n in range(20)])
    assert len(page["greetings"]) == 20 and len(page["pairs"]) == 10
    assert "base" not in json.dumps(page) and "grpo" not in json.dumps(page)
    assert {pair["texts"][0][1] for pair in page["pairs"]} == {"0", "1"}  # neither policy is always first
    order = [row["response"][1] for row in page["greetings"]]
    assert order != sorted(order)


@pytest.mark.parametrize(("policy", "said"), [("tiny", "of two million parameters"), ("other", "a pretrained model")])
def test_both_reports_say_who_wrote_and_who_judged(run: Path, tmp_path: Path, policy: str, said: str) -> None:
    args = argparse.Namespace(policy=f"{ROOT}/outputs/{policy}/model", offline=True, graded=False, run=tmp_path)
    args.eval_model = args.eval_base_url = None
    figures = json.loads((run / "05_summary.json").read_text(encoding="utf-8"))
    write_pages(args, figures, lines(run / "scores.jsonl"), {"greetings": [], "pairs": []})
    for name in ("report.md", "report.html"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        assert said in page and page.count("the stand-in") == 1


def test_the_finding_begins_with_the_reader_where_the_rubric_is_no_evidence(run: Path) -> None:
    summary = json.loads((run / "05_summary.json").read_text(encoding="utf-8"))
    read = {"n": 40, "shared": {"value": 0.25, "lo": 0.1, "hi": 0.4, "n": 24}}
    for standing, begins in (("no evidence", "A careful reader"), ("evidence", "On "), ("unknown", "On ")):
        said = finding(summary | {"readings": {"rubric": read | {"standing": standing}}})
        assert said.startswith(begins) and ("25%" in said) == (standing != "unknown"), said
