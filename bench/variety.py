"""What novelty in the reward and larger groups are worth in GRPO, at equal rollouts, on the stand-ins of --offline.

    python bench/variety.py                                # seeds 0, 2, 3 in outputs/variety; goes on where it stopped
    python bench/variety.py --seeds 1 --runs outputs/tuned # the seed on which the weight was chosen

Each seed is one run of the pipeline. Step 4 is repeated from its SFT policy, reward model and principles: without
--novelty, and with novelty but in smaller groups of more queries. Step 5 lets all of them write for the same held-out
queries, in one call. Excellence is the rubric's, beside SFT as the null.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import records, stats
from common.run_folder import read_summary

# Name -> flags of step 4. Of 128 completions a step as well: 8 for each of 16 queries.
VARIANTS = {"w0": ["--novelty", 0], "of_8": ["--samples", 8, "--queries-per-step", 16, "--mini-batch", 8]}
REWARDS = ("rm", "judge")
COPIED = ["policy_sft", "rm", "principles.jsonl", "sft.jsonl", "04_summary_none.json", "stages/04_none.json"]
DISTINCT, GAIN, SPREAD = 0.95, 0.9, 0.5  # aimed at: of SFT's different texts, of the gain without novelty, of groups


def step(script: str, run: Path, seed: int, *flags: object) -> None:
    command = [sys.executable, script, "--offline", "--run", run, "--seed", seed, *flags]
    if subprocess.run(list(map(str, command)), cwd=ROOT).returncode:
        sys.exit(f"stopped in {run}; the same command goes on from there")


def run_seed(run: Path, seed: int) -> None:
    """The pipeline, the variants of step 4, and one step 5 over all policies."""
    for script in ("01_curate_preferences.py", "02_train_rm.py", "03_refine_judge.py"):
        step(script, run, seed)
    for reward in ("none", *REWARDS):
        step("04_grpo.py", run, seed, "--reward", reward)
    further = []
    for name, flags in VARIANTS.items():
        variant = run / "variants" / name
        if not variant.is_dir():
            copy_start(run, variant)
        for reward in REWARDS if name == "w0" else ["judge"]:  # scores never agree: groups matter to verdicts alone
            step("04_grpo.py", variant, seed, "--reward", reward, *flags)
            further.append(f"{name}_{reward}={variant / f'policy_{reward}'}")
    step("05_evaluate.py", run, seed, "--policies", *further)


def copy_start(run: Path, variant: Path) -> None:
    """What step 4 starts from; under another name until it is whole."""
    part = variant.with_name(variant.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for name in COPIED:
        target = part / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (run / name).is_dir():
            shutil.copytree(run / name, target)
        else:
            shutil.copy(run / name, target)
    part.rename(variant)


def row(run: Path, name: str, figures: dict) -> dict:
    """The figures of one policy of a run beside its SFT policy's."""
    own, sft = figures["policies"][name], figures["policies"]["sft"]
    scores = records.read_lines(run / "scores.jsonl")
    means = [stats.query_means(stats.where(scores, "policy", policy), "excellent") for policy in (name, "sft")]
    folder, reward = (run, name.removeprefix("grpo_"))
    if not name.startswith("grpo_"):
        variant, _, reward = name.rpartition("_")
        folder = run / "variants" / variant
    return {
        "distinct_texts": own["distinct_texts"] / sft["distinct_texts"],
        "distinct_2": own["distinct_2"] / sft["distinct_2"],
        "copied": own["copied_12"]["sft"] - sft["copied_12"]["sft"],
        "self_overlap": own["self_overlap"] - sft["self_overlap"],
        "gain": stats.paired_difference(*means),
        "without_spread": read_summary(folder, f"04_summary_{reward}")["without_spread"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 2, 3], help="(%(default)s)")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs/variety", help="folder of the runs (%(default)s)")
    args = parser.parse_args()
    rows: dict[str, dict[int, dict]] = {}
    for seed in args.seeds:
        run = args.runs / f"seed_{seed}"
        run_seed(run, seed)
        figures = read_summary(run, "05_summary")
        for name in figures["policies"]:
            if name not in ("base", "sft"):
                rows.setdefault(name, {})[seed] = row(run, name, figures)
    (args.runs / "variety.json").write_text(json.dumps(rows, indent=1) + "\n")

    titles = "different texts / SFT's | distinct-2 / SFT's | copies, points over SFT | likeness of samples over SFT"
    print(f"\n| policy | seed | excellence over SFT, points | {titles} | groups without spread |\n|{'---|' * 8}")
    for name, seeds in rows.items():
        for seed, one in seeds.items():
            value, lo, hi = (100 * one["gain"][key] for key in ("value", "lo", "hi"))
            gain = f"{value:+.1f} [{lo:+.1f}, {hi:+.1f}]"
            cells = [f"{one['distinct_texts']:.2f}", f"{one['distinct_2']:.2f}", f"{100 * one['copied']:+.0f}"]
            cells += [f"{one['self_overlap']:+.3f}", f"{one['without_spread']:.0%}"]
            print(f"| {name} | {seed} | {gain} | {' | '.join(cells)} |")

    def mean(name: str, figure: str) -> float:
        values = [one[figure]["value"] if figure == "gain" else one[figure] for one in rows[name].values()]
        return statistics.mean(values)

    n = len(args.seeds)
    print(f"\nMeans of {n} seeds; in brackets what was aimed at.")
    for reward in REWARDS:
        ours, without = f"grpo_{reward}", f"w0_{reward}"
        wanted = {"distinct_texts": DISTINCT, "distinct_2": 1, "gain": GAIN * mean(without, "gain"), "copied": 0}
        for figure, least in wanted.items():
            values = f"{mean(ours, figure):.3f}, without novelty {mean(without, figure):.3f}"
            print(f"{ours}, {figure.replace('_', ' ')} beside SFT's: {values} [{least:.3f}]")
    spread = mean("grpo_judge", "without_spread")
    before, gain = mean("of_8_judge", "without_spread"), 100 * mean("of_8_judge", "gain")
    ratio = f"ratio {spread / max(before, 1e-9):.2f} [{SPREAD}]"
    print(f"groups without spread: {spread:.0%}, of 8 {before:.0%}, {ratio}; those gain {gain:+.1f} points")


if __name__ == "__main__":
    main()
