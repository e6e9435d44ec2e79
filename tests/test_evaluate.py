"""Step 5's figures against figures worked out by hand or by scikit-learn, and its ways to go wrong."""

import argparse
import asyncio
import importlib
import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, lines, run_script
from endpoint import chat, critic, endpoint, settings, status

from common.answers import WEIGHTS, weighted_mean
from common.client import Client
from common.greetings import Policy
from common.records import write
from common.report.cost import cost_figures
from common.report.evaluators import NEAR, balanced, evaluate_evaluators, labelled_rows
from common.report.figures import length_bands, policy_figures
from common.report.people import alpha, fingerprint, join_people, rating_page, read_ratings
from common.stats import bootstrap, excellence_at_equal_length, mean_of, paired, wins_of
from common.store import Store
from common.texts import diversity, runs_of_12, self_bleu

step5 = importlib.import_module("05_evaluate")


def greeting(policy: str, n: int, text: str, excellent: int | None = None, sample: int = 0) -> dict:
    row = {"id": f"{policy}{n}.{sample}", "policy": policy, "query_id": f"q{n}", "query": f"祝福{n}", "response": text}
    return row | {"sample": sample, "excellent": excellent}


# ---- figures --------------------------------------------------------------------------------------------------------


def test_the_mean_is_over_queries_and_its_interval_is_the_percentile_bootstrap() -> None:
    from scipy import stats

    rows = [greeting("a", 0, "x", 1), greeting("a", 0, "x", 0, 1), greeting("a", 1, "x", 1), greeting("a", 2, "x", 0)]
    assert mean_of(rows, "excellent")["value"] == 0.5  # (0.5 + 1 + 0) / 3, not 2 / 4 by rows
    assert mean_of([*rows, greeting("a", 3, "x", 1)], "excellent")["value"] == 0.625
    values = np.random.default_rng(1).normal(2, 1, 200)
    found, known = bootstrap(values), stats.bootstrap([values], np.mean, method="percentile", rng=0)
    assert found["value"] == round(values.mean(), 4) and found["n"] == 200
    assert found["lo"] == pytest.approx(known.confidence_interval.low, abs=0.02)
    assert found["hi"] == pytest.approx(known.confidence_interval.high, abs=0.02)


def test_a_rate_over_few_rows_is_marked_incomplete() -> None:
    rows = [greeting("a", n, "x", 1 if n < 7 else None) for n in range(10)]
    found = mean_of(rows, "excellent")
    assert found["value"] == 1.0 and found["n"] == 7 and found["scored"] == 0.7 and found["incomplete"]
    assert "incomplete" not in mean_of(rows[:8], "excellent")
    assert mean_of(rows, "judge") == {"value": None, "lo": None, "hi": None, "n": 0, "scored": 0.0}


def test_a_difference_is_paired_and_called_noise_where_it_is() -> None:
    base = {f"q{n}": float(n) for n in range(50)}
    gain = paired({q: v + 0.1 for q, v in base.items()} | {"other": 99.0}, base)
    assert gain["value"] == gain["lo"] == gain["hi"] == 0.1 and gain["n"] == 50 and gain["words"] == "more than noise"
    rng = random.Random(0)
    assert paired({q: v + rng.gauss(0, 1) for q, v in base.items()}, base)["words"] == "inside noise"


def lengthy(rng: random.Random, policies: dict[str, int], worth) -> list[dict]:
    """Greetings of two lengths whose chance of excellence is worth(policy, length)."""
    return [
        greeting(name, n, "字" * length, int(rng.random() < worth(name, length)), sample)
        for name, usual in policies.items() for n in range(300) for sample in (0, 1)
        for length in [max(5, round(rng.gauss(usual, 12)))]
    ]  # fmt: skip


