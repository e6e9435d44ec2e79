"""Write what verl needs to run step 4's GRPO on a cluster: prompts, a reward function, and a command to start it.

Writes  DIR/train.parquet and test.parquet with the columns of the authors' release, reward.py (the reward of
        common/rewards.py in verl's form), run.sh (full fine-tuning at the paper's settings)
Example python tools/export_verl.py outputs/verl --reward judge --base-url https://endpoint.example/v1
        bash outputs/verl/run.sh
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import records, run_folder
from common.endpoint import add_endpoint_flags
from common.memory import add_memory_flags
from common.policy import MAX_PROMPT, add_policy_flags, policy_path
from common.prompts import conversation
from common.run_folder import ROOT
from common.trainers import add_grpo_flags

TEMPLATES = ROOT / "tools/templates"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("export").add_argument
    add("directory", type=Path, metavar="DIR", help="where it is written")
    add("--reward", choices=("rm", "judge"), required=True, help="as in 04_grpo.py")
    add("--rm", type=Path, help="reward model (RUN/rm)")
    add("--principles", type=Path, help="versions of step 3 (RUN/principles.jsonl)")
    heldout = ROOT / "data/queries_heldout.jsonl"
    add("--test-queries", type=Path, default=heldout, help="of test.parquet (%(default)s)")
    add_grpo_flags(parser)
    add_policy_flags(parser)
    add_memory_flags(parser)
    add_endpoint_flags(parser)
    run_folder.add_run_flags(parser)
    args = run_folder.parse(parser, {"bits": 16})
    if args.novelty:
        run_folder.fail(
            "verl asks for the reward of one completion at a time, which has no novelty: leave --novelty out"
        )
    args.directory = args.directory.resolve()
    args.rm = args.rm or args.run / "rm"
    args.principles = args.principles or args.run / "principles.jsonl"
    return args


def write_prompts(args: argparse.Namespace, split: str, queries: Path) -> None:
    """SPLIT.parquet: a prompt per query, which is also the "ground truth" that verl hands to the reward function."""
    from datasets import Dataset, Features, List, Value

    text = Value("string")
    columns = {
        "prompt": List({"content": text, "role": text}),
        "data_source": text,
        "ability": text,
        "reward_model": {"ground_truth": text, "style": text},
        "extra_info": {"index": Value("int64"), "split": text},
    }
    rows = []
    for number, query in enumerate(records.read(queries, records.Query)):
        row = {
            "prompt": conversation(query.query, args.prompts),
            "data_source": "greetings",
            "ability": "text_generation",
            "reward_model": {"ground_truth": query.query, "style": "rule"},
            "extra_info": {"index": number, "split": split},
        }
        rows.append(row)
    path = args.directory / f"{split}.parquet"
    Dataset.from_list(rows, features=Features(columns)).to_parquet(path)
    print(f"{len(rows)} prompts in {path}")


def reward_settings(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """(flags that reward.py rebuilds its `args` from, names of those that are paths)."""
    flags, paths = {}, []
    for name, value in vars(args).items():
        if isinstance(value, Path):
            paths.append(name)
            value = str(value.resolve())
        if name != "flag_groups":
            flags[name] = value
    flags["run"] = str(args.directory)  # its answers and rollouts go there
    return flags, paths


def main(args: argparse.Namespace) -> int:
    base = policy_path(args)
    args.directory.mkdir(parents=True, exist_ok=True)
    write_prompts(args, "train", args.queries)
    write_prompts(args, "test", args.test_queries)
    flags, paths = reward_settings(args)
    slots = {**vars(args), "base": base, "root": str(ROOT), "most_prompt": MAX_PROMPT, "flags": flags, "paths": paths}
    for name in ("reward.py", "run.sh"):
        template = (TEMPLATES / f"verl_{name}.txt").read_text(encoding="utf-8")
        run_folder.replace_file(args.directory / name, template.format(**slots))
    print(f"start it with: bash {args.directory / 'run.sh'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_folder.launch(main, parse_args()))
