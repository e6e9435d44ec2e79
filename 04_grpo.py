"""Step 4: teach the policy. SFT on the accepted greetings (--reward none), then GRPO with a reward.

--reward none   SFT of a LoRA adapter on sft.jsonl, from which every GRPO run starts
--reward rm     A: GRPO on the score of step 2's reward model
--reward judge  B: GRPO on the verdict, 0 or 1, of the judge under step 3's principles (--graded: its probability)
--reward likelihood  GRPO on how likely the language model of --likelihood finds the text: no judge is asked

The loop of GRPO is TRL's. One step of it:

    the engine writes --samples greetings for each of --queries-per-step queries              common/engine.py
    each greeting gets a reward, or None where the judge failed, which teaches nothing        common/rewards.py
    --novelty lowers the rewards of greetings that are like others                            common/novelty.py
    its advantage is its reward minus the mean of its query's rewards, divided by their       TRL
        standard deviation (with --novelty, that of all rewards of the step)
    the engine's log-probabilities are compared with the trainer's before anything is         common/grpo_trainer.py
        learnt, though the rewards are paid for by then: beyond --max-gap the run stops
    the completions are shuffled, and the adapter is updated once for every --mini-batch      TRL
        queries' worth of them, with the loss "dapo" and --kl to the SFT policy
    the adapter alone is sent to the engine, as the next step begins                          common/engine.py

`step` in the files, and --steps, count updates, as TRL does; a GRPO step has queries-per-step / mini-batch of them.
--watch-every and --save-every count GRPO steps.

Every --watch-every steps a rubric, which is not a reward, grades greetings for the same queries. Where the reward has
risen and these grades have fallen beyond noise, where completions show more and more signs of not being greetings
(common/signs.py), or where more and more queries get one text, the policy is gaming its reward (common/watch.py).

Reads   queries, sft.jsonl (none), rm/ (rm), principles.jsonl (judge), policy_sft/ (all but none)
Writes  policy_sft/, policy_rm/, policy_judge/ or policy_likelihood/, policy_*_best/ (the best that the watch saw),
        policy_*_checkpoints/, rollouts_*.jsonl (every completion with its reward), metrics_*.jsonl and .svg,
        watch_*.jsonl, 04_summary_{none,rm,judge,likelihood}.json
Paper   arXiv 2508.21476: 32 queries per step, 4 samples, 512 tokens, mini-batch 16, KL 0.001 (low-variance estimator),
        5 epochs, learning rate 3e-7 for full fine-tuning on 4 GPUs. Departures: QLoRA on one GPU, whose best learning
        rate is about ten times that of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret"): 3e-6.
        TRL's default loss, "dapo": GRPO's, averaged over the tokens of the step. A completion that breaks a constraint
        of its query gets verdict 0 and the judge is not asked (--no-constraints as in the paper).
Example python 04_grpo.py --reward judge --offline --run outputs/mine
        python 04_grpo.py --reward judge --plan
"""

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from common import records, run_folder, trainers
from common.characters import REFERENCES
from common.client import Client
from common.endpoint import add_endpoint_flags, endpoint_name
from common.engine import adapter_sync, add_engine_flag, choose_engine
from common.grpo_trainer import GAP, grpo_trainer
from common.judge import current_principles
from common.likelihood import WORTH
from common.memory import add_memory_flags, check_gpu, engine_share, peak_gib, show_plan, uses_likelihood
from common.novelty import learnt_by_heart
from common.policy import (
    MAX_PROMPT,
    add_policy_flags,
    check_adapter,
    load_policy,
    load_tokenizer,
    lora,
    policy_path,
    save_adapter,
    silence_libraries,
)
from common.prompts import conversation, prompt_hashes
from common.rewards import Rewards
from common.signs import COUNTED
from common.store import open_store
from common.watch import OF_TEXTS, Watch, first_and_last_tenth, watch_callback