def test_length_alone_gives_no_advantage_at_equal_length() -> None:
    by_length = lambda name, length: 1 / (1 + math.exp(-(length - 40) / 8))  # noqa: E731
    rows = lengthy(random.Random(0), {"short": 35, "long": 50}, by_length)
    raw = {name: mean_of([r for r in rows if r["policy"] == name], "excellent") for name in ("short", "long")}
    fair = excellence_at_equal_length(rows, ["short", "long"])
    assert raw["long"]["value"] - raw["short"]["value"] > 0.3
    assert abs(fair["long"]["value"] - fair["short"]["value"]) < 0.05
    assert fair["long"]["lo"] < fair["short"]["value"] < fair["long"]["hi"]


def test_what_is_not_length_stays_at_equal_length() -> None:
    rows = lengthy(random.Random(0), {"bad": 50, "good": 35}, lambda name, length: 0.8 if name == "good" else 0.4)
    fair = excellence_at_equal_length(rows, ["bad", "good"])
    assert fair["good"]["value"] == pytest.approx(0.8, abs=0.05) and fair["bad"]["value"] == pytest.approx(
        0.4, abs=0.05
    )


def test_wins_by_length_alone_are_none_at_equal_length() -> None:
    rng, compared = random.Random(0), []
    for n in range(400):
        gap = round(rng.gauss(12, 14))
        won = float(rng.random() < 1 / (1 + math.exp(-math.tanh(gap / 14) * 3)))
        compared.append(
            {"a": "long", "b": "short", "query_id": f"q{n}", "longer_by": gap, "outcome": won, "same": True}
        )
    wins = wins_of(compared, ["long", "short"])
    assert wins["judged"]["long"]["short"]["value"] > 0.65
    assert wins["judged"]["short"]["long"]["value"] == pytest.approx(1 - wins["judged"]["long"]["short"]["value"])
    assert abs(wins["at_equal_length"]["long"]["short"]["value"] - 0.5) < 0.07


def test_wins_count_ties_as_half_and_leave_failures_out() -> None:
    outcomes = [1.0, 0.5, 0.0, 1.0, None]
    compared = [
        {"a": "x", "b": "y", "query_id": f"q{n}", "longer_by": 0, "outcome": o, "same": None if o is None else o != 0.5}
        for n, o in enumerate(outcomes)
    ]  # fmt: skip
    wins = wins_of(compared, ["x", "y"])
    assert wins["judged"]["x"]["y"]["value"] == 0.625 and wins["failed"] == 1 and wins["compared"] == 5
    assert wins["swap_consistency"]["value"] == 0.75 and wins["swap_consistency"]["n"] == 4


def test_excellence_within_length_bands_by_hand() -> None:
    rows = [greeting("a", n, "字" * (10 + n), n % 2) for n in range(8)]
    bands = length_bands(rows, ["a"])
    assert [(b["from"], b["to"]) for b in bands] == [(10, 11), (12, 13), (14, 15), (16, 17)]
    assert [b["a"]["value"] for b in bands] == [0.5] * 4 and sum(b["a"]["n"] for b in bands) == 8


def plain_self_bleu(texts: list[str]) -> float:
    """BLEU-4 of each text against all others, written out."""
    scores = []
    for i, text in enumerate(texts):
        others, logs = [t for j, t in enumerate(texts) if j != i], 0.0
        for n in range(1, 5):
            grams = Counter(text[k : k + n] for k in range(len(text) - n + 1))
            most = {g: max(sum(t[k : k + n] == g for k in range(len(t))) for t in others) for g in grams}
            logs += math.log((sum(min(c, most[g]) for g, c in grams.items()) or 0.1) / max(1, sum(grams.values()))) / 4
        nearest = min((abs(len(t) - len(text)), len(t)) for t in others)[1]
        scores.append(math.exp(logs) * min(1.0, math.exp(1 - nearest / len(text))))
    return sum(scores) / len(scores)


