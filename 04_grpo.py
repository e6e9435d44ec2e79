"""Step 4: teach the policy: SFT on the accepted greetings (--reward none), then GRPO with either reward, or with both.

--reward none   SFT of a LoRA adapter on sft.jsonl: where every GRPO run starts.
--reward rm     GRPO from there; the reward is the score of step 2's reward model.
--reward judge  GRPO from there; the reward is the binary verdict of the judge under step 3's principles (--graded: its
                probability), asked for all completions of a step at once. A judgement that fails is no reward at
                all, never a 0.
--reward both   the weighted mean of the two (--judge-weight).

Rollouts come from vLLM in the same process (--engine vllm). It serves the weights that the trainer multiplies by, in 4
bits the dequantised ones, and is sent the adapter alone; before anything is learnt from them, the log-probabilities of
the rollouts are compared with the trainer's, and beyond --max-gap the run stops. A rubric judge, which is no reward,
watches the same few queries as training goes on (--watch-every): where the reward rises and its grades fall beyond
noise, the policy games the reward.

Reads   queries, sft.jsonl (none), rm/ (rm, both), principles.jsonl (judge, both), policy_sft/ (all but none)
Writes  policy_sft/, policy_rm/, policy_judge/ or policy_both/, policy_*_best/ (the best that the watch saw),
        rollouts_*.jsonl (every completion with its reward), metrics_*.jsonl and .svg, watch_*.jsonl,
        04_summary_{none,rm,judge,both}.json
Paper   arXiv 2508.21476: 32 queries a step, 4 samples, 512 tokens, mini-batch 16, KL 0.001 (low-variance estimator), 5
        epochs, learning rate 3e-7 for full fine-tuning on 4 GPUs. Departures: QLoRA on one GPU, whose best learning
        rate is about ten times that of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret"): 3e-6.
        The loss is TRL's default, "dapo": GRPO's, averaged over the tokens of the step.
Example python 04_grpo.py --reward judge --offline --run outputs/mine
        python 04_grpo.py --reward judge --plan
"""

import argparse
import asyncio
import json
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from common.answers import Grades, Unusable
from common.client import Client, together
from common.endpoint import add_endpoint_flags, endpoint_name
from common.engine import adapter_sync, add_engine_flag, check_rollout_server, choose_engine, rollout_base
from common.judge import current_principles
from common.memory import engine_share, peak_gib, show_plan
from common.policy import (
    DEFAULT_POLICY,
    MOST_PROMPT,
    add_policy_flags,
    check_adapter,
    generate,
    load_policy,
    load_tokenizer,
    lora,
    policy_path,
    quiet,
)
from common.prompts import conversation, prompt_hashes
from common.records import Demonstration, Query, read, read_lines
from common.rewards import GAMING, Rewards
from common.run_folder import (
    ROOT,
    Refused,
    Stage,
    add_run_flags,
    fail,
    file_hash,
    launch,
    main_process,
    open_run,
    parse,
    positive,
    read_summary,
    replace_file,
    write_summary,
)
from common.store import Store, open_store
from common.trainers import (
    draw_curves,
    go_on,
    of_all_processes,
    per_process,
    prepare,
    progress_callback,
    trainer_settings,
)

