"""The pairs of step 2: read, and split by query before anything is learnt from them."""

import argparse
import sys
from typing import NamedTuple

from common import records, run_folder
from common.records import Preference
from common.spoilt import Pairs
from common.texts import leaks


class Split(NamedTuple):
    """A query is in one part only."""

    train: Pairs
    stop: Pairs  # held out, to stop by and to calibrate on
    test: Pairs
    leaks: dict[str, int]  # how many pairs leak, by kind
    leaking: set[str]  # ids of the test pairs that leak into training, which --allow-leak keeps


def split_pairs(args: argparse.Namespace) -> Split:
    """Read and split the pairs. Test pairs that the user names are not touched: if they leak, the run stops."""
    pairs = records.read(args.preferences, Preference, f"python 01_curate_preferences.py --run {args.run}")
    leaking: set[str] = set()
    if args.eval_preferences:
        test = records.read(args.eval_preferences, Preference)
        leaked = leaks(pairs, test)
        leaking = ids_of(leaked)
        counts = {kind: len(some) for kind, some in leaked.items()}
        if leaking:
            table = ", ".join(f"{count} by {kind}" for kind, count in counts.items())
            report = f"of {len(test)} test pairs of {args.eval_preferences}, these leak into training: {table}"
            report += f"; such as {', '.join(sorted(leaking)[:3])}"
            if not args.allow_leak:
                run_folder.fail(f"{report}; remove them, or go on with --allow-leak")
            print(f"02: {report}", file=sys.stderr)
    else:
        test, pairs = divide(args, pairs, "test", args.eval_share)
        # Queries are on one side only, but two queries may share a text, or nearly so.
        shared = ids_of(leaks(test, pairs)) if pairs and test else set()
        pairs = [pair for pair in pairs if pair.id not in shared]
        counts = {"training_pairs_left_out": len(shared)}
        if shared:
            print(f"02: {len(shared)} training pairs share a text, or nearly one, with test pairs and are left out")
    stop, train = divide(args, pairs, "stop", 0.1)
    if not (train and stop and test):
        sizes = f"{len(train)} pairs to train on, {len(stop)} to stop by, {len(test)} to test on"
        run_folder.fail(f"{args.preferences} has too few queries to split: {sizes}; add pairs")
    return Split(train, stop, test, counts, leaking)


def divide(args: argparse.Namespace, pairs: Pairs, name: str, share: float) -> tuple[Pairs, Pairs]:
    """The pairs of a share of the queries, and the rest. A hash decides, so the order of the file does not matter."""
    inside, outside = [], []
    for pair in pairs:
        place = int(run_folder.digest(args.seed, name, pair.texts[0]), 16) % 10_000
        (inside if place < 10_000 * share else outside).append(pair)
    return inside, outside


def ids_of(leaked: dict[str, Pairs]) -> set[str]:
    return {pair.id for pairs in leaked.values() for pair in pairs}