def test_self_bleu_is_what_its_definition_gives() -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choice("春夏秋冬风花雪月") for _ in range(rng.randint(3, 20))) for _ in range(30)]
    assert self_bleu(texts) == pytest.approx(plain_self_bleu(texts))
    assert self_bleu(["平安喜乐万事顺"] * 3) == pytest.approx(1.0)
    # Two of four characters, one of three pairs, no triple or quadruple: (2/4 * 1/3 * 0.1/2 * 0.1/1) ** 0.25.
    assert self_bleu(["春夏秋冬", "春夏风花"]) == pytest.approx((2 / 4 * 1 / 3 * 0.1 / 2 * 0.1) ** 0.25)


def test_diversity_does_not_depend_on_how_much_was_written() -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("日月水火木金土天地人山石田禾", k=20)) for _ in range(400)]
    few, many = diversity(texts[:100], 2000), diversity(texts, 2000)
    assert few["distinct_2"] == pytest.approx(many["distinct_2"], rel=0.05)
    assert diversity(["春夏秋冬"], 4) == {"distinct_1": 1.0, "distinct_2": 1.0, "self_bleu": 0.0}
    assert diversity(["春春春春"], 4)["distinct_1"] == 0.25
    assert diversity(["春夏秋冬", "春夏秋冬"], 6)["distinct_1"] == round(4 / 6, 4)  # the second is cut at two


def test_policy_figures_by_hand() -> None:
    grades = dict.fromkeys(WEIGHTS, 2)
    texts = ["万事如意，祝你明天比今天更加快乐健康。", "祝你平安。"]
    rows = [greeting("a", n, text, 1) | {"grades": grades, "quality": 2.0} for n, text in enumerate(texts)]
    policy = Policy("a", "base", Path("run/policy_rm"))
    learnt = runs_of_12(["他说：祝你明天比今天更加快乐健康。"])
    found = policy_figures(rows, policy, 20, learnt, ["万事如意"])
    assert found["length"] == 12.0 and found["reward"] == "reward_model" and found["distinct_texts"] == 1.0
    assert found["cliches_per_100"] == round(100 / 24, 3) and found["copied_12"] == 0.5
    assert found["commonest_opening"][1] == 0.5 and found["dimensions"]["culture"] == 2
    assert weighted_mean({"language": 3, "creativity": 1, "emotion": 2, "culture": 2, "richness": 2}) == 2.0


def test_cost_is_the_sum_of_the_steps_and_equal_cost_takes_the_point_reached(tmp_path: Path) -> None:
    ledger = {"calls": 10, "input_tokens": 1_000_000, "output_tokens": 500_000}
    priced = {"seconds": 10, "ledger": ledger, "settings": {"price_in": 2.0, "price_out": 4.0}}
    for step, summary in {
        "01_summary": priced | {"candidates": 40, "pairs": 7}, "02_summary": {"seconds": 20},
        "03_summary": priced | {"seconds": 5, "parts": {"reflect": 8, "validation": 6, "test": 6}},
        "04_summary_none": {"seconds": 3}, "04_summary_rm": {"seconds": {"total": 100.0}, "completions": 80},
        "04_summary_judge": priced | {"seconds": {"total": 40.0}, "completions": 80},
    }.items():  # fmt: skip
        (tmp_path / f"{step}.json").write_text(json.dumps(summary))
    rows = [greeting(name, n, "x", int(n < k)) for name, k in
            {"base": 2, "sft": 4, "grpo_rm": 6, "grpo_judge": 8}.items() for n in range(10)]  # fmt: skip
    graded = [{"route": "A", "at": 0.25, "query_id": f"q{n}", "excellent": int(n < 5)} for n in range(10)]
    cost = cost_figures(tmp_path, rows, graded)
    assert cost["totals"]["A"]["in all"] == {
        "completions": 120,
        "calls": 10,
        "tokens": 1_500_000,
        "seconds": 133,
        "money": 4.0,
    }
    assert cost["totals"]["B"]["in all"]["money"] == 12.0 and cost["totals"]["B"]["in all"]["seconds"] == 58
    assert cost["totals"]["B"]["with SFT rows given"]["seconds"] == 45
    assert cost["totals"]["A"]["with SFT rows given"]["seconds"] == 130
    equal = {row["unit"]: row for row in cost["equal"]}
    assert equal["seconds"]["cost"] == 58 and equal["seconds"]["B"]["at"] == "grpo_judge"
    assert (
        equal["seconds"]["A"]["at"] == "25% of GRPO" and equal["seconds"]["A"]["excellence"]["value"] == 0.5
    )  # 10 + 3 + 20 + 25
    assert equal["tokens"]["A"]["at"] == "grpo_rm" and equal["tokens"]["B"]["at"] == "sft"
    assert cost["labels"] == {"A": 0, "B": 14} and cost["pairs"] == 7