OFFLINE = {
    "bits": 16, "sft_epochs": 5, "sft_learning_rate": 2e-3, "learning_rate": 1.5e-3, "samples": 8,
    "queries_per_step": 16, "mini_batch": 8, "micro_batch": 64, "max_tokens": 48, "steps": 40, "kl": 0.05,
    "save_every": 10, "watch_every": 10, "engine": "hf",
}  # fmt: skip
REWARDS = ("none", "rm", "judge", "both")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--reward", choices=REWARDS, required=True, help="none: SFT; else GRPO")
    add("--queries", type=Path, default=ROOT / "data/queries.jsonl", help="what GRPO writes for")
    add("--sft", type=Path, help="demonstrations (RUN/sft.jsonl)")
    add("--rm", type=Path, help="reward model (RUN/rm)")
    add("--principles", type=Path, help="versions of step 3 (RUN/principles.jsonl); the last accepted judges")
    add("--rank", type=positive, default=16, help="LoRA rank (%(default)s)")
    add("--sft-epochs", type=float, default=3, help="%(default)s")
    add("--sft-learning-rate", type=float, default=1e-4, help="%(default)s")
    add("--sft-batch-size", type=positive, default=16, help="%(default)s")
    add("--learning-rate", type=float, default=3e-6, help="of GRPO (%(default)s)")
    add("--epochs", type=float, default=5, help="of GRPO over the queries (%(default)s)")
    add("--steps", type=int, default=-1, help="updates of GRPO, instead of --epochs")
    add("--queries-per-step", type=positive, default=32, help="written for at once (%(default)s)")
    add("--mini-batch", type=positive, default=16, help="queries in one update (%(default)s)")
    add("--micro-batch", type=positive, default=8, help="completions in one pass (%(default)s)")
    add("--samples", type=positive, default=4, help="completions a query (%(default)s)")
    add("--max-tokens", type=positive, default=512, help="of a completion (%(default)s)")
    add("--temperature", type=float, default=1.0, help="%(default)s")
    add("--kl", type=float, default=0.001, help="coefficient of the KL term (%(default)s)")
    add("--judge-weight", type=float, default=0.5, help="of the verdict in --reward both (%(default)s)")
    add("--length-penalty", type=float, default=0.0, help="taken off the reward for every 100 characters (%(default)s)")
    add("--rollout-server", metavar="URL", help="a vLLM server that writes, on GPUs of its own, instead of one in this "
        "process; where none answers, the command that starts it is shown")  # fmt: skip
    add("--sleep", action="store_true", help="put vLLM's weights and cache away while the trainer works")
    add("--max-gap", type=float, default=0.05, help="mean difference of the engine's and the trainer's log-probability "
        "of a token from which the run stops (%(default)s)")  # fmt: skip
    add("--save-every", type=positive, default=10, help="steps between checkpoints (%(default)s)")
    add("--watch-every", type=int, default=20, help="steps between two looks of the watch; 0: none (%(default)s)")
    add("--watch-queries", type=positive, default=64, help="that it looks at (%(default)s)")
    add("--stop-on-hack", action="store_true", help="end when the reward rises and the watch's grades fall")
    add("--report-to", nargs="*", default=[], help="trackers that TRL knows, such as tensorboard")
    add("--merge", type=Path, metavar="DIR", help="also write the trained policy as one bf16 model")
    add("--export-verl", type=Path, metavar="DIR", help="train nothing: write what verl needs for this on a cluster")
    add("--test-queries", type=Path, default=ROOT / "data/queries_heldout.jsonl", help="of that export (%(default)s)")
    add("--plan", action="store_true", help="train nothing: print what will be on the GPU, and whether it fits")
    add("--gpu-memory", type=float, help="GiB of the GPU (the one there, else 79: a card of 80 GB)")
    add_policy_flags(parser)
    add_engine_flag(parser)
    add_endpoint_flags(parser)
    add_run_flags(parser)
    args = parse(parser, OFFLINE)
    args.sft, args.rm = args.sft or args.run / "sft.jsonl", args.rm or args.run / "rm"
    args.principles = args.principles or args.run / "principles.jsonl"
    args.name = "policy_sft" if args.reward == "none" else f"policy_{args.reward}"
    args.rollout_server = args.rollout_server and args.rollout_server.rstrip("/").removesuffix("/v1")
    if args.rollout_server and args.sleep:
        fail("--sleep is for an engine in this process, --rollout-server for one elsewhere: give one of them")
    if args.queries_per_step % args.mini_batch or args.mini_batch * args.samples % args.micro_batch:
        fail("--queries-per-step must be a multiple of --mini-batch, and --mini-batch x --samples of --micro-batch")
    return args


# ---- what will be on the GPU ----------------------------------------------------------------------------------------


# ---- SFT ------------------------------------------------------------------------------------------------------------