OFFLINE = {"bits": 16, "engine": "hf", "sft_epochs": 4, "sft_learning_rate": 2e-3, "save_every": 4, "watch_every": 4}
OFFLINE |= {"learning_rate": 1.5e-3, "kl": 0.05, "steps": 48, "samples": 16, "queries_per_step": 8, "mini_batch": 4}
OFFLINE |= {"micro_batch": 64, "max_tokens": 48, "novelty": 0.5}
RATIO = "sampling/importance_sampling_ratio"  # TRL's name for the trainer's probability over the engine's
PANELS = {"reward": ["raw_reward", "reward", "reward_std"]}
PANELS |= {"length, diversity": ["reward_length_correlation", "distinct_2"]}
PANELS |= {"tokens": ["completions/mean_length"], "KL, gap, ratio": ["kl", GAP, f"{RATIO}/min"]}
PANELS |= {"signs": [f"signs/{name}" for name in COUNTED]}
PANELS |= {"shares": ["without_spread", "completions/clipped_ratio", "novelty"]}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("reward").add_argument
    add("--reward", choices=("none", "rm", "judge", "likelihood"), required=True, help="none: SFT; else GRPO")
    add("--rm", type=Path, help="reward model (RUN/rm)")
    add("--principles", type=Path, help="versions of step 3 (RUN/principles.jsonl); the last accepted judges")
    add = parser.add_argument_group("SFT").add_argument
    add("--sft", type=Path, help="demonstrations (RUN/sft.jsonl)")
    add("--sft-epochs", type=float, default=3, help="%(default)s")
    add("--sft-learning-rate", type=float, default=1e-4, help="%(default)s")
    add("--sft-batch-size", type=run_folder.positive, default=16, help="%(default)s")
    trainers.add_grpo_flags(parser)
    add = parser.add_argument_group("watch").add_argument
    add("--watch-every", type=int, default=20, help="GRPO steps between two looks of the watch; 0: none (%(default)s)")
    add("--watch-queries", type=run_folder.positive, default=64, help="that it looks at (%(default)s)")
    # The rest changes when a run stops and what it saves, not what it computes.
    add = parser.add_argument_group("course of the run").add_argument
    add("--stop-on-hack", action="store_true", help="end when the watch says that the reward is gamed")
    gap = "mean difference of a token's log-probability, engine to trainer, that always stops the run (%(default)s)"
    add("--max-gap", type=float, default=0.1, help=gap)
    add("--save-every", type=run_folder.positive, default=10, help="GRPO steps between checkpoints (%(default)s)")
    add("--report-to", nargs="*", default=[], help="trackers that TRL knows and that are installed, such as wandb")
    add("--plan", action="store_true", help="train nothing: print what will be on the GPU, and whether it fits")
    add_policy_flags(parser)
    add_engine_flag(parser)
    add_memory_flags(parser)
    add_endpoint_flags(parser)
    run_folder.add_run_flags(parser)
    args = run_folder.parse(parser, OFFLINE)
    args.sft = args.sft or args.run / "sft.jsonl"
    args.rm = args.rm or args.run / "rm"
    args.principles = args.principles or args.run / "principles.jsonl"
    args.name = "policy_sft" if args.reward == "none" else f"policy_{args.reward}"
    if args.reward == "likelihood" and not args.likelihood:
        run_folder.fail("--reward likelihood takes a language model: --likelihood Qwen/Qwen2.5-1.5B-Instruct, say")
    if args.queries_per_step % args.mini_batch:
        run_folder.fail("--queries-per-step must be a multiple of --mini-batch")
    if args.samples < 2 or args.mini_batch * args.samples % args.micro_batch:
        run_folder.fail("--mini-batch x --samples must be a multiple of --micro-batch, and --samples at least 2")
    return args


# ---- SFT ------------------------------------------------------------------------------------------------------------