# ---- evaluators -----------------------------------------------------------------------------------------------------


def asked(reply, one: str, other: str, tmp_path: Path) -> dict:
    async def ask() -> dict:
        with endpoint(reply) as server:
            async with Client(settings(server.url, attempts=1), tmp_path) as client:
                pair = ({"id": i, "query": "祝福", "response": text} for i, text in enumerate((one, other)))
                return await step5.compare(client, *pair, failures) | {"asked": len(server.asked)}

    failures: Counter = Counter()
    return asyncio.run(ask()) | {"failures": failures}


def prefers(text: str):
    def reply(request: dict):
        shown = json.loads(request["messages"][-1]["content"].split("<data>")[1].split("</data>")[0])
        return chat(json.dumps({"reason": "r", "better": "A" if shown["A"] == text else "B"}))

    return reply


def test_both_orders_are_asked_and_a_verdict_that_flips_is_a_tie(tmp_path: Path) -> None:
    first = chat('{"reason": "r", "better": "A"}')
    flips = asked(first, "甲", "乙", tmp_path / "1")
    assert (flips["outcome"], flips["same"], flips["asked"]) == (0.5, False, 2)
    holds = asked(prefers("乙"), "甲", "乙", tmp_path / "2")
    assert (holds["outcome"], holds["same"], holds["asked"]) == (0.0, True, 2)
    ties = asked(chat('{"reason": "r", "better": "tie"}'), "甲", "乙", tmp_path / "3")
    assert (ties["outcome"], ties["same"]) == (0.5, True)
    same = asked(first, "甲", "甲", tmp_path / "4")
    assert (same["outcome"], same["same"], same["asked"]) == (0.5, None, 0)
    fails = asked(chat('{"better": "C"}'), "甲", "乙", tmp_path / "5")
    assert fails["outcome"] is None and fails["failures"].total() == 1


def labelled(n: int, label: int, text: str, part: str, **more) -> dict:
    row = {"id": f"{n}.{label}", "query": f"q{n}", "response": text, "label": label, "part": part, "leaked": []}
    return row | more


def test_agreement_is_scikit_learns_and_leaked_rows_stand_apart() -> None:
    from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, precision_score, recall_score

    rng, rows = random.Random(0), []
    for n in range(120):
        for label in (0, 1):
            part = "test" if n < 60 else "reflect"
            said = label if rng.random() < 0.8 else 1 - label
            text = ("好" if label else "坏") * rng.randint(10, 30)
            row = labelled(n, label, text, part, excellent=said, judge=None if n % 4 == 0 else said)
            row |= {"leaked": ["sft"]} if n < 10 else {}
            rows.append(row | {"reward_model": label + rng.gauss(0, 0.5)})
    found = evaluate_evaluators(rows, [])
    clean = [r for r in rows if r["part"] == "test" and not r["leaked"]]
    labels, said = [r["label"] for r in clean], [r["excellent"] for r in clean]
    rubric = found["evaluators"]["rubric"]
    assert rubric["n"] == 100 and found["leaked"] == {"sft": 20, "rows": 20} and found["labelled_test_rows"] == 120
    for name, score in (
        ("kappa", cohen_kappa_score),
        ("f1", f1_score),
        ("precision", precision_score),
        ("recall", recall_score),
    ):
        assert rubric[name] == pytest.approx(score(labels, said), abs=1e-4), name
    assert rubric["accuracy"]["value"] == accuracy_score(labels, said)
    assert found["evaluators_on_leaked_rows"]["rubric"]["n"] == 20
    assert found["evaluators"]["judge"]["n"] + found["evaluators"]["judge"]["failed"] == 100
    assert found["evaluators"]["null: n-grams"]["accuracy"]["value"] == 1.0  # as the texts were made
    assert found["evaluators"]["reward_model"]["accuracy"]["value"] > 0.75