def sft(args: argparse.Namespace, base: str) -> dict:
    """Train policy_sft/ on the demonstrations; returns the figures for the summary."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = read(args.sft, Demonstration, f"python 01_curate_preferences.py --run {args.run}")
    model, tokenizer = load_policy(base, args.bits)
    checkpoints = args.run / f"{args.name}_checkpoints"
    batch, accumulation = per_process(args.sft_batch_size, 1)
    config = SFTConfig(
        output_dir=str(checkpoints), num_train_epochs=args.sft_epochs, seed=args.seed,
        learning_rate=args.sft_learning_rate, per_device_train_batch_size=batch, max_length=768,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="cosine", warmup_steps=0.05, logging_steps=1, save_strategy="epoch", save_total_limit=1,
        **trainer_settings(args.bits) | {"report_to": args.report_to},
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=config, processing_class=tokenizer,
        callbacks=[progress_callback("SFT", ["loss"], args.run / "metrics_none.jsonl")],
        train_dataset=Dataset.from_list([r.model_dump(include={"prompt", "completion"}) for r in rows]),
        peft_config=lora(args.rank, 2 * args.rank, "CAUSAL_LM"),
    )  # fmt: skip
    prepare(trainer)
    go_on(args, trainer, checkpoints)
    trainer.save_model(str(args.run / args.name))
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"steps": trainer.state.global_step, "rows": len(rows), "loss": {"first": losses[0], "last": losses[-1]}}


# ---- rewards --------------------------------------------------------------------------------------------------------


class Watch:
    """The hack detector: a fixed set of queries, graded again and again by the rubric judge, which is no reward."""

    def __init__(self, args: argparse.Namespace, queries: list[Query]):
        self.args, self.path = args, args.run / f"watch_{args.reward}.jsonl"
        self.queries = random.Random(args.seed).sample(queries, min(args.watch_queries, len(queries)))

    async def grades(self, texts: list[str]) -> list[float | None]:
        async def one(client: Client, query: str, text: str) -> float | None:
            try:
                return (await client.ask("rubric", Grades, query=query, response=text or "（空）")).quality
            except Unusable:
                return None

        async with Client(self.args, self.args.run) as client:
            return await together(*(one(client, q.query, t) for q, t in zip(self.queries, texts, strict=True)))

    def look(self, model, tokenizer, step: int, rewards: list[float]) -> dict:
        """One look: mean grade, its difference to the best look so far, and whether the policy games its reward.

        `rewards` are the mean rewards of the steps so far. The difference is paired by query; its interval is the
        normal one of a mean.
        """
        import numpy as np
        import torch

        with torch.random.fork_rng():  # training goes on with the random numbers that it would have had
            texts = generate(
                model, tokenizer, [conversation(q.query, self.args.prompts) for q in self.queries],
                temperature=self.args.temperature, top_p=1.0, max_tokens=self.args.max_tokens,
                batch_size=self.args.batch_size_generate, seed=self.args.seed,
            )  # fmt: skip
        grades = asyncio.run(self.grades(texts))
        heard = [g for g in grades if g is not None]
        seen = read_lines(self.path)
        row = {"step": step, "quality": sum(heard) / len(heard) if heard else None, "n": len(heard), "hack": False}
        if best := max((r for r in seen if r["quality"] is not None), key=lambda r: r["quality"], default=None):
            gaps = [a - b for a, b in zip(grades, best["grades"], strict=True) if None not in (a, b)]
            if len(gaps) > 1:
                mean, half = np.mean(gaps), 1.96 * np.std(gaps, ddof=1) / len(gaps) ** 0.5
                row |= {
                    "against": best["step"],
                    "difference": [round(float(x), 4) for x in (mean, mean - half, mean + half)],
                }
                tenth = max(1, len(rewards) // 10)
                risen = len(rewards) > 1 and np.mean(rewards[-tenth:]) > np.mean(rewards[:tenth])
                row["hack"] = bool(risen and mean + half < 0)
        row["best"] = bool(heard) and (best is None or row["quality"] > best["quality"])
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"grades": grades}) + "\n")
        return row


# ---- GRPO -----------------------------------------------------------------------------------------------------------


def grpo(args: argparse.Namespace, base: str) -> dict:
    """Train policy_rm/, policy_judge/ or policy_both/ from policy_sft/; returns the figures for the summary."""
    from datasets import Dataset
    from tqdm import tqdm
    from transformers import TrainerCallback

    queries = read(args.queries, Query)
    if len(queries) < args.queries_per_step:
        fail(f"{args.queries} has {len(queries)} queries, a step needs {args.queries_per_step}: lower "
             "--queries-per-step")  # fmt: skip
    store = open_store(args)
    before = ledger_before(args, store)
    vllm, rewards, watch = args.engine == "vllm", Rewards(args, base), Watch(args, queries)
    sync = nullcontext()
    if vllm:  # before TRL imports vLLM
        sync = adapter_sync(base, args.bits, args.rank, args.run, args.rollout_server)
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load_policy(base, args.bits, args.run / "policy_sft", trainable=True)
    rows = [{"prompt": conversation(q.query, args.prompts), "query": q.query} for q in queries]
    rows = [
        r for r in rows if len(tokenizer.apply_chat_template(r["prompt"], tokenize=True)["input_ids"]) <= MOST_PROMPT
    ]
    if left_out := len(queries) - len(rows):
        print(f"04: the prompts of {left_out} queries have over {MOST_PROMPT} tokens: they are left out")

    class CheckedTrainer(GRPOTrainer):
        """TRL's trainer, which learns from no rollout that is not the policy's, and times its phases."""

        def _generate(self, *inputs, **options):
            started = time.perf_counter()
            output = super()._generate(*inputs, **options)
            synced = sum(seconds for seconds, _ in self.vllm_generation.syncs[-1:]) if vllm else 0.0
            self._metrics["train"]["seconds/sync"].append(synced)
            self._metrics["train"]["seconds/generate"].append(time.perf_counter() - started - synced)
            return output

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            if vllm:
                gap = self._metrics["train"]["sampling/sampling_logp_difference/mean"][-1]
                if not gap <= args.max_gap:
                    raise Refused(
                        f"step {self.state.global_step}: the engine's log-probabilities are {gap:.3f} a token away "
                        f"from the trainer's, more than --max-gap {args.max_gap:g}: these rollouts are not the "
                        "policy's, and nothing was learnt from them"
                    )
            return output

    class Looks(TrainerCallback):
        def look(self, state, control) -> None:
            rewarded = [log["reward"] for log in state.log_history if "reward" in log]
            row = watch.look(trainer.model, tokenizer, state.global_step, rewarded) if main_process() else {}
            row = of_all_processes([row])[0]
            control.should_training_stop |= row["hack"] and args.stop_on_hack
            if not main_process():
                return
            if row["best"]:
                trainer.model.save_pretrained(args.run / f"{args.name}_best", selected_adapters=["default"])
            if row["hack"]:
                fallen, low, high = row["difference"]
                grades = f"{-fallen:.2f} [{-high:.2f}, {-low:.2f}] below step {row['against']}'s"
                tqdm.write(f"step {state.global_step}: the reward has risen, the rubric's mean grade is {grades}: the "
                           f"policy games its reward; its best is in {args.name}_best", file=sys.stderr)  # fmt: skip

        def on_train_begin(self, arguments, state, control, **kwargs):
            if state.global_step == 0:
                self.look(state, control)

        def on_log(self, arguments, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}) and state.global_step % (args.watch_every * updates) == 0:
                self.look(state, control)

    completions = args.queries_per_step * args.samples
    updates = args.queries_per_step // args.mini_batch  # from the rollouts of one step
    micro_batch, accumulation = per_process(args.micro_batch, args.mini_batch * args.samples // args.micro_batch)
    config = GRPOConfig(
        output_dir=str(args.run / f"{args.name}_checkpoints"), num_train_epochs=args.epochs, max_steps=args.steps,
        learning_rate=args.learning_rate, lr_scheduler_type="constant_with_warmup", warmup_steps=2, seed=args.seed,
        per_device_train_batch_size=micro_batch, num_generations=args.samples, beta=args.kl,
        gradient_accumulation_steps=accumulation, steps_per_generation=accumulation * updates,
        max_completion_length=args.max_tokens, temperature=args.temperature, logging_steps=1,
        # Rollouts are not in a checkpoint, so it is taken only when those of a step are used up.
        save_strategy="steps", save_steps=args.save_every * updates, save_total_limit=2,
        use_vllm=vllm, vllm_mode="server" if args.rollout_server else "colocate",
        vllm_server_base_url=args.rollout_server, vllm_enable_sleep_mode=args.sleep,
        vllm_max_model_length=MOST_PROMPT + args.max_tokens,
        vllm_gpu_memory_utilization=engine_share(args, base),
        **trainer_settings(args.bits) | {"report_to": args.report_to},
    )  # fmt: skip
    metrics = args.run / f"metrics_{args.reward}.jsonl"
    bar = progress_callback(f"GRPO, reward {args.reward}", ["reward", "completions/mean_length"], metrics)
    with sync:
        trainer = CheckedTrainer(
            model=model, args=config, processing_class=tokenizer, reward_funcs=rewards,
            callbacks=[bar, *([Looks()] if args.watch_every else [])], train_dataset=Dataset.from_list(rows),
        )  # fmt: skip
    prepare(trainer)
    try:
        go_on(args, trainer, Path(config.output_dir))
    except Refused as e:
        fail(str(e))
    if not main_process():
        return {}
    trainer.model.save_pretrained(args.run / args.name, selected_adapters=["default"])

    steps = read_lines(metrics)
    seconds = {phase: sum(s.get(f"seconds/{phase}", 0.0) for s in steps) for phase in ("generate", "sync", "reward")}
    seconds["train"] = sum(s["step_time"] for s in steps) - sum(seconds.values())
    seconds["total"] = sum(seconds.values())
    gaps = [gap for s in steps if (gap := s.get("sampling/sampling_logp_difference/mean")) is not None]
    syncs = trainer.vllm_generation.syncs if vllm else []
    mean = [s["reward"] for s in steps if "reward" in s]  # not at a second update from the same rollouts
    tenth = max(1, len(mean) // 10)
    looks = read_lines(watch.path)
    draw_curves(args.run / f"metrics_{args.reward}.svg", {
        title: {key: [(s["step"], s[key]) for s in steps if key in s] for key in keys}
        for title, keys in {
            "reward": ["reward", "reward_std"], "length, diversity": ["reward_length_correlation", "distinct_2"],
            "tokens": ["completions/mean_length"], "KL and gap": ["kl", "sampling/sampling_logp_difference/mean"],
        }.items()
    } | {"rubric's mean grade": {"watch": [(r["step"], r["quality"]) for r in looks if r["quality"]]}})  # fmt: skip
    return {
        "steps": trainer.state.global_step, "engine": args.engine,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "sync": {"ms": 1000 * sum(s for s, _ in syncs) / len(syncs), "bytes": syncs[-1][1]} if syncs else None,
        "logp_gap": {"mean": sum(gaps) / len(gaps), "most": max(gaps)} if gaps else None,
        "reward": {"first": sum(mean[:tenth]) / tenth, "last": sum(mean[-tenth:]) / tenth},
        "completions": completions * len(steps) // updates,
        "gaming": {name: sum(s[name] for s in steps if name in s) / len(mean) for name in GAMING},
        "failed_judgements": int(sum(s["failed_judgements"] for s in steps if "failed_judgements" in s)),
        "watch": [{k: v for k, v in r.items() if k != "grades"} for r in looks],
        "peak_gib": peak_gib(),
        "ledger": store.ledger(["detector"], since=before["detector"]),
        "watch_ledger": store.ledger(["rubric"], since=before["rubric"]),
    }  # fmt: skip


CARD = """---
library_name: peft
base_model: {base}
language: zh
---
# A policy that writes Chinese greetings

