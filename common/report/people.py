"""People's ratings: the page they rate on, reading, agreement."""

import argparse
import random
from typing import Literal

from pydantic import Field

from common.answers import WEIGHTS, weighted_mean
from common.judge import EXCELLENT
from common.records import Record, read
from common.report.evaluators import verdicts_on
from common.run_folder import digest, fail
from common.stats import agreement, rate, wins_of


class Rating(Record):
    """A line that annotate.html saves: the grades of one greeting, or which of two is better; None is half-finished."""

    id: str = Field(min_length=1)
    run: str
    rater: str = Field(min_length=1)
    grades: dict[str, Literal[1, 2, 3] | None] | None = None
    one: str = ""
    other: str = ""
    better: Literal["one", "other", "tie"] | None = None

    @property
    def finished(self) -> bool:
        return self.better is not None if self.one else all((self.grades or {}).get(name) for name in WEIGHTS)


def fingerprint(rows: list[dict]) -> str:
    """Tells the greetings of one run from another's."""
    return digest(*sorted((r["id"], r["response"]) for r in rows))


def pairs_of_policies(rows: list[dict], queries: list[str]) -> list[tuple[dict, dict]]:
    """The first greetings of each two policies for each of these queries."""
    first = {(r["query_id"], r["policy"]): r for r in rows if r["sample"] == 0}
    names = list(dict.fromkeys(r["policy"] for r in rows))
    both = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return [(first[q, a], first[q, b]) for q in queries for a, b in both if (q, a) in first and (q, b) in first]


def rating_page(args: argparse.Namespace, rows: list[dict], queries: list[str]) -> dict:
    """What annotate.html shows: greetings without the names of their policies, in random order, and pairs of them."""
    rng, asked = random.Random(digest(args.seed, "annotate")), queries[: args.annotate]
    both = pairs_of_policies(rows, asked)
    pairs = [rng.choice([pair for pair in both if pair[0]["query_id"] == q] or [None]) for q in asked]
    single = [r for r in rows if r["sample"] == 0 and r["query_id"] in asked]
    shown = [rng.sample(pair, 2) for pair in pairs if pair and pair[0]["response"] != pair[1]["response"]]
    rng.shuffle(single)
    return {
        "run": fingerprint(rows),
        "greetings": [{key: r[key] for key in ("id", "query", "response")} for r in single],
        "pairs": [
            {"id": digest(a["id"], b["id"]), "query": a["query"], "one": a["id"], "other": b["id"],
             "texts": [a["response"], b["response"]]}
            for a, b in shown
        ],
    }  # fmt: skip


def read_ratings(args: argparse.Namespace, rows: list[dict]) -> list[Rating]:
    """What people saved, half-finished or not; where a rater saved twice, what was saved last counts."""
    known, run, last = {r["id"] for r in rows}, fingerprint(rows), {}
    for file in args.annotations:
        for number, rating in enumerate(read(file, Rating, "annotate.html", unique=False), 1):
            if rating.run != run or not {rating.one or rating.id, rating.other or rating.id} <= known:
                page = args.run / "annotate.html"
                fail(f"{file}:{number}: rated on the page of another run; rate {page}, or name that run with --run")
            last[rating.rater, rating.id] = rating
    return list(last.values())


def alpha(ratings: list[tuple[str, str, float]], level: str) -> float | None:
    """Krippendorff's alpha of (rater, item, value); None where fewer than two rate an item, or all values are one."""
    import krippendorff
    import numpy as np

    raters, items = sorted({r for r, _, _ in ratings}), sorted({i for _, i, _ in ratings})
    table = np.full((len(raters), len(items)), np.nan)
    for rater, item, value in ratings:
        table[raters.index(rater), items.index(item)] = value
    shared = table[:, (~np.isnan(table)).sum(axis=0) > 1] if len(raters) > 1 else table[:, :0]
    if len(np.unique(shared[~np.isnan(shared)])) < 2:
        return None
    return round(float(krippendorff.alpha(reliability_data=table, level_of_measurement=level)), 4)


def join_people(
    ratings: list[Rating], rows: list[dict], comparisons: list[dict], given: list[dict], names: list[str]
) -> dict:
    """Add `human` (mean of the raters' weighted means) and `human_excellent` to the rows that people rated.

    Returns agreement among the raters, and of every evaluator with them, on the greetings that they rated.
    """
    half, ratings = sum(not r.finished for r in ratings), [r for r in ratings if r.finished]
    grades, pairs = [r for r in ratings if not r.one], [r for r in ratings if r.one]
    by_id, policy = {r["id"]: r for r in rows}, {r["id"]: r["policy"] for r in rows}
    means: dict[str, list[float]] = {}
    for r in grades:
        means.setdefault(r.id, []).append(weighted_mean(r.grades))
    for key, values in means.items():
        by_id[key]["human"] = sum(values) / len(values)
        by_id[key]["human_excellent"] = int(by_id[key]["human"] >= EXCELLENT)
    rated = [by_id[key] | {"label": by_id[key]["human_excellent"]} for key in means]
    said = verdicts_on(rated, [r for r in given if r["part"] != "test"]) if rated else {}
    wins = [
        {"a": policy[r.one], "b": policy[r.other], "one": r.one, "other": r.other, "query_id": by_id[r.one]["query_id"],
         "longer_by": len(by_id[r.one]["response"]) - len(by_id[r.other]["response"]), "same": None,
         "outcome": {"one": 1.0, "other": 0.0, "tie": 0.5}[r.better]}
        for r in pairs
    ]  # fmt: skip
    judged = {(c["one"], c["other"]): c["outcome"] for c in comparisons}
    judged |= {(other, one): 1 - outcome for (one, other), outcome in judged.items() if outcome is not None}
    both = [(w["outcome"], judged.get((w["one"], w["other"]))) for w in wins]
    both = [pair for pair in both if None not in pair]
    level = {"one": 1, "other": -1, "tie": 0}
    return {
        "raters": len({r.rater for r in ratings}), "ratings": len(grades), "pairs": len(pairs), "half_finished": half,
        "alpha": {name: alpha([(r.rater, r.id, r.grades[name]) for r in grades], "ordinal") for name in WEIGHTS}
        | {"excellent": alpha([(r.rater, r.id, weighted_mean(r.grades) >= EXCELLENT) for r in grades], "nominal"),
           "pairs": alpha([(r.rater, r.id, level[r.better]) for r in pairs], "ordinal")},
        "evaluators": {name: agreement([r["label"] for r in rated], verdicts) for name, verdicts in said.items()},
        "pairs_agree": rate(sum(a == b for a, b in both), len(both)),
        "wins": wins_of(wins, names)["judged"] if wins else {},
    }  # fmt: skip