def test_length_tells_nothing_where_lengths_are_balanced() -> None:
    rng = random.Random(0)
    rows = [labelled(n, label, "字" * rng.randint(*((28, 60) if label else (10, 40))), part)
            for n in range(1000) for label in (0, 1) for part in ["test" if n < 500 else "reflect"]]  # fmt: skip
    found = evaluate_evaluators(rows, [])
    even = found["evaluators_at_equal_length"]["null: length"]
    assert found["evaluators"]["null: length"]["kappa"] > 0.5 and abs(even["kappa"]) < 0.1 and even["n"] >= 200
    test = [r for r in rows if r["part"] == "test"]
    kept = [test[i] for i in balanced(test)]
    assert sum(r["label"] for r in kept) * 2 == len(kept) == even["n"]
    for good, bad in zip(kept[::2], kept[1::2], strict=True):
        assert abs(len(good["response"]) - len(bad["response"])) <= NEAR


def test_rows_that_the_run_learnt_from_are_found_where_they_stand(tmp_path: Path) -> None:
    rows = lines(ROOT / "data/labelled.jsonl")
    texts = [r["response"] for r in rows[:4]]
    user = [{"role": "user", "content": "x"}]
    said = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    write(tmp_path / "pairs.jsonl", [{"prompt": user, "chosen": said(texts[0]), "rejected": said(texts[1])}])
    write(tmp_path / "sft.jsonl", [{"prompt": user, "completion": said(texts[0])}])
    write(tmp_path / "references.jsonl", [{"query": "q", "response": texts[2]}])
    for step, name, file in (
        ("02_summary", "preferences", "pairs"),
        ("04_summary_none", "sft", "sft"),
        ("01_summary", "references", "references"),
    ):
        (tmp_path / f"{step}.json").write_text(json.dumps({"settings": {name: str(tmp_path / f"{file}.jsonl")}}))
    args = argparse.Namespace(run=tmp_path, labelled=ROOT / "data/labelled.jsonl", seed=0)
    found = {r["response"]: r["leaked"] for r in labelled_rows(args)}
    assert [found[text] for text in texts] == [["preferences", "sft"], ["preferences"], ["references"], []]
    assert sum(map(bool, found.values())) == 3
    # Step 3 has split other rows: those that it has looked at leaked, those of its test part did not.
    (tmp_path / "03_summary.json").write_text(json.dumps({"settings": {"labelled": str(args.labelled), "seed": 0}}))
    args.labelled = tmp_path / "again.jsonl"
    write(args.labelled, [r | {"note": "the same rows in another file"} for r in rows])
    by_step_3 = [r for r in labelled_rows(args) if "labelled rows of step 3" in r["leaked"]]
    assert {r["part"] for r in by_step_3} == {"reflect", "validation"} and len(by_step_3) > 300


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


def rating(row: dict, rater: str, run: str, grade: int, **changed) -> dict:
    return {"id": row["id"], "run": run, "rater": rater, "grades": dict.fromkeys(WEIGHTS, grade) | changed}