def sft(args: argparse.Namespace, base: str) -> dict:
    """Train policy_sft/ on the demonstrations; returns the figures for the summary."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = records.read(args.sft, records.Demonstration, f"python 01_curate_preferences.py --run {args.run}")
    model, tokenizer = load_policy(base, args.bits)
    checkpoints = args.run / f"{args.name}_checkpoints"
    batch, accumulation = trainers.per_process(args.sft_batch_size, 1)
    config = SFTConfig(
        output_dir=str(checkpoints), num_train_epochs=args.sft_epochs, seed=args.seed, max_length=768,
        learning_rate=args.sft_learning_rate, lr_scheduler_type="cosine", warmup_steps=0.05,  # a share of all steps
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, logging_steps=1,
        save_strategy="epoch", save_total_limit=1, report_to=args.report_to, **trainers.trainer_settings(model),
    )  # fmt: skip
    data = Dataset.from_list([row.model_dump(include={"prompt", "completion"}) for row in rows])
    adapter = lora(args.rank, "CAUSAL_LM")
    bar = trainers.progress_callback("SFT", ["loss"], args.run / "metrics_none.jsonl")
    trainer = SFTTrainer(
        model, config, train_dataset=data, processing_class=tokenizer, peft_config=adapter, callbacks=[bar]
    )
    trainers.fix_trainer(trainer)
    trainers.resume_training(args, trainer, checkpoints)
    trainer.save_model(str(args.run / args.name))
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"steps": trainer.state.global_step, "rows": len(rows), "loss": {"first": losses[0], "last": losses[-1]}}


# ---- GRPO -----------------------------------------------------------------------------------------------------------


def grpo(args: argparse.Namespace, base: str) -> dict:
    """Train policy_rm/, policy_judge/ or policy_likelihood/ from policy_sft/; returns the figures for the summary."""
    queries = trainers.fitting_queries(args, base)
    rewards = Rewards(args, base, learnt_by_heart(args.sft))
    watch = Watch(args, queries)
    # TRL builds its engine with the trainer, so that is when it has to be ours.
    with adapter_sync(base, args.bits, args.rank, args.seed) if args.engine == "vllm" else nullcontext():
        trainer = build_trainer(args, base, queries, rewards, watch)
    try:
        trainers.resume_training(args, trainer, Path(trainer.args.output_dir))
    except run_folder.Stop as e:
        run_folder.fail(str(e))
    if not run_folder.main_process():
        return {}
    save_adapter(trainer.model, args.run / args.name)
    trainer.processing_class.save_pretrained(args.run / args.name)
    steps = records.read_lines(args.run / f"metrics_{args.reward}.jsonl")
    looks = records.read_lines(watch.path)
    panels = {}
    for title, names in PANELS.items():
        panels[title] = {name: [(row["step"], row[name]) for row in steps if name in row] for name in names}
    panels["the watch"] = {}
    for name, label in (("quality", "rubric's mean grade"), ("likelihood", "likelihood, nats per token")):
        panels["the watch"][label] = [(look["step"], look[name]) for look in looks if look.get(name)]
    trainers.draw_curves(args.run / f"metrics_{args.reward}.svg", panels)
    return grpo_figures(args, trainer, steps, looks)


def build_trainer(args: argparse.Namespace, base: str, queries: list[records.Query], rewards: Rewards, watch: Watch):
    """TRL's GRPO trainer: on the SFT policy, with our rewards, the check of the rollouts, and the watch."""
    from datasets import Dataset
    from peft import load_peft_weights, set_peft_model_state_dict
    from trl import GRPOConfig

    model, tokenizer = load_policy(base, args.bits, args.run / "policy_sft", trainable=True)
    prompts = [{"prompt": conversation(query.query, args.prompts), "query": query.query} for query in queries]

    # TRL counts in passes of --micro-batch completions: `passes` of them make an update, and `updates` use up a step.
    updates = args.queries_per_step // args.mini_batch
    passes = args.mini_batch * args.samples // args.micro_batch
    micro_batch, accumulation = trainers.per_process(args.micro_batch, passes)
    config = GRPOConfig(
        output_dir=str(args.run / f"{args.name}_checkpoints"), num_train_epochs=args.epochs, max_steps=args.steps,
        learning_rate=args.learning_rate, lr_scheduler_type="constant_with_warmup", warmup_steps=2, seed=args.seed,
        per_device_train_batch_size=micro_batch, num_generations=args.samples, beta=args.kl,
        gradient_accumulation_steps=accumulation, steps_per_generation=accumulation * updates,
        max_completion_length=args.max_tokens, temperature=args.temperature, logging_steps=1,
        # Rollouts are not in a checkpoint, so it is taken only when those of a step are used up.
        save_strategy="steps", save_steps=args.save_every * updates, save_total_limit=2,
        use_vllm=args.engine == "vllm", vllm_mode="colocate", vllm_enable_sleep_mode=args.sleep,
        vllm_max_model_length=MAX_PROMPT + args.max_tokens, vllm_gpu_memory_utilization=engine_share(args, base),
        # The engine's log-probabilities are not the trainer's to the bit. Each token's term is multiplied by the
        # ratio of the two, at most 2; by default TRL would drop whole completions instead, the longest first.
        vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=2.0,
        cast_lm_head_to_fp32=True,  # in the engine too: most of the rounding between the two is the head's
        # A difference in novelty between verdicts that agree is not to be blown up to a standard deviation.
        scale_rewards="batch" if args.novelty else "group",
        use_bias_correction_kl=False,  # the paper's low-variance estimator ("k3"), as verl has it in the loss
        report_to=args.report_to, **trainers.trainer_settings(model),
    )  # fmt: skip
    shown, metrics = ["raw_reward", "completions/mean_length"], args.run / f"metrics_{args.reward}.jsonl"
    if args.engine == "vllm":  # transformers goes by the model's generation config; vLLM knows the base's alone
        config.generation_kwargs = {"stop_token_ids": model.generation_config.eos_token_id}
    callbacks = [trainers.progress_callback(f"GRPO, reward {args.reward}", shown, metrics)]
    if args.watch_every:
        callbacks.append(watch_callback(args, watch, updates))
    data = Dataset.from_list(prompts)
    parts = {"train_dataset": data, "processing_class": tokenizer, "callbacks": callbacks}
    trainer = grpo_trainer(args, model, rewards, config, **parts)
    trainers.fix_trainer(trainer)
    # On a 4-bit base TRL has rounded the policy to bf16, but not the reference, which was copied before.
    set_peft_model_state_dict(trainer.model, load_peft_weights(args.run / "policy_sft"), adapter_name="default")
    return trainer


