"""Labelled rows, leaks, and how well every evaluator agrees with the labels."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from common.records import Demonstration, Labelled, Preference, Record, Reference, read, split_labelled
from common.run_folder import fail, file_hash, read_summary
from common.stats import agreement, null_verdicts, rate


def training_texts(args: argparse.Namespace) -> dict[str, set[str]]:
    """Texts that the run has learnt from, by where they stand: what an evaluator says of these proves little."""

    def source(step: str, flag: str, kind: type[Record]) -> list:
        path = read_summary(args.run, step).get("settings", {}).get(flag)
        if path and not Path(path).is_file():
            print(f"05: {path} is gone: which labelled rows stand in it is not known", file=sys.stderr)
            return []
        return read(path, kind, unique=False) if path else []

    pairs, third = source("02_summary", "preferences", Preference), source("03_summary", "labelled", Labelled)
    settings = read_summary(args.run, "03_summary").get("settings", {})
    same = third and file_hash(settings["labelled"]) == file_hash(args.labelled)
    parts = split_labelled(third, settings["seed"]) if third and not same else {}
    found = {
        "preferences": {text for pair in pairs for text in pair.texts[1:]},
        "sft": {d.completion[0]["content"] for d in source("04_summary_none", "sft", Demonstration)},
        "references": {r.response for r in source("01_summary", "references", Reference)},
        "labelled rows of step 3": {r.response for name, part in parts.items() if name != "test" for r in part},
    }
    return {name: texts for name, texts in found.items() if texts}


def labelled_rows(args: argparse.Namespace) -> list[dict]:
    """The labelled greetings, with `part` (step 3 has not looked at `test`) and `leaked`: where the text was learnt."""
    rows, third = read(args.labelled, Labelled), args.run / "stages" / "03_principles.json"
    if third.is_file():
        used = json.loads(third.read_text(encoding="utf-8"))["settings"]
        if used["labelled"] == file_hash(args.labelled) and used["seed"] != args.seed:
            fail(f"step 3 of {args.run} split --labelled with --seed {used['seed']}: use the same, or no row is unseen")
    learnt = training_texts(args)
    return [
        r.model_dump() | {"part": part, "leaked": [name for name, texts in learnt.items() if r.response in texts]}
        for part, records in split_labelled(rows, args.seed).items() for r in records
    ]  # fmt: skip


def labelled_pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """(good, bad) labelled greetings for one query."""
    return [(g, b) for g in rows if g["label"] == 1 for b in rows if b["label"] == 0 and b["query"] == g["query"]]


NEAR = 1  # characters by which a good and a bad greeting may differ where lengths are balanced


def verdicts_on(test: list[dict], seen: list[dict]) -> dict[str, list[int | None]]:
    """What every evaluator, and both null baselines, say of test rows.

    An evaluator that gives a score says "good" from the threshold that is best on the rows seen.
    """
    names = {"excellent": "rubric", "judge": "judge", "seed_judge": "seed_judge", "agents": "agents"}
    found = {
        name: [r.get(key) for r in test] for key, name in names.items() if any(r.get(key) is not None for r in test)
    }
    if "reward_model" in test[0] and "reward_model" in seen[0]:
        ranked = sorted(r["reward_model"] for r in seen)
        threshold = max(ranked, key=lambda t: sum((r["reward_model"] >= t) == r["label"] for r in seen))
        found["reward_model"] = [int(r["reward_model"] >= threshold) for r in test]
    nulls = null_verdicts(*([r[key] for r in seen] for key in ("response", "label")), [r["response"] for r in test])
    return found | {f"null: {name}": verdicts for name, verdicts in nulls.items()}


def balanced(test: list[dict]) -> list[int]:
    """Places of as many good as bad rows, each good one beside a bad one at most NEAR characters longer or shorter.

    Matching in order of length finds the most pairs there are.
    """
    places = sorted(range(len(test)), key=lambda i: len(test[i]["response"]))
    good, bad = ([i for i in places if test[i]["label"] == label] for label in (1, 0))
    kept = []
    while good and bad:
        gap = len(test[good[0]]["response"]) - len(test[bad[0]]["response"])
        if abs(gap) <= NEAR:
            kept += [good.pop(0), bad.pop(0)]
        else:
            (bad if gap > 0 else good).pop(0)
    return kept


def evaluate_evaluators(given: list[dict], comparisons: list[dict]) -> dict:
    """Agreement of every evaluator with the labels of the part that step 3 has not looked at: on rows that nothing has
    learnt from, on as many good as bad ones of equal length among these, and apart on rows that leaked."""
    seen, test = [r for r in given if r["part"] != "test"], [r for r in given if r["part"] == "test"]
    verdicts, clean = verdicts_on(test, seen), [i for i, r in enumerate(test) if not r["leaked"]]
    even = [clean[i] for i in balanced([test[i] for i in clean])]
    leaked = [i for i, r in enumerate(test) if r["leaked"]]

    def table(places: list[int]) -> dict[str, dict]:
        labels = [test[i]["label"] for i in places]
        found = (
            {name: agreement(labels, [said[i] for i in places]) for name, said in verdicts.items()} if places else {}
        )
        return {name: figures | {"good": sum(labels)} for name, figures in found.items()}

    fresh = {test[i]["id"] for i in clean}
    pairs = [c for c in comparisons if "query" not in c and c["one"] in fresh and c["other"] in fresh]
    heard = [c["outcome"] for c in pairs if c["outcome"] is not None]
    unequal = [c["longer_by"] > 0 for c in pairs if c["longer_by"]]
    return {
        "evaluators": table(clean), "evaluators_at_equal_length": table(even),
        "evaluators_on_leaked_rows": table(leaked), "evaluators_on_all_rows": table(clean + leaked) if leaked else {},
        "leaked": dict(Counter(name for r in test for name in r["leaked"])) | {"rows": len(leaked)},
        "labelled_test_rows": len(test),
        "labelled_pairs": {
            "pairwise": rate(sum(heard), len(heard)), "null: the longer": rate(sum(unequal), len(unequal))
        },
    }  # fmt: skip
