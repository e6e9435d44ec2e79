"""Step 4: teach the policy: SFT on the accepted greetings (--reward none), then GRPO with either reward.

--reward none   SFT of a LoRA adapter on sft.jsonl: where both GRPO runs start.
--reward rm     GRPO from there; the reward is the score of step 2's reward model.
--reward judge  GRPO from there; the reward is the binary verdict of the judge under step 3's principles (--graded: its
                probability), asked for all completions of a step at once. A judgement that fails is no reward at
                all, never a 0.

Reads   queries, sft.jsonl (none), rm/ (rm), principles.jsonl (judge), policy_sft/ (rm, judge)
Writes  policy_sft/, policy_rm/ or policy_judge/, rollouts_*.jsonl (every completion with its reward), metrics_*.jsonl,
        04_summary_{none,rm,judge}.json
Paper   arXiv 2508.21476: 32 queries a step, 4 samples, 512 tokens, mini-batch 16, KL 0.001 (low-variance estimator), 5
        epochs, learning rate 3e-7 for full fine-tuning on 4 GPUs. Departures: QLoRA on one GPU, whose best learning
        rate is about ten times that of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret"): 3e-6.
        The loss is TRL's default, "dapo": GRPO's, averaged over the tokens of the step.
Example python 04_grpo.py --reward judge --offline --run outputs/mine
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from common import llm, models
from common.records import (
    ROOT,
    Demonstration,
    Query,
    Stage,
    add_run_flags,
    fail,
    file_hash,
    launch,
    open_run,
    parse,
    read,
    read_summary,
    write_summary,
)

OFFLINE = {
    "bits": 16, "sft_epochs": 5, "sft_learning_rate": 2e-3, "learning_rate": 1.5e-3, "samples": 8,
    "queries_per_step": 18, "mini_batch": 18, "micro_batch": 144, "max_tokens": 48, "steps": 32, "kl": 0.02,
}  # fmt: skip
NAMES = {"none": "policy_sft", "rm": "policy_rm", "judge": "policy_judge"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", choices=sorted(NAMES), required=True, help="none: SFT; rm, judge: GRPO")
    parser.add_argument("--queries", type=Path, default=ROOT / "data/queries.jsonl", help="what GRPO writes for")
    parser.add_argument("--sft", type=Path, help="demonstrations (RUN/sft.jsonl)")
    parser.add_argument("--rm", type=Path, help="reward model (RUN/rm)")
    parser.add_argument(
        "--principles", type=Path, help="versions of step 3 (RUN/principles.jsonl); the last accepted judges"
    )
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank (%(default)s)")
    parser.add_argument("--sft-epochs", type=float, default=3, help="%(default)s")
    parser.add_argument("--sft-learning-rate", type=float, default=1e-4, help="%(default)s")
    parser.add_argument("--sft-batch-size", type=int, default=16, help="%(default)s")
    parser.add_argument("--learning-rate", type=float, default=3e-6, help="of GRPO (%(default)s)")
    parser.add_argument("--epochs", type=float, default=5, help="of GRPO over the queries (%(default)s)")
    parser.add_argument("--steps", type=int, default=-1, help="of GRPO, instead of --epochs")
    parser.add_argument("--queries-per-step", type=int, default=32, help="written for at once (%(default)s)")
    parser.add_argument("--mini-batch", type=int, default=16, help="queries in one update (%(default)s)")
    parser.add_argument("--micro-batch", type=int, default=16, help="completions in one pass (%(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="completions a query (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a completion (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="%(default)s")
    parser.add_argument("--kl", type=float, default=0.001, help="coefficient of the KL term (%(default)s)")
    models.add_policy_flags(parser)
    llm.add_endpoint_flags(parser)
    add_run_flags(parser)
    args = parse(parser, OFFLINE)
    args.sft, args.rm = args.sft or args.run / "sft.jsonl", args.rm or args.run / "rm"
    args.principles = args.principles or args.run / "principles.jsonl"
    if args.queries_per_step % args.mini_batch or args.mini_batch * args.samples % args.micro_batch:
        fail("--queries-per-step must be a multiple of --mini-batch, and --mini-batch x --samples of --micro-batch")
    return args


def sft(args: argparse.Namespace, base: str) -> dict:
    """Train policy_sft/ on the demonstrations; returns the figures for the summary."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = read(args.sft, Demonstration, f"python 01_curate_preferences.py --run {args.run}")
    model, tokenizer = models.load_policy(base, args.bits)
    config = SFTConfig(
        output_dir=str(args.run / "sft_checkpoints"), num_train_epochs=args.sft_epochs, seed=args.seed,
        learning_rate=args.sft_learning_rate, per_device_train_batch_size=args.sft_batch_size, max_length=768,
        lr_scheduler_type="cosine", warmup_steps=0.05, logging_steps=1, save_strategy="no",
        **models.trainer_settings(args.bits),
    )  # fmt: skip
    bar = models.progress_callback("SFT", ["loss"], args.run / "metrics_none.jsonl")
    trainer = SFTTrainer(
        model=model, args=config, processing_class=tokenizer, callbacks=[bar],
        train_dataset=Dataset.from_list([r.model_dump(include={"prompt", "completion"}) for r in rows]),
        peft_config=models.lora(args.rank, 2 * args.rank, "CAUSAL_LM"),
    )  # fmt: skip
    models.prepare(trainer)
    trainer.train()
    trainer.save_model(str(args.run / NAMES["none"]))
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"steps": trainer.state.global_step, "rows": len(rows), "loss": {"first": losses[0], "last": losses[-1]}}


