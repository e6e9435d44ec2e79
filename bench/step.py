"""An update of step 4 beside TRL's stock trainer, and how far 20 of them move a policy at each learning rate.

    python bench/step.py --policy DIR --repeats 3    # seconds of one update by phase; without --policy the tiny model
    python bench/step.py --sweep --policy DIR        # learning rates; a sweep that was stopped goes on from there

Stock and ours are one trainer with one model, settings and rollouts: only what common/grpo_trainer.py overrides of the
passes is TRL's own or ours. Commit f7aa587 had TRL's own, and on a CPU a base in fp32, head included. The rollouts are
the policy's, padded as TRL pads. Nothing is learnt from them: the gradients are dropped.

The sweep runs 04_grpo.py from one SFT adapter, each rate in a folder of its own, rewarded by the rule-based critic.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.memory import copy_of
from common.characters import REFERENCES
from common.grpo_trainer import GAP, grpo_trainer, of_like_length
from common.offline.tiny_model import tiny_policy
from common.policy import generate, load_policy, lora, silence_libraries
from common.prompts import PROMPTS, conversation, read_rules
from common.records import Query, Reference, read, read_lines, write
from common.run_folder import positive
from common.trainers import fix_trainer, trainer_settings

PHASES = ("old log-probabilities", "reference log-probabilities", "forward", "backward")
TARGET = 0.6  # of the stock trainer's time
RATES = (3e-6, 1e-5, 3e-5, 1e-4)
# 16 completions an update, and two updates of each rollout, as at step 4's defaults.
SWEEP = ["--queries-per-step", 4, "--mini-batch", 2, "--samples", 8, "--kl", 0.001, "--max-tokens", 32]
SWEEP += ["--temperature", 0.8, "--micro-batch", 8, "--watch-every", 0, "--save-every", 1, "--max-gap", 9]
SWEEP += ["--novelty", 0, "--no-constraints"]


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    file = Path("/proc/cpuinfo")  # Linux alone has it
    named = re.findall(r"model name\s*: (.+)", file.read_text()) if file.is_file() else []
    return f"{named[0] if named else platform.processor()}, {os.cpu_count()} cores"


# ---- one update -----------------------------------------------------------------------------------------------------


def build_trainer(args: argparse.Namespace, fp32: bool):
    """Step 4's trainer with a new adapter, which it never trains."""
    from datasets import Dataset
    from peft import get_peft_model
    from trl import GRPOConfig

    model, tokenizer = load_policy(str(args.policy), args.bits)
    if fp32:
        model.float()
    model = get_peft_model(model, lora(16, "CAUSAL_LM"))
    passes = args.rows // args.micro_batch
    settings = {"num_generations": 2, "beta": 0.001, "use_bias_correction_kl": False, "cast_lm_head_to_fp32": True}
    settings |= {"gradient_accumulation_steps": passes, "steps_per_generation": passes, "report_to": []}
    settings |= {"per_device_train_batch_size": args.micro_batch, **trainer_settings(model)}
    config = GRPOConfig(output_dir=tempfile.mkdtemp(), **settings)

    async def no_rewards(completions: list, **rest: object) -> list[float]:
        return [0.0] * len(completions)

    no_rows = Dataset.from_list([{"prompt": conversation("生日", PROMPTS)}] * args.rows)
    parts = {"train_dataset": no_rows, "processing_class": tokenizer}
    trainer = grpo_trainer(argparse.Namespace(max_gap=9), model, no_rewards, config, **parts)
    fix_trainer(trainer)
    trainer.current_gradient_accumulation_steps = passes  # this and the next are set where a training begins
    if config.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()
    trainer.model.train()
    return trainer


