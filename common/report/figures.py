"""Every figure of the report, from what step 5 has scored."""

import argparse
from collections import Counter
from typing import NamedTuple

from common import lexicon, records, stats
from common.answers import WEIGHTS
from common.greetings import OWN, Policy
from common.report.cost import cost_figures
from common.report.evaluators import evaluate_evaluators
from common.report.people import Rating, add_human_scores, people_figures
from common.store import open_store
from common.texts import diversity, runs_of_12

SCORES = ["excellent", "judge", "agents", "reward_model"]  # columns of a scored greeting
# (after, before): the differences between our own policies that the report shows.
STEPS = [("sft", "base"), ("grpo_rm", "sft"), ("grpo_judge", "sft"), ("grpo_judge", "grpo_rm")]


class Scored(NamedTuple):
    """What the report is made from, as it lies in the run folder: lists of rows."""

    greetings: list[dict]
    labelled: list[dict]
    comparisons: list[dict]
    rollouts: list[dict]

    FILES = ("scores.jsonl", "labelled_scores.jsonl", "comparisons.jsonl", "curve.jsonl")


def report_figures(args: argparse.Namespace, policies: list[Policy], scored: Scored, ratings: list[Rating]) -> dict:
    """Every figure of the report; each is in 05_summary.json under its name here, and in results.jsonl as a table."""
    rows = scored.greetings
    if ratings:
        add_human_scores(rows, ratings)
    rows_of, lengths = {}, []
    for policy in policies:  # in their order; one that wrote nothing is left out
        own = stats.where(rows, "policy", policy.name)
        if own:
            rows_of[policy.name] = own
            lengths.append(sum(map(len, stats.column(own, "response"))))
    names = list(rows_of)
    of_policies = [row for row in scored.comparisons if "a" in row]  # the others are pairs of labelled rows

    # Diversity is compared on equally many characters of each; a copy shares 12 characters with an SFT text.
    characters = min(lengths, default=0)
    learnt = runs_of_12([row["completion"][0]["content"] for row in records.read_lines(args.run / "sft.jsonl")])
    equal_length = stats.excellence_at_equal_length(rows, names)
    tables, excellence = {}, {}
    for policy in policies:
        if policy.name not in rows_of:
            continue
        own = rows_of[policy.name]
        table = policy_figures(own, policy, characters, learnt)
        if policy.name in equal_length:
            table["excellence_at_equal_length"] = equal_length[policy.name]
            excellence[policy.name] = stats.query_means(own, "excellent")
        if ratings:
            table["human_excellence"] = stats.bootstrap(stats.query_means(own, "human_excellent").values())
        tables[policy.name] = table
    ranked = sorted(excellence, key=lambda name: -tables[name]["excellence"]["value"])  # best first
    lead = None  # by how much the best policy is more often excellent than the second best
    if len(ranked) > 1:
        lead = stats.paired_difference(excellence[ranked[0]], excellence[ranked[1]])

    return {
        "policies": tables,
        "characters": characters,
        "ranked": ranked,
        "lead": lead,
        "differences": differences(rows_of),
        "wins": stats.wins_of(of_policies, names),
        **evaluate_evaluators(scored.labelled, scored.comparisons),
        "cost": cost_figures(args.run, rows, scored.rollouts),
        "people": people_figures(ratings, rows, scored.comparisons, scored.labelled, names) if ratings else None,
        "ledger": open_store(args, "05").ledger(),
        "ablations": records.read_lines(args.run / "ablations.jsonl"),
    }


def policy_figures(rows: list[dict], policy: Policy, characters: int, learnt: set[str]) -> dict:
    """Scores, length and diversity of one policy's greetings.

    Diversity is of `characters` characters; `learnt` are the runs of 12 characters that appear in an SFT text.
    """
    figures = {"excellence": stats.mean_of(rows, "excellent")}
    for column in [*SCORES[1:], "quality"]:
        figures[column] = stats.mean_of(rows, column)
    by_seed = []  # how much one draw of greetings differs from another
    for sample in sorted(set(stats.column(rows, "sample"))):
        by_seed.append(stats.mean_of(stats.where(rows, "sample", sample), "excellent")["value"])
    grades = [row["grades"] for row in rows if row["grades"]]
    dimensions = {}
    for name in WEIGHTS:
        dimensions[name] = round(sum(grade[name] for grade in grades) / max(1, len(grades)), 3)

    # Signs of a policy that has found a trick: set phrases, one opening for all, one text for all, learnt by heart.
    texts = stats.column(rows, "response")
    written = sum(map(len, texts))
    openings: Counter = Counter()
    stock_phrases = copies = 0
    for text in texts:
        openings[text[:2]] += 1
        stock_phrases += sum(map(text.count, lexicon.STOCK))
        copies += not learnt.isdisjoint(runs_of_12([text]))
    opening, times = openings.most_common(1)[0]
    return figures | {
        "reward": policy.reward,
        "length": round(written / len(texts), 1),
        **diversity(texts, characters),
        "distinct_texts": round(len(set(texts)) / len(texts), 4),
        "commonest_opening": [opening, round(times / len(texts), 4)],
        "cliches_per_100": round(100 * stock_phrases / written, 3),
        "copied_12": round(copies / len(texts), 4),
        "unscored": stats.column(rows, "excellent").count(None),
        "greetings": len(rows),
        "by_seed": by_seed,
        "dimensions": dimensions,
    }


def differences(rows_of: dict[str, list[dict]]) -> list[dict]:
    """What each step of training gained in every score, paired by query; then each further policy against our own."""
    own = [name for name in rows_of if name in ("base", *OWN)]
    pairs = [(after, before) for after, before in STEPS if after in own and before in own]
    for name in rows_of:
        if name not in own:
            pairs += [(name, before) for before in own]
    rows = []
    for after, before in pairs:
        row = {"after": after, "before": before}
        for column in SCORES:
            means = [stats.query_means(rows_of[name], column) for name in (after, before)]
            if all(means):
                row[column] = stats.paired_difference(*means)
        rows.append(row)
    return rows


def result_rows(figures: dict) -> list[dict]:
    """The lines of results.jsonl: each row of each table, by its name in 05_summary.json."""
    rows = []
    for table, content in figures.items():
        if isinstance(content, list):
            content = dict(enumerate(content))
        if isinstance(content, dict):
            rows += [{"table": table, "row": name, "figures": row} for name, row in content.items()]
    return rows