class Rewards:
    """The reward function of a GRPO run, which also writes rollouts_*.jsonl and counts seconds and failures."""

    def __init__(self, args: argparse.Namespace, base: str):
        self.args, self.seconds, self.failed, self.asked = args, 0.0, 0, 0
        self.rollouts = open(args.run / f"rollouts_{args.reward}.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        if args.reward == "rm":
            self.model = models.RewardModel(args.rm, base, args.bits, args.prompts)
        else:
            self.principles = llm.current_principles(args.principles)
            self.client = llm.Client(args, args.run)
            self.before = self.client.store.ledger(["detector"])

    async def judged(self, query: str, response: str) -> tuple[float | None, str]:
        """(reward, reason); the reward is None where the judge gave no usable verdict."""
        if not response.strip():
            return 0.0, "empty"
        try:
            verdict = await llm.judge(self.client, query, response, self.principles)
        except llm.Unusable as e:
            return None, f"failed: {e}"
        except SystemExit as e:  # would end TRL's thread and leave the trainer waiting for it
            raise llm.Refused("see the error above") from e
        return verdict.reward, verdict.reason

    async def __call__(self, completions: list, query: list[str], trainer_state, **kwargs) -> list[float | None]:
        """One reward a completion of the step, as TRL asks for them; None gives no learning signal."""
        started = time.perf_counter()
        texts = [completion[0]["content"] for completion in completions]
        if self.args.reward == "rm":
            scores = self.model.score(list(zip(query, texts, strict=True)))
            worst = min(scores)  # nothing written is no greeting, whatever the model makes of it
            found = [(s, "") if t.strip() else (worst, "empty") for s, t in zip(scores, texts, strict=True)]
        else:
            found = await asyncio.gather(*(self.judged(q, text) for q, text in zip(query, texts, strict=True)))
        self.seconds += time.perf_counter() - started
        missing = sum(reward is None for reward, _ in found)
        self.failed, self.asked = self.failed + missing, self.asked + len(found)
        for q, text, (reward, reason) in zip(query, texts, found, strict=True):
            row = {"step": trainer_state.global_step, "query": q, "response": text, "reward": reward, "reason": reason}
            self.rollouts.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rollouts.flush()
        if missing > len(found) / 2:
            why = next(reason for reward, reason in found if reward is None)
            raise llm.Refused(f"{missing} of {len(found)} judgements of a step {why}; mend the endpoint, run again")
        return [reward for reward, _ in found]


def grpo(args: argparse.Namespace, base: str) -> dict:
    """Train policy_rm/ or policy_judge/ from policy_sft/; returns the figures for the summary."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    queries = read(args.queries, Query)
    if len(queries) < args.queries_per_step:
        fail(
            f"{args.queries} has {len(queries)} queries, a step needs {args.queries_per_step}: lower --queries-per-step"
        )
    rewards = Rewards(args, base)
    model, tokenizer = models.load_policy(base, args.bits, args.run / NAMES["none"], trainable=True)
    completions = args.queries_per_step * args.samples
    config = GRPOConfig(
        output_dir=str(args.run / f"{args.reward}_checkpoints"), num_train_epochs=args.epochs, max_steps=args.steps,
        learning_rate=args.learning_rate, lr_scheduler_type="constant_with_warmup", warmup_steps=2, seed=args.seed,
        per_device_train_batch_size=args.micro_batch, num_generations=args.samples, beta=args.kl,
        gradient_accumulation_steps=args.mini_batch * args.samples // args.micro_batch,
        steps_per_generation=completions // args.micro_batch, max_completion_length=args.max_tokens,
        temperature=args.temperature, logging_steps=1, save_strategy="no", **models.trainer_settings(args.bits),
    )  # fmt: skip
    bar = models.progress_callback(
        f"GRPO, reward {args.reward}", ["reward", "completions/mean_length"], args.run / f"metrics_{args.reward}.jsonl"
    )
    trainer = GRPOTrainer(
        model=model, args=config, processing_class=tokenizer, reward_funcs=rewards, callbacks=[bar],
        train_dataset=Dataset.from_list(
            [{"prompt": models.conversation(q.query, args.prompts), "query": q.query} for q in queries]
        ),
    )  # fmt: skip
    models.prepare(trainer)
    generate, generating = trainer._generate, [0.0]

    def timed_generate(*inputs, **options):
        started = time.perf_counter()
        output = generate(*inputs, **options)
        generating[0] += time.perf_counter() - started
        return output

    trainer._generate = timed_generate
    started = time.perf_counter()
    try:
        trainer.train()
    except llm.Refused as e:
        fail(str(e))
    total = time.perf_counter() - started
    trainer.model.save_pretrained(args.run / NAMES[args.reward], selected_adapters=["default"])
    mean = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    tenth = max(1, len(mean) // 10)
    phases = {"total": total, "generate": generating[0], "reward": rewards.seconds}
    phases["train"] = total - phases["generate"] - phases["reward"]
    return {
        "steps": trainer.state.global_step, "engine": "transformers, the trained model itself",
        "seconds": {name: round(seconds, 1) for name, seconds in phases.items()},
        "sync": None, "logp_gap": None,  # there is no second copy of the weights
        "reward": {"first": sum(mean[:tenth]) / tenth, "last": sum(mean[-tenth:]) / tenth},
        "completions": rewards.asked, "failed_judgements": rewards.failed,
        "ledger": rewards.client.store.ledger(["detector"], since=rewards.before) if args.reward == "judge" else None,
    }  # fmt: skip


def main(args: argparse.Namespace) -> int:
    started = time.time()
    base, name = models.policy_path(args), NAMES[args.reward]
    open_run(args.run)
    inputs = {"none": {"sft": args.sft}, "rm": {"rm": args.rm}, "judge": {"principles": args.principles}}[args.reward]
    if args.reward == "judge":
        llm.current_principles(args.principles)  # says what is missing before anything is loaded
    if args.reward == "rm":
        models.check_adapter(args.rm, base)
    if args.reward != "none":
        inputs |= {"queries": args.queries, "policy_sft": args.run / NAMES["none"] / "adapter_model.safetensors"}
        models.check_adapter(args.run / NAMES["none"], base)
    names = ["seed", "bits", "rank"]
    if args.reward == "none":
        names += ["sft_epochs", "sft_learning_rate", "sft_batch_size"]
    else:
        names += ["learning_rate", "epochs", "steps", "queries_per_step", "mini_batch", "samples", "max_tokens"]
        names += ["temperature", "kl"]
    settings = {key: getattr(args, key) for key in names}
    settings |= {"prompts": llm.prompt_hashes(["policy", "detector"], args.prompts)}
    if args.reward == "judge":
        settings |= {"endpoint": llm.endpoint_name(args), "votes": args.votes, "graded": args.graded}
    outputs = [name, f"metrics_{args.reward}.jsonl"]
    if args.reward != "none":
        outputs.append(f"rollouts_{args.reward}.jsonl")
    made_from = {"base": base} | {key: file_hash(path) for key, path in inputs.items()}
    stage = Stage(args.run, f"04_{args.reward}", outputs, settings | made_from, args.redo)
    if stage.done and read_summary(args.run, f"04_summary_{args.reward}"):
        print(f"04: --reward {args.reward} done already, see {args.run / f'04_summary_{args.reward}.json'}")
        return 0
    (args.run / f"metrics_{args.reward}.jsonl").unlink(missing_ok=True)  # of a run that was killed
    if args.reward == "judge":
        llm.Client.probe(args, args.run)
    models.quiet()
    figures = sft(args, base) if args.reward == "none" else grpo(args, base)
    write_summary(args.run, f"04_summary_{args.reward}", started, vars(args), figures)
    stage.finish()
    if args.reward == "none":
        change = f"loss {figures['loss']['first']:.2f} to {figures['loss']['last']:.2f}"
    else:
        change = f"reward {figures['reward']['first']:.2f} to {figures['reward']['last']:.2f}"
    print(f"04: --reward {args.reward}: {figures['steps']} steps, {change}; policy in {args.run / name}")
    return 0


if __name__ == "__main__":
    sys.exit(launch(main, parse_args()))
