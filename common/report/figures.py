"""Every figure of the report, from what step 5 has scored."""

import argparse
import itertools
from collections import Counter
from typing import NamedTuple

from common import records, stats
from common.answers import WEIGHTS
from common.constraints import broken, constraints_in
from common.greetings import EMPTY, OWN, Policy
from common.report.cost import cost_figures
from common.report.evaluators import evaluate_evaluators
from common.report.people import Rating, add_human_scores, people_figures
from common.report.readings import readings_figures
from common.store import open_store
from common.texts import diversity, runs_of_12, similarity

SCORES = ["excellent", "judge", "agents", "reward_model", "likely"]  # columns of a scored greeting
# (after, before): the differences between our own policies that the report shows.
STEPS = [("sft", "base"), ("grpo_rm", "sft"), ("grpo_judge", "sft"), ("grpo_judge", "grpo_rm")]
STEPS += [("grpo_likelihood", "sft")]


class Scored(NamedTuple):
    """What the report is made from, as it lies in the run folder: lists of rows."""

    greetings: list[dict]
    labelled: list[dict]
    comparisons: list[dict]
    rollouts: list[dict]
    readings: list[dict]

    FILES = ("scores.jsonl", "labelled_scores.jsonl", "comparisons.jsonl", "curve.jsonl", "readings_scores.jsonl")


def report_figures(args: argparse.Namespace, policies: list[Policy], scored: Scored, ratings: list[Rating]) -> dict:
    """Every figure of the report; each is in 05_summary.json under its name here."""
    rows = scored.greetings
    if ratings:
        add_human_scores(rows, ratings)
    wrote = {row["policy"] for row in rows}
    policies = [policy for policy in policies if policy.name in wrote]
    rows_of = {policy.name: stats.where(rows, "policy", policy.name) for policy in policies}
    names = list(rows_of)
    of_policies = [row for row in scored.comparisons if "a" in row]  # the others are pairs of labelled rows

    # Diversity is compared on equally many characters of each; a copy shares 12 characters with a text learnt from.
    characters = min((sum(len(row["response"]) for row in own) for own in rows_of.values()), default=0)
    sft = [row["completion"][0]["content"] for row in records.read_lines(args.run / "sft.jsonl")]
    references = [reference.response for reference in records.read(args.references, records.Reference)]
    learnt = {"sft": runs_of_12(sft), "references": runs_of_12(references)}
    equal_length = stats.excellence_at_equal_length(rows, names)  # of those that have a grade
    tables = {}
    for policy in policies:
        own = rows_of[policy.name]
        table = policy_figures(own, policy, characters, learnt)
        table["excellence_at_equal_length"] = equal_length.get(policy.name)
        if ratings:
            table["human_excellence"] = stats.bootstrap(stats.query_means(own, "human_excellent").values())
        tables[policy.name] = table
    ranked = sorted(equal_length, key=lambda name: -tables[name]["excellence"]["value"])  # best first
    lead = None  # by how much the best policy is more often excellent than the second best
    if len(ranked) > 1:
        lead = stats.paired_difference(*(stats.query_means(rows_of[name], "excellent") for name in ranked[:2]))

    figures = {"policies": tables, "characters": characters, "ranked": ranked, "lead": lead}
    figures |= {"differences": differences(rows_of), "wins": stats.wins_of(of_policies, names)}
    figures |= evaluate_evaluators(scored.labelled, scored.comparisons)
    figures |= {"readings": readings_figures(scored.readings, scored.labelled), "people": None}
    if ratings:
        figures["people"] = people_figures(ratings, rows, scored.comparisons, scored.labelled, names)
    figures["cost"] = cost_figures(args.run, rows, scored.rollouts)
    figures["ablations"] = records.read_lines(args.run / "ablations.jsonl")
    return figures | {"ledger": open_store(args, "05").ledger()}


def policy_figures(rows: list[dict], policy: Policy, characters: int, learnt: dict[str, set[str]]) -> dict:
    """Scores, length and diversity of one policy's greetings.

    Diversity is of `characters` characters; `learnt` are the runs of 12 characters that appear in an SFT text, and in
    a reference.
    """
    figures = {"excellence": stats.mean_of(rows, "excellent")}
    for column in [*SCORES[1:], "quality"]:
        figures[column] = stats.mean_of(rows, column)
    grades = [row["grades"] for row in rows if row["grades"]]
    dimensions = {}
    for name in WEIGHTS:
        dimensions[name] = round(sum(grade[name] for grade in grades) / max(1, len(grades)), 3)

    # Signs of a policy that has found a trick: one opening for all, one text for all, texts learnt by heart.
    texts = stats.column(rows, "response")
    opening, times = Counter(text[:2] for text in texts).most_common(1)[0]
    copied = {}
    for source, runs in learnt.items():
        copied[source] = round(sum(not runs.isdisjoint(runs_of_12([text])) for text in texts) / len(texts), 4)
    figures |= {"greetings": len(rows), "length": round(sum(map(len, texts)) / len(texts), 1)}
    figures |= {"distinct_texts": round(len(set(texts)) / len(texts), 4), "self_overlap": self_overlap(rows)}
    figures |= {"commonest_opening": [opening, round(times / len(texts), 4)], "copied_12": copied}
    figures |= {"constraints": constraints_kept(rows), "trained_on": policy.trained_on}
    return figures | diversity(texts, characters) | {"dimensions": dimensions}


def constraints_kept(rows: list[dict]) -> dict:
    """The share of greetings that keep what their queries ask of their form, of those that a rule can check."""
    checked = []
    for row in rows:
        if constraints_in(row["query"]):
            text = row["response"].replace(EMPTY, "")
            checked.append({"query_id": row["query_id"], "kept": int(not broken(row["query"], text))})
    return stats.bootstrap(stats.query_means(checked, "kept").values())


def self_overlap(rows: list[dict]) -> float | None:
    """Mean likeness of two samples for one query (`texts.similarity`); None where each query has one."""
    samples: dict[str, list[str]] = {}
    for row in rows:
        samples.setdefault(row["query_id"], []).append(row["response"])
    pairs = []
    for texts in samples.values():
        pairs += itertools.combinations(texts, 2)
    return round(sum(similarity(*pair) for pair in pairs) / len(pairs), 4) if pairs else None


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
