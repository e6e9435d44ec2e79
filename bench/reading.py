#!/usr/bin/env python3
"""What a blind reader says of the policies of a run.

    python bench/reading.py [--wanted FILE] [--key FILE] [--read FILE]

Joins three files of rows {id, ...}: the greetings that were to be read, {query, response}, shuffled; who wrote them,
{policy}, which the reader did not see; and what he said, {acceptable 0|1, five grades of 1 to 3, flaw}. Prints for each
policy the share that he would send and the weighted mean grade, beside what shows a sign of a spoilt text by rule, and
for each policy after the first the difference from the one before, paired by query.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import records, stats
from common.answers import WEIGHTS
from common.greetings import OWN
from common.report.readings import reader_s_grade
from common.signs import signs

POLICIES = ("base", *OWN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("wanted", "key", "read"):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / f"docs/readings_{name}.jsonl", help="%(default)s")
    args = parser.parse_args()
    key, read = ({row["id"]: row for row in records.read_lines(path)} for path in (args.key, args.read))
    rows = []
    for greeting in records.read_lines(args.wanted):
        row = greeting | key[greeting["id"]] | read[greeting["id"]]
        spoilt = bool(signs(row["query"], row["response"]))
        rows.append(row | {"query_id": row["query"], "grade": reader_s_grade(row), "signs": spoilt})

    groups: dict[str, list[dict]] = {}
    for name in POLICIES:
        if own := stats.where(rows, "policy", name):
            groups[name] = own

    print(f"| policy | reader accepts | grade | {' | '.join(WEIGHTS)} | a sign of a spoilt text | n |")
    print(f"|---|---|---|{'---|' * len(WEIGHTS)}---|---|")
    for name, own in groups.items():
        accepted = sum(stats.column(own, "acceptable"))
        cells = [
            name,
            f"{accepted}: {shown(stats.rate(accepted, len(own)), '.0%')}",
            shown(stats.mean_of(own, "grade")),
        ]
        cells += [f"{sum(stats.column(own, grade)) / len(own):.2f}" for grade in WEIGHTS]
        cells += [f"{sum(stats.column(own, 'signs')) / len(own):.0%}", str(len(own))]
        print(f"| {' | '.join(cells)} |")

    print("\n| difference, paired by query | reader accepts | grade |\n|---|---|---|")
    for after, before in zip([*groups][1:], groups, strict=False):
        gaps = []
        for column in ("acceptable", "grade"):
            means = [stats.query_means(groups[name], column) for name in (after, before)]
            gaps.append(stats.paired_difference(*means))
        print(f"| {after} over {before} | {shown(gaps[0], '+.0%')} | {shown(gaps[1], '+.2f')} |")


def shown(figure: dict, form: str = ".2f") -> str:
    """A value with its interval."""
    value, lo, hi = (format(figure[name], form) for name in ("value", "lo", "hi"))
    return f"{value} [{lo}, {hi}]"


if __name__ == "__main__":
    main()
