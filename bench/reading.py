#!/usr/bin/env python3
"""What a blind reader says of the policies of a run.

    python bench/reading.py [--wanted FILE] [--key FILE] [--read FILE] [--second FILE] [--scored outputs/small]
    python bench/reading.py --run outputs/small --wanted FILE --key FILE    # writes the first two, of a finished run

Joins three files of rows {id, ...}: the greetings that were to be read, {query, response}, shuffled; who wrote them,
{policy}, which the reader did not see; and what it said, {acceptable 0|1, five grades of 1 to 3, flaw}. Prints for each
policy the share that it would send and the weighted mean grade, beside what shows a sign of a spoilt text by rule and
how many texts differ, and the differences between policies, paired by query. With --scored, a run whose step 5 scored
these greetings, also how far each of its evaluators agrees with the reader on them.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import records, stats
from common.answers import WEIGHTS
from common.greetings import OWN
from common.report.figures import STEPS
from common.report.readings import reader_s_grade, readings_figures
from common.run_folder import digest
from common.signs import signs

AGAIN = "grpo_rm_hard"  # of GRPO after a round of 02 --hard, where a key names one
POLICIES = ("base", *OWN, AGAIN)


def write_wanted(args: argparse.Namespace) -> None:
    """The first greeting of each policy for each query, in the order of a hash that leaves the policy out."""
    if args.wanted.exists() or args.key.exists():
        sys.exit(f"error: {args.wanted} or {args.key} is there already: name others with --wanted and --key")
    rows = stats.where(records.read_lines(args.run / "generations.jsonl"), "sample", 0)
    rows.sort(key=lambda row: digest("reading", row["query"], row["response"]))
    wanted, key = [], []
    for number, row in enumerate(rows):
        wanted.append({"id": f"{number:03}", "query": row["query"], "response": row["response"]})
        key.append({"id": f"{number:03}", "policy": row["policy"]})
    records.write(args.wanted, wanted)
    records.write(args.key, key)
    print(f"{len(rows)} greetings to read in {args.wanted}; who wrote them: {args.key}")


def joined(args: argparse.Namespace) -> list[dict]:
    """The greetings of --wanted, each with its policy, from --key, and what the reader said of it, from --read."""
    key, read = ({row["id"]: row for row in records.read_lines(path)} for path in (args.key, args.read))
    return [row | key[row["id"]] | read[row["id"]] for row in records.read_lines(args.wanted)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("wanted", "key", "read"):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / f"docs/readings_{name}.jsonl", help="%(default)s")
    parser.add_argument("--second", type=Path, help="what a second reader said of the same: kappa of the two")
    parser.add_argument("--scored", type=Path, help="the run, whose evaluators are held beside the reader")
    parser.add_argument("--run", type=Path, help="a finished run, of whose greetings to write --wanted and --key")
    args = parser.parse_args()
    if args.run:
        write_wanted(args)
        return
    rows = []
    for row in joined(args):
        spoilt = bool(signs(row["query"], row["response"]))
        rows.append(row | {"query_id": row["query"], "grade": reader_s_grade(row), "signs": spoilt})

    groups: dict[str, list[dict]] = {}
    for name in POLICIES:
        if own := stats.where(rows, "policy", name):
            groups[name] = own

    print(
        f"| policy | reader accepts | grade | {' | '.join(WEIGHTS)} | a sign of a spoilt text | different texts | n |"
    )
    print(f"|---|---|---|{'---|' * len(WEIGHTS)}---|---|---|")
    for name, own in groups.items():
        accepted = sum(stats.column(own, "acceptable"))
        cells = [
            name,
            f"{accepted}: {stats.shown(stats.rate(accepted, len(own)), '.0%')}",
            stats.shown(stats.mean_of(own, "grade")),
        ]
        cells += [f"{sum(stats.column(own, grade)) / len(own):.2f}" for grade in WEIGHTS]
        different = len(set(stats.column(own, "response")))
        cells += [f"{sum(stats.column(own, 'signs')) / len(own):.0%}", str(different), str(len(own))]
        print(f"| {' | '.join(cells)} |")

    if args.second:
        second = {row["id"]: row["acceptable"] for row in records.read_lines(args.second)}
        verdicts = [second[row["id"]] for row in rows]
        agree = stats.agreement(stats.column(rows, "acceptable"), verdicts, stats.column(rows, "query"))
        interval = f"[{agree['kappa_lo']:.2f}, {agree['kappa_hi']:.2f}]"
        print(f"\nkappa of two readers {agree['kappa']:.2f} {interval}, n {agree['n']}")

    print("\n| difference, paired by query | reader accepts | grade | a sign of a spoilt text |\n|---|---|---|---|")
    for after, before in [*STEPS, (AGAIN, "sft"), (AGAIN, "grpo_rm")]:
        if not {after, before} <= groups.keys():
            continue
        gaps = []
        for column in ("acceptable", "grade", "signs"):
            means = [stats.query_means(groups[name], column) for name in (after, before)]
            gaps.append(stats.paired_difference(*means))
        accepted, grade, spoilt = gaps
        cells = [stats.shown(accepted, "+.0%"), stats.shown(grade, "+.2f"), stats.shown(spoilt, "+.0%")]
        print(f"| {after} over {before} | {' | '.join(cells)} |")
    if args.scored:
        print_evaluators(args.scored, rows)


def print_evaluators(run: Path, rows: list[dict]) -> None:
    """How many of these greetings each evaluator of the run accepts, and how far the reader agrees."""
    scores = {(row["policy"], row["query"], row["response"]): row for row in records.read_lines(run / "scores.jsonl")}
    labelled = records.read_lines(run / "labelled_scores.jsonl")
    both = []
    for row in rows:
        if (written := (row["policy"], row["query"], row["response"])) not in scores:
            sys.exit(f"{run / 'scores.jsonl'} has no score of greeting {row['id']}: it is another run that was read")
        both.append(scores[written] | row)
    print("\n| evaluator | accepts | the reader too | kappa | correlation of grades |\n|---|---|---|---|---|")
    for name, figures in readings_figures(both, labelled).items():
        shared, grades = figures["shared"], figures["grades"]
        kappa = f"{figures['kappa']:+.2f} [{figures['kappa_lo']:+.2f}, {figures['kappa_hi']:+.2f}]"
        accepted = stats.shown(shared, ".0%") if shared["n"] else "-"
        correlation = stats.shown(grades, "+.2f") if grades["value"] is not None else "-"
        print(f"| {name} | {shared['n']} | {accepted} | {kappa} | {correlation} |")


if __name__ == "__main__":
    main()
