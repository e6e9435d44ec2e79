"""Evaluators evaluated: labelled rows, which of them leaked, and how well each evaluator agrees with the labels."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from common import records, run_folder, stats
from common.signs import signs

NAMES = {"excellent": "rubric", "likely": "likelihood"}  # of evaluators whose column has another name
NEAR = 1  # characters by which a good and a bad greeting may differ where lengths are balanced


# ---- labelled rows and leaks ----------------------------------------------------------------------------------------


def labelled_rows(args: argparse.Namespace) -> list[dict]:
    """The labelled greetings, with `part` (step 3 has not looked at `test`) and `leaked`: where the text was learnt."""
    labelled = records.read(args.labelled, records.Labelled)
    # Step 3's seed alone decides which part a query is in, also where it was given another file than this one.
    seed = run_folder.read_summary(args.run, "03_summary").get("settings", {}).get("seed", args.seed)
    learnt = training_texts(args.run)
    rows = []
    for part, greetings in records.split_labelled(labelled, seed).items():
        for greeting in greetings:
            leaked = [name for name, texts in learnt.items() if greeting.response in texts]
            rows.append(greeting.model_dump() | {"part": part, "leaked": leaked})
    return rows


def training_texts(run: Path) -> dict[str, set[str]]:
    """The texts that this run has learnt from, by source: an evaluator's verdict on one of them proves little."""
    texts: dict[str, set[str]] = {"preferences": set()}
    for pair in _inputs_of(run, "02_summary", "preferences", records.Preference):
        texts["preferences"].update(pair.texts[1:])
    demonstrations = _inputs_of(run, "04_summary_none", "sft", records.Demonstration)
    texts["sft"] = {row.completion[0]["content"] for row in demonstrations}
    references = _inputs_of(run, "01_summary", "references", records.Reference)
    texts["references"] = {reference.response for reference in references}
    return texts


def _inputs_of(run: Path, summary: str, flag: str, kind: type[records.R]) -> list[records.R]:
    """The records of the file that a step was given with this flag; none where it has not run, or the file is gone."""
    path = run_folder.read_summary(run, summary).get("settings", {}).get(flag)
    path = path and run_folder.ROOT / path  # in this checkout, if it was in the checkout, which may have been moved
    if path and not path.is_file():
        print(f"05: {path} no longer exists, so labelled rows copied from it cannot be flagged", file=sys.stderr)
        return []
    return records.read(path, kind, unique=False) if path else []


def labelled_pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """(good, bad) labelled greetings for one query."""
    pairs = []
    for good in stats.where(rows, "label", 1):
        for bad in stats.where(rows, "label", 0):
            if bad["query"] == good["query"]:
                pairs.append((good, bad))
    return pairs


def comparison(one: dict, other: dict) -> dict:
    """A row of comparisons.jsonl, before its outcome is known; two policies are `a` and `b`, labelled rows are not."""
    row = {"query_id": one.get("query_id"), "one": one["id"], "other": other["id"]}
    row |= {"longer_by": len(one["response"]) - len(other["response"]), "outcome": None, "same": None}
    if "policy" in one:
        row |= {"a": one["policy"], "b": other["policy"], "query": one["query"]}
    return row


# ---- agreement ------------------------------------------------------------------------------------------------------


def verdicts_on(test: list[dict], labelled: list[dict]) -> dict[str, list[int | None]]:
    """What every evaluator, and both null baselines, say of some rows.

    Scores are cut where that is best on the labelled rows that step 3 has looked at; null baselines are fitted to them.
    """
    seen = [row for row in labelled if row["part"] != "test"]
    verdicts = {}
    for column in ("excellent", "judge", "seed_judge", "agents", "likely"):  # 1 or 0
        column_verdicts = stats.column(test, column)
        if set(column_verdicts) != {None}:
            verdicts[NAMES.get(column, column)] = column_verdicts
    if "likelihood" in verdicts:  # which accepts nothing that shows a sign of a spoilt text
        verdicts["null: no sign"] = [int(not signs(row["query"], row["response"])) for row in test]
    labels = stats.column(seen, "label")
    if "reward_model" in test[0] and "reward_model" in seen[0]:
        scores = stats.column(seen, "reward_model")
        threshold = stats.best_threshold(scores, labels, sorted(scores))
        verdicts["reward_model"] = [int(row["reward_model"] >= threshold) for row in test]
    texts, unseen = stats.column(seen, "response"), stats.column(test, "response")
    for name, null_verdicts in stats.null_verdicts(texts, labels, unseen).items():
        verdicts[f"null: {name}"] = null_verdicts
    return verdicts


def balanced(rows: list[dict]) -> list[dict]:
    """As many good as bad rows, each good one followed by a bad one at most NEAR characters longer or shorter."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    good, bad = stats.where(rows, "label", 1), stats.where(rows, "label", 0)
    lengths = [[len(row["response"]) for row in side] for side in (good, bad)]
    gaps = np.abs(np.subtract.outer(*lengths))
    matched = []
    for i, j in zip(*linear_sum_assignment(gaps > NEAR), strict=True):  # as many near pairs as there can be
        if gaps[i, j] <= NEAR:
            matched += [good[i], bad[j]]
    return matched


def agreement_table(rows: list[dict]) -> dict[str, dict]:
    """Evaluator -> its agreement with the labels of these rows, which carry `verdicts`; `good` are labelled so."""
    if not rows:
        return {}
    labels, queries = stats.column(rows, "label"), stats.column(rows, "query")
    table = {}
    for name in rows[0]["verdicts"]:
        table[name] = stats.agreement(labels, [row["verdicts"][name] for row in rows], queries)
        table[name]["good"] = sum(labels)
    return table


def evaluate_evaluators(labelled: list[dict], comparisons: list[dict]) -> dict:
    """Agreement of every evaluator with the labels that step 3 has not looked at.

    The main figures are on clean rows, whose texts were in no training data. Then come those of them that are balanced
    by label and length, and separately the rows that leaked. Comparisons of labelled pairs have no "query".
    """
    test = stats.where(labelled, "part", "test")
    verdicts = verdicts_on(test, labelled)
    clean, leaked, leaks = [], [], Counter()
    for number, row in enumerate(test):
        row = row | {"verdicts": {name: of_rows[number] for name, of_rows in verdicts.items()}}
        (leaked if row["leaked"] else clean).append(row)
        leaks.update(row["leaked"])

    clean_ids = set(stats.column(clean, "id"))
    outcomes, longer_is_good = [], []
    for pair in comparisons:
        if "query" in pair or pair["one"] not in clean_ids or pair["other"] not in clean_ids:
            continue
        if pair["outcome"] is not None:
            outcomes.append(pair["outcome"])
        if pair["longer_by"]:  # `one` is the good row
            longer_is_good.append(pair["longer_by"] > 0)
    pairs = {"pairwise": stats.rate(sum(outcomes), len(outcomes))}
    pairs["null: the longer"] = stats.rate(sum(longer_is_good), len(longer_is_good))
    return {
        "evaluators": agreement_table(clean),
        "evaluators_at_equal_length": agreement_table(balanced(clean)),
        "evaluators_on_leaked_rows": agreement_table(leaked),
        "evaluators_on_all_rows": agreement_table(clean + leaked) if leaked else {},
        "leaked": {**leaks, "rows": len(leaked)},
        "labelled_test_rows": len(test),
        "labelled_pairs": pairs,
    }
