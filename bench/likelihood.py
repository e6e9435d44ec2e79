#!/usr/bin/env python3
"""How far a language model's likelihood agrees with a reader, and where to cut it: data/readings.jsonl, by halves.

    python bench/likelihood.py MODEL [--out outputs/likelihood.jsonl]
    python bench/likelihood.py MODEL --read docs/readings_read.jsonl
    python bench/likelihood.py MODEL --rollouts outputs/run/rollouts_rm.jsonl --every 2

Scores every reading (kept in --out, so that another call goes on from it) and prints, by writer and for two halves of
the queries, by a hash of their words: the AUC of the score, of all texts and of those without a sign of a spoilt text,
beside that of what it is worth as a reward, of what the query adds, and of text length; what is accepted at several
thresholds, and how much of that the reader shares. With --rollouts it scores some steps of a GRPO run instead;
intervals are over queries. On a CPU without instructions for bf16 a model of 1.5B takes two seconds or so for a text.
"""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.reading import joined
from common import records, stats
from common.likelihood import ANYBODY, LIKELY, add_likelihoods, scores_of, worth
from common.policy import model_folder
from common.prompts import PROMPTS
from common.report.readings import Reading, reader_s_grade
from common.run_folder import digest
from common.signs import signs

THRESHOLDS = (-1.0, -1.2, LIKELY, -1.6, -2.0, -3.0, -9.0)
WRITERS = ("tiny", "0.5B", "1.5B", "")  # "" is in every name: all of them


def auc(rows: list[dict], column: str) -> str:
    """The chance that an acceptable text has more of this than another; ties count half."""
    from sklearn.metrics import roc_auc_score

    labels = stats.column(rows, "acceptable")
    return f"{roc_auc_score(labels, stats.column(rows, column)):.2f}" if len(set(labels)) == 2 else "-"


def accepted(rows: list[dict], threshold: float) -> str:
    """How many of the rows are accepted, and the share of those that the reader accepts too."""
    labels = [row["acceptable"] for row in rows if row["likelihood"] >= threshold and not row["signs"]]
    rate = stats.rate(sum(labels), len(labels))
    return f"{len(labels)}: {rate['value']:.0%} [{rate['lo']:.0%}, {rate['hi']:.0%}]" if labels else "0"


def readings(args: argparse.Namespace) -> tuple[list[dict], tuple[str, ...]]:
    """(rows that a reader has read, names of their writers; the last is in every name)."""
    if not args.read:
        rows = [row.model_dump() for row in records.read(ROOT / "data/readings.jsonl", Reading, unique=False)]
        return rows, WRITERS
    return [row | {"writer": row["policy"]} for row in joined(args)], ("base", "sft", "grpo", "")


def by_step(args: argparse.Namespace) -> None:
    """The mean likelihood, and the mean reward, of the completions of every so many-th step."""
    steps: dict[int, list[dict]] = {}
    for row in records.read_lines(args.rollouts):
        steps.setdefault(row["step"], []).append(row)
    print("| step | likelihood | reward | n |\n|---|---|---|---|")
    chosen = sorted(steps)[:: args.every]
    add_likelihoods(model_folder(args.model), PROMPTS, [row for step in chosen for row in steps[step]], args.out)
    for step in chosen:
        rows = steps[step]
        groups: dict[str, list[float]] = {}  # the texts of one query are alike
        for row in rows:
            groups.setdefault(row["query"], []).append(row["likelihood"])
        mean = stats.bootstrap(sum(group) / len(group) for group in groups.values())
        rewards = [row["reward"] for row in rows if row["reward"] is not None]
        reward = f"{sum(rewards) / len(rewards):.2f}" if rewards else "-"
        likelihood = f"{mean['value']:.2f} [{mean['lo']:.2f}, {mean['hi']:.2f}]"
        print(f"| {step} | {likelihood} | {reward} | {len(rows)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="language model, a hub name or a folder")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/likelihood.jsonl", help="scores (%(default)s)")
    parser.add_argument("--rollouts", type=Path, help="score these instead: rollouts_*.jsonl of a run")
    parser.add_argument("--every", type=int, default=2, help="of its steps (%(default)s)")
    parser.add_argument(
        "--read", type=Path, help="readings of a run's policies instead, as bench/reading.py takes them"
    )
    for name in ("wanted", "key"):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / f"docs/readings_{name}.jsonl", help="of --read")
    args = parser.parse_args()
    if args.rollouts:
        by_step(args)
        return

    rows, writers = readings(args)
    model = model_folder(args.model)
    add_likelihoods(model, PROMPTS, rows, args.out)
    for_anybody = scores_of(model, PROMPTS, [(ANYBODY, row["response"]) for row in rows], args.out)
    for row, score in zip(rows, for_anybody, strict=True):
        row |= {"gain": row["likelihood"] - score, "worth": worth(row["likelihood"], score)}
        row |= {"signs": sorted(signs(row["query"], row["response"])), "length": len(row["response"])}
        row |= {"half": "second" if int(digest(row["query"])[:8], 16) % 2 else "first", "grade": reader_s_grade(row)}

    tables = []  # (title, rows)
    for writer in writers:
        for half in ("first", "second"):
            own = [row for row in rows if writer in row["writer"] and row["half"] == half]
            tables.append((f"{writer or 'all'}, {half}", own))
    tables.append(("all, both", rows))

    print(
        "| writer, half | n, acceptable | AUC | without a sign: n | AUC | of its worth | of its gain | of length",
        end="",
    )
    print(" | median gain | correlation of grades |\n|---|---|---|---|---|---|---|---|---|---|")
    for title, own in tables:
        clean = [row for row in own if not row["signs"]]
        grades = stats.correlation(*(stats.column(own, name) for name in ("likelihood", "grade", "query")))
        cells = [title, f"{len(own)}, {sum(stats.column(own, 'acceptable'))}", auc(own, "likelihood"), str(len(clean))]
        cells += [auc(clean, name) for name in ("likelihood", "worth", "gain", "length")]
        cells += [f"{statistics.median(stats.column(clean, 'gain')):+.1f}" if clean else "-"]
        print(f"| {' | '.join(cells)} | {stats.shown(grades, '+.2f')} |")
    print(f"\n| accepted: of those the reader shares | {' | '.join(map(str, THRESHOLDS))} |")
    print(f"|---|{'---|' * len(THRESHOLDS)}")
    for title, own in tables:
        print(f"| {title} | {' | '.join(accepted(own, threshold) for threshold in THRESHOLDS)} |")


if __name__ == "__main__":
    main()