def test_ratings_are_joined_by_id_and_half_finished_ones_left_out(tmp_path: Path) -> None:
    rows = [greeting(name, n, f"{name}祝{n}", 1) | {"judge": n % 2} for name in ("a", "b") for n in range(3)]
    run = fingerprint(rows)
    saved = [rating(r, who, run, 3 if r["policy"] == "a" else 1) for r in rows[:5] for who in ("甲", "乙")]
    saved += [rating(rows[5], "甲", run, 2, culture=None)]
    pair = {"id": "p", "run": run, "one": rows[0]["id"], "other": rows[3]["id"]}
    saved += [pair | {"rater": "甲", "better": "one"}, pair | {"rater": "乙", "better": "tie"}]
    write(tmp_path / "first.jsonl", saved[::2])
    write(tmp_path / "second.jsonl", saved[1::2])
    args = SimpleNamespace(annotations=[tmp_path / "first.jsonl", tmp_path / "second.jsonl"], run=tmp_path)
    given = [labelled(n, n % 2, "字" * (20 + n % 5), "reflect") for n in range(40)]
    compared = [{"one": rows[3]["id"], "other": rows[0]["id"], "outcome": 0.0}]
    people = join_people(read_ratings(args, rows), rows, compared, given, ["a", "b"])
    assert (people["raters"], people["ratings"], people["pairs"], people["half_finished"]) == (2, 10, 2, 1)
    assert people["alpha"]["excellent"] == 1.0 and people["alpha"]["language"] == 1.0
    assert [r.get("human_excellent") for r in rows] == [1, 1, 1, 0, 0, None]
    assert people["pairs_agree"]["value"] == 0.5  # the automatic comparison said a, as 甲 did
    assert people["evaluators"]["rubric"]["n"] == 5 and "null: length" in people["evaluators"]
    assert people["evaluators"]["rubric"]["accuracy"]["value"] == 0.6 and people["evaluators"]["judge"]["n"] == 5


@pytest.mark.parametrize("spoilt", [{"run": "another"}, {"id": "nobody"}])
def test_ratings_of_another_run_are_named(tmp_path: Path, capsys, spoilt: dict) -> None:
    rows = [greeting("a", n, f"祝{n}", 1) for n in range(2)]
    saved = [rating(r, "甲", fingerprint(rows), 3) for r in rows]
    write(tmp_path / "saved.jsonl", [saved[0], saved[1] | spoilt])
    with pytest.raises(SystemExit):
        read_ratings(SimpleNamespace(annotations=[tmp_path / "saved.jsonl"], run=tmp_path), rows)
    assert f"{tmp_path / 'saved.jsonl'}:2: rated on the page of another run" in capsys.readouterr().err


def test_the_rating_page_is_blind_and_shuffled() -> None:
    rows = [
        greeting(name, n, f"祝{i}{n}", 1) | {"id": f"{i}{n}"}
        for i, name in enumerate(("base", "grpo_rm"))
        for n in range(20)
    ]
    args = SimpleNamespace(seed=0, annotate=10)
    page = rating_page(args, rows, [f"q{n}" for n in range(20)])
    assert len(page["greetings"]) == 20 and len(page["pairs"]) == 10
    assert "base" not in json.dumps(page) and "grpo" not in json.dumps(page)
    first = [p["one"][0] for p in page["pairs"]]
    assert {"0", "1"} == set(first)  # neither policy is always first
    order = [g["id"][0] for g in page["greetings"]]
    assert order != sorted(order)


# ---- as a user runs it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--policies", "nameless"], "'nameless' is not NAME=PATH"),
        (["--policies", "base=outputs/x", "base=outputs/y"], "two policies are named base"),
        (["--api", "big=model"], "'big=model' is not NAME=MODEL@URL"),
        (["--api", "big=model@nowhere"], "no address such as"),
        (["--annotations", "missing.jsonl"], "missing.jsonl does not exist"),
    ],
)
def test_bad_flags_end_in_one_line(tmp_path: Path, flags: list[str], told: str) -> None:
    done = run_script("05_evaluate.py", "--offline", "--run", tmp_path / "run", *flags)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and told in errors[0], done.stderr