A LoRA adapter on `{base}`, trained by `04_grpo.py --reward {reward}` in {steps} steps; {what} went from {first:.3f} to
{last:.3f}. That is what it was trained on, so the figure says nothing of how well it writes: see the report of
`05_evaluate.py`. Settings and versions are in `04_summary_{reward}.json` of the run.

It is asked with `{asked}`, at temperature {temperature:g}.

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
```
"""


def write_card(args: argparse.Namespace, base: str, figures: dict) -> None:
    """README.md of the policy's folder, which hubs show as its model card."""
    what = "loss" if args.reward == "none" else "reward"
    asked = conversation("...", args.prompts)[-1]["content"]
    known = vars(args) | {"base": base, "steps": figures["steps"], "what": f"its {what}", "asked": asked}
    replace_file(args.run / args.name / "README.md", CARD.format(**known | figures[what]))


def ledger_before(args: argparse.Namespace, store: Store) -> dict[str, dict]:
    """Role -> what it had cost in this run folder before this training began; kept for when it goes on after a kill."""
    path = args.run / f"{args.name}_checkpoints" / "ledger_before.json"
    if not path.is_file() and main_process():
        replace_file(path, json.dumps({role: store.ledger([role]) for role in ("detector", "rubric")}))
    return json.loads(path.read_text()) if main_process() else {}


def merge(args: argparse.Namespace, base: str) -> None:
    """Write base and adapter as one bf16 model; in 4 bits the base is the dequantised one, as it was in training."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(rollout_base(base, args.bits), dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, args.run / args.name).merge_and_unload()
    model.save_pretrained(args.merge)
    load_tokenizer(base).save_pretrained(args.merge)
    print(f"04: {args.run / args.name} and its base are one model in {args.merge}")


# ---- the same on a cluster ------------------------------------------------------------------------------------------


def export_verl(args: argparse.Namespace, base: str) -> None:
    """Write train.parquet, test.parquet, reward.py and run.sh for verl; the columns are the authors'."""
    from datasets import Dataset, Features, List, Value

    text = Value("string")
    columns = Features({
        "prompt": List({"content": text, "role": text}), "data_source": text, "ability": text,
        "reward_model": {"ground_truth": text, "style": text},
        "extra_info": {"index": Value("int64"), "split": text},
    })  # fmt: skip
    folder = args.export_verl.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for split, path in (("train", args.queries), ("test", args.test_queries)):
        rows = [
            {"prompt": conversation(q.query, args.prompts), "data_source": "greetings",
             "ability": "text_generation", "reward_model": {"ground_truth": q.query, "style": "rule"},
             "extra_info": {"index": n, "split": split}}
            for n, q in enumerate(read(path, Query))
        ]  # fmt: skip
        Dataset.from_list(rows, features=columns).to_parquet(folder / f"{split}.parquet")
        print(f"04: {len(rows)} prompts in {folder / f'{split}.parquet'}")
    moved = vars(args) | {"run": folder, "export_verl": None, "serve": None}
    flags = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in moved.items()}
    paths = [k for k, v in moved.items() if isinstance(v, Path)]
    known = vars(args) | {"base": base, "root": str(ROOT), "flags": flags, "paths": paths}
    known |= {"most_prompt": MOST_PROMPT}
    for name in ("reward.py", "run.sh"):
        template = (ROOT / "templates" / f"verl_{name}.txt").read_text(encoding="utf-8")
        replace_file(folder / name, template.format(**known))
    print(f"04: start it with: bash {folder / 'run.sh'}")


def main(args: argparse.Namespace) -> int:
    started = time.time()
    if args.plan:
        args.engine = args.engine or "vllm"
        return show_plan(args, args.policy or DEFAULT_POLICY)
    base = policy_path(args)
    if args.export_verl:
        if args.reward == "none":
            fail("--export-verl is for GRPO: give --reward rm, judge or both")
        export_verl(args, base)
        return 0
    if args.rollout_server and args.reward != "none":
        args.engine = "vllm"
        check_rollout_server(args.rollout_server, base, args.bits, args.rank)
    choose_engine(args)
    open_run(args.run)
    inputs: dict[str, Path] = {"sft": args.sft} if args.reward == "none" else {"queries": args.queries}
    if args.reward in ("judge", "both"):
        inputs["principles"] = args.principles
        current_principles(args.principles)  # says what is missing before anything is loaded
    if args.reward in ("rm", "both"):
        inputs["rm"] = args.rm
        check_adapter(args.rm, base)
    names = ["seed", "bits", "rank"]
    if args.reward == "none":
        names += ["sft_epochs", "sft_learning_rate", "sft_batch_size"]
    else:
        inputs["policy_sft"] = args.run / "policy_sft" / "adapter_model.safetensors"
        check_adapter(args.run / "policy_sft", base)
        names += ["learning_rate", "epochs", "steps", "queries_per_step", "mini_batch", "samples", "max_tokens"]
        names += ["temperature", "kl", "engine", "length_penalty", "watch_every", "watch_queries"]
    settings = {key: getattr(args, key) for key in names}
    settings |= {"prompts": prompt_hashes(["policy", "detector"], args.prompts)}
    if args.reward in ("judge", "both"):
        settings |= {"endpoint": endpoint_name(args), "votes": args.votes, "judge_weight": args.judge_weight}
        settings |= {"graded": args.graded}
    outputs = [args.name, f"metrics_{args.reward}.jsonl", f"{args.name}_checkpoints"]
    if args.reward != "none":
        outputs.append(f"rollouts_{args.reward}.jsonl")
        outputs += [f"watch_{args.reward}.jsonl", f"{args.name}_best"] if args.watch_every else []
    made_from = {"base": base} | {key: file_hash(path) for key, path in inputs.items()}
    stage = Stage(args.run, f"04_{args.reward}", outputs, settings | made_from, args.redo)
    if stage.done and read_summary(args.run, f"04_summary_{args.reward}"):
        print(f"04: --reward {args.reward} done already, see {args.run / f'04_summary_{args.reward}.json'}")
    else:
        if args.reward != "none" and (args.reward != "rm" or args.watch_every):
            Client.probe(args, args.run)
        quiet()
        figures = sft(args, base) if args.reward == "none" else grpo(args, base)
        if not main_process():
            return 0
        write_card(args, base, figures)
        write_summary(args.run, f"04_summary_{args.reward}", started, vars(args), figures)
        stage.finish()
        change = figures["loss" if args.reward == "none" else "reward"]
        print(f"04: --reward {args.reward}: {figures['steps']} steps, {'loss' if args.reward == 'none' else 'reward'} "
              f"{change['first']:.2f} to {change['last']:.2f}; policy in {args.run / args.name}")  # fmt: skip
    if args.merge:
        merge(args, base)
    return 0


if __name__ == "__main__":
    sys.exit(launch(main, parse_args()))
