"""How far the engine's log-probabilities are from the trainer's: heads in bf16 and in fp32, after the engine slept, and
where it serves the original weights of a policy in 4 bits, which --max-gap has to catch.

    python bench/gap.py                  # vLLM; on a GPU the random 7B model of bench/memory.py, else the tiny model
    python bench/gap.py --row sleep      # one row of ROWS; the table has those that were made so far
    python bench/gap.py --policy DIR --bits 16 --frozen    # this model, in bf16 whatever the machine, and no updates

Each row is a run of step 4 in a process of its own: four steps from an SFT adapter, with the rule-based critic as the
judge. On a CPU an engine does not sleep, so that row is left out. A CPU without instructions for bf16 runs forward
passes in it slowly and backward passes hardly at all: --frozen computes in bf16 there too, and learns nothing.
"""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.memory import copy_of, random_model, write_data
from common.offline.tiny_model import tiny_policy

GAP, RATIO = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
FEW = ["--queries-per-step", 4, "--mini-batch", 4]  # of a pretrained model on a CPU
SMALL = ["--queries-per-step", 16, "--mini-batch", 16, "--samples", 4, "--micro-batch", 8, "--learning-rate", 1e-4]
ROWS = {"bf16": "heads in bf16", "fp32": "heads in fp32", "sleep": "heads in fp32, with --sleep"}
ROWS["original"] = "heads in fp32, the engine with the original weights"
FIGURES = (f"{GAP}/mean", f"{GAP}/max", f"{RATIO}/mean", "seconds/sync", "step_time")


def learn_nothing_in_bf16() -> None:
    """From here on an update is its rollouts and their log-probabilities alone, and models compute in bf16."""
    import torch
    import transformers

    from common import policy, trainers

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._prepare_inputs(inputs)
        return torch.zeros((), device=self.accelerator.device)

    trainers.multiplies_in_bf16 = lambda: True
    policy.compute_dtype = lambda path, bits: torch.bfloat16
    transformers.Trainer.training_step = training_step


def step_4_with(row: str) -> int:
    """Run 04_grpo.py, whose flags follow on the command line, with what this row changes."""
    import trl

    from common import engine as room

    heads = "bf16" if row == "bf16" else "fp32"
    if row == "original":
        room.rollout_base = lambda base, bits: base
    if "--frozen" in sys.argv:
        sys.argv.remove("--frozen")
        learn_nothing_in_bf16()

    sys.argv.pop(1)
    grpo, class_as_is, config_as_is = importlib.import_module("04_grpo"), room.engine_class, trl.GRPOConfig

    def config(**settings):
        return config_as_is(**settings | {"cast_lm_head_to_fp32": heads == "fp32"})

    def engine_class(*inputs):
        kind = class_as_is(*inputs)
        base, as_is = kind.__mro__[1], kind.__mro__[1].__init__

        def init(self, **options):
            options.pop("hf_overrides", None)
            as_is(self, **options, hf_overrides={"head_dtype": "float32"} if heads == "fp32" else {})

        base.__init__ = init
        return kind

    trl.GRPOConfig, room.engine_class = config, engine_class
    return grpo.run_folder.launch(grpo.main, grpo.parse_args())


def run(*command: object) -> None:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}\n{done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench_gpu")
    parser.add_argument("--row", choices=ROWS, help="this one alone")
    parser.add_argument("--policy", type=Path, help="a folder with a model, instead")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4, help="of the policy (%(default)s)")
    parser.add_argument("--frozen", action="store_true", help="compute in bf16 anywhere, and learn nothing")
    args = parser.parse_args()
    import torch

    if not importlib.util.find_spec("vllm"):
        print("vLLM is not installed here: there is no engine to compare with; pip install -r requirements.txt")
        return
    gpu = torch.cuda.is_available()
    policy = args.policy or (args.out / "model_None" if gpu else tiny_policy())
    if not (policy / "config.json").is_file():
        random_model(policy, None)
    folder, length = args.out / "gap", 256 if gpu else 24
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder, 40)
    version = {"principles": ["读来通顺。"], "accepted": True, "version": 0}
    (folder / "principles.jsonl").write_text(json.dumps(version, ensure_ascii=False) + "\n", encoding="utf-8")
    common = ["--offline", "--policy", policy, "--bits", args.bits]
    gentle = ["--sft-learning-rate", 1e-4]  # the tiny model's rate would break a pretrained one
    run("04_grpo.py", "--reward", "none", "--sft-epochs", 0.2, *gentle, "--run", folder, *common, "--redo")  # once
    flags = ["--reward", "judge", "--engine", "vllm", "--watch-every", 0, "--steps", 4, *SMALL]
    flags += ["--max-tokens", length, "--queries", folder / "queries.jsonl", "--max-gap", 9]
    flags += FEW if args.policy and not gpu else []
    flags += ["--frozen"] if args.frozen else []

    path, machine = args.out / "gap.json", torch.cuda.get_device_name() if gpu else "CPU"
    setting = {"machine": machine, "policy": policy.name, "bits": args.bits, "frozen": args.frozen, "tokens": length}
    report = json.loads(path.read_text()) if path.is_file() else {}
    for row in [args.row] if args.row else ROWS:
        if row == "sleep" and not gpu:
            print("an engine does not sleep on a CPU: that row is left out")
            continue
        if row == "original" and args.bits == 16:
            print("in 16 bits the engine has the original weights in any case: that row is left out")
            continue
        # In a folder of its own: in this one the second row would find step 4 done.
        own = copy_of(folder, args.out / f"gap_{row}")
        run(__file__, row, *common, *flags, "--run", own, *["--sleep"] * (row == "sleep"))
        steps = [json.loads(line) for line in (own / "metrics_judge.jsonl").read_text().splitlines()]
        report[row] = {**setting, "steps": len(steps) - 1}
        for name in FIGURES:
            values = [step[name] for step in steps[1:] if name in step]  # the first step compiles kernels
            report[row][name] = sum(values) / len(values)
        path.write_text(json.dumps(report, indent=1) + "\n")
    model = f"{machine}, {policy.name}, {args.bits} bits"
    print(f"{model}, completions of at most {length} tokens, the steps after the first\n")
    print("| run | gap, mean | gap, largest token | importance ratio, mean | sync, s | step, s |")
    print("|---|---|---|---|---|---|")
    for row, title in ROWS.items():
        if report.get(row, {}).items() >= setting.items():  # not one of another call's model or bits
            print(f"| {title} | {' | '.join(f'{report[row][name]:.4f}' for name in FIGURES)} |")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ROWS:
        sys.exit(step_4_with(sys.argv[1]))
    main()
