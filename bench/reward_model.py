"""The plain reward model against the robust one, on the paper's released pairs, tiny model, CPU.

    python data/import_paper.py CLONE --out data/paper
    python bench/reward_model.py                              # seeds 0, 1, 2; some hours on two cores
    python bench/reward_model.py --each --pairs 2500 --seeds 0 --epochs 1.5   # what each family is worth

Plain: the pairs as released, no calibration. Calibrated: the same with the control of length alone. Robust: step 2's
defaults, which show each released pair twice an epoch, beside its spoilt forms. Epochs, test pairs and attacks are the
same. A figure is the mean over the seeds, with the lowest and the highest; of one seed, a rate with its 95% interval.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.spoilt import FAMILIES
from common.stats import rate

PLAIN = ["--derived", "0"]
KINDS = {"plain": [*PLAIN, "--length-tolerance", "1"], "calibrated": PLAIN, "robust": []}
WORTH = 0.01  # standard deviations of the score
PAID, PAID_RANKS = f"all, were a character worth {WORTH}", f"correlation of ranks, were a character worth {WORTH}"
TAKEN = "subtracted per character, standard deviations"
SPEED = {"seconds for 1,000 pairs seen": "{:.1f}", "tokens per second": "{:.0f}"}


def train(args: argparse.Namespace, name: str, seed: int, flags: list[str]) -> dict:
    """The summary of step 2, run with these flags unless it was run already."""
    folder = args.out / f"{name}_{args.pairs}_{args.epochs:g}_{seed}"
    command = [sys.executable, "02_train_rm.py", "--offline", "--run", str(folder), "--seed", str(seed), *flags]
    command += ["--epochs", str(args.epochs), "--preferences", str(args.out / f"train_{args.pairs}.jsonl")]
    command += ["--eval-preferences", str(args.data / "preferences.test.jsonl"), "--allow-leak"]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"failed: {' '.join(command)}")
    summary = json.loads((folder / "02_summary.json").read_text())
    add_length(summary, folder)
    return summary


def add_length(summary: dict, folder: Path) -> None:
    """Add how much of `all` is length: the accuracy on the test pairs if each character were worth WORTH more (within
    the lengths of calibration.json), the rank correlation with length that this leaves, and what the calibration has
    subtracted per character."""
    calibration = json.loads((folder / "rm/calibration.json").read_text())
    line = calibration["length"]
    rows = [json.loads(row) for row in (folder / "rm_eval.jsonl").open(encoding="utf-8")]
    wins, chosen_scores = 0, []
    for row in rows:
        paid = {}
        for side in ("chosen", "rejected"):
            length = min(max(len(row[side]), line["shortest"]), line["longest"])
            paid[side] = row[f"{side}_score"] + WORTH * length
        wins += paid["chosen"] > paid["rejected"]
        chosen_scores.append(paid["chosen"])
    lengths = [len(row["chosen"]) for row in rows]
    summary["eval"][PAID] = rate(wins, len(rows))
    summary[PAID_RANKS] = abs(float(spearmanr(chosen_scores, lengths)[0]))
    summary[TAKEN] = line["slope"] / calibration["std"]


def figures(summary: dict) -> dict[str, float]:
    """What the tables show of one run."""
    log, settings = summary["log"], summary["settings"]
    runtime, tokens = log[-1]["train_runtime"], max(entry.get("num_tokens", 0) for entry in log)
    seen = log[-1]["step"] * settings["batch_size"] * settings["accumulation"]
    values = {name: test["value"] for name, test in summary["eval"].items()}
    values["correlation of score and length, without its sign"] = abs(summary["length_correlation"])
    values["the same, of their ranks"] = abs(summary["length_rank_correlation"])
    for name in (PAID_RANKS, TAKEN):
        values[name] = summary[name]
    values["seconds for 1,000 pairs seen"] = 1000 * runtime / seen
    values["tokens per second"] = tokens / runtime
    return values


def cell(runs: list[dict], name: str) -> str:
    """A figure's mean over the seeds, its lowest and its highest, as text; of one seed, a rate and its 95% interval."""
    values, test = [figures(run)[name] for run in runs], runs[0]["eval"].get(name)
    mark = "{:.1%}" if test else SPEED.get(name, "{:.2f}")
    low, high = (test["lo"], test["hi"]) if test and len(runs) == 1 else (min(values), max(values))
    return f"{mark.format(statistics.mean(values))} [{mark.format(low)}, {mark.format(high)}]"


def span(counts: list[int]) -> str:
    """A count, or the least and the most of several."""
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def show(columns: dict[str, list[dict]], names: list[str]) -> None:
    """A table with a row for each figure and a column for each kind of run."""
    first = next(iter(columns.values()))
    rates = first[0]["eval"]
    pairs = span([run["train_pairs"] for run in first])
    print(f"\n{len(first)} seeds, {pairs} training pairs, {first[0]['test_pairs']} test pairs")
    print(f"\n| figure | {' | '.join(columns)} | longer | n-grams | n |\n|---|{'---|' * len(columns)}---|---|---|")
    for name in names:
        cells = [cell(runs, name) for runs in columns.values()]
        for rule in ("longer", "ngram"):
            null = [run["eval"][name]["null"][rule]["value"] for run in first] if "null" in rates.get(name, {}) else []
            cells.append(f"{statistics.mean(null):.1%}" if null else "")
        n = span([run["eval"][name]["n"] for run in first]) if name in rates else ""
        print(f"| {name} | {' | '.join(cells)} | {n} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data/paper", help="what import_paper.py wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench_rm", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, help="train on the first this many pairs only")
    parser.add_argument("--epochs", type=float, default=2, help="times over the pairs (%(default)s)")
    parser.add_argument("--each", action="store_true", help="leave out one family of spoilt texts after another")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = (args.data / "preferences.train.jsonl").open("rb").readlines()
    (args.out / f"train_{args.pairs}.jsonl").write_bytes(b"".join(rows[: args.pairs]))
    if args.each:
        whole = [train(args, "robust", seed, []) for seed in args.seeds]
        for family in FAMILIES:
            less = [train(args, f"without_{family}", seed, ["--without", family]) for seed in args.seeds]
            attacks = [f"attack: {family}", f"attack: {family}, unseen kinds"]
            show({"all families": whole, f"without {family}": less}, [*attacks, "all"])
        return
    runs = {kind: [train(args, kind, seed, flags) for seed in args.seeds] for kind, flags in KINDS.items()}
    show(runs, list(figures(runs["robust"][0])))


if __name__ == "__main__":
    main()
