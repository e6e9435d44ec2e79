"""The plain reward model against the robust one, on the paper's released pairs, tiny model, CPU.

    python data/import_paper.py CLONE --out data/paper
    python bench/reward_model.py                    # seeds 0, 1, 2; hours on two cores
    python bench/reward_model.py --seeds 0 --pairs 2000
    python bench/reward_model.py --seeds 0 --pairs 1000 --each      # what each kind of spoilt text is worth
    python bench/reward_model.py --pairs 1000 --batches             # batches of like length against TRL's of any length

Plain: the pairs as released, twice over, batches of any lengths, no calibration. Robust: the defaults of step 2. Both
see the same test pairs and the same attacks. A figure is the mean over the seeds, with the lowest and the highest.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ["--derived", "0", "--length-tolerance", "1", "--random-batches", "--epochs", "2"]
KINDS = {"plain": PLAIN, "robust": []}


def train(folder: Path, data: Path, seed: int, flags: list[str]) -> dict:
    """The summary of step 2, run with these flags unless it was run already."""
    command = [sys.executable, "02_train_rm.py", "--offline", "--run", str(folder), "--seed", str(seed), *flags]
    command += ["--preferences", str(data / "train.jsonl"), "--allow-leak"]
    command += ["--eval-preferences", str(data / "test.jsonl")]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"failed: {' '.join(command)}")
    return json.loads((folder / "02_summary.json").read_text())


def figures(summary: dict) -> dict[str, float]:
    """What the table shows of one run."""
    log = summary["log"]
    runtime, tokens = log[-1]["train_runtime"], max(entry.get("num_tokens", 0) for entry in log)
    seen = (summary["train_pairs"] + summary["derived_pairs"]) * log[-1]["epoch"]
    found = {name: rate["value"] for name, rate in summary["eval"].items()}
    found["|correlation of score and length|, chosen texts"] = abs(summary["length_correlation"])
    found["seconds for 1,000 pairs seen"] = 1000 * runtime / seen
    found["tokens a second"] = tokens / runtime
    return found


def show_each(args: argparse.Namespace, data: Path, robust: list[dict]) -> None:
    """For each kind of spoilt text: right under its attack, and on all pairs, with the kind and without it."""
    print(f"\n{len(args.seeds)} seeds, {robust[0]['train_pairs']} training pairs; means over the seeds")
    print("\n| kind left out | its attack, with it | without it | all pairs, with it | without it | n |")
    print("|---|---|---|---|---|---|")
    for attack in [name for name in robust[0]["eval"] if name.startswith("attack: ")]:
        kind = attack.removeprefix("attack: ")
        without = [
            train(args.out / f"without_{kind}_{args.pairs}_{seed}", data, seed, ["--without", kind])
            for seed in args.seeds
        ]
        cells = [
            f"{statistics.mean(summary['eval'][name]['value'] for summary in summaries):.1%}"
            for name in (attack, "all") for summaries in (robust, without)
        ]  # fmt: skip
        print(f"| {kind} | {' | '.join(cells)} | {robust[0]['eval'][attack]['n']} |", flush=True)


def show_batches(args: argparse.Namespace, data: Path) -> None:
    """Seconds and tokens a second of the same training with batches of like length and of any lengths, in turns."""
    kinds = {"like lengths": [], "any lengths (TRL's default)": ["--random-batches"]}
    found = {name: [] for name in kinds}
    for seed in args.seeds:
        for name, flags in kinds.items():
            folder = args.out / f"batches_{len(flags)}_{args.pairs}_{seed}"
            found[name].append(figures(train(folder, data, seed, flags)))
    print("\n| batches of | seconds for 1,000 pairs seen | tokens a second | all pairs |\n|---|---|---|---|")
    for name, runs in found.items():
        cells = [[run[figure] for run in runs] for figure in ("seconds for 1,000 pairs seen", "tokens a second", "all")]
        marks = ("{:.1f}", "{:.0f}", "{:.1%}")
        print(f"| {name} | " + " | ".join(
            f"{mark.format(statistics.mean(cell))} [{mark.format(min(cell))}, {mark.format(max(cell))}]"
            for mark, cell in zip(marks, cells, strict=True)) + " |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data/paper", help="what import_paper.py wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench_rm", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, help="train on the first so many pairs only")
    parser.add_argument("--each", action="store_true", help="leave out each kind of spoilt text in turn")
    parser.add_argument("--batches", action="store_true", help="time batches of like length against those of any")
    args = parser.parse_args()
    data = args.out / f"data_{args.pairs}"
    data.mkdir(parents=True, exist_ok=True)
    for side, most in (("train", args.pairs), ("test", None)):
        rows = (args.data / f"preferences.{side}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / f"{side}.jsonl").write_text("".join(rows[:most]), encoding="utf-8")
    if args.batches:
        show_batches(args, data)
        return
    runs = {
        kind: [train(args.out / f"{kind}_{args.pairs}_{seed}", data, seed, flags) for seed in args.seeds]
        for kind, flags in KINDS.items()
    }
    if args.each:
        show_each(args, data, runs["robust"])
        return
    tables = {kind: [figures(summary) for summary in summaries] for kind, summaries in runs.items()}
    first = runs["robust"][0]
    print(f"\n{len(args.seeds)} seeds, {first['train_pairs']} training pairs, {first['test_pairs']} test pairs")
    print("\n| figure | plain | robust | n |\n|---|---|---|---|")
    for name in tables["plain"][0]:
        cells = []
        for kind in KINDS:
            values = [found[name] for found in tables[kind]]
            mark = "{:.1%}" if name in first["eval"] else "{:.2f}"
            low, high = mark.format(min(values)), mark.format(max(values))
            cells.append(f"{mark.format(statistics.mean(values))} [{low}, {high}]")
        print(f"| {name} | {' | '.join(cells)} | {first['eval'].get(name, {}).get('n', '')} |")
    for name, rate in first["baselines"].items():
        print(f"| null: {name} | {rate['value']:.1%} | | {rate['n']} |")


if __name__ == "__main__":
    main()