def test_an_endpoint_that_fails_is_counted_and_asked_again_without_writing_anew(tmp_path: Path) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text("\n".join((ROOT / "data/queries_heldout.jsonl").read_text().splitlines()[:6]) + "\n")
    rows = lines(ROOT / "data/labelled.jsonl")[:240]
    write(tmp_path / "labelled.jsonl", rows)
    broken = True

    def reply(request: dict):
        if "response_format" not in request:
            return chat("祝您节日快乐，桃李满园。")
        text = request["messages"][-1]["content"]
        return (
            status(400)
            if broken and request["response_format"]["json_schema"]["name"] == "rubric" and sum(map(ord, text)) % 3 == 0
            else critic(request)
        )

    run = tmp_path / "run"
    with endpoint(reply) as server:
        flags = [
            "--offline",
            "--run",
            run,
            "--queries",
            queries,
            "--labelled",
            tmp_path / "labelled.jsonl",
            "--attempts",
            1,
        ]
        flags += [
            "--api",
            f"big=large-model@{server.url}",
            "--eval-model",
            "other-judge",
            "--eval-base-url",
            server.url,
        ]
        flags += ["--policies", f"lost={tmp_path / 'lost'}", "--samples", 2]
        done = run_script("05_evaluate.py", *flags)
        assert done.returncode == 3 and "rubric: HTTP 400" in done.stdout, done.stdout + done.stderr
        for reward in ("none", "rm", "judge"):
            assert f"make it with: python 04_grpo.py --reward {reward} --run {run}" in done.stderr
        assert f"{tmp_path / 'lost'} holds no model and no adapter: going on without lost" in done.stderr
        summary, report = json.loads((run / "05_summary.json").read_text()), (run / "report.md").read_text()
        assert set(summary["policies"]) == {"base", "big"} and summary["policies"]["big"]["greetings"] == 12
        failed = summary["evaluators"]["rubric"]["failed"]
        assert failed > 0 and " incomplete" in report and "other-judge, named for evaluation alone" in report
        written = {p.name: p.read_bytes() for p in (run / "generations").iterdir()}
        assert {r["response"] for r in lines(run / "generations/big.jsonl")} == {"祝您节日快乐，桃李满园。"}

        broken, before = False, len(server.asked)
        done = run_script("05_evaluate.py", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        again = server.asked[before:]
        assert {r["response_format"]["json_schema"]["name"] for r in again} == {"rubric"}
        assert json.loads((run / "05_summary.json").read_text())["evaluators"]["rubric"]["failed"] == 0
        assert written == {p.name: p.read_bytes() for p in (run / "generations").iterdir()}

        # Other labelled greetings: what was made is not made again.
        write(tmp_path / "labelled.jsonl", rows[:-2])
        refused = run_script("05_evaluate.py", *flags)
        assert refused.returncode == 2 and "labelled=" in refused.stderr and "--redo" in refused.stderr
        # A torn line, as a kill leaves it, and a greeting short: only that one is written.
        torn = run / "generations/big.jsonl"
        torn.write_bytes(written["big.jsonl"][:-30])
        stage = run / "stages/05_greetings_big.json"
        stage.write_text(stage.read_text().replace('"done": true', '"done": false'))
        before = len(server.asked)
        done = run_script("05_evaluate.py", *flags, "--redo")
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(server.asked) == before and torn.read_bytes() == written["big.jsonl"]  # from the answers kept
        assert (run / "generations/base.jsonl").read_bytes() == written["base.jsonl"]
    shutil.rmtree(run)


def test_ablations_run_the_steps_without_each_part_and_compare_on_the_same_rows(tmp_path: Path, monkeypatch) -> None:
    from common.records import Candidate

    commands = []

    def pretend(command: list[str]) -> None:
        """What the steps would leave: the whole agents are always right, those without debate accept everything."""
        folder = Path(command[command.index("--run") + 1])
        commands.append((Path(command[1]).name, folder.name, [flag for flag in command if flag.startswith("--no-")]))
        if "01_" in command[1]:
            rows = [Candidate(query=r["query"], response=r["response"]) for r in lines(folder / "greetings.jsonl")]
            verdict = lambda row: 1 if "--no-debate" in command else known[row.query, row.response]  # noqa: E731
            write(folder / "judgements.jsonl", [row.model_dump() | {"label": verdict(row)} for row in rows])
        else:
            rule = "短的不合格" if "--no-reflection" in command else "写到一半就中断的不合格；不堆砌套话"
            write(folder / "principles.jsonl", [{"id": "0", "principles": [rule], "accepted": True}])

    known = {(r["query"], r["response"]): r["label"] for r in lines(ROOT / "data/labelled.jsonl")}
    monkeypatch.setattr(step5, "run_step", pretend)
    monkeypatch.setattr("sys.argv", ["05", "--offline", "--run", str(tmp_path), "--ablations", "200"])
    found = {row["ablation"]: row for row in step5.ablate(step5.parse_args())}
    assert [flags for _, _, flags in commands] == [
        [], ["--no-retrieval"], ["--no-debate"], ["--no-reflect"],
        [], ["--no-adversary"], ["--no-reflection"], ["--no-acceptance"],
    ]  # fmt: skip
    assert len({folder for _, folder, _ in commands}) == 8  # none writes over another
    sample = lines(tmp_path / "ablations/labelled.jsonl")
    assert 200 <= len(sample) < 210 and found["agents, whole"]["n"] == len(sample)
    assert found["agents, whole"]["kappa"] == 1.0 and found["agents, without retrieval"]["difference"]["value"] == 0
    good = sum(r["label"] for r in sample) / len(sample)
    assert found["agents, without debate"]["accuracy"]["value"] == pytest.approx(good, abs=1e-4)
    assert found["agents, without debate"]["difference"]["words"] == "more than noise"
    assert found["principles, whole"]["n"] < len(sample) / 2  # the part that nothing was learnt from
    assert found["principles, without adversary"]["difference"]["words"] == "inside noise"
    assert found["principles, whole"]["kappa"] != found["principles, without reflection"]["kappa"]


def test_ask_prints_every_policys_answer(tmp_path: Path) -> None:
    with endpoint(chat("老师，节日快乐。")) as server:
        flags = ["--offline", "--run", tmp_path / "run", "--samples", 1, "--api", f"big=m@{server.url}"]
        done = run_script("05_evaluate.py", *flags, "--ask", "给班主任的教师节祝福")
    assert done.returncode == 0, done.stderr
    said = [line.split(maxsplit=1) for line in done.stdout.strip().splitlines()]
    assert said[0] == ["给班主任的教师节祝福"] and [line[0] for line in said[1:]] == ["base", "big"]
    assert said[2][1] == "老师，节日快乐。" and server.asked[0]["messages"][0]["content"].endswith(
        "给班主任的教师节祝福"
    )
    assert not (tmp_path / "run/generations.jsonl").exists()


def test_steps_that_are_run_again_get_the_prices_and_what_is_left_to_spend(tmp_path: Path, monkeypatch) -> None:
    argv = ["05", "--offline", "--run", str(tmp_path), "--budget", "100", "--price-in", "1000", "--price-out", "2000"]
    monkeypatch.setattr("sys.argv", argv)
    args = step5.parse_args()
    for folder, tokens in (
        (tmp_path, (10_000, 5_000)),
        (tmp_path / "ablations/other", (1_000, 0)),
        (tmp_path / "evaluators", (99, 99)),
    ):
        store = Store(folder / "answers.sqlite")
        store.end(store.begin("judge"), "judge", "ok", tokens)
    command = step5.step_command(args, "01_curate_preferences.py", tmp_path / "evaluators")
    given = {flag: command[command.index(flag) + 1] for flag in ("--price-in", "--price-out", "--budget")}
    assert float(given["--price-in"]) == 1000 and float(given["--price-out"]) == 2000
    assert float(given["--budget"]) == pytest.approx(
        100 - 10 - 10 - 1
    )  # what evaluators/ has cost step 1 counts itself
