"""Every figure of the report."""

import argparse
import json
from collections import Counter
from typing import NamedTuple

from common.answers import WEIGHTS
from common.greetings import OWN, Policy
from common.records import read_lines
from common.report.cost import cost_figures
from common.report.evaluators import evaluate_evaluators
from common.report.pages import templates
from common.report.people import Rating, join_people
from common.run_folder import ROOT
from common.stats import bootstrap, excellence_at_equal_length, mean_of, paired, query_means, wins_of
from common.store import open_store
from common.texts import diversity, runs_of_12

SCORES = ["excellent", "judge", "agents", "reward_model"]


class Scored(NamedTuple):
    """What the report is made from, as it lies in the run folder."""

    rows: list[dict]  # greetings
    given: list[dict]  # labelled greetings
    comparisons: list[dict]
    graded: list[dict]  # rollouts

    FILES = ("scores.jsonl", "labelled_scores.jsonl", "comparisons.jsonl", "curve.jsonl")


def policy_figures(rows: list[dict], policy: Policy, characters: int, learnt: set[str], stock: list[str]) -> dict:
    """Scores, length and diversity of one policy's greetings."""
    texts = [r["response"] for r in rows]
    openings, seeds = Counter(t[:2] for t in texts), sorted({r["sample"] for r in rows})
    stock_phrases = sum(text.count(phrase) for text in texts for phrase in stock)
    figures = {"excellence" if key == "excellent" else key: mean_of(rows, key) for key in [*SCORES, "quality"]}
    graded = [r["grades"] for r in rows if r["grades"]]
    return figures | {
        "reward": policy.reward,
        "length": round(sum(map(len, texts)) / len(texts), 1),
        **diversity(texts, characters),
        "distinct_texts": round(len(set(texts)) / len(texts), 4),
        "commonest_opening": [openings.most_common(1)[0][0], round(openings.most_common(1)[0][1] / len(texts), 4)],
        "cliches_per_100": round(100 * stock_phrases / sum(map(len, texts)), 3),
        "copied_12": round(sum(bool(runs_of_12([t]) & learnt) for t in texts) / len(texts), 4),
        "unscored": sum(r["excellent"] is None for r in rows), "greetings": len(rows),
        "by_seed": [mean_of([r for r in rows if r["sample"] == n], "excellent")["value"] for n in seeds],
        "dimensions": {name: round(sum(g[name] for g in graded) / max(1, len(graded)), 3) for name in WEIGHTS},
    }  # fmt: skip


def length_bands(rows: list[dict], names: list[str]) -> list[dict]:
    """Excellence of each policy among its greetings of about one length: quarters of all greetings by length."""
    rows = sorted((r for r in rows if r["excellent"] is not None), key=lambda r: len(r["response"]))
    edges = sorted({len(rows[n * len(rows) // 4]["response"]) for n in range(4)}) if rows else []
    bands = []
    for lo, hi in zip(edges, [*edges[1:], 10**9], strict=True):
        inside = [r for r in rows if lo <= len(r["response"]) < hi]
        rates = {name: mean_of([r for r in inside if r["policy"] == name], "excellent") for name in names}
        bands.append({"from": lo, "to": min(hi - 1, len(inside[-1]["response"]))} | rates)
    return bands


def figures_of(args: argparse.Namespace, policies: list[Policy], scored: Scored, ratings: list[Rating]) -> dict:
    """Every figure of the report."""
    rows, given, comparisons, graded = scored
    names = [p.name for p in policies if any(r["policy"] == p.name for r in rows)]
    of = {name: [r for r in rows if r["policy"] == name] for name in names}
    people = join_people(ratings, rows, comparisons, given, names) if ratings else None
    learnt = runs_of_12([d["completion"][0]["content"] for d in read_lines(args.run / "sft.jsonl")])
    stock = json.loads((ROOT / "data/lexicon.json").read_text(encoding="utf-8"))["stock_phrases"].split()
    characters = min(sum(len(r["response"]) for r in some) for some in of.values())
    found = {p.name: policy_figures(of[p.name], p, characters, learnt, stock) for p in policies if p.name in of}
    for name, equal in excellence_at_equal_length(rows, names).items():
        found[name]["excellence_at_equal_length"] = equal
    if people:
        for name in names:
            found[name]["human_excellence"] = bootstrap(query_means(of[name], "human_excellent").values())
    own = [("sft", "base"), ("grpo_rm", "sft"), ("grpo_judge", "sft"), ("grpo_judge", "grpo_rm")]
    further = [(name, p) for name in names if name not in ("base", *OWN) for p in names if p in ("base", *OWN)]
    means = {(name, key): query_means(of[name], key) for name in names for key in [*SCORES, "quality"]}
    ranked = sorted((n for n in names if found[n]["excellence"]["n"]), key=lambda n: -found[n]["excellence"]["value"])
    figures = {
        "policies": found, "characters": characters, "ranked": ranked,
        "lead": paired(means[ranked[0], "excellent"], means[ranked[1], "excellent"]) if len(ranked) > 1 else None,
        "differences": [
            {"after": a, "before": b}
            | {key: paired(means[a, key], means[b, key]) for key in SCORES if means[a, key] and means[b, key]}
            for a, b in own + further if a in names and b in names
        ],
        "wins": wins_of([c for c in comparisons if "a" in c], names), "bands": length_bands(rows, names),
        **evaluate_evaluators(given, comparisons), "cost": cost_figures(args.run, rows, graded), "people": people,
        "ledger": open_store(args).ledger(["policy", "rubric", "pairwise"]),
        "ablations": read_lines(args.run / "ablations.jsonl"),
    }  # fmt: skip
    said = templates().get_template("finding.md").render(figures=figures)
    return figures | {"finding": " ".join(said.split()).replace(" ;", ";").replace(" .", ".")}


def results(figures: dict) -> list[dict]:
    """The lines of results.jsonl: each row of each table, by its name in 05_summary.json."""
    rows = []
    for table, content in figures.items():
        named = content if isinstance(content, dict) else dict(enumerate(content)) if isinstance(content, list) else {}
        rows += [{"table": table, "row": name, "figures": found} for name, found in named.items()]
    return rows