def grpo_figures(args: argparse.Namespace, trainer, steps: list[dict], looks: list[dict]) -> dict:
    """The figures of 04_summary_*.json: seconds by phase, the engine, the reward, what games it, the watch, costs."""
    seconds = {}
    for phase in ("generate", "sync", "reward"):
        seconds[phase] = sum(row.get(f"seconds/{phase}", 0.0) for row in steps)
    seconds["train"] = sum(row["step_time"] for row in steps) - sum(seconds.values())
    seconds["total"] = sum(seconds.values())

    def mean(name: str) -> float | None:
        values = [row[name] for row in steps if row.get(name) is not None]
        return sum(values) / len(values) if values else None

    gaps = [row[GAP] for row in steps if row.get(GAP) is not None]
    syncs = trainer.vllm_generation.syncs if args.engine == "vllm" else []  # (seconds, bytes)
    rewarded = [row for row in steps if "raw_reward" in row]  # a second update from the same rollouts logs none
    first, last = first_and_last_tenth([row["raw_reward"] for row in rewarded])
    signs = {}
    for name in COUNTED:
        early, late = first_and_last_tenth([row[f"signs/{name}"] for row in rewarded])
        signs[name] = {"first": early, "last": late}
    store = open_store(args, f"04_{args.reward}")
    return {
        "steps": trainer.state.global_step,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "sync": {"ms": 1000 * sum(s for s, _ in syncs) / len(syncs), "bytes": syncs[-1][1]} if syncs else None,
        "logp_gap": {"mean": mean(GAP), "most": max(gaps)} if gaps else None,
        "importance_ratio": {name: mean(f"{RATIO}/{name}") for name in ("min", "mean", "max")} if gaps else None,
        "without_spread": mean("without_spread"),  # share of the queries' groups whose rewards are all alike
        "novelty": mean("novelty"),
        "cut_off": mean("completions/clipped_ratio"),  # share of the completions, at --max-tokens
        "reward": {"first": first, "last": last},
        "completions": args.mini_batch * args.samples * len(steps),
        "signs": signs,
        "failed_judgements": int(sum(row["failed_judgements"] for row in rewarded)),
        "watch": [{name: value for name, value in look.items() if name not in OF_TEXTS} for look in looks],
        "peak_gib": peak_gib(),
        "ledger": store.ledger("detector"),
        "watch_ledger": store.ledger("rubric"),
    }


