"""What the refined judge gains, and what each part of the loop is worth: three seeds, with each ablation.

    python bench/judge.py                                      # the rule-based critic on the shipped labelled greetings
    python bench/judge.py --labelled data/paper/labelled.jsonl # on the authors', after data/import_paper.py
    python bench/judge.py --base-url URL --model NAME          # a real model

A figure is of the test part, which the loop has not looked at; beside it what text length and n-grams reach there.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "whole loop": [], "no adversary": ["--no-adversary"], "no reflection": ["--no-reflection"],
    "no acceptance": ["--no-acceptance"],
}  # fmt: skip


def refine(folder: Path, flags: list[str]) -> dict:
    """The summary of step 3, run with these flags unless it was run already."""
    command = [sys.executable, "03_refine_judge.py", "--run", str(folder), *flags]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE).returncode:
        sys.exit(f"failed: {' '.join(command)}")
    return json.loads((folder / "03_summary.json").read_text(encoding="utf-8"))


def spread(values: list[float], mark: str) -> str:
    return f"{mark} [{mark}, {mark}]".format(statistics.mean(values), min(values), max(values))


def cost(kind: str, whole: list[dict], less: list[dict]) -> str:
    """What an ablation costs, seed by seed against the whole loop, in words."""
    lost = [a["kappa"] - b["kappa"] for a, b in zip(whole, less, strict=True)]
    let_in = [b["false_accept"]["value"] - a["false_accept"]["value"] for a, b in zip(whole, less, strict=True)]
    costs = [what for what, by in (("agreement", lost), ("attacks let in", let_in)) if min(by) > 0]
    words = f"costs in every seed: {', '.join(costs)}" if costs else "costs nothing that every seed shows"
    return f"{kind}: kappa lower by {spread(lost, '{:+.2f}')}, attacks accepted {spread(let_in, '{:+.1%}')}: {words}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelled", type=Path, default=ROOT / "data/labelled.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench_judge", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base-url", help="endpoint; left out: --offline")
    parser.add_argument("--model", help="model there")
    args = parser.parse_args()
    where = ["--base-url", args.base_url, "--model", args.model] if args.base_url else ["--offline"]
    print("| | kappa before | kappa after | unseen attacks accepted, before | after | rewrites accepted |")
    print("|---|---|---|---|---|---|")
    nulls: dict[str, list[float]] = {}
    finals: dict[str, list[dict]] = {}  # figures of each seed on the test part, in the end
    for kind, flags in KINDS.items():
        runs = []
        for seed in args.seeds:
            folder = args.out / args.labelled.parent.name / f"{kind.replace(' ', '_')}_{seed}"
            runs.append(refine(folder, ["--labelled", str(args.labelled), "--seed", str(seed), *flags, *where]))
        tests = [[run["test"][when] for run in runs] for when in ("seed", "final")]
        finals[kind] = tests[1]
        cells = [spread([test["kappa"] for test in some], "{:+.2f}") for some in tests]
        cells += [spread([test["false_accept"]["value"] for test in some], "{:.1%}") for some in tests]
        cells.append(spread([run["accepted"] for run in runs], "{:.1f}"))
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)
        for run in runs if kind == "whole loop" else []:
            for name, figures in run["baselines"].items():
                nulls.setdefault(name.split(" ")[0], []).append(figures["kappa"])
    for name, kappas in nulls.items():
        print(f"| null: {name} | | {spread(kappas, '{:+.2f}')} | | | |")
    for kind in list(KINDS)[1:]:
        print(f"\n{cost(kind, finals['whole loop'], finals[kind])}")
    n = [run["test"]["final"]["n"] for run in runs]
    print(
        f"\n{len(args.seeds)} seeds: mean [lowest, highest]; {min(n)} to {max(n)} labelled greetings in the test part"
    )


if __name__ == "__main__":
    main()