def rollouts(args: argparse.Namespace, model, tokenizer) -> tuple[dict, float]:
    """(what the policy writes, as TRL hands rollouts on, seconds of writing it), four completions of each query.

    Prompts are padded on the left, completions on the right, (rows, longest). Half have an advantage of 1, half of -1.
    """
    import torch
    from trl.trainer.utils import pad

    queries = random.Random(0).sample(read(ROOT / "data/queries.jsonl", Query), args.rows // 4)
    asked = [conversation(query.query, PROMPTS) for query in queries for _ in range(4)]
    started = time.perf_counter()
    how = {"temperature": 1.0, "max_tokens": args.max_tokens, "batch_size": args.rows, "seed": 0}
    texts = generate(model, tokenizer, asked, **how)
    seconds = time.perf_counter() - started
    prompts, completions = [], []
    for prompt, text in zip(asked, texts, strict=True):
        prompts.append(torch.tensor(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]))
        written = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        completions.append(torch.tensor(written))
    batch = {"advantages": torch.tensor([1.0, -1.0]).repeat(args.rows // 2)}
    for name, tokens, side in (("prompt", prompts, "left"), ("completion", completions, "right")):
        batch[f"{name}_ids"] = pad(tokens, tokenizer.pad_token_id, side)
        batch[f"{name}_mask"] = pad([torch.ones_like(text) for text in tokens], 0, side)
    return batch, seconds


def update(trainer, batch: dict, stock: bool) -> tuple[dict[str, float], object]:
    """(seconds of each phase of an update, the rollouts' old log-probabilities), by TRL's function or ours."""
    import torch
    from trl import GRPOTrainer
    from trl.trainer.utils import split_tensor_dict, use_adapter

    name = "_get_per_token_logps_and_entropies"
    vars(trainer).pop(name, None)
    if stock:  # instead of our class's
        setattr(trainer, name, MethodType(getattr(GRPOTrainer, name), trainer))
    seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def timed(phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[phase] += time.perf_counter() - started

    # As TRL does it: both log-probabilities of all rollouts first, then forward and backward pass by pass.
    model, micro_batch = trainer.model, trainer.args.per_device_train_batch_size
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    score = getattr(trainer, name)
    inputs = (model, ids, mask, batch["completion_ids"].shape[1], micro_batch)
    with torch.no_grad():
        with timed("old log-probabilities"):
            old = score(*inputs)[0]
        with timed("reference log-probabilities"), use_adapter(model, "ref"):
            reference = score(*inputs)[0]
    rows = batch | {"old_per_token_logps": old, "ref_per_token_logps": reference}
    passes = len(ids) // micro_batch
    parts = split_tensor_dict(rows, passes)
    for part in parts if stock else of_like_length(parts, passes):
        part["num_items_in_batch"] = batch["completion_mask"].sum()
        with timed("forward"):
            loss = trainer._compute_loss(model, part)
        with timed("backward"):
            loss.backward()
    model.zero_grad()
    return seconds, old


def compare(args: argparse.Namespace) -> None:
    """Print the table of phases, ours beside TRL's own, and write step.json."""
    import torch

    trainers = {"stock": build_trainer(args, fp32=False)}
    trainers["ours"] = trainers["stock"]
    device = trainers["ours"].accelerator.device
    if device.type == "cpu" and trainers["ours"].model.dtype == torch.bfloat16:
        trainers["f7aa587"] = build_trainer(args, fp32=True)
    batch, writing = rollouts(args, trainers["ours"].model, trainers["ours"].processing_class)
    batch = {key: value.to(device) for key, value in batch.items()}
    # The weights are read from the disk and kernels compiled in the first passes, which are not counted.
    few = {key: value[: args.micro_batch] for key, value in batch.items()}
    seconds: dict[str, list[dict]] = {who: [] for who in trainers}
    logps = {}
    for who, trainer in trainers.items():
        update(trainer, few, who != "ours")
    for repeat in range(args.repeats):
        turns = list(trainers)[:: 1 if repeat % 2 == 0 else -1]
        for who in turns:
            phases, logps[who] = update(trainers[who], batch, who != "ours")
            seconds[who].append(phases | {"together": sum(phases.values())})
            print(f"repeat {repeat + 1}, {who}: {sum(phases.values()):.1f} s", file=sys.stderr, flush=True)

    written = batch["completion_mask"].bool()
    difference = (logps["stock"] - logps["ours"])[written].abs().mean().item()
    lengths = written.sum(1).tolist()
    shape = f"{args.rows} rollouts of {min(lengths)} to {max(lengths)} tokens (mean {statistics.mean(lengths):.0f})"
    dtype = str(trainers["ours"].model.dtype).removeprefix("torch.")
    print(f"{machine()}; {args.policy.name}, {dtype}, {shape}, {args.micro_batch} a pass, {args.repeats} repeats\n")
    print(f"| phase, s | {' | '.join(trainers)} | ours / stock |\n|{'---|' * (len(trainers) + 2)}")
    ratios = {}
    for phase in (*PHASES, "together"):
        cells, medians = [], {}
        for who in trainers:
            values = [phases[phase] for phases in seconds[who]]
            medians[who] = statistics.median(values)
            cells.append(f"{medians[who]:.2f} [{min(values):.2f}, {max(values):.2f}]")
        ratios[phase] = medians["ours"] / medians["stock"]
        print(f"| {phase} | {' | '.join(cells)} | {ratios[phase]:.2f} |")
    print(f"\ntarget: {TARGET} together. The two log-probabilities of a token differ by {difference:.1e} in the mean.")
    print(f"Writing the rollouts took {writing:.1f} s, of which nothing is in the table.")
    report = {"machine": machine(), "policy": str(args.policy), "dtype": dtype, "lengths": lengths}
    report |= {"micro_batch": args.micro_batch, "seconds": seconds, "ratios": ratios, "difference": difference}
    (args.out / "step.json").write_text(json.dumps(report | {"writing": writing}, indent=1) + "\n")


# ---- learning rates -------------------------------------------------------------------------------------------------


def step_4(args: argparse.Namespace, run: Path, *flags: object) -> None:
    """Run 04_grpo.py in this folder: it goes on where it was stopped, and begins again with other settings."""
    command = [sys.executable, "04_grpo.py", "--run", run, "--policy", args.policy, "--bits", args.bits, "--redo"]
    if subprocess.run([*map(str, command), *map(str, flags)], cwd=ROOT).returncode:
        sys.exit(f"stopped in {run}; the same command goes on from there")


def sweep(args: argparse.Namespace) -> None:
    """Print KL, reward and gap after some updates at each learning rate, and write sweep.json."""
    # One SFT for all rates: they differ in nothing else, and the KL of each is measured from it.
    folder = args.out / "sweep" / args.policy.name
    start = folder / "sft"
    start.mkdir(parents=True, exist_ok=True)
    rows = []
    for reference in random.Random(0).sample(read(REFERENCES, Reference), 64):
        greeting = [{"role": "assistant", "content": reference.response}]
        rows.append({"prompt": conversation(reference.query, PROMPTS), "completion": greeting})
    write(start / "sft.jsonl", rows)
    # Under all that it knows the critic accepts nothing that such a policy writes, and there is nothing to learn: the
    # principles that step 3 begins with, without the one about length.
    rules = [rule for rule in read_rules(PROMPTS / "principles.md") if "短" not in rule]
    version = {"principles": rules, "accepted": True, "version": 0}
    write(start / "principles.jsonl", [version])
    # Gently, since a few steps at step 4's rate leave a small pretrained model without its language.
    step_4(args, start, "--reward", "none", "--sft-epochs", 1, "--sft-learning-rate", 2e-5)

    engine = "vllm" if importlib.util.find_spec("vllm") else "hf"  # without an engine there is no gap to it
    flags = ["--offline", "--reward", "judge", "--engine", engine, "--steps", args.updates, *SWEEP]
    report = {}
    for rate in RATES:
        run = folder / f"{rate:g}"
        if not run.is_dir():
            copy_of(start, folder / "copy").rename(run)
        step_4(args, run, *flags, "--learning-rate", rate)
        steps = read_lines(run / "metrics_judge.jsonl")
        rewards = [step["raw_reward"] for step in steps if "raw_reward" in step]
        gaps = [step[GAP] for step in steps if GAP in step]
        last = steps[-max(1, len(steps) // 4) :]  # one update's KL is of few texts
        figures = {"kl": statistics.mean(step["kl"] for step in last), "reward_first": rewards[0]}
        figures["reward_last"] = statistics.mean(rewards[-2:])
        report[f"{rate:g}"] = figures | {"gap": gaps[-1] if gaps else None, "updates": len(steps)}
    (args.out / "sweep.json").write_text(json.dumps({"machine": machine(), "rates": report}, indent=1) + "\n")

    print(f"\n{machine()}; {args.policy.name}, {args.bits} bits, {args.updates} updates of 16 completions, once each\n")
    print("| learning rate | KL to the reference, nats per token | reward, first to last rollouts | gap |")
    print("|---|---|---|---|")
    for rate, figures in report.items():
        gap = "-" if figures["gap"] is None else f"{figures['gap']:.4f}"
        reward = f"{figures['reward_first']:.2f} to {figures['reward_last']:.2f}"
        print(f"| {rate} | {figures['kl']:.5f} | {reward} | {gap} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench_gpu")
    parser.add_argument("--policy", type=Path, help="a folder with a model (the tiny model)")
    parser.add_argument("--bits", type=int, choices=(4, 16), help="of its weights (4 on a GPU, else 16)")
    parser.add_argument("--rows", type=positive, default=16, help="rollouts of the update (%(default)s)")
    parser.add_argument("--max-tokens", type=positive, default=128, help="of a rollout (%(default)s)")
    parser.add_argument("--micro-batch", type=positive, default=8, help="completions in one pass (%(default)s)")
    parser.add_argument("--repeats", type=positive, default=3, help="of each trainer, in turns (%(default)s)")
    parser.add_argument("--sweep", action="store_true", help="learning rates instead")
    parser.add_argument("--updates", type=positive, default=20, help="of each learning rate (%(default)s)")
    args = parser.parse_args()
    if args.rows % args.micro_batch or args.rows % 4:
        parser.error("--rows must be a multiple of --micro-batch and of 4")
    silence_libraries()
    import torch

    args.policy = (args.policy or tiny_policy()).resolve()
    args.bits = args.bits or (4 if torch.cuda.is_available() else 16)
    args.out.mkdir(parents=True, exist_ok=True)
    sweep(args) if args.sweep else compare(args)


if __name__ == "__main__":
    main()
