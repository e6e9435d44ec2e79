"""People's ratings: the page on which they rate, reading what they saved, and what evaluators are worth beside them."""

import argparse
import itertools
import sys
from typing import Literal

from pydantic import Field

from common import records, run_folder, stats
from common.answers import WEIGHTS, weighted_mean
from common.judge import EXCELLENT
from common.report.evaluators import comparison, verdicts_on

OUTCOMES = {"one": 1.0, "tie": 0.5, "other": 0.0}  # the share of a win that `one` has


class Rating(records.Record):
    """A line that annotate.html saves: the grades of one greeting, or which of two is better; None is half-finished."""

    id: str = Field(min_length=1)
    rater: str = Field(min_length=1)
    time: float = 0.0  # of its last change, in milliseconds
    grades: dict[str, Literal[1, 2, 3] | None] | None = None
    one: str = ""
    other: str = ""
    better: Literal["one", "other", "tie"] | None = None

    @property
    def finished(self) -> bool:
        if self.one:
            return self.better is not None
        return all((self.grades or {}).get(name) for name in WEIGHTS)


# ---- the page -------------------------------------------------------------------------------------------------------


def rating_id(row: dict) -> str:
    """Names a greeting by what it says: ratings outlast other queries and policies, and none moves to another text."""
    return run_folder.digest(row["policy"], row["query"], row["response"])


def pairs_of_policies(rows: list[dict], queries: list[str]) -> list[tuple[dict, dict]]:
    """For each of these query ids, the first greetings of each two policies."""
    first: dict[str, list[dict]] = {}  # by query, in the order of the policies
    for row in stats.where(rows, "sample", 0):
        first.setdefault(row["query_id"], []).append(row)
    pairs = []
    for query in queries:
        pairs += itertools.combinations(first.get(query, []), 2)
    return pairs


def rating_page(args: argparse.Namespace, rows: list[dict], queries: list[str]) -> dict:
    """What annotate.html shows: greetings without the names of their policies, and a pair of them for each query.

    They stand in the order of their ids, which are hashes: no policy is always first, and nothing moves tomorrow.
    """
    greetings = []
    for row in stats.where(rows, "sample", 0):
        if row["query_id"] in queries[: args.annotate]:
            greetings.append({"id": rating_id(row), "query": row["query"], "response": row["response"]})
    greetings.sort(key=lambda greeting: greeting["id"])
    pairs = []
    for query in dict.fromkeys(stats.column(greetings, "query")):
        for one, other in itertools.combinations(stats.where(greetings, "query", query), 2):
            if one["response"] != other["response"]:
                ids = {"id": run_folder.digest(one["id"], other["id"]), "one": one["id"], "other": other["id"]}
                pairs.append(ids | {"query": query, "texts": [one["response"], other["response"]]})
                break
    return {"greetings": greetings, "pairs": pairs}


def read_ratings(args: argparse.Namespace, rows: list[dict]) -> list[Rating]:
    """What people saved, half-finished or not, with the ids of `rows`.

    A rater counts once for an item, however often they saved: by the newest rating, a finished one if there is any.
    """
    ids = {rating_id(row): row["id"] for row in stats.where(rows, "sample", 0)}
    ratings: list[Rating] = []
    first = {}  # rater -> the first file with ratings of theirs
    for file in args.annotations:
        saved = records.read(file, Rating, "annotate.html", unique=False)
        known = [rating for rating in saved if rating.id in ids or {rating.one, rating.other} <= ids.keys()]
        if not known:
            remedy = f"rate {args.run / 'annotate.html'}, or name that run with --run"
            run_folder.fail(f"{file}: rated on the page of another run; {remedy}")
        if gone := len(saved) - len(known):
            print(f"{file}: this run has not the greetings of {gone} ratings: they do not count", file=sys.stderr)
        for rater in dict.fromkeys(rating.rater for rating in known):
            if first.setdefault(rater, file) != file:
                print(f"{file}: {rater} is in {first[rater]} too: if they are two people, rename one", file=sys.stderr)
        ratings += known
    last = {}
    for rating in sorted(ratings, key=lambda rating: (rating.finished, rating.time)):
        last[rating.rater, rating.id] = rating
    for rating in last.values():
        rating.id = ids.get(rating.id, rating.id)  # a pair has one of its own
        rating.one, rating.other = ids.get(rating.one, ""), ids.get(rating.other, "")
    return list(last.values())


