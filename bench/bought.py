"""How often a search buys the evaluators of finished runs, by family of edits, beside length and n-grams.

    python bench/bought.py outputs/a outputs/b outputs/c              # run folders, say of three seeds
    python bench/bought.py outputs/a outputs/b outputs/c --read 50    # and texts to read without knowing whose they are

What step 5 has found (--search, 120 with --offline) is read; in a run without it the search is made and kept, as step 5
does it. Bought: a spoilt form of a good labelled greeting is found that scores above the greeting (reward model and
baselines), is accepted (judge) or called excellent (rubric).
"""

import argparse
import importlib
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import records, stats
from common.policy import policy_path, silence_libraries
from common.report.bought import FILES
from common.report.evaluators import labelled_rows
from common.run_folder import open_run, read_summary

step5 = importlib.import_module("05_evaluate")


def searched(run: Path, flags: list[str]) -> dict[str, dict]:
    """{evaluator: {"all": rate, family: rate, ...}} of a run, after the search where it was not made yet."""
    if not all((run / file).is_file() for file in FILES):
        seed = read_summary(run, "02_summary").get("settings", {}).get("seed", 0)
        sys.argv = ["05_evaluate.py", "--run", str(run), "--seed", str(seed), *flags]
        args = step5.parse_args()
        open_run(run)
        silence_libraries()
        stage = step5.search_stage(args)
        if step5.search(args, policy_path(args), labelled_rows(args)):
            sys.exit(f"{run}: some questions were not answered; run again")
        stage.finish()
    return read_summary(run, "bought")


def cell(rates: list[dict]) -> str:
    """The share in all runs together with its interval and, of several runs, the lowest and the highest."""
    n = sum(rate["n"] for rate in rates)
    if not n:
        return ""
    pooled = stats.rate(sum(rate["n"] * (rate["value"] or 0) for rate in rates), n)
    words = stats.shown(pooled, ".1%")
    values = [rate["value"] for rate in rates if rate["n"]]
    return f"{words}, {min(values):.1%} to {max(values):.1%}" if len(rates) > 1 else words


def write_reading(runs: list[Path], count: int, seed: int, out: Path) -> None:
    """Random texts that bought an evaluator, with their queries alone, and beside them who was bought with what."""
    rows = []
    for run in runs:
        for number, row in enumerate(records.read_lines(run / FILES[0])):
            if not row["evaluator"].startswith("null"):
                rows.append({"run": str(run), "line": number + 1, **row})
    drawn = random.Random(seed).sample(rows, min(count, len(rows)))
    key = [{"id": f"{number:03}", **row} for number, row in enumerate(drawn, 1)]
    records.write(out, [{"id": row["id"], "query": row["query"], "response": row["text"]} for row in key])
    records.write(out.with_suffix(".key.jsonl"), key)
    print(f"\n{len(key)} texts to read in {out}, whose they are in {out.with_suffix('.key.jsonl')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--search", type=int, default=120, help="greetings, in a run not searched yet (%(default)s)")
    parser.add_argument("--read", type=int, default=0, metavar="N", help="write N winners to read blind")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bought.jsonl", help="file for them (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the texts to read (%(default)s)")
    parser.add_argument("--base-url", help="endpoint of judge and rubric; left out: --offline")
    parser.add_argument("--model", help="model there")
    args = parser.parse_args()
    for run in args.runs:
        if not run.is_dir():
            parser.error(f"{run} is no folder of a run")
    where = ["--base-url", args.base_url, "--model", args.model] if args.base_url else ["--offline"]
    tables = [searched(run, ["--search", str(args.search), *where]) for run in args.runs]
    evaluators = list(dict.fromkeys(name for table in tables for name in table))
    print(f"| an edit of | {' | '.join(evaluators)} | n |\n|---|{'---|' * len(evaluators)}---|")
    for family in tables[0][evaluators[0]]:
        rates = {name: [table[name][family] for table in tables if name in table] for name in evaluators}
        n = sum(rate["n"] for rate in rates[evaluators[0]])
        print(f"| {family} | {' | '.join(cell(rates[name]) for name in evaluators)} | {n} |")
    runs = "the share in all runs together [95% interval], lowest to highest" if len(tables) > 1 else "[95% interval]"
    print(f"\n{len(tables)} run{'s' if len(tables) > 1 else ''}: {runs}; n greetings in all")
    if args.read:
        write_reading(args.runs, args.read, args.seed, args.out)


if __name__ == "__main__":
    main()