# ---- the run --------------------------------------------------------------------------------------------------------


def open_stage(args: argparse.Namespace, base: str) -> run_folder.Stage:
    """The stage of this reward. What is missing to start is named here, before anything is loaded."""
    prompts = ["policy"]
    outputs = [args.name, f"metrics_{args.reward}.jsonl", f"{args.name}_checkpoints"]
    if args.reward == "none":
        settings = run_folder.settings(args, "SFT") | {"rank": args.rank, "bits": args.bits}
    else:
        check_adapter(args.run / "policy_sft", base)
        if run_folder.unfinished(args.run, "04_none"):
            run_folder.fail(f"the SFT of {args.run / 'policy_sft'} has not ended; go on with it by --reward none")
        settings = run_folder.settings(args, "GRPO", "watch", "models")
        settings["learnt"] = run_folder.file_hash(args.sft), run_folder.file_hash(REFERENCES)
        settings["policy_sft"] = run_folder.file_hash(args.run / "policy_sft" / "adapter_model.safetensors")
        outputs.append(f"rollouts_{args.reward}.jsonl")
        if args.watch_every:
            prompts.append("rubric")
            outputs += [f"watch_{args.reward}.jsonl", f"{args.name}_best"]
    if uses_likelihood(args):
        settings["likelihood"] = args.likelihood
    if args.reward == "likelihood":
        settings["worth"] = WORTH
    if args.reward == "rm":
        check_adapter(args.rm, base)
        settings["rm"] = run_folder.file_hash(args.rm)
    if args.reward == "judge":
        current_principles(args.principles)
        prompts.append("detector")
        settings["principles"] = run_folder.file_hash(args.principles)
        settings |= {"endpoint": endpoint_name(args), "graded": args.graded}
    settings |= {"base": base, "prompts": prompt_hashes(prompts, args.prompts)}
    return run_folder.Stage(args.run, f"04_{args.reward}", outputs, settings, args.redo)


def write_card(args: argparse.Namespace, base: str, steps: int, measure: str, change: dict) -> None:
    """README.md of the policy's folder, which hubs show as its model card."""
    prompt = conversation("...", args.prompts)[-1]["content"]
    template = (run_folder.ROOT / "common/templates/policy_card.md").read_text(encoding="utf-8")
    slots = {**vars(args), **change, "base": base, "steps": steps, "measure": measure, "prompt": prompt}
    run_folder.replace_file(args.run / args.name / "README.md", template.format(**slots))


def main(args: argparse.Namespace) -> int:
    started = time.time()
    base = policy_path(args)
    if args.plan:
        args.engine = args.engine or "vllm"
        show_plan(args, base)
        return 0
    choose_engine(args)
    if uses_likelihood(args):
        load_tokenizer(args.likelihood)  # what is wrong with it shows in a second
    run_folder.open_run(args.run)
    stage = open_stage(args, base)
    summary = f"04_summary_{args.reward}"
    if stage.done and run_folder.read_summary(args.run, summary):
        print(f"04: --reward {args.reward} done already, see {args.run / summary}.json")
        return 0
    if stage.replaced:  # its cost is of the policy that --redo has moved away
        open_store(args, f"04_{args.reward}").set_aside()
    if args.reward == "judge" or (args.reward != "none" and args.watch_every):
        Client.probe(args, f"04_{args.reward}")
    check_gpu(args, base)
    silence_libraries()
    figures = sft(args, base) if args.reward == "none" else grpo(args, base)
    if not run_folder.main_process():
        return 0
    measure = "loss" if args.reward == "none" else "reward"
    change = figures[measure]
    write_card(args, base, figures["steps"], measure, change)
    run_folder.write_summary(args, summary, started, figures)
    stage.finish()
    result = f"{figures['steps']} steps, {measure} {change['first']:.2f} to {change['last']:.2f}"
    print(f"04: --reward {args.reward}: {result}; policy in {args.run / args.name}")
    return 0


if __name__ == "__main__":
    sys.exit(run_folder.launch(main, parse_args()))