# ---- figures --------------------------------------------------------------------------------------------------------


def add_human_scores(rows: list[dict], ratings: list[Rating]) -> None:
    """Add `human_excellent` to the rows that people graded: 1 if the mean of their weighted means is excellent."""
    grades: dict[str, list[float]] = {}
    for rating in ratings:
        if rating.finished and not rating.one:
            grades.setdefault(rating.id, []).append(weighted_mean(rating.grades))
    for row in rows:
        if row["id"] in grades:
            mean = sum(grades[row["id"]]) / len(grades[row["id"]])
            row["human_excellent"] = int(mean >= EXCELLENT)


def people_figures(
    ratings: list[Rating], rows: list[dict], comparisons: list[dict], labelled: list[dict], names: list[str]
) -> dict:
    """What people say: how far they agree with each other, and every evaluator with them.

    `rows` are scored greetings after `add_human_scores`; the null baselines and thresholds are fitted on labelled rows.
    """
    finished = [rating for rating in ratings if rating.finished]
    graded = [rating for rating in finished if not rating.one]
    compared = [rating for rating in finished if rating.one]
    by_id = {row["id"]: row for row in rows}
    wins = []  # what they say of pairs, as rows like those of comparisons.jsonl
    for rating in compared:
        wins.append(comparison(by_id[rating.one], by_id[rating.other]) | {"outcome": OUTCOMES[rating.better]})
    rated = [row for row in rows if "human_excellent" in row]
    evaluators = {}
    if rated:
        labels, queries = stats.column(rated, "human_excellent"), stats.column(rated, "query")
        for name, verdicts in verdicts_on(rated, labelled).items():
            evaluators[name] = stats.agreement(labels, verdicts, queries)
    figures = {"raters": len({rating.rater for rating in finished}), "ratings": len(graded), "pairs": len(compared)}
    figures |= {"half_finished": len(ratings) - len(finished), "alpha": alphas(graded, compared)}
    figures |= {"evaluators": evaluators, "pairs_agree": agreement_on_pairs(wins, comparisons)}
    return figures | {"wins": stats.wins_of(wins, names)["judged"]}


def alphas(graded: list[Rating], compared: list[Rating]) -> dict[str, float | None]:
    """Krippendorff's alpha among the raters: of each dimension, of excellence, of pairs."""
    figures = {}
    for name in WEIGHTS:
        figures[name] = alpha([(r.rater, r.id, r.grades[name]) for r in graded], "ordinal")
    excellent = [(r.rater, r.id, weighted_mean(r.grades) >= EXCELLENT) for r in graded]
    figures["excellent"] = alpha(excellent, "nominal")
    figures["pairs"] = alpha([(r.rater, r.id, OUTCOMES[r.better]) for r in compared], "ordinal")
    return figures


def alpha(ratings: list[tuple[str, str, float]], level: str) -> float | None:
    """Krippendorff's alpha of (rater, item, value); None where fewer than two rate an item, or all values are one."""
    import krippendorff
    import numpy as np
    import pandas as pd

    table = pd.DataFrame(ratings, columns=["rater", "item", "value"])
    table = table.pivot(index="rater", columns="item", values="value").to_numpy(dtype=float)
    shared = table[:, (~np.isnan(table)).sum(axis=0) > 1]
    if len(np.unique(shared[~np.isnan(shared)])) < 2:
        return None
    return round(float(krippendorff.alpha(reliability_data=table, level_of_measurement=level)), 4)


def agreement_on_pairs(wins: list[dict], comparisons: list[dict]) -> dict:
    """The share of people's comparisons whose outcome is that of the automatic one, where it has one."""
    automatic = {}
    for row in comparisons:
        if row["outcome"] is not None:
            automatic[row["one"], row["other"]] = row["outcome"]
            automatic[row["other"], row["one"]] = 1 - row["outcome"]
    same = []
    for win in wins:
        if (win["one"], win["other"]) in automatic:
            same.append(win["outcome"] == automatic[win["one"], win["other"]])
    return stats.rate(sum(same), len(same))
